"""Fast answers. `generate` gives the tokens of the plain `VLM.generate` in model.py, and differs
from it in four ways:

    a cache      keys and values of earlier tokens are kept, so that only the new token of each
                 answer goes through the decoder
    trees        several questions about one picture are branches of one prompt, which is encoded
                 once; their answers are generated side by side
    a step       DecodeStep computes one token of every answer in few, large operations
    fewer rows   answers that have ended are taken out once they are half of all

A step of a small model spends its time on starting operations (on a GPU: launching kernels), and a
step of a large one on reading the weights. So operations are joined where they read the same input.
"""
from functools import partial

import torch
import torch.nn.functional as F

from model import mask_rule, rotary_table, sample_token

# --------------------------------------------------------------------------------------------------
# The cache

class KVCache:
    """Keys and values of the first `length` tokens of each answer (those of its prompt, and those
    generated so far). Two tensors [layers, answers, kv_heads, size, head_dim], which are allocated
    once for `size` tokens.

    config: the LanguageConfig; answers: how many are generated side by side.
    """

    def __init__(self, config, answers, size, dtype, device):
        shape = (
            config.num_layers,
            answers,
            config.num_kv_heads,
            size,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def size(self):
        return self.keys.shape[3]

    def update(self, layer, key, value):
        """Appends keys and values [answers, kv_heads, L, head_dim] of L new tokens of one layer;
        returns those of all tokens so far, [answers, kv_heads, length + L, head_dim].

        `length` stays as it is, because the other layers append at the same place. The caller adds
        L to it when the last layer is done.
        """
        start = self.length
        end = start + key.shape[2]
        keys = self.keys[layer]                          # [answers, kv_heads, size, head_dim]
        values = self.values[layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def copy_from(self, other, length):
        """Copies the first `length` tokens of another cache with as many answers."""
        tokens = slice(0, length)
        self.keys[..., tokens, :] = other.keys[..., tokens, :]
        self.values[..., tokens, :] = other.values[..., tokens, :]

    def select_answers(self, index):
        """Keeps only the answers of these numbers [n]."""
        self.keys = self.keys[:, index]
        self.values = self.values[:, index]


class Prefill:
    """Stands in for a KVCache while a batch of prompts [B, L] goes through the decoder. It fills
    the true cache: each answer gets the keys and values of the tokens of its own prompt.

    prompt_indices [answers, S]: what the function of that name returns. For padding, -1, the last
    token of the batch is copied, which does no harm because `generate` masks it by a bias.
    """

    def __init__(self, cache, prompt_indices):
        self.cache = cache
        self.prompt_indices = prompt_indices

    def update(self, layer, key, value):
        """Stores what the answers need of a layer's keys and values [B, kv_heads, L, head_dim].
        Returns both as they came, because the prompts attend to one another as in training."""
        self._store(self.cache.keys[layer], key)
        self._store(self.cache.values[layer], value)
        return key, value

    def _store(self, cached, x):
        """cached [answers, kv_heads, size, head_dim]; x [B, kv_heads, L, head_dim]."""
        length = self.prompt_indices.shape[1]
        flat = x.transpose(1, 2).flatten(0, 1)           # [B x L, kv_heads, head_dim]
        chosen = flat[self.prompt_indices]               # [answers, S, kv_heads, head_dim]
        cached[:, :, :length] = chosen.transpose(1, 2)


def prompt_indices(document_ids, branch_ids):
    """The prompt of each answer: the flat indices [answers, S] into [B, L] of its tokens, in order.
    Shorter prompts have -1 in front. document_ids, branch_ids [B, L] are a Batch's.

    An answer begins at the end of each branch, and at the end of a document without branches. Its
    prompt is the document's prefix and its own branch. With one row, whose prefix p has two
    branches a and b:

        place           0   1   2   3   4   5   6
        token           p   p   p   a   a   b   padding
        document_ids    0   0   0   0   0   0  -1
        branch_ids      0   0   0   1   1   2   0

        result    [[ 0,  1,  2,  3,  4],          the answer to a follows place 4,
                   [-1,  0,  1,  2,  5]]          and the answer to b place 5

    So the last column holds the tokens that the answers follow.
    """
    L = document_ids.shape[1]
    # The ids of the token that follows; none follows the last one of a row, hence -1
    next_document = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    next_branch = F.pad(branch_ids[:, 1:], (0, 1), value=-1)
    ends_document = document_ids != next_document
    ends_branch = (branch_ids > 0) & (branch_ids != next_branch)
    is_end = (ends_document | ends_branch) & (document_ids >= 0)         # [B, L]
    row, column = is_end.nonzero(as_tuple=True)
    row = row[:, None]                                   # [answers, 1]
    column = column[:, None]
    # The prompt is all that the token at its end attends to
    attends = mask_rule(document_ids, branch_ids)
    every_column = torch.arange(L, device=row.device)
    in_prompt = attends(row, None, column, every_column)                 # [answers, L] bool
    longest = int(in_prompt.sum(1).max())                # S
    # Sorting False before True puts the columns of the prompt last. The sort is stable, so they
    # stay in order. Of the last S columns, those that are not in the prompt become -1.
    order = in_prompt.long().argsort(dim=1, stable=True)
    order = order[:, -longest:]                          # [answers, S]
    flat_index = row * L + order
    return torch.where(in_prompt.gather(1, order), flat_index, -1)


# --------------------------------------------------------------------------------------------------
# One step

def fuse_linears(*linears):
    """The weights of linear layers that read the same input, as one matrix [all outputs, inputs],
    so that one matrix multiplication computes them all. The layers' own weights become views of it,
    so that nothing is held twice; `unfuse_linears` undoes that."""
    first = linears[0]
    weights = [linear.weight for linear in linears]
    # The matrix of an earlier call is used again. It is neither parameter nor buffer, so that no
    # checkpoint holds it.
    fused = first.__dict__.get('fused_weight')
    if fused is None or fused.dtype != first.weight.dtype or not _are_views_of(fused, weights):
        # Outside of inference mode, because the weights may be trained later
        with torch.inference_mode(False), torch.no_grad():
            fused = torch.cat([w.detach() for w in weights])
        for view, w in zip(_split_like(fused, weights), weights):
            w.data = view
        first.__dict__['fused_weight'] = fused
    return fused


def _split_like(fused, weights):
    """Views of a fused matrix, one with the rows of each of the weights."""
    rows = [len(w) for w in weights]
    return fused.split(rows)


def _are_views_of(fused, weights):
    """Do the weights still lie in the fused matrix? Not once one was replaced, moved or loaded."""
    for view, w in zip(_split_like(fused, weights), weights):
        if view.data_ptr() != w.data_ptr():
            return False
    return True


def unfuse_linears(model):
    """Gives every weight memory of its own again, as training and saving expect it."""
    for p in model.parameters():
        is_view = p.untyped_storage().nbytes() > p.nbytes
        if is_view:
            p.data = p.data.clone()


def fused_rms_norm(eps, weight):
    """RMSNorm without gradients: a function x -> x / sqrt(mean(x^2) + eps) * weight over the last
    dimension, in few operations. weight [width], or [heads, width] for a weight of each head."""
    if weight.is_cuda:
        def norm_on_cuda(x):
            x = F.rms_norm(x, x.shape[-1:], eps=eps)
            return x.mul_(weight)
        return norm_on_cuda
    # On a CPU the same value in half the operations. With mean(x^2) = |x|^2 / width it is
    #     x / sqrt(|x|^2 + width * eps) * (weight * sqrt(width))
    # whose constants are computed here, once. hypot(a, b) is sqrt(a^2 + b^2).
    width = weight.shape[-1]
    scale = weight * width ** .5
    root = torch.tensor((width * eps) ** .5, device=weight.device)

    def norm(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        size = size.hypot_(root)
        x = x / size.to(x.dtype)
        return x.mul_(scale)
    return norm


class FusedLayer:
    """The weights of a decoder block as DecodeStep reads them: matrices with the same input are
    one, and constant factors are multiplied into weights.

    keys, values [answers, kv_heads, size, head_dim]: this layer's part of the cache.
    """

    def __init__(self, block, config, keys, values):
        attention = block.self_attn
        mlp = block.mlp
        norm = partial(fused_rms_norm, config.rms_norm_eps)
        self.input_norm = norm(block.input_layernorm.weight)
        self.qkv = fuse_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        # The norms of queries and keys are one operation with a weight for each head. The factor
        # 1 / sqrt(head_dim) of attention is multiplied into the weight of the queries.
        query_weight = attention.q_norm.weight * attention.head_dim ** -.5
        query_weight = query_weight.expand(config.num_heads, -1)         # [heads, head_dim]
        key_weight = attention.k_norm.weight.expand(config.num_kv_heads, -1)
        query_key_weight = torch.cat([query_weight, key_weight])         # [heads + kv_heads, ..]
        self.query_key_norm = norm(query_key_weight)
        self.keys = keys.flatten(0, 1)       # [answers x kv_heads, size, head_dim], a view
        self.values = values.flatten(0, 1)
        self.o_proj = attention.o_proj.weight
        self.mlp_norm = norm(block.post_attention_layernorm.weight)
        self.gate_up = fuse_linears(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj.weight


class DecodeStep:
    """Computes one more token of every answer: `Decoder.forward` of model.py for L = 1, written as

        x [answers, width] ─ norm ─ qkv ─ norm, rotate ─ append to the cache ─ attend ─ o_proj ─ + x
                           ─ norm ─ gate_up ─ silu(gate) * up ─ down_proj ─ + x

    for each layer. Grouped-query attention is a batch of answers x kv_heads small problems: the
    `group` = heads / kv_heads queries that read the same key head are the rows of one matrix, so
    that keys and values are never repeated.

    bias [answers, 1, size]: what is added to the scores of each token of the cache, 0, or -inf for
    padding. None: nothing is padding.
    """

    def __init__(self, decoder, cache, bias):
        config = decoder.config
        self.cache = cache
        self.kv_heads = config.num_kv_heads
        self.bias = bias
        if bias is not None:
            # For each key head, [answers x kv_heads, 1, size]
            self.bias = bias.repeat_interleave(config.num_kv_heads, 0)
        self.embedding = decoder.embed_tokens.weight
        self.norm = fused_rms_norm(config.rms_norm_eps, decoder.norm.weight)
        self.layers = []
        for block, keys, values in zip(decoder.layers, cache.keys, cache.values):
            self.layers.append(FusedLayer(block, config, keys, values))

    def __call__(self, token, cos, sin):
        """token [answers]: the newest of each answer, which is not in the cache yet; cos, sin
        [answers, 1, head_dim] of its position, as `rotary_table` gives them. Returns the hidden
        states [answers, width] after the final norm. The cache grows by one token."""
        x = F.embedding(token, self.embedding)                   # [answers, width]
        for layer in self.layers:
            attended = self.attend(layer, layer.input_norm(x), cos, sin)
            x = x + attended
            gate_up = F.linear(layer.mlp_norm(x), layer.gate_up)
            gate, up = gate_up.chunk(2, -1)                      # [answers, intermediate_size]
            inside = F.silu(gate).mul_(up)
            x = x + F.linear(inside, layer.down_proj)
        self.cache.length += 1
        return self.norm(x)

    def attend(self, layer, x, cos, sin):
        """Attention of the new tokens, x [answers, width], to the cache and to themselves. Returns
        what the block adds to the hidden states, [answers, width]."""
        answers, _, d = cos.shape
        kv_heads = self.kv_heads
        n = self.cache.length                                    # the place of the new token
        qkv = F.linear(x, layer.qkv)
        qkv = qkv.view(answers, -1, d)                           # [answers, heads + 2 kv_heads, d]
        query_key = qkv[:, :-kv_heads]
        value = qkv[:, -kv_heads:]
        # Norm and rotation of queries and keys together, as `rotate` in model.py does them
        query_key = layer.query_key_norm(query_key)
        swapped = query_key.roll(d // 2, -1)                     # the halves of each head swapped
        query_key = torch.addcmul(query_key * cos, swapped, sin)
        query = query_key[:, :-kv_heads]
        key = query_key[:, -kv_heads:]
        layer.keys[:, n] = key.reshape(-1, d)
        layer.values[:, n] = value.reshape(-1, d)
        query = query.reshape(answers * kv_heads, -1, d)         # [answers x kv_heads, group, d]
        keys = layer.keys[:, :n + 1]                             # [answers x kv_heads, n + 1, d]
        values = layer.values[:, :n + 1]
        keys = keys.transpose(1, 2)
        # The factor 1 / sqrt(d) is in the queries (FusedLayer)
        if self.bias is None:
            scores = torch.bmm(query, keys)                      # [.., group, n + 1]
        else:
            bias = self.bias[..., :n + 1]
            scores = torch.baddbmm(bias, query, keys)
        attended = torch.bmm(scores.softmax(-1), values)         # [answers x kv_heads, group, d]
        attended = attended.view(answers, -1)                    # [answers, heads x d]
        return F.linear(attended, layer.o_proj)


# --------------------------------------------------------------------------------------------------
# Answers

class RepetitionPenalty:
    """Makes tokens that were read or generated less likely (Keskar et al. 2019): positive logits
    are divided by the penalty, negative ones multiplied."""

    def __init__(self, penalty, prompts, vocabulary):
        """prompts [answers, S]: the tokens of each prompt, -1 for padding. vocabulary: the number
        of logits; ids beyond it (molmo2's visual tokens) are left out."""
        self.penalty = penalty
        shape = (len(prompts), vocabulary)
        self.used = torch.zeros(shape, dtype=torch.bool, device=prompts.device)
        has_logit = (prompts >= 0) & (prompts < vocabulary)
        answer, place = has_logit.nonzero(as_tuple=True)
        token = prompts[answer, place]
        self.used[answer, token] = True

    def apply(self, logits):
        """logits [answers, vocabulary] with those of used tokens made less likely."""
        factor = torch.where(logits > 0, 1 / self.penalty, self.penalty)
        return torch.where(self.used, logits * factor, logits)

    def add(self, token):
        """Counts the newest token [answers] of each answer among the used ones."""
        answer = torch.arange(len(token), device=token.device)
        self.used[answer, token] = True

    def select_answers(self, index):
        self.used = self.used[index]


def encode_prompts(model, batch, indices, cache):
    """Runs the prompts of a batch through the model and fills `cache`. indices [answers, S] are
    `prompt_indices`. Returns the hidden states [answers, width] of the last token of each prompt.

    A cache that is not empty holds the first tokens of the only prompt, as in a chat that goes on.
    Then only the tokens after them go through the model, and these are text.
    """
    ends = indices[:, -1]
    decoder = model.language_model
    if not cache.length:
        x = model.embed(batch)                           # [B, L, width]
        mask = model.make_mask(batch)
        return decoder(x, batch.position_ids, mask, Prefill(cache, indices), ends)
    start = cache.length
    length = indices.shape[1]
    new = length - start
    x = decoder.embed_tokens(batch.tokens[:, start:])    # [1, new, width]
    # New token i stands at place start + i and attends to all places up to its own
    mask = torch.ones(1, 1, new, length, dtype=torch.bool, device=x.device)
    mask = mask.tril(start)
    position_ids = batch.position_ids[:, start:]
    return decoder(x, position_ids, mask, cache, ends - start)


@torch.inference_mode()
def generate(model, batch, max_new_tokens, temperature=0., top_k=0, top_p=1.,
             repetition_penalty=1., seed=0, cache=None):
    """The answers at the ends of all branches of a batch of prompts. Yields their next tokens
    [answers] until all have ended with eos_token_id; -1 for one that has ended before.

    temperature, top_k, top_p: see `sample_token`; temperature 0 takes the likeliest token.
    repetition_penalty: see RepetitionPenalty; 1 is none.
    cache: a KVCache that holds the first tokens of the only prompt, which saves encoding them
        again. It must have room for the answer, and all pictures must be among its tokens.
    """
    device = batch.tokens.device
    indices = prompt_indices(batch.document_ids, batch.branch_ids)       # [answers, S]
    answers, length = indices.shape
    is_padding = indices < 0
    ends = indices[:, -1]
    config = model.config.language
    generator = torch.Generator(device).manual_seed(seed)

    if cache is None:
        dtype = model.language_model.embed_tokens.weight.dtype
        cache = KVCache(config, answers, length + max_new_tokens, dtype, device)
    hidden = encode_prompts(model, batch, indices, cache)                # [answers, width]
    cache.length = length

    penalty = None
    if repetition_penalty != 1:
        prompts = batch.tokens.flatten()[indices]
        prompts = prompts.masked_fill(is_padding, -1)
        vocabulary = len(model.output_weight())
        penalty = RepetitionPenalty(repetition_penalty, prompts, vocabulary)
    bias = None
    if is_padding.any():
        # The new tokens attend to all of the cache but the padding in front of shorter prompts
        shape = (answers, 1, length + max_new_tokens)
        bias = torch.zeros(shape, dtype=hidden.dtype, device=device)
        of_prompt = bias[..., :length]                   # [answers, 1, S], a view
        of_prompt.masked_fill_(is_padding[:, None], -torch.inf)
    # The positions of an answer go on from the last one of its prompt
    last_position = batch.position_ids.flatten()[ends]
    steps = torch.arange(1, max_new_tokens + 1, device=device)
    positions = last_position[:, None] + steps           # [answers, max_new_tokens]
    cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)
    cos = cos.to(hidden.dtype)                           # [answers, max_new_tokens, 1, head_dim]
    sin = sin.to(hidden.dtype)

    # Below, tensors have a row for each answer that is still computed; row i is answer running[i]
    running = torch.arange(answers, device=device)
    ended = torch.zeros(answers, dtype=torch.bool, device=device)
    decode = DecodeStep(model.language_model, cache, bias)
    for step in range(max_new_tokens):
        logits = model.logits(hidden).float()            # [rows, vocabulary]
        if penalty is not None:
            logits = penalty.apply(logits)
        token = sample_token(logits, temperature, top_k, top_p, generator)       # [rows]
        if penalty is not None:
            penalty.add(token)
        next_tokens = token.new_full((answers,), -1)
        yield next_tokens.index_copy(0, running, token.masked_fill(ended, -1))
        ended = ended | (token == model.config.eos_token_id)
        left = len(ended) - int(ended.sum())
        if left == 0 or step == max_new_tokens - 1:
            return
        if 2 * left <= len(ended):
            # Half of the rows or more would be computed for nothing, so only the others stay. Not
            # after each end, because copying the cache takes time, too.
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
