"""The table of a study: one row per seed and evaluation, as CSV."""

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mto_jax.errors import UserError

BASELINE = 'baseline'  # the variant that others are compared with
# Terms of `mto.diagnosis`: a cell has the values of all blocks, one stack after another.
PER_BLOCK = ('het', 'het_token', 'rho', 'mass_used')
COLUMNS = (
    'config',  # fingerprint of everything that shaped the run
    'method',
    'variant',
    'seed',
    'budget',  # epochs of the run's own full schedule
    'epoch',  # at which it was evaluated; the budget's own is its final value
    'linear',  # accuracies, as fractions
    'knn',
    'finetune',  # the accuracy after it; at the end only, and of the untrained network
    # The method's own loss on evaluation images under fixed masks, without MTO's terms: in BootMAE the pixels' and the
    # features', whose target is the run's own teacher; in ConMIM the contrast.
    'reconstruction',
    *PER_BLOCK,
    'step_seconds',  # of training, all seeds of the dispatch together
    'commit',  # of the code that trained, see `environment.commit`
)


def done(table: Path) -> set[tuple[str, str]]:
    """(fingerprint, seed) of the runs in a table that have their final value."""
    rows = read(table) if table.exists() else ()
    return {(r['config'], r['seed']) for r in rows if float(r['epoch']) == float(r['budget'])}


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline='') as f:
        return list(csv.DictReader(f))


def columns(table: Path) -> Sequence[str]:
    """The names of a table's columns; raises UserError where one of COLUMNS is missing."""
    with table.open(newline='') as f:
        found = next(csv.reader(f), COLUMNS)  # none yet: another process is about to write them
    if missing := [c for c in COLUMNS if c not in found]:
        raise UserError(
            f'{table} has no column {", ".join(missing)}; rows of a study need {", ".join(COLUMNS)}: add what is '
            'missing to the table, or use another --workdir'
        )
    return found


def append(table: Path, rows: Sequence[dict]) -> None:
    """Add rows under the table's own column names, in one write, so that several processes can share a table.

    Raises:
      UserError: for a table that lacks one of COLUMNS.
    """
    with contextlib.suppress(FileExistsError), table.open('x') as f:
        f.write(','.join(COLUMNS) + '\n')
    names = columns(table)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator='\n')
    for row in rows:
        cells = (row.get(c) for c in names)
        writer.writerow([f'{v:.5g}' if isinstance(v, float) else v for v in cells])
    with table.open('a') as f:
        f.write(lines.getvalue())
