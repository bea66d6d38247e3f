"""Makes the bundled data set: 10,000 training and 2,000 test images of Fashion-MNIST, in TFDS form.

    python data/make_fashion_mnist.py --source=DIR [--out=data] [--train=10000 --test=2000] [--format=array_record]

DIR holds the four original .gz files (Debian's package dataset-fashion-mnist installs them). Of each class the first
images are taken, so that the subset is balanced. All 60,000 + 10,000 images as one file of arrays, for studies:

    python data/make_fashion_mnist.py --source=DIR --train=60000 --test=10000 --format=npz
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

NAMES = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')


def read(source: Path, prefix: str):
    """Images uint8 (n, 28, 28, 1) and labels (n,) of one original split."""
    images = gzip.decompress((source / f'{prefix}-images-idx3-ubyte.gz').read_bytes())
    labels = gzip.decompress((source / f'{prefix}-labels-idx1-ubyte.gz').read_bytes())
    images, labels = np.frombuffer(images, np.uint8, offset=16), np.frombuffer(labels, np.uint8, offset=8)
    return images.reshape(-1, 28, 28, 1), labels.astype(np.int64)


def balanced(images, labels, count):
    """The first count / 10 images of each class, in their original order."""
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: count // 10] for c in range(10)]))
    return [(n, {'image': images[i], 'label': int(labels[i])}) for n, i in enumerate(chosen)]


def write_npz(path, train, test):
    """The arrays <split>_image and <split>_label of examples as `balanced` returns them, which `memory.load` reads."""
    arrays = {}
    for split, examples in (('train', train), ('test', test)):
        arrays[f'{split}_image'] = np.stack([e['image'] for _, e in examples])
        arrays[f'{split}_label'] = np.array([e['label'] for _, e in examples], np.uint8)
    np.savez_compressed(path, **arrays)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--source', type=Path, required=True)
    parser.add_argument('--out', default='data')
    parser.add_argument('--name', default='fashion_mnist_12k')
    parser.add_argument('--train', type=int, default=10_000)
    parser.add_argument('--test', type=int, default=2_000)
    parser.add_argument('--format', default='array_record', help='array_record, tfrecord, or npz')
    args = parser.parse_args()
    try:
        splits = [read(args.source, prefix) for prefix in ('train', 't10k')]
    except OSError as e:
        parser.error(f'--source={args.source} must hold the four original .gz files of Fashion-MNIST: {e}')
    train, test = (balanced(*split, count) for split, count in zip(splits, (args.train, args.test), strict=True))
    if args.format == 'npz':
        write_npz(Path(args.out) / 'fashion_mnist.npz', train, test)
        return
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name=args.name,
        version='1.0.0',
        features=tfds.features.FeaturesDict(
            {
                'image': tfds.features.Image(shape=(28, 28, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=NAMES),
            }
        ),
        split_datasets={
            'train': train,
            'test': test,
        },
        data_dir=args.out,
        description='A balanced subset of Fashion-MNIST (Zalando Research, MIT licence).',
        homepage='https://github.com/zalandoresearch/fashion-mnist',
        file_format=args.format,
    )


if __name__ == '__main__':
    main()
