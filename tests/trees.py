"""Made-up message trees and a model for them, for the tests of many processes and of GPUs."""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Example, collate  # noqa: E402
from model import VLM, local_shard, make_config  # noqa: E402

VISION = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
              patch_size=8, feature_layers=(-1,))
LANGUAGE = dict(hidden_size=48, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
                head_dim=8, vocab_size=128)
PROCESSOR = SimpleNamespace(pad=0, grid=(4, 4), frame_grid=(2, 2))


def tree(seed, crops, frames=False):
    """An example of so many crops, three branches behind them, loss on some tokens."""
    generator = np.random.default_rng(seed)
    e = Example()
    patches = 4 if frames else 16          # of a crop
    visual = patches // 4                  # visual tokens of a crop; one other stands before them
    prefix = crops * (visual + 1) + 3
    lengths = [prefix, *generator.integers(3, 12, 3)]
    for branch, n in enumerate(lengths):
        start = prefix if branch > 0 else 0
        e.tokens += generator.integers(5, 100, n).tolist()
        weights = generator.choice([0., .5, 2.], n)
        if branch == 0:
            weights = 0. * weights
        e.weights += weights.tolist()
        e.branches += [branch] * n
        e.tasks += [branch % 3] * n
        e.positions += range(start, start + n)
    if crops:
        e.grid = PROCESSOR.frame_grid if frames else PROCESSOR.grid
        e.patches = generator.integers(0, 256, (crops, patches, 192), dtype=np.uint8)
        e.pool_index = generator.integers(-1, crops * patches, (crops * visual, 4))
        e.pool_index[:, 0] = np.arange(crops * visual)
        e.visual_index = np.flatnonzero(np.arange(prefix) % (visual + 1))[:crops * visual]
    return e


def batches(number):
    """Batches that differ in everything: rows of several trees, of text alone, with pictures and
    frames, of unequal weight."""
    different = [
        collate([[tree(1, 3), tree(2, 0)], [tree(3, 5, frames=True)]], PROCESSOR, 71),
        collate([[tree(4, 0), tree(5, 0)]], PROCESSOR, 67),
        collate([[tree(6, 1)], [tree(7, 1)]], PROCESSOR),
        collate([[tree(8, 2), tree(9, 0), tree(10, 3, frames=True)]], PROCESSOR, 109),
    ]
    return (different * 2)[:number]


def build(frozen=False, recipe='nano', shard=None, fast=True, **language):
    """A model of random weights. shard(model), if given, shards it before it has any."""
    config = make_config(VISION, {**LANGUAGE, **language}, recipe=recipe, connector='mlp',
                         pooling=2, visual_token_ids=tuple(range(5, 30)))
    with torch.device('meta'):
        model = VLM(config, fast)
    model.set_trained(dict(train_vision=not frozen, train_connector=True, train_language=True,
                           train_embedding=True))
    if shard:
        shard(model)
    model.to_empty(device='cpu')
    model.set_buffers()
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    # Some matrices start at 0 and would hide the gradients of those before
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.empty(p.shape).normal_(0, .1, generator=generator)
            mine, first = local_shard(p)   # the rows from `first` that this rank holds
            mine += noise[first:first + len(mine)]
    return model.train()


def one_process(model, batches):
    """(loss, gradients) of a step over all batches: the weighted mean."""
    total = sum(b.total_weight for b in batches)
    loss = sum(model(b)[0] for b in batches) / total
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[name] = p.grad.clone()
    model.zero_grad()
    return loss.item(), gradients
