"""Where a run starts: the first of four points that applies.

1. The newest checkpoint of its own workdir: the run resumes, bitwise equal to an uninterrupted one.
2. `config.resume_from`: the full state in another run's checkpoint, at its step. That run is only read.
3. `config.init_from`: the weights in another run's checkpoint (and its model state, such as a teacher), at
   step 0 with a fresh optimizer.
4. Fresh weights.

Tasks define 3 and 4: a training on labels has no 3, and a fine-tuning's 4 has the encoder of `config.checkpoint`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from mto_jax.config import EVALUATIONS, field_of
from mto_jax.errors import UserError
from mto_jax.runtime.log import say
from mto_jax.runtime.workdir import completed, differences, listed
from mto_jax.training import checkpoint, schedules
from mto_jax.training.checkpoint import Checkpointer
from mto_jax.training.job import Job
from mto_jax.training.train_state import TrainState


def begin(
    config: ConfigDict, job: Job, sharding: Any, saver: Checkpointer, scratch: Callable[[Any], TrainState]
) -> tuple[TrainState, Mapping[str, Any] | None]:
    """The state to start from, placed as `sharding` (a tree like it) says, and what the run that saved it depended on
    (`Checkpointer.about`; None where nothing was saved).

    Args:
      config: of the run.
      job: the training run.
      saver: of the run's own checkpoints.
      scratch: of `sharding`, the state before the first step.

    Raises:
      UserError: for a checkpoint that is missing, damaged, of another model or config, that leaves no steps, or
        whose step would mean another position in this run.
    """
    abstract = checkpoint.abstract_like(job.shapes, sharding)
    if (state := saver.restore_newest(abstract)) is not None:
        step = int(state.step)
        _require_place(config, job, saver, step)
        return state, saver.about(step)
    if config.resume_from:
        return _resumed(config, abstract, job)
    return scratch(sharding), None


def fresh(config: ConfigDict, job: Job, sharding: Any) -> TrainState:
    """The state before a pre-training's first step: the job's own, with the weights that `config.init_from` names."""
    state = jax.jit(partial(job.create, config.seed), out_shardings=sharding)()
    return initialised(config, state) if config.init_from else state


def initialised(config: ConfigDict, state: TrainState) -> TrainState:
    """A fresh state with the weights of the checkpoint that `config.init_from` names: its parameters and model state,
    not its step or optimizer.

    Raises:
      UserError: if there is none, it is damaged, or of another model.
    """
    own = {'params': state.params} | {f'{checkpoint.STATE}{n}': v for n, v in state.model_state.items()}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), own)

    def load(reader, step):
        try:
            return {name: reader.restore_item(tree, step, name) for name, tree in abstract.items()}
        except checkpoint.Damaged:
            raise
        except UserError as e:
            changed = differences(reader.config(step), config.to_dict())
            own = ('method', 'model.', f'{config.method}.', 'data.image_size', 'data.channels')
            shapes = {n: values for n, values in changed.items() if n.startswith(own) or field_of(n) is None}
            raise UserError(f'{e}\nThe configs differ in\n{listed(shapes)}' if shapes else str(e)) from None

    workdir, step, found = checkpoint.read(config.init_from, load, '--config.init_from')
    say(f'weights of {workdir} at step {step}, fresh optimizer')
    return state.replace(
        params=found.pop('params'), model_state={n.removeprefix(checkpoint.STATE): v for n, v in found.items()}
    )


def _resumed(config, abstract, job):
    def load(reader, step):
        _require_place(config, job, reader, step)
        if step >= job.total:
            raise UserError(
                f'resume_from is {config.resume_from!r}, at step {step}; this training ends at step {job.total}: raise '
                '--config.epochs (with --config.resume_anyway=True), or name an earlier checkpoint'
            )
        changed = differences(reader.config(step), config.to_dict())
        changed.pop('init_from', None)  # what that run began with is in its state
        if changed and not config.resume_anyway:
            raise UserError(
                f'resume_from is {config.resume_from!r}, a run with another config:\n{listed(changed)}\nUse its '
                'values, or continue with the new ones: --config.resume_anyway=True'
            )
        return reader.restore(abstract, step), reader.about(step)

    workdir, step, found = checkpoint.read(config.resume_from, load, '--config.resume_from')
    say(f"the state of {workdir} at step {step}; from here on, checkpoints go to this run's own workdir")
    return found


def _require_place(config, job, reader, step):
    """Raises UserError where a saved step would not mean the place in this training that it meant in its own."""
    there, path = completed(reader.config(step)), reader.directory / str(step)
    weights = f'again from its weights: --config.init_from={path} and another --workdir'
    if config.task in EVALUATIONS:  # from the checkpoint that it evaluates
        weights = 'again in another --workdir'
    changed = [
        f'{name} from {old!r} to {new!r}'
        for name, old, new in (
            ('batch_size', there.batch_size, config.batch_size),
            ('data.name', there.data.name, config.data.name),
            ('data.data_dir', there.data.data_dir, config.data.data_dir),
            ('data.train_split', there.data.train_split, config.data.train_split),
        )
        if old != new
    ] or ['other images in the same place']
    # What was saved before it was recorded: as if the images were the same.
    per_epoch = reader.about(step).get('steps_per_epoch', round(job.per_epoch * config.batch_size / there.batch_size))
    if per_epoch != job.per_epoch:
        raise UserError(
            f'{path} is after {step / per_epoch:g} epochs of {per_epoch} steps; with {", ".join(changed)} an epoch has '
            f'{job.per_epoch} steps, and step {step} would be after {step / job.per_epoch:g}. Keep what was '
            f'there (for memory there is --config.accumulate), or start {weights}'
        )
    if step > job.total:
        raise UserError(
            f'epochs is {config.epochs:g}, and {path} is after {step / per_epoch:g}: that is done already; raise '
            f'--config.epochs, or start {weights}'
        )
    ended = schedules.to_steps(there.epochs, per_epoch)
    if not ended <= step < job.total or config.optim.schedule != 'cosine':
        return
    rates = schedules.learning_rate(there.optim, there.batch_size, ended, per_epoch)
    last, raised = float(rates(step - 1)), float(job.schedule(step))
    if raised > last:
        rate = there.optim.min_lr or last
        raise UserError(
            f'{path} ends a training of {there.epochs:g} epochs, at a rate of {last:.3g}; epochs={config.epochs:g} '
            f'would take it back up to {raised:.3g}. Start {weights}; or go on at the rate where it ended: '
            f'--config.optim.lr_reference=0 --config.optim.base_lr={rate:.4g} --config.optim.min_lr={rate:.4g}'
        )
