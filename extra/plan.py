"""What it costs and whether it fits: parameters, memory, mixtures.
"""
import math
import sys
from pathlib import Path

import torch

from configurator import UserError
from data import Dataset, mixture_rates, mixture_sets
from extra.hf import from_hf, layout, newest
from model import VLM, make_config, pick_dtype, read_json


def saved_bytes(module, *inputs):
    """Bytes that autograd keeps for the backward pass of `module`, its own weights not counted."""
    own, kept = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.numel() * t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(*inputs)                              # `out` keeps the graph, and so the storages, alive
    return sum(size for storage, size in kept.items() if storage not in own) + 0 * out.numel()


def kept_by_decoder_block(config, size, residual, compiled):
    """Bytes a token that autograd keeps of one block on CUDA. Numbers take `size` bytes in the products' type and
    `residual` in the stream that blocks add to, which has the type of the table of embeddings.

    Eager, each operation keeps what its gradient needs. Compiled, silu(gate) and the second norm's input are made again
    from what is kept. Leaves out one number a head for each norm and for the softmax (< 1%). tests/test_cuda.py counts.
    """
    width, inside = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width                        # read by q_proj, k_proj, v_proj and by gate_proj, up_proj
    head_norms = size * (queries + keys)                   # queries and keys before them
    attention = size * (queries + 2 * keys + queries)      # queries, keys, values and the result, which o_proj reads too
    mlp = 4 * size * inside                                # gate, up, silu(gate), and its product with up for down_proj
    if compiled:
        norm_inputs = residual * width + size * width      # the block's input, and what attention adds to it
        mlp = 3 * size * inside
    return norm_inputs + norm_results + head_norms + attention + mlp


def kept_by_vision_block(config, size, residual):
    """As `kept_by_decoder_block`, a patch of a trained tower. Compiled blocks keep as much, or less."""
    width, inside = config.hidden_size, config.intermediate_size
    norm_inputs = 2 * residual * width
    norm_results = 2 * size * width
    attention = 5 * size * width                           # queries, keys, values, the result, and it again in one piece
    mlp = 2 * size * inside                                # what fc1 gave, and what fc2 reads
    if config.activation == 'quick_gelu':
        mlp += size * inside                               # its sigmoid
    return norm_inputs + norm_results + attention + mlp


def part_table(model):
    """Lines of a table: parameters of each part, their share, and which of them are trained."""
    lines, every = [f"{'part':<12}{'parameters':>16}{'share':>8}"], sum(p.numel() for p in model.parameters())
    for part, parameters in model.parts().items():
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{part:<12}{total:>16,}{total / every:>8.1%}  " + (
            'frozen' if not trained else 'trained' if trained == total else f'{trained:,} trained'))
    return lines


def memory_estimate(model, rows, seq_len, recompute=0, amp=torch.bfloat16, patches=0, shards=1, cp=1, compiled=False):
    """Bytes by use on each CUDA device for a micro-batch of full rows: {'weights': ..., ..., 'total': ...}. `patches` are
    those of all the pictures and frames of a row; 0: one picture's. `shards` devices hold the weights together
    (parallel.py), `cp` share their rows.

    Weights, gradients and two moments in the weights' own type; what autograd keeps of each block; the autocast copies of
    trained weights, of sharded ones two blocks at a time and all that is in no block; the features of all patches; one
    chunk of logits and the gradient of the output's weights. Leaves out what a single operation needs in passing and the
    allocator's slack (together 5 to 15%), and what `memory_budget` saves.
    """
    c, size = model.config, torch.finfo(amp).bits // 8
    count = lambda parameters: sum(p.numel() for p in parameters)
    trained, every = count(p for p in model.parameters() if p.requires_grad), count(model.parameters())
    master = model.language_model.embed_tokens.weight.element_size()          # 4 bytes, or 2 with a narrow master_dtype
    tower_trained = model.vision_tower.embeddings.patch_embedding.weight.requires_grad
    alone = 0 if tower_trained else count(model.vision_tower.parameters())    # frozen, it stays whole on each device
    out = {'weights': master * (alone + (every - alone) / shards), 'gradients': master * trained / shards,
           'moments': 2 * master * trained / shards}
    out['weight copies'] = size * trained if amp != torch.float32 else 0
    if shards > 1:
        layers = count(model.language_model.layers.parameters())
        outside = every - alone - layers - (count(model.vision_tower.encoder.parameters()) if tower_trained else 0)
        out['weight copies'] = 2 * size * layers / c.language.num_layers + master * outside
    patches = rows * (patches or (c.vision.image_size // c.vision.patch_size) ** 2)
    out['features'] = master * patches * c.vision.feature_size
    tokens = rows * seq_len / cp

    def kept(a_block, width, layers):
        """Bytes a token of all layers. A recomputed block keeps its input, and one at a time is computed again."""
        again = -(-layers // recompute) if recompute else 0
        return a_block * (layers - again + bool(again)) + master * width * again

    block = kept_by_decoder_block(c.language, size, master, compiled)
    out['activations'] = tokens * kept(block, c.language.hidden_size, c.language.num_layers)
    if tower_trained:
        block = kept_by_vision_block(c.vision, size, master)
        out['activations'] += patches / cp * kept(block, c.vision.hidden_size, c.vision.num_layers)
    out['logits'] = c.language.vocab_size * (min(model.chunk, tokens) * (4 + size) + 2 * 4 * c.language.hidden_size)
    out['total'] = sum(out.values())
    return {use: int(n) for use, n in out.items()}


SLACK = 1.1                        # of a memory_estimate: what operations need in passing, and the allocator's gaps


def fits(total, memory):
    """Says whether an estimated total fits a device with `memory` bytes."""
    need = SLACK * total
    verdict = 'fits' if need <= memory else ('does not fit: halve batch_size and double accumulation, '
                                             'or set recompute = 1')
    return f'{total / 1e9:.1f} GB and a tenth for slack in {memory / 1e9:.0f} GB: {verdict}'


def planned_model(settings, checkpoint=None):
    """The VLM that train.py builds with these settings, without weights (meta device). An init_from that is not there
    yet is taken to be of the settings' sizes."""
    source = checkpoint or settings['init_from'] and newest(settings['init_from'])
    with torch.device('meta'):
        model = VLM(from_hf(read_json(source / 'config.json')) if source and source.is_dir() else make_config(
            **{k: settings[k] for k in ('recipe', 'vision', 'language', 'connector', 'pooling')}))
    model.set_trained(settings)
    return model.to(pick_dtype(settings['master_dtype'], torch.device('cpu')))


def full_row_patches(settings):
    """Patches behind a row of nothing but visual tokens, for `memory_estimate`; 0 where a row is one example."""
    return settings['seq_len'] * max(settings['pooling'], settings['video_pooling']) ** 2 if settings['packing'] else 0


def main():
    from configurator import configure, train_settings
    given = configure(train_settings())
    model = planned_model(given)
    print('\n'.join(part_table(model)))
    print(f"{'all':<12}{sum(p.numel() for p in model.parameters()):>16,}          {layout(model.config) or 'no'} layout "
          f"in transformers")
    # The rows a GPU and tokens a row of config/stage1.py, stage2.py and stage3.py
    stages = {'stage 1': (8, 4096), 'stage 2': (8, 4096), 'stage 3': (1, 36864)}
    if len(sys.argv) > 1:
        stages = {'this config': (given['batch_size'], given['seq_len'])}
    amp = torch.float32 if given['dtype'] == 'float32' else torch.bfloat16
    for title, recompute, compiled in (('nothing recomputed', 0, False), ('nothing recomputed, compile', 0, True),
                                       ('every block recomputed', 1, False)):
        print(f'\nGB a device with full rows, {title}')
        for name, (rows, seq_len) in stages.items():
            patches = full_row_patches({**given, 'seq_len': seq_len})
            memory = memory_estimate(model, rows, seq_len, recompute, amp, patches, compiled=compiled)
            print(f'{name:<12}{rows:>3} x {seq_len:<7,}' + '  '.join(f'{k} {v / 1e9:.1f}' for k, v in memory.items()))
            print(f"{'':<12}on a GPU of 80 GB: {fits(memory['total'], 80e9)}")


def mixture_table(mixture, data_dir, draws):
    """A line per dataset: rows, square root, share of the draws, draws of the whole run, epochs. A dataset that is not
    there yet counts with the `size` that the config gives it."""
    sets, sizes, missing = mixture_sets(mixture), {}, set()
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
        if len(names) > 1:
            lines.append(f"{key:<53}{sum(rates[n] for n in names):>9.2%}")
        for name in names:
            used = min(sizes[name], sets[name].get('cap') or sizes[name])
            lines.append(f"{'  ' * (len(names) > 1) + name + ' *' * (name in missing):<34}{used:>11,}{used ** .5:>8.0f}"
                         f"{rates[name]:>9.2%}{draws * rates[name]:>13,.0f}"
                         + (f'{draws * rates[name] / used:>9.2f}' if used else f"{'?':>9}"))
    return lines + ['* not prepared yet; rows as the config expects'] * bool(missing)


def main_devices():
    """Does it fit? Memory of a device by the number of devices."""
    from configurator import configure, train_settings
    settings = configure(train_settings())
    model, patches = planned_model(settings), full_row_patches(settings)
    rows, seq_len, recompute = (settings[k] for k in ('batch_size', 'seq_len', 'recompute'))
    need = lambda shards, cp: memory_estimate(model, rows, seq_len, recompute, patches=patches, shards=shards, cp=cp)
    print(f"GB on each device for {rows} rows of {seq_len:,} tokens, recompute = {recompute}; with ddp "
          f"{need(1, 1)['total'] / 1e9:.1f}, with fsdp:\n")
    head = [*need(1, 1), 'cp = 2', 'cp = 4', 'cp = 8']
    print('devices  ' + '  '.join(head))
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        row = [*need(n, 1).values(), *(need(n, cp)['total'] if cp <= n else None for cp in (2, 4, 8))]
        print(f'{n:>7}  ' + '  '.join(f'{b / 1e9:{len(name)}.1f}' for name, b in zip(head, row) if b is not None))

    t = model.config.language
    print(f"\nOne row shared by cp devices that hold the weights together. MB: what each sends in a layer's forward pass, "
          f"and again in its backward pass\n\n{'row':>9}{'cp':>4}{'tokens each':>13}{'GB each':>9}{'MB':>7}")
    for length in (seq_len, 4 * seq_len):
        for n in (n for n in (1, 2, 4, 8, 16) if not t.num_heads % n):
            kv_heads = t.num_kv_heads * n // math.gcd(t.num_kv_heads, n)           # repeated until n divides them
            sent = (2 * t.num_heads + 2 * kv_heads) * t.head_dim * 2 * length / n * (n - 1) / n
            memory = memory_estimate(model, 1, length, recompute, patches=patches * length // seq_len, shards=n, cp=n)
            print(f"{length:>9,}{n:>4}{length // n:>13,}{memory['total'] / 1e9:>9.1f}{sent / 1e6:>7.0f}")
