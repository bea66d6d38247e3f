"""Fine-tuning of a checkpoint: the task from end to end, the objective against numpy, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from configs import finetune, knn
from mto_jax import tasks
from mto_jax.data import augment, sources
from mto_jax.errors import UserError
from mto_jax.methods import Clock
from mto_jax.runtime import parallel
from mto_jax.runtime.log import read_history
from mto_jax.tasks import supervised as task
from mto_jax.tasks.pretrained import find
from mto_jax.training import checkpoint, classify, optim, train_state
from mto_jax.training.classify import Classification
from tests.conftest import NOWHERE, named, randomised
from tests.training.conftest import check_resumed, cut_down


@pytest.fixture
def config(pretrained):
    """A fine-tuning of it with every part of the recipe, 8 steps long."""
    c = cut_down(finetune.get_config('vit_b'), pretrained)
    c.classify.ema = 0.5
    return c


def test_from_a_checkpoint_to_accuracy(config, pretrained, tmp_path, capsys):
    """It reports, keeps the best, and ends bitwise the same where it was stopped at step 4."""
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    out = tasks.run(config, whole)
    assert json.loads((whole / 'finetune.json').read_text()) == out
    assert (out['step'], out['checkpoint']) == (8, str(pretrained / 'checkpoints' / '2'))
    assert 0 <= out['top1'] <= out['top5'] <= 1
    check_resumed(config, whole, part, out, capsys)


def test_it_keeps_the_checkpoint_it_began_with(config, pretrained, tmp_path):
    """Also where `resume_anyway` allows other fields to differ, and the pre-training has gone on."""
    run, tuned = tmp_path / 'run', tmp_path / 'tuned'
    shutil.copytree(pretrained, run)
    shutil.copytree(run / 'checkpoints' / '2', run / 'checkpoints' / '1')
    tuned.mkdir()
    (tuned / 'config.json').write_text(json.dumps({'checkpoint': f'{run}/checkpoints/1'}))
    config.resume_anyway, config.checkpoint = True, str(run)
    with pytest.raises(UserError, match=rf'holds a finetune of {run}/checkpoints/1, and .* is {run}/.*/2 now\. Resume'):
        tasks.run(config, tuned)


def test_it_goes_on_where_its_pretraining_was_moved(config, pretrained, tmp_path):
    """From its own checkpoints, which have all that it needs; where another step is left there, the first is named."""
    moved = tmp_path / 'elsewhere'
    shutil.copytree(pretrained, tmp_path / 'run')
    config.checkpoint = str(tmp_path / 'run')
    whole = tasks.run(config, tmp_path / 'tuned')
    shutil.rmtree(tmp_path / 'tuned' / 'checkpoints' / '8')
    (tmp_path / 'run').rename(moved)
    config.checkpoint = str(moved)
    with pytest.raises(UserError, match=r'run/checkpoints/2, and .* is gone: .*--config.resume_anyway=True'):
        tasks.run(config, tmp_path / 'tuned')
    config.resume_anyway = True
    (moved / 'checkpoints' / '2').rename(moved / 'checkpoints' / '3')
    assert tasks.run(config, tmp_path / 'tuned') == whole
    (moved / 'checkpoints' / '3').rename(moved / 'checkpoints' / '2')
    assert tasks.run(config, tmp_path / 'tuned') == whole | {'checkpoint': str(moved / 'checkpoints' / '2')}


def test_without_validation(config, tmp_path):
    """`eval.every_epochs=0`: the split is not looked at, and need not be there; more epochs have another workdir."""
    config.eval.every_epochs, config.data.val_split = 0.0, 'nowhere'
    tasks.run(config, tmp_path / 'run')
    assert not any(name.startswith('val_') for row in read_history(tmp_path / 'run') for name in row)
    config.epochs, config.resume_anyway = config.epochs / 2, True
    with pytest.raises(UserError, match=r'raise --config\.epochs, or start again in another --workdir$'):
        tasks.run(config, tmp_path / 'run')
    config.eval.every_epochs = 1.0
    with pytest.raises(UserError, match="no split 'nowhere'"):
        tasks.run(config, tmp_path / 'other')


def test_its_own_checkpoint_is_no_pretrained_one(config, tmp_path):
    config.epochs, config.optim.warmup_epochs, config.classify.from_scratch = 0.25, 0.0, True
    tasks.run(config, tmp_path / 'run')
    other = knn.get_config()
    for c in (other, config):
        c.checkpoint = str(tmp_path / 'run')
        with pytest.raises(UserError, match=r'of a fine-tuning.*checkpoints/2'):
            tasks.run(c, tmp_path / 'out')


def test_it_begins_with_the_encoder_of_the_checkpoint(config, pretrained):
    planned = task.plan(config, NOWHERE)
    with jax.set_mesh(planned.mesh):
        state = planned.fresh(planned.job.sharding(planned.mesh))
    read = checkpoint.Checkpointer(pretrained, read_only=True)
    method = planned.job.objective.method
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0)))[0]
    mesh = parallel.make_mesh(1)
    saved = read.restore_item(checkpoint.abstract_like(shapes, parallel.replicated(mesh)), 2, 'params')
    got, want = named(state.params['encoder']), named(saved['encoder'])
    assert want.keys() - got.keys() == {'norm/scale', 'norm/bias'}  # the head's own norm stands in
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.params, state.model_state['ema']))
    kernel = state.params['head']['linear']['kernel']
    assert abs(float(kernel.std()) / 2e-5 - 1) < 0.3
    config.classify.from_scratch = True
    planned = task.plan(config, NOWHERE)
    with jax.set_mesh(planned.mesh):
        other = planned.fresh(planned.job.sharding(planned.mesh))
    assert (named(other.params)['encoder/patch_embed/kernel'] != want['patch_embed/kernel']).any()


def plain(config, pool, **more):
    """The objective of a config without what is drawn at random."""
    found = find(config)
    d = found.config.data
    return Classification(found.method, 10, tuple(d.mean), tuple(d.std), False, pool=pool, **more)


@pytest.mark.parametrize('pool', ['fc_norm', 'mean', 'class'])
def test_loss_against_numpy(pretrained, config, rng, pool):
    """Pooling, norm, head and smoothed cross-entropy of given tokens in float64."""
    config.model.drop_path = 0.0
    objective = plain(config, pool, smoothing=0.2)
    params = randomised(jax.eval_shape(objective.init, jax.random.key(0))[0], rng)
    images, labels = rng.integers(0, 256, (6, 28, 28, 1), np.uint8), rng.integers(0, 10, 6)
    batch = {'image': jnp.asarray(images), 'label': jnp.asarray(labels)}
    loss, _ = objective.loss(params, {}, {}, batch, jax.random.key(1), Clock(jnp.int32(0), 8, 4))
    x = augment.normalize(images, objective.mean, objective.std)
    depth = 2 if pool == 'fc_norm' else None
    tokens = np.asarray(objective.method.encode({'encoder': params['encoder']}, x, depth=depth), np.float64)
    pooled = tokens[:, 0] if pool == 'class' else tokens[:, 1:].mean(1)
    head = jax.tree.map(lambda p: np.asarray(p, np.float64), params['head'])
    if pool == 'fc_norm':
        pooled = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-6)
        pooled = pooled * head['fc_norm']['scale'] + head['fc_norm']['bias']
    logits = pooled @ head['linear']['kernel'] + head['linear']['bias']
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = -(0.8 * log_p[np.arange(6), labels] + 0.02 * log_p.sum(1)).mean()
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_averaged_weights_and_rates_by_layer(config, rng):
    """Three steps: the average follows the parameters; the rate falls from the head down, as MAE's code has it."""
    planned = task.plan(config, NOWHERE)
    training = planned.job
    with jax.set_mesh(planned.mesh):
        state = jax.jit(training.create)(0)
        want, step = jax.device_get(state.params), training.step(planned.mesh)
        for _ in range(3):
            images = rng.integers(0, 256, (32, 28, 28, 1), np.uint8)
            batch = {'image': images, 'label': rng.integers(0, 10, 32).astype(np.int32)}
            batch = parallel.put_batch(batch, planned.mesh)
            state, _ = step(state, train_state.Meter.empty(training.names), {}, batch, jax.random.key(0))
            want = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * np.asarray(b), want, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.model_state['ema'], want)
    scales = named(optim.layer_scales(state.params, 0.65))
    for name, layers in (
        ('head/linear/kernel', 0),
        ('head/fc_norm/scale', 0),
        ('encoder/blocks/block1/mlp_in/kernel', 1),
        ('encoder/blocks/block0/attn/qkv_kernel', 2),
        ('encoder/patch_embed/kernel', 3),
        ('encoder/cls_token', 3),
    ):
        assert scales[name] == pytest.approx(0.65**layers), name


def test_each_example_counts_once_on_any_mesh(config, rng):
    """70 examples in batches of 32, on 1 and 8 devices, against numpy on the logits of each."""
    planned = task.plan(config, NOWHERE)
    objective, c = planned.job.objective, planned.config
    state = jax.device_get(jax.jit(planned.job.create)(0))
    params = randomised(state.params, rng)
    state = state.replace(model_state={'ema': params})  # of which the scores are
    found = []
    for shape in ((1, 1, 1), (8, 1, 1), (2, 4, 1)):
        mesh = parallel.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            placed = jax.device_put(state, parallel.shardings(state, mesh))
            found.append(task.scores(planned.job, placed, c, mesh, 'test[:70]'))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
    source = task.sources.open_source(c.data, 'test[:70]')
    batch = next(task.pipeline.eval_batches(source, c.data, 70))
    x = augment.normalize(batch['image'], c.data.mean, c.data.std)
    logits = np.asarray(objective.logits(params, x), np.float64)
    ranks = (logits > logits[np.arange(70), batch['label']][:, None]).sum(1)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = {
        'top1': (ranks < 1).mean(),
        'top5': (ranks < 5).mean(),
        'loss': -log_p[np.arange(70), batch['label']].mean(),
    }
    assert found[0] == pytest.approx(want, abs=1e-5)


def test_logits_that_are_not_finite_are_no_right_answers():
    logits = jnp.array([[jnp.nan] * 10, [*range(9), jnp.nan], [*range(9), jnp.inf]])
    seen = classify.counts(logits, jnp.array([3, 9, 9]), jnp.ones(3, bool))
    assert (int(seen['examples']), int(seen['top1']), int(seen['top5'])) == (3, 1, 1)


def test_of_equal_logits_the_first_counts():
    logits = jnp.zeros((3, 10)).at[2, 5:].set(1.0)
    seen = classify.counts(logits, jnp.array([0, 5, 6]), jnp.ones(3, bool))
    assert (int(seen['top1']), int(seen['top5'])) == (1, 2)


def test_a_label_beyond_the_classes_is_named(config, tmp_path, monkeypatch):
    """One that no look at the first images finds: in training, and where it is only counted."""
    real = sources.Tfds._parse

    def parse(self, position, serialized):
        example = real(self, position, serialized)
        wrong = (position == 3) & (self.split == split)
        return example | {'label': tf.where(wrong, tf.constant(label, tf.int64), example['label'])}

    monkeypatch.setattr(sources.Tfds, '_parse', parse)
    monkeypatch.setattr(sources, 'require_labels', lambda *_: None)
    for split, label in (('train[:130]', 10), (config.data.val_split, -1)):
        with pytest.raises(UserError, match=f'data.num_classes is 10, and an image has the label {label}; .* 0 to 9'):
            tasks.run(config, tmp_path / split)


@pytest.mark.parametrize(
    ('field', 'value', 'words'),
    [
        ('eval.features', 'class', r'eval\.features is .class., which a fine-tuning does not use; .*classify\.pool'),
        ('eval.train_examples', 9, r'eval\.train_examples is 9'),
        ('probe.group', 16, r'probe\.group is 16, which a fine-tuning does not use'),
        ('eval.depths', (1, 0), r'eval\.depths is \(1, 0\)'),
        ('classify.pool', 'max', r'classify\.pool is .max.*fc_norm'),
        ('data.randaugment', 'x', r'data\.randaugment is .x.'),
        ('batch_size', 31, r'batch_size is 31.*even number'),
        ('data.num_classes', 5, r'data\.num_classes is 5; .* has 10 classes'),
        ('model.depth', 3, r'cannot set: model\.depth'),
        ('checkpoint', '/nowhere', r'/nowhere'),
        ('eval.weights', 'teacher', r'eval\.weights is .teacher.'),
    ],
)
def test_impossible_configs_are_refused_before_any_work(config, tmp_path, field, value, words):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        tasks.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()
