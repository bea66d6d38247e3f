"""Images prepared without TensorFlow against the evaluation pipeline."""

import io

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

from mto_jax.config import get_config
from mto_jax.data import pil, pipeline
from mto_jax.errors import UserError
from tests.data.test_images import jpeg, photo


@pytest.fixture
def data():
    return get_config().data


def encoded(image, kind):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ('resize', 'size'), [(256, (224, 224)), (0, (96, 64)), (36, (28, 28)), (60, (32, 120))], ids=str
)
@pytest.mark.parametrize('channels', [1, 3])
def test_against_the_pipeline(data, rng, resize, size, channels):
    """Sizes, crops and the resize are the same; of a JPEG, values differ by how it is decoded."""
    data.eval_resize, data.image_size, data.channels = resize, size, channels
    for index in range(4):
        image = photo(index)
        width, height = rng.integers(100, 300, 2)
        image = image.crop((10, 5, 10 + width, 5 + height)).convert({1: 'L', 3: 'RGB'}[channels])
        for bytes_, mean, most in ((jpeg(image), 1.5, 12), (encoded(image, 'PNG'), 0, 0)):
            want = pipeline.eval_image(tf.constant(bytes_), data).numpy().astype(int)
            got = pil.prepare(Image.open(io.BytesIO(bytes_)), data).astype(int)
            assert got.shape == want.shape == (*size, channels)
            assert abs(got - want).mean() <= mean
            assert abs(got - want).max() <= most


def test_a_shift_of_one_pixel_would_show(data):
    """The bounds above tell the crop from its neighbour."""
    image = Image.fromarray(skimage.data.gravel()).convert('RGB')
    got = pil.prepare(image, data).astype(int)
    assert abs(got[:, 1:] - got[:, :-1]).mean() > 3


def test_accepted_images(data, tmp_path, rng):
    """A path, its text, a PIL image and an array are one image; an array of the model's size stays as it is."""
    image = photo(1)
    image.save(tmp_path / 'cat.png')
    want = pil.prepare(np.asarray(image), data)
    for given in (image, tmp_path / 'cat.png', str(tmp_path / 'cat.png')):
        np.testing.assert_array_equal(pil.prepare(given, data), want)
    exact = rng.integers(0, 256, (224, 224, 3), np.uint8)
    np.testing.assert_array_equal(pil.prepare(exact, data), exact)
    data.channels = 5
    five = rng.integers(0, 256, (50, 70, 5), np.uint8)
    got = pil.prepare(five, data)
    data.channels = 3
    np.testing.assert_array_equal(got[..., 2:], pil.prepare(five[..., 2:], data))


def test_refused_images(data, tmp_path):
    (tmp_path / 'words.jpg').write_text('no image')
    (tmp_path / 'short.jpg').write_bytes(jpeg(photo(0))[:2000])
    for name, problem in (('words.jpg', 'cannot identify'), ('short.jpg', 'truncated'), ('gone.jpg', 'No such file')):
        with pytest.raises(UserError, match=f'cannot decode .*{name}: .*{problem}'):
            pil.prepare(tmp_path / name, data)
    deep = Image.fromarray(np.zeros((8, 8), np.uint16))
    deep.save(tmp_path / 'deep.png')
    with pytest.raises(UserError, match=r'deep\.png has mode I;16'):
        pil.prepare(tmp_path / 'deep.png', data)
    for wrong in (np.zeros((9, 9, 3), np.float32), np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8)):
        with pytest.raises(UserError, match=r'images\[7\] is .* uint8 array \(height, width, 3\)'):
            pil.prepare(wrong, data, 'images[7]')
    data.channels = 5
    with pytest.raises(UserError, match='reads 5 channels'):
        pil.prepare(photo(0), data)
