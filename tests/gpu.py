"""What only a GPU can show: `make gpu-check`. Its kernels against the CPU's float32, compiled blocks, narrow numbers.

Not collected by the suite, which must not need a GPU; without one it runs on the CPU and shows that it runs.
"""
import copy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import model as m  # noqa: E402
from data import collate, to_device  # noqa: E402
from test_parallel import PROCESSOR, batches, build, one_process, tree  # noqa: E402

DEVICE = m.pick_device()


def moved(model):
    model = copy.deepcopy(model).to(DEVICE)
    model.set_buffers(DEVICE)
    return model


def step(model, autocast=torch.float32):
    rows = [to_device(b, DEVICE) for b in batches(4)]
    with torch.autocast(DEVICE.type, autocast, enabled=autocast != torch.float32):
        return one_process(model, rows)


def difference(ours, theirs):
    return max(((ours[n].cpu() - g).abs().max() / g.abs().max().clamp(min=1e-3)).item() for n, g in theirs.items())


@pytest.mark.parametrize('recipe', ['nano', 'molmo2'])
@pytest.mark.parametrize('recompute', [0, 1])
def test_loss_and_gradients_are_the_cpus(recipe, recompute):
    alone = build(recipe=recipe)
    expected, gradients = one_process(alone, batches(4))
    model = moved(alone)
    model.vision_tower.recompute = model.language_model.recompute = recompute
    loss, ours = step(model)
    print(f'{recipe}, recompute {recompute}: loss {abs(loss / expected - 1):.1e}, gradients {difference(ours, gradients):.1e}')
    assert loss == pytest.approx(expected, rel=1e-5) and difference(ours, gradients) < 1e-4


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_products_give_nearly_the_loss(dtype):
    alone = build()
    expected, _ = one_process(alone, batches(4))
    loss, _ = step(moved(alone), dtype)
    assert loss == pytest.approx(expected, rel=.02)


def test_compiled_blocks_give_the_loss_and_are_compiled_once():
    plain, model = moved(build()), moved(build())
    m.compile_blocks(model)
    for i in range(9):
        row = to_device(collate([[tree(5 * i + k, k % 3 + (k == i % 5), frames=k == 3) for k in range(5)]],
                                      PROCESSOR, 200), DEVICE)
        torch._dynamo.config.error_on_recompile = i >= 4
        (loss, gradients), (expected, theirs) = one_process(model, [row]), one_process(plain, [row])
        assert loss == pytest.approx(expected, rel=1e-5)
        assert difference({n: gradients[n] for n in theirs}, {n: g.cpu() for n, g in theirs.items()}) < 1e-4
    torch._dynamo.config.error_on_recompile = False


def test_generation_is_the_cpus():
    alone = build().eval()
    batch = collate([[tree(1, 2)], [tree(2, 1)]], PROCESSOR)
    expected = list(alone.generate(batch, 32))
    assert [t.tolist() for t in moved(alone).generate(to_device(batch, DEVICE), 32)] == [t.tolist() for t in expected]
