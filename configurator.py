"""Settings are the plain assignments at the top of a script; config files and flags override them.

    batch_size = 32                                         in train.py, before configure(globals())
    python train.py config/stage1.py --batch_size=8         8 replaces 32

Config files and flags apply from left to right. A config file is Python and sees the values so far,
so `warmup_steps = max_steps // 50` works. An unknown setting or a value of the wrong type ends the
script with one line, which names the nearest setting there is.

One config file serves train.py, model.py, data.py and bench.py, because all of them take the list
of settings from train.py (`train_settings`).
"""
import ast
import difflib
import sys
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can put right. The message says what is wrong, where, and what to do;
    scripts print it without a traceback and exit."""


TRAIN = Path(__file__).with_name('train.py')


def train_settings():
    """{name: default} of train.py's settings, without running train.py.

    They are its assignments at top level before the first `if` (which is `if __name__ == ..`).
    """
    # The file is parsed and not imported, because importing it would load torch and all else, and a
    # typo on the command line should be answered at once.
    settings = {}
    for node in ast.parse(TRAIN.read_text()).body:
        if isinstance(node, ast.If):
            break
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            settings[name] = ast.literal_eval(node.value)
    return settings


def configure(settings, args=None):
    """Applies config files and --key=value flags to a script's settings.

    settings: {name: default}, such as globals(); it is updated. Names in lower case with plain
        values are settings, all others stay as they are.
    args: by default those of the command line.
    Returns {name: value} of all settings. A mistake ends the process with one line (sys.exit).
    """
    if args is None:
        args = sys.argv[1:]
    known = _select_settings(settings)
    # Each argument is applied before the next is read, because a config file uses earlier values.
    for arg in args:
        if arg.startswith('--'):
            key, value = _read_flag(arg, known)
            known[key] = check(key, value, known, f'--{key}')
        else:
            known.update(_read_config_file(arg, known))
    settings.update(known)
    return known


def _select_settings(names):
    """The names that can be settings: lower case, not private, and with a plain value."""
    plain_types = (bool, int, float, str, list, tuple, dict)
    settings = {}
    for key, value in names.items():
        is_public = key == key.lower() and not key.startswith('_')
        if is_public and isinstance(value, plain_types):
            settings[key] = value
    return settings


def _read_flag(arg, known):
    """'--key=value' -> (key, value). `--key` alone means True; dashes in a key become underscores.
    """
    key, equals, text = arg[2:].partition('=')
    key = key.replace('-', '_')
    # The value of a text setting is taken as it stands, so no quotes are needed. Sizes of models
    # are text settings too (names in a table) but can be spelled out as a dict.
    if isinstance(known.get(key), str) and not text.startswith(('{', 'dict(')):
        return key, text
    if not equals:
        return key, True
    # Numbers, tuples and dicts are read as Python literals; nothing in them is executed.
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text                       # of the wrong type, which `check` reports


def _read_config_file(name, known):
    """{name: value} of the settings that a config file assigns or leaves as they were."""
    if not Path(name).is_file():
        others = [str(path) for path in Path(name).parent.glob('*.py')]
        near = difflib.get_close_matches(name, others, 1)
        hint = f"; did you mean {near[0]}?" if near else ''
        sys.exit(f"config file {name} does not exist{hint}")
    # The file runs with the present values as its global variables. What it assigns is among them
    # afterwards, as are its imports and helpers, which _select_settings leaves out.
    scope = dict(known)
    try:
        exec(compile(Path(name).read_text(), name, 'exec'), scope)
    except Exception as e:
        # Whatever goes wrong in a config file is the user's mistake, so one line is enough.
        sys.exit(f"config file {name}: {type(e).__name__}: {e}")
    values = {}
    for key, value in _select_settings(scope).items():
        values[key] = check(key, value, known, name)
    return values


def check(key, value, settings, where):
    """`value` in the type of the setting's present value. where: the flag or file, for the error.

    Ends the process with one line if there is no such setting or if the type does not fit.
    """
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1)
        if near:
            hint = f"did you mean '{near[0]}'?"
        else:
            hint = f"known: {', '.join(settings)}"
        sys.exit(f"{where}: unknown setting '{key}'; {hint}")

    default = settings[key]
    # An int may stand for a float, but True, which Python counts as an int, may not.
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # Types are compared exactly, for the same reason: True is not accepted for an int.
    if type(value) is type(default):
        return value
    # A model size is a name in a table or a dict, and one may replace the other.
    if isinstance(default, (str, dict)) and isinstance(value, (str, dict)):
        return value
    sys.exit(f"{where}: {key} = {value!r} is {type(value).__name__}, "
             f"but {key} is {type(default).__name__} (default {default!r})")
