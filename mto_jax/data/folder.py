"""A plain folder of images as a data set: `data.name='folder'`, and in `data.data_dir` one folder a split.

data_dir/train/<class>/any/depth.jpg    labels are the classes' places among those of all splits, sorted
data_dir/train/any.jpg                  no labels

With `data.mask`, another folder has a label map for each image: <data.mask>/train/<class>/any/depth.png
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from mto_jax.data.order import split_range, stratified
from mto_jax.errors import UserError
from mto_jax.runtime.parallel import Part

NAME = 'folder'
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split or a slice of it: sorted files, read by path; `data.sources.Source` has what the methods mean.

    Attributes:
      paths: str (n,).
      labels: int64 (n,), -1 without classes.
      masks: paths of the label maps, str (n,); None without.
    """

    paths: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    random_access = True

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def num_examples(self) -> int:
        return len(self.paths)

    def order(self, part: Part) -> str:
        del part
        listing = hashlib.sha256('\n'.join(self.paths).encode()).hexdigest()[:12]
        return f'random access, {self.num_examples} files, listing {listing}'

    def stream(self, positions: Iterable[np.ndarray]) -> tf.data.Dataset:
        columns = (self.paths, self.labels) + (() if self.masks is None else (self.masks,))

        def entries():
            for indices in positions:
                yield tuple(c[indices] for c in columns)

        def read(path, label, *mask):
            example = {'image': tf.io.read_file(path), 'label': label, 'name': path}
            return example | ({'mask': tf.io.read_file(mask[0])} if mask else {})

        spec = tuple(tf.TensorSpec([None], tf.int64 if c is self.labels else tf.string) for c in columns)
        ds = tf.data.Dataset.from_generator(entries, output_signature=spec).unbatch()
        return ds.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def select(self, positions: Sequence[np.ndarray]) -> tf.data.Dataset:
        return self.stream(p for p in positions if len(p))


def open_folder(root: str, split: str, masks: str = '') -> Folder:
    """The images of one split, or of a slice of it like 'train[:90%]', sorted by path.

    Slices are of a fixed pseudo-random order with the classes in proportion (`order.stratified`), since by path the
    first images are all of one class.

    Args:
      masks: a folder of label maps, or ''.

    Raises:
      UserError: if the folder, the split, its images or one of their label maps are missing, or only some images lie in
        class folders.
    """
    splits = _listing(root)
    found = split_range(split, {name: len(paths) for name, (paths, _) in splits.items()})
    if not found:
        raise UserError(
            f'data: {root} has no split {split!r}; its folders are {", ".join(splits) or "none"} '
            f'(--config.data.train_split, val_split and test_split name them)'
        )
    name, part = found
    paths, labels = splits[name]
    chosen = np.sort(stratified(labels)[part])
    if not len(chosen):
        raise UserError(f'data: {split!r} of {root} holds no image ({", ".join(SUFFIXES)})')
    if (labels == -1).any() and (labels >= 0).any():
        raise UserError(
            f'data: {root}/{name} has images both beside and inside class folders, like '
            f'{paths[labels == -1][0]}; put all into class folders, or none'
        )
    return Folder(paths[chosen], labels[chosen], _masks(root, paths[chosen], masks) if masks else None)


def _masks(root: str, paths: np.ndarray, masks: str) -> np.ndarray:
    """The label map of each image, str (n,)."""
    root, masks = root.rstrip('/'), masks.rstrip('/')
    out = np.array([f'{masks}{p.removeprefix(root).rpartition(".")[0]}.png' for p in paths], object)
    there = {f'{folder.rstrip("/")}/{f}' for folder, _, files in tf.io.gfile.walk(masks) for f in files}
    if missing := [i for i, p in enumerate(out) if p not in there]:
        i = missing[0]
        raise UserError(
            f'data.mask is {masks!r}: {len(missing)} of {len(out)} images have no label map there; that of {paths[i]} '
            f'must be {out[i]}'
        )
    return out


@functools.lru_cache(maxsize=4)
def _listing(root: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: sorted paths and their labels}. Listed once a process: a large folder takes a while."""
    if not tf.io.gfile.isdir(root):
        raise UserError(
            f"data.data_dir is {root!r}: no such folder; with data.name='folder' it holds one folder a split"
        )
    root = root.rstrip('/')
    found: dict[str, list[tuple[str, str]]] = {}
    for folder, _, files in tf.io.gfile.walk(root):
        inside = folder.rstrip('/').removeprefix(root).strip('/').split('/')
        if inside == ['']:
            continue
        images = found.setdefault(inside[0], [])
        group = inside[1] if len(inside) > 1 else ''
        images += [(f'{folder.rstrip("/")}/{f}', group) for f in files if f.lower().endswith(SUFFIXES)]
    classes = sorted({group for images in found.values() for _, group in images if group})
    number = {'': -1} | {c: i for i, c in enumerate(classes)}
    return {
        split: (np.array([p for p, _ in images], object), np.array([number[g] for _, g in images], np.int64))
        for split, images in ((s, sorted(i)) for s, i in sorted(found.items()))
    }
