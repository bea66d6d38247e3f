"""Checkpoints: checksums, damage, full disks, kills; and who holds a workdir."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath

from benchmarks import faults
from configs import base, knn
from mto_jax import tasks
from mto_jax.analysis import plots
from mto_jax.errors import Temporary, UserError
from mto_jax.runtime import log, parallel, workdir
from mto_jax.tasks import pretrain
from mto_jax.training import checkpoint, job
from tests.conftest import shrink


@pytest.mark.parametrize('dtype', [np.float32, np.int32, jnp.bfloat16, np.uint8, np.float16])
def test_checksums_against_plain_integers(rng, dtype):
    """Python integers, of a shape whose axes lie on different devices; every single flipped bit shows."""
    x = rng.normal(size=(8, 6)).astype(dtype) if np.dtype(dtype).kind != 'i' else rng.integers(-9, 9, (8, 6), dtype)
    raw = x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    want = sum(int(b) * (i * 0x9E3779B1 % 2**32 | 1) for i, b in enumerate(raw.ravel())) % 2**32
    assert checkpoint.checksums({'x': jnp.asarray(x)}) == {'x': want}
    mesh = parallel.make_mesh(4, 2)
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data', 'fsdp')))
    assert checkpoint.checksums({'x': split}) == {'x': want}
    other = raw.copy()
    other[tuple(rng.integers(0, s) for s in raw.shape)] ^= raw.dtype.type(1 << int(rng.integers(8 * x.dtype.itemsize)))
    assert checkpoint.checksums({'x': jnp.asarray(other.view(x.dtype))}) != {'x': want}
    swapped = raw.copy()
    swapped[0, 0], swapped[3, 2] = raw[3, 2], raw[0, 0]
    if raw[0, 0] != raw[3, 2]:
        assert checkpoint.checksums({'x': jnp.asarray(swapped.view(x.dtype))}) != {'x': want}


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
    """A finished run of 8 steps with checkpoints at 4, 6, 8 (config, folder, state)."""
    c = shrink(base.get_config())
    c.model.dtype, c.checkpoints.keep = 'float32', 3
    folder = tmp_path_factory.mktemp('whole') / 'run'
    return c, folder, pretrain.run(c, folder)


# A restore that fails leaves coroutines of orbax behind, which complain when they are collected.
ORBAX_LEFTOVERS = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@ORBAX_LEFTOVERS
@pytest.mark.parametrize('way', faults.DAMAGES)
def test_damage_is_reported_and_the_one_before_is_used(finished_run, tmp_path, capsys, way):
    """A flipped bit may also lie where no array is read from: then the newest is restored, bit by bit."""
    config, folder, whole = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    faults.damage(tmp_path / 'run' / 'checkpoints' / '8', way, random.Random())
    again = pretrain.run(config, tmp_path / 'run')
    out = capsys.readouterr().out
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, again))
    if way == 'flip' and '8 steps on 1 cpu device(s), all done already' in out:
        return
    assert 'checkpoints/8 ' in out
    assert ('the metadata of params are missing' in out) == (way == 'metadata')
    assert f'It is moved to {tmp_path}/run/damaged/8' in out
    assert 'resuming at step 6' in out
    assert (tmp_path / 'run' / 'damaged' / '8').is_dir()


@ORBAX_LEFTOVERS
def test_a_damaged_config_in_a_checkpoint_is_damage_too(finished_run, tmp_path, capsys):
    config, folder, _ = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    (tmp_path / 'run' / 'checkpoints' / '8' / 'config' / 'metadata').write_text('{"seed"')
    pretrain.run(config, tmp_path / 'run')
    out = capsys.readouterr().out
    assert f'It is moved to {tmp_path}/run/damaged/8' in out
    assert 'resuming at step 6' in out


def test_bits_that_the_reader_accepts_are_caught_by_the_checksum(finished_run, tmp_path):
    """What is stored is whole, but not what was saved: here the recorded sum is another."""
    config, folder, _ = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoints' / '8' / 'about' / 'metadata'
    about = json.loads(path.read_text())
    name = next(n for n in about['checksums']['params'] if n.endswith('mlp_in/kernel'))
    about['checksums']['params'][name] ^= 1 << 7
    path.write_text(json.dumps(about))
    saver = checkpoint.Checkpointer(tmp_path / 'run')
    training = job.prepare(config, 130)
    mesh = parallel.make_mesh(1)
    abstract = checkpoint.abstract_like(jax.eval_shape(lambda: training.create(0)), training.sharding(mesh))
    with pytest.raises(checkpoint.Damaged, match=rf'the checksum of params/{name} differs'):
        saver.restore(abstract, 8)


@ORBAX_LEFTOVERS
def listing(folder):
    """{path: time of the last change} of everything in a folder."""
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob('*')]}


def knn_config(run):
    c = knn.get_config()
    c.checkpoint, c.eval.batch_size = str(run), 32
    return c


def test_an_evaluation_leaves_the_workdir_as_it_is(finished_run, tmp_path):
    """Also the temporary folder of a save that the training job has under way."""
    run = tmp_path / 'run'
    shutil.copytree(finished_run[1], run)
    (run / 'checkpoints' / '25.orbax-checkpoint-tmp').mkdir()
    before = listing(run)
    assert tasks.run(knn_config(run), tmp_path / 'out')['step'] == 8
    assert listing(run) == before


@ORBAX_LEFTOVERS
def test_a_checkpoint_that_is_deleted_while_it_is_read(finished_run, tmp_path, monkeypatch, capsys):
    """The training job deletes step 8 once its config has been read: step 6 is used. A step that was named is not
    replaced by another."""
    run = tmp_path / 'run'
    shutil.copytree(finished_run[1], run)
    restore = checkpoint.Checkpointer.restore_item

    def late(self, abstract, step, name):
        if step == 8:
            shutil.rmtree(run / 'checkpoints' / '8')
        return restore(self, abstract, step, name)

    monkeypatch.setattr(checkpoint.Checkpointer, 'restore_item', late)
    assert tasks.run(knn_config(run), tmp_path / 'out')['step'] == 6
    assert 'checkpoints/8 was deleted while it was read; looking for the next newest' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'checkpoints/8.: no checkpoint there'):
        tasks.run(knn_config(run / 'checkpoints' / '8'), tmp_path / 'out')


@ORBAX_LEFTOVERS
def test_a_damaged_checkpoint_is_not_taken_for_a_deleted_one(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'DELETION', 0.2)
    shutil.copytree(finished_run[1], tmp_path / 'run')
    faults.damage(tmp_path / 'run' / 'checkpoints' / '8', 'empty', random.Random(0))
    before = listing(tmp_path / 'run')
    with pytest.raises(checkpoint.Damaged, match='checkpoints/8 cannot be read'):
        tasks.run(knn_config(tmp_path / 'run'), tmp_path / 'out')
    assert listing(tmp_path / 'run') == before


@pytest.mark.slow
@pytest.mark.parametrize(('fsdp', 'tensor'), [(1, 4), (4, 1)])
def test_frequent_saves_on_a_split_mesh(config, tmp_path, fsdp, tensor):
    """Checksums in a program per array would deadlock here, for want of a thread per device, and XLA would abort."""
    c = config
    c.model.width, c.model.heads, c.mae.decoder_width, c.mae.decoder_heads = 64, 4, 32, 4
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, fsdp, tensor
    c.checkpoints.every, c.epochs = 1, 1.0
    pretrain.run(c, tmp_path)
    assert (tmp_path / 'checkpoints' / '4').is_dir()


def test_a_checkpoint_of_an_earlier_version(finished_run, tmp_path):
    """Refused in one line, and left where it is; an evaluation reads it."""
    config, folder, _ = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoints' / '8' / 'about' / 'metadata'
    about = json.loads(path.read_text())
    del about['format']
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r'checkpoints/8 was saved by an earlier version') as e:
        pretrain.run(config, tmp_path / 'run')
    assert '\n' not in str(e.value)
    assert path.exists()
    assert tasks.run(knn_config(tmp_path / 'run'), tmp_path / 'out')['step'] == 8


@ORBAX_LEFTOVERS
def test_all_damaged_stops(finished_run, tmp_path):
    config, folder, _ = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    for step in (4, 6, 8):
        faults.damage(tmp_path / 'run' / 'checkpoints' / str(step), 'empty', random.Random(0))
    with pytest.raises(UserError, match=r'all checkpoints .* are damaged \(steps \[4, 6, 8\]\)'):
        pretrain.run(config, tmp_path / 'run')


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(finished_run, tmp_path):
    """Files of this process may grow to 30 kB only, which the arrays of a checkpoint do not fit in."""
    config, folder, _ = finished_run
    shutil.copytree(folder, tmp_path / 'run')
    for step in (6, 8):
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
    code = """
import resource, signal, sys
from configs import base
from tests.conftest import shrink
from mto_jax.tasks import pretrain
from mto_jax.errors import UserError
c = shrink(base.get_config())
c.model.dtype, c.checkpoints.keep = 'float32', 3
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
try:
    pretrain.run(c, sys.argv[1])
except UserError as e:
    print('stopped:', e)
"""
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', code, str(tmp_path / 'run')]
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert 'stopped: a checkpoint could not be saved in' in out.stdout, out.stdout + out.stderr
    assert 'Intact checkpoints: 4.' in out.stdout
    again = pretrain.run(config, tmp_path / 'run')
    assert int(again.step) == 8


def test_a_workdir_that_cannot_be_written(config, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        pretrain.run(config, tmp_path / 'file' / 'run')


def test_two_jobs_cannot_share_a_workdir(tmp_path):
    other = 'from mto_jax.runtime import workdir; import sys; workdir.hold(sys.argv[1]).__enter__()'
    with workdir.hold(tmp_path):
        command = [sys.executable, '-c', other, str(tmp_path)]
        out = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert f'in use by process {os.getpid()} on' in out.stderr
    assert not (tmp_path / 'lock.json').exists()


def test_leftovers_of_a_killed_write_are_removed(tmp_path, monkeypatch):
    """By the next job that holds the workdir; nothing else is."""

    def killed(*_):
        raise KeyboardInterrupt  # as SIGKILL, it is no OSError: nothing is tidied up

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            workdir.write(epath.Path(tmp_path) / 'metrics.jsonl', 'x')
    (tmp_path / 'notes.txt').write_text('mine')
    assert len(list(tmp_path.glob('*.part'))) == 1
    with workdir.hold(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == ['lock.json', 'notes.txt']


def test_a_dead_jobs_workdir_is_taken_over(tmp_path):
    """Of this host, its process being gone; of another host, after a time without a sign of life."""
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    mine = {'token': 'x', 'host': workdir.socket.gethostname(), 'pid': gone.pid, 'beat': time.time()}
    (tmp_path / 'lock.json').write_text(json.dumps(mine))
    with workdir.hold(tmp_path):
        assert json.loads((tmp_path / 'lock.json').read_text())['pid'] == os.getpid()


@pytest.mark.parametrize('content', ['', json.dumps({'token': 'y', 'host': 'elsewhere', 'pid': 7, 'beat': 1.0})])
def test_a_dead_jobs_workdir_is_taken_over_once(tmp_path, monkeypatch, content):
    """Another job takes it, or is about to, after this one has found the dead one's lock: it is left alone."""
    dead = {'token': 'x', 'host': workdir.socket.gethostname(), 'pid': -1, 'beat': 0.0}
    lock = tmp_path / 'lock.json'
    lock.write_text(content)
    read, seen = workdir._Lock._read, iter([dead if content else None])
    monkeypatch.setattr(workdir._Lock, '_dead', lambda self, other: True)
    monkeypatch.setattr(workdir._Lock, '_read', lambda self: next(seen, None) or read(self))
    words = 'in use by process 7 on elsewhere' if content else 'after 60 s it counts as dead'
    with pytest.raises(UserError, match=words):
        workdir.hold(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ['lock.json']
    assert lock.read_text() == content


@pytest.mark.parametrize('handler', ['default_int_handler', 'SIG_IGN'])  # the latter: of a job in the background
def test_a_job_that_lost_its_workdir_stops(tmp_path, handler):
    """It stood still, and another job took over: it does not take the workdir back."""
    theirs = json.dumps({'token': 'y', 'host': 'elsewhere', 'pid': 7, 'beat': 1.0})
    job = (
        'import pathlib, signal, sys, time; from mto_jax.runtime import workdir; workdir.BEAT = 0.1\n'
        f'signal.signal(signal.SIGINT, signal.{handler})\n'
        'with workdir.hold(sys.argv[1]):\n'
        "    pathlib.Path(sys.argv[1], 'lock.json').write_text(sys.argv[2])\n"
        '    time.sleep(60)'
    )
    command = [sys.executable, '-c', job, str(tmp_path), theirs]
    out = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert out.returncode
    assert 'is in use by process 7 on elsewhere, which took over while this one stood still' in out.stderr
    assert 'KeyboardInterrupt' not in out.stderr
    assert (tmp_path / 'lock.json').read_text() == theirs


@pytest.mark.parametrize('dead', [{'token': 'x'}, None])
def test_a_lock_that_is_just_being_written_is_put_back(tmp_path, dead):
    (tmp_path / 'lock.json').write_text('')
    workdir._Lock(epath.Path(tmp_path / 'lock.json'))._remove(dead)
    assert [p.name for p in tmp_path.iterdir()] == ['lock.json']


def test_a_lock_that_says_nothing_is_dead_after_a_while(tmp_path):
    """As it is left by a job that was killed between creating and writing it."""
    lock = tmp_path / 'lock.json'
    lock.write_text('')
    with pytest.raises(Temporary, match='after 60 s it counts as dead'):
        workdir.hold(tmp_path).__enter__()
    os.utime(lock, (time.time() - 61,) * 2)
    with workdir.hold(tmp_path):
        assert json.loads(lock.read_text())['pid'] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(workdir._Lock, '_content', full)
        with pytest.raises(Temporary, match='cannot be written: No space left on device'):
            workdir.hold(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())
    with workdir.hold(tmp_path):
        pass


def test_all_hosts_must_see_one_workdir(tmp_path):
    with workdir.hold(tmp_path / 'a') as token:
        workdir.require_shared(tmp_path / 'a', token)
        with pytest.raises(UserError, match='/b is not the folder that host 0 writes to'):
            workdir.require_shared(tmp_path / 'b', token, wait=0.1)


def test_another_hosts_job_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, 'STALE', 2.0)
    theirs = {'token': 'x', 'host': 'elsewhere', 'pid': 1, 'beat': 0.0}
    (tmp_path / 'lock.json').write_text(json.dumps(theirs))
    with workdir.hold(tmp_path):
        pass
    (tmp_path / 'lock.json').write_text(json.dumps(theirs))

    def beat():
        time.sleep(0.5)
        (tmp_path / 'lock.json').write_text(json.dumps(theirs | {'beat': 1.0}))

    threading.Thread(target=beat).start()
    with pytest.raises(UserError, match='in use by process 1 on elsewhere'), workdir.hold(tmp_path):
        pass


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / 'config.json').write_text('{"a"')
    with pytest.raises(UserError, match=r'config.json is damaged'):
        workdir.require_same(tmp_path, {'a': 1})


def test_writing_is_all_or_nothing(tmp_path):
    path = epath.Path(tmp_path / 'x' / 'file')
    workdir.write(path, 'one')
    workdir.write(path, b'two')
    assert path.read_text() == 'two'
    assert [p.name for p in path.parent.iterdir()] == ['file']


def test_errors_of_a_bucket_are_no_oserrors(tmp_path, monkeypatch):
    """They are what may pass, and the job that holds a workdir goes on saying so once the bucket answers again."""

    class Unavailable(Exception):  # as tensorflow's
        pass

    def fails(*_):
        raise Unavailable('503: try again\nlater')

    monkeypatch.setattr(workdir, 'BEAT', 0.05)
    lock = tmp_path / 'lock.json'
    with workdir.hold(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(workdir, '_write', fails)
            with pytest.raises(Temporary, match=r'x cannot be written: 503: try again\. Free'):
                workdir.write(tmp_path / 'x', 'x')
            time.sleep(0.2)
        before, deadline = lock.read_text(), time.monotonic() + 10
        while lock.read_text() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lock.read_text() != before
    monkeypatch.setattr(workdir._Lock, 'take', fails)
    with pytest.raises(Temporary, match=f'the workdir {tmp_path} cannot be written: 503: try again$'):
        workdir.hold(tmp_path).__enter__()


class FakeBucket(backend.os_backend.__class__):
    """gs://bucket/... on a folder, through the interface that epath uses for every remote store."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name in ('folder', '__class__') or not callable(value):
            return value

        def call(*args, **kwargs):
            args = [str(a).replace('gs://bucket', self.folder) if str(a).startswith('gs://') else a for a in args]
            out = value(*args, **kwargs)
            return [p.replace(self.folder, 'gs://bucket') for p in out] if name in ('glob', 'listdir') else out

        return call


@pytest.mark.pictures
def test_a_workdir_may_be_remote(tmp_path, monkeypatch):
    """Lock, config, history and pictures on a fake remote file system, where nothing is created exclusively."""
    bucket = FakeBucket(tmp_path)
    monkeypatch.setattr(gpath.PosixGPath, '_backend', property(lambda self: bucket))
    place = epath.Path('gs://bucket/runs/a')
    with workdir.hold(place):
        workdir.record(place, {'seed': 1}, {})
        assert (tmp_path / 'runs' / 'a' / 'lock.json').exists()
        workdir.write(place / 'metrics.jsonl', '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        history = log.read_history(place)
        plots.curves(place / 'curves.png', {'a': history})
    assert [r['loss'] for r in history] == [2.0, 1.0]
    assert (tmp_path / 'runs' / 'a' / 'curves.png').read_bytes().startswith(b'\x89PNG')
    names = ['config.json', 'curves.png', 'environment.json', 'metrics.jsonl']
    assert sorted(p.name for p in (tmp_path / 'runs' / 'a').iterdir()) == names
    with pytest.raises(UserError, match='seed: 1 there, 2 now'):
        workdir.require_same(place, {'seed': 2})
    (tmp_path / 'runs' / 'a' / 'checkpoints' / '12').mkdir(parents=True)
    assert checkpoint.locate('gs://bucket/runs/a') == (place, 12)


@pytest.mark.slow
def test_killed_and_damaged_it_ends_the_same(tmp_path):
    counts = faults.run(3, random.randrange(2**31), Path(tmp_path), ('flip', 'empty'))
    assert counts['kills'] == 5
    assert counts['damages_noticed'] + counts['flips_of_unused_bits'] == counts['damages'] == 2
    assert counts['evaluations'] + counts['evaluations_that_found_damage'] >= 2
