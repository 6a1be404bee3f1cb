"""Train a VLM: one loop for every stage and every size. Reads top to bottom.

    python train.py config/demo_stage1.py                     a laptop, minutes
    python train.py config/stage1.py                          one GPU; --dry_run shows the plan and stops
    torchrun --nproc-per-node=8 train.py config/stage1.py     a copy of the model on each of eight
    Ctrl-C or SIGTERM saves and exits; the same command continues, bit for bit.

Settings are the assignments below (see configurator.py). What lands in out_dir: step001000/ (a checkpoint that is a
model: config.json, model.safetensors, tokenizer, and train_state/ to resume), latest, metrics.jsonl, skipped.jsonl.
"""
import ctypes
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import Queue

# -- what
out_dir = 'out/stage1'         # or a URL, s3://bucket/run: written to out/s3/bucket/run here, then copied (fsspec)
init_from = ''                 # checkpoint folder to start from: ours, llava or molmo2; '' builds from the next lines
recipe = 'nano'                # nano | molmo2 (model.py, Config)
vision = 'openai/clip-vit-large-patch14-336'   # a name in model.py's table, or a dict of sizes
language = 'Qwen/Qwen3-0.6B'   # likewise
connector = 'linear'           # linear | mlp | molmo2
pooling = 2                    # patches a side that one visual token pools
vision_weights = ''            # folder with the tower's safetensors; '' starts it at random
language_weights = ''          # folder with the decoder's safetensors; '' starts it at random
tokenizer = ''                 # folder with tokenizer.json; '' takes init_from's, then language_weights'
train_vision = False           # frozen parts cost no gradients and no optimiser state
train_connector = True
train_language = True
train_embedding = True         # False keeps the table of token embeddings, and with it a tied output, as it was
residual_dropout = 0.0         # of what each decoder block adds
# -- data
data_dir = 'data'
mixture = {}                   # folder under data_dir -> rate, or groups with sqrt inside (data.py, mixture_rates)
image_size = 336               # pixels a side after resizing
video_size = 224               # likewise of a frame
video_pooling = 4              # patches a side that one visual token of a frame pools
max_frames = 128               # of a clip, spread evenly when fps a second were more
fps = 2.0
seq_len = 4096                 # tokens a row at most
batch_size = 32                # rows a micro-batch of each process
accumulation = 1               # micro-batches a step
num_workers = 2                # processes that decode and tokenise; 0 does it between the steps
packing = False                # fill rows of exactly seq_len with several examples; else a row is one example
static_shapes = False          # pad every row to seq_len, as torch.compile likes it
point_format = 'point'         # point | molmo2 (data.py, format_points)
point_digits = 3               # decimals of a coordinate in the point format
task_weights = {'captioning': 1.0, 'qa': 1.0, 'counting': 1.5, 'pointing': 2.0, 'tracking': 2.0}
length_weighting = False       # weight / sqrt(tokens of the answer)
branch_weighting = False       # weight / sqrt(conversations of the row)
z_loss = 0.0                   # times log(sum of exp(logits))^2 is added: keeps logits near 0 (PaLM, section 5)
max_bad_fraction = 0.1         # stop when more rows than this cannot be used
# -- optimiser
optimizer = 'adamw'            # adamw | muon (Muon for the matrices inside blocks, AdamW for the rest)
learning_rate = 1e-4
vision_learning_rate = 0.0     # 0: learning_rate
connector_learning_rate = 0.0  # 0: learning_rate
muon_learning_rate = 0.0       # 0: learning_rate
beta1 = 0.9
beta2 = 0.95
epsilon = 1e-8
weight_decay = 0.0
grad_clip = 1.0                # largest norm of the gradient; 0 does not clip
clip_parts = False             # vision, connector and language each by its own norm
schedule = 'cosine'            # cosine | linear | constant | inverse_sqrt, after the warm-up
warmup_steps = 2000
vision_warmup_steps = 0        # 0: warmup_steps
connector_warmup_steps = 0     # 0: warmup_steps
max_steps = 100000
min_lr_ratio = 0.1             # where cosine and linear end, as a share of the peak
max_nonfinite = 10             # stop after so many steps in a row whose gradient was not finite
# -- machine
device = 'auto'                # auto | cuda | mps | cpu
dtype = 'auto'                 # auto | bfloat16 | float16 | float32: of the products; float16 scales its loss
master_dtype = 'float32'       # of weights, gradients and moments; bfloat16 halves them and loses small updates
parallel = 'ddp'               # ddp | fsdp | hsdp: who holds the weights, where torchrun starts several (parallel.py)
cp = 1                         # ranks that share each row and see a piece of it: long rows (model.py, Ulysses)
reshard = True                 # fsdp, hsdp: gathered weights go after a block's forward pass; False: after the backward
offload = False                # fsdp, hsdp: weights, gradients and moments wait in the CPU's memory
threads = 0                    # CPU threads of torch; 0: the cores, shared among the processes of this machine
compile = False
recompute = 0                  # n: every n-th block is computed again in the backward pass instead of kept
memory_budget = 1.0            # with compile: share of a block's activations that is kept; the rest is computed again
seed = 1337
# -- keeping track
log_interval = 10              # steps between reads of the device; every step is in metrics.jsonl all the same
eval_interval = 1000           # steps between validation losses; 0 never
eval_batches = 20
eval_answers = 0               # then, too, records of each validation set whose questions are answered and scored (eval.py)
save_interval = 5000
keep = 3                       # checkpoints kept; 0 keeps all
hang_after = 300               # seconds without progress after which several processes say where each of them is
profile_steps = ()             # (first, last): a trace of these steps in out_dir/trace-rank0.json, for ui.perfetto.dev
tensorboard = False            # if installed
wandb_project = ''             # if installed
dry_run = False                # print the plan and stop


if __name__ == '__main__':
    from configurator import configure
    settings = configure(globals())    # before torch loads: a typo is answered at once

remote = out_dir if '://' in out_dir else ''
if remote:
    out_dir = f"out/{remote.replace('://', '/')}"

import fsspec  # noqa: E402       torch brings it
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import (TASKS, Dataset, Loader, Mixture, Processor, mixture_sets, open_mixture,  # noqa: E402
                  processor_settings, to_device)
from parallel import deal_out, share_rows  # noqa: E402
from extra.hf import load_processor, saved_settings, is_released  # noqa: E402
from extra.plan import mixture_table  # noqa: E402
from eval import evaluate as answers, summarise, table  # noqa: E402
from model import UserError, VLM, compile_blocks, make_config, pick_device, pick_dtype, read_json, whole  # noqa: E402
from extra.hf import copy_tensors, from_hf, layout, load_weights, newest, write_model  # noqa: E402
from extra.plan import fits, full_row_patches, memory_estimate, part_table, planned_model  # noqa: E402
from extra.engine import separate, uncompiled  # noqa: E402
from parallel import (Watchdog, from_rank_0, gather, local_world_size, rank, row_group, shard, start, sum_over_ranks,  # noqa: E402
                      world_size)


warnings.filterwarnings('ignore', message='torch.distributed is disabled')      # dcp, in a run of one process


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


def get_lr_scale(step, warmup):
    """Share of the peak learning rate at `step`, counted from 0, of a part that warms up for `warmup` steps."""
    if step < warmup:
        return (step + 1) / warmup
    x = min(1, (step - warmup) / max(1, max_steps - warmup))
    if schedule == 'constant':
        return 1.
    if schedule == 'inverse_sqrt':
        return (max(1, warmup) / (step + 1)) ** .5
    return min_lr_ratio + (1 - min_lr_ratio) * (cosine(x) if schedule == 'cosine' else 1 - x)


def keep_freed_memory():
    """glibc hands large blocks back to the system as soon as they are free, and every step gets them anew, a page fault
    per 4 KiB: a third of a step on a CPU. This tells malloc to keep them (mallopt(3), M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD)."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(-3, 2 ** 30)
        mallopt(-1, 2 ** 31 - 1)


def set_trained(model):
    model.set_trained(settings)
    model.vision_tower.recompute = model.language_model.recompute = recompute
    model.language_model.dropout = residual_dropout
    model.z_loss = z_loss
    return model


def new_config(**ids):
    return make_config(vision, language, recipe=recipe, connector=connector, pooling=pooling, **ids)


def build(checkpoint, dev, amp):
    """The model with its first weights, cut up as `parallel` says, and the processor: from a checkpoint of this run,
    from init_from, or new. Each rank reads or draws the weights that it holds."""
    ours = processor_settings(settings)
    if source := checkpoint or init_from and newest(init_from):
        config = from_hf(read_json(source / 'config.json'), source / 'config.json')
        processor = load_processor(source, config, **ours)
        before = {} if is_released(source) else saved_settings(source, config)      # a released one's sizes are its own
        for name in ('image_size', 'pooling', 'video_size', 'video_pooling', 'point_format', 'point_digits'):
            if name in before and before[name] != getattr(processor, name):
                print(f'note: {name} is {before[name]!r} in {source} and {getattr(processor, name)!r} now')
    else:
        if not (folder := tokenizer or language_weights):
            raise UserError("tokenizer, language_weights or init_from must name a folder with tokenizer.json")
        processor = Processor(folder, patch_size=new_config().vision.patch_size, **ours)
        config = new_config(**processor.token_ids())
    rows = config.language.vocab_size + config.language.extra_vocab_size
    if processor.vocab_size > rows:
        raise UserError(f"the tokenizer has {processor.vocab_size} tokens, the decoder's table only {rows} rows")
    with torch.device('meta'):
        model = set_trained(VLM(config)).to(pick_dtype(master_dtype, dev))
    if parallel not in ('ddp', 'fsdp', 'hsdp'):
        raise UserError(f"parallel = '{parallel}' is not one of ddp, fsdp, hsdp")
    if eval_answers and world_size > 1 and (parallel != 'ddp' or cp > 1):
        raise UserError("eval_answers needs all the weights and whole rows on each process: parallel = 'ddp' and cp = 1. "
                        "Else set it to 0 and give the checkpoints to eval.py")
    model.group = row_group(cp, config.language.num_heads)
    if parallel != 'ddp' and world_size > 1:
        shard(model, parallel == 'hsdp', None if amp == torch.float32 else amp, reshard, offload)
    model.to_empty(device='cpu' if offload else dev)
    if offload and not train_vision:
        model.vision_tower.to_empty(device=dev)
    model.set_buffers(dev)
    if source:
        load_weights(model, source)
    else:
        model.init_weights(seed)
        for folder, part in ((vision_weights, 'vision_tower.'), (language_weights, ('language_model.', 'lm_head.'))):
            if folder:
                load_weights(model, folder, only=part)
    return model, processor


def make_optimizers(model):
    """An AdamW for each part that is trained, and a Muon for the matrices inside its blocks if asked for."""
    rates = {'vision': vision_learning_rate, 'connector': connector_learning_rate, 'language': learning_rate}
    warmups = {'vision': vision_warmup_steps, 'connector': connector_warmup_steps, 'language': warmup_steps}
    tables = ('embed_tokens', 'position_embedding', 'lm_head')      # rows looked up, not directions mapped
    hidden = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and not any(t in n for t in tables)}
    optimizers = []
    for part, parameters in model.parts().items():
        trained = [p for p in parameters if p.requires_grad]
        by_muon = [p for p in trained if optimizer == 'muon' and id(p) in hidden]
        rest = [p for p in trained if not (by_muon and id(p) in hidden)]
        common = {'part': part, 'warmup': warmups[part] or warmup_steps}
        if rest:
            group = {'params': rest, 'peak': rates[part] or learning_rate, **common}
            optimizers.append(torch.optim.AdamW([group], lr=0., betas=(beta1, beta2), eps=epsilon,
                                                weight_decay=weight_decay, fused=True))
        if by_muon:
            group = {'params': by_muon, 'peak': muon_learning_rate or learning_rate, **common}
            optimizers.append(torch.optim.Muon([group], lr=0., weight_decay=weight_decay,
                                               adjust_lr_fn='match_rms_adamw'))
    return optimizers


def distribute(model):
    """What to call instead of the model, so that gradients are added up over the ranks while the backward goes on."""
    if world_size > 1 and parallel == 'ddp':
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def backward(model, trained, micros, autocast, scale=1.):
    """The gradients of a step over the micro-batches of all ranks, times `scale`; returns its loss and task_sums, the
    same on all.

    The loss is one weighted mean: sum(weight x nll) / sum(weight) over all of them, because the mean of means is not
    the mean: (x1/n1 + x2/n2)/2 != (x1+x2)/(n1+n2).
    """
    total_weight = sum_over_ranks(torch.tensor(sum(m['total_weight'] for m in micros), dtype=torch.float64)).item()
    model.loss_scale = scale * (world_size / total_weight)       # the sum over ranks is divided by world_size
    loss, sums = 0., 0.
    for i, micro in enumerate(micros):
        last = i == len(micros) - 1          # the ranks' gradients are added up once
        if parallel != 'ddp' and world_size > 1:
            model.set_requires_gradient_sync(last)
        with trained.no_sync() if trained is not model and not last else nullcontext():
            with autocast:
                weighted, nll = trained(micro)
            weighted.backward()
        loss = loss + weighted.detach() / (scale * world_size)
        sums = sums + task_sums(nll, micro['loss_tasks'])
    model.loss_scale = 1.
    return sum_over_ranks(loss), sum_over_ranks(sums)


def step_optimizers(optimizers, step, loss_scale=1.):
    """Clips, steps and clears. Gradients are those of the loss times `loss_scale`. Returns (gradient norm, 1. if it was
    not finite: then nothing was changed).

    Nothing here waits for the device: fused AdamW divides by `grad_scale` and leaves weights, moments and step count
    alone where `found_inf` is set, which is how a GradScaler talks to it.
    """
    gradients = {}                           # clipped by one norm, or each part by its own
    for group in (opt.param_groups[0] for opt in optimizers):
        gradients.setdefault(group['part'] if clip_parts else 'all', []).extend(
            p.grad for p in group['params'] if p.grad is not None)
    norms = {part: torch.nn.utils.get_total_norm(g) for part, g in gradients.items() if g}
    norms = {part: whole(n).float() / loss_scale for part, n in norms.items()}
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    bad = (~torch.isfinite(total)).float()
    for opt in optimizers:
        group = opt.param_groups[0]
        group['lr'] = group['peak'] * get_lr_scale(step, group['warmup'])
        norm = norms.get(group['part'] if clip_parts else 'all', total)
        scale = loss_scale * ((norm / grad_clip).clamp(min=1.) if grad_clip else torch.ones_like(norm))
        if isinstance(opt, torch.optim.AdamW):
            opt.grad_scale, opt.found_inf = scale, bad
            opt.step()
        elif not bad:                        # Muon knows no found_inf: a wait for the device
            if moved := [p.grad for p in group['params'] if p.grad is not None]:
                torch._foreach_div_(moved, scale)
            opt.step()
        opt.zero_grad(set_to_none=True)
    return total, bad


def next_scale(scaling, bad):
    """For float16: (the factor of the loss, good steps with it). The factor is halved when a gradient overflows and
    doubled after 2,000 steps in which none did (Micikevicius et al. 2018, section 3.2)."""
    scale, good = scaling
    good = (good + 1) * (1 - bad)
    grow = (good >= 2000).float()
    return torch.stack([scale * (1 + grow) * (1 - bad / 2), good * (1 - grow)])


# bfloat16 products a second without sparsity, from the makers' data sheets; a device not listed gets no MFU
PEAK = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12, 'L40S': 362e12,
        'L4': 121e12, 'A10': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def peak_flops(dev):
    return next((p for name, p in PEAK.items() if dev.type == 'cuda' and name in torch.cuda.get_device_name()), None)


def flops(model, micro):
    """Floating-point operations of a training step on this batch, vision, decoder and attention by true lengths.

    2 per weight and token forward, 4 more where gradients flow (2 through frozen weights that pass them on);
    4 x heads x head_dim per pair of tokens that see each other, thrice with backward. Ignores norms, softmax and the
    rotation (< 2%). A token at position p sees p + 1 tokens, in a tree as in a plain row.
    """
    v, t = model.config.vision, model.config.language
    matmul = sum(p.numel() for n, p in model.language_model.named_parameters() if '.layers.' in f'.{n}' and p.ndim == 2)
    times = 3 if train_language else 2
    total = 2 * times * matmul * micro['n_tokens'] + 12 * t.num_layers * t.num_heads * t.head_dim * micro['n_pairs']
    total += 2 * times * t.vocab_size * t.hidden_size * len(micro['loss_index'])
    tower = sum(p.numel() for n, p in model.vision_tower.named_parameters() if p.ndim == 2 and 'position' not in n)
    for crops, patches, _ in (micro[k].shape for k in ('patches', 'frames') if k in micro):
        pairs = 4 * v.num_layers * v.hidden_size * patches ** 2 * crops
        total += (3 if train_vision else 1) * (2 * tower * crops * patches + pairs)
    return total


def prefetch(batches, dev):
    """Moves batches to the device from a thread, two ahead, from pinned memory. On the CPU there is nothing to move."""
    if dev.type == 'cpu':
        yield from batches
        return
    queue, end = Queue(2), object()

    def move():
        try:
            for batch, state in batches:
                if dev.type == 'cuda':
                    batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
                queue.put((to_device(batch, dev), state))
            queue.put(end)
        except BaseException as e:           # raised again in the main thread
            queue.put(e)
    threading.Thread(target=move, daemon=True).start()
    while (item := queue.get()) is not end:
        if isinstance(item, BaseException):
            raise item
        yield item


def pieces(batches, group):
    """Of each batch this rank's piece. Where ranks share rows the first of them reads, and gives each other its piece."""
    while True:
        mine, cut = [None], None
        if rank % cp == 0:
            batch, state = next(batches)
            cut = [(share_rows(batch, i, cp), state) for i in range(cp)]
        dist.scatter_object_list(mine, cut, rank - rank % cp, group)
        yield mine[0]


def task_sums(nll, tasks):
    """[2, tasks]: sum of the cross entropies and number of tokens of each task."""
    out = torch.zeros(2, len(TASKS), device=nll.device)
    out[0].index_add_(0, tasks, nll.detach())
    out[1].index_add_(0, tasks, torch.ones_like(nll))
    return out


def task_losses(sums):
    """{'loss/pointing': mean cross entropy, ...} of the tasks that had tokens."""
    total, count = sums.tolist()
    return {f'loss/{t}': s / n for t, s, n in zip(TASKS, total, count) if n}


@torch.no_grad()
def evaluate(model, make_loader, dev, autocast):
    """Weighted loss and per-task losses over the first eval_batches of each rank's share of the validation sets."""
    model.eval()
    total, weight, sums = 0., 0., torch.zeros(2, len(TASKS))
    for batch, _ in itertools.islice(make_loader('validation'), eval_batches):
        batch = share_rows(batch, rank % cp, cp) if cp > 1 else batch
        with autocast:
            loss, nll = model(to_device(batch, dev))
        total, weight = total + loss.item(), weight + batch['total_weight']
        sums += task_sums(nll, batch['loss_tasks'].to(dev)).cpu()
    model.train()
    total, weight = sum_over_ranks(torch.tensor([total, weight], dtype=torch.float64)).tolist()
    return {'loss': total / max(weight, 1e-9), **task_losses(sum_over_ranks(sums))}


def ask(model, processor, datasets, autocast):
    """[{dataset, task, metric, score, ..}] of the model's answers about the first eval_answers records of each dataset."""
    model.eval()
    with autocast, uncompiled(model):                        # each prompt has a length of its own
        rows, _, _ = answers(model, processor, datasets, eval_answers)
    separate(model)
    model.train()
    return summarise(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: written under another name, flushed, renamed; `latest` last. A crash leaves the one before.

def moments(model, optimizers):
    """{'parameter.moment': tensor} of all optimisers; those of a sharded parameter are sharded likewise."""
    names = {p: name for name, p in model.named_parameters()}
    return {f'{names[p]}.{key}': value for opt in optimizers for p, state in opt.state.items()
            for key, value in state.items()}


class Saver:
    """Writes checkpoints behind the training's back: a step waits for the copy to the CPU's memory and, if it comes too
    soon, for the checkpoint before."""

    def __init__(self):
        self.writing, self.step, self.worker = None, None, ThreadPoolExecutor(1)
        self.group = dist.new_group(backend='gloo') if world_size > 1 else None      # its messages cross the training's

    def save(self, step, model, processor, optimizers, place, random):
        """place: where this rank is in its data; random: the states of its generators."""
        import torch.distributed.checkpoint as dcp         # a second to load
        self.wait()
        folder = Path(out_dir) / f'step{step:06d}'
        temporary = folder.with_name(f'.{folder.name}.tmp')
        state = {'step': step, 'ranks': gather(place)[::cp], 'random': gather(random), 'moved': moved(optimizers),
                 'settings': {k: repr(v) for k, v in settings.items()}}
        tensors = copy_tensors(model, keep=not rank)
        shards = dcp.async_save(moments(model, optimizers), checkpoint_id=temporary / 'train_state',
                                process_group=self.group, no_dist=world_size == 1)

        def finish():
            shards.result()
            if not rank:
                write_model(model.config, tensors, temporary)
                processor.save(temporary)
                torch.save(state, temporary / 'train_state' / 'state.pt')
                publish(temporary, folder)
                if remote:
                    upload(folder)
        self.writing, self.step = self.worker.submit(finish), step

    def wait(self):
        """Until the last checkpoint is written; True if it could not be, which is told: training goes on."""
        if not self.writing:
            return False
        from torch.distributed.checkpoint.api import CheckpointException
        try:
            self.writing.result()
        except (Exception, CheckpointException) as e:      # a full disk above all; whatever it is, the run is worth more
            if isinstance(e, CheckpointException):
                e = next(iter(e.failures.values()))[0]
            tqdm.write(f"error: the checkpoint of step {self.step} could not be written ({e}); the last good one is "
                       f"{newest(out_dir)}. Training goes on.")
            shutil.rmtree(Path(out_dir) / f'.step{self.step:06d}.tmp', ignore_errors=True)
            return True
        finally:
            self.writing = None
        return False


def flush(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary, folder):
    """Makes a written checkpoint the newest one and removes those that are too many."""
    files = [path for path in sorted(temporary.rglob('*')) if path.is_file()]
    sums = {str(path.relative_to(temporary)): [path.stat().st_size, checksum(path)] for path in files}
    (temporary / 'train_state' / 'files.json').write_text(json.dumps(sums, indent=1))
    for path in [*temporary.rglob('*'), temporary]:
        flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    latest = folder.with_name('.latest.tmp')
    latest.write_text(folder.name + '\n')
    latest.replace(folder.with_name('latest'))
    flush(folder.parent)
    for old in sorted(folder.parent.glob('step*[0-9]'))[:-keep] if keep else []:
        shutil.rmtree(old)


def checksum(path):
    crc = 0
    with open(path, 'rb') as f:
        while piece := f.read(2 ** 24):
            crc = zlib.crc32(piece, crc)
    return crc


def damage(folder):
    """What is wrong with a checkpoint's files, or None: sizes and check sums of when they were written."""
    try:
        sums = json.loads((folder / 'train_state' / 'files.json').read_text())
        for name, (size, crc) in sums.items():
            if (folder / name).stat().st_size != size or checksum(folder / name) != crc:
                return f'{name} is not as it was written'
    except (OSError, ValueError) as e:
        return str(e)


def upload(folder):
    """Copies a checkpoint and the logs to the URL; its files.json last, which says that the others are there."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        there, index = f'{root}/{folder.name}', 'train_state/files.json'
        names = list(json.loads((folder / index).read_text()))
        fs.makedirs(f'{there}/train_state', exist_ok=True)
        fs.put([str(folder / name) for name in names], [f'{there}/{name}' for name in names])
        fs.put_file(str(folder / index), f'{there}/{index}')
        for name in ('metrics.jsonl', 'skipped.jsonl', 'latest'):
            fs.put_file(str(folder.parent / name), f'{root}/{name}')
        for old in sorted(fs.glob(f'{root}/step*'))[:-keep] if keep else []:
            fs.rm(old, recursive=True)
    except Exception as e:                   # whatever a file system somewhere else may raise
        raise OSError(f'{folder} is whole, but could not be copied to {remote}: {e}') from e


def fetch():
    """Brings the newest whole checkpoint at the URL to a machine that has none or an older one, or the other way round."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        fs.makedirs(root, exist_ok=True)
        listed = sorted(fs.glob(f'{root}/step*/train_state/files.json'), reverse=True)
        here, last = Path(out_dir), newest(out_dir)
        has = last.name if last != here else ''
        if has and not any(f'/{has}/' in path for path in listed) and not damage(last):
            upload(last)
        for path in listed:
            folder, there = here / path.split('/')[-3], path.removesuffix('/train_state/files.json')
            if folder.name <= has:
                return
            names = [name for name in json.loads(fs.cat_file(path)) if '..' not in name and not name.startswith('/')]
            (folder / 'train_state').mkdir(parents=True, exist_ok=True)
            fs.get([f'{there}/{name}' for name in names], [str(folder / name) for name in names])
            fs.get_file(path, str(folder / 'train_state' / 'files.json'))
            if not (wrong := damage(folder)):
                for name in ('metrics.jsonl', 'skipped.jsonl'):
                    fs.get_file(f'{root}/{name}', str(here / name))
                (here / 'latest').write_text(folder.name + '\n')
                return
            print(f'WARNING: {there} is damaged ({wrong}); trying the one before')
            shutil.rmtree(folder)
    except Exception as e:
        raise UserError(f"out_dir = '{remote}': {e}") from e


def find_checkpoint():
    """The folder that out_dir/latest names, or the newest before it that is whole; None for a new run."""
    if remote:
        fetch()
    latest = Path(out_dir) / 'latest'
    if not latest.exists():
        return None
    name = latest.read_text().strip()
    for folder in sorted((f for f in Path(out_dir).glob('step*[0-9]') if f.name <= name), reverse=True):
        if not (wrong := damage(folder)):
            return folder
        print(f'WARNING: {folder} is damaged ({wrong}); trying the one before')
    raise UserError(f"no checkpoint in {out_dir} is whole. Start a new run: another out_dir, or remove this one")


def moved(optimizers):
    """What is trained by which optimiser, to compare."""
    return [(type(opt).__name__, opt.param_groups[0]['part'], len(opt.param_groups[0]['params'])) for opt in optimizers]


def room_for_moment(p, size):
    """Zeros for what an optimiser keeps of parameter p: a moment of its shape, or the number of its steps. On p's device,
    because fused AdamW reads both in the kernel that changes p."""
    if size == p.shape:
        return torch.zeros_like(p)
    return torch.zeros(size, device=p.device)


def random_state(dev):
    """The states of the random generators that training draws from: dropout draws on the device."""
    state = {'cpu': torch.get_rng_state()}
    if dev.type == 'cuda':
        state['cuda'] = torch.cuda.get_rng_state(dev)
    return state


def set_random_state(state, dev):
    torch.set_rng_state(state['cpu'])
    if dev.type == 'cuda' and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'], dev)


def load_state(folder, model, optimizers, rows, dev):
    """Restores moments and random state; returns (step, this rank's loader state, its scaling). Another number of ranks
    than before shares out the rows that are still to come."""
    import torch.distributed.checkpoint as dcp
    state = torch.load(folder / 'train_state' / 'state.pt', weights_only=True, map_location='cpu')
    if state['moved'] != moved(optimizers):
        raise UserError(f"{folder} was trained with other parts or another optimizer. Set train_vision, train_connector, "
                        f"train_language, train_embedding and optimizer as they were, or start a new run: another "
                        f"out_dir with --init_from={folder}")
    names = dict(model.named_parameters())
    optimizer_of = {p: opt for opt in optimizers for p in opt.param_groups[0]['params']}
    stored = dcp.FileSystemReader(folder / 'train_state').read_metadata().state_dict_metadata
    for name, what in stored.items():
        name, _, key = name.rpartition('.')
        p = names[name]
        optimizer_of[p].state[p][key] = room_for_moment(p, what.size)
    dcp.load(moments(model, optimizers), checkpoint_id=folder / 'train_state', no_dist=world_size == 1)
    places = state['ranks']
    if len(state.get('random', ())) == world_size:
        set_random_state(state['random'][rank], dev)
    loader = deal_out([place['loader'] for place in places], world_size // cp, rows)[rank // cp]
    ignored = ('max_steps', 'out_dir', 'dry_run', 'log_interval', 'save_interval', 'eval_interval', 'eval_answers', 'keep')
    for key, value in settings.items():
        if key not in ignored and (before := state['settings'].get(key, repr(value))) != repr(value):
            print(f"note: {key} was {before} in this run's checkpoint and is {value!r} now")
    return state['step'], loader, places[0]['scaling']


# ---------------------------------------------------------------------------------------------------------------------

def plan(dev, amp, checkpoint):
    """--dry_run: the resolved settings, the plan, and what is missing for it; neither weights nor data are needed."""
    print('\n'.join(f'{k} = {v!r}' for k, v in settings.items()) + '\n')
    missing = [Path(data_dir) / name / 'train.jsonl' for name in mixture_sets(mixture)]
    folders = [init_from] if init_from else [vision_weights, language_weights, tokenizer]
    missing += [Path(folder) for folder in folders if folder]
    print_plan(planned_model(settings, checkpoint), dev, amp, checkpoint)
    missing = [path for path in missing if not path.exists()]
    print('\n'.join(f'missing: {path}' for path in missing) or 'nothing is missing')


def print_plan(model, dev, amp, checkpoint):
    """What was decided, once, before the long silence."""
    print('\n'.join(part_table(model)))
    rows = batch_size * accumulation * world_size // cp
    print('\n'.join(mixture_table(mixture, data_dir, max_steps * rows)))
    if packing:
        print('  (draws as if a row held one example; python data.py with this config counts how many it holds)')
    print(f"steps {max_steps:,} of {rows} rows = {batch_size} x {accumulation} micro-batches"
          + (f" x {world_size // cp} processes" if world_size > 1 else '')
          + (f", each with {cp - 1} more that share its rows" if cp > 1 else '') + ", at most "
          f"{rows * seq_len:,} tokens a step, {rows * max_steps:,} rows in all")
    shards = {'ddp': 1, 'hsdp': local_world_size}.get(parallel, world_size)
    patches = full_row_patches(settings)
    memory = memory_estimate(model, batch_size, seq_len, recompute, amp, patches, shards, cp, compile)
    print('memory of full rows on CUDA, estimated: ' + ', '.join(f'{k} {v / 1e9:.2f} GB' for k, v in memory.items()))
    if dev.type == 'cuda':
        print('on this GPU: ' + fits(memory['total'], torch.cuda.get_device_properties(dev).total_memory))
    elif dry_run:
        print('on a GPU of 80 GB: ' + fits(memory['total'], 80e9))
    print(f"device {dev} with {torch.get_num_threads()} threads, {str(amp)[6:]}; rows with branches: "
          + ('FlexAttention block mask' if dev.type == 'cuda' else
             'SDPA with a dense mask' if model.config.recipe == 'molmo2' else 'attention by segments'))
    native = layout(model.config)
    print(f"checkpoints in {out_dir} open in transformers as {native}" if native else
          f"checkpoints in {out_dir} open here only: no native architecture expresses recipe '{recipe}' "
          f"with connector '{connector}' and a {model.config.vision.style} tower")
    if native and native != 'molmo2' and image_size != model.config.vision.image_size:
        print(f"note: pictures of {image_size} px on a position table of {model.config.vision.image_size} px: "
              f"transformers needs interpolate_pos_encoding=True to do the same")
    print(f"resuming from {checkpoint}" if checkpoint else f"starting from {init_from or 'new weights'}")
    print(f"ln(vocabulary) = {math.log(model.config.language.vocab_size):.3f}: the loss of a model that knows nothing",
          flush=True)


class Log:
    """metrics.jsonl always; TensorBoard and Weights & Biases if asked for. Steps are flushed in groups, so that
    reading the losses does not make the device wait every step."""

    def __init__(self, step):
        self.pending, self.board, self.wandb = [], None, None
        path = Path(os.devnull) if rank else Path(out_dir) / 'metrics.jsonl'
        if path.is_file():                   # steps after the checkpoint are taken again; a kill may cut a line in two
            lines = [line for line in path.read_text().splitlines() if line.endswith('}')]
            temporary = path.with_suffix('.tmp')
            temporary.write_text(''.join(f'{line}\n' for line in lines if json.loads(line)['step'] <= step))
            temporary.replace(path)
        self.file = open(path, 'a')
        try:
            if tensorboard and not rank:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out_dir)
            if wandb_project and not rank:
                import wandb
                self.wandb = wandb.init(project=wandb_project, config=settings, name=Path(out_dir).name)
        except ImportError as e:
            raise UserError(f"{e}: install it, or leave tensorboard and wandb_project alone") from None

    def add(self, record):
        self.pending.append(record)

    def flush(self):
        """Writes what is pending; returns the last record as plain numbers."""
        for record in self.pending:
            sums = record.pop('sums', None)
            record = {k: v.item() if torch.is_tensor(v) else v for k, v in record.items()}
            record.update(task_losses(sums) if sums is not None else {})
            self.file.write(json.dumps(record) + '\n')
            if self.board:
                for k, v in record.items():
                    self.board.add_scalar(k, v, record['step'])
            if self.wandb:
                self.wandb.log(record, step=record['step'])
        self.pending = []
        self.file.flush()
        return record


def main():
    """Set up, then the loop."""
    dev = start(pick_device(device), threads)
    if dev.type == 'cpu':
        keep_freed_memory()
    torch.manual_seed(seed + rank)           # of dropout; weights and data have generators of their own
    amp = pick_dtype(dtype, dev)
    autocast = torch.autocast(dev.type, amp) if amp != torch.float32 else nullcontext()
    checkpoint = from_rank_0(find_checkpoint)
    if dry_run:
        return plan(dev, amp, checkpoint)
    train_mixture = open_mixture(mixture, data_dir, seed)
    model, processor = build(checkpoint, dev, amp)
    print_plan(model, dev, amp, checkpoint)
    model.train()
    optimizers = make_optimizers(model)
    step, loader_state, scaling = 0, None, [2. ** 12, 0.]
    if checkpoint:
        step, loader_state, scaling = load_state(checkpoint, model, optimizers, train_mixture, dev)
    scaling = torch.tensor(scaling, device=dev)
    if compile:
        compile_blocks(model, memory_budget)
    trained = distribute(model)

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for stray in Path(out_dir).glob('.step*.tmp') if not rank else ():      # a save that was cut off
        shutil.rmtree(stray)
    if world_size > 1:
        dist.barrier()
    log, saver, watchdog = Log(step), Saver(), Watchdog(hang_after)
    skipped = open(Path(out_dir) / 'skipped.jsonl', 'a')

    def report(problem):
        if not skipped.tell() or sum(loader.state['skipped'].values()) <= 5:
            tqdm.write(f"skipped {problem['row']}: {problem['problem']}")
        skipped.write(json.dumps(problem) + '\n')
        skipped.flush()

    def make_loader(split, state=None):
        chosen = train_mixture
        if split == 'validation':            # at the same rates, of the datasets that have one
            held = [(Dataset(d.folder, split), rate) for d, rate in zip(chosen.datasets, chosen.rates)
                    if (d.folder / f'{split}.jsonl').is_file()]
            if not held:
                return None
            chosen = Mixture(*zip(*held), seed)
        return Loader(chosen, processor, batch_size, num_workers if split == 'train' else 0, state,
                      seq_len if static_shapes or packing else 0, max_bad_fraction,
                      report if split == 'train' and rank % cp == 0 else None, packing, rank // cp, world_size // cp)

    loader = make_loader('train', loader_state)
    held_out = eval_interval and make_loader('validation')
    if eval_interval and not held_out:
        print(f'no dataset has a validation.jsonl in {data_dir}: no validation loss')
    batches = iter(loader)
    if cp > 1:                               # a group of its own: a thread uses it
        batches = pieces(batches, dist.new_subgroups(cp, backend='gloo')[0])
    batches = prefetch(batches, dev)
    stop, stopping = [], False                             # a signal asks; the loop answers after the step
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(sig, lambda *_: stop.append(True))
    peak = peak_flops(dev)
    nonfinite = torch.zeros(2, device=dev)                 # in a row, in all
    bar = tqdm(total=max_steps, initial=step, unit='step', disable=True if rank else None)
    started = clock = time.perf_counter()

    profiler = torch.profiler.profile() if profile_steps else None
    while step < max_steps and not stopping:
        if profiler and step == profile_steps[0] - 1:
            profiler.start()
        waiting = time.perf_counter()
        watchdog.at(f'reading rows for step {step + 1}')
        micros = []
        for _ in range(accumulation):
            batch, loader_state = next(batches)
            micros.append(batch)
        waited = time.perf_counter() - waiting
        watchdog.at(f'in step {step + 1}', [r for m in micros for r in m['rows']])
        scale = scaling[0] if amp == torch.float16 else 1.
        loss, sums = backward(model, trained, micros, autocast, scale)
        norm, bad = step_optimizers(optimizers, step, scale)
        if amp == torch.float16:
            scaling = next_scale(scaling, bad)
        nonfinite = torch.stack([(nonfinite[0] + 1) * bad, nonfinite[1] + bad])
        step += 1
        tokens, loss_tokens, visual_tokens, operations, bad_rows, stopping = sum_over_ranks(torch.tensor([
            sum(m['n_tokens'] for m in micros), sum(len(m['loss_index']) for m in micros),
            sum(len(m.get('visual_index', ())) for m in micros), sum(flops(model, m) for m in micros),
            sum(loader_state['skipped'].values()) / cp, len(stop)], dtype=torch.float64)).tolist()

        if profiler and step == profile_steps[1]:
            profiler.stop()
            profiler.export_chrome_trace(str(Path(out_dir) / f'trace-rank{rank}.json'))

        # -- keep track
        now = time.perf_counter()
        seconds, clock = now - clock, now
        record = {'step': step, 'loss': loss, 'sums': sums, 'lr': learning_rate * get_lr_scale(step - 1, warmup_steps),
                  'grad_norm': norm, 'nonfinite': nonfinite[1], 'seconds': seconds, 'data_wait': waited,
                  'minutes': (now - started) / 60, 'tokens': int(tokens), 'loss_tokens': int(loss_tokens),
                  'visual_tokens': int(visual_tokens), 'tokens_per_second': tokens / seconds, 'skipped': int(bad_rows),
                  'tflops': operations / seconds / 1e12}
        if peak:
            record['mfu'] = operations / seconds / peak / world_size
        if dev.type == 'cuda':
            record['memory_gb'] = torch.cuda.max_memory_allocated() / 1e9
        log.add(record)
        bar.update()
        saving = step % save_interval == 0 or step == max_steps or stopping
        if step % log_interval == 0 or saving:
            last = log.flush()
            bar.set_postfix_str(f"loss {last['loss']:.3f} | {last['tokens_per_second']:,.0f} tok/s | "
                                f"data {100 * waited / seconds:.0f}%")
            if bar.disable and step % (10 * log_interval) == 0:
                print(f"step {step}: loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s, waited "
                      f"{waited:.3f} s of {seconds:.3f} for data", flush=True)
            if nonfinite[0] >= max_nonfinite:
                rows = sum(gather([r for m in micros for r in m['rows']]), [])
                if not rank:
                    (Path(out_dir) / 'nonfinite_rows.json').write_text(json.dumps(rows))
                raise UserError(f"{int(nonfinite[0])} steps in a row had a gradient that was not finite; the weights "
                                f"are those of before. Lower learning_rate or use dtype = 'float32'; the last step's "
                                f"rows are in {out_dir}/nonfinite_rows.json")
        if held_out and (step % eval_interval == 0 or step == max_steps):
            watchdog.at('at the validation sets')
            result = evaluate(model, make_loader, dev, autocast)
            tqdm.write(f'step {step}: validation ' + ', '.join(f'{k} {v:.3f}' for k, v in result.items()))
            if eval_answers:
                watchdog.at('answering the validation sets')
                scores = ask(model, processor, held_out.rows.mixture.datasets, autocast)
                tqdm.write(table(scores))
                result |= {f"{s['dataset']}/{s['task']}/{s['metric']}": s['score'] for s in scores}
            log.add({'step': step, **{f'validation/{k}': v for k, v in result.items()}})
            log.flush()
            clock = time.perf_counter()
        if saving:
            watchdog.at('copying the checkpoint')
            place = {'loader': loader_state, 'scaling': scaling.tolist()}
            saver.save(step, model, processor, optimizers, place, random_state(dev))
            clock = time.perf_counter()
    watchdog.at('writing the last checkpoint')
    lost = saver.wait()
    watchdog.over.set()
    bar.close()
    print(f"{'stopped' if stopping else 'done'} at step {step} after {(time.perf_counter() - started) / 60:.1f} minutes; "
          f"{out_dir}/step{step:06d}" if step else 'nothing to do')
    if lost:
        raise UserError(f"the last checkpoint could not be written. Make room and run this again: it goes on from "
                        f"{newest(out_dir)}")
    every = gather(loader_state['skipped'] if loader_state else {})[::cp]
    if all_skipped := sum(map(Counter, every), Counter()):
        print('rows skipped: ' + ', '.join(f'{k} {n}' for k, n in all_skipped.items()) + f'; see {out_dir}/skipped.jsonl')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
    if world_size > 1:
        dist.destroy_process_group()         # not before main's wrapper is gone: it hangs
