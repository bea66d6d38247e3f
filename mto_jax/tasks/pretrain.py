"""`config.task='pretrain'`: what is checked, set up and watched around `training.loop.fit`.

Where it starts: training/start.py. Batches and random streams depend on the step alone, so that a resumed run continues
as if it had never stopped.
"""

import contextlib
from functools import partial

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mto_jax.analysis import plots, report
from mto_jax.data import pipeline, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.runtime import cpu, environment, hosts, parallel, preemption
from mto_jax.runtime.log import describe_params, read_history, say
from mto_jax.runtime.workdir import hold, record, require_same
from mto_jax.training import checkpoint, job, schedules, train_state
from mto_jax.training.feed import Streamed
from mto_jax.training.loop import Seen, Watch, every, fit
from mto_jax.training.record import RESUME, Workdir
from mto_jax.training.start import begin
from mto_jax.training.train_state import TrainState


def run(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Pre-train as `config` says, resuming what `workdir` holds; returns the final state.

    Raises:
      UserError: for a bad config, missing data, a workdir of another run or in use, hosts that do not run the same, a
        checkpoint that cannot be written, or a step that is not finite.
      Preempted: after SIGTERM, once everything is saved.
    """
    workdir = epath.Path(workdir)
    mesh, source, watched, training = check(config)
    about = environment.describe(mesh) | {'order': source.order(parallel.local_part(config.batch_size, mesh))}
    hosts.agree(about | {'config': {k: v for k, v in config.to_dict().items() if k != 'hosts'}})
    entries = training.shapes.model_state
    with (
        jax.set_mesh(mesh),
        _held(workdir),
        contextlib.closing(checkpoint.Checkpointer(workdir, config.checkpoints.keep, entries)) as saver,
        preemption.watch() as told_to_end,
    ):
        if saver.steps and not config.resume_anyway:
            with contextlib.suppress(checkpoint.Damaged):  # looked at when it is restored
                saver.require_current(saver.latest())
            with hosts.together():
                require_same(workdir, config.to_dict())
        with _memory_explained():
            return _train(config, workdir, training, mesh, source, watched, saver, about, told_to_end)


def check(config: ConfigDict) -> tuple[Mesh, sources.Source, sources.Source, job.Job]:
    """What a pre-training needs: its mesh, training split, validation split, and job. Nothing has run or been written.

    Raises:
      UserError: for a bad config or missing data, on any host.
    """
    if config.allow_cpu:
        cpu.keep_memory()  # acts on threads that start after it: before jax looks for its devices
    with hosts.together():
        mesh = parallel.make_mesh(**config.mesh)
        parallel.check_batch(config.batch_size, config.accumulate, mesh)
        source = sources.open_source(config.data, config.data.train_split)
        watched = sources.open_source(config.data, config.data.val_split)
        training = job.prepare(config, source.num_examples)
        probes.check(training.objective.method, config, mesh)  # also where none is used: a mistake is better found now
        training.sharding(mesh)
        _require_accelerator(config)
    return mesh, source, watched, training


def _train(config, workdir, training, mesh, source, watched, saver, about, told_to_end) -> TrainState:
    """The run itself, once everything that can be wrong at the start has been looked at."""
    seed, total, per_epoch = config.seed, training.total, training.per_epoch
    method = training.objective.method
    saver.keep_constants(training.objective.constants)
    state, before = begin(config, training, training.sharding(mesh), saver)
    start = int(state.step)
    # Only now: a config that the checkpoint does not fit must not replace the one that it does.
    with hosts.together():
        if hosts.is_first():
            record(workdir, config.to_dict(), about)
    say(f'{config.method}, MTO {"on" if method.mto else "off"}: {describe_params(state.params)}')
    say(
        f'{source.num_examples:,} images, batch {config.batch_size}, {per_epoch} steps an epoch, '
        f'{config.epochs:g} epochs = {total} steps on {mesh.size} {jax.devices()[0].platform} device(s)'
        + (f', resuming at step {start}' if start else '')
    )
    for line in _changed(before, about) if before else ():
        say(line)

    part = parallel.local_part(config.batch_size, mesh)
    images = (
        {'image': b['image']}
        for b in pipeline.train_batches(source, config.data, config.batch_size, seed, start, total, part)
    )
    batches = pipeline.Prefetch(images, partial(parallel.put_batch, mesh=mesh))
    feed = Streamed(training, mesh, batches, train_state.stream(seed, 'train'))
    watches = _watches(config, workdir, training, mesh, watched)
    with contextlib.closing(Workdir(workdir, start, training, saver, config, about)) as kept:
        state = fit(feed, state, start, total, watches, kept, told_to_end)
    if hosts.is_first():
        history = read_history(workdir)
        plots.curves(workdir / 'curves.png', {workdir.name: history})
        plots.per_block(workdir / 'heterogeneity.png', history)
        report.finish(workdir, [workdir])
    say(f'pictures and metrics: {workdir}, checkpoint: {saver.directory / str(saver.latest())}')
    return state


def _watches(config, workdir, training, mesh, watched) -> list[Watch]:
    """What is looked at on the way: the diagnosis with its pictures, and kNN on the validation split."""
    total, eval_steps = training.total, schedules.to_steps(config.eval.every_epochs, training.per_epoch)
    count = min(64, watched.num_examples)
    # A folder's first images are all of one class. A sequential format would be read to its end for a random subset.
    limit = count if watched.random_access else 0
    fixed = next(pipeline.eval_batches(watched, config.data, count, limit))['image']
    encode = features.encoder(training.objective.method, config)
    diagnosis = jax.jit(training.diagnose, out_shardings=parallel.replicated(mesh))
    key = train_state.stream(config.seed, 'diagnose')

    def diagnose(step, state):
        seen = jax.device_get(diagnosis(state, fixed, key))
        rows = {f'block/{n}/{i}': v for n, values in seen['blocks'].items() for i, v in enumerate(values)}
        images = {n: plots.as_rgb(v[: config.log_images]) for n, v in seen['images'].items()}
        if hosts.is_first():
            plots.pictures(workdir / 'reconstructions.png', images, config.log_images)
        return Seen(rows | seen['scalars'], images)

    def knn(step, state):
        weights = features.weights(state, config.eval)
        found = probes.probe(encode, weights, config, mesh, config.data.val_split, ('knn',))
        say(f'step {step} validation: ' + ', '.join(f'{k} {v:.4f}' for k, v in found.items()))
        return Seen({f'val_{k}': v for k, v in found.items()}, score=found[f'knn_{config.eval.knn_k[-1]}'])

    watches = []
    if config.diagnose_every:
        watches.append(Watch(diagnose, every(config.diagnose_every, total), at_start=True))
    if eval_steps:
        watches.append(Watch(knn, every(eval_steps, total)))
    return watches


@contextlib.contextmanager
def _held(workdir):
    """The workdir, held by the first process for all."""
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_first():
                stack.enter_context(hold(workdir))
        yield


@contextlib.contextmanager
def _memory_explained():
    """Say what helps where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        first = next(iter(str(e).splitlines()))[:300]
        raise UserError(
            f'out of device memory ({first}). Start again with --config.accumulate=2 (the same batch in microbatches), '
            '--config.model.remat=True (recompute blocks) or --config.mesh.fsdp=-1 --config.mesh.data=1 (split the '
            f'state); {RESUME}'
        ) from e


def _require_accelerator(config) -> None:
    if jax.default_backend() == 'cpu' and not config.allow_cpu:
        raise UserError(
            'jax found only a CPU, and this config is made for a GPU or TPU. Install jax[cuda12] or jax[tpu], see that '
            'no other program holds the device, or train on the CPU with --config.allow_cpu=True'
        )


def _changed(before, now) -> list[str]:
    """What differs from the conditions under which a checkpoint was made, for the console."""
    a, b = hosts.flatten(before), hosts.flatten(now)
    lines = [f'  {k}: {a.get(k)} then, {b[k]} now' for k in b if a.get(k) != b[k]]
    if lines:
        lines.insert(0, 'the checkpoint was made under other conditions; the run goes on, but not bitwise as there:')
    if before.get('order') != now['order']:
        lines.append('  from here on the examples come in another order than they would have')
    return lines
