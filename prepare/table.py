"""datasets.csv for configs: which sets a stage trains on.

    from prepare.table import sets
    mixture = {'all': {'rate': 1.0, 'sets': sets('2')}}
"""
import csv
from pathlib import Path


def sets(stage, group='', data='data'):
    """{name: {'size': rows, if known}} of a stage ('1', '2'): what download.py fetches by itself, and what you fetched
    by hand and prepared in `data`."""
    with open(Path(__file__).with_name('datasets.csv'), newline='') as f:
        return {e['name']: {'size': int(e['examples'])} if e['examples'] else {} for e in csv.DictReader(f)
                if stage in e['stages'].split(',') and group in ('', e['group'])
                and (e['automatic'] == 'yes' or (Path(data) / e['name'] / 'train.jsonl').exists())}
