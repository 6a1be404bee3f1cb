"""Rows with pictures or words of the drawn world, and the questions that they allow.

    shapes_row   one picture of shapes: a caption, points, counts, questions
    clocks_row   one picture of a clock
    text_row     no picture, but a description in words and questions about it
    many_row     two or three pictures and questions that compare them

Each function writes the pictures of row number `i` into `folder`/media and returns the row as a
dict. Questions that come near a tie are not asked, because people would answer them differently.
Clips are not in this file but in clips.py.
"""
import math
import os

from PIL import Image, ImageDraw
from scenes import (SUPERSAMPLE, article, ask, ask_points, background, draw_shapes, enumeration,
                    in_validation, matching, name, remove_outlines, rounded, row_generator,
                    sample_phrase, sample_scene, save_picture, scene_of_split)

# Two places must differ by this fraction of a side in x or y for a question to compare them.
MARGIN = .06
# Questions with these words ask for heights and places, of which a description in words tells none.
NOT_IN_WORDS = ('above', 'below', 'topmost', 'bottommost', 'What is at')


# --------------------------------------------------------------------------------------------------
# Questions about one picture


def plural(phrase):
    return phrase + ('es' if phrase.endswith('s') else 's')


def captioning(shapes, rng):
    """A conversation that names all shapes from left to right."""
    names = [article(name(o, size=True)) for o in shapes]
    caption = enumeration(names).capitalize() + '.'
    wordings = (
        'Describe the picture.', 'What do you see?', 'Describe the picture from left to right.',
    )
    question = wordings[rng.integers(3)]
    objects = [[o['colour'], o['kind']] for o in shapes]
    return ask('captioning', question, caption, objects=objects)


def pointing(shapes, phrase, rng):
    """A conversation that points to all shapes that the phrase means, maybe to none."""
    points = []
    for i, o in enumerate(matching(shapes, phrase), start=1):
        polygon = rounded(o['polygon'], 4)
        points.append(dict(x=round(o['x'], 4), y=round(o['y'], 4), id=i, polygon=polygon))
    wordings = ('Point to every {}.', 'Point to each {}.', 'Where is every {}?')
    question = wordings[rng.integers(3)].format(phrase)
    return ask_points('pointing', question, phrase, points)


def counting(shapes, phrase):
    """(question, answer)"""
    question = f'How many {plural(phrase)} are there?'
    return question, str(len(matching(shapes, phrase)))


def only_of_their(shapes, *keys):
    """The shapes that share these properties with no other shape."""
    only = []
    properties = []        # of each shape, for example [('red', 'star'), ('blue', 'star')]
    for o in shapes:
        properties.append(tuple(o[key] for key in keys))
    for o, own in zip(shapes, properties):
        if properties.count(own) == 1:
            only.append(o)
    return only


def questions(shapes):
    """All questions that a scene allows, as a list for each sort with [(question, answer)].

    Every question has one right answer.
    """
    sorts = []

    # A colour is asked for by the kind, so that the answer cannot be read off the question.
    asked = []
    for o in only_of_their(shapes, 'kind'):
        asked.append((f'What colour is the {o["kind"]}?', o['colour']))
    sorts.append(asked)

    asked = []
    for o in only_of_their(shapes, 'colour'):
        asked.append((f'What shape is {o["colour"]}?', o['kind']))
    sorts.append(asked)

    asked = []
    unique = only_of_their(shapes, 'colour', 'kind')
    for o in unique:
        asked.append((f'Is the {name(o)} small or large?', o['size']))
    sorts.append(asked)

    asked = []
    for o in shapes:
        question = f'What is at {o["x"]:.2f}, {o["y"]:.2f}?'
        answer = article(name(o, size=True))
        asked.append((question, answer))
    sorts.append(asked)

    # These compare shapes, so they need two of them.
    if len(shapes) > 1:
        sorts.append(ends(shapes, 'x', 'leftmost', 'rightmost'))
        sorts.append(ends(shapes, 'y', 'topmost', 'bottommost'))
        large = [o for o in shapes if o['size'] == 'large']
        if len(large) == 1:
            sorts.append([('What is the largest shape?', article(name(large[0])))])
    sorts.append(relations(unique, 'x', 'left of', 'right of'))
    sorts.append(relations(unique, 'y', 'above', 'below'))
    return [sort for sort in sorts if sort]


def ends(shapes, axis, first, last):
    """[(question, answer)] on the first and the last shape along an axis, where they stand out."""
    in_order = sorted(shapes, key=lambda o: o[axis])
    candidates = (                             # the word, its shape, and the shape next to that one
        (first, in_order[0], in_order[1]),
        (last, in_order[-1], in_order[-2]),
    )
    asked = []
    for word, o, rival in candidates:
        if abs(o[axis] - rival[axis]) > MARGIN:
            answer = article(name(o))
            asked.append((f'What is the {word} shape?', answer))
    return asked


def relations(unique, axis, before, after):
    """[(question, answer)] on all pairs of shapes that are clearly apart along an axis."""
    asked = []
    for a in unique:
        for b in unique:
            # A shape is no distance from itself, so no pair has the same shape twice.
            if abs(a[axis] - b[axis]) <= MARGIN:
                continue
            true_word = before if a[axis] < b[axis] else after
            for word in (before, after):
                question = f'Is the {name(a)} {word} the {name(b)}?'
                answer = 'yes' if word == true_word else 'no'
                asked.append((question, answer))
    return asked


def different_phrases(shapes, number, rng):
    """Up to `number` different phrases. There may be fewer, because attempts are limited."""
    attempts = 4 * number + 4
    phrases = [sample_phrase(shapes, rng) for _ in range(attempts)]
    return list(dict.fromkeys(phrases))[:number]


def converse(shapes, args, rng):
    """The conversations of one picture: `args` says how many of each task. None comes twice."""
    # The caption is always made, so that the other questions are the same with and without it.
    caption = captioning(shapes, rng)
    branches = [caption] if args.captioning else []

    for phrase in different_phrases(shapes, args.pointing, rng):
        branches.append(pointing(shapes, phrase, rng))

    for phrase in different_phrases(shapes, args.counting, rng):
        question, answer = counting(shapes, phrase)
        branches.append(ask('counting', question, answer))

    # First a sort is drawn and then one question of it, so that rare sorts are asked as often.
    sorts = questions(shapes)
    for i in rng.permutation(len(sorts))[:args.qa]:
        sort = sorts[i]
        question, answer = sort[rng.integers(len(sort))]
        branches.append(ask('qa', question, answer, answers=[answer]))
    return branches


# --------------------------------------------------------------------------------------------------
# Clocks


def draw_clock(hour, minute, rng):
    """A clock face with twelve ticks, a short thick hour hand and a long thin minute hand."""
    size = int(rng.choice((96, 112, 128)))
    side = size * SUPERSAMPLE
    large = background(size, size, rng).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    x, y = side * rng.uniform(.44, .56, size=2)                # the middle of the face
    r = side * rng.uniform(.36, .42)                           # its radius, in enlarged pixels
    ink = tuple(int(value) for value in rng.uniform(0, 60, size=3))
    face = tuple(int(value) for value in rng.uniform(225, 255, size=3))
    border = int(.05 * r)
    pen.ellipse((x - r, y - r, x + r, y + r), fill=face, outline=ink, width=border)

    def line(turns, start, end, thickness):
        """Draws along one direction: turns 0 is at twelve o'clock and .25 at three o'clock."""
        dx = math.sin(2 * math.pi * turns)
        dy = -math.cos(2 * math.pi * turns)
        near = (x + start * r * dx, y + start * r * dy)
        far = (x + end * r * dx, y + end * r * dy)
        pen.line((near, far), ink, int(thickness * r))

    for tick in range(12):
        start = .8 if tick % 3 else .72        # every third tick is longer
        line(tick / 12, start, .92, .04)
    # A hand reaches a little beyond the middle, which is why its start is negative.
    line((hour + minute / 60) / 12, -.08, .45, .14)
    line(minute / 60, -.08, .82, .07)
    return large.reduce(SUPERSAMPLE)


# --------------------------------------------------------------------------------------------------
# Rows


def shapes_row(folder, split, i, args):
    rng = row_generator(args, 0, split, i)
    row_id = f'{split}-{i:06d}'
    scene = scene_of_split(rng, split)
    canvas = background(scene['width'], scene['height'], rng)
    picture = draw_shapes(canvas, scene['shapes'], rng)
    file = save_picture(picture, os.path.join(folder, 'media', row_id), rng)
    conversations = converse(scene['shapes'], args, rng)
    if split == 'train':
        remove_outlines(conversations)         # scoring alone needs them
    return {'id': row_id, 'images': ['media/' + file], 'conversations': conversations}


def clocks_row(folder, split, i, args):
    # There are only 48 times, so both splits show all of them. The pictures differ, because their
    # random numbers do.
    rng = row_generator(args, 1, split, i)
    row_id = f'{split}-{i:06d}'
    hour = int(rng.integers(1, 13))
    minute = int(rng.integers(4)) * 15
    picture = draw_clock(hour, minute, rng)
    file = save_picture(picture, os.path.join(folder, 'media', row_id), rng)
    asked = (
        ('What time is it?', f'{hour}:{minute:02d}'),
        ('Which hour is it?', str(hour)),
        ('How many minutes past?', str(minute)),
    )
    conversations = []
    for question, answer in asked:
        conversations.append(ask('qa', question, answer, answers=[answer]))
    return {'id': row_id, 'images': ['media/' + file], 'conversations': conversations}


def text_row(folder, split, i, args):
    """A scene told in words, and one to three questions about it in one dialogue.

    It teaches what the questions mean, apart from seeing. The words decide the split, so no
    description of validation is ever trained on.
    """
    rng = row_generator(args, 2, split, i)
    while True:
        shapes = sample_scene(rng, split)['shapes']
        description = captioning(shapes, rng)['messages'][1]['content']
        if in_validation(description) == (split == 'validation'):
            break
    sorts = []
    for sort in questions(shapes):
        first_question = sort[0][0]
        if not any(word in first_question for word in NOT_IN_WORDS):
            sorts.append(sort)
    sorts.append([counting(shapes, sample_phrase(shapes, rng))])

    order = rng.permutation(len(sorts))
    number = rng.integers(1, 4)
    messages = []
    for k in order[:number]:
        sort = sorts[k]
        question, answer = sort[rng.integers(len(sort))]
        messages += ask('text', question, answer)['messages']
    description = description[0].lower() + description[1:]
    messages[0]['content'] = f'From left to right: {description} {messages[0]["content"]}'
    conversation = {'task': 'text', 'messages': messages, 'answers': [answer]}
    return {'id': f'{split}-{i:06d}', 'conversations': [conversation]}


def many_row(folder, split, i, args):
    """Two or three pictures and questions across them."""
    rng = row_generator(args, 5, split, i)
    row_id = f'{split}-{i:06d}'
    pictures = []          # the shapes of each picture
    files = []
    for n in range(int(rng.integers(2, 4))):
        scene = scene_of_split(rng, split)
        while len(scene['shapes']) > 3:
            scene = scene_of_split(rng, split)
        canvas = background(scene['width'], scene['height'], rng)
        picture = draw_shapes(canvas, scene['shapes'], rng)
        path = os.path.join(folder, 'media', f'{row_id}-{n}')
        file = save_picture(picture, path, rng)
        files.append('media/' + file)
        pictures.append(scene['shapes'])
    everything = [o for shapes in pictures for o in shapes]

    phrase = sample_phrase(everything, rng)
    points = []
    for n, shapes in enumerate(pictures):
        for o in matching(shapes, phrase):
            point = dict(image=n, x=round(o['x'], 4), y=round(o['y'], 4))
            point['polygon'] = rounded(o['polygon'], 4)
            point['id'] = len(points) + 1      # ids count on from picture to picture
            points.append(point)
    branches = [ask_points('pointing', f'Point to every {phrase}.', phrase, points)]
    if split == 'train':
        remove_outlines(branches)

    # Two questions are on shapes that only one of the pictures shows, and shows once.
    names = [name(o) for o in everything]
    once = []              # [(name of a shape, number of its picture)]
    for n, shapes in enumerate(pictures):
        for o in shapes:
            if names.count(name(o)) == 1:
                once.append((name(o), n))
    for k in rng.permutation(len(once))[:2]:
        thing, n = once[k]
        answer = f'Image {n + 1}'
        question = f'Which image shows {article(thing)}?'
        branches.append(ask('qa', question, answer, answers=[answer]))

    n = int(rng.integers(len(pictures)))
    counts = [len(shapes) for shapes in pictures]
    question = f'How many shapes are there in image {n + 1}?'
    branches.append(ask('counting', question, str(counts[n])))
    if counts.count(max(counts)) == 1:
        answer = f'Image {counts.index(max(counts)) + 1}'
        question = 'Which image shows the most shapes?'
        branches.append(ask('qa', question, answer, answers=[answer]))
    return {'id': row_id, 'images': files, 'conversations': branches}
