"""The Vision Transformer that every method shares: a stack of blocks, and an image encoder around it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mto_jax import losses
from mto_jax.attention import Attend, Conditioning, DotProduct
from mto_jax.models import position
from mto_jax.models.layers import Block, flat_xavier, layer_norm, split_xavier, trunc_normal_one_std
from mto_jax.runtime import parallel

# depth, width, heads
SIZES = {
    'nano': (6, 64, 4),
    'micro': (6, 128, 4),
    'ti': (12, 192, 3),
    's': (12, 384, 6),
    'b': (12, 768, 12),
    'l': (24, 1024, 16),
    'h': (32, 1280, 16),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Static hyper-parameters of an encoder.

    Attributes:
      image_size: (height, width) in pixels; both divide by patch_size.
      channels: of the images.
      patch_size: side of a patch in pixels.
      depth, width, heads: of the stack.
      mlp_ratio: hidden over model width.
      head_width: features per head; 0 for width / heads, which must then be an integer.
      position: 'sincos' (fixed, columns first), 'sincos_rows' (fixed, rows first), 'learned', or 'none'.
      relative_bias: add one relative-position bias table, shared by all blocks.
      class_token: prepend a class token.
      qkv_bias: which of queries, keys, values have a bias.
      layer_scale: initial value, 0 for none.
      norm_eps: added to the variance in every LayerNorm.
      drop_path: rate of the last block; it grows linearly from 0.
      mask_token_scale: factor of the mask token's initial value.
      mask_token_norm: length that the mask token is scaled to; 0 leaves it free.
      init: 'mae' (Xavier uniform, normal tokens), 'beit' (normals cut at one deviation, scaled with depth), or
        'bootmae' (Xavier uniform, queries, keys and values apart; class token nearly 0, mask token as in 'beit').
      dtype: of matrix products; parameters are float32.
      residual_dtype: of what runs from block to block; None for dtype.
      remat: recompute each block in the backward pass.
      attention: implementation, as for `attention.kernel`.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    head_width: int = 0
    position: str = 'sincos'
    relative_bias: bool = False
    class_token: bool = True
    qkv_bias: str = 'qkv'
    layer_scale: float = 0.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    mask_token_scale: float = 1.0
    mask_token_norm: float = 0.0
    init: str = 'mae'
    dtype: Any = jnp.float32
    residual_dtype: Any = None
    remat: bool = False
    attention: str = ''

    def __post_init__(self):
        for side, pixels in zip(('height', 'width'), self.image_size, strict=True):
            if pixels % self.patch_size:
                raise ValueError(
                    f'data.image_size: {side} {pixels} is not a multiple of model.patch_size {self.patch_size}'
                )
        if self.width % self.heads and not self.head_width:
            raise ValueError(
                f'width {self.width} is not a multiple of {self.heads} heads (model.width and model.heads, or '
                'mae.decoder_width and mae.decoder_heads)'
            )
        if self.position.startswith('sincos') and self.width % 4:
            raise ValueError(
                f'width {self.width} is not a multiple of 4, which sine-cosine positions need (model.width, '
                'mae.decoder_width, or bootmae.decoder_width)'
            )
        for name, value, allowed in (
            ('position', self.position, ('sincos', 'sincos_rows', 'learned', 'none')),
            ('init', self.init, ('mae', 'beit', 'bootmae')),
            ('qkv_bias', self.qkv_bias, ('qkv', 'qv', '')),
        ):
            if value not in allowed:
                raise ValueError(f'model.{name} is {value!r}; it must be one of {allowed}')

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        return int(self.class_token)

    @property
    def stream_dtype(self):
        """Of what runs from block to block, from the sum with the positions on."""
        return self.residual_dtype or self.dtype

    @property
    def weight_init(self):
        return trunc_normal_one_std() if self.init == 'beit' else flat_xavier

    @property
    def qkv_init(self):
        return split_xavier if self.init == 'bootmae' else self.weight_init

    @property
    def mask_token_init(self):
        return nn.initializers.normal(0.02) if self.init == 'mae' else trunc_normal_one_std()

    @property
    def cls_token_init(self):
        return nn.initializers.normal(1e-6) if self.init == 'bootmae' else self.mask_token_init


Depth = int | None | tuple[int | None, ...]


@flax.struct.dataclass
class Encoded:
    """Output of a stack or an encoder.

    Attributes:
      tokens: (B, P + N, D), prefix tokens first; of several depths, a tuple of such.
      stats: by block index, the statistics of each block whose `attend` returns any.
      taps: by block index, the output (B, P + N, D) of the chosen blocks.
      embedded: (B, N, D) patch tokens, mask tokens in place, before positions; None where nothing is masked.
    """

    tokens: jax.Array
    stats: Mapping[int, Mapping[str, jax.Array]]
    taps: Mapping[int, jax.Array]
    embedded: jax.Array | None = None


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
      arch: depth, width and kind of the blocks.
      attends: what each block does with queries, keys and values where tokens are masked; None, for a block or for
        all, is plain attention.
      taps: blocks whose output is returned.
    """

    arch: Architecture
    attends: tuple[Attend | None, ...] | None = None
    taps: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, seen: Conditioning, *, train: bool = False, depth: Depth = None) -> Encoded:
        """Apply the blocks to x (B, P + N, D).

        Args:
          seen: what all blocks see; its `tokens` are for the first.
          train: apply drop path.
          depth: apply the first blocks only; several numbers, for the tokens after each.
        """
        a, stats, taps = self.arch, {}, {}
        x = x.astype(a.stream_dtype)
        several = isinstance(depth, tuple)
        after = [a.depth if d is None else d for d in (depth if several else (depth,))]
        found = {0: x}
        plain = DotProduct(a.attention)
        attends = (self.attends if seen.masked is not None else None) or (None,) * a.depth
        block_class = nn.remat(Block, static_argnums=(3,)) if a.remat else Block
        for i in range(max(after)):
            block = block_class(
                heads=a.heads,
                mlp_ratio=a.mlp_ratio,
                qkv_bias=a.qkv_bias,
                kernel_init=a.weight_init,
                out_init=trunc_normal_one_std(0.02 / math.sqrt(2 * (i + 1))) if a.init == 'beit' else a.weight_init,
                qkv_init=a.qkv_init,
                head_width=a.head_width,
                layer_scale=a.layer_scale,
                norm_eps=a.norm_eps,
                drop_path=a.drop_path * i / max(a.depth - 1, 1),
                attend=attends[i] or plain,
                cross_attend=plain,
                dtype=a.dtype,
                name=f'block{i}',
            )
            x = parallel.constrain_batch(x)
            tokens = seen.tokens if i == 0 and seen.tokens is not None else x
            x, read = block(x, seen.replace(tokens=tokens, inputs=x), train)
            if read:
                stats[i] = read
            if i in self.taps:
                taps[i] = x
            if i + 1 in after:
                found[i + 1] = x
        tokens = tuple(found[n] for n in after)
        return Encoded(tokens if several else tokens[0], stats, taps)


class ViT(nn.Module):
    """An image encoder. Masked patches are either left out (`ids_keep`) or replaced by a mask token (`mask`).

    Attributes:
      arch, attends, taps: as in `Transformer`.
    """

    arch: Architecture
    attends: tuple[Attend | None, ...] | None = None
    taps: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        ids_keep: jax.Array | None = None,
        mask: jax.Array | None = None,
        train: bool = False,
        depth: Depth = None,
        progress: jax.Array | None = None,
    ) -> Encoded:
        """Encode images (B, H, W, C), normalised floats.

        Args:
          ids_keep: int (B, K), the patches to encode (MAE).
          mask: bool (B, N), the patches that a mask token stands for (SimMIM); creates that parameter.
          train: apply drop path.
          depth: stop after this many blocks, without the final norm; None for all blocks and the norm; a tuple of such
            for the tokens of each in one pass.
          progress: as in `Conditioning`.

        Raises:
          ValueError: where the images are not of the size the encoder was built for.
        """
        a = self.arch
        if images.shape[1:] != (*a.image_size, a.channels):
            raise ValueError(
                f'the encoder is built for images of {(*a.image_size, a.channels)}, got {images.shape[1:]}'
            )
        patches = losses.patchify(images, a.patch_size).astype(a.dtype)
        patch_kwargs = {'dtype': a.dtype, 'kernel_init': a.weight_init, 'name': 'patch_embed'}
        if a.init == 'mae':
            # The official convolution keeps PyTorch's default bias, uniform in 1 / sqrt(fan in).
            patch_kwargs['bias_init'] = torch_default_bias(patches.shape[-1])
        x = nn.Dense(a.width, **patch_kwargs)(patches)
        if mask is not None:
            x = jnp.where(mask[..., None], mask_token(self), x)
        embedded = x
        x = x.astype(a.stream_dtype)

        cls = self.param('cls_token', a.cls_token_init, (1, 1, a.width)) if a.class_token else None
        if a.position.startswith('sincos'):
            x = x + jnp.asarray(position.sincos_2d(a.grid, a.width, a.position == 'sincos_rows'), x.dtype)
        elif a.position == 'learned':
            table = self.param('pos_embed', trunc_normal_one_std(), (1, a.num_prefix + a.num_patches, a.width))
            x = x + table[:, a.num_prefix :].astype(x.dtype)
            cls = None if cls is None else cls + table[:, : a.num_prefix]
        if ids_keep is not None:
            x = jnp.take_along_axis(x, ids_keep[..., None], axis=1)
        x = prepend(cls, x)

        bias = None
        if a.relative_bias:
            shape = (position.num_relative_distances(a.grid), a.heads)
            table = self.param('relative_bias_table', nn.initializers.zeros, shape)
            bias = table[position.relative_index(a.grid, a.num_prefix)].transpose(2, 0, 1)
        seen = Conditioning(bias=bias, progress=progress)
        if mask is not None:
            seen = seen.replace(masked=prefix_false(mask, a.num_prefix), tokens=prepend(cls, embedded))
        out = Transformer(a, self.attends, self.taps, name='blocks')(x, seen, train=train, depth=depth)
        norm = layer_norm('norm', a.norm_eps)  # has parameters only where it is applied

        def finished(x, depth):
            return norm(x).astype(a.dtype) if depth is None else x

        several = isinstance(depth, tuple)
        tokens = tuple(map(finished, out.tokens, depth)) if several else finished(out.tokens, depth)
        return out.replace(tokens=tokens, embedded=embedded if mask is not None else None)


def resized(params: Mapping[str, Any], old: Architecture, new: Architecture) -> Mapping[str, Any]:
    """An encoder's parameters for images of another size: what is learned per position is interpolated."""
    if old.grid == new.grid:
        return params
    out = dict(params)
    if 'pos_embed' in params:
        out['pos_embed'] = position.resize_learned(params['pos_embed'], old.grid, new.grid)
    if 'relative_bias_table' in params:
        out['relative_bias_table'] = position.resize_relative(params['relative_bias_table'], old.grid, new.grid)
    return out


def mask_token(module: nn.Module) -> jax.Array:
    """The learnable mask token (1, 1, D) of a module, as its `arch` says; called inside its compact method."""
    a = module.arch

    def init(*args):
        token = a.mask_token_init(*args)
        return token if a.mask_token_scale == 1.0 else a.mask_token_scale * token

    token = module.param('mask_token', init, (1, 1, a.width))
    if a.mask_token_norm:
        token = token * (a.mask_token_norm / jnp.linalg.norm(token))
    return token.astype(a.dtype)


def torch_default_bias(fan_in: int):
    """PyTorch's default bias of a linear layer or convolution: uniform within 1 / sqrt(fan in)."""

    def init(key, shape, dtype=jnp.float32):
        bound = 1.0 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def prepend(cls: jax.Array | None, x: jax.Array) -> jax.Array:
    """x (B, N, D) behind a class token (1, 1, D), or alone where that is None."""
    if cls is None:
        return x
    return jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], *cls.shape[1:])), x], axis=1)


def prefix_false(mask: jax.Array, num_prefix: int) -> jax.Array:
    """mask (B, N) with False for the prefix tokens in front."""
    return jnp.pad(mask, ((0, 0), (num_prefix, 0)))
