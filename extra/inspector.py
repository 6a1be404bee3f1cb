"""What the model gets, for a person to look at: `python data.py CONFIG` writes a page, --check=FOLDER reads every row.
"""
import html
import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configurator import UserError
from data import POOL, TASKS, Dataset, Rows, best_fit, open_mixture
from extra.hf import make_processor
from extra.plan import mixture_table
from media import BadRow, data_url, draw_points, enlarge, points_at
from model import make_mask


STYLE = """<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.t{border-radius:3px;padding:1px 0;border-right:1px solid #0002} .v{background:#cfe3ff} .s{color:#888}
img{max-width:24em;image-rendering:auto;border:1px solid #ccc;vertical-align:top} h2{font-size:1em;margin-top:2em}
pre,.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;margin:.4em 0}
table{border-collapse:collapse} td,th{padding:2px 10px;text-align:right} td:first-child,th:first-child{text-align:left}
</style>"""


def as_model_sees(patches, grid, points=(), scale=1):
    """Patches of one crop [num_patches, patch_dim] put back together, with points drawn: shape and order show."""
    (rows, columns), p = grid, math.isqrt(patches.shape[1] // 3)
    pixels = patches.reshape(rows, columns, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * p, columns * p, 3)
    size = columns * p * scale, rows * p * scale
    return draw_points(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), points)


def tokens_html(example, processor):
    """Every token as a coloured box: green by loss weight, blue and counted for visual tokens, a line per branch."""
    top = max(example.weights) or 1
    lines, visual, branch = [''], 0, 0
    for token, weight, b in zip([*example.tokens, None], [*example.weights, 0], [*example.branches, 0]):
        if token in (processor.image_pad, processor.video_pad):
            visual += 1
            continue
        if visual:
            lines[-1] += f'<span class="t v">&#9635; &times; {visual}</span>'
            visual = 0
        if token is None:
            break
        if b != branch:
            lines.append('')
            branch = b
        text = processor.tokenizer.decode([token], skip_special_tokens=False)
        shade = f'background:rgba(40,170,70,{.15 + .6 * weight / top:.2f})' if weight else ''
        special = ' s' if token in (processor.im_start, processor.im_end) else ''
        lines[-1] += (f'<span class="t{special}" style="{shade}" title="id {token}, loss weight {weight:.3g}">'
                      f'{html.escape(text)}</span>')
    return ''.join(f'<div class="tokens">{line}</div>' for line in lines)


def mask_picture(examples, length, visual_ids, side=512):
    """A packed row and what its tokens see: above, a colour a document, pale where it is seen or asked, strong where
    it answers; below, coloured where the token of that row of pixels sees the one of that column. Every n-th token."""
    tokens, weights, documents, branches = (np.full(length, fill) for fill in (-1, 0., -1, 0))
    start = 0
    for i, e in enumerate(examples):
        here = slice(start, start := start + len(e.tokens))
        tokens[here], weights[here], documents[here], branches[here] = e.tokens, e.weights, i, e.branches
    at = np.arange(0, length, -(-length // side))
    ids = [torch.from_numpy(x[at][None]) for x in (documents, branches)]
    visual = torch.from_numpy(np.isin(tokens[at], visual_ids)[None]) if visual_ids else None
    sees = make_mask(*ids, visual)[0, 0].numpy() & (documents[at] >= 0)
    colours = np.array([(230, 80, 60), (60, 130, 220), (60, 170, 90), (200, 140, 30), (150, 80, 190)])
    colour = np.where(documents[at, None] < 0, 0, colours[documents[at] % len(colours)])
    strip = np.where(weights[at, None] > 0, colour, 255 - (255 - colour) // 3)
    below = np.where(sees[..., None], 255 - (255 - colour[None]) // 2, 20)
    pixels = np.concatenate([np.tile(strip, (12, 1, 1)), below])
    return enlarge(Image.fromarray(pixels.astype(np.uint8)), side)


def inspect(settings, number=12):
    """Prints a config's mixture and a few examples of it; writes <out_dir>/inspect.html."""
    from tqdm import tqdm
    table = lambda examples: mixture_table(settings['mixture'], settings['data_dir'], examples)
    rows = settings['max_steps'] * settings['batch_size'] * settings['accumulation']
    if not settings['mixture']:
        raise UserError("mixture is empty; give a config: python data.py config/demo_stage1.py")
    if (lines := table(rows))[-1].startswith('*'):
        print('\n'.join(lines))
        return print(f'the draws are those of {rows:,} examples; nothing to look at before the data is there')
    processor, config = make_processor(settings)
    mixture = open_mixture(settings['mixture'], settings['data_dir'], settings['seed'])
    loss, weights, skipped, examples, page = Counter(), Counter(), Counter(), [], []
    reader = Rows(mixture, processor)
    for draw in tqdm(itertools.islice(mixture.draws(), 200), total=200, unit='row', disable=None):
        dataset = mixture.datasets[draw[1]]
        _, example = reader[draw]
        if isinstance(example, dict):
            skipped[f"{dataset.name}: {example['reason']}"] += 1
            tqdm.write(f"skipped {example['row']}: {example['problem']}")
            continue
        examples.append(example)
        for task, weight in zip(example.tasks, example.weights):
            if weight:
                loss[TASKS[task]] += 1
                weights[TASKS[task]] += weight
        if len(examples) <= number:
            page.append(example_html(example, dataset, draw, processor))
        if len(examples) <= 3:
            told = [t for t in example.tokens if t not in (processor.image_pad, processor.video_pad)]
            print(f'\ndraw {draw[0]}: {dataset.where(draw[2])}, {len(example.tokens)} tokens\n'
                  + processor.tokenizer.decode(told, skip_special_tokens=False))
    lengths = [len(e.tokens) for e in examples] or [0]
    if settings['packing'] and examples:
        rows = int(rows * processor.seq_len / np.mean(lengths))
    lines = table(rows) + ['', f"{'task':<16}{'loss tokens':>12}{'share of loss weight':>22}"]
    lines += [f'{t:<16}{n:>12,}{weights[t] / sum(weights.values()):>22.1%}' for t, n in loss.most_common()]
    lines += ['', f'tokens an example: mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}, '
                  f'most {max(lengths)} of seq_len {processor.seq_len}']
    lines += [f'skipped {reason}: {n}' for reason, n in skipped.items()]
    print('\n' + '\n'.join(lines))
    head = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(settings['out_dir'])}</title>{STYLE}",
            '<pre>' + html.escape('\n'.join(lines)) + '</pre>',
            '<p>Blue: visual tokens. Green: tokens with a loss, darker with its weight. One line a conversation: each '
            'sees the first line and itself. Hover for ids and weights.</p>']
    if settings['packing'] and examples:
        row = [examples[i] for i in best_fit(lengths[:POOL], processor.seq_len)]
        picture = mask_picture(row, processor.seq_len, config.visual_token_ids)
        head.append(f'<p>{len(row)} examples packed into a row, {sum(len(e.tokens) for e in row)} of '
                    f'{processor.seq_len} tokens, and which token (down) sees which (across): a colour a document, '
                    f'strong where it answers.</p><img style="max-width:none" src="{data_url(picture)}">')
    out = Path(settings['out_dir'])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'inspect.html').write_text('\n'.join(head + page), encoding='utf-8')
    print(f'\nwrote {out}/inspect.html')


def example_html(example, dataset, draw, processor):
    """What the model gets of one row: its pictures or frames with the points on them, and its tokens."""
    record = dataset[draw[2]]
    page = [f'<h2>draw {draw[0]}: {html.escape(dataset.where(draw[2]))}, {len(example.tokens)} tokens, '
            f'{len(record["conversations"])} conversations</h2>']
    points = [p for c in record['conversations'] for m in c['messages']
              for p in (m.get('points') or {}).get('points', ())]
    scale = max(1, (128 if example.times else 256) // processor.image_size)
    for i, patches in enumerate(example.patches if example.patches is not None else ()):
        here = points_at(points, example.times[i]) if example.times else [p for p in points if p.get('image', 0) == i]
        page.append(f'<img src="{data_url(as_model_sees(patches, example.grid, here, scale))}">')
    return '\n'.join(page + [tokens_html(example, processor)])


def suspicions(record, example):
    """Yields what can be used but was perhaps not meant, one line each."""
    left_out = len(record['conversations']) - max(example.branches)
    if left_out:
        yield 'left out', f'{left_out} of {len(record["conversations"])} conversations do not fit'
    if repeated := [path for path, n in Counter(record['images']).items() if n > 1]:
        yield 'repeated picture', repeated[0]
    for message in (m for c in record['conversations'] for m in c['messages']):
        points = (message.get('points') or {}).get('points', [])
        if message['role'] == 'assistant' and not message['content'] and message.get('points') is None:
            yield 'empty answer', 'an assistant turn without content or points'
        if mark := re.search(r'<(image|video)>', message['content']):
            yield 'mark in the text', f'{mark[0]} inside a message stays text'
        if any(not 0 <= p[k] <= 1 for p in points for k in 'xy'):
            yield 'point outside', 'a point beyond the border is moved to it'
        if len({(p['x'], p['y'], p.get('t'), p.get('image')) for p in points}) < len(points):
            yield 'repeated point', 'two points at one place'
        if late := [p['t'] for p in points if 't' in p and example.times and p['t'] > example.times[-1] + .5]:
            yield 'late point', f'a point at {late[0]} s in a clip of {example.times[-1]:.1f} s'


def check(path, settings):
    """Reads every row of a dataset as training would and says what is wrong or odd: counts, and the first few."""
    from tqdm import tqdm
    processor, path = make_processor(settings)[0], Path(path)
    splits = [path.stem] if path.suffix == '.jsonl' else [p.stem for p in sorted(path.glob('*.jsonl'))]
    if not splits:
        raise UserError(f'{path} holds no .jsonl file')
    for split in splits:
        dataset = Dataset(path.parent if path.suffix == '.jsonl' else path, split)
        odd, tasks, lengths, answers = Counter(), Counter(), [], []

        def tell(row, kind, what):
            odd[kind] += 1
            if odd[kind] <= 5:
                tqdm.write(f'{dataset.where(row)}: {kind}: {what}')
        for row in tqdm(range(dataset.rows), unit='row', desc=split, disable=None):
            try:
                record = dataset[row]
                tasks.update(c.get('task', 'other') for c in record['conversations'])
                example = processor.example(record, dataset.folder)
            except BadRow as e:
                tell(row, e.reason, e)
                continue
            lengths.append(len(example.tokens))
            answers.append(max(Counter(b for b, w in zip(example.branches, example.weights) if w).values()))
            if answers[-1] > processor.seq_len // 2:
                tell(row, 'long answer', f'{answers[-1]} tokens')
            for kind, what in suspicions(record, example):
                tell(row, kind, what)
        print(f'{dataset.path}: {dataset.rows:,} rows, {len(lengths):,} usable; conversations: '
              + (', '.join(f'{t} {n:,}' for t, n in tasks.most_common()) or 'none'))
        for name, n in (('row', lengths), ('longest answer of a row', answers)):
            if n:
                print(f'  tokens a {name}: median {np.median(n):.0f}, 99% {np.quantile(n, .99):.0f}, most {max(n)}'
                      f' (seq_len {processor.seq_len})')
        for kind, n in odd.most_common():
            print(f'  {kind}: {n:,}')


def main():
    from configurator import configure, train_settings
    paths = [arg.partition('=')[2] for arg in sys.argv[1:] if arg.startswith('--check=')]
    settings = configure(train_settings(), [arg for arg in sys.argv[1:] if not arg.startswith('--check=')])
    if paths:
        check(paths[0], settings)
    else:
        inspect(settings)
