"""A quick linear probe: multinomial logistic regression on frozen features, by L-BFGS on the device.

The objective is convex, so the result depends on no learning rate or seed. The strength of the L2 penalty is chosen on
a held-out tenth of the training features, a fixed pseudo-random one per class; the test features only report.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mto_jax.data.order import stratified
from mto_jax.evals import features


def logits(p, x: jax.Array) -> jax.Array:
    """(n, classes) of x (n, D), in full float32 on every device."""
    return jnp.matmul(x, p['w'], precision='highest') + p['b']


@partial(jax.jit, static_argnames=('num_classes', 'steps'))
def fit(x: jax.Array, labels: jax.Array, l2: jax.Array, num_classes: int, steps: int):
    """Weights (D, classes) and biases (classes,) that minimise mean cross-entropy + l2 / 2 * |W|^2 over x (n, D)."""

    def objective(p):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits(p, x), labels).mean()
        return nll + 0.5 * l2 * jnp.sum(jnp.square(p['w']))

    solver = optax.lbfgs()
    params = {'w': jnp.zeros((x.shape[1], num_classes)), 'b': jnp.zeros(num_classes)}
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        p, state = carry
        value, grad = value_and_grad(p, state=state)
        updates, state = solver.update(grad, state, p, value=value, grad=grad, value_fn=objective)
        return (optax.apply_updates(p, updates), state), value

    (params, _), _ = jax.lax.scan(step, (params, solver.init(params)), None, steps)
    return params


def accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    l2: Sequence[float],
    steps: int,
    num_classes: int,
    balanced: bool = False,
) -> tuple[float, float]:
    """Fraction of the test examples that is classified right, and the L2 strength that was chosen.

    Args:
      train, test: float (n, D) features; each is standardised with the training features' mean and deviation.
      l2: candidates for the penalty.
      steps: L-BFGS iterations.
      balanced: as for `features.accuracy`.

    Raises:
      UserError: if a feature vector is not finite.
    """
    for x, what in ((train, 'training'), (test, 'test')):
        features.require(np.isfinite(x).all(1), np.ones(len(x), bool), what, 'finite')
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = jnp.asarray((train - mean) / std, jnp.float32), jnp.asarray(train_labels)
    held = np.zeros(len(train), bool)
    held[stratified(train_labels)[: -(-len(train) // 10)]] = True

    def right(p, inputs, labels):
        guesses = np.asarray(logits(p, inputs)).argmax(1)
        return features.accuracy_of(guesses, labels, balanced)

    best = l2[0]
    if len(l2) > 1:
        scores = [right(fit(x[~held], y[~held], s, num_classes, steps), x[held], train_labels[held]) for s in l2]
        best = l2[int(np.argmax(scores))]
    final = fit(x, y, best, num_classes, steps)
    return right(final, (test - mean) / std, test_labels), best
