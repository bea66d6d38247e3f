"""Many short trainings in memory, compared: `python -m mto_jax.study --config=configs/study_<name>.py`.

The grid is variants x budgets x seeds of `config.study`. Each run is a pre-training with the main job's method,
objective and step (`in_memory.py`), probed a few times on the way. Its rows go to `<workdir>/table.csv` once it is
done; a run that is in the table is not run again, and one that was stopped resumes at its last evaluation. Several
machines take shares of one grid (`config.study.index` of `config.study.count`); their tables are concatenated.
`python -m mto_jax.analysis.study_report` makes tables and pictures of such tables.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mto_jax import checkpoint, cli, cpu, in_memory, parallel, train_state
from mto_jax.data import memory, order
from mto_jax.errors import UserError
from mto_jax.evals import features, finetune, frozen

FREE_FIELDS = ('seed', 'workdir', 'checkpoint', 'task', 'compare', 'checkpoints', 'log_every', 'log_images', 'mesh')
FREE_FIELDS += ('hosts', 'allow_cpu', 'report')  # what does not shape a run
BASELINE = 'baseline'  # the variant that others are compared with
COLUMNS = (
    'config',  # fingerprint of everything that shaped the run
    'method',
    'variant',
    'seed',
    'budget',  # epochs of the run's own full schedule
    'epoch',  # at which it was evaluated; the budget's own is its final value
    'linear',  # accuracies, shares of one
    'knn',
    'finetune',  # the accuracy after it; at the end only
    'reconstruction',  # the method's own loss on evaluation images under fixed masks
    'het',  # heterogeneity per block as `mto.diagnosis` has it, at the end only
    'step_seconds',  # of training, all seeds of the dispatch together
)


def grid(config: ConfigDict) -> Iterator[tuple[str, float, tuple[int, ...], ConfigDict]]:
    """(variant, budget, seeds, config) of every run; budgets ascend, so that the cheap ones come first.

    Only runs of the largest budget are evaluated on their way: the others are there for their final values.

    Raises:
      UserError: for a variant that names an unknown field or gives it a value of another type.
    """
    study = config.study
    size = max(1, study.seeds_at_once)
    groups = [tuple(study.seeds[i : i + size]) for i in range(0, len(study.seeds), size)]
    budgets = sorted(study.budgets) or [config.epochs]
    for seeds, budget, name in itertools.product(groups, budgets, study.variants):
        setup = ConfigDict(config.to_dict()).lock()
        try:
            setup.update(study.variants[name].to_dict())
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(f'study.variants.{name}: {" ".join(str(e.args[0]).split())}') from None
        if budget < budgets[-1]:
            setup.study.evaluations = 1
        share = budget / setup.epochs
        setup.epochs = float(budget)
        setup.optim.warmup_epochs *= share
        setup.optim.decay_epochs = tuple(e * share for e in setup.optim.decay_epochs)
        yield name, budget, seeds, setup


def run(config: ConfigDict, workdir: os.PathLike) -> Path:
    """Run what of the grid is not in the table yet; returns the table's path. `workdir` is a local folder.

    Raises:
      UserError: for a bad grid or config, before anything is trained.
    """
    study = config.study
    if BASELINE not in study.variants or not study.seeds:
        raise UserError(f'study.variants must name one {BASELINE!r}, and study.seeds at least one')
    if not 0 <= study.index < study.count:
        raise UserError(f'study.index is {study.index}; it must be from 0 to study.count - 1 ({study.count - 1})')
    cpu.keep_memory()
    data = config.data
    train = memory.load(data, data.train_split)
    test = memory.load(data, data.val_split if study.split == 'val' else data.test_split)
    jobs = list(grid(config))
    for setup in {fingerprint(s): s for *_, s in jobs}.values():
        # A bad variant stops here, not hours later.
        training = in_memory.prepare(setup, train[0])
        features.encoder(training.job.objective.method, setup)
        if setup.finetune.epochs:
            finetune.steps(setup.finetune, len(train[0]))
    workdir = Path(workdir)  # tables are appended to, which buckets cannot do
    workdir.mkdir(parents=True, exist_ok=True)
    table = workdir / 'table.csv'
    if table.exists():
        _columns(table)  # rows could not be added, hours later
    mine = jobs[study.index :: study.count]
    for number, (variant, budget, seeds, setup) in enumerate(mine, 1):
        mark = fingerprint(setup)
        missing = tuple(s for s in seeds if (mark, str(s)) not in done(table))
        print(f'[{number}/{len(mine)}] {config.method} {variant}, {budget:g} epochs, seeds {list(seeds)}', flush=True)
        if not missing:
            print('  in the table', flush=True)
            continue
        place = workdir / 'runs' / f'{mark}_{missing[0]}'
        from_zero = variant == BASELINE and budget == jobs[-1][1]
        rows = _train(setup, missing, train, test, place, from_zero)
        about = {'config': mark, 'method': setup.method, 'variant': variant, 'budget': budget}
        append(table, [about | r for r in rows])
        shutil.rmtree(place)
    return table


def _train(config, seeds, train, test, place: Path, from_zero: bool) -> list[dict]:
    """Rows of one run: every seed at every evaluation, the untrained network included where `from_zero`.

    Resumes what `place` holds: `rows.json` is written after the checkpoints of its last rows.
    """
    training = in_memory.prepare(config, train[0])
    objective = training.job.objective
    evaluate = _evaluator(training.job, config, train, test)
    notes = place / 'rows.json'
    rows = json.loads(notes.read_text()) if notes.exists() else []
    start = rows[-1]['step'] if rows else 0
    for path in place.glob('seed*/checkpoints/*'):
        if not start or (path.name.isdigit() and int(path.name) > start):
            shutil.rmtree(path)  # saved, but its rows are not
    states = [training.create(s) for s in seeds]
    savers = [checkpoint.Checkpointer(place / f'seed{s}', keep=2, entries=states[0].model_state) for s in seeds]
    if start:
        abstract = checkpoint.abstract_like(states[0], parallel.replicated(parallel.make_mesh(1)))
        states = [s.restore(abstract, start) for s in savers]
    elif from_zero:
        rows = [{'seed': s, 'step': 0} | evaluate(x, False) for s, x in zip(seeds, states, strict=True)]
    begin = in_memory.stack(states)

    total, count = training.job.total, config.study.evaluations
    stops = [round(total * (i + 1) / count) for i in range(count)]
    begun = time.perf_counter()
    for step, states, terms in training.train(begin, seeds, start, [s for s in stops if s > start]):
        jax.block_until_ready(states)
        seconds, last = (time.perf_counter() - begun) / (step - start), step == total
        fresh = []
        for i, s in enumerate(seeds):
            fresh.append({'seed': s, 'step': step, 'step_seconds': seconds})
            fresh[i] |= evaluate(in_memory.take(states, i), last)
            savers[i].save(in_memory.take(states, i), config.to_dict(), step, {})
        if last and config.finetune.epochs:
            tuned = finetune.accuracies(objective.method, states.params, seeds, train, test, config)
            fresh = [r | {'finetune': t} for r, t in zip(fresh, tuned, strict=True)]
        rows += fresh
        for s in savers:
            s.wait()
        notes.write_text(json.dumps(rows))
        shown = ' '.join(f'{k} {v.mean():.4g}' for k, v in terms.items() if k not in ('param_norm', 'learning_rate'))
        probes = ' '.join(f'{k} {np.mean([r[k] for r in fresh]):.4f}' for k in ('linear', 'knn'))
        print(
            f'  step {step}/{total} | {probes} | {shown} | {seconds:.3f} s a step, '
            f'ETA {seconds * (total - step):.0f} s',
            flush=True,
        )
        start, begun = step, time.perf_counter()
    for s in savers:
        s.close()
    return [r | {'epoch': r['step'] / total * config.epochs} for r in rows]


def _evaluator(training, config, train, test):
    """`evaluate(state, last) -> {'linear', 'knn', 'reconstruction', 'het'}`; NaN if features are unusable."""
    mesh, encode = parallel.make_mesh(1), features.encoder(training.objective.method, config)
    part = order.subset(len(train[0]), config.eval.train_examples or len(train[0]))
    diagnose = jax.jit(training.diagnose)
    shown, key = test[0][order.subset(len(test[0]), 2000)], train_state.stream(0, 'diagnose')

    def evaluate(state, last):
        arrays = []
        for examples in ((train[0][part], train[1][part]), test):
            batches = memory.batches(*examples, config.eval.batch_size)
            arrays += features.extract(encode, features.weights(state, config.eval), batches, mesh)
        if not all(features.usable(x).all() for x in arrays[::2]):
            return dict.fromkeys(('linear', 'knn', 'reconstruction'), float('nan'))
        found = frozen.accuracies(arrays, config.eval, config.data.num_classes)
        seen = jax.device_get(diagnose(state, shown, key))
        return {
            'linear': found['linear'],
            'knn': found[f'knn_{config.eval.knn_k[-1]}'],
            'reconstruction': float(sum(seen['losses'].values())),
            'het': ' '.join(f'{v:.3f}' for v in seen['blocks']['het']) if last else None,
        }

    return evaluate


def fingerprint(config: ConfigDict) -> str:
    """Eight characters that differ where two runs would: of the config without seed, names and grid."""
    fields = config.to_dict()
    for name in FREE_FIELDS:
        fields.pop(name)
    fields['study'] = {k: fields['study'][k] for k in ('evaluations', 'split')}
    fields['data']['data_dir'] = ''
    del fields['data']['on_error']  # images in memory are decoded
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def done(table: Path) -> set[tuple[str, str]]:
    """(fingerprint, seed) of the runs in a table."""
    return {(r['config'], r['seed']) for r in read(table)} if table.exists() else set()


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline='') as f:
        return list(csv.DictReader(f))


def _columns(table: Path) -> Sequence[str]:
    with table.open(newline='') as f:
        columns = next(csv.reader(f), COLUMNS)  # none yet: another process is about to write them
    if missing := [c for c in COLUMNS if c not in columns]:
        raise UserError(
            f'{table} has no column {", ".join(missing)}; rows of a study need {", ".join(COLUMNS)}: add what is '
            'missing to the table, or use another --workdir'
        )
    return columns


def append(table: Path, rows: Sequence[dict]) -> None:
    """Add rows under the table's own column names, in one write, so that several processes can share a table.

    Raises:
      UserError: for a table that lacks one of COLUMNS.
    """
    with contextlib.suppress(FileExistsError), table.open('x') as f:
        f.write(','.join(COLUMNS) + '\n')
    columns = _columns(table)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator='\n')
    for row in rows:
        cells = (row.get(c) for c in columns)
        writer.writerow([f'{v:.5g}' if isinstance(v, float) else v for v in cells])
    with table.open('a') as f:
        f.write(lines.getvalue())


if __name__ == '__main__':
    cli.start(run)
