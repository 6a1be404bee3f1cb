"""Published datasets -> folders that train.py reads. Needs huggingface_hub and pyarrow: pip install '.[prepare]'.

    python prepare/download.py --stage pretraining             what config/stage1.py trains on
    python prepare/download.py --datasets pixmo-cap chart-qa --num-samples 200
    python prepare/download.py --stage all --list              what there is, here and elsewhere; --check opens some of it
    python prepare/download.py --stage sft --dry-run           files and bytes, nothing is fetched
    python prepare/download.py --show-manual-instructions      what you must fetch yourself, and where to put it

datasets.csv has a line for each set. Its tables come from the hub, or from data/<name>/source/; convert.py makes records
of them; their media come from URLs, archives or the tables themselves, are opened to see that they are whole, and go
into uncompressed tars. Stop it any time: the same command goes on, and the files are in the end the same bytes.

In data/<name>/: train.jsonl, validation.jsonl, media-*.tar, lost.csv (media that could not be had, and why) and
manifest.json (counts, sizes, check sums), which comes last and says that the set is complete.
"""
import argparse
import csv
import fnmatch
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx                       # huggingface_hub brings it
import numpy as np
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert import CONVERTERS, Skip, fractions, runs  # noqa: E402
from table import TABLE, entries, sha256  # noqa: E402

from media import BadRow, Part, check_size, load_image, load_video, open_media, pyav  # noqa: E402

BRANCHES = 16                                # conversations of a record at most; an image with more becomes several
STAGES = {'pretraining': '1', 'sft': '2', 'long': '3', 'eval': 'eval', 'extra': 'extra'}
TABLES = ('.parquet', '.jsonl', '.json', '.csv', '.tsv', '.txt')


class Trouble(Exception):
    """What stops one dataset; the others go on."""


# ---------------------------------------------------------------------------------------------------------------------
# Fetching

class Fetcher:
    """Files of URLs, from many threads: so many at once from a host, each within `deadline` seconds and `max_bytes`.

    What may pass (no connection, 429, 5xx, a body cut short) is tried again, after what Retry-After asks for but `cap`
    seconds at most; the rest is final.
    """

    def __init__(self, per_host=8, deadline=60., max_bytes=2 ** 26, tries=4, pause=1., cap=30.):
        self.hosts, self.lock = defaultdict(lambda: threading.Semaphore(per_host)), threading.Lock()
        self.deadline, self.max_bytes, self.tries, self.pause, self.cap = deadline, max_bytes, tries, pause, cap
        self.client = httpx.Client(follow_redirects=True, timeout=httpx.Timeout(15., read=30.), max_redirects=5,
                                   limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
                                   headers={'user-agent': 'nanoMolmo2 prepare/download.py'})

    def get(self, url):
        """The bytes of a URL. BadRow says why not, in words to count by."""
        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL:
            raise BadRow('not a URL', url) from None
        with self.lock:
            turn = self.hosts[host]
        with turn:
            why = 'no answer'
            for i in range(self.tries):
                try:
                    data, why, wait = self._once(url)
                except httpx.UnsupportedProtocol:
                    raise BadRow('not a URL', url) from None
                except (httpx.TransportError, httpx.TooManyRedirects, httpx.DecodingError) as e:
                    data, why, wait = None, 'no answer' if isinstance(e, httpx.ConnectError) else 'cut short', 0.
                if data is not None:
                    return data
                if wait is None:
                    break
                if i < self.tries - 1:
                    time.sleep(min(max(wait, self.pause * 2 ** i), self.cap))
        raise BadRow(why, url)

    def _once(self, url):
        """(bytes or None, why not, seconds to wait before another try or None)"""
        end, parts, size = time.monotonic() + self.deadline, [], 0
        with self.client.stream('GET', url) as r:
            if r.status_code == 429 or r.status_code >= 500:
                after = r.headers.get('retry-after', '')
                return None, f'HTTP {r.status_code}', float(after) if after.isdigit() else 0.
            if r.status_code != 200:
                return None, f'HTTP {r.status_code}', None
            for part in r.iter_bytes():
                size += len(part)
                if size > self.max_bytes:
                    return None, 'too many bytes', None
                if time.monotonic() > end:
                    return None, 'too slow', None
                parts.append(part)
        return b''.join(parts), '', None

    def size(self, url):
        """Bytes of a URL's file, None if the server does not say."""
        try:
            r = self.client.head(url)
        except httpx.HTTPError as e:
            raise Trouble(f'{url}: {e or type(e).__name__}') from None
        if r.status_code != 200:
            raise Trouble(f'{url}: HTTP {r.status_code}')
        return int(r.headers['content-length']) if 'content-length' in r.headers else None

    def file(self, url, path):
        """An archive of any size, to a file: goes on where it stopped."""
        part = path.with_name(path.name + '.part')
        path.parent.mkdir(parents=True, exist_ok=True)
        for i in range(self.tries):
            have = part.stat().st_size if part.exists() else 0
            try:
                with self.client.stream('GET', url, headers={'range': f'bytes={have}-'} if have else {}) as r:
                    if r.status_code == 416 and have:      # nothing is left
                        break
                    if r.status_code not in (200, 206):
                        raise Trouble(f'{url}: HTTP {r.status_code}')
                    whole = r.status_code == 200
                    total = int(r.headers.get('content-length', 0)) + (0 if whole else have)
                    with open(part, 'wb' if whole else 'ab') as f, tqdm(
                            total=total, initial=0 if whole else have, unit='B', unit_scale=True, desc=path.name,
                            disable=None) as bar:
                        for piece in r.iter_bytes(2 ** 20):
                            f.write(piece)
                            bar.update(len(piece))
                if not total or part.stat().st_size == total:
                    break
            except httpx.TransportError as e:
                if i == self.tries - 1:
                    raise Trouble(f'{url}: {e or type(e).__name__}') from None
                time.sleep(min(self.pause * 2 ** i, self.cap))
        part.rename(path)


class Archives:
    """Zips, tars, also within one another, and folders as one: a file by its path, by the end of its path, or by its name
    without extension, where only one file can be meant. A folder of pictures that bears the name of a video is that
    video's frames."""
    INSIDE = ('.zip', '.tar', '.tar.gz', '.tgz')
    NO_MEDIA = ('.json', '.jsonl', '.txt', '.srt', '.vtt', '.csv', '.xml', '.wav', '.mp3', '.npy')

    def __init__(self, paths):
        self.members, self.lock = {}, threading.Lock()     # the path inside -> (archive, how to read it)
        for path in map(Path, paths):
            for name, how in self._found(path):            # two archives may hold different files of one path
                self.members[f'{path.stem}/{name}' if name in self.members else name] = how
        self.ends, self.stems, self.folders = defaultdict(list), defaultdict(list), defaultdict(dict)
        for name in self.members:
            *parents, last = name.split('/')
            for i in range(len(parents) + 1):
                self.ends['/'.join([*parents[i:], last])].append(name)
            if not last.lower().endswith(self.NO_MEDIA):
                self.stems[last.rpartition('.')[0]].append(name)
                if '_' in last:              # ViCaS adds to its videos' names
                    self.stems[last.partition('_')[0] + '_*'].append(name)
            if parents and last.lower().endswith(('.jpg', '.jpeg', '.png')):
                folder = parents[-2] if parents[-1] in ('img', 'imgs') and len(parents) > 1 else parents[-1]
                self.folders[folder].setdefault('/'.join(parents), []).append(name)

    def _found(self, path):
        """(name, (archive, how to read it)) of all files in a folder or an archive, or of a file."""
        if path.is_dir():
            names = [f.relative_to(path).as_posix() for f in sorted(path.rglob('*')) if f.is_file()]
            found = [(name, (path, name)) for name in names]
        elif zipfile.is_zipfile(path):
            z = zipfile.ZipFile(path)
            found = [(m.filename, (z, m)) for m in z.infolist() if not m.is_dir()]
        elif tarfile.is_tarfile(path) and compressed(path):          # no way into the middle of it
            unpacked = path.with_name(path.name + '.d')
            if not unpacked.exists():
                with tarfile.open(path) as tar:
                    tar.extractall(part := path.with_name(path.name + '.d.part'), filter='data')
                part.rename(unpacked)
            found = list(self._found(unpacked))
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                found = [(m.name.removeprefix('./'), (path, m)) for m in tar if m.isreg()]
        else:
            found = [(f'{path.parent.name}/{path.name}', (path.parent, path.name))]
        for name, (archive, how) in found:
            if not name.lower().endswith(self.INSIDE) or path.name == Path(name).name:
                yield name, (archive, how)
                continue
            inner = archive / how if isinstance(how, str) else path.with_name(f'{path.name}.{name.replace("/", "-")}')
            if not inner.exists():
                zipped, part = isinstance(archive, zipfile.ZipFile), inner.with_name(inner.name + '.part')
                source = archive.open(how) if zipped else Part(archive, how.offset_data, how.size)
                with source, open(part, 'wb') as f:
                    shutil.copyfileobj(source, f, 2 ** 20)
                part.rename(inner)
            yield from self._found(inner)

    def read(self, path):
        """The bytes of one file, or the list of those of a folder's pictures. BadRow if there is no such thing, or if
        there are several."""
        path = path.removeprefix('./')
        last = path.rpartition('/')[2]
        stem = last.rpartition('.')[0]
        found = self.ends.get(path) or self.ends.get(last) or self.stems.get(last) or self.stems.get(stem)
        if found:
            return self._bytes(only(found, path))
        if folders := self.folders.get(last) or self.folders.get(stem):    # masks lie in folders of the same names
            pictures = [f for f in folders if not re.search('annotation|mask', f, re.I)] or list(folders)
            return [self._bytes(frame) for frame in sorted(folders[only(pictures, path)], key=counted)]
        if found := self.stems.get(f'{last}_*'):
            return self._bytes(only(found, path))
        raise BadRow('not in the archives', path)

    def matching(self, pattern):
        return [name for name in self.members if fnmatch.fnmatch(name, pattern)]

    def _bytes(self, name):
        archive, member = self.members[name]
        try:
            if isinstance(member, str):
                return (archive / member).read_bytes()
            if isinstance(archive, zipfile.ZipFile):
                with self.lock:              # zipfile shares one position
                    return archive.read(member)
            with Part(archive, member.offset_data, member.size) as f:
                return f.read()
        except (OSError, zipfile.BadZipFile, zipfile.zlib.error) as e:
            raise BadRow('broken archive', f'{name}: {e}') from None


def counted(name):
    """To sort by: 9.jpg before 10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def only(names, asked):
    if len(names) > 1 and asked not in names:
        raise BadRow('several of that name', f'{asked}: {", ".join(names[:3])}')
    return asked if asked in names else names[0]


def compressed(path):
    with open(path, 'rb') as f:
        return f.read(6).startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ'))


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def split_files(info, config, split):
    """Names of a split's tables in a hub repository: as the card lists them, else by their names."""
    names = sorted(s.rfilename for s in info.siblings)
    configs = (info.card_data.to_dict() if info.card_data else {}).get('configs') or []
    for c in configs:
        if c.get('config_name', 'default') != (config or 'default') and len(configs) > 1:
            continue
        files = c.get('data_files') or []
        for f in [files] if isinstance(files, (str, dict)) else files:
            f = f if isinstance(f, dict) else {'split': 'train', 'path': f}
            if f.get('split', 'train') == split:
                patterns = [f['path']] if isinstance(f['path'], str) else f['path']
                return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    named = [n for n in names if n.endswith(TABLES) and re.search(rf'(^|[/_.-]){re.escape(split)}([/_.-]|$)', n)]
    inside = [n for n in named if config and re.search(rf'(^|[/_.-]){re.escape(config)}([/_.-]|$)', n)]
    return inside if config else named


def on_hub(call, *args, **how):
    """What the hub answers; a refusal, or that it cannot be reached, in one line."""
    try:
        return call(*args, **how)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as e:
        raise Trouble(f'{args[0]}: {str(e).splitlines()[0]}') from None


def find_tables(entry, split):
    """(revision, [(name, bytes)]) of a split on the hub: the files that the table of datasets names, those that the card
    names, or the parquet copies that the hub makes."""
    info = on_hub(HfApi().dataset_info, entry['hub'], files_metadata=True)
    if patterns := entry['tables'].replace('{split}', split).split():
        names = sorted(s.rfilename for s in info.siblings if any(fnmatch.fnmatch(s.rfilename, p) for p in patterns))
    elif not (names := split_files(info, entry['config'], split)):
        info = on_hub(HfApi().dataset_info, entry['hub'], revision='refs/convert/parquet', files_metadata=True)
        names = sorted(s.rfilename for s in info.siblings
                       if s.rfilename.startswith(f"{entry['config'] or 'default'}/{split}/"))
    if not names:
        raise Trouble(f"{entry['hub']} has no tables of {entry['config'] or 'its'} {split}")
    sizes = {s.rfilename: s.size or 0 for s in info.siblings}
    return info.sha, [(n, sizes[n]) for n in names]


def table_files(entry, split, fetcher, archives, work, args):
    """Paths of a split's tables: what the user put into source/, files of URLs, of the archives, or of the hub."""
    source = Path(args.out) / entry['name'] / 'source'
    if files := sorted(p for p in source.glob(f'{split}*') if p.suffix in TABLES):
        return files
    where = entry['tables'].replace('{split}', split)
    if where.startswith('http'):
        return [fetched(url, fetcher, args) for url in where.split()]
    if where.startswith('inside:'):
        files = []
        for i, name in enumerate(archives.matching(where.removeprefix('inside:'))):
            files.append(work / f"{split}-{i:05d}{Path(name).suffix}")
            files[-1].write_bytes(archives.read(name))
        if not files:
            raise Trouble(f'its archives hold no {where.removeprefix("inside:")}')
        return files
    if entry['hub'].count('/') != 1:
        raise Trouble(f"{source}/{split}.jsonl (or {', '.join(TABLES)}) is missing. {entry['instructions']}")
    pinned = work / f'{split}.tables.json'   # a run that goes on must not see a newer version
    if not pinned.exists():
        replace(pinned, json.dumps(find_tables(entry, split)))
    revision, names = json.loads(pinned.read_text())
    return fetch_files(entry['hub'], [name for name, _ in names], revision)


def fetched(url, fetcher, args):
    """The path of a URL's file, fetched once for all sets. What follows # is its name."""
    url, _, name = url.partition('#')
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]  # every other site has a train.json
    path = Path(args.out) / '.archives' / f"{digest}-{name or url.rpartition('/')[2]}"
    if not path.exists():
        fetcher.file(url, path)
    return path


def fetch_files(repo, names, revision):
    return [on_hub(hf_hub_download, repo, name, repo_type='dataset', revision=revision) for name in names]


def rows(path, split=''):
    """A table's rows as dicts: parquet, JSON lines, JSON, CSV, TSV, lines of text (as {'line': ..}). Of one JSON file for
    all splits ({"database": {id: {"subset": ..}}}) the rows of `split`. Broken bytes in text become U+FFFD."""
    path = Path(path)
    if path.suffix == '.parquet':
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:       # pyarrow does not look when it reads
                raw = [c.cast(pyarrow.binary()) if pyarrow.types.is_string(c.type) else c for c in batch.columns]
                for row in pyarrow.RecordBatch.from_arrays(raw, batch.schema.names).to_pylist():
                    yield {k: v.decode('utf-8', 'replace') if isinstance(v, bytes) and pyarrow.types.is_string(
                        batch.schema.field(k).type) else v for k, v in row.items()}
        return
    with open(path, encoding='utf-8-sig', errors='replace', newline='') as f:
        if path.suffix == '.jsonl':
            head = None
            for row in map(_json, filter(str.strip, f)):
                if isinstance(row, list) and head is None:           # SUTD-TrafficQA: names, then lists of values
                    head = row
                else:
                    yield dict(zip(head, row)) if isinstance(row, list) else row
        elif path.suffix == '.json':
            whole = json.load(f)
            if isinstance(whole, dict):
                whole = next((whole[k] for k in ('data', 'annotations', 'database', 'qa_pairs') if k in whole), whole)
            if isinstance(whole, dict) and not all(isinstance(v, dict) for v in whole.values()):
                whole = [whole]              # a file for each row
            yield from whole if isinstance(whole, list) else (
                {'video_id': k, **v} for k, v in whole.items() if str(v.get('subset', split)).startswith(split))
        elif path.suffix == '.txt':
            yield from ({'line': line.strip()} for line in f if line.strip())
        else:
            tabs = '\t' in f.readline()
            f.seek(0)
            lines = csv.reader(f, delimiter='\t' if tabs else ',')
            head = next(lines, [])
            if any(re.fullmatch(r'\[\d.*\]', cell) for cell in head):      # How2QA has no head
                lines, head = itertools.chain([head], lines), [str(i) for i in range(len(head))]
            yield from (dict(zip(head, line)) for line in lines)


def _json(line):
    try:
        return json.loads(line)
    except ValueError:
        return {}                            # a converter will miss what it needs


def rates_of(entry):
    """How many frames a second folders of frames have, by video; under None, what is true of the others. "fps:3", or
    "rates:owner/name:file", a JSON {video: rate}, among a set's media."""
    rates = {None: 6.}
    for what in entry['media'].split():
        if what.startswith('fps:'):
            rates[None] = float(what[4:])
        elif what.startswith('rates:'):
            revision, names = hub_files(what)
            for path in fetch_files(what.split(':')[1], [name for name, _ in names], revision):
                rates |= {video: float(rate) for video, rate in json.loads(Path(path).read_text()).items()}
    return rates


def subtitles_of(entry):
    """{video: its cues as JSON}, of the file that "subtitles:owner/name:file" among a set's media names: TVQA's lines
    {vid_name, sub: [{start, end, text}]}, or {video: {"0": {start, end, text}, ..}} of Molmo2-VideoMME."""
    told = {}
    for what in entry['media'].split():
        if what.startswith('subtitles:'):
            revision, names = hub_files(what)
            for path in fetch_files(what.split(':')[1], [name for name, _ in names], revision):
                for row in rows(path):
                    cues = row.get('sub') or [v for v in row.values() if isinstance(v, dict)]
                    cues = [c for c in cues if {'start', 'end', 'text'} <= c.keys()]
                    told[row.get('vid_name') or row.get('video_id')] = json.dumps(cues)
    return told


def drafts_of(entry, files, split):
    """The drafts of all tables, or why there is none of a row."""
    told = subtitles_of(entry)
    for i, row in enumerate(itertools.chain.from_iterable(rows(f, split) for f in files)):
        try:
            for draft in CONVERTERS[entry['converter']](row, entry['style'], random.Random(f"{entry['name']} {i}")):
                if told and (cues := told.get(draft.get('video', {}).get('path'))):
                    draft['subtitles'] = json.loads(cues)
                yield draft
        except Skip as e:
            yield str(e)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            yield f'other schema ({type(e).__name__} {e})'[:80]


def grouped(entry, files, split, path):
    """As drafts_of, but the conversations about the same media together, at the place of the first. Through a file:
    the largest set has 2.4 million rows."""
    if not path.exists():
        part = path.with_suffix('.part')
        part.unlink(missing_ok=True)
        db = sqlite3.connect(part, isolation_level=None)
        db.execute('PRAGMA journal_mode = OFF')
        db.execute('PRAGMA synchronous = OFF')
        db.execute('BEGIN')
        db.execute('CREATE TABLE keys (key TEXT PRIMARY KEY, first INTEGER) WITHOUT ROWID')
        db.execute('CREATE TABLE drafts (first INTEGER, draft TEXT)')
        drafts = tqdm(drafts_of(entry, files, split), desc=f"{entry['name']}: rows", unit='row', disable=None)
        for n, draft in enumerate(drafts):
            first = n
            if not isinstance(draft, str) and draft['key'] is not None:
                db.execute('INSERT OR IGNORE INTO keys VALUES (?, ?)', (draft['key'], n))
                first, = db.execute('SELECT first FROM keys WHERE key = ?', (draft['key'],)).fetchone()
            try:
                db.execute('INSERT INTO drafts VALUES (?, ?)', (first, json.dumps(draft)))
            except TypeError:                # bytes
                raise Trouble("its rows hold their pictures: in the table, media must be 'embedded', not "
                              f"{entry['media']!r}") from None
        db.execute('CREATE INDEX place ON drafts (first)')
        db.execute('COMMIT')
        db.close()
        part.rename(path)
    db = sqlite3.connect(path)
    everything = db.execute('SELECT first, draft FROM drafts ORDER BY first, rowid')
    for _, group in itertools.groupby(everything, lambda r: r[0]):
        group = [json.loads(draft) for _, draft in group]
        yield from (why for why in group if isinstance(why, str))
        group = [draft for draft in group if not isinstance(draft, str)]
        talks = list({json.dumps(t): t for draft in group for t in draft['conversations']}.values())
        for i in range(0, len(talks), BRANCHES):
            yield {**group[0], 'conversations': talks[i:i + BRANCHES]}


# ---------------------------------------------------------------------------------------------------------------------
# Media

def kind_of(data):
    """The extension that a file's first bytes ask for; '' for what is neither picture nor video."""
    for magic, extension in ((b'\xff\xd8\xff', 'jpg'), (b'\x89PNG', 'png'), (b'GIF8', 'gif'), (b'\x1aE\xdf\xa3', 'webm'),
                             (b'BM', 'bmp'), (b'II*\0', 'tif'), (b'MM\0*', 'tif'), (b'FLV', 'flv'), (b'\0\0\1\xba', 'mpg')):
        if data.startswith(magic):
            return extension
    if data[4:8] == b'ftyp':
        return 'avif' if data[8:11] == b'avi' else 'mp4'
    if data.startswith(b'RIFF'):
        return {b'WEBP': 'webp', b'AVI ': 'avi'}.get(data[8:12], '')
    return ''


def look(data, video, max_side=0, video_side=0):
    """(bytes to keep, extension, (width, height)) of a picture or video that opens. BadRow says why not."""
    if not (extension := kind_of(data)):
        text = data[:200].lstrip().lower()
        raise BadRow('a web page' if text.startswith((b'<!doc', b'<html')) else 'not a picture or video', '')
    if video:
        _, frames = load_video(io.BytesIO(data), 2)
        size = frames[0].size
        if video_side and max(size) > video_side:
            data, extension = smaller(data, video_side), 'mp4'
        return data, extension, size
    size = upright_size(data)
    if max_side and max(size) > max_side:
        image, out = load_image(io.BytesIO(data)), io.BytesIO()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        image.save(out, 'JPEG', quality=92)
        return out.getvalue(), 'jpg', size
    return data, extension, size


def upright_size(data):
    """(width, height) of a picture that decodes to its last byte. Of a JPEG only every eighth pixel is made: what costs
    most of the time is not needed to see that it is whole."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # of odd metadata
        try:
            image = Image.open(io.BytesIO(data))
            if image.format == 'JPEG':
                (width, height), turned = image.size, image.getexif().get(0x0112, 1) >= 5
                check_size(width, height, 'a picture')
                image.draft('RGB', (width // 8, height // 8))
                image.load()
                return (height, width) if turned else (width, height)
        except BadRow:
            raise
        except Exception as e:               # a damaged file makes a decoder raise whatever comes to hand
            raise BadRow('unreadable media', str(e)) from None
    return load_image(io.BytesIO(data)).size


def encode(frames, fps):
    """RGB arrays of one size -> the bytes of an MP4."""
    av, out = pyav(), io.BytesIO()
    with av.open(out, 'w', format='mp4') as container:
        stream = None
        for frame in frames:
            if stream is None:
                height, width = (n // 2 * 2 for n in frame.shape[:2])
                # one thread and no lookahead: the same bytes every time
                stream = container.add_stream('libx264', rate=fps, options={
                    'crf': '20', 'threads': '1', 'x264-params': 'rc-lookahead=0:mbtree=0'})
                stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), 'rgb24')))
        container.mux(stream.encode())
    return out.getvalue()


def smaller(data, side):
    """A video at its own rate, its longer side `side` pixels."""
    with pyav().open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        scale = side / max(stream.width, stream.height)
        size = [max(2, round(n * scale) // 2 * 2) for n in (stream.width, stream.height)]
        rate = round(stream.average_rate or 25)
        return encode((f.to_ndarray(format='rgb24', width=size[0], height=size[1]) for f in container.decode(stream)), rate)


def obtain(media, video, fps, fetcher, archives, args):
    """(bytes, extension, size) of a draft's media; BadRow."""
    if 'bytes' in media:
        data = media['bytes']
    elif 'url' in media:
        data = fetcher.get(media['url'])
    else:
        data = archives.read(media['path'])
        if isinstance(data, list):
            data = encode((np.asarray(load_image(io.BytesIO(frame))) for frame in data), round(fps))
    found = look(data, video, args.max_side, args.video_side)
    if media.get('sha256') and hashlib.sha256(data).hexdigest() != media['sha256']:
        raise BadRow('another picture', media['url'])
    return found


def settled(draft, sizes):
    """Conversations with points that were pixels as fractions of the picture. Skip where one is outside."""
    for talk in draft['conversations']:
        for message in talk['messages']:
            if message.pop('pixels', False):
                message['points']['points'] = fractions(message['points']['points'], *sizes[0])
                if 'box' in talk:
                    talk['box'] = [round(v / n, 4) for v, n in zip(talk['box'], sizes[0] * 2)]
    return draft['conversations']


# ---------------------------------------------------------------------------------------------------------------------
# Writing

class Writer:
    """Files that grow together. `commit` makes what was written so far the state that a killed run goes on from: all
    later bytes are cut off again. Media of one URL or path are stored once, however many records show them."""
    STATE = {'split': 0, 'place': 0, 'sizes': {}, 'counts': {}, 'tar': 0, 'files': 0}

    def __init__(self, folder, tar_bytes):
        self.folder, self.tar_bytes, self.open = folder, tar_bytes, {}
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / 'state.json'
        self.state = json.loads(state.read_text()) if state.exists() else json.loads(json.dumps(self.STATE))
        self.counts = Counter(self.state['counts'])
        for path in [*folder.glob('*.jsonl'), *folder.glob('*.tar'), *folder.glob('*.csv')]:
            with open(path, 'r+b') as f:
                f.truncate(self.state['sizes'].get(path.name, 0))
        self.stored = sqlite3.connect(folder / 'media.sqlite')
        self.stored.execute('CREATE TABLE IF NOT EXISTS media (name TEXT PRIMARY KEY, file INTEGER, path TEXT, '
                            'width INTEGER, height INTEGER) WITHOUT ROWID')
        self.stored.execute('DELETE FROM media WHERE file >= ?', (self.state['files'],))

    def known(self, name):
        """(path, width, height) of media that are stored already, or None."""
        return self.stored.execute('SELECT path, width, height FROM media WHERE name = ?', (name,)).fetchone()

    def write(self, name, data):
        if name not in self.open:
            self.open[name] = open(self.folder / name, 'ab')
        self.open[name].write(data)

    def media(self, medium, data, extension, size):
        """Adds a file to the current tar, unless it is there; returns its path for a record."""
        if (source := source_of(medium)) and (known := self.known(source)):
            return known[0]
        name = f"media-{self.state['tar']:05d}.tar"
        member = tarfile.TarInfo(f"{self.state['files']:08d}.{extension}")
        member.size = len(data)
        self.write(name, member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        self.state['files'] += 1
        if self.open[name].tell() > self.tar_bytes:
            self.close_tar()
        if source:
            self.stored.execute('INSERT INTO media VALUES (?, ?, ?, ?, ?)',
                                (source, self.state['files'] - 1, f'{name}/{member.name}', *size))
        return f'{name}/{member.name}'

    def close_tar(self):
        name = f"media-{self.state['tar']:05d}.tar"
        if name in self.open or name in self.state['sizes']:
            self.write(name, bytes(1024))    # two empty blocks end a tar
            self.state['tar'] += 1

    def commit(self, split, place):
        for f in self.open.values():
            f.flush()
            os.fsync(f.fileno())
        self.state.update(split=split, place=place, counts=dict(self.counts),
                          sizes=self.state['sizes'] | {name: f.tell() for name, f in self.open.items()})
        self.stored.commit()                 # first: what it says of later files is forgotten
        replace(self.folder / 'state.json', json.dumps(self.state))
        for name in [n for n in self.open if n.endswith('.tar') and n != f"media-{self.state['tar']:05d}.tar"]:
            self.open.pop(name).close()


def source_of(medium):
    return medium.get('url') or medium.get('path')


def ahead(drafts, get, known, workers, window):
    """(place, draft, [(medium, its future)]), in order; the media of `window` drafts are on their way, each once."""
    waiting, flying, users = deque(), {}, Counter()
    with ThreadPoolExecutor(workers) as pool:

        def future(medium, draft):
            source = source_of(medium)
            if source in flying:
                users[source] += 1
                return flying[source]
            if source and (stored := known(source)):
                (done := Future()).set_result((b'', '', stored[1:]))
                return done
            fetch = pool.submit(get, medium, draft)
            if source:
                flying[source], users[source] = fetch, 1
            return fetch

        def landed():
            yield (item := waiting.popleft())
            for source in filter(None, (source_of(medium) for medium, _ in item[2])):
                users[source] -= 1
                if users[source] <= 0:
                    flying.pop(source, None)
                    del users[source]

        try:
            for place, draft in drafts:
                media = [] if isinstance(draft, str) else draft['images'] if 'images' in draft else [draft['video']]
                waiting.append((place, draft, [(m, future(m, draft)) for m in media]))
                if len(waiting) > window:
                    yield from landed()
            while waiting:
                yield from landed()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def held_out(entry, draft, place):
    """Does a record go to validation.jsonl? About `validation` of them, by what they show."""
    share = float(entry['validation']) / max(1., float(entry['examples'] or 1e5)) if entry['validation'].isdigit() else 0.
    key = draft.get('key') or f'{place}'
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16 ** 8 < share


def convert_split(entry, split, target, writer, fetcher, archives, work, args):
    """Reads a split's tables and adds its records and media to the writer's files."""
    files = table_files(entry, split, fetcher, archives, work, args)
    embedded = entry['media'] in ('embedded', 'none')
    drafts = drafts_of(entry, files, split) if embedded else grouped(entry, files, split, work / f'{split}.sqlite')
    drafts = itertools.islice(enumerate(drafts), writer.state['place'], args.num_samples or None)
    rates = rates_of(entry)                  # of the frames themselves before that of the annotation
    fps = lambda media, draft: rates.get(media.get('path')) or draft.get('fps') or rates[None]
    get = lambda media, draft: obtain(media, 'video' in draft, fps(media, draft), fetcher, archives, args)
    window = 4 * args.workers if entry['media'] == 'urls' else args.workers
    bar = tqdm(ahead(drafts, get, writer.known, args.workers, window), desc=f"{entry['name']}: {target}", unit='record',
               disable=None, initial=writer.state['place'])
    for place, draft, media in bar:
        writer.counts['rows'] += 1
        try:
            if isinstance(draft, str):
                raise Skip(draft)
            add(entry, draft, media, target, place, writer, archives)
        except Skip as e:
            writer.counts[f'left out: {e}'] += 1
        if place % 200 == 199:
            writer.commit(writer.state['split'], place + 1)
            bar.set_postfix_str(f"kept {writer.counts['records']}")


def add(entry, draft, media, target, place, writer, archives):
    """A record with all its media, or a line in lost.csv for each that could not be had, and Skip."""
    found, lost = [], []
    for medium, future in media:
        try:
            found.append(future.result())
        except BadRow as e:
            lost.append((medium.get('url') or medium.get('path') or f'row {place}', e.reason))
    for where, why in lost:
        line = io.StringIO()
        csv.writer(line, lineterminator='\n').writerow([where, why])
        writer.write('lost.csv', line.getvalue().encode())
    if lost:
        raise Skip(lost[0][1])
    talks = settled(draft, [size for _, _, size in found])
    for talk in talks:
        if 'mask' in talk:                   # a picture: white where points belong
            try:
                mask = load_image(io.BytesIO(archives.read(talk['mask']))).convert('L')
            except BadRow as e:
                raise Skip(f'mask: {e.reason}') from None
            talk['mask'] = runs(np.asarray(mask) > 127)
    paths = [writer.media(medium, *f) for (medium, _), f in zip(media, found)]
    record = {'id': f"{entry['name']}-{place}", **({'video': paths[0]} if 'video' in draft else {'images': paths}),
              **{k: draft[k] for k in ('start', 'end', 'subtitles') if k in draft}, 'conversations': talks}
    if target == 'train' and held_out(entry, draft, place):
        target = 'validation'
    writer.write(f'{target}.jsonl', (json.dumps(record, ensure_ascii=False) + '\n').encode())
    writer.counts['records'] += 1
    writer.counts['conversations'] += len(talks)
    writer.counts['media'] += len(paths)


def splits(entry):
    """[(split of the source, file of ours)]"""
    target = 'validation' if entry['stages'] == 'eval' else 'train'
    out = [(s, target) for s in entry['split'].split()]
    if entry['validation'] and not entry['validation'].isdigit():
        out += [(s, 'validation') for s in entry['validation'].split()]
    return out


def prepare(entry, fetcher, args):
    """One dataset, whole; returns its manifest."""
    folder = Path(args.out) / entry['name']
    manifest = read_manifest(folder)
    if manifest and manifest['num_samples'] == args.num_samples and not changed(manifest, folder):
        return manifest
    work = folder / '.work'
    settings = {'num_samples': args.num_samples, 'max_side': args.max_side, 'video_side': args.video_side,
                'tar_bytes': args.tar_bytes, 'converter': entry['converter']}
    wanted = work / 'settings.json'
    if wanted.exists() and json.loads(wanted.read_text()) != settings:
        shutil.rmtree(work)                  # begun otherwise
    work.mkdir(parents=True, exist_ok=True)
    wanted.write_text(json.dumps(settings))
    if not (work / 'manifest.json').exists():
        archives = Archives(archive_files(entry, fetcher, args))
        parts, writer = splits(entry), Writer(work, args.tar_bytes)
        for i in range(writer.state['split'], len(parts)):
            convert_split(entry, *parts[i], writer, fetcher, archives, work, args)
            if i == len(parts) - 1:
                writer.close_tar()
            writer.commit(i + 1, 0)
        for f in writer.open.values():
            f.close()
        names = [name for name, size in writer.state['sizes'].items() if size]
        files = {name: [(work / name).stat().st_size, sha256(work / name)] for name in sorted(names)}
        manifest = {'name': entry['name'], 'hub': entry['hub'], 'num_samples': args.num_samples,
                    'counts': dict(writer.counts), 'files': files}
        for old in [*folder.glob('*.jsonl'), *folder.glob('media-*.tar'), folder / 'lost.csv', folder / 'manifest.json']:
            old.unlink(missing_ok=True)
        replace(work / 'manifest.json', json.dumps(manifest, indent=1))
    manifest = read_manifest(work)           # from here on only names change
    for name in manifest['files']:
        if (work / name).exists():
            (work / name).rename(folder / name)
    replace(folder / 'manifest.json', json.dumps(manifest, indent=1))
    shutil.rmtree(work)
    return manifest


def replace(path, text):
    """Writes a file that is there whole or not at all."""
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'w') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def archive_files(entry, fetcher, args):
    """Paths of the archives that hold a set's media: fetched once, for all sets that use them."""
    source = Path(args.out) / entry['name'] / 'source'
    out = [source] if source.is_dir() else []
    for what in entry['media'].split():
        if what.startswith(('hub:', 'parts:')):
            kind, repo, _ = what.split(':')
            revision, names = hub_files(what)
            files = fetch_files(repo, [name for name, _ in names], revision)
            if kind == 'parts':              # of one archive
                whole = Path(args.out) / '.archives' / f'{repo.replace("/", "--")}-{revision[:12]}'
                if not whole.exists():
                    whole.parent.mkdir(parents=True, exist_ok=True)
                    with open(part := whole.with_suffix('.part'), 'wb') as f:
                        for path in files:
                            with open(path, 'rb') as piece:
                                shutil.copyfileobj(piece, f, 2 ** 20)
                    part.rename(whole)
                files = [whole]
            out += files
        elif what.startswith('http'):
            out.append(fetched(what, fetcher, args))
        elif what == 'folder' and not source.is_dir():
            raise Trouble(f"{source}/ is missing. {entry['instructions']}")
    return out


def hub_files(what):
    """(revision, [(name, bytes)]) of "hub:owner/name:pattern"."""
    _, repo, pattern = what.split(':')
    info = on_hub(HfApi().dataset_info, repo, files_metadata=True)
    names = sorted((s.rfilename, s.size or 0) for s in info.siblings if fnmatch.fnmatch(s.rfilename, pattern))
    if not names:
        raise Trouble(f'{repo} has no files {pattern}')
    return info.sha, names


def read_manifest(folder):
    try:
        return json.loads((folder / 'manifest.json').read_text())
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# What there is

def asked_for(args):
    """The lines of datasets.csv that were asked for."""
    every = entries(args.table)
    if args.datasets:
        if unknown := set(args.datasets) - {e['name'] for e in every}:
            raise Trouble(f"no such dataset: {', '.join(sorted(unknown))}. --list shows all")
        return [e for e in every if e['name'] in args.datasets]
    wanted = {STAGES[args.stage]} if args.stage in STAGES else {'1', '2', '3', 'eval'}
    wanted |= {'eval'} if args.include_eval else set()
    return [e for e in every if wanted & set(e['stages'].split(','))]


def state_of(entry, out):
    """complete, begun, changed or -: what is in the folder."""
    folder = Path(out) / entry['name']
    manifest = read_manifest(folder)
    if manifest is None:
        return 'begun' if (folder / '.work').exists() else 'source' if (folder / 'source').exists() else '-'
    if wrong := changed(manifest, folder):
        return f"changed: {', '.join(wrong[:3])}"
    return 'complete' + (' (samples)' if manifest['num_samples'] else '')


def changed(manifest, folder):
    return [n for n, (size, _) in manifest['files'].items()
            if not (folder / n).is_file() or (folder / n).stat().st_size != size]


def show(chosen, args):
    print(f"{'dataset':<36}{'stages':<8}{'group':<18}{'task':<22}{'examples':>11}  {'media':<10}{'':<8}here")
    for e in chosen:
        size = f"{int(e['examples']):,}" if e['examples'] else '?'
        print(f"{e['name']:<36}{e['stages']:<8}{e['group'][:17]:<18}{e['task'][:21]:<22}{size:>11}  "
              f"{e['media'].split(':')[0]:<10}{'' if e['automatic'] == 'yes' else 'manual':<8}{state_of(e, args.out)}")


def some_lines(paths, n, chance):
    """(how many lines the files have, n of them at random), a line at a time."""
    lines, total = [], 0
    for path in paths:
        with open(path, 'rb') as f:
            for line in f:
                total += 1
                if len(lines) < n:
                    lines.append(line)
                elif (i := chance.randrange(total)) < n:
                    lines[i] = line
    return total, lines


def check(chosen, args):
    """Sizes and check sums against the manifest, and some media of each set opened. Returns the number of bad sets."""
    bad = 0
    for e in chosen:
        folder, manifest = Path(args.out) / e['name'], read_manifest(Path(args.out) / e['name'])
        if manifest is None:
            continue
        wrong = changed(manifest, folder)
        wrong += [n for n, (_, digest) in manifest['files'].items() if n not in wrong and sha256(folder / n) != digest]
        tables = [folder / n for n in manifest['files'] if n.endswith('.jsonl') and (folder / n).is_file()]
        total, lines = some_lines(tables, args.check, random.Random(0))
        opened = 0
        for line in lines:
            record = json.loads(line)
            try:
                for path in record.get('images', []):
                    load_image(open_media(folder, path))
                if 'video' in record:
                    load_video(open_media(folder, record['video']), 2)
                opened += 1
            except BadRow as error:
                wrong.append(f"{record['id']}: {error}")
        bad += bool(wrong)
        print(f"{e['name']:<36}{total:>9,} records  {opened} opened  "
              + (f"WRONG: {'; '.join(wrong[:3])}" if wrong else 'as written'))
    return bad


def dry_run(chosen, fetcher):
    """Files and bytes that would be fetched."""
    for e in chosen:
        if e['automatic'] != 'yes':
            print(f"{e['name']:<36}manual")
            continue
        try:
            tables, media = [], []
            for split, _ in splits(e):
                where = e['tables'].replace('{split}', split)
                if where.startswith('http'):
                    tables += [fetcher.size(url) for url in where.split()]
                elif not where.startswith('inside:'):
                    tables += [size for _, size in find_tables(e, split)[1]]
            for what in e['media'].split():
                if what.startswith('http'):
                    media.append(fetcher.size(what))
                elif what.startswith(('hub:', 'parts:')):
                    media += [size for _, size in hub_files(what)[1]]
            mb = lambda sizes: f"{sum(filter(None, sizes)) / 1e6:,.1f} MB" + (' and more' if None in sizes else '')
            urls = f", then about {int(e['examples']):,} URLs" if e['media'] == 'urls' and e['examples'] else ''
            print(f"{e['name']:<36}{len(tables)} tables, {mb(tables)}"
                  + (f', {len(media)} archives, {mb(media)}' if media else '') + urls)
        except Trouble as error:
            print(f"{e['name']:<36}error: {error}")


def report(manifests):
    print(f"\n{'dataset':<36}{'rows':>10}{'records':>10}{'share':>8}{'media':>10}{'MB':>10}")
    for m in manifests:
        c = m['counts']
        size = sum(size for size, _ in m['files'].values())
        share = c.get('records', 0) / max(1, c.get('rows', 0))
        print(f"{m['name']:<36}{c.get('rows', 0):>10,}{c.get('records', 0):>10,}{share:>8.1%}"
              f"{c.get('media', 0):>10,}{size / 1e6:>10,.1f}")
        left = [(n, k.removeprefix('left out: ')) for k, n in c.items() if k.startswith('left out: ')]
        if left:
            print('    left out: ' + ', '.join(f'{why} {n:,}' for n, why in sorted(left, reverse=True)[:8]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stage', choices=[*STAGES, 'all'])
    parser.add_argument('--include-eval', action='store_true', help='the evaluation sets, too')
    parser.add_argument('--datasets', nargs='+', metavar='NAME')
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--check', type=int, nargs='?', const=8, metavar='N', help='open N media of each set (8)')
    parser.add_argument('--pages', type=int, nargs='?', const=8, metavar='N', help='HTML: all sets, N records of each (8)')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--show-manual-instructions', action='store_true')
    parser.add_argument('--num-samples', type=int, default=0, metavar='N', help='the first N records of each split')
    parser.add_argument('--workers', type=int, default=32)
    parser.add_argument('--per-host', type=int, default=8, help='connections to one host')
    parser.add_argument('--deadline', type=float, default=60., help='seconds for one picture or video')
    parser.add_argument('--patience', type=float, default=30., help='seconds at most that a Retry-After is obeyed')
    parser.add_argument('--max-bytes', type=int, default=2 ** 26, help='of one picture or video')
    parser.add_argument('--max-side', type=int, default=0, help='re-encode pictures that are larger; 0: none')
    parser.add_argument('--video-side', type=int, default=0, help='likewise videos')
    parser.add_argument('--tar-bytes', type=int, default=2 ** 30)
    parser.add_argument('--out', default='data')
    parser.add_argument('--table', default=TABLE)
    args = parser.parse_args()
    if not (args.stage or args.datasets):
        if not (args.list or args.check or args.pages or args.show_manual_instructions):
            parser.error('give --stage or --datasets')
        args.stage = 'all'
    chosen = asked_for(args)
    if args.list:
        return show(chosen, args)
    if args.check:
        return sys.exit(check(chosen, args) and 1)
    if args.pages:
        from pages import write
        write(chosen, args.out, args.pages, {e['name']: state_of(e, args.out) for e in chosen},
              {e['name']: read_manifest(Path(args.out) / e['name']) for e in chosen})
        return print(f'wrote {args.out}/index.html')
    if args.show_manual_instructions:
        for e in chosen:
            if e['automatic'] != 'yes':
                print(f"{e['name']} ({e['hub']})\n    {e['instructions']}\n"
                      f"    then: python prepare/download.py --datasets {e['name']}")
        return
    fetcher, done, failed = Fetcher(args.per_host, args.deadline, args.max_bytes, cap=args.patience), [], 0
    if args.dry_run:
        return dry_run(chosen, fetcher)
    for e in chosen:
        if e['automatic'] != 'yes' and not args.datasets and not (Path(args.out) / e['name'] / 'source').exists():
            print(f"{e['name']}: to be fetched by hand (--show-manual-instructions)")
            continue
        try:
            done.append(prepare(e, fetcher, args))
        except Trouble as error:
            failed += 1
            print(f"error: {e['name']}: {error}", file=sys.stderr)
    report(done)
    sys.exit(failed and 1)


if __name__ == '__main__':
    try:
        main()
    except Trouble as e:
        sys.exit(f'error: {e}')
