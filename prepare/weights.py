"""Released weights -> a checkpoint to start from. Needs: pip install '.[prepare]'.

    python prepare/weights.py --vision openai/clip-vit-large-patch14-336 \\
        --language Qwen/Qwen3-0.6B --out weights/start
    python prepare/weights.py --molmo2 allenai/Molmo2-4B --out weights/Molmo2-4B

Then: python train.py config/stage1.py --init_from=weights/start

Names are those of the hub, or folders. Any CLIP or SigLIP tower and any dense Qwen3 will do,
because their sizes come from their config.json. Config, tokenizer and safetensors files are fetched
and compared with the check sums that the hub lists; pickles are never opened. The connector is new,
and init_weights in model.py draws it from --seed. No token is added, because Qwen3 has all that a
prompt needs.

Not in this file: how weights are renamed and loaded, which is in extra/hf.py.
"""
import argparse
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx                       # huggingface_hub depends on it, so it is installed
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import train_settings  # noqa: E402
from data import Processor, processor_settings  # noqa: E402
from model import VISION, VLM, UserError, VisionConfig, read_json  # noqa: E402
from extra.hf import from_hf, layout, load_weights, read_config, save_model  # noqa: E402
from extra.plan import part_table  # noqa: E402
from table import sha256  # noqa: E402

WANTED = re.compile('|'.join([               # the files of a repository that are fetched
    r'config\.json',
    r'generation_config\.json',
    r'tokenizer(_config)?\.json',
    r'chat_template\.\w+',
    r'(pre)?processor_config\.json',
    r'video_preprocessor_config\.json',
    r'added_tokens\.json',
    r'special_tokens_map\.json',
    r'vocab\.json',
    r'merges\.txt',
    r'[\w.-]*\.safetensors(\.index\.json)?',
]))


# --------------------------------------------------------------------------------------------------
# Fetching

def has_safetensors(info):
    return any(file.rfilename.endswith('.safetensors') for file in info.siblings)


def find_release(source):
    """What the hub says of a repository, in a revision that has safetensors.

    Where a release has pickles only, the hub's robot SFconvertbot offers safetensors in a pull
    request. That is taken then, because some of them are never merged, as CLIP-L/336's.
    """
    hub = HfApi()
    info = hub.model_info(source, files_metadata=True)
    if has_safetensors(info):
        return info
    offers = hub.get_repo_discussions(
        source, author='SFconvertbot', discussion_type='pull_request')
    for offer in offers:
        revision = offer.git_reference
        info = hub.model_info(source, revision=revision, files_metadata=True)
        if has_safetensors(info):
            print(f'{source} has pickles only; taking the safetensors of {revision} '
                  'by SFconvertbot')
            return info
    raise UserError(f'{source} has no safetensors; pickles are not opened here. '
                    'Name a copy that has, or a folder')


def fetch(source):
    """A folder with the wanted files of a hub repository. If `source` is a folder, it is returned.

    Raises UserError if the hub cannot be reached or a file is not what it lists.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        info = find_release(source)
        files = [file for file in info.siblings if WANTED.fullmatch(file.rfilename)]
        gigabytes = sum(file.size or 0 for file in files) / 1e9
        print(f'{source}: {len(files)} of {len(info.siblings)} files, {gigabytes:.2f} GB')
        for file in files:
            path = Path(hf_hub_download(source, file.rfilename, revision=info.sha))
            # The hub lists check sums of large files only (LFS).
            if file.lfs and sha256(path) != file.lfs.sha256:
                raise UserError(f'{path} is not what the hub lists (its check sum differs). '
                                'Remove it and run this again')
    except (HfHubHTTPError, httpx.HTTPError) as e:
        first_line = str(e).splitlines()[0]
        raise UserError(f'{source}: {first_line}') from None
    return path.parent


# --------------------------------------------------------------------------------------------------
# A model of two released parts

def combined_config(vision, language, args):
    """The Config of a vision tower and a decoder, from the config.json in their folders."""
    tower = read_json(vision / 'config.json')
    tower = tower.get('vision_config') or tower        # of a model with both towers
    text = read_json(language / 'config.json')
    kind = tower.get('model_type')
    if not kind:                                       # old releases do not say
        is_siglip = 'siglip' in str(args.vision).lower()
        kind = 'siglip_vision_model' if is_siglip else 'clip_vision_model'

    # LLaVA is the layout in transformers that is made of these two parts. As in LLaVA, features
    # come from the last layer but one of CLIP; those of SigLIP come from its last layer.
    llava = {
        'model_type': 'llava',
        'text_config': text,
        'vision_config': {**tower, 'model_type': kind},
        'vision_feature_layer': -1 if 'siglip' in kind else -2,
    }
    config = from_hf(llava, f'{vision} and {language}')
    vision_config = config.vision
    if args.vision in VISION:                          # a tower that model.py lists has its own
        vision_config = VisionConfig(**VISION[args.vision])
    if args.recipe == 'molmo2':
        vision_config = replace(vision_config, feature_layers=(-3, -9))
    is_tied = text.get('tie_word_embeddings', False)
    language_config = replace(config.language, tie_word_embeddings=is_tied)
    return replace(config, recipe=args.recipe, vision=vision_config, language=language_config,
                   connector=args.connector, connector_size=0, pooling=args.pooling)


def load_part(model, part, folder):
    """Loads the parameters whose names start with `part` and prints how many there are.

    `part` is a prefix or a tuple of them. load_weights raises UserError unless it finds each.
    """
    expected = 0
    for name, parameter in model.named_parameters():
        if name.startswith(part):
            expected += parameter.numel()
    load_weights(model, folder, only=part)
    print(f'{folder}: {expected:,} parameters expected, {expected:,} found')


def combine(args):
    """Writes a checkpoint of a tower, a new connector and a decoder. Returns the model."""
    vision = fetch(args.vision)
    language = fetch(args.language)
    config = combined_config(vision, language, args)
    settings = {**train_settings(), 'pooling': args.pooling}
    settings['image_size'] = args.image_size or config.vision.image_size
    processor = Processor(language, patch_size=config.vision.patch_size,
                          **processor_settings(settings))

    # The model is made on the meta device, without memory, because PyTorch's own initialization
    # would be overwritten by init_weights. set_buffers computes the constants, which no file has.
    with torch.device('meta'):
        model = VLM(replace(config, **processor.token_ids()))
    model.to_empty(device='cpu')
    model.set_buffers()
    model.init_weights(args.seed)
    load_part(model, 'vision_tower.', vision)
    load_part(model, ('language_model.', 'lm_head.'), language)
    save_model(model, args.out)
    processor.save(args.out)
    return model


def copy_molmo2(args):
    """Copies a released Molmo2 if its weights fit the model, which is returned without them."""
    source = fetch(args.molmo2)
    # On the meta device every tensor is read and compared, and none is kept in memory.
    with torch.device('meta'):
        model = VLM(read_config(source))
    load_part(model, '', source)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if WANTED.fullmatch(path.name):
            shutil.copyfile(path, args.out / path.name)
    return model


# --------------------------------------------------------------------------------------------------
# The command

def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--vision', default='openai/clip-vit-large-patch14-336',
                        help='The vision tower is this CLIP or SigLIP of the hub, or a folder.')
    parser.add_argument('--language', default='Qwen/Qwen3-0.6B',
                        help='The decoder is this dense Qwen3 of the hub, or a folder.')
    parser.add_argument('--molmo2',
                        help='This released Molmo2 is copied as it is, instead of combining parts.')
    parser.add_argument('--out', required=True, type=Path,
                        help='The checkpoint is written into this folder.')
    parser.add_argument('--recipe', choices=['nano', 'molmo2'], default='nano',
                        help='Prompts, masks and embeddings are ours (nano) or as in Molmo2.')
    parser.add_argument('--connector', choices=['linear', 'mlp', 'molmo2'], default='linear',
                        help='The connector between tower and decoder is of this kind.')
    parser.add_argument('--pooling', type=int, default=2,
                        help='A window of so many patches a side becomes one token.')
    parser.add_argument('--image-size', type=int, default=0,
                        help="Pictures have so many pixels a side; 0 takes the tower's size.")
    parser.add_argument('--seed', type=int, default=1337,
                        help='The new connector is drawn from this seed.')
    return parser.parse_args()


def main():
    args = parse_arguments()
    if (args.out / 'config.json').exists():
        raise UserError(f'{args.out} has a checkpoint already; name another folder')
    model = copy_molmo2(args) if args.molmo2 else combine(args)
    print('\n'.join(part_table(model)))
    architecture = layout(model.config)
    if architecture:
        print(f'{args.out} opens in transformers as {architecture}')
    else:
        print(f'{args.out} opens here only: no native architecture expresses it')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:             # a mistake of the user, which is one line
        sys.exit(f'error: {e}')
