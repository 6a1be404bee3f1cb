"""download.py --pages: what there is, by stage, and some records of each set with their pictures, as HTML."""
import random
from html import escape
from pathlib import Path

from PIL import Image

from extra.inspector import STYLE
from data import Dataset
from media import BadRow, data_url, draw_points, load_image, load_video, open_media, points_at

COUNTS = ('rows', 'records', 'conversations', 'media')


def write(chosen, out, number, states, manifests):
    """<out>/index.html with all sets by stage, <out>/<name>/sample.html with `number` records of each that is complete."""
    page, out = [STYLE, '<title>datasets</title>'], Path(out)
    for stages in dict.fromkeys(e['stages'] for e in chosen):
        sets = [e for e in chosen if e['stages'] == stages]
        here = sum(bool(manifests[e['name']]) for e in sets)
        page += [f'<h2>stage {escape(stages)}: {len(sets)} sets, {here} here</h2><table>',
                 '<tr><th>set<th>group<th>task<th>published' + ''.join(f'<th>{name}' for name in COUNTS) + '<th>state']
        for e in sets:
            name, manifest = e['name'], manifests[e['name']]
            if manifest:
                lines = samples(e, manifest, out / name, number)
                (out / name / 'sample.html').write_text('\n'.join(lines), encoding='utf-8')
            counts = [f"{manifest['counts'].get(k, 0):,}" if manifest else '' for k in COUNTS]
            linked = f'<a href="{name}/sample.html">{name}</a>' if manifest else name
            size = f"{int(e['examples']):,}" if e['examples'] else ''
            cells = [linked, e['group'], escape(e['task']), size, *counts, escape(states[name])]
            page.append('<tr><td>' + '<td>'.join(cells))
        page.append('</table>')
    out.mkdir(parents=True, exist_ok=True)
    (out / 'index.html').write_text('\n'.join(page), encoding='utf-8')


def samples(entry, manifest, folder, number):
    """A page's lines: where a set comes from, what was left out, records at random."""
    yield f"{STYLE}<title>{entry['name']}</title><h1>{entry['name']}</h1>"
    yield f"<p>{escape(entry['hub'])} {escape(entry['config'])}, read by {entry['converter']}"
    left = [(n, k.removeprefix('left out: ')) for k, n in manifest['counts'].items() if k.startswith('left out: ')]
    yield '<p>left out: ' + (', '.join(f'{escape(why)} {n:,}' for n, why in sorted(left, reverse=True)) or 'nothing')
    for split in ('train', 'validation'):
        if f'{split}.jsonl' not in manifest['files']:
            continue
        dataset = Dataset(folder, split)
        for row in sorted(random.Random(0).sample(range(dataset.rows), min(number, dataset.rows))):
            yield f'<h2>{escape(dataset.where(row))}</h2>'
            try:
                record = dataset[row]
                yield from (f'<img src="{data_url(picture)}">' for picture in pictures(record, folder))
                for talk in record['conversations']:
                    yield '<pre>' + escape('\n'.join(map(line, talk['messages']))) + '</pre>'
            except BadRow as e:
                yield f'<p>{escape(str(e))}'


def line(message):
    points = message.get('points')
    return f"{message['role']}: {message['content']}" + (
        f" [{len(points['points'])} points of {points['label']!r}]" if points else '')


def pictures(record, folder, side=320):
    """The pictures of a record, or six frames of its video, small, with its points drawn."""
    points = [p for talk in record['conversations'] for m in talk['messages']
              for p in (m.get('points') or {}).get('points', ())]
    if record.get('video'):
        times, frames = load_video(open_media(folder, record['video']), 6, start=record.get('start') or 0.,
                                   end=record.get('end'))
        shown = [(frame, points_at(points, t)) for t, frame in zip(times, frames)]
    else:
        shown = [(load_image(open_media(folder, path)), [p for p in points if p.get('image', 0) == i])
                 for i, path in enumerate(record['images'])]
    for image, here in shown:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        yield draw_points(image, here)
