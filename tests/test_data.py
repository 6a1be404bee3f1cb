"""From files to batches."""
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from extra.engine import generate  # noqa: E402
import data  # noqa: E402
import model as m  # noqa: E402
from data import BadRow, Dataset, Loader, Mixture, Processor, collate  # noqa: E402
from model import UserError  # noqa: E402
from extra.hf import load_processor, save_model  # noqa: E402
from extra.plan import mixture_table  # noqa: E402
from parallel import reshard_loader_states  # noqa: E402
from test_media import clip, quarters  # noqa: E402


# -- points

def some_points(**extra):
    fraction = st.integers(0, 100).map(lambda v: v / 100)
    point = st.fixed_dictionaries({'x': fraction, 'y': fraction, 'id': st.integers(1, 40), **extra})
    return st.lists(point, min_size=1, max_size=8)


SECONDS = st.integers(0, 900).map(lambda v: v / 10)


@pytest.mark.quick
@settings(deadline=None)
@given(st.one_of(some_points(), some_points(t=SECONDS), some_points(image=st.integers(0, 3))))
def test_points_format_and_parse_roundtrip(points):
    assert data.parse_points(data.format_points(points, digits=2)) == points
    text = data.format_points(points, digits=3)
    assert data.parse_points('Here: ' + text + ' and so on.') == points


@pytest.mark.quick
@settings(deadline=None)
@given(some_points(t=SECONDS))
def test_points_molmo2_tracks_roundtrip(points):
    def key(point):
        return point['t'], point['id']
    points = list({key(p): p for p in points}.values())    # an object is at one place at a time
    text = data.format_points(points, 'Red Car', 'molmo2', tracks=True)
    assert text.startswith('<tracks coords="')
    assert text.endswith('">red car</tracks>')
    assert sorted(data.parse_points(text), key=key) == sorted(points, key=key)


@pytest.mark.quick
def test_points_format_of_documented_examples():
    points = [{'x': .7, 'y': .25, 'id': 2}, {'x': .53, 'y': .21, 'id': 1}]
    assert data.format_points(points, digits=2) == '<point 0.70, 0.25, 2> <point 0.53, 0.21, 1>'
    text = data.format_points(points, 'Dogs', 'molmo2')
    assert text == '<points coords="1 1 530 210 2 700 250">dogs</points>'
    assert data.format_points([]) == 'There are none.'
    assert data.parse_points('There are none.') == []


@pytest.mark.quick
@settings(deadline=None)
@given(st.text(alphabet='<point rs=cod"0123456789.,;: >') | st.text())
def test_points_parse_accepts_any_text(text):
    for point in data.parse_points(text):
        assert 0 <= point['x'] <= 1
        assert 0 <= point['y'] <= 1


# -- files

def write(folder, lines, split='train', end='\n'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{split}.jsonl').write_bytes(end.join(lines).encode())
    return Dataset(folder, split)


def turns(question, *answer_and_more):
    """Messages of user and assistant by turns."""
    messages = []
    for i, content in enumerate((question, *answer_and_more)):
        role = 'assistant' if i % 2 else 'user'
        messages.append({'role': role, 'content': content})
    return messages


def talk(answer='yes', question='Is it?', **rest):
    """A record with one conversation."""
    return {'conversations': [{'task': 'qa', 'messages': turns(question, answer)}], **rest}


def said(*points, **rest):
    """A record whose answer is points."""
    return {'messages': [{'role': 'assistant', 'points': {'points': list(points)}}], **rest}


def first_answer(record):
    return record['conversations'][0]['messages'][1]['content']


@pytest.mark.parametrize('end', ['\n', '\r\n', '\n\n'])
def test_dataset_index_finds_and_names_lines(tmp_path, end):
    lines = [json.dumps(talk(f'answer {i} ü')) for i in range(20)]
    dataset = write(tmp_path / 'd', lines, end=end)
    assert len(dataset) == 20
    assert len(Dataset(tmp_path / 'd')) == 20              # reads the index
    lines_a_record = 2 if end == '\n\n' else 1
    for i in (0, 7, 19, 3):
        assert first_answer(dataset[i]) == f'answer {i} ü'
        assert dataset.where(i).endswith(f'train.jsonl line {i * lines_a_record + 1}')
    write(tmp_path / 'd', lines[:5])
    assert len(Dataset(tmp_path / 'd')) == 5               # the index follows the file


def test_dataset_broken_json_names_its_line(tmp_path):
    lines = [json.dumps(talk())] * 711 + ['{"images": [}'] + [json.dumps(talk())] * 3
    dataset = write(tmp_path, lines)
    with pytest.raises(BadRow) as e:
        dataset[711]
    assert e.value.reason == 'broken JSON'
    assert dataset.where(711).endswith('line 712')
    assert dataset[712]


@pytest.mark.parametrize('record,reason,words', [
    ([1], 'schema', 'list'),
    ({'id': 1}, 'schema', 'among its keys: id'),
    ({'messages': 'hi'}, 'schema', 'a conversation is'),
    ({'messages': [{'role': 'user', 'content': 'hi'}]}, 'no answer', 'assistant'),
    (talk(video='a.mp4', images=['b.png']), 'schema', 'one video or any number of images'),
    (talk(videos=['a.mp4', 'b.mp4']), 'schema', '2 videos'),
    (talk(images=[{'bytes': 'x'}]), 'schema', 'list of paths'),
    (talk(video='a.mp4', start='soon'), 'schema', "'start' is a number of seconds"),
    ({'conversations': 'hi'}, 'schema', ''),
    (said({'x': 53, 'y': .1}), 'bad point', 'fractions'),
    (said({'x': float('nan'), 'y': .1}), 'bad point', 'fractions'),
    (said({'x': .1, 'y': True}), 'bad point', 'fractions'),
    (said({'x': .1, 'y': .1, 'id': 'a'}), 'bad point', 'whole'),
    (said({'x': .1, 'y': .1}, video='a.mp4'), 'bad point', "second 't'"),
    (said({'x': .1, 'y': .1, 'image': 2}, images=['a', 'b']), 'bad point', 'one of 2'),
    (said('x'), 'bad point', 'fractions'),
    ({'messages': [{'role': 'assistant', 'points': [1]}]}, 'schema', 'points are'),
])
def test_bad_record_error_names_reason(record, reason, words):
    with pytest.raises(BadRow) as e:
        data.normalise(record)
    assert e.value.reason == reason
    assert words in str(e.value)


def test_record_formats_of_other_trainers():
    theirs = {'messages': turns('<image>\nWhat is it?', 'A cat.'), 'images': 'cat.jpg'}
    record = data.normalise(theirs)
    assert record['images'] == ['cat.jpg']
    assert record['conversations'][0]['messages'][0]['content'] == 'What is it?'

    swift = {'messages': turns('<video>What?', 'A cat.'), 'videos': ['a.mp4']}
    llava = {'conversations': [{'from': 'human', 'value': '<video>\nWhat?'},
                               {'from': 'gpt', 'value': 'A cat.'}], 'video': 'a.mp4'}
    for theirs in (swift, llava):
        record = data.normalise(theirs)
        assert record['video'] == 'a.mp4'
        assert record['images'] == []
        assert record['conversations'][0]['messages'] == turns('What?', 'A cat.')


def test_dataset_odd_lines_are_broken_json(tmp_path):
    lines = [
        json.dumps(talk('x' * 2 ** 21)),
        '\0' * 99,
        '[' * 99999,
        json.dumps(talk()),
        '{"a": ' + '9' * 9999 + '}',
    ]
    dataset = write(tmp_path, lines)
    assert len(dataset) == 5
    assert dataset[0] and dataset[3]
    for i in (1, 2, 4):
        with pytest.raises(BadRow) as e:
            dataset[i]
        assert e.value.reason == 'broken JSON'


def test_dataset_index_in_read_only_folder(tmp_path, monkeypatch):
    write(tmp_path, [json.dumps(talk(str(i))) for i in range(9)])
    (tmp_path / '.train.index').unlink()

    def refuse(*_):
        raise PermissionError
    monkeypatch.setattr(Path, 'replace', refuse)
    dataset = Dataset(tmp_path)
    assert len(dataset) == 9
    assert first_answer(dataset[4]) == '4'


words = st.sampled_from([
    'messages', 'conversations', 'images', 'video', 'videos', 'role', 'content', 'user',
    'assistant', 'points', 'task', 'x', 'y', 'id', 't', 'image', 'label', 'start', 'end',
    'subtitles', 'from', 'value', 'human'])
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), words,
                   st.sampled_from([.5, 1]))


def nest(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=5)


anything = st.recursive(leaves, nest, max_leaves=20)
almost_talk = st.builds(talk, st.text(), images=anything, video=anything, start=anything,
                        subtitles=anything)
almost_points = st.builds(said, anything, anything)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(record=anything | almost_talk | almost_points)
def test_any_record_is_an_example_or_a_bad_row(world, tmp_path_factory, record):
    try:
        record = data.normalise(json.loads(json.dumps(record)))
        assert make_processor(world).example(record, tmp_path_factory.getbasetemp()).tokens
    except BadRow as e:
        assert str(e)


# -- examples

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp('world')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '40',
                    '--num_clocks', '10', '--num_text', '20', '--num_clips', '8',
                    '--num_validation', '10', '--workers', '1'], check=True, capture_output=True)
    return out


def make_processor(world, **rest):
    settings = {'image_size': 32, 'patch_size': 8, 'pooling': 2, 'seq_len': 256, 'point_digits': 2}
    return Processor(world / 'shapes', **{**settings, **rest})


def tiny_model(processor, pooling):
    vision = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                  patch_size=8, feature_layers=(-1,))
    language = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                    head_dim=16, vocab_size=1024)
    vlm = m.VLM(m.make_config(vision, language, pooling=pooling, **processor.token_ids()))
    vlm.init_weights()
    return vlm


def point_at(question, points, **rest):
    """Messages of a question that points answer."""
    return [{'role': 'user', 'content': question},
            {'role': 'assistant', 'content': '', 'points': {'points': points, **rest}}]


@pytest.fixture
def two_branches(world, tmp_path):
    """(record, folder): one picture, a conversation of two questions and one of points."""
    quarters().save(tmp_path / 'a.png')
    qa = turns('What colour?', 'red', 'And <|im_end|>?', 'blue')
    pointing = point_at('Point.', [{'x': .25, 'y': .5, 'id': 1}], label='x')
    record = {'images': ['a.png'], 'conversations': [
        {'task': 'qa', 'messages': qa},
        {'task': 'pointing', 'messages': pointing}]}
    return data.normalise(record), tmp_path


def test_example_layout_weights_branches_and_positions(world, two_branches):
    processor = make_processor(world, task_weights={'qa': 1.5, 'pointing': 2.})
    e = processor.example(*two_branches)

    def decode(tokens):
        return processor.tokenizer.decode(tokens, skip_special_tokens=False)
    assert decode(e.tokens) == (
        '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>'
        '<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n'
        '<|im_start|>user\nAnd <|im_end|>?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>'
        '<|im_start|>user\nPoint.<|im_end|>\n<|im_start|>assistant\n'
        '<point 0.25, 0.50, 1><|im_end|>')
    qa = [token for token, weight in zip(e.tokens, e.weights) if weight == 1.5]
    assert decode(qa) == 'red<|im_end|>blue<|im_end|>'
    pointing = [token for token, weight in zip(e.tokens, e.weights) if weight == 2.]
    assert decode(pointing) == '<point 0.25, 0.50, 1><|im_end|>'
    assert e.tokens.count(processor.im_end) == 6           # the one that the user wrote is text
    assert e.visual_index.tolist() == [1, 2, 3, 4]
    assert e.branches[:6] == [0] * 6
    assert set(e.branches[6:]) == {1, 2}
    for branch in (1, 2):
        positions = [p for p, b in zip(e.positions, e.branches) if b == branch]
        assert positions == list(range(6, 6 + len(positions)))
    tasks = {data.TASKS[task] for task, weight in zip(e.tasks, e.weights) if weight == 2.}
    assert tasks == {'pointing'}


def test_length_weighting_is_inverse_sqrt_of_answer_tokens(world, two_branches):
    e = make_processor(world, length_weighting=True).example(*two_branches)
    answer = [w for w, b in zip(e.weights, e.branches) if b == 2 and w]
    assert answer == pytest.approx([len(answer) ** -.5] * len(answer))


def test_branch_weighting_is_inverse_sqrt_of_branches(world, two_branches):
    plain = make_processor(world, branch_weighting=False).example(*two_branches)
    e = make_processor(world, branch_weighting=True).example(*two_branches)
    assert e.weights == pytest.approx([w * 2 ** -.5 for w in plain.weights])


def test_example_too_long_leaves_out_branches(world, two_branches):
    whole = make_processor(world).example(*two_branches)
    second = whole.branches.count(2)
    short = make_processor(world, seq_len=6 + second).example(*two_branches)
    assert set(short.branches) == {0, 1}
    with pytest.raises(BadRow) as e:
        make_processor(world, seq_len=6 + second - 1).example(*two_branches)
    assert e.value.reason == 'too long'


def test_patches_and_pooling_windows_equal_loops(world):
    processor = make_processor(world)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    patches = processor.pixels(Image.fromarray(pixels), processor.image_size)
    for n in range(16):
        row, column = divmod(n, 4)
        for i, value in enumerate(patches[n]):
            y, x, channel = i // 24, i // 3 % 8, i % 3
            assert value == pixels[row * 8 + y, column * 8 + x, channel]
    assert processor.window.tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_tokenizer_error_names_missing_token(world, tmp_path):
    text = (world / 'shapes' / 'tokenizer.json').read_text().replace('<|image_pad|>', '<|other|>')
    (tmp_path / 'tokenizer.json').write_text(text)
    with pytest.raises(UserError, match=r'lacks <\|image_pad\|>'):
        Processor(tmp_path, 32, 8, 1)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UserError, match='is not a tokenizer'):
        Processor(tmp_path, 32, 8, 1)


@pytest.mark.parametrize('pooling', [1, 2])
def test_saved_processor_matches_transformers(world, tmp_path, pooling):
    processor = make_processor(world, pooling=pooling)
    vlm = tiny_model(processor, pooling)
    for p in vlm.parameters():
        p.data += .2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    save_model(vlm, tmp_path)
    processor.save(tmp_path)
    again = load_processor(tmp_path, vlm.config)
    for name in ('image_size', 'pooling', 'resize', 'point_digits'):
        assert getattr(again, name) == getattr(processor, name)

    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    picture = noise(0, 32, 32)
    for n in range(3):
        messages = turns('What is it?', 'A cat.', 'Sure?')
        e = processor.prompt(messages, images=[picture] * n)
        messages[0]['content'] = [{'type': 'image'}] * n + [{'type': 'text', 'text': 'What is it?'}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        theirs = theirs.replace('<|image_pad|>', '<|image_pad|>' * len(processor.window))
        assert tokenizer(theirs, add_special_tokens=False)['input_ids'] == e.tokens
    if pooling == 1:                       # llava has the processor of pictures as well
        their_processor = hf.AutoProcessor.from_pretrained(tmp_path)
        compare_pixels(vlm, processor, their_processor, picture)
        their_model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
        compare_answers(vlm, processor, their_model, their_processor, noise(1, 45, 70))


def noise(seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def compare_pixels(vlm, processor, their_processor, picture):
    got = their_processor(images=[picture], text='<|vision_start|><|image_pad|><|vision_end|>',
                          return_tensors='pt')
    assert (got['input_ids'] == processor.image_pad).sum() == len(processor.window)
    patches = torch.from_numpy(processor.pixels(picture, processor.image_size))
    patches = patches * vlm.pixel_scale + vlm.pixel_shift
    patches = patches.view(4, 4, 8, 8, 3)  # [rows, columns, patch size, patch size, 3]
    expected = patches.permute(4, 0, 2, 1, 3).reshape(3, 32, 32)
    assert (got['pixel_values'][0] - expected).abs().max() < 1e-5


def compare_answers(vlm, processor, their_model, their_processor, picture):
    """Asks both about a picture of another size than the tower's."""
    content = [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    text = their_processor.apply_chat_template([{'role': 'user', 'content': content}],
                                               add_generation_prompt=True)
    inputs = their_processor(images=[picture], text=text, return_tensors='pt')
    theirs = their_model.generate(**inputs, do_sample=False, max_new_tokens=24)
    e = processor.prompt(turns('What is it?'), images=[picture])
    batch = collate([[e]], processor, length=len(e.tokens))
    ours = [token.item() for token in generate(vlm.eval(), batch, 24)]
    assert inputs['input_ids'][0].tolist() == e.tokens
    assert theirs[0, len(e.tokens):].tolist() == ours
    assert len(set(ours)) > 3


# -- videos

def video_record(folder, seconds=6., **rest):
    clip(folder / 'a.mp4', np.arange(seconds * 10 + 1) / 10, size=(32, 32))
    return data.normalise(talk(video='a.mp4', **rest))


def test_video_example_layout(world, tmp_path):
    processor = make_processor(world, video_pooling=4, fps=1.)
    subtitles = [{'start': 1., 'end': 2., 'text': 'Hi <|im_end|>'}]
    record = video_record(tmp_path, 2.5, start=.5, subtitles=subtitles)
    e = processor.example(record, tmp_path)
    frame = '<|vision_start|><|video_pad|><|vision_end|>'
    assert processor.tokenizer.decode(e.tokens, skip_special_tokens=False) == (
        f'0.0s{frame}1.0s{frame}2.0s{frame}\nSubtitles:\n0.5s - 1.5s: Hi <|im_end|>'
        '<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>')
    assert e.times == (0., 1., 2.)
    assert e.patches.shape == (3, 16, 192)
    assert e.tokens.count(processor.im_end) == 2
    assert e.pool_index.tolist() == np.arange(48).reshape(3, 16).tolist()
    assert [e.tokens[i] for i in e.visual_index] == [processor.video_pad] * 3


def test_video_drops_frames_to_fit_seq_len(world, tmp_path):
    record = video_record(tmp_path, 8.)
    lengths = []
    for seq_len in (400, 160, 80, 40):
        e = make_processor(world, seq_len=seq_len).example(record, tmp_path)
        lengths.append(len(e.times))
        assert len(e.tokens) <= seq_len and e.times[-1] == 8. or lengths[-1] == 1
    assert lengths[0] == 17
    assert sorted(set(lengths), reverse=True) == lengths
    with pytest.raises(BadRow) as e:
        make_processor(world, seq_len=20).example(record, tmp_path)
    assert e.value.reason == 'too long'


def test_tracking_answer_uses_frame_times(world, tmp_path):
    points = [{'t': t / 2, 'x': t / 20, 'y': .5, 'id': 1} for t in range(13)]
    record = video_record(tmp_path)
    messages = point_at('Track.', points)
    record['conversations'] = [{'task': 'tracking', 'messages': messages},
                               {'task': 'pointing', 'messages': messages}]
    processor = make_processor(world, seq_len=1024, max_frames=3)
    e = processor.example(record, tmp_path)
    assert e.times == (0., 3., 6.)

    def points_of(branch):
        tokens = [token for token, b in zip(e.tokens, e.branches) if b == branch]
        return data.parse_points(processor.decode(tokens))
    assert [p['t'] for p in points_of(1)] == [0., 3., 6.]
    assert points_of(2) == [{**p, 'x': round(p['x'], 2)} for p in points]


def test_pooling_windows_of_ragged_grids():
    assert data.pooling_windows((3, 3), 2).tolist() == [
        [0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    assert data.pooling_windows((27, 27), 3).shape == (81, 9)
    assert data.pooling_windows((27, 27), 2).shape == (196, 4)
    assert data.pooling_windows((4, 4), 3).tolist()[0] == [-1, -1, -1, -1, 0, 1, -1, 4, 5]


@pytest.mark.parametrize('video_size', [32, 16])
def test_visual_tokens_of_mixed_batch_equal_single_examples(world, tmp_path, two_branches,
                                                            video_size):
    """Pictures and frames in one batch, of one size or two, with pooling windows of two sizes."""
    processor = make_processor(world, seq_len=512, video_size=video_size, video_pooling=1,
                               max_frames=3)
    vlm = tiny_model(processor, pooling=2)
    video = processor.example(video_record(tmp_path), tmp_path)
    picture = processor.example(*two_branches)
    examples = [video, picture, video, picture]
    mixed = collate([examples[:3], examples[3:]], processor)
    assert (mixed.frames is not None) == (video_size == 16)
    features = torch.zeros(mixed.tokens.numel(), 32)       # [B x L, width]
    features = features.index_copy(0, mixed.visual_index, vlm.encode_images(mixed))
    start = 0
    for i, e in enumerate(examples):
        if i == 3:                         # the first of the second row
            start = mixed.tokens.shape[1]
        alone = collate([[e]], processor)
        here = features[start:start + len(e.tokens)].index_select(0, alone.visual_index)
        torch.testing.assert_close(here, vlm.encode_images(alone), rtol=1e-5, atol=1e-6)
        start += len(e.tokens)


# -- batches

@pytest.mark.parametrize('how,packed', [({}, False), ({}, True), ({'length': 300}, False)])
def test_collate_equals_its_examples(world, how, packed):
    processor = make_processor(world)
    examples = []
    for name in ('shapes', 'shapes_text'):
        dataset = Dataset(world / name)
        for i in (0, 1):
            examples.append(processor.example(dataset[i], dataset.folder))
    rows = [examples] if packed else [[e] for e in examples]
    batch = collate(rows, processor, **how)
    B, L = batch.tokens.shape
    assert B == (1 if packed else 4)
    assert L == how.get('length', L)
    tokens = batch.tokens.flatten()
    position_ids = batch.position_ids.flatten()
    targets = batch.targets.flatten()
    loss_weights = batch.loss_weights.flatten()
    is_image = tokens == processor.image_pad
    assert batch.visual_index.tolist() == is_image.nonzero()[:, 0].tolist()
    num_pairs = 0
    total_weight = 0.
    start = 0
    for row, e in enumerate(examples):
        if not packed:
            start = row * L
        end = start + len(e.tokens)
        assert tokens[start:end].tolist() == e.tokens
        assert position_ids[start:end].tolist() == e.positions
        assert targets[start:end - 1].tolist() == e.tokens[1:]
        assert loss_weights[start:end].tolist() == pytest.approx(e.weights[1:] + [0])
        for i, branch in enumerate(e.branches):
            num_pairs += sum(b in (0, branch) for b in e.branches[:i + 1])
        total_weight += sum(e.weights)
        start = end
    assert batch.num_pairs == num_pairs
    assert batch.num_tokens == sum(len(e.tokens) for e in examples)
    assert int((batch.document_ids >= 0).sum()) == batch.num_tokens
    assert batch.total_weight == pytest.approx(total_weight)
    assert batch.loss_index.tolist() == loss_weights.nonzero()[:, 0].tolist()
    assert batch.pool_index.max() < batch.patches.shape[0] * batch.patches.shape[1]
    assert torch.equal(batch.patches[1], torch.from_numpy(examples[1].patches[0]))


# -- mixture and loader

@pytest.mark.quick
@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers())
def test_mixture_permute_is_a_permutation(n, key):
    assert sorted(data.permute(i, n, key) for i in range(n)) == list(range(n))


class Fake:
    """A dataset that knows its number of rows and has none."""

    def __init__(self, n, name='fake'):
        self.n = n
        self.rows = n
        self.name = name
        self.folder = Path('.')
        self.cap = None

    def __len__(self):
        return self.n


def take(draws, n):
    return list(itertools.islice(draws, n))


@pytest.mark.quick
def test_mixture_draws_depend_on_seed_and_index_only():
    mixture = Mixture([Fake(100), Fake(7)], [3, 1], seed=5)
    whole = take(mixture.draws(), 9000)
    for start in (1, 4095, 4096, 8200):
        assert take(mixture.draws(start), 50) == whole[start:start + 50]
    other = Mixture([Fake(100), Fake(7)], [3, 1], seed=6)
    assert take(other.draws(), 50) != whole[:50]


@pytest.mark.quick
def test_mixture_draws_follow_rates_and_epochs():
    draws = take(Mixture([Fake(1000), Fake(50)], [9, 1], seed=1).draws(), 100_000)
    counts = np.bincount([d for _, d, _ in draws])
    chi_square = ((counts - [90_000, 10_000]) ** 2 / [90_000, 10_000]).sum()
    assert chi_square < 10.8               # p = 0.001 at one degree of freedom
    rows = [row for _, d, row in draws if d == 1]
    epochs = [rows[i:i + 50] for i in range(0, 500, 50)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 10   # each in an order of its own


@pytest.mark.quick
def test_mixture_rates_of_groups_caps_and_square_roots():
    sizes = {'a': 100, 'b': 400, 'c': 10_000, 'd': 5}
    one_group = {'all': {'rate': 3, 'sets': {'a': {}, 'b': {}, 'c': {}}}}
    rates = data.mixture_rates(one_group, sizes)
    assert rates == pytest.approx({'a': 10 / 130, 'b': 20 / 130, 'c': 100 / 130})
    groups = {
        'x': {'rate': .6, 'sets': {'a': {'factor': 2}, 'c': {'cap': 900}}},
        'd': .3,
        'y': {'rate': .3, 'sets': {'b': {}}},
    }
    rates = data.mixture_rates(groups, sizes)
    assert rates == pytest.approx({'a': .2, 'c': .3, 'd': .25, 'b': .25})


@pytest.mark.quick
@pytest.mark.parametrize('mixture,words', [
    ({'a': .5, 'g': {'rate': 1, 'sets': {'a': {}}}}, "names dataset 'a' twice"),
    ({'g': {'rate': 1, 'sets': {}}}, "['g'] is a group"),
    ({'g': {'sets': {'a': {}}}}, 'is a group'),
    ({'g': {'rate': 1, 'sets': {'a': {'cup': 3}}}}, "option 'cup'"),
])
def test_mixture_error_is_one_line(mixture, words):
    with pytest.raises(UserError) as e:
        data.mixture_sets(mixture)
    assert words in str(e.value)
    assert '\n' not in str(e.value)


def test_mixture_cap_takes_a_fixed_subset(tmp_path):
    for name, n in (('a', 500), ('b', 300)):
        write(tmp_path / name, [json.dumps(talk(str(i))) for i in range(n)])
    mixture = {'g': {'rate': 1, 'sets': {'a': {'cap': 40, 'loss_weight': .5}, 'b': {}}}}
    draws = take(data.open_mixture({'mixture': mixture, 'datasets': {}}, tmp_path, 1).draws(), 2000)
    rows = [row for _, d, row in draws if d == 0]
    assert len(set(rows)) == 40
    assert max(rows) > 250                 # not the first ones
    for start in (0, 40, 80):
        assert len(set(rows[start:start + 40])) == 40
    mixture['gone'] = {'rate': 1, 'sets': {'c': {'size': 1600}}}
    table = mixture_table({'mixture': mixture, 'datasets': {}, 'data_dir': tmp_path}, 1000)
    lines = [line.split() for line in table]
    assert ['a', '40', '6', '13.37%', '134', '3.34'] in lines, table
    assert ['c', '*', '1,600', '40'] in [line[:4] for line in lines]
    assert table[-1].startswith('*')


def test_mixture_loss_weight_and_token_weight(world, two_branches):
    record, folder = two_branches
    write(folder / 'set', [json.dumps(record)])
    (folder / 'a.png').rename(folder / 'set/a.png')

    def weights(**options):
        mixture = data.open_mixture({'mixture': {'g': {'rate': 1, 'sets': {'set': options}}}, 'datasets': {}}, folder)
        processor = make_processor(world, task_weights={'qa': 3.})
        reader = data.ExampleDataset(mixture, processor)
        _, example = reader[(0, 0, 0)]
        return set(example.weights)
    assert weights() == {0., 1., 3.}
    assert weights(loss_weight=.5) == {0., .5, 1.5}
    assert weights(token_weight=.2) == {0., .2}


def test_mixture_memory_with_ten_million_rows():
    """Permutation and draws hold nothing per row; the index is mapped from its file."""
    tracemalloc.start()
    draws = take(Mixture([Fake(10_000_000), Fake(1)], [9, 1], seed=1).draws(), 20_000)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 2 ** 23
    tracemalloc.stop()
    rows = [row for _, d, row in draws if d == 0]
    assert len(set(rows)) == len(rows) > 17_000


@pytest.mark.quick
def test_mixture_error_names_empty_dataset():
    with pytest.raises(UserError, match='nothing has no rows'):
        Mixture([Fake(0, 'nothing')], [1])


def loader(world, bad=None, batch_size=4, **rest):
    sets = [Dataset(world / 'shapes'), Dataset(world / 'shapes_text')]
    if bad:
        sets.append(bad)
    mixture = Mixture(sets, [1] * len(sets), 3)
    return Loader(mixture, make_processor(world), batch_size, **rest)


PACKED = dict(length=512, packed=True, batch_size=2)


def as_stored(state):
    """A loader's state as it comes back from a checkpoint."""
    return json.loads(json.dumps(state))


def last_state(batches):
    """The loader's state after the last of (batch, state), .."""
    _, state = batches[-1]
    return state


def same(a, b):
    """Are two batches equal in every field?"""
    for field in dataclasses.fields(a):
        one = getattr(a, field.name)
        other = getattr(b, field.name)
        equal = torch.equal(one, other) if torch.is_tensor(one) else one == other
        if not equal:
            return False
    return True


def assert_same(expected, got):
    """Two lists of (batch, state) are equal."""
    for (batch, state), (other_batch, other_state) in zip(expected, got, strict=True):
        assert same(batch, other_batch)
        assert state == other_state


def test_loader_workers_and_resume_give_the_same_batches(world):
    plain = take(loader(world), 6)
    assert_same(plain, take(loader(world, num_workers=2), 6))
    assert_same(plain[2:], take(loader(world, state=last_state(plain[:2])), 4))
    assert not same(plain[0][0], plain[1][0])


@pytest.mark.quick
@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(20, 60))
def test_packing_best_fit_is_optimal(lengths, room):
    chosen = data.best_fit(lengths, room)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    totals = []
    for n in range(len(lengths)):
        for others in itertools.combinations(lengths[1:], n):
            totals.append(lengths[0] + sum(others))
    best = max(total for total in totals if total <= room)
    assert sum(lengths[i] for i in chosen) == best


@pytest.mark.quick
def test_packing_fills_rows_and_uses_each_example_once(world):
    batches = take(loader(world, **PACKED), 12)
    filled = []
    num_packed = 0
    for batch, _ in batches:
        assert batch.tokens.shape == (2, 512)
        filled.append(batch.num_tokens / batch.tokens.numel())
        num_packed += len(batch.sources)
    assert np.mean(filled) > .98
    state = last_state(batches)
    assert num_packed + len(state['pool']) == state['draw'] == state['seen']
    oldest = min(draw[0] for draw in state['pool'])
    assert oldest > state['draw'] - 200    # none waits for ever, because the oldest goes first


@pytest.mark.parametrize('stop', [1, 3])
def test_packing_resume_is_bit_exact(world, stop):
    plain = take(loader(world, **PACKED), 6)
    state = as_stored(last_state(plain[:stop]))
    rest = take(loader(world, state=state, num_workers=stop - 1, **PACKED), 6 - stop)
    assert_same(plain[stop:], rest)


def test_loader_reshard_uses_each_row_once(world):
    mixture = loader(world).examples.mixture
    names = [dataset.name for dataset in mixture.datasets]
    seen = Counter()
    states = None
    for n in (3, 2, 1, 4):                 # ranks
        if states is None:
            states = [None] * n
        else:
            states = as_stored(reshard_loader_states(states, n, mixture))
        for i in range(n):
            batches = take(loader(world, state=states[i], rank=i, world_size=n, **PACKED), 3)
            states[i] = last_state(batches)
            for batch, _ in batches:
                seen.update(tuple(row) for row in batch.sources)
    end, = reshard_loader_states(states, 1, mixture)
    seen.update((names[d], row) for _, d, row in end['pool'])
    drawn = take(mixture.draws(), end['draw'])
    assert seen == Counter((names[d], row) for _, d, row in drawn)


def test_bad_rows_are_counted_named_and_limited(world, tmp_path):
    good = json.dumps(talk())
    lines = ['{"broken', json.dumps(talk(images=['gone.png'])), '[]']
    bad = write(tmp_path / 'mine', [good] * 27 + lines)
    problems = []
    batches = take(loader(world, bad, report=problems.append, max_bad_fraction=.5), 40)
    skipped = last_state(batches)['skipped']
    assert skipped.keys() == {'mine: broken JSON', 'mine: missing media', 'mine: schema'}
    assert sum(skipped.values()) <= len(problems)
    file = tmp_path / 'mine' / 'train.jsonl'
    assert {p.row for p in problems} == {f'{file} line {n}' for n in (28, 29, 30)}
    worse = write(tmp_path / 'worse', lines)
    with pytest.raises(UserError, match='more than max_bad_fraction'):
        take(loader(world, worse, max_bad_fraction=.1), 100)


def test_bad_rows_are_counted_after_reshard(world, tmp_path):
    mine = write(tmp_path / 'mine', [json.dumps(talk())] * 7 + ['{"broken'] * 3)
    rest = dict(max_bad_fraction=1., world_size=2)
    fast = last_state(take(loader(world, mine, rank=0, **rest), 30))
    slow = last_state(take(loader(world, mine, rank=1, **rest), 2))
    mixture = loader(world, mine).examples.mixture
    one, = reshard_loader_states([fast, slow], 1, mixture)
    end = last_state(take(loader(world, mine, state=one, max_bad_fraction=1.), 60))
    drawn = take(mixture.draws(), end['draw'])
    assert not end['pool']
    assert sum(end['skipped'].values()) == sum(d == 2 and row >= 7 for _, d, row in drawn)


# -- the inspector

def test_inspector_page_shows_what_the_model_gets(world, tmp_path):
    (tmp_path / 'd').mkdir()
    quarters().save(tmp_path / 'd' / 'a.png')
    write(tmp_path / 'd', [json.dumps(talk('<b>bold</b>', images=['a.png']))] * 3 + ['{"broken'])
    command = [sys.executable, ROOT / 'data.py', ROOT / 'config/demo_stage1.py',
               '--mixture={"d": 1.0}', f'--data_dir={tmp_path}', f'--tokenizer={world}/shapes',
               f'--out_dir={tmp_path}/out']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '<b>bold</b>' in done.stdout
    assert re.search(r'^d +4 ', done.stdout, re.M)
    assert 'skipped d: broken JSON: 50' in done.stdout
    page = (tmp_path / 'out' / 'inspect.html').read_text()
    assert '<b>bold' not in page
    assert 'data:image/png;base64' in page
    assert not re.search(r'(src|href)=["\']http', page)
