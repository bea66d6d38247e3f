"""Where examples come from: TFDS data sets, by name or from a prepared directory, and plain folders (`folder.py`).

All yield undecoded examples. A folder and ArrayRecord give random access, so the order of an epoch is an
exact permutation; TFRecord is read in a seeded shuffle (of files, then of a buffer) and resumed by skipping records.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from mto_jax.data import folder
from mto_jax.data.order import subset
from mto_jax.errors import UserError
from mto_jax.runtime.log import say
from mto_jax.runtime.parallel import Part

# TensorFlow feeds the host pipeline only; the accelerator is jax's.
tf.config.set_visible_devices([], 'GPU')

LOOKED_AT = 64  # labels of a split, where they are checked
OTHER_FILES = 512  # that a process has open, at most

IMAGENET_STEPS = """\
ImageNet has to be prepared once (about 300 GB of disk while it runs, 150 GB after):
  1. Download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download-images
     into {data_dir}/downloads/manual
  2. python -c "import tensorflow_datasets as tfds; tfds.builder('imagenet2012', data_dir='{data_dir}', \
file_format='array_record').download_and_prepare()"
  3. Start again with --config.data.data_dir={data_dir}
To try the project without ImageNet: python main.py --config=configs/quickstart.py"""


class Source(Protocol):
    """One split of a data set, as undecoded examples; once `read`: {'image': bytes, 'label': int64 (-1 without labels),
    'name': str}, and 'mask': bytes where label maps were asked for.

    Attributes:
      num_examples: how many there are.
      num_classes: of their labels: 0 without labels, None where it is not known.
      unlabelled: why there are no labels, in words; '' where there are.
      random_access: whether they can be read in any order; without, `shuffled` reads them.
    """

    num_examples: int
    num_classes: int | None
    unlabelled: str
    random_access: bool

    def order(self, part: Part) -> str:
        """What the order of examples depends on besides the seed, as text for a checkpoint."""

    @property
    def contents(self) -> str:
        """What tells its examples and labels from other ones, wherever they lie, as text for a checkpoint."""

    def stream(self, positions: Iterable[np.ndarray]) -> tf.data.Dataset:
        """Examples at the given positions, one array of them at a time. Random access only."""

    def read(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """An example whose files are read, where it has names of files until then; fails for one that cannot be."""

    def select(self, positions: Sequence[np.ndarray]) -> tf.data.Dataset:
        """The examples at ascending positions in the order of the files, given as several arrays."""


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A split of a TFDS data set."""

    builder: tfds.core.DatasetBuilder
    split: str
    shuffle_buffer: int
    mask: str = ''  # the feature that is a label map

    @property
    def num_examples(self) -> int:
        return self.builder.info.splits[self.split].num_examples

    @property
    def num_classes(self) -> int | None:
        return 0 if self.unlabelled else getattr(self.builder.info.features['label'], 'num_classes', None)

    @property
    def unlabelled(self) -> str:
        features = self.builder.info.features
        if 'label' not in features:
            return f'{self.builder.name} has no feature "label"; it has {", ".join(features)}'
        kind = features['label']
        if isinstance(kind, tfds.features.Text) or kind.shape != () or not np.issubdtype(kind.np_dtype, np.integer):
            return f'the feature "label" of {self.builder.name} is {kind!r}; it must be one integer per image'
        return ''

    @property
    def random_access(self) -> bool:
        return self.builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD

    def order(self, part: Part) -> str:
        return 'random access' if self.random_access else f'sequential, in {part.shares} share(s)'

    @property
    def contents(self) -> str:
        info = self.builder.info
        size = sum(split.num_bytes for split in info.splits.values())
        return f'{self.num_examples} examples of {info.full_name}, {size} bytes'

    def stream(self, positions: Iterable[np.ndarray]) -> tf.data.Dataset:
        def read():
            # Opened here: TensorFlow never forgets this function, and what it holds would stay open.
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            records = self.builder.as_data_source(self.split, deserialize_method=raw)
            for indices in positions:
                yield indices, np.array(records.__getitems__(indices.tolist()), object)

        spec = tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.string)
        return tf.data.Dataset.from_generator(read, output_signature=spec).unbatch().map(self._parse)

    def shuffled(self, seed: int, epoch: int, skip: int, part: Part) -> tf.data.Dataset:
        """An epoch of a sequential format in a seeded order, without its first `skip` examples.

        Of several shares each holds examples of its own, as many as the others; a few may be left out of all.
        """
        state = int(np.random.default_rng([seed, epoch]).integers(2**31))
        config = tfds.ReadConfig(shuffle_seed=state, try_autocache=False, enable_ordering_guard=False, add_tfds_id=True)
        config.options.deterministic = True
        split = self.split
        if part.shares > 1:
            split = tfds.even_splits(split, part.shares, drop_remainder=True)[part.share]
        ds = self.builder.as_dataset(split, shuffle_files=True, read_config=config, decoders=self._undecoded)
        ds = ds.shuffle(self.shuffle_buffer, seed=state, reshuffle_each_iteration=False).skip(skip)
        return ds.map(lambda e: self._select(e, e['tfds_id']))

    def read(self, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return example

    def select(self, positions: Sequence[np.ndarray]) -> tf.data.Dataset:
        if self.random_access:
            return self.stream(p for p in positions if len(p))
        keep = np.zeros(self.num_examples, bool)
        for p in positions:
            keep[p] = True
        keep = tf.constant(keep)
        config = tfds.ReadConfig(try_autocache=False)
        config.options.deterministic = True
        ds = self.builder.as_dataset(self.split, shuffle_files=False, read_config=config, decoders=self._undecoded)
        return ds.enumerate().filter(lambda i, _: keep[i]).map(lambda i, e: self._select(e, self._name(i)))

    @property
    def _undecoded(self):
        return {name: tfds.decode.SkipDecoding() for name in ('image', self.mask) if name}

    def _name(self, position):
        return tf.strings.join([f'example {self.split}[', tf.strings.as_string(position), ']'])

    def _parse(self, position, serialized):
        features = self.builder.info.features
        return self._select(features.deserialize_example(serialized, decoders=self._undecoded), self._name(position))

    def _select(self, example, name):
        label = tf.constant(-1, tf.int64) if self.unlabelled else example['label']
        mask = {'mask': example[self.mask]} if self.mask else {}
        return {'image': example['image'], 'label': tf.cast(label, tf.int64), 'name': name} | mask


def open_source(data, split: str) -> Source:
    """Open one split of the data set that `config.data` names.

    Raises:
      UserError: if the data set or the split is missing or has no images, saying how to get it; for a number of
        channels that no image is decoded to.
    """
    if data.channels not in (1, 3, 4):
        raise UserError(f'data.channels is {data.channels}; images are decoded to one of 1, 3 or 4 channels')
    if data.name == folder.NAME:
        return folder.open_folder(data.data_dir, split, data.train_split, data.mask)
    source = _open_tfds(data, split)
    if data.on_error == 'replace' and not source.random_access:
        raise UserError(
            f"data.on_error is 'replace', which needs random access, and {source.builder.name} is stored as "
            f'{source.builder.info.file_format.value}: prepare it as array_record, or set data.on_error=raise'
        )
    return source


def require_labels(data, task: str, train: str, *splits: str) -> None:
    """Look at a few labels of the splits that `task` learns from and is measured by.

    Args:
      task: in words, for the message: 'kNN (eval.every_epochs)'.
      train: the split it learns from.
      splits: those it is measured by.

    Raises:
      UserError: naming the split that has no labels, more classes than `data.num_classes`, or, of a folder, a class
        that the training split lacks.
    """
    known = None
    for split in (train, *splits):
        source = open_source(data, split)
        why = source.unlabelled
        if not why:
            count = min(LOOKED_AT, source.num_examples)
            # A sequential format would be read to its end for those anywhere.
            where = subset(source.num_examples, count) if source.random_access else np.arange(count)
            found = [int(e['label']) for e in source.select([where]).take(count).as_numpy_iterator()]
            why = f'the label of an image is {min(found)}' if min(found) < 0 else ''
        if why:
            raise UserError(
                f'data: the split {split!r} has no labels, which {task} needs: {why}. Name a labelled one with '
                '--config.data.train_split, val_split and test_split'
            )
        classes = source.num_classes or max(found) + 1
        if classes > data.num_classes:
            raise UserError(
                f'data.num_classes is {data.num_classes}; {split} has {classes} classes: set '
                f'--config.data.num_classes={classes}'
            )
        if source.num_classes and split == train and classes < data.num_classes:
            say(
                f'data.num_classes is {data.num_classes}; {split} has {classes} classes, and the others are never '
                f'seen: --config.data.num_classes={classes} leaves them out'
            )
        there = getattr(source, 'classes', frozenset())
        known = there if known is None else known
        if lacking := sorted(there - known):
            more = f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''
            raise UserError(
                f'data: the split {split!r} has classes that {train!r} lacks: {", ".join(lacking[:5])}{more}. A class '
                'is a folder in a split, <split>/<class>/*.jpg, of one name in all of them'
            )


def require_known(labels: np.ndarray, data) -> None:
    """Raises UserError where a label, int (n,), that is to be learned or counted is not one of `data.num_classes`."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < data.num_classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(
            f'data.num_classes is {data.num_classes}, and an image has the label {wrong}; labels must be 0 to '
            f'{data.num_classes - 1}: name a labelled split, or set --config.data.num_classes'
        )


def _open_tfds(data, split: str) -> Tfds:
    builder = _builder(data)
    splits = builder.info.splits
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as e:
        why = f' ({" ".join(str(e).split())})' if isinstance(e, ValueError) else ''  # a part that it has not
        raise UserError(
            f'data: {builder.name} has no split {split!r}{why}; it has {", ".join(splits) or "none"}'
        ) from None
    if count <= 0:
        raise UserError(f'data: the split {split!r} of {builder.name} is empty')
    if 'image' not in builder.info.features:
        raise UserError(f'data: {builder.name} has no feature "image"; it has {", ".join(builder.info.features)}')
    images = {n: f for n, f in builder.info.features.items() if isinstance(f, tfds.features.Image)}
    kind = builder.info.features['image']
    if 'image' not in images or kind.np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f'data: the feature "image" of {builder.name} is {kind!r}; it must be a tfds.features.Image of uint8 or '
            'uint16, which is stored as JPEG or PNG: prepare the data set with that'
        )
    maps = [name for name, f in images.items() if f.np_dtype == np.uint8 and name != 'image']
    if data.mask and data.mask not in maps:
        raise UserError(
            f'data.mask is {data.mask!r}; the label maps of {builder.name} are {", ".join(maps) or "none"} '
            f'(features that are images of uint8; it has {", ".join(builder.info.features)})'
        )
    source = Tfds(builder, split, data.shuffle_buffer, data.mask)
    _require_files(source)
    return source


def _require_files(source: Tfds) -> None:
    """Raise this process's limit of open files to what the system allows; ArrayRecord keeps all files of a split open.

    Raises:
      UserError: where that is not enough.
    """
    if not source.random_access:
        return
    import resource  # not on Windows, where there is no ArrayRecord

    count = source.builder.info.splits[source.split].num_shards
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * count + OTHER_FILES  # a training and its evaluations read several splits at a time
    if soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < count + OTHER_FILES:
        raise UserError(
            f'data: {source.split!r} of {source.builder.name} has {count} files, which are open at the same time, and '
            f'this process may open {allowed}: raise the limit, ulimit -n {wanted}'
        )


def _builder(data) -> tfds.core.DatasetBuilder:
    if data.data_dir and '://' not in data.data_dir and not Path(data.data_dir).expanduser().is_dir():
        raise UserError(
            f'data.data_dir is {data.data_dir!r}: no such folder, relative to {Path.cwd()}; run from the folder '
            'that it is relative to, or give the absolute path'
        )
    if not data.name:
        if not (Path(data.data_dir) / 'dataset_info.json').exists() and '://' not in data.data_dir:
            raise UserError(
                f'data.data_dir is {data.data_dir!r}: no dataset_info.json there; give the folder of one prepared '
                'version, like .../my_data/1.0.0, or a data set name in data.name'
            )
        return tfds.builder_from_directory(data.data_dir)
    try:
        builder = tfds.builder(data.name, data_dir=data.data_dir or None, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f'data.name is {data.name!r}: TFDS knows no data set of that name, and none is prepared in '
            f'{data.data_dir or "~/tensorflow_datasets"}'
        ) from None
    if not builder.is_prepared():
        root = data.data_dir or '~/tensorflow_datasets'
        if data.name.startswith('imagenet2012'):
            steps = IMAGENET_STEPS.format(data_dir=root)
        else:
            steps = f"Prepare it with tfds.builder({data.name!r}, data_dir='{root}').download_and_prepare()"
        raise UserError(f'data: {data.name} is not prepared under {root}.\n{steps}')
    return builder
