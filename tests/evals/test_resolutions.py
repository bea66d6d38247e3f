"""Evaluations at other image sizes than the encoder was trained for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, finetune, knn
from configs import conmim as conmim_config
from configs import simmim as simmim_config
from mto_jax import methods, tasks
from mto_jax.errors import UserError
from mto_jax.models import position, vit
from mto_jax.tasks import pretrain, supervised
from tests.conftest import NOWHERE, randomised, shrink


def cubic(t):
    """Keys' kernel with a = -0.5."""
    t = np.abs(t)
    inner, outer = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, inner, np.where(t < 2, outer, 0))


def weights(old, new):
    """(new, old): how much each old value counts for each new one; wider where it shrinks."""
    scale = max(old / new, 1)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    w = cubic((centres[:, None] - np.arange(old)) / scale)
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize(('old', 'new'), [((4, 3), (7, 3)), ((6, 8), (3, 11)), ((14, 14), (24, 16))])
def test_tables_against_numpy(rng, old, new):
    """Bicubic over rows and columns; what belongs to the class token stays."""
    table = rng.normal(size=(1, 1 + old[0] * old[1], 5))
    got = np.asarray(position.resize_learned(jnp.asarray(table, jnp.float32), old, new))
    rows, columns = weights(old[0], new[0]), weights(old[1], new[1])
    want = np.einsum('ai,bj,ijd->abd', rows, columns, table[0, 1:].reshape(*old, 5)).reshape(-1, 5)
    np.testing.assert_allclose(got[0, 1:], want, atol=2e-5)
    np.testing.assert_array_equal(got[0, :1], table[0, :1].astype(np.float32))

    sizes = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    table = rng.normal(size=(position.num_relative_distances(old), 3))
    got = np.asarray(position.resize_relative(jnp.asarray(table, jnp.float32), old, new))
    rows, columns = (weights(a, b) for a, b in zip(*sizes, strict=True))
    want = np.einsum('ai,bj,ijd->abd', rows, columns, table[:-3].reshape(*sizes[0], 3)).reshape(-1, 3)
    np.testing.assert_allclose(got[:-3], want, atol=2e-5)
    np.testing.assert_array_equal(got[-3:], table[-3:].astype(np.float32))
    assert len(got) == position.num_relative_distances(new)


@pytest.mark.peers
def test_learned_positions_against_torch(rng):
    torch = pytest.importorskip('torch', reason='torch is not installed (requirements-peers.txt)')
    table = rng.normal(size=(1, 14 * 14, 8)).astype(np.float32)
    for new in ((16, 24), (7, 10)):
        image = torch.tensor(table).reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
        want = torch.nn.functional.interpolate(image, new, mode='bicubic', antialias=True).permute(0, 2, 3, 1)
        got = position.resize_learned(jnp.asarray(table), (14, 14), new)
        np.testing.assert_allclose(got[0], want.reshape(-1, 8), atol=1e-4)


def test_an_offset_means_the_same_on_another_grid():
    """A bias that grows with the distance in images, as seen from the middle patch."""
    old, new = (8, 8), (16, 16)
    dy, dx = np.meshgrid(np.arange(-7, 8), np.arange(-7, 8), indexing='ij')
    table = np.concatenate([(dy + 2 * dx).reshape(-1, 1) / 8, np.zeros((3, 1))])
    got = np.asarray(position.resize_relative(jnp.asarray(table, jnp.float32), old, new))[:-3].reshape(31, 31)
    assert abs(got[15, 15]) < 1e-5
    steps = np.diff(got[10:21, 15])  # away from the borders
    np.testing.assert_allclose(steps, 15 / 31 / 8, rtol=0.02)


@pytest.mark.parametrize('fields', [{'position': 'learned'}, {'position': 'none', 'relative_bias': True}, {}])
def test_an_encoder_sees_other_images(rng, fields):
    """Its parameters fit the other size's encoder, and at its own size are left alone."""
    c = shrink(simmim_config.get_config())
    c.model.update({'dtype': 'float32', 'position': 'sincos', 'relative_bias': False} | fields)
    method = methods.build(c)
    params = randomised(jax.eval_shape(method.init, jax.random.key(0))[0], rng)['encoder']
    assert vit.resized(params, method.arch, method.arch) is params
    arch = dataclasses.replace(method.arch, image_size=(42, 21))
    other = dataclasses.replace(method, arch=arch)
    resized = vit.resized(params, method.arch, arch)
    tokens = other.encode({'encoder': resized}, jnp.asarray(rng.normal(size=(2, 42, 21, 1)), jnp.float32))
    assert tokens.shape == (2, 1 + 6 * 3, 16)
    init = vit.ViT(arch).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros((1, 42, 21, 1)), mask=jnp.ones((1, 18), bool)))
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(lambda s: s.shape, shapes['params'])


def test_knn_at_another_size(tmp_path):
    """Whole images brought to a larger, non-square size; the model's own is the checkpoint's."""
    c = shrink(base.get_config())
    c.model.dtype, c.model.position, c.epochs, c.optim.warmup_epochs = 'float32', 'learned', 0.25, 0.0
    pretrain.run(c, tmp_path / 'run')
    e = knn.get_config()
    e.checkpoint, e.mesh.data, e.eval.batch_size = str(tmp_path / 'run'), 1, 32
    own = tasks.run(e, tmp_path / 'own')
    e.data.image_size = (28, 28)
    assert tasks.run(e, tmp_path / 'same') == own
    e.data.image_size = (42, 35)
    assert 0 <= tasks.run(e, tmp_path / 'other')['knn_20'] <= 1
    e.data.image_size = (30, 28)
    with pytest.raises(UserError, match=r'height 30 is not a multiple of model\.patch_size 7'):
        tasks.run(e, tmp_path / 'wrong')


@pytest.mark.parametrize('from_scratch', [False, True])
def test_fine_tuning_at_another_size(tmp_path, from_scratch):
    """Of a ConMIM whose masked units do not fit the other grid, nor its groups the batch."""
    c = shrink(conmim_config.get_config())
    c.model.dtype, c.epochs, c.optim.warmup_epochs, c.conmim.group = 'float32', 0.25, 0.0, 32
    pretrain.run(c, tmp_path / 'run')
    e = finetune.get_config()
    e.checkpoint, e.data.val_split, e.data.image_size = str(tmp_path / 'run'), 'train[130:190]', (42, 21)
    e.batch_size, e.mesh.data, e.allow_cpu, e.classify.from_scratch = 24, 1, True, from_scratch
    e.eval.weights, e.optim.warmup_epochs = 'teacher', 0.5
    planned = supervised.plan(e, NOWHERE)
    with jax.set_mesh(planned.mesh):
        params = planned.fresh(planned.job.sharding(planned.mesh)).params
    images = jnp.zeros((2, 42, 21, 1))
    assert planned.job.objective.logits(params, images).shape == (2, 10)
