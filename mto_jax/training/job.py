"""From a config to a training run, without data or devices: for pre-training, studies and compilation."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mto_jax import methods
from mto_jax.config import check
from mto_jax.data import order
from mto_jax.errors import UserError
from mto_jax.methods import Clock
from mto_jax.runtime import cpu, parallel
from mto_jax.training import optim, schedules, train_state
from mto_jax.training.objective import Pretraining
from mto_jax.training.train_state import Meter, TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      objective: what is trained.
      tx: the optimizer.
      schedule: its learning rate.
      per_epoch, total: steps per epoch and of the full training.
      clock: of a step: where the training stands before that update.
      microbatch: shapes of what it reads, {name: jax.ShapeDtypeStruct}.
      names: of the terms that each step logs.
      train_step: the pure step.
    """

    objective: train_state.Objective
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    per_epoch: int
    total: int
    clock: Callable[[jax.Array], Clock]
    microbatch: Mapping[str, jax.ShapeDtypeStruct]
    names: tuple[str, ...]
    train_step: Callable[..., tuple[TrainState, Meter]]

    def create(self, seed) -> TrainState:
        """The state before the first step. Pure: to be jitted, with the shardings it shall have."""
        return train_state.create(self.objective, self.tx, train_state.stream(seed, 'init'))

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of so many examples."""
        return {n: jax.ShapeDtypeStruct((size, *s.shape[1:]), s.dtype) for n, s in self.microbatch.items()}

    @cached_property
    def shapes(self) -> TrainState:
        """Of the state, jax.ShapeDtypeStructs. To trace a model takes seconds: it is done once."""
        return jax.eval_shape(self.create, 0)

    def diagnose(self, state: TrainState, images: jax.Array, key: jax.Array):
        """`Pretraining.diagnose` of a state."""
        clock = self.clock(state.step)
        return self.objective.diagnose(state.params, state.model_state, images, key, clock)

    def sharding(self, mesh: Mesh):
        """How the state lies on the mesh, a tree like it of NamedShardings."""
        return parallel.shardings(self.shapes, mesh, self.objective.tensor_axes)

    def step(self, mesh: Mesh) -> Callable[..., tuple[TrainState, Meter]]:
        """`train_step` jitted for the mesh. It donates state and meter. To be called under `jax.set_mesh(mesh)`."""
        state, everywhere, split = self.sharding(mesh), parallel.replicated(mesh), parallel.along_batch(mesh)
        constants = parallel.shardings(self.objective.constants, mesh, self.objective.tensor_axes)
        return jax.jit(
            self.train_step,
            donate_argnums=(0, 1),
            in_shardings=(state, everywhere, constants, split, everywhere),
            out_shardings=(state, everywhere),
            compiler_options=cpu.compiler_options(mesh.devices.flat[0].platform),
        )


def assemble(
    objective: train_state.Objective,
    optimizer,
    batch_size: int,
    total: int,
    per_epoch: int,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    accumulate: int = 1,
) -> Job:
    """A training of `objective`.

    Args:
      optimizer: `config.optim` or one like it.
      total, per_epoch: steps.
      shapes: of one microbatch, {name: jax.ShapeDtypeStruct}.

    Raises:
      UserError: for a schedule that does not fit the training.
    """
    schedule = schedules.learning_rate(optimizer, batch_size, total, per_epoch)
    tx = optim.build(optimizer, schedule)
    clock = partial(Clock, total=total, steps_per_epoch=per_epoch)
    names = train_state.term_names(objective, shapes, clock(jax.ShapeDtypeStruct((), np.int32)))
    step = train_state.make_train_step(objective, tx, schedule, clock, accumulate)
    return Job(objective, tx, schedule, per_epoch, total, clock, shapes, names, step)


def prepare(config, num_examples: int) -> Job:
    """The pre-training that `config` describes on so many examples.

    Raises:
      UserError: for a bad config.
    """
    check(config)
    data = config.data
    objective = Pretraining(methods.build(config), tuple(data.mean), tuple(data.std), data.flip)
    per_epoch = order.steps_per_epoch(num_examples, config.batch_size)
    total = schedules.to_steps(config.epochs, per_epoch)
    _require_stacks(objective.method)
    images = jax.ShapeDtypeStruct((config.batch_size // config.accumulate, *data.image_size, data.channels), np.uint8)
    return assemble(objective, config.optim, config.batch_size, total, per_epoch, {'image': images}, config.accumulate)


def _require_stacks(method: methods.Method) -> None:
    """Raises UserError where MTO is on, but the method gives it nothing to read: it would do nothing without a word."""
    if not method.mto:
        return
    watched = dataclasses.replace(method, watch=True)

    def stacks(key):
        views = dict.fromkeys(method.views, jnp.zeros((1, *method.arch.image_size, method.arch.channels)))
        result = watched.loss(*watched.init(key), views, key, Clock(jnp.int32(0), 1, 1))
        return {name: stack.blocks for name, stack in result.stacks.items()}

    found = jax.eval_shape(stacks, jax.eval_shape(lambda: jax.random.key(0)))
    if silent := [name for name, blocks in found.items() if not blocks] or not found:
        which = f'the stack {silent[0]!r} has no statistics of its blocks' if found else 'it returns no stack'
        raise UserError(
            f'mto.enabled is True, but {type(method).__name__} gives it nothing to read: {which}. '
            'Give each mask-bearing vit.ViT or vit.Transformer methods.attends(method, arch), and return its '
            'methods.Stack'
        )
