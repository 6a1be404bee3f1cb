"""Faster forms of what model.py says plainly. Tests hold each equal to its plain form.

    PackedTreeAttention    attention of packed message trees on a CPU, where a dense mask skips no work
    block_mask, flex       the same rule on CUDA, by FlexAttention
    small_attention        attention of short rows on a CPU, with a faster backward pass than SDPA's
    RMSNormCPU             RMSNorm in half the passes over memory
    chunked_loss           the loss and its gradients without ever holding [N, vocabulary] logits
    compile_blocks         every block by torch's compiler
    keep_freed_memory      a CPU process that does not give its memory back between steps

The choice between forms of attention is `choose_attention` in model.py.
"""
import ctypes
import math
import sys
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import model
from model import compute_dtype, mask_rule

# --------------------------------------------------------------------------------------------------
# Attention on a CPU

def small_attention(query, key, value, mask):
    """`model.attention` written out. On a CPU the backward pass of SDPA takes 3 to 10 times as long
    as this one for short rows in bfloat16. Long rows go to SDPA, because here all their scores
    would be kept.

    query [N, heads, Q, D], key and value [N, kv_heads, K, D], mask boolean [N, 1, Q, K] or None.
    """
    N, heads, Q, D = query.shape
    kv_heads, K = key.shape[1:3]
    if Q * K > 2 ** 16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != kv_heads)
    # The query heads that share a key head follow one another, so they are more rows of the same
    # matrix product
    query = query.reshape(N, kv_heads, -1, D)                          # [N, kv_heads, group x Q, D]
    scores = (query * D ** -.5) @ key.transpose(2, 3)                  # [N, kv_heads, group x Q, K]
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)       # [N, 1, Q, K]
        scores = scores.view(N, kv_heads, -1, Q, K) + bias[:, :, None]
    weights = scores.softmax(-1).view(N, kv_heads, -1, K)
    return (weights.to(value.dtype) @ value).view(N, heads, Q, D)


def plan_pieces(document_ids, branch_ids, block):
    """Cuts packed rows into pieces whose queries attend to one stretch of keys and, causally, to
    one another.

    document_ids, branch_ids: numpy [B, L]. Returns [(first query, number of queries, first prefix
    token, number of prefix tokens), ..], counted in the flattened B x L.

    A branch is one piece: it attends to its document's prefix and to itself. A prefix, or a branch
    without one, is cut into blocks of `block` queries, and the tokens before a block are its
    prefix, so that the masked half of a long square is never computed.
    """
    pieces = []
    for row, (documents, branches) in enumerate(zip(document_ids, branch_ids)):
        changes = (np.diff(documents) != 0) | (np.diff(branches) != 0)
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
        ends = np.append(starts[1:], len(documents))
        offset = row * len(documents)
        prefixes = {}                              # document -> (its first token, number of tokens)
        for start, end in zip(starts.tolist(), ends.tolist()):
            document = int(documents[start])
            if branches[start] == 0:
                prefixes[document] = (start, end - start)
            elif document in prefixes:
                prefix_start, prefix_length = prefixes[document]
                pieces.append((offset + start, end - start, offset + prefix_start, prefix_length))
                continue
            for first in range(start, end, block):
                length = min(block, end - first)
                pieces.append((offset + first, length, offset + start, first - start))
    return pieces


def bucket_of(queries, prefix):
    """Pieces of one bucket are padded to the same size: to twice the queries and 1.4 times the keys
    at most."""
    return math.ceil(np.log2(queries)) * 64 + math.ceil(2 * np.log2(prefix + queries))


class PackedTreeAttention:
    """Attention of packed message trees by small dense pieces (block-diagonal, or "varlen",
    attention). The rule is `mask_rule` of the nano recipe; trees of short conversations take a few
    times less than under a dense mask.

    Pieces of similar sizes are padded and run together: `groups` has, for each such group of N
    pieces, the flat indices of their queries [N, Q] and keys [N, P + Q] (prefix first) and which
    attends to which [N, 1, Q, P + Q].
    """
    BLOCK = 64

    def __init__(self, document_ids, branch_ids):
        tokens = document_ids.numel()
        buckets = {}
        for piece in plan_pieces(document_ids.numpy(), branch_ids.numpy(), self.BLOCK):
            buckets.setdefault(bucket_of(piece[1], piece[3]), []).append(piece)
        self.groups = []
        result_index = np.empty(tokens, np.int64)
        done = 0                                     # rows of results in the groups before this one
        for bucket in sorted(buckets):
            columns = np.array(buckets[bucket]).T[..., None]                 # [4, N, 1]
            first, length, prefix, prefix_length = columns
            q = np.arange(length.max())
            p = np.arange(prefix_length.max())
            # [N, Q]; padding repeats the last query
            queries = np.minimum(first + q, first + length - 1)
            prefix_keys = np.minimum(prefix + p, tokens - 1)       # [N, P]; padding is masked below
            keys = np.concatenate([prefix_keys, queries], 1)
            number = (len(first), len(q))
            to_prefix = np.broadcast_to((p < prefix_length)[:, None], (*number, len(p)))
            to_queries = np.broadcast_to(q <= q[:, None], (*number, len(q)))     # causal
            attends = np.concatenate([to_prefix, to_queries], 2)
            rows = done + np.arange(queries.size).reshape(queries.shape)
            is_real = q < length
            result_index[queries[is_real]] = rows[is_real]
            self.groups.append([torch.from_numpy(x) for x in (queries, keys, attends[:, None])])
            done += queries.size
        # For each token of the batch, where its result stands among the results of all groups
        self.result_index = torch.from_numpy(result_index)                       # [B x L]

    def attend(self, query, key, value):
        """As `model.attention`: query [B, heads, L, D], key and value [B, kv_heads, L, D] -> [B,
        heads, L, D]."""
        B = len(query)
        flat_query = query.transpose(1, 2).flatten(0, 1)                         # [B x L, heads, D]
        flat_key = key.transpose(1, 2).flatten(0, 1)
        flat_value = value.transpose(1, 2).flatten(0, 1)

        def gather(flat, index):                                  # -> [N, heads, index.shape[1], D]
            return flat.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
        results = []
        for queries, keys, attends in self.groups:
            q = gather(flat_query, queries)
            k = gather(flat_key, keys)
            v = gather(flat_value, keys)
            x = small_attention(q, k, v, attends)
            results.append(x.transpose(1, 2).flatten(0, 1))                      # [N x Q, heads, D]
        x = torch.cat(results).index_select(0, self.result_index)                # [B x L, heads, D]
        return x.unflatten(0, (B, -1)).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Attention on CUDA

# Both are compiled for the first mask, because torch's compiler takes seconds to load
_flex_attention = None
_count_pairs = None
BLOCK = 128                        # FlexAttention skips, or takes whole, blocks of so many queries and keys
# For fewer than 128 queries torch would take its decoding kernel, which cannot be compiled for 65
# to 127 of them where query heads share a key head: its block of 2 x length, rounded to a power of
# 2, does not divide the mask's 128.
FLEX_OPTIONS = {'FORCE_USE_FLEX_ATTENTION': True}


def block_mask(document_ids, branch_ids, visual=None):
    """`mask_rule` as FlexAttention takes it: which blocks of 128 x 128 pairs are empty, full or
    mixed, and no L x L array.

    torch's `create_block_mask` gives the same. Compiled as a whole, as it must be, it compiles the
    sorting below, too, which takes torch 2.11 longer than all the rest of a first step.
    """
    global _flex_attention, _count_pairs
    if _flex_attention is None:
        _flex_attention = torch.compile(flex_attention)
        _count_pairs = torch.compile(count_pairs)
    L = document_ids.shape[1]
    pairs = _count_pairs(document_ids, branch_ids, visual)[:, None]      # [B, 1, blocks, blocks]
    is_full = pairs == BLOCK * BLOCK
    is_mixed = (pairs > 0) & ~is_full
    return BlockMask.from_kv_blocks(
        *numbers_of_blocks(is_mixed),
        *numbers_of_blocks(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_rule(document_ids, branch_ids, visual),
        seq_lengths=(L, L),
    )


def count_pairs(document_ids, branch_ids, visual):
    """Of how many pairs in each block of queries and keys does the query attend to the key: [B,
    blocks, blocks] int. Compiled, it is one kernel that holds no pair in memory."""
    B, L = document_ids.shape
    attends = mask_rule(document_ids, branch_ids, visual)
    blocks = -(-L // BLOCK)
    place = torch.arange(blocks * BLOCK, device=document_ids.device)
    is_real = place < L                      # the last block may be longer than the rows
    place = place.clamp(max=L - 1)
    row = torch.arange(B, device=place.device)[:, None, None]
    pairs = attends(row, None, place[:, None], place)                    # [B, queries, keys] bool
    pairs = pairs & is_real[:, None] & is_real
    pairs = pairs.view(B, blocks, BLOCK, blocks, BLOCK)
    return pairs.sum((2, 4))


def numbers_of_blocks(is_there):
    """is_there [.., blocks of queries, blocks of keys] bool. Returns (how many blocks of keys each
    block of queries has [..], their numbers [.., blocks of keys], the others behind them)."""
    is_there = is_there.int()
    number = is_there.sum(-1, dtype=torch.int32)
    order = is_there.argsort(dim=-1, descending=True, stable=True)
    return number, order.int()


def flex(query, key, value, mask):
    """As `model.attention`, with a block mask."""
    grouped = query.shape[1] != key.shape[1]
    return _flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped,
                           kernel_options=FLEX_OPTIONS)


# --------------------------------------------------------------------------------------------------
# RMSNorm

class RMSNormCPU(torch.autograd.Function):
    """`model.RMSNorm` and its gradient. torch has no kernel for it on a CPU and passes over x twice
    as often.

    Not for compiled code: torch 2.11 gives wrong gradients there, without a word, when an autograd
    function's forward works in place (pytorch/pytorch#180642). The compiler fuses torch's own
    operations into as few passes.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)  # 1 / sqrt(mean(x^2) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        grad = grad * weight.to(x.dtype)
        # The part of the gradient along x is taken out, because the result does not change when x
        # grows along itself
        along = torch.linalg.vecdot(grad, normal)[..., None] / x.shape[-1]
        return grad.addcmul_(normal, -along).mul_(scale), grad_weight, None


# --------------------------------------------------------------------------------------------------
# The loss

LOGITS_CHUNK = 1024                # rows of logits that are alive at once


def chunked_loss(hidden, output_weight, targets, loss_weights, z_loss=0., chunk=LOGITS_CHUNK):
    """`model.plain_loss` in the memory of `chunk` rows of logits: 36,864 rows of 151,936 would be
    22 GB in float32."""
    return ChunkedLoss.apply(hidden, output_weight, targets, loss_weights, chunk, z_loss)


class ChunkedLoss(torch.autograd.Function):
    """The gradient of the loss is known as soon as the logits are: of a token's logits it is

        loss_weight * (softmax * (1 + 2 z_loss * log_total) - one_hot(target))

    So forward turns each chunk's logits into their own gradient, in place, and multiplies that into
    the gradients of hidden states and output weight at once. That takes three matrix products, as
    in the plain way, and computes nothing twice. backward only multiplies by the gradient of the
    sum.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_weights, chunk, z_loss):
        # hidden [N, D], weight [V, D], targets [N], loss_weights [N] float32
        dtype = compute_dtype(hidden)
        narrow_hidden = hidden.to(dtype)
        narrow_weight = weight.to(dtype)
        nll = torch.empty(len(hidden), device=hidden.device)
        log_total = torch.empty(len(hidden), device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]                                         # [chunk, 1]
            logits = (narrow_hidden[rows] @ narrow_weight.T).float()             # [chunk, V]
            at_target = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(highest).exp_()      # in place: these are the logits' memory
            total = exponentials.sum(1, keepdim=True)
            log_total[rows] = (total.log() + highest)[:, 0]
            nll[rows] = log_total[rows] - at_target[:, 0]
            if not (needs_hidden or needs_weight):
                continue
            row_weights = loss_weights[rows, None]
            grad = exponentials.mul_(row_weights * (1 + 2 * z_loss * log_total[rows, None]) / total)
            grad = grad.scatter_add_(1, target, -row_weights).to(dtype)          # [chunk, V]
            if needs_hidden:
                grad_hidden[rows] = grad @ narrow_weight
            if needs_weight:
                grad_weight += grad.T @ narrow_hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        loss = (nll + z_loss * log_total.square()) * loss_weights
        return loss.sum(), nll

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


# --------------------------------------------------------------------------------------------------
# Compiled blocks

def compile_blocks(vlm, memory_budget=1., **how):
    """Compiles each block of a model. memory_budget is the share of a block's activations that is
    kept for the backward pass; what is not kept is computed again.

    Masks, attention in pieces and attention of crops stay as they are, because their shapes change
    with every batch. FlexAttention is compiled in any case.
    """
    from torch._functorch import config

    from parallel import Ulysses
    config.activation_memory_budget = memory_budget
    # A block is compiled once for each kind of call: training or not, dense, causal or block mask,
    # all tokens or those with a loss, row lengths. Beyond torch's limit of 8 kinds it would run
    # uncompiled from then on, without an error.
    torch._dynamo.config.recompile_limit = 64
    PackedTreeAttention.attend = torch.compiler.disable(PackedTreeAttention.attend)
    Ulysses.attend = torch.compiler.disable(Ulysses.attend)
    model.crop_attention = torch.compiler.disable(model.crop_attention)
    for block in vlm.blocks():
        block.compile(**how)


@contextmanager
def uncompiled(vlm):
    """Inside, blocks run as they are written. For prompts, because each has a length of its own and
    would be compiled."""
    compiled = [(block, block._compiled_call_impl) for block in vlm.blocks()]
    for block, _ in compiled:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call


# --------------------------------------------------------------------------------------------------
# Memory of a CPU process

def keep_freed_memory():
    """Tells malloc to keep large blocks when they are freed. glibc would hand them back to the
    system, and every step would get them anew, a page fault for each 4 KiB: a third of a step on a
    CPU."""
    if sys.platform != 'linux':
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:                                  # another C library than glibc
        return
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1          # their numbers in malloc.h
    mallopt(M_MMAP_THRESHOLD, 2 ** 30)
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
