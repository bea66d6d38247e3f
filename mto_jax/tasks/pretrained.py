"""What an evaluation takes from a checkpoint: the config, which says what is in it, and an encoder."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mto_jax import methods
from mto_jax.config import EVALUATIONS, FIELDS, check, kept, nested
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.models import vit
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import say
from mto_jax.runtime.workdir import completed
from mto_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An encoder in a checkpoint, as an evaluation uses it.

    Attributes:
      config: the checkpoint's, with what the evaluation sets; `checkpoint` names the step.
      method: for images of the size that the evaluation reads.
      original: the method as it was trained.
    """

    config: ConfigDict
    method: methods.Method
    original: methods.Method

    def fresh(self, key: jax.Array) -> Any:
        """A fresh encoder's parameters, for the size that the evaluation reads."""
        # Made by the method as it was trained: its masks need not fit another grid.
        return vit.resized(self.original.init(key)[0]['encoder'], self.original.arch, self.method.arch)

    def load(self, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """{'encoder': parameters}, placed on the mesh; what it learned per position is brought to the new size.

        Raises:
          UserError: for a damaged checkpoint.
        """
        *_, params = checkpoint.read(self.config.checkpoint, partial(self._restored, mesh))
        return params

    def _restored(self, mesh, reader, step):
        name, shapes = features.item(self.original, self.config.eval)
        abstract = checkpoint.abstract_like(shapes, parallel.shardings(shapes, mesh, self.method.tensor_axes))
        params = reader.restore_item(abstract, step, name)
        resize = partial(vit.resized, old=self.original.arch, new=self.method.arch)
        new = jax.eval_shape(resize, shapes['encoder'])
        place = parallel.shardings({'encoder': new}, mesh, self.method.tensor_axes)['encoder']
        return {'encoder': jax.jit(resize, out_shardings=place)(params['encoder'])}


def find(config: ConfigDict, mesh: jax.sharding.Mesh | None = None, require=lambda start: None) -> Any:
    """The encoder that an evaluation's `config` names: its description; with a mesh `(description, parameters)`.

    Args:
      mesh: to read the parameters at once, as `Pretrained.load` does later: a training that goes on may delete a
        checkpoint between the two, and here the next newest is taken then.
      require: raises where the evaluation cannot be done, before parameters are read.

    Raises:
      UserError: if there is no such checkpoint, `config` sets what an evaluation cannot, or a field does not fit the
        model.
    """
    check(config, partial=True)

    def read(reader, step):
        start = described(reader.config(step), config, reader.directory / str(step))
        require(start)
        return (start, start._restored(mesh, reader, step)) if mesh else start

    *_, found = checkpoint.read(config.checkpoint, read)
    return found


def described(saved: Mapping[str, Any], config: ConfigDict, path: epath.Path) -> Pretrained:
    """The encoder in the checkpoint `path`, whose config is `saved`, for an evaluation's `config`. Raises as `find`."""
    there = hosts.flatten(saved)
    new = [n for n, field in FIELDS.items() if n not in there and field.default != {} and not field.own]
    if new:
        shown = ', '.join(f'{n}={FIELDS[n].default!r}' for n in new)
        say(f'{path} is from an earlier version; fields it lacks have their defaults: {shown}')
    if unknown := {n: v for n, v in there.items() if not kept(n)}:
        shown = ', '.join(f'{n}={v!r}' for n, v in unknown.items())
        say(f'{path} is from another version; unknown fields are ignored: {shown}')
    c = merged(saved, config)
    c.checkpoint = str(path)
    check(c)
    trained = ConfigDict(c.to_dict())  # as it is run here, with what a method's own parts had to fit
    then = completed(saved)
    trained.batch_size, trained.accumulate = then.batch_size, then.accumulate
    trained.data.image_size = tuple(then.data.image_size)
    original = methods.build(trained)
    try:
        arch = dataclasses.replace(original.arch, image_size=tuple(c.data.image_size))
    except ValueError as e:
        raise UserError(str(e)) from None
    features.item(original, c.eval)
    return Pretrained(c, dataclasses.replace(original, arch=arch), original)


def merged(saved: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
    """The config of a checkpoint, `saved`, with what an evaluation's `config` sets.

    A field is set where it is not None. Those that `config.FIELDS` lets an evaluation have or replace are taken over;
    any other must have the checkpoint's own value. A field that an older checkpoint lacks has its default, and one that
    is unknown is left out.

    Raises:
      UserError: naming the fields that an evaluation cannot set, or for a checkpoint that is no pre-training's.
    """
    old = completed(saved)
    if old.task in EVALUATIONS:
        raise UserError(
            f'the checkpoint is of a {"fine-tuning" if old.task == "finetune" else "probe"}; its results are in '
            f'{old.task}.json. An evaluation starts from a pre-trained checkpoint, such as {old.checkpoint}'
        )
    there = hosts.flatten(json.loads(json.dumps(old.to_dict())))
    given = hosts.flatten(json.loads(json.dumps(config.to_dict())))
    given = {name: value for name, value in given.items() if value is not None}
    trains = EVALUATIONS.get(config.task)
    free = {
        n for n, field in FIELDS.items() if n in given and (field.own or field.replaces or (trains and field.trains))
    }
    refused = [n for n in sorted(given) if n not in free and (n not in there or given[n] != there[n])]
    if refused:
        shown = ', '.join(f'{n} (given {given[n]!r}, there {there.get(n)!r})' for n in refused[:5])
        more = f' and {len(refused) - 5} more' if len(refused) > 5 else ''
        own = dict.fromkeys(n.split('.')[0] + '.*' * ('.' in n) for n, f in FIELDS.items() if f.own)
        settable = ', '.join([*own, *(n for n, f in FIELDS.items() if f.replaces or (trains and f.trains))])
        raise UserError(
            f'an evaluation takes from the checkpoint, and cannot set: {shown}{more}. Leave them out, and start from '
            f'the config of an evaluation (configs/knn.py, linear.py, finetune.py, ...); what can be set is {settable}'
        )
    return nested({n: f.default for n, f in FIELDS.items()} | there | {n: given[n] for n in free})


def evaluated(config: ConfigDict) -> dict[str, str]:
    """What a result is of: the checkpoint, the split and where the images lie."""
    return {'checkpoint': config.checkpoint, 'split': config.data.test_split, 'data_dir': config.data.data_dir}
