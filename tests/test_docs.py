"""What README.md, CONTRIBUTING.md and docs/ say is true: files exist, flags exist, every file is
named."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
MADE = ('data/', 'out/', 'weights/', 'photo', 'my_', '.venv')    # what commands make or users bring
WRITTEN = ('.points.png', 'train.jsonl', 'metrics.jsonl', 'skipped.jsonl', 'validation.jsonl',
           'predictions.jsonl')


def code(page):
    """The runnable texts of a page: lines of fenced blocks, comments stripped, and `...` spans."""
    text = page.read_text()
    lines = []
    for block in re.findall(r'```\w*\n(.*?)```', text, re.S):
        for line in block.splitlines():
            lines.append(re.sub(r'\s+#.*', '', line).strip())
    outside_blocks = re.sub(r'```.*?```', '', text, flags=re.S)
    spans = re.findall(r'`([^`\n]+)`', outside_blocks)
    return lines + spans


def settings(script):
    """Names assigned at the top of a script, and the options of an argparse one."""
    text = (ROOT / script).read_text()
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    names.update(re.findall(r"(?:add|add_argument|startswith)\('--(\w+)", text))
    # These take the settings of train.py
    if script in ('model.py', 'data.py', 'parallel.py') or 'train_settings' in text:
        names |= settings('train.py')
    if script == 'data.py':
        names |= settings('extra/inspector.py')
    return names


def is_path(word):
    """Does a word of a page name a file or a folder of this repository?"""
    file = r'[\w.-]+(/[\w.-]+)*\.(py|md|txt|toml|png|svg|jsonl|jinja)'
    folder = r'(config|prepare|tests|docs|extra)/[\w./-]*'
    return re.fullmatch(file, word) or re.fullmatch(folder, word)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_docs_name_existing_files(page):
    words = set(re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()))      # targets of links
    for text in code(page):
        for word in text.split():
            words.add(word.split('=')[-1].rstrip('/.,:;)'))
    lost = []
    for word in words:
        is_made = word.startswith(MADE) or word.endswith(WRITTEN)
        exists = (ROOT / word).exists() or (page.parent / word).exists()
        if is_path(word) and not is_made and not exists:
            lost.append(word)
    assert not lost


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_docs_use_existing_flags(page):
    for text in code(page):
        for command in re.split(r'&&|\|', text):
            script = re.search(r'\b((?:prepare/|extra/)?\w+\.py)\b', command)
            if not script:
                continue
            after_script = command[script.end():]          # before it stand torchrun's own
            flags = set(re.findall(r'(?<!\S)--(\w+)', after_script))
            if flags and (ROOT / script[1]).exists():
                assert not flags - settings(script[1]), command


def test_docs_use_existing_make_targets():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
    for page in PAGES:
        for text in code(page):
            assert set(re.findall(r'\bmake ([\w-]+)', text)) <= targets, text


def test_readme_names_every_file():
    """The README's tables name every file of the root, of extra/ and of prepare/."""
    readme = (ROOT / 'README.md').read_text()
    for path in (*ROOT.glob('*.py'), *ROOT.glob('extra/*.py'), *ROOT.glob('prepare/*.py')):
        assert f'`{path.relative_to(ROOT)}`' in readme


def test_readme_first_command_and_result_come_early():
    lines = (ROOT / 'README.md').read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('make '))
    assert first < 20
    assert any('step' in line or '%' in line for line in lines[first:60])


def test_git_tracks_no_generated_data():
    done = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    for path in done.stdout.split():
        assert not path.startswith(('data/', 'out/', 'weights/'))


def test_ruff_finds_nothing():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
