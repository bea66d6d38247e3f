"""Fixtures: small configs on the embedded data, and nothing that needs a network."""

import gc
import os
from functools import partial
from importlib import metadata
from pathlib import Path

os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
# The tests' time is XLA's, on programs that then run for milliseconds: it optimises nothing, and leaves out its fusion
# emitters, where it has this flag (jaxlib 0.11 stops at it). Programs that tests start inherit this.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_backend_optimization_level=0',
        '--xla_cpu_use_fusion_emitters=false' if metadata.version('jaxlib').startswith('0.10.') else '',
        '--xla_force_host_platform_device_count=8',
    ]
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from configs import base
from mto_jax.config import FIELDS, check, values
from mto_jax.training import job, objective

logging.set_verbosity(logging.ERROR)
# To trace a model makes a million objects that stay: the default looks through all of them again and again.
gc.set_threshold(100_000, 50, 50)
QUICK = os.environ['XLA_FLAGS'].rpartition(' ')[0]  # without the number of devices
NOWHERE = epath.Path('nowhere')  # a workdir that does not exist


@pytest.fixture(scope='session', autouse=True)
def compile_once(tmp_path_factory):
    """Many tests train the same tiny model: compile it once for all workers, and for the programs that tests start.

    JAX_COMPILATION_CACHE_DIR, where it is set, keeps what was compiled for further calls of pytest.
    """
    own = tmp_path_factory.getbasetemp()
    cache = own.parent / 'xla' if 'PYTEST_XDIST_WORKER' in os.environ else own / 'xla'
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(scope='session', autouse=True)
def draw_once():
    """To lay out a figure takes as long as to draw it, and no test looks at where things lie in it."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ConstrainedLayoutEngine, 'execute', lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def draw_where_looked_at(request):
    """To draw a run's figures takes longer than such a run: only tests marked `pictures` have them drawn."""
    if request.node.get_closest_marker('pictures'):
        yield
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, 'savefig', lambda self, out, **_: Path(out).touch() if isinstance(out, str | Path) else None)
        yield


@pytest.fixture(scope='session')
def jobs():
    """Prepared jobs by what determines them; see `share_jobs`."""
    return {}


@pytest.fixture(autouse=True)
def share_jobs(request, jobs):
    """Tests with equal configs share one job, since tracing a train step takes longer than running it here.

    Tests that use `monkeypatch` may replace part of what is traced: they share nothing.
    """
    if 'monkeypatch' in request.fixturenames:
        yield
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(job, 'prepare', partial(shared, jobs, job.prepare))
        yield


def shared(jobs, prepare, config, num_examples):
    """`job.prepare` that returns the same job for configs that differ only in seed, mesh and what runs around a step.

    It keeps the latest 6: compiled programs take memory.
    """
    check(config)
    fields = [(n, v) for n, v in values(config) if FIELDS[n].shapes_run and n != 'seed' and not n.startswith('mesh.')]
    key = f'{fields} {num_examples} {objective.Pretraining.loss}'  # some tests replace the loss within a context
    if key not in jobs:
        jobs[key] = prepare(config, num_examples)
        if len(jobs) > 6:
            del jobs[next(iter(jobs))]
    return jobs[key]


@pytest.fixture
def rng():
    """Fresh random numbers each run; a failure prints the seed."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f'seed {seed}')
    return np.random.default_rng(seed)


def shrink(c):
    """Any config, cut down to a model of two narrow blocks and a few steps on the embedded images."""
    d = c.data
    d.name, d.data_dir = 'fashion_mnist_12k', 'data'
    d.train_split, d.val_split, d.test_split = 'train[:130]', 'train[130:190]', 'test[:70]'
    d.image_size, d.channels, d.num_classes = (28, 28), 1, 10
    d.mean, d.std = (0.286,), (0.353,)
    d.eval_resize = 0
    m = c.model
    m.depth, m.width, m.heads, m.patch_size = 2, 16, 2, 7
    c.mae.decoder_depth, c.mae.decoder_width, c.mae.decoder_heads = 2, 8, 2
    c.conmim.hidden, c.conmim.out, c.conmim.group = 24, 8, 16
    c.bootmae.decoder_width, c.bootmae.block_patches, c.bootmae.block_area = 20, 8, (2, 5)
    c.batch_size, c.mesh.data, c.allow_cpu = 32, 1, True
    c.epochs, c.optim.warmup_epochs, c.optim.decay_epochs = 2.0, 0.5, ()
    c.optim.min_lr = min(c.optim.min_lr, 1e-6)  # below the peak, which is in proportion to the batch
    # Pictures take longer than such a training: tests that are about them ask for them.
    c.log_every, c.diagnose_every, c.checkpoints.every = 3, 0, 2
    c.eval.every_epochs, c.eval.batch_size, c.eval.linear_steps = 0.0, 32, 20
    return c


def named(tree):
    """{path of a leaf, its parts joined by '/': its values as numpy has them}."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x) for path, x in leaves}


def randomised(tree, rng, scale=0.2):
    """Every parameter of a tree, or of its shapes, redrawn, so that no zero or one hides an error; scales around 1."""

    def draw(path, p):
        return jnp.asarray(rng.normal(size=p.shape) * scale + (path[-1].key == 'scale'), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def forward(method, params, images, *, noise=None, train=False):
    """The `methods.Result` of a `SingleModule` on normalised images, with or without given mask noise."""
    rngs = {'mask': jax.random.key(3), 'dropout': jax.random.key(4)}
    return method.module.apply({'params': params}, images, noise=noise, train=train, rngs=rngs)


@pytest.fixture
def config():
    """A shrunk MAE without MTO, in float32."""
    c = shrink(base.get_config())
    c.model.dtype = 'float32'
    return c
