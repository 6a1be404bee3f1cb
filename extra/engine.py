"""Fast answers. `generate` gives the tokens of the plain `VLM.generate` in model.py, and differs
from it in four ways:

    a cache      keys and values of earlier tokens are kept, so a new token is one row through the decoder
    trees        several questions about one picture are branches of one prompt: encoded once, answered side by side
    a step       DecodeStep runs one token of every answer in as few operations as it takes
    fewer rows   answers that have ended are taken out once they are half of all

Time goes, for a small model, into starting operations, and for a large one into reading the
weights.
"""
from functools import partial

import torch
import torch.nn.functional as F

from model import mask_rule, rotary_table, sample_token

# --------------------------------------------------------------------------------------------------
# The cache

class KVCache:
    """Keys and values of the first `length` tokens of each answer: two tensors [layers, answers,
    kv_heads, size, head_dim], allocated once for `size` tokens."""

    def __init__(self, config, answers, size, dtype, device):
        shape = (config.num_layers, answers, config.num_kv_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def size(self):
        return self.keys.shape[3]

    def update(self, layer, key, value):
        """Appends keys and values [answers, kv_heads, L, head_dim] of L new tokens; returns all so
        far. `length` grows when the last layer is done, which whoever runs the decoder says."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length:end] = key
        self.values[layer, :, :, self.length:end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def copy_from(self, other, length):
        """Takes over the first `length` tokens of a smaller cache."""
        self.keys[:, :, :, :length] = other.keys[:, :, :, :length]
        self.values[:, :, :, :length] = other.values[:, :, :, :length]

    def select_answers(self, index):
        self.keys = self.keys[:, index]
        self.values = self.values[:, index]


class Prefill:
    """Fills a cache from a whole batch of prompts: each answer gets the keys and values of its own
    prompt's tokens.

    prompt_indices [answers, S]: as `prompt_indices` returns them; a padding index of -1 copies
    something that a bias masks.
    """

    def __init__(self, cache, prompt_indices):
        self.cache = cache
        self.prompt_indices = prompt_indices

    def update(self, layer, key, value):
        """Stores what the answers need of a batch's keys and values [B, kv_heads, L, head_dim]; the
        batch itself attends to all of them, so they are returned as they came."""
        length = self.prompt_indices.shape[1]
        for cached, x in ((self.cache.keys, key), (self.cache.values, value)):
            flat = x.transpose(1, 2).flatten(0, 1)                     # [B x L, kv_heads, head_dim]
            chosen = flat[self.prompt_indices].transpose(1, 2)    # [answers, kv_heads, S, head_dim]
            cached[layer, :, :, :length] = chosen
        return key, value


def prompt_indices(document_ids, branch_ids):
    """Where the tokens stand that each answer attends to: flat indices [answers, S] into [B, L], in
    order, -1 in front of the shorter prompts.

    An answer begins at the end of each branch, and at the end of a document without branches. Its
    prompt is the document's prefix and its own branch. The last column is the token that the
    answer's first token follows.
    """
    L = document_ids.shape[1]
    next_document = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    next_branch = F.pad(branch_ids[:, 1:], (0, 1), value=-1)
    ends_document = document_ids != next_document
    ends_branch = (branch_ids > 0) & (branch_ids != next_branch)
    is_end = (ends_document | ends_branch) & (document_ids >= 0)
    row, column = is_end.nonzero(as_tuple=True)
    row = row[:, None]                                                           # [answers, 1]
    column = column[:, None]
    attends = mask_rule(document_ids, branch_ids)(row, None, column, torch.arange(L, device=row.device))
    longest = int(attends.sum(1).max())
    # A stable sort puts the columns that are attended to last, in their order
    order = attends.long().argsort(dim=1, stable=True)[:, -longest:]             # [answers, S]
    return torch.where(attends.gather(1, order), row * L + order, -1)


# --------------------------------------------------------------------------------------------------
# One step

def fuse_linears(*linears):
    """The weights of linear layers that read the same input, as one matrix [all outputs, inputs].
    The layers' own weights become views of it, so that nothing is held twice; `unfuse_linears`
    undoes that."""
    weights = [linear.weight for linear in linears]
    fused = linears[0].__dict__.get('fused_weight')
    if fused is None or fused.dtype != weights[0].dtype or not _are_views_of(fused, weights):
        with torch.inference_mode(False), torch.no_grad():       # the weights may be trained later
            fused = torch.cat([w.detach() for w in weights])
        for view, w in zip(fused.split([len(w) for w in weights]), weights):
            w.data = view
        linears[0].__dict__['fused_weight'] = fused
    return fused


def _are_views_of(fused, weights):
    """False once a weight was replaced, moved or loaded again."""
    for view, w in zip(fused.split([len(w) for w in weights]), weights):
        if view.data_ptr() != w.data_ptr():
            return False
    return True


def unfuse_linears(model):
    """Gives every weight its own memory again, as training and saving know it."""
    for p in model.parameters():
        if p.untyped_storage().nbytes() > p.nbytes:
            p.data = p.data.clone()


def fused_rms_norm(eps, weight):
    """RMSNorm without gradients, as a function of x, in as few operations as it takes. weight
    [width] or [heads, width]."""
    if weight.is_cuda:
        return lambda x: F.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)
    # On a CPU: x / sqrt(|x|^2 + width * eps) * (weight * sqrt(width)), which is the same in half
    # the operations
    width = weight.shape[-1]
    scale = weight * width ** .5
    root = torch.tensor((width * eps) ** .5, device=weight.device)

    def norm(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / size.hypot_(root).to(x.dtype)).mul_(scale)
    return norm


class FusedLayer:
    """A decoder block as DecodeStep runs it: matrices that read the same input joined, constant
    factors multiplied out."""

    def __init__(self, block, config, keys, values):
        attention, mlp = block.self_attn, block.mlp
        norm = partial(fused_rms_norm, config.rms_norm_eps)
        self.input_norm = norm(block.input_layernorm.weight)
        self.qkv = fuse_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        # Queries and keys are normed together; the 1 / sqrt(d) of attention is part of the queries'
        # weight
        query_weight = (attention.q_norm.weight * attention.head_dim ** -.5).expand(config.num_heads, -1)
        key_weight = attention.k_norm.weight.expand(config.num_kv_heads, -1)
        self.query_key_norm = norm(torch.cat([query_weight, key_weight]))
        self.keys = keys.flatten(0, 1)    # [answers x kv_heads, size, head_dim], views of the cache
        self.values = values.flatten(0, 1)
        self.o_proj = attention.o_proj.weight
        self.mlp_norm = norm(block.post_attention_layernorm.weight)
        self.gate_up = fuse_linears(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj.weight


class DecodeStep:
    """The decoder for one more token of every answer in a cache.

    bias: added to the scores of every place of the cache, 0 or -inf, [answers, 1, size], or None.
    """

    def __init__(self, decoder, cache, bias):
        config = decoder.config
        self.cache = cache
        self.kv_heads = config.num_kv_heads
        self.bias = bias
        if bias is not None:
            self.bias = bias.repeat_interleave(config.num_kv_heads, 0)           # [answers x kv_heads, 1, size]
        self.embedding = decoder.embed_tokens.weight
        self.norm = fused_rms_norm(config.rms_norm_eps, decoder.norm.weight)
        self.layers = []
        for block, keys, values in zip(decoder.layers, cache.keys, cache.values):
            self.layers.append(FusedLayer(block, config, keys, values))

    def __call__(self, token, cos, sin):
        """token [answers], cos and sin of its position, as `rotary_table` gives them, [answers, 1,
        head_dim] -> hidden states [answers, width]. The cache grows by one token."""
        x = F.embedding(token, self.embedding)                                   # [answers, width]
        for layer in self.layers:
            x = x + self.attend(layer, layer.input_norm(x), cos, sin)
            gate, up = F.linear(layer.mlp_norm(x), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate).mul_(up), layer.down_proj)
        self.cache.length += 1
        return self.norm(x)

    def attend(self, layer, x, cos, sin):
        answers, _, d = cos.shape
        kv_heads, n = self.kv_heads, self.cache.length
        qkv = F.linear(x, layer.qkv).view(answers, -1, d)         # [answers, heads + 2 kv_heads, d]
        query_key = layer.query_key_norm(qkv[:, :-kv_heads])
        rolled = query_key.roll(d // 2, -1)                     # the halves swapped, as in `rotate`
        query_key = torch.addcmul(query_key * cos, rolled, sin)
        layer.keys[:, n] = query_key[:, -kv_heads:].reshape(-1, d)
        layer.values[:, n] = qkv[:, -kv_heads:].reshape(-1, d)
        query = query_key[:, :-kv_heads].reshape(answers * kv_heads, -1, d)      # [answers x kv_heads, group, d]
        keys = layer.keys[:, :n + 1].transpose(1, 2)
        if self.bias is None:
            scores = torch.bmm(query, keys)                     # [answers x kv_heads, group, n + 1]
        else:
            scores = torch.baddbmm(self.bias[..., :n + 1], query, keys)
        attended = torch.bmm(scores.softmax(-1), layer.values[:, :n + 1])        # [answers x kv_heads, group, d]
        return F.linear(attended.view(answers, -1), layer.o_proj)


# --------------------------------------------------------------------------------------------------
# Answers

class RepetitionPenalty:
    """Makes tokens that were read or generated less likely (Keskar et al. 2019): positive logits
    are divided by the penalty, negative ones multiplied."""

    def __init__(self, penalty, prompts, vocabulary):
        """prompts [answers, S]: the tokens of each prompt, -1 for padding."""
        self.penalty = penalty
        self.used = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=prompts.device)
        row, column = ((prompts >= 0) & (prompts < vocabulary)).nonzero(as_tuple=True)
        self.used[row, prompts[row, column]] = True

    def apply(self, logits):
        factor = torch.where(logits > 0, 1 / self.penalty, self.penalty)
        return torch.where(self.used, logits * factor, logits)

    def add(self, token):
        self.used[torch.arange(len(token), device=token.device), token] = True

    def select_answers(self, index):
        self.used = self.used[index]


def encode_prompts(model, batch, indices, cache):
    """Runs a batch's prompts through the model and fills `cache`; returns the hidden states
    [answers, width] at the ends of the prompts. With tokens in the cache already, only the others
    are encoded, of the only prompt there is."""
    ends = indices[:, -1]
    if not cache.length:
        x = model.embed(batch)
        mask = model.make_mask(batch)
        return model.language_model(x, batch.position_ids, mask, Prefill(cache, indices), ends)
    start, length = cache.length, indices.shape[1]
    x = model.language_model.embed_tokens(batch.tokens[:, start:])      # [1, length - start, width]
    mask = torch.ones(1, 1, length - start, length, dtype=torch.bool, device=x.device).tril(start)
    return model.language_model(x, batch.position_ids[:, start:], mask, cache, ends - start)


@torch.inference_mode()
def generate(model, batch, max_new_tokens, temperature=0., top_k=0, top_p=1., repetition_penalty=1., seed=0, cache=None):
    """The answers at the ends of all branches of a batch of prompts. Yields their next tokens
    [answers] until all have ended with eos_token_id; -1 for one that has ended before.

    temperature 0 takes the likeliest token; see `sample_token`. A cache that holds the first tokens
    of the only prompt saves encoding them again; it must have room for the answer. Pictures must be
    among the tokens it holds.
    """
    device = batch.tokens.device
    indices = prompt_indices(batch.document_ids, batch.branch_ids)               # [answers, S]
    answers, length = indices.shape
    is_padding = indices < 0
    ends = indices[:, -1]
    config = model.config.language
    generator = torch.Generator(device).manual_seed(seed)

    if cache is None:
        dtype = model.language_model.embed_tokens.weight.dtype
        cache = KVCache(config, answers, length + max_new_tokens, dtype, device)
    hidden = encode_prompts(model, batch, indices, cache)
    cache.length = length

    penalty = None
    if repetition_penalty != 1:
        prompts = batch.tokens.flatten()[indices].masked_fill(is_padding, -1)
        penalty = RepetitionPenalty(repetition_penalty, prompts, len(model.output_weight()))
    bias = None
    if is_padding.any():                   # later tokens attend to all of the cache but its padding
        bias = torch.zeros(answers, 1, length + max_new_tokens, dtype=hidden.dtype, device=device)
        bias[..., :length].masked_fill_(is_padding[:, None], -torch.inf)
    positions = batch.position_ids.flatten()[ends, None] + torch.arange(1, max_new_tokens + 1, device=device)
    cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)       # [answers, max_new_tokens, 1, head_dim]
    cos = cos.to(hidden.dtype)
    sin = sin.to(hidden.dtype)

    running = torch.arange(answers, device=device)       # which answers the rows below belong to
    ended = torch.zeros(answers, dtype=torch.bool, device=device)
    decode = DecodeStep(model.language_model, cache, bias)
    for step in range(max_new_tokens):
        logits = model.logits(hidden).float()                                   # [rows, vocabulary]
        if penalty is not None:
            logits = penalty.apply(logits)
        token = sample_token(logits, temperature, top_k, top_p, generator)       # [rows]
        if penalty is not None:
            penalty.add(token)
        yield token.new_full((answers,), -1).index_copy(0, running, token.masked_fill(ended, -1))
        ended = ended | (token == model.config.eos_token_id)
        left = len(ended) - int(ended.sum())
        if left == 0 or step == max_new_tokens - 1:
            return
        if 2 * left <= len(ended):           # half of the rows would be computed for nothing: go on without them
            stay = (~ended).nonzero()[:, 0]
            running = running[stay]
            ended = ended[stay]
            token = token[stay]
            cos = cos[stay]
            sin = sin[stay]
            cache.select_answers(stay)
            if penalty is not None:
                penalty.select_answers(stay)
            if bias is not None:
                bias = bias[stay]
            decode = DecodeStep(model.language_model, cache, bias)
        hidden = decode(token, cos[:, step], sin[:, step])
