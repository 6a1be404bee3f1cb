# Stage 2: instructions about pictures, videos, tracks. From stage 1's checkpoint; values and sizes are the documents'
# (sizes are used for the table until the sets are prepared). One group: w_i = sqrt(n_i) / sum of sqrt(n_j).
out_dir = 'out/stage2'
init_from = 'out/stage1'
mixture = {'all': {'rate': 1.0, 'sets': {
    'molmo2-cap': {'size': 104_000}, 'molmo2-ask-model-anything': {'size': 43_000},
    'molmo2-video-cap-qa': {'size': 1_000_000}, 'molmo2-video-subtitle-qa': {'size': 300_000},
    'molmo2-video-point': {'size': 330_000}, 'molmo2-video-track': {'size': 220_000},
    'molmo2-multi-image-qa': {'size': 45_000}, 'molmo2-multi-image-point': {'size': 472_943},
    'molmo2-syn-multi-image-qa': {'size': 188_000},
    'pixmo-cap': {'size': 717_042}, 'pixmo-cap-qa': {'size': 271_714}, 'pixmo-ask-model-anything': {'size': 162_000},
    'pixmo-points': {'size': 2_376_222}, 'pixmo-count': {'size': 36_916}, 'cosyn-point': {'size': 68_051},
    'vqa-v2': {'size': 443_757}, 'text-vqa': {'size': 34_602}, 'ok-vqa': {'size': 9_000}, 'chart-qa': {'size': 28_299},
    'doc-vqa': {'size': 39_463}, 'infographic-vqa': {'size': 24_000}, 'ai2d': {'size': 15_000},
    'a-okvqa': {'size': 34_000}, 'science-qa': {'size': 6_200}, 'st-vqa': {'size': 25_000},
    'tally-qa': {'size': 250_000}, 'nlvr2': {'size': 86_000}, 'tgif-qa': {'size': 63_000}, 'tvqa': {'size': 120_000},
    'next-qa': {'size': 34_000}, 'tulu-3': {'size': 939_343},
}}}
image_size = 336
pooling = 2
video_size = 224               # 16 x 16 patches, pooled 4 x 4: 16 tokens a frame
video_pooling = 4
max_frames = 128
fps = 2.0
seq_len = 4096
packing = True
batch_size = 16                # rows a GPU
accumulation = 8
recompute = 1
learning_rate = 5e-5
warmup_steps = 1000
max_steps = 50000
schedule = 'cosine'
grad_clip = 1.0
save_interval = 2000
num_workers = 8
