"""The processor of released Molmo2 checkpoints. It gives the same tokens and pixels as their own
(transformers, models/molmo2; allenai/molmo2, preprocessing), which tests/molmo2.py checks.

It differs from data.Processor in what a picture becomes:

    the whole picture, squeezed into one crop                     <low_res_im_start> ... <im_end>
    and, enlarged or shrunk, up to max_crops crops that overlap   <im_start> ... <im_end>

with a column token at the end of each row of visual tokens. Two neighbouring crops share a strip of
2 x margin patches. Each patch of the strip is pooled from the crop whose border is further away,
because at a border the tower knows less of what is around a patch:

    crop 1   [ own    own    own | margin ]
    crop 2              [ margin | own    own    own ]    (the bars are at the same place)

A frame of a video is one crop, pooled 3 x 3. The first token of all is <|im_end|>. The names of
settings in processor_config.json and the files beside it are those of transformers.
"""
from pathlib import Path

import numpy as np

from configurator import UserError
from data import Example, Processor, pooling_windows
from media import BadRow
from model import read_json

# The tokens of pictures and frames, in the order of Config.visual_token_ids
VISUAL_TOKENS = (
    '<im_start>', '<im_end>', '<im_patch>', '<im_col>',
    '<low_res_im_start>', '<im_low>', '<frame_start>', '<frame_end>',
)


def bilinear(image, height, width):
    """An RGB picture resized to uint8 [height, width, 3]. Each pixel is a mean of the four nearest
    old ones, without antialiasing, as torch.nn.functional.interpolate computes it, because Molmo2
    was trained with that."""
    pixels = np.asarray(image)                                   # [old height, old width, 3]
    top, bottom, down = _nearest_two(len(pixels), height)        # [height] each
    left, right, across = _nearest_two(pixels.shape[1], width)   # [width] each
    top = top[:, None]
    bottom = bottom[:, None]
    down = down[:, None, None]
    across = across[None, :, None]
    upper = pixels[top, left] * (1 - across) + pixels[top, right] * across
    lower = pixels[bottom, left] * (1 - across) + pixels[bottom, right] * across
    resized = upper * (1 - down) + lower * down                  # [height, width, 3]
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _nearest_two(n, size):
    """For each of `size` new pixels along a side: the two nearest of the n old ones, (first [size],
    second [size], weight of the second [size])."""
    # In float32, as torch computes it. The middle of new pixel i is at (i + .5) * n / size.
    place = (np.arange(size, dtype=np.float32) + .5) * np.float32(n / size) - .5
    place = np.maximum(place, 0)
    first = np.minimum(place.astype(np.int64), n - 1)
    second = np.minimum(first + 1, n - 1)
    return first, second, place - first


def read_settings(theirs, folder, part, file):
    """One part of the processor's settings, a dict: from `theirs`, which is processor_config.json,
    and from a file of its own, which older versions of transformers write."""
    settings = dict(theirs.get(part, {}))
    if (folder / file).exists():
        settings.update(read_json(folder / file))
    return settings


class Molmo2Processor(Processor):
    """Records -> Examples for a released checkpoint, whose files are in `folder`. settings: those
    of data.Processor; what the checkpoint itself decides (sizes, pooling, syntax of points) is
    ignored there."""
    point_format = 'molmo2'
    resize = 'whole'               # frames of videos come as they are and are resized here
    image_token = '<im_patch>'
    # What a checkpoint holds beside its weights, to be written again with a trained one
    FILES = (
        'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
        'vocab.json', 'merges.txt',
        'processor_config.json', 'preprocessor_config.json', 'video_preprocessor_config.json',
        'chat_template.jinja', 'chat_template.json',
        'generation_config.json',
    )

    def __init__(self, folder, **settings):
        folder = Path(folder)
        theirs = read_json(folder / 'processor_config.json')
        image = read_settings(theirs, folder, 'image_processor', 'preprocessor_config.json')
        video = read_settings(theirs, folder, 'video_processor', 'video_preprocessor_config.json')
        self.max_crops = image.get('max_crops', 8)
        # Each for rows and for columns
        margins = image.get('overlap_margins', [4, 4])
        pooling = image.get('pooling_size', [2, 2])
        frame_pooling = video.get('pooling_size', [3, 3])
        for pair in (margins, pooling, frame_pooling):
            if len(set(pair)) > 1:
                raise UserError(f'{folder} has margins {margins} and windows {pooling}, '
                                f'{frame_pooling}: only equal ones are known here')
        self.margin = margins[0]      # patches on each side of a crop that a neighbour shows better
        self._read_column_settings(theirs)
        settings.setdefault('max_frames', video.get('num_frames', self.max_frames))
        settings.setdefault('fps', video.get('max_fps', self.fps))
        ours = (
            'seq_len', 'max_frames', 'fps',
            'task_weights', 'length_weighting', 'branch_weighting',
        )
        settings = {name: value for name, value in settings.items() if name in ours}
        super().__init__(
            folder,
            image.get('size', {}).get('height', 378),
            image.get('patch_size', 14),
            pooling[0],
            video_pooling=frame_pooling[0],
            **settings,
        )
        self.video_pad = self.image_pad
        # The released template puts a space in front of an answer that was given before
        self.separator_before_past_answer = self.encode('\n ')
        self._find_visual_tokens(theirs, folder)
        # The tokens that a frame takes at most
        longest_time = len(self.encode(' 9999.9 '))
        visual_tokens = len(self.frame_window)
        columns = self._columns(visual_tokens, self.has_frame_columns)
        self.frame_tokens = longest_time + 2 + visual_tokens + columns       # 2: start and end
        for name in self.FILES:
            path = folder / name
            if path.is_file():
                self.tokenizer_files[name] = path.read_bytes()

    def _read_column_settings(self, theirs):
        """Reads whether rows of visual tokens end with a column token: in crops, in the whole
        picture, in frames."""
        self.has_crop_columns = theirs.get('image_use_col_tokens', True)
        self.has_whole_columns = theirs.get('use_single_crop_col_tokens')
        if self.has_whole_columns is None:
            self.has_whole_columns = self.has_crop_columns
        self.has_frame_columns = theirs.get('video_use_col_tokens', False)

    def _find_visual_tokens(self, theirs, folder):
        """Looks up the ids of VISUAL_TOKENS, and which of them this checkpoint uses where."""
        ids = {name: self.tokenizer.token_to_id(name) for name in VISUAL_TOKENS}
        for name, id in ids.items():
            if id is None:
                raise UserError(f"the tokenizer in {folder} lacks {name}")
        self.visual_ids = tuple(ids.values())
        self.crop_start = ids['<im_start>']
        self.crop_end = ids['<im_end>']
        self.column = ids['<im_col>']
        self.whole_start = ids['<low_res_im_start>']
        if not theirs.get('use_single_crop_start_token', True):
            self.whole_start = self.crop_start
        self.frame_start = ids['<frame_start>']
        self.frame_end = ids['<frame_end>']
        if not theirs.get('use_frame_special_tokens', True):
            self.frame_start = self.crop_start
            self.frame_end = self.crop_end

    def token_ids(self):
        return {
            'image_token_id': self.image_pad,
            'video_token_id': self.image_pad,
            'eos_token_id': self.im_end,
            'pad_token_id': self.pad,
            'visual_token_ids': self.visual_ids,
        }

    def _columns(self, visual_tokens, has_columns):
        """The number of column tokens of a square of visual tokens."""
        return round(visual_tokens ** .5) if has_columns else 0

    # -- crops

    def tiling(self, height, width):
        """(rows, columns) of crops for a picture of height x width pixels.

        To fill a tiling, the picture is enlarged or shrunk. Of the tilings with at most max_crops
        crops that need not shrink it, the one is taken that enlarges it least; where all of them
        shrink it, the one that shrinks it least. Among equals fewer crops, then fewer rows win.
        """
        margins = 2 * self.margin * self.patch_size      # pixels of both margins of a crop
        step = self.image_size - margins     # pixels that one more crop adds
        candidates = []
        for rows in range(1, self.max_crops + 1):
            for columns in range(1, self.max_crops // rows + 1):
                candidates.append((rows, columns))
        # argmax and argmin below take the first among equals
        candidates.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
        sides = np.array([height - margins, width - margins], np.float32)
        # A picture may be no larger than the margins; the scale is infinite or negative then
        with np.errstate(divide='ignore'):
            scales = np.array(candidates, np.float32) * step / sides         # [tilings, 2]
        scale = scales.min(1)                # the side that fits worse decides
        if (scale < 1).all():
            best = scale.argmax()
        else:
            enlarging = np.where(scale < 1, np.float32(1e10), scale)
            best = enlarging.argmin()
        return candidates[int(best)]

    def crops(self, image):
        """A picture as crops: (patches [1 + crops, num_patches, patch_dim], grid [height, width]).

        Crop 0 is the whole picture. The grid shows the picture once more, put together from the
        other crops without what they share: each place holds the number of a patch, counted through
        the patches of all crops, those of crop 0 first.
        """
        rows, columns = self.tiling(image.height, image.width)
        size = self.image_size               # pixels a side of a crop
        overlap = 2 * self.margin * self.patch_size
        step = size - overlap                # pixels from a crop to the next one
        canvas = bilinear(image, rows * step + overlap, columns * step + overlap)
        cut = [bilinear(image, size, size)]
        for r in range(rows):
            for c in range(columns):
                y = r * step
                x = c * step
                cut.append(canvas[y:y + size, x:x + size])
        patches = np.stack([self.to_patches(crop) for crop in cut])

        side = self.grid[0]                  # patches a side of a crop
        in_a_crop = side * side
        index = in_a_crop + np.arange(rows * columns * in_a_crop)
        index = index.reshape(rows, columns, side, side)
        strips = []                          # of the grid, one for each row of crops
        for r in range(rows):
            own_rows = self._own(r, rows)
            strip = []
            for c in range(columns):
                own_columns = self._own(c, columns)
                strip.append(index[r, c, own_rows, own_columns])
            strips.append(np.concatenate(strip, 1))
        return patches, np.concatenate(strips, 0)

    def _own(self, i, n):
        """The patches along a side that the picture takes from crop i of n, a slice: all but the
        margin on each side that has a neighbour."""
        side = self.grid[0]
        start = self.margin if i > 0 else 0
        end = side - self.margin if i < n - 1 else side
        return slice(start, end)

    # -- the prefix

    def build_prefix(self, images=(), clip=((), ()), subtitles=()):
        """The prefix of an Example, as that of data.Processor."""
        times, frames = clip
        is_video = len(times) > 0
        prefix = PrefixBuilder(self, self.video_pooling if is_video else self.pooling)
        if is_video:
            self._add_frames(prefix, times, frames)
        else:
            self._add_pictures(prefix, images)
        e = prefix.finish()
        if subtitles:
            lines = [f"{cue['start']:.1f} - {cue['end']:.1f} {cue['text']}\n" for cue in subtitles]
            e.tokens += self.encode('subtitle\n' + ''.join(lines))
        return self.complete_prefix(e)

    def _add_frames(self, prefix, times, frames):
        # A frame is squeezed into one crop
        size = self.image_size
        window = square(self.frame_window)
        for i, (seconds, frame) in enumerate(zip(times, frames)):
            space = ' ' if i else ''         # in front of all times but the first
            prefix.example.tokens += self.encode(f'{space}{seconds:.1f} ')
            prefix.add(window, self.frame_start, self.frame_end, self.has_frame_columns)
            patches = self.to_patches(bilinear(frame, size, size))
            prefix.patches.append(patches[None])         # [1, num_patches, patch_dim]
        prefix.example.times = tuple(times)

    def _add_pictures(self, prefix, images):
        whole_window = square(self.window)
        for i, image in enumerate(images):
            if len(images) > 1:
                prefix.example.tokens += self.encode(f'Image {i + 1}')
            patches, grid = self.crops(image)
            # First the whole picture, whose patches come first, then the one made of crops
            crop_window = self._windows_of(grid)
            prefix.add(whole_window, self.whole_start, self.crop_end, self.has_whole_columns)
            prefix.add(crop_window, self.crop_start, self.crop_end, self.has_crop_columns)
            prefix.patches.append(patches)

    def _windows_of(self, grid):
        """[rows, columns, k x k]: the patches of each visual token of a picture made of crops.
        grid: as `crops` returns it."""
        window = pooling_windows(grid.shape, self.pooling)               # places in the grid
        window = np.where(window < 0, -1, grid.flatten()[window])        # numbers of patches
        rows = -(-grid.shape[0] // self.pooling)    # rounded up: windows at the border are not full
        return window.reshape(rows, -1, self.pooling ** 2)

    def tokenize_dialogue(self, conversation, times=None, past=False):
        if conversation['messages'][0]['role'] == 'system':
            raise BadRow('system message', 'a released Molmo2 knows no system message')
        return super().tokenize_dialogue(conversation, times, past)

    def save(self, folder):
        for name, content in self.tokenizer_files.items():
            (Path(folder) / name).write_bytes(content)


def square(window):
    """[visual tokens, k x k] of a square crop -> [rows, columns, k x k]."""
    side = round(len(window) ** .5)
    return window.reshape(side, side, -1)


class PrefixBuilder:
    """Collects the prefix of an Example: tokens in `example`, and patches and indices in lists,
    which `finish` joins. For each picture or frame, `add` is called for its visual tokens, and then
    its patches are appended to `patches`."""

    def __init__(self, processor, pooling):
        """pooling: patches a side of the largest window that will be added."""
        self.processor = processor
        self.window_size = pooling ** 2
        self.example = Example(tokens=[processor.im_end])
        self.patches = []                 # [crops, num_patches, patch_dim] of each picture or frame
        self.pool_index = []              # [visual tokens, window_size] of each
        self.visual_index = []            # places of all visual tokens in the tokens

    def add(self, window, start, end, has_columns):
        """Adds a visual token for each window of patches, between the tokens `start` and `end`.

        window [rows, columns, k x k]: numbers of patches, counted from the first crop of the
        picture, whose patches are appended to `self.patches` after this call.
        """
        processor = self.processor
        tokens = self.example.tokens
        tokens.append(start)
        for row in window:
            place = len(tokens)
            self.visual_index += range(place, place + len(row))
            tokens += [processor.image_pad] * len(row)
            if has_columns:
                tokens.append(processor.column)
        tokens.append(end)
        # pool_index counts the patches of all crops of the Example
        crops_before = sum(len(patches) for patches in self.patches)
        rows, columns = processor.grid
        patches_before = crops_before * rows * columns
        index = np.where(window < 0, -1, window + patches_before)
        index = index.reshape(-1, window.shape[-1])      # [visual tokens, k x k]
        missing = self.window_size - index.shape[1]
        index = np.pad(index, ((0, 0), (0, missing)), constant_values=-1)
        self.pool_index.append(index)

    def finish(self):
        """The Example, with its patches and indices."""
        e = self.example
        if self.patches:
            e.patches = np.concatenate(self.patches)
            e.pool_index = np.concatenate(self.pool_index)
            e.visual_index = np.array(self.visual_index, np.int64)
            e.grid = self.processor.grid
        return e
