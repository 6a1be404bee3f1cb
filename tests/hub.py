"""A hub for tests: it answers as the Hugging Face hub does, and serves media well or badly.

    with Hub(folder) as hub:           then HF_ENDPOINT=hub.url
        hub.media['a.jpg'] = bytes     then hub.url + '/media/fine/a.jpg'

Repositories are the folders folder/datasets/<owner>/<name> and folder/models/<owner>/<name>.
Instead of /fine a picture's URL may have another manner, which `serve_medium` lists: /slow, /cut,
/gone and so on. hub.asked counts the requests for each path, and hub.most is how many media were
asked for at once.

    python tests/hub.py --rows=5000    compares the speed of download.py with a bare loop of fetches
"""
import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parent.parent
REVISION = '0123456789abcdef0123456789abcdef01234567'
CONVERTED = 'c' * 40       # the revision of refs/convert/parquet, with the hub's parquet copies
OFFERED = 'd' * 40         # the revision of refs/pr/1, in which a robot offers safetensors
BRANCHES = {CONVERTED: '.convert', OFFERED: '.pr'}     # revision -> folder in the repository
LARGE = ('.parquet', '.safetensors', '.zip')                   # files that lie behind a redirect


class Hub:
    def __init__(self, folder):
        self.folder = Path(folder)
        self.media = {}        # name -> bytes
        self.cards = {}        # repository -> its card's metadata
        self.lies = set()      # names of files whose check sum is listed wrongly
        self.asked = Counter() # path -> requests
        self.now = 0           # media that are being served
        self.most = 0          # the most of them at once
        self.lock = threading.Lock()
        # Each request gets a handler of its own, which finds this hub in its server.
        self.server = ThreadingHTTPServer(('localhost', 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        # Tests kill programs in the middle of a request. The server would print an error for each.
        self.server.handle_error = lambda *_: None
        self.url = f'http://localhost:{self.server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        """Requests are not logged."""

    def answer(self, status, body=b'', length=None, **headers):
        """Sends an answer. `length` is what Content-Length says, if it is not the body's."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type='application/json')

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        # A HEAD does not count, but the path becomes known, so that tests see what was asked for.
        hub.asked[self.path] += 1 if self.command == 'GET' else 0
        parts = unquote(urlparse(self.path).path).strip('/').split('/')
        # Whoever asked may have been killed meanwhile, and does not need the answer.
        try:
            if parts[0] == 'api' and parts[4:] == ['discussions']:
                self.list_offers('/'.join(parts[2:4]))
            elif parts[0] == 'api':
                self.list_files(parts[1], '/'.join(parts[2:4]), parts[5:])
            elif parts[0] == 'media':
                self.count_and_serve(parts[1], '/'.join(parts[2:]))
            elif 'resolve' in parts:
                self.serve_from_repository(parts)
            elif parts[0] == 'cdn':
                self.serve_file(hub.folder / '/'.join(parts[1:]), False)
            else:
                self.answer(404)
        except (BrokenPipeError, ConnectionResetError):
            pass

    # -- repositories

    def list_files(self, kind, repo, revision):
        """api/<datasets or models>/<owner>/<name>/revision/<revision>: what the repository has."""
        hub = self.server.hub
        sha = REVISION
        if 'convert' in revision:
            sha = CONVERTED
        elif 'pr' in revision:
            sha = OFFERED
        root = hub.folder / kind / repo / BRANCHES.get(sha, '')
        if not root.is_dir():
            body = b'{"error": "Repository not found"}'
            return self.answer(404, body, X_Error_Code='RepoNotFound')
        siblings = []
        for path in sorted(root.rglob('*')):
            name = path.relative_to(root)
            if path.is_file() and name.parts[0] not in BRANCHES.values():
                siblings.append(self.describe_file(path, name.as_posix()))
        self.answer_json({
            'id': repo, 'sha': sha, 'cardData': hub.cards.get(repo), 'private': False,
            'gated': False, 'downloads': 0, 'likes': 0, 'tags': [], 'siblings': siblings})

    def describe_file(self, path, name):
        size = path.stat().st_size
        about = {'rfilename': name, 'size': size}
        if path.suffix in LARGE:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if name in self.server.hub.lies:
                digest = '0' * 64
            about['lfs'] = {'sha256': digest, 'size': size, 'pointerSize': 134}
        return about

    def list_offers(self, repo):
        """The pull request of the hub's robot, if the repository has a folder .pr."""
        has_offer = (self.server.hub.folder / 'models' / repo / '.pr').is_dir()
        offers = []
        if has_offer and 'author=SFconvertbot' in self.path:
            offers.append({
                'title': 'Adding `safetensors` variant of this model', 'num': 1,
                'author': {'name': 'SFconvertbot'}, 'createdAt': '2026-11-22T00:00:00.000Z',
                'status': 'open', 'repo': {'name': repo, 'type': 'model'}, 'isPullRequest': True})
        self.answer_json({'count': len(offers), 'start': 0, 'discussions': offers})

    def serve_from_repository(self, parts):
        """[datasets/]<owner>/<name>/resolve/<revision>/<file>"""
        i = parts.index('resolve')
        kind = parts[0] if parts[0] == 'datasets' else 'models'
        repo = '/'.join(parts[i - 2:i])
        branch = BRANCHES.get(parts[i + 1], '')
        name = '/'.join(parts[i + 2:])
        self.serve_file(self.server.hub.folder / kind / repo / branch / name, True)

    def serve_file(self, path, is_in_repository):
        hub = self.server.hub
        if not path.is_file():
            return self.answer(404, X_Error_Code='EntryNotFound')
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if is_in_repository and path.suffix in LARGE:
            sha = REVISION
            for revision, folder in BRANCHES.items():
                if folder in path.parts:
                    sha = revision
                    break
            return self.answer(
                302, X_Repo_Commit=sha, X_Linked_Etag=etag, X_Linked_Size=str(len(body)),
                Location=f'{hub.url}/cdn/{path.relative_to(hub.folder)}', ETag=etag)
        headers = {'ETag': etag, 'Accept_Ranges': 'bytes', 'X_Repo_Commit': REVISION}
        asked = self.headers.get('Range', '')
        if not asked.startswith('bytes='):
            return self.answer(200, body, **headers)
        first = int(asked.removeprefix('bytes=').split('-')[0])
        if first >= len(body):
            return self.answer(416, **headers)
        headers['Content_Range'] = f'bytes {first}-{len(body) - 1}/{len(body)}'
        self.answer(206, body[first:], **headers)

    # -- media

    def count_and_serve(self, manner, name):
        hub = self.server.hub
        with hub.lock:
            hub.now += 1
            hub.most = max(hub.most, hub.now)
        try:
            self.serve_medium(manner, name)
        finally:
            with hub.lock:
                hub.now -= 1

    def serve_medium(self, manner, name):
        """Serves /media/<manner>/<name> in one of these manners.

        fine; gone: 404; busy: 429 the first time; angry: 429 always; broken: 500 twice; page: a web
        page instead; cut: half of it, and the connection breaks off; slow: 100 bytes every .2 s.
        """
        hub = self.server.hub
        data = hub.media.get(name, b'')
        earlier = hub.asked[self.path] - 1     # requests for this path before this one
        if manner == 'gone':
            self.answer(404)
        elif manner == 'angry' or manner == 'busy' and not earlier:
            self.answer(429, Retry_After='86400')
        elif manner == 'broken' and earlier < 2:
            self.answer(500)
        elif manner == 'page':
            page = b'<!DOCTYPE html><html>This picture is gone.</html>'
            self.answer(200, page, Content_Type='image/jpeg')
        elif manner == 'cut':
            self.answer(200, data[:len(data) // 2], len(data))
            self.close_connection = True
        elif manner == 'slow':
            self.answer(200, b'', len(data))
            for i in range(0, len(data), 100):
                self.wfile.write(data[i:i + 100])
                self.wfile.flush()
                time.sleep(.2)
        else:
            self.answer(200, data)


# --------------------------------------------------------------------------------------------------
# The speed of download.py

HEAD = ('name,stages,task,group,rate,hub,config,tables,split,validation,examples,style,converter,'
        'media,automatic,instructions\n')


def resident_kib(process):
    """The memory of a process in KiB, or None when it has ended.

    getrusage would count this process too, because a new process begins as its copy.
    """
    for line in Path(f'/proc/{process.pid}/status').read_text().splitlines():
        if line.startswith('VmRSS'):
            return int(line.split()[1])
    return None


def main():
    """Compares download.py, which also opens and writes pictures, with a bare loop of fetches."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image
    sys.path[:0] = [str(ROOT), str(ROOT / 'prepare')]
    from fetch import Fetcher

    parser = argparse.ArgumentParser()
    parser.add_argument('--rows', type=int, default=5000)
    parser.add_argument('--workers', type=int, default=32)
    parser.add_argument('--side', type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Hub(Path(folder) / 'hub') as hub:
        small = args.side // 8
        for i in range(16):
            noise = np.random.default_rng(i).integers(0, 256, (small, small, 3), dtype=np.uint8)
            out = io.BytesIO()
            picture = Image.fromarray(noise).resize((args.side, args.side))
            picture.save(out, 'JPEG', quality=85)
            hub.media[f'{i}.jpg'] = out.getvalue()
        # What follows the ? makes the URLs differ, so that each row is fetched.
        urls = [f'{hub.url}/media/fine/{i % 16}.jpg?{i}' for i in range(args.rows)]
        path = Path(folder) / 'hub/datasets/o/cap/train.parquet'
        path.parent.mkdir(parents=True)
        columns = {
            'image_url': urls,
            'caption': ['A picture.'] * args.rows,
            'transcripts': [[]] * args.rows,
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        line = 'cap,1,,,,o/cap,,,train,,,,caption,urls,yes,\n'
        (Path(folder) / 'table.csv').write_text(HEAD + line)

        fetcher = Fetcher(per_host=args.workers)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.workers) as pool:
            size = sum(len(data) for data in pool.map(fetcher.get, urls))
        bare = time.perf_counter() - start

        command = [
            sys.executable, ROOT / 'prepare/download.py', '--table', f'{folder}/table.csv',
            '--out', f'{folder}/data', '--datasets', 'cap', '--workers', str(args.workers),
            '--per-host', str(args.workers)]
        environment = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': f'{folder}/cache',
                       'HF_HUB_DISABLE_XET': '1'}
        memory = []
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        while process.poll() is None:
            kib = resident_kib(process)
            if kib is not None:
                memory.append(kib)
            time.sleep(.2)
        whole = time.perf_counter() - start
        assert process.returncode == 0
        print(f'{args.rows:,} pictures of {size / args.rows / 1e3:.0f} kB, {args.workers} workers: '
              f'a bare loop {args.rows / bare:,.0f} a second, '
              f'download.py {args.rows / whole:,.0f}, {whole / bare:.2f} times as long; '
              'its memory half-way '
              f'{memory[len(memory) // 2] / 2 ** 10:,.0f} MiB, '
              f'at most {max(memory) / 2 ** 10:,.0f}')


if __name__ == '__main__':
    main()
