"""One training run on many devices: who holds which weights, reads which rows, sees which piece of
a row.

torchrun starts the processes and numbers them (ranks); each has one device. With eight of them on two nodes and cp = 2:

    rank    0   1   2   3  |  4   5   6   7
    rows    a   a   b   b     c   c   d   d      ranks of one letter read the same rows, and each sees one half of them
    ddp     all the weights on every rank; gradients are added up over all ranks
    fsdp    an eighth of the weights, gradients and moments on each; a block's weights are gathered when it runs
    hsdp    a quarter on each: a whole copy in each node, so that weights travel inside nodes, gradients between them

All three give the gradients that one process would have, because train.py divides by the weight of
all rows together. cp is context (sequence) parallelism: the ranks that share a row exchange tokens
for heads around attention (Ulysses, below), so attention inside a shared row is exact.

    python parallel.py config/stage3.py      memory of each device by the number of devices
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
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from configurator import UserError
from model import attention

# As torchrun sets them; one process alone is rank 0 of 1
rank = int(os.environ.get('RANK', 0))                    # among all processes
world_size = int(os.environ.get('WORLD_SIZE', 1))
local_rank = int(os.environ.get('LOCAL_RANK', 0))        # among those of this node
local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))


# --------------------------------------------------------------------------------------------------
# The start

def start(device, threads):
    """Joins the other processes, if there are any; returns this one's device. Only rank 0 goes on
    printing."""
    if threads or local_world_size > 1:
        torch.set_num_threads(threads or max(1, os.cpu_count() // local_world_size))
    if world_size == 1:
        return device
    backend = 'gloo'
    if device.type == 'cuda':
        backend = 'cpu:gloo,cuda:nccl'
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=rendezvous(), rank=rank, world_size=world_size)
    if rank:
        sys.stdout = open(os.devnull, 'w')
    return device


def rendezvous():
    """The store in which ranks tell one another their addresses.

    After a crash torchrun starts all ranks again and hands them the store of the processes that
    died, with their old addresses in it (pytorch/pytorch#135712). So the ranks first agree on a
    prefix that no earlier attempt used:

        1. rank 0 makes up an id and publishes it under 'first';
        2. every other rank reads 'first' and answers under '<that id> <its rank>' with an id of its own;
        3. rank 0 waits for an answer from each rank and welcomes it under 'welcome <its id>'.

    A rank that read the id of an earlier attempt is not welcomed and tries again.
    """
    store, *_ = next(dist.rendezvous('env://'))
    my_id = uuid.uuid4().hex
    if rank == 0:
        store.set('first', my_id)
        for other in range(1, world_size):
            other_id = store.get(f'{my_id} {other}').decode()              # waits until it is there
            store.set(f'welcome {other_id}', '')
        return dist.PrefixStore(my_id, store)
    first_id = None
    while not store.check([f'welcome {my_id}']):
        first_id = store.get('first').decode()
        store.set(f'{first_id} {rank}', my_id)
        time.sleep(.05)
    return dist.PrefixStore(first_id, store)


def make_cp_group(cp, num_heads):
    """The process group of the `cp` ranks that share their rows with this one; None where nobody
    does."""
    if world_size % cp or num_heads % cp:
        raise UserError(f"cp = {cp} must divide the {world_size} processes and the decoder's {num_heads} heads")
    if cp == 1:
        return None
    mesh = init_device_mesh(_device_type(), (world_size // cp, cp), mesh_dim_names=('rows', 'cp'))
    return mesh.get_group('cp')


def _device_type():
    return 'cuda' if 'nccl' in dist.get_backend_config() else 'cpu'


# --------------------------------------------------------------------------------------------------
# Numbers and objects from all ranks

def sum_over_ranks(tensor):
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_numbers(**numbers):
    """{name: its sum over all ranks}, in one message."""
    total = sum_over_ranks(torch.tensor(list(numbers.values()), dtype=torch.float64))
    return dict(zip(numbers, total.tolist()))


def gather_objects(value):
    """[value of rank 0, value of rank 1, ...] on rank 0; a list of the same length on the others.
    """
    values = [value] * world_size
    if world_size > 1:
        dist.gather_object(value, None if rank else values)
    return values


def from_rank_0(function):
    """What function() returns on rank 0, on all ranks."""
    value = [None]
    if rank == 0:
        value = [function()]
    if world_size > 1:
        dist.broadcast_object_list(value)
    return value[0]


# --------------------------------------------------------------------------------------------------
# Sharding: FSDP2

def shard(model, hybrid, dtype, reshard, offload):
    """Shards the weights of a model, which need not exist yet (meta device), over all ranks or, if
    `hybrid`, over those of a node. Blocks compute in copies of `dtype`, which is what travels;
    gradients are added up in float32.

    A frozen tower stays whole on each rank: it has no gradients or moments to share, and a rank
    without pictures need not run it only to take part in gathering its weights. reshard: a block's
    weights are freed after its forward pass and gathered again for the backward pass (FULL_SHARD);
    without it they stay in between (SHARD_GRAD_OP). offload: weights, gradients and moments wait in
    the CPU's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    shards = local_world_size if hybrid else world_size
    mesh = init_device_mesh(_device_type(), (world_size // shards, shards), mesh_dim_names=('copies', 'shards'))
    tower = list(model.vision_tower.parameters())
    is_frozen = not any(p.requires_grad for p in tower)
    options = dict(mesh=mesh if hybrid else mesh['shards'], reshard_after_forward=reshard,
                   ignored_params=set(tower) if is_frozen else set(),
                   offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    # Inputs of blocks are not cast, because the residual stream is float32
    mixed_precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    blocks = model.language_model.layers if is_frozen else model.blocks()
    for block in blocks:
        fully_shard(block, mp_policy=mixed_precision, **options)
    fully_shard(model, **options)


# --------------------------------------------------------------------------------------------------
# Context parallelism: several ranks share each row

# torch 2.13 renamed these two collectives
all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor


class AllToAll(torch.autograd.Function):
    """x [N, ...] on each of N ranks -> [N, ...]: piece j of rank i becomes piece i of rank j. The
    exchange is a permutation that is its own inverse, so the gradient goes back by the same
    exchange."""

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
    """x [n, ...] on each of N ranks -> [N n, ...], the same on all. The gradient of x is the sum of
    the ranks' for it."""

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
    """The mask of rows that the N ranks of `group` share, each holding one piece of every row's
    tokens (Jacobs et al. 2023, arXiv 2309.14509).

        before      rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads
           │  all-to-all: I give each rank its heads of my tokens, and get my heads of its tokens
           ▼
        attention   rank 0: all tokens, heads 0..1          rank 1: all tokens, heads 2..3
           │  all-to-all back
           ▼
        after       rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads

    In between each rank has whole rows, so any attention under any mask will do. The exchange moves
    1 / N of what a rank holds to each of the others: more ranks, fewer bytes for each. All else in
    a decoder is done token by token.
    """
    mask: object                           # of the whole rows: whatever `model.attention` takes
    group: object                          # a process group

    def attend(self, query, key, value):
        """As `model.attention`: query [B, heads, L / N, D], key and value [B, kv_heads, L / N, D]
        of this rank's tokens."""
        N = self.group.size()
        # Query heads are dealt out to the ranks in order, and with them the key heads that they
        # read. Where N does not divide the key heads, each is repeated until it does.
        repeat = N // math.gcd(key.shape[1], N)
        if repeat > 1:
            key = key.repeat_interleave(repeat, 1)
            value = value.repeat_interleave(repeat, 1)
        # [B, N, heads of a rank, L / N, D] each
        by_rank = [x.unflatten(1, (N, -1)) for x in (query, key, value)]
        mine = torch.cat(by_rank, 2).transpose(0, 1)           # [N, B, all three's heads, L / N, D]
        received = AllToAll.apply(mine, self.group)                        # [N, B, heads, L / N, D]
        whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)                    # [B, heads, L, D]
        heads, kv_heads = query.shape[1] // N, key.shape[1] // N
        query, key, value = whole.split([heads, kv_heads, kv_heads], 1)
        x = attention(query, key, value, self.mask)                              # [B, heads, L, D]
        x = x.unflatten(2, (N, -1)).permute(2, 0, 1, 3, 4)                 # [N, B, heads, L / N, D]
        x = AllToAll.apply(x, self.group)                     # [N, B, heads, L / N, D] of my tokens
        return x.transpose(0, 1).flatten(1, 2)                            # [B, all heads, L / N, D]


def split_batch(batch, index, n):
    """Piece `index` of the `n` that a Batch is cut into for as many ranks: a stretch of every row's
    tokens with their losses, the visual tokens among them, and a share of the crops.

    Rows are padded until n divides them. So are the crops, whose features all ranks gather, those
    of rank 0 first (VLM.encode_images). What masks are made of stays whole: document_ids,
    branch_ids and, as row_tokens, the tokens.
    """
    B, L = batch.tokens.shape
    size = -(-L // n)                                    # tokens of a piece, rounded up
    first = index * size

    def padded(x, value=0):
        return F.pad(x, (0, n * size - L), value=value)                          # [B, n x size]

    def piece(x):
        return padded(x)[:, first:first + size].contiguous()                     # [B, size]

    def places_in_piece(flat):
        """Places in the flattened B x L -> (which of them are in this piece, where those are in the
        flattened B x size)."""
        row = flat // L
        column = flat % L - first
        inside = (column >= 0) & (column < size)
        return inside, (row * size + column)[inside]

    document_ids = padded(batch.document_ids, value=-1)
    position_ids = piece(batch.position_ids)
    loss_weights = piece(batch.loss_weights)
    has_loss, loss_index = places_in_piece(batch.loss_index)
    is_token = document_ids[:, first:first + size] >= 0
    cut = replace(batch, tokens=piece(batch.tokens), targets=piece(batch.targets),
                  loss_weights=loss_weights, position_ids=position_ids, document_ids=document_ids,
                  branch_ids=padded(batch.branch_ids), row_tokens=padded(batch.tokens),
                  loss_index=loss_index, loss_tasks=batch.loss_tasks[has_loss],
                  num_tokens=int(is_token.sum()), num_pairs=int((position_ids + 1)[is_token].sum()),
                  total_weight=float(loss_weights.sum()))
    if batch.pool_index is None:
        return cut
    patches, frames, gathered = _split_crops(batch, index, n)
    is_here, visual_index = places_in_piece(batch.visual_index)
    pool_index = batch.pool_index[is_here]
    pool_index = torch.where(pool_index < 0, -1, gathered[pool_index.clamp(min=0)])
    return replace(cut, patches=patches, frames=frames, visual_index=visual_index, pool_index=pool_index)


def _split_crops(batch, index, n):
    """(this rank's pictures, its frames, for each patch of the batch its place among the features
    that all ranks gather).

    A rank's share is its pictures, then its frames; the gathered features are the shares one after
    the other.
    """
    kinds = []                       # (crops of a share, patches of a crop, all crops of the batch)
    for crops in (batch.patches, batch.frames):
        if crops is not None:
            kinds.append((-(-len(crops) // n), crops.shape[1], len(crops)))
    share_size = sum(crops * patches for crops, patches, _ in kinds)
    gathered, before = [], 0
    for crops, patches, number in kinds:
        i = torch.arange(number * patches)
        owner = i // (crops * patches)                   # the rank that encodes patch i
        gathered.append(owner * share_size + before + i % (crops * patches))
        before += crops * patches

    def share(crops):
        if crops is None:
            return None
        size = -(-len(crops) // n)
        mine = crops[index * size:(index + 1) * size]
        return F.pad(mine, (0, 0, 0, 0, 0, size - len(mine)))
    return share(batch.patches), share(batch.frames), torch.cat(gathered)


def cp_batches(batches, cp, group):
    """Of each (batch, state) this rank's piece. Of the ranks that share rows the first reads them
    and gives the others theirs, over `group`, a gloo group of its own, because a thread may use it
    while the training exchanges other things."""
    first = rank - rank % cp
    while True:
        pieces = None
        if rank == first:
            batch, state = next(batches)
            pieces = [(split_batch(batch, i, cp), state) for i in range(cp)]
        mine = [None]
        dist.scatter_object_list(mine, pieces, first, group)
        yield mine[0]


# --------------------------------------------------------------------------------------------------
# Resuming with another number of ranks

def reshard_loader_states(states, n, mixture):
    """The loader states of some ranks that read a mixture together -> those of `n` that go on
    together.

    With as many ranks as before, each goes on where it was. With another number, what is left of
    the draws so far (the examples in packing pools, and the draws below the furthest one that a
    slower rank had not reached) is divided round-robin, and new draws start after the furthest.
    """
    if len(states) == n:
        return states
    old = len(states)
    # By rank, because the old rank r drew k = r, r + old, r + 2 old, ..
    next_draw = {state['draw'] % old: state['draw'] for state in states}
    first = min(next_draw.values())
    end = max(next_draw.values())
    left = sorted(example for state in states for example in state['pool'])
    for draw in itertools.takewhile(lambda draw: draw[0] < end, mixture.draws(first)):
        if draw[0] >= next_draw[draw[0] % old]:
            left.append(list(draw))
    skipped = Counter()
    for state in states:
        skipped.update(state['skipped'])
    new = [{'draw': end + i, 'pool': left[i::n], 'seen': 0, 'skipped': {}} for i in range(n)]
    new[0]['seen'] = sum(state['seen'] for state in states)
    new[0]['skipped'] = dict(skipped)
    return new


# --------------------------------------------------------------------------------------------------
# When it hangs

class Watchdog(threading.Thread):
    """In a hang all ranks wait for one, and only where that one is says why. After `patience`
    seconds without progress the first rank that still answers prints, once, where each rank is."""

    def __init__(self, patience):
        super().__init__(daemon=True)
        self.patience = patience
        self.over = threading.Event()
        self.at('starting')
        if world_size > 1:
            self.store = dist.distributed_c10d._get_default_store()
            self.publish()
            self.start()

    def at(self, place, rows=()):
        """The training loop says where it is, and with which rows, (data set, row)."""
        self.now = (place, time.time(), rows)

    def publish(self):
        place, since, rows = self.now
        names = [f'{dataset}:{row}' for dataset, row in rows]
        self.store.set(f'place {rank}', json.dumps([time.time(), place, since, names]))

    def run(self):
        reported = None
        while not self.over.wait(self.patience / 4):
            try:
                self.publish()
                if self.now is reported or time.time() - self.now[1] < self.patience:
                    continue
                places = [json.loads(self.store.get(f'place {r}')) for r in range(world_size)]
            except RuntimeError:           # rank 0 is gone, and its store with it; torchrun says so
                return
            reported = self.now
            self.report(places)

    def report(self, places):
        """Prints where all ranks are, those at the same place on one line, unless a lower rank does
        it."""
        now = time.time()
        silent = [r for r, (published, *_) in enumerate(places) if now - published > self.patience]
        answering = [r for r in range(world_size) if r not in silent]
        if rank != answering[0]:
            return
        groups = {}                          # (place, is silent) -> [(rank, seconds there, rows)]
        for r, (_, place, since, rows) in enumerate(places):
            groups.setdefault((place, r in silent), []).append((r, now - since, rows))
        for (place, is_silent), members in sorted(groups.items(), key=lambda group: -len(group[1])):
            ranks = ', '.join(str(r) for r, _, _ in members)
            seconds = max(seconds for _, seconds, _ in members)
            rows = members[0][2]
            noun = 'rank' if len(members) == 1 else 'ranks'
            line = f'{noun} {ranks}: {place} for {seconds:.0f} s'
            if is_silent:
                line += ', does not answer'
            if rows:
                line += f", with {' '.join(rows)}"
            print(line, file=sys.stderr, flush=True)


if __name__ == '__main__':
    try:
        from extra.plan import main_devices  # the table of memory by devices
        main_devices()
    except UserError as e:
        sys.exit(f'error: {e}')
