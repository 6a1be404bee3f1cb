# Does everything work here? No data, no weights: a small model, twenty steps on pictures that are made in memory, with
# validation, answers and a checkpoint, in less than 20 seconds.
#
#     python train.py config/debug.py
#     torchrun --nproc-per-node=2 train.py config/debug.py
#
# Squares is an example of a data set that is a Python class. It needs __len__ and __getitem__, and what it returns is a
# record as docs/data.md describes it, whose `images` are Pillow pictures or arrays.
import sys

import numpy as np

COLOURS = {'red': (220, 40, 40), 'green': (40, 170, 60), 'blue': (50, 80, 230)}


class Squares:
    """Pictures with one coloured square each. The same number gives the same record whenever it is asked for, so that a
    run can be resumed."""

    def __init__(self, first, number):
        self.first = first
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        rng = np.random.default_rng(self.first + i)
        colour = str(rng.choice(list(COLOURS)))
        if i % 5 == 4:                       # some records are text alone
            return {'messages': [{'role': 'user', 'content': f'Say {colour}.'},
                                 {'role': 'assistant', 'content': colour}]}
        row, column = rng.integers(4, 40, 2)
        picture = rng.integers(0, 60, (64, 64, 3), np.uint8)     # [height, width, 3]
        picture[row:row + 20, column:column + 20] = COLOURS[colour]
        point = {'x': (column + 10) / 64, 'y': (row + 10) / 64}

        def ask(task, question, answer='', **more):
            turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer, **more}]
            return {'task': task, 'messages': turns}
        return {'images': [picture], 'conversations': [
            ask('captioning', 'Describe this image.', f'A {colour} square.'),
            ask('qa', 'Which colour is it?', colour),
            ask('counting', 'How many squares are there?', '1'),
            ask('pointing', 'Point to the square.', points={'label': 'square', 'points': [point]})]}


out_dir = 'out/debug'
datasets = {'squares': {'train': Squares(0, 1000), 'validation': Squares(1000, 20)}}
mixture = {'squares': 1.0}
tokenizer = 'bytes'
vision = dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, image_size=64, patch_size=8,
              feature_layers=(-1,))
language = dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                vocab_size=512)
image_size = 64
video_size = 64
train_vision = True
packing = True
seq_len = 512
batch_size = 4
num_workers = 2 if sys.platform == 'linux' else 0      # elsewhere a worker cannot get a class of this file
learning_rate = 3e-3
warmup_steps = 5
max_steps = 20
log_interval = 5
eval_interval = 10
eval_batches = 2
eval_answers = 4
show_interval = 10
save_interval = 10
