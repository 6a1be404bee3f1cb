# Stage 2 in small: videos, tracks and several pictures at once, from stage 1. Pictures stay in the mixture.
out_dir = 'out/demo_stage2'
init_from = 'out/demo_stage1'
mixture = {                    # sqrt-proportional inside each group; three pictures in four are shapes, to keep counting
    'pictures': {'rate': 0.46, 'sets': {'shapes': {}, 'clocks': {'factor': 0.4}, 'shapes_text': {'cap': 2000}}},
    'several pictures': {'rate': 0.14, 'sets': {'shapes_many': {}}},
    'videos': {'rate': 0.4, 'sets': {'clips': {}}},
}
image_size = 64
pooling = 2                    # 16 visual tokens a picture,
video_size = 64
video_pooling = 2              # and a frame
max_frames = 16
point_digits = 2
seq_len = 1024
batch_size = 8
packing = True
num_workers = 0
# Tracks have most tokens and are learned soonest; at weight 1 they were a third of the loss, counting a fiftieth.
task_weights = {'captioning': 3.0, 'qa': 4.0, 'counting': 5.0, 'pointing': 2.0, 'tracking': 0.4, 'text': 4.0}
train_vision = False           # it has learned what a shape is
optimizer = 'muon'
muon_learning_rate = 2e-3      # half of stage 1's: higher, it forgets pictures
learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 50
max_steps = 1600
min_lr_ratio = 0.0
eval_interval = 800
eval_batches = 8
save_interval = 800
keep = 0
