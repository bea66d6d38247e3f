"""Patches, reconstruction targets and reconstruction losses. Statistics and losses are float32."""

import jax
import jax.numpy as jnp

EPS = 1e-6


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cut images (B, H, W, C) into patches (B, N, p * p * C), row-major, channels last in a patch."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Inverse of `patchify`: (B, N, p * p * C) to (B, H, W, C), with N = grid[0] * grid[1]."""
    b, _, d = patches.shape
    (h, w), p = grid, patch_size
    x = patches.reshape(b, h, w, p, p, d // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, d // (p * p))


def patch_moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (B, N, 1) that normalise a patch in MAE: unbiased variance plus 1e-6."""
    patches = patches.astype(jnp.float32)
    return patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + EPS)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """MAE's normalised pixels: each patch by its own mean and standard deviation (norm_pix_loss)."""
    mean, std = patch_moments(patches)
    return (patches - mean) / std


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values (B, N) over the True entries of mask (B, N)."""
    mask = mask.astype(jnp.float32)
    return (values.astype(jnp.float32) * mask).sum() / mask.sum()


def masked_mse(predictions: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """MAE's loss: squared error, averaged over a patch's values, then over the masked patches."""
    error = predictions.astype(jnp.float32) - target.astype(jnp.float32)
    return masked_mean(jnp.square(error).mean(-1), mask)


def masked_l1(predictions: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """SimMIM's loss: absolute error, averaged over the pixels and channels of the masked patches."""
    error = predictions.astype(jnp.float32) - target.astype(jnp.float32)
    return masked_mean(jnp.abs(error).mean(-1), mask)
