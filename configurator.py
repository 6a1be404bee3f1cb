"""Settings are the plain assignments at the top of a script; a config file or --key=value overrides them.

    batch_size = 32                # train.py, before `settings = configure(globals())`
    python train.py config/stage1.py --batch_size=8

Config files are Python, run in order, and see the values so far (`warmup_steps = max_steps // 50` works). An unknown
key or a wrong type is one line that names the nearest valid key. `config/stage1.py` serves model.py, data.py and
train.py alike, because all three read the list of settings from train.py.
"""
import ast
import difflib
import sys
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. The message says what, where and what to do; scripts print it and exit."""


TRAIN = Path(__file__).with_name('train.py')


def train_settings():
    """The settings of train.py with their defaults: its top-level assignments, up to `if __name__`."""
    settings = {}
    for node in ast.parse(TRAIN.read_text()).body:
        if isinstance(node, ast.If):
            break
        if isinstance(node, ast.Assign):
            settings[node.targets[0].id] = ast.literal_eval(node.value)
    return settings


def check(key, value, settings, where):
    """`value` as the type of the default it replaces, or one line and exit."""
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1)
        sys.exit(f"{where}: unknown setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else
                                                        f"; known: {', '.join(settings)}"))
    default = settings[key]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    named = isinstance(default, (str, dict)) and isinstance(value, (str, dict))  # a size by name or spelled out
    if type(value) is not type(default) and not named:
        sys.exit(f"{where}: {key} = {value!r} is {type(value).__name__}, but {key} is {type(default).__name__} "
                 f"(default {default!r})")
    return value


def _is_setting(key, value):
    return key == key.lower() and key[0] != '_' and isinstance(value, (bool, int, float, str, list, tuple, dict))


def configure(settings, args=None):
    """Applies config files and --key=value to `settings` (a dict) and returns the same dict, those in lower case.

    A value is read as a Python literal where the setting is not text; `--key` alone means True.
    """
    known = {k: v for k, v in settings.items() if _is_setting(k, v)}
    for arg in sys.argv[1:] if args is None else args:
        if not arg.startswith('--'):
            if not Path(arg).is_file():
                near = difflib.get_close_matches(arg, map(str, Path(arg).parent.glob('*.py')), 1)
                sys.exit(f"config file {arg} does not exist" + (f"; did you mean {near[0]}?" if near else ''))
            scope = dict(known)
            try:
                exec(compile(Path(arg).read_text(), arg, 'exec'), scope)
            except Exception as e:
                sys.exit(f"config file {arg}: {type(e).__name__}: {e}")
            known.update({k: check(k, v, known, arg) for k, v in scope.items() if _is_setting(k, v)})
            continue
        key, equals, text = arg[2:].partition('=')
        key = key.replace('-', '_')
        if key in known and isinstance(known[key], str) and not text.startswith(('{', 'dict(')):
            value = text
        else:
            try:
                value = ast.literal_eval(text) if equals else True
            except (ValueError, SyntaxError):
                value = text               # check() says what was wanted
        known[key] = check(key, value, known, f'--{key}')
    settings.update(known)
    return known
