"""Rows of published datasets -> records of ours (docs/data.md): a converter for each source schema, not for each set.

    for draft in CONVERTERS['points'](row, 'pointing', random.Random('pixmo-points 17')):
        ...

A row is a dict as pyarrow, json or csv gives it. A draft is a record whose media are still to be fetched:

    images, video   {'url': .., 'sha256': .. or None}, {'path': a file of the set's archives} or {'bytes': ..}
    fps             of a video that is stored as pictures
    key             drafts with one key become one record, branches over the same media; None: a record of its own

Points are fractions of the picture, or pixels where a message says 'pixels': True, until the picture's size is known.
Rows that cannot be used raise Skip, which says why. What is random (wordings, places of right options, ties) is drawn
from `chance`, so that a row always gives the same record. Columns and scales are those that the loaders of
allenai/molmo2 (olmo/data) read; wordings are our own.
"""
import ast
import itertools
import math
import re
from collections import Counter


class Skip(ValueError):
    """Why a row is left out, in two or three words to count by."""


# -- wordings

CAPTION = ('Describe this image in detail.', 'Write a long description of this picture.', 'What does this image show? Be '
           'thorough.', 'Give a detailed caption.', 'Tell me everything you can see here.')
SPOKEN = ('Describe the image as if you were talking to someone.', 'Say out loud what you see in this picture.',
          'Talk me through this image.', 'How would you describe this picture in speech?')
VIDEO_CAPTION = {
    'video_caption': ('Describe this video.', 'What happens in this clip?', 'Summarise the video.'),
    'merged_caption': ('Describe the video in detail, from beginning to end.', 'Give a thorough account of this clip.'),
    'video_frame_merged_caption': ('Describe everything that can be seen in this video, moment by moment.',
                                   'Write the longest description of this clip that you can.'),
    'aggregated_caption': ('Describe everything that happens in this video, with every detail.',),
    'motion_caption': ('Describe the movements in this video.', 'What moves here, and how?')}
POINT = ('Point to every {}.', 'Point at each {} in the image.', 'Show me where the {} is, if there is any.',
         'Locate: {}.', 'Mark all of these: {}.', 'Where can I find {}? Point.', 'pointing: {}')
COUNT = ('How many {} are there?', 'Count the {}.', 'What is the number of {} here?', 'How many {} can you see?')
TRACK = ('Track the {}.', 'Follow the {} through the video.', 'Where is the {}, at every moment?',
         'Point to the {} in each frame.')
GROUND = ('Where does the {} first and last appear?', 'Point to the {} when it is first seen and when it is last seen.')
FOLLOW = ('Track what is at this point:', 'Follow the object marked here:', 'Where does this go?')
NO_POINTS = ('Just answer, without pointing.', 'No points, please.', 'Give the number only in words or digits.',
             'You need not point.')
WHY = ('Explain your reasoning first, then give a short answer.', 'Think step by step and finish with "Answer:".')
CHOOSE = ('Answer with the right option.', 'Pick one.', 'Which of these is it?', 'Choose the correct option.')
LABEL = {
    'kinetics_label': ('What is the person doing?', 'Name the action in this clip.'),
    'moments_in_time_label': ('What is happening?', 'Which event is this?'),
    'coin_label': ('Which step is being done?', 'Name this step of the task.'),
    'activitynet_label': ('Which activity is shown?', 'What is going on here?'),
    'epic_kitchens_label': ('What does the cook do?', 'Describe the kitchen action in a few words.'),
    'youcook2_label': ('Which step of the recipe is this?', 'What is being cooked or prepared, and how?'),
    'charades_sta': ('What does the person do in this clip?', 'Describe the action in a sentence.')}
SECONDS = ('When does this happen: {}', 'Find the moments of: {}', 'At what times can this be seen? {}')

# recipe.md, section 10: these styles put their name in front of the question, so that a short answer is on request
PREFIXED = {'vqa2', 'text_vqa', 'okvqa', 'a_okvqa_da', 'chart_qa', 'doc_qa', 'info_qa', 'st_qa', 'tally_qa', 'tabwmp_da',
            'dv_qa', 'figure_qa', 'plot_qa', 'video_short_answer'} | set(LABEL)
# how held-out answers are scored (extra/metrics.py), where the task does not say it
METRIC = dict.fromkeys(('vqa2', 'text_vqa', 'okvqa', 'a_okvqa_da'), 'vqa') | {'chart_qa': 'relaxed'} | dict.fromkeys(
    ('doc_qa', 'info_qa', 'st_qa'), 'anls')
COUNTING = re.compile(r'\b(how many|count|number of)\b', re.I)


# -- parts of a draft

def clean(value):
    """Text without None, NUL, broken bytes and the space around it."""
    if value is None:
        return ''
    text = value.decode('utf-8', 'replace') if isinstance(value, bytes) else str(value)
    text = text.encode('utf-8', 'replace').decode('utf-8').replace('\0', '').strip()
    return re.sub(r'<image (\d)>', r'Image \1', text)      # MMMU; our several images are named so


def turn(role, content, **more):
    return {'role': role, 'content': content, **more}


def talk(task, prompt, answer, **more):
    """A conversation of one question; `more`: answers that are right too, what the evaluation needs."""
    prompt, answer = clean(prompt), clean(answer)
    if not prompt:
        raise Skip('no question')
    if not answer:
        raise Skip('no answer')
    return {'task': task, 'messages': [turn('user', prompt), turn('assistant', answer)], **more}


def point_talk(task, prompt, points, label, **more):
    prompt = clean(prompt)
    if not prompt:
        raise Skip('no question')
    return {'task': task, 'messages': [turn('user', prompt),
                                       turn('assistant', '', points={'label': clean(label), 'points': points}, **more)]}


def media(value, sha256=None):
    """Of a URL, a path, or the hub's {'bytes': .., 'path': ..}."""
    if isinstance(value, dict):
        value = value.get('bytes') or value.get('path')
    if isinstance(value, bytes) and value:
        return {'bytes': value}
    value = clean(value) if isinstance(value, str) else ''
    if not value:
        raise Skip('no media')
    return {'url': value, 'sha256': sha256 or None} if re.match(r'https?://', value) else {'path': value}


PICTURE = ('image_url', 'image', 'decoded_image', 'img_filename', 'image_filename', 'image_local_name', 'imageName',
           'file_path')
VIDEO = ('video', 'video_path', 'key', 'videoID', 'video_id', 'vid_name', 'video_name', 'video_filename', 'vid_filename',
         'vid', 'video_idx', 'video_uid', 'uid', 'visual_input', 'rel_vid_path', 'gif_name', 'uni_clipped_id')


def times(row):
    """(start, end) in seconds of the part of a video that a row is about; None: its own."""
    if isinstance(row.get('ts'), str):       # TVQA: "12.5-40"
        both = row['ts'].split('-')
    else:
        both = [next((row[k] for k in names if row.get(k) is not None), None) for names in (
            ('video_start', 'clip_start', 'clip_start_time', 'start'), ('video_end', 'clip_end', 'clip_end_time', 'end'))]
    return [float(t) if t is not None and math.isfinite(float(t)) else None for t in both]


def shown(row):
    """{'images': [..]} or {'video': .., 'start': .., 'end': ..} of a row, and the key to group by."""
    for name in ('image_urls', 'images', 'image_list', 'input_image_path'):
        if row.get(name):
            values = row[name] if isinstance(row[name], (list, tuple)) else [row[name]]
            images = [media(v) for v in values]
            return {'images': images, 'key': ' '.join(m['url'] for m in images) if 'url' in images[0] else None}
    if numbered := [row[f'image_{i}'] for i in range(1, 8) if row.get(f'image_{i}')]:
        return {'images': [media(v) for v in numbered], 'key': None}
    for name in PICTURE:
        if row.get(name):
            image = media(row[name], row.get('image_sha256') if name == 'image_url' else None)
            return {'images': [image], 'key': image.get('url') or image.get('path')}
    if row.get('image_index') is not None:   # FigureQA, PlotQA
        path = f"png/{row['image_index']}.png"
        return {'images': [{'path': path}], 'key': path}
    if row.get('corrupt'):                   # say the makers
        raise Skip('corrupt')
    for name in VIDEO:
        if clean(row.get(name)):
            start, end = times(row)
            where = {k: v for k, v in (('start', start), ('end', end)) if v is not None}
            return {'video': media(clean(row[name])), 'key': f'{clean(row[name])} {start} {end}', **where}
    raise Skip('no media')


def draft(row, talks, **more):
    if not talks:
        raise Skip('no answer')
    return {**shown(row), 'conversations': list(talks), **more}


def pairs(values):
    """[(x, y)] of [{x, y}], {x: [], y: []} or [[x, y]]; places that are not numbers are left out."""
    if isinstance(values, dict):
        values = zip(values.get('x') or (), values.get('y') or ())
    values = [(v.get('x'), v.get('y')) if isinstance(v, dict) else tuple(v) for v in values or () if v is not None]
    return [(float(x), float(y)) for x, y in values
            if all(isinstance(n, (int, float)) and math.isfinite(n) for n in (x, y))]


def fractions(values, width=100., height=None, **more):
    """Points in [0, 1] of places in percent (the default), thousandths or pixels; a little outside is on the border."""
    out = []
    for i, (x, y) in enumerate(pairs(values), 1):
        x, y = x / width, y / (height or width)
        if not (-.05 <= x <= 1.05 and -.05 <= y <= 1.05):
            raise Skip('point outside')
        out.append({'x': round(min(max(x, 0.), 1.), 4), 'y': round(min(max(y, 0.), 1.), 4), 'id': i, **more})
    return out


def few(points):
    if len(points) > 60:                     # recipe.md, section 13
        raise Skip('more than 60 points')
    return points


def listed(value):
    """A list, also one that is written as text ("['a', 'b']")."""
    if isinstance(value, str) and value.lstrip().startswith('['):
        try:
            return list(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            raise Skip('broken options') from None
    return list(value) if value is not None else []


def asked(question, style, chance):
    """The prompt of a question: with its style's name, or with the wish for no points where it asks for a number."""
    question = clean(question)
    if style in PREFIXED and question:
        return f'{style}: {question}'
    if style in ('user_qa', 'correction_qa') and COUNTING.search(question):
        return f'{chance.choice(NO_POINTS)} {question}'
    return question


# -- converters: (row, style, chance) -> drafts

def caption(row, style, chance):
    """pixmo-cap: image_url, caption, transcripts[] of its makers' speech, one of which is a second branch."""
    talks = [talk('captioning', chance.choice(CAPTION), row['caption'])]
    if spoken := [t for t in map(clean, row.get('transcripts') or ()) if t]:
        talks.append(talk('captioning', chance.choice(SPOKEN), chance.choice(spoken)))
    yield draft(row, talks)


def qa(row, style, chance):
    """A question and its answer, about a picture, several or a video: pixmo-ask-model-anything and many others; with
    choices where they are given (MathVista, TGIF-QA)."""
    if (listed(row.get('choices')) or clean(row.get('a1'))) and style != 'tabwmp_da':
        yield from choice(row, style, chance)
        return
    question, answer = row.get('question', row.get('Question')), row.get('answer', row.get('Answer', row.get('GT')))
    yield draft(row, [talk('qa', asked(question, style, chance), answer)])


def tagged_qa(row, style, chance):
    """pixmo-cap-qa: the question is a dialogue with the marks [USER] and [ASSISTANT]; loss on every answer."""
    parts = re.split(r'\[(USER|ASSISTANT)\]', clean(row['question']))
    turns = [turn(role.lower(), text.strip()) for role, text in zip(parts[1::2], parts[2::2])] or [turn('user', parts[0])]
    if turns[-1]['role'] == 'assistant' and not turns[-1]['content']:
        turns.pop()
    turns.append(turn('assistant', clean(row['answer'])))
    yield draft(row, [alternating('qa', turns)])


def alternating(task, turns):
    """A conversation of turns that must alternate; a system message goes in front of the first question."""
    if turns and turns[0]['role'] == 'system':
        system, *turns = turns
        if turns and system['content']:
            turns[0] = turn(turns[0]['role'], f"System: {system['content']}\n\n{turns[0]['content']}")
    if not turns or [t['role'] for t in turns] != ['user', 'assistant'] * (len(turns) // 2):
        raise Skip('turns do not alternate')
    if not all(t['content'] for t in turns):
        raise Skip('empty turn')
    return {'task': task, 'messages': turns}


def messages(row, style, chance):
    """Chat: messages[{role, content}] (Tulu), with allenai/molmo2-tulu4-classified's flags and categories where given."""
    if row.get('empty_messages') or row.get('has_special_token'):
        raise Skip('flagged')
    source = row.get('source') or ''
    if row.get('category') in ('code', 'non-english') or re.search(r'puzzle|verifiable|hard.?coded', source):
        raise Skip('category')
    if (row.get('first_message_qwen3_tokens') or 0) > 4096:
        raise Skip('long question')
    turns = [turn(clean(m.get('role')), clean(m.get('content'))) for m in row.get('messages') or ()]
    yield {'images': [], 'key': None, 'conversations': [alternating('text', turns)]}


def llava(row, style, chance):
    """conversations[{from, value}]: one dialogue about pictures; about a video, every question a branch."""
    turns = [turn({'human': 'user', 'gpt': 'assistant'}.get(m.get('from'), m.get('from')),
                  re.sub(r'<(image|video)>', '', clean(m.get('value'))).strip()) for m in row.get('conversations') or ()]
    whole = alternating('qa', turns)
    if not any(row.get(name) for name in VIDEO):
        yield draft(row, [whole])
        return
    turns = whole['messages']
    yield draft(row, [talk('qa', asked(q['content'], style, chance), a['content']) for q, a in zip(turns[::2], turns[1::2])])


def hardcodes(row, style, chance):
    """questions[], response, images[]: who the model is, whatever it is shown."""
    yield {'images': [media(v) for v in row.get('images') or ()], 'key': None,
           'conversations': [talk('qa' if row.get('images') else 'text', q, row['response']) for q in row['questions']]}


def points(row, style, chance):
    """pixmo-points: points[{x, y}] in percent (its card says pixels), label. pixmo-count: points{x[], y[]} in pixels, count,
    label. Both are pointed at and counted; a count without points (the held-out splits) is only counted."""
    label, places = clean(row['label']).lower(), pairs(row.get('points'))
    if not label:
        raise Skip('no label')
    count = row.get('count')
    talks, pixels = [], isinstance(row.get('points'), dict)
    if places or not count:
        found = [{'x': x, 'y': y, 'id': i} for i, (x, y) in enumerate(few(places), 1)] if pixels else fractions(few(places))
        talks.append(point_talk('pointing', chance.choice(POINT).format(label), found, label,
                                **({'pixels': True} if pixels and found else {})))
    number = len(places) if places or count is None else int(count)
    talks.append(talk('counting', chance.choice(COUNT).format(label), str(number)))
    yield draft(row, talks)


def question_points(row, style, chance):
    """CoSyn-point: image, questions[], answer_points[{x[], y[]}] in percent, names[]."""
    yield draft(row, [point_talk('pointing', q, fractions(few(pairs(p))), name)
                      for q, p, name in zip(row['questions'], row['answer_points'], row['names'])])


def explained_points(row, style, chance):
    """pixmo-point-explanations: question, response whose marks stand for points[{x, y}] in percent."""
    answer = re.sub(r'<[^<>]*>', '', clean(row['response'])).strip()
    places = [q for p in row.get('points') or () for q in (p if isinstance(p, (list, tuple)) else [p])]
    found = talk('qa', row['question'], answer)
    found['messages'][1]['points'] = {'label': '', 'points': fractions(few(pairs(places)))}
    yield draft(row, [found])


def several_points(row, style, chance):
    """Molmo2-MultiImagePoint: image_urls[], labels[], and points in percent: [label][image][{x, y}], or [image][{x, y}]
    of the only label, or [label][{x, y}] on the only image."""
    labels, places, talks = row.get('labels') or [], row.get('points') or [], []
    several = len(row.get('image_urls') or row.get('images')) > 1
    if all(isinstance(p, dict) for values in places for p in values or ()):
        if several and len(labels) > 1:
            raise Skip('points without image')
        places = [places] if several else [[values] for values in places]
    for label, by_image in zip(map(clean, labels), places):
        found = [p for i, values in enumerate(by_image) for p in fractions(values, **({'image': i} if several else {}))]
        for i, p in enumerate(few(found), 1):
            p['id'] = i
        talks.append(point_talk('pointing', chance.choice(POINT).format(label.lower()), found, label.lower()))
        talks.append(talk('counting', chance.choice(COUNT).format(label.lower()), str(len(found))))
    yield draft(row, talks)


def explained_qa(row, style, chance):
    """CoSyn-400K, Molmo2-SynMultiImageQA and Molmo2-MultiImageQA: qa_pairs{question[], explanation[], answer[]}."""
    if len(row.get('images') or row.get('image_urls') or ()) > 5:
        raise Skip('more than 5 images')
    qas, talks = row['qa_pairs'], []
    if isinstance(qas, (list, tuple)):       # some writers turn a struct of lists into a list of structs
        qas = {k: [q.get(k) for q in qas] for k in ('question', 'explanation', 'answer')}
    reasons = qas.get('explanation') or [None] * len(qas['question'])
    for question, reason, answer in zip(qas['question'], reasons, qas['answer']):
        if style.endswith('_exp') and clean(reason):
            prompt = f"{style.removesuffix('_exp')}: {clean(question)} {chance.choice(WHY)}"
            talks.append(talk('qa', prompt, f'{clean(reason)}\nAnswer: {clean(answer)}'))
        else:
            talks.append(talk('qa', asked(question, style, chance), answer))
    yield draft(row, talks)


def items(row):
    """The questions of a row: one, or a list under one of the names that the sets use."""
    for name in ('message_list', 'qas', 'questions', 'qa_pairs', 'qa', 'examples', 'mc_qa_list', 'mc_question'):
        if isinstance(row.get(name), dict) and all(isinstance(v, dict) for v in row[name].values()):       # AI2D
            return [{'question': question, **item} for question, item in row[name].items()]
        if isinstance(row.get(name), (list, tuple)) and row[name] and isinstance(row[name][0], dict):
            return row[name]
    return [row]


def each(row, make):
    """Of each question of a row what `make` makes of it; those that cannot be used are left out, Skip if none is left."""
    talks, why = [], Skip('no answer')
    for item in items(row):
        try:
            talks.append(make(item))
        except Skip as e:
            why = e
    if not talks:
        raise why
    return talks


def vqa(row, style, chance):
    """Short answers: one, or those of ten people, of which the most frequent is learnt (ties are drawn). VQA v2, TextVQA,
    OK-VQA, A-OKVQA direct, ChartQA, DocVQA, InfographicVQA, ST-VQA, DVQA, FigureQA, PlotQA, TallyQA, RoadTextVQA."""
    def make(item):
        question = next((item[k] for k in ('question', 'query', 'raw_question', 'question_string') if item.get(k)), '')
        answers = next((item[k] for k in ('answers', 'direct_answers', 'label', 'answer', 'raw_answer', 'count')
                        if item.get(k) is not None), [])
        answers = listed(answers) if isinstance(answers, (list, tuple)) or str(answers).startswith('[') else [answers]
        answers = [clean(a.get('raw_answer', a.get('answer')) if isinstance(a, dict) else a) for a in answers]
        if style == 'figure_qa':             # 0 and 1; the official loader leaves them so
            answers = [{'0': 'no', '1': 'yes'}.get(a, a) for a in answers]
        counts = Counter(a for a in answers if a)
        if not counts:
            raise Skip('no answer')
        best = chance.choice(sorted(a for a, n in counts.items() if n == max(counts.values())))
        counting = style in ('tally_qa', 'point_count', 'video_count')
        metric = {'metric': METRIC[style]} if style in METRIC else {}
        return talk('counting' if counting else 'qa', asked(question, style, chance), best, **metric,
                    **({'answers': answers} if len(counts) > 1 or len(answers) > 1 and metric else {}))
    yield draft(row, each(row, make))


def options_of(item, chance):
    """(question, options, index of the right one) of the ways in which the sets write a choice."""
    question = next((item[k] for k in ('question', 'Question', 'q', 'q_body', 'mc_question', 'prompt', '5')
                     if item.get(k)), '')
    if hint := clean(item.get('hint')):
        question = f'{hint}\n{clean(question)}'
    wrong = item.get('NegativeAnswers') or [item[k] for k in ('2', '3', '4') if k in item]
    if wrong:                                # the right one goes among them
        options = [clean(w) for w in listed(wrong)]
        right = chance.randrange(len(options) + 1)
        options.insert(right, clean(item.get('Answer', item.get('6'))))
        return question, options, right
    options = next((listed(item[k]) for k in ('choices', 'options', 'option', 'candidates', 'answer_texts', 'answerTexts')
                    if item.get(k) is not None), None)
    if options is None:
        options = [item[k] for form in ('a{}', 'option{}') for i in range(10) if clean(item.get(k := form.format(i)))]
    if not options:                          # LVBench, MotionBench, TempCompass: below the question, one a line
        first, *rest = re.split(r'\n\s*(?=\(?A[.):])', clean(question), maxsplit=1)
        lines = [line.strip() for line in rest[0].splitlines() if line.strip()] if rest else []
        options = list(itertools.takewhile(re.compile(r'\(?[A-Z][.):]').match, lines))
        question = first
    if options and isinstance(options[0], dict):           # CLEVRER and STAR say of each whether it is right
        right = [i for i, o in enumerate(options) if clean(o.get('answer')).lower() in ('correct', 'true', '1')]
        options = [o.get('choice') for o in options]
        answer = right[0] if len(right) == 1 else None if right else item.get('answer')
    else:
        answer = next((item[k] for k in (
            'answer_idx', 'answer_id', 'correct_choice', 'correct_choice_idx', 'correct_answer', 'correctAnswer', 'answer',
            'output', 'Answer', 'answer_key_position') if item.get(k) is not None), None)
    marked = [re.match(r'\(?([A-Za-z])[.):]\s*', clean(o)) for o in options]
    if options and all(m and m[1].upper() == chr(65 + i) for i, m in enumerate(marked)):
        options = [clean(o)[m.end():] for o, m in zip(options, marked)]
    options = [clean(o) for o in options]
    text = clean(answer)
    if not isinstance(answer, (int, float)) and text in options:
        return question, options, options.index(text)
    letter = re.fullmatch(r'\(?([A-Z])(?:[.):].*)?', text, re.S)
    index = int(float(text)) if re.fullmatch(r'\d+(\.0)?', text) else ord(letter[1]) - 65 if letter else -1
    if not 0 <= index < len(options):
        raise Skip('no right option')
    return question, options, index


def choose(question, options, right, style, chance):
    """A question with options, in one of many layouts (recipe.md, section 11), and the right one as it is to be answered.
    Held-out sets get the plain layout: A. B. C., answered with letter and text."""
    question = clean(question)
    if not question:
        raise Skip('no question')
    if len(options) < 2 or not options[right]:
        raise Skip('no right option')
    plain = style.startswith(('eval', 'video_eval')) or chance.random() < .1
    labels = [chr(65 + i) for i in range(len(options))]
    if plain:
        lines = '\n'.join(f'{k}. {o}' for k, o in zip(labels, options))
        return f'{question}\nOnly give the right option.\n{lines}', f'{labels[right]}. {options[right]}'
    alphabet = chance.choice('Aa1i')
    if alphabet == 'a':
        labels = [k.lower() for k in labels]
    elif alphabet != 'A':
        roman = 'i ii iii iv v vi vii viii ix x'.split()
        numbers = [str(i + 1) for i in range(len(options))]
        labels = roman[:len(options)] if alphabet == 'i' and len(options) <= 10 else numbers
    mark = chance.choice(('{}. {}', '{}) {}', '{}: {}', '({}) {}'))
    if chance.random() < .2:                 # no labels at all
        shown_options, answer = options, options[right]
    else:
        shown_options = [mark.format(k, o) for k, o in zip(labels, options)]
        answer = labels[right] if chance.random() < .25 else shown_options[right]
    between = ' ' if chance.random() < .1 else '\n'
    ask = f'{chance.choice(CHOOSE)}\n' if chance.random() < .5 else ''
    return f'{question}\n{ask}{between.join(shown_options)}', answer


def choice(row, style, chance):
    """One question with options or many: see `options_of` for the forms. Subtitles stand in front of all branches."""
    if isinstance(row.get('mc_question'), (list, tuple)) and items(row) == [row]:  # Mantis: parallel lists
        row = {**row, 'questions': [{'question': q, 'choices': c, 'answer_idx': i}
                                    for q, c, i in zip(row['mc_question'], row['choices'], row['correct_choice_idx'])]}

    def make(item):
        if item.get('abcLabel'):             # AI2D: letters that are not in the picture
            raise Skip('letters are to be drawn')
        question, options, right = options_of({**{k: v for k, v in row.items() if k == 'hint'}, **item}, chance)
        prompt, answer = choose(question, options, right, style, chance)
        scored = {'metric': 'choice', 'options': options, 'right': right} if style.startswith(('eval', 'video_eval')) else {}
        return talk('qa', prompt, answer, answers=sorted({answer, options[right]}), **scored)
    yield draft(row, each(row, make), **subtitles(row))


def subtitles(row):
    """{'subtitles': [{start, end, text}]} where a row has them."""
    cues = row.get('subtitle') or row.get('subtitles')
    if not isinstance(cues, (list, tuple)):
        return {}
    cues = [{'start': float(c['start']), 'end': float(c['end']), 'text': clean(c['text'])} for c in cues]
    return {'subtitles': [c for c in cues if c['text']]}


def clevrer(row, style, chance):
    """video_filename, questions[{question, answer}] or [{question, choices[{choice, answer}]}]: open ones, and choices
    with exactly one right option."""
    talks = []
    for item in row['questions']:
        if item.get('choices'):
            if sum(clean(c.get('answer')) == 'correct' for c in item['choices']) == 1:
                talks.append(talk('qa', *choose(*options_of(item, chance), 'video_multiple_choice', chance)))
        else:
            talks.append(talk('qa', asked(item.get('question'), 'video_short_answer', chance), item.get('answer')))
    yield draft(row, talks)


def funqa(row, style, chance):
    """task, visual_input, instruction, output: all but the tasks that answer with times (H1, C1, M1, C4, C5)."""
    if row.get('task') in ('H1', 'C1', 'M1', 'C4', 'C5'):
        raise Skip('task')
    yield draft(row, [talk('qa', asked(row['instruction'], style, chance), row['output'])])


def label(row, style, chance):
    """A clip and the name of what is done in it; the question is worded here. Of Charades-STA: "video start end##what"."""
    if 'line' in row:
        place, _, answer = row['line'].partition('##')
        row = {**dict(zip(('video', 'start', 'end'), place.split())), 'label': answer}
    answer = clean(row.get('label', row.get('narration', row.get('sentence')))).replace('+', ' ')      # Moments in Time
    start, end = times(row)
    if start is not None and end is not None and end <= start:
        raise Skip('empty clip')
    yield draft(row, [talk('qa', asked(chance.choice(LABEL[style]), style, chance), answer)])


def segments(row, style, chance):
    """COIN, YouCook2, ActivityNet: video_id, annotations[{segment [start, end], label or sentence}]: a clip each."""
    for item in row.get('annotations', row.get('annotation')):
        start, end = item['segment']
        yield from label({'video': row['video_id'], 'start': start, 'end': end, **item}, style, chance)


def antonym(row, style, chance):
    """Paxion: what is done, or its contrary? Of Something-Something: rel_vid_path, label, label_action_antonym_clip_text;
    of Ego4D: video_uid, clip_start, clip_end, clip_text ("#C C cuts the bread"), action_antonym_clip_text."""
    both = [row.get('label', row.get('clip_text')),
            row.get('label_action_antonym_clip_text', row.get('action_antonym_clip_text'))]
    both = [re.sub(r'^#\S\s*', '', clean(text)) for text in both]
    options = chance.sample([*both, 'Not sure'], 3)
    prompt, answer = choose('Which of these is done in the video?', options, options.index(both[0]), style, chance)
    yield draft(row, [talk('qa', prompt, answer)])


def repetitions(row, style, chance):
    """Countix: video_path, class, count."""
    question = f"How many times is this done: {clean(row['class'])}?"
    yield draft(row, [talk('counting', asked(question, style, chance), row['count'])])


def problems(row, style, chance):
    """TabMWP: {number: question, answer, choices, ..}; the picture is number.png."""
    yield draft({'image': f"{row['video_id']}.png"}, [talk('qa', asked(row['question'], style, chance), row['answer'])])


def video_caption(row, style, chance):
    """Molmo2-Cap: video_caption, merged_caption, video_frame_merged_caption, annotation_score. Its held-out set:
    aggregated_caption. MotionBench: motion_caption."""
    if row.get('annotation_score') is not None and row['annotation_score'] < 3:
        raise Skip('low score')
    talks = [talk('captioning', chance.choice(prompts), row[name]) for name, prompts in VIDEO_CAPTION.items()
             if clean(row.get(name))]
    yield draft(row, talks)


def actor_captions(row, style, chance):
    """video, actor_names[], captions[]: one branch for each actor."""
    yield draft(row, [talk('captioning', f'Describe what the {clean(name).lower()} does.', text)
                      for name, text in zip(row['actor_names'], row['captions'])])


def moments(row, style, chance):
    """QVHighlights: vid, query, relevant_windows[[start, end]] in seconds."""
    windows = row.get('relevant_windows') or []
    if not 1 <= len(windows) <= 5:
        raise Skip('windows')
    answer = 'Segments: ' + ', '.join(f'[{float(s):g}-{float(e):g}]' for s, e in windows)
    question = chance.choice(SECONDS).format(clean(row['query']))
    yield draft(row, [talk('qa', question, answer, metric='moments', windows=windows)])


def video_points(row, style, chance):
    """Molmo2-VideoPoint: label, count, points[[{x, y}]] for each of two_fps_timestamps, in percent, and seconds of the
    whole video, of which clip_start to clip_end is shown, or all if it has 63 seconds at most. The academic ones: category,
    timestamps, clip_start_time. The held-out set: points[{x, y}] in pixels, with width and height."""
    name, width = clean(row.get('label', row.get('category'))).lower(), row.get('width') or 100.
    if (row.get('video_duration') or math.inf) <= 63:
        row = {k: v for k, v in row.items() if not k.startswith('clip_')}
    start = times(row)[0] or 0.
    found = [p for t, values in zip(row.get('two_fps_timestamps', row.get('timestamps')) or (), row.get('points') or ())
             for p in fractions(values if isinstance(values, (list, tuple)) else [values], width, row.get('height') or 100.,
                                t=round(float(t) - start, 2))]
    if any(p['t'] < 0 for p in found):
        raise Skip('point outside')
    for i, p in enumerate(few(found), 1):
        p['id'] = i
    talks = [point_talk('pointing', chance.choice(POINT).format(name), found, name)]
    if row.get('count') is not None:
        question = clean(row.get('question')) or chance.choice(COUNT).format(name)
        talks.append(talk('counting', question, str(int(row['count']))))
    yield draft(row, talks)


def track(row, style, chance):
    """molmo2-track-instruction and its like: expression, frame_trajectories[{time, points[{id, point [x, y] in pixels,
    occluded}]}], width, height. All of it, only the first and last sight of each object (ground), or what follows a point
    that is given (single point), as the style says. Boxes (bbox [x, y, w, h]) count as their middles."""
    name, width, height = clean(row.get('expression', row.get('exp'))), row.get('width'), row.get('height')
    if not (width and height):
        raise Skip('no size')
    found, ids = [], {}
    for frame in row.get('frame_trajectories') or ():
        seen = []
        for p in frame['points']:
            place = p.get('point') or (p.get('bbox') and (p['bbox'][0] + p['bbox'][2] / 2, p['bbox'][1] + p['bbox'][3] / 2))
            if place and not p.get('occluded'):
                seen += [{**q, 'id': p['id']} for q in fractions([place], width, height, t=round(float(frame['time']), 2))]
        for p in sorted(seen, key=lambda p: p['x']):       # numbered as they first appear
            p['id'] = ids.setdefault(p['id'], len(ids) + 1)
            found.append(p)
    if not found:
        raise Skip('no points')
    if 'single' in style:
        last = {p['id']: p['t'] for p in found}
        starts = [p for p in found if p['t'] < last[p['id']]]          # something follows them
        if not starts:
            raise Skip('no points')
        first = starts[0] if chance.random() < .8 else chance.choice(starts)
        rest = [p for p in found if p['id'] == first['id'] and p['t'] > first['t']]
        for p in [first, *rest]:
            p['id'] = 1
        following = point_talk('tracking', chance.choice(FOLLOW), rest, name)
        following['messages'][0]['points'] = {'label': name, 'points': [first]}
        yield draft(row, [following], fps=row.get('fps'))
        return
    if 'ground' in style:
        ends = {}
        for p in found:
            ends[p['id']] = [*ends.get(p['id'], [])[:1], p]
        found = sorted((p for both in ends.values() for p in both), key=lambda p: (p['t'], p['id']))
    prompt = chance.choice(GROUND if 'ground' in style else TRACK).format(name)
    yield draft(row, [point_talk('tracking', prompt, found, name)], fps=row.get('fps'))


def box_point(row, style, chance):
    """Screens: instruction, bbox or box_coordinates in pixels, [x, y, width, height] or, where the style ends in 'corners',
    [left, top, right, bottom]; a polygon is a list of x, y. The middle is the point; the box stays for scoring."""
    box = [float(v) for v in row.get('bbox') or row.get('box_coordinates') or ()]
    if len(box) < 4:
        raise Skip('no box')
    if len(box) > 4:
        box = [min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2])]
    elif not style.endswith('corners'):
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    middle = {'x': (box[0] + box[2]) / 2, 'y': (box[1] + box[3]) / 2, 'id': 1}
    yield draft(row, [{**point_talk('pointing', row['instruction'], [middle], '', pixels=True), 'box': box}])


def runs(mask):
    """Rows of truths as metrics.in_mask reads them: pixels in reading order, so many outside, then so many inside, .."""
    lengths = [len(list(group)) for _, group in itertools.groupby(bool(v) for line in mask for v in line)]
    return {'size': [len(mask), len(mask[0])], 'runs': [0] * int(mask[0][0]) + lengths}


def mask_point(row, style, chance):
    """PointBench and pixmo-points-eval: user_input or label; a mask that points must hit: a file's name, or one of rows of
    truths for each point."""
    found = fractions(few(pairs(row.get('points'))))
    for point, mask in zip(found, row.get('masks') or ()):
        point['mask'] = runs(mask)
    prompt = row.get('user_input') or chance.choice(POINT).format(clean(row.get('label')).lower())
    mask = row.get('mask_filename')
    yield draft(row, [{**point_talk('pointing', prompt, found, row.get('label')), **({'mask': mask} if mask else {})}])


def clocks(row, style, chance):
    """A picture of a clock and text, what a person would say; pixmo-clocks itself brings no pictures."""
    yield draft(row, [talk('qa', 'What time does the clock show?', row['text'])])


CONVERTERS = {f.__name__: f for f in (
    caption, qa, tagged_qa, messages, llava, hardcodes, points, question_points, explained_points, several_points,
    explained_qa, vqa, choice, clevrer, funqa, label, segments, antonym, repetitions, problems, video_caption,
    actor_captions, moments, video_points, track, box_point, mask_point, clocks)}
