"""Prints, after the tests, how far the logits (hidden states for a tower alone) are from those of
transformers. Marks whole files as quick (make quick)."""
import sys

import pytest
from hypothesis import settings

# pytest --hypothesis-profile=long -k "damaged or any_record"
settings.register_profile('long', max_examples=5000)

QUICK_FILES = ('test_configurator.py',)    # all of their tests are quick
parity = {}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in QUICK_FILES:
            item.add_marker('quick')


def pytest_sessionfinish(session):
    parity.update(getattr(sys.modules.get('test_model'), 'PARITY', {}))
    # With pytest -n there are several processes, and the first one prints
    if hasattr(session.config, 'workeroutput'):
        session.config.workeroutput['parity'] = parity


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, 'workeroutput', {})
    parity.update(output.get('parity', {}))


def pytest_terminal_summary(terminalreporter):
    if parity:
        terminalreporter.section('largest difference from transformers, float32, random weights')
        for test, worst in parity.items():
            terminalreporter.line(f'{worst:.1e}  {test}')
