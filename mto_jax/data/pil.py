"""Single images, from files or memory, prepared as `pipeline.eval_image` prepares those of a data set: without
TensorFlow.

The sizes, crops and the resize are the pipeline's. PIL decodes JPEGs with another transform than TensorFlow, so their
values differ by about one grey level on average (tests/data/test_pil.py has the bounds). A colour PNG for a model of
grey images differs by more: libpng, which the pipeline uses, weighs the colours differently.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mto_jax.errors import UserError

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # of PIL, by number of channels


def prepare(image: Any, data, name: str = 'image') -> np.ndarray:
    """One image as `config.data` says, uint8 (height, width, channels).

    Args:
      image: a path, a PIL image, or a uint8 array (h, w, channels), of any size. An array that is already of
        `data.image_size` is taken as it is.
      name: of the image, for errors.

    Raises:
      UserError: for a file that cannot be decoded, more than 8 bits per channel, or an array of another dtype or shape.
    """
    if isinstance(image, str | os.PathLike):
        return _cropped(_decoded(image, data.channels), data)
    if isinstance(image, Image.Image):
        return _cropped(_converted(image, data.channels, name), data)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != data.channels:
        raise UserError(
            f'{name} is {pixels.dtype} {pixels.shape}; it must be a path, a PIL image or a uint8 array (height, width, '
            f'{data.channels}) with values from 0 to 255'
        )
    return pixels if pixels.shape[:2] == tuple(data.image_size) else _cropped(pixels, data)


def _decoded(path, channels) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return _converted(file, channels, path)
    except UserError:
        raise
    except Exception as e:  # PIL raises several kinds for missing, foreign, truncated and huge files
        raise UserError(f'cannot decode {path}: {e}') from e


def _converted(image: Image.Image, channels: int, name) -> np.ndarray:
    if image.mode.startswith(('I', 'F')):
        raise UserError(f'{name} has mode {image.mode}, more than 8 bits per channel; convert it to 8 bits')
    if channels not in MODES:
        raise UserError(f'the model reads {channels} channels, which no image file has; give it uint8 arrays')
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def _cropped(pixels: np.ndarray, data) -> np.ndarray:
    """As `pipeline.eval_image`: scaled to keep the aspect, then centre-cropped; without `eval_resize` only resized."""
    height, width = data.image_size
    if not data.eval_resize:
        return resize(pixels, (height, width))
    shape = np.array(pixels.shape[:2], np.float32)
    scale = max(np.float32(data.eval_resize) / shape.min(), (np.array([height, width], np.float32) / shape).max())
    size = np.round(shape * scale).astype(int)
    y, x = (size - (height, width)) // 2
    return resize(pixels, size)[y : y + height, x : x + width]


def resize(pixels: np.ndarray, size: Sequence[int], method: str = 'bicubic') -> np.ndarray:
    """Antialiased: uint8 (h, w, channels), of any number of channels, to uint8 (*size, channels).

    Args:
      method: 'bicubic' or 'bilinear'.
    """
    shape, method = (int(size[1]), int(size[0])), getattr(Image.Resampling, method.upper())
    if pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize(shape, method))
    bands = [Image.fromarray(band).resize(shape, method) for band in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(band) for band in bands], -1)
