"""Plain fine-tuning on a fraction of the labels, in memory: AdamW with layer decay, flips, nothing else."""

from collections.abc import Sequence

import jax
import numpy as np

from mto_jax.data import augment, memory, order
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.methods import Method
from mto_jax.runtime import parallel
from mto_jax.training import feed, job, optim, schedules, train_state
from mto_jax.training.classify import Classification
from mto_jax.training.loop import fit


def subset(num_examples: int, share: float, seed: int) -> np.ndarray:
    """Positions of the labelled examples: a random fraction of them, int64, ascending."""
    count = max(1, round(share * num_examples))
    return order.subset(num_examples, count, seed)


def steps(c, num_examples: int) -> tuple[int, int, int, int]:
    """Labelled examples, batch size, total steps and steps per epoch of the fine-tuning that `c` describes.

    Args:
      c: `config.finetune`.
      num_examples: of the training split.

    Raises:
      UserError: for an optimizer that cannot be; it names the fields as `config.finetune` has them.
    """
    count = len(subset(num_examples, c.label_share, 0))
    batch_size = min(c.batch_size, count)
    per_epoch = order.steps_per_epoch(count, batch_size)
    total = schedules.to_steps(c.epochs, per_epoch)
    try:
        optim.build(c.optim, schedules.learning_rate(c.optim, batch_size, total, per_epoch))
    except UserError as e:
        raise UserError('finetune.' + str(e).replace('--config.', '--config.finetune.')) from None
    return count, batch_size, total, per_epoch


def accuracies(
    method: Method,
    params,
    seeds: Sequence[int],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    config,
) -> list[float]:
    """Test accuracy of each seed after fine-tuning its encoder on `config.finetune.label_share` of the labels.

    The labelled images, their order and the head's start depend on the seed alone. NaN for a seed that diverged.

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
        return train_state.begin(*objective.begin(encoder, train_state.stream(seed, 'head')), training.tx)

    @jax.jit
    def guess(params, images):
        return objective.logits(params, augment.normalize(images, objective.mean, objective.std))

    def positions(seed, start, stop):
        chosen = subset(len(train[0]), c.label_share, seed)
        return (chosen[b] for b in order.batch_positions(count, batch_size, seed, start, stop))

    states = feed.stack([begin(feed.take(params['encoder'], i), np.uint32(s)) for i, s in enumerate(seeds)])
    resident = feed.Resident(training, {'image': train[0], 'label': train[1]}, seeds, positions, 'finetune')
    states = fit(resident, states, 0, total)

    mesh, out = parallel.make_mesh(1), []
    for i in range(len(seeds)):
        batches = memory.batches(*test, config.eval.batch_size)
        logits, labels = features.collect(guess, feed.take(states.params, i), batches, mesh).fetch()
        right = features.accuracy_of(logits.argmax(1), labels, config.eval.balanced)
        out.append(right if np.isfinite(logits).all() else float('nan'))
    return out
