"""Released Molmo2 checkpoints: what the model is shown and says, beside transformers' own processor and model, at tiny
sizes with random weights, and the pictures' cutting at true size. test_molmo2.py runs this in a process of its own:

    .venv/bin/python -m pytest -s tests/molmo2.py

transformers' processor needs torchvision, which is installed in a folder beside the other packages (Makefile): where
torch is without CUDA it breaks, when it is found, whatever else of transformers looks for it.
"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

sys.path.append(str(Path(sys.prefix) / 'torchvision'))
if not torch.cuda.is_available():            # its operators are not there; none is used here, their names are enough
    operators = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        operators.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
import transformers  # noqa: E402
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor  # noqa: E402
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor  # noqa: E402
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model as m  # noqa: E402
from extra.hf import load_checkpoint, load_model, load_processor, newest, save_model  # noqa: E402
from extra.engine import prompt_indices, generate  # noqa: E402
from extra import molmo2 as ours_molmo2  # noqa: E402
import sample  # noqa: E402
from media import BadRow  # noqa: E402

VISUAL = ['<im_start>', '<im_end>', '<im_patch>', '<im_col>', '<low_res_im_start>', '<|image|>', '<im_low>', '<frame_start>',
          '<frame_end>', '<|video|>']
TRUE = dict(size={'height': 378, 'width': 378}, patch_size=14, max_crops=8, overlap_margins=[4, 4], pooling_size=[2, 2])
TINY = dict(size={'height': 70, 'width': 70}, patch_size=14, max_crops=6, overlap_margins=[1, 1], pooling_size=[2, 2])


def user(*turns):
    """What the released chat template makes of turns: with a stray space before answers that are past."""
    said = ''.join(f'{" " if i % 2 else ""}<|im_start|>{("user", "assistant")[i % 2]}\n{t}<|im_end|>\n' for i, t in enumerate(turns))
    return said + '<|im_start|>assistant\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny Molmo2 as the hub would hold it."""
    out = tmp_path_factory.mktemp('molmo2')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '10', '--num_clocks', '5', '--num_text', '5',
                    '--num_clips', '8', '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
    tokenizer = Tokenizer.from_file(str(out / 'shapes/tokenizer.json'))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in VISUAL])
    ids = [tokenizer.token_to_id(t) for t in VISUAL]
    assert ids == list(range(size, size + 10))
    config = m.make_config(
        dict(hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=70, patch_size=14, style='siglip',
             activation='gelu_pytorch_tanh', layer_norm_eps=1e-6, feature_layers=(-1, -2)),
        dict(hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=size,
             extra_vocab_size=16, tie_word_embeddings=False),
        recipe='molmo2', connector='molmo2', image_token_id=ids[2], video_token_id=ids[2], pooling=2,
        eos_token_id=tokenizer.token_to_id('<|im_end|>'), pad_token_id=tokenizer.token_to_id('<|endoftext|>'),
        visual_token_ids=(ids[0], ids[1], ids[2], ids[3], ids[4], ids[6], ids[7], ids[8]))
    model = m.VLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():                       # no two answers alike, biases that show
        p.data += .1 * torch.randn(p.shape, generator=generator)
    where = out / 'checkpoint'
    save_model(model, where)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    Molmo2Processor(Molmo2ImageProcessor(**TINY), Molmo2VideoProcessor(**{**TINY, 'pooling_size': [3, 3]}, do_rescale=True, do_normalize=True),
                    tokenizer, use_single_crop_col_tokens=False).save_pretrained(where)
    return where


def picture(generator, width, height):
    """Large patches of colour with noise: what is cut wrongly shows."""
    small = generator.integers(0, 256, (max(1, height // 40), max(1, width // 40), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((image + generator.integers(-9, 10, image.shape)).clip(0, 255).astype(np.uint8))


def compare(ours, batch, theirs, frames=False):
    """Token ids and pooling indices are equal; pixels before normalisation within a step of 255. -> the largest step."""
    assert ours.tokens == theirs['input_ids'][0].tolist()
    names = ('pixel_values_videos', 'video_token_pooling') if frames else ('pixel_values', 'image_token_pooling')
    pixels, pool = theirs[names[0]], theirs[names[1]]
    assert ours.patches.shape == pixels.shape and np.array_equal(ours.pool_index[:, :pool.shape[1]], pool)
    return np.abs(ours.patches.astype(int) - (pixels.double().numpy() * .5 + .5) * 255).max()


def test_pictures_of_every_size_are_cut_alike(folder):
    """At true size: pictures of 1 to 3000 pixels a side (SIZES=200 for so many)."""
    theirs, ours = Molmo2ImageProcessor(**TRUE), load_processor(folder, None)
    generator, worst, seen = np.random.default_rng(0), 0., set()
    ours.image_size, ours.margin, ours.max_crops, ours.grid = 378, 4, 8, (27, 27)
    sizes = [(1, 1), (113, 113), (112, 600), (378, 378), (640, 480), (1920, 1080), (300, 2000), (3000, 40)]
    sizes += [tuple(np.exp(generator.uniform(np.log(20), np.log(1500), 2)).astype(int)) for _ in range(int(os.environ.get('SIZES', 40)) - 8)]
    for width, height in sizes:
        image = picture(generator, width, height)
        patches, grid = ours.crops(image)
        index = data.pooling_windows(grid.shape, 2)
        index = np.concatenate([data.pooling_windows((27, 27), 2), np.where(index < 0, -1, grid.flatten()[index])])
        expected = theirs(image, return_tensors='pt')
        assert patches.shape == expected['pixel_values'].shape and np.array_equal(index, expected['image_token_pooling']), (width, height)
        worst = max(worst, np.abs(patches - (expected['pixel_values'].double().numpy() * .5 + .5) * 255).max())
        seen.add(ours.tiling(height, width))
    print(f'{len(sizes)} pictures, {len(seen)} tilings, pixels differ by {worst:.2f} of 255 at most')
    assert worst <= 1.001 and len(seen) >= 10


TEXTS = ['What is this?', 'Point to every red circle.\nThen count.', 'x <|image|> <im_patch> y']


def test_prompts_with_pictures(folder):
    theirs, ours = Molmo2Processor.from_pretrained(folder), load_processor(folder, None)
    generator, worst = np.random.default_rng(1), 0.
    for i in range(24):
        images = [picture(generator, *generator.integers(15, 400, 2)) for _ in range(i % 4)]
        marks = ''.join((f'Image {k + 1}' if len(images) > 1 else '') + '<|image|>' for k in range(len(images)))
        turns = TEXTS[:2] if i % 3 else [TEXTS[0], 'A cat', TEXTS[1]]
        turns = turns[:1] if i % 3 == 1 else turns if len(turns) % 2 else turns[:1]
        said = [{'role': 'user' if k % 2 == 0 else 'assistant', 'content': t} for k, t in enumerate(turns)]
        expected = theirs(images=images or None, text=marks + user(*turns), return_tensors='pt')
        e = ours.prompt(said, images=images)
        if images:
            worst = max(worst, compare(e, None, expected))
        assert e.tokens == expected['input_ids'][0].tolist()
    assert worst <= 1.001
    # what a user writes stays text
    e = ours.prompt([{'role': 'user', 'content': TEXTS[2]}])
    assert ours.image_pad not in e.tokens


def test_prompts_with_videos(folder):
    theirs, ours = Molmo2Processor.from_pretrained(folder), load_processor(folder, None)
    generator, worst = np.random.default_rng(2), 0.
    for i in range(20):
        frames = [picture(generator, *size) for size in [generator.integers(20, 200, 2)] for _ in range(1 + i % 7)]
        times = np.cumsum(generator.integers(1, 30, len(frames))) / 10
        cues = [{'start': 0., 'end': 1.5, 'text': 'hello there'}, {'start': 1.5, 'end': 2., 'text': 'you'}] if i % 2 else []
        told = 'subtitle\n0.0 - 1.5 hello there\n1.5 - 2.0 you\n' if cues else ''
        video = torch.stack([torch.from_numpy(np.array(f)).permute(2, 0, 1) for f in frames])
        expected = theirs(videos=[video], text='<|video|>' + told + user(TEXTS[1]), return_tensors='pt', do_sample_frames=False,
                          video_metadata=[dict(fps=10., total_num_frames=len(frames), frames_indices=[round(10 * t) for t in times])])
        e = ours.prompt([{'role': 'user', 'content': TEXTS[1]}], clip=(times, frames), subtitles=cues)
        worst = max(worst, compare(e, None, expected, frames=True))
    assert worst <= 1.001


def answers(folder, model, batch, expected, tokens=64):
    """Our logits of the last place and greedy tokens, and theirs."""
    peer = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        last = model.hidden_states(batch, prompt_indices(batch.document_ids, batch.branch_ids)[:, -1])
        far = (peer(**expected).logits[0, -1] - model.logits(last)[0]).abs().max()
        said = peer.generate(**expected, max_new_tokens=tokens, do_sample=False)[0, expected['input_ids'].shape[1]:].tolist()
    ours = [t.item() for t in generate(model, batch, tokens)]
    return far, ours, said


def test_the_same_answers(folder):
    """Released weights, a picture, three, a video: the same logits and the same 64 tokens."""
    theirs, (model, ours, _) = Molmo2Processor.from_pretrained(folder), load_checkpoint(folder)
    assert (ours.max_frames, ours.fps, ours.seq_len) == (theirs.video_processor.num_frames, theirs.video_processor.max_fps, 40960)
    generator = np.random.default_rng(3)
    model.eval()
    for number in (1, 3, 0):
        images = [picture(generator, 150 + 40 * i, 120) for i in range(number)]
        marks = ''.join((f'Image {k + 1}' if number > 1 else '') + '<|image|>' for k in range(number))
        said = [{'role': 'user', 'content': TEXTS[0]}]
        if number:
            expected = theirs(images=images, text=marks + user(TEXTS[0]), return_tensors='pt')
            e = ours.prompt(said, images=images)
            expected['pixel_values'] = torch.from_numpy(e.patches).float() / 127.5 - 1     # one step of 255 is not the question here
        else:
            video = [picture(generator, 90, 60) for _ in range(4)]
            stack = torch.stack([torch.from_numpy(np.array(f)).permute(2, 0, 1) for f in video])
            expected = theirs(videos=[stack], text='<|video|>' + user(TEXTS[0]), return_tensors='pt', do_sample_frames=False,
                              video_metadata=[dict(fps=2., total_num_frames=4, frames_indices=[0, 1, 2, 3])])
            e = ours.prompt(said, clip=(np.arange(4) / 2, video))
            expected['pixel_values_videos'] = torch.from_numpy(e.patches).float() / 127.5 - 1
        far, tokens, wanted = answers(folder, model, data.collate([[e]], ours), expected)
        print(f'{number} pictures: logits differ by {far:.1e}, {len(tokens)} tokens')
        assert far < 1e-4 and tokens == wanted[:len(tokens)] and (len(tokens) == 64 or wanted[len(tokens) - 1] == model.config.eos_token_id)


def test_training_goes_on_and_is_opened_elsewhere(folder, tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'train.py', ROOT / 'config/finetune.py', f'--init_from={folder}', f'--out_dir={tmp_path}/run',
                           f'--data_dir={folder.parent}', "--mixture={'shapes': 0.5, 'clips': 0.5}", '--max_steps=2', '--batch_size=2',
                           '--accumulation=1', '--warmup_steps=1', '--eval_interval=0', '--num_workers=0', '--threads=1', '--dtype=float32',
                           '--seq_len=1024', '--max_frames=4', '--device=cpu'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and 'done at step 2' in done.stdout, done.stdout + done.stderr
    saved = newest(tmp_path / 'run')
    theirs, (model, ours, _) = transformers.AutoProcessor.from_pretrained(saved), load_checkpoint(saved)
    assert type(theirs).__name__ == 'Molmo2Processor' and isinstance(ours, ours_molmo2.Molmo2Processor)
    image = picture(np.random.default_rng(4), 200, 90)
    expected = theirs(images=[image], text='<|image|>' + user(TEXTS[0]), return_tensors='pt')
    e = ours.prompt([{'role': 'user', 'content': TEXTS[0]}], images=[image])
    assert compare(e, None, expected) <= 1.001
    expected['pixel_values'] = torch.from_numpy(e.patches).float() / 127.5 - 1
    far, tokens, wanted = answers(saved, model.eval(), data.collate([[e]], ours), expected, 16)
    assert far < 1e-4 and tokens == wanted[:len(tokens)]
    before = load_model(folder)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))


def test_a_conversation(folder, monkeypatch):
    model, ours, _ = load_checkpoint(folder)
    monkeypatch.setattr(sample, 'max_new_tokens', 5)
    chat = sample.Chat(model, ours)
    chat.show(images=[picture(np.random.default_rng(5), 200, 90)])
    said = [''.join(chat.ask(text)) for text in ('What?', 'And now?')]
    again = sample.Chat(model, ours)
    again.media, again.messages = chat.media, chat.messages[:2]
    assert said[1] == ''.join(again.ask('And now?'))
    monkeypatch.setattr(sample, 'system', 'Be brief.')
    with pytest.raises(BadRow, match='system message'):
        next(sample.Chat(model, ours).ask('What?'))
