"""From a config to a training, short of its data and devices: what the trainer, studies and compilation ahead share."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mto_jax import methods, objective, optim, parallel, rules, schedules, train_state
from mto_jax.data import order
from mto_jax.train_state import Meter, TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """One pre-training.

    Attributes:
      method: the method's module.
      loss_fn: its objective, for `train_state.make_train_step`.
      tx: the optimizer.
      schedule: its learning rate.
      per_epoch, total: steps of an epoch and of the whole training.
      names: of the terms that each step logs.
      train_step: the pure step.
    """

    method: methods.Method
    loss_fn: train_state.LossFn
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    per_epoch: int
    total: int
    names: tuple[str, ...]
    train_step: Callable[..., tuple[TrainState, Meter]]

    def create(self, seed) -> TrainState:
        """The state before the first step. Pure: to be jitted, with the shardings it shall have."""
        params = objective.init_params(self.method, train_state.stream(seed, 'init'))
        return train_state.create(params, self.tx)

    def sharding(self, mesh: Mesh):
        """How the state lies on the mesh, a tree like it of NamedShardings."""
        return parallel.shardings(jax.eval_shape(self.create, 0), mesh)

    def step(self, mesh: Mesh) -> Callable[..., tuple[TrainState, Meter]]:
        """`train_step` jitted for the mesh. It donates state and meter. To be called under `jax.set_mesh(mesh)`."""
        state, everywhere, split = self.sharding(mesh), parallel.replicated(mesh), parallel.along_batch(mesh)
        return jax.jit(
            self.train_step,
            donate_argnums=(0, 1),
            in_shardings=(state, everywhere, split, everywhere),
            out_shardings=(state, everywhere),
        )


def prepare(config, num_examples: int) -> Job:
    """The training that `config` describes on so many examples.

    Raises:
      UserError: for a bad config.
    """
    rules.check(config)
    method = methods.build(config)
    per_epoch = order.steps_per_epoch(num_examples, config.batch_size)
    total = schedules.to_steps(config.epochs, per_epoch)
    schedule = schedules.learning_rate(config.optim, config.batch_size, total, per_epoch)
    tx = optim.adamw(config.optim, schedule)
    loss_fn = objective.pretrain_loss(method, config.data)
    shape = (config.batch_size // config.accumulate, *config.data.image_size, config.data.channels)
    params = jax.eval_shape(lambda: objective.init_params(method, jax.random.key(0)))
    names = train_state.term_names(loss_fn, params, {'image': jax.ShapeDtypeStruct(shape, np.uint8)})
    train_step = train_state.make_train_step(loss_fn, tx, schedule, total, config.accumulate)
    return Job(method, loss_fn, tx, schedule, per_epoch, total, names, train_step)
