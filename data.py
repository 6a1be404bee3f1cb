"""From files to batches: the path of one record.

    data/<name>/train.jsonl + media          one JSON record a line, found through an offset index (Dataset)
       │  Mixture                            draw k of the run -> (data set, row): a pure function of (seed, k)
       ▼
    record  {"images": [...], "conversations": [{"task": ..., "messages": [...]}, ...]}
       │  Processor.example                  decode, resize, cut into patches; token ids and loss weights, turn by turn
       ▼
    Example                                  tokens, weights, branches [L]; patches [crops, patches, patch_dim] uint8
       │  Loader: next_row, collate          pack into rows, pad, shift targets, flatten the indices
       ▼
    Batch                                    documented in model.py

A record is a message tree: its media come first, then each conversation as a branch that attends to
the media and to itself, so a picture with ten questions is decoded and encoded once. Points are
structured in the record and become text here. A row that cannot be used raises BadRow; the Loader
skips it, counts it by reason and names it. How records are checked stands last.

Pixels stay uint8 all the way; they are normalised on the device (VLM.normalize in model.py).

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

from configurator import UserError
from media import BadRow, load_image, load_subtitles, load_video, open_media
from model import Batch

TASKS = ('captioning', 'qa', 'counting', 'pointing', 'tracking', 'text', 'other')
MAX_LINE = 16 * 2 ** 20                      # bytes of one record


# --------------------------------------------------------------------------------------------------
# Records on disk

class Dataset:
    """A JSONL file as a sequence of records. The byte offsets of its lines are found once and kept
    beside it, in a file that is mapped into memory and not read: ten million rows cost no memory.

    folder holds <split>.jsonl and the media. cap: so many rows count, any of them. loss_weight
    multiplies the loss weights of this data set's tokens; token_weight replaces them
    (Processor.answer_weight).
    """

    def __init__(self, folder, split='train', cap=None, loss_weight=1., token_weight=None):
        self.folder = Path(folder)
        self.cap = cap
        self.loss_weight = loss_weight
        self.token_weight = token_weight
        self.name = self.folder.name
        self.path = self.folder / f'{split}.jsonl'
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; prepare the dataset first (prepare/)")
        self.offsets = self._open_index(self.path.with_name(f'.{split}.index'))

    def _open_index(self, index):
        """The numbers [size of the file, when it was changed, first byte of each line.., its end];
        the first two tell an index that is out of date."""
        status = self.path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        try:
            offsets = np.memmap(index, np.int64, 'r')
            if offsets[:2].tolist() == stamp:
                return offsets
        except (OSError, ValueError):        # there is none, or it is empty
            pass
        try:
            temporary = index.with_suffix(f'.{os.getpid()}.{id(self)}.tmp')
            with open(temporary, 'wb') as f:
                self._scan(f, stamp)
            temporary.replace(index)
            return np.memmap(index, np.int64, 'r')
        except OSError:          # a folder that cannot be written to: a scan each start, and memory
            buffer = io.BytesIO()
            self._scan(buffer, stamp)
            return np.frombuffer(buffer.getvalue(), np.int64)

    def _scan(self, out, stamp):
        """Writes the stamp, where each line that is not empty starts, and where the last one ends.
        """
        offsets = array('q', stamp)
        start, end = 0, 0                    # of the line that is being read
        is_empty = True
        with open(self.path, 'rb') as f:
            while True:
                piece = f.readline(2 ** 20)  # in pieces, because a line has no limit and memory has
                end += len(piece)
                is_empty = is_empty and piece.strip() == b''
                if piece and not piece.endswith(b'\n'):
                    continue
                if not is_empty:
                    offsets.append(start)
                if not piece:
                    break
                start = end
                is_empty = True
                if len(offsets) >= 2 ** 16:
                    out.write(offsets.tobytes())
                    del offsets[:]
        offsets.append(end)
        out.write(offsets.tobytes())

    @property
    def rows(self):
        """The number of rows in the file; len() is how many of them count."""
        return len(self.offsets) - 3

    def __len__(self):
        return min(self.rows, self.cap or self.rows)

    def __getitem__(self, row):
        start, end = int(self.offsets[row + 2]), int(self.offsets[row + 3])
        if end - start > MAX_LINE:
            raise BadRow('too large', f'{end - start:,} bytes in one line (limit {MAX_LINE:,})')
        with open(self.path, 'rb') as f:     # opened for each call, because threads and workers read at once
            f.seek(start)
            line = f.read(end - start)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRow('broken JSON', str(e)) from None
        return normalise(record)

    def where(self, row):
        """'data/pixmo/train.jsonl line 713', for messages."""
        left = int(self.offsets[row + 2])    # bytes in front of the row
        lines = 0
        with open(self.path, 'rb') as f:
            while left > 0:
                piece = f.read(min(2 ** 20, left))
                if not piece:                # the file has become shorter
                    break
                lines += piece.count(b'\n')
                left -= len(piece)
        return f'{self.path} line {lines + 1}'


# --------------------------------------------------------------------------------------------------
# Points: structured in a record, text in the model's answer. Formatting and parsing are inverse
# functions.

def format_points(points, label='', syntax='point', digits=3, tracks=False):
    """Points {x, y in [0, 1], id, and t seconds or image index from 0} as text.

    'point'   <point 0.530, 0.210, 1> <point 0.700, 0.250, 2>   with t or the number of the image first where there is one
    'molmo2'  <points coords="1 1 530 210 2 700 250">label</points>   thousandths, sorted by (x, y), ids renumbered;
              <tracks ...> keeps ids (allenai/molmo2 preprocessing/point_formatter.py, html-v2)
    """
    if not points:
        return 'There are none.'
    if syntax == 'point':
        return _format_plain(points, digits)
    return _format_molmo2(points, label, tracks)


def _format_plain(points, digits):
    texts = []
    for number, p in enumerate(points, 1):
        first = ''
        if 't' in p:
            first = f"{p['t']:.1f}, "
        elif 'image' in p:
            first = f"{p['image'] + 1}, "
        x = min(max(p['x'], 0), 1)
        y = min(max(p['y'], 0), 1)
        texts.append(f"<point {first}{x:.{digits}f}, {y:.{digits}f}, {p.get('id', number)}>")
    return ' '.join(texts)


def _format_molmo2(points, label, tracks):
    frames = {}                           # seconds, or number of the image, as text -> [(x, y, id)]
    for p in points:
        frame = f"{p['t']:.1f}" if 't' in p else str(p.get('image', 0) + 1)
        x = round(1000 * min(max(p['x'], 0), 1))
        y = round(1000 * min(max(p['y'], 0), 1))
        frames.setdefault(frame, []).append((x, y, p.get('id')))
    coords = []
    number = 0
    for frame in sorted(frames, key=float):
        order = (lambda p: p[2]) if tracks else (lambda p: p[:2])
        triples = []
        for x, y, id in sorted(frames[frame], key=order):
            number += 1
            triples.append(f'{id if tracks else number} {x:03d} {y:03d}')
        coords.append(f"{frame} {' '.join(triples)}")
    tag = 'tracks' if tracks else 'points'
    return f'<{tag} coords="{";".join(coords)}">{label.lower()}</{tag}>'


_POINT = re.compile(r'<point ((?:\d+(?:\.\d+)?, ){2,3})(\d+)>')
_COORDS = re.compile(r'<(?:points|tracks)\b[^>]*?coords="([0-9\t:;, .]+)"')


def parse_points(text):
    """The points in a text of either syntax: [{x, y, id, (t | image)}]. What does not parse is left
    out."""
    points = []
    for numbers, id in _POINT.findall(text):
        *first, x, y = numbers.rstrip(', ').split(', ')
        point = {'x': float(x), 'y': float(y), 'id': int(id)}
        if first and '.' in first[0]:        # a time has a decimal, the number of an image has not
            point['t'] = float(first[0])
        elif first:
            point['image'] = int(first[0]) - 1
        points.append(point)
    for coords in _COORDS.findall(text):
        points += _parse_coords(coords)
    return [p for p in points if p['x'] <= 1 and p['y'] <= 1]


def _parse_coords(coords):
    """The points of molmo2's coords attribute: frames with ; between, each a time or a number and
    then id x y, .."""
    matches = [re.match(r'\s*([0-9.]+)\s+(.*)', frame) for frame in re.split(r'[\t:,;]', coords)]
    frames = [m.groups() for m in matches if m]
    points = []
    for frame, rest in frames:
        place = {}
        if '.' in frame:
            place['t'] = float(frame)
        elif len(frames) > 1:
            place['image'] = int(frame) - 1
        for id, x, y in re.findall(r'(\d+) (\d{3,4}) (\d{3,4})', rest):
            points.append({'x': int(x) / 1000, 'y': int(y) / 1000, 'id': int(id), **place})
    return points


# --------------------------------------------------------------------------------------------------
# A record becomes an Example

@dataclass
class Example:
    """A record as tokens: its media's prefix, then its conversations as branches. All lists have
    length L."""
    tokens: list = field(default_factory=list)
    weights: list = field(default_factory=list)        # of the loss of predicting this very token
    positions: list = field(default_factory=list)
    branches: list = field(default_factory=list)  # 0 for the prefix, 1, 2, .. for the conversations
    tasks: list = field(default_factory=list)          # index into TASKS
    patches: np.ndarray = None                         # [crops, patches, patch_dim] uint8
    grid: tuple = None                                 # (rows, columns) of patches in a crop
    times: tuple = ()                   # seconds of the crops, where they are the frames of a video
    pool_index: np.ndarray = None       # [visual tokens, window], into crops x patches; -1 for none
    visual_index: np.ndarray = None                    # [visual tokens], into tokens

    def add_branch(self, tokens, weights, task):
        """A conversation about what the prefix shows, as the next branch. Its positions go on from
        the prefix, as if the other branches were not there:

            prefix 0 1 2 3    branch 1 at 4 5 6    branch 2 at 4 5 6 7
        """
        prefix = self.branches.count(0)
        branch = 1
        if self.branches:
            branch = self.branches[-1] + 1
        self.tokens += tokens
        self.weights += weights
        self.positions += range(prefix, prefix + len(tokens))
        self.branches += [branch] * len(tokens)
        self.tasks += [task] * len(tokens)


@dataclass
class Dialogue:
    """One conversation as tokens. `answers` are the stretches (start, end) of tokens that the model
    learns to say."""
    tokens: list
    answers: list
    task: str


def pooling_windows(grid, k):
    """[visual tokens, k x k]: the patches that each visual token of a crop pools, in reading order.
    grid: (rows, columns) of its patches. Where k does not divide the grid, windows at the border
    hold -1 for none, half of them on each side (as allenai/molmo2 does)."""
    rows, columns = grid
    index = np.arange(rows * columns).reshape(grid)
    missing = (-rows % k, -columns % k)
    margins = [(n // 2, n - n // 2) for n in missing]
    index = np.pad(index, margins, constant_values=-1)
    rows, columns = index.shape
    index = index.reshape(rows // k, k, columns // k, k)
    return index.transpose(0, 2, 1, 3).reshape(-1, k * k)


class Processor:
    """Records -> Examples: the layout of tokens, the pixels, and what a loss weighs.

    Layout: <|vision_start|> n x <|image_pad|> <|vision_end|> for each picture ("Image 2" before it
    if there are more); for each frame of a video its time, "1.5s", and the same with <|video_pad|>,
    then subtitles as timed lines; then the turns of a conversation in ChatML:
    <|im_start|>user\\n..<|im_end|>\\n<|im_start|>assistant\\n..<|im_end|>. Special tokens are
    inserted as ids and text is encoded with special tokens off, so a literal '<|image_pad|>' in a
    user's text stays text.
    """
    video_size = 0                 # pixels a side of a frame; 0: image_size
    video_pooling = 0            # patches a side that one visual token of a frame pools; 0: pooling
    max_frames = 128               # of a video
    fps = 2.0                      # frames a second, up to max_frames a clip
    resize = 'stretch'             # stretch | crop (CLIP's own: the centre square)
    image_token = '<|image_pad|>'
    point_format = 'point'         # point | molmo2
    point_digits = 3
    task_weights = {}
    length_weighting = False       # weight / sqrt(tokens of the answer)
    branch_weighting = False       # weight / sqrt(conversations of the row)

    def __init__(self, tokenizer_folder, image_size, patch_size, pooling, seq_len=4096, **settings):
        """tokenizer_folder holds tokenizer.json; image_size and patch_size in pixels a side,
        pooling in patches a side; settings are those above."""
        for name, value in settings.items():
            if not hasattr(type(self), name):
                raise TypeError(f'Processor has no setting {name}')
            setattr(self, name, value)
        self.image_size = image_size
        self.patch_size = patch_size
        self.pooling = pooling
        self.seq_len = seq_len
        self.video_size = self.video_size or image_size
        self.video_pooling = self.video_pooling or pooling
        self._open_tokenizer(Path(tokenizer_folder))
        self._encode_fixed_texts()
        self.grid = self._grid('image_size')
        self.frame_grid = self._grid('video_size')
        self.window = pooling_windows(self.grid, self.pooling)                   # [visual tokens of a picture, k x k]
        self.frame_window = pooling_windows(self.frame_grid, self.video_pooling)
        # Tokens that a frame takes at most: its time, start, visual tokens, end
        self.frame_tokens = (len(self.encode_timestamp(9999.9)) + len(self.vision_start) + len(self.frame_window)
                             + len(self.vision_end))

    def _open_tokenizer(self, folder):
        path = folder / 'tokenizer.json'
        if not path.is_file():
            raise UserError(f"{path} does not exist; a tokenizer is a folder with tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:               # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer ({e})") from None
        self.tokenizer.encode_special_tokens = True      # '<|im_end|>' in a user's text is text
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        # The files are held in memory, because the folder may be an old checkpoint that is removed
        # during training
        self.tokenizer_files = {}
        for file in (path, folder / 'tokenizer_config.json'):
            if file.is_file():
                self.tokenizer_files[file.name] = file.read_bytes()
        needed = ('<|im_start|>', '<|im_end|>', self.image_token)
        missing = [token for token in needed if self.tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(f"the tokenizer {path} lacks {', '.join(missing)}, which the token layout needs")

    def _encode_fixed_texts(self):
        """Ids of special tokens and of texts that come again and again."""
        id_of = self.tokenizer.token_to_id
        self.im_start = id_of('<|im_start|>')
        self.im_end = id_of('<|im_end|>')
        self.image_pad = id_of(self.image_token)
        self.video_pad = id_of('<|video_pad|>')
        if self.video_pad is None:
            self.video_pad = self.image_pad
        # Around the placeholders of a picture; a tokenizer may lack them
        self.vision_start = [id for id in [id_of('<|vision_start|>')] if id is not None]
        self.vision_end = [id for id in [id_of('<|vision_end|>')] if id is not None]
        self.pad = id_of('<|endoftext|>') or 0
        self.newline = self.encode('\n')
        # Between a question and an answer that is only read: another one in Molmo2's template
        # (extra/molmo2.py)
        self.separator_before_past_answer = self.newline
        self.encode_cached = lru_cache(2 ** 14)(self.encode)

    def _grid(self, setting):
        """(rows, columns) of the patches of a crop."""
        size = getattr(self, setting)
        if size % self.patch_size:
            raise UserError(f"{setting} {size} is not a multiple of the patch size {self.patch_size}")
        return (size // self.patch_size,) * 2

    def token_ids(self):
        """The ids that a model's Config holds; visual_token_ids in the order of Molmo2's."""
        start = (self.vision_start or [self.image_pad])[0]
        end = (self.vision_end or [self.image_pad])[0]
        visual = (start, end, self.image_pad, self.image_pad, start, self.video_pad, start, end)
        return {'image_token_id': self.image_pad, 'video_token_id': self.video_pad, 'eos_token_id': self.im_end,
                'pad_token_id': self.pad, 'visual_token_ids': visual}

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_timestamp(self, seconds):
        return self.encode_cached(f'{round(10 * seconds) / 10:.1f}s')

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, folder):
        from extra.hf import save_processor              # tokenizer and processor files as transformers reads them
        save_processor(self, folder)

    # -- pixels

    def pixels(self, image, size):
        """An upright RGB picture -> patches [num_patches, patch_dim] uint8, in reading order."""
        if self.resize == 'crop':
            image = self._centre_square(image, size)
        elif image.size != (size, size):     # stretched: nothing is lost, and fractions of the picture stay fractions
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return self.to_patches(np.asarray(image))

    def _centre_square(self, image, size):
        """CLIP's own preprocessing: the short side becomes `size`, then the centre square is cut
        out (transformers, CLIP)."""
        short = min(image.size)
        width = int(size * image.width / short)
        height = int(size * image.height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left = (width - size) // 2
        top = (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def to_patches(self, pixels):
        """[height, width, 3] -> [num_patches, patch_dim]; a patch's pixels by row, column, channel.
        """
        p = self.patch_size
        rows = pixels.shape[0] // p
        columns = pixels.shape[1] // p
        patches = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4)        # [rows, columns, p, p, 3]
        return patches.reshape(rows * columns, -1)

    def media(self, record, folder, room=None):
        """What a record shows, decoded: {'images': [...]} or {'clip': (times, frames), 'subtitles':
        [...]}, for `build_prefix`. Of a video as many frames as fit into `room` tokens beside the
        subtitles."""
        if not record['video']:
            return {'images': [load_image(open_media(folder, path)) for path in record['images']]}
        span = {'start': record.get('start') or 0., 'end': record.get('end')}
        subtitles = record.get('subtitles') or []
        if isinstance(subtitles, str):
            subtitles = open_media(folder, subtitles)
        if subtitles:
            subtitles = load_subtitles(subtitles, **span)
        max_frames = self.max_frames
        if room is not None:
            room_for_frames = room - len(self.encode_subtitles(subtitles))
            max_frames = min(max_frames, room_for_frames // self.frame_tokens)
            if max_frames < 1:
                raise BadRow('too long', f'no room for a frame of {self.frame_tokens} tokens in seq_len {self.seq_len}')
        # Frames are resized while they are decoded, unless a square is to be cut out of them
        size = (self.video_size, self.video_size) if self.resize == 'stretch' else None
        clip = load_video(open_media(folder, record['video']), max_frames, self.fps, size=size, **span)
        return {'clip': clip, 'subtitles': subtitles}

    # -- tokens of the prefix

    def encode_subtitles(self, cues):
        if not cues:
            return []
        lines = [f"{cue['start']:.1f}s - {cue['end']:.1f}s: {cue['text']}" for cue in cues]
        return self.encode('\n'.join(['', 'Subtitles:', *lines]))

    def build_prefix(self, images=(), clip=((), ()), subtitles=()):
        """The prefix of an Example: what is seen, as patches and placeholder tokens. images:
        pictures; clip: (seconds [n], n frames) of a video; subtitles: its cues."""
        e = Example()
        times, frames = clip
        crops, visual_index = [], []
        if len(times):
            for seconds, frame in zip(times, frames):
                e.tokens += self.encode_timestamp(seconds)
                visual_index += self._add_placeholders(e, self.video_pad, len(self.frame_window))
                crops.append(self.pixels(frame, self.video_size))
        else:
            for i, image in enumerate(images):
                if len(images) > 1:
                    e.tokens += self.encode_cached(f'Image {i + 1}')
                visual_index += self._add_placeholders(e, self.image_pad, len(self.window))
                crops.append(self.pixels(image, self.image_size))
        e.tokens += self.encode_subtitles(subtitles)
        if crops:
            window = self.frame_window if len(times) else self.window
            e.grid = self.frame_grid if len(times) else self.grid
            e.times = tuple(times)
            e.patches = np.stack(crops)
            offsets = np.arange(len(crops))[:, None, None] * len(crops[0])       # patches in front of each crop
            pool_index = np.where(window < 0, -1, window + offsets)  # [crops, visual tokens, k x k]
            e.pool_index = pool_index.reshape(-1, window.shape[1])
            e.visual_index = np.array(visual_index, np.int64)
        return self.complete_prefix(e)

    def _add_placeholders(self, e, token, number):
        """Adds the placeholders of one crop; returns where they stand."""
        e.tokens += self.vision_start
        places = range(len(e.tokens), len(e.tokens) + number)
        e.tokens += [token] * number
        e.tokens += self.vision_end
        return places

    def complete_prefix(self, e):
        """Fills in what all tokens of a prefix have in common: no loss, branch 0, positions in
        order."""
        n = len(e.tokens)
        e.weights = [0.] * n
        e.positions = list(range(n))
        e.branches = [0] * n
        e.tasks = [0] * n
        return e

    # -- tokens of conversations

    def render_message(self, message, task, times=None):
        """The text of a message: its content, then its points. A track is told at the times of the
        frames only."""
        parts = []
        if message['content']:
            parts.append(message['content'])
        if message.get('points') is not None:
            points = message['points']['points']
            if task == 'tracking' and times is not None:
                points = [p for p in points if abs(times - p['t']).min() <= .5 / self.fps]
            label = message['points'].get('label', '')
            parts.append(format_points(points, label, self.point_format, self.point_digits, task == 'tracking'))
        return ' '.join(parts)

    def role_header(self, role):
        return [self.im_start, *self.encode_cached(f'{role}\n')]

    def tokenize_dialogue(self, conversation, times=None, past=False):
        """One conversation -> Dialogue. Answers end with <|im_end|>, which the model learns to say,
        too. times: seconds of the frames, for tracks. past: its answers are not to be learnt, only
        read."""
        task = conversation.get('task', 'other')
        tokens, answers = [], []
        for message in conversation['messages']:
            is_answer = message['role'] == 'assistant'
            if tokens:
                tokens += self.separator_before_past_answer if past and is_answer else self.newline
            tokens += self.role_header(message['role'])
            start = len(tokens)
            if is_answer:
                tokens += self.encode(self.render_message(message, task, times))
            else:
                text = self.render_message(message, 'pointing')          # one may ask about a point
                # Many rows ask the same short questions
                tokens += self.encode_cached(text) if len(text) < 200 else self.encode(text)
            tokens.append(self.im_end)
            if is_answer:
                answers.append((start, len(tokens)))
        return Dialogue(tokens, answers, task)

    def answer_weight(self, task, answer_tokens, conversations, loss_weight=1., token_weight=None):
        """What each token of an answer weighs in the loss; the only place where that is decided. A
        step's loss is then the weighted mean over all its tokens (train.py, `backward`).

            task_weights[task]                     a token of a pointing answer says more than one of a caption
            / sqrt(tokens of the answer)           with length_weighting: long answers do not drown short ones
            / sqrt(conversations of the record)    with branch_weighting: nor pictures with many questions
            * loss_weight of the data set          (Dataset), or token_weight, which replaces all of this
        """
        weight = self.task_weights.get(task, 1.)
        if weight == 0:
            return 0.
        if token_weight is not None:
            return token_weight
        if self.length_weighting:
            weight = weight / answer_tokens ** .5
        if self.branch_weighting:
            weight = weight / conversations ** .5
        return weight * loss_weight

    def add_dialogues(self, e, dialogues, loss_weight=1., token_weight=None):
        """Adds conversations to a prefix, each as a branch with its loss weights."""
        for dialogue in dialogues:
            weights = [0.] * len(dialogue.tokens)
            for start, end in dialogue.answers:
                weight = self.answer_weight(dialogue.task, end - start, len(dialogues), loss_weight, token_weight)
                weights[start:end] = [weight] * (end - start)
            task = dialogue.task if dialogue.task in TASKS else 'other'
            e.add_branch(dialogue.tokens, weights, TASKS.index(task))

    def example(self, record, folder, loss_weight=1., token_weight=None):
        """A record -> Example of at most seq_len tokens: a video gives up frames, then
        conversations are left out.

        Text is tokenised before media are decoded, because its length says how many frames of a
        video there is room for.
        """
        dialogues = [self.tokenize_dialogue(c) for c in record['conversations']]
        lengths = [len(dialogue.tokens) for dialogue in dialogues]
        # Text may take a quarter of the row, and the shortest conversation what it needs; frames
        # get the rest
        room_for_text = min(sum(lengths), self.seq_len // 4)
        room_for_text = max(room_for_text, min(lengths))
        media = self.media(record, folder, self.seq_len - room_for_text)
        if 'clip' in media:
            times = media['clip'][0]
            for i, conversation in enumerate(record['conversations']):
                if conversation.get('task') == 'tracking':       # again, now that the times of the frames are known
                    dialogues[i] = self.tokenize_dialogue(conversation, times)
        e = self.build_prefix(**media)
        prefix = len(e.tokens)
        fitting = []
        room = self.seq_len - prefix
        for dialogue in dialogues:
            is_learnt = dialogue.answers and self.task_weights.get(dialogue.task, 1.) != 0
            if is_learnt and len(dialogue.tokens) <= room:
                fitting.append(dialogue)
                room -= len(dialogue.tokens)
        if not fitting:
            raise BadRow('too long', f'{prefix} tokens of pictures and a shortest conversation of {min(lengths)} do '
                                     f'not fit seq_len {self.seq_len}')
        self.add_dialogues(e, fitting, loss_weight, token_weight)
        return e

    def prompt(self, *questions, **media):
        """Messages that end with a user's turn, and `media` as above -> an Example that ends where
        the answer begins. Several such conversations about the same media become a branch each."""
        e = self.build_prefix(**media)
        for messages in questions:
            dialogue = self.tokenize_dialogue({'messages': messages}, past=True)
            tokens = dialogue.tokens + self.newline + self.role_header('assistant')
            e.add_branch(tokens, [0.] * len(tokens), TASKS.index('other'))
        return e


def processor_settings(settings):
    """What a config says about the Processor."""
    names = ('image_size', 'pooling', 'video_size', 'video_pooling', 'max_frames', 'fps', 'seq_len', 'point_format',
             'point_digits', 'task_weights', 'length_weighting', 'branch_weighting')
    return {name: settings[name] for name in names}


# --------------------------------------------------------------------------------------------------
# Examples become rows, rows a Batch

def collate(rows, processor, length=0):
    """Lists of Examples -> Batch. A row is one list: its examples one after the other as documents
    0, 1, .., padded to `length`, or to the longest row and then to a multiple of 8, as vector units
    like it."""
    longest = max(sum(len(e.tokens) for e in row) for row in rows)
    B = len(rows)
    L = length or -(-longest // 8) * 8
    tokens = np.full((B, L), processor.pad)
    targets = np.full((B, L), processor.pad)
    weights = np.zeros((B, L), np.float32)
    positions = np.zeros((B, L), np.int64)
    documents = np.full((B, L), -1)
    branches = np.zeros((B, L), np.int64)
    tasks = np.zeros((B, L), np.int64)
    pictures, frames = [], []                # (patches, pool_index, places of visual tokens in B x L) of each example
    for b, row in enumerate(rows):
        start = 0
        for document, e in enumerate(row):
            end = start + len(e.tokens)
            tokens[b, start:end] = e.tokens
            positions[b, start:end] = e.positions
            branches[b, start:end] = e.branches
            documents[b, start:end] = document
            # Position i predicts token i + 1. The first token of a branch has no weight, so no loss
            # crosses branches.
            targets[b, start:end - 1] = e.tokens[1:]
            weights[b, start:end - 1] = e.weights[1:]
            tasks[b, start:end - 1] = e.tasks[1:]
            if e.patches is not None:
                kind = pictures if e.grid == processor.grid else frames
                kind.append((e.patches, e.pool_index, e.visual_index + b * L + start))
            start = end
    loss_index = np.flatnonzero(weights)
    is_token = documents >= 0
    batch = Batch(
        tokens=torch.from_numpy(tokens), targets=torch.from_numpy(targets), loss_weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(positions), document_ids=torch.from_numpy(documents),
        branch_ids=torch.from_numpy(branches), loss_index=torch.from_numpy(loss_index),
        loss_tasks=torch.from_numpy(tasks.flatten()[loss_index]),
        causal=int(branches.max()) <= 1 and int(documents.max()) <= 0,
        # A token at position p attends to p + 1 tokens, in a tree as in a plain row
        num_tokens=int(is_token.sum()), num_pairs=int((positions + 1)[is_token].sum()), total_weight=float(weights.sum()))
    if pictures or frames:
        add_crops(batch, processor, pictures, frames)
    return batch


def add_crops(batch, processor, pictures, frames):
    """Fills in a batch's crops: those of pictures, and those of frames where these have another
    size; and the indices of both: pool_index counts the patches of all pictures, then those of all
    frames."""
    pool_index, visual_index = [], []
    offset = 0                               # patches in front of an example's own
    for patches, index, places in pictures + frames:
        pool_index.append(np.where(index < 0, -1, index + offset))
        visual_index.append(places)
        offset += patches.shape[0] * patches.shape[1]
    width = max(index.shape[1] for index in pool_index)
    padded = [np.pad(index, ((0, 0), (0, width - index.shape[1])), constant_values=-1) for index in pool_index]
    batch.pool_index = torch.from_numpy(np.concatenate(padded))
    batch.visual_index = torch.from_numpy(np.concatenate(visual_index))
    if pictures:
        batch.patches = torch.from_numpy(np.concatenate([patches for patches, _, _ in pictures]))
        batch.grid = processor.grid
    if frames:
        batch.frames = torch.from_numpy(np.concatenate([patches for patches, _, _ in frames]))
        batch.frame_grid = processor.frame_grid


PACKING_POOL = 48           # examples to choose a row from; more gains nothing (Molmo2, appendix B)


def best_fit(lengths, room):
    """Packing: the indices of the examples that fill a row of `room` tokens best. The first is
    always taken, because it has waited longest; of the others those whose lengths add up to most.
    Exact, by subset sums as bits:

    with lengths 3 | 4, 2 and room 8, there are 5 tokens left after the first. Bit s of reach[n]
    says whether some of the first n others add up to s: reach = [{0}, {0, 4}, {0, 2, 4}] (6 is too
    many). The best total is 4; it can be had without the 2, so the 4 is taken: [0, 1].
    """
    room -= lengths[0]
    within_room = (1 << (room + 1)) - 1
    reach = [1]                              # of no others: only the sum 0
    for n in lengths[1:]:
        with_this = reach[-1] << n
        reach.append((reach[-1] | with_this) & within_room)
    total = reach[-1].bit_length() - 1       # the highest bit
    chosen = [0]
    for i in range(len(lengths) - 1, 0, -1):
        can_be_had_without = (reach[i - 1] >> total) & 1
        if not can_be_had_without:           # so that older examples go first
            chosen.append(i)
            total -= lengths[i]
    return sorted(chosen)


def next_row(pool, examples, room, size):
    """Fills `pool`, a list, up from the iterator `examples`, then takes the next row of `room`
    tokens out of it; size(example) is an example's number of tokens."""
    pool += itertools.islice(examples, PACKING_POOL - len(pool))
    chosen = best_fit([size(e) for e in pool], room)
    row = [pool[i] for i in chosen]
    for i in reversed(chosen):
        del pool[i]
    return row


# --------------------------------------------------------------------------------------------------
# Mixtures: which row comes next

def permute(i, n, key):
    """Where i goes in the permutation of range(n) that `key` names, without holding it: a Feistel
    network of four rounds on the next power of four, applied again until the result is below n
    (Black & Rogaway 2002).

    A round swaps the halves of i's bits and mixes a hash of one into the other, which can be
    undone, so two numbers never meet; four rounds look random.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)                         # bits of a half
    low_bits = (1 << half) - 1
    while True:
        left = i >> half
        right = i & low_bits
        for round_number in range(4):
            digest = hashlib.blake2b(f'{key}/{round_number}/{right}'.encode(), digest_size=8).digest()
            mixed = left ^ (int.from_bytes(digest, 'little') & low_bits)
            left = right
            right = mixed
        i = (left << half) | right
        if i < n:
            return i


def mixture_sets(mixture):
    """{data set: its options} of a config's `mixture` (see `mixture_rates`); a mistake in it is
    told in one line."""
    known = ('cap', 'factor', 'loss_weight', 'token_weight', 'size')
    sets = {}
    for key, group in mixture.items():
        members = {key: {}}
        if isinstance(group, dict):
            if set(group) != {'rate', 'sets'} or not group['sets']:
                raise UserError(f"mixture['{key}'] is a group: {{'rate': .5, 'sets': {{name: {{}}, ...}}}}")
            members = group['sets']
        for name, options in members.items():
            if name in sets:
                raise UserError(f"mixture names dataset '{name}' twice")
            wrong = [option for option in options if option not in known]
            if wrong:
                raise UserError(f"mixture: '{name}' has option '{wrong[0]}'; known: {', '.join(known)}")
            sets[name] = options
    return sets


def mixture_rates(mixture, sizes):
    """{data set: its share of the draws} of a config's `mixture` and the numbers of rows. Its
    entries are

    name: rate                             a data set with a rate of its own
    group: {'rate': rate, 'sets': {name: {}, name: {'cap': 60_000, 'factor': 1.5}, ..}}
                                           sets share the group's rate in proportion to sqrt(rows, at most cap) * factor;
                                           further options: loss_weight multiplies the loss weights of a set's tokens,
                                           token_weight replaces them, size is for the table (extra/plan.py)

    and all rates are divided by their sum (allenai/molmo2 data_loader.py, _build_mixture). One
    group of rate 1 is the plain sqrt-proportional rule, w_i = sqrt(n_i) / sum of sqrt(n_j).
    """
    total = sum(group['rate'] if isinstance(group, dict) else group for group in mixture.values())
    rates = {}
    for key, group in mixture.items():
        if not isinstance(group, dict):
            rates[key] = group / total
            continue
        roots = {}
        for name, options in group['sets'].items():
            rows = min(sizes[name], options.get('cap') or sizes[name])
            roots[name] = rows ** .5 * options.get('factor', 1)
        all_roots = sum(roots.values())
        for name, root in roots.items():
            rates[name] = group['rate'] / total * root / all_roots
    return rates


def open_mixture(mixture, data_dir, seed=0):
    """The Mixture of a config's `mixture`, from the training splits of its data sets."""
    sets = mixture_sets(mixture)
    if not sets:
        raise UserError("mixture is empty: name datasets and rates, as config/demo_stage1.py does")
    datasets = {}
    for name, options in sets.items():
        options = {key: value for key, value in options.items() if key in ('cap', 'loss_weight', 'token_weight')}
        datasets[name] = Dataset(Path(data_dir) / name, **options)
    rates = mixture_rates(mixture, {name: dataset.rows for name, dataset in datasets.items()})
    return Mixture(list(datasets.values()), [rates[name] for name in datasets], seed)


class Mixture:
    """Rates over data sets. Draw k is a pure function of (seed, k): which data set, by its rate,
    and which row: the data set's next one in a permutation that is fresh every epoch."""
    BLOCK = 4096                             # draws whose random numbers are made together

    def __init__(self, datasets, rates, seed=0):
        for dataset in datasets:
            if not len(dataset):
                raise UserError(f"dataset {dataset.name} has no rows")
        self.datasets = datasets
        self.seed = seed
        self.rates = np.array(rates, float) / np.sum(rates)
        self.edges = np.cumsum(self.rates)[:-1]        # where [0, 1) is divided among the data sets

    def _block(self, number):
        """The data sets of draws [number * BLOCK, (number + 1) * BLOCK)."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=number << 64))
        return np.searchsorted(self.edges, generator.random(self.BLOCK), side='right')

    def _row(self, d, times):
        """The row of data set d that is drawn when it was drawn so many times before."""
        dataset = self.datasets[d]
        epoch, i = divmod(times, len(dataset))
        i = permute(i, len(dataset), f'{self.seed}/{d}/{epoch}')
        if dataset.cap:             # the capped rows are any of the file's, the same in every epoch
            i = permute(i, dataset.rows, f'{self.seed}/{d}')
        return i

    def draws(self, start=0, stride=1):
        """Yields (k, index of the data set, row) of every stride-th draw from `start` on. Those
        before are only counted, at 10 ns each, because a data set's next row depends on how often
        it was drawn."""
        counts = np.zeros(len(self.datasets), np.int64)
        for number in range(start // self.BLOCK):
            counts += np.bincount(self._block(number), minlength=len(counts))
        k = start // self.BLOCK * self.BLOCK
        while True:
            for d in self._block(k // self.BLOCK).tolist():
                if k >= start and (k - start) % stride == 0:
                    yield k, d, self._row(d, int(counts[d]))
                counts[d] += 1
                k += 1


# --------------------------------------------------------------------------------------------------
# The loader

@dataclass
class RowProblem:
    """Why a row could not be used: `reason` in a word or two, to count, `problem` in a sentence."""
    row: str                                 # file and line
    dataset: str
    reason: str
    problem: str


class ExampleDataset(torch.utils.data.Dataset):
    """What a worker does: (draw, data set, row) -> (that, its Example, or why there is none)."""

    def __init__(self, mixture, processor):
        self.mixture = mixture
        self.processor = processor

    def __getitem__(self, draw):
        _, d, row = draw
        dataset = self.mixture.datasets[d]
        try:
            record = dataset[row]
            example = self.processor.example(record, dataset.folder, dataset.loss_weight, dataset.token_weight)
            return draw, example
        except BadRow as e:
            return draw, RowProblem(dataset.where(row), dataset.name, e.reason, str(e))
        except UserError as e:               # returned, because a DataLoader would bury it in its worker's traceback
            return draw, e


def _ignore_signals(_):
    """Ctrl-C is the parent's to answer, and its SIGTERM handler is not the worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Endless batches, the same ones whatever the number of workers; its place in the data is a few
    numbers.

    Unpacked, a row is an example, in the order of the draws. Packed, rows of exactly `length`
    tokens are filled from a pool of PACKING_POOL examples (`best_fit`); after a resume the examples
    of the pool are read again.

    state: {'draw': the next draw, 'pool': [[draw, data set, row], ..] of the examples that wait in the pool,
            'seen': rows read, 'skipped': {'data set: reason': number}}
    Of `world_size` processes, each takes the draws rank, rank + world_size, ... report(RowProblem) hears of each bad row.
    """

    def __init__(self, mixture, processor, batch_size, num_workers=0, state=None, length=0, max_bad_fraction=.1,
                 report=None, packed=False, rank=0, world_size=1):
        self.examples = ExampleDataset(mixture, processor)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.length = length
        self.max_bad_fraction = max_bad_fraction
        self.report = report
        self.packed = packed
        self.stride = world_size
        self.state = {'draw': rank, 'pool': [], 'seen': 0, 'skipped': {}, **(state or {})}
        self.state['skipped'] = dict(self.state['skipped'])

    def __iter__(self):
        """Yields (Batch, the state that continues after it)."""
        examples = self._read_examples()
        pool = []                            # (draw, Example)
        while True:
            rows, names = [], []
            while len(rows) < self.batch_size:
                if self.packed:
                    row = next_row(pool, examples, self.length, lambda item: len(item[1].tokens))
                else:
                    row = [next(examples)]
                rows.append([example for _, example in row])
                names += [self._name(draw) for draw, _ in row]
            batch = collate(rows, self.examples.processor, self.length)
            batch.rows = names
            self.state['pool'] = [list(draw) for draw, _ in pool] + self.unread
            yield batch, {**self.state, 'skipped': dict(self.state['skipped'])}

    def _name(self, draw):
        _, d, row = draw
        return self.examples.mixture.datasets[d].name, row

    def _read_examples(self):
        """Yields (draw, Example): first those that waited in the pool when the state was saved,
        then those of new draws. self.unread are the former that were not read yet."""
        waiting = self.state['pool']
        draws = itertools.chain(map(tuple, waiting), self.examples.mixture.draws(self.state['draw'], self.stride))
        self.unread = waiting
        for n, (draw, example) in enumerate(self._read(draws)):
            self.unread = waiting[n + 1:]
            if n >= len(waiting):
                self.state['draw'] = draw[0] + self.stride
                self.state['seen'] += 1
            if isinstance(example, UserError):
                raise example
            if isinstance(example, RowProblem):
                self._skip(example)
            else:
                yield draw, example

    def _read(self, draws):
        """Yields (draw, what ExampleDataset makes of it) in the order of the draws, from the
        workers if there are any."""
        options = {}
        if self.num_workers:
            options['prefetch_factor'] = 4 * self.batch_size
            if sys.platform == 'linux':
                options['multiprocessing_context'] = 'fork'
        # A generator of its own, because a DataLoader draws a seed for its workers when it starts:
        # from torch's general generator that would move the dropout of a resumed run.
        return torch.utils.data.DataLoader(self.examples, sampler=draws, batch_size=None, num_workers=self.num_workers,
                                           worker_init_fn=_ignore_signals, generator=torch.Generator(), **options)

    def _skip(self, problem):
        skipped = self.state['skipped']
        key = f'{problem.dataset}: {problem.reason}'
        skipped[key] = skipped.get(key, 0) + 1
        if self.report:
            self.report(problem)
        bad = sum(skipped.values())
        if bad >= 20 and bad > self.max_bad_fraction * self.state['seen']:
            raise UserError(f"{bad} of {self.state['seen']} rows could not be used, more than max_bad_fraction = "
                            f"{self.max_bad_fraction}: {skipped}; last: {problem.row}: {problem.problem}")


# --------------------------------------------------------------------------------------------------
# Are records what they should be?

# Other trainers mark in the text where a picture belongs. Media always come first here, so marks at
# the ends are taken off.
_MEDIA_MARKS = re.compile(r'^\s*(<(image|video)>\s*)+|(\s*<(image|video)>)+\s*$')


def normalise(record):
    """A record in the one shape: images [...] or video, conversations [{task, messages}]. BadRow
    says what is wrong."""
    if not isinstance(record, dict):
        raise BadRow('schema', f'a record is a JSON object, this is {type(record).__name__}')
    conversations = _conversations(record)
    images, video = _media_paths(record)
    for key in ('start', 'end'):
        if record.get(key) is not None and not _is_number(record[key], 0, 1e7):
            raise BadRow('schema', f"'{key}' is a number of seconds, this is {record[key]!r}")
    if not isinstance(record.get('subtitles') or [], (str, list)):
        raise BadRow('schema', "'subtitles' is a path, or a list of {start, end, text}")
    for conversation in conversations:
        _check_conversation(conversation, len(images), video is not None)
    return {**record, 'images': images, 'video': video, 'conversations': conversations}


def _conversations(record):
    """The conversations of a record in any of three shapes: ours, one list of messages, and LLaVA's
    list of turns."""
    if 'conversations' not in record and 'messages' not in record:
        raise BadRow('schema', f"neither 'conversations' nor 'messages' among its keys: {', '.join(record) or 'none'}")
    conversations = record.get('conversations') or [{'messages': record.get('messages')}]
    if not isinstance(conversations, list):
        raise BadRow('schema', f"neither 'conversations' nor 'messages' among its keys: {', '.join(record) or 'none'}")
    if not all(isinstance(turn, dict) and 'from' in turn for turn in conversations):
        return conversations
    roles = {'human': 'user', 'gpt': 'assistant'}
    messages = []
    for turn in conversations:
        messages.append({'role': roles.get(turn['from'], turn['from']), 'content': turn.get('value')})
    return [{'messages': messages}]


def _media_paths(record):
    """(paths of images, path of the video or None)."""
    def paths(key):
        value = record.get(key) or []
        return [value] if isinstance(value, str) else value
    images = paths('images')
    videos = paths('videos') or paths('video')
    for value in (images, videos):
        if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
            raise BadRow('schema', "'images' is a list of paths and 'video' is one")
    if len(videos) > 1 or videos and images:
        raise BadRow('schema', f'{len(videos)} videos and {len(images)} images: a record has one video or any number '
                               f'of images')
    return images, videos[0] if videos else None


def _check_conversation(conversation, num_images, has_video):
    messages = conversation.get('messages') if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise BadRow('schema', "a conversation is {'messages': [{'role': ..., 'content': text}, ...]}")
    if not isinstance(conversation.get('task', ''), str):
        raise BadRow('schema', f"'task' is one of {', '.join(TASKS)}, this is {conversation['task']!r}")
    for message in messages:
        message['content'] = _MEDIA_MARKS.sub('', message.get('content', ''))
        check_points(message.get('points'), num_images, has_video)
    if not any(message['role'] == 'assistant' for message in messages):
        raise BadRow('no answer', 'a conversation without an assistant turn')


def _is_message(message):
    return (isinstance(message, dict) and isinstance(message.get('role'), str)
            and isinstance(message.get('content', ''), str))


def _is_number(value, low, high):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check_points(points, num_images, video):
    """BadRow unless they are {'points': [{x, y in [0, 1]; t seconds in a video; image the index of
    one of many}]}."""
    if points is None:
        return
    if not (isinstance(points, dict) and isinstance(points.get('points'), list)
            and isinstance(points.get('label', ''), str)):
        raise BadRow('schema', "points are {'label': text, 'points': [{'x': ..., 'y': ..., 'id': ...}, ...]}")
    for p in points['points']:
        if not isinstance(p, dict) or not all(_is_number(p.get(axis), -.05, 1.05) for axis in 'xy'):
            raise BadRow('bad point', f"x and y are fractions of the picture in [0, 1], this is {p}")
        if not isinstance(p.get('id', 1), int):
            raise BadRow('bad point', f"'id' is a whole number, this is {p}")
        if video != ('t' in p) or video and not _is_number(p['t'], 0, 1e7):
            raise BadRow('bad point', f"a point has its second 't' in a video and nowhere else, this is {p}")
        if 'image' in p and not (isinstance(p['image'], int) and _is_number(p['image'], 0, num_images - 1)):
            raise BadRow('bad point', f"'image' is the index, from 0, of one of {num_images} images, this is {p}")


if __name__ == '__main__':
    try:
        from extra.inspector import main   # a page of what the model gets, and --check of a dataset
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
