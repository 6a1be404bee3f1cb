"""Released weights -> a checkpoint folder to start from. Needs huggingface_hub: pip install '.[prepare]'.

    python prepare/weights.py --vision openai/clip-vit-large-patch14-336 --language Qwen/Qwen3-0.6B --out weights/start
    python prepare/weights.py --molmo2 allenai/Molmo2-4B --out weights/Molmo2-4B

Then train.py config/stage1.py --init_from=weights/start. Names are those of the hub, or folders. Only config, tokenizer and
safetensors are fetched, and compared with the check sums that the hub lists. The towers' sizes are those of their
config.json, so any CLIP or SigLIP tower and any dense Qwen3 will do. The connector starts at random, N(0, 1 / inputs) and
biases 0 (model.py, init_weights), from --seed. All special tokens are among those that Qwen3 has.
"""
import argparse
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx                       # huggingface_hub brings it
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import train_settings  # noqa: E402
from data import Processor, processor_settings  # noqa: E402
from model import VISION, VLM, UserError, VisionConfig, read_json  # noqa: E402
from extra.hf import from_hf, layout, load_weights, save_model  # noqa: E402
from extra.plan import part_table  # noqa: E402
from table import sha256  # noqa: E402

WANTED = re.compile(r'config\.json|generation_config\.json|tokenizer(_config)?\.json|chat_template\.\w+|'
                    r'(pre)?processor_config\.json|video_preprocessor_config\.json|added_tokens\.json|'
                    r'special_tokens_map\.json|vocab\.json|merges\.txt|[\w.-]*\.safetensors(\.index\.json)?')


def release(source):
    """What the hub says of a repository, or of the pull request in which the hub's robot offers safetensors for its pickles:
    CLIP-L/336's is never merged."""
    hub = HfApi()
    complete = lambda info: any(s.rfilename.endswith('.safetensors') for s in info.siblings)
    if complete(info := hub.model_info(source, files_metadata=True)):
        return info
    for offer in hub.get_repo_discussions(source, author='SFconvertbot', discussion_type='pull_request'):
        if complete(info := hub.model_info(source, revision=offer.git_reference, files_metadata=True)):
            print(f"{source} has pickles only; taking the safetensors of {offer.git_reference} by SFconvertbot")
            return info
    raise UserError(f"{source} has no safetensors; pickles are not opened here. Name a copy that has, or a folder")


def fetch(source):
    """A folder with the wanted files of a hub repository; a folder stays as it is."""
    if Path(source).is_dir():
        return Path(source)
    try:
        info = release(source)
        wanted = [s for s in info.siblings if WANTED.fullmatch(s.rfilename)]
        print(f"{source}: {len(wanted)} of {len(info.siblings)} files, {sum(s.size or 0 for s in wanted) / 1e9:.2f} GB")
        for s in wanted:
            path = Path(hf_hub_download(source, s.rfilename, revision=info.sha))
            if s.lfs and sha256(path) != s.lfs.sha256:
                raise UserError(f"{path} is not what the hub lists (its check sum differs). Remove it and run this again")
    except (HfHubHTTPError, httpx.HTTPError) as e:
        raise UserError(f"{source}: {str(e).splitlines()[0]}") from None
    return path.parent


def combined(name, vision, language, args):
    """The Config of a tower, a connector and a decoder, by the config.json of the two."""
    v, text = read_json(vision / 'config.json'), read_json(language / 'config.json')
    v = v.get('vision_config') or v
    kind = v.get('model_type') or ('siglip_vision_model' if 'siglip' in str(name).lower() else 'clip_vision_model')
    config = from_hf({'model_type': 'llava', 'text_config': text, 'vision_config': {**v, 'model_type': kind},
                      'vision_feature_layer': -1 if 'siglip' in kind else -2}, f'{vision} and {language}')
    tower = VisionConfig(**VISION[name]) if name in VISION else config.vision
    if args.recipe == 'molmo2':
        tower = replace(tower, feature_layers=(-3, -9))
    language = replace(config.language, tie_word_embeddings=text.get('tie_word_embeddings', False))
    return replace(config, recipe=args.recipe, vision=tower, language=language, connector=args.connector,
                   connector_size=0, pooling=args.pooling)


def found(model, part, folder):
    expected = sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))
    load_weights(model, folder, only=part)   # fills each of them or says which it cannot
    print(f'{folder}: {expected:,} parameters expected, {expected:,} found')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--vision', default='openai/clip-vit-large-patch14-336')
    parser.add_argument('--language', default='Qwen/Qwen3-0.6B')
    parser.add_argument('--molmo2', help='a released Molmo2, as it is')
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument('--recipe', choices=['nano', 'molmo2'], default='nano')
    parser.add_argument('--connector', choices=['linear', 'mlp', 'molmo2'], default='linear')
    parser.add_argument('--pooling', type=int, default=2)
    parser.add_argument('--image-size', type=int, default=0, help="pixels a side; 0: the tower's")
    parser.add_argument('--seed', type=int, default=1337)
    args = parser.parse_args()
    if (args.out / 'config.json').exists():
        raise UserError(f'{args.out} has a checkpoint already; name another folder')
    if args.molmo2:
        source = fetch(args.molmo2)
        with torch.device('meta'):           # every tensor is read, none is kept
            model = VLM(from_hf(read_json(source / 'config.json'), source / 'config.json'))
        found(model, '', source)
        args.out.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if WANTED.fullmatch(path.name):
                shutil.copyfile(path, args.out / path.name)
    else:
        vision, language = fetch(args.vision), fetch(args.language)
        settings = {**train_settings(), 'pooling': args.pooling}
        config = combined(args.vision, vision, language, args)
        settings['image_size'] = args.image_size or config.vision.image_size
        processor = Processor(language, patch_size=config.vision.patch_size, **processor_settings(settings))
        with torch.device('meta'):
            model = VLM(replace(config, **processor.token_ids()))
        model.to_empty(device='cpu')
        model.set_buffers()
        model.init_weights(args.seed)
        found(model, 'vision_tower.', vision)
        found(model, ('language_model.', 'lm_head.'), language)
        save_model(model, args.out)
        processor.save(args.out)
    print('\n'.join(part_table(model)))
    print(f"{args.out} opens in transformers as {layout(model.config)}" if layout(model.config) else
          f'{args.out} opens here only: no native architecture expresses it')


if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'error: {e}')
