"""Draw accuracy against minutes of training from runs whose checkpoints eval.py has scored.

    python docs/curve.py out/seed1 out/seed2 out/seed3 > docs/curve.svg

A line is the mean over the runs, its band the lowest and highest. Minutes are wall-clock and hold the validation and
the saving; they come from metrics.jsonl, the scores from step*/eval/metrics.json, of the first dataset evaluated.
"""
import json
import sys
from pathlib import Path

LINES = {('captioning', 'F1'): ('captions, F1', '#7b4fb5'), ('counting', 'accuracy'): ('counting', '#d9822b'),
         ('qa', 'accuracy'): ('questions', '#2b8a57'), ('pointing', 'hit rate'): ('pointing, hit rate', '#2f6fd0')}
W, H, LEFT, TOP = 560, 300, 40, 16       # of the axes, in pixels, and the space before them


def read(run):
    """{(task, metric): {step: score}} and {step: minutes} of a run."""
    records = [json.loads(line) for line in (Path(run) / 'metrics.jsonl').read_text().splitlines()]
    minutes = {r['step']: r['minutes'] for r in records if 'minutes' in r}
    scores = {key: {} for key in LINES}
    for file in sorted(Path(run).glob('step*/eval/metrics.json')):
        metrics = json.loads(file.read_text())['metrics']
        for m in metrics:
            if m['dataset'] == metrics[0]['dataset'] and (m['task'], m['metric']) in LINES:
                scores[m['task'], m['metric']][int(file.parts[-3][4:])] = m['score']
    return scores, minutes


def draw(runs):
    steps = sorted(next(iter(runs[0][0].values())))
    when = [sum(minutes[s] for _, minutes in runs) / len(runs) for s in steps]
    span = when[-1] * 1.03
    x, y = lambda m: LEFT + W * m / span, lambda score: TOP + H * (1 - score)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + W + 150}" height="{TOP + H + 44}" '
           'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>']
    for percent in (0, 25, 50, 75, 90, 100):
        out.append(f'<path d="M{LEFT} {y(percent / 100):.1f}h{W}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 6}" y="{y(percent / 100) + 4:.1f}" text-anchor="end">{percent}</text>')
    for m in range(0, int(span) + 1, max(1, round(span / 8))):
        out.append(f'<text x="{x(m):.1f}" y="{TOP + H + 18}" text-anchor="middle">{m}</text>')
    out.append(f'<text x="{LEFT + W / 2}" y="{TOP + H + 36}" text-anchor="middle">minutes of training</text>')
    labels = []
    for key, (label, colour) in LINES.items():
        at = [[scores[key][s] for scores, _ in runs] for s in steps]
        mean = [sum(v) / len(v) for v in at]
        band = [(m, max(v)) for m, v in zip(when, at)] + [(m, min(v)) for m, v in zip(when, at)][::-1]
        corners = ' '.join(f'{x(m):.1f},{y(s):.1f}' for m, s in band)
        out.append(f'<polygon points="{corners}" fill="{colour}" opacity=".15"/>')
        out.append(f'<polyline points="{" ".join(f"{x(m):.1f},{y(s):.1f}" for m, s in zip(when, mean))}" fill="none" '
                   f'stroke="{colour}" stroke-width="2"/>')
        labels.append((mean[-1], f'{label} {mean[-1]:.1%}', colour))
    below = 0
    for score, text, colour in sorted(labels, reverse=True):               # no label over another
        below = max(y(score), below + 16)
        out.append(f'<text x="{LEFT + W + 6}" y="{below + 4:.1f}" fill="{colour}">{text}</text>')
    return '\n'.join([*out, '</svg>'])


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit('error: which runs? python docs/curve.py out/demo_stage1 > docs/curve.svg')
    print(draw([read(run) for run in sys.argv[1:]]))
