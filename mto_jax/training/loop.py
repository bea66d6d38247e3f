"""The one loop. Pre-training, the members of a study and their fine-tuning all run through `fit`."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mto_jax.runtime.log import say
from mto_jax.runtime.preemption import Preempted
from mto_jax.training.train_state import Meter, TrainState


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a watch found in a state.

    Attributes:
      scalars: {name: value}; of several seeds, {name: one value per seed}.
      images: {name: float (B, H, W, C) in [0, 1]}.
      score: of this very state, higher is better: what decides which checkpoint is the best. A state that has one is
        saved.
    """

    scalars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Watch:
    """A measurement during training: a probe, pictures, a diagnosis.

    Attributes:
      look: `(step, state) -> Seen`; it must not keep the state, whose arrays are donated to the next step.
      at: steps at which it looks, ascending (a range or a tuple). It always looks at the last step.
      at_start: also look at the initial state.
    """

    look: Callable[[int, TrainState], Seen]
    at: Sequence[int] = ()
    at_start: bool = False


class Feed(Protocol):
    """Where the batches come from, and what takes the steps: see `feed.py`."""

    def meter(self) -> Meter:
        """An empty one."""

    def advance(self, state: TrainState, meter: Meter, step: int, stop: int) -> tuple[TrainState, Meter, int]:
        """At least one step on from `step`, and at most to `stop`; the third is where it is then. Donates both."""

    def waited(self) -> float:
        """Seconds the device was idle since the last call."""


class Record:
    """What is kept of a run. This base class keeps nothing.

    Attributes:
      logs, saves: steps, ascending, at which terms are logged and states saved; at the last step both always are.
      seen: whether it has what the watches found in the state that training starts from.
    """

    logs: Sequence[int] = ()
    saves: Sequence[int] = ()
    seen: bool = True

    def interval(self, step: int, meter: Meter, waited: float) -> None:
        """Keep the terms of the interval that ends at `step`."""

    def require_finite(self, meter: Meter) -> None:
        """Called before a state is looked at or saved: raise where a term up to here was not finite."""

    def see(self, step: int, seen: Seen) -> None:
        """Keep what a watch found."""

    def save(self, state: TrainState, score: float | None) -> None:
        """Save a state."""

    def restart(self, step: int) -> None:
        """Restart the clock: something other than training has run."""

    def finish(self) -> None:
        """Wait until everything is kept."""


def every(steps: int, total: int) -> range:
    """Each `steps`-th of `total` steps; none for 0."""
    return range(steps, total + 1, steps) if steps else range(0)


def fit(
    feed: Feed,
    state: TrainState,
    start: int,
    total: int,
    watches: Sequence[Watch] = (),
    record: Record | None = None,
    preempted: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Train from step `start` to `total`; returns the last state.

    Args:
      state: at `start`. It is donated.
      watches: where several give a score, the first one's counts. A state with a score is saved.
      preempted: asked after every dispatch; if True, the state is saved and training stops.

    Raises:
      Preempted: once the state is saved after SIGTERM. What the watches would have found in it, they find when the run
        goes on.
    """
    record = record or Record()
    events = [record.logs, record.saves, *(w.at for w in watches)]
    meter, step = feed.meter(), start
    for watch in watches:
        missed = start and not record.seen and (start == total or start in watch.at)
        if missed or (not start and watch.at_start):
            record.see(start, watch.look(start, state))
    feed.waited()
    record.restart(start)
    while step < total:
        stop = min(total, *(_after(steps, step, total) for steps in events))
        state, meter, step = feed.advance(state, meter, step, stop)
        last, ending = step == total, preempted(step)
        looks = [] if ending else [w for w in watches if last or step in w.at]
        save = last or ending or step in record.saves
        if last or ending or step in record.logs:
            record.interval(step, meter, feed.waited())
            meter = feed.meter()
        if not (looks or save):
            continue
        record.require_finite(meter)
        score = None
        for watch in looks:
            seen = watch.look(step, state)
            record.see(step, seen)
            score = seen.score if score is None else score
        if save or score is not None:
            record.save(state, score)
        if ending:
            record.finish()
            say(f'SIGTERM received: saved at step {step}; rerun the same command to resume')
            raise Preempted
        feed.waited()  # while nothing was measured
        record.restart(step)
    record.finish()
    return state


def _after(steps: Sequence[int], step: int, total: int) -> int:
    """The first of `steps` after `step`; the total where there is none."""
    place = bisect.bisect_right(steps, step)
    return steps[place] if place < len(steps) else total
