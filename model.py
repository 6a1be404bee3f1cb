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
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


def small_attention(query, key, value, mask):
    """`attention` spelled out. On a CPU the backward pass of SDPA costs 3 to 10 times this one for short pieces in
    bfloat16; for long ones the scores would be too many to keep."""
    N, heads, Q, D = query.shape
    kv_heads, K = key.shape[1:3]
    if Q * K > 2 ** 16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != kv_heads)
    # The heads / kv_heads query heads of a key head follow one another: more rows of the same product
    query = query.reshape(N, kv_heads, -1, D)                                                    # [N, kv, g Q, D]
    scores = (query * D ** -.5) @ key.transpose(2, 3)                                            # [N, kv, g Q, K]
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)       # [N, 1, Q, K]
        scores = scores.view(N, kv_heads, -1, Q, K) + bias[:, :, None]
    return (scores.softmax(-1).view(N, kv_heads, -1, K).to(value.dtype) @ value).view(N, heads, Q, D)


class Segments:
    """The mask of a packed batch as small dense pieces, for the CPU, where a mask skips no work.

    A stretch of tokens of one document and branch sees itself, causally, and the shared part of its document: one
    attention of [queries] over [shared part + queries]. A long shared part goes in blocks of BLOCK queries, to which
    those before them are the shared part: half of its square is never computed. Pieces of similar lengths go through one
    call, padded: to twice the queries and 1.4 times the keys at most. Trees of short conversations cost several times
    less than under a row's dense mask, and the rule is the same.
    """
    BLOCK = 64

    def __init__(self, document_ids, branch_ids):
        B, L = document_ids.shape
        row, document, branch = np.arange(B * L) // L, document_ids.numpy().ravel(), branch_ids.numpy().ravel()
        new = np.diff(row, prepend=-1) | np.diff(document, prepend=-2) | np.diff(branch, prepend=-2)
        start = np.flatnonzero(new)                                                  # of each stretch, in B x L
        length = np.diff(start, append=B * L)
        roots = {(row[i], document[i]): (i, n) for i, n in zip(start, length) if branch[i] == 0}
        shared, shared_length = np.array([roots.get((row[i], document[i]), (0, 0)) if branch[i] else (0, 0)
                                          for i in start]).T
        alone = shared_length == 0
        blocks = np.where(alone, -(-length // self.BLOCK), 1)
        i = np.repeat(np.arange(len(start)), blocks)                                 # the stretch of each block
        before = self.BLOCK * (np.arange(len(i)) - (np.cumsum(blocks) - blocks)[i])  # tokens of the blocks before it
        shared, shared_length = np.where(alone, start, shared)[i], np.where(alone[i], before, shared_length[i])
        length = np.where(alone[i], np.minimum(length[i] - before, self.BLOCK), length[i])
        start = start[i] + before
        self.groups, self.place, base = [], np.empty(B * L, np.int64), 0
        bucket = np.ceil(np.log2(length)) * 64 + np.ceil(2 * np.log2(shared_length + length))
        for b in np.unique(bucket):
            first, n, root, m = (x[bucket == b, None] for x in (start, length, shared, shared_length))
            Q, P = np.arange(n.max()), np.arange(m.max())
            queries = np.minimum(first + Q, first + n - 1)                                       # [N, Q]
            keys = np.concatenate([np.minimum(root + P, B * L - 1), queries], 1)                 # [N, P + Q]
            sees = np.concatenate([np.broadcast_to((P < m)[:, None], (len(n), len(Q), len(P))),
                                   np.broadcast_to(Q <= Q[:, None], (len(n), len(Q), len(Q)))], 2)
            at = base + np.arange(queries.size).reshape(queries.shape)
            self.place[queries[Q < n]] = at[Q < n]
            self.groups.append([torch.from_numpy(x) for x in (queries, keys, sees[:, None])])
            base += queries.size
        self.place = torch.from_numpy(self.place)          # [B L], where each token's result stands in the pieces

    def attend(self, query, key, value):
        """As `attention`; query [B, heads, L, D], key and value [B, kv heads, L, D]."""
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]                    # [B L, heads, D]
        pieces = []
        for queries, keys, sees in self.groups:
            q, k, v = (x.index_select(0, i.flatten()).unflatten(0, i.shape).transpose(1, 2)      # [N, heads, ., D]
                       for x, i in zip(flat, (queries, keys, keys)))
            pieces.append(small_attention(q, k, v, sees).transpose(1, 2).flatten(0, 1))          # [N Q, heads, D]
        return torch.cat(pieces).index_select(0, self.place).unflatten(0, (len(query), -1)).transpose(1, 2)


# their names from torch 2.13 on, and those of before
all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, 'reduce_scatter_single', None) or dist.reduce_scatter_tensor


class AllToAll(torch.autograd.Function):
    """x [N, ...] on each of N ranks -> [N, ...]: piece j of rank i becomes piece i of rank j. Its own inverse, and so
    its own gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, ctx.group), None


class AllGather(torch.autograd.Function):
    """x [n, ...] on each of N ranks -> [N n, ...], the same on all. The gradient of x is the sum of the ranks' for it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(group.size() * len(x), *x.shape[1:])
        all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


@dataclass
class Ulysses:
    """The mask of rows that the N ranks of `group` share, each holding one piece of every row's tokens (Jacobs et al.
    2023, arXiv 2309.14509).

        before      rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads
           │  all-to-all: I give each rank its heads of my tokens, and get my heads of its tokens
           ▼
        attention   rank 0: all tokens, heads 0..1          rank 1: all tokens, heads 2..3
           │  all-to-all back
           ▼
        after       rank 0: tokens 0..3, all heads          rank 1: tokens 4..7, all heads

    In between each rank has whole rows, so any attention under any mask will do. The exchange moves 1 / N of what a
    rank holds to each of the others: more ranks, fewer bytes for each. All else in a decoder is done token by token.
    """
    mask: object                           # of the whole rows: whatever `attention` takes
    group: object                          # a process group

    def attend(self, query, key, value):
        """As `attention`; query [B, heads, L / N, D], key and value [B, kv heads, L / N, D] of this rank's tokens."""
        N = self.group.size()
        # Query heads are dealt out in order, and with them the key heads they read: repeated until N divides them
        repeat = N // math.gcd(key.shape[1], N)
        key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
        mine = torch.cat([x.unflatten(1, (N, -1)) for x in (query, key, value)], 2)              # [B, N, h, L / N, D]
        x = AllToAll.apply(mine.transpose(0, 1), self.group)                                     # [N, B, h, L / N, D]
        x = x.permute(1, 2, 0, 3, 4).flatten(2, 3)                                               # [B, h, L, D]
        x = attention(*x.split([query.shape[1] // N, key.shape[1] // N, key.shape[1] // N], 1), self.mask)
        x = x.unflatten(2, (N, -1)).permute(2, 0, 1, 3, 4)                                # [N, B, heads / N, L / N, D]
        return AllToAll.apply(x, self.group).transpose(0, 1).flatten(1, 2)


# Both are compiled for the first mask on CUDA, because torch's compiler takes seconds to load
_flex_attention = None
_create_block_mask = None
# For fewer than 128 queries torch would take its decoding kernel, which cannot be compiled for 65 to 127 of them where
# query heads share a key head: its block of 2 x length, rounded to a power of 2, does not divide the mask's 128.
FLEX_OPTIONS = {'FORCE_USE_FLEX_ATTENTION': True}


def attention(query, key, value, mask):
    """query [B, heads, L, D], key and value [B, kv heads, S, D] -> [B, heads, L, D].

    mask: None (all see all), 'causal', boolean [B, 1, L, S], a block mask, Segments or Ulysses. Query head h reads key
    head h // (heads / kv heads).
    """
    if isinstance(mask, (Segments, Ulysses)):
        return mask.attend(query, key, value)
    if isinstance(mask, BlockMask):
        return _flex_attention(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1],
                               kernel_options=FLEX_OPTIONS)
    if mask is None and query.device.type == 'cpu' and query.requires_grad:
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

class RMSNormCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) x weight and its gradient. torch has no CPU kernel and passes twice as often over x.

    Not for compiled code: torch 2.11 gives wrong gradients there, without a word, when an autograd function's forward
    works in place (pytorch/pytorch#180642). The compiler fuses torch's own operations into as few passes.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        grad = grad * weight.to(x.dtype)
        along = torch.linalg.vecdot(grad, normal)[..., None] / x.shape[-1]  # the norm does not let x grow along itself
        return grad.addcmul_(normal, -along).mul_(scale), grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        if x.device.type == 'cpu' and torch.is_grad_enabled() and not torch.compiler.is_compiling():
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


class KVCache:
    """Keys and values of the first `length` tokens of each answer. Room for `size` tokens is allocated once."""

    def __init__(self, config, answers, size, dtype, device):
        shape = (config.num_layers, answers, config.num_kv_heads, size, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def extend(self, layer, key, value):
        """Adds keys and values [B, kv heads, L, D]; returns all so far."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length:end] = key
        self.values[layer, :, :, self.length:end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def gather(self, context, layer, key, value):
        """Takes from a batch's keys and values [B, kv heads, L, D] what each answer is to see: `contexts` [Q, S]."""
        for kept, x in ((self.keys, key), (self.values, value)):
            kept[layer, :, :, :context.shape[1]] = x.transpose(1, 2).flatten(0, 1)[context].transpose(1, 2)
        return key, value

    def keep(self, answers):
        self.keys, self.values = self.keys[:, answers], self.values[:, answers]


def contexts(document_ids, branch_ids):
    """What the answers that begin at the end of each branch will see, [Q, S]: places in the flattened [B, L] batch, -1 in
    front of the shorter ones. A document without branches has one answer, at its end."""
    L = document_ids.shape[1]
    next_document, next_branch = (F.pad(x[:, 1:], (0, 1), value=-1) for x in (document_ids, branch_ids))
    ends = (document_ids != next_document) | (branch_ids > 0) & (branch_ids != next_branch)
    row, column = (ends & (document_ids >= 0)).nonzero(as_tuple=True)                            # [Q]
    row, column = row[:, None], column[:, None]
    sees = mask_rule(document_ids, branch_ids)(row, None, column, torch.arange(L, device=row.device))     # [Q, L]
    order = sees.long().argsort(dim=1, stable=True)[:, -int(sees.sum(1).max()):]
    return torch.where(sees.gather(1, order), row * L + order, -1)


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


class Stepper:
    """The decoder for one more token of every answer in a cache, in as few operations as it takes: so small, they cost
    what it costs to start them. What stays the same from step to step is looked up and multiplied out once.

    bias: 0 or -inf for every place that the cache has room for, [B, 1, S], or None.
    """

    def __init__(self, decoder, cache, bias):
        text, self.cache, self.layers = decoder.config, cache, []
        self.bias = bias if bias is None else bias.repeat_interleave(text.num_kv_heads, 0)           # [B kv, 1, S]
        self.embedding, norm = decoder.embed_tokens.weight, partial(quick_norm, text.rms_norm_eps)
        self.linear = packed_linear(self.embedding, cache.keys.shape[1])
        for block, keys, values in zip(decoder.layers, cache.keys, cache.values):
            a, mlp = block.self_attn, block.mlp
            heads = torch.cat([(a.q_norm.weight * a.head_dim ** -.5).expand(text.num_heads, -1),      # attention's own scale
                               a.k_norm.weight.expand(text.num_kv_heads, -1)])
            self.layers.append((norm(block.input_layernorm.weight), joined(a.q_proj, a.k_proj, a.v_proj),
                                norm(heads), keys.flatten(0, 1), values.flatten(0, 1), a.o_proj.weight,
                                norm(block.post_attention_layernorm.weight), joined(mlp.gate_proj, mlp.up_proj),
                                mlp.down_proj.weight))
        self.norm = norm(decoder.norm.weight)

    def __call__(self, token, cos, sin):
        """[B] -> hidden states [B, width]. cos, sin: `rotary_table` of its place, [B, 1, d]."""
        x, n, linear, bias = F.embedding(token, self.embedding), self.cache.length, self.linear, self.bias
        B, _, d = cos.shape
        kv = self.cache.keys.shape[2]
        for norm, qkv, head_norm, keys, values, out, mlp_norm, gate_up, down in self.layers:
            new = linear(norm(x), qkv).view(B, -1, d)                                                # [B, heads + 2 kv, d]
            query_key = head_norm(new[:, :-kv])
            query_key = torch.addcmul(query_key * cos, query_key.roll(d // 2, -1), sin)
            keys[:, n], values[:, n] = query_key[:, -kv:].reshape(-1, d), new[:, -kv:].reshape(-1, d)
            query, seen = query_key[:, :-kv].reshape(B * kv, -1, d), keys[:, :n + 1].transpose(1, 2)
            scores = torch.bmm(query, seen) if bias is None else torch.baddbmm(bias[..., :n + 1], query, seen)
            x = x + linear(torch.bmm(scores.softmax(-1), values[:, :n + 1]).view(B, -1), out)        # [B kv, g, d] before
            gate, up = linear(mlp_norm(x), gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate).mul_(up), down)
        self.cache.length += 1
        return self.norm(x)


def quick_norm(eps, weight):
    """RMSNorm without gradients as a function of x, in as few operations as it takes. weight [width] or [heads, width]."""
    if weight.is_cuda:
        return lambda x: F.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)
    # x / sqrt(|x|^2 + width eps) x weight sqrt(width): half as many as torch's own on a CPU
    width = weight.shape[-1]
    scale, root = weight * width ** .5, torch.tensor((width * eps) ** .5, device=weight.device)

    def norm(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / size.hypot_(root).to(x.dtype)).mul_(scale)
    return norm


def packed_linear(weight, rows):
    """F.linear for products of so many rows with matrices like `weight`, again and again. On a CPU with MKL, matrices in
    its own layout are multiplied with 4 to 64 rows 1.1 to 2.4 times as fast (docs/benchmarks.md). To copy one into it takes
    as long as two to five products: it is done after the fourth, not for a short answer. The copies go with the function."""
    if not (weight.device.type == 'cpu' and weight.dtype == torch.float32 and 4 <= rows <= 64
            and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, '_mkl_linear')
            and not torch.is_autocast_enabled('cpu')):
        return F.linear
    copies = {}

    def linear(x, weight):
        copy = copies.get(key := weight.data_ptr(), 0)                  # until then how often it was met
        if not torch.is_tensor(copy):
            copies[key] = copy + 1 if copy < 4 else torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
            return F.linear(x, weight)
        return torch.ops.mkl._mkl_linear(x, copy, weight, None, rows)
    return linear


def joined(*linears):
    """The weights of linears that read the same input as one matrix. They become parts of it: nothing is held twice."""
    weights = [linear.weight for linear in linears]
    whole = linears[0].__dict__.get('whole')
    if whole is None or whole.dtype != weights[0].dtype or any(
            part.data_ptr() != w.data_ptr() for part, w in zip(whole.split([len(w) for w in weights]), weights)):
        with torch.inference_mode(False), torch.no_grad():           # they may be trained later
            whole = torch.cat([w.detach() for w in weights])
        for part, w in zip(whole.split([len(w) for w in weights]), weights):
            w.data = part
        linears[0].__dict__['whole'] = whole
    return whole


def separate(model):
    """Undoes `joined`: every weight in memory of its own, as training knows it."""
    for p in model.parameters():
        if p.untyped_storage().nbytes() > p.nbytes:
            p.data = p.data.clone()


class WeightedCrossEntropy(torch.autograd.Function):
    """sum of loss_weights x (cross entropy + z_loss x logsumexp^2), and each token's cross entropy, never holding
    [N, vocabulary] at once.

    The gradient of this sum is known as soon as the logits are: (softmax x (1 + 2 z_loss logsumexp) - one hot) x
    weight. So each chunk's logits become their own gradient in place and go through both products at once: three
    products as in the plain way, nothing recomputed, and `chunk` rows of logits instead of N.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_weights, chunk, z_loss=0.):
        # hidden [N, D], weight [V, D], targets [N], loss_weights [N] float32
        dtype = compute_dtype(hidden)
        hidden_, weight_ = hidden.to(dtype), weight.to(dtype)
        nll, z = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits, target = (hidden_[rows] @ weight_.T).float(), targets[rows, None]        # [chunk, V], [chunk, 1]
            at_target, highest = logits.gather(1, target), logits.amax(1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)
            z[rows] = (total.log() + highest)[:, 0]
            nll[rows] = z[rows] - at_target[:, 0]
            if needs_hidden or needs_weight:
                scale = loss_weights[rows, None]
                logits.mul_(scale * (1 + 2 * z_loss * z[rows, None]) / total)
                grad = logits.scatter_add_(1, target, -scale).to(dtype)
                if needs_hidden:
                    grad_hidden[rows] = grad @ weight_
                if needs_weight:
                    grad_weight += grad.T @ hidden_[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return ((nll + z_loss * z.square()) * loss_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (None if grad_hidden is None else grad_hidden * grad,
                None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None)


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
            mask = Segments(batch['document_ids'], batch['branch_ids'])
        else:
            mask = make_mask(batch['document_ids'], batch['branch_ids'], visual)
        return mask if self.group is None else Ulysses(mask, self.group)

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
        return WeightedCrossEntropy.apply(self.hidden(batch, where), self.output_weight(), targets,
                                          weights * self.loss_scale, self.chunk, self.z_loss)

    @torch.inference_mode()
    def generate(self, batch, max_new_tokens, temperature=0., top_k=0, top_p=1., repetition_penalty=1., seed=0, cache=None):
        """Greedily, or by chance, the answers at the end of every branch of a batch (`contexts`), which is encoded once:
        yields their next tokens [Q] until all have ended; -1 for one that has.

        temperature 0 takes the likeliest token. With a cache that holds the first tokens of the only answer, only the
        others are encoded; there must be room for the answer.
        """
        tokens, context = batch['tokens'], contexts(batch['document_ids'], batch['branch_ids'])  # [B, L], [Q, S]
        dev, padding, last, (Q, S) = tokens.device, context < 0, context[:, -1], context.shape
        generator = torch.Generator(dev).manual_seed(seed)
        said = None                        # tokens that were said or read: less likely by the penalty (Keskar et al. 2019)
        if repetition_penalty != 1:
            said = torch.zeros(Q, self.output_weight().shape[0], dtype=torch.bool, device=dev)
            read = tokens.flatten()[context]
            row, column = (~padding & (read < said.shape[1])).nonzero(as_tuple=True)
            said[row, read[row, column]] = True
        if cache is not None and cache.length:
            new, n = tokens[:, cache.length:], cache.length                                      # [1, S - n]
            x, mask = self.language_model.embed_tokens(new), torch.ones(1, 1, S - n, S, dtype=torch.bool, device=dev).tril(n)
            hidden = self.language_model(x, batch['position_ids'][:, n:], mask, cache.extend, last - n)
        else:
            x = self.embed(batch)
            cache = cache or KVCache(self.config.language, Q, S + max_new_tokens, x.dtype, dev)
            hidden = self.language_model(x, batch['position_ids'], self.mask(batch), partial(cache.gather, context), last)
        cache.length = S
        bias = None                        # later steps see all that is not padding
        if padding.any():
            bias = torch.zeros(Q, 1, S + max_new_tokens, dtype=hidden.dtype, device=dev)
            bias[..., :S].masked_fill_(padding[:, None], -torch.inf)
        places = batch['position_ids'].flatten()[last, None] + torch.arange(1, max_new_tokens + 1, device=dev)
        text = self.config.language
        cos, sin = (t.to(hidden.dtype) for t in rotary_table(places, text.head_dim, text.rope_theta))
        going, done = torch.arange(Q, device=dev), torch.zeros(Q, dtype=torch.bool, device=dev)
        stepper = Stepper(self.language_model, cache, bias)
        for step in range(max_new_tokens):
            logits = self.logits(hidden, stepper.linear).float()                                 # [Q, V]
            if said is not None:
                penalty = torch.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
                logits = torch.where(said, logits * penalty, logits)
            token = sample(logits, temperature, top_k, top_p, generator)
            if said is not None:
                said[torch.arange(len(token), device=dev), token] = True
            yield token.new_full((Q,), -1).index_copy(0, going, token.masked_fill(done, -1))
            done = done | (token == self.config.eos_token_id)
            left = len(done) - int(done.sum())
            if step == max_new_tokens - 1 or not left:
                return
            if 2 * left <= len(done):      # half of the rows are read for nothing: go on without them
                stay = (~done).nonzero()[:, 0]
                going, done, token, cos, sin = (x[stay] for x in (going, done, token, cos, sin))
                said, bias = (x if x is None else x[stay] for x in (said, bias))
                cache.keep(stay)
                stepper = Stepper(self.language_model, cache, bias)
            hidden = stepper(token, cos[:, step], sin[:, step])


def compile_blocks(model, memory_budget=1., **how):
    """Compiles each block, to keep that share of its activations for the backward pass. Not what is around them, nor
    attention in pieces: both differ from batch to batch, or compile what they call themselves."""
    from torch._functorch import config
    config.activation_memory_budget = memory_budget
    # A block is compiled once for each kind of call: training or not, dense, causal or block mask, all tokens or those
    # with a loss, row lengths. Beyond torch's limit of 8 kinds it would run uncompiled from then on, without an error.
    torch._dynamo.config.recompile_limit = 64
    for owner, name in ((Segments, 'attend'), (Ulysses, 'attend'), (sys.modules[__name__], 'crop_attention')):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    for block in model.blocks():
        block.compile(**how)


@contextmanager
def uncompiled(model):
    """Blocks run as they are written in here: for batches of lengths that do not come again."""
    compiled = [(block, block._compiled_call_impl) for block in model.blocks()]
    for block, _ in compiled:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call


def sample(logits, temperature, top_k, top_p, generator):
    """logits [B, V] -> token ids [B]. top_p: the smallest set of tokens whose probability reaches it."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = logits.sort(-1, descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
        logits = logits.scatter(1, order, values.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: folders in Hugging Face's layouts (DESIGN: a checkpoint is a model). Never pickle.

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


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {Path(path).parent} is not a checkpoint folder") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None


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


def held(p):
    """(the rows of a parameter that this process holds, the first one's number): all, or FSDP's share."""
    if not hasattr(p, 'full_tensor'):        # a DTensor, whose module takes a second to load
        return p, 0
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    rows = -(-len(p) // p.device_mesh.size(dim))           # as torch.chunk deals them out: the last may get none
    return p.to_local(), min(len(p), rows * p.device_mesh.get_local_rank(dim))


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


def whole(p):
    """A parameter, gradient or norm as one tensor; of a sharded one all ranks must ask together."""
    return p.detach().full_tensor() if hasattr(p, 'full_tensor') else p.detach()


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
# What it costs

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


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
