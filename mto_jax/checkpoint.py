"""Checkpoints: the only module that imports orbax.

A workdir holds `config.json` and `checkpoints/<step>/` with the items params, opt_state and config, so that an
evaluation can read the parameters alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mto_jax.errors import UserError
from mto_jax.train_state import TrainState

# Fields that change what is shown or kept, not what is computed.
FREE_FIELDS = (
    'log_',
    'diagnose_every',
    'checkpoints.',
    'eval.',
    'compare.',
    'finetune.',
    'study.',
    'workdir',
    'resume_anyway',
    'task',
)
FREE_FIELDS += ('checkpoint', 'data.data_dir', 'data.threads', 'data.val_split', 'data.test_split')


class Checkpointer:
    """Saves and restores the states of one workdir. Saving is asynchronous; `close` waits for it."""

    def __init__(self, workdir: Path | str, keep: int = 1):
        self.directory = Path(workdir).resolve() / 'checkpoints'
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(get_metric_fn=lambda m: m['score'], n=1),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy),
            # Named here, so that a new process can read the metadata of what an earlier one saved.
            item_handlers={
                'params': ocp.StandardCheckpointHandler(),
                'opt_state': ocp.StandardCheckpointHandler(),
                'config': ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, config: Mapping[str, Any], score: float) -> None:
        """Save `state` under its step. `score`: higher is better; the best one is kept beside the newest."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            config=ocp.args.JsonSave(config),
        )
        self._manager.save(int(state.step), args=args, metrics={'score': float(score)}, force=True)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of `step`, with the shapes, dtypes and shardings of `abstract` (jax.ShapeDtypeStruct leaves).

        Raises:
          UserError: if paths, shapes or dtypes differ, before anything is read.
        """
        self.check(abstract.params, step, 'params')
        self.check(abstract.opt_state, step, 'opt_state')
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        out = self._manager.restore(step, args=args)
        return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), out['params'], out['opt_state'])

    def restore_params(self, abstract: Any, step: int) -> Any:
        """The parameters of `step` alone. Raises as `restore`."""
        self.check(abstract, step, 'params')
        return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))['params']

    def config(self, step: int) -> dict[str, Any]:
        """The config that the checkpoint was saved with."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))['config']

    def check(self, abstract: Any, step: int, item: str) -> None:
        """Compare the tree of a saved item with `abstract`.

        Raises:
          UserError: listing every path that is missing, superfluous, or of another shape or dtype.
        """
        saved = _flat(self._manager.item_metadata(step)[item].tree)
        wanted = _flat(abstract)
        lines = [f'  {p}: not in the checkpoint' for p in wanted if p not in saved]
        lines += [f'  {p}: not in the model' for p in saved if p not in wanted]
        lines += [
            f'  {p}: {saved[p]} in the checkpoint, {wanted[p]} in the model'
            for p in wanted
            if p in saved and saved[p] != wanted[p]
        ]
        if lines:
            more = [f'  ... and {len(lines) - 20} more'] if len(lines) > 20 else []
            raise UserError(
                '\n'.join(
                    [
                        f'the checkpoint {self.directory / str(step)} is of another model ({item}):',
                        *lines[:20],
                        *more,
                    ]
                )
            )

    def wait(self) -> None:
        """Wait for the save under way; raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _flat(tree) -> dict[str, tuple]:
    """{path: (shape, dtype name)} of every array, the same for live trees and orbax metadata."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
    names = {}
    for path, leaf in leaves:
        parts = [str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p)))) for p in path]
        names['/'.join(parts)] = (tuple(leaf.shape), str(leaf.dtype))
    return names


def abstract_like(tree: Any, sharding) -> Any:
    """jax.ShapeDtypeStruct leaves with `sharding`, for `restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def claim_workdir(workdir: Path, config: Mapping[str, Any], resume_anyway: bool) -> None:
    """Write `config.json` into a new workdir, or compare it with the one of the run that is to be resumed.

    Raises:
      UserError: if the workdir cannot be written, or fields that matter differ and `resume_anyway` is not set.
    """
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            changed = differences(json.loads(path.read_text()), json.loads(json.dumps(config)))
            if changed and not resume_anyway:
                raise UserError(
                    f'{workdir} holds a run with another config:\n'
                    + '\n'.join(f'  {k}: {a!r} there, {b!r} now' for k, (a, b) in changed.items())
                    + '\nChoose another --workdir, or set --config.resume_anyway=True to go on with the new values.'
                )
        path.write_text(json.dumps(config, indent=2) + '\n')
    except OSError as e:
        raise UserError(f'the workdir {workdir} cannot be written: {e.strerror}') from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> dict[str, tuple]:
    """Fields that differ between two configs, {dotted name: (old, new)}, without those that do not matter."""
    out = {}
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out |= differences(a, b, f'{name}.')
        elif a != b and not any(name == f or (f[-1] in '._' and name.startswith(f)) for f in FREE_FIELDS):
            out[name] = (a, b)
    return out


def locate(path: str) -> tuple[Path, int]:
    """The workdir and step that `config.checkpoint` names: a workdir (its newest step) or workdir/checkpoints/step.

    Raises:
      UserError: if there is no checkpoint.
    """
    where = Path(path)
    if where.name.isdigit() and where.parent.name == 'checkpoints' and where.is_dir():
        return where.parent.parent, int(where.name)
    steps = [int(p.name) for p in (where / 'checkpoints').glob('*') if p.name.isdigit()]
    if not path or not steps:
        raise UserError(
            f'checkpoint is {path!r}: no checkpoint there; give the workdir of a pre-training, or its '
            'checkpoints/<step>, with --config.checkpoint'
        )
    return where, max(steps)
