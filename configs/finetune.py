"""Fine-tuning of a pre-trained encoder on ImageNet, as the methods' official codes have it.

    python main.py --config=configs/finetune.py --config.checkpoint=runs/mae_mto

`:vit_b`, `:vit_l` and `:vit_h` are MAE's recipes; `:simmim_vit_b`, `:bootmae_vit_b`, `:bootmae_vit_l` and
`:conmim_vit_b` those of the others (smaller models have none: start from `:vit_b`); `:quickstart` is for a checkpoint
of configs/quickstart.py. The architecture, the pixels' mean and std, flips and the data come from the checkpoint's
config; what is set here, and every other training field, from here.
"""

from configs import base
from configs.quickstart import evaluated

# Read from facebookresearch/mae (FINETUNE.md), microsoft/SimMIM (configs), LightDXY/BootMAE (scripts) and
# TencentARC/ConMIM (README.md). Rates of `inclusive` recipes are absolute.
RECIPES = {
    'vit_b': {'base_lr': 5e-4, 'layer_decay': 0.65},
    'vit_l': {'epochs': 50.0, 'base_lr': 1e-3, 'layer_decay': 0.75, 'drop_path': 0.2},
    'vit_h': {'epochs': 50.0, 'base_lr': 1e-3, 'layer_decay': 0.75, 'drop_path': 0.3},
    'simmim_vit_b': {'batch_size': 2048, 'base_lr': 6.25e-4, 'layer_decay': 0.65, 'warmup': 20.0, 'clip_norm': 5.0},
    'bootmae_vit_b': {'batch_size': 2048, 'base_lr': 5e-3, 'layer_decay': 0.6, 'warmup': 20.0, 'ema': 0.9998},
    'bootmae_vit_l': {'epochs': 50.0, 'base_lr': 1.5e-3, 'layer_decay': 0.75, 'ema': 0.9998},
    'conmim_vit_b': {'base_lr': 4e-3, 'layer_decay': 0.65, 'warmup': 20.0},
}


def get_config(argument: str = 'vit_b'):
    argument = argument or 'vit_b'
    if argument == 'quickstart':
        return quickstart()
    if argument not in RECIPES:
        raise ValueError(f'unknown config argument {argument!r}; it must be quickstart or one of {", ".join(RECIPES)}')
    recipe = RECIPES[argument]
    c = base.evaluation('finetune')
    c.epochs, c.batch_size = recipe.get('epochs', 100.0), recipe.get('batch_size', 1024)
    o = c.optim
    o.base_lr, o.layer_decay, o.clip_norm = recipe['base_lr'], recipe['layer_decay'], recipe.get('clip_norm', 0.0)
    o.b2, o.warmup_epochs, o.min_lr, o.decay_cls_token = 0.999, recipe.get('warmup', 5.0), 1e-6, False
    if argument.startswith('simmim'):
        o.warmup_lr = 1.25e-7  # 2.5e-7 per 512 images, as the rate is 1.25e-3
        o.warmup_prefix = False
    if argument.startswith(('bootmae', 'conmim')):
        o.lr_reference, o.warmup_inclusive = 0, True
    if argument.startswith('conmim'):
        c.eval.weights = 'teacher'
    c.model.drop_path, c.classify.ema = recipe.get('drop_path', 0.1), recipe.get('ema', 0.0)
    c.data.crop_area, c.data.randaugment = (0.08, 1.0), 'rand-m9-mstd0.5-inc1'
    c.eval.every_epochs = 1.0
    return c


def quickstart():
    """Minutes on two cores, from a checkpoint of configs/quickstart.py: full images, flips, mild regularisation."""
    c = evaluated(base.evaluation('finetune'))
    c.batch_size, c.optim.min_lr = 128, 1e-6
    c.optim.base_lr, c.optim.layer_decay, c.optim.b2 = 2e-3, 0.75, 0.999
    c.classify.head_scale, c.classify.mixup, c.classify.cutmix, c.classify.erase = 0.01, 0.0, 0.0, 0.0
    c.log_every, c.checkpoints.every = 100, 350
    return c
