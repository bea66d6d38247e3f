"""Minutes on a laptop: a small model of one method, with and without MTO, on the bundled images; then probes.

    python main.py --config=configs/quickstart.py           # quickstart.py:simmim, :bootmae, :conmim for the others

The data are 10,000 + 2,000 images of Fashion-MNIST (28 x 28, grey), read by the code that reads ImageNet. MTO has the
preset `tuned`. It ends with a table of four rows. docs/quickstart.md has those of MAE, BootMAE and ConMIM over three
seeds, and how the settings of the last two were chosen.
"""

from configs import base, bootmae, conmim, presets, simmim


def small(c):
    """The bundled images, and a model and a rate that learn from them within minutes on two cores."""
    d = c.data
    d.name, d.data_dir = 'fashion_mnist_12k', 'data'
    d.train_split, d.val_split, d.test_split = 'train[:90%]', 'train[90%:]', 'test'
    d.image_size, d.channels, d.num_classes = (28, 28), 1, 10
    d.mean, d.std = (0.286,), (0.353,)
    d.crop, d.eval_resize = 'resize', 0
    c.model.size = 'nano'
    c.model.patch_size = 4
    c.model.dtype = 'float32'
    c.mae.decoder_depth, c.mae.decoder_width, c.mae.decoder_heads = 2, 64, 4
    c.mae.norm_pix_loss = False  # patches of 4 x 4 pixels are mostly flat: their own statistics are noise
    c.batch_size, c.allow_cpu = 128, True
    c.epochs = 15.0
    c.optim.base_lr = 3e-3
    c.optim.warmup_epochs = 2.0
    c.log_every, c.diagnose_every, c.checkpoints.every = 100, 350, 350
    c.eval.every_epochs = 5.0
    return c


def evaluated(c):
    """An evaluation that trains, from a checkpoint of this model: full images, on a CPU."""
    c.data.crop, c.data.val_split = 'resize', 'train[90%:]'
    c.model.dtype, c.allow_cpu = 'float32', True
    c.epochs, c.optim.warmup_epochs, c.eval.every_epochs = 10.0, 1.0, 2.0
    return c


def shorter(c):
    """Six epochs, for the methods whose steps cost several of MAE's: their teachers read every patch."""
    c.epochs, c.optim.warmup_epochs = 6.0, 1.0
    c.diagnose_every, c.checkpoints.every = 140, 140
    c.eval.every_epochs = 2.0
    return c


def small_simmim(c):
    """SimMIM at this size: single patches as masked units, since the grid of 7 x 7 has no other.

    Sine-cosine positions and MAE's initialisation: the official ones learn far more slowly here (docs/exploration.md).
    """
    c = small(c)
    c.simmim.mask_unit = 1
    c.model.drop_path, c.model.layer_scale, c.model.init = 0.0, 0.0, 'mae'
    c.model.position, c.model.relative_bias = 'sincos', False
    c.optim.schedule, c.optim.decay_epochs = 'cosine', ()
    # As in the runs of docs/exploration.md and docs/reference.md.
    c.optim.decay_cls_token, c.optim.warmup_lr, c.data.interpolation = True, 0.0, 'bicubic'
    return c


def small_conmim(c):
    """ConMIM at this size: single patches as masked units, a narrower projector, a blur that fits 28 pixels.

    Sine-cosine positions in addition to the relative ones, without which it learns too slowly here
    (docs/quickstart.md). The images are grey, so of the strong view's colour operations only brightness and contrast
    act.
    """
    c = shorter(small(c))
    c.conmim.mask_unit, c.mask_ratio = 1, 0.5
    c.conmim.hidden, c.conmim.out, c.conmim.blur_radius = 256, 64, (0.1, 0.5)
    c.model.layer_scale, c.model.init, c.model.position = 0.0, 'mae', 'sincos'
    return c


def small_bootmae(c):
    """BootMAE at this size: blocks for a grid of 7 x 7, and a teacher that moves fast enough for a thousand steps."""
    c = shorter(small(c))
    b = c.bootmae
    b.decoder_width, b.block_patches, b.block_area = 64, 30, (4, 15)
    b.norm_pix_loss, c.model.init, c.optim.min_lr = False, 'mae', 0.0  # as for MAE
    b.ema_milestones, b.ema_rates = (0.0, 1 / 3), (0.05, 0.01)
    return c


def get_config(method: str = 'mae'):
    builds = {
        'mae': lambda: small(base.get_config()),
        'simmim': lambda: small_simmim(simmim.get_config()),
        'bootmae': lambda: small_bootmae(bootmae.get_config()),
        'conmim': lambda: small_conmim(conmim.get_config()),
    }
    if method not in builds:
        raise ValueError(f'unknown config argument {method!r}; it must be one of {", ".join(builds)}')
    c = presets.with_mto(builds[method](), 'tuned')
    c.task = 'compare'
    return c
