"""What is kept of a run in its workdir: the log and the checkpoints."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax.errors import UserError
from mto_jax.runtime import hosts
from mto_jax.runtime.log import Log, Progress, say
from mto_jax.training import perf
from mto_jax.training.checkpoint import Checkpointer
from mto_jax.training.job import Job
from mto_jax.training.loop import Record, Seen, every
from mto_jax.training.train_state import Meter, TrainState

# What a changed field that matters needs where there is something to resume.
RESUME = 'where there is a checkpoint, add --config.resume_anyway=True'


class Workdir(Record):
    """The record of one run in its workdir.

    An interval's meter is read when the next one ends, so that the device never waits for the log.

    Args:
      workdir: of the run.
      start: the step it starts at.
      job: the training run.
      saver: of its checkpoints.
      config: of the run.
      about: see `environment.describe`.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start: int,
        job: Job,
        saver: Checkpointer,
        config: ConfigDict,
        about: Mapping[str, Any],
    ):
        self.logs, self.saves = (every(n, job.total) for n in (config.log_every, config.checkpoints.every))
        self._saver, self._config, self._about = saver, config, about
        roofline = perf.roofline(job, config.model.dtype)
        self._progress = Progress(start, job.total, config.batch_size, job.per_epoch, roofline)
        self._log = Log(workdir, start)
        self.seen = any(hosts.gather(self._log.seen(start)))
        self._pending = None

    def interval(self, step: int, meter: Meter, waited: float) -> None:
        self._flush()
        self._pending = step, meter, waited
        self._saver.poll()

    def require_finite(self, meter: Meter) -> None:
        """Report what is pending and wait for `meter`: raises UserError if anything up to now was not finite."""
        self._flush()
        self._check(jax.device_get(meter))

    def see(self, step: int, seen: Seen) -> None:
        self._log.scalars(step, seen.scalars)
        self._log.images(step, seen.images)

    def save(self, state: TrainState, score: float | None) -> None:
        self._log.flush()
        self._saver.save(state, self._config.to_dict(), score, self._about)

    def restart(self, step: int) -> None:
        self._progress.restart(step)

    def finish(self) -> None:
        self._saver.wait()

    def close(self) -> None:
        """Write what was logged."""
        self._log.close()

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, meter, waited), self._pending = self._pending, None
        meter = jax.device_get(meter)
        self._check(meter)
        values = {n: float(total / meter.count) for n, total in meter.sums.items()}
        # Measured now that the device has finished the interval, not when the host had handed it over.
        values |= self._progress.measure(step, waited)
        self._log.scalars(step, values)
        say(self._progress.line(step, values))

    def _check(self, meter: Meter) -> None:
        bad = {n: int(s) for n, s in meter.first_bad.items() if s >= 0}
        if not bad:
            return
        step = min(bad.values())
        self._saver.wait()
        good, config = self._saver.latest(), self._config
        cures = [f'--config.optim.base_lr={config.optim.base_lr / 2:g}']
        if not 0 < config.optim.clip_norm <= 1:
            cures.insert(0, '--config.optim.clip_norm=1')
        if config.model.dtype != 'float32':
            cures.append('--config.model.dtype=float32')
        raise UserError(
            f'not finite at step {step}: {", ".join(n for n, s in bad.items() if s == step)}. No state from there on '
            f'was saved; the last good checkpoint is '
            + (f'{self._saver.directory / str(good)}' if good is not None else 'none')
            + f'. Start again with {" or ".join(cures)}; {RESUME}'
        )
