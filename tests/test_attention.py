"""Every form of attention against a form in numpy, and what the forms in a kernel leave out of the program."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from configs import mae_mto, simmim_mto
from mto_jax import attention, mto
from mto_jax.runtime import parallel
from mto_jax.training import job
from tests.conftest import shrink

H, D = 2, 8


@pytest.fixture
def kernel(monkeypatch):
    """XLA's attention in the place of cuDNN's, within the bounds of that."""
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, bias=None, *, implementation, **more):
        assert implementation == 'cudnn'
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 128
        assert not q.shape[-1] % 8
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        assert bias is None or bias.dtype == q.dtype
        return real(q, k, v, bias, implementation='xla', **more)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)


def inputs(rng, n, m, dtype, with_bias):
    """q, k, v, bias, the cotangent of the output, and a mask."""
    q, cotangent = (jnp.asarray(rng.normal(size=(2, n, H, D)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, m, H, D)), dtype) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(H, n, m)), jnp.float32) if with_bias else None
    masked = jnp.asarray(rng.random((2, n)) < 0.6).at[:, 0].set(False)
    return q, k, v, bias, cotangent, masked


def outputs(attend, q, k, v, bias, cotangent, masked):
    """Output, and gradients to q, k, v and the bias, float64."""

    @jax.jit
    def run(*arguments):
        def output(q, k, v, bias):
            return attend(q, k, v, attention.Conditioning(bias=bias, masked=masked, tokens=q.reshape(*q.shape[:2], -1)))

        out, back, _ = jax.vjp(output, *arguments, has_aux=True)
        return out, *back(cotangent)

    return [np.asarray(x, np.float64) for x in run(q, k, v, bias) if x is not None]


def by_hand(q, k, v, bias, cotangent, factor=1.0):
    """As `outputs`, the gradients written out. factor: of the weights before they are normalised, (B, 1, N, M)."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scale = 1 / np.sqrt(D)
    p = np.exp(scale * np.einsum('bqhd,bkhd->bhqk', q, k) + (0.0 if bias is None else np.asarray(bias)[None])) * factor
    p /= p.sum(-1, keepdims=True)
    out, on_p = np.einsum('bhqk,bkhd->bqhd', p, v), np.einsum('bqhd,bkhd->bhqk', g, v)
    s = p * (on_p - (p * on_p).sum(-1, keepdims=True))
    found = [out, scale * np.einsum('bhqk,bkhd->bqhd', s, k), scale * np.einsum('bhqk,bqhd->bkhd', s, q)]
    return [*found, np.einsum('bhqk,bqhd->bkhd', p, g)] + ([] if bias is None else [s.sum(0)])


def close(found, wanted, dtype):
    """Within rounding: relative to the largest number of each array."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=(1e-5 if dtype == 'float32' else 2e-2) * np.abs(b).max())


FORMS = {
    'plain': attention.DotProduct(),
    'automatic': attention.DotProduct('auto'),
    'xla': attention.DotProduct('xla'),
    'heads': attention.DotProduct('heads'),
    'cudnn': attention.DotProduct('cudnn'),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('n', 'm', 'with_bias'), [(197, 197, False), (37, 37, True), (50, 50, True), (37, 50, False)])
def test_every_form(rng, monkeypatch, request, n, m, dtype, with_bias):
    """Odd and even numbers of tokens, and of a memory."""
    arrays = inputs(rng, n, m, dtype, with_bias)
    wanted = by_hand(*arrays[:5])
    for name, form in FORMS.items():
        if name == 'cudnn':
            request.getfixturevalue('kernel')
        close(outputs(form, *arrays), wanted, dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('n', 'gate', 'rows'), [(37, 0.3, 'visible'), (50, 0.1, 'all'), (37, 0.0, 'all')])
def test_recalibration_in_a_kernel(rng, kernel, n, gate, rows, dtype):
    arrays = inputs(rng, n, n, dtype, True)
    masked = np.asarray(arrays[-1])
    keys, queries = masked[:, None, None, :], masked[:, None, :, None]
    factor = np.where(keys & (~queries | (rows == 'all')), gate, 1.0)
    for implementation in ('', 'heads', 'cudnn'):
        form = mto.MaskedAttention(mto.Settings(rows=rows), gate, 0, False, False, implementation)
        close(outputs(form, *arrays), by_hand(*arrays[:5], factor), dtype)


@pytest.mark.parametrize('length', [1e-3, 1.0, 10.0])
def test_statistics_in_a_kernel(rng, kernel, length):
    """L_spa and the mean heads' heterogeneity, and their gradients with those of the output, as of logits; queries so
    long that visible keys get the mass of their number, or all or none of it."""
    q, k, v, bias, cotangent, masked = inputs(rng, 37, 37, 'float32', True)
    settings = mto.Settings(recalibration='adaptive', affinity='attention_mean', w_spa=1.0, w_e=1.0)
    plain, *forms = (mto.MaskedAttention(settings, None, 1, True, False, i) for i in ('', 'heads', 'cudnn'))

    def statistics(form):
        def total(q, k, v, bias):
            seen = attention.Conditioning(bias=bias, masked=masked, tokens=q.reshape(2, 37, -1))
            out, stats = form(q, k, v, seen)
            return stats['spa'] + stats['het'] + (out * cotangent).mean(), stats

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))(length * q, k, v, bias)

    wanted = jax.tree.leaves(statistics(plain))
    for form in forms:
        for a, b in zip(jax.tree.leaves(statistics(form)), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()), rtol=1e-4)


def choice(width=64, dtype='bfloat16', images=64, tokens=197, extra=0):
    q = jax.ShapeDtypeStruct((images, tokens, 12, width), dtype)
    return attention.kernel('auto', q, q, extra)


def test_the_choice(monkeypatch):
    """cuDNN where there is one, of the dtypes and widths that it takes; one head at a time on a TPU where logits are
    large; plain products otherwise, and on the devices of a mesh whatever jax's default is."""
    q = jnp.zeros((1, 2, 1, 8))
    assert attention.kernel('xla', q, q) == 'xla'
    assert choice() == ''
    for capability, chosen in (('9.0', 'cudnn'), ('7.5', ''), ('gfx90a', '')):
        device = type('Device', (), {'compute_capability': capability})
        monkeypatch.setattr(jax, 'local_devices', lambda backend, d=device: [d])
        monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
        assert choice() == choice(width=120, extra=8) == chosen
        assert choice(dtype='float32') == choice(width=42) == choice(width=128, extra=8) == ''
        with jax.set_mesh(jax.make_mesh((1,), ('data',))):  # of CPUs
            assert choice() == ''
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert choice() == choice(dtype='float32') == 'heads'
    assert choice(tokens=50) == choice(images=4) == ''


@pytest.mark.parametrize('preset', ['full', 'tuned'])
@pytest.mark.parametrize('config', [mae_mto, simmim_mto])
def test_no_square_of_tokens_on_a_gpu(config, preset, monkeypatch):
    """The train step as it is lowered for a GPU holds cuDNN's calls, and no array of a pair of tokens per head."""
    monkeypatch.setattr(attention, '_has_cudnn', lambda: True)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91900)
    c = shrink(config.get_config(f'vit_b,{preset}'))
    c.model.dtype, c.model.patch_size, c.mae.decoder_width, c.batch_size = 'bfloat16', 2, 16, 4
    training = job.prepare(c, 130)
    state, batch, key = training.shapes, training.batch(4), jax.eval_shape(lambda: jax.random.key(0))
    meter = jax.eval_shape(lambda: job.Meter.empty(training.names))
    traced = jax.jit(training.train_step).trace(state, meter, {}, batch, key)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@__cudnn$fmha') > 2
    tokens = training.objective.method.arch.num_patches + 1
    for n in (tokens, tokens + 1):
        assert f'tensor<4x{c.mae.decoder_heads}x{n}x{n}x' not in text


@pytest.mark.parametrize(('images', 'dtype'), [(16, 'float32'), (16, 'bfloat16'), (15, 'float32')])
def test_one_head_at_a_time_reduces_once(rng, images, dtype):
    """On a mesh the gradient of the bias is reduced over the devices after the loop, not in each of its turns. Images
    that do not divide over the devices lie on all of them."""
    heads = 6
    q, k, v = (jnp.asarray(rng.normal(size=(images, 20, heads, D)), dtype) for _ in range(3))
    bias = jnp.asarray(rng.normal(size=(heads, 20, 20)), jnp.float32)
    mesh = parallel.make_mesh(4, 2)
    batch = jax.sharding.NamedSharding(mesh, parallel.BATCH)
    split = [q, k, v] if images % mesh.size else [jax.device_put(x, batch) for x in (q, k, v)]

    def total(form, q, k, v, bias):
        out, _ = form(q, k, v, attention.Conditioning(bias=bias))
        return jnp.sin(out).sum()

    def gradients(form):
        return jax.jit(jax.grad(partial(total, form), argnums=(0, 1, 2, 3)))

    wanted = gradients(attention.DotProduct())(q, k, v, bias)
    with jax.set_mesh(mesh):
        compiled = gradients(attention.DotProduct('heads')).lower(*split, bias).compile()
        found = compiled(*split, bias)
    close(*([np.asarray(x, np.float64) for x in each] for each in (found, wanted)), dtype)
    text = compiled.as_text()
    where = [part for part in text.split('\n\n') if re.search(r' all-reduce(-start)?\(', part)]
    assert [part.startswith('ENTRY') for part in where] == [True] * (images % mesh.size == 0)
