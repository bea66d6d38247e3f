"""Methods of masked image modelling, behind one small protocol.

A method is one file with a `build(config) -> Method`. `config.method` names it: a bare name is a module of this
package ('mae'), a dotted one any importable module ('my_project.my_method').
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mto_jax import mto
from mto_jax.errors import UserError
from mto_jax.models import vit


@flax.struct.dataclass
class Output:
    """What a method computes from one batch.

    Attributes:
      losses: named float32 scalars; their sum is the method's own objective.
      predictions: (B, N, p * p * C), what the method predicts at each patch.
      target: (B, N, p * p * C), what it is compared with.
      mask: bool (B, N), True where a patch was hidden.
      stats: of blocks of the mask-bearing stack: what MTO's losses need, or with `everything` `mto.diagnosis` of each.
      embedded: (B, N, D) tokens that enter that stack, before positions.
    """

    losses: Mapping[str, jax.Array]
    predictions: jax.Array
    target: jax.Array
    mask: jax.Array
    stats: Mapping[int, Mapping[str, jax.Array]]
    embedded: jax.Array


class Method(nn.Module):
    """Base of all methods: a Flax module that sees normalised images (B, H, W, C).

    Subclasses define `__call__(images, *, noise=None, train=False, everything=False) -> Output` (random numbers from
    the streams 'mask' and 'dropout'; `noise` replaces the former), `encode(images, depth=None)` on whole images and
    `to_pixels(output, images)`.
    """

    @property
    def arch(self) -> vit.Architecture:
        """The encoder's architecture."""
        raise NotImplementedError  # pragma: no cover

    @property
    def settings(self) -> mto.Settings | None:
        """MTO's settings, or None."""
        raise NotImplementedError  # pragma: no cover

    @property
    def mask_depth(self) -> int:
        """Number of blocks of the stack that carries masked tokens."""
        return self.arch.depth

    def encode(self, images: jax.Array, depth: int | None = None) -> jax.Array:
        """Tokens (B, P + N, D) of whole images; after `depth` blocks, or all and the final norm."""
        raise NotImplementedError  # pragma: no cover

    def to_pixels(self, output: Output, images: jax.Array) -> jax.Array:
        """Predictions as patches of normalised pixels, (B, N, p * p * C)."""
        return output.predictions


def build(config) -> Method:
    """The method that `config.method` names.

    Raises:
      UserError: if there is no such module, it has no `build`, or that raises ValueError for a field.
    """
    name = config.method
    module_name = name if '.' in name else f'{__name__}.{name}'
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name and not module_name.startswith(e.name):
            raise
        raise UserError(
            f'method is {name!r}: no module {module_name}; use mae, simmim, or an importable module of your own'
        ) from None
    if not hasattr(module, 'build'):
        raise UserError(f'method is {name!r}: the module {module_name} has no build(config)')
    try:
        return module.build(config)
    except ValueError as e:
        raise UserError(str(e)) from e


def architecture(config) -> vit.Architecture:
    """The encoder that `config.model` and `config.data` describe. Explicit depth, width, heads override the size."""
    m = config.model
    if m.size not in vit.SIZES:
        raise ValueError(f'model.size is {m.size!r}; it must be one of {", ".join(vit.SIZES)}')
    depth, width, heads = vit.SIZES[m.size]
    return vit.Architecture(
        image_size=tuple(config.data.image_size),
        channels=config.data.channels,
        patch_size=m.patch_size,
        depth=m.depth or depth,
        width=m.width or width,
        heads=m.heads or heads,
        mlp_ratio=m.mlp_ratio,
        position=m.position,
        relative_bias=m.relative_bias,
        class_token=m.class_token,
        qkv_bias=m.qkv_bias,
        layer_scale=m.layer_scale,
        drop_path=m.drop_path,
        mask_token_scale=m.mask_token_scale,
        mask_token_norm=m.mask_token_norm,
        init=m.init,
        dtype=jnp.dtype(m.dtype),
        remat=m.remat,
        attention=m.attention or None,
    )


def mto_settings(config, depth: int) -> mto.Settings | None:
    """MTO's settings from `config.mto`, checked against the mask-bearing stack's depth; None where it is off."""
    if not config.mto.enabled:
        return None
    fields: dict[str, Any] = {f.name: config.mto[f.name] for f in dataclasses.fields(mto.Settings)}
    settings = mto.Settings(**fields | {'blocks': tuple(fields['blocks'])})
    settings.validate(depth)
    return settings
