"""How fast is it? Training steps and greedy generation at two sizes, alone or beside transformers.

    python bench.py                            throughput, FLOP/s and peak memory of this code
    python bench.py --against=transformers     the same work in transformers, same weights, same process, ratios
    python bench.py --data                     pictures and video frames a second and core, seeking beside decoding all
    python bench.py --packing=config/demo_stage2.py      how full rows are; useful tokens a second beside padding the
                                               same examples; share of a step that reading takes; --key=value too
    python bench.py --step=config/stage3.py    a training step at full size on this device, random weights and full rows:
                                               tokens a second, MFU, peak memory beside what model.py says; --key=value
    python bench.py --gpu --seconds=210        what a GPU makes of all this, a line of JSON a finding (extra/gpu_bench.py)
    options: --size=tiny,small  --what=train,generate  --repeats=5  --threads=N  --seed=0

The peer is LlavaForConditionalGeneration with its best plain settings: SDPA attention, fused AdamW, no attention mask
where no row is padded, logits for the text alone. Both sides hold identical float32 weights, get the same pictures and
the same text, and train every parameter; runs alternate (ours, theirs, ours, ...) and the medians are compared, so that
another load on the machine falls on both. Losses and generated tokens are compared too: a bench of two different
computations is worth nothing.
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
from configurator import configure, train_settings
from data import Example, Rows, collate, next_row, open_mixture, to_device, windows
from extra.hf import make_processor
from media import load_image, load_video, pyav
from model import VLM, UserError, attention, compile_blocks, make_config, make_mask, pick_device, pick_dtype
from extra.kernels import Segments
from extra.plan import memory_estimate, planned_model
from extra.hf import save_model

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


def make_batch(config, rows, text, seed=0):
    """Rows of one picture followed by `text` random tokens, all but the first of them learnt."""
    generator = torch.Generator().manual_seed(seed)
    grid, p = config.vision.image_size // config.vision.patch_size, config.vision.patch_size
    visual = grid * grid
    L = visual + text
    tokens = torch.full((rows, L), config.image_token_id)
    tokens[:, visual:] = torch.randint(16, config.language.vocab_size, (rows, text), generator=generator)
    pictures = torch.randint(0, 256, (rows, 3, grid * p, grid * p), dtype=torch.uint8, generator=generator)
    patches = pictures.view(rows, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1).reshape(rows, visual, -1)
    weights = torch.zeros(rows, L)
    weights[:, visual:-1] = 1
    positions = torch.arange(L).expand(rows, L)
    return dict(tokens=tokens, targets=tokens.roll(-1, 1), loss_weights=weights, position_ids=positions, causal=True,
                document_ids=torch.zeros_like(tokens), branch_ids=torch.zeros_like(tokens), grid=(grid, grid),
                patches=patches.contiguous(), pool_index=torch.arange(rows * visual)[:, None],
                visual_index=(tokens == config.image_token_id).flatten().nonzero()[:, 0],
                loss_index=weights.flatten().nonzero()[:, 0]), pictures


def make_model(size, seed):
    vision, language = SIZES[size]
    config = make_config(vision, language, pooling=1, image_token_id=1, video_token_id=2, eos_token_id=-1,
                         pad_token_id=0)
    model = VLM(config)
    model.init_weights(seed)
    return model


def open_in_transformers(model):
    """The same weights in transformers, through a checkpoint folder, and its identity layer frozen as ours has none."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        peer = transformers.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation='sdpa',
                                                                          dtype=torch.float32)
    peer.model.multi_modal_projector.linear_2.requires_grad_(False)
    return peer


def pixel_values(model, pictures):
    scale, shift = (x[:3, None, None] for x in (model.pixel_scale, model.pixel_shift))
    return pictures * scale + shift


def train_step(model, batch, lr=1e-4):
    """-> a function that does one step and returns its mean loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, fused=True)
    count = batch['loss_weights'].sum()

    def step():
        loss = model(batch)[0] / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def peer_train_step(peer, batch, pictures, pixels, lr=1e-4):
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr, fused=True)
    text = (batch['loss_weights'][0] > 0).sum().item() + 1
    labels = batch['tokens'][:, -text:].contiguous()

    def step():
        loss = peer(input_ids=batch['tokens'], pixel_values=pixels(pictures), labels=labels, logits_to_keep=text,
                    use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def generation(model, batch, n):
    return lambda: torch.stack(list(generate(model, batch, n)), 1)


def peer_generation(peer, batch, pictures, pixels, n):
    def run():
        out = peer.generate(input_ids=batch['tokens'], pixel_values=pixels(pictures), do_sample=False,
                            attention_mask=torch.ones_like(batch['tokens']), max_new_tokens=n,
                            eos_token_id=None, pad_token_id=0)
        return out[:, batch['tokens'].shape[1]:]
    return run


def interleave(runs, repeats):
    """Medians of the seconds of each run, taken in turns after one warm-up each, and what the warm-ups returned."""
    first = [run() for run in runs]
    seconds = [[] for _ in runs]
    for _ in range(repeats):
        for times, run in zip(seconds, runs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds], first


def flops_per_step(model, batch):
    """6 x weights x tokens for the linear layers (forward 2, backward 4) plus 12 x width x pairs for attention.

    Leaves out norms, activations and the softmax (< 1% at these widths); the decoder's pairs are halved: it is causal.
    """
    v, t = model.config.vision, model.config.language
    B, L = batch['tokens'].shape
    linear = {name: sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))
              for name, part in model.named_children() if name != 'lm_head'}
    patches = batch['patches'].shape[0] * batch['patches'].shape[1]
    products = (linear['vision_tower'] * patches + linear['multi_modal_projector'] * len(batch['visual_index'])
                + linear['language_model'] * B * L + t.vocab_size * t.hidden_size * len(batch['loss_index']))
    attention = (v.num_layers * v.hidden_size * patches * batch['patches'].shape[1]
                 + t.num_layers * t.num_heads * t.head_dim * B * L * L / 2)
    return 6 * products + 12 * attention


def commit():
    here = Path(__file__).parent
    run = subprocess.run(['git', '-C', here, 'describe', '--always', '--dirty'], capture_output=True, text=True)
    return run.stdout.strip() or 'unknown'


def processor():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    names = [x.split(':')[1].strip() for x in info.read_text().splitlines() if x.startswith('model name')] \
        if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def row(cells):
    print('| ' + ' | '.join(str(c).rjust(w) for c, w in zip(cells, (5, 22, 14, 14, 7, 22))) + ' |', flush=True)


def bench_train(size, against, repeats, seed):
    """Prints a line for each length of text."""
    for text in TEXT:
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, PICTURES, text, seed)
        runs = [train_step(model, batch)]
        if against:
            runs.append(peer_train_step(open_in_transformers(model), batch, pictures, lambda x: pixel_values(model, x)))
        seconds, first = interleave(runs, repeats)
        speed = [f"{batch['tokens'].numel() / s:,.0f}" for s in seconds]
        rest = [f'{seconds[1] / seconds[0]:.2f}', f'loss differs {abs(first[0] - first[1]):.1e}'] if against else [
            f'{seconds[0] * 1000:,.0f} ms', '', f'{flops_per_step(model, batch) / seconds[0] / 1e9:,.0f} GFLOP/s']
        row([size, f'step, {PICTURES} x {text} text', *speed, *rest])


def bench_generate(size, against, repeats, seed):
    """Prints two lines for each number of rows: how soon the first token comes, how fast the others follow."""
    for rows in (1, 8):
        model = make_model(size, seed)
        batch, pictures = make_batch(model.config, rows, PROMPT, seed)
        runs = [generation(model, batch, n) for n in (1, NEW_TOKENS)]
        if against:
            peer, pixels = open_in_transformers(model), lambda x: pixel_values(model, x)
            runs += [peer_generation(peer, batch, pictures, pixels, n) for n in (1, NEW_TOKENS)]
        seconds, said = interleave(runs, repeats)
        first, rest = seconds[::2], [b - a for a, b in zip(seconds[::2], seconds[1::2])]
        same = f'{(said[1] == said[3]).float().mean():.0%} of tokens equal' if against else ''
        for name, cells, s in ((f'first token, {rows} rows', [f'{1000 * s:,.0f} ms' for s in first], first),
                               ('the others', [f'{rows * (NEW_TOKENS - 1) / s:,.0f}' for s in rest], rest)):
            row([size, name, *cells, *([f'{s[1] / s[0]:.2f}', same] if against else ['', '', ''])])


def make_clip(path, seconds, rate=30, size=(640, 360)):
    """An H.264 file as cameras and sites make it: B-frames, a keyframe at most every 250 frames, noise and motion."""
    av = pyav()
    picture = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 4, 3), np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((size[0] * 2, size[1]), Image.Resampling.BICUBIC))
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('h264', rate=rate, options={'preset': 'veryfast'})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, 'yuv420p', 250
        for i in range(seconds * rate):
            x = i % size[0]                  # the camera pans
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:, x:x + size[0]]), 'rgb24')))
        out.mux(stream.encode())


def decode_all(path):
    """What a sampler that decodes everything does: every frame in RGB."""
    with pyav().open(str(path)) as container:
        return sum(1 for frame in container.decode(video=0) if frame.to_ndarray(format='rgb24') is not None)


def bench_data(repeats):
    """Reading, on one core: pictures, frames, and frames at two a second beside decoding every frame."""
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
        seconds, counts = interleave([pictures, frames(384), frames(16), lambda: decode_all(path)], repeats)
    print(f"pictures, JPEG 640 x 480 to 336 px          {50 / seconds[0]:>8,.0f} a second")
    for n, s in zip(counts[1:3], seconds[1:3]):
        print(f'{n:>3} frames of a 3-minute H.264 clip to 224 px {n / s:>6,.0f} a second {s:>8.2f} s, '
              f'{seconds[3] / s:.1f} times faster than decoding all {counts[3]:,} ({seconds[3]:.1f} s)')


# Rows of instruction tuning: rate (of config/molmo2_stage2.py's groups), what is seen, how many conversations, tokens
# of the middle answer. Counts and lengths are guesses by task, from one word to 2,000 tokens.
KINDS = [(.136, 'picture', 2, 150), (.227, 'picture', 4, 20), (.091, 'picture', 3, 60), (.045, 'video', 1, 700),
         (.137, 'video', 3, 25), (.136, 'video', 1, 600), (.136, 'video', 1, 80), (.09, 'text', 1, 400)]


def synthetic_lengths(rng, frames=128):
    """Endless (tokens, conversations) of made-up examples: 196 tokens a picture, one to five of them; 85 a frame, two a
    second of clips of 5 to 300 s; conversations of 20 tokens around an answer of 1 to 2,000."""
    rates = np.array([rate for rate, *_ in KINDS])
    while True:
        _, what, conversations, middle = KINDS[rng.choice(len(KINDS), p=rates / rates.sum())]
        n = rng.poisson(conversations - 1) + 1
        text = 20 * n + np.exp(rng.normal(np.log(middle), 1, n)).clip(1, 2000).astype(int).sum()
        seen = {'picture': 196 * rng.choice(5, p=[.8, .08, .06, .04, .02]) + 196, 'text': 0,
                'video': 85 * min(frames, int(2 * np.exp(rng.uniform(np.log(5), np.log(300)))) + 1)}[what]
        yield int(seen + text), n


def packed(examples, room):
    """Endless rows, lists of (tokens, conversations, ...) packed as `Loader` packs them."""
    pool = []
    while True:
        yield next_row(pool, examples, room, lambda e: e[0])


def tell_fill(what, rows, room):
    full = np.mean([sum(e[0] for e in row) for row in rows]) / room
    examples, talks = np.mean([len(row) for row in rows]), np.mean([sum(e[1] for e in row) for row in rows])
    print(f'{what}, rows of {room:,}: {full:.2%} full with {examples:.1f} examples and {talks:.1f} conversations; '
          f'one example a row would be {full / examples:.1%} full', flush=True)


def bench_packing(settings, repeats, seed):
    """How full rows are, of made-up lengths and of a config's data; a step on them beside the same examples padded."""
    for room, frames in ((16384, 128), (36864, 384)):
        examples = (e for e in synthetic_lengths(np.random.default_rng(seed), frames) if e[0] <= room)
        tell_fill('made-up lengths', list(itertools.islice(packed(examples, room), 500)), room)
    processor, config = make_processor(settings)
    mixture = open_mixture(settings['mixture'], settings['data_dir'], seed)
    read = (Rows(mixture, processor)[draw][1] for draw in mixture.draws())
    rows = packed(((len(e.tokens), max(e.branches), e) for e in read if not isinstance(e, dict)), processor.seq_len)
    next(rows)                               # fills the pool
    start = time.perf_counter()
    rows = list(itertools.islice(rows, 10 * settings['batch_size']))
    reading = (time.perf_counter() - start) / 10
    tell_fill(settings['out_dir'], rows, processor.seq_len)

    rows = [[e for *_, e in row] for row in rows[:settings['batch_size']]]
    alone = [[e] for row in rows for e in row]
    model, dev = VLM(config), torch.device('cpu')
    model.init_weights(seed)
    model.set_trained(settings)
    amp = pick_dtype(settings['dtype'], dev)
    print(f'steps in {str(amp)[6:]}, random weights:')
    batches = [collate(r, processor, length) for r, length in
               ((rows, processor.seq_len), (alone, 0), (alone, processor.seq_len))]
    with torch.autocast('cpu', amp, enabled=amp != torch.float32):
        seconds, losses = interleave([train_step(model, batch, 0.) for batch in batches], repeats)
    useful = batches[0]['n_tokens']
    for name, batch, s, loss in zip(('packed', 'padded to the longest', f'padded to {processor.seq_len:,}'), batches,
                                    seconds, losses):
        print(f"a step on {useful:,} tokens {name + ',':<23} {batch['tokens'].numel():>7,} places: {s:.3f} s, "
              f'{useful / s:>6,.0f} useful tokens/s, packed is {s / seconds[0]:.2f} times as fast; loss {loss:.4f}')
    print(f'reading them takes {reading:.3f} s on one core, {reading / (reading + seconds[0]):.1%} of reading and step')


def made_up_rows(settings, processor, rng):
    """Rows of exactly seq_len: packed ones a clip of max_frames, then pictures with three conversations each, then text;
    else one picture and conversations about it."""
    def example(crops, grid, k, talks):
        e, visual = Example(), 0
        if crops:
            index, n = windows(grid, k), grid[0] * grid[1]
            e.grid, visual = grid, crops * len(index)
            e.patches = rng.integers(0, 256, (crops, n, processor.patch_dim), dtype=np.uint8)
            e.pool_index = np.concatenate([np.where(index < 0, -1, index + i * n) for i in range(crops)])
            e.visual_index = np.arange(visual)
        for branch, n in enumerate([visual, *talks]):
            e.tokens += rng.integers(0, 1000, n).tolist()
            e.weights += [float(branch > 0 and i > n // 3) for i in range(n)]
            e.positions += range(visual, visual + n) if branch else range(n)
            e.branches, e.tasks = e.branches + [branch] * n, e.tasks + [0] * n
        return e

    def row():
        k, room, out = settings['pooling'], settings['seq_len'], []
        seen = len(windows(processor.grid, k))
        if not settings['packing']:
            return [example(1, processor.grid, k, [(room - seen) // 4] * 3 + [room - seen - (room - seen) // 4 * 3])]
        per_frame = len(windows(processor.frame_grid, settings['video_pooling']))
        frames = min(settings['max_frames'], (room - 200) // per_frame)
        out.append(example(frames, processor.frame_grid, settings['video_pooling'], [120, 40, 40]))
        while (left := room - sum(len(e.tokens) for e in out)) > seen + 180:
            out.append(example(1, processor.grid, k, [120, 40, 20]))
        return out + [example(0, None, 0, [left])]
    return [row() for _ in range(settings['batch_size'])]


@torch.no_grad()
def random_weights(model):
    """Small numbers drawn on the model's own device: a billion of them on a CPU would take longer than the bench."""
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
    return SimpleNamespace(pad=0, patch_dim=3 * p * p, grid=(settings['image_size'] // p,) * 2,
                           frame_grid=(settings['video_size'] // p,) * 2)


def bench_step(settings, repeats, seed):
    """A config's training step, by train.py's own functions, and the attention of its rows beside a dense mask."""
    vars(train).update(settings, settings=settings)
    dev, model = pick_device(settings['device']), train.set_trained(planned_model(settings))
    amp = pick_dtype(settings['dtype'], dev)
    model.to_empty(device=dev)
    model.set_buffers(dev)
    random_weights(model)
    if settings['compile']:
        compile_blocks(model, settings['memory_budget'])
    optimizers = train.make_optimizers(model.train())
    processor = shapes_of(settings, model)
    rows = made_up_rows(settings, processor, np.random.default_rng(seed))
    batch = to_device(collate(rows, processor, settings['seq_len']), dev)
    autocast = torch.autocast(dev.type, amp, enabled=amp != torch.float32)

    def step():
        loss, _ = train.backward(model, model, [batch], autocast)
        train.step_optimizers(optimizers, 0)
        return loss.item()
    (seconds,), (loss,) = interleave([step], repeats)
    speed, peak = train.flops(model, batch) / seconds, train.peak_flops(dev)
    print(f"{settings['out_dir']}: {len(rows)} rows of {settings['seq_len']:,} tokens in {str(amp)[6:]}, recompute "
          f"{settings['recompute']}, compile {settings['compile']}: {seconds:.3f} s a step, "
          f"{batch['n_tokens'] / seconds:,.0f} tokens/s, {speed / 1e12:.2f} TFLOP/s"
          + (f', MFU {speed / peak:.1%}' if peak else '') + f'; loss {loss:.3f}')
    patches = sum(batch[x].shape[0] * batch[x].shape[1] for x in ('patches', 'frames') if x in batch)
    memory = memory_estimate(model, len(rows), settings['seq_len'], settings['recompute'], amp, patches / len(rows),
                             compiled=settings['compile'])
    print('memory: ' + (f'peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, ' if dev.type == 'cuda' else '')
          + 'estimated ' + ', '.join(f'{k} {v / 1e9:.2f}' for k, v in memory.items()) + ' GB', flush=True)

    if settings['seq_len'] > 8192:           # the dense mask alone would be gigabytes
        return
    t, ids = model.config.language, [batch[x][:1] for x in ('document_ids', 'branch_ids')]
    del model, optimizers
    masks = [make_mask(*ids) if dev.type == 'cuda' else Segments(*ids), make_mask(*(x.cpu() for x in ids)).to(dev)]
    qkv = [torch.randn(1, n, settings['seq_len'], t.head_dim, device=dev, dtype=amp, requires_grad=True)
           for n in (t.num_heads, t.num_kv_heads, t.num_kv_heads)]

    def attend(mask):
        out = attention(*qkv, mask)
        return [x.sum().item() for x in (out, *torch.autograd.grad(out, qkv, torch.ones_like(out)))]
    seconds, sums = interleave([lambda m=m: attend(m) for m in masks], repeats)
    print(f"attention of one row, forward and backward: {'FlexAttention' if dev.type == 'cuda' else 'by segments'} "
          f'{seconds[0] * 1e3:.1f} ms, SDPA with a dense mask {seconds[1] * 1e3:.1f} ms, '
          f'{seconds[1] / seconds[0]:.1f} times as '
          f'long; sums {sums[0][0]:.4g} and {sums[1][0]:.4g}')


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
        from extra import gpu_bench, timed_parts       # kernels and steps of a GPU, each part in its own time
        raise SystemExit(timed_parts.main(gpu_bench.PARTS, args.seconds))
    if settings and not (args.packing or args.step):
        parser.error(f'unknown argument {settings[0]}')
    for value, known in ((args.size, SIZES), (args.what, ('train', 'generate'))):
        if unknown := [x for x in value.split(',') if x not in known]:
            raise UserError(f"'{unknown[0]}' is not one of {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    version = ''
    if args.against:
        import transformers
        version = f', transformers {transformers.__version__}'
    print(f"{processor()}; {torch.get_num_threads()} threads{'' if args.packing or args.step else ', float32'}; "
          f"torch {torch.__version__}{version}; commit {commit()}; median of {args.repeats}, in turns")
    if args.data:
        return bench_data(args.repeats)
    if args.step:
        return bench_step(configure(train_settings(), [args.step, *settings]), args.repeats, args.seed)
    if args.packing:
        return bench_packing(configure(train_settings(), [args.packing, *settings]), args.repeats, args.seed)
    row(['size', 'what', 'ours, tokens/s', 'theirs' if args.against else 'time', 'ratio', 'check'])
    row(['-' * w for w in (5, 22, 14, 14, 7, 22)])
    for size in args.size.split(','):
        for what in args.what.split(','):
            {'train': bench_train, 'generate': bench_generate}[what](size, args.against, args.repeats, args.seed)
    print(f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB'
          + (' (both libraries together)' if args.against else ''))


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        raise SystemExit(f'bench.py: {e}') from None
