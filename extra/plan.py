"""What a run costs and whether it fits, before it is started: parameters, floating-point
operations, memory, draws.

    python model.py [config/stage1.py]     `main`: parameters by part, memory with and without
                                           recomputing, and one forward pass
    python parallel.py config/stage3.py    `main_devices`: memory of each device by the number of
                                           devices
    python train.py ... --dry_run          `print_plan` and `print_missing`

All figures are computed from sizes; `make gpu-check` prints measured peaks beside the estimates.
Only `try_forward` runs a model, once, on a picture.
"""
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, configure, train_settings
from data import collate, mixture_rates, mixture_sets, normalise, open_dataset
from extra.hf import layout, load_weights, make_processor, newest, read_config
from extra.kernels import LOGITS_CHUNK
from media import BadRow
from model import VISION, VLM, choose_attention, make_config, pick_dtype

# --------------------------------------------------------------------------------------------------
# Parameters

def count(parameters):
    return sum(p.numel() for p in parameters)


def part_table(model):
    """Lines of a table: parameters of each part, their share, and which of them are trained."""
    every = count(model.parameters())
    lines = [f"{'part':<12}{'parameters':>16}{'share':>8}"]
    for part, parameters in model.parts().items():
        total = count(parameters)
        trained = count(p for p in parameters if p.requires_grad)
        state = f'{trained:,} trained'       # a part of them, such as all but the embeddings
        if not trained:
            state = 'frozen'
        elif trained == total:
            state = 'trained'
        share = total / every
        lines.append(f'{part:<12}{total:>16,}{share:>8.1%}  {state}')
    return lines


def planned_model(settings, checkpoint=None):
    """The VLM that train.py builds with these settings, without memory for its weights (meta
    device). Its sizes are those of `checkpoint`, else of init_from; where neither is there yet,
    those of the settings."""
    source = checkpoint
    if not source and settings['init_from']:
        source = newest(settings['init_from'])
    if source and source.is_dir():
        config = read_config(source)
    else:
        names = ('recipe', 'vision', 'language', 'connector', 'pooling')
        config = make_config(**{name: settings[name] for name in names})
    with torch.device('meta'):               # shapes without memory
        model = VLM(config)
    model.set_trained(settings)
    return model.to(pick_dtype(settings['master_dtype'], torch.device('cpu')))


@torch.no_grad()
def random_weights(model):
    """Fills a model with small random numbers, on its own device. A million of them are drawn and
    used again and again, because drawing a billion on a CPU (VLM.init_weights) takes half a minute."""
    device = next(model.parameters()).device
    # Its length divides no width, so that no two rows of a matrix are equal
    block = .02 * torch.randn(2 ** 20 + 7, device=device)
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            p.zero_()
        elif 'norm' in name:
            p.fill_(1)
        else:
            repeats = -(-p.numel() // len(block))
            p.copy_(block.repeat(repeats)[:p.numel()].view_as(p))


# --------------------------------------------------------------------------------------------------
# Floating-point operations

# Peak of each GPU in FLOP/s of bfloat16 matrix multiplication without sparsity, from the makers'
# data sheets. The first name that occurs in the device's own name is taken, so a longer name stands
# before its shorter one. A device that is not listed gets no MFU.
PEAK_FLOPS = {
    'A100': 312e12,
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'H200': 989e12,
    'B200': 2250e12,
    'L40S': 362e12,
    'L4': 121e12,
    'A10': 125e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
}


def peak_flops(device):
    """The most FLOP/s that the device can do, or None for one that is not in the table."""
    if device.type != 'cuda':
        return None
    device_name = torch.cuda.get_device_name()
    for name, peak in PEAK_FLOPS.items():
        if name in device_name:
            return peak
    return None


def flops(model, batch):
    """Floating-point operations of a training step on this batch, a Batch, by the rule of Kaplan et
    al. 2020 (section 2.1) and with attention by the true lengths of documents:

        matrices     2 for each weight and token forward, and 4 more backward: 2 for the gradient of
                     the inputs and 2 for that of the weights. Frozen weights take 2 backward where
                     gradients pass through them, and a frozen tower takes none.
        attention    4 * heads * head_dim for each layer and each pair of tokens of which one
                     attends to the other (query @ key, and scores @ value), and twice that backward

    Ignores norms, softmax, rotation and the connector (< 2%).
    """
    v = model.config.vision
    t = model.config.language
    layers = list(model.language_model.layers.parameters())
    decoder_weights = count(p for p in layers if p.ndim == 2)
    decoder_is_trained = any(p.requires_grad for p in layers)
    # Passes over each weight: forward, backward to the inputs and, where it is trained, to itself
    passes = 3 if decoder_is_trained else 2
    total = 2 * passes * decoder_weights * batch.num_tokens
    attention_of_a_pair = 4 * t.num_layers * t.num_heads * t.head_dim
    total += 3 * attention_of_a_pair * batch.num_pairs
    # Logits are computed only for the tokens with a loss
    output_weights = t.vocab_size * t.hidden_size
    total += 2 * passes * output_weights * len(batch.loss_index)
    tower_weights = 0
    for name, p in model.vision_tower.named_parameters():
        # The table of positions is added and not multiplied
        if p.ndim == 2 and 'position' not in name:
            tower_weights += p.numel()
    tower_passes = 3 if model.vision_tower.is_trained() else 1
    for crops in (batch.patches, batch.frames):
        if crops is None:
            continue
        number, patches, _ = crops.shape
        matrices = 2 * tower_weights * number * patches
        # Each patch attends to all of its crop
        attention = 4 * v.num_layers * v.hidden_size * patches ** 2 * number
        total += tower_passes * (matrices + attention)
    return total


# --------------------------------------------------------------------------------------------------
# Memory

def saved_bytes(module, *inputs):
    """Bytes that autograd keeps for the backward pass of `module`, without its own weights. It is
    measured, by running the module on the inputs; tests compare the estimates below with it."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    # Counted by storage, because several tensors that are kept may be views of the same memory
    kept = {}                                # address of the storage -> bytes

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.numel() * t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(*inputs)
    assert out is not None    # alive until here, because a freed storage's address would come again
    return sum(size for storage, size in kept.items() if storage not in own)


def kept_by_decoder_block(config, size, residual, compiled):
    """Bytes a token that autograd keeps of one block on CUDA. config: the LanguageConfig.

    size: bytes of a number in the dtype of matrix multiplication. residual: bytes of a number in
    the hidden states that blocks add to, whose dtype is that of the table of embeddings.

    Eager, each operation keeps what its gradient needs. Compiled, silu(gate) and the input of the
    second norm are computed again from what is kept. Leaves out one number a head for each norm and
    for the softmax (< 1%). tests/test_cuda.py compares with `saved_bytes`.
    """
    width = config.hidden_size
    inside = config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width       # read by q_proj, k_proj, v_proj and by gate_proj, up_proj
    head_norms = size * (queries + keys)     # queries and keys before their norms
    # Queries, keys, values, and the result, which attention and o_proj both need
    attention = size * (queries + 2 * keys + queries)
    mlp = 4 * size * inside                  # gate, up, silu(gate), and silu(gate) * up
    if compiled:
        # The input of the block, and what attention adds to it
        norm_inputs = residual * width + size * width
        mlp = 3 * size * inside
    return norm_inputs + norm_results + head_norms + attention + mlp


def kept_by_vision_block(config, size, residual):
    """Bytes a patch that autograd keeps of one block of a trained tower, as
    `kept_by_decoder_block`. config: the VisionConfig. Compiled blocks keep as much, or less."""
    width = config.hidden_size
    inside = config.intermediate_size
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width
    # Queries, keys, values, the result, and a copy of the result with the heads side by side
    attention = 5 * size * width
    mlp = 2 * size * inside                  # the result of fc1, and the input of fc2
    if config.activation == 'quick_gelu':
        mlp += size * inside                 # its sigmoid
    return norm_inputs + norm_results + attention + mlp


def kept_by_layers(a_block, width, residual, layers, recompute):
    """Bytes a token that autograd keeps of all layers. a_block: those of one block; recompute: each
    so many-th block is checkpointed (model.py, `is_recomputed`), 0 none.

    A checkpointed block keeps only its input. In the backward pass they are computed again one
    after the other, so one of them counts as a whole block, too.
    """
    checkpointed = 0
    if recompute:
        checkpointed = -(-layers // recompute)           # rounded up
    whole = layers - checkpointed
    if checkpointed:
        whole += 1
    return a_block * whole + residual * width * checkpointed


def memory_estimate(model, rows, seq_len, recompute=0, amp=torch.bfloat16, patches=0, shards=1,
                    cp=1, compiled=False):
    """Bytes on each CUDA device for a micro-batch of full rows, by use: {'weights': ..., ...,
    'total': ...}.

    rows, seq_len: rows of a micro-batch, and tokens of a row. recompute: as in `kept_by_layers`.
    amp: the dtype of matrix multiplication. patches: of all the pictures and frames of a row; 0:
    those of one picture. shards: how many devices hold the weights together (parallel.py); cp: how
    many share their rows.

        weights, gradients,    in the dtype of the weights, a share of them on each device
        moments
        weight copies          what autocast keeps of the trained weights; of sharded weights those
                               of two blocks at a time, and of all that is in no block
        features               those of all patches
        activations            what autograd keeps of each block
        logits                 one chunk of them, and the gradient of the output's weights

    Left out are the temporary results of single operations, gaps in the allocator's memory
    (together 5 to 15%), and what the setting `memory_budget` saves.
    """
    v = model.config.vision
    t = model.config.language
    size = torch.finfo(amp).bits // 8        # bytes of a number
    # Bytes of a weight: 4, or 2 with a narrow master_dtype
    master = model.language_model.embed_tokens.weight.element_size()
    trained = count(p for p in model.parameters() if p.requires_grad)
    every = count(model.parameters())
    tower_is_trained = model.vision_tower.is_trained()
    # A frozen tower is not sharded (parallel.py), so that each device holds all of it
    unsharded = 0 if tower_is_trained else count(model.vision_tower.parameters())
    sharded = every - unsharded
    use = {
        'weights': master * (unsharded + sharded / shards),
        'gradients': master * trained / shards,
        'moments': 2 * master * trained / shards,        # Adam's two
        'weight copies': 0,
    }
    if shards > 1:
        layers = count(model.language_model.layers.parameters())
        outside = sharded - layers
        if tower_is_trained:
            outside -= count(model.vision_tower.encoder.parameters())
        two_blocks = 2 * size * layers / t.num_layers
        use['weight copies'] = two_blocks + master * outside
    elif amp != torch.float32:
        use['weight copies'] = size * trained

    patches_of_a_picture = (v.image_size // v.patch_size) ** 2
    patches = rows * (patches or patches_of_a_picture)
    use['features'] = master * patches * v.feature_size

    tokens = rows * seq_len / cp
    block = kept_by_decoder_block(t, size, master, compiled)
    a_token = kept_by_layers(block, t.hidden_size, master, t.num_layers, recompute)
    use['activations'] = tokens * a_token
    if tower_is_trained:
        block = kept_by_vision_block(v, size, master)
        a_patch = kept_by_layers(block, v.hidden_size, master, v.num_layers, recompute)
        use['activations'] += patches / cp * a_patch

    # Bytes for each word of the vocabulary: a chunk of logits in float32 and again as their
    # gradient in the narrower dtype; then the gradient of the output's weights in float32, and once
    # more when it is scaled
    chunk = min(LOGITS_CHUNK, tokens) * (4 + size)
    output_gradients = 2 * 4 * t.hidden_size
    use['logits'] = t.vocab_size * (chunk + output_gradients)
    use['total'] = sum(use.values())
    return {name: int(n) for name, n in use.items()}


def full_row_patches(settings):
    """Patches of a packed row that holds nothing but visual tokens, for `memory_estimate`; 0 (one
    picture) where a row is one example."""
    if not settings['packing']:
        return 0
    widest_window = max(settings['pooling'], settings['video_pooling'])
    return settings['seq_len'] * widest_window ** 2


# An estimate is multiplied by this, for temporary results and for gaps in the allocator's memory
SLACK = 1.1


def fits(total, memory):
    """A sentence that says whether an estimated total fits a device with `memory` bytes."""
    verdict = 'fits'
    if SLACK * total > memory:
        verdict = 'does not fit: halve batch_size and double accumulation, or set recompute = 1'
    needed = total / 1e9
    available = memory / 1e9
    return f'{needed:.1f} GB and a tenth for slack in {available:.0f} GB: {verdict}'


# --------------------------------------------------------------------------------------------------
# The mixture

def mixture_table(settings, draws):
    """Lines of a table, one for each data set of a config: rows, their square root, share of the
    draws, draws in the whole run, epochs. draws: examples of the whole run. A data set that is not
    there yet counts with the `size` that the config gives it."""
    mixture = settings['mixture']
    data_dir = settings['data_dir']
    sets = mixture_sets(mixture)
    sizes = {}
    missing = set()
    for name, options in sets.items():
        try:
            sizes[name] = open_dataset(name, settings, data_dir).rows
        except UserError:
            if name in settings['datasets']:             # an object that is no data set
                raise
            # The folder is not prepared yet
            missing.add(name)
            sizes[name] = options.get('size', 0)
    at_least_one = {name: max(1, size) for name, size in sizes.items()}      # no division by 0
    rates = mixture_rates(mixture, at_least_one)
    lines = [f"{'dataset':<34}{'rows':>11}{'sqrt':>8}{'weight':>9}{'draws':>13}{'epochs':>9}"]
    for key, group in mixture.items():
        names = list(group['sets']) if isinstance(group, dict) else [key]
        indent = ''
        if len(names) > 1:                   # a line for the group itself
            indent = '  '
            rate = sum(rates[name] for name in names)
            lines.append(f'{key:<53}{rate:>9.2%}')
        for name in names:
            rows = min(sizes[name], sets[name].get('cap') or sizes[name])
            mark = ' *' if name in missing else ''
            rate = rates[name]
            times = draws * rate
            epochs = f'{times / rows:.2f}' if rows else '?'
            lines.append(f'{indent + name + mark:<34}{rows:>11,}{rows ** .5:>8.0f}{rate:>9.2%}'
                         f'{times:>13,.0f}{epochs:>9}')
    if missing:
        lines.append('* not prepared yet; rows as the config expects')
    return lines


# --------------------------------------------------------------------------------------------------
# The plan that train.py prints

ATTENTION_NAMES = {
    'causal': 'causal SDPA',
    'dense': 'SDPA with a dense mask',
    'pieces': 'attention in small dense pieces',
    'flex': 'FlexAttention with a block mask',
}


def dtype_name(dtype):
    return str(dtype).removeprefix('torch.')


def print_plan(model, settings, device, amp, checkpoint, world_size=1, local_world_size=1):
    """Prints what was decided, once, before training starts. amp: the dtype of matrix
    multiplication; checkpoint: the folder to resume from, or None; world_size, local_world_size:
    processes in all, and on each machine."""
    print('\n'.join(part_table(model)))
    cp = settings['cp']
    batch_size = settings['batch_size']
    accumulation = settings['accumulation']
    max_steps = settings['max_steps']
    readers = world_size // cp               # processes that read rows of their own
    rows = batch_size * accumulation * readers
    table = mixture_table(settings, max_steps * rows)
    print('\n'.join(table))
    if settings['packing']:
        print('  (draws as if a row held one example; '
              'python data.py with this config counts how many it holds)')
    micro = f'{batch_size} x {accumulation} micro-batches'
    if world_size > 1:
        micro += f' x {readers} processes'
    if cp > 1:
        micro += f', each with {cp - 1} more that share its rows'
    tokens = rows * settings['seq_len']
    print(f'steps {max_steps:,} of {rows} rows = {micro}, at most {tokens:,} tokens a step, '
          f'{rows * max_steps:,} rows in all')
    print_memory(model, settings, device, amp, world_size, local_world_size)
    form = choose_attention(model.config.recipe, device, causal=False, fast=settings['fast'])
    dtype = dtype_name(amp)
    print(f'device {device} with {torch.get_num_threads()} threads, {dtype}; '
          f'rows with branches: {ATTENTION_NAMES[form]}')
    print_layout(model.config, settings)
    if checkpoint:
        print(f'resuming from {checkpoint}')
    else:
        print(f"starting from {settings['init_from'] or 'new weights'}")
    # A model that gives all tokens the same probability has this loss
    uniform = math.log(model.config.language.vocab_size)
    print(f'ln(vocabulary) = {uniform:.3f}: the loss of a model that knows nothing', flush=True)


def print_memory(model, settings, device, amp, world_size, local_world_size):
    shards_of = {'ddp': 1, 'fsdp': world_size, 'hsdp': local_world_size}
    memory = memory_estimate(
        model,
        settings['batch_size'],
        settings['seq_len'],
        settings['recompute'],
        amp,
        full_row_patches(settings),
        shards_of[settings['parallel']],
        settings['cp'],
        settings['compile'],
    )
    uses = ', '.join(f'{use} {n / 1e9:.2f} GB' for use, n in memory.items())
    print(f'memory of full rows on CUDA, estimated: {uses}')
    total = memory['total']
    if device.type == 'cuda':
        available = torch.cuda.get_device_properties(device).total_memory
        print('on this GPU: ' + fits(total, available))
    elif settings['dry_run']:
        print('on a GPU of 80 GB: ' + fits(total, 80e9))


def print_layout(config, settings):
    """Prints which other tools open the checkpoints."""
    out_dir = settings['out_dir']
    native = layout(config)
    if native is None:
        print(f'checkpoints in {out_dir} open here only: no native architecture expresses '
              f"recipe '{config.recipe}' with connector '{config.connector}' and a "
              f'{config.vision.style} tower')
        return
    print(f'checkpoints in {out_dir} open in transformers as {native}')
    size = settings['image_size']
    trained_size = config.vision.image_size
    if native != 'molmo2' and size != trained_size:
        print(f'note: pictures of {size} px on a position table of {trained_size} px: '
              'transformers needs interpolate_pos_encoding=True to do the same')


def print_missing(settings):
    """Prints the data sets and folders that a config names and that are not there."""
    data_dir = Path(settings['data_dir'])
    names = [name for name in mixture_sets(settings['mixture']) if name not in settings['datasets']]
    paths = [data_dir / name / 'train.jsonl' for name in names]
    # A checkpoint to start from holds the weights and the tokenizer
    names = ('vision_weights', 'language_weights', 'tokenizer')
    if settings['init_from']:
        names = ('init_from',)
    paths += [Path(settings[name]) for name in names if settings[name]]
    missing = [path for path in paths if not path.exists()]
    for path in missing:
        print(f'missing: {path}')
    if not missing:
        print('nothing is missing')


# --------------------------------------------------------------------------------------------------
# Commands

CARDS = (80, 40, 24)                         # GB of the GPUs that `main` speaks of


def main():
    """python model.py: prints parameters and memory of the three stages or of a config, and runs
    the model once."""
    settings = configure(train_settings())
    model = planned_model(settings)
    print('\n'.join(part_table(model)))
    total = count(model.parameters())
    trained = count(p for p in model.parameters() if p.requires_grad)
    native = layout(model.config) or 'no'
    print(f"{'all':<12}{total:>16,}          {trained:,} trained; {native} layout in transformers")
    print_layers_left_out(model, settings)
    print_memory_table(model, settings)
    print()
    try_forward(model, settings)


def print_layers_left_out(model, settings):
    """Says why the tower has fewer parameters than its name promises."""
    released = settings['vision']
    if settings['init_from']:
        return
    if isinstance(released, str):
        released = VISION[released]
    layers = model.vision_tower.encoder['layers']
    missing = released['num_layers'] - len(layers)
    if missing:
        left_out = missing * count(layers[0].parameters())
        print(f"the tower has {len(layers)} of its {released['num_layers']} layers, because what comes after "
              f'the features is not built: {left_out / 1e6:.1f} million parameters')


def print_memory_table(model, settings):
    """Prints for each stage, or for the config, and each way to save memory what a GPU needs, and
    which cards that fits."""
    # The rows a GPU and tokens a row of config/stage1.py, stage2.py and stage3.py
    stages = {'stage 1': (8, 4096), 'stage 2': (8, 4096), 'stage 3': (1, 36864)}
    if len(sys.argv) > 1:
        stages = {'this config': (settings['batch_size'], settings['seq_len'])}
    # The tables are those of a GPU, wherever they are printed, so 'auto' is bfloat16
    amp = torch.float32 if settings['dtype'] == 'float32' else torch.bfloat16
    ways = (                                 # title, recompute, compiled
        ('nothing recomputed', 0, False),
        ('nothing recomputed, compile', 0, True),
        ('every block recomputed', 1, False),
    )
    for title, recompute, compiled in ways:
        print(f'\nGB a device with full rows, {title}')
        for name, (rows, seq_len) in stages.items():
            patches = full_row_patches({**settings, 'seq_len': seq_len})

            def need(rows, seq_len=seq_len, patches=patches, recompute=recompute, compiled=compiled):
                return memory_estimate(model, rows, seq_len, recompute, amp, patches, compiled=compiled)
            memory = need(rows)
            uses = '  '.join(f'{use} {n / 1e9:.1f}' for use, n in memory.items())
            cards = '; '.join(card_verdict(card, rows, need) for card in CARDS)
            print(f'{name:<12}{rows:>3} x {seq_len:<7,}{uses}')
            print(f"{'':<12}{cards} (with a tenth for slack)")


def card_verdict(card, rows, need):
    """Whether `rows` rows fit a GPU of `card` GB, or how many do. need(rows): bytes by use."""
    for fewer in range(rows, 0, -1):
        if SLACK * need(fewer)['total'] <= card * 1e9:
            if fewer == rows:
                return f'fits {card} GB'
            return f'{fewer} of the rows fit {card} GB'
    return f'does not fit {card} GB'


# --------------------------------------------------------------------------------------------------
# One forward pass

def free_memory():
    """Bytes of this machine's memory that a program may take, or None where the system (all but
    Linux) does not say. What it uses to keep files at hand counts as free, because it gives way."""
    path = Path('/proc/meminfo')
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith('MemAvailable'):
            return 1024 * int(line.split()[1])
    return None


def load_what_is_there(model, settings):
    """Fills a model with the weights that the settings name, and with random ones where their folder
    is not there yet. Returns what was done, in words."""
    random_weights(model)
    wanted = [
        ('vision', settings['vision_weights'], 'vision_tower.'),
        ('language', settings['language_weights'], ('language_model.', 'lm_head.')),
    ]
    if settings['init_from']:
        wanted = [('all', newest(settings['init_from']), '')]
    done = []
    for part, folder, prefixes in wanted:
        if folder and Path(folder).is_dir():
            load_weights(model, folder, only=prefixes)
            done.append(f'{part} from {folder}')
        else:
            reason = f' ({folder} is not there)' if folder else ''
            done.append(f'{part} at random{reason}')
    return ', '.join(done)


def try_forward(plan, settings):
    """Builds the model of a plan on the CPU and runs it once, on a made-up picture and a question
    with its answer."""
    weights = 4 * count(plan.parameters())
    free = free_memory()
    if free is not None and weights > .8 * free:
        print(f'no forward pass here: the weights take {weights / 1e9:.1f} GB of float32, and {free / 1e9:.1f} GB '
              'are free')
        return
    start = time.perf_counter()
    # What is not there yet, a tokenizer or a checkpoint to start from, is made up
    there = dict(settings)
    if settings['init_from'] and not newest(settings['init_from']).is_dir():
        there['init_from'] = ''
    folder = there['tokenizer'] or there['language_weights']
    if not there['init_from'] and not (Path(folder) / 'tokenizer.json').is_file():
        there['tokenizer'] = 'bytes'
    processor, config = make_processor(there)
    with torch.device('meta'):
        model = VLM(config)
    model.to_empty(device='cpu')
    model.set_buffers()
    source = load_what_is_there(model, settings)
    picture = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    record = normalise({'images': [picture], 'messages': [
        {'role': 'user', 'content': 'What is in this picture?'},
        {'role': 'assistant', 'content': 'Noise.'},
    ]})
    try:
        batch = collate([[processor.example(record, '.')]], processor)
    except BadRow as e:
        raise UserError(f'a picture and a short answer: {e}') from None
    with torch.no_grad():
        loss, _ = model(batch)
    loss = loss.item() / batch.total_weight
    words = 'a byte each' if there['tokenizer'] == 'bytes' else 'with its tokenizer'
    print(f'weights: {source}')
    print(f'a forward pass of one picture and an answer ({words}): {batch.num_tokens} tokens, '
          f'{len(batch.visual_index)} of them visual; loss {loss:.2f}, of a model that knows nothing '
          f'{math.log(plan.config.language.vocab_size):.2f}; {time.perf_counter() - start:.1f} seconds with loading')


def main_devices():
    """python parallel.py: prints the memory of each device by the number of devices, and what it
    takes to share one row among several."""
    settings = configure(train_settings())
    model = planned_model(settings)
    print_devices(model, settings)
    print_shared_row(model, settings)


def print_devices(model, settings):
    """Prints a line for each number of devices: memory by use with fsdp, and the total where cp of
    them share their rows."""
    rows = settings['batch_size']
    seq_len = settings['seq_len']
    recompute = settings['recompute']
    patches = full_row_patches(settings)

    def need(devices, cp):
        return memory_estimate(model, rows, seq_len, recompute, patches=patches,
                               shards=devices, cp=cp)
    alone = need(1, 1)
    with_ddp = alone['total'] / 1e9
    print(f'GB on each device for {rows} rows of {seq_len:,} tokens, recompute = {recompute}; '
          f'with ddp {with_ddp:.1f}, with fsdp:\n')
    head = [*alone, 'cp = 2', 'cp = 4', 'cp = 8']
    print('devices  ' + '  '.join(head))
    for devices in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        cells = list(need(devices, 1).values())
        cells += [need(devices, cp)['total'] for cp in (2, 4, 8) if cp <= devices]
        columns = [f'{cell / 1e9:{len(name)}.1f}' for name, cell in zip(head, cells)]
        print(f'{devices:>7}  ' + '  '.join(columns))


def print_shared_row(model, settings):
    """Prints what one row takes on each of cp devices that share it (context parallelism,
    parallel.py): memory, and megabytes to send."""
    t = model.config.language
    seq_len = settings['seq_len']
    print('\nOne row shared by cp devices that hold the weights together. MB: what each sends in '
          "a layer's forward pass, and again in its backward pass\n")
    print(f"{'row':>9}{'cp':>4}{'tokens each':>13}{'GB each':>9}{'MB':>7}")
    for length in (seq_len, 4 * seq_len):
        for cp in (1, 2, 4, 8, 16):
            if t.num_heads % cp:             # each device takes whole heads
                continue
            # Key heads are repeated until cp divides them: their least common multiple
            kv_heads = math.lcm(t.num_kv_heads, cp)
            # A device sends queries, results, keys and values of its own tokens, in two bytes, to
            # the cp - 1 others
            heads = 2 * t.num_heads + 2 * kv_heads
            sent = heads * t.head_dim * 2 * length / cp * (cp - 1) / cp
            patches = full_row_patches(settings) * length // seq_len
            memory = memory_estimate(model, 1, length, settings['recompute'], patches=patches,
                                     shards=cp, cp=cp)
            total = memory['total'] / 1e9
            print(f'{length:>9,}{cp:>4}{length // cp:>13,}{total:>9.1f}{sent / 1e6:>7.0f}')
