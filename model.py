"""The model: a vision transformer, a connector, a Qwen3 decoder, and the three of them together.

    patches [num_crops, num_patches, patch_dim] uint8
       │  VisionTransformer   CLIP or SigLIP2; the outputs of one or more of its layers
       ▼
    features [num_crops x num_patches, feature_size]
       │  Connector           each visual token pools the patches that `pool_index` names, by
       ▼                      a mean and a linear layer, a mean and an MLP, or attention
    visual tokens [num_visual_tokens, width]
       │  VLM.embed           they replace (nano) or are added to (molmo2) the embeddings of
       ▼                      the placeholder tokens
    Decoder                   Qwen3: RMSNorm, rotary positions, q/k norm, grouped-query attention,
       ▼                      SwiGLU
    hidden states [B, L, width]  ->  logits, where a token has a loss weight

What comes in is a `Batch`, documented field by field below; data.py makes it. A crop is a picture
or a frame of a video resized to what the tower takes, or a tile of one; each has P patches.

- The vision transformer takes patches, not pictures, so its patch-embedding convolution is a
  linear layer. Layers above the last one whose output is used are not built.
- The mask is made once per batch and handed down to all layers. `mask_rule` says which token
  attends to which, and `choose_attention` decides how the decoder computes that.
- Parameter names are Hugging Face's, so a checkpoint is loaded by a rule of prefixes (extra/hf.py).
- What has a faster form in extra/ has its plain form here, and tests hold both equal: attention
  with a dense mask, the loss (`plain_loss`), generation (`VLM.generate`). `VLM(config, fast=False)`
  computes by nothing else.

No data handling here.

    python model.py [config/stage1.py] [--key=value]     parameters, what trains, memory per stage
"""
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from configurator import UserError

# --------------------------------------------------------------------------------------------------
# Sizes. The figures are those of the released config.json files and of transformers 5.23 (CLIP,
# SigLIP, Qwen3).


@dataclass
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int                 # of the released tower; __post_init__ keeps those that are used
    num_heads: int
    image_size: int                     # pixels a side for which the table of positions was trained
    patch_size: int                        # pixels a side
    style: str = 'clip'                # clip (class token, LayerNorm after the embeddings) | siglip
    activation: str = 'quick_gelu'
    layer_norm_eps: float = 1e-5
    feature_layers: tuple = (-2,)          # layers whose outputs are concatenated; -1 is the last

    def __post_init__(self):
        layers = range(self.num_layers)
        self.feature_layers = tuple(layers[i] for i in self.feature_layers)
        self.num_layers = max(self.feature_layers) + 1

    @property
    def feature_size(self):
        return self.hidden_size * len(self.feature_layers)


@dataclass
class LanguageConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    vocab_size: int = 151936
    extra_vocab_size: int = 0  # rows of the embedding table beyond the output's vocabulary (molmo2)
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960


def _clip(hidden, mlp, layers, heads, image, patch):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, image_size=image,
                patch_size=patch)


def _siglip2(hidden, mlp, layers, heads, image):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, image_size=image,
                patch_size=14, style='siglip', activation='gelu_pytorch_tanh', layer_norm_eps=1e-6)


def _qwen3(hidden, mlp, layers, heads, tied=True, theta=1e6, positions=40960):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, num_kv_heads=8,
                tie_word_embeddings=tied, rope_theta=theta, max_position_embeddings=positions)


VISION = {                                 #            width   mlp  layers heads image patch
    'openai/clip-vit-large-patch14-336': _clip(          1024, 4096, 24, 16, 336, 14),
    'openai/clip-vit-large-patch14': _clip(              1024, 4096, 24, 16, 224, 14),
    'google/siglip2-so400m-patch14-384': _siglip2(       1152, 4304, 27, 16, 378),   # 27 patches of 14
}
LANGUAGE = {                               #            width   mlp  layers heads
    'Qwen/Qwen3-0.6B': _qwen3(                           1024, 3072, 28, 16),
    'Qwen/Qwen3-1.7B': _qwen3(                           2048, 6144, 28, 16),
    'Qwen/Qwen3-4B': _qwen3(                             2560, 9728, 36, 32),
    'Qwen/Qwen3-4B-Instruct-2507': _qwen3(               2560, 9728, 36, 32, theta=5e6, positions=262144),
    'Qwen/Qwen3-8B': _qwen3(                             4096, 12288, 36, 32, tied=False),
}
# Pixels are normalised as each tower was trained: (x / 255 - mean) / std, a number for each of red,
# green and blue
PIXEL_STATS = {'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
               'siglip': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
# The ids of Molmo2's visual tokens in its own tokenizer: all special ones but the text placeholders
# 151941 and 151945
MOLMO2_VISUAL_IDS = (151936, 151937, 151938, 151939, 151940, 151942, 151943, 151944)


@dataclass
class Config:
    """Sizes, token ids, and the recipe. The recipes differ in three things:

                          nano                                  molmo2
        features          of the last layer but one             of two layers (make_config)
        VLM.embed         visual tokens replace placeholders    visual tokens are added to them
        mask_rule         tokens attend to earlier tokens       visual tokens to one another, too

    Because of its mask molmo2 takes neither 'causal' nor 'pieces' (choose_attention), and
    VLM.make_mask looks for the visual tokens. The connector is a choice of its own, although
    released Molmo2 models have the one of that name.
    """
    vision: VisionConfig
    language: LanguageConfig
    recipe: str = 'nano'                   # nano | molmo2
    connector: str = 'linear'            # linear | mlp (both after a mean over the window) | molmo2
    connector_size: int = 0                # width inside molmo2's SwiGLU; 0: as the decoder's
    pooling: int = 2                   # a visual token of a picture pools pooling x pooling patches
    image_token_id: int = 151655           # the placeholder <|image_pad|>, or <im_patch>
    video_token_id: int = 151656           # <|video_pad|>
    eos_token_id: int = 151645             # <|im_end|>
    pad_token_id: int = 151643             # <|endoftext|>
    visual_token_ids: tuple = ()           # molmo2: the tokens that attend to one another

    def __post_init__(self):
        if isinstance(self.vision, dict):
            self.vision = VisionConfig(**self.vision)
        if isinstance(self.language, dict):
            self.language = LanguageConfig(**self.language)
        if not self.connector_size:
            self.connector_size = self.language.intermediate_size
        if self.recipe == 'molmo2':
            self.visual_token_ids = tuple(self.visual_token_ids or MOLMO2_VISUAL_IDS)
        else:
            self.visual_token_ids = ()
        _check_choice('recipe', self.recipe, ('nano', 'molmo2'))
        _check_choice('connector', self.connector, ('linear', 'mlp', 'molmo2'))


def _check_choice(name, value, choices):
    if value not in choices:
        raise UserError(f"{name} = '{value}' is not one of {', '.join(choices)}")


def make_config(vision, language, **rest):
    """A Config. vision and language are names in the tables above, or dicts of sizes; rest are
    Config's other fields."""
    vision = dict(_sizes(VISION, vision, 'vision'))
    language = _sizes(LANGUAGE, language, 'language')
    if rest.get('recipe') == 'molmo2':
        vision.setdefault('feature_layers', (-3, -9))
    return Config(vision, language, **rest)


def _sizes(table, value, what):
    if not isinstance(value, str):
        return value
    if value not in table:
        raise UserError(f"{what} = '{value}' is not in the table of model.py; it has: {', '.join(table)}")
    return table[value]


# --------------------------------------------------------------------------------------------------
# Attention and activation checkpointing, for all parts

def attention(query, key, value, mask):
    """Grouped-query attention: for each head, softmax(query @ key^T / sqrt(d)) @ value.

    query [B, heads, L, d], key and value [B, kv_heads, S, d] -> [B, heads, L, d]. Query head h
    reads key head h // (heads / kv_heads).

    mask: None, when every query attends to every key; 'causal'; boolean [B, 1, L, S], True where a
    query attends to a key; a FlexAttention block mask; or an object that computes attention itself
    by its method `attend` (PackedTreeAttention in extra/kernels.py, Ulysses in parallel.py).
    """
    if hasattr(mask, 'attend'):
        return mask.attend(query, key, value)
    if isinstance(mask, BlockMask):
        from extra.kernels import flex                   # FlexAttention, compiled
        return flex(query, key, value, mask)
    is_causal = isinstance(mask, str)        # 'causal', the only word
    dense = None if is_causal else mask
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=dense, is_causal=is_causal,
                                          enable_gqa=is_grouped)


def is_recomputed(every, layer):
    """Activation (gradient) checkpointing: does this layer keep only its input for the backward
    pass, and compute the rest again there? Each layer whose number `every` divides does; 0: none.
    """
    return bool(every) and layer % every == 0 and torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------
# Vision

ACTIVATION = {
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),
    'gelu': F.gelu,
    'gelu_pytorch_tanh': lambda x: F.gelu(x, approximate='tanh'),
}


def crop_attention(query, key, value, shapes, fast=True):
    """Attention inside each crop. A batch may hold crops of two sizes: pictures, and frames of
    videos.

    query, key, value [T, heads, d], the tokens of all crops one after the other; shapes [(N, P),
    ..]: first N crops of P tokens each, then others. Returns [T, heads, d].
    """
    attend = attention
    if fast and query.device.type == 'cpu' and query.requires_grad:
        # The same, with a faster backward pass on a CPU
        from extra.kernels import small_attention as attend
    sizes = [crops * tokens for crops, tokens in shapes]
    results = []
    qkv = zip(shapes, query.split(sizes), key.split(sizes), value.split(sizes))
    for (crops, tokens), q, k, v in qkv:
        q = q.unflatten(0, (crops, tokens)).transpose(1, 2)              # [crops, heads, tokens, d]
        k = k.unflatten(0, (crops, tokens)).transpose(1, 2)
        v = v.unflatten(0, (crops, tokens)).transpose(1, 2)
        x = attend(q, k, v, None)
        results.append(x.transpose(1, 2).flatten(0, 1))                 # [crops x tokens, heads, d]
    return torch.cat(results)


class VisionAttention(nn.Module):
    def __init__(self, config, fast=True):
        super().__init__()
        self.fast = fast
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, shapes):
        """x [T, width], the tokens of all crops; shapes as in `crop_attention`."""
        x = x.to(compute_dtype(x))                  # cast once, because three linear layers read it
        query = self.q_proj(x).unflatten(-1, (self.num_heads, -1))               # [T, heads, d]
        key = self.k_proj(x).unflatten(-1, (self.num_heads, -1))
        value = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        x = crop_attention(query, key, value, shapes, self.fast)
        return self.out_proj(x.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATION[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config, fast=True):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config, fast)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x, shapes):
        x = x + self.self_attn(self.layer_norm1(x), shapes)
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """A linear layer for the pixels of each patch, and a learned vector for each position."""

    def __init__(self, config):
        super().__init__()
        # The table has positions for a grid of so many patches per side
        self.grid = config.image_size // config.patch_size
        self.has_class_token = config.style == 'clip'
        patch_dim = 3 * config.patch_size ** 2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size, bias=config.style != 'clip')
        self.class_embedding = None
        if self.has_class_token:
            self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        # Row 0 belongs to the class token, where there is one
        rows = self.has_class_token + self.grid ** 2
        self.position_embedding = nn.Embedding(rows, config.hidden_size)

    def positions(self, grid):
        """The table of positions [tokens, width] for crops of grid = (rows, columns) patches. When
        that is not the grid the table was trained for, the patches' part is resized (bicubic)."""
        table = self.position_embedding.weight
        if grid == (self.grid, self.grid):
            return table
        class_position, table = table[:-self.grid ** 2], table[-self.grid ** 2:]
        table = table.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)      # [1, width, rows, columns]
        table = F.interpolate(table.float(), size=grid, mode='bicubic', align_corners=False)
        table = table.flatten(2)[0].T.to(class_position.dtype)                   # [patches, width]
        return torch.cat([class_position, table])

    def forward(self, patches, grid):
        """patches [N, P, patch_dim], normalised -> [N, P, width], or [N, 1 + P, width] with a class
        token first."""
        x = self.patch_embedding(patches)
        if self.has_class_token:
            class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([class_token, x], 1)
        return x + self.positions(grid)


class VisionTransformer(nn.Module):
    """CLIP (Radford et al. 2021) and SigLIP2 (Tschannen et al. 2025) towers.

    `recompute_every`: activation checkpointing, see `is_recomputed`.
    """

    def __init__(self, config, fast=True):
        super().__init__()
        self.config = config
        self.recompute_every = 0
        self.embeddings = VisionEmbeddings(config)
        # The name is misspelt in CLIP's checkpoints, and so here
        self.pre_layrnorm = None
        if config.style == 'clip':
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        layers = [VisionBlock(config, fast) for _ in range(config.num_layers)]
        self.encoder = nn.ModuleDict({'layers': nn.ModuleList(layers)})

    def is_trained(self):
        """A tower is trained as a whole or frozen as a whole, so one weight tells."""
        return self.embeddings.patch_embedding.weight.requires_grad

    def forward(self, crops):
        """crops [(normalised patches [N, P, patch_dim], grid (rows, columns) of the P), ..], an entry for each size of crop
        -> features [sum of N x P, feature_size]: all patches in order, the class tokens dropped."""
        embedded = [self.embeddings(patches, grid) for patches, grid in crops]
        shapes = [x.shape[:2] for x in embedded]
        x = torch.cat([x.flatten(0, 1) for x in embedded])     # [T, width], the tokens of all crops
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        outputs = {}
        for i, block in enumerate(self.encoder['layers']):
            if self.is_trained() and is_recomputed(self.recompute_every, i):
                x = checkpoint(block, x, shapes, use_reentrant=False)
            else:
                x = block(x, shapes)
            if i in self.config.feature_layers:
                outputs[i] = x
        x = torch.cat([outputs[i] for i in self.config.feature_layers], -1)      # [T, feature_size]
        if self.embeddings.has_class_token:
            x = self.drop_class_tokens(x, shapes)
        return x

    def drop_class_tokens(self, x, shapes):
        """[T, feature_size] with a class token in front of each crop's patches -> the patches
        alone."""
        kept = []
        for y, (crops, tokens) in zip(x.split([n * p for n, p in shapes]), shapes):
            y = y.unflatten(0, (crops, tokens))
            kept.append(y[:, 1:].flatten(0, 1))
        return torch.cat(kept)


# --------------------------------------------------------------------------------------------------
# Connector

class AttentionPooling(nn.Module):
    """Molmo2's pooling: the mean of a window of patches attends to the window (transformers, Molmo2
    adapter)."""

    def __init__(self, config):
        super().__init__()
        width = config.vision.hidden_size
        self.num_heads = config.vision.num_heads
        self.q_proj = nn.Linear(config.vision.feature_size, width)
        self.k_proj = nn.Linear(config.vision.feature_size, width)
        self.v_proj = nn.Linear(config.vision.feature_size, width)
        self.o_proj = nn.Linear(width, width)

    def split_heads(self, x):
        """[T, W, width] -> [T, heads, W, d]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, valid):
        """x [T, W, feature_size]: the W patches of each of T windows, 0 where there is none; valid
        [T, W], False there. Every window has at least one patch. Returns [T, width]."""
        number = valid.sum(1)[:, None, None]
        mean = x.sum(1, keepdim=True) / number                               # [T, 1, feature_size]
        query = self.split_heads(self.q_proj(mean))                              # [T, heads, 1, d]
        key = self.split_heads(self.k_proj(x))                                   # [T, heads, W, d]
        value = self.split_heads(self.v_proj(x))
        x = attention(query, key, value, valid[:, None, None])                   # [T, heads, 1, d]
        return self.o_proj(x.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, out_features, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Connector(nn.Module):
    """From features of patches to visual tokens as wide as the decoder. A third kind of connector
    would be added here, and to the choices of Config.connector."""

    def __init__(self, config):
        super().__init__()
        width = config.language.hidden_size
        self.kind = config.connector
        if self.kind == 'molmo2':
            self.image_pooling_2d = AttentionPooling(config)
            self.image_projector = SwiGLU(config.vision.hidden_size, config.connector_size, width)
        else:
            self.linear_1 = nn.Linear(config.vision.feature_size, width)
        if self.kind == 'mlp':
            self.linear_2 = nn.Linear(width, width)

    def forward(self, features, pool_index):
        """features [patches of all crops, feature_size]; pool_index [T, W], the patches of each of
        T visual tokens, -1 for none but not for all of them -> [T, width]."""
        valid = pool_index >= 0
        x = features.index_select(0, pool_index.clamp(min=0).flatten())
        x = x.unflatten(0, pool_index.shape) * valid[..., None]               # [T, W, feature_size]
        if self.kind == 'molmo2':
            return self.image_projector(self.image_pooling_2d(x, valid))
        if x.shape[1] == 1:                  # a mean of one patch is that patch
            x = x.squeeze(1)                                                 # [T, feature_size]
        else:
            x = x.sum(1) / valid.sum(1, keepdim=True)
        x = self.linear_1(x)
        if self.kind == 'mlp':
            x = self.linear_2(F.gelu(x))
        return x


# --------------------------------------------------------------------------------------------------
# Language: Qwen3 (technical report, arXiv 2505.09388; tensor for tensor as in transformers' qwen3)

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, width, eps, fast=True):
        super().__init__()
        self.fast = fast
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        is_training_on_cpu = x.device.type == 'cpu' and torch.is_grad_enabled()
        if self.fast and is_training_on_cpu and not torch.compiler.is_compiling():
            from extra.kernels import RMSNormCPU         # the same in half the passes over memory
            x = RMSNormCPU.apply(x, self.weight, self.eps)
        else:
            # Without autocast, because that of torch 2.13 would cast queries and keys to float32
            # here and keep the copies
            with torch.autocast(autocast_device(x), enabled=False):
                x = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return x.to(compute_dtype(x))     # cast once, because several linear layers read the result


def rotary_table(position_ids, head_dim, theta):
    """Rotary positions (Su et al. 2021): cos and sin [B, L, 1, head_dim] of the angles by which
    queries and keys are turned. Dimension i is turned together with dimension i + head_dim / 2; sin
    is returned as [-sin, sin], so that `rotate` needs no negation."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    frequency = theta ** -exponent                                               # [head_dim / 2]
    angle = position_ids[..., None, None].float() * frequency              # [B, L, 1, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Turns x by the table's angles: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    swapped = torch.cat([b, a], -1)
    return (x * cos + swapped * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, fast=True):
        super().__init__()
        d = config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_heads * d, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps, fast)
        self.k_norm = RMSNorm(d, config.rms_norm_eps, fast)

    def forward(self, x, rotary, mask, cache_layer=None, output_positions=None):
        """x [B, L, width] -> [B, L, width], or [N, width] of the `output_positions` (see Decoder).

        cache_layer: None, or (cache, number of this layer), when answers are generated: the cache
        stores the new keys and values and returns those to attend to (extra/engine.py).
        """
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))                # [B, L, heads, d]
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                # [B, L, kv_heads, d]
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        query = rotate(self.q_norm(query), *rotary)
        key = rotate(self.k_norm(key), *rotary)
        query = query.transpose(1, 2)                                            # [B, heads, L, d]
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)
        if cache_layer is not None:
            cache, layer = cache_layer
            key, value = cache.update(layer, key, value)
        x = attention(query, key, value, mask)
        x = x.transpose(1, 2).flatten(2)                                         # [B, L, heads x d]
        if output_positions is not None:
            x = x.flatten(0, 1).index_select(0, output_positions)                # [N, heads x d]
        return self.o_proj(x)


class Block(nn.Module):
    def __init__(self, config, fast=True):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, fast)
        self.self_attn = Attention(config, fast)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, fast)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x, rotary, mask, dropout=0., cache_layer=None, output_positions=None):
        """As Attention. dropout: the share of what attention and MLP add that is dropped; the
        Decoder passes 0 outside training."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, rotary, mask, cache_layer, output_positions)
        if output_positions is not None:
            x = x.flatten(0, 1).index_select(0, output_positions)            # [N, width]
        x = x + F.dropout(attended, dropout)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout)


class Decoder(nn.Module):
    """Embeddings -> hidden states after the final norm.

    `recompute_every`: activation checkpointing, see `is_recomputed`. `dropout`: the share of what
    each block adds that is dropped in training.
    """

    def __init__(self, config, fast=True):
        super().__init__()
        self.config = config
        self.recompute_every = 0
        self.dropout = 0.
        rows = config.vocab_size + config.extra_vocab_size
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, fast) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, fast)

    def forward(self, x, position_ids, mask, cache=None, output_positions=None):
        """x [B, L, width] -> [B, L, width], or [N, width] of the tokens at `output_positions` [N]
        of the flattened B x L.

        With output_positions the last block attends over all tokens but runs its output projection
        and its MLP for these alone, because no other output is used. cache: where keys and values
        are stored when answers are generated (extra/engine.py).
        """
        cos, sin = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        # Cast to the dtype of queries and keys, because float32 tables would promote every rotation
        # and cast back in each layer
        rotary = [cos.to(compute_dtype(x)), sin.to(compute_dtype(x))]
        dropout = self.dropout if self.training else 0.
        for i, block in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            positions = output_positions if is_last else None
            cache_layer = None if cache is None else (cache, i)
            if is_recomputed(self.recompute_every, i):
                x = checkpoint(block, x, rotary, mask, dropout, cache_layer, positions,
                               use_reentrant=False)
            else:
                x = block(x, rotary, mask, dropout, cache_layer, positions)
        return self.norm(x)


# --------------------------------------------------------------------------------------------------
# What goes through the model at once

@dataclass
class Batch:
    """B rows of L tokens, and the pictures among them: the only interface between data.py and the
    model.

    A row holds one or several documents, one after the other (packing), and may end in padding. A
    document is a message tree: a prefix that all its conversations share, its pictures above all,
    and then the conversations as branches. A branch attends to the prefix and to itself:

        tokens        <img> <img> <img> | user Q1 assistant A1 | user Q2 assistant A2 | pad
        document_ids    0     0     0       0   0     0     0      0   0     0     0    -1
        branch_ids      0     0     0       1   1     1     1      2   2     2     2     0
        position_ids    0     1     2       3   4     5     6      3   4     5     6     0
    """
    tokens: torch.Tensor = None        # [B, L] int64
    position_ids: torch.Tensor = None  # [B, L] int64: a branch goes on from the end of its prefix
    document_ids: torch.Tensor = None  # [B, L] int64: 0, 1, .. in each row; -1 for padding
    branch_ids: torch.Tensor = None    # [B, L] int64: 0 for a prefix, 1, 2, .. for its branches
    causal: bool = False               # each row is one document with at most one branch, so plain
    #                                    causal attention will do
    # -- what is learnt; a prompt needs none of it
    targets: torch.Tensor = None       # [B, L] int64: the next token of the row, to be predicted
    loss_weights: torch.Tensor = None  # [B, L] float32: what that prediction weighs in the loss; 0
    #                                    where the next token is of another branch or document
    loss_index: torch.Tensor = None    # [N] int64: where loss_weights is not 0, in the flat B x L
    loss_tasks: torch.Tensor = None    # [N] int64: the task of each, an index into data.TASKS
    # -- crops of pictures and of videos' frames; None where a batch has none
    patches: torch.Tensor = None      # [num_crops, num_patches, patch_dim] uint8, not normalised: a
    #                                    patch's pixels by row and column, each red, green, blue
    grid: tuple = None                 # (rows, columns) of patches in each of these crops
    frames: torch.Tensor = None        # likewise: frames whose size is not that of pictures
    frame_grid: tuple = None
    pool_index: torch.Tensor = None   # [num_visual_tokens, window] int64: the patches that a visual
    #                                    token pools, -1 for none. The patches of `patches` are
    #                                    counted first, then those of `frames`
    visual_index: torch.Tensor = None  # [num_visual_tokens] int64: their places in the flat B x L
    # -- counted on the CPU, because asking the device for a number makes it wait
    num_tokens: int = 0                # that are not padding
    num_pairs: int = 0                 # (query, key) pairs that attend
    total_weight: float = 0.           # sum of loss_weights
    sources: tuple = ()             # (data set, number of the record) of each example, for messages
    # -- when several ranks share each row (context parallelism, parallel.py)
    row_tokens: torch.Tensor = None  # [B, whole L]: tokens of whole rows, when `tokens` are a piece
    #                                    of them; document_ids and branch_ids are whole then, too

    def to(self, device):
        """This batch with its tensors on another device. Copies from pinned memory overlap what the
        device does."""
        return self._with_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        return self._with_tensors(lambda x: x.pin_memory())

    def _with_tensors(self, function):
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                changed[field.name] = function(value)
        return replace(self, **changed)


# --------------------------------------------------------------------------------------------------
# Who attends to whom

def mask_rule(document_ids, branch_ids, visual=None):
    """attends(row, head, i, j): does query i of a row attend to key j? In the form that
    FlexAttention takes (a mask_mod).

    Yes when both are of one document; and j <= i (or, where `visual` is given, both are visual
    tokens: the molmo2 recipe); and j is in the document's prefix or on i's own branch.
    """
    def attends(b, head, i, j):
        in_order = j <= i
        if visual is not None:
            in_order = in_order | (visual[b, i] & visual[b, j])
        same_document = document_ids[b, i] == document_ids[b, j]
        in_prefix = branch_ids[b, j] == 0
        same_branch = branch_ids[b, i] == branch_ids[b, j]
        return same_document & in_order & (in_prefix | same_branch)
    return attends


def dense_mask(document_ids, branch_ids, visual=None):
    """`mask_rule` for all pairs: boolean [B, 1, L, L]. This is the plain form of every mask.

    document_ids, branch_ids [B, L] int64; visual [B, L] bool, or None. Padding is document -1 and
    attends to itself, so that no softmax is over nothing.
    """
    B, L = document_ids.shape
    b = torch.arange(B, device=document_ids.device)[:, None, None]
    i = torch.arange(L, device=document_ids.device)[:, None]
    j = torch.arange(L, device=document_ids.device)
    attends = mask_rule(document_ids, branch_ids, visual)
    return attends(b, None, i, j)[:, None]


def choose_attention(recipe, device, causal, fast=True):
    """How the decoder attends. A new kernel would be chosen here and made in VLM.make_mask; the
    object made there computes it in its method `attend`.

    causal    SDPA's own causal mask, because rows of one conversation need no other
    dense     SDPA with `dense_mask`: the plain form, taken without `fast` wherever 'causal' will not
              do, and what is left where nothing faster is known
    pieces    PackedTreeAttention: on a CPU a dense mask skips no work, so a row is cut into small
              dense pieces
    flex      FlexAttention: on CUDA the dense mask of a long row would be gigabytes, so the rule
              is compiled into the kernel
    """
    if causal and recipe == 'nano':
        return 'causal'
    if not fast:
        return 'dense'
    if device.type == 'cuda':
        return 'flex'
    if device.type == 'cpu' and recipe == 'nano':
        return 'pieces'
    return 'dense'


# --------------------------------------------------------------------------------------------------
# The whole

def plain_loss(hidden, output_weight, targets, loss_weights, z_loss=0.):
    """The loss. `chunked_loss` in extra/kernels.py computes the same in less memory.

    hidden [N, width] of the tokens that have a loss, output_weight [vocabulary, width], targets
    [N], loss_weights [N]. Returns (the sum of loss_weights * (nll + z_loss * log_total^2), nll
    [N]), where nll is each token's cross entropy and log_total = log(sum of exp(logits)). z_loss
    keeps log_total near 0, so that logits do not drift (PaLM, Chowdhery et al. 2022, section 5).
    """
    logits = F.linear(hidden, output_weight.to(hidden.dtype)).float()            # [N, vocabulary]
    nll = F.cross_entropy(logits, targets, reduction='none')
    log_total = logits.logsumexp(-1)
    loss = (nll + z_loss * log_total.square()) * loss_weights
    return loss.sum(), nll.detach()


def sample_token(logits, temperature, top_k, top_p, generator):
    """logits [B, vocabulary] -> token ids [B]. Temperature 0 takes the likeliest token. top_k keeps
    so many likeliest tokens, 0 all; top_p keeps the smallest set of tokens whose probabilities add
    up to it."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        values, order = logits.sort(-1, descending=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        values = values.masked_fill(before >= top_p, -torch.inf)
        logits = logits.scatter(1, order, values)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class VLM(nn.Module):
    """A vision-language model: a function of its weights, its Config and a Batch.

    fast=False computes everything by the plain forms of this file and never enters extra/.
    """

    def __init__(self, config, fast=True):
        super().__init__()
        self.config = config
        self.fast = fast
        self.vision_tower = VisionTransformer(config.vision, fast)
        self.multi_modal_projector = Connector(config)
        self.language_model = Decoder(config.language, fast)
        self.lm_head = None
        if not config.language.tie_word_embeddings:
            width, vocabulary = config.language.hidden_size, config.language.vocab_size
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.set_buffers()

    def set_buffers(self, device=None):
        """Constants, which are not weights: pixel scale and shift [patch_dim], ids of visual
        tokens. They are set again after a model was built without memory (torch.device('meta')),
        because `to_empty` leaves garbage in them."""
        device = device or self.vision_tower.embeddings.patch_embedding.weight.device
        stats = torch.tensor(PIXEL_STATS[self.config.vision.style])          # [2, 3]
        # Colours come last in a patch, so three numbers repeated fit all of its pixels
        stats = stats.repeat(1, self.config.vision.patch_size ** 2)          # [2, patch_dim]
        mean, std = stats
        self.register_buffer('pixel_scale', (1 / (255 * std)).to(device), persistent=False)
        self.register_buffer('pixel_shift', (-mean / std).to(device), persistent=False)
        visual_ids = torch.tensor(self.config.visual_token_ids)
        self.register_buffer('visual_ids', visual_ids.to(device), persistent=False)

    # -- the forward pass

    def normalize(self, patches):
        """uint8 pixels -> what the tower was trained on. Pixels travel as bytes and are normalised
        here, on the device, because bytes are a quarter of the size of floats."""
        x = patches * self.pixel_scale + self.pixel_shift
        return x.to(self.vision_tower.embeddings.patch_embedding.weight.dtype)

    def encode_images(self, batch, cp_group=None):
        """The visual tokens of a batch [num_visual_tokens, width], in the order of visual_index.

        cp_group: None, or the process group of the ranks that share the batch's rows (context
        parallelism): each encodes its share of the crops, and all pool from all.
        """
        crops = []
        if batch.patches is not None:
            crops.append((self.normalize(batch.patches), tuple(batch.grid)))
        if batch.frames is not None:
            crops.append((self.normalize(batch.frames), tuple(batch.frame_grid)))
        features = self.vision_tower(crops)                            # [all patches, feature_size]
        if cp_group is not None:
            from parallel import AllGather
            features = AllGather.apply(features, cp_group)
        return self.multi_modal_projector(features, batch.pool_index)

    def embed(self, batch, cp_group=None):
        """The embeddings of a batch [B, L, width], with its visual tokens in their places."""
        x = self.language_model.embed_tokens(batch.tokens)
        if batch.pool_index is not None:
            visual = self.encode_images(batch, cp_group).to(x.dtype)
            flat = x.flatten(0, 1)                                               # [B x L, width]
            if self.config.recipe == 'nano':
                flat = flat.index_copy(0, batch.visual_index, visual)
            elif self.config.recipe == 'molmo2':
                flat = flat.index_add(0, batch.visual_index, visual)
            return flat.view_as(x)
        if self.trains_on_pictures():
            # Under DDP and FSDP all ranks must run the same modules, because they exchange
            # gradients and weights in the same order. So a batch of text alone runs tower and
            # connector on a dummy picture, times 0.
            visual = self.encode_images(self.dummy_picture(), cp_group)
            x = x + 0 * visual.sum().to(x.dtype)
        return x

    def trains_on_pictures(self):
        connector_is_trained = any(p.requires_grad for p in self.multi_modal_projector.parameters())
        return connector_is_trained or self.vision_tower.is_trained()

    def dummy_picture(self):
        """A batch of nothing but a black picture of one patch."""
        device = self.pixel_scale.device
        patch_dim = 3 * self.config.vision.patch_size ** 2
        patches = torch.zeros(1, 1, patch_dim, dtype=torch.uint8, device=device)
        pool_index = torch.zeros(1, self.config.pooling ** 2, dtype=torch.long, device=device)
        return Batch(patches=patches, grid=(1, 1), pool_index=pool_index)

    def make_mask(self, batch, cp_group=None):
        """The mask of a batch for all layers, in the form that `choose_attention` says."""
        visual = None
        if self.config.recipe == 'molmo2':
            row_tokens = batch.tokens if batch.row_tokens is None else batch.row_tokens
            visual = torch.isin(row_tokens, self.visual_ids)
        form = choose_attention(self.config.recipe, batch.tokens.device, batch.causal, self.fast)
        if form == 'causal':
            mask = 'causal'
        elif form == 'dense':
            mask = dense_mask(batch.document_ids, batch.branch_ids, visual)
        elif form == 'pieces':
            from extra.kernels import PackedTreeAttention        # the mask as small dense pieces
            mask = PackedTreeAttention(batch.document_ids, batch.branch_ids)
        elif form == 'flex':
            from extra.kernels import block_mask                 # the mask as compiled blocks
            mask = block_mask(batch.document_ids, batch.branch_ids, visual)
        if cp_group is not None:
            from parallel import Ulysses                         # several ranks share these rows
            mask = Ulysses(mask, cp_group)
        return mask

    def hidden_states(self, batch, output_positions=None, cp_group=None):
        """After the final norm: [B, L, width] of all tokens, or [N, width] of those at
        `output_positions` [N]."""
        x = self.embed(batch, cp_group)
        mask = self.make_mask(batch, cp_group)
        return self.language_model(x, batch.position_ids, mask, output_positions=output_positions)

    def output_weight(self):
        """The matrix [vocabulary, width] that turns hidden states into logits: its own, or the
        table of embeddings."""
        if self.lm_head is not None:
            return self.lm_head.weight
        table = self.language_model.embed_tokens.weight
        if self.config.language.extra_vocab_size:
            table = table[:self.config.language.vocab_size]
        return table

    def logits(self, hidden):
        return F.linear(hidden, self.output_weight().to(hidden.dtype))

    def forward(self, batch, weight_factor=1., z_loss=0., cp_group=None):
        """The training loss of a batch, as `plain_loss` says it, with each loss weight multiplied
        by `weight_factor`: (loss, cross entropy of each token of batch.loss_index [N]). Logits are
        computed only where there is a loss.

        weight_factor: train.py passes 1 / (weight of all tokens of the step), and what its ranks
        and float16 need besides. cp_group: see `encode_images`.
        """
        hidden = self.hidden_states(batch, batch.loss_index, cp_group)            # [N, width]
        targets = batch.targets.flatten()[batch.loss_index]
        loss_weights = batch.loss_weights.flatten()[batch.loss_index] * weight_factor
        if not self.fast:
            return plain_loss(hidden, self.output_weight(), targets, loss_weights, z_loss)
        from extra.kernels import chunked_loss       # the same, a chunk of logits at a time
        return chunked_loss(hidden, self.output_weight(), targets, loss_weights, z_loss)

    # -- answers

    @torch.inference_mode()
    def generate(self, batch, max_new_tokens, temperature=0., top_k=0, top_p=1., seed=0):
        """The plain way to answer: every token is a likely one after all that stands before it,
        which is encoded anew for each token. `generate` in extra/engine.py gives the same tokens
        from a cache, much sooner.

        The rows of the batch have no padding and end where their answers begin. Yields the next
        tokens [B] until all answers have ended with eos_token_id; -1 for one that ended before.
        """
        def append(x, column):
            return torch.cat([x, column], 1)                                 # [B, L + 1]
        device = batch.tokens.device
        generator = torch.Generator(device).manual_seed(seed)
        ended = torch.zeros(len(batch.tokens), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            hidden = self.hidden_states(batch)[:, -1]                # [B, width]
            logits = self.logits(hidden).float()
            token = sample_token(logits, temperature, top_k, top_p, generator)   # [B]
            yield token.masked_fill(ended, -1)
            ended = ended | (token == self.config.eos_token_id)
            if ended.all():
                return
            # The new token stands behind the last one, in the same document and branch
            batch = replace(batch, tokens=append(batch.tokens, token[:, None]),
                            position_ids=append(batch.position_ids, batch.position_ids[:, -1:] + 1),
                            document_ids=append(batch.document_ids, batch.document_ids[:, -1:]),
                            branch_ids=append(batch.branch_ids, batch.branch_ids[:, -1:]))

    # -- weights

    def parts(self):
        """{part: its parameters}: the three parts that have a learning rate each. A tied table
        belongs to language."""
        head = [] if self.lm_head is None else list(self.lm_head.parameters())
        return {'vision': list(self.vision_tower.parameters()),
                'connector': list(self.multi_modal_projector.parameters()),
                'language': list(self.language_model.parameters()) + head}

    def blocks(self):
        return [*self.vision_tower.encoder['layers'], *self.language_model.layers]

    def set_trained(self, settings):
        """Switches gradients on for the parts whose train_* setting is on, and off for the others.
        """
        for part, parameters in self.parts().items():
            for p in parameters:
                p.requires_grad_(settings[f'train_{part}'])
        train_table = settings['train_language'] and settings['train_embedding']
        self.language_model.embed_tokens.requires_grad_(train_table)

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Random weights for training from nothing, drawn on the CPU, so that any device and any
        share of the parameters gets the same numbers:

            biases                                   0
            norms                                    1
            decoder and tables of embeddings         normal, std 0.02, as Qwen3's configuration says
            last matrix of attention and of the MLP  0, so that a vision block begins as the
            in each vision block                     identity
            patch embedding                          normal, std 0.2: patches louder than positions
            table of positions of the tower          sines and cosines, easy for a linear layer
            other matrices of tower and connector    normal, std 1 / sqrt(inputs): vectors keep
                                                     their length

        The tower gets such care because a tower that starts at random learns slowest of all parts.
        """
        generator = torch.Generator().manual_seed(seed)
        grid = self.vision_tower.embeddings.grid
        for name, p in self.named_parameters():
            x = torch.zeros(p.shape, device='cpu')
            if name.endswith(('bias', 'out_proj.weight', 'fc2.weight')):
                pass
            elif 'norm' in name:
                x.fill_(1)
            elif 'patch_embedding' in name:
                x.normal_(0, .2, generator=generator)
            elif 'language_model' in name or 'embed' in name or 'lm_head' in name:
                x.normal_(0, .02, generator=generator)
            else:
                x.normal_(0, p.shape[1] ** -.5, generator=generator)
            if name.endswith('position_embedding.weight'):
                x[-grid * grid:] = sincos_positions(grid, x.shape[1])
            shard, first = local_shard(p)
            shard.copy_(x[first:first + len(shard)])


def sincos_positions(grid, width):
    """[grid x grid, width]: sines and cosines of a patch's row in one half, of its column in the
    other (He et al. 2022, MAE). The longest wave has 100 x 2 pi patches, and not their 10,000,
    because a grid has a few tens of patches a side."""
    frequency = 100 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                          # [grid, width / 4]
    one_axis = torch.cat([angle.sin(), angle.cos()], 1)                      # [grid, width / 2]
    rows = one_axis.repeat_interleave(grid, 0)
    columns = one_axis.repeat(grid, 1)
    return torch.cat([rows, columns], 1)


# --------------------------------------------------------------------------------------------------
# Devices, dtypes, sharded parameters, files

def pick_device(name='auto'):
    """The device of that name, or the fastest one there is, made ready for use."""
    if name == 'auto':
        name = 'cpu'
        if torch.backends.mps.is_available():
            name = 'mps'
        if torch.cuda.is_available():
            name = 'cuda'
    device = torch.device(name)
    if device.type == 'cuda':
        # torch prefers cuDNN's attention on Hopper, which builds a plan for every new shape (half a
        # second each, and our numbers of crops and lengths of prompts keep changing). Flash
        # attention is as fast for them and builds nothing.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device):
    """The dtype that matrix products are computed in while weights stay wider (mixed precision).
    'auto': bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16),
    else float32."""
    names = ('bfloat16', 'float16', 'float32')
    if name in names:
        return getattr(torch, name)
    if name != 'auto':
        raise UserError(f"dtype = '{name}' is not one of auto, {', '.join(names)}")
    fast = False
    if device.type == 'cpu':
        fast = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()
    if device.type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def pick_weights_dtype(name, device):
    """The dtype of weights that only answer. 'auto': bfloat16 on CUDA, because
    attention in float32 has no flash kernel there and would hold every score of a long prompt at
    once; float32 elsewhere."""
    if name == 'auto' and device.type != 'cuda':
        return torch.float32
    return pick_dtype(name, device)


def autocast_device(x):
    """The type of x's device, for autocast, which does not know meta tensors."""
    return 'cpu' if x.is_meta else x.device.type


def compute_dtype(x):
    """The dtype of x's matrix products: autocast's inside autocast, else x's own."""
    device = autocast_device(x)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def local_shard(p):
    """(the rows of a parameter that this process holds, the number of the first one): all of them,
    or FSDP's share."""
    # A sharded parameter is a DTensor; asking for its class would load a module that is slow to load
    if not hasattr(p, 'full_tensor'):
        return p, 0
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    # Rounded up, as torch.chunk does: the last rank may get none
    rows = -(-len(p) // p.device_mesh.size(dim))
    first = min(len(p), rows * p.device_mesh.get_local_rank(dim))
    return p.to_local(), first


def full_tensor(p):
    """A parameter, a gradient or a norm as one tensor. All ranks must call this together for a
    sharded one, because each holds a part of it."""
    if hasattr(p, 'full_tensor'):
        return p.detach().full_tensor()
    return p.detach()


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {Path(path).parent} is not a checkpoint folder") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None


if __name__ == '__main__':
    try:
        from extra.plan import main                      # tables of parameters and memory
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
