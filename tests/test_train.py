"""The training loop, as a user runs it: python train.py ... on a world of a few pictures and a tiny
model."""
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

VISION = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
              patch_size=8, feature_layers=(-1,))
LANGUAGE = dict(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
                head_dim=8, vocab_size=1024)
TINY = dict(vision=str(VISION), language=str(LANGUAGE), image_size=32, pooling=1, train_vision=True,
            seq_len=512, batch_size=2, learning_rate=3e-3, warmup_steps=2, max_steps=20,
            save_interval=100, eval_interval=0, num_workers=0, threads=1, dtype='float32',
            mixture="{'shapes': 0.8, 'shapes_text': 0.2}")


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """data/shapes, data/clocks and data/shapes_text with a handful of rows, and the tokenizer."""
    out = tmp_path_factory.mktemp('world')
    draw_shapes(out, num=40, num_clocks=10, num_text=20, num_clips=8, num_validation=10)
    return out


def draw_shapes(out, **numbers):
    command = [sys.executable, ROOT / 'prepare/shapes.py', f'--out={out}', '--workers=1']
    for name, number in numbers.items():
        command.append(f'--{name}={number}')
    subprocess.run(command, check=True, capture_output=True)


def flags(world, out, **settings):
    """The flags of train.py."""
    places = dict(data_dir=world, tokenizer=world / 'shapes', out_dir=out)
    settings = {**TINY, **places, **settings}
    return [f'--{name}={value}' for name, value in settings.items()]


def torchrun(num_processes):
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={num_processes}']


def run(world, out, code=0, launch=(), preexec_fn=None, cwd=ROOT, script=ROOT / 'train.py',
        **settings):
    """Runs train.py, which must exit with `code`. launch: what stands before the script."""
    done = subprocess.run([sys.executable, *launch, script, *flags(world, out, **settings)],
                          capture_output=True, text=True, cwd=cwd, preexec_fn=preexec_fn,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out):
    """{step: its line of metrics.jsonl}, validation left out."""
    return {line['step']: line for line in read_lines(out / 'metrics.jsonl') if 'loss' in line}


def losses(out):
    """[(step, loss), ..]"""
    return [(step, line['loss']) for step, line in metrics(out).items()]


def latest(out):
    """The name of the newest checkpoint, such as step000004."""
    return (out / 'latest').read_text().strip()


def weights(out):
    return load_file(out / latest(out) / 'model.safetensors')


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max() for name in a)


def names_in(folder, pattern='*'):
    return sorted(path.name for path in folder.glob(pattern))


def tiny_model(**token_ids):
    return model_module.VLM(model_module.make_config(VISION, LANGUAGE, pooling=1, **token_ids))


def set_settings(monkeypatch, **settings):
    """Settings of train.py, for this test."""
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)


# -- resume

DROPOUT = dict(residual_dropout=.1)        # a resumed run must go on with the same random numbers


def test_resume_is_bit_exact_after_two_sigterms(world, tmp_path):
    """At odd steps, the last time with workers and with validation in between."""
    # The learning rate must not depend on where a run was cut, so max_steps stays and a signal cuts
    whole = tmp_path / 'whole'
    run(world, whole, **DROPOUT)
    out = tmp_path / 'out'
    run_until_sigterm(world, out, tmp_path, steps=7)
    assert latest(out) == 'step000007'
    run_until_sigterm(world, out, tmp_path, steps=13 - 7)
    assert latest(out) == 'step000013'
    run(world, out, num_workers=1, eval_interval=4, eval_batches=1, eval_answers=1, **DROPOUT)
    assert same(weights(whole), weights(out))
    assert len(losses(out)) == 20
    assert losses(whole) == losses(out)
    # A test that compares hashes must know that something was learned
    end = load_model(whole / 'step000020')
    start = model_module.VLM(end.config)
    start.init_weights(train.seed)
    assert not torch.equal(end.language_model.norm.weight, start.language_model.norm.weight)


SIGTERM_AFTER = """
import os, runpy, signal, sys
import torch
steps = 0
step = torch.optim.AdamW.step

def counted(self, *args, **rest):
    global steps
    if self.param_groups[0]['part'] == 'language':      # there is an AdamW for each part
        steps += 1
        if steps == {steps}:
            os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **rest)

torch.optim.AdamW.step = counted
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""


def run_until_sigterm(world, out, tmp_path, steps):
    """Goes on until it gets a SIGTERM in a step, as from a scheduler; it saves and exits with 0."""
    script = tmp_path / 'sigterm.py'
    script.write_text(SIGTERM_AFTER.format(steps=steps, root=str(ROOT)))
    run(world, out, script=script, **DROPOUT)


def test_save_removes_partial_and_old_checkpoints(world, tmp_path):
    out = tmp_path / 'out'
    run(world, out, max_steps=4)
    stray = out / '.step000099.tmp'        # what a crash in the middle of a save leaves
    stray.mkdir()
    (stray / 'model.safetensors').write_bytes(b'half')
    run(world, out, max_steps=8, save_interval=1, keep=2)
    assert not stray.exists()
    assert names_in(out, 'step*') == ['step000007', 'step000008']
    # The checkpoint that it went on from is gone; what is left is whole all the same
    tokenizer = (world / 'shapes/tokenizer.json').read_bytes()
    assert (out / 'step000008/tokenizer.json').read_bytes() == tokenizer


def test_resume_skips_damaged_checkpoint(world, tmp_path):
    cut = tmp_path / 'cut'
    whole = tmp_path / 'whole'
    run(world, cut, max_steps=5, save_interval=2, schedule='constant')
    run(world, whole, max_steps=7, schedule='constant')
    damaged = next((cut / 'step000005/train_state').glob('*.distcp'))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1        # one bit
    damaged.write_bytes(content)
    done = run(world, cut, max_steps=7, schedule='constant')
    assert f'step000005 is damaged (train_state/{damaged.name}' in done.stdout
    assert 'resuming from' in done.stdout
    assert same(weights(whole), weights(cut))
    for folder in cut.glob('step*'):
        (folder / 'config.json').unlink()
    done = run(world, cut, max_steps=9, code=1)
    assert 'is whole' in done.stderr
    assert 'Traceback' not in done.stderr


def test_save_failure_keeps_last_checkpoint(world, tmp_path):
    out = tmp_path / 'out'
    run(world, out, max_steps=4)

    def limit_files():                     # as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = run(world, out, max_steps=7, save_interval=5, code=1, preexec_fn=limit_files)
    assert 'the checkpoint of step 5 could not be written' in done.stdout + done.stderr
    assert 'Training goes on' in done.stdout + done.stderr
    assert 'Make room' in done.stderr
    assert names_in(out) == ['latest', 'metrics.jsonl', 'skipped.jsonl', 'step000004']
    run(world, out, max_steps=7)
    assert latest(out) == 'step000007'


def test_remote_out_dir_resumes_on_another_machine(world, tmp_path):
    bucket = tmp_path / 'bucket/run'
    url = f'file://{bucket}'
    machines = [tmp_path / str(i) for i in range(3)]       # working directories, with an out/ each
    for machine in machines:
        machine.mkdir()
    same_run = dict(save_interval=2, keep=2, schedule='constant')
    run(world, url, cwd=machines[0], max_steps=5, **same_run)
    assert names_in(bucket) == [
        'latest', 'metrics.jsonl', 'skipped.jsonl', 'step000004', 'step000005']

    (bucket / 'step000005/model.safetensors').write_bytes(b'half')
    done = run(world, url, cwd=machines[1], max_steps=7, **same_run)
    assert 'step000005 is damaged (model.safetensors' in done.stdout
    assert 'step000004' in done.stdout
    run(world, tmp_path / 'whole', max_steps=7, schedule='constant')
    assert same(weights(tmp_path / 'whole'), weights(bucket))
    assert sorted(metrics(bucket)) == list(range(1, 8))

    done = run(world, url, cwd=machines[0], max_steps=7, **same_run)       # has step 5 itself
    resumed_from = done.stdout.partition('resuming from')[2]
    assert 'step000007\n' in resumed_from.splitlines(True)[0]

    shutil.rmtree(bucket)                  # what the URL lacks and this machine has is copied again
    run(world, url, cwd=machines[1], max_steps=7, **same_run)
    assert same(weights(tmp_path / 'whole'), weights(bucket))

    done = run(world, 's3://bucket/run', cwd=machines[2], code=1)
    assert 'Install s3fs' in done.stderr
    done = run(world, 'nowhere://run', cwd=machines[2], code=1)
    assert 'Protocol not known' in done.stderr


SIGKILL_ONCE = """
import os, pathlib, runpy, signal, sys
import torch
calls = 0
mark = pathlib.Path({mark!r})
step = torch.optim.AdamW.step

def counted(self, *args, **rest):
    global calls
    calls += 1                             # of an AdamW for each of three parts: in step 5
    if os.environ['RANK'] == '1' and calls == 13 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **rest)

torch.optim.AdamW.step = counted
sys.path.insert(0, {root!r})
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""


def test_torchrun_restart_resumes_after_sigkill(world, tmp_path):
    """A rank dies of SIGKILL, once; torchrun starts both again, and they resume by themselves."""
    died = tmp_path / 'died'
    script = tmp_path / 'dies.py'
    script.write_text(SIGKILL_ONCE.format(mark=str(died), root=str(ROOT)))
    launch = [*torchrun(2), '--max-restarts=1']
    same_run = dict(max_steps=7, save_interval=2, batch_size=1)
    done = run(world, tmp_path / 'out', script=script, launch=launch, **same_run)
    assert 'resuming from' in done.stdout
    assert died.exists()
    run(world, tmp_path / 'whole', launch=launch, eval_interval=3, eval_batches=1, eval_answers=2,
        **same_run)
    # The scores of answers on the way change nothing
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'out'))
    assert sorted(metrics(tmp_path / 'out')) == list(range(1, 8))
    lines = read_lines(tmp_path / 'whole/metrics.jsonl')
    scores = [line for line in lines if 'validation/shapes/pointing/F1' in line]
    assert [line['step'] for line in scores] == [3, 6, 7]
    assert 'validation/shapes_text/text/accuracy' in scores[0]
    done = run(world, tmp_path / 'sharded', launch=launch, code=1, parallel='fsdp', eval_answers=2,
               **same_run)
    assert "parallel = 'ddp'" in done.stderr


# -- the objective

def test_gradient_accumulation_equals_larger_batch(world, tmp_path):
    """4 rows x 1, 2 x 2 and 1 x 4 micro-batches: same loss, same gradient norm, and again after a
    step."""
    for rows, times in ((4, 1), (2, 2), (1, 4)):
        run(world, tmp_path / f'{rows}x{times}', batch_size=rows, accumulation=times, max_steps=2)
    one = metrics(tmp_path / '4x1')
    for name in ('2x2', '1x4'):
        other = metrics(tmp_path / name)
        for step in (1, 2):
            assert other[step]['loss'] == pytest.approx(one[step]['loss'], rel=1e-5)
            assert other[step]['grad_norm'] == pytest.approx(one[step]['grad_norm'], rel=1e-4)


def test_message_tree_loss_equals_sum_of_conversations(world):
    """And the gradients. Of records with many branches, a record a row or packed into one row."""
    dataset = data.Dataset(world / 'shapes')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, point_digits=2,
                               task_weights=train.task_weights)
    vlm = tiny_model(**processor.token_ids())
    vlm.init_weights(1)
    # Some matrices start at 0 and would hide the gradients of those before
    with torch.no_grad():
        for p in vlm.parameters():
            if not p.any():
                p.normal_(0, .1)

    def loss_and_gradients(batches):
        vlm.zero_grad()
        total = sum(vlm(batch)[0] for batch in batches)
        total.backward()
        return total.item(), {name: p.grad.clone() for name, p in vlm.named_parameters()}

    def example(record):
        return processor.example(record, dataset.folder)

    alone = []
    examples = []
    for record in (dataset[0], dataset[1], dataset[2]):
        assert len(record['conversations']) > 3
        examples.append(example(record))
        for conversation in record['conversations']:
            single = {**record, 'conversations': [conversation]}
            alone.append(data.collate([[example(single)]], processor))
    trees = data.collate([[e] for e in examples], processor)
    packed = data.collate([examples], processor)
    assert packed.tokens.shape[0] == 1
    assert packed.tokens.numel() - 8 < sum(len(e.tokens) for e in examples)
    expected, gradients = loss_and_gradients(alone)
    for batch in (trees, packed):
        loss, got = loss_and_gradients([batch])
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, grad in gradients.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5 * expected, msg=name)
            assert grad.abs().max() > 0, name


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_nonfinite_gradient_leaves_weights_unchanged(optimizer, monkeypatch):
    set_settings(monkeypatch, optimizer=optimizer, grad_clip=1., weight_decay=.1,
                 train_language=True)
    vlm = tiny_model()
    vlm.init_weights()
    optimizers = train.make_optimizers(vlm)
    parameters = list(vlm.parameters())

    def state():
        """A copy of all weights and moments."""
        tensors = [p.detach().clone() for p in parameters]
        for opt in optimizers:
            for moments in opt.state.values():
                tensors += [v.clone() for v in moments.values() if torch.is_tensor(v)]
        return tensors

    def step(value):
        """A step with `value` among the gradients."""
        torch.manual_seed(0)
        for p in parameters:
            p.grad = torch.randn_like(p)
        parameters[5].grad.view(-1)[0] = value
        return train.step_optimizers(optimizers, 0)

    norm, found_inf = step(1.)
    assert found_inf == 0
    for value in (float('nan'), float('inf')):
        before = state()
        norm, found_inf = step(value)
        assert found_inf == 1
        assert not torch.isfinite(norm)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    norm, found_inf = step(1.)
    assert found_inf == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, state()))


@pytest.mark.quick
@pytest.mark.parametrize('parts', [False, True])
def test_gradient_clipping_equals_clip_grad_norm(monkeypatch, parts):
    """Fused AdamW divides by grad_scale; the same step with clip_grad_norm_ and no scale gives the
    same weights, with one norm and with a norm for each part. So do the rates of the parts."""
    set_settings(monkeypatch, grad_clip=.5, optimizer='adamw', clip_parts=parts, warmup_steps=10,
                 vision_warmup_steps=5, learning_rate=1e-3, connector_learning_rate=2e-3)
    # Of vision, connector and language at step 3
    rates = (1e-3 * 4 / 5, 2e-3 * 4 / 10, 1e-3 * 4 / 10)

    def weights_after_three_steps(step):
        torch.manual_seed(0)
        vlm = tiny_model()
        vlm.init_weights()
        optimizers = train.make_optimizers(vlm)
        for _ in range(3):
            for i, p in enumerate(vlm.parameters()):
                p.grad = torch.randn_like(p) * (i + 1)
            step(vlm, optimizers)
        return [p.detach().clone() for p in vlm.parameters()]

    def ours(vlm, optimizers):
        train.step_optimizers(optimizers, 3)

    def theirs(vlm, optimizers):
        groups = list(vlm.parts().values()) if parts else [list(vlm.parameters())]
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, .5)
        for opt, rate in zip(optimizers, rates, strict=True):
            opt.param_groups[0]['lr'] = rate
            opt.step()

    got = weights_after_three_steps(ours)
    expected = weights_after_three_steps(theirs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.quick
@pytest.mark.parametrize('schedule,middle,end', [
    ('cosine', .55, .1),
    ('linear', .55, .1),
    ('constant', 1, 1),
    ('inverse_sqrt', (10 / 61) ** .5, (10 / 111) ** .5),
])
def test_learning_rate_schedules(monkeypatch, schedule, middle, end):
    set_settings(monkeypatch, max_steps=110, min_lr_ratio=.1, schedule=schedule)
    assert train.get_lr_scale(0, 10) == .1
    assert train.get_lr_scale(9, 10) == 1
    assert train.get_lr_scale(60, 10) == pytest.approx(middle, abs=1e-6)
    assert train.get_lr_scale(110, 10) == pytest.approx(end, abs=1e-6)


def test_training_loss_falls_on_forty_pictures(world, tmp_path):
    """Forty pictures by heart: from ln(1024) = 6.9 to less than a quarter of it."""
    run(world, tmp_path, max_steps=150, batch_size=4, eval_interval=150, eval_batches=2)
    record = metrics(tmp_path)
    assert record[1]['loss'] == pytest.approx(6.93, abs=.1)
    assert record[150]['loss'] < 6.93 / 4
    assert 'loss/pointing' in record[150]
    assert record[150]['tokens_per_second'] > 0
    assert len(record) == 150


def test_frozen_parts_stay_and_have_no_optimizer_state(world, tmp_path):
    run(world, tmp_path, max_steps=2, train_vision=False, train_embedding=False)
    end = load_model(tmp_path / 'step000002')
    fresh = model_module.VLM(end.config)
    fresh.init_weights(train.seed)
    frozen, trained, unchanged = set(), set(), set()
    for name, p in end.named_parameters():
        is_frozen = name.startswith('vision_tower.') or 'embed_tokens' in name
        group = frozen if is_frozen else trained
        group.add(name)
        if torch.equal(p, fresh.get_parameter(name)):
            unchanged.add(name)
    assert unchanged == frozen
    reader = dcp.FileSystemReader(tmp_path / 'step000002/train_state')
    stored = reader.read_metadata().state_dict_metadata
    assert {name.rpartition('.')[0] for name in stored} == trained
    error = run(world, tmp_path, code=1, max_steps=3).stderr           # resumed with all parts
    assert 'was trained with other parts' in error
    assert error.count('\n') == 1


def test_mixed_precision_near_float32_and_profile_trace(world, tmp_path):
    run(world, tmp_path / 'float32', max_steps=8, schedule='constant')
    changes = {
        'bfloat16': dict(dtype='bfloat16', profile_steps='(2, 3)'),
        'float16': dict(dtype='float16'),
        'weights': dict(dtype='bfloat16', master_dtype='bfloat16'),
    }
    expected = metrics(tmp_path / 'float32')
    for name, change in changes.items():
        run(world, tmp_path / name, max_steps=5, schedule='constant', **change)
        run(world, tmp_path / name, max_steps=8, schedule='constant', **change)
        got = metrics(tmp_path / name)
        for step in range(1, 9):
            assert got[step]['loss'] == pytest.approx(expected[step]['loss'], rel=.02), (name, step)
        assert got[8]['nonfinite'] == 0
    norm = weights(tmp_path / 'weights')['language_model.model.norm.weight']
    assert norm.dtype == torch.bfloat16
    trace = json.loads((tmp_path / 'bfloat16/trace-rank0.json').read_text())
    names = [event.get('name', '').lower() for event in trace['traceEvents']]
    assert any('backward' in name for name in names)


@pytest.mark.quick
def test_loss_scale_halves_on_overflow_and_doubles_after_2000():
    state = torch.tensor([1024., 1998.])   # the scale, good steps with it
    steps = [
        (0., [1024., 1999.]),
        (0., [2048., 0.]),
        (1., [1024., 0.]),
        (0., [1024., 1.]),
    ]
    for found_inf, expected in steps:
        state = train.update_loss_scale(state, torch.tensor(found_inf))
        assert state.tolist() == expected


# -- several processes

TWO = torchrun(2)
FOUR = torchrun(4)


def test_two_processes_equal_one_process(world, tmp_path):
    """Pictures on one rank while the other reads text alone: tokens and weights differ between the
    two, so a mean of their means would be wrong, and one has nothing for its tower."""
    settings = dict(schedule='constant', eval_interval=3, eval_batches=2, accumulation=2,
                    mixture="{'shapes': 0.5, 'shapes_text': 0.5}")
    run(world, tmp_path / 'one', batch_size=2, max_steps=6, **settings)
    run(world, tmp_path / 'two', batch_size=1, max_steps=3, **settings, launch=TWO)
    run(world, tmp_path / 'two', batch_size=1, max_steps=6, **settings, launch=TWO)        # resumes
    lines = read_lines(tmp_path / 'one/metrics.jsonl')
    lines_of_two = read_lines(tmp_path / 'two/metrics.jsonl')
    assert len(lines) == len(lines_of_two) == 8
    timings = {'seconds', 'data_wait', 'minutes', 'tokens_per_second', 'tflops'}
    for one, two in zip(lines, lines_of_two):
        for key in one.keys() - timings:
            assert one[key] == pytest.approx(two[key], abs=1e-5), (one['step'], key)
    assert largest_difference(weights(tmp_path / 'one'), weights(tmp_path / 'two')) < 1e-5


@pytest.mark.parametrize('cp', [1, 2])
def test_two_processes_resume_is_bit_exact(world, tmp_path, cp):
    settings = dict(packing=True, schedule='constant', batch_size=1, parallel='fsdp',
                    optimizer='muon', cp=cp, **DROPOUT)
    run(world, tmp_path / 'whole', max_steps=6, **settings, launch=TWO)
    run(world, tmp_path / 'cut', max_steps=3, **settings, launch=TWO)
    run(world, tmp_path / 'cut', max_steps=6, **settings, launch=TWO)
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))


def test_resume_with_another_number_of_processes(world, tmp_path):
    """Four rows a step for one, two or four processes: the same losses and the same weights."""
    settings = dict(schedule='constant', mixture="{'shapes': 0.5, 'shapes_text': 0.5}")
    run(world, tmp_path / 'one', batch_size=4, max_steps=8, **settings)
    out = tmp_path / 'many'
    run(world, out, launch=FOUR, max_steps=2, parallel='fsdp', cp=2, batch_size=2, **settings)
    run(world, out, max_steps=4, batch_size=4, **settings)
    run(world, out, launch=TWO, max_steps=6, parallel='fsdp', batch_size=2, **settings)
    run(world, out, launch=TWO, max_steps=8, cp=2, batch_size=4, **settings)
    one = metrics(tmp_path / 'one')
    many = metrics(out)
    for step in range(1, 9):
        for key in ('loss', 'grad_norm', 'tokens', 'loss_tokens', 'visual_tokens'):
            assert one[step][key] == pytest.approx(many[step][key], rel=1e-4), (step, key)
    assert largest_difference(weights(tmp_path / 'one'), weights(out)) < 1e-4


@pytest.mark.quick
def test_optimizer_moments_are_on_device_of_their_parameter():
    """Fused AdamW reads the number of steps in its kernel; were that number on the CPU, a kernel on
    CUDA would make an illegal access."""
    p = torch.empty(3, 4, device='meta')
    for size in (p.shape, torch.Size([])):
        moment = checkpoint.room_for_moment(p, size)
        assert moment.device == p.device
        assert moment.shape == size


@pytest.mark.quick
def test_checkpoint_restores_random_states(monkeypatch):
    """Of the device too, which dropout draws from."""
    fake = {'state': torch.tensor([1], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda dev: fake['state'].clone())
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, dev: fake.update(state=state))
    dev = torch.device('cuda', 0)
    state = checkpoint.random_state(dev)
    expected = torch.rand(3)
    fake['state'] = torch.tensor([2], dtype=torch.uint8)
    checkpoint.set_random_state(state, dev)
    assert torch.equal(torch.rand(3), expected)
    assert fake['state'].item() == 1


def test_seed_determines_dropout(world, tmp_path):
    def last_loss(name, seed):
        out = tmp_path / name
        run(world, out, max_steps=2, seed=seed, mixture="{'shapes': 1.0}", **DROPOUT)
        return metrics(out)[2]['loss']
    assert last_loss('one', 1) == last_loss('again', 1) != last_loss('other', 2)


# -- without PyAV

@pytest.fixture
def no_pyav(tmp_path, monkeypatch):
    """An environment where `import av` fails."""
    folder = tmp_path / 'no_pyav'
    folder.mkdir()
    (folder / 'av.py').write_text("raise ImportError(\"No module named 'av'\")\n")
    monkeypatch.setenv('PYTHONPATH', str(folder))


def test_training_without_pyav_fails_only_on_videos(world, tmp_path, no_pyav):
    drawn = tmp_path / 'drawn'
    draw_shapes(drawn, num=4, num_clocks=0, num_text=0, num_clips=0, num_validation=2)
    assert names_in(drawn) == ['shapes']
    run(drawn, tmp_path / 'out', max_steps=1, mixture="{'shapes': 1.0}")
    for workers in (0, 1):
        done = run(world, tmp_path / f'clips{workers}', max_steps=2, mixture="{'clips': 1.0}",
                   num_workers=workers, code=1)
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith('error: videos need PyAV')
        assert 'Traceback' not in done.stderr


# -- plans and errors

def test_dry_run_prints_plan_and_writes_nothing(world, tmp_path):
    out = run(world, tmp_path / 'out', dry_run=True).stdout
    assert 'learning_rate = 0.003' in out
    assert 'ln(vocabulary) = 6.931' in out
    assert 'nothing is missing' in out
    assert not (tmp_path / 'out').exists()


def test_dry_run_of_stage1_without_weights_or_data():
    command = [sys.executable, 'train.py', 'config/stage1.py', '--dry_run', '--device=cpu']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '596,049,920   67.1%  trained' in done.stdout
    assert '290,909,184   32.8%  frozen' in done.stdout
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
    (dict(language={**LANGUAGE, 'vocab_size': 64}), "the decoder's table only 64 rows"),
])
def test_setting_error_is_one_line_and_writes_nothing(world, tmp_path, change, message):
    done = run(world, tmp_path / 'out', code=1, **change)
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists()


def test_training_skips_and_reports_bad_rows(world, tmp_path):
    folder = tmp_path / 'mixed'
    media = folder / 'media'
    media.mkdir(parents=True)
    Image.new('RGB', (32, 32), 'red').save(media / 'ok.png')
    (media / 'text.jpg').write_text('not a picture')
    (media / 'cut.png').write_bytes((media / 'ok.png').read_bytes()[:60])
    talk = [{'role': 'user', 'content': 'What colour?'}, {'role': 'assistant', 'content': 'red'}]

    def line(*images, messages=talk):
        return json.dumps({'images': list(images), 'messages': messages})
    lines = [line('media/ok.png')] * 10
    lines += [
        line('media/text.jpg'),
        line('media/cut.png'),
        line('media/none.png'),
        '{"images": [',
        line(messages=talk[:1]),           # a question alone
    ]
    (folder / 'train.jsonl').write_text('\n'.join(lines) + '\n')
    settings = dict(data_dir=tmp_path, mixture="{'mixed': 1.0}")
    done = run(world, tmp_path / 'out', max_steps=15, max_bad_fraction=.5, **settings)
    problems = read_lines(tmp_path / 'out/skipped.jsonl')
    reasons = {p['reason'] for p in problems}
    assert reasons == {'unreadable media', 'missing media', 'broken JSON', 'no answer'}
    line_numbers = {p['row'].rsplit(' ')[-1] for p in problems}
    assert line_numbers == {'11', '12', '13', '14', '15'}
    assert 'rows skipped: mixed: ' in done.stdout
    assert metrics(tmp_path / 'out')[15]['skipped'] == len(problems)
    done = run(world, tmp_path / 'out2', max_steps=100, code=1, **settings)
    assert 'max_bad_fraction' in done.stderr


def test_muon_resume_is_bit_exact(world, tmp_path):
    run(world, tmp_path / 'a', optimizer='muon', max_steps=6)
    settings = dict(optimizer='muon', max_steps=6, save_interval=3)
    run(world, tmp_path / 'b', **settings)
    (tmp_path / 'b/latest').write_text('step000003\n')     # as if killed after the save at step 3
    run(world, tmp_path / 'b', **settings)
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))
