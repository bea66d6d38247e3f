"""Augmentations on the device against PIL, colorsys and their own probabilities."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mto_jax.data import augment


@pytest.fixture
def picture(rng):
    """Smooth colours with some noise, uint8 (40, 56, 3), black and white included."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40), Image.BICUBIC)
    image = np.asarray(coarse, np.int64) + rng.integers(-8, 9, (40, 56, 3))
    image[:4], image[-4:] = 0, 255
    return image.clip(0, 255).astype(np.uint8)


def levels(function, image, *arguments):
    """What a function makes of a uint8 image, in 255ths."""
    return 255 * np.asarray(function(jnp.float32(image) / 255, *arguments), np.float64)


ENHANCE = {
    'brighten': ImageEnhance.Brightness,
    'change_contrast': ImageEnhance.Contrast,
    'saturate': ImageEnhance.Color,
}


@pytest.mark.parametrize('factor', [0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize('name', ENHANCE)
def test_jitter_against_pil(picture, name, factor):
    """PIL rounds its greys and cuts off fractions: it lies up to one level below, and half of |1 - factor| around."""
    theirs = np.asarray(ENHANCE[name](Image.fromarray(picture)).enhance(factor), np.float64)
    above = levels(getattr(augment, name), picture, factor) - theirs
    slack = abs(1 - factor) / 2 + 1e-3
    assert -slack <= above.min() <= above.max() <= 1 + slack
    if name == 'brighten':
        assert np.abs(above).max() <= 1


@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
def test_resize_against_pil(rng, picture, method):
    """Parts of each image, to a smaller and to a larger size; what lies outside of them does not count."""
    sizes = np.stack([rng.integers(1, 41, 12), rng.integers(1, 57, 12)], -1).astype(np.int32)
    sizes[:2] = (40, 56), (13, 9)
    images = np.stack([np.roll(picture, 3 * i, 1) for i in range(12)])
    for to in ((13, 9), (60, 90)):
        got = np.asarray(augment.resize(images, sizes, to, method), np.int64)
        assert got.shape == (12, *to, 3)
        for image, (h, w), mine in zip(images, sizes.tolist(), got, strict=True):
            bands = np.moveaxis(image[:h, :w], -1, 0).astype(np.float32)  # of floats, which PIL does not round
            pil = [Image.fromarray(b).resize(to[::-1], getattr(Image.Resampling, method.upper())) for b in bands]
            np.testing.assert_allclose(mine, np.stack(pil, -1).clip(0, 255), atol=0.51)
    same = augment.resize(images[:1], np.int32([[13, 9]]), (13, 9), method)
    np.testing.assert_array_equal(same[0], images[0, :13, :9])


@pytest.mark.parametrize('shift', [-0.1, 0.03, 0.1])
def test_hue_against_colorsys(picture, shift):
    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel / 255)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    wanted = 255 * np.apply_along_axis(turned, -1, picture)
    np.testing.assert_allclose(levels(augment.shift_hue, picture, shift), wanted, atol=1e-2)


def test_grey_and_solarisation_against_pil(picture):
    image = Image.fromarray(picture)
    np.testing.assert_allclose(levels(augment.luminance, picture)[..., 0], np.asarray(image.convert('L')), atol=0.51)
    solar = np.asarray(ImageOps.solarize(image, 128), np.float64)
    np.testing.assert_allclose(levels(augment.solarize, picture), solar, atol=1e-3)


@pytest.mark.parametrize('radius', [0.1, 0.5, 1.1, 2.0])
def test_blur_against_pil(picture, radius):
    """PIL's Gaussian is three box filters: within two levels in the mean."""
    theirs = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)), np.float64)
    ours = levels(augment.gaussian_blur, picture, radius, 6)
    assert np.abs(ours - theirs).mean() < 2
    impulse = np.zeros((13, 13, 1), np.uint8)
    impulse[6, 6] = 255
    at = np.exp(-0.5 * (np.arange(-6, 7) / radius) ** 2)
    at = at / at.sum()
    np.testing.assert_allclose(
        levels(augment.gaussian_blur, impulse, radius, 6)[..., 0], 255 * np.outer(at, at), atol=1e-2
    )


def near(count, total, probability):
    """Whether a count lies within five standard errors of what is expected."""
    return abs(count - total * probability) < 5 * np.sqrt(total * probability * (1 - probability))


def test_probabilities_of_the_strong_view(rng):
    """Each with its own, per image: turned grey, inverted at the top, and left as it was; never outside [0, 1]."""
    n = 3000
    images = np.tile(rng.uniform(0.2, 0.45, (1, 3, 4, 3)), (n, 1, 1, 1)).astype(np.float32)
    images[:, 0, 0] = 0.0, 0.5, 1.0
    out = np.asarray(jax.jit(augment.Strong())(jax.random.key(int(rng.integers(2**31))), images))
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert near((np.ptp(out, axis=-1) < 1e-6).all((1, 2)).sum(), n, 0.2)
    assert near((np.abs(out - images) < 1e-6).all((1, 2, 3)).sum(), n, 0.2 * 0.8 * 0.9 * 0.8)
    only = jax.jit(augment.Strong(jitter=0, grey=0, blur=0))
    out = np.asarray(only(jax.random.key(int(rng.integers(2**31))), images))
    assert near((out[:, 0, 0, 2] == 0).sum(), n, 0.2)


@pytest.mark.parametrize(
    ('name', 'spread', 'measure'),
    [
        # Of a dark and a bright pixel: their mean, their distance, the distance of a pixel's colours, and its hue.
        ('brightness', 0.4, lambda x: x.mean((1, 2, 3)) * 3),
        ('contrast', 0.4, lambda x: (x[:, 0, 1] - x[:, 0, 0]).mean(-1) * 15),
        ('saturation', 0.2, lambda x: (x[:, 0, 1, 0] - x[:, 0, 1, 2]) / 0.2),
        ('hue', 0.1, lambda x: 1 + (x[:, 0, 1, 1] - x[:, 0, 1, 2]) / 0.2 / 6 * np.where(x[:, 0, 1, 1] > 0.301, 1, 0)),
    ],
)
def test_factors_of_the_jitter(rng, name, spread, measure):
    """One operation at a time, of the shipped strength: uniform around 1 in its range, one draw per image."""
    n = 2000
    images = np.tile(np.float32([[0.3, 0.3, 0.3], [0.5, 0.3, 0.3]]), (n, 1, 1, 1))
    others = {'brightness': 0, 'contrast': 0, 'saturation': 0, 'hue': 0}
    others.pop(name)
    alone = augment.Strong(jitter=1, grey=0, blur=0, solarize=0, **others)
    factor = measure(np.asarray(jax.jit(alone)(jax.random.key(int(rng.integers(2**31))), images)))
    low = 1.0 if name == 'hue' else 1 - spread  # a shift down from red moves the blue: counted as none
    assert low - 1e-5 <= factor.min() < low + 0.01
    assert 1 + spread - 0.01 < factor.max() <= 1 + spread + 1e-5
    if name != 'hue':
        assert abs(factor.mean() - 1) < 5 * 2 * spread / np.sqrt(12 * n)


def test_the_jitter_has_no_order(rng):
    """Brightness and contrast in both orders, where the order shows: clipping comes before or after."""
    images = np.tile(np.float32([[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]]), (400, 1, 1, 1))
    strong = augment.Strong(jitter=1, grey=0, blur=0, solarize=0, saturation=0, hue=0)
    out = np.asarray(jax.jit(strong)(jax.random.key(int(rng.integers(2**31))), images))[:, 0, :, 0]
    # Contrast last: what was clipped at 1 is drawn towards the mean, below 1, though the dark pixel was made brighter.
    last = (out[:, 0] < 1 - 1e-3) & (out.sum(1) > 1.05)
    first = out[:, 0] > 1 - 1e-6
    assert last.sum() > 10
    assert first.sum() > 10


def test_radii_of_the_blur(rng):
    """Uniform between the two given: read off a single bright pixel's square, against the same blur by numpy."""
    images = np.zeros((500, 15, 15, 1), np.float32)
    images[:, 7, 7] = 1.0
    blurred = augment.Strong(jitter=0, grey=0, blur=1, solarize=0, blur_radius=(0.5, 1.5))
    peak = np.asarray(jax.jit(blurred)(jax.random.key(int(rng.integers(2**31))), images))[:, 7, 7, 0]
    radii = np.linspace(0.5, 1.5, 2001)
    peaks = [1 / np.exp(-0.5 * np.square(np.arange(-5, 6) / r)).sum() ** 2 for r in radii]
    found = np.interp(peak, peaks[::-1], radii[::-1])
    assert 0.5 <= found.min() < 0.52
    assert 1.48 < found.max() <= 1.5
    assert abs(found.mean() - 1) < 5 / np.sqrt(12 * 500)


def test_other_channels_keep_their_colours(rng):
    """One channel and five: the jitter's hue and saturation do nothing, and nothing turns grey."""
    for channels in (1, 5):
        images = rng.uniform(size=(6, 3, 4, channels)).astype(np.float32)
        colour = augment.Strong(jitter=1, grey=1, blur=0, solarize=0, brightness=0, contrast=0)
        np.testing.assert_allclose(jax.jit(colour)(jax.random.key(0), images), images, atol=1e-6)
        assert jax.eval_shape(augment.Strong(), jax.random.key(0), images).shape == images.shape
