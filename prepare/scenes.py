"""Scenes of the drawn world: which shapes stand where, how they are drawn, and how they are called.

In this file:
- the constants of the world: colours, kinds, sizes and canvases;
- a scene before it is drawn (`sample_scene`) and the split that it belongs to (`in_validation`);
- one picture of a scene (`background`, `draw_shapes`, `save_picture`);
- words for shapes, and the form of a question with its answer (`name`, `matches`, `ask`).

Not in this file: the questions themselves, which are in pictures.py and clips.py, and the command,
which is in shapes.py.

A scene is a dict of width and height in pixels and of shapes. A shape is a dict of colour, kind,
size, centre (x, y), radius r and polygon. Positions are fractions of the width and the height, and
a radius is a fraction of the shorter side. All random numbers come from the `rng` of the caller.
"""
import hashlib
import json
import math
import os

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    'red': (216, 36, 40),
    'green': (40, 160, 60),
    'blue': (44, 84, 224),
    'yellow': (240, 214, 40),
    'purple': (146, 52, 178),
    'orange': (244, 134, 24),
}
KINDS = ('circle', 'square', 'triangle', 'star', 'cross')
CORNERS = {                # kind -> number of corners, and the radii that they take in turn
    'circle': (32, (.94,)),
    'square': (4, (1.16,)),
    'triangle': (3, (1.3,)),
    'star': (10, (1.34, .48)),
}
# Radii are fractions of the shorter side. The gap between the two ranges makes "large" a fact.
RADIUS = {'small': (.12, .14), 'large': (.19, .22)}
# The shares of training pictures with 1 to 6 shapes. In validation all six are equally frequent.
FEW = (.25, .25, .15, .12, .12, .11)
CANVASES = (               # width and height in pixels
    (96, 96), (112, 112), (128, 128), (128, 96), (96, 128), (144, 112), (112, 144),
)
SUPERSAMPLE = 3            # shapes are drawn this many times larger, so that their edges are smooth


def row_generator(args, dataset, split, i):
    """The random numbers of row i. `dataset` is a number that each dataset has of its own.

    They depend on nothing else, so that any number of processes draws the same rows.
    """
    is_validation = split == 'validation'
    return np.random.default_rng([args.seed, dataset, is_validation, i])


# --------------------------------------------------------------------------------------------------
# Scenes, before anything is drawn


def outline(kind, turn):
    """The corners [(x, y)] of a shape of radius about 1 around (0, 0), turned by `turn` radians."""
    if kind == 'cross':
        w = .3             # half the width of a bar
        a = 1.14           # half the length of a bar
        corners = [(w, a), (w, w), (a, w), (a, -w), (w, -w), (w, -a),
                   (-w, -a), (-w, -w), (-a, -w), (-a, w), (-w, w), (-w, a)]
    else:
        number, radii = CORNERS[kind]
        # A square stands on one of its sides, and a triangle or a star points up.
        start = math.pi / 4 if kind == 'square' else -math.pi / 2
        corners = []
        for i in range(number):
            radius = radii[i % len(radii)]
            angle = start + 2 * math.pi * i / number
            x = radius * math.cos(angle)
            y = radius * math.sin(angle)
            corners.append((x, y))
    # A rotation by `turn`.
    c = math.cos(turn)
    s = math.sin(turn)
    turned = []
    for x, y in corners:
        turned.append((c * x - s * y, s * x + c * y))
    return turned


def has_room(x, y, r, shapes, width, height):
    """Whether a shape of radius r at (x, y) leaves all `shapes` visible and in a clear order."""
    for o in shapes:
        dx = (x - o['x']) * width              # in pixels
        dy = (y - o['y']) * height
        distance = math.hypot(dx, dy)
        # At this distance only the tips of stars and crosses reach over a neighbour's edge.
        if distance <= 1.05 * (r + o['r']) * min(width, height):
            return False
        # No two shapes share an x, so that "from left to right" has one answer.
        if abs(x - o['x']) <= .02:
            return False
    return True


def sample_scene(rng, split='train'):
    """A canvas with 1 to 6 shapes, listed from left to right; in training it has more often few."""
    width, height = CANVASES[rng.integers(len(CANVASES))]
    short = min(width, height)
    # The model must first learn to read one shape, and a picture of six shapes says little about
    # which of them a question meant. Training pictures therefore have few shapes more often.
    shares = FEW if split == 'train' else None
    goal = int(rng.choice(6, p=shares)) + 1
    shapes = []
    # A crowded canvas may end with fewer shapes than `goal`, because attempts are limited.
    for _ in range(200):
        if len(shapes) == goal:
            break
        # A kind and colour is repeated now and then, because counts above one would else be rare.
        if shapes and rng.random() < .3:
            twin = shapes[rng.integers(len(shapes))]
            colour = twin['colour']
            kind = twin['kind']
        else:
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
            kind = KINDS[rng.integers(len(KINDS))]
        size = 'small' if rng.random() < .55 else 'large'
        r = rng.uniform(*RADIUS[size])
        # The whole shape stays on the canvas.
        margin_x = 1.15 * r * short / width
        margin_y = 1.15 * r * short / height
        x = rng.uniform(margin_x, 1 - margin_x)
        y = rng.uniform(margin_y, 1 - margin_y)
        if not has_room(x, y, r, shapes, width, height):
            continue
        turn = rng.uniform(-.15, .15)
        polygon = []
        for dx, dy in outline(kind, turn):
            corner_x = x + dx * r * short / width
            corner_y = y + dy * r * short / height
            polygon.append((corner_x, corner_y))
        shapes.append(dict(colour=colour, kind=kind, size=size, x=x, y=y, r=r, polygon=polygon))
    shapes.sort(key=lambda o: o['x'])
    return dict(width=width, height=height, shapes=shapes)


def in_validation(content):
    """Whether content (of a scene, or its description in words) belongs to validation.

    The hash of the content decides, and gives one in eight to validation. Train and validation
    therefore share no content, whatever the seed is.
    """
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return digest[0] < 32


def scene_content(scene):
    """What `in_validation` hashes of a scene."""
    content = []
    for o in scene['shapes']:
        # Positions are rounded to a tenth, because a picture that differs from another by a few
        # pixels only counts as the same content.
        x = round(o['x'], 1)
        y = round(o['y'], 1)
        content.append((o['colour'], o['kind'], o['size'], x, y))
    return content


def scene_of_split(rng, split):
    """The first scene drawn from `rng` that belongs to this split."""
    while True:
        scene = sample_scene(rng, split)
        if in_validation(scene_content(scene)) == (split == 'validation'):
            return scene


# --------------------------------------------------------------------------------------------------
# From a scene to a picture. A clip makes the same calls for every frame, with other positions.


def background(width, height, rng):
    """A plain, graded or noisy canvas. It is nearly grey, so that every colour stands out."""
    if rng.random() < .35:
        grey = rng.uniform(15, 75)
    else:
        grey = rng.uniform(170, 240)
    first = grey + rng.uniform(-14, 14, size=3)
    last = grey + rng.uniform(-14, 14, size=3)
    if rng.random() < .4:
        last = first       # a plain canvas has one colour
    angle = rng.uniform(0, 2 * math.pi)
    across = np.linspace(0, 1, width)[None, :] * math.cos(angle)
    down = np.linspace(0, 1, height)[:, None] * math.sin(angle)
    ramp = across + down                                                       # [height, width]
    ramp = (ramp - ramp.min()) / max(np.ptp(ramp), 1e-6)
    canvas = first + ramp[..., None] * (last - first)                          # [height, width, 3]
    if rng.random() < .4:
        strength = rng.uniform(1, 5)
        canvas = canvas + rng.normal(0, strength, size=canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def shade(colour, rng):
    """An (r, g, b) near the named colour, so that a colour is a range and not one value."""
    values = np.array(COLOURS[colour]) + rng.uniform(-14, 14, size=3)
    return tuple(int(value) for value in values.clip(0, 255))


def draw_shapes(canvas, shapes, rng):
    """A copy of the canvas with the shapes on it, the later ones in front."""
    width, height = canvas.size
    large_size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    large = canvas.resize(large_size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for o in shapes:
        fill = o.get('fill') or shade(o['colour'], rng)
        corners = [(x * large.width, y * large.height) for x, y in o['polygon']]
        pen.polygon(corners, fill=fill)
    return large.reduce(SUPERSAMPLE)


def save_picture(picture, path, rng):
    """Writes `path` + .png or .jpg, each with probability one half; returns the file's name."""
    if rng.random() < .5:
        path += '.png'
        picture.save(path, compress_level=1)
    else:
        path += '.jpg'
        quality = int(rng.integers(80, 96))
        picture.save(path, quality=quality)
    return os.path.basename(path)


# --------------------------------------------------------------------------------------------------
# Words for shapes


def article(words):
    return ('an ' if words[0] in 'aeiou' else 'a ') + words


def name(o, size=False):
    words = f'{o["colour"]} {o["kind"]}'
    return f'{o["size"]} {words}' if size else words


def enumeration(words):
    """'a', 'a and b' or 'a, b and c'."""
    if len(words) == 1:
        return words[0]
    return ', '.join(words[:-1]) + ' and ' + words[-1]


def matches(o, phrase):
    """Whether a phrase like 'red circle', 'circle', 'large shape' or 'shape' means this shape."""
    true_of_it = (o['colour'], o['kind'], o['size'], 'shape')
    return all(word in true_of_it for word in phrase.split())


def matching(shapes, phrase):
    return [o for o in shapes if matches(o, phrase)]


def sample_phrase(shapes, rng, absent=.2):
    """Words for something to point to or to count; with probability `absent` it may not exist."""
    o = shapes[rng.integers(len(shapes))]
    if rng.random() < absent:
        colour = rng.choice(list(COLOURS))
        kind = rng.choice(KINDS)
        o = dict(o, colour=colour, kind=kind)
    # The full name stands here twice, so that it is twice as frequent as each of the others.
    phrases = (name(o), name(o), o['kind'], f'{o["colour"]} shape', f'{o["size"]} shape', 'shape')
    return str(phrases[rng.integers(len(phrases))])


# --------------------------------------------------------------------------------------------------
# Questions with answers. A row's list of conversations is a message tree: each of them is a branch
# that follows the same picture or clip.


def ask(task, question, answer, **extra):
    """A conversation of one question and its answer, in the form that docs/data.md describes."""
    messages = [
        {'role': 'user', 'content': question},
        {'role': 'assistant', 'content': answer},
    ]
    return {'task': task, 'messages': messages, **extra}


def ask_points(task, question, label, points):
    """A conversation whose answer is points."""
    conversation = ask(task, question, '')
    conversation['messages'][-1]['points'] = {'label': label, 'points': points}
    return conversation


def rounded(polygon, digits):
    return [(round(x, digits), round(y, digits)) for x, y in polygon]


def remove_outlines(conversations):
    """Removes outlines and moments of all points, in place.

    Only scoring needs them, so training rows go without; they are three quarters of a file.
    """
    for conversation in conversations:
        points = conversation['messages'][-1].get('points', {}).get('points', [])
        for point in points:
            point.pop('polygon', None)
            point.pop('moments', None)
