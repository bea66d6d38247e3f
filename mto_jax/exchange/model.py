"""What passes between files, runs and targets: a config and parameters in our names."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mto_jax import methods
from mto_jax.config import check


@dataclasses.dataclass(frozen=True)
class Weights:
    """A method's parameters and the config that describes it.

    Attributes:
      config: complete; `methods.build(config)` is the method.
      params: nested dict of float32 arrays, of the structure of `method.init(key)[0]`.
      head: {'kernel' (D, classes), 'bias' (classes,)} of a classifier, None where there is none.
      pool: what the head sees: 'class' or 'mean' of the tokens after the final norm, or 'fc_norm', the norm of the mean
        of the tokens before it (that norm is params['encoder']['norm']); '' without a head.
      notes: what a reader should know, such as arrays of a file that were left out.
    """

    config: ConfigDict
    params: Mapping[str, Any]
    head: Mapping[str, np.ndarray] | None = None
    pool: str = ''
    notes: tuple[str, ...] = ()

    @cached_property
    def method(self) -> methods.Method:
        check(self.config)
        return methods.build(self.config)

    @property
    def classifier(self) -> dict[str, Any]:
        """{'encoder', 'head'}: parameters of a `training.classify.Classification` with this pooling."""
        encoder, head = dict(self.params['encoder']), {'linear': dict(self.head)}
        if self.pool == 'fc_norm':
            head['fc_norm'] = encoder.pop('norm')
        return {'encoder': encoder, 'head': head}

    def flat(self) -> dict[str, np.ndarray]:
        """{path: array} of parameters and head, as the tables name them."""
        return flat({**self.params, **({'head': self.head} if self.head else {})})


def flat(tree: Any) -> dict[str, Any]:
    """{path: leaf}, the path's parts joined by slashes."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`."""
    out: dict[str, Any] = {}
    for path, leaf in named.items():
        *groups, last = path.split('/')
        inner = out
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = leaf
    return out


def encoder_alone(weights: Weights) -> Weights:
    """The encoder with its head, without what pre-trains it: mask token, decoders, projectors."""
    config = ConfigDict(weights.config.to_dict())
    config.method, config.mto.enabled = 'encoder', False
    encoder = {name: value for name, value in weights.params['encoder'].items() if name != 'mask_token'}
    return dataclasses.replace(weights, config=config, params={'encoder': encoder})
