"""MAE pre-training on ImageNet as its authors have it: 800 epochs, batch 4096.

python main.py --config=configs/mae.py            # ViT-B/16; mae.py:vit_l and mae.py:vit_h for the others

`:vit_ti` and `:vit_s` are smaller ones, for which the paper has no recipe.
"""

from configs import base

SIZES = {'vit_ti': 'ti', 'vit_s': 's', 'vit_b': 'b', 'vit_l': 'l', 'vit_h': 'h'}


def with_size(c, argument: str):
    """Set the model size that a config file's argument names ('vit_b'); ViT-H has patches of 14 pixels."""
    if argument not in SIZES:
        raise ValueError(
            f'unknown config argument {argument!r}; it must be one of {", ".join(SIZES)}; presets of MTO, like '
            'vit_b,tuned, are for the configs named *_mto'
        )
    c.model.size = SIZES[argument]
    c.model.patch_size = 14 if argument == 'vit_h' else 16
    return c


def get_config(argument: str = 'vit_b'):
    return with_size(base.get_config(), argument or 'vit_b')
