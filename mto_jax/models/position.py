"""Position information for any grid: fixed sine-cosine embeddings, relative position indices, and what is learned
brought from one grid to another."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_2d(grid: tuple[int, int], dim: int, rows_first: bool = False) -> np.ndarray:
    """Fixed 2-D sine-cosine embeddings, float32 (h * w, dim), as in MAE (facebookresearch/mae, util/pos_embed.py).

    The first half of the features encodes the column, the second the row; each half holds sines, then cosines, of
    position / 10000^(2i / (dim / 2)).

    Args:
      grid: patches per column (h) and per row (w).
      dim: features, divisible by 4.
      rows_first: the first half of the features encodes the row, the second the column, as in BootMAE.

    Raises:
      ValueError: if dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f'sine-cosine positions need a width divisible by 4, got {dim}')
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))

    def encode(position):
        angle = np.outer(position, omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing='ij')
    first, second = (rows, cols) if rows_first else (cols, rows)
    return np.concatenate([encode(first.ravel()), encode(second.ravel())], axis=1).astype(np.float32)


def num_relative_distances(grid: tuple[int, int]) -> int:
    """Rows of a relative-position table: every offset between patches, and three for the class token (BEiT)."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_index(grid: tuple[int, int], num_prefix: int) -> np.ndarray:
    """Row of the relative-position table for each pair of tokens, int32 (N, N), after BEiT.

    The last three rows of the table stand for class-to-patch, patch-to-class and class-to-class.

    Args:
      grid: patches per column and per row.
      num_prefix: 1 with a class token, 0 without.
    """
    h, w = grid
    rows, cols = (c.ravel() for c in np.meshgrid(np.arange(h), np.arange(w), indexing='ij'))
    index = (rows[:, None] - rows + h - 1) * (2 * w - 1) + cols[:, None] - cols + w - 1
    if not num_prefix:
        return index.astype(np.int32)
    last = num_relative_distances(grid)
    index = np.pad(index, ((1, 0), (1, 0)))
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index.astype(np.int32)


def resize_learned(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Learned positions (1, P + h * w, D) of the grid `old` for the grid `new`; prefix tokens keep theirs.

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed` has it.
    """
    split = table.shape[1] - old[0] * old[1]
    patches = table[:, split:].reshape(1, *old, -1)
    patches = jax.image.resize(patches, (1, *new, patches.shape[-1]), 'cubic')
    return jnp.concatenate([table[:, :split], patches.reshape(1, new[0] * new[1], -1)], axis=1)


def resize_relative(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """A relative-position table (rows, heads) of the grid `old` for the grid `new`; the class token's rows stay.

    Bicubic with antialiasing over the offsets of rows and columns; the offset (0, 0) stays in the middle.
    """
    sizes = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]
    rows = sizes[0][0] * sizes[0][1]
    offsets = table[:rows].reshape(*sizes[0], -1)
    offsets = jax.image.resize(offsets, (*sizes[1], offsets.shape[-1]), 'cubic')
    return jnp.concatenate([offsets.reshape(sizes[1][0] * sizes[1][1], -1), table[rows:]])
