"""What MTO costs per step: the variants of a study, timed in alternation in one process.

    python -m benchmarks.step_cost --config=configs/study_mto.py:simmim,main [--variants=NAME,...] [--rounds=15]

Every round runs a stretch of steps of each variant, after one that compiles. Printed for each: the median seconds per
step, the mean ratio to the baseline in the same round with its 95% t interval, and the memory that the compiled step
takes (arguments and temporaries, by XLA) relative to the baseline's. It needs the machine to itself.
"""

import statistics
import time
from functools import partial

import jax
import numpy as np
from absl import flags

from mto_jax import cli
from mto_jax.data import memory, order
from mto_jax.errors import UserError
from mto_jax.runtime import cpu, parallel
from mto_jax.studies import speed, study
from mto_jax.studies.table import BASELINE
from mto_jax.training import feed, job

_VARIANTS = flags.DEFINE_list('variants', [], 'Those timed besides the baseline; default: all of the study.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Of each variant.', lower_bound=2)

STEPS = 20


def stretch(resident, state):
    """Train, waiting after each STEPS steps."""
    meter, step = resident.meter(), 0
    while True:
        state, meter, step = jax.block_until_ready(resident.advance(state, meter, step, step + STEPS))
        yield


def step_memory(training: job.Job) -> int:
    """Bytes of arguments and temporaries of one compiled step."""
    mesh = parallel.make_mesh(1)
    with jax.set_mesh(mesh):
        meter, key = job.Meter.empty(training.names), jax.eval_shape(lambda: jax.random.key(0))
        lowered = training.step(mesh).lower(training.shapes, meter, {}, dict(training.microbatch), key)
        found = lowered.compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def measure(config, names, rounds: int) -> list[dict]:
    """A row per variant of the study `config`: at the largest budget and the first seed.

    Args:
      names: of variants; the baseline is always timed too.
    """
    cpu.keep_memory()
    images = memory.load(config.data, config.data.train_split)[0]
    seeds = config.study.seeds[:1]
    # Budgets ascend: the largest stays.
    setups = {name: setup for name, _, _, setup in study.grid(config) if name in {BASELINE, *names}}
    stretches, memory_taken = {}, {}
    for name, setup in setups.items():
        training = job.prepare(setup, len(images))
        positions = partial(order.batch_positions, len(images), setup.batch_size)
        resident = feed.Resident(training, {'image': images}, seeds, positions)
        state = feed.stack([jax.jit(training.create)(s) for s in seeds])
        stretches[name] = stretch(resident, state)
        memory_taken[name] = step_memory(training)
        next(stretches[name])
        print(f'{name}: compiled', flush=True)
    seconds = {name: [] for name in stretches}
    for _ in range(rounds):
        for name, each in stretches.items():
            start_time = time.perf_counter()
            next(each)
            seconds[name].append((time.perf_counter() - start_time) / STEPS)
    rows = []
    for name, found in seconds.items():
        mean, half = speed.paired(np.divide(found, seconds[BASELINE]), np.zeros(rounds))
        more = memory_taken[name] / memory_taken[BASELINE]
        row = {'variant': name, 'seconds': statistics.median(found), 'time': mean, 'time_half': half, 'memory': more}
        rows.append(row)
    return rows


def main(config, workdir):
    """Print a table; writes nothing."""
    del workdir
    if unknown := sorted(set(_VARIANTS.value) - set(config.study.variants)):
        raise UserError(f'--variants names {unknown}; the study has {", ".join(config.study.variants)}')
    rows = measure(config, _VARIANTS.value or config.study.variants, _ROUNDS.value)
    print(f'{config.method}, {_ROUNDS.value} rounds of {STEPS} steps of {config.batch_size} images')
    print('| variant | seconds per step | time, relative (95%) | memory, relative |\n|---|---|---|---|')
    for r in rows:
        spread = f'{r["time"]:.3f} ({r["time"] - r["time_half"]:.3f} to {r["time"] + r["time_half"]:.3f})'
        print(f'| {r["variant"]} | {r["seconds"]:.4f} | {spread} | {r["memory"]:.3f} |')


if __name__ == '__main__':
    cli.start(main)
