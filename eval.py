"""Score a checkpoint on held-out data.

    python eval.py --checkpoint=out/demo_stage1 --data=data/shapes,data/clocks
    --data=folder            its validation.jsonl;  --data=some/file.jsonl works too;  --num=200: the first 200 records
    --checkpoint=a,b,c       each in turn, and at the end one table with a column each

Prints a line per dataset, task and metric with its 95% interval. Beside the checkpoint, in eval/: metrics.json,
predictions.jsonl (a line per question) and report.html (the worst answers first, over their pictures).

extra/metrics.py says what is measured. A run that was killed goes on where it was, and one that was done is only scored
again (--fresh=True: answered again). `torchrun --nproc-per-node=2 eval.py ..` shares the questions out; the scores are the
same. --loss=True adds the loss and the perplexity of the reference answers, by task.
"""
import hashlib
import html
import json
import math
import os
import sys
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

checkpoint = ''                # step folder, or a run's out_dir; several with commas between
data = ''                      # dataset folders or JSONL files, with commas between
split = 'validation'
num = 0                        # records of each dataset; 0 takes all
batch_size = 64                # questions answered side by side,
batch_tokens = 2 ** 17         # and tokens they see together, at most: fewer questions about long videos
max_new_tokens = 256
loss = False                   # of the reference answers, too
fresh = False                  # forget answers of an earlier run
radius = 0.05                  # how near a point must be, in pictures, where the data has no outlines
out = ''                       # folder of what is written; '' is eval/ in the checkpoint
page_rows = 100                # answers shown in report.html
device = 'auto'
dtype = 'auto'                 # of the weights: auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float16
threads = 0

if __name__ == '__main__':
    from configurator import configure
    settings = configure(globals())

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from extra.inspector import STYLE  # noqa: E402
from extra.engine import generate  # noqa: E402
from data import TASKS, Dataset, collate, parse_points, to_device  # noqa: E402
from extra.hf import load_checkpoint  # noqa: E402
from media import BadRow, data_url, draw_points, enlarge, load_image, load_video, open_media, points_at  # noqa: E402
from extra.metrics import score  # noqa: E402
from model import UserError, pick_device, pick_weights_dtype  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------------
# Figures of many answers

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

WAITING = 2 ** 30              # bytes of pixels that may wait for others to be answered with


def questions(dataset, record, where):
    """The conversations of a record as items: the messages before the last answer, and what it should be."""
    for n, conversation in enumerate(record['conversations']):
        messages = conversation['messages']
        last = max(i for i, m in enumerate(messages) if m['role'] == 'assistant')
        reference = messages[last]
        points = (reference.get('points') or {}).get('points', [])
        if conversation.get('box') and len(points) == 1:             # its middle was pointed at
            points = [{**points[0], 'box': conversation['box']}]
        yield {'dataset': dataset, 'record': where, 'conversation': n, 'task': conversation.get('task', 'other'),
               'images': record['images'], 'video': record['video'], 'messages': messages[:last],
               'reference': reference['content'], 'answers': conversation.get('answers') or [reference['content']],
               'points': points, **{k: conversation.get(k) for k in (
                   'objects', 'metric', 'options', 'right', 'windows', 'mask')}}


def prompts(processor, dataset, where):
    """[(Example with a branch for each item, items), ..] of all that is asked about a record."""
    record = dataset[where]
    media = processor.media(record, dataset.folder, processor.seq_len - max_new_tokens)
    items = list(questions(dataset.name, record, where))
    together = processor.prompt(*(item['messages'] for item in items), **media)
    n = max(1, min(batch_size, batch_tokens // len(together.tokens)))
    if n >= len(items):
        return [(together, items)]
    parts = [items[i:i + n] for i in range(0, len(items), n)]
    return [(processor.prompt(*(item['messages'] for item in part), **media), part) for part in parts]


def answer_all(model, processor, rows):
    """Answers the items of `prompts`, greedily: the text becomes an item's 'prediction'."""
    batches, number = [], 0
    for row in sorted(rows, key=lambda row: len(row[0].tokens)):         # rows of one length need no padding
        number += len(row[1])
        if not batches or number > batch_size or number * len(row[0].tokens) > batch_tokens:
            batches, number = [*batches, []], len(row[1])
        batches[-1].append(row)
    for chosen in batches:
        batch = to_device(collate([[example] for example, _ in chosen], processor), model.pixel_scale.device)
        tokens = torch.stack(list(generate(model, batch, max_new_tokens)), 1).tolist()
        for item, row in zip((item for _, items in chosen for item in items), tokens):
            item['prediction'] = processor.decode([t for t in row if t not in (-1, processor.im_end)])


def ahead(function, values):
    """function(value) of each value, or the BadRow it raised, in order: a few are being worked on by threads."""
    def careful(value):
        try:
            return function(value)
        except BadRow as e:
            return e
    n = max(1, min(4, os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    with ThreadPoolExecutor(n) as pool:
        waiting = deque()
        for value in values:
            waiting.append(pool.submit(careful, value))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def open_data(names):
    sets = []
    for name in filter(None, names.split(',')):
        path = Path(name)
        sets.append(Dataset(path.parent, path.stem) if path.suffix == '.jsonl' else Dataset(path, split))
    if not sets:
        raise UserError("data is empty; give --data=data/shapes")
    return sets


def answered(model, processor, dataset, rows):
    """(items with the model's answers, Counter of why rows could not be used, `losses`) of some rows of a dataset."""
    items, skipped, used, pending, held = [], Counter(), [], [], 0
    for i, got in zip(rows, ahead(partial(prompts, processor, dataset), rows)):
        if isinstance(got, BadRow):
            skipped[f'{dataset.name}: {got.reason}'] += 1
            tqdm.write(f'skipped {dataset.where(i)}: {got}', file=sys.stderr)
            continue
        items += [item for _, asked in got for item in asked]
        used.append(i)
        pending += got
        held += sum(example.patches.nbytes for example, _ in got if example.patches is not None)
        if held > WAITING:                   # long videos go a few at a time
            answer_all(model, processor, pending)
            pending, held = [], 0
    answer_all(model, processor, pending)
    return items, skipped, losses(model, processor, dataset, used) if loss else {}


@torch.inference_mode()
def losses(model, processor, dataset, rows):
    """{task: [sum of the cross entropies of its reference answers' tokens, tokens]} of some rows, one at a time."""
    sums = defaultdict(lambda: [0., 0])
    where = model.pixel_scale.device
    for example in ahead(lambda i: processor.example(dataset[i], dataset.folder), rows):
        if isinstance(example, BadRow):      # too long to be learnt from, not to be asked
            continue
        batch = to_device(collate([[example]], processor), where)
        logits = model.logits(model.hidden(batch, batch['loss_index'])).float()
        each = torch.nn.functional.cross_entropy(logits, batch['targets'].flatten()[batch['loss_index']], reduction='none')
        for task, value in zip(batch['loss_tasks'].tolist(), each.tolist()):
            sums[TASKS[task]][0] += value
            sums[TASKS[task]][1] += 1
    return dict(sums)


def answers_kept(cache):
    """{(dataset, first row, end): chunk} of what was answered already, by any rank. A line cut short does not count."""
    lines = [line for path in cache.parent.glob(f'{cache.name}.*') for line in path.read_text().splitlines(keepends=True)]
    return {tuple(chunk['rows']): chunk for chunk in (json.loads(line) for line in lines if line.endswith('\n'))}


def evaluate(model, processor, datasets, number=0, cache=None):
    """(scored rows of all questions, how many records could not be used by reason, {(dataset, task): [sum of losses,
    tokens]}). Chunks of 64 records are answered together; ranks take them in turn, each with a file of its own beside
    `cache`, where a run finds what an earlier one answered."""
    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    times = Counter(d.name for d in datasets)
    for d in datasets:                       # two of one name are told apart by their paths
        d.name = d.name if times[d.name] == 1 else str(d.path.with_suffix(''))
    known = answers_kept(cache) if cache else {}
    chunks = [(d, start, min(start + 64, size)) for d in datasets for size in [min(number or len(d), len(d))]
              for start in range(0, size, 64)]
    mine = [(d, a, b) for i, (d, a, b) in enumerate(chunks) if i % ranks == rank and (d.name, a, b) not in known]
    with tqdm(total=sum(b - a for _, a, b in mine), unit='record', leave=None, disable=None if rank == 0 else True) as bar:
        for dataset, a, b in mine:
            bar.set_description(dataset.name)
            items, skipped, sums = answered(model, processor, dataset, range(a, b))
            chunk = {'rows': [dataset.name, a, b], 'items': items, 'skipped': skipped, 'losses': sums}
            known[dataset.name, a, b] = chunk
            if cache:
                with open(f'{cache}.{rank}of{ranks}', 'a') as f:
                    f.write(json.dumps(chunk) + '\n')
            bar.update(b - a)
    if ranks > 1:
        every = [None] * ranks
        torch.distributed.all_gather_object(every, known)
        known = {key: chunk for one in every for key, chunk in one.items()}
    pending, skipped, sums = [], Counter(), defaultdict(lambda: [0., 0])
    for dataset, a, b in chunks:
        chunk = known[dataset.name, a, b]
        pending += chunk['items']
        skipped.update(chunk['skipped'])
        for task, (value, tokens) in chunk['losses'].items():
            pair = sums[dataset.name, task]
            pair[0], pair[1] = pair[0] + value, pair[1] + tokens
    words = defaultdict(set)                 # what captions of a dataset may name
    for item in pending:
        words[item['dataset']].update(' '.join(o) for o in item['objects'] or ())
    rows = [{**item, 'scores': score(item, item['prediction'], words[item['dataset']], radius)} for item in pending]
    return rows, skipped, sums


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def goodness(row):
    """Mean of an answer's metrics, to sort by: a metric without a denominator (no point given) says nothing."""
    ratios = [above / below for above, below in row['scores'].values() if below]
    return sum(ratios) / max(1, len(ratios))


def labels(keys):
    """How the lines of a table begin, its heading and one for each (dataset, task, metric)."""
    keys = [('dataset', 'task', 'metric'), *keys]
    width = max([12, *(len(dataset) for dataset, _, _ in keys)]) + 2
    return [f'{dataset:<{width}}{task:<12}{metric:<17}' for dataset, task, metric in keys]


def table(summary):
    head, *names = labels((s['dataset'], s['task'], s['metric']) for s in summary)
    lines = [f"{head}{'score':>7}   {'95% interval':<15}{'answers':>8}{'records':>9}"]
    for name, s in zip(names, summary):
        between = f"{s['low']:.1%} - {s['high']:.1%}"
        lines.append(f"{name}{s['score']:>7.1%}   {between:<15}{s['answers']:>8,}{s['records']:>9,}")
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
    keys = {key: None for column in scores for key in column}
    (head, *names), width = labels(keys), max(map(len, summaries)) + 2
    lines = [head + ''.join(name.rjust(width) for name in summaries)]
    for name, key in zip(names, keys):
        cells = (f'{column[key]:.1%}' if key in column else '-' for column in scores)
        lines.append(name + ''.join(cell.rjust(width) for cell in cells))
    return '\n'.join(lines)


def cache_of(folder, source, datasets, weights_dtype):
    """Where answers are kept: another name for whatever would change them."""
    stamp = lambda path: [str(path), path.stat().st_size, path.stat().st_mtime_ns]
    key = json.dumps([max_new_tokens, batch_size, batch_tokens, str(weights_dtype), loss, *(stamp(d.path) for d in datasets),
                      *(stamp(p) for p in sorted(source.glob('*.safetensors')))])
    return folder / f'answers-{hashlib.sha256(key.encode()).hexdigest()[:12]}'


def score_checkpoint(path, datasets):
    """Answers, scores, prints and writes. Returns [{dataset, task, metric, score, ...}]."""
    model, processor, source = load_checkpoint(path)
    dev = pick_device(device)
    weights_dtype = pick_weights_dtype(dtype, dev)
    model.to(dev, weights_dtype).eval()
    folder, rank = Path(out) if out else source / 'eval', int(os.environ.get('RANK', 0))
    folder.mkdir(parents=True, exist_ok=True)
    cache = cache_of(folder, source, datasets, weights_dtype)
    if fresh and rank == 0:
        for old in folder.glob(f'{cache.name}.*'):
            old.unlink()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    rows, skipped, sums = evaluate(model, processor, datasets, num, cache)
    summary = summarise(rows)
    if rank:
        return summary
    print(f'{source}\n{table(summary)}')
    for (dataset, task), (value, tokens) in sums.items():
        mean = value / tokens
        print(f'{dataset:<14}{task:<12}loss {mean:.4f}, perplexity {math.exp(mean):.3f}, {tokens:,} tokens')
    if skipped:
        print('records skipped: ' + ', '.join(f'{k} {n}' for k, n in skipped.items()))
    with open(folder / 'predictions.jsonl', 'w') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')
    (folder / 'metrics.json').write_text(json.dumps(
        {'checkpoint': str(source), 'data': data, 'split': split, 'num': num, 'skipped': skipped, 'metrics': summary,
         'losses': [{'dataset': d, 'task': t, 'loss': v / n, 'tokens': n} for (d, t), (v, n) in sums.items()]}, indent=2))
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
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:             # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        torch.distributed.init_process_group('gloo')
    summaries = {path: score_checkpoint(path, datasets) for path in paths}
    if len(paths) > 1 and not int(os.environ.get('RANK', 0)):
        print(columns(summaries))


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
