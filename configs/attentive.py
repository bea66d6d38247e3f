"""An attentive probe: one learned query gathers from the tokens of a frozen encoder, and a linear layer classifies.

    python main.py --config=configs/attentive.py --config.checkpoint=runs/mae_mto

The head is that of AIM (arXiv 2401.08541); the training is this project's choice. `:quickstart` is for a checkpoint of
configs/quickstart.py.
"""

from configs import base
from configs.quickstart import evaluated


def get_config(argument: str = ''):
    if argument not in ('', 'quickstart'):
        raise ValueError(f'unknown config argument {argument!r}; it must be quickstart or left out')
    c = base.evaluation('probe')
    c.probe.head = 'attentive'
    c.epochs, c.batch_size, c.probe.group = 90.0, 1024, 1024
    c.optim.base_lr, c.optim.b2, c.optim.weight_decay, c.optim.warmup_epochs = 2.5e-4, 0.999, 0.05, 5.0
    c.data.crop_area = (0.08, 1.0)
    c.eval.every_epochs = 10.0
    if argument == 'quickstart':
        c = evaluated(c)
        c.probe.heads, c.probe.group, c.batch_size, c.optim.base_lr = 4, 128, 128, 2e-3
        c.log_every, c.checkpoints.every = 100, 350
    return c
