"""A pilot of longer studies on one GPU: ten epochs where configs/study_simmim.py has one, five seeds in one dispatch.

    python -m mto_jax.studies --config=configs/study_gpu.py:simmim
    python -m mto_jax.studies --config=configs/study_gpu.py:mae

The baseline, `tuned` (the fields that configs/simmim_mto.py and configs/mae_mto.py ship) and `full` (all four parts of
MTO), each with schedules of five and of ten epochs, fine-tuned on a tenth of the labels at the end. A pilot: neither
the rates nor the weights were tuned for ten epochs.
"""

from configs import study_mae, study_simmim
from configs.study_simmim import confirming, mto, with_rate

# Selective recalibration of visible rows, and the three losses.
FULL = {'recalibration': 'adaptive', 'w_spa': 1.0, 'w_e': 0.1, 'w_r': 1.0, 'initial_blocks': 1}


def get_config(method: str):
    """The pilot of a method, 'simmim' or 'mae'."""
    if method not in ('simmim', 'mae'):
        raise ValueError(f'method is {method!r}; it must be simmim or mae')
    if method == 'simmim':
        c, tuned = with_rate(study_simmim.prototype(), 4e-3), mto(w_spa=3.0)
        c.optim.b2 = 0.95
    else:
        c, tuned = study_mae.prototype(), mto(recalibration='ramp', rows='all')
        c.mask_ratio = 0.6
    c = confirming(c)
    c.epochs, c.optim.warmup_epochs = 10.0, 1.0
    c.study.budgets, c.study.evaluations, c.study.seeds_at_once = (5.0, 10.0), 2, 5
    c.study.variants = {'baseline': {}, 'tuned': tuned, 'full': mto(**FULL)}
    return c
