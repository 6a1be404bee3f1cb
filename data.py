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
import html
import io
import itertools
import json
import math
import os
import re
import signal
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer

from media import (BadRow, data_url, draw_points, enlarge, load_image, load_subtitles, load_video,
                   open_media, points_at)
from model import PIXEL_STATS, UserError, from_hf, load_model, make_config, make_mask, newest, read_json

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

    # -- what travels with a checkpoint

    def save(self, folder):
        """Tokenizer and processor files in the layout transformers reads; our own settings in processor_config.json."""
        folder, size = Path(folder), {'height': self.image_size, 'width': self.image_size}
        for name, content in self.tokenizer_files.items():
            (folder / name).write_bytes(content)
        mean, std = (list(x) for x in _pixel_stats(folder))
        image = {'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3, 'do_rescale': True,
                 'do_center_crop': self.resize == 'crop', 'crop_size': size, 'do_normalize': True,
                 'do_convert_rgb': True, 'image_mean': mean, 'image_std': std,
                 'size': {'shortest_edge': self.image_size} if self.resize == 'crop' else size}
        ours = {k: getattr(self, k) for k in (
            'image_size', 'patch_size', 'pooling', 'video_size', 'video_pooling', 'max_frames', 'fps', 'resize',
            'image_token', 'point_format', 'point_digits')}
        processor = {'processor_class': 'LlavaProcessor', 'image_token': self.image_token,
                     'patch_size': self.patch_size, 'num_additional_image_tokens': 1,
                     'vision_feature_select_strategy': 'default', 'nanomolmo2': ours}
        for name, content in (('preprocessor_config.json', image), ('processor_config.json', processor)):
            (folder / name).write_text(json.dumps(content, indent=2))
        (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)

    @classmethod
    def saved(cls, folder, config):
        """The settings that a checkpoint folder was trained with: ours, or a llava folder of others as its processor
        files say."""
        path = Path(folder) / 'processor_config.json'
        theirs = read_json(path) if path.exists() else {}
        settings = theirs.get('nanomolmo2')
        if settings is None:
            image = Path(folder) / 'preprocessor_config.json'
            image = read_json(image) if image.exists() else theirs.get('image_processor', {})
            size = image.get('crop_size' if image.get('do_center_crop', True) else 'size', config.vision.image_size)
            size = size.get('height', size.get('shortest_edge')) if isinstance(size, dict) else size
            settings = dict(image_size=size, patch_size=config.vision.patch_size, pooling=config.pooling,
                            resize='crop' if image.get('do_center_crop', True) else 'stretch',
                            image_token=theirs.get('image_token', '<|image_pad|>'))
        return {'video_size': settings['image_size'], 'video_pooling': settings['pooling'],
                'point_format': cls.point_format, 'point_digits': cls.point_digits, **settings}

    @classmethod
    def load(cls, folder, config, **overrides):
        """The processor of a checkpoint folder."""
        if is_released(folder):
            return Molmo2Processor(folder, **overrides)
        return cls(folder, **{**cls.saved(folder, config), **overrides})


def is_released(folder):
    """Is a folder a Molmo2 with processor files that are not ours?"""
    path = Path(folder) / 'processor_config.json'
    return path.exists() and read_json(path).get('processor_class') == 'Molmo2Processor'


def bilinear(image, height, width):
    """An RGB picture as uint8 [height, width, 3], each pixel of its four nearest: as torch's interpolate without
    antialiasing, which Molmo2 was trained with."""
    def taps(n, size):                       # the two pixels around each place, and how near the second is
        where = np.maximum((np.arange(size, dtype=np.float32) + .5) * np.float32(n / size) - .5, 0)
        first = np.minimum(where.astype(np.int64), n - 1)
        return first, np.minimum(first + 1, n - 1), where - first
    pixels = np.asarray(image)
    (top, bottom, down), (left, right, across) = taps(len(pixels), height), taps(pixels.shape[1], width)
    down, across = down[:, None, None], across[None, :, None]
    upper, lower = (pixels[y[:, None], left] * (1 - across) + pixels[y[:, None], right] * across for y in (top, bottom))
    return np.rint(upper * (1 - down) + lower * down).clip(0, 255).astype(np.uint8)


class Molmo2Processor(Processor):
    """The released Molmo2's own: a picture is seen whole and in up to `max_crops` overlapping crops, a frame whole with
    3 x 3 pooling, all after <|im_end|> as the first token (transformers, models/molmo2; allenai/molmo2, preprocessing).
    """
    point_format = 'molmo2'
    resize = 'whole'               # of videos: as they are, until they are cut
    image_token = '<im_patch>'
    FILES = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
             'processor_config.json', 'preprocessor_config.json', 'video_preprocessor_config.json',
             'chat_template.jinja', 'chat_template.json', 'generation_config.json')

    def __init__(self, folder, **settings):
        folder = Path(folder)
        theirs = read_json(folder / 'processor_config.json')
        image, video = ({**theirs.get(part, {}), **(read_json(folder / file) if (folder / file).exists() else {})}
                        for part, file in (('image_processor', 'preprocessor_config.json'),
                                           ('video_processor', 'video_preprocessor_config.json')))
        size, patch = image.get('size', {}).get('height', 378), image.get('patch_size', 14)
        self.max_crops, (self.margin, right) = image.get('max_crops', 8), image.get('overlap_margins', [4, 4])
        pooling, frame_pooling = (part.get('pooling_size', [k] * 2) for part, k in ((image, 2), (video, 3)))
        if right != self.margin or len(set(pooling)) > 1 or len(set(frame_pooling)) > 1:
            raise UserError(f'{folder} has margins {[self.margin, right]} and windows {pooling}, {frame_pooling}: only '
                            'equal ones are known here')
        columns = theirs.get('image_use_col_tokens', True)
        whole = theirs.get('use_single_crop_col_tokens')
        self.columns = columns if whole is None else whole, columns, theirs.get('video_use_col_tokens', False)
        settings = {'max_frames': video.get('num_frames', self.max_frames), 'fps': video.get('max_fps', self.fps),
                    **settings}
        ours = ('seq_len', 'max_frames', 'fps', 'task_weights', 'length_weighting', 'branch_weighting')
        super().__init__(folder, size, patch, pooling[0], video_pooling=frame_pooling[0],
                         **{k: v for k, v in settings.items() if k in ours})
        self.video_pad, self.past = self.image_pad, self.encode('\n ')     # the released template's stray space
        names = ('<im_start>', '<im_end>', '<im_patch>', '<im_col>', '<low_res_im_start>', '<im_low>', '<frame_start>',
                 '<frame_end>')
        self.visual_ids = tuple(map(self.tokenizer.token_to_id, names))
        if None in self.visual_ids:
            raise UserError(f"the tokenizer in {folder} lacks {names[self.visual_ids.index(None)]}")
        self.start, self.stop, _, self.column, self.whole_start, _, *self.frame = self.visual_ids
        if not theirs.get('use_single_crop_start_token', True):
            self.whole_start = self.start
        if not theirs.get('use_frame_special_tokens', True):
            self.frame = [self.start, self.stop]
        self.frame_tokens = len(self.encode(' 9999.9 ')) + 2 + self._tokens(len(self.frame_window), self.columns[2])
        self.tokenizer_files |= {name: (folder / name).read_bytes() for name in self.FILES if (folder / name).is_file()}

    def token_ids(self):
        return {'image_token_id': self.image_pad, 'video_token_id': self.image_pad, 'eos_token_id': self.im_end,
                'pad_token_id': self.pad, 'visual_token_ids': self.visual_ids}

    def _tokens(self, number, columns):
        return number + (round(number ** .5) if columns else 0)

    def tiling(self, height, width):
        """(rows, columns) of crops for a picture: of those that need no shrinking the one that enlarges least, else the
        one that shrinks least; the first of the fewest crops."""
        margin = 2 * self.margin * self.patch_size
        step = self.image_size - margin
        n = range(1, self.max_crops + 1)
        every = sorted(((r, c) for r in n for c in n if r * c <= self.max_crops), key=lambda rc: (rc[0] * rc[1], rc[0]))
        sides = np.array([height - margin, width - margin], np.float32)
        with np.errstate(divide='ignore'):
            scale = (np.array(every, np.float32) * step / sides).min(1)
        return every[int(scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.float32(1e10), scale).argmin())]

    def crops(self, image):
        """A picture -> patches [1 + crops, num_patches, patch_dim] of the whole and of its crops, and the grid of those
        patches, counted through all crops, that make up the picture: where crops overlap, the inner ones."""
        rows, columns = self.tiling(image.height, image.width)
        size, p, m, side = self.image_size, self.patch_size, self.margin, self.grid[0]
        step = size - 2 * m * p
        canvas = bilinear(image, rows * step + 2 * m * p, columns * step + 2 * m * p)
        cut = [canvas[r * step:r * step + size, c * step:c * step + size] for r in range(rows) for c in range(columns)]
        index = np.arange(rows * columns * side * side).reshape(rows, columns, side, side) + side * side
        # a crop's own patches: without the margin where a neighbour is
        own = lambda i, n: slice(m if i else 0, side - m if i < n - 1 else side)
        grid = np.block([[index[r, c, own(r, rows), own(c, columns)] for c in range(columns)] for r in range(rows)])
        return np.stack([self._patches(x) for x in (bilinear(image, size, size), *cut)]), grid

    def _see(self, e, seen, patches, index, start, stop, columns):
        """Adds crops and one visual token for each window of `index` [rows, columns, window] to an example."""
        e.tokens.append(start)
        for row in index:
            seen['visual'] += range(len(e.tokens), len(e.tokens) + len(row))
            e.tokens += [self.image_pad] * len(row) + [self.column] * columns
        e.tokens.append(stop)
        offset = sum(map(len, seen['patches'])) * self.grid[0] * self.grid[1]
        seen['pool'].append(np.pad(np.where(index < 0, -1, index + offset).reshape(-1, index.shape[-1]),
                                   ((0, 0), (0, seen['width'] - index.shape[-1])), constant_values=-1))
        if patches is not None:
            seen['patches'].append(patches)

    def _shared(self, images=(), clip=((), ()), subtitles=()):
        e, seen = Example(tokens=[self.im_end]), {'patches': [], 'pool': [], 'visual': []}
        frames = len(clip[0]) > 0
        seen['width'] = (self.video_pooling if frames else self.pooling) ** 2
        pooled = lambda grid, k: -(-grid[0] // k)
        rows = pooled(self.grid, self.pooling), pooled(self.frame_grid, self.video_pooling)
        for i, (t, image) in enumerate(zip(*clip) if frames else ()):
            e.tokens += self.encode(f'{" " if i else ""}{t:.1f} ')
            self._see(e, seen, self._patches(bilinear(image, self.image_size, self.image_size))[None],
                      self.frame_window.reshape(rows[1], rows[1], -1), *self.frame, self.columns[2])
        for i, image in enumerate(images):
            e.tokens += self.encode(f'Image {i + 1}') if len(images) > 1 else []
            patches, grid = self.crops(image)
            window = windows(grid.shape, self.pooling)
            window = np.where(window < 0, -1, grid.flatten()[window]).reshape(pooled(grid.shape, self.pooling), -1,
                                                                              seen['width'])
            self._see(e, seen, None, self.window.reshape(rows[0], rows[0], -1), self.whole_start, self.stop, self.columns[0])
            self._see(e, seen, patches, window, self.start, self.stop, self.columns[1])
        lines = [f"{c['start']:.1f} - {c['end']:.1f} {c['text']}\n" for c in subtitles]
        e.tokens += self.encode('subtitle\n' + ''.join(lines)) if lines else []
        if seen['pool']:
            e.patches, e.pool_index = np.concatenate(seen['patches']), np.concatenate(seen['pool'])
            e.visual_index, e.grid, e.times = np.array(seen['visual'], np.int64), self.grid, tuple(clip[0])
        return self._only_seen(e)

    def _dialogue(self, conversation, times=None, past=None):
        if conversation['messages'][0]['role'] == 'system':
            raise BadRow('system message', 'a released Molmo2 knows no system message')
        return super()._dialogue(conversation, times, past)

    def save(self, folder):
        for name, content in self.tokenizer_files.items():
            (Path(folder) / name).write_bytes(content)


def load_checkpoint(path, **settings):
    """(model, processor, folder) of a checkpoint or of a run's newest one. Examples may be as long as the decoder counts."""
    folder = newest(path)
    model = load_model(folder)
    settings = {'seq_len': model.config.language.max_position_embeddings, **settings}
    return model, Processor.load(folder, model.config, **settings), folder


def _pixel_stats(folder):
    return PIXEL_STATS[from_hf(read_json(Path(folder) / 'config.json')).vision.style]


# Media first, then ChatML, as `Processor` lays them out: the template for transformers' apply_chat_template
CHAT_TEMPLATE = """\
{%- set images = namespace(n=0, seen=0) -%}
{%- for m in messages -%}{%- if m.content is not string -%}{%- for c in m.content -%}
{%- if c.type == 'image' or c.type == 'video' -%}{%- set images.n = images.n + 1 -%}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}{%- if m.content is not string -%}{%- for c in m.content -%}
{%- if c.type == 'image' or c.type == 'video' -%}{%- set images.seen = images.seen + 1 -%}
{%- if images.n > 1 -%}{{ 'Image ' ~ images.seen }}{%- endif -%}
{{ '<|vision_start|><|' ~ c.type ~ '_pad|><|vision_end|>' }}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for c in m.content -%}{%- if c.type == 'text' -%}{{ c.text }}{%- endif -%}{%- endfor -%}{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n<|im_start|>assistant\\n' }}{%- endif -%}
"""


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


def share_rows(batch, index, n):
    """Piece `index` of the `n` that a batch is cut into for as many ranks: a stretch of every row's tokens with their
    losses, the visual tokens among them, and a share of the crops. Rows are padded until n divides them, and so are the
    crops, whose features all ranks gather, those of rank 0 first (model.py, VLM.see). What masks are made of stays
    whole: document_ids, branch_ids and, as `row_tokens`, the tokens.
    """
    L, cut = batch['tokens'].shape[1], dict(batch)
    size = -(-L // n)
    mine = slice(index * size, (index + 1) * size)
    for key in ('tokens', 'targets', 'loss_weights', 'position_ids', 'document_ids', 'branch_ids'):
        cut[key] = F.pad(batch[key], (0, n * size - L), value=-1 if key == 'document_ids' else 0)    # [B, n size]
    cut['row_tokens'], real = cut['tokens'], cut['document_ids'][:, mine] >= 0
    for key in ('tokens', 'targets', 'loss_weights', 'position_ids'):
        cut[key] = cut[key][:, mine].contiguous()                                                # [B, size]

    def place(flat):
        """Flat places in [B, L] -> which of them are in this piece, and where in [B, size]."""
        row, column = flat // L, flat % L - mine.start
        inside = (column >= 0) & (column < size)
        return inside, (row * size + column)[inside]
    inside, cut['loss_index'] = place(batch['loss_index'])
    cut['loss_tasks'] = batch['loss_tasks'][inside]
    if 'pool_index' in batch:
        kinds = [(name, *batch[name].shape[:2], -(-len(batch[name]) // n)) for name in ('patches', 'frames')
                 if name in batch]           # a name, its crops, the patches of one, the crops of a share
        share, before, gathered = sum(p * crops for _, _, p, crops in kinds), 0, []
        for name, number, patches, crops in kinds:
            ours = batch[name][index * crops:(index + 1) * crops]
            cut[name] = F.pad(ours, (0, 0, 0, 0, 0, crops - len(ours)))
            i = torch.arange(number * patches)
            gathered.append(i // (crops * patches) * share + before + i % (crops * patches))
            before += crops * patches
        inside, cut['visual_index'] = place(batch['visual_index'])
        pool = batch['pool_index'][inside]
        cut['pool_index'] = torch.where(pool < 0, -1, torch.cat(gathered)[pool.clamp(min=0)])
    cut.update(n_tokens=int(real.sum()), total_weight=float(cut['loss_weights'].sum()),
               n_pairs=int((cut['position_ids'] + 1)[real].sum()))
    return cut


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


def mixture_table(mixture, data_dir, draws):
    """A line per dataset: rows, square root, share of the draws, draws of the whole run, epochs. A dataset that is not
    there yet counts with the `size` that the config gives it."""
    sets, sizes, missing = mixture_sets(mixture), {}, set()
    for name, options in sets.items():
        try:
            sizes[name] = Dataset(Path(data_dir) / name).rows
        except UserError:
            missing.add(name)
            sizes[name] = options.get('size', 0)
    rates = mixture_rates(mixture, {name: max(1, size) for name, size in sizes.items()})
    lines = [f"{'dataset':<34}{'rows':>11}{'sqrt':>8}{'weight':>9}{'draws':>13}{'epochs':>9}"]
    for key, group in mixture.items():
        names = list(group['sets']) if isinstance(group, dict) else [key]
        if len(names) > 1:
            lines.append(f"{key:<53}{sum(rates[n] for n in names):>9.2%}")
        for name in names:
            used = min(sizes[name], sets[name].get('cap') or sizes[name])
            lines.append(f"{'  ' * (len(names) > 1) + name + ' *' * (name in missing):<34}{used:>11,}{used ** .5:>8.0f}"
                         f"{rates[name]:>9.2%}{draws * rates[name]:>13,.0f}"
                         + (f'{draws * rates[name] / used:>9.2f}' if used else f"{'?':>9}"))
    return lines + ['* not prepared yet; rows as the config expects'] * bool(missing)


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


def deal_out(states, n, mixture):
    """The states of some loaders that read a mixture together -> those of `n` that go on together: what waited in the
    pools and what the slower ones had still to draw is dealt out, the new draws begin after the fastest."""
    if len(states) == n:
        return states
    following = {s['draw'] % len(states): s['draw'] for s in states}
    first, end = min(following.values()), max(following.values())
    drawn = itertools.takewhile(lambda draw: draw[0] < end, mixture.draws(first))
    left = sorted(row for s in states for row in s['pool'])
    left += [list(draw) for draw in drawn if draw[0] >= following[draw[0] % len(states)]]
    dealt = [{'draw': end + i, 'pool': left[i::n], 'seen': 0, 'skipped': {}} for i in range(n)]
    dealt[0].update(seen=sum(s['seen'] for s in states),
                    skipped=dict(sum((Counter(s['skipped']) for s in states), Counter())))
    return dealt


# ---------------------------------------------------------------------------------------------------------------------
# The inspector: what the model gets, for a person to look at

STYLE = """<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.t{border-radius:3px;padding:1px 0;border-right:1px solid #0002} .v{background:#cfe3ff} .s{color:#888}
img{max-width:24em;image-rendering:auto;border:1px solid #ccc;vertical-align:top} h2{font-size:1em;margin-top:2em}
pre,.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;margin:.4em 0}
table{border-collapse:collapse} td,th{padding:2px 10px;text-align:right} td:first-child,th:first-child{text-align:left}
</style>"""


def as_model_sees(patches, grid, points=(), scale=1):
    """Patches of one crop [num_patches, patch_dim] put back together, with points drawn: shape and order show."""
    (rows, columns), p = grid, math.isqrt(patches.shape[1] // 3)
    pixels = patches.reshape(rows, columns, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * p, columns * p, 3)
    size = columns * p * scale, rows * p * scale
    return draw_points(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), points)


def tokens_html(example, processor):
    """Every token as a coloured box: green by loss weight, blue and counted for visual tokens, a line per branch."""
    top = max(example.weights) or 1
    lines, visual, branch = [''], 0, 0
    for token, weight, b in zip([*example.tokens, None], [*example.weights, 0], [*example.branches, 0]):
        if token in (processor.image_pad, processor.video_pad):
            visual += 1
            continue
        if visual:
            lines[-1] += f'<span class="t v">&#9635; &times; {visual}</span>'
            visual = 0
        if token is None:
            break
        if b != branch:
            lines.append('')
            branch = b
        text = processor.tokenizer.decode([token], skip_special_tokens=False)
        shade = f'background:rgba(40,170,70,{.15 + .6 * weight / top:.2f})' if weight else ''
        special = ' s' if token in (processor.im_start, processor.im_end) else ''
        lines[-1] += (f'<span class="t{special}" style="{shade}" title="id {token}, loss weight {weight:.3g}">'
                      f'{html.escape(text)}</span>')
    return ''.join(f'<div class="tokens">{line}</div>' for line in lines)


def mask_picture(examples, length, visual_ids, side=512):
    """A packed row and what its tokens see: above, a colour a document, pale where it is seen or asked, strong where
    it answers; below, coloured where the token of that row of pixels sees the one of that column. Every n-th token."""
    tokens, weights, documents, branches = (np.full(length, fill) for fill in (-1, 0., -1, 0))
    start = 0
    for i, e in enumerate(examples):
        here = slice(start, start := start + len(e.tokens))
        tokens[here], weights[here], documents[here], branches[here] = e.tokens, e.weights, i, e.branches
    at = np.arange(0, length, -(-length // side))
    ids = [torch.from_numpy(x[at][None]) for x in (documents, branches)]
    visual = torch.from_numpy(np.isin(tokens[at], visual_ids)[None]) if visual_ids else None
    sees = make_mask(*ids, visual)[0, 0].numpy() & (documents[at] >= 0)
    colours = np.array([(230, 80, 60), (60, 130, 220), (60, 170, 90), (200, 140, 30), (150, 80, 190)])
    colour = np.where(documents[at, None] < 0, 0, colours[documents[at] % len(colours)])
    strip = np.where(weights[at, None] > 0, colour, 255 - (255 - colour) // 3)
    below = np.where(sees[..., None], 255 - (255 - colour[None]) // 2, 20)
    pixels = np.concatenate([np.tile(strip, (12, 1, 1)), below])
    return enlarge(Image.fromarray(pixels.astype(np.uint8)), side)


def processor_settings(settings):
    """What a config says about the Processor."""
    names = ('image_size', 'pooling', 'video_size', 'video_pooling', 'max_frames', 'fps', 'seq_len', 'point_format',
             'point_digits', 'task_weights', 'length_weighting', 'branch_weighting')
    return {k: settings[k] for k in names}


def make_processor(settings):
    """(Processor, model Config) of a config, whose checkpoint need not be trained yet."""
    source = settings['init_from'] and newest(settings['init_from'])
    config = (from_hf(read_json(source / 'config.json')) if source else
              make_config(settings['vision'], settings['language'], recipe=settings['recipe']))
    folder = settings['tokenizer'] or source or settings['language_weights']
    if not folder:
        raise UserError("give a config, or --tokenizer=folder with tokenizer.json")
    if source and is_released(source):
        return Molmo2Processor(source, **processor_settings(settings)), config
    return Processor(folder, patch_size=config.vision.patch_size, **processor_settings(settings)), config


def inspect(settings, number=12):
    """Prints a config's mixture and a few examples of it; writes <out_dir>/inspect.html."""
    from tqdm import tqdm
    table = lambda examples: mixture_table(settings['mixture'], settings['data_dir'], examples)
    rows = settings['max_steps'] * settings['batch_size'] * settings['accumulation']
    if not settings['mixture']:
        raise UserError("mixture is empty; give a config: python data.py config/demo_stage1.py")
    if (lines := table(rows))[-1].startswith('*'):
        print('\n'.join(lines))
        return print(f'the draws are those of {rows:,} examples; nothing to look at before the data is there')
    processor, config = make_processor(settings)
    mixture = open_mixture(settings['mixture'], settings['data_dir'], settings['seed'])
    loss, weights, skipped, examples, page = Counter(), Counter(), Counter(), [], []
    reader = Rows(mixture, processor)
    for draw in tqdm(itertools.islice(mixture.draws(), 200), total=200, unit='row', disable=None):
        dataset = mixture.datasets[draw[1]]
        _, example = reader[draw]
        if isinstance(example, dict):
            skipped[f"{dataset.name}: {example['reason']}"] += 1
            tqdm.write(f"skipped {example['row']}: {example['problem']}")
            continue
        examples.append(example)
        for task, weight in zip(example.tasks, example.weights):
            if weight:
                loss[TASKS[task]] += 1
                weights[TASKS[task]] += weight
        if len(examples) <= number:
            page.append(example_html(example, dataset, draw, processor))
        if len(examples) <= 3:
            told = [t for t in example.tokens if t not in (processor.image_pad, processor.video_pad)]
            print(f'\ndraw {draw[0]}: {dataset.where(draw[2])}, {len(example.tokens)} tokens\n'
                  + processor.tokenizer.decode(told, skip_special_tokens=False))
    lengths = [len(e.tokens) for e in examples] or [0]
    if settings['packing'] and examples:
        rows = int(rows * processor.seq_len / np.mean(lengths))
    lines = table(rows) + ['', f"{'task':<16}{'loss tokens':>12}{'share of loss weight':>22}"]
    lines += [f'{t:<16}{n:>12,}{weights[t] / sum(weights.values()):>22.1%}' for t, n in loss.most_common()]
    lines += ['', f'tokens an example: mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}, '
                  f'most {max(lengths)} of seq_len {processor.seq_len}']
    lines += [f'skipped {reason}: {n}' for reason, n in skipped.items()]
    print('\n' + '\n'.join(lines))
    head = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(settings['out_dir'])}</title>{STYLE}",
            '<pre>' + html.escape('\n'.join(lines)) + '</pre>',
            '<p>Blue: visual tokens. Green: tokens with a loss, darker with its weight. One line a conversation: each '
            'sees the first line and itself. Hover for ids and weights.</p>']
    if settings['packing'] and examples:
        row = [examples[i] for i in best_fit(lengths[:POOL], processor.seq_len)]
        picture = mask_picture(row, processor.seq_len, config.visual_token_ids)
        head.append(f'<p>{len(row)} examples packed into a row, {sum(len(e.tokens) for e in row)} of '
                    f'{processor.seq_len} tokens, and which token (down) sees which (across): a colour a document, '
                    f'strong where it answers.</p><img style="max-width:none" src="{data_url(picture)}">')
    out = Path(settings['out_dir'])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'inspect.html').write_text('\n'.join(head + page), encoding='utf-8')
    print(f'\nwrote {out}/inspect.html')


def example_html(example, dataset, draw, processor):
    """What the model gets of one row: its pictures or frames with the points on them, and its tokens."""
    record = dataset[draw[2]]
    page = [f'<h2>draw {draw[0]}: {html.escape(dataset.where(draw[2]))}, {len(example.tokens)} tokens, '
            f'{len(record["conversations"])} conversations</h2>']
    points = [p for c in record['conversations'] for m in c['messages']
              for p in (m.get('points') or {}).get('points', ())]
    scale = max(1, (128 if example.times else 256) // processor.image_size)
    for i, patches in enumerate(example.patches if example.patches is not None else ()):
        here = points_at(points, example.times[i]) if example.times else [p for p in points if p.get('image', 0) == i]
        page.append(f'<img src="{data_url(as_model_sees(patches, example.grid, here, scale))}">')
    return '\n'.join(page + [tokens_html(example, processor)])


def suspicions(record, example):
    """Yields what can be used but was perhaps not meant, one line each."""
    left_out = len(record['conversations']) - max(example.branches)
    if left_out:
        yield 'left out', f'{left_out} of {len(record["conversations"])} conversations do not fit'
    if repeated := [path for path, n in Counter(record['images']).items() if n > 1]:
        yield 'repeated picture', repeated[0]
    for message in (m for c in record['conversations'] for m in c['messages']):
        points = (message.get('points') or {}).get('points', [])
        if message['role'] == 'assistant' and not message['content'] and message.get('points') is None:
            yield 'empty answer', 'an assistant turn without content or points'
        if mark := re.search(r'<(image|video)>', message['content']):
            yield 'mark in the text', f'{mark[0]} inside a message stays text'
        if any(not 0 <= p[k] <= 1 for p in points for k in 'xy'):
            yield 'point outside', 'a point beyond the border is moved to it'
        if len({(p['x'], p['y'], p.get('t'), p.get('image')) for p in points}) < len(points):
            yield 'repeated point', 'two points at one place'
        if late := [p['t'] for p in points if 't' in p and example.times and p['t'] > example.times[-1] + .5]:
            yield 'late point', f'a point at {late[0]} s in a clip of {example.times[-1]:.1f} s'


def check(path, settings):
    """Reads every row of a dataset as training would and says what is wrong or odd: counts, and the first few."""
    from tqdm import tqdm
    processor, path = make_processor(settings)[0], Path(path)
    splits = [path.stem] if path.suffix == '.jsonl' else [p.stem for p in sorted(path.glob('*.jsonl'))]
    if not splits:
        raise UserError(f'{path} holds no .jsonl file')
    for split in splits:
        dataset = Dataset(path.parent if path.suffix == '.jsonl' else path, split)
        odd, tasks, lengths, answers = Counter(), Counter(), [], []

        def tell(row, kind, what):
            odd[kind] += 1
            if odd[kind] <= 5:
                tqdm.write(f'{dataset.where(row)}: {kind}: {what}')
        for row in tqdm(range(dataset.rows), unit='row', desc=split, disable=None):
            try:
                record = dataset[row]
                tasks.update(c.get('task', 'other') for c in record['conversations'])
                example = processor.example(record, dataset.folder)
            except BadRow as e:
                tell(row, e.reason, e)
                continue
            lengths.append(len(example.tokens))
            answers.append(max(Counter(b for b, w in zip(example.branches, example.weights) if w).values()))
            if answers[-1] > processor.seq_len // 2:
                tell(row, 'long answer', f'{answers[-1]} tokens')
            for kind, what in suspicions(record, example):
                tell(row, kind, what)
        print(f'{dataset.path}: {dataset.rows:,} rows, {len(lengths):,} usable; conversations: '
              + (', '.join(f'{t} {n:,}' for t, n in tasks.most_common()) or 'none'))
        for name, n in (('row', lengths), ('longest answer of a row', answers)):
            if n:
                print(f'  tokens a {name}: median {np.median(n):.0f}, 99% {np.quantile(n, .99):.0f}, most {max(n)}'
                      f' (seq_len {processor.seq_len})')
        for kind, n in odd.most_common():
            print(f'  {kind}: {n:,}')


def main():
    from configurator import configure, train_settings
    paths = [arg.partition('=')[2] for arg in sys.argv[1:] if arg.startswith('--check=')]
    settings = configure(train_settings(), [arg for arg in sys.argv[1:] if not arg.startswith('--check=')])
    if paths:
        check(paths[0], settings)
    else:
        inspect(settings)


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
