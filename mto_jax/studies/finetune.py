"""Plain fine-tuning on a share of the labels, in memory: AdamW with layer decay, flips, nothing else."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mto_jax.data import augment, memory, order
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.methods import Method
from mto_jax.runtime import parallel
from mto_jax.training import feed, job, schedules, train_state
from mto_jax.training.loop import fit


def subset(num_examples: int, share: float, seed: int) -> np.ndarray:
    """Positions of the labelled examples: a random share of them, int64, ascending."""
    count = max(1, round(share * num_examples))
    return order.subset(num_examples, count, seed)


def steps(c, num_examples: int) -> tuple[int, int, int, int]:
    """Labelled examples, batch size, total steps and steps per epoch of the fine-tuning that `c` describes.

    Args:
      c: `config.finetune`.
      num_examples: of the training split.

    Raises:
      UserError: if its warm-up is not shorter than it.
    """
    count = len(subset(num_examples, c.label_share, 0))
    batch_size = min(c.batch_size, count)
    per_epoch = order.steps_per_epoch(count, batch_size)
    total = schedules.to_steps(c.epochs, per_epoch)
    try:
        schedules.learning_rate(c.optim, batch_size, total, per_epoch)
    except UserError as e:
        raise UserError(f'finetune.{e}') from None
    return count, batch_size, total, per_epoch


@dataclasses.dataclass(frozen=True)
class Classification:
    """An objective for `train_state.make_train_step`: a linear head on the mean of the patch tokens, and the encoder.

    Attributes:
      method: whose encoder it is.
      num_classes: of the head.
      mean, std: of the pixels in [0, 1], per channel.
      flip: mirror images at random.
    """

    method: Method
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    flip: bool
    constants = {}  # noqa: RUF012

    @property
    def tensor_axes(self):
        return self.method.tensor_axes

    def init(self, key):
        encoder_key, head_key = jax.random.split(key)
        kernel = 0.01 * jax.random.normal(head_key, (self.method.arch.width, self.num_classes))
        head = {'kernel': kernel, 'bias': jnp.zeros(self.num_classes)}
        return {'encoder': self.method.init(encoder_key)[0]['encoder'], 'head': head}, {}

    def logits(self, params, images: jax.Array, **how) -> jax.Array:
        """Float32 (B, classes) of uint8 images; `how` as for `Method.encode`."""
        images = augment.normalize(images, self.mean, self.std)
        tokens = self.method.encode(params, images, **how)[:, self.method.arch.num_prefix :]
        return tokens.astype(jnp.float32).mean(1) @ params['head']['kernel'] + params['head']['bias']

    def loss(self, params, model_state, constants, batch, key, clock):
        del model_state, constants, clock
        flip_key, key = jax.random.split(key)
        images = augment.random_flip(flip_key, batch['image']) if self.flip else batch['image']
        logits = self.logits(params, images, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean(), ({}, {})

    def after_update(self, params, model_state, statistics, clock):
        del params, statistics, clock
        return model_state


def accuracies(
    method: Method,
    params,
    seeds: Sequence[int],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    config,
) -> list[float]:
    """Test accuracy of each seed after fine-tuning its encoder on `config.finetune.label_share` of the labels.

    The labelled images, their order and the head's start depend on the seed alone.

    Args:
      params: of the method, with a leading axis of seeds.
      train, test: uint8 images (n, H, W, C) and int32 labels (n,).
    """
    c, data = config.finetune, config.data
    count, batch_size, total, per_epoch = steps(c, len(train[0]))
    objective = Classification(method, data.num_classes, tuple(data.mean), tuple(data.std), data.flip)
    shapes = {
        'image': jax.ShapeDtypeStruct((batch_size, *train[0].shape[1:]), np.uint8),
        'label': jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    training = job.assemble(objective, c.optim, batch_size, total, per_epoch, shapes)

    @jax.jit
    def begin(encoder, seed):
        head = objective.init(train_state.stream(seed, 'head'))[0]['head']
        return train_state.begin({'encoder': encoder, 'head': head}, {}, training.tx)

    def positions(seed, start, stop):
        chosen = subset(len(train[0]), c.label_share, seed)
        return (chosen[b] for b in order.batch_positions(count, batch_size, seed, start, stop))

    states = feed.stack([begin(feed.take(params['encoder'], i), s) for i, s in enumerate(seeds)])
    resident = feed.Resident(training, {'image': train[0], 'label': train[1]}, seeds, positions, 'finetune')
    states = fit(resident, states, 0, total)

    mesh, guess, out = parallel.make_mesh(1), jax.jit(objective.logits), []
    for i in range(len(seeds)):
        batches = memory.batches(*test, config.eval.batch_size)
        logits, labels = features.extract(guess, feed.take(states.params, i), batches, mesh)
        out.append(float((logits.argmax(1) == labels).mean()))
    return out
