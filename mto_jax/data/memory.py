"""Small data sets as arrays, for training that never leaves the device."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mto_jax.data.order import padded, split_range
from mto_jax.errors import UserError


def load(data, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 (n, H, W, C), and labels, int32 (n,), of one split.

    Args:
      data: `config.data`. Where `data_dir` ends in .npz, the split 'train' is its arrays train_image and train_label,
        and neither TensorFlow nor TFDS is needed; else the data set is decoded as an evaluation reads it.
      split: a name or a slice, 'train[:90%]', 'train[100:]'; or several with + between them, but of a folder.

    Raises:
      UserError: if there are no such data, or the images are not of the config's size.
    """
    if not data.data_dir.endswith('.npz'):
        from mto_jax.data import pipeline, sources

        source = sources.open_source(data, split)
        batches = list(pipeline.eval_batches(source, data, min(512, source.num_examples)))
        images, labels = (np.concatenate([b[k][b['valid']] for b in batches]) for k in ('image', 'label'))
        return images, labels

    if not Path(data.data_dir).exists():
        raise UserError(
            f'data.data_dir is {data.data_dir!r}: no such file; data/make_fashion_mnist.py --format=npz, '
            'data/make_cifar10.py and data/make_openclipart.py write such files'
        )
    with np.load(data.data_dir) as arrays:
        sizes = {n.removesuffix('_label'): len(arrays[n]) for n in arrays if n.endswith('_label')}
        parts = [_part(data, arrays, sizes, one) for one in split.split('+')]
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return images, labels.astype(np.int32)


def _part(data, arrays, sizes, split):
    """Images and labels of one split or slice among the arrays of a file."""
    found = split_range(split, sizes)
    if not found:
        raise UserError(f'data: {data.data_dir} has no split {split!r}; it has {", ".join(sizes)} and slices of them')
    name, part = found
    if not len(range(sizes[name])[part]):
        raise UserError(f'data: the split {split!r} is empty; {name} of {data.data_dir} has {sizes[name]} images')
    images, labels = arrays[f'{name}_image'], arrays[f'{name}_label']
    wanted = (*data.image_size, data.channels)
    if images.shape[1:] != wanted or images.dtype != np.uint8:
        raise UserError(f'data: the images are {images.dtype} {images.shape[1:]}, the config says uint8 {wanted}')
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
        raise UserError(
            f'data: {name}_label of {data.data_dir} is {labels.dtype} {labels.shape}; it must be integers, one '
            f'for each of the {len(images)} images'
        )
    return images[part], labels[part]


def digest(*splits: tuple[np.ndarray, np.ndarray]) -> str:
    """Of images and labels as `load` returns them: differs where a byte does."""
    found = hashlib.sha256()
    for arrays in splits:
        for array in arrays:
            found.update(str(array.shape).encode())
            found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def batches(images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in batches as `pipeline.eval_batches` yields them."""
    for i in range(0, len(images), size):
        yield padded({'image': images[i : i + size], 'label': labels[i : i + size]}, size)
