"""Are results on a GPU right? One line of JSON a finding; the last line says what failed. `make gpu-check` runs this.

    python3 tests/gpu.py [--seconds=150] [--parts=compiled,generation]

Compared with the CPU in float32, on made-up message trees: loss and gradients in every way of computing them, generated
tokens, and train.py itself on drawn pictures, resumed bit for bit. Needs no pytest and no PyAV. Without a GPU it runs on
the CPU, which shows that it runs and nothing about CUDA.
"""
import argparse
import copy
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import model as m  # noqa: E402
from data import collate  # noqa: E402
from extra import kernels, timed_parts  # noqa: E402
from extra.engine import generate  # noqa: E402
from extra.gpu_bench import drawn_pictures  # noqa: E402
from trees import PROCESSOR, batches, build, one_process, tree  # noqa: E402

DEVICE = m.pick_device()
HEAD_DIM = 32                      # FlexAttention on CUDA wants at least 16


def copy_to_device(model):
    model = copy.deepcopy(model).to(DEVICE)
    model.set_buffers(DEVICE)
    return model


def worst(ours, expected):
    """The largest difference of a gradient, relative to the largest entry of the CPU's."""
    differences = []
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        differences.append(((ours[name].cpu() - gradient).abs().max() / scale).item())
    return max(differences)


def check(say, what, right, **found):
    """A finding that must be right."""
    if right:
        say(what, **found)
    else:
        say(what, failed='wrong result', **found)


def compare(say, what, model, rows, loss, gradients, dtype=torch.float32, **found):
    """A step's loss and gradients on the device beside those of the CPU in float32."""
    on_device = [row.to(DEVICE) for row in rows]
    narrow = dtype != torch.float32
    with torch.autocast(DEVICE.type, dtype, enabled=narrow):
        our_loss, ours = one_process(model, on_device)
    off, gradient_off = abs(our_loss / loss - 1), worst(ours, gradients)
    # float32: measured 1e-7 and 2e-6 between two orders of addition on a CPU; bfloat16 has 3 digits, and sums of them
    right = off < (.02 if narrow else 1e-5) and gradient_off < (.2 if narrow else 1e-4)
    check(say, what, right, loss_off=off, gradients_off=gradient_off, **found)


def loss_and_gradients(say):
    """Packed trees, rows of text alone, pictures and frames, both recipes, with and without recomputing."""
    for recipe in ('nano', 'molmo2'):
        on_cpu = build(recipe=recipe, head_dim=HEAD_DIM)
        rows = batches(4)
        loss, gradients = one_process(on_cpu, rows)
        model = copy_to_device(on_cpu)
        for recompute in (0, 1):
            model.vision_tower.recompute_every = model.language_model.recompute_every = recompute
            compare(say, 'step against CPU', model, rows, loss, gradients, recipe=recipe, recompute=recompute)
        model.vision_tower.recompute_every = model.language_model.recompute_every = 0
        for dtype in (torch.bfloat16, torch.float16):
            compare(say, 'step against CPU', model, rows, loss, gradients, dtype, recipe=recipe, products=str(dtype)[6:])


def row_lengths(say):
    """Rows from 16 to 4,096 tokens; kernels for those of 65 to 127 once failed to compile."""
    on_cpu = build(head_dim=HEAD_DIM)
    model = copy_to_device(on_cpu)
    for length, alone in ((72, True), (4096, True), (16, False), (104, False), (128, False), (1000, False)):
        if alone:                            # a kernel for this length; the others share one that takes any
            torch._dynamo.reset()
        trees = [tree(length, 0)] if length < 64 else [tree(length + i, i % 3) for i in range(max(1, length // 64))]
        size = sum(len(e.tokens) for e in trees)
        while size > length:
            size -= len(trees.pop().tokens)
        rows = [collate([trees or [tree(0, 0)]], PROCESSOR, length if trees else 0)]
        loss, gradients = one_process(on_cpu, rows)
        compare(say, 'row length', model, rows, loss, gradients, length=rows[0].tokens.shape[1])


def compiled(say):
    """Compiled blocks on rows of one size that differ in all else: right, and compiled no more after the fourth."""
    plain = build(head_dim=HEAD_DIM)
    model = copy_to_device(plain)
    kernels.compile_blocks(model)
    for i in range(7):
        trees = [tree(5 * i + k, k % 3 + (k == i % 5), frames=k == 3) for k in range(5)]
        rows = [collate([trees], PROCESSOR, 256)]
        loss, gradients = one_process(plain, rows)
        torch._dynamo.config.error_on_recompile = i >= 4
        compare(say, 'compiled blocks against CPU', model, rows, loss, gradients, batch=i)
    torch._dynamo.config.error_on_recompile = False


def generation(say):
    """Greedy tokens with the cache are the CPU's, for several answers at once, and those without it."""
    on_cpu = build(head_dim=HEAD_DIM).eval()
    on_cpu.config.eos_token_id = -1
    model = copy_to_device(on_cpu)
    with torch.inference_mode():
        for name, rows in (('one answer', [[tree(1, 0)]]), ('trees', [[tree(1, 2)], [tree(2, 1)]])):
            batch = collate(rows, PROCESSOR, 0 if len(rows) > 1 else len(rows[0][0].tokens))
            expected = [token.tolist() for token in generate(on_cpu, batch, 24)]
            ours = [token.tolist() for token in generate(model, batch.to(DEVICE), 24)]
            check(say, 'generation against CPU', ours == expected, rows=name)
        # One branch of a tree: its prefix and its first conversation, without a cache
        tree_batch = collate([[tree(3, 1)]], PROCESSOR, len(tree(3, 1).tokens)).to(DEVICE)
        keep = tree_batch.branch_ids[0] <= 1
        names = ('tokens', 'position_ids', 'document_ids', 'branch_ids')
        prompt = replace(tree_batch, **{name: getattr(tree_batch, name)[:, keep] for name in names})
        cached = [token.tolist() for token in generate(model, prompt, 24)]
        plain = [token.tolist() for token in model.generate(prompt, 24)]
        check(say, 'generation without a cache', plain == cached)


def train(out, *settings):
    """train.py as a user runs it, at the demo's size, on pictures that prepare/shapes.py has drawn."""
    data = drawn_pictures()
    command = [sys.executable, 'train.py', 'config/demo_stage1.py', "--mixture={'shapes': 1.0}", f'--data_dir={data}',
               f'--tokenizer={data}/shapes', '--vision_weights=', f'--out_dir={out}', '--eval_interval=0', '--schedule=constant',
               '--optimizer=adamw', '--warmup_steps=2', '--num_workers=2', '--keep=0', *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'train.py ended with {done.returncode}: {(done.stdout + done.stderr)[-600:]}')


def resume(say):
    """Twenty steps at once, and ten and ten: the same bytes. With dropout, whose random numbers come from the device; with
    a frozen tower, because the gradients of SDPA's kernels, which it uses, may differ from run to run on a GPU."""
    sums = {}
    for name, stops in (('at once', [20]), ('in two halves', [10, 20])):
        out = Path(tempfile.gettempdir()) / f"gpu_check_{name.replace(' ', '_')}"
        shutil.rmtree(out, ignore_errors=True)
        for stop in stops:
            train(out, f'--max_steps={stop}', '--residual_dropout=0.1', '--train_vision=False', '--save_interval=10')
        weights = out / 'step000020' / 'model.safetensors'
        sums[name] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        shutil.rmtree(out)
    check(say, 'resume', len(set(sums.values())) == 1, sums=sums)


def training(say):
    """The demo's own settings for some steps, on CUDA with compiled blocks: its loss falls."""
    out = Path(tempfile.gettempdir()) / 'gpu_check_training'
    shutil.rmtree(out, ignore_errors=True)
    train(out, '--max_steps=40', f"--compile={DEVICE.type == 'cuda'}")
    lines = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    first, last = lines[0]['loss'], lines[-1]['loss']
    check(say, 'train.py', last < .8 * first, first_loss=first, last_loss=last, seconds_a_step=lines[-1]['seconds'])
    shutil.rmtree(out)


# Side by side on a GPU, where most of a part is compiling (seen on an H200: 46 seconds and more)
PARTS = [(loss_and_gradients, 140), (row_lengths, 140), (compiled, 140), (generation, 140), (resume, 140), (training, 140)]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=150)
    parser.add_argument('--parts', default='', help='names with commas; default: all')
    args, _ = parser.parse_known_args()
    sys.exit(timed_parts.main(PARTS, args.seconds, side_by_side=torch.cuda.is_available()))
