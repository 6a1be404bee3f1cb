"""From a hub to folders that train.py reads, with what goes wrong on the way."""
import csv
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'prepare')]
import fetch  # noqa: E402
import sources  # noqa: E402
import store as dataset_store  # noqa: E402
from convert import CONVERTERS  # noqa: E402
from hub import Hub  # noqa: E402

import eval as evaluation  # noqa: E402
from extra import metrics  # noqa: E402
from data import Dataset, format_points, normalise  # noqa: E402
from media import BadRow, load_image, load_video, open_media  # noqa: E402

FIELDS = 'name stages task group rate hub config tables split validation examples style converter media automatic instructions'.split()


def jpeg(i, size=(40, 30)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(out, 'JPEG')
    return out.getvalue()


def png(pixels):
    Image.fromarray(pixels.astype(np.uint8)).save(out := io.BytesIO(), 'PNG')
    return out.getvalue()


def table(path, *entries):
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, FIELDS, restval='')
        w.writeheader()
        w.writerows({'stages': '1', 'split': 'train', 'automatic': 'yes', 'media': 'urls', **e} for e in entries)
    return path


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / 'hub') as hub:
        yield hub


def store(hub, repo, name, rows, card=None):
    path = hub.folder / 'datasets' / repo / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith('.parquet'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    else:
        path.write_text('\n'.join(map(json.dumps, rows)))
    hub.cards[repo] = card


def command(hub, tmp_path, *args):
    return [sys.executable, str(ROOT / 'prepare/download.py'), '--table', str(tmp_path / 'table.csv'), '--out',
            str(tmp_path / 'data'), *args]


def environment(hub, tmp_path):
    return {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'}


def run(hub, tmp_path, *args, code=0):
    done = subprocess.run(command(hub, tmp_path, *args), capture_output=True, text=True, env=environment(hub, tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    return done


def records(folder, split='train'):
    return [json.loads(line) for line in (folder / f'{split}.jsonl').read_text().splitlines()]


# -- the table

def test_datasets_csv_lines_are_complete():
    entries = list(csv.DictReader(open(ROOT / 'prepare/datasets.csv', newline='')))
    assert list(entries[0]) == FIELDS and len({e['name'] for e in entries}) == len(entries)
    assert sum('eval' not in e['stages'] for e in entries) >= 90
    for e in entries:
        assert e['automatic'] in ('yes', 'manual') and e['split'] and e['stages'], e['name']
        if e['automatic'] == 'yes':
            assert e['converter'] in CONVERTERS, e['name']
            assert e['hub'].count('/') == 1 or e['tables'].startswith(('http', 'inside:')), e['name']
            assert e['media'] in ('urls', 'embedded', 'none') or all(
                x.startswith(('hub:', 'http', 'parts:', 'subtitles:', 'fps:')) for x in e['media'].split()), e['name']
        else:
            assert 'source/' in e['instructions'] or 'no converter' in e['instructions'], e['name']
            assert not e['instructions'].startswith('Put'), e['name']          # says what, and from where
            assert e['converter'] in CONVERTERS or 'no converter' in e['instructions'], e['name']


# -- media that are fine and media that are not

def test_fetcher_retries_limits_and_reasons(hub):
    hub.media['a.jpg'] = data = jpeg(0)
    fetcher = fetch.Fetcher(deadline=2., pause=.05, cap=.2)
    assert all(fetcher.get(f'{hub.url}/media/{how}/a.jpg') == data for how in ('fine', 'busy', 'broken'))

    def why(how, **more):
        with pytest.raises(BadRow) as e:
            fetch.Fetcher(**{'deadline': 2., 'pause': .05, 'cap': .2, **more}).get(f'{hub.url}/media/{how}/a.jpg')
        return e.value.reason
    start = time.monotonic()
    assert why('angry') == 'HTTP 429' and time.monotonic() - start < 30       # and not a day
    assert why('gone') == 'HTTP 404' and hub.asked['/media/gone/a.jpg'] == 1
    assert why('cut') == 'cut short' and hub.asked['/media/cut/a.jpg'] == 4
    assert why('slow', deadline=.5) == 'too slow' and why('fine', max_bytes=100) == 'too many bytes'
    for url, reason in (('http://localhost:1/a.jpg', 'no answer'), ('http://[', 'not a URL'), ('file:///etc/passwd', 'not a URL')):
        with pytest.raises(BadRow) as e:
            fetcher.get(url)
        assert e.value.reason in (reason, 'no answer')


def test_media_kind_comes_from_content(hub):
    assert dataset_store.look(jpeg(0), False)[1:] == ('jpg', (40, 30))
    for data, reason in ((b'<!DOCTYPE html>', 'a web page'), (b'', 'not a picture or video'), (b'GIF89a', 'unreadable media'),
                         (jpeg(0)[:-200], 'unreadable media')):
        with pytest.raises(BadRow) as e:
            dataset_store.look(data, False)
        assert e.value.reason == reason
    small, extension, size = dataset_store.look(jpeg(0, (400, 200)), False, max_side=100)
    assert extension == 'jpg' and size == (400, 200) and load_image(io.BytesIO(small)).size == (100, 50)
    clip = dataset_store.encode([np.full((48, 64, 3), 60 * i, np.uint8) for i in range(4)], 2)
    assert dataset_store.look(clip, True)[1:] == ('mp4', (64, 48))
    smaller, *_ = dataset_store.look(clip, True, video_side=32)
    times, frames = load_video(io.BytesIO(smaller), 8)
    assert frames[0].size == (32, 24) and list(times) == [0, .5, 1, 1.5]


def test_archives_find_by_path_end_and_name(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('train2014/COCO_1.jpg', b'one')
        z.writestr('frames/horse/00000.jpg', b'f0')
        z.writestr('frames/horse/00001.jpg', b'f1')
    with tarfile.open(tmp_path / 'b.tar.gz', 'w:gz') as t:
        for name, data in (('videos/v1.mp4', b'two'), ('../evil', b'x')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    (tmp_path / 'source/deep').mkdir(parents=True)
    (tmp_path / 'source/deep/c.png').write_bytes(b'three')
    with pytest.raises(tarfile.OutsideDestinationError):
        fetch.Archives([tmp_path / 'b.tar.gz'])
    a = fetch.Archives([tmp_path / 'a.zip', tmp_path / 'source'])
    assert a.read('train2014/COCO_1.jpg') == a.read('COCO_1.jpg') == a.read('COCO_1') == b'one'
    assert a.read('c.png') == a.read('deep/c.png') == b'three' and a.read('horse') == [b'f0', b'f1']
    with pytest.raises(BadRow):
        a.read('missing')
    (tmp_path / 'source/boat/img').mkdir(parents=True)
    for i in (10, 9):                        # as TrackingNet and LaSOT name them
        (tmp_path / f'source/boat/img/{i}.jpg').write_bytes(b'%d' % i)
    with zipfile.ZipFile(tmp_path / 'source/deep/inner.zip', 'w') as z:
        z.writestr('clips/v2.mp4', b'four')
    a = fetch.Archives([tmp_path / 'a.zip', tmp_path / 'source'])
    assert a.read('boat') == [b'9', b'10'] and a.read('v2') == b'four'
    (tmp_path / 'other/deep').mkdir(parents=True)
    (tmp_path / 'other/deep/c.png').write_bytes(b'another')          # the same path: which is meant?
    (tmp_path / 'other/Annotations/horse').mkdir(parents=True)
    (tmp_path / 'other/Annotations/horse/0.png').write_bytes(b'mask')
    a = fetch.Archives([tmp_path / 'a.zip', tmp_path / 'source', tmp_path / 'other'])
    assert a.read('horse') == [b'f0', b'f1']
    with pytest.raises(BadRow) as e:
        a.read('c.png')
    assert e.value.reason == 'several of that name' and a.read('other/deep/c.png') == b'another'


# -- a whole dataset

def test_dataset_with_dead_links_and_held_out_rows(hub, tmp_path):
    how = ['fine', 'gone', 'page', 'busy', 'broken', 'cut']
    rows = []
    for i in range(60):
        hub.media[f'{i}.jpg'] = jpeg(i)
        manner = how[i % 6] if i % 6 < 5 or i == 5 else 'fine'
        rows.append({'image_url': f'{hub.url}/media/{manner}/{i}.jpg', 'label': 'Cup', 'count': 1, 'points': [{'x': 50., 'y': 25.}],
                     'image_sha256': hashlib.sha256(hub.media[f'{i}.jpg'] if i != 6 else b'').hexdigest()})
    rows.append({**rows[0], 'label': 'Pot', 'points': [{'x': 10., 'y': 1.}]})      # the first picture again
    rows += [{**rows[12], 'label': None}, {**rows[18], 'points': [{'x': 500., 'y': 1.}]}]
    store(hub, 'o/points', 'data/train-00000.parquet', rows, {'configs': [{'config_name': 'default', 'data_files': [
        {'split': 'train', 'path': 'data/train-*'}]}]})
    table(tmp_path / 'table.csv', {'name': 'points', 'hub': 'o/points', 'converter': 'points', 'style': 'pointing',
                                   'examples': '60', 'validation': '12'})
    out = run(hub, tmp_path, '--stage', 'pretraining', '--workers', '8', '--tar-bytes', '20000', '--deadline', '5',
              '--patience', '.2').stdout
    folder = tmp_path / 'data/points'
    kept, held = records(folder), records(folder, 'validation')
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert len(kept) + len(held) == 38 == manifest['counts']['records'] and 2 <= len(held) <= 12
    for reason, n in (('HTTP 404', 10), ('a web page', 10), ('cut short', 1), ('another picture', 1), ('no label', 1), ('point outside', 1)):
        assert manifest['counts'][f'left out: {reason}'] == n and reason in out
    first = next(r for r in kept + held if r['id'] == 'points-0')
    assert len(first['conversations']) == 4    # both labels, pointed at and counted
    assert len(list(folder.glob('media-*.tar'))) > 1 and not (folder / '.work').exists()
    for r in kept + held:
        normalise(r)
        assert load_image(open_media(folder, r['images'][0])).size == (40, 30)
    assert len(list(csv.reader(open(folder / 'lost.csv')))) == 22
    assert len(Dataset(folder, 'train')) == len(kept)
    # asked again, nothing is fetched; what is changed is seen and made anew
    asked = sum(hub.asked.values())
    run(hub, tmp_path, '--stage', 'pretraining')
    assert sum(hub.asked.values()) == asked
    assert 'complete' in run(hub, tmp_path, '--stage', 'pretraining', '--list').stdout
    assert 'as written' in run(hub, tmp_path, '--stage', 'pretraining', '--check').stdout
    with open(folder / 'media-00000.tar', 'r+b') as f:
        f.seek(700)
        f.write(b'XXXX')
    assert 'WRONG: media-00000.tar' in run(hub, tmp_path, '--stage', 'pretraining', '--check', code=1).stdout
    os.truncate(folder / 'train.jsonl', 100)
    assert 'changed: train.jsonl' in run(hub, tmp_path, '--stage', 'pretraining', '--list').stdout


def test_resume_after_kill_gives_same_bytes(hub, tmp_path):
    rows, wanted = [], int(os.environ.get('KILLS', 4))
    for i in range(225 * wanted):
        hub.media[f'{i}.jpg'] = jpeg(i, (16, 16))
        rows.append({'image_url': f'{hub.url}/media/{"gone" if i % 7 == 3 else "fine"}/{i}.jpg', 'caption': f'Picture {i}.', 'transcripts': []})
        if i % 50 == 0:                      # more than one record has
            rows += [{**rows[-1], 'caption': f'Again {j}.'} for j in range(20)]
    store(hub, 'o/cap', 'train.parquet', rows)
    entry = {'name': 'cap', 'hub': 'o/cap', 'converter': 'caption', 'examples': str(len(rows)), 'validation': '90'}
    table(tmp_path / 'table.csv', entry)
    args = ['--datasets', 'cap', '--workers', '4', '--tar-bytes', '100000']
    run(hub, tmp_path, *args)
    (tmp_path / 'data').rename(tmp_path / 'peace')
    chance, kills = random.Random(0), 0
    while kills < wanted:
        process = subprocess.Popen(command(hub, tmp_path, *args), env=environment(hub, tmp_path), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        asked = sum(hub.asked.values())
        while process.poll() is None and sum(hub.asked.values()) < asked + 5:
            time.sleep(.01)
        time.sleep(chance.uniform(0, 1.2))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    run(hub, tmp_path, *args)
    print(f'{kills} kills; {hub.most} requests at once')
    assert kills and hub.most <= 8             # of one host
    for path in (tmp_path / 'peace/cap').iterdir():
        assert path.read_bytes() == (tmp_path / 'data/cap' / path.name).read_bytes(), path.name
    assert sorted(p.name for p in (tmp_path / 'data/cap').iterdir()) == sorted(p.name for p in (tmp_path / 'peace/cap').iterdir())


def test_embedded_pictures_archives_and_manual_sources(hub, tmp_path):
    store(hub, 'o/cosyn', 'chart/train-0.parquet', [
        {'id': str(i), 'image': {'bytes': jpeg(i), 'path': None},
         'qa_pairs': {'question': ['Highest?'], 'explanation': ['Look.'], 'answer': ['4']}} for i in range(5)])
    store(hub, 'o/cosyn', 'table/train-0.parquet', [{'id': 'x'}])
    store(hub, 'o/vqa', '.convert/default/train/0000.parquet', [
        {'image': 'COCO_1.jpg', 'message_list': [{'question': 'What?', 'answers': ['cat'] * 3}]},
        {'image': 'COCO_2.jpg', 'message_list': [{'question': 'What?', 'answers': ['dog'] * 3}]}])
    store(hub, 'o/tracks', 'train.jsonl', [
        {'id': 'k', 'video': 'horse', 'fps': 2, 'expression': 'the horse', 'width': 40, 'height': 30,
         'frame_trajectories': [{'time': t / 2, 'points': [{'id': 0, 'point': [20, 15], 'occluded': False}]} for t in range(4)]}])
    (hub.folder / 'datasets/o/tracks/rates.json').write_text('{"horse": 4}')
    (hub.folder / 'datasets/o/tracks/told.json').write_text('{"horse": {"0": {"start": 0.5, "end": 1, "text": "Hey"}, "1": {"start": 2}}}')
    zips = hub.folder / 'zips'
    zips.mkdir()
    with zipfile.ZipFile(zips / 'train2014.zip', 'w') as z:
        z.writestr('train2014/COCO_1.jpg', jpeg(1))
    with zipfile.ZipFile(hub.folder / 'datasets/o/tracks/frames.zip', 'w') as z:
        for i in range(4):
            z.writestr(f'JPEGImages/horse/{i:05d}.jpg', jpeg(i))
    table(tmp_path / 'table.csv',
          {'name': 'chart', 'hub': 'o/cosyn', 'config': 'chart', 'converter': 'explained_qa', 'style': 'cosyn_chart_exp', 'media': 'embedded'},
          {'name': 'vqa', 'hub': 'o/vqa', 'converter': 'vqa', 'style': 'vqa2', 'media': f'{hub.url}/cdn/zips/train2014.zip'},
          {'name': 'tracks', 'hub': 'o/tracks', 'converter': 'track', 'style': 'track', 'media': 'hub:o/tracks:*.zip subtitles:o/tracks:told.json rates:o/tracks:rates.json'},
          {'name': 'mine', 'hub': 'example.org/form', 'converter': 'qa', 'media': 'folder', 'automatic': 'manual',
           'instructions': 'Ask for it; put train.csv and the videos under data/mine/source/'})
    (tmp_path / 'data/.archives').mkdir(parents=True)
    whole, address = (zips / 'train2014.zip').read_bytes(), f'{hub.url}/cdn/zips/train2014.zip'
    archive = tmp_path / f'data/.archives/{hashlib.sha256(address.encode()).hexdigest()[:8]}-train2014.zip'
    Path(f'{archive}.part').write_bytes(whole[:300])       # an earlier run was killed
    dry = run(hub, tmp_path, '--stage', 'pretraining', '--dry-run').stdout
    assert '1 tables' in dry and f'1 archives, {len(whole) / 1e6:.1f} MB' in dry and 'manual' in dry and not (tmp_path / 'data/chart').exists()
    out = run(hub, tmp_path, '--stage', 'pretraining', '--num-samples', '3').stdout
    assert 'mine: to be fetched by hand' in out
    assert len(records(tmp_path / 'data/chart')) == 3 and 'Look.\nAnswer: 4' in (tmp_path / 'data/chart/train.jsonl').read_text().replace('\\n', '\n')
    assert [r['id'] for r in records(tmp_path / 'data/vqa')] == ['vqa-0'] and 'not in the archives 1' in out
    assert archive.read_bytes() == whole
    (track,) = records(tmp_path / 'data/tracks')
    times, frames = load_video(open_media(tmp_path / 'data/tracks', track['video']), 8)
    assert list(times) == [0, .5, .75] and normalise(track)             # four frames at 4 a second, not at the annotation's 2
    assert track['subtitles'] == [{'start': .5, 'end': 1, 'text': 'Hey'}]
    source = tmp_path / 'data/mine/source'
    source.mkdir(parents=True)
    (source / 'train.csv').write_text('video,question,answer,start,end\nv1,What?,A cat.,0,1\nv9,Who?,Nobody.,0,1\nv1,And then?,It sleeps.,1,2\n')
    (source / 'v1.mp4').write_bytes(dataset_store.encode([np.zeros((32, 32, 3), np.uint8)] * 4, 2))
    run(hub, tmp_path, '--datasets', 'mine')
    first, then = records(tmp_path / 'data/mine')
    assert [r['conversations'][0]['messages'][1]['content'] for r in (first, then)] == ['A cat.', 'It sleeps.']
    assert first['video'] == then['video'] and (then['start'], then['end']) == (1, 2)           # stored once
    told = run(hub, tmp_path, '--show-manual-instructions').stdout
    assert 'Ask for it' in told and 'chart' not in told


def test_picture_with_many_conversations_is_fetched_once(hub, tmp_path):
    hub.media['a.jpg'], hub.media['b.jpg'] = jpeg(0), jpeg(1)
    store(hub, 'o/qa', 'train.parquet', [{'image_url': f'{hub.url}/media/fine/{"ba"[i % 40 < 39]}.jpg', 'question': f'What {i}?', 'answer': 'This.'}
                                         for i in range(40)])
    table(tmp_path / 'table.csv', {'name': 'qa', 'hub': 'o/qa', 'converter': 'qa'},
          {'name': 'held', 'hub': 'o/qa', 'converter': 'qa', 'stages': 'eval', 'split': 'train'})
    run(hub, tmp_path, '--stage', 'pretraining', '--include-eval')
    made = records(tmp_path / 'data/qa')
    assert [len(r['conversations']) for r in made] == [16, 16, 7, 1] and len({r['images'][0] for r in made}) == 2
    with tarfile.open(tmp_path / 'data/qa/media-00000.tar') as tar:
        assert len(tar.getnames()) == 2
    assert hub.asked['/media/fine/a.jpg'] == 2 and len(records(tmp_path / 'data/held', 'validation')) == 4         # once for each set
    assert 'held' not in run(hub, tmp_path, '--stage', 'pretraining', '--list').stdout


def test_mistakes_are_one_line(hub, tmp_path):
    store(hub, 'o/odd', 'train.parquet', [{'something': 'else'}])
    store(hub, 'o/bytes', 'train.parquet', [{'image': {'bytes': jpeg(0), 'path': None}, 'question': 'What?', 'answer': 'This.'}])
    table(tmp_path / 'table.csv', {'name': 'none', 'hub': 'o/none', 'converter': 'qa'}, {'name': 'odd', 'hub': 'o/odd', 'converter': 'caption'},
          {'name': 'bytes', 'hub': 'o/bytes', 'converter': 'qa'})
    done = run(hub, tmp_path, '--stage', 'pretraining', code=1)
    assert 'error: none: o/none' in done.stderr and 'Traceback' not in done.stderr
    assert "media must be 'embedded', not 'urls'" in done.stderr
    assert "other schema (KeyError 'caption')" in done.stdout
    away = subprocess.run(command(hub, tmp_path, '--datasets', 'odd'), capture_output=True, text=True,
                          env={**environment(hub, tmp_path), 'HF_ENDPOINT': 'http://localhost:1', 'HF_HOME': str(tmp_path / 'other')})
    shown = subprocess.run(command(hub, tmp_path, '--datasets', 'none', '--dry-run'), capture_output=True, text=True,
                           env={**environment(hub, tmp_path), 'HF_ENDPOINT': 'http://localhost:1'})
    assert 'Traceback' not in away.stderr + shown.stderr and 'error: o/none' in shown.stdout
    assert 'no such dataset: x' in run(hub, tmp_path, '--datasets', 'x', code=1).stderr


def test_tables_of_every_format_and_broken_bytes(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"a": "x\xff"}\n\n{broken\n')
    (tmp_path / 'a.json').write_text('{"data": [{"a": 1}]}')
    (tmp_path / 'b.json').write_text('{"v1": {"a": 2}}')
    (tmp_path / 'a.tsv').write_text('a\tb\n1\t2\n')
    (tmp_path / 'a.csv').write_text('v1,[0:5],no,x,y,Q?,yes\n')
    (tmp_path / 'b.csv').write_text('gif_name\tquestion\nx\tWhat, how?\n')
    (tmp_path / 'c.json').write_text('{"imageName": "0.png", "questions": {"Q": {"correctAnswer": 1}}}')
    (tmp_path / 'd.json').write_text('{"database": {"v1": {"subset": "training"}, "v2": {"subset": "testing"}}}')
    (tmp_path / 'b.jsonl').write_text('["q", "a"]\n["Q", 2]\n\n["R", 3]\n')
    (tmp_path / 'a.txt').write_text('V1 0.0 6.9##a person sits.\n')
    read = lambda name: list(sources.rows(tmp_path / name))
    assert read('a.jsonl') == [{'a': 'x\ufffd'}, {}] and read('a.json') == [{'a': 1}] and read('b.json') == [{'video_id': 'v1', 'a': 2}]
    assert read('b.csv') == [{'gif_name': 'x', 'question': 'What, how?'}] and read('a.txt') == [{'line': 'V1 0.0 6.9##a person sits.'}]
    assert read('c.json') == [{'imageName': '0.png', 'questions': {'Q': {'correctAnswer': 1}}}]
    assert list(sources.rows(tmp_path / 'd.json', 'training')) == [{'video_id': 'v1', 'subset': 'training'}]
    assert read('b.jsonl') == [{'q': 'Q', 'a': 2}, {'q': 'R', 'a': 3}]
    assert read('a.tsv') == [{'a': '1', 'b': '2'}] and read('a.csv')[0]['5'] == 'Q?'
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.array([0, 4, 6], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b'caf\xe9ok'))
    pyarrow.parquet.write_table(pyarrow.table({'a': broken, 'n': [1, 2]}), tmp_path / 'a.parquet')
    assert read('a.parquet') == [{'a': 'caf\ufffd', 'n': 1}, {'a': 'ok', 'n': 2}]


# -- everything, from the hub to the training

def miniature(entry, hub, i):
    """Row i of a dataset in its true schema."""
    url, image = f'{hub.url}/media/fine/{i}.jpg', {'bytes': jpeg(i), 'path': None}
    in_archive, style, name = f'mini_{i}.jpg', entry['style'], entry['name']
    qas = {'question': ['Highest?'], 'explanation': ['Look.'], 'answer': ['4']}
    choices = {'question': 'Which?', 'choices': ['no', 'yes'], 'answer_idx': 1, 'direct_answers': ['yes'] * 3}
    options, below = {'question': f'Which {i}?', 'options': ['no', 'yes']}, f'Which {i}?\nA. no\nB. yes'
    track = {'id': '1', 'video': 'horse', 'expression': 'horse', 'fps': 2, 'width': 40, 'height': 30, 'frame_trajectories': [
        {'frame': t, 'time': t / 2, 'points': [{'id': 0, 'point': [20., 15.], 'occluded': False}]} for t in range(4)]}
    by_name = {
        'a-okvqa-da': choices | {'image': in_archive},     # one table for both
        'eval-a-okvqa-da': choices | {'image': in_archive},
        'eval-a-okvqa-mc': choices | {'image': in_archive},
        'ok-vqa': {'image': in_archive, 'image_id': i, 'qas': [{'question': 'What?', 'question_id': 1, 'answers': [{'raw_answer': 'cat'}]}]},
        'chart-qa': {'image': image, 'query': 'Highest?', 'label': ['4'], 'human_or_machine': 0},
        'science-qa-img': {'image': image, 'question': 'Which?', 'hint': 'Look.', 'choices': ['no', 'yes'], 'answer': 1},
        'dvqa': {'image': in_archive, 'question': 'Highest?', 'answer': '4', 'question_id': f'{i}', 'answer_bbox': []},
        'figureqa': {'image_index': i, 'question_string': 'Is red highest?', 'answer': i % 2, 'question_id': i},
        'plotqa': {'image_index': i, 'question_string': 'Highest?', 'answer': 4.5, 'question_id': i},
        'perception-test': {'metadata': {'video_id': 'clip'}, 'mc_question': [options | {'id': 0, 'answer_id': 1}]},
        'star': {'video_id': 'clip', 'start': 0., 'end': 1., 'question': 'What?', 'answer': 'yes',
                 'choices': [{'choice_id': 0, 'choice': 'no'}, {'choice_id': 1, 'choice': 'yes'}]},
        'mathvista': {'pid': '1', 'decoded_image': image, 'question': 'Which?', 'choices': ['1', '2'] if i else None, 'answer': '2'},
        'mmmu': {'id': '1', 'question': '<image 1> What?', 'options': "['no', 'yes']", 'answer': 'B', 'image_1': image, 'image_2': None},
        'realworldqa': {'image': image, 'question': 'Which?', 'answer': 'B'},
        'countbench-qa': {'image': image, 'question': 'How many cups are there?', 'count': 3, 'example_id': 'x', 'image_url': url},
        'eval-ai2d': {'image': image, 'question': 'Which?', 'options': ['no', 'yes'], 'answer': '1'},
        'eval-science-qa': {'image': image, 'question': 'Which?', 'hint': '', 'choices': ['no', 'yes'], 'answer': 1},
        'pixmo-points-eval': {'image_url': url, 'label': 'cup', 'points': [{'x': 5., 'y': 9.}], 'masks': [[[True, True], [False, False]]]},
        'point-bench': {'image_filename': in_archive, 'mask_filename': 'mask.png', 'category': 'spatial', 'user_input': 'Point to the cup.'},
        'screenspot-v2': {'instruction': 'close', 'bbox': [10, 5, 4, 4], 'img_filename': in_archive},
        'screenspot-pro': {'instruction': 'close', 'bbox': [10, 5, 14, 9], 'img_filename': in_archive, 'id': '1'},
        'osworld-g': {'image': image, 'instruction': 'close', 'box_coordinates': [10, 5, 4, 4], 'box_type': 'bbox', 'id': '1'},
        'muirbench': {'idx': i, 'image_list': [image, image], 'question': 'Which?', 'options': ['no', 'yes'], 'answer': 'B'},
        'mmiu': {'input_image_path': [in_archive], 'question': 'Which?', 'options': 'A: no\nB: yes', 'output': 'B', 'context': ''},
        'blink': {'idx': '1', 'image_1': image, 'image_2': None, 'prompt': 'Which?', 'choices': ['no', 'yes'], 'answer': '(B)'},
        'mvbench': {'video': 'clip.mp4', 'question': 'Which?', 'candidates': ['no', 'yes'], 'answer': 'yes', 'start': 0., 'end': 1.},
        'tomato': options | {'key': 'clip', 'answer': 1, 'demonstration_type': 'human', 'motion_type': 'x'},
        'motionbench': {'key': 'k', 'video_path': 'clip.mp4', 'qa': [{'uid': '1', 'question': below, 'answer': 'B'},
                                                                     {'uid': '2', 'question': below, 'answer': 'NA'}]},
        'temporalbench': {'idx': i, 'video_name': 'videos/clip.mp4', 'question': below, 'GT': 'B'},
        'tempcompass': {'video_id': 'clip', 'question': below, 'answer': 'B. yes', 'dim': 'action'},
        'eval-perception-test': {'mc_question': [options | {'answer_id': 1}]},
        'ego-schema': {'video_idx': 'clip', 'question_idx': '1', 'question': 'Which?', 'option': ['A. no', 'B. yes'], 'answer': '1'},
        'eval-next-qa': {'video': 'clip', 'question': f'which {i}', 'a0': 'no', 'a1': 'yes', 'a2': 'x', 'a3': 'y', 'a4': 'z', 'answer': 1},
        'video-mme': {'videoID': 'clip', 'video_id': '001', 'question': 'Which?', 'options': ['A. no', 'B. yes'], 'answer': 'B'},
        'video-eval-pro': {'video': 'clip.mp4', 'question': 'Which?', 'options': ['A. no', 'B. yes'], 'answer': 'B'}}
    by_converter = {
        'caption': {'image_url': url, 'caption': f'Picture {i}.', 'transcripts': ['well'] * (i % 2)},
        'tagged_qa': {'image_url': url, 'question': '[USER] What? [ASSISTANT]', 'answer': 'This.', 'messages': []},
        'qa': {'image_url': url, 'image_sha256': None, 'question': 'What?', 'answer': 'This.'},
        'points': {'image_url': url, 'label': 'cup', 'count': 1, 'points': {'x': [10], 'y': [5]} if 'count' in name else [{'x': 5., 'y': 9.}]},
        'question_points': {'id': '1', 'image': image, 'questions': ['Point.'], 'answer_points': [{'x': [5.], 'y': [9.]}], 'names': ['bar']},
        'explained_points': {'image_url': url, 'question': 'Why?', 'response': 'The <x>cup</x>.', 'points': [[{'x': 5., 'y': 9.}]]},
        'several_points': {'image_urls': [url, url], 'labels': ['cup'], 'points': [[[{'x': 5., 'y': 9.}], []]], 'counts': [1]},
        'messages': {'id': '1', 'source': 'x', 'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]},
        'llava': {'id': '1', 'data_source': 'x', 'video': 'NextQA/clip.mp4', 'conversations': [
            {'from': 'human', 'value': f'<image>\nWhat {i}?'}, {'from': 'gpt', 'value': 'This.'}]},
        'hardcodes': {'questions': ['Who?'], 'response': 'A model.', 'images': [image] if i % 2 else []},
        'vqa': {'image': in_archive, 'message_list': [{'question': 'How many?', 'answers': ['2'] * 3}], 'metadata': {'x': 1}},
        'choice': {'image': in_archive, 'message_list': [choices], 'difficult_direct_answer': False},
        'explained_qa': {'id': '1', 'image': image, 'qa_pairs': qas},
        'clevrer': {'video_filename': 'clip.mp4', 'questions': [{'question': f'What {i}?', 'answer': 'red'}]},
        'moments': {'qid': i, 'vid': 'clip', 'query': f'a cup {i}', 'relevant_windows': [[0, 2]], 'duration': 2},
        'label': {'line': f'clip 0.0 1.{i}##a person sits.'},
        'problems': {'question': 'How many?', 'answer': '3', 'choices': None, 'split': 'train'},
        'track': track,
        'funqa': {'task': 'H2', 'visual_input': 'clip.mp4', 'instruction': 'Describe.', 'output': f'He falls {i}.'},
        'video_caption': {'video_path': 'clip.mp4', 'motion_caption': f'It spins {i}.'}}
    row = by_name.get(name) or by_name.get(name.removeprefix('eval-')) or by_converter[entry['converter']]
    if entry['converter'] == 'explained_qa' and entry['media'] == 'urls':
        row = {'image_urls': [url, f'{hub.url}/media/fine/{i + 1}.jpg'], 'qa_pairs': {'question': ['Which?'], 'answer': ['First.']}}
    elif 'SynMultiImage' in entry['hub']:
        row = {'id': '1', 'images': [image, image], 'qa_pairs': qas, 'metadata': {'num_images': 2}}
    elif style == 'mantis_instruct_mc':
        row = {'images': [in_archive], 'mc_question': ['Which?'], 'choices': [['no', 'yes']], 'correct_choice_idx': [1], 'example_id': '1'}
    return row


def table_text(path, entry, rows):
    """A table as a file of that name would hold it, in the form that the published one has."""
    if path.endswith('.jsonl'):
        return '\n'.join(map(json.dumps, rows))
    if path.endswith('.txt'):
        return '\n'.join(row['line'] for row in rows)
    content = rows
    if 'perception' in entry['name']:
        content = {'clip': rows[0]}
    elif entry['name'] in ('tomato', 'tabmwp-da'):
        content = {f'{i}': row for i, row in enumerate(rows)}
    elif 'image_index' in rows[0]:
        content = {'qa_pairs': rows}
    return json.dumps(content)


def archive_members(entry, clip):
    """{path: bytes} of the files in a dataset's archive, with the paths of the published one."""
    pictures = [jpeg(i) for i in range(4)]
    frames = {}
    if 'MeViS' in entry['media']:              # a tar in the zip
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode='w') as t:
            for i, data in enumerate(pictures):
                info = tarfile.TarInfo(f'train/JPEGImages/horse/{i:05d}.jpg')
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
        return {'MeViS_release/train/JPEGImages.tar': tar.getvalue()}
    if entry['name'].startswith('lasot'):      # its folders of frames are called img
        for i, data in enumerate(pictures):
            frames[f'train/horse/img/{i:05d}.jpg'] = data
        return frames
    if entry['name'] == 'tabmwp-da':           # a picture's name is the problem's number
        return {f'{i}.png': data for i, data in enumerate(pictures)}
    upper_rows = np.arange(30)[:, None] < 25
    members = {'videos/clip.mp4': clip,
               'selected_masks/mask.png': png(np.full((30, 40), 255, np.uint8) * upper_rows)}
    for i, data in enumerate(pictures):
        members[f'train2014/mini_{i}.jpg'] = data
        members[f'frames/horse/{i:05d}.jpg'] = data
        members[f'png/{i}.png'] = data
    return members


def offer_tables(e, hub, inside):
    """Puts a dataset's tables where its line says that they are, maybe into `inside`, its archive."""
    for split, _ in sources.splits(e):
        rows = [miniature(e, hub, i) for i in range(4)]
        where = e['tables'].replace('{split}', split)
        if not where:
            store(hub, e['hub'], f"{e['config'] or 'data'}/{split}-00000.parquet", rows)
            continue
        if where.startswith('inside:'):
            pattern = where.removeprefix('inside:')
            inside[pattern.replace('*', 'x/')] = table_text(where, e, rows).encode()
            continue
        for i, place in enumerate(where.split()):
            if place.startswith('http'):
                path = hub.folder / 'tables' / f"{e['name']}-{split}-{i}{Path(place).suffix}"
            else:
                path = hub.folder / f"datasets/{e['hub']}" / place.replace('*', f'-{i}-mini-')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table_text(place, e, rows))


def offer(entry, hub):
    """Puts a miniature of a dataset where its line says that it is; returns its line with the addresses of our hub."""
    e = dict(entry)
    clip = dataset_store.encode([np.full((48, 64, 3), 60 * i, np.uint8) for i in range(4)], 2)
    inside = archive_members(e, clip)
    offer_tables(e, hub, inside)
    if e['tables'].startswith('http'):
        urls = []
        for i, place in enumerate(e['tables'].split()):
            urls.append(f"{hub.url}/cdn/tables/{e['name']}-{{split}}-{i}{Path(place).suffix}")
        e['tables'] = ' '.join(urls)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as z:
        for name, data in inside.items():
            z.writestr(name, data)

    places = {}                                # what `media` will say -> (file, its bytes)
    for place in e['media'].split():
        data = archive.getvalue()
        if places:                             # all archives but the first are empty
            data = b'PK\x05\x06' + bytes(18)
        if place.startswith('http'):
            path = hub.folder / 'zips' / f"{e['name']}-{len(places)}.zip"
            places[f'{hub.url}/cdn/zips/{path.name}'] = path, data
        elif place.startswith('parts:'):
            _, repo, pattern = place.split(':')
            pattern = re.sub(r'\*[^/]*$', '*', pattern)
            root = hub.folder / 'datasets' / repo
            places[f'{place}'] = root / pattern.replace('*', 'a'), data[:500]
            places[f'{place} '] = root / pattern.replace('*', 'b'), data[500:]
        elif place.startswith('hub:'):
            _, repo, pattern = place.split(':')
            name = 'mini.zip'
            if place.endswith(('.mp4', 'videos/*')):           # videos that are in no archive
                name = 'horse_extra.mp4' if 'ViCaS' in place else 'clip.mp4'
                data = clip
            pattern = re.sub(r'\*[^/]*$', '*', pattern)        # a zip by whatever name
            folder = name if pattern.endswith('*') else 'mini'
            path = pattern.replace('*', folder, 1).replace('*', name)
            places[f'hub:{repo}:{pattern}'] = hub.folder / 'datasets' / repo / path, data
        elif place.startswith('subtitles:'):
            _, repo, name = place.split(':')
            cues = b'{"clip": {"0": {"start": 0, "end": 1, "text": "Hey"}}}'
            places[place] = hub.folder / 'datasets' / repo / name, cues
        else:
            places[place] = None, b''
    for path, data in places.values():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return {**e, 'media': ' '.join(dict.fromkeys(map(str.strip, places)))}


def test_all_datasets_from_hub_to_training_steps(hub, tmp_path):
    entries = [e for e in csv.DictReader(open(ROOT / 'prepare/datasets.csv', newline='')) if e['automatic'] == 'yes']
    for i in range(5):
        hub.media[f'{i}.jpg'] = jpeg(i)
    entries = [offer(e, hub) for e in entries]
    table(tmp_path / 'table.csv', *entries)
    args = ['--workers', '4', '--datasets', *(e['name'] for e in entries)]
    for _ in range(2):                         # killed twice on the way
        process = subprocess.Popen(command(hub, tmp_path, *args), env=environment(hub, tmp_path), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        asked = sum(hub.asked.values())
        while process.poll() is None and sum(hub.asked.values()) < asked + 40:
            time.sleep(.01)
        process.kill()
        process.wait()
    out = run(hub, tmp_path, *args).stdout
    for e in entries:
        manifest = json.loads((tmp_path / 'data' / e['name'] / 'manifest.json').read_text())
        assert not any(k.startswith('left out') for k in manifest['counts']), (e['name'], manifest['counts'])
        assert manifest['counts']['records'] >= 1 and e['name'] in out
        target = 'validation' if e['stages'] == 'eval' else 'train'
        assert normalise(records(tmp_path / 'data' / e['name'], target)[0])
    # every held-out set gives a perfect answer all, and a useless one nothing
    for e in (e for e in entries if e['stages'] == 'eval'):
        dataset = Dataset(tmp_path / 'data' / e['name'], 'validation')
        for item in (item for i in range(len(dataset)) for item in evaluation.questions(e['name'], dataset[i], i)):
            pointed = item['points'] or item['mask'] and [{'x': .5, 'y': .5, 'id': 1}]
            perfect = metrics.score(item, format_points(pointed, digits=4) if pointed else item['reference'])
            useless = metrics.score(item, '<point 0.001, 0.999, 1>' * bool(pointed) + ' green elephants')
            assert {a / b for a, b in perfect.values()} == {1.}, (e['name'], item, perfect)
            assert not any(a for a, _ in useless.values()), (e['name'], item, useless)
    assert 'WRONG' not in run(hub, tmp_path, '--stage', 'all', '--check').stdout
    run(hub, tmp_path, '--pages', '2')
    index = (tmp_path / 'data/index.html').read_text()
    assert all(f'href="{e["name"]}/sample.html"' in index for e in entries if e['stages'] != 'extra')
    for name, text in (('pixmo-points', '1 points of &#x27;cup&#x27;'), ('mevis-track', '4 points of &#x27;horse&#x27;')):
        page = (tmp_path / f'data/{name}/sample.html').read_text()
        assert text in page and page.count('<img src="data:image') >= 2

    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', tmp_path / 'world', '--num', '10', '--num_clocks', '5', '--num_text',
                    '5', '--num_clips', '8', '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
    tiny = dict(vision="{'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 1, 'num_heads': 2, 'image_size': 32, 'patch_size': 8, "
                       "'feature_layers': (-1,)}",
                language="{'hidden_size': 32, 'intermediate_size': 64, 'num_layers': 1, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 8, "
                         "'vocab_size': 1024}",
                data_dir=tmp_path / 'data', image_size=32, video_size=32, video_pooling=2, batch_size=2, accumulation=1, max_steps=5,
                warmup_steps=1, eval_interval=0, num_workers=0, threads=1, device='cpu', dtype='float32', seq_len=512, compile=False)
    for stage, more in ((1, dict(vision_weights='', language_weights='', tokenizer=tmp_path / 'world/shapes')),
                        (2, dict(init_from=tmp_path / 'stage1'))):
        settings = {**tiny, **more, 'out_dir': tmp_path / f'stage{stage}'}
        done = subprocess.run([sys.executable, ROOT / 'train.py', ROOT / f'config/stage{stage}.py', *(f'--{k}={v}' for k, v in settings.items())],
                              capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0 and 'done at step 5' in done.stdout, done.stdout + done.stderr
