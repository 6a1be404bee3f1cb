"""From files to batches.

    data/<name>/train.jsonl + media          one JSON record a line, found through an offset index
       │  Mixture                            draw k of the run -> (dataset, row): a pure function of (seed, k)
       ▼
    record  {"images": [...], "conversations": [{"task": ..., "messages": [...]}, ...]}
       │  Processor.example                  decode, resize, patchify; token ids and loss weights built turn by turn
       ▼
    Example                                  tokens, weights, branches [L]; patches [crops, patches, patch_dim] uint8
       │  collate                            pad, shift targets, flatten the indices
       ▼
    batch   tokens, targets, loss_weights, position_ids, document_ids, branch_ids [B, L], patches, pool_index, ...

A record is a message tree: its media first, then each conversation as a branch that sees the media and itself, so a
picture with ten questions is decoded and encoded once. Points are structured in the record and become text here.
A row that cannot be used raises BadRow; the Loader skips it, counts it by reason and names it.

    python data.py config/demo_stage1.py     counts, weights, examples; writes an HTML page of what the model gets
"""
import base64
import hashlib
import html
import io
import json
import re
import signal
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer

from model import UserError, load_model, read_json

TASKS = ('captioning', 'qa', 'counting', 'pointing', 'tracking', 'text', 'other')
MAX_PIXELS = 100_000_000                     # a larger picture is a decompression bomb or a mistake
MAX_LINE = 16 * 2 ** 20                      # bytes of one record


class BadRow(ValueError):
    """A row that cannot be used. `reason` is a short category for the count, the message says what is wrong."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


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
    """A JSONL file as a sequence of records. Byte offsets of the lines are indexed once and kept beside the file."""

    def __init__(self, folder, split='train'):
        self.folder = Path(folder)
        self.name = self.folder.name
        self.path = self.folder / f'{split}.jsonl'
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; prepare the dataset first (prepare/)")
        index, stat = self.path.with_name(f'.{split}.index.npy'), self.path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        try:
            self.offsets = np.load(index, mmap_mode='r', allow_pickle=False)
            fresh = self.offsets[:2].tolist() == stamp
        except (OSError, ValueError):
            fresh = False
        if not fresh:
            self.offsets = np.array(stamp + self._scan(), np.int64)
            try:                             # a read-only folder costs a scan per start, nothing else
                temporary = index.with_suffix(f'.{id(self)}.tmp')
                with open(temporary, 'wb') as f:
                    np.save(f, self.offsets)
                temporary.replace(index)
            except OSError:
                pass
        self._file = None

    def _scan(self):
        """Where each non-empty line starts, then where the last one ends."""
        offsets, end = [], 0
        with open(self.path, 'rb') as f:
            for line in f:
                if line.strip():
                    offsets.append(end)
                end += len(line)
        return offsets + [end]

    def __len__(self):
        return len(self.offsets) - 3

    def __getstate__(self):                  # an open file does not travel to a worker
        return {**self.__dict__, '_file': None}

    def __getitem__(self, i):
        start, end = int(self.offsets[i + 2]), int(self.offsets[i + 3])
        if end - start > MAX_LINE:
            raise BadRow('too large', f'{end - start:,} bytes in one line (limit {MAX_LINE:,})')
        self._file = self._file or open(self.path, 'rb')
        self._file.seek(start)
        try:
            record = json.loads(self._file.read(end - start))
        except ValueError as e:
            raise BadRow('broken JSON', str(e)) from None
        return normalise(record)

    def where(self, i):
        """'data/pixmo/train.jsonl line 713' for messages."""
        with open(self.path, 'rb') as f:
            lines = sum(f.read(min(2 ** 20, n)).count(b'\n') for n in _pieces(int(self.offsets[i + 2])))
        return f'{self.path} line {lines + 1}'


def _pieces(size, step=2 ** 20):
    return [step] * (size // step) + [size % step]


def normalise(record):
    """A record in the one shape: images [...], conversations [{task, messages}]. BadRow names what is wrong."""
    if not isinstance(record, dict):
        raise BadRow('schema', f'a record is a JSON object, this is {type(record).__name__}')
    if 'conversations' not in record and 'messages' not in record:
        raise BadRow('schema', f"neither 'conversations' nor 'messages' among its keys: {', '.join(record) or 'none'}")
    conversations = record.get('conversations') or [{'messages': record.get('messages')}]
    if isinstance(record.get('images'), str):
        record['images'] = [record['images']]
    for conversation in conversations:
        messages = conversation.get('messages') if isinstance(conversation, dict) else None
        if not isinstance(messages, list) or not all(
                isinstance(m, dict) and isinstance(m.get('content', ''), str) and isinstance(m.get('role'), str)
                for m in messages):
            raise BadRow('schema', "a conversation is {'messages': [{'role': ..., 'content': text}, ...]}")
        for m in messages:                   # other trainers mark the place of a picture; ours stand first
            m['content'] = re.sub(r'^\s*(<image>\s*)+|(\s*<image>)+\s*$', '', m.get('content', ''))
            for p in (m.get('points') or {}).get('points', ()):
                if not all(isinstance(p.get(k), (int, float)) and -.05 <= p[k] <= 1.05 for k in ('x', 'y')):
                    raise BadRow('bad point', f"x and y are fractions of the picture in [0, 1], this is {p}")
        if not any(m['role'] == 'assistant' for m in messages):
            raise BadRow('no answer', 'a conversation without an assistant turn')
    if record.get('video') or record.get('videos'):
        raise BadRow('video', 'video records cannot be read yet')
    return {**record, 'images': record.get('images') or [], 'conversations': conversations}


@lru_cache(maxsize=64)
def _tar_index(path):
    with tarfile.open(path, 'r:') as tar:    # uncompressed: a member is a range of bytes
        return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}


def open_media(folder, path):
    """The bytes of a media file inside `folder`: a file, or a member of an uncompressed tar (`media-0.tar/7.jpg`)."""
    folder = Path(folder).resolve()
    full = (folder / path).resolve()
    if not full.is_relative_to(folder):
        raise BadRow('outside', f"'{path}' leaves the dataset's folder")
    try:
        head, tar, member = str(path).partition('.tar/')
        if tar:
            archive = (folder / f'{head}.tar').resolve()
            start, size = _tar_index(archive)[member]
            with open(archive, 'rb') as f:
                f.seek(start)
                return f.read(size)
        return full.read_bytes()
    except (OSError, KeyError, tarfile.TarError):
        raise BadRow('missing media', f"'{path}' does not exist in {folder.name}/") from None


def load_image(source):
    """Bytes or a path -> upright 8-bit RGB: EXIF turned, transparency on white, 16 bits scaled, first frame."""
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_PIXELS:
            raise BadRow('too large', f'a picture of {image.width} x {image.height} pixels (limit {MAX_PIXELS:,})')
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')
    except FileNotFoundError:
        raise BadRow('missing media', f'{source} does not exist') from None
    except UnidentifiedImageError:
        raise BadRow('unreadable media', 'not a picture, whatever its name says') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, BadRow):
            raise
        raise BadRow('unreadable media', f'{e}') from None


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
    pool_index: np.ndarray = None                      # [visual tokens, window], into crops x patches
    visual_index: np.ndarray = None                    # [visual tokens], into tokens


class Processor:
    """Records -> Examples: the token layout, the pixels, and what a checkpoint's processor files say about both.

    Layout: for each image <|vision_start|> n x <|image_pad|> <|vision_end|>, then ChatML turns. Special tokens are
    inserted as ids; text is encoded with special tokens off, so a literal '<|image_pad|>' stays text.
    """
    NEEDED = ('<|im_start|>', '<|im_end|>', '<|image_pad|>')

    def __init__(self, tokenizer_folder, image_size, patch_size, pooling, seq_len=4096, resize='stretch',
                 image_token='<|image_pad|>', point_format='point', point_digits=3, task_weights=None,
                 length_weighting=False):
        self.tokenizer_folder = Path(tokenizer_folder)
        path = self.tokenizer_folder / 'tokenizer.json'
        if not path.is_file():
            raise UserError(f"{path} does not exist; a tokenizer is a folder with tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:               # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer ({e})") from None
        self.tokenizer.encode_special_tokens = True    # '<|im_end|>' in a user's text is text
        self.image_size, self.patch_size, self.pooling, self.seq_len = image_size, patch_size, pooling, seq_len
        self.resize, self.image_token = resize, image_token
        self.point_format, self.point_digits = point_format, point_digits
        self.task_weights, self.length_weighting = task_weights or {}, length_weighting
        ids = {t: self.tokenizer.token_to_id(t) for t in (*self.NEEDED[:2], image_token)}
        if lost := [t for t, i in ids.items() if i is None]:
            raise UserError(f"the tokenizer {path} lacks {', '.join(lost)}, which the token layout needs")
        self.im_start, self.im_end, self.image_pad = ids.values()
        self.around = [self.tokenizer.token_to_id(t) for t in ('<|vision_start|>', '<|vision_end|>')]
        self.pad = self.tokenizer.token_to_id('<|endoftext|>') or 0
        self.newline = self.encode('\n')
        self.role = lru_cache(None)(lambda role: [self.im_start, *self.encode(f'{role}\n')])
        if image_size % (patch_size * pooling):
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size} x pooling {pooling}")
        self.grid = (image_size // patch_size,) * 2
        # Patches of each pooled token in one crop, windows in reading order: [tokens, pooling^2]
        g, k = self.grid[0], pooling
        window = np.arange(g * g).reshape(g // k, k, g // k, k).transpose(0, 2, 1, 3).reshape(-1, k * k)
        self.window = window.astype(np.int64)

        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)

    def token_ids(self):
        """The ids that a model's Config holds."""
        video = self.tokenizer.token_to_id('<|video_pad|>')
        return {'image_token_id': self.image_pad, 'video_token_id': self.image_pad if video is None else video,
                'eos_token_id': self.im_end, 'pad_token_id': self.pad}

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    # -- pixels

    def pixels(self, image):
        """An upright RGB picture -> patches [num_patches, patch_dim] uint8, in reading order; row, column, channel."""
        size, p = self.image_size, self.patch_size
        if self.resize == 'crop':            # CLIP's own: short side to size, centre square (transformers CLIP)
            short, (w, h) = min(image.size), image.size
            image = image.resize((int(size * w / short), int(size * h / short)), Image.Resampling.BICUBIC)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        elif image.size != (size, size):     # stretch: nothing is lost, and fractions of the picture stay fractions
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        g = self.grid[0]
        return np.asarray(image).reshape(g, p, g, p, 3).transpose(0, 2, 1, 3, 4).reshape(g * g, p * p * 3)

    # -- tokens

    def answer(self, message, conversation):
        """The text of an assistant message: its content, then its points."""
        parts = [message['content']] if message['content'] else []
        if (points := message.get('points')) is not None:
            parts.append(format_points(points['points'], points.get('label', ''), self.point_format,
                                       self.point_digits, conversation.get('task') == 'tracking'))
        return ' '.join(parts)

    def _media(self, images):
        """The shared part of an example: pictures and their placeholder tokens."""
        e = Example()
        crops, pool, visual = [], [], []
        for i, image in enumerate(images):
            if len(images) > 1:
                e.tokens += self.encode(f'Image {i + 1}')
            e.tokens += [t for t in self.around[:1] if t is not None]
            visual += range(len(e.tokens), len(e.tokens) + len(self.window))
            e.tokens += [self.image_pad] * len(self.window)
            e.tokens += [t for t in self.around[1:] if t is not None]
            crops.append(self.pixels(image))
            pool.append(self.window + i * self.grid[0] * self.grid[1])
        n = len(e.tokens)
        e.weights, e.positions, e.branches, e.tasks = [0.] * n, list(range(n)), [0] * n, [0] * n
        if crops:
            e.patches, e.pool_index, e.visual_index = np.stack(crops), np.concatenate(pool), np.array(visual, np.int64)
        return e

    def _dialogue(self, conversation):
        """ids and weights of one conversation, built together turn by turn. Loss: answers and their <|im_end|>."""
        task = conversation.get('task', 'other')
        base = self.task_weights.get(task, 1.)
        ids, weights = [], []
        for message in conversation['messages']:
            if ids:
                ids, weights = ids + self.newline, weights + [0.] * len(self.newline)
            head = self.role(message['role'])
            if message['role'] == 'assistant':
                body = self.encode(self.answer(message, conversation)) + [self.im_end]
                w = base / len(body) ** .5 if self.length_weighting else base
            else:
                body, w = self.encode(message['content']) + [self.im_end], 0.
            ids, weights = ids + head + body, weights + [0.] * len(head) + [w] * len(body)
        return ids, weights, TASKS.index(task) if task in TASKS else TASKS.index('other')

    def example(self, record, folder):
        """A record -> Example of at most seq_len tokens. Conversations that do not fit are left out."""
        e = self._media([load_image(open_media(folder, path)) for path in record['images']])
        shared, lengths = len(e.tokens), []
        for conversation in record['conversations']:
            ids, weights, task = self._dialogue(conversation)
            lengths.append(len(ids))
            if not any(weights) or len(e.tokens) + len(ids) > self.seq_len:
                continue
            branch = e.branches[-1] + 1 if e.branches else 1
            e.positions += range(shared, shared + len(ids))
            e.tokens, e.weights = e.tokens + ids, e.weights + weights
            e.branches, e.tasks = e.branches + [branch] * len(ids), e.tasks + [task] * len(ids)
        if len(e.tokens) == shared:
            raise BadRow('too long', f'{shared} visual tokens and a shortest conversation of {min(lengths)} do not fit '
                                     f'seq_len {self.seq_len}')
        return e

    def prompt(self, images, messages):
        """Pictures (PIL) and messages that end with a user turn -> Example that ends where the answer begins."""
        e = self._media(images)
        ids, _, _ = self._dialogue({'messages': messages})
        ids = ids + self.newline + self.role('assistant')
        e.tokens, n = e.tokens + ids, len(e.tokens) + len(ids)
        e.weights, e.positions, e.branches, e.tasks = [0.] * n, list(range(n)), [0] * n, [0] * n
        return e

    # -- what travels with a checkpoint

    def save(self, folder):
        """Tokenizer and processor files in the layout transformers reads; our own settings in processor_config.json."""
        folder, size = Path(folder), {'height': self.image_size, 'width': self.image_size}
        for name in ('tokenizer.json', 'tokenizer_config.json'):
            if (self.tokenizer_folder / name).is_file():
                (folder / name).write_bytes((self.tokenizer_folder / name).read_bytes())
        mean, std = (list(x) for x in _pixel_stats(folder))
        image = {'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3, 'do_rescale': True,
                 'do_center_crop': self.resize == 'crop', 'crop_size': size, 'do_normalize': True,
                 'do_convert_rgb': True, 'image_mean': mean, 'image_std': std,
                 'size': {'shortest_edge': self.image_size} if self.resize == 'crop' else size}
        ours = {k: getattr(self, k) for k in ('image_size', 'patch_size', 'pooling', 'resize', 'image_token',
                                              'point_format', 'point_digits')}
        processor = {'processor_class': 'LlavaProcessor', 'image_token': self.image_token,
                     'patch_size': self.patch_size, 'num_additional_image_tokens': 1,
                     'vision_feature_select_strategy': 'default', 'nanomolmo2': ours}
        for name, content in (('preprocessor_config.json', image), ('processor_config.json', processor)):
            (folder / name).write_text(json.dumps(content, indent=2))
        (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)

    @classmethod
    def load(cls, folder, config, **overrides):
        """The processor of a checkpoint folder: ours, or a llava folder of others read from its processor files."""
        folder = Path(folder)
        path = folder / 'processor_config.json'
        theirs = read_json(path) if path.exists() else {}
        settings = theirs.get('nanomolmo2')
        if settings is None:
            image = folder / 'preprocessor_config.json'
            image = read_json(image) if image.exists() else theirs.get('image_processor', {})
            size = image.get('crop_size' if image.get('do_center_crop', True) else 'size', config.vision.image_size)
            size = size.get('height', size.get('shortest_edge')) if isinstance(size, dict) else size
            settings = dict(image_size=size, patch_size=config.vision.patch_size, pooling=config.pooling,
                            resize='crop' if image.get('do_center_crop', True) else 'stretch',
                            image_token=theirs.get('image_token', '<|image_pad|>'))
        return cls(folder, **{**settings, **overrides})


def load_checkpoint(path, **settings):
    """(model, processor) of a checkpoint folder, or of the one that a run's `latest` names."""
    folder = Path(path)
    if (latest := folder / 'latest').is_file():
        folder = folder / latest.read_text().strip()
    model = load_model(folder)
    return model, Processor.load(folder, model.config, **settings), folder


def _pixel_stats(folder):
    from model import PIXEL_STATS, from_hf
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

def collate(examples, processor, length=0, left=False, packed=False):
    """Examples -> a batch for the model: a row each, padded to `length` or the longest (on the left for generation),
    or, `packed`, one after the other in a single row without padding, as documents 0, 1, .."""
    sizes = [len(e.tokens) for e in examples]
    need = sum(sizes) if packed else max(sizes)
    B, L = 1 if packed else len(examples), length or -(-need // 8) * 8     # of eight, as vector units like
    tokens = np.full((B, L), processor.pad)
    targets, weights = np.full((B, L), processor.pad), np.zeros((B, L), np.float32)
    positions, tasks, branches = (np.zeros((B, L), np.int64) for _ in range(3))
    documents = np.full((B, L), -1)
    patches, pool, visual, offset = [], [], [], 0
    for i, (e, n) in enumerate(zip(examples, sizes)):
        b, start = (0, sum(sizes[:i])) if packed else (i, L - n if left else 0)
        row = slice(start, start + n)
        tokens[b, row], positions[b, row], branches[b, row] = e.tokens, e.positions, e.branches
        documents[b, row] = i if packed else 0
        # Position i predicts token i + 1. The first token of a branch has no weight, so no loss crosses branches.
        before = slice(start, start + n - 1)
        targets[b, before], weights[b, before], tasks[b, before] = e.tokens[1:], e.weights[1:], e.tasks[1:]
        if e.patches is not None:
            patches.append(e.patches)
            pool.append(np.where(e.pool_index < 0, -1, e.pool_index + offset))
            visual.append(e.visual_index + b * L + start)
            offset += e.patches.shape[0] * e.patches.shape[1]
    loss_index = np.flatnonzero(weights)
    batch = {'tokens': tokens, 'targets': targets, 'loss_weights': weights, 'position_ids': positions,
             'document_ids': documents, 'branch_ids': branches, 'loss_index': loss_index,
             'loss_tasks': tasks.flatten()[loss_index]}
    if patches:
        batch.update(patches=np.concatenate(patches), pool_index=np.concatenate(pool),
                     visual_index=np.concatenate(visual))
    batch = {k: torch.from_numpy(v) for k, v in batch.items()}
    # Plain causal attention is the mask where rows hold one document with at most one branch, and no padding in front
    batch['causal'] = int(branches.max()) <= 1 and not (packed or left and (documents < 0).any())
    # Counted here, on the CPU, so that the training loop need not ask the device: tokens, pairs that see each other (a
    # token at position p sees p + 1), the sum of the loss weights
    batch.update(grid=processor.grid, n_tokens=int((documents >= 0).sum()), total_weight=float(weights.sum()),
                 n_pairs=int((positions + 1)[documents >= 0].sum()))
    return batch


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


class Mixture:
    """Fixed rates over datasets. Draw k is a pure function of (seed, k): which dataset, by its rate, and which row:
    the dataset's next one in a permutation that is fresh every epoch."""
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

    def draws(self, start=0):
        """Yields (k, dataset index, row) from draw `start` on. Counting what came before costs 10 ns a draw."""
        counts = np.zeros(len(self.datasets), np.int64)
        for b in range(start // self.BLOCK):
            counts += np.bincount(self._block(b), minlength=len(counts))
        k = start // self.BLOCK * self.BLOCK
        while True:
            for d in self._block(k // self.BLOCK).tolist():
                if k >= start:
                    epoch, i = divmod(int(counts[d]), len(self.datasets[d]))
                    yield k, d, permute(i, len(self.datasets[d]), f'{self.seed}/{d}/{epoch}')
                counts[d] += 1
                k += 1


class _Rows(torch.utils.data.Dataset):
    """What a worker does: (draw, dataset, row) -> (draw, Example or what was wrong with the row)."""

    def __init__(self, mixture, processor):
        self.mixture, self.processor = mixture, processor

    def __getitem__(self, draw):
        k, d, row = draw
        dataset = self.mixture.datasets[d]
        try:
            return draw, self.processor.example(dataset[row], dataset.folder)
        except BadRow as e:
            return draw, {'row': dataset.where(row), 'reason': e.reason, 'problem': str(e), 'dataset': dataset.name}


def _quiet_worker(_):
    """Ctrl-C is the parent's to answer, and its SIGTERM handler is not ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loader:
    """Endless batches, in the order of the draws whatever the number of workers; its state is one number.

    state: {'draw': the next draw, 'seen': rows read, 'skipped': {'dataset: reason': count}}.
    """

    def __init__(self, mixture, processor, batch_size, num_workers=0, state=None, length=0, max_bad_fraction=.1,
                 report=None, packed=False):
        self.batch_size, self.length, self.packed = batch_size, length, packed
        self.max_bad_fraction, self.report = max_bad_fraction, report
        self.rows = _Rows(mixture, processor)
        self.state = {'draw': 0, 'seen': 0, 'skipped': {}, **(state or {})}
        self.state['skipped'] = dict(self.state['skipped'])
        self.num_workers = num_workers

    def __iter__(self):
        """Yields (batch, the state that continues after it)."""
        rows = torch.utils.data.DataLoader(
            self.rows, sampler=self.rows.mixture.draws(self.state['draw']), batch_size=None,
            num_workers=self.num_workers, worker_init_fn=_quiet_worker, prefetch_factor=4 * self.batch_size if self.num_workers else None,
            multiprocessing_context='fork' if self.num_workers and sys.platform == 'linux' else None)
        examples, rows_of = [], []
        for (k, d, row), example in rows:
            self.state['seen'] += 1
            if isinstance(example, dict):
                self._skip(example)
                continue
            examples.append(example)
            rows_of.append((self.rows.mixture.datasets[d].name, row))
            if len(examples) == self.batch_size:
                self.state['draw'] = k + 1
                batch = collate(examples, self.rows.processor, self.length, packed=self.packed)
                batch['rows'], examples, rows_of = rows_of, [], []
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


# ---------------------------------------------------------------------------------------------------------------------
# The inspector: what the model gets, for a person to look at

STYLE = """<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.t{border-radius:3px;padding:1px 0;border-right:1px solid #0002} .v{background:#cfe3ff} .s{color:#888}
img{max-width:24em;image-rendering:auto;border:1px solid #ccc;vertical-align:top} h2{font-size:1em;margin-top:2em}
pre,.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;margin:.4em 0}
table{border-collapse:collapse} td,th{padding:2px 10px;text-align:right} td:first-child,th:first-child{text-align:left}
</style>"""


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def enlarge(image, side=384):
    """A small picture by a whole factor, for people to look at: its longer side comes near `side` pixels."""
    scale = max(1, side // max(image.size))
    return image.resize((image.width * scale, image.height * scale))


def draw_points(image, points, colour='magenta'):
    """A copy of an RGB picture with numbered dots, large enough to be seen at this picture's size."""
    image = image.copy()
    draw, r = ImageDraw.Draw(image), max(3, max(image.size) // 90)
    for n, point in enumerate(points, 1):
        x, y = point['x'] * image.width, point['y'] * image.height
        draw.ellipse((x - r, y - r, x + r, y + r), outline='white', fill=colour, width=max(1, r // 4))
        # beside the dot, on the side that has room
        anchor = 'lm' if x < image.width * .9 else 'rm'
        draw.text((x + (1.5 if anchor == 'lm' else -1.5) * r, y), str(point.get('id', n)), fill=colour, anchor=anchor,
                  font_size=max(10, 3 * r), stroke_width=max(1, r // 3), stroke_fill='white')
    return image


def as_model_sees(patches, processor, points=(), scale=1):
    """Patches of one crop [num_patches, patch_dim] put back together, with points drawn: shape and order show at once."""
    g, p = processor.grid[0], processor.patch_size
    pixels = patches.reshape(g, g, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(g * p, g * p, 3)
    return draw_points(Image.fromarray(pixels).resize((g * p * scale,) * 2, Image.Resampling.NEAREST), points)


def tokens_html(example, processor):
    """Every token as a coloured box: green by loss weight, blue and counted for visual tokens, a line per branch."""
    top = max(example.weights) or 1
    lines, visual, branch = [''], 0, 0
    for token, weight, b in zip([*example.tokens, None], [*example.weights, 0], [*example.branches, 0]):
        if token == processor.image_pad:
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


def inspect(settings, number=12):
    """Prints counts and a few examples of a config's mixture; writes <out_dir>/inspect.html."""
    from tqdm import tqdm
    from model import make_config
    vision = make_config(settings['vision'], settings['language'], recipe=settings['recipe']).vision
    folder = settings['tokenizer'] or settings['init_from'] or settings['language_weights']
    names = ('image_size', 'pooling', 'seq_len', 'point_format', 'point_digits', 'task_weights', 'length_weighting')
    processor = Processor(folder, patch_size=vision.patch_size, **{k: settings[k] for k in names})
    if not settings['mixture']:
        raise UserError("mixture is empty; give a config: python data.py config/demo_stage1.py")
    datasets = [Dataset(Path(settings['data_dir']) / name) for name in settings['mixture']]
    mixture = Mixture(datasets, list(settings['mixture'].values()), settings['seed'])
    rows, tokens, weights, skipped, lengths = Counter(), Counter(), Counter(), Counter(), []
    page = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(settings['out_dir'])}</title>{STYLE}",
            '<p>Blue: visual tokens. Green: tokens with a loss, darker with its weight. One line a conversation: each '
            'sees the first line and itself. Hover for ids and weights.</p>']
    for k, d, row in tqdm(mixture.draws(), total=200, unit='row', disable=None):
        if k == 200:
            break
        dataset = datasets[d]
        try:
            record = dataset[row]
            example = processor.example(record, dataset.folder)
        except BadRow as e:
            skipped[f'{dataset.name}: {e.reason}'] += 1
            tqdm.write(f'skipped {dataset.where(row)}: {e}')
            continue
        rows[dataset.name] += 1
        lengths.append(len(example.tokens))
        for task, weight in zip(example.tasks, example.weights):
            if weight:
                tokens[TASKS[task]] += 1
                weights[TASKS[task]] += weight
        if len(lengths) > number:
            continue
        page.append(f'<h2>draw {k}: {html.escape(dataset.where(row))}, {len(example.tokens)} tokens, '
                    f'{len(record["conversations"])} conversations</h2>')
        points = [p for c in record['conversations'] for m in c['messages'] for p in (m.get('points') or {}).get('points', ())]
        for i in range(len(example.patches) if example.patches is not None else 0):
            here = [p for p in points if p.get('image', 0) == i]
            crop = as_model_sees(example.patches[i], processor, here, max(1, 256 // processor.image_size))
            page.append(f'<img src="{data_url(crop)}">')
        page.append(tokens_html(example, processor))
        if len(lengths) <= 3:
            print(f"\ndraw {k}: {dataset.where(row)}, {len(example.tokens)} tokens\n"
                  + processor.tokenizer.decode([t for t in example.tokens if t != processor.image_pad],
                                               skip_special_tokens=False))
    table = [f"{'dataset':<16}{'rows':>12}{'rate':>8}{'drawn':>8}"]
    table += [f'{d.name:<16}{len(d):>12,}{rate:>8.3f}{rows[d.name]:>8}' for d, rate in zip(datasets, mixture.rates)]
    table += ['', f"{'task':<16}{'loss tokens':>12}{'share of loss weight':>22}"]
    table += [f'{t:<16}{n:>12,}{weights[t] / sum(weights.values()):>22.1%}' for t, n in tokens.most_common()]
    if lengths:
        table += ['', f'tokens a row: mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}, '
                      f'most {max(lengths)} of seq_len {processor.seq_len}']
    table += [f'skipped {reason}: {n}' for reason, n in skipped.items()]
    print('\n' + '\n'.join(table))
    out = Path(settings['out_dir'])
    out.mkdir(parents=True, exist_ok=True)
    page.insert(2, '<pre>' + html.escape('\n'.join(table)) + '</pre>')
    (out / 'inspect.html').write_text('\n'.join(page), encoding='utf-8')
    print(f'\nwrote {out}/inspect.html')


if __name__ == '__main__':
    from configurator import configure, train_settings
    try:
        inspect(configure(train_settings()))
    except UserError as e:
        sys.exit(f'error: {e}')
