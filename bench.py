"""How fast is it? Training steps and greedy generation at two sizes, alone or beside transformers.

    python bench.py
        throughput, FLOP/s and peak memory of this code
    python bench.py --against=transformers
        the same work in transformers, with the same weights and in the same process, and ratios
    python bench.py --data
        pictures and video frames a second and core; seeking beside decoding every frame
    python bench.py --packing=config/demo_stage2.py [--key=value]
        how full rows are; useful tokens a second beside padding the same examples; the share of a
        step that reading takes
    python bench.py --step=config/stage3.py [--key=value]
        a training step at full size on this device, with random weights and full rows: tokens a
        second, MFU, peak memory beside the estimate
    python bench.py --gpu --seconds=210
        kernels, steps, data and answers on a GPU, one line of JSON a finding (extra/gpu_bench.py)

    options: --size=tiny,small  --what=train,generate  --repeats=5  --threads=N  --seed=0

The peer is LlavaForConditionalGeneration with its best plain settings: SDPA attention, fused AdamW,
no attention mask where no row is padded, logits for the text alone. Both sides hold identical
float32 weights, get the same pictures and the same text, and train every parameter. Runs alternate
(ours, theirs, ours, ...) and the medians are compared, so that another load on the machine slows
both down alike. Losses and generated tokens are compared too, because the times of two different
computations say nothing.
"""
import argparse
import io
import itertools
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import train
from configurator import UserError, configure, train_settings
from data import Example, ExampleDataset, collate, next_row, open_mixture, pooling_windows
from extra.engine import generate
from extra.hf import make_processor, save_model
from extra.kernels import PackedTreeAttention, block_mask, compile_blocks
from extra.plan import dtype_name, flops, memory_estimate, peak_flops, planned_model, random_weights
from media import load_image, load_video, pyav
from model import VLM, Batch, attention, dense_mask, make_config, pick_device, pick_dtype

# (vision, language): `tiny` is near the demo's sizes, `small` the largest that a laptop trains
SIZES = {
    'tiny': (
        dict(hidden_size=128, intermediate_size=512, num_layers=5, num_heads=4,
             image_size=64, patch_size=8),
        dict(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=4,
             num_kv_heads=2, head_dim=48, vocab_size=2048),
    ),
    'small': (
        dict(hidden_size=384, intermediate_size=1536, num_layers=7, num_heads=6,
             image_size=224, patch_size=14),
        dict(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8,
             num_kv_heads=4, head_dim=64, vocab_size=32000),
    ),
}
PICTURES = 16          # rows of a training step, with one picture each
TEXT = (64, 256)       # text tokens of a row of a training step
PROMPT = 32            # text tokens of a prompt, after its picture
NEW_TOKENS = 256       # tokens of an answer
WIDTHS = (5, 22, 14, 14, 7, 22)              # of the columns of the table


# --------------------------------------------------------------------------------------------------
# Timing

def interleave(runs, repeats):
    """Times functions without arguments, in turns. Returns (the median of the seconds of each, what
    each returned when it was first called, as a warm-up)."""
    first = [run() for run in runs]
    seconds = [[] for _ in runs]             # [repeats] of each
    for _ in range(repeats):
        for times, run in zip(seconds, runs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds]
    return medians, first


def commit():
    """The commit of this code, for the line above the figures; '-dirty' where it was changed."""
    here = Path(__file__).parent
    command = ['git', '-C', here, 'describe', '--always', '--dirty']
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or 'unknown'


def processor():
    """The name of the machine's GPU, or that of its CPU with the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')             # Linux, where platform knows no more than 'x86_64'
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':')[1].strip()
                break
    return f'{name}, {os.cpu_count()} cores'


def print_row(cells):
    padded = [str(cell).rjust(width) for cell, width in zip(cells, WIDTHS)]
    print('| ' + ' | '.join(padded) + ' |', flush=True)


# --------------------------------------------------------------------------------------------------
# Training and generation, alone or beside transformers

def make_batch(config, rows, text, seed=0):
    """A Batch whose rows are one random picture each, followed by `text` random tokens, of which
    all but the first are learnt. Returns (Batch, its pictures [rows, 3, height, width] uint8, as
    transformers takes them)."""
    generator = torch.Generator().manual_seed(seed)
    p = config.vision.patch_size
    grid = config.vision.image_size // p
    visual = grid * grid                                 # without pooling, a token for each patch
    L = visual + text
    vocabulary = config.language.vocab_size
    tokens = torch.full((rows, L), config.image_token_id)
    # Ids from 16 on, because those of the placeholder and of padding are lower (make_model)
    tokens[:, visual:] = torch.randint(16, vocabulary, (rows, text), generator=generator)
    shape = (rows, 3, grid * p, grid * p)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    patches = pictures.view(rows, 3, grid, p, grid, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1)          # [rows, grid, grid, p, p, 3]
    patches = patches.reshape(rows, visual, -1)          # [rows, visual, patch_dim]
    # Place i predicts token i + 1, so the places from the first text token to the last but one have
    # a loss
    weights = torch.zeros(rows, L)
    weights[:, visual:-1] = 1
    loss_index = weights.flatten().nonzero()[:, 0]       # [N]
    is_visual = tokens == config.image_token_id
    batch = Batch(
        tokens=tokens,
        position_ids=torch.arange(L).expand(rows, L),
        document_ids=torch.zeros_like(tokens),
        branch_ids=torch.zeros_like(tokens),
        causal=True,
        targets=tokens.roll(-1, 1),
        loss_weights=weights,
        loss_index=loss_index,
        loss_tasks=torch.zeros_like(loss_index),
        patches=patches.contiguous(),
        grid=(grid, grid),
        pool_index=torch.arange(rows * visual)[:, None],         # each token pools one patch
        visual_index=is_visual.flatten().nonzero()[:, 0],
        num_tokens=rows * L,
        num_pairs=rows * L * (L + 1) // 2,               # token i attends to i + 1 tokens
        total_weight=float(weights.sum()),
    )
    return batch, pictures


def make_model(size, seed):
    """A VLM of one of the SIZES with random weights, which never ends an answer by itself."""
    vision, language = SIZES[size]
    config = make_config(
        vision,
        language,
        pooling=1,
        image_token_id=1,
        video_token_id=2,
        eos_token_id=-1,
        pad_token_id=0,
    )
    model = VLM(config)
    model.init_weights(seed)
    return model


def open_in_transformers(model):
    """The same model in transformers, by way of a checkpoint folder. Its connector has a second
    layer, which the checkpoint makes the identity; that one is frozen, because ours has none."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        peer = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder,
            attn_implementation='sdpa',
            dtype=torch.float32,
        )
    peer.model.multi_modal_projector.linear_2.requires_grad_(False)
    return peer


def pixel_values(model, pictures):
    """Pictures [rows, 3, height, width] uint8, normalised as by the processor of transformers. It
    is part of the timed work, because our model normalises in its forward pass."""
    # The model's own scale and shift are [patch_dim], red, green and blue over and over
    scale = model.pixel_scale[:3, None, None]
    shift = model.pixel_shift[:3, None, None]
    return pictures * scale + shift


def optimizer_of(model, lr):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, fused=True)


def train_step(model, batch, lr=1e-4):
    """A function without arguments that does one training step and returns its mean loss."""
    optimizer = optimizer_of(model, lr)
    count = batch.loss_weights.sum()

    def step():
        total, _ = model(batch)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def peer_train_step(peer, batch, pictures, pixels, lr=1e-4):
    """The same step in transformers. pixels(pictures) normalises them."""
    optimizer = optimizer_of(peer, lr)
    # Logits of the text alone: places with a loss, and one more, because transformers shifts the
    # labels by one itself
    text = (batch.loss_weights[0] > 0).sum().item() + 1
    labels = batch.tokens[:, -text:].contiguous()

    def step():
        result = peer(
            input_ids=batch.tokens,
            pixel_values=pixels(pictures),
            labels=labels,
            logits_to_keep=text,
            use_cache=False,
        )
        loss = result.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def generation(model, batch, n):
    """A function without arguments that generates n tokens for each row, [rows, n]."""
    def run():
        tokens = list(generate(model, batch, n))         # n times [rows]
        return torch.stack(tokens, 1)
    return run


def peer_generation(peer, batch, pictures, pixels, n):
    """The same in transformers."""
    def run():
        out = peer.generate(
            input_ids=batch.tokens,
            pixel_values=pixels(pictures),
            attention_mask=torch.ones_like(batch.tokens),
            do_sample=False,
            max_new_tokens=n,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, batch.tokens.shape[1]:]            # without the prompt
    return run


def bench_train(size, against, repeats, seed):
    """Prints a line of the table for each length of text: tokens a second of a training step."""
    for text in TEXT:
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, PICTURES, text, seed)
        runs = [train_step(model, batch)]
        if against:
            # It gets our weights before the first step changes them
            peer = open_in_transformers(model)
            runs.append(peer_train_step(peer, batch, pictures, partial(pixel_values, model)))
        seconds, losses = interleave(runs, repeats)
        cells = [size, f'step, {PICTURES} x {text} text']
        cells += [f'{batch.num_tokens / s:,.0f}' for s in seconds]
        if against:
            ratio = seconds[1] / seconds[0]
            difference = abs(losses[0] - losses[1])
            cells += [f'{ratio:.2f}', f'loss differs {difference:.1e}']
        else:
            speed = flops(model, batch) / seconds[0]
            cells += [f'{seconds[0] * 1000:,.0f} ms', '', f'{speed / 1e9:,.0f} GFLOP/s']
        print_row(cells)


def bench_generate(size, against, repeats, seed):
    """Prints two lines of the table for each number of rows: how soon the first token comes, and
    how fast the others follow."""
    for rows in (1, 8):
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, rows, PROMPT, seed)
        # One token and many of each side, so that their difference is the time of the others alone
        runs = []
        for n in (1, NEW_TOKENS):
            runs.append(generation(model, batch, n))
        if against:
            peer = open_in_transformers(model)
            pixels = partial(pixel_values, model)
            for n in (1, NEW_TOKENS):
                runs.append(peer_generation(peer, batch, pictures, pixels, n))
        seconds, tokens = interleave(runs, repeats)
        # seconds: ours for one token and for many, then theirs; the lists below: ours, theirs
        first = seconds[::2]
        whole = seconds[1::2]
        rest = [many - one for one, many in zip(first, whole)]
        times = [f'{1000 * s:,.0f} ms' for s in first]
        speeds = [f'{rows * (NEW_TOKENS - 1) / s:,.0f}' for s in rest]
        if against:
            is_equal = tokens[1] == tokens[3]
            same = f'{is_equal.float().mean():.0%} of tokens equal'
            times += [f'{first[1] / first[0]:.2f}', same]
            speeds += [f'{rest[1] / rest[0]:.2f}', same]
        else:
            times += ['', '', '']
            speeds += ['', '', '']
        print_row([size, f'first token, {rows} rows', *times])
        print_row([size, 'the others', *speeds])


# --------------------------------------------------------------------------------------------------
# Reading pictures and videos

def make_clip(path, seconds, rate=30, size=(640, 360)):
    """Writes an H.264 file such as cameras and video sites make: with B-frames, keyframes at most
    every 250 frames, noise and motion. rate: frames a second; size: (width, height)."""
    av = pyav()
    width, height = size
    rng = np.random.default_rng(0)
    # Small noise, enlarged, so that it has edges like a photograph and does not defeat the encoder
    noise = rng.integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width * 2, height), Image.Resampling.BICUBIC)
    picture = np.asarray(picture)                        # [height, 2 x width, 3]
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('h264', rate=rate, options={'preset': 'veryfast'})
        stream.width = width
        stream.height = height
        stream.pix_fmt = 'yuv420p'
        stream.gop_size = 250                # frames between keyframes
        for i in range(seconds * rate):
            x = i % width                    # the camera pans
            shown = np.ascontiguousarray(picture[:, x:x + width])
            frame = av.VideoFrame.from_ndarray(shown, 'rgb24')
            out.mux(stream.encode(frame))
        out.mux(stream.encode())             # the frames that the encoder still holds


def decode_all(path):
    """Decodes every frame of a video to RGB, as a reader that does not seek must. Returns their
    number."""
    number = 0
    with pyav().open(str(path)) as container:
        for frame in container.decode(video=0):
            frame.to_ndarray(format='rgb24')
            number += 1
    return number


def bench_data(repeats):
    """Prints how fast one core reads pictures, and frames of a video that it seeks, beside decoding
    every frame of the video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'clip.mp4'
        make_clip(path, 180)
        jpeg = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(jpeg, 'JPEG')

        def pictures():
            for _ in range(50):
                load_image(jpeg).resize((336, 336), Image.Resampling.BICUBIC)

        def frames(n):
            times, _ = load_video(open(path, 'rb'), n, size=(224, 224))
            return len(times)
        runs = [pictures, partial(frames, 384), partial(frames, 16), partial(decode_all, path)]
        seconds, counts = interleave(runs, repeats)
    print(f'pictures, JPEG 640 x 480 to 336 px          {50 / seconds[0]:>8,.0f} a second')
    all_frames = counts[3]
    decoding_all = seconds[3]
    for n, s in zip(counts[1:3], seconds[1:3]):
        print(f'{n:>3} frames of a 3-minute H.264 clip to 224 px {n / s:>6,.0f} a second '
              f'{s:>8.2f} s, {decoding_all / s:.1f} times faster than decoding all '
              f'{all_frames:,} ({decoding_all:.1f} s)')


# --------------------------------------------------------------------------------------------------
# Packing

def packed_rows(mixture, processor):
    """Yields rows of Examples without end, packed as the Loader packs them."""
    def read_examples():
        reader = ExampleDataset(mixture, processor)
        for draw in mixture.draws():
            _, example = reader[draw]
            if isinstance(example, Example):             # and not why there is none
                yield example
    pool = []
    examples = read_examples()
    while True:
        yield next_row(pool, examples, processor.seq_len, lambda e: len(e.tokens))


def bench_packing(settings, repeats, seed):
    """Prints how full the rows of a config are, and the time of a training step on packed rows
    beside that on the same examples with padding."""
    processor, config = make_processor(settings)
    room = processor.seq_len
    mixture = open_mixture(settings, settings['data_dir'], seed)
    source = packed_rows(mixture, processor)
    next(source)               # fills the pool, which no other row does, so it would spoil the time
    steps = 10
    start = time.perf_counter()
    rows = list(itertools.islice(source, steps * settings['batch_size']))
    reading = (time.perf_counter() - start) / steps
    tokens = []                              # of each row
    conversations = []
    for row in rows:
        tokens.append(sum(len(e.tokens) for e in row))
        conversations.append(sum(max(e.branches) for e in row))
    full = np.mean(tokens) / room            # the share of places that are not padding
    examples = np.mean([len(row) for row in rows])
    print(f"{settings['out_dir']}, rows of {room:,}: {full:.2%} full with {examples:.1f} examples "
          f'and {np.mean(conversations):.1f} conversations; one example a row would be '
          f'{full / examples:.1%} full', flush=True)

    rows = rows[:settings['batch_size']]
    alone = [[e] for row in rows for e in row]           # a row for each of their examples
    device = torch.device('cpu')
    model = VLM(config)
    model.init_weights(seed)
    model.set_trained(settings)
    amp = pick_dtype(settings['dtype'], device)
    print(f'steps in {dtype_name(amp)}, random weights:')
    batches = {
        'packed': collate(rows, processor, room),
        'padded to the longest': collate(alone, processor),
        f'padded to {room:,}': collate(alone, processor, room),
    }
    # A learning rate of 0, so that all steps start from the same weights
    runs = [train_step(model, batch, lr=0.) for batch in batches.values()]
    with torch.autocast('cpu', amp, enabled=amp != torch.float32):
        seconds, losses = interleave(runs, repeats)
    useful = batches['packed'].num_tokens    # the tokens that are not padding
    for (name, batch), s, loss in zip(batches.items(), seconds, losses):
        places = batch.tokens.numel()
        print(f"a step on {useful:,} tokens {name + ',':<23} {places:>7,} places: {s:.3f} s, "
              f'{useful / s:>6,.0f} useful tokens/s, '
              f'packed is {s / seconds[0]:.2f} times as fast; loss {loss:.4f}')
    share = reading / (reading + seconds[0])
    print(f'reading them takes {reading:.3f} s on one core, {share:.1%} of reading and step')


# --------------------------------------------------------------------------------------------------
# A step at full size

def made_up_example(rng, processor, crops, grid, pooling, conversations):
    """An Example of random pixels and tokens. crops: their number, of grid (rows, columns) patches
    and pooled k x k, k = pooling. conversations: [number of tokens, ..], of which two thirds are
    the answer."""
    e = Example()
    visual = 0
    if crops:
        window = pooling_windows(grid, pooling)
        patches = grid[0] * grid[1]
        visual = crops * len(window)
        e.grid = grid
        shape = (crops, patches, processor.patch_dim)
        e.patches = rng.integers(0, 256, shape, dtype=np.uint8)
        # Windows count the patches of their own crop, and pool_index those of all crops
        windows = [np.where(window < 0, -1, window + i * patches) for i in range(crops)]
        e.pool_index = np.concatenate(windows)
        e.visual_index = np.arange(visual)
    # Placeholders are any tokens, too, because the model looks at visual_index only
    e.tokens = rng.integers(0, 1000, visual).tolist()
    e.weights = [0.] * visual
    e.positions = list(range(visual))
    e.branches = [0] * visual
    e.tasks = [0] * visual
    for n in conversations:
        question = n // 3 + 1
        weights = [0.] * question + [1.] * (n - question)
        e.add_branch(rng.integers(0, 1000, n).tolist(), weights, task=0)
    return e


def made_up_rows(settings, processor, rng):
    """The rows of a batch, each of exactly seq_len tokens."""
    return [made_up_row(settings, processor, rng) for _ in range(settings['batch_size'])]


def made_up_row(settings, processor, rng):
    """A row of exactly seq_len tokens. With packing it holds a clip of max_frames, then pictures
    with three conversations each, then text; without, one picture with four conversations."""
    pooling = settings['pooling']
    video_pooling = settings['video_pooling']
    room = settings['seq_len']
    example = partial(made_up_example, rng, processor)   # crops, grid, pooling, conversations
    a_picture = len(pooling_windows(processor.grid, pooling))                # visual tokens
    if not settings['packing']:
        text = room - a_picture
        quarter = text // 4
        conversations = [quarter, quarter, quarter, text - 3 * quarter]
        return [example(1, processor.grid, pooling, conversations)]
    a_frame = len(pooling_windows(processor.frame_grid, video_pooling))
    room_for_frames = room - 200             # the three conversations about the clip
    frames = min(settings['max_frames'], room_for_frames // a_frame)
    clip = example(frames, processor.frame_grid, video_pooling, [120, 40, 40])
    row = [clip]
    left = room - len(clip.tokens)
    while left > a_picture + 180:            # a picture, and the three conversations about it
        picture = example(1, processor.grid, pooling, [120, 40, 20])
        row.append(picture)
        left -= len(picture.tokens)
    row.append(example(0, None, 0, [left]))  # text fills the row up
    return row


def shapes_of(settings, model):
    """What `collate` and `made_up_rows` read of a Processor, without the files of a tokenizer."""
    p = model.config.vision.patch_size
    side = settings['image_size'] // p
    frame_side = settings['video_size'] // p
    return SimpleNamespace(
        pad=0,
        patch_dim=3 * p * p,
        grid=(side, side),
        frame_grid=(frame_side, frame_side),
    )


class FullSizeStep:
    """A training step of a config, by the functions of train.py, with random weights on full rows
    of random tokens and pixels. Calling it does one step and returns its loss."""

    def __init__(self, settings, device, amp, seed=0):
        # The functions of train.py read its settings as global variables
        vars(train).update(settings, settings=settings)
        self.settings = settings
        self.device = device
        self.amp = amp
        model = train.apply_training_settings(planned_model(settings))
        self.model = model.to_empty(device=device)
        self.model.set_buffers(device)
        random_weights(self.model)
        if settings['compile']:              # as train.py does
            compile_blocks(self.model, settings['memory_budget'])
        self.optimizers = train.make_optimizers(self.model.train())
        shapes = shapes_of(settings, self.model)
        self.rows = made_up_rows(settings, shapes, np.random.default_rng(seed))
        self.batch = collate(self.rows, shapes, settings['seq_len']).to(device)

    def __call__(self):
        autocast = torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)
        loss, _ = train.forward_backward(self.model, self.model, [self.batch], autocast)
        train.step_optimizers(self.optimizers, 0)        # the learning rate of step 0
        return loss.item()

    def patches(self):
        """The number of patches of all pictures and frames."""
        crops = [x for x in (self.batch.patches, self.batch.frames) if x is not None]
        return sum(x.shape[0] * x.shape[1] for x in crops)

    def estimate(self):
        """The estimated bytes by use, as `memory_estimate` returns them."""
        rows = len(self.rows)
        return memory_estimate(
            self.model,
            rows,
            self.settings['seq_len'],
            self.settings['recompute'],
            self.amp,
            self.patches() / rows,
            compiled=self.settings['compile'],
        )


def bench_step(settings, repeats, seed):
    """Prints the time and memory of a config's training step, and the time of attention of one of
    its rows beside that with a dense mask."""
    device = pick_device(settings['device'])
    amp = pick_dtype(settings['dtype'], device)
    step = FullSizeStep(settings, device, amp, seed)
    batch = step.batch
    (seconds,), (loss,) = interleave([step], repeats)
    speed = flops(step.model, batch) / seconds
    peak = peak_flops(device)
    # Model FLOP/s utilisation; an unknown device has no peak, and so none
    mfu = f', MFU {speed / peak:.1%}' if peak else ''
    print(f"{settings['out_dir']}: {len(step.rows)} rows of {settings['seq_len']:,} tokens in "
          f"{dtype_name(amp)}, recompute {settings['recompute']}, compile {settings['compile']}: "
          f'{seconds:.3f} s a step, {batch.num_tokens / seconds:,.0f} tokens/s, '
          f'{speed / 1e12:.2f} TFLOP/s{mfu}; loss {loss:.3f}')
    uses = ', '.join(f'{use} {n / 1e9:.2f}' for use, n in step.estimate().items())
    measured = ''
    if device.type == 'cuda':
        measured = f'peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, '
    print(f'memory: {measured}estimated {uses} GB', flush=True)
    if settings['seq_len'] > 8192:           # the dense mask alone would be gigabytes
        return
    config = step.model.config.language
    document_ids = batch.document_ids[:1]
    branch_ids = batch.branch_ids[:1]
    del step                                 # its memory, before attention needs some
    bench_attention(config, document_ids, branch_ids, device, amp, repeats)


def bench_attention(config, document_ids, branch_ids, device, amp, repeats):
    """Prints the time of attention, forward and backward, of one row [1, L] with random queries,
    keys and values: the device's fast form beside SDPA with a dense mask. The sums of both results
    are printed, too, because they must be equal."""
    if device.type == 'cuda':
        name = 'FlexAttention'
        fast = block_mask(document_ids, branch_ids)
    else:
        name = 'by segments'
        fast = PackedTreeAttention(document_ids, branch_ids)
    dense = dense_mask(document_ids, branch_ids)
    L = document_ids.shape[1]
    qkv = []
    for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads):
        x = torch.randn(1, heads, L, config.head_dim, device=device, dtype=amp)
        qkv.append(x.requires_grad_())

    def attend(mask):
        out = attention(*qkv, mask)
        gradients = torch.autograd.grad(out, qkv, torch.ones_like(out))
        return [x.sum().item() for x in (out, *gradients)]
    # sums: those of the result and of three gradients, for each form
    seconds, sums = interleave([partial(attend, fast), partial(attend, dense)], repeats)
    fast_ms = 1e3 * seconds[0]
    dense_ms = 1e3 * seconds[1]
    print(f'attention of one row, forward and backward: {name} {fast_ms:.1f} ms, '
          f'SDPA with a dense mask {dense_ms:.1f} ms, {dense_ms / fast_ms:.1f} times as long; '
          f'sums {sums[0][0]:.4g} and {sums[1][0]:.4g}')


# --------------------------------------------------------------------------------------------------
# Commands

def read_arguments():
    """(arguments of this script, those that are settings of a config)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--against', choices=['transformers'])
    add('--data', action='store_true', help='reading pictures and videos, nothing else')
    add('--packing', metavar='CONFIG', help='how full rows are, and what that is worth')
    add('--step', metavar='CONFIG', help='a training step at full size')
    add('--gpu', action='store_true', help='kernels, steps, data and answers on a GPU')
    add('--seconds', type=float, default=210, help='of --gpu')
    add('--parts', default='', help='of --gpu: names with commas; default: all')
    add('--size', default='tiny,small')
    add('--what', default='train,generate')
    add('--repeats', type=int, default=5)
    add('--threads', type=int, default=0, help="0: torch's own choice")
    add('--seed', type=int, default=0)
    # What is not known here is a setting, --key=value, of the config of --packing or --step
    args, settings = parser.parse_known_args()
    if settings and not (args.packing or args.step or args.gpu):
        parser.error(f'unknown argument {settings[0]}')
    return args, settings


def main():
    args, settings = read_arguments()
    if args.gpu:
        from extra import gpu_bench, timed_parts         # each part in a process with its own time
        raise SystemExit(timed_parts.main(gpu_bench.PARTS, args.seconds))
    benches = {'train': bench_train, 'generate': bench_generate}
    sizes = args.size.split(',')
    whats = args.what.split(',')
    for names, known in ((sizes, SIZES), (whats, benches)):
        for name in names:
            if name not in known:
                raise UserError(f"'{name}' is not one of {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    print_conditions(args)
    if args.data:
        bench_data(args.repeats)
    elif args.step:
        config = configure(train_settings(), [args.step, *settings])
        bench_step(config, args.repeats, args.seed)
    elif args.packing:
        config = configure(train_settings(), [args.packing, *settings])
        bench_packing(config, args.repeats, args.seed)
    else:
        second = 'theirs' if args.against else 'time'
        print_row(['size', 'what', 'ours, tokens/s', second, 'ratio', 'check'])
        print_row(['-' * width for width in WIDTHS])
        for size in sizes:
            for what in whats:
                benches[what](size, args.against, args.repeats, args.seed)
        both = ' (both libraries together)' if args.against else ''
        # Of the process, so both libraries are in it, and Linux counts it in kilobytes
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f'peak memory {kilobytes / 2 ** 20:.2f} GiB{both}')


def print_conditions(args):
    """Prints the line above all figures: the machine and the versions that they belong to."""
    versions = f'torch {torch.__version__}'
    if args.against:
        import transformers
        versions += f', transformers {transformers.__version__}'
    dtype = '' if args.packing or args.step else ', float32'
    print(f'{processor()}; {torch.get_num_threads()} threads{dtype}; {versions}; '
          f'commit {commit()}; median of {args.repeats}, in turns')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        raise SystemExit(f'bench.py: {e}') from None
