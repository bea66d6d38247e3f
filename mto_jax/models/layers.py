"""Transformer layers. Parameters are float32; matrix products run in `dtype`; norms and softmax in float32."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax.attention import Attend, Conditioning, DotProduct

RUNNING_RATE = 0.1  # of batch normalisation's running statistics, as PyTorch's `momentum`
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


def split_xavier(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform for a fused kernel (inputs, parts, heads, d): each part counts as one layer, as in BootMAE."""
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[2:])))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def layer_norm(name: str, eps: float) -> nn.LayerNorm:
    """LayerNorm, computed and returned in float32; `eps` is added to the variance."""
    return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, name=name)


class BatchNorm(nn.Module):
    """Batch normalisation in float32: over all tokens of each group of images, or with running statistics.

    Attributes:
      affine: scale and shift the result.
      eps: added to the variance.
    """

    affine: bool
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, group: int, running: Mapping[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, T, D), with `group` dividing B, to float32 (B, T, D) and its moments (D,), means over the groups.

        The variance among the moments is the unbiased one, as PyTorch's running variance is.

        Args:
          running: moments to normalise with instead of x's own, which are then not taken.
        """
        images, tokens, width = x.shape

        def over_groups(values):
            # Each image by itself first: where a group straddles devices, only (B, D) values travel between them.
            return values.mean(1).reshape(-1, group, width).mean(1)

        def to_images(moments):
            spread = jnp.broadcast_to(moments[:, None], (images // group, group, width))
            return spread.reshape(images, 1, width)

        x, moments = x.astype(jnp.float32), {}
        if running is not None:
            x = (x - running['mean']) * jax.lax.rsqrt(running['var'] + self.eps)
        else:
            mean = over_groups(x)
            x = x - to_images(mean)
            var = over_groups(jnp.square(x))
            x = x * to_images(jax.lax.rsqrt(var + self.eps))
            count = group * tokens
            moments = {'mean': mean.mean(0), 'var': var.mean(0) * (count / max(count - 1, 1))}
        if self.affine:
            scale = self.param('scale', nn.initializers.ones, (width,))
            x = x * scale + self.param('bias', nn.initializers.zeros, (width,))
        return x, moments


class DropPath(nn.Module):
    """Drop the full residual branch of an image with probability `rate`; the others are divided by 1 - rate."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        keep = jax.random.bernoulli(self.make_rng('dropout'), 1.0 - self.rate, (x.shape[0], *[1] * (x.ndim - 1)))
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of the tokens to each other (one fused query-key-value matrix), or to a memory.

    Attributes:
      heads: number of heads.
      qkv_bias: which of queries, keys and values have a bias: 'qkv' (MAE), 'qv' (BEiT family) or ''.
      kernel_init, proj_init: initialisers of the input matrices and of the output matrix.
      qkv_init: of the fused matrix of self-attention; None for kernel_init.
      head_width: features per head; 0 for the width over the heads.
      attend: what is done with queries, keys and values.
    """

    heads: int
    qkv_bias: str = 'qkv'
    kernel_init: Initializer = flat_xavier
    proj_init: Initializer = flat_xavier
    qkv_init: Initializer | None = None
    head_width: int = 0
    attend: Attend = DotProduct()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, seen: Conditioning, memory: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, N, D) to (B, N, D), attending to x or to memory (B, M, D'); and the statistics of `attend`."""
        width = x.shape[-1]
        d = self.head_width or width // self.heads

        def project(source, names):
            shape = (source.shape[-1], len(names), self.heads, d)
            init = (self.qkv_init if names == 'qkv' else None) or self.kernel_init
            kernel = self.param(f'{names}_kernel', init, shape)
            parts = jnp.einsum('bnc,cthd->tbnhd', source.astype(self.dtype), kernel.astype(self.dtype))
            return [
                part + self.param(f'{name}_bias', nn.initializers.zeros, shape[2:]).astype(self.dtype)
                if name in self.qkv_bias
                else part
                for name, part in zip(names, parts, strict=True)
            ]

        q, k, v = project(x, 'qkv') if memory is None else (*project(x, 'q'), *project(memory, 'kv'))
        out, stats = self.attend(q, k, v, seen)
        out = out.reshape(*out.shape[:2], -1)
        return nn.Dense(width, dtype=self.dtype, kernel_init=self.proj_init, name='proj')(out), stats


class Block(nn.Module):
    """Pre-norm transformer block: attention, cross-attention where there is a memory, and MLP (exact GELU).

    Attributes:
      heads, mlp_ratio, qkv_bias, norm_eps: as in `vit.Architecture`.
      kernel_init, out_init: initialisers of the first and of the last matrix of each branch.
      qkv_init, head_width: as in `Attention`.
      layer_scale: initial value of the per-channel scale of each branch; 0 for none.
      drop_path: probability of dropping a branch.
      attend: what is done with queries, keys and values of the self-attention.
      cross_attend: the same of the cross-attention.
    """

    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: str = 'qkv'
    kernel_init: Initializer = flat_xavier
    out_init: Initializer = flat_xavier
    qkv_init: Initializer | None = None
    head_width: int = 0
    layer_scale: float = 0.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    attend: Attend = DotProduct()
    cross_attend: Attend = DotProduct()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, seen: Conditioning, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x (B, N, D) to (B, N, D), and the statistics of `attend`."""
        width = x.shape[-1]
        norm = partial(layer_norm, eps=self.norm_eps)

        def branch(y, name):
            if self.layer_scale:
                gamma = self.param(f'gamma_{name}', nn.initializers.constant(self.layer_scale), (width,))
                y = y.astype(x.dtype) * gamma.astype(x.dtype)
            return DropPath(self.drop_path)(y, train)

        def attention(name, attend):
            inits = {'kernel_init': self.kernel_init, 'proj_init': self.out_init, 'qkv_init': self.qkv_init}
            parts = {'head_width': self.head_width, 'attend': attend, 'dtype': self.dtype}
            return Attention(self.heads, self.qkv_bias, **inits, **parts, name=name)

        y, stats = attention('attn', self.attend)(norm('norm1')(x), seen)
        x = x + branch(y, 'attn')
        if seen.memory is not None:
            queries, memory = norm('norm_queries')(x), norm('norm_memory')(seen.memory)
            y, _ = attention('cross_attn', self.cross_attend)(queries, Conditioning(), memory)
            x = x + branch(y, 'cross_attn')
        hidden = int(width * self.mlp_ratio)
        y = nn.Dense(hidden, dtype=self.dtype, kernel_init=self.kernel_init, name='mlp_in')(norm('norm2')(x))
        y = nn.Dense(width, dtype=self.dtype, kernel_init=self.out_init, name='mlp_out')(nn.gelu(y, approximate=False))
        return x + branch(y, 'mlp'), stats
