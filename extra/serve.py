"""The page behind sample.py --serve: drop a picture or a video, ask, watch the answer stream and its points appear.

One conversation, one person: it listens on the loopback address alone and answers only what comes from its own page.
"""
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from data import parse_points
from media import BadRow

MAX_UPLOAD = 2 ** 30                         # bytes of one file
VIDEOS = ('.mp4', '.webm', '.mov', '.mkv', '.avi')

PAGE = Path(__file__).with_name('page.html')


def server(talking, load_media, port):
    """An HTTP server for a sample.Chat; `load_media` opens files as sample.py does."""
    lock, folder = threading.Lock(), tempfile.TemporaryDirectory(prefix='nanomolmo2')

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *_):
            pass

        def reply(self, status, body, kind='text/plain; charset=utf-8'):
            body = body.encode()
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def is_ours(self):
            """Not another site's page that a browser has open, under whatever name it knows this address."""
            here = {f'{name}:{self.server.server_port}' for name in ('localhost', '127.0.0.1')}
            origin = self.headers.get('Origin')
            return self.headers.get('Host') in here and (origin is None or urlparse(origin).netloc in here)

        def do_GET(self):
            if self.path == '/' and self.is_ours():
                return self.reply(200, PAGE.read_text(encoding='utf-8'), 'text/html; charset=utf-8')
            self.reply(404, 'nothing here')

        def do_POST(self):
            try:
                size = int(self.headers.get('Content-Length', -1))
                if not self.is_ours() or not 0 <= size <= MAX_UPLOAD:
                    self.close_connection = True         # what it sends is not read
                    return self.reply(403, 'not from this page, or too large')
                url = urlparse(self.path)
                if url.path == '/show':
                    self.show(Path(parse_qs(url.query).get('name', ['x'])[0]).name, size)
                elif url.path == '/ask':
                    self.ask(self.rfile.read(size).decode('utf-8', 'replace'))
                elif url.path == '/new':
                    with lock:
                        talking.new()
                    self.reply(200, '{}')
                else:
                    self.close_connection = True
                    self.reply(404, 'nothing here')
            except (BrokenPipeError, ConnectionResetError):          # the page was closed
                pass

        def show(self, name, size):
            path = Path(folder.name) / f'file{Path(name).suffix.lower()[:8]}'
            with lock:
                with open(path, 'wb') as f:
                    while size > 0 and (piece := self.rfile.read(min(size, 2 ** 20))):
                        f.write(piece)
                        size -= len(piece)
                try:
                    video = path.suffix in VIDEOS
                    talking.show(**load_media(talking.processor, [] if video else [path], path if video else ''))
                except ValueError as e:                  # UserError and BadRow
                    return self.reply(400, str(e).replace(str(path), name))
                finally:
                    path.unlink()
            self.reply(200, json.dumps({'kind': 'video' if video else 'image'}), 'application/json')

        def ask(self, text):
            """Lines of JSON as the answer comes: {"text": ..} and, whenever there are more, {"points": [..]}."""
            self.send_response(200)
            self.send_header('Content-Type', 'application/x-ndjson')
            self.send_header('Connection', 'close')      # its end is the answer's
            self.end_headers()
            self.close_connection = True
            said, known = '', 0
            with lock:
                try:
                    for piece in talking.ask(text):
                        said += piece
                        points = parse_points(said)
                        event = {'text': piece, **({'points': points} if len(points) > known else {})}
                        known = len(points)
                        self.wfile.write((json.dumps(event) + '\n').encode())
                        self.wfile.flush()
                except BadRow as e:
                    self.wfile.write((json.dumps({'error': str(e)}) + '\n').encode())

    return ThreadingHTTPServer(('127.0.0.1', port), Handler)
