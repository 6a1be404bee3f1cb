"""The plain forms in model.py: a first reader's path for one training step."""
import sys
from pathlib import Path

import torch
from trees import PROCESSOR, build, tree

from data import collate

ROOT = Path(__file__).parent.parent


def files_entered(function):
    """Names of the repository's files whose functions ran."""
    files = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == 'call' and path.is_relative_to(ROOT) and '.venv' not in path.parts:
            files.add(str(path.relative_to(ROOT)))
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def test_plain_step_never_enters_extra():
    """Forward and backward pass with fast=False; with fast=True the same step does enter it."""
    batch = collate([[tree(1, 3), tree(2, 0)], [tree(3, 5, frames=True)]], PROCESSOR, 71)
    entered = {}
    for fast in (False, True):
        model = build(fast=fast)
        entered[fast] = files_entered(lambda model=model: model(batch)[0].backward())
    assert {name for name in entered[False] if not name.startswith('tests')} == {'model.py'}
    assert 'extra/kernels.py' in entered[True]


def test_plain_generate_never_enters_extra():
    model = build(fast=False).eval()
    batch = collate([[tree(1, 1)]], PROCESSOR, len(tree(1, 1).tokens))
    keep = batch.branch_ids[0] <= 1
    for name in ('tokens', 'position_ids', 'document_ids', 'branch_ids'):
        setattr(batch, name, getattr(batch, name)[:, keep])
    tokens = []
    entered = files_entered(lambda: tokens.extend(model.generate(batch, 3)))
    assert len(tokens) == 3 and torch.stack(tokens).shape == (3, 1)
    assert {name for name in entered if not name.startswith('tests')} == {'model.py'}
