# Stage 3: stage 2's mixture with three times the frames and four times the tokens of each. A row is nine of stage 2's.
from config.stage2 import mixture  # noqa: F401

out_dir = 'out/stage3'
init_from = 'out/stage2'
image_size = 336
pooling = 2
video_size = 224               # 16 x 16 patches, pooled 2 x 2: 64 tokens a frame
video_pooling = 2
max_frames = 384               # 24,576 visual tokens, and their times
fps = 2.0
seq_len = 36864
packing = True
batch_size = 4                 # rows a GPU
accumulation = 16
recompute = 1
learning_rate = 3e-5
warmup_steps = 100
max_steps = 2000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 500
num_workers = 8
