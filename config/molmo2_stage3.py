# Stage 3 by the official recipe: stage 2 again, with 384 frames in rows of 36,864 tokens.
from config.molmo2_stage2 import *  # noqa: F401, F403

out_dir = 'out/molmo2_stage3'
init_from = 'out/molmo2_stage2'
max_frames = 384               # 31,104 visual tokens, and their times
seq_len = 36864
batch_size = 1                 # rows a GPU
accumulation = 128             # 128 rows a step; on N GPUs 128 / N
max_steps = 2000
