"""Files to pixels and back: pictures, videos and subtitles of a dataset's folder, points drawn for people to look at.

    file = open_media('data/pets', 'media-0.tar/7.jpg')    a file of the folder, or a member of an uncompressed tar
    image = load_image(file)                               upright RGB
    times, frames = load_video(file, max_frames=128)       2 a second and the last one, only these are converted

Whatever cannot be read raises BadRow, which says why in one line. Nothing here trusts a file: paths stay in their
folder, sizes are asked before memory is taken, a video that takes too long is given up.
"""
import base64
import html
import io
import re
import stat
import tarfile
import time
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from configurator import UserError

MAX_PIXELS = 100_000_000                     # a larger picture is a decompression bomb or a mistake
MAX_SECONDS = 60                             # to read one video in
MAX_GROUP = 2 ** 28                          # bytes between two keyframes
MAX_TEXT = 2 ** 24                           # bytes of a subtitle file
SMALL_FILE = 2 ** 22                         # bytes that are read at once
NEAR = 1.7e-3                                # seconds: at 23.976 frames a second the one of 0.5 s is at 0.5005
VIDEO_FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc'


class BadRow(ValueError):
    """A row that cannot be used. `reason` is a short category for the count, the message says what is wrong."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------------------
# Files

class Part(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, path, start, size):
        self.file, self.start, self.size, self.at = open(path, 'rb'), start, size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = max(0, (0, self.at, self.size)[whence] + offset)
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        self.file.seek(self.start + self.at)
        data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[:len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self):
        self.file.close()
        super().close()


@lru_cache(maxsize=64)
def _tar_index(path):
    """name -> (start, size) of the files in an uncompressed tar, up to where it is damaged."""
    members = {}
    with tarfile.open(path, 'r:') as tar:
        try:
            members.update((m.name, (m.offset_data, m.size)) for m in tar if m.isreg() and not m.issparse())
        except tarfile.TarError:
            pass
    return members


_resolve = lru_cache(maxsize=64)(Path.resolve)


def open_media(folder, path):
    """A media file inside `folder`, opened: a file, or a member of an uncompressed tar (`media-0.tar/7.jpg`)."""
    folder = _resolve(Path(folder))
    head, tar, member = str(path).partition('.tar/')
    try:
        file = (folder / (f'{head}.tar' if tar else path)).resolve()
        if not file.is_relative_to(folder):
            raise BadRow('outside', f"'{path}' leaves the dataset's folder")
        if tar:
            return io.BufferedReader(Part(file, *_tar_index(file)[member]))
        if stat.S_ISREG((status := file.stat()).st_mode):     # a pipe would wait for ever
            # A small file whole: containers are read to and fro
            return io.BytesIO(file.read_bytes()) if status.st_size <= SMALL_FILE else open(file, 'rb')
    except BadRow:
        raise
    except (OSError, KeyError, ValueError, tarfile.TarError):     # ValueError: a NUL in the path
        pass
    raise BadRow('missing media', f'{str(path)[:200]!r} does not exist in {folder.name}/')


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def check_size(width, height, what):
    if width * height > MAX_PIXELS:
        raise BadRow('too large', f'{what} of {width} x {height} pixels (limit {MAX_PIXELS:,})')


def load_image(source):
    """A file or a path -> upright 8-bit RGB: EXIF turned, transparency on white, 16 bits scaled, first frame."""
    try:
        image = Image.open(source)
        check_size(*image.size, 'a picture')
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return _on_white(image)
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow('missing media', f'{source} does not exist') from None
    except UnidentifiedImageError:
        raise BadRow('unreadable media', 'not a picture, whatever its name says') from None
    except Exception as e:                   # a damaged file makes a decoder raise whatever comes to hand
        raise BadRow('unreadable media', f'a damaged picture ({e or type(e).__name__})') from None


def _on_white(image):
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


# ---------------------------------------------------------------------------------------------------------------------
# Videos

def pyav():
    """PyAV, which reads and writes videos. It is imported when the first video is opened, because a machine without it
    can still train on pictures and text."""
    try:
        import av
    except ImportError as e:
        raise UserError(f"videos need PyAV, which cannot be imported here ({e}): pip install av, "
                        f"or leave data sets with videos out of the mixture") from None
    return av


def frame_times(last, max_frames, fps=2.):
    """Seconds of the frames to take from a clip whose last frame is at `last`: `fps` a second and the last one, or
    `max_frames` evenly spaced when that were more (allenai/molmo2 video_loader.py, uniform_last_frame)."""
    if last * fps > max_frames - 1:
        return np.linspace(0, last, max_frames)
    return np.append(np.arange(0, last, 1 / fps), last)


def check_time(deadline):
    if time.monotonic() > deadline:
        raise BadRow('too slow', f'not read in {MAX_SECONDS} seconds')


class Video:
    """A video file as groups of packets: a keyframe and what depends on it, up to the next keyframe. Times are seconds
    from its first frame. To read packets costs little, to decode them much, so only groups with a wanted frame are
    decoded, and in them not the frames that no other frame needs."""

    def __init__(self, file, threads=1):
        self.av = pyav()
        self.file, self.threads, self.deadline = file, threads, time.monotonic() + MAX_SECONDS
        self.origin, self.container, self.seekable = None, None, None
        # Made once, because its tables cost more than a small frame
        self.reformatter = self.av.video.reformatter.VideoReformatter()
        self.rewind()
        self.duration = float((self.stream.duration or 0) * self.stream.time_base)

    def rewind(self, seconds=0.):
        """Reads on from the keyframe before `seconds`, or from the start where a container has no index to seek by."""
        if self.container is None or not self.seekable:
            self.file.seek(0)
            # Not formats that name other files (playlists). Sizes are checked before a decoder allocates.
            self.container = self.av.open(self.file, options={'format_whitelist': VIDEO_FORMATS}, metadata_errors='replace')
            if self.seekable is None:
                self.seekable = self.container.format.name.startswith(('mov', 'matroska'))
            cover = self.av.stream.Disposition.attached_pic
            self.stream = next((s for s in self.container.streams.video if not s.disposition & cover), None)
            if self.stream is None:
                raise BadRow('unreadable media', 'no video in it')
            context, self.step = self.stream.codec_context, float(self.stream.time_base)
            check_size(context.width, context.height, 'frames')
            context.options = {'max_pixels': str(MAX_PIXELS)}
            context.thread_count = self.threads
            context.open()                   # before skip_frame is set: dav1d keeps what it was then
            self.origin = self.stream.start_time if self.origin is None else self.origin
        if self.seekable:
            self.container.seek((self.origin or 0) + int(seconds / self.step), stream=self.stream)
        self.packets, self.ahead = self.container.demux(self.stream), []

    def time(self, x):
        """Of a packet or a frame. Old containers do not say when a packet is shown, only when it is decoded."""
        ticks = x.dts if x.pts is None else x.pts
        self.origin = ticks if self.origin is None else self.origin
        return (ticks - self.origin) * self.step

    def group(self):
        """(packets, the times they are shown at, where the next group starts). The packets go on with the next keyframe
        and those that are shown before it although they are decoded after it."""
        packets, self.ahead, size = self.ahead, [], 0
        for packet in self.packets:
            check_time(self.deadline)
            if not packet.size or packet.dts is None and packet.pts is None:
                continue
            if self.ahead:
                self.ahead.append(packet)
                if self.time(packet) > self.time(self.ahead[0]):
                    break
            elif packet.is_keyframe and packets:
                self.ahead = [packet]
            else:
                packets.append(packet)
                if (size := size + packet.size) > MAX_GROUP:
                    raise BadRow('too large', f'more than {MAX_GROUP:,} bytes without a keyframe')
        if not packets:
            return [], [], np.inf
        first, end = max(0., self.time(packets[0])), self.time(self.ahead[0]) if self.ahead else np.inf
        packets = packets + self.ahead
        return packets, sorted(t for t in map(self.time, packets) if first <= t < end), end

    def decode(self, packets, wanted):
        """Yields the frames shown at the times `wanted`, in order."""
        context, wanted = self.stream.codec_context, {round(t / self.step) for t in wanted}
        context.flush_buffers()
        for packet in [*packets, None]:      # None: what the decoder still holds
            check_time(self.deadline)
            if packet is not None:
                context.skip_frame = 'DEFAULT' if round(self.time(packet) / self.step) in wanted else 'NONREF'
            try:
                frames = context.decode(packet)
            except self.av.error.InvalidDataError:     # a damaged packet; what does not depend on it is fine
                continue
            for frame in frames:
                if (tick := round(self.time(frame) / self.step)) in wanted:
                    wanted.remove(tick)
                    yield frame
            if not wanted:
                return

    def picture(self, frame, size=None):
        """A decoded frame in RGB, turned as its metadata says; size (width, height) resizes it in one go."""
        width, height = size or (frame.width, frame.height)
        if size and frame.rotation % 180:
            width, height = height, width
        small = self.reformatter.reformat(frame, width, height, 'rgb24', interpolation='BICUBIC', threads=self.threads)
        return Image.fromarray(np.rot90(small.to_ndarray(), frame.rotation // 90))

    def last(self, end=np.inf):
        """When the last frame is shown that is not after `end`."""
        last, start = None, min(end, self.duration)
        while last is None:
            self.rewind(start)
            while True:
                packets, times, following = self.group()
                last = max((t for t in times if t <= end), default=last)
                if not packets or following > end:
                    break
            if last is None and start == 0:
                raise BadRow('unreadable media', 'no frame in it')
            start = 0                        # an index that promises more than there is: read all
        return last


def load_video(file, max_frames, fps=2., start=0., end=None, size=None, threads=1):
    """A clip from `start` to `end` seconds of an open video file (or an animated GIF or WebP)
    -> (times [n] in seconds from `start`, n upright RGB pictures), as `frame_times` says; each frame once.

    A time is that of the frame on the screen then, from its own timestamp. size (width, height): resized frames.
    """
    try:
        if re.match(rb'GIF8|RIFF....WEBP|\x89PNG', _head(file), re.S):
            return _animation(file, max_frames, fps, start, end, size)
        video = Video(file, threads)
        last = video.last(np.inf if end is None else end)
        if end is None and last < .9 * video.duration - 1:
            raise BadRow('unreadable media', f'cut off: {last:.1f} of {video.duration:.1f} seconds are there')
        targets = _targets(last, max_frames, fps, start)
        times, frames, i, sought = [], [], 0, 0
        video.rewind(start)
        while i < len(targets):
            packets, shown, following = video.group()
            if not packets:
                break
            if shown and shown[0] - NEAR > targets[i] > 0 and video.seekable:      # the index led too far
                video.seekable = False
                video.rewind()
                continue
            n = int(np.searchsorted(targets, following - NEAR))    # targets before the next group
            if shown and n > i:
                place = np.searchsorted(shown, targets[i:n] + NEAR) - 1
                for frame in video.decode(packets, {shown[max(p, 0)] for p in place}):
                    times.append(max(0., video.time(frame) - start))
                    frames.append(video.picture(frame, size))
            i = max(i, n)
            if i < len(targets) and i > sought and video.seekable and shown and targets[i] > 2 * following - shown[0]:
                video.rewind(targets[i])     # over at least one whole group
                sought = i
    except (BadRow, UserError):
        raise
    except Exception as e:                   # a damaged file makes a decoder raise whatever comes to hand
        raise BadRow('unreadable media', f'not a video that can be read ({getattr(e, "strerror", 0) or e})') from None
    if not frames:
        raise BadRow('unreadable media', 'no frame of it can be decoded')
    times, order = np.unique(times, return_index=True)    # a damaged file's frames may come in any order
    return times, [frames[i] for i in order]


def _head(file):
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return head


def _targets(last, max_frames, fps, start):
    if last < start:
        raise BadRow('empty clip', f'it starts at {start:g} s, the last frame is at {last:.2f} s')
    return start + frame_times(last - start, max_frames, fps)


def _animation(file, max_frames, fps, start, end, size):
    """`load_video` for what Pillow knows better: frames build on one another, and holes show white."""
    image, deadline = Image.open(file), time.monotonic() + MAX_SECONDS
    check_size(*image.size, 'a picture')
    shown, now = [], 0.
    for i in range(getattr(image, 'n_frames', 1)):        # first the times, then the pixels
        image.seek(i)
        shown.append(now)
        now += image.info.get('duration', 100) / 1000
        check_time(deadline)
    shown = [t for t in shown if end is None or t <= end]
    place = np.searchsorted(shown, _targets(shown[-1], max_frames, fps, start) + NEAR) - 1
    times, frames = [], []
    for i in sorted(set(place.tolist())):
        image.seek(i)
        frame = _on_white(image)
        times.append(max(0., shown[i] - start))
        frames.append(frame.resize(size, Image.Resampling.BICUBIC) if size else frame)
    return np.array(times), frames


# ---------------------------------------------------------------------------------------------------------------------
# Subtitles

_STAMP = r'((?:\d+:)?\d+:\d+[.,]\d+)'
_CUE = re.compile(rf'{_STAMP}[ \t]*-->[ \t]*{_STAMP}[^\n]*\n(.*?)(?=\n[ \t]*\n|\n[^\n]*-->|\Z)', re.S)


def _seconds(stamp):
    return sum(float(x) * 60 ** i for i, x in enumerate(reversed(stamp.replace(',', '.').split(':'))))


def parse_subtitles(text):
    """The text of an .srt or .vtt file -> [{start, end, text}] in seconds, without tags and lines said before."""
    cues, before = [], ''
    for start, end, body in _CUE.findall(text.replace('\r\n', '\n') + '\n'):
        lines = [html.unescape(re.sub(r'<[^>]*>|\{\\[^}]*\}', '', line)).strip() for line in body.split('\n')]
        said = ' '.join(line for line in lines if line and line != before)
        before = lines[-1] or before
        if said:
            cues.append({'start': _seconds(start), 'end': _seconds(end), 'text': said})
    return cues


def load_subtitles(source, start=0., end=None):
    """Cues of an open .srt or .vtt file, or given as a list, that touch the clip; their times count from its start."""
    if not isinstance(source, list):
        raw = source.read(MAX_TEXT + 1)
        if len(raw) > MAX_TEXT:
            raise BadRow('too large', f'a subtitle file of more than {MAX_TEXT:,} bytes')
        try:
            text = raw.decode('utf-16' if raw[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
        except UnicodeDecodeError:           # old files are in Latin-1, whose every byte is a letter
            text = raw.decode('latin-1')
        source = parse_subtitles(text)
        if not source:
            raise BadRow('bad subtitles', 'no cue such as "00:00:01,000 --> 00:00:02,000" in the subtitle file')
    try:
        end = float('inf') if end is None else end
        return [{'start': max(0., c['start'] - start), 'end': min(c['end'], end) - start, 'text': str(c['text'])}
                for c in source if c['end'] > start and c['start'] < end]
    except (TypeError, KeyError):
        raise BadRow('bad subtitles', 'subtitles are {start, end, text} with seconds') from None


# ---------------------------------------------------------------------------------------------------------------------
# For people to look at

def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def enlarge(image, side=384):
    """A small picture by a whole factor, for people to look at: its longer side comes near `side` pixels."""
    scale = max(1, side // max(image.size))
    return image.resize((image.width * scale, image.height * scale))


def draw_points(image, points, colour='magenta'):
    """A copy of an RGB picture with numbered dots, large enough to be seen at this picture's size."""
    image = image.copy()
    draw, r = ImageDraw.Draw(image), max(3, max(image.size) // 90)
    for n, point in enumerate(points, 1):
        x, y = point['x'] * image.width, point['y'] * image.height
        draw.ellipse((x - r, y - r, x + r, y + r), outline='white', fill=colour, width=max(1, r // 4))
        # beside the dot, on the side that has room
        anchor = 'lm' if x < image.width * .9 else 'rm'
        draw.text((x + (1.5 if anchor == 'lm' else -1.5) * r, y), str(point.get('id', n)), fill=colour, anchor=anchor,
                  font_size=max(10, 3 * r), stroke_width=max(1, r // 3), stroke_fill='white')
    return image


def points_at(points, when, gap=1.5):
    """Where the points {t, x, y, id} are at second `when`: between two times of an id, no more than `gap` apart, on the
    line between them; else within a quarter of a second of theirs."""
    tracks = {}
    for p in sorted(points, key=lambda p: p['t']):
        tracks.setdefault(p['id'], []).append(p)
    here = []
    for track in tracks.values():
        for p, q in zip(track, track[1:]):
            if p['t'] <= when < q['t'] <= p['t'] + gap:
                s = (when - p['t']) / (q['t'] - p['t'])
                here.append({'id': p['id'], **{k: (1 - s) * p[k] + s * q[k] for k in 'xy'}})
                break
        else:
            here += [p for p in track if abs(p['t'] - when) <= .25][:1]
    return here


def draw_on_video(file, points, path, start=0., end=None):
    """Writes an MP4 of the clip with the points drawn where they are at each time, at its own frame rate."""
    av, source = pyav(), Video(file)
    with av.open(str(path), 'w', format='mp4') as out:
        stream, last = None, -1
        for frame in source.container.decode(source.stream):
            when = source.time(frame) - start
            if when < 0 or end is not None and when > end - start:
                continue
            image = draw_points(source.picture(frame), points_at(points, when))
            if stream is None:
                stream = out.add_stream('h264', rate=source.stream.average_rate or 25)
                stream.width, stream.height = image.width // 2 * 2, image.height // 2 * 2        # as yuv420p needs
                stream.pix_fmt, stream.codec_context.time_base = 'yuv420p', Fraction(1, 1000)
            drawn = av.VideoFrame.from_image(image.crop((0, 0, stream.width, stream.height)))
            drawn.pts, drawn.time_base = max(last + 1, round(1000 * when)), Fraction(1, 1000)
            last = drawn.pts
            out.mux(stream.encode(drawn))
        if stream is not None:
            out.mux(stream.encode())
