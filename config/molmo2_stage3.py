# Stage 3 by the official recipe: as stage 2, but with up to 384 frames per video and rows of 36,864 tokens.
from config.molmo2_stage2 import *  # noqa: F401, F403

out_dir = 'out/molmo2_stage3'
init_from = 'out/molmo2_stage2'
max_frames = 384               # 31,104 visual tokens, and the tokens of the frames' times
seq_len = 36864
batch_size = 1                 # rows per GPU
accumulation = 128             # 128 rows per step; on N GPUs set 128 / N
max_steps = 2000
