# Training on your own data, a folder data/mine with train.jsonl (docs/data.md), from the demo's last checkpoint. Name
# another checkpoint in init_from to start from that one.
out_dir = 'out/mine'
init_from = 'out/demo_stage3'
mixture = {'mine': 1.0}
image_size = 64                # sizes and pooling are those of the checkpoint in init_from
pooling = 2
video_size = 64
video_pooling = 2
max_frames = 16
point_digits = 2
seq_len = 1024
batch_size = 4                 # rows; each holds several examples
packing = True
num_workers = 1
train_vision = False
learning_rate = 3e-4
warmup_steps = 20
max_steps = 300
min_lr_ratio = 0.0
eval_interval = 100
save_interval = 100
