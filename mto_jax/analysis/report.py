"""`report.html`: one self-contained page about one or several runs. Each run writes its own at the end.

python main.py --config=configs/report.py --config.report.runs=runs/a,runs/b --workdir=runs/a_and_b
"""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.ticker import MaxNLocator

from mto_jax.analysis import page
from mto_jax.analysis.plots import block_terms
from mto_jax.analysis.runs import LOSSES, MEASURED, Run, best, load, losses, measured, probes
from mto_jax.config import get_config
from mto_jax.errors import UserError
from mto_jax.runtime.hosts import flatten
from mto_jax.runtime.log import say
from mto_jax.runtime.workdir import write


def run(config, workdir: epath.Path) -> epath.Path:
    """`config.task='report'`: one page of the workdirs in `config.report.runs`, separated by commas."""
    folders = [epath.Path(f.strip()) for f in config.report.runs.split(',') if f.strip()]
    if not folders:
        raise UserError("report.runs is ''; name one or more workdirs, --config.report.runs=runs/a,runs/b")
    return write_report(epath.Path(workdir), folders)


def finish(workdir: epath.Path, folders: Sequence[epath.Path], accuracies: Mapping | None = None) -> None:
    """`write_report` at the end of a job that is complete without it: what goes wrong is said, not raised."""
    try:
        write_report(workdir, folders, accuracies)
    except Exception as e:  # whatever it is, what was trained is saved and stands
        say(f'report.html could not be written; everything else is saved: {type(e).__name__}: {e}')


def write_report(workdir: epath.Path, folders: Sequence[epath.Path], accuracies: Mapping | None = None) -> epath.Path:
    """Write `<workdir>/report.html` about one or more runs; returns its path.

    Args:
      accuracies: of probes on the test split, {label: one dict of accuracies per seed}, as `compare` measures them.

    Raises:
      UserError: if a folder holds no run, or a file of it is damaged.
      Temporary: if the page cannot be written.
    """
    folders = [epath.Path(f) for f in folders]
    text = _page(load(folders), accuracies or {})
    path = epath.Path(workdir) / 'report.html'
    write(path, text)
    say(f'report: {path}')
    return path


def _page(runs, accuracies):
    sections = {
        'Summary': _summary(runs),
        'Test accuracy': _accuracies(accuracies),
        'Losses': _curves(runs, losses(runs)),
        'Validation over steps': _curves(runs, probes(runs)),
        'Optimisation and speed': _curves(runs, measured(runs)),
        'Reconstructions': _pictures(runs),
        'Heterogeneity': _heterogeneity(runs),
        'Config': _config(runs),
        'Environment': _compared(runs, lambda r: r.about, 'code hash, versions and devices'),
    }
    parts = [f'<h2>{title}</h2>{text}' for title, text in sections.items() if text]
    title = ' | '.join(r.name for r in runs) if len(runs) < 5 else f'{len(runs)} runs'
    return page.document(title, [f'<p>{html.escape(_headline(runs))}</p>', *parts])


def _headline(runs):
    if len(runs) > 1:
        differing = [n for n, *_ in _differing(runs, lambda r: r.config)]
        more = f' and {len(differing) - 8} more fields' if len(differing) > 8 else ''
        return f'They differ in {", ".join(differing[:8]) or "no field"}{more}.'
    r = runs[0]
    scores = [n for n in ('val_top1', 'val_miou') if n in probes(runs)] or probes(runs)[-1:]
    shown = losses(runs)[: 1 if r.field('task') in ('finetune', 'probe') else 2]
    found = [f'{n} {r.last(n):.4g}' for n in (*shown, *scores)]
    task = {'finetune': 'Fine-tuning of ', 'probe': f'A probe ({r.field("probe.head")}) of '}.get(r.field('task'), '')
    mto = 'with MTO' if r.field('mto.enabled') else 'without MTO'
    return f'{task}{r.field("method")} {mto}, {_model(r)}, on {_data(r)}: {", ".join([_steps(r), *found, _speed(r)])}.'


def _summary(runs):
    facts = {
        'task': lambda r: r.field('task'),
        'method': lambda r: r.field('method'),
        'MTO': _mto,
        'model': _model,
        'data': _data,
        'steps': _steps,
        'batch': lambda r: r.field('batch_size'),
        'seed': lambda r: r.field('seed'),
        'devices': lambda r: f'{r.about.get("devices.kind", "")}, {r.about.get("devices.mesh", "")}'.strip(', '),
        'speed, median': _speed,
    }
    facts = [[name, *(html.escape(str(fact(r))) for r in runs)] for name, fact in facts.items()]
    values = [[n, *_marked([r.last(n) for r in runs], best(runs, n))] for n in (*losses(runs), *probes(runs))]
    heads = page.keys(_names(runs))
    tables = [
        page.table(['', *heads], facts),
        page.table(['last value of', *heads], [[html.escape(n), *cells] for n, *cells in values]),
    ]
    if len(runs) == 1:
        return page.grid(tables, wide=True)
    text = 'Bold: the best, for probes of the same split and for reconstruction of the same target. '
    return tables[0] + page.note(text + 'Other losses are no measure of one run against another.') + tables[1]


def _model(r):
    given = [f'{n} {r.field(f"model.{n}")}' for n in ('depth', 'width', 'heads') if r.field(f'model.{n}')]
    return ', '.join([f'ViT {r.field("model.size")}', f'patches of {r.field("model.patch_size")}', *given])


def _data(r):
    return f'{r.field("data.name") or r.field("data.data_dir")} {r.field("data.train_split")}'


def _mto(r):
    if not r.field('mto.enabled'):
        return 'off'
    weights = [f'{w} {r.field(f"mto.{w}"):g}' for w in ('w_spa', 'w_e', 'w_r') if r.field(f'mto.{w}')]
    return ', '.join([f'on: recalibration {r.field("mto.recalibration")}', *weights])


def _steps(r):
    return f'{int(r.rows[-1]["step"]):,} steps (epoch {r.last("epoch") or 0:.4g} of {r.field("epochs"):g})'


def _speed(r):
    values = r.series('images_per_s')[1]
    return f'{np.median(values):,.0f} images / s' if values else 'speed unknown'


def _accuracies(accuracies):
    if not accuracies:
        return ''
    shares = ('linear', 'knn_', 'top1', 'top5', 'miou', 'pixel_accuracy')
    columns = [c for c in next(iter(accuracies.values()))[0] if c.startswith(shares) and c != 'linear_l2']
    values = {n: np.array([[s[c] for c in columns] for s in seeds]) for n, seeds in accuracies.items()}
    marked = [_marked([v[:, i].mean() for v in values.values()], max) for i in range(len(columns))]
    rows = []
    for (name, found), *cells in zip(values.items(), *marked, strict=True):
        count = len(found)
        errors = [f' ± {e:.2g}' for e in found.std(0, ddof=1) / np.sqrt(count)] if count > 1 else [''] * len(columns)
        rows.append([html.escape(name), str(count), *(c + e for c, e in zip(cells, errors, strict=True))])
    text = 'On the test split: fraction of right answers, or mean intersection over union; mean over the seeds (± its '
    return page.note(text + 'standard error). Bold: the highest.') + page.table(['features', 'seeds', *columns], rows)


def _curves(runs, names):
    figures = []
    for term in names:
        lines = [r.series(term) for r in runs]

        def draw(axis, lines=lines):
            for colour, (steps, values) in zip(page.colours(len(runs)), lines, strict=True):
                axis.plot(steps, values, color=colour, marker='.' if len(steps) < 20 else None)
            axis.grid(alpha=0.3)

        k = term.removeprefix('val_knn_')
        unit = {'val_loss': 'cross-entropy', 'val_miou': 'mIoU'}.get(term.partition('_depth')[0], 'accuracy')
        probe = (f'kNN, k = {k}, on the validation split' if k != term else 'on the validation split', unit)
        loss = LOSSES.get(term, ''), 'loss' if term in losses(runs) else ''
        text, unit = probe if term.startswith('val_') else MEASURED.get(term.partition('.')[0], loss)
        figures.append(page.chart(draw, term, text, 'step', unit))
    return page.legend(_names(runs)) + page.grid(figures) if figures else ''


def _pictures(runs):
    text = 'original, masked, and with predictions (ConMIM: the best matches) where hidden'
    normal = '; each prediction is un-normalised with the true patch'

    def normalised(r):
        return r.config.get(f'{r.field("method")}.norm_pix_loss')

    figures = [page.photo(r.picture, r.name, text + normal * bool(normalised(r))) for r in runs if r.picture]
    return page.grid(figures, wide=True) if figures else ''


def _heterogeneity(runs):
    parts = []
    for term, title in block_terms([row for r in runs for row in r.rows]).items():
        found = [(r, colour, *r.blocks(term)) for r, colour in zip(runs, page.colours(len(runs)), strict=True)]
        found = [f for f in found if np.isfinite(f[-1]).any()]
        if not found:
            continue

        def ends(axis, found=found):
            for _, colour, _, values in found:
                axis.plot(values[-1], marker='o', markersize=3, color=colour)
            axis.grid(alpha=0.3)

        figures = [page.chart(ends, 'Over depth', 'at the last diagnosis', 'block', term)]
        low, high = (f(f(v[np.isfinite(v)]) for *_, v in found) for f in (min, max))
        for r, _, steps, values in found:
            if len(steps) < 2:
                continue

            def over_time(axis, steps=steps, values=values, low=low, high=high, term=term):
                edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
                up = np.arange(values.shape[1] + 1) - 0.5
                shown = axis.pcolormesh(edges, up, values.T, vmin=low, vmax=high, cmap='Blues', rasterized=True)
                axis.yaxis.set_major_locator(MaxNLocator(integer=True))
                axis.figure.colorbar(shown, label=term)

            which = f' of {r.name}' if len(runs) > 1 else ''
            figures.append(page.chart(over_time, f'Over time{which}', 'colour: the value', 'step', 'block'))
        parts.append(f'<section><h3>{html.escape(title)}</h3>{page.grid(figures)}</section>')
    text = (
        'On fixed images under fixed masks. Blocks are those of the stack that masked tokens pass through: MAE’s '
        'decoder, the encoder of SimMIM and ConMIM, BootMAE’s decoders. Colours mean the same for all runs of a term.'
    )
    return page.note(text) + page.legend(_names(runs)) + page.grid(parts, wide=True) if parts else ''


def _config(runs):
    if len(runs) > 1:
        return _compared(runs, lambda r: r.config, 'the config')
    defaults = flatten(json.loads(json.dumps(get_config().to_dict())))
    given = runs[0].config
    rows = [[n, _show(v), _show(defaults.get(n))] for n, v in given.items() if n not in defaults or v != defaults[n]]
    changed = page.plain_table(['field', 'this run', 'default'], rows)
    return page.note('What differs from the defaults:') + changed + _all(runs, lambda r: r.config)


def _compared(runs, get: Callable[[Run], Mapping[str, Any]], what: str):
    if not any(map(get, runs)):
        return ''
    if len(runs) == 1:
        return page.plain_table(['', ''], _side_by_side(runs, get))
    rows = _differing(runs, get)
    text = page.plain_table(['field', *page.keys(_names(runs))], rows) if rows else ''
    return page.note(f'What differs in {what}:' if rows else f'Nothing differs in {what}.') + text + _all(runs, get)


def _all(runs, get):
    whole = page.plain_table(['field', *page.keys(_names(runs))], _side_by_side(runs, get))
    return f'<details><summary>All fields</summary>{whole}</details>'


def _side_by_side(runs, get):
    return [[n, *(_show(get(r).get(n)) for r in runs)] for n in dict.fromkeys(n for r in runs for n in get(r))]


def _differing(runs, get):
    return [row for row in _side_by_side(runs, get) if len(set(row[1:])) > 1]


def _names(runs):
    return [r.name for r in runs]


def _show(value):
    return '' if value is None else str(value) or "''"


def _marked(values, choose: Callable | None):
    """Numbers as text, the best in bold unless all are the same."""
    known = {v for v in values if v is not None}
    chosen = choose(known) if choose and len(known) > 1 else None
    return ['' if v is None else f'<strong>{v:.4g}</strong>' if v == chosen else f'{v:.4g}' for v in values]
