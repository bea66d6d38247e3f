"""Probes on a frozen encoder: the heads, LARS and batch normalisation against numpy, the tasks from end to end."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from configs import attentive, base, dense, linear_lars
from mto_jax import tasks
from mto_jax.data import augment
from mto_jax.errors import UserError
from mto_jax.models.heads import Probe
from mto_jax.runtime import parallel
from mto_jax.tasks import pretrained as pretrained_task
from mto_jax.tasks import supervised
from mto_jax.training import optim, probing, train_state
from tests.conftest import NOWHERE, named, randomised
from tests.training.conftest import check_resumed, cut_down

CLASSES = 10


@pytest.fixture
def config(pretrained):
    return cut_down(linear_lars.get_config(), pretrained)


def standardised(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-6)


def head64(kind, params, tokens, group, running=None, pool='mean', heads=2):
    """Logits and batch moments in float64, token by token."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(tokens, np.float64)
    if kind == 'linear':
        x = (x[:, 0] if pool == 'class' else x[:, 1:].mean(1))[:, None]
        if pool == 'fc_norm':
            x = standardised(x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True))
    elif kind == 'dense':
        x = x[:, 1:]
    moments = {}
    if running is None:
        parts = x.reshape(-1, group * x.shape[1], x.shape[2])
        moments = {'mean': parts.mean(1).mean(0), 'var': parts.var(1, ddof=1).mean(0)}
        parts = standardised(parts, parts.mean(1, keepdims=True), parts.var(1, keepdims=True))
        x = parts.reshape(x.shape)
    else:
        x = standardised(x, *(np.asarray(running[k], np.float64) for k in ('mean', 'var')))
    if kind == 'attentive':
        out = []
        for image in x:
            gathered = []
            for h in range(heads):
                keys, values = (image @ p['pool'][f'{n}_kernel'][:, h] for n in ('key', 'value'))
                w = np.exp(keys @ p['pool']['query'][h] / np.sqrt(keys.shape[1]))
                gathered.append(w / w.sum() @ values)
            out.append(np.concatenate(gathered))
        x = np.array(out)[:, None]
    x = x @ p['linear']['kernel'] + p['linear']['bias']
    return (x if kind == 'dense' else x[:, 0]), moments


@pytest.mark.parametrize('kind', ['linear', 'attentive', 'dense'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_heads_against_float64(rng, kind, dtype):
    """In training, over groups of three images, and with running moments; tokens of either dtype."""
    pool = rng.choice(['class', 'mean', 'fc_norm'])
    head = Probe(kind, 5, 1, pool, 2)
    tokens = jnp.asarray(rng.normal(2, 3, (6, 9, 8)), dtype)
    params = randomised(jax.eval_shape(lambda: head.init(jax.random.key(0), tokens, 3))['params'], rng)
    running = {'mean': rng.normal(size=8), 'var': rng.uniform(0.5, 2, 8)}
    for given in (None, running):
        logits, moments = head.apply({'params': params}, tokens, 3, given)
        want, statistics = head64(kind, params, tokens.astype(jnp.float32), 3, given, pool)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, want, atol=2e-5 * np.abs(want).max())
        assert moments.keys() == statistics.keys()
        for name, value in statistics.items():
            np.testing.assert_allclose(moments[name], value, rtol=1e-4, atol=1e-5)


def test_lars_against_numpy(rng):
    """The rate multiplies what leaves the momentum; vectors have no trust ratio or decay; nothing divides by zero."""
    c = base.get_config().optim
    c.name, c.weight_decay, c.trust_coefficient = 'lars', 0.1, 0.02
    rates = rng.uniform(0.1, 1, 5)
    tx = optim.build(c, lambda step: jnp.asarray(rates, jnp.float32)[step])
    params = {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3), 'zero': np.zeros((2, 2))}
    got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state, momentum = tx.init(got), jax.tree.map(np.zeros_like, params)
    for rate in rates:
        g = {n: rng.normal(size=p.shape) for n, p in params.items()}
        updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, got)
        got = optax.apply_updates(got, updates)
        for n, p in params.items():
            d = g[n]
            if p.ndim > 1:
                d = d + 0.1 * p
                length = np.linalg.norm(p), np.linalg.norm(d)
                d = d * (0.02 * length[0] / length[1] if min(length) > 0 else 1.0)
            momentum[n] = 0.9 * momentum[n] + d
            params[n] = p - rate * momentum[n]
    for n, p in params.items():
        np.testing.assert_allclose(got[n], p, rtol=1e-5, atol=1e-6)


@pytest.mark.peers
def test_lars_and_batch_norm_against_torch(rng):
    """The official order of operations written with torch; the running statistics after three batches."""
    torch = pytest.importorskip('torch', reason='torch is not installed (requirements-peers.txt)')
    norm = torch.nn.BatchNorm1d(7, affine=False, eps=1e-6)
    linear = torch.nn.Linear(7, 4)
    head = Probe('linear', 4, 0, 'mean', 1)
    params = {'linear': {'kernel': linear.weight.detach().numpy().T, 'bias': linear.bias.detach().numpy()}}
    params, running = jax.tree.map(jnp.array, params), {'mean': jnp.zeros(7), 'var': jnp.ones(7)}
    c = base.get_config().optim
    c.name, c.weight_decay = 'lars', 0.0
    tx = optim.build(c, optax.constant_schedule(3.0))
    state, buffers = tx.init(params), {}
    for _ in range(3):
        x, y = rng.normal(1, 2, (12, 7)).astype(np.float32), rng.integers(0, 4, 12)

        def loss(p, x=x, y=y):
            logits, moments = head.apply({'params': p}, x[:, None], 12)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), moments

        grads, moments = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        running = jax.tree.map(lambda a, b: a + probing.RUNNING_RATE * (b - a), running, moments)
        linear.zero_grad()
        torch.nn.functional.cross_entropy(linear(norm(torch.tensor(x))), torch.tensor(y)).backward()
        with torch.no_grad():
            for p in linear.parameters():
                d = p.grad
                if p.ndim > 1:
                    d = d * (0.001 * p.norm() / d.norm())
                buffers[p] = d.clone() if p not in buffers else buffers[p].mul(0.9).add(d)
                p.sub_(3.0 * buffers[p])
    np.testing.assert_allclose(params['linear']['kernel'].T, linear.weight.detach(), atol=1e-5)
    np.testing.assert_allclose(params['linear']['bias'], linear.bias.detach(), atol=1e-5)
    np.testing.assert_allclose(running['mean'], norm.running_mean, atol=1e-5)
    np.testing.assert_allclose(running['var'], norm.running_var, rtol=1e-5)


def plan(config, **fields):
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return supervised.plan(config, NOWHERE)


def steps(planned, count, rng):
    """The state after so many steps on random images, and the last one's mean terms."""
    training, d = planned.job, planned.config.data
    with jax.set_mesh(planned.mesh):
        state = planned.fresh(training.sharding(planned.mesh))
        step, constants = training.step(planned.mesh), training.objective.constants
        for _ in range(count):
            batch = {
                'image': rng.integers(0, 256, (planned.config.batch_size, *d.image_size, d.channels), np.uint8),
                'label': rng.integers(0, CLASSES, planned.config.batch_size).astype(np.int32),
            }
            placed = parallel.put_batch(batch, planned.mesh)
            meter = train_state.Meter.empty(training.names)
            state, meter = step(state, meter, constants, placed, train_state.stream(0, 'train'))
    return jax.device_get(state), jax.device_get(meter)


def test_depths_learn_side_by_side_as_alone(config, rng):
    """Heads at two depths, from equal starts, end where each ends by itself; the encoder is not trained."""
    seed, found = int(rng.integers(2**31)), {}
    for depths in ((1,), (2,), (1, 2)):
        planned = plan(config, eval__depths=depths, data__flip=False, accumulate=2)
        objective = planned.job.objective
        state = jax.device_get(jax.jit(planned.job.create)(0))
        assert set(state.params) == {'head'}
        same = jax.tree.map(np.copy, state.params['head']['depth1' if 1 in depths else 'depth2'])
        same = randomised(same, np.random.default_rng(3))
        heads = {name: jax.tree.map(jnp.array, same) for name in objective.names}  # each a copy of its own
        begun = train_state.begin({'head': heads}, state.model_state, planned.job.tx)
        planned = planned.__class__(
            **(vars(planned) | {'fresh': lambda sharding, s=begun: jax.device_put(s, sharding)})
        )
        state, meter = steps(planned, 3, np.random.default_rng(seed))
        for name in objective.names:
            own = state.params['head'][name], state.model_state['running'][name]
            if name in found:
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, found[name])
            found[name] = own
    assert {'depth1', 'depth2'} <= set(meter.sums)


def test_running_moments_over_groups_and_microbatches(config, rng):
    """Two microbatches of one group each: PyTorch's momentum on the mean of their moments, once per update."""
    planned = plan(config, accumulate=2, probe__group=16, data__flip=False, eval__depths=(2,))
    objective, d = planned.job.objective, planned.config.data
    seed = int(rng.integers(2**31))
    state, _ = steps(planned, 1, np.random.default_rng(seed))
    images = np.random.default_rng(seed).integers(0, 256, (32, *d.image_size, d.channels), np.uint8)
    x = augment.normalize(images, d.mean, d.std)
    (tokens,) = objective.method.encode(objective.constants, x, depth=(2,))
    features = np.asarray(tokens[:, 0], np.float64)  # the class token
    parts = features.reshape(16, 2, -1).swapaxes(0, 1)  # strided microbatches
    got = state.model_state['running']['depth2']
    np.testing.assert_allclose(got['mean'], 0.1 * parts.mean(1).mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got['var'], 0.9 + 0.1 * parts.var(1, ddof=1).mean(0), rtol=1e-4)


def test_it_goes_on_with_the_encoder_that_it_kept(config, pretrained, tmp_path, monkeypatch):
    """Where the pre-training has gone on and deleted the checkpoint that the probe began with."""
    run, probe = tmp_path / 'run', Path(os.path.relpath(tmp_path / 'probe'))
    shutil.copytree(pretrained, run)
    config.checkpoint = str(run)
    whole = tasks.run(config, probe)
    shutil.rmtree(probe / 'checkpoints' / '8')
    (run / 'checkpoints' / '2').rename(run / 'checkpoints' / '3')
    with pytest.raises(UserError, match=r'The former is gone.*--config\.resume_anyway=True'):
        tasks.run(config, probe)
    config.resume_anyway = True
    monkeypatch.setattr(pretrained_task.Pretrained, 'load', lambda *_: pytest.fail('it took another encoder'))
    assert tasks.run(config, probe) == whole | {'checkpoint': str(run / 'checkpoints' / '2')}
    shutil.rmtree(probe / 'constants')
    with pytest.raises(UserError, match=r'probe/constants cannot be read .* is gone; choose another --workdir'):
        tasks.run(config, probe)


@pytest.mark.parametrize('head', ['linear', 'attentive'])
def test_from_a_checkpoint_to_accuracy(pretrained, tmp_path, capsys, head):
    """It names the best depth, keeps the encoder once, and ends bitwise the same where it was stopped at step 4."""
    c = cut_down({'linear': linear_lars, 'attentive': attentive}[head].get_config(), pretrained)
    c.eval.depths = (1, 0)
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    out = tasks.run(c, whole)
    assert json.loads((whole / 'probe.json').read_text()) == out
    assert out['top1'] == max(out['top1_depth1'], out['top1_depth0']) == out[f'top1_depth{out["best_depth"]}']
    assert out['step'] == 8
    check_resumed(c, whole, part, out, capsys)


def test_scores_on_any_mesh_against_numpy(config, rng):
    """70 examples in batches of 32, each counted once, on 1 and 8 devices."""
    planned = plan(config)
    c, objective = planned.config, planned.job.objective
    with jax.set_mesh(planned.mesh):
        state = jax.device_get(jax.jit(planned.job.create)(0))
    state = state.replace(params=randomised(state.params, rng))
    found, seen = [], []
    images = rng.normal(size=(16, 28, 28, 1)).astype(np.float32)
    for shape in ((1, 1, 1), (8, 1, 1), (2, 4, 1)):
        mesh = parallel.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])

        def place(tree, mesh=mesh):
            return jax.device_put(tree, parallel.shardings(tree, mesh, objective.tensor_axes))

        with jax.set_mesh(mesh):
            placed, own = place(state), dataclasses.replace(objective, encoder=place(objective.encoder))
            training = dataclasses.replace(planned.job, objective=own)
            found.append(supervised.scores(training, placed, c, mesh, 'test[:70]'))
            arguments = placed.params, own.constants, parallel.put_batch({'image': images}, mesh)['image']
            seen.append(jax.jit(own.logits)(*arguments, placed.model_state['running'])[0]['depth0'])
    for other, logits in zip(found[1:], seen[1:], strict=True):
        assert other == pytest.approx(found[0], abs=1e-5)
        np.testing.assert_allclose(logits, seen[0], rtol=0, atol=1e-5 * np.abs(seen[0]).max())
    source = supervised.sources.open_source(c.data, 'test[:70]')
    batch = next(supervised.pipeline.eval_batches(source, c.data, 70))
    x = augment.normalize(batch['image'], c.data.mean, c.data.std)
    tokens = objective.method.encode(objective.constants, x)
    running, params = state.model_state['running']['depth0'], state.params['head']['depth0']
    logits, _ = head64('linear', params, tokens, 70, running, 'class')
    ranks = (logits > logits[np.arange(70), batch['label']][:, None]).sum(1)
    assert found[0]['top1'] == pytest.approx((ranks < 1).mean(), abs=1e-6)
    assert found[0]['top5'] == pytest.approx((ranks < 5).mean(), abs=1e-6)


def test_miou_against_numpy(rng):
    """Class by class from the pixels; ignored ones count for nothing, nor do classes that never occur."""
    truth, guess = rng.integers(-1, 4, (3, 8, 9)), rng.integers(0, 4, (3, 8, 9))
    pixels = np.asarray(probing.confusion(jnp.asarray(truth), jnp.asarray(guess), 6))
    assert pixels.sum() == (truth >= 0).sum()
    each = []
    for k in range(6):
        a, b = (truth == k), (guess == k) & (truth >= 0)
        if (a | b).any():
            each.append((a & b).sum() / (a | b).sum())
    got = probing.of_confusion(pixels)
    assert got['miou'] == pytest.approx(np.mean(each))
    assert got['pixel_accuracy'] == pytest.approx((truth == guess)[truth >= 0].mean())
    logits = rng.normal(size=(3, 8, 9, 4))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.maximum(truth, 0)[..., None], -1)[..., 0][truth >= 0].mean()
    got = probing.pixel_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(truth))
    assert float(got) == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """A folder of grey images with label maps: bright squares are class 1, dark ones class 2; a frame is ignored."""
    root, rng = tmp_path_factory.mktemp('scenes'), np.random.default_rng(5)
    for split, count in (('train', 64), ('val', 24)):
        for i in range(count):
            image, mask = np.full((56, 56), 120, np.uint8), np.full((56, 56), 1, np.uint8)
            for label, level in ((2, 250), (3, 10)):
                y, x = rng.integers(0, 36, 2)
                image[y : y + 20, x : x + 20], mask[y : y + 20, x : x + 20] = level, label
            mask[0] = 255
            mask[1] = 0
            for kind, pixels in (('images', image), ('masks', mask)):
                path = root / kind / split / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def on_scenes(scenes, pretrained):
    c = cut_down(dense.get_config(), pretrained)
    d = c.data
    d.name, d.data_dir, d.mask, d.mask_offset, d.num_classes = 'folder', f'{scenes}/images', f'{scenes}/masks', 1, 3
    d.train_split, d.val_split, d.test_split = 'train', 'val', 'val'
    return c


def test_dense_probe_learns(on_scenes, tmp_path):
    """A linear layer on the patches tells bright from dark squares; resumed, it ends bitwise the same."""
    on_scenes.epochs, on_scenes.checkpoints.every = 30.0, 20
    on_scenes.optim.base_lr, on_scenes.eval.every_epochs = 3e-2, 0.0
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    out = tasks.run(on_scenes, whole)
    assert out['miou'] > 0.6
    assert out['pixel_accuracy'] > 0.8
    shutil.copytree(whole, part)
    shutil.rmtree(part / 'checkpoints' / '60')
    assert tasks.run(on_scenes, part) == out


def test_label_maps_are_cropped_with_their_images(on_scenes):
    """Away from edges, a pixel's brightness says its label, however the two were cropped."""
    planned = supervised.plan(on_scenes, NOWHERE)
    batch = next(supervised.pipeline.train_batches(planned.source, planned.config.data, 32, 0, 0, 1))
    image, mask = batch['image'][..., 0].astype(int), batch['mask'][..., 0]
    assert mask.dtype == np.int32
    assert set(np.unique(mask)) == {-1, 0, 1, 2}
    for level, label in ((120, 0), (250, 1), (10, 2)):
        seen = mask[(image == level) & (mask >= 0)]
        assert (seen == label).mean() > 0.97
    test = next(supervised.pipeline.eval_batches(planned.source, planned.config.data, 32))
    assert (test['mask'][:, :1] == -1).all()
    assert (test['mask'][test['image'] == 250] == 1).mean() > 0.97


def test_check_reads_label_maps(on_scenes, scenes, tmp_path):
    maps = shutil.copytree(scenes / 'masks', tmp_path / 'masks')
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(maps / 'val' / '3.png')
    on_scenes.data.mask = str(maps)
    with pytest.raises(UserError, match='1 images cannot be decoded'):
        tasks.run(on_scenes, tmp_path / 'run', check=True)
    assert 'the label map has colours' in (tmp_path / 'run' / 'unreadable.txt').read_text()


@pytest.mark.parametrize(
    ('field', 'value', 'words'),
    [
        ('data.mask', '', r"data\.mask is ''"),
        ('data.mask', '/nowhere', r'data\.mask is ./nowhere.: 64 of 64 images have no label map'),
        ('data.randaugment', 'rand-m9', r'data\.randaugment is'),
        ('data.num_classes', 2, r'labels from data\.num_classes up'),
        ('probe.group', 5, r'probe\.group is 5'),
    ],
)
def test_bad_label_maps_are_named(on_scenes, tmp_path, field, value, words):
    on_scenes.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        tasks.run(on_scenes, tmp_path / 'run')


@pytest.mark.parametrize(
    ('field', 'value', 'words'),
    [
        ('optim.layer_decay', 0.5, r'optim\.layer_decay is 0\.5'),
        ('eval.balanced', True, r'eval\.balanced is True, which a linear probe does not use'),
        ('classify.mixup', 0.0, r'classify\.mixup is 0\.0, which a linear probe does not use'),
        ('probe.group', 3, r'probe\.group is 3 images; it must divide the 32'),
        ('eval.depths', (1, 1), r'eval\.depths is .*different'),
        ('eval.knn_k', (3,), r'eval\.knn_k is \(3,\), which a linear probe does not use'),
        ('probe.heads', 2, r'probe\.heads is 2, which a linear probe does not use'),
        ('eval.depth', 3, r'eval\.depth: 3 is too deep'),
        ('eval.depths', (3,), r'eval\.depths: 3 is too deep; the encoder has 2 blocks'),
        ('optim.name', 'sgd', r'optim\.name is .sgd.'),
        ('data.image_size', (30, 28), r'height 30 is not a multiple'),
    ],
)
def test_impossible_configs_are_refused_before_any_work(config, tmp_path, field, value, words):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        tasks.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_heads_do_not_split_over_a_tensor_mesh(config):
    """All heads and their optimizer state are copies: no pattern is missing at sizes that count."""
    planned = plan(config, probe__head='attentive')
    mesh = parallel.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    wide = jax.tree.map(lambda s: jax.ShapeDtypeStruct([n * 64 for n in s.shape], s.dtype), planned.job.shapes)
    for sharding in named(jax.tree.map(lambda s: str(s.spec), planned.job.sharding(mesh))).values():
        assert 'tensor' not in str(sharding)
    found = parallel.shardings(wide, mesh, planned.job.objective.tensor_axes)
    assert all('tensor' not in str(s.spec) for s in jax.tree.leaves(found))
