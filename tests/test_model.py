"""model.py against transformers (weights each writes and the other reads), against a slow mask, and against itself.

Tiny random models in float32 on the CPU, every bias and norm weight randomised: fresh ones are 0 and 1 and hide mistakes.
Tolerances have the worst case that was measured beside them. Needs transformers; downloads nothing.
"""
import itertools
import json
import os
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

import model as m
from model import UserError, VLM, Batch, dense_mask, make_config, plain_loss, sample_token
from extra.hf import load_model, load_weights, save_model
from extra.engine import generate, prompt_indices
from extra.kernels import uncompiled
from extra.kernels import ChunkedLoss, PackedTreeAttention
from extra.hf import to_hf  # noqa: E402

LOGITS = 1e-4    # measured worst case over all architectures, both directions: 1.2e-5 at logits of scale 20
EOS = 5          # generation tests compare 64 tokens, so their prompts and seeds are such that EOS does not come

CLIP = dict(hidden_size=32, intermediate_size=56, num_layers=3, num_heads=4, image_size=32, patch_size=8)
SIGLIP = CLIP | dict(style='siglip', activation='gelu_pytorch_tanh', layer_norm_eps=1e-6)
QWEN = dict(hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
            vocab_size=320, rope_theta=1e4)
IMAGE = 300      # the placeholder; video uses 301
MOLMO2_IDS = tuple(range(320, 328))


def tiny(vision=CLIP, pooling=1, **rest):
    language = QWEN | rest.pop('language', {})
    return make_config(dict(vision), language, pooling=pooling, image_token_id=IMAGE, video_token_id=IMAGE + 1,
                       eos_token_id=EOS, pad_token_id=0, **rest)


def tiny_molmo2(**language):
    vision = SIGLIP | dict(hidden_size=24, num_heads=2, feature_layers=(-1, -2))
    config = tiny(vision, recipe='molmo2', connector='molmo2', connector_size=36, pooling=2,
                  visual_token_ids=MOLMO2_IDS, language=dict(extra_vocab_size=16, tie_word_embeddings=False) | language)
    return replace(config, image_token_id=MOLMO2_IDS[2], video_token_id=MOLMO2_IDS[2])


@torch.no_grad()
def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        p.normal_(1 if 'norm' in name and name.endswith('weight') else 0, 0.2, generator=generator)
    return model.eval()


def images(n, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def patchify(pictures, p=8):
    """[N, 3, H, W] -> [N, patches, p p 3]: row, column, channel."""
    return torch.stack([x.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)
                        for x in pictures])


def pixel_values(pictures, style='clip'):
    mean, std = (torch.tensor(x)[:, None, None] for x in m.PIXEL_STATS[style])
    return (pictures / 255 - mean) / std


def windows(n, grid, k):
    """pool_index of n pictures with k x k windows."""
    index = torch.arange(n * grid * grid).view(n, grid // k, k, grid // k, k)
    return index.transpose(2, 3).reshape(-1, k * k)


def make_batch(config, rows, pictures=None, pool_index=None, left=False):
    """Rows of token ids, padded with token 0 on the right, or on the left for generation."""
    length = max(map(len, rows))
    pad = [[0] * (length - len(r)) for r in rows]
    tokens = torch.tensor([p + r if left else r + p for r, p in zip(rows, pad)])
    real = torch.tensor([[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
                         for r, p in zip(rows, pad)]).bool()
    batch = Batch(tokens=tokens, document_ids=real.long() - 1, branch_ids=torch.zeros_like(tokens),
                  position_ids=(real.cumsum(1) - 1).clamp(min=0), causal=bool(real.all()))
    if pictures is not None:
        grid = config.vision.image_size // config.vision.patch_size
        if pool_index is None:
            pool_index = windows(len(pictures), grid, config.pooling)
        placeholders = torch.tensor([config.image_token_id, config.video_token_id])
        where = torch.isin(tokens, placeholders).flatten().nonzero()[:, 0]
        batch = replace(batch, patches=patchify(pictures), pool_index=pool_index, visual_index=where, grid=(grid, grid))
    return batch


def text(n, seed=0):
    return torch.randint(10, 290, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits(model, batch):
    return model.logits(model.hidden_states(batch))


def difference(a, b, real=None):
    return (a - b if real is None else (a - b)[real]).abs().max().item()


PARITY = {}    # test -> the largest difference from transformers, which conftest.py prints at the end of a run


def parity(a, b, real=None):
    test = os.environ['PYTEST_CURRENT_TEST'].split('::')[1].rsplit(' ', 1)[0]
    worst = difference(a, b, real)
    PARITY[test] = max(PARITY.get(test, 0), worst)
    return worst


def ours(config, seed=0):
    return randomise(VLM(config), seed)


def theirs(folder):
    """The folder as transformers opens it: no remote code, nothing missing, nothing left over."""
    with torch.random.fork_rng():
        model, info = hf.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True,
                                                                     dtype=torch.float32, trust_remote_code=False)
    assert not any(info.values()), info
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Parts: CLIP, SigLIP2, Qwen3

def hf_vision(style, **more):
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                 patch_size=8) | more
    if style == 'clip':
        return randomise(hf.CLIPModel(hf.CLIPConfig(vision_config=sizes, text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=99))))
    return randomise(hf.SiglipModel(hf.SiglipConfig(vision_config=sizes, text_config=dict(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=99))))


@pytest.mark.parametrize('size', [32, 48])                 # 48: the position table is interpolated
@pytest.mark.parametrize('style', ['clip', 'siglip'])
def test_vision_hidden_states(style, size, tmp_path):
    """Every block's output, read from the folder of a full CLIP / SigLIP2 model (text side and heads in it)."""
    peer = hf_vision(style)
    peer.save_pretrained(tmp_path)
    pixels = pixel_values(images(2, size), style)
    with torch.no_grad():
        states = peer.vision_model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    for layers in ((0,), (1,), (2,), (-1, -3)):
        model = VLM(tiny((CLIP if style == 'clip' else SIGLIP) | dict(feature_layers=layers)))
        load_weights(model, tmp_path, only='vision_tower.')
        got = model.vision_tower([(patchify(pixels), (size // 8, size // 8))]).view(2, (size // 8) ** 2, -1)
        # transformers' state 0 is the embeddings; a class token comes first in CLIP
        want = torch.cat([states[1:][i][:, int(style == 'clip'):] for i in layers], -1)
        assert parity(got, want) < 1e-5                # measured 1.9e-6


def qwen3(folder=None, tied=True, **save):
    sizes = dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, rope_theta=1e4, tie_word_embeddings=tied, eos_token_id=EOS)
    peer = randomise(hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes)))
    if folder is not None:
        peer.save_pretrained(folder, **save)
    return peer


def store_head(folder):
    """Qwen3-0.6B's file holds lm_head.weight although it is tied."""
    file = folder / 'model.safetensors'
    tensors = load_file(file)
    save_file(tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()}, file)


@pytest.mark.parametrize('kind', ['one file', 'sharded', 'bf16', 'stored head'])
@pytest.mark.parametrize('tied', [True, False])
def test_qwen3_logits(tied, kind, tmp_path):
    peer = qwen3(tied=tied)
    if kind == 'bf16':
        peer = peer.bfloat16()
    peer.save_pretrained(tmp_path, **({'max_shard_size': '40KB'} if kind == 'sharded' else {}))
    peer = hf.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if kind == 'sharded':
        assert len(list(tmp_path.glob('*.safetensors'))) > 2
    if kind == 'stored head' and tied:
        store_head(tmp_path)
    config = tiny(language=dict(tie_word_embeddings=tied))
    model = VLM(config)
    load_weights(model, tmp_path, only=('language_model.', 'lm_head.'))
    batch = make_batch(config, [text(19), text(11, 1)])
    with torch.no_grad():
        want = peer(batch.tokens, attention_mask=(batch.document_ids >= 0).long()).logits
    assert parity(logits(model, batch), want, (batch.document_ids >= 0)) < LOGITS


def test_real_shapes(tmp_path):
    """Two layers of CLIP-L/336 and of Qwen3-0.6B: no dimension is special-cased to the tiny models."""
    vision = m.VISION['openai/clip-vit-large-patch14-336'] | dict(num_layers=2, feature_layers=(-2, -1))
    language = m.LANGUAGE['Qwen/Qwen3-0.6B'] | dict(num_layers=2, vocab_size=500)   # the vocabulary is in the counts
    config = make_config(vision, language, pooling=1, image_token_id=IMAGE, video_token_id=IMAGE + 1,
                         eos_token_id=EOS, pad_token_id=0)
    with torch.device('meta'):
        model = VLM(config)
    model.to_empty(device='cpu').set_buffers()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if 'norm' in name and name.endswith('weight') else 0, 0.02)
    save_model(model, tmp_path)
    peer, picture, tokens = theirs(tmp_path), images(1, 336), torch.tensor([text(3) + [IMAGE] * 576 + text(5)])
    batch = make_batch(config, tokens.tolist(), None)
    batch = replace(batch, patches=patchify(picture, 14), pool_index=windows(1, 24, 1), grid=(24, 24),
                    visual_index=(tokens[0] == IMAGE).nonzero()[:, 0])
    with torch.no_grad():
        want = peer(input_ids=tokens, pixel_values=pixel_values(picture)).logits
    assert parity(logits(model, batch), want) < LOGITS                        # measured 2e-6 at logits of scale 3


@pytest.mark.parametrize('vision, language, recipe, part, count', [
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-0.6B', 'nano', 'vision', 290_909_184),
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-0.6B', 'nano', 'connector', 1_049_600),
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-0.6B', 'nano', 'language', 596_049_920),
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-1.7B', 'nano', 'language', 1_720_574_976),
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-4B', 'nano', 'language', 4_022_468_096),
    ('openai/clip-vit-large-patch14-336', 'Qwen/Qwen3-8B', 'nano', 'language', 8_190_735_360),
    ('google/siglip2-so400m-patch14-384', 'Qwen/Qwen3-4B-Instruct-2507', 'molmo2', 'vision', 382_505_936),
    ('google/siglip2-so400m-patch14-384', 'Qwen/Qwen3-4B-Instruct-2507', 'molmo2', 'connector', 56_611_328),
    ('google/siglip2-so400m-patch14-384', 'Qwen/Qwen3-4B-Instruct-2507', 'molmo2', 'all', 4_850_869_200),
    ('google/siglip2-so400m-patch14-384', 'Qwen/Qwen3-8B', 'molmo2', 'all', 8_661_703_120),
])
def test_parameter_counts(vision, language, recipe, part, count):
    with torch.device('meta'):
        config = make_config(vision, m.LANGUAGE[language] | (dict(extra_vocab_size=128, tie_word_embeddings=False)
                             if recipe == 'molmo2' else {}), recipe=recipe,
                             connector='molmo2' if recipe == 'molmo2' else 'linear')
        parts = {name: sum(p.numel() for p in ps) for name, ps in VLM(config).parts().items()}
    assert (sum(parts.values()) if part == 'all' else parts[part]) == count


# ---------------------------------------------------------------------------------------------------------------------
# Whole models, both directions

def span(n, token=IMAGE):
    return [7] + [token] * n + [8]


LLAVA = {'linear': tiny(), 'mlp': tiny(connector='mlp'), 'untied': tiny(language=dict(tie_word_embeddings=False)),
         'two layers': tiny(CLIP | dict(feature_layers=(-2, -1))), 'last layer': tiny(CLIP | dict(feature_layers=(-1,))),
         'siglip': tiny(SIGLIP), 'siglip mlp': tiny(SIGLIP | dict(feature_layers=(-1, 0)), connector='mlp')}


def llava_case(config):
    """Rows with 0, 1 and 3 pictures, of unequal length."""
    rows = [text(9), text(4, 1) + span(16) + text(6, 2), span(16) + text(2, 3) + span(16) + span(16) + text(3, 4)]
    pictures = images(4)
    batch = make_batch(config, rows, pictures)
    peer = dict(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(),
                pixel_values=pixel_values(pictures, config.vision.style))
    return batch, peer


@pytest.mark.parametrize('name', LLAVA)
def test_llava_ours_to_theirs_and_back(name, tmp_path):
    config = LLAVA[name]
    model = ours(config)
    save_model(model, tmp_path / 'ours')
    batch, inputs = llava_case(config)
    got, peer = logits(model, batch), theirs(tmp_path / 'ours')
    assert isinstance(peer, hf.LlavaForConditionalGeneration)
    with torch.no_grad():
        assert parity(got, peer(**inputs).logits, (batch.document_ids >= 0)) < LOGITS
    if config.connector == 'linear':       # its identity second layer is how we know it again: leave it alone
        keep = [p.clone() for p in peer.model.multi_modal_projector.linear_2.parameters()]
    randomise(peer, 1)
    if config.connector == 'linear':
        with torch.no_grad():
            for p, k in zip(peer.model.multi_modal_projector.linear_2.parameters(), keep):
                p.copy_(k)
    peer.save_pretrained(tmp_path / 'theirs')
    hf_config = json.loads((tmp_path / 'theirs/config.json').read_text())
    hf_config.pop('nanomolmo2')            # as from someone who never heard of us
    (tmp_path / 'theirs/config.json').write_text(json.dumps(hf_config))
    back = load_model(tmp_path / 'theirs')
    assert back.config.vision.feature_layers == config.vision.feature_layers
    with torch.no_grad():
        assert parity(logits(back, batch), peer(**inputs).logits, (batch.document_ids >= 0)) < LOGITS


@pytest.mark.parametrize('tower', ['vision_tower.', 'vision_tower.vision_model.'])
@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_llava_prefix_spellings(prefix, tower, tmp_path):
    """Four ways in which llava files have spelled the same weights."""
    model = ours(LLAVA['untied'])
    save_model(model, tmp_path)
    file = tmp_path / 'model.safetensors'
    renamed = {}
    for name, tensor in load_file(file).items():
        name = name.replace('vision_tower.vision_model.', prefix + tower)
        name = name.replace('multi_modal_projector', prefix + 'multi_modal_projector')
        if prefix:
            name = name.replace('language_model.lm_head', 'lm_head')
            name = name.replace('language_model.model.', 'model.language_model.')
        renamed[name] = tensor
    save_file(renamed, file)
    back = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))


@pytest.mark.parametrize('connector', ['linear', 'mlp'])
def test_llava_next_video(connector, tmp_path):
    """2x2 pooling. transformers pools clips only, so a still picture goes in as a clip of one frame."""
    config = tiny(pooling=2, connector=connector)
    model = ours(config)
    save_model(model, tmp_path)
    rows, pictures = [text(3) + span(4, IMAGE + 1) + text(4, 1), span(4, IMAGE + 1) + text(5, 2)], images(2)
    batch = make_batch(config, rows, pictures)
    batch.causal = True                 # equal lengths; right padding would not matter either
    peer = theirs(tmp_path)
    assert isinstance(peer, hf.LlavaNextVideoForConditionalGeneration)
    inputs = dict(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(),
                  pixel_values_videos=pixel_values(pictures)[:, None])
    with torch.no_grad():
        assert parity(logits(model, batch), peer(**inputs).logits, (batch.document_ids >= 0)) < LOGITS
    peer.save_pretrained(tmp_path / 'theirs')
    hf_config = json.loads((tmp_path / 'theirs/config.json').read_text())
    hf_config.pop('nanomolmo2')
    (tmp_path / 'theirs/config.json').write_text(json.dumps(hf_config))
    back = load_model(tmp_path / 'theirs')
    assert back.config.pooling == 2 and difference(logits(back, batch), logits(model, batch)) == 0


def molmo2_case(config):
    """One row with two pictures of two crops, ragged windows; one with one picture, padded; one of text."""
    start, end, patch, column = MOLMO2_IDS[:4]
    counts = [(3, 4), (5, 2), (4, 4)]      # (global view, crops) tokens of each picture
    generator = torch.Generator().manual_seed(3)
    pool = torch.randint(0, 6 * 16, (sum(map(sum, counts)), 4), generator=generator)
    pool[torch.rand(pool.shape, generator=generator) < 0.3] = -1
    pool[:, 0].clamp_(min=0)

    def picture(i):
        low, high = counts[i]
        return [MOLMO2_IDS[4]] + [patch] * low + [end, start] + [patch] * high + [column, end]
    rows = [text(2) + picture(0) + text(3, 1) + picture(1) + text(4, 2), picture(2) + text(3, 3), text(6, 4)]
    pictures = images(6)
    batch = make_batch(config, rows, pictures, pool)
    visual = torch.isin(batch.tokens, torch.tensor(MOLMO2_IDS))
    return batch, dict(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(), mm_token_type_ids=visual.long(),
                       pixel_values=patchify(pixel_values(pictures, 'siglip')), image_token_pooling=pool,
                       image_grids=torch.tensor([[1, low, 1, high] for low, high in counts]),
                       image_num_crops=torch.tensor([2, 2, 2]))


@pytest.mark.parametrize('tied', [True, False])
def test_molmo2_ours_to_theirs_and_back(tied, tmp_path):
    config = tiny_molmo2(tie_word_embeddings=tied)
    model = ours(config)
    save_model(model, tmp_path / 'ours')
    batch, inputs = molmo2_case(config)
    peer = theirs(tmp_path / 'ours')
    assert isinstance(peer, hf.Molmo2ForConditionalGeneration)
    with torch.no_grad():
        want = peer(**inputs).logits
        assert parity(logits(model, batch), want, (batch.document_ids >= 0)) < LOGITS
        causal = inputs | dict(mm_token_type_ids=torch.zeros_like(inputs['input_ids']))
        assert difference(want, peer(**causal).logits, (batch.document_ids >= 0)) > 0.1       # the visual rule is felt
    peer.save_pretrained(tmp_path / 'theirs')
    hf_config = json.loads((tmp_path / 'theirs/config.json').read_text())
    hf_config.pop('nanomolmo2')
    (tmp_path / 'theirs/config.json').write_text(json.dumps(hf_config))
    halves = load_file(tmp_path / 'theirs/model.safetensors')
    assert len(halves['model.transformer.wte.embedding']) == 168                  # the trap: 168 + 168, not 320 + 16
    back = load_model(tmp_path / 'theirs')
    assert back.config.visual_token_ids[:3] == MOLMO2_IDS[:3]
    back.visual_ids = torch.tensor(MOLMO2_IDS)             # transformers drops the ids that only its processor needs
    assert parity(logits(back, batch), want, (batch.document_ids >= 0)) < LOGITS


def test_molmo2_published_spelling(tmp_path):
    """The released folders: legacy config keys, 27 layers declared and 25 stored, negative layers."""
    config = tiny_molmo2()
    model = ours(config)
    save_model(model, tmp_path)
    text_config = json.loads((tmp_path / 'config.json').read_text())['text_config']
    ids = ('image_start_token_id', 'image_end_token_id', 'image_patch_id', 'image_col_id',
           'low_res_image_start_token_id', 'image_low_res_id', 'frame_start_token_id', 'frame_end_token_id')
    vit = dict(hidden_size=24, intermediate_size=56, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2,
               head_dim=12, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, image_default_input_size=[32, 32],
               image_patch_size=8, image_num_pos=16)
    adapter = dict(vit_layers=[-3, -4], hidden_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=12,
                   hidden_act='silu', intermediate_size=36, text_hidden_size=48)
    text_config['layer_norm_eps'] = text_config.pop('rms_norm_eps')
    text_config['qkv_bias'] = text_config.pop('attention_bias')
    published = dict(model_type='molmo2', architectures=['Molmo2ForConditionalGeneration'], vit_config=vit,
                     adapter_config=adapter, text_config=text_config, tie_word_embeddings=False,
                     **dict(zip(ids, MOLMO2_IDS)))
    (tmp_path / 'config.json').write_text(json.dumps(published))
    batch, inputs = molmo2_case(config)
    back, peer = load_model(tmp_path), theirs(tmp_path)
    assert back.config.vision == config.vision
    with torch.no_grad():
        want = peer(**inputs).logits
    assert parity(logits(back, batch), want, (batch.document_ids >= 0)) < LOGITS
    assert parity(logits(model, batch), want, (batch.document_ids >= 0)) < LOGITS


def test_save_and_load_is_exact(tmp_path):
    for i, config in enumerate([tiny(), tiny(SIGLIP, 2, connector='mlp'), tiny(connector='molmo2'), tiny_molmo2()]):
        model = ours(config)
        save_model(model, tmp_path / str(i))
        back = load_model(tmp_path / str(i))
        assert back.config == config
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters()))
        assert torch.equal(model.pixel_shift, back.pixel_shift) and torch.equal(model.visual_ids, back.visual_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def generated(model, batch, n=64, **how):
    return torch.stack(list(generate(model, batch, n, **how)), 1)                                 # [B, n]


def no_eos(config):
    return replace(config, eos_token_id=-1)


@pytest.mark.parametrize('kind', ['qwen', 'llava', 'molmo2'])
def test_greedy_generation(kind, tmp_path):
    """64 tokens: with the cache as without, as transformers' generate, and batched as one by one."""
    config = no_eos(tiny_molmo2() if kind == 'molmo2' else tiny())
    model = ours(config)
    save_model(model, tmp_path)
    peer, pictures, pool = theirs(tmp_path), None, None
    rows = [text(7), text(12, 1), text(3, 2), text(9, 3)]              # of several lengths
    if kind == 'llava':
        pictures = images(4)
        rows = [text(i) + span(16) + text(5 + i, 1) for i in (0, 2, 5, 3)]
    if kind == 'molmo2':
        pictures, pool = images(4), windows(4, 4, 2)
        pool[1:7:2, 3] = -1
        rows = [text(i) + [MOLMO2_IDS[4]] + [MOLMO2_IDS[2]] * 4 + [MOLMO2_IDS[1]] + text(5 + i, 1) for i in (0, 2, 5, 3)]
    batch = make_batch(config, rows, pictures, pool, left=True)
    together = generated(model, batch)
    for i, row in enumerate(rows):
        picture = None if pictures is None else pictures[i:i + 1]
        index = None if pool is None else torch.where(pool[4 * i:4 * i + 4] < 0, -1, pool[4 * i:4 * i + 4] - 16 * i)
        batch_of_one = make_batch(config, [row], picture, index)
        alone = generated(model, batch_of_one)
        assert torch.equal(alone, together[i:i + 1])
        if i == 1:                         # the plain form, which encodes everything anew for each token
            assert torch.equal(alone, torch.stack(list(model.generate(batch_of_one, 64)), 1))
    inputs = dict(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long())
    if kind == 'llava':
        inputs['pixel_values'] = pixel_values(pictures)
    if kind == 'molmo2':
        inputs |= dict(mm_token_type_ids=torch.isin(batch.tokens, torch.tensor(MOLMO2_IDS)).long(),
                       pixel_values=patchify(pixel_values(pictures, 'siglip')), image_token_pooling=pool,
                       image_grids=torch.tensor([[1, 2, 1, 2]] * 4), image_num_crops=torch.tensor([1] * 4))
    want = peer.generate(**inputs, do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    assert torch.equal(together, want[:, batch.tokens.shape[1]:])
    assert len(together.unique()) > 10     # not one token for ever, which any bug would pass
    if kind == 'qwen':                     # transformers penalises padding too: one row, without
        alone = generated(model, make_batch(config, rows[:1]), repetition_penalty=1.4)
        want = peer.generate(torch.tensor(rows[:1]), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0, repetition_penalty=1.4)
        assert torch.equal(alone, want[:, len(rows[0]):]) and not torch.equal(alone, together[:1])


def test_blocks_uncompiled_for_a_while():
    config = tiny()
    model, batch = ours(config), make_batch(config, [text(7)])
    want = logits(model, batch)
    for block in model.blocks():               # as `compile` leaves it, but that nobody would miss
        block._compiled_call_impl = lambda *_, **__: 1 / 0
    with uncompiled(model):
        assert torch.equal(logits(model, batch), want)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch)


def test_generation_stops_at_the_end_token():
    config = no_eos(tiny())
    model, batch = ours(config), make_batch(config, [text(7), text(12, 1)], left=True)
    free = generated(model, batch, 12)
    model.config = replace(config, eos_token_id=free[0, 3].item())
    stopped = generated(model, batch, 12)
    ends = [row.tolist().index(free[0, 3].item()) if free[0, 3] in row else 11 for row in free]
    assert stopped.shape[1] == max(ends) + 1
    for row, want, end in zip(stopped, free, ends):
        assert torch.equal(row[:end + 1], want[:end + 1]) and (row[end + 1:] == -1).all()


@pytest.mark.parametrize('how', [dict(temperature=0.), dict(temperature=1.3, top_k=20, top_p=.9, seed=3)])
def test_engine_generates_the_tokens_of_plain_generate(how):
    """Two answers at once, one of which ends early."""
    config = no_eos(tiny())
    model = ours(config)
    batch = make_batch(config, [text(7), text(7, 1)])
    free = torch.stack(list(model.generate(batch, 12, **how)), 1)
    model.config = replace(config, eos_token_id=free[0, 3].item())
    plain = torch.stack(list(model.generate(batch, 12, **how)), 1)
    fast = torch.stack(list(generate(model, batch, 12, **how)), 1)
    assert plain[0, 4] == -1
    if how['temperature'] == 0:            # sampling draws for fewer rows once half of the answers have ended
        assert torch.equal(plain, fast)
    else:
        assert torch.equal(plain[:, :4], fast[:, :4])


def test_prompt_indices():
    """Two documents with branches, one without, padding: who answers, and what each sees."""
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1, -1, -1]])
    branch = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 0], [1, 1, 2, 3, 0, 0, 0, 0]])
    assert prompt_indices(document, branch).tolist() == [[0, 1, 2, 3], [-1, 0, 1, 4], [-1, -1, 5, 6],
                                                     [-1, -1, 8, 9], [-1, -1, -1, 10], [-1, -1, -1, 11]]


def test_sampling_filters():
    scores = torch.tensor([[4., 3, 2, 1, 0]]).expand(4000, 5)
    draw = lambda **kw: sample_token(scores, **dict(temperature=1., top_k=0, top_p=1.,  # noqa: E731
                                                generator=torch.Generator().manual_seed(0)) | kw)
    freq = torch.bincount(draw(), minlength=5) / 4000
    assert difference(freq, scores[0].softmax(0)) < 0.03
    assert draw(top_k=2).unique().tolist() == [0, 1]
    assert draw(top_p=0.7).unique().tolist() == [0, 1]     # .64 alone does not reach .7
    assert draw(top_p=0.6).unique().tolist() == [0]
    assert draw(temperature=0.).unique().tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Mask, packing, branches

def slow_mask(document, branch, visual):
    L = len(document)
    out = torch.zeros(L, L, dtype=torch.bool)
    for i, j in itertools.product(range(L), range(L)):
        seen = j <= i or (visual is not None and visual[i] and visual[j])
        out[i, j] = bool(document[i] == document[j] and seen and branch[j] in (0, branch[i]))
    return out


def test_mask_against_loops():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        L = int(torch.randint(1, 14, (), generator=generator))
        document = torch.randint(-1, 3, (2, L), generator=generator)
        branch = torch.randint(0, 3, (2, L), generator=generator)
        visual = torch.rand(2, L, generator=generator) < 0.5 if case % 2 else None
        if visual is not None:
            branch[visual] = 0             # pictures stand in the shared part
        got = dense_mask(document, branch, visual)
        assert got.shape == (2, 1, L, L)
        for b in range(2):
            assert torch.equal(got[b, 0], slow_mask(document[b], branch[b], visual if visual is None else visual[b]))
        assert got[:, 0].diagonal(dim1=1, dim2=2).all()    # no empty row


def test_segments_are_the_dense_mask_and_its_gradients(monkeypatch):
    """The CPU's training path on random trees: prefixes may be empty, rows may end in padding; long ones in blocks."""
    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))
    for case in range(30):
        monkeypatch.setattr(PackedTreeAttention, 'BLOCK', 3 if case % 2 else 64)
        document, branch = torch.zeros(2, 3, 40, dtype=torch.long)
        for b in range(3):
            i = 0
            for d in itertools.count():
                for k in range(number(1, 5)):
                    n = number(0 if k == 0 else 1, 9)
                    document[b, i:i + n], branch[b, i:i + n] = d, k
                    i += n
                if i >= 40 or number(0, 4) == 0:
                    break
            document[b, i:], branch[b, i:] = -1, 0
        shapes = ((3, 4, 40, 8), (3, 2, 40, 8), (3, 2, 40, 8))
        inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        results = []
        for mask in (dense_mask(document, branch), PackedTreeAttention(document, branch)):
            out = m.attention(*inputs, mask)
            results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
        for dense, pieces in zip(*results):
            assert difference(dense, pieces) < 1e-5


def test_flex_attention_has_the_same_rule():
    """The mask that CUDA uses, and FlexAttention's forward (uncompiled, slow) with it."""
    generator = torch.Generator().manual_seed(0)
    document = torch.tensor([[0] * 70 + [1] * 50 + [-1] * 8, [0] * 128])
    branch = torch.randint(0, 3, (2, 128), generator=generator)
    visual = (torch.rand(2, 128, generator=generator) < 0.3) & (branch == 0)
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
    for v in (None, visual):
        dense, sees = dense_mask(document, branch, v), m.mask_rule(document, branch, v)
        assert torch.equal(create_mask(sees, 2, None, 128, 128, device='cpu'), dense)
        block = create_block_mask(sees, 2, None, 128, 128, device='cpu')
        query, key, value = (torch.randn(2, h, 128, 16, generator=generator) for h in (4, 2, 2))
        got = flex_attention(query, key, value, block_mask=block, enable_gqa=True)
        assert difference(got, m.attention(query, key, value, dense)) < 1e-5      # measured 7e-7


def packed(rows):
    """A row of (document, branch, tokens): positions of a branch go on from the shared part."""
    tokens, documents, branches, positions, shared = [], [], [], [], {}
    for document, branch, part in rows:
        start = shared.get(document, 0)
        tokens += part
        documents += [document] * len(part)
        branches += [branch] * len(part)
        positions += range(start, start + len(part))
        if branch == 0:
            shared[document] = start + len(part)
    return Batch(tokens=torch.tensor([tokens]), document_ids=torch.tensor([documents]), branch_ids=torch.tensor([branches]),
                 position_ids=torch.tensor([positions]))


PACK = [(0, 0, text(9)), (0, 1, text(6, 1)), (0, 2, text(7, 2)), (1, 0, text(5, 3)), (1, 1, text(4, 4)), (-1, 0, [0] * 3)]


def test_packed_documents_and_branches_are_as_if_alone():
    model = ours(tiny())
    together, start = logits(model, packed(PACK))[0], 0
    for document, branch, part in PACK[:-1]:
        shared = [p for d, b, p in PACK if d == document and b == 0 and branch]
        tokens = sum(shared, []) + part
        alone = logits(model, make_batch(model.config, [tokens]))[0, -len(part):]
        assert difference(together[start:start + len(part)], alone) < 1e-5        # measured 3e-6
        start += len(part)


def test_a_token_touches_only_those_who_see_it():
    """Bitwise: other documents, other branches and the past do not change; its own future does."""
    model = ours(tiny())
    batch = packed(PACK)
    before, L = logits(model, batch)[0], batch.tokens.shape[1]
    sees = slow_mask(batch.document_ids[0], batch.branch_ids[0], None)
    for j in (2, 11, 17, 24, 29):
        changed = batch.tokens.clone()
        changed[0, j] = 291
        after = logits(model, replace(batch, tokens=changed))[0]
        same = torch.tensor([torch.equal(before[i], after[i]) for i in range(L)])
        assert torch.equal(~same, sees[:, j])


def test_molmo2_documents_do_not_mix():
    """Two packed documents with a picture each: visual tokens see one another only inside their own."""
    config = tiny_molmo2()
    model, pictures = ours(config), images(2)
    part = [MOLMO2_IDS[0]] + [MOLMO2_IDS[2]] * 4 + [MOLMO2_IDS[1]]
    rows = [(d, 0, text(3, d) + part + text(4, 5 + d)) for d in range(2)]
    both = packed(rows)
    seen = make_batch(config, both.tokens.tolist(), pictures)
    both = replace(both, patches=seen.patches, pool_index=seen.pool_index, visual_index=seen.visual_index, grid=seen.grid)
    got = logits(model, both)[0]
    for d in range(2):
        alone = logits(model, make_batch(config, [rows[d][2]], pictures[d:d + 1]))[0]
        assert difference(got[13 * d:13 * d + 13], alone) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Loss and gradients

@pytest.mark.parametrize('chunk,z_loss', [(1000, 0.), (7, 0.), (3, .01)])
def test_weighted_cross_entropy(chunk, z_loss):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets, weights = torch.randint(0, 50, (20,), generator=generator), torch.rand(20, generator=generator)
    results = []
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            loss, nll = plain_loss(h, w, targets, weights, z_loss)
            expected = F.cross_entropy(h @ w.T, targets, reduction='none')
            assert difference(nll, expected) < 1e-6
            assert difference(loss, ((expected + z_loss * (h @ w.T).logsumexp(1) ** 2) * weights).sum()) < 1e-5
        else:
            loss, nll = ChunkedLoss.apply(h, w, targets, weights, chunk, z_loss)
        (3 * loss).backward()
        results.append((loss, nll, h.grad, w.grad))
    for a, b in zip(*results):
        assert difference(a, b) < 1e-6 * a.abs().max()     # measured 3e-7
    with torch.autocast('cpu', torch.bfloat16):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, nll = ChunkedLoss.apply(h, w, targets, weights, chunk, z_loss)
    (3 * loss).backward()
    assert h.grad.dtype == w.grad.dtype == nll.dtype == torch.float32
    for a, b in zip(results[0], (loss, nll, h.grad, w.grad)):
        assert difference(a, b) < 0.02 * a.abs().max()     # measured 0.006: eight bits of mantissa
    for which in range(2):                 # one of the two frozen
        h, w = hidden.clone().requires_grad_(which == 0), weight.clone().requires_grad_(which == 1)
        ChunkedLoss.apply(h, w, targets, weights, chunk, z_loss)[0].backward()
        assert difference(3 * (h.grad if which == 0 else w.grad), results[0][2 + which]) < 1e-5


def training_batch(config, seed=0):
    batch, _ = molmo2_case(config) if config.recipe == 'molmo2' else llava_case(config)
    tokens = batch.tokens
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) * (batch.document_ids >= 0)
    targets = tokens.roll(-1, 1) % config.language.vocab_size
    return replace(batch, targets=targets, loss_weights=weights, loss_index=weights.flatten().nonzero()[:, 0])


def gradients(model, batch):
    model.zero_grad()
    loss, nll = model(batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('config', [tiny(), tiny(connector='mlp', pooling=1), tiny_molmo2()], ids=['linear', 'mlp', 'molmo2'])
def test_forward_is_the_weighted_loss(config):
    model = ours(config)
    batch = training_batch(config)
    loss, grads = gradients(model, batch)
    model.zero_grad()
    every = model.logits(model.hidden_states(batch)).flatten(0, 1)
    plain = (F.cross_entropy(every, batch.targets.flatten(), reduction='none') * batch.loss_weights.flatten()).sum()
    plain.backward()
    assert abs(loss - plain.item()) < 1e-5 * abs(loss)
    assert set(grads) == {n for n, p in model.named_parameters()}                 # all parts train
    for name, p in model.named_parameters():
        assert difference(grads[name], p.grad) < 1e-5 * max(p.grad.abs().max(), 1), name


@pytest.mark.parametrize('config', [tiny(), tiny_molmo2()], ids=['nano', 'molmo2'])
def test_fast_forms_have_the_plain_loss_and_gradients(config):
    """Attention with a dense mask and the loss in a few lines, as model.py says them, on packed trees with pictures."""
    from trees import PROCESSOR, build, tree

    from data import collate
    batch = collate([[tree(1, 3), tree(2, 0)], [tree(3, 5, frames=True)]], PROCESSOR, 71)
    results = []
    for fast in (True, False):
        model = build(recipe=config.recipe, fast=fast)
        loss, nll = model(batch, weight_factor=.5, z_loss=1e-3)
        loss.backward()
        results.append((loss.detach(), nll.detach(), *(p.grad.clone() for p in model.parameters())))
    for a, b in zip(*results):
        assert difference(a, b) < 1e-5 * max(b.abs().max(), 1)       # measured 2e-6


@pytest.mark.parametrize('every', [1, 2])
def test_recompute_gives_the_same_gradients(every):
    model = ours(tiny())
    batch = training_batch(model.config)
    model.language_model.dropout = .3
    results = []
    for n in (0, every):
        model.language_model.recompute_every = model.vision_tower.recompute_every = n
        torch.manual_seed(0)
        results.append(gradients(model.train(), batch))
    (loss, grads), (again, grads_again) = results
    assert loss == again and all(torch.equal(grads[n], grads_again[n]) for n in grads)
    assert loss != gradients(model, batch)[0]              # other random numbers drop other things,
    assert gradients(model.eval(), batch)[0] == gradients(model, batch)[0] != loss       # and evaluation drops nothing


def test_frozen_vision_gets_no_gradient():
    model = ours(tiny())
    model.vision_tower.requires_grad_(False)
    _, grads = gradients(model, training_batch(model.config))
    assert not any(n.startswith('vision_tower') for n in grads) and len(grads) > 20


# ---------------------------------------------------------------------------------------------------------------------
# Kind errors

def broken(folder, change):
    """Saves a tiny model with `change` made to its tensors; returns its folder."""
    save_model(ours(tiny()), folder)
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    return folder


def complaint(call, *args):
    with pytest.raises(UserError) as e:
        call(*args)
    return str(e.value)


def test_a_missing_folder_and_a_truncated_file(tmp_path):
    assert re.search('nowhere.* is not a checkpoint folder', complaint(load_model, tmp_path / 'nowhere'))
    model = ours(tiny())
    assert 'nowhere does not exist' in complaint(load_weights, model, tmp_path / 'nowhere')
    save_model(model, tmp_path)
    file = tmp_path / 'model.safetensors'
    whole = file.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert 'model.safetensors is not a whole safetensors file' in complaint(load_model, tmp_path)
    file.unlink()
    assert 'lacks model.safetensors' in complaint(load_model, tmp_path)
    (tmp_path / 'config.json').write_text('{"a": ')
    assert 'config.json is not valid JSON' in complaint(load_model, tmp_path)


def test_a_lost_shard(tmp_path):
    qwen3(tmp_path, max_shard_size='40KB')
    lost = sorted(tmp_path.glob('*.safetensors'))[1]
    lost.unlink()
    assert f"lacks {lost.name}" in complaint(load_weights, VLM(tiny()), tmp_path, 'language_model.')
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'a': '../elsewhere.safetensors'}}))
    assert 'outside its folder' in complaint(load_weights, VLM(tiny()), tmp_path, 'language_model.')


def test_wrong_shape_missing_and_left_over(tmp_path):
    gate = 'language_model.model.layers.1.mlp.gate_proj.weight'
    said = complaint(load_model, broken(tmp_path / 'a', lambda t: t.update({gate: t[gate][:, :40].clone()})))
    assert gate in said and '[80, 40]' in said and '[80, 48]' in said and len(said.splitlines()) == 2
    said = complaint(load_model, broken(tmp_path / 'b', lambda t: t.pop(gate)))
    assert 'language_model.layers.1.mlp.gate_proj.weight [80, 48] is missing' in said and len(said.splitlines()) == 2
    said = complaint(load_model, broken(tmp_path / 'c', lambda t: t.update(extra=torch.zeros(2, 3))))
    assert 'extra [2, 3] has no place' in said
    said = complaint(load_model, broken(tmp_path / 'd', lambda t: [t.pop(k) for k in list(t) if '.mlp.' in k]))
    assert len(said.splitlines()) <= 14    # a wrong model does not fill the screen
    linear_2 = 'multi_modal_projector.linear_2.weight'
    said = complaint(load_model, broken(tmp_path / 'e', lambda t: t.update({linear_2: torch.randn(48, 48)})))
    assert linear_2 in said and "connector = 'mlp'" in said


def test_unknown_names_and_architectures(tmp_path):
    said = complaint(make_config, 'openai/clip-vit-large', 'Qwen/Qwen3-0.6B')
    assert 'openai/clip-vit-large-patch14-336' in said and '\n' not in said
    assert 'Qwen/Qwen3-8B' in complaint(make_config, CLIP, 'Qwen/Qwen2-0.5B')
    assert 'linear, mlp, molmo2' in complaint(lambda: tiny(connector='pixel shuffle'))
    config = to_hf(tiny())
    config.pop('nanomolmo2')
    for change, words in (({'text_config': {'model_type': 'llama'}}, "'llama'; only qwen3"),
                          ({'model_type': 'qwen2_vl'}, "'qwen2_vl' is not llava"),
                          ({'vision_config': {'model_type': 'dinov2'}}, "'dinov2', not CLIP or SigLIP"),
                          ({'text_config': {'model_type': 'qwen3'}}, 'lacks the key')):
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        assert words in complaint(load_model, tmp_path)
