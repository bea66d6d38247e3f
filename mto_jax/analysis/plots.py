"""Curves, heterogeneity and reconstructions as PNG files."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from mto_jax.runtime.workdir import write

BLOCK_TERMS = {
    'het': 'heterogeneity (attention entropy per head)',
    'het_token': 'heterogeneity (token entropy)',
    'rho': 'density of masked tokens (log, relative)',
    'mass_used': 'visible-to-masked attention (1: uniform)',
}


def block_terms(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """{term: title} of the diagnosed terms in these rows; a method with several stacks has a term per stack."""
    titles = {}
    for name in dict.fromkeys(k for row in rows for k in row if k.startswith('block/') and k.endswith('/0')):
        term = name.split('/')[1]
        statistic, _, stack = term.partition('.')
        if statistic in BLOCK_TERMS:
            titles[term] = BLOCK_TERMS[statistic] + (f', {stack}' if stack else '')
    return dict(sorted(titles.items(), key=lambda item: [*BLOCK_TERMS].index(item[0].partition('.')[0])))


def _save(fig: Figure, path: epath.Path) -> None:
    picture = io.BytesIO()
    fig.savefig(picture, format='png', dpi=110)
    write(epath.Path(path), picture.getvalue())


def _panels(count: int, width: float, height: float):
    """A figure of `count` panels, at most four in a row, each of this size in inches; and their axes."""
    columns = min(4, count)
    rows = -(-count // columns)
    fig = Figure(figsize=(width * columns, height * rows), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.axis('off')
    return fig, axes[:count]


def curves(path: epath.Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """One panel per logged term, one line per run. `runs`: {label: rows of `metrics.jsonl`}."""
    skip = {'step', 'epoch', 'seconds_per_step'}
    names = []
    for rows in runs.values():
        for row in rows:
            names += [n for n in row if n not in skip and '/' not in n and n not in names]
    if not names:
        return
    # Losses first, then the other measurements, in a stable order.
    names.sort(key=lambda n: (not n.startswith(('loss', 'reconstruction', 'mto')), re.sub(r'\d+', _padded, n)))
    fig, axes = _panels(len(names), 3.6, 2.7)
    for axis, name in zip(axes, names, strict=True):
        for colour, (label, rows) in enumerate(runs.items()):
            points = [(r['step'], r[name]) for r in rows if name in r]
            if points:
                marker = '.' if len(points) < 20 else None
                axis.plot(*zip(*points, strict=True), label=label, color=f'C{colour}', marker=marker)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel('step', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0].legend(fontsize=8)
    _save(fig, path)


def per_block(path: epath.Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Each diagnosed term over the blocks, one line per step, dark to light. Rows hold 'block/<term>/<index>'."""
    found, titles = {}, block_terms(rows)
    for row in rows:
        for term in titles:
            values = [row[k] for k in sorted((k for k in row if k.startswith(f'block/{term}/')), key=_index)]
            if values:
                found.setdefault(term, []).append((row['step'], values))
    if not found:
        return
    fig, axes = _panels(len(found), 4.2, 3.4)
    for axis, (term, lines) in zip(axes, found.items(), strict=True):
        shown = lines if len(lines) <= 8 else [lines[i] for i in np.linspace(0, len(lines) - 1, 8).astype(int)]
        colours = mpl.colormaps['viridis'](np.linspace(0, 0.9, len(shown)))
        for colour, (step, values) in zip(colours, shown, strict=True):
            axis.plot(range(len(values)), values, marker='o', markersize=3, color=colour, label=f'step {int(step)}')
        axis.set_title(titles[term], fontsize=10)
        axis.set_xlabel('block')
        axis.set_xticks(range(len(lines[0][1])))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(fig, path)


def pictures(path: epath.Path, images: Mapping[str, np.ndarray], columns: int) -> None:
    """A row per name of the first images, float (B, H, W, C) in [0, 1]; nothing is written where there is none."""
    if not images:
        return
    columns = min(columns, *map(len, images.values()))
    images = dict(sorted(images.items(), key=lambda item: item[0] != 'original'))  # what the others are compared with
    fig = Figure(figsize=(1.5 * columns + 0.3, 1.6 * len(images)), layout='constrained')
    axes = fig.subplots(len(images), columns, squeeze=False)
    for line, (name, shown) in zip(axes, images.items(), strict=True):
        for axis, image in zip(line, np.asarray(shown, np.float32), strict=False):
            axis.imshow(as_rgb(image), interpolation='nearest')
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=9)
    _save(fig, path)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, C) as something that can be shown: one channel is repeated, of more than three the first are taken."""
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else image[..., :3]


def _padded(number: re.Match) -> str:
    return number[0].zfill(6)


def _index(name: str) -> int:
    return int(name.rsplit('/', 1)[1])
