"""Probes of a frozen encoder on the data sets of a config, during pre-training and after it."""

from collections.abc import Callable

from mto_jax import methods
from mto_jax.data import pipeline, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, frozen
from mto_jax.runtime import parallel


def probe(encode: Callable, params, config, mesh, split: str, probes=frozen.PROBES) -> dict[str, float]:
    """Accuracies on `split` of probes that learn from the training split: {'knn_<k>': accuracy, 'linear': accuracy}."""
    c, data = config.eval, config.data
    part = eval_part(c.batch_size, mesh)

    def examples(name, limit=0):
        batches = pipeline.eval_batches(sources.open_source(data, name), data, c.batch_size, limit, part)
        return features.collect(encode, params, batches, mesh)

    train, test = examples(data.train_split, c.train_examples), examples(split)
    return frozen.accuracies(train, test, c, data.num_classes, mesh, probes)


def check(method: methods.Method, config, mesh, *splits: str, task: str = 'a probe') -> None:
    """Raises UserError where probes of the method on these splits cannot run: to be called before any work."""
    features.encoder(method, config)
    features.item(method, config.eval)
    eval_part(config.eval.batch_size, mesh)
    if splits:
        sources.require_labels(config.data, task, config.data.train_split, *splits)


def eval_part(batch_size: int, mesh) -> parallel.Part:
    """This process's rows of evaluation batches; raises UserError where these do not split over the mesh."""
    shards = parallel.batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f'eval.batch_size is {batch_size}; it must be a multiple of the {shards} devices along the batch'
        )
    return parallel.local_part(batch_size, mesh)
