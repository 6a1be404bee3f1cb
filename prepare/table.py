"""Reading of datasets.csv, for download.py, weights.py and the configs of the stages.

    from prepare.table import sets
    mixture = {'all': {'rate': 1.0, 'sets': sets('2')}}

Not in this file: how a dataset is fetched (download.py). It imports the standard library only,
because a config that is read on a training machine must not need what download.py needs.
"""
import csv
import hashlib
from pathlib import Path

TABLE = Path(__file__).with_name('datasets.csv')


def entries(path=TABLE):
    """The lines of datasets.csv as dicts, whose keys are the names in its first line."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def sets(stage, group='', data='data'):
    """The datasets of a stage ('1', '2', ..) as a mixture in a config has them.

    Returns {name: {'size': number of rows, if it is known}}; with `group`, of that group only.
    Datasets that must be fetched by hand are left out unless they are in the folder `data`.
    """
    chosen = {}
    for entry in entries():
        if stage not in entry['stages'].split(','):
            continue
        if group and entry['group'] != group:
            continue
        # download.py fetches the automatic ones by itself, so a config may count on them.
        is_here = (Path(data) / entry['name'] / 'train.jsonl').exists()
        if entry['automatic'] != 'yes' and not is_here:
            continue
        chosen[entry['name']] = {}
        if entry['examples']:
            chosen[entry['name']]['size'] = int(entry['examples'])
    return chosen


def sha256(path):
    """The check sum of a file, as 64 hexadecimal digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
