"""From files to batches: the path of one record.

    data/<name>/train.jsonl + media   one JSON record a line, found by an index of offsets (Dataset)
       │  Mixture                     draw k of the run -> (data set, row), from (seed, k) alone
       ▼
    record  {"images": [...], "conversations": [{"task": ..., "messages": [...]}, ...]}
       │  Processor.example           decode, resize, cut into patches; token ids and loss weights
       ▼
    Example                           tokens, weights, branches [L];
       │                              patches [crops, patches, patch_dim] uint8
       │  Loader: next_row, collate   pack into rows, pad, shift targets, flatten the indices
       ▼
    Batch                             documented in model.py

A record is a message tree: its media come first, then each conversation as a branch that attends to
the media and to itself, so a picture with ten questions is decoded and encoded once. Points are
structured in the record and become text here. A row that cannot be used raises BadRow; the Loader
skips it, counts it by reason and reports its file and line. The last section checks records.

Pixels stay uint8 all the way; they are normalised on the device (VLM.normalize in model.py).

    python data.py config/demo.py           prints the mixture and examples; writes an HTML page of
                                            what the model gets
    python data.py config/demo.py --check=data/mine
                                            reads every row as training would; prints what is wrong
                                            or odd
"""
import copy
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
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configurator import UserError
from media import BadRow, is_picture, load_subtitles, load_video, open_media, open_picture
from model import Batch

TASKS = ('captioning', 'qa', 'counting', 'pointing', 'tracking', 'text', 'other')
MAX_LINE = 16 * 2 ** 20                      # bytes of one record


# --------------------------------------------------------------------------------------------------
# Records on disk

class Dataset:
    """A JSONL file as a sequence of records. The byte offsets of its lines are found once and kept
    in a file beside it (.train.index). That file is mapped into memory and not read as a whole, so
    ten million rows cost no memory.

    folder holds <split>.jsonl and the media. cap: so many rows are used, drawn from the whole file
    (Mixture); 0 or None: all. loss_weight multiplies the loss weights of this data set's tokens;
    token_weight replaces them (Processor.answer_weight).
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
        """The index, int64 [3 + rows]: the stamp of the JSONL file (its size, and when it was
        changed), the first byte of each line, and the end of the last line. An index whose stamp is
        not the file's is out of date and is made again."""
        status = self.path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        try:
            offsets = np.memmap(index, np.int64, 'r')
            if offsets[:2].tolist() == stamp:
                return offsets
        except (OSError, ValueError):        # there is no index yet, or it is an empty file
            pass
        try:
            # Written under a name of its own and renamed, because several processes may make the
            # same index at once
            temporary = index.with_suffix(f'.{os.getpid()}.{id(self)}.tmp')
            with open(temporary, 'wb') as f:
                self._scan(f, stamp)
            temporary.replace(index)
            return np.memmap(index, np.int64, 'r')
        except OSError:
            # The folder cannot be written to, so the index is made at each start and held in memory
            buffer = io.BytesIO()
            self._scan(buffer, stamp)
            return np.frombuffer(buffer.getvalue(), np.int64)

    def _scan(self, out, stamp):
        """Writes the index: the stamp, where each line that is not empty starts, and where the last
        line ends."""
        offsets = array('q', stamp)
        start = 0                            # first byte of the line that is being read
        end = 0                              # the byte after what was read of it
        is_empty = True
        with open(self.path, 'rb') as f:
            while True:
                # A line is read a piece at a time, because a broken file may be one endless line
                piece = f.readline(2 ** 20)
                end += len(piece)
                is_empty = is_empty and piece.strip() == b''
                if piece and not piece.endswith(b'\n'):
                    continue                 # the line goes on
                if not is_empty:
                    offsets.append(start)
                if not piece:                # the end of the file
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
        """The number of rows in the file; len(self) is the number that is used, at most cap."""
        return len(self.offsets) - 3         # the stamp is two numbers more, and the end is one

    def __len__(self):
        return min(self.rows, self.cap or self.rows)

    def __getitem__(self, row):
        """The record of a row, in the shape that `normalise` gives it; BadRow if it is none."""
        start = int(self.offsets[row + 2])
        end = int(self.offsets[row + 3])
        size = end - start
        if size > MAX_LINE:
            raise BadRow('too large', f'{size:,} bytes in one line (limit {MAX_LINE:,})')
        # Opened for each call, because threads and workers read at once and would share a position
        with open(self.path, 'rb') as f:
            f.seek(start)
            line = f.read(size)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRow('broken JSON', str(e)) from None
        return normalise(record)

    def validation(self):
        """The held-out Dataset in the same folder, or None if there is none."""
        if not (self.folder / 'validation.jsonl').is_file():
            return None
        return Dataset(self.folder, 'validation')

    def where(self, row):
        """'data/pixmo/train.jsonl line 713', for messages. Lines are counted from the start of the
        file, because the index leaves out the empty ones."""
        left = int(self.offsets[row + 2])    # bytes in front of the row that are not counted yet
        lines = 0
        with open(self.path, 'rb') as f:
            while left > 0:
                piece = f.read(min(2 ** 20, left))
                if not piece:                # the file has become shorter
                    break
                lines += piece.count(b'\n')
                left -= len(piece)
        return f'{self.path} line {lines + 1}'


class Records:
    """A data set that is a Python object of the user's: anything with __len__ and an __getitem__
    that takes a number from 0 on and returns a record. It stands beside a Dataset in a Mixture.

    Among its `images` may be Pillow pictures and arrays [height, width, 3] uint8, besides paths
    relative to `folder`. A record must be the same each time it is asked for, or a resumed run is
    not the uninterrupted one.

    source: the object, or {'train': object, 'validation': object}; cap, loss_weight, token_weight:
    as for a Dataset.
    """

    def __init__(self, name, source, folder, split='train', cap=None, loss_weight=1.,
                 token_weight=None):
        splits = source if isinstance(source, dict) else {'train': source}
        if split not in splits:
            raise UserError(f"datasets: '{name}' has no '{split}' in it")
        self.name = name
        self.splits = splits
        self.records = splits[split]
        self.folder = Path(folder)
        self.cap = cap
        self.loss_weight = loss_weight
        self.token_weight = token_weight
        kind = type(self.records).__name__
        if isinstance(self.records, type):
            raise UserError(f"datasets: '{name}' is the class {self.records.__name__} itself, not an object of it: "
                            f"write {self.records.__name__}()")
        for method in ('__len__', '__getitem__'):
            if not hasattr(self.records, method):
                raise UserError(f"datasets: '{name}' is a {kind}, which has no {method}")
        try:
            self.rows = len(self.records)
        except Exception as e:               # whatever the user's code raises
            raise UserError(f"datasets: the length of '{name}', a {kind}: {type(e).__name__}: {e}") from None

    def __len__(self):
        return min(self.rows, self.cap or self.rows)

    def __getitem__(self, row):
        try:
            record = self.records[row]
            if isinstance(record, dict):
                # A copy, because `normalise` changes texts, and the object may keep its records
                pictures = record.get('images')
                record = copy.deepcopy({**record, 'images': None})
                record['images'] = pictures
        except Exception as e:               # whatever the user's code raises
            raise BadRow('error in the class', f'{type(e).__name__}: {e}') from None
        return normalise(record)

    def where(self, row):
        return f'{self.name}[{row}]'

    def validation(self):
        """The held-out records, or None if the object has none."""
        if 'validation' not in self.splits:
            return None
        return Records(self.name, self.splits, self.folder, 'validation')


# --------------------------------------------------------------------------------------------------
# Points: structured in a record, text in the model's answer. parse_points reads what format_points
# writes, up to rounding; it does not read the label.

def format_points(points, label='', syntax='point', digits=3, tracks=False):
    """Points {x, y in [0, 1], id, and t seconds or image index from 0} as text.

    'point'   <point 0.530, 0.210, 1> <point 0.700, 0.250, 2>
              x, y, id. In front of x stands, in a video, the time in seconds, as in
              <point 1.5, 0.530, 0.210, 1>; with several pictures, the picture's number from 1.
    'molmo2'  <points coords="1 1 530 210 2 700 250">label</points>
              The number of the picture (or the time in seconds), then id x y for each point. x and y are in
              thousandths; points are sorted by (x, y) and numbered anew. <tracks ...> is the same
              and keeps ids. (allenai/molmo2 preprocessing/point_formatter.py, html-v2)
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
        id = p.get('id', number)
        texts.append(f'<point {first}{x:.{digits}f}, {y:.{digits}f}, {id}>')
    return ' '.join(texts)


def _format_molmo2(points, label, tracks):
    frames = {}           # time in seconds, or number of the picture, as text -> [(x, y, id), ..]
    for p in points:
        frame = str(p.get('image', 0) + 1)
        if 't' in p:
            frame = f"{p['t']:.1f}"
        x = round(1000 * min(max(p['x'], 0), 1))
        y = round(1000 * min(max(p['y'], 0), 1))
        frames.setdefault(frame, []).append((x, y, p.get('id')))
    coords = []
    number = 0                       # numbers go on from frame to frame
    for frame in sorted(frames, key=float):
        order = (lambda p: p[2]) if tracks else (lambda p: p[:2])        # by id, or by (x, y)
        triples = []
        for x, y, id in sorted(frames[frame], key=order):
            number += 1
            shown_id = id if tracks else number
            triples.append(f'{shown_id} {x:03d} {y:03d}')
        coords.append(f"{frame} {' '.join(triples)}")
    tag = 'tracks' if tracks else 'points'
    all_coords = ';'.join(coords)
    return f'<{tag} coords="{all_coords}">{label.lower()}</{tag}>'


_POINT = re.compile(r'<point ((?:\d+(?:\.\d+)?, ){2,3})(\d+)>')
_COORDS = re.compile(r'<(?:points|tracks)\b[^>]*?coords="([0-9\t:;, .]+)"')


def parse_points(text):
    """The points in a text of either syntax: [{x, y, id, (t | image)}]. What does not parse is left
    out, because a model may write anything."""
    points = []
    for numbers, id in _POINT.findall(text):
        *first, x, y = numbers.rstrip(', ').split(', ')
        point = {'x': float(x), 'y': float(y), 'id': int(id)}
        # In front of x may stand a time or the number of a picture; only a time has a decimal point
        if first and '.' in first[0]:
            point['t'] = float(first[0])
        elif first:
            point['image'] = int(first[0]) - 1
        points.append(point)
    for coords in _COORDS.findall(text):
        points += _parse_coords(coords)
    return [p for p in points if p['x'] <= 1 and p['y'] <= 1]


def _parse_coords(coords):
    """The points of molmo2's coords attribute: frames separated by ; : , or tabs, each a time in
    seconds or the number of a picture, and then id x y of each point."""
    frames = []                              # (time or number of the picture, the rest) as text
    for text in re.split(r'[\t:,;]', coords):
        match = re.match(r'\s*([0-9.]+)\s+(.*)', text)
        if match:
            frames.append(match.groups())
    points = []
    for frame, rest in frames:
        place = {}
        if '.' in frame:
            place['t'] = float(frame)
        elif len(frames) > 1:                # of a single picture the number says nothing
            place['image'] = int(frame) - 1
        for id, x, y in re.findall(r'(\d+) (\d{3,4}) (\d{3,4})', rest):
            point = {'x': int(x) / 1000, 'y': int(y) / 1000, 'id': int(id)}
            points.append({**point, **place})
    return points


# --------------------------------------------------------------------------------------------------
# A record becomes an Example

@dataclass
class Example:
    """A record as tokens: the prefix of its media, then its conversations as branches. All lists
    have length L."""
    tokens: list = field(default_factory=list)
    weights: list = field(default_factory=list)   # of the loss of predicting this very token
    positions: list = field(default_factory=list)
    branches: list = field(default_factory=list)  # 0 for the prefix, 1, 2, .. for the conversations
    tasks: list = field(default_factory=list)     # index into TASKS
    patches: np.ndarray = None          # [crops, patches, patch_dim] uint8
    grid: tuple = None                  # (rows, columns) of patches in a crop
    times: tuple = ()                   # seconds of the crops, where they are the frames of a video
    pool_index: np.ndarray = None       # [visual tokens, window], into crops x patches; -1 for none
    visual_index: np.ndarray = None     # [visual tokens], into tokens

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
    grid: (rows, columns) of the crop's patches. With grid (4, 4) and k = 2:

         0  1 |  2  3
         4  5 |  6  7          [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        ------+------
         8  9 | 10 11
        12 13 | 14 15

    Where k does not divide the grid, a margin of -1 (no patch) is put around it, half of what is
    missing on each side, as allenai/molmo2 does.
    """
    rows, columns = grid
    index = np.arange(rows * columns).reshape(grid)
    missing = (-rows % k, -columns % k)
    margins = [(n // 2, n - n // 2) for n in missing]
    index = np.pad(index, margins, constant_values=-1)
    rows, columns = index.shape
    index = index.reshape(rows // k, k, columns // k, k)
    index = index.transpose(0, 2, 1, 3)                  # [rows / k, columns / k, k, k]
    return index.reshape(-1, k * k)


SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>',
                  '<|vision_end|>', '<|image_pad|>', '<|video_pad|>')


def byte_tokenizer():
    """The files of a tokenizer with a token for each byte and the special tokens of Qwen3, {name:
    bytes}, for a run that has no tokenizer of its own: tokenizer = 'bytes'."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|im_end|>',
        'pad_token': '<|endoftext|>',
    }
    return {
        'tokenizer.json': tokenizer.to_str().encode(),
        'tokenizer_config.json': json.dumps(config).encode(),
    }


class Processor:
    """Records -> Examples: the layout of tokens, the pixels, and what a loss weighs.

    Layout: <|vision_start|> n x <|image_pad|> <|vision_end|> for each picture ("Image 2" before it
    if there are more); for each frame of a video its time, "1.5s", and the same with <|video_pad|>,
    then subtitles as timed lines; then the turns of a conversation in ChatML:
    <|im_start|>user\\n..<|im_end|>\\n<|im_start|>assistant\\n..<|im_end|>. Special tokens are
    inserted as ids and text is encoded with special tokens off, so a literal '<|image_pad|>' in a
    user's text stays text.
    """
    # The settings and their defaults; the constructor sets them by name
    video_size = 0                 # pixels a side of a frame; 0: image_size
    video_pooling = 0              # patches a side that a visual token of a frame pools; 0: pooling
    max_frames = 128               # of a video
    fps = 2.0                      # frames a second, up to max_frames a clip
    resize = 'stretch'             # stretch | crop (CLIP's own: the centre square); a checkpoint's
    image_token = '<|image_pad|>'
    point_format = 'point'         # point | molmo2
    point_digits = 3
    task_weights = {}              # {task: weight of its answers' tokens}; a task not named here: 1
    length_weighting = False       # weight / sqrt(tokens of the answer)
    branch_weighting = False       # weight / sqrt(conversations of the record)

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
        # Windows of pooling [visual tokens, k x k] of a picture, and of a frame of a video
        self.window = pooling_windows(self.grid, self.pooling)
        self.frame_window = pooling_windows(self.frame_grid, self.video_pooling)
        # The tokens that a frame takes at most
        longest_time = len(self.encode_timestamp(9999.9))
        delimiters = len(self.vision_start) + len(self.vision_end)
        self.frame_tokens = longest_time + delimiters + len(self.frame_window)

    def _open_tokenizer(self, folder):
        path = folder / 'tokenizer.json'
        # The files are held in memory, because the folder may be an old checkpoint that is removed
        # during training
        self.tokenizer_files = {}
        if str(folder) == 'bytes':
            self.tokenizer_files = byte_tokenizer()
        elif not path.is_file():
            raise UserError(f"{path} does not exist; a tokenizer is a folder with tokenizer.json")
        for file in (path, folder / 'tokenizer_config.json'):
            if file.is_file():
                self.tokenizer_files[file.name] = file.read_bytes()
        try:
            self.tokenizer = Tokenizer.from_buffer(self.tokenizer_files['tokenizer.json'])
        except Exception as e:               # the library raises plain Exception for a broken file
            raise UserError(f"{path} is not a tokenizer ({e})") from None
        # '<|im_end|>' in a user's text is text. (The flag's name misleads: True means to encode
        # special tokens as if they were text.)
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        needed = ('<|im_start|>', '<|im_end|>', self.image_token)
        missing = [token for token in needed if self.tokenizer.token_to_id(token) is None]
        if missing:
            names = ', '.join(missing)
            raise UserError(f"the tokenizer {path} lacks {names}, which the token layout needs")

    def _encode_fixed_texts(self):
        """Looks up the ids of special tokens and of texts that are needed again and again."""
        id_of = self.tokenizer.token_to_id
        self.im_start = id_of('<|im_start|>')
        self.im_end = id_of('<|im_end|>')
        self.image_pad = id_of(self.image_token)
        self.video_pad = id_of('<|video_pad|>')
        if self.video_pad is None:
            self.video_pad = self.image_pad
        # What stands around the placeholders of a picture: one token, or none where the tokenizer
        # lacks it
        self.vision_start = []
        if id_of('<|vision_start|>') is not None:
            self.vision_start.append(id_of('<|vision_start|>'))
        self.vision_end = []
        if id_of('<|vision_end|>') is not None:
            self.vision_end.append(id_of('<|vision_end|>'))
        self.pad = id_of('<|endoftext|>') or 0
        self.newline = self.encode('\n')
        # The separator before an answer that is part of a prompt (the history of a chat). Molmo2's
        # template has another one there (extra/molmo2.py).
        self.separator_before_past_answer = self.newline
        self._make_cache()

    def _make_cache(self):
        # For short texts that come often, as questions and times do
        self.encode_cached = lru_cache(2 ** 14)(self.encode)

    def __getstate__(self):
        """What a worker gets that is not forked but starts anew (macOS): all but the cache."""
        state = dict(self.__dict__)
        del state['encode_cached']
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        # A tokenizer travels as its JSON, which does not hold this flag
        self.tokenizer.encode_special_tokens = True
        self._make_cache()

    def _grid(self, setting):
        """(rows, columns) of the patches of a crop. setting: 'image_size' or 'video_size'."""
        size = getattr(self, setting)
        if size % self.patch_size:
            raise UserError(f"{setting} {size} is not a multiple of the patch size "
                            f"{self.patch_size}")
        side = size // self.patch_size
        return (side, side)

    def token_ids(self):
        """The ids that a model's Config holds. visual_token_ids are in the order of Molmo2's eight
        (MOLMO2_VISUAL_IDS in model.py), with the nearest token of this tokenizer for each."""
        start = self.image_pad
        if self.vision_start:
            start = self.vision_start[0]
        end = self.image_pad
        if self.vision_end:
            end = self.vision_end[0]
        visual = (start, end, self.image_pad, self.image_pad, start, self.video_pad, start, end)
        return {
            'image_token_id': self.image_pad,
            'video_token_id': self.video_pad,
            'eos_token_id': self.im_end,
            'pad_token_id': self.pad,
            'visual_token_ids': visual,
        }

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_timestamp(self, seconds):
        tenths = round(10 * seconds)
        return self.encode_cached(f'{tenths / 10:.1f}s')

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, folder):
        from extra.hf import save_processor    # in the form that transformers reads
        save_processor(self, folder)

    # -- pixels

    def pixels(self, image, size):
        """An upright RGB picture -> patches [num_patches, patch_dim] uint8, in reading order."""
        if self.resize == 'crop':
            image = self._centre_square(image, size)
        elif image.size != (size, size):
            # Stretched to a square, because nothing is cut off then, and points, which are
            # fractions of width and height, need no correction
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
        """[height, width, 3] -> [num_patches, patch_dim]; the pixels of a patch are in the order
        row, column, channel."""
        p = self.patch_size
        rows = pixels.shape[0] // p
        columns = pixels.shape[1] // p
        patches = pixels.reshape(rows, p, columns, p, 3)
        patches = patches.transpose(0, 2, 1, 3, 4)       # [rows, columns, p, p, 3]
        return patches.reshape(rows * columns, -1)

    def media(self, record, folder, room=None):
        """The media of a record, decoded: {'images': [...]} or {'clip': (times, frames),
        'subtitles': [...]}, as `build_prefix` takes them. A video gives as many frames as fit into
        `room` tokens beside its subtitles; BadRow where not even one does."""
        if not record['video']:
            images = [open_picture(folder, image) for image in record['images']]
            return {'images': images}
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
                raise BadRow('too long', f'no room for a frame of {self.frame_tokens} tokens in '
                                         f'seq_len {self.seq_len}')
        # Frames that are only stretched are resized as they are decoded, so that a clip is never
        # held at its full size
        size = None
        if self.resize == 'stretch':
            size = (self.video_size, self.video_size)
        file = open_media(folder, record['video'])
        clip = load_video(file, max_frames, self.fps, size=size, **span)
        return {'clip': clip, 'subtitles': subtitles}

    # -- tokens of the prefix

    def encode_subtitles(self, cues):
        if not cues:
            return []
        lines = [f"{cue['start']:.1f}s - {cue['end']:.1f}s: {cue['text']}" for cue in cues]
        return self.encode('\n'.join(['', 'Subtitles:', *lines]))

    def build_prefix(self, images=(), clip=((), ()), subtitles=()):
        """The prefix of an Example: pictures or a video, as patches and placeholder tokens.

        images: upright RGB pictures; clip: (seconds [n], n frames) of a video; subtitles: its cues,
        [{start, end, text}].
        """
        e = Example()
        times, frames = clip
        crops = []                           # [num_patches, patch_dim] of each
        visual_index = []                    # places of the placeholders in e.tokens
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
            # A window counts the patches of its own crop from 0, and pool_index counts the patches
            # of all crops, so the patches of the crops before are added
            patches_before = np.arange(len(crops)) * len(crops[0])
            pool_index = window + patches_before[:, None, None]  # [crops, visual tokens, k x k]
            pool_index = np.where(window < 0, -1, pool_index)
            e.pool_index = pool_index.reshape(-1, window.shape[1])
            e.visual_index = np.array(visual_index, np.int64)
        return self.complete_prefix(e)

    def _add_placeholders(self, e, token, number):
        """Adds the placeholders of one crop; returns their places in e.tokens, a range."""
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
        """The text of a message: its content, then its points. times [n]: seconds of the frames; a
        track keeps only its points near one of them, because the model gets no other frames."""
        parts = []
        if message['content']:
            parts.append(message['content'])
        if message.get('points') is not None:
            is_track = task == 'tracking'
            points = message['points']['points']
            if is_track and times is not None:
                half_interval = .5 / self.fps
                points = [p for p in points if abs(times - p['t']).min() <= half_interval]
            label = message['points'].get('label', '')
            text = format_points(points, label, self.point_format, self.point_digits, is_track)
            parts.append(text)
        return ' '.join(parts)

    def role_header(self, role):
        return [self.im_start, *self.encode_cached(f'{role}\n')]

    def tokenize_dialogue(self, conversation, times=None, past=False):
        """One conversation -> Dialogue. An answer includes its <|im_end|>, because the model has to
        learn where to stop. times [n]: seconds of the frames, for tracks. past: the answers were
        given before and are only read, as in a chat that goes on."""
        task = conversation.get('task', 'other')
        tokens = []
        answers = []                         # (start, end) of each in tokens
        for message in conversation['messages']:
            is_answer = message['role'] == 'assistant'
            if not tokens:
                pass                         # nothing stands before the first message
            elif past and is_answer:
                tokens += self.separator_before_past_answer
            else:
                tokens += self.newline
            tokens += self.role_header(message['role'])
            start = len(tokens)
            if is_answer:
                tokens += self.encode(self.render_message(message, task, times))
            else:
                # A question may hold points, too, and these are never a track
                text = self.render_message(message, 'pointing')
                # Short questions are cached, because many rows ask the same
                encode = self.encode_cached if len(text) < 200 else self.encode
                tokens += encode(text)
            tokens.append(self.im_end)
            if is_answer:
                answers.append((start, len(tokens)))
        return Dialogue(tokens, answers, task)

    def is_learnt(self, dialogue):
        """Has a conversation an answer whose task has a weight?"""
        return bool(dialogue.answers) and self.task_weights.get(dialogue.task, 1.) != 0

    def answer_weight(self, task, num_tokens, num_conversations, loss_weight=1., token_weight=None):
        """The loss weight of each token of an answer; this is the only place where it is decided.
        The loss of a step is then the weighted mean over all its tokens (train.py,
        `forward_backward`).

            task_weights[task]        because a token of a pointing answer says more than one of a
                                      caption
            / sqrt(num_tokens)        of the answer, with length_weighting, so that long answers do
                                      not drown short ones
            / sqrt(num_conversations) of the record that fit, with branch_weighting, so that
                                      pictures with many questions do not drown the others
            * loss_weight             of the data set (Dataset)

        A token_weight of the data set replaces all of this. Conversations of a task whose weight is 0
        do not come here, because `example` leaves them out (`is_learnt`).
        """
        weight = self.task_weights.get(task, 1.)
        if token_weight is not None:
            return token_weight
        if self.length_weighting:
            weight = weight / num_tokens ** .5
        if self.branch_weighting:
            weight = weight / num_conversations ** .5
        return weight * loss_weight

    def add_dialogues(self, e, dialogues, loss_weight=1., token_weight=None):
        """Adds conversations to a prefix, each as a branch with its loss weights."""
        for dialogue in dialogues:
            weights = [0.] * len(dialogue.tokens)
            for start, end in dialogue.answers:
                length = end - start
                weight = self.answer_weight(dialogue.task, length, len(dialogues),
                                            loss_weight, token_weight)
                weights[start:end] = [weight] * length
            task = dialogue.task if dialogue.task in TASKS else 'other'
            e.add_branch(dialogue.tokens, weights, TASKS.index(task))

    def example(self, record, folder, loss_weight=1., token_weight=None):
        """A record -> Example of at most seq_len tokens. Where it is too long, a video gives up
        frames first, and then conversations are left out; BadRow where not even one fits.

        folder: where the media lie. loss_weight, token_weight: those of the Dataset. Text is
        tokenised before media are decoded, because its length says how many frames of a video there
        is room for.
        """
        dialogues = [self.tokenize_dialogue(c) for c in record['conversations']]
        if not any(self.is_learnt(dialogue) for dialogue in dialogues):
            raise BadRow('no loss', "all tasks of this record have the weight 0 in task_weights")
        lengths = [len(dialogue.tokens) for dialogue in dialogues]
        # Frames must leave room for all of the text or for a quarter of the row, whichever is less,
        # but always for the shortest conversation
        room_for_text = min(sum(lengths), self.seq_len // 4)
        room_for_text = max(room_for_text, min(lengths))
        media = self.media(record, folder, self.seq_len - room_for_text)
        if 'clip' in media:
            times = media['clip'][0]
            for i, conversation in enumerate(record['conversations']):
                # Tracks are tokenised again, because the times of the frames are known only now
                if conversation.get('task') == 'tracking':
                    dialogues[i] = self.tokenize_dialogue(conversation, times)
        e = self.build_prefix(**media)
        prefix = len(e.tokens)
        fitting = []
        room = self.seq_len - prefix
        for dialogue in dialogues:
            # A conversation that is not learnt would only take room
            if self.is_learnt(dialogue) and len(dialogue.tokens) <= room:
                fitting.append(dialogue)
                room -= len(dialogue.tokens)
        if not fitting:
            raise BadRow('too long', f'{prefix} tokens of pictures and a shortest conversation of '
                                     f'{min(lengths)} do not fit seq_len {self.seq_len}')
        self.add_dialogues(e, fitting, loss_weight, token_weight)
        return e

    def prompt(self, *questions, **media):
        """A prompt as an Example, which ends where the answer begins. Each of `questions` is a list
        of messages that ends with a user's turn; several of them become a branch each of the same
        media. media: the arguments of `build_prefix`."""
        e = self.build_prefix(**media)
        for messages in questions:
            dialogue = self.tokenize_dialogue({'messages': messages}, past=True)
            tokens = dialogue.tokens + self.newline + self.role_header('assistant')
            e.add_branch(tokens, [0.] * len(tokens), TASKS.index('other'))
        return e


def processor_settings(settings):
    """The settings of a config that are arguments of Processor."""
    names = (
        'image_size', 'pooling', 'seq_len',
        'video_size', 'video_pooling', 'max_frames', 'fps',
        'point_format', 'point_digits',
        'task_weights', 'length_weighting', 'branch_weighting',
    )
    return {name: settings[name] for name in names}


# --------------------------------------------------------------------------------------------------
# Examples become rows, rows a Batch

def collate(rows, processor, length=0):
    """Rows -> Batch. A row is a list of Examples, and they stand in it one after the other, as
    documents 0, 1, ..:

        row 0    [ example A, document 0 | example B, document 1 | padding, document -1 ]
        row 1    [ example C, document 0                | padding, document -1          ]

    length: tokens of each row. 0: as many as the longest row has, rounded up to a multiple of 8,
    because matrix kernels are slower at odd sizes.
    """
    longest = 0
    for row in rows:
        longest = max(longest, sum(len(e.tokens) for e in row))
    B = len(rows)
    L = length or -(-longest // 8) * 8
    tokens = np.full((B, L), processor.pad)
    targets = np.full((B, L), processor.pad)
    weights = np.zeros((B, L), np.float32)
    positions = np.zeros((B, L), np.int64)
    documents = np.full((B, L), -1)
    branches = np.zeros((B, L), np.int64)
    tasks = np.zeros((B, L), np.int64)
    # Of each example: (patches, pool_index, places of its visual tokens in the flattened B x L)
    pictures = []
    frames = []
    for b, row in enumerate(rows):
        start = 0                            # of the example, in the row
        for document, e in enumerate(row):
            end = start + len(e.tokens)
            tokens[b, start:end] = e.tokens
            positions[b, start:end] = e.positions
            branches[b, start:end] = e.branches
            documents[b, start:end] = document
            # Token i predicts token i + 1, so all that is about the prediction moves one place to
            # the left. The last token of a branch would predict the first of the next branch; that
            # one has no weight, because it belongs to a question.
            targets[b, start:end - 1] = e.tokens[1:]
            weights[b, start:end - 1] = e.weights[1:]
            tasks[b, start:end - 1] = e.tasks[1:]
            if e.patches is not None:
                # Frames of the pictures' size go with the pictures
                kind = pictures if e.grid == processor.grid else frames
                places = e.visual_index + b * L + start
                kind.append((e.patches, e.pool_index, places))
            start = end
    loss_index = np.flatnonzero(weights)                 # [N]
    is_token = documents >= 0                            # [B, L]
    # A token at position p attends to p + 1 tokens, in a tree as in a plain row. (Visual tokens of the
    # molmo2 recipe attend to a few more, which are not counted.)
    attended = positions + 1
    has_no_tree = int(branches.max()) <= 1
    has_no_packing = int(documents.max()) <= 0
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        document_ids=torch.from_numpy(documents),
        branch_ids=torch.from_numpy(branches),
        causal=has_no_tree and has_no_packing,
        targets=torch.from_numpy(targets),
        loss_weights=torch.from_numpy(weights),
        loss_index=torch.from_numpy(loss_index),
        loss_tasks=torch.from_numpy(tasks.flatten()[loss_index]),
        num_tokens=int(is_token.sum()),
        num_pairs=int(attended[is_token].sum()),
        total_weight=float(weights.sum()),
    )
    if pictures or frames:
        add_crops(batch, processor, pictures, frames)
    return batch


def add_crops(batch, processor, pictures, frames):
    """Fills in the crops of a batch, and their indices. pictures, frames: lists of (patches,
    pool_index, places in B x L), one for each example; frames only where their size is not that of
    pictures. pool_index counts the patches of all pictures first, then those of all frames."""
    pool_index = []
    visual_index = []
    patches_before = 0                       # those of the examples before
    for patches, index, places in pictures + frames:
        pool_index.append(np.where(index < 0, -1, index + patches_before))
        visual_index.append(places)
        patches_before += patches.shape[0] * patches.shape[1]
    # Pictures and frames may be pooled by windows of two sizes; the smaller ones are filled up
    # with -1
    width = max(index.shape[1] for index in pool_index)
    padded = []
    for index in pool_index:
        missing = width - index.shape[1]
        padded.append(np.pad(index, ((0, 0), (0, missing)), constant_values=-1))
    batch.pool_index = torch.from_numpy(np.concatenate(padded))
    batch.visual_index = torch.from_numpy(np.concatenate(visual_index))
    if pictures:
        crops = [patches for patches, _, _ in pictures]
        batch.patches = torch.from_numpy(np.concatenate(crops))
        batch.grid = processor.grid
    if frames:
        crops = [patches for patches, _, _ in frames]
        batch.frames = torch.from_numpy(np.concatenate(crops))
        batch.frame_grid = processor.frame_grid


PACKING_POOL = 48           # examples to choose a row from; more gains nothing (Molmo2, appendix B)


def best_fit(lengths, room):
    """Packing: the indices, ascending, of the examples that fill a row of `room` tokens best.

    The first example is always taken, because it has waited longest. (No example is longer than a
    row, see Processor.example.) Of the others those are taken whose lengths add up to most within
    the room that is left. The search is exact: bit s of reach[n] says whether some of the first n
    others have the total length s. With lengths [3, 4, 2, 5] and room 11, the first example leaves
    room 8:

        reach[0]  {0}                   no others
        reach[1]  {0, 4}                with or without the 4
        reach[2]  {0, 2, 4, 6}          with or without the 2
        reach[3]  {0, 2, 4, 5, 6, 7}    with or without the 5; 9 and 11 are too long

    The best total is 7. Which examples it consists of is read backwards: reach[2] has no 7, so the
    5 is in it, and 2 remains; reach[1] has no 2, so the 2 is in it, and 0 remains; reach[0] has 0,
    so the 4 is not. The result is [0, 2, 3].
    """
    room -= lengths[0]
    within_room = (1 << (room + 1)) - 1      # bits 0 to room
    reach = [1]                              # bit 0: nothing has the total length 0
    for n in lengths[1:]:
        without_this = reach[-1]
        with_this = reach[-1] << n           # every total grows by n
        reach.append((without_this | with_this) & within_room)
    total = reach[-1].bit_length() - 1       # the highest bit is the best total
    chosen = [0]
    for i in range(len(lengths) - 1, 0, -1):
        # Where the total can be had without example i it is not taken, so that older ones go first
        can_be_had_without = (reach[i - 1] >> total) & 1
        if not can_be_had_without:
            chosen.append(i)
            total -= lengths[i]
    return sorted(chosen)


def next_row(pool, examples, room, size):
    """The next packed row, a list of examples with at most `room` tokens together.

    pool: a list of examples that wait, oldest first; it is filled up to PACKING_POOL from the
    iterator `examples`, and the row is taken out of it. size(example): its number of tokens.
    """
    pool += itertools.islice(examples, PACKING_POOL - len(pool))
    chosen = best_fit([size(e) for e in pool], room)
    row = [pool[i] for i in chosen]
    for i in reversed(chosen):               # from the end, so that the other indices stay right
        del pool[i]
    return row


# --------------------------------------------------------------------------------------------------
# Mixtures: which row comes next

def permute(i, n, key):
    """The number at place i of a random permutation of range(n). `key` names the permutation, as a
    seed does. Shuffling a list would give the same, but a list of ten million rows takes memory,
    and this is computed for one i at a time.

    It is a Feistel network: the bits of i are cut into two halves, and each of four rounds turns

        (left, right)  into  (right, left ^ hash(key, round, right))

    A round can be undone, because its result still holds `right` and so the hash. So two numbers
    never become the same one, and all numbers of that many bits are permuted. There may be more of
    these than n; a result that is not below n goes through the network again until one is (Black &
    Rogaway 2002, "cycle walking").
    """
    bits = max(n - 1, 1).bit_length()        # of the largest number
    half = max(1, (bits + 1) // 2)           # bits of a half, rounded up so that both are equal
    low_bits = (1 << half) - 1
    while True:
        left = i >> half
        right = i & low_bits
        for round_number in range(4):
            message = f'{key}/{round_number}/{right}'.encode()
            digest = hashlib.blake2b(message, digest_size=8).digest()
            hashed = int.from_bytes(digest, 'little') & low_bits
            mixed = left ^ hashed
            left = right
            right = mixed
        i = (left << half) | right
        if i < n:
            return i


def mixture_sets(mixture):
    """{data set: its options} of a config's `mixture` (see `mixture_rates`). A mistake in it is a
    UserError."""
    known = ('cap', 'factor', 'loss_weight', 'token_weight', 'size')
    sets = {}
    for key, group in mixture.items():
        members = {key: {}}
        if isinstance(group, dict):
            if set(group) != {'rate', 'sets'} or not group['sets']:
                raise UserError(f"mixture['{key}'] is a group: "
                                "{'rate': .5, 'sets': {name: {}, ...}}")
            members = group['sets']
        for name, options in members.items():
            if name in sets:
                raise UserError(f"mixture names dataset '{name}' twice")
            wrong = [option for option in options if option not in known]
            if wrong:
                raise UserError(f"mixture: '{name}' has option '{wrong[0]}'; "
                                f"known: {', '.join(known)}")
            sets[name] = options
    return sets


def mixture_rates(mixture, sizes):
    """{data set: its share of the draws}. sizes: {data set: rows}; mixture: as in a config, with
    entries of two kinds:

        name: rate
            a data set with a rate of its own
        group: {'rate': rate, 'sets': {name: {}, name: {'cap': 60_000, 'factor': 1.5}, ..}}
            data sets that share the rate of the group, in proportion to
            sqrt(rows, at most cap) * factor

    Further options of a set in a group: loss_weight multiplies the loss weights of its tokens,
    token_weight replaces them, and size is for the table of a mixture that is not prepared yet
    (extra/plan.py).

    All rates are divided by their sum (allenai/molmo2 data_loader.py, _build_mixture). One group of
    rate 1 is the plain sqrt-proportional rule, w_i = sqrt(n_i) / sum of sqrt(n_j).
    """
    group_rates = {}
    for key, group in mixture.items():
        group_rates[key] = group['rate'] if isinstance(group, dict) else group
    total = sum(group_rates.values())
    rates = {}
    for key, group in mixture.items():
        share = group_rates[key] / total
        if not isinstance(group, dict):
            rates[key] = share
            continue
        roots = {}
        for name, options in group['sets'].items():
            rows = min(sizes[name], options.get('cap') or sizes[name])
            roots[name] = rows ** .5 * options.get('factor', 1)
        all_roots = sum(roots.values())
        for name, root in roots.items():
            rates[name] = share * root / all_roots
    return rates


def open_dataset(name, settings, data_dir, **arguments):
    """The training split of a data set of the mixture: the Python object that `datasets` has under
    its name, else the folder under data_dir. arguments: cap, loss_weight, token_weight."""
    if name in settings['datasets']:
        return Records(name, settings['datasets'][name], data_dir, **arguments)
    return Dataset(Path(data_dir) / name, **arguments)


def open_mixture(settings, data_dir, seed=0):
    """The Mixture of a config's `mixture`, from the training splits of its data sets: folders under
    data_dir, or Python objects that `datasets` names."""
    sets = mixture_sets(settings['mixture'])
    if not sets:
        raise UserError("mixture is empty: name datasets and rates, as config/demo.py does")
    unused = set(settings['datasets']) - set(sets)
    if unused:
        raise UserError(f"datasets names '{min(unused)}', which mixture does not; it has {', '.join(sets)}")
    opened = {}
    for name, options in sets.items():
        arguments = {}                       # the other options are for `mixture_rates`
        for key in ('cap', 'loss_weight', 'token_weight'):
            if key in options:
                arguments[key] = options[key]
        opened[name] = open_dataset(name, settings, data_dir, **arguments)
    sizes = {name: dataset.rows for name, dataset in opened.items()}
    rates = mixture_rates(settings['mixture'], sizes)
    return Mixture(list(opened.values()), [rates[name] for name in opened], seed)


class Mixture:
    """The order in which the rows of several data sets are read. Draw k of a run depends on (seed,
    k) alone, so a run that resumes needs only the number of its next draw.

    A draw takes a data set at random by the rates, and then the next row of that data set, in a
    permutation that is another one in every epoch.
    """
    BLOCK = 4096                             # draws whose random numbers are made together

    def __init__(self, datasets, rates, seed=0):
        for dataset in datasets:
            if not len(dataset):
                raise UserError(f"dataset {dataset.name} has no rows")
        self.datasets = datasets
        self.seed = seed
        self.rates = np.array(rates, float) / np.sum(rates)
        # [0, 1) is divided among the data sets; these are the borders between them
        self.edges = np.cumsum(self.rates)[:-1]

    def _block(self, number):
        """The data sets [BLOCK] of the draws from number * BLOCK on, as indices."""
        # Philox makes the random numbers of any block without those before: its counter is moved
        # far enough that no two blocks overlap
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=number << 64))
        return np.searchsorted(self.edges, generator.random(self.BLOCK), side='right')

    def _row(self, d, drawn_before):
        """The row of data set d that a draw takes after `drawn_before` earlier draws of it."""
        dataset = self.datasets[d]
        epoch, i = divmod(drawn_before, len(dataset))
        i = permute(i, len(dataset), f'{self.seed}/{d}/{epoch}')
        if dataset.cap:
            # i is one of the first `cap` numbers; a second permutation, which is the same in every
            # epoch, makes it a row from anywhere in the file
            i = permute(i, dataset.rows, f'{self.seed}/{d}')
        return i

    def draws(self, start=0, stride=1):
        """Yields (k, index of the data set, row) for k = start, start + stride, .. without end.

        The draws before `start` are counted and not made (10 ns each), because the next row of a
        data set depends only on how often it was drawn before.
        """
        counts = np.zeros(len(self.datasets), np.int64)          # draws of each data set so far
        first_block = start // self.BLOCK
        for number in range(first_block):
            counts += np.bincount(self._block(number), minlength=len(counts))
        k = first_block * self.BLOCK
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
    """The work of a DataLoader's worker: a draw (k, data set, row) -> (the draw, its Example). In
    place of the Example stands a RowProblem or a UserError if the row could not be used."""

    def __init__(self, mixture, processor):
        self.mixture = mixture
        self.processor = processor

    def __getitem__(self, draw):
        _, d, row = draw
        dataset = self.mixture.datasets[d]
        try:
            record = dataset[row]
            example = self.processor.example(
                record,
                dataset.folder,
                dataset.loss_weight,
                dataset.token_weight,
            )
            return draw, example
        except BadRow as e:
            return draw, RowProblem(dataset.where(row), dataset.name, e.reason, str(e))
        except UserError as e:
            # Returned and raised by the Loader, because a DataLoader would print a worker's
            # exception in the middle of a long traceback
            return draw, e


def _ignore_signals(_):
    """For a worker: only the training process answers Ctrl-C and SIGTERM, and it ends its workers
    itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Endless batches. They are the same ones whatever the number of workers, and a run that
    resumes goes on with the very next one:

        Mixture.draws  ->  workers (ExampleDataset)  ->  pool of examples  ->  rows  ->  Batch

    Not packed, a row is one example, in the order of the draws. Packed, a row of exactly `length`
    tokens is filled from a pool of up to PACKING_POOL examples, which wait until they fit
    (`next_row`).

    `state` says how to go on, in a few numbers that a checkpoint keeps. It holds no Examples: those
    that waited in the pool are read again after a resume.

        'draw'       number of the next draw
        'pool'       [[draw, data set, row], ..] of the examples that wait in the pool
        'seen'       rows read, the unusable ones among them
        'skipped'    {'data set: reason': number of unusable rows}

    Of world_size processes, the one of number `rank` takes the draws rank, rank + world_size, ..
    report(RowProblem) is called for each row that cannot be used; UserError when these are more
    than max_bad_fraction of all.
    """

    def __init__(self, mixture, processor, batch_size, num_workers=0, state=None, length=0,
                 max_bad_fraction=.1, report=None, packed=False, rank=0, world_size=1):
        self.examples = ExampleDataset(mixture, processor)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.length = length
        self.max_bad_fraction = max_bad_fraction
        self.report = report
        self.packed = packed
        self.stride = world_size
        self.state = {'draw': rank, 'pool': [], 'seen': 0, 'skipped': {}}
        self.state.update(state or {})
        self.state['skipped'] = dict(self.state['skipped'])      # a copy, because it is counted up
        self.unread = []         # draws of the saved pool that are not read again yet; they belong to
        #                          the state all the same

    def __iter__(self):
        """Yields (Batch, the state with which a new Loader continues after it)."""
        examples = self._read_examples()
        pool = []                            # (draw, Example) pairs that wait, oldest first
        while True:
            rows = []
            sources = []                     # (data set, row) of each example, for messages
            while len(rows) < self.batch_size:
                if self.packed:
                    row = next_row(pool, examples, self.length, self._num_tokens)
                else:
                    row = [next(examples)]
                rows.append([example for _, example in row])
                sources += [self._source(draw) for draw, _ in row]
            batch = collate(rows, self.examples.processor, self.length)
            batch.sources = sources
            self.state['pool'] = [list(draw) for draw, _ in pool] + self.unread
            # Copies, because self.state goes on changing while this state waits to be saved
            yield batch, {**self.state, 'skipped': dict(self.state['skipped'])}

    @staticmethod
    def _num_tokens(drawn):
        _, example = drawn
        return len(example.tokens)

    def _source(self, draw):
        _, d, row = draw
        return self.examples.mixture.datasets[d].name, row

    def _read_examples(self):
        """Yields (draw, Example): first those that waited in the pool when the state was saved,
        then those of new draws. It keeps self.state and self.unread up to date."""
        waiting = self.state['pool']
        new_draws = self.examples.mixture.draws(self.state['draw'], self.stride)
        draws = itertools.chain(map(tuple, waiting), new_draws)
        self.unread = waiting
        for n, (draw, example) in enumerate(self._read(draws)):
            self.unread = waiting[n + 1:]
            if n >= len(waiting):            # a new draw; those of the pool were counted before
                self.state['draw'] = draw[0] + self.stride
                self.state['seen'] += 1
            if isinstance(example, UserError):
                raise example
            if isinstance(example, RowProblem):
                self._skip(example)
            else:
                yield draw, example

    def _read(self, draws):
        """Yields (draw, Example, RowProblem or UserError) in the order of the draws. Workers read
        ahead, if there are any; the state counts only what was taken from here."""
        options = {}
        if self.num_workers:
            options['prefetch_factor'] = 4 * self.batch_size
            if sys.platform == 'linux':
                options['multiprocessing_context'] = 'fork'
        return torch.utils.data.DataLoader(
            self.examples,
            sampler=draws,
            batch_size=None,                 # examples come one by one, and rows are made here
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
            # A DataLoader draws a seed for its workers when it starts. Drawn from torch's global
            # generator, that would change the dropout of a resumed run.
            generator=torch.Generator(),
            **options,
        )

    def _skip(self, problem):
        """Counts a row that cannot be used and reports it."""
        skipped = self.state['skipped']
        key = f'{problem.dataset}: {problem.reason}'
        skipped[key] = skipped.get(key, 0) + 1
        if self.report:
            self.report(problem)
        bad = sum(skipped.values())
        seen = self.state['seen']
        # Fewer than 20 say nothing about the data set, because a run may begin with them by chance
        if bad >= 20 and bad > self.max_bad_fraction * seen:
            raise UserError(f'{bad} of {seen} rows could not be used, more than max_bad_fraction = '
                            f'{self.max_bad_fraction}: {skipped}; '
                            f'last: {problem.row}: {problem.problem}')


# --------------------------------------------------------------------------------------------------
# Are records what they should be?

# Other trainers mark in the text where a picture belongs (LLaVA's <image>). Media always come first
# here, so such marks at the ends of a text are removed.
_MEDIA_MARKS = re.compile(r'^\s*(<(image|video)>\s*)+|(\s*<(image|video)>)+\s*$')


def normalise(record):
    """A record in one shape, whatever trainer it was written for: 'images' is a list of paths,
    'video' a path or None, 'conversations' a list of {'task', 'messages'}. BadRow says what is
    wrong with it."""
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
    """The conversations of a record in any of three shapes:

        {'conversations': [{'task': ..., 'messages': [...]}, ..]}       ours
        {'messages': [{'role': 'user', 'content': ...}, ..]}            one conversation
        {'conversations': [{'from': 'human', 'value': ...}, ..]}        LLaVA's, one conversation
    """
    keys = ', '.join(map(str, record)) or 'none'
    problem = f"neither 'conversations' nor 'messages' among its keys: {keys}"
    if 'conversations' not in record and 'messages' not in record:
        raise BadRow('schema', problem)
    conversations = record.get('conversations') or [{'messages': record.get('messages')}]
    if not isinstance(conversations, list):
        raise BadRow('schema', problem)
    is_llava = all(isinstance(turn, dict) and 'from' in turn for turn in conversations)
    if not is_llava:
        return conversations
    roles = {'human': 'user', 'gpt': 'assistant'}
    messages = []
    for turn in conversations:
        role = roles.get(turn['from'], turn['from'])
        messages.append({'role': role, 'content': turn.get('value')})
    return [{'messages': messages}]


def _media_paths(record):
    """(paths of images, path of the video or None). 'images', 'image' (LLaVA's name), 'video' and
    'videos' may each be a path or a list of paths."""
    images = _list_of_paths(record, 'images') or _list_of_paths(record, 'image')
    videos = _list_of_paths(record, 'videos') or _list_of_paths(record, 'video')
    for image in images:
        if not isinstance(image, str) and not is_picture(image):
            raise BadRow('schema', "'images' is a list of paths (of a Python data set: or of "
                                   f"pictures), there is a {type(image).__name__} in it")
    if not all(isinstance(path, str) for path in videos):
        raise BadRow('schema', "'video' is a path")
    if len(videos) > 1 or videos and images:
        raise BadRow('schema', f'{len(videos)} videos and {len(images)} images: a record has one '
                               'video or any number of images')
    return images, videos[0] if videos else None


def _list_of_paths(record, key):
    value = record.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, np.ndarray) and value.ndim == 4:
        return list(value)                   # pictures of one size
    if is_picture(value):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise BadRow('schema', f"'{key}' is a list of paths, this is a {type(value).__name__}")
    return list(value)


def last_answer(messages):
    """The index of the last message of the assistant; a conversation of a record has one."""
    return max(i for i, message in enumerate(messages) if message['role'] == 'assistant')


def _check_conversation(conversation, num_images, has_video):
    """BadRow unless it is one; removes marks for media from its texts."""
    messages = conversation.get('messages') if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise BadRow('schema',
                     "a conversation is {'messages': [{'role': ..., 'content': text}, ...]}")
    if not isinstance(conversation.get('task', ''), str):
        raise BadRow('schema', f"'task' is one of {', '.join(TASKS)}, "
                               f"this is {conversation['task']!r}")
    for message in messages:
        message['content'] = _MEDIA_MARKS.sub('', message.get('content', ''))
        check_points(message.get('points'), num_images, has_video)
    if not any(message['role'] == 'assistant' for message in messages):
        raise BadRow('no answer', 'a conversation without an assistant turn')


def _is_message(message):
    return (isinstance(message, dict) and isinstance(message.get('role'), str)
            and isinstance(message.get('content', ''), str))


def _is_number(value, low, high):
    # A bool is excluded, because Python's bool is an int
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and low <= value <= high


def check_points(points, num_images, video):
    """BadRow unless `points`, a message's, are None or {'label': text, 'points': [{x, y, id, t,
    image}, ..]}. x and y are in [0, 1]; t, seconds, belongs to a point of a video; image is the
    index, from 0, of one of num_images pictures. video: whether the record is one."""
    if points is None:
        return
    if not (isinstance(points, dict) and isinstance(points.get('points'), list)
            and isinstance(points.get('label', ''), str)):
        raise BadRow('schema', "points are {'label': text, "
                               "'points': [{'x': ..., 'y': ..., 'id': ...}, ...]}")
    for p in points['points']:
        # A little outside of [0, 1] is let through and moved to the border by `format_points`
        if not isinstance(p, dict) or not all(_is_number(p.get(axis), -.05, 1.05) for axis in 'xy'):
            raise BadRow('bad point',
                         f"x and y are fractions of the picture in [0, 1], this is {p}")
        if not isinstance(p.get('id', 1), Integral):
            raise BadRow('bad point', f"'id' is a whole number, this is {p}")
        if video != ('t' in p) or video and not _is_number(p['t'], 0, 1e7):
            raise BadRow('bad point', f"a point has its second 't' in a video and nowhere else, "
                                      f"this is {p}")
        if 'image' not in p:
            continue
        image = p['image']
        if not isinstance(image, Integral) or not _is_number(image, 0, num_images - 1):
            raise BadRow('bad point', f"'image' is the index, from 0, of one of {num_images} "
                                      f"images, this is {p}")


if __name__ == '__main__':
    try:
        from extra.inspector import main     # the page of what the model gets, and --check
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
