"""Attention on arrays: what a block does between its projections. B images, h heads, N queries, M keys, d features."""

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Conditioning:
    """What a block sees in addition to its input, and differs from batch to batch; None where there is none.

    Attributes:
      bias: float (h, N, N), the relative-position bias.
      masked: bool (B, N), where a mask token stands for a patch; False for prefix tokens.
      tokens: (B, N, D), the block's input as statistics read it: the input itself, or at a stack's first block the
        embedded tokens before positions are added.
      memory: (B, M, D'), the tokens that cross-attention reads. With it every block has a cross-attention.
    """

    bias: jax.Array | None = None
    masked: jax.Array | None = None
    tokens: jax.Array | None = None
    memory: jax.Array | None = None


# `attend(q, k, v, seen) -> (out, statistics)` with q, k, v (B, N or M, h, d), a Conditioning, and out like q. A block's
# field: hashable, known when the block is built.
Attend = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """Scaled dot-product attention.

    Attributes:
      implementation: of `jax.nn.dot_product_attention` ('xla', 'cudnn'), or None for plain matrix products.
    """

    implementation: str | None = None

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: Conditioning) -> tuple[jax.Array, dict]:
        if self.implementation:
            bias = None if seen.bias is None else seen.bias.astype(q.dtype)[None]
            scale = 1.0 / math.sqrt(q.shape[-1])
            return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation=self.implementation), {}
        products = logits(q, k)
        return weighted_values(products if seen.bias is None else products + seen.bias, v), {}


def logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled dot products, float32 (B, h, N, M), of q (B, N, h, d) and k (B, M, h, d)."""
    return 1.0 / math.sqrt(q.shape[-1]) * jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=jnp.float32)


def weighted_values(logits: jax.Array, v: jax.Array) -> jax.Array:
    """The values (B, M, h, d) weighted by the softmax of logits (B, h, N, M) over the keys: (B, N, h, d)."""
    return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
