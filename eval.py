"""Score a checkpoint on held-out data.

    python eval.py --checkpoint=out/demo_stage1 --data=data/shapes,data/clocks
    --data=folder            its validation.jsonl;  --data=some/file.jsonl works too;  --num=200: the first 200 records
    --checkpoint=a,b,c       each in turn, and at the end one table with a column each

Prints a line per dataset, task and metric with its 95% interval. Beside the checkpoint, in eval/: metrics.json,
predictions.jsonl (a line per question) and report.html (the worst answers first, over their pictures).

pointing     an object is hit when a point lies inside its polygon, one point to one object (largest matching). hit
             rate = objects hit / objects asked for (recall), precision = points that hit / points given, F1 of both.
             Without polygons, within `radius` of the object's point. In a video, where the object is at that second.
             `none there`: asked for what is not in the picture, and the answer has no point.
tracking     of the places asked for (an object at a time), how many have the point of that id and time inside it
counting     the number is right
captioning   F1 of the objects named (colour and kind together) against `objects` of the record, as multisets
the rest     the answer equals one of `answers`, or the reference, after lower-casing and dropping punctuation
"""
import html
import json
import os
import re
import string
import sys
from collections import Counter, defaultdict
from pathlib import Path

checkpoint = ''                # step folder, or a run's out_dir; several with commas between
data = ''                      # dataset folders or JSONL files, with commas between
split = 'validation'
num = 0                        # records of each dataset; 0 takes all
batch_size = 64                # questions answered side by side
max_new_tokens = 256
radius = 0.05                  # how near a point must be, in pictures, where the data has no polygons
out = ''                       # folder of what is written; '' is eval/ in the checkpoint
page_rows = 100                # answers shown in report.html
device = 'auto'
dtype = 'float32'              # of the weights: float32 | bfloat16
threads = 0

if __name__ == '__main__':
    from configurator import configure
    settings = configure(globals())

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import STYLE, Dataset, collate, load_checkpoint, parse_points  # noqa: E402
from media import BadRow, data_url, draw_points, enlarge, load_image, load_video, open_media, points_at  # noqa: E402
from model import UserError, pick_device  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Scores. Each is {metric: (numerator, denominator)} of one answer, so that every metric is a ratio of sums.

def inside(x, y, polygon):
    """Even-odd rule: does a ray to the right of (x, y) cross the outline an odd number of times?"""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


def hits(p, o, radius=0.05):
    """Does the point lie in the object: in its polygon, or within `radius` of it; in a video at the same time, give or
    take a quarter of a second. Where a video's object moves, `moments` holds it at every time."""
    if o.get('moments'):
        return any(hits(p, moment, radius) for moment in o['moments'])
    if p.get('image', 0) != o.get('image', 0) or abs(p.get('t', 0) - o.get('t', 0)) > .25:
        return False
    if o.get('polygon'):
        return inside(p['x'], p['y'], o['polygon'])
    return (p['x'] - o['x']) ** 2 + (p['y'] - o['y']) ** 2 <= radius ** 2


def match(points, objects, radius=0.05):
    """Size of the largest one-to-one matching of points to the objects they lie in (augmenting paths, Kuhn 1955)."""
    edges = [[j for j, o in enumerate(objects) if hits(p, o, radius)] for p in points]
    owner = {}

    def place(i, tried):
        for j in edges[i]:
            if j not in tried:
                tried.add(j)
                if j not in owner or place(owner[j], tried):
                    owner[j] = i
                    return True
        return False
    return sum(place(i, set()) for i in range(len(points)))


def score_points(text, objects):
    points = parse_points(text)
    if not objects:
        return {'none there': (not points, 1)}
    n = match(points, objects, radius)
    return {'hit rate': (n, len(objects)), 'precision': (n, len(points)), 'F1': (2 * n, len(objects) + len(points)),
            'all right': (n == len(objects) == len(points), 1)}


def score_tracks(text, places):
    """places: where each object is at each time asked for, {t, x, y, id, polygon}."""
    points = parse_points(text)
    if not places:
        return {'none there': (not points, 1)}
    pairs = [(i, j) for i, p in enumerate(points) for j, place in enumerate(places)
             if p['id'] == place['id'] and hits(p, place, radius)]
    return {'inside': (len({j for _, j in pairs}), len(places)), 'precision': (len({i for i, _ in pairs}), len(points))}


def plain(text):
    return ' '.join(text.lower().translate(str.maketrans('', '', string.punctuation.replace(':', ''))).split())


def first_number(text):
    found = re.search(r'\d+', text)
    return int(found[0]) if found else None


def score_caption(text, objects, vocabulary):
    """`vocabulary`: every object any caption may name, so that naming one that is not there costs precision."""
    words = f' {plain(text)} '
    said = Counter({o: words.count(f' {o} ') for o in vocabulary})
    there = Counter(' '.join(o) for o in objects)
    return {'F1': (2 * (said & there).total(), (said + there).total())}


def score(item, text, vocabulary=()):
    """Scores of an answer to an item of `questions`."""
    if item['task'] == 'pointing':
        return score_points(text, item['points'])
    if item['task'] == 'tracking':
        return score_tracks(text, item['points'])
    if item['task'] == 'captioning' and item['objects'] is not None:
        return score_caption(text, item['objects'], vocabulary)
    if item['task'] == 'counting':
        return {'accuracy': (first_number(text) == first_number(item['reference']), 1)}
    return {'accuracy': (plain(text) in [plain(a) for a in item['answers']], 1)}


def interval(pairs):
    """95% interval of sum(numerators) / sum(denominators) over records: Wilson's, for as many independent trials as
    the spread between records says there were (answers about one picture fail together).

    pairs [R, 2] -> (low, high). At 0 and 1, where records do not differ, the number of records counts.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.float64)
    R, total = len(pairs), pairs[:, 1].sum().item()
    p = pairs[:, 0].sum().item() / total
    # linearised variance of a ratio of sums (Cochran, Sampling Techniques, 6.4)
    variance = ((pairs[:, 0] - p * pairs[:, 1]) ** 2).sum().item() / total ** 2 * R / max(R - 1, 1)
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else R
    z2 = 1.96 ** 2
    centre, half = (p + z2 / (2 * n)) / (1 + z2 / n), (z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2) ** .5 / (1 + z2 / n)
    return max(0., centre - half), min(1., centre + half)


def summarise(rows):
    """Scored rows -> [{dataset, task, metric, score, low, high, answers, records}] in the order they came."""
    groups = defaultdict(lambda: defaultdict(lambda: [0., 0.]))         # (dataset, task, metric) -> record -> pair
    answers = Counter()
    for row in rows:
        for metric, (above, below) in row['scores'].items():
            pair = groups[row['dataset'], row['task'], metric][row['record']]
            pair[0], pair[1] = pair[0] + above, pair[1] + below
            answers[row['dataset'], row['task'], metric] += 1
    out = []
    for key, records in groups.items():
        pairs = list(records.values())
        total = sum(below for _, below in pairs)
        if total:                            # no point was given at all: no precision
            low, high = interval(pairs)
            out.append(dict(zip(('dataset', 'task', 'metric'), key), score=sum(a for a, _ in pairs) / total, low=low,
                            high=high, answers=answers[key], records=len(pairs)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers

def questions(dataset, record, where):
    """The conversations of a record as items: the messages before the last answer, and what it should be."""
    for n, conversation in enumerate(record['conversations']):
        messages = conversation['messages']
        last = max(i for i, m in enumerate(messages) if m['role'] == 'assistant')
        reference = messages[last]
        yield {'dataset': dataset, 'record': where, 'conversation': n, 'task': conversation.get('task', 'other'),
               'images': record['images'], 'video': record['video'], 'messages': messages[:last],
               'reference': reference['content'],
               'answers': conversation.get('answers') or [reference['content']],
               'objects': conversation.get('objects'), 'points': (reference.get('points') or {}).get('points', [])}


def answer_all(model, processor, items, media, bar=None):
    """The model's answers, as texts, in the order of `items`; media: record -> what it shows. Greedy."""
    examples = [processor.prompt(item['messages'], **media[item['record']]) for item in items]
    texts = [''] * len(items)
    # answers of one task end at about the same time, prompts of one length need no padding
    order = sorted(range(len(items)), key=lambda i: (items[i]['task'], len(items[i]['reference']),
                                                     len(examples[i].tokens)))
    where = model.pixel_scale.device
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = collate([[examples[i]] for i in chosen], processor, left=True)
        batch = {k: v.to(where) if torch.is_tensor(v) else v for k, v in batch.items()}
        tokens = torch.stack(list(model.generate(batch, max_new_tokens)), 1).tolist()
        for i, row in zip(chosen, tokens):
            texts[i] = processor.decode([t for t in row if t not in (-1, processor.im_end)])
        if bar is not None:
            bar.update(len(chosen))
    return texts


def open_data(names):
    sets = []
    for name in filter(None, names.split(',')):
        path = Path(name)
        sets.append(Dataset(path.parent, path.stem) if path.suffix == '.jsonl' else Dataset(path, split))
    if not sets:
        raise UserError("data is empty; give --data=data/shapes")
    return sets


def evaluate(model, processor, datasets, number=0):
    """Scored rows of all questions, and how many records could not be used, by reason."""
    rows, skipped = [], Counter()
    for dataset in datasets:
        size = min(number or len(dataset), len(dataset))
        vocabulary, pending = set(), []
        with tqdm(total=size, unit='record', desc=dataset.name, disable=None) as bar:
            for start in range(0, size, 128):          # enough questions to sort, few enough pictures to hold
                items, media = [], {}
                for i in range(start, min(start + 128, size)):
                    try:
                        record = dataset[i]
                        media[i] = processor.media(record, dataset.folder, processor.seq_len - max_new_tokens)
                        items += questions(dataset.name, record, i)
                    except BadRow as e:
                        skipped[f'{dataset.name}: {e.reason}'] += 1
                        tqdm.write(f'skipped {dataset.where(i)}: {e}', file=sys.stderr)
                pending += zip(items, answer_all(model, processor, items, media))
                bar.update(min(128, size - start))
        for item, _ in pending:
            vocabulary.update(' '.join(o) for o in item['objects'] or ())
        for item, text in pending:
            rows.append({**item, 'prediction': text, 'scores': score(item, text, vocabulary)})
    return rows, skipped


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def goodness(row):
    """Mean of an answer's metrics, to sort by: a metric without a denominator (no point given) says nothing."""
    ratios = [above / below for above, below in row['scores'].values() if below]
    return sum(ratios) / max(1, len(ratios))


def table(summary):
    head = f"{'dataset':<14}{'task':<12}{'metric':<12}{'score':>7}   {'95% interval':<15}{'answers':>8}{'records':>9}"
    lines = [head]
    for s in summary:
        lines.append(f"{s['dataset']:<14}{s['task']:<12}{s['metric']:<12}{s['score']:>7.1%}   "
                     f"{s['low']:.1%} - {s['high']:.1%}".ljust(63) + f"{s['answers']:>8,}{s['records']:>9,}")
    return '\n'.join(lines)


def drawn(row, folder):
    """The pictures of an answer, or some frames, with the points wanted and given."""
    given, wanted = parse_points(row['prediction']), row['points']
    if row['video']:
        times, images = load_video(open_media(folder, row['video']), 12)
        at = [[points_at([p for p in points if 't' in p], t) for points in (wanted, given)] for t in times]
    else:
        images = [load_image(open_media(folder, path)) for path in row['images']]
        at = [[[p for p in points if p.get('image', 0) == n] for points in (wanted, given)] for n in range(len(images))]
    side = 192 if row['video'] else 384
    for image, (green, magenta) in zip(images, at):
        image.thumbnail((side, side))
        yield draw_points(draw_points(enlarge(image, side), green, 'green'), magenta)


def report(rows, summary, datasets, title):
    """A self-contained page: the table, then the worst answers with their pictures, wanted points in green."""
    folders = {d.name: d.folder for d in datasets}
    page = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>{STYLE}',
            f'<h1>{html.escape(title)}</h1><pre>{html.escape(table(summary))}</pre>',
            f'<p>The {min(page_rows, len(rows))} worst of {len(rows):,} answers. Magenta: points given; green: '
            f'wanted.</p>']
    for row in sorted(rows, key=goodness)[:page_rows]:
        page.append(f"<h2>{html.escape(row['dataset'])} record {row['record']}, {html.escape(row['task'])}: "
                    f"{goodness(row):.0%}</h2>")
        page += [f"<img src='{data_url(image)}'>" for image in drawn(row, folders[row['dataset']])]
        wanted = f"{len(row['points'])} points" if row['points'] else row['reference'] or 'no points'
        talk = [f"{m['role']}: {m['content']}" for m in row['messages']]
        talk += [f"answer: {row['prediction']}", f'wanted: {wanted}']
        page.append(f"<pre>{html.escape(chr(10).join(talk))}</pre>")
    return '\n'.join(page)


def columns(summaries):
    """{checkpoint: summary} -> one table with a column for each checkpoint."""
    scores = [{(s['dataset'], s['task'], s['metric']): s['score'] for s in summary} for summary in summaries.values()]
    width = max(map(len, summaries)) + 2
    lines = [f"{'dataset':<14}{'task':<12}{'metric':<12}" + ''.join(name.rjust(width) for name in summaries)]
    for key in {key: None for column in scores for key in column}:
        cells = (f'{column[key]:.1%}' if key in column else '-' for column in scores)
        lines.append('{:<14}{:<12}{:<12}'.format(*key) + ''.join(cell.rjust(width) for cell in cells))
    return '\n'.join(lines)


def score_checkpoint(path, datasets):
    """Answers, scores, prints and writes. Returns [{dataset, task, metric, score, ...}]."""
    model, processor, source = load_checkpoint(path)
    model.to(pick_device(device), getattr(torch, dtype)).eval()
    rows, skipped = evaluate(model, processor, datasets, num)
    summary = summarise(rows)
    print(f'{source}\n{table(summary)}')
    if skipped:
        print('records skipped: ' + ', '.join(f'{k} {n}' for k, n in skipped.items()))
    folder = Path(out) if out else source / 'eval'
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'predictions.jsonl', 'w') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')
    (folder / 'metrics.json').write_text(json.dumps(
        {'checkpoint': str(source), 'data': data, 'split': split, 'num': num, 'skipped': skipped, 'metrics': summary},
        indent=2))
    (folder / 'report.html').write_text(report(rows, summary, datasets, f'{source} on {data}'), encoding='utf-8')
    print(f"wrote {', '.join(os.path.join(folder, n) for n in ('metrics.json', 'predictions.jsonl', 'report.html'))}\n")
    return summary


def main():
    paths = list(filter(None, checkpoint.split(',')))
    if not paths:
        raise UserError("which checkpoint? --checkpoint=out/demo_stage1")
    if out and len(paths) > 1:
        raise UserError("--out is for one checkpoint: several write beside their own")
    if threads:
        torch.set_num_threads(threads)
    datasets = open_data(data)               # before the weights: a wrong path is answered at once
    for path in paths:
        if not Path(path).is_dir():          # and a second checkpoint's before the first is scored
            raise UserError(f"checkpoint {path} does not exist")
    summaries = {path: score_checkpoint(path, datasets) for path in paths}
    if len(paths) > 1:
        print(columns(summaries))


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
