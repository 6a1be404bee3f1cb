"""Ask a checkpoint about pictures and videos. The answer streams; its points are printed and drawn.

    python sample.py --checkpoint=out/demo --image=photo.jpg --prompt="Point to every cat."
    python sample.py --checkpoint=out/demo --image=a.png,b.png --prompt="What differs?"
    python sample.py --checkpoint=out/demo_stage2 --video=clip.mp4 --prompt="Track the red circle."
    python sample.py --checkpoint=out/demo --prompt="Who are you?"      text alone
    python sample.py --checkpoint=out/demo --chat=True                  turn after turn
    python sample.py --checkpoint=out/demo --serve=8000                 a page in the browser

The checkpoint is a step folder, a run's out_dir (which means its latest step), a released Molmo2,
or a llava folder of others with a Qwen3 decoder.

Points are drawn on a copy of the picture, photo.points.png in out_dir, enlarged if it is small. Of
a video every frame is drawn, clip.points.mp4, and a track moves on the line between its points.

How tokens are chosen is in extra/engine.py, how a question becomes tokens in data.py.
"""
import json
import sys
from pathlib import Path

checkpoint = ''
image = ''                     # picture files, with commas between
video = ''                     # a video file; not together with pictures
start = 0.0                    # seconds of the video at which the clip begins
end = 0.0                      # seconds at which it ends; 0: at the video's end
subtitles = ''                 # an .srt or .vtt file in the video's folder
max_frames = 0                 # taken from a video; 0: as many as the checkpoint was trained on
prompt = ''
system = ''                    # a system message before the first question
chat = False                   # questions from the keyboard; /help lists commands
serve = 0                      # a port: a page to ask at http://localhost:<port>
json_output = False            # print one line of JSON with answer and points, and draw nothing
max_new_tokens = 512
temperature = 0.0              # 0: the likeliest token; 1: a sample of the model's probabilities
top_k = 0                      # sample from so many likeliest tokens; 0: from all
top_p = 1.0                    # sample from the likeliest tokens that have this much probability
repetition_penalty = 1.0       # above 1: tokens that were read or answered become less likely
seed = 1337                    # of the sampling
out_dir = '.'                  # folder for the drawn pictures and videos
device = 'auto'
dtype = 'auto'                 # of the weights: auto | float32 | bfloat16 | float16
#                                (auto: bfloat16 on CUDA, float32 elsewhere)
compile = False                # torch.compile for reading prompts: worth it for many questions
threads = 0                    # of the CPU; 0: as torch chooses

if __name__ == '__main__':
    # Settings are read before torch is imported, because a typo should be answered at once.
    from configurator import configure
    configure(globals())

import torch  # noqa: E402

from data import collate, parse_points  # noqa: E402
from extra.hf import load_checkpoint  # noqa: E402
from media import (BadRow, draw_on_video, draw_points, enlarge, load_image,  # noqa: E402
                   points_in_picture)
from extra.engine import KVCache, generate  # noqa: E402
from extra.kernels import compile_blocks  # noqa: E402
from model import UserError, pick_device, pick_weights_dtype  # noqa: E402

HELP = """/image photo.jpg [b.jpg ..]   show pictures beside those there are
/video clip.mp4                show a video instead
/new                           forget everything
/quit                          or an empty line at the end of input"""


# --------------------------------------------------------------------------------------------------
# A conversation

class Chat:
    """A conversation with a checkpoint, of which every token is encoded once.

    messages: [{role, content}], the turns so far.
    media: the pictures or the clip, as Processor.prompt takes them. They stand before all turns.
    cache: the decoder's keys and values of `cached_tokens`. Each prompt repeats the conversation so
        far, so most of a prompt's tokens are in the cache.
    """

    def __init__(self, model, processor, **sampling):
        """sampling: temperature, top_k and the other options of `generate`."""
        self.model = model
        self.processor = processor
        self.sampling = sampling
        self.new()

    def new(self):
        """Forgets messages and media."""
        self.messages = []
        if system:
            self.messages.append({'role': 'system', 'content': system})
        self.media = {}
        self.cache = None
        self.cached_tokens = []

    def show(self, **media):
        """Adds images=[..] to the pictures shown so far. A clip=.. replaces all media, and pictures
        replace a clip."""
        if 'clip' in media or 'clip' in self.media:
            self.media = media
        else:
            shown = self.media.get('images', [])
            self.media = {'images': [*shown, *media['images']]}
        # The cache is not reused, although the tokens may look the same: all pictures have the same
        # placeholder tokens, so comparing tokens would not notice another picture.
        self.cached_tokens = []

    def ask(self, text):
        """Adds a question and yields the answer in pieces of text.

        A caller that stops early leaves the answer in the conversation as far as it came.
        """
        messages = [*self.messages, {'role': 'user', 'content': text}]
        example = self.processor.prompt(messages, **self.media)
        tokens = example.tokens
        device = self.model.output_weight().device
        batch = collate([[example]], self.processor, length=len(tokens)).to(device)

        # The cache is cut back to the tokens that this prompt begins with. `generate` encodes the
        # prompt's other tokens and appends them.
        reused = self._count_reusable(example)
        self._make_room(len(tokens), reused)
        self.cache.length = reused

        answer_tokens = []
        answer = ''
        num_sent = 0                           # characters of the answer that were yielded
        try:
            for token in generate(self.model, batch, max_new_tokens, cache=self.cache,
                                  **self.sampling):
                token = token.item()           # of the only answer, [1]
                if token in (-1, self.processor.im_end):
                    break
                answer_tokens.append(token)
                answer = self.processor.decode(answer_tokens)
                # A letter of several bytes may be spread over tokens. As long as its last bytes are
                # missing it is decoded as U+FFFD, so the text waits for the next token.
                if not answer.endswith('\ufffd'):
                    yield answer[num_sent:]
                    num_sent = len(answer)
        finally:
            # The last token may not be in the cache, because its keys and values are only computed
            # when another token follows.
            self.cached_tokens = (tokens + answer_tokens)[:self.cache.length]
            self.messages = [*messages, {'role': 'assistant', 'content': answer}]

    def _count_reusable(self, example):
        """How many of a prompt's first tokens are in the cache and need not be encoded again."""
        reused = 0
        for token, cached in zip(example.tokens, self.cached_tokens):
            if token != cached:
                break
            reused += 1
        # At least one token is encoded, because the answer's first token is predicted from it.
        reused = min(reused, len(example.tokens) - 1)
        # Pictures are encoded all together, so either all visual tokens are reused or none.
        if example.visual_index is not None and reused <= example.visual_index[-1]:
            reused = 0
        return reused

    def _make_room(self, num_tokens, reused):
        """Makes sure that the cache has room for a prompt of `num_tokens` and its answer.

        A cache that is too small is replaced by one with room for several more answers, which
        takes over the first `reused` tokens.
        """
        needed = num_tokens + max_new_tokens
        if self.cache is not None and self.cache.size >= needed:
            return
        old = self.cache
        room = num_tokens + 4 * max_new_tokens
        weight = self.model.output_weight()
        config = self.model.config.language
        self.cache = KVCache(config, 1, room, weight.dtype, weight.device)
        if reused:
            self.cache.copy_from(old, reused)


# --------------------------------------------------------------------------------------------------
# Files

def open_file(name):
    """Opens a file for reading bytes; a UserError names it if that fails."""
    try:
        return open(name, 'rb')
    except OSError as e:
        raise UserError(f'{name}: {e.strerror}') from None


def load_media(processor, images=(), clip=''):
    """Picture files, or one video file, as Chat.show takes them.

    The settings start, end and subtitles apply to the video. A UserError names the file that cannot
    be read.
    """
    name = clip
    try:
        if clip:
            record = {
                'video': Path(clip).name,
                'start': start,
                'end': end or None,
                'subtitles': subtitles,
            }
            return processor.media(record, Path(clip).parent)
        pictures = []
        for name in images:
            pictures.append(load_image(open_file(name)))
        return {'images': pictures}
    except BadRow as e:
        raise UserError(f'{name}: {e}') from None


def points_file(name, suffix):
    """Where the drawn copy of a picture or video goes: out_dir/<name>.points.<suffix>."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f'{Path(name).stem}.points.{suffix}'


# --------------------------------------------------------------------------------------------------
# Answers

def answer_question(conversation, text, names, clip):
    """Asks, prints the answer as it comes, then prints and draws its points.

    names: files of the pictures shown, in order. clip: the video file, '' if none.
    """
    answer = ''
    for piece in conversation.ask(text):
        answer += piece
        if not json_output:
            print(piece, end='', flush=True)
    if json_output:
        result = {'answer': answer, 'points': parse_points(answer)}
        print(json.dumps(result, ensure_ascii=False))
        return
    print()
    if clip:
        show_video_points(answer, clip)
    else:
        show_picture_points(answer, conversation.media.get('images', ()), names)


def show_video_points(answer, clip):
    """Prints the points of an answer about a video and writes the video with them."""
    points = [point for point in parse_points(answer) if 't' in point]
    for point in points:
        print(f"{Path(clip).name}: {point['id']} at {point['t']:.1f} s "
              f"({point['x']:.3f}, {point['y']:.3f})")
    if points:
        path = points_file(clip, 'mp4')
        draw_on_video(open_file(clip), points, path, start, end or None)
        print(f'wrote {path}')


def show_picture_points(answer, pictures, names):
    """Prints the points of an answer about pictures and writes each picture that has some."""
    points = parse_points(answer)
    for n, (name, picture) in enumerate(zip(names, pictures)):
        # Answers number the pictures only if there are several.
        own_points = points_in_picture(points, n)
        for point in own_points:
            x = point['x'] * picture.width
            y = point['y'] * picture.height
            print(f"{Path(name).name}: {point['id']} at ({point['x']:.3f}, {point['y']:.3f}), "
                  f"pixel ({x:.0f}, {y:.0f})")
        if own_points:
            path = points_file(name, 'png')
            draw_points(enlarge(picture), own_points).save(path)
            print(f'wrote {path}')


def talk(conversation, names, clip):
    """Reads questions and commands from the keyboard until the end of input.

    A mistake, such as a file that does not exist, is printed, and the conversation goes on.
    """
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
                conversation.new()
                names = []
                clip = ''
            elif command == '/image' and files:
                conversation.show(**load_media(conversation.processor, files))
                # Pictures join pictures, but they replace a clip, as in Chat.show.
                names = files if clip else names + files
                clip = ''
            elif command == '/video' and len(files) == 1:
                conversation.show(**load_media(conversation.processor, clip=files[0]))
                names = []
                clip = files[0]
            elif command.startswith('/'):
                print(HELP)
            elif line:
                answer_question(conversation, line, names, clip)
        except (UserError, BadRow) as e:
            print(f'error: {e}')


def serve_page(conversation):
    """Answers a browser at the port `serve` until Ctrl-C."""
    from extra.serve import server             # the page's HTTP server
    try:
        page = server(conversation, load_media, serve)
    except OSError as e:
        raise UserError(f'port {serve}: {e.strerror}') from None
    print(f'http://localhost:{serve} (Ctrl-C ends it)')
    page.serve_forever()


def main():
    something_to_do = prompt or chat or serve
    if not checkpoint or not something_to_do or (image and video):
        raise UserError('give --checkpoint=out/demo and --prompt="..." '
                        '(and --image=a.jpg or --video=clip.mp4), or --chat=True or --serve=8000')
    if threads:
        torch.set_num_threads(threads)
    names = [name for name in image.split(',') if name]
    # Files are opened before the weights are loaded, because a wrong name should not have to wait.
    for name in names + [video]:
        if name:
            open_file(name).close()

    model, processor, _ = load_checkpoint(checkpoint)
    if max_frames:
        processor.max_frames = max_frames
    dev = pick_device(device)
    model.to(dev, pick_weights_dtype(dtype, dev)).eval()
    if compile:
        compile_blocks(model)
    conversation = Chat(model, processor, temperature=temperature, top_k=top_k, top_p=top_p,
                        seed=seed, repetition_penalty=repetition_penalty)
    if names or video:
        conversation.show(**load_media(processor, names, video))
    try:
        if prompt:
            answer_question(conversation, prompt, names, video)
        if chat:
            talk(conversation, names, video)
        if serve:
            serve_page(conversation)
    except BadRow as e:
        raise UserError(str(e)) from None


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        print()
