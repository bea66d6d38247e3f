"""`config.task='knn'` and `'linear'`: quick probes of the features of the encoder in a checkpoint."""

import json

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax.data import sources
from mto_jax.evals import features, probes
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import described, say
from mto_jax.runtime.workdir import require_free, write
from mto_jax.tasks import pretrained, train


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, float]:
    """Probe the checkpoint that `config.checkpoint` names on the test split; writes `<task>.json`.

    With `config.eval.depths`, at each of them: the names of the numbers end in the depth, and those without one are of
    the best.

    Raises:
      UserError: as `pretrained.find`, for a field that the data do not fit, or a damaged checkpoint.
    """
    mesh = parallel.make_mesh(**config.mesh)

    def encoders(start):
        """{depth: (config, encoder)}."""
        c = start.config
        setups = {depth: _at(c, depth) for depth in features.depths(c.eval, start.method.arch)}
        return {depth: (setup, features.encoder(start.method, setup)) for depth, setup in setups.items()}

    path = epath.Path(workdir) / f'{config.task}.json'

    def require(start):
        data = start.config.data
        with hosts.together():
            encoders(start)
            require_free(path, pretrained.evaluated(start.config))
            probes.eval_part(start.config.eval.batch_size, mesh)
            sources.require_labels(data, config.task, data.train_split, data.test_split)

    start, params = pretrained.find(config, mesh, require)
    c, split = start.config, start.config.data.test_split
    depths = encoders(start)
    say(f'{config.task} of {c.checkpoint}, features: {c.eval.features}')
    each = {}
    for depth, (setup, encode) in depths.items():
        with jax.set_mesh(mesh), train.memory_explained():
            each[depth] = probes.probe(encode, params, setup, mesh, split, (config.task,))
        if len(depths) > 1:
            say(f'  depth {depth}: ' + described(each[depth]))
    score = 'linear' if config.task == 'linear' else f'knn_{c.eval.knn_k[-1]}'
    best = max(each, key=lambda depth: each[depth][score])
    out = dict(each[best])
    if len(depths) > 1:
        out |= {f'{name}_depth{d}': value for d, row in each.items() for name, value in row.items()}
        out['best_depth'] = best
    out |= {'step': int(epath.Path(c.checkpoint).name)} | pretrained.evaluated(c)
    if hosts.is_first():
        write(path, json.dumps(out, indent=2) + '\n')
    for name, value in out.items():
        say('  ' + described({f'{name}:': value}))
    say(f'written to {path}')
    return out


def _at(config: ConfigDict, depth: int) -> ConfigDict:
    setup = ConfigDict(config.to_dict())
    setup.eval.depth = depth
    return setup
