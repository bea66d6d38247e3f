"""SimMIM with masked token optimization on ImageNet, in half the epochs of configs/simmim.py.

python main.py --config=configs/simmim_mto.py     # simmim_mto.py:vit_l for the large model
"""

from configs import mae_mto, simmim


def get_config(argument: str = 'vit_b'):
    c = mae_mto.with_mto(simmim.get_config(argument))
    c.epochs = 400.0
    c.optim.decay_epochs = (350.0,)
    return c
