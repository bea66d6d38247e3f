"""A plain folder of images as a data set: `data.name='folder'`, and in `data.data_dir` one folder per split.

data_dir/train/<class>/any/depth.jpg    labels are the classes' places among those of the training split, sorted
data_dir/train/any.jpg                  no labels

With `data.mask`, another folder has a label map for each image: <data.mask>/train/<class>/any/depth.png

Links are followed; hidden files and folders (.ipynb_checkpoints) are ignored.
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from mto_jax.data.order import split_range, stratified
from mto_jax.errors import UserError
from mto_jax.runtime.log import say
from mto_jax.runtime.parallel import Part

NAME = 'folder'
SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.avif')


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split or a slice of it: sorted files, read by path; `data.sources.Source` has what the methods mean.

    Attributes:
      root: data_dir.
      paths: str (n,).
      labels: int64 (n,), -1 without classes. Classes that the training split lacks come after its own.
      masks: paths of the label maps, str (n,); None without.
      classes: names of those in the split, whatever the slice.
    """

    root: str
    paths: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    classes: frozenset[str] = frozenset()
    random_access = True

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def unlabelled(self) -> str:
        return '' if self.num_classes else 'its images lie in no class folders, <split>/<class>/*.jpg'

    @property
    def num_examples(self) -> int:
        return len(self.paths)

    def order(self, part: Part) -> str:
        del part
        return 'random access'

    @property
    def contents(self) -> str:
        lines = b'\n'.join(
            b'%d %s' % (label, os.fsencode(path.removeprefix(self.root)))
            for label, path in zip(self.labels, self.paths, strict=True)
        )
        return f'{self.num_examples} files, listing {hashlib.sha256(lines).hexdigest()[:12]}'

    def stream(self, positions: Iterable[np.ndarray]) -> tf.data.Dataset:
        files = {'image': self.paths} | ({} if self.masks is None else {'mask': self.masks})

        def entries():
            for indices in positions:
                paths = {n: np.array([os.fsencode(p) for p in f[indices]], object) for n, f in files.items()}
                yield paths | {'label': self.labels[indices], 'name': paths['image']}

        kinds = dict.fromkeys(files, tf.string) | {'label': tf.int64, 'name': tf.string}
        spec = {name: tf.TensorSpec([None], kind) for name, kind in kinds.items()}
        return tf.data.Dataset.from_generator(entries, output_signature=spec).unbatch()

    def read(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return example | {n: tf.io.read_file(example[n]) for n in ('image', 'mask') if n in example}

    def select(self, positions: Sequence[np.ndarray]) -> tf.data.Dataset:
        return self.stream(p for p in positions if len(p))


@functools.lru_cache(maxsize=8)
def open_folder(root: str, split: str, train: str = 'train', masks: str = '') -> Folder:
    """The images of one split, or of a slice of it like 'train[:90%]', sorted by path.

    Slices are of a fixed pseudo-random order with the classes in proportion (`order.stratified`), since by path the
    first images are all of one class.

    Kept, as the listing is: TensorFlow never forgets what `Folder.stream` reads from.

    Args:
      train: the split that numbers the classes, in alphabetical order; those that it lacks come after.
      masks: a folder of label maps, or ''.

    Raises:
      UserError: if the folder, the split, its images or one of their label maps are missing, a folder cannot be listed,
        or only some images lie in class folders.
    """
    splits = _listing(root)
    sizes = {name: len(s.paths) for name, s in splits.items()}
    found = split_range(split, sizes)
    if not splits:
        raise UserError(f'data: {root} holds no folders; images go into {root}/train, or into class folders there')
    if not found:
        raise UserError(
            f'data: {root} has no split {split!r}; its folders are {", ".join(splits)}. Each is a split that '
            'holds the class folders, as in train/<class>/*.jpg; --config.data.train_split, val_split and test_split '
            'name them, or slices of them: train[:90%], train[100:]'
        )
    name, part = found
    paths, places, classes, skipped = splits[name]
    first = split_range(train, sizes)
    own = splits[first[0]].classes if first else ()
    others = sorted({c for s in splits.values() for c in s.classes} - set(own))
    number = {c: i for i, c in enumerate([*own, *others])}
    labels = np.array([*(number[c] for c in classes), -1], np.int64)[places]
    chosen = np.sort(stratified(labels)[part])
    if not len(chosen):
        raise UserError(
            f'data: {split!r} of {root} holds no image ({", ".join(SUFFIXES)}); it has {skipped or "no other file"}'
        )
    if (labels == -1).any() and (labels >= 0).any():
        raise UserError(
            f'data: {root}/{name} has images both next to and inside class folders, such as '
            f'{printable(paths[labels == -1][0])}; put all of them into class folders, or none'
        )
    _announce(root, name)
    maps = _masks(root, paths[chosen], masks) if masks else None
    return Folder(root.rstrip('/'), paths[chosen], labels[chosen], maps, frozenset(classes))


def _masks(root: str, paths: np.ndarray, masks: str) -> np.ndarray:
    """The label map of each image, str (n,)."""
    root, masks = root.rstrip('/'), masks.rstrip('/')
    out = np.array([f'{masks}{p.removeprefix(root).rpartition(".")[0]}.png' for p in paths], object)
    there = {f'{folder}/{f}' for folder, files in _walk(masks) for f in files}
    if missing := [i for i, p in enumerate(out) if p not in there]:
        i = missing[0]
        raise UserError(
            f'data.mask is {masks!r}: {len(missing)} of {len(out)} images have no label map there; that of '
            f'{printable(paths[i])} must be {printable(out[i])}'
        )
    return out


class _Split(NamedTuple):
    """What lies in the folder of a split.

    Attributes:
      paths: as in `Folder`.
      places: int64 (n,), of each image's class among `classes`; -1 without.
      classes: names of those with an image, sorted.
      skipped: files that are no images, in words.
    """

    paths: np.ndarray
    places: np.ndarray
    classes: Sequence[str]
    skipped: str


@functools.lru_cache(maxsize=4)
def _listing(root: str) -> dict[str, _Split]:
    """What there is of each split. Listed once a process: a large folder takes a while."""
    if not tf.io.gfile.isdir(root):
        raise UserError(
            f"data.data_dir is {root!r}: no such folder; with data.name='folder' it is a folder that holds one folder "
            'per split: --config.data.data_dir=DIR'
        )
    root = root.rstrip('/')
    images: dict[str, list[tuple[str, str]]] = {}
    others: dict[str, dict[str, collections.Counter]] = {}
    for folder, files in _walk(root):
        split, group, *_ = *folder.removeprefix(root).strip('/').split('/'), ''
        if not split:
            continue
        here, rest = images.setdefault(split, []), others.setdefault(split, {})
        for name in files:
            if name.lower().endswith(SUFFIXES):
                here.append((f'{folder}/{name}', group))
            else:
                rest.setdefault(group, collections.Counter())[os.path.splitext(name)[1] or 'without a suffix'] += 1
    out = {}
    for split, found in sorted(images.items()):
        found.sort()
        classes = sorted({group for _, group in found if group})
        place = {'': -1} | {c: i for i, c in enumerate(classes)}
        paths, places = np.array([p for p, _ in found], object), np.array([place[g] for _, g in found], np.int64)
        out[split] = _Split(paths, places, classes, _skipped(others[split], set(classes)))
    return out


def _skipped(others: Mapping[str, collections.Counter], classes: set[str]) -> str:
    """How many files of each suffix are no images, and which folders have nothing else; '' for none."""
    total = sum(others.values(), collections.Counter())
    words = ', '.join(f'{n} {suffix}' for suffix, n in sorted(total.items()))
    without = sorted(group for group in others if group and group not in classes)
    more = f' and {len(without) - 5} more' if len(without) > 5 else ''
    return words + (f' (no image at all in {", ".join(without[:5])}{more}: no class)' if without else '')


@functools.cache
def _announce(root: str, name: str) -> None:
    """Say, once a process, what was found of a split."""
    split = _listing(root)[name]
    classes = f'{len(split.classes):,} classes' if split.classes else 'no class folders'
    skipped = f'; skipped {split.skipped}' if split.skipped else ''
    say(printable(f'data: {root}/{name}: {len(split.paths):,} images, {classes}{skipped}'))


def printable(path: str) -> str:
    """A path as it can be shown: bytes that are no UTF-8 as \\x.."""
    return os.fsencode(path).decode(errors='backslashreplace')


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `root` down, with the names of its files. Links are followed, but not into what they lie in."""
    if '://' in root:
        for folder, _, files in tf.io.gfile.walk(root):
            if not any(part.startswith('.') for part in folder.removeprefix(root).split('/')):
                yield folder.rstrip('/'), [f for f in files if not f.startswith('.')]
        return

    def visit(folder, above):
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                found = sorted(
                    (e.name, e.is_dir() if not e.is_symlink() else os.path.isdir(e.path))
                    for e in entries
                    if not e.name.startswith('.')
                )
        except OSError as e:
            raise UserError(f'data: the folder {printable(folder)} cannot be listed: {e.strerror}') from None
        place = status.st_dev, status.st_ino
        if place in above:
            return
        yield folder, [name for name, inner in found if not inner]
        for name, inner in found:
            if inner:
                yield from visit(f'{folder}/{name}', above | {place})

    if os.path.isdir(root):
        yield from visit(root.rstrip('/'), frozenset())
