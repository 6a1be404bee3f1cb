"""Settings: config files, --key=value, and one clear line for every mistake."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure, train_settings  # noqa: E402

DEFAULTS = dict(steps=10, rate=.1, name='a', flag=False, layers=(1, 2), mixture={}, vision='clip')


def test_config_files_and_flags_apply_in_order(tmp_path):
    (tmp_path / 'one.py').write_text('import math\nsteps = 20\nrate = steps / 40\nDOUBLE = 2\n_private = 3\nname = "b"\n')
    (tmp_path / 'two.py').write_text('steps = steps * 2    # sees what came before\n')
    got = configure(dict(DEFAULTS), [str(tmp_path / 'one.py'), '--name=c', str(tmp_path / 'two.py'), '--flag'])
    assert got == {**DEFAULTS, 'steps': 40, 'rate': .5, 'name': 'c', 'flag': True}


@pytest.mark.parametrize('arg,key,value', [
    ('--steps=-3', 'steps', -3), ('--rate=2', 'rate', 2.), ('--rate=1e-4', 'rate', 1e-4), ('--flag=True', 'flag', True),
    ('--layers=(3,)', 'layers', (3,)), ('--mixture={"a": .5}', 'mixture', {'a': .5}), ('--name=3', 'name', '3'),
    ('--name=', 'name', ''), ('--name=a=b', 'name', 'a=b'), ('--vision={"size": 3}', 'vision', {'size': 3})])
def test_flag_values_are_parsed_by_the_type_of_the_setting(arg, key, value):
    got = configure(dict(DEFAULTS), [arg])[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('arg,words', [
    ('--stepps=3', "unknown setting 'stepps'; did you mean 'steps'?"), ('--steps=many', "steps = 'many' is str"),
    ('--steps=2.5', 'steps = 2.5 is float'), ('--flag=1', 'flag = 1 is int'), ('--layers=3', 'layers = 3 is int'),
    ('--zzz=1', 'known: steps'), ('config/nothing.py', 'config file config/nothing.py does not exist')])
def test_wrong_flag_is_a_one_line_error(arg, words):
    with pytest.raises(SystemExit) as e:
        configure(dict(DEFAULTS), [arg])
    assert words in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('text,words', [('steps = \n', 'SyntaxError'), ('steps = lost\n', "NameError: name 'lost'"),
                                        ('stepps = 3\n', "did you mean 'steps'")])
def test_wrong_config_file_is_named_in_the_error(text, words, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(SystemExit) as e:
        configure(dict(DEFAULTS), [str(path)])
    assert str(path) in str(e.value) and words in str(e.value)


def test_config_folder_uses_only_settings_of_train():
    for path in (ROOT / 'config').glob('*.py'):
        configure(train_settings(), [str(path)])


@pytest.mark.parametrize('script', ['train.py', 'model.py', 'data.py', 'sample.py', 'eval.py'])
def test_scripts_suggest_the_nearest_setting_for_a_typo(script):
    done = subprocess.run([sys.executable, str(ROOT / script), '--devise=cpu'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "--devise: unknown setting 'devise'; did you mean 'device'?\n"
