"""The runner of `make gpu-check`: a part that fails, takes too long, hangs or dies costs only itself."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from extra import timed_parts
timed_parts.GRACE = 3

def first(say):
    say('found', value=1.23456)

def fails(say):
    raise ValueError('no')

def too_long(say):
    time.sleep(60)

def hangs(say):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)      # what a kernel that never returns amounts to
    time.sleep(60)

class Swallows:
    def __del__(self):
        time.sleep(8)                                  # an exception in here is printed and forgotten

def swallowed(say):
    x = Swallows()
    del x
    time.sleep(60)

def dies(say):
    os.kill(os.getpid(), signal.SIGKILL)

def last(say):
    say('found', value=2)

if __name__ == '__main__':
    sys.exit(timed_parts.main([(first, 30), (fails, 30), (too_long, 5), (hangs, 5), (swallowed, 5), (dies, 30),
                               (last, 30)], 60, side_by_side='--side' in sys.argv))
"""


FAILED = {'fails': 'ValueError: no', 'too_long': 'not done in its 5 seconds', 'hangs': 'hung, and was killed',
          'swallowed': 'not done in its 5 seconds', 'dies': 'its process died'}


def test_a_part_costs_only_itself(tmp_path):
    script = tmp_path / 'parts.py'
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['value'] for line in lines if line['what'] == 'found'] == [1.235, 2]
    assert lines[-1]['what'] == 'all parts' and lines[-1]['failed'] == FAILED
    assert done.returncode == 1
    chosen = subprocess.run([sys.executable, script, '--parts=last'], capture_output=True, text=True)
    assert chosen.returncode == 0 and 'first' not in chosen.stdout
    wrong = subprocess.run([sys.executable, script, '--parts=lost'], capture_output=True, text=True)
    assert wrong.stderr.strip() == "error: no part 'lost'; there are first, fails, too_long, hangs, swallowed, dies, last"


def test_parts_side_by_side(tmp_path):
    script = tmp_path / 'parts.py'
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script, '--side'], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(line['value'] for line in lines if line['what'] == 'found') == [1.235, 2]
    assert lines[-1]['failed'] == FAILED
    begun = {line['part']: line['at'] for line in lines if line['what'] == 'begin'}
    assert len(begun) == 7 and max(begun.values()) < 4           # seconds since each process began
