"""Probes of frozen encoders: `config.task='knn'` and `'linear'`, and the same during pre-training."""

import json
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax import checkpoint, hosts, methods, objective, parallel
from mto_jax.data import order, pipeline, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, frozen
from mto_jax.metrics import say
from mto_jax.workdir import write


def probe(encode: Callable, params, config, mesh, split: str, probes=frozen.PROBES) -> dict[str, float]:
    """Accuracies on `split` of probes that learn from the training split: {'knn_<k>': share, 'linear': share}."""
    c, data = config.eval, config.data
    part = eval_part(c.batch_size, mesh)

    def examples(name, limit=0):
        batches = pipeline.eval_batches(sources.open_source(data, name), data, c.batch_size, limit, part)
        return features.extract(encode, params, batches, mesh)

    arrays = (*examples(data.train_split, c.train_examples), *examples(split))
    return frozen.accuracies(arrays, c, data.num_classes, probes)


def check(method: methods.Method, config, mesh, *splits: str) -> None:
    """Raises UserError where probes of the method on these splits cannot run: to be called before any work."""
    features.encoder(method, config)
    eval_part(config.eval.batch_size, mesh)
    for split in splits:
        sources.open_source(config.data, split)


def eval_part(batch_size: int, mesh) -> order.Part:
    """This process's rows of evaluation batches; raises UserError where these do not split over the mesh."""
    shards = parallel.batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        raise UserError(
            f'eval.batch_size is {batch_size}; it must be a positive multiple of the {shards} devices along the batch'
        )
    return parallel.local_part(batch_size, mesh)


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, float]:
    """Probe the checkpoint that `config.checkpoint` names on the test split; writes `<task>.json`.

    The model and its data come from the checkpoint's own config, the rest from `config.eval`. `config.data.data_dir`
    replaces the recorded one where it is set.
    """
    mesh = parallel.make_mesh(**config.mesh)

    def load(reader, step):
        saved = ConfigDict(reader.config(step))
        saved.eval, saved.task = config.eval, config.task
        if config.data.data_dir:
            saved.data.data_dir = config.data.data_dir
        method = methods.build(saved)
        check(method, saved, mesh, saved.data.train_split, saved.data.test_split)
        shapes = jax.eval_shape(lambda: objective.init_params(method, jax.random.key(0)))
        abstract = checkpoint.abstract_like(shapes, parallel.shardings(shapes, mesh))
        return saved, method, reader.restore_params(abstract, step)

    trained, step, (saved, method, params) = checkpoint.read(config.checkpoint, load)
    say(f'{config.task} of {trained} at step {step}, features: {saved.eval.features}')
    encode = features.encoder(method, saved)
    with jax.set_mesh(mesh):
        out = probe(encode, params, saved, mesh, saved.data.test_split, (config.task,))
    out |= {'step': step, 'checkpoint': str(trained), 'split': saved.data.test_split}
    if hosts.is_first():
        write(epath.Path(workdir) / f'{config.task}.json', json.dumps(out, indent=2) + '\n')
    for name, value in out.items():
        say(f'  {name}: {value:.4f}' if isinstance(value, float) else f'  {name}: {value}')
    return out
