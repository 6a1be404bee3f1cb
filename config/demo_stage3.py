# Stage 3 of the demo: clips with three times as many frames, from the checkpoint of stage 2.
from config.demo_stage2 import *  # noqa: F403

out_dir = 'out/demo_stage3'
init_from = 'out/demo_stage2'
mixture = {
    'pictures': {'rate': 0.45, 'sets': {'shapes': {}, 'clocks': {'factor': 0.4}, 'shapes_text': {'cap': 2000}}},
    'several pictures': {'rate': 0.15, 'sets': {'shapes_many': {}}},
    'videos': {'rate': 0.4, 'sets': {'clips': {}, 'long_clips': {}}},
}
task_weights = {**task_weights, 'tracking': 1.0}  # noqa: F405
max_frames = 48
seq_len = 2048
batch_size = 4
muon_learning_rate = 1e-3
learning_rate = 5e-4
warmup_steps = 20
max_steps = 300
eval_interval = 150
save_interval = 150
