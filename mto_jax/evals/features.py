"""Frozen features of whole images."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mto_jax.data import augment
from mto_jax.errors import UserError
from mto_jax.methods import Method
from mto_jax.runtime import parallel
from mto_jax.training.train_state import TrainState

FEATURES = ('mean', 'class')


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


def encoder(method: Method, config) -> Callable:
    """`(params, uint8 images) -> float32 (B, D)`, jitted: the features that `config.eval` names.

    Raises:
      UserError: for unknown features, a class token the model does not have, a depth it does not reach, or a teacher
        that there is not.
    """
    if config.eval.weights != 'student':
        item(method, config.eval)
    kind, depth, arch = config.eval.features, config.eval.depth or None, method.arch
    if kind not in FEATURES:
        raise UserError(f'eval.features is {kind!r}; it must be one of {", ".join(FEATURES)}')
    if kind == 'class' and not arch.class_token:
        raise UserError("eval.features is 'class' but the model has no class token (model.class_token)")
    if depth and not 1 <= depth <= arch.depth:
        raise UserError(f'eval.depth is {depth}; the encoder has {arch.depth} blocks')

    @jax.jit
    def encode(params, images):
        x = augment.normalize(images, config.data.mean, config.data.std)
        tokens = method.encode(params, x, depth=depth).astype(jnp.float32)
        return tokens[:, 0] if kind == 'class' else tokens[:, arch.num_prefix :].mean(1)

    return encode


def raw_pixels(params, images: np.ndarray) -> np.ndarray:
    """The images themselves, flattened to float32 (B, H * W * C) in [0, 1]: what any encoder should beat.

    A black image counts as the darkest grey, for kNN needs a direction.
    """
    flat = images.reshape(len(images), -1)
    return jnp.where(flat.any(1, keepdims=True), flat, 1).astype(np.float32) / 255.0


def usable(x: np.ndarray) -> np.ndarray:
    """Which features (n, D) are finite and not zero, bool (n,)."""
    return np.isfinite(x).all(1) & np.any(x, axis=1)


def require(good: np.ndarray, what: str, wanted: str) -> None:
    """Check features; `good`, bool (n,), says which are as `wanted`.

    Raises:
      UserError: if any is not.
    """
    if not good.all():
        raise UserError(
            f'evaluation: {(~good).sum()} of {len(good)} {what} features are not {wanted}, the first at position '
            f'{good.argmin()}; the encoder may have diverged or collapsed: probe an earlier checkpoint '
            '(--config.checkpoint), or train again with a lower learning rate (--config.optim.base_lr)'
        )


def extract(encode: Callable, params, batches: Iterator, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (n, D) and labels int32 (n,) of all valid examples, on every process.

    Args:
      encode: `(params, images) -> features`.
      batches: this process's rows of global batches, as `pipeline.eval_batches` yields them.

    Raises:
      UserError: if the examples have no labels.
    """
    features, labels = [], []
    for batch in batches:
        placed = parallel.put_batch(batch, mesh)
        outputs = encode(params, placed['image']), placed['label'], placed['valid']
        found, truth, valid = parallel.fetch(outputs)
        features.append(found[valid])
        labels.append(truth[valid])
    labels = np.concatenate(labels)
    if (labels < 0).any():
        raise UserError('evaluation: the data set has no feature "label", so probes cannot run on it')
    return np.concatenate(features), labels
