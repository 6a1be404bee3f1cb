"""Scores of one answer, as the benchmarks define them. Each is {metric: (numerator, denominator)}, so that every figure of
many answers is a ratio of sums.

vqa        VQA v2 (Goyal et al. 2017; its evaluation code): of every set of all people's answers but one, a third for each
           that equals the model's, 1 at most; the mean of that, after `normalised`
anls       DocVQA (Mathew et al. 2021): 1 - edit distance / longer length, 0 where that is below a half; the best reference
relaxed    ChartQA (Masry et al. 2022): the text, or a number within 5%
choice     the option that an answer names, by letter or by text. What names none, or several, is wrong
exact      the answer equals a reference after lower-casing and dropping punctuation
counting   the number is right, or within 1
pointing   an object is hit when a point lies in it, one point to one object (largest matching): hit rate = objects hit /
           objects (recall), precision = points that hit / points, F1 of both
tracking   of the places asked for (an object at a time), how many have the point of that id and time inside; F1 of every
           moment; DetA, AssA and HOTA (Luiten et al. 2021), where inside is all there is to similarity
captioning F1 of the objects named, as multisets, where a record lists them; else ROUGE-L (Lin 2004)
moments    QVHighlights (Lei et al. 2021): intervals matched at an overlap of half: recall, precision, F1

J & F of masks are not among them: this model gives points.
"""
import re
import string
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import accumulate, combinations

from data import parse_points

RADIUS = 0.05                  # how near a point must be, in pictures, to an object without outline

# ---------------------------------------------------------------------------------------------------------------------
# Text

NUMBERS = {word: str(i) for i, word in enumerate('zero one two three four five six seven eight nine ten'.split())}
NUMBERS['none'] = '0'
WHOLE = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'll somebody's someone'd
someone'll someone's something'd something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're
you've""".split()
PLACES = {word: [i for i, c in enumerate(word) if c == "'"] for word in WHOLE}
# every way to leave out apostrophes -> the word with all of them
CONTRACTIONS = {''.join(c for i, c in enumerate(word) if i not in left): word for word, places in PLACES.items()
                for n in range(1, len(places) + 1) for left in map(set, combinations(places, n))}


def normalised(text):
    """An answer as VQA's evaluation compares it: no punctuation, numbers as digits, no articles, apostrophes restored."""
    text = ' '.join(text.lower().split())
    apart = re.search(r'\d,\d', text)
    for c in ';/[]"{}()=+\\_-><@`,?!':
        text = text.replace(c, '' if apart or f'{c} ' in text or f' {c}' in text else ' ')
    text = re.sub(r'\.(?!\d)', '', text)
    words = (NUMBERS.get(word, word) for word in text.split())
    return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ('a', 'an', 'the'))


def plain(text):
    return ' '.join(text.lower().translate(str.maketrans('', '', string.punctuation.replace(':', ''))).split())


def vqa(text, answers):
    text, answers = normalised(text), [normalised(a) for a in answers]
    n = sum(a == text for a in answers)
    # leave each answer out in turn: n of them lose one match. Of less than four people no three can be left
    score = (n * min(1, (n - 1) / 3) + (len(answers) - n) * min(1, n / 3)) / len(answers) if len(answers) > 3 else n > 0
    return {'VQA accuracy': (score, 1), 'exact': (n > 0, 1)}


def edits(a, b):
    """Levenshtein's distance, a row of the table at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def anls(text, answers):
    def near(a, b):
        share = edits(a, b) / max(len(a), len(b), 1)
        return 1 - share if share < .5 else 0.
    text = ' '.join(text.lower().split())
    return {'ANLS': (max(near(text, ' '.join(a.lower().split())) for a in answers), 1)}


def number(text):
    """The number that a text is, percents as fractions; None."""
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith('%') else float(text)
    except ValueError:
        return None


def relaxed(text, answers):
    def right(wanted):
        given, target = number(text), number(wanted)
        if given is not None and target:
            return abs(given - target) <= .05 * abs(target)
        return text.strip().lower() == wanted.strip().lower()
    return {'relaxed accuracy': (any(map(right, answers)), 1)}


def chosen(text, options):
    """Which option an answer names: "B", "B.", "(b) the cat", "the cat", "It is the cat."; None."""
    text = text.strip()
    marked = re.match(r'\(?([A-Za-z])(?:[.):]|$)', text)
    if marked and ord(marked[1].upper()) - 65 < len(options):
        return ord(marked[1].upper()) - 65
    same = [i for i, o in enumerate(options) if plain(o) == plain(text)]
    named = same or [i for i, o in enumerate(options) if plain(o) and f' {plain(o)} ' in f' {plain(text)} ']
    longest = max(named, key=lambda i: len(options[i]), default=None)        # "a cat and a dog" names "a cat", too
    return longest if all(plain(options[i]) in plain(options[longest]) for i in named) else None


def choice(text, options, right):
    return {'accuracy': (chosen(text, options) == right, 1)}


def exact(text, answers):
    return {'accuracy': (plain(text) in map(plain, answers), 1)}


def first_number(text):
    found = re.search(r'\d+', text)
    return int(found[0]) if found else None


def counting(text, reference):
    given, wanted = first_number(text), first_number(reference)
    near = None not in (given, wanted) and abs(given - wanted) <= 1
    return {'accuracy': (given == wanted, 1), 'within 1': (near, 1)}


def objects_named(text, objects, vocabulary):
    """`vocabulary`: every object any caption may name, so that naming one that is not there costs precision."""
    words = f' {plain(text)} '
    said = Counter({o: words.count(f' {o} ') for o in vocabulary})
    there = Counter(' '.join(o) for o in objects)
    return {'F1': (2 * (said & there).total(), (said + there).total())}


def rouge(text, answers):
    """ROUGE-L: F (recall 1.2 times as weighty) of the longest common subsequence of words, best over the references."""
    def score(a, b):
        row = [0] * (len(b) + 1)             # as `edits`, a row of the table at a time
        for x in a:
            before = 0
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
        if not row[-1]:
            return 0.
        precision, recall = row[-1] / len(a), row[-1] / len(b)
        return (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)
    return {'ROUGE-L': (max(score(plain(text).split(), plain(a).split()) for a in answers), 1)}


def moments(text, windows):
    """Intervals [a-b] or a - b in a text against those wanted: the most that overlap by half one to one, largest first."""
    given = [tuple(map(float, pair)) for pair in re.findall(r'(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)', text)]
    overlap = lambda a, b: max(0., min(a[1], b[1]) - max(a[0], b[0])) / max(max(a[1], b[1]) - min(a[0], b[0]), 1e-9)
    pairs = sorted(((overlap(a, b), i, j) for i, a in enumerate(given) for j, b in enumerate(windows)), reverse=True)
    taken, n = (set(), set()), 0
    for o, i, j in pairs:
        if o >= .5 and i not in taken[0] and j not in taken[1]:
            taken[0].add(i), taken[1].add(j)
            n += 1
    return {'recall': (n, len(windows)), 'precision': (n, len(given)), 'F1': (2 * n, len(given) + len(windows))}


# ---------------------------------------------------------------------------------------------------------------------
# Points

def inside(x, y, polygon):
    """Even-odd rule: does a ray to the right of (x, y) cross the outline an odd number of times?"""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


def in_mask(x, y, mask):
    """mask {'size': [height, width], 'runs': [..]}: pixels in reading order, so many outside, then so many inside, .."""
    height, width = mask['size']
    place = min(int(y * height), height - 1) * width + min(int(x * width), width - 1)
    return bisect_right(list(accumulate(mask['runs'])), place) % 2 == 1


def hits(p, o, radius=RADIUS):
    """Does the point lie in the object: in its mask, polygon or box, or within `radius` of it; in a video at the same time,
    give or take a quarter of a second. Where a video's object moves, `moments` holds it at every time."""
    if o.get('moments'):
        return any(hits(p, moment, radius) for moment in o['moments'])
    if p.get('image', 0) != o.get('image', 0) or abs(p.get('t', 0) - o.get('t', 0)) > .25:
        return False
    if o.get('mask'):
        return in_mask(p['x'], p['y'], o['mask'])
    if o.get('polygon'):
        return inside(p['x'], p['y'], o['polygon'])
    if o.get('box'):
        left, top, right, bottom = o['box']
        return left <= p['x'] <= right and top <= p['y'] <= bottom
    return (p['x'] - o['x']) ** 2 + (p['y'] - o['y']) ** 2 <= radius ** 2


def matching(edges):
    """{object: point} of the largest one-to-one matching; edges[i]: the objects that point i may have (augmenting paths,
    Kuhn 1955)."""
    owner = {}

    def place(i, tried):
        for j in edges[i]:
            if j not in tried:
                tried.add(j)
                if j not in owner or place(owner[j], tried):
                    owner[j] = i
                    return True
        return False
    for i in range(len(edges)):
        place(i, set())
    return owner


def match(points, objects, radius=RADIUS):
    """How many points hit an object each."""
    return len(matching([[j for j, o in enumerate(objects) if hits(p, o, radius)] for p in points]))


def pointing(text, objects, radius=RADIUS):
    points = parse_points(text)
    if not objects:
        return {'none there': (not points, 1)}
    n = match(points, objects, radius)
    return {'hit rate': (n, len(objects)), 'precision': (n, len(points)), 'F1': (2 * n, len(objects) + len(points)),
            'all right': (n == len(objects) == len(points), 1)}


def all_inside(text, mask):
    """PointBench (Cheng et al. 2025): a point at least, and none outside."""
    points = parse_points(text)
    return {'all inside': (bool(points) and all(in_mask(p['x'], p['y'], mask) for p in points), 1)}


def tracking(text, places, radius=RADIUS):
    """places: where each object is at each time asked for, {t, x, y, id, and its outline}."""
    points = parse_points(text)
    if not places:
        return {'none there': (not points, 1)}
    pairs = [(i, j) for i, p in enumerate(points) for j, place in enumerate(places)
             if p['id'] == place['id'] and hits(p, place, radius)]
    times = sorted({place['t'] for place in places})
    said, there, found = defaultdict(list), defaultdict(list), []
    for p in points:                         # what is said of no moment asked for is wrong, at a moment of its own
        near = min(times, key=lambda t: abs(t - p.get('t', 0)))
        said[near if abs(near - p.get('t', 0)) <= .25 else (p.get('t', 0),)].append(p)
    for place in places:
        there[place['t']].append(place)
    together, told, asked = Counter(), Counter(p['id'] for p in points), Counter(p['id'] for p in places)
    under = {t: [[j for j, o in enumerate(there[t]) if hits(p, o, radius)] for p in said[t]]
             for t in [*times, *(t for t in said if t not in there)]}
    for t in times:                          # how long each id of the answer was in each object
        together.update({(p['id'], there[t][j]['id']) for p, js in zip(said[t], under[t]) for j in js})

    def alike(a, b, n):
        return n / (told[a] + asked[b] - n)
    f1 = 0.
    for t in under:                          # where several could be, those stay together that are so longest
        near = lambda p, o: alike(p['id'], o['id'], together[p['id'], o['id']])
        edges = [sorted(js, key=lambda j: -near(p, there[t][j])) for p, js in zip(said[t], under[t])]
        order = sorted(range(len(edges)), key=lambda i: -max((near(said[t][i], there[t][j]) for j in edges[i]), default=0))
        owner = matching([edges[i] for i in order])
        found += [(said[t][order[i]]['id'], there[t][j]['id']) for j, i in owner.items()]
        f1 += 2 * len(owner) / max(1, len(said[t]) + len(there[t]))
    true, all_of_them = len(found), len(points) + len(places) - len(found)
    association = sum(n * alike(a, b, n) for (a, b), n in Counter(found).items())
    return {'inside': (len({j for _, j in pairs}), len(places)), 'precision': (len({i for i, _ in pairs}), len(points)),
            'F1': (f1, len(under)), 'DetA': (true, all_of_them), 'AssA': (association, true),
            'HOTA': ((true / all_of_them * association / true) ** .5 if true else 0., 1)}


def score(item, text, vocabulary=(), radius=RADIUS):
    """Scores of an answer to an item of eval.py's `questions`: by the metric its data asks for, else by its task."""
    task, metric, answers = item['task'], item.get('metric'), item.get('answers')
    if metric in ('vqa', 'anls', 'relaxed', 'exact', 'rouge'):
        return globals()[metric](text, answers)
    if metric == 'choice':
        return choice(text, item['options'], item['right'])
    if metric == 'moments':
        return moments(text, item['windows'])
    if item.get('mask'):
        return all_inside(text, item['mask'])
    if task == 'pointing':
        return pointing(text, item['points'], radius)
    if task == 'tracking':
        return tracking(text, item['points'], radius)
    if task == 'captioning':
        there = item.get('objects')
        return rouge(text, answers) if there is None else objects_named(text, there, vocabulary)
    if task == 'counting':
        return counting(text, item['reference'])
    return exact(text, answers)
