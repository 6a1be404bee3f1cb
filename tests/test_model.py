"""model.py against transformers (weights each writes and the other reads), against a slow mask, and
against itself.

Tiny random models in float32 on the CPU. Every bias and norm weight is randomised, because fresh
ones are 0 and 1 and hide mistakes. Beside a tolerance stands the worst case that was measured.
Needs transformers; downloads nothing.
"""
import copy
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
from data import collate
from extra.hf import load_model, load_weights, save_model, to_hf
from extra.engine import generate, prompt_indices
from extra.kernels import ChunkedLoss, PackedTreeAttention, uncompiled
from trees import PROCESSOR, build, tree

LOGITS = 1e-4    # measured worst case of all architectures, both ways: 1.2e-5 at logits of scale 20
EOS = 5

CLIP = dict(hidden_size=32, intermediate_size=56, num_layers=3, num_heads=4, image_size=32,
            patch_size=8)
SIGLIP = CLIP | dict(style='siglip', activation='gelu_pytorch_tanh', layer_norm_eps=1e-6)
QWEN = dict(hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=16, vocab_size=320, rope_theta=1e4)
IMAGE = 300      # the placeholder; video uses 301
MOLMO2_IDS = tuple(range(320, 328))


def tiny(vision=CLIP, pooling=1, **rest):
    language = QWEN | rest.pop('language', {})
    return make_config(dict(vision), language, pooling=pooling, image_token_id=IMAGE,
                       video_token_id=IMAGE + 1, eos_token_id=EOS, pad_token_id=0, **rest)


def tiny_molmo2(**language):
    vision = SIGLIP | dict(hidden_size=24, num_heads=2, feature_layers=(-1, -2))
    language = dict(extra_vocab_size=16, tie_word_embeddings=False) | language
    config = tiny(vision, recipe='molmo2', connector='molmo2', connector_size=36, pooling=2,
                  visual_token_ids=MOLMO2_IDS, language=language)
    return replace(config, image_token_id=MOLMO2_IDS[2], video_token_id=MOLMO2_IDS[2])


@torch.no_grad()
def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        is_norm = 'norm' in name and name.endswith('weight')
        p.normal_(1 if is_norm else 0, 0.2, generator=generator)
    return model.eval()


def images(n, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def patchify(pictures, p=8):
    """[N, 3, H, W] -> [N, patches, p p 3]: row, column, channel."""
    x = pictures.unfold(2, p, p).unfold(3, p, p)           # [N, 3, rows, columns, p, p]
    x = x.permute(0, 2, 3, 4, 5, 1)                        # [N, rows, columns, p, p, 3]
    return x.flatten(3).flatten(1, 2)


def pixel_values(pictures, style='clip'):
    mean, std = m.PIXEL_STATS[style]
    mean = torch.tensor(mean)[:, None, None]
    std = torch.tensor(std)[:, None, None]
    return (pictures / 255 - mean) / std


def windows(n, grid, k):
    """pool_index of n pictures with k x k windows."""
    index = torch.arange(n * grid * grid).view(n, grid // k, k, grid // k, k)
    return index.transpose(2, 3).reshape(-1, k * k)


def make_batch(config, rows, pictures=None, pool_index=None, left=False):
    """Rows of token ids, padded with token 0 on the right, or on the left for generation."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    filled = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = length - len(row) if left else 0
        tokens[i, start:start + len(row)] = torch.tensor(row)
        filled[i, start:start + len(row)] = True
    position_ids = (filled.cumsum(1) - 1).clamp(min=0)
    batch = Batch(tokens=tokens, document_ids=filled.long() - 1,
                  branch_ids=torch.zeros_like(tokens), position_ids=position_ids,
                  causal=bool(filled.all()))
    if pictures is not None:
        grid = config.vision.image_size // config.vision.patch_size
        if pool_index is None:
            pool_index = windows(len(pictures), grid, config.pooling)
        placeholders = torch.tensor([config.image_token_id, config.video_token_id])
        visual_index = torch.isin(tokens, placeholders).flatten().nonzero()[:, 0]
        batch = replace(batch, patches=patchify(pictures), pool_index=pool_index,
                        visual_index=visual_index, grid=(grid, grid))
    return batch


def is_token(batch):
    """[B, L]: True where there is no padding."""
    return batch.document_ids >= 0


def text(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 290, (n,), generator=generator).tolist()


@torch.no_grad()
def logits(model, batch):
    return model.logits(model.hidden_states(batch))


def difference(a, b, where=None):
    """The largest difference, of all entries or of those where `where` is True."""
    error = (a - b).abs()
    if where is not None:
        error = error[where]
    return error.max().item()


PARITY = {}      # test -> largest difference from transformers; conftest.py prints it in the end


def parity(a, b, where=None):
    """difference(a, b, where), and a note of it for conftest.py."""
    test = os.environ['PYTEST_CURRENT_TEST'].split('::')[1]
    test = test.rsplit(' ', 1)[0]          # without ' (call)'
    worst = difference(a, b, where)
    PARITY[test] = max(PARITY.get(test, 0), worst)
    return worst


def ours(config, seed=0):
    return randomise(VLM(config), seed)


def theirs(folder):
    """The folder as transformers opens it: no remote code, nothing missing, nothing left over."""
    with torch.random.fork_rng():
        model, info = hf.AutoModelForImageTextToText.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False)
    assert not any(info.values()), info
    return model.eval()


def forget_nanomolmo2(folder):
    """Removes our own key from config.json, as in a checkpoint of someone who never heard of us."""
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    config.pop('nanomolmo2')
    file.write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------
# Parts: CLIP, SigLIP2, Qwen3

def hf_vision(style):
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  image_size=32, patch_size=8)
    side = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=99)
    if style == 'clip':
        config = hf.CLIPConfig(vision_config=vision, text_config=dict(hidden_size=16, **side))
        return randomise(hf.CLIPModel(config))
    config = hf.SiglipConfig(vision_config=vision, text_config=dict(hidden_size=32, **side))
    return randomise(hf.SiglipModel(config))


# At 48 pixels the position table is interpolated
@pytest.mark.parametrize('size', [pytest.param(32, marks=pytest.mark.quick), 48])
@pytest.mark.parametrize('style', ['clip', 'siglip'])
def test_vision_tower_matches_transformers(style, size, tmp_path):
    """Every block's output, read from a folder that holds the text side and the heads as well."""
    peer = hf_vision(style)
    peer.save_pretrained(tmp_path)
    pixels = pixel_values(images(2, size), style)
    with torch.no_grad():
        output = peer.vision_model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    states = output.hidden_states[1:]      # the first is the embeddings
    if style == 'clip':
        states = [state[:, 1:] for state in states]        # without the class token
    sizes = CLIP if style == 'clip' else SIGLIP
    side = size // 8
    for layers in ((0,), (1,), (2,), (-1, -3)):
        model = VLM(tiny(sizes | dict(feature_layers=layers)))
        load_weights(model, tmp_path, only='vision_tower.')
        got = model.vision_tower([(patchify(pixels), (side, side))])
        got = got.view(2, side ** 2, -1)
        want = torch.cat([states[i] for i in layers], -1)
        assert parity(got, want) < 1e-5                # measured 1.9e-6


def qwen3(folder=None, tied=True, **save):
    config = hf.Qwen3Config(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e4,
        tie_word_embeddings=tied, eos_token_id=EOS)
    peer = randomise(hf.Qwen3ForCausalLM(config))
    if folder is not None:
        peer.save_pretrained(folder, **save)
    return peer


def store_head(folder):
    """Qwen3-0.6B's file holds lm_head.weight although it is tied."""
    file = folder / 'model.safetensors'
    tensors = load_file(file)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()
    save_file(tensors, file)


@pytest.mark.parametrize('kind', [pytest.param('one file', marks=pytest.mark.quick),
                                  'sharded', 'bf16', 'stored head'])
@pytest.mark.parametrize('tied', [True, False])
def test_qwen3_logits_match_transformers(tied, kind, tmp_path):
    peer = qwen3(tied=tied)
    if kind == 'bf16':
        peer = peer.bfloat16()
    if kind == 'sharded':
        peer.save_pretrained(tmp_path, max_shard_size='40KB')
        assert len(list(tmp_path.glob('*.safetensors'))) > 2
    else:
        peer.save_pretrained(tmp_path)
    peer = hf.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if kind == 'stored head' and tied:
        store_head(tmp_path)
    config = tiny(language=dict(tie_word_embeddings=tied))
    model = VLM(config)
    load_weights(model, tmp_path, only=('language_model.', 'lm_head.'))
    batch = make_batch(config, [text(19), text(11, 1)])
    with torch.no_grad():
        want = peer(batch.tokens, attention_mask=is_token(batch).long()).logits
    assert parity(logits(model, batch), want, is_token(batch)) < LOGITS


def test_clip_and_qwen3_at_real_width_match_transformers(tmp_path):
    """Two layers of CLIP-L/336 and of Qwen3-0.6B: no dimension is right for tiny models only."""
    vision = m.VISION['openai/clip-vit-large-patch14-336']
    vision = vision | dict(num_layers=2, feature_layers=(-2, -1))
    language = m.LANGUAGE['Qwen/Qwen3-0.6B']
    language = language | dict(num_layers=2, vocab_size=500)   # the vocabulary is in the counts
    config = make_config(vision, language, pooling=1, image_token_id=IMAGE,
                         video_token_id=IMAGE + 1, eos_token_id=EOS, pad_token_id=0)
    with torch.device('meta'):
        model = VLM(config)
    model.to_empty(device='cpu').set_buffers()
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = 'norm' in name and name.endswith('weight')
            p.normal_(1 if is_norm else 0, 0.02)
    save_model(model, tmp_path)
    peer = theirs(tmp_path)
    picture = images(1, 336)
    batch = make_batch(config, [text(3) + [IMAGE] * 576 + text(5)])
    visual_index = (batch.tokens[0] == IMAGE).nonzero()[:, 0]
    batch = replace(batch, patches=patchify(picture, 14), pool_index=windows(1, 24, 1),
                    visual_index=visual_index, grid=(24, 24))
    with torch.no_grad():
        want = peer(input_ids=batch.tokens, pixel_values=pixel_values(picture)).logits
    assert parity(logits(model, batch), want) < LOGITS     # measured 2e-6 at logits of scale 3


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
def test_parameter_counts_of_published_sizes(vision, language, recipe, part, count):
    sizes = m.LANGUAGE[language]
    connector = 'linear'
    if recipe == 'molmo2':
        sizes = sizes | dict(extra_vocab_size=128, tie_word_embeddings=False)
        connector = 'molmo2'
    with torch.device('meta'):
        model = VLM(make_config(vision, sizes, recipe=recipe, connector=connector))
    counts = {}
    for name, parameters in model.parts().items():
        counts[name] = sum(p.numel() for p in parameters)
    counts['all'] = sum(counts.values())
    assert counts[part] == count


# --------------------------------------------------------------------------------------------------
# Whole models, both directions

def span(n, token=IMAGE):
    return [7] + [token] * n + [8]


LLAVA = {
    'linear': tiny(),
    'mlp': tiny(connector='mlp'),
    'untied': tiny(language=dict(tie_word_embeddings=False)),
    'two layers': tiny(CLIP | dict(feature_layers=(-2, -1))),
    'last layer': tiny(CLIP | dict(feature_layers=(-1,))),
    'siglip': tiny(SIGLIP),
    'siglip mlp': tiny(SIGLIP | dict(feature_layers=(-1, 0)), connector='mlp'),
}


def llava_case(config):
    """Rows with 0, 1 and 3 pictures, of unequal length."""
    rows = [
        text(9),
        text(4, 1) + span(16) + text(6, 2),
        span(16) + text(2, 3) + span(16) + span(16) + text(3, 4),
    ]
    pictures = images(4)
    batch = make_batch(config, rows, pictures)
    inputs = dict(input_ids=batch.tokens, attention_mask=is_token(batch).long(),
                  pixel_values=pixel_values(pictures, config.vision.style))
    return batch, inputs


@pytest.mark.parametrize('name', [pytest.param('linear', marks=pytest.mark.quick), 'mlp', 'untied',
                                  'two layers', 'last layer', 'siglip', 'siglip mlp'])
def test_llava_matches_transformers_both_ways(name, tmp_path):
    config = LLAVA[name]
    model = ours(config)
    save_model(model, tmp_path / 'ours')
    batch, inputs = llava_case(config)
    got = logits(model, batch)
    peer = theirs(tmp_path / 'ours')
    assert isinstance(peer, hf.LlavaForConditionalGeneration)
    with torch.no_grad():
        want = peer(**inputs).logits
    assert parity(got, want, is_token(batch)) < LOGITS

    second_layer = copy.deepcopy(peer.model.multi_modal_projector.linear_2.state_dict())
    randomise(peer, 1)
    if config.connector == 'linear':       # we know it again by its second layer, the identity
        peer.model.multi_modal_projector.linear_2.load_state_dict(second_layer)
    peer.save_pretrained(tmp_path / 'theirs')
    forget_nanomolmo2(tmp_path / 'theirs')
    back = load_model(tmp_path / 'theirs')
    assert back.config.vision.feature_layers == config.vision.feature_layers
    with torch.no_grad():
        want = peer(**inputs).logits
    assert parity(logits(back, batch), want, is_token(batch)) < LOGITS


@pytest.mark.parametrize('tower', ['vision_tower.', 'vision_tower.vision_model.'])
@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_llava_weight_name_spellings_load(prefix, tower, tmp_path):
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
    back = load_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back[name]), name


@pytest.mark.parametrize('connector', ['linear', 'mlp'])
def test_llava_next_video_matches_transformers(connector, tmp_path):
    """2x2 pooling. transformers pools clips only, so a picture goes in as a clip of one frame."""
    config = tiny(pooling=2, connector=connector)
    model = ours(config)
    save_model(model, tmp_path)
    rows = [text(3) + span(4, IMAGE + 1) + text(4, 1), span(4, IMAGE + 1) + text(5, 2)]
    pictures = images(2)
    batch = make_batch(config, rows, pictures)
    batch.causal = True                    # padding on the right, where no token attends to it
    peer = theirs(tmp_path)
    assert isinstance(peer, hf.LlavaNextVideoForConditionalGeneration)
    inputs = dict(input_ids=batch.tokens, attention_mask=is_token(batch).long(),
                  pixel_values_videos=pixel_values(pictures)[:, None])
    with torch.no_grad():
        want = peer(**inputs).logits
    assert parity(logits(model, batch), want, is_token(batch)) < LOGITS
    peer.save_pretrained(tmp_path / 'theirs')
    forget_nanomolmo2(tmp_path / 'theirs')
    back = load_model(tmp_path / 'theirs')
    assert back.config.pooling == 2
    assert difference(logits(back, batch), logits(model, batch)) == 0


def molmo2_case(config):
    """Rows with two, one and no pictures; two crops a picture, ragged windows."""
    start, end, patch, column = MOLMO2_IDS[:4]
    counts = [(3, 4), (5, 2), (4, 4)]      # (global view, crops) tokens of each picture
    num_tokens = sum(low + high for low, high in counts)
    generator = torch.Generator().manual_seed(3)
    pool = torch.randint(0, 6 * 16, (num_tokens, 4), generator=generator)
    pool[torch.rand(pool.shape, generator=generator) < 0.3] = -1
    pool[:, 0].clamp_(min=0)

    def picture(i):
        low, high = counts[i]
        return [MOLMO2_IDS[4]] + [patch] * low + [end, start] + [patch] * high + [column, end]
    rows = [
        text(2) + picture(0) + text(3, 1) + picture(1) + text(4, 2),
        picture(2) + text(3, 3),
        text(6, 4),
    ]
    pictures = images(6)
    batch = make_batch(config, rows, pictures, pool)
    grids = [[1, low, 1, high] for low, high in counts]
    return batch, molmo2_inputs(batch, pictures, pool, grids, num_crops=[2, 2, 2])


def molmo2_inputs(batch, pictures, pool, grids, num_crops):
    """The arguments of transformers' model."""
    is_visual = torch.isin(batch.tokens, torch.tensor(MOLMO2_IDS))
    return dict(
        input_ids=batch.tokens,
        attention_mask=is_token(batch).long(),
        mm_token_type_ids=is_visual.long(),
        pixel_values=patchify(pixel_values(pictures, 'siglip')),
        image_token_pooling=pool,
        image_grids=torch.tensor(grids),
        image_num_crops=torch.tensor(num_crops),
    )


@pytest.mark.parametrize('tied', [True, False])
def test_molmo2_matches_transformers_both_ways(tied, tmp_path):
    config = tiny_molmo2(tie_word_embeddings=tied)
    model = ours(config)
    save_model(model, tmp_path / 'ours')
    batch, inputs = molmo2_case(config)
    peer = theirs(tmp_path / 'ours')
    assert isinstance(peer, hf.Molmo2ForConditionalGeneration)
    causal = inputs | dict(mm_token_type_ids=torch.zeros_like(inputs['input_ids']))
    with torch.no_grad():
        want = peer(**inputs).logits
        want_causal = peer(**causal).logits
    assert parity(logits(model, batch), want, is_token(batch)) < LOGITS
    assert difference(want, want_causal, is_token(batch)) > 0.1        # the visual rule is felt
    peer.save_pretrained(tmp_path / 'theirs')
    forget_nanomolmo2(tmp_path / 'theirs')
    stored = load_file(tmp_path / 'theirs/model.safetensors')
    # transformers stores the table in two halves, 168 + 168 rows and not 320 + 16
    assert len(stored['model.transformer.wte.embedding']) == 168
    back = load_model(tmp_path / 'theirs')
    assert back.config.visual_token_ids[:3] == MOLMO2_IDS[:3]
    back.visual_ids = torch.tensor(MOLMO2_IDS)     # transformers drops those its processor needs
    assert parity(logits(back, batch), want, is_token(batch)) < LOGITS


def test_molmo2_released_config_format_loads(tmp_path):
    """Released folders: legacy config keys, fewer layers stored than declared, negative layers."""
    config = tiny_molmo2()
    model = ours(config)
    save_model(model, tmp_path)
    text_config = json.loads((tmp_path / 'config.json').read_text())['text_config']
    ids = ('image_start_token_id', 'image_end_token_id', 'image_patch_id', 'image_col_id',
           'low_res_image_start_token_id', 'image_low_res_id',
           'frame_start_token_id', 'frame_end_token_id')
    vit = dict(
        hidden_size=24, intermediate_size=56, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6,
        image_default_input_size=[32, 32], image_patch_size=8, image_num_pos=16)
    adapter = dict(
        vit_layers=[-3, -4], hidden_size=24, num_attention_heads=2, num_key_value_heads=2,
        head_dim=12, hidden_act='silu', intermediate_size=36, text_hidden_size=48)
    text_config['layer_norm_eps'] = text_config.pop('rms_norm_eps')
    text_config['qkv_bias'] = text_config.pop('attention_bias')
    published = dict(model_type='molmo2', architectures=['Molmo2ForConditionalGeneration'],
                     vit_config=vit, adapter_config=adapter, text_config=text_config,
                     tie_word_embeddings=False, **dict(zip(ids, MOLMO2_IDS)))
    (tmp_path / 'config.json').write_text(json.dumps(published))
    batch, inputs = molmo2_case(config)
    back = load_model(tmp_path)
    peer = theirs(tmp_path)
    assert back.config.vision == config.vision
    with torch.no_grad():
        want = peer(**inputs).logits
    assert parity(logits(back, batch), want, is_token(batch)) < LOGITS
    assert parity(logits(model, batch), want, is_token(batch)) < LOGITS


def test_save_and_load_model_is_exact(tmp_path):
    configs = [tiny(), tiny(SIGLIP, 2, connector='mlp'), tiny(connector='molmo2'), tiny_molmo2()]
    for i, config in enumerate(configs):
        model = ours(config)
        save_model(model, tmp_path / str(i))
        back = load_model(tmp_path / str(i))
        assert back.config == config
        for p, q in zip(model.parameters(), back.parameters()):
            assert torch.equal(p, q)
        assert torch.equal(model.pixel_shift, back.pixel_shift)
        assert torch.equal(model.visual_ids, back.visual_ids)


# --------------------------------------------------------------------------------------------------
# Generation. The prompts and seeds are such that EOS does not come among the first 64 tokens.

def generated(model, batch, n=64, **how):
    """[B, n] tokens of the engine."""
    return torch.stack(list(generate(model, batch, n, **how)), 1)


def plainly_generated(model, batch, n=64, **how):
    """[B, n] tokens of the plain form, which encodes everything anew for each token."""
    return torch.stack(list(model.generate(batch, n, **how)), 1)


def no_eos(config):
    return replace(config, eos_token_id=-1)


@pytest.mark.parametrize('kind', ['qwen', 'llava', 'molmo2'])
def test_greedy_generation_matches_transformers(kind, tmp_path):
    """64 tokens, the same with the cache, without it, from transformers, batched and one by one."""
    config = no_eos(tiny_molmo2() if kind == 'molmo2' else tiny())
    model = ours(config)
    save_model(model, tmp_path)
    peer = theirs(tmp_path)
    pictures = None
    pool = None
    rows = [text(7), text(12, 1), text(3, 2), text(9, 3)]              # of several lengths
    if kind == 'llava':
        pictures = images(4)
        rows = [text(i) + span(16) + text(5 + i, 1) for i in (0, 2, 5, 3)]
    if kind == 'molmo2':
        pictures = images(4)
        pool = windows(4, 4, 2)
        pool[1:7:2, 3] = -1
        visual = [MOLMO2_IDS[4]] + [MOLMO2_IDS[2]] * 4 + [MOLMO2_IDS[1]]
        rows = [text(i) + visual + text(5 + i, 1) for i in (0, 2, 5, 3)]
    batch = make_batch(config, rows, pictures, pool, left=True)
    together = generated(model, batch)
    for i, row in enumerate(rows):
        picture = None
        index = None
        if pictures is not None:
            picture = pictures[i:i + 1]
        if pool is not None:               # windows of the 16 patches of this picture
            index = pool[4 * i:4 * i + 4]
            index = torch.where(index < 0, -1, index - 16 * i)
        batch_of_one = make_batch(config, [row], picture, index)
        alone = generated(model, batch_of_one)
        assert torch.equal(alone, together[i:i + 1])
        if i == 1:
            assert torch.equal(alone, plainly_generated(model, batch_of_one))
    inputs = dict(input_ids=batch.tokens, attention_mask=is_token(batch).long())
    if kind == 'llava':
        inputs['pixel_values'] = pixel_values(pictures)
    if kind == 'molmo2':
        inputs = molmo2_inputs(batch, pictures, pool, [[1, 2, 1, 2]] * 4, num_crops=[1] * 4)
    greedy = dict(do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    want = peer.generate(**inputs, **greedy)
    assert torch.equal(together, want[:, batch.tokens.shape[1]:])
    assert len(together.unique()) > 10     # not one token for ever, which any bug would pass
    if kind == 'qwen':                     # transformers penalises padding too: one row, without
        alone = generated(model, make_batch(config, rows[:1]), repetition_penalty=1.4)
        want = peer.generate(torch.tensor(rows[:1]), repetition_penalty=1.4, **greedy)
        assert torch.equal(alone, want[:, len(rows[0]):])
        assert not torch.equal(alone, together[:1])


def test_uncompiled_context_skips_compiled_blocks():
    config = tiny()
    model = ours(config)
    batch = make_batch(config, [text(7)])
    want = logits(model, batch)
    for block in model.blocks():           # as `compile` leaves it, with compiled code that fails
        block._compiled_call_impl = lambda *_, **__: 1 / 0
    with uncompiled(model):
        assert torch.equal(logits(model, batch), want)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch)


def test_generation_stops_at_eos_token():
    config = no_eos(tiny())
    model = ours(config)
    batch = make_batch(config, [text(7), text(12, 1)], left=True)
    free = generated(model, batch, 12)
    eos = free[0, 3].item()
    model.config = replace(config, eos_token_id=eos)
    stopped = generated(model, batch, 12)
    ends = []
    for row in free.tolist():
        ends.append(row.index(eos) if eos in row else 11)
    assert stopped.shape[1] == max(ends) + 1
    for row, want, end in zip(stopped, free, ends):
        assert torch.equal(row[:end + 1], want[:end + 1])
        assert (row[end + 1:] == -1).all()


@pytest.mark.parametrize('how', [dict(temperature=0.),
                                 dict(temperature=1.3, top_k=20, top_p=.9, seed=3)])
def test_generation_engine_equals_plain_generate(how):
    """Two answers at once, one of which ends early."""
    config = no_eos(tiny())
    model = ours(config)
    batch = make_batch(config, [text(7), text(7, 1)])
    free = plainly_generated(model, batch, 12, **how)
    model.config = replace(config, eos_token_id=free[0, 3].item())
    plain = plainly_generated(model, batch, 12, **how)
    fast = generated(model, batch, 12, **how)
    assert plain[0, 4] == -1
    if how['temperature'] == 0:
        assert torch.equal(plain, fast)
    else:            # once half of the answers have ended, the engine draws for the other rows only
        assert torch.equal(plain[:, :4], fast[:, :4])


def test_prompt_indices_of_documents_and_branches():
    """Two documents with branches, one without, padding: who answers, and what each sees."""
    document = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1, -1, -1]])
    branch = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 0], [1, 1, 2, 3, 0, 0, 0, 0]])
    assert prompt_indices(document, branch).tolist() == [
        [0, 1, 2, 3],
        [-1, 0, 1, 4],
        [-1, -1, 5, 6],
        [-1, -1, 8, 9],
        [-1, -1, -1, 10],
        [-1, -1, -1, 11],
    ]


def test_sampling_temperature_top_k_and_top_p():
    scores = torch.tensor([[4., 3, 2, 1, 0]]).expand(4000, 5)

    def draw(temperature=1., top_k=0, top_p=1.):
        generator = torch.Generator().manual_seed(0)
        return sample_token(scores, temperature=temperature, top_k=top_k, top_p=top_p,
                            generator=generator)
    frequency = torch.bincount(draw(), minlength=5) / 4000
    assert difference(frequency, scores[0].softmax(0)) < 0.03
    assert draw(top_k=2).unique().tolist() == [0, 1]
    assert draw(top_p=0.7).unique().tolist() == [0, 1]     # .64 alone does not reach .7
    assert draw(top_p=0.6).unique().tolist() == [0]
    assert draw(temperature=0.).unique().tolist() == [0]


# --------------------------------------------------------------------------------------------------
# Mask, packing, branches

def slow_mask(document, branch, visual):
    L = len(document)
    out = torch.zeros(L, L, dtype=torch.bool)
    for i, j in itertools.product(range(L), range(L)):
        same_document = document[i] == document[j]
        not_later = j <= i or (visual is not None and visual[i] and visual[j])
        shared_or_own_branch = branch[j] in (0, branch[i])
        out[i, j] = bool(same_document and not_later and shared_or_own_branch)
    return out


@pytest.mark.quick
def test_dense_mask_equals_loops():
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
            visual_of_row = None if visual is None else visual[b]
            assert torch.equal(got[b, 0], slow_mask(document[b], branch[b], visual_of_row))
        assert got[:, 0].diagonal(dim1=1, dim2=2).all()    # no empty row


def random_trees(number):
    """document_ids and branch_ids of three rows of 40 tokens. Prefixes may be empty, and rows may
    end in padding. number(low, high) draws a number below high."""
    document = torch.zeros(3, 40, dtype=torch.long)
    branch = torch.zeros(3, 40, dtype=torch.long)
    for b in range(3):
        start = 0
        for d in itertools.count():
            for k in range(number(1, 5)):
                end = start + number(0 if k == 0 else 1, 9)
                document[b, start:end] = d
                branch[b, start:end] = k
                start = end
            if start >= 40 or number(0, 4) == 0:
                break
        document[b, start:] = -1
        branch[b, start:] = 0
    return document, branch


@pytest.mark.quick
def test_packed_tree_attention_equals_dense_attention(monkeypatch):
    """The CPU's training path on random trees, outputs and gradients; long ones in blocks."""
    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))
    for case in range(30):
        monkeypatch.setattr(PackedTreeAttention, 'BLOCK', 3 if case % 2 else 64)
        document, branch = random_trees(number)
        shapes = ((3, 4, 40, 8), (3, 2, 40, 8), (3, 2, 40, 8))
        inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        results = []
        for mask in (dense_mask(document, branch), PackedTreeAttention(document, branch)):
            out = m.attention(*inputs, mask)
            gradients = torch.autograd.grad(out.sin().sum(), inputs)
            results.append((out, *gradients))
        for expected, got in zip(*results):
            assert difference(expected, got) < 1e-5


def test_flex_attention_equals_dense_attention():
    """The mask that CUDA uses, and FlexAttention's forward (uncompiled, slow) with it."""
    generator = torch.Generator().manual_seed(0)
    document = torch.tensor([[0] * 70 + [1] * 50 + [-1] * 8, [0] * 128])
    branch = torch.randint(0, 3, (2, 128), generator=generator)
    visual = (torch.rand(2, 128, generator=generator) < 0.3) & (branch == 0)
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
    for v in (None, visual):
        dense = dense_mask(document, branch, v)
        rule = m.mask_rule(document, branch, v)
        assert torch.equal(create_mask(rule, 2, None, 128, 128, device='cpu'), dense)
        block = create_block_mask(rule, 2, None, 128, 128, device='cpu')
        query = torch.randn(2, 4, 128, 16, generator=generator)
        key = torch.randn(2, 2, 128, 16, generator=generator)
        value = torch.randn(2, 2, 128, 16, generator=generator)
        got = flex_attention(query, key, value, block_mask=block, enable_gqa=True)
        want = m.attention(query, key, value, dense)
        assert difference(got, want) < 1e-5                # measured 7e-7


def packed(parts):
    """A row of (document, branch, tokens): positions of a branch go on from the shared part."""
    tokens, documents, branches, positions = [], [], [], []
    shared = {}                            # document -> length of its shared part
    for document, branch, part in parts:
        start = shared.get(document, 0)
        tokens += part
        documents += [document] * len(part)
        branches += [branch] * len(part)
        positions += range(start, start + len(part))
        if branch == 0:
            shared[document] = start + len(part)
    return Batch(tokens=torch.tensor([tokens]), document_ids=torch.tensor([documents]),
                 branch_ids=torch.tensor([branches]), position_ids=torch.tensor([positions]))


PACK = [                                   # (document, branch, tokens)
    (0, 0, text(9)),
    (0, 1, text(6, 1)),
    (0, 2, text(7, 2)),
    (1, 0, text(5, 3)),
    (1, 1, text(4, 4)),
    (-1, 0, [0] * 3),                      # padding
]


@pytest.mark.quick
def test_packed_documents_and_branches_equal_separate_rows():
    model = ours(tiny())
    together = logits(model, packed(PACK))[0]
    start = 0
    prefixes = {document: part for document, branch, part in PACK if branch == 0}
    for document, branch, part in PACK[:-1]:
        tokens = part if branch == 0 else prefixes[document] + part
        alone = logits(model, make_batch(model.config, [tokens]))[0, -len(part):]
        end = start + len(part)
        assert difference(together[start:end], alone) < 1e-5           # measured 3e-6
        start = end


@pytest.mark.quick
def test_mask_changed_token_affects_only_those_that_attend():
    """Bitwise: other documents, other branches and the past do not change; its own future does."""
    model = ours(tiny())
    batch = packed(PACK)
    before = logits(model, batch)[0]       # [L, vocabulary]
    attends = slow_mask(batch.document_ids[0], batch.branch_ids[0], None)
    for j in (2, 11, 17, 24, 29):
        changed = batch.tokens.clone()
        changed[0, j] = 291
        after = logits(model, replace(batch, tokens=changed))[0]
        is_other = (before != after).any(-1)
        assert torch.equal(is_other, attends[:, j])


def test_molmo2_packed_documents_equal_separate_rows():
    """Two documents with a picture each, whose visual tokens attend to those of their own only."""
    config = tiny_molmo2()
    model = ours(config)
    pictures = images(2)
    visual = [MOLMO2_IDS[0]] + [MOLMO2_IDS[2]] * 4 + [MOLMO2_IDS[1]]
    rows = [text(3, d) + visual + text(4, 5 + d) for d in range(2)]    # 13 tokens each
    both = packed([(0, 0, rows[0]), (1, 0, rows[1])])
    unpacked = make_batch(config, both.tokens.tolist(), pictures)
    both = replace(both, patches=unpacked.patches, pool_index=unpacked.pool_index,
                   visual_index=unpacked.visual_index, grid=unpacked.grid)
    got = logits(model, both)[0]
    for d in range(2):
        alone = logits(model, make_batch(config, [rows[d]], pictures[d:d + 1]))[0]
        assert difference(got[13 * d:13 * d + 13], alone) < 1e-5


# --------------------------------------------------------------------------------------------------
# Loss and gradients

@pytest.mark.quick
@pytest.mark.parametrize('chunk,z_loss', [(1000, 0.), (7, 0.), (3, .01)])
def test_chunked_loss_equals_plain_loss(chunk, z_loss):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator)
    table = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (20,), generator=generator)
    weights = torch.rand(20, generator=generator)

    h = hidden.clone().requires_grad_()
    w = table.clone().requires_grad_()
    loss, nll = plain_loss(h, w, targets, weights, z_loss)
    scores = h @ w.T
    expected = F.cross_entropy(scores, targets, reduction='none')
    assert difference(nll, expected) < 1e-6
    expected = ((expected + z_loss * scores.logsumexp(1) ** 2) * weights).sum()
    assert difference(loss, expected) < 1e-5
    (3 * loss).backward()
    plain = (loss, nll, h.grad, w.grad)

    h = hidden.clone().requires_grad_()
    w = table.clone().requires_grad_()
    loss, nll = ChunkedLoss.apply(h, w, targets, weights, chunk, z_loss)
    (3 * loss).backward()
    for a, b in zip(plain, (loss, nll, h.grad, w.grad)):
        assert difference(a, b) < 1e-6 * a.abs().max()     # measured 3e-7

    h = hidden.clone().requires_grad_()
    w = table.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        loss, nll = ChunkedLoss.apply(h, w, targets, weights, chunk, z_loss)
    (3 * loss).backward()
    assert h.grad.dtype == w.grad.dtype == nll.dtype == torch.float32
    for a, b in zip(plain, (loss, nll, h.grad, w.grad)):
        assert difference(a, b) < 0.02 * a.abs().max()     # measured 0.006: eight bits of mantissa

    for trained in range(2):               # the other one is frozen
        inputs = [hidden.clone(), table.clone()]
        inputs[trained].requires_grad_()
        loss, _ = ChunkedLoss.apply(*inputs, targets, weights, chunk, z_loss)
        loss.backward()
        assert difference(3 * inputs[trained].grad, plain[2 + trained]) < 1e-5


def training_batch(config, seed=0):
    case = molmo2_case if config.recipe == 'molmo2' else llava_case
    batch, _ = case(config)
    tokens = batch.tokens
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens.shape, generator=generator) * is_token(batch)
    targets = tokens.roll(-1, 1) % config.language.vocab_size
    loss_index = weights.flatten().nonzero()[:, 0]
    return replace(batch, targets=targets, loss_weights=weights, loss_index=loss_index)


def gradients(model, batch):
    """(loss, {name: gradient})."""
    model.zero_grad()
    loss, nll = model(batch)
    loss.backward()
    named = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            named[name] = p.grad.clone()
    return loss.item(), named


@pytest.mark.parametrize('config', [tiny(), tiny(connector='mlp', pooling=1), tiny_molmo2()],
                         ids=['linear', 'mlp', 'molmo2'])
def test_forward_loss_equals_weighted_cross_entropy(config):
    model = ours(config)
    batch = training_batch(config)
    loss, grads = gradients(model, batch)
    model.zero_grad()
    scores = model.logits(model.hidden_states(batch)).flatten(0, 1)    # [B x L, vocabulary]
    nll = F.cross_entropy(scores, batch.targets.flatten(), reduction='none')
    plain = (nll * batch.loss_weights.flatten()).sum()
    plain.backward()
    assert abs(loss - plain.item()) < 1e-5 * abs(loss)
    assert set(grads) == {n for n, p in model.named_parameters()}      # all parts train
    for name, p in model.named_parameters():
        assert difference(grads[name], p.grad) < 1e-5 * max(p.grad.abs().max(), 1), name


@pytest.mark.quick
@pytest.mark.parametrize('recipe', ['nano', 'molmo2'])
def test_fast_forward_equals_plain_loss_and_gradients(recipe):
    """The plain form: a dense mask and `plain_loss`. On packed trees with pictures."""
    batch = collate([[tree(1, 3), tree(2, 0)], [tree(3, 5, frames=True)]], PROCESSOR, 71)
    results = []
    for fast in (True, False):
        model = build(recipe=recipe, fast=fast)
        loss, nll = model(batch, weight_factor=.5, z_loss=1e-3)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append((loss.detach(), nll.detach(), *grads))
    for a, b in zip(*results):
        assert difference(a, b) < 1e-5 * max(b.abs().max(), 1)       # measured 2e-6


@pytest.mark.parametrize('every', [1, 2])
def test_recompute_keeps_loss_and_gradients(every):
    model = ours(tiny())
    batch = training_batch(model.config)
    model.language_model.dropout = .3
    calls = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    num_calls = []
    for n in (0, every):
        model.language_model.recompute_every = n
        model.vision_tower.recompute_every = n
        torch.manual_seed(0)
        calls.clear()
        results.append(gradients(model.train(), batch))
        num_calls.append(len(calls))
    # Two blocks of the tower and two of the decoder; those that are checkpointed run twice
    assert num_calls == [4, 4 + 4 // every]
    (loss, grads), (loss_again, grads_again) = results
    assert loss == loss_again
    for name in grads:
        assert torch.equal(grads[name], grads_again[name]), name
    assert loss != gradients(model, batch)[0]              # other random numbers drop other values,
    model.eval()                                           # and evaluation drops none
    assert gradients(model, batch)[0] == gradients(model, batch)[0] != loss


def test_frozen_vision_gets_no_gradient():
    model = ours(tiny())
    model.vision_tower.requires_grad_(False)
    _, grads = gradients(model, training_batch(model.config))
    assert not any(n.startswith('vision_tower') for n in grads)
    assert len(grads) > 20


# --------------------------------------------------------------------------------------------------
# Errors

def complaint_about(folder, change):
    """What load_model says of a tiny model with `change` made to its tensors."""
    save_model(ours(tiny()), folder)
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    return complaint(load_model, folder)


def complaint(call, *args):
    """The message of the UserError that call(*args) raises."""
    with pytest.raises(UserError) as e:
        call(*args)
    return str(e.value)


def test_load_error_names_missing_folder_or_truncated_file(tmp_path):
    message = complaint(load_model, tmp_path / 'nowhere')
    assert re.search('nowhere.* is not a checkpoint folder', message)
    model = ours(tiny())
    assert 'nowhere does not exist' in complaint(load_weights, model, tmp_path / 'nowhere')
    save_model(model, tmp_path)
    file = tmp_path / 'model.safetensors'
    whole = file.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = complaint(load_model, tmp_path)
        assert 'model.safetensors is not a whole safetensors file' in message
    file.unlink()
    assert 'lacks model.safetensors' in complaint(load_model, tmp_path)
    (tmp_path / 'config.json').write_text('{"a": ')
    assert 'config.json is not valid JSON' in complaint(load_model, tmp_path)


def test_load_error_names_lost_shard(tmp_path):
    qwen3(tmp_path, max_shard_size='40KB')
    lost = sorted(tmp_path.glob('*.safetensors'))[1]
    lost.unlink()
    assert f"lacks {lost.name}" in complaint(load_weights, VLM(tiny()), tmp_path, 'language_model.')
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'a': '../elsewhere.safetensors'}}))
    assert 'outside its folder' in complaint(load_weights, VLM(tiny()), tmp_path, 'language_model.')


def test_load_error_names_wrong_missing_and_extra_tensors(tmp_path):
    gate = 'language_model.model.layers.1.mlp.gate_proj.weight'
    linear_2 = 'multi_modal_projector.linear_2.weight'

    def narrow(tensors):
        tensors[gate] = tensors[gate][:, :40].clone()
    message = complaint_about(tmp_path / 'narrow', narrow)
    assert gate in message
    assert '[80, 40]' in message and '[80, 48]' in message
    assert len(message.splitlines()) == 2

    def lose(tensors):
        del tensors[gate]
    message = complaint_about(tmp_path / 'lose', lose)
    assert 'language_model.layers.1.mlp.gate_proj.weight [80, 48] is missing' in message
    assert len(message.splitlines()) == 2

    def add(tensors):
        tensors['extra'] = torch.zeros(2, 3)
    assert 'extra [2, 3] has no place' in complaint_about(tmp_path / 'add', add)

    def lose_many(tensors):
        for name in list(tensors):
            if '.mlp.' in name:
                del tensors[name]
    message = complaint_about(tmp_path / 'lose_many', lose_many)
    assert len(message.splitlines()) <= 14     # a wrong model does not fill the screen

    def second_layer(tensors):
        tensors[linear_2] = torch.randn(48, 48)
    message = complaint_about(tmp_path / 'second_layer', second_layer)
    assert linear_2 in message
    assert "connector = 'mlp'" in message


def test_config_error_names_unknown_model_or_architecture(tmp_path):
    message = complaint(make_config, 'openai/clip-vit-large', 'Qwen/Qwen3-0.6B')
    assert 'openai/clip-vit-large-patch14-336' in message
    assert '\n' not in message
    assert 'Qwen/Qwen3-8B' in complaint(make_config, CLIP, 'Qwen/Qwen2-0.5B')
    assert 'linear, mlp, molmo2' in complaint(lambda: tiny(connector='pixel shuffle'))
    config = to_hf(tiny())
    config.pop('nanomolmo2')
    changes = [
        ({'text_config': {'model_type': 'llama'}}, "'llama'; only qwen3"),
        ({'model_type': 'qwen2_vl'}, "'qwen2_vl' is not llava"),
        ({'vision_config': {'model_type': 'dinov2'}}, "'dinov2', not CLIP or SigLIP"),
        ({'text_config': {'model_type': 'qwen3'}}, 'lacks the key'),
    ]
    for change, words in changes:
        (tmp_path / 'config.json').write_text(json.dumps(config | change))
        assert words in complaint(load_model, tmp_path)
