"""From a method to a training objective: augmentation, the method's losses, MTO's terms; and the slower diagnosis."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mto_jax import mto
from mto_jax.data import augment
from mto_jax.losses import patchify, unpatchify
from mto_jax.methods import Method


def init_params(method: Method, key: jax.Array):
    """Fresh float32 parameters."""
    a = method.arch
    images = jnp.zeros((1, *a.image_size, a.channels), jnp.float32)
    keys = dict(zip(('params', 'mask', 'dropout'), jax.random.split(key, 3), strict=True))
    return method.init(keys, images)['params']


def pretrain_loss(method: Method, data):
    """`loss_fn` for `train_state.make_train_step`: uint8 images to the total loss and its unweighted terms."""
    settings = method.settings

    def loss_fn(params, batch, key, progress):
        flip_key, mask_key, dropout_key = jax.random.split(key, 3)
        images = augment.normalize(batch['image'], data.mean, data.std)
        if data.flip:
            images = augment.random_flip(flip_key, images)
        rngs = {'mask': mask_key, 'dropout': dropout_key}
        out = method.apply({'params': params}, images, train=True, rngs=rngs)
        terms = dict(out.losses)
        total = sum(terms.values())
        if settings and settings.has_losses:
            extra = mto.losses(settings, out.stats, method.mask_depth)
            weights = mto.weights(settings, progress)
            total = total + sum(weights[name] * value for name, value in extra.items())
            terms |= {f'mto_{name}': value for name, value in extra.items()}
        return total, terms

    return loss_fn


def make_diagnose(method: Method, data):
    """`diagnose(params, images, key)` of uint8 images: everything worth seeing, from one forward pass.

    It returns {'blocks': {name: float32 (L,)}, 'token_distance': scalar, 'losses': {...}, 'images': the three pictures
    (B, H, W, C) in [0, 1] original, masked and reconstruction}. 'blocks' holds `mto.diagnosis`: the same definitions
    for every method and setting.
    """

    def diagnose(params, images: jax.Array, key: jax.Array) -> Mapping:
        x = augment.normalize(images, data.mean, data.std)
        out = method.apply({'params': params}, x, everything=True, rngs={'mask': key})
        blocks = {n: jnp.stack([out.stats[b][n] for b in sorted(out.stats)]) for n in out.stats[0]}
        return {
            'blocks': blocks,
            'token_distance': mto.token_distance(out.embedded, out.mask),
            'losses': dict(out.losses),
            'images': _triplet(method, out, x, data),
        }

    return diagnose


def _triplet(method, out, images, data):
    a = method.arch
    true = patchify(images, a.patch_size)
    hidden = out.mask[..., None]
    # The true patches where visible: only the hidden ones were predicted with a loss.
    filled = jnp.where(hidden, method.apply({}, out, images, method='to_pixels'), true)
    back = [augment.denormalize(unpatchify(p, a.grid, a.patch_size), data.mean, data.std) for p in (true, filled)]
    shown = unpatchify(jnp.broadcast_to(~hidden, true.shape), a.grid, a.patch_size)
    return {'original': back[0], 'masked': jnp.where(shown, back[0], 0.5), 'reconstruction': back[1]}
