"""A vision tower that already sees the drawn world, trained in a minute or two.

    python prepare/tower.py config/demo.py           writes the folder that its vision_weights names

A vision-language model is seldom trained from nothing: its tower comes from CLIP or SigLIP and knows
pictures already. Here the tower learns from drawn pictures what CLIP learns from the web's. For each
patch it answers which colour and kind the shape on it has, and for each visual token (a window of
pooled patches) which shape has its centre there, of what size, and where exactly:

    patches [pictures, 64, 192] ─ VisionTransformer ─ features [.., 64, width] ─ patch_head
                                                          │ mean over each window of 2 x 2
                                                          └ [.., 16, width] ─ window_head

The heads are thrown away afterwards. A place is one of BINS choices, as in the model's answers, where
a coordinate is one of 101 tokens. Captions teach a tower the same things, twenty times more slowly,
because a caption does not say where in the picture a word of it is to be seen.

Pictures are drawn in memory from scenes of the training split; nothing is read and nothing is
written but the tower.
"""
import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import UserError, configure, train_settings  # noqa: E402
from data import pooling_windows  # noqa: E402
from extra.hf import disk_tensors  # noqa: E402
from extra.kernels import keep_freed_memory  # noqa: E402
from extra.metrics import inside  # noqa: E402
from model import VLM, make_config, pick_dtype  # noqa: E402
from scenes import COLOURS, KINDS, background, draw_shapes, scene_of_split  # noqa: E402

NOTHING = len(COLOURS) * len(KINDS)          # the class of a patch, or a window, without a shape
BINS = 48                                    # of a place's x, and of its y; 12 a window
HELD_OUT = 500                               # pictures that only measure


# --------------------------------------------------------------------------------------------------
# Pictures and what is to be learnt of them

def class_of(shape):
    return list(COLOURS).index(shape['colour']) * len(KINDS) + KINDS.index(shape['kind'])


def shape_on(x, y, reach, shapes):
    """The shape that covers most of the square patch around (x, y), whose half side is `reach`, or
    None. Five points of it are tried."""
    best = None
    most = 0
    for shape in shapes:
        hits = 0
        for dx, dy in ((0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)):
            hits += inside(x + .8 * reach * dx, y + .8 * reach * dy, shape['polygon'])
        if hits > most:
            best = shape
            most = hits
    return best


def labelled_picture(seed, size, patches, windows, i):
    """Picture i: (pixels [size, size, 3] uint8, class of each patch [patches^2], of each window
    (class, is large, bin of x, bin of y) [windows^2, 4]).

    patches and windows: how many a side.
    """
    rng = np.random.default_rng([seed, 7, i])
    scene = scene_of_split(rng, 'train')
    canvas = background(scene['width'], scene['height'], rng)
    picture = draw_shapes(canvas, scene['shapes'], rng)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    of_patches = np.full(patches * patches, NOTHING)
    for p in range(patches * patches):
        x = (p % patches + .5) / patches
        y = (p // patches + .5) / patches
        shape = shape_on(x, y, .5 / patches, scene['shapes'])
        if shape:
            of_patches[p] = class_of(shape)
    of_windows = np.zeros((windows * windows, 4), np.int64)
    of_windows[:, 0] = NOTHING
    for shape in scene['shapes']:            # of two centres in one window the later one stays
        column = int(shape['x'] * windows)
        row = int(shape['y'] * windows)
        x_bin = int(shape['x'] * BINS)
        y_bin = int(shape['y'] * BINS)
        is_large = shape['size'] == 'large'
        of_windows[row * windows + column] = (class_of(shape), is_large, x_bin, y_bin)
    return np.asarray(picture.convert('RGB')), of_patches, of_windows


def draw(number, seed, size, patches, windows, workers):
    """`number` labelled pictures: [pixels [number, size, size, 3], of_patches, of_windows]."""
    make = partial(labelled_picture, seed, size, patches, windows)
    with ProcessPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(make, range(number), chunksize=64), total=number, unit='picture'))
    pixels, of_patches, of_windows = zip(*rows)
    return [torch.from_numpy(np.stack(x)) for x in (pixels, of_patches, of_windows)]


# --------------------------------------------------------------------------------------------------
# Training

class Heads(nn.Module):
    """Two linear layers that read the tower's features. pool_index [windows, k x k]: the patches of
    each window."""

    def __init__(self, width, pool_index):
        super().__init__()
        self.pool_index = torch.from_numpy(pool_index)
        self.patch_head = nn.Linear(width, NOTHING + 1)
        self.window_head = nn.Linear(width, NOTHING + 1 + 2 + 2 * BINS)

    def forward(self, features):
        """features [pictures, patches, width] -> (logits of patches, of windows' classes, sizes,
        places)"""
        windows = features[:, self.pool_index].mean(2)           # [pictures, windows, width]
        logits = self.window_head(windows)
        kinds, sizes, x, y = logits.split([NOTHING + 1, 2, BINS, BINS], -1)
        return self.patch_head(features), kinds, sizes, x, y


def losses(outputs, of_patches, of_windows):
    """{what: cross entropy}. Most patches and windows show nothing, so these weigh less."""
    patches, kinds, sizes, x, y = outputs
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = .15
    has_shape = of_windows[..., 0] < NOTHING                     # [pictures, windows]
    wanted = of_windows[has_shape]                               # [shapes, 4]
    return {
        'patch': F.cross_entropy(patches.flatten(0, 1), of_patches.flatten(), weight),
        'kind': F.cross_entropy(kinds.flatten(0, 1), of_windows[..., 0].flatten(), weight),
        'size': F.cross_entropy(sizes[has_shape], wanted[:, 1]),
        'x': F.cross_entropy(x[has_shape], wanted[:, 2]),
        'y': F.cross_entropy(y[has_shape], wanted[:, 3]),
    }


def make_optimizers(tower, heads):
    """Muon for the tower's matrices, AdamW for all else, as train.py does."""
    matrices = []
    others = list(heads.parameters())
    for name, p in tower.named_parameters():
        is_matrix = p.ndim == 2 and 'position_embedding' not in name
        (matrices if is_matrix else others).append(p)
    muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0., adjust_lr_fn='match_rms_adamw')
    adamw = torch.optim.AdamW(others, lr=2e-3, betas=(.9, .98), weight_decay=0., fused=True)
    return muon, adamw


def mirrored(pixels, of_patches, of_windows):
    """The same pictures seen in a mirror, with their labels. Every kind of shape stays what it is."""
    side = round(of_patches.shape[1] ** .5)
    windows = round(of_windows.shape[1] ** .5)
    of_patches = of_patches.unflatten(1, (side, side)).flip(2).flatten(1, 2)
    of_windows = of_windows.unflatten(1, (windows, windows)).flip(2).flatten(1, 2).clone()
    of_windows[..., 2] = BINS - 1 - of_windows[..., 2]
    return pixels.flip(2), of_patches, of_windows


def train(vlm, pictures, steps, batch_size, seed):
    """Trains the tower of a VLM on labelled pictures (pixels, of_patches, of_windows), of which the
    first HELD_OUT only measure. Returns their `accuracy`."""
    tower = vlm.vision_tower
    p = vlm.config.vision.patch_size
    grid = (tower.embeddings.grid, tower.embeddings.grid)
    heads = Heads(vlm.config.vision.feature_size, pooling_windows(grid, vlm.config.pooling))
    dtype = pick_dtype('auto', torch.device('cpu'))

    def answer(pixels):
        """pixels [N, size, size, 3] uint8 -> the outputs of the heads"""
        patches = pixels.unflatten(2, (-1, p)).unflatten(1, (-1, p))     # [N, rows, p, columns, p, 3]
        patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)     # [N, patches, 3 p^2]
        features = tower([(vlm.normalize(patches), grid)]).float()
        return heads(features.unflatten(0, (len(pixels), -1)))
    optimizers = make_optimizers(tower, heads)
    peaks = [opt.param_groups[0]['lr'] for opt in optimizers]
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), unit='step')
    for step in bar:
        scale = min(1, (step + 1) / 30) * (1 - step / steps)
        for opt, peak in zip(optimizers, peaks):
            opt.param_groups[0]['lr'] = peak * scale
        index = torch.randint(HELD_OUT, len(pictures[0]), (batch_size,), generator=generator)
        batch = [x[index] for x in pictures]
        # Every second batch is mirrored, because the tower then sees twice as many different pictures
        if step % 2:
            batch = mirrored(*batch)
        pixels, of_patches, of_windows = batch
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            parts = losses(answer(pixels), of_patches, of_windows)
        sum(parts.values()).backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix({name: f'{loss:.2f}' for name, loss in parts.items()})
    pixels, of_patches, of_windows = [x[:HELD_OUT] for x in pictures]
    with torch.no_grad():
        outputs = answer(pixels)
    return accuracy(outputs, of_patches, of_windows)


def accuracy(outputs, of_patches, of_windows):
    """{what: share right} of held-out pictures; for places, the mean error as a share of the side."""
    patches, kinds, sizes, x, y = outputs
    on_shape = of_patches < NOTHING
    has_shape = of_windows[..., 0] < NOTHING
    wanted = of_windows[has_shape]
    is_right = kinds.argmax(-1) == of_windows[..., 0]
    error = 0.
    for place, column in ((x, 2), (y, 3)):
        error += (place[has_shape].argmax(-1) - wanted[:, column]).abs().float().mean() / BINS / 2
    return {
        'patches of shapes': (patches.argmax(-1) == of_patches)[on_shape].float().mean().item(),
        'windows with a shape': is_right[has_shape].float().mean().item(),
        'windows without': is_right[~has_shape].float().mean().item(),
        'sizes': (sizes[has_shape].argmax(-1) == wanted[:, 1]).float().mean().item(),
        'error of places': error.item(),
    }


def save_tower(vlm, folder):
    """Writes model.safetensors with the tower alone, under transformers' names."""
    tensors = {}
    for name, tensor in disk_tensors(vlm):
        if name.startswith('vision_tower.') and 'post_layernorm' not in name:
            tensors[name] = tensor.detach().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / 'model.safetensors', metadata={'format': 'pt'})


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='Its vision, image_size and pooling are those of the tower.')
    parser.add_argument('--out', default='',
                        help="The folder for the tower; default: the config's vision_weights.")
    parser.add_argument('--num', type=int, default=36000, help='So many pictures are drawn.')
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--batch_size', type=int, default=128, help='Pictures of a step.')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    return parser.parse_args()


def main():
    args = parse_arguments()
    settings = configure(train_settings(), [args.config])
    keep_freed_memory()
    # Only the tower of this model is trained; the decoder has no part in it
    language = dict(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1, num_kv_heads=1, vocab_size=64)
    config = make_config(settings['vision'], language, pooling=settings['pooling'])
    vlm = VLM(config)
    vlm.init_weights(args.seed)
    size = settings['image_size']
    side = size // config.vision.patch_size
    out = args.out or settings['vision_weights']
    if not out:
        raise UserError(f'name a folder, --out=.., because {args.config} has no vision_weights')
    if size != config.vision.image_size or side % config.pooling:
        raise UserError(f"image_size {size} must be the tower's own {config.vision.image_size}, and pooling "
                        f'{config.pooling} must divide its {side} patches a side')
    start = time.time()
    pictures = draw(args.num + HELD_OUT, args.seed, size, side, side // config.pooling, args.workers)
    drawn = time.time()
    result = train(vlm, pictures, args.steps, args.batch_size, args.seed)
    save_tower(vlm, out)
    figures = ', '.join(f'{name} {value:.3f}' for name, value in result.items())
    print(f'{out}: drawn in {drawn - start:.0f} s, trained in {time.time() - drawn:.0f} s; held out: {figures}')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
