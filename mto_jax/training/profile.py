"""A trace of chosen steps, for TensorBoard's or Perfetto's view of what the device does in them."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath

from mto_jax.errors import UserError
from mto_jax.runtime import hosts
from mto_jax.runtime.log import say
from mto_jax.training.loop import Feed
from mto_jax.training.train_state import Meter, TrainState


class Profiled:
    """A `Feed` of single steps whose steps `first` to `last` are traced by the first process into `folder`.

    Operations carry the names of their modules (`encoder/blocks/block0/attn`) and of the step's other parts
    (`optimizer`); steps are marked by their number. A training that ends before `last` ends the trace.
    """

    def __init__(self, feed: Feed, folder: epath.Path, first: int, last: int):
        self._feed, self._folder, self._first, self._last, self._tracing = feed, folder, first, last, False
        self.meter, self.waited = feed.meter, feed.waited

    def advance(self, state: TrainState, meter: Meter, step: int, stop: int) -> tuple[TrainState, Meter, int]:
        if not self._first <= step + 1 <= self._last or not hosts.is_first():
            return self._feed.advance(state, meter, step, stop)
        if not self._tracing:
            jax.block_until_ready(state)  # nothing of earlier steps
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
            state, meter, step = self._feed.advance(state, meter, step, stop)
        if step == self._last:
            jax.block_until_ready(state)
            self.close()
        return state, meter, step

    def close(self) -> None:
        """End the trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            say(f'profile of steps {self._first} to {self._last}: {self._folder}')


@contextlib.contextmanager
def traced(feed: Feed, folder: epath.Path, steps: tuple[int, ...]) -> Iterator[Feed]:
    """The feed, with a trace of `steps` (first, last) in `folder`, or without one for ()."""
    if not steps:
        yield feed
        return
    profiled = Profiled(feed, folder, *steps)
    try:
        yield profiled
    finally:
        profiled.close()


def check(steps: tuple[int, ...], total: int) -> None:
    """Raises UserError where `config.profile_steps` lie outside a training of so many steps."""
    if steps and steps[1] > total:
        raise UserError(f'profile_steps is {tuple(steps)}; it must lie within the {total} steps of the training')
