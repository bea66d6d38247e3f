"""Which examples are seen, and in which order: slices, subsets, the batches of a seed and step; padding the last."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from mto_jax.errors import UserError

_SPLIT = re.compile(r'(?P<name>[^\[\]]+)(\[(?P<start>(\d+%?)?):(?P<stop>(\d+%?)?)\])?')


def split_range(split: str, sizes: Mapping[str, int]) -> tuple[str, slice] | None:
    """The name and the slice that 'train', 'train[:90%]' or 'train[100:]' mean; None where `sizes` has no such name.

    Raises:
      UserError: for a percentage above 100.
    """
    found = _SPLIT.fullmatch(split)
    if not found or found['name'] not in sizes:
        return None
    if over := [t for t in (found['start'], found['stop']) if t and t.endswith('%') and float(t[:-1]) > 100]:
        raise UserError(f'data: the split {split!r} goes to {over[0]}; it must be at most 100%')
    total = sizes[found['name']]

    def position(text, default):
        if not text:
            return default
        return round(float(text[:-1]) / 100 * total) if text.endswith('%') else int(text)

    return found['name'], slice(position(found['start'], 0), position(found['stop'], total))


def stratified(labels: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random order of the examples, int64 (n,), of which every slice has the classes in proportion.

    It depends on the labels alone.

    Args:
      labels: int (n,); all the same where there are none.
    """
    rng = np.random.default_rng(0)
    by_class = np.argsort(labels, kind='stable')
    _, starts = np.unique(labels[by_class], return_index=True)
    # Each class is spread evenly over [0, 1), from an offset of its own: rare classes do not all fall into one slice.
    offsets = (rng.permutation(len(starts)) + 0.5) / len(starts)
    place = np.empty(len(labels))
    for members, offset in zip(np.split(by_class, starts[1:]), offsets, strict=False):  # of nothing, one empty part
        place[members] = (rng.permutation(len(members)) + offset) / len(members)
    return np.argsort(place, kind='stable')


def subset(num_examples: int, count: int, seed: int = 0) -> np.ndarray:
    """Positions of a pseudo-random subset of at most `count` examples, int64, ascending."""
    return np.sort(np.random.default_rng([seed, num_examples]).permutation(num_examples)[:count])


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Full batches in an epoch.

    Raises:
      UserError: if there is none.
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(f'batch_size is {batch_size}; it must be 1 to {num_examples}, the training examples')
    return num_examples // batch_size


def batch_positions(num_examples: int, batch_size: int, seed: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """Positions of the examples of steps `start` to `stop` - 1, int64 (batch_size,) each.

    An epoch is the full batches of a permutation of its own; the few examples left over come back in other epochs.
    """
    per_epoch, order, epoch = steps_per_epoch(num_examples, batch_size), None, None
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        offset = step % per_epoch * batch_size
        yield order[offset : offset + batch_size]


def padded(batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """A batch of at most `size` examples padded with zeros to `size`; 'valid', bool (size,), says which are real."""
    count = len(batch['label'])
    out = {k: np.pad(v, ((0, size - count), *[(0, 0)] * (v.ndim - 1))) for k, v in batch.items()}
    return out | {'valid': np.arange(size) < count}
