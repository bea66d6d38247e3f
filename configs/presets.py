"""MTO's presets, which the configs named `<method>_mto` take after a comma: `configs/mae_mto.py:vit_b,tuned`.

`full`, the default, is our interpretation of the paper with all four of its parts: selective recalibration of visible
queries, L_spa, L_e and L_r. Its form is this project's choice (docs/method.md). Its weights were chosen on validation
images of Fashion-MNIST, after one epoch of a small SimMIM, two seeds each: of nine forms it is the one that costs no
probe more than 0.1 points (docs/pilot.md). In MAE, one seed, it cost the probes two points and fine-tuning nothing;
other methods, models and data were not tried.

`tuned` is what studies of one epoch found best for a method (docs/exploration.md). With more epochs neither preset
gains fine-tuning at equal epochs by more than its interval, but `tuned` of SimMIM on CIFAR-10, after two epochs and
not after four (docs/results.md). All of it is too small to decide for ImageNet.
"""

FULL = {'recalibration': 'adaptive', 'w_spa': 3.0, 'w_e': 0.03, 'w_r': 0.3}
DECODER = {'recalibration': 'ramp', 'rows': 'all'}  # tuned for MAE, taken over for BootMAE
ENCODER = {'w_spa': 3.0}  # tuned for SimMIM, taken over for ConMIM
TUNED = {'mae': DECODER, 'bootmae': DECODER, 'simmim': ENCODER, 'conmim': ENCODER}


def with_mto(c, preset: str = 'full'):
    """Turn MTO on with a preset of the config's method."""
    presets = {'full': FULL, 'tuned': TUNED[c.method]}
    if preset not in presets:
        raise ValueError(f'unknown preset {preset!r}; it must be one of {", ".join(presets)}')
    c.mto.update({'enabled': True} | presets[preset])
    return c


def of(argument: str, build):
    """The config that `build(size)` gives, with MTO: of an argument such as 'vit_b' or 'vit_b,tuned'."""
    size, _, preset = argument.partition(',')
    return with_mto(build(size), preset or 'full')
