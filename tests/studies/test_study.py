"""Training in memory, the measures of speed on hand-worked curves, and a study from its grid to its report."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import study_cifar10, study_gpu, study_mae, study_mto, study_openclipart, study_quickstart, study_simmim
from mto_jax import methods
from mto_jax.data import memory, order
from mto_jax.errors import UserError
from mto_jax.studies import finetune, report, speed, study
from mto_jax.studies.table import COLUMNS, PER_BLOCK, append, read
from mto_jax.tasks import pretrain
from mto_jax.training import feed, job, train_state
from mto_jax.training.loop import Record, fit

INF, NAN = float('inf'), float('nan')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['mae', 'tests.toy_method'])
def test_in_memory_takes_the_steps_of_the_trainer(config, tmp_path, method, monkeypatch):
    """Two seeds, in dispatches over an epoch's end, against two runs of the main job; also with a teacher."""
    monkeypatch.setattr(feed, 'DISPATCH', 4)
    config.method = method
    config.data.crop, config.data.train_split = 'resize', 'train[:100]'
    config.mto.enabled, config.mto.recalibration, config.mto.w_e = True, 'ramp', 0.1
    config.epochs, config.optim.base_lr = 3.0, 0.01
    images, _ = memory.load(config.data, config.data.train_split)
    training = job.prepare(config, len(images))
    create = jax.jit(training.create)
    positions = partial(order.batch_positions, len(images), config.batch_size)
    resident = feed.Resident(training, {'image': images}, (4, 5), positions)

    class Terms(Record):
        logs, steps = (5,), []

        def interval(self, step, meter, waited):
            self.steps.append(step)
            assert all(np.isfinite(v).all() and v.shape == (2,) for v in meter.sums.values())

    states = fit(resident, feed.stack([create(s) for s in (4, 5)]), 0, training.total, record=Terms())
    assert Terms.steps == [5, training.total] == [5, 9]
    for i, seed in enumerate((4, 5)):
        config.seed = seed
        state = pretrain.run(config, tmp_path / str(seed))

        def compare(path, a, b):
            # A key bias has a gradient of exactly zero, whose rounding Adam blows up.
            if path[-1].key != 'k_bias':
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6, err_msg=str(path))

        mine = feed.take(states, i)
        jax.tree_util.tree_map_with_path(compare, mine.params, state.params)
        jax.tree_util.tree_map_with_path(compare, mine.model_state, state.model_state)


def test_rows_hold_the_blocks_of_every_stack(config):
    """Of a method with two: both."""
    config.method, config.data.crop = 'tests.toy_method', 'resize'
    images = memory.load(config.data, 'train[:64]')
    training = job.prepare(config, 64)
    state, key = jax.jit(training.create)(0), train_state.stream(0, 'diagnose')
    evaluate = study._evaluator(training, config, images, images)
    blocks = training.diagnose(state, images[0], key)['blocks']
    row = evaluate(state)
    for term in PER_BLOCK:
        want = np.concatenate([blocks[f'{term}.encoder'], blocks[f'{term}.predictor']])
        assert [float(v) for v in row[term].split()] == pytest.approx(list(want), rel=1e-3)


def test_in_memory_refuses_crops(config):
    with pytest.raises(UserError, match=r'data\.crop'):
        feed.require_whole(config, np.zeros((40, 28, 28, 1), np.uint8))


@pytest.mark.parametrize(
    ('split', 'want'),
    [
        ('train', (0, 50)),
        ('train[:10]', (0, 10)),
        ('train[40:]', (40, 50)),
        ('train[:90%]', (0, 45)),
        ('train[10%:20%]', (5, 10)),
    ],
)
def test_splits_of_arrays(config, tmp_path, split, want):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)
    np.savez(tmp_path / 'a.npz', train_image=images, train_label=np.arange(50))
    config.data.data_dir = str(tmp_path / 'a.npz')
    got, labels = memory.load(config.data, split)
    np.testing.assert_array_equal(labels, np.arange(*want))
    np.testing.assert_array_equal(got, images[slice(*want)])


def test_splits_of_arrays_are_joined(config, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)
    arrays = {'fold0_image': images[:20], 'fold1_image': images[20:], 'fold0_label': np.arange(20)}
    np.savez(tmp_path / 'a.npz', **arrays, fold1_label=np.arange(20, 50), classes=np.array(['x', 'y']))
    config.data.data_dir = str(tmp_path / 'a.npz')
    got, labels = memory.load(config.data, 'fold1+fold0[:10]')
    np.testing.assert_array_equal(labels, [*range(20, 50), *range(10)])
    np.testing.assert_array_equal(got, images[labels])
    with pytest.raises(UserError, match="no split 'fold2'; it has fold0, fold1"):
        memory.load(config.data, 'fold0+fold2')


@pytest.mark.parametrize(
    ('field', 'value', 'word'),
    [('data_dir', 'none.npz', 'none.npz'), ('channels', 3, r'\(28, 28, 3\)'), ('train_split', 'val', "'val'")],
)
def test_bad_arrays_are_named(config, tmp_path, field, value, word):
    np.savez(tmp_path / 'a.npz', train_image=np.zeros((5, 28, 28, 1), np.uint8), train_label=np.zeros(5))
    config.data.data_dir = str(tmp_path / 'a.npz')
    config.data[field] = value
    with pytest.raises(UserError, match=word):
        memory.load(config.data, config.data.train_split)


def test_arrays_of_a_tfds_data_set(config):
    images, labels = memory.load(config.data, 'test[:70]')
    assert images.shape == (70, 28, 28, 1)
    assert images.dtype == np.uint8
    assert set(labels) <= set(range(10))
    batches = list(memory.batches(images, labels, 32))
    np.testing.assert_array_equal(np.concatenate([b['image'][b['valid']] for b in batches]), images)
    assert {len(b['image']) for b in batches} == {32}


@pytest.mark.parametrize(
    ('values', 'target', 'want'),
    [
        ((0.6, 0.7, 0.8), 0.8, 1.0),
        ((0.6, 0.8, 0.9), 0.8, 0.5),
        ((0.6, 0.8, 0.9), 0.7, math.sqrt(2) / 4),  # half-way between E/4 and E/2 in log epochs
        ((0.8, 0.9, 0.9), 0.7, 0.25),
        ((0.6, 0.7, 0.8), 0.9, INF),
        ((0.6, math.nan, 0.8), 0.7, 0.5),  # half-way between E/4 and E
        ((math.nan, 0.9, 0.8), 0.85, 0.5),
        ((0.6, 0.9, 0.8), 0.85, 2 ** (-2 + 5 / 6)),
    ],
)
def test_epochs_to_match_by_hand(values, target, want):
    assert speed.epochs_to_match((1, 2, 4), values, target) == pytest.approx(want)


def test_testable_by_hand():
    """Gains 1, 2, 3: mean 2, standard error 1 / sqrt(3). Gains -1, 1: mean 0."""
    assert speed.testable([0, 0, 0], [1, 2, 3])
    assert not speed.testable([0, 0], [-1, 1])
    assert not speed.testable([0], [1])


def test_rauc_by_hand():
    """Above a start of 1, the baseline's area is 0.5 + 1.5 = 2, the method's 1 + 2 = 3."""
    assert speed.rauc((0, 1, 2), (2, 2, 4), (1, 2, 3), 1) == pytest.approx(3 / 2)
    assert speed.rauc((0, 1, 2), (1, 2, 3), (1, 2, 3), 1) == 1
    assert speed.rauc((0, 1, 2), (1, math.nan, 5), (1, 2, 3), 1) == pytest.approx(2)
    assert math.isnan(speed.rauc((0, 1), (1, math.nan), (1, 2), 1))


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)."""
    mean, half = speed.paired([2, 4, 6], [1, 2, 3])
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(speed.paired([2], [1])[1])


def test_match_interval_brackets_the_estimate():
    baseline = np.array([[0.6, 0.7, 0.8], [0.61, 0.71, 0.81], [0.59, 0.69, 0.79]])
    found = speed.match_interval((1, 2, 4), baseline + 0.1, baseline)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    assert speed.match_interval((1, 2, 4), baseline - 0.1, baseline) == (INF, INF, INF)

    assert speed.match_interval((1, 2, 4), baseline[:1], baseline[:1]) == pytest.approx((1, NAN, NAN), nan_ok=True)


def test_match_interval_by_hand():
    """Differences of -4, -2 at E/4, -1, 1 at E/2 and 3, 5 at E: t(0.975, 1) = 12.706 times 1 is more than any of them.

    With a tenth of the spread the upper ends are -1.73, 1.27 and 5.27, the lower ones -4.27, -1.27 and 2.73.
    """
    budgets, baseline, mean = (1, 2, 4), np.zeros((2, 3)), np.array([-3, 0, 4])
    spread = np.array([[-1.0], [1.0]])
    assert speed.match_interval(budgets, mean + spread, baseline) == pytest.approx((0.5, 0.25, INF))
    low, high = 2 ** (1.7294 / 3) / 4, 2 ** (1 + 1.2706 / 4) / 4
    found = speed.match_interval(budgets, mean + 0.1 * spread, baseline)
    assert found == pytest.approx((0.5, low, high), rel=1e-4)


def test_rauc_interval_by_hand():
    """Areas of 1.1 and 1.3 times the baseline's 1, of which each is left out once: 1.2 +- 12.706 * 0.1."""
    plain = np.array([[1.0, 3.0], [1.0, 3.0]])
    found = speed.rauc_interval((0, 1), plain + np.array([[0.1], [0.3]]), plain, 1.0)
    assert found == pytest.approx((1.2, 1.2 - 1.27062, 1.2 + 1.27062), rel=1e-5)
    assert speed.rauc_interval((0, 1), plain[:1], plain[:1], 1.0) == pytest.approx((1, NAN, NAN), nan_ok=True)


def test_intervals_of_rauc_cover_the_truth(rng):
    """Five seeds, 500 times: a share that is 95% but for its own deviation of one point."""
    base = 1 + 0.1 * rng.normal(size=(500, 5, 1)) + np.zeros(3)
    other = 1.2 + 0.1 * rng.normal(size=(500, 5, 1)) + np.zeros(3)
    ends = [speed.rauc_interval((1, 2, 4), m, b, 0.0)[1:] for m, b in zip(other, base, strict=True)]
    assert 0.90 < np.mean([low < 1.2 < high for low, high in ends]) < 0.99


@pytest.mark.parametrize(
    ('values', 'full', 'want'),
    [
        # Of a baseline with .700, .702, .704 at E/2. The t quantile of three seeds is 4.303.
        ((0.718, 0.720, 0.722), (0.718, 0.720, 0.722), 'reproduced'),
        ((0.716, 0.718, 0.720), (0.718, 0.720, 0.722), 'reproduced'),  # 0.2 points behind, without spread
        ((0.714, 0.716, 0.718), (0.718, 0.720, 0.722), 'partly'),  # 0.4 behind, 1.4 ahead
        ((0.718, 0.720, 0.722), (0.722, 0.720, 0.718), 'partly'),  # equal, by +-1.0; 1.8 ahead
        ((0.700, 0.702, 0.710), (0.718, 0.720, 0.722), 'not'),  # 0.2 ahead, by +-0.9
        ((0.718, 0.720, 0.722), (0.702, 0.704, 0.706), 'not testable'),  # it gains 0.2 points
        ((0.718, 0.720, NAN), (0.718, 0.720, 0.722), 'diverged'),
    ],
)
def test_verdict_by_hand(values, full, want):
    assert speed.verdict(values, (0.700, 0.702, 0.704), full) == want


@pytest.fixture
def two_runs(config):
    """A grid of two variants with two seeds at once, of the smallest model."""
    config.model.depth = config.mae.decoder_depth = 1
    config.data.crop, config.data.train_split = 'resize', 'train[:200]'
    config.optim.base_lr = 0.01
    config.finetune.epochs, config.finetune.optim.warmup_epochs, config.finetune.batch_size = 1.0, 0.0, 8
    c = config.study
    c.variants = {'baseline': {}, 'mto': {'mto': {'enabled': True, 'recalibration': 'exclude'}}}
    c.seeds, c.seeds_at_once, c.evaluations, c.split = (0, 1), 2, 2, 'test'
    return config


@pytest.mark.pictures
def test_a_study_end_to_end(two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feed, 'DISPATCH', 4)
    table = study.run(two_runs, epath.Path(tmp_path))  # as the command line passes it
    rows = read(table)
    # Two variants x two seeds x two evaluations, and the untrained networks of the baseline's run.
    assert len(rows) == 2 * 2 * 2 + 2
    assert all(0 < float(r['linear']) <= 1 and float(r['reconstruction']) > 0 for r in rows)
    final = [r for r in rows if r['epoch'] == r['budget']]
    assert len(final) == 4
    assert all(float(r['finetune']) > 0 and len(r['het'].split()) == 1 for r in final)

    shown = capsys.readouterr().out
    # Progress at every fourth step, and with the accuracies where they are measured.
    assert [shown.count(f'  step {step}/12 |') for step in (4, 6, 8, 12)] == [2, 2, 2, 2]
    assert shown.count('linear') == 4
    monkeypatch.setattr(study, '_train', None)
    study.run(two_runs, tmp_path)
    assert capsys.readouterr().out.count('in the table') == 2
    assert read(table) == rows

    monkeypatch.setattr('sys.argv', ['report', str(tmp_path)])
    report.main()
    assert '| mto | 2 |' in (tmp_path / 'table.md').read_text()
    assert (tmp_path / 'table.png').stat().st_size > 10_000


@pytest.mark.parametrize('value', [0.0, math.nan])
@pytest.mark.parametrize('which', [0, 1])
def test_unusable_features_are_a_row_of_nan(two_runs, monkeypatch, value, which):
    """Of training or test images: the study goes on."""
    data = memory.load(two_runs.data, 'train[:40]'), memory.load(two_runs.data, 'test[:40]')
    real, calls = study.features.collect, []

    def broken(*args):
        found = real(*args)
        if len(calls) == which:
            found = found.replace(x=found.x.at[0, 3].set(value))
        calls.append(1)
        return found

    monkeypatch.setattr(study.features, 'collect', broken)
    training = job.prepare(two_runs, 40)
    row = study._evaluator(training, two_runs, *data)(training.create(0))
    assert len(calls) == 2
    assert all(math.isnan(row[k]) for k in ('linear', 'knn', 'reconstruction'))


def test_fine_tuning_of_a_diverged_seed_is_nan(two_runs):
    """The other seed has its accuracy."""
    data = memory.load(two_runs.data, 'train[:200]'), memory.load(two_runs.data, 'test[:40]')
    training = job.prepare(two_runs, 200)
    good = training.create(0).params
    params = feed.stack([good, jax.tree.map(lambda x: x * jnp.nan, good)])
    found = finetune.accuracies(training.objective.method, params, (0, 1), *data, two_runs)
    assert 0 < found[0] <= 1
    assert math.isnan(found[1])


def test_evaluations_see_all_classes(two_runs, monkeypatch):
    """Of images that lie class by class, for the probes and for the reconstruction."""
    two_runs.eval.train_examples = 60
    train, test = (
        (np.arange(n, dtype=np.uint32).view(np.uint8).reshape(n, 2, 2, 1), np.arange(n) * 10 // n) for n in (600, 4000)
    )
    labels, shown = [], []

    def collect(encode, params, batches, mesh):
        labels.append(np.concatenate([b['label'][b['valid']] for b in batches]))
        found = jnp.asarray(labels[-1])[None]
        return study.features.Bank(jnp.ones((*found.shape, 1)), found, found >= 0)

    def diagnose(self, state, images, key):
        shown.append(images)
        return {'losses': {'x': 0.0}, 'blocks': {}}

    monkeypatch.setattr(study.features, 'collect', collect)
    monkeypatch.setattr(job.Job, 'diagnose', diagnose)
    monkeypatch.setattr(study.jax, 'jit', lambda f: f)
    monkeypatch.setattr(study.frozen, 'accuracies', lambda *_: {'linear': 0.1, f'knn_{two_runs.eval.knn_k[-1]}': 0.1})
    training = job.prepare(two_runs, 600)
    study._evaluator(training, two_runs, train, test)(training.create(0))
    assert labels[0].tolist() == train[1][order.subset(600, 60)].tolist()
    positions = shown[0].reshape(-1, 4).copy().view(np.uint32)[:, 0]
    assert set(test[1][positions]) == set(range(10))


def test_a_teacher_is_fine_tuned_where_it_is_evaluated(two_runs, tmp_path, monkeypatch):
    two_runs.method, two_runs.eval.weights = 'tests.toy_method', 'teacher'
    two_runs.study.variants, two_runs.study.evaluations = {'baseline': {}}, 1
    weights, given, tuned = study.features.weights, [], []

    def remember(*args):
        given.append(weights(*args))
        return given[-1]

    monkeypatch.setattr(study.features, 'weights', remember)
    monkeypatch.setattr(study.finetune, 'accuracies', lambda _, p, seeds, *__: tuned.append(p) or [0.5] * len(seeds))
    study.run(two_runs, tmp_path)
    assert len(tuned) == 2  # of the untrained network, too
    assert all(any(p is g for g in given) for p in tuned)


@pytest.mark.pictures
def test_report_by_hand(tmp_path):
    """A method that is 2.5 points better everywhere, on a baseline that gains a point from budget to budget."""
    rows = []
    for variant, gain in (('baseline', 0.0), ('better, too', 0.025)):
        for i, budget in enumerate((1.0, 2.0, 4.0)):
            for seed in range(3):
                about = {'config': 'x', 'method': 'mae', 'variant': variant, 'seed': seed, 'budget': budget}
                for part in (0.5, 1.0):
                    value = 0.7 + 0.01 * i + gain + 0.001 * seed - 0.02 * (1 - part)
                    row = about | {'epoch': part * budget, 'linear': value, 'knn': value, 'reconstruction': 0.3}
                    rows.append(row | dict.fromkeys(PER_BLOCK, f'{part} 0.8') | {'step_seconds': 0.1 + gain})
    rows += [r | {'epoch': 0.0, 'linear': 0.6, 'knn': 0.6, 'het': None} for r in rows if r['variant'] == 'baseline']
    append(tmp_path / 'a.csv', rows)
    report.write(tmp_path / 'a.csv')
    text = (tmp_path / 'a.md').read_text()
    # It starts above where the baseline ends; areas over epochs 2 to 4, above .6: (.136 + .146) over (.111 + .121).
    assert f'| better, too | linear probe | at most 0.25 (at most 0.25 to at most 0.25) | {0.282 / 0.232:.2f} (' in text
    assert '| baseline | linear probe | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |' in text
    half = '| 3 | +1.5 ± 0.0 | +2.5 ± 0.0 | +1.0 ± 0.0 | reproduced |'
    assert f'| better, too | kNN | 2 for 4 {half}' in text
    assert f'| better, too | linear probe | 1 for 2 {half}' in text
    assert '| better, too | 3 | 74.6 | +2.5 ± 0.0 | 74.6 | +2.5 ± 0.0 | 0.3000 |' in text
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ('a.png', 'a_blocks.png'))
    # Without a run of E/2 there is nothing that tells whether the baseline still learns.
    (tmp_path / 'a.csv').unlink()
    longer = [r | {'budget': 3.0, 'epoch': 1.5 * r['epoch']} if r['budget'] == 2 else r for r in rows]
    append(tmp_path / 'a.csv', [r for r in longer if r['budget'] != 1])
    report.write(tmp_path / 'a.csv')
    text = (tmp_path / 'a.md').read_text()
    assert '| better, too | kNN | not testable |' in text
    assert '### Half the epochs' not in text  # a heading of nothing
    # The claim itself needs no run of the method with all epochs.
    (tmp_path / 'a.csv').unlink()
    append(tmp_path / 'a.csv', [r for r in rows if (r['variant'], r['budget']) != ('better, too', 4.0)])
    report.write(tmp_path / 'a.csv')
    assert f'| better, too | kNN | 2 for 4 {half}' in (tmp_path / 'a.md').read_text()
    # One seed that was measured at the end only: it counts there, and not in the areas.
    (tmp_path / 'a.csv').unlink()
    append(tmp_path / 'a.csv', [r for r in rows if r['seed'] != 2 or r['epoch'] == r['budget']])
    report.write(tmp_path / 'a.csv')
    text = (tmp_path / 'a.md').read_text()
    assert f' | {0.281 / 0.231:.2f} (' in text
    assert '| better, too | 3 | 74.6 |' in text
    # A second baseline, 3 points better at the first budget and 1 point worse at the others: what counts is the better.
    shift = {1.0: 0.03, 2.0: -0.01, 4.0: -0.01}
    second = [r | {'variant': 'baseline, slower', 'linear': r['linear'] + shift[r['budget']]} for r in rows]
    append(tmp_path / 'a.csv', [r for r, o in zip(second, rows, strict=True) if o['variant'] == 'baseline'])
    report.write(tmp_path / 'a.csv')
    text = (tmp_path / 'a.md').read_text()
    assert '| better, too | 3 | 72.6 | -0.5 ± 0.0 |' in text  # at the first budget
    assert '| better, too | 3 | 74.6 | +2.5 ± 0.0 |' in text  # at the last
    assert '| baseline | 3 | 70.1 | -3.0 ± 0.0 |' in text
    assert '| baseline, slower | linear probe | at most 0.25 (at most 0.25 to at most 0.25) |' in text


def test_report_of_another_config_and_of_a_baseline_that_diverged(tmp_path, monkeypatch, capsys):
    about = {'config': 'x', 'method': 'mae', 'budget': 1.0, 'epoch': 1.0, 'reconstruction': 0.3}
    rows = [about | {'variant': v, 'seed': s, 'linear': x} for v, x in (('baseline', NAN), ('a', 0.7)) for s in (0, 1)]
    append(tmp_path / 'a.csv', rows)
    report.write(tmp_path / 'a.csv')
    text = (tmp_path / 'a.md').read_text()
    assert '| a | 2 | 70.0 | diverged |' in text
    assert '| baseline | 2 | nan |' in text
    append(tmp_path / 'a.csv', [rows[-1] | {'config': 'y', 'seed': 2}])
    monkeypatch.setattr('sys.argv', ['report', str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    assert "a.csv has runs of two configs for 'a', 1 epochs (x and y" in capsys.readouterr().err
    (tmp_path / 'a.csv').unlink()
    append(tmp_path / 'a.csv', rows[-1:])
    with pytest.raises(UserError, match=r"a\.csv has no run of 'baseline'"):
        report.write(tmp_path / 'a.csv')


def test_two_definitions_of_heterogeneity_are_never_mixed(tmp_path, monkeypatch):
    """Rows added to an older table go under its names, and each definition has a panel of its own."""
    table = tmp_path / 'a.csv'
    columns = list(COLUMNS)
    columns.insert(columns.index('het'), 'het_own')
    table.write_text(','.join(columns) + '\n')
    about = {'config': 'x', 'method': 'mae', 'linear': 0.7, 'knn': 0.6, 'reconstruction': 0.3, 'step_seconds': 0.1}
    for budget in (1.0, 2.0):
        for variant, column in (('baseline', 'het'), ('older', 'het_own'), ('newer', 'het')):
            for seed, het in enumerate(('0.9 0.8 0.7', '0.7 0.6 0.5')):
                row = about | {'variant': variant, 'seed': seed, 'budget': budget, 'epoch': budget, column: het}
                append(table, [row])
    rows = read(table)
    assert {(r['variant'], bool(r['het']), bool(r['het_own'])) for r in rows} == {
        ('baseline', True, False),
        ('older', False, True),
        ('newer', True, False),
    }
    figures = []
    monkeypatch.setattr(report.Figure, 'savefig', lambda self, *_, **__: figures.append(self))
    report.write(table)
    panels = {a.get_title(): {n.get_label(): n.get_ydata() for n in a.get_lines()} for a in figures[0].axes}
    shown = [{k: list(v) for k, v in panels[t].items() if len(v)} for t in report.HETEROGENEITY.values()]
    mean = pytest.approx([0.8, 0.7, 0.6])
    assert shown == [{'baseline': mean, 'newer': mean}, {'older': mean}]
    assert '`het_own`' in table.with_suffix('.md').read_text()


def test_a_table_without_a_column_is_refused(two_runs, tmp_path):
    (tmp_path / 'table.csv').write_text(','.join(c for c in COLUMNS if c != 'het') + '\n')
    with pytest.raises(UserError, match=r'table\.csv has no column het'):
        study.run(two_runs, tmp_path)


@pytest.mark.slow
def test_a_stopped_study_resumes(two_runs, tmp_path, monkeypatch):
    """Killed while the second evaluation is saved: the run goes on from the first, to the same rows."""
    two_runs.study.variants = {'baseline': {}}
    whole = read(study.run(two_runs, tmp_path / 'whole'))

    real, calls = study.checkpoint.Checkpointer.wait, []

    def killed(self):
        calls.append(self)
        if len(calls) == 3:  # a checkpoint of each of two seeds, twice
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(study.checkpoint.Checkpointer, 'wait', killed)
    with pytest.raises(KeyboardInterrupt):
        study.run(two_runs, tmp_path / 'part')
    assert not (tmp_path / 'part' / 'table.csv').exists()
    steps = {int(p.name) for p in (tmp_path / 'part').glob('runs/*/seed*/checkpoints/*')}
    (rows,) = (tmp_path / 'part').glob('runs/*/rows.json')
    assert len(steps) == 2
    assert {r['step'] for r in json.loads(rows.read_text())['rows']} == {0, min(steps)}
    monkeypatch.setattr(study.checkpoint.Checkpointer, 'wait', real)
    resumed = read(study.run(two_runs, tmp_path / 'part'))
    for row in (*whole, *resumed):
        row.pop('step_seconds')
    assert resumed == whole
    assert not list((tmp_path / 'part' / 'runs').iterdir())


def test_shares_of_a_grid_cover_it(two_runs, tmp_path, monkeypatch):
    seen = []

    def trained(config, seeds, train, test, place, from_zero):
        seen.append((config.epochs, config.mto.enabled, seeds))
        place.mkdir(parents=True, exist_ok=True)
        return []

    monkeypatch.setattr(study, '_train', trained)
    two_runs.study.budgets, two_runs.study.count = (0.4, 4.0), 3
    for two_runs.study.index in range(3):
        study.run(two_runs, tmp_path / str(two_runs.study.index))
    assert sorted(seen) == [(b, m, (0, 1)) for b in (0.4, 4.0) for m in (False, True)]


@pytest.mark.parametrize(
    ('variants', 'word'),
    [
        ({}, 'baseline'),
        ({'baseline': {'mto': {'w_x': 1.0}}}, 'w_x'),
        ({'baseline': {}, 'a': {'mask_ratio': 'x'}}, 'mask_ratio'),
        ({'baseline': {}, 'a': {'mask_ratio': 1.5}}, 'mask_ratio'),
        ({'baseline': {}, 'a': {'mto': {'enabled': True, 'rows': 'some'}}}, 'mto.rows'),
        ({'baseline': {}, 'a': {'eval': {'depth': 2}}}, 'eval.depth'),
        ({'baseline': {}, 'a': {'eval': {'features': 'class'}, 'model': {'class_token': False}}}, 'eval.features'),
        ({'baseline': {}, 'a': {'finetune': {'optim': {'warmup_epochs': 1.0}}}}, 'finetune.optim.warmup_epochs'),
        (
            {'baseline': {}, 'a': {'finetune': {'optim': {'warmup_epochs': 1.0}}}},
            r'--config\.finetune\.optim.* raise --config\.finetune\.epochs',
        ),
        (
            {'baseline': {}, 'a': {'finetune': {'optim': {'name': 'lars', 'layer_decay': 0.75}}}},
            r'finetune\.optim\.layer_decay is 0\.75',
        ),
        ({'baseline': {}, 'a': {'accumulate': 3}}, 'batch_size is .* accumulate'),
        ({'baseline': {}, 'a': {'data': {'image_size': (14, 14)}}}, 'data.image_size'),
        ({'baseline': {}, 'a': {'data': {'train_split': 'train[:50]'}}}, 'a sets data.train_split'),
        ({'baseline': {}, 'a': {'data': {'randaugment': 'rand-m9-mstd0.5-inc1'}}}, 'data.randaugment'),
        ({'baseline': {}, 'a': {'mask_ratio': 0.5}, 'b': {'mask_ratio': 0.5}}, 'b is the same run as a'),
    ],
)
def test_a_bad_grid_is_named(two_runs, tmp_path, monkeypatch, variants, word):
    two_runs.study.variants = variants
    monkeypatch.setattr(study, '_train', lambda *_: pytest.fail('it began to train'))
    with pytest.raises(UserError, match=word):
        study.run(two_runs, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    ('field', 'value', 'word'),
    [
        ('epochs', 0.0, r'epochs is 0\.0; it must be above 0'),
        ('seed', 1, r'seed is 1, which a study does not use.*study\.seeds'),
        ('checkpoint', 'a', r"checkpoint is 'a', which a study does not use.*init_from"),
        ('study.seeds', (), r'study\.seeds is \(\); it must be different values'),
    ],
)
def test_fields_that_no_study_has_are_named(two_runs, tmp_path, field, value, word):
    two_runs.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=word):
        study.run(two_runs, tmp_path / 'w')


@pytest.mark.parametrize(
    ('field', 'value', 'word'),
    [
        ('num_classes', 9, r"num_classes is 9, but the labels of 'train\[:200\]' go from 0 to 9"),
        ('train_split', 'train[200:]', r"split 'train\[200:\]' is empty; train of .* has 200 images"),
    ],
)
def test_bad_labels_and_splits_are_named_at_once(two_runs, tmp_path, monkeypatch, field, value, word):
    images, labels = memory.load(two_runs.data, two_runs.data.train_split)
    np.savez(tmp_path / 'a.npz', train_image=images, train_label=labels)
    two_runs.data.data_dir, two_runs.data.test_split = str(tmp_path / 'a.npz'), 'train[:50]'
    two_runs.data[field] = value
    monkeypatch.setattr(study, '_train', lambda *_: pytest.fail('it began to train'))
    with pytest.raises(UserError, match=word):
        study.run(two_runs, tmp_path / 'w')


def test_what_makes_a_run_another(two_runs, tmp_path, monkeypatch):
    """Other test images, and seeds of which there are rows but no final ones: not in the table."""
    seen = []

    def trained(config, seeds, train, test, place, from_zero):
        seen.append((config.study.split, seeds, place.name))
        place.mkdir(parents=True, exist_ok=True)
        found = {'linear': 0.5, 'knn': 0.5, 'reconstruction': 0.1}
        return [found | {'seed': s, 'epoch': config.epochs * (0.5 if s else 1)} for s in seeds]

    monkeypatch.setattr(study, '_train', trained)
    two_runs.study.variants, two_runs.study.seeds = {'baseline': {}}, (0, 2**32 - 1)
    study.run(two_runs, tmp_path)
    two_runs.data.test_split = 'test[:60]'
    study.run(two_runs, tmp_path)
    study.run(two_runs, tmp_path)
    assert [seeds for _, seeds, _ in seen] == [(0, 2**32 - 1), (0, 2**32 - 1), (2**32 - 1,)]
    assert len({name for *_, name in seen}) == 3


def test_budgets_scale_the_schedule(two_runs):
    two_runs.epochs, two_runs.optim.warmup_epochs, two_runs.optim.decay_epochs = 4.0, 0.4, (3.0,)
    two_runs.study.budgets = (2.0, 4.0)
    setups = {(n, b): s for n, b, _, s in study.grid(two_runs)}
    half = setups['mto', 2.0]
    assert (half.epochs, half.optim.warmup_epochs, half.optim.decay_epochs) == (2.0, 0.2, (1.5,))
    assert half.mto.enabled
    assert not setups['baseline', 2.0].mto.enabled
    assert study.fingerprint(half) != study.fingerprint(setups['mto', 4.0])
    assert (half.study.evaluations, setups['mto', 4.0].study.evaluations) == (1, 2)  # curves of the largest alone


STAGES = [(m, s) for m in (study_simmim, study_mae) for s in ('tune', 'explore', 'refine', 'confirm')]
STAGES += [(study_mto, f'{m},{s}') for m in study_mto.METHODS for s in study_mto.STAGES]
STAGES += [(module, m) for module in (study_gpu, study_cifar10) for m in study_mto.METHODS]
STAGES += [(study_cifar10, f'{m},{s}') for m in study_mto.METHODS for s in ('fading', 'apart')]
STAGES += [(study_openclipart, f'{m},{fold}') for m in ('mae', 'simmim') for fold in study_openclipart.FOLDS]


@pytest.mark.parametrize(
    ('module', 'stage'), [*STAGES, (study_simmim, 'halve'), (study_quickstart, 'bootmae'), (study_quickstart, 'conmim')]
)
def test_shipped_studies_are_valid(module, stage):
    """Every variant builds, and no two of a stage are the same."""
    config = module.get_config(stage)
    setups = [setup for *_, seeds, setup in study.grid(config) if seeds == config.study.seeds[:1]]
    for setup in setups:
        methods.build(setup)
    assert len({study.fingerprint(s) for s in setups}) == len(setups)
