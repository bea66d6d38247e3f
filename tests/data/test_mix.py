"""Mixing and erasing on the device, against numpy and, where it is installed, timm."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mto_jax.data import mix


def test_soft_labels(rng):
    labels = rng.integers(0, 7, 20)
    want = np.full((20, 7), 0.3 / 7)
    want[np.arange(20), labels] += 0.7
    np.testing.assert_allclose(mix.soft_labels(jnp.asarray(labels), 7, 0.3), want, rtol=1e-6)


def mixed(rng, how, batch=6, size=(9, 13)):
    """(images, targets, mixed images, mixed targets) of one batch of distinct values."""
    images = rng.normal(size=(batch, *size, 2)).astype(np.float32)
    targets = np.eye(batch, dtype=np.float32)
    out = jax.jit(how)(jax.random.key(int(rng.integers(2**31))), images, targets)
    return images, targets, *map(np.asarray, out)


def test_mixup_is_a_weighted_mean_with_the_reverse(rng):
    images, targets, got, labels = mixed(rng, mix.Mix(0.8, 0.0))
    weight = labels[0, 0]
    np.testing.assert_allclose(labels, weight * targets + (1 - weight) * targets[::-1], atol=1e-6)
    np.testing.assert_allclose(got, weight * images + (1 - weight) * images[::-1], atol=1e-5)
    assert 0 < weight < 1


def test_cutmix_pastes_one_box_and_weighs_by_its_area(rng):
    for _ in range(10):
        images, targets, got, labels = mixed(rng, mix.Mix(0.0, 1.0))
        pasted = (got == images[::-1]).all(-1)
        assert (pasted == pasted[0]).all()
        assert ((got == images).all(-1) | pasted).all()
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert pasted[0].sum() == rows.sum() * columns.sum()  # a rectangle
        np.testing.assert_allclose(labels[0, 0], 1 - pasted[0].mean(), atol=1e-6)
        np.testing.assert_allclose(labels, labels[0, 0] * targets + (1 - labels[0, 0]) * targets[::-1], atol=1e-6)


def test_how_often_and_how_much():
    """Shares of batches that are left alone, mixed and cut; the weights are of the Beta distribution."""
    keys, images, targets = jax.random.split(jax.random.key(3), 4000), jnp.zeros((2, 4, 4, 1)), jnp.eye(2)
    images = images.at[1].set(1.0)
    how = mix.Mix(0.8, 1.0, prob=0.7, switch_prob=0.4)
    got, labels = jax.jit(jax.vmap(lambda k: how(k, images, targets)))(keys)
    same = np.asarray((got == images).all((1, 2, 3, 4)))
    whole = np.asarray(((got == 0) | (got == 1)).all((1, 2, 3, 4)))
    # A box may be empty too; a mixed weight is never exactly one.
    assert abs((~whole).mean() - 0.7 * 0.6) < 4 * 0.5 / 4000**0.5
    assert same.mean() > 0.3 - 4 * 0.5 / 4000**0.5
    weights = np.asarray(labels[:, 0, 0])[~whole]
    assert abs(weights.mean() - 0.5) < 4 * weights.std() / len(weights) ** 0.5
    variance = 0.8 * 0.8 / ((1.6**2) * 2.6)
    assert abs(weights.var() - variance) < 0.1 * variance


def test_random_erasing(rng):
    images = np.full((3000, 16, 24, 3), 9.0, np.float32)
    got = np.asarray(jax.jit(lambda k, x: mix.random_erase(k, x, 0.4))(jax.random.key(5), images))
    erased = (got != 9).all(-1)
    assert ((got != 9).any(-1) == erased).all()
    hit = erased.any((1, 2))
    assert abs(hit.mean() - 0.4) < 4 * 0.5 / 3000**0.5
    rows, columns = erased.any(2).sum(1)[hit], erased.any(1).sum(1)[hit]
    assert (erased.sum((1, 2))[hit] == rows * columns).all()
    share = rows * columns / (16 * 24)
    assert share.min() > 0.01
    assert share.max() < 1 / 3 + 0.05
    # Uniform from 0.02 to 1/3, less what does not fit: the largest stand on end.
    assert abs(share.mean() - 0.17) < 0.02
    assert (rows < 16).all()
    assert (columns < 24).all()
    noise = got[erased]
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 0.01


@pytest.mark.peers
def test_boxes_and_targets_against_timm(rng, monkeypatch):
    timm = pytest.importorskip('timm.data.mixup', reason='timm is not installed (requirements-timm.txt)')
    torch = pytest.importorskip('torch')
    for _ in range(50):
        size, weight = tuple(int(n) for n in rng.integers(8, 40, 2)), float(np.float32(rng.beta(1, 1)))
        centre = [int(rng.integers(n)) for n in size]
        with monkeypatch.context() as m:
            m.setattr(np.random, 'randint', mock.Mock(side_effect=centre))
            top, bottom, left, right = timm.rand_bbox((1, 3, *size), weight)
        first, last = mix.cut_box(jnp.float32(weight), jnp.array(centre), size)
        assert (first.tolist(), last.tolist()) == ([top, left], [bottom, right])
    labels = rng.integers(0, 5, 8)
    want = timm.mixup_target(torch.tensor(labels), 5, lam=0.3, smoothing=0.1).numpy()
    soft = mix.soft_labels(jnp.asarray(labels), 5, 0.1)
    np.testing.assert_allclose(0.3 * soft + 0.7 * soft[::-1], want, atol=1e-6)
