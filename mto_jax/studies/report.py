"""Tables and pictures of studies: `python -m mto_jax.studies.report docs/results`.

Every `<name>.csv` of the folder, as `mto_jax.studies` writes it, becomes `<name>.md` and `<name>.png` next to it. Only
seeds that a variant shares with the baselines are compared: with `baseline`, and with every variant whose name begins
so, such as the baseline at the method's learning rate. Of several, the one that is better on a metric at a budget is
what others must beat there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_jax.studies import speed
from mto_jax.studies.table import BASELINE, read

METRICS = {'linear': 'linear probe', 'knn': 'kNN', 'finetune': 'fine-tuning'}
# Columns of heterogeneity: each is of one definition and has a panel of its own. Studies write the first; older tables
# have the second for runs with MTO.
HETEROGENEITY = {'het': 'heterogeneity at the end', 'het_own': 'heterogeneity by own mto.affinity: not comparable'}


class Table:
    """The rows of a study, with lookups.

    Attributes:
      baselines: names, `baseline` first.
      variants: names of all, the baselines' first.
      budgets: epochs, ascending.
    """

    def __init__(self, path: Path):
        self._rows = []
        for row in read(path):
            numbers = {k: float(row[k]) if row[k] else np.nan for k in (*METRICS, 'reconstruction', 'epoch', 'budget')}
            self._rows.append(row | numbers | {'seed': int(row['seed'])})
        names = sorted({r['variant'] for r in self._rows} - {BASELINE})
        self.baselines = [BASELINE, *(n for n in names if n.startswith(BASELINE))]
        self.variants = self.baselines + [n for n in names if n not in self.baselines]
        self.budgets = sorted({r['budget'] for r in self._rows})
        self.method = self._rows[0]['method']

    def seeds(self, variant: str, budget: float) -> set[int]:
        return {r['seed'] for r in self._of(variant, budget) if r['epoch'] == budget}

    def shared(self, variant: str, budget: float) -> list[int]:
        """Seeds that the variant and all baselines have finished, ascending."""
        return sorted(set.intersection(*(self.seeds(v, budget) for v in (variant, *self.baselines))))

    def reference(self, budget: float, column: str, seeds: Sequence[int], baselines: Sequence[str]) -> str:
        """Of `baselines` the one with the highest mean value at the end of these seeds' runs."""
        return max(baselines, key=lambda b: self.final(b, budget, column, seeds).mean())

    def final(self, variant: str, budget: float, column: str, seeds: Sequence[int]) -> np.ndarray:
        """Values at the end of the runs, float (seeds,)."""
        found = {r['seed']: r[column] for r in self._of(variant, budget) if r['epoch'] == budget}
        return np.array([found[s] for s in seeds])

    def curve(self, variant: str, budget: float, column: str, seeds: Sequence[int]) -> tuple[list[float], np.ndarray]:
        """Epochs of a run's evaluations, without the untrained network, and mean values over the seeds."""
        rows = [r for r in self._of(variant, budget) if r['seed'] in seeds and r['epoch'] > 0]
        epochs = sorted({r['epoch'] for r in rows})
        return epochs, np.array([np.mean([r[column] for r in rows if r['epoch'] == e]) for e in epochs])

    def watched(self, variant: str, budget: float, seeds: Sequence[int]) -> list[int]:
        """Those of the seeds whose runs were evaluated on their way too."""
        rows = self._of(variant, budget)
        return [s for s in seeds if any(r['seed'] == s and 0 < r['epoch'] < budget for r in rows)]

    def measured(self, budget: float) -> list[str]:
        """The metrics that the baseline's runs have at this budget."""
        base = self.variants[0]
        seeds = sorted(self.seeds(base, budget))
        return [m for m in METRICS if not np.isnan(self.final(base, budget, m, seeds)).all()]

    def has(self, column: str) -> bool:
        """Whether any row has a value of this column."""
        return any(r.get(column) for r in self._rows)

    def random(self, column: str) -> float:
        """Mean value of the untrained network."""
        found = {r['seed']: r[column] for r in self._rows if r['epoch'] == 0}  # a seed may have more than one row
        return float(np.mean(list(found.values()) or [np.nan]))

    def heterogeneity(self, variant: str, budget: float, column: str) -> np.ndarray:
        """Mean over the seeds at the end of the runs, (blocks,), of a column of HETEROGENEITY; empty without values."""
        rows = [r[column] for r in self._of(variant, budget) if r['epoch'] == budget and r.get(column)]
        return np.mean([[float(v) for v in r.split()] for r in rows], axis=0) if rows else np.array([])

    def _of(self, variant, budget):
        return [r for r in self._rows if r['variant'] == variant and r['budget'] == budget]


def variants_table(table: Table, budget: float) -> list[str]:
    """One line per variant: final values, and paired differences from the best baseline (points, 95% intervals)."""
    columns = table.measured(budget)
    titles = ' | '.join(f'{METRICS[m]} | difference' for m in columns)
    lines = [
        f'| variant | seeds | {titles} | reconstruction |',
        '|---' * (2 * len(columns) + 3) + '|',
    ]
    rows = []
    for variant in table.variants:
        seeds = table.shared(variant, budget)
        if not seeds:
            continue
        cells, rank = [], 0.0
        for m in columns:
            base = table.reference(budget, m, seeds, table.baselines)
            values, reference = table.final(variant, budget, m, seeds), table.final(base, budget, m, seeds)
            gain, half = speed.paired(values, reference)
            rank += gain
            spread = '' if np.isnan(half) else f' ± {100 * half:.1f}'
            cells += [f'{100 * values.mean():.1f}', '' if variant == base else f'{100 * gain:+.1f}{spread}']
        loss = table.final(variant, budget, 'reconstruction', seeds).mean()
        rows.append((rank, f'| {variant} | {len(seeds)} | ' + ' | '.join(cells) + f' | {loss:.4f} |'))
    return lines + [line for _, line in sorted(rows, key=lambda r: -r[0])]


def speed_table(table: Table, baselines: Sequence[str]) -> list[str]:
    """One line per variant and metric: epochs-to-match with its interval, RAUC, and the gain at the full budget.

    All are against the best of `baselines` at each budget.
    """
    budgets = table.budgets
    lines = ['| variant | metric | epochs-to-match (95%) | RAUC | difference at E |', '|---|---|---|---|---|']
    for metric, title in METRICS.items():
        for variant in table.variants:
            seeds = sorted(set.intersection(*(set(table.shared(variant, b)) for b in budgets)))
            if not seeds or metric not in table.measured(budgets[-1]):
                continue
            best = [table.reference(b, metric, seeds, baselines) for b in budgets]
            values = np.array([table.final(variant, b, metric, seeds) for b in budgets]).T
            reference = np.array([table.final(v, b, metric, seeds) for v, b in zip(best, budgets, strict=True)]).T
            if speed.testable(reference[:, -2], reference[:, -1]):
                match, low, high = speed.match_interval(budgets, values, reference)
                shown = f'{_share(match, budgets)} ({_share(low, budgets)} to {_share(high, budgets)})'
            else:
                shown = 'not testable'
            watched = table.watched(best[-1], budgets[-1], table.watched(variant, budgets[-1], seeds))
            epochs, curve = table.curve(variant, budgets[-1], metric, watched)
            other, plain = table.curve(best[-1], budgets[-1], metric, watched)
            area = speed.rauc(epochs, curve, plain, table.random(metric)) if epochs == other else np.nan
            gain, half = speed.paired(values[:, -1], reference[:, -1])
            difference = '' if variant == best[-1] else f'{100 * gain:+.1f} ± {100 * half:.1f}'
            area = '' if np.isnan(area) else f'{area:.2f}'
            lines.append(f'| {variant} | {title} | {shown} | {area} | {difference} |')
    return lines


def _share(value: float, budgets: Sequence[float]) -> str:
    if np.isinf(value):
        return 'not reached'
    return f'{"at most " * (value <= budgets[0] / budgets[-1])}{value:.2f}'


def write(path: Path) -> None:
    """`<name>.md` and `<name>.png` next to the table `<name>.csv`."""
    table = Table(path)
    random = ', '.join(f'{title} {100 * table.random(m):.1f}' for m, title in list(METRICS.items())[:2])
    best = 'the better of the baselines at the budget' if len(table.baselines) > 1 else BASELINE
    text = [
        f'Made from {path.name} by `python -m mto_jax.studies.report`. Accuracies in percent, differences in',
        f'points from {best} over paired seeds, with 95% t intervals.',
        f'An untrained network: {random}.',
    ]
    if table.has('het_own'):
        text += [
            '',
            '`het` in the .csv is the heterogeneity of each head’s attention, then the mean over heads; `het_own` is',
            'by the run’s own `mto.affinity` and `mto.scale_guard`. The two are not comparable.',
        ]
    if len(table.budgets) > 1:
        text += ['', '### Speed', '', *speed_table(table, table.baselines)]
        for base in table.baselines if len(table.baselines) > 1 else ():
            text += ['', f'### Speed against `{base}` alone', '', *speed_table(table, [base])]
    for budget in reversed(table.budgets):
        text += ['', f'### {table.method}, {budget:g} epochs', '', *variants_table(table, budget)]
    path.with_suffix('.md').write_text('\n'.join(text) + '\n')
    if len(table.budgets) > 1:
        _plot_budgets(table, path.with_suffix('.png'))
    else:
        _plot_variants(table, path.with_suffix('.png'))


def _plot_budgets(table: Table, path: Path) -> None:
    """Final values over budgets with standard errors, a line per variant; and heterogeneity over the blocks."""
    shown, per_block = table.measured(table.budgets[-1]), [c for c in HETEROGENEITY if table.has(c)]
    panels = len(shown) + len(per_block)
    fig = Figure(figsize=(4.4 * panels, 3.8), layout='constrained')
    axes = fig.subplots(1, panels, squeeze=False)[0]
    for colour, variant in enumerate(table.variants):
        for axis, metric in zip(axes, shown, strict=False):
            points = [(b, 100 * table.final(variant, b, metric, table.shared(variant, b))) for b in table.budgets]
            points = [(b, v) for b, v in points if len(v)]
            means = [v.mean() for _, v in points]
            errors = [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0 for _, v in points]
            axis.errorbar([b for b, _ in points], means, errors, None, f'C{colour}o-', label=variant, capsize=3)
        for axis, column in zip(axes[len(shown) :], per_block, strict=True):
            het = table.heterogeneity(variant, table.budgets[-1], column)
            axis.plot(range(len(het)), het, marker='o', color=f'C{colour}', label=variant)
    for axis, metric in zip(axes, shown, strict=False):
        axis.set_xscale('log', base=2)
        axis.set_xticks(table.budgets, [f'{b:g}' for b in table.budgets])
        axis.set_xlabel('epochs (own full schedule)')
        axis.set_title(f'{METRICS[metric]}, %', fontsize=10)
    for axis, column in zip(axes[len(shown) :], per_block, strict=True):
        axis.set_xlabel('block')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(HETEROGENEITY[column], fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def _plot_variants(table: Table, path: Path) -> None:
    """Paired differences from the baseline, one row per variant, one dot per seed."""
    budget, base = table.budgets[-1], table.variants[0]
    others = [v for v in table.variants[1:] if table.shared(v, budget)]
    shown = ('linear', 'knn', 'reconstruction')
    fig = Figure(figsize=(12, 1.2 + 0.27 * len(others)), layout='constrained')
    for axis, metric in zip(fig.subplots(1, 3, sharey=True), shown, strict=True):
        scale = 1 if metric == 'reconstruction' else 100
        for row, variant in enumerate(others):
            seeds = table.shared(variant, budget)
            gain = scale * (table.final(variant, budget, metric, seeds) - table.final(base, budget, metric, seeds))
            axis.plot(gain, [row] * len(gain), 'o', color='C0', markersize=3, alpha=0.5)
            axis.plot(gain.mean(), row, 'D', color='C1', markersize=5)
        axis.axvline(0, color='0.4', linewidth=1)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_title(f'{METRICS.get(metric, "reconstruction loss")}, minus {base}', fontsize=10)
        axis.set_yticks(range(len(others)), others, fontsize=8)
        axis.grid(alpha=0.3)
    fig.axes[0].invert_yaxis()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    tables = sorted(folder.glob('*.csv'))
    if not tables:
        parser.error(f'{folder} has no .csv tables')
    for path in tables:
        write(path)
        print(path.with_suffix('.md'), path.with_suffix('.png'))


if __name__ == '__main__':
    main()
