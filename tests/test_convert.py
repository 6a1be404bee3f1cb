"""Rows in the published schemas, with the oddities of real ones, to records."""
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'prepare')]
from convert import CONVERTERS, PREFIXED, Skip, options_of, runs  # noqa: E402

URL = 'https://example.org/a.jpg'


def convert(name, row, style='', seed=0):
    (draft,) = CONVERTERS[name](row, style, random.Random(seed))
    return draft


def said(draft):
    """[(task, last question, answer)]"""
    return [(t['task'], t['messages'][-2]['content'], t['messages'][-1]['content']) for t in draft['conversations']]


def found(draft, i=0):
    return [(p['x'], p['y']) for p in draft['conversations'][i]['messages'][-1]['points']['points']]


def skipped(name, row, style=''):
    with pytest.raises(Skip) as e:
        convert(name, row, style)
    return str(e.value)


def test_caption_with_and_without_transcript():
    d = convert('caption', {'image_url': URL, 'caption': ' A wide photo. ', 'transcripts': ['so here we see', '', None]})
    assert d['images'] == [{'url': URL, 'sha256': None}] and d['key'] == URL
    assert [a for _, _, a in said(d)] == ['A wide photo.', 'so here we see']
    assert len(convert('caption', {'image_url': URL, 'caption': 'A photo.', 'transcripts': None})['conversations']) == 1
    assert skipped('caption', {'image_url': URL, 'caption': None, 'transcripts': []}) == 'no answer'
    assert skipped('caption', {'image_url': None, 'caption': 'A photo.', 'transcripts': []}) == 'no media'


def test_broken_text_is_mended():
    d = convert('qa', {'image_url': URL, 'question': b'What \xff is\0 it?', 'answer': 'A \ud800 cat'})
    assert said(d) == [('qa', 'What \ufffd is it?', 'A ? cat')]


def test_points_in_percent_and_in_pixels():
    row = {'image_url': URL, 'image_sha256': 'ab12', 'points': [{'x': 41.2, 'y': 63.0}, {'x': None, 'y': 3.}], 'count': 1,
           'label': 'Kettle', 'collection_method': 'pointing'}
    d = convert('points', row)
    assert d['images'][0]['sha256'] == 'ab12' and found(d) == [(.412, .63)]
    assert said(d)[1][2] == '1' and 'kettle' in said(d)[0][1] and 'Kettle' not in said(d)[0][1]
    assert convert('points', {**row, 'points': [], 'count': 0})['conversations'][0]['messages'][1]['points']['points'] == []
    assert skipped('points', {**row, 'points': [{'x': 412., 'y': 3.}]}) == 'point outside'
    assert found(convert('points', {**row, 'points': [{'x': 101., 'y': -1.}]})) == [(1., 0.)]
    assert skipped('points', {**row, 'points': [{'x': 1., 'y': 1.}] * 61}) == 'more than 60 points'
    assert skipped('points', {**row, 'label': ' '}) == 'no label'
    d = convert('points', {'image_url': URL, 'count': 3, 'points': {'x': [10, 80, 90], 'y': [5, 50, 61]}, 'label': 'boat'})
    answer = d['conversations'][0]['messages'][1]
    assert answer['pixels'] and found(d) == [(10, 5), (80, 50), (90, 61)] and said(d)[1][2] == '3'
    d = convert('points', {'image_url': URL, 'count': 4, 'points': None, 'label': 'boat'})     # held-out rows
    assert said(d)[0][0] == 'counting' and said(d)[0][2] == '4' and len(d['conversations']) == 1


def test_points_of_questions_and_of_several_pictures():
    d = convert('question_points', {'image': {'bytes': b'png', 'path': None}, 'questions': ['Point to the tallest bar'],
                                    'answer_points': [{'x': [55.1], 'y': [20.]}], 'names': ['tallest bar']})
    assert d['images'] == [{'bytes': b'png'}] and d['key'] is None and found(d) == [(.551, .2)]
    two = {'image_urls': [URL, URL + '2'], 'labels': ['cup'], 'points': [[{'x': 5, 'y': 9}], [{'x': 50, 'y': 60}]]}
    d = convert('several_points', two)
    assert [(p['image'], p['id']) for p in d['conversations'][0]['messages'][1]['points']['points']] == [(0, 1), (1, 2)]
    assert said(d)[1][2] == '2'
    d = convert('several_points', {**two, 'labels': ['cup', 'pot'], 'points': [[[{'x': 5, 'y': 9}], []], [[], []]]})
    assert found(d) == [(.05, .09)] and found(d, 2) == [] and said(d)[3][2] == '0'
    assert skipped('several_points', {**two, 'labels': ['cup', 'pot']}) == 'points without image'
    d = convert('several_points', {'image_urls': [URL], 'labels': ['cup'], 'points': [[{'x': 5, 'y': 9}]]})
    assert 'image' not in d['conversations'][0]['messages'][1]['points']['points'][0]
    d = convert('explained_points', {'image_url': URL, 'question': 'Where is it?', 'points': [[{'x': 5, 'y': 9}]],
                                     'response': 'It is <point p=0>here</point>.'})
    assert said(d)[0][2] == 'It is here.' and found(d) == [(.05, .09)]


def test_qa_tagged_qa_and_multi_image_qa():
    d = convert('qa', {'image_url': URL, 'question': 'How many cups are there?', 'answer': 'Two.'}, 'user_qa')
    assert said(d)[0][1].endswith('How many cups are there?') and said(d)[0][1] != 'How many cups are there?'
    row = {'image_url': URL, 'question': '[USER] What is this? [ASSISTANT] A pot. [USER] And that? [ASSISTANT]', 'answer': 'A cup.'}
    roles = [(m['role'], m['content']) for m in convert('tagged_qa', row)['conversations'][0]['messages']]
    assert roles == [('user', 'What is this?'), ('assistant', 'A pot.'), ('user', 'And that?'), ('assistant', 'A cup.')]
    assert said(convert('tagged_qa', {**row, 'question': 'What is this?'}))[0][1:] == ('What is this?', 'A cup.')
    d = convert('explained_qa', {'image_urls': [URL, URL + '2'], 'qa_pairs': {'question': ['Which is older?'], 'answer': ['The second.']}})
    assert len(d['images']) == 2 and said(d) == [('qa', 'Which is older?', 'The second.')]


def test_explained_qa_puts_reason_before_answer():
    row = {'id': 'm1', 'images': [{'bytes': b'1'}, {'bytes': b'2'}],
           'qa_pairs': {'question': ['Total of both?'], 'explanation': ['4+5'], 'answer': ['9']}}
    task, prompt, answer = said(convert('explained_qa', row, 'cosyn_chart_exp'))[0]
    assert prompt.startswith('cosyn_chart: Total of both? ') and answer == '4+5\nAnswer: 9'
    assert said(convert('explained_qa', {**row, 'qa_pairs': [{'question': 'Total?', 'answer': '9'}]}))[0][2] == '9'
    assert skipped('explained_qa', {**row, 'images': [{'bytes': b'1'}] * 6}) == 'more than 5 images'


def test_chat_messages_llava_and_hardcodes():
    row = {'id': 't1', 'source': 'x', 'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'},
                                                   {'role': 'assistant', 'content': 'Hello'}]}
    d = convert('messages', row)
    assert d['images'] == [] and said(d) == [('text', 'System: Be brief.\n\nHi', 'Hello')]
    assert skipped('messages', {**row, 'messages': row['messages'][:2]}) == 'turns do not alternate'
    assert skipped('messages', {**row, 'category': 'code'}) == 'category'
    assert skipped('messages', {**row, 'has_special_token': True}) == 'flagged'
    assert skipped('messages', {**row, 'messages': None}) == 'turns do not alternate'
    row = {'id': '1', 'video': 'nextqa/1.mp4', 'conversations': [
        {'from': 'human', 'value': '<image>\nWhy?'}, {'from': 'gpt', 'value': 'Because.'},
        {'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': 'Here.'}]}
    d = convert('llava', row, 'video_short_answer')
    assert d['video'] == {'path': 'nextqa/1.mp4'} and said(d) == [('qa', 'video_short_answer: Why?', 'Because.'),
                                                                 ('qa', 'video_short_answer: Where?', 'Here.')]
    del row['video']
    assert len(convert('llava', {**row, 'image': 'coco/1.jpg'})['conversations'][0]['messages']) == 4
    d = convert('hardcodes', {'questions': ['Who are you?', 'Your name?'], 'response': 'A model.', 'images': []})
    assert said(d)[1] == ('text', 'Your name?', 'A model.') and d['images'] == []


ONE = {'image': 'COCO_train2014_1.jpg', 'question': 'What is it?', 'answers': ['cat'] * 4 + ['dog'] * 4 + ['pig', '']}


@pytest.mark.parametrize('row', [
    ONE,
    {'image': 'a.jpg', 'message_list': [{'question': 'What is it?', 'answers': ONE['answers'], 'style': 'vqa2'}], 'metadata': {}},
    {'image': 'a.jpg', 'image_id': 3, 'qas': [{'question': 'What is it?', 'question_id': 1,
                                               'answers': [{'raw_answer': a} for a in ONE['answers']]}]},
    {'image': {'bytes': b'1'}, 'question': 'What is it?', 'answers': [{'answer': a, 'answer_id': 1} for a in ONE['answers']]},
])
def test_vqa_takes_most_frequent_of_ten_answers(row):
    answers = {said(convert('vqa', row, 'vqa2', seed))[0] for seed in range(20)}
    assert answers == {('qa', 'vqa2: What is it?', 'cat'), ('qa', 'vqa2: What is it?', 'dog')}
    assert len(convert('vqa', row)['conversations'][0]['answers']) == 10


def test_vqa_other_short_answers():
    d = convert('vqa', {'image': {'bytes': b'1'}, 'query': 'Highest?', 'label': ['42'], 'human_or_machine': 0}, 'chart_qa')
    assert said(d) == [('qa', 'chart_qa: Highest?', '42')]
    d = convert('vqa', {'image': 'f.png', 'image_index': 1, 'questions': [{'question': 'Is it?', 'answer': 0}, {
        'question': 'And?', 'answer': 1}]}, 'figure_qa')
    assert [a for *_, a in said(d)] == ['no', 'yes']
    d = convert('vqa', {'image': 'v.jpg', 'message_list': [{'question': 'How many?', 'answer': 3}]}, 'tally_qa')
    assert said(d) == [('counting', 'tally_qa: How many?', '3')]
    d = convert('vqa', {'image': 'a.jpg', 'message_list': [{'question': 'Who?', 'choices': ['a', 'b'], 'answer_idx': 0,
                                                            'direct_answers': "['x', 'x', 'y']"}]}, 'a_okvqa_da')
    assert said(d)[0][2] == 'x'
    d = convert('vqa', {'image': {'bytes': b'1'}, 'question': 'How many legs?', 'count': 4}, 'point_count')
    assert said(d) == [('counting', 'How many legs?', '4')]
    assert skipped('vqa', {'image': 'a.jpg', 'question': 'What?', 'answers': ['', None]}) == 'no answer'


CHOICES = [
    {'image': {'bytes': b'1'}, 'question': 'Q?', 'choices': ['no', 'yes', 'maybe'], 'answer': 1, 'hint': 'Look.'},
    {'image': 'a.jpg', 'message_list': [{'question': 'Q?', 'choices': ['no', 'yes'], 'answer_idx': 1}]},
    {'image': 'a.png', 'question': 'Q?', 'answer_texts': ['no', 'yes'], 'correct_answer': 1},
    {'images': [{'bytes': b'1'}], 'mc_question': ['Q?'], 'choices': [['no', 'yes']], 'correct_choice_idx': [1]},
    {'vid_name': 'friends_1', 'q': 'Q?', 'a0': 'no', 'a1': 'yes', 'a2': 'red', 'a3': 'blue', 'a4': 'green', 'answer_idx': '1', 'start': 2.5, 'end': 8.},
    {'video': '3.mp4', 'question': 'Q?', 'a0': 'no', 'a1': 'yes', 'a2': 'red', 'a3': 'blue', 'a4': 'green', 'answer': 1, 'qid': 7, 'type': 'CW'},
    {'video_id': 'v1', 'Question': 'Q?', 'Answer': 'yes', 'NegativeAnswers': ['no', 'red'], 'Category': 'c'},
    {'video_path': 'v1.mp4', 'mc_qa_list': [{'Question': 'Q?', 'Answer': 'yes', 'NegativeAnswers': ['no', 'red']}]},
    {'video': 'v1', '0': 'v1', '1': '[0:5]', '2': 'no', '3': 'red', '4': 'blue', '5': 'Q?', '6': 'yes'},
    {'vid_filename': 'v.mp4', 'q_body': 'Q?', 'option0': 'no', 'option1': 'yes', 'option2': '', 'option3': '', 'answer': 1},
    {'video_name': 'v', 'question': 'Q?', 'options': ['A. no', 'B. yes'], 'answer': 'B'},
    {'video_idx': 'v', 'question': 'Q?', 'option': ['no', 'yes'], 'answer': '1'},
    {'video': 'v', 'question': 'Q?', 'candidates': ['no', 'yes'], 'answer': 'yes'},
    {'video_id': 'v', 'question': 'Q?', 'choices': [{'choice': 'no'}, {'choice': 'yes'}], 'answer': 'yes'},
    {'image_1': {'bytes': b'1'}, 'image_2': {'bytes': b'2'}, 'image_3': None, 'prompt': 'Q?', 'choices': ['no', 'yes'], 'answer': '(B)'},
    {'id': 'm', 'question': 'Q?', 'options': "['no', 'yes']", 'answer': 'B', 'image_1': {'bytes': b'1'}, 'question_type': 'multiple-choice'},
    {'image_list': [{'bytes': b'1'}], 'question': 'Q?', 'options': ['no', 'yes'], 'answer': 'B'},
    {'movie_name': 'm', 'video_id': 'v', 'subtitles': 'Hello.', 'examples': [{'question': 'Q?', 'choices': ['no', 'yes'], 'answer_key_position': 1}]},
]


@pytest.mark.parametrize('row', CHOICES)
def test_multiple_choice_in_every_schema(row):
    for seed in range(30):
        for style in ('video_multiple_choice', 'eval_multiple_choice'):
            (task, prompt, answer), = said(convert('choice', row, style, seed))
            tail = prompt.partition('Q?')[2]
            place = sum(o in tail and tail.index(o) < tail.index('yes') for o in ('no', 'maybe', 'red', 'blue', 'green'))
            labels = {'ABCDE'[place], 'abcde'[place], '12345'[place], 'i ii iii iv v'.split()[place]}
            assert task == 'qa' and 'no' in tail
            if style.startswith('eval'):
                assert answer == f"{'ABCDE'[place]}. yes" and answer in prompt
            else:
                assert answer == 'yes' or answer in labels or answer in prompt and any(answer == mark.format(k) for k in labels for
                                                                                     mark in ('{}. yes', '{}) yes', '{}: yes', '({}) yes'))
    if 'hint' in row:
        assert prompt.startswith('Look.\nQ?')


def test_multiple_choice_without_right_option_is_skipped():
    row = {'video': 'v', 'question': 'Q?', 'options': ['no', 'yes'], 'answer': 'Dog'}
    assert skipped('choice', row) == 'no right option'     # and not D, the fourth
    assert skipped('choice', {**row, 'answer': 'D'}) == 'no right option'
    assert skipped('choice', {**row, 'options': "['no', "}) == 'broken options'
    assert skipped('choice', {**row, 'options': ['yes'], 'answer': 'yes'}) == 'no right option'
    assert options_of({'question': 'Q?', 'options': ['3', '0'], 'answer': '0'}, random.Random(0))[2] == 1    # a text, not an index


def test_subtitles_stay_with_row():
    d = convert('choice', {'video_id': 'v', 'Question': 'Q?', 'Answer': 'a', 'NegativeAnswers': ['b'],
                           'subtitle': [{'start': 1., 'end': 3.4, 'text': 'hello'}, {'start': 4, 'end': 5, 'text': ''}]})
    assert d['subtitles'] == [{'start': 1., 'end': 3.4, 'text': 'hello'}]


def test_clevrer_and_funqa():
    d = convert('clevrer', {'video_filename': 'v.mp4', 'questions': [
        {'question': 'How many?', 'answer': '3'},
        {'question': 'Which?', 'choices': [{'choice': 'a', 'answer': 'wrong'}, {'choice': 'b', 'answer': 'correct'}]},
        {'question': 'Both?', 'choices': [{'choice': 'a', 'answer': 'correct'}, {'choice': 'b', 'answer': 'correct'}]}]})
    assert len(d['conversations']) == 2 and said(d)[0][1] == 'video_short_answer: How many?'
    row = {'task': 'H2', 'visual_input': 'H_1.mp4', 'instruction': 'Describe.', 'output': 'He falls.'}
    assert said(convert('funqa', row, ''))[0][2] == 'He falls.' and skipped('funqa', {**row, 'task': 'H1'}) == 'task'


def test_video_captions_labels_and_moments():
    d = convert('video_caption', {'video_id': 'v1', 'video_start': 0, 'video_end': 42, 'video_caption': 'Short.', 'annotation_score': 4,
                                  'merged_caption': 'Long.', 'video_frame_merged_caption': ''})
    assert d['video'] == {'path': 'v1'} and (d['start'], d['end']) == (0, 42) and [a for *_, a in said(d)] == ['Short.', 'Long.']
    assert skipped('video_caption', {'video_id': 'v1', 'video_caption': 'x', 'annotation_score': 2}) == 'low score'
    assert said(convert('video_caption', {'video_path': 'a.mp4', 'motion_caption': 'It spins.'}))[0][2] == 'It spins.'
    assert said(convert('label', {'video': 'a.mp4', 'label': 'juggling'}, 'kinetics_label'))[0][2] == 'juggling'
    d = convert('actor_captions', {'video': 'a', 'actor_names': ['Dog'], 'captions': ['It barks.']})
    assert said(d) == [('captioning', 'Describe what the dog does.', 'It barks.')]
    row = {'qid': 1, 'vid': 'x', 'query': 'A man runs', 'relevant_windows': [[2, 8.5], [20, 24]]}
    assert said(convert('moments', row))[0][2] == 'Segments: [2-8.5], [20-24]'
    assert skipped('moments', {**row, 'relevant_windows': []}) == 'windows'


def test_video_segments_and_actions():
    coin = {'video_id': 'v1', 'subset': 'training', 'annotation': [{'id': 1, 'label': 'cut', 'segment': [1.5, 4]}, {'label': 'mix', 'segment': [5, 9]}]}
    clips = list(CONVERTERS['segments'](coin, 'coin_label', random.Random(0)))
    assert [(c['start'], c['end'], said(c)[0][2]) for c in clips] == [(1.5, 4, 'cut'), (5, 9, 'mix')]
    youcook = {'video_id': 'v1', 'annotations': [{'segment': [1, 4], 'sentence': 'cut the bread', 'id': 0}]}
    assert said(convert('segments', youcook, 'youcook2_label'))[0][2] == 'cut the bread'
    d = convert('label', {'line': 'AO8RW 0.0 6.9##a person is putting a book on a shelf.'}, 'charades_sta')
    assert d['video'] == {'path': 'AO8RW'} and d['end'] == 6.9 and said(d)[0][2].startswith('a person')
    assert skipped('label', {'line': 'AO8RW 6.9 1.0##a person sits.'}, 'charades_sta') == 'empty clip'
    d = convert('antonym', {'rel_vid_path': '1.webm', 'label': 'Closing a box', 'label_action_antonym_clip_text': 'Opening a box'}, 'video_multiple_choice')
    assert 'Opening a box' in said(d)[0][1] and 'Not sure' in said(d)[0][1]
    d = convert('antonym', {'video_uid': 'u', 'clip_start': 2., 'clip_end': 3., 'clip_text': '#C C cuts bread', 'action_antonym_clip_text': '#C C joins bread'},
                'video_multiple_choice')
    assert d['start'] == 2 and 'C cuts bread' in said(d)[0][1] and '#' not in said(d)[0][1]
    assert said(convert('repetitions', {'video_path': 'a.mp4', 'class': 'push ups', 'count': 7}, 'video_short_answer'))[0][2] == '7'
    d = convert('problems', {'video_id': '17', 'question': 'How many?', 'answer': '3', 'choices': ['2', '3']}, 'tabmwp_da')
    assert d['images'] == [{'path': '17.png'}] and said(d)[0][2] == '3'
    d = convert('vqa', {'clip': 'x', 'uid': 'u1', 'start': 3., 'end': 5., 'message_list': [{'question': 'Label the clip.', 'answer': 'cut', 'style': 'x'}]})
    assert d['video'] == {'path': 'u1'} and d['start'] == 3
    assert skipped('vqa', {'uid': 'u1', 'corrupt': True, 'question': 'x', 'answer': 'y'}) == 'corrupt'


def test_one_bad_question_does_not_cost_the_others():
    row = {'video': 'a.mp4', 'questions': [{'question': 'Which?', 'options': ['x', 'y'], 'answer': 'z'}, {'question': 'Which?', 'options': ['x', 'y'], 'answer': 'y'}]}
    assert len(convert('choice', row)['conversations']) == 1
    assert len(convert('vqa', {'image': 'a.png', 'qas': [{'question': 'Q', 'answers': []}, {'question': 'Q', 'answers': ['a']}]})['conversations']) == 1
    assert skipped('vqa', {'image': 'a.png', 'qas': [{'question': 'Q', 'answers': []}]}) == 'no answer'
    ai2d = {'imageName': '0.png', 'questions': {'What eats grass?': {'answerTexts': ['a', 'b'], 'correctAnswer': 1, 'abcLabel': False},
                                                'What is A?': {'answerTexts': ['a', 'b'], 'correctAnswer': 0, 'abcLabel': True}}}
    d = convert('choice', ai2d, 'eval')
    assert len(d['conversations']) == 1 and said(d)[0][2] == 'B. b' and 'What eats grass?' in said(d)[0][1]


def test_video_points_and_their_seconds():
    row = {'video_id': 'v2', 'label': 'Dog', 'count': 2, 'points': [[{'x': 10, 'y': 20}], [{'x': 12, 'y': 25}]],
           'two_fps_timestamps': [1., 3.5], 'clip_start': 0., 'clip_end': 30.}
    d = convert('video_points', row)
    assert d['conversations'][0]['messages'][1]['points']['points'] == [
        {'x': .1, 'y': .2, 'id': 1, 't': 1.}, {'x': .12, 'y': .25, 'id': 2, 't': 3.5}]
    assert d['end'] == 30 and said(d)[1][2] == '2'
    # seconds of the whole video become seconds of the clip; a video of 63 seconds at most is shown whole
    late = {**row, 'clip_start': 1., 'video_duration': 200.}
    assert [p['t'] for p in convert('video_points', late)['conversations'][0]['messages'][1]['points']['points']] == [0, 2.5]
    short = convert('video_points', {**late, 'video_duration': 63.})
    assert 'start' not in short and short['conversations'][0]['messages'][1]['points']['points'][0]['t'] == 1
    assert skipped('video_points', {**late, 'clip_start': 2.}) == 'point outside'
    academic = convert('video_points', {'subset': 'lvvis', 'video_name': 'v1', 'category': 'Dog', 'count': 1, 'timestamps': [4.],
                                        'points': [[{'x': 10, 'y': 20}]], 'video_duration': 90., 'clip_start_time': 3., 'clip_end_time': 60.})
    assert (academic['start'], academic['end'], academic['video']) == (3, 60, {'path': 'v1'}) and 'dog' in said(academic)[0][1]
    held_out = convert('video_points', {**row, 'points': [{'x': 10, 'y': 20}, {'x': 12, 'y': 25}], 'width': 200, 'height': 100})
    assert found(held_out) == [(.05, .2), (.06, .25)]


TRACK = {'id': 'k1', 'video': 'seq_01', 'fps': 6, 'expression': 'the white horse', 'sampling_fps': 1, 'width': 200, 'height': 100,
         'frame_trajectories': [
             {'frame': 0, 'time': 0., 'points': [{'id': 7, 'point': [120, 88], 'occluded': False}, {'id': 3, 'point': [20, 8], 'occluded': False}]},
             {'frame': 6, 'time': 1., 'points': [{'id': 7, 'point': [125, 88], 'occluded': True}, {'id': 3, 'point': [30, 8], 'occluded': False}]},
             {'frame': 12, 'time': 2., 'points': [{'id': 7, 'point': [130, 88], 'occluded': False}]}]}


def test_tracks():
    places = convert('track', TRACK)['conversations'][0]['messages'][1]['points']['points']
    assert [(p['id'], p['t'], p['x']) for p in places] == [(1, 0, .1), (2, 0, .6), (1, 1, .15), (2, 2, .65)]
    places = convert('track', TRACK, 'video_point_ground_start_end')['conversations'][0]['messages'][1]['points']['points']
    assert [(p['id'], p['t']) for p in places] == [(1, 0), (2, 0), (1, 1), (2, 2)]
    for seed in range(10):
        try:
            talk = convert('track', TRACK, 'video_single_point_track_per_frame', seed)['conversations'][0]['messages']
        except Skip:                           # started at the last sight of an object
            continue
        (start,), rest = talk[0]['points']['points'], talk[1]['points']['points']
        assert all(p['t'] > start['t'] and p['id'] == 1 for p in rest) and rest
    assert skipped('track', {**TRACK, 'width': None}) == 'no size'
    assert skipped('track', {**TRACK, 'frame_trajectories': [{'time': 0., 'points': []}]}) == 'no points'
    boxes = [{'frame': 0, 'time': 0., 'points': [{'id': 0, 'bbox': [10, 20, 20, 40]}]}]
    assert found(convert('track', {**TRACK, 'frame_trajectories': boxes})) == [(.1, .4)]


def test_box_points_masks_and_clocks():
    d = convert('box_point', {'img_filename': 's.png', 'instruction': 'Close the window', 'bbox': [10, 20, 30, 40]})
    assert found(d) == [(25, 40)] and d['conversations'][0]['box'] == [10, 20, 40, 60]
    d = convert('box_point', {'img_filename': 's.png', 'instruction': 'Close', 'bbox': [10, 20, 30, 40]}, 'user_qa corners')
    assert found(d) == [(20, 30)]
    d = convert('box_point', {'image': {'bytes': b'1'}, 'instruction': 'Close', 'box_coordinates': [0, 0, 10, 0, 10, 20]})
    assert d['conversations'][0]['box'] == [0, 0, 10, 20]
    assert skipped('box_point', {'img_filename': 's.png', 'instruction': 'Close', 'bbox': []}) == 'no box'
    d = convert('mask_point', {'image_filename': 'a.jpg', 'mask_filename': 'm.png', 'category': 'c', 'user_input': 'Point to it.'})
    assert d['conversations'][0]['mask'] == 'm.png'
    d = convert('mask_point', {'image_url': URL, 'label': 'cup', 'points': [{'x': 50., 'y': 20.}], 'masks': [[[False, True, False], [False, False, True]]]})
    mask = d['conversations'][0]['messages'][1]['points']['points'][0]['mask']
    assert mask == {'size': [2, 3], 'runs': [1, 1, 3, 1]} and runs([[1, 0]]) == {'size': [1, 2], 'runs': [0, 1, 1]}
    assert said(convert('clocks', {'image': {'bytes': b'1'}, 'text': 'It is 10:09.'}))[0][2] == 'It is 10:09.'


def test_same_row_gives_same_record():
    for row in CHOICES:
        assert convert('choice', row, 'x', 5) == convert('choice', row, 'x', 5)
    assert PREFIXED & {'vqa2', 'doc_qa', 'video_short_answer'} and 'user_qa' not in PREFIXED
