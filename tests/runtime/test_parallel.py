"""Meshes: what lies where, that every mesh trains as one device does, and that wrong ones are refused."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from configs import base
from mto_jax.errors import UserError
from mto_jax.runtime import parallel
from mto_jax.runtime.parallel import whole
from mto_jax.training import job, train_state
from mto_jax.training.train_state import Meter
from tests.conftest import named

STEPS = 20


def setup(config, method):
    """A model whose heads, units and width divide by what the meshes ask for; MTO on, with all its parts."""
    c = config
    c.method, c.mask_ratio, c.simmim.mask_unit, c.conmim.group = method, 0.5, 1, 8
    c.model.width, c.model.heads, c.mae.decoder_width, c.mae.decoder_heads = 64, 4, 32, 4
    c.mto.enabled, c.mto.recalibration, c.mto.w_e, c.mto.w_r, c.mto.w_spa = True, 'ramp', 0.1, 1.0, 0.1
    c.optim.eps = 1e-3  # above the rounding of the gradients: Adam would make full steps of it
    if method == 'bootmae':
        # The gradient of its pixels' one bias sums over them, which one device does one by one: 32 x 28 x 28 pixels
        # round it by 0.7e-6 of the largest (root mean square of 24 seeds), now and then by more than 1e-6.
        c.data.image_size, c.model.patch_size = (8, 8), 2
    c.epochs, c.optim.warmup_epochs, c.optim.base_lr, c.data.flip = STEPS / 4, 0.0, 1e-3, True
    return job.prepare(c, 130)


def trained(training, config, shape, images):
    """(gradients of step 1, losses of all steps, final parameters) on a mesh, as numpy, and the state itself."""
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        state = jax.jit(training.create, out_shardings=training.sharding(mesh), static_argnums=0)(0)
        key, step, losses = train_state.stream(0, 'train'), training.step(mesh), []
        for image in images:
            batch = parallel.put_batch({'image': image}, mesh)
            state, meter = step(state, Meter.empty(training.names), {}, batch, key)
            losses.append(float(meter.sums['loss']))
            if len(losses) == 1:  # Adam's first moments begin as the gradients times 1 - b1
                first = jax.tree.map(lambda m: m / (1 - config.optim.b1), parallel.fetch(adam(state).mu))
        return first, losses, parallel.fetch(state.params), state


def adam(state):
    """Of the chain: clipping, AdamW, layer decay."""
    return state.opt_state[1][0]


MIXED, REST = [(2, 2, 2)], [(8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 4, 2)]


@pytest.mark.parametrize(
    ('method', 'meshes'),
    [
        ('mae', MIXED),
        ('simmim', MIXED),
        pytest.param('mae', REST, marks=pytest.mark.slow),
        pytest.param('simmim', REST, marks=pytest.mark.slow),
        pytest.param('bootmae', MIXED + REST, marks=pytest.mark.slow),
        pytest.param('conmim', MIXED + REST, marks=pytest.mark.slow),
        pytest.param('tests.toy_method', MIXED + REST, marks=pytest.mark.slow),
    ],
)
def test_meshes_agree_with_one_device(config, rng, monkeypatch, method, meshes):
    """Step-1 gradients within 1e-6 of the largest, 20 losses within 1e-5, parameters within 1e-5.

    ConMIM's gradients agree to 5e-6 of the largest: in its batch normalisation sums cancel almost. Its ReLU is made
    smooth here: now and then a value lies so close to zero that rounding decides whether a gradient passes.
    """
    monkeypatch.setattr(nn, 'relu', nn.silu)
    tolerance = 5e-6 if method == 'conmim' else 1e-6
    training = setup(config, method)
    shape = (STEPS, config.batch_size, *config.data.image_size, config.data.channels)
    images = rng.integers(0, 256, shape, np.uint8)
    one = trained(training, config, (1, 1, 1), images)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(one[0]))
    for mesh in meshes:
        gradients, losses, params, state = trained(training, config, mesh, images)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), gradients, one[0])
        np.testing.assert_allclose(losses, one[1], rtol=1e-5)
        alone = named(one[2])
        for name, value in named(params).items():
            np.testing.assert_allclose(value, alone[name], rtol=0, atol=1e-5, err_msg=f'{mesh} {name}')
        check_shards(state, mesh)


def check_shards(state, mesh):
    """Parameters and both moments: large ones lie in parts on the devices, as many as the mesh says."""
    _, fsdp, tensor = mesh
    for tree in (state.params, adam(state).mu, adam(state).nu):
        blocks = tree['encoder']['blocks']['block0']
        for leaf, parts in (
            (blocks['mlp_in']['kernel'], fsdp * tensor),
            (blocks['mlp_in']['bias'], tensor),
            (blocks['attn']['qkv_kernel'], fsdp * tensor),
            (blocks['attn']['proj']['kernel'], fsdp * tensor),
            (blocks['norm1']['scale'], 1),
        ):
            shard = leaf.addressable_shards[0].data
            assert shard.nbytes * parts == leaf.nbytes, (mesh, leaf.shape, shard.shape)


BLOCK = 'encoder/blocks/block11'
TENSOR = {  # what a pair of devices on the axis 'tensor' splits of ViT-B, and of a cross-attention
    f'{BLOCK}/attn/qkv_kernel': ((768, 3, 12, 64), 2),
    f'{BLOCK}/attn/k_bias': ((12, 64), 0),
    f'{BLOCK}/attn/proj/kernel': ((768, 768), 0),
    f'{BLOCK}/attn/proj/bias': ((768,), None),
    f'{BLOCK}/cross_attn/q_kernel': ((768, 1, 12, 64), 2),
    f'{BLOCK}/cross_attn/kv_kernel': ((512, 2, 12, 64), 2),
    f'{BLOCK}/mlp_in/kernel': ((768, 3072), 1),
    f'{BLOCK}/mlp_in/bias': ((3072,), 0),
    f'{BLOCK}/mlp_out/kernel': ((3072, 768), 0),
    f'{BLOCK}/norm1/scale': ((768,), None),
    'encoder/relative_bias_table': ((732, 12), 1),
    'encoder/pos_embed': ((1, 197, 768), None),
    'encoder/patch_embed/kernel': ((768, 768), None),
    'lm_head/proj/kernel': ((512, 768), None),
    'projector/norm/mean': ((4096,), None),
    'projector/small/kernel': ((4, 4), None),
}


@pytest.mark.parametrize('prefix', ['params', 'opt_state/1/0/mu', 'model_state/teacher'])
def test_split_of_the_tensor_axis(prefix):
    shapes = {f'{prefix}/{path}': jax.ShapeDtypeStruct(shape, np.float32) for path, (shape, _) in TENSOR.items()}
    found = parallel.shardings(traverse_util.unflatten_dict(shapes, sep='/'), parallel.make_mesh(1, 1, 2))
    found = {path: sharding.spec for path, sharding in traverse_util.flatten_dict(found, sep='/').items()}
    assert found == {
        f'{prefix}/{path}': PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, 'tensor')
        for path, (_, axis) in TENSOR.items()
    }


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'model.position': 'learned'},
        {'method': 'simmim', 'model.position': 'none'},
        {'method': 'bootmae'},
        {'method': 'conmim', 'model.position': 'none', 'model.relative_bias': True},
    ],
)
def test_patterns_cover_the_shipped_methods(changes):
    """Blocks and heads as wide as ViT-B's: every large parameter and moment has a rule."""
    c = base.get_config()
    c.model.depth, c.mae.decoder_depth = 1, 1
    c.update_from_flattened_dict(changes)
    mesh = parallel.make_mesh(1, 1, 4)
    training = job.prepare(c, 10_000)
    state = training.sharding(mesh)
    blocks = state.params['encoder']['blocks']['block0']
    assert blocks['attn']['proj']['kernel'].spec == PartitionSpec('tensor')
    encoder = jax.eval_shape(training.create, 0).params['encoder']
    parallel.shardings({'encoder': encoder, 'head': {'kernel': jax.ShapeDtypeStruct((768, 1000), np.float32)}}, mesh)


@pytest.mark.parametrize('prefix', ['params', 'opt_state/1/0/nu', 'model_state/teacher'])
def test_a_large_parameter_without_a_rule_is_refused(prefix):
    path = f'{prefix}/projector/proj/kernel'
    tree = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct((64, 64), np.float32)}, sep='/')
    with pytest.raises(UserError, match=rf'mesh.tensor is 2; .* {path} \(64, 64\).*tensor_axes'):
        parallel.shardings(tree, parallel.make_mesh(1, 1, 2))
    parallel.shardings(tree, parallel.make_mesh(1, 2, 1))
    given = parallel.shardings(tree, parallel.make_mesh(1, 1, 2), ((r'.*/projector/proj/kernel', 1),))
    assert jax.tree.leaves(given)[0].spec == PartitionSpec(None, 'tensor')


def test_a_hosts_rows_make_up_the_batch():
    mesh = parallel.make_mesh(2, 2, 2)
    part = parallel.local_part(12, mesh)
    assert (part.rows == whole(12).rows).all()
    assert (part.share, part.shares) == (0, 1)
    x = np.arange(12 * 3).reshape(12, 3)
    placed = parallel.put_batch({'x': x}, mesh)['x']
    assert (parallel.fetch(placed) == x).all()
    assert placed.addressable_shards[0].data.shape == (3, 3)


@pytest.mark.parametrize(
    ('axes', 'words'),
    [
        ((3, -1, 1), 'mesh.data=3, mesh.fsdp=-1, mesh.tensor=1 does not fit the 8 cpu'),
        ((9, 1, 1), 'mesh.data=9.* 8 cpu'),
        ((-1, -1, 1), 'one of them may be -1'),
        ((0, 1, 1), 'positive number'),
        ((-1, 16, 1), 'must divide'),
    ],
)
def test_wrong_meshes_are_refused(axes, words):
    with pytest.raises(UserError, match=words):
        parallel.make_mesh(*axes)


def test_the_rest_of_the_devices():
    assert dict(parallel.make_mesh(-1, 2, 2).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
    assert dict(parallel.make_mesh(2, -1).shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}


def test_batch_and_heads_must_divide(config):
    with pytest.raises(UserError, match=r'batch_size is 34.*8 devices.*data \(4\).*fsdp \(2\)'):
        parallel.check_batch(34, 1, parallel.make_mesh(4, 2))
    training = setup(config, 'mae')
    with pytest.raises(UserError, match=r'mesh.tensor is 8; it does not divide the 4 heads.*attn'):
        training.sharding(parallel.make_mesh(1, 1, 8))
