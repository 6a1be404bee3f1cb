"""The first ten minutes: data sets that are Python classes, config/debug.py, the answers shown while a model learns, the
drawn tower, and what `python model.py` says."""
import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'prepare')]
import data  # noqa: E402
from configurator import UserError, configure, train_settings  # noqa: E402
from extra.learning import Showcase, chart, curves, thinned  # noqa: E402
from media import BadRow  # noqa: E402
from model import VLM, make_config  # noqa: E402


def settings_of(*more):
    return configure(train_settings(), [str(ROOT / 'config/debug.py'), *more])


def processor_of(settings, **more):
    options = {**data.processor_settings(settings), **more}
    return data.Processor('bytes', patch_size=8, **options)


def run(*arguments, ranks=1):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}']
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment)


# --------------------------------------------------------------------------------------------------
# Data sets that are Python classes

def one(record):
    """A Mixture of a class whose only record is this one."""
    settings = {'mixture': {'mine': 1.}, 'datasets': {'mine': [record]}}
    return data.open_mixture(settings, '.')


def question(**more):
    return {'messages': [{'role': 'user', 'content': 'What?'}, {'role': 'assistant', 'content': 'That.', **more}]}


def test_pictures_in_memory_are_those_of_files(tmp_path):
    """A path, a Pillow picture, an array, and a batch of arrays give the same Example."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    (tmp_path / 'train.jsonl').write_text(json.dumps({'images': ['a.png'], **question()}) + '\n')
    processor = processor_of(settings_of())
    expected = processor.example(data.Dataset(tmp_path)[0], tmp_path)
    for images in ([pixels], [Image.fromarray(pixels)], (pixels,), pixels[None], pixels, Image.fromarray(pixels), ['a.png']):
        settings = {'mixture': {'mine': 1.}, 'datasets': {'mine': [{'images': images, **question()}]}}
        dataset = data.open_mixture(settings, tmp_path).datasets[0]
        example = processor.example(dataset[0], dataset.folder)
        assert example.tokens == expected.tokens and np.array_equal(example.patches, expected.patches)
    grey = processor.example(one({'images': [pixels[..., 0]], **question()}).datasets[0][0], '.')
    assert len(np.unique(grey.patches.reshape(-1, 3) - grey.patches.reshape(-1, 3)[:, :1])) == 1       # r = g = b


@pytest.mark.parametrize('record, problem', [
    ({'images': [np.zeros((8, 8, 3))], **question()}, 'an array of float64 [8, 8, 3]; a picture is uint8 [height, width, 3]'),
    ({'images': [np.zeros((3, 8, 8), np.uint8)], **question()}, 'an array of uint8 [3, 8, 8]'),
    ({'images': [3], **question()}, 'there is a int in it'),
    ({'images': 7, **question()}, "'images' is a list of paths, this is a int"),
    ({'images': [np.zeros((8, 8, 3), np.uint8)]}, "neither 'conversations' nor 'messages'"),
    (None, 'a record is a JSON object, this is NoneType'),
    ({**question(points={'points': [{'x': np.float32(.5), 'y': np.float64('nan')}]})}, 'fractions of the picture'),
])
def test_a_class_that_returns_something_else(record, problem):
    dataset = one(record).datasets[0]
    with pytest.raises(BadRow) as e:
        processor_of(settings_of()).example(dataset[0], '.')
    assert problem in str(e.value)


def test_numbers_of_numpy_are_numbers():
    points = {'points': [{'x': np.float32(.5), 'y': np.float64(.25), 'id': np.int64(1)}]}
    record = {'images': [np.zeros((8, 8, 3), np.uint8)], **question(points=points)}
    example = processor_of(settings_of()).example(one(record).datasets[0][0], '.')
    assert '<point 0.500, 0.250, 1>' in processor_of(settings_of()).decode(example.tokens)


class Broken:
    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i % 2:
            raise KeyError(f'no label {i}')
        return question()


def test_errors_of_a_class_are_counted_and_named():
    mixture = data.open_mixture({'mixture': {'mine': 1.}, 'datasets': {'mine': Broken()}}, '.')
    problems = []
    loader = data.Loader(mixture, processor_of(settings_of()), 2, max_bad_fraction=1., report=problems.append)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    assert problems[0].reason == 'error in the class' and problems[0].row.startswith('mine[')
    assert problems[0].problem.startswith("KeyError: 'no label")
    class Endless(Broken):
        def __len__(self):
            raise RuntimeError('no end')
    for source, problem in ((7, "'mine' is a int, which has no __len__"), ({'test': Broken()}, "has no 'train' in it"),
                            (Broken, r'write Broken\(\)'), (Endless(), "the length of 'mine', a Endless: RuntimeError: no end")):
        with pytest.raises(UserError, match=problem):
            data.open_mixture({'mixture': {'mine': 1.}, 'datasets': {'mine': source}}, '.')
    with pytest.raises(UserError, match="datasets names 'mien', which mixture does not; it has mine"):
        data.open_mixture({'mixture': {'mine': 1.}, 'datasets': {'mien': Broken()}}, '.')


def test_a_record_of_a_class_stays_as_it_is():
    record = {'images': [np.zeros((8, 8, 3), np.uint8)], **question()}
    record['messages'][0]['content'] = '<image>What?'
    before = copy.deepcopy(record)
    read = one(record).datasets[0][0]
    assert read['conversations'][0]['messages'][0]['content'] == 'What?'
    assert record['messages'] == before['messages']


def test_workers_and_a_resume_give_the_same_batches(tmp_path):
    """Beside a folder, read by no process and by two, and from the middle."""
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'set').mkdir()
    (tmp_path / 'a.png').rename(tmp_path / 'set/a.png')
    (tmp_path / 'set/train.jsonl').write_text((json.dumps({'images': ['a.png'], **question()}) + '\n') * 9)
    settings = {**settings_of(), 'mixture': {'squares': .7, 'set': .3}}
    processor = processor_of(settings)

    def batches(workers, state=None):
        mixture = data.open_mixture(settings, tmp_path, 3)
        return iter(data.Loader(mixture, processor, 2, workers, state, length=512, packed=True))
    alone, by_two = batches(0), batches(2)
    for i in range(6):
        a, state = next(alone)
        b, _ = next(by_two)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.patches, b.patches)
        if i == 2:
            middle = state
    resumed = batches(0, json.loads(json.dumps(middle)))
    for _ in range(3):
        c, _ = next(resumed)
    assert torch.equal(a.tokens, c.tokens) and torch.equal(a.patches, c.patches)
    assert {name for name, _ in a.sources} == {'squares', 'set'}


def test_a_processor_can_be_sent_to_a_worker_that_starts_anew():
    processor = processor_of(settings_of())
    sent = pickle.loads(pickle.dumps(processor))
    record = one({'images': [np.zeros((8, 8, 3), np.uint8)], **question()}).datasets[0][0]
    record['conversations'][0]['messages'][0]['content'] = 'Is <|im_end|> a word?'           # text, no special token
    assert sent.example(record, '.').tokens == processor.example(record, '.').tokens


def test_bytes_are_a_tokenizer():
    processor = processor_of(settings_of())
    text = 'Größe 3 <|image_pad|>\n\t😀'
    ids = processor.encode(text)
    assert len(ids) == len(text.encode()) and max(ids) < 256 and processor.decode(ids) == text
    assert processor.vocab_size == 263 and processor.image_pad == 261


# --------------------------------------------------------------------------------------------------
# config/debug.py and the answers that are shown

def weights_of(out):
    return hashlib.sha256((out / 'step000020/model.safetensors').read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    """A run of config/debug.py whose answers are shown every 7 steps."""
    out = tmp_path_factory.mktemp('shown')
    done = run('train.py', 'config/debug.py', f'--out_dir={out}', '--show_interval=7', '--residual_dropout=0.1')
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def test_showing_changes_nothing(shown, tmp_path):
    """Neither weights nor the place in the data, by a bit; with dropout, which draws random numbers."""
    out, _ = shown
    done = run('train.py', 'config/debug.py', f'--out_dir={tmp_path}', '--show_interval=0', '--eval_interval=0',
               '--residual_dropout=0.1')
    assert done.returncode == 0, done.stderr
    assert weights_of(out) == weights_of(tmp_path)
    states = [torch.load(folder / 'step000020/train_state/state.pt', weights_only=True) for folder in (out, tmp_path)]
    assert states[0]['ranks'] == states[1]['ranks'] and not (tmp_path / 'learning.html').exists()


def test_showing_changes_nothing_on_several_ranks(tmp_path):
    """FSDP with a trained tower, where all ranks answer together (DDP asks its first rank alone)."""
    for interval in (0, 9):
        done = run('train.py', 'config/debug.py', f'--out_dir={tmp_path}/{interval}', f'--show_interval={interval}',
                   '--eval_interval=0', '--eval_answers=0', '--parallel=fsdp', '--num_workers=0', ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert weights_of(tmp_path / '0') == weights_of(tmp_path / '9')
    assert (tmp_path / '9/learning.html').exists() and 'step 18: ' in done.stdout + done.stderr


def test_what_is_shown(shown):
    out, done = shown
    records = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    answers = {record['step']: record['shown'] for record in records if 'shown' in record}
    assert list(answers) == [7, 14, 20] and list(answers[7]) == ['captioning', 'pointing', 'counting', 'qa']
    assert 'step 14: Point to the square. ' in done.stdout + done.stderr
    page = (out / 'learning.html').read_text()
    for text in ('what is right', 'step 7', 'step 20', 'squares[', 'loss/pointing', 'squares/captioning/ROUGE-L', '<polyline'):
        assert text in page
    assert page.count('<circle') >= 2                    # the right answer's point, drawn twice
    assert '<script' not in page


def test_the_run_of_debug_opens_in_transformers(shown):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    out, _ = shown
    processor = AutoProcessor.from_pretrained(out / 'step000020')
    assert processor.tokenizer.decode(processor.tokenizer('a square.').input_ids) == 'a square.'
    AutoModelForImageTextToText.from_pretrained(out / 'step000020')


def test_a_text_of_the_model_stays_text():
    settings = settings_of()
    held_out = data.Mixture([data.Records('squares', settings['datasets']['squares'], '.', 'validation')], [1.])
    showcase = Showcase(held_out, processor_of(settings))
    card = showcase.card('step 1', {'captioning': '<script>alert(1)</script>', 'pointing': '<point 0.5, 0.25, 1>'})
    assert '<script' not in card and 'cx="32.0" cy="16.0"' in card
    assert showcase.lines({'captioning': 'a\nb' * 200, 'counting': '3'})[0].count('\n') == 0
    assert not Showcase(None, processor_of(settings))
    no_pictures = data.Mixture([data.Records('text', [question()], '.')], [1.])
    assert not Showcase(no_pictures, processor_of(settings))


def test_what_cannot_be_shown_is_passed_over(tmp_path):
    """A broken picture, a caption without a question; and answers about another picture, of an earlier start of the run."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    answer = {'role': 'assistant', 'content': 'Black.'}
    records = [{'images': ['lost.png'], **question()}, {'images': [pixels], 'messages': [answer]},
               {'images': [pixels], **question()}]
    showcase = Showcase(data.Mixture([data.Records('mine', records, '.')], [1.]), processor_of(settings_of()))
    assert showcase.where == 'mine[2]' and list(showcase.questions) == ['qa']
    lines = [{'step': 1, 'about': 'old[0]', 'shown': {'pointing': 'gone'}}, {'step': 2, 'about': 'mine[2]', 'shown': {'qa': 'kept'}},
             {'step': 2, 'loss/qa': float('inf')}, {'step': 3, 'loss/qa': 0.}]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    showcase.write_page(tmp_path)
    page = (tmp_path / 'learning.html').read_text()
    assert 'kept' in page and 'gone' not in page and 'nan' not in page


def test_settings_as_text_leave_records_out():
    from extra.checkpoint import as_text
    text = as_text({**settings_of(), 'datasets': {'mine': [question()] * 1000}})
    assert text['datasets'] == "{'mine': 'list'}" and text['max_steps'] == '20'


def test_curves_take_the_first_metric_of_each_task():
    records = [{'step': 1, 'loss': 2., 'loss/qa': 3.}, {'step': 2, 'loss/qa': 2.5},
               {'step': 2, 'validation/loss': 1., 'validation/loss/qa': 2., 'validation/a/qa/none there': .1,
                'validation/a/qa/accuracy': .5, 'validation/a/qa/within 1': .6}]
    assert curves(records, lambda name: name.startswith('loss/')) == {'loss/qa': [(1, 3.), (2, 2.5)]}
    from extra.learning import is_score
    assert curves(records, is_score) == {'a/qa/accuracy': [(2, .5)]}
    assert 'points="380.0,128.0 720.0,8.0"' in chart({'x': [(1, 1.), (2, 2.)]})
    long = [(step, float(step % 2)) for step in range(1, 100_001)]
    assert len(thinned(long)) <= 150 and thinned(long)[-1][0] == 100_000 and abs(thinned(long)[-1][1] - .5) < .01


def test_a_stage_waits_for_the_one_before(shown, tmp_path):
    out, _ = shown
    state = torch.load(out / 'step000010/train_state/state.pt', weights_only=True)
    run_dir = tmp_path / 'stopped'
    run_dir.mkdir()
    (run_dir / 'step000010').symlink_to(out / 'step000010')
    (run_dir / 'latest').write_text('step000010')
    assert state['settings']['max_steps'] == '20'
    done = run('train.py', 'config/debug.py', f'--init_from={run_dir}', f'--out_dir={tmp_path}/next')
    assert done.returncode == 1 and 'is not at its end, step 10 of max_steps = 20: go on with it' in done.stderr
    import train
    assert train.finished_run(str(run_dir / 'step000010')) == run_dir / 'step000010'         # named itself
    assert train.finished_run(str(out)) == out / 'step000020'                                # complete


def test_what_is_inspected_is_what_is_trained(shown):
    """`python data.py` and `bench.py --packing` get the processor and the sizes of the run itself."""
    from extra.hf import make_processor, read_config
    out, _ = shown
    folder = out / 'step000020'
    processor, config = make_processor({**settings_of(), 'init_from': str(out), 'tokenizer': '/nonexistent'})
    assert config == read_config(folder) and processor.resize == 'stretch'
    more = ('--connector=mlp', '--pooling=4')
    processor, config = make_processor(settings_of(*more))
    assert (config.connector, config.pooling, config.image_token_id) == ('mlp', 4, processor.image_pad)


# --------------------------------------------------------------------------------------------------
# The tower, and python model.py

def test_labels_of_a_drawn_picture():
    import tower
    from scenes import COLOURS, KINDS
    for i in range(12):
        pixels, of_patches, of_windows = tower.labelled_picture(0, 64, 8, 4, i)
        for p in np.flatnonzero(of_patches < tower.NOTHING):
            # The colour named by the label is the nearest to that of the patch's brightest agreement
            colour = list(COLOURS.values())[of_patches[p] // len(KINDS)]
            row, column = divmod(p, 8)
            patch = pixels[row * 8:row * 8 + 8, column * 8:column * 8 + 8].reshape(-1, 3).astype(int)
            assert np.abs(patch - colour).max(1).min() < 60
        for w in np.flatnonzero(of_windows[:, 0] < tower.NOTHING):
            label, is_large, x, y = of_windows[w]
            assert x * 4 // tower.BINS == w % 4 and y * 4 // tower.BINS == w // 4 and is_large in (0, 1)
            centre = (int((y + .5) / tower.BINS * 8), int((x + .5) / tower.BINS * 8))
            assert of_patches[centre[0] * 8 + centre[1]] == label


def test_a_tower_is_trained_and_taken(tmp_path):
    done = run('prepare/tower.py', 'config/debug.py', f'--out={tmp_path}/tower', '--num=300', '--steps=12', '--workers=1')
    assert done.returncode == 0 and 'held out: patches of shapes 0.' in done.stdout, done.stderr
    done = run('train.py', 'config/debug.py', f'--vision_weights={tmp_path}/tower', f'--out_dir={tmp_path}/run', '--max_steps=1',
               '--learning_rate=0.0', '--eval_interval=0', '--eval_answers=0', '--show_interval=0')
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file
    tower, model = load_file(tmp_path / 'tower/model.safetensors'), load_file(tmp_path / 'run/step000001/model.safetensors')
    assert len(tower) > 20 and all(torch.equal(model[name], tensor) for name, tensor in tower.items())


def test_model_py_runs_the_model_once(tmp_path):
    done = run('model.py', 'config/debug.py')
    assert done.returncode == 0, done.stderr
    assert 'fits 80 GB; fits 40 GB; fits 24 GB' in done.stdout and '16 of them visual' in done.stdout
    sizes = dict(hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2, image_size=64, patch_size=8, feature_layers=(-2,))
    done = run('model.py', 'config/debug.py', f'--vision={sizes}', f'--vision_weights={tmp_path}/none')
    layer = sum(p.numel() for p in VLM(make_config(sizes, settings_of()['language'])).vision_tower.encoder['layers'][0].parameters())
    assert 'the tower has 3 of its 4 layers' in done.stdout and f'{layer / 1e6:.1f} million' in done.stdout
    assert f'vision at random ({tmp_path}/none is not there)' in done.stdout


def test_a_picture_in_the_mirror():
    import tower
    pictures = [torch.from_numpy(np.stack(x)) for x in zip(*(tower.labelled_picture(0, 64, 8, 4, i) for i in range(4)))]
    pixels, of_patches, of_windows = tower.mirrored(*pictures)
    assert torch.equal(pixels, pictures[0].flip(2)) and not torch.equal(pixels, pictures[0])
    for w in range(16):                                  # window w is where window w's mirror image was
        w2 = w - w % 4 + 3 - w % 4
        assert torch.equal(of_windows[:, w, :2], pictures[2][:, w2, :2])
        there = of_windows[:, w, 0] < tower.NOTHING
        assert torch.equal(of_windows[there, w, 2], 47 - pictures[2][there, w2, 2])
    for again, first in zip(tower.mirrored(pixels, of_patches, of_windows)[:2], pictures):
        assert torch.equal(again, first)
