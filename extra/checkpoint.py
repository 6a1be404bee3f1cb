"""A run's checkpoints: written behind the training's back, verified, found again, resumed from,
copied to a URL.

    out_dir/step001000/              a model that opens anywhere: config.json, model.safetensors, tokenizer (extra/hf.py)
    out_dir/step001000/train_state/  what this run needs to go on: moments, place in the data, random states, check sums
    out_dir/latest                   the name of the newest

A checkpoint is written under another name, flushed to the disk and renamed; `latest` is changed
last. A crash at any moment leaves the one before. train_state/ is read only to resume one's own
run.
"""
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec                                # torch brings it
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError
from extra.hf import copy_tensors, newest, write_model
from parallel import gather_objects, rank, reshard_loader_states, world_size

INDEX = 'train_state/files.json'        # sizes and check sums of a checkpoint's files; written last


# --------------------------------------------------------------------------------------------------
# What a checkpoint holds beside the model

def optimizer_state(model, optimizers):
    """{'parameter.moment': tensor} of all optimizers; those of a sharded parameter are sharded
    likewise."""
    names = {p: name for name, p in model.named_parameters()}
    state = {}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            for key, value in moments.items():
                state[f'{names[p]}.{key}'] = value
    return state


def optimizer_signature(optimizers):
    """Which parts are trained by which optimizer. A run goes on only with the same."""
    groups = [(type(optimizer).__name__, optimizer.param_groups[0]) for optimizer in optimizers]
    return [(name, group['part'], len(group['params'])) for name, group in groups]


def room_for_moment(p, size):
    """Zeros for what an optimizer keeps of parameter p: a moment of its shape, or the number of its
    steps. On p's device, because fused AdamW reads both in the kernel that changes p."""
    if size == p.shape:
        return torch.zeros_like(p)
    return torch.zeros(size, device=p.device)


def random_state(device):
    """The states of the random generators that training draws from: dropout draws on the device."""
    state = {'cpu': torch.get_rng_state()}
    if device.type == 'cuda':
        state['cuda'] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    torch.set_rng_state(state['cpu'])
    if device.type == 'cuda' and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'], device)


# --------------------------------------------------------------------------------------------------
# Writing

class AsyncCheckpointer:
    """Writes checkpoints in a thread: a step waits only for the copy to the CPU's memory and, if it
    comes too soon, for the checkpoint before."""

    def __init__(self, out_dir, keep, remote=''):
        """keep: so many checkpoints stay, 0 all; remote: a URL to copy them to."""
        self.out_dir = Path(out_dir)
        self.keep = keep
        self.remote = remote
        self.worker = ThreadPoolExecutor(1)
        self.writing = None
        self.step = None
        # A gloo group of its own, because the threads exchange messages while the training
        # exchanges others
        self.group = dist.new_group(backend='gloo') if world_size > 1 else None

    def save(self, step, model, processor, optimizers, place, random, settings, cp):
        """place: this rank's place in the data, and its loss scale; random: the states of its
        generators. All ranks call this together. cp: so many ranks share a place."""
        import torch.distributed.checkpoint as dcp       # it takes a second to load
        self.wait()
        folder = self.out_dir / f'step{step:06d}'
        temporary = folder.with_name(f'.{folder.name}.tmp')
        state = {'step': step, 'ranks': gather_objects(place)[::cp], 'random': gather_objects(random),
                 'optimizers': optimizer_signature(optimizers),
                 'settings': {name: repr(value) for name, value in settings.items()}}
        tensors = copy_tensors(model, keep=rank == 0)
        shards = dcp.async_save(optimizer_state(model, optimizers), checkpoint_id=temporary / 'train_state',
                                process_group=self.group, no_dist=world_size == 1)

        def finish():
            shards.result()
            if rank == 0:
                write_model(model.config, tensors, temporary)
                processor.save(temporary)
                torch.save(state, temporary / 'train_state' / 'state.pt')
                publish(temporary, folder, self.keep)
                if self.remote:
                    upload(folder, self.remote, self.keep)
        self.writing = self.worker.submit(finish)
        self.step = step

    def wait(self):
        """Until the last checkpoint is written. Returns True if it could not be, which is reported:
        training goes on."""
        if self.writing is None:
            return False
        from torch.distributed.checkpoint.api import CheckpointException
        try:
            self.writing.result()
            return False
        except (Exception, CheckpointException) as e:    # a full disk above all; whatever it is, the run is worth more
            if isinstance(e, CheckpointException):
                e = next(iter(e.failures.values()))[0]
            tqdm.write(f'error: the checkpoint of step {self.step} could not be written ({e}); the last good one is '
                       f'{newest(self.out_dir)}. Training goes on.')
            shutil.rmtree(self.out_dir / f'.step{self.step:06d}.tmp', ignore_errors=True)
            return True
        finally:
            self.writing = None


def publish(temporary, folder, keep):
    """Makes a written checkpoint the newest one and removes those that are too many."""
    sums = {}
    for path in sorted(temporary.rglob('*')):
        if path.is_file():
            sums[str(path.relative_to(temporary))] = [path.stat().st_size, checksum(path)]
    (temporary / INDEX).write_text(json.dumps(sums, indent=1))
    for path in [*temporary.rglob('*'), temporary]:
        flush_to_disk(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    latest = folder.with_name('.latest.tmp')
    latest.write_text(folder.name + '\n')
    latest.replace(folder.with_name('latest'))
    flush_to_disk(folder.parent)
    if keep:
        for old in checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old)


def checkpoints(out_dir):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(Path(out_dir).glob('step*[0-9]'))


def remove_unfinished(out_dir):
    """Removes what a save that was cut off has left."""
    for folder in Path(out_dir).glob('.step*.tmp'):
        shutil.rmtree(folder)


def flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    crc = 0
    with open(path, 'rb') as f:
        while True:
            piece = f.read(2 ** 24)
            if not piece:
                return crc
            crc = zlib.crc32(piece, crc)


def verify(folder):
    """What is wrong with a checkpoint's files, or None: their sizes and check sums are those of
    when they were written."""
    try:
        sums = json.loads((folder / INDEX).read_text())
        for name, (size, crc) in sums.items():
            if (folder / name).stat().st_size != size or checksum(folder / name) != crc:
                return f'{name} is not as it was written'
    except (OSError, ValueError) as e:
        return str(e)
    return None


# --------------------------------------------------------------------------------------------------
# Finding and resuming

def find_checkpoint(out_dir, remote=''):
    """The checkpoint to go on from: the one that out_dir/latest names, or the newest before it that
    is whole; None for a new run. With a URL, the newer of what is there and here."""
    if remote:
        download_newest(out_dir, remote)
    latest = Path(out_dir) / 'latest'
    if not latest.exists():
        return None
    name = latest.read_text().strip()
    for folder in reversed(checkpoints(out_dir)):
        if folder.name > name:
            continue
        damage = verify(folder)
        if damage is None:
            return folder
        print(f'WARNING: {folder} is damaged ({damage}); trying the one before')
    raise UserError(f'no checkpoint in {out_dir} is whole. Start a new run: another out_dir, or remove this one')


def load_state(folder, model, optimizers, mixture, settings, device):
    """Restores moments and random states of a run; returns (step, this rank's loader state, its
    loss scale). Another number of ranks than before shares out the rows that are still to come."""
    import torch.distributed.checkpoint as dcp
    cp = settings['cp']
    state = torch.load(folder / 'train_state' / 'state.pt', weights_only=True, map_location='cpu')
    if state['optimizers'] != optimizer_signature(optimizers):
        raise UserError(f'{folder} was trained with other parts or another optimizer. Set train_vision, train_connector, '
                        f'train_language, train_embedding and optimizer as they were, or start a new run: another '
                        f'out_dir with --init_from={folder}')
    parameters = dict(model.named_parameters())
    optimizer_of = {}
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]['params']:
            optimizer_of[p] = optimizer
    stored = dcp.FileSystemReader(folder / 'train_state').read_metadata().state_dict_metadata
    for name, what in stored.items():
        name, _, key = name.rpartition('.')
        p = parameters[name]
        optimizer_of[p].state[p][key] = room_for_moment(p, what.size)
    dcp.load(optimizer_state(model, optimizers), checkpoint_id=folder / 'train_state', no_dist=world_size == 1)
    if len(state['random']) == world_size:
        set_random_state(state['random'][rank], device)
    places = state['ranks']
    loaders = reshard_loader_states([place['loader'] for place in places], world_size // cp, mixture)
    report_changes(settings, state['settings'])
    return state['step'], loaders[rank // cp], places[0]['scaling']


def report_changes(settings, before):
    """Notes settings that are not those of the checkpoint; those that change nothing of the
    training are left out."""
    harmless = ('max_steps', 'out_dir', 'dry_run', 'log_interval', 'save_interval', 'eval_interval', 'eval_answers', 'keep')
    for name, value in settings.items():
        was = before.get(name, repr(value))
        if name not in harmless and was != repr(value):
            print(f"note: {name} was {was} in this run's checkpoint and is {value!r} now")


# --------------------------------------------------------------------------------------------------
# A copy at a URL, so that a run outlives its machine

def upload(folder, remote, keep):
    """Copies a checkpoint and the logs to the URL; its index last, which says that the others are
    there."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        target = f'{root}/{folder.name}'
        names = list(json.loads((folder / INDEX).read_text()))
        fs.makedirs(f'{target}/train_state', exist_ok=True)
        fs.put([str(folder / name) for name in names], [f'{target}/{name}' for name in names])
        fs.put_file(str(folder / INDEX), f'{target}/{INDEX}')
        for name in ('metrics.jsonl', 'skipped.jsonl', 'latest'):
            fs.put_file(str(folder.parent / name), f'{root}/{name}')
        if keep:
            for old in sorted(fs.glob(f'{root}/step*'))[:-keep]:
                fs.rm(old, recursive=True)
    except Exception as e:                   # whatever a file system somewhere else may raise
        raise OSError(f'{folder} is whole, but could not be copied to {remote}: {e}') from e


def download_newest(out_dir, remote):
    """Brings the newest whole checkpoint at the URL to a machine that has none or an older one, or
    the other way round."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        fs.makedirs(root, exist_ok=True)
        indices = sorted(fs.glob(f'{root}/step*/{INDEX}'), reverse=True)
        local = newest(out_dir)
        local_name = '' if local == Path(out_dir) else local.name
        is_uploaded = any(f'/{local_name}/' in index for index in indices)
        if local_name and not is_uploaded and verify(local) is None:
            upload(local, remote, keep=0)
        for index in indices:
            source = index.removesuffix(f'/{INDEX}')
            folder = Path(out_dir) / source.split('/')[-1]
            if folder.name <= local_name:
                return
            damage = _download(fs, source, folder)
            if damage is None:
                for name in ('metrics.jsonl', 'skipped.jsonl'):
                    fs.get_file(f'{root}/{name}', str(Path(out_dir) / name))
                (Path(out_dir) / 'latest').write_text(folder.name + '\n')
                return
            print(f'WARNING: {source} is damaged ({damage}); trying the one before')
            shutil.rmtree(folder)
    except Exception as e:
        raise UserError(f"out_dir = '{remote}': {e}") from e


def _download(fs, source, folder):
    """Copies one checkpoint here; returns what is wrong with it, or None."""
    names = json.loads(fs.cat_file(f'{source}/{INDEX}'))
    names = [name for name in names if '..' not in name and not name.startswith('/')]    # inside its own folder only
    (folder / 'train_state').mkdir(parents=True, exist_ok=True)
    fs.get([f'{source}/{name}' for name in names], [str(folder / name) for name in names])
    fs.get_file(f'{source}/{INDEX}', str(folder / INDEX))
    return verify(folder)
