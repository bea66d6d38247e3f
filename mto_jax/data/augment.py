"""What happens to a batch on the device: pure functions of images and a key."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Images (B, H, W, C), uint8 or floats in [0, 1], to float32: (x - mean) / std of x in [0, 1], per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (to_float(images) - mean) / std


def to_float(images: jax.Array) -> jax.Array:
    """Images of any shape to float32 in [0, 1]: uint8 over 255, floats as they are."""
    return images.astype(jnp.float32) / (255.0 if images.dtype == jnp.uint8 else 1.0)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of `normalize`, as floats in [0, 1] (clipped)."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return jnp.clip(images.astype(jnp.float32) * std + mean, 0.0, 1.0)


@partial(jax.jit, static_argnames=('to', 'method'))
def resize(images: jax.Array, sizes: jax.Array, to: tuple[int, int], method: str = 'bicubic') -> jax.Array:
    """Antialiased, as PIL and the host pipeline resize, of a rectangle in the upper left corner of each image.

    Args:
      images: uint8 (B, H, W, C).
      sizes: int32 (B, 2), the rectangles' heights and widths.
      to: height and width of all results.
      method: 'bicubic' (Keys' kernel, a = -0.5) or 'bilinear'.

    Returns:
      uint8 (B, *to, C).
    """

    def matrix(size, source, target):
        """float32 (target, source): what each pixel of a line takes from each of the first `size`."""
        scale = size / target
        centres = (jnp.arange(target) + 0.5) * scale
        distance = jnp.abs(jnp.arange(source) + 0.5 - centres[:, None]) / jnp.maximum(scale, 1.0)
        weights = jnp.where(jnp.arange(source) < size, KERNELS[method](distance), 0.0)
        return weights / weights.sum(-1, keepdims=True)

    def one(image, size):
        # Values up to 255 are exact in bfloat16; the weights need more digits than the default gives them.
        rows, columns = (matrix(n, *ends) for n, *ends in zip(size, image.shape[:2], to, strict=True))
        lines = jnp.einsum('ih,hwc->iwc', rows, image.astype(jnp.float32), precision='high')
        return jnp.einsum('jw,iwc->ijc', columns, lines, precision='high')

    return jnp.clip(jnp.round(jax.vmap(one)(images, sizes)), 0, 255).astype(jnp.uint8)


def _bicubic(x):
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))


# Weights of pixels by their distance, in pixels of the result where that is smaller.
KERNELS = {'bicubic': _bicubic, 'bilinear': lambda x: jnp.maximum(1.0 - x, 0.0)}


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image (B, H, W, C) left to right with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Strong:
    """A strongly augmented view, as torchvision and PIL make it: colour jitter, grey, Gaussian blur, solarisation, in
    this order, each with its probability, drawn per image.

    Images that have not three channels keep their colours: of the jitter only brightness and contrast act on them, and
    they do not turn grey.

    Attributes:
      jitter, grey, blur, solarize: probabilities.
      brightness, contrast, saturation: factors lie within 1 plus or minus these.
      hue: a shift of at most this fraction of the colour circle.
      blur_radius: smallest and largest standard deviation in pixels.
    """

    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.1
    solarize: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    blur_radius: tuple[float, float] = (0.1, 2.0)

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Float images (B, H, W, C) in [0, 1] to others."""
        return jax.vmap(self._one)(jax.random.split(key, len(images)), images)

    def _one(self, key, image):
        keys = jax.random.split(key, 3)
        rates = jnp.array([self.jitter, self.grey, self.blur, self.solarize], jnp.float32)
        jitter, grey, blur, solar = jax.random.bernoulli(keys[0], rates)
        image = jnp.where(jitter, self._jittered(keys[1], image), image)
        if image.shape[-1] == 3:
            image = jnp.where(grey, jnp.broadcast_to(luminance(image), image.shape), image)
        low, high = self.blur_radius
        radius = jax.random.uniform(keys[2], (), minval=low, maxval=high)
        image = jnp.where(blur, gaussian_blur(image, radius, math.ceil(3 * high)), image)
        return jnp.where(solar, solarize(image), image)

    def _jittered(self, key, image):
        """Brightness, contrast, saturation and hue, in an order of the image's own."""
        order_key, key = jax.random.split(key)
        spread = jnp.array([self.brightness, self.contrast, self.saturation, self.hue], jnp.float32)
        by = spread * jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
        changes = [lambda x: brighten(x, 1 + by[0]), lambda x: change_contrast(x, 1 + by[1])]
        if image.shape[-1] == 3:
            changes += [lambda x: saturate(x, 1 + by[2]), lambda x: shift_hue(x, by[3])]
        order = jax.random.permutation(order_key, len(changes))
        return jax.lax.fori_loop(0, len(changes), lambda n, x: jax.lax.switch(order[n], changes, x), image)


def luminance(image: jax.Array) -> jax.Array:
    """Grey values (H, W, 1) of colours, or the mean of other channels."""
    channels = image.shape[-1]
    weights = jnp.array([0.299, 0.587, 0.114]) if channels == 3 else jnp.full(channels, 1 / channels)
    return (image * weights).sum(-1, keepdims=True)


def _blend(image, other, factor):
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def brighten(image: jax.Array, factor: jax.Array) -> jax.Array:
    """An image (H, W, C) in [0, 1]: black at factor 0, itself at 1."""
    return _blend(image, 0.0, factor)


def change_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """The mean grey value everywhere at factor 0, the image itself at 1."""
    return _blend(image, luminance(image).mean(), factor)


def saturate(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Grey at factor 0, the colours themselves at 1."""
    return _blend(image, luminance(image), factor)


def shift_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Turn the colours by a fraction of the circle of hues, at their saturation and value (of HSV)."""
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    chroma = value - image.min(-1)
    safe = jnp.where(chroma == 0, 1.0, chroma)
    sixth = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    distance = (jnp.array([5.0, 3.0, 1.0]) + (sixth + 6 * shift)[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(distance, 4 - distance), 0.0, 1.0)


def solarize(image: jax.Array) -> jax.Array:
    """Invert the upper half of the values."""
    return jnp.where(image < 0.5, image, 1.0 - image)


def gaussian_blur(image: jax.Array, radius: jax.Array, reach: int) -> jax.Array:
    """Blur with a Gaussian of standard deviation `radius`, cut at `reach` pixels; the edges go on as they are."""
    distance = jnp.arange(-reach, reach + 1)
    weights = jnp.exp(-0.5 * jnp.square(distance / radius))
    weights = weights / weights.sum()

    def matrix(size):
        """What each pixel of a line (first axis) takes from each other."""
        source = jnp.clip(jnp.arange(size)[:, None] + distance, 0, size - 1)
        return jnp.where(source[:, None] == jnp.arange(size)[:, None], weights, 0.0).sum(-1)

    height, width, _ = image.shape
    return jnp.einsum('ih,jw,hwc->ijc', matrix(height), matrix(width), image, precision='highest')
