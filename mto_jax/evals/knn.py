"""k-nearest-neighbour classification of frozen features, batched on the device."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mto_jax.evals import features

QUERIES = 256


@partial(jax.jit, static_argnames=('ks', 'num_classes'))
def _votes(train, labels, queries, temperature, ks, num_classes):
    similarity = jnp.einsum('qd,nd->qn', queries, train, precision='highest')
    top, index = jax.lax.top_k(similarity, max(ks))
    weight = jnp.exp((top - top[:, :1]) / temperature)  # relative to the nearest, or low temperatures overflow
    one_hot = jax.nn.one_hot(labels[index], num_classes) * weight[..., None]
    votes = jnp.cumsum(one_hot, axis=1)
    return jnp.stack([votes[:, k - 1].argmax(-1) for k in ks])


def normalized(x: np.ndarray, what: str) -> np.ndarray:
    """Rows of length one, float32.

    Raises:
      UserError: if a row, one of the `what` features, is zero or not finite.
    """
    x = np.asarray(x, np.float32)
    features.require(features.usable(x), what, 'finite and non-zero')
    x = x / np.abs(x).max(1, keepdims=True)  # else squares can overflow or vanish
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, float]:
    """Share of test examples classified right, for each k.

    Neighbours by cosine similarity s vote with weight exp(s / temperature) (Wu et al., arXiv 1805.01978, section 3.4).

    Args:
      train, test: float (n, D) features.
      train_labels, test_labels: int (n,).
      ks: numbers of neighbours; those above the number of training examples are cut to it.

    Raises:
      UserError: if a feature vector is zero or not finite.
    """
    cut = tuple(min(k, len(train)) for k in ks)
    bank, labels = jnp.asarray(normalized(train, 'training')), jnp.asarray(train_labels)
    queries = normalized(test, 'test')
    right = np.zeros(len(ks))
    for i in range(0, len(queries), QUERIES):
        part = queries[i : i + QUERIES]
        # One shape for all calls: the last is padded, and its padding not counted.
        padded = np.pad(part, ((0, QUERIES - len(part)), (0, 0)))
        guess = np.asarray(_votes(bank, labels, padded, temperature, cut, num_classes))[:, : len(part)]
        right += (guess == test_labels[i : i + QUERIES]).sum(1)
    return {k: float(r / len(queries)) for k, r in zip(ks, right, strict=True)}
