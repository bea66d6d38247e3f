"""Studies of MAE with MTO on all of Fashion-MNIST, in memory: configs/study_simmim.py has the same stages for SimMIM.

python -m mto_jax.studies --config=configs/study_mae.py:explore
"""

from configs import base, quickstart
from configs.study_simmim import confirming, for_study, mto, mto_variants, rate, rates_and_decays, stage, with_rate


def prototype():
    """A small MAE whose decoder of four blocks leaves a recalibration room to grow."""
    c = for_study(quickstart.small(base.get_config()))
    c.mae.decoder_depth = 4
    return with_rate(c, 2e-3)


def tune(c):
    c.study.variants = rates_and_decays(c) | {
        'ratio 50%': {'mask_ratio': 0.5},
        'ratio 60%': {'mask_ratio': 0.6},
        'ratio 85%': {'mask_ratio': 0.85},
        'b2 99%': {'optim': {'b2': 0.99}},
        'clipping': {'optim': {'clip_norm': 1.0}},
        'normalised target': {'mae': {'norm_pix_loss': True}},
        'decoder of 2 blocks': {'mae': {'decoder_depth': 2}},
        'decoder 32 wide': {'mae': {'decoder_width': 32}},
    }
    return c


def explore(c):
    """What helped SimMIM, and ideas for a decoder: masked queries that read visible keys only, at first or throughout
    (cross-attention decoding), and terms on the tokens the decoder embeds rather than on its attention."""
    chosen = ('baseline', 'exclude 1', 'exclude all', 'ramp', 'adaptive', 'e r', 'e density', 'spa', 'ramp, e r')
    chosen += ('far token', 'fixed norm')
    variants = {n: v for n, v in mto_variants().items() if n in chosen}
    c.study.variants = variants | {
        'exclude 1, all rows': mto(recalibration='exclude', exclude_blocks=1, rows='all'),
        'exclude 2, all rows': mto(recalibration='exclude', exclude_blocks=2, rows='all'),
        'exclude all, all rows': mto(recalibration='exclude', exclude_blocks=-1, rows='all'),
        'ramp, all rows': mto(recalibration='ramp', rows='all'),
        'e tokens': mto(w_e=0.1, affinity='token', initial_blocks=1),
        'e tokens strong': mto(w_e=1.0, affinity='token', initial_blocks=1),
    }
    c.study.seeds = (0, 1)
    return c


def refine(c):
    """The best of `explore` on the baseline that `tune` found better, which hides fewer patches."""
    c.mask_ratio = 0.6
    kept = ('baseline', 'exclude 1', 'ramp, e r')
    c.study.variants = {n: v for n, v in mto_variants().items() if n in kept} | {
        'rate 1e-3': {'optim': rate(c, 1e-3)},
        'ramp, all rows': mto(recalibration='ramp', rows='all'),
    }
    c.study.seeds = (0, 1)
    return c


def confirm(c):
    """The tuned baseline against the best two of `refine`: one on both probes, one on the linear probe alone."""
    kept = ('baseline', 'ramp, e r', 'ramp, all rows')
    c.study.variants = {n: v for n, v in refine(c).study.variants.items() if n in kept}
    return confirming(c)


def get_config(argument: str):
    return stage(argument, {'tune': tune, 'explore': explore, 'refine': refine, 'confirm': confirm}, prototype())
