"""Ask a checkpoint about pictures. The answer streams; points in it are printed and drawn.

    python sample.py --checkpoint=out/demo_stage1 --image=photo.jpg --prompt="Point to every red circle."
    python sample.py --checkpoint=out/demo_stage1 --image=a.png,b.png --prompt="What differs?"    several pictures
    python sample.py --checkpoint=out/demo_stage2 --video=clip.mp4 --prompt="Track the red circle."
    python sample.py --checkpoint=out/demo_stage1 --prompt="Who are you?"                        text alone

The checkpoint is a step folder, a run's out_dir (its latest step), or a llava folder of others with a Qwen3 decoder.
Points are drawn on a copy of the picture, enlarged if it is small, photo.points.png, in out_dir; of a video on every
frame, between two times of a track on the line between its places, clip.points.mp4.
"""
import sys
from pathlib import Path

checkpoint = ''
image = ''                     # files, with commas between
video = ''                     # a file, instead
start = 0.0                    # seconds of the video
end = 0.0                      # 0: its end
subtitles = ''                 # an .srt or .vtt beside the video
max_frames = 0                 # 0: as many as the checkpoint was trained on
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

from data import collate, load_checkpoint, parse_points  # noqa: E402
from media import BadRow, draw_on_video, draw_points, enlarge, load_image  # noqa: E402
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


def open_file(name):
    try:
        return open(name, 'rb')
    except OSError as e:
        raise UserError(f'{name}: {e.strerror}') from None


def load_media(processor):
    """What `image` or `video` show, as the processor takes it."""
    processor.max_frames = max_frames or processor.max_frames
    try:
        if name := video:
            record = {'video': Path(video).name, 'start': start, 'end': end or None, 'subtitles': subtitles}
            return processor.media(record, Path(video).parent)
        images = []
        for name in filter(None, image.split(',')):
            images.append(load_image(open_file(name)))
        return {'images': images}
    except BadRow as e:
        raise UserError(f'{name}: {e}') from None


def main():
    if not checkpoint or not prompt or image and video:
        raise UserError('give --checkpoint=out/demo_stage1 and --prompt="..." (and --image=a.jpg or --video=clip.mp4)')
    if threads:
        torch.set_num_threads(threads)
    for name in filter(None, [video, *image.split(',')]):
        open_file(name).close()              # before the weights: a wrong name is answered at once
    model, processor, _ = load_checkpoint(checkpoint)
    media = load_media(processor)
    where = pick_device(device)
    model.to(where, getattr(torch, dtype)).eval()
    messages = [{'role': 'system', 'content': system}] if system else []
    messages += [{'role': 'user', 'content': prompt}]
    batch = collate([[processor.prompt(messages, **media)]], processor, left=True)
    batch = {k: v.to(where) if torch.is_tensor(v) else v for k, v in batch.items()}
    answer = ''
    for piece in stream(model, processor, batch, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed):
        print(piece, end='', flush=True)
        answer += piece
    print()
    points = parse_points(answer)
    if video:
        show_track(points)
    for n, (name, picture) in enumerate(zip(image.split(','), media.get('images', ()))):
        here = [p for p in points if p.get('image', 0) == n]
        for p in here:
            print(f"{Path(name).name}: {p['id']} at ({p['x']:.3f}, {p['y']:.3f}), "
                  f"pixel ({p['x'] * picture.width:.0f}, {p['y'] * picture.height:.0f})")
        if here:
            draw_points(enlarge(picture), here).save(path := output(name, 'png'))
            print(f'wrote {path}')


def output(name, kind):
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    return Path(out_dir) / f'{Path(name).stem}.points.{kind}'


def show_track(points):
    points = [p for p in points if 't' in p]
    for p in points:
        print(f"{Path(video).name}: {p['id']} at {p['t']:.1f} s ({p['x']:.3f}, {p['y']:.3f})")
    if points:
        draw_on_video(open_file(video), points, path := output(video, 'mp4'), start, end or None)
        print(f'wrote {path}')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
