"""The flagship: MAE with masked token optimization on ImageNet, in half the epochs of configs/mae.py.

    python main.py --config=configs/mae_mto.py        # ViT-B/16; mae_mto.py:vit_l and mae_mto.py:vit_h for the others

MTO's fields are this project's own choice from small experiments, not the paper's (docs/method.md).
"""

from configs import mae


def with_mto(c):
    """Turn MTO on: masked keys come back with depth, L_e on the first blocks, L_r on the others."""
    c.mto.enabled = True
    c.mto.recalibration = 'ramp'
    c.mto.w_e = 0.1
    c.mto.w_r = 1.0
    return c


def get_config(argument: str = 'vit_b'):
    c = with_mto(mae.get_config(argument))
    c.epochs = 400.0
    return c
