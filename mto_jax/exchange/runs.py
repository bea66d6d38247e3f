"""Weights out of the checkpoints of a workdir, and into a new one."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mto_jax.errors import UserError
from mto_jax.exchange.model import Weights, encoder_alone
from mto_jax.runtime import environment, parallel
from mto_jax.runtime.workdir import completed
from mto_jax.training import checkpoint
from mto_jax.training.train_state import TrainState

HEAD = 'head'  # the entry of the model state that keeps the head of converted weights


def load(path: epath.PathLike, teacher: bool = False) -> tuple[Weights, epath.Path]:
    """The weights in a workdir (its newest step) or its checkpoints/<step>, and where that is.

    Of a fine-tuning with averaged weights, those: they are what its results are of.

    Args:
      teacher: those of the method's teacher.

    Raises:
      UserError: if there is no checkpoint, it is damaged, a probe's, or has no teacher.
    """

    def read(reader, step):
        saved = reader.config(step)
        if saved['task'] == 'probe':
            raise UserError(f'{path} is of a probe, which trains no encoder; convert {saved["checkpoint"]}')
        config = completed(saved)
        tuned = saved['task'] == 'finetune'
        entry = 'teacher' if teacher else 'ema' if tuned and config.classify.ema else ''
        items = reader.items(step)
        name = f'{checkpoint.STATE}{entry}' if entry else 'params'
        if teacher and name not in items:
            raise UserError(f'{path} has no teacher; leave out --teacher')
        params = _arrays(reader, step, name)
        head, pool = None, ''
        if tuned:
            head, pool = params.pop('head'), config.classify.pool
        elif f'{checkpoint.STATE}{HEAD}' in items:
            head, pool = {'linear': _arrays(reader, step, f'{checkpoint.STATE}{HEAD}')}, config.classify.pool
        if tuned and pool == 'fc_norm':
            params['encoder']['norm'] = head['fc_norm']
        weights = Weights(config, params, head and head['linear'], pool)
        if not tuned and not teacher:
            return weights
        # What has no decoder, head or projector is an encoder, whatever it was pre-trained with.
        noted = f'the {entry or "student"} of a {config.task} of an encoder pre-trained as {config.method}'
        return dataclasses.replace(encoder_alone(weights), notes=(noted,))

    workdir, step, weights = checkpoint.read(str(path), read, '--from')
    return weights, epath.Path(workdir) / checkpoint.NAME / str(step)


def _arrays(reader: checkpoint.Checkpointer, step: int, item: str) -> dict[str, Any]:
    mesh = parallel.make_mesh(1, devices=jax.local_devices()[:1])
    shapes = reader.shapes(step, item)
    found = reader.restore_item(checkpoint.abstract_like(shapes, parallel.replicated(mesh)), step, item)
    return jax.tree.map(np.asarray, found)


def is_run(path: epath.Path) -> bool:
    """Whether it is the workdir of a run, or one of its checkpoints."""
    return (path / checkpoint.NAME).is_dir() or (path.parent.name == checkpoint.NAME and path.name.isdigit())


def save(weights: Weights, workdir: Path) -> None:
    """Write weights as step 0 of a new run, for evaluations and fine-tunings to start from.

    There is no state of an optimizer in it: it cannot be resumed.
    """
    mesh = parallel.make_mesh(1, devices=jax.local_devices()[:1])
    place = parallel.replicated(mesh)
    state = {HEAD: dict(weights.head)} if weights.head else {}
    # An item cannot be empty.
    state = TrainState(np.int32(0), weights.params, {'count': np.int32(0)}, state)
    config = weights.config.to_dict()
    with contextlib.closing(checkpoint.Checkpointer(workdir, 1, state.model_state)) as saver:
        saver.save(jax.device_put(state, place), config, None, environment.describe(mesh))
        saver.wait()
    (workdir / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
