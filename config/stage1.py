# Stage 1: captions, pointing and text, with a frozen CLIP ViT-L/14 at 336 pixels, a linear connector and Qwen3-0.6B.
# The guide that this project started from has 32 rows per GPU, 4 micro-batches and one example per row. Here a row of
# 4,096 tokens is packed with about a dozen pictures and their conversations. The 128 rows of a step are 16
# micro-batches of 8, because 8 full rows fit 80 GB without activation checkpointing, which is a quarter faster than
# 32 rows with it. A step therefore has a dozen times as many examples as in the guide. max_steps and the
# learning-rate schedule are the guide's.
from prepare.table import sets

out_dir = 'out/stage1'
vision = 'openai/clip-vit-large-patch14-336'
language = 'Qwen/Qwen3-0.6B'
vision_weights = 'weights/clip-vit-large-patch14-336'   # a folder with the released safetensors
language_weights = 'weights/Qwen3-0.6B'
connector = 'linear'
mixture = {                    # captions 60%, pointing 30%, text 10%, from prepare/download.py --stage pretraining
    'captions': {'rate': 0.6, 'sets': sets('1', 'demo')},
    'pointing': {'rate': 0.3, 'sets': sets('1', 'image_pointing')},
    'text': {'rate': 0.1, 'sets': sets('1', 'nlp')},
}
image_size = 336               # 24 x 24 patches, pooled 2 x 2: 144 visual tokens per picture
pooling = 2
seq_len = 4096
packing = True                 # all rows have the same length, so kernels are compiled once
compile = True                 # 1.36 times as fast on an H200; the first step takes 20 seconds
batch_size = 8                 # rows per GPU
accumulation = 16              # 128 rows per step; on N GPUs set 16 / N
learning_rate = 1e-4
warmup_steps = 2000
max_steps = 100000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 5000
num_workers = 8
