"""BootMAE against a form of its own in float64, and against the figures of its official code."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bootmae as recipe
from mto_jax import losses, masking, methods
from mto_jax.errors import UserError
from mto_jax.methods import Clock, bootmae
from mto_jax.training import optim, schedules, train_state
from mto_jax.training.objective import Pretraining
from mto_jax.training.train_state import Meter
from tests.conftest import named, randomised
from tests.methods import test_parity as parity
from tests.training import test_train

# ---------------------------------------------------------------------------------------- the method, once more
# Written from the description alone, an image at a time, on named arrays: nothing of the package is used.


def ref_norm(x, p=None, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x if p is None else x * p['scale'] + p['bias']


def ref_dense(x, p):
    return x @ p['kernel'] + p['bias']


def ref_attention(p, x, memory=None):
    """Queries of x, keys and values of the memory or of x; biases for queries and values only."""
    if memory is None:
        memory, (q, k, v) = x, p['qkv_kernel'].swapaxes(0, 1)
    else:
        q, (k, v) = p['q_kernel'][:, 0], p['kv_kernel'].swapaxes(0, 1)
    queries = jnp.einsum('nc,chd->hnd', x, q) + p['q_bias'][:, None]
    keys, values = (jnp.einsum('mc,chd->hmd', memory, w) for w in (k, v))
    weights = jnp.exp(queries @ keys.swapaxes(1, 2) * q.shape[2] ** -0.5)
    out = weights / weights.sum(-1, keepdims=True) @ (values + p['v_bias'][:, None])
    return ref_dense(jnp.concatenate(list(out), -1), p['proj'])


def ref_block(p, x, memory=None):
    x = x + ref_attention(p['attn'], ref_norm(x, p['norm1']))
    if memory is not None:
        memory = ref_norm(memory, p['norm_memory'])
        x = x + ref_attention(p['cross_attn'], ref_norm(x, p['norm_queries']), memory)
    y = ref_dense(ref_norm(x, p['norm2']), p['mlp_in'])
    return x + ref_dense(y * 0.5 * (1 + jax.scipy.special.erf(y / math.sqrt(2))), p['mlp_out'])


def ref_positions(grid, width):
    """Rows in the first half of the features, columns in the second; sines, then cosines."""
    table = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            angles = [np.array([at / 10000 ** (i / (width / 4)) for i in range(width // 4)]) for at in (r, c)]
            table.append(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)]))
    return np.stack(table)


def ref_patches(image, patch):
    """(N, patch, patch, C) in reading order."""
    h, w, _ = image.shape
    return jnp.stack([image[r : r + patch, c : c + patch] for r in range(0, h, patch) for c in range(0, w, patch)])


def ref_encoder(p, patches, visible, grid):
    """After the norm, after the first block, and after the last, of the class token and the visible patches."""
    x = ref_dense(patches.reshape(len(patches), -1), p['patch_embed'])
    x = (x + ref_positions(grid, x.shape[1]))[visible]
    x = jnp.concatenate([p['cls_token'][0], x])
    outputs = []
    for i in range(len(p['blocks'])):
        x = ref_block(p['blocks'][f'block{i}'], x)
        outputs.append(x)
    return ref_norm(x, p['norm']), outputs[0], outputs[-1]


def ref_decoder(p, x, memory, visible, grid):
    """Patch tokens after the norm: mask tokens with positions where hidden, the projected visible ones without."""
    x = ref_dense(x, p['embed'])
    tokens = (p['mask_token'][0, 0] + ref_positions(grid, x.shape[1])).at[visible].set(x[1:])
    x = jnp.concatenate([x[:1], tokens])
    for i in range(len(p['blocks'])):
        x = ref_block(p['blocks'][f'block{i}'], x, memory)
    return ref_norm(x, p['norm'])[1:]


def ref_weights(mask, grid):
    """Hidden: 1 plus a ninth for each hidden patch of the 3 x 3 around it."""
    m = np.pad(mask.reshape(grid), 1).astype(float)
    near = [[m[r : r + 3, c : c + 3].sum() / 9 for c in range(grid[1])] for r in range(grid[0])]
    return (mask.reshape(grid) * (1 + np.array(near))).ravel()


def ref_bootmae(p, teacher, images, visible, weights, patch, normalised):
    """The losses of pixels and features (2,), and the pixel predictions.

    Args:
      visible: (B, K), which patches the encoder sees.
      weights: (B, N), of the patches; 0 where visible.
    """
    grid = images.shape[1] // patch, images.shape[2] // patch

    def one(image, visible, weights):
        patches = ref_patches(image, patch)
        x, first, last = ref_encoder(p['encoder'], patches, visible, grid)
        _, _, wanted = ref_encoder(teacher['encoder'], patches, np.arange(len(patches)), grid)
        pixels = ref_decoder(p['regressor'], x, first, visible, grid) @ p['pixel_head']['proj']['kernel']
        pixels = pixels.reshape(patches.shape) + p['pixel_head']['bias']
        features = ref_dense(ref_decoder(p['predictor'], x, last, visible, grid), p['feature_head'])
        mean, var = patches.mean((1, 2), keepdims=True), patches.var((1, 2), keepdims=True)
        of_pixels = (pixels - ((patches - mean) / jnp.sqrt(var + 1e-5) if normalised else patches)) ** 2
        of_features = (ref_norm(features) - ref_norm(wanted[1:])) ** 2
        errors = of_pixels.mean((1, 2, 3)), of_features.mean(1)
        return jnp.stack([(weights * e).mean() for e in errors]), pixels.reshape(len(patches), -1)

    losses, predictions = jax.vmap(one)(images, visible, weights)
    return losses.mean(0) / (weights > 0).mean(), predictions


@functools.partial(jax.jit, static_argnames=('patch', 'normalised'))
def ref_gradients(p, teacher, images, visible, weights, terms, patch=4, normalised=True):
    """((losses, predictions), gradient of `terms @ losses`)."""

    def total(p):
        losses, predictions = ref_bootmae(p, teacher, images, visible, weights, patch, normalised)
        return terms @ losses, (losses, predictions)

    grads, found = jax.grad(total, has_aux=True)(p)
    return found, grads


# --------------------------------------------------------------------------------------------------- and compared


OFF = {'bootmae.weight_patches': False, 'bootmae.norm_pix_loss': False}
SMALL = {
    # Three heads of a decoder 20 wide have 6 features each: 18 in all.
    'wide': {'data.image_size': (16, 24), 'data.channels': 2, 'model.depth': 2, 'bootmae.decoder_width': 20},
    'square': {'data.image_size': (20, 20), 'model.depth': 3, 'bootmae.decoder_depth': 2},
    'one block': {'data.image_size': (24, 8), 'data.channels': 1, 'model.depth': 1, **OFF},
}


def small(name='wide', **changes):
    c = recipe.get_config()
    c.model.patch_size, c.model.width, c.model.heads, c.model.mlp_ratio = 4, 24, 3, 2.0
    c.model.dtype, c.mask_ratio, c.bootmae.decoder_width, c.bootmae.decoder_depth = 'float32', 0.6, 16, 1
    c.bootmae.block_patches, c.bootmae.block_area = 6, (2, 4)
    c.batch_size, c.epochs, c.optim.warmup_epochs = 4, 8.0, 1.0
    c.update_from_flattened_dict(SMALL[name] | changes)
    channels = c.data.channels
    c.data.mean, c.data.std = (0.5,) * channels, (0.5,) * channels
    return c


def clock(step=0, epochs=8, per_epoch=10):
    return Clock(jnp.int32(step), epochs * per_epoch, per_epoch)


def setup(c, rng):
    """A method with weights and a teacher of its own, images, and the noise and values of a batch of masks."""
    method = methods.build(c)
    params, state = (randomised(t, rng) for t in jax.eval_shape(method.init, jax.random.key(0)))
    images = rng.normal(size=(3, *c.data.image_size, c.data.channels)).astype(np.float32)
    return method, params, state, images, *draw(method, rng)


def draw(method, rng, batch=3):
    noise = masking.block_noise(jax.random.key(int(rng.integers(2**31))), batch, method.arch.num_patches)
    return noise, np.asarray(masking.block_masking(noise, method.arch.grid, method.blocks, method.mask_ratio).mask)


def in_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def patch_terms(mask, grid, weighted):
    """Where the encoder looks, and what each patch weighs."""
    return np.stack([np.flatnonzero(~m) for m in mask]), np.stack(
        [ref_weights(m, grid) if weighted else m.astype(float) for m in mask]
    )


@pytest.mark.parametrize(
    ('name', 'dtype'),
    [
        ('wide', 'float32'),
        pytest.param('square', 'float32', marks=pytest.mark.slow),
        pytest.param('one block', 'float32', marks=pytest.mark.slow),
        pytest.param('square', 'bfloat16', marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_against_a_form_in_float64(rng, name, dtype):
    """Predictions and both losses to 1e-5, and the gradient of each by every parameter to 1e-5 of its largest entry; in
    bfloat16 losses to 2%, and all gradients of a loss together to 5%."""
    c = small(name, **{'model.dtype': dtype})
    method, params, state, images, noise, mask = setup(c, rng)

    @jax.jit
    def ours(p, terms):
        def total(p):
            result = method.loss(p, state, {'image': images}, jax.random.key(0), clock(), noise=noise)
            losses = jnp.stack([result.losses[n] for n in ('reconstruction', 'features')])
            return terms @ losses, (losses, result.predictions)

        grads, found = jax.grad(total, has_aux=True)(p)
        return found, grads

    places = patch_terms(mask, method.arch.grid, c.bootmae.weight_patches)
    for terms in np.eye(2):
        with jax.enable_x64(True):
            arguments = in_float64(params), in_float64(state['teacher']), in_float64(images), *places, terms
            (want, want_predictions), want_grads = jax.device_get(
                ref_gradients(*arguments, normalised=c.bootmae.norm_pix_loss)
            )
        assert want.dtype == np.float64
        (got, predictions), grads = ours(params, np.float32(terms))
        grads, want_grads = named(grads), named(want_grads)
        errors = {n: np.abs(g - want_grads[n]).max() / (np.abs(want_grads[n]).max() or 1) for n, g in grads.items()}
        if dtype == 'float32':
            np.testing.assert_allclose(got, want, rtol=1e-5)
            np.testing.assert_allclose(predictions, want_predictions, atol=1e-5 * np.abs(want_predictions).max())
            assert max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if e > 1e-5}
        else:
            np.testing.assert_allclose(got, want, rtol=2e-2)
            error = math.sqrt(sum(np.square(g - want_grads[n]).sum() for n, g in grads.items()))
            assert error <= 0.05 * math.sqrt(sum(np.square(g).sum() for g in want_grads.values()))


class GivenMasks(Pretraining):
    """Pre-training on normalised images, with the masks' random numbers in the batch."""

    def loss(self, params, model_state, constants, batch, key, clock):
        views = {'image': batch['image']}
        result = self.method.loss(params, model_state, views, key, clock, noise=batch['noise'])
        total = sum(result.weights.get(n, 1.0) * x for n, x in result.losses.items())
        return total, (dict(result.losses), {})


def test_twenty_steps_with_the_teacher(rng):
    """Losses of 20 updates in four epochs, with AdamW, a weight and an average that change per epoch: to 1e-4."""
    c = small(**{'bootmae.ema_milestones': (0.0, 0.5, 1.0), 'bootmae.ema_rates': (0.4, 0.2, 0.1)})
    c.bootmae.feature_warmup = 0.5
    c.optim.eps = 1e-5  # with 1e-8 an entry whose gradient is nearly zero moves by its rounding
    method, params, state, *_ = setup(c, rng)
    state = {'teacher': {'encoder': jax.tree.map(jnp.copy, params['encoder'])}}  # as at the start of a run
    o, rate = c.optim, 3e-3
    tx, at = optim.adamw(o, lambda step: rate), functools.partial(Clock, total=20, steps_per_epoch=5)
    step = jax.jit(train_state.make_train_step(GivenMasks(method, (), (), False), tx, lambda step: rate, at))
    ours = train_state.begin(params, state, tx)
    p, teacher = in_float64(params), in_float64(state['teacher'])
    m, v = (jax.tree.map(np.zeros_like, p) for _ in range(2))
    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith(('kernel', 'mask_token')), p)
    got, want = [], []
    for t in range(20):
        images = (rng.normal(size=(3, 1, 1, 2)) + rng.normal(size=(3, *method.arch.image_size, 2))).astype(np.float32)
        noise, mask = draw(method, rng)
        ours, meter = step(
            ours, Meter.empty(('reconstruction', 'features')), {}, {'image': images, 'noise': noise}, jax.random.key(0)
        )
        got.append([float(meter.sums[n]) for n in ('reconstruction', 'features')])
        epoch = t // 5
        terms = np.array([1.0, min(1.0, (epoch + 1) / 2)])
        with jax.enable_x64(True):
            places = patch_terms(mask, method.arch.grid, weighted=True)
            found, g = jax.device_get(ref_gradients(p, teacher, in_float64(images), *places, terms))
        want.append(found[0])
        m = jax.tree.map(lambda m, g: o.b1 * m + (1 - o.b1) * g, m, g)
        v = jax.tree.map(lambda v, g: o.b2 * v + (1 - o.b2) * g * g, v, g)
        correct = 1 - o.b1 ** (t + 1), 1 - o.b2 ** (t + 1)

        def update(p, m, v, decay, correct=correct):
            return p - rate * (m / correct[0] / (np.sqrt(v / correct[1]) + o.eps) + o.weight_decay * decay * p)

        p = jax.tree.map(update, p, m, v, decays)
        decay = (0.6, 0.7, 0.8, 0.85)[epoch]
        teacher = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, teacher, {'encoder': p['encoder']})
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(ours.model_state['teacher']), jax.tree.leaves(teacher), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# --------------------------------------------------------------------------- figures of LightDXY/BootMAE d604b18

EMA_DYNAMIC = {0: 0.999, 1: 0.999009, 10: 0.99909, 50: 0.99945, 99: 0.999891, 100: 0.9999, 101: 0.9999003}
EMA_DYNAMIC |= {200: 0.99993, 250: 0.999945, 399: 0.9999897, 400: 0.99999, 500: 0.99999, 800: 0.99999}
EMA_STATIC = {e: min(d, 0.9999) for e, d in EMA_DYNAMIC.items()}
FEATURE_WEIGHT = {0: 0.0049937578, 1: 0.0099875156, 50: 0.25468165, 99: 0.49937578, 100: 0.50436954, 150: 0.75405743}
FEATURE_WEIGHT |= {198: 0.9937578, 199: 0.99875156, 200: 1, 400: 1, 800: 1}


@pytest.mark.parametrize(('size', 'decays', 'per_epoch'), [('vit_b', EMA_DYNAMIC, 312), ('vit_l', EMA_STATIC, 625)])
def test_the_teachers_decay_per_epoch(size, decays, per_epoch):
    """From zeros to ones in one update, at the first and the last step of an epoch: what moves is the rate."""
    c = recipe.get_config(size)
    c.model.depth, c.model.width, c.model.heads = 1, 16, 2
    method = methods.build(c)
    update = jax.jit(method.after_update)
    old, new = ({'encoder': {'w': jnp.full((2,), x)}} for x in (0.0, 1.0))
    for epoch, decay in decays.items():
        for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1):
            got = update(new, {'teacher': old}, {}, clock(step, 801, per_epoch))['teacher']['encoder']['w']
            np.testing.assert_allclose(got, 1 - decay, rtol=1e-5, atol=6e-8)  # the figures have seven digits


def test_the_feature_weight_per_epoch(rng):
    method, params, state, images, *_ = setup(small(), rng)
    arguments = params, state, {'image': images}, jax.random.key(0)
    weight = jax.jit(lambda at: method.loss(*arguments, at).weights['features'])
    for epoch, want in FEATURE_WEIGHT.items():
        for step in (epoch * 312, epoch * 312 + 311):
            np.testing.assert_allclose(weight(clock(step, 801, 312)), want, rtol=1e-6)


@pytest.mark.parametrize(
    ('size', 'official', 'per_epoch'), [('vit_b', test_train.BOOTMAE, 312), ('vit_l', test_train.BOOTMAE_LARGE, 625)]
)
def test_the_configs_have_the_official_rates(size, official, per_epoch):
    c = recipe.get_config(size)
    f = schedules.learning_rate(c.optim, c.batch_size, schedules.to_steps(c.epochs, per_epoch), per_epoch)
    rates = list(official.values())
    assert [float(f(step)) for step in official] == pytest.approx(rates, rel=1e-5, abs=1e-7 * max(rates))


# In ninths; 0 where visible.
PATCH_WEIGHTS = """
 .  .  . 13 13  .  . 13  . 12  . 12  . 11
 .  . 13  . 16 16 16 16 17 14  . 12 14  .
13 15  . 16 17 18 18 18 18 16  .  .  . 12
15 17 17 17 18 18 18 18 18 17 16 14  . 12
15 18 18 18 18 18 18 17 17 17 18 16 14  .
15 17 17 16 17 17 18 17  . 17 18 17  .  .
15 17  . 16  . 17 18 17 17 17 18 16 13  .
15 17 17 16 17 17 18 18 18 18 18 16  .  .
15 18 18 18 18 18 18 18 18 17 16 14  . 11
15 18 18 18 18 18 18 18 18 16  .  . 14  .
15 18 18 18 17 16 16 16 16 14  . 13  . 11
15 18 18 18 17  .  . 13  .  . 15 14  .  .
14 17 17 17 16 14  .  .  .  . 15 14  .  .
12  . 14 14  . 13 13 12 12 12  . 12  . 10
"""


def test_patch_weights_of_an_official_mask():
    want = np.array(PATCH_WEIGHTS.replace('.', '0').split(), float)[None] / 9
    np.testing.assert_allclose(bootmae.patch_weights(jnp.asarray(want > 0), (14, 14)), want, rtol=1e-6)


def np_blocks(tries, grid, blocks):
    """Masks and shapes (height, width) of the placed blocks of one image, from the same random numbers."""
    (h, w), covered, placed = grid, np.zeros(grid, bool), []
    for size, shape, down, right in tries:
        most = min(blocks.most, blocks.patches - covered.sum())
        if not most:
            break
        area, aspect = blocks.least + (most - blocks.least) * size, blocks.aspect ** (1 - 2 * shape)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < h and width < w:
            top, left = int(down * (h - height + 1)), int(right * (w - width + 1))
            block = covered[top : top + height, left : left + width]
            if 0 < (~block).sum() <= most:
                block[:] = True
                placed.append((height, width))
    return covered, placed


def near(values, official, digits=4):
    """The mean of a sample and that of an official one of the same size: within four standard errors of the difference,
    and the rounding of the figure."""
    values = np.asarray(values, float)
    error = 4 * math.sqrt(2 / len(values)) * values.std() + 0.5 * 10**-digits
    assert abs(values.mean() - official) <= error, (values.mean(), official, error)


def check_positions(masks, edge, centre, corners, pairs):
    """Masks (B, 14, 14): the fraction hidden on the edge, in the middle 2 x 2, in the corners, and of both of two
    horizontal neighbours."""
    inner = np.zeros((14, 14), bool)
    inner[1:-1, 1:-1] = True
    near(masks[:, ~inner].mean(1), edge)
    near(masks[:, 6:8, 6:8].mean((1, 2)), centre)
    near(masks[:, ::13, ::13].mean((1, 2)), corners, 3)
    near((masks[:, :, 1:] & masks[:, :, :-1]).mean((1, 2)), pairs)


def test_block_masks_have_the_official_statistics(rng):
    """5,000 masks of 14 x 14 patches against as many of the official generator."""
    blocks, grid, count = masking.Blocks(120, 16, 60, 0.3), (14, 14), 5000
    noise = masking.block_noise(jax.random.key(int(rng.integers(2**31))), count, 196)
    covered = np.asarray(jax.jit(lambda t: masking.cover(t, grid, blocks))(noise.tries))
    found = [np_blocks(t, grid, blocks) for t in np.asarray(noise.tries).swapaxes(0, 1).tolist()]
    differ = np.any(covered != np.stack([f[0] for f in found]), (1, 2))
    assert differ.mean() <= 1e-3  # a side that is rounded the other way in float32

    assert covered.sum((1, 2)).max() == 120
    assert (covered.sum((1, 2)) < 120).mean() <= 2e-3  # 128 candidates were not enough
    check_positions(covered, 0.2879, 0.9115, (0.101 + 0.088 + 0.096 + 0.095) / 4, 0.5759)
    near([len(f[1]) for f in found], 8.10, 2)
    height, width = np.array([s for f in found for s in f[1]]).T
    near(height, 4.90, 2)
    near(width, 4.92, 2)
    near(height * width, 23.49, 2)
    assert np.median(height / width) == 1
    assert (height / width).min() >= 0.2
    assert (height / width).max() <= 5
    commonest = {(4, 4): 1593, (5, 3): 1476, (3, 5): 1452, (6, 3): 1345, (3, 6): 1298, (4, 5): 1021}
    for (a, b), official in commonest.items():
        got = ((height == a) & (width == b)).sum()
        assert abs(got - official) <= 4 * math.sqrt(got + official), (a, b, got)

    # The official sample mixes batches of all four rolls.
    rolls = np.arange(count) % 4
    make = jax.jit(lambda noise: masking.block_masking(noise, grid, blocks, 0.75))
    hidden = np.empty((count, 14, 14), bool)
    for roll in range(4):
        rows = rolls == roll
        part = masking.BlockNoise(noise.tries[:, rows], noise.fill[rows], jnp.int32(roll))
        masks = make(part)
        hidden[rows] = np.asarray(masks.mask).reshape(-1, 14, 14)
        assert masks.ids_keep.shape[1] == 49
    full = covered.sum((1, 2)) == 120
    assert (hidden.sum((1, 2)) == 147).all()
    assert ((hidden & covered).sum((1, 2))[full] == 120 - rolls[full]).all()
    check_positions(hidden, 0.5522, 0.9329, (0.440 + 0.431 + 0.435 + 0.443) / 4, 0.6486)


def test_rolls_are_uniform():
    keys = jax.random.split(jax.random.key(5), 2000)
    rolls = jax.jit(jax.vmap(lambda k: masking.block_noise(k, 1, 4).roll))(keys)
    counts = np.bincount(rolls, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500)


def initial(name, shape):
    """(mean, standard deviation, largest magnitude) of the official initialisation."""
    if name.endswith('cls_token'):
        return 0, 1e-6, 6e-6
    if name.endswith('mask_token'):
        return parity.cut_normal()
    if name.startswith('pixel_head'):
        return parity.default_linear(4 * 4 * 3)
    if name.endswith('/qkv_kernel'):  # three matrices, though one array
        return parity.xavier(shape[0], shape[2] * shape[3])
    if name.endswith('kernel'):
        return parity.xavier(shape[0], math.prod(shape[1:]))
    return parity.constant(1 if name.endswith('scale') else 0)


def test_initial_distributions():
    c = small('square')
    c.model.width, c.bootmae.decoder_width, c.model.depth = 96, 64, 1
    params, state = jax.jit(methods.build(c).init)(jax.random.key(int(np.random.default_rng().integers(2**31))))
    for name, value in named(params).items():
        parity.assert_distributed(value, *initial(name, value.shape), name)
    assert not any('pos' in n or n.endswith('k_bias') for n in named(params))
    assert params['regressor']['blocks']['block0']['attn']['qkv_kernel'].shape == (64, 3, 3, 21)
    teacher = state['teacher']['encoder']
    jax.tree.map(np.testing.assert_array_equal, teacher, params['encoder'])
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (teacher, params['encoder'])), strict=True))


def test_pictures_undo_the_normalisation(rng):
    """Predicting the target gives back the pixels, each colour by its own mean and deviation."""
    method = methods.build(small('square'))
    images = jnp.asarray(rng.normal(size=(2, 20, 20, 3)), jnp.float32)
    patches = losses.patchify(images, 4)
    mean, std = bootmae.colour_moments(patches, 3)
    np.testing.assert_allclose(mean[0, 0, :3], images[0, :4, :4].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(std[0, 0, 3:6], np.sqrt(images[0, :4, :4].var((0, 1)) + 1e-5), atol=1e-6)
    result = methods.Result({}, {}, predictions=(patches - mean) / std)
    np.testing.assert_allclose(method.module.apply({}, result, images, method='to_pixels'), patches, atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'bootmae.decoder_width': 2}, r'bootmae\.decoder_width is 2; .* 3 heads'),
        ({'bootmae.block_patches': 20}, r'bootmae\.block_patches is 20; .* 15 hidden'),
        ({'bootmae.ema_milestones': (0.0, 1.0)}, r'bootmae\.ema_milestones is \(0\.0, 1\.0\)'),
        ({'bootmae.block_area': (7, 9)}, r'bootmae\.block_area begins at 7; .* \(6\)'),
        ({'bootmae.decoder_width': 18}, r'bootmae\.decoder_width is 18'),
        ({'mask_ratio': 0.97}, 'mask_ratio is 0.97'),
    ],
)
def test_invalid_settings_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        methods.build(small(**changes))
