"""Training runs loaded from their workdirs, for plots and reports."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mto_jax.config import FIELDS
from mto_jax.errors import UserError
from mto_jax.runtime.hosts import flatten
from mto_jax.runtime.log import read_history
from mto_jax.runtime.workdir import read_json

# Logged terms that are no losses: what they are, and the unit of their axis.
MEASURED = {
    'learning_rate': ('of the optimizer', 'rate'),
    'grad_norm': ('length of the gradient, before clipping', 'L2 norm'),
    'param_norm': ('length of all parameters', 'L2 norm'),
    'model_state_norm': ('length of the model state', 'L2 norm'),
    'feature_weight': ('of the feature loss', 'weight'),
    'token_distance': ('of the mask token from the visible ones', 'standard deviations'),
    'matched': ('hidden patches whose own place is the likeliest', 'fraction'),
    'images_per_s': ('speed, averaged since the start or the last pause', 'images / s'),
    'mfu': ('speed, of the devices’ peak in matrix products', 'fraction'),
    'data_wait': ('time the loop waited for the input pipeline', 'fraction of the time'),
}
LOSSES = {
    'loss': 'all that is minimised, weighted',
    'reconstruction': 'of the hidden patches',
    'contrast': 'cross-entropy of each hidden patch’s own place, over all places of its image',
    'features': 'of the teacher, at the hidden patches, before its weight',
    'mto_spa': 'L_spa of MTO, before its weight',
    'mto_e': 'L_e of MTO, before its weight',
    'mto_r': 'L_r of MTO, before its weight',
}
# What must be the same for the term of two runs to be compared.
SAME_PROBE = ('data.name', 'data.data_dir', 'data.train_split', 'data.val_split', 'data.eval_resize')
SAME_PROBE += ('data.image_size', 'data.num_classes', 'data.mask', 'data.mask_offset', 'data.ignore_label')
SAME_PROBE += ('eval.train_examples', 'eval.weights', 'eval.depth', 'eval.features', 'eval.balanced')
SAME_PROBE += ('eval.knn_temperature', 'task', 'probe.head')
SAME_TARGET = ('method', 'mask_ratio', 'mae.norm_pix_loss', 'simmim.mask_unit', 'model.patch_size', 'data.name')
SAME_TARGET += ('bootmae.norm_pix_loss', 'bootmae.weight_patches')
SAME_TARGET += ('bootmae.block_patches', 'bootmae.block_area', 'bootmae.block_aspect')
SAME_TARGET += ('data.data_dir', 'data.train_split', 'data.image_size', 'data.crop', 'data.mean', 'data.std')
SAME_TARGET += ('data.crop_area', 'data.crop_aspect', 'data.interpolation', 'data.randaugment')


class Run:
    """What a workdir holds of a training.

    Attributes:
      name: of its folder, with as many parents as tell it from the other runs.
      config: {dotted field: value}.
      rows: of `metrics.jsonl`, ascending in step.
      about: {dotted name: value} of its code, versions and devices.
      picture: PNG of the reconstructions, or None.
    """

    def __init__(self, folder: epath.Path, name: str):
        self.name, self._path = name, folder / 'config.json'
        if not self._path.exists():
            raise UserError(f'report: {folder} is not the workdir of a run: it has no config.json')
        self.config = flatten(read_json(self._path))
        self.rows = read_history(folder)
        if not self.rows:
            raise UserError(f'report: {folder} has no metrics.jsonl yet; it is written at the first save')
        about, picture = folder / 'environment.json', folder / 'reconstructions.png'
        self.about = flatten(read_json(about)) if about.exists() else {}
        self.picture = picture.read_bytes() if picture.exists() else None

    def field(self, name: str) -> Any:
        """A config field; the default where the run is older than it."""
        if 'method' not in self.config:
            raise UserError(f'report: {self._path} has no field method; it is not the config of a run')
        return self.config.get(name, FIELDS[name].default)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged term."""
        rows = [r for r in self.rows if name in r]
        return [int(r['step']) for r in rows], [r[name] for r in rows]

    def last(self, name: str) -> float | None:
        """The newest value of a logged term."""
        return next((r[name] for r in reversed(self.rows) if name in r), None)

    def blocks(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,), and a diagnosed term over them and the blocks, float (n, blocks)."""
        rows = {int(r['step']): r for r in self.rows if f'block/{term}/0' in r}  # the newest where a step was repeated
        depth = sum(k.startswith(f'block/{term}/') for k in next(iter(rows.values()), ()))
        values = [[r.get(f'block/{term}/{i}', np.nan) for i in range(depth)] for r in rows.values()]
        return np.array([*rows]), np.array(values, float).reshape(len(rows), depth)


def load(folders: Sequence[epath.Path]) -> list[Run]:
    """The runs in these workdirs.

    Raises:
      UserError: if a folder holds no training or a file of it is damaged.
    """
    return [Run(f, name) for f, name in zip(folders, _names(folders), strict=True)]


def terms(runs: Sequence[Run]) -> list[str]:
    """Logged terms that make a curve, in the order in which they come."""
    names = dict.fromkeys(n for r in runs for row in r.rows for n in row if '/' not in n)
    return [n for n in names if n not in ('step', 'epoch', 'seconds_per_step')]


def measured(runs: Sequence[Run]) -> list[str]:
    """Terms that are no part of the objective: those in `MEASURED` (after a point a name may have that of a stack), and
    what else a watch found."""
    known = [n for name in MEASURED for n in terms(runs) if n.partition('.')[0] == name]
    by_step = {n for r in runs for row in r.rows if 'images_per_s' in row for n in row}
    return known + [n for n in terms(runs) if n not in known and n not in by_step and not n.startswith('val_')]


def losses(runs: Sequence[Run]) -> list[str]:
    """Terms of the objective; so is everything that a custom method logs."""
    others = measured(runs)
    names = [n for n in terms(runs) if n not in others and not n.startswith('val_')]
    return sorted(names, key=lambda n: [*LOSSES].index(n) if n in LOSSES else len(LOSSES))


def probes(runs: Sequence[Run]) -> list[str]:
    """Accuracies on the validation split."""
    return [n for n in terms(runs) if n.startswith('val_')]


def best(runs: Sequence[Run], term: str) -> Callable | None:
    """`min` or `max` where one run's value of the term can be better than another's."""
    same = {'reconstruction': SAME_TARGET}.get(term, SAME_PROBE if term.startswith('val_') else ())
    if not same or any(len({str(r.field(n)) for r in runs}) > 1 for n in same):
        return None
    return max if term.startswith('val_') and not term.startswith('val_loss') else min


def _names(folders):
    """Each folder's last name, with as many parents as make them all different."""
    for count in range(1, max(len(f.parts) for f in folders) + 1):
        names = ['/'.join(f.parts[-count:]) or str(f) for f in folders]
        if len(set(names)) == len(names):
            break
    return names
