"""Checkpoints: the only module that imports orbax.

A workdir holds `checkpoints/<step>/` with the items params, opt_state, config, about and one per entry of the model
state (`model_state.teacher`), so that an evaluation can read the parameters, or a teacher, alone. `about` tells what
the run depended on, and a checksum of every array: orbax does not notice a flipped bit, so a restored state is compared
with it. What never changes while a run trains (an objective's constants) is written once, to `constants/` next to them.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mto_jax.errors import Temporary, UserError
from mto_jax.runtime import hosts
from mto_jax.runtime.log import say
from mto_jax.runtime.workdir import read_json, write
from mto_jax.training.train_state import TrainState

NAME = 'checkpoints'  # of the folder in a workdir
FORMAT = 2  # of what is saved; 1 had no model state and another tree of the optimizer
STATE = 'model_state.'  # begins the name of an item that holds an entry of the model state
CONSTANTS = 'constants'  # of a run: a folder, and a file of their checksums
ASIDE = 'damaged'  # where what cannot be restored is moved
RESTORED = '_Checkpointer:restore'  # the barrier of orbax at which a host that has read waits for the others
DELETION = 5.0  # seconds within which a checkpoint that is being deleted is gone

T = TypeVar('T')

# By default orbax has each replica write a slice of every array, and compiles a program per slice (220 where a model of
# two blocks is first saved on 8 devices). Below a mebibyte a slice is not worth it. This handler keeps no metadata of
# single arrays, which only random keys and custom chunks need.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True
)


class Checkpointer:
    """Saves and restores the states of one workdir. Saving is asynchronous; `close` waits for it.

    Args:
      workdir: holds the checkpoints.
      keep: how many of the newest are kept.
      entries: of the model state that will be saved; those of what is there are known.
      read_only: for everyone but the job that holds the workdir's lock: nothing in it is written, cleaned or deleted.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 1, entries: Iterable[str] = (), *, read_only: bool = False):
        self.workdir = epath.Path(workdir).resolve()
        self.directory = self.workdir / NAME
        arrays = {'params', 'opt_state', *(f'{STATE}{entry}' for entry in entries)}
        arrays |= {p.name for p in self.directory.glob(f'*/{STATE}*')}
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda m: m['score'], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            # best_fn, too: without it no metrics are written, and a later process would keep everything.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda m: m['score'],
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
            # Named here, so that a new process can read the metadata of what an earlier one saved.
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in sorted(arrays)},
                'config': ocp.JsonCheckpointHandler(),
                'about': ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, config: Mapping[str, Any], score: float | None, about: Mapping[str, Any]) -> None:
        """Start to save `state` under its step.

        Args:
          config: of the run.
          score: of this very state, higher is better: the best one is kept in addition to the newest. None if it was
            not evaluated.
          about: plain values, see `environment.describe`.

        Raises:
          Temporary: if it cannot be written, or the save before this one could not. Older checkpoints are intact.
        """
        items = _items(state)
        sums = {name: checksums(tree) for name, tree in items.items()}
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            config=ocp.args.JsonSave(config),
            about=ocp.args.JsonSave({**about, 'format': FORMAT, 'checksums': sums}),
        )
        with self._explained():
            metrics = None if score is None else {'score': float(score)}
            self._manager.save(int(state.step), args=args, metrics=metrics, force=True)

    def keep_constants(self, constants: Any) -> None:
        """Write a run's constants, a pytree, next to its checkpoints; if they exist already, compare.

        Raises:
          UserError: if those there are others: the states saved so far were trained with them.
        """
        if not jax.tree.leaves(constants):
            return
        sums, kept = checksums(constants), self._constants_kept()
        if kept is None:
            with self._explained(), ocp.StandardCheckpointer() as writer:
                writer.save(self.workdir / CONSTANTS, constants, force=True)
            if hosts.is_first():
                write(self.workdir / f'{CONSTANTS}.json', json.dumps(sums, indent=2) + '\n')
        elif wrong := sorted(n for n in sums.keys() | kept.keys() if sums.get(n) != kept.get(n)):
            raise UserError(
                f'{self.workdir / CONSTANTS} holds other values of {", ".join(wrong[:3])} ({len(wrong)} of {len(sums)} '
                'arrays) than this run would train with; use the same frozen weights, or choose another --workdir'
            )

    def _constants_kept(self) -> dict[str, int] | None:
        path = self.workdir / f'{CONSTANTS}.json'
        return read_json(path) if path.exists() else None

    def restore_newest(self, abstract: TrainState) -> TrainState | None:
        """The newest intact state, or None if nothing was ever saved.

        Damaged checkpoints are reported and moved to `<workdir>/damaged`, so that its step can be saved again.

        Raises:
          UserError: if the checkpoint is of another model, or every one is damaged.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return self.restore(abstract, step)
            except Damaged as e:
                problem = str(e)
            aside = self.workdir / ASIDE / str(step)
            say(f'{problem}. It is moved to {aside}, and the checkpoint before it is used.')
            self._put_aside(step, aside)
        if steps:
            raise UserError(
                f'all checkpoints of {self.workdir} are damaged (steps {steps}); they are in {self.workdir / ASIDE}. '
                'Start again to train from the beginning'
            )
        return None

    def _put_aside(self, step: int, aside: epath.Path) -> None:
        if hosts.is_first():
            aside.parent.mkdir(parents=True, exist_ok=True)
            if aside.exists():
                aside.rmtree()
            (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'put aside {step}')
        self._manager.reload()

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of `step`, with the shapes, dtypes and shardings of `abstract` (jax.ShapeDtypeStruct leaves).

        Raises:
          UserError: if it was saved by an earlier version, or paths, shapes or dtypes differ, before anything is read.
          Damaged: if it cannot be read or is not what was saved.
        """
        self.require_current(step)
        self.config(step)  # without which it cannot be resumed
        out = self._read(_items(abstract), step)
        return TrainState(
            jax.device_put(np.int32(step), abstract.step.sharding),
            out['params'],
            out['opt_state'],
            {entry: out[f'{STATE}{entry}'] for entry in abstract.model_state},
        )

    def require_current(self, step: int) -> None:
        """Raises UserError where the state of `step` was saved by a version whose states cannot be resumed."""
        if self.about(step).get('format', 1) != FORMAT:
            raise UserError(
                f'the checkpoint {self.directory / str(step)} was saved by an earlier version and cannot be resumed; '
                'choose another --workdir to start again. Evaluations (configs/knn.py, configs/linear.py) can read it'
            )

    def restore_item(self, abstract: Any, step: int, name: str) -> Any:
        """One item of `step` alone: 'params', or 'model_state.' and an entry. Raises as `restore`."""
        return self._read({name: abstract}, step)[name]

    def items(self, step: int) -> set[str]:
        """The names of the items of `step`."""
        return {p.name for p in (self.directory / str(step)).glob('*') if p.is_dir()}

    def shapes(self, step: int, item: str) -> Any:
        """The tree of a saved item, with jax.ShapeDtypeStruct leaves: for `restore_item`, where no method gives it.

        Raises:
          Damaged: if it cannot be read.
        """
        try:
            tree = self._manager.item_metadata(step)[item].tree
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, is_leaf=lambda x: hasattr(x, 'shape')
            )
        except Exception as e:
            raise Damaged(f'the checkpoint {self.directory / str(step)} cannot be read ({_first_line(e)})') from e

    def _read(self, items: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        with self._reading(step):
            for name, abstract in items.items():
                self.check(abstract, step, name)
        args = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
        with self._reading(step, RESTORED):
            out = self._manager.restore(step, args=ocp.args.Composite(**args, about=ocp.args.JsonRestore()))
        with self._reading(step):
            wrong = []
            for name in items:
                found, saved = checksums(out[name]), out['about']['checksums'][name]
                wrong += [f'{name}/{path}' for path in found if found[path] != saved[path]]
            if wrong:
                where = self.directory / str(step)
                named = ', '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
                raise Damaged(f'the checkpoint {where} is damaged: the checksum of {named} differs')
        return out

    @contextlib.contextmanager
    def _reading(self, step: int, barrier: str = ''):
        """What cannot be read on one host is `Damaged` on all: those that can read it would wait for that host.

        Args:
          barrier: at which orbax makes them wait.
        """
        problem = ''
        try:
            yield
        except Damaged as e:
            problem = str(e)
        except UserError:  # of a model, which is the same on all hosts
            raise
        except Exception as e:  # whatever a reader makes of a damaged file
            where = self.directory / str(step)
            problem = f'the checkpoint {where} cannot be read ({type(e).__name__}: {_first_line(e)})'
        if problem and barrier and jax.process_count() > 1:
            multihost_utils.sync_global_devices(barrier)
        if problem := next(filter(None, hosts.gather(problem)), ''):
            raise Damaged(problem)

    def config(self, step: int) -> dict[str, Any]:
        """The config that the checkpoint was saved with."""
        return self._json(step, 'config')

    def about(self, step: int) -> dict[str, Any]:
        """What the run depended on, see `save`."""
        return self._json(step, 'about')

    def _json(self, step, item):
        with self._reading(step, RESTORED):
            return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def check(self, abstract: Any, step: int, item: str) -> None:
        """Compare the tree of a saved item with `abstract`.

        Raises:
          UserError: listing every path that is missing, superfluous, or of another shape or dtype.
          Damaged: if the item says nothing of its tree.
        """
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise Damaged(f'the checkpoint {self.directory / str(step)} is damaged: the metadata of {item} are missing')
        saved = _flat(metadata.tree)
        wanted = _flat(abstract)
        lines = [f'  {p}: not in the checkpoint' for p in wanted if p not in saved]
        lines += [f'  {p}: not in the model' for p in saved if p not in wanted]
        lines += [
            f'  {p}: {saved[p]} in the checkpoint, {wanted[p]} in the model'
            for p in wanted
            if p in saved and saved[p] != wanted[p]
        ]
        if lines:
            more = [f'  ... and {len(lines) - 5} more'] if len(lines) > 5 else []
            raise UserError(
                '\n'.join(
                    [
                        f'the checkpoint {self.directory / str(step)} is of another model ({item}):',
                        *lines[:5],
                        *more,
                    ]
                )
            )

    def poll(self) -> None:
        """Raise the error of the save under way, if it has failed by now."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for the save under way; raises its error."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the files. Raises nothing: it also runs while an error is on its way."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except Exception as e:
            self._manager.reload()
            raise Temporary(
                f'a checkpoint could not be saved in {self.directory} ({type(e).__name__}: {_first_line(e)}). '
                f'Intact checkpoints: {", ".join(map(str, self.steps)) or "none"}. Free some space or choose another '
                '--workdir; the same command resumes'
            ) from e


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), '')[:300]


class Damaged(UserError):
    """A checkpoint that cannot be read, or is not what was saved."""


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, as a checkpoint's items."""
    entries = {f'{STATE}{entry}': tree for entry, tree in state.model_state.items()}
    return {'params': state.params, 'opt_state': state.opt_state, **entries}


def checksums(tree: Any) -> dict[str, int]:
    """{path: uint32} of every array: the sum over its elements' bits times odd weights that differ by position.

    Integer arithmetic modulo 2**32: exact, and the same for every sharding. Any single flipped bit changes it, and so
    do elements that changed places. Computed on the devices.
    """
    leaves = {path: leaf for path, (leaf, *_) in _flat(tree, keep=True).items()}
    return {path: int(v) for path, v in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # One program for all arrays: many small ones in flight, each with a reduction over devices, deadlock on a CPU.
    return {path: _checksum(x) for path, x in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    weights = (index * jnp.uint32(0x9E3779B1)) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def _flat(tree, keep: bool = False) -> dict[str, tuple]:
    """{path: (shape, dtype name)} of every array, or (leaf,) with `keep`; as well of orbax metadata."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
    names = {}
    for path, leaf in leaves:
        parts = [str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p)))) for p in path]
        names['/'.join(parts)] = (leaf,) if keep else (tuple(leaf.shape), str(leaf.dtype))
    return names


def abstract_like(tree: Any, shardings: Any) -> Any:
    """jax.ShapeDtypeStruct leaves with `shardings` (a tree like it, or one for all), for `restore`."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def constants(workdir: epath.Path, abstract: Any) -> Any:
    """What `Checkpointer.keep_constants` wrote, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: if it is not there, cannot be read, or is of other shapes.
    """
    path = epath.Path(workdir).resolve() / CONSTANTS  # orbax wants it so
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(path, abstract)
    except Exception as e:
        raise UserError(
            f'{path} cannot be read ({type(e).__name__}: {_first_line(e)}), and the checkpoint that it is of is gone; '
            'choose another --workdir'
        ) from e


def locate(path: str, given: str = '--config.checkpoint') -> tuple[epath.Path, int]:
    """The workdir and step that a path names: a workdir (its newest step) or workdir/checkpoints/step.

    Args:
      given: the flag or argument that it comes from.

    Raises:
      UserError: if there is no checkpoint, naming `given`.
    """
    where = epath.Path(path)
    if where.name.isdigit() and where.parent.name == NAME and where.is_dir():
        return where.parent.parent, int(where.name)
    steps = [int(p.name) for p in (where / NAME).glob('*') if p.name.isdigit()]
    if not path:
        raise UserError(f'{given} is missing: give the workdir of a pre-training, or its checkpoints/<step>')
    if not steps:
        beside = sorted(int(p.name) for p in where.parent.glob('*') if p.name.isdigit())
        known = f' (steps there: {", ".join(map(str, beside))})' if where.parent.name == NAME and beside else ''
        raise UserError(
            f'{given.removeprefix("--config.")} is {path!r}: no checkpoint there{known}; give the workdir of a '
            f'pre-training, or its checkpoints/<step>, with {given}'
        )
    return where, max(steps)


def read(
    path: str, load: Callable[[Checkpointer, int], T], given: str = '--config.checkpoint'
) -> tuple[epath.Path, int, T]:
    """Read a checkpoint of a workdir that another job may be training in: `(workdir, step, load(checkpointer, step))`.

    Where the newest checkpoint is deleted while it is read, the newest one that is there then is used, and said so.

    Args:
      path, given: as for `locate`.
      load: reads what is needed; called once per attempt. The checkpointer is read-only.

    Raises:
      UserError: if there is no checkpoint, and whatever `load` raises.
    """
    while True:
        with hosts.together():
            workdir, step = locate(path, given)
        step = hosts.gather(step)[0]
        with contextlib.closing(Checkpointer(workdir, read_only=True)) as reader:
            try:
                return workdir, step, load(reader, step)
            except Damaged as e:
                problem = str(e)
        if not hosts.gather(_is_gone(workdir / NAME / str(step)))[0]:
            raise Damaged(problem)
        say(f'the checkpoint {workdir / NAME / str(step)} was deleted while it was read; looking for the next newest')


def _is_gone(path: epath.Path) -> bool:
    """Whether `path` does not exist, waiting for a deletion that may be under way."""
    deadline = time.monotonic() + DELETION
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not path.exists()
