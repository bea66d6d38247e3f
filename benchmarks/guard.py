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
from pathlib import Path

from benchmarks import cpu_peer, step_cost, studies
from benchmarks import input as pipeline
from configs import study_mto

STORED = Path(__file__).parent / 'results' / 'guard.json'
TOLERANCE = 0.1


def mto_costs() -> dict[str, float]:
    """Seconds and bytes of a step with MTO, over those without."""
    found = {}
    for method in ('mae', 'simmim'):
        rows = step_cost.measure(study_mto.get_config(f'{method},main'), ('full', 'tuned'), 5)
        for r in rows[1:]:
            found |= {f'{method} {r["variant"]}: time': r['time'], f'{method} {r["variant"]}: memory': r['memory']}
    return found


def studies_on_cpu() -> dict[str, float]:
    """Seconds of a study's step as shipped, over those with XLA's default options."""
    shipped = studies.measure(study_mto.get_config('simmim,main'), 3)[0]
    return {"study step: shipped over XLA's default": shipped['over_default']}


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
    found = mto_costs() | studies_on_cpu() | input_pipeline(peers) | (against_peers() if peers else {})
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name, ratio in found.items():
        before = stored.get(name)
        verdict = '' if before is None else 'FELL' if ratio > before * (1 + TOLERANCE) else 'ok'
        print(f'{ratio:8.3f} {"" if before is None else f"({before:.3f})":>9} {verdict:5} {name}', flush=True)
    if args.write:
        STORED.write_text(json.dumps(stored | found, indent=2) + '\n')


if __name__ == '__main__':
    main()
