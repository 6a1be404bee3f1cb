"""Released Molmo2 checkpoints beside transformers: tests/molmo2.py, in a process of its own."""
import subprocess
import sys
from pathlib import Path


def test_released_molmo2_matches_transformers():
    command = [sys.executable, '-m', 'pytest', '-q', '-s', '-p', 'no:xdist', 'tests/molmo2.py']
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
