"""MAE against Hugging Face's ViTMAEForPreTraining, SimMIM against a float64 numpy form, and the MTO hook in both."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mto_jax import losses, masking, methods, mto
from mto_jax.attention import Conditioning
from mto_jax.data import augment
from mto_jax.errors import UserError
from mto_jax.methods import simmim
from mto_jax.models import position, vit
from mto_jax.models.layers import Block
from mto_jax.training import job
from tests import toy_method
from tests.conftest import forward, randomised, shrink


def np_layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p['scale'] + p['bias']


def np_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_simmim(p, images, hidden, grid, patch, heads):
    """SimMIM written from its description, one image and one head at a time, in float64."""
    enc, (gh, gw) = p['encoder'], grid
    total, count, predictions = 0.0, 0, []
    for image, mask in zip(images, hidden, strict=True):
        patches = [
            image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
            for r in range(gh)
            for c in range(gw)
        ]
        x = np.stack(patches) @ enc['patch_embed']['kernel'] + enc['patch_embed']['bias']
        x[mask] = enc['mask_token'][0, 0]
        x = np.concatenate([enc['cls_token'][0], x])
        n = len(x)
        last = (2 * gh - 1) * (2 * gw - 1)
        bias = np.zeros((heads, n, n))
        for i in range(n):
            for j in range(n):
                if i and j:
                    dr, dc = (i - 1) // gw - (j - 1) // gw, (i - 1) % gw - (j - 1) % gw
                    row = (dr + gh - 1) * (2 * gw - 1) + dc + gw - 1
                else:
                    row = last + (2 if i == j == 0 else 0 if i == 0 else 1)
                bias[:, i, j] = enc['relative_bias_table'][row]
        for b in range(len(enc['blocks'])):
            q = enc['blocks'][f'block{b}']
            a, y, out = q['attn'], np_layer_norm(x, q['norm1']), []
            for h in range(heads):
                qi = y @ a['qkv_kernel'][:, 0, h] + a['q_bias'][h]
                ki = y @ a['qkv_kernel'][:, 1, h]
                vi = y @ a['qkv_kernel'][:, 2, h] + a['v_bias'][h]
                s = np.exp(qi @ ki.T / math.sqrt(qi.shape[1]) + bias[h])
                out.append(s / s.sum(-1, keepdims=True) @ vi)
            x = x + q['gamma_attn'] * (np.concatenate(out, -1) @ a['proj']['kernel'] + a['proj']['bias'])
            y = np_gelu(np_layer_norm(x, q['norm2']) @ q['mlp_in']['kernel'] + q['mlp_in']['bias'])
            x = x + q['gamma_mlp'] * (y @ q['mlp_out']['kernel'] + q['mlp_out']['bias'])
        y = np_layer_norm(x, enc['norm'])[1:] @ p['head']['kernel'] + p['head']['bias']
        predictions.append(y)
        total += np.abs(y - np.stack(patches))[mask].sum()
        count += mask.sum() * patches[0].size
    return np.stack(predictions), total / count


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_simmim_against_numpy(rng, dtype):
    from configs import simmim as simmim_config

    c = shrink(simmim_config.get_config())
    c.data.image_size, c.data.channels = (16, 24), 2
    c.data.mean, c.data.std = (0.5, 0.5), (0.5, 0.5)
    c.model.patch_size, c.model.drop_path, c.model.dtype, c.model.attention = 4, 0.0, dtype, ''
    method = methods.build(c)
    params = randomised(method.init(jax.random.key(1))[0], rng)
    images, noise = rng.normal(size=(3, 16, 24, 2)).astype(np.float32), rng.uniform(size=(3, 6)).astype(np.float32)
    out = jax.jit(lambda p, x, n: forward(method, p, x, noise=n))(params, images, noise)
    # The units with the least noise are hidden: 4 of 6, each of 2 x 2 patches.
    units = noise.argsort(1).argsort(1) < 4
    hidden = units.reshape(3, 2, 1, 3, 1).repeat(2, 2).repeat(2, 4).reshape(3, 24)
    np.testing.assert_array_equal(out.mask, hidden)
    p64 = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    predictions, loss = np_simmim(p64, images.astype(np.float64), hidden, (4, 6), 4, 2)
    tol = 1e-4 if dtype == 'float32' else 0.25
    np.testing.assert_allclose(out.predictions, predictions, atol=tol)
    assert float(out.losses['reconstruction']) == pytest.approx(loss, rel=1e-5 if dtype == 'float32' else 2e-2)


def test_attention_implementations_agree(config, rng):
    """jax's fused form and plain products, with a relative bias, give the same tokens."""
    config.method, config.mask_ratio = 'simmim', 0.5
    config.model.relative_bias, config.model.position = True, 'none'
    images = rng.normal(size=(4, 28, 28, 1)).astype(np.float32)
    tokens = {}
    for name in ('', 'xla'):
        config.model.attention = name
        method = methods.build(config)
        params = randomised(method.init(jax.random.key(0))[0], np.random.default_rng(0))
        tokens[name] = method.encode(params, images)
    np.testing.assert_allclose(tokens[''], tokens['xla'], atol=2e-5)


@pytest.mark.parametrize('name', ['mae', 'bootmae'])
def test_positions_are_added_in_the_residual_dtype(config, rng, name):
    """In the encoder and in decoders: bfloat16 would round the sums by up to a hundredth."""
    config.method, config.mask_ratio = name, 0.5
    config.model.dtype, config.model.residual_dtype = 'bfloat16', 'float32'
    method, seen = methods.build(config), []
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    params, state = method.init(jax.random.key(0))

    def keep(call, args, kwargs, context):
        if isinstance(context.module, vit.Transformer) and context.method_name == '__call__':
            seen.append((*args, context.module.arch))
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        method.loss(params, state, {'image': images}, jax.random.key(1), methods.Clock(jnp.int32(0), 1, 1))
    encoders, decoders = ([s for s in seen if (s[1].tokens is None) == none] for none in (True, False))
    assert len(decoders) == (1 if name == 'mae' else 2)
    for x, conditioning, arch in decoders:
        assert x.dtype == np.float32
        positions = position.sincos_2d(arch.grid, arch.width, rows_first=name == 'bootmae')
        added = (np.asarray(x) - np.asarray(conditioning.tokens, np.float32))[:, arch.num_prefix :]
        hidden = np.asarray(conditioning.masked)[:, arch.num_prefix :, None]
        where = hidden if name == 'bootmae' else np.ones_like(hidden)
        np.testing.assert_allclose(added, np.where(where, positions, 0), atol=1e-6)
    plain = methods.build(ConfigDict(config.to_dict() | {'model': config.model.to_dict() | {'position': 'none'}}))
    a = encoders[0][2]
    added = (method.encode(params, images, depth=0) - plain.encode(params, images, depth=0))[:, a.num_prefix :]
    positions = position.sincos_2d(a.grid, a.width, rows_first=a.position == 'sincos_rows')
    np.testing.assert_allclose(added, np.broadcast_to(positions, added.shape), atol=1e-6)


@pytest.mark.parametrize('name', ['mae', 'simmim'])
def test_reading_statistics_does_not_change_the_forward(config, rng, name):
    """MTO's losses without recalibration only look: the predictions are those of the plain method."""
    config.method, config.mask_ratio = name, 0.5
    images = rng.normal(size=(4, 28, 28, 1)).astype(np.float32)
    plain = methods.build(config)
    config.mto.enabled, config.mto.w_e, config.mto.w_r, config.mto.w_spa = True, 1.0, 1.0, 1.0
    watched = methods.build(config)
    params = plain.init(jax.random.key(0))[0]
    outs = [forward(m, params, images) for m in (plain, watched)]
    np.testing.assert_allclose(outs[0].predictions, outs[1].predictions, atol=2e-6)
    blocks = [next(iter(out.stacks.values())).blocks for out in outs]
    assert not blocks[0]
    assert sorted(blocks[1]) == [0, 1]


@pytest.mark.parametrize('name', ['mae', 'simmim'])
def test_exclusion_keeps_visible_tokens_clean(config, rng, name):
    """With g = 0 in all blocks, no masked token reaches a visible one: their gradient to the mask token is 0."""
    config.method, config.mask_ratio = name, 0.5
    config.mto.enabled, config.mto.recalibration, config.mto.exclude_blocks = True, 'exclude', -1
    method = methods.build(config)
    images = rng.normal(size=(4, 28, 28, 1)).astype(np.float32)
    params = randomised(method.init(jax.random.key(0))[0], rng)
    owner = 'decoder' if name == 'mae' else 'encoder'

    def side(token, hidden):
        moved = {**params, owner: {**params[owner], 'mask_token': token}}
        out = forward(method, moved, images)
        return jnp.where((out.mask == hidden)[..., None], out.predictions, 0.0).sum()

    token = params[owner]['mask_token']
    assert np.abs(jax.grad(side)(token, False)).max() == 0
    assert np.abs(jax.grad(side)(token, True)).max() > 0


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['mae', 'simmim'])
def test_initial_gradients_are_finite(config, name, dtype):
    """All of MTO at once, at initialisation, with a constant image among the images."""
    config.method, config.mask_ratio, config.model.dtype = name, 0.5, dtype
    config.mto.enabled, config.mto.recalibration = True, 'adaptive'
    config.mto.w_e, config.mto.w_r, config.mto.w_spa, config.mto.warmup = 1.0, 1.0, 1.0, 0.0
    method = methods.build(config)
    params = method.init(jax.random.key(0))[0]
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    images[0] = 0
    training = job.prepare(config, 130)
    arguments = {}, {}, {'image': images}, jax.random.key(0), training.clock(jnp.int32(4))
    value_and_grad = jax.jit(jax.value_and_grad(training.objective.loss, has_aux=True))
    (loss, _), grads = value_and_grad(params, *arguments)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', ['mae', 'simmim', 'conmim'])
def test_pictures_have_the_gates_of_their_step(config, rng, name):
    """Closed at the first step, where nothing visible reads a masked token; open from `open_until` on."""
    config.method, config.mask_ratio, config.conmim.mask_unit = name, 0.5, 1
    config.mto.enabled, config.mto.recalibration, config.mto.exclude_blocks = True, 'exclude', -1
    config.mto.open_until = 0.5
    opening, images = job.prepare(config, 130), rng.integers(0, 256, (4, 28, 28, 1), np.uint8)
    config.mto.open_until = 0.0
    closed = job.prepare(config, 130)
    params, model_state = opening.objective.init(jax.random.key(0))
    params = randomised(params, rng)

    def shown(training, step):
        clock = training.clock(jnp.int32(step))
        seen = training.objective.diagnose(params, model_state, images, jax.random.key(1), clock)
        return seen['images']['matched' if name == 'conmim' else 'reconstruction']

    first = shown(opening, 0)
    np.testing.assert_array_equal(first, shown(closed, 0))
    assert np.abs(first - shown(opening, opening.total)).max() > 1e-4


def test_reconstruction_is_unnormalised_with_the_patch_statistics(config, rng):
    """Predicting the target exactly must give back the pixels, also where the target is normalised."""
    method = methods.build(config)
    images = jnp.asarray(rng.normal(size=(2, 28, 28, 1)), jnp.float32)
    target = losses.normalize_patches(losses.patchify(images, 7))
    out = methods.Result({}, {}, predictions=target, mask=jnp.ones((2, 16), bool))
    pixels = losses.unpatchify(method.module.apply({}, out, images, method='to_pixels'), (4, 4), 7)
    np.testing.assert_allclose(pixels, images, atol=1e-5)


def test_normalised_target_by_hand():
    """1, 2, 3, 6: mean 3, unbiased variance 14 / 3."""
    got = losses.normalize_patches(jnp.array([[[1.0, 2.0, 3.0, 6.0]]]))
    np.testing.assert_allclose(got[0, 0], (np.array([1, 2, 3, 6]) - 3) / math.sqrt(14 / 3 + 1e-6), rtol=1e-6)


def test_sincos_by_hand():
    """Width 4: column sine, column cosine, row sine, row cosine, at frequency 1."""
    table = position.sincos_2d((2, 3), 4)
    r, c = 1, 2
    np.testing.assert_allclose(table[r * 3 + c], [np.sin(c), np.cos(c), np.sin(r), np.cos(r)], rtol=1e-6)


def test_initial_distributions_of_the_beit_family():
    """Normals cut at one deviation, not rescaled, and divided by sqrt(2 (l + 1)) in block l."""
    from configs import simmim as simmim_config

    c = shrink(simmim_config.get_config())
    c.model.width, c.model.depth = 128, 2
    p = simmim.build(c).init(jax.random.key(0))[0]['encoder']
    kernel = np.asarray(p['blocks']['block1']['mlp_in']['kernel'])
    assert np.abs(kernel).max() <= 0.02
    assert kernel.std() == pytest.approx(0.02 * 0.5396, rel=0.03)
    last = np.asarray(p['blocks']['block1']['mlp_out']['kernel'])
    assert last.std() == pytest.approx(0.02 * 0.5396 / 2, rel=0.03)
    assert not np.asarray(p['relative_bias_table']).any()
    assert 'k_bias' not in p['blocks']['block0']['attn']


def test_initial_distributions_of_mae(config):
    config.model.width, config.model.heads = 96, 4
    p = methods.build(config).init(jax.random.key(0))[0]['encoder']
    qkv = np.asarray(p['blocks']['block0']['attn']['qkv_kernel'])
    bound = math.sqrt(6 / (96 + 3 * 96))
    assert 0.98 * bound < np.abs(qkv).max() <= bound
    assert np.asarray(p['cls_token']).std() == pytest.approx(0.02, rel=0.35)


def test_drop_path_keeps_the_mean():
    from mto_jax.models.layers import DropPath

    out = DropPath(0.25).apply({}, jnp.ones((4000, 2, 3)), True, rngs={'dropout': jax.random.key(0)})
    dropped = np.asarray(out == 0)
    assert (dropped.all((1, 2)) | ~dropped.any((1, 2))).all()
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    assert float(out.max()) == pytest.approx(4 / 3)


def test_remat_changes_nothing(config, rng):
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    grads = []
    for remat in (False, True):
        config.model.remat, config.mto.enabled, config.mto.w_r = remat, True, 1.0
        method = methods.build(config)
        params = method.init(jax.random.key(0))[0]

        def loss(p, method=method):
            out = forward(method, p, images, train=True)
            return out.losses['reconstruction'] + mto.losses(method.mto, out.stacks['decoder'].blocks, 2)['r']

        grads.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *grads)


@pytest.mark.parametrize(
    ('path', 'value', 'word'),
    [
        ('method', 'nothing', 'method'),
        ('method', 'math', 'method'),
        ('mask_ratio', 0.99, 'mask_ratio'),
        ('model.size', 'xxl', 'model.size'),
        ('model.patch_size', 5, 'model.patch_size'),
        ('model.heads', 3, 'heads'),
        ('model.width', 18, 'model.width'),  # not divisible by 4
        ('mae.decoder_width', 18, 'mae.decoder_width'),
        ('model.position', 'x', 'model.position'),
        ('model.init', 'x', 'model.init'),
    ],
)
def test_bad_models_name_the_field(config, path, value, word):
    config.update_from_flattened_dict({path: value})
    with pytest.raises(UserError, match=word):
        methods.build(config)


def test_images_of_another_size_are_refused(config):
    method = methods.build(config)
    params = method.init(jax.random.key(0))[0]
    with pytest.raises(ValueError, match='built for images'):
        method.encode(params, jnp.zeros((1, 14, 14, 1)))


def test_mask_indices_reach_the_decoder(config, rng):
    """The tokens that enter the decoder are the mask token exactly where the mask says."""
    method = methods.build(config)
    params = method.init(jax.random.key(0))[0]
    noise = rng.uniform(size=(3, 16)).astype(np.float32)
    out = forward(method, params, rng.normal(size=(3, 28, 28, 1)).astype(np.float32), noise=noise)
    is_token = np.isclose(out.stacks['decoder'].embedded, params['decoder']['mask_token'], atol=1e-7).all(-1)
    np.testing.assert_array_equal(is_token, masking.random_masking(noise, 0.75).mask)
    assert vit.prefix_false(out.mask, 1).shape == (3, 17)


def test_cross_attention_against_numpy(rng):
    """A block with a memory of another width: self-attention, cross-attention, MLP, in float64."""
    block = Block(heads=2, qkv_bias='qv')
    x, memory = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (3, 7, 12)))
    seen = Conditioning(memory=jnp.asarray(memory))
    params = randomised(block.init(jax.random.key(0), x, seen, False)['params'], rng)
    got, _ = block.apply({'params': params}, x, seen, False)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def attend(a, queries, keys, kernels):
        q, k, v = (np.einsum('bnc,chd->bhnd', y, w) for y, w in zip((queries, keys, keys), kernels, strict=True))
        q, v = q + a['q_bias'][:, None], v + a['v_bias'][:, None]
        weights = np.exp(np.einsum('bhnd,bhmd->bhnm', q, k) / math.sqrt(q.shape[-1]))
        out = np.einsum('bhnm,bhmd->bnhd', weights / weights.sum(-1, keepdims=True), v)
        return out.reshape(*out.shape[:2], -1) @ a['proj']['kernel'] + a['proj']['bias']

    y = np_layer_norm(x, p['norm1'])
    want = x + attend(p['attn'], y, y, p['attn']['qkv_kernel'].swapaxes(0, 1))
    queries, keys = np_layer_norm(want, p['norm_queries']), np_layer_norm(memory, p['norm_memory'])
    kernels = p['cross_attn']['q_kernel'][:, 0], *p['cross_attn']['kv_kernel'].swapaxes(0, 1)
    want = want + attend(p['cross_attn'], queries, keys, kernels)
    y = np_gelu(np_layer_norm(want, p['norm2']) @ p['mlp_in']['kernel'] + p['mlp_in']['bias'])
    want = want + y @ p['mlp_out']['kernel'] + p['mlp_out']['bias']
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_taps_are_the_blocks_outputs(config, rng):
    """Of chosen blocks, before the final norm: what a shallower encoder ends with."""
    arch = methods.architecture(config)
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    encoder = vit.ViT(arch, taps=(0, 1))
    params = randomised(jax.jit(encoder.init)(jax.random.key(0), images)['params'], rng)
    out = jax.jit(encoder.apply)({'params': params}, images)
    assert sorted(out.taps) == [0, 1]
    for block, tokens in out.taps.items():
        shallow = jax.jit(functools.partial(encoder.apply, depth=block + 1))
        want = shallow({'params': params}, images).tokens
        np.testing.assert_allclose(tokens, want, atol=1e-5)


def test_views_share_the_flip(config, rng):
    """Each view is made of the same flipped images, with random numbers of its own, and then normalised."""
    config.method, config.data.flip = 'tests.toy_method', True
    pretraining = job.prepare(config, 130).objective
    images = rng.integers(64, 192, (32, 28, 28, 1), np.uint8)
    views = pretraining.views(images, jax.random.key(5))
    assert set(views) == {'image', 'strong'}
    plain = augment.normalize(images, config.data.mean, config.data.std)
    same = np.abs(views['image'] - plain).max((1, 2, 3)) < 1e-6
    np.testing.assert_allclose(views['image'][~same], plain[~same][:, :, ::-1], atol=1e-6)
    assert 4 < same.sum() < 28
    noise = (np.asarray(views['strong']) - np.asarray(views['image'])) * config.data.std[0]
    assert noise.std() == pytest.approx(0.1, rel=0.05)  # not the difference between an image and its mirror


@pytest.mark.parametrize('taken', ['loss', 'grad_norm', 'model_state_norm'])
def test_a_term_cannot_hide_another(config, monkeypatch, taken):
    """What every training logs keeps its name."""
    config.method = 'tests.toy_method'
    real = toy_method.Toy.loss

    def loss(self, *args, **named):
        result = real(self, *args, **named)
        return dataclasses.replace(result, losses={taken: result.losses['colour']})

    monkeypatch.setattr(toy_method.Toy, 'loss', loss)
    with pytest.raises(UserError, match=f'the term {taken!r} of a method'):
        job.prepare(config, 130)


def test_a_method_in_a_file_of_its_own(config, tmp_path, monkeypatch):
    """Next to main.py or on PYTHONPATH, named without a dot."""
    (tmp_path / 'my_method.py').write_text('from tests.toy_method import build\n')
    config.method = 'my_method'
    with pytest.raises(UserError, match=r'method is .my_method.: no module my_method; .* a file next to main\.py'):
        methods.build(config)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(methods.build(config), toy_method.Toy)
    (tmp_path / 'jaxx_method.py').write_text('import jaxx\n')
    config.method = 'jaxx_method'
    with pytest.raises(ModuleNotFoundError, match="named 'jaxx'"):
        methods.build(config)
    for config.method in ('', '.', 'a.b'):
        with pytest.raises(UserError, match=r'method is .*no module'):
            methods.build(config)


def test_weights_of_losses_count(config, rng):
    """The total is the weighted sum of the terms: the toy's feature loss counts half in the first epoch."""
    config.method = 'tests.toy_method'
    training = job.prepare(config, 130)
    params, model_state = training.objective.init(jax.random.key(0))
    batch, loss = {'image': rng.integers(0, 256, (8, 28, 28, 1), np.uint8)}, jax.jit(training.objective.loss)
    for step, weight in ((0, 0.5), (3, 0.5), (4, 1.0)):
        arguments = params, model_state, {}, batch, jax.random.key(1), training.clock(jnp.int32(step))
        total, (terms, _) = loss(*arguments)
        assert float(total) == pytest.approx(float(terms['colour'] + weight * terms['feature']), rel=1e-6)
        assert float(terms['feature_weight']) == weight
