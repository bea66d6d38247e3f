"""`config.task='pretrain'`: its checks before `tasks.train` runs it, and its watches."""

from functools import partial

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax import methods, mto
from mto_jax.analysis import plots
from mto_jax.data import pipeline, randaugment, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import described, say
from mto_jax.tasks import train
from mto_jax.training import job, schedules, start, train_state
from mto_jax.training.loop import Seen, Watch, every
from mto_jax.training.train_state import TrainState


def run(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Pre-train as `config` says, resuming what `workdir` holds; returns the final state.

    Raises:
      UserError: for a bad config or missing data, and as `train.run`.
      Preempted: after SIGTERM, once everything is saved.
    """
    workdir = epath.Path(workdir)
    state = train.run(plan(config), workdir)
    train.show(workdir)
    return state


def plan(config: ConfigDict) -> train.Plan:
    """The pre-training that `config` describes.

    Raises:
      UserError: for a bad config or missing data, on any host.
    """
    with hosts.together():
        if config.checkpoint:
            raise UserError(
                f'checkpoint is {config.checkpoint!r}, which a pre-training does not read; --config.init_from takes '
                'its weights, --config.resume_from its whole state'
            )
        _require_parts(methods.build(config).mto)  # needs no data
        mesh = train.devices(config)
        randaugment.parse(config.data)
        source = sources.open_source(config.data, config.data.train_split)
        watched = sources.open_source(config.data, config.data.val_split) if config.diagnose_every else None
        training = job.prepare(config, source.num_examples)
        interval = schedules.evaluation_interval(config.eval.every_epochs, training.per_epoch)
        method = training.objective.method
        measured = [config.data.val_split] if interval else []
        # Also where no probe is used: a mistake is better found now.
        probes.check(method, config, mesh, *measured, task='kNN during training (eval.every_epochs; 0 for none)')
        training.sharding(mesh)
        train.require_accelerator(config)
    title = f'{config.method}, MTO {"on" if method.mto else "off"}'
    watches = partial(_watches, config, training, mesh, watched, interval)
    return train.Plan(config, mesh, source, training, title, watches, partial(start.fresh, config, training))


def _require_parts(settings: mto.Settings | None) -> None:
    """Raises UserError where MTO is on and would change nothing."""
    if settings and settings.recalibration == 'none' and not settings.has_losses:
        raise UserError(
            "mto.enabled is True, but no part of it is set: mto.recalibration is 'none', and mto.w_spa, mto.w_e and "
            'mto.w_r are 0. The configs named *_mto set them; without MTO, leave mto.enabled out'
        )


def _fixed(watched, data):
    """Up to 64 images of a split, uint8 (n, H, W, C), for pictures and statistics."""
    count = min(64, watched.num_examples)
    # A folder's first images are all of one class. A sequential format would be read to its end for a random subset.
    limit = count if watched.random_access else 0
    return next(pipeline.eval_batches(watched, data, count, limit))['image']


def _watches(config, training, mesh, watched, interval, workdir) -> list[Watch]:
    """The diagnosis with its pictures, and kNN on the validation split."""
    encode = features.encoder(training.objective.method, config)
    fixed = _fixed(watched, config.data) if config.diagnose_every else None
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
        say(f'step {step} validation: ' + described(found))
        return Seen({f'val_{k}': v for k, v in found.items()}, score=found[f'knn_{config.eval.knn_k[-1]}'])

    watches = []
    if config.diagnose_every:
        watches.append(Watch(diagnose, every(config.diagnose_every, training.total), at_start=True))
    if interval:
        watches.append(Watch(knn, every(interval, training.total)))
    return watches
