"""What all streamed training tasks do around `training.loop.fit`: each makes a `Plan`, which is run here.

Batches and random streams depend on the step alone, so that a resumed run continues as if it had never stopped.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mto_jax.analysis import plots, report
from mto_jax.data import augment, pipeline, sources
from mto_jax.errors import UserError
from mto_jax.runtime import cpu, environment, hosts, parallel, preemption
from mto_jax.runtime.log import describe_params, read_history, say
from mto_jax.runtime.workdir import hold, record, require_same, require_shared
from mto_jax.training import checkpoint, profile, train_state
from mto_jax.training.feed import Streamed
from mto_jax.training.job import Job
from mto_jax.training.loop import Watch, fit
from mto_jax.training.record import RESUME, Workdir
from mto_jax.training.start import begin
from mto_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked training run of a task: nothing has been trained or written.

    Attributes:
      config: of the run.
      mesh: it runs on.
      source: of the training split.
      job: the training run.
      title: what is trained, for the console.
      watches: `(workdir) -> its watches`.
      fresh: `(sharding) -> the state before the first step`, if there is nothing to resume.
    """

    config: ConfigDict
    mesh: Mesh
    source: sources.Source
    job: Job
    title: str
    watches: Callable[[epath.Path], Sequence[Watch]]
    fresh: Callable[[Any], TrainState]


def devices(config: ConfigDict) -> Mesh:
    """The mesh that the config asks for. To be called first, within `hosts.together()`.

    Raises:
      UserError: for a mesh or a batch that does not fit.
    """
    if config.deterministic:
        environment.make_deterministic()
    if config.allow_cpu:
        cpu.keep_memory()  # acts on threads that start after it: before jax looks for its devices
    mesh = parallel.make_mesh(**config.mesh)
    parallel.check_batch(config.batch_size, config.accumulate, mesh)
    return mesh


def require_accelerator(config: ConfigDict) -> None:
    """Raises UserError where there is only a CPU and the config does not allow it. To be called last of all checks."""
    if jax.default_backend() == 'cpu' and not config.allow_cpu:
        raise UserError(
            'jax found only a CPU, and this config is made for a GPU or TPU. Install jax[cuda12] or jax[tpu], check '
            'that no other program holds the device, or train on the CPU with --config.allow_cpu=True'
        )


def run(plan: Plan, workdir: epath.Path) -> TrainState:
    """Train, resuming what `workdir` holds; returns the final state.

    Raises:
      UserError: for a workdir of another run or in use, hosts that do not run the same, a checkpoint that cannot be
        read or written, or a step that is not finite.
      Preempted: after SIGTERM, once everything is saved.
    """
    config, mesh, job = plan.config, plan.mesh, plan.job
    profile.check(config.profile_steps, job.total)
    part = parallel.local_part(config.batch_size, mesh)
    data = {'order': plan.source.order(part), 'images': plan.source.contents, 'steps_per_epoch': job.per_epoch}
    about = environment.describe(mesh) | data
    hosts.agree(about | {'config': {k: v for k, v in config.to_dict().items() if k != 'hosts'}})
    entries = job.shapes.model_state
    with (
        jax.set_mesh(mesh),
        _held(workdir),
        contextlib.closing(checkpoint.Checkpointer(workdir, config.checkpoints.keep, entries)) as saver,
        preemption.watch() as preempted,
        memory_explained(),
    ):
        _require_own(config, workdir, saver)
        saver.keep_constants(job.objective.constants)
        state, before = begin(config, job, job.sharding(mesh), saver, plan.fresh)
        start = int(state.step)
        _require_images(config, before or {}, about)
        # Not earlier: a config that does not fit the checkpoint must not replace the one that does.
        with hosts.together():
            if hosts.is_first():
                record(workdir, config.to_dict(), about)
        _announce(plan, state, start)
        for line in _changed(before, about) if before else ():
            say(line)
        feed = profile.traced(_feed(plan, part, start), workdir / 'profile', config.profile_steps)
        with contextlib.closing(Workdir(workdir, start, job, saver, config, about)) as kept, feed as batches:
            state = fit(batches, state, start, job.total, plan.watches(workdir), kept, preempted)
        say(f'checkpoint: {saver.directory / str(saver.latest())}')
    return state


def show(workdir: epath.Path, accuracies: Mapping | None = None) -> None:
    """Draw the curves, heterogeneity and report of a finished run; `accuracies` as for `report.finish`."""
    if hosts.is_first():
        history = read_history(workdir)
        plots.curves(workdir / 'curves.png', {workdir.name: history})
        plots.per_block(workdir / 'heterogeneity.png', history)
        report.finish(workdir, [workdir], accuracies)
    say(f'figures and metrics: {workdir}')


def _require_own(config, workdir, saver) -> None:
    """Raises UserError where the workdir holds another run's checkpoints, or those of an earlier version."""
    if not saver.steps or config.resume_anyway:
        return
    with contextlib.suppress(checkpoint.Damaged):  # looked at when it is restored
        saver.require_current(saver.latest())
    with hosts.together():
        require_same(workdir, config.to_dict())


def _require_images(config, before, now) -> None:
    """Raises UserError where a checkpoint was trained on other images, or on other labels of them."""
    there = before.get('images', now['images'])  # an older checkpoint does not say
    if there != now['images'] and not config.resume_anyway:
        raise UserError(
            f'data: the checkpoint was trained on {there}; {config.data.train_split!r} has {now["images"]} now. Give '
            'the images it had, choose another --workdir, or go on with these: --config.resume_anyway=True'
        )


def _announce(plan, state, start) -> None:
    config, job = plan.config, plan.job
    say(f'{plan.title}: {describe_params(state.params)}')
    say(
        f'{plan.source.num_examples:,} images, batch {config.batch_size}, {job.per_epoch} steps per epoch, '
        f'{config.epochs:g} epochs = {job.total} steps on {plan.mesh.size} {jax.devices()[0].platform} device(s)'
        + (f', resuming at step {start}' if 0 < start < job.total else ', all done already' * (start > 0))
    )


def _feed(plan, part, start) -> Streamed:
    """The batches from step `start` on."""
    config, mesh, job = plan.config, plan.mesh, plan.job
    data, batch_size, seed = config.data, config.batch_size, config.seed

    def put(batch):
        if 'label' in job.microbatch:
            sources.require_known(batch['label'], data)
        on_device = data.resize == 'device'
        batch = parallel.put_batch({n: batch[n] for n in (*job.microbatch, *['size'] * on_device)}, mesh)
        if on_device:
            to = tuple(data.image_size)
            batch['image'] = augment.resize(batch['image'], batch.pop('size'), to, data.interpolation)
        return batch

    batches = pipeline.train_batches(plan.source, data, batch_size, seed, start, job.total, part)
    placed = pipeline.Prefetch(batches, put)
    return Streamed(job, mesh, placed, train_state.stream(config.seed, 'train'))


@contextlib.contextmanager
def _held(workdir):
    """Hold the workdir, in the first process, for all of them; raises UserError where some see another folder."""
    with contextlib.ExitStack() as stack:
        token = ''
        with hosts.together():
            if hosts.is_first():
                token = stack.enter_context(hold(workdir))
        token = hosts.gather(token)[0]
        with hosts.together():
            require_shared(workdir, token)
        yield


@contextlib.contextmanager
def memory_explained():
    """Say what helps if a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        first = next(iter(str(e).splitlines()))[:300]
        raise UserError(
            f'out of device memory ({first}). Start again with --config.accumulate=2 (the same batch in microbatches), '
            '--config.model.remat=True (recompute blocks) or --config.mesh.fsdp=-1 --config.mesh.data=1 (split the '
            f'state); {RESUME}. Where it ran out in an evaluation, give it a smaller --config.eval.batch_size, and kNN '
            'and L-BFGS fewer --config.eval.train_examples'
        ) from e


def _changed(before, now) -> list[str]:
    """What differs from the conditions under which a checkpoint was made, for the console."""
    a, b = hosts.flatten(before), hosts.flatten(now)
    # An older checkpoint may not have had all of it.
    lines = [f'  {k}: {a[k]} then, {b[k]} now' for k in b if k in a and a[k] != b[k]]
    if lines:
        lines.insert(0, 'the checkpoint was saved under other conditions; the run continues, but not bitwise as there:')
    if before.get('order') != now['order']:
        lines.append('  from here on, examples come in a different order than they would have')
    return lines
