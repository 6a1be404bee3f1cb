"""Kills a run of two processes again and again, lets it go on, and compares what is left with a run in peace.

    python tests/kill.py --kills=50 [--seed=0]       about 15 minutes, not in the suite

Half of the kills wait for a checkpoint to be written, a third take one of the two processes only. In the end weights
and the place in the data must be the same bit for bit, and nothing else may lie about.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from train import damage  # noqa: E402


def start(settings, out):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', str(ROOT / 'train.py'),
               *(f'--{k}={v}' for k, v in {**settings, 'out_dir': out}.items())]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def workers(process):
    """Process ids of the two ranks: children of torchrun."""
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


def steps(out):
    try:
        return len((out / 'metrics.jsonl').read_text().splitlines())
    except OSError:
        return 0


def saving(out):
    return any(out.glob('.step*.tmp'))


def strike(process, out, chance):
    """Waits for a moment, kills; returns what was hit: '' if the run ended before."""
    where, alone = chance.choice(['writing', 'anywhere']), chance.random() < 1 / 3
    before, wait, until = steps(out), chance.uniform(0, 1.5), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until and steps(out) <= before:
        time.sleep(.01)                        # it has begun to train
    since = time.monotonic()
    while process.poll() is None and not (saving(out) if where == 'writing' else time.monotonic() > since + wait):
        time.sleep(.0005)
    if process.poll() is not None:
        return ''
    hit = 'writing' if saving(out) else 'between'
    try:
        victims = workers(process)
        if alone and victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)     # torchrun; its workers lead groups of their own
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return hit + (', one rank' if alone else ', both')


def kill(settings, folder, kills, seed=0):
    """Both runs; returns {what was hit: times}. AssertionError where they differ."""
    chance, folder, hits = random.Random(seed), Path(folder), {}
    peace = start(settings, folder / 'peace')
    told = peace.communicate()[0]
    assert peace.returncode == 0, told
    out = folder / 'war'
    while sum(hits.values()) < kills:
        process = start(settings, out)
        if not (hit := strike(process, out, chance)):
            told = process.communicate()[0]
            assert process.returncode == 0, told
            break                              # it got to the end
        hits[hit] = hits.get(hit, 0) + 1
        if (out / 'latest').exists():
            newest = out / (out / 'latest').read_text().strip()
            assert not damage(newest), newest
    process = start(settings, out)
    told = process.communicate()[0]
    assert process.returncode == 0, told
    ends = [run / (run / 'latest').read_text().strip() for run in (folder / 'peace', out)]
    assert ends[0].name == ends[1].name
    one, other = (load_file(end / 'model.safetensors') for end in ends)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    one, other = (torch.load(end / 'train_state/state.pt', weights_only=True) for end in ends)
    assert one['step'] == other['step']
    assert [r['loader'] for r in one['ranks']] == [r['loader'] for r in other['ranks']]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (folder / 'peace').iterdir())
    return hits


if __name__ == '__main__':
    from test_train import TINY
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--world', help='the shapes world; else it is drawn')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = args.world or Path(folder) / 'world'
        if not args.world:
            numbers = ['--num', '40', '--num_clips', '8', '--num_clocks', '10', '--num_text', '20', '--num_validation', '10']
            subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', world, *numbers], check=True)
        settings = {**TINY, 'data_dir': world, 'tokenizer': Path(world) / 'shapes', 'save_interval': 7, 'keep': 2,
                    'max_steps': 14 * args.kills, 'packing': True}
        print(json.dumps(kill(settings, folder, args.kills, args.seed), indent=1))
