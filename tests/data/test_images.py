"""The ImageNet path on photographs: JPEGs of many sizes, in TFDS form and as a plain folder; odd and bad files."""

import io
import math
import os
import shutil

import jax
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from configs import mae_mto, simmim
from mto_jax import tasks
from mto_jax.data import augment, check, folder, pipeline, sources
from mto_jax.errors import UserError
from mto_jax.runtime import hosts, parallel
from mto_jax.tasks import pretrain

PHOTOS = ('astronaut', 'chelsea', 'coffee', 'rocket')


def psnr(a, b):
    return 10 * math.log10(255**2 / max(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2), 1e-9))


def photo(index):
    return Image.fromarray(getattr(skimage.data, PHOTOS[index])())


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, 'JPEG', **options)
    return out.getvalue()


def crops(count, seed=0):
    """(JPEG bytes, label): parts of the photographs, of ImageNet's sizes and qualities; the label says which one."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = photo(i % len(PHOTOS))
        width, height = rng.integers(240, 400), rng.integers(240, 380)
        x, y = (rng.integers(0, max(1, size - part)) for size, part in zip(image.size, (width, height), strict=True))
        yield jpeg(image.crop((x, y, x + width, y + height)), quality=int(rng.integers(70, 96))), i % len(PHOTOS)


def write_folder(root):
    for split, count, seed in (('train', 48, 0), ('validation', 24, 1)):
        for i, (encoded, label) in enumerate(crops(count, seed)):
            path = root / split / PHOTOS[label] / f'{i:04}.JPEG'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)


def write_tfds(root, file_format, images):
    """Encoded bytes go in as they are: {split: [(bytes, label)]}."""
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=4),
        }
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name='photos',
        version='1.0.0',
        features=features,
        split_datasets={
            split: [(i, {'image': io.BytesIO(b), 'label': y}) for i, (b, y) in enumerate(rows)]
            for split, rows in images.items()
        },
        data_dir=root,
        file_format=file_format,
        disable_shuffling=True,
    )


def for_photos(c, root, name):
    d = c.data
    d.name, d.data_dir, d.num_classes = name, str(root), len(PHOTOS)
    return c


@pytest.fixture(scope='module', params=['folder', 'array_record', 'tfrecord'])
def photos(request, tmp_path_factory):
    """(name, root) of one and the same data set in each form."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == 'folder':
        write_folder(root)
        return 'folder', root
    write_tfds(root, request.param, {'train': list(crops(48, 0)), 'validation': list(crops(24, 1))})
    return 'photos', root


@pytest.fixture
def flagship(photos, tmp_path):
    """configs/mae_mto.py at 224 pixels, shrunk in width, depth and steps alone."""
    c = for_photos(mae_mto.get_config(), photos[1], photos[0])
    c.model.width, c.model.depth, c.model.heads = 24, 2, 2
    c.mae.decoder_width, c.mae.decoder_depth, c.mae.decoder_heads = 16, 2, 2
    c.batch_size, c.epochs, c.optim.warmup_epochs = 16, 2.0, 1.0
    c.log_every, c.diagnose_every, c.checkpoints.every = 2, 4 if photos[0] == 'folder' else 0, 3
    c.eval.batch_size, c.eval.linear_steps = 8, 20
    c.mesh.data, c.allow_cpu = 1, True
    c.data.resize = 'device' if photos[0] == 'folder' else 'host'
    return c


@pytest.mark.parametrize('photos', ['folder', 'array_record'], indirect=True)
def test_from_jpegs_to_a_probe(flagship, tmp_path):
    """Pre-training stopped half-way and resumed ends bitwise as the uninterrupted one; then the probes."""
    whole = pretrain.run(flagship, tmp_path / 'whole')
    assert int(whole.step) == 6

    class Stop(Exception):
        pass

    def until(step):
        real = pipeline.Prefetch.__next__
        seen = []

        def broken(self):
            seen.append(1)
            if len(seen) > step:
                raise Stop
            return real(self)

        return broken

    with pytest.MonkeyPatch.context() as m:
        m.setattr(pipeline.Prefetch, '__next__', until(4))
        with pytest.raises(Stop):
            pretrain.run(flagship, tmp_path / 'part')
    resumed = pretrain.run(flagship, tmp_path / 'part')
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    for task in ('knn', 'linear'):
        flagship.task, flagship.checkpoint = task, str(tmp_path / 'part')
        flagship.eval.knn_k = (1, 5)
        found = tasks.run(flagship, tmp_path / task)
        # Four photographs, each part of one: even an untrained encoder tells them apart.
        assert found['knn_1' if task == 'knn' else 'linear'] > 0.5


def test_the_forms_hold_the_same(photos, tmp_path):
    """The folder's examples, in the order of its paths, are those that were written."""
    c = for_photos(mae_mto.get_config(), photos[1], photos[0])
    source = sources.open_source(c.data, 'train')
    assert source.num_examples == 48
    seen = list(source.select([np.arange(48)]).map(source.read).as_numpy_iterator())
    expected = sorted(crops(48, 0), key=lambda e: e[1]) if photos[0] == 'folder' else list(crops(48, 0))
    assert [(e['image'], e['label']) for e in seen] == expected
    assert len({e['name'] for e in seen}) == 48


@pytest.mark.parametrize(
    ('module', 'method'), [(mae_mto, Image.BICUBIC), (simmim, Image.BILINEAR)], ids=['mae', 'simmim']
)
@pytest.mark.parametrize('index', range(4))
def test_crops_against_pil(index, module, method):
    """Window, antialiased resize and the bicubic evaluation resize are PIL's."""
    c, other = module.get_config(), Image.BILINEAR if method == Image.BICUBIC else Image.BICUBIC
    image = photo(index)
    encoded = io.BytesIO()
    image.save(encoded, 'PNG')
    encoded = encoded.getvalue()
    for i in range(3):
        seed = tf.constant([index, i], tf.int64)
        y, x, h, w = pipeline.crop_window(image.height, image.width, seed, c.data.crop_area, c.data.crop_aspect).numpy()
        ours = pipeline.train_image(encoded, seed, c.data).numpy()
        window = image.crop((x, y, x + w, y + h))
        np.testing.assert_array_equal(ours, window.resize((224, 224), method))
        assert psnr(ours, window.resize((224, 224), other)) < 50
    scale = 256 / min(image.size)
    size = [round(n * scale) for n in image.size]
    x, y = (size[0] - 224) // 2, (size[1] - 224) // 2
    theirs = image.resize(size, Image.BICUBIC).crop((x, y, x + 224, y + 224))
    np.testing.assert_array_equal(pipeline.eval_image(encoded, c.data), theirs)


@pytest.mark.parametrize('photos', ['folder'], indirect=True)
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_resize_on_the_device(photos, interpolation):
    """The same crops as the host's, which PIL rounds twice; also of images larger than what is sent."""
    data = for_photos(mae_mto.get_config(), photos[1], photos[0]).data
    data.interpolation, data.image_size = interpolation, (96, 80)  # twice that is smaller than many crops
    source = sources.open_source(data, 'train')
    [host] = pipeline.train_batches(source, data, 48, 3, 0, 1)
    data.resize = 'device'
    [sent] = pipeline.train_batches(source, data, 48, 3, 0, 1)
    assert (sent['image'].shape, sent['image'].dtype) == ((48, 192, 160, 3), np.uint8)
    np.testing.assert_array_equal(sent['label'], host['label'])
    shrunk = (sent['size'] == (192, 160)).any(-1)
    assert 0 < shrunk.sum() < 48
    for mesh in (parallel.make_mesh(1), parallel.make_mesh(8)):
        placed = parallel.put_batch(sent, mesh)
        got = np.asarray(augment.resize(placed['image'], placed['size'], (96, 80), interpolation), np.int64)
        assert np.abs(got - host['image'])[~shrunk].max() <= 1
        assert all(psnr(a, b) > 40 for a, b in zip(got[shrunk], host['image'][shrunk], strict=True))


def png(image):
    out = io.BytesIO()
    image.save(out, 'PNG')
    return out.getvalue()


def odd_images():
    """{name: (bytes, what PIL sees in RGB)}: files that data sets really hold."""
    base = photo(1).resize((120, 90))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = (np.asarray(base.convert('L'), np.uint16) * 257).astype(np.uint16)
    found = {
        'grey.jpg': jpeg(base.convert('L'), quality=95),
        'palette.png': png(base.convert('P')),
        'cmyk.jpg': jpeg(base.convert('CMYK'), quality=95),
        'deep.png': png(Image.fromarray(deep)),
        'alpha.png': png(base.convert('RGBA')),
        'dot.png': png(base.resize((1, 1))),
        'wide.jpg': jpeg(base.resize((3000, 4)), quality=95),
        'turned.jpg': jpeg(base, quality=95, exif=rotated),
        'progressive.jpg': jpeg(base, quality=95, progressive=True),
        'png_inside.jpg': png(base),
    }
    deep_rgb = Image.fromarray(np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1))
    seen = {n: Image.open(io.BytesIO(b)).convert('RGB') for n, b in found.items()} | {'deep.png': deep_rgb}
    return {n: (b, seen[n]) for n, b in found.items()}


def bad_images():
    whole = jpeg(photo(2).resize((300, 200)), quality=90)
    return {
        'cut.jpg': whole[: len(whole) // 3],
        'empty.jpg': b'',
        'text.jpg': b'not an image',
        'cut.png': png(photo(1))[:5000],
        'head.png': png(photo(1))[:20],
    }


@pytest.mark.parametrize('name', list(odd_images()))
def test_odd_images_decode_as_pil_sees_them(name):
    """Grey, palette, CMYK, 16 bits, alpha, one pixel, very wide, progressive; orientation is ignored, as by PIL."""
    encoded, seen = odd_images()[name]
    c = mae_mto.get_config()
    ours = pipeline.decode(encoded, 3).numpy()
    assert ours.shape == (seen.height, seen.width, 3)
    np.testing.assert_array_equal(pipeline._size(encoded, 3), ours.shape[:2])
    assert psnr(ours, seen) > 30
    for i in range(5):
        assert pipeline.train_image(encoded, tf.constant([0, i], tf.int64), c.data).shape == (224, 224, 3)
    assert pipeline.eval_image(encoded, c.data).shape == (224, 224, 3)
    grey = pipeline.decode(encoded, 1).numpy()
    assert psnr(grey[..., 0], seen.convert('L')) > 30
    c.data.channels = 1
    assert pipeline.train_image(encoded, tf.constant([0, 0], tf.int64), c.data).shape == (224, 224, 1)


@pytest.fixture
def mixed(tmp_path):
    """(config.data, names of the bad): a folder without classes, nine good, ten odd, five bad."""
    root = tmp_path / 'mixed'
    (root / 'train').mkdir(parents=True)
    files = {n: b for n, (b, _) in odd_images().items()} | bad_images()
    files |= {f'good{i:02}.jpg': b for i, (b, _) in enumerate(crops(9))}
    for name, content in files.items():
        (root / 'train' / name).write_bytes(content)
    (root / 'train' / 'README.txt').write_text('not an image')
    c = for_photos(mae_mto.get_config(), root, 'folder')
    c.data.val_split = c.data.test_split = 'train'
    c.data.image_size = (32, 48)
    return c.data, sorted(bad_images())


def test_a_bad_image_is_named(mixed):
    data, bad = mixed
    source = sources.open_source(data, 'train')
    assert source.num_examples == 24
    with pytest.raises(UserError, match='cannot decode .*/(' + '|'.join(bad) + '): .*--check'):
        list(pipeline.train_batches(source, data, 8, 0, 0, 3))
    with pytest.raises(UserError, match='cannot decode'):
        list(pipeline.eval_batches(source, data, 8))


def test_bad_images_are_replaced_the_same_way_everywhere(mixed, capfd):
    """Wherever the iterator starts, and whichever process reads them, a step has the same images; all are counted."""
    data, bad = mixed
    data.on_error = 'replace'
    source = sources.open_source(data, 'train')
    whole = list(pipeline.train_batches(source, data, 8, 0, 0, 3))
    assert all(len(b['label']) == 8 for b in whole)
    shown = capfd.readouterr().err
    for name in bad:
        assert f'/{name}: ' in shown
    for a, b in zip(whole[2:], pipeline.train_batches(source, data, 8, 0, 2, 3), strict=True):
        np.testing.assert_array_equal(a['image'], b['image'])
    for share in range(2):
        part = parallel.Part(np.arange(8)[share::2], share, 2)
        for a, b in zip(whole, pipeline.train_batches(source, data, 8, 0, 0, 3, part), strict=True):
            np.testing.assert_array_equal(a['image'][part.rows], b['image'])
    evaluated = list(pipeline.eval_batches(source, data, 8))
    valid = np.concatenate([b['valid'] for b in evaluated])
    assert len(valid) == 24
    names = [p.rsplit('/', 1)[1] for p in source.paths]
    assert sorted(n for n, v in zip(names, valid, strict=True) if not v) == bad


def test_check_lists_what_is_bad(mixed, tmp_path, capsys, monkeypatch):
    """On one host, whatever others there are."""
    monkeypatch.setattr(hosts, 'start', lambda *_: pytest.fail('it looked for other hosts'))
    data, bad = mixed
    c = for_photos(mae_mto.get_config(), data.data_dir, 'folder')
    c.data.val_split = c.data.test_split = 'train'
    with pytest.raises(UserError, match='5 images cannot be decoded'):
        tasks.run(c, tmp_path / 'w', check=True)
    lines = (tmp_path / 'w' / 'unreadable.txt').read_text().splitlines()
    assert sorted(line.split(': ')[0].rsplit('/', 1)[1] for line in lines) == bad
    assert 'train: 24 images, 5 of them' in capsys.readouterr().out


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_bad_images_in_tfds(tmp_path, file_format):
    """Named by their place; replaced where the format has random access, else refused before anything is read."""
    rows = list(crops(6)) + [(b, 0) for b in bad_images().values()] + list(crops(6, 1))
    write_tfds(tmp_path, file_format, {'train': rows})
    data = for_photos(mae_mto.get_config(), tmp_path, 'photos').data
    data.val_split = data.test_split = 'train'
    data.image_size = (32, 32)
    source = sources.open_source(data, 'train')
    assert [line.split(':')[0] for line in check.unreadable(source, data)] == [
        f'example train[{i}]' for i in range(6, 11)
    ]
    with pytest.raises(UserError, match=r'train\[\d+\]' if file_format == 'array_record' else 'photos-train'):
        list(pipeline.train_batches(source, data, 8, 0, 0, 2))
    data.on_error = 'replace'
    if file_format == 'tfrecord':
        with pytest.raises(UserError, match=r'random access.*tfrecord'):
            sources.open_source(data, 'train')
        return
    assert len(list(pipeline.train_batches(source, data, 8, 0, 0, 2))) == 2


def test_files_that_cannot_be_opened(tmp_path, capfd):
    """A dangling link, and a name that is no UTF-8, of a good and a bad image: read, named, replaced and listed."""
    root = tmp_path / 'train'
    write_files(tmp_path, {f'train/{i}.jpg': b for i, (b, _) in enumerate(crops(6))})
    (root / 'gone.jpg').symlink_to(tmp_path / 'nowhere')
    for name, content in ((b'caf\xe9.jpg', next(crops(1))[0]), (b'b\xe9d.jpg', b'not an image')):
        with open(os.path.join(os.fsencode(root), name), 'wb') as f:
            f.write(content)
    c = for_photos(mae_mto.get_config(), tmp_path, 'folder')
    c.data.val_split = c.data.test_split = 'train'
    c.data.image_size, c.model.patch_size = (32, 32), 8
    source = sources.open_source(c.data, 'train')
    assert source.num_examples == 9
    c.model.heads = 5
    with pytest.raises(UserError, match='width 768 is not a multiple of 5 heads'):
        tasks.run(c, tmp_path / 'w', check=True)
    c.model.heads = 0
    with pytest.raises(UserError, match=r'cannot decode .*/(gone\.jpg|b\\xe9d\.jpg): '):
        list(pipeline.train_batches(source, c.data, 9, 0, 0, 1))
    with pytest.raises(UserError, match='2 images cannot be decoded'):
        tasks.run(c, tmp_path / 'w', check=True)
    lines = (tmp_path / 'w' / 'unreadable.txt').read_text().splitlines()
    assert [line.split(': ')[0].rsplit('/', 1)[1] for line in lines] == [r'b\xe9d.jpg', 'gone.jpg']
    assert 'No such file' in lines[1]
    c.data.on_error = 'replace'
    capfd.readouterr()
    assert len(next(pipeline.train_batches(source, c.data, 9, 0, 0, 1))['label']) == 9
    shown = capfd.readouterr().err
    assert all(name in shown for name in ('left out', 'gone.jpg', r'b\xe9d.jpg'))
    (batch,) = pipeline.eval_batches(source, c.data, 9)
    assert batch['valid'].sum() == 7


def test_nothing_decodes(tmp_path):
    (tmp_path / 'train').mkdir()
    for i in range(3):
        (tmp_path / 'train' / f'{i}.jpg').write_bytes(b'no')
    data = for_photos(mae_mto.get_config(), tmp_path, 'folder').data
    data.on_error = 'replace'
    with pytest.raises(UserError, match='no image can be decoded'):
        list(pipeline.train_batches(sources.open_source(data, 'train'), data, 2, 0, 0, 1))


def test_folder_labels_and_slices(tmp_path):
    """Classes are numbered by the training split, then others; deeper folders belong to theirs."""
    one = jpeg(photo(0).resize((20, 20)))
    for path in ('train/b/1.jpg', 'train/a/deep/2.JPG', 'val/A/3.jpeg', 'train/b/0.png', 'train/b/notes.txt'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(one)
    train = folder.open_folder(str(tmp_path), 'train')
    assert [p.removeprefix(f'{tmp_path}/') for p in train.paths] == [
        'train/a/deep/2.JPG',
        'train/b/0.png',
        'train/b/1.jpg',
    ]
    assert train.labels.tolist() == [0, 1, 1]
    assert folder.open_folder(str(tmp_path), 'val').labels.tolist() == [2]
    kept = folder.open_folder(str(tmp_path), 'train[1:]').paths.tolist()
    assert sorted(kept + folder.open_folder(str(tmp_path), 'train[:1]').paths.tolist()) == train.paths.tolist()
    assert kept == sorted(kept)
    # Another listing, or other labels of it, are other images; where they lie does not matter.
    assert train.contents != folder.open_folder(str(tmp_path), 'train[1:]').contents
    assert train.contents == folder.open_folder(f'{tmp_path}/', 'train').contents
    shutil.copytree(tmp_path, tmp_path.parent / 'elsewhere')
    assert train.contents == folder.open_folder(str(tmp_path.parent / 'elsewhere'), 'train').contents
    assert train.contents != folder.open_folder(str(tmp_path), 'train', 'val').contents
    (tmp_path / 'bare').mkdir()
    folder._listing.cache_clear()
    for split, word in (('test', 'are bare, train, val'), ('train[3:]', 'holds no image'), ('bare', 'holds no image')):
        with pytest.raises(UserError, match=word):
            folder.open_folder(str(tmp_path), split)


@pytest.mark.parametrize('classes', [{'a': 60, 'b': 30, 'c': 10}, {'': 50}], ids=['classes', 'none'])
def test_folder_slices_are_stratified(tmp_path, classes):
    """Complementary slices hold every image once, each class in its proportion, and do not depend on the root."""
    for root in ('one', 'another/place'):
        for name, count in classes.items():
            (tmp_path / root / 'train' / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / root / 'train' / name / f'{i:02}.jpg').touch()

    def opened(split, root='one'):
        found = folder.open_folder(str(tmp_path / root), split)
        counts = np.unique(found.labels, return_counts=True)[1]
        return [p.removeprefix(f'{tmp_path}/{root}/') for p in found.paths], counts

    everything, counts = opened('train')
    for slices in (('[:90%]', '[90%:]'), ('[:37]', '[37:]'), ('[:10%]', '[10%:55%]', '[55%:]')):
        parts = [opened(f'train{s}') for s in slices]
        assert sorted(p for paths, _ in parts for p in paths) == everything
        for paths, found in parts:
            np.testing.assert_allclose(found, counts * len(paths) / len(everything), atol=1)
            assert paths != everything[: len(paths)]
    assert opened('train[90%:]')[1].tolist() == [round(n / 10) for n in counts]
    assert opened('train[:37]')[0] == opened('train[:37]', 'another/place')[0]


def test_the_images_that_are_diagnosed_are_of_all_classes(config, tmp_path, monkeypatch):
    """The fixed batch of a folder, whose images lie class by class."""
    encoded = png(photo(0).resize((28, 28)).convert('L'))
    for name in ('a', 'b'):
        for i in range(70):
            path = tmp_path / 'data' / 'train' / name / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    data = config.data
    data.name, data.data_dir, data.train_split, data.val_split = 'folder', str(tmp_path / 'data'), 'train', 'train'
    real, seen = pipeline.eval_batches, []

    def recorded(*args):
        for batch in real(*args):
            seen.append(batch['label'])
            yield batch

    monkeypatch.setattr(pipeline, 'eval_batches', recorded)
    config.epochs, config.optim.warmup_epochs, config.diagnose_every = 0.5, 0.25, 4
    pretrain.run(config, tmp_path / 'w')
    assert len(seen[0]) == 64
    assert set(seen[0]) == {0, 1}


def write_files(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def saved(image, kind):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_other_formats_are_read_as_pil_sees_them():
    """WebP, TIFF, AVIF, GIF and BMP, of palettes, 16 bits and one channel too; what has no 8 or 16 bits is refused."""
    base = photo(1).resize((60, 40))
    deep = np.asarray(base.convert('L'), np.uint16) * 257
    cases = [(base, kind) for kind in ('WEBP', 'TIFF', 'AVIF', 'GIF', 'BMP')]
    cases += [(base.convert('P'), kind) for kind in ('GIF', 'BMP', 'TIFF')]
    cases += [(base.convert('L'), kind) for kind in ('WEBP', 'BMP')] + [(Image.fromarray(deep), 'TIFF')]
    for image, kind in cases:
        encoded = saved(image, kind)
        for channels, mode in ((3, 'RGB'), (1, 'L')):
            seen = (
                Image.fromarray((deep >> 8).astype(np.uint8))
                if image.mode == 'I;16'
                else Image.open(io.BytesIO(encoded))
            )
            np.testing.assert_array_equal(
                pipeline.decode(encoded, channels).numpy().squeeze(), np.asarray(seen.convert(mode)), err_msg=kind
            )
    data = mae_mto.get_config().data
    assert pipeline.train_image(saved(base, 'WEBP'), tf.constant([0, 1], tf.int64), data).shape == (224, 224, 3)
    with pytest.raises(ValueError, match='mode F'):
        pipeline.decode(saved(base.convert('F'), 'TIFF'), 3)


def test_contents_of_a_folder_are_reported(tmp_path, capsys):
    """Images, classes and what is skipped; hidden files are not there, and a class of unknown files is named."""
    files = {
        f'train/a/{n}': b'' for n in ('1.webp', '2.tif', '3.jfif', '4.avif', '5.JPG', '._5.JPG', 'boxes.txt', 'LICENSE')
    }
    files |= {'train/b/1.png': b'', 'train/.ipynb_checkpoints/1.jpg': b'', '.cache/x/1.jpg': b'', 'train/c/1.heic': b''}
    write_files(tmp_path, files | {'val/a/1.heic': b''})
    for _ in range(2):
        found = folder.open_folder(str(tmp_path), 'train')
    assert found.labels.tolist() == [0] * 5 + [1]
    assert found.classes == {'a', 'b'}
    assert capsys.readouterr().out == (
        f'data: {tmp_path}/train: 6 images, 2 classes; skipped 1 .heic, 1 .txt, 1 without a suffix '
        '(no image at all in c: no class)\n'
    )
    with pytest.raises(UserError, match=r"'val' of .* holds no image \(\.jpg, .*\.avif\); it has 1 \.heic"):
        folder.open_folder(str(tmp_path), 'val')


def test_loops_of_links_end(tmp_path):
    """A link into what it lies in is not followed; others are, also twice to one place."""
    write_files(tmp_path, {'data/train/a/1.png': b'', 'elsewhere/2.png': b''})
    train = tmp_path / 'data' / 'train'
    (train / 'a' / 'up').symlink_to(train)
    (train / 'a' / 'self').symlink_to(train / 'a' / 'self')
    for name in ('b', 'c'):
        (train / name).symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'data' / 'val').symlink_to(train)
    found = folder.open_folder(str(tmp_path / 'data'), 'train')
    assert [p.removeprefix(f'{train}/') for p in found.paths] == ['a/1.png', 'b/2.png', 'c/2.png']
    assert len(folder.open_folder(str(tmp_path / 'data'), 'val').paths) == 3


def test_folder_with_stray_images(tmp_path):
    for path in ('train/b/1.jpg', 'train/2.jpg'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b'')
    with pytest.raises(UserError, match=r'both next to and inside class folders, such as .*/train/2\.jpg'):
        folder.open_folder(str(tmp_path), 'train')
    with pytest.raises(UserError, match='no such folder'):
        folder.open_folder(str(tmp_path / 'none'), 'train')
