"""Probes against independent forms, and evaluations of a checkpoint."""

import importlib
import itertools
import json
import math
import re
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from configs import base
from mto_jax import cli, methods, tasks
from mto_jax.analysis import report
from mto_jax.data import memory
from mto_jax.errors import UserError
from mto_jax.evals import features, frozen, knn, logistic
from mto_jax.runtime import parallel
from mto_jax.studies import finetune
from mto_jax.tasks import pretrain, pretrained
from mto_jax.training import checkpoint, feed, optim
from tests.conftest import shrink


def clusters(rng, n, classes=4, dim=6, noise=1):
    centres = np.random.default_rng(3).normal(size=(classes, dim)) * 2
    y = rng.integers(0, classes, n)
    return (centres[y] + noise * rng.normal(size=(n, dim))).astype(np.float32), y.astype(np.int32)


def bank(x, labels, mesh, size=64):
    """Precomputed features, float32 (n, D), in batches of `size`."""
    return features.collect(lambda params, found: found, None, memory.batches(x, labels, size), mesh)


def knn_accuracy(x, y, q, t, *, axes=(1, 1, 1), size=64, **options):
    """`knn.accuracy` of arrays, split over a mesh."""
    mesh = parallel.make_mesh(*axes)
    return knn.accuracy(bank(x, y, mesh, size), bank(q, t, mesh, size), mesh=mesh, **options)


def np_knn(train, labels, test, k, temperature, classes):
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    out = []
    for q in test:
        s = train @ (q / np.linalg.norm(q))
        votes = np.zeros(classes)
        for i in np.argsort(-s)[:k]:
            votes[labels[i]] += np.exp((s[i] - s.max()) / temperature)
        out.append(votes.argmax())
    return np.array(out)


def test_knn_against_numpy(rng):
    (x, y), (q, t) = clusters(rng, 200), clusters(rng, 301)
    got = knn_accuracy(x, y, q, t, ks=(1, 5, 20, 999), temperature=0.07, num_classes=4)
    for k in (1, 5, 20, 200):
        want = (np_knn(x.astype(float), y, q.astype(float), k, 0.07, 4) == t).mean()
        assert got[k if k < 200 else 999] == pytest.approx(want, abs=2 / 301)


def test_balanced_accuracies_against_numpy(rng):
    """The mean of each class's own, of classes that are not as many; a class without test examples does not count."""
    (x, y), (q, t) = clusters(rng, 300), clusters(rng, 400)
    kept = (t != 2) & ((t != 1) | (rng.random(400) < 0.2))
    q, t = q[kept], t[kept]

    def balanced(guesses):
        return np.mean([(guesses[t == c] == c).mean() for c in np.unique(t)])

    want = np_knn(x.astype(float), y, q.astype(float), 5, 0.07, 4)
    got = knn_accuracy(x, y, q, t, ks=(5,), temperature=0.07, num_classes=4, balanced=True)[5]
    assert got == pytest.approx(balanced(want), abs=1 / (t == 1).sum())
    assert features.accuracy_of(want, t, True) == pytest.approx(balanced(want))
    assert features.accuracy_of(want, t, False) == pytest.approx((want == t).mean())
    options = {'l2': (1e-2,), 'steps': 50, 'num_classes': 4}
    mean, std = x.mean(0), x.std(0) + 1e-6
    p = logistic.fit(jnp.asarray((x - mean) / std), jnp.asarray(y), 1e-2, 4, 50)
    guesses = np.asarray((q - mean) / std @ p['w'] + p['b']).argmax(1)
    got = logistic.accuracy(x, y, q, t, **options, balanced=True)[0]
    assert got == pytest.approx(balanced(guesses), abs=1 / (t == 1).sum())


@pytest.mark.parametrize('temperature', [0.003, 1e-4])
def test_knn_at_low_temperatures(rng, temperature):
    """Below 0.0113, exp(1 / temperature) is more than a float32 holds."""
    (x, y), (q, t) = clusters(rng, 200), clusters(rng, 300)
    got = knn_accuracy(x, y, q, t, ks=(20,), temperature=temperature, num_classes=4)
    want = (np_knn(x.astype(float), y, q.astype(float), 20, temperature, 4) == t).mean()
    assert got[20] == pytest.approx(want, abs=2 / 300)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_knn_depends_on_no_scale(rng, scale):
    (x, y), (q, t) = clusters(rng, 200), clusters(rng, 300)
    options = {'ks': (5,), 'temperature': 0.07, 'num_classes': 4}
    want = knn_accuracy(x, y, q, t, **options)[5]
    scaled = knn_accuracy(x * np.float32(scale), y, q * np.float32(scale), t, **options)[5]
    assert scaled == pytest.approx(want, abs=2 / 300)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
@pytest.mark.parametrize('which', ['training', 'test'])
def test_features_without_direction_are_an_error(rng, value, which):
    """Named by their position; for a linear probe zero is a value like others."""
    (x, y), (q, t) = clusters(rng, 50), clusters(rng, 60)
    (x if which == 'training' else q)[7, : None if value == 0 else 2] = value
    with pytest.raises(UserError, match=rf'1 of {50 if which == "training" else 60} {which} .* position 7'):
        knn_accuracy(x, y, q, t, ks=(5,), temperature=0.07, num_classes=4)
    options = {'l2': (1e-2,), 'steps': 20, 'num_classes': 4}
    if value == 0:
        assert logistic.accuracy(x, y, q, t, **options)[0] > 0.5
        return
    with pytest.raises(UserError, match=rf'{which} features are not finite, the first at position 7'):
        logistic.accuracy(x, y, q, t, **options)


# With 'tensor' several devices hold the same rows.
MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]


@pytest.mark.parametrize('axes', MESHES)
def test_knn_on_any_mesh_against_numpy(rng, axes):
    """Guess by guess; the last batch is partly padding, and k may be above the 30 rows of a device, and above all."""
    (x, y), (q, _) = clusters(rng, 203, noise=4), clusters(rng, 90, noise=4)
    guesses = []
    for k in (1, 20, 50, 999):
        guesses.append(np_knn(x.astype(float), y, q.astype(float), k, 1.0, 4))
        got = knn_accuracy(x, y, q, guesses[-1], axes=axes, size=40, ks=(k,), temperature=1.0, num_classes=4)
        assert got[k] == pytest.approx(1, abs=1 / 90)
    assert all((a != b).any() for a, b in itertools.pairwise(guesses))


@pytest.mark.peers
@pytest.mark.parametrize('axes', MESHES[:3])
def test_knn_against_scikit_learn(rng, axes):
    neighbors = pytest.importorskip(
        'sklearn.neighbors', reason='scikit-learn is not installed (requirements-peers.txt)'
    )
    (x, y), (q, _) = clusters(rng, 203, noise=4), clusters(rng, 90, noise=4)
    for k in (1, 20, 50):
        peer = neighbors.KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp(1 - d))
        want = peer.fit(x.astype(float), y).predict(q.astype(float))
        got = knn_accuracy(x, y, q, want, axes=axes, size=40, ks=(k,), temperature=1.0, num_classes=4)
        assert got[k] == pytest.approx(1, abs=1 / 90)


def test_rows_that_are_no_examples_do_not_count(rng):
    """Wherever they lie and whatever they hold: as if they were not there, and positions are those of examples."""
    mesh = parallel.make_mesh(8)
    options = {'ks': (1, 20, 999), 'temperature': 0.07, 'num_classes': 4, 'mesh': mesh}
    (x, y), (q, t) = clusters(rng, 203, noise=4), clusters(rng, 90, noise=4)
    train, test = bank(x, y, mesh, 40), bank(q, t, mesh, 40)
    gone = jnp.asarray(rng.random(train.valid.shape) < 0.3).at[0, 0].set(True)
    other = train.replace(
        x=jnp.where(gone[..., None], rng.choice([np.nan, 0, 1], (*gone.shape, 1)), train.x),
        labels=jnp.where(gone, 0, train.labels),
        valid=train.valid & ~gone,
    )
    kept = other.fetch()
    np.testing.assert_array_equal(kept[0], x[~np.asarray(gone).reshape(-1)[:203]])
    alone = bank(*kept, mesh, 40)
    want = knn.accuracy(alone, test, **options)
    assert knn.accuracy(other, test, **options) == pytest.approx(want, abs=1 / 90)
    want = knn.accuracy(test, alone, **options)
    assert knn.accuracy(test, other, **options) == pytest.approx(want, abs=1 / 90)
    last = int(np.flatnonzero(~np.asarray(gone).reshape(-1)[:203])[-1])
    zero = other.replace(x=other.x.at[last // 40, last % 40].set(0))
    with pytest.raises(UserError, match=rf'1 of {len(kept[1])} training .* position {len(kept[1]) - 1};'):
        knn.accuracy(zero, test, **options)


COLLECTIVE = r'= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\('


def moved(compiled):
    """The number of elements in each array that a program moves between devices."""
    shapes = [re.findall(r'\w+\[([\d,]*)\]', found) for found in re.findall(COLLECTIVE, compiled.as_text())]
    return [math.prod(int(n) for n in shape.split(',') if n) for found in shapes for shape in found]


@pytest.mark.parametrize('axes', MESHES[1:3])
def test_the_bank_stays_where_it_was_encoded(rng, axes, monkeypatch):
    """Every device holds its rows alone. Queries and candidates are moved, a batch at a time."""
    mesh = parallel.make_mesh(*axes)
    monkeypatch.setattr(features, 'JOINED', 4)
    (x, y), (q, t) = clusters(rng, 1000, dim=32), clusters(rng, 64, dim=32)
    train, test = bank(x, y, mesh, 40), bank(q, t, mesh, 16)
    assert train.x.shape == (25, 40, 32)
    for got, want in zip(train.fetch(), (x, y), strict=True):
        np.testing.assert_array_equal(got, want)
    for a in jax.tree.leaves(train):
        assert a.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, features.ROWS), a.ndim)
        assert {s.data.shape[:2] for s in a.addressable_shards} == {(25, 5)}
    part = jax.tree.map(lambda a: a[:1], train)
    assert not moved(features._joined.lower([part] * 3, mesh).compile())
    right = knn._right.lower(train, test, 0.07, ks=(1, 20), num_classes=4, mesh=mesh).compile()
    assert max(moved(right)) <= 16 * 32
    assert moved(right).count(16 * 32) == 1


def test_knn_fetches_no_features(config, rng, monkeypatch):
    (x, y), (q, t) = clusters(rng, 50), clusters(rng, 60)
    mesh = parallel.make_mesh(2)

    def reached(*_):
        raise AssertionError('they were fetched')

    monkeypatch.setattr(parallel, 'fetch', reached)
    banks = bank(x, y, mesh), bank(q, t, mesh)
    assert frozen.accuracies(*banks, config.eval, 4, mesh, ('knn',))['knn_5'] > 0.5
    with pytest.raises(UserError, match='num_classes is 3, but the labels go up to 3'):
        frozen.accuracies(*banks, config.eval, 3, mesh, ('knn',))
    with pytest.raises(AssertionError, match='they were fetched'):
        frozen.accuracies(*banks, config.eval, 4, mesh, ('linear',))


def test_raw_pixels_of_a_black_image_have_a_direction(rng):
    images = rng.integers(0, 256, (3, 4, 5, 1), np.uint8)
    images[1] = 0
    pixels = np.asarray(features.raw_pixels(None, images))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[[0, 2]], images[[0, 2]].reshape(2, -1) / 255, rtol=1e-6)
    np.testing.assert_allclose(pixels[1], 1 / 255, rtol=1e-6)


def test_linear_probe_is_at_the_optimum(rng):
    """The gradient of the penalised cross-entropy, written in numpy, vanishes at what L-BFGS returns."""
    x, y = clusters(rng, 300)
    x = (x - x.mean(0)) / x.std(0)
    p = {k: np.asarray(v, np.float64) for k, v in logistic.fit(x, y, 1e-2, 4, 300).items()}
    logits = x @ p['w'] + p['b']
    prob = np.exp(logits - logits.max(1, keepdims=True))
    prob /= prob.sum(1, keepdims=True)
    prob[np.arange(300), y] -= 1
    assert np.abs(x.T @ prob / 300 + 1e-2 * p['w']).max() < 1e-3
    assert np.abs(prob.mean(0)).max() < 1e-3


def test_linear_probe_separates_what_is_separable(rng):
    (x, y), (q, t) = clusters(rng, 500), clusters(rng, 400)
    acc, l2 = logistic.accuracy(x * 10 + 5, y, q * 10 + 5, t, l2=(1e-3, 1e3), steps=50, num_classes=4)
    nearest = (np_knn(x, y, q, 20, 0.07, 4) == t).mean()
    assert acc > nearest - 0.05
    assert l2 == 1e-3


@pytest.mark.parametrize('order', ['cycle', 'by class'])
def test_penalty_is_chosen_on_all_classes(order, monkeypatch):
    """The held-out tenth has each class in proportion, and the right one of two penalties is found with it."""
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(10), 100).astype(np.int32)
    y = y if order == 'cycle' else np.sort(y)
    centres = rng.normal(size=(10, 400)) * 0.15
    x, q = (centres[y] + rng.normal(size=(1000, 400)) for _ in range(2))
    real, fitted = logistic.fit, []

    def fit(x, labels, *args):
        fitted.append(np.bincount(labels, minlength=10).tolist())
        return real(x, labels, *args)

    monkeypatch.setattr(logistic, 'fit', fit)
    options = {'steps': 40, 'num_classes': 10}
    weak, strong = (logistic.accuracy(x, y, q, y, l2=(s,), **options)[0] for s in (1e-6, 1.0))
    assert strong > weak + 0.03
    fitted.clear()
    assert logistic.accuracy(x, y, q, y, l2=(1e-6, 1.0), **options) == (strong, 1.0)
    assert fitted == [[90] * 10, [90] * 10, [100] * 10]


def test_labels_are_required():
    batch = {'image': np.zeros((2, 4, 4, 1), np.uint8), 'label': np.array([-1, -1]), 'valid': np.array([True, True])}
    with pytest.raises(UserError, match='label'):
        features.collect(features.raw_pixels, None, iter([batch]), parallel.make_mesh(1))


def test_features_are_those_of_the_tokens(config, rng):
    """Mean of the patch tokens or the class token, after some blocks or all."""
    import jax

    from mto_jax import methods
    from mto_jax.data import augment

    method = methods.build(config)
    params = method.init(jax.random.key(0))[0]
    images = rng.integers(0, 256, (3, 28, 28, 1), np.uint8)
    x = augment.normalize(images, config.data.mean, config.data.std)
    for depth in (0, 1):
        tokens = np.asarray(method.encode(params, x, depth=depth or None))
        config.eval.depth = depth
        for kind, want in (('mean', tokens[:, 1:].mean(1)), ('class', tokens[:, 0])):
            config.eval.features = kind
            np.testing.assert_allclose(features.encoder(method, config)(params, images), want, atol=1e-5)


def test_layer_scales_by_hand(config):
    """Two blocks, decay 0.5: below them 1/8, then 1/4 and 1/2, the rest 1 (BEiT's rule)."""
    method = methods.build(config)
    encoder = method.init(jax.random.key(0))[0]['encoder']
    encoder['relative_bias_table'] = encoder['norm']['bias']
    outside = {'head': {'kernel': jnp.zeros(2)}, 'decoder': {'blocks': {'block0': jnp.zeros(2)}}}
    scales = optim.layer_scales({'encoder': encoder, **outside}, 0.5)
    assert set(jax.tree.leaves(scales['encoder']['patch_embed'])) == {0.125}
    assert scales['encoder']['cls_token'] == 0.125
    assert set(jax.tree.leaves(scales['encoder']['blocks']['block0'])) == {0.25}
    assert set(jax.tree.leaves(scales['encoder']['blocks']['block1'])) == {0.5}
    top = scales['encoder']['norm'], scales['encoder']['relative_bias_table'], scales['head'], scales['decoder']
    assert set(jax.tree.leaves(top)) == {1.0}
    tx = optim.adamw(config.optim.copy_and_resolve_references(), optax.constant_schedule(1.0))
    config.optim.layer_decay = 0.5
    by_layer = optim.adamw(config.optim, optax.constant_schedule(1.0))
    params = {'encoder': encoder}
    grads = jax.tree.map(jnp.ones_like, params)
    plain, _ = tx.update(grads, tx.init(params), params)
    scaled, _ = by_layer.update(grads, by_layer.init(params), params)
    want = jax.tree.map(lambda u, s: u * s, plain, optim.layer_scales(params, 0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, want)


def test_finetune_learns_from_few_labels(config):
    """Two seeds at once: well above chance, and the same as each alone."""
    config.finetune.epochs, config.finetune.label_share, config.finetune.batch_size = 15.0, 0.5, 16
    config.finetune.optim.base_lr, config.finetune.optim.warmup_epochs = 0.1, 1.0
    config.finetune.optim.layer_decay = 0.75
    config.data.train_split = 'train[:600]'
    train, test = memory.load(config.data, 'train[:600]'), memory.load(config.data, 'test[:200]')
    method = methods.build(config)
    params = [method.init(jax.random.key(s))[0] for s in (1, 2)]
    both = finetune.accuracies(method, feed.stack(params), (1, 2), train, test, config)
    assert min(both) > 0.4
    alone = finetune.accuracies(method, feed.stack(params[1:]), (2,), train, test, config)
    assert alone[0] == pytest.approx(both[1], abs=0.02)
    assert len(finetune.subset(600, 0.1, 3)) == 60
    assert (finetune.subset(600, 0.1, 3) != finetune.subset(600, 0.1, 4)).any()


def short_pretraining():
    """A model without a class token, and a shorter training split."""
    c = shrink(base.get_config())
    c.model.class_token, c.model.depth, c.epochs, c.optim.warmup_epochs = False, 1, 1.0, 0.0
    c.data.train_split, c.data.crop, c.diagnose_every = 'train[:64]', 'resize', 0
    return c


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The workdir of `short_pretraining`."""
    workdir = tmp_path_factory.mktemp('trained')
    pretrain.run(short_pretraining(), workdir)
    return workdir


def evaluation(trained, task='knn', **changes):
    """The config of an evaluation as a Python user sets it up."""
    c = importlib.import_module(f'configs.{task}').get_config()
    c.checkpoint, c.mesh.data = str(trained), 1
    c.eval.batch_size, c.eval.linear_steps = 32, 20
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.parametrize('task', ['knn', 'linear'])
@pytest.mark.parametrize(
    ('field', 'value', 'word'),
    [
        ('eval.features', 'class', 'model.class_token'),
        ('eval.features', 'max', 'eval.features'),
        ('eval.depth', 2, 'eval.depth: 2 is too deep'),
        ('eval.depths', (0, 2), 'eval.depths: 2 is too deep'),
        ('eval.batch_size', 33, 'eval.batch_size is 33'),
        ('mesh.data', 9, 'mesh'),
    ],
)
def test_bad_evaluations_stop_before_any_work(trained, tmp_path, monkeypatch, task, field, value, word):
    def reached(*_):
        raise AssertionError('it began to work')

    monkeypatch.setattr(checkpoint.Checkpointer, 'restore_item', reached)
    monkeypatch.setattr(features, 'collect', reached)
    config = evaluation(trained, task, **({'mesh.data': 2} | {field: value}))
    with pytest.raises(UserError, match=word):
        tasks.run(config, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def from_command_line(trained, *fields):
    """`evaluation` by the flags that main.py parses."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True)
    fields = (f'checkpoint={trained}', 'mesh.data=1', 'eval.batch_size=32', *fields)
    argv = ['main.py', '--config=configs/knn.py', *(f'--config.{f}' for f in fields)]
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as m:
        warnings.simplefilter('ignore', DeprecationWarning)  # of how ml_collections loads a file
        m.setattr(sys, 'argv', argv)  # where it looks for the fields
        values(argv)
    return holder.value


@pytest.mark.parametrize('surface', ['python', 'command line'])
def test_evaluations_read_the_split_they_are_given(trained, tmp_path, surface):
    """On the training split every image is its own nearest neighbour."""
    if surface == 'python':
        config = evaluation(trained)
        config.data.test_split = 'train[:64]'
    else:
        config = from_command_line(trained, 'data.test_split=train[:64]')
    found = tasks.run(config, tmp_path / 'train')
    assert (found['split'], found['knn_1']) == ('train[:64]', 1.0)
    recorded = tasks.run(evaluation(trained), tmp_path / 'recorded')
    assert recorded['split'] == 'test[:70]'
    assert recorded['knn_1'] < 0.9


def test_results_of_evaluations_are_kept_apart(trained, tmp_path, monkeypatch):
    """Unset, the workdir names the checkpoint; in one that is given, another's result stays as it is."""
    other = shutil.copytree(trained, tmp_path / 'runs' / 'seed0' / 'other')
    shutil.copytree(other / 'checkpoints' / '2', other / 'checkpoints' / '1')
    monkeypatch.chdir(tmp_path)

    def default(task, checkpoint, **fields):
        c = evaluation(checkpoint, task)
        c.update_from_flattened_dict({'eval.linear_steps': 200} | fields)
        return cli.default_workdir(task, c)

    assert re.fullmatch(r'runs/knn/[\w-]+_2', default('knn', trained))
    assert default('knn', other) == default('knn', 'runs/seed0/other/') == 'runs/knn/seed0_other_2'
    assert default('linear', 'runs/seed0/other/checkpoints/1') == 'runs/linear/seed0_other_1'
    assert default('finetune', other) == 'runs/finetune/seed0_other'
    assert cli.default_workdir('mae', base.get_config()) == 'runs/mae'
    changed = {'eval.depth': 1, 'eval.knn_k': (5, 7), 'data.test_split': 'train[:64]', 'eval.batch_size': 7}
    assert default('knn', other, **changed) == 'runs/knn/seed0_other_2_test_split=train-64_depth=1_knn_k=-5-7'
    assert default('knn', 'gs://bucket/runs/l/checkpoints/7') == 'runs/knn/gs_bucket_l_7'

    kept = tmp_path / 'w' / 'knn.json'
    kept.parent.mkdir()
    kept.write_text(json.dumps({'checkpoint': str(other)}))
    monkeypatch.setattr(features, 'collect', lambda *_: pytest.fail('it began to work'))
    with pytest.raises(UserError, match=rf"{kept} has the result of another checkpoint, '{other}'; .*--workdir"):
        tasks.run(evaluation(trained), kept.parent)
    assert json.loads(kept.read_text()) == {'checkpoint': str(other)}
    kept.write_text(json.dumps({'checkpoint': str(trained.resolve() / 'checkpoints/2'), 'data_dir': 'fold1'}))
    with pytest.raises(UserError, match=rf"{kept} has the result of another data_dir, 'fold1'; this one is"):
        tasks.run(evaluation(trained), kept.parent)


def test_the_best_of_several_depths_is_named(trained, tmp_path):
    """Each as it is found alone."""
    alone = {d: tasks.run(evaluation(trained, **{'eval.depth': d}), tmp_path / str(d)) for d in (0, 1)}
    found = tasks.run(evaluation(trained, **{'eval.depths': (1, 0)}), tmp_path / 'both')
    assert all(found[f'knn_20_depth{d}'] == alone[d]['knn_20'] for d in (0, 1))
    assert found['knn_20'] == max(a['knn_20'] for a in alone.values()) == alone[found['best_depth']]['knn_20']


def test_a_default_that_is_given_counts(trained, tmp_path):
    """The default test split of the schema, which these data do not have."""
    with pytest.raises(UserError, match="no split 'validation'"):
        tasks.run(from_command_line(trained, 'data.test_split=validation'), tmp_path / 'w')


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('model.size', 'ti'),
        ('model.depth', 2),
        ('data.channels', 3),
        ('data.mean', (0.5,)),
        ('epochs', 3.0),
        ('mto.enabled', True),
        ('seed', 1),
    ],
)
def test_evaluations_refuse_other_fields(trained, tmp_path, field, value):
    """By name, from Python and the command line; the checkpoint's own value is no contradiction."""
    for config in (evaluation(trained, **{field: value}), from_command_line(trained, f'{field}={value}')):
        with pytest.raises(UserError, match=rf'cannot set: {re.escape(field)} \(given'):
            tasks.run(config, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()
    full = short_pretraining()
    full.task, full.checkpoint = 'knn', str(trained)
    assert pretrained.find(full).config.task == 'knn'
    full.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=re.escape(field)):
        pretrained.find(full)


@pytest.fixture
def of_another_version(trained, tmp_path):
    """`trained`, as saved before some fields were added, with one that is gone and one of a method's own."""
    folder = shutil.copytree(trained, tmp_path / 'trained')
    for path in (*folder.glob('checkpoints/*/config/metadata'), folder / 'config.json'):
        config = json.loads(path.read_text())
        del config['model']['relative_bias'], config['probe'], config['accumulate'], config['eval']['depths']
        config['model']['rotary'], config['toy'] = True, {'far': 3}
        path.write_text(json.dumps(config))
    return folder


def test_checkpoints_of_another_version(trained, of_another_version, tmp_path, capsys):
    """What they lack has its default, and what is unknown is left out; both are named, once. A method's own is kept."""
    found = tasks.run(evaluation(of_another_version), tmp_path / 'w')
    shown = capsys.readouterr().out
    assert shown.count('fields it lacks have their defaults: model.relative_bias=False, accumulate=1\n') == 1
    assert shown.count('unknown fields are ignored: model.rotary=True\n') == 1
    assert found['knn_20'] == tasks.run(evaluation(trained), tmp_path / 'other')['knn_20']
    full = short_pretraining()
    full.task, full.checkpoint = 'knn', str(of_another_version)
    assert pretrained.find(full).config.accumulate == 1
    assert pretrained.find(full).config.toy.far == 3
    full.model.relative_bias = True
    with pytest.raises(UserError, match=r'cannot set: model\.relative_bias \(given True, there False\)'):
        pretrained.find(full)
    report.write_report(tmp_path / 'both', [trained, of_another_version])
    full = short_pretraining()
    with pytest.raises(UserError, match=r'model\.rotary: True there, None now'):
        pretrain.run(full, of_another_version)


def test_bad_values_of_evaluations_are_named(trained, tmp_path):
    with pytest.raises(UserError, match=r"data\.on_error is 'skip'; it must be"):
        tasks.run(evaluation(trained, **{'data.on_error': 'skip'}), tmp_path / 'w')


def test_advice_for_evaluations_works(trained, tmp_path, rng):
    """Other data of which an image is bad: each message's flag, followed, leads on; `--check` names the image."""
    for i in range(8):
        path = tmp_path / 'images' / ('train' if i < 5 else 'val') / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(path)
    path.write_bytes(b'not an image')
    given = ['data.name=folder', f'data.data_dir={tmp_path}/images', 'data.train_split=train', 'data.test_split=val']
    with pytest.raises(UserError, match='cannot decode') as e:
        tasks.run(from_command_line(trained, *given), tmp_path / 'w')
    advice = re.search(r'--config\.(data\.on_error=\w+)', str(e.value))[1]
    assert 0 <= tasks.run(from_command_line(trained, *given, advice), tmp_path / 'w')['knn_1'] <= 1
    with pytest.raises(UserError, match='1 images cannot be decoded'):
        tasks.run(from_command_line(trained, *given), tmp_path / 'w', check=True)
    assert tasks.run(from_command_line(trained), tmp_path / 'w', check=True) == []  # the checkpoint's own data


@pytest.mark.parametrize('task', ['finetune', 'linear_lars'])
def test_check_of_an_evaluation_that_trains(trained, tmp_path, rng, task):
    """Its own fields are no mistake; a bad image of its validation split is found."""
    for i in range(8):
        path = tmp_path / 'images' / ('train' if i < 4 else 'val') / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(path)
    path.write_bytes(b'not an image')
    c = importlib.import_module(f'configs.{task}').get_config('quickstart')
    c.checkpoint, c.mesh.data = str(trained), 1
    c.data.name, c.data.data_dir = 'folder', str(tmp_path / 'images')
    c.data.train_split, c.data.val_split, c.data.test_split = 'train', 'val', 'train'
    with pytest.raises(UserError, match='1 images cannot be decoded'):
        tasks.run(c, tmp_path / 'w', check=True)
