"""Weights to convert: small models with every parameter redrawn."""

import jax
import numpy as np

from configs import bootmae, conmim, mae, simmim
from mto_jax import methods
from mto_jax.config import get_config
from mto_jax.exchange.model import Weights, encoder_alone
from tests.conftest import randomised

CONFIGS = {'mae': mae, 'simmim': simmim, 'bootmae': bootmae, 'conmim': conmim}


def weights(rng, name, **fields):
    """A method's, two blocks deep, for 32 x 32 pixels in patches of 8; `fields` are set last, with __ for a dot."""
    c = CONFIGS[name].get_config()
    c.data.image_size, c.model.dtype = (32, 32), 'float32'
    c.model.depth, c.model.width, c.model.heads, c.model.patch_size = 2, 32, 4, 8
    c.mae.decoder_depth, c.mae.decoder_width, c.mae.decoder_heads = 2, 16, 2
    c.conmim.hidden, c.conmim.out = 24, 8
    c.bootmae.decoder_width, c.bootmae.block_patches, c.bootmae.block_area = 20, 8, (2, 5)
    c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
    shapes = jax.eval_shape(methods.build(c).init, jax.random.key(0))[0]
    return Weights(c, jax.tree.map(np.asarray, randomised(shapes, rng)))


def encoder(rng, name='mae', pool='', classes=7, **fields):
    """The same without what pre-trains it, and with a head where `pool` says what it sees."""
    found = encoder_alone(weights(rng, name, **fields))
    if not pool:
        return found
    found.config.data.num_classes, found.config.classify.pool = classes, pool
    kernel = rng.normal(size=(found.config.model.width, classes)).astype(np.float32)
    head = {'kernel': kernel, 'bias': rng.normal(size=classes).astype(np.float32)}
    return Weights(found.config, found.params, head, pool)


def images(rng, weights, count=3):
    """Normalised images, float32 (count, H, W, C)."""
    d = weights.config.data
    return rng.normal(size=(count, *d.image_size, d.channels)).astype(np.float32)


def layers(weights, x):
    """The tokens after each block, the first of them before any, and after the final norm."""
    depths = (*range(weights.config.model.depth + 1), None)
    return [np.asarray(t) for t in weights.method.encode(weights.params, x, depth=depths)]


def logits(weights, x):
    """Of a classifier, by the objective that trains one."""
    from mto_jax.training.classify import Classification

    d = weights.config.data
    objective = Classification(weights.method, d.num_classes, d.mean, d.std, False, pool=weights.pool)
    return np.asarray(objective.logits(weights.classifier, x))


def assert_same(a: Weights, b: Weights):
    """Bit by bit."""
    mine, theirs = a.flat(), b.flat()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype == np.float32, name
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert a.pool == b.pool
    assert get_config().keys() == b.config.keys()


# What else shapes the encoders that are compared.
SIZES = {
    'plain': {},
    'other_sizes': {
        'model__width': 24,
        'model__heads': 3,
        'model__mlp_ratio': 2.5,
        'model__depth': 3,
        'data__image_size': (24, 24),
    },
    'wide_image': {'data__image_size': (16, 48)},
    'large_eps': {'model__norm_eps': 1e-3},
    'grey': {'data__channels': 1, 'data__mean': (0.3,), 'data__std': (0.4,)},
    'learned': {'model__position': 'learned'},
    'rows_first': {'model__position': 'sincos_rows'},
    'nowhere': {'model__position': 'none'},
    'no_biases': {'model__qkv_bias': ''},
}
