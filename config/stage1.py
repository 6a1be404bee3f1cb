# Stage 1: captions, pointing and text. CLIP ViT-L/14 at 336 frozen, a linear connector, Qwen3-0.6B.
# The documents say 32 rows a GPU and 4 micro-batches, one example a row. Here a row of 4,096 tokens is filled with about
# a dozen pictures and their conversations, and the 128 rows of a step come as 8 x 16: 8 full rows fit 80 GB with every
# activation kept, which is a quarter faster than 32 whose blocks are computed twice. A step then sees a dozen times as
# many examples as the documents' step; max_steps and the schedule are theirs.
from prepare.table import sets

out_dir = 'out/stage1'
vision = 'openai/clip-vit-large-patch14-336'
language = 'Qwen/Qwen3-0.6B'
vision_weights = 'weights/clip-vit-large-patch14-336'   # folders with the released safetensors
language_weights = 'weights/Qwen3-0.6B'
connector = 'linear'
mixture = {                    # captions 60%, pointing 30%, text 10%; prepare/download.py --stage pretraining
    'captions': {'rate': 0.6, 'sets': sets('1', 'demo')},
    'pointing': {'rate': 0.3, 'sets': sets('1', 'image_pointing')},
    'text': {'rate': 0.1, 'sets': sets('1', 'nlp')},
}
image_size = 336               # 24 x 24 patches, pooled 2 x 2: 144 tokens a picture
pooling = 2
seq_len = 4096
packing = True                 # and so every row has the same length, which keeps compiled kernels
batch_size = 8                 # rows a GPU
accumulation = 16              # 128 rows a step; on N GPUs 16 / N
learning_rate = 1e-4
warmup_steps = 2000
max_steps = 100000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 5000
num_workers = 8
