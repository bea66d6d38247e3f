"""Masks: exact counts, uniform and independent positions, one per image and device, injected noise."""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mto_jax import masking

GRID = (6, 4)
KINDS = {
    'random': (24, lambda n: masking.random_masking(n, 0.75), 18),
    'unit': (6, lambda n: masking.unit_masking(n, GRID, 2, 0.6), 16),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def draw(kind, count, seed):
    units, make, hidden = kind
    return jax.jit(make)(jax.random.uniform(jax.random.key(seed), (count, units))), hidden


def test_counts_and_indices(kind):
    masks, hidden = draw(kind, 50, 0)
    assert (masks.mask.sum(1) == hidden).all()
    assert masks.ids_keep.shape == (50, 24 - hidden)
    for row in range(50):
        keep = np.asarray(masks.ids_keep[row])
        assert not np.asarray(masks.mask[row])[keep].any()
        shuffled = np.concatenate([keep, np.setdiff1d(np.arange(24), keep)])
        # Restoring puts every visible patch back; the hidden ones are all the same token.
        visible = np.flatnonzero(~np.asarray(masks.mask[row]))
        assert (shuffled[np.asarray(masks.ids_restore[row])][visible] == visible).all()


def test_position_frequency_within_four_sigma(kind):
    masks, hidden = draw(kind, 10_000, 1)
    p = hidden / 24
    sigma = np.sqrt(p * (1 - p) / 10_000)
    assert np.abs(np.asarray(masks.mask).mean(0) - p).max() < 4 * sigma


def test_pairs_collide_at_the_expected_rate(kind):
    """Two positions of different units are hidden together with probability k (k - 1) / (n (n - 1))."""
    units = kind[0]
    masks, hidden = draw(kind, 10_000, 2)
    per_unit = 24 // units
    k = hidden // per_unit
    expected = k * (k - 1) / (units * (units - 1))
    a, b = (np.asarray(masks.mask)[:, i] for i in (0, 23))
    assert abs((a & b).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 10_000)
    # Whole masks of two images agree as seldom as chance says.
    m = np.asarray(masks.mask)
    same = (m[:5000] == m[5000:]).all(1).mean()
    chance = 1 / comb(units, k)
    assert abs(same - chance) < 4 * np.sqrt(chance / 5000) + 1e-9


def test_units_are_squares():
    masks, _ = draw(KINDS['unit'], 20, 3)
    m = np.asarray(masks.mask).reshape(20, 3, 2, 2, 2)
    assert (m == m[:, :, :1, :, :1]).all()


def test_simmim_counts():
    """Published: 30 of 49 units of 32 pixels, 120 of 196 patches."""
    assert masking.num_masked_units((14, 14), 2, 0.6) == 30
    assert masking.num_visible(196, 0.75) == 49


def test_different_on_every_device():
    """One global draw, split over 8 devices: every image on every device has its own mask."""
    mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    make = jax.jit(
        lambda key: masking.random_masking(jax.random.uniform(key, (32, 196)), 0.75).mask, out_shardings=split
    )
    mask = make(jax.random.key(0))
    assert len(mask.addressable_shards) == 8
    rows = np.concatenate([np.asarray(s.data) for s in mask.addressable_shards])
    assert len(np.unique(rows, axis=0)) == 32
    assert (
        np.asarray(masking.random_masking(jax.random.uniform(jax.random.key(0), (32, 196)), 0.75).mask) == rows
    ).all()


def test_injected_noise_decides():
    noise = jnp.asarray([[0.9, 0.1, 0.5, 0.3]])
    masks = masking.random_masking(noise, 0.5)
    assert masks.ids_keep.tolist() == [[1, 3]]
    assert masks.mask.tolist() == [[True, False, True, False]]
