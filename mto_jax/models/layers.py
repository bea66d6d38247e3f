"""Transformer layers. Parameters are float32; matrix products run in `dtype`; norms and softmax in float32."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax import mto

Dtype = Any
Initializer = Callable[..., jax.Array]


def trunc_normal_one_std(std: float = 0.02) -> Initializer:
    """A normal distribution cut at one standard deviation and not rescaled, as the BEiT family has it.

    Its real standard deviation is about 0.54 of the nominal one; jax's own truncated normal cuts at two and rescales.
    """

    def init(key, shape, dtype=jnp.float32):
        return std * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)

    return init


def flat_xavier(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform over the kernel flattened to (first axis, rest): the fused qkv matrix counts as one layer."""
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm with eps 1e-6, computed and returned in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


class DropPath(nn.Module):
    """Drop the whole residual branch of an image with probability `rate`; the others are divided by 1 - rate."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        keep = jax.random.bernoulli(self.make_rng('dropout'), 1.0 - self.rate, (x.shape[0], *[1] * (x.ndim - 1)))
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value matrix.

    Attributes:
      heads: number of heads.
      qkv_bias: which of queries, keys and values have a bias: 'qkv' (MAE), 'qv' (BEiT family) or ''.
      kernel_init, proj_init: initialisers of the fused and of the output matrix.
      implementation: of `jax.nn.dot_product_attention` ('xla', 'cudnn'), used where no hook needs the logits; None
        for plain matrix products.
    """

    heads: int
    qkv_bias: str = 'qkv'
    kernel_init: Initializer = flat_xavier
    proj_init: Initializer = flat_xavier
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        hook: mto.BlockHook | None,
        masked: jax.Array | None,
        tokens: jax.Array,
        num_prefix: int,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attend over x (B, N, D); returns (B, N, D) and the hook's statistics (empty without a hook)."""
        width = x.shape[-1]
        d = width // self.heads
        kernel = self.param('qkv_kernel', self.kernel_init, (width, 3, self.heads, d))
        qkv = jnp.einsum('bnc,cthd->tbnhd', x.astype(self.dtype), kernel.astype(self.dtype))
        q, k, v = (
            part + self.param(f'{name}_bias', nn.initializers.zeros, (self.heads, d)).astype(self.dtype)
            if name in self.qkv_bias
            else part
            for name, part in zip('qkv', qkv, strict=True)
        )
        scale = 1.0 / math.sqrt(d)
        stats = {}
        if hook is None and self.implementation:
            bias = None if bias is None else bias.astype(self.dtype)[None]
            out = jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation=self.implementation)
        else:

            def logits_of(keys):
                return scale * jnp.einsum('bqhd,bkhd->bhqk', q, keys, preferred_element_type=jnp.float32)

            logits = logits_of(k)
            if hook is not None:
                logits, stats = hook.apply(logits, bias, masked, tokens, num_prefix, logits_of, k)
            elif bias is not None:
                logits = logits + bias
            weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
            out = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
        out = out.reshape(*out.shape[:2], width)
        return nn.Dense(width, dtype=self.dtype, kernel_init=self.proj_init, name='proj')(out), stats


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP (exact GELU), with optional layer scale and drop path.

    Attributes:
      heads, mlp_ratio, qkv_bias: as in `vit.Architecture`.
      kernel_init, out_init: initialisers of the first and of the last matrix of both branches.
      layer_scale: initial value of the per-channel scale of each branch; 0 for none.
      drop_path: probability of dropping a branch.
    """

    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: str = 'qkv'
    kernel_init: Initializer = flat_xavier
    out_init: Initializer = flat_xavier
    layer_scale: float = 0.0
    drop_path: float = 0.0
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        masked: jax.Array | None,
        tokens: jax.Array,
        hook: mto.BlockHook | None,
        num_prefix: int,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, N, D) to (B, N, D), and the hook's statistics. `tokens` are what the hook sees as the block's input."""
        width = x.shape[-1]

        def branch(y, name):
            if self.layer_scale:
                gamma = self.param(f'gamma_{name}', nn.initializers.constant(self.layer_scale), (width,))
                y = y * gamma.astype(y.dtype)
            return DropPath(self.drop_path)(y, train)

        attention = Attention(
            self.heads,
            self.qkv_bias,
            self.kernel_init,
            self.out_init,
            self.implementation,
            self.dtype,
            name='attn',
        )
        y, stats = attention(layer_norm('norm1')(x), bias, hook, masked, tokens, num_prefix)
        x = x + branch(y, 'attn')
        hidden = int(width * self.mlp_ratio)
        y = nn.Dense(hidden, dtype=self.dtype, kernel_init=self.kernel_init, name='mlp_in')(layer_norm('norm2')(x))
        y = nn.Dense(width, dtype=self.dtype, kernel_init=self.out_init, name='mlp_out')(nn.gelu(y, approximate=False))
        return x + branch(y, 'mlp'), stats
