"""XLA's options for a training on a CPU: where they are used, and that they change nothing but the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mto_jax.runtime import cpu, parallel
from mto_jax.training import job, train_state


@pytest.fixture
def fresh():
    cpu.compiler_options.cache_clear()
    yield
    cpu.compiler_options.cache_clear()


def test_options_are_for_cpus_that_know_them(fresh, monkeypatch):
    assert cpu.compiler_options('gpu') == cpu.compiler_options('tpu') == {}
    monkeypatch.setattr(cpu, '_OPTIONS', {'xla_cpu_of_another_version': 'true'})
    assert cpu.compiler_options('cpu') == {}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_are_as_exact(rng, dtype):
    """Against float64, with and without the options; bfloat16 products are summed in float32."""
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 50, 64), (3, 64, 37)))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)

    def product(options):
        product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32), compiler_options=options)
        return np.abs(np.asarray(product(a, b)) - want).max()

    assert product({}) < 1e-4
    assert product(cpu.compiler_options('cpu')) < 1e-4


def test_a_step_is_the_same_but_for_rounding(config, rng, monkeypatch):
    """What is logged, and the change of the parameters to 1e-3 of its length: Adam makes much of small gradients."""
    config.model.depth = config.mae.decoder_depth = 2
    config.epochs, config.optim.warmup_epochs = 1.0, 0.0
    training, mesh = job.prepare(config, 64), parallel.make_mesh(1)
    shape = training.microbatch['image'].shape
    batch = {'image': rng.integers(0, 256, shape, np.uint8)}

    def stepped():
        state, meter = training.create(0), train_state.Meter.empty(training.names)
        before = jax.device_get(state.params)
        with jax.set_mesh(mesh):
            state, meter = training.step(mesh)(state, meter, {}, batch, train_state.stream(0, 'train'))
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), before)
        return np.concatenate([x.ravel() for x in jax.tree.leaves(moved)]), jax.device_get(meter)

    with_options, one = stepped()
    monkeypatch.setattr(cpu, 'compiler_options', lambda device: {})
    without, other = stepped()
    assert np.linalg.norm(with_options - without) < 1e-3 * np.linalg.norm(without)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)
