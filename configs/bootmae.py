"""BootMAE pre-training on ImageNet as in its authors' scripts: 801 epochs, batch 4096 (ViT-B) or 2048 (ViT-L).

python main.py --config=configs/bootmae.py        # ViT-B/16; bootmae.py:vit_l for the large model

The scripts give images per GPU (256, 128); 16 of them make these batches. Other sizes take over what ViT-B has.
"""

from configs import mae


def get_config(argument: str = 'vit_b'):
    c = mae.get_config(argument)
    c.method = 'bootmae'
    c.data.mean, c.data.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    c.model.position = 'sincos_rows'
    c.model.qkv_bias = 'qv'
    c.model.init = 'bootmae'
    c.epochs = 801.0
    c.optim.warmup_inclusive = True
    c.optim.decay_cls_token = False
    c.optim.min_lr = 1e-4
    if c.model.size == 'l':
        c.batch_size = 2048
        c.optim.min_lr = 1e-5
        c.bootmae.ema_milestones, c.bootmae.ema_rates = (0.0, 100 / 801), (1e-3, 1e-4)
    return c
