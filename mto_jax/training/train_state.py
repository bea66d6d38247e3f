"""The training state, the meter that rides along, and the one train step of every task."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mto_jax.errors import UserError
from mto_jax.methods import Clock

Terms = Mapping[str, jax.Array]


class Objective(Protocol):
    """What is trained: pre-training with a method, fine-tuning, a probe.

    Attributes:
      constants: arrays that never change while a job runs (a frozen encoder): an argument of the step that is neither
        donated nor part of the state; {} for none.
      tensor_axes: see `Method.tensor_axes`.
    """

    constants: Any
    tensor_axes: Sequence[tuple[str, int | None]]

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh (params, model_state)."""

    def loss(
        self,
        params: Any,
        model_state: Any,
        constants: Any,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        clock: Clock,
    ) -> tuple[jax.Array, tuple[Terms, Any]]:
        """Total loss, (its unweighted terms and what else is logged, statistics for `after_update`)."""

    def after_update(self, params: Any, model_state: Any, statistics: Any, clock: Clock) -> Any:
        """The model state for the next step."""


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: int32 scalar, updates made so far.
      params: float32 parameters.
      opt_state: of the optimizer.
      model_state: what else changes from step to step: a teacher, running statistics; {} where nothing does.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: Any


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

    def add(self, terms: Terms, step: jax.Array) -> 'Meter':
        sums = {n: self.sums[n] + terms[n] for n in self.sums}
        bad = {n: jnp.where((first < 0) & ~jnp.isfinite(terms[n]), step, first) for n, first in self.first_bad.items()}
        return Meter(sums, bad, self.count + 1)


def stream(seed: int, name: str) -> jax.Array:
    """The key of a named random stream. Fold in the step to get the key of a step: no key is ever stored."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def create(objective: Objective, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return begin(*objective.init(key), tx)


def begin(params: Any, model_state: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from given parameters and model state."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), model_state)


def term_names(objective: Objective, batch: Mapping[str, Any], clock: Clock) -> tuple[str, ...]:
    """Names of all logged terms, for `Meter.empty`, without running anything.

    Args:
      batch: with shapes and dtypes.
      clock: of any step.

    Raises:
      UserError: where a method gives a term a name that is taken.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, model_state = jax.eval_shape(objective.init, key)
    _, (terms, _) = jax.eval_shape(objective.loss, params, model_state, objective.constants, batch, key, clock)
    state = ('model_state_norm',) if jax.tree.leaves(model_state) else ()
    own = ('grad_norm', 'param_norm', 'learning_rate', *state)
    if taken := [name for name in ('loss', *own) if name in terms]:
        raise UserError(f'the term {taken[0]!r} of a method has the name of one that every training logs; rename it')
    return ('loss', *terms, *own)


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    clock: Callable[[jax.Array], Clock],
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Meter]]:
    """A pure `train_step(state, meter, constants, batch, key) -> (state, meter)`, to be jitted.

    Args:
      objective: what is minimised.
      tx: optimizer.
      schedule: its learning rate, for the log.
      clock: of a step.
      accumulate: microbatches whose gradients, terms and statistics are averaged before the update.
    """
    gradients = jax.value_and_grad(objective.loss, has_aux=True)

    def train_step(state: TrainState, meter: Meter, constants, batch, key):
        key, now = jax.random.fold_in(key, state.step), clock(state.step)
        if accumulate == 1:
            out = gradients(state.params, state.model_state, constants, batch, key, now)
        else:
            # Strided microbatches, so that each stays split over all devices as the batch is.
            micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

            def one(i, part):
                part_key = jax.random.fold_in(key, i)
                return gradients(state.params, state.model_state, constants, part, part_key, now)

            def body(total, item):
                return jax.tree.map(lambda a, b: a + b / accumulate, total, one(*item)), None

            shapes = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], micro))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            out, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), micro))
        (loss, (terms, statistics)), grads = out
        with jax.named_scope('optimizer'):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        model_state = objective.after_update(params, state.model_state, statistics, now)
        terms = {
            'loss': loss,
            **terms,
            'grad_norm': optax.tree.norm(grads),
            'param_norm': optax.tree.norm(params),
            'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
        }
        if jax.tree.leaves(model_state):
            terms['model_state_norm'] = optax.tree.norm(model_state)
        return TrainState(state.step + 1, params, opt_state, model_state), meter.add(terms, state.step + 1)

    return train_step
