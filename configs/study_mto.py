"""MTO closer to convergence: epochs of Fashion-MNIST, judged by fine-tuning on a tenth of the labels.

    python -m mto_jax.studies --config=configs/study_mto.py:simmim,pilot    # mae, bootmae, conmim; see STAGES

`pilot`: the baseline alone, which chooses the regime. `rates`: its learning rate. `readings`: interpretations of MTO
that configs/study_simmim.py and configs/study_mae.py do not have. `weights`: forms of `full`. `precision`: the baseline
in bfloat16. The last four train one epoch, and all five are measured on validation images. On the test images: `main`
(baseline, `full` and `tuned`), `ablation`, `fading` and `apart`.
"""

from configs import bootmae, conmim, presets, quickstart, study_mae, study_simmim
from configs.study_simmim import confirming, for_study, mto, rate, with_rate

METHODS = ('mae', 'simmim', 'bootmae', 'conmim')
BUDGETS = (1.0, 2.0, 4.0)  # E/4, E/2 and E, in epochs
FIRST = {'recalibration': 'adaptive', 'w_spa': 1.0, 'w_e': 0.1, 'w_r': 1.0}  # `full` before `weights` chose others


def regime(method: str):
    """The small model of a method, with E epochs and the fine-tuning that judges it."""
    if method not in METHODS:
        raise ValueError(f'method is {method!r}; it must be one of {", ".join(METHODS)}')
    if method == 'simmim':
        c = with_rate(study_simmim.prototype(), 4e-3)
        c.optim.b2 = 0.95
    elif method == 'mae':
        c = study_mae.prototype()
        c.mask_ratio = 0.6
    elif method == 'bootmae':
        c = for_study(quickstart.small_bootmae(bootmae.get_config()))
    else:
        c = for_study(quickstart.small_conmim(conmim.get_config()))
        c.optim.base_lr = 2e-3
    c = confirming(c)
    c.epochs, c.optim.warmup_epochs = BUDGETS[-1], 0.1 * BUDGETS[-1]
    c.study.budgets, c.study.seeds_at_once = BUDGETS, 1  # what is fastest on a CPU
    return c


def briefly(c, seeds: tuple[int, ...]):
    """One epoch, on validation images."""
    c.study.budgets, c.study.evaluations = (1.0,), 1
    c.study.split, c.study.seeds = 'val', seeds
    return c


def pilot(c):
    c.study.variants = {'baseline': {}}
    c.study.split, c.study.seeds = 'val', (0, 1, 2)
    return c


def rates(c):
    """The baseline's peak learning rate."""
    others = {f'rate {peak}': rate(c, float(peak)) for peak in ('5e-4', '1e-3', '2e-3', '4e-3', '8e-3')}
    others = {name: {'optim': o} for name, o in others.items() if o['base_lr'] != c.optim.base_lr}
    c.study.variants = {'baseline': {}} | others
    return briefly(c, seeds=(0, 1))


def readings(c):
    """Two seeds of each; the first rows are what the others are compared with."""
    losses, full, tuned = {'w_e': 0.1, 'w_r': 1.0}, FIRST, presets.TUNED[c.method]
    c.study.variants = {
        'baseline': {},
        'full': mto(**full),
        'tuned': mto(**tuned),
        'full, K 1': mto(**full, initial_blocks=1),
        'full, e r weights x 30%': mto(**full | {'w_e': 0.03, 'w_r': 0.3}),
        'full, all terms fade': mto(**full, fade=('spa', 'e', 'r')),
        'row entropy 3%': mto(w_spa=0.03, spa_form='row_entropy'),
        'row entropy 10%, fades': mto(w_spa=0.1, spa_form='row_entropy', fade=('spa',)),
        'row entropy 10%, late blocks': mto(w_spa=0.1, spa_form='row_entropy', spa_depth='rising'),
        'mass + row entropy 10%': mto(w_spa=0.1, spa_form='mass+row_entropy'),
        'e r, gram': mto(**losses, affinity='gram'),
        'e r, gram with positions': mto(**losses, affinity='gram_positions'),
        'exclude by threshold': mto(recalibration='threshold'),
        'exclude by rank': mto(recalibration='rank'),
        'spa 3, fades by half': mto(w_spa=3.0, fade=('spa',), fade_until=0.5),
        'exclude, gates open by half': mto(recalibration='exclude', exclude_blocks=-1, open_until=0.5),
        'ramp for all rows, gates open by half': mto(recalibration='ramp', rows='all', open_until=0.5),
        # A slow rate while L_spa acts, then a fast one without it.
        'spa 3, fades by half, late peak of 8e-3': {
            **mto(w_spa=3.0, fade=('spa',), fade_until=0.5),
            'optim': rate(c, 8e-3) | {'warmup_epochs': 2.0},
        },
    }
    return briefly(c, seeds=(0, 1))


def weights(c):
    """What `full` should be, with all of its parts; and the forms of recalibration that did best in `readings`."""
    full, weaker = FIRST, FIRST | {'w_e': 0.03, 'w_r': 0.3}
    fades, opens = {'fade': ('spa', 'e', 'r')}, {'open_until': 0.5}
    ramp = {'recalibration': 'ramp', 'rows': 'all'}
    c = readings(c)
    c.study.variants = {
        'baseline': {},
        'full': mto(**full),
        'tuned': mto(**presets.TUNED[c.method]),
        'full, all terms fade': mto(**full, **fades),
        'full, e r weights x 30%': mto(**weaker),
        'full, e r weights x 10%': mto(**full | {'w_e': 0.01, 'w_r': 0.1}),
        'full, e r weights x 30%, spa 3': mto(**weaker | {'w_spa': 3.0}),
        'full, e r weights x 30%, all terms fade': mto(**weaker, **fades),
        'full, e r weights x 30%, gates open by half': mto(**weaker, **opens),
        'full, e r weights x 30%, gates open and terms fade by half': mto(**weaker, **opens, **fades, fade_until=0.5),
        'full, e r weights x 30%, for all rows, gates open by half': mto(**weaker, **opens, rows='all'),
        'ramp for all rows, gates open by half': mto(**ramp, **opens),
        'ramp for all rows and spa 3, gates open and it fades by half': mto(
            **ramp, **opens, w_spa=3.0, fade=('spa',), fade_until=0.5
        ),
    }
    return c


def main(c):
    c.study.variants = {'baseline': {}} | {
        name: mto(**fields) for name, fields in (('full', presets.FULL), ('tuned', presets.TUNED[c.method]))
    }
    return c


def at_half(c):
    """Runs of E/2 epochs, on test images, of three of the seeds of `main`."""
    c.study.budgets, c.study.evaluations, c.study.seeds = (BUDGETS[1],), 1, (10, 11, 12)
    return c


def ablation(c):
    """Each part of `full` alone, and `full` without it, at E/2."""
    variants = {'baseline': {}, 'full': mto(**presets.FULL)}
    for field, value in presets.FULL.items():
        without = {k: v for k, v in presets.FULL.items() if k != field}
        variants |= {f'{field} alone': mto(**{field: value}), f'full without {field}': mto(**without)}
    c.study.variants = variants
    return at_half(c)


def fading(c):
    """MTO that acts in the first half of the training only, at E/2."""
    c.study.variants = {
        'baseline': {},
        'spa 3, fades by half': mto(w_spa=3.0, fade=('spa',), fade_until=0.5),
        'full, gates open and terms fade by half': mto(
            **presets.FULL, open_until=0.5, fade=('spa', 'e', 'r'), fade_until=0.5
        ),
    }
    return at_half(c)


def apart(c):
    """Visible tokens that read masked ones in no block, at E/2: they learn not to (L_spa), or cannot (`exclude`)."""
    c.study.variants = {
        'baseline': {},
        'spa 3, all blocks': mto(w_spa=3.0, spa_depth='equal'),
        'exclude in all blocks': mto(recalibration='exclude', exclude_blocks=-1),
    }
    return at_half(c)


def precision(c):
    """Training in bfloat16, with the residual stream in bfloat16 too, or in float32 as under PyTorch's autocast."""
    half = {'dtype': 'bfloat16'}
    c.study.variants = {
        'baseline': {},
        'bfloat16': {'model': half},
        'bfloat16, residual float32': {'model': half | {'residual_dtype': 'float32'}},
    }
    return briefly(c, seeds=(0, 1, 2))


STAGES = {
    'pilot': pilot,
    'rates': rates,
    'readings': readings,
    'weights': weights,
    'main': main,
    'ablation': ablation,
    'fading': fading,
    'apart': apart,
    'precision': precision,
}


def get_config(argument: str):
    method, _, stage = argument.partition(',')
    if method not in METHODS or stage not in STAGES:
        raise ValueError(
            f'the argument is {argument!r}; it must be one of {", ".join(METHODS)}, a comma, and one of '
            f'{", ".join(STAGES)}'
        )
    return STAGES[stage](regime(method))
