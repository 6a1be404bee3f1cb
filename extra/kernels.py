"""Faster forms of what model.py says plainly: attention of packed trees, RMSNorm and the loss. Tests hold each equal to its
plain form.
"""
import numpy as np
import torch
import torch.nn.functional as F

from model import compute_dtype


# ---------------------------------------------------------------------------------------------------------------------
# Attention

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


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm

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


# ---------------------------------------------------------------------------------------------------------------------
# The loss

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
