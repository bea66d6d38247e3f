"""What every evaluation says of the same checkpoints: MAE with MTO on the bundled images, against no pre-training.

    python benchmarks/evaluation.py --out=DIR [--seeds=0,1,2,3,4] [--epochs=15]

For each seed: one pre-training (configs/quickstart.py with MTO); kNN, L-BFGS, LARS and attentive probes of its encoder;
and fine-tunings of it and of the same network from fresh weights, on 10% and on 100% of the labels, with equal budgets.
Every step is a command of the README's kind, and one that is done is not run again. DIR/results.json has each number,
DIR/results.md the table.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

# Rows of the table: config, fields, what of its report is shown.
PROBES = {
    'kNN (k=20)': ('knn', {}, 'knn_20'),
    'linear, L-BFGS': ('linear', {}, 'linear'),
    'linear, LARS': ('linear_lars:quickstart', {}, 'top1'),
    'attentive': ('attentive:quickstart', {}, 'top1'),
}
# Labels and epochs: as many steps for both starts.
LABELS = {'10%': {'data.train_split': 'train[:9%]', 'epochs': 30.0}, '100%': {'epochs': 6.0}}
FRESH = {'classify.from_scratch': True}
REPORTS = {'quickstart': 'report.html', 'linear_lars': 'probe.json', 'attentive': 'probe.json'}  # others: <config>.json


def run(config: str, workdir: Path, fields: dict) -> dict[str, float]:
    """One command; returns its report, or {} for a pre-training."""
    name, _, argument = config.partition(':')
    done = workdir / REPORTS.get(name, f'{name}.json')
    if not done.exists():
        args = [f'--config=configs/{name}.py' + f':{argument}' * bool(argument), f'--workdir={workdir}']
        args += [f'--config.{field}={value}' for field, value in fields.items()]
        print('+ python main.py', *args, flush=True)
        cache = {'JAX_COMPILATION_CACHE_DIR': str(workdir.parents[1] / 'xla')}
        subprocess.run(
            [sys.executable, 'main.py', *args], check=True, env=os.environ | cache, stdout=subprocess.DEVNULL
        )
    return json.loads(done.read_text()) if done.suffix == '.json' else {}


def measure(seed: int, out: Path, epochs: float) -> dict[str, float]:
    """{row: test accuracy in percent} of one seed."""
    run_dir, found = out / f'seed{seed}', {}
    trained = {'task': 'pretrain', 'mto.enabled': True, 'seed': seed, 'epochs': epochs}
    run('quickstart', run_dir / 'pretrained', trained)
    source = {'checkpoint': run_dir / 'pretrained'}
    for row, (config, fields, shown) in PROBES.items():
        more = {'seed': seed} if ':' in config else {}
        found[row] = run(config, run_dir / row.replace(' ', '_'), source | fields | more)[shown]
    for labels, fields in LABELS.items():
        for start, more in (('pre-trained', {}), ('from scratch', FRESH)):
            name = f'fine-tuned, {labels} of the labels, {start}'
            workdir = run_dir / name.replace(' ', '_').replace('%', '')
            found[name] = run('finetune:quickstart', workdir, source | {'seed': seed} | fields | more)['top1']
    return {row: 100 * value for row, value in found.items()}


def table(results: dict[int, dict[str, float]]) -> str:
    """Mean and 95% interval (Student's t) of each row, and of the paired differences between the two starts."""
    rows = {row: np.array([r[row] for r in results.values()]) for row in next(iter(results.values()))}
    for labels in LABELS:
        name = f'fine-tuned, {labels} of the labels'
        rows[f'{name}: difference'] = rows[f'{name}, pre-trained'] - rows[f'{name}, from scratch']
    lines = ['| | seeds | test accuracy | 95% interval | each seed |', '|---|---|---|---|---|']
    for row, values in rows.items():
        n, mean = len(values), values.mean()
        half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5 if n > 1 else float('nan')
        each = ' '.join(f'{v:.1f}' for v in values)
        lines.append(f'| {row} | {n} | {mean:.1f} | {mean - half:.1f} to {mean + half:.1f} | {each} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seeds', default='0,1,2,3,4')
    parser.add_argument('--epochs', type=float, default=15.0)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in map(int, flags.seeds.split(',')):
        results[seed] = measure(seed, flags.out, flags.epochs)
        (flags.out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
        (flags.out / 'results.md').write_text(table(results))
        print(table(results), flush=True)
