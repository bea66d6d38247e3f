"""Pre-training from a config: set-up, and the one loop.

Resuming: the newest checkpoint of the workdir is used if there is one, else the state is initialised. Batches and
random streams depend on the step alone, so that a resumed run continues as if it had never stopped.
"""

import contextlib
from functools import partial

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mto_jax import checkpoint, cpu, environment, hosts, job, parallel, preemption, schedules, train_state
from mto_jax.analysis import plots, report
from mto_jax.data import pipeline, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.metrics import Log, Progress, describe_params, read_history, say
from mto_jax.train_state import Meter, TrainState
from mto_jax.workdir import hold, record, require_same

# What a changed field that matters needs where there is something to resume.
RESUME = 'where there is a checkpoint, add --config.resume_anyway=True'


def pretrain(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
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
    entries = jax.eval_shape(training.create, 0).model_state
    with (
        jax.set_mesh(mesh),
        _held(workdir),
        contextlib.closing(checkpoint.Checkpointer(workdir, config.checkpoints.keep, entries)) as saver,
        preemption.watch() as told_to_end,
    ):
        if saver.steps and not config.resume_anyway:
            with hosts.together():
                require_same(workdir, config.to_dict())
        with _memory_explained():
            return _train(config, workdir, training, mesh, source, watched, saver, about, told_to_end)


def check(config: ConfigDict) -> tuple[Mesh, sources.Source, sources.Source, job.Job]:
    """What a pre-training needs: its mesh, training split, validation split, and job. Nothing has run or been written.

    Raises:
      UserError: for a bad config or missing data, on any host.
    """
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
    method, constants = training.objective.method, training.objective.constants
    create, sharding = partial(training.create, seed), training.sharding(mesh)
    state = saver.restore_newest(checkpoint.abstract_like(jax.eval_shape(create), sharding))
    if state is None:
        state = jax.jit(create, out_shardings=sharding)()
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
    for line in _changed(saver.about(start), about) if start else ():
        say(line)

    step_fn = training.step(mesh)
    count = min(64, watched.num_examples)
    # A folder's first images are all of one class. A sequential format would be read to its end for a random subset.
    limit = count if watched.random_access else 0
    fixed = next(pipeline.eval_batches(watched, config.data, count, limit))['image']
    encode = features.encoder(method, config)
    diagnose = jax.jit(training.diagnose, out_shardings=parallel.replicated(mesh))
    log = Log(workdir, start)
    key, diagnose_key = (train_state.stream(seed, name) for name in ('train', 'diagnose'))
    eval_every = schedules.to_steps(config.eval.every_epochs, per_epoch)
    part = parallel.local_part(config.batch_size, mesh)
    batches = pipeline.Prefetch(
        (
            {'image': b['image']}
            for b in pipeline.train_batches(source, config.data, config.batch_size, seed, start, total, part)
        ),
        partial(parallel.put_batch, mesh=mesh),
    )

    def see(step):
        seen = jax.device_get(diagnose(state, fixed, diagnose_key))
        rows = {f'block/{n}/{i}': v for n, values in seen['blocks'].items() for i, v in enumerate(values)}
        log.scalars(step, rows | seen['scalars'])
        shown = {n: v[: config.log_images] for n, v in seen['images'].items()}
        log.images(step, {n: plots.as_rgb(v) for n, v in shown.items()})
        if hosts.is_first():
            plots.pictures(workdir / 'reconstructions.png', shown, config.log_images)

    reporter = _Reporter(log, Progress(start, total, config.batch_size, per_epoch), saver, training.names, config)
    meter = reporter.new_meter()
    try:
        if not start and config.diagnose_every:
            see(0)
        for step in range(start + 1, total + 1):
            state, meter = step_fn(state, meter, constants, next(batches), key)
            last, ending = step == total, told_to_end(step)
            due_look, due_eval, due_save = (
                bool(every) and (last or step % every == 0)
                for every in (config.diagnose_every, eval_every, config.checkpoints.every)
            )
            due_save |= last or due_eval  # a state that was evaluated may be the best
            if last or ending or step % config.log_every == 0:
                meter = reporter.interval(step, meter, batches.reset())
                saver.poll()
            if not (due_look or due_eval or due_save or ending):
                continue
            reporter.require_finite(meter)
            score = None
            if due_look and not ending:
                see(step)
            if due_eval and not ending:
                weights = features.weights(state, config.eval)
                found = probes.probe(encode, weights, config, mesh, config.data.val_split, ('knn',))
                log.scalars(step, {f'val_{k}': v for k, v in found.items()})
                say(f'step {step} validation: ' + ', '.join(f'{k} {v:.4f}' for k, v in found.items()))
                score = found[f'knn_{config.eval.knn_k[-1]}']
            if due_save or ending:
                log.flush()
                saver.save(state, config.to_dict(), score, about)
            if ending and not last:
                saver.wait()
                say(f'told to end: saved at step {step}; the same command resumes there')
                raise preemption.Preempted
            reporter.progress.restart(step)
        saver.wait()
    finally:
        log.close()
    if hosts.is_first():
        history = read_history(workdir)
        plots.curves(workdir / 'curves.png', {workdir.name: history})
        plots.per_block(workdir / 'heterogeneity.png', history)
        report.finish(workdir, [workdir])
    say(f'pictures and metrics: {workdir}, checkpoint: {saver.directory / str(total)}')
    return state


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
    if jax.default_backend() != 'cpu':
        return
    if not config.allow_cpu:
        raise UserError(
            'jax found only a CPU, and this config is made for a GPU or TPU. Install jax[cuda12] or jax[tpu], see that '
            'no other program holds the device, or train on the CPU with --config.allow_cpu=True'
        )
    cpu.keep_memory()


def _changed(before, now) -> list[str]:
    """What differs from the conditions under which a checkpoint was made, for the console."""
    a, b = hosts.flatten(before), hosts.flatten(now)
    lines = [f'  {k}: {a.get(k)} then, {b[k]} now' for k in b if a.get(k) != b[k]]
    if lines:
        lines.insert(0, 'the checkpoint was made under other conditions; the run goes on, but not bitwise as there:')
    if before.get('order') != now['order']:
        lines.append('  from here on the examples come in another order than they would have')
    return lines


class _Reporter:
    """Reads the meter of an interval when the next one ends, so that the device never waits for the log."""

    def __init__(self, log: Log, progress: Progress, saver: checkpoint.Checkpointer, names, config):
        self.progress, self._config = progress, config
        self._log, self._saver, self._names, self._pending = log, saver, names, None

    def new_meter(self) -> Meter:
        return Meter.empty(self._names)

    def interval(self, step: int, meter: Meter, waited: float) -> Meter:
        """Keep the meter of the interval that ends at `step` for later, and report the one before it."""
        self._flush()
        self._pending = step, meter, waited
        return self.new_meter()

    def require_finite(self, meter: Meter) -> None:
        """Report what is pending and wait for `meter`: raises UserError if anything up to now was not finite."""
        self._flush()
        self._check(jax.device_get(meter))

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, meter, waited), self._pending = self._pending, None
        meter = jax.device_get(meter)
        self._check(meter)
        values = {n: float(total / meter.count) for n, total in meter.sums.items()}
        # Measured now that the device has finished the interval, not when the host had handed it over.
        values |= self.progress.measure(step, waited)
        self._log.scalars(step, values)
        say(self.progress.line(step, values))

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
