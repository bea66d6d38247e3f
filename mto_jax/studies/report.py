"""Tables and pictures of studies: `python -m mto_jax.studies.report docs/results`.

Every `<name>.csv` in the folder and below, as `mto_jax.studies` writes it, becomes `<name>.md` and `<name>.png` next to
it; and `<name>_blocks.png` where there are several budgets and terms per block. Only seeds that a variant shares with
the baselines are compared: with `baseline`, and with every variant whose name begins so, such as the baseline at the
method's learning rate. Of several, the one that is better on a metric at a budget is what others must beat there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_jax.analysis.plots import BLOCK_TERMS
from mto_jax.errors import UserError
from mto_jax.studies import speed
from mto_jax.studies.table import BASELINE, PER_BLOCK, read

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

    Raises:
      UserError: where runs of one variant and budget had different configs or images.
    """

    def __init__(self, path: Path):
        self._rows = []
        for row in read(path):
            numbers = {k: float(row[k]) if row[k] else np.nan for k in (*METRICS, 'reconstruction', 'epoch', 'budget')}
            self._rows.append(row | numbers | {'seed': int(row['seed'])})
        configs = {}
        for row in self._rows:
            which = row['variant'], row['budget']
            if configs.setdefault(which, row['config']) != row['config']:
                raise UserError(
                    f'{path} has runs of two configs for {which[0]!r}, {which[1]:g} epochs ({configs[which]} and '
                    f'{row["config"]} in the column config), which cannot be compared as one: keep the rows of one'
                )
        found = {r['variant'] for r in self._rows}
        if BASELINE not in found:
            raise UserError(
                f'{path} has no run of {BASELINE!r}, which all others are compared with; where machines divide a grid, '
                'put the rows of all their tables into one'
            )
        names = sorted(found - {BASELINE})
        self.baselines = [BASELINE, *(n for n in names if n.startswith(BASELINE))]
        self.variants = self.baselines + [n for n in names if n not in self.baselines]
        self.budgets = sorted({r['budget'] for r in self._rows})
        self.method = self._rows[0]['method']

    def seeds(self, variant: str, budget: float) -> set[int]:
        return {r['seed'] for r in self._of(variant, budget) if r['epoch'] == budget}

    def budgets_of(self, variant: str) -> list[float]:
        """Those of the budgets that the variant has finished."""
        return [b for b in self.budgets if self.seeds(variant, b)]

    def shared(self, variant: str, budget: float) -> list[int]:
        """Seeds that the variant and all baselines have finished, ascending."""
        return sorted(set.intersection(*(self.seeds(v, budget) for v in (variant, *self.baselines))))

    def reference(self, budget: float, column: str, seeds: Sequence[int], baselines: Sequence[str]) -> str:
        """Of `baselines` the one with the highest mean value at the end of these seeds' runs."""
        return max(baselines, key=lambda b: _ranked(self.final(b, budget, column, seeds).mean()))

    def final(self, variant: str, budget: float, column: str, seeds: Sequence[int]) -> np.ndarray:
        """Values at the end of the runs, float (seeds,)."""
        found = {r['seed']: r[column] for r in self._of(variant, budget) if r['epoch'] == budget}
        return np.array([found[s] for s in seeds])

    def curve(self, variant: str, budget: float, column: str, seeds: Sequence[int]) -> tuple[list[float], np.ndarray]:
        """Epochs of the runs' evaluations, without the untrained network, and values (seeds, epochs)."""
        found = {(r['seed'], r['epoch']): r[column] for r in self._of(variant, budget) if r['epoch'] > 0}
        epochs = sorted({epoch for seed, epoch in found if seed in seeds})
        return epochs, np.array([[found.get((s, e), np.nan) for e in epochs] for s in seeds])

    def watched(self, variant: str, budget: float, seeds: Sequence[int]) -> list[int]:
        """Those of the seeds whose runs were evaluated on their way too."""
        rows = self._of(variant, budget)
        return [s for s in seeds if any(r['seed'] == s and 0 < r['epoch'] < budget for r in rows)]

    def measured(self, budget: float) -> list[str]:
        """The metrics that runs have at this budget."""
        rows = [r for r in self._rows if r['budget'] == r['epoch'] == budget]
        return [m for m in METRICS if not np.isnan([r[m] for r in rows]).all()]

    def has(self, column: str) -> bool:
        """Whether any row has a value of this column."""
        return any(r.get(column) for r in self._rows)

    def random(self, column: str) -> float:
        """Mean value of the untrained network."""
        found = {r['seed']: r[column] for r in self._rows if r['epoch'] == 0}  # a seed may have more than one row
        return float(np.mean(list(found.values()) or [np.nan]))

    def per_block(self, variant: str, budget: float, column: str) -> dict[float, np.ndarray]:
        """{epoch: mean over the seeds, (blocks,)} of a column of PER_BLOCK or HETEROGENEITY, in the order of epochs."""
        found = {}
        for row in self._of(variant, budget):
            if row.get(column):
                found.setdefault(row['epoch'], []).append([float(v) for v in row[column].split()])
        return {epoch: np.mean(found[epoch], axis=0) for epoch in sorted(found)}

    def _of(self, variant, budget):
        return [r for r in self._rows if r['variant'] == variant and r['budget'] == budget]


def variants_table(table: Table, budget: float) -> list[str]:
    """One line per variant: final values, and paired differences from the best baseline (points, 95% intervals)."""
    columns = table.measured(budget)
    titles = ' | '.join(f'{METRICS[m]} | difference' for m in columns)
    lines = [
        f'| variant | seeds | {titles} | own loss |',
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
            rank += (values - reference).mean()
            cells += [f'{100 * values.mean():.1f}', '' if variant == base else _points(values, reference)]
        loss = table.final(variant, budget, 'reconstruction', seeds).mean()
        rows.append((rank, f'| {variant} | {len(seeds)} | ' + ' | '.join(cells) + f' | {loss:.4f} |'))
    return lines + [line for _, line in sorted(rows, key=lambda r: -_ranked(r[0]))]


def speed_table(table: Table, baselines: Sequence[str]) -> list[str]:
    """One line per variant and metric: epochs-to-match with its interval, RAUC, and the gain at the full budget.

    All are against the best of `baselines` at each budget.
    """
    budgets = table.budgets
    lines = ['| variant | metric | epochs-to-match (95%) | RAUC (95%) | difference at E |', '|---|---|---|---|---|']
    for metric, title in METRICS.items():
        for variant in table.variants:
            seeds = sorted(set.intersection(*(set(table.shared(variant, b)) for b in budgets)))
            if not seeds or metric not in table.measured(budgets[-1]):
                continue
            best = [table.reference(b, metric, seeds, baselines) for b in budgets]
            values = np.array([table.final(variant, b, metric, seeds) for b in budgets]).T
            reference = np.array([table.final(v, b, metric, seeds) for v, b in zip(best, budgets, strict=True)]).T
            halves = [i for i, b in enumerate(budgets) if 2 * b == budgets[-1]]
            if halves and speed.testable(reference[:, halves[0]], reference[:, -1]):
                match, low, high = speed.match_interval(budgets, values, reference)
                shown = _share(match, budgets)
                shown += '' if np.isnan(low) else f' ({_share(low, budgets)} to {_share(high, budgets)})'
            else:
                shown = 'not testable'
            watched = table.watched(best[-1], budgets[-1], table.watched(variant, budgets[-1], seeds))
            epochs, curve = table.curve(variant, budgets[-1], metric, watched)
            other, plain = table.curve(best[-1], budgets[-1], metric, watched)
            area = ''
            if watched and epochs == other:
                mean, low, high = speed.rauc_interval(epochs, curve, plain, table.random(metric))
                area = '' if np.isnan(mean) else f'{mean:.2f}'
                area += '' if np.isnan(low) else f' ({low:.2f} to {high:.2f})'
            difference = '' if variant == best[-1] else _points(values[:, -1], reference[:, -1])
            lines.append(f'| {variant} | {title} | {shown} | {area} | {difference} |')
    return lines


def half_table(table: Table) -> list[str]:
    """The paper's claim: one line per variant, metric and pair of budgets of which one is half the other.

    The baseline is at each budget the best of `table.baselines`; the variant needs no run of all epochs.
    """
    lines = [
        '| variant | metric | epochs | seeds | against all epochs | against equal epochs | baseline gains | verdict |',
        '|---|---|---|---|---|---|---|---|',
    ]
    pairs = [(b, 2 * b) for b in reversed(table.budgets) if 2 * b in table.budgets]
    for metric, title in reversed(METRICS.items()):  # the primary measure first
        for variant in (v for v in table.variants if v not in table.baselines):
            for pair in pairs:
                seeds = sorted(set(table.shared(variant, pair[0])) & set(table.shared(BASELINE, pair[1])))
                if len(seeds) < 2 or metric not in table.measured(pair[1]):
                    continue
                values = table.final(variant, pair[0], metric, seeds)
                best = (table.reference(b, metric, seeds, table.baselines) for b in pair)
                half, full = (table.final(v, b, metric, seeds) for v, b in zip(best, pair, strict=True))
                cells = [variant, title, f'{pair[0]:g} for {pair[1]:g}', len(seeds), _points(values, full)]
                cells += [_points(values, half), _points(full, half), speed.verdict(values, half, full)]
                lines.append(f'| {" | ".join(map(str, cells))} |')
    return lines


def _ranked(value: float) -> float:
    """A value to sort by: that of a seed that diverged is below all others."""
    return -np.inf if np.isnan(value) else value


def _points(values: np.ndarray, reference: np.ndarray) -> str:
    """The mean paired difference in points with its 95% interval."""
    gain, half = speed.paired(values, reference)
    if np.isnan(gain):
        return 'diverged'
    return f'{100 * gain:+.1f}' + ('' if np.isnan(half) else f' ± {100 * half:.1f}')


def _share(value: float, budgets: Sequence[float]) -> str:
    if np.isinf(value):
        return 'not reached'
    return f'{"at most " * (value <= budgets[0] / budgets[-1])}{value:.2f}'


def write(path: Path) -> None:
    """`<name>.md` next to the table `<name>.csv`, and pictures where there is something to compare."""
    table = Table(path)
    random = {title: table.random(m) for m, title in METRICS.items()}
    random = ', '.join(f'{title} {100 * value:.1f}' for title, value in random.items() if not np.isnan(value))
    best = 'the better of the baselines at the budget' if len(table.baselines) > 1 else BASELINE
    text = [
        f'Made from {path.name} by `python -m mto_jax.studies.report`. Accuracies in percent, differences in',
        f'points from {best} over paired seeds, with 95% t intervals.',
        'The own loss is all that the method minimises besides MTO, on evaluation images under fixed masks.',
        f'An untrained network: {random or "not measured"}.',
    ]
    if table.has('het_own'):
        text += [
            '',
            '`het` in the .csv is the heterogeneity of each head’s attention, then the mean over heads; `het_own` is',
            'by the run’s own `mto.affinity` and `mto.scale_guard`. The two are not comparable.',
        ]
    if len(table.budgets) > 1:
        text += _section('Half the epochs', half_table(table))
        text += _section('Speed', speed_table(table, table.baselines))
        for base in table.baselines if len(table.baselines) > 1 else ():
            text += _section(f'Speed against `{base}` alone', speed_table(table, [base]))
    for budget in reversed(table.budgets):
        title = f'{table.method}, {budget:g} epoch{"s" * (budget != 1)}'
        text += _section(title, variants_table(table, budget))
    path.with_suffix('.md').write_text('\n'.join(text) + '\n')
    if len(table.budgets) > 1:
        _plot_budgets(table, path.with_suffix('.png'))
        if all(table.has(term) for term in PER_BLOCK):
            _plot_blocks(table, path.with_name(f'{path.stem}_blocks.png'))
    elif len(table.variants) > 1:
        _plot_variants(table, path.with_suffix('.png'))


def _section(title: str, lines: list[str]) -> list[str]:
    """A heading and its table; nothing where the table has no line below its own heading."""
    return ['', f'### {title}', '', *lines] if len(lines) > 2 else []


def _plot_budgets(table: Table, path: Path) -> None:
    """Final values over budgets, dots and a thin line per seed, their mean; and heterogeneity over the blocks."""
    shown, per_block = table.measured(table.budgets[-1]), [c for c in HETEROGENEITY if table.has(c)]
    panels = len(shown) + len(per_block)
    fig = Figure(figsize=(4.4 * panels, 4.1), layout='constrained')
    axes = fig.subplots(1, panels, squeeze=False)[0]
    for colour, variant in enumerate(table.variants):
        for axis, metric in zip(axes, shown, strict=False):
            # Where a seed lacks a budget, the mean of that budget would be over others.
            budgets = table.budgets_of(variant)
            seeds = sorted(set.intersection(*(set(table.shared(variant, b)) for b in budgets)))
            for b in budgets:
                every = 100 * table.final(variant, b, metric, table.shared(variant, b))
                axis.plot([b] * len(every), every, f'C{colour}.', markersize=5, alpha=0.4)
            if seeds:
                values = 100 * np.array([table.final(variant, b, metric, seeds) for b in budgets])
                axis.plot(budgets, values, f'C{colour}-', linewidth=0.8, alpha=0.4)
                axis.plot(budgets, values.mean(1), f'C{colour}o-', label=variant)
        for axis, column in zip(axes[len(shown) :], per_block, strict=True):
            last = table.budgets_of(variant)[-1]
            het = table.per_block(variant, last, column).get(last, ())
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
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    fig.savefig(path, dpi=110)


def _plot_blocks(table: Table, path: Path) -> None:
    """What each block shows during the runs of a variant's largest budget: a row per term, a column per variant."""
    budget = table.budgets[-1]
    seen = {v: {t: table.per_block(v, table.budgets_of(v)[-1], t) for t in PER_BLOCK} for v in table.variants}
    shown = [v for v in table.variants if seen[v][PER_BLOCK[0]]]
    fig = Figure(figsize=(3.6 * len(shown), 2.8 * len(PER_BLOCK)), layout='constrained')
    axes = fig.subplots(len(PER_BLOCK), len(shown), squeeze=False, sharex=True, sharey='row')
    for row, term in zip(axes, PER_BLOCK, strict=True):
        for axis, variant in zip(row, shown, strict=True):
            for epoch, values in seen[variant][term].items():
                axis.plot(values, 'o-', color=colormaps['viridis_r'](epoch / budget), label=f'{epoch:g} epochs')
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        row[0].set_ylabel(BLOCK_TERMS[term].replace(' (', '\n('), fontsize=9)
    for top, bottom, variant in zip(axes[0], axes[-1], shown, strict=True):
        top.set_title(f'{variant}, {table.budgets_of(variant)[-1]:g} epochs', fontsize=10)
        bottom.set_xlabel('block')
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def _plot_variants(table: Table, path: Path) -> None:
    """Paired differences from the baseline, one row per variant, one dot per seed."""
    budget, base = table.budgets[-1], table.variants[0]
    others = [v for v in table.variants[1:] if table.shared(v, budget)]
    shown = (*table.measured(budget), 'reconstruction')
    fig = Figure(figsize=(2.5 + 3.2 * len(shown), 1.2 + 0.27 * len(others)), layout='constrained')
    for axis, metric in zip(fig.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        scale = 1 if metric == 'reconstruction' else 100
        for row, variant in enumerate(others):
            seeds = table.shared(variant, budget)
            gain = scale * (table.final(variant, budget, metric, seeds) - table.final(base, budget, metric, seeds))
            axis.plot(gain, [row] * len(gain), 'o', color='C0', markersize=3, alpha=0.5)
            axis.plot(gain.mean(), row, 'D', color='C1', markersize=5)
        axis.axvline(0, color='0.4', linewidth=1)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_title(f'{METRICS.get(metric, "own loss")}, minus {base}', fontsize=10)
        axis.set_yticks(range(len(others)), others, fontsize=8)
        axis.grid(alpha=0.3)
    fig.axes[0].invert_yaxis()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    tables = sorted(folder.rglob('*.csv'))
    if not tables:
        parser.error(f'{folder} has no .csv tables')
    for path in tables:
        try:
            write(path)
        except UserError as e:
            parser.error(str(e))
        print(path.with_suffix('.md'))


if __name__ == '__main__':
    main()
