"""Rows with clips of the drawn world: shapes that move, appear, vanish and pass before one another.

    short_row   a clip of 2 to 7.5 seconds
    long_row    a clip of 16 seconds to a minute

Half of the clips have subtitles. The file frame rate is RATE; all times in questions and answers
are multiples of half a second, so that the two frames a second which the model sees show them.
Nothing is asked that people would answer differently: a shape moves clearly or it stays.

Not in this file: how shapes are drawn and called (scenes.py), and rows of pictures (pictures.py). A
shape of a clip has, instead of one position, a `first` and a `last` one and the seconds `start` and
`end` at which it is there; in between it moves evenly. `still` gives a shape at one moment as
scenes.py knows it. The hash of a clip's content decides on its split, as it does for pictures.
"""
import os
from fractions import Fraction

import numpy as np
from scenes import (COLOURS, KINDS, RADIUS, article, ask, ask_points, background, draw_shapes,
                    enumeration, in_validation, matching, name, outline, remove_outlines,
                    rounded, row_generator, sample_phrase, shade)

RATE = 4                       # frames a second in the file; the model sees two of them
# x264 is told not to look ahead, because with it 8 of 1,200 files of the same frames differed.
ENCODER = {'preset': 'veryfast', 'crf': '20', 'x264-params': 'rc-lookahead=0:mbtree=0'}
SIZES = ((96, 96), (112, 96), (96, 112), (128, 96))            # width and height in pixels
WAYS = {'right': (1, 0), 'left': (-1, 0), 'down': (0, 1), 'up': (0, -1)}
WORDS = ('apple', 'river', 'stone', 'cloud', 'lamp', 'horse', 'bread', 'glass', 'train', 'paper')


# --------------------------------------------------------------------------------------------------
# Scenes in time


def to_half(seconds):
    """Seconds rounded to a multiple of one half."""
    return round(2 * seconds) / 2


def sample_clip(rng, shortest, longest):
    """A clip of `shortest` to `longest` seconds with up to four shapes, no two of the same name.

    A shape that finds no room is dropped, so a clip may be without any.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    short = min(width, height)
    duration = to_half(rng.uniform(shortest, longest))
    shapes = []
    attempts = int(rng.integers(1, 5))
    for _ in range(attempts):
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        kind = KINDS[rng.integers(len(KINDS))]
        size = 'small' if rng.random() < .55 else 'large'
        r = rng.uniform(*RADIUS[size])
        way = ''
        if rng.random() < .7:
            way = str(rng.choice(list(WAYS)))
        # Within this distance of a side, [x, y], the shape would reach over the picture's edge.
        margin = 1.15 * r * short / np.array([width, height])
        first, last, travelled = sample_path(rng, way, margin)
        if way and travelled < .33:            # too short to be seen as a movement
            continue
        start, end = sample_presence(rng, duration, is_first=not shapes)
        o = dict(colour=colour, kind=kind, size=size, r=r, way=way, first=first, last=last,
                 start=start, end=end)
        if not has_room(o, shapes, width, height):
            continue
        o['fill'] = shade(colour, rng)
        corners = np.array(outline(kind, rng.uniform(-.15, .15)))              # [corners, 2]
        o['corners'] = corners * r * short / (width, height)
        shapes.append(o)
    shapes.sort(key=lambda o: (o['start'], o['first'][0]))
    return dict(width=width, height=height, duration=duration, shapes=shapes)


def sample_path(rng, way, margin):
    """(first position, last position, distance along the way); without a way the shape stays."""
    first = rng.uniform(margin, 1 - margin)
    last = first.copy()
    if not way:
        return first, last, 0.
    step_x, step_y = WAYS[way]
    axis = 0 if step_x else 1                  # the axis along which the shape moves
    side = 1 - axis
    two_places = rng.uniform(margin[axis], 1 - margin[axis], 2)
    near, far = np.sort(two_places)
    if step_x + step_y > 0:
        first[axis] = near
        last[axis] = far
    else:
        first[axis] = far
        last[axis] = near
    # It hardly drifts to the side, so that the way has one name.
    aside = first[side] + rng.uniform(-.06, .06)
    last[side] = np.clip(aside, margin[side], 1 - margin[side])
    return first, last, far - near


def sample_presence(rng, duration, is_first):
    """(start, end) in seconds. The first shape of a clip is there from beginning to end."""
    dice = rng.random()
    span = max(1., duration / 6)               # what happens is at least this long apart
    start = 0.
    if dice < .35 and not is_first:
        start = to_half(rng.uniform(span, duration - span))
    end = duration
    if dice > .8 and not is_first and duration > 3 * span:
        end = to_half(rng.uniform(start + span, duration - .5))
    return start, end


def has_room(o, shapes, width, height):
    """Whether a shape has a name of its own and touches no other where it starts and where it ends.

    Shapes may meet on the way.
    """
    short = min(width, height)
    for other in shapes:
        if name(o) == name(other):
            return False
        reach = 1.05 * (o['r'] + other['r']) * short                           # in pixels
        for moment in ('first', 'last'):
            dx, dy = (o[moment] - other[moment]) * (width, height)
            if np.hypot(dx, dy) < reach:
                return False
    return True


def clip_content(clip):
    """What `in_validation` hashes of a clip."""
    shapes = []
    for o in clip['shapes']:
        # Positions are rounded to a tenth, because shifting shapes by a few pixels changes little.
        positions = np.round([*o['first'], *o['last']], 1).tolist()
        shapes.append((o['colour'], o['kind'], o['size'], o['start'], o['end'], *positions))
    return [clip['duration'], shapes]


def clip_of_split(rng, split, shortest, longest):
    """The first clip drawn from `rng` that has shapes and belongs to this split."""
    while True:
        clip = sample_clip(rng, shortest, longest)
        if not clip['shapes']:
            continue
        if in_validation(clip_content(clip)) == (split == 'validation'):
            return clip


def still(o, t):
    """A shape with its position and polygon at second t, or None where it is not there."""
    if not o['start'] <= t <= o['end']:
        return None
    seconds = max(.5, o['end'] - o['start'])
    share = (t - o['start']) / seconds         # how much of its way the shape has gone
    way = o['last'] - o['first']
    x, y = o['first'] + share * way
    polygon = [tuple(corner) for corner in o['corners'] + (x, y)]
    return dict(o, x=x, y=y, polygon=polygon)


def save_clip(clip, path, rng):
    """Writes a clip as MP4. Of two shapes that meet, the one that came later is in front."""
    import av                  # imported here, because a world without clips must not need PyAV
    canvas = background(clip['width'], clip['height'], rng)
    with av.open(path, 'w') as file:
        stream = file.add_stream('h264', rate=RATE, options=ENCODER)
        stream.width = clip['width']
        stream.height = clip['height']
        stream.pix_fmt = 'yuv420p'
        stream.gop_size = 24                   # a key frame every six seconds
        # One thread encodes, so that the bytes do not depend on how many cores a machine has.
        stream.codec_context.thread_count = 1
        for i in range(int(clip['duration'] * RATE) + 1):
            shapes = [still(o, i / RATE) for o in clip['shapes']]
            present = [o for o in shapes if o]
            picture = draw_shapes(canvas, present, None)
            frame = av.VideoFrame.from_image(picture)
            frame.pts = i
            frame.time_base = Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())              # the frames that the encoder still holds


# --------------------------------------------------------------------------------------------------
# Questions


def point(o, t, **extra):
    """A point on a shape at second t, as an answer has it."""
    o = still(o, t)
    return dict(t=t, x=round(o['x'], 4), y=round(o['y'], 4), **extra)


def point_with_outline(o, t, **extra):
    polygon = rounded(still(o, t)['polygon'], 3)
    return dict(point(o, t, **extra), polygon=polygon)


def times_present(o, duration):
    """The half seconds at which a shape is there."""
    times = np.arange(0, duration + .01, .5).tolist()
    return [t for t in times if o['start'] <= t <= o['end']]


def describe(o, duration):
    """A sentence on when a shape comes, what it does and when it goes."""
    parts = []
    if o['start']:
        parts.append(f'appears at {o["start"]:.1f} s')
    parts.append(f'moves {o["way"]}' if o['way'] else 'stays')
    if o['end'] < duration:
        parts.append(f'vanishes at {o["end"]:.1f} s')
    subject = article(name(o, size=True))
    return f'{subject.capitalize()} {enumeration(parts)}.'


def motion_questions(clip):
    """[(question, answer)], each with one right answer."""
    shapes = clip['shapes']
    duration = clip['duration']
    asked = []
    for o in shapes:
        answer = o['way'] or 'it stays'
        asked.append((f'Which way does the {name(o)} move?', answer))
    for o in shapes:
        answer = f'{o["start"]:.1f} s'
        asked.append((f'When does the {name(o)} appear?', answer))
    for o in shapes:
        answer = f'{o["end"]:.1f} s' if o['end'] < duration else 'never'
        asked.append((f'When does the {name(o)} vanish?', answer))
    # Only what a single shape does has one right answer.
    for way in (*WAYS, ''):
        going = [o for o in shapes if o['way'] == way]
        if len(going) == 1:
            question = f'What moves {way}?' if way else 'What stays?'
            asked.append((question, article(name(going[0]))))
    if len(shapes) > 1:
        # The list is in the order of appearance; two that come together leave no answer.
        if shapes[-1]['start'] > shapes[-2]['start']:
            asked.append(('What appears last?', article(name(shapes[-1]))))
        remaining = [o for o in shapes if o['end'] == duration]
        asked.append(('How many shapes are there at the end?', str(len(remaining))))
    return asked


def subtitles(clip, rng):
    """(cues, [(question, answer)]): single words, spoken for half a second each.

    A word is spoken when a shape appears, and one or two more at other times.
    """
    late = [o for o in clip['shapes'] if o['start']]
    starts = [o['start'] for o in late]
    others = rng.uniform(0, clip['duration'] - .5, 2)
    starts += [to_half(t) for t in others]
    starts = list(dict.fromkeys(starts))[:len(late) + 1]
    starts.sort()
    words = rng.permutation(WORDS)
    cues = []
    for start, word in zip(starts, words):
        end = min(start + .5, clip['duration'])
        cues.append(dict(start=start, end=end, text=str(word)))

    word_at = {cue['start']: cue['text'] for cue in cues}
    asked = []
    for o in late:
        word = word_at[o['start']]
        asked.append((f'What is said when the {name(o)} appears?', word))
    for cue in cues:
        question = f'What is said at {cue["start"]:.1f} s?'
        asked.append((question, cue['text']))
    return cues, asked


def converse(clip, rng):
    """The conversations of one clip: a caption, two to point to, two tracks and three questions."""
    shapes = clip['shapes']
    duration = clip['duration']
    caption = ' '.join(describe(o, duration) for o in shapes)
    objects = [[o['colour'], o['kind']] for o in shapes]
    branches = [ask('captioning', 'Describe the video.', caption, objects=objects)]

    phrases = [sample_phrase(shapes, rng) for _ in range(8)]
    phrases = list(dict.fromkeys(phrases))
    for phrase in phrases[:2]:
        points = []
        for i, o in enumerate(matching(shapes, phrase), start=1):
            # The point is on the shape when it first appears. For scoring, moments has all others.
            moments = [point_with_outline(o, t) for t in times_present(o, duration)]
            points.append(point(o, o['start'], id=i, moments=moments))
        branches.append(ask_points('pointing', f'Point to every {phrase}.', phrase, points))

    # An answer has about ten times at most, so a longer clip is tracked at larger steps.
    step = .5
    while duration / step > 10:
        step *= 2
    # Only one or two shapes are tracked at a time, because the answer would else be too long.
    trackable = []
    for phrase in phrases:
        if len(matching(shapes, phrase)) in (1, 2):
            trackable.append(phrase)
    for phrase in trackable[:2]:
        followed = matching(shapes, phrase)
        points = []
        for t in np.arange(0, duration + .01, step).tolist():
            for i, o in enumerate(followed, start=1):
                if o['start'] <= t <= o['end']:
                    points.append(point_with_outline(o, t, id=i))
        # Between two steps a shape may come and go, so that there is nothing to track.
        if points:
            question = f'Track every {phrase}, every {step:.1f} s.'
            branches.append(ask_points('tracking', question, phrase, points))

    asked = motion_questions(clip)
    for i in rng.permutation(len(asked))[:3]:
        question, answer = asked[i]
        branches.append(ask('qa', question, answer, answers=[answer]))
    return branches


# --------------------------------------------------------------------------------------------------
# Rows


def clip_row(dataset, shortest, longest, folder, split, i, args):
    """A clip of `shortest` to `longest` seconds. `dataset` is a number that seeds its scenes."""
    rng = row_generator(args, dataset, split, i)
    row_id = f'{split}-{i:06d}'
    clip = clip_of_split(rng, split, shortest, longest)
    save_clip(clip, os.path.join(folder, 'media', row_id + '.mp4'), rng)
    conversations = converse(clip, rng)
    row = {'id': row_id, 'video': f'media/{row_id}.mp4', 'conversations': conversations}
    # Half of the clips have subtitles, and half of these have them in a file of their own.
    if rng.random() < .5:
        cues, asked = subtitles(clip, rng)
        row['subtitles'] = cues
        question, answer = asked[rng.integers(len(asked))]
        conversations.append(ask('qa', question, answer, answers=[answer]))
        if rng.random() < .5:
            save_subtitles(cues, os.path.join(folder, 'media', row_id + '.srt'))
            row['subtitles'] = f'media/{row_id}.srt'
    if split == 'train':
        remove_outlines(conversations)
    return row


def save_subtitles(cues, path):
    """Writes cues as an SRT file."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        period = f'{timestamp(cue["start"])} --> {timestamp(cue["end"])}'
        blocks.append(f'{number}\n{period}\n{cue["text"]}\n')
    with open(path, 'w') as f:
        f.write('\n'.join(blocks))


def timestamp(seconds):
    minutes = int(seconds // 60)
    milliseconds = round(seconds % 1 * 1000)
    return f'00:{minutes:02d}:{int(seconds % 60):02d},{milliseconds:03d}'


def short_row(folder, split, i, args):
    """At two frames a second these clips have at most 16 frames."""
    return clip_row(3, 2, 7.5, folder, split, i, args)


def long_row(folder, split, i, args):
    """At two frames a second these clips have 33 to 48 frames; every tenth has up to 121."""
    longest = 60 if i % 10 == 9 else 23.5
    return clip_row(4, 16, longest, folder, split, i, args)
