"""Random masks for masked image modelling: pure functions, on device, one mask per image.

Every function takes its noise as an argument, so that a test, a peer library or a resumed run can inject it.
"""

import dataclasses
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
    """Visible patches of MAE and BootMAE: `int(N * (1 - mask_ratio))` (facebookresearch/mae, models_mae.py)."""
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


def restore(visible: jax.Array, token: jax.Array, masks: Masks) -> jax.Array:
    """All patches (B, N, D) in image order: the visible ones (B, N_visible, D), and token (1, 1, D) for the others."""
    b, n = masks.mask.shape
    hidden = jnp.broadcast_to(token, (b, n - visible.shape[1], token.shape[-1]))
    return jnp.take_along_axis(jnp.concatenate([visible, hidden], axis=1), masks.ids_restore[..., None], axis=1)


def random_masking(noise: jax.Array, mask_ratio: float) -> Masks:
    """Uniform random masking of single patches, as in MAE: the patches with the least noise stay visible.

    Args:
      noise: float (B, N), uniform noise.
      mask_ratio: fraction of patches to hide, in (0, 1).
    """
    return from_order(jnp.argsort(noise, axis=1), num_visible(noise.shape[1], mask_ratio))


def unit_masking(noise: jax.Array, grid: tuple[int, int], unit: int, mask_ratio: float) -> Masks:
    """Random masking of square units of `unit` x `unit` patches, as in SimMIM.

    Args:
      noise: float (B, units), uniform noise, one value per unit in row-major order.
      grid: patches per column and per row of the image; both divide by `unit`.
      unit: side of a unit in patches (SimMIM masks 32 pixels: 2 patches of 16).
      mask_ratio: fraction of units to hide, in (0, 1); the count is rounded up.
    """
    h, w = grid[0] // unit, grid[1] // unit
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    masked = (rank < num_masked_units(grid, unit, mask_ratio)).reshape(-1, h, 1, w, 1)
    mask = jnp.broadcast_to(masked, (noise.shape[0], h, unit, w, unit)).reshape(noise.shape[0], -1)
    keep = mask.shape[1] - num_masked_units(grid, unit, mask_ratio) * unit * unit
    return from_order(jnp.argsort(mask, axis=1, stable=True), keep)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How block-wise masks are made (BEiT's generator, as BootMAE has it).

    Attributes:
      patches: that the blocks cover together.
      least, most: area of a block, in patches. The last blocks are smaller, so that the total is exact.
      aspect: height over width of a block is between this and its inverse.
    """

    patches: int
    least: int
    most: int
    aspect: float


class BlockNoise(NamedTuple):
    """Random numbers of the block-wise masks of a batch.

    Attributes:
      tries: float (T, B, 4) in [0, 1): area, aspect, row and column of each candidate block.
      fill: float (B, N) in [0, 1): which patches the blocks are filled up with.
      roll: int32 scalar in [0, 3], shared by the batch.
    """

    tries: jax.Array
    fill: jax.Array
    roll: jax.Array


# A mask of 120 of 196 patches needs 19 candidates on average; about one in 5,000 is not complete after 128.
TRIES = 128


def block_noise(key: jax.Array, batch: int, num_patches: int) -> BlockNoise:
    """Fresh random numbers for `block_masking`."""
    tries, fill, roll = jax.random.split(key, 3)
    return BlockNoise(
        jax.random.uniform(tries, (TRIES, batch, 4)),
        jax.random.uniform(fill, (batch, num_patches)),
        jax.random.randint(roll, (), 0, 4),
    )


def cover(tries: jax.Array, grid: tuple[int, int], blocks: Blocks) -> jax.Array:
    """Patches covered by random blocks, bool (B, h, w).

    Candidates are tried in turn. One is placed if it fits into the grid with room to move, covers something new, and
    covers no more new patches than are still wanted (or than `blocks.most`). The official code tries until
    `blocks.patches` are covered; here the number of candidates is fixed, for a loop that ends when its slowest image is
    done would have to ask all devices in each turn.

    Args:
      tries: as in `BlockNoise`.
      grid: patches per column (h) and per row (w).
    """
    h, w = grid
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)

    def attempt(covered, noise):
        size, shape, down, right = noise.T[..., None, None]
        most = jnp.minimum(blocks.most, blocks.patches - covered.sum((1, 2), keepdims=True))
        area = blocks.least + (most - blocks.least) * size
        aspect = jnp.exp(math.log(blocks.aspect) * (1 - 2 * shape))
        height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        top, left = jnp.floor(down * (h - height + 1)), jnp.floor(right * (w - width + 1))
        block = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        new = (block & ~covered).sum((1, 2), keepdims=True)
        placed = (height < h) & (width < w) & (new > 0) & (new <= most)
        return covered | (block & placed), None

    nothing = jnp.zeros((tries.shape[1], h, w), bool)
    return jax.lax.scan(attempt, nothing, tries)[0]


def block_masking(noise: BlockNoise, grid: tuple[int, int], blocks: Blocks, mask_ratio: float) -> Masks:
    """Block-wise masking as in BootMAE: random blocks, filled up to the ratio with single patches.

    Patches outside the blocks come first in a random order, then those inside; the order is rolled to the right by
    `noise.roll`, and the first ones stay visible. So a few patches of the blocks are visible too.

    Args:
      grid: patches per column and per row.
      mask_ratio: fraction of patches to hide, in (0, 1).
    """
    covered = cover(noise.tries, grid, blocks).reshape(noise.fill.shape)
    order = jnp.argsort(covered - noise.fill, axis=1)
    return from_order(jnp.roll(order, noise.roll, axis=1), num_visible(order.shape[1], mask_ratio))
