"""Pre-training as an objective: augmentation, the method's losses, MTO's terms; and the slower diagnosis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mto_jax import mto
from mto_jax.data import augment
from mto_jax.methods import Clock, Method


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """An objective for `train_state.make_train_step`: uint8 images to a method's total loss.

    Attributes:
      method: with or without MTO.
      mean, std: of the pixels in [0, 1], per channel.
      flip: mirror images at random.
    """

    method: Method
    mean: Sequence[float]
    std: Sequence[float]
    flip: bool
    constants = {}  # noqa: RUF012

    @property
    def tensor_axes(self):
        return self.method.tensor_axes

    def init(self, key):
        return self.method.init(key)

    def views(self, images: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """The method's views, normalised float32 (B, H, W, C), of uint8 images after a shared random flip."""
        flip_key, view_key = jax.random.split(key)
        if self.flip:
            images = augment.random_flip(flip_key, images)
        made = {}
        for i, (name, view) in enumerate(self.method.views.items()):
            pixels = images if view is None else view(jax.random.fold_in(view_key, i), augment.to_float(images))
            made[name] = augment.normalize(pixels, self.mean, self.std)
        return made

    def loss(self, params, model_state, constants, batch, key, clock: Clock):
        del constants
        view_key, key = jax.random.split(key)
        with jax.named_scope('views'):
            views = self.views(batch['image'], view_key)
        result = self.method.loss(params, model_state, views, key, clock)
        terms = dict(result.losses)
        total = sum(result.weights.get(name, 1.0) * value for name, value in terms.items())
        settings = self.method.mto
        if settings and settings.has_losses:
            # The mean over the stacks, so that a weight means the same for a method with two.
            with jax.named_scope('mto_losses'):
                each = [mto.losses(settings, s.blocks, s.depth) for s in result.stacks.values()]
            extra = {name: sum(e[name] for e in each) / len(each) for name in each[0]}
            weights = mto.weights(settings, clock.progress)
            total = total + sum(weights[name] * value for name, value in extra.items())
            terms |= {f'mto_{name}': value for name, value in extra.items()}
        return total, (terms | dict(result.logs), result.statistics)

    def after_update(self, params, model_state, statistics, clock: Clock):
        return self.method.after_update(params, model_state, statistics, clock)

    def diagnose(self, params: Any, model_state: Any, images: jax.Array, key: jax.Array, clock: Clock) -> Mapping:
        """Everything worth seeing of uint8 images, as they are.

        It returns {'blocks': {name: float32 (L,)}, 'scalars': {name: float32}, 'losses': {name: float32}, 'images':
        {name: (B, H, W, C) in [0, 1]}}. Names of statistics carry their stack's where there are several.
        """
        method = dataclasses.replace(self.method, watch=True)
        x = augment.normalize(images, self.mean, self.std)
        views = dict.fromkeys(method.views, x)
        result = method.loss(params, model_state, views, key, clock)
        blocks, distance = {}, {}
        for name, stack in result.stacks.items():
            suffix = f'.{name}' if len(result.stacks) > 1 else ''
            for statistic in stack.blocks[0]:
                values = [stack.blocks[b][statistic] for b in sorted(stack.blocks)]
                blocks[statistic + suffix] = jnp.stack(values)
            distance['token_distance' + suffix] = mto.token_distance(stack.embedded, stack.masked)
        pictures = {}
        for name, picture in method.pictures(params, model_state, x, key, clock).items():
            shown = augment.denormalize(picture, self.mean, self.std)
            pictures[name] = jnp.where(jnp.isnan(picture), 0.5, shown)
        return {'blocks': blocks, 'scalars': distance, 'losses': dict(result.losses), 'images': pictures}
