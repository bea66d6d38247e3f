"""Where numbers and pictures go: TensorBoard through clu, a line on the console, and `metrics.jsonl` for the plots."""

import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mto_jax.errors import UserError
from mto_jax.runtime import hosts
from mto_jax.runtime.workdir import write


class Log:
    """The record of one run, in its workdir, written by the first process alone.

    `metrics.jsonl` is written by `flush`, before each save: a run that resumes from there has every row up to it, and
    drops later ones.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        self._writer = None
        if not hosts.is_first():
            return
        # Here and not above: clu loads TensorFlow, which studies and evaluations in memory do without.
        from clu import metric_writers

        self._path = workdir / 'metrics.jsonl'
        # Nothing of a run that ended before its first save: it starts again.
        self._rows = [r for r in read_history(workdir) if 0 < start_step >= r['step']]
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer:
            values = {k: float(v) for k, v in values.items()}
            self._writer.write_scalars(step, values)
            self._rows.append({'step': step, **values})

    def seen(self, step: int) -> bool:
        """Whether there is a row of that step that is no training interval's, which has the epoch."""
        return bool(self._writer) and any(r['step'] == step and 'epoch' not in r for r in self._rows)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: {name: float (B, H, W, C) in [0, 1]}."""
        if self._writer:
            self._writer.write_images(step, images)

    def flush(self) -> None:
        if self._writer:
            write(self._path, ''.join(json.dumps(r) + '\n' for r in self._rows))
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self.flush()
            self._writer.close()


def read_history(workdir: epath.Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, oldest first; empty without the file.

    Raises:
      UserError: for a line that is not one.
    """
    path, rows = workdir / 'metrics.jsonl', []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            if not all(isinstance(v, int | float) for v in (row['step'], *row.values())):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            shown = line[:60].decode(errors='replace')
            raise UserError(f'{path} is damaged in line {number}: {shown!r}; delete that line to continue') from None
        rows.append(row)
    return rows


def say(text: str) -> None:
    """Print at once, also into a pipe; the first process only."""
    if hosts.is_first():
        print(text, flush=True)


def described(values: Mapping[str, Any]) -> str:
    """Names and values on one line; floats to four decimals, small ones to two digits."""

    def shown(v):
        if not isinstance(v, float):
            return str(v)
        return f'{v:.1e}' if 0 < abs(v) < 1e-3 else f'{v:.4f}'

    return ', '.join(f'{name} {shown(v)}' for name, v in values.items())


def describe_params(params) -> str:
    """The number of parameters, and the largest groups, on a few lines."""
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    return f'{sum(sizes.values()):,} parameters (' + ', '.join(f'{n} {s:,}' for n, s in sizes.items()) + ')'


class Progress:
    """Speed and time left of a loop over steps, averaged since its start or since the last `restart`.

    The end of an interval is seen when the next one has been handed to the device, so that a single interval's own time
    would be off by as much as the host runs ahead; the average settles.
    """

    def __init__(
        self, start_step: int, total_steps: int, batch_size: int, steps_per_epoch: int, roofline: float | None = None
    ):
        """roofline: images per second of which the MFU is a fraction, if there is one."""
        self._total, self._batch, self._per_epoch, self._roofline = total_steps, batch_size, steps_per_epoch, roofline
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Measure from here on: an evaluation, a picture or a save ran before."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    def measure(self, step: int, waited: float) -> dict[str, float]:
        """The epoch, images per second, seconds per step, the fraction of the time spent waiting for data, and the MFU
        (model FLOPs utilisation) where there is a roofline."""
        elapsed = time.perf_counter() - self._time
        self._waited += waited
        seconds = elapsed / max(step - self._step, 1)
        return {
            'epoch': step / self._per_epoch,
            'images_per_s': self._batch / seconds,
            'seconds_per_step': seconds,
            'data_wait': min(1.0, self._waited / elapsed),
        } | ({'mfu': self._batch / seconds / self._roofline} if self._roofline else {})

    def line(self, step: int, values: Mapping[str, float]) -> str:
        left = int((self._total - step) * values['seconds_per_step'])
        eta = f'{left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
        hidden = {'epoch', 'images_per_s', 'seconds_per_step', 'data_wait', 'mfu', 'param_norm', 'model_state_norm'}
        terms = ' '.join(f'{k} {v:.4g}' for k, v in values.items() if k not in hidden)
        utilisation = f', MFU {values["mfu"]:.1%}' if 'mfu' in values else ''
        return (
            f'step {step}/{self._total} epoch {values["epoch"]:.2f} | {terms} | '
            f'{values["images_per_s"]:.0f} images/s{utilisation}, data wait {values["data_wait"]:.0%}, ETA {eta}'
        )
