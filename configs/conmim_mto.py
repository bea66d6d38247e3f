"""ConMIM with masked token optimization on ImageNet, in half the epochs of configs/conmim.py.

python main.py --config=configs/conmim_mto.py     # conmim_mto.py:vit_l for the large model

MTO acts in the student's encoder, as in configs/simmim_mto.py, with the same weight, untuned for ConMIM.
Half the epochs is the paper's claim. Measured on small images only (docs/quickstart.md): no gain by either probe.
"""

from configs import conmim, simmim_mto


def get_config(argument: str = 'vit_b'):
    c = simmim_mto.with_mto(conmim.get_config(argument))
    c.epochs /= 2
    return c
