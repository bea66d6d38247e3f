"""Bad input, a line each: what is given, and what the message must say. Nothing may have been trained or written."""

import numpy as np
import pytest
from PIL import Image

from configs import base, bootmae, bootmae_mto, conmim, conmim_mto, mae, mae_mto, quickstart, simmim, simmim_mto
from configs import report as report_config
from mto_jax import tasks
from mto_jax.config import FIELDS, check
from mto_jax.data import sources
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.tasks import pretrain, train


@pytest.fixture
def fails(config, tmp_path, monkeypatch):
    """Runs the changed config and returns the message."""

    def reached(*_):
        raise AssertionError('it began to train')

    monkeypatch.setattr(train, 'run', reached)
    monkeypatch.setattr(features, 'collect', reached)
    config.mto.enabled, config.mto.w_r, config.mto.initial_blocks = True, 0.1, 1

    def run(changes):
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError) as e:
            tasks.run(config, tmp_path / 'w')
        assert not list((tmp_path / 'w').glob('*'))
        return str(e.value)

    return run


ALONE = {
    'seed': 2**32,
    'compare.seeds': (0, 2**63),
    'study.seeds': (-1,),
    'data.image_size': (28.0, 28.0),
    'data.channels': 0,
    'data.num_classes': 0,
    'data.crop': 'centre',
    'data.crop_area': (0.5, 0.2),
    'data.crop_aspect': (2.0, 1.0),
    'data.interpolation': 'nearest',
    'data.resize': 'gpu',
    'data.eval_resize': -1,
    'data.mean': (0.1, 0.2),
    'data.std': (72.9,),
    'data.shuffle_buffer': 0,
    'data.on_error': 'ignore',
    'data.threads': -1,
    'data.randaugment': 'rand-x9',
    'data.mask_offset': -1,
    'data.ignore_label': 256,
    'model.depth': -1,
    'model.patch_size': 0,
    'model.mlp_ratio': 0.0,
    'model.layer_scale': -1.0,
    'model.drop_path': 1.5,
    'model.size': 'xxl',
    'model.position': 'rotary',
    'model.init': 'zeros',
    'model.qkv_bias': 'kq',
    'model.dtype': 'float8',
    'model.attention': 'flash',
    'mask_ratio': 1.0,
    'mae.decoder_depth': 0,
    'simmim.mask_unit': 0,
    'conmim.group': 0,
    'conmim.momentum': 1.1,
    'conmim.temperature': 0.0,
    'conmim.blur_radius': (2.0, 0.1),
    'bootmae.decoder_depth': 0,
    'bootmae.decoder_width': 0,
    'bootmae.block_patches': 0,
    'bootmae.block_area': (9, 3),
    'bootmae.block_aspect': 0.0,
    'bootmae.feature_weight': -1.0,
    'bootmae.feature_warmup': 0.0,
    'bootmae.ema_milestones': (1.5,),
    'bootmae.ema_rates': (2.0,),
    'mto.recalibration': 'soft',
    'mto.rows': 'some',
    'mto.affinity': 'cosine',
    'mto.measure': 'variance',
    'mto.margin': -0.5,
    'mto.warmup': 2.0,
    'mto.w_e': -1.0,
    'mto.blocks': (7,),
    'mto.initial_blocks': 9,
    'batch_size': 0,
    'accumulate': 0,
    'epochs': float('inf'),
    'optim.name': 'sgd',
    'optim.trust_coefficient': 0.0,
    'optim.base_lr': -1.0,
    'optim.b1': 1.0,
    'optim.b2': 1.5,
    'optim.eps': 0.0,
    'optim.weight_decay': -0.1,
    'optim.clip_norm': -1.0,
    'optim.lr_reference': -1,
    'optim.schedule': 'step',
    'optim.layer_decay': 0.0,
    'optim.warmup_epochs': 9.0,
    'optim.decay_epochs': (0.0,),
    'optim.decay_factor': -0.1,
    'optim.min_lr': 1.0,
    'optim.warmup_lr': -1e-6,
    'log_every': 0,
    'diagnose_every': -1,
    'log_images': 0,
    'checkpoints.keep': 0,
    'checkpoints.every': -1,
    'eval.features': 'max',
    'eval.depth': 9,
    'eval.depths': (1.5,),
    'classify.pool': 'max',
    'classify.smoothing': 1.0,
    'classify.mixup': -1.0,
    'classify.mix_prob': 1.5,
    'classify.erase': -0.1,
    'classify.ema': 1.0,
    'probe.head': 'mlp',
    'probe.pool': 'max',
    'probe.heads': -1,
    'probe.group': 0,
    'eval.batch_size': 0,
    'eval.knn_k': ('a',),
    'eval.knn_temperature': 0.0,
    'eval.linear_l2': (),
    'eval.every_epochs': -1.0,
    'finetune.label_share': 2.0,
    'hosts.coordinator': 'somewhere',
    'hosts.timeout': -1.0,
    'task': 'train',
    'method': 'maes',
}


@pytest.mark.parametrize(('field', 'value'), ALONE.items(), ids=ALONE)
def test_a_field_by_itself(fails, field, value):
    """The message names the field and the value, and says what it may be."""
    text = fails({field: value})
    assert text.startswith(field) or f'{field} ' in text
    assert repr(value).strip('()').rstrip(',') in text or field == 'data.mean'
    assert 'must' in text or 'has' in text or 'use ' in text or 'stack' in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'model.heads': 3}, 'model.width and model.heads'),
        ({'mae.decoder_heads': 3}, 'mae.decoder_width and mae.decoder_heads'),
        ({'model.patch_size': 5}, 'data.image_size: height 28'),
        ({'method': 'simmim', 'simmim.mask_unit': 3}, 'simmim.mask_unit'),
        ({'method': 'conmim', 'conmim.mask_unit': 3}, 'conmim.mask_unit'),
        (
            {'method': 'conmim', 'conmim.group': 12},
            'conmim.group is 12 images; it must divide the 32 images of a microbatch',
        ),
        ({'model.relative_bias': True}, 'model.relative_bias is True; it must be False'),
        (
            {'method': 'simmim', 'simmim.mask_unit': 1, 'mask_ratio': 0.93},
            '15 of 16 units are hidden; it must be 1 to',
        ),
        ({'mto.w_r': 1.0, 'mto.blocks': (0,)}, 'mto.w_r'),
        ({'mto.w_r': 0.0}, 'mto.enabled is True, but no part of it is set'),
        ({'task': 'compare', 'mto.w_r': 0.0}, 'mto.enabled is True, but no part of it is set'),
        ({'mto.w_r': float('nan')}, 'mto.w_r is nan; it must be finite'),
        ({'optim.name': 'lars', 'optim.layer_decay': 0.5}, "optim.layer_decay is 0.5; with optim.name='lars'"),
        ({'model.dtype': 'float16'}, "model.dtype is 'float16'; it must be one of"),
        ({'mto.recalibration': 'exclude', 'mto.exclude_blocks': 5}, 'mto.exclude_blocks is 5'),
        ({'eval.features': 'class', 'model.class_token': False}, 'model.class_token'),
        ({'batch_size': 131}, '1 to 130'),
        ({'epochs': 0.01}, 'epochs is less than half a step of the 4'),
        (
            {'eval.every_epochs': 0.1},
            'eval.every_epochs is 0.1, less than half a step of the 4 of an epoch; it must be',
        ),
        (
            {'optim.schedule': 'multistep', 'optim.decay_epochs': (700.0,)},
            'optim.decay_epochs has 700; it must be after',
        ),
        ({'optim.schedule': 'multistep', 'optim.decay_epochs': (0.5,)}, 'after the warm-up (0.5 epochs)'),
        ({'checkpoint': 'runs/l'}, '--config.init_from takes its weights'),
        ({'optim.schedule': 'multistep', 'optim.min_lr': 1e-6}, 'optim.min_lr is 1e-06, which is of the cosine alone'),
        ({'optim.schedule': 'multistep', 'optim.warmup_prefix': False}, 'with multistep it must be True'),
        ({'optim.schedule': 'multistep', 'optim.decay_epochs': (1.0, 1.1)}, 'fall on one of the 4 steps'),
        ({'epochs': None}, 'epochs is None; it must be'),
        ({'accumulate': 3}, 'accumulate'),
        ({'eval.batch_size': 30, 'mesh.data': 4}, 'eval.batch_size is 30'),
        ({'mesh.data': 3}, 'batch_size is 32'),
        ({'mesh.data': -1, 'mesh.fsdp': -1}, 'mesh'),
        ({'mesh.data': 5, 'mesh.fsdp': 2}, '8 cpu device'),
        ({'mesh.tensor': 3}, 'mesh.tensor is 3'),
        ({'allow_cpu': False}, 'allow_cpu'),
        ({'hosts.coordinator': 'here:1234', 'hosts.count': 2, 'hosts.index': 2}, 'hosts.index is 2'),
        (
            {'data.channels': 2, 'data.mean': (0.5,) * 2, 'data.std': (0.5,) * 2},
            'data.channels is 2; images are decoded',
        ),
        ({'data.image_size': (28,)}, 'data.image_size is (28,); it must be 2 values'),
        ({'epochs': 0.0}, 'epochs is 0.0; it must be above 0'),
        ({'seed': -1}, 'seed is -1; it must be'),
        ({'data.name': 'no_such_data'}, 'TFDS knows no data set of that name, and none is prepared in data'),
        ({'data.data_dir': 'no/where'}, "data.data_dir is 'no/where': no such folder, relative to /"),
        ({'data.name': 'imagenet2012'}, 'ILSVRC2012_img_train.tar'),
        ({'data.name': '', 'data.data_dir': 'data'}, 'dataset_info.json'),
        ({'data.name': 'folder', 'data.data_dir': '/no/where'}, 'no such folder'),
        ({'data.train_split': 'training'}, 'it has train, test'),
        ({'data.val_split': 'val', 'diagnose_every': 4}, 'it has train, test'),
        ({'data.train_split': 'train[:0]'}, 'empty'),
        ({'task': 'knn'}, 'checkpoint is'),
        ({'task': 'linear', 'checkpoint': '/no/where'}, 'checkpoint is'),
        ({'study.variants': {'baseline': {}}}, 'this config is of a study: python -m mto_jax.studies --config='),
        ({'task': 'compare', 'seed': 1}, 'seed is 1, which a comparison does not use'),
        ({'task': 'compare', 'compare.seeds': (1, 1)}, 'compare.seeds is (1, 1); it must be different values'),
        ({'task': 'compare', 'mto.rows': 'some'}, 'mto.rows'),
        ({'task': 'compare', 'mto.blocks': (7,)}, 'mto.blocks'),
        ({'task': 'compare', 'model.heads': 3}, 'model.heads'),
        ({'task': 'compare', 'batch_size': 131}, '1 to 130'),
        ({'task': 'compare', 'optim.warmup_epochs': 9.0}, 'optim.warmup_epochs'),
        ({'task': 'compare', 'data.test_split': 'validation'}, "no split 'validation'"),
        ({'task': 'compare', 'data.val_split': 'val', 'diagnose_every': 4}, "no split 'val'"),
        ({'task': 'compare', 'eval.features': 'class', 'model.class_token': False}, 'model.class_token'),
        ({'task': 'report'}, 'report.runs'),
        ({'task': 'report', 'report.runs': '/no/where'}, 'config.json'),
    ],
)
def test_fields_and_surroundings(fails, changes, words):
    assert words in fails(changes)


@pytest.fixture
def images(config, tmp_path, rng):
    """A folder of images with labelled, flat and odd splits, which the config names."""
    root, files = tmp_path / 'images', [f'train/{c}/{i}.png' for c in 'ab' for i in range(20)]
    files += [f'unlabeled/{i}.png' for i in range(40)] + [f'flat/{i}.png' for i in range(4)]
    files += ['val/a/1.png', 'val/b/1.png', 'tiny/images/1.png', 'tiny/val/1.png']
    for path in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(root / path)
    d = config.data
    d.name, d.data_dir, d.train_split, d.val_split, d.test_split = 'folder', str(root), 'train', 'val', 'val'
    config.optim.warmup_epochs = 0.0
    return config


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'data.val_split': 'flat'}, "the split 'flat' has no labels, which kNN during training (eval.every_epochs"),
        ({'data.val_split': 'val[:150%]'}, "the split 'val[:150%]' goes to 150%; it must be at most 100%"),
        ({'data.train_split': 'unlabeled'}, "the split 'unlabeled' has no labels, which kNN during training"),
        ({'data.val_split': 'tiny'}, "the split 'tiny' has classes that 'train' lacks: images, val. A class is"),
        ({'data.num_classes': 1}, 'data.num_classes is 1; train has 2 classes'),
        ({'task': 'compare', 'eval.every_epochs': 0.0, 'data.test_split': 'flat'}, 'which a comparison needs'),
    ],
    ids=['flat validation', 'beyond', 'unlabelled training', 'other classes', 'few classes', 'comparison'],
)
def test_first_evaluation_is_checked_at_the_start(images, fails, changes, words):
    assert words in fails({'eval.every_epochs': 1.0} | changes)


def test_pretraining_needs_no_labels(images):
    """STL-10's form, as long as nothing on the way needs them; a probe of it names labelled splits."""
    images.data.train_split, images.data.val_split, images.eval.every_epochs = 'unlabeled', 'flat', 0.0
    assert pretrain.plan(images).source.num_examples == 40
    sources.require_labels(images.data, 'knn', 'train', 'val')


@pytest.mark.parametrize('field', ['data.crop', 'model.dtype', 'optim.b1', 'finetune.optim.b1', 'eval.knn_k'])
def test_rules_hold_for_the_shipped_configs(field):
    """None of them breaks one; every rule is about a field that exists."""
    assert FIELDS[field].rule
    methods = (mae, mae_mto, simmim, simmim_mto, bootmae, bootmae_mto, conmim, conmim_mto)
    for c in (base, *methods, quickstart, report_config):
        check(c.get_config())
