"""Random masks for masked image modelling: pure functions, on device, one mask per image.

Every function takes its noise as an argument, so that a test, a peer library or a resumed run can inject it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Masks(NamedTuple):
    """Which patches of each image are hidden.

    Attributes:
      ids_keep: int32 (B, N_visible), positions of the visible patches.
      ids_restore: int32 (B, N); `concat([visible, masked], 1)[ids_restore]` is in image order again.
      mask: bool (B, N), True where a patch is masked.
    """

    ids_keep: jax.Array
    ids_restore: jax.Array
    mask: jax.Array


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of MAE: `int(N * (1 - mask_ratio))` (facebookresearch/mae, models_mae.py)."""
    return int(num_patches * (1 - mask_ratio))


def num_masked_units(grid: tuple[int, int], unit: int, mask_ratio: float) -> int:
    """Masked units of SimMIM: the ratio of all units, rounded up (microsoft/SimMIM, data_simmim.py)."""
    return math.ceil((grid[0] // unit) * (grid[1] // unit) * mask_ratio)


def from_order(ids_shuffle: jax.Array, keep: int) -> Masks:
    """Masks that keep the first `keep` of each row of a permutation.

    Args:
      ids_shuffle: int (B, N), a permutation of the patches for each image.
      keep: number of visible patches.
    """
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    return Masks(ids_shuffle[:, :keep], ids_restore, ids_restore >= keep)


def random_masking(noise: jax.Array, mask_ratio: float) -> Masks:
    """Uniform random masking of single patches, as in MAE: the patches with the least noise stay visible.

    Args:
      noise: float (B, N), uniform noise.
      mask_ratio: share of patches to hide, in (0, 1).
    """
    return from_order(jnp.argsort(noise, axis=1), num_visible(noise.shape[1], mask_ratio))


def unit_masking(noise: jax.Array, grid: tuple[int, int], unit: int, mask_ratio: float) -> Masks:
    """Random masking of square units of `unit` x `unit` patches, as in SimMIM.

    Args:
      noise: float (B, units), uniform noise, one value a unit in row-major order.
      grid: patches per column and per row of the image; both divide by `unit`.
      unit: side of a unit in patches (SimMIM masks 32 pixels: 2 patches of 16).
      mask_ratio: share of units to hide, in (0, 1); the count is rounded up.
    """
    h, w = grid[0] // unit, grid[1] // unit
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    masked = (rank < num_masked_units(grid, unit, mask_ratio)).reshape(-1, h, 1, w, 1)
    mask = jnp.broadcast_to(masked, (noise.shape[0], h, unit, w, unit)).reshape(noise.shape[0], -1)
    keep = mask.shape[1] - num_masked_units(grid, unit, mask_ratio) * unit * unit
    return from_order(jnp.argsort(mask, axis=1, stable=True), keep)
