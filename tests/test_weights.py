"""Initial checkpoints from a hub: tiny towers in their true layout, opened here and in transformers."""
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402
from extra.hf import save_model  # noqa: E402
from hub import Hub  # noqa: E402
from test_prepare import environment  # noqa: E402


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('weights')
    with Hub(tmp_path / 'hub') as hub:
        models = tmp_path / 'hub/models'
        torch.manual_seed(0)
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
        transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))).save_pretrained(models / 'o/clip')
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=1024, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, tie_word_embeddings=True)).save_pretrained(models / 'o/qwen3', max_shard_size='100KB')
        subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', tmp_path / 'world', '--num', '10', '--num_clocks', '5',
                        '--num_text', '5', '--num_clips', '8', '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
        shutil.copy(tmp_path / 'world/shapes/tokenizer.json', models / 'o/qwen3')
        (models / 'o/clip/pytorch_model.bin').write_bytes(b'a pickle')
        shutil.copytree(models / 'o/clip', models / 'o/offered/.pr')
        (models / 'o/offered/pytorch_model.bin').write_bytes(b'a pickle')
        (models / 'o/pickled').mkdir()
        (models / 'o/pickled/pytorch_model.bin').write_bytes(b'a pickle')
        yield hub


def run(hub, tmp_path, *args, code=0):
    done = subprocess.run([sys.executable, ROOT / 'prepare/weights.py', *map(str, args)], capture_output=True, text=True,
                          env=environment(hub, tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_tower_and_decoder_become_checkpoint(hub, tmp_path):
    out = tmp_path / 'start'
    told = run(hub, tmp_path, '--vision', 'o/clip', '--language', 'o/qwen3', '--pooling', 1, '--connector', 'mlp', '--out', out).stdout
    assert 'LlavaForConditionalGeneration' not in told and 'as llava' in told and 'parameters expected' in told
    assert not any('pytorch_model.bin' in path and 'resolve' in path for path in hub.asked)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(out).state_dict()
    for source, wanted in ((transformers.CLIPModel.from_pretrained(hub.folder / 'models/o/clip'), 'patch_embedding.weight'),
                           (transformers.Qwen3ForCausalLM.from_pretrained(hub.folder / 'models/o/qwen3'), 'layers.1.mlp.up_proj.weight')):
        one, = (x for name, x in source.state_dict().items() if name.endswith(wanted))
        other, = (x for name, x in theirs.items() if name.endswith(wanted))
        assert torch.equal(one, other)
    assert 'name another folder' in run(hub, tmp_path, '--vision', 'o/clip', '--language', 'o/qwen3', '--out', out, code=1).stderr
    # the same seed, the same bytes; a folder is as good as a name, and what the robot converted as a release
    told = run(hub, tmp_path, '--vision', 'o/offered', '--language', hub.folder / 'models/o/qwen3', '--pooling', 1, '--connector', 'mlp',
               '--out', tmp_path / 'again').stdout
    assert 'taking the safetensors of refs/pr/1' in told and not any('pytorch_model.bin' in path and 'resolve' in path for path in hub.asked)
    one, other = (load_file(folder / 'model.safetensors') for folder in (out, tmp_path / 'again'))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_released_molmo2_is_copied_unchanged(hub, tmp_path):
    config = m.make_config(dict(hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=28, patch_size=14,
                                style='siglip', feature_layers=(-1, -2)),
                           dict(hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                                vocab_size=128, extra_vocab_size=16, tie_word_embeddings=False), recipe='molmo2', connector='molmo2',
                           image_token_id=5, visual_token_ids=tuple(range(2, 10)))
    model = m.VLM(config)
    model.init_weights(1)
    folder = hub.folder / 'models/o/molmo2'
    save_model(model, folder)
    told = run(hub, tmp_path, '--molmo2', 'o/molmo2', '--out', tmp_path / 'out').stdout
    assert 'as molmo2' in told
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(digest(p) == digest(tmp_path / 'out' / p.name) for p in folder.iterdir())
    content = bytearray((folder / 'model.safetensors').read_bytes())
    (folder / 'model.safetensors').write_bytes(content[:-100])
    done = run(hub, tmp_path, '--molmo2', folder, '--out', tmp_path / 'out2', code=1)
    assert 'is not a whole safetensors file' in done.stderr and 'Traceback' not in done.stderr


def test_mistakes_are_one_line(hub, tmp_path):
    hub.lies.add('model.safetensors')
    for args, words in ((('--vision', 'o/clip'), 'its check sum differs'), (('--vision', 'o/none'), 'o/none: 404'), (('--vision', 'o/pickled'), 'has no safetensors'),
                        (('--vision', 'o/qwen3', '--language', 'o/qwen3'), 'not CLIP or SigLIP')):
        done = run(hub, tmp_path, *args, '--out', tmp_path / 'x', code=1)
        assert words in done.stderr and 'Traceback' not in done.stderr and not (tmp_path / 'x').exists()
    hub.lies.clear()
