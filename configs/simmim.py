"""SimMIM pre-training of ViT-B/16 on ImageNet as its authors have it: 800 epochs, batch 2048.

python main.py --config=configs/simmim.py         # simmim.py:vit_l for the large model
"""

from configs import mae


def get_config(argument: str = 'vit_b'):
    c = mae.get_config(argument)
    c.method = 'simmim'
    c.mask_ratio = 0.6
    c.data.crop_area = (0.67, 1.0)
    c.data.interpolation = 'bilinear'
    c.model.position = 'none'
    c.model.relative_bias = True
    c.model.qkv_bias = 'qv'
    c.model.layer_scale = 0.1
    c.model.drop_path = 0.1
    c.model.init = 'beit'
    c.batch_size = 2048
    c.optim.base_lr = 1e-4
    c.optim.lr_reference = 512
    c.optim.b2 = 0.999
    c.optim.decay_cls_token = False
    c.optim.clip_norm = 5.0
    c.optim.schedule = 'multistep'
    c.optim.warmup_epochs = 10.0
    c.optim.warmup_lr = 5e-7
    c.optim.decay_epochs = (700.0,)
    return c
