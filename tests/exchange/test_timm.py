"""Converted models against timm's own, in both directions. No TensorFlow here: with this PyTorch it crashes."""

import json

import numpy as np
import pytest

from mto_jax import exchange
from mto_jax.errors import UserError
from tests.exchange import made

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings('default')]


@pytest.fixture
def torch():
    found = pytest.importorskip('torch', reason='PyTorch is not installed (requirements-timm.txt)')
    found.set_num_threads(1)
    return found


@pytest.fixture
def timm(torch):
    return pytest.importorskip('timm', reason='timm is not installed (requirements-timm.txt)')


def exported(timm, weights, folder):
    """Loaded as its model card says; strictly, as timm does."""
    exchange.write(weights, folder, 'timm')
    config = json.loads((folder / 'config.json').read_text())
    path = str(folder / 'model.safetensors')
    arguments = config['model_args'] | {'num_classes': config['num_classes']}
    return timm.create_model(config['architecture'], checkpoint_path=path, **arguments).eval()


def assert_match(torch, weights, peer, x):
    """After every block, after the norm where it is there, and the logits."""
    found = []
    hooks = [block.register_forward_hook(lambda module, args, out: found.append(out)) for block in peer.blocks]
    pixels = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        final = peer.forward_features(pixels)
        for hook in hooks:
            hook.remove()
        logits = peer(pixels).numpy()
    *ours, normed = made.layers(weights, x)
    assert len(found) == len(ours) - 1
    for i, (a, b) in enumerate(zip(ours[1:], found, strict=True)):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4, err_msg=f'block {i}')
    np.testing.assert_allclose(ours[-1] if weights.pool == 'fc_norm' else normed, final.numpy(), atol=1e-4)
    if weights.pool:
        np.testing.assert_allclose(made.logits(weights, x), logits, atol=1e-4)


POOLS = ('', 'class', 'mean', 'fc_norm')


@pytest.mark.parametrize(
    ('size', 'pool'),
    [*((size, '') for size in made.SIZES if size != 'large_eps'), *(('other_sizes', pool) for pool in POOLS[1:])],
)
def test_vit(rng, torch, timm, tmp_path, size, pool):
    weights = made.encoder(rng, pool=pool, **made.SIZES[size])
    assert_match(torch, weights, exported(timm, weights, tmp_path / 'out'), made.images(rng, weights))
    made.assert_same(weights, exchange.read(tmp_path / 'out'))


def test_vit_without_a_class_token_and_with_layer_scale(rng, torch, timm, tmp_path):
    weights = made.encoder(rng, pool='fc_norm', model__class_token=False, model__layer_scale=0.1)
    assert_match(torch, weights, exported(timm, weights, tmp_path / 'out'), made.images(rng, weights))
    made.assert_same(weights, exchange.read(tmp_path / 'out'))


def test_vit_of_bootmae(rng, torch, timm, tmp_path):
    """Biases of queries and values only: those of the keys are zero there."""
    weights = made.encoder(rng, 'bootmae', pool='class')
    assert_match(torch, weights, exported(timm, weights, tmp_path / 'out'), made.images(rng, weights))
    back = exchange.read(tmp_path / 'out')
    assert not any(back.params['encoder']['blocks'][f'block{i}']['attn']['k_bias'].any() for i in range(2))


@pytest.mark.parametrize(
    ('fields', 'pool'),
    [*(({}, pool) for pool in POOLS), (made.SIZES['wide_image'] | {'model__heads': 2, 'model__mlp_ratio': 2.5}, '')],
)
def test_beit(rng, torch, timm, tmp_path, fields, pool):
    """Relative positions, on grids that are not square too."""
    fields = fields | ({'simmim__mask_unit': 1, 'model__position': 'learned'} if fields else {})
    weights = made.encoder(rng, 'simmim', pool=pool, **fields)
    peer = exported(timm, weights, tmp_path / 'out')
    assert type(peer).__name__ == 'Beit'
    assert_match(torch, weights, peer, made.images(rng, weights))
    made.assert_same(weights, exchange.read(tmp_path / 'out'))


def test_a_folder_in_one(rng, torch, timm, tmp_path):
    weights = made.encoder(rng, pool='class', data__mean=(0.5, 0.4, 0.3))
    exchange.write(weights, tmp_path / 'out', 'timm')
    peer = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert_match(torch, weights, peer, made.images(rng, weights))
    settings = timm.data.resolve_model_data_config(peer)
    assert tuple(settings['mean']) == (0.5, 0.4, 0.3)
    assert tuple(settings['input_size']) == (3, 32, 32)


@pytest.mark.parametrize(
    ('arguments', 'hints'),
    [
        ({}, {}),
        ({'class_token': False, 'global_pool': 'avg', 'fc_norm': True}, {}),
        ({'no_embed_class': True, 'init_values': 0.1}, {}),
        ({'global_pool': 'avg', 'fc_norm': False}, {'pool': 'mean'}),
        ({'img_size': (24, 48), 'num_classes': 0}, {'image_size': (24, 48)}),
    ],
)
def test_in_from_their_own_vit(rng, torch, timm, tmp_path, arguments, hints):
    """A file as timm's training scripts write it: the weights under state_dict, next to their settings."""
    from argparse import Namespace

    small = {'img_size': 24, 'patch_size': 6, 'embed_dim': 24, 'depth': 2, 'num_heads': 3, 'num_classes': 5}
    peer = timm.models.VisionTransformer(**small | arguments).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.tensor(rng.normal(size=tuple(p.shape)) * 0.2 + (p.ndim == 1)))
    path = tmp_path / 'last.pth'
    torch.save({'state_dict': peer.state_dict(), 'epoch': 3, 'args': Namespace(lr=0.1, opt='adamw')}, path)
    weights = exchange.read(path, heads=3, **hints)
    assert_match(torch, weights, peer, made.images(rng, weights))


def test_in_from_their_own_beit(rng, torch, timm, tmp_path):
    shared = {'use_abs_pos_emb': False, 'use_shared_rel_pos_bias': True, 'init_values': 0.1}
    peer = timm.models.Beit(24, 6, 3, 5, 'avg', 24, 2, 3, **shared).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.tensor(rng.normal(size=tuple(p.shape)) * 0.2))
    torch.save(peer.state_dict(), tmp_path / 'beit.pth')
    weights = exchange.read(tmp_path / 'beit.pth')
    assert (weights.pool, weights.config.model.heads) == ('fc_norm', 3)
    assert_match(torch, weights, peer, made.images(rng, weights))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'reg_tokens': 2}, 'register tokens'),
        ({'pre_norm': True}, 'a norm before the blocks'),
        ({'qk_norm': True}, 'norms of queries and keys'),
        ({'global_pool': 'map'}, 'attention pooling'),
    ],
)
def test_unsupported_features_are_named(torch, timm, tmp_path, arguments, words):
    peer = timm.models.VisionTransformer(24, 6, 3, 5, embed_dim=24, depth=1, num_heads=3, **arguments)
    torch.save(peer.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(UserError, match=words):
        exchange.read(tmp_path / 'x.pth', heads=3)
