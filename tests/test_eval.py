"""Tests of extra/metrics.py and eval.py.

The metrics are compared with values worked out by hand on small cases. The script is run as a user
runs it, with models that are right, wrong and untrained.
"""
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

# --------------------------------------------------------------------------------------------------
# Points

# Two targets whose squares overlap: x from .2 to .4 and from .3 to .5.
SQUARE = [[.2, .2], [.4, .2], [.4, .4], [.2, .4]]
LEFT = {'x': .3, 'y': .3, 'polygon': SQUARE}
RIGHT = {'x': .35, 'y': .3, 'polygon': [[x + .1, y] for x, y in SQUARE]}


def test_inside_polygon():
    arrow = [[0, 0], [1, .5], [0, 1], [.4, .5]]            # not convex: (.2, .5) is in the notch
    assert metrics.inside(.6, .5, arrow)
    assert not metrics.inside(.2, .5, arrow)
    assert not metrics.inside(1.1, .5, arrow)


@pytest.mark.parametrize('text,hits,precision', [
    ('<point 0.25, 0.30, 1> <point 0.45, 0.30, 2>', (2, 2), (2, 2)),
    ('<point 0.25, 0.30, 1>', (1, 2), (1, 1)),
    # The same target twice counts once.
    ('<point 0.25, 0.30, 1> <point 0.26, 0.30, 2>', (1, 2), (1, 2)),
    # The first point must give way to the second.
    ('<point 0.35, 0.30, 1> <point 0.25, 0.30, 2>', (2, 2), (2, 2)),
    ('<point 0.90, 0.90, 1>', (0, 2), (0, 1)),
    ('I see nothing.', (0, 2), (0, 0))])
def test_pointing_matches_one_to_one(text, hits, precision):
    scores = metrics.pointing(text, [LEFT, RIGHT])
    assert scores['hit rate'] == hits
    assert scores['precision'] == precision
    assert scores['all right'] == (hits == precision == (2, 2), 1)


def test_pointing_without_targets():
    assert metrics.pointing('There are none.', [])['none there'] == (True, 1)
    assert metrics.pointing('<point 0.1, 0.1, 1>', [])['none there'] == (False, 1)


def test_point_hits_within_radius_and_in_its_picture():
    targets = [{'x': .5, 'y': .5, 'image': 1}]
    assert metrics.count_matches([{'x': .53, 'y': .53, 'image': 1}], targets) == 1
    assert metrics.count_matches([{'x': .54, 'y': .54, 'image': 1}], targets) == 0
    assert metrics.count_matches([{'x': .5, 'y': .5}], targets) == 0


@pytest.mark.parametrize('t,x,hit', [
    (0., .2, 1), (.6, .5, 1), (1., .8, 1), (1., .2, 0), (0., .8, 0), (2., .8, 0)])
def test_point_hits_moving_target_in_time(t, x, hit):
    places = ((0., .2), (.5, .5), (1., .8))
    moments = [{'t': time, 'x': place, 'y': .5} for time, place in places]
    moving = {'x': .2, 'y': .5, 't': 0., 'moments': moments}
    assert metrics.count_matches([{'t': t, 'x': x, 'y': .5}], [moving]) == hit


@pytest.mark.parametrize('x,y,hit', [
    (.5, .2, 1), (.1, .2, 0), (.9, .9, 1), (1., 1., 1), (.5, .9, 0), (0., 0., 0)])
def test_point_hits_mask(x, y, hit):
    # 3 wide, 2 high: the middle of the first row and the last pixel are inside.
    mask = {'size': [2, 3], 'runs': [1, 1, 3, 1]}
    assert metrics.point_hits({'x': x, 'y': y}, {'mask': mask}) == hit


def test_point_hits_box():
    box = {'x': .5, 'y': .5, 'box': [.4, .4, .6, .6]}
    assert metrics.point_hits({'x': .59, 'y': .41}, box)
    assert not metrics.point_hits({'x': .61, 'y': .5}, box)


# --------------------------------------------------------------------------------------------------
# Tracking

def make_targets(times):
    """Object 1 stays at x = .2 and object 2 at x = .8."""
    targets = []
    for t in times:
        targets.append({'t': t, 'x': .2, 'y': .5, 'id': 1})
        targets.append({'t': t, 'x': .8, 'y': .5, 'id': 2})
    return targets


def say(points):
    """(t, x, id) of some points as a model says them."""
    return ' '.join(f'<point {t:.1f}, {x:.2f}, 0.50, {id}>' for t, x, id in points)


@pytest.mark.parametrize('points,inside,precision', [
    ([(0, .2, 1), (0, .8, 2), (1, .2, 1), (1, .8, 2)], 4, (4, 4)),
    # A point of id 2 in the place of id 1 is a miss.
    ([(0, .2, 1), (0, .2, 2)], 1, (1, 2)),
    ([(0, .2, 1), (.2, .2, 1)], 1, (2, 2)),
    ([], 0, (0, 0))])
def test_tracking_inside_and_precision(points, inside, precision):
    text = say(points) or 'None.'
    scores = metrics.tracking(text, make_targets((0., 1.)))
    assert scores['inside'] == (inside, 4)
    assert scores['precision'] == precision


def test_tracking_without_targets():
    assert metrics.tracking('There are none.', []) == {'none there': (True, 1)}


def test_tracking_hota():
    """Two objects in four frames, counted as TrackEval does: DetA = TP / (TP + FN + FP), AssA the
    mean over TP of TPA / (TPA + FNA + FPA)."""
    targets = make_targets((0., 1., 2., 3.))

    perfect = metrics.tracking(say((p['t'], p['x'], p['id']) for p in targets), targets)
    assert perfect['DetA'] == (8, 8)
    assert perfect['AssA'] == (8, 8)
    assert perfect['HOTA'] == (1, 1)
    assert perfect['F1'] == (4, 4)

    # The ids change places after two frames. Everything is detected, and each pair of ids matches
    # in 2 of 4 + 4 - 2 frames.
    points = []
    for p in targets:
        points.append((p['t'], p['x'], p['id'] if p['t'] < 2 else 3 - p['id']))
    swapped = metrics.tracking(say(points), targets)
    assert swapped['DetA'] == (8, 8)
    assert swapped['AssA'] == (pytest.approx(8 * 2 / 6), 8)
    assert swapped['HOTA'][0] == pytest.approx((1 / 3) ** .5)

    # HOTA compares which points share an id, so that other ids throughout are no mistake.
    renamed = metrics.tracking(say((p['t'], p['x'], 9 - p['id']) for p in targets), targets)
    assert renamed['HOTA'] == (1, 1)

    # Only object 1 is tracked, and one point is in no object.
    points = [(t, .2, 1) for t in range(4)] + [(0, .5, 3)]
    half = metrics.tracking(say(points), targets)
    assert half['DetA'] == (4, 9)
    assert half['AssA'] == (4, 4)
    assert half['F1'] == (pytest.approx(2 / 4 + 3 * 2 / 3), 4)

    assert metrics.tracking('None.', targets)['HOTA'] == (0., 1)


# --------------------------------------------------------------------------------------------------
# Text

@pytest.mark.parametrize('text,pair', [
    ('A small red circle, a large red circle and a blue star.', (6, 6)),
    ('A red circle.', (2, 4)),
    ('A green cross and a blue star', (2, 5)),
    ('A redcircle', (0, 3))])
def test_object_f1(text, pair):
    objects = [['red', 'circle'], ['red', 'circle'], ['blue', 'star']]
    vocabulary = {'red circle', 'blue star', 'green cross'}
    assert metrics.object_f1(text, objects, vocabulary)['F1'] == pair


@pytest.mark.parametrize('text,right', [('a red circle.', True), (' Yes', True), ('red', False)])
def test_exact_match(text, right):
    item = {'task': 'qa', 'answers': ['A red circle', 'yes']}
    assert metrics.score(item, text) == {'accuracy': (right, 1)}


@pytest.mark.parametrize('text,right,within_1', [
    ('There are 3.', True, True), ('4', False, True), ('three or 13', False, False)])
def test_counting(text, right, within_1):
    item = {'task': 'counting', 'reference': '3'}
    assert metrics.score(item, text) == {'accuracy': (right, 1), 'within 1': (within_1, 1)}


@pytest.mark.parametrize('text,answers,score', [
    ('The 2 dogs.', ['two dogs'] * 10, 1.),
    # In 9 of the 10 subsets one match of three; in the other none.
    ('cat', ['cat'] * 1 + ['dog'] * 9, .3),
    ('cat', ['cat'] * 2 + ['dog'] * 8, .6),
    ('cat', ['cat'] * 3 + ['dog'] * 7, .9),
    ('cat', ['cat'] * 4 + ['dog'] * 6, 1.),
    ('it isnt a cat', ["it isn't cat"] * 10, 1.),
    ('dont', ["don't"] * 10, 1.),
    ('couldntve', ["couldn't've"] * 10, 1.),
    ('1,000', ['1000'] * 10, 1.),
    ('3.5', ['3.5'] * 10, 1.),
    ('left/right', ['left right'] * 10, 1.),
    ('none', ['0'] * 10, 1.),
    ('elephants', ['yes'] * 10, 0.),
    ('', ['yes'] * 10, 0.)])
def test_vqa_accuracy_leave_one_out(text, answers, score):
    assert metrics.vqa_accuracy(text, answers)['VQA accuracy'] == (pytest.approx(score), 1)


@pytest.mark.parametrize('text,answers,score', [
    ('42', ['42'], 1.),
    ('Forty  Two', ['forty two'], 1.),
    ('kitten', ['sitting'], 1 - 3 / 7),
    ('kitten', ['kitchen', 'x'], 1 - 2 / 7),
    ('abcd', ['wxyz'], 0.),
    ('ab', ['cb'], 0.),                                    # a distance of exactly a half scores 0
    ('', ['yes'], 0.)])
def test_anls(text, answers, score):
    assert metrics.anls(text, answers)['ANLS'] == (pytest.approx(score), 1)


@pytest.mark.parametrize('text,answer,right', [
    ('42', '40', True), ('42.1', '40', False), ('38', '40', True), ('4.1%', '0.04', True),
    ('1,050', '1050', False), ('Yes', 'yes', True), ('0', '0', True), ('0.01', '0', False),
    ('about 40', '40', False), ('', '40', False), ('-38', '-40', True)])
def test_relaxed_accuracy(text, answer, right):
    assert metrics.relaxed_accuracy(text, [answer]) == {'relaxed accuracy': (right, 1)}


@pytest.mark.parametrize('text,index', [
    ('B', 1), ('b', 1), ('B. a dog', 1), ('(C) a cat and a dog', 2), ('a cat', 0),
    ('It is a cat.', 0), ('It is a cat and a dog.', 2), ('Z', None), ('A cat or a dog', None),
    ('neither', None), ('', None), ('D', None)])
def test_parse_choice(text, index):
    assert metrics.parse_choice(text, ['a cat', 'a dog', 'a cat and a dog']) == index


def test_multiple_choice():
    assert metrics.multiple_choice('A', ['x', 'y'], 0) == {'accuracy': (True, 1)}
    assert metrics.multiple_choice('whatever', ['x', 'y'], 0) != {'accuracy': (True, 1)}


def test_rouge_l():
    # "the cat sat" against 6 words: P = 1, R = 1/2, F = (1 + 1.44) * .5 / (.5 + 1.44)
    scores = metrics.rouge_l('the cat sat', ['the black cat sat quite still', 'z'])
    assert scores['ROUGE-L'][0] == pytest.approx(2.44 * .5 / 1.94)
    assert metrics.rouge_l('elephants', ['the cat'])['ROUGE-L'][0] == 0
    assert metrics.rouge_l('', ['x'])['ROUGE-L'][0] == 0


def test_moment_retrieval():
    scores = metrics.moment_retrieval('Segments: [0-10], [20-24.5]', [[0, 8], [20, 40]])
    assert scores == {'recall': (1, 2), 'precision': (1, 2), 'F1': (2, 4)}
    # The same interval twice matches once.
    scores = metrics.moment_retrieval('[0-10] [0-10]', [[0, 10]])
    assert scores == {'recall': (1, 1), 'precision': (1, 2), 'F1': (2, 3)}
    assert metrics.moment_retrieval('never', [[0, 10]])['F1'] == (0, 1)


# --------------------------------------------------------------------------------------------------
# Intervals

def test_wilson_interval_of_independent_trials():
    interval = ev.wilson_interval([[1, 1]] * 90 + [[0, 1]] * 10)
    assert interval == pytest.approx((.8256, .9448), abs=2e-3)   # 90 of 100, from a table
    # At a score of 1 the 20 records count, not their 100 answers.
    low, _ = ev.wilson_interval([[5, 5]] * 20)
    assert low == pytest.approx(20 / (20 + 1.96 ** 2), abs=1e-6)
    # Five answers about a picture that fail together count as one trial.
    together = ev.wilson_interval([[5, 5]] * 18 + [[0, 5]] * 2)
    single = ev.wilson_interval([[1, 1]] * 18 + [[0, 1]] * 2)
    assert together == pytest.approx(single)


numerator_and_denominator = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)


@settings(deadline=None)
@given(st.lists(numerator_and_denominator, min_size=1))
def test_wilson_interval_contains_the_score(pairs):
    numerator = sum(pair[0] for pair in pairs)
    denominator = sum(pair[1] for pair in pairs)
    if denominator == 0:
        return
    score = numerator / denominator
    low, high = ev.wilson_interval(pairs)
    assert 0 <= low <= score + 1e-9
    assert high + 1e-9 >= score


# --------------------------------------------------------------------------------------------------
# The script

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """The demo's data sets, small."""
    out = tmp_path_factory.mktemp('world')
    sizes = ['--num', '40', '--num_clocks', '5', '--num_text', '10', '--num_clips', '8',
             '--num_validation', '20', '--workers', '1']
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, *sizes],
                   check=True, capture_output=True)
    return out


@pytest.fixture(scope='module')
def checkpoint(world, tmp_path_factory):
    """An untrained model as a run leaves it: out_dir/step000000 and latest."""
    run = tmp_path_factory.mktemp('run')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, point_digits=2)
    vision = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                  patch_size=8, feature_layers=(-1,))
    language = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                    head_dim=16, vocab_size=1024)
    vlm = m.VLM(m.make_config(vision, language, pooling=1, **processor.token_ids()))
    vlm.init_weights()
    save_model(vlm, run / 'step000000')
    processor.save(run / 'step000000')
    (run / 'latest').write_text('step000000\n')
    return run


def set_prediction(item, right):
    """Gives an item the right prediction, or a useless one."""
    has_points = item['task'] in ('pointing', 'tracking')
    if right and has_points:
        item['prediction'] = data.format_points(item['points'], '', 'point', 3)
    elif right:
        item['prediction'] = item['answers'][0]
    elif has_points:
        item['prediction'] = '<point 1.0, 0.001, 0.001, 1>'
    else:
        item['prediction'] = 'green elephants'


@pytest.mark.parametrize('right', [True, False])
def test_evaluate_perfect_and_useless_model(world, monkeypatch, right):
    def answer_all(model, processor, prompts):
        for _, items in prompts:
            for item in items:
                set_prediction(item, right)

    monkeypatch.setattr(ev, 'answer_all', answer_all)
    names = ('shapes', 'clocks', 'shapes_text', 'clips', 'long_clips', 'shapes_many')
    processor = data.Processor(world / 'shapes', 32, 8, 1, 512, max_frames=2)
    sets = [data.Dataset(world / name, 'validation') for name in names]
    sets.append(data.Dataset(world / 'clocks', 'train'))             # a second one of this name
    rows, skipped, _ = ev.evaluate(None, processor, sets)
    assert len({row['dataset'] for row in rows}) == len(sets)
    assert len({row['record'] for row in rows}) > 5
    assert not skipped

    expected = {(name, task) for name in ('shapes', 'clips', 'shapes_many')
                for task in ('pointing', 'qa')}
    expected |= {(str(world / 'clocks/train'), 'qa'), (str(world / 'clocks/validation'), 'qa'),
                 ('shapes_text', 'text'), ('clips', 'captioning'), ('clips', 'tracking'),
                 ('long_clips', 'tracking')}
    summary = ev.summarise(rows)
    assert {(entry['dataset'], entry['task']) for entry in summary} >= expected
    assert {entry['score'] for entry in summary} == {float(right)}


def run(*args):
    command = [sys.executable, str(ROOT / 'eval.py'), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_script_writes_metrics_predictions_and_report(world, checkpoint):
    # The same checkpoint by two names must give two equal columns.
    both = f'{checkpoint},{checkpoint / "step000000"}'
    shapes = world / 'shapes'
    text_file = world / 'shapes_text' / 'validation.jsonl'
    done = run(f'--checkpoint={both}', f'--data={shapes},{text_file}', '--num=6',
               '--max_new_tokens=8', '--page_rows=5', '--threads=1')
    assert done.returncode == 0, done.stderr

    folder = checkpoint / 'step000000' / 'eval'
    lines = (folder / 'predictions.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    dataset = data.Dataset(shapes, 'validation')
    num_questions = sum(len(dataset[i]['conversations']) for i in range(6))
    assert len(rows) == num_questions + 4                  # the text dataset has four records

    figures = json.loads((folder / 'metrics.json').read_text())['metrics']
    assert ev.summarise(rows) == figures
    assert all(entry['low'] <= entry['score'] <= entry['high'] for entry in figures)

    table = done.stdout[done.stdout.rindex('dataset '):].splitlines()
    assert table[0].split()[3:] == both.split(',')
    assert len(table) == 1 + len(figures)
    for line, entry in zip(table[1:], figures):
        score = f"{entry['score']:.1%}"
        assert line.split()[-2:] == [score, score]

    page = (folder / 'report.html').read_text()
    assert page.count('<h2>') == 5
    assert 'http' not in page.replace('data:image/png;base64', '')


def test_resumed_and_parallel_runs_give_the_same_scores(world, checkpoint, tmp_path):
    """A run killed in the middle of a line and continued, a run scored again, and a run of two
    processes: the answers and scores of an uninterrupted run."""
    args = [f'--checkpoint={checkpoint}', f'--data={world / "shapes"},{world / "shapes_text"}',
            '--max_new_tokens=6', '--threads=1', '--loss=True']
    assert run(*args, f'--out={tmp_path}/one').returncode == 0
    uninterrupted = (tmp_path / 'one/predictions.jsonl').read_text()
    (cache,) = (tmp_path / 'one').glob('answers-*')
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) == 2

    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / cache.name).write_text(lines[0] + lines[1][:100])
    done = run(*args, f'--out={tmp_path}/half')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'half/predictions.jsonl').read_text() == uninterrupted

    again = run(*args, f'--out={tmp_path}/one', '--radius=0.5')          # only scored again
    assert again.returncode == 0
    assert len(cache.read_text().splitlines()) == 2

    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    two = subprocess.run([*torchrun, ROOT / 'eval.py', *args, f'--out={tmp_path}/two'],
                         capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert (tmp_path / 'two/predictions.jsonl').read_text() == uninterrupted

    half_figures = json.loads((tmp_path / 'half/metrics.json').read_text())
    two_figures = json.loads((tmp_path / 'two/metrics.json').read_text())
    assert half_figures['metrics'] == two_figures['metrics']
    assert half_figures['losses'] == two_figures['losses']

    # The loss must equal the training loss of the same records, computed in one batch.
    vlm, processor, _ = load_checkpoint(checkpoint)
    dataset = data.Dataset(world / 'shapes_text', 'validation')
    examples = [processor.example(dataset[i], dataset.folder) for i in range(len(dataset))]
    batch = data.collate([[example] for example in examples], processor)
    entries = [entry for entry in half_figures['losses'] if entry['dataset'] == 'shapes_text']
    assert entries[0]['tokens'] == len(batch.loss_index)
    assert entries[0]['loss'] == pytest.approx(vlm(batch, weight_factor=1. / batch.total_weight)[0].item(), rel=1e-4)


def test_answers_do_not_depend_on_batch_size(world, checkpoint, monkeypatch):
    """Questions about a picture or a video together, several of these at once, or each alone."""
    vlm, processor, _ = load_checkpoint(checkpoint)
    # With its initial weights the model would repeat one token in every answer.
    generator = torch.Generator().manual_seed(0)
    for p in vlm.parameters():
        p.data += .1 * torch.randn(p.shape, generator=generator)
    monkeypatch.setattr(ev, 'max_new_tokens', 12)
    sets = [data.Dataset(world / name, 'validation') for name in ('shapes', 'clips')]

    generate = ev.generate
    shapes = []                                            # of the batches with the current limits

    def generate_and_record(model, batch, max_new_tokens):
        shapes.append(batch.tokens.shape)
        return generate(model, batch, max_new_tokens)

    monkeypatch.setattr(ev, 'generate', generate_and_record)

    limits = [                                             # batch_size, batch_tokens, pending bytes
        (64, 2 ** 17, 2 ** 30), (3, 2 ** 17, 2 ** 30), (1, 2 ** 17, 2 ** 30), (64, 2000, 2 ** 30),
        (64, 2 ** 17, 1)]
    predictions = []                                       # for each of the limits
    num_batches = []
    for batch_size, batch_tokens, pending_bytes in limits:
        monkeypatch.setattr(ev, 'batch_size', batch_size)
        monkeypatch.setattr(ev, 'batch_tokens', batch_tokens)
        monkeypatch.setattr(ev, 'MAX_PENDING_BYTES', pending_bytes)
        shapes.clear()
        texts = []
        for dataset in sets:
            items, _, _ = ev.answer_records(vlm, processor, dataset, range(2))
            texts += [item['prediction'] for item in items]
        predictions.append(texts)
        num_batches.append(len(shapes))

    assert all(texts == predictions[0] for texts in predictions)
    assert len(predictions[0]) > 15
    assert len(set(predictions[0])) > 5
    assert num_batches[0] == 2 < num_batches[3] < num_batches[1] < num_batches[2]
    assert num_batches[2] == len(predictions[0])
    assert num_batches[4] == 4


def test_script_reports_a_mistake_in_one_line(world, checkpoint, tmp_path):
    shapes = world / 'shapes'
    cases = [
        ((f'--data={shapes}',), 'which checkpoint?'),
        ((f'--checkpoint={checkpoint}',), 'data is empty'),
        ((f'--checkpoint={tmp_path}', f'--data={shapes}'), 'is not a checkpoint folder'),
        ((f'--checkpoint={checkpoint},nowhere', f'--data={shapes}'), 'nowhere does not exist'),
        ((f'--checkpoint={checkpoint}', '--data=nowhere'), 'does not exist')]
    for args, words in cases:
        done = run(*args)
        assert done.returncode == 1, done.stderr
        assert words in done.stderr
        assert done.stderr.count('\n') == 1, done.stderr


def test_script_skips_and_names_bad_records(world, checkpoint, tmp_path):
    text_file = world / 'shapes_text' / 'validation.jsonl'
    good = json.loads(text_file.read_text().splitlines()[0])
    lines = [json.dumps({**good, 'images': ['gone.png']}), '{"broken', json.dumps(good)]
    mine = tmp_path / 'mine.jsonl'
    mine.write_text('\n'.join(lines) + '\n')
    done = run(f'--checkpoint={checkpoint}', f'--data={mine}', '--max_new_tokens=4',
               f'--out={tmp_path}')
    assert done.returncode == 0, done.stderr
    assert 'mine.jsonl line 1' in done.stderr
    assert 'mine.jsonl line 2' in done.stderr
    assert len((tmp_path / 'predictions.jsonl').read_text().splitlines()) == 1
