"""k-nearest-neighbour classification of frozen features, each device among the features that lie on it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mto_jax.evals import features
from mto_jax.evals.features import Bank

(AXES,) = features.ROWS[1:]


def normalized(x: jax.Array) -> jax.Array:
    """Float32 (..., D) with rows of length one."""
    x = x / jnp.abs(x).max(-1, keepdims=True)  # else squares can overflow or vanish
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=('ks', 'num_classes', 'mesh'))
def _right(bank, queries, temperature, ks, num_classes, mesh):
    """How many queries of each class are classified right, int32 (len(ks), classes), and how many there are (classes,).

    No k may be above the number of examples in the bank.
    """

    def on_a_device(bank, queries, temperature):
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), bank.replace(x=normalized(bank.x)))

        def right(batch):
            each = jax.lax.all_gather(normalized(batch.x), AXES, tiled=True)
            similarity = jnp.einsum('qd,nd->qn', each, rows.x, precision='highest')
            similarity = jnp.where(rows.valid, similarity, -jnp.inf)
            near, index = jax.lax.top_k(similarity, min(max(ks), len(rows.x)))
            # Of all queries this device's candidates, against all devices' candidates of its own queries.
            candidates = near, rows.labels[index]
            near, labels = (jax.lax.all_to_all(c, AXES, 0, 1, tiled=True) for c in candidates)
            near, index = jax.lax.top_k(near, max(ks))
            labels = jnp.take_along_axis(labels, index, axis=1)
            weight = jnp.exp((near - near[:, :1]) / temperature)  # relative to the nearest, or low ones overflow
            votes = jnp.cumsum(jax.nn.one_hot(labels, num_classes) * weight[..., None], axis=1)
            guesses = jnp.stack([votes[:, k - 1].argmax(-1) for k in ks])
            of_class = jax.nn.one_hot(batch.labels, num_classes, dtype=jnp.int32) * batch.valid[:, None]
            return ((guesses == batch.labels)[..., None] * of_class).sum(1), of_class.sum(0)

        counts = jax.tree.map(lambda x: x.sum(0), jax.lax.map(right, queries))
        return jax.lax.psum(counts, AXES)

    split, whole = features.ROWS, PartitionSpec()
    return jax.shard_map(on_a_device, mesh=mesh, in_specs=(split, split, whole), out_specs=whole)(
        bank, queries, temperature
    )


def accuracy(
    bank: Bank,
    queries: Bank,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    mesh: Mesh,
    balanced: bool = False,
) -> dict[int, float]:
    """Fraction of the queries that is classified right, for each k.

    Neighbours by cosine similarity s vote with weight exp(s / temperature) (Wu et al., arXiv 1805.01978, section 3.4).
    The bank stays where it is: a batch of queries goes to every device, which finds the k nearest among its own rows,
    and the k nearest of those vote.

    Args:
      bank, queries: training and test features, split over the same mesh.
      ks: numbers of neighbours; those above the number of training examples are cut to it.
      mesh: over which they are split.
      balanced: as for `features.accuracy`.

    Raises:
      UserError: if a feature vector is zero or not finite.
    """
    for part, what in ((bank, 'training'), (queries, 'test')):
        features.require(features.usable(part), part.valid, what, 'finite and non-zero')
    examples = int(bank.valid.sum())
    nearest = tuple(min(k, examples) for k in ks)
    right, count = map(np.asarray, _right(bank, queries, temperature, nearest, num_classes, mesh))
    return {k: features.accuracy(r, count, balanced) for k, r in zip(ks, right, strict=True)}
