"""Epoch and step arithmetic, and learning-rate schedules: functions of the step, usable under jit."""

import optax

from mto_jax.errors import UserError


def to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps in a number of epochs, rounded to the nearest (halves up); the last epoch may be partial."""
    return int(epochs * steps_per_epoch + 0.5)


def evaluation_interval(every_epochs: float, steps_per_epoch: int) -> int:
    """Steps from one evaluation to the next; 0 for none.

    Raises:
      UserError: where `config.eval.every_epochs` is set, but rounds to no step.
    """
    steps = to_steps(every_epochs, steps_per_epoch)
    if every_epochs and not steps:
        raise UserError(
            f'eval.every_epochs is {every_epochs:g}, less than half a step of the {steps_per_epoch} of an epoch; it '
            f'must be at least {1 / steps_per_epoch:.2g}, which evaluates at every step, or 0 for no evaluation'
        )
    return steps


def learning_rate(optim, batch_size: int, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The schedule of `config.optim`: linear warm-up, then cosine to `min_lr` or steps by `decay_factor`.

    The peak is `base_lr * batch_size / lr_reference`, or `base_lr` where `lr_reference` is 0. A warm-up of W steps
    begins at step 0 with `warmup_lr`, scaled in the same way, and reaches the peak at step W, the first after it, or at
    W - 1, its last, where `warmup_inclusive` is set. The cosine begins at step W; where `warmup_prefix` is False, as in
    timm, at step 0, behind the warm-up. It would reach `min_lr`, which is never scaled, at `total_steps`, a step after
    the last update.

    Raises:
      UserError: for a run without steps, a warm-up that is not shorter than the training, or a rate that could not
        fall as the fields say.
    """
    reference = optim.lr_reference or batch_size
    start, peak = (lr * batch_size / reference for lr in (optim.warmup_lr, optim.base_lr))
    warmup = to_steps(optim.warmup_epochs, steps_per_epoch)
    if not total_steps:
        raise UserError(
            f'epochs is less than half a step of the {steps_per_epoch} of an epoch; it must be at least '
            f'{1 / steps_per_epoch:.2g}: raise --config.epochs'
        )
    if warmup >= total_steps:
        raise UserError(
            f'optim.warmup_epochs is {optim.warmup_epochs} ({warmup} steps); it must be shorter than the training '
            f'({total_steps} steps): lower --config.optim.warmup_epochs, or raise --config.epochs'
        )
    if optim.schedule == 'cosine':
        if optim.min_lr > peak * (1 + 1e-6) and peak:
            raise UserError(
                f'optim.min_lr is {optim.min_lr!r}; it must be at most the peak, {peak:g} (base_lr * batch_size / '
                'lr_reference): lower --config.optim.min_lr, or raise --config.optim.base_lr'
            )
        hidden = 0 if optim.warmup_prefix else warmup  # steps of the cosine that the warm-up stands for
        cosine = optax.cosine_decay_schedule(peak, total_steps - warmup + hidden, optim.min_lr / peak if peak else 0.0)

        def after(step):
            return cosine(step + hidden)

    else:  # multistep
        for name, unused in (('min_lr', 0), ('warmup_prefix', True)):
            if optim[name] != unused:
                raise UserError(
                    f'optim.{name} is {optim[name]!r}, which is of the cosine alone; with multistep it must be '
                    f'{unused!r}: set --config.optim.{name}={unused}, or --config.optim.schedule=cosine'
                )
        bounds = {to_steps(e, steps_per_epoch) - warmup: optim.decay_factor for e in optim.decay_epochs}
        epochs = total_steps / steps_per_epoch
        if beyond := [e for e in optim.decay_epochs if not warmup < to_steps(e, steps_per_epoch) < total_steps]:
            raise UserError(
                f'optim.decay_epochs has {beyond[0]:g}; it must be after the warm-up ({optim.warmup_epochs:g} epochs) '
                f'and before the end of the training ({epochs:g}), like '
                f'--config.optim.decay_epochs="({epochs * 7 / 8:g},)"; "()" is for a rate that stays'
            )
        if len(bounds) < len(optim.decay_epochs):
            raise UserError(
                f'optim.decay_epochs is {tuple(optim.decay_epochs)}; two of them fall on one of the {steps_per_epoch} '
                'steps of an epoch: put them further apart'
            )
        after = optax.piecewise_constant_schedule(peak, bounds)
    if not warmup:
        return after
    rise = optax.linear_schedule(start, peak, warmup - optim.warmup_inclusive)
    return optax.join_schedules([rise, after], [warmup])
