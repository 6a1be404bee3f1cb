"""The drawn world: pictures and clips of coloured shapes, with everything one can ask about them.

    python prepare/shapes.py                     data/shapes, data/clips and four more, in minutes
    python prepare/shapes.py --num 1000 --force  a small world instead

What is in it:
- PNG and JPEG files of several sizes with 1 to 6 shapes; a shape may touch another but not hide it;
- captions, points (also to what is not there), counts, and questions on attributes and relations;
- pictures of clocks, rows of text only, and rows with several pictures;
- MP4 clips of 2 to 60 seconds with tracks, times and subtitles;
- a byte-level BPE tokenizer of about 800 tokens with the special tokens of Qwen3.

What is not in it: anything random that --seed does not fix, and any scene that train and validation
share. This file has the command, the tokenizer and the writing of datasets; scenes.py draws, and
pictures.py and clips.py make the rows.
"""
import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from clips import long_row, short_row
from pictures import clocks_row, many_row, shapes_row, text_row
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

# Raise this number when the same arguments draw or say something else, because a folder that an
# earlier version made is noticed by it.
WORLD = 5
SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>',
                  '<|vision_end|>', '<|image_pad|>', '<|video_pad|>')
# Text is split into these pieces before BPE, which joins letters within a piece only: the start of
# a point, a coordinate, a time, a digit, a word, a line break, punctuation, and other space.
PIECES = (r' ?<point| ?[01]\.\d\d(?!\d)| ?\d+\.\d(?!\d)| ?\d| ?\p{L}+|\n| ?[^\s\p{L}\d]+|\s+')


# --------------------------------------------------------------------------------------------------
# The tokenizer


def train_tokenizer(rows):
    """Byte-level BPE, trained on text of the world. It encodes any other text too.

    Each word of the world becomes one token. So does each coordinate from ' 0.00' to ' 1.00',
    because a place is then one choice among 101 and not four digits in a row, and each half second
    from '0.0' to '60.0'. Other digits are single tokens, as in Qwen's tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()

    # Words of the chat template and all coordinates, digits and times come in this corpus often
    # enough to become tokens, whatever the rows say.
    corpus = [
        'user\nassistant\n' * 9,
        'Image 1 Image 2 Image 3 There are none.\nSubtitles:\n' * 9,
    ]
    for x in range(101):
        for y in range(101):
            corpus.append(f'<point {x / 100:.2f}, {y / 100:.2f}, 1> <point {y / 100:.2f}')
    corpus += [f' {digit} {digit}' * 9 for digit in range(10)]
    corpus += [f'{t / 2:.1f}s {t / 2:.1f} s ' * 9 for t in range(121)]
    for row in rows:
        for conversation in row['conversations']:
            corpus += [message['content'] for message in conversation['messages']]

    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=4, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|im_end|>',
        'pad_token': '<|endoftext|>',
        'clean_up_tokenization_spaces': False,
        'model_max_length': 4096,
        'additional_special_tokens': list(SPECIAL_TOKENS[1:]),
    }
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump(config, f, indent=2)


# --------------------------------------------------------------------------------------------------
# Files


def write_dataset(folder, make_row, counts, args):
    """Writes all splits of a dataset into `folder`.tmp, in args.workers processes.

    Returns the path of that folder, which the caller renames when all datasets are complete, and up
    to 2,000 training rows for the tokenizer.
    """
    temporary = folder + '.tmp'
    shutil.rmtree(temporary, ignore_errors=True)               # an interrupted run may have left it
    media = os.path.join(temporary, 'media')
    os.makedirs(media)
    sample = []
    with ProcessPoolExecutor(args.workers) as pool:
        for split, count in counts.items():
            make = partial(make_row, temporary, split, args=args)
            rows = pool.map(make, range(count), chunksize=64)
            title = f'{os.path.basename(folder)}/{split}'
            with open(os.path.join(temporary, split + '.jsonl'), 'w') as f:
                for row in tqdm(rows, total=count, unit='row', desc=title):
                    f.write(json.dumps(row) + '\n')
                    if split == 'train' and len(sample) < 2000:
                        sample.append(row)
    if not os.listdir(media):
        os.rmdir(media)                                        # rows of text only have no media
    return temporary, sample


def planned(args):
    """{dataset: (the function that makes a row, {split: number of rows})}"""
    few = args.num_validation // 5
    plan = {
        'shapes': (shapes_row, {'train': args.num, 'validation': args.num_validation}),
        'clocks': (clocks_row, {'train': args.num_clocks, 'validation': few}),
        'shapes_text': (text_row, {'train': args.num_text, 'validation': few}),
        'clips': (short_row, {'train': args.num_clips, 'validation': few}),
        'long_clips': (long_row, {'train': args.num_clips // 4, 'validation': few // 2}),
        'shapes_many': (many_row, {'train': args.num_clips, 'validation': few}),
    }
    return {dataset: job for dataset, job in plan.items() if job[1]['train']}


def read_manifest(folder):
    """The arguments that a folder was made with, or None if there is no complete dataset in it."""
    path = os.path.join(folder, 'manifest.json')
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data',
                        help='The datasets go into folders of this one.')
    parser.add_argument('--num', type=int, default=40000,
                        help='So many training pictures of shapes are drawn.')
    parser.add_argument('--num_clocks', type=int, default=3000,
                        help='So many training pictures of clocks are drawn.')
    parser.add_argument('--num_text', type=int, default=4000,
                        help='So many training rows have no picture.')
    parser.add_argument('--num_clips', type=int, default=6000,
                        help='So many short training clips and as many rows of several pictures '
                             'are drawn, and a quarter as many long clips; 0 needs no PyAV.')
    parser.add_argument('--num_validation', type=int, default=1000,
                        help='So many pictures are held out, and a fifth of it of other sets.')
    parser.add_argument('--captioning', type=int, default=1,
                        help='A picture of shapes has this number of captions, 0 or 1.')
    parser.add_argument('--pointing', type=int, default=2,
                        help='A picture of shapes has at most this number of pointing questions.')
    parser.add_argument('--counting', type=int, default=2,
                        help='A picture of shapes has at most this number of counting questions.')
    parser.add_argument('--qa', type=int, default=4,
                        help='A picture of shapes has at most this number of other questions.')
    parser.add_argument('--seed', type=int, default=0,
                        help='Another seed draws another world.')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='So many processes draw at once; the files do not depend on it.')
    parser.add_argument('--force', action='store_true',
                        help='Folders that other arguments made are replaced.')
    return parser.parse_args()


def main():
    args = parse_arguments()
    # The manifest has all arguments that change what is drawn.
    manifest = {'world': WORLD}
    for key, value in vars(args).items():
        if key not in ('out', 'workers', 'force'):
            manifest[key] = value

    plan = planned(args)
    folders = {dataset: os.path.join(args.out, dataset) for dataset in plan}
    done = []              # for each dataset, whether it is there already
    for folder in folders.values():
        is_same = read_manifest(folder) == manifest
        done.append(is_same)
        if os.path.exists(folder) and not is_same and not args.force:
            sys.exit(f'{folder} exists and was not made with these arguments; '
                     'give --force to replace it, or name another folder with --out')
    if all(done):
        print(f'{", ".join(folders.values())}: already there with these arguments, nothing to do')
        return

    written = {}           # dataset -> its temporary folder
    sample = []
    for dataset, (make_row, counts) in plan.items():
        written[dataset], rows = write_dataset(folders[dataset], make_row, counts, args)
        sample += rows
    tokenizer = train_tokenizer(sample)
    save_tokenizer(tokenizer, written['shapes'])

    # The folders get their names last, so that an interrupted run leaves none that looks complete.
    for dataset, temporary in written.items():
        with open(os.path.join(temporary, 'manifest.json'), 'w') as f:
            json.dump(manifest, f, indent=2)
        shutil.rmtree(folders[dataset], ignore_errors=True)
        os.replace(temporary, folders[dataset])
    print(f'{", ".join(folders.values())}: done; '
          f'a tokenizer of {tokenizer.get_vocab_size()} tokens in {folders["shapes"]}')


if __name__ == '__main__':
    main()
