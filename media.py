"""Files to pixels and back: the pictures, videos and subtitles of a dataset's folder.

    file = open_media('data/pets', 'media-0.tar/7.jpg')   a file, or a member of a tar
    image = load_image(file)                              upright RGB
    times, frames = load_video(file, max_frames=128)      2 frames a second, and the last one
    cues = load_subtitles(file)                           [{start, end, text}] in seconds

What the model makes of pixels and times is in data.py. The last section draws points on pictures
and videos for people to look at.

Files come from the internet, so nothing here trusts them: a path cannot leave its folder, sizes are
checked before memory is allocated, and a video that takes too long is given up. A file that cannot
be used raises BadRow, whose one-line message says why; the row is then left out and counted.

Reading a video is the long part, because decoding a whole one to take a few frames wastes most of
the work. A reader in a hurry may take `load_video`'s docstring for granted and skip the section.
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

MAX_PIXELS = 100_000_000           # a larger picture is a decompression bomb or a mistake
MAX_SECONDS = 60                   # of reading one video; then it is given up
MAX_GROUP = 2 ** 28                # bytes of one group of pictures, which is held in memory
MAX_TEXT = 2 ** 24                 # bytes of a subtitle file
SMALL_FILE = 2 ** 22               # bytes; files up to this size are read as a whole

# A frame counts as shown at a requested time if its timestamp is at most so many seconds later.
# Without it a video of 24000/1001 frames a second would give the frame before the meant one at
# 0.5 s, because frame 12 has the timestamp 0.5005 s.
TIME_TOLERANCE = 1.7e-3

# The containers that FFmpeg may open. Playlists and other formats that name further files are not
# among them, because a data set's file must not make this machine open others.
VIDEO_FORMATS = ('mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,'
                 'h264,hevc')


class BadRow(ValueError):
    """A row of a dataset that cannot be used.

    reason: a short category ('missing media', 'too large', ..) under which such rows are counted.
    The message says what is wrong with this one.
    """

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


# --------------------------------------------------------------------------------------------------
# Files

class Part(io.RawIOBase):
    """The bytes [start, start + size) of a file, as a read-only file of their own."""

    def __init__(self, path, start, size):
        self.file = open(path, 'rb')
        self.start = start
        self.size = size
        self.position = 0              # counted from `start`

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        origins = (0, self.position, self.size)            # for io.SEEK_SET, SEEK_CUR, SEEK_END
        self.position = max(0, origins[whence] + offset)
        return self.position

    def tell(self):
        return self.position

    def readinto(self, buffer):
        self.file.seek(self.start + self.position)
        left = self.size - self.position
        data = self.file.read(max(0, min(len(buffer), left)))
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self):
        self.file.close()
        super().close()


@lru_cache(maxsize=64)
def _tar_index(path):
    """{member name: (first byte, number of bytes)} of the files in an uncompressed tar.

    Of a damaged tar the members before the damage are listed.
    """
    members = {}
    with tarfile.open(path, 'r:') as tar:
        try:
            for member in tar:
                # A sparse file's bytes are not in one piece.
                if member.isreg() and not member.issparse():
                    members[member.name] = (member.offset_data, member.size)
        except tarfile.TarError:
            pass
    return members


_resolve = lru_cache(maxsize=64)(Path.resolve)     # few folders hold many files


def open_media(folder, path):
    """Opens a media file of a dataset for reading bytes.

    path: relative to `folder`; 'media-0.tar/7.jpg' is the member 7.jpg of the tar media-0.tar.
    Raises BadRow if the path leaves the folder, also through a link, or if the file does not exist.
    """
    folder = _resolve(Path(folder))
    tar_name, is_member, member = str(path).partition('.tar/')
    try:
        file = (folder / (f'{tar_name}.tar' if is_member else path)).resolve()
        if not file.is_relative_to(folder):
            raise BadRow('outside', f"'{path}' leaves the dataset's folder")
        if is_member:
            start, size = _tar_index(file)[member]
            return io.BufferedReader(Part(file, start, size))
        status = file.stat()
        # Only regular files are opened, because reading from a pipe could wait for ever.
        if stat.S_ISREG(status.st_mode):
            # Decoders jump back and forth in a container, which is faster in memory.
            if status.st_size <= SMALL_FILE:
                return io.BytesIO(file.read_bytes())
            return open(file, 'rb')
    except BadRow:
        raise
    except (OSError, KeyError, ValueError, tarfile.TarError):
        # KeyError: the tar has no such member. ValueError: the path has a NUL character in it.
        pass
    raise BadRow('missing media', f'{str(path)[:200]!r} does not exist in {folder.name}/')


# --------------------------------------------------------------------------------------------------
# Pictures

def check_size(width, height, what):
    """Raises BadRow if a picture of this many pixels is too large to be decoded."""
    if width * height > MAX_PIXELS:
        raise BadRow('too large', f'{what} of {width} x {height} pixels (limit {MAX_PIXELS:,})')


def is_picture(value):
    """Whether a record's picture is there already, and not as the path of a file."""
    return isinstance(value, (Image.Image, np.ndarray))


def open_picture(folder, picture):
    """A picture of a record, as `load_image` gives it: a path relative to `folder`, or the picture
    itself, by Pillow or as an array."""
    if is_picture(picture):
        return load_image(picture)
    return load_image(open_media(folder, picture))


def _from_array(array):
    """An array [height, width], [height, width, 3] or [height, width, 4] of uint8, by Pillow."""
    is_grey = array.ndim == 2
    is_colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (is_grey or is_colour):
        raise BadRow('unreadable media', f'an array of {array.dtype} {list(array.shape)}; a picture '
                                         'is uint8 [height, width, 3]')
    return Image.fromarray(np.ascontiguousarray(array))


def load_image(source):
    """A picture, as an upright PIL image in 8-bit RGB.

    source: an open file, a path, a Pillow image or an array. The EXIF orientation is applied,
    transparency becomes white, 16 bits are scaled to 8, and of an animation the first frame is
    taken. Raises BadRow if the file does not exist, is no picture, is damaged or too large.
    """
    try:
        image = source
        if isinstance(source, np.ndarray):
            image = _from_array(source)
        elif not isinstance(source, Image.Image):
            image = Image.open(source)         # reads the header alone
        check_size(*image.size, 'a picture')
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):         # 16 bits of grey, or 32 bits that hold 16
            grey = np.asarray(image).clip(0, 65535) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        return _on_white(image)
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow('missing media', f'{source} does not exist') from None
    except UnidentifiedImageError:
        raise BadRow('unreadable media', 'not a picture, whatever its name says') from None
    except Exception as e:
        # Pillow's decoders raise exceptions of any kind (SyntaxError, struct.error, ..) for a
        # damaged file, so all of them mean a damaged file.
        problem = e or type(e).__name__
        raise BadRow('unreadable media', f'a damaged picture ({problem})') from None


def _on_white(image):
    """A picture in RGB. What is transparent shows a white background."""
    if image.has_transparency_data:
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(background, image)
    return image.convert('RGB')


# --------------------------------------------------------------------------------------------------
# Videos
#
# A video stream is a sequence of compressed packets, one a frame. A keyframe is decoded from its
# packet alone. The frames up to the next keyframe are stored as differences, so they need the
# keyframe before them and often one another. A keyframe and the frames that need it are a group of
# pictures:
#
#     packets      K p p b p b p  K p p p b p p  K p p ..    K  a keyframe
#     groups       └─────────────┘└─────────────┘└─────      b  a frame that no other frame needs
#     requested            x                       x
#
# Reading packets costs little and decoding them costs much. So the timestamps of a group are read
# first, from its packets, and only a group with a requested frame is decoded. In it, frames that no
# other frame needs are skipped, unless they are requested. Where the next requested time is far
# away, the container's index leads to the keyframe before it and the groups between are not read.

def pyav():
    """The module `av` (PyAV), which reads and writes videos with FFmpeg's libraries.

    It is imported when the first video is opened, because a machine without it can still train on
    pictures and text. Raises UserError if it cannot be imported.
    """
    try:
        import av
    except ImportError as e:
        raise UserError(f"videos need PyAV, which cannot be imported here ({e}): pip install av, "
                        f"or leave data sets with videos out of the mixture") from None
    return av


def frame_times(last, max_frames, fps=2.):
    """Times [n] in seconds at which frames are taken from a clip that begins at 0.

    last: the last frame's timestamp. The frames are `fps` a second and the last one. Where that
    would be more than `max_frames`, they are `max_frames` evenly spaced ones, first and last
    included. This is uniform_last_frame of allenai/molmo2, video_loader.py.
    """
    if last * fps > max_frames - 1:
        return np.linspace(0, last, max_frames)
    return np.append(np.arange(0, last, 1 / fps), last)


def sample_times(last, max_frames, fps, start):
    """`frame_times` of the clip from `start` to `last`, counted from the video's first frame."""
    if last < start:
        raise BadRow('empty clip', f'it starts at {start:g} s, the last frame is at {last:.2f} s')
    return start + frame_times(last - start, max_frames, fps)


def check_time(deadline):
    """Raises BadRow if `deadline`, a time.monotonic(), is past."""
    if time.monotonic() > deadline:
        raise BadRow('too slow', f'not read in {MAX_SECONDS} seconds')


class Video:
    """An open video file that is read one group of pictures at a time.

    All times are seconds from the first frame of the file, whose own timestamp need not be 0.

    stream: the video stream of the file.
    duration: seconds, as the file's header says; 0 if it does not say.
    seekable: whether the container has an index by which `rewind` finds keyframes. It is set to
        False from outside if the index turns out to be wrong.
    """

    def __init__(self, file, threads=1):
        self.av = pyav()
        self.file = file
        self.threads = threads
        self.deadline = time.monotonic() + MAX_SECONDS
        self.container = None
        self.seekable = None               # not known before the container is open
        self.first_tick = None             # timestamp of the first frame, in units of the stream
        # Made once, because building its tables takes longer than converting a small frame.
        self.reformatter = self.av.video.reformatter.VideoReformatter()
        self.rewind()
        self.duration = float((self.stream.duration or 0) * self.stream.time_base)

    def rewind(self, seconds=0.):
        """Continues reading at the keyframe before `seconds`.

        A container without an index is opened anew and read from its beginning.
        """
        if self.container is None or not self.seekable:
            self._open()
        if self.seekable:
            tick = (self.first_tick or 0) + int(seconds / self.tick_seconds)
            self.container.seek(tick, stream=self.stream)
        self.packets = self.container.demux(self.stream)
        self.read_ahead = []               # packets that `read_group` read beyond its group

    def _open(self):
        self.file.seek(0)
        self.container = self.av.open(self.file, options={'format_whitelist': VIDEO_FORMATS},
                                      metadata_errors='replace')
        if self.seekable is None:
            self.seekable = self.container.format.name.startswith(('mov', 'matroska'))

        # A cover picture is stored as a video stream of one frame.
        cover = self.av.stream.Disposition.attached_pic
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            raise BadRow('unreadable media', 'no video in it')
        self.stream = streams[0]
        self.tick_seconds = float(self.stream.time_base)
        if self.first_tick is None:
            self.first_tick = self.stream.start_time

        context = self.stream.codec_context
        # The header's size is checked before the decoder allocates frames of that size. A packet
        # may declare another size later, for which the decoder has a limit of its own.
        check_size(context.width, context.height, 'frames')
        context.options = {'max_pixels': str(MAX_PIXELS)}
        context.thread_count = self.threads
        # The decoder is opened now, before `decode` sets skip_frame for the first time, because
        # dav1d (AV1) keeps the value that it has been opened with.
        context.open()

    def time(self, packet_or_frame):
        """Seconds at which a packet or a frame is shown."""
        tick = packet_or_frame.pts
        if tick is None:
            # Old containers (AVI) do not store when a packet is shown, only when it is decoded.
            tick = packet_or_frame.dts
        if self.first_tick is None:
            self.first_tick = tick
        return (tick - self.first_tick) * self.tick_seconds

    def _tick(self, seconds):
        # Timestamps are compared as whole numbers of ticks, because their seconds are rounded.
        return round(seconds / self.tick_seconds)

    def read_group(self):
        """The next group of pictures, not yet decoded: (packets, times, next_start).

        packets: to be given to `decode`. They go on a little into the next group: to its keyframe
            and the packets after it, up to the first that is shown after the keyframe. Packets are
            stored in the order of decoding, so frames of this group may be among them.
        times: ascending times at which this group's frames are shown.
        next_start: when the next group's keyframe is shown; infinity if there is none.
        At the end of the file all are empty: ([], [], inf).
        """
        packets = self.read_ahead
        self.read_ahead = []
        num_bytes = 0
        for packet in self.packets:
            check_time(self.deadline)
            # PyAV ends a stream with an empty packet. One without a timestamp cannot be placed.
            if not packet.size or (packet.dts is None and packet.pts is None):
                continue
            if self.read_ahead:
                # The next group's keyframe has been read.
                self.read_ahead.append(packet)
                if self.time(packet) > self.time(self.read_ahead[0]):
                    break
            elif packet.is_keyframe and packets:
                self.read_ahead = [packet]
            else:
                packets.append(packet)
                num_bytes += packet.size
                if num_bytes > MAX_GROUP:
                    raise BadRow('too large', f'more than {MAX_GROUP:,} bytes without a keyframe')
        if not packets:
            return [], [], np.inf

        start = max(0., self.time(packets[0]))
        next_start = np.inf
        if self.read_ahead:
            next_start = self.time(self.read_ahead[0])
        packets = packets + self.read_ahead
        times = []
        for packet in packets:
            seconds = self.time(packet)
            if start <= seconds < next_start:
                times.append(seconds)
        return packets, sorted(times), next_start

    def decode(self, packets, wanted):
        """Yields the decoded frames of a group that are shown at the times `wanted`, in order.

        A damaged packet is left out, and the frames that need it with it.
        """
        wanted_ticks = {self._tick(seconds) for seconds in wanted}
        context = self.stream.codec_context
        context.flush_buffers()
        for packet in [*packets, None]:        # None makes the decoder give out its last frames
            check_time(self.deadline)
            if packet is not None:
                # NONREF lets the decoder skip a frame that no other frame needs.
                is_wanted = self._tick(self.time(packet)) in wanted_ticks
                context.skip_frame = 'DEFAULT' if is_wanted else 'NONREF'
            try:
                frames = context.decode(packet)
            except self.av.error.InvalidDataError:
                continue
            for frame in frames:
                tick = self._tick(self.time(frame))
                if tick in wanted_ticks:
                    wanted_ticks.remove(tick)
                    yield frame
            if not wanted_ticks:
                return

    def picture(self, frame, size=None):
        """A decoded frame as an upright RGB PIL image, turned as the frame's metadata says.

        size: (width, height) of the upright picture; conversion and resizing are one step then.
        """
        width, height = size or (frame.width, frame.height)
        if size and frame.rotation % 180:
            # The frame is resized before it is turned by a quarter.
            width, height = height, width
        converted = self.reformatter.reformat(frame, width, height, 'rgb24',
                                              interpolation='BICUBIC', threads=self.threads)
        pixels = converted.to_ndarray()                    # [height, width, 3] uint8
        return Image.fromarray(np.rot90(pixels, frame.rotation // 90))

    def last_frame_time(self, end=np.inf):
        """Time of the last frame that is not after `end`. Packets are read, nothing is decoded."""
        last = None
        start = min(end, self.duration)
        while last is None:
            self.rewind(start)
            while True:
                packets, times, next_start = self.read_group()
                times_in_clip = [seconds for seconds in times if seconds <= end]
                last = max(times_in_clip, default=last)
                if not packets or next_start > end:
                    break
            if last is None and start == 0:
                raise BadRow('unreadable media', 'no frame in it')
            # The header promised more than the file holds, so everything is read once more.
            start = 0
        return last


def load_video(file, max_frames, fps=2., start=0., end=None, size=None, threads=1):
    """Frames of a clip: (times [n] in seconds from `start`, list of n upright RGB PIL images).

    file: an open video file, or an animated GIF, WebP or PNG.
    max_frames, fps: which frames are taken, as in `frame_times`. Each requested time gives the
        frame that is on the screen then, and each frame comes once.
    start, end: seconds of the video between which the clip lies; end None is the video's end.
    size: (width, height) to which frames are resized; None leaves them as they are.
    threads: of the decoder.

    A returned time is the frame's own timestamp, which is usually earlier than the requested time.
    Raises BadRow if the file is no video, is damaged or cut off, too large or too slow to read, or
    if no frame lies in the clip.
    """
    try:
        if _is_animation(file):
            return _load_animation(file, max_frames, fps, start, end, size)
        video = Video(file, threads)
        times, frames = _decode_clip(video, max_frames, fps, start, end, size)
    except (BadRow, UserError):
        raise
    except Exception as e:
        # FFmpeg's and Pillow's decoders raise exceptions of any kind for a damaged file.
        problem = getattr(e, 'strerror', None) or e
        raise BadRow('unreadable media', f'not a video that can be read ({problem})') from None
    if not frames:
        raise BadRow('unreadable media', 'no frame of it can be decoded')
    # The frames of a damaged file may come in any order.
    times, order = np.unique(times, return_index=True)
    return times, [frames[i] for i in order]


def _decode_clip(video, max_frames, fps, start, end, size):
    """`load_video` of an open Video: lists of times and pictures, in the order of decoding."""
    last = video.last_frame_time(np.inf if end is None else end)
    if end is None and last < .9 * video.duration - 1:
        raise BadRow('unreadable media',
                     f'cut off: {last:.1f} of {video.duration:.1f} seconds are there')
    requested = sample_times(last, max_frames, fps, start)         # [n] ascending

    times = []
    frames = []
    done = 0                   # requested[:done] have their frames
    jumped_at = 0              # `done` when the container's index was used last
    video.rewind(start)
    while done < len(requested):
        packets, shown, next_start = video.read_group()
        if not packets:
            break

        # A wrong index can lead behind the requested time. Then the file is read without it.
        if video.seekable and shown and shown[0] - TIME_TOLERANCE > requested[done] > 0:
            video.seekable = False
            video.rewind()
            continue

        # Requested times before the next group's start are shown by this group's frames: each by
        # the last frame whose timestamp is not later, or by the first frame if all are later.
        until = int(np.searchsorted(requested, next_start - TIME_TOLERANCE))
        if shown and until > done:
            index = np.searchsorted(shown, requested[done:until] + TIME_TOLERANCE) - 1
            wanted = {shown[max(i, 0)] for i in index}
            for frame in video.decode(packets, wanted):
                times.append(max(0., video.time(frame) - start))
                frames.append(video.picture(frame, size))
        done = max(done, until)

        # The next requested time may lie beyond at least one more group as long as this one. Then
        # jumping costs less than reading on. A jump that brought nothing is not tried again.
        if done < len(requested) and done > jumped_at and video.seekable and shown:
            group_seconds = next_start - shown[0]
            if requested[done] > next_start + group_seconds:
                video.rewind(requested[done])
                jumped_at = done
    return times, frames


def _is_animation(file):
    """Does a file begin as a GIF, WebP or PNG does? Those are read by Pillow."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return re.match(rb'GIF8|RIFF....WEBP|\x89PNG', head, re.S)


def _load_animation(file, max_frames, fps, start, end, size):
    """`load_video` of an animated picture.

    Pillow reads these files, because their frames are patches on the frames before them and may be
    transparent, which becomes white.
    """
    image = Image.open(file)
    deadline = time.monotonic() + MAX_SECONDS
    check_size(*image.size, 'a picture')

    # First the times of all frames are read, because the last one decides which frames are taken.
    shown = []
    seconds = 0.
    for i in range(getattr(image, 'n_frames', 1)):
        image.seek(i)
        shown.append(seconds)
        seconds += image.info.get('duration', 100) / 1000          # milliseconds
        check_time(deadline)
    if end is not None:
        shown = [t for t in shown if t <= end]
    requested = sample_times(shown[-1], max_frames, fps, start)
    index = np.searchsorted(shown, requested + TIME_TOLERANCE) - 1

    times = []
    frames = []
    for i in sorted(set(index.tolist())):
        image.seek(i)
        frame = _on_white(image)
        if size:
            frame = frame.resize(size, Image.Resampling.BICUBIC)
        times.append(max(0., shown[i] - start))
        frames.append(frame)
    return np.array(times), frames


# --------------------------------------------------------------------------------------------------
# Subtitles

# 00:01:02,500 in an .srt file; hours may be missing and the comma may be a point in a .vtt file.
_TIME = r'((?:\d+:)?\d+:\d+[.,]\d+)'
# A cue is a line "time --> time" and the lines after it, up to an empty line, the next such line,
# or the end. A number or a name in the line before is not part of it.
_CUE = re.compile(
    rf'{_TIME}[ \t]*-->[ \t]*{_TIME}[^\n]*\n(.*?)(?=\n[ \t]*\n|\n[^\n]*-->|\Z)', re.S)
# <i> and <c.yellow> of both formats, {\an8} of .srt files
_TAG = re.compile(r'<[^>]*>|\{\\[^}]*\}')


def _seconds(stamp):
    """'1:02:03,500' -> 3723.5"""
    seconds = 0
    fields = stamp.replace(',', '.').split(':')
    for i, field in enumerate(reversed(fields)):
        seconds += float(field) * 60 ** i
    return seconds


def parse_subtitles(text):
    """The text of an .srt or .vtt file -> [{start, end, text}], times in seconds.

    Tags are removed. Automatic captions roll: a cue repeats the last line of the cue before it and
    adds one. The repeated line is left out, so each line comes once.
    """
    cues = []
    last_line = ''
    text = text.replace('\r\n', '\n') + '\n'
    for start, end, body in _CUE.findall(text):
        lines = []
        for line in body.split('\n'):
            line = _TAG.sub('', line)
            lines.append(html.unescape(line).strip())
        new_lines = [line for line in lines if line and line != last_line]
        last_line = lines[-1] or last_line
        if new_lines:
            cues.append({
                'start': _seconds(start),
                'end': _seconds(end),
                'text': ' '.join(new_lines),
            })
    return cues


def load_subtitles(source, start=0., end=None):
    """The cues [{start, end, text}] that overlap a clip, their times in seconds from its start.

    source: an open .srt or .vtt file, or a list of such cues with times of the whole video.
    start, end: seconds of the video between which the clip lies; end None is the video's end.
    Raises BadRow if the file is too large or has no cue in it, or if a cue lacks a field.
    """
    cues = source
    if not isinstance(source, list):
        cues = parse_subtitles(_read_text(source))
        if not cues:
            raise BadRow('bad subtitles', 'no cue such as "00:00:01,000 --> 00:00:02,000" '
                                          'in the subtitle file')
    if end is None:
        end = float('inf')
    clip = []
    try:
        for cue in cues:
            if cue['end'] > start and cue['start'] < end:
                clip.append({
                    'start': max(0., cue['start'] - start),
                    'end': min(cue['end'], end) - start,
                    'text': str(cue['text']),
                })
    except (TypeError, KeyError):
        raise BadRow('bad subtitles', 'subtitles are {start, end, text} with seconds') from None
    return clip


def _read_text(file):
    """The text of an open subtitle file, whatever its encoding."""
    content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise BadRow('too large', f'a subtitle file of more than {MAX_TEXT:,} bytes')
    encoding = 'utf-8-sig'                                 # UTF-8, with or without a mark
    if content[:2] in (b'\xff\xfe', b'\xfe\xff'):          # the marks of UTF-16
        encoding = 'utf-16'
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        # Old files are in Latin-1, in which every byte is a character, so this cannot fail.
        return content.decode('latin-1')


# --------------------------------------------------------------------------------------------------
# For people to look at

def data_url(image):
    """A PIL image as the text of a data: URL (PNG), for the src of an <img> in a page."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def enlarge(image, side=384):
    """A small picture enlarged by a whole number, so that its longer side comes near `side` pixels.

    A picture of more than half that size stays as it is.
    """
    scale = max(1, side // max(image.size))
    return image.resize((image.width * scale, image.height * scale))


def draw_points(image, points, colour='magenta'):
    """A copy of an RGB picture with a numbered dot at each point.

    points: [{x, y, id}] with x and y as fractions of width and height. A point without an id gets
    its number in the list, from 1 on. Dots and numbers grow with the picture.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    radius = max(3, max(image.size) // 90)                 # pixels
    for number, point in enumerate(points, 1):
        x = point['x'] * image.width
        y = point['y'] * image.height
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, outline='white', fill=colour, width=max(1, radius // 4))

        # The number is to the right of the dot, or to the left near the picture's right edge.
        if x < image.width * .9:
            anchor = 'lm'                                  # Pillow: left end, middle height
            text_x = x + 1.5 * radius
        else:
            anchor = 'rm'
            text_x = x - 1.5 * radius
        text = str(point.get('id', number))
        draw.text((text_x, y), text, fill=colour, anchor=anchor, font_size=max(10, 3 * radius),
                  stroke_width=max(1, radius // 3), stroke_fill='white')
    return image


def points_of(record):
    """All points of all messages of a record."""
    points = []
    for conversation in record['conversations']:
        for message in conversation['messages']:
            if message.get('points'):
                points += message['points'].get('points', ())
    return points


def points_in_picture(points, number):
    """The points of picture `number`, counted from 0. A point without a picture's number belongs to
    the first one."""
    return [point for point in points if point.get('image', 0) == number]


def points_at(points, when, gap=1.5):
    """Points of a video at second `when`: [{id, x, y}], at most one an id.

    points: [{t, x, y, id}]; points of one id are a track, in seconds and fractions of the frame.
    Between two points of a track that are at most `gap` seconds apart, the place is on the line
    between them. Elsewhere a track shows a point that is at most a quarter of a second away.
    """
    tracks = {}
    for point in sorted(points, key=lambda point: point['t']):
        tracks.setdefault(point['id'], []).append(point)
    found = []
    for track in tracks.values():
        point = _track_at(track, when, gap)
        if point is not None:
            found.append(point)
    return found


def _track_at(track, when, gap):
    """The point of one track, sorted by time, at second `when`; None if it has none."""
    for before, after in zip(track, track[1:]):
        if before['t'] <= when < after['t'] <= before['t'] + gap:
            share = (when - before['t']) / (after['t'] - before['t'])
            return {
                'id': before['id'],
                'x': (1 - share) * before['x'] + share * after['x'],
                'y': (1 - share) * before['y'] + share * after['y'],
            }
    for point in track:
        if abs(point['t'] - when) <= .25:
            return point
    return None


def draw_on_video(file, points, path, start=0., end=None):
    """Writes an MP4 of a clip with numbered dots at the points of each moment.

    file: an open video file. points: as in `points_at`, t in seconds from `start`.
    path: of the MP4, which has the clip's frames with their own times. start, end: as in
    `load_video`.
    """
    av = pyav()
    video = Video(file)
    milliseconds = Fraction(1, 1000)
    with av.open(str(path), 'w', format='mp4') as out:
        stream = None
        last_pts = -1
        for frame in video.container.decode(video.stream):
            seconds = video.time(frame) - start
            if seconds < 0:
                continue
            if end is not None and seconds > end - start:
                continue
            image = draw_points(video.picture(frame), points_at(points, seconds))

            if stream is None:
                stream = out.add_stream('h264', rate=video.stream.average_rate or 25)
                # yuv420p stores one colour for 2 x 2 pixels, so both sides must be even.
                stream.width = image.width // 2 * 2
                stream.height = image.height // 2 * 2
                stream.pix_fmt = 'yuv420p'
                stream.codec_context.time_base = milliseconds
            image = image.crop((0, 0, stream.width, stream.height))
            drawn = av.VideoFrame.from_image(image)
            # An encoder refuses a timestamp that is not later than the one before.
            drawn.pts = max(last_pts + 1, round(1000 * seconds))
            drawn.time_base = milliseconds
            last_pts = drawn.pts
            out.mux(stream.encode(drawn))
        if stream is not None:
            out.mux(stream.encode())           # the frames that the encoder still holds
