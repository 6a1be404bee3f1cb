"""datasets.csv, for download.py and for configs: which sets a stage trains on.

    from prepare.table import sets
    mixture = {'all': {'rate': 1.0, 'sets': sets('2')}}
"""
import csv
import hashlib
from pathlib import Path

TABLE = Path(__file__).with_name('datasets.csv')


def entries(path=TABLE):
    """The table's lines as dicts."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def sets(stage, group='', data='data'):
    """{name: {'size': rows, if known}} of a stage ('1', '2'): what download.py fetches by itself, and what you fetched
    by hand and prepared in `data`."""
    return {e['name']: {'size': int(e['examples'])} if e['examples'] else {} for e in entries()
            if stage in e['stages'].split(',') and group in ('', e['group'])
            and (e['automatic'] == 'yes' or (Path(data) / e['name'] / 'train.jsonl').exists())}


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
