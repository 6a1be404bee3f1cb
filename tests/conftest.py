"""Prints, after the tests, how far the logits (hidden states for a tower alone) are from those of transformers."""
import sys

import pytest
from hypothesis import settings

settings.register_profile('long', max_examples=5000)       # pytest --hypothesis-profile=long -k "damaged or any_record"

parity = {}


def pytest_sessionfinish(session):
    parity.update(getattr(sys.modules.get('test_model'), 'PARITY', {}))
    if hasattr(session.config, 'workeroutput'):            # one of several processes (pytest -n): the first one prints
        session.config.workeroutput['parity'] = parity


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    parity.update(getattr(node, 'workeroutput', {}).get('parity', {}))


def pytest_terminal_summary(terminalreporter):
    if parity:
        terminalreporter.section('largest difference from transformers, float32, random weights')
        for test, worst in parity.items():
            terminalreporter.line(f'{worst:.1e}  {test}')
