"""Accuracies of the probes on features that are already there."""

from collections.abc import Sequence

import numpy as np

from mto_jax.errors import UserError
from mto_jax.evals import knn, logistic

PROBES = ('knn', 'linear')


def accuracies(
    arrays: Sequence[np.ndarray], config, num_classes: int, probes: Sequence[str] = PROBES
) -> dict[str, float]:
    """{'knn_<k>': share right, ..., 'linear': share right, 'linear_l2': the penalty chosen}.

    Args:
      arrays: training features (n, D) and labels (n,), test features and labels.
      config: `config.eval`.
      probes: which of `PROBES` to fit.

    Raises:
      UserError: if a label is not below num_classes, or a feature vector is not finite or, for kNN, zero.
    """
    top = int(max(arrays[1].max(), arrays[3].max()))
    if top >= num_classes:
        raise UserError(f'data.num_classes is {num_classes}, but the labels go up to {top}')
    out = {}
    if 'knn' in probes:
        found = knn.accuracy(*arrays, ks=config.knn_k, temperature=config.knn_temperature, num_classes=num_classes)
        out |= {f'knn_{k}': value for k, value in found.items()}
    if 'linear' in probes:
        out['linear'], out['linear_l2'] = logistic.accuracy(
            *arrays, l2=tuple(config.linear_l2), steps=config.linear_steps, num_classes=num_classes
        )
    return out
