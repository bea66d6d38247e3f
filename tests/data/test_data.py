"""The input pipeline: which examples, in which order, how cropped; and the augmentation on the device."""

import gc
import os
import resource
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from mto_jax.data import augment, memory, order, pipeline, sources
from mto_jax.errors import UserError
from mto_jax.runtime import parallel

COUNT = 37


def write(folder, file_format, encoding='png', labels=True):
    """A small data set whose image i is filled with the value i."""
    features = {'image': tfds.features.Image(shape=(None, None, 3), encoding_format=encoding)}
    if labels:
        features['label'] = tfds.features.ClassLabel(num_classes=COUNT)

    def example(i):
        image = np.full((20 + i % 3, 30, 3), i, np.uint8)
        return {'image': image} | ({'label': i} if labels else {})

    tfds.dataset_builders.store_as_tfds_dataset(
        name='tiny',
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={'train': [(i, example(i)) for i in range(COUNT)]},
        data_dir=folder,
        file_format=file_format,
        disable_shuffling=True,
    )


@pytest.fixture(scope='module', params=['array_record', 'tfrecord'])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write(path, request.param)
    return path


@pytest.fixture
def data(config, folder):
    d = config.data
    d.name, d.data_dir, d.train_split = 'tiny', str(folder), 'train'
    d.image_size, d.channels, d.num_classes = (16, 24), 3, COUNT
    d.mean, d.std = (0.5,) * 3, (0.2,) * 3
    d.shuffle_buffer = 16
    return d


def batches(data, start, stop, seed=0, size=8):
    source = sources.open_source(data, 'train')
    return list(pipeline.train_batches(source, data, size, seed, start, stop))


def test_a_batch_depends_on_seed_and_step_alone(data):
    """Starting anywhere, also in the middle of an epoch and beyond one, gives the same images."""
    whole = batches(data, 0, 11)
    for start in (0, 1, 3, 4, 6, 10):
        part = batches(data, start, 11)
        assert len(part) == 11 - start
        for a, b in zip(whole[start:], part, strict=True):
            np.testing.assert_array_equal(a['image'], b['image'])
            np.testing.assert_array_equal(a['label'], b['label'])
    assert whole[0]['image'].dtype == np.uint8
    assert whole[0]['image'].shape == (8, 16, 24, 3)


def test_epochs_are_reshuffled_and_hold_no_example_twice(data):
    """37 examples make 4 batches of 8 an epoch; the 5 left over are dropped from it, others in the next."""
    rows = batches(data, 0, 8)
    epochs = [np.concatenate([b['label'] for b in rows[e : e + 4]]) for e in (0, 4)]
    assert all(len(set(e.tolist())) == 32 for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    other = np.concatenate([b['label'] for b in batches(data, 0, 4, seed=1)])
    assert (epochs[0] != other).any()


@pytest.mark.parametrize('size', [5, 8, 37, 50])
def test_evaluation_sees_every_example_once(data, size):
    source = sources.open_source(data, 'train')
    seen = list(pipeline.eval_batches(source, data, size))
    assert {len(b['label']) for b in seen} == {size}
    labels = np.concatenate([b['label'][b['valid']] for b in seen])
    assert labels.tolist() == list(range(COUNT))
    pixels = np.concatenate([b['image'][b['valid']] for b in seen])
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.arange(COUNT)[:, None, None, None], pixels.shape))


@pytest.mark.parametrize('shares', [2, 4])
def test_processes_read_parts_of_an_epoch(data, shares):
    """Random access: the rows of one and the same global batch. Sequential: shares that have no example in common."""
    source = sources.open_source(data, 'train')
    parts = [parallel.Part(np.arange(8)[i::shares], i, shares) for i in range(shares)]
    whole = batches(data, 0, 8)
    for start in (0, 2, 5):
        read = [list(pipeline.train_batches(source, data, 8, 0, start, 8, p)) for p in parts]
        for t in range(start, 8):
            rows = {p.share: read[p.share][t - start] for p in parts}
            assert all(len(b['label']) == 8 // shares for b in rows.values())
            if source.random_access:
                for p in parts:
                    np.testing.assert_array_equal(rows[p.share]['label'], whole[t]['label'][p.rows])
                    np.testing.assert_array_equal(rows[p.share]['image'], whole[t]['image'][p.rows])
        if start == 0:
            first = read
        for p in parts:  # also where a process starts in the middle
            for a, b in zip(first[p.share][start:], read[p.share], strict=True):
                np.testing.assert_array_equal(a['image'], b['image'])
    labels = np.concatenate([b['label'] for read in first for b in read[:4]])
    assert len(set(labels.tolist())) == 32
    assert ('random' in source.order(parts[0])) == source.random_access
    assert source.order(parts[0]) == source.order(parts[1])


@pytest.mark.parametrize('size', [6, 34, 60])
def test_processes_evaluate_every_example_once(data, size):
    """Also where the last batch holds nothing for a process: all have as many batches, for they work in step."""
    source = sources.open_source(data, 'train')
    rows = np.arange(size)
    parts = [parallel.Part(rows[: size // 2], 0, 2), parallel.Part(rows[size // 2 :], 1, 2)]
    seen = [list(pipeline.eval_batches(source, data, size, 0, p)) for p in parts]
    assert len(seen[0]) == len(seen[1])
    together = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*seen, strict=True)]
    assert np.concatenate([b['label'][b['valid']] for b in together]).tolist() == list(range(COUNT))


def test_evaluation_limit_is_a_subset_in_order(data):
    source = sources.open_source(data, 'train')
    seen = np.concatenate([b['label'][b['valid']] for b in pipeline.eval_batches(source, data, 4, limit=10)])
    assert seen.tolist() == sorted(set(seen.tolist())) == order.subset(COUNT, 10).tolist()
    assert len(seen) == 10


def test_subsets_follow_no_cycle_of_the_labels():
    """One in ten of labels that repeat every ten, or lie class by class, has all classes."""
    for labels in (np.arange(10_000) % 10, np.arange(10_000) // 1000):
        assert (abs(np.bincount(labels[order.subset(10_000, 1000)]) - 100) < 40).all()
    assert order.subset(50, 60).tolist() == list(range(50))


def test_evaluation_of_sub_splits(data):
    source = sources.open_source(data, 'train[5:12]')
    seen = np.concatenate([b['label'][b['valid']] for b in pipeline.eval_batches(source, data, 4)])
    assert seen.tolist() == list(range(5, 12))


def test_labels_are_optional(config, tmp_path):
    write(tmp_path, 'array_record', labels=False)
    config.data.name, config.data.data_dir, config.data.channels = '', str(tmp_path / 'tiny' / '1.0.0'), 3
    source = sources.open_source(config.data, 'train')
    assert (next(pipeline.train_batches(source, config.data, 8, 0, 0, 1))['label'] == -1).all()


def stored(data, root, features, example, count=9):
    """A data set of one split with these features, and how `data` names it."""
    tfds.dataset_builders.store_as_tfds_dataset(
        name='odd',
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={'train': [(i, example(i)) for i in range(count)]},
        data_dir=root,
        file_format='array_record',
        disable_shuffling=True,
    )
    data.name, data.data_dir, data.channels = '', str(root / 'odd' / '1.0.0'), 3


GREY = np.full((8, 8, 3), 7, np.uint8)
IMAGE = tfds.features.Image(shape=(8, 8, 3))


@pytest.mark.parametrize(
    ('feature', 'pixels'),
    [
        (tfds.features.Image(shape=(8, 8, 1), dtype=np.float32), np.full((8, 8, 1), 0.5, np.float32)),
        (tfds.features.Tensor(shape=(8, 8, 5), dtype=np.uint8), np.zeros((8, 8, 5), np.uint8)),
    ],
    ids=['float', 'five channels'],
)
def test_pixels_that_would_be_misread_are_refused(config, tmp_path, feature, pixels):
    stored(config.data, tmp_path, {'image': feature}, lambda i: {'image': pixels})
    with pytest.raises(
        UserError, match=r'the feature "image" of odd is .*; it must be a tfds\.features\.Image of uint8'
    ):
        sources.open_source(config.data, 'train')


def test_a_label_map_of_floats_is_none(config, tmp_path):
    depth = tfds.features.Image(shape=(8, 8, 1), dtype=np.float32)
    stored(
        config.data,
        tmp_path,
        {'image': IMAGE, 'depth': depth},
        lambda i: {'image': GREY, 'depth': np.ones((8, 8, 1), 'f4')},
    )
    config.data.mask = 'depth'
    with pytest.raises(UserError, match=r"data\.mask is 'depth'; the label maps of odd are none"):
        sources.open_source(config.data, 'train')


@pytest.mark.parametrize(
    ('feature', 'label'),
    [
        (tfds.features.Text(), 'cat'),
        (tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3)), [0, 2]),
        (np.float32, 1.5),
        (tfds.features.ClassLabel(num_classes=3), -1),
    ],
    ids=['string', 'several', 'fractional', 'none'],
)
def test_labels_that_are_no_class(config, tmp_path, feature, label):
    """A pre-training needs none; what does is refused, with the feature's name."""
    stored(config.data, tmp_path, {'image': IMAGE, 'label': feature}, lambda i: {'image': GREY, 'label': label})
    source = sources.open_source(config.data, 'train')
    assert (next(pipeline.train_batches(source, config.data, 8, 0, 0, 1))['label'] == -1).all()
    words = 'the label of an image is -1' if label == -1 else 'the feature "label" of odd is'
    with pytest.raises(UserError, match=f"the split 'train' has no labels, which kNN needs: {words}"):
        sources.require_labels(config.data, 'kNN', 'train')


@pytest.mark.parametrize('labels', [np.array([0.5] * 4), np.array(['a'] * 4), np.zeros((4, 2), int)])
def test_labels_in_memory_are_integers(config, tmp_path, labels):
    data = config.data
    data.data_dir, data.image_size = str(tmp_path / 'x.npz'), (8, 8)
    np.savez(data.data_dir, train_image=np.zeros((4, 8, 8, 1), np.uint8), train_label=labels)
    with pytest.raises(UserError, match=r'train_label of .*x\.npz is .*; it must be integers, one for each of the 4'):
        memory.load(data, 'train')


def windows(height, width, count=3000, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3)):
    make = tf.function(lambda i: pipeline.crop_window(height, width, tf.stack([i, i + 7]), area, aspect))
    return np.array([make(tf.constant(i, tf.int64)).numpy() for i in range(count)])


def test_crop_window_distribution():
    """Inside the image, with the area and aspect asked for, and spread over all positions."""
    w = windows(200, 300)
    y, x, h, width = w.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= 200).all()
    assert (x + width <= 300).all()
    share, ratio = h * width / 60_000, width / h
    assert 0.195 < share.min() < 0.22
    assert share.max() <= 1.01
    assert 0.73 < ratio.min() < 0.77
    assert 1.29 < ratio.max() < 1.36
    # The logarithm of the ratio is uniform, so wide and tall windows are equally likely where both fit.
    small = share < 0.4
    assert np.log(ratio[small]).mean() == pytest.approx(0.0, abs=0.03)
    # Given a window, its offset is uniform over where it fits.
    assert (y[small] / (200 - h[small])).mean() == pytest.approx(0.5, abs=0.04)


def test_crop_window_falls_back_to_the_centre():
    """An image so wide that no window of half its area fits: the largest centred one of aspect 4 / 3."""
    w = windows(30, 600, count=3, area=(0.9, 1.0))
    assert (w == [0, 280, 30, 40]).all()


def test_fused_jpeg_crop_is_the_crop(rng):
    """Decoding a window of a JPEG gives the pixels of the whole decoded image (up to chroma upsampling at the rim)."""
    smooth = np.cumsum(np.cumsum(rng.normal(size=(64, 80, 1)), 0), 1)
    smooth = (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    encoded = tf.io.encode_jpeg(np.repeat(smooth, 3, -1), quality=95)
    window = tf.constant([8, 16, 24, 32])
    got = pipeline.decode(encoded, 3, window).numpy().astype(int)
    whole = tf.io.decode_jpeg(encoded).numpy()[8:32, 16:48].astype(int)
    assert np.abs(got - whole).max() <= 2
    png = tf.io.encode_png(np.repeat(smooth, 3, -1))
    np.testing.assert_array_equal(pipeline.decode(png, 3, window), np.repeat(smooth, 3, -1)[8:32, 16:48])


def test_resize_against_pil(rng):
    """The antialiased resize is PIL's, which the published recipes use, for any number of channels."""
    image = rng.integers(0, 256, (90, 120, 5), np.uint8)
    for method in ('bicubic', 'bilinear'):
        bands = [Image.fromarray(x).resize((40, 32), getattr(Image, method.upper())) for x in np.moveaxis(image, -1, 0)]
        for channels in (1, 3, 5):
            ours = pipeline._resize(tf.constant(image[..., :channels]), (32, 40), method)
            np.testing.assert_array_equal(ours, np.stack(bands[:channels], -1))


def test_eval_crop_keeps_the_aspect(config):
    """A wide image: shorter side to eval_resize, then the centre; a circle stays a circle."""
    config.data.image_size, config.data.channels, config.data.eval_resize = (32, 32), 1, 40
    yy, xx = np.mgrid[:80, :200]
    disc = (255 * ((yy - 40) ** 2 + (xx - 100) ** 2 < 20**2)).astype(np.uint8)[..., None]
    out = pipeline.eval_image(tf.io.encode_png(disc), config.data).numpy()[..., 0] > 127
    assert out.any(0).sum() == pytest.approx(20, abs=1)
    assert out.any(1).sum() == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ('shape', 'frame', 'diameter', 'scale'),
    [
        ((300, 400), (384, 384), 180, 384 / 300),
        ((400, 300), (384, 384), 180, 384 / 300),
        ((600, 300), (224, 448), 120, 448 / 300),
        ((300, 400), (224, 224), 180, 256 / 300),
    ],
)
def test_eval_image_keeps_circles(config, shape, frame, diameter, scale):
    """Also where an image whose shorter side is eval_resize does not cover image_size."""
    config.data.image_size, config.data.channels, config.data.eval_resize = frame, 1, 256
    y, x = np.indices(shape)
    disc = (np.hypot(y - (shape[0] - 1) / 2, x - (shape[1] - 1) / 2) < diameter / 2).astype(np.uint8) * 255
    out = pipeline.eval_image(tf.io.encode_png(disc[..., None]), config.data).numpy()[..., 0] > 127
    assert out.shape == frame
    assert out.any(1).sum() == pytest.approx(diameter * scale, abs=2)
    assert out.any(0).sum() == pytest.approx(diameter * scale, abs=2)


@pytest.mark.parametrize(
    ('change', 'split', 'word'),
    [
        ({'name': 'no_such_set'}, 'train', 'data.name'),
        ({'name': '', 'data_dir': '/no/such/folder'}, 'train', 'data.data_dir'),
        ({}, 'holdout', 'no split'),
        ({}, 'train[:0]', 'empty'),
        ({'name': 'imagenet2012'}, 'train', 'ILSVRC2012_img_train.tar'),
        ({'name': 'cifar10'}, 'train', 'download_and_prepare'),
    ],
)
def test_missing_data_says_what_to_do(config, change, split, word):
    config.data.update(change)
    with pytest.raises(UserError, match=word):
        sources.open_source(config.data, split)


def test_too_large_a_batch():
    with pytest.raises(UserError, match='batch_size is 64'):
        order.steps_per_epoch(37, 64)


def test_prefetch_keeps_order_and_measures_waiting():
    it = pipeline.Prefetch(iter([{'n': i} for i in range(5)]), lambda b: b)
    assert [b['n'] for b in it] == [0, 1, 2, 3, 4]
    assert it.reset() > 0
    assert it.reset() == 0


def test_normalize_and_back(rng):
    images = rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = augment.normalize(images, mean, std)
    np.testing.assert_allclose(x, (images / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(augment.denormalize(x, mean, std), images / 255, atol=1e-6)


def test_flip_mirrors_about_half():
    images = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2).repeat(1000, 0)
    out = np.asarray(augment.random_flip(jax.random.key(0), images))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == images).all((1, 2, 3))).all()
    assert flipped.mean() == pytest.approx(0.5, abs=0.06)


def test_embedded_data_are_balanced_and_intact(config):
    config.data.name, config.data.data_dir = 'fashion_mnist_12k', 'data'
    for split, count in (('train', 10_000), ('test', 2_000)):
        rows = list(pipeline.eval_batches(sources.open_source(config.data, split), config.data, 1000))
        labels = np.concatenate([b['label'][b['valid']] for b in rows])
        assert np.bincount(labels).tolist() == [count // 10] * 10
        if split == 'train':
            pixels = np.concatenate([b['image'] for b in rows]) / 255
            assert pixels.mean() == pytest.approx(0.286, abs=0.003)
            assert pixels.std() == pytest.approx(0.353, abs=0.003)


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='open files are counted as on Linux')
def test_no_file_stays_open(data):
    """However often a split is read, to its end or not."""

    def count():
        gc.collect()
        files = [os.readlink(path) for path in Path('/proc/self/fd').iterdir() if path.is_symlink()]
        return sum('tiny-train' in file for file in files)

    source, before = sources.open_source(data, 'train'), count()
    for _ in range(2):
        list(pipeline.eval_batches(source, data, 16))
        next(pipeline.eval_batches(source, data, 16))
        next(pipeline.train_batches(source, data, 16, 0, 0, 4))
    assert count() == before


@pytest.mark.parametrize(('hard', 'limit'), [(10_000, 516), (resource.RLIM_INFINITY, 516), (500, 500)])
def test_enough_files_can_be_open(config, monkeypatch, hard, limit):
    """The limit of a process is raised; where the system allows too little, what to do is said."""
    given = []
    monkeypatch.setattr(resource, 'getrlimit', lambda _: (256, hard))
    monkeypatch.setattr(resource, 'setrlimit', lambda _, limits: given.append(limits))
    if hard == 500:
        with pytest.raises(UserError, match=r'has 1 files, .* this process may open 500: .* ulimit -n 516'):
            sources.open_source(config.data, 'test')
    else:
        sources.open_source(config.data, 'test')
    assert given == [(limit, hard)]
