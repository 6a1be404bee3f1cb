"""Checkpoint folders as Hugging Face's transformers lays them out: reading and writing them.

A checkpoint is a folder that opens here and in transformers, without an export step between:

    config.json                      sizes of the model; our own Config under the key `nanomolmo2`
    model.safetensors                the weights, or several such files and an index that names them
    tokenizer.json, *_config.json    how text and pictures become the model's input

Three of transformers' architectures can express a model of ours (`layout` says which one):

    llava              CLIP or SigLIP, a linear or MLP connector, Qwen3; one visual token a patch
    llava_next_video   the same, with a mean over windows of patches
    molmo2             SigLIP, attention pooling and Qwen3, as the released Molmo2-4B and 8B

The file goes from reading to writing: config.json, tensor names, weights; then writing a model;
then the processor's files; then both together. Weights are only read from safetensors files, which
hold nothing but tensors, so opening a checkpoint of others never runs code of theirs. What a run
needs beside the model to go on training (optimizer, place in the data) is not in this file.
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
from model import (MOLMO2_VISUAL_IDS, PIXEL_STATS, VLM, Config, LanguageConfig, VisionConfig,
                   full_tensor, local_shard, make_config, read_json)

# --------------------------------------------------------------------------------------------------
# Reading config.json

# Keys of a molmo2 config.json that name its visual tokens, in the order of Config.visual_token_ids
MOLMO2_ID_KEYS = (
    'image_start_token_id',
    'image_end_token_id',
    'image_patch_id',
    'image_col_id',
    'low_res_image_start_token_id',
    'image_low_res_id',
    'frame_start_token_id',
    'frame_end_token_id',
)


def newest(path):
    """The checkpoint folder (a Path) that `path` means.

    A run's out_dir holds a file `latest` with the name of its newest checkpoint folder. Any other
    path is taken for a checkpoint folder itself, whether it exists or not.
    """
    path = Path(path)
    latest = path / 'latest'
    if latest.is_file():
        return path / latest.read_text().strip()
    return path


def layout(config):
    """The architecture of transformers that computes what this model computes.

    Returns 'llava', 'llava_next_video' or 'molmo2'; None if no architecture does. A model without
    one is saved with the tensor names of llava and opens only here.
    """
    if config.recipe == 'molmo2' and config.connector == 'molmo2':
        if config.vision.style == 'siglip':
            return 'molmo2'
    if config.recipe == 'nano' and config.connector != 'molmo2':
        if config.pooling == 1:
            return 'llava'
        return 'llava_next_video'
    return None


def read_config(folder):
    """The Config of a checkpoint folder, see `from_hf`."""
    path = Path(folder) / 'config.json'
    return from_hf(read_json(path), path)


def from_hf(hf, where='config.json'):
    """A Config from the dict of a config.json.

    The dict is one that `to_hf` wrote, or that of a llava, llava_next_video or molmo2 model of
    others: molmo2 as released or as transformers saves it again. `where` names the file in errors.
    Raises UserError for an architecture or an option that model.py does not have.
    """
    if 'nanomolmo2' in hf:
        return Config(**hf['nanomolmo2'])
    kind = hf.get('model_type')
    if kind not in ('llava', 'llava_next_video', 'molmo2'):
        raise UserError(f"{where}: model_type '{kind}' is not llava, llava_next_video or molmo2")
    try:
        if kind == 'molmo2':
            return _from_molmo2(hf)
        return _from_llava(hf, where)
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} lacks the key {e}") from None


def _from_llava(hf, where):
    text = hf['text_config']
    vision = hf['vision_config']
    if text.get('model_type') != 'qwen3':
        raise UserError(f"{where}: the language model is '{text.get('model_type')}'; "
                        f"only qwen3 is built here")

    # The two towers differ in what transformers assumes for keys that the file leaves out.
    if vision.get('model_type') == 'clip_vision_model':
        style = 'clip'
        default_activation = 'quick_gelu'
        default_eps = 1e-5
    elif vision.get('model_type') == 'siglip_vision_model':
        style = 'siglip'
        default_activation = 'gelu_pytorch_tanh'
        default_eps = 1e-6
    else:
        raise UserError(f"{where}: the vision tower is '{vision.get('model_type')}', "
                        f"not CLIP or SigLIP")

    # llava's connector always has two linear layers. With the activation 'linear' there is nothing
    # between them, so they are one layer, and `to_hf` writes our connector of one layer that way.
    activation = hf.get('projector_hidden_act', 'gelu')
    if activation not in ('gelu', 'linear') or not hf.get('multimodal_projector_bias', True):
        raise UserError(f"{where}: a connector with activation '{activation}' or without bias "
                        f"is not built here")
    connector = 'mlp' if activation == 'gelu' else 'linear'

    # A negative index counts blocks from the end, in transformers as in VisionConfig. A
    # non-negative one counts transformers' hidden_states, which begin with the embeddings, so entry
    # i is the output of block i - 1. It becomes the negative index of that block.
    num_layers = vision.get('num_hidden_layers', 12)
    stored_features = hf.get('vision_feature_layer', -2)
    if isinstance(stored_features, int):
        stored_features = [stored_features]
    feature_layers = []
    for i in stored_features:
        feature_layers.append(i if i < 0 else i - 1 - num_layers)

    pooling = 1
    if hf['model_type'] == 'llava_next_video':
        pooling = hf.get('spatial_pool_stride', 2)

    return Config(
        vision=VisionConfig(
            hidden_size=vision.get('hidden_size', 768),
            intermediate_size=vision.get('intermediate_size', 3072),
            num_layers=num_layers,
            num_heads=vision.get('num_attention_heads', 12),
            image_size=vision.get('image_size', 224),
            patch_size=vision.get('patch_size', 32),
            style=style,
            activation=vision.get('hidden_act', default_activation),
            layer_norm_eps=vision.get('layer_norm_eps', default_eps),
            feature_layers=tuple(feature_layers),
        ),
        language=_language_config(text, hf),
        connector=connector,
        pooling=pooling,
        # Files of different versions of transformers spell these two keys differently.
        image_token_id=hf.get('image_token_index', hf.get('image_token_id')),
        video_token_id=hf.get('video_token_index', hf.get('video_token_id', -1)),
        eos_token_id=text.get('eos_token_id', 151645),
        pad_token_id=text.get('pad_token_id') or 151643,
    )


def _from_molmo2(hf):
    text = hf['text_config']
    adapter = hf['adapter_config']
    # The released checkpoints have other keys than those that transformers has saved again:
    # vit_config, image_default_input_size, image_patch_size and vit_layers.
    vision = hf.get('vision_config') or hf['vit_config']
    image_size = vision.get('image_size') or vision.get('image_default_input_size') or [378]
    patch_size = vision.get('patch_size') or vision.get('image_patch_size', 14)
    if text.get('qk_norm_type', 'qwen3') != 'qwen3' or text.get('norm_after'):
        raise UserError("Molmo2-O (Olmo 3 decoder) is not built here; Molmo2-4B and 8B are")

    token_ids = []
    for key, default in zip(MOLMO2_ID_KEYS, MOLMO2_VISUAL_IDS):
        token_ids.append(hf.get(key, default))
    patch_token = token_ids[MOLMO2_ID_KEYS.index('image_patch_id')]

    return Config(
        vision=VisionConfig(
            hidden_size=vision['hidden_size'],
            intermediate_size=vision['intermediate_size'],
            num_layers=vision['num_hidden_layers'],
            num_heads=vision['num_attention_heads'],
            image_size=image_size[0],
            patch_size=patch_size,
            style='siglip',
            activation=vision.get('hidden_act', 'gelu_pytorch_tanh'),
            layer_norm_eps=vision.get('layer_norm_eps', 1e-6),
            feature_layers=tuple(adapter.get('vision_feature_layer') or adapter['vit_layers']),
        ),
        language=_language_config(
            text, hf, extra_vocab_size=text.get('additional_vocab_size', 128)),
        recipe='molmo2',
        connector='molmo2',
        connector_size=adapter['intermediate_size'],
        image_token_id=patch_token,
        video_token_id=patch_token,        # Molmo2 uses one placeholder for pictures and frames
        visual_token_ids=tuple(token_ids),
    )


def _language_config(text, hf, extra_vocab_size=0):
    # transformers 4 writes rope_theta, transformers 5 writes rope_parameters.
    rope_theta = text.get('rope_theta') or text['rope_parameters']['rope_theta']
    # The output matrix is the embedding table ("tied") where either of two keys says so, because
    # versions of transformers write the key at the top, in the text part, or in both.
    tied = hf.get('tie_word_embeddings', False) or text.get('tie_word_embeddings', False)
    return LanguageConfig(
        hidden_size=text['hidden_size'],
        intermediate_size=text['intermediate_size'],
        num_layers=text['num_hidden_layers'],
        num_heads=text['num_attention_heads'],
        num_kv_heads=text['num_key_value_heads'],
        head_dim=text['head_dim'],
        vocab_size=text['vocab_size'],
        extra_vocab_size=extra_vocab_size,
        rope_theta=rope_theta,
        rms_norm_eps=text.get('rms_norm_eps', 1e-6),
        tie_word_embeddings=tied,
        max_position_embeddings=text.get('max_position_embeddings', 40960),
    )


# --------------------------------------------------------------------------------------------------
# Tensor names
#
# Our parameters have transformers' names, so most of the renaming is in prefixes. Two differences
# remain: repositories of single towers (CLIP, SigLIP, Qwen3) and llava files of several years put
# different prefixes in front, and the released Molmo2 has names and stacked matrices of its own.

# Regular expressions that turn a tensor name of any of these files into our parameter's name. They
# are applied one after the other. Most names match one of them; a name that is ours matches none.
RULES = [
    (r'^(model\.)?vision_tower\.(vision_model\.)?', 'vision_tower.'),
    (r'^vision_model\.', 'vision_tower.'),
    (r'^(model\.)?language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'language_model.'),
    (r'^model\.multi_modal_projector\.', 'multi_modal_projector.'),
    (r'^model\.(?=embed_tokens|layers|norm)', 'language_model.'),
]

# Tensors of a checkpoint that are skipped, because our model does not compute with them: tables of
# position numbers, CLIP's text half and its projections, the norm and the pooling head behind the
# tower's last block, llava-next's newline token.
UNUSED = re.compile(
    r'position_ids$|^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$|image_newline$'
    r'|^vision_tower\.(post_layernorm|head)\.|rotary_emb')

# Regular expressions that turn our parameter's name into that of the released Molmo2, applied one
# after the other, so that later ones see what earlier ones wrote (blocks, resblocks).
MOLMO2_RULES = [
    # the decoder
    (r'^language_model\.norm', 'model.transformer.ln_f'),
    (r'^language_model\.layers', 'model.transformer.blocks'),
    (r'(blocks.*)\.input_layernorm', r'\1.attn_norm'),
    (r'(blocks.*)\.post_attention_layernorm', r'\1.ff_norm'),
    (r'(blocks.*)\.o_proj', r'\1.attn_out'),
    (r'(blocks.*)\.down_proj', r'\1.ff_out'),
    # the vision tower
    (r'^vision_tower\.encoder\.layers', 'model.vision_backbone.image_vit.transformer.resblocks'),
    (r'^vision_tower\.embeddings\.position_embedding\.weight',
     'model.vision_backbone.image_vit.positional_embedding'),
    (r'^vision_tower\.embeddings', 'model.vision_backbone.image_vit'),
    (r'(resblocks.*)\.self_attn\.(.)\w*_proj', r'\1.attention.w\2'),
    (r'(resblocks.*)\.layer_norm1', r'\1.attention_norm'),
    (r'(resblocks.*)\.layer_norm2', r'\1.ffn_norm'),
    (r'(resblocks.*)\.mlp\.fc', r'\1.feed_forward.w'),
    # the connector
    (r'^multi_modal_projector', 'model.vision_backbone'),
    (r'image_pooling_2d\.(.)_proj', r'image_pooling_2d.w\1'),
    (r'image_projector\.gate_proj', 'image_projector.w1'),
    (r'image_projector\.down_proj', 'image_projector.w2'),
    (r'image_projector\.up_proj', 'image_projector.w3'),
]


def rename(name, rules):
    """`name` after all substitutions (pattern, replacement) of `rules`, in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def molmo2_names(names):
    """{tensor name in a Molmo2 file: [names of our parameters]} for the parameters in `names`.

    A tensor with several parameters holds their rows one below the other, in the order of the
    list: Molmo2 stores the query, key and value matrices as one, and up and gate as one. Our
    embedding table is the one parameter that appears twice, because Molmo2 stores it in two parts.
    """
    disk = {}
    for name in names:
        attention = re.match(r'(language_model.*self_attn)\.[qkv]_proj', name)
        mlp = re.match(r'(language_model.*mlp)\.(up|gate)_proj', name)
        if name == 'language_model.embed_tokens.weight':
            disk['model.transformer.wte.embedding'] = [name]
            disk['model.transformer.wte.new_embedding'] = [name]
        elif attention:
            prefix = attention[1]
            disk[rename(prefix, MOLMO2_RULES) + '.att_proj.weight'] = [
                f'{prefix}.q_proj.weight', f'{prefix}.k_proj.weight', f'{prefix}.v_proj.weight']
        elif mlp:
            prefix = mlp[1]
            disk[rename(prefix, MOLMO2_RULES) + '.ff_proj.weight'] = [
                f'{prefix}.up_proj.weight', f'{prefix}.gate_proj.weight']
        else:
            disk[rename(name, MOLMO2_RULES)] = [name]
    return disk


# --------------------------------------------------------------------------------------------------
# Reading weights

def load_model(folder):
    """The VLM of a checkpoint folder, float32 on the CPU.

    Raises UserError if a file is missing or damaged, or if config.json and weights disagree.
    """
    config = read_config(folder)
    # On the meta device parameters have shapes but no memory, so the model is built at once,
    # without drawing random numbers for weights that the files replace.
    with torch.device('meta'):
        model = VLM(config)
    model.to_empty(device='cpu')
    # The constant buffers are uninitialised now, and no file holds them.
    model.set_buffers()
    load_weights(model, folder)
    return model


def load_weights(model, folder, only=''):
    """Reads the safetensors files of `folder` into the parameters of `model`, tensor by tensor.

    only: a prefix, or a tuple of prefixes, of our parameter names; other parameters stay as they
    are. A folder with a vision tower alone is read with only='vision_tower.'.

    Every one of these parameters must be filled and every tensor must have a use. If not, one
    UserError lists the names and shapes that do not fit.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        if name.startswith(only):
            parameters[name] = parameter
    rows_filled = dict.fromkeys(parameters, 0)
    molmo2 = molmo2_names(parameters)

    # A connector of one layer is stored as two layers, because llava has two; the second one is
    # the identity. It is checked, not read, because our model has no parameter for it.
    has_identity_layer = (model.config.connector == 'linear'
                          and 'multi_modal_projector.linear_1.weight' in parameters)

    problems = []
    for file in weight_files(folder):
        # The library raises SafetensorError for a file that is cut off or is no safetensors file.
        try:
            with safe_open(file, framework='pt') as f:
                for key in f.keys():
                    name = rename(key, RULES)
                    if _is_unused(name, model):
                        continue
                    if has_identity_layer and name.startswith('multi_modal_projector.linear_2.'):
                        check_identity(f.get_tensor(key), f"{file}: {key}")
                        continue
                    # A name of the released Molmo2 is in this dict; all others follow RULES.
                    names = molmo2.get(key, [name])
                    stored = f.get_slice(key)        # a handle: rows are read when it is indexed
                    if names[0] not in parameters:
                        problems.append(f"{key} {stored.get_shape()} has no place in this model")
                        continue
                    targets = [(n, parameters[n]) for n in names]
                    problems += copy_into(targets, key, stored, rows_filled)
        except SafetensorError as e:
            raise UserError(f"{file} is not a whole safetensors file ({e}); "
                            f"fetch it again") from None

    # A parameter that a problem names already is not reported a second time as missing.
    missing = []
    for name, parameter in parameters.items():
        is_reported = any(name in problem for problem in problems)
        if rows_filled[name] != len(parameter) and not is_reported:
            missing.append(f"{name} {list(parameter.shape)} is missing")
    problems += missing
    if problems:
        shown = '\n  '.join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ''
        raise UserError(f"{folder} does not fit this model:\n  {shown}{more}")


def weight_files(folder):
    """Paths of the safetensors files of a folder: model.safetensors, or those its index names.

    Raises UserError if the folder or a file does not exist, or if the index names a file outside
    the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    # An old index may lie beside a single file that replaced its parts, so the single file wins.
    index = folder / 'model.safetensors.index.json'
    names = ['model.safetensors']
    if index.exists() and not (folder / 'model.safetensors').exists():
        names = sorted(set(read_json(index)['weight_map'].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]}, a file outside its folder")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; "
                        f"fetch the safetensors files of the model")
    return [folder / name for name in names]


def _is_unused(name, model):
    """Is this tensor, under our naming, one that the model does not need although it is valid?"""
    if UNUSED.search(name):
        return True
    # Blocks of the tower above the last feature layer are stored but not built.
    block = re.match(r'vision_tower\.encoder\.layers\.(\d+)\.', name)
    if block and int(block[1]) >= model.config.vision.num_layers:
        return True
    # Some files of tied models store the output matrix too; it equals the embedding.
    return name == 'lm_head.weight' and model.lm_head is None


@torch.no_grad()
def copy_into(targets, key, stored, rows_filled):
    """Copies one tensor of a file into the parameters whose rows it holds.

    targets: [(name, parameter), ..]. The stored tensor is these parameters stacked along dimension
        0; for all but Molmo2's stacked matrices it is one parameter.
    key: the tensor's name in the file.
    stored: the tensor's slice object of safetensors. Of a sharded model (FSDP) each process holds
        some rows of a parameter and reads these alone from the file.
    rows_filled: {name: rows filled so far}, to which the rows of this tensor are added. All rows
        count, those of the other processes too.
    Returns a list of problems, one line each; it is empty if the tensor fits.
    """
    shape = stored.get_shape()
    row_shape = targets[0][1].shape[1:]                # shape of one row, equal in all targets
    total_rows = sum(len(parameter) for _, parameter in targets)

    # Molmo2 stores the embedding in two tensors: `wte.embedding` has the first rows and
    # `wte.new_embedding` the last ones. transformers cuts the table at another row than the release
    # does, so any number of rows is accepted. Whether both parts fill it is checked at the end.
    if '.wte.' in key:
        rows_fit = shape[0] <= total_rows
    else:
        rows_fit = shape[0] == total_rows
    # The convolution of a vision tower is stored as [D, 3, p, p]; ours is a linear layer whose
    # weight [D, p x p x 3] has as many numbers in a row.
    is_convolution = len(shape) == 4
    if is_convolution:
        columns_fit = math.prod(shape[1:]) == math.prod(row_shape)
    else:
        columns_fit = tuple(shape[1:]) == tuple(row_shape)
    if not rows_fit or not columns_fit:
        names = ' + '.join(name for name, _ in targets)
        return [f"{key} is {shape}, {names} wants {[total_rows, *row_shape]}"]

    # From here on a row has one number: its place in the stack of all targets. The stored tensor
    # covers rows [stored_start, stored_end) of the stack.
    stored_start = 0
    if 'new_embedding' in key:
        stored_start = total_rows - shape[0]
    stored_end = stored_start + shape[0]

    start = 0                                          # of the parameter in the stack
    for name, parameter in targets:
        end = start + len(parameter)
        rows_filled[name] += min(end, stored_end) - max(start, stored_start)

        # This process holds rows [shard_start, shard_end): all of the parameter, or FSDP's share.
        shard, offset = local_shard(parameter)
        shard_start = start + offset
        shard_end = shard_start + len(shard)
        first = max(shard_start, stored_start)
        last = min(shard_end, stored_end)
        if first < last:
            rows = stored[first - stored_start:last - stored_start]
            if is_convolution:
                rows = rows.permute(0, 2, 3, 1)        # [D, p, p, 3]: our patches end with colours
                rows = rows.flatten(1)                 # [D, p x p x 3]
            shard[first - shard_start:last - shard_start] = rows.to(shard.dtype)
        start = end
    return []


def check_identity(tensor, where):
    """Raises UserError unless a weight [D, D] is the identity, or a bias [D] is zero."""
    if tensor.ndim == 2:
        expected = torch.eye(*tensor.shape)
    else:
        expected = torch.zeros_like(tensor)
    if not torch.equal(tensor.float(), expected.float()):
        raise UserError(f"{where} is not the identity: this checkpoint has a connector of two "
                        f"layers, which connector = 'linear' would lose; set connector = 'mlp'")


# --------------------------------------------------------------------------------------------------
# Writing config.json

def to_hf(config):
    """The dict of a config.json: the keys of the architecture that `layout` names, and the whole
    Config under `nanomolmo2`, from which `from_hf` reads it back exactly."""
    # transformers picks the class to build by model_type; a type that it does not know makes it
    # refuse the folder, which is right for a model that none of its classes computes.
    kind = layout(config)
    text = _text_to_hf(config)
    common = {
        'model_type': kind or 'nanomolmo2',
        'text_config': text,
        'dtype': 'float32',
        'tie_word_embeddings': config.language.tie_word_embeddings,
        'eos_token_id': config.eos_token_id,
        'pad_token_id': config.pad_token_id,
    }
    ours = {'nanomolmo2': asdict(config)}
    if kind == 'molmo2':
        text['model_type'] = 'molmo2_text'
        text['additional_vocab_size'] = config.language.extra_vocab_size
        # A Molmo2 file always holds the output matrix, also where ours is tied (`disk_tensors`).
        text['tie_word_embeddings'] = False
        common['tie_word_embeddings'] = False
        architectures = ['Molmo2ForConditionalGeneration']
        specific = _molmo2_to_hf(config)
    else:
        architectures = []
        if kind == 'llava':
            architectures = ['LlavaForConditionalGeneration']
        if kind == 'llava_next_video':
            architectures = ['LlavaNextVideoForConditionalGeneration']
        specific = _llava_to_hf(config)
    return {'architectures': architectures, **common, **specific, **ours}


def _text_to_hf(config):
    language = config.language
    return {
        'model_type': 'qwen3',
        'vocab_size': language.vocab_size,
        'hidden_size': language.hidden_size,
        'intermediate_size': language.intermediate_size,
        'num_hidden_layers': language.num_layers,
        'num_attention_heads': language.num_heads,
        'num_key_value_heads': language.num_kv_heads,
        'head_dim': language.head_dim,
        'hidden_act': 'silu',
        # transformers 4.57 and 5 both read rope_theta. From rope_parameters alone, which is the
        # newer spelling, 4.57 would silently take its default of 10000.
        'rope_theta': language.rope_theta,
        'rms_norm_eps': language.rms_norm_eps,
        'tie_word_embeddings': language.tie_word_embeddings,
        'attention_bias': False,
        'max_position_embeddings': language.max_position_embeddings,
        'eos_token_id': config.eos_token_id,
        'pad_token_id': config.pad_token_id,
    }


def _vision_to_hf(vision):
    return {
        'hidden_size': vision.hidden_size,
        'intermediate_size': vision.intermediate_size,
        'num_hidden_layers': vision.num_layers,
        'num_attention_heads': vision.num_heads,
        'image_size': vision.image_size,
        'patch_size': vision.patch_size,
        'layer_norm_eps': vision.layer_norm_eps,
        'hidden_act': vision.activation,
    }


def _llava_to_hf(config):
    """The keys that llava and llava_next_video have beside the common ones."""
    vision = _vision_to_hf(config.vision)
    if config.vision.style == 'siglip':
        vision['model_type'] = 'siglip_vision_model'
        vision['vision_use_head'] = False
    else:
        vision['model_type'] = 'clip_vision_model'

    # Counted from the end, an index means the same block here and in transformers.
    features = [i - config.vision.num_layers for i in config.vision.feature_layers]
    patches = (config.vision.image_size // config.vision.patch_size) ** 2
    hf = {
        'vision_config': vision,
        'image_token_index': config.image_token_id,
        'image_seq_length': patches,
        # llava always has two linear layers. A connector of one layer becomes a pair without
        # activation, whose second layer `disk_tensors` writes as the identity.
        'projector_hidden_act': 'gelu' if config.connector == 'mlp' else 'linear',
        'multimodal_projector_bias': True,
        'vision_feature_layer': features if len(features) > 1 else features[0],
        # CLIP's class token is dropped ('default'); SigLIP has none ('full').
        'vision_feature_select_strategy': 'full' if config.vision.style == 'siglip' else 'default',
    }
    if layout(config) == 'llava_next_video':
        # That architecture pools the frames of clips only, so in transformers a still picture has
        # to go in as a clip of one frame.
        hf['video_token_index'] = config.video_token_id
        hf['spatial_pool_mode'] = 'average'
        hf['spatial_pool_stride'] = config.pooling
        hf['video_seq_length'] = patches // config.pooling ** 2
    return hf


def _molmo2_to_hf(config):
    """The keys that molmo2 has beside the common ones."""
    head_dim = config.vision.hidden_size // config.vision.num_heads
    vision = _vision_to_hf(config.vision)
    vision['model_type'] = 'molmo2_vision'
    vision['image_size'] = [config.vision.image_size, config.vision.image_size]
    vision['head_dim'] = head_dim
    vision['num_key_value_heads'] = config.vision.num_heads
    adapter = {
        'vision_feature_layer': list(config.vision.feature_layers),
        'hidden_size': config.vision.hidden_size,
        'num_attention_heads': config.vision.num_heads,
        'num_key_value_heads': config.vision.num_heads,
        'hidden_act': 'silu',
        'head_dim': head_dim,
        'intermediate_size': config.connector_size,
        'text_hidden_size': config.language.hidden_size,
    }
    token_ids = dict(zip(MOLMO2_ID_KEYS, config.visual_token_ids))
    return {'vision_config': vision, 'adapter_config': adapter, **token_ids}


# --------------------------------------------------------------------------------------------------
# Writing weights

MAX_FILE = 5 * 10 ** 9             # bytes of one safetensors file, as transformers writes them


def disk_tensors(model):
    """Yields (name, tensor) of every tensor that a checkpoint file holds, one at a time.

    Names and shapes are those of transformers' architecture. Of a sharded model every process must
    run through the whole generator, because gathering a tensor is a collective operation.
    """
    if layout(model.config) == 'molmo2':
        yield from _molmo2_disk_tensors(model)
    else:
        yield from _llava_disk_tensors(model)


def _molmo2_disk_tensors(model):
    parameters = dict(model.named_parameters())
    vocab_size = model.config.language.vocab_size
    for disk_name, names in molmo2_names(parameters).items():
        stacked = torch.cat([full_tensor(parameters[name]) for name in names])
        if disk_name == 'model.transformer.wte.embedding':
            yield disk_name, stacked[:vocab_size]
            # The layout always has an output matrix, so a tied one is written as a copy.
            if model.lm_head is None:
                yield 'lm_head.weight', stacked[:vocab_size]
        elif disk_name == 'model.transformer.wte.new_embedding':
            yield disk_name, stacked[vocab_size:]
        else:
            yield disk_name, stacked


def _llava_disk_tensors(model):
    config = model.config
    p = config.vision.patch_size
    for name, parameter in model.named_parameters():
        tensor = full_tensor(parameter)
        if name.endswith('patch_embedding.weight'):
            tensor = tensor.view(-1, p, p, 3)              # [D, p x p x 3] -> [D, p, p, 3]
            tensor = tensor.permute(0, 3, 1, 2)            # [D, 3, p, p], a convolution's weight
        name = re.sub(r'^vision_tower\.', 'vision_tower.vision_model.', name)
        name = re.sub(r'^language_model\.', 'language_model.model.', name)
        name = re.sub(r'^lm_head\.', 'language_model.lm_head.', name)
        yield name, tensor

    # transformers' modules have parameters that our model lacks. They get values that change
    # nothing: an identity, a norm whose output is not read, a newline token that is never used.
    width = config.language.hidden_size
    if config.connector == 'linear':
        yield 'multi_modal_projector.linear_2.weight', torch.eye(width)
        yield 'multi_modal_projector.linear_2.bias', torch.zeros(width)
    vision_width = config.vision.hidden_size
    yield 'vision_tower.vision_model.post_layernorm.weight', torch.ones(vision_width)
    yield 'vision_tower.vision_model.post_layernorm.bias', torch.zeros(vision_width)
    if layout(config) == 'llava_next_video':
        yield 'image_newline', torch.zeros(width)


def copy_tensors(model, keep=True):
    """{disk name: tensor} of a model, copied to the CPU's memory, for `write_model`.

    Of a sharded model all processes must call this function, because each one holds a part of
    every tensor. Those with keep=False take part in gathering and get an empty dict.
    """
    copies = {}
    for name, tensor in disk_tensors(model):
        if keep:
            copies[name] = tensor.to('cpu', copy=True).contiguous()
    return copies


def write_model(config, tensors, folder):
    """Writes config.json, generation_config.json and the safetensors files of a checkpoint.

    tensors: {disk name: tensor on the CPU}. They become one file, or several files of at most
    MAX_FILE bytes (a larger tensor has a file of its own) and an index. The folder is created.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / 'config.json', to_hf(config))
    _write_json(folder / 'generation_config.json', {
        'eos_token_id': config.eos_token_id,
        'pad_token_id': config.pad_token_id,
    })

    # The tensors are put into files in their order; one that has no room begins the next file.
    parts = [{}]                                       # {name: tensor} of each file
    room = MAX_FILE                                    # bytes left in the last file
    for name, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = MAX_FILE
        parts[-1][name] = tensor
        room -= tensor.nbytes

    if len(parts) == 1:
        save_file(parts[0], folder / 'model.safetensors', metadata={'format': 'pt'})
        return
    file_of_tensor = {}
    for i, part in enumerate(parts, start=1):
        file_name = f'model-{i:05d}-of-{len(parts):05d}.safetensors'
        save_file(part, folder / file_name, metadata={'format': 'pt'})
        for name in part:
            file_of_tensor[name] = file_name
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / 'model.safetensors.index.json', {
        'metadata': {'total_size': total_size},
        'weight_map': file_of_tensor,
    })


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


def save_model(model, folder):
    """Writes a model's config and weights to `folder`; `save_processor` adds the rest."""
    write_model(model.config, copy_tensors(model), folder)


# --------------------------------------------------------------------------------------------------
# Processor files

# What data.py's Processor does, written for transformers' apply_chat_template: first the
# placeholders of all pictures and videos (numbered if there are several), then the messages as
# <|im_start|>role ... <|im_end|>.
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

# Settings of a Processor that decide what a checkpoint's input looks like. A checkpoint keeps them
# in processor_config.json under `nanomolmo2`.
SAVED_SETTINGS = ('image_size', 'patch_size', 'pooling', 'video_size', 'video_pooling',
                  'max_frames', 'fps', 'resize', 'image_token', 'point_format', 'point_digits')


def save_processor(processor, folder):
    """Writes tokenizer, picture settings and chat template to a checkpoint folder.

    The folder's config.json must be written before, because it says how the tower's pixels are
    scaled.
    """
    folder = Path(folder)
    for name, content in processor.tokenizer_files.items():
        (folder / name).write_bytes(content)

    config = read_config(folder)
    mean, std = PIXEL_STATS[config.vision.style]
    square = {'height': processor.image_size, 'width': processor.image_size}
    size = square
    if processor.resize == 'crop':
        size = {'shortest_edge': processor.image_size}
    _write_json(folder / 'preprocessor_config.json', {
        'image_processor_type': 'CLIPImageProcessor',
        'do_resize': True,
        'resample': 3,                                 # Pillow's number for bicubic
        'do_rescale': True,
        'do_center_crop': processor.resize == 'crop',
        'crop_size': square,
        'do_normalize': True,
        'do_convert_rgb': True,
        'image_mean': list(mean),
        'image_std': list(std),
        'size': size,
    })
    _write_json(folder / 'processor_config.json', {
        'processor_class': 'LlavaProcessor',
        'image_token': processor.image_token,
        'patch_size': processor.patch_size,
        # LlavaProcessor makes patches + num_additional_image_tokens placeholders, one less for the
        # strategy 'default'. With these two values there is one placeholder a patch.
        'num_additional_image_tokens': 1,
        'vision_feature_select_strategy': 'default',
        'nanomolmo2': {name: getattr(processor, name) for name in SAVED_SETTINGS},
    })
    (folder / 'chat_template.jinja').write_text(CHAT_TEMPLATE)


def saved_settings(folder, config):
    """{name: value} of the Processor settings that a checkpoint folder was trained with.

    They are those that `save_processor` wrote. For a llava folder of others they are worked out
    from its preprocessor_config.json, and from `config` for what is not in there.
    """
    path = Path(folder) / 'processor_config.json'
    stored = read_json(path) if path.exists() else {}
    settings = stored.get('nanomolmo2')
    if settings is None:
        settings = _llava_settings(folder, config, stored)
    # A folder that says nothing about videos takes frames as it takes pictures.
    defaults = {
        'video_size': settings['image_size'],
        'video_pooling': settings['pooling'],
        'point_format': Processor.point_format,
        'point_digits': Processor.point_digits,
    }
    return {**defaults, **settings}


def _llava_settings(folder, config, processor):
    """Settings of a llava folder of others; processor: its processor_config.json, {} if none."""
    path = Path(folder) / 'preprocessor_config.json'
    if path.exists():
        image = read_json(path)
    else:
        image = processor.get('image_processor', {})       # newer files hold it inside
    crops = image.get('do_center_crop', True)
    size = image.get('crop_size' if crops else 'size', config.vision.image_size)
    if isinstance(size, dict):
        size = size.get('height', size.get('shortest_edge'))
    return {
        'image_size': size,
        'patch_size': config.vision.patch_size,
        'pooling': config.pooling,
        'resize': 'crop' if crops else 'stretch',
        'image_token': processor.get('image_token', '<|image_pad|>'),
    }


def is_released(folder):
    """Is this a Molmo2 as Ai2 released it, or as transformers saved it again?

    Such a folder names the class Molmo2Processor, which `save_processor` never does. Its pictures
    are cut into crops, so it needs the processor of extra/molmo2.py.
    """
    path = Path(folder) / 'processor_config.json'
    return path.exists() and read_json(path).get('processor_class') == 'Molmo2Processor'


def load_processor(folder, config, **overrides):
    """The Processor of a checkpoint folder.

    config: the model's Config. overrides: settings that replace the saved ones.
    """
    if is_released(folder):
        from extra.molmo2 import Molmo2Processor       # cuts pictures into overlapping crops
        return Molmo2Processor(folder, **overrides)
    settings = saved_settings(folder, config)
    settings.update(overrides)
    return Processor(folder, **settings)


# --------------------------------------------------------------------------------------------------
# Model and processor together

def load_checkpoint(path, **settings):
    """(model, processor, folder) of a checkpoint, or of the newest checkpoint of a run's out_dir.

    settings: Processor settings that replace the saved ones. Without `seq_len` among them an
    example may be as long as the decoder was built for.
    """
    folder = newest(path)
    model = load_model(folder)
    settings.setdefault('seq_len', model.config.language.max_position_embeddings)
    processor = load_processor(folder, model.config, **settings)
    return model, processor, folder


def make_processor(settings):
    """(Processor, model Config) for train.py's settings, without building or loading a model: those
    of init_from, else those that the settings describe.

    train.py, bench.py and the data inspector all have them from here, so that what is shown is what
    a run is fed.
    """
    if settings['init_from']:
        source = newest(settings['init_from'])
        config = read_config(source)
        processor = load_processor(source, config, **processor_settings(settings))
        check_vocabulary(processor, config)
        return processor, config
    # The tokenizer is the one that is named, or that of the decoder that training starts from.
    folder = settings['tokenizer'] or settings['language_weights']
    if not folder:
        raise UserError("tokenizer, language_weights or init_from must name a folder with tokenizer.json")
    names = ('recipe', 'vision', 'language', 'connector', 'pooling')
    sizes = {name: settings[name] for name in names}
    patch_size = make_config(**sizes).vision.patch_size
    processor = Processor(folder, patch_size=patch_size, **processor_settings(settings))
    config = make_config(**sizes, **processor.token_ids())
    check_vocabulary(processor, config)
    return processor, config


def check_vocabulary(processor, config):
    """UserError if the tokenizer has tokens that the decoder has no embedding for."""
    table_rows = config.language.vocab_size + config.language.extra_vocab_size
    if processor.vocab_size > table_rows:
        raise UserError(f"the tokenizer has {processor.vocab_size} tokens, the decoder's table only "
                        f"{table_rows} rows")
