"""Prints, after the tests, how far the logits (hidden states for a tower alone) are from those of transformers."""
import sys

from hypothesis import settings

settings.register_profile('long', max_examples=5000)       # pytest --hypothesis-profile=long -k "damaged or any_record"


def pytest_terminal_summary(terminalreporter):
    found = getattr(sys.modules.get('test_model'), 'PARITY', {})
    if found:
        terminalreporter.section('largest difference from transformers, float32, random weights')
        for test, worst in found.items():
            terminalreporter.line(f'{worst:.1e}  {test}')
