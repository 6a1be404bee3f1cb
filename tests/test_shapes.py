"""The embedded world: deterministic, disjoint, and every answer is true of its picture."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'prepare')]
import clips as shapes_clips  # noqa: E402
import data  # noqa: E402
import media  # noqa: E402
import pictures as shapes_pictures  # noqa: E402
import scenes  # noqa: E402
import shapes  # noqa: E402
from extra.metrics import inside  # noqa: E402

ARGS = ['--num', '60', '--num_clocks', '8', '--num_text', '20', '--num_clips', '8', '--num_validation', '60']


def make(out, *more):
    return subprocess.run([sys.executable, str(ROOT / 'prepare/shapes.py'), '--out', str(out), *ARGS, *more],
                          capture_output=True, text=True)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp('world')
    assert make(out, '--workers', '1').returncode == 0
    return out


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and '.index' not in p.name}


def rows(world, dataset, split):
    return [json.loads(line) for line in (world / dataset / f'{split}.jsonl').read_text().splitlines()]


def test_same_seed_gives_same_bytes_with_any_number_of_workers(world, tmp_path):
    assert make(tmp_path / 'two', '--workers', '2').returncode == 0
    assert files(tmp_path / 'two') == files(world)
    assert make(tmp_path / 'other', '--workers', '1', '--seed', '1').returncode == 0
    assert files(tmp_path / 'other') != files(world)


def test_rerun_does_nothing_and_other_arguments_need_force(world):
    before = {p: p.stat().st_mtime_ns for p in world.rglob('*.jsonl')}
    assert 'nothing to do' in make(world).stdout
    refused = make(world, '--qa', '1')
    assert refused.returncode == 1 and '--force' in refused.stderr and refused.stderr.count('\n') == 1
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob('*.jsonl')}


def test_interrupted_run_leaves_no_complete_folder(tmp_path):
    script = "import shapes, sys; shapes.text_row = None; sys.argv = ['shapes.py', *sys.argv[1:]]; shapes.main()"
    done = subprocess.run([sys.executable, '-c', script, '--out', str(tmp_path), *ARGS], cwd=ROOT / 'prepare', capture_output=True)
    assert done.returncode != 0 and not (tmp_path / 'shapes').exists()
    assert make(tmp_path).returncode == 0 and not list(tmp_path.glob('*.tmp'))


def test_train_and_validation_share_no_scene_or_description(world):
    def places(split):
        return {(p['x'], p['y']) for r in rows(world, 'shapes', split) for c in r['conversations'] for m in c['messages']
                for p in m.get('points', {}).get('points', [])}
    rng = np.random.default_rng(0)
    for _ in range(50):
        content = scenes.scene_content(scenes.sample_scene(rng))
        assert scenes.in_validation(content) == scenes.in_validation(json.loads(json.dumps(content)))
    told = {split: {row['conversations'][0]['messages'][0]['content'].split('. ')[0] for row in rows(world, 'shapes_text', split)}
            for split in ('train', 'validation')}
    assert told['train'] and told['validation'] and not told['train'] & told['validation']
    assert places('train') and places('validation') and not places('train') & places('validation')


def nearest_colour(picture, x, y):
    pixel = np.array(picture.getpixel((int(x * picture.width), int(y * picture.height))))
    return min(scenes.COLOURS, key=lambda c: np.abs(pixel - scenes.COLOURS[c]).sum())


def scene_of(i):
    """Row i of validation, drawn again from its random numbers."""
    scene = scenes.scene_of_split(np.random.default_rng([0, 0, True, i]), 'validation')
    return [{'x': round(o['x'], 4), 'y': round(o['y'], 4), 'polygon': o['polygon']} for o in scene['shapes']]


def test_answers_are_true_of_picture(world):
    asked = set()
    for i, row in enumerate(rows(world, 'shapes', 'validation')):
        picture = Image.open(world / 'shapes' / row['images'][0])
        assert picture.format in ('PNG', 'JPEG') and picture.size in scenes.CANVASES
        conversations = {}
        for c in row['conversations']:
            conversations.setdefault(c['task'], []).append((c['messages'][0]['content'], c['messages'][-1], c))
        every = scene_of(i)
        there = conversations['captioning'][0][2]['objects']
        said = re.findall(r'(small|large) (\w+) (\w+)', conversations['captioning'][0][1]['content'])
        assert [[c, k] for _, c, k in said] == there and len(every) == len(there)
        assert [p['x'] for p in every] == sorted(p['x'] for p in every)       # the caption's order, left to right
        for p, (colour, _) in zip(every, there):
            assert inside(p['x'], p['y'], p['polygon']) and nearest_colour(picture, p['x'], p['y']) == colour
        size = [s for s, _, _ in said]

        def meant(what):
            return [p for p, (c, k), s in zip(every, there, size) if all(w in (c, k, s, 'shape') for w in what.split())]
        for _, m, _ in conversations['pointing']:
            assert [(p['x'], p['y']) for p in m['points']['points']] == [(p['x'], p['y']) for p in meant(m['points']['label'])]
        for q, m, _ in conversations['counting']:
            many = re.match(r'How many (.*) are there', q)[1]
            what = next(w for w in (many[:-2], many[:-1]) if shapes_pictures.plural(w) == many)
            assert int(m['content']) == len(meant(what)), q
        for q, m, _ in conversations['qa']:
            asked.add(q.split()[0] + q.split()[1])
            if relation := re.match(r'Is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?', q):
                a, b = meant(relation[1])[0], meant(relation[3])[0]
                truth = {'left of': a['x'] < b['x'], 'right of': a['x'] > b['x'], 'above': a['y'] < b['y'],
                         'below': a['y'] > b['y']}[relation[2]]
                assert m['content'] == ('yes' if truth else 'no')
            elif end := re.match(r'What is the (leftmost|rightmost|topmost|bottommost) shape', q):
                key = {'l': lambda p: p['x'], 'r': lambda p: -p['x'], 't': lambda p: p['y'], 'b': lambda p: -p['y']}[end[1][0]]
                assert m['content'].split()[1:] == there[every.index(min(every, key=key))]
            elif place := re.match(r'What is at (0\.\d+), (0\.\d+)', q):
                p = min(every, key=lambda p: abs(p['x'] - float(place[1])) + abs(p['y'] - float(place[2])))
                assert m['content'].split()[2:] == there[every.index(p)]
            elif what := re.match(r'What colour is the (\w+)', q):
                assert [m['content']] == [c for c, k in there if k == what[1]]
    assert len(asked) >= 4


def test_clock_answers_agree_with_each_other(world):
    for row in rows(world, 'clocks', 'train'):
        hour, minute = row['conversations'][0]['messages'][-1]['content'].split(':')
        assert row['conversations'][1]['messages'][-1]['content'] == hour
        assert int(row['conversations'][2]['messages'][-1]['content']) == int(minute)


def test_answers_are_true_of_clip(world):
    """The frames say where things are, which way they move, when they come and go; subtitles what is said."""
    hits, asked, kinds, ways = [], set(), set(), set()
    for name in ('clips', 'long_clips'):
        for row in rows(world, name, 'validation'):
            times, frames = media.load_video(open(world / name / row['video'], 'rb'), 1000)
            duration = times[-1]
            assert np.allclose(times, np.arange(len(times)) / 2) and (2 if name == 'clips' else 16) <= duration <= 60
            caption = row['conversations'][0]['messages'][-1]['content']
            said = {o: line for o, line in zip([' '.join(o) for o in row['conversations'][0]['objects']],
                                               caption.split('. '), strict=True)}
            for c in row['conversations'][1:]:
                points = (c['messages'][-1].get('points') or {}).get('points', [])
                colour = next(iter(set((c['messages'][-1].get('points') or {}).get('label', '').split()) & set(scenes.COLOURS)), None)
                for p in [moment for point in points for moment in point.get('moments', [point])]:
                    assert inside(p['x'], p['y'], p['polygon']) and 0 <= p['t'] <= duration
                    if colour:               # what another shape hides just then may show that one's colour
                        hits.append(nearest_colour(frames[int(2 * p['t'])], p['x'], p['y']) == colour)
                if c['task'] == 'pointing' and c['messages'][-1]['points']['label'] in said and points:
                    first, last = points[0]['moments'][0], points[0]['moments'][-1]
                    way = re.search(r'moves (\w+)', said[c['messages'][-1]['points']['label']])
                    along = {'left': first['x'] - last['x'], 'right': last['x'] - first['x'],
                             'up': first['y'] - last['y'], 'down': last['y'] - first['y']}
                    assert max(along.values()) == along[way[1]] > .2 if way else max(along.values()) == 0
                    ways.add(way[1] if way else '')
                if c['task'] == 'tracking':
                    step = float(re.search(r'every ([\d.]+) s', c['messages'][0]['content'])[1])
                    assert all(p['t'] % step == 0 for p in points)
                    kinds.add('several' if len({p['id'] for p in points}) > 1 else 'one')
                if c['task'] == 'qa':
                    question, answer = c['messages'][0]['content'], c['messages'][-1]['content']
                    asked.add(question.split()[0] + ' ' + question.split()[1])
                    what = re.search(r'the (\w+ \w+) (move|appear|vanish)s?\?', question)
                    if what and what[2] == 'move':
                        assert (f'moves {answer}' in said[what[1]]) != (answer == 'it stays')
                    elif what and answer not in ('0.0 s', 'never') and not question.startswith('What is said'):
                        assert re.search(f'{what[2]}e?s at {answer}', said[what[1]])
                    elif question.startswith('What is said'):
                        cues = row['subtitles'] if isinstance(row['subtitles'], list) else media.load_subtitles(
                            open(world / name / row['subtitles'], 'rb'))
                        when = re.search(r'at ([\d.]+) s', question) or re.search(r'appears at ([\d.]+) s', said[what[1]])
                        assert answer in [cue['text'] for cue in cues if abs(cue['start'] - float(when[1])) < .01]
    assert np.mean(hits) > .93 and len(hits) > 100 and len(asked) >= 5 and kinds == {'one', 'several'} and len(ways) > 2


def test_train_and_validation_share_no_clip():
    clips = [shapes_clips.sample_clip(np.random.default_rng(i), 2, 8) for i in range(200)]
    split = [scenes.in_validation(shapes_clips.clip_content(c)) for c in clips if c['shapes']]
    assert .05 < np.mean(split) < .25
    for clip in clips:
        content = shapes_clips.clip_content(clip)
        assert scenes.in_validation(content) == scenes.in_validation(json.loads(json.dumps(content)))
        assert len({(o['colour'], o['kind']) for o in clip['shapes']}) == len(clip['shapes'])


def test_answers_are_true_of_several_pictures(world):
    for row in rows(world, 'shapes_many', 'validation'):
        pictures = [Image.open(world / 'shapes_many' / path).convert('RGB') for path in row['images']]
        assert len(pictures) in (2, 3)
        for p in row['conversations'][0]['messages'][-1]['points']['points']:
            assert inside(p['x'], p['y'], p['polygon'])
            colours = set(row['conversations'][0]['messages'][-1]['points']['label'].split()) & set(scenes.COLOURS)
            assert not colours or nearest_colour(pictures[p['image']], p['x'], p['y']) in colours


@pytest.mark.parametrize('dataset', ['shapes', 'clocks', 'shapes_text', 'clips', 'long_clips', 'shapes_many'])
def test_every_row_becomes_a_training_example(world, dataset):
    processor = data.Processor(world / 'shapes', 64, 8, 2, 2048, point_digits=2, max_frames=48)
    for split in ('train', 'validation'):
        rows = data.Dataset(world / dataset, split)
        for i in range(len(rows)):
            example = processor.example(rows[i], rows.folder)
            assert max(example.branches) == len(rows[i]['conversations']) and sum(example.weights) > 0


def test_tokenizer_round_trip_and_coordinate_tokens(world):
    tokenizer = Tokenizer.from_file(str(world / 'shapes' / 'tokenizer.json'))
    for text in ('naïve 猫 🐱\n\t"', 'a large red circle', '<point 0.37, 1.00, 2>', 'x' * 300):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert all(len(tokenizer.encode(f' {i / 100:.2f}').ids) == 1 for i in range(101))
    assert [tokenizer.token_to_id(t) for t in shapes.SPECIAL_TOKENS] == list(range(len(shapes.SPECIAL_TOKENS)))


def test_picture_named_in_makefile_and_readme_exists(world):
    named = re.findall(r'data/(shapes/media/[\w.-]+)', (ROOT / 'Makefile').read_text() + (ROOT / 'README.md').read_text())
    assert named and all((world / path).exists() for path in named)
