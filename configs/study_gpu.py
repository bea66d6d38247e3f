"""MTO far beyond the CPU studies, on one GPU: 16 epochs where configs/study_mto.py has four, ten seeds in one dispatch.

    python -m mto_jax.studies --config=configs/study_gpu.py:simmim    # or mae, bootmae, conmim

The regime, variants and test images are those of `main` in configs/study_mto.py; each run has its own schedule of 8 or
of 16 epochs. Neither the rates nor MTO's weights were tuned for so many epochs.
"""

from configs import study_mto


def get_config(method: str):
    """The study of a method."""
    c = study_mto.main(study_mto.regime(method))
    c.epochs, c.optim.warmup_epochs = 16.0, 1.6
    c.study.budgets, c.study.evaluations = (8.0, 16.0), 2
    c.study.seeds = tuple(range(10, 20))
    c.study.seeds_at_once = len(c.study.seeds)
    return c
