"""`config.task='finetune'` and `'probe'`: what is trained on labels, from the encoder in a checkpoint.

A fine-tuning trains encoder and head, a probe a head on the frozen encoder. Both are trained as pre-training is.
"""

import json
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mto_jax.config import FIELDS, values
from mto_jax.data import order, pipeline, randaugment, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.models import heads
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import described, say
from mto_jax.runtime.workdir import read_json, require_free, write
from mto_jax.tasks import pretrained, train
from mto_jax.tasks.pretrained import Pretrained
from mto_jax.training import checkpoint, classify, job, schedules, train_state
from mto_jax.training.classify import Classification
from mto_jax.training.loop import Seen, Watch, every
from mto_jax.training.probing import Probing
from mto_jax.training.train_state import TrainState


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Train on labels from the checkpoint `config.checkpoint`, resuming what `workdir` holds; writes `<task>.json`.

    Raises:
      UserError: for a bad config, missing data, data without labels, or a checkpoint of another kind; and as
        `train.run`.
      Preempted: after SIGTERM, once everything is saved.
    """
    workdir = epath.Path(workdir)
    planned = plan(config, workdir)
    c = planned.config
    path = workdir / f'{c.task}.json'
    with hosts.together():
        if not c.resume_anyway:
            require_free(path, pretrained.evaluated(c))
    state = train.run(planned, workdir)
    with jax.set_mesh(planned.mesh), train.memory_explained():
        found = scores(planned.job, state, c, planned.mesh, c.data.test_split)
    out = found | {'step': int(state.step)} | pretrained.evaluated(c)
    if hosts.is_first():
        write(path, json.dumps(out, indent=2) + '\n')
    train.show(workdir, {f'{c.task} of {c.checkpoint}': [found]})
    say(f'{c.data.test_split}: ' + described(found))
    say(f'written to {path}')
    return out


def plan(config: ConfigDict, workdir: epath.Path) -> train.Plan:
    """The training that `config` describes, whose other fields are the checkpoint's.

    `workdir` says which checkpoint a run began with; where that is gone, it has a probe's encoder.

    Raises:
      UserError: for a bad config, missing data, data without labels, or a checkpoint of another kind.
    """
    with hosts.together():
        mesh = train.devices(config)
    start = pretrained.find(config)
    c = start.config
    with hosts.together():
        found, c.checkpoint = c.checkpoint, _begun_with(workdir, c)
        randaugment.parse(c.data)
        _require_used(c)
        source = sources.open_source(c.data, c.data.train_split)
        _require_targets(c)
        probes.eval_part(c.eval.batch_size, mesh)
        train.require_accelerator(c)
    frozen = c.task == 'probe'
    encoder = None
    if frozen:
        encoder = (start.load(mesh) if c.checkpoint == found else _kept(start, mesh, workdir))['encoder']
    with hosts.together():
        training = prepare(start, encoder, source.num_examples)
        training.sharding(mesh)
        interval = schedules.evaluation_interval(c.eval.every_epochs, training.per_epoch)
    title = f'{c.probe.head} probe' if frozen else 'fine-tuning' + ' of fresh weights' * c.classify.from_scratch
    return train.Plan(
        c,
        mesh,
        source,
        training,
        f'{title}, {c.checkpoint}',
        partial(_watches, c, training, mesh, interval),
        partial(_fresh, start, training, mesh),
    )


def _begun_with(workdir, config) -> str:
    """The checkpoint that the run in `workdir` began with; `config.checkpoint` where there is none yet, or where it is
    that one in another place.

    Raises:
      UserError: where it began with the weights of another one, unless that is gone and `config.resume_anyway`: the
        run's own checkpoints have all that it needs.
    """
    path = workdir / 'config.json'
    began = read_json(path).get('checkpoint') if path.exists() else None
    if not began or began == config.checkpoint:
        return config.checkpoint
    gone = not epath.Path(began).exists()
    if gone and config.resume_anyway:
        moved = epath.Path(began).name == epath.Path(config.checkpoint).name
        return config.checkpoint if moved else began
    cure = f'Resume it with --config.checkpoint={began} --workdir={workdir}'
    if gone:
        cure = (
            "The former is gone: if this is the same pre-training, go on from this workdir's own files: "
            '--config.resume_anyway=True'
        )
    raise UserError(
        f'{workdir} holds a {config.task} of {began}, and checkpoint is {config.checkpoint} now. {cure}, or choose '
        'another --workdir'
    )


def _kept(start, mesh, workdir):
    """{'encoder': parameters}, of a probe whose checkpoint is gone: what it keeps of them."""
    shapes = {'encoder': jax.eval_shape(start.fresh, jax.random.key(0))}
    place = parallel.shardings(shapes, mesh, start.method.tensor_axes)
    return checkpoint.constants(workdir, checkpoint.abstract_like(shapes, place))


def prepare(start: Pretrained, encoder, num_examples: int) -> job.Job:
    """The training that `start.config` describes, on so many examples.

    Args:
      encoder: the parameters of a probe's encoder, or their shapes.

    Raises:
      UserError: for a bad config.
    """
    c, d = start.config, start.config.data
    objective = _probing(start, encoder) if c.task == 'probe' else classify.build(c, start.method, start.fresh)
    per_epoch = order.steps_per_epoch(num_examples, c.batch_size)
    microbatch = c.batch_size // c.accumulate
    shapes = {
        'image': jax.ShapeDtypeStruct((microbatch, *d.image_size, d.channels), np.uint8),
        'label': jax.ShapeDtypeStruct((microbatch,), np.int32),
        'mask': jax.ShapeDtypeStruct((microbatch, *d.image_size, 1), np.int32),
    }
    del shapes['label' if _dense(c) else 'mask']
    total = schedules.to_steps(c.epochs, per_epoch)
    return job.assemble(objective, c.optim, c.batch_size, total, per_epoch, shapes, c.accumulate)


def _require_used(config) -> None:
    """Raises UserError for fields of other evaluations, which this training on labels would ignore."""
    fields = dict(values(config))
    ignored = ['eval.features', 'eval.train_examples', 'eval.balanced']
    ignored += [n for n in fields if n.startswith(('eval.knn_', 'eval.linear_'))]
    if config.task == 'finetune':
        own, other = 'classify', 'probe'
        ignored += ['eval.depth', 'eval.depths']
    else:
        own, other = 'probe', 'classify'
        ignored += {'linear': ['probe.heads'], 'attentive': ['probe.pool'], 'dense': ['probe.pool', 'probe.heads']}[
            config.probe.head
        ]
    for name in (*ignored, *(n for n in fields if n.startswith(f'{other}.'))):
        given, default = fields[name], FIELDS[name].default
        given = tuple(given) if isinstance(default, tuple) else given  # a list, where it comes from JSON
        if given != default:
            kind = f'{config.probe.head} probe' if config.task == 'probe' else 'fine-tuning'
            cure = f'; what the head sees is {own}.pool' if name == 'eval.features' else ''
            raise UserError(f'{name} is {given!r}, which a {kind} does not use; leave it out{cure}')


def _probing(start, encoder) -> Probing:
    config, method = start.config, start.method
    c, data = config.probe, config.data
    microbatch = config.batch_size // config.accumulate
    if microbatch % c.group:
        raise UserError(
            f'probe.group is {c.group} images; it must divide the {microbatch} images of a microbatch '
            '(batch_size / accumulate)'
        )
    if c.head == 'dense' and data.randaugment:
        raise UserError(f"data.randaugment is {data.randaugment!r}; it must be '': label maps would not follow")
    if c.head == 'dense' and data.resize == 'device':
        raise UserError("data.resize is 'device'; it must be 'host': label maps would not follow")
    if config.optim.layer_decay != 1:
        raise UserError(f'optim.layer_decay is {config.optim.layer_decay:g}; a probe trains no encoder: it must be 1')
    if c.head == 'linear' and c.pool == 'class' and not method.arch.class_token:
        raise UserError("probe.pool is 'class' but the model has no class token (model.class_token); set it to 'mean'")
    head = heads.Probe(c.head, data.num_classes, method.arch.num_prefix, c.pool, c.heads or method.arch.heads)
    depths = tuple(d or None for d in features.depths(config.eval, method.arch))
    return Probing(method, encoder, head, depths, c.group, tuple(data.mean), tuple(data.std), data.flip)


def scores(training: job.Job, state: TrainState, config, mesh, split: str, sums: Callable | None = None):
    """What the objective's `scores` says of a split, each example counted once; `sums` as of `summed`."""
    c, objective = config.eval, training.objective
    sums, totals = sums or summed(objective), None
    part = probes.eval_part(c.batch_size, mesh)
    source = sources.open_source(config.data, split)
    for batch in pipeline.eval_batches(source, config.data, c.batch_size, 0, part):
        if not _dense(config):
            sources.require_known(batch['label'][batch['valid']], config.data)
        placed = parallel.put_batch(batch, mesh)
        seen = jax.device_get(sums(state.params, state.model_state, objective.constants, placed))
        # On the host: counts of pixels outgrow 32 bits.
        seen = jax.tree.map(lambda x: x.astype(np.float64 if x.dtype.kind == 'f' else np.int64), seen)
        totals = seen if totals is None else jax.tree.map(np.add, totals, seen)
    return objective.scores(totals)


def summed(objective: Classification | Probing) -> Callable:
    """The objective's `sums`, jitted: to be kept where it is used again."""
    return jax.jit(objective.sums)


def _watches(config, training, mesh, interval, workdir) -> list[Watch]:
    """Scores on the validation split, where there is an interval."""
    del workdir
    if not interval:
        return []
    sums = summed(training.objective)

    def measure(step, state):
        found = scores(training, state, config, mesh, config.data.val_split, sums)
        say(f'step {step} validation: ' + described(found))
        shown = {f'val_{name}': value for name, value in found.items() if isinstance(value, float)}
        return Seen(shown, score=found[training.objective.score])

    return [Watch(measure, every(interval, training.total))]


def _fresh(start, training, mesh, sharding) -> TrainState:
    """Fresh weights; of a fine-tuning all but the encoder, which is the checkpoint's unless it is not to be."""
    c = start.config
    if c.task == 'probe' or c.classify.from_scratch:
        return jax.jit(partial(training.create, c.seed), out_shardings=sharding)()

    def begin(encoder):
        key = train_state.stream(c.seed, 'head')
        return train_state.begin(*training.objective.begin(encoder, key), training.tx)

    return jax.jit(begin, out_shardings=sharding)(start.load(mesh)['encoder'])


def _dense(config) -> bool:
    """Whether it learns from label maps instead of labels."""
    return config.task == 'probe' and config.probe.head == 'dense'


def _require_targets(config) -> None:
    """Raises UserError where a split lacks what the task learns from and is measured by."""
    data = config.data
    splits = data.train_split, *[data.val_split] * (config.eval.every_epochs > 0), data.test_split
    if not _dense(config):
        sources.require_labels(data, f'a {config.task}', *splits)
        return
    if not data.mask:
        raise UserError(
            "data.mask is ''; a dense probe learns from label maps: name the feature that has them, or with "
            "data.name='folder' their folder"
        )
    for split in splits:
        sources.open_source(data, split)
