"""A dense probe: a linear layer on the patch tokens of a frozen encoder labels every pixel; mIoU and pixel accuracy.

    python main.py --config=configs/dense.py --config.checkpoint=runs/mae_mto --config.data.name=folder \
        --config.data.data_dir=ade/images --config.data.mask=ade/annotations --config.data.mask_offset=1 \
        --config.data.train_split=training --config.data.val_split=validation --config.data.test_split=validation \
        --config.data.num_classes=150

`data.mask` names the label maps: a feature of a TFDS data set, or of a folder the folder that mirrors it with PNGs.
Logits are resized to the images' size and measured there; an evaluation image is resized to it without cropping.
"""

from configs import base


def get_config():
    c = base.evaluation('probe')
    c.probe.head = 'dense'
    c.epochs, c.batch_size, c.probe.group = 40.0, 64, 64
    c.optim.base_lr, c.optim.lr_reference, c.optim.b2 = 1e-3, 0, 0.999
    c.optim.weight_decay, c.optim.warmup_epochs = 1e-4, 1.0
    c.data.crop_area, c.data.eval_resize = (0.25, 1.0), 0
    c.eval.every_epochs, c.eval.batch_size = 5.0, 64
    return c
