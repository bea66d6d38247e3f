"""The training state, the meter that rides along, and the one train step of every task."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

LossFn = Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32 scalar, updates made so far.
      params: float32 parameters.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    opt_state: Any


@flax.struct.dataclass
class Meter:
    """Sums of the logged terms over an interval, and the step at which each first was not finite (-1: never).

    It stays on the device, so that watching every step costs no synchronisation.
    """

    sums: Mapping[str, jax.Array]
    first_bad: Mapping[str, jax.Array]
    count: jax.Array

    @classmethod
    def empty(cls, names) -> 'Meter':
        return cls(
            {n: jnp.zeros((), jnp.float32) for n in names},
            {n: jnp.full((), -1, jnp.int32) for n in names},
            jnp.zeros((), jnp.int32),
        )

    def add(self, terms: Mapping[str, jax.Array], step: jax.Array) -> 'Meter':
        sums = {n: self.sums[n] + terms[n] for n in self.sums}
        bad = {n: jnp.where((first < 0) & ~jnp.isfinite(terms[n]), step, first) for n, first in self.first_bad.items()}
        return Meter(sums, bad, self.count + 1)


def stream(seed: int, name: str) -> jax.Array:
    """The key of a named random stream. Fold in the step to get the key of a step: no key is ever stored."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def create(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    total_steps: int,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Meter]]:
    """A pure `train_step(state, meter, batch, key) -> (state, meter)`, to be jitted.

    Args:
      loss_fn: `(params, batch, key, progress) -> (loss, terms)` with float32 scalars; progress is in [0, 1).
      tx: optimizer.
      schedule: its learning rate, for the log.
      total_steps: of the training, for progress.
      accumulate: microbatches whose gradients are averaged before the update.
    """

    def gradients(params, batch, key, progress):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, progress)

    def train_step(state: TrainState, meter: Meter, batch, key):
        key = jax.random.fold_in(key, state.step)
        progress = state.step.astype(jnp.float32) / total_steps
        if accumulate == 1:
            (loss, terms), grads = gradients(state.params, batch, key, progress)
        else:
            # Strided microbatches, so that each stays split over all devices as the batch is.
            micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

            def body(total, item):
                i, part = item
                out = gradients(state.params, part, jax.random.fold_in(key, i), progress)
                return jax.tree.map(lambda a, b: a + b / accumulate, total, out), None

            first = jax.tree.map(lambda x: x[0], micro)
            shapes = jax.eval_shape(gradients, state.params, first, key, progress)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((loss, terms), grads), _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), micro))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        terms = {
            'loss': loss,
            **terms,
            'grad_norm': optax.tree.norm(grads),
            'param_norm': optax.tree.norm(params),
            'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), meter.add(terms, state.step + 1)

    return train_step


def term_names(loss_fn: LossFn, params, batch) -> tuple[str, ...]:
    """Names of all logged terms, for `Meter.empty`, without running anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, terms = jax.eval_shape(loss_fn, params, batch, key, jax.ShapeDtypeStruct((), jnp.float32))
    return ('loss', *terms, 'grad_norm', 'param_norm', 'learning_rate')
