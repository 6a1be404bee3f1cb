"""The processor of released Molmo2 checkpoints: crops, columns, frames.
"""
from pathlib import Path

import numpy as np

from configurator import UserError
from data import Example, Processor, windows
from media import BadRow
from model import read_json


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
