"""From files to batches."""
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings, strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model as m  # noqa: E402
from data import BadRow, Dataset, Loader, Mixture, Processor, collate  # noqa: E402
from model import UserError  # noqa: E402


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
    (talk(video='clip.mp4'), 'video', 'cannot be read yet'),
    ({'messages': [{'role': 'assistant', 'points': {'points': [{'x': 53, 'y': .1}]}}]}, 'bad point', 'fractions')])
def test_records_that_cannot_be_used_say_why(record, reason, words):
    with pytest.raises(BadRow) as e:
        data.normalise(record)
    assert e.value.reason == reason and words in str(e.value)


def test_the_shape_of_other_trainers():
    record = data.normalise({'messages': [{'role': 'user', 'content': '<image>\nWhat is it?'},
                                          {'role': 'assistant', 'content': 'A cat.'}], 'images': 'cat.jpg'})
    assert record['images'] == ['cat.jpg'] and record['conversations'][0]['messages'][0]['content'] == 'What is it?'


def test_media_stay_in_their_folder(tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'secret.txt').write_bytes(b'secret')
    (tmp_path / 'd' / 'link.txt').symlink_to(tmp_path / 'secret.txt')
    (tmp_path / 'd' / 'a.txt').write_bytes(b'fine')
    with tarfile.open(tmp_path / 'd' / 'media-0.tar', 'w') as tar:
        tar.add(tmp_path / 'd' / 'a.txt', 'in/a.txt')
    assert data.open_media(tmp_path / 'd', 'a.txt') == data.open_media(tmp_path / 'd', 'media-0.tar/in/a.txt') == b'fine'
    for path in ('../secret.txt', 'link.txt', str(tmp_path / 'secret.txt')):
        with pytest.raises(BadRow, match='leaves'):
            data.open_media(tmp_path / 'd', path)
    for path in ('b.txt', 'media-0.tar/b.txt', 'media-1.tar/a.txt'):
        with pytest.raises(BadRow, match='does not exist'):
            data.open_media(tmp_path / 'd', path)


# -- pictures

def encoded(image, kind='PNG', **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def quarters(mode='RGB'):
    """40 x 20: red top left, blue top right, black below."""
    image = Image.new('RGB', (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 10))
    image.paste((0, 0, 255), (20, 0, 40, 10))
    return image.convert(mode)


@pytest.mark.parametrize('kind,mode', [('PNG', 'RGB'), ('PNG', 'RGBA'), ('PNG', 'P'), ('GIF', 'P'), ('JPEG', 'CMYK'),
                                       ('WEBP', 'RGB'), ('TIFF', 'RGB'), ('BMP', 'RGB')])
def test_every_mode_is_rgb(kind, mode):
    image = data.load_image(encoded(quarters(mode), kind, **({'quality': 95} if kind == 'JPEG' else {})))
    assert image.mode == 'RGB' and image.size == (40, 20)
    for at, colour in (((5, 5), (255, 0, 0)), ((35, 5), (0, 0, 255)), ((5, 15), (0, 0, 0))):
        assert np.abs(np.array(image.getpixel(at)) - colour).max() < 40


@pytest.mark.parametrize('mode', ['L', 'LA', '1', 'I;16'])
def test_grey_and_deep(mode):
    grey = Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)) if mode == 'I;16' else \
        Image.new('L', (4, 4), 255 if mode == '1' else 200).convert(mode)
    assert data.load_image(encoded(grey)).getpixel((1, 1)) == ((255 if mode == '1' else 200),) * 3


def test_transparency_is_white():
    image = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    for content in (encoded(image), encoded(palette, transparency=0), encoded(palette, 'GIF', transparency=0)):
        assert data.load_image(content).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation):
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]    # Pillow's transpose that undoes the tag
    upright = quarters()
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x112] = orientation
    got = data.load_image(encoded(image, 'PNG', exif=exif))
    assert got.size == upright.size and got.tobytes() == upright.tobytes()


def test_first_frame_of_an_animation():
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
    assert data.load_image(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def bomb():
    png = bytearray(encoded(Image.new('L', (1, 1))))
    png[16:24] = (60000).to_bytes(4, 'big') * 2            # IHDR says 60,000 x 60,000
    import zlib
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, 'big')
    return bytes(png)


@pytest.mark.parametrize('content,reason', [
    (encoded(quarters(), 'JPEG')[:400], 'unreadable media'), (encoded(quarters())[:60], 'unreadable media'),
    (b'hello', 'unreadable media'), (b'', 'unreadable media'), (bomb(), None), ('gone.png', 'missing media')])
def test_bad_pictures(content, reason):
    with pytest.raises(BadRow) as e:
        data.load_image(content)
    assert e.value.reason == reason or reason is None and e.value.reason in ('too large', 'unreadable media')


# -- examples

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp('world')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '40', '--num_clocks', '10',
                    '--num_text', '20', '--num_validation', '10', '--workers', '1'], check=True, capture_output=True)
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
    patches = processor.pixels(Image.fromarray(pixels))
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
    m.save_model(vlm, tmp_path)
    processor.save(tmp_path)
    again = Processor.load(tmp_path, vlm.config)
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
        assert tokenizer(theirs, add_special_tokens=False)['input_ids'] == processor.prompt([picture] * n, plain).tokens
    if pooling == 1:                       # llava: pictures as well
        theirs = hf.AutoProcessor.from_pretrained(tmp_path)
        got = theirs(images=[picture], text='<|vision_start|><|image_pad|><|vision_end|>', return_tensors='pt')
        assert (got['input_ids'] == processor.image_pad).sum() == len(processor.window)
        patches = torch.from_numpy(processor.pixels(picture)) * vlm.pixel_scale + vlm.pixel_shift
        expected = patches.view(4, 4, 8, 8, 3).permute(4, 0, 2, 1, 3).reshape(3, 32, 32)
        assert (got['pixel_values'][0] - expected).abs().max() < 1e-5


# -- batches

@pytest.mark.parametrize('how', [{}, {'left': True}, {'packed': True}, {'length': 300}])
def test_collate(world, how):
    processor = make_processor(world)
    datasets = [Dataset(world / 'shapes'), Dataset(world / 'shapes_text')]
    examples = [processor.example(d[i], d.folder) for d in datasets for i in (0, 1)]
    batch = collate(examples, processor, **how)
    B, L = batch['tokens'].shape
    assert (B, L) == ((1, L) if 'packed' in how else (4, how.get('length', L)))
    flat = {k: batch[k].flatten() for k in ('tokens', 'targets', 'loss_weights', 'position_ids', 'document_ids', 'branch_ids')}
    starts = {'left': lambda b, e: (b + 1) * L - len(e.tokens), 'packed': lambda b, e: sum(len(x.tokens) for x in examples[:b])}
    start_of, pairs = next((starts[k] for k in how if k in starts), lambda b, e: b * L), 0
    assert batch['visual_index'].tolist() == (flat['tokens'] == processor.image_pad).nonzero()[:, 0].tolist()
    for b, e in enumerate(examples):
        start, n = start_of(b, e), len(e.tokens)
        assert flat['tokens'][start:start + n].tolist() == e.tokens
        assert flat['position_ids'][start:start + n].tolist() == e.positions
        assert flat['targets'][start:start + n - 1].tolist() == e.tokens[1:]
        assert flat['loss_weights'][start:start + n].tolist() == pytest.approx(e.weights[1:] + [0])
        pairs += sum(i >= j and (e.branches[j] in (0, e.branches[i])) for i in range(n) for j in range(n))
    assert batch['n_pairs'] == pairs and batch['n_tokens'] == sum(len(e.tokens) for e in examples)
    assert int((flat['document_ids'] >= 0).sum()) == batch['n_tokens']
    assert batch['total_weight'] == pytest.approx(sum(sum(e.weights) for e in examples))
    assert batch['loss_index'].tolist() == flat['loss_weights'].nonzero()[:, 0].tolist()
    assert batch['pool_index'].max() < batch['patches'].shape[0] * batch['patches'].shape[1]
    assert torch.equal(batch['patches'][1], torch.from_numpy(examples[1].patches[0]))


# -- mixture and loader

@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers())
def test_permute_is_a_permutation(n, key):
    assert sorted(data.permute(i, n, key) for i in range(n)) == list(range(n))


class Fake:
    def __init__(self, n, name='fake'):
        self.n, self.name, self.folder = n, name, Path('.')

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


def test_an_empty_dataset_is_an_error():
    with pytest.raises(UserError, match='nothing has no rows'):
        Mixture([Fake(0, 'nothing')], [1])


def loader(world, bad=None, **rest):
    sets = [Dataset(world / 'shapes'), Dataset(world / 'shapes_text')] + ([bad] if bad else [])
    return Loader(Mixture(sets, [1] * len(sets), 3), make_processor(world), 4, **rest)


def same(a, b):
    return all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def test_workers_and_resuming_change_nothing(world):
    plain = take(loader(world), 6)
    for other in (take(loader(world, num_workers=2), 6), plain[:2] + take(loader(world, state=plain[1][1]), 4)):
        assert all(same(a, b) and s == t for (a, s), (b, t) in zip(plain, other))
    assert not same(plain[0][0], plain[1][0])


def test_bad_rows_are_counted_named_and_limited(world, tmp_path):
    good, lines = json.dumps(talk()), ['{"broken', json.dumps(talk(images=['gone.png'])), '[]']
    bad, problems = write(tmp_path / 'mine', [good] * 27 + lines), []
    batches = take(loader(world, bad, report=problems.append, max_bad_fraction=.5), 40)
    skipped = batches[-1][1]['skipped']
    assert skipped.keys() == {'mine: broken JSON', 'mine: missing media', 'mine: schema'}
    assert sum(skipped.values()) <= len(problems) and {p['row'] for p in problems} == {
        f"{tmp_path / 'mine' / 'train.jsonl'} line {n}" for n in (28, 29, 30)}
    with pytest.raises(UserError, match='more than max_bad_fraction'):
        take(loader(world, write(tmp_path / 'worse', lines), max_bad_fraction=.1), 100)


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
