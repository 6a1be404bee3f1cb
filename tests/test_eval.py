"""Scores: by hand on small cases, and the script as a user runs it, with models that are right and wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval as ev  # noqa: E402
import model as m  # noqa: E402

SQUARE = [[.2, .2], [.4, .2], [.4, .4], [.2, .4]]
HERE, NEXT = {'x': .3, 'y': .3, 'polygon': SQUARE}, {'x': .35, 'y': .3, 'polygon': [[x + .1, y] for x, y in SQUARE]}


def test_inside():
    arrow = [[0, 0], [1, .5], [0, 1], [.4, .5]]            # not convex: (.2, .5) is in the notch
    assert ev.inside(.6, .5, arrow) and not ev.inside(.2, .5, arrow) and not ev.inside(1.1, .5, arrow)


@pytest.mark.parametrize('text,hits,precision', [
    ('<point 0.25, 0.30, 1> <point 0.45, 0.30, 2>', (2, 2), (2, 2)),
    ('<point 0.25, 0.30, 1>', (1, 2), (1, 1)),
    ('<point 0.25, 0.30, 1> <point 0.26, 0.30, 2>', (1, 2), (1, 2)),      # the same object twice counts once
    ('<point 0.35, 0.30, 1> <point 0.25, 0.30, 2>', (2, 2), (2, 2)),      # the first must give way to the second
    ('<point 0.90, 0.90, 1>', (0, 2), (0, 1)), ('I see nothing.', (0, 2), (0, 0))])
def test_points_match_one_to_one(text, hits, precision):
    got = ev.score_points(text, [HERE, NEXT])
    assert got['hit rate'] == hits and got['precision'] == precision
    assert got['all right'] == (hits == precision == (2, 2), 1)


def test_nothing_to_point_to():
    assert ev.score_points('There are none.', [])['none there'] == (True, 1)
    assert ev.score_points('<point 0.1, 0.1, 1>', [])['none there'] == (False, 1)


def test_without_polygons_a_point_must_be_near_and_in_its_picture():
    there = [{'x': .5, 'y': .5, 'image': 1}]
    assert ev.match([{'x': .53, 'y': .53, 'image': 1}], there) == 1
    assert ev.match([{'x': .54, 'y': .54, 'image': 1}], there) == ev.match([{'x': .5, 'y': .5}], there) == 0


def test_in_a_video_a_point_must_be_in_time():
    moving = {'x': .2, 'y': .5, 't': 0., 'moments': [{'t': t, 'x': x, 'y': .5} for t, x in ((0., .2), (.5, .5), (1., .8))]}
    for t, x, hit in ((0., .2, 1), (.6, .5, 1), (1., .8, 1), (1., .2, 0), (0., .8, 0), (2., .8, 0)):
        assert ev.match([{'t': t, 'x': x, 'y': .5}], [moving]) == hit


def test_tracks():
    places = [{'t': t, 'x': x, 'y': .5, 'id': id} for t in (0., 1.) for id, x in ((1, .2), (2, .8))]
    for text, inside, precision in [
            ('<point 0.0, 0.20, 0.50, 1> <point 0.0, 0.80, 0.50, 2> <point 1.0, 0.20, 0.50, 1> <point 1.0, 0.80, 0.50, 2>', 4, (4, 4)),
            ('<point 0.0, 0.20, 0.50, 1> <point 0.0, 0.20, 0.50, 2>', 1, (1, 2)),     # another's place is a miss
            ('<point 0.0, 0.20, 0.50, 1> <point 0.2, 0.20, 0.50, 1>', 1, (2, 2)), ('None.', 0, (0, 0))]:
        assert ev.score_tracks(text, places) == {'inside': (inside, 4), 'precision': precision}
    assert ev.score_tracks('There are none.', []) == {'none there': (True, 1)}


def test_caption_f1():
    objects, vocabulary = [['red', 'circle'], ['red', 'circle'], ['blue', 'star']], {'red circle', 'blue star', 'green cross'}
    for text, pair in [('A small red circle, a large red circle and a blue star.', (6, 6)), ('A red circle.', (2, 4)),
                       ('A green cross and a blue star', (2, 5)), ('A redcircle', (0, 3))]:
        assert ev.score_caption(text, objects, vocabulary)['F1'] == pair


def test_answers():
    item = {'task': 'qa', 'answers': ['A red circle', 'yes']}
    assert ev.score(item, 'a red circle.') == {'accuracy': (True, 1)} == ev.score(item, ' Yes')
    assert ev.score(item, 'red') == {'accuracy': (False, 1)}
    assert ev.score({'task': 'counting', 'reference': '3'}, 'There are 3.') == {'accuracy': (True, 1)}
    assert ev.score({'task': 'counting', 'reference': '3'}, 'three or 13') == {'accuracy': (False, 1)}


def test_interval_is_wilsons_for_independent_trials():
    low, high = ev.interval([[1, 1]] * 90 + [[0, 1]] * 10)
    assert (low, high) == pytest.approx((.8256, .9448), abs=2e-3)         # Wilson, 90 of 100, from a table
    assert ev.interval([[5, 5]] * 20)[0] == pytest.approx(20 / (20 + 1.96 ** 2), abs=1e-6)   # records count, not answers
    together = ev.interval([[5, 5]] * 18 + [[0, 5]] * 2)    # answers about one picture that fail together
    assert together == pytest.approx(ev.interval([[1, 1]] * 18 + [[0, 1]] * 2))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: [min(p), max(p)]), min_size=1))
def test_interval_holds_the_score(pairs):
    if total := sum(b for _, b in pairs):
        low, high = ev.interval(pairs)
        assert 0 <= low <= sum(a for a, _ in pairs) / total + 1e-9 and high + 1e-9 >= sum(a for a, _ in pairs) / total


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp('world')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '40', '--num_clocks', '5',
                    '--num_text', '10', '--num_clips', '8', '--num_validation', '20', '--workers', '1'], check=True, capture_output=True)
    return out


@pytest.fixture(scope='module')
def checkpoint(world, tmp_path_factory):
    """An untrained model as a run leaves it: out_dir/step000000 and latest."""
    run = tmp_path_factory.mktemp('run')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, point_digits=2)
    vlm = m.VLM(m.make_config(dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                                   patch_size=8, feature_layers=(-1,)),
                              dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                                   head_dim=16, vocab_size=1024), pooling=1, **processor.token_ids()))
    vlm.init_weights()
    m.save_model(vlm, run / 'step000000')
    processor.save(run / 'step000000')
    (run / 'latest').write_text('step000000\n')
    return run


@pytest.mark.parametrize('right', [True, False])
def test_a_perfect_and_a_useless_model(world, monkeypatch, right):
    def answers(model, processor, items, media):
        points = lambda i: i['task'] in ('pointing', 'tracking')
        if right:
            return [data.format_points(i['points'], '', 'point', 3) if points(i) else i['answers'][0] for i in items]
        return ['<point 1.0, 0.001, 0.001, 1>' if points(i) else 'green elephants' for i in items]
    monkeypatch.setattr(ev, 'answer_all', answers)
    names = ('shapes', 'clocks', 'shapes_text', 'clips', 'long_clips', 'shapes_many')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, max_frames=2)
    rows, skipped = ev.evaluate(None, processor, [data.Dataset(world / n, 'validation') for n in names])
    summary = ev.summarise(rows)
    assert not skipped and {(s['dataset'], s['task']) for s in summary} >= {
        (n, t) for n in ('shapes', 'clips', 'shapes_many') for t in ('pointing', 'qa')} | {
        ('clocks', 'qa'), ('shapes_text', 'text'), ('clips', 'captioning'), ('clips', 'tracking'), ('long_clips', 'tracking')}
    assert {s['score'] for s in summary} == {float(right)}


def run(*args):
    return subprocess.run([sys.executable, str(ROOT / 'eval.py'), *map(str, args)], capture_output=True, text=True)


def test_the_script_writes_what_it_says(world, checkpoint):
    shapes = world / 'shapes'
    both = f'{checkpoint},{checkpoint / "step000000"}'      # the same one by two names: two equal columns
    done = run(f'--checkpoint={both}', f'--data={shapes},{world / "shapes_text" / "validation.jsonl"}', '--num=6',
               '--max_new_tokens=8', '--page_rows=5', '--threads=1')
    assert done.returncode == 0, done.stderr
    folder = checkpoint / 'step000000' / 'eval'
    rows = [json.loads(line) for line in (folder / 'predictions.jsonl').read_text().splitlines()]
    asked = sum(len(data.Dataset(shapes, 'validation')[i]['conversations']) for i in range(6))
    assert len(rows) == asked + 4                           # four text rows in all
    metrics = json.loads((folder / 'metrics.json').read_text())['metrics']
    assert ev.summarise(rows) == metrics and all(s['low'] <= s['score'] <= s['high'] for s in metrics)
    table = done.stdout[done.stdout.rindex('dataset '):].splitlines()
    assert table[0].split()[3:] == both.split(',') and len(table) == 1 + len(metrics)
    assert all(line.split()[-1] == line.split()[-2] == f"{s['score']:.1%}" for line, s in zip(table[1:], metrics))
    page = (folder / 'report.html').read_text()
    assert page.count('<h2>') == 5 and 'http' not in page.replace('data:image/png;base64', '')


def test_batches_change_no_answer(world, checkpoint, monkeypatch):
    vlm, processor, _ = data.load_checkpoint(checkpoint)
    dataset = data.Dataset(world / 'shapes', 'validation')
    items, images = [], {}
    for i in range(3):
        images[i] = processor.media(dataset[i], dataset.folder)
        items += ev.questions('shapes', dataset[i], i)
    monkeypatch.setattr(ev, 'max_new_tokens', 12)
    together = ev.answer_all(vlm, processor, items, images)
    monkeypatch.setattr(ev, 'batch_size', 1)
    assert ev.answer_all(vlm, processor, items, images) == together and any(together)


def test_mistakes_are_one_line(world, checkpoint, tmp_path):
    for args, words in [((f'--data={world / "shapes"}',), 'which checkpoint?'),
                        ((f'--checkpoint={checkpoint}',), 'data is empty'),
                        ((f'--checkpoint={tmp_path}', f'--data={world / "shapes"}'), 'is not a checkpoint folder'),
                        ((f'--checkpoint={checkpoint},nowhere', f'--data={world / "shapes"}'), 'nowhere does not exist'),
                        ((f'--checkpoint={checkpoint}', '--data=nowhere'), 'does not exist')]:
        done = run(*args)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_bad_rows_are_named_and_left_out(world, checkpoint, tmp_path):
    good = json.loads((world / 'shapes_text' / 'validation.jsonl').read_text().splitlines()[0])
    (tmp_path / 'mine.jsonl').write_text(json.dumps({**good, 'images': ['gone.png']}) + '\n{"broken\n' + json.dumps(good) + '\n')
    done = run(f'--checkpoint={checkpoint}', f'--data={tmp_path / "mine.jsonl"}', '--max_new_tokens=4', f'--out={tmp_path}')
    assert done.returncode == 0 and 'mine.jsonl line 1' in done.stderr and 'mine.jsonl line 2' in done.stderr
    assert len((tmp_path / 'predictions.jsonl').read_text().splitlines()) == 1
