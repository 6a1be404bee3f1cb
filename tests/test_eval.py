"""Scores: by hand on small cases, and the script as a user runs it, with models that are right and wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import eval as ev  # noqa: E402
from extra import metrics  # noqa: E402
import model as m  # noqa: E402
from extra.hf import load_checkpoint, save_model  # noqa: E402

SQUARE = [[.2, .2], [.4, .2], [.4, .4], [.2, .4]]
HERE, NEXT = {'x': .3, 'y': .3, 'polygon': SQUARE}, {'x': .35, 'y': .3, 'polygon': [[x + .1, y] for x, y in SQUARE]}


def test_inside():
    arrow = [[0, 0], [1, .5], [0, 1], [.4, .5]]            # not convex: (.2, .5) is in the notch
    assert metrics.inside(.6, .5, arrow) and not metrics.inside(.2, .5, arrow) and not metrics.inside(1.1, .5, arrow)


@pytest.mark.parametrize('text,hits,precision', [
    ('<point 0.25, 0.30, 1> <point 0.45, 0.30, 2>', (2, 2), (2, 2)),
    ('<point 0.25, 0.30, 1>', (1, 2), (1, 1)),
    ('<point 0.25, 0.30, 1> <point 0.26, 0.30, 2>', (1, 2), (1, 2)),      # the same object twice counts once
    ('<point 0.35, 0.30, 1> <point 0.25, 0.30, 2>', (2, 2), (2, 2)),      # the first must give way to the second
    ('<point 0.90, 0.90, 1>', (0, 2), (0, 1)), ('I see nothing.', (0, 2), (0, 0))])
def test_points_match_one_to_one(text, hits, precision):
    got = metrics.pointing(text, [HERE, NEXT])
    assert got['hit rate'] == hits and got['precision'] == precision
    assert got['all right'] == (hits == precision == (2, 2), 1)


def test_nothing_to_point_to():
    assert metrics.pointing('There are none.', [])['none there'] == (True, 1)
    assert metrics.pointing('<point 0.1, 0.1, 1>', [])['none there'] == (False, 1)


def test_without_polygons_a_point_must_be_near_and_in_its_picture():
    there = [{'x': .5, 'y': .5, 'image': 1}]
    assert metrics.match([{'x': .53, 'y': .53, 'image': 1}], there) == 1
    assert metrics.match([{'x': .54, 'y': .54, 'image': 1}], there) == metrics.match([{'x': .5, 'y': .5}], there) == 0


def test_in_a_video_a_point_must_be_in_time():
    moving = {'x': .2, 'y': .5, 't': 0., 'moments': [{'t': t, 'x': x, 'y': .5} for t, x in ((0., .2), (.5, .5), (1., .8))]}
    for t, x, hit in ((0., .2, 1), (.6, .5, 1), (1., .8, 1), (1., .2, 0), (0., .8, 0), (2., .8, 0)):
        assert metrics.match([{'t': t, 'x': x, 'y': .5}], [moving]) == hit


def test_tracks():
    places = [{'t': t, 'x': x, 'y': .5, 'id': id} for t in (0., 1.) for id, x in ((1, .2), (2, .8))]
    for text, inside, precision in [
            ('<point 0.0, 0.20, 0.50, 1> <point 0.0, 0.80, 0.50, 2> <point 1.0, 0.20, 0.50, 1> <point 1.0, 0.80, 0.50, 2>', 4, (4, 4)),
            ('<point 0.0, 0.20, 0.50, 1> <point 0.0, 0.20, 0.50, 2>', 1, (1, 2)),     # another's place is a miss
            ('<point 0.0, 0.20, 0.50, 1> <point 0.2, 0.20, 0.50, 1>', 1, (2, 2)), ('None.', 0, (0, 0))]:
        got = metrics.tracking(text, places)
        assert (got['inside'], got['precision']) == ((inside, 4), precision)
    assert metrics.tracking('There are none.', []) == {'none there': (True, 1)}


def test_caption_f1():
    objects, vocabulary = [['red', 'circle'], ['red', 'circle'], ['blue', 'star']], {'red circle', 'blue star', 'green cross'}
    for text, pair in [('A small red circle, a large red circle and a blue star.', (6, 6)), ('A red circle.', (2, 4)),
                       ('A green cross and a blue star', (2, 5)), ('A redcircle', (0, 3))]:
        assert metrics.objects_named(text, objects, vocabulary)['F1'] == pair


def test_answers():
    item = {'task': 'qa', 'answers': ['A red circle', 'yes']}
    assert metrics.score(item, 'a red circle.') == {'accuracy': (True, 1)} == metrics.score(item, ' Yes')
    assert metrics.score(item, 'red') == {'accuracy': (False, 1)}
    assert metrics.score({'task': 'counting', 'reference': '3'}, 'There are 3.') == {'accuracy': (True, 1), 'within 1': (True, 1)}
    assert metrics.score({'task': 'counting', 'reference': '3'}, '4') == {'accuracy': (False, 1), 'within 1': (True, 1)}
    assert metrics.score({'task': 'counting', 'reference': '3'}, 'three or 13') == {'accuracy': (False, 1), 'within 1': (False, 1)}


@pytest.mark.parametrize('text,answers,score', [
    ('The 2 dogs.', ['two dogs'] * 10, 1.), ('cat', ['cat'] * 1 + ['dog'] * 9, .3),     # 9 of 10 times a third, once nothing
    ('cat', ['cat'] * 2 + ['dog'] * 8, .6), ('cat', ['cat'] * 3 + ['dog'] * 7, .9), ('cat', ['cat'] * 4 + ['dog'] * 6, 1.),
    ('it isnt a cat', ["it isn't cat"] * 10, 1.), ('dont', ["don't"] * 10, 1.), ('couldntve', ["couldn't've"] * 10, 1.),
    ('1,000', ['1000'] * 10, 1.), ('3.5', ['3.5'] * 10, 1.), ('left/right', ['left right'] * 10, 1.), ('none', ['0'] * 10, 1.),
    ('elephants', ['yes'] * 10, 0.), ('', ['yes'] * 10, 0.)])
def test_vqa_accuracy(text, answers, score):
    assert metrics.vqa(text, answers)['VQA accuracy'] == (pytest.approx(score), 1)


@pytest.mark.parametrize('text,answers,score', [
    ('42', ['42'], 1.), ('Forty  Two', ['forty two'], 1.), ('kitten', ['sitting'], 1 - 3 / 7), ('kitten', ['kitchen', 'x'], 1 - 2 / 7),
    ('abcd', ['wxyz'], 0.), ('ab', ['cb'], 0.), ('', ['yes'], 0.)])           # half is too far
def test_anls(text, answers, score):
    assert metrics.anls(text, answers)['ANLS'] == (pytest.approx(score), 1)


@pytest.mark.parametrize('text,answer,right', [
    ('42', '40', True), ('42.1', '40', False), ('38', '40', True), ('4.1%', '0.04', True), ('1,050', '1050', False), ('Yes', 'yes', True),
    ('0', '0', True), ('0.01', '0', False), ('about 40', '40', False), ('', '40', False), ('-38', '-40', True)])
def test_relaxed_accuracy(text, answer, right):
    assert metrics.relaxed(text, [answer]) == {'relaxed accuracy': (right, 1)}


@pytest.mark.parametrize('text,index', [
    ('B', 1), ('b', 1), ('B. a dog', 1), ('(C) a cat and a dog', 2), ('a cat', 0), ('It is a cat.', 0), ('It is a cat and a dog.', 2),
    ('Z', None), ('A cat or a dog', None), ('neither', None), ('', None), ('D', None)])
def test_options(text, index):
    assert metrics.chosen(text, ['a cat', 'a dog', 'a cat and a dog']) == index
    assert metrics.choice('A', ['x', 'y'], 0) == {'accuracy': (True, 1)} != metrics.choice('whatever', ['x', 'y'], 0)


def test_rouge_and_moments():
    # "the cat sat" of 3 and 6 words: P 1, R 1/2 -> (1 + 1.44) * .5 / (.5 + 1.44)
    assert metrics.rouge('the cat sat', ['the black cat sat quite still', 'z'])['ROUGE-L'][0] == pytest.approx(2.44 * .5 / 1.94)
    assert metrics.rouge('elephants', ['the cat'])['ROUGE-L'][0] == 0 == metrics.rouge('', ['x'])['ROUGE-L'][0]
    assert metrics.moments('Segments: [0-10], [20-24.5]', [[0, 8], [20, 40]]) == {'recall': (1, 2), 'precision': (1, 2), 'F1': (2, 4)}
    assert metrics.moments('[0-10] [0-10]', [[0, 10]]) == {'recall': (1, 1), 'precision': (1, 2), 'F1': (2, 3)}
    assert metrics.moments('never', [[0, 10]])['F1'] == (0, 1)


def test_masks_and_boxes():
    # 3 wide, 2 high: the middle of the first row and the last pixel
    mask = {'size': [2, 3], 'runs': [1, 1, 3, 1]}
    for x, y, there in ((.5, .2, 1), (.1, .2, 0), (.9, .9, 1), (1., 1., 1), (.5, .9, 0), (0., 0., 0)):
        assert metrics.hits({'x': x, 'y': y}, {'mask': mask}) == there
    box = {'x': .5, 'y': .5, 'box': [.4, .4, .6, .6]}
    assert metrics.hits({'x': .59, 'y': .41}, box) and not metrics.hits({'x': .61, 'y': .5}, box)


def test_hota():
    """Two objects for four moments. As TrackEval counts: DetA = TP / (TP + FN + FP), AssA the mean over TP of TPA / (TPA + FNA + FPA)."""
    places = [{'t': float(t), 'x': x, 'y': .5, 'id': id} for t in range(4) for id, x in ((1, .2), (2, .8))]
    say = lambda *points: ' '.join(f'<point {t:.1f}, {x:.2f}, 0.50, {id}>' for t, x, id in points)
    right = metrics.tracking(say(*((p['t'], p['x'], p['id']) for p in places)), places)
    assert (right['DetA'], right['AssA'], right['HOTA'], right['F1']) == ((8, 8), (8, 8), (1, 1), (4, 4))
    # the ids change places after two moments: everything is found, and each pair is together for 2 of 4 + 4 - 2
    swapped = metrics.tracking(say(*((p['t'], p['x'], p['id'] if p['t'] < 2 else 3 - p['id']) for p in places)), places)
    assert swapped['DetA'] == (8, 8) and swapped['AssA'] == (pytest.approx(8 * 2 / 6), 8) and swapped['HOTA'][0] == pytest.approx((1 / 3) ** .5)
    # other names are no fault of an association
    assert metrics.tracking(say(*((p['t'], p['x'], 9 - p['id']) for p in places)), places)['HOTA'] == (1, 1)
    # one object only, and something in the air
    half = metrics.tracking(say(*((t, .2, 1) for t in range(4)), (0, .5, 3)), places)
    assert half['DetA'] == (4, 9) and half['AssA'] == (4, 4) and half['F1'] == (pytest.approx(2 / 4 + 3 * 2 / 3), 4)
    assert metrics.tracking('None.', places)['HOTA'] == (0., 1)


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
    save_model(vlm, run / 'step000000')
    processor.save(run / 'step000000')
    (run / 'latest').write_text('step000000\n')
    return run


@pytest.mark.parametrize('right', [True, False])
def test_a_perfect_and_a_useless_model(world, monkeypatch, right):
    def answers(model, processor, rows):
        for i in (item for _, items in rows for item in items):
            points = i['task'] in ('pointing', 'tracking')
            i['prediction'] = '<point 1.0, 0.001, 0.001, 1>' if points else 'green elephants'
            if right:
                i['prediction'] = data.format_points(i['points'], '', 'point', 3) if points else i['answers'][0]
    monkeypatch.setattr(ev, 'answer_all', answers)
    names = ('shapes', 'clocks', 'shapes_text', 'clips', 'long_clips', 'shapes_many')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, max_frames=2)
    sets = [data.Dataset(world / n, 'validation') for n in names] + [data.Dataset(world / 'clocks', 'train')]
    rows, skipped, _ = ev.evaluate(None, processor, sets)
    summary = ev.summarise(rows)
    assert len({row['dataset'] for row in rows}) == len(sets) and len({row['record'] for row in rows}) > 5
    assert not skipped and {(s['dataset'], s['task']) for s in summary} >= {
        (n, t) for n in ('shapes', 'clips', 'shapes_many') for t in ('pointing', 'qa')} | {
        (str(world / 'clocks/train'), 'qa'), (str(world / 'clocks/validation'), 'qa'), ('shapes_text', 'text'), ('clips', 'captioning'), ('clips', 'tracking'), ('long_clips', 'tracking')}
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
    figures = json.loads((folder / 'metrics.json').read_text())['metrics']
    assert ev.summarise(rows) == figures and all(s['low'] <= s['score'] <= s['high'] for s in figures)
    table = done.stdout[done.stdout.rindex('dataset '):].splitlines()
    assert table[0].split()[3:] == both.split(',') and len(table) == 1 + len(figures)
    assert all(line.split()[-1] == line.split()[-2] == f"{s['score']:.1%}" for line, s in zip(table[1:], figures))
    page = (folder / 'report.html').read_text()
    assert page.count('<h2>') == 5 and 'http' not in page.replace('data:image/png;base64', '')


def test_killed_and_shared_out_the_scores_are_the_same(world, checkpoint, tmp_path, monkeypatch):
    """Half answered, then killed in the middle of a line; two processes; asked again: the same scores and answers."""
    args = [f'--checkpoint={checkpoint}', f'--data={world / "shapes"},{world / "shapes_text"}', '--max_new_tokens=6', '--threads=1', '--loss=True']
    assert run(*args, f'--out={tmp_path}/one').returncode == 0
    whole = (tmp_path / 'one/predictions.jsonl').read_text()
    (kept,) = (tmp_path / 'one').glob('answers-*')
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / kept.name).write_text(lines[0] + lines[1][:100])
    done = run(*args, f'--out={tmp_path}/half')
    assert done.returncode == 0 and (tmp_path / 'half/predictions.jsonl').read_text() == whole, done.stderr
    again = run(*args, f'--out={tmp_path}/one', '--radius=0.5')          # only scored anew
    assert again.returncode == 0 and len(kept.read_text().splitlines()) == 2
    two = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', ROOT / 'eval.py', *args,
                          f'--out={tmp_path}/two'], capture_output=True, text=True)
    assert two.returncode == 0 and (tmp_path / 'two/predictions.jsonl').read_text() == whole, two.stderr
    figures = [json.loads((tmp_path / n / 'metrics.json').read_text()) for n in ('half', 'two')]
    assert figures[0]['metrics'] == figures[1]['metrics'] and figures[0]['losses'] == figures[1]['losses']
    # the loss of an untrained model is that of knowing nothing, by another way: the training loss of the same rows
    vlm, processor, _ = load_checkpoint(checkpoint)
    dataset = data.Dataset(world / 'shapes_text', 'validation')
    batch = data.collate([[processor.example(dataset[i], dataset.folder)] for i in range(len(dataset))], processor)
    vlm.loss_scale = 1. / batch['total_weight']
    text = next(x for x in figures[0]['losses'] if x['dataset'] == 'shapes_text')
    assert text['tokens'] == len(batch['loss_index']) and text['loss'] == pytest.approx(vlm(batch)[0].item(), rel=1e-4)


def test_batches_change_no_answer(world, checkpoint, monkeypatch):
    """Questions about a picture or a video together, several of these at once: the answers of each alone."""
    vlm, processor, _ = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for p in vlm.parameters():                              # as it was initialised it says one thing for ever
        p.data += .1 * torch.randn(p.shape, generator=generator)
    monkeypatch.setattr(ev, 'max_new_tokens', 12)
    sets, said, sizes, generate = [data.Dataset(world / n, 'validation') for n in ('shapes', 'clips')], [], [], vlm.generate
    monkeypatch.setattr(vlm, 'generate', lambda batch, n: sizes[-1].append(batch['tokens'].shape) or generate(batch, n))
    for most, tokens, waiting in ((64, 2 ** 17, 2 ** 30), (3, 2 ** 17, 2 ** 30), (1, 2 ** 17, 2 ** 30), (64, 2000, 2 ** 30), (64, 2 ** 17, 1)):
        monkeypatch.setattr(ev, 'batch_size', most)
        monkeypatch.setattr(ev, 'batch_tokens', tokens)
        monkeypatch.setattr(ev, 'WAITING', waiting)
        sizes.append([])
        said.append([item['prediction'] for d in sets for item in ev.answered(vlm, processor, d, range(2))[0]])
    assert all(texts == said[0] for texts in said) and len(said[0]) > 15 and len(set(said[0])) > 5
    assert len(sizes[0]) == 2 < len(sizes[3]) < len(sizes[1]) < len(sizes[2]) == len(said[0]) and len(sizes[4]) == 4


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
