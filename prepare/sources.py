"""What a dataset of datasets.csv is made of: its tables, their rows, and the drafts of records.

    asked_for     the lines of datasets.csv that the command line names
    splits        which splits of a source go into which of our files
    table_files   where the tables of a split are; they are fetched if need be
    rows          the rows of a table, whatever its format is
    drafts_of     what convert.py makes of each row, or why it makes nothing
    grouped       the same, with all conversations about one picture together
    held_out      whether a record goes into validation

A line of datasets.csv is a dict called `entry` here. Not in this file: HTTP and archives, which are
in fetch.py, and how media and records are written, which is in store.py.
"""
import csv
import fnmatch
import hashlib
import itertools
import json
import random
import re
import shutil
import sqlite3
from pathlib import Path

import pyarrow
import pyarrow.parquet
from convert import CONVERTERS, Skip
from fetch import Trouble, dataset_info, fetch_from_hub, fetch_once, fetch_place, hub_files
from store import write_whole
from table import entries
from tqdm import tqdm

# A record has at most this number of conversations; a picture with more becomes several records.
BRANCHES = 16
STAGES = {'pretraining': '1', 'sft': '2', 'long': '3', 'eval': 'eval', 'extra': 'extra'}
TABLES = ('.parquet', '.jsonl', '.json', '.csv', '.tsv', '.txt')


# --------------------------------------------------------------------------------------------------
# Which datasets, and which of their splits

def asked_for(args):
    """The lines of datasets.csv that --datasets or --stage asks for."""
    every = entries(args.table)
    if args.datasets:
        unknown = set(args.datasets) - {entry['name'] for entry in every}
        if unknown:
            raise Trouble(f"no such dataset: {', '.join(sorted(unknown))}. --list shows all")
        return [entry for entry in every if entry['name'] in args.datasets]
    # "all" means what the stages train on and are evaluated with, but not the stage "extra".
    wanted = {'1', '2', '3', 'eval'}
    if args.stage in STAGES:
        wanted = {STAGES[args.stage]}
    if args.include_eval:
        wanted.add('eval')
    return [entry for entry in every if wanted & set(entry['stages'].split(','))]


def splits(entry):
    """[(split of the source, file of ours: train or validation)]"""
    target = 'validation' if entry['stages'] == 'eval' else 'train'
    pairs = [(split, target) for split in entry['split'].split()]
    # The column `validation` names splits, or it is a number: see held_out.
    if not entry['validation'].isdigit():
        pairs += [(split, 'validation') for split in entry['validation'].split()]
    return pairs


def held_out(entry, draft, place):
    """Whether a training record goes into validation, if datasets.csv holds out a number of them.

    The hash of what it shows decides, so that records of one picture stay together. About
    `validation` of `examples` are held out.
    """
    if not entry['validation'].isdigit():
        return False
    # Where the number of examples is not known, 100,000 are assumed.
    share = float(entry['validation']) / max(1., float(entry['examples'] or 1e5))
    key = draft.get('key') or f'{place}'
    digest = hashlib.sha256(key.encode()).hexdigest()
    return int(digest[:8], 16) / 16 ** 8 < share


# --------------------------------------------------------------------------------------------------
# Where the tables and the archives are

def matches_any(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def split_files(info, config, split):
    """Names of a split's tables in a hub repository: as its card has them, else by their names."""
    names = sorted(file.rfilename for file in info.siblings)
    card = info.card_data.to_dict() if info.card_data else {}
    patterns = patterns_of_card(card, config, split)
    if patterns is not None:
        return [name for name in names if matches_any(name, patterns)]

    # Without a card the split and the config must be words of the path: data/train-00000.parquet.
    def mentions(name, word):
        return re.search(rf'(^|[/_.-]){re.escape(word)}([/_.-]|$)', name)

    tables = [name for name in names if name.endswith(TABLES) and mentions(name, split)]
    if config:
        tables = [name for name in tables if mentions(name, config)]
    return tables


def patterns_of_card(card, config, split):
    """The patterns of a split's files in the card of a dataset, or None if it does not have them.

    A card lists for each config its data_files: one path, one {split, path}, or a list of these.
    """
    configs = card.get('configs') or []
    for listed in configs:
        name = listed.get('config_name', 'default')
        if name != (config or 'default') and len(configs) > 1:
            continue
        # A file without a split is of train, as the hub has it.
        files = listed.get('data_files') or []
        if isinstance(files, (str, dict)):
            files = [files]
        for file in files:
            if not isinstance(file, dict):
                file = {'split': 'train', 'path': file}
            if file.get('split', 'train') == split:
                path = file['path']
                return [path] if isinstance(path, str) else path
    return None


def find_tables(entry, split):
    """(revision, [(name, bytes)]) of a split's tables on the hub.

    They are the files that the column `tables` names, those that the dataset's card names, or the
    parquet copies that the hub makes of every dataset. Raises Trouble if there are none.
    """
    info = dataset_info(entry['hub'])
    patterns = entry['tables'].replace('{split}', split).split()
    if patterns:
        names = [file.rfilename for file in info.siblings]
        names = sorted(name for name in names if matches_any(name, patterns))
    else:
        names = split_files(info, entry['config'], split)
        if not names:
            info = dataset_info(entry['hub'], revision='refs/convert/parquet')
            folder = f"{entry['config'] or 'default'}/{split}/"
            names = [file.rfilename for file in info.siblings]
            names = sorted(name for name in names if name.startswith(folder))
    if not names:
        raise Trouble(f"{entry['hub']} has no tables of {entry['config'] or 'its'} {split}")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    return info.sha, [(name, sizes[name]) for name in names]


def table_files(entry, split, fetcher, archives, work, out):
    """The paths of a split's tables; those that are not on this machine are fetched.

    They are what the user put into source/, files of URLs, files in the dataset's archives, or
    files on the hub. Raises Trouble if there are none.
    """
    source = Path(out) / entry['name'] / 'source'
    given = sorted(path for path in source.glob(f'{split}*') if path.suffix in TABLES)
    if given:
        return given

    tables = entry['tables'].replace('{split}', split)
    if tables.startswith('http'):
        return [fetch_once(url, fetcher, out) for url in tables.split()]
    if tables.startswith('inside:'):
        pattern = tables.removeprefix('inside:')
        return tables_inside(pattern, split, archives, work)
    if entry['hub'].count('/') != 1:           # not owner/name, so the hub does not have it
        formats = ', '.join(TABLES)
        raise Trouble(f"{source}/{split}.jsonl (or {formats}) is missing. {entry['instructions']}")

    # The hub has them. The revision is written down, because a run that goes on must not see a
    # newer version.
    pinned = work / f'{split}.tables.json'
    if not pinned.exists():
        write_whole(pinned, json.dumps(find_tables(entry, split)))
    revision, files = json.loads(pinned.read_text())
    return fetch_from_hub(entry['hub'], [name for name, _ in files], revision)


def tables_inside(pattern, split, archives, work):
    """The paths of tables that lie in archives, after they were copied out of them."""
    paths = []
    for i, name in enumerate(archives.matching(pattern)):
        path = work / f'{split}-{i:05d}{Path(name).suffix}'
        path.write_bytes(archives.read(name))
        paths.append(path)
    if not paths:
        raise Trouble(f'its archives hold no {pattern}')
    return paths


def archive_files(entry, fetcher, out):
    """The paths of the archives with a dataset's media. They are fetched once for all datasets.

    The column `media` names them: hub:owner/name:pattern, parts:owner/name:pattern for one archive
    in several files, a URL, or "folder" for what the user puts into source/.
    """
    source = Path(out) / entry['name'] / 'source'
    paths = [source] if source.is_dir() else []
    for place in entry['media'].split():
        if place.startswith('hub:'):
            paths += fetch_place(place)
        elif place.startswith('parts:'):
            paths.append(joined(place, out))
        elif place.startswith('http'):
            paths.append(fetch_once(place, fetcher, out))
        elif place == 'folder' and not source.is_dir():
            raise Trouble(f"{source}/ is missing. {entry['instructions']}")
    return paths


def joined(place, out):
    """The path of an archive that the hub has in parts, after they were put together."""
    _, repo, _ = place.split(':')
    revision, files = hub_files(place)
    whole = Path(out) / '.archives' / f'{repo.replace("/", "--")}-{revision[:12]}'
    if not whole.exists():
        parts = fetch_from_hub(repo, [name for name, _ in files], revision)
        whole.parent.mkdir(parents=True, exist_ok=True)
        temporary = whole.with_suffix('.part')
        with open(temporary, 'wb') as f:
            for part in parts:
                with open(part, 'rb') as piece:
                    shutil.copyfileobj(piece, f, 2 ** 20)
        temporary.rename(whole)
    return whole


# --------------------------------------------------------------------------------------------------
# Rows of tables

def rows(path, split=''):
    """Yields a table's rows as dicts, from parquet, JSON lines, JSON, CSV, TSV or lines of text.

    Broken bytes in text become U+FFFD. `split` chooses rows from a JSON file that has all splits.
    """
    path = Path(path)
    if path.suffix == '.parquet':
        yield from rows_of_parquet(path)
        return
    # newline='' leaves line ends to the csv module, which needs them within quoted cells.
    with open(path, encoding='utf-8-sig', errors='replace', newline='') as f:
        if path.suffix == '.jsonl':
            yield from rows_of_json_lines(f)
        elif path.suffix == '.json':
            yield from rows_of_json(json.load(f), split)
        elif path.suffix == '.txt':
            for line in f:
                if line.strip():
                    yield {'line': line.strip()}
        else:
            yield from rows_of_csv(f)


def rows_of_parquet(path):
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
        # pyarrow does not check text when it reads, so broken bytes show here.
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            yield from rows_with_broken_text(batch)


def rows_with_broken_text(batch):
    """The rows of a parquet batch with broken bytes: text is read as bytes and then decoded."""
    columns = []
    text = set()                               # names of the text columns
    for name, column in zip(batch.schema.names, batch.columns):
        if pyarrow.types.is_string(column.type):
            text.add(name)
            column = column.cast(pyarrow.binary())
        columns.append(column)
    for row in pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist():
        for name in text:
            if isinstance(row[name], bytes):
                row[name] = row[name].decode('utf-8', 'replace')
        yield row


def rows_of_json_lines(f):
    head = None
    for line in f:
        if not line.strip():
            continue
        # A broken line becomes an empty row, which the converter then counts as left out.
        try:
            row = json.loads(line)
        except ValueError:
            row = {}
        # SUTD-TrafficQA has a list of names in its first line, and lists of values after it.
        if not isinstance(row, list):
            yield row
        elif head is None:
            head = row
        else:
            yield dict(zip(head, row))


def rows_of_json(content, split):
    """The rows of a whole JSON file: a list, a dict by video, or one row alone.

    Of a dict whose rows name their subset ({"database": {id: {"subset": ..}}}), those of `split`.
    """
    # The rows may be the value of one of these keys.
    if isinstance(content, dict):
        for key in ('data', 'annotations', 'database', 'qa_pairs'):
            if key in content:
                content = content[key]
                break
    if isinstance(content, list):
        yield from content
        return
    if not all(isinstance(value, dict) for value in content.values()):
        yield content                          # a file for each row
        return
    for video, row in content.items():
        if str(row.get('subset', split)).startswith(split):
            yield {'video_id': video, **row}


def rows_of_csv(f):
    separator = '\t' if '\t' in f.readline() else ','
    f.seek(0)
    lines = csv.reader(f, delimiter=separator)
    head = next(lines, [])
    # How2QA has no head: its first line has a time like [0:5]. Its columns get numbers as names.
    if any(re.fullmatch(r'\[\d.*\]', cell) for cell in head):
        lines = itertools.chain([head], lines)
        head = [str(i) for i in range(len(head))]
    for line in lines:
        yield dict(zip(head, line))


# --------------------------------------------------------------------------------------------------
# What belongs to a video and is not in the tables

def rates_of(entry):
    """{video: frames a second} of videos that are stored as pictures; under None, of all others.

    The column `media` has "fps:3" for all, or "rates:owner/name:file", a JSON of {video: rate}.
    """
    # 6 is assumed where a dataset says nothing.
    rates = {None: 6.}
    for place in entry['media'].split():
        if place.startswith('fps:'):
            rates[None] = float(place.removeprefix('fps:'))
        elif place.startswith('rates:'):
            for path in fetch_place(place):
                for video, rate in json.loads(Path(path).read_text()).items():
                    rates[video] = float(rate)
    return rates


def subtitles_of(entry):
    """{video: its cues as JSON} of the file that "subtitles:owner/name:file" in `media` names.

    It has rows {vid_name, sub: [{start, end, text}]}, as TVQA's, or is a JSON of
    {video: {"0": {start, end, text}, ..}}, as Molmo2-VideoMME's. The cues stay JSON in memory,
    because text takes less of it than dicts do.
    """
    cues_of = {}
    for place in entry['media'].split():
        if not place.startswith('subtitles:'):
            continue
        for path in fetch_place(place):
            for row in rows(path):
                cues = row.get('sub')
                if not cues:
                    cues = [value for value in row.values() if isinstance(value, dict)]
                cues = [cue for cue in cues if {'start', 'end', 'text'} <= cue.keys()]
                video = row.get('vid_name') or row.get('video_id')
                cues_of[video] = json.dumps(cues)
    return cues_of


# --------------------------------------------------------------------------------------------------
# Drafts: records whose media are still to be fetched, as convert.py describes them

def drafts_of(entry, files, split):
    """Yields the drafts of all tables. Of a row without a draft it yields the reason, a str."""
    cues_of = subtitles_of(entry)
    every_row = itertools.chain.from_iterable(rows(file, split) for file in files)
    for i, row in enumerate(every_row):
        # A row in another form than its converter expects raises one of the errors below. It is
        # left out, and the report counts it as "other schema" with the error's text.
        try:
            convert = CONVERTERS[entry['converter']]
            # The seed is the row, so that a row gives the same draft in every run.
            chance = random.Random(f"{entry['name']} {i}")
            for draft in convert(row, entry['style'], chance):
                video = draft.get('video', {}).get('path')
                if cues_of.get(video):
                    draft['subtitles'] = json.loads(cues_of[video])
                yield draft
        except Skip as e:
            yield str(e)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            yield f'other schema ({type(e).__name__} {e})'[:80]


def grouped(entry, files, split, path):
    """As drafts_of, but all conversations about the same media come together, where the first was.

    The drafts go through an SQLite file at `path`, because the largest dataset has 2.4 million
    rows.
    """
    if not path.exists():
        write_drafts(entry, files, split, path)
    db = sqlite3.connect(path)
    # `first` is the number of the first draft with the same media, rowid the order of writing.
    stored = db.execute('SELECT first, draft FROM drafts ORDER BY first, rowid')
    for _, group in itertools.groupby(stored, lambda pair: pair[0]):
        drafts = []
        for _, text in group:
            draft = json.loads(text)
            if isinstance(draft, str):         # the reason why a row was left out
                yield draft
            else:
                drafts.append(draft)
        # A conversation that occurs twice is kept once, in its first place.
        conversations = {}
        for draft in drafts:
            for conversation in draft['conversations']:
                conversations[json.dumps(conversation)] = conversation
        conversations = list(conversations.values())
        for i in range(0, len(conversations), BRANCHES):
            yield {**drafts[0], 'conversations': conversations[i:i + BRANCHES]}


def write_drafts(entry, files, split, path):
    """Writes an SQLite file with all drafts of a split."""
    part = path.with_suffix('.part')
    part.unlink(missing_ok=True)
    db = sqlite3.connect(part, isolation_level=None)
    # SQLite need not protect the file, because an interrupted run begins it anew.
    db.execute('PRAGMA journal_mode = OFF')
    db.execute('PRAGMA synchronous = OFF')
    db.execute('BEGIN')
    db.execute('CREATE TABLE keys (key TEXT PRIMARY KEY, first INTEGER) WITHOUT ROWID')
    db.execute('CREATE TABLE drafts (first INTEGER, draft TEXT)')
    drafts = drafts_of(entry, files, split)
    title = f"{entry['name']}: rows"
    for number, draft in enumerate(tqdm(drafts, desc=title, unit='row', disable=None)):
        # The first draft with a key lends its number to all later ones with that key.
        first = number
        if not isinstance(draft, str) and draft['key'] is not None:
            key = draft['key']
            db.execute('INSERT OR IGNORE INTO keys VALUES (?, ?)', (key, number))
            found = db.execute('SELECT first FROM keys WHERE key = ?', (key,))
            first, = found.fetchone()
        # JSON has no bytes, so a draft with a picture in it raises TypeError. The remedy is a
        # change in datasets.csv.
        try:
            text = json.dumps(draft)
        except TypeError:
            raise Trouble("its rows hold their pictures: in the table, media must be 'embedded', "
                          f"not {entry['media']!r}") from None
        db.execute('INSERT INTO drafts VALUES (?, ?)', (first, text))
    db.execute('CREATE INDEX place ON drafts (first)')
    db.execute('COMMIT')
    db.close()
    part.rename(path)
