"""The training loop, as a user runs it: python train.py ... on a world of a few pictures and a model of a few numbers."""
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model as model_module  # noqa: E402
from extra.hf import load_model  # noqa: E402
import train  # noqa: E402
from extra import checkpoint  # noqa: E402

TINY = dict(vision="{'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 1, 'num_heads': 2, 'image_size': 32, "
                   "'patch_size': 8, 'feature_layers': (-1,)}",
            language="{'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, "
                     "'head_dim': 8, 'vocab_size': 1024}",
            image_size=32, pooling=1, train_vision=True, seq_len=512, batch_size=2, learning_rate=3e-3, warmup_steps=2,
            max_steps=20, save_interval=100, eval_interval=0, num_workers=0, threads=1, dtype='float32',
            mixture="{'shapes': 0.8, 'shapes_text': 0.2}")


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """data/shapes, data/clocks and data/shapes_text with a handful of rows, and the tokenizer."""
    out = tmp_path_factory.mktemp('world')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '40', '--num_clocks', '10',
                    '--num_text', '20', '--num_clips', '8', '--num_validation', '10', '--workers', '1'], check=True, capture_output=True)
    return out


def command(world, out, *args, **settings):
    settings = {**TINY, 'data_dir': world, 'tokenizer': world / 'shapes', 'out_dir': out, **settings}
    return [sys.executable, str(ROOT / 'train.py'), *args, *(f'--{k}={v}' for k, v in settings.items())]


def run(world, out, *args, code=0, launch=(), preexec_fn=None, cwd=ROOT, script=ROOT / 'train.py', **settings):
    python, _, *rest = command(world, out, *args, **settings)
    done = subprocess.run([python, *launch, script, *rest], capture_output=True, text=True, cwd=cwd, preexec_fn=preexec_fn,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics(out):
    lines = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    return {r['step']: r for r in lines if 'loss' in r}


def weights(out):
    return load_file(out / (out / 'latest').read_text().strip() / 'model.safetensors')


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- resume

DROPOUT = dict(residual_dropout=.1)        # a resumed run must go on with the same random numbers


@pytest.fixture(scope='session')
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole') / 'out'
    run(world, out, **DROPOUT)
    return out


def test_resume_is_bit_exact_twice_at_odd_steps_and_with_workers(world, uninterrupted, tmp_path):
    # The learning rate must not depend on where a run was cut, so max_steps stays and a signal or save does the cutting
    for stop in (7, 13):
        partial(world, tmp_path / 'out', stop)
    run(world, tmp_path / 'out', num_workers=1, eval_interval=4, eval_batches=1, eval_answers=1, **DROPOUT)
    assert same(weights(uninterrupted), weights(tmp_path / 'out'))
    whole, pieces = metrics(uninterrupted), metrics(tmp_path / 'out')
    assert [whole[i]['loss'] for i in range(1, 21)] == [pieces[i]['loss'] for i in range(1, 21)]
    # A test that compares hashes must know that something was learned
    first = load_model(uninterrupted / 'step000020')
    start = model_module.VLM(first.config)
    start.init_weights(train.seed)
    assert not torch.equal(first.language_model.norm.weight, start.language_model.norm.weight)


def partial(world, out, stop):
    """Runs in this process's child until a SIGTERM raised from inside at step `stop`: as a scheduler would."""
    code = ("import os, signal, sys, runpy; sys.argv = sys.argv[1:]; import torch; n = [0]; step = torch.optim.AdamW.step\n"
            "def counted(self, *a, **k):\n"
            "    n[0] += self.param_groups[0]['part'] == 'language'      # an AdamW for each part: this one comes last\n"
            "    if n[0] == int(os.environ['STOP_AFTER']): os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return step(self, *a, **k)\n"
            "torch.optim.AdamW.step = counted\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = max([0, *(int(p.name[4:]) for p in out.glob('step*'))])
    argv = command(world, out, **DROPOUT)
    finished = subprocess.run([sys.executable, '-c', code, *argv[1:]], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'STOP_AFTER': str(stop - done)})
    assert finished.returncode == 0, finished.stdout + finished.stderr    # SIGTERM saves and leaves with 0
    assert (out / 'latest').read_text().strip() == f'step{stop:06d}'


def test_interrupted_save_leaves_the_last_checkpoint(world, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    run(world, out, max_steps=4)
    stray = out / '.step000099.tmp'            # what a crash in the middle of a save leaves
    stray.mkdir()
    (stray / 'model.safetensors').write_bytes(b'half')
    run(world, out, max_steps=8, save_interval=1, keep=2)
    assert not stray.exists() and sorted(p.name for p in out.glob('step*')) == ['step000007', 'step000008']
    # the checkpoint that it went on from is gone; what is left is whole all the same
    assert (out / 'step000008/tokenizer.json').read_bytes() == (world / 'shapes/tokenizer.json').read_bytes()


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(world, tmp_path):
    run(world, tmp_path / 'cut', max_steps=5, save_interval=2, schedule='constant')
    run(world, tmp_path / 'whole', max_steps=7, schedule='constant')
    hurt = next((tmp_path / 'cut/step000005/train_state').glob('*.distcp'))
    content = bytearray(hurt.read_bytes())
    content[len(content) // 2] ^= 1
    hurt.write_bytes(content)
    done = run(world, tmp_path / 'cut', max_steps=7, schedule='constant')
    assert f'step000005 is damaged (train_state/{hurt.name}' in done.stdout and 'resuming from' in done.stdout
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))
    for folder in (tmp_path / 'cut').glob('step*'):
        (folder / 'config.json').unlink()
    done = run(world, tmp_path / 'cut', max_steps=9, code=1)
    assert 'is whole' in done.stderr and 'Traceback' not in done.stderr


def test_a_full_disk_costs_no_checkpoint_but_the_one_it_has_no_room_for(world, tmp_path):
    out = tmp_path / 'out'
    run(world, out, max_steps=4)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))       # no file may be larger
    done = run(world, out, max_steps=7, save_interval=5, code=1, preexec_fn=full)
    assert 'the checkpoint of step 5 could not be written' in done.stdout + done.stderr
    assert 'Training goes on' in done.stdout + done.stderr and 'Make room' in done.stderr
    assert sorted(p.name for p in out.iterdir()) == ['latest', 'metrics.jsonl', 'skipped.jsonl', 'step000004']
    run(world, out, max_steps=7)
    assert (out / 'latest').read_text().strip() == 'step000007'


def test_a_url_keeps_the_run_when_the_machine_is_gone(world, tmp_path):
    bucket, url = tmp_path / 'bucket/run', f'file://{tmp_path}/bucket/run'
    machines = [tmp_path / str(i) for i in range(3)]
    for machine in machines:
        machine.mkdir()
    same_run = dict(save_interval=2, keep=2, schedule='constant')
    run(world, url, cwd=machines[0], max_steps=5, **same_run)
    assert sorted(p.name for p in bucket.iterdir()) == ['latest', 'metrics.jsonl', 'skipped.jsonl', 'step000004', 'step000005']
    (bucket / 'step000005/model.safetensors').write_bytes(b'half')
    done = run(world, url, cwd=machines[1], max_steps=7, **same_run)
    assert 'step000005 is damaged (model.safetensors' in done.stdout and 'step000004' in done.stdout
    run(world, tmp_path / 'whole', max_steps=7, schedule='constant')
    assert same(weights(tmp_path / 'whole'), weights(bucket)) and sorted(metrics(bucket)) == list(range(1, 8))
    done = run(world, url, cwd=machines[0], max_steps=7, **same_run)       # has step 5 itself
    assert 'step000007\n' in done.stdout.partition('resuming from')[2].splitlines(True)[0]
    shutil.rmtree(bucket)                      # what the URL lacks and this machine has is copied again
    run(world, url, cwd=machines[1], max_steps=7, **same_run)
    assert same(weights(tmp_path / 'whole'), weights(bucket))
    for wrong, told in (('s3://bucket/run', 'Install s3fs'), ('nowhere://run', 'Protocol not known')):
        assert told in run(world, wrong, cwd=machines[2], code=1).stderr


def test_torchrun_starts_a_killed_run_again(world, tmp_path):
    """A rank dies of SIGKILL, once; both processes come back by themselves and go on from the checkpoint."""
    (tmp_path / 'dies.py').write_text(
        "import os, pathlib, runpy, signal, sys, torch\n"
        f"n, mark, step = [0], pathlib.Path({str(tmp_path / 'died')!r}), torch.optim.AdamW.step\n"
        "def counted(self, *a, **k):\n"
        "    n[0] += 1\n"
        "    if os.environ['RANK'] == '1' and n[0] == 13 and not mark.exists():      # an AdamW for each of three parts\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "torch.optim.AdamW.step = counted\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=1']
    same_run = dict(max_steps=7, save_interval=2, batch_size=1)
    done = run(world, tmp_path / 'out', script=tmp_path / 'dies.py', launch=torchrun, **same_run)
    assert 'resuming from' in done.stdout and (tmp_path / 'died').exists()
    run(world, tmp_path / 'whole', launch=torchrun, eval_interval=3, eval_batches=1, eval_answers=2, **same_run)
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'out'))      # answers on the way change nothing
    assert sorted(metrics(tmp_path / 'out')) == list(range(1, 8))
    lines = [json.loads(line) for line in (tmp_path / 'whole/metrics.jsonl').read_text().splitlines()]
    scores = [line for line in lines if 'validation/shapes/pointing/F1' in line]
    assert [line['step'] for line in scores] == [3, 6, 7] and 'validation/shapes_text/text/accuracy' in scores[0]
    done = run(world, tmp_path / 'sharded', launch=torchrun, code=1, parallel='fsdp', eval_answers=2, **same_run)
    assert "parallel = 'ddp'" in done.stderr


# -- the objective

def test_accumulation_and_rows_do_not_change_the_step(world, tmp_path):
    """4 x 1, 2 x 2 and 1 x 4 micro-batches: same loss, same gradient norm, same weights after a step."""
    outs = []
    for i, (rows, times) in enumerate(((4, 1), (2, 2), (1, 4))):
        outs.append(tmp_path / str(i))
        run(world, outs[-1], batch_size=rows, accumulation=times, max_steps=2)
    one = metrics(outs[0])
    for out in outs[1:]:
        for step in (1, 2):
            assert metrics(out)[step]['loss'] == pytest.approx(one[step]['loss'], rel=1e-5)
            assert metrics(out)[step]['grad_norm'] == pytest.approx(one[step]['grad_norm'], rel=1e-4)


def test_trees_are_the_weighted_sum_of_their_conversations(world):
    """Loss and gradients of records with many branches, in rows or packed, equal their conversations' one by one."""
    dataset = data.Dataset(world / 'shapes')
    settings = {k: eval(v) if k in ('vision', 'language') else v for k, v in TINY.items()}
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, point_digits=2, task_weights=train.task_weights)
    vlm = model_module.VLM(model_module.make_config(settings['vision'], settings['language'], pooling=1,
                                                    **processor.token_ids()))
    vlm.init_weights(1)
    with torch.no_grad():                      # some matrices start at 0 and would hide the gradients of those before
        for p in vlm.parameters():
            if not p.any():
                p.normal_(0, .1)
    records = [dataset[i] for i in range(3)]
    assert all(len(r['conversations']) > 3 for r in records)

    def loss_and_gradients(batches):
        vlm.zero_grad()
        losses = [vlm(batch)[0] for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), {n: p.grad.clone() for n, p in vlm.named_parameters()}

    def example(record):
        return processor.example(record, dataset.folder)
    alone = [data.collate([[example({**r, 'conversations': [c]})]], processor) for r in records for c in r['conversations']]
    trees = data.collate([[example(r)] for r in records], processor)
    packed = data.collate([[example(r) for r in records]], processor)
    assert packed.tokens.shape[0] == 1 and packed.tokens.numel() - 8 < sum(len(example(r).tokens) for r in records)
    expected, gradients = loss_and_gradients(alone)
    for batch in (trees, packed):
        loss, got = loss_and_gradients([batch])
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, grad in gradients.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5 * expected, msg=name)
            assert grad.abs().max() > 0, name


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_non_finite_gradient_never_reaches_the_weights(optimizer, monkeypatch):
    for name, value in dict(optimizer=optimizer, grad_clip=1., weight_decay=.1, train_language=True).items():
        monkeypatch.setattr(train, name, value)
    vision, language = eval(TINY['vision']), eval(TINY['language'])
    vlm = model_module.VLM(model_module.make_config(vision, language, pooling=1))
    vlm.init_weights()
    optimizers, parameters = train.make_optimizers(vlm), list(vlm.parameters())

    def state():
        moments = [v.clone() for o in optimizers for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
        return [p.detach().clone() for p in parameters] + moments

    def step(value):
        torch.manual_seed(0)
        for p in parameters:
            p.grad = torch.randn_like(p)
        parameters[5].grad.view(-1)[0] = value
        return train.step_optimizers(optimizers, 0)
    assert step(1.)[1] == 0
    for poison in (float('nan'), float('inf')):
        before = state()
        norm, bad = step(poison)
        assert bad == 1 and not torch.isfinite(norm)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert step(1.)[1] == 0 and not all(torch.equal(a, b) for a, b in zip(before, state()))


@pytest.mark.parametrize('parts', [False, True])
def test_clipping_by_grad_scale_is_clipping(monkeypatch, parts):
    """Fused AdamW divides by grad_scale; the same step with clip_grad_norm_ and no scale gives the same weights, with
    one norm and with a norm for each part."""
    for name, value in dict(grad_clip=.5, optimizer='adamw', clip_parts=parts, warmup_steps=10, vision_warmup_steps=5,
                            learning_rate=1e-3, connector_learning_rate=2e-3).items():
        monkeypatch.setattr(train, name, value)
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        vlm = model_module.VLM(model_module.make_config(eval(TINY['vision']), eval(TINY['language']), pooling=1))
        vlm.init_weights()
        parameters = list(vlm.parameters())
        by_part = list(vlm.parts().values())
        optimizers = train.make_optimizers(vlm)
        for _ in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.randn_like(p) * (i + 1)
            if ours:
                train.step_optimizers(optimizers, 3)
                continue
            for group in by_part if parts else [parameters]:
                torch.nn.utils.clip_grad_norm_(group, .5)
            for opt, rate in zip(optimizers, (1e-3 * 4 / 5, 2e-3 * 4 / 10, 1e-3 * 4 / 10), strict=True):
                opt.param_groups[0]['lr'] = rate
                opt.step()
        results.append([p.detach().clone() for p in parameters])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_schedules(monkeypatch):
    for name, value in dict(max_steps=110, min_lr_ratio=.1).items():
        monkeypatch.setattr(train, name, value)
    for schedule, middle, end in (('cosine', .55, .1), ('linear', .55, .1), ('constant', 1, 1),
                                  ('inverse_sqrt', (10 / 61) ** .5, (10 / 111) ** .5)):
        monkeypatch.setattr(train, 'schedule', schedule)
        assert train.get_lr_scale(0, 10) == .1 and train.get_lr_scale(9, 10) == 1
        assert train.get_lr_scale(60, 10) == pytest.approx(middle, abs=1e-6)
        assert train.get_lr_scale(110, 10) == pytest.approx(end, abs=1e-6)


def test_it_learns(world, tmp_path):
    """Forty pictures by heart: from ln(1024) = 6.9 to less than a quarter of it."""
    run(world, tmp_path, max_steps=150, batch_size=4, eval_interval=150, eval_batches=2)
    record = metrics(tmp_path)
    assert record[1]['loss'] == pytest.approx(6.93, abs=.1) and record[150]['loss'] < 6.93 / 4
    assert 'loss/pointing' in record[150] and record[150]['tokens_per_second'] > 0
    assert len(record) == 150


def test_frozen_parts_stay_and_carry_no_state(world, tmp_path):
    run(world, tmp_path, max_steps=2, train_vision=False, train_embedding=False)
    end = load_model(tmp_path / 'step000002')
    fresh = model_module.VLM(end.config)
    fresh.init_weights(train.seed)
    kept = {n for n, p in end.named_parameters() if torch.equal(p, fresh.get_parameter(n))}
    assert kept == {n for n, _ in end.named_parameters() if n.startswith('vision_tower.') or 'embed_tokens' in n}
    stored = dcp.FileSystemReader(tmp_path / 'step000002/train_state').read_metadata().state_dict_metadata
    assert {name.rpartition('.')[0] for name in stored} == {n for n, _ in fresh.named_parameters()} - kept
    error = run(world, tmp_path, code=1, max_steps=3).stderr      # resumed with all parts
    assert 'was trained with other parts' in error and error.count('\n') == 1


def test_narrow_numbers_take_nearly_the_same_steps_and_a_trace_is_written(world, tmp_path):
    run(world, tmp_path / 'float32', max_steps=8, schedule='constant')
    for name, change in (('bfloat16', dict(dtype='bfloat16', profile_steps='(2, 3)')), ('float16', dict(dtype='float16')),
                         ('weights', dict(dtype='bfloat16', master_dtype='bfloat16'))):
        run(world, tmp_path / name, max_steps=5, schedule='constant', **change)
        run(world, tmp_path / name, max_steps=8, schedule='constant', **change)
    expected = metrics(tmp_path / 'float32')
    for name in ('bfloat16', 'float16', 'weights'):
        losses = metrics(tmp_path / name)
        assert all(losses[i]['loss'] == pytest.approx(expected[i]['loss'], rel=.02) for i in range(1, 9)), name
        assert losses[8]['nonfinite'] == 0
    assert weights(tmp_path / 'weights')['language_model.model.norm.weight'].dtype == torch.bfloat16
    trace = json.loads((tmp_path / 'bfloat16/trace-rank0.json').read_text())
    assert any('backward' in event.get('name', '').lower() for event in trace['traceEvents'])


def test_an_overflow_halves_the_scale_and_a_long_peace_doubles_it():
    scaling = torch.tensor([1024., 1998.])
    for bad, expected in ((0., [1024., 1999.]), (0., [2048., 0.]), (1., [1024., 0.]), (0., [1024., 1.])):
        scaling = train.update_loss_scale(scaling, torch.tensor(bad))
        assert scaling.tolist() == expected


# -- several processes

TWO, FOUR = (('-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}') for n in (2, 4))


def test_two_processes_take_the_steps_of_one(world, tmp_path):
    """Pictures on one rank while the other reads text alone: tokens and weights differ between them, and so would a
    mean of their means; the tower of one has nothing to see."""
    settings = dict(max_steps=6, schedule='constant', eval_interval=3, eval_batches=2, accumulation=2,
                    mixture="{'shapes': 0.5, 'shapes_text': 0.5}")
    run(world, tmp_path / 'one', batch_size=2, **settings)
    run(world, tmp_path / 'two', batch_size=1, **{**settings, 'max_steps': 3}, launch=TWO)
    run(world, tmp_path / 'two', batch_size=1, **settings, launch=TWO)           # goes on where it was
    records = [(tmp_path / out / 'metrics.jsonl').read_text().splitlines() for out in ('one', 'two')]
    assert len(records[0]) == len(records[1]) == 8
    for one, two in zip(*(map(json.loads, lines) for lines in records)):
        for key in one.keys() - {'seconds', 'data_wait', 'minutes', 'tokens_per_second', 'tflops'}:
            assert one[key] == pytest.approx(two[key], abs=1e-5), (one['step'], key)
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-5


@pytest.mark.parametrize('cp', [1, 2])
def test_two_processes_resume_bit_for_bit(world, tmp_path, cp):
    settings = dict(packing=True, schedule='constant', batch_size=1, parallel='fsdp', optimizer='muon', cp=cp, **DROPOUT)
    run(world, tmp_path / 'whole', max_steps=6, **settings, launch=TWO)
    run(world, tmp_path / 'cut', max_steps=3, **settings, launch=TWO)
    run(world, tmp_path / 'cut', max_steps=6, **settings, launch=TWO)
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))


def test_a_run_goes_on_with_any_number_of_processes(world, tmp_path):
    """Four rows a step, however many share them out: the same losses, step by step, and the same weights."""
    settings = dict(schedule='constant', mixture="{'shapes': 0.5, 'shapes_text': 0.5}")
    run(world, tmp_path / 'one', batch_size=4, max_steps=8, **settings)
    for steps, launch, layout in ((2, FOUR, dict(parallel='fsdp', cp=2, batch_size=2)), (4, (), dict(batch_size=4)),
                                  (6, TWO, dict(parallel='fsdp', batch_size=2)), (8, TWO, dict(cp=2, batch_size=4))):
        run(world, tmp_path / 'many', max_steps=steps, **settings, **layout, launch=launch)
    one, many = metrics(tmp_path / 'one'), metrics(tmp_path / 'many')
    for step in range(1, 9):
        for key in ('loss', 'grad_norm', 'tokens', 'loss_tokens', 'visual_tokens'):
            assert one[step][key] == pytest.approx(many[step][key], rel=1e-4), (step, key)
    one, many = weights(tmp_path / 'one'), weights(tmp_path / 'many')
    assert max((one[k] - many[k]).abs().max() for k in one) < 1e-4


def test_moments_are_made_on_the_device_of_their_parameter():
    """Fused AdamW reads the number of steps in its kernel: on the CPU it would be an illegal access on CUDA."""
    p = torch.empty(3, 4, device='meta')
    for size in (p.shape, torch.Size([])):
        moment = checkpoint.room_for_moment(p, size)
        assert moment.device == p.device and moment.shape == size


def test_random_states_come_back(monkeypatch):
    """Of the device too, which dropout draws from."""
    fake = {'state': torch.tensor([1], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda dev: fake['state'].clone())
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, dev: fake.update(state=state))
    dev = torch.device('cuda', 0)
    state = checkpoint.random_state(dev)
    expected = torch.rand(3)
    fake['state'] = torch.tensor([2], dtype=torch.uint8)
    checkpoint.set_random_state(state, dev)
    assert torch.equal(torch.rand(3), expected) and fake['state'].item() == 1


def test_the_seed_is_that_of_dropout_too(world, tmp_path):
    runs = dict(one=1, again=1, other=2)
    losses = {}
    for name, seed in runs.items():
        run(world, tmp_path / name, max_steps=2, seed=seed, mixture="{'shapes': 1.0}", **DROPOUT)
        losses[name] = metrics(tmp_path / name)[2]['loss']
    assert losses['one'] == losses['again'] != losses['other']


# -- without PyAV

@pytest.fixture
def no_pyav(tmp_path, monkeypatch):
    """An environment where `import av` fails."""
    folder = tmp_path / 'no_pyav'
    folder.mkdir()
    (folder / 'av.py').write_text("raise ImportError(\"No module named 'av'\")\n")
    monkeypatch.setenv('PYTHONPATH', str(folder))


def test_pictures_train_without_pyav_and_a_video_says_what_is_missing(world, tmp_path, no_pyav):
    few = ['--num', '4', '--num_clocks', '0', '--num_text', '0', '--num_clips', '0', '--num_validation', '2', '--workers', '1']
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', tmp_path / 'drawn', *few], check=True, capture_output=True)
    assert sorted(p.name for p in (tmp_path / 'drawn').iterdir()) == ['shapes']
    run(tmp_path / 'drawn', tmp_path / 'out', max_steps=1, mixture="{'shapes': 1.0}")
    for workers in (0, 1):
        done = run(world, tmp_path / f'clips{workers}', max_steps=2, mixture="{'clips': 1.0}", num_workers=workers, code=1)
        assert done.stderr.strip().splitlines()[-1].startswith('error: videos need PyAV') and 'Traceback' not in done.stderr


# -- kindness

def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path):
    out = run(world, tmp_path / 'out', dry_run=True).stdout
    assert 'learning_rate = 0.003' in out and 'ln(vocabulary) = 6.931' in out and 'nothing is missing' in out
    assert not (tmp_path / 'out').exists()


def test_dry_run_of_stage1_needs_neither_weights_nor_data():
    done = subprocess.run([sys.executable, 'train.py', 'config/stage1.py', '--dry_run', '--device=cpu'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '596,049,920   67.1%  trained' in done.stdout and '290,909,184   32.8%  frozen' in done.stdout
    assert 'missing: data/pixmo-cap/train.jsonl' in done.stdout


@pytest.mark.parametrize('change, message', [
    (dict(learning_rat=1), "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
    (dict(batch_size='many'), 'batch_size'),
    (dict(mixture="{'nowhere': 1.0}"), 'nowhere/train.jsonl does not exist'),
    (dict(mixture='{}'), 'mixture is empty'),
    (dict(tokenizer='/nonexistent'), 'tokenizer.json does not exist'),
    (dict(vision='clip'), "vision = 'clip' is not in the table"),
    (dict(init_from='/nonexistent'), 'is not a checkpoint folder'),
    (dict(image_size=33), 'image_size 33 is not a multiple'),
    (dict(language=TINY['language'].replace('1024', '64')), "the decoder's table only 64 rows"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(world, tmp_path, change, message):
    done = run(world, tmp_path / 'out', code=1, **change)
    assert message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists()


def test_bad_rows_are_skipped_counted_and_named(world, tmp_path):
    folder = tmp_path / 'mixed'
    (folder / 'media').mkdir(parents=True)
    Image.new('RGB', (32, 32), 'red').save(folder / 'media/ok.png')
    (folder / 'media/text.jpg').write_text('not a picture')
    (folder / 'media/cut.png').write_bytes((folder / 'media/ok.png').read_bytes()[:60])
    talk = [{'role': 'user', 'content': 'What colour?'}, {'role': 'assistant', 'content': 'red'}]
    good = json.dumps({'images': ['media/ok.png'], 'messages': talk})
    bad = [json.dumps({'images': [f'media/{name}'], 'messages': talk}) for name in ('text.jpg', 'cut.png', 'none.png')]
    bad += ['{"images": [', json.dumps({'images': [], 'messages': talk[:1]})]
    (folder / 'train.jsonl').write_text('\n'.join([good] * 10 + bad) + '\n')
    settings = dict(data_dir=tmp_path, mixture="{'mixed': 1.0}", max_steps=15)
    done = run(world, tmp_path / 'out', max_bad_fraction=.5, **settings)
    problems = [json.loads(line) for line in (tmp_path / 'out/skipped.jsonl').read_text().splitlines()]
    assert {p['reason'] for p in problems} == {'unreadable media', 'missing media', 'broken JSON', 'no answer'}
    assert {p['row'].rsplit(' ')[-1] for p in problems} == {'11', '12', '13', '14', '15'}
    assert 'rows skipped: mixed: ' in done.stdout and metrics(tmp_path / 'out')[15]['skipped'] == len(problems)
    assert 'max_bad_fraction' in run(world, tmp_path / 'out2', code=1, **{**settings, 'max_steps': 100}).stderr


def test_muon_trains_and_resumes(world, tmp_path):
    run(world, tmp_path / 'a', optimizer='muon', max_steps=6)
    partial_settings = dict(optimizer='muon', max_steps=6, save_interval=3)
    run(world, tmp_path / 'b', **partial_settings)
    (tmp_path / 'b/latest').write_text('step000003\n')       # as if killed after the save at step 3
    run(world, tmp_path / 'b', **partial_settings)
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))
