"""From files to batches.

    data/<name>/train.jsonl + media          one JSON record a line, found through an offset index
       │  Mixture                            draw k of the run -> (dataset, row): a pure function of (seed, k)
       ▼
    record  {"images": [...], "conversations": [{"task": ..., "messages": [...]}, ...]}
       │  Processor.example                  decode, resize, patchify; token ids and loss weights built turn by turn
       ▼
    Example                                  tokens, weights, branches [L]; patches [crops, patches, patch_dim] uint8
       │  best_fit, collate                  pack into rows, pad, shift targets, flatten the indices
       ▼
    batch   tokens, targets, loss_weights, position_ids, document_ids, branch_ids [B, L], patches, pool_index, ...

A record is a message tree: its media first, then each conversation as a branch that sees the media and itself, so a
picture with ten questions is decoded and encoded once. Points are structured in the record and become text here.
A row that cannot be used raises BadRow; the Loader skips it, counts it by reason and names it.

    python data.py config/demo_stage1.py     the mixture, examples; writes an HTML page of what the model gets
    python data.py config/demo_stage1.py --check=data/mine      every row read as training would: what is wrong or odd
"""
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from media import (BadRow, load_image, load_subtitles, load_video,
                   open_media)
from model import UserError

TASKS = ('captioning', 'qa', 'counting', 'pointing', 'tracking', 'text', 'other')
MAX_LINE = 16 * 2 ** 20                      # bytes of one record


# ---------------------------------------------------------------------------------------------------------------------
# Points: structured in the data, text in the model's mouth. Formatting and parsing are inverse functions.

def format_points(points, label='', syntax='point', digits=3, tracks=False):
    """Points {x, y in [0, 1], id, and t seconds or image index from 0} as text.

    'point'   <point 0.530, 0.210, 1> <point 0.700, 0.250, 2>   with t or the image number first where there is one
    'molmo2'  <points coords="1 1 530 210 2 700 250">label</points>   thousandths, sorted by (x, y), ids renumbered;
              <tracks ...> keeps ids (allenai/molmo2 preprocessing/point_formatter.py, html-v2)
    """
    if not points:
        return 'There are none.'
    if syntax == 'point':
        texts = []
        for n, p in enumerate(points, 1):
            first = f"{p['t']:.1f}, " if 't' in p else f"{p['image'] + 1}, " if 'image' in p else ''
            x, y = (f'{min(max(v, 0), 1):.{digits}f}' for v in (p['x'], p['y']))
            texts.append(f"<point {first}{x}, {y}, {p.get('id', n)}>")
        return ' '.join(texts)
    frames = {}
    for p in points:
        frame = f"{p['t']:.1f}" if 't' in p else str(p.get('image', 0) + 1)
        x, y = (round(1000 * min(max(v, 0), 1)) for v in (p['x'], p['y']))
        frames.setdefault(frame, []).append((x, y, p.get('id')))
    coords, n = [], 0
    for frame in sorted(frames, key=float):
        triples = []
        for x, y, id in sorted(frames[frame], key=lambda p: p[2] if tracks else p[:2]):
            n += 1
            triples.append(f'{id if tracks else n} {x:03d} {y:03d}')
        coords.append(f"{frame} {' '.join(triples)}")
    tag = 'tracks' if tracks else 'points'
    return f'<{tag} coords="{";".join(coords)}">{label.lower()}</{tag}>'


_POINT = re.compile(r'<point ((?:\d+(?:\.\d+)?, ){2,3})(\d+)>')
_COORDS = re.compile(r'<(?:points|tracks)\b[^>]*?coords="([0-9\t:;, .]+)"')


def parse_points(text):
    """The points in a text of either syntax: [{x, y, id, (t | image)}]. What does not parse is left out."""
    points = []
    for numbers, id in _POINT.findall(text):
        *first, x, y = numbers.rstrip(', ').split(', ')
        point = {'x': float(x), 'y': float(y), 'id': int(id)}
        if first:                            # a time has a decimal, an image number has not
            point.update({'t': float(first[0])} if '.' in first[0] else {'image': int(first[0]) - 1})
        points.append(point)
    for coords in _COORDS.findall(text):
        frames = [re.match(r'\s*([0-9.]+)\s+(.*)', frame) for frame in re.split(r'[\t:,;]', coords)]
        frames = [m.groups() for m in frames if m]
        for frame, rest in frames:
            where = {'t': float(frame)} if '.' in frame else {'image': int(frame) - 1} if len(frames) > 1 else {}
            for id, x, y in re.findall(r'(\d+) (\d{3,4}) (\d{3,4})', rest):
                points.append({'x': int(x) / 1000, 'y': int(y) / 1000, 'id': int(id), **where})
    return [p for p in points if p['x'] <= 1 and p['y'] <= 1]


# ---------------------------------------------------------------------------------------------------------------------
# Files

class Dataset:
    """A JSONL file as a sequence of records. The byte offsets of its lines are found once and kept beside it, in a file
    that is mapped and not read: ten million rows cost no memory."""

    def __init__(self, folder, split='train', cap=None, loss_weight=1., token_weight=None):
        self.folder, self.cap, self.loss_weight, self.token_weight = Path(folder), cap, loss_weight, token_weight
        self.name = self.folder.name
        self.path = self.folder / f'{split}.jsonl'
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; prepare the dataset first (prepare/)")
        index, stat = self.path.with_name(f'.{split}.index'), self.path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        try:
            self.offsets = np.memmap(index, np.int64, 'r')
            fresh = self.offsets[:2].tolist() == stamp
        except (OSError, ValueError):
            fresh = False
        if not fresh:
            try:
                temporary = index.with_suffix(f'.{os.getpid()}.{id(self)}.tmp')
                with open(temporary, 'wb') as f:
                    self._scan(f, stamp)
                temporary.replace(index)
                self.offsets = np.memmap(index, np.int64, 'r')
            except OSError:                  # a read-only folder: a scan each start, and memory
                self._scan(buffer := io.BytesIO(), stamp)
                self.offsets = np.frombuffer(buffer.getvalue(), np.int64)

    def _scan(self, out, stamp):
        """Writes the stamp, where each non-empty line starts, and where the last one ends."""
        offsets, start, end, blank = array('q', stamp), 0, 0, True
        with open(self.path, 'rb') as f:
            while True:
                piece = f.readline(2 ** 20)  # a line has no limit, memory has
                end += len(piece)
                blank = blank and piece.strip() == b''
                if piece and not piece.endswith(b'\n'):
                    continue
                if not blank:
                    offsets.append(start)
                if not piece:
                    break
                start, blank = end, True
                if len(offsets) >= 2 ** 16:
                    out.write(offsets.tobytes())
                    del offsets[:]
        offsets.append(end)
        out.write(offsets.tobytes())

    @property
    def rows(self):
        return len(self.offsets) - 3

    def __len__(self):
        return min(self.rows, self.cap or self.rows)

    def __getitem__(self, i):
        start, end = int(self.offsets[i + 2]), int(self.offsets[i + 3])
        if end - start > MAX_LINE:
            raise BadRow('too large', f'{end - start:,} bytes in one line (limit {MAX_LINE:,})')
        with open(self.path, 'rb') as f:     # of each call's own: threads and workers read at once
            f.seek(start)
            line = f.read(end - start)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRow('broken JSON', str(e)) from None
        return normalise(record)

    def where(self, i):
        """'data/pixmo/train.jsonl line 713' for messages."""
        with open(self.path, 'rb') as f:
            lines = sum(f.read(min(2 ** 20, n)).count(b'\n') for n in _pieces(int(self.offsets[i + 2])))
        return f'{self.path} line {lines + 1}'


def _pieces(size, step=2 ** 20):
    return [step] * (size // step) + [size % step]


_PLACE = re.compile(r'^\s*(<(image|video)>\s*)+|(\s*<(image|video)>)+\s*$')   # other trainers' mark; ours stand first


def normalise(record):
    """A record in the one shape: images [...] or video, conversations [{task, messages}]. BadRow says what is wrong."""
    if not isinstance(record, dict):
        raise BadRow('schema', f'a record is a JSON object, this is {type(record).__name__}')
    conversations = record.get('conversations') or [{'messages': record.get('messages')}]
    if not isinstance(conversations, list) or 'conversations' not in record and 'messages' not in record:
        raise BadRow('schema', f"neither 'conversations' nor 'messages' among its keys: {', '.join(record) or 'none'}")
    if all(isinstance(m, dict) and 'from' in m for m in conversations):            # LLaVA's turns
        roles = {'human': 'user', 'gpt': 'assistant'}
        conversations = [{'messages': [{'role': roles.get(m.get('from'), m.get('from')), 'content': m.get('value')}
                                       for m in conversations]}]
    paths = lambda key: [record[key]] if isinstance(record.get(key), str) else record.get(key) or []
    images, videos = paths('images'), paths('videos') or paths('video')
    if not all(isinstance(x, list) and all(isinstance(path, str) for path in x) for x in (images, videos)):
        raise BadRow('schema', "'images' is a list of paths and 'video' is one")
    if len(videos) > 1 or videos and images:
        raise BadRow('schema', f'{len(videos)} videos and {len(images)} images: a record has one video or any number '
                               f'of images')
    for key in ('start', 'end'):
        if record.get(key) is not None and not _number(record[key], 0, 1e7):
            raise BadRow('schema', f"'{key}' is a number of seconds, this is {record[key]!r}")
    if not isinstance(record.get('subtitles') or [], (str, list)):
        raise BadRow('schema', "'subtitles' is a path, or a list of {start, end, text}")
    for conversation in conversations:
        messages = conversation.get('messages') if isinstance(conversation, dict) else None
        if not isinstance(messages, list) or not all(
                isinstance(m, dict) and isinstance(m.get('content', ''), str) and isinstance(m.get('role'), str)
                for m in messages):
            raise BadRow('schema', "a conversation is {'messages': [{'role': ..., 'content': text}, ...]}")
        if not isinstance(conversation.get('task', ''), str):
            raise BadRow('schema', f"'task' is one of {', '.join(TASKS)}, this is {conversation['task']!r}")
        for m in messages:
            m['content'] = _PLACE.sub('', m.get('content', ''))
            check_points(m.get('points'), len(images), bool(videos))
        if not any(m['role'] == 'assistant' for m in messages):
            raise BadRow('no answer', 'a conversation without an assistant turn')
    return {**record, 'images': images, 'video': videos[0] if videos else None, 'conversations': conversations}


def _number(value, low, high):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check_points(points, num_images, video):
    """BadRow unless they are {'points': [{x, y in [0, 1]; t seconds in a video; image the index of one of many}]}."""
    if points is None:
        return
    if not (isinstance(points, dict) and isinstance(points.get('points'), list)
            and isinstance(points.get('label', ''), str)):
        raise BadRow('schema', "points are {'label': text, 'points': [{'x': ..., 'y': ..., 'id': ...}, ...]}")
    for p in points['points']:
        if not isinstance(p, dict) or not all(_number(p.get(k), -.05, 1.05) for k in 'xy'):
            raise BadRow('bad point', f"x and y are fractions of the picture in [0, 1], this is {p}")
        if not isinstance(p.get('id', 1), int):
            raise BadRow('bad point', f"'id' is a whole number, this is {p}")
        if video != ('t' in p) or video and not _number(p['t'], 0, 1e7):
            raise BadRow('bad point', f"a point has its second 't' in a video and nowhere else, this is {p}")
        if 'image' in p and not (isinstance(p['image'], int) and _number(p['image'], 0, num_images - 1)):
            raise BadRow('bad point', f"'image' is the index, from 0, of one of {num_images} images, this is {p}")


# ---------------------------------------------------------------------------------------------------------------------
# Records to examples

@dataclass
class Example:
    tokens: list = field(default_factory=list)         # [L]
    weights: list = field(default_factory=list)        # [L] weight of predicting this very token
    positions: list = field(default_factory=list)      # [L]
    branches: list = field(default_factory=list)       # [L] 0 the shared part, 1.. the conversations
    tasks: list = field(default_factory=list)          # [L] index into TASKS
    patches: np.ndarray = None                         # [crops, patches, patch_dim] uint8
    grid: tuple = None                                 # (rows, columns) of patches in a crop
    times: tuple = ()                                  # seconds of the crops, where they are the frames of a video
    pool_index: np.ndarray = None                      # [visual tokens, window], into crops x patches
    visual_index: np.ndarray = None                    # [visual tokens], into tokens

    def add(self, ids, weights, task):
        """A conversation about what is shared, as the next branch. Its positions follow the shared part's."""
        shared = self.branches.count(0)
        self.positions += range(shared, shared + len(ids))
        self.branches += [self.branches[-1] + 1 if self.branches else 1] * len(ids)
        self.tokens += ids
        self.weights += weights
        self.tasks += [task] * len(ids)


def windows(grid, k):
    """[tokens, k x k] patches of each pooled token of a grid (rows, columns), windows in reading order; -1 beyond the
    border where k does not divide the grid (half of the padding on each side, as allenai/molmo2 does)."""
    rows, columns = grid
    pad = [((-n % k) // 2, -n % k - (-n % k) // 2) for n in grid]
    index = np.pad(np.arange(rows * columns).reshape(grid), pad, constant_values=-1)
    r, c = index.shape
    return index.reshape(r // k, k, c // k, k).transpose(0, 2, 1, 3).reshape(-1, k * k)


class Processor:
    """Records -> Examples: the token layout, the pixels, and what a checkpoint's processor files say about both.

    Layout: <|vision_start|> n x <|image_pad|> <|vision_end|> for each picture ("Image 2" before it if there are more);
    for each frame of a video its time, "1.5s", and the same with <|video_pad|>, then subtitles as timed lines; then
    ChatML turns. Special tokens are inserted as ids; text is encoded with special tokens off, so a literal
    '<|image_pad|>' stays text.
    """
    video_size = 0                 # pixels a side of a frame; 0: image_size
    video_pooling = 0              # patches a side that one visual token of a frame pools; 0: pooling
    max_frames = 128
    fps = 2.0                      # frames a second, up to max_frames a clip
    resize = 'stretch'             # stretch | crop (CLIP's own: the centre square)
    image_token = '<|image_pad|>'
    point_format = 'point'         # point | molmo2
    point_digits = 3
    task_weights = {}
    length_weighting = False       # weight / sqrt(tokens of the answer)
    branch_weighting = False       # weight / sqrt(conversations of the row)

    def __init__(self, tokenizer_folder, image_size, patch_size, pooling, seq_len=4096, **settings):
        if unknown := [k for k in settings if not hasattr(type(self), k)]:
            raise TypeError(f'Processor has no setting {unknown[0]}')
        self.__dict__.update(settings)
        path = Path(tokenizer_folder) / 'tokenizer.json'
        if not path.is_file():
            raise UserError(f"{path} does not exist; a tokenizer is a folder with tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:               # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer ({e})") from None
        files = [path, path.with_name('tokenizer_config.json')]       # kept: the folder may be an old checkpoint, to go
        self.tokenizer_files = {file.name: file.read_bytes() for file in files if file.is_file()}
        self.tokenizer.encode_special_tokens = True    # '<|im_end|>' in a user's text is text
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        ids = {t: self.tokenizer.token_to_id(t) for t in ('<|im_start|>', '<|im_end|>', self.image_token)}
        if lost := [t for t, i in ids.items() if i is None]:
            raise UserError(f"the tokenizer {path} lacks {', '.join(lost)}, which the token layout needs")
        self.im_start, self.im_end, self.image_pad = ids.values()
        video = self.tokenizer.token_to_id('<|video_pad|>')
        self.video_pad = self.image_pad if video is None else video
        self.around = [self.tokenizer.token_to_id(t) for t in ('<|vision_start|>', '<|vision_end|>')]
        self.around = [[t for t in self.around[i:i + 1] if t is not None] for i in (0, 1)]
        self.pad = self.tokenizer.token_to_id('<|endoftext|>') or 0
        self.newline = self.past = self.encode('\n')          # past: before an answer that was given already
        self.role = lru_cache(None)(lambda role: [self.im_start, *self.encode(f'{role}\n')])
        self.short = lru_cache(2 ** 12)(self.encode)           # many rows ask the same
        self.clock = lru_cache(2 ** 14)(lambda tenths: self.encode(f'{tenths / 10:.1f}s'))

        self.image_size, self.patch_size, self.pooling, self.seq_len = image_size, patch_size, pooling, seq_len
        self.video_size, self.video_pooling = self.video_size or image_size, self.video_pooling or pooling
        for name in ('image_size', 'video_size'):
            if getattr(self, name) % patch_size:
                raise UserError(f"{name} {getattr(self, name)} is not a multiple of the patch size {patch_size}")
        self.grid, self.frame_grid = ((size // patch_size,) * 2 for size in (image_size, self.video_size))
        self.window, self.frame_window = windows(self.grid, pooling), windows(self.frame_grid, self.video_pooling)
        # tokens that a frame takes at most: time, start, visual tokens, end
        self.frame_tokens = len(self.clock(99999)) + sum(map(len, self.around)) + len(self.frame_window)

    def token_ids(self):
        """The ids that a model's Config holds; those that see one another in the order of molmo2's."""
        (start, *_), (end, *_) = (side or [self.image_pad] for side in self.around)
        visual = start, end, self.image_pad, self.image_pad, start, self.video_pad, start, end
        return {'image_token_id': self.image_pad, 'video_token_id': self.video_pad, 'eos_token_id': self.im_end,
                'pad_token_id': self.pad, 'visual_token_ids': visual}

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    # -- pixels

    def pixels(self, image, size):
        """An upright RGB picture -> patches [num_patches, patch_dim] uint8, in reading order; row, column, channel."""
        if self.resize == 'crop':            # CLIP's own: short side to size, centre square (transformers CLIP)
            short, (w, h) = min(image.size), image.size
            image = image.resize((int(size * w / short), int(size * h / short)), Image.Resampling.BICUBIC)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        elif image.size != (size, size):     # stretch: nothing is lost, and fractions of the picture stay fractions
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return self._patches(np.asarray(image))

    def _patches(self, pixels):
        """[height, width, 3] -> patches [n, patch_dim], in reading order."""
        p, (rows, columns) = self.patch_size, (n // self.patch_size for n in pixels.shape[:2])
        return pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)

    def media(self, record, folder, room=None):
        """What a record shows, decoded: {'images': [...]} or {'clip': (times, frames), 'subtitles': [...]}. Of a video
        so many frames as fit `room` tokens."""
        if not record['video']:
            return {'images': [load_image(open_media(folder, path)) for path in record['images']]}
        clip = {'start': record.get('start') or 0., 'end': record.get('end')}
        subtitles = record.get('subtitles') or []
        if isinstance(subtitles, str):
            subtitles = open_media(folder, subtitles)
        subtitles = load_subtitles(subtitles, **clip) if subtitles else []
        frames = self.max_frames
        if room is not None:
            frames = min(frames, (room - len(self._subtitle_tokens(subtitles))) // self.frame_tokens)
            if frames < 1:
                raise BadRow('too long', f'no room for a frame of {self.frame_tokens} tokens in seq_len {self.seq_len}')
        size = (self.video_size,) * 2 if self.resize == 'stretch' else None
        return {'clip': load_video(open_media(folder, record['video']), frames, self.fps, size=size, **clip),
                'subtitles': subtitles}

    # -- tokens

    def answer(self, message, task, times=None):
        """The text of an assistant message: its content, then its points. A track is told at the frames' times only."""
        parts = [message['content']] if message['content'] else []
        if message.get('points') is not None:
            points = message['points']['points']
            if task == 'tracking' and times is not None:
                points = [p for p in points if abs(times - p['t']).min() <= .5 / self.fps]
            parts.append(format_points(points, message['points'].get('label', ''), self.point_format,
                                       self.point_digits, task == 'tracking'))
        return ' '.join(parts)

    def _subtitle_tokens(self, cues):
        lines = [f"{c['start']:.1f}s - {c['end']:.1f}s: {c['text']}" for c in cues]
        return self.encode('\n'.join(['', 'Subtitles:', *lines])) if lines else []

    def _shared(self, images=(), clip=((), ()), subtitles=()):
        """The shared part of an example: what is seen, as patches and placeholder tokens."""
        e, crops, pool, visual = Example(), [], [], []
        frames = len(clip[0]) > 0
        window, size, pad = ((self.frame_window, self.video_size, self.video_pad) if frames else
                             (self.window, self.image_size, self.image_pad))
        for i, image in enumerate(clip[1] if frames else images):
            if frames:
                e.tokens += self.clock(round(10 * clip[0][i]))
            elif len(images) > 1:
                e.tokens += self.encode(f'Image {i + 1}')
            e.tokens += self.around[0]
            visual += range(len(e.tokens), len(e.tokens) + len(window))
            e.tokens += [pad] * len(window)
            e.tokens += self.around[1]
            crops.append(self.pixels(image, size))
            pool.append(np.where(window < 0, -1, window + i * len(crops[0])))
        e.tokens += self._subtitle_tokens(subtitles)
        if crops:
            e.patches, e.pool_index, e.visual_index = np.stack(crops), np.concatenate(pool), np.array(visual, np.int64)
            e.grid, e.times = self.frame_grid if frames else self.grid, tuple(clip[0])
        return self._only_seen(e)

    def _only_seen(self, e):
        """Weights, positions, branches and tasks of an example's shared part."""
        n = len(e.tokens)
        e.weights, e.positions, e.branches, e.tasks = [0.] * n, list(range(n)), [0] * n, [0] * n
        return e

    def _dialogue(self, conversation, times=None, past=None):
        """ids and weights of one conversation, built together turn by turn. Loss: answers and their <|im_end|>."""
        task = conversation.get('task', 'other')
        base = self.task_weights.get(task, 1.)
        ids, weights = [], []
        for message in conversation['messages']:
            if ids:
                gap = past if past and message['role'] == 'assistant' else self.newline
                ids, weights = ids + gap, weights + [0.] * len(gap)
            head = self.role(message['role'])
            if message['role'] == 'assistant':
                body = self.encode(self.answer(message, task, times)) + [self.im_end]
                w = base / len(body) ** .5 if self.length_weighting else base
            else:
                text = self.answer(message, 'pointing')    # one may ask about a point
                body, w = [*(self.short if len(text) < 200 else self.encode)(text), self.im_end], 0.
            ids, weights = ids + head + body, weights + [0.] * len(head) + [w] * len(body)
        return ids, weights, TASKS.index(task) if task in TASKS else TASKS.index('other')

    def example(self, record, folder):
        """A record -> Example of at most seq_len tokens: a video gives up frames, then conversations are left out."""
        talks = [self._dialogue(c) for c in record['conversations']]
        lengths = [len(ids) for ids, _, _ in talks]
        # the conversations have the first claim on a quarter of the row, and the shortest on whatever it needs
        room = self.seq_len - max(min(lengths), min(sum(lengths), self.seq_len // 4))
        media = self.media(record, folder, room)
        if 'clip' in media:                  # tracks are told at the frames' times
            talks = [self._dialogue(c, media['clip'][0]) if c.get('task') == 'tracking' else talk
                     for c, talk in zip(record['conversations'], talks)]
        e = self._shared(**media)
        shared = len(e.tokens)
        for ids, weights, task in talks:
            if not any(weights) or len(e.tokens) + len(ids) > self.seq_len:
                continue
            e.add(ids, weights, task)
        if len(e.tokens) == shared:
            raise BadRow('too long', f'{shared} tokens of pictures and a shortest conversation of {min(lengths)} do '
                                     f'not fit seq_len {self.seq_len}')
        if self.branch_weighting:
            e.weights = [w / e.branches[-1] ** .5 for w in e.weights]
        return e

    def prompt(self, *talks, **media):
        """Messages that end with a user turn, and `media` as above -> Example that ends where the answer begins. Of
        several such conversations about the same media each is a branch."""
        e = self._shared(**media)
        for messages in talks:
            ids, _, task = self._dialogue({'messages': messages}, past=self.past)
            ids = ids + self.newline + self.role('assistant')
            e.add(ids, [0.] * len(ids), task)
        return e

    def save(self, folder):
        from extra.hf import save_processor                # tokenizer and processor files as transformers reads them
        save_processor(self, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def collate(rows, processor, length=0):
    """Lists of examples -> a batch for the model. A row is one list: its examples one after the other as documents 0,
    1, .., padded to `length` or the longest row."""
    sizes = [[len(e.tokens) for e in row] for row in rows]
    B, L = len(rows), length or -(-max(map(sum, sizes)) // 8) * 8      # of eight, as vector units like
    tokens = np.full((B, L), processor.pad)
    targets, weights = np.full((B, L), processor.pad), np.zeros((B, L), np.float32)
    positions, tasks, branches = (np.zeros((B, L), np.int64) for _ in range(3))
    documents = np.full((B, L), -1)
    seen = {processor.grid: [], processor.frame_grid: []}              # pictures first, then frames of another size
    for b, row in enumerate(rows):
        start = 0
        for i, e in enumerate(row):
            here = slice(start, start + len(e.tokens))
            tokens[b, here], positions[b, here], branches[b, here] = e.tokens, e.positions, e.branches
            documents[b, here] = i
            # Position i predicts token i + 1. The first token of a branch has no weight, so no loss crosses branches.
            before = slice(here.start, here.stop - 1)
            targets[b, before], weights[b, before], tasks[b, before] = e.tokens[1:], e.weights[1:], e.tasks[1:]
            if e.patches is not None:
                seen[e.grid].append((e.patches, e.pool_index, e.visual_index + b * L + start))
            start = here.stop
    loss_index = np.flatnonzero(weights)
    batch = {'tokens': tokens, 'targets': targets, 'loss_weights': weights, 'position_ids': positions,
             'document_ids': documents, 'branch_ids': branches, 'loss_index': loss_index,
             'loss_tasks': tasks.flatten()[loss_index]}
    batch.update(see(seen))
    batch = {k: torch.from_numpy(v) for k, v in batch.items()}
    # Plain causal attention is the mask where rows hold one document with at most one branch
    batch['causal'] = int(branches.max()) <= 1 and int(documents.max()) <= 0
    # Counted here, on the CPU, so that the training loop need not ask the device: tokens, pairs that see each other (a
    # token at position p sees p + 1), the sum of the loss weights
    batch.update(grid=processor.grid, frame_grid=processor.frame_grid, n_tokens=int((documents >= 0).sum()),
                 total_weight=float(weights.sum()), n_pairs=int((positions + 1)[documents >= 0].sum()))
    return batch


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def see(seen):
    """{grid: [(patches, pool_index, visual_index) of each example]} -> the batch's patches and frames, and the indices
    of all: pool_index counts the patches of all pictures, then those of all frames."""
    batch, pool, visual, offset = {}, [], [], 0
    for name, examples in zip(('patches', 'frames'), seen.values()):     # frames of the pictures' size are among them
        for patches, index, where in examples:
            pool.append(np.where(index < 0, -1, index + offset))
            visual.append(where)
            offset += patches.shape[0] * patches.shape[1]
        if examples:
            batch[name] = np.concatenate([patches for patches, _, _ in examples])
    if pool:
        width = max(index.shape[1] for index in pool)
        pool = [np.pad(index, ((0, 0), (0, width - index.shape[1])), constant_values=-1) for index in pool]
        batch.update(pool_index=np.concatenate(pool), visual_index=np.concatenate(visual))
    return batch


POOL = 48                          # examples to choose a row from; more gains nothing (Molmo2, appendix B)


def best_fit(lengths, room):
    """Indices of the examples that fill a row of `room` tokens best: the first, which has waited longest, and those of
    the others whose lengths add up to most. Exact: bit s of reach[n] says whether some of the first n add up to s."""
    room, reach = room - lengths[0], [1]
    for n in lengths[1:]:
        reach.append((reach[-1] | reach[-1] << n) & (1 << room + 1) - 1)
    total, chosen = reach[-1].bit_length() - 1, [0]
    for i in range(len(lengths) - 1, 0, -1):
        if not reach[i - 1] >> total & 1:    # cannot be had without this one: the older ones go first
            chosen.append(i)
            total -= lengths[i]
    return sorted(chosen)


def next_row(pool, examples, room, size):
    """The examples of the next row of `room` tokens, taken out of `pool`, a list that is filled up from the iterator
    `examples` first; size(example) is its number of tokens."""
    pool += itertools.islice(examples, POOL - len(pool))
    chosen = best_fit([size(e) for e in pool], room)
    return [pool.pop(i) for i in reversed(chosen)][::-1]


def permute(i, n, key):
    """Where i goes in the permutation of range(n) that `key` names, without holding it: a Feistel network of four
    rounds on the next power of four, walked until it lands below n (Black & Rogaway 2002)."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for r in range(4):
            digest = hashlib.blake2b(f'{key}/{r}/{right}'.encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, 'little') & low
        i = left << half | right
        if i < n:
            return i


def mixture_rates(mixture, sizes):
    """{dataset: rate} of a config's `mixture` and the numbers of rows. Its entries are

    name: rate                             a dataset with a rate of its own
    group: {'rate': rate, 'sets': {name: {}, name: {'cap': 60_000, 'factor': 1.5}, ..}}
                                           sets share the group's rate as sqrt(rows, at most cap) x factor; further
                                           options: loss_weight multiplies the loss of a set's tokens, token_weight
                                           replaces all other weights of theirs, size is for the table (mixture_table)

    and all rates are divided by their sum (allenai/molmo2 data_loader.py, _build_mixture). One group of rate 1 is the
    plain sqrt-proportional rule, w_i = sqrt(n_i) / sum of sqrt(n_j).
    """
    rates, total = {}, sum(g['rate'] if isinstance(g, dict) else g for g in mixture.values())
    for key, group in mixture.items():
        if not isinstance(group, dict):
            rates[key] = group / total
            continue
        roots = {name: min(sizes[name], o.get('cap') or sizes[name]) ** .5 * o.get('factor', 1)
                 for name, o in group['sets'].items()}
        rates.update({name: group['rate'] / total * root / sum(roots.values()) for name, root in roots.items()})
    return rates


def mixture_sets(mixture):
    """{dataset: its options} of a config's `mixture`; a mistake in it is told in one line."""
    sets, known = {}, ('cap', 'factor', 'loss_weight', 'token_weight', 'size')
    for key, group in mixture.items():
        if isinstance(group, dict) and (set(group) != {'rate', 'sets'} or not group['sets']):
            raise UserError(f"mixture['{key}'] is a group: {{'rate': .5, 'sets': {{name: {{}}, ...}}}}")
        for name, options in (group['sets'] if isinstance(group, dict) else {key: {}}).items():
            if name in sets:
                raise UserError(f"mixture names dataset '{name}' twice")
            if wrong := [o for o in options if o not in known]:
                raise UserError(f"mixture: '{name}' has option '{wrong[0]}'; known: {', '.join(known)}")
            sets[name] = options
    return sets


def open_mixture(mixture, data_dir, seed=0):
    """The Mixture of a config's `mixture`, from the datasets' training splits."""
    sets = mixture_sets(mixture)
    if not sets:
        raise UserError("mixture is empty: name datasets and rates, as config/demo_stage1.py does")
    datasets = {name: Dataset(Path(data_dir) / name, **{k: v for k, v in o.items() if k not in ('factor', 'size')})
                for name, o in sets.items()}
    rates = mixture_rates(mixture, {name: dataset.rows for name, dataset in datasets.items()})
    return Mixture(list(datasets.values()), [rates[name] for name in datasets], seed)


class Mixture:
    """Rates over datasets. Draw k is a pure function of (seed, k): which dataset, by its rate, and which row: the
    dataset's next one in a permutation that is fresh every epoch."""
    BLOCK = 4096

    def __init__(self, datasets, rates, seed=0):
        if empty := [d.name for d in datasets if not len(d)]:
            raise UserError(f"dataset {empty[0]} has no rows")
        self.datasets, self.seed = datasets, seed
        self.rates = np.array(rates, float) / np.sum(rates)
        self.edges = np.cumsum(self.rates)[:-1]

    def _block(self, b):
        """The datasets of draws [b x BLOCK, (b + 1) x BLOCK)."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=b << 64))
        return np.searchsorted(self.edges, generator.random(self.BLOCK), side='right')

    def draws(self, start=0, stride=1):
        """Yields (k, dataset index, row) of every stride-th draw from `start` on. Counting those before costs 10 ns
        each."""
        counts = np.zeros(len(self.datasets), np.int64)
        for b in range(start // self.BLOCK):
            counts += np.bincount(self._block(b), minlength=len(counts))
        k = start // self.BLOCK * self.BLOCK
        while True:
            for d in self._block(k // self.BLOCK).tolist():
                if k >= start and (k - start) % stride == 0:
                    dataset = self.datasets[d]
                    epoch, i = divmod(int(counts[d]), len(dataset))
                    i = permute(i, len(dataset), f'{self.seed}/{d}/{epoch}')
                    yield k, d, permute(i, dataset.rows, f'{self.seed}/{d}') if dataset.cap else i   # any `cap` rows
                counts[d] += 1
                k += 1


class Rows(torch.utils.data.Dataset):
    """What a worker does: (draw, dataset, row) -> (draw, Example or what was wrong with the row)."""

    def __init__(self, mixture, processor):
        self.mixture, self.processor = mixture, processor

    def __getitem__(self, draw):
        k, d, row = draw
        dataset = self.mixture.datasets[d]
        try:
            example = self.processor.example(dataset[row], dataset.folder)
            if dataset.token_weight is not None:
                example.weights = [dataset.token_weight if w else 0. for w in example.weights]
            elif dataset.loss_weight != 1:
                example.weights = [w * dataset.loss_weight for w in example.weights]
            return draw, example
        except BadRow as e:
            return draw, {'row': dataset.where(row), 'reason': e.reason, 'problem': str(e), 'dataset': dataset.name}
        except UserError as e:               # returned, because a DataLoader would bury it in its worker's traceback
            return draw, e


def _quiet_worker(_):
    """Ctrl-C is the parent's to answer, and its SIGTERM handler is not ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Endless batches, whatever the number of workers; its state is a few numbers.

    Unpacked, a row is an example, in the order of the draws. Packed, rows of exactly `length` tokens are filled from a
    pool of POOL examples (`best_fit`); the pool's draws belong to the state and are read again after a resume.
    state: {'draw': the next draw, 'pool': [[draw, dataset, row]], 'seen': rows read, 'skipped': {'set: reason': n}}.
    Of `world_size` processes, each takes the draws rank, rank + world_size, ...
    """
    def __init__(self, mixture, processor, batch_size, num_workers=0, state=None, length=0, max_bad_fraction=.1,
                 report=None, packed=False, rank=0, world_size=1):
        self.batch_size, self.length, self.packed = batch_size, length, packed
        self.max_bad_fraction, self.report = max_bad_fraction, report
        self.rows = Rows(mixture, processor)
        self.state, self.stride = {'draw': rank, 'pool': [], 'seen': 0, 'skipped': {}, **(state or {})}, world_size
        self.state['skipped'] = dict(self.state['skipped'])
        self.num_workers = num_workers

    def examples(self):
        """Yields ((draw, dataset, row), Example): those of the pool again, then those of the draws from here on."""
        draws = self.rows.mixture.draws(self.state['draw'], self.stride)
        # A generator of its own, because a DataLoader draws a seed for its workers when it starts: from torch's general
        # generator that would move the dropout of a resumed run.
        rows = torch.utils.data.DataLoader(
            self.rows, sampler=itertools.chain(map(tuple, self.state['pool']), draws), batch_size=None,
            num_workers=self.num_workers, worker_init_fn=_quiet_worker, generator=torch.Generator(),
            prefetch_factor=4 * self.batch_size if self.num_workers else None,
            multiprocessing_context='fork' if self.num_workers and sys.platform == 'linux' else None)
        again = self.left = self.state['pool']
        for n, (draw, example) in enumerate(rows):
            self.left = again[n + 1:]
            if n >= len(again):
                self.state['draw'] = draw[0] + self.stride
                self.state['seen'] += 1
            if isinstance(example, UserError):
                raise example
            if isinstance(example, dict):
                self._skip(example)
            else:
                yield draw, example

    def __iter__(self):
        """Yields (batch, the state that continues after it)."""
        examples, pool, size = self.examples(), [], lambda item: len(item[1].tokens)
        name = lambda dataset: self.rows.mixture.datasets[dataset].name
        while True:
            rows, taken = [], []
            while len(rows) < self.batch_size:
                row = next_row(pool, examples, self.length, size) if self.packed else [next(examples)]
                rows.append([example for _, example in row])
                taken += [(name(dataset), i) for (_, dataset, i), _ in row]
            self.state['pool'] = [list(draw) for draw, _ in pool] + self.left
            batch = collate(rows, self.rows.processor, self.length)
            batch['rows'] = taken
            yield batch, {**self.state, 'skipped': dict(self.state['skipped'])}

    def _skip(self, problem):
        key = f"{problem['dataset']}: {problem['reason']}"
        self.state['skipped'][key] = self.state['skipped'].get(key, 0) + 1
        if self.report:
            self.report(problem)
        bad = sum(self.state['skipped'].values())
        if bad >= 20 and bad > self.max_bad_fraction * self.state['seen']:
            raise UserError(f"{bad} of {self.state['seen']} rows could not be used, more than max_bad_fraction = "
                            f"{self.max_bad_fraction}: {self.state['skipped']}; last: {problem['row']}: "
                            f"{problem['problem']}")


def processor_settings(settings):
    """What a config says about the Processor."""
    names = ('image_size', 'pooling', 'video_size', 'video_pooling', 'max_frames', 'fps', 'seq_len', 'point_format',
             'point_digits', 'task_weights', 'length_weighting', 'branch_weighting')
    return {k: settings[k] for k in names}


if __name__ == '__main__':
    try:
        from extra.inspector import main     # a page of what the model gets, and --check of a dataset
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
