"""The checkpoints of a run: written by a thread while training goes on, verified, found again,
resumed from, copied to a URL.

    out_dir/step001000/               a model that opens anywhere (extra/hf.py): config.json,
                                      model.safetensors, tokenizer
    out_dir/step001000/train_state/   what this run needs to go on: moments of the optimizers, place
                                      in the data, random states, check sums
    out_dir/latest                    the name of the newest checkpoint

A checkpoint is written under another name, flushed to the disk and renamed, and `latest` is changed
last. So a crash at any moment leaves the checkpoint before. train_state/ is only read to resume the
run that wrote it.
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

# Sizes and check sums of all files of a checkpoint, {path: [bytes, crc32]}. It is written last.
INDEX = 'train_state/files.json'


# --------------------------------------------------------------------------------------------------
# What a checkpoint holds beside the model

def optimizer_state(model, optimizers):
    """{'parameter.moment': tensor} of all optimizers, as in 'lm_head.weight.exp_avg'. The moments
    of a sharded parameter are sharded likewise."""
    names = {p: name for name, p in model.named_parameters()}
    state = {}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            for key, value in moments.items():
                state[f'{names[p]}.{key}'] = value
    return state


def optimizer_signature(optimizers):
    """[(kind of optimizer, part, number of its parameters), ..]. A run resumes only where these are
    the same, because moments belong to one kind of optimizer and to one parameter."""
    signature = []
    for optimizer in optimizers:
        group = optimizer.param_groups[0]    # each optimizer has one group, a part of the model
        kind = type(optimizer).__name__
        signature.append((kind, group['part'], len(group['params'])))
    return signature


def room_for_moment(p, size):
    """Zeros for what an optimizer keeps of parameter p: a moment of p's shape, or the number of
    steps, whose size is (). On p's device, because fused AdamW reads both in the kernel that
    changes p."""
    if size == p.shape:
        return torch.zeros_like(p)
    return torch.zeros(size, device=p.device)


def random_state(device):
    """The states of the random generators that training draws from. That of the device is among
    them, because dropout draws there."""
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
    """Writes checkpoints in a thread. Training waits only while weights and moments are copied to
    the CPU's memory and, if a checkpoint comes too soon, for the one before it."""

    def __init__(self, out_dir, keep, remote=''):
        """keep: how many checkpoints stay on the disk, 0 all; remote: a URL to copy them to."""
        self.out_dir = Path(out_dir)
        self.keep = keep
        self.remote = remote
        self.worker = ThreadPoolExecutor(1)
        self.writing = None                  # the Future of the checkpoint that is being written
        self.step = None                     # and its step
        # A gloo group of its own, because the threads of all ranks exchange messages while training
        # exchanges others; in one group these would be taken for one another
        self.group = None
        if world_size > 1:
            self.group = dist.new_group(backend='gloo')

    def save(self, step, model, processor, optimizers, place, random, settings, cp):
        """Starts to write the checkpoint of a step. All ranks call this together.

        place: {'loader': state of this rank's Loader, 'scaling': its loss scale}; random: this
        rank's `random_state`. cp: how many ranks share their rows, and so a place.
        """
        import torch.distributed.checkpoint as dcp       # here, because it takes a second to load
        self.wait()
        folder = self.out_dir / f'step{step:06d}'
        temporary = folder.with_name(f'.{folder.name}.tmp')
        state = {
            'step': step,
            'ranks': gather_objects(place)[::cp],
            'random': gather_objects(random),
            'optimizers': optimizer_signature(optimizers),
            'settings': as_text(settings),
        }
        # Rank 0 keeps a copy of all weights, because it writes the model; the others only take part
        # in gathering sharded ones
        tensors = copy_tensors(model, keep=rank == 0)
        # Each rank writes the moments that it holds. The call returns when they are copied.
        shards = dcp.async_save(
            optimizer_state(model, optimizers),
            checkpoint_id=temporary / 'train_state',
            process_group=self.group,
            no_dist=world_size == 1,
        )

        def finish():
            shards.result()                  # all ranks have written theirs
            if rank != 0:
                return
            write_model(model.config, tensors, temporary)
            processor.save(temporary)
            torch.save(state, temporary / 'train_state' / 'state.pt')
            publish(temporary, folder, self.keep)
            if self.remote:
                upload(folder, self.remote, self.keep)
        self.writing = self.worker.submit(finish)
        self.step = step

    def wait(self):
        """Waits until the last checkpoint is written. Returns True if that failed, after printing
        why; training goes on then, with the checkpoint before as the newest."""
        if self.writing is None:
            return False
        from torch.distributed.checkpoint.api import CheckpointException
        try:
            self.writing.result()
            return False
        except (Exception, CheckpointException) as e:
            # A full disk above all. Every exception is caught, because the steps since the last
            # checkpoint are worth more than this one.
            if isinstance(e, CheckpointException):
                first_failure = next(iter(e.failures.values()))
                e = first_failure[0]         # the exception; what follows is its traceback
            tqdm.write(f'error: the checkpoint of step {self.step} could not be written ({e}); '
                       f'the last good one is {newest(self.out_dir)}. Training goes on.')
            temporary = self.out_dir / f'.step{self.step:06d}.tmp'
            shutil.rmtree(temporary, ignore_errors=True)
            return True
        finally:
            self.writing = None


def publish(temporary, folder, keep):
    """Makes a written checkpoint the newest one: adds its index, flushes it to the disk, renames it
    from `temporary` to `folder` and names it in `latest`. Then removes all but the newest `keep`.
    """
    sums = {}
    for path in sorted(temporary.rglob('*')):
        if path.is_file():
            name = str(path.relative_to(temporary))
            sums[name] = [path.stat().st_size, checksum(path)]
    (temporary / INDEX).write_text(json.dumps(sums, indent=1))
    # Flushed before it is renamed, because after a power cut the new name might stand on the disk
    # and the contents not
    for path in [*temporary.rglob('*'), temporary]:
        flush_to_disk(path)
    if folder.exists():                      # the same step, written before a resume
        shutil.rmtree(folder)
    temporary.rename(folder)
    # Replaced and not rewritten, because a crash in between would leave an empty file
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
    """Removes the unfinished folder that a crash in the middle of a save leaves behind."""
    for folder in Path(out_dir).glob('.step*.tmp'):
        shutil.rmtree(folder)


def flush_to_disk(path):
    """Waits until a file, or the names in a folder, are on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    """The CRC-32 of a file."""
    crc = 0
    with open(path, 'rb') as f:
        while True:
            piece = f.read(2 ** 24)
            if not piece:
                return crc
            crc = zlib.crc32(piece, crc)


def verify(folder):
    """What is wrong with a checkpoint, as text, or None: all of its files must have the sizes and
    check sums with which they were written."""
    try:
        sums = json.loads((folder / INDEX).read_text())
        for name, (size, crc) in sums.items():
            path = folder / name
            # The size is compared first, because that takes no time
            if path.stat().st_size != size or checksum(path) != crc:
                return f'{name} is not as it was written'
    except (OSError, ValueError) as e:       # a file, or the index itself, is not there or broken
        return str(e)
    return None


# --------------------------------------------------------------------------------------------------
# Finding and resuming

def find_checkpoint(out_dir, remote=''):
    """The folder of the checkpoint to resume from: the one that out_dir/latest names or, where that
    is damaged, the newest before it that is whole; None for a new run. UserError if all are
    damaged. With a URL, the newest checkpoint there is downloaded first if out_dir has none as new.
    """
    if remote:
        download_newest(out_dir, remote)
    latest = Path(out_dir) / 'latest'
    if not latest.exists():
        return None
    name = latest.read_text().strip()
    for folder in reversed(checkpoints(out_dir)):
        if folder.name > name:               # renamed, but the crash came before `latest` changed
            continue
        damage = verify(folder)
        if damage is None:
            return folder
        print(f'WARNING: {folder} is damaged ({damage}); trying the one before')
    raise UserError(f'no checkpoint in {out_dir} is whole. '
                    'Start a new run: another out_dir, or remove this one')


def as_text(settings):
    """{name: its value as Python would write it}. Of `datasets`, which may hold millions of records,
    only the names and what kind of object each is."""
    kinds = {name: type(source).__name__ for name, source in settings['datasets'].items()}
    return {name: repr(value) for name, value in {**settings, 'datasets': kinds}.items()}


def unfinished_steps(folder):
    """(step, max_steps) of a checkpoint of a run that was stopped before its end, else None."""
    path = folder / 'train_state' / 'state.pt'
    if not path.is_file():                   # the weights alone, of a released model or after a clean-up
        return None
    state = torch.load(path, weights_only=True, map_location='cpu')
    last = int(state['settings']['max_steps'])
    return (state['step'], last) if state['step'] < last else None


def load_state(folder, model, optimizers, mixture, settings, device):
    """Restores the moments and random states of a run from a checkpoint. Returns (step, state of
    this rank's Loader, its loss scale). UserError where other parts are trained than before, or by
    another optimizer.

    The weights are loaded elsewhere (extra/hf.py). The number of ranks may be another one than
    before. Then the rows that are still to come are dealt out anew, and the random states are not
    restored.
    """
    cp = settings['cp']
    train_state = folder / 'train_state'
    # weights_only, because an unrestricted pickle could run code of whoever wrote the file
    state = torch.load(train_state / 'state.pt', weights_only=True, map_location='cpu')
    if state['optimizers'] != optimizer_signature(optimizers):
        raise UserError(f'{folder} was trained with other parts or another optimizer. '
                        'Set train_vision, train_connector, train_language, train_embedding and '
                        'optimizer as they were, or start a new run: another out_dir with '
                        f'--init_from={folder}')
    restore_moments(train_state, model, optimizers)
    if len(state['random']) == world_size:   # another number of ranks draws other numbers anyhow
        set_random_state(state['random'][rank], device)
    places = state['ranks']                  # one for each cp ranks that share their rows
    loaders = [place['loader'] for place in places]
    loaders = reshard_loader_states(loaders, world_size // cp, mixture)
    report_changes(settings, state['settings'])
    return state['step'], loaders[rank // cp], places[0]['scaling']


def restore_moments(train_state, model, optimizers):
    """Loads the moments of all optimizers from the folder train_state. dcp.load writes into tensors
    that are there already, and a new optimizer has no moments, so zeros are put in their places
    first."""
    import torch.distributed.checkpoint as dcp
    parameters = dict(model.named_parameters())
    optimizer_of = {}
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]['params']:
            optimizer_of[p] = optimizer
    metadata = dcp.FileSystemReader(train_state).read_metadata()
    for name, tensor in metadata.state_dict_metadata.items():
        name, _, key = name.rpartition('.')              # parameter, moment
        p = parameters[name]
        optimizer_of[p].state[p][key] = room_for_moment(p, tensor.size)
    moments = optimizer_state(model, optimizers)
    dcp.load(moments, checkpoint_id=train_state, no_dist=world_size == 1)


def report_changes(settings, before):
    """Prints the settings that are not those of the checkpoint (before: {name: repr}), without
    those that do not change how the model is trained."""
    harmless = (
        'max_steps', 'out_dir', 'dry_run', 'keep',
        'log_interval', 'save_interval', 'eval_interval', 'eval_answers', 'show_interval',
    )
    for name, now in as_text(settings).items():
        was = before.get(name, now)
        if name not in harmless and was != now:
            print(f"note: {name} was {was} in this run's checkpoint and is {now} now")


# --------------------------------------------------------------------------------------------------
# A copy at a URL, so that a run outlives its machine

def upload(folder, remote, keep):
    """Copies a checkpoint and the logs of its run to the URL; keeps the newest `keep` there, 0 all.
    The index is copied last, because `download_newest` takes a checkpoint with an index for
    complete. OSError if it fails."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        target = f'{root}/{folder.name}'
        names = list(json.loads((folder / INDEX).read_text()))
        here = [str(folder / name) for name in names]
        there = [f'{target}/{name}' for name in names]
        fs.makedirs(f'{target}/train_state', exist_ok=True)
        fs.put(here, there)
        fs.put_file(str(folder / INDEX), f'{target}/{INDEX}')
        for name in ('metrics.jsonl', 'skipped.jsonl', 'learning.html', 'latest'):
            if (folder.parent / name).exists():          # the page only with show_interval
                fs.put_file(str(folder.parent / name), f'{root}/{name}')
        if keep:
            for old in sorted(fs.glob(f'{root}/step*'))[:-keep]:
                fs.rm(old, recursive=True)
    except Exception as e:                   # each kind of remote file system raises its own
        raise OSError(f'{folder} is whole, but could not be copied to {remote}: {e}') from e


def download_newest(out_dir, remote):
    """Brings the newest whole checkpoint at the URL to out_dir, where that has none or an older
    one. A whole checkpoint in out_dir that the URL lacks is uploaded first, because the run may
    have been stopped between the two. UserError if the URL cannot be read."""
    try:
        fs, root = fsspec.url_to_fs(remote)
        fs.makedirs(root, exist_ok=True)
        indices = sorted(fs.glob(f'{root}/step*/{INDEX}'), reverse=True)
        local = newest(out_dir)              # out_dir itself, where there is no checkpoint
        local_name = '' if local == Path(out_dir) else local.name
        is_uploaded = any(f'/{local_name}/' in index for index in indices)
        if local_name and not is_uploaded and verify(local) is None:
            upload(local, remote, keep=0)
        for index in indices:                # newest first
            source = index.removesuffix(f'/{INDEX}')
            folder = Path(out_dir) / source.split('/')[-1]
            if folder.name <= local_name:    # all that follow are older, too
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
    """Copies one checkpoint from the URL to `folder`; returns what is wrong with it, or None."""
    names = json.loads(fs.cat_file(f'{source}/{INDEX}'))
    # Only names inside of the folder, because the index comes from somewhere else
    names = [name for name in names if '..' not in name and not name.startswith('/')]
    there = [f'{source}/{name}' for name in names]
    here = [str(folder / name) for name in names]
    (folder / 'train_state').mkdir(parents=True, exist_ok=True)
    fs.get(there, here)
    fs.get_file(f'{source}/{INDEX}', str(folder / INDEX))
    return verify(folder)
