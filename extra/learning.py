"""Watching a model learn: every `show_interval` steps train.py has it answer the same questions about
one held-out record again. The answers stand under the progress bar, and in out_dir/learning.html, a
page that is written anew each time: the picture with the points that the model gave at each step,
what it said, the scores of the answers, and the loss of each task.

    showcase = Showcase(held_out, processor)
    answers = showcase.answer(model)              {task: text}
    showcase.write_page(out_dir)                  from out_dir/metrics.jsonl

Nothing of the training changes: weights stay as they are, no random number of torch's is drawn, and
the record is read from the data set itself, not by the training's loader.
"""
import html
import json
import math
from pathlib import Path

import torch

from data import collate, last_answer, parse_points
from extra.engine import generate, unfuse_linears
from extra.kernels import uncompiled
from media import BadRow, data_url, open_picture

ASKED = ('captioning', 'pointing', 'counting', 'qa')     # tasks, one question of each, in this order
LONGEST = 96                                             # tokens of an answer
SEARCHED = 200                                           # records of a set that are looked at
MOST_CARDS = 48                                          # of the page; of more, some are left out
WIDTH, HEIGHT = 720, 240                                 # pixels of a chart
COLOURS = ('#2a6fdb', '#d9480f', '#2b8a3e', '#862e9c', '#c2255c', '#0b7285', '#5f3dc4', '#846358')


# --------------------------------------------------------------------------------------------------
# Asking

def number_of_points(conversation):
    """Of the last answer of a conversation."""
    messages = conversation['messages']
    points = messages[last_answer(messages)].get('points') or {}
    return len(points.get('points', []))


def is_question(conversation):
    """Whether a user's turn stands before the last answer, which a caption may lack."""
    messages = conversation['messages']
    last = last_answer(messages)
    return last > 0 and messages[last - 1]['role'] == 'user'


def choose_questions(record):
    """{task: a conversation of it}: the first one of each task in ASKED; of those that point, the one
    with the most points, because it shows most. A conversation without a task counts as 'qa'."""
    chosen = {}
    for task in ASKED:
        of_task = []
        for conversation in record['conversations']:
            if conversation.get('task', 'qa') == task and is_question(conversation):
                of_task.append(conversation)
        if of_task:
            chosen[task] = max(of_task, key=number_of_points)
    return chosen


def choose(dataset):
    """The record of a held-out set to ask about, among its first ones: (its index, its picture, its
    questions as `choose_questions` gives them), or None where no record with one picture has a
    question. The more tasks the better, then the more points. More than four count as one, because
    the marks would hide the picture."""
    best = None
    best_rank = (0, 0)                       # (tasks, points)
    for index in range(min(len(dataset), SEARCHED)):
        try:
            record = dataset[index]
            if len(record['images']) != 1:
                continue
            picture = open_picture(dataset.folder, record['images'][0])
        except BadRow:                       # validation skips it likewise
            continue
        chosen = choose_questions(record)
        points = 0
        if 'pointing' in chosen:
            points = number_of_points(chosen['pointing'])
        if points > 4:
            points = 1
        if (len(chosen), points) > best_rank:
            best = (index, picture, chosen)
            best_rank = (len(chosen), points)
    return best


class Showcase:
    """One held-out picture with a question of each task.

    held_out: the Mixture of validation sets, or None. The first set in which `choose` finds a record
    is taken; where none is found, the showcase is empty, and false.
    """

    def __init__(self, held_out, processor):
        self.processor = processor
        self.questions = {}                  # task -> messages that end with the user's turn
        self.wanted = {}                     # task -> the right answer, as text
        for dataset in held_out.datasets if held_out else ():
            best = choose(dataset)
            if best:
                self._take(dataset, *best)
                return

    def _take(self, dataset, index, picture, chosen):
        self.where = dataset.where(index)
        self.picture = picture
        for task, conversation in chosen.items():
            messages = conversation['messages']
            last = last_answer(messages)
            self.questions[task] = messages[:last]
            self.wanted[task] = self.processor.render_message(messages[last], task)

    def __bool__(self):
        return bool(self.questions)

    def question(self, task):
        return self.questions[task][-1]['content']

    def answer(self, model):
        """{task: the model's answer}. Of a sharded model all ranks must call this together, because
        each block's weights are gathered from all."""
        is_training = model.training
        model.eval()
        is_sharded = hasattr(model, 'unshard')
        if is_sharded:
            model.unshard()                  # what is in no block; blocks gather their own
        answers = {}
        with uncompiled(model):              # each prompt has a length of its own
            for task, messages in self.questions.items():
                prompt = self.processor.prompt(messages, images=[self.picture])
                batch = collate([[prompt]], self.processor, len(prompt.tokens))
                batch = batch.to(model.pixel_scale.device)
                # The fast way joins weights, which are not all there in a sharded model
                steps = model.generate(batch, LONGEST) if is_sharded else generate(model, batch, LONGEST)
                tokens = torch.cat(list(steps)).tolist()
                answers[task] = self.processor.decode([t for t in tokens if t != self.processor.im_end])
        if is_sharded:
            model.reshard()
        else:
            unfuse_linears(model)
        model.train(is_training)
        return answers

    def lines(self, answers):
        """The answers for the screen: the caption, and in a second line the others."""
        others = []
        for task, answer in answers.items():
            if task != 'captioning':
                others.append(f'{self.question(task)} {short(answer, 60)}')
        lines = []
        if 'captioning' in answers:
            lines.append(short(answers['captioning'], 150))
        if others:
            lines.append(' | '.join(others))
        return lines

    # -- the page

    def write_page(self, out_dir):
        """Writes out_dir/learning.html from out_dir/metrics.jsonl."""
        records = []
        for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines():
            records.append(json.loads(line))
        losses = curves(records, lambda name: name.startswith('loss/'))
        losses = {name: thinned(line) for name, line in losses.items()}
        scores = curves(records, is_score)
        # A resumed run may have other held-out data than before, and so another picture
        shown = [record for record in records if record.get('about') == self.where]
        page = [
            f"<!doctype html><meta charset='utf-8'><title>{html.escape(str(out_dir))}</title>{STYLE}",
            f'<h1>{html.escape(str(out_dir))}: what the model says about {html.escape(self.where)}, '
            'which it has never been shown</h1>',
            self.card('what is right', self.wanted),
        ]
        every = -(-len(shown) // MOST_CARDS)
        for i, record in enumerate(shown):
            if i % max(1, every) == 0 or i == len(shown) - 1:
                page.append(self.card(f"step {record['step']}", record['shown']))
        if scores:
            page.append('<h2>Scores of held-out answers</h2>' + chart(scores, 1.))
        if losses:
            page.append('<h2>Loss of each task</h2>' + chart(losses))
        temporary = Path(out_dir) / 'learning.html.tmp'
        temporary.write_text('\n'.join(page), encoding='utf-8')
        temporary.replace(Path(out_dir) / 'learning.html')

    def card(self, title, answers):
        """The picture with the points of an answer, and the answers below it."""
        picture = self.picture.copy()
        picture.thumbnail((384, 384))        # reduced if it is larger
        width, height = picture.size
        radius = .035 * max(picture.size)
        marks = []
        for p in parse_points(answers.get('pointing', '')):
            place = f'cx="{p["x"] * width:.1f}" cy="{p["y"] * height:.1f}" r="{radius:.1f}" fill="none"'
            # A magenta ring with a black rim is seen on any ground
            for colour, thickness in (('black', .6 * radius), ('magenta', .3 * radius)):
                marks.append(f'<circle {place} stroke="{colour}" stroke-width="{thickness:.1f}"/>')
        said = []
        for task, answer in answers.items():
            said.append(f'<p><i>{html.escape(self.question(task))}</i><br>{html.escape(answer)}</p>')
        return (f'<div class="card"><h3>{html.escape(title)}</h3>'
                f'<svg width="250" viewBox="0 0 {width} {height}">'
                f'<image href="{data_url(picture)}" width="{width}" height="{height}"/>'
                f"{''.join(marks)}</svg>{''.join(said)}</div>")


STYLE = """<style>
body { font: 14px/1.35 sans-serif; margin: 2em; max-width: 76em }
.card { display: inline-block; vertical-align: top; width: 21em; margin: 0 1em 1em 0 }
.card p { margin: .3em 0; overflow-wrap: anywhere }
</style>"""


def short(text, length):
    """A text in one line of at most `length` characters."""
    text = ' '.join(text.split())
    if len(text) > length:
        text = text[:length - 2] + '..'
    return text


# --------------------------------------------------------------------------------------------------
# Charts

def is_score(name):
    """Whether a figure of metrics.jsonl is a score: 'data set/task/metric'. 'none there' is none of
    its own here, because few questions are about what is not there."""
    return name.count('/') == 2 and not name.endswith('/none there')


def curves(records, is_wanted):
    """{name: [(step, value), ..]} of figures of metrics.jsonl. Of several metrics of one task, the
    first."""
    found = {}
    first_of = {}                            # 'data set/task' -> the name of its first metric
    for record in records:
        for name, value in record.items():
            bare = name.removeprefix('validation/')
            if not is_wanted(bare) or name.startswith('validation/loss'):
                continue
            group = bare.rpartition('/')[0] if is_score(bare) else bare
            if first_of.setdefault(group, bare) == bare:
                if math.isfinite(value):
                    found.setdefault(bare, []).append((record['step'], value))
    return found


def thinned(line, most=150):
    """A line [(x, y), ..] of at most `most` places: the means of as many stretches of it."""
    size = -(-len(line) // most)
    means = []
    for start in range(0, len(line), size):
        stretch = line[start:start + size]
        means.append((stretch[-1][0], sum(y for _, y in stretch) / len(stretch)))
    return means


def chart(lines, top=None):
    """An SVG of lines {name: [(x, y), ..]} over one pair of axes, from 0 to `top`. Without `top`, to
    the largest value after the first twentieth of each line, because the loss of a new model is so
    high that all that follows would lie on the axis."""
    last = max(x for line in lines.values() for x, _ in line)
    if not top:
        late = [y for line in lines.values() for _, y in line[len(line) // 20:]]
        top = max(late) or 1.
    drawn = [f'<svg width="{WIDTH + 260}" height="{HEIGHT + 30}" font-size="12">']
    for i in range(5):                       # a grid with its values
        y = HEIGHT - HEIGHT * i / 4 + 8
        drawn.append(f'<line x1="40" x2="{WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                     f'<text x="2" y="{y + 4}">{top * i / 4:.3g}</text>')
    drawn.append(f'<text x="{WIDTH - 60}" y="{HEIGHT + 26}">step {last}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = []
        for x, y in line:
            right = 40 + (WIDTH - 40) * x / last
            down = HEIGHT - HEIGHT * min(y, top) / top + 8
            places.append(f'{right:.1f},{down:.1f}')
        drawn.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{WIDTH + 8}" y="{20 + 16 * i}" fill="{colour}">{html.escape(name)}</text>')
    drawn.append('</svg>')
    return ''.join(drawn)
