"""Accuracies of the probes on precomputed features."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from mto_jax.errors import UserError
from mto_jax.evals import knn, logistic
from mto_jax.evals.features import Bank

PROBES = ('knn', 'linear')


def accuracies(
    train: Bank, test: Bank, config, num_classes: int, mesh: Mesh, probes: Sequence[str] = PROBES
) -> dict[str, float]:
    """{'knn_<k>': accuracy, ..., 'linear': accuracy, 'linear_l2': the penalty chosen}.

    Args:
      train, test: what the probes learn from, and what they are measured by.
      config: `config.eval`.
      mesh: over which the features are split.
      probes: which of `PROBES` to fit.

    Raises:
      UserError: if a label is not below num_classes, or a feature vector is not finite or, for kNN, zero.
    """
    top = max(int(jnp.where(bank.valid, bank.labels, 0).max()) for bank in (train, test))
    if top >= num_classes:
        raise UserError(f'data.num_classes is {num_classes}, but the labels go up to {top}')
    out = {}
    if 'knn' in probes:
        temperature = config.knn_temperature
        options = {'ks': config.knn_k, 'temperature': temperature, 'mesh': mesh}
        found = knn.accuracy(train, test, **options, num_classes=num_classes, balanced=config.balanced)
        out |= {f'knn_{k}': value for k, value in found.items()}
    if 'linear' in probes:
        l2, steps = tuple(config.linear_l2), config.linear_steps
        arrays = (*train.fetch(), *test.fetch())
        options = {'l2': l2, 'steps': steps, 'num_classes': num_classes, 'balanced': config.balanced}
        out['linear'], out['linear_l2'] = logistic.accuracy(*arrays, **options)
    return out
