"""Kills a run of two processes again and again, lets it resume, and compares the end with that of a
run without kills.

    python tests/kill.py --kills=50 [--seed=0]       about 15 minutes, not in the suite

Half of the kills wait for a checkpoint to be written, a third hit only one of the two processes.
In the end the weights and the places in the data must be the same bit for bit, and no other file
may be left.
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
from extra.checkpoint import verify  # noqa: E402


def start(settings, out):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
               str(ROOT / 'train.py'), f'--out_dir={out}']
    for name, value in settings.items():
        command.append(f'--{name}={value}')
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(process):
    """Waits for the end of a run, which must be a good one."""
    output, _ = process.communicate()
    assert process.returncode == 0, output


def workers(process):
    """Process ids of the two ranks: children of torchrun."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    return [int(pid) for pid in children.split()]


def num_steps(out):
    try:
        return len((out / 'metrics.jsonl').read_text().splitlines())
    except OSError:
        return 0


def is_saving(out):
    return any(out.glob('.step*.tmp'))


def latest(out):
    """The folder of the newest checkpoint."""
    return out / (out / 'latest').read_text().strip()


def wait_for_a_step(process, out):
    """Waits, two minutes at most, until another step has been logged."""
    before = num_steps(out)
    until = time.monotonic() + 120
    while process.poll() is None and num_steps(out) <= before and time.monotonic() < until:
        time.sleep(.01)


def strike(process, out, chance):
    """Waits for a moment, then kills. Returns what was hit, '' if the run ended before."""
    waits_for_save = chance.choice(['writing', 'anywhere']) == 'writing'
    only_one = chance.random() < 1 / 3
    seconds = chance.uniform(0, 1.5)
    wait_for_a_step(process, out)
    since = time.monotonic()
    while process.poll() is None:
        is_moment = is_saving(out) if waits_for_save else time.monotonic() > since + seconds
        if is_moment:
            break
        time.sleep(.0005)
    if process.poll() is not None:
        return ''
    hit = 'writing' if is_saving(out) else 'between'
    try:
        victims = workers(process)
        if only_one and victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)     # torchrun; its workers have their own groups
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return hit + (', one rank' if only_one else ', both')


def kill(settings, folder, kills, seed=0):
    """Both runs. Returns {what was hit: times}; an AssertionError says where they differ."""
    chance = random.Random(seed)
    peaceful = Path(folder) / 'peaceful'
    killed = Path(folder) / 'killed'
    finish(start(settings, peaceful))
    hits = {}
    while sum(hits.values()) < kills:
        process = start(settings, killed)
        hit = strike(process, killed, chance)
        if not hit:                        # it got to the end
            finish(process)
            break
        hits[hit] = hits.get(hit, 0) + 1
        if (killed / 'latest').exists():
            newest = latest(killed)
            assert not verify(newest), newest
    finish(start(settings, killed))
    compare(peaceful, killed)
    return hits


def compare(one_run, other_run):
    one_end = latest(one_run)
    other_end = latest(other_run)
    assert one_end.name == other_end.name
    one = load_file(one_end / 'model.safetensors')
    other = load_file(other_end / 'model.safetensors')
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    one = torch.load(one_end / 'train_state/state.pt', weights_only=True)
    other = torch.load(other_end / 'train_state/state.pt', weights_only=True)
    assert one['step'] == other['step']
    assert [r['loader'] for r in one['ranks']] == [r['loader'] for r in other['ranks']]
    assert names_in(one_run) == names_in(other_run)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def main():
    from test_train import TINY, draw_shapes
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--world', help='the shapes world; else it is drawn')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = args.world
        if not world:
            world = Path(folder) / 'world'
            draw_shapes(world, num=40, num_clips=8, num_clocks=10, num_text=20, num_validation=10)
        settings = {
            **TINY,
            'data_dir': world,
            'tokenizer': Path(world) / 'shapes',
            'save_interval': 7,
            'keep': 2,
            'max_steps': 14 * args.kills,
            'packing': True,
        }
        hits = kill(settings, folder, args.kills, args.seed)
        print(json.dumps(hits, indent=1))


if __name__ == '__main__':
    main()
