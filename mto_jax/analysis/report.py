"""One page about one or several trainings: `report.html`, with everything in it; each training ends with its own.

python main.py --config=configs/report.py --config.report.runs=runs/a,runs/b --workdir=runs/a_and_b
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_jax.analysis.plots import BLOCK_TERMS
from mto_jax.errors import UserError
from mto_jax.hosts import flatten
from mto_jax.metrics import read_history, say
from mto_jax.workdir import read_json, write

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; --back: #fff; --text: #222; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #ddd; --dim: #999; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1500px; padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p, figcaption { color: var(--dim); max-width: 75ch; margin: .3rem 0; }
figcaption { font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem 1.4rem; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.grid img { width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
summary { cursor: pointer; margin: .8rem 0; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
"""
COLOURS = ('#3f7fd0', '#e07b28', '#4a9e4a', '#c94f4f', '#8d6cc0', '#8a6a50', '#d077b4', '#5aa9b5')
LEARNT = ('linear', 'knn_')  # accuracies, of which the highest is marked


class Run:
    """What a workdir holds of a training.

    Attributes:
      name: of its folder.
      config: {dotted field: value}.
      rows: of `metrics.jsonl`, ascending in step.
      about: {dotted name: value} of its code, versions and devices.
      picture: PNG of the reconstructions, or None.
    """

    def __init__(self, folder: epath.Path):
        if not (folder / 'config.json').exists():
            raise UserError(f'report: {folder} holds no training, for it has no config.json')
        self.rows = read_history(folder)
        if not self.rows:
            raise UserError(f'report: {folder} has no metrics.jsonl yet; it is written at the first save')
        self.name = folder.name
        self.config = flatten(read_json(folder / 'config.json'))
        about, picture = folder / 'environment.json', folder / 'reconstructions.png'
        self.about = flatten(read_json(about)) if about.exists() else {}
        self.picture = picture.read_bytes() if picture.exists() else None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged term."""
        rows = [r for r in self.rows if name in r]
        return [int(r['step']) for r in rows], [r[name] for r in rows]

    def last(self, name: str) -> float | None:
        """The newest value of a logged term."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def blocks(self, term: str) -> tuple[list[int], np.ndarray]:
        """Steps (n,), and a diagnosed term over them and the blocks, float (n, blocks)."""
        rows = [r for r in self.rows if f'block/{term}/0' in r]
        depth = sum(k.startswith(f'block/{term}/') for k in rows[0]) if rows else 0
        values = [[r.get(f'block/{term}/{i}', np.nan) for i in range(depth)] for r in rows]
        return [int(r['step']) for r in rows], np.array(values).reshape(len(rows), depth)


def run(config, workdir: epath.Path) -> epath.Path:
    """`config.task='report'`: one page of the workdirs that `config.report.runs` names, commas between them."""
    folders = [epath.Path(f.strip()) for f in config.report.runs.split(',') if f.strip()]
    if not folders:
        raise UserError("report.runs is ''; name one or more workdirs, --config.report.runs=runs/a,runs/b")
    return write_report(epath.Path(workdir), folders)


def write_report(workdir: epath.Path, folders: Sequence[epath.Path], accuracies: Mapping | None = None) -> epath.Path:
    """Write `<workdir>/report.html` about one or more runs; returns its path.

    Args:
      accuracies: of probes on the test split, {label: one dict of shares a seed}, as `compare` measures them.

    Raises:
      UserError: if a folder holds no training or a file of it is damaged.
    """
    runs = [Run(epath.Path(f)) for f in folders]
    if len({r.name for r in runs}) < len(runs):
        for r, folder in zip(runs, folders, strict=True):
            r.name = f'{epath.Path(folder).parent.name}/{r.name}'
    path = workdir / 'report.html'
    write(path, page(runs, accuracies or {}))
    say(f'report: {path}')
    return path


def page(runs: Sequence[Run], accuracies: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The whole document."""
    title = ' | '.join(r.name for r in runs)
    sections = [
        f'<h1>{html.escape(title)}</h1>',
        _summary(runs),
        _accuracies(accuracies),
        _curves(runs),
        _heterogeneity(runs),
        _pictures(runs),
        _settings(runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{"".join(sections)}</body></html>'
    )


def _summary(runs):
    def steps(r):
        last = int(r.rows[-1]['step'])
        epoch = r.last('epoch')
        return f'{last:,}' + (f' (epoch {epoch:.4g} of {r.config["epochs"]:g})' if epoch is not None else '')

    def mto(r):
        if not r.config['mto.enabled']:
            return 'off'
        losses = [f'{w} {r.config[f"mto.{w}"]:g}' for w in ('w_spa', 'w_e', 'w_r') if r.config[f'mto.{w}']]
        return ', '.join([f'recalibration {r.config["mto.recalibration"]}', *losses])

    def speed(r):
        values = r.series('images_per_s')[1]
        return f'{np.median(values):,.0f}' if values else ''

    facts = {
        'method': lambda r: r.config['method'],
        'MTO': mto,
        'data': lambda r: f'{r.config["data.name"] or r.config["data.data_dir"]} {r.config["data.train_split"]}',
        'steps': steps,
        'batch': lambda r: str(r.config['batch_size']),
        'seed': lambda r: str(r.config['seed']),
        'devices': lambda r: f'{r.about.get("devices.kind", "")}, {r.about.get("devices.mesh", "")}'.strip(', '),
        'images a second (median)': speed,
    }
    rows = [[name, *map(fact, runs)] for name, fact in facts.items()]
    rows = [r for r in rows if any(r[1:])]
    for term in _terms(runs):
        if term.startswith(('loss', 'reconstruction', 'mto_', 'val_')):
            values = [r.last(term) for r in runs]
            rows.append([f'{term}, last', *_marked(values, term.startswith('val_'))])
    heads = ['', *(_key(i) + html.escape(r.name) for i, r in enumerate(runs))]
    return '<h2>Summary</h2>' + _table(heads, [[html.escape(r[0]), *r[1:]] for r in rows])


def _accuracies(accuracies):
    if not accuracies:
        return ''
    columns = [c for c in next(iter(accuracies.values()))[0] if c.startswith(LEARNT)]
    means = {n: [np.mean([s[c] for s in seeds]) for c in columns] for n, seeds in accuracies.items()}
    marked = list(zip(*(_marked([m[i] for m in means.values()], True) for i in range(len(columns))), strict=True))
    rows = [[html.escape(n), str(len(accuracies[n])), *cells] for n, cells in zip(means, marked, strict=True)]
    note = '<p>Probes of frozen features on the test split, share of right answers, mean over the seeds.</p>'
    return '<h2>Test accuracy</h2>' + note + _table(['features', 'seeds', *columns], rows)


def _curves(runs):
    figures = []
    for term in _terms(runs):
        lines = [r.series(term) for r in runs]

        def draw(axis, lines=lines):
            for i, (steps, values) in enumerate(lines):
                axis.plot(steps, values, color=COLOURS[i % 8], marker='.' if len(steps) < 20 else None)
            axis.set_xlabel('step')

        figures.append(_figure(draw, term, _units(term), f'{term} over steps'))
    keys = ' &nbsp; '.join(_key(i) + html.escape(r.name) for i, r in enumerate(runs)) if len(runs) > 1 else ''
    note = f'<p>Means over log intervals. {keys}</p>'
    return f'<h2>Curves</h2>{note}<div class="grid">{"".join(figures)}</div>'


def _heterogeneity(runs):
    figures = []
    for term, title in BLOCK_TERMS.items():
        found = [(r, *r.blocks(term)) for r in runs]
        found = [f for f in found if len(f[1])]
        if not found:
            continue

        def ends(axis, found=found):
            for r, _, values in found:
                axis.plot(values[-1], marker='o', markersize=3, color=COLOURS[runs.index(r) % 8])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel('block')

        figures.append(_figure(ends, f'{title}, at the last diagnosis', '', f'{title} over the blocks'))
        low, high = (f([f([v for v in values.ravel() if np.isfinite(v)]) for *_, values in found]) for f in (min, max))
        for r, steps, values in found:
            if len(steps) < 2:
                continue

            def over_time(axis, steps=steps, values=values, low=low, high=high):
                shown = axis.imshow(values.T, aspect='auto', origin='lower', cmap='viridis', vmin=low, vmax=high)
                at = np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int)
                axis.set_xticks(at, [str(steps[i]) for i in at])
                axis.yaxis.set_major_locator(MaxNLocator(integer=True))
                axis.set_xlabel('step')
                axis.set_ylabel('block')
                axis.figure.colorbar(shown)

            figures.append(_figure(over_time, f'{r.name}: {title}', '', f'{title} over blocks and steps, {r.name}'))
    if not figures:
        return ''
    note = '<p>On fixed images under fixed masks. Blocks are those of the stack that masked tokens pass through.</p>'
    return f'<h2>Heterogeneity</h2>{note}<div class="grid">{"".join(figures)}</div>'


def _pictures(runs):
    figures = [
        f'<figure><img alt="Reconstructions by {html.escape(r.name)}" src="data:image/png;base64,'
        f'{base64.b64encode(r.picture).decode()}"><figcaption>{html.escape(r.name)}: original, masked, and with '
        'predictions where hidden; normalised targets are un-normalised with the true patch.</figcaption></figure>'
        for r in runs
        if r.picture
    ]
    return f'<h2>Reconstructions</h2><div class="grid wide">{"".join(figures)}</div>' if figures else ''


def _settings(runs):
    def compared(title, tables: Callable[[Run], Mapping[str, Any]], open_one):
        names = sorted({k for r in runs for k in tables(r)})
        rows = [[k, *(str(tables(r).get(k, '')) for r in runs)] for k in names]
        differ = [r for r in rows if len(set(r[1:])) > 1]
        heads = ['field', *(html.escape(r.name) for r in runs)]
        text = ''
        if len(runs) > 1:
            cells = [[html.escape(c) for c in r] for r in differ]
            text = f'<h2>{title}: what differs</h2>' + (_table(heads, cells) if differ else '<p>Nothing.</p>')
        cells = [[html.escape(c) for c in r] for r in rows]
        return text + f'<details{" open" * open_one}><summary>{title}: all</summary>{_table(heads, cells)}</details>'

    return compared('Config', lambda r: r.config, False) + compared('Environment', lambda r: r.about, len(runs) == 1)


def _terms(runs):
    """Logged terms that make a curve: losses first, then what is measured beside them."""
    skip = {'step', 'epoch', 'seconds_per_step'}
    names = dict.fromkeys(n for r in runs for row in r.rows for n in row if n not in skip and '/' not in n)
    return sorted(names, key=lambda n: (not n.startswith(('loss', 'reconstruction', 'mto_')), not n.startswith('val_')))


def _units(term):
    units = {'images_per_s': 'images / s', 'data_wait': 'share of the time'}
    return units.get(term, 'accuracy' if term.startswith('val_') else '')


def _marked(values, highest_wins):
    """Numbers as text, the best in bold where there is a choice and one can say what is better."""
    known = [v for v in values if v is not None]
    best = max(known) if highest_wins and len(known) > 1 else None
    return ['' if v is None else f'<strong>{v:.4g}</strong>' if v == best else f'{v:.4g}' for v in values]


def _table(heads, rows):
    """Cells are HTML already."""
    head = ''.join(f'<th>{h}</th>' for h in heads)
    body = ''.join('<tr>' + ''.join(f'<td>{c}</td>' for c in r) + '</tr>' for r in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _key(index):
    return f'<span class="key" style="background:{COLOURS[index % 8]}"></span>'


def _figure(draw, title, unit, alt):
    fig = Figure(figsize=(4.2, 2.5), layout='constrained')
    axis = fig.subplots()
    draw(axis)
    if unit:
        axis.set_ylabel(unit)
    if not axis.images:
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    with mpl.rc_context({'svg.fonttype': 'none', 'font.family': 'sans-serif'}):
        fig.savefig(out, format='svg', metadata={'Date': None, 'Creator': None})
    code = base64.b64encode(out.getvalue()).decode()
    picture = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{code}">'
    return f'<figure><figcaption>{html.escape(title)}</figcaption>{picture}</figure>'
