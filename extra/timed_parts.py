"""Runs the parts of a long check one by one, each within its own time, and prints a line of JSON
for each finding.

    def products(say):                       # a part is a function that says what it finds
        say('product', name='qkv', tflops=612.)

    main([(products, 40), (attention, 90)], seconds=200)

The parts run in a second process, because a wrong kernel leaves a GPU unusable for the process that
started it, and may hang where no exception reaches. When a part dies or hangs, the others go on in
a new process. Parts that time nothing may run side by side (`side_by_side`), each in a process of
its own, because most of such a part is compiling on one core.
"""
import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

GRACE = 15               # seconds that a part may take beyond its time before its process is killed
BEGAN = time.time()


class OutOfTime(BaseException):
    """Not an Exception, because a part that catches what its kernels raise must not go on after its
    time."""


def _out_of_time(*_):
    raise OutOfTime


def rounded(value):
    """Floats to four digits, so that a line can be read."""
    if isinstance(value, float):
        return float(f'{value:.4g}')
    return value


def say(what, **found):
    """Prints a finding. `at` is the number of seconds since this process began."""
    line = {'what': what}
    for name, value in found.items():
        line[name] = rounded(value)
    line['at'] = round(time.time() - BEGAN, 1)
    print(json.dumps(line), flush=True)


def gpu_is_unusable():
    """After an illegal access every later call fails: only a new process helps."""
    torch = sys.modules.get('torch')
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return False
    except RuntimeError:
        return True


def stop_timer():
    signal.setitimer(signal.ITIMER_REAL, 0)


def run_here(parts, end):
    """Runs parts in this process until the clock says `end`. Each begins and ends with a line of
    its own."""
    signal.signal(signal.SIGALRM, _out_of_time)
    for part, seconds in parts:
        seconds = min(seconds, end - time.time())
        if seconds < 5:
            say(part.__name__, skipped='no time left')
            continue
        say('begin', part=part.__name__, seconds=seconds)
        start = time.time()
        # Again every second, because an exception in a destructor or in a callback of torch's is
        # swallowed there
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        try:
            part(say)
            stop_timer()
        except OutOfTime:
            stop_timer()
            say(part.__name__, failed=f'not done in its {seconds:.0f} seconds')
        except Exception as e:               # whatever it is, the other parts are worth as much
            stop_timer()
            traceback.print_exc()
            say(part.__name__, failed=f'{type(e).__name__}: {str(e)[:400]}')
        say('end', part=part.__name__, seconds=time.time() - start)
        if gpu_is_unusable():
            os._exit(3)


def watch(child, names):
    """Prints a child's lines until it ends or hangs. Returns (the parts that it ended, what failed:
    {part: why})."""
    lines = queue.Queue()
    ended = []
    failed = {}
    now = None                               # the part that runs
    deadline = time.time() + 120             # for importing torch

    def read():
        for line in child.stdout:
            lines.put(line)
        lines.put(None)
    threading.Thread(target=read, daemon=True).start()

    def give_up(part, why):
        failed[part] = why
        ended.append(part)
        say(part, failed=why)
    while True:
        try:
            line = lines.get(timeout=max(.1, deadline - time.time()))
        except queue.Empty:
            child.kill()                     # one process, by its own number
            waiting = [name for name in names if name not in ended]
            give_up(now or waiting[0], 'hung, and was killed')
            break
        if line is None:
            if now:
                give_up(now, 'its process died')
            break
        sys.stdout.write(line)               # one call, so that lines of two threads stay apart
        sys.stdout.flush()
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if found.get('what') == 'begin':
            now = found['part']
            deadline = time.time() + found['seconds'] + GRACE
        elif found.get('what') == 'end':
            ended.append(now)
            now = None
            deadline = time.time() + GRACE
        elif 'failed' in found:
            failed[now or found['what']] = found['failed']
        elif 'skipped' in found:
            ended.append(found['what'])
    child.wait()
    return ended, failed


def run_in_children(names, until):
    """Runs parts one after the other, in a new process wherever one died. Returns {part: why it
    failed}."""
    failures = {}
    while names:
        command = [sys.executable, *sys.argv, f"--parts={','.join(names)}", f'--until={until}']
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ended, failed = watch(child, names)
        failures.update(failed)
        if not ended:                        # it could not even start: the next would not either
            failures[names[0]] = f'the process ended with code {child.returncode}'
            break
        names = [name for name in names if name not in ended]
    return failures


def main(parts, seconds, side_by_side=False):
    """Runs `parts`, [(function, its seconds), ..], within `seconds`; returns 1 if any failed, else
    0.

    The script that calls this is started again for each process, with --parts and --until added to
    its arguments.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--parts', default='')
    parser.add_argument('--until', type=float, default=0.)
    args, _ = parser.parse_known_args()
    by_name = {part.__name__: (part, time_) for part, time_ in parts}
    if args.until:
        run_here([by_name[name] for name in args.parts.split(',')], args.until)
        return 0
    chosen = args.parts.split(',') if args.parts else list(by_name)
    for name in chosen:
        if name not in by_name:
            sys.exit(f"error: no part '{name}'; there are {', '.join(by_name)}")
    until = time.time() + seconds
    groups = [[name] for name in chosen] if side_by_side else [chosen]
    failures = {}
    with ThreadPoolExecutor(len(groups)) as pool:
        for failed in pool.map(run_in_children, groups, [until] * len(groups)):
            failures.update(failed)
    say('all parts', failed=failures or 'none')
    return 1 if failures else 0
