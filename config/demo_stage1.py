# Stage 1 in small: captions, points, counts, questions and clocks about drawn shapes, from random weights, on a laptop.
# Data: python prepare/shapes.py. Trains everything, because nothing here was trained before.
out_dir = 'out/demo_stage1'
mixture = {'shapes': 0.9, 'clocks': 0.07, 'shapes_text': 0.03}
tokenizer = 'data/shapes'
vision = dict(hidden_size=128, intermediate_size=512, num_layers=3, num_heads=4, image_size=64, patch_size=8, feature_layers=(-1,))
language = dict(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=32, vocab_size=1024)
pooling = 1                    # 64 visual tokens a picture
train_vision = True
image_size = 64
point_digits = 2
seq_len = 512
batch_size = 32
num_workers = 0                # on two cores a loader process would take one from the training
learning_rate = 2e-3
warmup_steps = 50
max_steps = 1500
min_lr_ratio = 0.05
eval_interval = 250
eval_batches = 8
save_interval = 500
