"""BootMAE with masked token optimization on ImageNet, in half the epochs of configs/bootmae.py.

python main.py --config=configs/bootmae_mto.py    # ViT-B/16; bootmae_mto.py:vit_l for the large model

MTO's fields are those of configs/mae_mto.py, for here too the mask tokens are in decoders. They are this project's own
choice, not the paper's, and not tuned for BootMAE; half the epochs is the paper's claim. Measured on small images only
(docs/quickstart.md): no gain by linear probe, 2.8 points by kNN.
"""

from configs import bootmae, mae_mto


def get_config(argument: str = 'vit_b'):
    c = mae_mto.with_mto(bootmae.get_config(argument))
    c.epochs = 400.0
    return c
