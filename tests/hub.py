"""A hub of our own for the tests: answers as the Hugging Face hub does, and serves pictures well and badly.

    python tests/hub.py --rows=5000      download.py beside a bare loop that only fetches, with 32 workers; memory

    with Hub(folder) as hub:        folder/datasets/<owner>/<name>/<files>, HF_ENDPOINT = hub.url
        hub.media['a.jpg'] = bytes  then hub.url + '/media/fine/a.jpg', and /slow, /cut, /gone, /busy, /angry, /broken, /page
"""
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

REVISION = '0123456789abcdef0123456789abcdef01234567'
CONVERTED, OFFERED = 'c' * 40, 'd' * 40      # of refs/convert/parquet and refs/pr/1, kept in the folders .convert and .pr
BRANCHES = {CONVERTED: '.convert', OFFERED: '.pr'}
LARGE = ('.parquet', '.safetensors', '.zip')               # files that live elsewhere, behind a redirect


class Hub:
    def __init__(self, folder):
        self.folder, self.media, self.asked, self.cards, self.lies = Path(folder), {}, Counter(), {}, set()
        self.most, self.now, self.lock = 0, 0, threading.Lock()      # requests for media at once
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *_):
                pass

            def answer(self, status, body=b'', length=None, **headers):
                self.send_response(status)
                for k, v in headers.items():
                    self.send_header(k.replace('_', '-'), v)
                self.send_header('Content-Length', str(len(body) if length is None else length))
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                try:
                    parts = unquote(urlparse(self.path).path).strip('/').split('/')
                    hub.asked[self.path] += self.command == 'GET'
                    if parts[0] == 'api' and parts[4:] == ['discussions']:
                        self.discussions('/'.join(parts[2:4]))
                    elif parts[0] == 'api':
                        self.listing(parts[1], '/'.join(parts[2:4]), parts[5:])
                    elif parts[0] == 'media':
                        with hub.lock:
                            hub.now += 1
                            hub.most = max(hub.most, hub.now)
                        try:
                            self.picture(parts[1], '/'.join(parts[2:]))
                        finally:
                            with hub.lock:
                                hub.now -= 1
                    elif 'resolve' in parts:
                        i = parts.index('resolve')
                        kind = parts[0] if parts[0] == 'datasets' else 'models'
                        self.file(hub.folder / kind / '/'.join(parts[i - 2:i]) / BRANCHES.get(parts[i + 1], '') / '/'.join(parts[i + 2:]), True)
                    elif parts[0] == 'cdn':
                        self.file(hub.folder / '/'.join(parts[1:]), False)
                    else:
                        self.answer(404)
                except (BrokenPipeError, ConnectionResetError):      # killed
                    pass

            def listing(self, kind, repo, revision):
                root = hub.folder / kind / repo
                sha = CONVERTED if 'convert' in revision else OFFERED if 'pr' in revision else REVISION
                root = root / BRANCHES.get(sha, '')
                if not root.is_dir():
                    return self.answer(404, b'{"error": "Repository not found"}', X_Error_Code='RepoNotFound')
                files = [p for p in sorted(root.rglob('*')) if p.is_file() and p.relative_to(root).parts[0] not in BRANCHES.values()]
                body = {'id': repo, 'sha': sha, 'cardData': hub.cards.get(repo), 'private': False, 'gated': False,
                        'downloads': 0, 'likes': 0, 'tags': [],
                        'siblings': [self.sibling(p, p.relative_to(root).as_posix()) for p in files]}
                self.answer(200, json.dumps(body).encode(), Content_Type='application/json')

            def discussions(self, repo):
                offered = (hub.folder / 'models' / repo / '.pr').is_dir() and 'author=SFconvertbot' in self.path
                offers = [{'title': 'Adding `safetensors` variant of this model', 'num': 1, 'author': {'name': 'SFconvertbot'},
                           'createdAt': '2026-11-22T00:00:00.000Z', 'status': 'open', 'repo': {'name': repo, 'type': 'model'},
                           'isPullRequest': True}] if offered else []
                self.answer(200, json.dumps({'count': len(offers), 'start': 0, 'discussions': offers}).encode(),
                            Content_Type='application/json')

            def sibling(self, path, name):
                about = {'rfilename': name, 'size': path.stat().st_size}
                if path.suffix in LARGE:
                    digest = '0' * 64 if name in hub.lies else hashlib.sha256(path.read_bytes()).hexdigest()
                    about['lfs'] = {'sha256': digest, 'size': about['size'], 'pointerSize': 134}
                return about

            def file(self, path, hub_itself):
                if not path.is_file():
                    return self.answer(404, X_Error_Code='EntryNotFound')
                body = path.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                if hub_itself and path.suffix in LARGE:
                    sha = next((sha for sha, name in BRANCHES.items() if name in path.parts), REVISION)
                    return self.answer(302, X_Repo_Commit=sha, X_Linked_Etag=etag, X_Linked_Size=str(len(body)),
                                       Location=f'{hub.url}/cdn/{path.relative_to(hub.folder)}', ETag=etag)
                headers = {'ETag': etag, 'Accept_Ranges': 'bytes', 'X_Repo_Commit': REVISION}
                if (asked := self.headers.get('Range', '')).startswith('bytes='):
                    first = int(asked[6:].split('-')[0])
                    if first >= len(body):
                        return self.answer(416, **headers)
                    part = body[first:]
                    return self.answer(206, part, Content_Range=f'bytes {first}-{len(body) - 1}/{len(body)}', **headers)
                self.answer(200, body, **headers)

            def picture(self, manner, name):
                data, before = hub.media.get(name, b''), hub.asked[self.path] - 1
                if manner == 'gone':
                    return self.answer(404)
                if manner == 'busy' and not before:
                    return self.answer(429, Retry_After='86400')
                if manner == 'angry':
                    return self.answer(429, Retry_After='86400')
                if manner == 'broken' and before < 2:
                    return self.answer(500)
                if manner == 'page':
                    return self.answer(200, b'<!DOCTYPE html><html>This picture is gone.</html>', Content_Type='image/jpeg')
                if manner == 'cut':
                    self.answer(200, data[:len(data) // 2], len(data))
                    self.close_connection = True
                    return
                if manner == 'slow':
                    self.answer(200, b'', len(data))
                    for i in range(0, len(data), 100):
                        self.wfile.write(data[i:i + 100])
                        self.wfile.flush()
                        time.sleep(.2)
                    return
                self.answer(200, data)
        self.server = ThreadingHTTPServer(('localhost', 0), Handler)
        self.server.handle_error = lambda *_: None           # whoever was killed does not listen
        self.server.daemon_threads = True
        self.url = f'http://localhost:{self.server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def main():
    """Pictures a second of download.py (fetch, open, convert, write) and of threads that fetch the same and do nothing."""
    import argparse
    import io
    import os
    import subprocess
    import sys
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image
    root = Path(__file__).parent.parent
    sys.path[:0] = [str(root), str(root / 'prepare')]
    from download import Fetcher
    parser = argparse.ArgumentParser()
    parser.add_argument('--rows', type=int, default=5000)
    parser.add_argument('--workers', type=int, default=32)
    parser.add_argument('--side', type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Hub(Path(folder) / 'hub') as hub:
        for i in range(16):
            noise = np.random.default_rng(i).integers(0, 256, (args.side // 8, args.side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((args.side, args.side)).save(out := io.BytesIO(), 'JPEG', quality=85)
            hub.media[f'{i}.jpg'] = out.getvalue()
        urls = [f'{hub.url}/media/fine/{i % 16}.jpg?{i}' for i in range(args.rows)]
        path = Path(folder) / 'hub/datasets/o/cap/train.parquet'
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({'image_url': urls, 'caption': ['A picture.'] * args.rows,
                                                   'transcripts': [[]] * args.rows}), path)
        (Path(folder) / 'table.csv').write_text('name,stages,task,group,rate,hub,config,tables,split,validation,examples,style,converter,'
                                                'media,automatic,instructions\ncap,1,,,,o/cap,,,train,,,,caption,urls,yes,\n')
        fetcher, start = Fetcher(per_host=args.workers), time.perf_counter()
        with ThreadPoolExecutor(args.workers) as pool:
            size = sum(len(data) for data in pool.map(fetcher.get, urls))
        bare = time.perf_counter() - start
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, root / 'prepare/download.py', '--table', f'{folder}/table.csv', '--out', f'{folder}/data', '--datasets',
             'cap', '--workers', str(args.workers), '--per-host', str(args.workers)], stdout=subprocess.DEVNULL,
            env={**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': f'{folder}/cache', 'HF_HUB_DISABLE_XET': '1'})
        memory = []                          # not from getrusage, which counts this process as it forks
        while process.poll() is None:
            memory += [int(line.split()[1]) for line in Path(f'/proc/{process.pid}/status').read_text().splitlines()
                       if line.startswith('VmRSS')]
            time.sleep(.2)
        assert process.returncode == 0
        whole = time.perf_counter() - start
        print(f'{args.rows:,} pictures of {size / args.rows / 1e3:.0f} kB, {args.workers} workers: a bare loop {args.rows / bare:,.0f} a '
              f'second, download.py {args.rows / whole:,.0f}, {whole / bare:.2f} times as long; its memory half-way '
              f'{memory[len(memory) // 2] / 2 ** 10:,.0f} MiB, at most {max(memory) / 2 ** 10:,.0f}')


if __name__ == '__main__':
    main()
