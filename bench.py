"""How fast is it? Training steps and greedy generation at two sizes, alone or beside transformers.

    python bench.py                            throughput, FLOP/s and peak memory of this code
    python bench.py --against=transformers     the same work in transformers, same weights, same process, ratios
    python bench.py --data                     pictures and video frames a second and core, seeking beside decoding all
    python bench.py --packing=config/demo_stage2.py      how full rows are; useful tokens a second beside padding the
                                               same examples; share of a step that reading takes; --key=value too
    python bench.py --step=config/stage3.py    a training step at full size on this device, random weights and full
                                               rows: tokens a second, MFU, peak memory beside the estimate; --key=value
    python bench.py --gpu --seconds=210        what a GPU makes of all this, a line of JSON a finding
                                               (extra/gpu_bench.py)
    options: --size=tiny,small  --what=train,generate  --repeats=5  --threads=N  --seed=0

The peer is LlavaForConditionalGeneration with its best plain settings: SDPA attention, fused AdamW,
no attention mask where no row is padded, logits for the text alone. Both sides hold identical
float32 weights, get the same pictures and the same text, and train every parameter. Runs alternate
(ours, theirs, ours, ...) and the medians are compared, so that another load on the machine falls on
both. Losses and generated tokens are compared too, because a bench of two different computations is
worth nothing.
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
from extra.plan import flops, memory_estimate, peak_flops, planned_model
from media import load_image, load_video, pyav
from model import VLM, Batch, attention, dense_mask, make_config, pick_device, pick_dtype

SIZES = {   # a ViT and a decoder from scratch; `tiny` is near the demo's, `small` the largest that a laptop trains
    'tiny': (dict(hidden_size=128, intermediate_size=512, num_layers=5, num_heads=4, image_size=64, patch_size=8),
             dict(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48,
                  vocab_size=2048)),
    'small': (dict(hidden_size=384, intermediate_size=1536, num_layers=7, num_heads=6, image_size=224, patch_size=14),
              dict(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64,
                   vocab_size=32000)),
}
PICTURES = 16          # a training step sees this many rows of one picture each
TEXT = (64, 256)       # text tokens a row
NEW_TOKENS = 256       # of a generation
PROMPT = 32            # text tokens after the picture of a generation


# --------------------------------------------------------------------------------------------------
# Timing

def interleave(runs, repeats):
    """Medians of the seconds of each run, taken in turns after one warm-up each, and what the
    warm-ups returned."""
    first = [run() for run in runs]
    seconds = [[] for _ in runs]
    for _ in range(repeats):
        for times, run in zip(seconds, runs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds], first


def commit():
    here = Path(__file__).parent
    command = ['git', '-C', here, 'describe', '--always', '--dirty']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or 'unknown'


def processor():
    """The name of the machine's processor, or of its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':')[1].strip()
                break
    return f'{name}, {os.cpu_count()} cores'


def print_row(cells):
    widths = (5, 22, 14, 14, 7, 22)
    print('| ' + ' | '.join(str(cell).rjust(width) for cell, width in zip(cells, widths)) + ' |', flush=True)


# --------------------------------------------------------------------------------------------------
# Training and generation, alone or beside transformers

def make_batch(config, rows, text, seed=0):
    """(Batch of rows of one picture followed by `text` random tokens, all but the first of them
    learnt; the pictures [rows, 3, height, width] as transformers takes them)."""
    generator = torch.Generator().manual_seed(seed)
    p = config.vision.patch_size
    grid = config.vision.image_size // p
    visual = grid * grid
    L = visual + text
    tokens = torch.full((rows, L), config.image_token_id)
    tokens[:, visual:] = torch.randint(16, config.language.vocab_size, (rows, text), generator=generator)
    pictures = torch.randint(0, 256, (rows, 3, grid * p, grid * p), dtype=torch.uint8, generator=generator)
    patches = pictures.view(rows, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1)     # [rows, grid, grid, p, p, 3]
    weights = torch.zeros(rows, L)
    weights[:, visual:-1] = 1
    loss_index = weights.flatten().nonzero()[:, 0]
    batch = Batch(
        tokens=tokens, targets=tokens.roll(-1, 1), loss_weights=weights, loss_index=loss_index,
        loss_tasks=torch.zeros_like(loss_index), position_ids=torch.arange(L).expand(rows, L), causal=True,
        document_ids=torch.zeros_like(tokens), branch_ids=torch.zeros_like(tokens),
        patches=patches.reshape(rows, visual, -1).contiguous(), grid=(grid, grid),
        pool_index=torch.arange(rows * visual)[:, None],
        visual_index=(tokens == config.image_token_id).flatten().nonzero()[:, 0],
        num_tokens=rows * L, num_pairs=rows * L * (L + 1) // 2, total_weight=float(weights.sum()))
    return batch, pictures


def make_model(size, seed):
    vision, language = SIZES[size]
    config = make_config(vision, language, pooling=1, image_token_id=1, video_token_id=2, eos_token_id=-1,
                         pad_token_id=0)
    model = VLM(config)
    model.init_weights(seed)
    return model


def open_in_transformers(model):
    """The same weights in transformers, through a checkpoint folder; its identity layer is frozen
    as ours has none."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        peer = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, attn_implementation='sdpa', dtype=torch.float32)
    peer.model.multi_modal_projector.linear_2.requires_grad_(False)
    return peer


def pixel_values(model, pictures):
    """Pictures normalised as transformers' processor does; part of the work that is timed."""
    scale = model.pixel_scale[:3, None, None]
    shift = model.pixel_shift[:3, None, None]
    return pictures * scale + shift


def optimizer_of(model, lr):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, fused=True)


def train_step(model, batch, lr=1e-4):
    """A function that does one step and returns its mean loss."""
    optimizer = optimizer_of(model, lr)
    count = batch.loss_weights.sum()

    def step():
        loss = model(batch)[0] / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def peer_train_step(peer, batch, pictures, pixels, lr=1e-4):
    optimizer = optimizer_of(peer, lr)
    text = (batch.loss_weights[0] > 0).sum().item() + 1
    labels = batch.tokens[:, -text:].contiguous()

    def step():
        loss = peer(input_ids=batch.tokens, pixel_values=pixels(pictures), labels=labels, logits_to_keep=text,
                    use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def generation(model, batch, n):
    """A function that generates n tokens, [rows, n]."""
    return lambda: torch.stack(list(generate(model, batch, n)), 1)


def peer_generation(peer, batch, pictures, pixels, n):
    def run():
        out = peer.generate(input_ids=batch.tokens, pixel_values=pixels(pictures), do_sample=False,
                            attention_mask=torch.ones_like(batch.tokens), max_new_tokens=n, eos_token_id=None,
                            pad_token_id=0)
        return out[:, batch.tokens.shape[1]:]
    return run


def bench_train(size, against, repeats, seed):
    """Prints a line for each length of text."""
    for text in TEXT:
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, PICTURES, text, seed)
        runs = [train_step(model, batch)]
        if against:
            peer = open_in_transformers(model)
            runs.append(peer_train_step(peer, batch, pictures, lambda x, model=model: pixel_values(model, x)))
        seconds, first = interleave(runs, repeats)
        cells = [size, f'step, {PICTURES} x {text} text']
        cells += [f'{batch.num_tokens / s:,.0f}' for s in seconds]
        if against:
            cells += [f'{seconds[1] / seconds[0]:.2f}', f'loss differs {abs(first[0] - first[1]):.1e}']
        else:
            cells += [f'{seconds[0] * 1000:,.0f} ms', '', f'{flops(model, batch) / seconds[0] / 1e9:,.0f} GFLOP/s']
        print_row(cells)


def bench_generate(size, against, repeats, seed):
    """Prints two lines for each number of rows: how soon the first token comes, how fast the others
    follow."""
    for rows in (1, 8):
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, rows, PROMPT, seed)
        runs = [generation(model, batch, n) for n in (1, NEW_TOKENS)]
        if against:
            peer = open_in_transformers(model)
            for n in (1, NEW_TOKENS):
                runs.append(peer_generation(peer, batch, pictures, lambda x, model=model: pixel_values(model, x), n))
        seconds, tokens = interleave(runs, repeats)
        first = seconds[::2]
        rest = [whole - one for one, whole in zip(first, seconds[1::2])]
        same = ''
        if against:
            same = f'{(tokens[1] == tokens[3]).float().mean():.0%} of tokens equal'
        speeds = [f'{rows * (NEW_TOKENS - 1) / s:,.0f}' for s in rest]
        for name, cells, s in ((f'first token, {rows} rows', [f'{1000 * s:,.0f} ms' for s in first], first),
                               ('the others', speeds, rest)):
            ratio = [f'{s[1] / s[0]:.2f}', same] if against else ['', '', '']
            print_row([size, name, *cells, *ratio])


# --------------------------------------------------------------------------------------------------
# Reading pictures and videos

def make_clip(path, seconds, rate=30, size=(640, 360)):
    """An H.264 file as cameras and sites make it: B-frames, a keyframe at most every 250 frames,
    noise and motion."""
    av = pyav()
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((width * 2, height), Image.Resampling.BICUBIC))
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('h264', rate=rate, options={'preset': 'veryfast'})
        stream.width = width
        stream.height = height
        stream.pix_fmt = 'yuv420p'
        stream.gop_size = 250
        for i in range(seconds * rate):
            x = i % width                    # the camera pans
            shown = np.ascontiguousarray(picture[:, x:x + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(shown, 'rgb24')))
        out.mux(stream.encode())


def decode_all(path):
    """What a sampler that decodes everything does: every frame in RGB. Returns their number."""
    number = 0
    with pyav().open(str(path)) as container:
        for frame in container.decode(video=0):
            frame.to_ndarray(format='rgb24')
            number += 1
    return number


def bench_data(repeats):
    """Reading, on one core: pictures, frames, and frames at two a second beside decoding every
    frame."""
    with tempfile.TemporaryDirectory() as folder:
        path, jpeg = Path(folder) / 'clip.mp4', io.BytesIO()
        make_clip(path, 180)
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(jpeg, 'JPEG')

        def pictures():
            for _ in range(50):
                load_image(jpeg).resize((336, 336), Image.Resampling.BICUBIC)

        def frames(n):
            return lambda: len(load_video(open(path, 'rb'), n, size=(224, 224))[0])
        runs = [pictures, frames(384), frames(16), lambda: decode_all(path)]
        seconds, counts = interleave(runs, repeats)
    print(f"pictures, JPEG 640 x 480 to 336 px          {50 / seconds[0]:>8,.0f} a second")
    for n, s in zip(counts[1:3], seconds[1:3]):
        print(f'{n:>3} frames of a 3-minute H.264 clip to 224 px {n / s:>6,.0f} a second {s:>8.2f} s, '
              f'{seconds[3] / s:.1f} times faster than decoding all {counts[3]:,} ({seconds[3]:.1f} s)')


# --------------------------------------------------------------------------------------------------
# Packing

def packed_rows(mixture, processor):
    """Endless rows of Examples, packed as the Loader packs them."""
    def examples():
        reader = ExampleDataset(mixture, processor)
        for draw in mixture.draws():
            _, example = reader[draw]
            if isinstance(example, Example):
                yield example
    pool, source = [], examples()
    while True:
        yield next_row(pool, source, processor.seq_len, lambda e: len(e.tokens))


def bench_packing(settings, repeats, seed):
    """How full a config's rows are; a step on them beside the same examples padded."""
    processor, config = make_processor(settings)
    room = processor.seq_len
    mixture = open_mixture(settings['mixture'], settings['data_dir'], seed)
    source = packed_rows(mixture, processor)
    next(source)                             # fills the pool
    start = time.perf_counter()
    rows = list(itertools.islice(source, 10 * settings['batch_size']))
    reading = (time.perf_counter() - start) / 10
    full = np.mean([sum(len(e.tokens) for e in row) for row in rows]) / room
    examples = np.mean([len(row) for row in rows])
    conversations = np.mean([sum(max(e.branches) for e in row) for row in rows])
    print(f"{settings['out_dir']}, rows of {room:,}: {full:.2%} full with {examples:.1f} examples and "
          f'{conversations:.1f} conversations; one example a row would be {full / examples:.1%} full', flush=True)

    rows = rows[:settings['batch_size']]
    alone = [[e] for row in rows for e in row]
    model, dev = VLM(config), torch.device('cpu')
    model.init_weights(seed)
    model.set_trained(settings)
    amp = pick_dtype(settings['dtype'], dev)
    print(f'steps in {str(amp)[6:]}, random weights:')
    batches = [collate(rows, processor, room), collate(alone, processor), collate(alone, processor, room)]
    with torch.autocast('cpu', amp, enabled=amp != torch.float32):
        seconds, losses = interleave([train_step(model, batch, 0.) for batch in batches], repeats)
    useful = batches[0].num_tokens
    names = ('packed', 'padded to the longest', f'padded to {room:,}')
    for name, batch, s, loss in zip(names, batches, seconds, losses):
        print(f"a step on {useful:,} tokens {name + ',':<23} {batch.tokens.numel():>7,} places: {s:.3f} s, "
              f'{useful / s:>6,.0f} useful tokens/s, packed is {s / seconds[0]:.2f} times as fast; loss {loss:.4f}')
    share = reading / (reading + seconds[0])
    print(f'reading them takes {reading:.3f} s on one core, {share:.1%} of reading and step')


# --------------------------------------------------------------------------------------------------
# A step at full size

def made_up_example(rng, processor, crops, grid, pooling, conversations):
    """An Example of so many random crops and of conversations with so many tokens, of which two
    thirds are answers."""
    e = Example()
    visual = 0
    if crops:
        window = pooling_windows(grid, pooling)
        patches = grid[0] * grid[1]
        visual = crops * len(window)
        e.grid = grid
        e.patches = rng.integers(0, 256, (crops, patches, processor.patch_dim), dtype=np.uint8)
        e.pool_index = np.concatenate([np.where(window < 0, -1, window + i * patches) for i in range(crops)])
        e.visual_index = np.arange(visual)
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
    """Rows of exactly seq_len. Packed ones hold a clip of max_frames, then pictures with three
    conversations each, then text; others one picture and conversations about it."""
    return [made_up_row(settings, processor, rng) for _ in range(settings['batch_size'])]


def made_up_row(settings, processor, rng):
    pooling, room = settings['pooling'], settings['seq_len']
    a_picture = len(pooling_windows(processor.grid, pooling))
    if not settings['packing']:
        quarter = (room - a_picture) // 4
        conversations = [quarter] * 3 + [room - a_picture - 3 * quarter]
        return [made_up_example(rng, processor, 1, processor.grid, pooling, conversations)]
    a_frame = len(pooling_windows(processor.frame_grid, settings['video_pooling']))
    frames = min(settings['max_frames'], (room - 200) // a_frame)
    row = [made_up_example(rng, processor, frames, processor.frame_grid, settings['video_pooling'], [120, 40, 40])]
    left = room - len(row[0].tokens)
    while left > a_picture + 180:
        row.append(made_up_example(rng, processor, 1, processor.grid, pooling, [120, 40, 20]))
        left -= len(row[-1].tokens)
    row.append(made_up_example(rng, processor, 0, None, 0, [left]))
    return row


@torch.no_grad()
def random_weights(model):
    """Small numbers drawn on the model's own device: a billion of them on a CPU would take longer
    than the bench."""
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            p.zero_()
        elif 'norm' in name:
            p.fill_(1)
        else:
            p.normal_(0, .02)


def shapes_of(settings, model):
    """What `collate` and `made_up_rows` ask of a Processor."""
    p = model.config.vision.patch_size
    side, frame_side = settings['image_size'] // p, settings['video_size'] // p
    return SimpleNamespace(pad=0, patch_dim=3 * p * p, grid=(side, side), frame_grid=(frame_side, frame_side))


class FullSizeStep:
    """A config's training step by train.py's own functions, with random weights on full made-up
    rows."""

    def __init__(self, settings, device, amp, seed=0):
        vars(train).update(settings, settings=settings)      # train.py's functions read its settings as globals
        self.settings = settings
        self.device = device
        self.amp = amp
        self.model = train.apply_training_settings(planned_model(settings)).to_empty(device=device)
        self.model.set_buffers(device)
        random_weights(self.model)
        if settings['compile']:
            compile_blocks(self.model, settings['memory_budget'])
        self.optimizers = train.make_optimizers(self.model.train())
        shapes = shapes_of(settings, self.model)
        self.rows = made_up_rows(settings, shapes, np.random.default_rng(seed))
        self.batch = collate(self.rows, shapes, settings['seq_len']).to(device)

    def __call__(self):
        autocast = torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)
        loss, _ = train.forward_backward(self.model, self.model, [self.batch], autocast)
        train.step_optimizers(self.optimizers, 0)
        return loss.item()

    def patches(self):
        crops = [x for x in (self.batch.patches, self.batch.frames) if x is not None]
        return sum(x.shape[0] * x.shape[1] for x in crops)

    def estimate(self):
        settings = self.settings
        return memory_estimate(self.model, len(self.rows), settings['seq_len'], settings['recompute'], self.amp,
                               self.patches() / len(self.rows), compiled=settings['compile'])


def bench_step(settings, repeats, seed):
    """A config's training step, and the attention of one of its rows beside a dense mask."""
    dev = pick_device(settings['device'])
    amp = pick_dtype(settings['dtype'], dev)
    step = FullSizeStep(settings, dev, amp, seed)
    batch = step.batch
    (seconds,), (loss,) = interleave([step], repeats)
    speed, peak = flops(step.model, batch) / seconds, peak_flops(dev)
    mfu = f', MFU {speed / peak:.1%}' if peak else ''
    print(f"{settings['out_dir']}: {len(step.rows)} rows of {settings['seq_len']:,} tokens in {str(amp)[6:]}, recompute "
          f"{settings['recompute']}, compile {settings['compile']}: {seconds:.3f} s a step, "
          f'{batch.num_tokens / seconds:,.0f} tokens/s, {speed / 1e12:.2f} TFLOP/s{mfu}; loss {loss:.3f}')
    uses = ', '.join(f'{use} {n / 1e9:.2f}' for use, n in step.estimate().items())
    measured = f'peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, ' if dev.type == 'cuda' else ''
    print(f'memory: {measured}estimated {uses} GB', flush=True)
    if settings['seq_len'] > 8192:           # the dense mask alone would be gigabytes
        return
    t = step.model.config.language
    document_ids, branch_ids = batch.document_ids[:1], batch.branch_ids[:1]
    del step
    bench_attention(t, document_ids, branch_ids, settings['seq_len'], dev, amp, repeats)


def bench_attention(config, document_ids, branch_ids, seq_len, dev, amp, repeats):
    if dev.type == 'cuda':
        name, fast = 'FlexAttention', block_mask(document_ids, branch_ids)
    else:
        name, fast = 'by segments', PackedTreeAttention(document_ids, branch_ids)
    dense = dense_mask(document_ids, branch_ids)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = [torch.randn(1, n, seq_len, config.head_dim, device=dev, dtype=amp, requires_grad=True) for n in heads]

    def attend(mask):
        out = attention(*qkv, mask)
        gradients = torch.autograd.grad(out, qkv, torch.ones_like(out))
        return [x.sum().item() for x in (out, *gradients)]
    seconds, sums = interleave([lambda: attend(fast), lambda: attend(dense)], repeats)
    print(f'attention of one row, forward and backward: {name} {seconds[0] * 1e3:.1f} ms, SDPA with a dense mask '
          f'{seconds[1] * 1e3:.1f} ms, {seconds[1] / seconds[0]:.1f} times as long; sums {sums[0][0]:.4g} and '
          f'{sums[1][0]:.4g}')


# --------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--against', choices=['transformers'])
    parser.add_argument('--data', action='store_true', help='reading pictures and videos, nothing else')
    parser.add_argument('--packing', metavar='CONFIG', help='how full rows are, and what that is worth')
    parser.add_argument('--step', metavar='CONFIG', help='a training step at full size')
    parser.add_argument('--gpu', action='store_true', help='kernels, steps, data and answers on a GPU')
    parser.add_argument('--seconds', type=float, default=210, help='of --gpu')
    parser.add_argument('--parts', default='', help='of --gpu: names with commas; default: all')
    parser.add_argument('--size', default='tiny,small')
    parser.add_argument('--what', default='train,generate')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=0, help="0: torch's own choice")
    parser.add_argument('--seed', type=int, default=0)
    args, settings = parser.parse_known_args()
    if args.gpu:
        from extra import gpu_bench, timed_parts         # kernels and steps of a GPU, each part in its own time
        raise SystemExit(timed_parts.main(gpu_bench.PARTS, args.seconds))
    if settings and not (args.packing or args.step):
        parser.error(f'unknown argument {settings[0]}')
    benches = {'train': bench_train, 'generate': bench_generate}
    for value, known in ((args.size, SIZES), (args.what, benches)):
        for name in value.split(','):
            if name not in known:
                raise UserError(f"'{name}' is not one of {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    version = f'torch {torch.__version__}'
    if args.against:
        import transformers
        version += f', transformers {transformers.__version__}'
    dtype = '' if args.packing or args.step else ', float32'
    print(f'{processor()}; {torch.get_num_threads()} threads{dtype}; {version}; commit {commit()}; median of '
          f'{args.repeats}, in turns')
    if args.data:
        bench_data(args.repeats)
    elif args.step:
        bench_step(configure(train_settings(), [args.step, *settings]), args.repeats, args.seed)
    elif args.packing:
        bench_packing(configure(train_settings(), [args.packing, *settings]), args.repeats, args.seed)
    else:
        print_row(['size', 'what', 'ours, tokens/s', 'theirs' if args.against else 'time', 'ratio', 'check'])
        print_row(['-' * width for width in (5, 22, 14, 14, 7, 22)])
        for size in args.size.split(','):
            for what in args.what.split(','):
                benches[what](size, args.against, args.repeats, args.seed)
        both = ' (both libraries together)' if args.against else ''
        print(f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB{both}')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        raise SystemExit(f'bench.py: {e}') from None
