"""Where batches come from: streamed from the host, or resident on the device for many steps per dispatch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mto_jax.errors import UserError
from mto_jax.runtime import cpu
from mto_jax.training import train_state
from mto_jax.training.job import Job
from mto_jax.training.train_state import Meter, TrainState

DISPATCH = 500
"""The most steps that `Resident` takes per dispatch: seconds on a GPU, a minute or two on a CPU core."""


class Streamed:
    """Batches that the host prepares while the device trains; one step per dispatch.

    Args:
      job: the training run.
      mesh: under which it runs.
      batches: of the remaining steps, on the devices. `reset()` gives the seconds waited for them.
      key: of the training's random stream.
    """

    def __init__(self, job: Job, mesh: jax.sharding.Mesh, batches: Iterator, key: jax.Array):
        self._job, self._step, self._batches, self._key = job, job.step(mesh), batches, key

    def meter(self) -> Meter:
        return Meter.empty(self._job.names)

    def advance(self, state: TrainState, meter: Meter, step: int, stop: int) -> tuple[TrainState, Meter, int]:
        del stop
        return *self._step(state, meter, self._job.objective.constants, next(self._batches), self._key), step + 1

    def waited(self) -> float:
        return self._batches.reset()


class Resident:
    """Arrays that lie on the device, for several seeds side by side; up to `DISPATCH` steps per dispatch.

    The step is the job's own, and so are its random streams: a seed trains as `Streamed` would, up to rounding. States
    and meters have a leading axis of seeds. A seed that diverges does not affect the others.

    Args:
      job: the training run.
      arrays: {name: (n, ...)}, which all seeds share, as they do the constants.
      seeds: of each state.
      positions: `(seed, start, stop) -> rows of the arrays`, int (batch,) for each step.
      stream: the name of the training's random stream.
    """

    def __init__(
        self,
        job: Job,
        arrays: Mapping[str, np.ndarray],
        seeds: Sequence[int],
        positions: Callable[[int, int, int], Iterator[np.ndarray]],
        stream: str = 'train',
    ):
        self._job, self._seeds, self._positions = job, seeds, positions
        self._arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
        self._keys = jnp.stack([train_state.stream(s, stream) for s in seeds])

        def steps(state, meter, constants, arrays, positions, count, key):
            def body(i, carry):
                rows = positions[i]
                return job.train_step(*carry, constants, jax.tree.map(lambda x: x[rows], arrays), key)

            return jax.lax.fori_loop(0, count, body, (state, meter))

        each = jax.vmap(steps, in_axes=(0, 0, None, None, 0, None, 0))
        options = cpu.compiler_options(jax.default_backend()) if len(seeds) == 1 else {}
        self._steps = jax.jit(each, donate_argnums=(0, 1), compiler_options=options)

    def meter(self) -> Meter:
        return stack([Meter.empty(self._job.names) for _ in self._seeds])

    def advance(self, state: TrainState, meter: Meter, step: int, stop: int) -> tuple[TrainState, Meter, int]:
        stop = min(stop, step + DISPATCH)
        rows = np.array([list(self._positions(s, step, stop)) for s in self._seeds], np.int32)
        # The same shape, and so the same program, for any number of steps.
        rows = np.pad(rows, ((0, 0), (0, DISPATCH - (stop - step)), (0, 0)))
        constants = self._job.objective.constants
        return *self._steps(state, meter, constants, self._arrays, rows, stop - step, self._keys), stop

    def waited(self) -> float:
        return 0.0


def require_whole(config, images: np.ndarray) -> None:
    """Check that `config` can pre-train on `images`, uint8 (n, H, W, C), where they are.

    Raises:
      UserError: for a config that crops (arrays hold full images: `data.crop` must be 'resize') or augments on the
        host, or another size.
    """
    if config.data.crop != 'resize':
        raise UserError(f"data.crop is {config.data.crop!r}; training in memory uses full images ('resize')")
    if config.data.randaugment:
        raise UserError(f"data.randaugment is {config.data.randaugment!r}; training in memory has none (must be '')")
    wanted = (*config.data.image_size, config.data.channels)
    if images.shape[1:] != wanted:
        raise UserError(f'data.image_size and data.channels are {wanted}; the images in memory are {images.shape[1:]}')


@jax.jit
def stack(trees: Sequence) -> Any:
    """Trees of single seeds with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def take(tree: Any, index: int) -> Any:
    """One seed's part of a tree with a leading axis of seeds."""
    return jax.tree.map(lambda x: x[index], tree)
