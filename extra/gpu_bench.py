"""`bench.py --gpu`: how fast a GPU runs this code, one line of JSON a finding, the most important
parts first (PARTS, at the end).

A part is a function that calls say(what, name=number, ..) for each finding. Each has its own time,
and when one fails the others go on (extra/timed_parts.py). Sizes are those of config/stage1.py and
config/stage3.py, with random weights and full rows of random tokens and pixels. On a CPU the same
code runs at toy sizes; the figures mean nothing then, but errors are found.

Rates in FLOP/s are the operations that the work needs, by counting, divided by the time, and `mfu`
is such a rate over the device's peak in bfloat16. Times are medians of several runs after a
warm-up, in which also everything is compiled that will be.
"""
import inspect
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

import bench
import model as m
from configurator import configure, train_settings
from model import Batch
from extra.engine import DecodeStep, KVCache, generate
from extra.kernels import BLOCK, FLEX_OPTIONS, LOGITS_CHUNK, ChunkedLoss, block_mask
from extra.plan import flops, peak_flops, planned_model, random_weights

CUDA = torch.cuda.is_available()             # if not, all sizes below are toy sizes
DEVICE = m.pick_device()
DTYPE = torch.bfloat16
ROOT = Path(__file__).parent.parent
TOY = []                     # settings of toy sizes, for a CPU
if not CUDA:
    TOY = [
        "--vision={'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 2, 'num_heads': 2, "
        "'image_size': 56, 'patch_size': 14}",
        "--language={'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 2, 'num_heads': 2, "
        "'num_kv_heads': 1, 'head_dim': 32, 'vocab_size': 2000}",
        '--image_size=56',
        '--video_size=28',
        '--seq_len=512',
        '--max_frames=4',
    ]


def synchronize():
    """Waits for the GPU, whose operations run on while Python goes ahead."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run, repeats=8, warm_up=2):
    """The median time of run(). On a CPU it is run only once, because the figure means nothing."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats if CUDA else 1):
        synchronize()                        # what was started before must not be counted
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def teraflops(operations, ms):
    """The rate, in TFLOP/s, of so many operations in so many milliseconds."""
    return operations / ms / 1e9


def share_of_peak(flops_per_second):
    """Model FLOP/s utilisation, or 0 where the device's peak is not known."""
    peak = peak_flops(DEVICE)
    return flops_per_second / peak if peak else 0.


def settings_of(config, *more):
    """The settings of a config, at toy sizes on a CPU; more: '--key=value', .."""
    return configure(train_settings(), [str(ROOT / config), *TOY, *more])


def relative_difference(x, expected):
    x = x.float()
    expected = expected.float()
    return ((x - expected).norm() / expected.norm()).item()


# --------------------------------------------------------------------------------------------------
# The machine

def machine(say):
    """What the figures belong to, and how fast memory is copied."""
    memory = 0.
    if CUDA:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    say('machine',
        torch=torch.__version__, commit=bench.commit(),
        device=bench.processor(), cores=os.cpu_count(), memory_gb=memory,
        cudnn=torch.backends.cudnn.version() or 0)
    # Larger than all caches, so that the memory itself is measured
    source = torch.empty(2 ** 30 if CUDA else 2 ** 20, device=DEVICE)
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source)) / 1e3
    moved = 2 * source.nbytes                            # read and written
    say('copy', terabytes_a_second=moved / seconds / 1e12)


# Matrix multiplications of Qwen3-0.6B and CLIP-L for 16,384 tokens: (tokens, inputs, outputs)
PRODUCTS = {
    'square of 8192': (8192, 8192, 8192),
    'q, k, v': (16384, 1024, 4096),
    'o': (16384, 2048, 1024),
    'gate, up': (16384, 1024, 6144),
    'down': (16384, 3072, 1024),
    'logits': (4096, 1024, 151936),
    'CLIP q': (16384, 1024, 1024),
}


def products(say):
    """The rates of matrix multiplication at the shapes of PRODUCTS: forward, for the gradient of
    the inputs, and for that of the weights."""
    for name, shape in PRODUCTS.items():
        if not CUDA:
            shape = [min(n, 64) for n in shape]
        # As in a linear layer: its inputs, its weight, and the gradient of its outputs
        rows, inputs, outputs = shape
        x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
        weight = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        grad = torch.randn(rows, outputs, device=DEVICE, dtype=DTYPE)
        operations = 2 * rows * inputs * outputs
        forward = milliseconds(lambda: x @ weight.T)
        for_inputs = milliseconds(lambda: grad @ weight)
        for_weights = milliseconds(lambda: grad.T @ x)
        say('product',
            shape=name,
            forward_tflops=teraflops(operations, forward),
            for_inputs_tflops=teraflops(operations, for_inputs),
            for_weights_tflops=teraflops(operations, for_weights))


# --------------------------------------------------------------------------------------------------
# Attention

def packed_ids(rows, length, long_document=0):
    """Full packed rows: (document_ids [rows, length], branch_ids [rows, length], number of pairs of
    tokens of which one attends to the other). A document is a prefix of 144 tokens, as of a
    picture, and three conversations; the first one has a prefix of `long_document` tokens instead,
    if that is not 0."""
    rng = np.random.default_rng(0)
    documents = np.full((rows, length), -1)
    branches = np.zeros((rows, length), np.int64)
    pairs = 0
    for row in range(rows):
        start = 0
        document = 0
        while start < length:
            prefix = long_document if long_document and document == 0 else 144
            conversations = rng.integers(30, 140, 3)
            for branch, n in enumerate([prefix, *conversations]):
                n = min(int(n), length - start)          # the last document is cut off
                documents[row, start:start + n] = document
                branches[row, start:start + n] = branch
                # A token attends to those before it and to itself, and in a branch to the prefix
                pairs += n * (n + 1) // 2
                if branch:
                    pairs += n * prefix
                start += n
            document += 1
    document_ids = torch.from_numpy(documents).to(DEVICE)
    branch_ids = torch.from_numpy(branches).to(DEVICE)
    return document_ids, branch_ids, pairs


def queries_keys_values(rows, length):
    """Random ones of Qwen3-0.6B's heads, [rows, 16, length, 128] and twice [rows, 8, length, 128].
    In memory the heads of a token lie side by side, as a linear layer leaves them."""
    qkv = []
    for heads in (16, 8, 8):                 # of queries, keys, values
        x = torch.randn(rows, length, heads, 128, device=DEVICE, dtype=DTYPE, requires_grad=True)
        qkv.append(x.transpose(1, 2))
    return qkv


def time_attention(say, name, attend, qkv, pairs, **found):
    """Says the times of attend(), forward alone and with backward, and their rates by the number of
    pairs of tokens that attend to one another. found: what else to say."""
    grad = torch.randn_like(qkv[0])          # of the result, which is as large as the queries

    def forward_and_backward():
        torch.autograd.grad(attend(), qkv, grad)
    start = time.perf_counter()
    try:
        forward_and_backward()
    except RuntimeError as e:
        # This device or this version of torch lacks the kernel; the other kinds are still timed
        say('attention', kind=name, unavailable=str(e)[:200], **found)
        return
    synchronize()
    first = time.perf_counter() - start      # with what is compiled or prepared for this shape
    forward = milliseconds(attend)
    both = milliseconds(forward_and_backward, 5)
    operations = 4 * pairs * 16 * 128        # as in `flops` (extra/plan.py), of one layer
    say('attention',
        kind=name, first_seconds=first, forward_ms=forward, both_ms=both,
        forward_tflops=teraflops(operations, forward),
        both_tflops=teraflops(3 * operations, both),
        **found)


def attention_of_stage1(say):
    """Eight rows of short documents: plain causal attention for comparison, FlexAttention as the
    model uses it and with other options, and trees as sequences of different lengths."""
    rows, length = (8, 4096) if CUDA else (1, 256)       # a micro-batch of config/stage1.py
    documents, branches, pairs = packed_ids(rows, length)
    qkv = queries_keys_values(rows, length)
    shape = f'{rows} x {length}'
    dense_causal(say, qkv, shape)
    if CUDA:                                 # kernels that a CPU lacks
        flex(say, qkv, documents, branches, pairs, shape)
        varlen(say, qkv, documents, branches, pairs, shape)


def attention_of_stage3(say):
    """A row with a long video: FlexAttention, and the video's tokens among themselves by cuDNN with
    the rest by FlexAttention."""
    # A row of config/stage3.py, of which a video takes two thirds
    rows, length, long_document = (1, 36864, 24576) if CUDA else (1, 256, 128)
    documents, branches, pairs = packed_ids(rows, length, long_document)
    qkv = queries_keys_values(rows, length)
    shape = f'{rows} x {length}'
    if CUDA:                                 # kernels that a CPU lacks
        flex(say, qkv, documents, branches, pairs, shape)
        split(say, qkv, documents, branches, pairs, shape, long_document)
    dense_causal(say, qkv, shape)


def dense_causal(say, qkv, shape):
    """The time of plain causal attention over whole rows, by cuDNN and by FlashAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    rows, _, length, _ = qkv[0].shape
    pairs = rows * length * (length + 1) // 2
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def attend(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        # Not available is a finding, too (`time_attention`)
        time_attention(say, f'causal, {backend.name}', attend, qkv, pairs, shape=shape)


def flex(say, qkv, documents, branches, pairs, shape):
    """The time of the block mask, and of FlexAttention as the model uses it."""
    # Compiled anew for this shape, as in a run of its own. When a second shape comes, torch would
    # compile for all shapes.
    torch._dynamo.reset()
    start = time.perf_counter()
    mask = block_mask(documents, branches)
    synchronize()
    first = time.perf_counter() - start
    making = milliseconds(lambda: block_mask(documents, branches))
    say('mask', shape=shape, first_seconds=first, ms=making, sparsity=float(mask.sparsity()))
    time_attention(say, 'FlexAttention', lambda: m.attention(*qkv, mask), qkv, pairs, shape=shape)


def varlen(say, qkv, documents, branches, pairs, shape):
    """Attention of trees by a kernel for sequences of different lengths. The tokens of each prefix,
    and of each branch, are a sequence of queries; the keys of a branch are those of its prefix and
    its own, which are gathered, so that the keys of a prefix are there several times:

        queries   [ prefix ][ branch 1 ][ branch 2 ]
        keys      [ prefix ][ prefix branch 1 ][ prefix branch 2 ]
    """
    from torch.nn.attention.varlen import varlen_attn
    rows, length = documents.shape
    # Document numbers that differ between rows, too, so that rows can be joined
    offset = 1000 * torch.arange(rows, device=DEVICE)
    document = (documents + offset[:, None]).flatten().cpu().numpy()         # [rows x length]
    branch = branches.flatten().cpu().numpy()
    starts = np.flatnonzero(np.diff(document * 16 + branch, prepend=-1))     # of each sequence
    lengths = np.diff(starts, append=len(document))
    prefixes = {}                            # document -> places of its prefix
    keys = []                                # places of the keys of each sequence
    for start, n in zip(starts, lengths):
        own = np.arange(start, start + n)
        if branch[start] == 0:
            prefixes[document[start]] = own
            keys.append(own)
        else:
            prefix = prefixes[document[start]]
            keys.append(np.concatenate([prefix, own]))
    key_lengths = [len(places) for places in keys]
    # Where sequences begin and the last one ends [sequences + 1], as the kernel takes it
    query_ends = torch.tensor(np.append(starts, len(document)), dtype=torch.int32, device=DEVICE)
    key_ends = torch.tensor(np.cumsum([0, *key_lengths]), dtype=torch.int32, device=DEVICE)
    gather = torch.from_numpy(np.concatenate(keys)).to(DEVICE)
    most_queries = int(lengths.max())
    most_keys = max(key_lengths)
    options = {'window_size': (-1, 0)}       # causal: all that is before, nothing after
    # Versions of torch that lack the argument take fewer key heads than query heads without it
    if 'enable_gqa' in inspect.signature(varlen_attn).parameters:
        options['enable_gqa'] = True

    def attend():
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in qkv)   # [tokens, heads, d]
        out = varlen_attn(
            query, key[gather], value[gather],
            query_ends, key_ends, most_queries, most_keys,
            **options,
        )
        return out.unflatten(0, (rows, length)).transpose(1, 2)
    time_attention(say, 'varlen, trees as sequences', attend, qkv, pairs, shape=shape)
    # The fast way must give the same result, or its time says nothing
    mask = block_mask(documents, branches)
    with torch.no_grad():
        difference = relative_difference(attend(), m.attention(*qkv, mask))
    say('varlen beside FlexAttention', difference=difference)


def split(say, qkv, documents, branches, pairs, shape, n):
    """Attention of a row whose first n tokens are the prefix of one document: these attend to one
    another in plain causal attention, by cuDNN; the other queries by FlexAttention over all keys.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention
    query, key, value = qkv
    whole = block_mask(documents, branches)
    mask = without_first_queries(whole, n, m.mask_rule(documents, branches))
    compiled = torch.compile(flex_attention)

    def attend():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            first = F.scaled_dot_product_attention(
                query[:, :, :n], key[:, :, :n], value[:, :, :n],
                is_causal=True, enable_gqa=True,
            )
        rest = compiled(
            query[:, :, n:], key, value,
            block_mask=mask, enable_gqa=True, kernel_options=FLEX_OPTIONS,
        )
        return torch.cat([first, rest], 2)
    name = 'long document by cuDNN, the rest by FlexAttention'
    time_attention(say, name, attend, qkv, pairs, shape=shape)
    # And both together must be the whole
    with torch.no_grad():
        difference = relative_difference(attend(), m.attention(*qkv, whole))
    say('split beside FlexAttention', difference=difference)


def without_first_queries(mask, n, attends):
    """The BlockMask of all queries but the first n, which are whole blocks, over all keys. attends:
    the rule of all queries. (torch's own slices of a mask want a rule for a slice.)"""
    blocks = n // BLOCK
    queries, keys = mask.seq_lengths

    def rule_of_the_rest(b, head, i, j):
        return attends(b, head, i + n, j)    # query i of the rest is query i + n of the row
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks[:, :, blocks:], mask.kv_indices[:, :, blocks:],
        mask.full_kv_num_blocks[:, :, blocks:], mask.full_kv_indices[:, :, blocks:],
        BLOCK_SIZE=BLOCK, mask_mod=rule_of_the_rest, seq_lengths=(queries - n, keys),
    )


def attention_of_the_tower(say):
    """Attention among the 577 patches of each crop (CLIP-L at 336 pixels). The first call for each
    number of crops is timed alone, because a library may prepare something for every new shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    numbers = (2,)
    backends = (SDPBackend.MATH,)
    if CUDA:
        numbers = (96, 97)
        backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for crops in numbers:
        qkv = []
        for _ in range(3):
            x = torch.randn(crops, 577, 16, 64, device=DEVICE, dtype=DTYPE)
            qkv.append(x.transpose(1, 2))                # [crops, 16, 577, 64]
        found = {}
        for backend in backends:
            with sdpa_kernel(backend):
                synchronize()
                start = time.perf_counter()
                F.scaled_dot_product_attention(*qkv)
                synchronize()
                first = time.perf_counter() - start
                later = milliseconds(lambda: F.scaled_dot_product_attention(*qkv))
            found[f'{backend.name}_first_ms'] = 1e3 * first
            found[f'{backend.name}_ms'] = later
        say('attention of the tower', crops=crops, **found)


# --------------------------------------------------------------------------------------------------
# A training step

def one_step(say, config, note, *more, repeats=3):
    """Says time, MFU, and peak memory beside the estimate of a training step of a config, by the
    functions of train.py. more: '--key=value', .."""
    torch._dynamo.reset()                    # compiled anew, as in a run of its own
    settings = settings_of(config, *more)
    step = bench.FullSizeStep(settings, DEVICE, DTYPE)
    batch = step.batch
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    if CUDA:                                 # the peak without what only the first step needs
        torch.cuda.reset_peak_memory_stats()
    seconds = milliseconds(step, repeats, 1) / 1e3
    speed = flops(step.model, batch) / seconds
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.
    estimate = step.estimate()['total'] / 1e9
    say('step',
        config=config, note=note, rows=len(step.rows),
        first_seconds=first, seconds=seconds, tokens_a_second=batch.num_tokens / seconds,
        tflops=speed / 1e12, mfu=share_of_peak(speed),
        peak_gb=memory, estimated_gb=estimate,
        patches=step.patches(), loss_tokens=len(batch.loss_index), pairs=batch.num_pairs)
    if CUDA and os.environ.get('OUT'):
        write_profile(step, f'{config}, {note}')


def write_profile(step, title):
    """Adds a table of the kernels of a step, by their time, to the file profile.txt in the folder
    that the environment's OUT names."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize()
    kernels = profile.key_averages()
    table = kernels.table(sort_by='cuda_time_total', row_limit=40, max_name_column_width=90)
    with open(Path(os.environ['OUT']) / 'profile.txt', 'a') as f:
        f.write(f'{title}\n{table}\n')


# Stage 1 has no videos, so max_frames is 0. Stage 3 would start from a checkpoint of stage 2; its
# weights are random here.

def step_of_stage1(say):
    one_step(say, 'config/stage1.py', 'not compiled', '--max_frames=0', '--compile=False')


def step_of_stage1_compiled(say):
    one_step(say, 'config/stage1.py', 'compiled', '--max_frames=0', f'--compile={CUDA}')


def step_of_stage3(say):
    one_step(say, 'config/stage3.py', 'not compiled', "--init_from=''", '--compile=False', repeats=2)


def step_of_stage3_compiled(say):
    one_step(say, 'config/stage3.py', 'compiled', "--init_from=''", f'--compile={CUDA}', repeats=2)


def loss(say):
    """The loss of 4,096 tokens with its gradients, as the model computes it, and in one chunk that
    is compiled."""
    N, V, D = (4096, 151936, 1024) if CUDA else (64, 500, 32)    # tokens, vocabulary, width
    # The table of embeddings, which is the output's weight too, stays in float32
    hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(V, D, device=DEVICE) * .02
    weight.requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    loss_weights = torch.ones(N, device=DEVICE)
    operations = 6 * N * V * D               # logits, and the gradients of inputs and weights

    def as_the_model_does(chunk):
        with torch.autocast(DEVICE.type, DTYPE):
            ChunkedLoss.apply(hidden, weight, targets, loss_weights, chunk, 0.)
    for chunk in (LOGITS_CHUNK, 4096):
        took = milliseconds(lambda chunk=chunk: as_the_model_does(chunk), 5)
        say('loss', chunk=chunk, ms=took, tflops=teraflops(operations, took))
    if not CUDA:
        return
    compiled = torch.compile(loss_of_a_chunk)            # all tokens in one chunk
    grad_weight = torch.zeros(V, D, device=DEVICE)
    with torch.no_grad():
        narrow = weight.detach().to(DTYPE)

        def run():
            return compiled(hidden, narrow, targets, loss_weights, grad_weight)
        took = milliseconds(run, 5)
    say('loss compiled', chunk=N, ms=took, tflops=teraflops(operations, took))


def loss_of_a_chunk(hidden, weight, targets, loss_weights, grad_weight):
    """What ChunkedLoss computes for one chunk, in a form that torch.compile fuses: (cross entropy
    [N], gradient of hidden [N, D], grad_weight [V, D] with this chunk's added)."""
    logits = (hidden @ weight.t()).float()               # [N, V]
    log_total = logits.logsumexp(1, keepdim=True)
    at_target = logits.gather(1, targets[:, None])
    cross_entropy = (log_total - at_target)[:, 0]
    # The gradient of the logits is loss_weight * (softmax - one_hot(target))
    grad = (logits - log_total).exp() * loss_weights[:, None]
    is_target = torch.arange(len(weight), device=hidden.device) == targets[:, None]
    grad = torch.where(is_target, grad - loss_weights[:, None], grad)
    grad = grad.to(hidden.dtype)
    return cross_entropy, grad @ weight, grad_weight + grad.t() @ hidden


def drawn_pictures():
    """The folder of the data set `shapes`, which is drawn if it is not there yet. It has no clips,
    because these need PyAV."""
    world = ROOT / 'data' / 'gpu_check'
    command = [
        sys.executable, 'prepare/shapes.py', f'--out={world}',
        '--num=600', '--num_clocks=0', '--num_text=0', '--num_clips=0', '--num_validation=20',
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return world


def first_steps(command, metrics, number):
    """Runs train.py until it has written so many lines of metrics, and ends it without a last
    checkpoint, which would take longer than the steps. Returns the lines, as dicts."""
    with tempfile.TemporaryFile('w+') as output:
        # A process group, so that the workers end with it
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            while True:
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if len(lines) >= number:
                    return [json.loads(line) for line in lines]
                if trainer.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f'train.py ended with {trainer.returncode}: {output.read()[-600:]}')
                time.sleep(.1)
        finally:
            if trainer.poll() is None:
                os.killpg(trainer.pid, signal.SIGKILL)
            trainer.wait()


def data_waiting(say):
    """The share of a step that waits for data: train.py itself, at the sizes of stage 1, on drawn
    pictures, which eight processes read."""
    world = drawn_pictures()
    out = Path(tempfile.gettempdir()) / 'gpu_bench_run'
    shutil.rmtree(out, ignore_errors=True)
    workers = 8 if CUDA else 1
    max_steps = 16 if CUDA else 4
    command = [
        sys.executable, 'train.py', 'config/stage1.py',
        # Random weights, and a mixture of the drawn pictures alone
        '--vision_weights=', '--language_weights=',
        "--mixture={'shapes': 1.0}", f'--data_dir={world}', f'--tokenizer={world}/shapes',
        '--accumulation=2', f'--num_workers={workers}', '--max_steps=1000000', f'--compile={CUDA}',
        # Nothing but training: no validation, no checkpoint
        '--eval_interval=0', '--log_interval=2', '--save_interval=1000000',
        f'--out_dir={out}', *TOY,
    ]
    steps = first_steps(command, out / 'metrics.jsonl', max_steps // 2)
    late = steps[len(steps) // 2:]           # without the start, when nothing is read ahead yet
    seconds = sum(step['seconds'] for step in late)
    waited = sum(step['data_wait'] for step in late)
    last = late[-1]
    say('data waiting',
        share=waited / seconds, seconds_a_step=seconds / len(late),
        tokens_a_second=last['tokens_per_second'], visual_tokens=last['visual_tokens'],
        mfu=last.get('mfu', 0.), peak_gb=last.get('memory_gb', 0.))
    shutil.rmtree(out)


# --------------------------------------------------------------------------------------------------
# Answers

def answering_model():
    """A model of the size of stage 1, in bfloat16 with random weights, on the device."""
    model = planned_model(settings_of('config/stage1.py')).to(DTYPE)
    model = model.to_empty(device=DEVICE).eval()
    model.set_buffers(DEVICE)
    random_weights(model)
    return model


def decoding(say):
    """The time of a step of greedy generation at the size of Qwen3-0.6B, for one answer and for
    eight, and of a step captured in a CUDA graph.

    A step of a large model must read all weights, so beside the time stands how many terabytes of
    weights a second that is.
    """
    model = answering_model()
    model.config.eos_token_id = -1           # no answer ends by itself
    weights = sum(p.nbytes for p in model.language_model.parameters())
    # The prompt and the start take equally long for both numbers of tokens
    few, many = (16, 144) if CUDA else (2, 4)
    for answers in (1, 8):
        tokens = torch.randint(0, 1000, (answers, 64), device=DEVICE)
        batch = Batch(
            tokens=tokens,
            position_ids=torch.arange(64, device=DEVICE).expand(answers, 64),
            document_ids=torch.zeros_like(tokens),
            branch_ids=torch.zeros_like(tokens),
            causal=True,
        )

        def answer(n, batch=batch):
            return list(generate(model, batch, n))
        a_step = milliseconds_a_token(answer, few, many, repeats=3)
        say('decoding',
            answers=answers, ms_a_step=a_step, tokens_a_second=1e3 * answers / a_step,
            weights_read_terabytes_a_second=weights / a_step / 1e9)
    if CUDA:
        decoding_as_graph(say, model, weights)


def milliseconds_a_token(answer, few, many, repeats):
    """The time of one token: the difference of answer(many) and answer(few), divided."""
    time_of_few = milliseconds(lambda: answer(few), repeats, 1)
    time_of_many = milliseconds(lambda: answer(many), repeats, 1)
    return (time_of_many - time_of_few) / (many - few)


def decoding_as_graph(say, model, weights):
    """A step of one answer, captured in a CUDA graph: all its kernels are launched by one call. It
    shows how much of a step is launching. weights: bytes of the decoder."""
    config = model.config.language
    cache = KVCache(config, 1, 512, DTYPE, DEVICE)
    with torch.inference_mode():
        decode = DecodeStep(model.language_model, cache, None)
        position = torch.tensor([[256]], device=DEVICE)
        cos, sin = m.rotary_table(position, config.head_dim, config.rope_theta)
        cos = cos.to(DTYPE)[:, 0]            # [1, 1, head_dim]
        sin = sin.to(DTYPE)[:, 0]
        token = torch.zeros(1, dtype=torch.long, device=DEVICE)

        def step():
            cache.length = 256               # a graph repeats the same step, at the same place
            return model.logits(decode(token, cos, sin)).argmax(-1)
        step()                               # what is set up at the first call is not captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        took = milliseconds(graph.replay, 20)
    say('decoding, a step as one CUDA graph',
        answers=1, ms_a_step=took, tokens_a_second=1e3 / took,
        weights_read_terabytes_a_second=weights / took / 1e9)


def decoding_compiled(say):
    """A step of one answer with a compiled layer and a cache of fixed size, as one CUDA graph: how
    near a form without Python comes to reading the weights once. Two ways of compiling: torch's
    own, and with products of one row written as sums, which the compiler fuses with what stands
    around them."""
    model = answering_model()
    config = model.config.language
    size = 512 if CUDA else 16
    weights = sum(p.nbytes for p in model.language_model.parameters())
    with torch.inference_mode():
        cache = KVCache(config, 1, size, DTYPE, DEVICE)
        step = DecodeStep(model.language_model, cache, None)
        place = torch.tensor([size // 2], device=DEVICE)
        cos, sin = m.rotary_table(place[:, None], config.head_dim, config.rope_theta)
        cos = cos.to(DTYPE)[:, 0]            # [1, 1, head_dim]
        sin = sin.to(DTYPE)[:, 0]
        token = torch.zeros(1, dtype=torch.long, device=DEVICE)
        layers = []
        for number, (block, layer) in enumerate(zip(model.language_model.layers, step.layers)):
            query_weight = block.self_attn.q_norm.weight.expand(config.num_heads, -1)
            key_weight = block.self_attn.k_norm.weight.expand(config.num_kv_heads, -1)
            layers.append((
                block.input_layernorm.weight, layer.qkv, torch.cat([query_weight, key_weight]),
                layer.o_proj, block.post_attention_layernorm.weight, layer.gate_up, layer.down_proj,
                cache.keys[number], cache.values[number],
            ))
        cache.length = size // 2
        expected = step(token, cos, sin)
        for way, options in (('default', {}), ('sums', {'coordinate_descent_tuning': True})):
            start = time.perf_counter()
            torch._dynamo.reset()
            compiled = torch.compile(layer_of_fixed_cache, dynamic=False, options=options)

            def decode(compiled=compiled):
                x = F.embedding(token, model.language_model.embed_tokens.weight)
                for layer in layers:
                    x = compiled(x, cos, sin, place, *layer)
                return step.norm(x)
            difference = relative_difference(decode(), expected)
            if not CUDA:
                say('decoding, compiled', way=way, difference=difference)
                continue
            decode()
            synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model.logits(decode()).argmax(-1)
            first = time.perf_counter() - start
            took = milliseconds(graph.replay, 20)
            say('decoding, compiled', way=way, first_seconds=first, difference=difference,
                ms_a_step=took, tokens_a_second=1e3 / took,
                weights_read_terabytes_a_second=weights / took / 1e9)


def layer_of_fixed_cache(x, cos, sin, place, input_norm, qkv, query_key_norm, o_proj, mlp_norm,
                         gate_up, down_proj, keys, values):
    """A decoder layer for one token of each answer, x [answers, width], at `place` [1] of a cache
    keys, values [answers, kv_heads, size, head_dim]."""
    answers, _, d = cos.shape
    kv_heads, size = keys.shape[1:3]
    eps = 1e-6
    h = F.rms_norm(x, x.shape[-1:], input_norm, eps)
    heads = F.linear(h, qkv).view(answers, -1, d)
    value = heads[:, -kv_heads:]
    query_key = F.rms_norm(heads[:, :-kv_heads], (d,), None, eps) * query_key_norm
    query_key = query_key * cos + query_key.roll(d // 2, -1) * sin
    key = query_key[:, -kv_heads:]
    keys.index_copy_(2, place, key[:, :, None])
    values.index_copy_(2, place, value[:, :, None])
    query = query_key[:, :-kv_heads].reshape(answers, kv_heads, -1, d) * d ** -.5
    scores = query @ keys.transpose(2, 3)                # [answers, kv_heads, group, size]
    is_later = torch.arange(size, device=x.device) > place
    weights = scores.masked_fill(is_later, -torch.inf).softmax(-1)
    attended = (weights @ values).view(answers, -1)
    x = x + F.linear(attended, o_proj)
    h = F.rms_norm(x, x.shape[-1:], mlp_norm, eps)
    gate, up = F.linear(h, gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down_proj)


def transformers_decoding(say):
    """The time of a step of transformers' `generate` at the same sizes, for comparison."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as e:                 # a GPU machine may lack it, and the other parts do not
        say('decoding by transformers', unavailable=str(e))
        return
    sizes = planned_model(settings_of('config/stage1.py')).config.language
    config = Qwen3Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size, num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim, tie_word_embeddings=True,
    )
    # Built in bfloat16 on the device at once, because a float32 copy on the CPU takes long
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = Qwen3ForCausalLM._from_config(config, attn_implementation='sdpa').eval()
    finally:
        torch.set_default_dtype(torch.float32)
    few, many = (16, 80) if CUDA else (2, 4)
    for answers in (1, 8):
        tokens = torch.randint(0, 1000, (answers, 64), device=DEVICE)

        def answer(n, tokens=tokens):
            # Greedy, exactly n tokens, of which none ends the answer
            return model.generate(
                tokens, attention_mask=torch.ones_like(tokens),
                max_new_tokens=n, min_new_tokens=n, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )
        a_step = milliseconds_a_token(answer, few, many, repeats=2)
        say('decoding by transformers',
            answers=answers, ms_a_step=a_step, tokens_a_second=1e3 * answers / a_step)


# (part, its seconds), in the order in which they run. Most of a part is compiling.
PARTS = [
    (machine, 15),
    (products, 20),
    (step_of_stage1, 60),
    (step_of_stage1_compiled, 60),
    (step_of_stage3, 60),
    (step_of_stage3_compiled, 70),
    (attention_of_stage3, 60),
    (data_waiting, 80),
    (decoding, 40),
    (decoding_compiled, 90),
    (transformers_decoding, 40),
    (attention_of_stage1, 60),
    (loss, 30),
    (attention_of_the_tower, 10),
]
