"""Tables and timings that the documents quote: they can be printed, and what can be worked out by
hand is right."""
import re
import subprocess
import sys
from pathlib import Path

from test_train import TINY

ROOT = Path(__file__).parent.parent


def output(script, *args):
    """What a script prints."""
    command = [sys.executable, ROOT / script, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bench_times_step_of_stage_config():
    small = [f'--{name}={TINY[name]}' for name in ('vision', 'language', 'dtype', 'image_size')]
    small += ['--repeats=1', '--threads=1', '--video_size=32', '--batch_size=2', '--seq_len=512']
    for stage in (1, 3):
        out = output('bench.py', f'--step={ROOT}/config/stage{stage}.py', *small)
        assert '2 rows of 512 tokens' in out
        assert 'tokens/s' in out
        assert 'total' in out
        ours, theirs = re.search(r'sums (\S+) and (\S+)', out).groups()
        assert ours == theirs


def test_parallel_plan_bytes_by_number_of_devices():
    out = output('parallel.py', ROOT / 'config/stage3.py')
    # (16 queries + 16 results + 8 keys + 8 values) x 128 x 2 bytes x 18,432 tokens, half of which
    # go to the other rank
    assert re.search(r'^ +36,864 +2 +18,432 +[0-9.]+ +113$', out, re.M)
    # Keys and values are repeated to 16; 15 in 16 tokens go to other ranks
    assert re.search(r'^ +147,456 +16 +9,216 +[0-9.]+ +142$', out, re.M)
