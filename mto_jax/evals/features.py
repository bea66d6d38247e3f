"""Frozen features of full images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mto_jax.data import augment
from mto_jax.errors import UserError
from mto_jax.methods import Method
from mto_jax.models.heads import pooled
from mto_jax.runtime import parallel
from mto_jax.training.train_state import TrainState

FEATURES = ('mean', 'class')
ROWS = PartitionSpec(None, *parallel.BATCH)  # of the arrays in a Bank
JOINED = 64  # at once: of a thousand arrays, XLA compiles for half a minute


@flax.struct.dataclass
class Bank:
    """Features of full images, in S batches of B rows; each lies on the device that encoded it.

    Attributes:
      x: float32 (S, B, D), split along B, as the other two.
      labels: int32 (S, B).
      valid: bool (S, B), which rows are examples. They are in the order of the data set, batch by batch.
    """

    x: jax.Array
    labels: jax.Array
    valid: jax.Array

    def fetch(self) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (n, D) and labels int32 (n,) of all examples, on every process. All must call it."""
        x, labels, valid = parallel.fetch((self.x, self.labels, self.valid))
        return x[valid], labels[valid]


def item(method: Method, c) -> tuple[str, Any]:
    """The item of a checkpoint that `config.eval.weights` names, and its shapes.

    Raises:
      UserError: if the method has no teacher.
    """
    params, model_state = jax.eval_shape(lambda: method.init(jax.random.key(0)))
    if c.weights == 'student':
        return 'params', params
    if 'teacher' not in model_state:
        raise UserError("eval.weights is 'teacher', but the method has no teacher; set eval.weights='student'")
    return 'model_state.teacher', model_state['teacher']


def weights(state: TrainState, c) -> Any:
    """What `config.eval.weights` names, of a training state."""
    return state.params if c.weights == 'student' else state.model_state['teacher']


def depths(c, arch) -> tuple[int, ...]:
    """After how many blocks `config.eval` takes features, at one or several depths; 0 for all and the final norm.

    Raises:
      UserError: if the encoder has fewer.
    """
    for name, values in (('eval.depths', c.depths), ('eval.depth', (c.depth,))):
        if wrong := [d for d in values if d > arch.depth]:
            raise UserError(f'{name}: {wrong[0]} is too deep; the encoder has {arch.depth} blocks')
    return tuple(c.depths) or (c.depth,)


def encoder(method: Method, config) -> Callable:
    """`(params, uint8 images) -> float32 (B, D)`, jitted: the features that `config.eval` names.

    Raises:
      UserError: for unknown features, a class token the model does not have, or a depth it does not reach.
    """
    kind, arch = config.eval.features, method.arch
    if kind not in FEATURES:
        raise UserError(f'eval.features is {kind!r}; it must be one of {", ".join(FEATURES)}')
    if kind == 'class' and not arch.class_token:
        raise UserError("eval.features is 'class' but the model has no class token (model.class_token)")
    depths(config.eval, arch)
    depth = config.eval.depth or None

    @jax.jit
    def encode(params, images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        return pooled(method.encode(params, x, depth=depth), arch.num_prefix, kind)

    return encode


def raw_pixels(params, images: np.ndarray) -> np.ndarray:
    """The images themselves, flattened to float32 (B, H * W * C) in [0, 1]: what any encoder should beat.

    A black image counts as the darkest grey, for kNN needs a direction.
    """
    flat = images.reshape(len(images), -1)
    return jnp.where(flat.any(1, keepdims=True), flat, 1).astype(np.float32) / 255.0


def accuracy(right: np.ndarray, count: np.ndarray, balanced: bool) -> float:
    """Fraction of the examples that is classified right; balanced: the mean of each class's own.

    Args:
      right, count: int (classes,), how many examples of each class are right, and how many there are.
    """
    there = count > 0
    return float((right[there] / count[there]).mean() if balanced else right.sum() / count.sum())


def accuracy_of(guesses: np.ndarray, labels: np.ndarray, balanced: bool) -> float:
    """`accuracy` of guessed classes, int (n,), given the true ones."""
    classes = int(labels.max()) + 1
    right = np.bincount(labels[guesses == labels], minlength=classes)
    return accuracy(right, np.bincount(labels, minlength=classes), balanced)


@jax.jit
def usable(bank: Bank) -> jax.Array:
    """Which rows have features that are finite and not zero, or are no examples, bool (S, B)."""
    return jnp.isfinite(bank.x).all(-1) & (bank.x != 0).any(-1) | ~bank.valid


@jax.jit
def _faults(good, valid):
    """How many examples are not good, how many there are, and how many come before the first that is not good."""
    bad, index = valid & ~good, jnp.arange(good.size).reshape(good.shape)
    before = index < jnp.where(bad, index, good.size).min()
    return bad.sum(), valid.sum(), (valid & before).sum()


def require(good: jax.Array | np.ndarray, valid: jax.Array | np.ndarray, what: str, wanted: str) -> None:
    """Check features; `good`, bool, says which are as `wanted`, `valid`, of the same shape, which are examples.

    Raises:
      UserError: if any is not.
    """
    bad, count, position = (int(n) for n in _faults(good, valid))
    if bad:
        raise UserError(
            f'evaluation: {bad} of {count} {what} features are not {wanted}, the first at position '
            f'{position}; the encoder may have diverged or collapsed: probe an earlier checkpoint '
            '(--config.checkpoint), or train again with a lower learning rate (--config.optim.base_lr)'
        )


@partial(jax.jit, static_argnames='mesh')
def _joined(banks, mesh):
    """One Bank of several, batch after batch, where they lie."""
    bank = jax.tree.map(lambda *parts: jnp.concatenate(parts), *banks)
    return jax.lax.with_sharding_constraint(bank, NamedSharding(mesh, ROWS))


def collect(encode: Callable, params, batches: Iterator, mesh) -> Bank:
    """Features and labels of all examples, each on the device that encoded it.

    Args:
      encode: `(params, images) -> features`.
      batches: this process's rows of global batches, as `pipeline.eval_batches` yields them.

    Raises:
      UserError: if the examples have no labels.
    """
    parts = []
    for batch in batches:
        placed = parallel.put_batch(batch, mesh)
        found = Bank(encode(params, placed['image']), placed['label'], placed['valid'])
        parts.append(_joined([jax.tree.map(lambda a: a[None], found)], mesh))
        jax.block_until_ready(parts[-2:-1])  # the images of two batches lie on the devices, not of all
    while len(parts) > 1:
        parts = [_joined(parts[i : i + JOINED], mesh) for i in range(0, len(parts), JOINED)]
    (bank,) = parts
    if ((bank.labels < 0) & bank.valid).any():
        raise UserError(
            'evaluation: an image has no label (a negative one, or the data set has no feature "label"); probes need '
            'one of every image: name labelled splits'
        )
    return bank
