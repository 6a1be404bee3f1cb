# The first eight minutes: a model that learns to see while you watch. `make demo` draws 24,000 pictures of shapes and trains
# a tower that sees them (prepare/tower.py). Then this config: the decoder learns to read the tower's features, to
# describe pictures, to point, to count and to answer, and the tower goes on learning with it. config/demo_stage1.py has
# the same task with clocks and text beside it.
from config.demo_stage1 import *  # noqa: F403

out_dir = 'out/demo'
data_dir = 'data/demo'
tokenizer = 'data/demo/shapes'
mixture = {'shapes': 1.0}
# Counting weighs more than in the longer run, because it has not come as far when this one ends
task_weights = {'captioning': 1.5, 'qa': 4.0, 'counting': 10.0, 'pointing': 3.0}
max_steps = 770
eval_interval = 110
eval_batches = 2
eval_answers = 20
show_interval = 70             # about every 22 seconds
save_interval = 770
