"""ConMIM pre-training on ImageNet after its authors: batch 2048, 800 epochs of ViT-B/16 or 1600 of ViT-L/16.

python main.py --config=configs/conmim.py         # conmim.py:vit_l for the large model

They publish the command of ViT-L; ViT-B has its rate, warm-up, clipping, masks and batch, the code's default layer
scale, and half the epochs. Other sizes take over what ViT-B has. ViT-L keeps its residual stream in float32: a layer
scale of 1e-5 vanishes in bfloat16. The learning rate is absolute: it does not grow with the batch. The teacher is what
the authors fine-tune (--config.eval.weights=teacher).
"""

from configs import mae


def get_config(argument: str = 'vit_b'):
    c = mae.get_config(argument)
    c.method = 'conmim'
    c.data.crop_area = (0.08, 1.0)
    c.model.position = 'none'
    c.model.relative_bias = True
    c.model.qkv_bias = 'qv'
    c.model.layer_scale = 0.1
    c.model.init = 'beit'
    c.batch_size = 2048
    c.optim.base_lr = 7.5e-4
    c.optim.lr_reference = 0
    c.optim.b2 = 0.98
    c.optim.decay_cls_token = False
    c.optim.clip_norm = 1.0
    c.optim.warmup_epochs = 10.0
    c.optim.warmup_inclusive = True
    c.optim.min_lr = 1e-5
    if c.model.size == 'l':
        c.model.layer_scale, c.model.residual_dtype = 1e-5, 'float32'
        c.epochs = 1600.0
    return c
