"""Studies of SimMIM with MTO on all of Fashion-MNIST, in memory.

    python data/make_fashion_mnist.py --source=DIR --train=60000 --test=10000 --format=npz
    python -m mto_jax.studies --config=configs/study_simmim.py:explore

Stages: `tune` (the baseline's own hyper-parameters, one factor at a time), `explore` (parts of MTO), `refine`
(the best of them on a second seed, and combined) and `halve` (the best one tuned for half the epochs) are measured on
6,000 of the training images, `confirm` on the test images. docs/exploration.md has the results.
"""

from configs import quickstart, simmim


def for_study(c):
    """Full images in memory, batches of 64, one epoch of 54,000 (843 steps), probes that cost little in comparison."""
    c.data.data_dir = 'data/fashion_mnist.npz'
    c.data.train_split, c.data.val_split, c.data.test_split = 'train[:54000]', 'train[54000:]', 'test'
    c.batch_size, c.epochs, c.optim.warmup_epochs = 64, 1.0, 0.1
    c.eval.train_examples = 10_000
    c.eval.knn_k = (20,)
    c.eval.linear_l2 = (1e-4,)
    c.study.evaluations = 1
    return c


def prototype():
    """The quickstart's small SimMIM."""
    return with_rate(for_study(quickstart.small_simmim(simmim.get_config())), 2e-3)


def with_rate(c, rate: float):
    """Set the peak learning rate itself, whatever the batch."""
    c.optim.base_lr = rate * c.optim.lr_reference / c.batch_size
    return c


def rate(c, value: float) -> dict:
    """The change that sets the peak learning rate."""
    return {'base_lr': value * (c.optim.lr_reference or c.batch_size) / c.batch_size}


def rates_and_decays(c) -> dict:
    """The baseline, and what every method's tuning starts with."""
    return {
        'baseline': {},
        'rate 5e-4': {'optim': rate(c, 5e-4)},
        'rate 1e-3': {'optim': rate(c, 1e-3)},
        'rate 4e-3': {'optim': rate(c, 4e-3)},
        'rate 8e-3': {'optim': rate(c, 8e-3)},
        'decay 1%': {'optim': {'weight_decay': 0.01}},
        'decay 15%': {'optim': {'weight_decay': 0.15}},
        'warm-up 20%': {'optim': {'warmup_epochs': 0.2}},
    }


def tune(c):
    c.study.variants = rates_and_decays(c) | {
        'ratio 40%': {'mask_ratio': 0.4},
        'ratio 50%': {'mask_ratio': 0.5},
        'ratio 75%': {'mask_ratio': 0.75},
        'ratio 50%, rate 4e-3': {'mask_ratio': 0.5, 'optim': rate(c, 4e-3)},
        'ratio 75%, rate 4e-3': {'mask_ratio': 0.75, 'optim': rate(c, 4e-3)},
        'layer scale 10%': {'model': {'layer_scale': 0.1}},
        'relative bias too': {'model': {'relative_bias': True}},
        'b2 95%': {'optim': {'b2': 0.95}},
        'no clipping': {'optim': {'clip_norm': 0.0}},
        'learned positions': {'model': {'position': 'learned'}},
        'official initialisation': {'model': {'init': 'beit'}},
        'drop path 10%': {'model': {'drop_path': 0.1}},
    }
    return c


APART = {'recalibration': 'exclude', 'exclude_blocks': 2, 'rows': 'all'}  # masked queries too read visible keys alone


def mto(**fields) -> dict:
    """The change that turns MTO on with these fields."""
    return {'mto': {'enabled': True, **fields}}


def mto_variants() -> dict:
    """One factor at a time: recalibration, each loss alone and removed, measures, guards, weights, the mask token."""
    both = {'w_e': 0.1, 'w_r': 1.0, 'initial_blocks': 1}
    return {
        'baseline': {},
        'exclude 1': mto(recalibration='exclude', exclude_blocks=1),
        'exclude 2': mto(recalibration='exclude', exclude_blocks=2),
        'exclude 3': mto(recalibration='exclude', exclude_blocks=3),
        'exclude all': mto(recalibration='exclude', exclude_blocks=-1),
        'exclude 2, all rows': mto(recalibration='exclude', exclude_blocks=2, rows='all'),
        'ramp': mto(recalibration='ramp'),
        'adaptive': mto(recalibration='adaptive'),
        'e': mto(w_e=0.1, initial_blocks=1),
        'e strong': mto(w_e=1.0, initial_blocks=1),
        'r': mto(w_r=1.0, initial_blocks=1),
        'e r': mto(**both),
        'e r, no stop': mto(**both, stop_previous=False),
        'e r, K 3': mto(**{**both, 'initial_blocks': 3}),
        'e r, margin 5%': mto(**both, margin=0.05),
        'e r, margin 10%': mto(**both, margin=0.1),
        'e r, weights x 01': mto(**{**both, 'w_e': 0.01, 'w_r': 0.1}),
        'e r, weights x 10': mto(**{**both, 'w_e': 1.0, 'w_r': 10.0}),
        'e r, e fades': mto(**both, fade=('e',)),
        'e r, per head': mto(**both, affinity='attention'),
        'e r, tokens': mto(**both, affinity='token'),
        'e r, keys stopped': mto(**both, stop_keys=True),
        'e r, scale guard': mto(**both, scale_guard=True),
        'e density': mto(w_e=0.1, measure='density', initial_blocks=1),
        'spa': mto(w_spa=0.1),
        'spa strong': mto(w_spa=1.0),
        'spa with entropy': mto(w_spa=0.1, spa_form='mass+visible_entropy'),
        'ramp, e r': mto(**both, recalibration='ramp'),
        'exclude all, e r': mto(**both, recalibration='exclude', exclude_blocks=-1),
        'far token': {'model': {'mask_token_scale': 50.0}},
        'far token, exclude all': {
            **mto(recalibration='exclude', exclude_blocks=-1),
            'model': {'mask_token_scale': 50.0},
        },
        'fixed norm': {'model': {'mask_token_norm': 8.0}},
        'token without decay': {'optim': {'decay_cls_token': False, 'decay_mask_token': False}},
        'token from zero': {'model': {'mask_token_scale': 0.0}},  # expected to fail: it starts where the data are
    }


def explore(c):
    c.optim.b2 = 0.95  # what `tune` found
    c.study.variants = mto_variants()
    return c


def refine(c):
    """The best of `explore` and of `tune` on a second seed, and combinations of the best."""
    c = explore(c)
    kept = ('baseline', 'exclude 2, all rows', 'r', 'e r, margin 5%', 'e r, e fades', 'spa strong')
    c.study.variants = {n: v for n, v in c.study.variants.items() if n in kept} | {
        'rate 8e-3': {'optim': rate(c, 8e-3)},
        'ratio 75%': {'mask_ratio': 0.75},
        'exclude all, all rows': mto(recalibration='exclude', exclude_blocks=-1, rows='all'),
        'spa stronger': mto(w_spa=3.0),
        'rate 8e-3, spa strong': {**mto(w_spa=1.0), 'optim': rate(c, 8e-3)},
        'rate 8e-3, e r, e fades': {
            **mto(w_e=0.1, w_r=1.0, initial_blocks=1, fade=('e',)),
            'optim': rate(c, 8e-3),
        },
        'spa strong, r': mto(w_spa=1.0, w_r=1.0, initial_blocks=1),
        'spa strong, exclude 2, all rows': mto(w_spa=1.0, **APART),
        'r, exclude 2, all rows': mto(w_r=1.0, initial_blocks=1, **APART),
        'far token, exclude 2, all rows': {**mto(**APART), 'model': {'mask_token_scale': 50.0}},
    }
    c.study.seeds = (0, 1)
    return c


def halve(c):
    """L_spa tuned for half the epochs: rates from 1e-3 to 8e-3, weights, clipping, mask ratios, and with exclusion."""
    c = explore(c)
    faster = {'optim': rate(c, 4e-3)}
    c.study.variants = {
        'baseline': {'optim': rate(c, 8e-3)},
        'rate 4e-3': faster,
        'spa stronger': mto(w_spa=3.0),
        'spa strong': mto(w_spa=1.0),
        'spa strongest': mto(w_spa=10.0),
        'spa stronger, rate 1e-3': {**mto(w_spa=3.0), 'optim': rate(c, 1e-3)},
        'spa stronger, rate 8e-3': {**mto(w_spa=3.0), 'optim': rate(c, 8e-3)},
        'spa strong, rate 4e-3': {**mto(w_spa=1.0), **faster},
        'spa stronger, rate 4e-3': {**mto(w_spa=3.0), **faster},
        'spa strongest, rate 4e-3': {**mto(w_spa=10.0), **faster},
        'spa stronger, rate 4e-3, no clipping': {**mto(w_spa=3.0), 'optim': faster['optim'] | {'clip_norm': 0.0}},
        'spa stronger, rate 4e-3, ratio 75%': {**mto(w_spa=3.0), **faster, 'mask_ratio': 0.75},
        'spa stronger, rate 4e-3, ratio 50%': {**mto(w_spa=3.0), **faster, 'mask_ratio': 0.5},
        'spa stronger, exclude 2, all rows, rate 4e-3': {**mto(w_spa=3.0, **APART), **faster},
        'spa stronger, exclude all, rate 4e-3': {
            **mto(w_spa=3.0, recalibration='exclude', exclude_blocks=-1),
            **faster,
        },
    }
    c.study.budgets, c.study.seeds = (0.5,), (0, 1)
    return c


def confirm(c):
    """The baseline, at its own best rate and at MTO's, against the best two of `refine`: new seeds, test images."""
    c.optim.b2 = 0.95
    slower = {'optim': rate(c, 2e-3)}
    c = with_rate(c, 8e-3)
    c.study.variants = {
        'baseline': {},
        'spa stronger': {**mto(w_spa=3.0), **slower},
        'e r, e fades': {**mto(w_e=0.1, w_r=1.0, initial_blocks=1, fade=('e',)), **slower},
        'baseline, rate 2e-3': slower,
    }
    return confirming(c)


def confirming(c):
    """Three budgets with schedules of their own, five seeds that chose nothing, test images, fine-tuning at the end."""
    c.study.budgets, c.study.seeds = (0.25, 0.5, 1.0), (10, 11, 12, 13, 14)
    c.study.split, c.study.evaluations = 'test', 4
    f = c.finetune
    f.batch_size, f.epochs, f.optim.warmup_epochs = 32, 5.0, 1.0
    f.optim.b2, f.optim.layer_decay = 0.999, 0.75
    f.optim.base_lr = 2e-3 * f.optim.lr_reference / f.batch_size
    return c


def stage(name: str, stages: dict, c):
    """The config of the stage that a config file's argument names."""
    if name not in stages:
        raise ValueError(f'unknown config argument {name!r}; it must be one of {", ".join(stages)}')
    return stages[name](c)


def get_config(argument: str):
    stages = {'tune': tune, 'explore': explore, 'refine': refine, 'halve': halve, 'confirm': confirm}
    return stage(argument, stages, prototype())
