"""Scores of one answer, as the benchmarks define them.

In this file: text metrics (VQA accuracy, ANLS, relaxed accuracy, multiple choice, exact match,
counting, object F1, ROUGE-L, interval IoU), point metrics (pointing, PointBench, tracking with
HOTA), and `score`, which picks the metric. Not in this file: running a model, and means and
confidence intervals over many answers (eval.py); J & F of masks, because this model predicts
points; metrics that need another model as a judge.

Each metric returns {name: (numerator, denominator)} of one answer. The score of many answers is the
sum of the numerators divided by the sum of the denominators. A denominator of 1 therefore gives the
mean over answers, and a denominator that counts objects gives the mean over objects. Each
function's docstring has the formula and its source.

Times are seconds, coordinates x and y are fractions of the picture in [0, 1], and an answer is a
text.
"""
import re
import string
from bisect import bisect_right
from collections import Counter
from itertools import accumulate, product

from data import parse_points

RADIUS = 0.05                  # largest distance of a hit from a target without outline, in [0, 1]
TIME_TOLERANCE = .25           # largest difference in seconds between a prediction and its target

# --------------------------------------------------------------------------------------------------
# Text: normalization

NUMBER_WORDS = 'zero one two three four five six seven eight nine ten'.split()
DIGITS = {word: str(value) for value, word in enumerate(NUMBER_WORDS)}
DIGITS['none'] = '0'
ARTICLES = ('a', 'an', 'the')
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The words of VQA's evaluation code whose apostrophes are restored.
APOSTROPHE_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there'd've there're there's they'd they'd've they'll
they're they've twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all you'd you'd've you'll you're you've""".split()


def misspellings(word):
    """The spellings of a word that lack an apostrophe or more: couldnt've, couldn'tve,
    couldntve."""
    first, *rest = word.split("'")
    spellings = []
    # Each apostrophe is either kept or left out, independently of the others.
    for separators in product(["'", ''], repeat=len(rest)):
        # The pieces between the apostrophes are put together again.
        spelling = first
        for separator, piece in zip(separators, rest):
            spelling += separator + piece
        if spelling != word:
            spellings.append(spelling)
    return spellings


def contraction_table():
    """{misspelling: the word with all of its apostrophes}."""
    table = {}
    for word in APOSTROPHE_WORDS:
        for spelling in misspellings(word):
            table[spelling] = word
    return table


CONTRACTIONS = contraction_table()


def collapse_spaces(text):
    """Lower case and single spaces, punctuation kept."""
    return ' '.join(text.lower().split())


def vqa_normalize(text):
    """A text as VQA's evaluation code compares it: lower case, without punctuation and articles,
    numbers up to ten as digits, apostrophes restored. Source: Goyal et al. 2017, vqaEval.py
    (processPunctuation, processDigitArticle)."""
    text = collapse_spaces(text)

    # A mark becomes a space, because it may stand between two words ("left/right"). It is deleted
    # if it touches a space anywhere in the text, or if the text has a comma between digits.
    has_digit_comma = re.search(r'\d,\d', text)
    for mark in VQA_PUNCTUATION:
        touches_space = f'{mark} ' in text or f' {mark}' in text
        if has_digit_comma or touches_space:
            text = text.replace(mark, '')
        else:
            text = text.replace(mark, ' ')

    # A full stop before a digit is a decimal point, so it stays.
    text = re.sub(r'\.(?!\d)', '', text)

    # Number words become digits first, then articles go, then apostrophes return.
    words = []
    for word in text.split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return ' '.join(words)


# The colon stays, because the time "10:30" must not equal the number "1030".
REMOVED_PUNCTUATION = str.maketrans('', '', string.punctuation.replace(':', ''))


def normalize_text(text):
    """Lower case, without punctuation other than colons, single spaces."""
    text = text.lower().translate(REMOVED_PUNCTUATION)
    return ' '.join(text.split())


# --------------------------------------------------------------------------------------------------
# Text: short answers

def vqa_accuracy(text, answers):
    """VQA accuracy of an answer, and whether it equals any of the references.

        accuracy = mean over the leave-one-out subsets of `answers` of min(#matches / 3, 1)

    answers: the references, ten people's in VQA v2. With three or fewer of them the accuracy is 1
    for a match and else 0, because no subset of two can hold the three matches that the formula
    asks for. Source: Goyal et al. 2017 (VQA v2), https://visualqa.org/evaluation.html. Texts are
    compared by `vqa_normalize`.
    """
    prediction = vqa_normalize(text)
    references = [vqa_normalize(answer) for answer in answers]
    total = len(references)
    matches = references.count(prediction)
    if total <= 3:
        accuracy = matches > 0
    else:
        # There are `total` subsets. Those that leave out a match hold matches - 1 of them, and all
        # others hold every match.
        without_a_match = min(1, (matches - 1) / 3)
        without_another = min(1, matches / 3)
        accuracy = (matches * without_a_match + (total - matches) * without_another) / total
    return {'VQA accuracy': (accuracy, 1), 'exact': (matches > 0, 1)}


def edit_distance(a, b):
    """Levenshtein distance: the least number of insertions, deletions and substitutions that turn
    `a` into `b`."""
    # previous[j] is the distance from the first i - 1 characters of a to the first j of b.
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            deletion = previous[j] + 1
            insertion = current[j - 1] + 1
            substitution = previous[j - 1] + (x != y)
            current.append(min(deletion, insertion, substitution))
        previous = current
    return previous[-1]


def anls(text, answers):
    """Average normalized Levenshtein similarity, for one answer.

        NL(a, b) = edit_distance(a, b) / max(|a|, |b|)
        ANLS = max over the references of (1 - NL if NL < 0.5 else 0)

    Source: Mathew et al. 2021 (DocVQA); Biten et al. 2019. Case and repeated spaces are ignored.
    """
    prediction = collapse_spaces(text)
    similarities = []
    for answer in answers:
        reference = collapse_spaces(answer)
        # The 1 avoids a division by zero, because both texts may be empty.
        longer = max(len(prediction), len(reference), 1)
        distance = edit_distance(prediction, reference) / longer
        # At a distance of 0.5 or more the answer counts as another word, not as a misspelling.
        similarities.append(1 - distance if distance < .5 else 0.)
    return {'ANLS': (max(similarities), 1)}


def parse_number(text):
    """The float that the whole text is, "4.1%" as 0.041; None for any other text."""
    text = text.strip()
    try:
        # A percentage becomes a fraction, because references give either form.
        if text.endswith('%'):
            return float(text[:-1]) / 100
        return float(text)
    except ValueError:         # The text is not a number, and the caller compares it as a text.
        return None


def relaxed_match(text, reference):
    """Whether the answer is a number within 5% of the reference, or the same text."""
    prediction = parse_number(text)
    target = parse_number(reference)
    # A target of 0 has no relative error, so it is compared as a text.
    if prediction is not None and target:
        return abs(prediction - target) <= .05 * abs(target)
    return text.strip().lower() == reference.strip().lower()


def relaxed_accuracy(text, answers):
    """Relaxed accuracy: 1 if |prediction - target| <= 0.05 |target| for one of the references;
    texts must be equal. Source: Masry et al. 2022 (ChartQA), after Methani et al. 2020 (PlotQA)."""
    correct = any(relaxed_match(text, answer) for answer in answers)
    return {'relaxed accuracy': (correct, 1)}


def parse_choice(text, options):
    """The index of the option that an answer names: by letter ("B", "b.", "(B) the cat") or by text
    ("the cat", "It is the cat."). None if it names no option, or two of which neither contains the
    other."""
    text = text.strip()
    letter = re.match(r'\(?([A-Za-z])(?:[.):]|$)', text)
    if letter:
        # A letter beyond the options is no choice: the "I" of "I." may begin any sentence.
        index = ord(letter[1].upper()) - ord('A')
        if index < len(options):
            return index

    prediction = normalize_text(text)
    names = [normalize_text(option) for option in options]
    mentioned = [i for i, name in enumerate(names) if name == prediction]
    if not mentioned:
        # The spaces around both keep the option "cat" from being found in "catalogue".
        padded = f' {prediction} '
        mentioned = [i for i, name in enumerate(names) if name and f' {name} ' in padded]
    if not mentioned:
        return None

    # An answer that names "a cat and a dog" also contains "a cat". The longest option is meant if
    # it contains all others that were found. If it does not, the answer is ambiguous.
    longest = max(mentioned, key=lambda i: len(options[i]))
    for i in mentioned:
        if names[i] not in names[longest]:
            return None
    return longest


def multiple_choice(text, options, right):
    """Accuracy: 1 if the answer names the option with index `right`. An answer that names none is
    wrong, not guessed."""
    # parse_choice gives None for an answer without an option, and None equals no index.
    return {'accuracy': (parse_choice(text, options) == right, 1)}


def exact_match(text, answers):
    """Accuracy: 1 if the answer equals a reference, both after `normalize_text`."""
    prediction = normalize_text(text)
    references = [normalize_text(answer) for answer in answers]
    return {'accuracy': (prediction in references, 1)}


def first_integer(text):
    # Number words are not read: "three or 13" counts as 13.
    digits = re.search(r'\d+', text)
    if digits is None:
        return None
    return int(digits[0])


def counting(text, reference):
    """Accuracy, and accuracy within 1, of the first integer in the answer against the first in the
    reference."""
    prediction = first_integer(text)
    target = first_integer(reference)
    # Where neither text has a number the answer is right, but it is not within 1 of anything.
    within_1 = False
    if prediction is not None and target is not None:
        within_1 = abs(prediction - target) <= 1
    return {'accuracy': (prediction == target, 1), 'within 1': (within_1, 1)}


# --------------------------------------------------------------------------------------------------
# Text: captions and moments

def object_f1(text, objects, vocabulary):
    """F1 of the objects that a caption names, as multisets: 2 |predicted & target| / (|predicted| +
    |target|).

    objects: the target, each a list of words (['red', 'circle']). vocabulary: the phrases of all
    objects that captions of the dataset may name, because naming one that is not in the picture
    must cost precision.
    """
    # A phrase is counted between spaces, so that "red star" is not found in "red starfish".
    words = f' {normalize_text(text)} '
    predicted = Counter()
    for phrase in vocabulary:
        predicted[phrase] = words.count(f' {phrase} ')
    target = Counter(' '.join(object_words) for object_words in objects)
    # The intersection of two multisets has the smaller of the two counts of each phrase.
    common = predicted & target
    return {'F1': (2 * common.total(), (predicted + target).total())}


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists of words."""
    # previous[j] is the length for the words of a so far and the first j words of b.
    previous = [0] * (len(b) + 1)
    for x in a:
        current = [0]
        for j, y in enumerate(b, 1):
            if x == y:
                current.append(previous[j - 1] + 1)
            else:
                current.append(max(previous[j], current[j - 1]))
        previous = current
    return previous[-1]


def rouge_l(text, answers):
    """ROUGE-L, the best over the references.

        P = LCS(prediction, reference) / |prediction|
        R = LCS(prediction, reference) / |reference|
        F = (1 + beta^2) P R / (R + beta^2 P), beta = 1.2

    LCS is the length in words of the longest common subsequence. Source: Lin 2004; beta as in
    COCO's caption evaluation.
    """
    beta2 = 1.2 ** 2
    prediction = normalize_text(text).split()
    scores = []
    for answer in answers:
        reference = normalize_text(answer).split()
        length = common_subsequence(prediction, reference)
        # Without a word in common P and R are 0, and F would divide by zero.
        if length == 0:
            scores.append(0.)
            continue
        precision = length / len(prediction)
        recall = length / len(reference)
        scores.append((1 + beta2) * precision * recall / (recall + beta2 * precision))
    return {'ROUGE-L': (max(scores), 1)}


INTERVAL = re.compile(r'(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)')      # 12.5 - 20


def interval_iou(a, b):
    """Intersection over union of two intervals (start, end) in seconds."""
    intersection = max(0., min(a[1], b[1]) - max(a[0], b[0]))
    # The span from the first start to the last end is the union if the intervals overlap. If they
    # do not overlap, the IoU is 0 whatever the denominator is.
    union = max(a[1], b[1]) - min(a[0], b[0])
    return intersection / max(union, 1e-9)


def moment_retrieval(text, windows):
    """Recall, precision and F1 of the intervals in an answer ("[0-10], [20 - 24.5]") against the
    target `windows` [[start, end], ..]. Pairs are matched one to one, highest IoU first, down to an
    IoU of 0.5.

        recall    = #matches / #windows
        precision = #matches / #predicted
        F1        = 2 #matches / (#windows + #predicted)

    Source: Lei et al. 2021 (QVHighlights), whose own figures, R1 and mAP at this IoU, need a
    ranking of the predictions that a text does not have.
    """
    # The answer may be any text that contains intervals.
    predicted = []
    for start, end in INTERVAL.findall(text):
        predicted.append((float(start), float(end)))

    pairs = []                             # (IoU, index of the prediction, index of the window)
    for i, interval in enumerate(predicted):
        for j, window in enumerate(windows):
            iou = interval_iou(interval, window)
            if iou >= .5:
                pairs.append((iou, i, j))

    # Greedy matching: a pair counts if neither its prediction nor its window is matched already.
    matched_predictions = set()
    matched_windows = set()
    for _, i, j in sorted(pairs, reverse=True):
        if i not in matched_predictions and j not in matched_windows:
            matched_predictions.add(i)
            matched_windows.add(j)
    n = len(matched_windows)
    return {
        'recall': (n, len(windows)),
        'precision': (n, len(predicted)),
        'F1': (2 * n, len(predicted) + len(windows)),
    }


# --------------------------------------------------------------------------------------------------
# Points: is one inside a target?

def inside(x, y, polygon):
    """Whether a point is inside a polygon [[x, y], ..], by the even-odd rule: a ray from (x, y) to
    the right crosses the outline an odd number of times."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        # An edge can cross the ray only if one of its ends is above y and the other is not. It does
        # if the edge's x at height y is to the right of the point.
        spans_ray = (y1 > y) != (y2 > y)
        if spans_ray and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


def in_mask(x, y, mask):
    """Whether the pixel of a point is in a mask {'size': [height, width], 'runs': [..]}. The runs
    are lengths in pixels, in reading order: the first run is outside, the second inside, and so
    on."""
    height, width = mask['size']
    # A coordinate of exactly 1 is the picture's edge and belongs to the last row or column.
    row = min(int(y * height), height - 1)
    column = min(int(x * width), width - 1)
    # The number of runs that end at or before the pixel is the index of the run that holds it.
    run_ends = list(accumulate(mask['runs']))
    run = bisect_right(run_ends, row * width + column)
    return run % 2 == 1


def point_hits(point, target, radius=RADIUS):
    """Whether a predicted point {x, y, (t | image)} is in a target {x, y, (t | image), (mask |
    polygon | box)}.

    It must be in the target's mask, polygon or box [left, top, right, bottom], or within `radius`
    of a target that has none of them; in the same picture; and in a video within TIME_TOLERANCE
    seconds. A target that moves has its places at all times in `moments`, and one of them must be
    hit.
    """
    # A moving target's own x and y are those of one moment only, so its moments replace them.
    if target.get('moments'):
        for moment in target['moments']:
            if point_hits(point, moment, radius):
                return True
        return False

    if point.get('image', 0) != target.get('image', 0):
        return False
    if abs(point.get('t', 0) - target.get('t', 0)) > TIME_TOLERANCE:
        return False

    # The most exact outline that the target has decides.
    x = point['x']
    y = point['y']
    if target.get('mask'):
        return in_mask(x, y, target['mask'])
    if target.get('polygon'):
        return inside(x, y, target['polygon'])
    if target.get('box'):
        left, top, right, bottom = target['box']
        return left <= x <= right and top <= y <= bottom
    return (x - target['x']) ** 2 + (y - target['y']) ** 2 <= radius ** 2


def hit_indices(point, targets, radius):
    """Indices of the targets that a point is in."""
    return [j for j, target in enumerate(targets) if point_hits(point, target, radius)]


# --------------------------------------------------------------------------------------------------
# Points: matching and scores

def largest_matching(candidates):
    """The largest one-to-one matching of a bipartite graph, by augmenting paths (Kuhn 1955).

    candidates[i]: the targets that prediction i may be matched to, tried in this order -> {target:
    prediction}.
    """
    prediction_of = {}

    def augment(i, visited):
        """Matches prediction i, if need be by moving other predictions to another target."""
        for j in candidates[i]:
            if j in visited:
                continue
            visited.add(j)
            # Target j is free, or the prediction that has it can take another one.
            if j not in prediction_of or augment(prediction_of[j], visited):
                prediction_of[j] = i
                return True
        return False

    # One search from each prediction is enough, because a prediction without an augmenting path
    # does not get one later.
    for i in range(len(candidates)):
        augment(i, set())
    return prediction_of


def count_matches(points, targets, radius=RADIUS):
    """The number of target hits when each point counts for one target and each target for one
    point."""
    candidates = [hit_indices(point, targets, radius) for point in points]
    return len(largest_matching(candidates))


def pointing(text, targets, radius=RADIUS):
    """Hit rate (recall), precision and F1 of the points in an answer, matched one to one to the
    targets they are in.

        hit rate  = #matches / #targets
        precision = #matches / #points
        F1        = 2 #matches / (#targets + #points)

    'all right': every target is matched and no point is left over. Without targets the only figure
    is 'none there': whether the answer has no points.
    """
    points = parse_points(text)
    if not targets:
        return {'none there': (not points, 1)}
    # Two points in one target count as one hit, because the matching is one to one.
    n = count_matches(points, targets, radius)
    return {
        'hit rate': (n, len(targets)),
        'precision': (n, len(points)),
        'F1': (2 * n, len(targets) + len(points)),
        'all right': (n == len(targets) == len(points), 1),
    }


def all_inside(text, mask):
    """Accuracy of PointBench (Cheng et al. 2025): 1 if there is at least one point and every point
    is in the mask."""
    points = parse_points(text)
    # An answer without a point is wrong, although none of its points is outside.
    correct = bool(points)
    for point in points:
        if not in_mask(point['x'], point['y'], mask):
            correct = False
    return {'all inside': (correct, 1)}


# --------------------------------------------------------------------------------------------------
# Points: tracking

def split_frames(predictions, targets):
    """[(predictions, targets) of each frame]: the target times in order, then the times that only
    predictions have.

    A prediction belongs to the nearest target time, if that is within TIME_TOLERANCE. Any other
    prediction is a false positive, in a frame of its own time that has no targets.
    """
    times = sorted({target['t'] for target in targets})
    targets_by_time = {time: [] for time in times}
    predictions_by_time = {time: [] for time in times}
    unmatched_by_time = {}
    for target in targets:
        targets_by_time[target['t']].append(target)
    for prediction in predictions:
        # A prediction without a time counts as one at the start of the video.
        time = prediction.get('t', 0)
        nearest = min(times, key=lambda target_time: abs(target_time - time))
        if abs(nearest - time) <= TIME_TOLERANCE:
            predictions_by_time[nearest].append(prediction)
        else:
            unmatched_by_time.setdefault(time, []).append(prediction)

    # Every target time is a frame, even one without predictions, because its targets were missed.
    frames = [(predictions_by_time[time], targets_by_time[time]) for time in times]
    for unmatched in unmatched_by_time.values():
        frames.append((unmatched, []))
    return frames


def same_id_hits(predictions, targets, radius):
    """(number of targets hit by a prediction with the target's id, number of predictions that hit
    such a target)."""
    # The sets count a target once, however many predictions hit it, and likewise a prediction.
    hit_targets = set()
    hitting_predictions = set()
    for i, prediction in enumerate(predictions):
        for j, target in enumerate(targets):
            # The ids are compared first, because looking a point up in a mask takes longer.
            if prediction['id'] == target['id'] and point_hits(prediction, target, radius):
                hit_targets.add(j)
                hitting_predictions.add(i)
    return len(hit_targets), len(hitting_predictions)


def tracking(text, targets, radius=RADIUS):
    """Scores of predicted tracks. targets: the position {t, x, y, id, its outline} of each object
    at each time.

        inside     = targets hit by a prediction with the same id / targets
        precision  = predictions that hit a target with the same id / predictions
        F1         = mean over frames of 2 TP / (predictions + targets); ids do not matter
        DetA       = TP / (TP + FN + FP)
        AssA       = mean over TP of TPA / (TPA + FNA + FPA)
        HOTA       = sqrt(DetA x AssA)

    For a TP with predicted id a and target id b, TPA is the number of frames in which a and b are
    matched, FPA the number of other predictions with id a, FNA that of other targets with id b.

    Source: Luiten et al. 2021, in the steps of TrackEval's hota.py. HOTA is the mean over
    thresholds of the similarity; here the similarity is 1 inside a target and else 0, so every
    threshold gives the same value. One step differs: TrackEval maximizes the sum of alignments
    (step 1 below) with the Hungarian algorithm, and this code takes a largest matching that tries
    the pairs with the highest alignment first. Without targets the only figure is 'none there'.
    """
    predictions = parse_points(text)
    if not targets:
        return {'none there': (not predictions, 1)}
    frames = split_frames(predictions, targets)
    # The number of points of each id in the whole video.
    num_predictions = Counter(prediction['id'] for prediction in predictions)
    num_targets = Counter(target['id'] for target in targets)

    def association_iou(predicted_id, target_id, num_frames):
        """Frames in common over frames of either id: TPA / (TPA + FNA + FPA)."""
        union = num_predictions[predicted_id] + num_targets[target_id] - num_frames
        return num_frames / union

    # Step 1: the alignment of two ids over the whole video counts the frames in which one is in the
    # other, before anything is matched.
    frame_candidates = []                  # [frame][prediction] -> indices of the targets it is in
    aligned_frames = Counter()             # (predicted id, target id) -> frames
    for frame_predictions, frame_targets in frames:
        candidates = []
        id_pairs = set()
        for prediction in frame_predictions:
            hits = hit_indices(prediction, frame_targets, radius)
            candidates.append(hits)
            for j in hits:
                id_pairs.add((prediction['id'], frame_targets[j]['id']))
        frame_candidates.append(candidates)
        aligned_frames.update(id_pairs)

    def alignment(prediction, target):
        predicted_id = prediction['id']
        target_id = target['id']
        return association_iou(predicted_id, target_id, aligned_frames[predicted_id, target_id])

    # Step 2: match each frame by itself. The number of matches comes first; among equal ones, ids
    # with a high alignment are preferred, because `largest_matching` tries candidates in order.
    matched_frames = Counter()             # (predicted id, target id) -> frames matched
    f1 = 0.
    for (frame_predictions, frame_targets), candidates in zip(frames, frame_candidates):
        ordered = []                       # (highest alignment, prediction, its candidates)
        for prediction, hits in zip(frame_predictions, candidates):
            alignments = {j: alignment(prediction, frame_targets[j]) for j in hits}
            by_alignment = sorted(hits, key=alignments.get, reverse=True)
            # A prediction that is in no target has no alignment and comes last.
            ordered.append((max(alignments.values(), default=0), prediction, by_alignment))
        ordered.sort(key=lambda entry: entry[0], reverse=True)
        matching = largest_matching([by_alignment for _, _, by_alignment in ordered])
        for j, i in matching.items():
            prediction = ordered[i][1]
            matched_frames[prediction['id'], frame_targets[j]['id']] += 1
        num_points = len(frame_predictions) + len(frame_targets)
        f1 += 2 * len(matching) / max(1, num_points)

    # Step 3: detection accuracy. A match is a TP, an unmatched target a FN, an unmatched prediction
    # a FP, so that TP + FN + FP = targets + predictions - TP.
    true_positives = matched_frames.total()
    all_detections = len(predictions) + len(targets) - true_positives

    # Step 4: association accuracy. The n matches of a pair of ids all have the same association.
    associations = []
    for (predicted_id, target_id), n in matched_frames.items():
        associations.append(n * association_iou(predicted_id, target_id, n))
    association = sum(associations)

    # Step 5: HOTA of this video. Its denominator is 1, so many videos give the mean of their HOTAs.
    hota = 0.
    if true_positives:
        det_a = true_positives / all_detections
        hota = (det_a * association / true_positives) ** .5

    hit_targets, hitting_predictions = same_id_hits(predictions, targets, radius)
    return {
        'inside': (hit_targets, len(targets)),
        'precision': (hitting_predictions, len(predictions)),
        'F1': (f1, len(frames)),
        'DetA': (true_positives, all_detections),
        'AssA': (association, true_positives),
        'HOTA': (hota, 1),
    }


# --------------------------------------------------------------------------------------------------
# Which metric?

TEXT_METRICS = {               # a conversation's 'metric' -> function(text, references)
    'vqa': vqa_accuracy,
    'anls': anls,
    'relaxed': relaxed_accuracy,
    'exact': exact_match,
    'rouge': rouge_l,
}


def score(item, text, vocabulary=(), radius=RADIUS):
    """Scores {metric: (numerator, denominator)} of an answer `text` to an item of eval.py's
    `questions`.

    The item's 'metric' decides, then its mask, then its task; any other task is scored by exact
    match. vocabulary: object phrases for `object_f1`. radius: in [0, 1], for targets without
    outline. KeyError if the item lacks what its metric needs ('options' and 'right' for choice,
    'windows' for moments).
    """
    task = item['task']
    metric = item.get('metric')
    answers = item.get('answers')
    # What the data asks for comes first.
    if metric in TEXT_METRICS:
        return TEXT_METRICS[metric](text, answers)
    if metric == 'choice':
        return multiple_choice(text, item['options'], item['right'])
    if metric == 'moments':
        return moment_retrieval(text, item['windows'])
    if item.get('mask'):
        return all_inside(text, item['mask'])
    # Without a metric or a mask the task decides.
    if task == 'pointing':
        return pointing(text, item['points'], radius)
    if task == 'tracking':
        return tracking(text, item['points'], radius)
    if task == 'captioning':
        objects = item.get('objects')
        # An empty list of objects is a target, too: the caption must then name none.
        if objects is None:
            return rouge_l(text, answers)
        return object_f1(text, objects, vocabulary)
    if task == 'counting':
        return counting(text, item['reference'])
    return exact_match(text, answers)
