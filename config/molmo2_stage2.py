# Stage 2 by the official recipe: instructions about pictures and videos, and tracks, from the checkpoint of stage 1
# (allenai/molmo2, launch_scripts/sft.py, f3cb1085). That script has 300,000 steps; this config has the paper's
# 30,000. The rates of the eight groups are divided by their sum, 1.10. Inside a group a dataset's rate is
# proportional to the square root of its rows. Each token of points, tracks and video captions has a constant loss
# weight (token_weight). A token of any other answer weighs 2 / sqrt(tokens of the answer) / sqrt(conversations of the
# record).
from config.molmo2_stage1 import *  # noqa: F401, F403

out_dir = 'out/molmo2_stage2'
init_from = 'out/molmo2_stage1'
_point = {'token_weight': .2}
mixture = {
    'demo': {'rate': .15, 'sets': {
        'pixmo-ask-model-anything': {'size': 162_000}, 'pixmo-cap': {'size': 717_042, 'cap': 100_000},
        'pixmo-cap-qa': {'size': 271_714}, 'molmo2-multi-image-qa': {'size': 45_000},
        'molmo2-ask-model-anything': {'size': 43_000},
        'molmo2-cap': {'size': 104_000, 'factor': 1.5, 'token_weight': .1}}},
    'video academic': {'rate': .2, 'sets': {
        'tgif-qa': {'size': 63_000, 'cap': 60_000}, 'tvqa': {'size': 120_000, 'cap': 60_000},
        **dict.fromkeys(('paxion', 'moments-in-time', 'kinetics-710'), {'cap': 60_000}),
        'next-qa-mc': {'size': 34_000}, 'sports-qa': {'size': 56_000}, 'funqa': {'size': 200_000},
        'molmo2-video-cap-qa': {'size': 1_000_000}, 'molmo2-video-subtitle-qa': {'size': 300_000},
        **dict.fromkeys((
            'llava-video-academic-mc', 'llava-video-academic-oe', 'perception-test', 'news-video-qa', 'how2qa',
            'sutd-trafficqa', 'social-iq2', 'cinepile', 'clevrer', 'star', 'intent-qa', 'road-text-vqa', 'countix',
            'video-localized-narratives-qa', 'video-localized-narratives-caption', 'camerabench-qa',
            'motionbench-train', 'charades-sta', 'coin', 'youcook2', 'activitynet', 'ego4d', 'epic-kitchens',
            'qv-highlights'), {})}},
    'image academic': {'rate': .25, 'sets': {
        'vqa-v2': {'size': 443_757}, 'text-vqa': {'size': 34_602}, 'ok-vqa': {'size': 9_000},
        'chart-qa': {'size': 28_299}, 'doc-vqa': {'size': 39_463}, 'infographic-vqa': {'size': 24_000},
        'ai2d': {'size': 15_000}, 'a-okvqa-mc': {'size': 34_000}, 'science-qa-img': {'size': 6_200},
        'st-vqa': {'size': 25_000}, 'tally-qa': {'size': 250_000}, 'llava-665k-multi': {'size': 2_500_000},
        'nlvr2': {'size': 86_000}, 'dvqa': {'cap': 10_000}, 'figureqa': {'cap': 10_000}, 'plotqa': {'cap': 20_000},
        **dict.fromkeys((
            'a-okvqa-da', 'tabmwp-da', 'spot-the-diff', 'cosyn-chart', 'cosyn-chemical', 'cosyn-diagram',
            'cosyn-document', 'cosyn-math', 'cosyn-music', 'cosyn-table', 'molmo2-syn-multi-image-chart',
            'molmo2-syn-multi-image-chemical', 'molmo2-syn-multi-image-diagram', 'molmo2-syn-multi-image-doc',
            'molmo2-syn-multi-image-music', 'molmo2-syn-multi-image-table'), {})}},
    # The factor depends on what is asked for: whole tracks (-track), the first and last moment of each object
    # (-ground), or the track after a given point (-single-point-track). Small datasets have smaller factors.
    'tracking': {'rate': .15, 'sets': {
        'mevis-track': {'size': 20_000, 'factor': .4, **_point},
        'ref-yt-vos-track': {'size': 11_000, 'factor': .4, **_point},
        'molmo2-video-track': {'size': 220_000, 'factor': .4, **_point},
        'vicas-track': {'size': 130_000, 'cap': 30_000, 'factor': .4, **_point},
        **dict.fromkeys(('lv-vis-track', 'revos-track'), {'factor': .4, **_point}),
        **dict.fromkeys(('burst-track', 'ref-davis17-track', 'yt-vis-track', 'moca-track'), {'factor': .05, **_point}),
        **dict.fromkeys(('mevis-ground', 'lv-vis-ground', 'revos-ground', 'molmo2-video-track-ground'),
                        {'factor': .2, **_point}),
        'vicas-ground': {'cap': 30_000, 'factor': .2, **_point},
        **dict.fromkeys(('burst-ground', 'moca-ground'), {'factor': .01, **_point}),
        **dict.fromkeys((
            'mevis-single-point-track', 'lv-vis-single-point-track', 'revos-single-point-track',
            'molmo2-video-single-point-track'), {'factor': .15, **_point}),
        'vicas-single-point-track': {'cap': 30_000, 'factor': .15, **_point},
        **dict.fromkeys((
            'webuav-single-point-track', 'got10k-single-point-track', 'vasttrack-single-point-track'),
            {'factor': .2, **_point}),
        'trackingnet-single-point-track': {'size': 29_000, 'factor': .2, **_point},
        **dict.fromkeys((
            'burst-single-point-track', 'lvosv1-single-point-track', 'lvosv2-single-point-track',
            'lasot-single-point-track', 'uwcot-single-point-track', 'webuot-single-point-track',
            'latot-single-point-track', 'tnl2k-single-point-track', 'tnllt-single-point-track'),
            {'factor': .1, **_point})}},
    # Pointing in videos has the rate .15, which these four datasets share in fixed parts
    'points 0-5': {'rate': .15 * .4, 'sets': {'molmo2-video-point-0-5': {'size': 330_000, **_point}}},
    'points 6-25': {'rate': .15 * .3, 'sets': {'molmo2-video-point-6-25': _point}},
    'points 26-60': {'rate': .15 * .1, 'sets': {'molmo2-video-point-26-60': _point}},
    'points academic': {'rate': .15 * .2, 'sets': {'academic-video-points': _point}},
    'image pointing': {'rate': .1, 'sets': {
        'pixmo-multi-points': {'size': 472_943, 'cap': 200_000, **_point},
        'pixmo-points': {'size': 2_376_222, **_point}, 'pixmo-points-high-freq': _point,
        'pixmo-count': {'size': 36_916, 'factor': 2 ** .5, **_point},
        'cosyn-point': {'size': 68_051, **_point}}},
    'tulu4-classified': .0995,
    'molmo2-hardcodes': .0005,
}
max_frames = 128               # each has 27 x 27 patches, pooled 3 x 3: 81 visual tokens
task_weights = dict.fromkeys(('captioning', 'qa', 'counting', 'pointing', 'tracking', 'text', 'other'), 2.0)
length_weighting = True
branch_weighting = True
seq_len = 16384
batch_size = 2                 # rows per GPU
accumulation = 64              # 128 rows per step; on N GPUs set 64 / N
residual_dropout = 0.1
vision_learning_rate = 5e-6
connector_learning_rate = 5e-6
learning_rate = 1e-5
vision_warmup_steps = 200
warmup_steps = 200
max_steps = 30000
save_interval = 2000
