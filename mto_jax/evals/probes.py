"""Probes of frozen encoders: `config.task='knn'` and `'linear'`, and the same during pre-training."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mto_jax import checkpoint, methods, objective, parallel
from mto_jax.data import pipeline, sources
from mto_jax.errors import UserError
from mto_jax.evals import features, frozen
from mto_jax.metrics import say


def probe(encode: Callable, params, config, mesh, split: str, probes=frozen.PROBES) -> dict[str, float]:
    """Accuracies on `split` of probes that learn from the training split: {'knn_<k>': share, 'linear': share}."""
    c, data = config.eval, config.data
    if c.batch_size % mesh.size:
        raise UserError(f'eval.batch_size is {c.batch_size}; it must be a multiple of the {mesh.size} devices')

    def examples(name, limit=0):
        batches = pipeline.eval_batches(sources.open_source(data, name), data, c.batch_size, limit)
        return features.extract(encode, params, batches, mesh)

    arrays = (*examples(data.train_split, c.train_examples), *examples(split))
    return frozen.accuracies(arrays, c, data.num_classes, probes)


def run(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Probe the checkpoint that `config.checkpoint` names on the test split; writes `<task>.json`.

    The model and its data come from the checkpoint's own config, the rest from `config.eval`. `config.data.data_dir`
    replaces the recorded one where it is set.
    """
    trained, step = checkpoint.locate(config.checkpoint)
    saver = checkpoint.Checkpointer(trained)
    saved = ConfigDict(saver.config(step))
    saved.eval, saved.task = config.eval, config.task
    if config.data.data_dir:
        saved.data.data_dir = config.data.data_dir
    mesh = parallel.make_mesh(config.mesh.data)
    method = methods.build(saved)
    shapes = jax.eval_shape(lambda: objective.init_params(method, jax.random.key(0)))
    params = saver.restore_params(checkpoint.abstract_like(shapes, parallel.replicated(mesh)), step)
    saver.close()
    say(f'{config.task} of {trained} at step {step}, features: {saved.eval.features}')
    encode = features.encoder(method, saved)
    out = probe(encode, params, saved, mesh, saved.data.test_split, (config.task,))
    out |= {'step': step, 'checkpoint': str(trained), 'split': saved.data.test_split}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f'{config.task}.json').write_text(json.dumps(out, indent=2) + '\n')
    for name, value in out.items():
        say(f'  {name}: {value:.4f}' if isinstance(value, float) else f'  {name}: {value}')
    return out
