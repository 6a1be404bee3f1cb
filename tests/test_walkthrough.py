"""docs/walkthrough.md does what it shows: its commands draw the world, its blocks print what stands below them."""
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs/walkthrough.md').read_text()


def test_walkthrough_prints_what_it_shows(tmp_path, monkeypatch):
    command = re.search(r'^python (prepare/shapes.py .*)$', PAGE, re.M)[1]
    arguments = shlex.split(command.replace('data/walk', str(tmp_path / 'data/walk')))
    subprocess.run([sys.executable, *arguments, '--workers', '1'], cwd=ROOT, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r'```python\n(.*?)```\n```\n(.*?)```\n', PAGE, re.S)
    assert len(blocks) == PAGE.count('```python') == 14
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, 'docs/walkthrough.md', 'exec'), names)
        assert printed.getvalue() == expected, code
