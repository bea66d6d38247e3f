"""The command line, in processes of its own."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ENV = os.environ | {'JAX_PLATFORMS': 'cpu'}


def run(*args, **env):
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENV | env, timeout=300, check=False)


def test_flagship_without_imagenet_stops_with_the_steps(tmp_path):
    args = '--config=configs/mae_mto.py:vit_l', f'--config.data.data_dir={tmp_path}', f'--workdir={tmp_path}/w'
    out = run('main.py', '--verbosity=-1', *args, JAX_LOG_COMPILES='1')
    assert out.returncode == 2
    assert 'ILSVRC2012_img_train.tar' in out.stderr
    assert f'--config.data.data_dir={tmp_path}' in out.stderr
    assert 'Traceback' not in out.stderr
    assert not (tmp_path / 'w').exists()
    assert 'Compiling jit' not in out.stderr  # nothing has run


@pytest.mark.parametrize(
    ('args', 'word'),
    [
        (['--config=configs/mae.py', '--config.mask_ration=0.5'], 'mask_ration'),
        (['--config=configs/mae.py', '--config.optim.lr=1'], 'lr'),
        (['--config=configs/none.py'], '--config=configs/none.py: no such file in '),
        (['--config=configs/mae.py', '--config=configs/simmim.py'], '--config is given 2 times ('),
        (['--config=configs/mae.py:vit_xxl'], 'vit_xxl'),
        (
            ['--config=configs/mae.py', 'mask_ratio=0.5'],
            "unknown argument 'mask_ratio=0.5'; config fields are set",
        ),
        (['--config=configs/mae.py', '--confg.epochs=3'], 'unknown flag --confg.epochs; config fields are set with'),
        (['--config=configs/mae.py', '--config.epoch=3'], 'unknown config field: epoch (did you mean epochs?); '),
        (['--config=configs/mae.py', '--config.epochs=a'], 'flag --config.epochs=a: it must be a number\n'),
        (['--config=configs/mae.py', '--config.batch_size=1.5'], 'batch_size=1.5: it must be an integer\n'),
        (['--config=configs/mae.py', '--config.mto.enabled=yes'], 'mto.enabled=yes: it must be True or False\n'),
        (['--config=configs/knn.py:b'], 'knn.py:b: this file takes no argument after the colon'),
        (['--config=configs/study_simmim.py'], 'this file needs an argument after a colon'),
        ([], '--config is missing: give a file of configs/'),
    ],
)
def test_bad_arguments_are_named(args, word):
    out = run('main.py', *args)
    assert out.returncode == 2
    assert len(out.stderr.splitlines()) == 1
    assert word in out.stderr


def test_a_run_from_the_command_line(tmp_path):
    """Unset, --workdir comes from the config; the console shows progress."""
    small = [
        'model.depth=1',
        'model.width=16',
        'model.heads=2',
        'mae.decoder_depth=1',
        'mae.decoder_width=8',
        'mae.decoder_heads=1',
        'data.train_split=train[:300]',
        'data.val_split=train[300:400]',
        'data.test_split=test[:100]',
        'epochs=1',
        'optim.warmup_epochs=0',
        'log_every=1',
        'eval.every_epochs=0',
        'task=pretrain',
        'mto.w_r=0',
        f'workdir={tmp_path}/w',
    ]
    args = '--verbosity=-1', '--config=configs/quickstart.py', *[f'--config.{a}' for a in small]
    out = run('main.py', *args, JAX_LOG_COMPILES='1')
    assert out.returncode == 0, out.stderr
    assert 'Compiling jit' in out.stderr
    assert 'step 2/2 epoch 1.00' in out.stdout
    assert 'images/s' in out.stdout
    assert 'ETA 0:00:00' in out.stdout
    assert (tmp_path / 'w' / 'checkpoints' / '2').is_dir()


SMALL = [
    '--config=configs/quickstart.py',
    *(f'--config.{f}' for f in ('task=pretrain', 'epochs=1', 'optim.warmup_epochs=0', 'eval.every_epochs=0')),
    *(
        f'--config.{f}'
        for f in ('model.depth=1', 'model.width=16', 'model.heads=2', 'diagnose_every=0', 'mto.enabled=False')
    ),
    *(f'--config.{f}' for f in ('mae.decoder_depth=1', 'mae.decoder_width=8', 'mae.decoder_heads=1')),
    '--config.data.train_split=train[:300]',
]


def test_no_room_for_a_checkpoint(tmp_path):
    """One line, and none of the libraries'. The limit on a file's size stands for a disk that fills."""
    limited = 'import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
    limited += 'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv = sys.argv[1:]; '
    limited += "runpy.run_path('main.py', run_name='__main__')"
    # What it compiles is kept nowhere: in a cache that is kept, it would leave halves of files.
    out = run('-c', limited, 'main.py', *SMALL, f'--workdir={tmp_path}/w', JAX_ENABLE_COMPILATION_CACHE='false')
    assert out.returncode == 75
    assert len(out.stderr.splitlines()) == 1, out.stderr
    words = rf'error: a checkpoint could not be saved in {tmp_path}/w/checkpoints .*Free some space'
    assert re.match(words, out.stderr)


def test_output_that_is_closed(tmp_path):
    """As by `| head -1`."""
    command = [
        sys.executable,
        'main.py',
        *SMALL,
        '--config.epochs=500',
        '--config.log_every=1',
        f'--workdir={tmp_path}/w',
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 2
    assert errors.splitlines() == ['error: the output was closed, so the job stopped; the same command resumes it']


def test_another_directory_and_home(tmp_path):
    """The message says where it looked; ~ is the home in every path; another `configs` does not come before ours."""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').touch()
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / 'main.py'), *SMALL, '--workdir=~/w']
    command[2] = f'--config={root}/configs/quickstart.py'
    env = ENV | {'PYTHONPATH': str(tmp_path), 'HOME': str(tmp_path)}

    def fails(*more):
        out = subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert out.returncode == 2, out.stderr
        return out.stderr

    assert f"error: data.data_dir is 'data': no such folder, relative to {tmp_path};" in fails()
    assert f"data.data_dir is '{tmp_path}/x': no such folder" in fails('--config.data.data_dir=~/x')
    assert not (tmp_path / '~').exists()


def test_the_core_imports_without_tensorflow_and_clu():
    """Methods, MTO, masking, optimizer, state and step work where neither can be imported."""
    code = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'orbax', 'matplotlib'):
    sys.modules[name] = None
import jax, numpy as np, optax
from configs import quickstart
from mto_jax.training import job, objective, optim, schedules, train_state
from mto_jax import losses, masking, methods, mto
from mto_jax.runtime import parallel
from mto_jax.studies import finetune
from mto_jax.evals import frozen, knn, logistic
from mto_jax.data import augment, memory, order
from mto_jax.training import feed, loop
c = quickstart.get_config()
training = job.prepare(c, 1000)
batch = {'image': np.zeros((c.batch_size, 28, 28, 1), np.uint8)}
meter = train_state.Meter.empty(training.names)
state, meter = jax.jit(training.train_step)(training.create(0), meter, {}, batch, jax.random.key(0))
print('steps', int(state.step))
"""
    out = run('-c', code)
    assert 'steps 1' in out.stdout, out.stderr


def test_importing_changes_no_environment_variable():
    """jax and TensorFlow set some of their own; no module of this package does."""
    code = """
import importlib, os, pkgutil
import jax, tensorflow, tensorflow_datasets
import mto_jax
before = dict(os.environ)
for module in pkgutil.walk_packages(mto_jax.__path__, 'mto_jax.'):
    importlib.import_module(module.name)
print('changed', dict(os.environ.items() ^ before.items()))
"""
    out = run('-c', code)
    assert 'changed {}' in out.stdout, out.stdout + out.stderr


def test_tensorflow_sees_no_accelerator():
    code = (
        "from mto_jax.data import sources; import tensorflow as tf; print('seen', tf.config.get_visible_devices('GPU'))"
    )
    assert 'seen []' in run('-c', code).stdout


def test_freed_memory_is_kept():
    """A block of 256 MB that was freed is there again at once: no page of it is touched for the first time."""
    code = """
import resource, sys
import numpy as np
from mto_jax.runtime import cpu
print(cpu.keep_memory())
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = np.ones(2**25)
    del x
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1] < faults[0] / 10)
"""
    if platform.libc_ver()[0] != 'glibc':
        pytest.skip('not glibc')
    assert run('-c', code).stdout.split() == ['True', 'True']
