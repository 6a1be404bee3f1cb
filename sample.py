"""Ask a checkpoint about pictures. The answer streams; points in it are printed and drawn.

    python sample.py --checkpoint=out/demo_stage1 --image=photo.jpg --prompt="Point to every red circle."
    python sample.py --checkpoint=out/demo_stage1 --image=a.png,b.png --prompt="What differs?"    several pictures
    python sample.py --checkpoint=out/demo_stage1 --prompt="Who are you?"                        text alone

The checkpoint is a step folder, a run's out_dir (its latest step), or a llava folder of others with a Qwen3 decoder.
Points are drawn on a copy of the picture, enlarged if it is small, photo.points.png, in out_dir.
"""
import sys
from pathlib import Path

checkpoint = ''
image = ''                     # files, with commas between
prompt = ''
system = ''                    # a system message before it
max_new_tokens = 512
temperature = 0.0              # 0 takes the likeliest token; 1 samples as the model believes
top_k = 0                      # sample from so many likeliest tokens; 0: all
top_p = 1.0                    # sample from the likeliest tokens that hold this much probability
seed = 1337                    # of the sampling
out_dir = '.'                  # where pictures with points go
device = 'auto'
dtype = 'float32'              # of the weights: float32 | bfloat16
threads = 0

if __name__ == '__main__':
    from configurator import configure
    configure(globals())

import torch  # noqa: E402

from data import BadRow, collate, draw_points, enlarge, load_checkpoint, load_image, parse_points  # noqa: E402
from model import UserError, pick_device  # noqa: E402


def stream(model, processor, batch, **how):
    """Yields the answer in pieces of text. Bytes of a letter that is not whole yet wait for the next token."""
    ids, shown = [], 0
    for token in model.generate(batch, **how):
        if token.item() in (-1, processor.im_end):
            break
        ids.append(token.item())
        text = processor.decode(ids)
        if not text.endswith('\ufffd'):
            yield text[shown:]
            shown = len(text)


def load_images(names):
    images = []
    for name in filter(None, names.split(',')):
        try:
            images.append(load_image(name))
        except BadRow as e:
            raise UserError(str(e) if name in str(e) else f"{name}: {e}") from None
    return images


def main():
    if not checkpoint or not prompt:
        raise UserError('give --checkpoint=out/demo_stage1 and --prompt="..." (and --image=photo.jpg)')
    if threads:
        torch.set_num_threads(threads)
    images = load_images(image)
    model, processor, _ = load_checkpoint(checkpoint)
    where = pick_device(device)
    model.to(where, getattr(torch, dtype)).eval()
    messages = [{'role': 'system', 'content': system}] if system else []
    batch = collate([processor.prompt(images, messages + [{'role': 'user', 'content': prompt}])], processor, left=True)
    batch = {k: v.to(where) if torch.is_tensor(v) else v for k, v in batch.items()}
    answer = ''
    for piece in stream(model, processor, batch, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed):
        print(piece, end='', flush=True)
        answer += piece
    print()
    points = parse_points(answer)
    for n, (name, picture) in enumerate(zip(image.split(','), images)):
        here = [p for p in points if p.get('image', 0) == n]
        for p in here:
            print(f"{Path(name).name}: {p['id']} at ({p['x']:.3f}, {p['y']:.3f}), "
                  f"pixel ({p['x'] * picture.width:.0f}, {p['y'] * picture.height:.0f})")
        if here:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            path = Path(out_dir) / f'{Path(name).stem}.points.png'
            draw_points(enlarge(picture), here).save(path)
            print(f'wrote {path}')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
