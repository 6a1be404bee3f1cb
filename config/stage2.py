# Stage 2: instructions about pictures, videos, tracks. From stage 1's checkpoint; values are the documents'.
# One group: w_i = sqrt(n_i) / sum of sqrt(n_j).
from prepare.table import sets

out_dir = 'out/stage2'
init_from = 'out/stage1'
mixture = {'all': {'rate': 1.0, 'sets': sets('2')}}         # prepare/download.py --stage sft, and what you fetch by hand
image_size = 336
pooling = 2
video_size = 224               # 16 x 16 patches, pooled 4 x 4: 16 tokens a frame
video_pooling = 4
max_frames = 128
fps = 2.0
seq_len = 4096
packing = True
batch_size = 8                 # rows a GPU: as many as fit 80 GB with every activation kept (python model.py)
accumulation = 16              # 128 rows a step, as the documents' 16 x 8
learning_rate = 5e-5
warmup_steps = 1000
max_steps = 50000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 2000
num_workers = 8
