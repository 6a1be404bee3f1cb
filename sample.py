"""Ask a checkpoint about pictures and videos. The answer streams; points in it are printed and drawn.

    python sample.py --checkpoint=out/demo_stage1 --image=photo.jpg --prompt="Point to every red circle."
    python sample.py --checkpoint=out/demo_stage1 --image=a.png,b.png --prompt="What differs?"    several pictures
    python sample.py --checkpoint=out/demo_stage2 --video=clip.mp4 --prompt="Track the red circle."
    python sample.py --checkpoint=out/demo_stage1 --prompt="Who are you?"                        text alone
    python sample.py --checkpoint=weights/Molmo2-4B --dtype=bfloat16 --chat=True       turn after turn; /help says more
    python sample.py --checkpoint=out/demo_stage1 --serve=8000       a page to try it, on this machine only

The checkpoint is a step folder, a run's out_dir (its latest step), a released Molmo2, or a llava folder of others with a
Qwen3 decoder. Points are drawn on a copy of the picture, enlarged if it is small, photo.points.png, in out_dir; of a
video on every frame, between two times of a track on the line between its places, clip.points.mp4.
"""
import json
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
chat = False                   # go on asking; images may be added on the way
serve = 0                      # a port: a page to try the checkpoint at http://localhost:8000
json_output = False            # one line of JSON: the answer and its points, nothing drawn
max_new_tokens = 512
temperature = 0.0              # 0 takes the likeliest token; 1 samples as the model believes
top_k = 0                      # sample from so many likeliest tokens; 0: all
top_p = 1.0                    # sample from the likeliest tokens that hold this much probability
repetition_penalty = 1.0       # above 1: what was read or said becomes less likely
seed = 1337                    # of the sampling
out_dir = '.'                  # where pictures with points go
device = 'auto'
dtype = 'auto'                 # of the weights: auto (bfloat16 on CUDA, else float32) | float32 | bfloat16 | float16
compile = False                # what reads pictures and questions, by torch's compiler: for many of them
threads = 0

if __name__ == '__main__':
    from configurator import configure
    configure(globals())

import torch  # noqa: E402

from data import collate, parse_points, to_device  # noqa: E402
from extra.hf import load_checkpoint  # noqa: E402
from media import BadRow, draw_on_video, draw_points, enlarge, load_image  # noqa: E402
from extra.engine import KVCache, generate  # noqa: E402
from model import UserError, compile_blocks, pick_device, pick_weights_dtype  # noqa: E402

HELP = """/image photo.jpg [b.jpg ..]   show pictures beside those there are
/video clip.mp4                show a video instead
/new                           forget everything
/quit                          or an empty line at the end of input"""


class Chat:
    """A conversation with a checkpoint. What the cache holds of it is not encoded again: pictures stand in front of all
    turns, so they are seen once, until others join them."""

    def __init__(self, model, processor, **how):
        self.model, self.processor, self.how = model, processor, how
        self.new()

    def new(self):
        self.messages = [{'role': 'system', 'content': system}] if system else []
        self.media, self.cache, self.held = {}, None, []                 # held: the tokens in the cache

    def show(self, **media):
        """Images join those there are; a clip takes the place of everything. What was seen is encoded anew."""
        if 'clip' in media or 'clip' in self.media:
            self.media = media
        else:
            self.media = {'images': [*self.media.get('images', ()), *media['images']]}
        self.held = []

    def ask(self, text):
        """Yields the answer in pieces of text. Bytes of a letter that is not whole yet wait for the next token."""
        messages = [*self.messages, {'role': 'user', 'content': text}]
        example = self.processor.prompt(messages, **self.media)
        tokens, weight = example.tokens, self.model.output_weight()
        batch = to_device(collate([[example]], self.processor, length=len(tokens)), weight.device)
        same = next((i for i, (a, b) in enumerate(zip(tokens, self.held)) if a != b), len(self.held))
        same = min(same, len(tokens) - 1)
        if example.visual_index is not None and same <= example.visual_index[-1]:
            same = 0                         # pictures are encoded together
        if self.cache is None or self.cache.keys.shape[3] < len(tokens) + max_new_tokens:
            old, room = self.cache, len(tokens) + 4 * max_new_tokens
            self.cache = KVCache(self.model.config.language, 1, room, weight.dtype, weight.device)
            if same:                         # move it into a larger one
                self.cache.keys[:, :, :, :same], self.cache.values[:, :, :, :same] = (
                    kept[:, :, :, :same] for kept in (old.keys, old.values))
        self.cache.length = same
        ids, shown, answer = [], 0, ''
        try:
            for token in generate(self.model, batch, max_new_tokens, cache=self.cache, **self.how):
                if token.item() in (-1, self.processor.im_end):
                    break
                ids.append(token.item())
                answer = self.processor.decode(ids)
                if not answer.endswith('\ufffd'):
                    yield answer[shown:]
                    shown = len(answer)
        finally:                             # an answer that nobody waits for is as long as it is
            self.held = (tokens + ids)[:self.cache.length]
            self.messages = [*messages, {'role': 'assistant', 'content': answer}]


def open_file(name):
    try:
        return open(name, 'rb')
    except OSError as e:
        raise UserError(f'{name}: {e.strerror}') from None


def load_media(processor, images=(), clip=''):
    """What files show, as the processor takes it."""
    name = clip
    try:
        if clip:
            record = {'video': Path(clip).name, 'start': start, 'end': end or None, 'subtitles': subtitles}
            return processor.media(record, Path(clip).parent)
        seen = []
        for name in images:
            seen.append(load_image(open_file(name)))
        return {'images': seen}
    except BadRow as e:
        raise UserError(f'{name}: {e}') from None


def output(name, kind):
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    return Path(out_dir) / f'{Path(name).stem}.points.{kind}'


def show_points(answer, media, names, clip):
    """Prints the points of an answer and draws them."""
    points = parse_points(answer)
    if clip:
        points = [p for p in points if 't' in p]
        for p in points:
            print(f"{Path(clip).name}: {p['id']} at {p['t']:.1f} s ({p['x']:.3f}, {p['y']:.3f})")
        if points:
            draw_on_video(open_file(clip), points, path := output(clip, 'mp4'), start, end or None)
            print(f'wrote {path}')
        return
    for n, (name, picture) in enumerate(zip(names, media.get('images', ()))):
        here = [p for p in points if p.get('image', 0) == n]
        for p in here:
            print(f"{Path(name).name}: {p['id']} at ({p['x']:.3f}, {p['y']:.3f}), "
                  f"pixel ({p['x'] * picture.width:.0f}, {p['y'] * picture.height:.0f})")
        if here:
            draw_points(enlarge(picture), here).save(path := output(name, 'png'))
            print(f'wrote {path}')


def talk(talking, names, clip):
    """Questions from the keyboard until the end of input. A mistake is answered and forgotten."""
    print('Ask; /help for commands.')
    while True:
        try:
            line = input('> ').strip()
        except EOFError:
            return
        command, *files = line.split() or ['']
        try:
            if command == '/quit':
                return
            elif command == '/new':
                talking.new()
                names, clip = [], ''
            elif command == '/image' and files:
                talking.show(**load_media(talking.processor, files))
                names, clip = ([] if clip else names) + files, ''
            elif command == '/video' and len(files) == 1:
                talking.show(**load_media(talking.processor, clip=files[0]))
                names, clip = [], files[0]
            elif command.startswith('/'):
                print(HELP)
            elif line:
                answer(talking, line, names, clip)
        except (UserError, BadRow) as e:
            print(f'error: {e}')


def answer(talking, text, names, clip):
    said = ''
    for piece in talking.ask(text):
        said += piece
        if not json_output:
            print(piece, end='', flush=True)
    if json_output:
        return print(json.dumps({'answer': said, 'points': parse_points(said)}, ensure_ascii=False))
    print()
    show_points(said, talking.media, names, clip)


def main():
    if not checkpoint or not (prompt or chat or serve) or image and video:
        raise UserError('give --checkpoint=out/demo_stage1 and --prompt="..." (and --image=a.jpg or --video=clip.mp4), '
                        'or --chat=True or --serve=8000')
    if threads:
        torch.set_num_threads(threads)
    names = list(filter(None, image.split(',')))
    for name in filter(None, [video, *names]):
        open_file(name).close()              # before the weights: a wrong name is answered at once
    model, processor, _ = load_checkpoint(checkpoint)
    processor.max_frames = max_frames or processor.max_frames
    dev = pick_device(device)
    model.to(dev, pick_weights_dtype(dtype, dev)).eval()
    if compile:
        compile_blocks(model)
    talking = Chat(model, processor, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                   repetition_penalty=repetition_penalty)
    if names or video:
        talking.show(**load_media(processor, names, video))
    try:
        if prompt:
            answer(talking, prompt, names, video)
        if chat:
            talk(talking, names, video)
        if serve:
            from extra.serve import server
            try:
                page = server(talking, load_media, serve)
            except OSError as e:
                raise UserError(f'port {serve}: {e.strerror}') from None
            print(f'http://localhost:{serve} (Ctrl-C ends it)')
            page.serve_forever()
    except BadRow as e:
        raise UserError(str(e)) from None


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        print()
