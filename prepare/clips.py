"""Clips of the embedded world: shapes that move, appear, vanish and pass before one another, and what one can ask.

Run by prepare/shapes.py, whose shapes these are. Times are multiples of half a second and fall on frames; when a thing
appears or which way it moves is never a matter of taste. A clip's content hash says which split it belongs to.
"""
import os
from fractions import Fraction

import numpy as np
from shapes import (COLOURS, KINDS, RADIUS, a_phrase, article, ask, ask_points, background, draw_shapes, held_scene,
                    in_validation, matches, name, outline, save_picture, shade, without_outlines)

RATE = 4                       # frames a second in the file; the model sees two
# The lookahead of x264 makes files of the same frames differ now and then (8 of 1,200; none without it)
ENCODER = {'preset': 'veryfast', 'crf': '20', 'x264-params': 'rc-lookahead=0:mbtree=0'}
SIZES = ((96, 96), (112, 96), (96, 112), (128, 96))
WAYS = {'right': (1, 0), 'left': (-1, 0), 'down': (0, 1), 'up': (0, -1)}
WORDS = ('apple', 'river', 'stone', 'cloud', 'lamp', 'horse', 'bread', 'glass', 'train', 'paper')


# ---------------------------------------------------------------------------------------------------------------------
# scenes in time

def half(seconds):
    return round(2 * seconds) / 2


def sample_clip(rng, low, high):
    """Up to four shapes with no name twice: where each is first and last, when it comes and goes. `low` to `high` s."""
    width, height = SIZES[rng.integers(len(SIZES))]
    duration, short, shapes = half(rng.uniform(low, high)), min(width, height), []
    for _ in range(int(rng.integers(1, 5))):
        colour, kind = list(COLOURS)[rng.integers(len(COLOURS))], KINDS[rng.integers(len(KINDS))]
        size = 'small' if rng.random() < .55 else 'large'
        r = rng.uniform(*RADIUS[size])
        way = str(rng.choice(list(WAYS))) if rng.random() < .7 else ''
        margin = 1.15 * r * short / np.array([width, height])
        first = rng.uniform(margin, 1 - margin)
        last = first.copy()
        if way:                              # across at least a third of the picture, and hardly to the side
            axis = 0 if WAYS[way][0] else 1
            ends = np.sort(rng.uniform(margin[axis], 1 - margin[axis], 2))
            first[axis], last[axis] = ends[::sum(WAYS[way])]
            last[1 - axis] = np.clip(first[1 - axis] + rng.uniform(-.06, .06), margin[1 - axis], 1 - margin[1 - axis])
            if ends[1] - ends[0] < .33:
                continue
        dice, span = rng.random(), max(1., duration / 6)
        start = half(rng.uniform(span, duration - span)) if dice < .35 and shapes else 0.
        end = duration
        if dice > .8 and shapes and duration > 3 * span:
            end = half(rng.uniform(start + span, duration - .5))
        near = lambda o, p, q: np.hypot(*((p - q) * (width, height))) < 1.05 * (r + o['r']) * short
        if any((o['colour'], o['kind']) == (colour, kind) or near(o, first, o['first']) or near(o, last, o['last'])
               for o in shapes):
            continue                         # they may meet on the way, not at either end
        fill = shade(colour, rng)
        corners = np.array(outline(kind, rng.uniform(-.15, .15))) * r * short / (width, height)
        shapes.append(dict(colour=colour, kind=kind, size=size, r=r, way=way, first=first, last=last, start=start,
                           end=end, fill=fill, corners=corners))
    shapes.sort(key=lambda o: (o['start'], o['first'][0]))
    return dict(width=width, height=height, duration=duration, shapes=shapes)


def clip_content(clip):
    return [clip['duration'], [(o['colour'], o['kind'], o['size'], o['start'], o['end'],
                                *np.round([*o['first'], *o['last']], 1).tolist()) for o in clip['shapes']]]


def held_clip(rng, split, low, high):
    while True:
        clip = sample_clip(rng, low, high)
        if clip['shapes'] and in_validation(clip_content(clip)) == (split == 'validation'):
            return clip


def at(o, t):
    """A shape as a still picture has it at second t, or None where it is not there."""
    if not o['start'] <= t <= o['end']:
        return None
    s = (t - o['start']) / max(.5, o['end'] - o['start'])
    x, y = o['first'] + s * (o['last'] - o['first'])
    return dict(o, x=x, y=y, polygon=[tuple(p) for p in (o['corners'] + (x, y))])


def save_clip(clip, path, rng):
    """Writes the MP4; the later shape of two that meet is in front."""
    import av                                # only here, because a world without clips needs no PyAV
    canvas = background(clip['width'], clip['height'], rng)
    with av.open(path, 'w') as out:
        stream = out.add_stream('h264', rate=RATE, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *canvas.size, 'yuv420p', 24
        stream.codec_context.thread_count = 1
        for i in range(int(clip['duration'] * RATE) + 1):
            there = [p for p in (at(o, i / RATE) for o in clip['shapes']) if p]
            frame = av.VideoFrame.from_image(draw_shapes(canvas, there, None))
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------------------
# questions

def place(o, t, **extra):
    p = at(o, t)
    return dict(t=t, x=round(p['x'], 4), y=round(p['y'], 4), **extra)


def with_polygon(o, t, **extra):
    return dict(place(o, t, **extra), polygon=[(round(x, 3), round(y, 3)) for x, y in at(o, t)['polygon']])


def seen_at(o, duration, step=.5):
    return [t for t in np.arange(0, duration + .01, step).tolist() if o['start'] <= t <= o['end']]


def describe(o, duration):
    said = f'{article(name(o, size=True))}'
    parts = [f'appears at {o["start"]:.1f} s'] if o['start'] else []
    parts += [f'moves {o["way"]}' if o['way'] else 'stays']
    parts += [f'vanishes at {o["end"]:.1f} s'] if o['end'] < duration else []
    listed = parts[0] if len(parts) == 1 else ', '.join(parts[:-1]) + ' and ' + parts[-1]
    return f'{said.capitalize()} {listed}.'


def motion_questions(clip):
    """[(question, answer)] with one clear answer."""
    shapes, duration = clip['shapes'], clip['duration']
    out = [(f'Which way does the {name(o)} move?', o['way'] or 'it stays') for o in shapes]
    out += [(f'When does the {name(o)} appear?', f'{o["start"]:.1f} s') for o in shapes]
    out += [(f'When does the {name(o)} vanish?', f'{o["end"]:.1f} s' if o['end'] < duration else 'never')
            for o in shapes]
    for way in (*WAYS, ''):
        if len(who := [o for o in shapes if o['way'] == way]) == 1:
            out.append((f'What moves {way}?' if way else 'What stays?', article(name(who[0]))))
    if len(shapes) > 1:
        if shapes[-1]['start'] > shapes[-2]['start']:
            out.append(('What appears last?', article(name(shapes[-1]))))
        out.append(('How many shapes are there at the end?', str(sum(o['end'] == duration for o in shapes))))
    return out


def subtitles(clip, rng):
    """Cues, one a shape that appears and one or two more, and [(question, answer)]: what is said when."""
    late = [o for o in clip['shapes'] if o['start']]
    more = [half(t) for t in rng.uniform(0, clip['duration'] - .5, 2)]
    starts = sorted(list(dict.fromkeys([o['start'] for o in late] + more))[:len(late) + 1])
    words = rng.permutation(WORDS)
    cues = [dict(start=t, end=min(t + .5, clip['duration']), text=str(w)) for t, w in zip(starts, words)]
    said = {c['start']: c['text'] for c in cues}
    asked = [(f'What is said when the {name(o)} appears?', said[o['start']]) for o in late]
    return cues, asked + [(f'What is said at {c["start"]:.1f} s?', c['text']) for c in cues]


def converse(clip, rng):
    """The conversations of one clip: a caption, two to point to, two tracks, three questions."""
    shapes, duration = clip['shapes'], clip['duration']
    branches = [ask('captioning', 'Describe the video.', ' '.join(describe(o, duration) for o in shapes),
                    objects=[[o['colour'], o['kind']] for o in shapes])]
    phrases = list(dict.fromkeys(a_phrase(shapes, rng) for _ in range(8)))
    for what in phrases[:2]:
        found = [o for o in shapes if matches(o, what)]
        points = [place(o, o['start'], id=i, moments=[with_polygon(o, t) for t in seen_at(o, duration)])
                  for i, o in enumerate(found, start=1)]
        branches.append(ask_points('pointing', f'Point to every {what}.', what, points))
    step = next(s for s in (.5, 1., 2., 4., 8.) if duration / s <= 10)
    for what in [w for w in phrases if 1 <= sum(matches(o, w) for o in shapes) <= 2][:2]:
        found = [o for o in shapes if matches(o, what)]
        places = [with_polygon(o, t, id=i) for t in np.arange(0, duration + .01, step).tolist()
                  for i, o in enumerate(found, start=1) if t in seen_at(o, duration, step)]
        if places:
            branches.append(ask_points('tracking', f'Track every {what}, every {step:.1f} s.', what, places))
    asked = motion_questions(clip)
    for i in rng.permutation(len(asked))[:3]:
        branches.append(ask('qa', *asked[i], answers=[asked[i][1]]))
    return branches


# ---------------------------------------------------------------------------------------------------------------------
# rows

def clip_row(which, low, high, folder, split, i, args):
    """One clip of `low` to `high` seconds; half of them have subtitles, in a file or in the record."""
    rng = np.random.default_rng([args.seed, which, split == 'validation', i])
    clip = held_clip(rng, split, low, high)
    stem = f'{split}-{i:06d}'
    save_clip(clip, os.path.join(folder, 'media', stem + '.mp4'), rng)
    row = {'id': stem, 'video': f'media/{stem}.mp4', 'conversations': converse(clip, rng)}
    if rng.random() < .5:
        row['subtitles'], asked = subtitles(clip, rng)
        question, answer = asked[rng.integers(len(asked))]
        row['conversations'].append(ask('qa', question, answer, answers=[answer]))
        if rng.random() < .5:
            with open(os.path.join(folder, 'media', stem + '.srt'), 'w') as f:
                f.write('\n'.join(f'{n}\n{stamp(c["start"])} --> {stamp(c["end"])}\n{c["text"]}\n'
                                  for n, c in enumerate(row['subtitles'], start=1)))
            row['subtitles'] = f'media/{stem}.srt'
    if split == 'train':
        without_outlines(row['conversations'])
    return row


def stamp(seconds):
    return f'00:{int(seconds // 60):02d}:{int(seconds % 60):02d},{round(seconds % 1 * 1000):03d}'


def short_row(folder, split, i, args):
    """At most 16 frames at two a second."""
    return clip_row(3, 2, 7.5, folder, split, i, args)


def long_row(folder, split, i, args):
    """33 to 48 frames at two a second; every tenth lasts up to a minute."""
    return clip_row(4, 16, 60 if i % 10 == 9 else 23.5, folder, split, i, args)


def many_row(folder, split, i, args):
    """Two or three pictures and questions across them."""
    rng = np.random.default_rng([args.seed, 5, split == 'validation', i])
    pictures, files = [], []
    for n in range(int(rng.integers(2, 4))):
        scene = held_scene(rng, split)
        while len(scene['shapes']) > 3:
            scene = held_scene(rng, split)
        picture = draw_shapes(background(scene['width'], scene['height'], rng), scene['shapes'], rng)
        files.append('media/' + save_picture(picture, os.path.join(folder, 'media', f'{split}-{i:06d}-{n}'), rng))
        pictures.append(scene['shapes'])
    everything = [o for shapes in pictures for o in shapes]
    what = a_phrase(everything, rng)
    points = [dict(image=n, x=round(o['x'], 4), y=round(o['y'], 4),
                   polygon=[(round(x, 4), round(y, 4)) for x, y in o['polygon']])
              for n, shapes in enumerate(pictures) for o in shapes if matches(o, what)]
    points = [dict(p, id=k) for k, p in enumerate(points, start=1)]
    branches = [ask_points('pointing', f'Point to every {what}.', what, points)]
    if split == 'train':
        without_outlines(branches)
    once = [(name(o), n) for n, shapes in enumerate(pictures) for o in shapes
            if sum(name(o) == name(p) for p in everything) == 1]
    for k in rng.permutation(len(once))[:2]:
        thing, n = once[k]
        branches.append(ask('qa', f'Which image shows {article(thing)}?', f'Image {n + 1}', answers=[f'Image {n + 1}']))
    n = int(rng.integers(len(pictures)))
    counts = [len(shapes) for shapes in pictures]
    branches.append(ask('counting', f'How many shapes are there in image {n + 1}?', str(counts[n])))
    if counts.count(max(counts)) == 1:
        answer = f'Image {counts.index(max(counts)) + 1}'
        branches.append(ask('qa', 'Which image shows the most shapes?', answer, answers=[answer]))
    return {'id': f'{split}-{i:06d}', 'images': files, 'conversations': branches}
