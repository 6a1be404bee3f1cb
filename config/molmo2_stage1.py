# Stage 1 by the official recipe, with the parts of Molmo2-4B, all trained (allenai/molmo2,
# launch_scripts/pretrain.py, f3cb1085). Three things of the recipe are missing: the eight crops of a picture beside
# its view of 378 pixels, templates for prompts, and dropout that is limited to answers.
out_dir = 'out/molmo2_stage1'
recipe = 'molmo2'
vision = 'google/siglip2-so400m-patch14-384'
language = 'Qwen/Qwen3-4B-Instruct-2507'
connector = 'molmo2'
vision_weights = 'weights/siglip2-so400m-patch14-384'
language_weights = 'weights/Qwen3-4B-Instruct-2507'
train_vision = True
train_embedding = False        # frozen: the token embeddings, and the output, which is tied to them
# The recipe reads PixMo's points in two ways, for pointing and for counting. As one dataset that is twice as many
# rows, so its share is larger by the factor sqrt(2).
mixture = {
    'pixmo-cap': 0.6,
    'pointing': {'rate': 0.3, 'sets': {
        'pixmo-points': {'size': 2_376_222, 'factor': 2 ** .5}, 'pixmo-points-high-freq': {'factor': 2 ** .5},
        'pixmo-count': {'size': 36_916, 'factor': 2 ** .5}, 'cosyn-point': {'size': 68_051}}},
    'tulu4-classified': 0.1,
}
image_size = 378               # 27 x 27 patches, pooled 2 x 2 with a margin: 196 visual tokens
pooling = 2
video_size = 378
video_pooling = 3
point_format = 'molmo2'
task_weights = {}              # every token has the same weight
seq_len = 2536
packing = True
batch_size = 4                 # rows per GPU
accumulation = 32              # 128 rows per step; on N GPUs set 32 / N
recompute = 1
vision_learning_rate = 6e-6
connector_learning_rate = 2e-4
learning_rate = 2e-5
vision_warmup_steps = 2000
connector_warmup_steps = 200
warmup_steps = 2000
max_steps = 31000
schedule = 'cosine'            # down to a tenth of the peak
epsilon = 1e-6
weight_decay = 0.0
grad_clip = 1.0
clip_parts = True
z_loss = 1e-4
save_interval = 4000
num_workers = 8
seed = 6198
