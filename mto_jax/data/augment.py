"""What happens to a batch on the device: pure functions of uint8 images and a key."""

from collections.abc import Sequence

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


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image (B, H, W, C) left to right with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)
