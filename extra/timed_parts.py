"""Runs the parts of a long check one by one, each within its own time, and prints a line of JSON
for each finding.

    def products(say):                       # a part is a function that says what it finds
        say('product', name='qkv', tflops=612.)

    main([(products, 40), (attention, 90)], seconds=200)

The parts run in a second process, because a wrong kernel leaves a GPU unusable for the process that
started it, and may hang where no exception reaches. When a part dies or hangs, the others go on in
a new process.
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

GRACE = 15               # seconds that a part may take beyond its time before its process is killed


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
    print(json.dumps({'what': what, **{name: rounded(value) for name, value in found.items()}}), flush=True)


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
        signal.alarm(max(1, int(seconds)))
        try:
            part(say)
            signal.alarm(0)
        except OutOfTime:
            say(part.__name__, failed=f'not done in its {seconds:.0f} seconds')
        except Exception as e:               # whatever it is, the other parts are worth as much
            signal.alarm(0)
            traceback.print_exc()
            say(part.__name__, failed=f'{type(e).__name__}: {str(e)[:400]}')
        finally:
            signal.alarm(0)
        say('end', part=part.__name__, seconds=time.time() - start)
        if gpu_is_unusable():
            os._exit(3)


def watch(child, names):
    """Prints a child's lines until it ends or hangs. Returns (the parts that it ended, what failed:
    {part: why})."""
    lines, ended, failed, now, deadline = queue.Queue(), [], {}, None, time.time() + 120

    def read():
        for line in child.stdout:
            lines.put(line)
        lines.put(None)
    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(.1, deadline - time.time()))
        except queue.Empty:
            child.kill()                     # one process, by its own number
            failed[now or names[0]] = 'hung, and was killed'
            say(now or names[0], failed='hung, and was killed')
            ended.append(now or names[0])
            break
        if line is None:
            if now:
                failed[now] = 'its process died'
                say(now, failed='its process died')
                ended.append(now)
            break
        print(line, end='', flush=True)
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if found.get('what') == 'begin':
            now, deadline = found['part'], time.time() + found['seconds'] + GRACE
        elif found.get('what') == 'end':
            ended.append(now)
            now, deadline = None, time.time() + GRACE
        elif 'failed' in found:
            failed[now or found['what']] = found['failed']
        elif 'skipped' in found:
            ended.append(found['what'])
    child.wait()
    return ended, failed


def main(parts, seconds):
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
    until, failures = time.time() + seconds, {}
    while chosen:
        command = [sys.executable, *sys.argv, f"--parts={','.join(chosen)}", f'--until={until}']
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ended, failed = watch(child, chosen)
        failures.update(failed)
        if not ended:                        # it could not even start: the next would not either
            failures[chosen[0]] = f'the process ended with code {child.returncode}'
            break
        chosen = [name for name in chosen if name not in ended]
    say('all parts', failed=failures or 'none')
    return 1 if failures else 0
