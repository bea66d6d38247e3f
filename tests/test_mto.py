"""MTO against float64 numpy forms written from the definitions in docs/method.md, and against cases worked by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mto_jax import attention, methods, mto
from mto_jax.training import job

B, H, N, D = 3, 2, 12, 8
DTYPES = {'float32': (jnp.float32, 2e-5), 'bfloat16': (jnp.bfloat16, 3e-2)}


@pytest.fixture(params=DTYPES)
def case(request, rng):
    """Random logits, tokens and mask in one dtype; the numpy side sees the rounded values in float64."""
    dtype, tol = DTYPES[request.param]
    logits = jnp.asarray(rng.normal(size=(B, H, N, N)) * 2, dtype)
    tokens = jnp.asarray(rng.normal(size=(B, N, D)) + 1, dtype)
    masked = np.zeros((B, N), bool)
    for row in masked:
        row[rng.permutation(np.arange(1, N))[:7]] = True
    return logits, tokens, masked, tol


def f64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def np_entropy(s):
    p = softmax(s)
    return -(p * np.log(p)).sum()


def np_affinity(x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x @ np.swapaxes(x, -1, -2) / math.sqrt(x.shape[-1])


def np_het(s, masked, guard=False, of=None):
    """s (B, h, N, N); `of` (B, N): the queries, the masked ones unless given."""
    out = []
    for b in range(len(s)):
        vis, rows = np.flatnonzero(~masked[b]), np.flatnonzero(masked[b] if of is None else of[b])
        for head in s[b]:
            a = head / (head[np.ix_(vis, vis)].std() + 1e-6) if guard else head
            out.append(np.mean([np_entropy(a[i, vis]) for i in rows]) / math.log(len(vis)))
    return np.mean(out)


def np_density(tokens, masked):
    out = []
    for x, m in zip(tokens, masked, strict=True):
        s, vis, hid = np_affinity(x), np.flatnonzero(~m), np.flatnonzero(m)
        of_masked = np.mean([np.log(np.mean(np.exp(s[i, vis]))) for i in hid])
        of_visible = np.mean([np.log(np.mean(np.exp(s[k, vis[vis != k]]))) for k in vis])
        out.append(of_masked - of_visible)
    return np.mean(out)


def np_spa(logits, masked, form='mass'):
    out = []
    for b in range(len(logits)):
        vis = np.flatnonzero(~masked[b])
        for head in logits[b]:
            for i in vis:
                mass = -np.log(softmax(head[i])[vis].sum())
                over_visible, over_all = np_entropy(head[i, vis]), np_entropy(head[i])
                forms = {'mass': mass, 'mass+visible_entropy': mass + over_visible}
                forms |= {'row_entropy': over_all, 'mass+row_entropy': mass + over_all}
                out.append(forms[form])
    return np.mean(out)


def np_mass(logits, masked):
    out = []
    for a, m in zip(logits, masked, strict=True):
        out += [softmax(head[i])[m].sum() / m.mean() for head in a for i in np.flatnonzero(~m)]
    return np.mean(out)


@pytest.mark.parametrize('guard', [False, True])
def test_heterogeneity(case, guard):
    logits, _, masked, tol = case
    got = mto.heterogeneity(logits, jnp.asarray(masked), scale_guard=guard)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np_het(f64(logits), masked, guard), rtol=tol)


def test_heterogeneity_of_tokens(case):
    _, tokens, masked, tol = case
    got = mto.heterogeneity(mto.token_affinity(tokens), jnp.asarray(masked))
    np.testing.assert_allclose(got, np_het(np_affinity(f64(tokens))[:, None], masked), rtol=tol)


def test_heterogeneity_of_plain_products(case):
    _, tokens, masked, tol = case
    got = mto.heterogeneity(mto.token_affinity(tokens, norm=False), jnp.asarray(masked))
    x = f64(tokens)
    np.testing.assert_allclose(got, np_het((x @ np.swapaxes(x, 1, 2))[:, None], masked), rtol=tol)


def test_plain_products_with_and_without_positions(rng):
    """The two differ in which tokens the first block's heterogeneity is of."""
    masked = jnp.asarray(np.arange(N)[None] > 5)
    embedded, inputs = (jnp.asarray(rng.normal(size=(1, N, D)), jnp.float32) for _ in range(2))
    seen = attention.Conditioning(masked=masked, tokens=embedded, inputs=inputs)
    q = jnp.asarray(rng.normal(size=(1, N, H, 4)), jnp.float32)
    for affinity, read in (('gram', embedded), ('gram_positions', inputs)):
        _, stats = mto.Settings(w_e=1.0, affinity=affinity).attend(0, 4, 1)(q, q, q, seen)
        x = f64(read)[:, 1:]
        want = np_het((x @ np.swapaxes(x, 1, 2))[:, None], np.asarray(masked)[:, 1:])
        np.testing.assert_allclose(stats['het'], want, rtol=2e-5)


def test_heterogeneity_per_token(case):
    logits, _, masked, tol = case
    got = np.asarray(mto.heterogeneity(logits, jnp.asarray(masked), per_token=True))
    for b, i in [(0, np.flatnonzero(masked[0])[0]), (2, np.flatnonzero(masked[2])[-1])]:
        vis = np.flatnonzero(~masked[b])
        want = np.mean([np_entropy(f64(logits)[b, h, i, vis]) for h in range(H)]) / math.log(len(vis))
        np.testing.assert_allclose(got[b, i], want, rtol=tol)


def test_density(case):
    _, tokens, masked, tol = case
    got = mto.density(tokens, jnp.asarray(masked))
    np.testing.assert_allclose(got, np_density(f64(tokens), masked), rtol=tol, atol=tol)


@pytest.mark.parametrize('form', mto.SPA_FORMS)
def test_spatial_term(case, form):
    logits, _, masked, tol = case
    got = mto.spatial_term(logits, jnp.asarray(masked), form)
    np.testing.assert_allclose(got, np_spa(f64(logits), masked, form), rtol=tol)


@pytest.mark.parametrize('with_bias', [False, True])
def test_spatial_term_of_weights(case, with_bias, rng):
    """Attention's own weights give the same term, whatever bias they have; to queries and keys the same gradients."""
    logits, _, masked, tol = case
    logits, tol = logits.astype(jnp.float32), max(tol, 1e-5)
    bias = jnp.asarray(rng.normal(size=(H, N, N)) * 3, jnp.float32) if with_bias else None

    def of_weights(logits, bias):
        weights = jax.nn.softmax(logits if bias is None else logits + bias)
        return mto.spatial_term_of_weights(weights, jnp.asarray(masked), bias)

    got, gradient = jax.value_and_grad(of_weights)(logits, bias)
    np.testing.assert_allclose(got, np_spa(f64(logits), masked), rtol=tol)
    want = jax.grad(mto.spatial_term)(logits, jnp.asarray(masked))
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    if with_bias:
        np.testing.assert_allclose(jax.grad(of_weights, argnums=1)(logits, bias), 0.0, atol=1e-6)


def test_masked_mass(case):
    logits, _, masked, tol = case
    np.testing.assert_allclose(mto.masked_mass(logits, jnp.asarray(masked)), np_mass(f64(logits), masked), rtol=tol)


@pytest.mark.parametrize('gate', [0.0, 1e-5, 0.3, 1.0])
def test_recalibrate_scales_weights(case, gate):
    """softmax after recalibration = the weights times g, renormalised; masked rows as before."""
    logits, _, masked, tol = case
    got = np.asarray(jax.nn.softmax(mto.recalibrate(logits, jnp.asarray(masked), gate)))
    p = np.exp(f64(logits))
    factor = np.ones_like(p)
    for b in range(B):
        factor[b][np.ix_(range(H), ~masked[b], masked[b])] = gate if gate > mto.MIN_GATE else 0.0
    p = p * factor
    np.testing.assert_allclose(got, p / p.sum(-1, keepdims=True), rtol=tol, atol=1e-7)
    if gate <= mto.MIN_GATE:
        assert got[0][:, ~masked[0]][:, :, masked[0]].max() == 0


def test_recalibrate_all_rows(case):
    """Masked queries too lose the masked keys, their own among them."""
    logits, _, masked, tol = case
    got = np.asarray(jax.nn.softmax(mto.recalibrate(logits, jnp.asarray(masked), 0.0, 'all')))
    p = np.where(masked[:, None, None, :], 0.0, np.exp(f64(logits)))
    np.testing.assert_allclose(got, p / p.sum(-1, keepdims=True), rtol=tol, atol=1e-7)


def test_recalibrate_per_key(case, rng):
    logits, _, masked, tol = case
    gate = rng.uniform(size=(B, N)) * (rng.uniform(size=(B, N)) > 0.3)
    got = np.asarray(jax.nn.softmax(mto.recalibrate(logits, jnp.asarray(masked), jnp.asarray(gate, jnp.float32))))
    p = np.exp(f64(logits))
    pairs = ~masked[:, None, :, None] & masked[:, None, None, :]
    p = np.where(pairs, p * np.where(gate > mto.MIN_GATE, gate, 0.0)[:, None, None, :], p)
    np.testing.assert_allclose(got, p / p.sum(-1, keepdims=True), rtol=tol, atol=1e-7)


def test_by_hand_uniform_attention():
    """Equal logits: every masked token leans evenly on the visible ones, and visible queries give each key 1 / N."""
    masked = jnp.array([[False] * 4 + [True] * 8])
    logits = jnp.full((1, 2, 12, 12), 3.0)
    assert mto.heterogeneity(logits, masked) == pytest.approx(1.0, abs=1e-6)
    assert mto.spatial_term(logits, masked) == pytest.approx(math.log(12 / 4), abs=1e-6)
    assert mto.spatial_term(logits, masked, 'row_entropy') == pytest.approx(math.log(12), abs=1e-6)
    both = mto.spatial_term(logits, masked, 'mass+visible_entropy')
    assert both == pytest.approx(math.log(12 / 4) + math.log(4), abs=1e-6)
    assert mto.masked_mass(logits, masked) == pytest.approx(1.0, abs=1e-6)


def test_by_hand_one_hot_attention():
    """All attention on token 0, which is visible: nothing heterogeneous, no mass on masked keys, no L_spa."""
    masked = jnp.array([[False] * 4 + [True] * 8])
    logits = jnp.zeros((1, 1, 12, 12)).at[..., 0].set(80.0)
    assert mto.heterogeneity(logits, masked) == pytest.approx(0.0, abs=1e-6)
    assert mto.spatial_term(logits, masked) == pytest.approx(0.0, abs=1e-6)
    on_masked = jnp.zeros((1, 1, 12, 12)).at[..., 11].set(80.0)
    assert mto.spatial_term(on_masked, masked) == pytest.approx(80.0 - math.log(4), rel=1e-6)
    assert mto.spatial_term_of_weights(jax.nn.softmax(logits), masked) == pytest.approx(0.0, abs=1e-6)
    of_weights = mto.spatial_term_of_weights(jax.nn.softmax(on_masked), masked)
    assert of_weights == pytest.approx(80.0 - math.log(4), rel=1e-6)


def orthogonal_tokens(mask_token):
    """Four visible tokens whose normalised forms are orthogonal, and three copies of `mask_token`."""
    hadamard = np.array([[1.0]])
    for _ in range(3):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    visible = hadamard[1:5]
    x = np.concatenate([visible, np.repeat(mask_token(visible, hadamard)[None], 3, axis=0)])
    return jnp.asarray(x[None], jnp.float32), jnp.array([[False] * 4 + [True] * 3])


def test_by_hand_mask_token_equal_to_one_visible():
    """Its affinity is sqrt(8) to its twin and 0 to the three others."""
    tokens, masked = orthogonal_tokens(lambda v, _: v[2])
    a = math.sqrt(8)
    p = np.exp([a, 0, 0, 0]) / np.exp([a, 0, 0, 0]).sum()
    want = -(p * np.log(p)).sum() / math.log(4)
    assert mto.heterogeneity(mto.token_affinity(tokens), masked) == pytest.approx(want, rel=1e-4)
    assert mto.density(tokens, masked) == pytest.approx(math.log((math.exp(a) + 3) / 4), rel=1e-4)


def test_by_hand_mask_token_equal_to_the_mean():
    """The trap: by entropy the mean of the visible tokens is as singular as can be; by density it is not singular."""
    tokens, masked = orthogonal_tokens(lambda v, _: v.mean(0))
    assert mto.heterogeneity(mto.token_affinity(tokens), masked) == pytest.approx(1.0, abs=1e-5)
    # Normalised, the mean of four orthogonal tokens has length sqrt(8) and affinity sqrt(8) / 2 to each of them.
    assert mto.density(tokens, masked) == pytest.approx(math.sqrt(8) / 2, rel=1e-4)


def test_by_hand_mask_token_far_away():
    """Opposite to the data's mean: fully heterogeneous and of low density."""
    tokens, masked = orthogonal_tokens(lambda v, _: -v.mean(0))
    assert mto.heterogeneity(mto.token_affinity(tokens), masked) == pytest.approx(1.0, abs=1e-5)
    assert mto.density(tokens, masked) == pytest.approx(-math.sqrt(8) / 2, rel=1e-4)
    other, _ = orthogonal_tokens(lambda _, h: h[6])
    assert mto.density(other, masked) == pytest.approx(0.0, abs=1e-5)


def test_ranking_loss_by_hand():
    """Hets .9 .95 .80 .79, first ranked block 1, margin .02: hinges .07, 0, .01."""
    het = [jnp.float32(v) for v in (0.9, 0.95, 0.80, 0.79)]
    assert mto.ranking_loss(het, 1, 0.02) == pytest.approx((0.07 + 0 + 0.01) / 3, abs=1e-6)
    grad = jax.grad(lambda h: mto.ranking_loss(list(h), 1, 0.02))(jnp.stack(het))
    # Only the later block of each active pair is pulled; the earlier one is a constant.
    np.testing.assert_allclose(grad, [0, 1 / 3, 0, 1 / 3], atol=1e-6)
    free = jax.grad(lambda h: mto.ranking_loss(list(h), 1, 0.02, stop_previous=False))(jnp.stack(het))
    np.testing.assert_allclose(free, [-1 / 3, 1 / 3, -1 / 3, 1 / 3], atol=1e-6)


def test_singularity_loss_by_hand():
    assert mto.singularity_loss([jnp.float32(0.9), jnp.float32(0.7)], 'entropy') == pytest.approx(0.2)
    assert mto.singularity_loss([jnp.float32(0.0)], 'density') == pytest.approx(math.log(2))


def test_weights_warm_up_and_fade():
    s = mto.Settings(w_spa=1.0, w_e=2.0, w_r=4.0, warmup=0.1, fade=('e',))
    assert {k: float(v) for k, v in mto.weights(s, 0.0).items()} == {'spa': 0, 'e': 0, 'r': 0}
    half = mto.weights(s, 0.05)
    assert half['spa'] == pytest.approx(0.5)
    assert half['e'] == pytest.approx(2 * 0.5 * 0.95)
    assert mto.weights(s, 1.0)['e'] == 0
    s = dataclasses.replace(s, fade=('spa', 'r'), fade_until=0.5)
    quarter = {k: float(v) for k, v in mto.weights(s, 0.25).items()}
    assert quarter == pytest.approx({'spa': 0.5, 'e': 2.0, 'r': 2.0})
    assert {k: float(v) for k, v in mto.weights(s, 0.8).items()} == {'spa': 0, 'e': 2, 'r': 0}


def test_depth_of_the_spatial_term_by_hand():
    """Values 1, 2, 4 in three blocks, weights 1 .5 0, 1 1 1, 0 .5 1."""
    stats = {b: {'spa': jnp.float32(v)} for b, v in enumerate((1, 2, 4))}
    for depth, want in (('falling', 2 / 3), ('equal', 7 / 3), ('rising', 5 / 3)):
        s = mto.Settings(w_spa=1.0, spa_depth=depth)
        assert mto.losses(s, stats, 3)['spa'] == pytest.approx(want)


def test_gates_of_single_tokens_by_hand():
    """Five masked tokens: of the two most heterogeneous ones of 'rank' 40%, and of 60% with a tie, which both go."""
    masked = jnp.array([[False, True, True, True, True, True]])
    het = jnp.array([[0.0, 0.9, 0.2, 0.5, 0.5, 0.7]])

    def gates(**fields):
        return np.asarray(mto.token_gates(mto.Settings(**fields), het, masked))[0, 1:]

    np.testing.assert_allclose(gates(recalibration='adaptive'), [0.1, 0.8, 0.5, 0.5, 0.3], atol=1e-6)
    np.testing.assert_array_equal(gates(recalibration='threshold', exclude_above=0.6), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(gates(recalibration='rank', exclude_fraction=0.4), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(gates(recalibration='rank', exclude_fraction=0.6), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(gates(recalibration='rank', exclude_fraction=0.0), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(gates(recalibration='rank', exclude_fraction=1.0), [0, 0, 0, 0, 0])


@pytest.mark.parametrize('recalibration', ['exclude', *mto.PER_TOKEN])
def test_gates_open_with_training(recalibration, rng):
    """g + (1 - g) * progress / open_until, then plain attention; an ended training has open gates."""
    masked = jnp.asarray(np.arange(N)[None].repeat(B, 0) > 5)
    q, k, v = (jnp.asarray(rng.normal(size=(B, N, H, 4)), jnp.float32) for _ in range(3))
    tokens = jnp.asarray(rng.normal(size=(B, N, D)), jnp.float32)
    s = mto.Settings(recalibration=recalibration, affinity='attention', open_until=0.5)
    logits = attention.logits(q, k)
    gate = jnp.zeros((B, N))
    if recalibration in mto.PER_TOKEN:
        gate = mto.token_gates(s, mto.heterogeneity(logits, masked, per_token=True), masked)
    for progress in (0.0, 0.2, 0.5, 0.9, None):
        seen = attention.Conditioning(masked=masked, tokens=tokens, inputs=tokens)
        seen = seen.replace(progress=None if progress is None else jnp.float32(progress))
        out, _ = s.attend(0, 4, 1)(q, k, v, seen)
        g = np.asarray(gate, np.float64)
        g = g + (1 - g) * min(1.0, 2 * (1.0 if progress is None else progress))
        p = np.exp(f64(logits))
        p = np.where((~masked[:, :, None] & masked[:, None, :])[:, None], p * g[:, None, None, :], p)
        want = np.einsum('bhqk,bkhd->bqhd', p / p.sum(-1, keepdims=True), f64(v))
        np.testing.assert_allclose(f64(out), want, atol=1e-5)


def test_gates_by_hand():
    np.testing.assert_allclose(mto.gates('exclude', 4, 1), [0, 1, 1, 1])
    np.testing.assert_allclose(mto.gates('exclude', 4, 4), [0, 0, 0, 0])
    np.testing.assert_allclose(mto.gates('ramp', 5, 1), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(mto.gates('none', 3, 1), [1, 1, 1])


@pytest.mark.parametrize(
    ('fields', 'word'),
    [
        ({'recalibration': 'some'}, 'mto.recalibration'),
        ({'affinity': 'x'}, 'mto.affinity'),
        ({'measure': 'x'}, 'mto.measure'),
        ({'w_e': -1.0}, 'mto.w_e'),
        ({'warmup': 1.0}, 'mto.warmup'),
        ({'initial_blocks': -2}, 'mto.initial_blocks'),
        ({'exclude_blocks': 9}, 'mto.exclude_blocks'),
        ({'rows': 'x'}, 'mto.rows'),
        ({'spa_form': 'x'}, 'mto.spa_form'),
        ({'spa_depth': 'x'}, 'mto.spa_depth'),
        ({'fade': ('e', 'x')}, 'mto.fade'),
        ({'fade_until': 0.0}, 'mto.fade_until'),
        ({'exclude_above': 1.5}, 'mto.exclude_above'),
        ({'exclude_fraction': -0.5}, 'mto.exclude_fraction'),
        ({'open_until': 2.0}, 'mto.open_until'),
        ({'initial_blocks': 9}, 'mto.initial_blocks'),
        ({'blocks': (0, 8)}, 'mto.blocks'),
        ({'w_r': 1.0, 'margin': 0.2}, 'mto.margin'),
        ({'w_e': 1.0, 'blocks': (3,)}, 'mto.w_e'),
        ({'w_r': 1.0, 'blocks': (0,)}, 'mto.w_r'),
    ],
)
def test_bad_settings_name_the_field(fields, word):
    with pytest.raises(ValueError, match=word):
        mto.Settings(**fields).validate(4)


def test_losses_read_only_named_blocks():
    s = mto.Settings(w_e=1.0, w_r=1.0, blocks=(0, 2))
    assert [b for b in range(4) if s.attend(b, 4, 1)] == [0, 2]
    assert mto.Settings(w_e=1.0).loss_blocks(8) == (0, 1)
    assert mto.Settings().attend(0, 4, 1) is None


def everything(settings, tokens, q, k, masked, block=1, depth=4):
    """Total of all three terms through the blocks' attention, as a function of tokens, queries and keys."""
    stats, seen = {}, attention.Conditioning(masked=masked, tokens=tokens, inputs=tokens)
    for i in range(depth):
        _, stats[i] = settings.attend(i, depth, 1)(q * (1 + i), k, k, seen)
    terms = mto.losses(settings, stats, depth)
    return sum(terms.values())


VARIANTS = [
    {'affinity': 'attention'},
    {'affinity': 'attention_mean', 'spa_form': 'mass+visible_entropy'},
    {'affinity': 'token', 'stop_keys': True},
    {'affinity': 'attention', 'scale_guard': True, 'stop_keys': True},
    {'affinity': 'attention', 'measure': 'density', 'recalibration': 'adaptive'},
    {'affinity': 'gram', 'spa_form': 'mass+row_entropy', 'spa_depth': 'rising', 'recalibration': 'rank'},
    {'affinity': 'gram_positions', 'spa_form': 'row_entropy', 'recalibration': 'threshold', 'open_until': 0.5},
]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_are_finite_at_initialisation(variant, dtype, rng):
    """At initialisation all mask tokens are equal and queries are small; equal tokens must not give 0 / 0."""
    s = mto.Settings(w_spa=1.0, w_e=1.0, w_r=1.0, **variant)
    masked = jnp.asarray(np.arange(N)[None].repeat(B, 0) > 4)
    tokens = jnp.where(masked[..., None], 0.0, jnp.asarray(rng.normal(size=(B, N, D)))).astype(dtype)
    for scale in (0.0, 1e-3, 1.0):
        q = jnp.asarray(scale * rng.normal(size=(B, N, H, 4)), dtype)
        value, grads = jax.value_and_grad(lambda *a: everything(s, *a, masked), (0, 1, 2))(tokens, q, q)
        assert np.isfinite(value)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


@pytest.mark.parametrize('variant', [{'affinity': 'attention'}, {'affinity': 'token'}, {'measure': 'density'}])
def test_gradients_against_finite_differences(variant, rng):
    """Directional derivative of L_spa + L_e through the hook, in float64; no stop-gradient is active in these."""
    s = mto.Settings(w_spa=1.0, w_e=1.0, initial_blocks=-1, **variant)
    if s.measure == 'density':

        def f(tokens, q, k):
            return mto.density(tokens[:, 1:], masked[:, 1:]) + 0.0 * (q.sum() + k.sum())
    else:

        def f(tokens, q, k):
            return everything(s, tokens, q, k, masked)

    masked = jnp.asarray(np.arange(N)[None].repeat(B, 0) % 3 == 1)
    point = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, N, D), (B, N, H, 4), (B, N, H, 4))]
    direction = [jnp.asarray(rng.normal(size=p.shape), jnp.float32) for p in point]
    grads = jax.grad(f, (0, 1, 2))(*point)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    h = 1e-2
    ends = [f(*(p + sign * h * d for p, d in zip(point, direction, strict=True))) for sign in (1, -1)]
    assert slope == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=2e-2, abs=2e-3)


def test_stop_gradients():
    """L_e by density moves the mask token only; stop_keys leaves visible keys alone."""
    r = np.random.default_rng(0)
    masked = jnp.asarray(np.arange(N)[None] > 5)
    tokens = jnp.asarray(r.normal(size=(1, N, D)), jnp.float32)
    grad = jax.grad(lambda t: mto.density(t, masked, stop_visible=True))(tokens)
    assert np.abs(grad[0, :6]).max() == 0
    assert np.abs(grad[0, 6:]).max() > 0


def test_token_distance_by_hand():
    """Visible tokens +-1 around 0 in every feature, mask tokens at 3: three standard deviations."""
    tokens = jnp.array([[[1.0, -1.0], [-1.0, 1.0], [3.0, 3.0]]])
    assert mto.token_distance(tokens, jnp.array([[False, False, True]])) == pytest.approx(3.0, rel=1e-4)


def test_watching_reads_every_statistic(rng):
    s = dataclasses.replace(mto.Settings(), recalibration='exclude')
    masked = jnp.asarray(np.arange(N)[None] > 5)
    q, k, v = (jnp.asarray(rng.normal(size=(1, N, H, 4)), jnp.float32) for _ in range(3))
    seen = attention.Conditioning(masked=masked, tokens=jnp.asarray(rng.normal(size=(1, N, D))))
    _, stats = s.attend(3, 4, 1, watch=True)(q, k, v, seen)
    assert set(stats) == {'spa', 'het', 'rho', 'het_token', 'het_visible', 'mass', 'mass_used'}
    assert stats['mass'] == pytest.approx(float(stats['mass_used']))
    out, first = s.attend(0, 4, 1, watch=True)(q, k, v, seen)
    assert first['mass_used'] == 0
    assert out.shape == q.shape


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_attention_against_numpy(dtype, rng):
    """Plain, fused and recalibrated attention with a bias, and without any masked key, in float64."""
    seen = attention.Conditioning(
        bias=jnp.asarray(rng.normal(size=(H, N, N)), jnp.float32),
        masked=jnp.asarray(rng.random((B, N)) < 0.4).at[:, 0].set(False),
        tokens=jnp.asarray(rng.normal(size=(B, N, D)), jnp.float32),
    )
    q, k, v = (jnp.asarray(rng.normal(size=(B, N, H, 4)), dtype) for _ in range(3))
    logits = np.einsum('bqhd,bkhd->bhqk', f64(q), f64(k)) / 2 + f64(seen.bias)
    weights = np.exp(logits)
    tolerance = 1e-5 if dtype == 'float32' else 4e-2
    gate = np.where(~np.asarray(seen.masked)[:, None, :, None] & np.asarray(seen.masked)[:, None, None, :], 1 / 3, 1.0)
    ramp = mto.Settings(recalibration='ramp').attend(1, 4, 1)
    for attend, factor in ((attention.DotProduct(), 1.0), (attention.DotProduct('xla'), 1.0), (ramp, gate)):
        want = weights * factor
        want = np.einsum('bhqk,bkhd->bqhd', want / want.sum(-1, keepdims=True), f64(v))
        np.testing.assert_allclose(f64(attend(q, k, v, seen)[0]), want, atol=tolerance)


OPTIONS = [
    {'affinity': 'attention'},
    {'affinity': 'attention_mean'},
    {'affinity': 'token', 'stop_keys': True},
    {'affinity': 'attention', 'scale_guard': True, 'stop_keys': True},
    {'spa_form': 'mass+visible_entropy', 'measure': 'density'},
    {'affinity': 'gram_positions', 'spa_form': 'row_entropy', 'spa_depth': 'rising'},
    {'blocks': (0,), 'w_r': 0.0},
]


@pytest.mark.parametrize(
    ('name', 'options'), [('mae', None), ('mae', OPTIONS[1]), ('simmim', None), *(('simmim', o) for o in OPTIONS)]
)
def test_diagnosis_depends_on_no_setting(config, name, options, monkeypatch, rng):
    """The diagnosis of a run without MTO, and with any of its options, is one numpy form of logits and tokens."""
    config.method, config.mask_ratio, config.model.relative_bias = name, 0.5, name == 'simmim'
    if options is not None:
        config.mto.update({'enabled': True, 'w_spa': 1.0, 'w_e': 1.0, 'w_r': 1.0} | options)
    method = methods.build(config)
    params = jax.jit(lambda key: method.init(key)[0])(jax.random.key(0))
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.3, p.shape).astype(np.float32), params)
    read, attend = [], mto.MaskedAttention.__call__
    training = job.prepare(config, 130)

    def recorded(self, q, k, v, seen):
        bias = jnp.zeros(()) if seen.bias is None else seen.bias
        read.append((attention.logits(q, k), bias, seen.masked, seen.tokens))
        return attend(self, q, k, v, seen)

    @jax.jit
    def diagnose(params, images):
        clock, start = training.clock(jnp.int32(0)), len(read)
        shown = training.objective.diagnose(params, {}, images, jax.random.key(1), clock)['blocks']
        # Losses and pictures are two passes of the same numbers: the first is enough.
        return shown, read[start:][: len(shown['het'])]

    monkeypatch.setattr(mto.MaskedAttention, '__call__', recorded)
    shown, first = diagnose(params, rng.integers(0, 256, (4, 28, 28, 1), np.uint8))
    assert set(shown) == {'spa', 'het', 'rho', 'het_token', 'het_visible', 'mass', 'mass_used'}
    assert len(first) == 2
    for i, (logits, bias, masked, tokens) in enumerate(first):
        logits, masked, patches = f64(logits), np.asarray(masked), f64(tokens)[:, 1:]
        patch_masked = masked[:, 1:]
        want = {
            'het': np_het(logits, masked),
            'het_token': np_het(np_affinity(patches)[:, None], patch_masked),
            'het_visible': np_het(logits, masked, of=~masked),
            'rho': np_density(patches, patch_masked),
            'spa': np_spa(logits, masked),
            'mass': np_mass(logits, masked),
            'mass_used': np_mass(logits + f64(bias), masked),
        }
        for term, value in want.items():
            np.testing.assert_allclose(shown[term][i], value, rtol=1e-4, atol=1e-5, err_msg=f'{term} of block {i}')
