"""Score a checkpoint on held-out data.

    python eval.py --checkpoint=out/demo --data=data/demo/shapes
    --data=folder            its validation.jsonl; --data=some/file.jsonl works too
    --num=200                only the first 200 records of each dataset
    --checkpoint=a,b,c       each in turn, and at the end one table with a column for each
    torchrun --nproc-per-node=2 eval.py ..     the ranks share the records; the scores are the same

Prints one line per dataset, task and metric, with its 95% interval. Writes to the checkpoint's
folder eval/: metrics.json, predictions.jsonl (one line per question) and report.html (the worst
answers first, with their pictures). A run that was killed continues, because answers are kept in a
cache; a run that finished is only scored again. --fresh=True discards the cache.

In this file: questions from records, batches of them, the cache, intervals, tables and the report.
Not in this file: the metrics (extra/metrics.py) and the decoding of answers (extra/engine.py).
"""
import hashlib
import html
import json
import math
import os
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

checkpoint = ''                # step folder or a run's out_dir; several are separated by commas
data = ''                      # dataset folders or JSONL files, separated by commas
split = 'validation'           # which JSONL file of a dataset folder
num = 0                        # records of each dataset; 0 takes all
batch_size = 64                # questions in a batch, at most
batch_tokens = 2 ** 17         # prompt tokens of a batch's questions, at most; for long videos
max_new_tokens = 256           # of an answer
loss = False                   # also measure loss and perplexity of the reference answers, by task
fresh = False                  # discard the answers of an earlier run
radius = 0.05                  # how near a point must be, in [0, 1], to a target without outline
out = ''                       # folder for the results; '' is eval/ in the checkpoint's folder
page_rows = 100                # answers shown in report.html
device = 'auto'                # auto | cpu | cuda | mps
dtype = 'auto'                 # of the weights: bfloat16 | float16 | float32 | auto, which is
                               # bfloat16 on CUDA and else float32
threads = 0                    # CPU threads of torch; 0 leaves torch's default

if __name__ == '__main__':
    from configurator import configure
    settings = configure(globals())

# The slow imports come after the settings, so that a mistyped setting is reported at once.
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from extra.inspector import STYLE  # noqa: E402
from extra.engine import generate  # noqa: E402
from data import TASKS, Dataset, collate, last_answer, parse_points  # noqa: E402
from extra.hf import load_checkpoint  # noqa: E402
from media import (BadRow, data_url, draw_points, enlarge, load_image,  # noqa: E402
                   load_video, open_media, points_at, points_in_picture)
from extra.metrics import score  # noqa: E402
from model import UserError, pick_device, pick_weights_dtype  # noqa: E402
# torchrun's numbers of this process
from parallel import local_rank, local_world_size, rank, world_size  # noqa: E402


# --------------------------------------------------------------------------------------------------
# Scores of many answers

def wilson_interval(pairs):
    """95% interval of a ratio of sums over records.

    pairs [R, 2]: numerator and denominator of each record -> (low, high) of sum(numerators) /
    sum(denominators). The interval is Wilson's (1927) with an effective number of trials n, because
    answers about the same picture tend to fail together: n is the number of independent trials
    that would have the variance that is measured between records. ZeroDivisionError if all
    denominators are 0.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.float64)
    R = len(pairs)
    numerators = pairs[:, 0]
    denominators = pairs[:, 1]
    total = denominators.sum().item()
    p = numerators.sum().item() / total

    # Linearised variance of a ratio of sums (Cochran, Sampling Techniques, 6.4).
    residuals = numerators - p * denominators
    variance = (residuals ** 2).sum().item() / total ** 2 * R / max(R - 1, 1)

    # At scores of 0 and 1 the records do not differ, so that each record counts as one trial.
    n = R
    if variance > 0 and 0 < p < 1:
        n = p * (1 - p) / variance

    # z = 1.96 is the 97.5th percentile of the normal distribution.
    z2 = 1.96 ** 2
    scale = 1 + z2 / n
    centre = (p + z2 / (2 * n)) / scale
    half_width = (z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2) ** .5 / scale
    low = max(0., centre - half_width)
    high = min(1., centre + half_width)
    return low, high


def summarise(rows):
    """Scored answers -> [{dataset, task, metric, score, low, high, answers, records}].

    The score is sum(numerators) / sum(denominators), low and high are its 95% interval, both in
    [0, 1]. The entries come in the order in which their metric occurs first.
    """
    # The sums are kept for each record, because records are the interval's independent units.
    groups = {}                            # (dataset, task, metric) -> {record: [sum, sum]}
    answers = Counter()                    # (dataset, task, metric) -> number of answers
    for row in rows:
        for metric, (numerator, denominator) in row['scores'].items():
            key = (row['dataset'], row['task'], metric)
            records = groups.setdefault(key, {})
            pair = records.setdefault(row['record'], [0., 0.])
            pair[0] += numerator
            pair[1] += denominator
            answers[key] += 1

    summary = []
    for key, records in groups.items():
        pairs = list(records.values())
        numerator = sum(pair[0] for pair in pairs)
        denominator = sum(pair[1] for pair in pairs)
        # A model that gives no point in any answer has no precision.
        if not denominator:
            continue
        dataset, task, metric = key
        low, high = wilson_interval(pairs)
        summary.append({
            'dataset': dataset, 'task': task, 'metric': metric,
            'score': numerator / denominator, 'low': low, 'high': high,
            'answers': answers[key], 'records': len(pairs),
        })
    return summary


def main_scores(summary):
    """Of `summarise`'s entries one for each task of each data set: the first, but for 'none there',
    because few questions are about what is not there."""
    chosen = {}
    for entry in summary:
        if entry['metric'] != 'none there':
            chosen.setdefault((entry['dataset'], entry['task']), entry)
    return list(chosen.values())


# --------------------------------------------------------------------------------------------------
# Questions

# What `score` may need to know of a conversation, besides its references and its points.
SCORING_KEYS = ('objects', 'metric', 'options', 'right', 'windows', 'mask')


def questions(dataset, record, index):
    """Yields one item for each conversation of a record: the messages before the last answer, and
    the references and targets of that answer.

    dataset: its name. index: the record's. An item gets its 'prediction' in `answer_all`.
    """
    for n, conversation in enumerate(record['conversations']):
        messages = conversation['messages']
        # Earlier answers of a conversation are part of its prompt; only the last one is asked for.
        last = last_answer(messages)
        reference = messages[last]
        answers = conversation.get('answers') or [reference['content']]

        points = (reference.get('points') or {}).get('points', [])
        # A box has its centre as the only point, and a prediction anywhere in the box is a hit.
        if conversation.get('box') and len(points) == 1:
            points = [{**points[0], 'box': conversation['box']}]

        item = {
            'dataset': dataset, 'record': index, 'conversation': n,
            'task': conversation.get('task', 'other'),
            'images': record['images'], 'video': record['video'],
            'messages': messages[:last],
            'reference': reference['content'], 'answers': answers, 'points': points,
        }
        for key in SCORING_KEYS:
            item[key] = conversation.get(key)
        yield item


def build_prompts(processor, dataset, index):
    """All questions of a record as prompts: [(Example, items)], one branch of the Example per item.

    The questions share their record's pictures, which are encoded once for each Example. Usually
    there is one Example; a record with more questions than a batch may have gets several.
    """
    record = dataset[index]
    # The pictures may fill the row up to what the answer needs.
    media = processor.media(record, dataset.folder, processor.seq_len - max_new_tokens)
    items = list(questions(dataset.name, record, index))
    conversations = [item['messages'] for item in items]
    example = processor.prompt(*conversations, **media)

    # Every answer keeps its own copy of the keys and values of the prompt, so that a batch's memory
    # is the number of questions times the length of the prompt.
    per_example = min(batch_size, batch_tokens // len(example.tokens))
    per_example = max(1, per_example)
    if per_example >= len(items):
        return [(example, items)]

    # The pictures are encoded again for each part, which costs time but bounds the memory.
    prompts = []
    for start in range(0, len(items), per_example):
        part = items[start:start + per_example]
        part_conversations = conversations[start:start + per_example]
        prompts.append((processor.prompt(*part_conversations, **media), part))
    return prompts


# --------------------------------------------------------------------------------------------------
# Answers

MAX_PENDING_BYTES = 2 ** 30    # of pixels that wait in memory before their questions are answered


def make_batches(prompts):
    """Groups prompts (Example, items) so that a group has at most batch_size questions and
    batch_tokens tokens with padding. A prompt that is larger by itself is a group of its own."""
    batches = []
    num_questions = 0                      # of the last batch
    # Prompts of similar length are neighbours, because they need little padding.
    for prompt in sorted(prompts, key=lambda prompt: len(prompt[0].tokens)):
        example, items = prompt
        num_questions += len(items)
        # This prompt is the longest so far, and the others would be padded to its length.
        num_tokens = num_questions * len(example.tokens)
        if not batches or num_questions > batch_size or num_tokens > batch_tokens:
            batches.append([])
            num_questions = len(items)
        batches[-1].append(prompt)
    return batches


def answer_batch(model, processor, examples):
    """The greedy answers [text] to all branches of some Examples, in order."""
    # Each Example is a row of its own, and all of its branches are answered at once.
    rows = [[example] for example in examples]
    batch = collate(rows, processor).to(model.pixel_scale.device)
    # Each step gives the next token of every answer, and -1 for an answer that has ended.
    steps = list(generate(model, batch, max_new_tokens))
    tokens = torch.stack(steps, 1).tolist()                # [questions, steps]
    texts = []
    for answer in tokens:
        # The end token is not part of the text.
        kept = [token for token in answer if token not in (-1, processor.im_end)]
        texts.append(processor.decode(kept))
    return texts


def answer_all(model, processor, prompts):
    """Answers prompts [(Example, items)]: each item gets its 'prediction', a text."""
    for batch in make_batches(prompts):
        examples = [example for example, _ in batch]
        batch_items = []
        for _, items in batch:
            batch_items += items
        predictions = answer_batch(model, processor, examples)
        for item, prediction in zip(batch_items, predictions):
            item['prediction'] = prediction


def prefetch_map(function, values):
    """Yields function(value) for each value, in order, computed a few values ahead by threads.

    A BadRow that the function raises is yielded in place of a result.
    """
    def result_or_error(value):
        try:
            return function(value)
        except BadRow as error:            # The caller reports the row and skips it.
            return error

    # The processes of one machine share its CPU cores.
    workers = max(1, min(4, os.cpu_count() // local_world_size))
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for value in values:
            pending.append(pool.submit(result_or_error, value))
            # The queue is short, because each result may hold a whole video's pixels.
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def answer_records(model, processor, dataset, indices):
    """Answers all questions of some records of a dataset.

    Returns (items with their 'prediction', Counter of the reasons why records were skipped,
    {task: [sum of losses, tokens]} of `reference_losses`, which is empty without --loss).
    """
    all_items = []
    skipped = Counter()
    used = []                              # indices of the records that could be read
    pending = []                           # prompts that wait to be answered
    pending_bytes = 0
    results = prefetch_map(partial(build_prompts, processor, dataset), indices)
    for index, prompts in zip(indices, results):
        if isinstance(prompts, BadRow):
            skipped[f'{dataset.name}: {prompts.reason}'] += 1
            tqdm.write(f'skipped {dataset.where(index)}: {prompts}', file=sys.stderr)
            continue
        used.append(index)
        for example, items in prompts:
            all_items += items
            pending.append((example, items))
            if example.patches is not None:
                pending_bytes += example.patches.nbytes
        # Many prompts at once make full batches, but long videos would fill the memory.
        if pending_bytes > MAX_PENDING_BYTES:
            answer_all(model, processor, pending)
            pending = []
            pending_bytes = 0
    answer_all(model, processor, pending)

    losses = {}
    if loss:
        losses = reference_losses(model, processor, dataset, used)
    return all_items, skipped, losses


def token_losses(model, processor, example):
    """[(task, cross entropy)] of each token of an Example that has a loss weight."""
    batch = collate([[example]], processor).to(model.pixel_scale.device)
    # Logits are computed only for positions with a loss, because the vocabulary makes them large.
    logits = model.logits(model.hidden_states(batch, batch.loss_index)).float()
    targets = batch.targets.flatten()[batch.loss_index]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction='none')
    tasks = [TASKS[task] for task in batch.loss_tasks.tolist()]
    return list(zip(tasks, losses.tolist()))


@torch.inference_mode()
def reference_losses(model, processor, dataset, indices):
    """{task: [sum of cross entropies in nats, number of tokens]} of records' reference answers."""
    def build_example(index):
        return processor.example(dataset[index], dataset.folder)

    sums = {}
    # The records are measured one at a time, so that no batch can be too large for the memory.
    for example in prefetch_map(build_example, indices):
        # A record can be too long with its reference answers although its questions fit.
        if isinstance(example, BadRow):
            continue
        for task, value in token_losses(model, processor, example):
            pair = sums.setdefault(task, [0., 0])
            pair[0] += value
            pair[1] += 1
    return sums


# --------------------------------------------------------------------------------------------------
# All records of all datasets, shared by the ranks and kept in a cache

CHUNK = 64                     # records that are answered together and cached as one line


def open_data(names):
    """Datasets from folders and JSONL files, separated by commas. UserError if there are none."""
    datasets = []
    for name in names.split(','):
        if not name:
            continue
        path = Path(name)
        if path.suffix == '.jsonl':
            datasets.append(Dataset(path.parent, path.stem))
        else:
            datasets.append(Dataset(path, split))
    if not datasets:
        raise UserError("data is empty; name a dataset folder, as in --data=data/shapes")
    return datasets


def make_names_unique(datasets):
    """Replaces a name that several datasets have by the path of each."""
    # Two folders may have the same name, and one folder may be given twice with other files.
    uses = Counter(dataset.name for dataset in datasets)
    for dataset in datasets:
        if uses[dataset.name] > 1:
            dataset.name = str(dataset.path.with_suffix(''))


def list_chunks(datasets, number):
    """[(dataset, first record, end)] of the first `number` records of each dataset; 0 takes all."""
    chunks = []
    for dataset in datasets:
        size = len(dataset)
        if number:
            size = min(number, size)
        for start in range(0, size, CHUNK):
            chunks.append((dataset, start, min(start + CHUNK, size)))
    return chunks


def answers_cache_path(folder, source, datasets, weights_dtype):
    """The path, without the rank's suffix, of the cache of answers.

    The name holds a hash of the settings, the data files and the weights that an answer depends
    on, so that a run with other settings, data or weights does not read them.
    """
    def stamp(path):
        stat = path.stat()
        return [str(path), stat.st_size, stat.st_mtime_ns]

    # The batch's size is in the key, because it can change the rounding and so an answer.
    key = [max_new_tokens, batch_size, batch_tokens, str(weights_dtype), loss]
    for dataset in datasets:
        key.append(stamp(dataset.path))
    for path in sorted(source.glob('*.safetensors')):
        key.append(stamp(path))
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f'answers-{digest[:12]}'


def read_answers_cache(cache):
    """{(dataset, first record, end): chunk} of all chunks that any rank has answered before."""
    known = {}
    # Files of a run with another number of ranks count too, because the chunks are the same.
    for path in cache.parent.glob(f'{cache.name}.*'):
        for line in path.read_text().splitlines(keepends=True):
            # A line without its end was cut short when the run was killed.
            if line.endswith('\n'):
                chunk = json.loads(line)
                known[tuple(chunk['rows'])] = chunk
    return known


def gather_chunks(known):
    """The chunks that all ranks know, on every rank."""
    # Answers are Python objects, which this call pickles and sends.
    every = [None] * world_size
    torch.distributed.all_gather_object(every, known)
    merged = {}
    for one in every:
        merged.update(one)
    return merged


def answer_chunks(model, processor, chunks, known, cache):
    """Answers this rank's share of the chunks that are not in `known`, and adds them to it."""
    # The chunks are dealt out in turn, so that each rank gets its share of every dataset.
    todo = []
    for i, (dataset, start, end) in enumerate(chunks):
        is_mine = i % world_size == rank
        if is_mine and (dataset.name, start, end) not in known:
            todo.append((dataset, start, end))

    num_records = sum(end - start for _, start, end in todo)
    # None hides the bar where the output is not a terminal.
    disable = None if rank == 0 else True
    with tqdm(total=num_records, unit='record', leave=None, disable=disable) as bar:
        for dataset, start, end in todo:
            bar.set_description(dataset.name)
            indices = range(start, end)
            items, skipped, losses = answer_records(model, processor, dataset, indices)
            # JSON has no tuples, so the key is a list in the file and a tuple in `known`.
            chunk = {'rows': [dataset.name, start, end], 'items': items, 'skipped': skipped,
                     'losses': losses}
            known[dataset.name, start, end] = chunk
            # Each rank appends to a file of its own, because two writers could mix their lines.
            if cache:
                with open(f'{cache}.{rank}of{world_size}', 'a') as f:
                    f.write(json.dumps(chunk) + '\n')
            bar.update(end - start)


def caption_vocabulary(items):
    """{dataset: the phrases of all objects in its records}, for the precision of captions."""
    vocabulary = {}
    for item in items:
        phrases = vocabulary.setdefault(item['dataset'], set())
        for words in item['objects'] or ():
            phrases.add(' '.join(words))
    return vocabulary


def evaluate(model, processor, datasets, number=0, cache=None):
    """Answers and scores all questions of the first `number` records of each dataset (0: of all).

    cache: path from `answers_cache_path`; None keeps no answers on disk. All ranks must call this
    together, and each gets the same result:
      rows     items of `questions` with 'prediction' and 'scores' (extra/metrics.py: `score`)
      skipped  Counter: reason -> number of records that could not be used
      losses   {(dataset, task): [sum of losses, tokens]}, empty without --loss
    """
    make_names_unique(datasets)
    # The names must be unique before the cache is read, because they are in its keys.
    known = read_answers_cache(cache) if cache else {}
    chunks = list_chunks(datasets, number)
    answer_chunks(model, processor, chunks, known, cache)
    if world_size > 1:
        known = gather_chunks(known)

    # The chunks are joined in the order of the data, whichever rank has answered them.
    items = []
    skipped = Counter()
    losses = {}
    for dataset, start, end in chunks:
        chunk = known[dataset.name, start, end]
        items += chunk['items']
        skipped.update(chunk['skipped'])
        for task, (value, tokens) in chunk['losses'].items():
            pair = losses.setdefault((dataset.name, task), [0., 0])
            pair[0] += value
            pair[1] += tokens

    # Scores are not cached, because a change of --radius or of a metric needs no new answers.
    vocabulary = caption_vocabulary(items)
    rows = []
    for item in items:
        scores = score(item, item['prediction'], vocabulary[item['dataset']], radius)
        rows.append({**item, 'scores': scores})
    return rows, skipped, losses


# --------------------------------------------------------------------------------------------------
# Tables and the report

def row_labels(keys):
    """The first three columns of a table, for its heading and each (dataset, task, metric)."""
    rows = [('dataset', 'task', 'metric'), *keys]
    # The first column is as wide as the longest name, because a name may be a path.
    width = 2 + max(12, max(len(dataset) for dataset, _, _ in rows))
    labels = []
    for dataset, task, metric in rows:
        labels.append(f'{dataset:<{width}}{task:<12}{metric:<17}')
    return labels


def summary_key(entry):
    return entry['dataset'], entry['task'], entry['metric']


def table(summary):
    """A text table of `summarise`'s entries, one line each."""
    heading, *labels = row_labels([summary_key(entry) for entry in summary])
    lines = [f"{heading}{'score':>7}   {'95% interval':<15}{'answers':>8}{'records':>9}"]
    for label, entry in zip(labels, summary):
        interval = f"{entry['low']:.1%} - {entry['high']:.1%}"
        counts = f"{entry['answers']:>8,}{entry['records']:>9,}"
        lines.append(f"{label}{entry['score']:>7.1%}   {interval:<15}{counts}")
    return '\n'.join(lines)


def comparison_table(summaries):
    """A text table of {checkpoint: summary}, with a column of scores for each checkpoint."""
    columns = []                           # {(dataset, task, metric): score} of each checkpoint
    keys = {}                              # a dict as an ordered set of all keys
    for summary in summaries.values():
        column = {summary_key(entry): entry['score'] for entry in summary}
        columns.append(column)
        keys.update(dict.fromkeys(column))

    heading, *labels = row_labels(keys)
    width = 2 + max(len(name) for name in summaries)
    lines = [heading + ''.join(name.rjust(width) for name in summaries)]
    for label, key in zip(labels, keys):
        line = label
        for column in columns:
            # A checkpoint may lack a metric: one that gives no points has no precision.
            cell = f'{column[key]:.1%}' if key in column else '-'
            line += cell.rjust(width)
        lines.append(line)
    return '\n'.join(lines)


def mean_score(row):
    """The mean of an answer's metrics, in [0, 1], by which the report is sorted. A metric with the
    denominator 0 (precision without a point) is left out."""
    ratios = []
    for numerator, denominator in row['scores'].values():
        if denominator:
            ratios.append(numerator / denominator)
    return sum(ratios) / max(1, len(ratios))


def draw_prediction(row, folder):
    """Yields an answer's pictures, or 12 frames of its video at most, with the target points in
    green and the predicted points in magenta."""
    targets = row['points']
    predicted = parse_points(row['prediction'])
    pictures = []                          # (picture, its target points, its predicted points)
    if row['video']:
        side = 192                         # pixels of the longer side; a video has many frames
        timed_targets = [point for point in targets if 't' in point]
        timed_predicted = [point for point in predicted if 't' in point]
        times, frames = load_video(open_media(folder, row['video']), 12)
        for time, frame in zip(times, frames):
            frame_targets = points_at(timed_targets, time)
            pictures.append((frame, frame_targets, points_at(timed_predicted, time)))
    else:
        side = 384
        for n, path in enumerate(row['images']):
            image_targets = points_in_picture(targets, n)
            image_predicted = points_in_picture(predicted, n)
            image = load_image(open_media(folder, path))
            pictures.append((image, image_targets, image_predicted))

    for image, image_targets, image_predicted in pictures:
        # A large picture is shrunk, a small one enlarged, so that the points are well visible.
        image.thumbnail((side, side))
        image = enlarge(image, side)
        # The predicted points are drawn last and lie on top.
        image = draw_points(image, image_targets, 'green')
        yield draw_points(image, image_predicted)


def report(rows, summary, datasets, title):
    """A self-contained HTML page: the table, then the page_rows worst answers with pictures."""
    folders = {dataset.name: dataset.folder for dataset in datasets}
    title = html.escape(title)
    # Every text from the data or the model is escaped, because it may contain HTML.
    shown = min(page_rows, len(rows))
    page = [
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>{STYLE}',
        f'<h1>{title}</h1><pre>{html.escape(table(summary))}</pre>',
        f'<p>The {shown} worst of {len(rows):,} answers. Magenta: points given; green: wanted.</p>',
    ]
    # The worst answers come first, because they show what the model cannot do.
    for row in sorted(rows, key=mean_score)[:page_rows]:
        dataset = html.escape(row['dataset'])
        task = html.escape(row['task'])
        page.append(f"<h2>{dataset} record {row['record']}, {task}: {mean_score(row):.0%}</h2>")
        for image in draw_prediction(row, folders[row['dataset']]):
            page.append(f"<img src='{data_url(image)}'>")

        # Target points are on the pictures, so that here their number is enough.
        if row['points']:
            reference = f"{len(row['points'])} points"
        else:
            reference = row['reference'] or 'no points'
        dialogue = [f"{message['role']}: {message['content']}" for message in row['messages']]
        dialogue.append(f"answer: {row['prediction']}")
        dialogue.append(f'wanted: {reference}')
        text = '\n'.join(dialogue)
        page.append(f'<pre>{html.escape(text)}</pre>')
    return '\n'.join(page)


# --------------------------------------------------------------------------------------------------
# The script

def print_results(source, summary, losses, skipped):
    """Prints the table, the loss of each task if it was measured, and why records were skipped."""
    print(f'{source}\n{table(summary)}')
    for (dataset, task), (value, tokens) in losses.items():
        mean = value / tokens              # nats per token
        figures = f'loss {mean:.4f}, perplexity {math.exp(mean):.3f}, {tokens:,} tokens'
        print(f'{dataset:<14}{task:<12}{figures}')
    if skipped:
        reasons = [f'{reason} {n}' for reason, n in skipped.items()]
        print('records skipped: ' + ', '.join(reasons))


def write_results(folder, source, rows, summary, losses, skipped, datasets):
    """Writes predictions.jsonl, metrics.json and report.html to the folder."""
    with open(folder / 'predictions.jsonl', 'w') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')

    loss_entries = []
    for (dataset, task), (value, tokens) in losses.items():
        entry = {'dataset': dataset, 'task': task, 'loss': value / tokens, 'tokens': tokens}
        loss_entries.append(entry)
    metrics = {
        'checkpoint': str(source), 'data': data, 'split': split, 'num': num,
        'skipped': skipped, 'metrics': summary, 'losses': loss_entries,
    }
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=2))

    page = report(rows, summary, datasets, f'{source} on {data}')
    (folder / 'report.html').write_text(page, encoding='utf-8')

    names = ('metrics.json', 'predictions.jsonl', 'report.html')
    paths = [os.path.join(folder, name) for name in names]
    print(f"wrote {', '.join(paths)}\n")


def score_checkpoint(path, datasets):
    """Evaluates one checkpoint, prints and writes its results (on rank 0), returns its summary."""
    model, processor, source = load_checkpoint(path)
    dev = pick_device(device)
    weights_dtype = pick_weights_dtype(dtype, dev)
    model.to(dev, weights_dtype).eval()

    # Several checkpoints each write to their own folder; `main` refuses --out for them.
    folder = Path(out) if out else source / 'eval'
    folder.mkdir(parents=True, exist_ok=True)
    cache = answers_cache_path(folder, source, datasets, weights_dtype)
    if fresh and rank == 0:
        for old in folder.glob(f'{cache.name}.*'):
            old.unlink()
    # The other ranks wait here, because they must not read a cache that rank 0 is deleting.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()

    rows, skipped, losses = evaluate(model, processor, datasets, num, cache)
    summary = summarise(rows)
    if rank == 0:
        print_results(source, summary, losses, skipped)
        write_results(folder, source, rows, summary, losses, skipped, datasets)
    return summary


def main():
    paths = [path for path in checkpoint.split(',') if path]
    if not paths:
        raise UserError("which checkpoint? name a step folder or a run, as in "
                        "--checkpoint=out/demo")
    if out and len(paths) > 1:
        raise UserError(f"--out takes the results of one checkpoint, but --checkpoint names "
                        f"{len(paths)}; leave --out away, and each writes to its own folder eval/")
    if threads:
        torch.set_num_threads(threads)

    # Wrong paths are found before any weights are loaded or answers given, because both take long.
    datasets = open_data(data)
    for path in paths:
        if not Path(path).is_dir():
            raise UserError(f"checkpoint {path} does not exist")

    # Gloo on the CPU is enough, because the ranks exchange answers once and no tensors.
    if world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group('gloo')

    summaries = {}
    for path in paths:
        summaries[path] = score_checkpoint(path, datasets)
    if len(paths) > 1 and rank == 0:
        print(comparison_table(summaries))


if __name__ == '__main__':
    try:
        main()
    except UserError as error:             # The user can put it right: one line instead of a trace.
        sys.exit(f'error: {error}')
