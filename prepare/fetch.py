"""Fetching over HTTP and from the hub, and reading of archives. Used by download.py.

    Fetcher      files of URLs from many threads, with limits on time, bytes and connections
    Archives     the files of zips, tars and folders, found by their paths or names
    hub_files    names and sizes of the files in a hub repository
    Trouble      the error that stops one dataset, while the others go on

There are two sorts of failure. A picture that cannot be had raises `BadRow`, and its reason is
counted. What a whole dataset needs and does not get raises `Trouble`, whose text the user sees.
Which files a dataset needs is not decided here but in sources.py.
"""
import fnmatch
import hashlib
import re
import shutil
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import httpx2 as httpx                       # huggingface_hub depends on it, so it is installed
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from media import BadRow, Part  # noqa: E402


class Trouble(Exception):
    """A reason why one dataset cannot be made, in one line for the user."""


class Passing(Exception):
    """A failure that may pass; the server asks to wait for `wait` seconds before another try."""

    def __init__(self, reason, wait=0.):
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


# --------------------------------------------------------------------------------------------------
# HTTP

class Fetcher:
    """Fetches files of URLs from many threads at once.

    Limits: `per_host` connections to one host; `deadline` seconds and `max_bytes` bytes for a file.
    What may pass (no connection, status 429 or 5xx, a body cut short) is tried `tries` times in
    all. Between two tries it waits for `pause` seconds, which double each time, or for as long as
    Retry-After asks, but for `cap` seconds at most. All other failures are final.
    """

    def __init__(self, per_host=8, deadline=60., max_bytes=2 ** 26, tries=4, pause=1., cap=30.):
        self.deadline = deadline
        self.max_bytes = max_bytes
        self.tries = tries
        self.pause = pause
        self.cap = cap
        self.lock = threading.Lock()         # guards `hosts`, in which a look-up adds a key
        self.hosts = defaultdict(lambda: threading.Semaphore(per_host))
        self.client = httpx.Client(
            follow_redirects=True,
            max_redirects=5,
            timeout=httpx.Timeout(15., read=30.),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            headers={'user-agent': 'nanoMolmo2 prepare/download.py'})

    def get(self, url):
        """The bytes of a URL. Raises BadRow with a reason of few words, which is counted."""
        # A table may have a text in its URL column that is none.
        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL:
            raise BadRow('not a URL', url) from None
        with self.lock:
            connections = self.hosts[host]
        # The place among the host's connections is kept during the pauses, so that a busy host gets
        # no more requests meanwhile.
        with connections:
            for attempt in range(1, self.tries + 1):
                try:
                    return self._get_once(url)
                except Passing as e:
                    if attempt == self.tries:
                        raise BadRow(e.reason, url) from None
                    seconds = max(e.wait, self._pause_after(attempt))
                time.sleep(min(seconds, self.cap))

    def _pause_after(self, attempt):
        """Seconds to wait after failed attempt 1, 2, .."""
        return self.pause * 2 ** (attempt - 1)

    def _get_once(self, url):
        """The bytes of a URL. Raises Passing where another try may help, else BadRow."""
        # A host that cannot be reached is told apart from one that breaks off, in the report only.
        try:
            with self.client.stream('GET', url) as response:
                return self._body(response, url)
        except httpx.UnsupportedProtocol:
            raise BadRow('not a URL', url) from None
        except httpx.ConnectError:
            raise Passing('no answer') from None
        except (httpx.TransportError, httpx.TooManyRedirects, httpx.DecodingError):
            raise Passing('cut short') from None

    def _body(self, response, url):
        end = time.monotonic() + self.deadline
        status = response.status_code
        if status == 429 or status >= 500:
            seconds = response.headers.get('retry-after', '')
            wait = float(seconds) if seconds.isdigit() else 0.
            raise Passing(f'HTTP {status}', wait)
        if status != 200:
            raise BadRow(f'HTTP {status}', url)
        # The body is read piece by piece, because its announced length may be missing or wrong.
        parts = []
        size = 0
        for part in response.iter_bytes():
            size += len(part)
            if size > self.max_bytes:
                raise BadRow('too many bytes', url)
            if time.monotonic() > end:
                raise BadRow('too slow', url)
            parts.append(part)
        return b''.join(parts)

    def size(self, url):
        """The bytes that a URL's file has, or None if the server does not say. Raises Trouble."""
        try:
            response = self.client.head(url)
        except httpx.HTTPError as e:
            raise Trouble(f'{url}: {e or type(e).__name__}') from None
        if response.status_code != 200:
            raise Trouble(f'{url}: HTTP {response.status_code}')
        if 'content-length' not in response.headers:
            return None
        return int(response.headers['content-length'])

    def save(self, url, path):
        """Writes a file of any size to `path`. It goes on where an earlier run stopped.

        A broken connection is tried again as in `get`. Raises Trouble.
        """
        part = path.with_name(path.name + '.part')
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, self.tries + 1):
            # After a broken connection the next attempt appends to what is there.
            try:
                is_complete = self._append(url, part, path.name)
            except httpx.TransportError as e:
                if attempt == self.tries:
                    raise Trouble(f'{url}: {e or type(e).__name__}') from None
                time.sleep(min(self._pause_after(attempt), self.cap))
                continue
            if is_complete:
                break
        part.rename(path)

    def _append(self, url, part, title):
        """Fetches what the file `part` lacks, with a progress bar; returns if it is complete."""
        # A range of bytes is asked for, from the end of what an earlier attempt has written.
        have = part.stat().st_size if part.exists() else 0
        headers = {'range': f'bytes={have}-'} if have else {}
        with self.client.stream('GET', url, headers=headers) as response:
            if response.status_code == 416 and have:       # nothing comes after what we have
                return True
            if response.status_code not in (200, 206):
                raise Trouble(f'{url}: HTTP {response.status_code}')
            if response.status_code == 200:  # the server does not know ranges and sends all of it
                have = 0
            total = have + int(response.headers.get('content-length', 0))
            bar = tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=title,
                       disable=None)
            with open(part, 'ab' if response.status_code == 206 else 'wb') as f, bar:
                for piece in response.iter_bytes(2 ** 20):
                    f.write(piece)
                    bar.update(len(piece))
        return not total or part.stat().st_size == total


def fetch_once(url, fetcher, out):
    """The path of a URL's file, which is fetched once for all datasets in the folder `out`.

    The file bears the name that follows a # in the URL, else the last part of the URL.
    """
    url, _, name = url.partition('#')
    name = name or url.rpartition('/')[2]
    # The digest tells files of one name apart, because many sites have a train.json.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(out) / '.archives' / f'{digest}-{name}'
    if not path.exists():
        fetcher.save(url, path)
    return path


# --------------------------------------------------------------------------------------------------
# The hub

def on_hub(call, repo, *args, **options):
    """What a function of huggingface_hub returns. Raises Trouble if the hub refuses or is away."""
    # Not found, no permission and no network are all told in the hub's own words.
    try:
        return call(repo, *args, **options)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as e:
        first_line = str(e).splitlines()[0]
        raise Trouble(f'{repo}: {first_line}') from None


def dataset_info(repo, **options):
    """The revision, card and files of a dataset's repository, with the files' sizes."""
    return on_hub(HfApi().dataset_info, repo, files_metadata=True, **options)


def hub_files(place):
    """(revision, [(name, bytes)]) of a place like "hub:owner/name:pattern" in datasets.csv."""
    _, repo, pattern = place.split(':')
    info = dataset_info(repo)
    files = []
    for file in info.siblings:
        if fnmatch.fnmatch(file.rfilename, pattern):
            files.append((file.rfilename, file.size or 0))
    if not files:
        raise Trouble(f'{repo} has no files {pattern}')
    return info.sha, sorted(files)


def fetch_from_hub(repo, names, revision):
    """The paths of files of a dataset's repository, in the cache of huggingface_hub."""
    paths = []
    for name in names:
        path = on_hub(hf_hub_download, repo, name, repo_type='dataset', revision=revision)
        paths.append(path)
    return paths


def fetch_place(place):
    """The paths of all files of a place like "hub:owner/name:pattern"."""
    _, repo, _ = place.split(':')
    revision, files = hub_files(place)
    return fetch_from_hub(repo, [name for name, _ in files], revision)


# --------------------------------------------------------------------------------------------------
# Archives

class Archives:
    """Reads files from zips, tars and folders, and from archives within them, as if they were one.

    A file is found by its path, by the end of its path, or by its name without extension, where
    only one file can be meant. A folder of pictures is found by its name, because that is how
    datasets store the frames of a video.
    """
    INNER = ('.zip', '.tar', '.tar.gz', '.tgz')
    PICTURES = ('.jpg', '.jpeg', '.png')
    NO_MEDIA = ('.json', '.jsonl', '.txt', '.srt', '.vtt', '.csv', '.xml', '.wav', '.mp3', '.npy')

    def __init__(self, paths):
        self.lock = threading.Lock()         # a zip has one reading position for all threads
        # name -> (archive, member): a folder and a path in it, a ZipFile and a ZipInfo, or the path
        # of a tar and a TarInfo
        self.members = {}
        for path in map(Path, paths):
            for name, member in self._list(path):
                # Two archives may hold different files of one path.
                if name in self.members:
                    name = f'{path.stem}/{name}'
                self.members[name] = member

        self.by_end = defaultdict(list)      # an end of a path, of whole parts -> names
        self.by_stem = defaultdict(list)     # a file's name without extension -> names
        self.folders = defaultdict(dict)     # a folder's name -> its path -> names of its pictures
        for name in self.members:
            self._index(name)

    def _index(self, name):
        *parents, last = name.split('/')
        for i in range(len(parents) + 1):
            end = '/'.join([*parents[i:], last])
            self.by_end[end].append(name)
        if not last.lower().endswith(self.NO_MEDIA):
            stem = last.rpartition('.')[0]
            self.by_stem[stem].append(name)
            # ViCaS adds an underscore and more to the names of videos.
            if '_' in last:
                self.by_stem[last.partition('_')[0] + '_*'].append(name)
        if parents and last.lower().endswith(self.PICTURES):
            folder = parents[-1]
            # LaSOT keeps the frames of a video in <video>/img.
            if folder in ('img', 'imgs') and len(parents) > 1:
                folder = parents[-2]
            self.folders[folder].setdefault('/'.join(parents), []).append(name)

    def _list(self, path):
        """Yields (name, (archive, member)) of all files in a folder or archive, or of one file."""
        if path.is_dir():
            found = list_folder(path)
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            members = [m for m in archive.infolist() if not m.is_dir()]
            found = [(m.filename, (archive, m)) for m in members]
        elif tarfile.is_tarfile(path) and is_compressed(path):
            # A compressed tar is unpacked, because there is no way into the middle of it.
            found = list(self._list(unpack(path)))
        elif tarfile.is_tarfile(path):
            # A plain tar stays closed between reads: TarInfo knows where in it a member lies.
            with tarfile.open(path) as tar:
                found = [(m.name.removeprefix('./'), (path, m)) for m in tar if m.isreg()]
        else:
            found = [(f'{path.parent.name}/{path.name}', (path.parent, path.name))]

        for name, (archive, member) in found:
            is_inner = name.lower().endswith(self.INNER)
            # What bears the path's own name is not an archive, although it is called so.
            if is_inner and Path(name).name != path.name:
                yield from self._list(self._extract(path, name, archive, member))
            else:
                yield name, (archive, member)

    def _extract(self, path, name, archive, member):
        """The path of an archive within an archive, which is copied out of it the first time."""
        if isinstance(member, str):
            return archive / member
        inner = path.with_name(f'{path.name}.{name.replace("/", "-")}')
        if not inner.exists():
            part = inner.with_name(inner.name + '.part')
            if isinstance(archive, zipfile.ZipFile):
                source = archive.open(member)
            else:
                source = Part(archive, member.offset_data, member.size)
            # It is copied under another name first, so that an interrupted copy is not used.
            with source, open(part, 'wb') as f:
                shutil.copyfileobj(source, f, 2 ** 20)
            part.rename(inner)
        return inner

    def read(self, path):
        """The bytes of one file, or a list with those of a folder's pictures in order.

        Raises BadRow if there is no such file, or if there are several.
        """
        path = path.removeprefix('./')
        last = path.rpartition('/')[2]
        stem = last.rpartition('.')[0]
        # The whole path comes first, because the less of it is compared, the more files match.
        names = (self.by_end.get(path) or self.by_end.get(last)
                 or self.by_stem.get(last) or self.by_stem.get(stem))
        if names:
            return self._bytes(only(names, path))

        # A folder of frames has the video's name, which may come with the extension of a video.
        folders = self.folders.get(last) or self.folders.get(stem)
        if folders:
            # Datasets keep masks in folders of the same names, which are not meant.
            unmasked = [f for f in folders if not re.search('annotation|mask', f, re.I)]
            folder = only(unmasked or list(folders), path)
            names = sorted(folders[folder], key=by_number)
            return [self._bytes(name) for name in names]

        names = self.by_stem.get(f'{last}_*')
        if names:
            return self._bytes(only(names, path))
        raise BadRow('not in the archives', path)

    def matching(self, pattern):
        """The names of all files that match a pattern like "*/train.json"."""
        return [name for name in self.members if fnmatch.fnmatch(name, pattern)]

    def _bytes(self, name):
        archive, member = self.members[name]
        # A damaged archive shows in the member that is read, so it costs this member only.
        try:
            if isinstance(member, str):
                return (archive / member).read_bytes()
            if isinstance(archive, zipfile.ZipFile):
                with self.lock:
                    return archive.read(member)
            with Part(archive, member.offset_data, member.size) as f:
                return f.read()
        except (OSError, zipfile.BadZipFile, zlib.error) as e:
            raise BadRow('broken archive', f'{name}: {e}') from None


def list_folder(path):
    """[(name, (folder, name))] of all files in a folder."""
    found = []
    for file in sorted(path.rglob('*')):
        if file.is_file():
            name = file.relative_to(path).as_posix()
            found.append((name, (path, name)))
    return found


def unpack(path):
    """The folder with the contents of a tar. tarfile raises if a member would lie outside."""
    unpacked = path.with_name(path.name + '.d')
    if not unpacked.exists():
        # filter='data' refuses names like ../file and absolute paths.
        part = path.with_name(path.name + '.d.part')
        with tarfile.open(path) as tar:
            tar.extractall(part, filter='data')
        part.rename(unpacked)
    return unpacked


def by_number(name):
    """A key that sorts 9.jpg before 10.jpg."""
    parts = re.split(r'(\d+)', name)
    return [int(part) if part.isdigit() else part for part in parts]


def only(names, asked):
    """The one of `names` that was asked for. Raises BadRow if it could be several."""
    if asked in names:
        return asked
    if len(names) > 1:
        raise BadRow('several of that name', f'{asked}: {", ".join(names[:3])}')
    return names[0]


def is_compressed(path):
    """Whether a file begins as gzip, bzip2 or xz files do."""
    with open(path, 'rb') as f:
        return f.read(6).startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ'))
