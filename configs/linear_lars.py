"""The linear probe of the papers' tables: a linear layer on a frozen encoder, with LARS and augmented images.

    python main.py --config=configs/linear_lars.py --config.checkpoint=runs/mae_mto

As MAE's official code has it, for ViT-B; for larger ones 50 epochs (`--config.epochs=50`). The batch of 16384 may be
taken in microbatches of a multiple of 512 images, over which batch normalisation takes its statistics
(`--config.accumulate=32` on one device). `"--config.eval.depths=(8,10,12)"` trains a head at each of these depths at
once. `:quickstart` is for a checkpoint of configs/quickstart.py.
"""

from configs import base
from configs.quickstart import evaluated


def get_config(argument: str = ''):
    if argument not in ('', 'quickstart'):
        raise ValueError(f'unknown config argument {argument!r}; it must be quickstart or left out')
    c = base.evaluation('probe')
    c.epochs, c.batch_size = 90.0, 16384
    c.optim.name, c.optim.base_lr, c.optim.weight_decay, c.optim.warmup_epochs = 'lars', 0.1, 0.0, 10.0
    c.data.crop_area = (0.08, 1.0)
    c.eval.every_epochs = 10.0
    if argument == 'quickstart':
        c = evaluated(c)
        c.probe.pool, c.batch_size, c.optim.base_lr = 'mean', 512, 5.0
        c.log_every, c.checkpoints.every = 50, 90
    return c
