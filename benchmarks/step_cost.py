"""What MTO costs a step: the variants of a study, timed in turns in one process.

    python -m benchmarks.step_cost --config=configs/study_simmim.py:confirm [--variants=NAME,...]

Every round runs a stretch of steps of each variant, after one that compiles. Printed for each: the median seconds a
step, and the median over the rounds of its ratio to the baseline's of the same round, with the smallest and largest.
It needs the machine for itself.
"""

import statistics
import time
from functools import partial

import jax
from absl import flags

from mto_jax import cli
from mto_jax.data import memory, order
from mto_jax.errors import UserError
from mto_jax.runtime import cpu
from mto_jax.studies import study
from mto_jax.studies.table import BASELINE
from mto_jax.training import feed, job

_VARIANTS = flags.DEFINE_list('variants', [], 'Those timed beside the baseline; all of the study where none is named.')

ROUNDS, STEPS = 7, 40


def stretch(resident, state):
    """Train, waiting after each STEPS steps."""
    meter, step = resident.meter(), 0
    while True:
        state, meter, step = jax.block_until_ready(resident.advance(state, meter, step, step + STEPS))
        yield


def measure(config, workdir):
    """Time the variants at the largest budget and the first seed; writes nothing."""
    cpu.keep_memory()
    images = memory.load(config.data, config.data.train_split)[0]
    seeds = config.study.seeds[:1]
    wanted = {BASELINE, *(_VARIANTS.value or config.study.variants)}
    if unknown := sorted(wanted - set(config.study.variants)):
        raise UserError(f'--variants names {unknown}; the study has {", ".join(config.study.variants)}')
    # Budgets ascend: the largest stays.
    setups = {name: setup for name, _, _, setup in study.grid(config) if name in wanted}
    stretches = {}
    for name, setup in setups.items():
        training = job.prepare(setup, len(images))
        positions = partial(order.batch_positions, len(images), setup.batch_size)
        resident = feed.Resident(training, {'image': images}, seeds, positions)
        state = feed.stack([jax.jit(training.create)(s) for s in seeds])
        stretches[name] = stretch(resident, state)
        next(stretches[name])
        print(f'{name}: compiled', flush=True)
    seconds = {name: [] for name in stretches}
    for _ in range(ROUNDS):
        for name, each in stretches.items():
            begun = time.perf_counter()
            next(each)
            seconds[name].append((time.perf_counter() - begun) / STEPS)
    base = seconds[BASELINE]
    print('| variant | seconds a step | relative to the baseline |\n|---|---|---|')
    for name, found in seconds.items():
        ratios = [f / b for f, b in zip(found, base, strict=True)]
        spread = f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
        print(f'| {name} | {statistics.median(found):.4f} | {spread} |')


if __name__ == '__main__':
    cli.start(measure)
