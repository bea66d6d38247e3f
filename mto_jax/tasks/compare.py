"""`config.task='compare'`: one pre-training with and one without MTO per seed, probed next to simple baselines."""

import json

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mto_jax import methods
from mto_jax.analysis import plots, report
from mto_jax.errors import UserError
from mto_jax.evals import features, probes
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import read_history, say
from mto_jax.runtime.workdir import write
from mto_jax.tasks import pretrain
from mto_jax.training import train_state


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, list[dict[str, float]]]:
    """Train and probe; writes `results.json`, `results.md` and pictures into workdir.

    Each run lies in `workdir/seed<s>/<name>`, where it resumes by itself. Test accuracies are in `results.json` as
    {row: one dict a seed}.

    Raises:
      UserError: for a bad config or missing data, before anything is probed or trained, and as `pretrain.run`.
    """
    if config.seed:
        raise UserError(
            f'seed is {config.seed}, which a comparison does not use: its seeds are --config.compare.seeds="(0,1,2)"'
        )
    for enabled in (False, True):
        plan = pretrain.plan(_setup(config, config.compare.seeds[0], enabled))
        probes.check(plan.job.objective.method, config, plan.mesh, config.data.test_split, task='a comparison')
    mesh = plan.mesh
    workdir = epath.Path(workdir)
    results: dict[str, list[dict[str, float]]] = {}
    folders = []

    def measure(name, encode, params, setup):
        say(f'probing {name} on {setup.data.test_split}')
        with jax.set_mesh(mesh):
            found = probes.probe(encode, params, setup, mesh, setup.data.test_split)
        results.setdefault(name, []).append(found)

    measure('raw pixels', features.raw_pixels, None, config)
    for seed in config.compare.seeds:
        for enabled in (False, True):
            setup = _setup(config, seed, enabled)
            method = methods.build(setup)
            encode = features.encoder(method, setup)
            name = f'{config.method} + MTO' if enabled else config.method
            if not enabled:
                key, everywhere = train_state.stream(seed, 'init'), parallel.replicated(mesh)
                params, _ = jax.jit(method.init, out_shardings=everywhere)(key)
                measure('random encoder', encode, params, setup)  # a teacher starts as the student
            say(f'--- {name}, seed {seed}')
            folders.append(workdir / f'seed{seed}' / (config.method + '_mto' * enabled))
            state = pretrain.run(setup, folders[-1])
            measure(name, encode, features.weights(state, setup.eval), setup)

    text = table(results, config.eval.knn_k[-1])
    if hosts.is_first():
        write(workdir / 'results.json', json.dumps(results, indent=2) + '\n')
        write(workdir / 'results.md', text)
        plots.curves(workdir / 'curves.png', {f'{p.parent.name}/{p.name}': read_history(p) for p in folders})
        report.finish(workdir, folders, results)
    say('\n' + text)
    say(f'table: {workdir}/results.md, curves: {workdir}/curves.png, pictures of each run: {workdir}/seed*/*')
    return results


def _setup(config, seed: int, enabled: bool) -> ConfigDict:
    """One pre-training's config."""
    setup = ConfigDict(config.to_dict())
    setup.task, setup.seed, setup.mto.enabled = 'pretrain', seed, enabled
    return setup


def table(results: dict[str, list[dict[str, float]]], k: int) -> str:
    """The mean of each row over its seeds, in percent, with the standard error of the mean from two seeds on."""
    lines = [f'| features | seeds | linear probe | kNN (k={k}) |', '|---|---|---|---|']
    order = sorted(results, key=lambda n: np.mean([r['linear'] for r in results[n]]))
    for name in order:
        cells = []
        for column in ('linear', f'knn_{k}'):
            values = 100 * np.array([r[column] for r in results[name]])
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
            cells.append(f'{values.mean():.1f}' + (f' ± {error:.1f}' if error is not None else ''))
        lines.append(f'| {name} | {len(results[name])} | {cells[0]} | {cells[1]} |')
    return '\n'.join(lines) + '\n'
