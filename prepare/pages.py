"""HTML pages of all datasets and of some of their records: download.py --pages.

    data/index.html            a table of all datasets for each stage, with counts
    data/<name>/sample.html    where a dataset comes from, what was left out, and some records

Pictures are in the pages themselves, and points are drawn on them. Not in this file: which datasets
are chosen and what state they are in, which download.py passes on.
"""
import random
from html import escape
from pathlib import Path

from PIL import Image
from store import reasons_left_out

from extra.inspector import STYLE
from data import Dataset
from media import (BadRow, data_url, draw_points, load_image, load_video, open_media, points_at,
                   points_in_picture, points_of)

COUNTS = ('rows', 'records', 'conversations', 'media')
VIDEO_FRAMES = 6               # a video is shown by this number of frames


def write(chosen, out, number, states, manifests):
    """Writes index.html with all chosen datasets and a page with `number` records of each.

    `states` and `manifests` are dicts by the datasets' names. A dataset whose manifest is None is
    not complete and gets no page.
    """
    out = Path(out)
    for entry in chosen:
        name = entry['name']
        if manifests[name]:
            lines = samples(entry, manifests[name], out / name, number)
            (out / name / 'sample.html').write_text('\n'.join(lines), encoding='utf-8')

    page = [STYLE, '<title>datasets</title>']
    # A dataset may belong to several stages; those with the same stages make one table.
    for stages in dict.fromkeys(entry['stages'] for entry in chosen):
        listed = [entry for entry in chosen if entry['stages'] == stages]
        complete = [entry for entry in listed if manifests[entry['name']]]
        title = f'stage {escape(stages)}: {len(listed)} sets, {len(complete)} here'
        page.append(f'<h2>{title}</h2><table>')
        heads = ['set', 'group', 'task', 'published', *COUNTS, 'state']
        page.append('<tr>' + ''.join(f'<th>{head}' for head in heads))
        for entry in listed:
            cells = cells_of(entry, manifests[entry['name']], states[entry['name']])
            page.append('<tr>' + ''.join(f'<td>{cell}' for cell in cells))
        page.append('</table>')
    out.mkdir(parents=True, exist_ok=True)
    (out / 'index.html').write_text('\n'.join(page), encoding='utf-8')


def cells_of(entry, manifest, state):
    """The cells of a dataset's line in index.html, as HTML."""
    name = entry['name']
    published = f"{int(entry['examples']):,}" if entry['examples'] else ''
    # Only a complete dataset has counts and a page to link to.
    if manifest:
        link = f'<a href="{name}/sample.html">{name}</a>'
        counts = [f"{manifest['counts'].get(key, 0):,}" for key in COUNTS]
    else:
        link = name
        counts = [''] * len(COUNTS)
    return [link, entry['group'], escape(entry['task']), published, *counts, escape(state)]


def samples(entry, manifest, folder, number):
    """The lines of a dataset's page."""
    yield f"{STYLE}<title>{entry['name']}</title><h1>{entry['name']}</h1>"
    hub = escape(entry['hub'])
    config = escape(entry['config'])
    yield f"<p>{hub} {config}, read by {entry['converter']}"
    yield f"<p>left out: {left_out(manifest['counts'])}"
    for split in ('train', 'validation'):
        if f'{split}.jsonl' not in manifest['files']:
            continue
        dataset = Dataset(folder, split)
        # The seed is fixed, so that the same records are shown each time.
        count = min(number, dataset.rows)
        rows = random.Random(0).sample(range(dataset.rows), count)
        for row in sorted(rows):
            yield f'<h2>{escape(dataset.where(row))}</h2>'
            # A record that cannot be opened is shown with the reason, because this page is there to
            # find such records.
            try:
                yield from record_lines(dataset[row], folder)
            except BadRow as e:
                yield f'<p>{escape(str(e))}'


def left_out(counts):
    """The reasons why rows were left out, with their numbers, the most frequent first."""
    texts = [f'{escape(reason)} {number:,}' for number, reason in reasons_left_out(counts)]
    return ', '.join(texts) or 'nothing'


def record_lines(record, folder):
    """The pictures and conversations of one record as HTML. Raises BadRow."""
    for picture in pictures(record, folder):
        yield f'<img src="{data_url(picture)}">'
    for conversation in record['conversations']:
        lines = [message_line(message) for message in conversation['messages']]
        yield '<pre>' + escape('\n'.join(lines)) + '</pre>'


def message_line(message):
    """A message in one line of text."""
    line = f"{message['role']}: {message['content']}"
    points = message.get('points')
    if points:
        line += f" [{len(points['points'])} points of {points['label']!r}]"
    return line


def pictures(record, folder, side=320):
    """The pictures of a record, or some frames of its video, with its points drawn on them.

    The longer side of each has at most `side` pixels, so that a page does not become too large.
    """
    points = points_of(record)
    shown = []                 # [(picture, the points on it)]
    # A point belongs to a moment of a video, or to one of several pictures.
    if record.get('video'):
        file = open_media(folder, record['video'])
        start = record.get('start') or 0.
        times, frames = load_video(file, VIDEO_FRAMES, start=start, end=record.get('end'))
        for t, frame in zip(times, frames):
            shown.append((frame, points_at(points, t)))
    else:
        for i, path in enumerate(record['images']):
            picture = load_image(open_media(folder, path))
            shown.append((picture, points_in_picture(points, i)))
    for picture, points_here in shown:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        yield draw_points(picture, points_here)
