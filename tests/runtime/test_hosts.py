"""Several hosts: how they find each other, and real runs of two processes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base, finetune, knn, linear_lars
from mto_jax import tasks
from mto_jax.data import order
from mto_jax.errors import UserError
from mto_jax.runtime import hosts, parallel
from mto_jax.runtime.log import read_history
from mto_jax.tasks import pretrain
from mto_jax.training import checkpoint, job
from tests.conftest import QUICK, shrink

SECONDS = 600  # after which a run of two processes hangs, rather than being slow


def free_port():
    with socket.socket() as s:
        s.bind(('', 0))
        return s.getsockname()[1]


def call_in(count, indices, timeout, sizes=None):
    """The outcome of `roll_call` on each of the hosts that were started: None, or the error's name and text."""
    address = f'localhost:{free_port()}'

    def one(index):
        try:
            hosts.roll_call(address, (sizes or {}).get(index, count), index, timeout)
        except UserError as e:
            return f'{type(e).__name__}: {e}'

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


def test_all_hosts_report():
    assert call_in(4, [3, 1, 0, 2], 20) == [None] * 4


def test_missing_hosts_are_named_on_those_that_came():
    out = call_in(5, [0, 2, 4], 2)
    for text in out:
        assert text.startswith('Temporary: of 5 hosts, 2 did not report within hosts.timeout (2 s): index 1, 3')
        assert '2 (' in text


def test_a_missing_coordinator_is_named():
    (text,) = call_in(2, [1], 1)
    assert re.fullmatch(r'Temporary: host 1 of 2: no answer from localhost:\d+ within hosts.timeout \(1 s\)\. .*', text)


def test_an_index_used_twice_and_another_count_are_refused():
    for out in (call_in(3, [0, 1, 1], 5), call_in(2, [0, 1], 5, {1: 3})):
        assert all(text.startswith('UserError: ') and 'index 1 of' in text for text in out if text)
        assert any('reports as index 1 of' in text for text in out if text)


@pytest.mark.parametrize('words', [b'GET / HTTP/1.1\n', b'{"index": 1, "count": 3, "host": "a"}\n'])
def test_who_has_left_does_not_disturb_the_roll_call(words):
    """A stranger, and a host that is started again: it takes its own place."""
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(hosts.roll_call, f'localhost:{port}', 3, 0, 20)
        time.sleep(0.3)
        with socket.create_connection(('localhost', port)) as s:
            s.sendall(words)
            time.sleep(0.3)
        others = [pool.submit(hosts.roll_call, f'localhost:{port}', 3, i, 20) for i in (1, 2)]
        assert [f.result() for f in (first, *others)] == [None] * 3


@pytest.mark.parametrize(
    ('env', 'expected'),
    [
        ({}, None),
        (
            {'SLURM_STEP_NODELIST': 'n[03-07,9]', 'SLURM_NTASKS': '6', 'SLURM_PROCID': '2', 'SLURM_JOB_ID': '4097'},
            ('n03:61441', 6, 2),
        ),
        (
            {'SLURM_STEP_NODELIST': 'a1,b[2-3]', 'SLURM_NTASKS': '3', 'SLURM_PROCID': '0', 'SLURM_JOB_ID': '1'},
            ('a1:61441', 3, 0),
        ),
        ({'TPU_WORKER_HOSTNAMES': 't0,t1', 'TPU_WORKER_ID': '1'}, (f't0:{hosts.PORT}', 2, 1)),
    ],
)
def test_hosts_are_found_from_the_environment(monkeypatch, env, expected):
    for name in ('SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_JOB_ID', 'TPU_WORKER_HOSTNAMES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert hosts.find(base.get_config().hosts) == expected


@pytest.mark.parametrize(('tasks', 'devices'), [('2', None), ('8', [1])])
def test_a_slurm_task_has_all_devices_of_its_node(monkeypatch, tasks, devices):
    """Unless several tasks share the node: then the one of its number."""
    env = {'SLURM_STEP_NODELIST': 'n[03-04]', 'SLURM_PROCID': '1', 'SLURM_JOB_ID': '1', 'SLURM_LOCALID': '1'}
    for name, value in (env | {'SLURM_NTASKS': tasks, 'SLURM_STEP_NUM_NODES': '2'}).items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(hosts, 'roll_call', lambda *_: None)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *given, **named: seen.append((given, named)))
    hosts.start(base.get_config().hosts)
    ((given, named),) = seen
    assert given == ('n03:61441', int(tasks), 1, devices)
    assert named['cluster_detection_method'] == 'deactivate'  # else jax would choose the devices


@pytest.mark.parametrize(
    ('fields', 'word'),
    [
        ({'coordinator': 'nowhere'}, 'hosts.coordinator'),
        ({'coordinator': 'a:1', 'count': 2, 'index': 2}, 'hosts.index is 2 of hosts.count 2'),
    ],
)
def test_wrong_fields_are_named(fields, word):
    c = base.get_config().hosts
    c.update(fields)
    with pytest.raises(UserError, match=word):
        hosts.find(c)


@pytest.mark.parametrize('coordinator', ['auto', ''])
def test_a_forgotten_coordinator_is_named(monkeypatch, coordinator):
    c = base.get_config().hosts
    c.update({'coordinator': coordinator, 'count': 2, 'index': 1})
    monkeypatch.setattr(hosts, 'find', lambda _: None)
    with pytest.raises(UserError, match=r'hosts\.count is 2 and hosts\.index 1, but hosts\.coordinator is'):
        hosts.start(c)


def test_differences_name_field_and_hosts():
    lines = hosts.differing([{'a.b': 1, 'c': 2}, {'a.b': 1, 'c': 3}, {'a.b': 1}], ['x', 'y', 'z'])
    assert lines == ['  c: 2 on host 0 (x), 3 on host 1 (y), None on host 2 (z)']


# Real runs. Two processes of two devices each; the same training on one process of four.

FIELDS = {
    'task': 'pretrain',
    'data.train_split': 'train[:130]',
    'data.val_split': 'train[130:190]',
    'model.patch_size': 7,
    'model.depth': 2,
    'model.width': 16,
    'model.heads': 2,
    'mae.decoder_width': 8,
    'mae.decoder_heads': 2,
    'batch_size': 32,
    'epochs': 2.0,
    'optim.warmup_epochs': 0.5,
    'optim.eps': 1e-3,  # above the rounding of the gradients: Adam would make full steps of it
    'log_every': 3,
    'diagnose_every': 0,
    'eval.every_epochs': 1.0,
    'eval.batch_size': 32,
    'checkpoints.every': 4,
    'checkpoints.keep': 9,
    'hosts.timeout': 60.0,
}


def launch(workdir, count, devices=2, port=None, different=None, only=None, config='quickstart', own=FIELDS, **fields):
    """Start `count` processes (or only those listed) of one training; returns them, with their output in files."""
    port, processes = port or free_port(), []
    for i in range(count) if only is None else only:
        settings = own | {k.replace('__', '.'): v for k, v in fields.items()}
        settings |= {'hosts.coordinator': f'localhost:{port}', 'hosts.count': count, 'hosts.index': i}
        settings |= (different or {}).get(i, {})
        args = [f'--config.{k}={v}' for k, v in settings.items()]
        env = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'{QUICK} --xla_force_host_platform_device_count={devices}',
        }
        command = [sys.executable, 'main.py', f'--config=configs/{config}.py', f'--workdir={workdir}', *args]
        with open(f'{workdir}.{i}.log', 'w') as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, text=True))
    return processes


def finish(processes):
    try:
        return [p.wait(SECONDS) for p in processes]
    finally:
        for p in processes:
            p.kill()


def output(workdir, index=0):
    with open(f'{workdir}.{index}.log') as f:
        return f.read()


def restored(workdir, step, method='mae'):
    """The saved parameters and model state, on one device."""
    c = shrink(base.get_config())
    for name, value in (('mae.decoder_width', 8), ('model.dtype', 'float32'), ('method', method)):
        c.update_from_flattened_dict({name: value})
    training = job.prepare(c, 130)
    mesh = parallel.make_mesh(1)
    abstract = checkpoint.abstract_like(jax.eval_shape(lambda: training.create(0)), training.sharding(mesh))
    state = checkpoint.Checkpointer(workdir, read_only=True).restore(abstract, step)
    return {'params': state.params, 'model_state': state.model_state}


def largest_difference(a, b):
    """Over all values."""
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_two_processes_train_as_one_and_hand_over(tmp_path):
    """The same global batches on 2 processes as on 1, also where one begins and the other goes on."""
    one, two = (str(tmp_path / n) for n in ('one', 'two'))
    assert finish(launch(one, 1, devices=4)) == [0]
    assert finish(launch(two, 2)) == [0, 0], output(two)
    assert largest_difference(restored(one, 8), restored(two, 8)) < 1e-5
    accuracies = [np.array(re.findall(r' knn_\d+ ([\d.]+)', output(folder)), float) for folder in (one, two)]
    assert len(accuracies[0]) == 8
    np.testing.assert_allclose(*accuracies, atol=1.5 / 60)
    assert 'validation' in output(two, 0)
    assert 'validation' not in output(two, 1)

    # Stopped at 4 of 8 steps by removing what came later; then ended by the other or the same number of processes.
    for source, processes in ((two, 1), (one, 2), (two, 2)):
        mixed = f'{source}-then-{processes}'
        shutil.copytree(source, mixed)
        shutil.rmtree(f'{mixed}/checkpoints/8')
        assert finish(launch(mixed, processes)) == [0] * processes, output(mixed)
        assert 'resuming at step 4' in output(mixed)
        assert largest_difference(restored(one, 8), restored(mixed, 8)) < 1e-5
        assert ('under other conditions' in output(mixed)) == ((source, processes) != (two, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('method', 'fields'),
    [
        ('tests.toy_method', {'eval.every_epochs': 1.0}),
        ('bootmae', {'bootmae.decoder_width': 20, 'bootmae.block_patches': 8, 'bootmae.block_area': (2, 5)}),
        ('conmim', {'conmim.hidden': 24, 'conmim.out': 8, 'conmim.group': 16, 'conmim.mask_unit': 1}),
    ],
)
def test_two_processes_with_a_teacher_train_as_one(tmp_path, method, fields):
    """Parameters, teacher and running statistics; once, the teacher is probed as it trains."""
    one, two = (str(tmp_path / n) for n in ('one', 'two'))
    fields = {'eval.every_epochs': 0.0} | fields | {'method': method, 'eval.weights': 'teacher'}
    assert finish(launch(one, 1, devices=4, **fields)) == [0], output(one)
    assert finish(launch(two, 2, **fields)) == [0, 0], output(two)
    states = (restored(folder, 8, method) for folder in (one, two))
    assert largest_difference(*states) < 1e-5


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Fine-tuning, a probe and kNN of one checkpoint: what four devices of one process find, and no example twice."""
    c = shrink(base.get_config())
    c.model.dtype, c.epochs, c.optim.warmup_epochs = 'float32', 0.5, 0.0
    pretrain.run(c, tmp_path / 'run')
    short = {
        'data.val_split': 'train[130:190]',
        'data.randaugment': '',
        'batch_size': 32,
        'epochs': 2.0,
        'optim.warmup_epochs': 0.5,
        'optim.eps': 1e-3,
        'model.dtype': 'float32',
        'allow_cpu': True,
    }
    tasks_of = {
        'finetune': (finetune, short | {'optim.base_lr': 0.01, 'classify.head_scale': 0.01}),
        'linear_lars': (linear_lars, short | {'optim.base_lr': 5.0, 'probe.group': 16}),
        'knn': (knn, {}),
    }
    for name, (module, fields) in tasks_of.items():
        fields = fields | {'checkpoint': str(tmp_path / 'run'), 'eval.batch_size': 32}
        e = module.get_config()
        e.update_from_flattened_dict(fields)
        e.mesh.data, e.hosts.coordinator = 4, ''
        expected = tasks.run(e, tmp_path / f'{name}-one')
        two = str(tmp_path / f'{name}-two')
        assert finish(launch(two, 2, config=name, own=fields)) == [0, 0], output(two)
        found = json.loads((Path(two) / f'{e.task}.json').read_text())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # A fraction of the 70 test images; one may lie on the border between two classes.
            close = pytest.approx(value, abs=1e-4 if key == 'loss' else 1.5 / 70) if isinstance(value, float) else value
            assert found[key] == close, (name, key)


def wait_for(pattern, workdir, processes):
    """Until host 0 of a run that goes on has said it; returns the last step that it had reported."""
    deadline = time.monotonic() + SECONDS
    while not re.search(pattern, text := output(workdir), re.M):
        assert all(p.poll() is None for p in processes), text
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return int(re.findall(r'^step (\d+)/', text, re.M)[-1])


@pytest.mark.slow
def test_sigterm_at_one_host_saves_on_all(tmp_path):
    """It ends where it is told to, not at the 20,000th step or the 100,000th, when a save is due."""
    workdir = str(tmp_path / 'run')
    fields = {'epochs': 5000.0, 'checkpoints__every': 100_000, 'eval__every_epochs': 0.0}
    processes = launch(workdir, 2, **fields)
    try:
        reached = wait_for('^step 12/20000 ', workdir, processes)
    finally:
        processes[1].send_signal(signal.SIGTERM)
        codes = finish(processes)
    assert codes == [143, 143], output(workdir) + output(workdir, 1)
    (step,) = checkpoint.Checkpointer(workdir, read_only=True).steps
    assert f'SIGTERM received: saved at step {step};' in output(workdir)
    # jax looks for the signal once a second: so many steps are more than a machine takes until then.
    assert reached <= step < reached + 1000
    again = launch(workdir, 2, **fields)
    try:
        wait_for(f'^step {step + 12 - step % 3}/', workdir, again)
    finally:
        for p in again:
            p.kill()
            p.wait()
    assert f'resuming at step {step}' in output(workdir)
    assert 'under other conditions' not in output(workdir)


@pytest.mark.slow
def test_a_missing_or_differing_peer_fails_fast(tmp_path):
    missing = str(tmp_path / 'missing')
    assert finish(launch(missing, 2, only=[0], hosts__timeout=3.0)) == [75]
    assert 'of 2 hosts, 1 did not report within hosts.timeout (3 s): index 1' in output(missing)
    differing = str(tmp_path / 'differing')
    codes = finish(launch(differing, 2, different={1: {'optim.base_lr': 0.5, 'mask_ratio': 0.5}}))
    assert codes == [2, 2]
    for i in (0, 1):
        assert 'config.optim.base_lr: 0.003 on host 0' in output(differing, i)
        assert '0.5 on host 1' in output(differing, i)
    assert not os.path.exists(f'{differing}/checkpoints')


@pytest.mark.slow
def test_a_workdir_on_the_disk_of_each_host_is_refused(tmp_path):
    port = free_port()
    processes = [p for i in (0, 1) for p in launch(str(tmp_path / 'ab'[i]), 2, port=port, only=[i])]
    assert finish(processes) == [2, 2]
    for name, index in (('a', 0), ('b', 1)):
        assert f'host 1: the workdir {tmp_path}/b is not the folder' in output(str(tmp_path / name), index)
        assert not (tmp_path / name / 'checkpoints').exists()


@pytest.mark.slow
def test_what_only_one_host_cannot_read_is_put_aside_by_both(tmp_path):
    """Each reads its own part of what is split over them: the other does not wait for one whose part is damaged."""
    workdir = str(tmp_path / 'run')
    fields = FIELDS | {'model.width': 64, 'mesh.data': 1, 'mesh.fsdp': 4, 'eval.every_epochs': 0.0}
    assert finish(launch(workdir, 2, own=fields)) == [0, 0], output(workdir)
    for path in (tmp_path / 'run' / 'checkpoints' / '8').glob('*/ocdbt.process_1/d/*'):
        os.truncate(path, path.stat().st_size // 2)
    assert finish(launch(workdir, 2, own=fields)) == [0, 0], output(workdir) + output(workdir, 1)
    assert f'It is moved to {workdir}/damaged/8' in output(workdir)
    assert 'resuming at step 4' in output(workdir)


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_an_error_of_one_host_keeps_its_exit_code(tmp_path, index):
    """A broken image among the rows of one of two: the job ends, and its code says that a user must act."""
    first = next(order.batch_positions(64, 32, 0, 0, 1))
    bad = first[16 * index]
    for i in range(64):
        path = tmp_path / 'data' / 'train' / 'ab'[i % 2] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((28, 28), i, np.uint8)).save(path)
    files = sorted((tmp_path / 'data' / 'train').rglob('*.png'))
    files[bad].write_bytes(b'no image')
    workdir = str(tmp_path / 'run')
    fields = {'data.name': 'folder', 'data.data_dir': str(tmp_path / 'data'), 'data.train_split': 'train'}
    fields |= {'data.val_split': 'train', 'eval.every_epochs': 0.0, 'epochs': 1.0}
    processes = launch(workdir, 2, own=FIELDS | fields)
    try:
        assert processes[index].wait(SECONDS) == 2, output(workdir, index)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert f'error: data: cannot decode {files[bad]}: not an image' in output(workdir, index)


def test_a_single_process_saves_at_sigterm(config, tmp_path, monkeypatch):
    """In this process: SIGTERM while step 3 runs, then a second start that ends as if nothing had happened."""
    from mto_jax.data import pipeline
    from mto_jax.runtime import preemption

    config.checkpoints.every = 100
    whole = pretrain.run(config, tmp_path / 'whole')
    original = pipeline.train_batches

    def with_notice(*args):
        for i, batch in enumerate(original(*args)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    if threading.current_thread() is not threading.main_thread():
        pytest.skip('signals reach the main thread only')
    monkeypatch.setattr(pipeline, 'train_batches', with_notice)
    with pytest.raises(preemption.Preempted) as e:
        pretrain.run(config, tmp_path / 'part')
    assert e.value.code == 143
    assert len(checkpoint.Checkpointer(tmp_path / 'part').steps) == 1
    monkeypatch.undo()
    again = pretrain.run(config, tmp_path / 'part')
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, again))


@pytest.mark.parametrize('step', [4, 8], ids=['an evaluation', 'the last step'])
def test_what_sigterm_left_out_is_measured_when_the_run_goes_on(config, tmp_path, monkeypatch, step):
    """It comes in a step after which the run would have been measured, as it is after steps 4 and 8."""
    from mto_jax.runtime import preemption

    config.eval.every_epochs, config.checkpoints.every = 1.0, 4
    with monkeypatch.context() as m:
        m.setattr(preemption, 'watch', lambda: contextlib.nullcontext(lambda now: now == step))
        with pytest.raises(preemption.Preempted):
            pretrain.run(config, tmp_path)

    def measured():
        return [r['step'] for r in read_history(tmp_path) if 'val_knn_1' in r]

    assert measured() == [4] * (step == 8)
    pretrain.run(config, tmp_path)
    assert measured() == [4, 8]
    pretrain.run(config, tmp_path)
    assert measured() == [4, 8]


def test_sbatch_reads_every_directive():
    """It stops at the first line that is neither empty nor a comment."""
    text = (Path(__file__).parents[2] / 'launch' / 'slurm.sh').read_text().splitlines()
    first = next(i for i, line in enumerate(text) if line and not line.startswith('#'))
    assert any('--signal=TERM@' in line for line in text[:first])
    assert not any(line.startswith('#SBATCH') for line in text[first:])
