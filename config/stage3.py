# Stage 3: stage 2's mixture with three times the frames and four times the tokens of each. A row is nine of stage 2's.
from config.stage2 import *  # noqa: F403

out_dir = 'out/stage3'
init_from = 'out/stage2'
video_pooling = 2              # 64 tokens a frame,
max_frames = 384               # 24,576 of them, and their times
seq_len = 36864
batch_size = 1                 # row a GPU: its activations are 57 GB
accumulation = 64              # 64 rows a step, as the documents' 4 x 16
learning_rate = 3e-5
warmup_steps = 100
max_steps = 2000
save_interval = 500
