"""Published datasets -> folders that train.py reads. Needs: pip install '.[prepare]'.

    python prepare/download.py --stage pretraining             what config/stage1.py trains on
    python prepare/download.py --datasets pixmo-cap chart-qa --num-samples 200
    python prepare/download.py --stage all --list              what there is, here and elsewhere
    python prepare/download.py --stage sft --dry-run           files and bytes; fetches nothing
    python prepare/download.py --show-manual-instructions      what you must fetch yourself, and how

A dataset is a line of datasets.csv. Its tables come from the hub or from data/<name>/source/, and
convert.py makes records of their rows. Its media come from URLs, archives or the tables; each is
opened to see that it is complete, and goes into an uncompressed tar. A stopped run goes on with the
same command, and its files are in the end the same bytes.

In this file: one dataset from its tables to its manifest, and the command. Not in it: HTTP and
archives (fetch.py), which tables and rows a dataset has (sources.py), and what its folder holds
(store.py).
"""
import argparse
import csv
import hashlib
import io
import itertools
import json
import random
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from convert import Skip, fractions, runs
from fetch import Archives, Fetcher, Trouble, hub_files
from sources import (STAGES, archive_files, asked_for, drafts_of, find_tables, grouped, held_out,
                     rates_of, splits, table_files)
from store import (Writer, changed, encode, look, read_manifest, reasons_left_out, source_of,
                   state_of, write_whole)
from table import TABLE, sha256
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from media import BadRow, load_image, load_video, open_media  # noqa: E402


@dataclass
class Job:
    """What all steps of one dataset share."""
    entry: dict                # its line of datasets.csv
    args: argparse.Namespace
    fetcher: Fetcher
    archives: Archives         # those that its media lie in
    writer: Writer
    work: Path                 # the folder of files that only matter until it is complete


# --------------------------------------------------------------------------------------------------
# From drafts to records

def obtain(job, medium, is_video, fps):
    """(bytes, extension, (width, height)) of one picture or video. Raises BadRow.

    `fps` is the frame rate of a video that is stored as pictures.
    """
    # The table has the bytes, or they are fetched, or they lie in an archive.
    if 'bytes' in medium:
        data = medium['bytes']
    elif 'url' in medium:
        data = job.fetcher.get(medium['url'])
    else:
        data = job.archives.read(medium['path'])
        if isinstance(data, list):             # the frames of a video
            frames = (np.asarray(load_image(io.BytesIO(frame))) for frame in data)
            data = encode(frames, round(fps))
    found = look(data, is_video, job.args.max_side, job.args.video_side)
    # A site may show another picture under the same URL by now, to which the record is not true.
    expected = medium.get('sha256')
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise BadRow('another picture', medium['url'])
    return found


def obtain_ahead(drafts, start, known, workers, window):
    """Yields (place, draft, [(medium, its future)]) in order, for (place, draft) of `drafts`.

    A future has the bytes, extension and size of a medium. `workers` threads fetch the media of the
    next `window` drafts meanwhile, each medium once. `start(medium, draft)` fetches one, and
    `known(source)` tells of those that are stored already.
    """
    waiting = deque()
    flying = {}                # source -> the future of its bytes
    users = Counter()          # source -> number of waiting drafts with this medium
    with ThreadPoolExecutor(workers) as pool:

        def future_of(medium, draft):
            source = source_of(medium)
            if source in flying:
                users[source] += 1
                return flying[source]
            stored = known(source) if source else None
            # Of a stored medium only the size is needed, because Writer.media returns its path.
            if stored:
                path, *size = stored
                done = Future()
                done.set_result((b'', '', size))
                return done
            future = pool.submit(start, medium, draft)
            if source:
                flying[source] = future
                users[source] = 1
            return future

        def forget_first():
            """Drops the first draft, and the bytes of media that no other waiting draft needs."""
            _, _, futures = waiting.popleft()
            for medium, _ in futures:
                source = source_of(medium)
                if not source:
                    continue
                users[source] -= 1
                if users[source] <= 0:
                    flying.pop(source, None)
                    del users[source]

        # A consumer that stops early, because of an error for example, must not wait for all media.
        try:
            for place, draft in drafts:
                futures = [(medium, future_of(medium, draft)) for medium in media_of(draft)]
                waiting.append((place, draft, futures))
                if len(waiting) > window:
                    yield waiting[0]
                    forget_first()
            while waiting:
                yield waiting[0]
                forget_first()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def media_of(draft):
    if isinstance(draft, str):                 # the reason why a row has no draft
        return []
    if 'images' in draft:
        return draft['images']
    return [draft['video']]


def convert_split(job, split, target):
    """Adds all records of a split to the writer's files, after those that were done before."""
    entry = job.entry
    args = job.args
    writer = job.writer
    files = table_files(entry, split, job.fetcher, job.archives, job.work, args.out)
    if entry['media'] in ('embedded', 'none'):
        drafts = drafts_of(entry, files, split)
    else:
        drafts = grouped(entry, files, split, job.work / f'{split}.sqlite')
    done = writer.state['place']
    # Drafts that an earlier run has done are passed over. Each has the same place in every run.
    drafts = itertools.islice(enumerate(drafts), done, args.num_samples or None)
    rates = rates_of(entry)

    def start(medium, draft):
        # The rate at which frames were extracted comes before that of the annotation.
        fps = rates.get(medium.get('path')) or draft.get('fps') or rates[None]
        return obtain(job, medium, 'video' in draft, fps)

    # URLs take long to answer, so more of them are asked for ahead.
    window = 4 * args.workers if entry['media'] == 'urls' else args.workers
    obtained = obtain_ahead(drafts, start, writer.known, args.workers, window)
    title = f"{entry['name']}: {target}"
    bar = tqdm(obtained, desc=title, unit='record', disable=None, initial=done)
    for place, draft, futures in bar:
        writer.counts['rows'] += 1
        # A draft that cannot become a record is left out, and the report counts the reason.
        try:
            if isinstance(draft, str):
                raise Skip(draft)
            add_record(job, draft, futures, target, place)
        except Skip as e:
            writer.counts[f'left out: {e}'] += 1
        # A killed run loses the last 200 drafts at most.
        if place % 200 == 199:
            writer.commit(writer.state['split'], place + 1)
            bar.set_postfix_str(f"kept {writer.counts['records']}")


def add_record(job, draft, futures, target, place):
    """Writes a record and its media. If a medium is lost, lost.csv says so and Skip is raised."""
    writer = job.writer
    found = []                 # (bytes, extension, size) of each medium
    lost = []                  # (URL or path, reason) of each that could not be had
    # A medium that cannot be had does not stop the others, because each of them is listed.
    for medium, future in futures:
        try:
            found.append(future.result())
        except BadRow as e:
            lost.append((source_of(medium) or f'row {place}', e.reason))
    # A record that lacks a medium is not written, but all that it lacks is listed.
    for source, reason in lost:
        line = io.StringIO()
        csv.writer(line, lineterminator='\n').writerow([source, reason])
        writer.write('lost.csv', line.getvalue().encode())
    if lost:
        _, reason = lost[0]
        raise Skip(reason)

    sizes = [size for _, _, size in found]
    for conversation in draft['conversations']:
        scale_pixels(conversation, sizes)
    for conversation in draft['conversations']:
        read_mask(conversation, job.archives)
    paths = []
    for (medium, _), (data, extension, size) in zip(futures, found):
        paths.append(writer.media(medium, data, extension, size))

    # The id says which dataset and which draft a record comes from.
    record = {'id': f"{job.entry['name']}-{place}"}
    if 'video' in draft:
        record['video'] = paths[0]
    else:
        record['images'] = paths
    for key in ('start', 'end', 'subtitles'):
        if key in draft:
            record[key] = draft[key]
    record['conversations'] = draft['conversations']
    if target == 'train' and held_out(job.entry, draft, place):
        target = 'validation'
    line = json.dumps(record, ensure_ascii=False) + '\n'
    writer.write(f'{target}.jsonl', line.encode())
    writer.counts['records'] += 1
    writer.counts['conversations'] += len(draft['conversations'])
    writer.counts['media'] += len(paths)


def scale_pixels(conversation, sizes):
    """Turns points in pixels into fractions of the first picture, in place. Raises Skip outside."""
    for message in conversation['messages']:
        if not message.pop('pixels', False):
            continue
        width, height = sizes[0]
        points = message['points']
        points['points'] = fractions(points['points'], width, height)
        if 'box' in conversation:
            left, top, right, bottom = conversation['box']
            box = (left / width, top / height, right / width, bottom / height)
            conversation['box'] = [round(value, 4) for value in box]


def read_mask(conversation, archives):
    """Replaces the name of a mask, which is white where points belong, by its runs, in place."""
    if 'mask' not in conversation:
        return
    # Without its mask an answer cannot be scored, so the record is left out.
    try:
        data = archives.read(conversation['mask'])
        mask = load_image(io.BytesIO(data)).convert('L')
    except BadRow as e:
        raise Skip(f'mask: {e.reason}') from None
    conversation['mask'] = runs(np.asarray(mask) > 127)


# --------------------------------------------------------------------------------------------------
# One dataset

def prepare(entry, fetcher, args):
    """Makes one dataset, unless it is complete. Returns its manifest; raises Trouble."""
    folder = Path(args.out) / entry['name']
    manifest = read_manifest(folder)
    if manifest and manifest['num_samples'] == args.num_samples and not changed(manifest, folder):
        return manifest

    # A run with other settings would not go on with the same bytes, so its work begins anew.
    work = folder / '.work'
    settings = {
        'num_samples': args.num_samples,
        'max_side': args.max_side,
        'video_side': args.video_side,
        'tar_bytes': args.tar_bytes,
        'converter': entry['converter'],
    }
    settings_file = work / 'settings.json'
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(settings))

    if not (work / 'manifest.json').exists():
        manifest = write_dataset(entry, fetcher, args, work)
        remove_outputs(folder)
        write_whole(work / 'manifest.json', json.dumps(manifest, indent=1))
    # The manifest in .work is complete. What follows only renames files, and a run that is killed
    # here goes on with those that are still in .work.
    manifest = read_manifest(work)
    for name in manifest['files']:
        if (work / name).exists():
            (work / name).rename(folder / name)
    write_whole(folder / 'manifest.json', json.dumps(manifest, indent=1))
    shutil.rmtree(work)
    return manifest


def write_dataset(entry, fetcher, args, work):
    """Writes all files of a dataset into the folder `work` and returns its manifest."""
    archives = Archives(archive_files(entry, fetcher, args.out))
    writer = Writer(work, args.tar_bytes)
    job = Job(entry, args, fetcher, archives, writer, work)
    # The state says how many splits are done, and how much of the next one.
    pairs = splits(entry)
    for i in range(writer.state['split'], len(pairs)):
        split, target = pairs[i]
        convert_split(job, split, target)
        if i == len(pairs) - 1:
            writer.close_tar()
        writer.commit(i + 1, 0)
    writer.close()

    files = {}                                 # name -> [bytes, check sum]
    for name, size in sorted(writer.state['sizes'].items()):
        if size:
            path = work / name
            files[name] = [path.stat().st_size, sha256(path)]
    return {
        'name': entry['name'],
        'hub': entry['hub'],
        'num_samples': args.num_samples,
        'counts': dict(writer.counts),
        'files': files,
    }


def remove_outputs(folder):
    """Removes what an earlier run made, but not source/, which is the user's."""
    for pattern in ('*.jsonl', 'media-*.tar', 'lost.csv', 'manifest.json'):
        for path in list(folder.glob(pattern)):
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# What the command prints

def show(chosen, args):
    """A line for each dataset: --list."""
    print(f"{'dataset':<36}{'stages':<8}{'group':<18}{'task':<22}{'examples':>11}  "
          f"{'media':<10}{'':<8}here")
    for entry in chosen:
        examples = f"{int(entry['examples']):,}" if entry['examples'] else '?'
        media = entry['media'].split(':')[0]
        by_hand = '' if entry['automatic'] == 'yes' else 'manual'
        print(f"{entry['name']:<36}{entry['stages']:<8}{entry['group'][:17]:<18}"
              f"{entry['task'][:21]:<22}{examples:>11}  {media:<10}{by_hand:<8}"
              f"{state_of(entry, args.out)}")


def sample_lines(paths, number, chance):
    """(how many lines the files have, `number` of them at random), by reservoir sampling.

    One line at a time is read, because the files may not fit into memory.
    """
    lines = []
    total = 0
    for path in paths:
        with open(path, 'rb') as f:
            for line in f:
                total += 1
                if len(lines) < number:
                    lines.append(line)
                    continue
                # Line number `total` takes the place of a random one with chance number / total,
                # which gives all lines the same chance to be in the sample.
                i = chance.randrange(total)
                if i < number:
                    lines[i] = line
    return total, lines


def check(chosen, args):
    """Compares files with their manifests and opens some media: --check.

    Returns the number of datasets that are not as they were written.
    """
    bad = 0
    for entry in chosen:
        folder = Path(args.out) / entry['name']
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        # A check sum takes long, so files of a wrong size are not read.
        wrong = changed(manifest, folder)
        for name, (_, digest) in manifest['files'].items():
            if name not in wrong and sha256(folder / name) != digest:
                wrong.append(name)
        paths = [folder / name for name in manifest['files'] if name.endswith('.jsonl')]
        paths = [path for path in paths if path.is_file()]
        total, lines = sample_lines(paths, args.check, random.Random(0))
        opened = 0
        for line in lines:
            record = json.loads(line)
            # Media that do not open are reported with the record, and the others are opened still.
            try:
                open_all(record, folder)
                opened += 1
            except BadRow as error:
                wrong.append(f"{record['id']}: {error}")
        bad += bool(wrong)
        verdict = f"WRONG: {'; '.join(wrong[:3])}" if wrong else 'as written'
        print(f"{entry['name']:<36}{total:>9,} records  {opened} opened  {verdict}")
    return bad


def open_all(record, folder):
    """Opens the media of a record. Raises BadRow."""
    for path in record.get('images', []):
        load_image(open_media(folder, path))
    if 'video' in record:
        load_video(open_media(folder, record['video']), 2)


def dry_run(chosen, fetcher):
    """The files and bytes that would be fetched: --dry-run."""
    for entry in chosen:
        if entry['automatic'] != 'yes':
            print(f"{entry['name']:<36}manual")
            continue
        # A dataset that cannot be reached is reported and does not stop the others.
        try:
            tables = table_sizes(entry, fetcher)
            archives = archive_sizes(entry, fetcher)
        except Trouble as error:
            print(f"{entry['name']:<36}error: {error}")
            continue
        text = f"{entry['name']:<36}{len(tables)} tables, {megabytes(tables)}"
        if archives:
            text += f', {len(archives)} archives, {megabytes(archives)}'
        if entry['media'] == 'urls' and entry['examples']:
            text += f", then about {int(entry['examples']):,} URLs"
        print(text)


def table_sizes(entry, fetcher):
    """The bytes of each table, None where they are unknown."""
    sizes = []
    for split, _ in splits(entry):
        tables = entry['tables'].replace('{split}', split)
        if tables.startswith('http'):
            sizes += [fetcher.size(url) for url in tables.split()]
        elif not tables.startswith('inside:'):
            _, files = find_tables(entry, split)
            sizes += [size for _, size in files]
    return sizes


def archive_sizes(entry, fetcher):
    """The bytes of each archive, None where they are unknown."""
    sizes = []
    for place in entry['media'].split():
        if place.startswith('http'):
            sizes.append(fetcher.size(place))
        elif place.startswith(('hub:', 'parts:')):
            _, files = hub_files(place)
            sizes += [size for _, size in files]
    return sizes


def megabytes(sizes):
    known = sum(size for size in sizes if size)
    more = ' and more' if None in sizes else ''
    return f'{known / 1e6:,.1f} MB{more}'


def report(manifests):
    """How much of each dataset became records, and why the rest did not."""
    print(f"\n{'dataset':<36}{'rows':>10}{'records':>10}{'share':>8}{'media':>10}{'MB':>10}")
    for manifest in manifests:
        counts = manifest['counts']
        rows = counts.get('rows', 0)
        records = counts.get('records', 0)
        size = sum(size for size, _ in manifest['files'].values())
        print(f"{manifest['name']:<36}{rows:>10,}{records:>10,}{records / max(1, rows):>8.1%}"
              f"{counts.get('media', 0):>10,}{size / 1e6:>10,.1f}")
        reasons = reasons_left_out(counts)
        if reasons:
            listed = ', '.join(f'{reason} {number:,}' for number, reason in reasons[:8])
            print(f'    left out: {listed}')


def show_instructions(chosen):
    """What is to be fetched by hand: --show-manual-instructions."""
    for entry in chosen:
        if entry['automatic'] != 'yes':
            print(f"{entry['name']} ({entry['hub']})")
            print(f"    {entry['instructions']}")
            print(f"    then: python prepare/download.py --datasets {entry['name']}")


def write_pages(chosen, args):
    """HTML pages of all datasets: --pages."""
    from pages import write
    states = {}
    manifests = {}
    for entry in chosen:
        name = entry['name']
        states[name] = state_of(entry, args.out)
        manifests[name] = read_manifest(Path(args.out) / name)
    write(chosen, args.out, args.pages, states, manifests)
    print(f'wrote {args.out}/index.html')


# --------------------------------------------------------------------------------------------------
# The command

def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stage', choices=[*STAGES, 'all'],
                        help='All datasets of this stage are prepared.')
    parser.add_argument('--include-eval', action='store_true',
                        help='The evaluation sets are prepared too.')
    parser.add_argument('--datasets', nargs='+', metavar='NAME',
                        help='These datasets are prepared, whatever their stage is.')
    parser.add_argument('--list', action='store_true',
                        help='A line is printed for each dataset, and nothing is fetched.')
    parser.add_argument('--check', type=int, nargs='?', const=8, metavar='N',
                        help='Check sums are compared, and the media of N records are opened (8).')
    parser.add_argument('--pages', type=int, nargs='?', const=8, metavar='N',
                        help='HTML pages show N records of each dataset that is here (8).')
    parser.add_argument('--dry-run', action='store_true',
                        help='The files and bytes to fetch are printed, and nothing is fetched.')
    parser.add_argument('--show-manual-instructions', action='store_true',
                        help='What you must fetch yourself is printed.')
    parser.add_argument('--num-samples', type=int, default=0, metavar='N',
                        help='Only the first N records of each split are prepared.')
    parser.add_argument('--workers', type=int, default=32,
                        help='So many threads fetch and open media.')
    parser.add_argument('--per-host', type=int, default=8,
                        help='One host gets so many connections at most.')
    parser.add_argument('--deadline', type=float, default=60.,
                        help='A picture or video may take so many seconds.')
    parser.add_argument('--patience', type=float, default=30.,
                        help='A Retry-After is obeyed for so many seconds at most.')
    parser.add_argument('--max-bytes', type=int, default=2 ** 26,
                        help='A picture or video may have so many bytes.')
    parser.add_argument('--max-side', type=int, default=0,
                        help='Pictures with more pixels a side are encoded again; 0 keeps all.')
    parser.add_argument('--video-side', type=int, default=0,
                        help='Videos with more pixels a side are encoded again; 0 keeps all.')
    parser.add_argument('--tar-bytes', type=int, default=2 ** 30,
                        help='A new tar begins when the current one has more bytes than this.')
    parser.add_argument('--out', default='data',
                        help='Each dataset becomes a folder in this one.')
    parser.add_argument('--table', default=TABLE,
                        help='The datasets are listed in this file instead of datasets.csv.')
    args = parser.parse_args()
    if not args.stage and not args.datasets:
        only_shows = args.list or args.check or args.pages or args.show_manual_instructions
        if not only_shows:
            parser.error('give --stage or --datasets')
        args.stage = 'all'
    return args


def main():
    args = parse_arguments()
    chosen = asked_for(args)
    if args.list:
        show(chosen, args)
        return
    if args.check:
        bad = check(chosen, args)
        sys.exit(1 if bad else 0)
    if args.pages:
        write_pages(chosen, args)
        return
    if args.show_manual_instructions:
        show_instructions(chosen)
        return
    # What follows needs the network.
    fetcher = Fetcher(args.per_host, args.deadline, args.max_bytes, cap=args.patience)
    if args.dry_run:
        dry_run(chosen, fetcher)
        return

    manifests = []
    failed = 0
    for entry in chosen:
        is_given = (Path(args.out) / entry['name'] / 'source').exists()
        if entry['automatic'] != 'yes' and not args.datasets and not is_given:
            print(f"{entry['name']}: to be fetched by hand (--show-manual-instructions)")
            continue
        # What one dataset lacks does not stop the others; the exit status tells of it.
        try:
            manifests.append(prepare(entry, fetcher, args))
        except Trouble as error:
            failed += 1
            print(f"error: {entry['name']}: {error}", file=sys.stderr)
    report(manifests)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    try:
        main()
    except Trouble as e:               # a mistake in the command, such as an unknown dataset
        sys.exit(f'error: {e}')
