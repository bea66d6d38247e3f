"""The study of configs/study_mto.py on a second data set, in colour: 6,130 cliparts of 12 subjects, in five folds.

    python data/make_openclipart.py --source=/usr/share/openclipart/png    # Debian's package openclipart-png; minutes
    python -m mto_jax.studies --config=configs/study_openclipart.py:simmim,0 --workdir=DIR    # or mae; folds 0 to 4

Fold 0 is the test, the other four are trained on; with one DIR for all folds, its table has one seed per fold.
Accuracies are balanced over the subjects, and fine-tuning has all labels: a tenth of them would be 40 images per
subject. Rates and weights are those of Fashion-MNIST.
"""

from configs import study_mto

FOLDS = ('0', '1', '2', '3', '4')


def get_config(argument: str):
    """The study of a method, 'simmim' or 'mae', tested on one fold: 'simmim,0'."""
    method, _, fold = argument.partition(',')
    if method not in ('simmim', 'mae') or fold not in FOLDS:
        raise ValueError(f'the argument is {argument!r}; it must be simmim or mae, a comma, and a fold from 0 to 4')
    c = study_mto.main(study_mto.regime(method))
    d = c.data
    d.data_dir = 'data/openclipart.npz'
    d.train_split, d.test_split = '+'.join(f'fold{f}' for f in FOLDS if f != fold), f'fold{fold}'
    d.val_split = d.test_split
    d.image_size, d.channels, d.num_classes = (32, 32), 3, 12
    d.mean, d.std = (0.767, 0.745, 0.712), (0.325, 0.330, 0.360)
    c.epochs, c.optim.warmup_epochs = 40.0, 4.0
    c.study.budgets, c.study.seeds = (10.0, 20.0, 40.0), (10 + int(fold),)
    c.eval.balanced, c.eval.knn_k, c.finetune.label_share = True, (5,), 1.0
    return c
