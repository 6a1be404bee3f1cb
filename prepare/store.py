"""What a dataset's folder holds: media that open, tars, tables, and the manifest that comes last.

    look       checks that a picture or video opens, and makes it smaller where that is asked for
    encode     frames -> the bytes of an MP4
    Writer     files that grow together and survive being killed
    state_of   whether a folder is complete, begun, changed or empty

In data/<name>/: train.jsonl, validation.jsonl, media-*.tar, lost.csv (media that could not be had,
and why) and manifest.json (counts, sizes, check sums). The manifest is written last and says that
the dataset is complete; until then all files lie in data/<name>/.work/. Not in this file: where
media and records come from, which is in fetch.py and sources.py.
"""
import io
import json
import os
import sqlite3
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from media import BadRow, check_size, load_image, load_video, pyav  # noqa: E402

MAGIC = (                  # the first bytes of a file and the extension that it then gets
    (b'\xff\xd8\xff', 'jpg'),
    (b'\x89PNG', 'png'),
    (b'GIF8', 'gif'),
    (b'\x1aE\xdf\xa3', 'webm'),
    (b'BM', 'bmp'),
    (b'II*\0', 'tif'),
    (b'MM\0*', 'tif'),
    (b'FLV', 'flv'),
    (b'\0\0\1\xba', 'mpg'),
)
EXIF_ORIENTATION = 0x0112


# --------------------------------------------------------------------------------------------------
# Media

def kind_of(data):
    """The extension of a picture or video by its first bytes; '' for anything else."""
    for magic, extension in MAGIC:
        if data.startswith(magic):
            return extension
    # MP4, QuickTime and AVIF are one container, and RIFF is one for WebP and AVI.
    if data[4:8] == b'ftyp':
        return 'avif' if data[8:11] == b'avi' else 'mp4'
    if data.startswith(b'RIFF'):
        return {b'WEBP': 'webp', b'AVI ': 'avi'}.get(data[8:12], '')
    return ''


def look(data, video, max_side=0, video_side=0):
    """(bytes to keep, extension, (width, height)) of a picture, or of a video if `video`.

    Media whose longer side has more pixels than max_side (pictures) or video_side (videos) are
    encoded again; 0 keeps them. The size is always that before. Raises BadRow if it does not open.
    """
    extension = kind_of(data)
    # A dead link may answer with a web page and status 200.
    if not extension:
        beginning = data[:200].lstrip().lower()
        is_page = beginning.startswith((b'<!doc', b'<html'))
        raise BadRow('a web page' if is_page else 'not a picture or video', '')
    if video:
        _, frames = load_video(io.BytesIO(data), 2)
        size = frames[0].size
        if video_side and max(size) > video_side:
            data = smaller_video(data, video_side)
            extension = 'mp4'
        return data, extension, size
    size = upright_size(data)
    if max_side and max(size) > max_side:
        data = smaller_picture(data, max_side)
        extension = 'jpg'
    return data, extension, size


def upright_size(data):
    """(width, height) of a picture as people see it. Raises BadRow unless it decodes to its end.

    Of a JPEG only every eighth pixel in each direction is computed. Its bytes are all decoded even
    so, and computing pixels takes most of the time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')        # Pillow warns of odd metadata, which do no harm
        # A damaged file makes decoders raise errors of any class, so all are caught. A picture that
        # is too large is BadRow already.
        try:
            image = Image.open(io.BytesIO(data))
            if image.format == 'JPEG':
                width, height = image.size
                # Orientations from 5 on turn the picture by 90 degrees.
                is_turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
                check_size(width, height, 'a picture')
                image.draft('RGB', (width // 8, height // 8))
                image.load()
                return (height, width) if is_turned else (width, height)
        except BadRow:
            raise
        except Exception as e:
            raise BadRow('unreadable media', str(e)) from None
    return load_image(io.BytesIO(data)).size


def smaller_picture(data, side):
    """A picture as a JPEG whose longer side has `side` pixels."""
    image = load_image(io.BytesIO(data))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, 'JPEG', quality=92)
    return out.getvalue()


def smaller_video(data, side):
    """A video as an MP4 of the same frame rate whose longer side has `side` pixels."""
    with pyav().open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        scale = side / max(stream.width, stream.height)
        width = max(2, round(stream.width * scale) // 2 * 2)   # H.264 wants even numbers
        height = max(2, round(stream.height * scale) // 2 * 2)
        fps = round(stream.average_rate or 25)
        frames = (frame.to_ndarray(format='rgb24', width=width, height=height)
                  for frame in container.decode(stream))
        return encode(frames, fps)


def encode(frames, fps):
    """RGB arrays [height, width, 3] of one size -> the bytes of an H.264 MP4.

    An odd row or column is cut off. The same frames always give the same bytes, because one thread
    encodes and does not look ahead.
    """
    av = pyav()
    out = io.BytesIO()
    options = {'crf': '20', 'threads': '1', 'x264-params': 'rc-lookahead=0:mbtree=0'}
    with av.open(out, 'w', format='mp4') as container:
        stream = None
        for frame in frames:
            if stream is None:
                height = frame.shape[0] // 2 * 2
                width = frame.shape[1] // 2 * 2
                stream = container.add_stream('libx264', rate=fps, options=options)
                stream.width = width
                stream.height = height
                stream.pix_fmt = 'yuv420p'
            pixels = np.ascontiguousarray(frame[:height, :width])
            encoded = stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24'))
            container.mux(encoded)
        container.mux(stream.encode())         # the frames that the encoder still holds
    return out.getvalue()


def source_of(medium):
    """The URL or path of a medium, or None if the table itself has its bytes."""
    return medium.get('url') or medium.get('path')


# --------------------------------------------------------------------------------------------------
# Files that grow

def write_whole(path, text):
    """Writes a file that is there completely or not at all, even after a power failure."""
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'w') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


class Writer:
    """Tables and tars of a dataset that grow together.

    `commit` writes down how long all files are. A run that goes on after a kill cuts off what came
    after the last commit, so that the files are in the end the same bytes as without the kill.
    Media of one URL or path are stored once, however many records show them.
    """

    def __init__(self, folder, tar_bytes):
        """`tar_bytes`: a tar that is larger than this is closed and a new one begun."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.tar_bytes = tar_bytes
        self.open = {}                         # name -> open file
        self.state = {
            'split': 0,                        # number of the split that is being read
            'place': 0,                        # drafts of this split that are done
            'sizes': {},                       # name of a file -> its bytes
            'counts': {},
            'tar': 0,                          # number of the current tar
            'files': 0,                        # media in all tars
        }
        state = folder / 'state.json'
        if state.exists():
            self.state = json.loads(state.read_text())
        self.counts = Counter(self.state['counts'])
        # Bytes that were written after the last commit are cut off. A file that it does not know
        # becomes empty.
        for pattern in ('*.jsonl', '*.tar', '*.csv'):
            for path in folder.glob(pattern):
                with open(path, 'r+b') as f:
                    f.truncate(self.state['sizes'].get(path.name, 0))
        self.stored = sqlite3.connect(folder / 'media.sqlite')
        self.stored.execute(
            'CREATE TABLE IF NOT EXISTS media (name TEXT PRIMARY KEY, file INTEGER, path TEXT, '
            'width INTEGER, height INTEGER) WITHOUT ROWID')
        self.stored.execute('DELETE FROM media WHERE file >= ?', (self.state['files'],))

    def known(self, source):
        """(path, width, height) of media that are stored already, or None."""
        query = 'SELECT path, width, height FROM media WHERE name = ?'
        return self.stored.execute(query, (source,)).fetchone()

    def write(self, name, data):
        """Appends bytes to a file."""
        if name not in self.open:
            self.open[name] = open(self.folder / name, 'ab')
        self.open[name].write(data)

    def tar_name(self):
        return f"media-{self.state['tar']:05d}.tar"

    def media(self, medium, data, extension, size):
        """Adds a file to the current tar, unless it is stored; returns its path for a record."""
        source = source_of(medium)
        if source:
            known = self.known(source)
            if known:
                return known[0]
        tar = self.tar_name()
        number = self.state['files']
        member = tarfile.TarInfo(f'{number:08d}.{extension}')
        member.size = len(data)
        padding = bytes(-len(data) % 512)      # a tar consists of blocks of 512 bytes
        self.write(tar, member.tobuf(tarfile.USTAR_FORMAT) + data + padding)
        self.state['files'] += 1
        # The next file begins a new tar.
        if self.open[tar].tell() > self.tar_bytes:
            self.close_tar()
        path = f'{tar}/{member.name}'
        if source:
            query = 'INSERT INTO media VALUES (?, ?, ?, ?, ?)'
            self.stored.execute(query, (source, number, path, *size))
        return path

    def close_tar(self):
        """Ends the current tar, if there is one."""
        tar = self.tar_name()
        if tar in self.open or tar in self.state['sizes']:
            self.write(tar, bytes(1024))       # a tar ends with two empty blocks
            self.state['tar'] += 1

    def commit(self, split, place):
        """Makes what was written so far the state from which a killed run goes on."""
        for name, f in self.open.items():
            f.flush()
            os.fsync(f.fileno())
            self.state['sizes'][name] = f.tell()
        self.state['split'] = split
        self.state['place'] = place
        self.state['counts'] = dict(self.counts)
        # The database comes first: if the run is killed before the next line, the state is older
        # than the database, and __init__ forgets the media that came later.
        self.stored.commit()
        write_whole(self.folder / 'state.json', json.dumps(self.state))
        # Tars that are complete need not stay open.
        for name in list(self.open):
            if name.endswith('.tar') and name != self.tar_name():
                self.open.pop(name).close()

    def close(self):
        for f in self.open.values():
            f.close()


# --------------------------------------------------------------------------------------------------
# Manifests

def read_manifest(folder):
    """The manifest of a complete dataset, or None if there is none that can be read."""
    try:
        return json.loads((folder / 'manifest.json').read_text())
    except (OSError, ValueError):
        return None


def reasons_left_out(counts):
    """[(number of rows, reason)] of a manifest's counts, the most frequent first."""
    prefix = 'left out: '
    reasons = []
    for key, number in counts.items():
        if key.startswith(prefix):
            reasons.append((number, key.removeprefix(prefix)))
    return sorted(reasons, reverse=True)


def changed(manifest, folder):
    """The names of files that are missing or have another size than the manifest says."""
    names = []
    for name, (size, _) in manifest['files'].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            names.append(name)
    return names


def state_of(entry, out):
    """'complete', 'begun', 'source', 'changed: ..' or '-': what a dataset's folder holds."""
    folder = Path(out) / entry['name']
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / '.work').exists():
            return 'begun'
        return 'source' if (folder / 'source').exists() else '-'
    # Sizes are compared and not check sums, because --list must answer at once.
    wrong = changed(manifest, folder)
    if wrong:
        return f"changed: {', '.join(wrong[:3])}"
    return 'complete (samples)' if manifest['num_samples'] else 'complete'
