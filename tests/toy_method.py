"""A custom method in one file: mean colours and a teacher's features are predicted at hidden patches.

It uses all of the protocol: an EMA teacher, a head with batch normalisation, a second view, two mask-bearing stacks, a
loss weight that changes per epoch.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import losses, masking, methods, mto
from mto_jax.attention import Conditioning
from mto_jax.models import vit

DECAY, MOMENTUM = 0.9, 0.9


class ToyNet(nn.Module):
    """An encoder with mask tokens, and a predictor with its own, whose output is normalised over the batch."""

    method: 'Toy'

    def setup(self):
        a = self.method.arch
        self.encoder = vit.ViT(a, methods.attends(self.method, a))
        self.predictor = vit.Transformer(a, methods.attends(self.method, a))
        self.mask_token = nn.Embed(1, a.width, embedding_init=nn.initializers.normal(0.02))
        self.colour, self.feature = nn.Dense(a.channels), nn.Dense(a.width)

    def __call__(self, images, *, noise, train):
        a = self.method.arch
        if noise is None:
            noise = jax.random.uniform(self.make_rng('mask'), (images.shape[0], a.num_patches))
        mask = masking.unit_masking(noise, a.grid, 1, self.method.mask_ratio).mask
        encoded = self.encoder(images, mask=mask, train=train)
        masked = vit.prefix_false(mask, a.num_prefix)
        x = jnp.where(masked[..., None], self.mask_token(jnp.zeros((1, 1), int)).astype(a.dtype), encoded.tokens)
        predicted = self.predictor(x, Conditioning(masked=masked, tokens=x), train=train)
        colour = self.colour(encoded.tokens[:, a.num_prefix :].astype(jnp.float32))
        # A non-linearity before the normalisation, or the gradient of biases before it would be exactly zero.
        y = nn.gelu(self.feature(predicted.tokens[:, a.num_prefix :].astype(jnp.float32)))
        statistics = {'mean': y.mean((0, 1)), 'var': y.var((0, 1))}
        feature = (y - statistics['mean']) * jax.lax.rsqrt(statistics['var'] + 1e-5)
        stacks = {
            'encoder': methods.Stack(mask, encoded.embedded, encoded.stats, a.depth),
            'predictor': methods.Stack(mask, x[:, a.num_prefix :], predicted.stats, a.depth),
        }
        return mask, colour, feature, statistics, stacks

    def encode(self, images, depth, train):
        return self.encoder(images, depth=depth, train=train).tokens


@dataclasses.dataclass(frozen=True)
class Toy(methods.Method):
    mask_ratio: float

    @property
    def views(self):
        return {'image': None, 'strong': lambda key, x: jnp.clip(x + 0.1 * jax.random.normal(key, x.shape), 0, 1)}

    @property
    def tensor_axes(self):
        return ((r'.*/feature/kernel', 1), (r'.*/feature/bias', 0))

    def init(self, key):
        images = jnp.zeros((1, *self.arch.image_size, self.arch.channels))
        rngs = {'params': key, 'mask': key}
        params = ToyNet(self).init(rngs, images, noise=None, train=False)['params']
        zeros = jnp.zeros(self.arch.width)
        teacher = {'encoder': jax.tree.map(jnp.copy, params['encoder'])}
        return params, {'teacher': teacher, 'running': {'mean': zeros, 'var': zeros + 1.0}}

    def loss(self, params, model_state, views, key, clock, *, noise=None):
        rngs = dict(zip(('mask', 'dropout'), jax.random.split(key), strict=True))
        apply = ToyNet(self).apply
        mask, colour, feature, statistics, stacks = apply(
            {'params': params}, views['image'], noise=noise, train=not self.watch, rngs=rngs
        )
        a = self.arch
        pixels = losses.patchify(views['image'].astype(jnp.float32), a.patch_size)
        target = mto.layer_norm(self.encode(model_state['teacher'], views['strong'])[:, a.num_prefix :])
        terms = {
            'colour': losses.masked_mse(colour, pixels.reshape(*pixels.shape[:2], -1, a.channels).mean(2), mask),
            'feature': losses.masked_mse(feature, jax.lax.stop_gradient(target), mask),
        }
        weight = jnp.minimum(1.0, (clock.epoch + 1) / 2.0)
        return methods.Result(terms, stacks, {'feature': weight}, {'feature_weight': weight}, statistics)

    def after_update(self, params, model_state, statistics, clock):
        def average(rate):
            return lambda old, new: rate * old + (1 - rate) * new

        teacher = {'encoder': params['encoder']}
        return {
            'teacher': jax.tree.map(average(DECAY), model_state['teacher'], teacher),
            'running': jax.tree.map(average(MOMENTUM), model_state['running'], statistics),
        }

    def encode(self, params, images, *, depth=None, train=False, key=None):
        variables = {'params': {'encoder': params['encoder']}}
        rngs = {'dropout': key} if train else {}
        return ToyNet(self).apply(variables, images, depth, train, method='encode', rngs=rngs)


def build(config):
    arch = methods.architecture(config)
    return Toy(arch, methods.mto_settings(config, arch.depth), config.mask_ratio)
