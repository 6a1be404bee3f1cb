"""The page behind sample.py --serve: drop a picture or a video, ask, watch answer and points come.

    GET  /                  the page itself, extra/page.html
    POST /show?name=a.png   a file -> {"kind": "image"} or {"kind": "video"}, or 400 and why not
    POST /ask               a question -> lines of JSON, one a piece of the answer, as they come
    POST /new               forgets the conversation

There is one conversation, for the person at this machine: the server listens on the loopback
address alone and refuses requests that other sites' pages send to it. What the model does with a
question is in sample.py.
"""
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from data import parse_points
from media import BadRow

MAX_UPLOAD = 2 ** 30                       # bytes of one file
CHUNK = 2 ** 20                            # bytes that are read from the network at once
VIDEOS = ('.mp4', '.webm', '.mov', '.mkv', '.avi')

PAGE = Path(__file__).with_name('page.html')


def server(chat, load_media, port):
    """An HTTP server for a sample.Chat, not yet running; port 0 takes a free one.

    load_media(processor, images, clip): opens files for Chat.show, as sample.py's function does.
    Raises OSError if the port is taken.
    """
    # Every request has a thread of its own. The lock lets one at a time use the conversation.
    lock = threading.Lock()
    # Uploads lie in a folder of their own, which is deleted when the process ends.
    folder = tempfile.TemporaryDirectory(prefix='nanomolmo2')

    class Handler(BaseHTTPRequestHandler):
        # In HTTP/1.1 a connection stays open for further requests, so a reply has to say how long
        # it is, and the body of a request has to be read before the next one.
        protocol_version = 'HTTP/1.1'

        def log_message(self, *_):
            """Prints nothing, because the terminal is the user's."""

        def reply(self, status, body, kind='text/plain; charset=utf-8'):
            content = body.encode()
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def is_from_our_page(self):
            """Does a request come from this server's page, or from no page at all?

            Any site that the browser has open can send requests to this machine; the header Origin
            then names that site. A site can also let its own name point to this address (DNS
            rebinding); the header Host then has that name.
            """
            port = self.server.server_port
            ours = (f'localhost:{port}', f'127.0.0.1:{port}')
            if self.headers.get('Host') not in ours:
                return False
            origin = self.headers.get('Origin')
            return origin is None or urlparse(origin).netloc in ours

        def do_GET(self):
            if self.path == '/' and self.is_from_our_page():
                self.reply(200, PAGE.read_text(encoding='utf-8'), 'text/html; charset=utf-8')
            else:
                self.reply(404, 'nothing here')

        def do_POST(self):
            try:
                self.answer_post()
            except (BrokenPipeError, ConnectionResetError):
                pass                           # the page was closed before the reply was complete

        def answer_post(self):
            size = int(self.headers.get('Content-Length', -1))
            if not self.is_from_our_page() or not 0 <= size <= MAX_UPLOAD:
                # The body is not read, so the connection cannot be used for another request.
                self.close_connection = True
                self.reply(403, 'not from this page, or too large')
                return
            url = urlparse(self.path)
            if url.path == '/show':
                name = parse_qs(url.query).get('name', ['x'])[0]
                self.show(Path(name).name, size)
            elif url.path == '/ask':
                question = self.rfile.read(size).decode('utf-8', 'replace')
                self.ask(question)
            elif url.path == '/new':
                with lock:
                    chat.new()
                self.reply(200, '{}')
            else:
                self.close_connection = True   # the body is not read here either
                self.reply(404, 'nothing here')

        def show(self, name, size):
            """Reads an uploaded file of `size` bytes and adds it to the conversation."""
            # Of the name that the browser sends only the suffix is used in a path.
            path = Path(folder.name) / f'file{Path(name).suffix.lower()[:8]}'
            is_video = path.suffix in VIDEOS
            with lock:
                self.save_upload(path, size)
                try:
                    if is_video:
                        media = load_media(chat.processor, [], path)
                    else:
                        media = load_media(chat.processor, [path], '')
                    chat.show(**media)
                except ValueError as e:        # UserError and BadRow: the file cannot be used
                    self.reply(400, str(e).replace(str(path), name))
                    return
                finally:
                    # The conversation has the pixels, so the file is not needed any more.
                    path.unlink()
            kind = 'video' if is_video else 'image'
            self.reply(200, json.dumps({'kind': kind}), 'application/json')

        def save_upload(self, path, size):
            with open(path, 'wb') as f:
                while size > 0:
                    chunk = self.rfile.read(min(size, CHUNK))
                    if not chunk:              # the browser went away
                        break
                    f.write(chunk)
                    size -= len(chunk)

        def ask(self, question):
            """Streams an answer as lines of JSON.

            A line is {"text": piece of the answer}. Where the piece completes a point, the line has
            all points so far too, as "points". An error is a last line {"error": why}.
            """
            self.send_response(200)
            self.send_header('Content-Type', 'application/x-ndjson')
            # The length is not known before the answer is, so the closed connection marks its end.
            self.send_header('Connection', 'close')
            self.end_headers()
            self.close_connection = True
            # The whole answer is parsed for each piece, because a point is spread over pieces.
            answer = ''
            num_points = 0
            with lock:
                try:
                    for piece in chat.ask(question):
                        answer += piece
                        points = parse_points(answer)
                        event = {'text': piece}
                        if len(points) > num_points:
                            event['points'] = points
                        num_points = len(points)
                        self.send_line(event)
                except BadRow as e:
                    # The reply has begun with status 200, so the error has to be a line of it.
                    self.send_line({'error': str(e)})

        def send_line(self, event):
            self.wfile.write((json.dumps(event) + '\n').encode())
            self.wfile.flush()

    return ThreadingHTTPServer(('127.0.0.1', port), Handler)
