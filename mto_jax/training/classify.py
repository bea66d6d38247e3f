"""Classification as an objective: an encoder and a linear head, trained with the field's regularisation or without."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mto_jax.data import augment, mix
from mto_jax.errors import UserError
from mto_jax.methods import Method, moved
from mto_jax.models.heads import Head


@dataclasses.dataclass(frozen=True)
class Classification:
    """An objective for `train_state.make_train_step`: uint8 images and labels to a cross-entropy.

    Attributes:
      method: whose encoder it is.
      num_classes: of the head.
      mean, std: of the pixels in [0, 1], per channel.
      flip: mirror images at random.
      pool, head_scale: of `Head`.
      smoothing: of the labels.
      erase: probability with which an image loses a rectangle.
      mixes: how the images of a batch are mixed; None: they are not.
      ema: decay of the averaged parameters, which are the model state; 0: none.
      fresh: of a key, a fresh encoder's parameters; None: the method's.
    """

    method: Method
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    flip: bool
    pool: str = 'mean'
    head_scale: float = 0.01
    smoothing: float = 0.0
    erase: float = 0.0
    mixes: mix.Mix | None = None
    ema: float = 0.0
    fresh: Callable[[jax.Array], Any] | None = None
    constants = {}  # noqa: RUF012
    score = 'top1'

    def __post_init__(self):
        if self.pool == 'class' and not self.method.arch.class_token:
            raise UserError("classify.pool is 'class' but the model has no class token (model.class_token)")

    @property
    def tensor_axes(self):
        return self.method.tensor_axes

    @property
    def head(self) -> Head:
        arch = self.method.arch
        return Head(self.num_classes, arch.num_prefix, self.pool, self.head_scale, arch.norm_eps)

    def init(self, key):
        encoder_key, head_key = jax.random.split(key)
        encoder = self.fresh(encoder_key) if self.fresh else self.method.init(encoder_key)[0]['encoder']
        return self.begin(encoder, head_key)

    def begin(self, encoder, key: jax.Array):
        """(params, model_state) of an encoder's parameters and a fresh head."""
        if self.pool == 'fc_norm':  # the head's norm stands in for the encoder's last one
            encoder = {name: value for name, value in encoder.items() if name != 'norm'}
        width = self.method.arch.width
        head = self.head.init(key, jnp.zeros((1, self.method.arch.num_prefix + 1, width)))['params']
        params = {'encoder': encoder, 'head': head}
        return params, {'ema': params} if self.ema else {}

    def logits(self, params, images: jax.Array, **how) -> jax.Array:
        """Float32 (B, classes) of normalised images (B, H, W, C); `how` as for `Method.encode`."""
        depth = self.method.arch.depth if self.pool == 'fc_norm' else None  # without the encoder's norm
        tokens = self.method.encode(params, images, depth=depth, **how)
        return self.head.apply({'params': params['head']}, tokens)

    def loss(self, params, model_state, constants, batch, key, clock):
        del model_state, constants, clock
        flip_key, erase_key, mix_key, key = jax.random.split(key, 4)
        images = augment.random_flip(flip_key, batch['image']) if self.flip else batch['image']
        images = augment.normalize(images, self.mean, self.std)
        if self.erase:
            images = mix.random_erase(erase_key, images, self.erase)
        targets = mix.soft_labels(batch['label'], self.num_classes, self.smoothing)
        if self.mixes:
            images, targets = self.mixes(mix_key, images, targets)
        logits = self.logits(params, images, train=True, key=key)
        return optax.softmax_cross_entropy(logits, targets).mean(), ({}, {})

    def after_update(self, params, model_state, statistics, clock):
        del statistics, clock
        return {name: moved(average, params, 1 - self.ema) for name, average in model_state.items()}

    def sums(self, params, model_state, constants, batch) -> Mapping[str, jax.Array]:
        """Of a batch with 'valid', what `scores` reads the sum of; of the averaged parameters where there are any."""
        del constants
        images = augment.normalize(batch['image'], self.mean, self.std)
        return counts(self.logits(model_state.get('ema', params), images), batch['label'], batch['valid'])

    def scores(self, totals: Mapping[str, np.ndarray]) -> dict[str, float]:
        """{'top1', 'top5', 'loss'} of summed `sums`."""
        return shares(totals)


def build(config, method: Method, fresh: Callable[[jax.Array], Any] | None = None) -> Classification:
    """The fine-tuning that `config` describes, of a method's encoder; `fresh` as in `Classification`.

    Raises:
      UserError: if the images of a microbatch cannot be paired for mixup and cutmix, or there is no class token.
    """
    c, data = config.classify, config.data
    mixes = mix.Mix(c.mixup, c.cutmix, c.mix_prob, c.switch_prob) if c.mixup or c.cutmix else None
    if mixes and (config.batch_size // config.accumulate) % 2:
        raise UserError(
            f'batch_size is {config.batch_size} in {config.accumulate} microbatches; mixup and cutmix pair the images '
            'of a microbatch, so it must have an even number of them'
        )
    return Classification(
        method,
        data.num_classes,
        tuple(data.mean),
        tuple(data.std),
        data.flip,
        pool=c.pool,
        head_scale=c.head_scale,
        smoothing=c.smoothing,
        erase=c.erase,
        mixes=mixes,
        ema=c.ema,
        fresh=fresh,
    )


def counts(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """Sums over the valid examples of logits (B, classes): their number, how many have their label (B,) first and among
    the first five, and the cross-entropy."""
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    # Of equal logits the first counts, as for argmax; the label comes last where they are NaN.
    before = jnp.arange(logits.shape[1]) < labels[:, None]
    rank = (~(logits <= own) | (before & (logits == own))).sum(1)
    seen = {
        'examples': jnp.ones_like(rank),
        'top1': rank < 1,
        'top5': rank < 5,
        'loss': optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    }
    return {name: jnp.where(valid, value, 0).sum() for name, value in seen.items()}


def shares(totals: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the examples of `counts`."""
    return {name: float(totals[name] / totals['examples']) for name in ('top1', 'top5', 'loss')}
