"""Training on data that lie on the device: many steps a dispatch, several seeds at once.

The method, the objective and the train step are the main job's, and so are the order of the examples and all random
streams: a run here and `trainer.pretrain` with the same config and seed take the same steps, up to rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mto_jax import train_state
from mto_jax.data import order
from mto_jax.errors import UserError
from mto_jax.job import Job
from mto_jax.job import prepare as prepare_job
from mto_jax.train_state import Meter, TrainState


def make_steps(train_step: Callable) -> Callable:
    """`steps(states, meters, constants, data, positions, keys) -> (states, meters)`, jitted; the first two are donated.

    States, meters and keys have a leading axis of seeds. `data` is a dict of arrays (n, ...) that all seeds share, as
    they do the constants; step t of seed s takes the rows `positions[s, t]`; positions is int (seeds, steps, batch).
    """

    def steps(state, meter, constants, data, positions, key):
        def body(carry, rows):
            return train_step(*carry, constants, jax.tree.map(lambda x: x[rows], data), key), None

        return jax.lax.scan(body, (state, meter), positions)[0]

    return jax.jit(jax.vmap(steps, in_axes=(0, 0, None, None, 0, 0)), donate_argnums=(0, 1))


def take(tree, index: int):
    """One seed's part of a tree with a leading axis of seeds."""
    return jax.tree.map(lambda x: x[index], tree)


def stack(trees: Sequence):
    """Trees of single seeds with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@dataclasses.dataclass(frozen=True)
class Run:
    """Pre-training as a config says, on arrays. Compiled once for all seeds and starting points.

    Attributes:
      job: the training.
      create: `seed -> TrainState` before the first step, jitted.
    """

    job: Job
    create: Callable[[int], TrainState]
    _images: jax.Array
    _batch_size: int
    _steps: Callable

    def train(
        self, states: TrainState, seeds: Sequence[int], start: int, stops: Sequence[int]
    ) -> Iterator[tuple[int, TrainState, dict[str, np.ndarray]]]:
        """Train from step `start`; yields (step, states, mean of each logged term since the last stop) at each stop.

        Args:
          states: with a leading axis of seeds. It is donated: use what is yielded, before the next is asked for.
          seeds: of each state.
          start: the step that the states are at.
          stops: ascending.

        Terms are float (seeds,); one that was ever not finite is NaN.
        """
        keys = jnp.stack([train_state.stream(s, 'train') for s in seeds])
        for stop in stops:
            meters = stack([Meter.empty(self.job.names) for _ in seeds])
            rows = [list(order.batch_positions(len(self._images), self._batch_size, s, start, stop)) for s in seeds]
            positions = np.array(rows, np.int32)
            constants, data = self.job.objective.constants, {'image': self._images}
            states, meters = self._steps(states, meters, constants, data, positions, keys)
            sums = jax.device_get(meters.sums)
            yield stop, states, {n: v / (stop - start) for n, v in sums.items()}
            start = stop


def prepare(config, images: np.ndarray) -> Run:
    """Set up the pre-training that `config` describes on uint8 images (n, H, W, C).

    Raises:
      UserError: for a bad config, one that crops (`data.crop` must be 'resize': arrays hold whole images), or images
        of another size.
    """
    if config.data.crop != 'resize':
        raise UserError(f"data.crop is {config.data.crop!r}; training in memory takes whole images ('resize')")
    wanted = (*config.data.image_size, config.data.channels)
    if images.shape[1:] != wanted:
        raise UserError(f'data.image_size and data.channels are {wanted}; the images in memory are {images.shape[1:]}')
    job = prepare_job(config, len(images))
    return Run(job, jax.jit(job.create), jnp.asarray(images), config.batch_size, make_steps(job.train_step))
