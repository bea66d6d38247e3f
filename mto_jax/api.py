"""Trained models in a few lines of Python: features, classes, reconstructions, heterogeneity.

    model = api.load('runs/l')
    features = model.embed(sorted(Path('photos').glob('*.jpg')))

docs/api.md has an example of each. One device computes, in batches of `BATCH` images: any number of them compiles one
program and needs the memory of one batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mto_jax import exchange, methods
from mto_jax.config import evaluation
from mto_jax.data import augment, pil
from mto_jax.errors import UserError
from mto_jax.evals.features import FEATURES
from mto_jax.methods import encoder as encoders
from mto_jax.models import vit
from mto_jax.models.heads import pooled
from mto_jax.runtime.workdir import completed
from mto_jax.tasks import pretrained
from mto_jax.training import checkpoint, classify
from mto_jax.training.objective import Pretraining

BATCH = 64
WEIGHTS = ('student', 'teacher')

Images = np.ndarray | Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `load` returns.

    Images are a uint8 array (B, H, W, C), or a sequence of paths, PIL images and uint8 arrays (H, W, C). They may have
    any size and are resized and cropped as evaluations do it (`config.data.eval_resize`), but arrays of exactly
    `config.data.image_size` are taken as they are. Files are decoded batch by batch. What is not such an image is a
    `UserError` that names it.

    Attributes:
      config: of the run, with `data.image_size` as loaded.
      method: for images of that size.
      original: the method as it was trained.
      encoder: its parameters, a pytree of float32 arrays.
      params, model_state: everything that was trained, for the size it was trained at.
    """

    config: ConfigDict
    method: methods.Method
    original: methods.Method
    encoder: Any = dataclasses.field(repr=False)
    params: Any = dataclasses.field(repr=False)
    model_state: Any = dataclasses.field(repr=False)

    def embed(self, images: Images, depth: int | None = None, features: str = 'mean') -> np.ndarray:
        """Features of images.

        Args:
          images: see `Model`.
          depth: how many blocks to apply, from 1; None for all of them and the final norm (which a classifier that was
            fine-tuned on the mean of its tokens does not have).
          features: 'mean' of the patch tokens, 'class' for the class token, or 'tokens' for all.

        Returns:
          float32 (B, D), or (B, P + N, D) for 'tokens': P class tokens (1 or 0), then the N patches, row by row.

        Raises:
          UserError: for images as above, unknown features, a class token or a depth that the model does not have.
        """
        arch = self.method.arch
        if features not in (*FEATURES, 'tokens'):
            raise UserError(f"features is {features!r}; it must be 'mean', 'class' or 'tokens'")
        if features == 'class' and not arch.class_token:
            raise UserError("features is 'class', but the model has no class token; use 'mean' or 'tokens'")
        if depth is not None and not 1 <= depth <= arch.depth:
            raise UserError(
                f'depth is {depth}; the encoder has {arch.depth} blocks, so it must be in 1 to {arch.depth}'
            )
        if depth is None and 'norm' not in self.encoder:
            depth = arch.depth
        run = partial(_features, self.method, self._mean, self._std, depth, features, self.encoder)
        return self._apply(run, images)

    def classify(self, images: Images) -> np.ndarray:
        """Logits, float32 (B, classes), of a fine-tuned classifier.

        Raises:
          UserError: for images as above, or a model that is no classifier.
        """
        if not self._classifies:
            raise UserError(
                'the model has no classes: it was pre-trained, not fine-tuned. Fine-tune it (configs/finetune.py) and '
                'load that workdir'
            )
        objective = classify.build(self.config, self.method)
        return self._apply(partial(_logits, objective, self.params | {'encoder': self.encoder}), images)

    def reconstruct(self, images: Images, seed: int = 0) -> dict[str, np.ndarray]:
        """Pictures of what the model makes of images of which it sees a part, as during its training.

        Args:
          images: see `Model`.
          seed: of the masks.

        Returns:
          float32 (B, H, W, C) in [0, 1] by name: 'original', 'masked' (hidden patches are grey), and 'reconstruction',
          or 'matched' for ConMIM: the patches that it takes for the hidden ones.

        Raises:
          UserError: for images as above, a model without what its training reconstructed with, or one loaded for
            another image size.
        """
        pictures = [seen for seen, _ in self._diagnose('images', images, seed)]
        if not pictures[0]:
            raise self._no_decoder('pictures')
        return {name: np.concatenate([p[name] for p in pictures]) for name in pictures[0]}

    def heterogeneity(self, images: Images, seed: int = 0) -> dict[str, np.ndarray]:
        """How masked and visible tokens differ in each block that sees both: what a training's last diagnosis shows.

        The blocks are those of MAE's decoder, of the encoder for SimMIM and ConMIM, and of both decoders for BootMAE,
        whose names end in '.regressor' and '.predictor'.

        Args:
          images: see `Model`. The values are means over them.
          seed: of the masks.

        Returns:
          float32 (L,) by name, one value per block: 'het' (attention entropy), 'het_token' (token entropy), 'rho'
          (density of the masked tokens) and the others of `mto_jax.mto.diagnosis`.

        Raises:
          UserError: as `reconstruct`.
        """
        parts = list(self._diagnose('blocks', images, seed))
        if not parts[0][0]:
            raise self._no_decoder('blocks that see masked tokens')
        total = sum(count for _, count in parts)
        return {name: sum(blocks[name] * (count / total) for blocks, count in parts) for name in parts[0][0]}

    @property
    def _classifies(self) -> bool:
        return self.config.task == 'finetune'

    @property
    def _mean(self) -> tuple[float, ...]:
        return tuple(self.config.data.mean)

    @property
    def _std(self) -> tuple[float, ...]:
        return tuple(self.config.data.std)

    def _batches(self, images: Images) -> Iterator[np.ndarray]:
        """Prepared images, uint8 (at most BATCH, H, W, C)."""
        if isinstance(images, np.ndarray | jax.Array) and images.ndim != 4:
            raise UserError(f'images has shape {images.shape}; an array of them must be (B, height, width, channels)')
        if isinstance(images, str) or not hasattr(images, '__len__'):
            raise UserError(
                f'images is a {type(images).__name__}; it must be an array (B, H, W, C) or a list of images'
            )
        if not len(images):
            raise UserError('images is empty')
        for start in range(0, len(images), BATCH):
            part = enumerate(images[start : start + BATCH], start)
            yield np.stack([pil.prepare(image, self.config.data, f'images[{i}]') for i, image in part])

    def _apply(self, run: Callable[[np.ndarray], jax.Array], images: Images) -> np.ndarray:
        """`run` of all images, (B, ...). Batches are padded to a power of two: few programs, whatever their sizes."""
        out = []
        for batch in self._batches(images):
            padding = (1 << (len(batch) - 1).bit_length()) - len(batch)
            out.append(np.asarray(run(np.pad(batch, ((0, padding), *[(0, 0)] * 3))))[: len(batch)])
        return np.concatenate(out)

    def _diagnose(self, part: str, images: Images, seed: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """(`part` of `Pretraining.diagnose`, number of images) of each batch."""
        if self._classifies:
            raise self._no_decoder('decoder')
        if self.method != self.original:
            raise UserError(
                f'the model was loaded for images of {self.method.arch.image_size} but trained at '
                f'{self.original.arch.image_size}, and only its encoder fits both; load it without image_size'
            )
        objective = Pretraining(self.original, self._mean, self._std, flip=False)
        for i, batch in enumerate(self._batches(images)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            # Without padding: images in a batch may share statistics, and all count in the means.
            seen = _diagnosis(objective, part, self.params, self.model_state, batch, key)
            yield jax.device_get(seen), len(batch)

    def _no_decoder(self, what: str) -> UserError:
        kind = 'a fine-tuned classifier' if self._classifies else f'{type(self.original).__name__}, as it was loaded,'
        return UserError(f'{kind} has no {what}; load the checkpoint of a pre-training')


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _features(method, mean, std, depth, kind, encoder, images):
    tokens = method.encode({'encoder': encoder}, augment.normalize(images, mean, std), depth=depth)
    return tokens.astype(jnp.float32) if kind == 'tokens' else pooled(tokens, method.arch.num_prefix, kind)


@partial(jax.jit, static_argnums=0)
def _logits(objective, params, images):
    return objective.logits(params, augment.normalize(images, objective.mean, objective.std))


@partial(jax.jit, static_argnums=(0, 1))
def _diagnosis(objective, part, params, model_state, images, key):
    clock = methods.Clock(jnp.int32(1), 1, 1)  # the end of the training: MTO's gates as they are then
    return objective.diagnose(params, model_state, images, key, clock)[part]


def load(
    path: epath.PathLike, weights: str = 'student', image_size: int | tuple[int, int] | None = None, **hints
) -> Model:
    """The model in a checkpoint, in an export, or in a file or folder of another library's weights.

    Args:
      path: a workdir (its newest step), workdir/checkpoints/<step>, or what else `mto_jax.exchange.read` knows.
      weights: 'student', or 'teacher' for the features of a method's moving average.
      image_size: (height, width) in pixels, or one number for both; None for that of the training. What was learned per
        position is interpolated. Only `embed` and `classify` work at another size than the training's.
      **hints: for `mto_jax.exchange.read`: what such weights leave open.

    Raises:
      UserError: if nothing is there, it is damaged or of another kind, or the size does not divide into patches.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; it must be 'student' or 'teacher'")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f'image_size is {image_size!r}; it must be one number of pixels, or (height, width)')
    where = epath.Path(path)
    if not where.exists():
        raise UserError(f'path is {str(path)!r}: nothing is there; give a workdir, its checkpoints/<step>, or weights')
    if not exchange.runs.is_run(where):
        return _foreign(where, weights, size, hints)
    if hints:
        raise UserError(f'{next(iter(hints))} is given, but {path} is a checkpoint, whose own config specifies it')

    def read(reader, step):
        saved = reader.config(step)
        if saved['task'] == 'finetune':
            return _classifier(reader, step, saved, weights, size)
        return _pretrained(reader, step, saved, weights, size)

    *_, model = checkpoint.read(str(where), read, 'path')
    return model


def _pretrained(reader, step, saved, weights, size) -> Model:
    given = evaluation('knn')
    given.eval.weights, given.model.attention = weights, _attention(saved['model'].get('attention'))
    if size:
        given.data.image_size = tuple(size)
    start = pretrained.described(saved, given, reader.directory / str(step))
    params, model_state = jax.eval_shape(start.original.init, jax.random.key(0))
    params = _restored(reader, step, 'params', params)
    entries = {n: _restored(reader, step, f'{checkpoint.STATE}{n}', tree) for n, tree in model_state.items()}
    source = params if weights == 'student' else entries['teacher']
    encoder = vit.resized(source['encoder'], start.original.arch, start.method.arch)
    return Model(start.config, start.method, start.original, encoder, params, entries)


def _classifier(reader, step, saved, weights, size) -> Model:
    if weights != 'student':
        raise UserError(f'weights is {weights!r}, but {reader.workdir} is a fine-tuning, which has no teacher')
    config = completed(saved)
    config.model.attention = _attention(config.model.attention)
    # Not as it was pre-trained, whose masks and groups need not fit this batch and these images.
    method = encoders.build(config)
    # Where weights were averaged, these are what was evaluated.
    name = f'{checkpoint.STATE}ema' if config.classify.ema else 'params'
    return _sized(config, method, _restored(reader, step, name, reader.shapes(step, name)), size)


def _foreign(path, weights, size, hints) -> Model:
    if weights != 'student':
        raise UserError(f'weights is {weights!r}, but {path} is not the checkpoint of a run and has no teacher')
    found = exchange.read(path, **hints)
    config = ConfigDict(found.config.to_dict())
    config.model.attention = _attention(config.model.attention)
    if found.head:
        config.task = 'finetune'
    return _sized(config, methods.build(config), jax.device_put(found.classifier if found.head else found.params), size)


def _sized(config, original, params, size) -> Model:
    """A model without state, for images of this size."""
    try:
        arch = dataclasses.replace(original.arch, image_size=tuple(size or original.arch.image_size))
    except ValueError as e:
        raise UserError(str(e)) from None
    config.data.image_size = arch.image_size
    encoder = vit.resized(params['encoder'], original.arch, arch)
    return Model(config, dataclasses.replace(original, arch=arch), original, encoder, params, {})


def _restored(reader, step, name, shapes):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return reader.restore_item(checkpoint.abstract_like(shapes, device), step, name)


def _attention(name: str | None) -> str:
    """The attention of a training, or what fits this device."""
    return 'auto' if name in (None, 'cudnn') else name
