"""The model: a ViT that sees, a connector that translates, a Qwen3 decoder that talks.

    patches [num_crops, num_patches, patch_dim] uint8
       │  VisionTransformer   CLIP or SigLIP2, features of one or more layers
       ▼
    features [num_crops, num_patches, vision width x layers]
       │  Connector           each visual token pools the patches that `pool_index` names: mean + linear, mean + MLP,
       ▼                      or Molmo2's attention pooling + SwiGLU
    visual tokens [num_visual_tokens, width]
       │  written into (nano) or added to (molmo2) the embeddings of the placeholder tokens
       ▼
    Decoder                   Qwen3: RMSNorm, rotary positions, q/k norm, grouped-query attention, SwiGLU
       ▼
    hidden [B, L, width]  ->  logits only where there is a loss weight, a chunk at a time

Notable: the ViT takes patches, so its convolution is a linear layer; layers above the last feature layer are not built;
the mask is made once per batch by `make_mask` and handed down; parameter names are Hugging Face's, so loading a
checkpoint is a rule of prefixes (`RULES`) and a saved folder opens in transformers. No data handling here.

    python model.py [config/stage1.py] [--key=value]     parameters, what trains, memory by stage
"""
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from configurator import UserError

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
        # torch prefers cuDNN's attention on Hopper, which builds a plan for every new shape (half a second each, and our
        # numbers of crops and lengths of prompts keep changing). Flash attention is as fast for them and builds nothing.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device):
    """'auto': bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16), else float32."""
    names = 'bfloat16', 'float16', 'float32'
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
    """The type of weights that are only asked, not trained. 'auto': bfloat16 on CUDA, because attention in float32 has no
    flash kernel there and would hold every score of a long prompt at once; float32 elsewhere."""
    if name == 'auto' and device.type != 'cuda':
        return torch.float32
    return pick_dtype(name, device)


def autocast_device(x):
    return 'cpu' if x.is_meta else x.device.type           # autocast knows no meta tensors


def compute_dtype(x):
    """What products of x run in: autocast's type inside autocast, else x's own."""
    device = autocast_device(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Sizes. Figures from the released config.json files and transformers 5.23 (CLIP, SigLIP, Qwen3).

@dataclass
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int                        # of the released tower; only those up to the last feature layer are built
    num_heads: int
    image_size: int                        # pixels a side of the position table
    patch_size: int
    style: str = 'clip'                    # clip: class token, LayerNorm after the embeddings, patches without bias
    activation: str = 'quick_gelu'
    layer_norm_eps: float = 1e-5
    feature_layers: tuple = (-2,)          # blocks whose outputs are concatenated; negative counts from the end

    def __post_init__(self):
        self.feature_layers = tuple(range(self.num_layers)[i] for i in self.feature_layers)
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
    extra_vocab_size: int = 0              # rows of the embedding beyond the output's vocabulary (molmo2)
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960


def _siglip2(hidden, mlp, layers, heads, image):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, image_size=image,
                patch_size=14, style='siglip', activation='gelu_pytorch_tanh', layer_norm_eps=1e-6)


def _clip(hidden, mlp, layers, heads, image, patch):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, image_size=image,
                patch_size=patch)


def _qwen3(hidden, mlp, layers, heads, tied=True, theta=1e6, positions=40960):
    return dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads, num_kv_heads=8,
                tie_word_embeddings=tied, rope_theta=theta, max_position_embeddings=positions)


VISION = {                                 #            width   mlp  layers heads image patch
    'openai/clip-vit-large-patch14-336': _clip(          1024, 4096, 24, 16, 336, 14),
    'openai/clip-vit-large-patch14': _clip(              1024, 4096, 24, 16, 224, 14),
    'google/siglip2-so400m-patch14-384': _siglip2(       1152, 4304, 27, 16, 378),
}
LANGUAGE = {                               #            width   mlp  layers heads
    'Qwen/Qwen3-0.6B': _qwen3(                           1024, 3072, 28, 16),
    'Qwen/Qwen3-1.7B': _qwen3(                           2048, 6144, 28, 16),
    'Qwen/Qwen3-4B': _qwen3(                             2560, 9728, 36, 32),
    'Qwen/Qwen3-4B-Instruct-2507': _qwen3(               2560, 9728, 36, 32, theta=5e6, positions=262144),
    'Qwen/Qwen3-8B': _qwen3(                             4096, 12288, 36, 32, tied=False),
}
# Pixels are scaled as the tower was trained: (x / 255 - mean) / std
PIXEL_STATS = {'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
               'siglip': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
# The visual tokens of the released Molmo2 tokenizer: all but the text placeholders 151941 and 151945
MOLMO2_VISUAL_IDS = (151936, 151937, 151938, 151939, 151940, 151942, 151943, 151944)


@dataclass
class Config:
    vision: VisionConfig
    language: LanguageConfig
    recipe: str = 'nano'                   # nano: features replace the placeholder's embedding, causal
    #                                        molmo2: features are added to it, visual tokens see one another
    connector: str = 'linear'              # linear | mlp (both after a mean over the window) | molmo2
    connector_size: int = 0                # width inside molmo2's SwiGLU; 0: as the decoder's
    pooling: int = 2                       # window of an image, in patches a side
    image_token_id: int = 151655           # <|image_pad|> or <im_patch>
    video_token_id: int = 151656
    eos_token_id: int = 151645             # <|im_end|>
    pad_token_id: int = 151643             # <|endoftext|>
    visual_token_ids: tuple = ()           # molmo2: tokens that see one another

    def __post_init__(self):
        if isinstance(self.vision, dict):
            self.vision = VisionConfig(**self.vision)
        if isinstance(self.language, dict):
            self.language = LanguageConfig(**self.language)
        self.connector_size = self.connector_size or self.language.intermediate_size
        self.visual_token_ids = tuple(self.visual_token_ids or MOLMO2_VISUAL_IDS) if self.recipe == 'molmo2' else ()
        for name, value, known in (('recipe', self.recipe, ('nano', 'molmo2')),
                                   ('connector', self.connector, ('linear', 'mlp', 'molmo2'))):
            if value not in known:
                raise UserError(f"{name} = '{value}' is not one of {', '.join(known)}")


def make_config(vision, language, **rest):
    """A Config from names in the tables above, or from dicts of sizes."""
    def size(table, value, what):
        if isinstance(value, str):
            if value not in table:
                raise UserError(f"{what} = '{value}' is not in the table of model.py; it has: {', '.join(table)}")
            return table[value]
        return value
    vision = dict(size(VISION, vision, 'vision'))
    if rest.get('recipe') == 'molmo2':
        vision.setdefault('feature_layers', (-3, -9))
    return Config(vision, size(LANGUAGE, language, 'language'), **rest)


# ---------------------------------------------------------------------------------------------------------------------
# Attention and its mask

def mask_rule(document_ids, branch_ids, visual=None):
    """sees(row, head, i, j): may query i look at key j? In the form that FlexAttention takes.

    Yes when both are of one document, and j <= i (or, if `visual` is given, both are visual tokens: the molmo2
    recipe), and j is in the document's shared part (branch 0) or on i's own branch.
    """
    def sees(b, head, i, j):
        order = j <= i
        if visual is not None:
            order = order | (visual[b, i] & visual[b, j])
        same = document_ids[b, i] == document_ids[b, j]
        return same & order & ((branch_ids[b, j] == 0) | (branch_ids[b, i] == branch_ids[b, j]))
    return sees


def make_mask(document_ids, branch_ids, visual=None):
    """Who sees whom in a packed batch by `mask_rule`, once for all layers.

    document_ids, branch_ids [B, L] int, visual [B, L] bool or None. Padding is document -1 and sees itself, so that no
    row of the softmax is empty.
    Returns a dense boolean [B, 1, L, L] on the CPU, a FlexAttention block mask (no L x L array) on CUDA.
    """
    B, L = document_ids.shape
    sees = mask_rule(document_ids, branch_ids, visual)
    if document_ids.is_cuda:
        global _flex_attention, _create_block_mask
        if _flex_attention is None:
            _flex_attention = torch.compile(flex_attention)
            _create_block_mask = torch.compile(create_block_mask)
        return _create_block_mask(sees, B, None, L, L, device=document_ids.device)
    b, i, j = torch.arange(B)[:, None, None], torch.arange(L)[:, None], torch.arange(L)
    return sees(b, None, i, j)[:, None]                                                          # [B, 1, L, L]


# Both are compiled for the first mask on CUDA, because torch's compiler takes seconds to load
_flex_attention = None
_create_block_mask = None
# For fewer than 128 queries torch would take its decoding kernel, which cannot be compiled for 65 to 127 of them where
# query heads share a key head: its block of 2 x length, rounded to a power of 2, does not divide the mask's 128.
FLEX_OPTIONS = {'FORCE_USE_FLEX_ATTENTION': True}


def attention(query, key, value, mask):
    """query [B, heads, L, D], key and value [B, kv heads, S, D] -> [B, heads, L, D].

    mask: None (all see all), 'causal', boolean [B, 1, L, S], a block mask, or what can `attend`. Query head h reads key
    head h // (heads / kv heads).
    """
    if hasattr(mask, 'attend'):
        return mask.attend(query, key, value)
    if isinstance(mask, BlockMask):
        return _flex_attention(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1],
                               kernel_options=FLEX_OPTIONS)
    if mask is None and query.device.type == 'cpu' and query.requires_grad:
        from extra.kernels import small_attention          # scores spelled out, whose backward pass is faster on a CPU
        return small_attention(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask if torch.is_tensor(mask) else None,
                                          is_causal=isinstance(mask, str), enable_gqa=query.shape[1] != key.shape[1])


def runs_again(recompute, i):
    """Does block i keep its inputs alone and compute the rest again in the backward pass? Every `recompute`-th."""
    return recompute and i % recompute == 0 and torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Vision

ACTIVATION = {
    'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x),
    'gelu': F.gelu,
    'gelu_pytorch_tanh': lambda x: F.gelu(x, approximate='tanh'),
}


def crop_attention(query, key, value, shapes):
    """Attention inside each crop. query, key, value [T, heads, d] of all; shapes [(N, P), ..]: first N crops of P tokens
    each, then others."""
    seen, sizes = [], [n * p for n, p in shapes]
    for shape, *qkv in zip(shapes, *(x.split(sizes) for x in (query, key, value))):
        x = attention(*(x.unflatten(0, shape).transpose(1, 2) for x in qkv), None)               # [N, heads, P, d]
        seen.append(x.transpose(1, 2).flatten(0, 1))
    return torch.cat(seen)                                                                       # [T, heads, d]


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, shapes):
        """x [T, D] the tokens of all crops, shapes as in `crop_attention`."""
        x = x.to(compute_dtype(x))
        query, key, value = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(crop_attention(query, key, value, shapes).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATION[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x, shapes):
        x = x + self.self_attn(self.layer_norm1(x), shapes)
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.grid = config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(3 * config.patch_size ** 2, config.hidden_size, bias=config.style != 'clip')
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.style == 'clip' else None
        rows = self.grid ** 2 + (config.style == 'clip')   # row 0 belongs to the class token
        self.position_embedding = nn.Embedding(rows, config.hidden_size)

    def positions(self, grid):
        """The position table [rows, D], its patch part resized (bicubic) when the picture's grid differs."""
        table = self.position_embedding.weight
        if grid == (self.grid, self.grid):
            return table
        first, table = table[:-self.grid ** 2], table[-self.grid ** 2:]
        table = table.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)                      # [1, D, g, g]
        table = F.interpolate(table.float(), size=grid, mode='bicubic', align_corners=False).to(first.dtype)
        return torch.cat([first, table.flatten(2)[0].T])

    def forward(self, patches, grid):
        x = self.patch_embedding(patches)                                                        # [N, P, D]
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)        # [N, 1 + P, D]
        return x + self.positions(grid)


def sincos_positions(grid, width):
    """[grid x grid, width]: sines and cosines of the row in one half, the column in the other (MAE, He et al. 2022)."""
    frequency = 100 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                                              # [grid, width / 4]
    one = torch.cat([angle.sin(), angle.cos()], 1)                                               # [grid, width / 2]
    return torch.cat([one.repeat_interleave(grid, 0), one.repeat(grid, 1)], 1)


class VisionTransformer(nn.Module):
    """CLIP (Radford et al. 2021) and SigLIP2 (Tschannen et al. 2025) towers.

    forward: [(patches [N, P, patch_dim] as the tower wants its pixels, grid (rows, columns) of the P), ..], crops of
    each size -> [sum of N P, hidden_size x len(feature_layers)], all patches in order, the class tokens dropped.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, 0            # as Decoder's
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.style == 'clip' else None
        self.encoder = nn.ModuleDict({'layers': nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))})

    def forward(self, crops):
        x = [self.embeddings(*crop) for crop in crops]                                           # [N, P, D]
        shapes = [y.shape[:2] for y in x]
        x = torch.cat([y.flatten(0, 1) for y in x])                                              # [T, D]
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        outputs = {}
        for i, block in enumerate(self.encoder['layers']):
            x = checkpoint(block, x, shapes, use_reentrant=False) if runs_again(self.recompute, i) else block(x, shapes)
            if i in self.config.feature_layers:
                outputs[i] = x
        x = torch.cat([outputs[i] for i in self.config.feature_layers], -1)
        if self.config.style == 'clip':
            x = torch.cat([y.unflatten(0, shape)[:, 1:].flatten(0, 1)
                           for y, shape in zip(x.split([n * p for n, p in shapes]), shapes)])
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Connector

class AttentionPooling(nn.Module):
    """Molmo2's pooling: the mean of a window attends to the window (transformers, Molmo2Adapter)."""

    def __init__(self, config):
        super().__init__()
        inside, width = config.vision.feature_size, config.vision.hidden_size
        self.num_heads = config.vision.num_heads
        for name in ('q_proj', 'k_proj', 'v_proj'):
            setattr(self, name, nn.Linear(inside, width))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x, valid):                                                    # [T, W, inside], [T, W] bool
        mean = x.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp(min=1)                 # [T, 1, inside]
        query, key, value = (f(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)            # [T, heads, ., d]
                             for f, y in ((self.q_proj, mean), (self.k_proj, x), (self.v_proj, x)))
        x = attention(query, key, value, valid[:, None, None])                                   # [T, heads, 1, d]
        return self.o_proj(x.flatten(1))                                                         # [T, width]


class SwiGLU(nn.Module):
    def __init__(self, inside, hidden, outside):
        super().__init__()
        self.gate_proj = nn.Linear(inside, hidden, bias=False)
        self.up_proj = nn.Linear(inside, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, outside, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Connector(nn.Module):
    """features [patches, C] of all crops, pool_index [T, W] into them (-1: nothing there) -> [T, width]."""

    def __init__(self, config):
        super().__init__()
        inside, width = config.vision.feature_size, config.language.hidden_size
        self.kind = config.connector
        if self.kind == 'molmo2':
            self.image_pooling_2d = AttentionPooling(config)
            self.image_projector = SwiGLU(config.vision.hidden_size, config.connector_size, width)
        else:
            self.linear_1 = nn.Linear(inside, width)
            if self.kind == 'mlp':
                self.linear_2 = nn.Linear(width, width)

    def forward(self, features, pool_index):
        valid = pool_index >= 0
        x = features.index_select(0, pool_index.clamp(min=0).flatten())
        x = x.unflatten(0, pool_index.shape) * valid[..., None]                                  # [T, W, C]
        if self.kind == 'molmo2':
            return self.image_projector(self.image_pooling_2d(x, valid))
        x = x.squeeze(1) if x.shape[1] == 1 else x.sum(1) / valid.sum(1, keepdim=True)           # [T, C]
        x = self.linear_1(x)
        return self.linear_2(F.gelu(x)) if self.kind == 'mlp' else x


# ---------------------------------------------------------------------------------------------------------------------
# Language: Qwen3 (technical report, arXiv 2505.09388; tensor for tensor as in transformers' qwen3)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        if x.device.type == 'cpu' and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            from extra.kernels import RMSNormCPU           # the same in half the passes over memory
            x = RMSNormCPU.apply(x, self.weight, self.eps)
        else:
            # Outside autocast, because torch 2.13's casts queries and keys to float32 here and keeps those copies
            with torch.autocast(autocast_device(x), enabled=False):
                x = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return x.to(compute_dtype(x))      # once, rather than by each product that reads it


def rotary_table(position_ids, head_dim, theta):
    """cos and sin [B, L, 1, head_dim] of Su et al. 2021; dimension d turns together with d + head_dim / 2."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim)
    angle = position_ids[..., None, None].float() * frequency                                    # [B, L, 1, d / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of the last dimension; the table holds the sign."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([b, a], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d, bias=False)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, rotary, mask, extend=None, rows=None):
        query, key, value = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(self.q_norm(query), *rotary), rotate(self.k_norm(key), *rotary)      # [B, L, heads, d]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))                     # [B, heads, L, d]
        if extend is not None:
            key, value = extend(key, value)
        x = attention(query, key, value, mask).transpose(1, 2).flatten(2)                        # [B, L, heads x d]
        return self.o_proj(x if rows is None else x.flatten(0, 1).index_select(0, rows))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x, rotary, mask, extend=None, rows=None, dropout=0.):
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, extend, rows)
        x = (x if rows is None else x.flatten(0, 1).index_select(0, rows)) + F.dropout(attended, dropout)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout)


class Decoder(nn.Module):
    """x [B, L, width] of embeddings -> hidden states after the final norm, of all or of flat places `rows` [N, width].

    With `rows` the last block drops the other tokens once they have been attended to: nobody reads what they become.
    `recompute` = n > 0 keeps only the inputs of every n-th block for the backward pass and computes the rest again.
    `dropout` is the share of what a block adds that is dropped in training.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute, self.dropout = 0, 0.
        self.embed_tokens = nn.Embedding(config.vocab_size + config.extra_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, position_ids, mask, extend=None, rows=None):
        rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        rotary = [t.to(compute_dtype(x)) for t in rotary]   # as queries and keys: no wider products, no copies
        dropout = self.dropout if self.training else 0.
        for i, block in enumerate(self.layers):
            keep = rows if i == len(self.layers) - 1 else None
            if runs_again(self.recompute, i):
                x = checkpoint(block, x, rotary, mask, None, keep, dropout, use_reentrant=False)
            else:
                x = block(x, rotary, mask, extend and partial(extend, i), keep, dropout)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The whole

class VLM(nn.Module):
    """See, connect, talk. A batch is a dict of tensors (data.py makes them; B rows of L tokens):

    tokens, targets, loss_weights, position_ids, document_ids, branch_ids [B, L]
    patches [num_crops, num_patches, patch_dim] uint8      grid (rows, columns) of patches in a crop
    frames, frame_grid                                     likewise, of crops of another size: frames of videos
    pool_index [num_visual_tokens, window]                 patches of each visual token, -1 for none; first those of all
                                                           patches are counted, then those of all frames
    visual_index [num_visual_tokens]                       its place in the flattened B x L tokens
    loss_index [num_loss_tokens]                           flat places with a loss weight
    causal bool                                            no branches and one document a row: the mask is plain
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTransformer(config.vision)
        self.multi_modal_projector = Connector(config)
        self.language_model = Decoder(config.language)
        self.lm_head = None
        if not config.language.tie_word_embeddings:
            self.lm_head = nn.Linear(config.language.hidden_size, config.language.vocab_size, bias=False)
        self.chunk = 1024                  # rows of logits alive at once
        self.z_loss = 0.
        self.loss_scale = 1.               # float16 has no numbers below 6e-8: gradients travel this much larger
        self.always_see = False            # even where there is nothing to be seen: see `blank`
        self.group = None                  # of the ranks that share each row, if there are (data.py, share_rows)
        self.set_buffers()

    def set_buffers(self, device=None):
        """Constants, not weights: (pixel scale, pixel shift) [patch_dim] and the ids of visual tokens."""
        device = device or self.vision_tower.embeddings.patch_embedding.weight.device
        mean, std = torch.tensor(PIXEL_STATS[self.config.vision.style]).repeat(1, self.config.vision.patch_size ** 2)
        self.register_buffer('pixel_scale', (1 / (255 * std)).to(device), persistent=False)
        self.register_buffer('pixel_shift', (-mean / std).to(device), persistent=False)
        self.register_buffer('visual_ids', torch.tensor(self.config.visual_token_ids).to(device), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Random weights for training from nothing. Norms 1, biases 0, decoder N(0, 0.02) as Qwen3's own configuration.

        The tower is what learns slowest from few pictures. It starts with matrices that keep a vector's length
        (N(0, 1 / inputs)), patches louder than positions, blocks that are the identity (their last matrices are 0), and
        positions as sines that a linear layer can read.
        """
        generator, grid = torch.Generator().manual_seed(seed), self.vision_tower.embeddings.grid
        for name, p in self.named_parameters():
            x = torch.zeros(p.shape, device='cpu')         # the same numbers on any device and for any share of them
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
            mine, first = held(p)
            mine.copy_(x[first:first + len(mine)])

    def parts(self):
        """name -> parameters, in the three parts that have a learning rate of their own. The tied table is language."""
        head = [] if self.lm_head is None else list(self.lm_head.parameters())
        return {'vision': list(self.vision_tower.parameters()),
                'connector': list(self.multi_modal_projector.parameters()),
                'language': list(self.language_model.parameters()) + head}

    def blocks(self):
        return [*self.vision_tower.encoder['layers'], *self.language_model.layers]

    def set_trained(self, settings):
        """Gradients for the parts whose train_* setting is on, for the table of embeddings by train_embedding too."""
        for part, parameters in self.parts().items():
            for p in parameters:
                p.requires_grad_(settings[f'train_{part}'])
        self.language_model.embed_tokens.requires_grad_(settings['train_language'] and settings['train_embedding'])
        self.always_see = settings['train_vision'] or settings['train_connector']

    def see(self, batch):
        """uint8 patches and frames -> visual tokens [num_visual_tokens, width]."""
        weight = self.vision_tower.embeddings.patch_embedding.weight
        crops = [((batch[x] * self.pixel_scale + self.pixel_shift).to(weight.dtype), tuple(batch[grid]))
                 for x, grid in (('patches', 'grid'), ('frames', 'frame_grid')) if x in batch]
        with torch.set_grad_enabled(weight.requires_grad and torch.is_grad_enabled()):
            features = self.vision_tower(crops)                                                  # [all patches, C]
            if self.group is not None:
                from parallel import AllGather             # each rank encoded its share of the crops
                features = AllGather.apply(features, self.group)
        return self.multi_modal_projector(features, batch['pool_index'])

    def embed(self, batch):
        """Token embeddings [B, L, width] with the visual tokens in their places."""
        x = self.language_model.embed_tokens(batch['tokens'])
        if 'pool_index' in batch:
            seen = self.see(batch).to(x.dtype)
            flat, where = x.flatten(0, 1), batch['visual_index']
            flat = flat.index_add(0, where, seen) if self.config.recipe == 'molmo2' else flat.index_copy(0, where, seen)
            x = flat.view_as(x)
        elif self.always_see:
            x = x + 0 * self.see(self.blank()).sum().to(x.dtype)
        return x

    def blank(self):
        """A black picture of one patch. Where tower or connector are trained, text alone sees it times nothing: their
        gradients are then zero and not missing, and ranks that did see pictures do not wait in vain for this one."""
        dev, v = self.pixel_scale.device, self.config.vision
        return {'patches': torch.zeros(1, 1, 3 * v.patch_size ** 2, dtype=torch.uint8, device=dev), 'grid': (1, 1),
                'pool_index': torch.zeros(1, self.config.pooling ** 2, dtype=torch.long, device=dev)}

    def mask(self, batch):
        visual = None
        if self.config.recipe == 'molmo2':
            visual = torch.isin(batch.get('row_tokens', batch['tokens']), self.visual_ids)
        if visual is None and batch['causal']:
            mask = 'causal'
        elif visual is None and batch['tokens'].device.type == 'cpu':
            from extra.kernels import Segments             # the mask as small dense pieces
            mask = Segments(batch['document_ids'], batch['branch_ids'])
        else:
            mask = make_mask(batch['document_ids'], batch['branch_ids'], visual)
        if self.group is None:
            return mask
        from parallel import Ulysses                       # rows shared by several ranks
        return Ulysses(mask, self.group)

    def hidden(self, batch, rows=None):
        """Hidden states [B, L, width] of every token, or of `rows` of the flattened B x L tokens alone."""
        return self.language_model(self.embed(batch), batch['position_ids'], self.mask(batch), rows=rows)

    def output_weight(self):
        if self.lm_head is not None:
            return self.lm_head.weight
        table = self.language_model.embed_tokens.weight
        return table[:self.config.language.vocab_size] if self.config.language.extra_vocab_size else table

    def logits(self, hidden, linear=F.linear):
        return linear(hidden, self.output_weight().to(hidden.dtype))

    def forward(self, batch):
        """The training loss: (sum of loss_weights x loss_scale x cross entropy, cross entropy of each of loss_index)."""
        where = batch['loss_index']
        targets, weights = (batch[k].flatten()[where] for k in ('targets', 'loss_weights'))
        from extra.kernels import WeightedCrossEntropy     # with its gradient in one pass, a chunk at a time
        return WeightedCrossEntropy.apply(self.hidden(batch, where), self.output_weight(), targets,
                                          weights * self.loss_scale, self.chunk, self.z_loss)


def held(p):
    """(the rows of a parameter that this process holds, the first one's number): all, or FSDP's share."""
    if not hasattr(p, 'full_tensor'):        # a DTensor, whose module takes a second to load
        return p, 0
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    rows = -(-len(p) // p.device_mesh.size(dim))           # as torch.chunk deals them out: the last may get none
    return p.to_local(), min(len(p), rows * p.device_mesh.get_local_rank(dim))


def whole(p):
    """A parameter, gradient or norm as one tensor; of a sharded one all ranks must ask together."""
    return p.detach().full_tensor() if hasattr(p, 'full_tensor') else p.detach()


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {Path(path).parent} is not a checkpoint folder") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None


def compile_blocks(model, memory_budget=1., **how):
    """Compiles each block, to keep that share of its activations for the backward pass. Not what is around them, nor
    attention in pieces: both differ from batch to batch, or compile what they call themselves."""
    from torch._functorch import config
    config.activation_memory_budget = memory_budget
    # A block is compiled once for each kind of call: training or not, dense, causal or block mask, all tokens or those
    # with a loss, row lengths. Beyond torch's limit of 8 kinds it would run uncompiled from then on, without an error.
    torch._dynamo.config.recompile_limit = 64
    from extra.kernels import Segments
    from parallel import Ulysses
    for owner, name in ((Segments, 'attend'), (Ulysses, 'attend'), (sys.modules[__name__], 'crop_attention')):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    for block in model.blocks():
        block.compile(**how)


if __name__ == '__main__':
    try:
        from extra.plan import main          # tables of parameters and memory
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
