"""What the model gets, for a person to look at.

    python data.py config/demo_stage1.py               `inspect`: the mixture, and a page of examples: pictures with their
                                                       points, every token with its loss weight, a packed row and its mask
    python data.py CONFIG --check=data/mine            `check`: every row read as training would; what is wrong or odd
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
from tqdm import tqdm

from configurator import UserError, configure, train_settings
from data import PACKING_POOL, TASKS, Dataset, ExampleDataset, RowProblem, best_fit, open_mixture
from extra.hf import make_processor
from extra.plan import mixture_table
from media import BadRow, data_url, draw_points, enlarge, points_at
from model import dense_mask

STYLE = """<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.t{border-radius:3px;padding:1px 0;border-right:1px solid #0002} .v{background:#cfe3ff} .s{color:#888}
img{max-width:24em;image-rendering:auto;border:1px solid #ccc;vertical-align:top} h2{font-size:1em;margin-top:2em}
pre,.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;margin:.4em 0}
table{border-collapse:collapse} td,th{padding:2px 10px;text-align:right} td:first-child,th:first-child{text-align:left}
</style>"""


# --------------------------------------------------------------------------------------------------
# Pictures and tokens of an example

def as_model_sees(patches, grid, points=(), scale=1):
    """The patches of one crop [num_patches, patch_dim] put back together, with points drawn: shape
    and order show."""
    rows, columns = grid
    p = math.isqrt(patches.shape[1] // 3)                # pixels a side of a patch
    pixels = patches.reshape(rows, columns, p, p, 3).transpose(0, 2, 1, 3, 4)    # [rows, p, columns, p, 3]
    image = Image.fromarray(pixels.reshape(rows * p, columns * p, 3))
    size = (columns * p * scale, rows * p * scale)
    return draw_points(image.resize(size, Image.Resampling.NEAREST), points)


def tokens_html(example, processor):
    """Every token as a coloured box: green by loss weight, blue and counted for visual tokens, a
    line for each branch."""
    placeholders = (processor.image_pad, processor.video_pad)
    special = (processor.im_start, processor.im_end)
    highest = max(example.weights) or 1
    lines = ['']
    branch = 0
    visual = 0                               # placeholders in a row that are not written yet

    def write_visual():
        if visual:
            lines[-1] += f'<span class="t v">&#9635; &times; {visual}</span>'
    for token, weight, b in zip(example.tokens, example.weights, example.branches):
        if token in placeholders:
            visual += 1
            continue
        write_visual()
        visual = 0
        if b != branch:
            lines.append('')
            branch = b
        text = html.escape(processor.tokenizer.decode([token], skip_special_tokens=False))
        shade = ''
        if weight:
            shade = f'background:rgba(40,170,70,{.15 + .6 * weight / highest:.2f})'
        kind = 't s' if token in special else 't'
        lines[-1] += f'<span class="{kind}" style="{shade}" title="id {token}, loss weight {weight:.3g}">{text}</span>'
    write_visual()
    return ''.join(f'<div class="tokens">{line}</div>' for line in lines)


def example_html(example, dataset, draw, processor):
    """What the model gets of one row: its pictures or frames with the points on them, and its
    tokens."""
    record = dataset[draw[2]]
    number = len(record['conversations'])
    page = [f'<h2>draw {draw[0]}: {html.escape(dataset.where(draw[2]))}, {len(example.tokens)} tokens, '
            f'{number} conversations</h2>']
    points = []
    for message in messages_of(record):
        if message.get('points'):
            points += message['points'].get('points', ())
    is_video = len(example.times) > 0
    scale = max(1, (128 if is_video else 256) // processor.image_size)
    crops = [] if example.patches is None else example.patches
    for i, patches in enumerate(crops):
        if is_video:
            shown = points_at(points, example.times[i])
        else:
            shown = [p for p in points if p.get('image', 0) == i]
        page.append(f'<img src="{data_url(as_model_sees(patches, example.grid, shown, scale))}">')
    page.append(tokens_html(example, processor))
    return '\n'.join(page)


def messages_of(record):
    for conversation in record['conversations']:
        yield from conversation['messages']


def mask_picture(examples, length, visual_ids, side=512):
    """A packed row and what its tokens attend to. Above, a colour for each document, pale in its
    prefix and questions, strong in its answers; below, coloured where the token of that row of
    pixels attends to the one of that column. Of a long row every n-th token is shown."""
    tokens = np.full(length, -1)
    weights = np.zeros(length)
    documents = np.full(length, -1)
    branches = np.zeros(length, np.int64)
    start = 0
    for i, e in enumerate(examples):
        end = start + len(e.tokens)
        tokens[start:end] = e.tokens
        weights[start:end] = e.weights
        documents[start:end] = i
        branches[start:end] = e.branches
        start = end
    shown = np.arange(0, length, -(-length // side))
    tokens, weights, documents, branches = tokens[shown], weights[shown], documents[shown], branches[shown]
    visual = None
    if visual_ids:
        visual = torch.from_numpy(np.isin(tokens, visual_ids)[None])
    attends = dense_mask(torch.from_numpy(documents[None]), torch.from_numpy(branches[None]), visual)[0, 0].numpy()
    attends = attends & (documents >= 0)
    colours = np.array([(230, 80, 60), (60, 130, 220), (60, 170, 90), (200, 140, 30), (150, 80, 190)])
    colour = np.where(documents[:, None] < 0, 0, colours[documents % len(colours)])     # [shown, 3]
    pale = 255 - (255 - colour) // 3
    strip = np.where(weights[:, None] > 0, colour, pale)
    half = 255 - (255 - colour[None]) // 2
    below = np.where(attends[..., None], half, 20)                               # [shown, shown, 3]
    pixels = np.concatenate([np.tile(strip, (12, 1, 1)), below])
    return enlarge(Image.fromarray(pixels.astype(np.uint8)), side)


# --------------------------------------------------------------------------------------------------
# A config's data

def inspect(settings, number=12):
    """Prints a config's mixture and a few examples of it; writes <out_dir>/inspect.html."""
    draws = settings['max_steps'] * settings['batch_size'] * settings['accumulation']
    if not settings['mixture']:
        raise UserError("mixture is empty; give a config: python data.py config/demo_stage1.py")
    lines = mixture_table(settings['mixture'], settings['data_dir'], draws)
    if lines[-1].startswith('*'):
        print('\n'.join(lines))
        print(f'the draws are those of {draws:,} examples; nothing to look at before the data is there')
        return
    processor, config = make_processor(settings)
    mixture = open_mixture(settings['mixture'], settings['data_dir'], settings['seed'])
    examples, skipped, page = read_some(mixture, processor, number)
    lengths = [len(e.tokens) for e in examples] or [0]
    if settings['packing'] and examples:     # a row holds several
        draws = int(draws * processor.seq_len / np.mean(lengths))
    lines = mixture_table(settings['mixture'], settings['data_dir'], draws) + ['', *task_table(examples)]
    lines += ['', f'tokens an example: mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}, '
                  f'most {max(lengths)} of seq_len {processor.seq_len}']
    lines += [f'skipped {reason}: {times}' for reason, times in skipped.items()]
    print('\n' + '\n'.join(lines))
    head = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(settings['out_dir'])}</title>{STYLE}",
            '<pre>' + html.escape('\n'.join(lines)) + '</pre>',
            '<p>Blue: visual tokens. Green: tokens with a loss, darker with its weight. One line a conversation: each '
            'sees the first line and itself. Hover for ids and weights.</p>']
    if settings['packing'] and examples:
        head.append(packed_row_html(examples, processor, config.visual_token_ids))
    out = Path(settings['out_dir'])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'inspect.html').write_text('\n'.join(head + page), encoding='utf-8')
    print(f'\nwrote {out}/inspect.html')


def read_some(mixture, processor, number, draws=200):
    """Reads the first draws of a mixture. Returns (Examples, Counter of why rows could not be used,
    HTML of the first `number` of them), and prints the text of the first three."""
    examples, skipped, page = [], Counter(), []
    reader = ExampleDataset(mixture, processor)
    for draw in tqdm(itertools.islice(mixture.draws(), draws), total=draws, unit='row', disable=None):
        dataset = mixture.datasets[draw[1]]
        _, example = reader[draw]
        if isinstance(example, UserError):
            raise example
        if isinstance(example, RowProblem):
            skipped[f'{dataset.name}: {example.reason}'] += 1
            tqdm.write(f'skipped {example.row}: {example.problem}')
            continue
        examples.append(example)
        if len(examples) <= number:
            page.append(example_html(example, dataset, draw, processor))
        if len(examples) <= 3:
            text = [t for t in example.tokens if t not in (processor.image_pad, processor.video_pad)]
            print(f'\ndraw {draw[0]}: {dataset.where(draw[2])}, {len(example.tokens)} tokens\n'
                  + processor.tokenizer.decode(text, skip_special_tokens=False))
    return examples, skipped, page


def task_table(examples):
    """Lines: how many tokens of each task have a loss, and its share of all loss weight."""
    number, weights = Counter(), Counter()
    for example in examples:
        for task, weight in zip(example.tasks, example.weights):
            if weight:
                number[TASKS[task]] += 1
                weights[TASKS[task]] += weight
    total = sum(weights.values())
    lines = [f"{'task':<16}{'loss tokens':>12}{'share of loss weight':>22}"]
    for task, n in number.most_common():
        lines.append(f'{task:<16}{n:>12,}{weights[task] / total:>22.1%}')
    return lines


def packed_row_html(examples, processor, visual_ids):
    pool = examples[:PACKING_POOL]
    row = [pool[i] for i in best_fit([len(e.tokens) for e in pool], processor.seq_len)]
    picture = mask_picture(row, processor.seq_len, visual_ids)
    tokens = sum(len(e.tokens) for e in row)
    return (f'<p>{len(row)} examples packed into a row, {tokens} of {processor.seq_len} tokens, and which token (down) sees '
            f'which (across): a colour a document, strong where it answers.</p>'
            f'<img style="max-width:none" src="{data_url(picture)}">')


# --------------------------------------------------------------------------------------------------
# Checking a data set

def suspicions(record, example):
    """Yields (kind, what) of what can be used but was perhaps not meant."""
    conversations = len(record['conversations'])
    left_out = conversations - max(example.branches)
    if left_out:
        yield 'left out', f'{left_out} of {conversations} conversations do not fit'
    for path, times in Counter(record['images']).items():
        if times > 1:
            yield 'repeated picture', path
            break
    for message in messages_of(record):
        yield from message_suspicions(message, example)


def message_suspicions(message, example):
    points = (message.get('points') or {}).get('points', [])
    if message['role'] == 'assistant' and not message['content'] and message.get('points') is None:
        yield 'empty answer', 'an assistant turn without content or points'
    mark = re.search(r'<(image|video)>', message['content'])
    if mark:
        yield 'mark in the text', f'{mark[0]} inside a message stays text'
    if any(not 0 <= p['x'] <= 1 or not 0 <= p['y'] <= 1 for p in points):
        yield 'point outside', 'a point beyond the border is moved to it'
    places = {(p['x'], p['y'], p.get('t'), p.get('image')) for p in points}
    if len(places) < len(points):
        yield 'repeated point', 'two points at one place'
    if example.times:
        end = example.times[-1]
        late = [p['t'] for p in points if p['t'] > end + .5]
        if late:
            yield 'late point', f'a point at {late[0]} s in a clip of {end:.1f} s'


def check(path, settings):
    """Reads every row of a data set as training would and says what is wrong or odd: counts, and
    the first few of a kind. path: a folder, or one .jsonl file of it."""
    processor, _ = make_processor(settings)
    path = Path(path)
    if path.suffix == '.jsonl':
        datasets = [Dataset(path.parent, path.stem)]
    else:
        datasets = [Dataset(path, file.stem) for file in sorted(path.glob('*.jsonl'))]
    if not datasets:
        raise UserError(f'{path} holds no .jsonl file')
    for dataset in datasets:
        check_split(dataset, processor)


def check_split(dataset, processor):
    odd, tasks = Counter(), Counter()
    lengths, longest_answers = [], []

    def report(row, kind, what):
        odd[kind] += 1
        if odd[kind] <= 5:
            tqdm.write(f'{dataset.where(row)}: {kind}: {what}')
    for row in tqdm(range(dataset.rows), unit='row', desc=dataset.path.stem, disable=None):
        try:
            record = dataset[row]
            tasks.update(conversation.get('task', 'other') for conversation in record['conversations'])
            example = processor.example(record, dataset.folder)
        except BadRow as e:
            report(row, e.reason, e)
            continue
        lengths.append(len(example.tokens))
        answer_tokens = Counter(branch for branch, weight in zip(example.branches, example.weights) if weight)
        longest_answers.append(max(answer_tokens.values()))
        if longest_answers[-1] > processor.seq_len // 2:
            report(row, 'long answer', f'{longest_answers[-1]} tokens')
        for kind, what in suspicions(record, example):
            report(row, kind, what)
    by_task = ', '.join(f'{task} {n:,}' for task, n in tasks.most_common())
    print(f'{dataset.path}: {dataset.rows:,} rows, {len(lengths):,} usable; conversations: {by_task or "none"}')
    for name, numbers in (('row', lengths), ('longest answer of a row', longest_answers)):
        if numbers:
            print(f'  tokens a {name}: median {np.median(numbers):.0f}, 99% {np.quantile(numbers, .99):.0f}, '
                  f'most {max(numbers)} (seq_len {processor.seq_len})')
    for kind, n in odd.most_common():
        print(f'  {kind}: {n:,}')


def main():
    """python data.py."""
    paths, rest = [], []
    for arg in sys.argv[1:]:
        if arg.startswith('--check='):
            paths.append(arg.partition('=')[2])
        else:
            rest.append(arg)
    settings = configure(train_settings(), rest)
    if paths:
        check(paths[0], settings)
    else:
        inspect(settings)
