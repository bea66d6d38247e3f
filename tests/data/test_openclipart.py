"""data/make_openclipart.py: what it draws, what it takes for alike, and its folds."""

import sys

import numpy as np
from PIL import Image

from data import make_openclipart as made


def test_images_are_cropped_put_on_white_and_padded(tmp_path):
    """A red bar of 8 x 4 pixels in the corner of a transparent image: the middle half of a square."""
    pixels = np.zeros((40, 30, 4), np.uint8)
    pixels[:4, :8] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    got = made.drawn(tmp_path / 'a.png', 16).astype(int)
    assert got.shape == (16, 16, 3)
    np.testing.assert_array_equal(got[6:10], np.broadcast_to([255, 0, 0], (4, 16, 3)))
    np.testing.assert_array_equal(got[[0, -1]], 255)
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(tmp_path / 'empty.png')
    assert made.drawn(tmp_path / 'empty.png', 16) is None


def test_similar_images_and_series_form_groups(rng):
    images = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    images[3] = np.clip(images[1].astype(int) + 3, 0, 255)
    groups = made.groups_of(images, ['a/x_01', 'a/y', 'a/x_02', 'b/z', 'b/x_01'])
    assert [[i for i in range(5) if groups[i] == g] for g in dict.fromkeys(groups)] == [[0, 2], [1, 3], [4]]


def test_a_group_is_in_one_fold_and_classes_are_in_proportion(rng):
    labels = np.repeat([0, 1, 2], [400, 100, 50])
    groups = np.arange(550) // rng.integers(1, 4)
    folds = made.folds_of(labels, groups)
    assert all(len(np.unique(folds[groups == g])) == 1 for g in np.unique(groups))
    for c, count in enumerate((400, 100, 50)):
        sizes = np.bincount(folds[labels == c], minlength=made.FOLDS)
        assert abs(sizes - count / made.FOLDS).max() <= 4


def test_from_a_folder_to_arrays(tmp_path, monkeypatch, capsys, rng):
    for name, count in (('cats', 12), ('dogs', 15), ('few', 3), ('unsorted', 20)):
        (tmp_path / name / 'deep').mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
            picture.save(tmp_path / name / 'deep' / f'{chr(97 + i)}.png')
    monkeypatch.setattr(made, 'LEAST', 10)
    monkeypatch.setattr(sys, 'argv', ['x', f'--source={tmp_path}', f'--out={tmp_path}/a.npz', '--size=8'])
    made.main()
    with np.load(tmp_path / 'a.npz') as arrays:
        assert arrays['classes'].tolist() == ['cats', 'dogs']
        labels = np.concatenate([arrays[f'fold{i}_label'] for i in range(made.FOLDS)])
        images = np.concatenate([arrays[f'fold{i}_image'] for i in range(made.FOLDS)])
    assert np.bincount(labels).tolist() == [12, 15]
    assert (images.shape, images.dtype) == ((27, 8, 8, 3), np.uint8)
    assert '27 images, 2 classes, 27 groups' in capsys.readouterr().out
