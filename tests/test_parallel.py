"""Several processes on the CPU against one: every combination gives its loss and its gradients."""
import importlib
import itertools
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
    ranks_a_node = world // nodes
    variables = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % ranks_a_node,
                     LOCAL_WORLD_SIZE=ranks_a_node, MASTER_ADDR='localhost', MASTER_PORT=port)
    for name, value in variables.items():
        os.environ[name] = str(value)
    import parallel
    importlib.reload(parallel)             # it reads the variables when it is imported
    parallel.start(torch.device('cpu'), 1)
    function(rank, *args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def layout(parallel, cp, accumulation=1, frozen=False, recipe='nano', **sizes):
    """One case of `compare`. sizes: of the decoder, where they are not those of trees.py."""
    return dict(parallel=parallel, cp=cp, accumulation=accumulation, frozen=frozen, recipe=recipe,
                sizes=sizes)


def _compare(rank, folder, layouts):
    """A step of every layout, by train.py's own function, against one process."""
    table = []
    for case in layouts:
        loss, gradients = _relative_errors(rank, **case)
        table.append([case, loss, gradients])
    if rank == 0:
        (folder / 'table.json').write_text(json.dumps(table))


def _relative_errors(rank, parallel, cp, accumulation, frozen, recipe, sizes):
    """How far (the loss, the gradients) of a step of all ranks are from those of one process."""
    import parallel as parallel_module
    import train
    num_groups = dist.get_world_size() // cp               # of ranks that share a row
    rows = batches(num_groups * accumulation)
    expected_loss, expected = one_process(build(frozen, recipe, **sizes), rows)

    train.parallel = parallel
    train.cp = cp

    def shard(model):
        parallel_module.shard(model, parallel == 'hsdp', None, True, False)
    model = build(frozen, recipe, None if parallel == 'ddp' else shard, **sizes)
    group = parallel_module.make_cp_group(cp, model.config.language.num_heads)
    my_rows = rows[rank // cp::num_groups]
    if cp > 1:
        my_rows = [split_batch(row, rank % cp, cp) for row in my_rows]
    loss, _ = train.forward_backward(model, train.distribute(model), my_rows, torch.enable_grad(),
                                     cp_group=group)
    worst = 0.
    for name, p in model.named_parameters():
        if p.requires_grad:
            error = (full_tensor(p.grad) - expected[name]).abs().max()
            scale = expected[name].abs().max().clamp(min=1e-3)
            worst = max(worst, (error / scale).item())
    return abs(loss.item() / expected_loss - 1), worst


def compare(folder, world, layouts, nodes=1):
    launch(_compare, world, folder, layouts, nodes=nodes)
    table = json.loads((folder / 'table.json').read_text())
    assert len(table) == len(layouts)
    for case, loss, gradients in table:
        print(world, *case.values(), f'loss {loss:.1e}, gradients {gradients:.1e}')
        assert loss < 1e-5, case
        assert gradients < 1e-5, case


def test_parallel_layouts_on_two_ranks_equal_one_process(tmp_path):
    layouts = [layout(*case) for case in itertools.product(('ddp', 'fsdp'), (1, 2), (1, 2))]
    layouts += [
        layout('ddp', cp=2, frozen=True),
        layout('fsdp', cp=1, frozen=True),
        layout('fsdp', cp=2, accumulation=2, frozen=True, recipe='molmo2'),
        layout('ddp', cp=2, num_heads=12, num_kv_heads=3),
    ]
    compare(tmp_path, 2, layouts)


def test_parallel_layouts_on_two_nodes_equal_one_process(tmp_path):
    layouts = [layout(*case) for case in itertools.product(('ddp', 'fsdp', 'hsdp'), (1, 2, 4))]
    layouts += [
        layout('hsdp', cp=2, accumulation=2, frozen=True, recipe='molmo2'),
        layout('fsdp', cp=4, accumulation=2, num_heads=12, num_kv_heads=3),
    ]
    compare(tmp_path, 4, layouts, nodes=2)


def _measure(rank, folder, cp):
    """Writes what a rank sends and keeps in a step on one long row that cp ranks share."""
    import parallel
    vlm = build(frozen=True, num_heads=8, num_kv_heads=2)
    row = collate([[tree(i, 8, frames=True) for i in range(24)]], PROCESSOR)
    length = 0
    group = None
    if cp > 1:
        group = parallel.make_cp_group(cp, 8)
        row = split_batch(row, rank, cp)
        length = row.row_tokens.shape[1]

    sent = [0]                             # bytes
    all_to_all_single = dist.all_to_all_single

    def counted(out, x, group):
        sent[0] += x.nbytes * (group.size() - 1) // group.size()       # a rank keeps its own piece
        all_to_all_single(out, x, group=group)
    dist.all_to_all_single = counted

    kept = {}                              # address -> bytes
    weights = {p.untyped_storage().data_ptr() for p in vlm.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = vlm(row, cp_group=group)
    sent_forward = sent[0]
    loss.backward()
    if rank == 0:
        numbers = [length, sent_forward, sent[0], sum(kept.values())]
        (folder / f'{cp}.json').write_text(json.dumps(numbers))


def test_context_parallel_traffic_formula_and_memory(tmp_path):
    kept = {}
    for cp in (1, 2, 4):
        launch(_measure, cp, tmp_path, cp)
        numbers = json.loads((tmp_path / f'{cp}.json').read_text())
        length, forward, both, kept[cp] = numbers
        # Queries go there, results come back; of keys and values two heads each, or cp
        heads = 8 + 8 + 2 * max(2, cp)
        # layers x heads x head_dim x bytes
        assert forward == 3 * heads * 8 * 4 * length // cp * (cp - 1) // cp
        assert both == 2 * forward
    print('bytes kept for the backward pass', kept)
    assert kept[1] > 1.8 * kept[2]         # measured
    assert kept[1] > 3.2 * kept[4]         # measured


def test_memory_budget_keeps_fewer_activations():
    from torch._functorch import config as functorch
    kept = {}
    for budget in (1., .2):
        torch._dynamo.reset()
        with functorch.patch(activation_memory_budget=budget):
            block = build().language_model.layers[0]
            # Inductor's partition without its compiler
            block.compile(backend='aot_eager_decomp_partition')
            x = torch.randn(1, 64, 48, requires_grad=True)
            rotary = rotary_table(torch.arange(64)[None], 8, 1e6)
            kept[budget] = saved_bytes(block, x, rotary, 'causal')
    print('bytes kept of a block', kept)
    assert kept[.2] < .6 * kept[1.]


def _stuck(rank, folder):
    """Rank 1 reads on and on; rank 0 says so. Then rank 0 falls silent, and rank 1 says that."""
    import parallel
    said = [folder / f'{r}.txt' for r in range(2)]         # what each rank printed
    sys.stderr = open(said[rank], 'w')
    watchdog = parallel.Watchdog(.4)
    if rank == 0:
        watchdog.at('in step 7', [('shapes', 3)])
    else:
        watchdog.at('reading rows for step 7')
    dist.barrier()
    while not said[0].read_text():
        time.sleep(.1)
    assert not said[1].read_text()
    if rank == 0:
        watchdog.over.set()
    dist.barrier()
    while rank == 1 and 'not answer' not in said[1].read_text():
        time.sleep(.1)
        watchdog.at('still in step 7')
        time.sleep(1)
    watchdog.over.set()


def test_watchdog_reports_where_each_rank_hangs(tmp_path):
    launch(_stuck, 2, tmp_path)
    first = (tmp_path / '0.txt').read_text()
    second = (tmp_path / '1.txt').read_text()
    assert 'rank 0: in step 7 for' in first
    assert 'with shapes:3' in first
    assert 'rank 1: reading rows for step 7 for' in first
    assert 'does not answer' not in first
    assert 'rank 0: in step 7' in second


def _compiled(rank, folder, cp):
    """Rows of one size that differ in all else, through compiled blocks. After four batches nothing
    compiles again."""
    import parallel
    plain = build()
    vlm = build()
    group = parallel.make_cp_group(cp, 4)
    compile_blocks(vlm, backend='aot_eager')   # inductor has the same guards and takes longer
    for i in range(9):
        trees = []
        for k in range(5):
            num_crops = k % 3 + int(k == i % 5)
            trees.append(tree(5 * i + k, num_crops, frames=k == 3))
        row = collate([trees], PROCESSOR, 200)
        my_row = split_batch(row, rank, cp) if cp > 1 else row
        torch._dynamo.config.error_on_recompile = i >= 4
        loss, _ = vlm(my_row, cp_group=group)
        expected, _ = plain(row)
        loss.backward()
        expected.backward()
        if cp == 1:                        # else the loss is that of this rank's tokens
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), other in zip(vlm.named_parameters(), plain.parameters()):
        if cp > 1:
            dist.all_reduce(p.grad)
        error = (p.grad - other.grad).abs().max()
        assert error < 1e-4 * other.grad.abs().max().clamp(min=1), name


def test_compiled_blocks_do_not_recompile(tmp_path):
    for cp in (1, 2):
        launch(_compiled, cp, tmp_path, cp)
