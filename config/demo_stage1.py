# Stage 1 in small: captions, points, counts, questions and clocks about drawn shapes, from random weights, on a laptop.
# Data: python prepare/shapes.py. Trains everything, because nothing here was trained before.
out_dir = 'out/demo_stage1'
tokenizer = 'data/shapes'
mixture = {'shapes': 0.87, 'clocks': 0.08, 'shapes_text': 0.05}
vision = dict(hidden_size=128, intermediate_size=512, num_layers=3, num_heads=8, image_size=64, patch_size=8,
              feature_layers=(-1,))
language = dict(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=32,
                vocab_size=1024)
image_size = 64
pooling = 2                    # 16 visual tokens a picture,
video_size = 64
video_pooling = 2              # and a frame
max_frames = 16
train_vision = True
point_digits = 2
seq_len = 1024
batch_size = 6                 # rows of several pictures each, 32 in all
packing = True
num_workers = 0                # on two cores a loader process would take one from the training
# What shape a thing has is learned last, and from captions; until then nobody can find "the red star". A coordinate is
# known to a few hundredths at best: with the default weights that noise would be three quarters of the loss.
task_weights = {'captioning': 4.0, 'qa': 3.0, 'counting': 2.0, 'pointing': 2.0}
optimizer = 'muon'
muon_learning_rate = 4e-3
learning_rate = 2e-3
vision_learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 50
max_steps = 3600
min_lr_ratio = 0.0
eval_interval = 400
eval_batches = 8
save_interval = 400
keep = 0                       # every checkpoint, for docs/curve.py
