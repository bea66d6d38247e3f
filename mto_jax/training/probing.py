"""Probes as an objective: heads on a frozen encoder, one for each depth at which its tokens are taken.

The heads share only batches and the encoder's forward pass: each learns as it would alone, unless
`optim.clip_norm` is set, which is of all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mto_jax.data import augment
from mto_jax.errors import UserError
from mto_jax.methods import Method, moved
from mto_jax.models.heads import Probe
from mto_jax.models.layers import RUNNING_RATE
from mto_jax.training.classify import counts, shares

IGNORED = -1  # in a label map: this pixel counts for nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Probing:
    """An objective for `train_state.make_train_step`: uint8 images and labels, or label maps, to cross-entropies.

    Attributes:
      method: whose encoder it is.
      encoder: its parameters, which stay as they are.
      head: of each depth.
      depths: after how many blocks; None for all and the final norm.
      group: images over which batch normalisation takes its statistics: consecutive ones of a microbatch.
      mean, std: of the pixels in [0, 1], per channel.
      flip: mirror images at random.
    """

    method: Method
    encoder: Any
    head: Probe
    depths: tuple[int | None, ...]
    group: int
    mean: Sequence[float]
    std: Sequence[float]
    flip: bool

    def __post_init__(self):
        arch, head = self.method.arch, self.head
        if head.kind == 'attentive' and arch.width % head.heads:
            raise UserError(f'probe.heads is {head.heads}; it must divide the width of {arch.width} (model.width)')

    @property
    def constants(self):
        return {'encoder': self.encoder}

    @property
    def tensor_axes(self):
        return (r'.*/head/.*', None), *self.method.tensor_axes

    @property
    def dense(self) -> bool:
        return self.head.kind == 'dense'

    @property
    def score(self) -> str:
        return 'miou' if self.dense else 'top1'

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f'depth{d or 0}' for d in self.depths)  # 0 as in `config.eval.depths`

    def init(self, key):
        a = self.method.arch
        tokens = jnp.zeros((1, a.num_prefix + a.num_patches, a.width))
        keys = zip(self.names, jax.random.split(key, len(self.names)), strict=True)
        heads = {name: self.head.init(k, tokens, 1).get('params', {}) for name, k in keys}
        moments = {'mean': jnp.zeros(a.width), 'var': jnp.ones(a.width)}
        return {'head': heads}, {'running': {name: jax.tree.map(jnp.copy, moments) for name in self.names}}

    def logits(
        self, params, constants, images: jax.Array, running: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Of normalised images, {depth: float32 logits} as `heads.Probe` has them, for 'dense' (B, H, W, classes) at
        the images' size; and the batch's moments.

        Args:
          running: moments to normalise with, where they are not the batch's own.
        """
        out, moments = {}, {}
        for name, tokens in zip(self.names, self.method.encode(constants, images, depth=self.depths), strict=True):
            given = None if running is None else running[name]
            out[name], moments[name] = self.head.apply({'params': params['head'][name]}, tokens, self.group, given)
            if self.dense:
                shape = (len(images), *self.method.arch.grid, self.head.num_classes)
                size = (len(images), *images.shape[1:3], self.head.num_classes)
                out[name] = jax.image.resize(out[name].reshape(shape), size, 'bilinear')
        return out, moments

    def loss(self, params, model_state, constants, batch, key, clock):
        del model_state, clock
        if self.flip:
            batch = {n: x if x.ndim < 3 else augment.random_flip(key, x) for n, x in batch.items()}
        images = augment.normalize(batch['image'], self.mean, self.std)
        logits, moments = self.logits(params, constants, images)
        if self.dense:
            losses = {n: pixel_cross_entropy(x, batch['mask'][..., 0]) for n, x in logits.items()}
        else:
            one = optax.softmax_cross_entropy_with_integer_labels
            losses = {n: one(x, batch['label']).mean() for n, x in logits.items()}
        return sum(losses.values()), (losses if len(losses) > 1 else {}, moments)

    def after_update(self, params, model_state, statistics, clock):
        del params, clock
        return {'running': moved(model_state['running'], statistics, RUNNING_RATE)}

    def sums(self, params, model_state, constants, batch) -> Mapping[str, Any]:
        """Of a batch with 'valid', what `scores` reads the sum of."""
        images = augment.normalize(batch['image'], self.mean, self.std)
        logits, _ = self.logits(params, constants, images, model_state['running'])
        if self.dense:
            masks = jnp.where(batch['valid'][:, None, None], batch['mask'][..., 0], IGNORED)
            return {n: confusion(masks, x.argmax(-1), self.head.num_classes) for n, x in logits.items()}
        return {n: counts(x, batch['label'], batch['valid']) for n, x in logits.items()}

    def scores(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Of summed `sums`, the best depth's scores; of several depths, each one's too, and which is the best."""
        each = {n: of_confusion(x) if self.dense else shares(x) for n, x in totals.items()}
        best = max(each, key=lambda n: each[n][self.score])
        if len(each) == 1:
            return each[best]
        rows = {f'{metric}_{n}': value for n, found in each.items() for metric, value in found.items()}
        return each[best] | rows | {'best_depth': int(best.removeprefix('depth'))}


def pixel_cross_entropy(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Mean over the pixels that count of logits (B, H, W, classes) and label maps int (B, H, W)."""
    counted = masks != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, masks, 0))
    return jnp.where(counted, each, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def confusion(truth: jax.Array, guess: jax.Array, num_classes: int) -> jax.Array:
    """Pixels of each pair of classes, int32 (classes, classes): rows are the true ones, ignored pixels left out."""
    counted = truth != IGNORED
    pairs = jnp.where(counted, truth * num_classes + guess, num_classes**2)
    return jnp.bincount(pairs.ravel(), length=num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)


def of_confusion(pixels: np.ndarray) -> dict[str, float]:
    """'miou', the mean over the classes that occur, in truth or guess, of intersection over union; 'pixel_accuracy'."""
    right = np.diag(pixels)
    union = pixels.sum(0) + pixels.sum(1) - right
    miou = (right[union > 0] / union[union > 0]).mean() if union.any() else 0.0
    return {'miou': float(miou), 'pixel_accuracy': float(right.sum() / max(pixels.sum(), 1))}
