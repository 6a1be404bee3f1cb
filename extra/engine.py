"""Fast answers: a cache of keys and values, all answers of a message tree together, and a step in few operations.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from model import mask_rule, rotary_table


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


@torch.inference_mode()
def generate(model, batch, max_new_tokens, temperature=0., top_k=0, top_p=1., repetition_penalty=1., seed=0, cache=None):
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
        said = torch.zeros(Q, model.output_weight().shape[0], dtype=torch.bool, device=dev)
        read = tokens.flatten()[context]
        row, column = (~padding & (read < said.shape[1])).nonzero(as_tuple=True)
        said[row, read[row, column]] = True
    if cache is not None and cache.length:
        new, n = tokens[:, cache.length:], cache.length                                      # [1, S - n]
        x, mask = model.language_model.embed_tokens(new), torch.ones(1, 1, S - n, S, dtype=torch.bool, device=dev).tril(n)
        hidden = model.language_model(x, batch['position_ids'][:, n:], mask, cache.extend, last - n)
    else:
        x = model.embed(batch)
        cache = cache or KVCache(model.config.language, Q, S + max_new_tokens, x.dtype, dev)
        hidden = model.language_model(x, batch['position_ids'], model.mask(batch), partial(cache.gather, context), last)
    cache.length = S
    bias = None                        # later steps see all that is not padding
    if padding.any():
        bias = torch.zeros(Q, 1, S + max_new_tokens, dtype=hidden.dtype, device=dev)
        bias[..., :S].masked_fill_(padding[:, None], -torch.inf)
    places = batch['position_ids'].flatten()[last, None] + torch.arange(1, max_new_tokens + 1, device=dev)
    text = model.config.language
    cos, sin = (t.to(hidden.dtype) for t in rotary_table(places, text.head_dim, text.rope_theta))
    going, done = torch.arange(Q, device=dev), torch.zeros(Q, dtype=torch.bool, device=dev)
    stepper = Stepper(model.language_model, cache, bias)
    for step in range(max_new_tokens):
        logits = model.logits(hidden, stepper.linear).float()                                 # [Q, V]
        if said is not None:
            penalty = torch.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
            logits = torch.where(said, logits * penalty, logits)
        token = sample(logits, temperature, top_k, top_p, generator)
        if said is not None:
            said[torch.arange(len(token), device=dev), token] = True
        yield token.new_full((Q,), -1).index_copy(0, going, token.masked_fill(done, -1))
        done = done | (token == model.config.eos_token_id)
        left = len(done) - int(done.sum())
        if step == max_new_tokens - 1 or not left:
            return
        if 2 * left <= len(done):      # half of the rows are read for nothing: go on without them
            stay = (~done).nonzero()[:, 0]
            going, done, token, cos, sin = (x[stay] for x in (going, done, token, cos, sin))
            said, bias = (x if x is None else x[stay] for x in (said, bias))
            cache.keep(stay)
            stepper = Stepper(model.language_model, cache, bias)
        hidden = stepper(token, cos[:, step], sin[:, step])


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
