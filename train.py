"""Train a VLM: one loop for every stage and every size.

Reads downwards: the settings; the model and its optimizers; one step (`forward_backward`,
`step_optimizers`); batches; validation; what is logged; and last `main`, which sets up and loops.

    python train.py config/demo_stage1.py                     a laptop
    python train.py config/stage1.py                          one GPU; --dry_run shows the plan
    torchrun --nproc-per-node=8 train.py config/stage1.py     eight GPUs, a copy of the model on each

Ctrl-C or SIGTERM saves and exits; the same command continues, bit for bit.

What lands in out_dir: step001000/ (a checkpoint that is a model: config.json, model.safetensors,
tokenizer, and train_state/ to resume), latest, metrics.jsonl, skipped.jsonl, learning.html.
"""
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from queue import Queue

# -- what is trained
out_dir = 'out/stage1'         # or a URL, s3://bucket/run: written to out/s3/bucket/run, then copied (fsspec)
init_from = ''              # checkpoint folder to start from; '' builds a model from the next lines
recipe = 'nano'                # nano | molmo2 (model.py, Config)
vision = 'openai/clip-vit-large-patch14-336'   # a name in model.py's table, or a dict of sizes
language = 'Qwen/Qwen3-0.6B'   # likewise
connector = 'linear'           # linear | mlp | molmo2
pooling = 2                    # a visual token pools pooling x pooling patches of a picture
vision_weights = ''            # folder with the tower's safetensors; '' starts it at random
language_weights = ''          # folder with the decoder's safetensors; '' starts it at random
tokenizer = ''            # folder with tokenizer.json; '' takes language_weights'; 'bytes': a token for each
#                                byte. With init_from it is that checkpoint's
train_vision = False           # parts that are not trained cost no gradients and no optimizer state
train_connector = True
train_language = True
train_embedding = True      # False freezes the table of token embeddings, and with it a tied output
residual_dropout = 0.0         # share of what each decoder block adds that is dropped
# -- data
data_dir = 'data'
mixture = {}                 # {folder under data_dir: rate, ..}, or groups (data.py, mixture_rates)
datasets = {}                # {name in mixture: Python object instead of a folder} (data.py, Records)
image_size = 336               # pixels per side, after resizing
video_size = 224               # pixels per side of a frame
video_pooling = 4              # a visual token of a frame pools so many patches per side
max_frames = 128               # most frames per clip; if fps gives more, this many, evenly spaced
fps = 2.0
seq_len = 4096                 # most tokens per row
batch_size = 32                # rows per micro-batch and process
accumulation = 1               # micro-batches per step (gradient accumulation)
num_workers = 2                # processes that decode and tokenise; 0 does it between the steps
packing = False               # fill rows of exactly seq_len with several examples; else one per row
static_shapes = False          # pad every row to seq_len, which spares torch.compile new shapes
point_format = 'point'         # point | molmo2 (data.py, format_points)
point_digits = 3               # decimals of a coordinate in the point format
# What each token of an answer weighs in the loss (data.py, Processor.answer_weight)
task_weights = {'captioning': 1.0, 'qa': 1.0, 'counting': 1.5, 'pointing': 2.0, 'tracking': 2.0}
length_weighting = False       # divide by sqrt(tokens of the answer)
branch_weighting = False       # divide by sqrt(conversations of the record)
z_loss = 0.0                # weight of log(sum of exp(logits))^2 in the loss (model.py, plain_loss)
max_bad_fraction = 0.1         # stop when a larger share of the records cannot be used
# -- optimizer
optimizer = 'adamw'            # adamw | muon (Muon for all matrices but tables, AdamW for the rest)
learning_rate = 1e-4           # of the language part
vision_learning_rate = 0.0     # 0: learning_rate
connector_learning_rate = 0.0  # 0: learning_rate
muon_learning_rate = 0.0       # of all that Muon trains; 0: learning_rate
beta1 = 0.9
beta2 = 0.95
epsilon = 1e-8
weight_decay = 0.0
grad_clip = 1.0                # largest norm of the gradient; 0 does not clip
clip_parts = False             # clip vision, connector and language each by its own norm
schedule = 'cosine'            # cosine | linear | constant | inverse_sqrt, after the warm-up
warmup_steps = 2000
vision_warmup_steps = 0        # 0: warmup_steps
connector_warmup_steps = 0     # 0: warmup_steps
max_steps = 100000
min_lr_ratio = 0.1             # where cosine and linear end, as a share of the peak
max_nonfinite = 10             # stop after so many steps in a row whose gradient was not finite
# -- machine
device = 'auto'                # auto | cuda | mps | cpu
dtype = 'auto'                # auto | bfloat16 | float16 | float32: dtype of matrix products (mixed
#                                precision); with float16 the loss is scaled
master_dtype = 'float32'     # of weights, gradients and moments; bfloat16 takes half the memory and
#                                loses small updates
parallel = 'ddp'          # ddp | fsdp | hsdp: how several processes share the weights (parallel.py)
cp = 1                         # context (sequence) parallelism: so many ranks share each row
reshard = True                 # fsdp, hsdp: free gathered weights after a block's forward pass
#                                (FULL_SHARD); False keeps them for its backward pass (SHARD_GRAD_OP)
offload = False                # fsdp, hsdp: keep weights, gradients and moments in the CPU's memory
threads = 0              # CPU threads of torch; 0: the cores, shared among this machine's processes
compile = False                # compile blocks by torch.compile
fast = True                   # faster forms in extra/kernels.py; False: the plain forms in model.py
recompute = 0                # activation (gradient) checkpointing: the backward pass computes every
#                                n-th block again, so its activations need not be kept; 0: none
memory_budget = 1.0            # with compile: the share of a block's activations that is kept
seed = 1337
# -- keeping track
log_interval = 10              # steps between reads of the device; metrics.jsonl has every step
eval_interval = 1000           # steps between validations; 0 never
eval_batches = 20              # per validation
eval_answers = 0               # records per validation set to answer and score at each validation
show_interval = 0              # steps between answers about one held-out picture, on the screen and in
#                                out_dir/learning.html; 0 never
save_interval = 5000
keep = 3                       # checkpoints kept; 0 keeps all
hang_after = 300               # seconds without progress after which each process says where it is
profile_steps = ()             # (first, last): trace these steps to out_dir/trace-rank0.json
tensorboard = False            # if installed
wandb_project = ''             # if installed
dry_run = False                # print the plan and stop


if __name__ == '__main__':
    from configurator import configure
    # Before torch loads, so that a typo is answered at once. When this file is imported, its globals
    # are the defaults, and who calls its functions sets `settings` (bench.py, tests).
    settings = configure(globals())

remote = out_dir if '://' in out_dir else ''
if remote:
    out_dir = f"out/{remote.replace('://', '/')}"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configurator import UserError  # noqa: E402
from data import TASKS, Loader, Mixture, open_mixture  # noqa: E402
from extra.hf import is_released, load_weights, make_processor, newest, saved_settings  # noqa: E402
from model import VLM, full_tensor, pick_device, pick_dtype  # noqa: E402
# rank and world_size come from torchrun's environment, so they are right before `start` joins the ranks
from parallel import (Watchdog, cp_batches, from_rank_0, gather_objects, local_world_size, make_cp_group, rank,  # noqa: E402
                      shard, split_batch, start, sum_numbers, sum_over_ranks, world_size)

warnings.filterwarnings('ignore', message='torch.distributed is disabled')      # checkpoints of a run of one process


# --------------------------------------------------------------------------------------------------
# The model and its optimizers

def source_from_checkpoint(source):
    """(Config, Processor) of a checkpoint folder to start from."""
    processor, config = make_processor({**settings, 'init_from': source})
    before = {}
    if not is_released(source):              # the sizes of a released Molmo2 are its own
        before = saved_settings(source, config)
    for name in ('image_size', 'pooling', 'video_size', 'video_pooling', 'point_format', 'point_digits'):
        if name in before and before[name] != getattr(processor, name):
            print(f'note: {name} is {before[name]!r} in {source} and {getattr(processor, name)!r} now')
    return config, processor


def check_settings():
    """One line for settings that do not go together."""
    if parallel not in ('ddp', 'fsdp', 'hsdp'):
        raise UserError(f"parallel = '{parallel}' is not one of ddp, fsdp, hsdp")
    if eval_answers and world_size > 1 and (parallel != 'ddp' or cp > 1):
        raise UserError("eval_answers needs all the weights and whole rows on each process: "
                        "parallel = 'ddp' and cp = 1. Else set it to 0 and give the checkpoints to eval.py")


def finished_run(path):
    """newest(path), where a run's folder means the run's end. UserError if the run was stopped before
    it, because in a sequence of stages the next one would start too early."""
    from extra.checkpoint import unfinished_steps
    source = newest(path)
    steps = unfinished_steps(source) if source != Path(path) else None
    if steps:
        raise UserError(f'{path} is not at its end, step {steps[0]} of max_steps = {steps[1]}: go on with it, or name '
                        f'the checkpoint itself, --init_from={source}')
    return source


def build(checkpoint, dev, compute_dtype):
    """The model with its first weights, sharded as `parallel` says, and the processor: from a
    checkpoint of this run, from init_from, or new. Each rank reads or draws only the weights that
    it holds. compute_dtype: of matrix products."""
    source = checkpoint
    if not source and init_from:
        source = finished_run(init_from)
    if source:
        config, processor = source_from_checkpoint(source)
    else:
        processor, config = make_processor({**settings, 'init_from': ''})
    check_settings()
    # Built without memory first (meta device), because before it is sharded a model may not fit
    with torch.device('meta'):
        model = VLM(config, fast).to(pick_dtype(master_dtype, dev))
    apply_training_settings(model)
    if parallel != 'ddp' and world_size > 1:
        # On a CPU weights travel in float32, because its LayerNorm takes no narrower weight than its
        # input
        is_narrow = compute_dtype != torch.float32 and dev.type != 'cpu'
        block_dtype = compute_dtype if is_narrow else None
        shard(model, parallel == 'hsdp', block_dtype, reshard, offload)
    model.to_empty(device='cpu' if offload else dev)
    if offload and not train_vision:
        model.vision_tower.to_empty(device=dev)      # a frozen tower is not sharded nor offloaded
    model.set_buffers(dev)
    if source:
        load_weights(model, source)
        return model, processor
    for name, folder in (('vision_weights', vision_weights), ('language_weights', language_weights)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{name}: {folder} does not exist; python prepare/weights.py fetches released weights, "
                            "python prepare/tower.py trains the demo's tower")
    model.init_weights(seed)
    if vision_weights:
        load_weights(model, vision_weights, only='vision_tower.')
    if language_weights:
        load_weights(model, language_weights, only=('language_model.', 'lm_head.'))
    return model, processor


def apply_training_settings(model):
    """Which parts are trained, activation checkpointing, dropout."""
    model.set_trained(settings)
    model.vision_tower.recompute_every = recompute
    model.language_model.recompute_every = recompute
    model.language_model.dropout = residual_dropout
    return model


def get_lr_scale(step, warmup):
    """The learning-rate schedule: the share of the peak rate at `step`, counted from 0, of a part
    that warms up for `warmup` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1, (step - warmup) / max(1, max_steps - warmup))
    if schedule == 'constant':
        return 1.
    if schedule == 'inverse_sqrt':
        return (max(1, warmup) / (step + 1)) ** .5
    decay = 1 - progress                     # linear
    if schedule == 'cosine':
        decay = (1 + math.cos(math.pi * progress)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * decay


def make_optimizers(model):
    """An AdamW for each part that is trained and, with optimizer = 'muon', a Muon for its matrices.

    Muon is for matrices that map one vector to another. Tables, of which rows are looked up, stay
    with AdamW, and so do norms and biases. step_optimizers sets the learning rates before each
    step.
    """
    rates = {'vision': vision_learning_rate, 'connector': connector_learning_rate,
             'language': learning_rate}
    warmups = {'vision': vision_warmup_steps, 'connector': connector_warmup_steps,
               'language': warmup_steps}
    tables = ('embed_tokens', 'position_embedding', 'lm_head')
    matrices = set()
    for name, p in model.named_parameters():
        if p.ndim == 2 and not any(table in name for table in tables):
            matrices.add(p)
    optimizers = []
    for part, parameters in model.parts().items():
        by_adamw, by_muon = [], []
        for p in parameters:
            if p.requires_grad:
                chosen = by_muon if optimizer == 'muon' and p in matrices else by_adamw
                chosen.append(p)
        common = {'part': part, 'warmup': warmups[part] or warmup_steps}
        if by_adamw:
            group = {'params': by_adamw, 'max_lr': rates[part] or learning_rate, **common}
            optimizers.append(torch.optim.AdamW([group], lr=0., betas=(beta1, beta2), eps=epsilon,
                                                weight_decay=weight_decay, fused=True))
        if by_muon:
            group = {'params': by_muon, 'max_lr': muon_learning_rate or learning_rate, **common}
            optimizers.append(torch.optim.Muon([group], lr=0., weight_decay=weight_decay,
                                               adjust_lr_fn='match_rms_adamw'))
    return optimizers


def distribute(model):
    """What to call for the forward pass instead of the model. DDP adds gradients up over the ranks
    while the backward pass goes on; a sharded model does so by itself."""
    if world_size > 1 and parallel == 'ddp':
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


# --------------------------------------------------------------------------------------------------
# One step

def forward_backward(model, wrapped, micro_batches, autocast, loss_scale=1., cp_group=None):
    """Forward and backward pass over a step's micro-batches (gradient accumulation). Leaves the
    gradients of the step's loss, times `loss_scale`, in the parameters, and returns the loss and
    its `task_sums`, the same on all ranks.

    The loss is one weighted mean over all tokens of all ranks: sum(weight * nll) / sum(weight). The
    mean of the ranks' means is not that: (x1/n1 + x2/n2)/2 != (x1+x2)/(n1+n2). So each rank divides
    by the weight of all ranks, and 1 rank or 8 take the same step with the same rows.

    wrapped: what `distribute` returned. loss_scale: for float16, see update_loss_scale.
    """
    is_ddp = wrapped is not model
    is_sharded = world_size > 1 and parallel != 'ddp'
    my_weight = sum(micro.total_weight for micro in micro_batches)
    total_weight = sum_numbers(weight=my_weight)['weight']
    # DDP and FSDP divide the sum of the ranks' gradients by their number; world_size takes that
    # back
    weight_factor = loss_scale * (world_size / total_weight)
    loss, sums = 0., 0.
    for i, micro in enumerate(micro_batches):
        # Ranks exchange gradients once, with those of the last micro-batch
        is_last = i == len(micro_batches) - 1
        if is_sharded:
            model.set_requires_gradient_sync(is_last)
        with wrapped.no_sync() if is_ddp and not is_last else nullcontext():
            with autocast:
                weighted, nll = wrapped(micro, weight_factor, z_loss, cp_group)
            weighted.backward()
        # Without the two factors it is this rank's part of the mean
        loss = loss + weighted.detach() / (loss_scale * world_size)
        sums = sums + task_sums(nll, micro.loss_tasks)
    return sum_over_ranks(loss), sum_over_ranks(sums)


def gradients_of(opt):
    """The gradients of an optimizer's parameters; a parameter that got none is left out."""
    group = opt.param_groups[0]
    return [p.grad for p in group['params'] if p.grad is not None]


def gradient_norms(optimizers, loss_scale):
    """Returns (norms, total). norms: {part: norm of its gradients} with clip_parts, else {'all':
    total}; total: the norm of all gradients."""
    gradients = {}
    for opt in optimizers:
        part = opt.param_groups[0]['part'] if clip_parts else 'all'
        gradients.setdefault(part, []).extend(gradients_of(opt))
    norms = {}
    for part, tensors in gradients.items():
        if tensors:
            norm = torch.nn.utils.get_total_norm(tensors)
            norms[part] = full_tensor(norm).float() / loss_scale
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms, total


def step_optimizers(optimizers, step, loss_scale=1.):
    """Clips gradients, steps the optimizers, clears gradients. Gradients are those of the loss
    times `loss_scale`; `step` counts from 0. Returns (gradient norm, 1. if it was not finite: then
    nothing was changed).

    With AdamW nothing here waits for the device. Fused AdamW divides gradients by its `grad_scale`
    and leaves weights, moments and step count alone where `found_inf` is set, which is how torch's
    GradScaler talks to it; clipping is part of that division.
    """
    norms, total = gradient_norms(optimizers, loss_scale)
    found_inf = (~torch.isfinite(total)).float()
    for opt in optimizers:
        group = opt.param_groups[0]
        group['lr'] = group['max_lr'] * get_lr_scale(step, group['warmup'])
        # A part that got no gradient at all has no norm of its own
        norm = norms.get(group['part'] if clip_parts else 'all', total)
        divisor = torch.ones_like(norm)
        if grad_clip:
            divisor = (norm / grad_clip).clamp(min=1.)
        divisor = loss_scale * divisor
        if isinstance(opt, torch.optim.AdamW):
            opt.grad_scale = divisor
            opt.found_inf = found_inf
            opt.step()
        elif not found_inf:                  # Muon has no found_inf, so this waits for the device
            gradients = gradients_of(opt)
            if gradients:
                torch._foreach_div_(gradients, divisor)
            opt.step()
        opt.zero_grad(set_to_none=True)
    return total, found_inf


def update_loss_scale(state, found_inf):
    """Loss scaling for float16, which has no numbers below 6e-8: the loss, and so all gradients,
    are computed larger by a factor. state: tensor [factor, good steps with it]. The factor is
    halved when a gradient overflows and doubled after 2,000 steps in which none did (Micikevicius
    et al. 2018, section 3.2). Written without `if`, because that would wait for the device."""
    factor, good_steps = state
    overflowed = found_inf > 0
    good_steps = torch.where(overflowed, 0., good_steps + 1)
    is_due = good_steps >= 2000
    factor = torch.where(overflowed, factor / 2, factor)
    factor = torch.where(is_due, factor * 2, factor)
    good_steps = torch.where(is_due, 0., good_steps)
    return torch.stack([factor, good_steps])


def task_sums(nll, tasks):
    """[2, tasks]: the sum of the cross entropies and the number of tokens of each task."""
    out = torch.zeros(2, len(TASKS), device=nll.device)
    out[0].index_add_(0, tasks, nll.detach())
    out[1].index_add_(0, tasks, torch.ones_like(nll))
    return out


def task_losses(sums):
    """{'loss/pointing': mean cross entropy, ...} of the tasks that had tokens."""
    totals, counts = sums.tolist()
    losses = {}
    for task, total, number in zip(TASKS, totals, counts):
        if number:
            losses[f'loss/{task}'] = total / number
    return losses


# --------------------------------------------------------------------------------------------------
# Batches

class Batches:
    """The training's batches, in this order:

        Loader         reads, tokenises and packs rows; its workers run ahead          data.py
        cp_batches     cuts rows into pieces where ranks share them                    parallel.py
        prefetch       moves batches to the device, two ahead

    `state` is the place in the data after the last batch that was taken.
    """

    def __init__(self, loader, state, dev, watchdog):
        self.state = state
        self.watchdog = watchdog
        batches = iter(loader)
        if cp > 1:
            batches = cp_batches(batches, cp, dist.new_subgroups(cp, backend='gloo')[0])
        self.batches = prefetch(batches, dev)

    def next_step(self, step):
        """The micro-batches of a step, and the seconds that it waited for them."""
        start = time.perf_counter()
        self.watchdog.at(f'reading rows for step {step}')
        micro_batches = []
        for _ in range(accumulation):
            batch, self.state = next(self.batches)
            micro_batches.append(batch)
        self.watchdog.at(f'in step {step}', sources_of(micro_batches))
        return micro_batches, time.perf_counter() - start


def sources_of(micro_batches):
    """(data set, number of the record) of all examples of a step on this rank."""
    return [source for micro in micro_batches for source in micro.sources]


def prefetch(batches, dev):
    """Moves batches to the device from a thread, two ahead, from pinned memory. On a CPU there is
    nothing to move."""
    if dev.type == 'cpu':
        yield from batches
        return
    moved, end = Queue(2), object()

    def move():
        try:
            for batch, state in batches:
                if dev.type == 'cuda':
                    batch = batch.pin_memory()
                moved.put((batch.to(dev), state))
            moved.put(end)
        except BaseException as e:           # raised again in the main thread
            moved.put(e)
    threading.Thread(target=move, daemon=True).start()
    while True:
        item = moved.get()
        if item is end:
            return
        if isinstance(item, BaseException):
            raise item
        yield item


def training_loader(train_mixture, processor, state):
    """The Loader of this rank, which goes on from `state`. Records that cannot be used are named in
    out_dir/skipped.jsonl, and the first five on the screen."""
    skipped_file = open(Path(out_dir) / 'skipped.jsonl', 'a')
    reported = 0

    def report(problem):
        nonlocal reported
        reported += 1
        if reported <= 5:
            tqdm.write(f'skipped {problem.row}: {problem.problem}')
        skipped_file.write(json.dumps(asdict(problem)) + '\n')
        skipped_file.flush()
    is_reader = rank % cp == 0               # of the ranks that share rows the first reads them
    return make_loader(train_mixture, processor, num_workers, state, report if is_reader else None)


def validation_mixture(train_mixture):
    """The validation splits of the data sets that have one, at the same rates; None if none has."""
    held_out_sets, rates = [], []
    for dataset, rate in zip(train_mixture.datasets, train_mixture.rates):
        held_out = dataset.validation()
        if held_out:
            held_out_sets.append(held_out)
            rates.append(rate)
    if not held_out_sets:
        return None
    return Mixture(held_out_sets, rates, seed)


def make_loader(data_mixture, processor, workers=0, state=None, report=None):
    is_static = static_shapes or packing
    return Loader(data_mixture, processor, batch_size, num_workers=workers, state=state,
                  length=seq_len if is_static else 0, max_bad_fraction=max_bad_fraction, report=report,
                  packed=packing, rank=rank // cp, world_size=world_size // cp)


# --------------------------------------------------------------------------------------------------
# Validation

@torch.no_grad()
def validation_loss(model, held_out, processor, dev, autocast, cp_group):
    """Weighted loss, and losses by task, over the first eval_batches of each rank's share of the
    validation sets."""
    model.eval()
    total, weight = 0., 0.
    sums = torch.zeros(2, len(TASKS))
    for batch, _ in itertools.islice(make_loader(held_out, processor), eval_batches):
        if cp > 1:                           # each rank reads whole rows here, because they are few
            batch = split_batch(batch, rank % cp, cp)
        batch = batch.to(dev)
        with autocast:
            loss, nll = model(batch, cp_group=cp_group)
        total += loss.item()
        weight += batch.total_weight
        sums += task_sums(nll, batch.loss_tasks).cpu()
    model.train()
    everywhere = sum_numbers(total=total, weight=weight)
    mean = everywhere['total'] / max(everywhere['weight'], 1e-9)
    return {'loss': mean, **task_losses(sum_over_ranks(sums))}


def score_answers(model, held_out, processor, autocast):
    """[{dataset, task, metric, score, ..}] of the model's answers about the first eval_answers
    records of each validation set, as eval.py scores a checkpoint."""
    from eval import evaluate, summarise
    from extra.engine import unfuse_linears
    from extra.kernels import uncompiled
    model.eval()
    with autocast, uncompiled(model):        # each prompt has a length of its own
        rows, _, _ = evaluate(model, processor, held_out.datasets, eval_answers)
    unfuse_linears(model)                    # generation fuses q, k, v; training wants three matrices
    model.train()
    return summarise(rows)


def validate(step, model, held_out, processor, dev, autocast, cp_group, watchdog):
    """Losses, and scores of answers if asked for, of the validation sets: printed, and returned for
    the log."""
    watchdog.at('at the validation sets')
    result = validation_loss(model, held_out, processor, dev, autocast, cp_group)
    figures = ', '.join(f'{name} {value:.3f}' for name, value in result.items())
    tqdm.write(f'step {step}: validation {figures}')
    if eval_answers:
        from eval import main_scores
        watchdog.at('answering the validation sets')
        scores = score_answers(model, held_out, processor, autocast)
        figures = [f"{s['dataset']}/{s['task']} {s['metric']} {s['score']:.0%}" for s in main_scores(scores)]
        tqdm.write(f"step {step}: answers {', '.join(figures)}")
        for s in scores:
            result[f"{s['dataset']}/{s['task']}/{s['metric']}"] = s['score']
    return {'step': step, **{f'validation/{name}': value for name, value in result.items()}}


def show(step, showcase, model, autocast, monitor, watchdog):
    """Answers about one held-out picture (extra/learning.py): on the screen, in the log, and in
    out_dir/learning.html."""
    watchdog.at('answering about a held-out picture')
    is_sharded = world_size > 1 and parallel != 'ddp'
    if rank == 0 or is_sharded:              # of a sharded model every rank has a part
        with autocast:
            answers = showcase.answer(model)
    if rank == 0:
        for line in showcase.lines(answers):
            tqdm.write(f'step {step}: {line}')
        monitor.add({'step': step, 'about': showcase.where, 'shown': answers})
        showcase.write_page(out_dir)
    monitor.restart_clock()


# --------------------------------------------------------------------------------------------------
# Keeping track

class Log:
    """metrics.jsonl always; TensorBoard and Weights & Biases if asked for. Records are written in
    groups, because reading a loss makes this process wait for the device."""

    def __init__(self, step):
        self.pending = []
        self.board = None
        self.wandb = None
        path = Path(os.devnull) if rank else Path(out_dir) / 'metrics.jsonl'
        if path.is_file():
            self._cut(path, step)
        self.file = open(path, 'a')
        try:
            if tensorboard and not rank:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out_dir)
            if wandb_project and not rank:
                import wandb
                shown = {**settings, 'datasets': list(datasets)}
                self.wandb = wandb.init(project=wandb_project, config=shown, name=Path(out_dir).name)
        except ImportError as e:
            raise UserError(f"{e}: install it, or leave tensorboard and wandb_project alone") from None

    def _cut(self, path, step):
        """Removes the steps after a checkpoint, which are taken again, and a line that a kill has
        cut in two."""
        kept = []
        for line in path.read_text().splitlines():
            if line.endswith('}') and json.loads(line)['step'] <= step:
                kept.append(f'{line}\n')
        temporary = path.with_suffix('.tmp')
        temporary.write_text(''.join(kept))
        temporary.replace(path)

    def add(self, record):
        self.pending.append(record)

    def flush(self):
        """Writes what is pending; returns the last record as plain numbers."""
        for record in self.pending:
            sums = record.pop('sums', None)
            record = {name: value.item() if torch.is_tensor(value) else value for name, value in record.items()}
            if sums is not None:
                record.update(task_losses(sums))
            self.file.write(json.dumps(record) + '\n')
            numbers = {name: value for name, value in record.items() if not isinstance(value, dict)}
            if self.board:
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, record['step'])
            if self.wandb:
                self.wandb.log(numbers, step=record['step'])
        self.pending = []
        self.file.flush()
        return record


class Monitor:
    """What surrounds the steps: the log, the progress bar, counts over all ranks, gradients that
    are not finite, the profiler, and signals that ask to stop. Steps count from 1 here."""

    def __init__(self, step, model, dev):
        from extra.plan import flops, peak_flops     # operations of a step by counting; the device's peak
        self.flops = flops
        self.peak = peak_flops(dev)
        self.model = model
        self.dev = dev
        self.log = Log(step)
        self.first_step = step               # that this start of the run begins with
        self.bar = tqdm(total=max_steps, initial=step, unit='step', disable=True if rank else None)
        self.nonfinite_in_a_row = torch.zeros((), device=dev)
        self.nonfinite_in_all = torch.zeros((), device=dev)
        self.profiler = torch.profiler.profile() if profile_steps else None
        self.signals = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: self.signals.append(True))    # answered after the step
        self.is_stopping = False
        self.started = time.perf_counter()
        self.clock = self.started            # when the last step ended

    def before_step(self, step):
        if self.profiler and step == profile_steps[0]:
            self.profiler.start()

    def after_step(self, step, micro_batches, waited, loss, sums, grad_norm, found_inf, skip_counts):
        """Records a step. skip_counts: {'data set: reason': records that could not be used}."""
        if self.profiler and step == profile_steps[1]:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(Path(out_dir) / f'trace-rank{rank}.json'))
        self.nonfinite_in_a_row = (self.nonfinite_in_a_row + 1) * found_inf
        self.nonfinite_in_all = self.nonfinite_in_all + found_inf
        totals = self.count(micro_batches, skip_counts)
        self.is_stopping = totals['stop'] > 0
        now = time.perf_counter()
        seconds = now - self.clock
        self.clock = now
        record = {
            'step': step, 'loss': loss, 'sums': sums, 'grad_norm': grad_norm,
            'lr': learning_rate * get_lr_scale(step - 1, warmup_steps),
            'nonfinite': self.nonfinite_in_all, 'seconds': seconds, 'data_wait': waited,
            'minutes': (now - self.started) / 60, 'tokens': int(totals['tokens']),
            'loss_tokens': int(totals['loss_tokens']), 'visual_tokens': int(totals['visual_tokens']),
            'tokens_per_second': totals['tokens'] / seconds, 'skipped': int(totals['skipped']),
            'tflops': totals['flops'] / seconds / 1e12}
        if self.peak:
            record['mfu'] = totals['flops'] / seconds / self.peak / world_size
        if self.dev.type == 'cuda':
            record['memory_gb'] = torch.cuda.max_memory_allocated() / 1e9
        self.log.add(record)
        self.bar.update()

    def count(self, micro_batches, skip_counts):
        """Sums over all ranks, in one message: what a step processed, and whether a rank was asked
        to stop, because all must stop after the same step."""
        visual = [micro.visual_index for micro in micro_batches if micro.visual_index is not None]
        return sum_numbers(
            tokens=sum(micro.num_tokens for micro in micro_batches),
            loss_tokens=sum(len(micro.loss_index) for micro in micro_batches),
            visual_tokens=sum(len(index) for index in visual),
            flops=sum(self.flops(self.model, micro) for micro in micro_batches),
            skipped=sum(skip_counts.values()) / cp,      # ranks that share rows have the same count
            stop=len(self.signals))

    def report(self):
        """Writes pending records and shows the last one."""
        last = self.log.flush()
        waited = 100 * last['data_wait'] / last['seconds']
        speed = f"{last['tokens_per_second']:,.0f}"
        self.bar.set_postfix_str(f"loss {last['loss']:.3f} | {speed} tok/s | data {waited:.0f}%")
        if self.bar.disable and last['step'] % (10 * log_interval) == 0:
            print(f"step {last['step']}: loss {last['loss']:.3f}, {speed} tokens/s, waited "
                  f"{last['data_wait']:.3f} s of {last['seconds']:.3f} for data", flush=True)

    def stop_if_nonfinite(self, micro_batches):
        """Ends the run when gradients are no longer finite. Asked only where a step is reported,
        because reading the count makes this process wait for the device."""
        if self.nonfinite_in_a_row < max_nonfinite:
            return
        sources = gather_objects(sources_of(micro_batches))
        if rank == 0:
            path = Path(out_dir) / 'nonfinite_rows.json'
            path.write_text(json.dumps(sum(sources, [])))
        raise UserError(f"{int(self.nonfinite_in_a_row)} steps in a row had a gradient that was not finite; the "
                        f"weights are those of before. Lower learning_rate or use dtype = 'float32'; the last "
                        f"step's rows are in {out_dir}/nonfinite_rows.json")

    def add(self, record):
        """Logs something that is no step, and leaves the time it took out of the next step's."""
        self.log.add(record)
        self.log.flush()
        self.restart_clock()

    def restart_clock(self):
        self.clock = time.perf_counter()

    def close(self, step):
        self.bar.close()
        if step == self.first_step:
            print(f'nothing to do: {out_dir} is at step {step} of {max_steps}')
            return
        minutes = (time.perf_counter() - self.started) / 60
        how = 'stopped' if self.is_stopping else 'done'
        print(f'{how} at step {step} after {minutes:.1f} minutes; {out_dir}/step{step:06d}')


def report_skipped(loader_state):
    """Says how many records of each data set could not be used, and why."""
    mine = loader_state['skipped'] if loader_state else {}
    total = Counter()
    for skip_counts in gather_objects(mine)[::cp]:
        total.update(skip_counts)
    if total:
        reasons = ', '.join(f'{reason} {number}' for reason, number in total.items())
        print(f'rows skipped: {reasons}; see {out_dir}/skipped.jsonl')


# --------------------------------------------------------------------------------------------------
# The run

def is_report_due(step):
    return step % log_interval == 0 or is_save_due(step)


def is_save_due(step):
    return step % save_interval == 0 or step == max_steps


def is_eval_due(step):
    return bool(eval_interval) and (step % eval_interval == 0 or step == max_steps)


def is_show_due(step):
    return bool(show_interval) and (step % show_interval == 0 or step == max_steps)


def print_dry_run(dev, compute_dtype, checkpoint):
    """The settings, the plan, and what is missing for it; neither weights nor data are needed."""
    from extra.plan import planned_model, print_missing, print_plan
    from extra.checkpoint import as_text
    for name, value in as_text(settings).items():
        print(f'{name} = {value}')
    print()
    model = planned_model(settings, checkpoint)
    print_plan(model, settings, dev, compute_dtype, checkpoint, world_size, local_world_size)
    print_missing(settings)


def main():
    from extra.checkpoint import (AsyncCheckpointer, find_checkpoint, load_state, random_state,
                                  remove_unfinished)
    from extra.kernels import compile_blocks, keep_freed_memory
    from extra.learning import Showcase
    from extra.plan import print_plan

    # -- set up
    dev = start(pick_device(device), threads)
    if dev.type == 'cpu':
        keep_freed_memory()
    torch.manual_seed(seed + rank)          # of dropout; weights and data have their own generators
    compute_dtype = pick_dtype(dtype, dev)
    autocast = nullcontext()
    if compute_dtype != torch.float32:
        autocast = torch.autocast(dev.type, compute_dtype)
    checkpoint = from_rank_0(lambda: find_checkpoint(out_dir, remote))
    if dry_run:
        return print_dry_run(dev, compute_dtype, checkpoint)
    train_mixture = open_mixture(settings, data_dir, seed)
    held_out = validation_mixture(train_mixture) if eval_interval or show_interval else None
    if eval_interval and not held_out:
        print('no dataset has a validation split: no validation loss')
    model, processor = build(checkpoint, dev, compute_dtype)
    print_plan(model, settings, dev, compute_dtype, checkpoint, world_size, local_world_size)
    model.train()
    optimizers = make_optimizers(model)
    step, loader_state = 0, None
    scale_state = [2. ** 12, 0.]             # of float16: a few overflows lower it to what fits
    if checkpoint:
        step, loader_state, scale_state = load_state(checkpoint, model, optimizers, train_mixture,
                                                     settings, dev)
    scale_state = torch.tensor(scale_state, device=dev)
    cp_group = make_cp_group(cp, model.config.language.num_heads)
    if compile:
        compile_blocks(model, memory_budget)
    wrapped = distribute(model)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        remove_unfinished(out_dir)
    if world_size > 1:
        dist.barrier()
    checkpointer = AsyncCheckpointer(out_dir, keep, remote)
    watchdog = Watchdog(hang_after)
    monitor = Monitor(step, model, dev)
    showcase = None
    if show_interval:
        showcase = Showcase(held_out, processor)
        if not showcase:
            print('show_interval: no validation set has a picture with a question, so nothing is shown')
    loader = training_loader(train_mixture, processor, loader_state)
    batches = Batches(loader, loader_state, dev, watchdog)

    # -- train; `step` counts the steps that are done
    while step < max_steps and not monitor.is_stopping:
        monitor.before_step(step + 1)
        micro_batches, waited = batches.next_step(step + 1)
        loss_scale = scale_state[0] if compute_dtype == torch.float16 else 1.
        loss, sums = forward_backward(model, wrapped, micro_batches, autocast, loss_scale, cp_group)
        grad_norm, found_inf = step_optimizers(optimizers, step, loss_scale)
        if compute_dtype == torch.float16:
            scale_state = update_loss_scale(scale_state, found_inf)
        step += 1
        monitor.after_step(step, micro_batches, waited, loss, sums, grad_norm, found_inf,
                           batches.state['skipped'])
        if is_report_due(step) or monitor.is_stopping:
            monitor.report()
            monitor.stop_if_nonfinite(micro_batches)
        if held_out and is_eval_due(step):
            record = validate(step, model, held_out, processor, dev, autocast, cp_group, watchdog)
            monitor.add(record)
        if showcase and is_show_due(step):
            show(step, showcase, model, autocast, monitor, watchdog)
        if is_save_due(step) or monitor.is_stopping:
            watchdog.at('copying the checkpoint')
            rank_state = {'loader': batches.state, 'scaling': scale_state.tolist()}
            checkpointer.save(step, model, processor, optimizers, rank_state, random_state(dev),
                              settings, cp)
            monitor.restart_clock()

    # -- finish
    watchdog.at('writing the last checkpoint')
    save_failed = checkpointer.wait()
    watchdog.over.set()
    monitor.close(step)
    if save_failed:
        raise UserError(f"the last checkpoint could not be written. Make room and run this again: it goes on from "
                        f"{newest(out_dir)}")
    report_skipped(batches.state)


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
    if world_size > 1:
        dist.destroy_process_group()      # only now, because destroying it while DDP is alive hangs
