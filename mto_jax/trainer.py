"""Pre-training from a config: set-up, and the one loop.

Resuming: the newest checkpoint of the workdir is used if there is one, else the state is initialised. Batches and
random streams depend on the step alone, so that a resumed run continues as if it had never stopped.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mto_jax import checkpoint, cpu, methods, objective, optim, parallel, schedules, train_state
from mto_jax.analysis import plots
from mto_jax.data import pipeline, sources
from mto_jax.data.order import steps_per_epoch
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.metrics import Log, Progress, describe_params, read_history, say
from mto_jax.train_state import Meter, TrainState


def pretrain(config: ConfigDict, workdir: Path) -> TrainState:
    """Pre-train as `config` says, resuming what `workdir` holds; returns the final state.

    Raises:
      UserError: for a bad config, missing data, a workdir of another run, or a step that is not finite.
    """
    mesh = parallel.make_mesh(config.mesh.data)
    if jax.default_backend() == 'cpu':
        cpu.keep_memory()
    parallel.check_batch(config.batch_size, config.accumulate, mesh)
    try:
        method = methods.build(config)
    except ValueError as e:
        raise UserError(str(e)) from None
    encode = features.encoder(method, config)  # checks config.eval, whether or not it is used
    source = sources.open_source(config.data, config.data.train_split)
    watched = sources.open_source(config.data, config.data.val_split)
    per_epoch = steps_per_epoch(source.num_examples, config.batch_size)
    total = schedules.to_steps(config.epochs, per_epoch)
    schedule = schedules.learning_rate(config.optim, config.batch_size, total, per_epoch)
    checkpoint.claim_workdir(workdir, config.to_dict(), config.resume_anyway)

    tx = optim.adamw(config.optim, schedule)
    everywhere, split = parallel.replicated(mesh), parallel.along_batch(mesh)
    create = partial(_create, method, tx, config.seed)
    state_sharding = jax.tree.map(lambda _: everywhere, jax.eval_shape(create))
    saver = checkpoint.Checkpointer(workdir, config.checkpoints.keep)
    start = saver.latest()
    if start is None:
        start, state = 0, jax.jit(create, out_shardings=state_sharding)()
    else:
        state = saver.restore(checkpoint.abstract_like(jax.eval_shape(create), everywhere), start)
    say(f'{config.method}, MTO {"on" if method.settings else "off"}: {describe_params(state.params)}')
    say(
        f'{source.num_examples:,} images, batch {config.batch_size}, {per_epoch} steps an epoch, '
        f'{config.epochs:g} epochs = {total} steps on {mesh.size} {jax.devices()[0].platform} device(s)'
        + (f', resuming at step {start}' if start else '')
    )

    loss_fn = objective.pretrain_loss(method, config.data)
    shape = (config.batch_size // config.accumulate, *config.data.image_size, config.data.channels)
    names = train_state.term_names(loss_fn, state.params, {'image': jax.ShapeDtypeStruct(shape, np.uint8)})
    step_fn = jax.jit(
        train_state.make_train_step(loss_fn, tx, schedule, total, config.accumulate),
        donate_argnums=(0, 1),
        in_shardings=(state_sharding, everywhere, split, everywhere),
        out_shardings=(state_sharding, everywhere),
    )
    fixed = next(pipeline.eval_batches(watched, config.data, min(64, watched.num_examples)))['image']
    diagnose = partial(jax.jit(objective.make_diagnose(method, config.data)), images=fixed)
    log = Log(workdir, start)
    key = train_state.stream(config.seed, 'train')
    diagnose_key = train_state.stream(config.seed, 'diagnose')
    eval_every = schedules.to_steps(config.eval.every_epochs, per_epoch)
    batches = pipeline.Prefetch(
        (
            {'image': b['image']}
            for b in pipeline.train_batches(source, config.data, config.batch_size, config.seed, start, total)
        ),
        partial(parallel.put_batch, mesh=mesh),
    )

    def see(step):
        seen = jax.device_get(diagnose(state.params, key=diagnose_key))
        rows = {f'block/{n}/{i}': v for n, values in seen['blocks'].items() for i, v in enumerate(values)}
        log.scalars(step, rows | {'token_distance': seen['token_distance']})
        shown = {n: v[: config.log_images] for n, v in seen['images'].items()}
        log.images(step, {n: plots.as_rgb(v) for n, v in shown.items()})
        plots.triplets(workdir / 'reconstructions.png', shown, config.log_images)

    reporter = _Reporter(log, Progress(start, total, config.batch_size, per_epoch), saver, names)
    meter, found = reporter.new_meter(), {}
    try:
        if not start and config.diagnose_every:
            see(0)
        for step in range(start + 1, total + 1):
            state, meter = step_fn(state, meter, next(batches), key)
            last = step == total
            due_look, due_eval, due_save = (
                bool(every) and (last or step % every == 0)
                for every in (config.diagnose_every, eval_every, config.checkpoints.every)
            )
            if last or step % config.log_every == 0:
                meter = reporter.interval(step, meter, batches.reset())
            if not (due_look or due_eval or due_save):
                continue
            reporter.require_finite(meter)
            if due_look:
                see(step)
            if due_eval:
                found = probes.probe(encode, state.params, config, mesh, config.data.val_split, ('knn',))
                log.scalars(step, {f'val_{k}': v for k, v in found.items()})
                say(f'step {step} validation: ' + ', '.join(f'{k} {v:.4f}' for k, v in found.items()))
            if due_save:
                saver.save(state, config.to_dict(), found.get(f'knn_{config.eval.knn_k[-1]}', -reporter.loss))
            reporter.progress.restart(step)
        saver.wait()
    finally:
        log.close()
        saver.close()
    history = read_history(workdir)
    plots.curves(workdir / 'curves.png', {workdir.name: history})
    plots.per_block(workdir / 'heterogeneity.png', history)
    say(f'pictures and metrics: {workdir}, checkpoint: {saver.directory / str(total)}')
    return state


def _create(method, tx, seed) -> TrainState:
    return train_state.create(objective.init_params(method, train_state.stream(seed, 'init')), tx)


class _Reporter:
    """Reads the meter of an interval when the next one ends, so that the device never waits for the log.

    Attributes:
      loss: mean loss of the last interval that was read.
    """

    def __init__(self, log: Log, progress: Progress, saver: checkpoint.Checkpointer, names):
        self.progress, self.loss = progress, np.inf
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
        meter = jax.device_get(meter)
        self._check(meter)
        if meter.count and not np.isfinite(self.loss):
            self.loss = float(meter.sums['loss'] / meter.count)

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, meter, waited), self._pending = self._pending, None
        meter = jax.device_get(meter)
        self._check(meter)
        values = {n: float(total / meter.count) for n, total in meter.sums.items()}
        # Measured now that the device has finished the interval, not when the host had handed it over.
        values |= self.progress.measure(step, waited)
        self.loss = values['loss']
        self._log.scalars(step, values)
        say(self.progress.line(step, values))

    def _check(self, meter: Meter) -> None:
        bad = {n: int(s) for n, s in meter.first_bad.items() if s >= 0}
        if not bad:
            return
        step = min(bad.values())
        self._saver.wait()
        good = self._saver.latest()
        raise UserError(
            f'not finite at step {step}: {", ".join(n for n, s in bad.items() if s == step)}. No state from there on '
            f'was saved; the last good checkpoint is '
            + (f'{self._saver.directory / str(good)}' if good is not None else 'none')
            + '. Try a lower optim.base_lr, optim.clip_norm=1 or model.dtype=float32.'
        )
