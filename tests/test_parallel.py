"""Several processes on the CPU against one: every combination gives its loss and its gradients."""
import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import collate  # noqa: E402
from parallel import split_batch  # noqa: E402
from extra.kernels import compile_blocks  # noqa: E402
from model import full_tensor, rotary_table  # noqa: E402
from extra.plan import saved_bytes  # noqa: E402
from trees import PROCESSOR, batches, build, one_process, tree  # noqa: E402


def launch(function, world, *args, nodes=1):
    """function(rank, *args) in each of `world` processes, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    mp.spawn(_start, (world, nodes, port, function, args), nprocs=world)


def _start(rank, world, nodes, port, function, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world // nodes), MASTER_PORT=str(port),
                      LOCAL_RANK=str(rank % (world // nodes)), MASTER_ADDR='localhost')
    import parallel
    importlib.reload(parallel)                 # it reads them when it is imported
    parallel.start(torch.device('cpu'), 1)
    function(rank, *args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _compare(rank, folder, layouts):
    """A step of every layout, with accumulation, by `train.py`'s own function, against one process."""
    import parallel
    import train
    world, table = dist.get_world_size(), []
    for layout, cp, accumulation, frozen, recipe, sizes in layouts:
        alone = build(frozen, recipe, **sizes)
        expected, gradients = one_process(alone, batches(world // cp * accumulation))
        train.parallel, train.cp = layout, cp
        cut = None if layout == 'ddp' else lambda m: parallel.shard(m, layout == 'hsdp', None, True, False)
        model = build(frozen, recipe, cut, **sizes)
        group = parallel.make_cp_group(cp, model.config.language.num_heads)
        rows = batches(world // cp * accumulation)[rank // cp::world // cp]
        rows = [split_batch(b, rank % cp, cp) if cp > 1 else b for b in rows]
        loss, _ = train.forward_backward(model, train.distribute(model), rows, torch.enable_grad(), cp_group=group)
        worst = 0.
        for name, p in model.named_parameters():
            if p.requires_grad:
                error = (full_tensor(p.grad) - gradients[name]).abs().max() / gradients[name].abs().max().clamp(min=1e-3)
                worst = max(worst, error.item())
        table.append([layout, cp, accumulation, frozen, recipe, sizes, abs(loss.item() / expected - 1), worst])
    if rank == 0:
        (folder / 'table.json').write_text(json.dumps(table))


def compare(folder, world, layouts, nodes=1):
    launch(_compare, world, folder, layouts, nodes=nodes)
    for *layout, loss, gradient in json.loads((folder / 'table.json').read_text()):
        print(world, layout, f'loss {loss:.1e}, gradients {gradient:.1e}')
        assert loss < 1e-5 and gradient < 1e-5, layout


def test_two_processes(tmp_path):
    plain = [(layout, cp, accumulation, False, 'nano', {}) for layout in ('ddp', 'fsdp') for cp in (1, 2)
             for accumulation in (1, 2)]
    compare(tmp_path, 2, [*plain, ('ddp', 2, 1, True, 'nano', {}), ('fsdp', 1, 1, True, 'nano', {}),
                          ('fsdp', 2, 2, True, 'molmo2', {}),
                          ('ddp', 2, 1, False, 'nano', dict(num_heads=12, num_kv_heads=3))])


def test_four_processes_on_two_nodes(tmp_path):
    plain = [(layout, cp, 1, False, 'nano', {}) for layout in ('ddp', 'fsdp', 'hsdp') for cp in (1, 2, 4)]
    compare(tmp_path, 4, [*plain, ('hsdp', 2, 2, True, 'molmo2', {}),
                          ('fsdp', 4, 2, False, 'nano', dict(num_heads=12, num_kv_heads=3))], nodes=2)


def _measure(rank, folder, cp):
    """What a forward and backward pass of one long row sends and keeps, with and without others to share it."""
    import parallel
    vlm = build(frozen=True, num_heads=8, num_kv_heads=2)
    row, kept, sent = collate([[tree(i, 8, frames=True) for i in range(24)]], PROCESSOR), {}, [0]
    exchange, own = dist.all_to_all_single, {p.untyped_storage().data_ptr() for p in vlm.parameters()}

    def counted(out, x, group):
        sent[0] += x.nbytes * (group.size() - 1) // group.size()       # a rank keeps its own piece
        exchange(out, x, group=group)

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    parallel.dist.all_to_all_single = counted
    group = None
    if cp > 1:
        group = parallel.make_cp_group(cp, 8)
        row = split_batch(row, rank, cp)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = vlm(row, cp_group=group)
    forward = sent[0]
    loss.backward()
    if rank == 0:
        (folder / f'{cp}.json').write_text(json.dumps(
            [row.row_tokens.shape[1] if cp > 1 else 0, forward, sent[0],
             sum(size for where, size in kept.items() if where not in own)]))


def test_sharing_a_row_costs_as_the_formula_says_and_saves_memory(tmp_path):
    kept = {}
    for cp in (1, 2, 4):
        launch(_measure, cp, tmp_path, cp)
        length, forward, both, kept[cp] = json.loads((tmp_path / f'{cp}.json').read_text())
        heads = 8 + 8 + 2 * max(2, cp)         # queries there, results back, two key heads and as many values, or cp
        assert forward == 3 * heads * 8 * 4 * length // cp * (cp - 1) // cp      # layers x heads x head_dim x bytes
        assert both == 2 * forward
    print('bytes kept for the backward pass', kept)
    assert kept[1] > 1.8 * kept[2] and kept[1] > 3.2 * kept[4]         # measured


def test_a_memory_budget_keeps_less_of_a_compiled_block():
    from torch._functorch import config as functorch
    kept = {}
    for budget in (1., .2):
        torch._dynamo.reset()
        with functorch.patch(activation_memory_budget=budget):
            block = build().language_model.layers[0]
            block.compile(backend='aot_eager_decomp_partition')        # inductor's partition without its compiler
            x, positions = torch.randn(1, 64, 48, requires_grad=True), torch.arange(64)[None]
            kept[budget] = saved_bytes(block, x, rotary_table(positions, 8, 1e6), 'causal')
    print('bytes kept of a block', kept)
    assert kept[.2] < .6 * kept[1.]


def _stuck(rank, folder):
    """Rank 1 reads on and on; rank 0 says so. Then rank 0 falls silent, and rank 1 says that."""
    import parallel
    told = [folder / f'{r}.txt' for r in range(2)]
    sys.stderr = open(told[rank], 'w')
    dog = parallel.Watchdog(.4)
    dog.at(*(('reading rows for step 7',) if rank else ('in step 7', [('shapes', 3)])))
    dist.barrier()
    while not told[0].read_text():
        time.sleep(.1)
    assert not told[1].read_text()
    if rank == 0:
        dog.over.set()
    dist.barrier()
    while rank and 'not answer' not in told[1].read_text():
        time.sleep(.1)
        dog.at('still in step 7')
        time.sleep(1)
    dog.over.set()


def test_a_hang_is_told_with_where_each_rank_is(tmp_path):
    launch(_stuck, 2, tmp_path)
    first, second = ((tmp_path / f'{r}.txt').read_text() for r in range(2))
    assert 'rank 0: in step 7 for' in first and 'with shapes:3' in first and 'rank 1: reading rows for step 7 for' in first
    assert 'does not answer' not in first and 'rank 0: in step 7' in second


def _compiled(rank, folder, cp):
    """Rows of one size that differ in all else, through compiled blocks: after four batches nothing compiles again."""
    import parallel
    plain, vlm = build(), build()
    group = parallel.make_cp_group(cp, 4)
    compile_blocks(vlm, backend='aot_eager')       # inductor would only take longer: the guards are the same
    for i in range(9):
        trees = [tree(5 * i + k, k % 3 + (k == i % 5), frames=k == 3) for k in range(5)]
        row = collate([trees], PROCESSOR, 200)
        torch._dynamo.config.error_on_recompile = i >= 4
        loss, expected = vlm(split_batch(row, rank, cp) if cp > 1 else row, cp_group=group)[0], plain(row)[0]
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5) or cp > 1
    for (name, p), other in zip(vlm.named_parameters(), plain.parameters()):
        if cp > 1:
            dist.all_reduce(p.grad)
        assert (p.grad - other.grad).abs().max() < 1e-4 * other.grad.abs().max().clamp(min=1), name


def test_compiled_blocks_are_compiled_once(tmp_path):
    for cp in (1, 2):
        launch(_compiled, cp, tmp_path, cp)
