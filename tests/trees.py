"""Made-up message trees and a model for them, for the tests of many processes and of GPUs."""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Example, collate  # noqa: E402
from model import VLM, local_shard, make_config  # noqa: E402

VISION = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32, patch_size=8,
              feature_layers=(-1,))
LANGUAGE = dict(hidden_size=48, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
                vocab_size=128)
PROCESSOR = SimpleNamespace(pad=0, grid=(4, 4), frame_grid=(2, 2))


def tree(seed, crops, frames=False):
    """An example of so many crops, three branches behind them, loss on some tokens."""
    r, e = np.random.default_rng(seed), Example()
    patches = 4 if frames else 16
    shared, talks = crops * (patches // 4 + 1) + 3, r.integers(3, 12, 3)
    for branch, n in enumerate([shared, *talks]):
        e.tokens += r.integers(5, 100, n).tolist()
        e.weights += [float(branch > 0) * w for w in r.choice([0., .5, 2.], n)]
        e.branches, e.tasks = e.branches + [branch] * n, e.tasks + [branch % 3] * n
        e.positions += list(range(shared, shared + n) if branch else range(n))
    if crops:
        e.grid = PROCESSOR.frame_grid if frames else PROCESSOR.grid
        e.patches = r.integers(0, 256, (crops, patches, 192), dtype=np.uint8)
        e.pool_index = r.integers(-1, crops * patches, (crops * patches // 4, 4))
        e.pool_index[:, 0] = np.arange(crops * patches // 4)
        e.visual_index = np.flatnonzero(np.arange(shared) % (patches // 4 + 1))[:crops * patches // 4]
    return e


def batches(number):
    """Rows that differ in everything: of several trees, of text alone, with pictures and frames, of unequal weight."""
    every = [collate([[tree(1, 3), tree(2, 0)], [tree(3, 5, frames=True)]], PROCESSOR, 71),
            collate([[tree(4, 0), tree(5, 0)]], PROCESSOR, 67),
            collate([[tree(6, 1)], [tree(7, 1)]], PROCESSOR),
            collate([[tree(8, 2), tree(9, 0), tree(10, 3, frames=True)]], PROCESSOR, 109)]
    return (every * 2)[:number]


def build(frozen=False, recipe='nano', cut=None, fast=True, **language):
    """A model of random weights; cut(model) says who holds them, before there are any."""
    with torch.device('meta'):
        model = VLM(make_config(VISION, {**LANGUAGE, **language}, recipe=recipe, connector='mlp', pooling=2,
                                visual_token_ids=tuple(range(5, 30))), fast)
    model.set_trained(dict(train_vision=not frozen, train_connector=True, train_language=True, train_embedding=True))
    if cut:
        cut(model)
    model.to_empty(device='cpu')
    model.set_buffers()
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():                      # some matrices start at 0 and would hide the gradients of those before
        for p in model.parameters():
            noise = torch.empty(p.shape).normal_(0, .1, generator=generator)
            mine, first = local_shard(p)
            mine += noise[first:first + len(mine)]
    return model.train()


def one_process(model, batches):
    """(loss, gradients) of a step over all batches: the weighted mean."""
    total = sum(b.total_weight for b in batches)
    loss = sum(model(b)[0] for b in batches) / total
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients
