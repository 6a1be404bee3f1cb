"""Shows a person what the model gets.

    python data.py config/demo.py
        `inspect`: prints the mixture and writes a page of examples: pictures with their points,
        every token with its loss weight, a packed row and its mask
    python data.py CONFIG --check=data/mine
        `check`: reads every row as training would and prints what is wrong or odd
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
from media import (BadRow, data_url, draw_points, enlarge, points_at, points_in_picture,
                   points_of)
from model import dense_mask

# Of this page and of that of eval.py. Class t is a token, v a visual one, s a special one.
STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.t{border-radius:3px;padding:1px 0;border-right:1px solid #0002}
.v{background:#cfe3ff}
.s{color:#888}
img{max-width:24em;image-rendering:auto;border:1px solid #ccc;vertical-align:top}
h2{font-size:1em;margin-top:2em}
pre,.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;margin:.4em 0}
table{border-collapse:collapse}
td,th{padding:2px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}
</style>"""


# --------------------------------------------------------------------------------------------------
# Pictures and tokens of an example

def as_model_sees(patches, grid, points=(), scale=1):
    """A picture put together from the patches of one crop [num_patches, patch_dim], enlarged
    `scale` times and with `points` drawn. A wrong order of patches or pixels would be seen."""
    rows, columns = grid
    p = math.isqrt(patches.shape[1] // 3)                # pixels a side of a patch
    pixels = patches.reshape(rows, columns, p, p, 3)
    pixels = pixels.transpose(0, 2, 1, 3, 4)             # [rows, p, columns, p, 3]
    pixels = pixels.reshape(rows * p, columns * p, 3)
    image = Image.fromarray(pixels)
    size = (columns * p * scale, rows * p * scale)
    image = image.resize(size, Image.Resampling.NEAREST)
    return draw_points(image, points)


def tokens_html(example, processor):
    """The tokens of an Example as HTML, a line for the prefix and for each branch. A token with a
    loss is green, darker with its weight; visual tokens are one blue box with their number."""
    placeholders = (processor.image_pad, processor.video_pad)
    special = (processor.im_start, processor.im_end)
    highest = max(example.weights) or 1      # 1: nothing has a loss, so any number will do
    lines = ['']
    branch = 0
    visual = 0                               # placeholders so far that no box counts yet

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
        text = processor.tokenizer.decode([token], skip_special_tokens=False)
        text = html.escape(text)
        shade = ''
        if weight:
            opacity = .15 + .6 * weight / highest
            shade = f'background:rgba(40,170,70,{opacity:.2f})'
        kind = 't s' if token in special else 't'
        hint = f'id {token}, loss weight {weight:.3g}'           # shown where the mouse is
        lines[-1] += f'<span class="{kind}" style="{shade}" title="{hint}">{text}</span>'
    write_visual()
    return ''.join(f'<div class="tokens">{line}</div>' for line in lines)


def example_html(example, dataset, draw, processor):
    """The Example of a draw (k, data set, row) as HTML: its pictures or frames with the points on
    them, and its tokens."""
    k, _, row = draw
    record = dataset[row]
    number = len(record['conversations'])
    page = [f'<h2>draw {k}: {html.escape(dataset.where(row))}, {len(example.tokens)} tokens, '
            f'{number} conversations</h2>']
    points = points_of(record)               # of all conversations, on the same pictures
    is_video = len(example.times) > 0
    # Small pictures are enlarged, and frames only half as much, because there are many
    wanted = 128 if is_video else 256        # pixels a side
    scale = max(1, wanted // processor.image_size)
    crops = [] if example.patches is None else example.patches
    for i, patches in enumerate(crops):
        if is_video:
            shown = points_at(points, example.times[i])
        else:
            shown = points_in_picture(points, i)
        picture = as_model_sees(patches, example.grid, shown, scale)
        page.append(f'<img src="{data_url(picture)}">')
    page.append(tokens_html(example, processor))
    return '\n'.join(page)


def messages_of(record):
    """Yields the messages of all conversations."""
    for conversation in record['conversations']:
        yield from conversation['messages']


def mask_picture(examples, length, visual_ids, side=512):
    """A packed row of `length` tokens and its mask, as a picture.

    Above is a strip with a colour for each document, pale where there is no loss and strong in the
    answers. Below is a square: pixel (i, j) is coloured where token i attends to token j. Of a long
    row every n-th token is shown. visual_ids: those of tokens that attend to one another (molmo2),
    or ().
    """
    # The row as `collate` in data.py lays it out
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
    # The mask of some tokens alone is that part of the whole mask, because whether one attends to
    # another depends on these two only
    every_nth = -(-length // side)           # rounded up
    shown = np.arange(0, length, every_nth)
    tokens = tokens[shown]
    weights = weights[shown]
    documents = documents[shown]
    branches = branches[shown]
    visual = None
    if visual_ids:
        is_visual = np.isin(tokens, visual_ids)
        visual = torch.from_numpy(is_visual[None])
    document_ids = torch.from_numpy(documents[None])     # a batch of one row
    branch_ids = torch.from_numpy(branches[None])
    attends = dense_mask(document_ids, branch_ids, visual)
    attends = attends[0, 0].numpy()                      # [shown, shown]
    attends = attends & (documents >= 0)                 # padding attends to padding; not shown
    colours = np.array([
        (230, 80, 60),
        (60, 130, 220),
        (60, 170, 90),
        (200, 140, 30),
        (150, 80, 190),
    ])
    colour = colours[documents % len(colours)]           # [shown, 3]
    colour = np.where(documents[:, None] < 0, 0, colour)
    # Paler colours are a part of the way from white, 255, to the colour
    pale = 255 - (255 - colour) // 3
    half = 255 - (255 - colour) // 2
    strip = np.where(weights[:, None] > 0, colour, pale)
    strip = np.tile(strip, (12, 1, 1))                   # 12 pixels high: [12, shown, 3]
    square = np.where(attends[..., None], half[None], 20)        # [shown, shown, 3]
    pixels = np.concatenate([strip, square])
    image = Image.fromarray(pixels.astype(np.uint8))
    return enlarge(image, side)


# --------------------------------------------------------------------------------------------------
# A config's data

def inspect(settings, number=12):
    """Prints a config's mixture and a few examples of it; writes <out_dir>/inspect.html, with
    `number` examples."""
    if not settings['mixture']:
        raise UserError("mixture is empty; give a config: python data.py config/demo.py")
    data_dir = settings['data_dir']
    draws = settings['max_steps'] * settings['batch_size'] * settings['accumulation']
    lines = mixture_table(settings, draws)
    something_is_missing = lines[-1].startswith('*')     # the footnote of the table
    if something_is_missing:
        print('\n'.join(lines))
        print(f'the draws are those of {draws:,} examples; '
              'nothing to look at before the data is there')
        return
    processor, config = make_processor(settings)
    mixture = open_mixture(settings, data_dir, settings['seed'])
    examples, skipped, page = read_some(mixture, processor, number)
    lengths = [len(e.tokens) for e in examples] or [0]
    mean = np.mean(lengths)
    is_packed = settings['packing'] and len(examples) > 0
    if is_packed:
        # A row holds several examples, so the run draws more of them than rows
        draws = int(draws * processor.seq_len / mean)
    lines = mixture_table(settings, draws)
    lines += ['', *task_table(examples)]
    lines += ['', f'tokens an example: mean {mean:.0f}, median {np.median(lengths):.0f}, '
                  f'most {max(lengths)} of seq_len {processor.seq_len}']
    lines += [f'skipped {reason}: {times}' for reason, times in skipped.items()]
    text = '\n'.join(lines)
    print('\n' + text)
    title = html.escape(settings['out_dir'])
    head = [
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>{STYLE}",
        f'<pre>{html.escape(text)}</pre>',
        '<p>Blue: visual tokens. Green: tokens with a loss, darker with its weight. '
        'One line a conversation: each sees the first line and itself. '
        'Hover for ids and weights.</p>',
    ]
    if is_packed:
        head.append(packed_row_html(examples, processor, config.visual_token_ids))
    out = Path(settings['out_dir'])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'inspect.html').write_text('\n'.join(head + page), encoding='utf-8')
    print(f'\nwrote {out}/inspect.html')


def read_some(mixture, processor, number, draws=200):
    """Reads the first draws of a mixture and prints the text of the first three examples.

    Returns (Examples, Counter {'data set: reason': rows that could not be used}, [HTML of each of
    the first `number` Examples]).
    """
    examples = []
    skipped = Counter()
    page = []
    reader = ExampleDataset(mixture, processor)
    first_draws = itertools.islice(mixture.draws(), draws)
    # disable=None: no progress bar where the output is not a terminal
    for draw in tqdm(first_draws, total=draws, unit='row', disable=None):
        k, d, row = draw
        dataset = mixture.datasets[d]
        _, example = reader[draw]
        if isinstance(example, UserError):               # not a matter of this row alone
            raise example
        if isinstance(example, RowProblem):
            skipped[f'{dataset.name}: {example.reason}'] += 1
            tqdm.write(f'skipped {example.row}: {example.problem}')
            continue
        examples.append(example)
        if len(examples) <= number:
            page.append(example_html(example, dataset, draw, processor))
        if len(examples) <= 3:
            placeholders = (processor.image_pad, processor.video_pad)
            # Hundreds of placeholders would hide the text
            tokens = [token for token in example.tokens if token not in placeholders]
            text = processor.tokenizer.decode(tokens, skip_special_tokens=False)
            print(f'\ndraw {k}: {dataset.where(row)}, {len(example.tokens)} tokens\n{text}')
    return examples, skipped, page


def task_table(examples):
    """Lines of a table: how many tokens of each task have a loss, and the task's share of all loss
    weight."""
    number = Counter()
    weights = Counter()
    for example in examples:
        for task, weight in zip(example.tasks, example.weights):
            if weight:
                number[TASKS[task]] += 1
                weights[TASKS[task]] += weight
    total = sum(weights.values())
    lines = [f"{'task':<16}{'loss tokens':>12}{'share of loss weight':>22}"]
    for task, n in number.most_common():
        share = weights[task] / total
        lines.append(f'{task:<16}{n:>12,}{share:>22.1%}')
    return lines


def packed_row_html(examples, processor, visual_ids):
    """A row packed from the first examples, as the Loader would, and its mask as a picture."""
    seq_len = processor.seq_len
    pool = examples[:PACKING_POOL]
    chosen = best_fit([len(e.tokens) for e in pool], seq_len)
    row = [pool[i] for i in chosen]
    picture = mask_picture(row, seq_len, visual_ids)
    tokens = sum(len(e.tokens) for e in row)
    return (f'<p>{len(row)} examples packed into a row, {tokens} of {seq_len} tokens, '
            'and which token (down) sees which (across): '
            'a colour a document, strong where it answers.</p>'
            f'<img style="max-width:none" src="{data_url(picture)}">')


# --------------------------------------------------------------------------------------------------
# Checking a data set

def suspicions(record, example):
    """Yields (kind, sentence) for what can be used but was perhaps not meant so. record: a row as
    `normalise` returns it; example: what the Processor made of it."""
    conversations = len(record['conversations'])
    # The number of the last branch is the number of conversations that were used
    left_out = conversations - max(example.branches)
    if left_out:
        yield 'left out', f'{left_out} of {conversations} conversations do not fit'
    for path, times in Counter(record['images']).items():
        if times > 1:
            yield 'repeated picture', path
            break                            # one of a row says enough
    for message in messages_of(record):
        yield from message_suspicions(message, example)


def message_suspicions(message, example):
    """Yields (kind, sentence) as `suspicions`, for one message."""
    points = (message.get('points') or {}).get('points', [])
    is_empty = not message['content'] and message.get('points') is None
    if message['role'] == 'assistant' and is_empty:
        yield 'empty answer', 'an assistant turn without content or points'
    # Marks at the ends were removed when the record was read (data.py); these are in the middle
    mark = re.search(r'<(image|video)>', message['content'])
    if mark:
        yield 'mark in the text', f'{mark[0]} inside a message stays text'
    if any(not 0 <= p['x'] <= 1 or not 0 <= p['y'] <= 1 for p in points):
        yield 'point outside', 'a point beyond the border is moved to it'
    # Two points are at one place if they are in the same picture or at the same second, too
    places = {(p['x'], p['y'], p.get('t'), p.get('image')) for p in points}
    if len(places) < len(points):
        yield 'repeated point', 'two points at one place'
    if example.times:
        end = example.times[-1]              # second of the last frame
        late = [p['t'] for p in points if p['t'] > end + .5]
        if late:
            yield 'late point', f'a point at {late[0]} s in a clip of {end:.1f} s'


def check(path, settings):
    """Reads every row of a data set as training would and prints what is wrong or odd: the first
    five rows of each kind, and counts. path: the folder of the data set, or one .jsonl file of it.
    """
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
    """`check` for one .jsonl file."""
    odd = Counter()                          # {kind: rows}
    tasks = Counter()                        # {task: conversations}
    lengths = []                             # tokens of each row that can be used
    longest_answers = []                     # tokens of its branch with most of them

    def report(row, kind, what):
        odd[kind] += 1
        if odd[kind] <= 5:
            tqdm.write(f'{dataset.where(row)}: {kind}: {what}')
    for row in tqdm(range(dataset.rows), unit='row', desc=dataset.path.stem, disable=None):
        try:
            record = dataset[row]
            for conversation in record['conversations']:
                tasks[conversation.get('task', 'other')] += 1
            example = processor.example(record, dataset.folder)
        except BadRow as e:
            report(row, e.reason, e)
            continue
        lengths.append(len(example.tokens))
        answer_tokens = Counter()            # {branch: tokens with a loss}
        for branch, weight in zip(example.branches, example.weights):
            if weight:
                answer_tokens[branch] += 1
        longest = max(answer_tokens.values())
        longest_answers.append(longest)
        # Such an answer crowds out the other conversations, or the frames of a video
        if longest > processor.seq_len // 2:
            report(row, 'long answer', f'{longest} tokens')
        for kind, what in suspicions(record, example):
            report(row, kind, what)
    by_task = ', '.join(f'{task} {n:,}' for task, n in tasks.most_common())
    print(f'{dataset.path}: {dataset.rows:,} rows, {len(lengths):,} usable; '
          f"conversations: {by_task or 'none'}")
    for name, numbers in (('row', lengths), ('longest answer of a row', longest_answers)):
        if not numbers:
            continue
        median = np.median(numbers)
        most_of_them = np.quantile(numbers, .99)
        print(f'  tokens a {name}: median {median:.0f}, 99% {most_of_them:.0f}, '
              f'most {max(numbers)} (seq_len {processor.seq_len})')
    for kind, n in odd.most_common():
        print(f'  {kind}: {n:,}')


def main():
    """python data.py: `inspect`, or with --check=PATH `check`."""
    paths = []                               # of --check; configure does not know that argument
    rest = []
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
