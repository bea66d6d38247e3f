"""The model card that lies next to an export: what it is, what it was trained with, and what was measured."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from mto_jax.config import EVALUATIONS, FIELDS, values
from mto_jax.exchange.model import Weights
from mto_jax.exchange.targets import Export
from mto_jax.runtime.log import read_history

SHOWN = ('task', 'method', 'seed', 'epochs', 'batch_size', 'mask_ratio', 'checkpoint')  # fields, whatever their value


def card(export: Export, weights: Weights, source: Path, trained: bool) -> str:
    """README.md of an export.

    Args:
      source: the checkpoint or file that it was made of.
      trained: it is a checkpoint of a training.
    """
    a, c = weights.method.arch, weights.config
    head = f'; classifier of {c.data.num_classes} classes' if weights.head else ''
    lines = [
        f'# {export.name}',
        '',
        f'A Vision Transformer of {a.depth} blocks, width {a.width} and {a.heads} heads, patches of {a.patch_size} '
        f'pixels, images of {a.image_size[0]} x {a.image_size[1]} with {a.channels} channels{head}. '
        f'Converted by mto_jax (`python -m mto_jax.convert`) from `{source}`.',
        '',
        '```python',
        "folder = '.'  # where this file lies",
        export.load,
        '```',
        '',
        f'Pixels in [0, 1] are normalised: mean {_listed(c.data.mean)}, standard deviation {_listed(c.data.std)}.',
    ]
    if export.left_out:
        lines += ['', f'Not in this export: {", ".join(export.left_out)}.']
    unknown = ['Weights from a file, which does not say how they were trained and what they reach.']
    lines += ['', '## Training', '', *(_training(weights) if trained else unknown)]
    if trained:
        lines += ['', '## Results', '', *_results(source)]
    if weights.notes:
        lines += ['', '## Notes', '', *(f'- {note}' for note in weights.notes)]
    return '\n'.join(lines) + '\n'


def _listed(numbers) -> str:
    return ', '.join(f'{n:g}' for n in numbers)


def _training(weights) -> list[str]:
    """The config, in the fields that say something of this run."""
    c = weights.config
    used = {c.method, 'classify' if c.task == 'finetune' else c.method}
    groups = {'mae', 'simmim', 'bootmae', 'conmim', 'classify', 'probe'} - used  # of other methods and tasks
    rows = [
        f'| `{name}` | `{value}` |'
        for name, value in values(c)
        if (name in SHOWN or (FIELDS[name].shapes_run and value != FIELDS[name].default))
        and name.split('.')[0] not in groups
        and not isinstance(value, ConfigDict)
    ]
    return ['What differs from the defaults of mto_jax:', '', '| field | value |', '|---|---|', *rows]


def _results(checkpoint: Path) -> list[str]:
    """What the workdir says of this very checkpoint: the newest measures of its history, and its report."""
    workdir, step = checkpoint.parent.parent, int(checkpoint.name)
    newest: dict[str, tuple[int, float]] = {}
    for row in read_history(workdir):
        if row['step'] <= step:
            newest |= {n: (row['step'], v) for n, v in row.items() if n == 'loss' or n.startswith('val_')}
    rows = [f'| {name} at step {at} | {value:.4f} |' for name, (at, value) in sorted(newest.items())]
    for path in (workdir / f'{name}.json' for name in EVALUATIONS):
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get('step') == step:
            rows += [
                f'| {k} on {found["split"]} ({path.name}) | {v:.4f} |' for k, v in found.items() if isinstance(v, float)
            ]
    if not rows:
        return ['None lie next to the checkpoint: the quality of these weights is not known.']
    return ['As the workdir has them, of one run.', '', '| measure | value |', '|---|---|', *rows]
