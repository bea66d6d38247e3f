"""Converted models against Hugging Face's own, in both directions: features of every layer, logits, loss."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import sys
import types

import jax
import numpy as np
import pytest

from mto_jax import convert, exchange
from mto_jax.exchange import files, tables, targets
from mto_jax.models import vit
from tests.conftest import forward
from tests.exchange import made

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings('default')]  # the peers' own warnings are not ours to fix


@pytest.fixture
def torch():
    found = pytest.importorskip('torch', reason='PyTorch is not installed (requirements-peers.txt)')
    found.set_num_threads(1)
    return found


@pytest.fixture
def transformers(torch):
    return pytest.importorskip('transformers', reason='transformers is not installed (requirements-peers.txt)')


def loaded(transformers, folder, **kwargs):
    """The class that an export names, with its weights: none may be missing or left over."""
    name = json.loads((folder / 'config.json').read_text())['architectures'][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    return model.eval()


def exported(transformers, weights, folder, **kwargs):
    exchange.write(weights, folder, 'huggingface')
    return loaded(transformers, folder, **kwargs)


def channels_first(torch, x):
    return torch.tensor(x.transpose(0, 3, 1, 2))


def randomise(torch, model, rng):
    """Every parameter of theirs redrawn, but for fixed positions."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.tensor(rng.normal(size=tuple(p.shape)) * 0.2 + (p.ndim == 1 and bool((p == 1).all()))))
    return model.eval()


def assert_encoders_match(torch, weights, peer, x, final=True):
    """After every block; `final`: and after the norm."""
    with torch.no_grad():
        out = peer(channels_first(torch, x), output_hidden_states=True)
    ours = made.layers(weights, x)
    theirs = [*out.hidden_states, out.last_hidden_state] if final else out.hidden_states
    assert len(theirs) == weights.config.model.depth + 1 + final
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4, err_msg=f'layer {i}')


@pytest.mark.parametrize('size', made.SIZES)
def test_vit(rng, torch, transformers, tmp_path, size):
    """Out, and in again from what Hugging Face itself saves."""
    weights = made.encoder(rng, **made.SIZES[size])
    peer = exported(transformers, weights, tmp_path / 'out', add_pooling_layer=False)
    x = made.images(rng, weights)
    assert_encoders_match(torch, weights, peer, x)
    peer.save_pretrained(tmp_path / 'again')
    back = exchange.read(tmp_path / 'again', mean=weights.config.data.mean, std=weights.config.data.std)
    made.assert_same(weights, back)
    assert back.config.model.to_dict() == weights.config.model.to_dict()


@pytest.mark.parametrize(('pool', 'fields'), [('class', {}), ('class', made.SIZES['other_sizes'])])
def test_vit_for_image_classification(rng, torch, transformers, tmp_path, pool, fields):
    weights = made.encoder(rng, pool=pool, **fields)
    peer = exported(transformers, weights, tmp_path / 'out')
    x = made.images(rng, weights)
    with torch.no_grad():
        theirs = peer(channels_first(torch, x)).logits.numpy()
    np.testing.assert_allclose(made.logits(weights, x), theirs, atol=1e-4)
    assert peer.config.num_labels == 7
    made.assert_same(weights, exchange.read(tmp_path / 'out'))


@pytest.mark.parametrize(
    ('fields', 'pool'),
    [
        *(({}, pool) for pool in ('', 'class', 'fc_norm')),
        ({'model__norm_eps': 1e-3, 'model__depth': 3, 'model__heads': 2, 'model__mlp_ratio': 2.5}, 'fc_norm'),
        ({'model__layer_scale': 0.0, 'model__relative_bias': False, 'model__position': 'sincos_rows'}, 'fc_norm'),
        ({'model__position': 'learned'}, ''),
    ],
)
def test_beit(rng, torch, transformers, tmp_path, fields, pool):
    """Encoders with relative positions, layer scale and biases of queries and values only, and heads on them."""
    weights = made.encoder(rng, 'simmim', pool=pool, **fields)
    peer = exported(transformers, weights, tmp_path / 'out')
    x = made.images(rng, weights)
    assert type(peer).__name__ == ('BeitForImageClassification' if pool else 'BeitModel')
    if pool:
        with torch.no_grad():
            np.testing.assert_allclose(
                made.logits(weights, x), peer(channels_first(torch, x)).logits.numpy(), atol=1e-4
            )
        peer = peer.beit
    assert_encoders_match(torch, weights, peer, x, final=pool != 'fc_norm')
    made.assert_same(weights, exchange.read(tmp_path / 'out'))


@pytest.mark.parametrize(
    ('fields', 'eps'),
    [
        ({}, 1e-6),
        (made.SIZES['other_sizes'], 1e-6),
        ({'data__image_size': (16, 64)}, 1e-6),
        (made.SIZES['grey'], 1e-3),
        ({'model__position': 'learned'}, 1e-6),
        ({'mae__norm_pix_loss': False, 'mask_ratio': 0.5}, 1e-6),
    ],
)
def test_mae(rng, torch, transformers, tmp_path, fields, eps):
    """Features of every layer with all patches visible; reconstruction and loss with the same mask."""
    weights = made.weights(rng, 'mae', model__norm_eps=eps, **fields)
    peer = exported(transformers, weights, tmp_path / 'out')
    x = made.images(rng, weights)
    patches = weights.method.arch.num_patches
    square = x.shape[1] == x.shape[2]
    noise = rng.uniform(size=(len(x), patches)).astype(np.float32)
    ours = forward(weights.method, weights.params, x, noise=noise)
    pixels = channels_first(torch, x)
    with torch.no_grad():
        encoded = peer.vit(pixels, noise=torch.tensor(noise))
        rebuilt = peer.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        np.testing.assert_allclose(ours.predictions, rebuilt.numpy(), atol=1e-4)
        if square:  # it refuses to take the target of other images
            loss = peer(pixels, noise=torch.tensor(noise)).loss
            assert float(ours.losses['reconstruction']) == pytest.approx(loss.item(), rel=1e-4)
        peer.vit.config.mask_ratio = 0.0
        order = torch.arange(patches)[None].expand(len(x), -1).float()  # visible, and where they were
        out = peer.vit(pixels, noise=order, output_hidden_states=True)
    for a, b in zip(made.layers(weights, x), [*out.hidden_states, out.last_hidden_state], strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
    peer.vit.config.mask_ratio = weights.config.mask_ratio
    peer.save_pretrained(tmp_path / 'again')
    back = exchange.read(tmp_path / 'again', mean=weights.config.data.mean, std=weights.config.data.std)
    made.assert_same(weights, back)
    assert back.config.mae.to_dict() == weights.config.mae.to_dict()
    assert back.config.mask_ratio == weights.config.mask_ratio


def small(transformers, kind, **more):
    common = {
        'hidden_size': 24,
        'num_hidden_layers': 2,
        'num_attention_heads': 3,
        'intermediate_size': 40,
        'image_size': 24,
        'patch_size': 6,
    }
    return getattr(transformers, f'{kind}Config')(**common | more)


def test_in_from_their_own_vit(rng, torch, transformers, tmp_path):
    """A model of theirs, with the eps of theirs and a pooler, which has no place here and is named."""
    peer = randomise(torch, transformers.ViTModel(small(transformers, 'ViT')), rng)
    peer.save_pretrained(tmp_path / 'vit')
    weights = exchange.read(tmp_path / 'vit')
    assert weights.config.model.norm_eps == 1e-12
    assert weights.notes == tuple(f'left out: pooler.dense.{n} (the pooler)' for n in ('bias', 'weight'))
    assert_encoders_match(torch, weights, peer, made.images(rng, weights))


@pytest.mark.parametrize('mean', [True, False])
def test_in_from_their_own_beit(rng, torch, transformers, tmp_path, mean):
    config = small(
        transformers,
        'Beit',
        use_shared_relative_position_bias=True,
        use_mean_pooling=mean,
        id2label={0: 'a', 1: 'b', 2: 'c'},
    )
    peer = randomise(torch, transformers.BeitForImageClassification(config), rng)
    peer.save_pretrained(tmp_path / 'beit')
    weights = exchange.read(tmp_path / 'beit')
    assert weights.pool == ('fc_norm' if mean else 'class')
    x = made.images(rng, weights)
    with torch.no_grad():
        np.testing.assert_allclose(made.logits(weights, x), peer(channels_first(torch, x)).logits.numpy(), atol=1e-4)
    assert_encoders_match(torch, weights, peer.beit, x, final=not mean)


def test_in_from_their_own_mae(rng, torch, transformers, tmp_path):
    decoder = {'decoder_hidden_size': 16, 'decoder_num_hidden_layers': 1, 'decoder_num_attention_heads': 4}
    config = small(transformers, 'ViTMAE', **decoder, decoder_intermediate_size=16 * 40 // 24)
    peer = randomise(torch, transformers.ViTMAEForPreTraining(config), rng)
    with torch.no_grad():
        peer.decoder.initialize_weights(16)  # its constructor leaves the positions of its decoder at zero
    peer.save_pretrained(tmp_path / 'mae')
    weights = exchange.read(tmp_path / 'mae')
    x = made.images(rng, weights)
    noise = rng.uniform(size=(len(x), 16)).astype(np.float32)
    ours = forward(weights.method, weights.params, x, noise=noise)
    with torch.no_grad():
        out = peer(channels_first(torch, x), noise=torch.tensor(noise))
    np.testing.assert_allclose(ours.predictions, out.logits.numpy(), atol=1e-4)
    assert float(ours.losses['reconstruction']) == pytest.approx(out.loss.item(), rel=1e-4)


@pytest.mark.parametrize('resize', [0, 48])
def test_the_image_processor(rng, transformers, torch, tmp_path, resize):
    """It makes normalised pixels of the model's size of a photograph of any."""
    weights = made.encoder(rng)
    weights.config.data.eval_resize = resize
    exchange.write(weights, tmp_path / 'out', 'huggingface')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'out')
    photograph = np.full((50, 70, 3), 51, np.uint8)
    pixels = processor(images=photograph, return_tensors='np')['pixel_values']
    assert pixels.shape == (1, 3, 32, 32)
    d = weights.config.data
    want = (0.2 - np.array(d.mean)) / np.array(d.std)
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), np.broadcast_to(want, (32, 32, 3)), atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('size', ['nano', 'ti', 's', 'b'])
def test_mae_of_the_standard_sizes(rng, torch, transformers, tmp_path, size, dtype):
    """Their widths and heads, two blocks deep: features, reconstruction, loss and gradients by every parameter."""
    _, width, heads = vit.SIZES[size]
    decoder = {'mae__decoder_width': 512, 'mae__decoder_heads': 16, 'mae__decoder_depth': 1} if size == 'b' else {}
    weights = made.weights(rng, 'mae', model__width=width, model__heads=heads, **decoder)
    fresh = weights.method.init(jax.random.key(0))[0]  # of the size that trained weights have
    weights = dataclasses.replace(weights, params=jax.tree.map(np.asarray, fresh))
    peer = exported(transformers, weights, tmp_path / 'out')
    weights.config.model.dtype = dtype
    weights = dataclasses.replace(weights)
    exact = dtype == 'float32'
    x = made.images(rng, weights)
    noise = rng.uniform(size=(len(x), 16)).astype(np.float32)

    def loss_fn(params):
        out = forward(weights.method, params, x, noise=noise)
        return out.losses['reconstruction'], out.predictions

    (loss, predictions), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(weights.params)
    out = peer(channels_first(torch, x), noise=torch.tensor(noise))
    out.loss.backward()
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-4 if exact else 5e-3)
    np.testing.assert_allclose(predictions, out.logits.detach().numpy(), atol=1e-4 if exact else 0.1)
    mine = dataclasses.replace(weights, params=jax.tree.map(np.asarray, grads))
    mine = targets.export(mine, 'huggingface').arrays
    # Under published names, as it saves itself; of key biases only rounding is left.
    for p in peer.parameters():
        p.data = p.grad if p.requires_grad else p.data
    peer.save_pretrained(tmp_path / 'gradients')
    theirs = files.load(tmp_path / 'gradients').arrays
    theirs = {re.sub('decoder_encoder.layer', 'decoder_layers', n): g for n, g in theirs.items()}
    assert theirs.keys() == mine.keys()
    theirs = {n: g for n, g in theirs.items() if not n.endswith(('key.bias', 'position_embeddings', 'pos_embed'))}
    error = np.sqrt(sum(np.square(mine[n] - g).sum() for n, g in theirs.items()))
    assert error < (1e-4 if exact else 0.03) * np.sqrt(sum(np.square(g).sum() for g in theirs.values()))


# ------------------------------------------------------------------------------------------------------ pickled files


class Evil:
    """Would make a folder if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Other:
    """Does nothing, but is no weights."""


def refused(capsys, source, words, *flags):
    with pytest.raises(SystemExit) as stopped:
        convert.main([f'--from={source}', f'--to={source.parent / "out"}', *flags])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith('error: ')
    assert line.count('\n') == 1
    assert re.search(words, line), line
    assert sorted(p.name for p in source.parent.iterdir()) == [source.name]


def test_pickled_files(rng, torch, tmp_path, monkeypatch):
    """As official codes save them: weights next to an optimizer and settings, of which none is run or needed."""
    mae, simmim = made.weights(rng, 'mae'), made.weights(rng, 'simmim')

    class CfgNode(dict):
        pass

    module = types.ModuleType('yacs.config')
    module.CfgNode, CfgNode.__module__, CfgNode.__qualname__ = CfgNode, 'yacs.config', 'CfgNode'
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    config = CfgNode(MODEL=CfgNode(NAME='simmim'))
    config.frozen = True
    tensors = [{n: torch.tensor(a) for n, a in arrays(w, k).items()} for w, k in ((mae, 'mae'), (simmim, 'simmim'))]
    more = {'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]}, 'epoch': 3}
    torch.save({'model': tensors[0], 'args': argparse.Namespace(lr=0.1), **more}, tmp_path / 'mae.pth')
    torch.save({'model': tensors[1], 'config': config, **more}, tmp_path / 'simmim.pth')
    torch.save({f'module.{n}': t for n, t in tensors[0].items()}, tmp_path / 'bare.bin')
    ema = {n: t + 1 if n == 'norm.bias' else t for n, t in tensors[0].items()}
    torch.save({'model': tensors[0], 'model_ema': ema}, tmp_path / 'ema.pt')
    monkeypatch.undo()
    made.assert_same(mae, exchange.read(tmp_path / 'mae.pth', heads=4, decoder_heads=2))
    made.assert_same(simmim, exchange.read(tmp_path / 'simmim.pth'))
    made.assert_same(mae, exchange.read(tmp_path / 'bare.bin', heads=4, decoder_heads=2))
    averaged = exchange.read(tmp_path / 'ema.pt', key='model_ema', heads=4, decoder_heads=2)
    np.testing.assert_array_equal(averaged.params['encoder']['norm']['bias'], ema['norm.bias'].numpy())


def arrays(weights, kind):
    return tables.write(tables.TABLES[kind](weights.method, weights.pool), weights.flat())


SPOILED = {
    'code': (
        lambda torch, path, good: torch.save({'model': good, 'x': Evil(path.parent / 'ran')}, path),
        r'refused; nothing in it was run',
    ),
    'code among the weights': (
        lambda torch, path, good: torch.save(good | {'x': Evil(path.parent / 'ran')}, path),
        r'refused; nothing in it was run',
    ),
    'an old pickle with code': (
        lambda torch, path, good: path.write_bytes(pickle.dumps(Evil(path.parent / 'ran'))),
        r'refused; nothing in it was run|not an intact PyTorch file',
    ),
    'a class': (lambda torch, path, good: torch.save({'model': good, 'x': Other()}, path), r'refused.*Other'),
    'a full model': (lambda torch, path, good: torch.save(torch.nn.Linear(2, 2), path), r'refused.*Linear'),
    'truncated': (
        lambda torch, path, good: (torch.save(good, path), path.write_bytes(path.read_bytes()[:-400])),
        r'not an intact PyTorch file',
    ),
    'text': (lambda torch, path, good: path.write_text('<html>'), r'not an intact PyTorch file|refused'),
    'empty': (lambda torch, path, good: path.write_bytes(b''), r'is empty'),
    'a list': (lambda torch, path, good: torch.save([1, 2], path), r'holds a list, expected named weights'),
    'an empty one': (lambda torch, path, good: torch.save({}, path), r'expected named weights'),
    'numbers among the weights': (
        lambda torch, path, good: torch.save(good | {'lr': 0.1}, path),
        r'holds entries that are not arrays: lr',
    ),
    'another model': (
        lambda torch, path, good: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        r'no known family.*bias, weight',
    ),
}


@pytest.mark.parametrize('what', SPOILED)
def test_pickled_files_that_are_refused(rng, torch, tmp_path, capsys, what):
    spoil, words = SPOILED[what]
    good = {n: torch.tensor(a) for n, a in arrays(made.encoder(rng), 'timm_vit').items()}
    spoil(torch, tmp_path / 'x.pth', good)
    refused(capsys, tmp_path / 'x.pth', words)


def test_an_entry_that_is_not_there(rng, torch, tmp_path, capsys):
    torch.save({'model': {}, 'epoch': 1}, tmp_path / 'x.pth')
    refused(capsys, tmp_path / 'x.pth', r"no weights under 'ema'; its entries are model, epoch", '--key=ema')
