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
import json
import math
import os
import sys
import threading
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from model import UserError, full_row_patches, memory_estimate, planned_model

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


def main():
    """Does it fit? Memory of a device by the number of devices."""
    from configurator import configure, train_settings
    settings = configure(train_settings())
    model, patches = planned_model(settings), full_row_patches(settings)
    rows, seq_len, recompute = (settings[k] for k in ('batch_size', 'seq_len', 'recompute'))
    need = lambda shards, cp: memory_estimate(model, rows, seq_len, recompute, patches=patches, shards=shards, cp=cp)
    print(f"GB on each device for {rows} rows of {seq_len:,} tokens, recompute = {recompute}; with ddp "
          f"{need(1, 1)['total'] / 1e9:.1f}, with fsdp:\n")
    head = [*need(1, 1), 'cp = 2', 'cp = 4', 'cp = 8']
    print('devices  ' + '  '.join(head))
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        row = [*need(n, 1).values(), *(need(n, cp)['total'] if cp <= n else None for cp in (2, 4, 8))]
        print(f'{n:>7}  ' + '  '.join(f'{b / 1e9:{len(name)}.1f}' for name, b in zip(head, row) if b is not None))

    t = model.config.language
    print(f"\nOne row shared by cp devices that hold the weights together. MB: what each sends in a layer's forward pass, "
          f"and again in its backward pass\n\n{'row':>9}{'cp':>4}{'tokens each':>13}{'GB each':>9}{'MB':>7}")
    for length in (seq_len, 4 * seq_len):
        for n in (n for n in (1, 2, 4, 8, 16) if not t.num_heads % n):
            kv_heads = t.num_kv_heads * n // math.gcd(t.num_kv_heads, n)           # repeated until n divides them
            sent = (2 * t.num_heads + 2 * kv_heads) * t.head_dim * 2 * length / n * (n - 1) / n
            memory = memory_estimate(model, 1, length, recompute, patches=patches * length // seq_len, shards=n, cp=n)
            print(f"{length:>9,}{n:>4}{length // n:>13,}{memory['total'] / 1e9:>9.1f}{sent / 1e6:>7.0f}")


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
