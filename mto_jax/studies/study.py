"""Many short runs in memory, compared: `python -m mto_jax.studies --config=configs/study_<name>.py`.

The grid is variants x budgets x seeds of `config.study`. Each run is a pre-training with the main job's method,
objective, step and loop, on arrays that lie on the device, evaluated a few times during training. Its rows go to
`<workdir>/table.csv` once it is done; runs already in the table are skipped, and one that was stopped resumes at
its last evaluation. Several machines divide a grid (`config.study.index` of `config.study.count`); their
tables are concatenated.
`python -m mto_jax.studies.report` makes tables and pictures of such tables.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mto_jax.config import FIELDS, check, values
from mto_jax.data import memory, order
from mto_jax.errors import UserError
from mto_jax.evals import features, frozen
from mto_jax.runtime import cpu, environment, parallel
from mto_jax.runtime.workdir import hold, read_json, write
from mto_jax.studies import finetune
from mto_jax.studies.table import BASELINE, PER_BLOCK, append, columns, done
from mto_jax.training import checkpoint, feed, job, train_state
from mto_jax.training.loop import Record, Seen, Watch, every, fit
from mto_jax.training.start import initialised

# Of `config.data`: which images lie in memory, and how they look there.
FROM_ARRAYS = ('name', 'data_dir', 'train_split', 'val_split', 'test_split', 'image_size', 'channels', 'num_classes')


def grid(config: ConfigDict) -> Iterator[tuple[str, float, tuple[int, ...], ConfigDict]]:
    """(variant, budget, seeds, config) of every run; budgets ascend, so that the cheap ones come first.

    Only runs of the largest budget are evaluated on their way: the others are there for their final values.

    Raises:
      UserError: for a variant that names an unknown field, gives it a value of another type, or has other images.
    """
    study = config.study
    size = study.seeds_at_once
    groups = [tuple(study.seeds[i : i + size]) for i in range(0, len(study.seeds), size)]
    budgets = sorted(study.budgets) or [config.epochs]
    for seeds, budget, name in itertools.product(groups, budgets, study.variants):
        setup = ConfigDict(config.to_dict()).lock()
        try:
            setup.update(study.variants[name].to_dict())
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(f'study.variants.{name}: {" ".join(str(e.args[0]).split())}') from None
        for field in FROM_ARRAYS:
            if setup.data[field] != config.data[field]:
                raise UserError(f'study.variants.{name} sets data.{field}; all variants have the images of the study')
        if budget < budgets[-1]:
            setup.study.evaluations = 1
        share = budget / setup.epochs
        setup.epochs = float(budget)
        setup.optim.warmup_epochs *= share
        setup.optim.decay_epochs = tuple(e * share for e in setup.optim.decay_epochs)
        yield name, budget, seeds, setup


def run(config: ConfigDict, workdir: os.PathLike) -> Path:
    """Run the missing part of the grid; returns the table's path. `workdir` is a local folder.

    Raises:
      UserError: for a bad grid or config, before anything is trained.
    """
    check(config)
    study = config.study
    if BASELINE not in study.variants:
        raise UserError(f'study.variants must name one {BASELINE!r}; the configs of studies are configs/study_*.py')
    for field, cure in (
        ('resume_from', 'a study resumes its own runs only (--workdir), and init_from starts them'),
        ('checkpoint', 'weights to start from are named by init_from'),
        ('seed', 'those of a study are study.seeds'),
    ):
        if config[field] != FIELDS[field].default:
            raise UserError(f'{field} is {config[field]!r}, which a study does not use: {cure}')
    if not 0 <= study.index < study.count:
        raise UserError(f'study.index is {study.index}; it must be from 0 to study.count - 1 ({study.count - 1})')
    if config.deterministic:
        environment.make_deterministic()
    cpu.keep_memory()
    train, test = _load(config)
    images, jobs = memory.digest(train, test), list(grid(config))
    _check(jobs, images, train[0])
    workdir = Path(workdir)  # tables are appended to, which buckets cannot do
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'table.csv'
    if path.exists():
        columns(path)  # rows could not be added, hours later
    mine = jobs[study.index :: study.count]
    for number, (variant, budget, seeds, setup) in enumerate(mine, 1):
        mark = fingerprint(setup, images)
        missing = tuple(s for s in seeds if (mark, str(s)) not in done(path))
        print(f'[{number}/{len(mine)}] {config.method} {variant}, {budget:g} epochs, seeds {list(seeds)}', flush=True)
        if not missing:
            print('  in the table', flush=True)
            continue
        run_dir = workdir / 'runs' / '_'.join([mark, *map(str, missing)])
        from_zero = variant == BASELINE and budget == jobs[-1][1]
        with hold(run_dir):
            rows = _train(setup, missing, train, test, run_dir, from_zero)
        about = {'config': mark, 'method': setup.method, 'variant': variant, 'budget': budget}
        about['commit'] = environment.commit()
        append(path, [about | r for r in rows])
        shutil.rmtree(run_dir)
    return path


def _load(config):
    """Images and labels to train on, and those to be measured by."""
    data = config.data
    splits = data.train_split, data.val_split if config.study.split == 'val' else data.test_split
    found = [memory.load(data, split) for split in splits]
    for split, (_, labels) in zip(splits, found, strict=True):
        if labels.min() < 0 or labels.max() >= data.num_classes:
            raise UserError(
                f'data.num_classes is {data.num_classes}, but the labels of {split!r} go from {labels.min()} to '
                f'{labels.max()} (-1: an image has none)'
            )
    return found


def _check(jobs, images: str, train: np.ndarray) -> None:
    """A bad variant stops here, not hours later."""
    seen = {}
    for name, _, _, setup in jobs:
        other, first = seen.setdefault(fingerprint(setup, images), (name, setup))
        if other != name:
            raise UserError(f'study.variants.{name} is the same run as {other}; leave one of them out')
        if first is not setup:  # other seeds
            continue
        feed.require_whole(setup, train)
        parallel.check_batch(setup.batch_size, setup.accumulate, parallel.make_mesh(1))
        method = job.prepare(setup, len(train)).objective.method
        features.encoder(method, setup)
        features.item(method, setup.eval)
        if setup.finetune.epochs:
            finetune.steps(setup.finetune, len(train))


def _train(config, seeds, train, test, run_dir: Path, from_zero: bool) -> list[dict]:
    """Rows of one run: every seed at every evaluation, the untrained network included where `from_zero`.

    Resumes what `run_dir` holds.
    """
    training = job.prepare(config, len(train[0]))
    total, count = training.total, config.study.evaluations
    create = jax.jit(training.create)
    fresh = [create(np.uint32(s)) for s in seeds]
    rows = Rows(run_dir, seeds, [round(total * (i + 1) / count) for i in range(count)], total, config, fresh[0])
    if rows.start:
        abstract = checkpoint.abstract_like(fresh[0], parallel.replicated(parallel.make_mesh(1)))
        fresh = [s.restore(abstract, rows.start) for s in rows.savers]
    elif config.init_from:
        fresh = [initialised(config, s) for s in fresh]

    evaluate = _evaluator(training, config, train, test)

    def probe(step, states):
        each = [evaluate(feed.take(states, i)) for i in range(len(seeds))]
        return Seen({name: [e[name] for e in each] for name in each[0]})

    def tune(step, states):
        method = training.objective.method
        weights = features.weights(states, config.eval)
        return Seen({'finetune': finetune.accuracies(method, weights, seeds, train, test, config)})

    watches = [Watch(probe, rows.saves, at_start=from_zero)]
    if config.finetune.epochs:
        watches.append(Watch(tune, at_start=from_zero))  # of fresh weights: training from scratch
    positions = partial(order.batch_positions, len(train[0]), config.batch_size)
    resident = feed.Resident(training, {'image': train[0]}, seeds, positions)
    with contextlib.closing(rows):
        fit(resident, feed.stack(fresh), rows.start, total, watches, rows)
    return [r | {'epoch': r['step'] / total * config.epochs} for r in rows.found]


class Rows(Record):
    """The record of one run of a study: a row per seed and evaluation, and a checkpoint per seed.

    `rows.json` is written after the checkpoints of its last rows; what was saved without its rows is deleted.

    Args:
      run_dir: the run's folder.
      seeds: trained side by side.
      stops: steps of the evaluations.
      total: steps.
      config: of the run.
      state: of one seed, for its entries.

    Attributes:
      start: the step to go on from.
      savers: of the seeds.
    """

    def __init__(self, run_dir: Path, seeds: Sequence[int], stops: Sequence[int], total: int, config, state):
        self.saves, self.logs = stops, sorted({*stops, *every(feed.DISPATCH, total)})
        self._seeds, self._total, self._config, self._notes = seeds, total, config, run_dir / 'rows.json'
        kept = read_json(self._notes)['rows'] if self._notes.exists() else []
        self._rows = {(r['step'], r['seed']): r for r in kept}
        self.start = max((step for step, _ in self._rows), default=0)
        for path in run_dir.glob('seed*/checkpoints/*'):
            if not self.start or (path.name.isdigit() and int(path.name) > self.start):
                shutil.rmtree(path)
        self.savers = [checkpoint.Checkpointer(run_dir / f'seed{s}', keep=2, entries=state.model_state) for s in seeds]

    @property
    def found(self) -> list[dict]:
        """All rows, in the order of their steps."""
        return list(self._rows.values())

    def interval(self, step, meter, waited):
        meter = jax.device_get(meter)  # waits for the steps
        seconds = (time.perf_counter() - self._start_time) / (step - self._from)
        shown = {n: (v / meter.count).mean() for n, v in meter.sums.items() if n not in ('param_norm', 'learning_rate')}
        self._line = f'{" ".join(f"{k} {v:.4g}" for k, v in shown.items())} | {seconds:.3f} s per step, '
        self._line += f'ETA {seconds * (self._total - step):.0f} s'
        if step in self.saves:
            self._add(step, {'step_seconds': [seconds] * len(self._seeds)})
        else:
            print(f'  step {step}/{self._total} | {self._line}', flush=True)

    def see(self, step, seen):
        self._add(step, seen.scalars)

    def save(self, state, score):
        step = int(state.step[0])
        for i, saver in enumerate(self.savers):
            saver.save(feed.take(state, i), self._config.to_dict(), None, {})
        for saver in self.savers:
            saver.wait()
        write(self._notes, json.dumps({'rows': self.found}))
        fresh = [self._rows[step, s] for s in self._seeds]
        probes = ' '.join(f'{k} {np.mean([r[k] for r in fresh]):.4f}' for k in ('linear', 'knn'))
        print(f'  step {step}/{self._total} | {probes} | {self._line}', flush=True)

    def restart(self, step):
        self._from, self._start_time = step, time.perf_counter()

    def close(self):
        for saver in self.savers:
            saver.close()

    def _add(self, step, values):
        for i, seed in enumerate(self._seeds):
            row = self._rows.setdefault((step, seed), {'seed': seed, 'step': step})
            row.update({name: each[i] for name, each in values.items()})


def _evaluator(training, config, train, test):
    """`evaluate(state)`: a row's accuracies, loss and terms per block; NaN and none if features are unusable."""
    mesh, encode = parallel.make_mesh(1), features.encoder(training.objective.method, config)
    part = order.subset(len(train[0]), config.eval.train_examples or len(train[0]))
    diagnose = jax.jit(training.diagnose)
    shown, key = test[0][order.subset(len(test[0]), 2000)], train_state.stream(0, 'diagnose')

    def evaluate(state):
        banks = []
        for examples in ((train[0][part], train[1][part]), test):
            batches = memory.batches(*examples, config.eval.batch_size)
            banks.append(features.collect(encode, features.weights(state, config.eval), batches, mesh))
        if not all(features.usable(bank).all() for bank in banks):
            return dict.fromkeys(('linear', 'knn', 'reconstruction'), float('nan')) | dict.fromkeys(PER_BLOCK)
        found = frozen.accuracies(*banks, config.eval, config.data.num_classes, mesh)
        seen = jax.device_get(diagnose(state, shown, key))
        row = {
            'linear': found['linear'],
            'knn': found[f'knn_{config.eval.knn_k[-1]}'],
            'reconstruction': float(sum(seen['losses'].values())),
        }
        for term in PER_BLOCK:
            stacks = (values for name, values in seen['blocks'].items() if name.split('.')[0] == term)
            row[term] = ' '.join(f'{v:.4g}' for v in itertools.chain(*stacks))
        return row

    return evaluate


def fingerprint(config: ConfigDict, images: str = '') -> str:
    """Eight characters that differ where two runs would: of the config without seed, names and grid.

    Args:
      images: `memory.digest` of those that it has.
    """
    own = ('study.evaluations', 'study.split')
    fields = {
        name: value
        for name, value in values(config)
        if name != 'seed' and (FIELDS[name].shapes_run or name.startswith(('eval.', 'finetune.')) or name in own)
    }
    return hashlib.sha256((json.dumps(fields, sort_keys=True) + images).encode()).hexdigest()[:8]
