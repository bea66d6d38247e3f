"""RandAugment: operations against hand-worked cases and timm, frequencies, and what a seed decides."""

import random

import numpy as np
import pytest
from PIL import Image

from configs import base
from mto_jax.data import randaugment
from mto_jax.errors import UserError


def settings(channels=3, text='rand-m9-mstd0.5-inc1'):
    data = base.get_config().data
    data.randaugment, data.channels, data.mean = text, channels, (0.5,) * channels
    return randaugment.parse(data)


def test_a_seed_decides_and_images_keep_their_form(rng):
    for channels in (1, 3):
        image = rng.integers(0, 256, (20, 30, channels), np.uint8)
        augment = settings(channels)
        seeds = rng.integers(-(2**40), 2**40, (30, 2))
        got = [augment(image, s) for s in seeds]
        for s, x in zip(seeds, got, strict=True):
            assert (x.shape, x.dtype) == (image.shape, np.uint8)
            np.testing.assert_array_equal(x, augment(image, s))
        assert sum((x != image).any() for x in got) > 10


def test_how_often():
    """Each of two draws takes place with probability one half, and all operations are drawn equally often."""
    seen, augment = [], settings()

    class Watched(type(augment)):
        def apply(self, image, name, level, sign):
            seen.append((name, level, sign))
            return image

    watched = Watched(9.0, 0.5, (0,), 'bicubic')
    for i in range(6000):
        watched(np.zeros((2, 2, 3), np.uint8), (i, 7))
    names, levels, signs = (np.array(x) for x in zip(*seen, strict=True))
    assert abs(len(names) - 6000) < 4 * (12000 / 4) ** 0.5
    counts = np.array([(names == name).sum() for name in randaugment.OPERATIONS])
    assert abs(counts - len(names) / 15).max() < 4 * (len(names) / 15) ** 0.5
    assert abs(signs.mean()) < 4 / len(signs) ** 0.5
    assert levels.max() == 1.0  # cut off at 10
    assert abs(np.median(levels) - 0.9) < 0.005


def test_moves_by_hand():
    """A quarter to the left, and what comes in is filled."""
    x = np.arange(16, dtype=np.uint8).reshape(1, 16).repeat(4, 0)
    augment = randaugment.RandAugment(9, 0, (99,), 'bilinear')
    got = np.asarray(augment.apply(Image.fromarray(x), 'TranslateXRel', 0.25 / 0.45, 1))
    np.testing.assert_array_equal(got[:, :12], x[:, 4:])
    assert (got[:, 12:] == 99).all()
    inverted = augment.apply(Image.fromarray(x), 'Invert', 1.0, 1)
    np.testing.assert_array_equal(np.asarray(inverted), 255 - x)
    brighter = augment.apply(Image.fromarray(x), 'SolarizeAdd', 1.0, 1)
    np.testing.assert_array_equal(np.asarray(brighter), x + 110)
    for level, step in ((0.0, 16), (0.5, 64), (0.8, 128), (1.0, 256)):  # 4, 2, 1 and no bits are kept
        fewer = augment.apply(Image.fromarray(17 * x), 'PosterizeIncreasing', level, 1)
        np.testing.assert_array_equal(np.asarray(fewer), 17 * x.astype(int) // step * step)


@pytest.mark.parametrize('text', ['rand-m9', 'rand-m11-mstd0.5-inc1', 'autoaugment', 'rand-m9-mstd0.5-inc0'])
def test_other_forms_are_refused(text):
    with pytest.raises(UserError, match=r'data\.randaugment is .*rand-m9-mstd0\.5-inc1'):
        settings(text=text)
    with pytest.raises(UserError, match=r'data\.channels=4'):
        settings(4)


@pytest.mark.peers
@pytest.mark.parametrize('name', list(randaugment.OPERATIONS))
def test_operations_against_timm(rng, monkeypatch, name):
    timm = pytest.importorskip('timm.data.auto_augment', reason='timm is not installed (requirements-timm.txt)')
    assert name in timm._RAND_INCREASING_TRANSFORMS
    assert len(randaugment.OPERATIONS) == len(timm._RAND_INCREASING_TRANSFORMS)
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
    augment = randaugment.RandAugment(9, 0.5, (124, 116, 104), 'bicubic')
    hparams = {'img_mean': augment.fill, 'interpolation': Image.Resampling.BICUBIC}
    for level in rng.uniform(0, 10, 8):
        for sign, draw in ((1, 0.0), (-1, 1.0)):  # timm negates where its draw exceeds one half
            monkeypatch.setattr(random, 'random', lambda draw=draw: draw)
            want = timm.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)(image)
            np.testing.assert_array_equal(np.asarray(augment.apply(image, name, level / 10, sign)), np.asarray(want))
