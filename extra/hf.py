"""Checkpoint folders in Hugging Face layouts: config.json, tensor names, processor files, reading and writing. Never pickle.
"""
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import UserError
from data import Processor, processor_settings
from model import (MOLMO2_VISUAL_IDS, PIXEL_STATS, VLM, Config, LanguageConfig, VisionConfig, held,
                   make_config, read_json, whole)


# ---------------------------------------------------------------------------------------------------------------------
# The model

# A tensor's name on disk -> ours. One list serves CLIP, SigLIP and Qwen3 repositories and every spelling of llava's.
RULES = [
    (r'^(model\.)?vision_tower\.(vision_model\.)?', 'vision_tower.'),
    (r'^vision_model\.', 'vision_tower.'),
    (r'^(model\.)?language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'language_model.'),
    (r'^model\.multi_modal_projector\.', 'multi_modal_projector.'),
    (r'^model\.(?=embed_tokens|layers|norm)', 'language_model.'),
]


# Tensors that a checkpoint may hold and a VLM has no use for (CLIP's text side, pooling heads, llava-next's newline)
UNUSED = re.compile(r'position_ids$|^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$|image_newline$'
                    r'|^vision_tower\.(post_layernorm|head)\.|rotary_emb')


# ours -> the published Molmo2 spelling; the substitutions are applied in this order
MOLMO2_RULES = [
    (r'^language_model\.norm', 'model.transformer.ln_f'),
    (r'^language_model\.layers', 'model.transformer.blocks'),
    (r'(blocks.*)\.input_layernorm', r'\1.attn_norm'),
    (r'(blocks.*)\.post_attention_layernorm', r'\1.ff_norm'),
    (r'(blocks.*)\.o_proj', r'\1.attn_out'),
    (r'(blocks.*)\.down_proj', r'\1.ff_out'),
    (r'^vision_tower\.encoder\.layers', 'model.vision_backbone.image_vit.transformer.resblocks'),
    (r'^vision_tower\.embeddings\.position_embedding\.weight', 'model.vision_backbone.image_vit.positional_embedding'),
    (r'^vision_tower\.embeddings', 'model.vision_backbone.image_vit'),
    (r'(resblocks.*)\.self_attn\.(.)\w*_proj', r'\1.attention.w\2'),
    (r'(resblocks.*)\.layer_norm1', r'\1.attention_norm'),
    (r'(resblocks.*)\.layer_norm2', r'\1.ffn_norm'),
    (r'(resblocks.*)\.mlp\.fc', r'\1.feed_forward.w'),
    (r'^multi_modal_projector', 'model.vision_backbone'),
    (r'image_pooling_2d\.(.)_proj', r'image_pooling_2d.w\1'),
    (r'image_projector\.gate_proj', 'image_projector.w1'),
    (r'image_projector\.down_proj', 'image_projector.w2'),
    (r'image_projector\.up_proj', 'image_projector.w3'),
]


def rename(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def molmo2_names(names):
    """The published Molmo2 tensors: disk name -> our parameters, stacked along the rows in that order."""
    disk = {}
    for name in names:
        if name == 'language_model.embed_tokens.weight':   # one table of ours is two on disk
            disk['model.transformer.wte.embedding'] = disk['model.transformer.wte.new_embedding'] = [name]
        elif name.startswith('language_model') and (m := re.search(r'(.*self_attn)\.[qkv]_proj', name)):
            disk[rename(m[1], MOLMO2_RULES) + '.att_proj.weight'] = [f'{m[1]}.{x}_proj.weight' for x in 'qkv']
        elif name.startswith('language_model') and (m := re.search(r'(.*mlp)\.(up|gate)_proj', name)):
            disk[rename(m[1], MOLMO2_RULES) + '.ff_proj.weight'] = [f'{m[1]}.{x}_proj.weight' for x in ('up', 'gate')]
        else:
            disk[rename(name, MOLMO2_RULES)] = [name]
    return disk


def weight_files(folder):
    """The safetensors files of a folder: one, or those its index names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    index = folder / 'model.safetensors.index.json'
    if not (folder / 'model.safetensors').exists() and index.exists():
        names = sorted(set(read_json(index)['weight_map'].values()))
        if bad := [n for n in names if Path(n).name != n]:
            raise UserError(f"{index} names {bad[0]}, a file outside its folder")
    else:
        names = ['model.safetensors']
    if lost := [n for n in names if not (folder / n).exists()]:
        raise UserError(f"{folder} lacks {', '.join(lost)}; fetch the safetensors files of the model")
    return [folder / n for n in names]


def load_weights(model, folder, only=''):
    """Reads the tensors of a folder into `model`, one at a time: into the parameters whose names start with `only`.

    Every such parameter must be filled and every tensor used, or UserError lists names and shapes.
    """
    parameters = {n: p for n, p in model.named_parameters() if n.startswith(only)}
    filled = dict.fromkeys(parameters, 0)                  # rows read so far
    molmo2 = molmo2_names(parameters)
    linear_2 = model.config.connector == 'linear' and 'multi_modal_projector.linear_1.weight' in parameters
    problems = []
    for file in weight_files(folder):
        try:
            with safe_open(file, 'pt') as f:
                for key in f.keys():
                    name = rename(key, RULES)
                    depth = re.match(r'vision_tower\.encoder\.layers\.(\d+)\.', name)
                    if (UNUSED.search(name) or depth and int(depth[1]) >= model.config.vision.num_layers
                            or name == 'lm_head.weight' and model.lm_head is None):
                        continue
                    if linear_2 and name.startswith('multi_modal_projector.linear_2.'):
                        check_identity(f.get_tensor(key), f"{file}: {key}")
                        continue
                    names = molmo2.get(key, [name])
                    if names[0] not in parameters:
                        problems.append(f"{key} {f.get_slice(key).get_shape()} has no place in this model")
                        continue
                    problems += fill([(n, parameters[n]) for n in names], key, f.get_slice(key), filled)
        except SafetensorError as e:
            raise UserError(f"{file} is not a whole safetensors file ({e}); fetch it again") from None
    problems += [f"{n} {list(p.shape)} is missing" for n, p in parameters.items() if filled[n] != len(p)
                 and not any(n in problem for problem in problems)]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ''
        raise UserError(f"{folder} does not fit this model:\n  " + '\n  '.join(problems[:12]) + more)


@torch.no_grad()
def fill(targets, key, stored, filled):
    """Copies the tensor `stored` (a slice of a safetensors file) into the (name, parameter) targets, one after the
    other along the rows; only those that this process holds are read. Returns what went wrong."""
    shape, width = stored.get_shape(), targets[0][1].shape[1:]
    names, rows = ' + '.join(n for n, _ in targets), sum(len(p) for _, p in targets)
    part_of_table = '.wte.' in key                         # Molmo2's table comes in two parts of any size
    fits = shape[0] <= rows if part_of_table else shape[0] == rows
    if not fits or math.prod(shape[1:]) != math.prod(width) or len(shape) != 4 and tuple(shape[1:]) != tuple(width):
        return [f"{key} is {shape}, {names} wants {[rows, *width]}"]
    start = rows - shape[0] if 'new_embedding' in key else 0                  # where in the targets its row 0 belongs
    for name, p in targets:
        mine, first = held(p)
        low, high = max(first, start), min(first + len(mine), start + shape[0])
        if low < high:
            x = stored[low - start:high - start]
            if x.ndim == 4:                                # a convolution over patches: [D, 3, p, p] -> [D, p p 3]
                x = x.permute(0, 2, 3, 1).flatten(1)
            mine[low - first:high - first] = x.to(mine.dtype)
        filled[name] += min(len(p), start + shape[0]) - max(0, start)
        start -= len(p)
    return []


def check_identity(tensor, where):
    expected = torch.eye(*tensor.shape) if tensor.ndim == 2 else torch.zeros_like(tensor)
    if not torch.equal(tensor.float(), expected.float()):
        raise UserError(f"{where} is not the identity: this checkpoint has a connector of two layers, "
                        f"which connector = 'linear' would lose; set connector = 'mlp'")


def layout(config):
    """Which native transformers architecture expresses this model: llava, llava_next_video, molmo2, or None."""
    if config.recipe == config.connector == 'molmo2' and config.vision.style == 'siglip':
        return 'molmo2'
    if config.recipe == 'nano' and config.connector != 'molmo2':
        return 'llava' if config.pooling == 1 else 'llava_next_video'
    return None


def to_hf(config):
    """config.json: what transformers needs, and `nanomolmo2` with our own Config."""
    v, t = config.vision, config.language
    vision = dict(hidden_size=v.hidden_size, intermediate_size=v.intermediate_size, num_hidden_layers=v.num_layers,
                  num_attention_heads=v.num_heads, image_size=v.image_size, patch_size=v.patch_size,
                  layer_norm_eps=v.layer_norm_eps, hidden_act=v.activation)
    # The flat rope_theta is read by transformers 4.57 and 5; rope_parameters alone gives 10000 in the former.
    text = dict(model_type='qwen3', vocab_size=t.vocab_size, hidden_size=t.hidden_size,
                intermediate_size=t.intermediate_size, num_hidden_layers=t.num_layers, num_attention_heads=t.num_heads,
                num_key_value_heads=t.num_kv_heads, head_dim=t.head_dim, hidden_act='silu', rope_theta=t.rope_theta,
                rms_norm_eps=t.rms_norm_eps, tie_word_embeddings=t.tie_word_embeddings, attention_bias=False,
                max_position_embeddings=t.max_position_embeddings, eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id)
    kind = layout(config)
    extra = {'nanomolmo2': asdict(config)}
    common = dict(model_type=kind or 'nanomolmo2', text_config=text, dtype='float32',
                  tie_word_embeddings=t.tie_word_embeddings, eos_token_id=config.eos_token_id,
                  pad_token_id=config.pad_token_id)
    if kind == 'molmo2':
        square = [v.image_size, v.image_size]
        vision.update(model_type='molmo2_vision', image_size=square, head_dim=v.hidden_size // v.num_heads,
                      num_key_value_heads=v.num_heads)
        text.update(model_type='molmo2_text', additional_vocab_size=t.extra_vocab_size)
        adapter = dict(vision_feature_layer=list(v.feature_layers), hidden_size=v.hidden_size,
                       num_attention_heads=v.num_heads, num_key_value_heads=v.num_heads, hidden_act='silu',
                       head_dim=v.hidden_size // v.num_heads, intermediate_size=config.connector_size,
                       text_hidden_size=t.hidden_size)
        ids = dict(zip(('image_start_token_id', 'image_end_token_id', 'image_patch_id', 'image_col_id',
                        'low_res_image_start_token_id', 'image_low_res_id', 'frame_start_token_id',
                        'frame_end_token_id'), config.visual_token_ids))
        common['tie_word_embeddings'] = text['tie_word_embeddings'] = False       # the file always holds the head
        return dict(architectures=['Molmo2ForConditionalGeneration'], **common, vision_config=vision,
                    adapter_config=adapter, **ids, **extra)
    siglip = v.style == 'siglip'
    vision['model_type'] = 'siglip_vision_model' if siglip else 'clip_vision_model'
    if siglip:
        vision['vision_use_head'] = False
    features = [i - v.num_layers for i in v.feature_layers]
    image_seq = (v.image_size // v.patch_size) ** 2
    llava = dict(vision_config=vision, image_token_index=config.image_token_id, image_seq_length=image_seq,
                 projector_hidden_act='gelu' if config.connector == 'mlp' else 'linear', multimodal_projector_bias=True,
                 vision_feature_layer=features if len(features) > 1 else features[0],
                 vision_feature_select_strategy='full' if siglip else 'default')
    if kind == 'llava_next_video':         # a still picture is a clip of one frame: only clips are pooled there
        llava.update(video_token_index=config.video_token_id, spatial_pool_mode='average',
                     spatial_pool_stride=config.pooling, video_seq_length=image_seq // config.pooling ** 2)
    name = 'LlavaNextVideoForConditionalGeneration' if kind == 'llava_next_video' else 'LlavaForConditionalGeneration'
    return dict(architectures=[name] if kind else [], **common, **llava, **extra)


def from_hf(hf, where='config.json'):
    """A Config from the dict of a config.json: ours, llava, llava_next_video, or molmo2 (published or re-saved)."""
    if 'nanomolmo2' in hf:
        return Config(**hf['nanomolmo2'])
    kind = hf.get('model_type')
    if kind not in ('llava', 'llava_next_video', 'molmo2'):
        raise UserError(f"{where}: model_type '{kind}' is not llava, llava_next_video or molmo2")
    try:
        return _from_molmo2(hf) if kind == 'molmo2' else _from_llava(hf, where)
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} lacks the key {e}") from None


def _language(text, hf, **extra):
    theta = text.get('rope_theta') or text['rope_parameters']['rope_theta']
    return LanguageConfig(text['hidden_size'], text['intermediate_size'], text['num_hidden_layers'],
                          text['num_attention_heads'], text['num_key_value_heads'], text['head_dim'],
                          text['vocab_size'], rope_theta=theta, rms_norm_eps=text.get('rms_norm_eps', 1e-6),
                          tie_word_embeddings=hf.get('tie_word_embeddings', False) or
                          text.get('tie_word_embeddings', False),
                          max_position_embeddings=text.get('max_position_embeddings', 40960), **extra)


def _from_llava(hf, where):
    text, v = hf['text_config'], hf['vision_config']
    if text.get('model_type') != 'qwen3':
        raise UserError(f"{where}: the language model is '{text.get('model_type')}'; only qwen3 is built here")
    siglip = v.get('model_type') == 'siglip_vision_model'
    if not siglip and v.get('model_type') != 'clip_vision_model':
        raise UserError(f"{where}: the vision tower is '{v.get('model_type')}', not CLIP or SigLIP")
    act = hf.get('projector_hidden_act', 'gelu')
    if act not in ('gelu', 'linear') or not hf.get('multimodal_projector_bias', True):
        raise UserError(f"{where}: a connector with activation '{act}' or without bias is not built here")
    features = hf.get('vision_feature_layer', -2)
    features = [features] if isinstance(features, int) else features
    layers = v.get('num_hidden_layers', 12)                # transformers' hidden_states[i] is the output of block i - 1
    vision = VisionConfig(v.get('hidden_size', 768), v.get('intermediate_size', 3072), layers,
                          v.get('num_attention_heads', 12), v.get('image_size', 224), v.get('patch_size', 32),
                          'siglip' if siglip else 'clip',
                          v.get('hidden_act', 'gelu_pytorch_tanh' if siglip else 'quick_gelu'),
                          v.get('layer_norm_eps', 1e-6 if siglip else 1e-5),
                          tuple(i if i < 0 else i - 1 - layers for i in features))
    return Config(vision, _language(text, hf), connector='mlp' if act == 'gelu' else 'linear',
                  pooling=hf.get('spatial_pool_stride', 2) if hf['model_type'] == 'llava_next_video' else 1,
                  image_token_id=hf.get('image_token_index', hf.get('image_token_id')),
                  video_token_id=hf.get('video_token_index', hf.get('video_token_id', -1)),
                  eos_token_id=text.get('eos_token_id', 151645), pad_token_id=text.get('pad_token_id') or 151643)


def _from_molmo2(hf):
    text, adapter = hf['text_config'], hf['adapter_config']
    v = hf.get('vision_config') or hf['vit_config']        # vit_config: the spelling of the released checkpoints
    if text.get('qk_norm_type', 'qwen3') != 'qwen3' or text.get('norm_after'):
        raise UserError("Molmo2-O (Olmo 3 decoder) is not built here; Molmo2-4B and 8B are")
    image_size = v.get('image_size') or v.get('image_default_input_size') or [378]
    vision = VisionConfig(v['hidden_size'], v['intermediate_size'], v['num_hidden_layers'], v['num_attention_heads'],
                          image_size[0], v.get('patch_size') or v.get('image_patch_size', 14), 'siglip',
                          v.get('hidden_act', 'gelu_pytorch_tanh'), v.get('layer_norm_eps', 1e-6),
                          tuple(adapter.get('vision_feature_layer') or adapter['vit_layers']))
    ids = [hf.get(k, d) for k, d in zip(
        ('image_start_token_id', 'image_end_token_id', 'image_patch_id', 'image_col_id', 'low_res_image_start_token_id',
         'image_low_res_id', 'frame_start_token_id', 'frame_end_token_id'), MOLMO2_VISUAL_IDS)]
    return Config(vision, _language(text, hf, extra_vocab_size=text.get('additional_vocab_size', 128)),
                  recipe='molmo2', connector='molmo2', connector_size=adapter['intermediate_size'],
                  image_token_id=ids[2], video_token_id=ids[2], visual_token_ids=tuple(ids))


def disk_tensors(model):
    """Yields (name, tensor) of our parameters as transformers reads them, one at a time."""
    config, parameters = model.config, dict(model.named_parameters())
    if layout(config) == 'molmo2':
        rows = config.language.vocab_size
        for disk, names in molmo2_names(parameters).items():
            x = torch.cat([whole(parameters[n]) for n in names])
            yield disk, x[:rows] if disk.endswith('wte.embedding') else x[rows:] if 'new_embedding' in disk else x
            if disk.endswith('wte.embedding') and model.lm_head is None:       # the published layout always has one
                yield 'lm_head.weight', x[:rows]
        return
    p = config.vision.patch_size
    for name, parameter in parameters.items():
        x = whole(parameter)
        if name.endswith('patch_embedding.weight'):
            x = x.view(-1, p, p, 3).permute(0, 3, 1, 2)                                          # back to [D, 3, p, p]
        name = re.sub(r'^vision_tower\.', 'vision_tower.vision_model.', name)
        name = re.sub(r'^language_model\.', 'language_model.model.', name)
        yield re.sub(r'^lm_head\.', 'language_model.lm_head.', name), x
    # What those architectures have and we do not: a second linear layer, a norm of the class token, a newline
    width = config.language.hidden_size
    if config.connector == 'linear':
        yield 'multi_modal_projector.linear_2.weight', torch.eye(width)
        yield 'multi_modal_projector.linear_2.bias', torch.zeros(width)
    yield 'vision_tower.vision_model.post_layernorm.weight', torch.ones(config.vision.hidden_size)
    yield 'vision_tower.vision_model.post_layernorm.bias', torch.zeros(config.vision.hidden_size)
    if layout(config) == 'llava_next_video':
        yield 'image_newline', torch.zeros(width)


MAX_FILE = 5 * 10 ** 9                     # bytes of one safetensors file, as transformers writes them


def write_model(config, tensors, folder):
    """Writes config.json, generation_config.json and the tensors {disk name: on the CPU} as one safetensors file, or as
    several and their index; data.py adds tokenizer and processor."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(to_hf(config), indent=2))
    (folder / 'generation_config.json').write_text(json.dumps(
        {'eos_token_id': config.eos_token_id, 'pad_token_id': config.pad_token_id}, indent=2))
    files, room = [{}], MAX_FILE
    for name, x in tensors.items():
        if x.nbytes > room and files[-1]:
            files.append({})
            room = MAX_FILE
        files[-1][name] = x
        room -= x.nbytes
    names = ['model.safetensors'] if len(files) == 1 else [
        f'model-{i:05d}-of-{len(files):05d}.safetensors' for i in range(1, len(files) + 1)]
    for name, part in zip(names, files):
        save_file(part, folder / name, metadata={'format': 'pt'})
    if len(files) > 1:
        (folder / 'model.safetensors.index.json').write_text(json.dumps({
            'metadata': {'total_size': sum(x.nbytes for x in tensors.values())},
            'weight_map': {key: name for name, part in zip(names, files) for key in part}}, indent=2))


def copy_tensors(model, keep=True):
    """The tensors that `write_model` writes, copied to the CPU. All ranks of a sharded model go through it, those that
    `keep` nothing too: each holds a part."""
    return {name: x.to('cpu', copy=True).contiguous() for name, x in disk_tensors(model) if keep}


def save_model(model, folder):
    write_model(model.config, copy_tensors(model), folder)


def newest(path):
    """A checkpoint folder itself, or of a run's folder the checkpoint that its `latest` names."""
    latest = Path(path) / 'latest'
    return Path(path) / latest.read_text().strip() if latest.is_file() else Path(path)


def load_model(folder):
    """The VLM of a checkpoint folder: ours, llava, llava_next_video or molmo2. float32, on the CPU."""
    path = Path(folder) / 'config.json'
    with torch.device('meta'):
        model = VLM(from_hf(read_json(path), path))
    model.to_empty(device='cpu')
    model.set_buffers()
    load_weights(model, folder)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The processor

def save_processor(processor, folder):
    """Tokenizer and processor files in the layout transformers reads; our own settings in processor_config.json."""
    folder, size = Path(folder), {'height': processor.image_size, 'width': processor.image_size}
    for name, content in processor.tokenizer_files.items():
        (folder / name).write_bytes(content)
    mean, std = (list(x) for x in _pixel_stats(folder))
    image = {'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3, 'do_rescale': True,
             'do_center_crop': processor.resize == 'crop', 'crop_size': size, 'do_normalize': True,
             'do_convert_rgb': True, 'image_mean': mean, 'image_std': std,
             'size': {'shortest_edge': processor.image_size} if processor.resize == 'crop' else size}
    ours = {k: getattr(processor, k) for k in (
        'image_size', 'patch_size', 'pooling', 'video_size', 'video_pooling', 'max_frames', 'fps', 'resize',
        'image_token', 'point_format', 'point_digits')}
    files = {'processor_class': 'LlavaProcessor', 'image_token': processor.image_token,
                 'patch_size': processor.patch_size, 'num_additional_image_tokens': 1,
                 'vision_feature_select_strategy': 'default', 'nanomolmo2': ours}
    for name, content in (('preprocessor_config.json', image), ('processor_config.json', files)):
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)


def saved_settings(folder, config):
    """The settings that a checkpoint folder was trained with: ours, or a llava folder of others as its processor
    files say."""
    path = Path(folder) / 'processor_config.json'
    theirs = read_json(path) if path.exists() else {}
    settings = theirs.get('nanomolmo2')
    if settings is None:
        image = Path(folder) / 'preprocessor_config.json'
        image = read_json(image) if image.exists() else theirs.get('image_processor', {})
        size = image.get('crop_size' if image.get('do_center_crop', True) else 'size', config.vision.image_size)
        size = size.get('height', size.get('shortest_edge')) if isinstance(size, dict) else size
        settings = dict(image_size=size, patch_size=config.vision.patch_size, pooling=config.pooling,
                        resize='crop' if image.get('do_center_crop', True) else 'stretch',
                        image_token=theirs.get('image_token', '<|image_pad|>'))
    return {'video_size': settings['image_size'], 'video_pooling': settings['pooling'],
            'point_format': Processor.point_format, 'point_digits': Processor.point_digits, **settings}


def load_processor(folder, config, **overrides):
    """The processor of a checkpoint folder."""
    if is_released(folder):
        from extra.molmo2 import Molmo2Processor
        return Molmo2Processor(folder, **overrides)
    return Processor(folder, **{**saved_settings(folder, config), **overrides})


def is_released(folder):
    """Is a folder a Molmo2 with processor files that are not ours?"""
    path = Path(folder) / 'processor_config.json'
    return path.exists() and read_json(path).get('processor_class') == 'Molmo2Processor'


def load_checkpoint(path, **settings):
    """(model, processor, folder) of a checkpoint or of a run's newest one. Examples may be as long as the decoder counts."""
    folder = newest(path)
    model = load_model(folder)
    settings = {'seq_len': model.config.language.max_position_embeddings, **settings}
    return model, load_processor(folder, model.config, **settings), folder


def _pixel_stats(folder):
    return PIXEL_STATS[from_hf(read_json(Path(folder) / 'config.json')).vision.style]


# Media first, then ChatML, as `Processor` lays them out: the template for transformers' apply_chat_template
CHAT_TEMPLATE = """\
{%- set images = namespace(n=0, seen=0) -%}
{%- for m in messages -%}{%- if m.content is not string -%}{%- for c in m.content -%}
{%- if c.type == 'image' or c.type == 'video' -%}{%- set images.n = images.n + 1 -%}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}{%- if m.content is not string -%}{%- for c in m.content -%}
{%- if c.type == 'image' or c.type == 'video' -%}{%- set images.seen = images.seen + 1 -%}
{%- if images.n > 1 -%}{{ 'Image ' ~ images.seen }}{%- endif -%}
{{ '<|vision_start|><|' ~ c.type ~ '_pad|><|vision_end|>' }}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for c in m.content -%}{%- if c.type == 'text' -%}{{ c.text }}{%- endif -%}{%- endfor -%}{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n<|im_start|>assistant\\n' }}{%- endif -%}
"""


def make_processor(settings):
    """(Processor, model Config) of a config, whose checkpoint need not be trained yet."""
    source = settings['init_from'] and newest(settings['init_from'])
    config = (from_hf(read_json(source / 'config.json')) if source else
              make_config(settings['vision'], settings['language'], recipe=settings['recipe']))
    folder = settings['tokenizer'] or source or settings['language_weights']
    if not folder:
        raise UserError("give a config, or --tokenizer=folder with tokenizer.json")
    if source and is_released(source):
        from extra.molmo2 import Molmo2Processor
        return Molmo2Processor(source, **processor_settings(settings)), config
    return Processor(folder, patch_size=config.vision.patch_size, **processor_settings(settings)), config
