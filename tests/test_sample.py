"""Asking a checkpoint, as a user does."""
import http.client
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model as m  # noqa: E402
from extra.hf import load_checkpoint, load_model, save_model  # noqa: E402
import sample  # noqa: E402
from extra import serve  # noqa: E402
from media import load_video  # noqa: E402


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """An untrained model in the llava layout, with the tokenizer of the shapes world."""
    out = tmp_path_factory.mktemp('sample')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '10',
                    '--num_clocks', '5', '--num_text', '5', '--num_clips', '8',
                    '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
    processor = data.Processor(out / 'shapes', 32, 8, 1, 512, point_digits=2)
    vision = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                  patch_size=8, feature_layers=(-1,))
    language = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                    head_dim=16, vocab_size=processor.tokenizer.get_vocab_size())
    vlm = m.VLM(m.make_config(vision, language, pooling=1, **processor.token_ids()))
    vlm.init_weights()
    # With small weights a model repeats the last token
    torch.nn.init.normal_(vlm.language_model.layers[0].mlp.down_proj.weight,
                          generator=torch.Generator().manual_seed(4))
    save_model(vlm, out / 'checkpoint')
    processor.save(out / 'checkpoint')
    for name, colour in (('a', 'red'), ('b', 'blue')):
        Image.new('RGB', (120, 60), colour).save(out / f'{name}.png')
    return out / 'checkpoint'


def run(*flags, **rest):
    """sample.py in a process of its own."""
    command = [sys.executable, str(ROOT / 'sample.py'), '--threads=1', *flags]
    return subprocess.run(command, capture_output=True, text=True, **rest)


@pytest.fixture
def ask(checkpoint, monkeypatch, capsys):
    """ask(setting=value, ..): what sample.py prints, in this process."""
    monkeypatch.chdir(checkpoint.parent)

    def printed(**settings):
        settings = {'checkpoint': str(checkpoint), 'max_new_tokens': 6, **settings}
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(sample, name, value)
            sample.main()
        return capsys.readouterr().out
    return printed


@pytest.mark.parametrize('images', [[], ['a.png'], ['a.png', 'b.png']])
def test_sample_with_pictures_and_seeds_is_deterministic(ask, images):
    how = dict(prompt='What is <|image_pad|> here?', image=','.join(images))
    one = ask(**how)
    assert one == ask(**how)
    assert one.strip()
    hot = ask(**how, temperature=2., seed=1)
    assert hot == ask(**how, temperature=2., seed=1)
    assert hot != ask(**how, temperature=2., seed=2)


@pytest.fixture
def processor(checkpoint):
    return data.Processor(checkpoint.parent / 'shapes', 32, 8, 1)


def scripted(monkeypatch, processor, answer):
    """Makes every model say `answer`."""
    ids = processor.encode(answer) + [processor.im_end]

    def generate(*_, **__):
        for i in ids:
            yield torch.tensor([i])
    monkeypatch.setattr(sample, 'generate', generate)


def test_sample_prints_and_draws_points(ask, processor, monkeypatch, tmp_path):
    scripted(monkeypatch, processor, '<point 0.25, 0.50, 1> <point 0.95, 0.50, 2>')
    printed = ask(image='a.png', prompt='Point.', out_dir=str(tmp_path))
    assert 'a.png: 1 at (0.250, 0.500), pixel (30, 30)' in printed
    assert 'a.points.png' in printed
    drawn = Image.open(tmp_path / 'a.points.png')
    assert drawn.size == (360, 180)
    assert drawn.getpixel((90, 90)) == drawn.getpixel((342, 90)) == (255, 0, 255)
    assert drawn.getpixel((60, 5)) == (255, 0, 0)


def test_sample_draws_points_on_their_picture(ask, processor, monkeypatch, tmp_path):
    scripted(monkeypatch, processor, '<point 2, 0.25, 0.50, 1>')
    ask(image='a.png,b.png', prompt='Point.', out_dir=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['b.points.png']


def test_sample_video_with_subtitles(checkpoint, ask):
    media = checkpoint.parent / 'clips' / 'media'
    (media / 'a.srt').write_text('00:00:00,000 --> 00:00:01,000\nHello\n')
    how = dict(video=str(media / 'train-000000.mp4'), subtitles='a.srt', prompt='What?')
    assert ask(**how) == ask(**how)
    assert ask(**how, end=1.).strip()


def frames_of(path):
    _, frames = load_video(open(path, 'rb'), 1000, 4.)
    return frames


def test_sample_prints_and_draws_tracks(ask, processor, checkpoint, monkeypatch, tmp_path):
    scripted(monkeypatch, processor, '<point 0.0, 0.25, 0.50, 1> <point 1.0, 0.75, 0.50, 1>')
    clip = checkpoint.parent / 'clips' / 'media' / 'train-000000.mp4'
    printed = ask(video=str(clip), prompt='Track.', out_dir=str(tmp_path))
    assert '1 at 1.0 s (0.750, 0.500)' in printed
    before = frames_of(clip)
    after = frames_of(tmp_path / 'train-000000.points.mp4')
    assert len(before) == len(after)
    for frame, x in ((0, .25), (2, .5), (4, .75)):         # the point is on its way to the right
        width, height = before[frame].size
        red, green, _ = after[frame].getpixel((int(x * width), height // 2))
        assert red > 180
        assert green < 100                 # magenta
    difference = np.asarray(after[-1], int) - np.asarray(before[-1], int)
    assert np.abs(difference).mean() < 6


def test_chat_streams_whole_letters(checkpoint, processor, monkeypatch):
    scripted(monkeypatch, processor, 'naïve 猫 🐱')
    pieces = list(sample.Chat(load_model(checkpoint), processor).ask('Hello?'))
    assert ''.join(pieces) == 'naïve 猫 🐱'
    assert len(pieces) > 4
    assert not any('\ufffd' in piece for piece in pieces)


def test_chat_cache_encodes_each_token_once(checkpoint, monkeypatch):
    """In every turn the answer is that of a chat that encodes everything anew, but fewer tokens are
    encoded. When a picture joins, all before it is encoded again."""
    model, processor, _ = load_checkpoint(checkpoint)
    monkeypatch.setattr(sample, 'max_new_tokens', 12)
    num_encoded = []                       # tokens of each call of the decoder
    forward = m.Decoder.forward

    def counted(self, x, *args, **rest):
        num_encoded.append(x.shape[1])
        return forward(self, x, *args, **rest)
    monkeypatch.setattr(m.Decoder, 'forward', counted)

    def ask(chat, text):
        """(answer, number of tokens that were encoded of the prompt)."""
        num_encoded.clear()
        return ''.join(chat.ask(text)), num_encoded[0]

    chat = sample.Chat(model, processor, repetition_penalty=1.3)
    fresh = sample.Chat(model, processor, repetition_penalty=1.3)
    turns = [
        ('What is this?', 'red'),
        ('And the colour?', ''),
        ('Now?', 'blue'),
        ('Are you sure?', ''),
    ]
    for text, new_picture in turns:
        if new_picture:
            chat.show(images=[Image.new('RGB', (40, 30), new_picture)])
            fresh.show(images=[Image.new('RGB', (40, 30), new_picture)])
        answer, encoded = ask(chat, text)
        fresh.cached_tokens = []           # nothing to go on from
        expected, encoded_anew = ask(fresh, text)
        assert answer == expected
        assert answer
        assert chat.messages == fresh.messages
        if new_picture:
            assert encoded == encoded_anew
        else:
            assert encoded < encoded_anew / 2
    assert len(chat.media['images']) == 2
    chat.new()
    assert not chat.messages
    assert not chat.media


def test_sample_script_chat_and_json_output(checkpoint):
    lines = ['Hi', '/image a.png b.png', 'What?', '/image gone.png', '/video a.png', '/what',
             '/new', '', 'Hi', '/quit', 'not read', '']
    done = run(f'--checkpoint={checkpoint}', '--chat=True', '--max_new_tokens=3',
               input='\n'.join(lines), cwd=checkpoint.parent)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert 'error: gone.png: No such file' in done.stdout
    assert '/quit' in done.stdout
    assert done.stdout.count('> ') >= 8
    done = run(f'--checkpoint={checkpoint}', '--prompt=Hi', '--max_new_tokens=3',
               '--json_output=True')
    assert sorted(json.loads(done.stdout)) == ['answer', 'points'], done.stdout


@pytest.fixture
def page(checkpoint, monkeypatch):
    """(address, Chat) of a page whose model says two points in five pieces or more."""
    model, processor, _ = load_checkpoint(checkpoint)
    scripted(monkeypatch, processor, 'There: <point 0.25, 0.50, 1> <point 0.75, 0.50, 2>')
    chat = sample.Chat(model, processor)
    with serve.server(chat, sample.load_media, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'localhost:{running.server_address[1]}', chat
        running.shutdown()


def request(address, path, body=b'', **headers):
    """(status, text) of the server's response."""
    connection = http.client.HTTPConnection(address)
    method = 'GET' if path == '/' else 'POST'
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_serve_page_requests(page, checkpoint):
    """What the page's script does, without a browser; `make browser-check` has one."""
    address, chat = page
    _, text = request(address, '/')
    assert text.startswith('<!doctype html>')

    picture = (checkpoint.parent / 'a.png').read_bytes()
    status, text = request(address, '/show?name=a.png', picture)
    assert status == 200
    assert json.loads(text) == {'kind': 'image'}

    _, text = request(address, '/ask', b'Where?')
    events = [json.loads(line) for line in text.splitlines()]
    answer = ''.join(event['text'] for event in events)
    assert answer == 'There: <point 0.25, 0.50, 1> <point 0.75, 0.50, 2>'
    assert len(events) > 4
    assert [len(event['points']) for event in events if 'points' in event] == [1, 2]
    assert events[-1]['points'][1]['x'] == .75
    assert [message['role'] for message in chat.messages] == ['user', 'assistant']
    assert len(chat.media['images']) == 1

    clip = next((checkpoint.parent / 'clips/media').glob('*.mp4')).read_bytes()
    assert request(address, '/show?name=../../clip.MP4', clip) == (200, '{"kind": "video"}')
    times, _ = chat.media['clip']
    assert len(times) > 1
    status, text = request(address, '/show?name=text.jpg', b'hello')
    assert status == 400
    assert 'text.jpg: not a picture' in text
    status, _ = request(address, '/new')
    assert status == 200
    assert not chat.messages
    assert not chat.media

    # Other sites, by whatever name they reach this address
    status, _ = request(address, '/ask', b'x', Origin='http://evil.example')
    assert status == 403
    status, _ = request(address, '/ask', b'x', Host='evil.example')
    assert status == 403
    status, _ = request(address, '/', Host='evil.example')
    assert status == 404
    status, _ = request(address, '/what', b'x')
    assert status == 404

    connection = http.client.HTTPConnection(address)
    connection.putrequest('POST', '/show?name=a.png')
    connection.putheader('Content-Length', str(2 ** 40))
    connection.endheaders()
    assert connection.getresponse().status == 403
    assert not chat.messages


@pytest.mark.parametrize('how,words', [
    (dict(image='gone.png'), 'gone.png: No such file'),
    (dict(image='text.jpg'), 'text.jpg: not a picture'),
    (dict(video='text.jpg'), 'not a video that can be read'),
    (dict(video='gone.mp4'), 'gone.mp4: No such file'),
    (dict(video='a', image='b'), 'give --checkpoint'),
    (dict(checkpoint='nowhere'), 'nowhere'),
])
def test_sample_error_names_the_cause(checkpoint, ask, how, words):
    (checkpoint.parent / 'text.jpg').write_text('hello')
    with pytest.raises(m.UserError, match=words) as e:
        ask(prompt='x', **how)
    assert '\n' not in str(e.value)


def test_sample_script_error_is_one_line(checkpoint):
    done = run(f'--checkpoint={checkpoint}')
    assert done.returncode == 1
    assert 'give --checkpoint' in done.stderr
    assert done.stderr.count('\n') == 1, done.stderr
