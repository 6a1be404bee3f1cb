"""What README.md and docs/ say is true: files exist, flags exist, every file is named."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MADE = ('data/', 'out/', 'weights/', 'photo', 'my_', '.venv')    # what commands make or users bring


def code(page):
    """The runnable lines of a page: `...` spans and fenced blocks, comments stripped."""
    text = page.read_text()
    blocks = re.findall(r'```\w*\n(.*?)```', text, re.S)
    spans = re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
    return [re.sub(r'\s+#.*', '', line).strip() for block in blocks for line in block.splitlines()], spans


def settings(script):
    """Names assigned at the top of a script, and the options of an argparse one."""
    text = (ROOT / script).read_text()
    names = {t.id for node in ast.parse(text).body if isinstance(node, ast.Assign) for t in node.targets
             if isinstance(t, ast.Name)}
    if script in ('model.py', 'data.py', 'parallel.py') or 'train_settings' in text:           # these take train.py's
        names |= settings('train.py')
    if script == 'data.py':
        names |= settings('extra/inspector.py')
    return names | set(re.findall(r"(?:add_argument|startswith)\('--(\w+)", text))


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_files_exist(page):
    lines, spans = code(page)
    words = {w.split('=')[-1].rstrip('/.,:;)') for text in (*lines, *spans) for w in text.split()}
    words |= set(re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()))
    paths = {w for w in words if re.fullmatch(r'[\w.-]+(/[\w.-]+)*\.(py|md|txt|toml|png|svg|jsonl|jinja)', w)
             or re.fullmatch(r'(config|prepare|tests|docs|extra)/[\w./-]*', w)}
    lost = [p for p in paths if not p.startswith(MADE) and not (ROOT / p).exists() and not (page.parent / p).exists()
            and not p.endswith(('.points.png', 'train.jsonl', 'metrics.jsonl', 'skipped.jsonl', 'validation.jsonl', 'predictions.jsonl'))]
    assert not lost


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_flags_exist(page):
    for text in sum(code(page), []):
        for command in re.split(r'&&|\|', text):
            script = re.search(r'\b((?:prepare/|extra/)?\w+\.py)\b', command)
            flags = re.findall(r'(?<!\S)--(\w+)', command[script.end():] if script else '')     # not torchrun's own
            if script and flags and (ROOT / script[1]).exists():
                assert not set(flags) - settings(script[1]), command


def test_make_targets_exist():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
    for page in PAGES:
        for text in sum(code(page), []):
            assert set(re.findall(r'\bmake ([\w-]+)', text)) <= targets, text


def test_every_file_is_named():
    """The README's tables name every file of the root, of extra/ and of prepare/."""
    readme = (ROOT / 'README.md').read_text()
    files = [*ROOT.glob('*.py'), *ROOT.glob('extra/*.py'), *ROOT.glob('prepare/*.py')]
    assert not [path for path in files if f'`{path.relative_to(ROOT)}`' not in readme]


def test_first_command_and_its_result_come_early():
    lines = (ROOT / 'README.md').read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('make '))
    assert first < 20 and any('step' in line or '%' in line for line in lines[first:60])


def test_nothing_prepared_is_committed():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [p for p in tracked if p.startswith(('data/', 'out/', 'weights/'))]


def test_the_linter_has_nothing_to_say():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '.'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
