"""MTO closer to convergence: epochs of Fashion-MNIST, judged by fine-tuning on a tenth of the labels.

    python -m mto_jax.studies --config=configs/study_mto.py:simmim,pilot    # or mae

Stages: `pilot` (the baseline alone, which chooses the regime, on validation images).
"""

from configs import study_mae, study_simmim
from configs.study_simmim import confirming, with_rate

BUDGETS = (1.0, 2.0, 4.0)  # E/4, E/2 and E, in epochs


def regime(method: str):
    """The small model of a method, with E epochs and the fine-tuning that judges it."""
    if method == 'simmim':
        c = with_rate(study_simmim.prototype(), 4e-3)
        c.optim.b2 = 0.95
    else:
        c = study_mae.prototype()
        c.mask_ratio = 0.6
    c = confirming(c)
    c.epochs, c.optim.warmup_epochs = BUDGETS[-1], 0.1 * BUDGETS[-1]
    c.study.budgets = BUDGETS
    return c


def pilot(c):
    c.study.variants = {'baseline': {}}
    c.study.split, c.study.seeds, c.study.seeds_at_once, c.study.evaluations = 'val', (0, 1, 2), 3, 4
    return c


STAGES = {'pilot': pilot}


def get_config(argument: str):
    method, _, stage = argument.partition(',')
    if method not in ('simmim', 'mae') or stage not in STAGES:
        raise ValueError(f'the argument is {argument!r}; it must be simmim or mae, a comma, and {", ".join(STAGES)}')
    return STAGES[stage](regime(method))
