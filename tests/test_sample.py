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
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '10', '--num_clocks', '5',
                    '--num_text', '5', '--num_clips', '8', '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
    processor = data.Processor(out / 'shapes', 32, 8, 1, 512, point_digits=2)
    vlm = m.VLM(m.make_config(dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, image_size=32,
                                   patch_size=8, feature_layers=(-1,)),
                              dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                                   head_dim=16, vocab_size=processor.tokenizer.get_vocab_size()),
                              pooling=1, **processor.token_ids()))
    vlm.init_weights()
    torch.nn.init.normal_(vlm.language_model.layers[0].mlp.down_proj.weight,   # small weights repeat the last token
                          generator=torch.Generator().manual_seed(4))
    save_model(vlm, out / 'checkpoint')
    processor.save(out / 'checkpoint')
    for name, colour in (('a', 'red'), ('b', 'blue')):
        Image.new('RGB', (120, 60), colour).save(out / f'{name}.png')
    return out / 'checkpoint'


def run(*args, cwd=None):
    return subprocess.run([sys.executable, str(ROOT / 'sample.py'), *map(str, args), '--threads=1'], cwd=cwd,
                          capture_output=True, text=True)


@pytest.fixture
def ask(checkpoint, monkeypatch, capsys):
    """sample.py with settings, without a process of its own -> what it prints."""
    monkeypatch.chdir(checkpoint.parent)

    def said(**settings):
        with monkeypatch.context() as patch:
            for name, value in {'checkpoint': str(checkpoint), 'max_new_tokens': 6, **settings}.items():
                patch.setattr(sample, name, value)
            sample.main()
        return capsys.readouterr().out
    return said


@pytest.mark.parametrize('images', [[], ['a.png'], ['a.png', 'b.png']])
def test_none_one_and_two_pictures(ask, images):
    how = dict(prompt='What is <|image_pad|> here?', image=','.join(images))
    one, two = ask(**how), ask(**how)
    assert one == two and one.strip()
    hot = [ask(**how, temperature=2., seed=s) for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def scripted(monkeypatch, processor, answer):
    """A model that says `answer`."""
    ids = processor.encode(answer) + [processor.im_end]
    monkeypatch.setattr(sample, 'generate', lambda self, batch, *_, **how: iter(torch.tensor([[i] for i in ids])))


def test_points_are_printed_and_drawn(checkpoint, monkeypatch, capsys, tmp_path):
    scripted(monkeypatch, data.Processor(checkpoint.parent / 'shapes', 32, 8, 1), '<point 0.25, 0.50, 1> <point 0.95, 0.50, 2>')
    for name, value in dict(checkpoint=str(checkpoint), image=str(checkpoint.parent / 'a.png'), prompt='Point.',
                            out_dir=str(tmp_path)).items():
        monkeypatch.setattr(sample, name, value)
    sample.main()
    printed = capsys.readouterr().out
    assert 'a.png: 1 at (0.250, 0.500), pixel (30, 30)' in printed and 'a.points.png' in printed
    drawn = Image.open(tmp_path / 'a.points.png')
    assert drawn.size == (360, 180) and drawn.getpixel((90, 90)) == drawn.getpixel((342, 90)) == (255, 0, 255)
    assert drawn.getpixel((60, 5)) == (255, 0, 0)


def test_points_go_to_their_picture(checkpoint, monkeypatch, tmp_path):
    scripted(monkeypatch, data.Processor(checkpoint.parent / 'shapes', 32, 8, 1), '<point 2, 0.25, 0.50, 1>')
    files = [str(checkpoint.parent / f'{n}.png') for n in 'ab']
    for name, value in dict(checkpoint=str(checkpoint), image=','.join(files), prompt='Point.', out_dir=str(tmp_path)).items():
        monkeypatch.setattr(sample, name, value)
    sample.main()
    assert [p.name for p in tmp_path.iterdir()] == ['b.points.png']


def test_a_video_with_subtitles(checkpoint, ask):
    media = checkpoint.parent / 'clips' / 'media'
    (media / 'a.srt').write_text('00:00:00,000 --> 00:00:01,000\nHello\n')
    how = dict(video=str(media / 'train-000000.mp4'), subtitles='a.srt', prompt='What?')
    assert ask(**how) == ask(**how) and ask(**how, end=1.).strip()


def test_a_track_is_printed_and_drawn(checkpoint, monkeypatch, capsys, tmp_path):
    scripted(monkeypatch, data.Processor(checkpoint.parent / 'shapes', 32, 8, 1), '<point 0.0, 0.25, 0.50, 1> <point 1.0, 0.75, 0.50, 1>')
    clip = checkpoint.parent / 'clips' / 'media' / 'train-000000.mp4'
    for name, value in dict(checkpoint=str(checkpoint), video=str(clip), prompt='Track.', out_dir=str(tmp_path)).items():
        monkeypatch.setattr(sample, name, value)
    sample.main()
    assert '1 at 1.0 s (0.750, 0.500)' in capsys.readouterr().out
    before, after = (load_video(open(path, 'rb'), 1000, 4.)[1] for path in (clip, tmp_path / 'train-000000.points.mp4'))
    assert len(before) == len(after)
    for frame, old, x in ((0, before[0], .25), (2, before[2], .5), (4, before[4], .75)):
        at = (int(x * old.width), old.height // 2)
        assert after[frame].getpixel(at)[0] > 180 and after[frame].getpixel(at)[1] < 100       # magenta, on its way
    assert np.abs(np.asarray(after[-1], int) - np.asarray(before[-1], int)).mean() < 6


def test_letters_stream_whole(checkpoint, monkeypatch):
    processor = data.Processor(checkpoint.parent / 'shapes', 32, 8, 1)
    scripted(monkeypatch, processor, 'naïve 猫 🐱')
    pieces = list(sample.Chat(load_model(checkpoint), processor).ask('Hello?'))
    assert ''.join(pieces) == 'naïve 猫 🐱' and len(pieces) > 4 and not any('\ufffd' in p for p in pieces)


def test_a_conversation_is_encoded_once(checkpoint, monkeypatch):
    """Turn after turn the answers are those of everything encoded anew, and no token is encoded twice but those at the
    seams; a picture that joins is seen with all before it."""
    model, processor, _ = load_checkpoint(checkpoint)
    monkeypatch.setattr(sample, 'max_new_tokens', 12)
    encoded, forward = [], m.Decoder.forward
    monkeypatch.setattr(m.Decoder, 'forward', lambda self, x, *a, **k: encoded.append(x.shape[1]) or forward(self, x, *a, **k))
    chat, fresh = (sample.Chat(model, processor, repetition_penalty=1.3) for _ in range(2))
    sizes = []
    for turn, text in enumerate(('What is this?', 'And the colour?', 'Now?', 'Are you sure?')):
        for c in (chat, fresh):
            if turn in (0, 2):
                c.show(images=[Image.new('RGB', (40, 30), ('red', '', 'blue')[turn])])
        encoded.clear()
        said = ''.join(chat.ask(text))
        sizes.append(encoded[0])
        fresh.cached_tokens = []                      # nothing to go on from
        encoded.clear()
        assert said == ''.join(fresh.ask(text)) and said and chat.messages == fresh.messages
        assert turn in (0, 2) and sizes[-1] == encoded[0] or turn in (1, 3) and sizes[-1] < encoded[0] / 2
    assert len(chat.media['images']) == 2
    chat.new()
    assert not chat.messages and not chat.media


def test_chat_and_json_on_the_command_line(checkpoint):
    done = subprocess.run([sys.executable, ROOT / 'sample.py', f'--checkpoint={checkpoint}', '--chat=True', '--max_new_tokens=3', '--threads=1'],
                          input='Hi\n/image a.png b.png\nWhat?\n/image gone.png\n/video a.png\n/what\n/new\n\nHi\n/quit\nnot read\n', capture_output=True,
                          text=True, cwd=checkpoint.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert 'error: gone.png: No such file' in done.stdout and '/quit' in done.stdout and done.stdout.count('> ') >= 8
    one = run(f'--checkpoint={checkpoint}', '--prompt=Hi', '--max_new_tokens=3', '--json_output=True')
    assert sorted(json.loads(one.stdout)) == ['answer', 'points'], one.stdout


@pytest.fixture
def page(checkpoint, monkeypatch):
    """The address of a page whose model says three points in four pieces or more."""
    model, processor, _ = load_checkpoint(checkpoint)
    scripted(monkeypatch, processor, 'There: <point 0.25, 0.50, 1> <point 0.75, 0.50, 2>')
    talking = sample.Chat(model, processor)
    with serve.server(talking, sample.load_media, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'localhost:{running.server_address[1]}', talking
        running.shutdown()


def asked(page, path, body=b'', **headers):
    connection = http.client.HTTPConnection(page)
    connection.request('POST' if path != '/' else 'GET', path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page(page, checkpoint):
    """What the page's script does, without a browser; `make browser-check` has one."""
    page, talking = page
    assert asked(page, '/')[1].startswith('<!doctype html>')
    status, told = asked(page, '/show?name=a.png', (checkpoint.parent / 'a.png').read_bytes())
    assert (status, json.loads(told)) == (200, {'kind': 'image'})
    events = [json.loads(line) for line in asked(page, '/ask', 'Where?'.encode())[1].splitlines()]
    assert ''.join(e['text'] for e in events) == 'There: <point 0.25, 0.50, 1> <point 0.75, 0.50, 2>' and len(events) > 4
    assert [len(e['points']) for e in events if 'points' in e] == [1, 2] and events[-1]['points'][1]['x'] == .75
    assert [m['role'] for m in talking.messages] == ['user', 'assistant'] and len(talking.media['images']) == 1
    clip = next((checkpoint.parent / 'clips/media').glob('*.mp4')).read_bytes()
    assert asked(page, '/show?name=../../clip.MP4', clip) == (200, '{"kind": "video"}') and len(talking.media['clip'][0]) > 1
    status, told = asked(page, '/show?name=text.jpg', b'hello')
    assert status == 400 and 'text.jpg: not a picture' in told
    assert asked(page, '/new')[0] == 200 and not talking.messages and not talking.media
    # other sites, by whatever name they reach this address
    assert asked(page, '/ask', b'x', Origin='http://evil.example')[0] == asked(page, '/ask', b'x', Host='evil.example')[0] == 403
    assert asked(page, '/', Host='evil.example')[0] == 404 and asked(page, '/what', b'x')[0] == 404
    connection = http.client.HTTPConnection(page)
    connection.putrequest('POST', '/show?name=a.png')
    connection.putheader('Content-Length', str(2 ** 40))
    connection.endheaders()
    assert connection.getresponse().status == 403 and not talking.messages


@pytest.mark.parametrize('how,words', [
    (dict(image='gone.png'), 'gone.png: No such file'), (dict(image='text.jpg'), 'text.jpg: not a picture'),
    (dict(video='text.jpg'), 'not a video that can be read'), (dict(video='gone.mp4'), 'gone.mp4: No such file'),
    (dict(video='a', image='b'), 'give --checkpoint'), (dict(checkpoint='nowhere'), 'nowhere')])
def test_mistakes_are_told(checkpoint, ask, how, words):
    (checkpoint.parent / 'text.jpg').write_text('hello')
    with pytest.raises(m.UserError, match=words) as e:
        ask(prompt='x', **how)
    assert '\n' not in str(e.value)


def test_a_mistake_is_one_line(checkpoint):
    done = run(f'--checkpoint={checkpoint}')
    assert done.returncode == 1 and 'give --checkpoint' in done.stderr and done.stderr.count('\n') == 1, done.stderr
