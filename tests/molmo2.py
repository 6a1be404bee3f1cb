"""Released Molmo2 checkpoints: inputs and answers beside those of transformers' processor and
model, at tiny sizes with random weights, and the crops of pictures at true size. test_molmo2.py
runs this in a process of its own:

    .venv/bin/python -m pytest -s tests/molmo2.py

transformers' processor needs torchvision. It is installed in a folder beside the other packages
(Makefile), because with a torch without CUDA it would break whatever else of transformers finds it.
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
if not torch.cuda.is_available():
    # torchvision's operators are missing then; none is used here, and their names are enough
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

VISUAL = ['<im_start>', '<im_end>', '<im_patch>', '<im_col>', '<low_res_im_start>', '<|image|>',
          '<im_low>', '<frame_start>', '<frame_end>', '<|video|>']
TRUE = dict(size={'height': 378, 'width': 378}, patch_size=14, max_crops=8, overlap_margins=[4, 4],
            pooling_size=[2, 2])
TINY = dict(size={'height': 70, 'width': 70}, patch_size=14, max_crops=6, overlap_margins=[1, 1],
            pooling_size=[2, 2])


def chat(*turns):
    """What the released chat template makes of turns of user and assistant: before a past answer
    stands a stray space."""
    text = ''
    for i, turn in enumerate(turns):
        before = ' <|im_start|>assistant' if i % 2 else '<|im_start|>user'
        text += f'{before}\n{turn}<|im_end|>\n'
    return text + '<|im_start|>assistant\n'


def messages(*turns):
    """The same turns as Processor.prompt takes them."""
    listed = []
    for i, turn in enumerate(turns):
        listed.append({'role': 'assistant' if i % 2 else 'user', 'content': turn})
    return listed


def image_marks(n):
    """What stands for n pictures in transformers' text."""
    if n == 1:
        return '<|image|>'
    return ''.join(f'Image {i + 1}<|image|>' for i in range(n))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny Molmo2 as the hub would hold it."""
    out = tmp_path_factory.mktemp('molmo2')
    subprocess.run([sys.executable, ROOT / 'prepare/shapes.py', '--out', out, '--num', '10',
                    '--num_clocks', '5', '--num_text', '5', '--num_clips', '8',
                    '--num_validation', '5', '--workers', '1'], check=True, capture_output=True)
    tokenizer = Tokenizer.from_file(str(out / 'shapes/tokenizer.json'))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in VISUAL])
    ids = [tokenizer.token_to_id(t) for t in VISUAL]
    assert ids == list(range(size, size + 10))
    vision = dict(
        hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=70,
        patch_size=14, style='siglip', activation='gelu_pytorch_tanh', layer_norm_eps=1e-6,
        feature_layers=(-1, -2))
    language = dict(
        hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, vocab_size=size, extra_vocab_size=16, tie_word_embeddings=False)
    config = m.make_config(
        vision, language, recipe='molmo2', connector='molmo2', pooling=2,
        image_token_id=ids[2], video_token_id=ids[2],
        eos_token_id=tokenizer.token_to_id('<|im_end|>'),
        pad_token_id=tokenizer.token_to_id('<|endoftext|>'),
        visual_token_ids=(ids[0], ids[1], ids[2], ids[3], ids[4], ids[6], ids[7], ids[8]))
    model = m.VLM(config)
    model.init_weights(0)
    # No two answers are alike then, and biases are not 0
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += .1 * torch.randn(p.shape, generator=generator)
    checkpoint = out / 'checkpoint'
    save_model(model, checkpoint)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    for_images = Molmo2ImageProcessor(**TINY)
    for_videos = Molmo2VideoProcessor(**{**TINY, 'pooling_size': [3, 3]}, do_rescale=True,
                                      do_normalize=True)
    theirs = Molmo2Processor(for_images, for_videos, tokenizer, use_single_crop_col_tokens=False)
    theirs.save_pretrained(checkpoint)
    return checkpoint


def picture(generator, width, height):
    """Large patches of colour with noise: what is cut wrongly shows."""
    shape = (max(1, height // 40), max(1, width // 40), 3)
    colours = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
    image = colours.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(int)
    pixels = pixels + generator.integers(-9, 10, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def in_255(pixels):
    """transformers' normalised pixels as numbers from 0 to 255."""
    return (pixels.double().numpy() * .5 + .5) * 255


def normalised(patches):
    """Our patches as transformers' model takes them."""
    return torch.from_numpy(patches).float() / 127.5 - 1


def compare(ours, theirs, frames=False):
    """Token ids and pooling indices must be equal. Returns the largest difference of a pixel, in
    steps of 255 before normalisation."""
    assert ours.tokens == theirs['input_ids'][0].tolist()
    if frames:
        pixels = theirs['pixel_values_videos']
        pool = theirs['video_token_pooling']
    else:
        pixels = theirs['pixel_values']
        pool = theirs['image_token_pooling']
    assert ours.patches.shape == pixels.shape
    assert np.array_equal(ours.pool_index[:, :pool.shape[1]], pool)
    return np.abs(ours.patches.astype(int) - in_255(pixels)).max()


def test_molmo2_crops_match_transformers(folder):
    """At true size: pictures of 1 to 3000 pixels a side (SIZES=200 for so many)."""
    theirs = Molmo2ImageProcessor(**TRUE)
    ours = load_processor(folder, None)
    ours.image_size = 378
    ours.margin = 4
    ours.max_crops = 8
    ours.grid = (27, 27)
    generator = np.random.default_rng(0)
    worst = 0.
    seen = set()
    sizes = [(1, 1), (113, 113), (112, 600), (378, 378), (640, 480), (1920, 1080), (300, 2000),
             (3000, 40)]
    while len(sizes) < int(os.environ.get('SIZES', 40)):
        size = np.exp(generator.uniform(np.log(20), np.log(1500), 2))
        sizes.append(tuple(size.astype(int)))
    for width, height in sizes:
        image = picture(generator, width, height)
        patches, grid = ours.crops(image)
        in_crops = data.pooling_windows(grid.shape, 2)
        in_crops = np.where(in_crops < 0, -1, grid.flatten()[in_crops])
        in_low_resolution = data.pooling_windows((27, 27), 2)
        index = np.concatenate([in_low_resolution, in_crops])
        expected = theirs(image, return_tensors='pt')
        assert patches.shape == expected['pixel_values'].shape, (width, height)
        assert np.array_equal(index, expected['image_token_pooling']), (width, height)
        worst = max(worst, np.abs(patches - in_255(expected['pixel_values'])).max())
        seen.add(ours.tiling(height, width))
    print(f'{len(sizes)} pictures, {len(seen)} tilings, pixels differ by {worst:.2f} of 255')
    assert worst <= 1.001 and len(seen) >= 10


TEXTS = ['What is this?', 'Point to every red circle.\nThen count.', 'x <|image|> <im_patch> y']


def test_molmo2_picture_prompts_match_transformers(folder):
    theirs = Molmo2Processor.from_pretrained(folder)
    ours = load_processor(folder, None)
    generator = np.random.default_rng(1)
    worst = 0.
    for i in range(24):
        images = [picture(generator, *generator.integers(15, 400, 2)) for _ in range(i % 4)]
        turns = [TEXTS[0]]
        if i % 3 == 0:
            turns = [TEXTS[0], 'A cat', TEXTS[1]]
        text = image_marks(len(images)) + chat(*turns)
        expected = theirs(images=images or None, text=text, return_tensors='pt')
        e = ours.prompt(messages(*turns), images=images)
        if images:
            worst = max(worst, compare(e, expected))
        assert e.tokens == expected['input_ids'][0].tolist()
    assert worst <= 1.001
    # What a user writes stays text
    e = ours.prompt(messages(TEXTS[2]))
    assert ours.image_pad not in e.tokens


def their_video(theirs, frames, question, fps, indices, before=''):
    """transformers' inputs for a question about frames, frame number indices[i] at `fps` each."""
    video = torch.stack([torch.from_numpy(np.array(f)).permute(2, 0, 1) for f in frames])
    metadata = dict(fps=fps, total_num_frames=len(frames), frames_indices=indices)
    return theirs(videos=[video], text='<|video|>' + before + chat(question), return_tensors='pt',
                  do_sample_frames=False, video_metadata=[metadata])


def test_molmo2_video_prompts_match_transformers(folder):
    theirs = Molmo2Processor.from_pretrained(folder)
    ours = load_processor(folder, None)
    generator = np.random.default_rng(2)
    worst = 0.
    for i in range(20):
        size = generator.integers(20, 200, 2)
        frames = [picture(generator, *size) for _ in range(1 + i % 7)]
        times = np.cumsum(generator.integers(1, 30, len(frames))) / 10
        cues = []
        subtitles = ''
        if i % 2 == 1:
            cues = [{'start': 0., 'end': 1.5, 'text': 'hello there'},
                    {'start': 1.5, 'end': 2., 'text': 'you'}]
            subtitles = 'subtitle\n0.0 - 1.5 hello there\n1.5 - 2.0 you\n'
        indices = [round(10 * t) for t in times]
        expected = their_video(theirs, frames, TEXTS[1], 10., indices, before=subtitles)
        e = ours.prompt(messages(TEXTS[1]), clip=(times, frames), subtitles=cues)
        worst = max(worst, compare(e, expected, frames=True))
    assert worst <= 1.001


def answers(folder, model, batch, expected, tokens=64):
    """(largest difference of the last position's logits, our greedy tokens, theirs)."""
    peer = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    peer.eval()
    with torch.no_grad():
        last = prompt_indices(batch.document_ids, batch.branch_ids)[:, -1]
        our_logits = model.logits(model.hidden_states(batch, last))[0]
        their_logits = peer(**expected).logits[0, -1]
        their_tokens = peer.generate(**expected, max_new_tokens=tokens, do_sample=False)[0]
    prompt_length = expected['input_ids'].shape[1]
    our_tokens = [token.item() for token in generate(model, batch, tokens)]
    difference = (their_logits - our_logits).abs().max()
    return difference, our_tokens, their_tokens[prompt_length:].tolist()


def test_molmo2_logits_and_tokens_match_transformers(folder):
    """Released weights, a picture, three, a video: the same logits and the same 64 tokens."""
    theirs = Molmo2Processor.from_pretrained(folder)
    model, ours, _ = load_checkpoint(folder)
    assert ours.max_frames == theirs.video_processor.num_frames
    assert ours.fps == theirs.video_processor.max_fps
    assert ours.seq_len == 40960
    generator = np.random.default_rng(3)
    model.eval()
    for number in (1, 3, 0):
        # transformers' model gets our pixels, because a step of 255 is not the question here
        if number:
            images = [picture(generator, 150 + 40 * i, 120) for i in range(number)]
            text = image_marks(number) + chat(TEXTS[0])
            expected = theirs(images=images, text=text, return_tensors='pt')
            e = ours.prompt(messages(TEXTS[0]), images=images)
            expected['pixel_values'] = normalised(e.patches)
        else:
            frames = [picture(generator, 90, 60) for _ in range(4)]
            expected = their_video(theirs, frames, TEXTS[0], 2., [0, 1, 2, 3])
            e = ours.prompt(messages(TEXTS[0]), clip=(np.arange(4) / 2, frames))
            expected['pixel_values_videos'] = normalised(e.patches)
        batch = data.collate([[e]], ours)
        difference, tokens, wanted = answers(folder, model, batch, expected)
        print(f'{number} pictures: logits differ by {difference:.1e}, {len(tokens)} tokens')
        assert difference < 1e-4
        assert tokens == wanted[:len(tokens)]
        assert len(tokens) == 64 or wanted[len(tokens) - 1] == model.config.eos_token_id


def test_molmo2_finetuned_checkpoint_opens_in_transformers(folder, tmp_path):
    command = [
        sys.executable, ROOT / 'train.py', ROOT / 'config/finetune.py', f'--init_from={folder}',
        f'--out_dir={tmp_path}/run', f'--data_dir={folder.parent}',
        "--mixture={'shapes': 0.5, 'clips': 0.5}", '--max_steps=2', '--batch_size=2',
        '--accumulation=1', '--warmup_steps=1', '--eval_interval=0', '--num_workers=0',
        '--threads=1', '--dtype=float32', '--seq_len=1024', '--max_frames=4', '--device=cpu']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'done at step 2' in done.stdout, done.stdout + done.stderr
    saved = newest(tmp_path / 'run')
    theirs = transformers.AutoProcessor.from_pretrained(saved)
    model, ours, _ = load_checkpoint(saved)
    assert type(theirs).__name__ == 'Molmo2Processor'
    assert isinstance(ours, ours_molmo2.Molmo2Processor)
    image = picture(np.random.default_rng(4), 200, 90)
    expected = theirs(images=[image], text='<|image|>' + chat(TEXTS[0]), return_tensors='pt')
    e = ours.prompt(messages(TEXTS[0]), images=[image])
    assert compare(e, expected) <= 1.001
    expected['pixel_values'] = normalised(e.patches)
    batch = data.collate([[e]], ours)
    difference, tokens, wanted = answers(saved, model.eval(), batch, expected, 16)
    assert difference < 1e-4
    assert tokens == wanted[:len(tokens)]
    before = load_model(folder)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))


def test_molmo2_chat_cache_and_system_message(folder, monkeypatch):
    """The second answer, from the cache, is that of a chat which encodes everything anew."""
    model, ours, _ = load_checkpoint(folder)
    monkeypatch.setattr(sample, 'max_new_tokens', 5)
    cached = sample.Chat(model, ours)
    cached.show(images=[picture(np.random.default_rng(5), 200, 90)])
    list(cached.ask('What?'))
    first_turn = list(cached.messages)
    second_answer = ''.join(cached.ask('And now?'))
    fresh = sample.Chat(model, ours)
    fresh.media = cached.media
    fresh.messages = first_turn
    assert second_answer == ''.join(fresh.ask('And now?'))
    monkeypatch.setattr(sample, 'system', 'Be brief.')
    with pytest.raises(BadRow, match='system message'):
        next(sample.Chat(model, ours).ask('What?'))
