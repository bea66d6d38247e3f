"""The host pipeline: decode and crop to uint8 batches. The batch at step t is a pure function of (data, seed, t).

An epoch is `num_examples // batch_size` full batches of a new order; the few examples left over are dropped from that
epoch and, orders being random, come back in others.
"""

import io
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from mto_jax.data import pil, randaugment
from mto_jax.data.order import batch_positions, padded, steps_per_epoch, subset
from mto_jax.data.sources import Source
from mto_jax.errors import UserError
from mto_jax.runtime.parallel import Part, whole

Batch = Mapping[str, np.ndarray]
CROP_TRIES = 10
CANVAS = 2  # sides of what the device resizes, in `data.image_size`
# What TensorFlow makes of a file that cannot be opened or decoded.
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnknownError,
)


def crop_window(height, width, seed, area, aspect) -> tf.Tensor:
    """A random window (y, x, h, w), int32 (4,), with torchvision's RandomResizedCrop rule.

    Ten attempts draw the window's fraction of the image uniformly from `area` and the logarithm of width over height
    uniformly from `aspect`; the first that fits counts, else the largest central window within `aspect`.
    """
    h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    u = tf.random.stateless_uniform([4, CROP_TRIES], seed)
    size = h * w * (area[0] + (area[1] - area[0]) * u[0])
    ratio = tf.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[1])
    ws, hs = tf.round(tf.sqrt(size * ratio)), tf.round(tf.sqrt(size / ratio))
    fits = (ws > 0) & (ws <= w) & (hs > 0) & (hs <= h)
    i = tf.argmax(fits)
    fallback_w = tf.minimum(w, tf.round(h * aspect[1]))
    fallback_h = tf.minimum(h, tf.round(w / aspect[0]))
    found = tf.reduce_any(fits)
    ch, cw = tf.where(found, hs[i], fallback_h), tf.where(found, ws[i], fallback_w)
    y = tf.where(found, tf.floor(u[2, i] * (h - ch + 1)), tf.floor((h - ch) / 2))
    x = tf.where(found, tf.floor(u[3, i] * (w - cw + 1)), tf.floor((w - cw) / 2))
    return tf.cast(tf.stack([y, x, ch, cw]), tf.int32)


def decode(encoded, channels, window=None):
    """Decode an image, uint8 (h, w, channels); of a JPEG, only the window. EXIF orientation is not applied.

    JPEG and PNG are TensorFlow's, on all threads. The rest is PIL's: TensorFlow reads BMP and GIF in few forms, and
    turns no CMYK into grey.
    """
    jpeg = tf.io.is_jpeg(encoded)
    if channels == 1:
        jpeg = tf.cond(jpeg, lambda: tf.io.extract_jpeg_shape(encoded)[2] < 4, lambda: False)

    def whole():
        image = tf.cond(
            jpeg | _is_png(encoded),
            lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
            lambda: tf.numpy_function(_decode_any, [encoded, channels], tf.uint8),
        )
        image = tf.ensure_shape(image, (None, None, channels or None))
        if window is None:
            return image
        y, x, h, w = tf.unstack(window)
        return image[y : y + h, x : x + w]

    if window is None or channels not in (1, 3):
        return whole()
    return tf.cond(jpeg, lambda: tf.io.decode_and_crop_jpeg(encoded, window, channels=channels), whole)


def _decode_any(encoded: bytes, channels: int) -> np.ndarray:
    """Decode the first frame of whatever PIL reads, uint8 (h, w, channels); 16 bits become the upper 8.

    Raises:
      ValueError: where it cannot; TensorFlow makes an InvalidArgumentError of it.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith('I;16'):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ('I', 'F'):
                raise ValueError(f'pixels of mode {image.mode}; 8 or 16 bits are read')
            mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[int(channels) or len(image.getbands())]
            pixels = np.asarray(image.convert(mode), np.uint8)
    except Exception as e:  # of broken files, PIL raises all kinds
        words = 'not an image' if isinstance(e, UnidentifiedImageError) else f'{type(e).__name__}: {e}'
        raise ValueError(words) from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _size(encoded, channels):
    """Height and width of an encoded image; those of a JPEG and a PNG are read from its header."""

    def of_others():
        return tf.cond(_is_png(encoded), of_png, lambda: tf.shape(decode(encoded, channels))[:2])

    def of_png():  # the first chunk begins with width and height, at byte 16
        return tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)[::-1]

    return tf.cond(tf.io.is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2], of_others)


def _is_png(encoded):
    """Whether it begins as a PNG does, with a whole header."""
    return (tf.strings.substr(encoded, 0, 4) == b'\x89PNG') & (tf.strings.length(encoded) >= 24)


def _resize(image, size, method='bicubic'):
    """PIL's, which is faster than TensorFlow's; 'nearest' takes values as they are."""
    if method == 'nearest':
        return tf.image.resize(image, size, method=method)
    there = tf.reduce_all(tf.shape(image)[:2] == size)  # small images often are: no call from the graph then
    resize = partial(pil.resize, method=method)
    resized = tf.cond(there, lambda: image, lambda: tf.numpy_function(resize, [image, size], tf.uint8))
    return tf.ensure_shape(resized, (None, None, image.shape[-1]))


def train_image(encoded, seed, data) -> tf.Tensor:
    """One training image, uint8 (height, width, channels), cropped as `config.data` says."""
    return _train_pixels(encoded, _window(encoded, seed, data), data, data.channels, data.interpolation)


def _window(encoded, seed, data) -> tf.Tensor | None:
    """What of a training image is taken; None for all."""
    if data.crop == 'resize':
        return None
    size = _size(encoded, data.channels)
    return crop_window(size[0], size[1], seed, data.crop_area, data.crop_aspect)


def canvas_image(encoded, seed, data) -> dict[str, tf.Tensor]:
    """One training image that the device is to resize (`augment.resize`).

    Returns:
      'image', uint8 (CANVAS * height, CANVAS * width, channels), with the crop in its upper left corner and zeros; and
      'size', int32 (2,), the crop's height and width. A crop that is larger is resized to fit.
    """
    image = decode(encoded, data.channels, _window(encoded, seed, data))
    height, width = (CANVAS * side for side in data.image_size)
    size = tf.minimum(tf.shape(image)[:2], (height, width))
    fits = tf.reduce_all(size == tf.shape(image)[:2])
    image = tf.cond(fits, lambda: image, lambda: _resize(image, size, data.interpolation))
    image = tf.pad(image, [(0, height - size[0]), (0, width - size[1]), (0, 0)])
    return {'image': tf.ensure_shape(image, (height, width, data.channels)), 'size': size}


def _train_pixels(encoded, window, data, channels, method) -> tf.Tensor:
    image = _resize(decode(encoded, channels, window), data.image_size, method)
    image.set_shape((*data.image_size, channels))
    return image


def eval_image(encoded, data) -> tf.Tensor:
    """One evaluation image, uint8 (height, width, channels): scaled to keep its aspect, then centre-cropped.

    The shorter side becomes `eval_resize`, or longer where the image would not cover `image_size`. With `eval_resize` 0
    the image is resized to `image_size` instead.
    """
    return _eval_pixels(encoded, data, data.channels, 'bicubic')


def _eval_pixels(encoded, data, channels, method) -> tf.Tensor:
    image = decode(encoded, channels)
    height, width = data.image_size
    if data.eval_resize:
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        scale = tf.maximum(data.eval_resize / tf.reduce_min(shape), tf.reduce_max((height, width) / shape))
        size = tf.cast(tf.round(shape * scale), tf.int32)
        image = _resize(image, size, method)
        y, x = (size[0] - height) // 2, (size[1] - width) // 2
        image = image[y : y + height, x : x + width]
    else:
        image = _resize(image, data.image_size, method)
    image.set_shape((height, width, channels))
    return image


def label_map(example, data, make) -> dict[str, tf.Tensor]:
    """{'mask': int32 (height, width, 1)} where the example has a label map: its labels, or -1 where none counts.

    Args:
      make: of the encoded map and its number of channels, what of it is taken, with values as they are.

    Raises:
      tf.errors.InvalidArgumentError: for a map of another size than the image, in colour, or with labels that are not
        below `data.num_classes`.
    """
    if 'mask' not in example:
        return {}
    sizes = tf.shape(decode(example['mask'], 0)), _size(example['image'], data.channels)
    same = tf.debugging.assert_equal(sizes[0][:2], sizes[1], 'the label map has another size than its image')
    grey = tf.debugging.assert_equal(sizes[0][2], 1, 'the label map has colours; it must have one channel of labels')
    # Of other depths the decoder stretches or shifts the values. It is the byte after the width and height in a PNG.
    eight = ~_is_png(example['mask']) | (tf.strings.substr(example['mask'], 24, 1) == b'\x08')
    bits = tf.debugging.assert_equal(eight, True, 'the label map must have 8 bits a pixel')
    with tf.control_dependencies([c for c in (same, grey, bits) if c is not None]):
        values = tf.cast(make(example['mask'], 1), tf.int32)
    labels = tf.where(values == data.ignore_label, -1, tf.maximum(values - data.mask_offset, -1))
    below = tf.debugging.assert_less(labels, data.num_classes, 'the label map has labels from data.num_classes up')
    with tf.control_dependencies([below] if below is not None else []):
        return {'mask': tf.identity(labels)}


def train_batches(
    source: Source, data, batch_size: int, seed: int, start: int, stop: int, part: Part | None = None
) -> Iterator[Batch]:
    """Batches of steps `start` to `stop` - 1: {'image': uint8 (rows, H, W, C), 'label': int32 (rows,)}, and with
    `data.mask` 'mask', int32 (rows, H, W, 1), -1 where no label counts. With `data.resize` = 'device' the images are
    as `canvas_image` makes them, with their 'size'.

    The same (source, seed, step) gives the same batch, wherever the iterator starts. With `part`, only this process's
    rows of it: with random access of the same global batch however many processes there are, else of one that depends
    on `part.shares`.

    Raises:
      UserError: for an image that cannot be decoded, unless `data.on_error` is 'replace': then the next in the order of
        the files that can takes its place, at this step.
    """
    part = part or whole(batch_size)
    per_epoch = steps_per_epoch(source.num_examples, batch_size)

    augment = randaugment.parse(data)

    def prepare(position, example):
        example = source.read(example)
        seed_pair = tf.stack([tf.constant(seed, tf.int64), position])
        label = {'label': tf.cast(example['label'], tf.int32)}
        if data.resize == 'device':
            return canvas_image(example['image'], seed_pair, data) | label
        image = train_image(example['image'], seed_pair, data)

        def same_crop(encoded, channels):
            window = _window(example['image'], seed_pair, data)
            return _train_pixels(encoded, window, data, channels, 'nearest')

        mask = label_map(example, data, same_crop)
        if augment:
            shape = image.shape
            image = tf.ensure_shape(tf.numpy_function(augment, [image, seed_pair], tf.uint8), shape)
        return {'image': image} | label | mask

    def rows(step):
        # Positions of this process's examples in the full run, from which their random numbers come.
        return step * batch_size + part.rows

    def chosen(step, end):
        order = batch_positions(source.num_examples, batch_size, seed, step, end)
        for t, positions in enumerate(order, step):
            mine = positions[part.rows]
            yield _replaced(mine, stand_ins.get(t, {}))

    def examples(step):
        """(position in the full run, undecoded example) from this step on, and the step where they end: that of the
        epoch's end where the format is sequential."""
        if source.random_access:
            found, end = source.stream(chosen(step, stop)), stop
        else:
            epoch, done = divmod(step, per_epoch)
            end = min(stop, (epoch + 1) * per_epoch)
            found = source.shuffled(seed, epoch, done * len(part.rows), part).take((end - step) * len(part.rows))
        steps = tf.data.Dataset.counter(tf.constant(step, tf.int64))
        return tf.data.Dataset.zip(steps.flat_map(lambda t: tf.data.Dataset.from_tensor_slices(rows(t))), found), end

    def batch_of(step):
        return examples(step)[0].take(len(part.rows))

    step, stand_ins = start, {}
    while step < stop:
        ds, end = examples(step)
        threads = data.threads or tf.data.AUTOTUNE
        ds = ds.map(prepare, num_parallel_calls=threads, deterministic=True)
        # Copying the rows of a batch next to each other takes its time too, where the device resizes.
        ds = ds.batch(len(part.rows), drop_remainder=True, num_parallel_calls=threads)
        try:
            for batch in _finish(ds, data).as_numpy_iterator():
                yield batch
                step += 1
            step = end
        except UNREADABLE as e:
            stand_ins = {
                step: _stand_ins(source, prepare, partial(batch_of, step), next(chosen(step, step + 1)), data, e)
            }


def eval_batches(source: Source, data, batch_size: int, limit: int = 0, part: Part | None = None) -> Iterator[Batch]:
    """Every example, or `limit` of them, once, in order, in batches of one size.

    The last batch is padded, and 'valid', bool (rows,), says where.

    Args:
      limit: only so many examples, a pseudo-random subset that depends on their number alone; 0 for all.
      part: this process's rows of each batch.

    Raises:
      UserError: for an image that cannot be decoded; with `data.on_error` = 'replace' it counts as not valid.
    """
    total = source.num_examples
    part = part or whole(batch_size)
    limit = min(limit or total, total)
    chosen = subset(total, limit)
    count = -(-limit // batch_size)
    # Positions in the split of this process's rows, batch by batch; the last batch may be short, or empty here.
    wanted = [chosen[r[r < limit]] for r in (b * batch_size + part.rows for b in range(count))]

    def prepare(position, example):
        del position
        example = source.read(example)
        mask = label_map(example, data, lambda encoded, channels: _eval_pixels(encoded, data, channels, 'nearest'))
        return {'image': eval_image(example['image'], data), 'label': tf.cast(example['label'], tf.int32)} | mask

    def batch_of(positions):
        return source.select([positions]).enumerate()

    done, stand_ins = 0, {}
    filled = [w for w in wanted if len(w)]
    while done < len(filled):
        first, rest = done, [_replaced(w, stand_ins.get(b, {})) for b, w in enumerate(filled[done:], done)]
        ds = source.select(rest).map(
            lambda e: prepare(None, e), num_parallel_calls=data.threads or tf.data.AUTOTUNE, deterministic=True
        )
        try:
            for batch in _finish(ds.batch(len(part.rows)), data).as_numpy_iterator():
                batch = padded(batch, len(part.rows))
                batch['valid'][list(stand_ins.get(done, ()))] = False
                yield batch
                done += 1
        except UNREADABLE as e:
            failed = rest[done - first]
            stand_ins = {done: _stand_ins(source, prepare, partial(batch_of, failed), failed, data, e)}
    if len(filled) < count:
        nothing = {
            'image': np.zeros((0, *data.image_size, data.channels), np.uint8),
            'label': np.zeros(0, np.int32),
            'mask': np.zeros((0, *data.image_size, 1), np.int32),
        }
        yield padded({n: x for n, x in nothing.items() if n != 'mask' or data.mask}, len(part.rows))


def _replaced(positions: np.ndarray, stand_ins: Mapping[int, int]) -> np.ndarray:
    """Positions of examples with those of some rows changed."""
    positions = positions.copy()
    for row, position in stand_ins.items():
        positions[row] = position
    return positions


def _stand_ins(source, prepare, examples, positions, data, error) -> dict[int, int]:
    """{row: position of what takes its place} for every row of a batch that cannot be decoded.

    Args:
      prepare: what failed for the batch, of (position in the training, example).
      examples: makes a dataset of its arguments, row by row.
      positions: of the rows' examples in the data set.
      error: what to raise where every row turns out to be fine.

    Raises:
      UserError: if `data.on_error` is 'raise', or nothing can be decoded.
    """
    out, failed = {}, np.ones(len(positions), bool)
    for row in whole_ones(examples(), prepare, data.threads):
        failed[row] = False
    failed = tf.constant(failed)
    for row, (position, example) in examples().enumerate().filter(lambda row, _: failed[row]):
        problem = problem_of(prepare, position, example)
        if not problem:
            continue
        name = name_of(example)
        if data.on_error == 'raise':
            raise UserError(
                f'data: cannot decode {name}: {problem}. --check lists all such images; '
                '--config.data.on_error=replace goes on without it'
            )
        for away in range(1, source.num_examples):
            other = (int(positions[row]) + away) % source.num_examples
            example = next(iter(source.stream([np.array([other])])))
            if not problem_of(prepare, position, example):
                break
        else:
            raise UserError(f'data: no image can be decoded; {name}: {problem}')
        out[int(row)] = other
        print(f'data: left out {name}: {problem}', file=sys.stderr, flush=True)
    if not out:
        raise error
    return out


def whole_ones(examples: tf.data.Dataset, prepare: Callable, threads: int) -> Iterator[int]:
    """The places of those examples of which `prepare(*example)` can read everything, ascending."""

    def read(place, example):
        # Every pixel is needed for what is returned, so that no decoding is optimised away.
        return place, tf.nest.map_structure(tf.reduce_max, prepare(*example))

    ds = examples.enumerate().map(read, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
    for place, _ in ds.ignore_errors().prefetch(1024).as_numpy_iterator():
        yield int(place)


def name_of(example: Mapping[str, tf.Tensor]) -> str:
    """Its name as it can be shown: bytes that are no UTF-8 as \\x.."""
    return example['name'].numpy().decode(errors='backslashreplace')


def problem_of(prepare: Callable, *args) -> str:
    """Why `prepare(*args)` cannot read its image, in a few words; '' where it can."""
    try:
        prepare(*args)
    except (*UNREADABLE, ValueError) as e:  # run eagerly, `_decode_any` raises what it raises
        words = re.sub(r'\{\{.*?\}\}|\[Op:.*', '', getattr(e, 'message', str(e)).partition('\n')[0])
        return ' '.join(words.split()).rstrip('.') or 'not an image'
    return ''


def _finish(ds: tf.data.Dataset, data) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    if data.threads:
        options.threading.private_threadpool_size = data.threads
    return ds.prefetch(2).with_options(options)


class Prefetch:
    """Keeps `depth` batches on the device ahead of the loop, and measures how long the loop waits for the host.

    Attributes:
      waited: seconds spent waiting since the last `reset`.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Mapping], depth: int = 2):
        self._batches, self._put, self._queue = batches, put, deque()
        self.waited = 0.0
        for _ in range(depth):
            self._fill()

    def _fill(self):
        start = time.perf_counter()
        batch = next(self._batches, None)
        self.waited += time.perf_counter() - start
        if batch is not None:
            self._queue.append(self._put(batch))

    def __iter__(self):
        return self

    def __next__(self):
        if not self._queue:
            raise StopIteration
        batch = self._queue.popleft()
        self._fill()
        return batch

    def reset(self) -> float:
        """Seconds waited since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited
