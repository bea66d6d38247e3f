"""Probes against independent forms."""

import numpy as np
import pytest

from mto_jax.errors import UserError
from mto_jax.evals import features, knn, linear


def clusters(rng, n, classes=4, dim=6):
    centres = np.random.default_rng(3).normal(size=(classes, dim)) * 2
    y = rng.integers(0, classes, n)
    return (centres[y] + rng.normal(size=(n, dim))).astype(np.float32), y.astype(np.int32)


def np_knn(train, labels, test, k, temperature, classes):
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    out = []
    for q in test:
        s = train @ (q / np.linalg.norm(q))
        votes = np.zeros(classes)
        for i in np.argsort(-s)[:k]:
            votes[labels[i]] += np.exp(s[i] / temperature)
        out.append(votes.argmax())
    return np.array(out)


def test_knn_against_numpy(rng):
    (x, y), (q, t) = clusters(rng, 200), clusters(rng, 301)
    got = knn.accuracy(x, y, q, t, ks=(1, 5, 20, 999), temperature=0.07, num_classes=4)
    for k in (1, 5, 20, 200):
        want = (np_knn(x.astype(float), y, q.astype(float), k, 0.07, 4) == t).mean()
        assert got[k if k < 200 else 999] == pytest.approx(want, abs=2 / 301)


def test_linear_probe_is_at_the_optimum(rng):
    """The gradient of the penalised cross-entropy, written in numpy, vanishes at what L-BFGS returns."""
    x, y = clusters(rng, 300)
    x = (x - x.mean(0)) / x.std(0)
    p = {k: np.asarray(v, np.float64) for k, v in linear.fit(x, y, 1e-2, 4, 300).items()}
    logits = x @ p['w'] + p['b']
    prob = np.exp(logits - logits.max(1, keepdims=True))
    prob /= prob.sum(1, keepdims=True)
    prob[np.arange(300), y] -= 1
    assert np.abs(x.T @ prob / 300 + 1e-2 * p['w']).max() < 1e-3
    assert np.abs(prob.mean(0)).max() < 1e-3


def test_linear_probe_separates_what_is_separable(rng):
    (x, y), (q, t) = clusters(rng, 500), clusters(rng, 400)
    acc, l2 = linear.accuracy(x * 10 + 5, y, q * 10 + 5, t, l2=(1e-3, 1e3), steps=50, num_classes=4)
    nearest = (np_knn(x, y, q, 20, 0.07, 4) == t).mean()
    assert acc > nearest - 0.05
    assert l2 == 1e-3


def test_labels_are_required():
    batch = {'image': np.zeros((2, 4, 4, 1), np.uint8), 'label': np.array([-1, -1]), 'valid': np.array([True, True])}
    from mto_jax import parallel

    with pytest.raises(UserError, match='label'):
        features.extract(features.raw_pixels, None, iter([batch]), parallel.make_mesh(1))


def test_features_are_those_of_the_tokens(config, rng):
    """Mean of the patch tokens or the class token, after some blocks or all."""
    import jax

    from mto_jax import methods, objective
    from mto_jax.data import augment

    method = methods.build(config)
    params = objective.init_params(method, jax.random.key(0))
    images = rng.integers(0, 256, (3, 28, 28, 1), np.uint8)
    x = augment.normalize(images, config.data.mean, config.data.std)
    for depth in (0, 1):
        tokens = np.asarray(method.apply({'params': params}, x, depth or None, method='encode'))
        config.eval.depth = depth
        for kind, want in (('mean', tokens[:, 1:].mean(1)), ('class', tokens[:, 0])):
            config.eval.features = kind
            np.testing.assert_allclose(features.encoder(method, config)(params, images), want, atol=1e-5)
