"""One training run on many devices: who holds which weights, reads which rows, sees which piece of a row.

torchrun starts the processes and numbers them; each rank has one device. With eight of them on two nodes and cp = 2:

    rank    0   1   2   3  |  4   5   6   7
    rows    a   a   b   b     c   c   d   d      of the same letter: a row each reads, of which each sees one half
    ddp     all the weights on every rank; gradients are added up over all
    fsdp    an eighth of the weights, gradients and moments on each; a block's weights are gathered for its turn
    hsdp    a quarter on each: a whole copy per node, so that weights travel inside nodes and gradients between them

All three give the gradients that one process would have (train.py divides by the weight of all rows together), and
the attention inside a shared row is exact (model.py, Ulysses).
"""
import itertools
import json
import math
import os
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from configurator import UserError
from model import attention

rank, local_rank, world_size, local_world_size = (             # as torchrun sets them
    int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_WORLD_SIZE', 1)))


def start(device, threads):
    """Joins the other processes, if there are; returns this one's device. Only rank 0 goes on printing."""
    if threads or local_world_size > 1:
        torch.set_num_threads(threads or max(1, os.cpu_count() // local_world_size))
    if world_size > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', store=meet(), rank=rank,
                                world_size=world_size)
        sys.stdout = open(os.devnull, 'w') if rank else sys.stdout
    return device


def meet():
    """The store in which ranks tell each other their addresses. After a crash torchrun hands the store of the processes
    that died to those that it starts (pytorch/pytorch#135712); a prefix that rank 0 makes up hides what is in it."""
    store, *_ = next(dist.rendezvous('env://'))
    first = me = uuid.uuid4().hex
    if not rank:
        store.set('first', me)
        for r in range(1, world_size):
            store.set(f"welcome {store.get(f'{me} {r}').decode()}", '')      # waits for rank r
    while rank and not store.check([f'welcome {me}']):
        first = store.get('first').decode()    # or the last attempt's, whom nobody answers
        store.set(f'{first} {rank}', me)
        time.sleep(.05)
    return dist.PrefixStore(first, store)


def sum_over_ranks(tensor):
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """[value of rank 0, value of rank 1, ...], on rank 0; elsewhere nothing of use."""
    values = [value] * world_size
    if world_size > 1:
        dist.gather_object(value, values if not rank else None)
    return values


def from_rank_0(function):
    """function() of rank 0, on all."""
    value = [None if rank else function()]
    if world_size > 1:
        dist.broadcast_object_list(value)
    return value[0]


def row_group(cp, num_heads):
    """The process group of the `cp` ranks that share their rows with this one, or None where nobody does."""
    if world_size % cp or num_heads % cp:
        raise UserError(f"cp = {cp} must divide the {world_size} processes and the decoder's {num_heads} heads")
    return init_device_mesh(_device_type(), (world_size // cp, cp), mesh_dim_names=('rows', 'cp')).get_group('cp') \
        if cp > 1 else None


def _device_type():
    return 'cuda' if 'nccl' in dist.get_backend_config() else 'cpu'


def shard(model, hybrid, dtype, reshard, offload):
    """FSDP2: cuts the weights of a model, which need not exist yet (meta device), over all ranks or, if `hybrid`, over
    those of a node. Blocks compute in copies of `dtype`, which is what travels; gradients are added up in float32.

    A frozen tower stays whole on each rank: it has no gradients or moments to share, and a rank without pictures need
    not run it to keep the others company. reshard: a block's weights go after its forward pass and come again for the
    backward (FULL_SHARD); else they stay in between (SHARD_GRAD_OP).
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    n = local_world_size if hybrid else world_size
    mesh = init_device_mesh(_device_type(), (world_size // n, n), mesh_dim_names=('copies', 'shards'))
    tower = list(model.vision_tower.parameters())
    ignored = set() if any(p.requires_grad for p in tower) else set(tower)
    how = dict(mesh=mesh if hybrid else mesh['shards'], reshard_after_forward=reshard, ignored_params=ignored,
               offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    for block in model.language_model.layers if ignored else model.blocks():
        # its inputs stay what they are: the residual stream is float32
        fully_shard(block, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False), **how)
    fully_shard(model, **how)


# their names from torch 2.13 on, and those of before
all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor


reduce_scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor


class AllToAll(torch.autograd.Function):
    """x [N, ...] on each of N ranks -> [N, ...]: piece j of rank i becomes piece i of rank j. Its own inverse, and so
    its own gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, ctx.group), None


class AllGather(torch.autograd.Function):
    """x [n, ...] on each of N ranks -> [N n, ...], the same on all. The gradient of x is the sum of the ranks' for it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(group.size() * len(x), *x.shape[1:])
        all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


@dataclass
class Ulysses:
    """The mask of rows that the N ranks of `group` share, each holding one piece of every row's tokens (Jacobs et al.
    2023, arXiv 2309.14509).

        before      rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads
           │  all-to-all: I give each rank its heads of my tokens, and get my heads of its tokens
           ▼
        attention   rank 0: all tokens, heads 0..1          rank 1: all tokens, heads 2..3
           │  all-to-all back
           ▼
        after       rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads

    In between each rank has whole rows, so any attention under any mask will do. The exchange moves 1 / N of what a
    rank holds to each of the others: more ranks, fewer bytes for each. All else in a decoder is done token by token.
    """
    mask: object                           # of the whole rows: whatever `attention` takes
    group: object                          # a process group

    def attend(self, query, key, value):
        """As `attention`; query [B, heads, L / N, D], key and value [B, kv heads, L / N, D] of this rank's tokens."""
        N = self.group.size()
        # Query heads are dealt out in order, and with them the key heads they read: repeated until N divides them
        repeat = N // math.gcd(key.shape[1], N)
        key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
        mine = torch.cat([x.unflatten(1, (N, -1)) for x in (query, key, value)], 2)              # [B, N, h, L / N, D]
        x = AllToAll.apply(mine.transpose(0, 1), self.group)                                     # [N, B, h, L / N, D]
        x = x.permute(1, 2, 0, 3, 4).flatten(2, 3)                                               # [B, h, L, D]
        x = attention(*x.split([query.shape[1] // N, key.shape[1] // N, key.shape[1] // N], 1), self.mask)
        x = x.unflatten(2, (N, -1)).permute(2, 0, 1, 3, 4)                                # [N, B, heads / N, L / N, D]
        return AllToAll.apply(x, self.group).transpose(0, 1).flatten(1, 2)


def share_rows(batch, index, n):
    """Piece `index` of the `n` that a batch is cut into for as many ranks: a stretch of every row's tokens with their
    losses, the visual tokens among them, and a share of the crops. Rows are padded until n divides them, and so are the
    crops, whose features all ranks gather, those of rank 0 first (model.py, VLM.see). What masks are made of stays
    whole: document_ids, branch_ids and, as `row_tokens`, the tokens.
    """
    L, cut = batch['tokens'].shape[1], dict(batch)
    size = -(-L // n)
    mine = slice(index * size, (index + 1) * size)
    for key in ('tokens', 'targets', 'loss_weights', 'position_ids', 'document_ids', 'branch_ids'):
        cut[key] = F.pad(batch[key], (0, n * size - L), value=-1 if key == 'document_ids' else 0)    # [B, n size]
    cut['row_tokens'], real = cut['tokens'], cut['document_ids'][:, mine] >= 0
    for key in ('tokens', 'targets', 'loss_weights', 'position_ids'):
        cut[key] = cut[key][:, mine].contiguous()                                                # [B, size]

    def place(flat):
        """Flat places in [B, L] -> which of them are in this piece, and where in [B, size]."""
        row, column = flat // L, flat % L - mine.start
        inside = (column >= 0) & (column < size)
        return inside, (row * size + column)[inside]
    inside, cut['loss_index'] = place(batch['loss_index'])
    cut['loss_tasks'] = batch['loss_tasks'][inside]
    if 'pool_index' in batch:
        kinds = [(name, *batch[name].shape[:2], -(-len(batch[name]) // n)) for name in ('patches', 'frames')
                 if name in batch]           # a name, its crops, the patches of one, the crops of a share
        share, before, gathered = sum(p * crops for _, _, p, crops in kinds), 0, []
        for name, number, patches, crops in kinds:
            ours = batch[name][index * crops:(index + 1) * crops]
            cut[name] = F.pad(ours, (0, 0, 0, 0, 0, crops - len(ours)))
            i = torch.arange(number * patches)
            gathered.append(i // (crops * patches) * share + before + i % (crops * patches))
            before += crops * patches
        inside, cut['visual_index'] = place(batch['visual_index'])
        pool = batch['pool_index'][inside]
        cut['pool_index'] = torch.where(pool < 0, -1, torch.cat(gathered)[pool.clamp(min=0)])
    cut.update(n_tokens=int(real.sum()), total_weight=float(cut['loss_weights'].sum()),
               n_pairs=int((cut['position_ids'] + 1)[real].sum()))
    return cut


def deal_out(states, n, mixture):
    """The states of some loaders that read a mixture together -> those of `n` that go on together: what waited in the
    pools and what the slower ones had still to draw is dealt out, the new draws begin after the fastest."""
    if len(states) == n:
        return states
    following = {s['draw'] % len(states): s['draw'] for s in states}
    first, end = min(following.values()), max(following.values())
    drawn = itertools.takewhile(lambda draw: draw[0] < end, mixture.draws(first))
    left = sorted(row for s in states for row in s['pool'])
    left += [list(draw) for draw in drawn if draw[0] >= following[draw[0] % len(states)]]
    dealt = [{'draw': end + i, 'pool': left[i::n], 'seen': 0, 'skipped': {}} for i in range(n)]
    dealt[0].update(seen=sum(s['seen'] for s in states),
                    skipped=dict(sum((Counter(s['skipped']) for s in states), Counter())))
    return dealt


class Watchdog(threading.Thread):
    """In a hang all ranks wait for one, and only where that one is tells why. After `patience` seconds without
    progress the first rank that can still speak prints, once, where each is."""

    def __init__(self, patience):
        super().__init__(daemon=True)
        self.patience, self.over = patience, threading.Event()
        self.at('starting')
        if world_size > 1:
            self.store = dist.distributed_c10d._get_default_store()
            self.beat()
            self.start()

    def at(self, place, rows=()):
        """The training loop says where it is, and which rows, (dataset, row), it is at."""
        self.now = (place, time.time(), rows)

    def beat(self):
        place, since, rows = self.now
        self.store.set(f'place {rank}', json.dumps((time.time(), place, since, [f'{name}:{row}' for name, row in rows])))

    def run(self):
        told = None
        while not self.over.wait(self.patience / 4):
            try:
                self.beat()
                if self.now is told or time.time() - self.now[1] < self.patience:
                    continue
                places = [json.loads(self.store.get(f'place {r}')) for r in range(world_size)]
            except RuntimeError:             # rank 0 and its store are gone: torchrun says so
                return
            told, now = self.now, time.time()
            silent = {r for r, (beat, *_) in enumerate(places) if now - beat > self.patience}
            if rank != min({*range(world_size)} - silent):
                continue
            groups = {}
            for r, (_, place, since, rows) in enumerate(places):
                groups.setdefault((place, r in silent), []).append((r, now - since, rows))
            for (place, quiet), members in sorted(groups.items(), key=lambda g: -len(g[1])):
                ranks, seconds, rows = zip(*members)
                print(f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {place} for "
                      f"{max(seconds):.0f} s{', does not answer' if quiet else ''}"
                      + (f", with {' '.join(rows[0])}" if rows[0] else ''), file=sys.stderr, flush=True)


if __name__ == '__main__':
    try:
        from extra.plan import main_devices  # the table of memory by devices
        main_devices()
    except UserError as e:
        sys.exit(f'error: {e}')
