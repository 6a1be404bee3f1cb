# Stage 1 of the drawn world: captions, points, counts and questions about shapes and clocks, on a laptop. The data is drawn
# by prepare/shapes.py, and the tower comes from prepare/tower.py, which has taught it shapes. All parts are trained,
# because the decoder starts at random and the tower has never seen a clock.
out_dir = 'out/demo_stage1'
tokenizer = 'data/shapes'
mixture = {'shapes': 0.87, 'clocks': 0.08, 'shapes_text': 0.05}
vision = dict(hidden_size=128, intermediate_size=512, num_layers=3, num_heads=8, image_size=64, patch_size=8,
              feature_layers=(-1,))
language = dict(hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=32,
                vocab_size=1024)
image_size = 64
pooling = 2                    # 16 visual tokens per picture
video_size = 64
video_pooling = 2              # 16 visual tokens per frame
max_frames = 16
vision_weights = 'out/demo_tower'
train_vision = True
point_digits = 2
seq_len = 1024
batch_size = 6                 # rows; each holds several pictures, together about 32
packing = True
num_workers = 0                # a loader process would take one of two cores from the training
# Counting has the largest weight, because an answer that counts has two tokens and one that points has twenty
task_weights = {'captioning': 2.0, 'qa': 4.0, 'counting': 8.0, 'pointing': 3.0}
optimizer = 'muon'
muon_learning_rate = 1.5e-3
learning_rate = 2e-3
vision_learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 50
max_steps = 1800
min_lr_ratio = 0.0
eval_interval = 300
eval_batches = 8
save_interval = 300
keep = 0                       # 0 keeps every checkpoint; docs/curve.py draws their scores
