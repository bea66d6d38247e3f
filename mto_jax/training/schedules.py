"""Epoch and step arithmetic, and learning-rate schedules: functions of the step, usable under jit."""

import optax

from mto_jax.errors import UserError


def to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps in a number of epochs, rounded to the nearest (halves up); the last epoch may be partial."""
    return int(epochs * steps_per_epoch + 0.5)


def learning_rate(optim, batch_size: int, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The schedule of `config.optim`: linear warm-up, then cosine to `min_lr` or steps by `decay_factor`.

    The peak is `base_lr * batch_size / lr_reference`, or `base_lr` where `lr_reference` is 0. A warm-up of W steps
    begins at step 0 with `warmup_lr`, scaled in the same way, and reaches the peak at step W, the first after it, or at
    W - 1, its last, where `warmup_inclusive` is set. The cosine begins at step W; it would reach `min_lr`, which is
    never scaled, at `total_steps`, one step after the last update.

    Raises:
      UserError: for an unknown schedule, or a warm-up that is not shorter than the training.
    """
    reference = optim.lr_reference or batch_size
    start, peak = (lr * batch_size / reference for lr in (optim.warmup_lr, optim.base_lr))
    warmup = to_steps(optim.warmup_epochs, steps_per_epoch)
    if warmup >= total_steps:
        raise UserError(
            f'optim.warmup_epochs is {optim.warmup_epochs} ({warmup} steps); it must be shorter than the training '
            f'({total_steps} steps): lower --config.optim.warmup_epochs, or raise --config.epochs'
        )
    if optim.schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, total_steps - warmup, optim.min_lr / peak if peak else 0.0)
    elif optim.schedule == 'multistep':
        bounds = {to_steps(e, steps_per_epoch) - warmup: optim.decay_factor for e in optim.decay_epochs}
        after = optax.piecewise_constant_schedule(peak, bounds)
    else:
        raise UserError(f'optim.schedule is {optim.schedule!r}; it must be cosine or multistep')
    if not warmup:
        return after
    rise = optax.linear_schedule(start, peak, warmup - optim.warmup_inclusive)
    return optax.join_schedules([rise, after], [warmup])
