"""The ratios that a release must not lose, in under ten minutes on two idle cores: prints each, and which fell.

    python -m benchmarks.guard            # compares with benchmarks/results/guard.json
    python -m benchmarks.guard --write    # replaces it

Each is measured side by side in this run, and smaller is better. One fell if it is more than TOLERANCE above the stored
one. It needs data/fashion_mnist.npz (data/make_fashion_mnist.py); what compares with PyTorch needs
requirements-peers.txt, and is left out without it.
"""

import argparse
import importlib.util
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax

from benchmarks import cpu_peer, step_cost
from benchmarks import input as pipeline
from configs import study_mto
from mto_jax.data import memory, order
from mto_jax.training import feed, job

STORED = Path(__file__).parent / 'results' / 'guard.json'
TOLERANCE = 0.1
SEEDS = 5


def mto_costs() -> dict[str, float]:
    """Seconds and bytes of a step with MTO, over those without."""
    found = {}
    for method in ('mae', 'simmim'):
        rows = step_cost.measure(study_mto.get_config(f'{method},main'), ('full', 'tuned'), 5)
        for r in rows[1:]:
            found |= {f'{method} {r["variant"]}: time': r['time'], f'{method} {r["variant"]}: memory': r['memory']}
    return found


def seeds_at_once(rounds: int = 3, steps: int = 10) -> dict[str, float]:
    """Seconds per step and seed of several seeds in one dispatch, over those of one; the median of the rounds."""
    config = study_mto.get_config('simmim,main')
    images = memory.load(config.data, config.data.train_split)[0]
    training = job.prepare(config, len(images))
    positions = partial(order.batch_positions, len(images), config.batch_size)
    counts = (1, SEEDS)
    residents = {n: feed.Resident(training, {'image': images}, tuple(range(n)), positions) for n in counts}
    carried = {
        n: (feed.stack([jax.jit(training.create)(s) for s in range(n)]), residents[n].meter(), 0) for n in counts
    }
    seconds = {n: [] for n in counts}
    for _ in range(rounds + 1):  # the first compiles
        for n in counts:
            state, meter, step = carried[n]
            start_time = time.perf_counter()
            carried[n] = jax.block_until_ready(residents[n].advance(state, meter, step, step + steps))
            seconds[n].append((time.perf_counter() - start_time) / n)
    ratios = [several / one for one, several in zip(seconds[1][1:], seconds[SEEDS][1:], strict=True)]
    return {f'{SEEDS} seeds at once: time per seed': statistics.median(ratios)}


def against_peers() -> dict[str, float]:
    rows = {r['name']: r for r in cpu_peer.measure('quickstart', 5, 2)}
    return {f'MAE step: ours over {n}': r['ours_over_it'] for n, r in rows.items() if n != 'ours'}


def input_pipeline(peers: bool) -> dict[str, float]:
    """Seconds of the full pipeline, over those of decoding alone and of PyTorch's."""
    names = pipeline.CONTESTANTS if peers else pipeline.CONTESTANTS[:-1]
    rows = {r['name']: r for r in pipeline.measure(200, 3, 8, names)}
    return {f'input: full over {n}': 1 / rows['full'][f'over_{n}'] for n in ('decode', 'torch') if n in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--write', action='store_true')
    args = parser.parse_args()
    peers = bool(importlib.util.find_spec('transformers'))
    found = mto_costs() | seeds_at_once() | input_pipeline(peers) | (against_peers() if peers else {})
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name, ratio in found.items():
        before = stored.get(name)
        verdict = '' if before is None else 'FELL' if ratio > before * (1 + TOLERANCE) else 'ok'
        print(f'{ratio:8.3f} {"" if before is None else f"({before:.3f})":>9} {verdict:5} {name}', flush=True)
    if args.write:
        STORED.write_text(json.dumps(stored | found, indent=2) + '\n')


if __name__ == '__main__':
    main()
