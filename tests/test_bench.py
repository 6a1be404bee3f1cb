"""Tables and timings that the documents quote: that they can be had, and the parts that are known by hand."""
import re
import subprocess
import sys
from pathlib import Path

from test_train import TINY

ROOT = Path(__file__).parent.parent


def told(script, *args):
    done = subprocess.run([sys.executable, ROOT / script, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_step_of_a_config_is_timed_on_full_rows():
    small = [f'--{k}={TINY[k]}' for k in ('vision', 'language', 'dtype', 'image_size')]
    for stage in (1, 3):
        out = told('bench.py', f'--step={ROOT}/config/stage{stage}.py', *small, '--repeats=1', '--threads=1', '--video_size=32',
                   '--batch_size=2', '--seq_len=512')
        assert '2 rows of 512 tokens' in out and 'tokens/s' in out and 'total' in out
        ours, theirs = re.search(r'sums (\S+) and (\S+)', out).groups()
        assert ours == theirs


def test_memory_and_bytes_by_the_number_of_devices():
    lines = told('parallel.py', ROOT / 'config/stage3.py').splitlines()
    # (16 queries + 16 results + 8 keys + 8 values) x 128 x 2 bytes x 18,432 tokens, half of which go to the other
    assert any(re.fullmatch(r' +36,864 +2 +18,432 +[0-9.]+ +113', line) for line in lines)
    # keys and values repeated to 16; 15 in 16 tokens travel
    assert any(re.fullmatch(r' +147,456 +16 +9,216 +[0-9.]+ +142', line) for line in lines)
