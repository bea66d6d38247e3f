"""Hyper-parameters of the quickstart's BootMAE and ConMIM, compared on the bundled validation images, in memory.

    python -m mto_jax.studies --config=configs/study_quickstart.py:bootmae       # or :conmim

`baseline` is what configs/quickstart.py has but for its epochs; each other variant changes one thing.
"""

from configs import presets, quickstart
from configs.study_simmim import mto, rate


def bootmae(c):
    c.study.variants = {
        'baseline': {},
        'official initialisation': {'model': {'init': 'bootmae'}},
        'normalised target': {'bootmae': {'norm_pix_loss': True}},
        'rate 5e-4': {'optim': rate(c, 5e-4)},
        'rate 3e-3': {'optim': rate(c, 3e-3)},
        'ratio 60%': {'mask_ratio': 0.6, 'bootmae': {'block_patches': 24}},
        'pixels alone': {'bootmae': {'feature_weight': 0.0}},
        'slower teacher': {'bootmae': {'ema_rates': (0.01, 0.002)}},
        'mto': mto(**presets.TUNED['bootmae']),
    }
    return c


def conmim(c):
    c.study.variants = {
        'baseline': {},
        'rate 1e-3': {'optim': {'base_lr': 1e-3}},
        'rate 6e-3': {'optim': {'base_lr': 6e-3}},
        'ratio 75%': {'mask_ratio': 0.75},
        'temperature 20%': {'conmim': {'temperature': 0.2}},
        'relative positions': {'model': {'position': 'none'}},
        'faster teacher': {'conmim': {'momentum': 0.98}},
        'mto': mto(**presets.TUNED['conmim']),
    }
    return c


def get_config(method: str):
    stages = {'bootmae': bootmae, 'conmim': conmim}
    if method not in stages:
        raise ValueError(f'method is {method!r}; it must be bootmae or conmim')
    c = quickstart.get_config(method)
    c.mto.enabled = False
    c.study.budgets, c.study.evaluations = (4.0,), 1
    return stages[method](c)
