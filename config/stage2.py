# Stage 2: instructions about pictures and videos, and tracks, from the checkpoint of stage 1. The values are the
# guide's (config/stage1.py). All datasets are one group, so each has the rate w_i = sqrt(n_i) / sum of sqrt(n_j), for
# n_i rows.
from prepare.table import sets

out_dir = 'out/stage2'
init_from = 'out/stage1'
# From prepare/download.py --stage sft, and the datasets that you have fetched by hand
mixture = {'all': {'rate': 1.0, 'sets': sets('2')}}
image_size = 336
pooling = 2
video_size = 224               # 16 x 16 patches, pooled 4 x 4: 16 visual tokens per frame
video_pooling = 4
max_frames = 128
fps = 2.0
seq_len = 4096
packing = True
compile = True
batch_size = 8                 # rows per GPU; 8 fit 80 GB without activation checkpointing (python model.py)
accumulation = 16              # 128 rows per step, as in the guide (16 x 8); on N GPUs set 16 / N
learning_rate = 5e-5
warmup_steps = 1000
max_steps = 50000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 2000
num_workers = 8
