"""Regularisation of classifiers on the device: soft labels, mixup and cutmix, random erasing, as in timm's training.

Images are normalised floats: timm erases after normalisation, and mixes last.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

ERASE_TRIES = 10


def soft_labels(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Targets float32 (B, classes) of int labels (B,): `smoothing` of the mass is spread evenly over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixes each image of a batch with the one in its place in reverse order: one draw per batch, timm's mode 'batch'.

    Mixup (arXiv 1710.09412) takes the weighted mean of both images, cutmix (arXiv 1905.04899) a box of the other one.

    Attributes:
      mixup, cutmix: alpha of the Beta distribution from which the weight is drawn; 0: not used, but not both.
      prob: with which a batch is mixed at all.
      switch_prob: with which it is cutmix, where both are used.
    """

    mixup: float
    cutmix: float
    prob: float = 1.0
    switch_prob: float = 0.5

    def __call__(self, key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mixed images (B, H, W, C) and targets (B, classes)."""
        use_key, switch_key, weight_key, box_key = jax.random.split(key, 4)
        cut = jax.random.bernoulli(switch_key, self.switch_prob if self.mixup else 1.0) if self.cutmix else False
        alpha = jnp.where(cut, self.cutmix or 1.0, self.mixup or 1.0)
        weight = jax.random.beta(weight_key, alpha, alpha)
        weight = jnp.where(jax.random.bernoulli(use_key, self.prob), weight, 1.0)
        size = images.shape[1:3]
        box = cut_box(weight, jax.random.randint(box_key, (2,), 0, jnp.array(size)), size)
        covered = (box[1] - box[0]).prod() / math.prod(size)
        images = jnp.where(cut, paste(images, box), weight * images + (1 - weight) * images[::-1])
        weight = jnp.where(cut, 1 - covered, weight)
        return images, weight * targets + (1 - weight) * targets[::-1]


def cut_box(weight: jax.Array, centre: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """First and last-but-excluded (row, column) of cutmix's box: it covers 1 - weight of the image, before what lies
    outside is cut off."""
    size = jnp.array(size)
    cut = (size * jnp.sqrt(1 - weight)).astype(jnp.int32)
    return jnp.clip(centre - cut // 2, 0, size), jnp.clip(centre + (cut + 1) // 2, 0, size)


def paste(images: jax.Array, box: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Images (B, H, W, C) with the box of the images in reverse order."""
    return jnp.where(inside(*box, images.shape[1:3])[..., None], images[::-1], images)


def inside(first: jax.Array, last: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bool (..., H, W): where boxes lie, from (row, column) `first` (..., 2) to before `last`."""
    rows, columns = (jnp.arange(n) for n in size)
    first, last = first[..., None, :], last[..., None, :]
    down = (rows >= first[..., 0]) & (rows < last[..., 0])
    across = (columns >= first[..., 1]) & (columns < last[..., 1])
    return down[..., :, None] & across[..., None, :]


def random_erase(
    key: jax.Array,
    images: jax.Array,
    prob: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: float = 0.3,
) -> jax.Array:
    """Fill a random rectangle of some images (B, H, W, C) with normal noise (arXiv 1708.04896; timm's mode 'pixel').

    Args:
      prob: per image.
      area: fraction of the image that a rectangle covers.
      aspect: its height over its width lies between this and its inverse.
    """
    batch, *size, _ = images.shape
    use_key, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
    tries = batch, ERASE_TRIES
    covered = math.prod(size) * jax.random.uniform(area_key, tries, minval=area[0], maxval=area[1])
    ratio = jnp.exp(jax.random.uniform(aspect_key, tries, minval=math.log(aspect), maxval=-math.log(aspect)))
    shape = jnp.round(jnp.stack([jnp.sqrt(covered * ratio), jnp.sqrt(covered / ratio)], -1)).astype(jnp.int32)
    fits = (shape < jnp.array(size)).all(-1)
    # The first that fits; if none does, nothing is erased.
    shape = jnp.take_along_axis(shape, fits.argmax(1)[:, None, None], 1)[:, 0]
    room = jnp.array(size) - shape
    first = (jax.random.uniform(place_key, (batch, 2)) * (room + 1)).astype(jnp.int32)
    erased = inside(first, first + shape, tuple(size))
    erased &= (jax.random.bernoulli(use_key, prob, (batch,)) & fits.any(1))[:, None, None]
    return jnp.where(erased[..., None], jax.random.normal(noise_key, images.shape, images.dtype), images)
