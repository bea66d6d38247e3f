"""Plain fine-tuning on a share of the labels, in memory: AdamW with layer decay, flips, nothing else."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mto_jax import in_memory, optim, parallel, schedules, train_state
from mto_jax.data import augment, memory, order
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.methods import Method
from mto_jax.train_state import Meter


def subset(num_examples: int, share: float, seed: int) -> np.ndarray:
    """Positions of the labelled examples: a random share of them, int64, ascending."""
    count = max(1, round(share * num_examples))
    return order.subset(num_examples, count, seed)


def schedule(c, num_examples: int) -> tuple[int, int, int, optax.Schedule]:
    """Labelled examples, batch size, total steps and learning rate of the fine-tuning that `config.finetune` describes.

    Raises:
      UserError: if its warm-up is not shorter than it.
    """
    count = len(subset(num_examples, c.label_share, 0))
    batch_size = min(c.batch_size, count)
    per_epoch = order.steps_per_epoch(count, batch_size)
    total = schedules.to_steps(c.epochs, per_epoch)
    try:
        return count, batch_size, total, schedules.learning_rate(c.optim, batch_size, total, per_epoch)
    except UserError as e:
        raise UserError(f'finetune.{e}') from None


def accuracies(
    method: Method,
    params,
    seeds: Sequence[int],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    config,
) -> list[float]:
    """Test accuracy of each seed after fine-tuning its encoder on `config.finetune.label_share` of the labels.

    A linear head on the mean of the patch tokens is trained with the encoder. The labelled images, their order and the
    head's start depend on the seed alone.

    Args:
      params: of the method, with a leading axis of seeds.
      train, test: uint8 images (n, H, W, C) and int32 labels (n,).
    """
    c, data = config.finetune, config.data
    count, batch_size, total, rate = schedule(c, len(train[0]))
    tx = optim.adamw(c.optim, rate)

    def logits_of(p, images):
        tokens = method.apply({'params': {'encoder': p['encoder']}}, images, None, method='encode')
        return tokens[:, method.arch.num_prefix :].astype(jnp.float32).mean(1) @ p['head']['kernel'] + p['head']['bias']

    def loss_fn(p, batch, key, progress):
        images = augment.normalize(batch['image'], data.mean, data.std)
        if data.flip:
            images = augment.random_flip(key, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_of(p, images), batch['label']).mean()
        return loss, {}

    def create(encoder, seed):
        shape = (method.arch.width, data.num_classes)
        kernel = 0.01 * jax.random.normal(train_state.stream(seed, 'head'), shape)
        head = {'kernel': kernel, 'bias': jnp.zeros(data.num_classes)}
        return train_state.create({'encoder': encoder, 'head': head}, tx)

    states = in_memory.stack([create(in_memory.take(params['encoder'], i), s) for i, s in enumerate(seeds)])
    step = train_state.make_train_step(loss_fn, tx, rate, total)
    names = ('loss', 'grad_norm', 'param_norm', 'learning_rate')
    positions = []
    for s in seeds:
        chosen = subset(len(train[0]), c.label_share, s)
        positions.append([chosen[b] for b in order.batch_positions(count, batch_size, s, 0, total)])
    keys = jnp.stack([train_state.stream(s, 'finetune') for s in seeds])
    arrays = {'image': jnp.asarray(train[0]), 'label': jnp.asarray(train[1])}
    meters = in_memory.stack([Meter.empty(names) for _ in seeds])
    states, _ = in_memory.make_steps(step)(states, meters, arrays, np.array(positions, np.int32), keys)

    @jax.jit
    def guess(p, images):
        return logits_of(p, augment.normalize(images, data.mean, data.std))

    mesh = parallel.make_mesh(1)
    out = []
    for i in range(len(seeds)):
        batches = memory.batches(*test, config.eval.batch_size)
        logits, labels = features.extract(guess, in_memory.take(states.params, i), batches, mesh)
        out.append(float((logits.argmax(1) == labels).mean()))
    return out
