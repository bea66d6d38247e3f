"""What stands on an encoder's tokens to tell classes apart: the head of a fine-tuning, and those of probes."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mto_jax.models.layers import BatchNorm, layer_norm


class Head(nn.Module):
    """From tokens to logits, for an encoder that is trained with it.

    Attributes:
      num_classes: of the logits.
      num_prefix: how many tokens are no patches.
      pool: 'fc_norm' is the mean of the patch tokens, then a norm; 'mean' that mean; 'class' the class token.
      scale: standard deviation of the kernel's initial values.
      norm_eps: of that norm.
    """

    num_classes: int
    num_prefix: int
    pool: str
    scale: float
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens (B, P + N, D) to float32 logits (B, classes)."""
        x = pooled(tokens, self.num_prefix, self.pool)
        if self.pool == 'fc_norm':
            x = layer_norm('fc_norm', self.norm_eps)(x)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(self.scale), name='linear')(x)


class Probe(nn.Module):
    """From a frozen encoder's tokens to logits: batch normalisation without scale and shift, and a linear layer.

    Attributes:
      kind: 'linear': of the pooled token (He et al., arXiv 2111.06377, A.1); 'attentive': of what one learned query
        gathers from all tokens by multi-head cross-attention (AIM, arXiv 2401.08541, 3.3); 'dense': of each patch.
      num_classes, num_prefix: as in `Head`.
      pool: for 'linear': 'class', 'mean', or 'fc_norm', that mean and then a norm without scale and shift, as BootMAE's
        official probe has it.
      heads: of the attention, for 'attentive'.
    """

    kind: str
    num_classes: int
    num_prefix: int
    pool: str
    heads: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, group: int, running: Mapping[str, jax.Array] | None = None
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Tokens (B, P + N, D) to float32 logits (B, classes), for 'dense' (B, N, classes), and the batch's moments.

        Args:
          group, running: as for `BatchNorm`.
        """
        if self.kind == 'linear':
            tokens = pooled(tokens, self.num_prefix, self.pool)[:, None]
            if self.pool == 'fc_norm':
                tokens = nn.LayerNorm(1e-6, use_bias=False, use_scale=False, name='fc_norm')(tokens)
        elif self.kind == 'dense':
            tokens = tokens[:, self.num_prefix :]
        x, moments = BatchNorm(affine=False, eps=1e-6, name='norm')(tokens, group, running)
        if self.kind == 'attentive':
            x = AttentionPool(self.heads, name='pool')(x)
        x = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name='linear')(x)
        return x if self.kind == 'dense' else x[:, 0], moments


class AttentionPool(nn.Module):
    """One learned query attends to all tokens; neither it nor the output is projected.

    Attributes:
      heads: number of heads.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, N, D) to (B, 1, D)."""
        width = x.shape[-1]
        shape = (width, self.heads, width // self.heads)
        init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', (0,), (1, 2))  # PyTorch's default
        keys, values = (
            jnp.einsum('bnc,chd->bnhd', x, self.param(f'{name}_kernel', init, shape)) for name in ('key', 'value')
        )
        query = self.param('query', nn.initializers.normal(0.02), shape[1:])
        attention = jax.nn.softmax(jnp.einsum('hd,bnhd->bhn', query, keys) / math.sqrt(shape[2]), axis=-1)
        return jnp.einsum('bhn,bnhd->bhd', attention, values).reshape(len(x), 1, width)


def pooled(tokens: jax.Array, num_prefix: int, pool: str) -> jax.Array:
    """One float32 vector (B, D) of tokens (B, P + N, D): the class token for 'class', else the mean of the patches."""
    tokens = tokens.astype(jnp.float32)
    return tokens[:, 0] if pool == 'class' else tokens[:, num_prefix:].mean(1)
