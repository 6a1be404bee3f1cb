"""`bench.py --gpu`: what a GPU makes of this code, a line of JSON a finding, most important first.

Each part has its own time and its own failure (timed_parts.py). Sizes are those of config/stage1.py
and config/stage3.py with random weights and made-up full rows. On a CPU the same code runs at toy
sizes, which shows that it runs.

A rate is what the work needs by counting divided by the time; `share` is that over the device's
peak in bfloat16. Medians of several runs after a warm-up. What compiles is compiled before.
"""
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import bench
import model as m
from configurator import configure, train_settings
from model import Batch
from extra.engine import DecodeStep, KVCache, generate
from extra.kernels import FLEX_OPTIONS, ChunkedLoss, block_mask
from extra.plan import flops, peak_flops, planned_model

CUDA = torch.cuda.is_available()
DEVICE = m.pick_device()
DTYPE = torch.bfloat16
ROOT = Path(__file__).parent.parent
TOY = [] if CUDA else [
    "--vision={'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 2, 'num_heads': 2, 'image_size': 56, "
    "'patch_size': 14}",
    "--language={'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 2, 'num_heads': 2, 'num_kv_heads': 1, "
    "'head_dim': 32, 'vocab_size': 2000}", '--image_size=56', '--video_size=28', '--seq_len=512', '--max_frames=4']


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(run, repeats=8, warm_up=2):
    """The median time of run()."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats if CUDA else 1):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def share_of_peak(flops_per_second):
    peak = peak_flops(DEVICE)
    return flops_per_second / peak if peak else 0.


def settings_of(config, *more):
    return configure(train_settings(), [str(ROOT / config), *TOY, *more])


# --------------------------------------------------------------------------------------------------
# The machine

def machine(say):
    say('machine', torch=torch.__version__, commit=bench.commit(), device=bench.processor(), cores=os.cpu_count(),
        memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else 0.,
        cudnn=torch.backends.cudnn.version() or 0)
    source = torch.empty(2 ** 30 if CUDA else 2 ** 20, device=DEVICE)
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source)) / 1e3
    say('copy', terabytes_a_second=2 * source.nbytes / seconds / 1e12)


def products(say):
    """Matrix products at the shapes of Qwen3-0.6B and CLIP-L, 16,384 tokens."""
    shapes = {'square of 8192': (8192, 8192, 8192), 'q, k, v': (16384, 1024, 4096), 'o': (16384, 2048, 1024),
              'gate, up': (16384, 1024, 6144), 'down': (16384, 3072, 1024), 'logits': (4096, 1024, 151936),
              'CLIP q': (16384, 1024, 1024)}
    for name, shape in shapes.items():
        rows, inputs, outputs = shape if CUDA else (min(n, 64) for n in shape)
        x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
        weight = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        grad = torch.randn(rows, outputs, device=DEVICE, dtype=DTYPE)
        flops = 2 * rows * inputs * outputs
        rates = {}
        for what, run in (('forward', lambda x=x, w=weight: x @ w.T), ('for_inputs', lambda g=grad, w=weight: g @ w),
                          ('for_weights', lambda g=grad, x=x: g.T @ x)):
            rates[f'{what}_tflops'] = flops / milliseconds(run) / 1e9
        say('product', shape=name, **rates)


# --------------------------------------------------------------------------------------------------
# Attention

def packed_ids(rows, length, long_document=0):
    """(document_ids, branch_ids, pairs that see each other) of full rows: documents of a picture of
    144 tokens with three conversations; if asked for, first one of a long shared part."""
    rng = np.random.default_rng(0)
    documents, branches = np.full((rows, length), -1), np.zeros((rows, length), np.int64)
    pairs = 0
    for row in range(rows):
        start, document = 0, 0
        while start < length:
            shared = long_document if long_document and document == 0 else 144
            for branch, n in enumerate([shared, *rng.integers(30, 140, 3)]):
                n = min(int(n), length - start)
                documents[row, start:start + n] = document
                branches[row, start:start + n] = branch
                pairs += n * (n + 1) // 2
                if branch:
                    pairs += n * shared
                start += n
            document += 1
    return torch.from_numpy(documents).to(DEVICE), torch.from_numpy(branches).to(DEVICE), pairs


def queries_keys_values(rows, length):
    return [torch.randn(rows, length, heads, 128, device=DEVICE, dtype=DTYPE, requires_grad=True).transpose(1, 2)
            for heads in (16, 8, 8)]


def time_attention(say, name, attend, qkv, pairs, **found):
    """Forward, and forward with backward, and their rates by the pairs that see each other."""
    grad = torch.randn_like(qkv[0])
    start = time.perf_counter()
    try:
        torch.autograd.grad(attend(), qkv, grad)
    except RuntimeError as e:                # a kernel that this device or torch lacks: the others still tell something
        return say('attention', kind=name, unavailable=str(e)[:200], **found)
    synchronize()
    first = time.perf_counter() - start
    forward = milliseconds(attend)
    both = milliseconds(lambda: torch.autograd.grad(attend(), qkv, grad), 5)
    flops = 4 * pairs * 16 * 128
    say('attention', kind=name, first_seconds=first, forward_ms=forward, both_ms=both, forward_tflops=flops / forward / 1e9,
        both_tflops=3 * flops / both / 1e9, **found)


def attention_of_stage1(say):
    """Eight rows of short documents: FlexAttention as it is used, with faster options, and trees as
    varlen segments."""
    rows, length = (8, 4096) if CUDA else (1, 256)
    documents, branches, pairs = packed_ids(rows, length)
    qkv = queries_keys_values(rows, length)
    shape = f'{rows} x {length}'
    dense_causal(say, qkv, shape)
    if CUDA:
        flex(say, qkv, documents, branches, pairs, shape)
        varlen(say, qkv, documents, branches, pairs, shape)


def attention_of_stage3(say):
    """A row with a long video: FlexAttention, and the video's own square by cuDNN with the rest by
    FlexAttention."""
    rows, length, long_document = (1, 36864, 24576) if CUDA else (1, 256, 128)
    documents, branches, pairs = packed_ids(rows, length, long_document)
    qkv = queries_keys_values(rows, length)
    shape = f'{rows} x {length}'
    if CUDA:
        flex(say, qkv, documents, branches, pairs, shape)
        split(say, qkv, documents, branches, pairs, shape, long_document)
    dense_causal(say, qkv, shape)


def dense_causal(say, qkv, shape):
    """What plain causal rows would take, by both libraries."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    rows, _, length, _ = qkv[0].shape
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def attend(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        time_attention(say, f'causal, {backend.name}', attend, qkv, rows * length * (length + 1) // 2, shape=shape)


def flex(say, qkv, documents, branches, pairs, shape):
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.reset()                   # each shape compiled for itself, as in a run of its own
    mask = block_mask(documents, branches)
    say('mask', shape=shape, ms=milliseconds(lambda: block_mask(documents, branches)), sparsity=float(mask.sparsity()))
    time_attention(say, 'FlexAttention', lambda: m.attention(*qkv, mask), qkv, pairs, shape=shape)
    compiled = torch.compile(flex_attention)
    options = {**FLEX_OPTIONS, 'ROWS_GUARANTEED_SAFE': True, 'PRESCALE_QK': True}
    time_attention(say, 'FlexAttention, rows never empty, scaled before',
                   lambda: compiled(*qkv, block_mask=mask, enable_gqa=True, kernel_options=options), qkv, pairs, shape=shape)


def varlen(say, qkv, documents, branches, pairs, shape):
    """Every stretch of one document and branch is a sequence whose keys are the shared part and its
    own tokens."""
    from torch.nn.attention.varlen import varlen_attn
    rows, length = documents.shape
    document = (documents + 1000 * torch.arange(rows, device=DEVICE)[:, None]).flatten().cpu().numpy()
    branch = branches.flatten().cpu().numpy()
    starts = np.flatnonzero(np.diff(document * 16 + branch, prepend=-1))
    lengths = np.diff(starts, append=len(document))
    shared = {document[start]: np.arange(start, start + n) for start, n in zip(starts, lengths) if branch[start] == 0}
    keys = []
    for start, n in zip(starts, lengths):
        own = np.arange(start, start + n)
        keys.append(np.concatenate([shared[document[start]], own]) if branch[start] else own)
    query_ends = torch.tensor(np.append(starts, len(document)), dtype=torch.int32, device=DEVICE)
    key_ends = torch.tensor(np.cumsum([0, *map(len, keys)]), dtype=torch.int32, device=DEVICE)
    gather = torch.from_numpy(np.concatenate(keys)).to(DEVICE)
    most_queries, most_keys = int(lengths.max()), max(map(len, keys))
    grouped = {'enable_gqa': True} if 'enable_gqa' in inspect.signature(varlen_attn).parameters else {}

    def attend():
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in qkv)
        out = varlen_attn(query, key[gather], value[gather], query_ends, key_ends, most_queries, most_keys,
                          window_size=(-1, 0), **grouped)
        return out.unflatten(0, (rows, length)).transpose(1, 2)
    time_attention(say, 'varlen, trees as sequences', attend, qkv, pairs, shape=shape)
    mask = block_mask(documents, branches)
    with torch.no_grad():
        ours, expected = attend().float(), m.attention(*qkv, mask).float()
    say('varlen beside FlexAttention', difference=((ours - expected).norm() / expected.norm()).item())


def split(say, qkv, documents, branches, pairs, shape, n):
    """The first n tokens, a plain causal square, by cuDNN; the row's other queries by FlexAttention
    over all keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    query, key, value = qkv
    length = query.shape[2]
    sees = m.mask_rule(documents, branches)
    make_mask = torch.compile(create_block_mask)
    mask = make_mask(lambda b, h, i, j: sees(b, h, i + n, j), 1, None, length - n, length, device=DEVICE)
    compiled = torch.compile(flex_attention)

    def attend():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            first = F.scaled_dot_product_attention(query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True,
                                                   enable_gqa=True)
        rest = compiled(query[:, :, n:], key, value, block_mask=mask, enable_gqa=True, kernel_options=FLEX_OPTIONS)
        return torch.cat([first, rest], 2)
    time_attention(say, 'long document by cuDNN, the rest by FlexAttention', attend, qkv, pairs, shape=shape)
    whole = block_mask(documents, branches)
    with torch.no_grad():
        ours, expected = attend().float(), m.attention(*qkv, whole).float()
    say('split beside FlexAttention', difference=((ours - expected).norm() / expected.norm()).item())


def attention_of_the_tower(say):
    """577 patches a crop. The first call of a new number of crops tells what a library prepares for
    each shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    for crops in (96, 97, 98) if CUDA else (2,):
        qkv = [torch.randn(crops, 577, 16, 64, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(3)]
        found = {}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if CUDA else (SDPBackend.MATH,):
            with sdpa_kernel(backend):
                synchronize()
                start = time.perf_counter()
                F.scaled_dot_product_attention(*qkv)
                synchronize()
                found[f'{backend.name}_first_ms'] = 1e3 * (time.perf_counter() - start)
                found[f'{backend.name}_ms'] = milliseconds(lambda: F.scaled_dot_product_attention(*qkv))
        say('attention of the tower', crops=crops, **found)


# --------------------------------------------------------------------------------------------------
# A training step

def one_step(say, config, note, *more, repeats=3):
    """A step of a config by train.py's own functions: time, MFU, and peak memory beside the
    estimate."""
    torch._dynamo.reset()
    settings = settings_of(config, *more)
    step = bench.FullSizeStep(settings, DEVICE, DTYPE)
    batch = step.batch
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = milliseconds(step, repeats, 1) / 1e3
    speed = flops(step.model, batch) / seconds
    say('step', config=config, note=note, rows=len(step.rows), first_seconds=first, seconds=seconds,
        tokens_a_second=batch.num_tokens / seconds, tflops=speed / 1e12, mfu=share_of_peak(speed),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0., estimated_gb=step.estimate()['total'] / 1e9,
        patches=step.patches(), loss_tokens=len(batch.loss_index), pairs=batch.num_pairs)
    if CUDA and os.environ.get('OUT'):       # a table of kernels, for whoever wants to know where the time went
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            synchronize()
        table = profile.key_averages().table(sort_by='cuda_time_total', row_limit=40, max_name_column_width=90)
        with open(Path(os.environ['OUT']) / 'profile.txt', 'a') as f:
            f.write(f'{config}, {note}\n{table}\n')


def step_of_stage1(say):
    one_step(say, 'config/stage1.py', 'as configured', '--max_frames=0')


def step_of_stage1_compiled(say):
    one_step(say, 'config/stage1.py', 'compile', '--max_frames=0', f'--compile={CUDA}')


def step_of_stage3(say):
    one_step(say, 'config/stage3.py', 'as configured', "--init_from=''", repeats=2)


def step_of_stage3_compiled(say):
    one_step(say, 'config/stage3.py', 'compile', "--init_from=''", f'--compile={CUDA}', repeats=2)


def loss(say):
    """The loss of 4,096 tokens and its gradients as the model computes them, and one chunk
    compiled."""
    N, V, D = (4096, 151936, 1024) if CUDA else (64, 500, 32)
    hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = (torch.randn(V, D, device=DEVICE) * .02).requires_grad_()
    targets, loss_weights = torch.randint(0, V, (N,), device=DEVICE), torch.ones(N, device=DEVICE)
    flops = 6 * N * V * D

    def as_it_is(chunk):
        with torch.autocast(DEVICE.type, DTYPE):
            ChunkedLoss.apply(hidden, weight, targets, loss_weights, chunk, 0.)
    for chunk in (1024, 4096):
        took = milliseconds(lambda chunk=chunk: as_it_is(chunk), 5)
        say('loss', chunk=chunk, ms=took, tflops=flops / took / 1e9)

    def one_chunk(hidden, weight, targets, loss_weights, grad_weight):
        logits = (hidden @ weight.t()).float()
        log_total = logits.logsumexp(1, keepdim=True)
        at_target = logits.gather(1, targets[:, None])
        grad = (logits - log_total).exp() * loss_weights[:, None]
        is_target = torch.arange(V, device=hidden.device) == targets[:, None]
        grad = torch.where(is_target, grad - loss_weights[:, None], grad).to(hidden.dtype)
        return (log_total - at_target)[:, 0], grad @ weight, grad_weight + grad.t() @ hidden
    if CUDA:
        compiled, grad_weight = torch.compile(one_chunk), torch.zeros(V, D, device=DEVICE)
        with torch.no_grad():
            narrow = weight.detach().to(DTYPE)
            took = milliseconds(lambda: compiled(hidden, narrow, targets, loss_weights, grad_weight), 5)
        say('loss compiled', chunk=N, ms=took, tflops=flops / took / 1e9)


def drawn_pictures():
    """A folder with the data set `shapes`, drawn if it is not there yet. No clips, because those
    need PyAV."""
    world = ROOT / 'data' / 'gpu_check'
    few = ['--num=600', '--num_clocks=0', '--num_text=0', '--num_clips=0', '--num_validation=20']
    subprocess.run([sys.executable, 'prepare/shapes.py', f'--out={world}', *few], cwd=ROOT, check=True, capture_output=True)
    return world


def data_waiting(say):
    """train.py itself on drawn pictures at stage 1's sizes with eight readers: the share of a step
    that waits for data."""
    world, out = drawn_pictures(), Path(tempfile.gettempdir()) / 'gpu_bench_run'
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, 'train.py', 'config/stage1.py', '--vision_weights=', '--language_weights=',
               "--mixture={'shapes': 1.0}", f'--data_dir={world}', f'--tokenizer={world}/shapes', '--accumulation=2',
               f'--num_workers={8 if CUDA else 1}', '--eval_interval=0', '--log_interval=2', '--save_interval=1000000',
               f'--max_steps={16 if CUDA else 4}', f'--out_dir={out}', *TOY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'train.py ended with {done.returncode}: {(done.stdout + done.stderr)[-600:]}')
    steps = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    late = steps[len(steps) // 2:]
    seconds, waited = sum(s['seconds'] for s in late), sum(s['data_wait'] for s in late)
    say('data waiting', share=waited / seconds, seconds_a_step=seconds / len(late),
        tokens_a_second=late[-1]['tokens_per_second'],
        visual_tokens=late[-1]['visual_tokens'], mfu=late[-1].get('mfu', 0.), peak_gb=late[-1].get('memory_gb', 0.))
    shutil.rmtree(out)


# --------------------------------------------------------------------------------------------------
# Answers

def decoding(say):
    """Greedy tokens of the decoder at Qwen3-0.6B's size, one answer and eight, and a step captured
    in a CUDA graph."""
    model = planned_model(settings_of('config/stage1.py')).to(DTYPE).to_empty(device=DEVICE).eval()
    model.set_buffers(DEVICE)
    bench.random_weights(model)
    model.config.eos_token_id = -1
    weights = sum(p.nbytes for p in model.language_model.parameters())
    few, many = (16, 144) if CUDA else (2, 4)
    for answers in (1, 8):
        tokens = torch.randint(0, 1000, (answers, 64), device=DEVICE)
        batch = Batch(tokens=tokens, position_ids=torch.arange(64, device=DEVICE).expand(answers, 64), causal=True,
                     document_ids=torch.zeros_like(tokens), branch_ids=torch.zeros_like(tokens))
        times = [milliseconds(lambda n=n: list(generate(model, batch, n)), 3, 1) for n in (few, many)]
        a_step = (times[1] - times[0]) / (many - few)
        say('decoding', answers=answers, ms_a_step=a_step, tokens_a_second=1e3 * answers / a_step,
            weights_read_terabytes_a_second=weights / a_step / 1e9)
    if not CUDA:
        return
    config = model.config.language
    cache = KVCache(config, 1, 512, DTYPE, DEVICE)
    cache.length = 256
    with torch.inference_mode():
        stepper = DecodeStep(model.language_model, cache, None)
        position = torch.tensor([[256]], device=DEVICE)
        cos, sin = (x.to(DTYPE) for x in m.rotary_table(position, config.head_dim, config.rope_theta))
        token = torch.zeros(1, dtype=torch.long, device=DEVICE)

        def step():
            cache.length = 256
            return model.logits(stepper(token, cos[:, 0], sin[:, 0])).argmax(-1)
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        took = milliseconds(graph.replay, 20)
    say('decoding, a step as one CUDA graph', answers=1, ms_a_step=took, tokens_a_second=1e3 / took,
        weights_read_terabytes_a_second=weights / took / 1e9)


def transformers_decoding(say):
    """transformers' generate with the same sizes, for comparison."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as e:
        return say('decoding by transformers', unavailable=str(e))
    sizes = planned_model(settings_of('config/stage1.py')).config.language
    config = Qwen3Config(vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size,
                         intermediate_size=sizes.intermediate_size,
                         num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads,
                         num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, tie_word_embeddings=True)
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = Qwen3ForCausalLM._from_config(config, attn_implementation='sdpa').eval()
    finally:
        torch.set_default_dtype(torch.float32)
    few, many = (16, 80) if CUDA else (2, 4)
    for answers in (1, 8):
        tokens = torch.randint(0, 1000, (answers, 64), device=DEVICE)

        def generate(n, tokens=tokens):
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, min_new_tokens=n,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)
        times = [milliseconds(lambda n=n: generate(n), 2, 1) for n in (few, many)]
        a_step = (times[1] - times[0]) / (many - few)
        say('decoding by transformers', answers=answers, ms_a_step=a_step, tokens_a_second=1e3 * answers / a_step)


PARTS = [(machine, 15), (step_of_stage1, 40), (step_of_stage3, 50), (attention_of_stage1, 50), (products, 20),
         (step_of_stage1_compiled, 60), (data_waiting, 60), (decoding, 30), (transformers_decoding, 30),
         (attention_of_stage3, 50), (loss, 25), (attention_of_the_tower, 10), (step_of_stage3_compiled, 70)]
