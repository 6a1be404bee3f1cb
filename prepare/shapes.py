"""
The embedded world: pictures of coloured shapes and everything one can ask about them, drawn on the spot.

    python prepare/shapes.py                     # data/shapes, data/clips and four more (about three minutes)
    python prepare/shapes.py --num 1000 --force  # a small one instead

What is in it:
- real PNG and JPEG files of several sizes and aspect ratios; 1 to 6 shapes of 5 kinds, 6 colours and 2 sizes, turned a
  little, on plain, graded or noisy backgrounds; a shape may touch its neighbour but never hide it;
- captions, points (also to what is not there), counts, questions on attributes and relations; clocks; text-only rows;
- several pictures at once; MP4 clips of 2 to 60 seconds with tracks, times and subtitles (prepare/clips.py);
- a byte-level BPE tokenizer of about 800 tokens with Qwen's special tokens: the layout is that of the big models;
- questions that a person would answer the same way: what is nearly a tie (leftmost, above, largest) is not asked.

What is not: anything random that --seed does not fix, or a scene that both train and validation hold. A scene's content
hash says which split it belongs to, so the two are disjoint by construction (`in_validation`).
A row's random numbers depend on (seed, dataset, split, row) alone, so the number of workers changes nothing.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

WORLD = 5  # raise when the same arguments draw or say something else, so that an old folder is noticed

COLOURS = {'red': (216, 36, 40), 'green': (40, 160, 60), 'blue': (44, 84, 224), 'yellow': (240, 214, 40),
           'purple': (146, 52, 178), 'orange': (244, 134, 24)}
KINDS = ('circle', 'square', 'triangle', 'star', 'cross')
RADIUS = {'small': (.12, .14), 'large': (.19, .22)}  # of the shorter side; the gap keeps "large" a matter of fact
FEW = (.25, .25, .15, .12, .12, .11)  # how often a training picture has 1 to 6 shapes; in validation equally often
CANVASES = ((96, 96), (112, 112), (128, 128), (128, 96), (96, 128), (144, 112), (112, 144))  # width, height in pixels
SUPERSAMPLE = 3    # shapes are drawn this many times larger and averaged down: smooth edges
MARGIN = .06       # of a side: smaller differences in x or y are not asked about
SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>',
                  '<|image_pad|>', '<|video_pad|>')

# ---------------------------------------------------------------------------------------------------------------------
# scenes: what there is, before anything is drawn


def outline(kind, turn):
    """The corners of a shape of radius about 1 around (0, 0), turned by `turn` radians."""
    if kind == 'cross':
        w, arm = .3, 1.14
        corners = [(w, arm), (w, w), (arm, w), (arm, -w), (w, -w), (w, -arm),
                   (-w, -arm), (-w, -w), (-arm, -w), (-arm, w), (-w, w), (-w, arm)]
    else:
        n, radii = {'circle': (32, (.94,)), 'square': (4, (1.16,)), 'triangle': (3, (1.3,)),
                    'star': (10, (1.34, .48))}[kind]
        start = math.pi / 4 if kind == 'square' else -math.pi / 2  # squares stand flat, triangles and stars point up
        corners = [(radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / n),
                    radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / n)) for i in range(n)]
    c, s = math.cos(turn), math.sin(turn)
    return [(c * x - s * y, s * x + c * y) for x, y in corners]


def sample_scene(rng, split='train'):
    """A canvas and 1 to 6 shapes, in training more often few. Positions are fractions of width and height; the list
    runs from left to right."""
    width, height = CANVASES[rng.integers(len(CANVASES))]
    short = min(width, height)
    # Reading one shape is what must be learned first, and a picture of six says little about which one was meant
    goal, shapes = int(rng.choice(6, p=FEW if split == 'train' else None)) + 1, []
    for _ in range(200):  # a crowded canvas may end with fewer shapes than hoped for
        if len(shapes) == goal:
            break
        if shapes and rng.random() < .3:  # repeat a kind and colour: counts above one would be rare otherwise
            twin = shapes[rng.integers(len(shapes))]
            colour, kind = twin['colour'], twin['kind']
        else:
            colour, kind = list(COLOURS)[rng.integers(len(COLOURS))], KINDS[rng.integers(len(KINDS))]
        size = 'small' if rng.random() < .55 else 'large'
        r = rng.uniform(*RADIUS[size])  # of the shorter side
        rx, ry = 1.15 * r * short / width, 1.15 * r * short / height
        x, y = rng.uniform(rx, 1 - rx), rng.uniform(ry, 1 - ry)
        # visible: only the tips of stars and crosses reach over a neighbour's edge. Sortable: no two share an x, so
        # that "from left to right" has one answer.
        clear = all(math.hypot((x - o['x']) * width, (y - o['y']) * height) > 1.05 * (r + o['r']) * short and
                    abs(x - o['x']) > .02 for o in shapes)
        if clear:
            turn = rng.uniform(-.15, .15)
            polygon = [(x + px * r * short / width, y + py * r * short / height) for px, py in outline(kind, turn)]
            shapes.append(dict(colour=colour, kind=kind, size=size, x=x, y=y, r=r, polygon=polygon))
    shapes.sort(key=lambda o: o['x'])
    return dict(width=width, height=height, shapes=shapes)


def in_validation(content):
    """Whether the hash of a scene's content, or of its description in words, puts it in validation: one in eight."""
    return hashlib.sha256(json.dumps(content).encode()).digest()[0] < 32


def scene_content(scene):
    # positions to a tenth: a picture that differs from another by a few pixels is the same content
    return [(o['colour'], o['kind'], o['size'], round(o['x'], 1), round(o['y'], 1)) for o in scene['shapes']]


# ---------------------------------------------------------------------------------------------------------------------
# drawing: scene -> picture. A clip is the same two calls with other positions for every frame.


def background(width, height, rng):
    """A muted canvas (no channel strays far from grey, so every colour stands out): plain, graded or noisy."""
    grey = rng.uniform(15, 75) if rng.random() < .35 else rng.uniform(170, 240)
    first, last = (grey + rng.uniform(-14, 14, size=3) for _ in range(2))
    if rng.random() < .4:
        last = first
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(0, 1, width)[None, :] * math.cos(angle) + np.linspace(0, 1, height)[:, None] * math.sin(angle)
    ramp = (ramp - ramp.min()) / max(np.ptp(ramp), 1e-6)
    canvas = first + ramp[..., None] * (last - first)  # [height, width, 3]
    if rng.random() < .4:
        canvas = canvas + rng.normal(0, rng.uniform(1, 5), size=canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def shade(colour, rng):
    return tuple(int(c) for c in (np.array(COLOURS[colour]) + rng.uniform(-14, 14, size=3)).clip(0, 255))


def draw_shapes(canvas, shapes, rng):
    """The canvas with the shapes on it: drawn SUPERSAMPLE times larger with a mask, then averaged down."""
    width, height = canvas.size
    big = canvas.resize((width * SUPERSAMPLE, height * SUPERSAMPLE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(big)
    for o in shapes:
        fill = o.get('fill') or shade(o['colour'], rng)
        pen.polygon([(x * big.width, y * big.height) for x, y in o['polygon']], fill=fill)
    return big.reduce(SUPERSAMPLE)


def draw_clock(hour, minute, rng):
    """A clock face with twelve ticks, a short thick hour hand and a long thin minute hand."""
    size = int(rng.choice((96, 112, 128)))
    big = background(size, size, rng).resize((size * SUPERSAMPLE,) * 2, Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(big), size * SUPERSAMPLE
    x, y = side * rng.uniform(.44, .56, size=2)
    r = side * rng.uniform(.36, .42)
    ink = tuple(int(c) for c in rng.uniform(0, 60, size=3))
    pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in rng.uniform(225, 255, size=3)), outline=ink,
                width=int(.05 * r))

    def hand(turns, start, end, thickness):  # turns: 0 is twelve o'clock, .25 is three
        dx, dy = math.sin(2 * math.pi * turns), -math.cos(2 * math.pi * turns)
        pen.line((x + start * r * dx, y + start * r * dy, x + end * r * dx, y + end * r * dy), ink, int(thickness * r))

    for tick in range(12):
        hand(tick / 12, .8 if tick % 3 else .72, .92, .04)
    hand((hour + minute / 60) / 12, -.08, .45, .14)
    hand(minute / 60, -.08, .82, .07)
    return big.reduce(SUPERSAMPLE)


def save_picture(picture, path, rng):
    """Writes path + .png or .jpg, whichever the dice say, and returns the file's name."""
    if rng.random() < .5:
        path += '.png'
        picture.save(path, compress_level=1)
    else:
        path += '.jpg'
        picture.save(path, quality=int(rng.integers(80, 96)))
    return os.path.basename(path)


# ---------------------------------------------------------------------------------------------------------------------
# questions: scene -> conversations, every one a branch of the picture's message tree


def article(words):
    return ('an ' if words[0] in 'aeiou' else 'a ') + words


def name(o, size=False):
    return (o['size'] + ' ' if size else '') + f'{o["colour"]} {o["kind"]}'


def matches(o, what):
    """Whether a shape is meant by a phrase such as 'red circle', 'circle', 'red shape', 'large shape' or 'shape'."""
    return all(word in (o['colour'], o['kind'], o['size'], 'shape') for word in what.split())


def ask(task, question, answer, **extra):
    return {'task': task, 'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}],
            **extra}


def ask_points(task, question, what, points):
    conversation = ask(task, question, '')
    conversation['messages'][-1]['points'] = {'label': what, 'points': points}
    return conversation


def without_outlines(conversations):
    """As training needs them: outlines and moments are for scoring only, and three quarters of the file."""
    for point in (p for c in conversations for p in c['messages'][-1].get('points', {}).get('points', [])):
        point.pop('polygon', None)
        point.pop('moments', None)
    return conversations


def a_phrase(shapes, rng, absent=.2):
    """Something to point to or to count; with probability `absent` something that need not be there."""
    o = shapes[rng.integers(len(shapes))]
    if rng.random() < absent:
        o = dict(o, colour=rng.choice(list(COLOURS)), kind=rng.choice(KINDS))
    forms = (name(o), name(o), o['kind'], f'{o["colour"]} shape', f'{o["size"]} shape', 'shape')
    return str(forms[rng.integers(len(forms))])


def pointing(shapes, what, rng):
    points = [dict(x=round(o['x'], 4), y=round(o['y'], 4), id=i, polygon=[(round(x, 4), round(y, 4)) for x, y in
                                                                          o['polygon']])
              for i, o in enumerate((o for o in shapes if matches(o, what)), start=1)]
    question = ('Point to every {}.', 'Point to each {}.', 'Where is every {}?')[rng.integers(3)].format(what)
    return ask_points('pointing', question, what, points)


def counting(shapes, what):
    """(question, answer)"""
    return f'How many {plural(what)} are there?', str(sum(matches(o, what) for o in shapes))


def captioning(shapes, rng):
    names = [article(name(o, size=True)) for o in shapes]
    listed = names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' and ' + names[-1]
    wordings = ('Describe the picture.', 'What do you see?', 'Describe the picture from left to right.')
    question = wordings[rng.integers(3)]
    return ask('captioning', question, listed.capitalize() + '.', objects=[[o['colour'], o['kind']] for o in shapes])


def questions(shapes, rng):
    """All questions with one clear answer that this scene allows, as lists (one a sort) of (question, answer)."""
    sorts = []
    same = lambda *keys: lambda o: sum(all(o[k] == p[k] for k in keys) for p in shapes) == 1  # noqa: E731
    sorts.append([(f'What colour is the {o["kind"]}?', o['colour']) for o in filter(same('kind'), shapes)])
    sorts.append([(f'What shape is {o["colour"]}?', o['kind']) for o in filter(same('colour'), shapes)])
    unique = list(filter(same('colour', 'kind'), shapes))
    sorts.append([(f'Is the {name(o)} small or large?', o['size']) for o in unique])
    sorts.append([(f'What is at {o["x"]:.2f}, {o["y"]:.2f}?', article(name(o, size=True))) for o in shapes])
    if len(shapes) > 1:
        for axis, first, last in (('x', 'leftmost', 'rightmost'), ('y', 'topmost', 'bottommost')):
            row = sorted(shapes, key=lambda o: o[axis])
            ends = [(first, row[0], row[1])] + [(last, row[-1], row[-2])]
            sorts.append([(f'What is the {word} shape?', article(name(o)))
                          for word, o, rival in ends if abs(o[axis] - rival[axis]) > MARGIN])
        large = [o for o in shapes if o['size'] == 'large']
        sorts.append([('What is the largest shape?', article(name(o))) for o in large if len(large) == 1])
    pairs = [(a, b) for a in unique for b in unique if a is not b]
    for axis, before, after in (('x', 'left of', 'right of'), ('y', 'above', 'below')):
        sorts.append([(f'Is the {name(a)} {word} the {name(b)}?', 'yes' if (a[axis] < b[axis]) == (word == before)
                       else 'no') for a, b in pairs for word in (before, after) if abs(a[axis] - b[axis]) > MARGIN])
    return [s for s in sorts if s]


def plural(what):
    return what + ('es' if what.endswith('s') else 's')


def converse(shapes, args, rng):
    """The conversations of one picture: `args` says how many of each task. No question comes twice."""
    branches = [captioning(shapes, rng)] * bool(args.captioning)
    for task, amount in (('pointing', args.pointing), ('counting', args.counting)):
        phrases = [a_phrase(shapes, rng) for _ in range(4 * amount + 4)]
        for what in list(dict.fromkeys(phrases))[:amount]:
            branches.append(pointing(shapes, what, rng) if task == 'pointing' else
                            ask('counting', *counting(shapes, what)))
    sorts = questions(shapes, rng)
    for i in rng.permutation(len(sorts))[:args.qa]:  # a sort first, then one of it: rare sorts are asked as often
        question, answer = sorts[i][rng.integers(len(sorts[i]))]
        branches.append(ask('qa', question, answer, answers=[answer]))
    return branches


# ---------------------------------------------------------------------------------------------------------------------
# rows: one line of JSON each, with the picture written beside it


def held_scene(rng, split):
    """The first scene drawn that belongs to this split."""
    while True:
        scene = sample_scene(rng, split)
        if in_validation(scene_content(scene)) == (split == 'validation'):
            return scene


def shapes_row(folder, split, i, args):
    rng = np.random.default_rng([args.seed, 0, split == 'validation', i])
    scene = held_scene(rng, split)
    shapes = scene['shapes']
    picture = draw_shapes(background(scene['width'], scene['height'], rng), shapes, rng)
    file = save_picture(picture, os.path.join(folder, 'media', f'{split}-{i:06d}'), rng)
    conversations = converse(shapes, args, rng)
    if split == 'train':
        without_outlines(conversations)
    return {'id': f'{split}-{i:06d}', 'images': ['media/' + file], 'conversations': conversations}


def clocks_row(folder, split, i, args):
    rng = np.random.default_rng([args.seed, 1, split == 'validation', i])
    hour, minute = int(rng.integers(1, 13)), int(rng.integers(4)) * 15
    # There are only 48 times, so the splits share them; what they do not share is the picture: its random numbers.
    file = save_picture(draw_clock(hour, minute, rng), os.path.join(folder, 'media', f'{split}-{i:06d}'), rng)
    time = f'{hour}:{minute:02d}'
    branches = [('What time is it?', time), ('Which hour is it?', str(hour)), ('How many minutes past?', str(minute))]
    return {'id': f'{split}-{i:06d}', 'images': ['media/' + file],
            'conversations': [ask('qa', question, answer, answers=[answer]) for question, answer in branches]}


def text_row(folder, split, i, args):
    """A scene told in words and one to three questions about it, in one dialogue: what a question means, without eyes.
    The words decide the split: no description of validation is ever trained on."""
    rng = np.random.default_rng([args.seed, 2, split == 'validation', i])
    while True:
        shapes = sample_scene(rng, split)['shapes']
        told = captioning(shapes, rng)['messages'][1]['content']
        if in_validation(told) == (split == 'validation'):
            break
    unseen = ('above', 'below', 'topmost', 'bottommost', 'What is at')     # of heights and places words say nothing
    sorts = [s for s in questions(shapes, rng) if not any(word in s[0][0] for word in unseen)]
    sorts.append([counting(shapes, a_phrase(shapes, rng))])
    picked = [sorts[k][rng.integers(len(sorts[k]))] for k in rng.permutation(len(sorts))[:rng.integers(1, 4)]]
    messages = [message for turn in picked for message in ask('text', *turn)['messages']]
    messages[0]['content'] = f'From left to right: {told[0].lower() + told[1:]} {messages[0]["content"]}'
    return {'id': f'{split}-{i:06d}', 'conversations': [{'task': 'text', 'messages': messages,
                                                         'answers': [picked[-1][1]]}]}


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer


def train_tokenizer(rows):
    """
    Byte-level BPE on the world's own text: any text encodes, words of the world are one token each, and so are
    the coordinates ' 0.00' to ' 1.00', a place being one choice among 101 neighbours rather than four digits in a row,
    and the half seconds '0.0' to '60.0'. Other digits stand alone, as in Qwen's tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r' ?<point| ?[01]\.\d\d(?!\d)| ?\d+\.\d(?!\d)| ?\d| ?\p{L}+|\n| ?[^\s\p{L}\d]+|\s+')
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ['user\nassistant\n' * 9, 'Image 1 Image 2 Image 3 There are none.\nSubtitles:\n' * 9]
    corpus += [f'<point {x / 100:.2f}, {y / 100:.2f}, 1> <point {y / 100:.2f}' for x in range(101) for y in range(101)]
    corpus += [f' {i} {i}' * 9 for i in range(10)]
    corpus += [f'{t / 2:.1f}s {t / 2:.1f} s ' * 9 for t in range(121)]
    corpus += [m['content'] for row in rows for c in row['conversations'] for m in c['messages']]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=4, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]))
    return tokenizer


def save_tokenizer(tokenizer, folder):
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='<|im_end|>', pad_token='<|endoftext|>',
                       clean_up_tokenization_spaces=False, model_max_length=4096,
                       additional_special_tokens=list(SPECIAL_TOKENS[1:])), f, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_dataset(folder, make_row, counts, args):
    """Rows and media of all splits, into `folder`: complete or not there at all. Returns up to 2,000 rows of train."""
    temporary = folder + '.tmp'
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted run left
    os.makedirs(os.path.join(temporary, 'media'))
    sample = []
    with ProcessPoolExecutor(args.workers) as pool:
        for split, count in counts.items():
            job = partial(make_row, temporary, split, args=args)
            with open(os.path.join(temporary, split + '.jsonl'), 'w') as f:
                for row in tqdm(pool.map(job, range(count), chunksize=64), total=count, unit='row',
                                desc=f'{os.path.basename(folder)}/{split}'):
                    f.write(json.dumps(row) + '\n')
                    if split == 'train' and len(sample) < 2000:
                        sample.append(row)
    if not os.listdir(os.path.join(temporary, 'media')):
        os.rmdir(os.path.join(temporary, 'media'))
    return temporary, sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data', help='folder that gets shapes/, clips/ and the others')
    parser.add_argument('--num', type=int, default=40000, help='training pictures of shapes')
    parser.add_argument('--num_clocks', type=int, default=3000, help='training pictures of clocks')
    parser.add_argument('--num_text', type=int, default=4000, help='training rows without a picture')
    parser.add_argument('--num_clips', type=int, default=6000, help='training clips (a quarter as many long ones); '
                        '0 of a kind draws none, and without clips PyAV is not needed')
    parser.add_argument('--num_validation', type=int, default=1000, help='held-out pictures (other sets: a fifth)')
    parser.add_argument('--captioning', type=int, default=1, help='captions a picture: 0 or 1')
    parser.add_argument('--pointing', type=int, default=2, help='pointing questions a picture')
    parser.add_argument('--counting', type=int, default=2, help='counting questions a picture')
    parser.add_argument('--qa', type=int, default=4, help='other questions a picture')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that draw')
    parser.add_argument('--force', action='store_true', help='replace folders that other arguments made')
    args = parser.parse_args()

    manifest = {'world': WORLD, **{k: v for k, v in vars(args).items() if k not in ('out', 'workers', 'force')}}
    from clips import long_row, many_row, short_row        # which are made of this file's shapes
    few = args.num_validation // 5
    plan = {'shapes': (shapes_row, dict(train=args.num, validation=args.num_validation)),
            'clocks': (clocks_row, dict(train=args.num_clocks, validation=few)),
            'shapes_text': (text_row, dict(train=args.num_text, validation=few)),
            'clips': (short_row, dict(train=args.num_clips, validation=few)),
            'long_clips': (long_row, dict(train=args.num_clips // 4, validation=few // 2)),
            'shapes_many': (many_row, dict(train=args.num_clips, validation=few))}
    plan = {dataset: (make_row, counts) for dataset, (make_row, counts) in plan.items() if counts['train']}
    folders = {dataset: os.path.join(args.out, dataset) for dataset in plan}
    done = []
    for folder in folders.values():
        path = os.path.join(folder, 'manifest.json')
        made = json.load(open(path)) if os.path.exists(path) else None
        done.append(made == manifest)
        if os.path.exists(folder) and made != manifest and not args.force:
            sys.exit(f'{folder} exists and was not made with these arguments; give --force to replace it, '
                     'or another --out')
    if all(done):
        print(f'{", ".join(folders.values())}: already there with these arguments, nothing to do')
        return
    written, sample = {}, []
    for dataset, (make_row, counts) in plan.items():
        written[dataset], rows = write_dataset(folders[dataset], make_row, counts, args)
        sample += rows
    tokenizer = train_tokenizer(sample)
    save_tokenizer(tokenizer, written['shapes'])
    for dataset, temporary in written.items():
        with open(os.path.join(temporary, 'manifest.json'), 'w') as f:
            json.dump(manifest, f, indent=2)
        shutil.rmtree(folders[dataset], ignore_errors=True)
        os.replace(temporary, folders[dataset])
    print(f'{", ".join(folders.values())}: done; a tokenizer of {tokenizer.get_vocab_size()} tokens in '
          f'{folders["shapes"]}')


if __name__ == '__main__':
    main()
