"""Files to pixels: what is read right, what is refused, and how."""
import io
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import media  # noqa: E402
from media import BadRow, frame_times, load_image, load_subtitles, load_video, open_media  # noqa: E402


def test_open_media_stays_in_its_folder(tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'secret.txt').write_bytes(b'secret')
    (tmp_path / 'd' / 'link.txt').symlink_to(tmp_path / 'secret.txt')
    (tmp_path / 'd' / 'a.txt').write_bytes(b'fine')
    with tarfile.open(tmp_path / 'd' / 'media-0.tar', 'w') as tar:
        tar.add(tmp_path / 'd' / 'a.txt', 'in/a.txt')
    for path in ('a.txt', 'media-0.tar/in/a.txt'):
        assert open_media(tmp_path / 'd', path).read() == b'fine'
    for path in ('../secret.txt', 'link.txt', str(tmp_path / 'secret.txt')):
        with pytest.raises(BadRow, match='leaves'):
            open_media(tmp_path / 'd', path)
    for path in ('b.txt', 'media-0.tar/b.txt', 'media-1.tar/a.txt'):
        with pytest.raises(BadRow, match='does not exist'):
            open_media(tmp_path / 'd', path)


# -- pictures

def encoded(image, kind='PNG', **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def as_file(image, kind='PNG', **how):
    return io.BytesIO(encoded(image, kind, **how))


def quarters(mode='RGB'):
    """40 x 20: red top left, blue top right, black below."""
    image = Image.new('RGB', (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 10))
    image.paste((0, 0, 255), (20, 0, 40, 10))
    return image.convert(mode)


@pytest.mark.parametrize('kind,mode', [('PNG', 'RGB'), ('PNG', 'RGBA'), ('PNG', 'P'), ('GIF', 'P'), ('JPEG', 'CMYK'),
                                       ('WEBP', 'RGB'), ('TIFF', 'RGB'), ('BMP', 'RGB')])
def test_load_image_converts_every_mode_to_rgb(kind, mode):
    image = load_image(as_file(quarters(mode), kind, **({'quality': 95} if kind == 'JPEG' else {})))
    assert image.mode == 'RGB' and image.size == (40, 20)
    for at, colour in (((5, 5), (255, 0, 0)), ((35, 5), (0, 0, 255)), ((5, 15), (0, 0, 0))):
        assert np.abs(np.array(image.getpixel(at)) - colour).max() < 40


@pytest.mark.parametrize('mode', ['L', 'LA', '1', 'I;16'])
def test_load_image_of_grey_and_16_bit_files(mode):
    grey = Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)) if mode == 'I;16' else \
        Image.new('L', (4, 4), 255 if mode == '1' else 200).convert(mode)
    assert load_image(as_file(grey)).getpixel((1, 1)) == ((255 if mode == '1' else 200),) * 3


def test_load_image_puts_transparency_on_white():
    image = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    for content in (encoded(image), encoded(palette, transparency=0), encoded(palette, 'GIF', transparency=0)):
        assert load_image(io.BytesIO(content)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_load_image_applies_exif_orientation(orientation):
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]    # Pillow's transpose that undoes the tag
    upright = quarters()
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x112] = orientation
    got = load_image(as_file(image, 'PNG', exif=exif))
    assert got.size == upright.size and got.tobytes() == upright.tobytes()


def test_load_image_takes_first_frame_of_animation():
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
    assert load_image(as_file(frames[0], 'GIF', save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def bomb():
    png = bytearray(encoded(Image.new('L', (1, 1))))
    png[16:24] = (60000).to_bytes(4, 'big') * 2            # IHDR says 60,000 x 60,000
    import zlib
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, 'big')
    return bytes(png)


@pytest.mark.parametrize('content,reason', [
    (encoded(quarters(), 'JPEG')[:400], 'unreadable media'), (encoded(quarters())[:60], 'unreadable media'),
    (b'hello', 'unreadable media'), (b'', 'unreadable media'), (bomb(), None), ('gone.png', 'missing media')])
def test_load_image_refuses_bad_files(content, reason):
    with pytest.raises(BadRow) as e:
        load_image(content if isinstance(content, str) else io.BytesIO(content))
    assert e.value.reason == reason or reason is None and e.value.reason in ('too large', 'unreadable media')


# -- videos

def clip(path, times, codec='h264', size=(64, 48), gop=12, frames=None, **options):
    """A video whose frame i is grey 2 x i % 250 (or the given ones), shown at `times` (seconds)."""
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, 'yuv420p', gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, 12000)
        for i, t in enumerate(times):
            image = frames[i] if frames else Image.new('RGB', size, (2 * i % 250,) * 3)
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = round(12000 * t), Fraction(1, 12000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def truth(path, targets, end=None):
    """What a decoder that decodes everything says: [(time, frame)] on the screen at `targets`."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(float((f.pts - (stream.start_time or 0)) * stream.time_base), f.to_ndarray(format='rgb24'))
                  for f in container.decode(stream)]
    frames = [f for f in frames if f[0] >= 0 and (end is None or f[0] <= end)]
    times = [t for t, _ in frames]
    place = sorted({max(0, int(np.searchsorted(times, t + media.TIME_TOLERANCE)) - 1) for t in targets(times[-1])})
    return [frames[i] for i in place]


RATES = {'steady': np.arange(150) / 25, 'film': np.arange(150) * 1001 / 24000,
         'uneven': np.cumsum(np.random.default_rng(0).choice([.02, .04, .3, 1.1], 60)), 'one': np.zeros(1)}


@pytest.mark.parametrize('container,codec,options', [
    ('mp4', 'h264', {}), ('mp4', 'h264', {'bf': '3', 'b-pyramid': 'normal', 'open-gop': '1'}), ('mkv', 'h264', {}),
    ('webm', 'libvpx-vp9', {'cpu-used': '8', 'deadline': 'realtime'}), ('avi', 'mpeg4', {}), ('ts', 'h264', {}), ('mov', 'hevc', {'x265-params': 'log-level=none'})])
@pytest.mark.parametrize('rate', RATES)
def test_load_video_equals_decoding_everything(container, codec, options, rate, tmp_path):
    """Times and pixels are those of a decoder that decodes everything, however many frames are taken, and from where."""
    if container == 'avi' and rate == 'uneven':
        times = np.arange(60) / 25                        # an AVI has one rate
    else:
        times = RATES[rate]
    path = clip(tmp_path / f'a.{container}', times, codec, **options)
    for max_frames, fps, start, end in ((128, 2, 0, None), (5, 2, 0, None), (1000, 100, 0, None), (8, 2, 1.1, 3.), (4, 2, 2.5, None)):
        if start > times[-1]:
            continue
        expected = truth(path, lambda last: start + frame_times(last - start, max_frames, fps), end)
        with open(path, 'rb') as f:
            got_times, frames = load_video(f, max_frames, fps, start, end)
        assert got_times == pytest.approx([max(0, t - start) for t, _ in expected], abs=1e-6)
        for frame, (_, pixels) in zip(frames, expected):
            assert np.abs(np.asarray(frame, int) - pixels).max() <= 2


def test_frame_times_are_evenly_spaced_and_include_the_last_frame():
    assert frame_times(1.7, 128).tolist() == pytest.approx([0, .5, 1, 1.5, 1.7])
    assert frame_times(63.5, 128).tolist() == pytest.approx(np.arange(128) / 2)
    assert frame_times(100, 5).tolist() == [0, 25, 50, 75, 100] and frame_times(0, 128).tolist() == [0]


def test_load_video_decodes_only_groups_of_pictures_with_a_requested_frame(tmp_path, monkeypatch):
    path = clip(tmp_path / 'a.mp4', np.arange(600) / 10, gop=20)
    fed = []
    decode = media.Video.decode
    monkeypatch.setattr(media.Video, 'decode', lambda self, packets, wanted: fed.extend(packets) or decode(self, packets, wanted))
    times, _ = load_video(open(path, 'rb'), 3)
    assert times == pytest.approx([0, 29.9, 59.9]) and len(fed) <= 3 * 22


def clip_of_quarters(tmp_path):
    return clip(tmp_path / 'a.mp4', np.arange(5) / 5, size=(80, 40), frames=[quarters().resize((80, 40))] * 5)


def test_video_frames_are_resized(tmp_path):
    path = clip_of_quarters(tmp_path)
    _, (frame, *_) = load_video(open(path, 'rb'), 4, size=(40, 20))
    assert frame.size == (40, 20) and np.abs(np.asarray(frame, int) - np.asarray(quarters(), int)).mean() < 12


def test_rotated_video_is_upright(tmp_path):
    path = clip_of_quarters(tmp_path)
    turned = tmp_path / 'b.mp4'
    turned.write_bytes(path.read_bytes().replace(IDENTITY, TURNED))
    upright = np.asarray(quarters().transpose(Image.Transpose.ROTATE_270), int)
    for size in (None, (20, 40)):
        _, (frame, *_) = load_video(open(turned, 'rb'), 4, size=size)
        assert frame.size == ((40, 80) if size is None else (20, 40))
        assert np.abs(np.asarray(frame.resize((20, 40)), int) - upright).mean() < 12


# the matrix in an MP4's track header: no rotation, and 90 degrees clockwise (ISO 14496-12, 8.3.2)
IDENTITY, TURNED = (b''.join(v.to_bytes(4, 'big', signed=True) for v in m) for m in (
    (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30, 80 << 16), (0, 65536, 0, -65536, 0, 0, 40 << 16, 0, 1 << 30, 80 << 16)))


def test_animated_gif_is_read_as_video():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'lime', 'blue')]
    file = as_file(frames[0], 'GIF', save_all=True, append_images=frames[1:], duration=[400, 700, 100])
    times, got = load_video(file, 8)
    assert times.tolist() == pytest.approx([0, .4, 1.1])
    assert [f.getpixel((0, 0)) for f in got] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def bad_videos(folder):
    good = clip(folder / 'good.mp4', np.arange(300) / 10, size=(320, 240), gop=30, frames=[
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (240, 320, 3), np.uint8)) for i in range(300)],
        movflags='faststart').read_bytes()
    with av.open(str(folder / 'sound.mp4'), 'w') as out:
        stream = out.add_stream('aac', rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), 'fltp', 'mono')
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    playlist = f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder}/good.mp4\n#EXT-X-ENDLIST\n'.encode()
    return [(good[:len(good) // 2], 'cut off|can be read'), (good[-len(good) // 2:], 'can be read'), (b'', 'can be read'),
            (b'hello', 'can be read'), ((folder / 'sound.mp4').read_bytes(), 'no video'), (playlist, 'can be read'),
            (encoded(quarters(), 'JPEG'), 'can be read')]


def test_load_video_refuses_bad_files(tmp_path):
    for content, words in bad_videos(tmp_path):
        with pytest.raises(BadRow, match=words) as e:
            load_video(io.BytesIO(content), 8)
        assert e.value.reason == 'unreadable media', content[:20]


def test_slow_video_is_given_up(tmp_path, monkeypatch):
    path = clip(tmp_path / 'a.mp4', np.arange(50) / 10)
    monkeypatch.setattr(media, 'MAX_SECONDS', -1)
    with pytest.raises(BadRow) as e:
        load_video(open(path, 'rb'), 8)
    assert e.value.reason == 'too slow'


def test_clip_beyond_the_end_is_refused(tmp_path):
    with pytest.raises(BadRow, match='starts at 9 s, the last frame is at 4.90 s'):
        load_video(open(clip(tmp_path / 'a.mp4', np.arange(50) / 10), 'rb'), 8, start=9.)


def test_draw_on_video_interpolates_tracks(tmp_path):
    path = clip(tmp_path / 'a.mp4', np.arange(21) / 10, size=(90, 60), frames=[Image.new('RGB', (90, 60))] * 21)
    track = [{'t': t, 'x': x, 'y': .5, 'id': 1} for t, x in ((0., .2), (1., .8), (2., .8))]
    assert media.points_at(track, .5) == [{'id': 1, 'x': .5, 'y': .5}] and media.points_at(track, 9.) == []
    media.draw_on_video(open(path, 'rb'), track, tmp_path / 'b.mp4')
    times, frames = load_video(open(tmp_path / 'b.mp4', 'rb'), 5)
    assert times == pytest.approx([0, .5, 1, 1.5, 2])
    for frame, x in zip(frames, (.2, .5, .8, .8, .8)):
        bright = np.argwhere(np.asarray(frame)[..., 0] > 150)[:, 1]
        assert abs(np.median(bright) / 90 - x) < .1


# -- damage

@st.composite
def damaged(draw, contents):
    """A file with bytes changed, taken out, or put in, or cut off."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        at, n = draw(st.integers(0, len(content))), draw(st.integers(1, 40))
        junk = draw(st.binary(min_size=n, max_size=n)) if draw(st.booleans()) else bytes(n)
        content[at:at + draw(st.sampled_from([0, n, n, n, len(content)]))] = junk
    return bytes(content)


PICTURES = [encoded(quarters(), kind) for kind in ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF')]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged(PICTURES))
def test_damaged_picture_is_read_or_refused(content):
    try:
        assert load_image(io.BytesIO(content)).mode == 'RGB'
    except BadRow as e:
        assert str(e) and e.reason in ('unreadable media', 'too large')


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('videos')
    kinds = (('mp4', 'h264'), ('mkv', 'h264'), ('avi', 'mpeg4'), ('ts', 'h264'), ('webm', 'libvpx-vp9'))
    files = [clip(folder / f'a.{kind}', np.arange(30) / 10, codec, size=(32, 32)).read_bytes() for kind, codec in kinds]
    return files + [as_file(quarters(), 'GIF', save_all=True, append_images=[quarters().rotate(180)]).getvalue()]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_video_is_read_or_refused(videos, data):
    try:
        times, frames = load_video(io.BytesIO(data.draw(damaged(videos))), 4)
        assert 0 < len(times) == len(frames) <= 4 and (np.diff(times) > 0).all()
    except BadRow as e:
        assert str(e) and '\n' not in str(e)


# -- subtitles

SRT = '1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>One</i> two\r\n\r\n2\r\n00:01:03,000 --> 00:01:04,000\r\nNa\u00efve\r\n42\r\n'
VTT = 'WEBVTT\n\n00:01.000 --> 00:02.500 align:start\nOne <c>two</c>\n\n01:03.000 --> 01:04.000\nNa\u00efve\n42\n'


@pytest.mark.parametrize('text', [SRT.encode(), VTT.encode(), SRT.encode('latin-1'), VTT.encode('utf-16'), b'\xef\xbb\xbf' + SRT.encode()])
def test_load_subtitles_of_every_format_and_encoding(text):
    wanted = [{'start': 1., 'end': 2.5, 'text': 'One two'}, {'start': 63., 'end': 64., 'text': 'Na\u00efve 42'}]
    assert load_subtitles(io.BytesIO(text)) == load_subtitles(wanted) == wanted
    assert load_subtitles(wanted, 2., 60.) == [{'start': 0., 'end': .5, 'text': 'One two'}]


def test_rolling_captions_are_not_repeated():
    text = 'WEBVTT\n\n00:01.000 --> 00:02.000\nyeah\n\n00:02.000 --> 00:03.000\nyeah\n<c>what</c>\n'
    assert [c['text'] for c in media.parse_subtitles(text)] == ['yeah', 'what']


@given(st.text(alphabet='0123456789:,.-> \n<i>WEBVT') | st.text())
def test_parse_subtitles_accepts_any_text(text):
    assert all(c['text'] for c in media.parse_subtitles(text))


@pytest.mark.parametrize('source', [b'no cue here', b'\x00\xff' * 99, [{'start': 1}], [{'start': 'a', 'end': 2, 'text': ''}], ['x']])
def test_load_subtitles_refuses_bad_files(source):
    with pytest.raises(BadRow) as e:
        load_subtitles(io.BytesIO(source) if isinstance(source, bytes) else source)
    assert e.value.reason == 'bad subtitles'
