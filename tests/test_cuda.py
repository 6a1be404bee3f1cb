"""What can be known about CUDA on a machine without one. The rest is in tests/gpu.py (`make gpu-check`)."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402
from extra import kernels  # noqa: E402
from model import dense_mask  # noqa: E402
from configurator import UserError, configure, train_settings  # noqa: E402
from trees import PROCESSOR, batches, build, one_process, tree  # noqa: E402

from data import collate  # noqa: E402
from extra.plan import fits, full_row_patches, kept_by_decoder_block, kept_by_vision_block, memory_estimate, planned_model  # noqa: E402


def test_flex_attention_never_takes_the_decoding_kernel(monkeypatch):
    """For 65 to 127 queries that share key heads it cannot be compiled (torch 2.11, sm_90)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    calls = []

    def recorded(*args, **how):
        calls.append(how['kernel_options'])
        return flex_attention(*args, **how)
    monkeypatch.setattr(kernels, '_flex_attention', recorded)
    for length in (16, 72, 104, 127, 128, 200):
        ids = torch.zeros(1, length, dtype=torch.long)
        block_mask = create_block_mask(m.mask_rule(ids, ids), 1, None, length, length, device='cpu')
        query, key, value = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
        out = m.attention(query, key, value, block_mask)
        expected = m.attention(query, key, value, dense_mask(ids, ids))
        assert (out - expected).abs().max() < 1e-5               # measured 1e-6
    assert calls == [{'FORCE_USE_FLEX_ATTENTION': True}] * 6


def test_cudnn_attention_is_off_on_cuda():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert m.pick_device('cuda').type == 'cuda'
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_weights_to_ask_are_narrow_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    assert m.pick_weights_dtype('auto', torch.device('cuda')) == torch.bfloat16
    assert m.pick_weights_dtype('auto', torch.device('cpu')) == torch.float32
    assert m.pick_weights_dtype('float16', torch.device('cpu')) == torch.float16
    # a GPU that only emulates bfloat16 is slower with it
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert m.pick_weights_dtype('auto', torch.device('cuda')) == torch.float32
    with pytest.raises(UserError, match="dtype = 'half' is not one of"):
        m.pick_weights_dtype('half', torch.device('cpu'))


# ---------------------------------------------------------------------------------------------------------------------
# Memory

TOKENS = 509                       # a prime, so that a tensor with a number for each token can be told from a weight


def kept_a_token(block, *inputs):
    """Bytes a token that autograd keeps of a block, counted."""
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if t.numel() % TOKENS == 0:
            kept[storage._cdata] = storage.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu', torch.bfloat16):
        out = block(*inputs)
    assert out.requires_grad
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize('compiled', [False, True])
def test_kept_by_a_decoder_block_is_what_autograd_keeps(compiled):
    """torch's CPU kernels keep what its CUDA kernels keep: inputs of norms, queries, keys, values and the result."""
    torch._dynamo.reset()
    config = m.LanguageConfig(hidden_size=256, intermediate_size=768, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128)
    block = m.Block(config)
    if compiled:
        block.compile(backend='aot_eager_decomp_partition')      # inductor's choice of what to keep, without its kernels
    x = torch.randn(1, TOKENS, 256, requires_grad=True)
    rotary = m.rotary_table(torch.arange(TOKENS)[None], config.head_dim, config.rope_theta)
    rotary = [table.to(torch.bfloat16) for table in rotary]
    counted = kept_a_token(block, x, rotary, 'causal') - 2 * 2 * config.head_dim     # the table is shared by all layers
    estimated = kept_by_decoder_block(config, 2, 4, compiled)
    print('a decoder block keeps', counted, 'estimated', estimated)
    assert counted == pytest.approx(estimated, rel=.05)


@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu_pytorch_tanh'])
def test_kept_by_a_vision_block_is_what_autograd_keeps(activation):
    """By the plain form, because CUDA runs that: the CPU has a form of attention of its own."""
    config = m.VisionConfig(hidden_size=256, intermediate_size=768, num_layers=1, num_heads=4, image_size=64, patch_size=8,
                            activation=activation, feature_layers=(-1,))
    x = torch.randn(TOKENS, 256, requires_grad=True)
    counted = kept_a_token(m.VisionBlock(config, fast=False), x, [(1, TOKENS)])
    estimated = kept_by_vision_block(config, 2, 4)
    print('a vision block keeps', counted, 'estimated', estimated)
    assert counted == pytest.approx(estimated, rel=.05)


def test_stages_fit_80_gb_without_recomputing():
    """Qwen3-0.6B keeps 55.3 kB a token and layer, compiled 47.1."""
    language = m.LanguageConfig(**m.LANGUAGE['Qwen/Qwen3-0.6B'])
    assert kept_by_decoder_block(language, 2, 4, False) == 55_296
    assert kept_by_decoder_block(language, 2, 4, True) == 47_104
    for stage in (1, 2, 3):
        settings = configure(train_settings(), [str(ROOT / f'config/stage{stage}.py')])
        model = planned_model({**settings, 'init_from': ''})
        assert settings['recompute'] == 0 and settings['packing']
        rows = {}
        for n in (settings['batch_size'], 2 * settings['batch_size']):
            memory = memory_estimate(model, n, settings['seq_len'], patches=full_row_patches(settings))
            rows[n] = fits(memory['total'], 80e9)
        assert rows[settings['batch_size']].endswith(': fits') and 'does not fit' in rows[2 * settings['batch_size']]
        step = settings['batch_size'] * settings['accumulation'] * settings['seq_len']
        assert step == {1: 128 * 4096, 2: 128 * 4096, 3: 64 * 36864}[stage]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled blocks

@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield torch._dynamo.config
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.parametrize('recipe', ['nano', 'molmo2'])
def test_compiled_blocks_have_the_gradients_of_plain_ones(recipe, fresh_compiler):
    plain, model = build(recipe=recipe), build(recipe=recipe)
    kernels.compile_blocks(model, backend='aot_eager_decomp_partition')
    rows = batches(4)
    expected, gradients = one_process(plain, rows)
    loss, ours = one_process(model, rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (ours[name] - gradient).abs().max() < 1e-5 * scale, name      # measured 3e-6


def test_many_kinds_of_calls_all_run_compiled(fresh_compiler):
    """Training and evaluation, causal rows and trees, all tokens or those with a loss, changing lengths: more kinds than
    the 8 after which torch runs a block uncompiled and says nothing."""
    model = build()
    kernels.compile_blocks(model, backend='aot_eager')
    with fresh_compiler.patch(fail_on_recompile_limit_hit=True):
        for length in (104, 200):
            trees = collate([[tree(1, 1), tree(2, 0)]], PROCESSOR, length)
            causal = replace(trees, causal=True, document_ids=torch.zeros_like(trees.document_ids))
            for batch in (trees, causal):
                model.train()
                model(batch)[0].backward()
                model.hidden_states(batch).sum().backward()
                model.eval()
                with torch.no_grad():
                    model(batch)
                    model.hidden_states(batch)
                with torch.inference_mode():
                    model.hidden_states(batch)


@pytest.mark.parametrize('length', [72, 128, 300, 1000])
@pytest.mark.parametrize('recipe', ['nano', 'molmo2'])
def test_block_mask_is_that_of_torch(length, recipe, monkeypatch):
    """Every table of it, for rows that end inside a block, too."""
    from torch.nn.attention.flex_attention import create_block_mask
    monkeypatch.setattr(kernels, '_flex_attention', 'not needed')
    monkeypatch.setattr(kernels, '_count_pairs', kernels.count_pairs)            # not compiled
    generator = torch.Generator().manual_seed(length)
    document_ids = torch.randint(-1, 4, (2, length), generator=generator).sort(dim=1, descending=True)[0]
    document_ids[1] = 0              # one document, whose last block of queries would be full but for its end
    branch_ids = torch.randint(0, 3, (2, length), generator=generator).sort(dim=1)[0]
    branch_ids[1] = 0
    visual = None
    if recipe == 'molmo2':
        visual = torch.rand(2, length, generator=generator) < .3
    ours = kernels.block_mask(document_ids, branch_ids, visual)
    rule = m.mask_rule(document_ids, branch_ids, visual)
    expected = create_block_mask(rule, 2, None, length, length, device='cpu')
    for x, y in zip(ours.as_tuple()[:-1], expected.as_tuple()[:-1]):             # the last is the rule
        if torch.is_tensor(y):
            assert torch.equal(x, y) and x.dtype == y.dtype
        else:
            assert x == y
