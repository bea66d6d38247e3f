"""ConMIM against a float64 form written from its description, and each of its parts against what it stands for."""

import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import conmim as conmim_config
from configs import conmim_mto
from mto_jax import methods, tasks
from mto_jax.methods import Clock, conmim
from mto_jax.runtime import parallel
from mto_jax.tasks import pretrain
from mto_jax.training import job, optim, schedules, train_state
from tests.conftest import named, randomised, shrink
from tests.training import test_train

VANISHES = 'encoder/norm/bias'  # added to all tokens, it is taken away by the first batch normalisation


def tiny(**fields):
    """ConMIM's own recipe on small images in colour; more fields as `group__name`."""
    c = shrink(conmim_config.get_config())
    c.data.image_size, c.data.channels = (16, 24), 3
    c.data.mean, c.data.std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    c.model.patch_size, c.model.dtype, c.model.attention = 4, 'float32', ''
    c.conmim.group, c.batch_size = 4, 8
    c.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return c


def drawn(method, rng):
    """`randomised` parameters of a method."""
    return randomised(jax.eval_shape(method.init, jax.random.key(0))[0], rng)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def encode(p, image, patch, hidden=None):
    """Tokens of one image (H, W, C), the class token first; mask tokens where `hidden` says."""
    gh, gw = image.shape[0] // patch, image.shape[1] // patch
    cells = [(r, c) for r in range(gh) for c in range(gw)]
    pieces = [image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel() for r, c in cells]
    x = jnp.stack(pieces) @ p['patch_embed']['kernel'] + p['patch_embed']['bias']
    if hidden is not None:
        x = jnp.where(hidden[:, None], p['mask_token'][0], x)
    x = jnp.concatenate([p['cls_token'][0], x])
    width, last = 2 * gw - 1, (2 * gh - 1) * (2 * gw - 1)
    index = np.full((len(x), len(x)), last + 2)
    index[0, 1:], index[1:, 0] = last, last + 1
    for i, (ri, ci) in enumerate(cells):
        for j, (rj, cj) in enumerate(cells):
            index[i + 1, j + 1] = (ri - rj + gh - 1) * width + ci - cj + gw - 1
    for name in sorted(p['blocks']):
        q = p['blocks'][name]
        a, y, heads = q['attn'], layer_norm(x, q['norm1']), []
        for h in range(a['q_bias'].shape[0]):
            queries = y @ a['qkv_kernel'][:, 0, h] + a['q_bias'][h]
            keys, values = y @ a['qkv_kernel'][:, 1, h], y @ a['qkv_kernel'][:, 2, h] + a['v_bias'][h]
            s = jnp.exp(queries @ keys.T / np.sqrt(keys.shape[1]) + p['relative_bias_table'][index, h])
            heads.append(s / s.sum(1, keepdims=True) @ values)
        x = x + q['gamma_attn'] * (jnp.concatenate(heads, 1) @ a['proj']['kernel'] + a['proj']['bias'])
        y = layer_norm(x, q['norm2']) @ q['mlp_in']['kernel'] + q['mlp_in']['bias']
        y = y * (1 + jax.lax.erf(y / np.sqrt(2))) / 2
        x = x + q['gamma_mlp'] * (y @ q['mlp_out']['kernel'] + q['mlp_out']['bias'])
    return layer_norm(x, p['norm'])


def project(p, tokens):
    """The projector on all tokens of one group as rows; and {layer: (mean, unbiased variance)}."""
    x, moments = tokens, {}
    for i in range(3):
        x = x @ p[f'linear{i}']['kernel']
        mean, var = x.mean(0), x.var(0)
        moments[f'norm{i}'] = {'mean': mean, 'var': x.var(0, ddof=1)}
        x = (x - mean) / jnp.sqrt(var + 1e-5)
        if i < 2:
            x = nn.relu(x * p[f'norm{i}']['scale'] + p[f'norm{i}']['bias'])
    return x, moments


def cross_entropy(queries, keys, hidden, temperature):
    """Summed over the hidden patches of one image; rows of patches."""
    q, k = (x / jnp.sqrt((x * x).sum(1, keepdims=True)) for x in (queries, jax.lax.stop_gradient(keys)))
    likeness = jnp.exp(q @ k.T / temperature)
    return -(hidden * jnp.log(jnp.diag(likeness) / likeness.sum(1))).sum()


def reference(params, teacher, images, strong, hidden, c):
    """(loss, statistics), the latter as means over the groups."""
    ours = jax.vmap(lambda x, h: encode(params['encoder'], x, c.model.patch_size, h))(images, hidden)
    theirs = jax.vmap(lambda x: encode(teacher['encoder'], x, c.model.patch_size))(strong)
    embedded, found = {}, {}
    for owner, p, tokens in (('student', params, ours), ('teacher', teacher, theirs)):
        rows = tokens.reshape(len(images) // c.conmim.group, -1, tokens.shape[-1])
        projected, moments = jax.vmap(lambda x, p=p: project(p['projector'], x))(rows)
        embedded[owner] = projected.reshape(*tokens.shape[:2], -1)[:, 1:]
        found[owner] = jax.tree.map(lambda x: x.mean(0), moments)
    each = jax.vmap(lambda q, k, h: cross_entropy(q, k, h, c.conmim.temperature))
    return each(embedded['student'], embedded['teacher'], hidden).sum() / hidden.sum(), found


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.fixture
def smooth(monkeypatch):
    """The projector's ReLU made smooth in both forms, for gradients: near zero, one may let a value pass alone."""
    monkeypatch.setattr(nn, 'relu', nn.silu)


@pytest.mark.parametrize('activation', ['relu', 'smooth'])
@pytest.mark.parametrize(
    'fields',
    [{}, {'data__image_size': (24, 16), 'model__width': 24, 'model__heads': 3, 'model__depth': 1, 'conmim__group': 8}],
    ids=['two groups', 'one group'],
)
def test_against_float64(request, rng, fields, activation):
    """Loss and running statistics to 1e-5; smooth, a gradient to 1e-5 of its largest and 2e-7 of the norm of all."""
    if activation == 'smooth':
        request.getfixturevalue('smooth')
    c = tiny(**fields)
    training = job.prepare(c, 130)
    method = training.objective.method
    params, model_state = drawn(method, rng), {'teacher': drawn(method, rng)}
    teacher = model_state['teacher']
    images, strong = rng.normal(size=(2, 8, *c.data.image_size, 3)).astype(np.float32)
    noise = rng.uniform(size=(8, 6)).astype(np.float32)

    @jax.jit
    def value_and_grad(params):
        def loss(p):
            views = {'image': images, 'strong': strong}
            out = method.loss(p, model_state, views, jax.random.key(2), training.clock(jnp.int32(0)), noise=noise)
            return out.losses['contrast'], out.statistics

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, statistics), gradients = value_and_grad(params)
    # The units with the least noise are hidden, each of 2 x 2 patches.
    units = noise.argsort(1).argsort(1) < np.ceil(6 * c.mask_ratio)
    h, w = c.data.image_size[0] // 8, c.data.image_size[1] // 8
    hidden = units.reshape(8, h, 1, w, 1).repeat(2, 2).repeat(2, 4).reshape(8, -1)
    with jax.enable_x64(True):
        form = jax.jit(jax.value_and_grad(lambda p: reference(p, *rest, hidden, c), has_aux=True))
        rest = wide(teacher), wide(images), wide(strong)
        (want, moments), exact = jax.device_get(form(wide(params)))
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for name, value in named(moments).items():
        np.testing.assert_allclose(named(statistics)[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
    if activation == 'relu':
        return
    exact, gradients = named(exact), named(gradients)
    norm = np.sqrt(sum((g**2).sum() for g in exact.values()))
    assert np.abs(exact.pop(VANISHES)).max() < 1e-12 * norm
    assert np.abs(gradients.pop(VANISHES)).max() < 1e-6 * norm
    for name, g in exact.items():
        # The second term is for sums that cancel almost: batch normalisation takes away what all tokens share.
        atol = 1e-5 * np.abs(g).max() + 2e-7 * norm
        np.testing.assert_allclose(gradients[name], g, rtol=0, atol=atol, err_msg=name)


def test_small_layer_scales_in_bfloat16(rng):
    """ViT-L's layer scale of 1e-5: a residual stream of bfloat16 loses what the blocks add, one of float32 keeps it."""
    added, images = {}, rng.normal(size=(2, 16, 24, 3)).astype(np.float32)
    params = drawn(methods.build(tiny()), rng)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, 1e-5) if 'gamma' in path[-1].key else x, params
    )
    for name, fields in {
        'exact': {'model__dtype': 'float32'},
        'shipped': {'model__dtype': 'bfloat16', 'model__residual_dtype': 'float32'},
        'lost': {'model__dtype': 'bfloat16'},
    }.items():
        method = methods.build(tiny(**fields, model__layer_scale=1e-5))
        before, after = (
            np.asarray(method.encode(params, images, depth=depth), np.float32) for depth in (0, method.arch.depth)
        )
        added[name] = after - before
    largest = np.abs(added['exact']).max()
    assert largest > 0
    assert np.abs(added['shipped'] - added['exact']).max() < 0.05 * largest
    assert np.abs(added['lost'] - added['exact']).max() > 0.5 * largest


@pytest.mark.slow
def test_bfloat16(smooth, rng):
    """Matrix products in bfloat16: the loss within 2%; all gradients together within 10% in most of five draws.

    A token with little variance before a layer normalisation has larger errors: seldom, and then up to 20%.
    """

    def value_and_grad(method):
        def loss(params, teacher, images, strong, noise):
            out = method.loss(
                params, {'teacher': teacher}, {'image': images, 'strong': strong}, jax.random.key(2), clock, noise=noise
            )
            return out.losses['contrast']

        return jax.jit(jax.value_and_grad(loss))

    clock = Clock(jnp.int32(0), 10, 5)
    method = methods.build(tiny())
    exact, rounded = value_and_grad(method), value_and_grad(methods.build(tiny(model__dtype='bfloat16')))
    errors = []
    for _ in range(5):
        images, strong = rng.normal(size=(2, 8, 16, 24, 3)).astype(np.float32)
        given = drawn(method, rng), drawn(method, rng), images, strong, rng.uniform(size=(8, 6)).astype(np.float32)
        (want, gradients), (got, found) = exact(*given), rounded(*given)
        assert float(got) == pytest.approx(float(want), rel=0.02)
        difference = jax.tree.map(jnp.subtract, found, gradients)
        errors.append(float(optax.tree.norm(difference) / optax.tree.norm(gradients)))
    assert np.median(errors) < 0.1, errors


@pytest.mark.slow
def test_twenty_steps_against_float64(smooth, rng):
    """From the initial values, with clipping and AdamW: losses to 1e-5; teacher and running statistics at the end."""
    c = tiny(epochs=5.0, optim__warmup_epochs=1.0, optim__base_lr=2e-3, optim__b2=0.9, conmim__momentum=0.9)
    training = job.prepare(c, 32)
    method, o = training.objective.method, c.optim
    state, key = jax.jit(lambda: training.create(0))(), train_state.stream(0, 'train')
    step, empty = jax.jit(training.train_step), train_state.Meter.empty(training.names)
    kept = {'cls_token', 'bias', 'scale', 'q_bias', 'v_bias', 'gamma_attn', 'gamma_mlp'}
    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in kept, state.params)
    batches = rng.integers(0, 256, (20, 8, 16, 24, 3), np.uint8)
    with jax.enable_x64(True):
        form = jax.jit(lambda *a: jax.value_and_grad(reference, has_aux=True)(*a, c))
        params = teacher = wide(state.params)
        running, zeros = wide(state.model_state['running']), jax.tree.map(jnp.zeros_like, params)
        m, v = zeros, zeros
    for t, batch in enumerate(batches):
        view_key, loss_key = jax.random.split(jax.random.fold_in(key, t))
        views = training.objective.views(batch, view_key)
        hidden = np.asarray(method.masks(jax.random.split(loss_key, 3)[0], 8))
        state, meter = step(state, empty, {}, {'image': batch}, key)
        rate = float(training.schedule(t))
        with jax.enable_x64(True):
            (loss, moments), g = form(params, teacher, wide(views['image']), wide(views['strong']), hidden)
            norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
            g = jax.tree.map(lambda x, n=norm: x * jnp.minimum(1, o.clip_norm / n), g)
            m = jax.tree.map(lambda a, b: o.b1 * a + (1 - o.b1) * b, m, g)
            v = jax.tree.map(lambda a, b: o.b2 * a + (1 - o.b2) * b * b, v, g)

            def updated(p, a, b, yes, t=t, rate=rate):
                change = a / (1 - o.b1 ** (t + 1)) / (jnp.sqrt(b / (1 - o.b2 ** (t + 1))) + o.eps)
                return p - rate * (change + o.weight_decay * yes * p)

            params = jax.tree.map(updated, params, m, v, decays)
            d = 1 - (1 - c.conmim.momentum) * (1 + np.cos(np.pi * t / 20)) / 2
            teacher = jax.tree.map(lambda a, b, d=d: d * a + (1 - d) * b, teacher, params)
            running = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, running, moments)
        assert float(meter.sums['contrast']) == pytest.approx(float(loss), rel=1e-5), t
    got, want = named(state.model_state), named({'teacher': teacher, 'running': running})
    assert got.keys() == want.keys()
    # Where the gradient vanishes, Adam makes steps of rounding noise; the first normalisation takes them away.
    noisy = {f'teacher/{VANISHES}', 'running/student/norm0/mean', 'running/teacher/norm0/mean'}
    for name in want.keys() - noisy:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-4 * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize(('images', 'group'), [(16, 2), (24, 8), (24, 24)], ids=['inside', 'straddling', 'all'])
def test_groups_on_eight_devices(rng, images, group):
    """Values and gradients as on one device; where a group straddles devices, no activations travel."""
    tokens, projector = 11, conmim.Projector(24, 8, methods.architecture(tiny()))
    params = drawn(methods.build(tiny()), rng)['projector']
    x, weights = (rng.normal(size=(images, tokens, k)).astype(np.float32) for k in (16, 8))

    def loss(params, x):
        y, moments = projector.apply({'params': params}, x, group)
        return (y * weights).mean(), (y, moments)

    found = []
    for count in (1, 8):
        mesh = parallel.make_mesh(count, devices=jax.devices()[:count])
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, parallel.replicated(mesh)), parallel.put_batch({'x': x}, mesh)['x']
            compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*placed).compile()
            found.append(named(jax.device_get(compiled(*placed))))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=1e-5 * max(np.abs(value).max(), 0.1))
    moved = re.findall(
        r'= (.*) (?:all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)', compiled.as_text()
    )
    sizes = [
        int(np.prod([int(n) for n in dims.split(',') if n]))
        for line in moved
        for dims in re.findall(r'\[([\d,]*)\]', line)
    ]
    assert sizes
    assert all(size % tokens for size in sizes)
    gathered = [line for line in compiled.as_text().splitlines() if ' all-gather(' in line]
    assert bool(gathered) == (group == 8)


# By iteration at 625 per epoch, as the scheduler of TencentARC/ConMIM 4263955 computes them.
MOMENTUM = {
    800: {0: 0.996, 100: 0.996, 6250: 0.99600154, 100000: 0.99638197, 250000: 0.998, 499999: 1.0},
    1600: {0: 0.996, 100: 0.996, 6250: 0.99600039, 100000: 0.99609789, 500000: 0.998, 999999: 1.0},
}


@pytest.mark.parametrize('epochs', MOMENTUM)
def test_momentum_of_the_teacher(epochs):
    """The part of the student that the teacher takes up at a step, from a teacher of 0 and a student of 1."""
    method = methods.build(conmim_config.get_config())
    zero, one = jnp.zeros(()), jnp.ones(())

    def taken(step):
        after = method.after_update(one, {'teacher': zero, 'running': zero}, one, Clock(step, epochs * 625, 625))
        return after['teacher']

    steps = jnp.array(list(MOMENTUM[epochs]))
    np.testing.assert_allclose(1 - np.float64(jax.vmap(taken)(steps)), list(MOMENTUM[epochs].values()), atol=1e-8)
    after = method.after_update(one, {'teacher': zero, 'running': zero}, one, Clock(steps[0], 10, 1))
    assert float(after['running']) == pytest.approx(0.1)


@pytest.mark.parametrize(('size', 'scale', 'epochs'), [('vit_b', 0.1, 800), ('vit_l', 1e-5, 1600)])
def test_official_recipe(size, scale, epochs):
    """ViT-B has the official code's parameters but for an unused head of 8192 x 768 values and 8192 biases."""
    c = conmim_config.get_config(size)
    assert (c.model.layer_scale, c.epochs, c.batch_size, c.mask_ratio) == (scale, epochs, 2048, 0.75)
    o, official = c.optim, {'vit_b': test_train.CONMIM_800, 'vit_l': test_train.CONMIM_1600}[size]
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.98, 1e-8, 0.05, 1.0)
    assert (c.data.crop_area, c.data.interpolation, c.data.mean) == ((0.08, 1.0), 'bicubic', (0.485, 0.456, 0.406))
    rates = schedules.learning_rate(o, c.batch_size, schedules.to_steps(c.epochs, 625), 625)
    assert [float(rates(step)) for step in official] == pytest.approx([*official.values()], rel=1e-5, abs=1e-10)
    wanted = {'mask_unit': 2, 'hidden': 4096, 'out': 256, 'group': 64, 'temperature': 0.1, 'momentum': 0.996}
    assert c.conmim.to_dict() == wanted | {'blur_radius': (0.1, 2.0)}
    method = methods.build(c)
    params, model_state = jax.eval_shape(method.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, model_state['teacher']) == jax.tree.map(jnp.shape, params)
    assert {n: x.shape for n, x in model_state['running']['teacher']['norm2'].items()} == {
        'mean': (256,),
        'var': (256,),
    }
    if size == 'vit_b':
        assert sum(x.size for x in jax.tree.leaves(params)) == 112_953_680 - 8192 * 769
        decays = jax.tree.leaves(optim.decay_mask(params, c.optim.decay_cls_token, c.optim.decay_mask_token))
        assert (sum(decays), len(decays)) == (55 - 1, 55 + 141 - 2)


def test_masks_of_the_official_recipe(rng):
    """5,000 masks: 148 of 196 patches; means over places within four standard errors of a difference of two samples."""
    method, n = methods.build(conmim_config.get_config()), 5000
    mask = np.asarray(method.masks(jax.random.key(int(rng.integers(2**31))), n)).reshape(n, 14, 14)
    assert (mask.sum((1, 2)) == 148).all()
    edge = np.ones((14, 14), bool)
    edge[1:-1, 1:-1] = False
    places = {  # of the official generator
        'edge': (mask[:, edge].mean(1), 0.7551),
        'centre': (mask[:, 6:8, 6:8].mean((1, 2)), 0.7536),
        'pairs': ((mask[:, :, 1:] & mask[:, :, :-1]).mean((1, 2)), 0.6676),
        **{
            f'corner {r} {c}': (mask[:, r, c], v)
            for r, c, v in ((0, 0, 0.760), (0, 13, 0.760), (13, 0, 0.753), (13, 13, 0.745))
        },
    }
    for name, (values, official) in places.items():
        assert abs(values.mean() - official) < 4 * np.sqrt(2 / n) * values.std() + 5e-4, name  # rounded figures


def test_initial_values():
    """Normals of 0.02 cut at one deviation, the last matrix of each branch over sqrt(2 (l + 1)); a copy as teacher."""
    c = tiny(model__width=64, conmim__hidden=128, conmim__out=32)
    params, model_state = jax.jit(methods.build(c).init)(jax.random.key(5))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model_state['teacher']), strict=True):
        np.testing.assert_array_equal(a, b)
    cut = 0.02 * 0.539599
    for name, value in named(params).items():
        last, block = name.rsplit('/', 1)[-1], re.search(r'block(\d)/.*(?:proj|mlp_out)/kernel', name)
        if last == 'scale' or last.startswith('gamma'):
            assert (value == (1 if last == 'scale' else np.float32(0.1))).all(), name
        elif last.endswith('bias') or last == 'relative_bias_table':
            assert not value.any(), name
        else:
            factor = 1 / np.sqrt(2 * (int(block[1]) + 1)) if block else 1
            assert np.abs(value).max() <= 0.02 * factor * (1 + 1e-6), name
            # Five standard errors; the kurtosis of the cut normal is below a uniform's 1.8 plus a little.
            assert abs(value.std() / (cut * factor) - 1) < 5 * np.sqrt((1.94 - 1) / 4 / value.size), name
            assert abs(value.mean()) < 5 * cut * factor / np.sqrt(value.size), name
    for moments in model_state['running'].values():
        assert not any(x['mean'].any() for x in moments.values())
        assert all((x['var'] == 1).all() for x in moments.values())


def test_mto_reads_the_encoder(rng):
    """All of MTO at the initial values, a black image among the images, in bfloat16: finite, and it names its terms."""
    c = tiny(mto__enabled=True, mto__recalibration='adaptive', mto__w_e=0.1, mto__w_r=1.0, mto__w_spa=1.0)
    c.model.dtype = 'bfloat16'
    training = job.prepare(c, 130)
    params, teacher = drawn(training.objective.method, rng), drawn(training.objective.method, rng)
    images = rng.integers(0, 256, (8, 16, 24, 3), np.uint8)
    images[0] = 0
    arguments = {'teacher': teacher}, {}, {'image': images}, jax.random.key(0), training.clock(jnp.int32(4))
    (_, (terms, _)), gradients = jax.jit(jax.value_and_grad(training.objective.loss, has_aux=True))(params, *arguments)
    assert {'contrast', 'matched', 'mto_spa', 'mto_e', 'mto_r'} <= terms.keys()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradients)))


@pytest.mark.pictures
@pytest.mark.slow
def test_resumes_bitwise_and_is_evaluated(tmp_path):
    """With two microbatches, MTO, teacher and statistics; then kNN of student and teacher."""
    c = shrink(conmim_mto.get_config())
    c.accumulate, c.model.dtype, c.diagnose_every = 2, 'float32', 4
    full = pretrain.run(c, tmp_path / 'full')
    shutil.copytree(tmp_path / 'full', tmp_path / 'part')
    shutil.rmtree(tmp_path / 'part' / 'checkpoints' / '8')
    again = pretrain.run(c, tmp_path / 'part')
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    c.task, c.checkpoint = 'knn', str(tmp_path / 'part')
    for weights in ('student', 'teacher'):
        c.eval.weights = weights
        assert 0.05 < tasks.run(c, tmp_path / weights)['knn_20'] <= 1
    assert (tmp_path / 'full' / 'reconstructions.png').stat().st_size > 3000
