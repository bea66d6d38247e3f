"""`config.task='knn'` and `'linear'`: probes of the encoder in a checkpoint."""

import json
from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax import methods
from mto_jax.config import FIELDS, check
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import say
from mto_jax.runtime.workdir import write
from mto_jax.training import checkpoint


def merged(saved: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
    """The config of a checkpoint, `saved`, with what an evaluation's `config` sets.

    A field is set where it is not None. Those that `config.FIELDS` lets an evaluation have or replace are taken over;
    any other must have the checkpoint's own value.

    Raises:
      UserError: naming the fields that an evaluation cannot set.
    """
    there = hosts.flatten(saved)
    given = hosts.flatten(json.loads(json.dumps(config.to_dict())))
    given = {name: value for name, value in given.items() if value is not None}
    free = {n for n in given if n in FIELDS and (FIELDS[n].own or FIELDS[n].replaces)}
    refused = [n for n in sorted(given) if n not in free and (n not in there or given[n] != there[n])]
    if refused:
        shown = ', '.join(f'{n} (given {given[n]!r}, there {there.get(n)!r})' for n in refused[:5])
        more = f' and {len(refused) - 5} more' if len(refused) > 5 else ''
        own = dict.fromkeys(n.split('.')[0] + '.*' * ('.' in n) for n, f in FIELDS.items() if f.own)
        settable = ', '.join([*own, *(n for n, f in FIELDS.items() if f.replaces)])
        raise UserError(
            f'an evaluation takes from the checkpoint, and cannot set: {shown}{more}. Start from configs/knn.py or '
            f'configs/linear.py and leave them out; what can be set is {settable}'
        )
    out = ConfigDict(saved)
    for name in free:
        *groups, last = name.split('.')
        reduce(lambda fields, group: fields[group], groups, out)[last] = given[name]
    return out


def recorded(config: ConfigDict) -> ConfigDict:
    """`merged` for the checkpoint that `config.checkpoint` names.

    Raises:
      UserError: as `merged`, or if there is no checkpoint.
    """
    check(config, partial=True)
    *_, found = checkpoint.read(config.checkpoint, lambda reader, step: merged(reader.config(step), config))
    return found


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, float]:
    """Probe the checkpoint that `config.checkpoint` names on the test split; writes `<task>.json`.

    The model and its data come from the checkpoint's own config, as `merged` says.

    Raises:
      UserError: as `merged`, for a field that the model or the data do not fit, or a damaged checkpoint.
    """
    mesh = parallel.make_mesh(**config.mesh)

    def load(reader, step):
        saved = merged(reader.config(step), config)
        method = methods.build(saved)
        probes.check(method, saved, mesh, saved.data.train_split, saved.data.test_split)
        name, shapes = features.item(method, saved.eval)
        abstract = checkpoint.abstract_like(shapes, parallel.shardings(shapes, mesh, method.tensor_axes))
        return saved, method, reader.restore_item(abstract, step, name)

    trained, step, (saved, method, params) = checkpoint.read(config.checkpoint, load)
    say(f'{config.task} of {trained} at step {step}, features: {saved.eval.features}')
    encode = features.encoder(method, saved)
    with jax.set_mesh(mesh):
        out = probes.probe(encode, params, saved, mesh, saved.data.test_split, (config.task,))
    out |= {'step': step, 'checkpoint': str(trained), 'split': saved.data.test_split}
    path = epath.Path(workdir) / f'{config.task}.json'
    if hosts.is_first():
        write(path, json.dumps(out, indent=2) + '\n')
    for name, value in out.items():
        say(f'  {name}: {value:.4f}' if isinstance(value, float) else f'  {name}: {value}')
    say(f'written to {path}')
    return out
