"""Methods of masked image modelling, behind one small protocol.

A method is one file with a `build(config) -> Method`. `config.method` names it: a module of this package ('mae'), or
any other that can be imported ('my_method', 'my_project.my_method').
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mto_jax import masking, mto
from mto_jax.errors import UserError
from mto_jax.losses import patchify, unpatchify
from mto_jax.models import vit

View = Callable[[jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Clock:
    """Where a training stands. Integers, so that what changes per epoch changes at the right step.

    Attributes:
      step: int32 scalar, updates made before this one.
      total: updates of the training.
      steps_per_epoch: as it says.
    """

    step: jax.Array
    total: int = flax.struct.field(pytree_node=False)
    steps_per_epoch: int = flax.struct.field(pytree_node=False)

    @property
    def epoch(self) -> jax.Array:
        """Epochs completed, int32."""
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> jax.Array:
        """Fraction of the training, float32 in [0, 1)."""
        return self.step.astype(jnp.float32) / self.total


@flax.struct.dataclass
class Stack:
    """One stack of blocks whose input contains mask tokens, as MTO reads it.

    Attributes:
      masked: bool (B, N), True where a patch is hidden.
      embedded: (B, N, D) patch tokens that enter it, before positions.
      blocks: statistics of the blocks that were read, by block index.
      depth: number of blocks.
    """

    masked: jax.Array
    embedded: jax.Array
    blocks: Mapping[int, Mapping[str, jax.Array]]
    depth: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Result:
    """What a method computes from one batch.

    Attributes:
      losses: named float32 scalars, unweighted.
      stacks: the mask-bearing stacks, by name.
      weights: of the losses, scalars; 1 where absent.
      logs: further scalars to log.
      statistics: of the batch, for `Method.after_update`: a pytree of arrays, averaged over the microbatches of an
        update like its gradients.
      predictions: (B, N, K), for `SingleModule`'s pictures: what is predicted at each patch.
      mask: bool (B, N), for the same: where patches are hidden.
    """

    losses: Mapping[str, jax.Array]
    stacks: Mapping[str, Stack]
    weights: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    logs: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    statistics: Any = flax.struct.field(default_factory=dict)
    predictions: jax.Array | None = None
    mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: static choices, no arrays. Images are normalised floats (B, H, W, C).

    Attributes:
      arch: the encoder's architecture.
      mto: MTO's settings, or None.
      watch: for the diagnosis: return all of MTO's statistics of every block instead of those that the losses need, and
        do not drop paths.
    """

    arch: vit.Architecture
    mto: mto.Settings | None
    watch: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def views(self) -> Mapping[str, View | None]:
        """The views of each image that `loss` gets, by name: made on the device after the shared crop and flip by
        `(key, float images in [0, 1]) -> images in [0, 1]`; None for the images as they are."""
        return {'image': None}

    @property
    def tensor_axes(self) -> Sequence[tuple[str, int | None]]:
        """(pattern, axis) for matrices that the mesh axis 'tensor' splits, or with None copies: for full parameter
        paths behind a slash, before those of `parallel.TENSOR_AXES`. Needed for large ones that none of these matches.
        """
        return ()

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh (params, model_state): float32 parameters, of which params['encoder'] is what evaluations encode with,
        and what else the method carries from step to step (a teacher, running statistics), {} where nothing."""
        raise NotImplementedError  # pragma: no cover

    def loss(
        self,
        params: Any,
        model_state: Any,
        views: Mapping[str, jax.Array],
        key: jax.Array,
        clock: Clock,
        *,
        noise: Any = None,
    ) -> Result:
        """The losses of one batch, in training mode. `noise` replaces the random numbers of the mask: an array, or what
        else the method's masks take."""
        raise NotImplementedError  # pragma: no cover

    def after_update(self, params: Any, model_state: Any, statistics: Any, clock: Clock) -> Any:
        """The model state for the next step: called once per optimizer update, however many microbatches it took.

        Args:
          params: after the update.
          model_state: as the losses saw it.
          statistics: the mean of `Result.statistics` over the microbatches.
          clock: of the update.
        """
        del params, statistics, clock
        return model_state

    def encode(
        self, params: Any, images: jax.Array, *, depth: vit.Depth = None, train: bool = False, key=None
    ) -> jax.Array:
        """Tokens (B, P + N, D) of full images; after `depth` blocks, or all and the final norm.

        Args:
          depth: as for `vit.ViT`: a tuple of depths gives a tuple of tokens.
          train: apply drop path, with random numbers from `key`.
        """
        raise NotImplementedError  # pragma: no cover

    def pictures(
        self, params: Any, model_state: Any, images: jax.Array, key: jax.Array, clock: Clock
    ) -> Mapping[str, jax.Array]:
        """Normalised images (B, H, W, C) to look at, by name; NaN where pixels are hidden."""
        del params, model_state, images, key, clock
        return {}


class SingleModule(Method):
    """A method of one Linen module, `self.module`, without model state unless it adds some.

    The module has `__call__(images, *, noise, train, progress=None) -> Result`, where progress is the fraction of the
    training that is over, with random numbers from the streams 'mask' and 'dropout'; `encode(images, depth, train)`; a
    submodule named `encoder`; and `to_pixels(result, images)`.
    """

    @property
    def module(self) -> nn.Module:
        raise NotImplementedError  # pragma: no cover

    def init(self, key):
        images = jnp.zeros((1, *self.arch.image_size, self.arch.channels), jnp.float32)
        rngs = dict(zip(('params', 'mask', 'dropout'), jax.random.split(key, 3), strict=True))
        return self.module.init(rngs, images, noise=None, train=False)['params'], {}

    def loss(self, params, model_state, views, key, clock, *, noise=None):
        del model_state
        return self._apply(params, views['image'], key, noise, train=not self.watch, progress=clock.progress)

    def _apply(self, params, images, key, noise=None, train=False, **inputs) -> Result:
        rngs = dict(zip(('mask', 'dropout'), jax.random.split(key), strict=True))
        return self.module.apply({'params': params}, images, noise=noise, train=train, **inputs, rngs=rngs)

    def encode(self, params, images, *, depth=None, train=False, key=None):
        rngs = {'dropout': key} if train else {}
        # The encoder alone: a fine-tuned one has no decoder or head.
        variables = {'params': {'encoder': params['encoder']}}
        return self.module.apply(variables, images, depth, train, method='encode', rngs=rngs)

    def pictures(self, params, model_state, images, key, clock):
        a = self.arch
        result = self._apply(params, images, key, progress=clock.progress)
        true = patchify(images, a.patch_size)
        hidden = result.mask[..., None]
        predicted = self.module.apply({}, result, images, method='to_pixels')
        # The true patches where visible: only the hidden ones were predicted with a loss.
        shown = {'original': true, 'masked': jnp.where(hidden, jnp.nan, true)}
        shown['reconstruction'] = jnp.where(hidden, predicted, true)
        return {name: unpatchify(patches, a.grid, a.patch_size) for name, patches in shown.items()}


def build(config) -> Method:
    """The method that `config.method` names.

    Raises:
      UserError: if there is no such module, it has no `build`, or the config does not describe one of its methods.
    """
    name = config.method
    shipped = f'{__name__}.{name}'
    module_name = name if '.' in name or not importlib.util.find_spec(shipped) else shipped
    try:
        if not all(part.isidentifier() for part in name.split('.')):
            raise ModuleNotFoundError(name=module_name)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if not f'{module_name}.'.startswith(f'{e.name}.'):
            raise  # it is there, and lacks another
        raise UserError(
            f'method is {name!r}: no module {module_name}; use mae, simmim, bootmae, conmim, encoder, or a module '
            'of your own: a file next to main.py or on PYTHONPATH'
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
        norm_eps=m.norm_eps,
        drop_path=m.drop_path,
        mask_token_scale=m.mask_token_scale,
        mask_token_norm=m.mask_token_norm,
        init=m.init,
        dtype=jnp.dtype(m.dtype),
        residual_dtype=jnp.dtype(m.residual_dtype) if m.residual_dtype else None,
        remat=m.remat,
        attention=m.attention,
    )


def check_units(grid: tuple[int, int], field: str, unit: int, mask_ratio: float) -> None:
    """Raise ValueError where masked units of `unit` patches, the value of `field`, do not fit the grid or the ratio."""
    if grid[0] % unit or grid[1] % unit:
        raise ValueError(f'{field} is {unit} patches; it must divide the grid of {grid} patches')
    units, masked = grid[0] * grid[1] // unit**2, masking.num_masked_units(grid, unit, mask_ratio)
    most = units - (2 if unit == 1 else 1)  # MTO's statistics need two visible patches
    if not 1 <= masked <= most:
        raise ValueError(f'mask_ratio is {mask_ratio}: {masked} of {units} units are hidden; it must be 1 to {most}')


def check_visible(config, arch: vit.Architecture) -> int:
    """How many patches stay visible to an encoder that sees no others.

    Raises:
      ValueError: if it is all of them, or fewer than the two that MTO's statistics need.
    """
    if arch.relative_bias:
        raise ValueError('model.relative_bias is True; it must be False for an encoder that sees only visible patches')
    keep = masking.num_visible(arch.num_patches, config.mask_ratio)
    if not 2 <= keep < arch.num_patches:
        raise ValueError(
            f'mask_ratio is {config.mask_ratio}: of {arch.num_patches} patches {keep} stay visible; '
            f'it must be 2 to {arch.num_patches - 1}'
        )
    return keep


def moved(old: Any, new: Any, rate: jax.Array | float) -> Any:
    """The tree `old`, moved by a fraction `rate` of its distance towards `new`: a moving average's next value."""
    # A rate rather than a decay: in float32, 1 - 0.99999 is off by a thousandth.
    return jax.tree.map(lambda a, b: a + rate * (b - a), old, new)


def mto_settings(config, depth: int) -> mto.Settings | None:
    """MTO's settings from `config.mto`, checked against the mask-bearing stack's depth; None where it is off."""
    if not config.mto.enabled:
        return None
    fields: dict[str, Any] = {f.name: config.mto[f.name] for f in dataclasses.fields(mto.Settings)}
    settings = mto.Settings(**fields | {name: tuple(fields[name]) for name in ('blocks', 'fade')})
    settings.validate(depth)
    return settings


def attends(method: Method, arch: vit.Architecture) -> tuple[mto.MaskedAttention | None, ...] | None:
    """What MTO does in the blocks of a mask-bearing stack of `method`: `vit.Transformer.attends`."""
    return mto.attends(method.mto, arch.depth, arch.num_prefix, method.watch, arch.attention)
