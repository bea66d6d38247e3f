"""Our models against their peers: Hugging Face's ViTMAE, timm's block, and SimMIM in plain PyTorch.

Gradients and updates of key biases are left out: their exact gradient is zero, for softmax does not see what is added
to a whole row of logits, so that what is there is rounding.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import mae, simmim
from mto_jax import losses, methods
from mto_jax.training import optim, schedules
from tests.conftest import forward, randomised

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours to fix


@pytest.fixture
def torch():
    found = pytest.importorskip('torch', reason='PyTorch is not installed (requirements-peers.txt)')
    found.set_num_threads(1)
    return found


def named(tree):
    """{dotted name: array} of a tree of parameters or gradients."""
    return {'.'.join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_gradients_match(ours, theirs, bound):
    """Each within `bound` of its largest entry."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if 'k_bias' in name or 'k_proj.bias' in name:
            continue
        error = np.abs(ours[name] - value).max()
        assert error <= bound * np.abs(value).max(), (name, error, np.abs(value).max())


# ----------------------------------------------------------------------------------------------- Hugging Face's ViTMAE


def in_hugging_faces_names(tree, cfg):
    """Our MAE's parameters, or gradients by them, under the names and in the shapes of ViTMAEForPreTraining."""

    def dense(p):
        return {'weight': np.asarray(p['kernel']).T, 'bias': np.asarray(p['bias'])}

    def norm(p):
        return {'weight': np.asarray(p['scale']), 'bias': np.asarray(p['bias'])}

    def block(p, width):
        out = {'layernorm_before': norm(p['norm1']), 'layernorm_after': norm(p['norm2'])}
        kernel = np.asarray(p['attn']['qkv_kernel']).reshape(width, 3, width)
        for i, name in enumerate('qkv'):
            bias = np.asarray(p['attn'][f'{name}_bias']).ravel()
            out[f'attention.{name}_proj'] = {'weight': kernel[:, i].T, 'bias': bias}
        out['attention.o_proj'] = dense(p['attn']['proj'])
        out['mlp.fc1'], out['mlp.fc2'] = dense(p['mlp_in']), dense(p['mlp_out'])
        return out

    enc, dec = tree['encoder'], tree['decoder']
    p, c = cfg.patch_size, cfg.num_channels
    kernel = np.asarray(enc['patch_embed']['kernel']).reshape(p, p, c, -1).transpose(3, 2, 0, 1)
    groups = {
        'vit.embeddings.patch_embeddings.projection': {
            'weight': kernel,
            'bias': np.asarray(enc['patch_embed']['bias']),
        },
        'vit.layernorm': norm(enc['norm']),
        'decoder.decoder_embed': dense(dec['embed']),
        'decoder.decoder_norm': norm(dec['norm']),
        'decoder.decoder_pred': dense(dec['pred']),
    }
    for i in range(cfg.num_hidden_layers):
        for n, v in block(enc['blocks'][f'block{i}'], cfg.hidden_size).items():
            groups[f'vit.layers.{i}.{n}'] = v
    for i in range(cfg.decoder_num_hidden_layers):
        for n, v in block(dec['blocks'][f'block{i}'], cfg.decoder_hidden_size).items():
            groups[f'decoder.decoder_layers.{i}.{n}'] = v
    state = {f'{g}.{n}': v for g, values in groups.items() for n, v in values.items()}
    state['vit.embeddings.cls_token'] = np.asarray(enc['cls_token'])
    state['decoder.mask_token'] = np.asarray(dec['mask_token'])
    return state


def hugging_face_mae(torch, config, params, grid):
    """A ViTMAEForPreTraining of the config's shape with our parameters."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed (requirements-peers.txt)')
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    m, d = config.model, config.mae
    cfg = transformers.ViTMAEConfig(
        hidden_size=m.width,
        num_hidden_layers=m.depth,
        num_attention_heads=m.heads,
        intermediate_size=4 * m.width,
        image_size=list(config.data.image_size),
        patch_size=m.patch_size,
        num_channels=config.data.channels,
        decoder_hidden_size=d.decoder_width,
        decoder_num_hidden_layers=d.decoder_depth,
        decoder_num_attention_heads=d.decoder_heads,
        decoder_intermediate_size=4 * d.decoder_width,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=d.norm_pix_loss,
        layer_norm_eps=1e-6,
        hidden_act='gelu',
    )
    peer = transformers.ViTMAEForPreTraining(cfg)
    state = in_hugging_faces_names(params, cfg)
    # The positions are the peer's own function, not ours.
    for name, width in (
        ('vit.embeddings.position_embeddings', cfg.hidden_size),
        ('decoder.decoder_pos_embed', cfg.decoder_hidden_size),
    ):
        # It puts rows before columns; the published weights, and ViTMAE's own initialisation, have them the other way.
        table = build_2d_sinusoidal_position_embedding(*grid, width, cls_token=True).numpy()
        state[name] = np.concatenate([table[:, width // 2 :], table[:, : width // 2]], axis=1)[None]
    missing, unexpected = peer.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    # Its decoder hard-codes PyTorch's default epsilon in its own norms; ours follow the official 1e-6.
    for module in peer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    peer.vit.embeddings.interpolate_pos_encoding = lambda *_: peer.vit.embeddings.position_embeddings
    peer.decoder.interpolate_pos_encoding = lambda *_: peer.decoder.decoder_pos_embed
    return peer.eval()


def hugging_face_forward(torch, peer, images, noise):
    """The peer's output for channels-last images, and its target."""
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    # The flag is what allows images that are not square; the positions are of their size already.
    out = peer(pixels, noise=torch.tensor(noise), interpolate_pos_encoding=True)
    return out, peer.patchify(pixels, interpolate_pos_encoding=True)


def small_mae(config, size=(32, 32), channels=3, norm_pix_loss=False):
    """A small MAE whose number of patches is a square, which the peer's initialisation wants."""
    d, m = config.data, config.model
    d.image_size, d.channels, d.mean, d.std = size, channels, (0.5,) * channels, (0.5,) * channels
    m.patch_size, m.width, m.heads = 8, 32, 4
    config.mae.decoder_width, config.mae.norm_pix_loss = 16, norm_pix_loss
    return methods.build(config), (size[0] // 8, size[1] // 8)


@pytest.mark.peers
@pytest.mark.parametrize(
    ('size', 'channels', 'norm_pix_loss'),
    [((32, 32), 3, False), ((32, 32), 3, True), ((16, 64), 3, True), ((64, 16), 1, False), ((32, 32), 5, True)],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_mae_against_hugging_face(config, rng, torch, dtype, size, channels, norm_pix_loss):
    """Mask, target, predictions, loss, and the gradient by every parameter; the peer computes in float32."""
    config.model.dtype = dtype
    exact = dtype == 'float32'
    method, grid = small_mae(config, size, channels, norm_pix_loss)
    params = randomised(method.init(jax.random.key(0))[0], rng)
    peer = hugging_face_mae(torch, config, params, grid)
    images = rng.normal(size=(5, *size, channels)).astype(np.float32)
    noise = rng.uniform(size=(5, grid[0] * grid[1])).astype(np.float32)

    def loss_fn(p):
        out = forward(method, p, images, noise=noise)
        return out.losses['reconstruction'], out

    (loss, ours), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    their, target = hugging_face_forward(torch, peer, images, noise)
    their.loss.backward()
    np.testing.assert_array_equal(ours.mask, their.mask.numpy().astype(bool))
    np.testing.assert_allclose(ours.predictions, their.logits.detach().numpy(), atol=1e-4 if exact else 0.2)
    np.testing.assert_allclose(losses.patchify(jnp.asarray(images), 8), target.numpy(), atol=1e-6)
    assert float(loss) == pytest.approx(their.loss.item(), rel=1e-5 if exact else 5e-3)
    theirs = {n: p.grad.numpy() for n, p in peer.named_parameters() if p.requires_grad}
    mine = in_hugging_faces_names(grads, peer.config)
    if exact:
        assert_gradients_match(mine, theirs, 1e-4)
    else:  # parameters of hardly any gradient are all rounding: of all together
        error = math.sqrt(sum(np.square(mine[n] - g).sum() for n, g in theirs.items()))
        assert error < 0.05 * math.sqrt(sum(np.square(g).sum() for g in theirs.values()))


@pytest.mark.peers
def test_a_hundred_steps_against_hugging_face(config, rng, torch):
    """From the same weights, on the same batches and noise, with PyTorch's AdamW: loss curve and final parameters."""
    method, grid = small_mae(config)
    o = config.optim
    o.base_lr, o.warmup_epochs, config.batch_size = 2e-3, 10.0, 256  # one step an "epoch": a rate of 2e-3 at most
    schedule = schedules.learning_rate(o, config.batch_size, 100, 1)
    tx = optim.adamw(o, schedule)
    params = method.init(jax.random.key(0))[0]
    peer = hugging_face_mae(torch, config, params, grid)
    decayed = [p for p in peer.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in peer.parameters() if p.requires_grad and p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{'params': decayed, 'weight_decay': o.weight_decay}, {'params': others, 'weight_decay': 0.0}],
        betas=(o.b1, o.b2),
        eps=o.eps,
    )

    def loss_fn(p, images, noise):
        return forward(method, p, images, noise=noise).losses['reconstruction']

    @jax.jit
    def step(p, state, images, noise):
        loss, grads = jax.value_and_grad(loss_fn)(p, images, noise)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, loss

    # Something to learn: each image is one colour, nearly.
    state, ours, theirs = tx.init(params), [], []
    for t in range(100):
        images = (rng.normal(size=(16, 1, 1, 3)) + 0.1 * rng.normal(size=(16, 32, 32, 3))).astype(np.float32)
        noise = rng.uniform(size=(16, 16)).astype(np.float32)
        params, state, loss = step(params, state, images, noise)
        ours.append(float(loss))
        rate = 2e-3 * (t / 10 if t < 10 else 0.5 * (1 + math.cos(math.pi * (t - 10) / 90)))
        for group in adamw.param_groups:
            group['lr'] = rate
        adamw.zero_grad()
        their_loss = hugging_face_forward(torch, peer, images, noise)[0].loss
        their_loss.backward()
        adamw.step()
        theirs.append(their_loss.item())
    assert np.mean(ours[-10:]) < 0.8 * np.mean(ours[:10])
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    final = in_hugging_faces_names(params, peer.config)
    for name, value in peer.named_parameters():
        if value.requires_grad and 'k_proj.bias' not in name:
            np.testing.assert_allclose(final[name], value.detach().numpy(), atol=2e-3, err_msg=name)


# ------------------------------------------------------------------------------------------------------- timm's block


@pytest.mark.peers
@pytest.mark.parametrize('layer_scale', [0.0, 0.1])
def test_block_against_timm(rng, torch, layer_scale):
    """Output, and the gradients by input and parameters, of one block with the exact GELU."""
    timm = pytest.importorskip('timm.models.vision_transformer', reason='timm is not installed (requirements-timm.txt)')
    from mto_jax.attention import Conditioning
    from mto_jax.models.layers import Block

    ours = Block(heads=4, layer_scale=layer_scale)
    x = rng.normal(size=(3, 9, 32)).astype(np.float32)
    weight = rng.normal(size=x.shape).astype(np.float32)

    def apply(params, x):
        return ours.apply({'params': params}, x, Conditioning(), False)[0]

    params = randomised(ours.init(jax.random.key(0), x, Conditioning(), False)['params'], rng)
    peer = timm.Block(
        32,
        4,
        qkv_bias=True,
        init_values=layer_scale or None,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )

    def in_timms_names(p):
        a = p['attn']
        out = {
            'attn.qkv.weight': np.asarray(a['qkv_kernel']).reshape(32, 96).T,
            'attn.qkv.bias': np.concatenate([np.ravel(a[f'{n}_bias']) for n in 'qkv']),
            'attn.proj.weight': np.asarray(a['proj']['kernel']).T,
            'attn.proj.bias': np.asarray(a['proj']['bias']),
        }
        for i, (theirs, mine) in enumerate((('fc1', 'mlp_in'), ('fc2', 'mlp_out')), 1):
            out |= {f'mlp.{theirs}.weight': np.asarray(p[mine]['kernel']).T, f'mlp.{theirs}.bias': p[mine]['bias']}
            out |= {f'norm{i}.weight': p[f'norm{i}']['scale'], f'norm{i}.bias': p[f'norm{i}']['bias']}
        if layer_scale:
            out |= {'ls1.gamma': p['gamma_attn'], 'ls2.gamma': p['gamma_mlp']}
        return {k: np.asarray(v) for k, v in out.items()}

    peer.load_state_dict({k: torch.tensor(v) for k, v in in_timms_names(params).items()})
    grads, by_input = jax.grad(lambda p, x: (apply(p, x) * weight).sum(), argnums=(0, 1))(params, x)
    there = torch.tensor(x, requires_grad=True)
    out = peer(there)
    (out * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(apply(params, x), out.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(by_input, there.grad.numpy(), atol=2e-4)
    mine, theirs = in_timms_names(grads), {n: p.grad.numpy() for n, p in peer.named_parameters()}
    for bias in (mine['attn.qkv.bias'], theirs['attn.qkv.bias']):
        bias[32:64] = 0  # of the keys
    assert_gradients_match(mine, theirs, 1e-4)


# --------------------------------------------------------------------------------------------------- SimMIM in PyTorch


def torch_simmim(torch, p, images, unit_mask, patch, unit, heads):
    """Loss of SimMIM's ViT, after its paper and the description of its official code, on named tensors `p`.

    images (B, C, H, W); unit_mask bool (B, H / (unit * patch), W / (unit * patch)).
    """
    f, (b, c, height, width) = torch.nn.functional, images.shape
    gh, gw = height // patch, width // patch
    mask = unit_mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
    d = p['encoder.mask_token'].shape[-1]
    kernel = p['encoder.patch_embed.kernel'].reshape(patch, patch, c, d).permute(3, 2, 0, 1)
    x = f.conv2d(images, kernel, p['encoder.patch_embed.bias'], stride=patch).flatten(2).transpose(1, 2)
    w = mask.flatten(1)[..., None].float()
    x = x * (1 - w) + p['encoder.mask_token'] * w
    x = torch.cat([p['encoder.cls_token'].expand(b, -1, -1), x], 1)

    # Relative positions: one entry for each pair of offsets, and three for pairs with the class token.
    rows, columns = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing='ij')
    rows, columns = rows.flatten(), columns.flatten()
    inner = (rows[:, None] - rows + gh - 1) * (2 * gw - 1) + columns[:, None] - columns + gw - 1
    index, last = torch.zeros(gh * gw + 1, gh * gw + 1, dtype=torch.long), (2 * gh - 1) * (2 * gw - 1)
    index[1:, 1:], index[0, 1:], index[1:, 0], index[0, 0] = inner, last, last + 1, last + 2
    bias = p['encoder.relative_bias_table'][index].permute(2, 0, 1)

    def norm(x, name):
        return f.layer_norm(x, (d,), p[f'{name}.scale'], p[f'{name}.bias'], 1e-6)

    def dense(x, name):
        return x @ p[f'{name}.kernel'] + p[f'{name}.bias']

    depth = 1 + max(int(n[1]) for n in (re.findall(r'(block)(\d+)', k) for k in p) for n in n)
    for i in range(depth):
        at = f'encoder.blocks.block{i}'
        qkv = torch.einsum('bnc,cthd->tbhnd', norm(x, f'{at}.norm1'), p[f'{at}.attn.qkv_kernel'])
        q, v = (qkv[j] + p[f'{at}.attn.{n}_bias'][:, None] for j, n in ((0, 'q'), (2, 'v')))
        out = f.scaled_dot_product_attention(q, qkv[1], v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        x = x + p[f'{at}.gamma_attn'] * dense(out, f'{at}.attn.proj')
        x = x + p[f'{at}.gamma_mlp'] * dense(f.gelu(dense(norm(x, f'{at}.norm2'), f'{at}.mlp_in')), f'{at}.mlp_out')
    # The head: a convolution of size 1 to patch * patch * C channels; ours orders them (row, column, channel).
    y = dense(norm(x, 'encoder.norm')[:, 1:], 'head').reshape(b, gh, gw, patch, patch, c)
    rebuilt = y.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)
    shown = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return ((images - rebuilt).abs() * shown).sum() / (shown.sum() + 1e-5) / c


@pytest.mark.peers
@pytest.mark.parametrize(('size', 'channels'), [((32, 32), 3), ((16, 48), 1)])
def test_simmim_against_pytorch(rng, torch, size, channels):
    """Loss and gradients with units of 2 x 2 patches, relative positions, biases of queries and values, layer scale."""
    c = simmim.get_config()
    c.data.image_size, c.data.channels = size, channels
    c.data.mean, c.data.std = (0.5,) * channels, (0.5,) * channels
    c.model.patch_size, c.model.width, c.model.heads, c.model.depth = 4, 32, 4, 3
    c.model.dtype, c.model.drop_path = 'float32', 0.0
    method = methods.build(c)
    params = randomised(method.init(jax.random.key(0))[0], rng)
    images = rng.normal(size=(4, *size, channels)).astype(np.float32)
    units = (size[0] // 8, size[1] // 8)
    noise = rng.uniform(size=(4, units[0] * units[1])).astype(np.float32)
    count = math.ceil(c.mask_ratio * units[0] * units[1])
    mask = np.zeros(noise.shape, bool)
    np.put_along_axis(mask, np.argsort(noise, 1)[:, :count], True, 1)

    def loss_fn(p):
        return forward(method, p, images, noise=noise).losses['reconstruction']

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    theirs = {k: torch.tensor(v, requires_grad=True) for k, v in named(params).items()}
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    their_loss = torch_simmim(torch, theirs, pixels, torch.tensor(mask.reshape(-1, *units)), 4, 2, 4)
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    assert_gradients_match(named(grads), {k: v.grad.numpy() for k, v in theirs.items()}, 2e-4)


# --------------------------------------------------------------------------------------------- initial distributions


def xavier(rows, columns):
    """Uniform within sqrt(6 / (rows + columns)): (mean, standard deviation, largest magnitude)."""
    bound = math.sqrt(6 / (rows + columns))
    return 0, bound / math.sqrt(3), bound


def default_linear(fan_in):
    """PyTorch's default for weights and biases of linear layers and convolutions."""
    return 0, 1 / math.sqrt(3 * fan_in), 1 / math.sqrt(fan_in)


def cut_normal(std=0.02):
    """A normal cut at one standard deviation: its variance is 1 - 2 phi(1) / (2 Phi(1) - 1) of the nominal one."""
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    return 0, std * math.sqrt(1 - 2 * density / math.erf(1 / math.sqrt(2))), std


def constant(value):
    return value, 0, abs(value)


NORMAL = (0, 0.02, 0.12)
MAE_INIT = [
    (r'cls_token|mask_token', lambda s: NORMAL),
    (r'patch_embed.kernel', lambda s: xavier(*s)),
    (r'patch_embed.bias', lambda s: default_linear(8 * 8 * 3)),
    (r'qkv_kernel', lambda s: xavier(s[0], 3 * s[0])),
    (r'kernel', lambda s: xavier(*s)),
    (r'scale', lambda s: constant(1)),
    (r'bias', lambda s: constant(0)),
]


def simmim_init(name, shape):
    """BEiT's scheme: matrices are cut normals of .02, the last of both branches of block i over sqrt(2 (i + 1))."""
    if name.startswith('head'):
        return default_linear(128)
    block = re.search(r'block(\d+)\.(?:attn\.proj|mlp_out)\.kernel', name)
    if block:
        return cut_normal(0.02 / math.sqrt(2 * (int(block[1]) + 1)))
    if name.endswith('kernel') or 'token' in name:
        return cut_normal()
    return constant(1 if name.endswith('scale') else 0.1 if 'gamma' in name else 0)


def assert_distributed(values, mean, std, most, name):
    """Within five standard errors, and as wide as a sample of this size must nearly be."""
    n = values.size
    assert np.abs(values).max() <= most * (1 + 1e-6), name
    if std == 0:
        assert (values == mean).all(), name
        return
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(n), name
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * n), name


@pytest.mark.parametrize('seed', [0, 1])
def test_initial_distributions_of_mae(seed):
    """Official MAE: Xavier-uniform matrices (queries, keys and values as one), zero biases, tokens normal of .02."""
    c = mae.get_config()
    c.model.width, c.model.heads, c.model.depth, c.model.patch_size = 128, 4, 2, 8
    c.mae.decoder_width, c.mae.decoder_heads, c.mae.decoder_depth = 64, 4, 2
    params = named(methods.build(c).init(jax.random.key(seed))[0])
    for name, value in params.items():
        rule = next(rule for pattern, rule in MAE_INIT if re.search(pattern, name))
        assert_distributed(value, *rule(value.shape), name)
    assert not any('pos' in n for n in params)  # fixed positions are no parameters


@pytest.mark.parametrize('seed', [0, 1])
def test_initial_distributions_of_simmim(seed):
    c = simmim.get_config()
    c.model.width, c.model.heads, c.model.depth = 128, 4, 3
    c.model.layer_scale = 0.1
    params = named(methods.build(c).init(jax.random.key(seed))[0])
    for name, value in params.items():
        assert_distributed(value, *simmim_init(name, value.shape), name)
    assert not any(n.endswith('k_bias') for n in params)
