# The first ten minutes: a model that learns to see while you watch. `make demo` draws 16,000 pictures of shapes, trains a
# tower that sees them (prepare/tower.py), and then this: the decoder learns to read the tower's features, to describe
# pictures, to point, to count and to answer. config/demo_stage1.py has the same task from nothing, with clocks and text.
from config.demo_stage1 import *  # noqa: F403

out_dir = 'out/demo'
data_dir = 'data/demo'
tokenizer = 'data/demo/shapes'
mixture = {'shapes': 1.0}
vision_weights = 'out/demo_tower'
# What is still hard weighs more: the tower knows colours and kinds, so captions are soon right
task_weights = {'captioning': 1.5, 'qa': 2.0, 'counting': 4.0, 'pointing': 3.0}
max_steps = 700
eval_interval = 100
eval_batches = 2
eval_answers = 40
show_interval = 50
save_interval = 700
