"""A pilot of longer studies on one GPU: ten epochs where configs/study_simmim.py has one, five seeds in one dispatch.

    python -m mto_jax.studies --config=configs/study_gpu.py:simmim
    python -m mto_jax.studies --config=configs/study_gpu.py:mae

The baseline, MTO's preset `tuned`, and `full` as it was then (one initial block), each with schedules of five and of
ten epochs, fine-tuned on a tenth of the labels at the end. A pilot: neither the rates nor the weights were tuned for
ten epochs.
"""

from configs import presets, study_mae, study_simmim
from configs.study_simmim import confirming, mto, with_rate


def get_config(method: str):
    """The pilot of a method, 'simmim' or 'mae'."""
    if method not in ('simmim', 'mae'):
        raise ValueError(f'method is {method!r}; it must be simmim or mae')
    if method == 'simmim':
        c = with_rate(study_simmim.prototype(), 4e-3)
        c.optim.b2 = 0.95
    else:
        c = study_mae.prototype()
        c.mask_ratio = 0.6
    c = confirming(c)
    c.epochs, c.optim.warmup_epochs = 10.0, 1.0
    c.study.budgets, c.study.evaluations, c.study.seeds_at_once = (5.0, 10.0), 2, 5
    c.study.variants = {
        'baseline': {},
        'tuned': mto(**presets.TUNED[method]),
        'full': mto(**presets.FULL, initial_blocks=1),
    }
    return c
