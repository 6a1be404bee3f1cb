"""What a run costs and whether it fits, before it is started: parameters, floating-point
operations, memory, draws.

    python model.py [config/stage1.py]       `main`: parameters by part, memory with and without recomputing
    python parallel.py config/stage3.py      `main_devices`: memory of each device by the number of devices
    python train.py ... --dry_run            `print_plan` and `print_missing`

Everything here is computed from sizes; `make gpu-check` prints measured peaks beside the estimates.
"""
import math
import sys
from pathlib import Path

import torch

from configurator import UserError, configure, train_settings
from data import Dataset, mixture_rates, mixture_sets
from extra.hf import from_hf, layout, newest
from extra.kernels import LOGITS_CHUNK
from model import VLM, choose_attention, make_config, pick_dtype, read_json

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
        state = f'{trained:,} trained'
        if not trained:
            state = 'frozen'
        elif trained == total:
            state = 'trained'
        lines.append(f'{part:<12}{total:>16,}{total / every:>8.1%}  {state}')
    return lines


def planned_model(settings, checkpoint=None):
    """The VLM that train.py builds with these settings, without weights (meta device). An init_from
    that is not there yet is taken to be of the settings' sizes."""
    source = checkpoint
    if not source and settings['init_from']:
        source = newest(settings['init_from'])
    if source and source.is_dir():
        config = from_hf(read_json(source / 'config.json'))
    else:
        names = ('recipe', 'vision', 'language', 'connector', 'pooling')
        config = make_config(**{name: settings[name] for name in names})
    with torch.device('meta'):
        model = VLM(config)
    model.set_trained(settings)
    return model.to(pick_dtype(settings['master_dtype'], torch.device('cpu')))


# --------------------------------------------------------------------------------------------------
# Floating-point operations

# bfloat16 products a second without sparsity, from the makers' data sheets; a device that is not
# listed gets no MFU
PEAK_FLOPS = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12, 'L40S': 362e12,
              'L4': 121e12, 'A10': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def peak_flops(device):
    """What the device could do in a second, or None for one that is not in the table."""
    if device.type != 'cuda':
        return None
    device_name = torch.cuda.get_device_name()
    for name, peak in PEAK_FLOPS.items():
        if name in device_name:
            return peak
    return None


def flops(model, batch):
    """Floating-point operations of a training step on this batch: vision, decoder, and attention by
    true lengths.

    2 for each weight and token forward, 4 more where gradients flow (2 through frozen weights that
    pass them on), and 4 * heads * head_dim for each pair of tokens of which one attends to the
    other, three times with the backward pass. Ignores norms, softmax, rotation and the connector (<
    2%).
    """
    v, t = model.config.vision, model.config.language
    decoder_weights = count(p for p in model.language_model.layers.parameters() if p.ndim == 2)
    decoder_is_trained = any(p.requires_grad for p in model.language_model.layers.parameters())
    passes = 3 if decoder_is_trained else 2
    total = 2 * passes * decoder_weights * batch.num_tokens
    total += 12 * t.num_layers * t.num_heads * t.head_dim * batch.num_pairs
    total += 2 * passes * t.vocab_size * t.hidden_size * len(batch.loss_index)
    tower_weights = count(p for name, p in model.vision_tower.named_parameters() if p.ndim == 2 and 'position' not in name)
    for crops in (batch.patches, batch.frames):
        if crops is None:
            continue
        number, patches, _ = crops.shape
        products = 2 * tower_weights * number * patches
        pairs = 4 * v.num_layers * v.hidden_size * patches ** 2 * number
        total += (3 if model.vision_tower.is_trained() else 1) * (products + pairs)
    return total


# --------------------------------------------------------------------------------------------------
# Memory

def saved_bytes(module, *inputs):
    """Bytes that autograd keeps for the backward pass of `module`, its own weights not counted."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept = {}                                # storage -> bytes

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.numel() * t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(*inputs)   # it must stay alive, because it holds the graph and so the storages
    assert out is not None
    return sum(size for storage, size in kept.items() if storage not in own)


def kept_by_decoder_block(config, size, residual, compiled):
    """Bytes a token that autograd keeps of one block on CUDA. Numbers take `size` bytes in the
    products' dtype and `residual` in the stream that blocks add to, which has the dtype of the
    table of embeddings.

    Eager, each operation keeps what its gradient needs. Compiled, silu(gate) and the second norm's
    input are made again from what is kept. Leaves out one number a head for each norm and for the
    softmax (< 1%). tests/test_cuda.py counts.
    """
    width, inside = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width       # read by q_proj, k_proj, v_proj and by gate_proj, up_proj
    head_norms = size * (queries + keys)     # queries and keys before them
    attention = size * (queries + 2 * keys + queries)    # queries, keys, values and the result, which o_proj reads too
    mlp = 4 * size * inside            # gate, up, silu(gate), and its product with up for down_proj
    if compiled:
        norm_inputs = residual * width + size * width    # the block's input, and what attention adds to it
        mlp = 3 * size * inside
    return norm_inputs + norm_results + head_norms + attention + mlp


def kept_by_vision_block(config, size, residual):
    """As `kept_by_decoder_block`, a patch of a trained tower. Compiled blocks keep as much, or
    less."""
    width, inside = config.hidden_size, config.intermediate_size
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width
    attention = 5 * size * width      # queries, keys, values, the result, and it again in one piece
    mlp = 2 * size * inside                  # what fc1 gave, and what fc2 reads
    if config.activation == 'quick_gelu':
        mlp += size * inside                 # its sigmoid
    return norm_inputs + norm_results + attention + mlp


def kept_by_layers(a_block, width, residual, layers, recompute):
    """Bytes a token of all layers. A checkpointed block keeps its input, and one at a time is
    computed again."""
    checkpointed = 0
    if recompute:
        checkpointed = -(-layers // recompute)           # rounded up
    whole = layers - checkpointed + bool(checkpointed)
    return a_block * whole + residual * width * checkpointed


def memory_estimate(model, rows, seq_len, recompute=0, amp=torch.bfloat16, patches=0, shards=1, cp=1, compiled=False):
    """Bytes by use on each CUDA device for a micro-batch of full rows: {'weights': ..., ...,
    'total': ...}.

    patches: those of all the pictures and frames of a row; 0: one picture's. shards: so many
    devices hold the weights together (parallel.py); cp: so many share their rows. amp: the
    products' dtype.

    Counted are weights, gradients and two moments in the weights' own dtype; what autograd keeps of
    each block; the autocast copies of trained weights (of sharded ones two blocks at a time, and
    all that is in no block); the features of all patches; one chunk of logits, and the gradient of
    the output's weights. Left out are what a single operation needs in passing, the allocator's
    gaps (together 5 to 15%), and what `memory_budget` saves.
    """
    v, t = model.config.vision, model.config.language
    size = torch.finfo(amp).bits // 8
    master = model.language_model.embed_tokens.weight.element_size()             # 4, or 2 with a narrow master_dtype
    trained = count(p for p in model.parameters() if p.requires_grad)
    every = count(model.parameters())
    tower_is_trained = model.vision_tower.is_trained()
    # A frozen tower stays whole on each device
    unsharded = 0 if tower_is_trained else count(model.vision_tower.parameters())
    use = {'weights': master * (unsharded + (every - unsharded) / shards),
           'gradients': master * trained / shards,
           'moments': 2 * master * trained / shards,
           'weight copies': 0}
    if shards > 1:
        layers = count(model.language_model.layers.parameters())
        outside = every - unsharded - layers
        if tower_is_trained:
            outside -= count(model.vision_tower.encoder.parameters())
        use['weight copies'] = 2 * size * layers / t.num_layers + master * outside
    elif amp != torch.float32:
        use['weight copies'] = size * trained
    patches = rows * (patches or (v.image_size // v.patch_size) ** 2)
    use['features'] = master * patches * v.feature_size
    tokens = rows * seq_len / cp
    block = kept_by_decoder_block(t, size, master, compiled)
    use['activations'] = tokens * kept_by_layers(block, t.hidden_size, master, t.num_layers, recompute)
    if tower_is_trained:
        block = kept_by_vision_block(v, size, master)
        use['activations'] += patches / cp * kept_by_layers(block, v.hidden_size, master, v.num_layers, recompute)
    chunk = min(LOGITS_CHUNK, tokens) * (4 + size)
    output_gradients = 2 * 4 * t.hidden_size           # in float32, and once more when it is scaled
    use['logits'] = t.vocab_size * (chunk + output_gradients)
    use['total'] = sum(use.values())
    return {name: int(n) for name, n in use.items()}


def full_row_patches(settings):
    """Patches behind a row of nothing but visual tokens, for `memory_estimate`; 0 where a row is
    one example."""
    if not settings['packing']:
        return 0
    return settings['seq_len'] * max(settings['pooling'], settings['video_pooling']) ** 2


SLACK = 1.1        # of a memory_estimate: what operations need in passing, and the allocator's gaps


def fits(total, memory):
    """Says whether an estimated total fits a device with `memory` bytes."""
    verdict = 'fits'
    if SLACK * total > memory:
        verdict = 'does not fit: halve batch_size and double accumulation, or set recompute = 1'
    return f'{total / 1e9:.1f} GB and a tenth for slack in {memory / 1e9:.0f} GB: {verdict}'


# --------------------------------------------------------------------------------------------------
# The mixture

def mixture_table(mixture, data_dir, draws):
    """A line for each data set: rows, square root, share of the draws, draws of the whole run,
    epochs. A data set that is not there yet counts with the `size` that the config gives it."""
    sets = mixture_sets(mixture)
    sizes = {}
    missing = set()
    for name, options in sets.items():
        try:
            sizes[name] = Dataset(Path(data_dir) / name).rows
        except UserError:
            missing.add(name)
            sizes[name] = options.get('size', 0)
    rates = mixture_rates(mixture, {name: max(1, size) for name, size in sizes.items()})
    lines = [f"{'dataset':<34}{'rows':>11}{'sqrt':>8}{'weight':>9}{'draws':>13}{'epochs':>9}"]
    for key, group in mixture.items():
        names = list(group['sets']) if isinstance(group, dict) else [key]
        indent = ''
        if len(names) > 1:
            indent = '  '
            lines.append(f'{key:<53}{sum(rates[name] for name in names):>9.2%}')
        for name in names:
            rows = min(sizes[name], sets[name].get('cap') or sizes[name])
            mark = ' *' if name in missing else ''
            epochs = f'{draws * rates[name] / rows:>9.2f}' if rows else f"{'?':>9}"
            lines.append(f'{indent + name + mark:<34}{rows:>11,}{rows ** .5:>8.0f}{rates[name]:>9.2%}'
                         f'{draws * rates[name]:>13,.0f}{epochs}')
    if missing:
        lines.append('* not prepared yet; rows as the config expects')
    return lines


# --------------------------------------------------------------------------------------------------
# The plan that train.py prints

ATTENTION_NAMES = {'causal': 'causal SDPA', 'dense': 'SDPA with a dense mask', 'pieces': 'attention in small dense pieces',
                   'flex': 'FlexAttention with a block mask'}


def print_plan(model, settings, device, amp, checkpoint, world_size=1, local_world_size=1):
    """What was decided, once, before training starts."""
    s = settings
    print('\n'.join(part_table(model)))
    readers = world_size // s['cp']          # processes that read rows of their own
    rows = s['batch_size'] * s['accumulation'] * readers
    print('\n'.join(mixture_table(s['mixture'], s['data_dir'], s['max_steps'] * rows)))
    if s['packing']:
        print('  (draws as if a row held one example; python data.py with this config counts how many it holds)')
    micro = f"{s['batch_size']} x {s['accumulation']} micro-batches"
    if world_size > 1:
        micro += f' x {readers} processes'
    if s['cp'] > 1:
        micro += f", each with {s['cp'] - 1} more that share its rows"
    print(f"steps {s['max_steps']:,} of {rows} rows = {micro}, at most {rows * s['seq_len']:,} tokens a step, "
          f"{rows * s['max_steps']:,} rows in all")
    print_memory(model, settings, device, amp, world_size, local_world_size)
    form = choose_attention(model.config.recipe, device, causal=False)
    print(f'device {device} with {torch.get_num_threads()} threads, {str(amp)[6:]}; rows with branches: '
          f'{ATTENTION_NAMES[form]}')
    print_layout(model.config, settings)
    print(f'resuming from {checkpoint}' if checkpoint else f"starting from {s['init_from'] or 'new weights'}")
    print(f'ln(vocabulary) = {math.log(model.config.language.vocab_size):.3f}: the loss of a model that knows nothing',
          flush=True)


def print_memory(model, settings, device, amp, world_size, local_world_size):
    shards = {'ddp': 1, 'fsdp': world_size, 'hsdp': local_world_size}[settings['parallel']]
    memory = memory_estimate(model, settings['batch_size'], settings['seq_len'], settings['recompute'], amp,
                             full_row_patches(settings), shards, settings['cp'], settings['compile'])
    uses = ', '.join(f'{use} {n / 1e9:.2f} GB' for use, n in memory.items())
    print(f'memory of full rows on CUDA, estimated: {uses}')
    if device.type == 'cuda':
        print('on this GPU: ' + fits(memory['total'], torch.cuda.get_device_properties(device).total_memory))
    elif settings['dry_run']:
        print('on a GPU of 80 GB: ' + fits(memory['total'], 80e9))


def print_layout(config, settings):
    """In what other tools the checkpoints open."""
    out_dir, native = settings['out_dir'], layout(config)
    if native is None:
        print(f"checkpoints in {out_dir} open here only: no native architecture expresses recipe '{config.recipe}' "
              f"with connector '{config.connector}' and a {config.vision.style} tower")
        return
    print(f'checkpoints in {out_dir} open in transformers as {native}')
    if native != 'molmo2' and settings['image_size'] != config.vision.image_size:
        print(f"note: pictures of {settings['image_size']} px on a position table of {config.vision.image_size} px: "
              f'transformers needs interpolate_pos_encoding=True to do the same')


def print_missing(settings):
    """Data sets and folders that a config names and that are not there."""
    paths = [Path(settings['data_dir']) / name / 'train.jsonl' for name in mixture_sets(settings['mixture'])]
    names = ('init_from',) if settings['init_from'] else ('vision_weights', 'language_weights', 'tokenizer')
    paths += [Path(settings[name]) for name in names if settings[name]]
    missing = [path for path in paths if not path.exists()]
    for path in missing:
        print(f'missing: {path}')
    if not missing:
        print('nothing is missing')


# --------------------------------------------------------------------------------------------------
# Commands

def main():
    """python model.py: parameters, and memory of the stages or of a config."""
    settings = configure(train_settings())
    model = planned_model(settings)
    print('\n'.join(part_table(model)))
    total = count(model.parameters())
    print(f"{'all':<12}{total:>16,}          {layout(model.config) or 'no'} layout in transformers")
    # The rows a GPU and tokens a row of config/stage1.py, stage2.py and stage3.py
    stages = {'stage 1': (8, 4096), 'stage 2': (8, 4096), 'stage 3': (1, 36864)}
    if len(sys.argv) > 1:
        stages = {'this config': (settings['batch_size'], settings['seq_len'])}
    amp = torch.float32 if settings['dtype'] == 'float32' else torch.bfloat16
    for title, recompute, compiled in (('nothing recomputed', 0, False), ('nothing recomputed, compile', 0, True),
                                       ('every block recomputed', 1, False)):
        print(f'\nGB a device with full rows, {title}')
        for name, (rows, seq_len) in stages.items():
            patches = full_row_patches({**settings, 'seq_len': seq_len})
            memory = memory_estimate(model, rows, seq_len, recompute, amp, patches, compiled=compiled)
            uses = '  '.join(f'{use} {n / 1e9:.1f}' for use, n in memory.items())
            print(f'{name:<12}{rows:>3} x {seq_len:<7,}{uses}')
            print(f"{'':<12}on a GPU of 80 GB: {fits(memory['total'], 80e9)}")


def main_devices():
    """python parallel.py: memory of each device by the number of devices, and one row shared by several."""
    settings = configure(train_settings())
    model = planned_model(settings)
    print_devices(model, settings)
    print_shared_row(model, settings)


def print_devices(model, settings):
    rows, seq_len, recompute = (settings[name] for name in ('batch_size', 'seq_len', 'recompute'))
    patches = full_row_patches(settings)

    def need(devices, cp):
        return memory_estimate(model, rows, seq_len, recompute, patches=patches, shards=devices, cp=cp)
    alone = need(1, 1)
    print(f"GB on each device for {rows} rows of {seq_len:,} tokens, recompute = {recompute}; with ddp "
          f"{alone['total'] / 1e9:.1f}, with fsdp:\n")
    head = [*alone, 'cp = 2', 'cp = 4', 'cp = 8']
    print('devices  ' + '  '.join(head))
    for devices in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        cells = list(need(devices, 1).values())
        cells += [need(devices, cp)['total'] for cp in (2, 4, 8) if cp <= devices]
        columns = [f'{cell / 1e9:{len(name)}.1f}' for name, cell in zip(head, cells)]
        print(f'{devices:>7}  ' + '  '.join(columns))


def print_shared_row(model, settings):
    t, seq_len = model.config.language, settings['seq_len']
    print(f"\nOne row shared by cp devices that hold the weights together. MB: what each sends in a layer's forward pass, "
          f"and again in its backward pass\n\n{'row':>9}{'cp':>4}{'tokens each':>13}{'GB each':>9}{'MB':>7}")
    for length in (seq_len, 4 * seq_len):
        for cp in (1, 2, 4, 8, 16):
            if t.num_heads % cp:
                continue
            kv_heads = t.num_kv_heads * cp // math.gcd(t.num_kv_heads, cp)       # repeated until cp divides them
            # Queries, results, keys and values of a rank's tokens, in two bytes, all but the share
            # that it keeps
            sent = (2 * t.num_heads + 2 * kv_heads) * t.head_dim * 2 * length / cp * (cp - 1) / cp
            patches = full_row_patches(settings) * length // seq_len
            memory = memory_estimate(model, 1, length, settings['recompute'], patches=patches, shards=cp, cp=cp)
            print(f"{length:>9,}{cp:>4}{length // cp:>13,}{memory['total'] / 1e9:>9.1f}{sent / 1e6:>7.0f}")
