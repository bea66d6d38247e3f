"""The Python API against the parts it is made of, and the examples of docs/api.md."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

from configs import base, bootmae, conmim
from mto_jax import api, exchange, methods
from mto_jax.data import augment, pil, pipeline
from mto_jax.errors import UserError
from mto_jax.evals import features
from mto_jax.models import vit
from mto_jax.training import checkpoint, classify, train_state
from mto_jax.training.objective import Pretraining
from tests.conftest import named, randomised, shrink

PHOTOS = [
    'astronaut',
    'camera',
    'chelsea',
    'coffee',
    'coins',
    'hubble_deep_field',
    'moon',
    'motorcycle_left',
    'retina',
    'rocket',
]


def small(module=base, **fields):
    c = shrink(module.get_config())
    c.model.dtype, c.conmim.mask_unit = 'float32', 1
    c.mask_ratio = 0.6
    c.update_from_flattened_dict(fields)
    return c


def save(config, folder, params, model_state):
    """A checkpoint of a training of `config` that ended with these."""
    state = train_state.TrainState(jnp.int32(5), params, {'count': jnp.int32(5)}, model_state)
    saver = checkpoint.Checkpointer(folder, entries=model_state)
    saver.save(state, config.to_dict(), None, {})
    saver.close()
    return str(folder)


def pretrained(config, folder, rng):
    method = methods.build(config)
    params, state = jax.eval_shape(method.init, jax.random.key(0))
    params, state = randomised(params, rng), randomised(state, rng)
    return save(config, folder, params, state), method, params, state


def finetuned(config, folder, rng):
    objective = classify.build(config, methods.build(config))
    params, state = jax.eval_shape(objective.init, jax.random.key(0))
    params, state = randomised(params, rng), randomised(state, rng)
    return save(config, folder, params, state), objective, params, state


def pixels(rng, count, size=(28, 28), channels=1):
    return rng.integers(0, 256, (count, *size, channels), np.uint8)


def normal(config, images):
    return augment.normalize(jnp.asarray(images), config.data.mean, config.data.std)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, method, params, state) of a shrunk MAE."""
    return pretrained(small(), tmp_path_factory.mktemp('api') / 'mae', np.random.default_rng(1))


@pytest.fixture(scope='module')
def model(run):
    return api.load(run[0])


def test_loaded_models(run, model):
    """The very values, from a workdir or one of its steps, and no TensorFlow shape of images needed."""
    where, method, params, _ = run
    for found in (model, api.load(f'{where}/checkpoints/5')):
        assert found.method == found.original == method
        for path, leaf in named(params).items():
            np.testing.assert_array_equal(named(found.params)[path], leaf)


@pytest.mark.parametrize('kind', ['mean', 'class'])
@pytest.mark.parametrize('depth', [None, 1])
def test_features_are_those_of_an_evaluation(run, model, rng, kind, depth):
    _, method, params, _ = run
    c, images = small(), pixels(rng, 7)
    c.eval.features, c.eval.depth = kind, depth or 0
    got = model.embed(images, depth, kind)
    assert got.shape == (7, 16)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, features.encoder(method, c)(params, images), rtol=1e-5, atol=1e-5)


def test_tokens(run, model, rng):
    _, method, params, _ = run
    images = pixels(rng, 3)
    got = model.embed(images, features='tokens')
    assert got.shape == (3, 17, 16)
    np.testing.assert_allclose(got, method.encode(params, normal(small(), images)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[:, 1:].mean(1), model.embed(images), rtol=1e-4, atol=1e-5)


def test_batches_change_nothing(model, rng):
    """However many images: each has its own features, and a third batch compiles nothing."""
    images = pixels(rng, 2 * api.BATCH + 5)
    before = api._features._cache_size()
    got = model.embed(images)
    assert api._features._cache_size() - before <= 2  # of 64 images, and of 8
    alone = np.concatenate([model.embed(images[i : i + 8]) for i in (0, 60, 125)])
    np.testing.assert_allclose(alone, got[[*range(8), *range(60, 68), *range(125, 133)]], rtol=1e-4, atol=1e-5)
    assert api._features._cache_size() - before <= 2


def test_a_teacher(tmp_path, rng):
    where, method, params, state = pretrained(small(bootmae), tmp_path / 'run', rng)
    images = pixels(rng, 5)
    for weights, source in (('student', params), ('teacher', state['teacher'])):
        want = method.encode(source, normal(small(), images))[:, 1:].mean(1)
        np.testing.assert_allclose(api.load(where, weights).embed(images), want, rtol=1e-4, atol=1e-5)


def test_another_size(tmp_path, rng):
    """Learned positions are interpolated; what the training reconstructed with stays at its size."""
    c = small(**{'model.position': 'learned'})
    where, method, params, _ = pretrained(c, tmp_path / 'run', rng)
    found = api.load(where, image_size=(42, 28))
    images = pixels(rng, 3, (42, 28))
    arch = dataclasses.replace(method.arch, image_size=(42, 28))
    resized = {'encoder': vit.resized(params['encoder'], method.arch, arch)}
    want = dataclasses.replace(method, arch=arch).encode(resized, normal(c, images))[:, 1:].mean(1)
    np.testing.assert_allclose(found.embed(images), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r'\(42, 28\) but trained at \(28, 28\)'):
        found.reconstruct(images)
    with pytest.raises(UserError, match='width 30 is not a multiple'):
        api.load(where, image_size=(28, 30))


@pytest.mark.parametrize(
    ('module', 'picture', 'stacks'),
    [
        (base, 'reconstruction', ['']),
        (bootmae, 'reconstruction', ['.regressor', '.predictor']),
        (conmim, 'matched', ['']),
    ],
    ids=['mae', 'bootmae', 'conmim'],
)
def test_pictures_and_blocks(tmp_path, rng, module, picture, stacks):
    """Visible patches are the image's own, and the fraction of hidden ones is the training's; the values per block are
    those of the diagnosis, averaged over two batches by their sizes."""
    c = small(module)
    c.mto.enabled, c.mto.recalibration, c.mto.exclude_blocks, c.mto.open_until = True, 'exclude', -1, 0.5
    where, method, params, state = pretrained(c, tmp_path / 'run', rng)
    found, images = api.load(where), pixels(rng, api.BATCH + 3)
    seen = found.reconstruct(images)
    assert seen.keys() == {'original', 'masked', picture}
    np.testing.assert_allclose(seen['original'], images / 255, atol=1e-5)
    changed = np.abs(seen[picture] - seen['original']) > 1e-5
    hidden = np.abs(seen['masked'] - seen['original']).reshape(-1, 4, 7, 4, 7).max((2, 4)) > 1e-5
    assert hidden.mean() == pytest.approx(c.mask_ratio, abs=0.5 / 16)
    assert not changed[~hidden.repeat(7, 1).repeat(7, 2)].any()
    assert changed[hidden.repeat(7, 1).repeat(7, 2)].mean() > 0.5
    np.testing.assert_array_equal(found.reconstruct(images[:3])['masked'].shape, (3, 28, 28, 1))
    assert (found.reconstruct(images, seed=1)['masked'] != seen['masked']).any()

    got = found.heterogeneity(images)
    objective, want = Pretraining(method, tuple(c.data.mean), tuple(c.data.std), False), {}
    for i, part in enumerate((images[: api.BATCH], images[api.BATCH :])):
        key = jax.random.fold_in(jax.random.key(0), i)
        clock = methods.Clock(jnp.int32(10), 10, 2)
        blocks = objective.diagnose(params, state, part, key, clock)['blocks']
        want = {n: want.get(n, 0) + len(part) / len(images) * v for n, v in blocks.items()}
    assert {f'{n}{s}' for n in ('het', 'het_token', 'rho') for s in stacks} <= got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].shape == (2,)
        np.testing.assert_allclose(got[name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('pool', 'ema'), [('fc_norm', 0.0), ('class', 0.9)])
def test_a_classifier(tmp_path, rng, pool, ema):
    """Its logits, of averaged weights where there are any."""
    c = small(task='finetune', **{'classify.pool': pool, 'classify.ema': ema})
    where, objective, params, state = finetuned(c, tmp_path / 'run', rng)
    found, images = api.load(where), pixels(rng, 5)
    params = state['ema'] if ema else params
    got = found.classify(images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, objective.logits(params, normal(c, images)), rtol=1e-4, atol=1e-4)
    depth = 2 if pool == 'fc_norm' else None
    tokens = objective.method.encode(params, normal(c, images), depth=depth)
    np.testing.assert_allclose(found.embed(images), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match='a fine-tuned classifier has no decoder'):
        found.heterogeneity(images)
    with pytest.raises(UserError, match=r"weights is 'teacher', but .*run is a fine-tuning"):
        api.load(where, 'teacher')


def test_a_classifier_whose_pre_training_would_not_fit(tmp_path, rng):
    """ConMIM's groups need not divide the batch of a fine-tuning."""
    c = small(conmim, task='finetune', **{'classify.mixup': 0.0, 'classify.cutmix': 0.0})
    params, state = jax.eval_shape(classify.build(c, methods.build(c)).init, jax.random.key(0))
    c.batch_size = c.conmim.group + 1
    with pytest.raises(UserError, match=r'conmim\.group'):
        methods.build(c)
    where = save(c, tmp_path / 'run', randomised(params, rng), randomised(state, rng))
    assert api.load(where).classify(pixels(rng, 2)).shape == (2, 10)


def test_weights_from_elsewhere(tmp_path, run, model, rng):
    where, _, params, _ = run
    exchange.write(exchange.read(where), tmp_path / 'mae', 'huggingface')
    images = pixels(rng, 3)
    found = api.load(tmp_path / 'mae')
    assert named(found.params).keys() == named(params).keys()
    np.testing.assert_allclose(found.embed(images), model.embed(images), rtol=1e-5, atol=1e-6)
    pictures = (m.reconstruct(images)['reconstruction'] for m in (found, model))
    np.testing.assert_allclose(*pictures, atol=1e-5)
    assert api.load(tmp_path / 'mae', image_size=56).embed(images).shape == (3, 16)
    with pytest.raises(UserError, match='width 16 is not a multiple of 3 heads'):
        api.load(tmp_path / 'mae', heads=3)
    with pytest.raises(UserError, match='is not the checkpoint of a run'):
        api.load(tmp_path / 'mae', 'teacher')


def test_an_encoder_alone(tmp_path, run, model, rng):
    """It embeds; of what else its method cannot do, it says so."""
    exchange.write(exchange.read(run[0]), tmp_path / 'vit', 'huggingface', part='encoder')
    found, images = api.load(tmp_path / 'vit'), pixels(rng, 3)
    np.testing.assert_allclose(found.embed(images), model.embed(images), rtol=1e-4, atol=1e-5)
    for use in (found.reconstruct, found.heterogeneity):
        with pytest.raises(UserError, match="method is 'encoder', which has no pre-training loss"):
            use(images)


def test_a_classifier_from_elsewhere(tmp_path, rng):
    where, *_ = finetuned(small(task='finetune'), tmp_path / 'run', rng)
    exchange.write(exchange.read(where), tmp_path / 'timm', 'timm')
    images = pixels(rng, 3)
    got = api.load(tmp_path / 'timm').classify(images)
    np.testing.assert_allclose(got, api.load(where).classify(images), rtol=1e-4, atol=1e-5)


def test_load_errors(run, tmp_path, rng):
    where, *_ = run
    probe = save(small(task='probe', checkpoint='x'), tmp_path / 'probe', {'head': jnp.zeros(1)}, {})
    for path, options, problem in (
        ('nowhere', {}, "path is 'nowhere': nothing is there"),
        (where, {'weights': 'best'}, "weights is 'best'; it must be 'student' or 'teacher'"),
        (where, {'weights': 'teacher'}, 'the method has no teacher'),
        (where, {'image_size': (28, 28, 1)}, r'image_size is \(28, 28, 1\); it must be one number'),
        (where, {'image_size': 0}, 'image_size is 0'),
        (where, {'heads': 2}, 'heads is given, but .* is a checkpoint'),
        (probe, {}, 'the checkpoint is of a probe'),
    ):
        with pytest.raises(UserError, match=problem):
            api.load(path, **options)


def test_embed_errors(model, rng, tmp_path, monkeypatch):
    images = pixels(rng, 3)
    (tmp_path / 'a.jpg').write_text('words')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    Image.new('1', (50, 50)).save(tmp_path / 'huge.png')
    for given, problem in (
        (images / np.float32(255), r'images\[0\] is float32'),
        (images.repeat(3, -1), r'images\[0\] is uint8 \(28, 28, 3\); .* \(height, width, 1\)'),
        (images[..., 0], r'images has shape \(3, 28, 28\)'),
        ([], 'images is empty'),
        ('photos', 'images is a str'),
        ((image for image in images), 'images is a generator'),
        ([images[0], tmp_path / 'a.jpg'], 'cannot decode .*a.jpg'),
        ([tmp_path / 'huge.png'], 'cannot decode .*huge.png: Image size'),
    ):
        with pytest.raises(UserError, match=problem):
            model.embed(given)
    for options, problem in (
        ({'features': 'max'}, "features is 'max'"),
        ({'depth': 3}, 'depth is 3; the encoder has 2 blocks'),
        ({'depth': 0}, 'depth is 0'),
    ):
        with pytest.raises(UserError, match=problem):
            model.embed(images, **options)
    with pytest.raises(UserError, match='the model has no classes'):
        model.classify(images)


@pytest.fixture
def photos(tmp_path):
    """Ten photographs as JPEGs of their own sizes, in a folder."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name in PHOTOS:
        (found,) = Path(skimage.data.__file__).parent.glob(f'{name}.*')
        image = Image.open(found).convert('RGB')
        image.thumbnail((300, 300))
        image.save(folder / f'{name}.jpg')
    return sorted(folder.glob('*.jpg'))


def test_ten_photographs(tmp_path, photos, rng):
    """A folder of JPEGs, embedded as the evaluation's pipeline would: features differ by what decoding differs.

    Random weights amplify that more or less: in most of five draws each is far nearer to itself than to any other.
    """
    c = small()
    d = c.data
    d.image_size, d.channels, d.eval_resize, c.model.patch_size = (64, 64), 3, 80, 16
    d.mean, d.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    where, method, params, _ = pretrained(c, tmp_path / 'run', rng)
    ours = normal(c, np.stack([pil.prepare(p, d, p.name) for p in photos]))
    theirs = normal(c, np.stack([pipeline.eval_image(tf.io.read_file(str(p)), d).numpy() for p in photos]))
    embed = jax.jit(lambda params, images: method.encode(params, images)[:, 1:].mean(1))
    np.testing.assert_allclose(api.load(where).embed(photos), embed(params, ours), rtol=1e-4, atol=1e-4)
    ratios = []
    for _ in range(5):
        got, want = embed(params, ours), np.asarray(embed(params, theirs))
        apart = np.linalg.norm(want[:, None] - want, axis=-1)[~np.eye(10, dtype=bool)].min()
        ratios.append(np.linalg.norm(got - want, axis=1).max() / apart)
        params = randomised(params, rng)
    assert np.median(ratios) < 0.2, ratios


def test_the_examples_of_the_docs(monkeypatch, tmp_path, photos, rng):
    """Every block of docs/api.md, in order, where a quickstart's runs and photographs lie; each under ten lines."""
    blocks = re.findall(r'```python\n(.*?)```', Path('docs/api.md').read_text(), re.S)
    assert len(blocks) > 5
    assert all(len(block.splitlines()) < 10 for block in blocks)
    where, *_ = pretrained(small(), tmp_path / 'runs/quickstart/seed0/mae_mto', rng)
    pretrained(small(bootmae), tmp_path / 'runs/quickstart/seed0/bootmae_mto', rng)
    finetuned(small(task='finetune'), tmp_path / 'runs/finetune_quickstart/quickstart_seed0_mae_mto', rng)
    exchange.write(exchange.read(where), tmp_path / 'weights/vit_base', 'huggingface')
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names['features'].shape == (10, 16)
    assert names['tokens'].shape == (10, 17, 16)
    assert names['blocks']['het'].shape == (2,)
    assert names['classes'].shape == (10,)
    assert (tmp_path / 'reconstructions.png').exists()
