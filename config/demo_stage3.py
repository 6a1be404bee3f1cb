# Stage 3 in small: clips of three times as many frames, from stage 2's checkpoint.
out_dir = 'out/demo_stage3'
init_from = 'out/demo_stage2'
mixture = {
    'pictures': {'rate': 0.3, 'sets': {'shapes': {}, 'clocks': {}, 'shapes_text': {'cap': 2000}}},
    'several pictures': {'rate': 0.15, 'sets': {'shapes_many': {}}},
    'videos': {'rate': 0.55, 'sets': {'clips': {}, 'long_clips': {}}},
}
image_size = 64
pooling = 2
video_size = 64
video_pooling = 2
max_frames = 48
point_digits = 2
seq_len = 2048
batch_size = 4
packing = True
num_workers = 0
task_weights = {'captioning': 4.0, 'qa': 3.0, 'counting': 2.0, 'pointing': 2.0, 'tracking': 1.0}
train_vision = False
optimizer = 'muon'
muon_learning_rate = 2e-3
learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 20
max_steps = 300
min_lr_ratio = 0.0
eval_interval = 150
eval_batches = 8
save_interval = 150
keep = 0
