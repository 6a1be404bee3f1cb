# Stage 3: the mixture of stage 2 with three times as many frames and four times as many visual tokens per frame. A
# row is nine times as long as in stage 2.
from config.stage2 import *  # noqa: F403

out_dir = 'out/stage3'
init_from = 'out/stage2'
video_pooling = 2              # 64 visual tokens per frame
max_frames = 384               # 24,576 visual tokens, and the tokens of the frames' times
seq_len = 36864
batch_size = 1                 # rows per GPU; the activations of one are 57 GB
accumulation = 64              # 64 rows per step, as in the guide (4 x 16); on N GPUs set 64 / N
learning_rate = 3e-5
warmup_steps = 100
max_steps = 2000
save_interval = 500
