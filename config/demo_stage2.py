# Stage 2 of the demo: videos, tracks and questions about several pictures, from the checkpoint of stage 1. Single
# pictures stay in the mixture, so that the model does not forget them.
out_dir = 'out/demo_stage2'
init_from = 'out/demo_stage1'
# Inside a group the rates are proportional to the square root of the rows. Three of four single pictures are shapes,
# so that the model does not forget how to count.
mixture = {
    'pictures': {'rate': 0.46, 'sets': {'shapes': {}, 'clocks': {'factor': 0.4}, 'shapes_text': {'cap': 2000}}},
    'several pictures': {'rate': 0.14, 'sets': {'shapes_many': {}}},
    'videos': {'rate': 0.4, 'sets': {'clips': {}}},
}
image_size = 64
pooling = 2                    # 16 visual tokens per picture
video_size = 64
video_pooling = 2              # 16 visual tokens per frame
max_frames = 16
point_digits = 2
seq_len = 1024
batch_size = 8
packing = True
num_workers = 0
# Tracking weighs least, because tracks have most of the tokens and are learned soonest. With a weight of 1, tracking
# was a third of the loss and counting a fiftieth.
task_weights = {'captioning': 3.0, 'qa': 4.0, 'counting': 5.0, 'pointing': 2.0, 'tracking': 0.4, 'text': 4.0}
train_vision = False           # frozen, because stage 1 has trained the tower on these shapes
optimizer = 'muon'
muon_learning_rate = 2e-3      # with a higher rate the model forgets pictures
learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 50
max_steps = 1600
min_lr_ratio = 0.0
eval_interval = 800
eval_batches = 8
save_interval = 800
keep = 0
