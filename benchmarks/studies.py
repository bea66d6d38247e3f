"""What limits the studies on a CPU: seconds per step and seed of ways to train the small models, in alternation.

    python -m benchmarks.studies [--method=simmim] [--rounds=7]      # prefix with taskset -c 0 for one core

It needs data/fashion_mnist.npz (data/make_fashion_mnist.py) and the machine to itself. `shipped` is one seed with the
options of `cpu.compiler_options`, `default` one seed without them, and `5 at once` five seeds in one dispatch, without
them too. `runs_per_core_hour` counts trainings of one epoch of Fashion-MNIST (843 steps) without their evaluations.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from functools import partial
from unittest import mock

import jax

from configs import study_mto
from mto_jax.data import memory, order
from mto_jax.runtime import cpu, environment
from mto_jax.training import feed, job

WAYS = {'shipped': 1, 'default': 1, '5 at once': 5}  # seeds
STEPS, EPOCH = 20, 843


def measure(config, rounds: int) -> list[dict]:
    """A row for each of WAYS; `over_default` is its time over that of `default` in the same round."""
    cpu.keep_memory()
    images = memory.load(config.data, config.data.train_split)[0]
    training = job.prepare(config, len(images))
    positions = partial(order.batch_positions, len(images), config.batch_size)
    residents, carried, seconds = {}, {}, {name: [] for name in WAYS}
    for name, count in WAYS.items():
        seeds = tuple(range(count))
        without = mock.patch.object(cpu, 'compiler_options', return_value={})
        with contextlib.nullcontext() if name == 'shipped' else without:
            residents[name] = feed.Resident(training, {'image': images}, seeds, positions)
        states = feed.stack([jax.jit(training.create)(s) for s in seeds])
        carried[name] = (states, residents[name].meter(), 0)
    for _ in range(rounds + 1):  # the first compiles
        for name, count in WAYS.items():
            state, meter, step = carried[name]
            start_time = time.perf_counter()
            carried[name] = jax.block_until_ready(residents[name].advance(state, meter, step, step + STEPS))
            seconds[name].append((time.perf_counter() - start_time) / STEPS / count)
    rows, cores = [], len(os.sched_getaffinity(0))
    for name, (_, *each) in seconds.items():
        ratios = [a / b for a, b in zip(each, seconds['default'][1:], strict=True)]
        row = {'method': config.method, 'way': name, 'cores': cores, 'seconds': statistics.median(each)}
        row |= {'over_default': statistics.median(ratios)}
        row |= {'over_default_min': min(ratios), 'over_default_max': max(ratios)}
        row['runs_per_core_hour'] = 3600 / (EPOCH * row['seconds'] * cores)
        rows.append(row | {'rounds': rounds, 'commit': environment.commit()})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--method', choices=study_mto.METHODS, default='simmim')
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    for row in measure(study_mto.get_config(f'{args.method},main'), args.rounds):
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
