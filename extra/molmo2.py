"""The processor of released Molmo2 checkpoints, as their own (transformers, models/molmo2;
allenai/molmo2, preprocessing).

It differs from data.Processor in what a picture becomes:

    the whole picture, squeezed into one crop                                     <low_res_im_start> ... <im_end>
    and, at a higher resolution, up to max_crops crops that overlap               <im_start> ... <im_end>

with a column token at the end of each row of visual tokens. Neighbouring crops share 2 x margin
patches, and of each crop the model pools those that a neighbour does not show better:

    crop 1   [ own   own   own | margin ]
    crop 2             [ margin | own   own   own ]          where the bars are, the pooled picture goes from 1 to 2

A video's frame is one crop, pooled 3 x 3. The first token of all is <|im_end|>. Names of settings
in processor_config.json and its neighbours are those of transformers.
"""
from pathlib import Path

import numpy as np

from configurator import UserError
from data import Example, Processor, pooling_windows
from media import BadRow
from model import read_json

# The tokens that visual tokens are made of, in the order of Config.visual_token_ids
VISUAL_TOKENS = ('<im_start>', '<im_end>', '<im_patch>', '<im_col>', '<low_res_im_start>', '<im_low>', '<frame_start>',
                 '<frame_end>')


def bilinear(image, height, width):
    """An RGB picture resized to uint8 [height, width, 3]: each pixel from its four nearest, as
    torch's interpolate does without antialiasing, because Molmo2 was trained with that."""
    pixels = np.asarray(image)
    top, bottom, down = _nearest_two(len(pixels), height)
    left, right, across = _nearest_two(pixels.shape[1], width)
    down = down[:, None, None]
    across = across[None, :, None]
    upper = pixels[top[:, None], left] * (1 - across) + pixels[top[:, None], right] * across
    lower = pixels[bottom[:, None], left] * (1 - across) + pixels[bottom[:, None], right] * across
    resized = upper * (1 - down) + lower * down
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _nearest_two(n, size):
    """For each of `size` pixels the two nearest of n old ones, (first, second), and the weight of
    the second."""
    place = (np.arange(size, dtype=np.float32) + .5) * np.float32(n / size) - .5
    place = np.maximum(place, 0)
    first = np.minimum(place.astype(np.int64), n - 1)
    second = np.minimum(first + 1, n - 1)
    return first, second, place - first


def read_settings(folder, part, file):
    """One part of the processor's settings: from processor_config.json, and from its own file,
    which older versions of transformers write."""
    settings = dict(read_json(folder / 'processor_config.json').get(part, {}))
    if (folder / file).exists():
        settings.update(read_json(folder / file))
    return settings


class Molmo2Processor(Processor):
    """Records -> Examples for a released checkpoint; `folder` holds its files."""
    point_format = 'molmo2'
    resize = 'whole'               # frames of videos come as they are and are resized here
    image_token = '<im_patch>'
    FILES = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
             'processor_config.json', 'preprocessor_config.json', 'video_preprocessor_config.json',
             'chat_template.jinja', 'chat_template.json', 'generation_config.json')

    def __init__(self, folder, **settings):
        folder = Path(folder)
        theirs = read_json(folder / 'processor_config.json')
        image = read_settings(folder, 'image_processor', 'preprocessor_config.json')
        video = read_settings(folder, 'video_processor', 'video_preprocessor_config.json')
        self.max_crops = image.get('max_crops', 8)
        margins = image.get('overlap_margins', [4, 4])
        pooling = image.get('pooling_size', [2, 2])
        frame_pooling = video.get('pooling_size', [3, 3])
        for pair in (margins, pooling, frame_pooling):
            if len(set(pair)) > 1:
                raise UserError(f'{folder} has margins {margins} and windows {pooling}, {frame_pooling}: only equal ones '
                                'are known here')
        self.margin = margins[0]      # patches on each side of a crop that a neighbour shows better
        self._read_column_settings(theirs)
        settings = {'max_frames': video.get('num_frames', self.max_frames), 'fps': video.get('max_fps', self.fps),
                    **settings}
        # The other settings of a config (sizes, pooling, syntax of points) are the checkpoint's own
        ours = ('seq_len', 'max_frames', 'fps', 'task_weights', 'length_weighting', 'branch_weighting')
        settings = {name: value for name, value in settings.items() if name in ours}
        super().__init__(folder, image.get('size', {}).get('height', 378), image.get('patch_size', 14), pooling[0],
                         video_pooling=frame_pooling[0], **settings)
        self.video_pad = self.image_pad
        # The released template puts a space in front of an answer that was given before
        self.separator_before_past_answer = self.encode('\n ')
        self._find_visual_tokens(theirs, folder)
        longest_time = len(self.encode(' 9999.9 '))
        visual_tokens = len(self.frame_window) + self._columns(len(self.frame_window), self.has_frame_columns)
        self.frame_tokens = longest_time + 2 + visual_tokens     # with start and end
        for name in self.FILES:
            if (folder / name).is_file():
                self.tokenizer_files[name] = (folder / name).read_bytes()

    def _read_column_settings(self, theirs):
        """Whether rows of visual tokens end with a column token: in the whole picture, in crops, in
        frames."""
        self.has_crop_columns = theirs.get('image_use_col_tokens', True)
        self.has_whole_columns = theirs.get('use_single_crop_col_tokens')
        if self.has_whole_columns is None:
            self.has_whole_columns = self.has_crop_columns
        self.has_frame_columns = theirs.get('video_use_col_tokens', False)

    def _find_visual_tokens(self, theirs, folder):
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
        return {'image_token_id': self.image_pad, 'video_token_id': self.image_pad, 'eos_token_id': self.im_end,
                'pad_token_id': self.pad, 'visual_token_ids': self.visual_ids}

    def _columns(self, visual_tokens, has_columns):
        """The number of column tokens of a square of visual tokens."""
        return round(visual_tokens ** .5) if has_columns else 0

    # -- crops

    def tiling(self, height, width):
        """(rows, columns) of crops for a picture of so many pixels.

        Every number of rows and columns with at most max_crops crops enlarges or shrinks the
        picture by some scale. Of those that need not shrink it the one that enlarges least is
        taken, else the one that shrinks least; of equals the first, by number of crops and then of
        rows.
        """
        margins = 2 * self.margin * self.patch_size
        step = self.image_size - margins     # pixels that one more crop adds
        candidates = []
        for rows in range(1, self.max_crops + 1):
            for columns in range(1, self.max_crops // rows + 1):
                candidates.append((rows, columns))
        candidates.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
        sides = np.array([height - margins, width - margins], np.float32)
        with np.errstate(divide='ignore'):
            scale = (np.array(candidates, np.float32) * step / sides).min(1)
        if (scale < 1).all():
            return candidates[int(scale.argmax())]
        enlarging = np.where(scale < 1, np.float32(1e10), scale)
        return candidates[int(enlarging.argmin())]

    def crops(self, image):
        """A picture -> (patches [1 + crops, num_patches, patch_dim] of the whole and of its crops;
        a grid of patch numbers, counted through all of these, that make up the picture once,
        without what crops share)."""
        rows, columns = self.tiling(image.height, image.width)
        size, side = self.image_size, self.grid[0]
        step = size - 2 * self.margin * self.patch_size
        overlap = 2 * self.margin * self.patch_size
        canvas = bilinear(image, rows * step + overlap, columns * step + overlap)
        cut = [bilinear(image, size, size)]
        for r in range(rows):
            for c in range(columns):
                cut.append(canvas[r * step:r * step + size, c * step:c * step + size])
        # Patch numbers [rows, columns, side, side]; those of the whole picture come first
        index = side * side + np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
        strips = []
        for r in range(rows):
            own_rows = self._own(r, rows)
            own = [index[r, c, own_rows, self._own(c, columns)] for c in range(columns)]
            strips.append(np.concatenate(own, 1))
        grid = np.concatenate(strips, 0)
        return np.stack([self.to_patches(x) for x in cut]), grid

    def _own(self, i, n):
        """Which patches along a side belong to crop i of n: all but the margins where it has a
        neighbour."""
        side = self.grid[0]
        start = self.margin if i > 0 else 0
        end = side - self.margin if i < n - 1 else side
        return slice(start, end)

    # -- the prefix

    def build_prefix(self, images=(), clip=((), ()), subtitles=()):
        prefix = PrefixBuilder(self, self.video_pooling if len(clip[0]) else self.pooling)
        e = prefix.example
        if len(clip[0]):
            window = square(self.frame_window)
            for i, (seconds, image) in enumerate(zip(*clip)):
                e.tokens += self.encode(f'{" " if i else ""}{seconds:.1f} ')
                patches = self.to_patches(bilinear(image, self.image_size, self.image_size))[None]
                prefix.add(window, self.frame_start, self.frame_end, self.has_frame_columns)
                prefix.patches.append(patches)
            e.times = tuple(clip[0])
        else:
            for i, image in enumerate(images):
                if len(images) > 1:
                    e.tokens += self.encode(f'Image {i + 1}')
                patches, grid = self.crops(image)
                prefix.add(square(self.window), self.whole_start, self.crop_end, self.has_whole_columns)
                prefix.add(self._windows_of(grid), self.crop_start, self.crop_end, self.has_crop_columns)
                prefix.patches.append(patches)
        if subtitles:
            lines = [f"{cue['start']:.1f} - {cue['end']:.1f} {cue['text']}\n" for cue in subtitles]
            e.tokens += self.encode('subtitle\n' + ''.join(lines))
        return self.complete_prefix(prefix.finish())

    def _windows_of(self, grid):
        """[rows, columns, k x k]: the patches of each visual token of a picture made of crops."""
        window = pooling_windows(grid.shape, self.pooling)
        window = np.where(window < 0, -1, grid.flatten()[window])
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
    """Collects the crops of a prefix: tokens in the Example, patches and indices beside it."""

    def __init__(self, processor, pooling):
        self.processor = processor
        self.window_size = pooling ** 2
        self.example = Example(tokens=[processor.im_end])
        self.patches = []                 # [crops, num_patches, patch_dim] of each picture or frame
        self.pool_index = []
        self.visual_index = []

    def add(self, window, start, end, has_columns):
        """Adds a visual token for each window [rows, columns, k x k] of patches, which are counted
        from the crops that will be appended to `patches` next."""
        processor, tokens = self.processor, self.example.tokens
        tokens.append(start)
        for row in window:
            self.visual_index += range(len(tokens), len(tokens) + len(row))
            tokens += [processor.image_pad] * len(row)
            if has_columns:
                tokens.append(processor.column)
        tokens.append(end)
        crops_before = sum(len(patches) for patches in self.patches)
        offset = crops_before * processor.grid[0] * processor.grid[1]
        index = np.where(window < 0, -1, window + offset).reshape(-1, window.shape[-1])
        missing = self.window_size - index.shape[1]
        self.pool_index.append(np.pad(index, ((0, 0), (0, missing)), constant_values=-1))

    def finish(self):
        e = self.example
        if self.patches:
            e.patches = np.concatenate(self.patches)
            e.pool_index = np.concatenate(self.pool_index)
            e.visual_index = np.array(self.visual_index, np.int64)
            e.grid = self.processor.grid
        return e
