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
    number = st.integers(0, 100)
    return st.lists(st.fixed_dictionaries({'x': number.map(lambda v: v / 100), 'y': number.map(lambda v: v / 100),
                                           'id': st.integers(1, 40), **extra}), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.one_of(some_points(), some_points(t=st.integers(0, 900).map(lambda v: v / 10)), some_points(image=st.integers(0, 3))))
def test_point_syntax_and_back(points):
    assert data.parse_points(data.format_points(points, digits=2)) == points
    assert data.parse_points('Here: ' + data.format_points(points, digits=3) + ' and so on.') == points


@settings(deadline=None)
@given(some_points(t=st.integers(0, 900).map(lambda v: v / 10)))
def test_molmo2_syntax_and_back(points):
    points = list({(p['t'], p['id']): p for p in points}.values())
    key = lambda p: (p['t'], p['id'])  # noqa: E731
    text = data.format_points(points, 'Red Car', 'molmo2', tracks=True)
    assert text.startswith('<tracks coords="') and text.endswith('">red car</tracks>')
    assert sorted(data.parse_points(text), key=key) == sorted(points, key=key)


def test_points_as_the_documents_write_them():
    points = [{'x': .7, 'y': .25, 'id': 2}, {'x': .53, 'y': .21, 'id': 1}]
    assert data.format_points(points, digits=2) == '<point 0.70, 0.25, 2> <point 0.53, 0.21, 1>'
    assert data.format_points(points, 'Dogs', 'molmo2') == '<points coords="1 1 530 210 2 700 250">dogs</points>'
    assert data.format_points([]) == 'There are none.' and data.parse_points('There are none.') == []


@settings(deadline=None)
@given(st.text(alphabet='<point rs=cod"0123456789.,;: >') | st.text())
def test_any_text_parses(text):
    assert all(0 <= p['x'] <= 1 and 0 <= p['y'] <= 1 for p in data.parse_points(text))


# -- files

def write(folder, lines, split='train', end='\n'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{split}.jsonl').write_bytes(end.join(lines).encode())
    return Dataset(folder, split)


def talk(answer='yes', question='Is it?', **rest):
    return {'conversations': [{'task': 'qa', 'messages': [{'role': 'user', 'content': question},
                                                          {'role': 'assistant', 'content': answer}]}], **rest}


def said(*points, **rest):
    return {'messages': [{'role': 'assistant', 'points': {'points': list(points)}}], **rest}


@pytest.mark.parametrize('end', ['\n', '\r\n', '\n\n'])
def test_lines_are_found_and_named(tmp_path, end):
    lines = [json.dumps(talk(f'answer {i} ü')) for i in range(20)]
    dataset = write(tmp_path / 'd', lines, end=end)
    assert len(dataset) == 20 == len(Dataset(tmp_path / 'd'))              # the second reads the index
    for i in (0, 7, 19, 3):
        assert dataset[i]['conversations'][0]['messages'][1]['content'] == f'answer {i} ü'
        assert dataset.where(i).endswith(f'train.jsonl line {i * (2 if end == chr(10) * 2 else 1) + 1}')
    write(tmp_path / 'd', lines[:5])
    assert len(Dataset(tmp_path / 'd')) == 5                               # the index follows the file


def test_a_syntax_error_on_line_712(tmp_path):
    lines = [json.dumps(talk())] * 711 + ['{"images": [}'] + [json.dumps(talk())] * 3
    dataset = write(tmp_path, lines)
    with pytest.raises(BadRow) as e:
        dataset[711]
    assert e.value.reason == 'broken JSON' and dataset.where(711).endswith('line 712') and dataset[712]


@pytest.mark.parametrize('record,reason,words', [
    ([1], 'schema', 'list'), ({'id': 1}, 'schema', 'among its keys: id'), ({'messages': 'hi'}, 'schema', 'a conversation is'),
    ({'messages': [{'role': 'user', 'content': 'hi'}]}, 'no answer', 'assistant'),
    (talk(video='a.mp4', images=['b.png']), 'schema', 'one video or any number of images'),
    (talk(videos=['a.mp4', 'b.mp4']), 'schema', '2 videos'), (talk(images=[{'bytes': 'x'}]), 'schema', 'list of paths'),
    (talk(video='a.mp4', start='soon'), 'schema', "'start' is a number of seconds"), ({'conversations': 'hi'}, 'schema', ''),
    (said({'x': 53, 'y': .1}), 'bad point', 'fractions'), (said({'x': float('nan'), 'y': .1}), 'bad point', 'fractions'),
    (said({'x': .1, 'y': True}), 'bad point', 'fractions'), (said({'x': .1, 'y': .1, 'id': 'a'}), 'bad point', 'whole'),
    (said({'x': .1, 'y': .1}, video='a.mp4'), 'bad point', "second 't'"), (said({'x': .1, 'y': .1, 'image': 2}, images=['a', 'b']), 'bad point', 'one of 2'),
    (said('x'), 'bad point', 'fractions'), ({'messages': [{'role': 'assistant', 'points': [1]}]}, 'schema', 'points are')])
def test_records_that_cannot_be_used_say_why(record, reason, words):
    with pytest.raises(BadRow) as e:
        data.normalise(record)
    assert e.value.reason == reason and words in str(e.value)


def test_the_shape_of_other_trainers():
    record = data.normalise({'messages': [{'role': 'user', 'content': '<image>\nWhat is it?'},
                                          {'role': 'assistant', 'content': 'A cat.'}], 'images': 'cat.jpg'})
    assert record['images'] == ['cat.jpg'] and record['conversations'][0]['messages'][0]['content'] == 'What is it?'
    for theirs in ({'messages': [{'role': 'user', 'content': '<video>What?'}, {'role': 'assistant', 'content': 'A cat.'}], 'videos': ['a.mp4']},
                   {'conversations': [{'from': 'human', 'value': '<video>\nWhat?'}, {'from': 'gpt', 'value': 'A cat.'}], 'video': 'a.mp4'}):
        record = data.normalise(theirs)
        assert record['video'] == 'a.mp4' and record['images'] == []
        assert record['conversations'][0]['messages'] == [{'role': 'user', 'content': 'What?'}, {'role': 'assistant', 'content': 'A cat.'}]


def test_odd_lines(tmp_path):
    lines = [json.dumps(talk('x' * 2 ** 21)), '\0' * 99, '[' * 99999, json.dumps(talk()), '{"a": ' + '9' * 9999 + '}']
    dataset = write(tmp_path, lines)
    assert len(dataset) == 5 and dataset[0] and dataset[3]
    for i in (1, 2, 4):
        with pytest.raises(BadRow) as e:
            dataset[i]
        assert e.value.reason == 'broken JSON'


def test_a_read_only_folder_works_too(tmp_path, monkeypatch):
    write(tmp_path, [json.dumps(talk(str(i))) for i in range(9)])
    (tmp_path / '.train.index').unlink()
    monkeypatch.setattr(Path, 'replace', lambda *_: (_ for _ in ()).throw(PermissionError()))
    dataset = Dataset(tmp_path)
    assert len(dataset) == 9 and dataset[4]['conversations'][0]['messages'][1]['content'] == '4'



words = st.sampled_from(['messages', 'conversations', 'images', 'video', 'videos', 'role', 'content', 'user', 'assistant', 'points',
                         'task', 'x', 'y', 'id', 't', 'image', 'label', 'start', 'end', 'subtitles', 'from', 'value', 'human'])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words | st.sampled_from([.5, 1])
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=5), max_leaves=20)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(record=anything | st.builds(talk, st.text(), images=anything, video=anything, start=anything, subtitles=anything)
       | st.builds(said, anything, anything))
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
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '40', '--num_clocks', '10',
                    '--num_text', '20', '--num_clips', '8', '--num_validation', '10', '--workers', '1'], check=True, capture_output=True)
    return out


def make_processor(world, **rest):
    return Processor(world / 'shapes', **{'image_size': 32, 'patch_size': 8, 'pooling': 2, 'seq_len': 256, 'point_digits': 2, **rest})


@pytest.fixture
def two_branches(world, tmp_path):
    quarters().save(tmp_path / 'a.png')
    record = {'images': ['a.png'], 'conversations': [
        {'task': 'qa', 'messages': [{'role': 'user', 'content': 'What colour?'}, {'role': 'assistant', 'content': 'red'},
                                    {'role': 'user', 'content': 'And <|im_end|>?'}, {'role': 'assistant', 'content': 'blue'}]},
        {'task': 'pointing', 'messages': [{'role': 'user', 'content': 'Point.'}, {'role': 'assistant', 'content': '', 'points': {
            'label': 'x', 'points': [{'x': .25, 'y': .5, 'id': 1}]}}]}]}
    return data.normalise(record), tmp_path


def test_layout_weights_branches_and_positions(world, two_branches):
    processor = make_processor(world, task_weights={'qa': 1.5, 'pointing': 2.})
    e = processor.example(*two_branches)
    text = processor.tokenizer.decode(e.tokens, skip_special_tokens=False)
    assert text == ('<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>'
                    '<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n'
                    '<|im_start|>user\nAnd <|im_end|>?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>'
                    '<|im_start|>user\nPoint.<|im_end|>\n<|im_start|>assistant\n<point 0.25, 0.50, 1><|im_end|>')
    learnt = {w: processor.tokenizer.decode([t for t, x in zip(e.tokens, e.weights) if x == w], skip_special_tokens=False)
              for w in (1.5, 2.)}
    assert learnt == {1.5: 'red<|im_end|>blue<|im_end|>', 2.: '<point 0.25, 0.50, 1><|im_end|>'}
    assert e.tokens.count(processor.im_end) == 6           # the one that the user wrote is text
    assert e.visual_index.tolist() == [1, 2, 3, 4] and e.branches[:6] == [0] * 6 and set(e.branches[6:]) == {1, 2}
    for branch in (1, 2):
        positions = [p for p, b in zip(e.positions, e.branches) if b == branch]
        assert positions == list(range(6, 6 + len(positions)))
    assert {data.TASKS[t] for t, w in zip(e.tasks, e.weights) if w == 2.} == {'pointing'}


def test_length_weighting(world, two_branches):
    e = make_processor(world, length_weighting=True).example(*two_branches)
    answer = [w for w, b in zip(e.weights, e.branches) if b == 2 and w]
    assert answer == pytest.approx([len(answer) ** -.5] * len(answer))


def test_branch_weighting(world, two_branches):
    plain, e = (make_processor(world, branch_weighting=b).example(*two_branches) for b in (False, True))
    assert e.weights == pytest.approx([w * 2 ** -.5 for w in plain.weights])


def test_what_does_not_fit_is_left_out(world, two_branches):
    whole = make_processor(world).example(*two_branches)
    second = whole.branches.count(2)
    assert set(make_processor(world, seq_len=6 + second).example(*two_branches).branches) == {0, 1}
    with pytest.raises(BadRow) as e:
        make_processor(world, seq_len=6 + second - 1).example(*two_branches)
    assert e.value.reason == 'too long'


def test_patches_and_windows_by_loops(world):
    processor = make_processor(world)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    patches = processor.pixels(Image.fromarray(pixels), processor.image_size)
    for n in range(16):
        row, column = divmod(n, 4)
        for i, value in enumerate(patches[n]):
            y, x, channel = i // 24, i // 3 % 8, i % 3
            assert value == pixels[row * 8 + y, column * 8 + x, channel]
    assert processor.window.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_tokenizer_without_a_needed_token(world, tmp_path):
    text = (world / 'shapes' / 'tokenizer.json').read_text().replace('<|image_pad|>', '<|other|>')
    (tmp_path / 'tokenizer.json').write_text(text)
    with pytest.raises(UserError, match=r'lacks <\|image_pad\|>'):
        Processor(tmp_path, 32, 8, 1)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UserError, match='is not a tokenizer'):
        Processor(tmp_path, 32, 8, 1)


@pytest.mark.parametrize('pooling', [1, 2])
def test_transformers_reads_the_processor_of_a_checkpoint(world, tmp_path, pooling):
    processor = make_processor(world, pooling=pooling)
    vlm = m.VLM(m.make_config(dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                                   patch_size=8, feature_layers=(-1,)),
                              dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                                   head_dim=16, vocab_size=1024), pooling=pooling, **processor.token_ids()))
    vlm.init_weights()
    for p in vlm.parameters():
        p.data += .2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    save_model(vlm, tmp_path)
    processor.save(tmp_path)
    again = load_processor(tmp_path, vlm.config)
    assert {k: getattr(again, k) for k in ('image_size', 'pooling', 'resize', 'point_digits')} == \
        {k: getattr(processor, k) for k in ('image_size', 'pooling', 'resize', 'point_digits')}
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for n in range(3):
        content = [{'type': 'image'}] * n + [{'type': 'text', 'text': 'What is it?'}]
        messages = [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': 'A cat.'}, {'role': 'user', 'content': 'Sure?'}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        theirs = theirs.replace('<|image_pad|>', '<|image_pad|>' * len(processor.window))
        plain = [{**x, 'content': 'What is it?' if x['content'] is content else x['content']} for x in messages]
        assert tokenizer(theirs, add_special_tokens=False)['input_ids'] == processor.prompt(plain, images=[picture] * n).tokens
    if pooling == 1:                       # llava: pictures as well
        theirs = hf.AutoProcessor.from_pretrained(tmp_path)
        got = theirs(images=[picture], text='<|vision_start|><|image_pad|><|vision_end|>', return_tensors='pt')
        assert (got['input_ids'] == processor.image_pad).sum() == len(processor.window)
        patches = torch.from_numpy(processor.pixels(picture, processor.image_size)) * vlm.pixel_scale + vlm.pixel_shift
        expected = patches.view(4, 4, 8, 8, 3).permute(4, 0, 2, 1, 3).reshape(3, 32, 32)
        assert (got['pixel_values'][0] - expected).abs().max() < 1e-5
        # a picture of another size, asked about there and here: the same text
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 70, 3), np.uint8))
        text = theirs.apply_chat_template([{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}],
                                          add_generation_prompt=True)
        inputs = theirs(images=[picture], text=text, return_tensors='pt')
        said = hf.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).generate(**inputs, do_sample=False, max_new_tokens=24)
        e = processor.prompt([{'role': 'user', 'content': 'What is it?'}], images=[picture])
        ours = [t.item() for t in generate(vlm.eval(), collate([[e]], processor, length=len(e.tokens)), 24)]
        assert inputs['input_ids'][0].tolist() == e.tokens and said[0, len(e.tokens):].tolist() == ours and len(set(ours)) > 3


# -- videos

def video_record(folder, seconds=6., **rest):
    clip(folder / 'a.mp4', np.arange(seconds * 10 + 1) / 10, size=(32, 32))
    return data.normalise(talk(video='a.mp4', **rest))


def test_layout_of_a_video(world, tmp_path):
    processor = make_processor(world, video_pooling=4, fps=1.)
    record = video_record(tmp_path, 2.5, start=.5, subtitles=[{'start': 1., 'end': 2., 'text': 'Hi <|im_end|>'}])
    e = processor.example(record, tmp_path)
    frame = '<|vision_start|><|video_pad|><|vision_end|>'
    assert processor.tokenizer.decode(e.tokens, skip_special_tokens=False) == (
        f'0.0s{frame}1.0s{frame}2.0s{frame}\nSubtitles:\n0.5s - 1.5s: Hi <|im_end|>'
        '<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>')
    assert e.times == (0., 1., 2.) and e.patches.shape == (3, 16, 192) and e.tokens.count(processor.im_end) == 2
    assert e.pool_index.tolist() == [[16 * i + j for j in range(16)] for i in range(3)]
    assert [e.tokens[i] for i in e.visual_index] == [processor.video_pad] * 3


def test_a_video_gives_up_frames_to_fit(world, tmp_path):
    record = video_record(tmp_path, 8.)
    lengths = []
    for seq_len in (400, 160, 80, 40):
        e = make_processor(world, seq_len=seq_len).example(record, tmp_path)
        lengths.append(len(e.times))
        assert len(e.tokens) <= seq_len and e.times[-1] == 8. or lengths[-1] == 1
    assert lengths[0] == 17 and sorted(set(lengths), reverse=True) == lengths
    with pytest.raises(BadRow) as e:
        make_processor(world, seq_len=20).example(record, tmp_path)
    assert e.value.reason == 'too long'


def test_a_track_is_told_at_the_frames_times(world, tmp_path):
    points = [{'t': t / 2, 'x': t / 20, 'y': .5, 'id': 1} for t in range(13)]
    record = video_record(tmp_path)
    record['conversations'] = [{'task': task, 'messages': [{'role': 'user', 'content': 'Track.'}, {
        'role': 'assistant', 'content': '', 'points': {'points': points}}]} for task in ('tracking', 'pointing')]
    processor = make_processor(world, seq_len=1024, max_frames=3)
    e = processor.example(record, tmp_path)
    told = [data.parse_points(processor.decode([t for t, x in zip(e.tokens, e.branches) if x == b])) for b in (1, 2)]
    assert e.times == (0., 3., 6.) and [p['t'] for p in told[0]] == [0., 3., 6.] and told[1] == [
        {**p, 'x': round(p['x'], 2)} for p in points]


def test_ragged_windows():
    assert data.pooling_windows((3, 3), 2).tolist() == [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    assert data.pooling_windows((27, 27), 3).shape == (81, 9) and data.pooling_windows((27, 27), 2).shape == (196, 4)
    assert data.pooling_windows((4, 4), 3).tolist()[0] == [-1, -1, -1, -1, 0, 1, -1, 4, 5]


@pytest.mark.parametrize('video_size', [32, 16])
def test_pictures_and_frames_in_one_batch(world, tmp_path, two_branches, video_size):
    """Visual tokens of a mixed batch are those of the examples alone, whatever the sizes and the pooling."""
    processor = make_processor(world, seq_len=512, video_size=video_size, video_pooling=1, max_frames=3)
    vlm = m.VLM(m.make_config(dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                                   patch_size=8, feature_layers=(-1,)),
                              dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                                   head_dim=16, vocab_size=1024), pooling=2, **processor.token_ids()))
    vlm.init_weights()
    examples = [processor.example(video_record(tmp_path), tmp_path), processor.example(*two_branches)] * 2
    mixed = collate([examples[:3], examples[3:]], processor)
    assert (mixed.frames is not None) == (video_size == 16)
    seen = torch.zeros(*mixed.tokens.shape, 192 // 6).flatten(0, 1)
    seen = seen.index_copy(0, mixed.visual_index, vlm.encode_images(mixed))
    start = 0
    for i, e in enumerate(examples):
        start = mixed.tokens.shape[1] if i == 3 else start
        alone = collate([[e]], processor)
        here = seen[start:start + len(e.tokens)].index_select(0, alone.visual_index)
        torch.testing.assert_close(here, vlm.encode_images(alone), rtol=1e-5, atol=1e-6)
        start += len(e.tokens)


# -- batches

@pytest.mark.parametrize('how,packed', [({}, False), ({}, True), ({'length': 300}, False)])
def test_collate(world, how, packed):
    processor = make_processor(world)
    datasets = [Dataset(world / 'shapes'), Dataset(world / 'shapes_text')]
    examples = [processor.example(d[i], d.folder) for d in datasets for i in (0, 1)]
    batch = collate([examples] if packed else [[e] for e in examples], processor, **how)
    B, L = batch.tokens.shape
    assert (B, L) == ((1, L) if packed else (4, how.get('length', L)))
    flat = {k: getattr(batch, k).flatten() for k in ('tokens', 'targets', 'loss_weights', 'position_ids', 'document_ids', 'branch_ids')}
    start_of, pairs = lambda b, e: b * L, 0
    if packed:
        start_of = lambda b, e: sum(len(x.tokens) for x in examples[:b])
    assert batch.visual_index.tolist() == (flat['tokens'] == processor.image_pad).nonzero()[:, 0].tolist()
    for b, e in enumerate(examples):
        start, n = start_of(b, e), len(e.tokens)
        assert flat['tokens'][start:start + n].tolist() == e.tokens
        assert flat['position_ids'][start:start + n].tolist() == e.positions
        assert flat['targets'][start:start + n - 1].tolist() == e.tokens[1:]
        assert flat['loss_weights'][start:start + n].tolist() == pytest.approx(e.weights[1:] + [0])
        pairs += sum(i >= j and (e.branches[j] in (0, e.branches[i])) for i in range(n) for j in range(n))
    assert batch.num_pairs == pairs and batch.num_tokens == sum(len(e.tokens) for e in examples)
    assert int((flat['document_ids'] >= 0).sum()) == batch.num_tokens
    assert batch.total_weight == pytest.approx(sum(sum(e.weights) for e in examples))
    assert batch.loss_index.tolist() == flat['loss_weights'].nonzero()[:, 0].tolist()
    assert batch.pool_index.max() < batch.patches.shape[0] * batch.patches.shape[1]
    assert torch.equal(batch.patches[1], torch.from_numpy(examples[1].patches[0]))


# -- mixture and loader

@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers())
def test_permute_is_a_permutation(n, key):
    assert sorted(data.permute(i, n, key) for i in range(n)) == list(range(n))


class Fake:
    def __init__(self, n, name='fake'):
        self.n = self.rows = n
        self.name, self.folder, self.cap = name, Path('.'), None

    def __len__(self):
        return self.n


def take(draws, n):
    return [draw for _, draw in zip(range(n), draws)]


def test_a_draw_depends_on_seed_and_number_alone():
    mixture = Mixture([Fake(100), Fake(7)], [3, 1], seed=5)
    whole = take(mixture.draws(), 9000)
    for start in (1, 4095, 4096, 8200):
        assert take(mixture.draws(start), 50) == whole[start:start + 50]
    assert take(Mixture([Fake(100), Fake(7)], [3, 1], seed=6).draws(), 50) != whole[:50]


def test_rates_and_epochs():
    draws = take(Mixture([Fake(1000), Fake(50)], [9, 1], seed=1).draws(), 100_000)
    counts = np.bincount([d for _, d, _ in draws])
    chi_square = ((counts - [90_000, 10_000]) ** 2 / [90_000, 10_000]).sum()
    assert chi_square < 10.8               # p = 0.001 at one degree of freedom
    rows = [row for _, d, row in draws if d == 1]
    epochs = [rows[i:i + 50] for i in range(0, 500, 50)]
    assert all(sorted(e) == list(range(50)) for e in epochs) and len({tuple(e) for e in epochs}) == 10


def test_groups_caps_and_roots():
    sizes = {'a': 100, 'b': 400, 'c': 10_000, 'd': 5}
    flat = data.mixture_rates({'all': {'rate': 3, 'sets': {n: {} for n in 'abc'}}}, sizes)
    assert flat == pytest.approx({'a': 10 / 130, 'b': 20 / 130, 'c': 100 / 130})
    grouped = {'x': {'rate': .6, 'sets': {'a': {'factor': 2}, 'c': {'cap': 900}}}, 'd': .3, 'y': {'rate': .3, 'sets': {'b': {}}}}
    assert data.mixture_rates(grouped, sizes) == pytest.approx({'a': .2, 'c': .3, 'd': .25, 'b': .25})


@pytest.mark.parametrize('mixture,words', [
    ({'a': .5, 'g': {'rate': 1, 'sets': {'a': {}}}}, "names dataset 'a' twice"), ({'g': {'rate': 1, 'sets': {}}}, "['g'] is a group"),
    ({'g': {'sets': {'a': {}}}}, 'is a group'), ({'g': {'rate': 1, 'sets': {'a': {'cup': 3}}}}, "option 'cup'")])
def test_mistakes_in_a_mixture_are_one_line(mixture, words):
    with pytest.raises(UserError) as e:
        data.mixture_sets(mixture)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_a_cap_takes_some_rows_and_always_the_same(tmp_path):
    for name, n in (('a', 500), ('b', 300)):
        write(tmp_path / name, [json.dumps(talk(str(i))) for i in range(n)])
    mixture = {'g': {'rate': 1, 'sets': {'a': {'cap': 40, 'loss_weight': .5}, 'b': {}}}}
    draws = take(data.open_mixture(mixture, tmp_path, 1).draws(), 2000)
    rows = [row for _, d, row in draws if d == 0]
    assert len(set(rows)) == 40 and max(rows) > 250 and {len(set(rows[i:i + 40])) for i in (0, 40, 80)} == {40}
    table = mixture_table({**mixture, 'gone': {'rate': 1, 'sets': {'c': {'size': 1600}}}}, tmp_path, 1000)
    assert any(line.split() == ['a', '40', '6', '13.37%', '134', '3.34'] for line in table), table
    assert any(line.split()[:4] == ['c', '*', '1,600', '40'] for line in table) and table[-1].startswith('*')


def test_weights_of_a_dataset(world, two_branches):
    record, folder = two_branches
    write(folder / 'set', [json.dumps(record)])
    (folder / 'a.png').rename(folder / 'set/a.png')

    def weights(**options):
        mixture = {'g': {'rate': 1, 'sets': {'set': options}}}
        reader = data.ExampleDataset(data.open_mixture(mixture, folder), make_processor(world, task_weights={'qa': 3.}))
        return set(reader[(0, 0, 0)][1].weights)
    assert weights() == {0., 1., 3.} and weights(loss_weight=.5) == {0., .5, 1.5} and weights(token_weight=.2) == {0., .2}


def test_ten_million_rows_take_no_memory():
    """Permutation and draws hold nothing per row; the index is mapped from its file."""
    tracemalloc.start()
    draws = take(Mixture([Fake(10_000_000), Fake(1)], [9, 1], seed=1).draws(), 20_000)
    assert tracemalloc.get_traced_memory()[1] < 2 ** 23
    tracemalloc.stop()
    assert len({row for _, d, row in draws if d == 0}) == sum(d == 0 for _, d, _ in draws) > 17_000


def test_an_empty_dataset_is_an_error():
    with pytest.raises(UserError, match='nothing has no rows'):
        Mixture([Fake(0, 'nothing')], [1])


def loader(world, bad=None, batch_size=4, **rest):
    sets = [Dataset(world / 'shapes'), Dataset(world / 'shapes_text')] + ([bad] if bad else [])
    return Loader(Mixture(sets, [1] * len(sets), 3), make_processor(world), batch_size, **rest)


def same(a, b):
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(torch.equal(v, w) if torch.is_tensor(v) else v == w for v, w in pairs)


def test_workers_and_resuming_change_nothing(world):
    plain = take(loader(world), 6)
    for other in (take(loader(world, num_workers=2), 6), plain[:2] + take(loader(world, state=plain[1][1]), 4)):
        assert all(same(a, b) and s == t for (a, s), (b, t) in zip(plain, other))
    assert not same(plain[0][0], plain[1][0])


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(20, 60))
def test_best_fit_is_the_best(lengths, room):
    chosen = data.best_fit(lengths, room)
    every = [sum(c) + lengths[0] for n in range(len(lengths)) for c in itertools.combinations(lengths[1:], n)]
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == max(total for total in every if total <= room)


def test_packed_rows_are_full_and_hold_every_example_once(world):
    rows = loader(world, length=512, packed=True, batch_size=2)
    batches = take(rows, 12)
    filled = [b.num_tokens / b.tokens.numel() for b, _ in batches]
    assert all(b.tokens.shape == (2, 512) for b, _ in batches) and np.mean(filled) > .98
    state = batches[-1][1]
    assert sum(len(b.sources) for b, _ in batches) + len(state['pool']) == state['draw'] == state['seen']
    waited = [draw[0] for draw in state['pool']]
    assert min(waited) > state['draw'] - 200               # the oldest goes first: nobody waits for ever


@pytest.mark.parametrize('stop', [1, 3])
def test_packing_resumes_bit_for_bit(world, stop):
    how = dict(length=512, packed=True, batch_size=2)
    plain = take(loader(world, **how), 6)
    rest = take(loader(world, state=json.loads(json.dumps(plain[stop - 1][1])), num_workers=stop - 1, **how), 6 - stop)
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(plain[stop:], rest, strict=True))


def test_other_numbers_of_loaders_go_on_without_losing_or_repeating_a_row(world):
    mixture, states, seen = loader(world).examples.mixture, None, Counter()
    for n in (3, 2, 1, 4):
        states = json.loads(json.dumps(reshard_loader_states(states, n, mixture))) if states else [None] * n
        taken = [take(loader(world, state=state, rank=i, world_size=n, length=512, packed=True, batch_size=2), 3)
                 for i, state in enumerate(states)]
        states = [batches[-1][1] for batches in taken]
        seen.update(tuple(row) for batches in taken for batch, _ in batches for row in batch.sources)
    end, = reshard_loader_states(states, 1, mixture)
    seen.update((mixture.datasets[d].name, row) for _, d, row in end['pool'])
    drawn = itertools.islice(mixture.draws(), end['draw'])
    assert seen == Counter((mixture.datasets[d].name, row) for _, d, row in drawn)


def test_bad_rows_are_counted_named_and_limited(world, tmp_path):
    good, lines = json.dumps(talk()), ['{"broken', json.dumps(talk(images=['gone.png'])), '[]']
    bad, problems = write(tmp_path / 'mine', [good] * 27 + lines), []
    batches = take(loader(world, bad, report=problems.append, max_bad_fraction=.5), 40)
    skipped = batches[-1][1]['skipped']
    assert skipped.keys() == {'mine: broken JSON', 'mine: missing media', 'mine: schema'}
    assert sum(skipped.values()) <= len(problems) and {p.row for p in problems} == {
        f"{tmp_path / 'mine' / 'train.jsonl'} line {n}" for n in (28, 29, 30)}
    with pytest.raises(UserError, match='more than max_bad_fraction'):
        take(loader(world, write(tmp_path / 'worse', lines), max_bad_fraction=.1), 100)


def test_bad_rows_among_those_that_are_dealt_out_are_counted(world, tmp_path):
    mine = write(tmp_path / 'mine', [json.dumps(talk())] * 7 + ['{"broken'] * 3)
    rest = dict(max_bad_fraction=1., world_size=2)
    fast, slow = (take(loader(world, mine, rank=i, **rest), n)[-1][1] for i, n in ((0, 30), (1, 2)))
    mixture = loader(world, mine).examples.mixture
    one, = reshard_loader_states([fast, slow], 1, mixture)
    end = take(loader(world, mine, state=one, max_bad_fraction=1.), 60)[-1][1]
    assert not end['pool'] and sum(end['skipped'].values()) == sum(
        d == 2 and row >= 7 for _, d, row in itertools.islice(mixture.draws(), end['draw']))


# -- the inspector

def test_the_inspector_shows_what_the_model_gets(world, tmp_path):
    (tmp_path / 'd').mkdir()
    quarters().save(tmp_path / 'd' / 'a.png')
    write(tmp_path / 'd', [json.dumps(talk('<b>bold</b>', images=['a.png']))] * 3 + ['{"broken'])
    done = subprocess.run([sys.executable, str(ROOT / 'data.py'), str(ROOT / 'config/demo_stage1.py'), '--mixture={"d": 1.0}',
                           f'--data_dir={tmp_path}', f'--tokenizer={world / "shapes"}', f'--out_dir={tmp_path / "out"}'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '<b>bold</b>' in done.stdout and re.search(r'^d +4 ', done.stdout, re.M) and 'skipped d: broken JSON: 50' in done.stdout
    page = (tmp_path / 'out' / 'inspect.html').read_text()
    assert '<b>bold' not in page and 'data:image/png;base64' in page and not re.search(r'(src|href)=["\']http', page)
