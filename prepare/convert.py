"""Rows of published datasets -> drafts of our records: a converter for each schema of rows.

    for draft in CONVERTERS['points'](row, 'pointing', random.Random('pixmo-points 17')):
        ...

A row is a dict as pyarrow, json or csv gives it. A draft is a record (see docs/data.md) whose media
are still to be fetched:

    images, video   {'url': .., 'sha256': .. or None}, {'path': in the archives} or {'bytes': ..}
    fps             of a video that is stored as pictures
    key             drafts with one key become one record, whose conversations are branches over the
                    same media; None: a record of its own

Points are fractions of the picture, or pixels where a message says 'pixels': True, because the
picture's size is not known yet. A row that cannot be used raises Skip. All random choices, as of
wordings and ties, come from `chance`, so that a row always gives the same record.

Columns, scales and limits are those that the loaders of allenai/molmo2 (olmo/data) use, and the
wordings are our own. Not in this file: the reading of tables (sources.py) and media (store.py).
"""
import ast
import itertools
import math
import re
from collections import Counter


class Skip(ValueError):
    """Why a row is left out, in two or three words, because the report counts rows by them."""


# --------------------------------------------------------------------------------------------------
# Wordings of questions that a dataset does not have. {} is the name of what is asked about.

CAPTION = (
    'Describe this image in detail.',
    'Write a long description of this picture.',
    'What does this image show? Be thorough.',
    'Give a detailed caption.',
    'Tell me everything you can see here.',
)
SPOKEN = (                     # for descriptions that were spoken
    'Describe the image as if you were talking to someone.',
    'Say out loud what you see in this picture.',
    'Talk me through this image.',
    'How would you describe this picture in speech?',
)
VIDEO_CAPTION = {              # by the name of the column
    'video_caption': (
        'Describe this video.',
        'What happens in this clip?',
        'Summarise the video.',
    ),
    'merged_caption': (
        'Describe the video in detail, from beginning to end.',
        'Give a thorough account of this clip.',
    ),
    'video_frame_merged_caption': (
        'Describe everything that can be seen in this video, moment by moment.',
        'Write the longest description of this clip that you can.',
    ),
    'aggregated_caption': (
        'Describe everything that happens in this video, with every detail.',
    ),
    'motion_caption': (
        'Describe the movements in this video.',
        'What moves here, and how?',
    ),
}
POINT = (
    'Point to every {}.',
    'Point at each {} in the image.',
    'Show me where the {} is, if there is any.',
    'Locate: {}.',
    'Mark all of these: {}.',
    'Where can I find {}? Point.',
    'pointing: {}',
)
COUNT = (
    'How many {} are there?',
    'Count the {}.',
    'What is the number of {} here?',
    'How many {} can you see?',
)
TRACK = (
    'Track the {}.',
    'Follow the {} through the video.',
    'Where is the {}, at every moment?',
    'Point to the {} in each frame.',
)
GROUND = (                     # for the first and the last moment only
    'Where does the {} first and last appear?',
    'Point to the {} when it is first seen and when it is last seen.',
)
FOLLOW = (                     # a point is given, and the rest is to be tracked
    'Track what is at this point:',
    'Follow the object marked here:',
    'Where does this go?',
)
NO_POINTS = (
    'Just answer, without pointing.',
    'No points, please.',
    'Give the number only in words or digits.',
    'You need not point.',
)
WHY = (
    'Explain your reasoning first, then give a short answer.',
    'Think step by step and finish with "Answer:".',
)
CHOOSE = (
    'Answer with the right option.',
    'Pick one.',
    'Which of these is it?',
    'Choose the correct option.',
)
LABEL = {                      # by the dataset's style
    'kinetics_label': ('What is the person doing?', 'Name the action in this clip.'),
    'moments_in_time_label': ('What is happening?', 'Which event is this?'),
    'coin_label': ('Which step is being done?', 'Name this step of the task.'),
    'activitynet_label': ('Which activity is shown?', 'What is going on here?'),
    'epic_kitchens_label': (
        'What does the cook do?', 'Describe the kitchen action in a few words.'),
    'youcook2_label': (
        'Which step of the recipe is this?', 'What is being cooked or prepared, and how?'),
    'charades_sta': (
        'What does the person do in this clip?', 'Describe the action in a sentence.'),
}
SECONDS = (
    'When does this happen: {}',
    'Find the moments of: {}',
    'At what times can this be seen? {}',
)

# These styles put their name in front of the question, as Molmo2 does. The model then answers
# briefly where a prompt has such a name, and not to every question.
PREFIXED = {'vqa2', 'text_vqa', 'okvqa', 'a_okvqa_da', 'chart_qa', 'doc_qa', 'info_qa', 'st_qa',
            'tally_qa', 'tabwmp_da', 'dv_qa', 'figure_qa', 'plot_qa', 'video_short_answer'}
PREFIXED |= set(LABEL)
# How answers of these styles are scored (extra/metrics.py); of the others, the task says it.
METRIC = {
    'vqa2': 'vqa', 'text_vqa': 'vqa', 'okvqa': 'vqa', 'a_okvqa_da': 'vqa',
    'chart_qa': 'relaxed',
    'doc_qa': 'anls', 'info_qa': 'anls', 'st_qa': 'anls',
}
COUNTING = re.compile(r'\b(how many|count|number of)\b', re.I)
MAX_POINTS = 60                # a row with more is left out, as in Molmo2
HELD_OUT = ('eval', 'video_eval')              # the beginnings of the evaluation sets' styles


# --------------------------------------------------------------------------------------------------
# Values of a row

def first_given(row, names, default=None):
    """The value of the first of these columns that is there and not None."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    return default


def first_filled(row, names, default=None):
    """The value of the first of these columns that is there and neither None, 0 nor empty."""
    for name in names:
        if row.get(name):
            return row[name]
    return default


def is_list(value):
    return isinstance(value, (list, tuple))


def clean(value):
    """A value as text, without NUL, broken bytes and the space around it; None becomes ''."""
    if value is None:
        return ''
    text = value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)
    text = text.encode('utf-8', 'replace').decode('utf-8').replace('\0', '').strip()
    # MMMU writes <image 1>, and data.py writes "Image 1" in front of the first of several pictures.
    return re.sub(r'<image (\d)>', r'Image \1', text)


def listed(value):
    """A value as a list, also if the list is written as text: "['a', 'b']"."""
    if isinstance(value, str) and value.lstrip().startswith('['):
        # Text that begins as a list and is none leaves no options to choose from.
        try:
            return list(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            raise Skip('broken options') from None
    return list(value) if value is not None else []


# --------------------------------------------------------------------------------------------------
# Conversations

def turn(role, content, **more):
    return {'role': role, 'content': content, **more}


def talk(task, prompt, answer, **more):
    """A conversation of one question and its answer. `more` is what the evaluation needs."""
    prompt = clean(prompt)
    answer = clean(answer)
    if not prompt:
        raise Skip('no question')
    if not answer:
        raise Skip('no answer')
    return {'task': task, 'messages': [turn('user', prompt), turn('assistant', answer)], **more}


def point_talk(task, prompt, points, label, **more):
    """A conversation of one question whose answer is points. `more` goes into the answer."""
    prompt = clean(prompt)
    if not prompt:
        raise Skip('no question')
    answer = turn('assistant', '', points={'label': clean(label), 'points': points}, **more)
    return {'task': task, 'messages': [turn('user', prompt), answer]}


def alternating(task, turns):
    """A conversation of turns that must alternate between user and assistant.

    A system message goes in front of the first question, because our records have no such role.
    """
    if turns and turns[0]['role'] == 'system':
        system, *turns = turns
        if turns and system['content']:
            first = turns[0]
            content = f"System: {system['content']}\n\n{first['content']}"
            turns[0] = turn(first['role'], content)
    roles = [message['role'] for message in turns]
    if not turns or roles != ['user', 'assistant'] * (len(turns) // 2):
        raise Skip('turns do not alternate')
    if not all(message['content'] for message in turns):
        raise Skip('empty turn')
    return {'task': task, 'messages': turns}


def asked(question, style, chance):
    """The prompt of a question.

    Some styles put their name in front (PREFIXED). Where people ask for a number, a wish for an
    answer without points goes in front, because the model would else learn to point at times only.
    """
    question = clean(question)
    if style in PREFIXED and question:
        return f'{style}: {question}'
    if style in ('user_qa', 'correction_qa') and COUNTING.search(question):
        return f'{chance.choice(NO_POINTS)} {question}'
    return question


# --------------------------------------------------------------------------------------------------
# Media

PICTURE = ('image_url', 'image', 'decoded_image', 'img_filename', 'image_filename',
           'image_local_name', 'imageName', 'file_path')
PICTURES = ('image_urls', 'images', 'image_list', 'input_image_path')
VIDEO = ('video', 'video_path', 'key', 'videoID', 'video_id', 'vid_name', 'video_name',
         'video_filename', 'vid_filename', 'vid', 'video_idx', 'video_uid', 'uid', 'visual_input',
         'rel_vid_path', 'gif_name', 'uni_clipped_id')
START = ('video_start', 'clip_start', 'clip_start_time', 'start')
END = ('video_end', 'clip_end', 'clip_end_time', 'end')


def media(value, sha256=None):
    """A medium of a URL, of a path, of bytes, or of the hub's {'bytes': .., 'path': ..}."""
    if isinstance(value, dict):
        value = value.get('bytes') or value.get('path')
    if isinstance(value, bytes) and value:
        return {'bytes': value}
    value = clean(value) if isinstance(value, str) else ''
    if not value:
        raise Skip('no media')
    if re.match(r'https?://', value):
        return {'url': value, 'sha256': sha256 or None}
    return {'path': value}


def times(row):
    """[start, end] in seconds of the part of a video that a row is about; None: the video's own."""
    if isinstance(row.get('ts'), str):         # TVQA: "12.5-40"
        both = row['ts'].split('-')
    else:
        both = [first_given(row, START), first_given(row, END)]
    seconds = []
    for t in both:
        # A time that is not a number counts as none, because some tables write NaN for it.
        is_finite = t is not None and math.isfinite(float(t))
        seconds.append(float(t) if is_finite else None)
    return seconds


def shown(row):
    """What a draft says of its media: images, or video with start and end, and the key."""
    # Several pictures in one column. Records are grouped by these only if they are URLs.
    values = first_filled(row, PICTURES)
    if values:
        images = [media(value) for value in (values if is_list(values) else [values])]
        urls = None
        if 'url' in images[0]:
            urls = ' '.join(image['url'] for image in images)
        return {'images': images, 'key': urls}

    # Several pictures in numbered columns, as BLINK and MMMU have them.
    numbered = [row.get(f'image_{i}') for i in range(1, 8)]
    numbered = [value for value in numbered if value]
    if numbered:
        return {'images': [media(value) for value in numbered], 'key': None}

    # One picture. A check sum in image_sha256 is that of the column image_url.
    for name in PICTURE:
        if row.get(name):
            sha256 = row.get('image_sha256') if name == 'image_url' else None
            image = media(row[name], sha256)
            return {'images': [image], 'key': image.get('url') or image.get('path')}
    if row.get('image_index') is not None:     # FigureQA and PlotQA
        path = f"png/{row['image_index']}.png"
        return {'images': [{'path': path}], 'key': path}

    if row.get('corrupt'):                     # the dataset itself says that the video is broken
        raise Skip('corrupt')
    # A video. Rows about different parts of one video make records of their own, because a record
    # has one start and one end.
    for name in VIDEO:
        video = clean(row.get(name))
        if video:
            start, end = times(row)
            found = {'video': media(video), 'key': f'{video} {start} {end}'}
            if start is not None:
                found['start'] = start
            if end is not None:
                found['end'] = end
            return found
    raise Skip('no media')


def draft(row, talks, **more):
    if not talks:
        raise Skip('no answer')
    return {**shown(row), 'conversations': list(talks), **more}


# --------------------------------------------------------------------------------------------------
# Points

def pairs(values):
    """[(x, y)] of [{x, y}], {x: [], y: []} or [[x, y]]; what is not a number is left out."""
    if isinstance(values, dict):
        values = zip(values.get('x') or (), values.get('y') or ())
    places = []
    for value in values or ():
        if isinstance(value, dict):
            places.append((value.get('x'), value.get('y')))
        elif value is not None:
            places.append(tuple(value))
    return [(float(x), float(y)) for x, y in places if is_number(x) and is_number(y)]


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def fractions(values, width=100., height=None, **more):
    """Points in [0, 1] of places in percent (width 100), thousandths (1000) or pixels.

    A place that is outside by up to a twentieth is moved to the border, and one that is farther
    outside raises Skip. `more` goes into each point.
    """
    points = []
    for i, (x, y) in enumerate(pairs(values), 1):
        x = x / width
        y = y / (height or width)
        if not (-.05 <= x <= 1.05 and -.05 <= y <= 1.05):
            raise Skip('point outside')
        x = min(max(x, 0.), 1.)
        y = min(max(y, 0.), 1.)
        points.append({'x': round(x, 4), 'y': round(y, 4), 'id': i, **more})
    return points


def few(points):
    """The points, unless they are more than MAX_POINTS."""
    if len(points) > MAX_POINTS:
        raise Skip(f'more than {MAX_POINTS} points')
    return points


# --------------------------------------------------------------------------------------------------
# Converters: (row, style, chance) -> drafts. The docstrings name the datasets and their columns.

def caption(row, style, chance):
    """pixmo-cap: image_url, caption, transcripts[].

    The transcripts are what people said of the picture; one of them is a second branch.
    """
    talks = [talk('captioning', chance.choice(CAPTION), row['caption'])]
    spoken = [clean(text) for text in row.get('transcripts') or ()]
    spoken = [text for text in spoken if text]
    if spoken:
        talks.append(talk('captioning', chance.choice(SPOKEN), chance.choice(spoken)))
    yield draft(row, talks)


def qa(row, style, chance):
    """A question and its answer: pixmo-ask-model-anything and many others.

    Rows with options to choose from (MathVista, TGIF-QA) go to `choice`.
    """
    has_options = listed(row.get('choices')) or clean(row.get('a1'))
    if has_options and style != 'tabwmp_da':
        yield from choice(row, style, chance)
        return
    question = row.get('question', row.get('Question'))
    answer = row.get('answer', row.get('Answer', row.get('GT')))
    yield draft(row, [talk('qa', asked(question, style, chance), answer)])


def tagged_qa(row, style, chance):
    """pixmo-cap-qa: question, a dialogue with the marks [USER] and [ASSISTANT]; answer.

    All answers of the dialogue are trained on.
    """
    # The split gives the text before the first mark, then a role and its text in turn.
    parts = re.split(r'\[(USER|ASSISTANT)\]', clean(row['question']))
    turns = []
    for role, text in zip(parts[1::2], parts[2::2]):
        turns.append(turn(role.lower(), text.strip()))
    if not turns:
        turns.append(turn('user', parts[0]))
    if turns[-1]['role'] == 'assistant' and not turns[-1]['content']:
        turns.pop()
    turns.append(turn('assistant', clean(row['answer'])))
    yield draft(row, [alternating('qa', turns)])


def messages(row, style, chance):
    """Chat: messages[{role, content}] (Tulu).

    allenai/molmo2-tulu4-classified has flags and categories too, by which rows are left out.
    """
    if row.get('empty_messages') or row.get('has_special_token'):
        raise Skip('flagged')
    # Code, other languages and puzzles are no part of the mixture.
    if row.get('category') in ('code', 'non-english'):
        raise Skip('category')
    if re.search(r'puzzle|verifiable|hard.?coded', row.get('source') or ''):
        raise Skip('category')
    if (row.get('first_message_qwen3_tokens') or 0) > 4096:
        raise Skip('long question')
    turns = []
    for message in row.get('messages') or ():
        turns.append(turn(clean(message.get('role')), clean(message.get('content'))))
    yield {'images': [], 'key': None, 'conversations': [alternating('text', turns)]}


def llava(row, style, chance):
    """LLaVA: conversations[{from, value}]. About a video, each question becomes a branch."""
    # The marks <image> and <video> are removed, because data.py puts all media in front.
    roles = {'human': 'user', 'gpt': 'assistant'}
    turns = []
    for message in row.get('conversations') or ():
        role = message.get('from')
        content = re.sub(r'<(image|video)>', '', clean(message.get('value'))).strip()
        turns.append(turn(roles.get(role, role), content))
    dialogue = alternating('qa', turns)
    if first_filled(row, VIDEO) is None:
        yield draft(row, [dialogue])
        return
    turns = dialogue['messages']
    talks = []
    for question, answer in zip(turns[::2], turns[1::2]):
        prompt = asked(question['content'], style, chance)
        talks.append(talk('qa', prompt, answer['content']))
    yield draft(row, talks)


def hardcodes(row, style, chance):
    """questions[], response, images[]: who the model is, whatever picture it is shown."""
    # The answer does not depend on the picture, so these records are not grouped by it.
    images = [media(value) for value in row.get('images') or ()]
    task = 'qa' if row.get('images') else 'text'
    talks = [talk(task, question, row['response']) for question in row['questions']]
    yield {'images': images, 'key': None, 'conversations': talks}


def points(row, style, chance):
    """Points that are pointed at and counted.

    pixmo-points: points[{x, y}] in percent, although its card says pixels; label.
    pixmo-count: points{x[], y[]} in pixels, count, label. Its held-out splits have a count without
    points, which is only counted.
    """
    label = clean(row['label']).lower()
    places = pairs(row.get('points'))
    if not label:
        raise Skip('no label')
    count = row.get('count')
    in_pixels = isinstance(row.get('points'), dict)
    talks = []
    # Where the count is 0, the answer to "point" is that there are none.
    if places or not count:
        if in_pixels:
            found = [{'x': x, 'y': y, 'id': i} for i, (x, y) in enumerate(few(places), 1)]
        else:
            found = fractions(few(places))
        more = {'pixels': True} if in_pixels and found else {}
        prompt = chance.choice(POINT).format(label)
        talks.append(point_talk('pointing', prompt, found, label, **more))
    # The points themselves are counted where there are any, so that both answers agree.
    number = len(places) if places or count is None else int(count)
    talks.append(talk('counting', chance.choice(COUNT).format(label), str(number)))
    yield draft(row, talks)


def question_points(row, style, chance):
    """CoSyn-point: image, questions[], answer_points[{x[], y[]}] in percent, names[]."""
    talks = []
    for question, places, name in zip(row['questions'], row['answer_points'], row['names']):
        found = fractions(few(pairs(places)))
        talks.append(point_talk('pointing', question, found, name))
    yield draft(row, talks)


def explained_points(row, style, chance):
    """pixmo-point-explanations: question, response with marks, points[{x, y}] in percent.

    The marks in the response stand for points; they are removed.
    """
    answer = re.sub(r'<[^<>]*>', '', clean(row['response'])).strip()
    places = []
    for value in row.get('points') or ():
        places += value if is_list(value) else [value]
    conversation = talk('qa', row['question'], answer)
    found = fractions(few(pairs(places)))
    conversation['messages'][1]['points'] = {'label': '', 'points': found}
    yield draft(row, [conversation])


def several_points(row, style, chance):
    """Molmo2-MultiImagePoint: image_urls[], labels[], points in percent.

    The points are [label][image][{x, y}], or [image][{x, y}] of the only label, or [label][{x, y}]
    on the only image.
    """
    labels = row.get('labels') or []
    places = row.get('points') or []
    several = len(row.get('image_urls') or row.get('images')) > 1
    entries = itertools.chain.from_iterable(values or () for values in places)
    if all(isinstance(entry, dict) for entry in entries):      # there is one level less
        if several and len(labels) > 1:
            raise Skip('points without image')
        places = [places] if several else [[values] for values in places]
    talks = []
    for label, by_image in zip(labels, places):
        label = clean(label).lower()
        found = []
        for i, values in enumerate(by_image):
            more = {'image': i} if several else {}
            found += fractions(values, **more)
        number_from_one(few(found))
        prompt = chance.choice(POINT).format(label)
        talks.append(point_talk('pointing', prompt, found, label))
        talks.append(talk('counting', chance.choice(COUNT).format(label), str(len(found))))
    yield draft(row, talks)


def number_from_one(points):
    """Gives points the ids 1, 2, .. in place."""
    for i, point in enumerate(points, 1):
        point['id'] = i


def explained_qa(row, style, chance):
    """CoSyn-400K, Molmo2-SynMultiImageQA and Molmo2-MultiImageQA.

    qa_pairs{question[], explanation[], answer[]}. Styles that end in _exp ask for the explanation.
    """
    if len(row.get('images') or row.get('image_urls') or ()) > 5:
        raise Skip('more than 5 images')
    columns = row['qa_pairs']
    if is_list(columns):       # some writers turn a struct of lists into a list of structs
        structs = columns
        columns = {}
        for key in ('question', 'explanation', 'answer'):
            columns[key] = [struct.get(key) for struct in structs]
    reasons = columns.get('explanation') or [None] * len(columns['question'])
    talks = []
    for question, reason, answer in zip(columns['question'], reasons, columns['answer']):
        if style.endswith('_exp') and clean(reason):
            topic = style.removesuffix('_exp')
            prompt = f'{topic}: {clean(question)} {chance.choice(WHY)}'
            talks.append(talk('qa', prompt, f'{clean(reason)}\nAnswer: {clean(answer)}'))
        else:
            talks.append(talk('qa', asked(question, style, chance), answer))
    yield draft(row, talks)


def items(row):
    """The questions of a row as dicts: the row itself, or a list in one of its columns."""
    names = ('message_list', 'qas', 'questions', 'qa_pairs', 'qa', 'examples', 'mc_qa_list',
             'mc_question')
    for name in names:
        value = row.get(name)
        if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
            # AI2D: {question: what else belongs to it}
            return [{'question': question, **item} for question, item in value.items()]
        if is_list(value) and value and isinstance(value[0], dict):
            return value
    return [row]


def each(row, make):
    """What `make` makes of each question of a row.

    Questions that raise Skip are left out. If none is left, the last reason is raised.
    """
    talks = []
    reason = Skip('no answer')
    for item in items(row):
        try:
            talks.append(make(item))
        except Skip as e:
            reason = e
    if not talks:
        raise reason
    return talks


def vqa(row, style, chance):
    """Short answers, of one person or of ten.

    Of several answers the most frequent is trained on; ties are drawn. VQA v2, TextVQA, OK-VQA,
    A-OKVQA (direct), ChartQA, DocVQA, InfographicVQA, ST-VQA, DVQA, FigureQA, PlotQA, TallyQA and
    RoadTextVQA.
    """
    def make(item):
        names = ('question', 'query', 'raw_question', 'question_string')
        question = first_filled(item, names, '')
        answers = short_answers(item)
        if style == 'figure_qa':               # it answers with 0 and 1
            words = {'0': 'no', '1': 'yes'}
            answers = [words.get(answer, answer) for answer in answers]
        counts = Counter(answer for answer in answers if answer)
        if not counts:
            raise Skip('no answer')
        most = max(counts.values())
        best = sorted(answer for answer, count in counts.items() if count == most)
        answer = chance.choice(best)

        task = 'counting' if style in ('tally_qa', 'point_count', 'video_count') else 'qa'
        more = {}
        if style in METRIC:
            more['metric'] = METRIC[style]
        # Ten equal answers matter to a metric only, which compares with how many people agree.
        if len(counts) > 1 or len(answers) > 1 and style in METRIC:
            more['answers'] = answers
        return talk(task, asked(question, style, chance), answer, **more)

    yield draft(row, each(row, make))


def short_answers(item):
    """The answers to a question as a list of texts, whatever form they have."""
    names = ('answers', 'direct_answers', 'label', 'answer', 'raw_answer', 'count')
    value = first_given(item, names, [])
    values = listed(value) if is_list(value) or str(value).startswith('[') else [value]
    answers = []
    for answer in values:
        if isinstance(answer, dict):
            answer = answer.get('raw_answer', answer.get('answer'))
        answers.append(clean(answer))
    return answers


def options_of(item, chance):
    """(question, options, index of the right one) of a choice, in all forms that datasets use.

    The forms are: wrong answers and the right one; a list of options with the index, letter or text
    of the right one; options in numbered columns; options below the question; and options that say
    of themselves whether they are right. Raises Skip if no option is right.
    """
    names = ('question', 'Question', 'q', 'q_body', 'mc_question', 'prompt', '5')
    question = first_filled(item, names, '')
    hint = clean(item.get('hint'))
    if hint:
        question = f'{hint}\n{clean(question)}'

    # Some datasets list the wrong answers; How2QA has them in its columns 2 to 4.
    wrong = item.get('NegativeAnswers') or [item[key] for key in ('2', '3', '4') if key in item]
    if wrong:                  # the right answer is put among them
        options = [clean(option) for option in listed(wrong)]
        right = chance.randrange(len(options) + 1)
        options.insert(right, clean(item.get('Answer', item.get('6'))))
        return question, options, right

    names = ('choices', 'options', 'option', 'candidates', 'answer_texts', 'answerTexts')
    # Here None means that there is no such column, and an empty list that the options are text.
    options = first_given(item, names)
    options = numbered_options(item) if options is None else listed(options)
    if not options:
        question, options = options_below(clean(question))

    names = ('answer_idx', 'answer_id', 'correct_choice', 'correct_choice_idx', 'correct_answer',
             'correctAnswer', 'answer', 'output', 'Answer', 'answer_key_position')
    answer = first_given(item, names)
    if options and isinstance(options[0], dict):       # CLEVRER and STAR: {choice, answer}
        answer = right_by_itself(options, item.get('answer'))
        options = [option.get('choice') for option in options]
    options = without_letters([clean(option) for option in options])
    return question, options, right_index(options, answer)


def numbered_options(item):
    """The options in columns a0, a1, .. or option0, option1, .., as far as they are filled."""
    options = []
    for form in ('a{}', 'option{}'):
        for i in range(10):
            option = item.get(form.format(i))
            if clean(option):
                options.append(option)
    return options


def options_below(question):
    """(question, options) of a question with options below it, one a line, each with its letter.

    LVBench, MotionBench, TempCompass and others.
    """
    question, *rest = re.split(r'\n\s*(?=\(?A[.):])', question, maxsplit=1)
    options = []
    if rest:
        for line in rest[0].splitlines():
            line = line.strip()
            if not line:
                continue
            if not re.match(r'\(?[A-Z][.):]', line):
                break
            options.append(line)
    return question, options


def right_by_itself(options, answer):
    """The index of the only option that says it is right, None if several do, else `answer`."""
    right = []
    for i, option in enumerate(options):
        if clean(option.get('answer')).lower() in ('correct', 'true', '1'):
            right.append(i)
    if not right:
        return answer
    return right[0] if len(right) == 1 else None


def without_letters(options):
    """Options without the letters in front of them, if all have them in order: A. B. C."""
    plain = []
    for i, option in enumerate(options):
        letter = re.match(r'\(?([A-Za-z])[.):]\s*', option)
        if not letter or letter[1].upper() != chr(65 + i):
            return options
        plain.append(clean(option[letter.end():]))
    return plain


def right_index(options, answer):
    """The index of the right option, by an answer that is its index, its letter or its text."""
    # A number is always an index, even where an option is the same number as text.
    text = clean(answer)
    if text in options and not isinstance(answer, (int, float)):
        return options.index(text)
    index = -1
    letter = re.fullmatch(r'\(?([A-Z])(?:[.):].*)?', text, re.S)
    if re.fullmatch(r'\d+(\.0)?', text):
        index = int(float(text))
    elif letter:
        index = ord(letter[1]) - 65
    if not 0 <= index < len(options):
        raise Skip('no right option')
    return index


def choose(question, options, right, style, chance):
    """(prompt, answer): a question with options, and the right one as it is to be answered.

    Evaluation sets get the plain layout: A. B. C., answered with letter and text. Training sets get
    many layouts, so that the model answers in the form that a prompt shows.
    """
    question = clean(question)
    if not question:
        raise Skip('no question')
    if len(options) < 2 or not options[right]:
        raise Skip('no right option')
    # The shares below are those of Molmo2. A tenth of the training questions has the plain layout.
    plain = style.startswith(HELD_OUT) or chance.random() < .1
    if plain:
        labels = labels_of('A', len(options))
        lines = [f'{label}. {option}' for label, option in zip(labels, options)]
        prompt = '\n'.join([question, 'Only give the right option.', *lines])
        return prompt, lines[right]

    labels = labels_of(chance.choice('Aa1i'), len(options))
    mark = chance.choice(('{}. {}', '{}) {}', '{}: {}', '({}) {}'))
    # A fifth has no labels, so the option's text is the answer. Of the others a quarter is answered
    # with the label alone, and the rest with label and text.
    if chance.random() < .2:
        lines = options
        answer = options[right]
    else:
        lines = [mark.format(label, option) for label, option in zip(labels, options)]
        answer = labels[right] if chance.random() < .25 else lines[right]
    # A tenth has all options in one line, and a half says what to do with them.
    separator = ' ' if chance.random() < .1 else '\n'
    wish = ''
    if chance.random() < .5:
        wish = f'{chance.choice(CHOOSE)}\n'
    return f'{question}\n{wish}{separator.join(lines)}', answer


def labels_of(kind, number):
    """The labels of `number` options: A B C, a b c, 1 2 3 or i ii iii."""
    letters = [chr(65 + i) for i in range(number)]
    if kind == 'A':
        return letters
    if kind == 'a':
        return [letter.lower() for letter in letters]
    roman = ['i', 'ii', 'iii', 'iv', 'v', 'vi', 'vii', 'viii', 'ix', 'x']
    if kind == 'i' and number <= len(roman):
        return roman[:number]
    return [str(i + 1) for i in range(number)]


def choice(row, style, chance):
    """Questions with options, in the forms of `options_of`. Subtitles stand before all branches."""
    if is_list(row.get('mc_question')) and items(row) == [row]:
        # Mantis has parallel lists of questions, options and right indices.
        questions = []
        for question, options, right in zip(
                row['mc_question'], row['choices'], row['correct_choice_idx']):
            questions.append({'question': question, 'choices': options, 'answer_idx': right})
        row = {**row, 'questions': questions}

    def make(item):
        if item.get('abcLabel'):               # AI2D: letters that are not in the picture
            raise Skip('letters are to be drawn')
        if 'hint' in row:
            item = {'hint': row['hint'], **item}
        question, options, right = options_of(item, chance)
        prompt, answer = choose(question, options, right, style, chance)
        more = {}
        if style.startswith(HELD_OUT):
            more = {'metric': 'choice', 'options': options, 'right': right}
        answers = sorted({answer, options[right]})
        return talk('qa', prompt, answer, answers=answers, **more)

    yield draft(row, each(row, make), **subtitles(row))


def subtitles(row):
    """{'subtitles': [{start, end, text}]} of a row that has them, else {}."""
    cues = row.get('subtitle') or row.get('subtitles')
    if not is_list(cues):
        return {}
    found = []
    for cue in cues:
        start = float(cue['start'])
        end = float(cue['end'])
        found.append({'start': start, 'end': end, 'text': clean(cue['text'])})
    return {'subtitles': [cue for cue in found if cue['text']]}


def clevrer(row, style, chance):
    """CLEVRER: video_filename, questions[{question, answer}] or [{question, choices[..]}].

    Of the questions with choices [{choice, answer}] only those with one right option are kept.
    """
    talks = []
    for item in row['questions']:
        choices = item.get('choices')
        if not choices:
            prompt = asked(item.get('question'), 'video_short_answer', chance)
            talks.append(talk('qa', prompt, item.get('answer')))
            continue
        verdicts = [clean(option.get('answer')) for option in choices]
        if verdicts.count('correct') == 1:
            question, options, right = options_of(item, chance)
            prompt, answer = choose(question, options, right, 'video_multiple_choice', chance)
            talks.append(talk('qa', prompt, answer))
    yield draft(row, talks)


def funqa(row, style, chance):
    """FunQA: task, visual_input, instruction, output.

    The tasks H1, C1, M1, C4 and C5 are left out, because their answers are times.
    """
    if row.get('task') in ('H1', 'C1', 'M1', 'C4', 'C5'):
        raise Skip('task')
    yield draft(row, [talk('qa', asked(row['instruction'], style, chance), row['output'])])


def label(row, style, chance):
    """A clip and the name of what is done in it. The question is one of LABEL.

    Charades-STA has lines of text: "video start end##what".
    """
    if 'line' in row:
        place, _, answer = row['line'].partition('##')
        row = dict(zip(('video', 'start', 'end'), place.split()))
        row['label'] = answer
    answer = clean(row.get('label', row.get('narration', row.get('sentence'))))
    answer = answer.replace('+', ' ')          # Moments in Time writes so
    start, end = times(row)
    if start is not None and end is not None and end <= start:
        raise Skip('empty clip')
    question = chance.choice(LABEL[style])
    yield draft(row, [talk('qa', asked(question, style, chance), answer)])


def segments(row, style, chance):
    """COIN, YouCook2 and ActivityNet: video_id, annotations[{segment [start, end], ..}].

    Each segment, with its label or sentence, becomes a clip.
    """
    for item in row.get('annotations', row.get('annotation')):
        start, end = item['segment']
        clip = {'video': row['video_id'], 'start': start, 'end': end, **item}
        yield from label(clip, style, chance)


def antonym(row, style, chance):
    """Paxion: is this done in the video, or its contrary?

    Of Something-Something: rel_vid_path, label, label_action_antonym_clip_text. Of Ego4D:
    video_uid, clip_start, clip_end, clip_text ("#C C cuts the bread"), action_antonym_clip_text.
    """
    done = row.get('label', row.get('clip_text'))
    contrary = row.get('label_action_antonym_clip_text', row.get('action_antonym_clip_text'))
    done = re.sub(r'^#\S\s*', '', clean(done))
    contrary = re.sub(r'^#\S\s*', '', clean(contrary))
    options = chance.sample([done, contrary, 'Not sure'], 3)
    question = 'Which of these is done in the video?'
    prompt, answer = choose(question, options, options.index(done), style, chance)
    yield draft(row, [talk('qa', prompt, answer)])


def repetitions(row, style, chance):
    """Countix: video_path, class, count."""
    question = f"How many times is this done: {clean(row['class'])}?"
    yield draft(row, [talk('counting', asked(question, style, chance), row['count'])])


def problems(row, style, chance):
    """TabMWP: {number: question, answer, choices, ..}; the picture is number.png."""
    picture = {'image': f"{row['video_id']}.png"}
    yield draft(picture, [talk('qa', asked(row['question'], style, chance), row['answer'])])


def video_caption(row, style, chance):
    """Molmo2-Cap and MotionBench: the columns of VIDEO_CAPTION, and annotation_score."""
    if row.get('annotation_score') is not None and row['annotation_score'] < 3:
        raise Skip('low score')
    talks = []
    for name, prompts in VIDEO_CAPTION.items():
        if clean(row.get(name)):
            talks.append(talk('captioning', chance.choice(prompts), row[name]))
    yield draft(row, talks)


def actor_captions(row, style, chance):
    """video, actor_names[], captions[]: one branch for each actor."""
    talks = []
    for name, text in zip(row['actor_names'], row['captions']):
        question = f'Describe what the {clean(name).lower()} does.'
        talks.append(talk('captioning', question, text))
    yield draft(row, talks)


def moments(row, style, chance):
    """QVHighlights: vid, query, relevant_windows[[start, end]] in seconds."""
    windows = row.get('relevant_windows') or []
    if not 1 <= len(windows) <= 5:
        raise Skip('windows')
    intervals = [f'[{float(start):g}-{float(end):g}]' for start, end in windows]
    answer = 'Segments: ' + ', '.join(intervals)
    question = chance.choice(SECONDS).format(clean(row['query']))
    yield draft(row, [talk('qa', question, answer, metric='moments', windows=windows)])


def video_points(row, style, chance):
    """Points at certain times of a video.

    Molmo2-VideoPoint: label, count, points[[{x, y}]] in percent for each of two_fps_timestamps.
    These are seconds of the whole video; clip_start to clip_end of it is shown, or all of it if
    video_duration is 63 seconds at most. The academic datasets have category, timestamps and
    clip_start_time. The held-out set has points[{x, y}] in pixels, with width and height.
    """
    name = clean(row.get('label', row.get('category'))).lower()
    width = row.get('width') or 100.
    height = row.get('height') or 100.
    if (row.get('video_duration') or math.inf) <= 63:
        row = {key: value for key, value in row.items() if not key.startswith('clip_')}
    start = times(row)[0] or 0.
    timestamps = row.get('two_fps_timestamps', row.get('timestamps')) or ()
    found = []
    for t, values in zip(timestamps, row.get('points') or ()):
        values = values if is_list(values) else [values]
        seconds = round(float(t) - start, 2)   # from the beginning of what is shown
        found += fractions(values, width, height, t=seconds)
    if any(point['t'] < 0 for point in found):
        raise Skip('point outside')
    number_from_one(few(found))
    talks = [point_talk('pointing', chance.choice(POINT).format(name), found, name)]
    if row.get('count') is not None:
        question = clean(row.get('question')) or chance.choice(COUNT).format(name)
        talks.append(talk('counting', question, str(int(row['count']))))
    yield draft(row, talks)


def track(row, style, chance):
    """molmo2-track-instruction and its like: an object in all frames of a video.

    expression, frame_trajectories[{time, points[{id, point [x, y] in pixels, occluded}]}], width,
    height. A box (bbox [x, y, w, h]) counts as its middle. The style says what is asked for: all
    points; the first and the last of each object ("ground"); or all after a point that is given
    ("single").
    """
    name = clean(row.get('expression', row.get('exp')))
    if not (row.get('width') and row.get('height')):
        raise Skip('no size')
    found = track_points(row)
    if not found:
        raise Skip('no points')
    if 'single' in style:
        first, rest = follow_one(found, chance)
        conversation = point_talk('tracking', chance.choice(FOLLOW), rest, name)
        conversation['messages'][0]['points'] = {'label': name, 'points': [first]}
    elif 'ground' in style:
        prompt = chance.choice(GROUND).format(name)
        conversation = point_talk('tracking', prompt, first_and_last(found), name)
    else:
        prompt = chance.choice(TRACK).format(name)
        conversation = point_talk('tracking', prompt, found, name)
    yield draft(row, [conversation], fps=row.get('fps'))


def track_points(row):
    """The points of all visible objects of a track, numbered in the order of appearance."""
    found = []
    numbers = {}               # id in the row -> our number
    for frame in row.get('frame_trajectories') or ():
        visible = []
        for point in frame['points']:
            place = point.get('point')
            box = point.get('bbox')
            if not place and box:
                place = (box[0] + box[2] / 2, box[1] + box[3] / 2)
            if not place or point.get('occluded'):
                continue
            t = round(float(frame['time']), 2)
            for fraction in fractions([place], row['width'], row['height'], t=t):
                fraction['id'] = point['id']
                visible.append(fraction)
        # Those that appear in the same frame are numbered from left to right.
        visible.sort(key=lambda point: point['x'])
        for point in visible:
            point['id'] = numbers.setdefault(point['id'], len(numbers) + 1)
            found.append(point)
    return found


def follow_one(found, chance):
    """(a point of one object, its later points), all with the id 1."""
    # An object can be followed from any point that is not its last one.
    last = {point['id']: point['t'] for point in found}
    starts = [point for point in found if point['t'] < last[point['id']]]
    if not starts:             # no object is seen twice
        raise Skip('no points')
    first = starts[0] if chance.random() < .8 else chance.choice(starts)
    rest = []
    for point in found:
        if point['id'] == first['id'] and point['t'] > first['t']:
            rest.append(point)
    for point in [first, *rest]:
        point['id'] = 1
    return first, rest


def first_and_last(found):
    """The first and the last point of each object, in the order of time and number."""
    ends = {}                  # id -> [first point] or [first point, last point]
    for point in found:
        earlier = ends.get(point['id'], [])
        ends[point['id']] = [*earlier[:1], point]
    points = [point for both in ends.values() for point in both]
    return sorted(points, key=lambda point: (point['t'], point['id']))


def box_point(row, style, chance):
    """Screens: instruction, bbox or box_coordinates in pixels.

    A box is [x, y, width, height], or [left, top, right, bottom] where the style ends in "corners".
    More than four numbers are a polygon, a list of x, y. The middle of the box is the point, and
    the box itself stays for scoring.
    """
    box = [float(value) for value in row.get('bbox') or row.get('box_coordinates') or ()]
    if len(box) < 4:
        raise Skip('no box')
    if len(box) > 4:
        xs = box[::2]
        ys = box[1::2]
        box = [min(xs), min(ys), max(xs), max(ys)]
    elif not style.endswith('corners'):
        x, y, width, height = box
        box = [x, y, x + width, y + height]
    left, top, right, bottom = box
    middle = {'x': (left + right) / 2, 'y': (top + bottom) / 2, 'id': 1}
    conversation = point_talk('pointing', row['instruction'], [middle], '', pixels=True)
    yield draft(row, [{**conversation, 'box': box}])


def runs(mask):
    """A mask [height, width] of truths as metrics.in_mask reads it.

    Its pixels in reading order are runs: so many outside, then so many inside, and so on.
    """
    pixels = (bool(value) for line in mask for value in line)
    lengths = [len(list(group)) for _, group in itertools.groupby(pixels)]
    # If the first pixel is inside, the run outside before it has length 0.
    lengths = [0] * int(mask[0][0]) + lengths
    return {'size': [len(mask), len(mask[0])], 'runs': lengths}


def mask_point(row, style, chance):
    """PointBench and pixmo-points-eval: user_input or label, and a mask that points must hit.

    The mask is a file's name, or there is one of truths for each point.
    """
    found = fractions(few(pairs(row.get('points'))))
    for point, mask in zip(found, row.get('masks') or ()):
        point['mask'] = runs(mask)
    prompt = row.get('user_input')
    if not prompt:
        prompt = chance.choice(POINT).format(clean(row.get('label')).lower())
    conversation = point_talk('pointing', prompt, found, row.get('label'))
    if row.get('mask_filename'):
        conversation['mask'] = row['mask_filename']
    yield draft(row, [conversation])


def clocks(row, style, chance):
    """A picture of a clock and text, what a person would say; pixmo-clocks brings no pictures."""
    yield draft(row, [talk('qa', 'What time does the clock show?', row['text'])])


# The column `converter` of datasets.csv has these names.
CONVERTERS = {converter.__name__: converter for converter in (
    caption, qa, tagged_qa, messages, llava, hardcodes, points, question_points, explained_points,
    several_points, explained_qa, vqa, choice, clevrer, funqa, label, segments, antonym,
    repetitions, problems, video_caption, actor_captions, moments, video_points, track, box_point,
    mask_point, clocks)}
