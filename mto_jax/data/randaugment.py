"""RandAugment (arXiv 1909.13719) on the host, with PIL: timm's `rand-m<magnitude>-mstd<spread>-inc1`.

Two operations are drawn per image, each takes place with probability one half and a magnitude of its own, out of 10; a
larger one always changes more (`inc1`).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mto_jax.errors import UserError

LAYERS, PROB, MOST = 2, 0.5, 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """What `config.data.randaugment` says.

    Attributes:
      magnitude, spread: mean and standard deviation of the magnitudes, from 0 to 10.
      fill: of what an operation moves into the image, 0 to 255 per channel.
      resample: of rotations, shears and translations: bicubic, bilinear.
    """

    magnitude: float
    spread: float
    fill: Sequence[int]
    resample: str

    def __call__(self, image: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """A changed copy of a uint8 image (H, W, C) with one or three channels; `seed` decides how."""
        rng = np.random.default_rng(np.asarray(seed, np.int64).view(np.uint64))
        out = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        for name in rng.choice(list(OPERATIONS), LAYERS):
            if rng.random() < PROB:
                level = float(np.clip(rng.normal(self.magnitude, self.spread), 0, MOST)) / MOST
                out = self.apply(out, name, level, -1 if rng.random() < 0.5 else 1)
        return np.asarray(out, np.uint8).reshape(image.shape)

    def apply(self, image: Image.Image, name: str, level: float, sign: int) -> Image.Image:
        """One operation, at a level in [0, 1]; `sign` is 1 or -1, where it has two directions."""
        return OPERATIONS[name](self, image, level, sign)

    def affine(self, image, *matrix) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **self.moving())

    def moving(self):
        fill = tuple(self.fill) if len(self.fill) > 1 else self.fill[0]
        return {'resample': Image.Resampling[self.resample.upper()], 'fillcolor': fill}


def _enhance(kind) -> Callable:
    def operation(settings, image, level, sign):
        del settings
        return kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))

    return operation


def _brighten_dark(image: Image.Image, amount: int) -> Image.Image:
    """SolarizeAdd: values below 128 plus an amount."""
    return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * len(image.getbands()))


def _keep_bits(image: Image.Image, bits: int) -> Image.Image:
    """Posterize: the highest bits of each value; 0 leaves a black image, which ImageOps.posterize may refuse."""
    return image.point([v & (256 - (1 << (8 - bits))) for v in range(256)] * len(image.getbands()))


# (settings, image, level in [0, 1], sign) -> image
OPERATIONS: dict[str, Callable[[RandAugment, Image.Image, float, int], Image.Image]] = {
    'AutoContrast': lambda s, x, level, sign: ImageOps.autocontrast(x),
    'Equalize': lambda s, x, level, sign: ImageOps.equalize(x),
    'Invert': lambda s, x, level, sign: ImageOps.invert(x),
    'Rotate': lambda s, x, level, sign: x.rotate(sign * 30 * level, **s.moving()),
    'PosterizeIncreasing': lambda s, x, level, sign: _keep_bits(x, 4 - int(4 * level)),
    'SolarizeIncreasing': lambda s, x, level, sign: ImageOps.solarize(x, 256 - min(256, int(256 * level))),
    'SolarizeAdd': lambda s, x, level, sign: _brighten_dark(x, min(128, int(110 * level))),
    'ColorIncreasing': _enhance(ImageEnhance.Color),
    'ContrastIncreasing': _enhance(ImageEnhance.Contrast),
    'BrightnessIncreasing': _enhance(ImageEnhance.Brightness),
    'SharpnessIncreasing': _enhance(ImageEnhance.Sharpness),
    'ShearX': lambda s, x, level, sign: s.affine(x, 1, sign * 0.3 * level, 0, 0, 1, 0),
    'ShearY': lambda s, x, level, sign: s.affine(x, 1, 0, 0, sign * 0.3 * level, 1, 0),
    'TranslateXRel': lambda s, x, level, sign: s.affine(x, 1, 0, sign * 0.45 * level * x.size[0], 0, 1, 0),
    'TranslateYRel': lambda s, x, level, sign: s.affine(x, 1, 0, 0, 0, 1, sign * 0.45 * level * x.size[1]),
}


def parse(data) -> RandAugment | None:
    """What `config.data.randaugment` says; None for ''.

    Raises:
      UserError: for another form than 'rand-m9-mstd0.5-inc1', images that have not one or three channels, or images
        that the device resizes.
    """
    text = data.randaugment
    if not text:
        return None
    found = re.fullmatch(r'rand-m(\d+(?:\.\d+)?)-mstd(\d+(?:\.\d+)?)-inc1', text)
    if not found or float(found[1]) > MOST:
        raise UserError(
            f"data.randaugment is {text!r}; it must be '' or like 'rand-m9-mstd0.5-inc1', of magnitude 0 to 10"
        )
    if data.resize == 'device':
        raise UserError(f"data.randaugment is {text!r}; it acts on resized images: set data.resize to 'host'")
    if data.channels not in (1, 3):
        raise UserError(f"data.randaugment is {text!r}; images of data.channels={data.channels} cannot have it: set ''")
    fill = [min(255, round(255 * m)) for m in data.mean]
    return RandAugment(float(found[1]), float(found[2]), fill, data.interpolation)
