"""Several hosts: finding each other before any backend call, and agreeing on what they run.

Each host runs the same command. They are found from the environment (a TPU slice, SLURM) or given by `config.hosts`. A
roll call at the coordinator's address makes a missing host an error that names it, where jax alone would abort.
"""

import contextlib
import importlib.util
import json
import os
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mto_jax.errors import Temporary, UserError

PORT = 8476  # of the coordinator, where none is given


def start(hosts) -> None:
    """Join the other hosts as `config.hosts` says. Before any backend call; does nothing on a single host.

    Raises:
      Temporary: naming the hosts that did not come within `hosts.timeout` seconds.
      UserError: for fields that name no hosts.
    """
    if jax.distributed.is_initialized():
        return
    found = find(hosts)
    if found is None and (hosts.count, hosts.index) != (1, 0):
        raise UserError(
            f'hosts.count is {hosts.count} and hosts.index {hosts.index}, but hosts.coordinator is '
            f'{hosts.coordinator!r} and no other host was found: give it as host:port, the same on every host'
        )
    if found is None or found[1] == 1:
        return
    address, count, index = found
    began = time.monotonic()
    roll_call(address, count, index, hosts.timeout)
    left = max(10, round(hosts.timeout - (time.monotonic() - began)))
    # Left to itself, jax gives a process of a SLURM step one device also where the node has no other process.
    options = {'cluster_detection_method': 'deactivate', 'initialization_timeout': left}
    jax.distributed.initialize(address, count, index, _devices(), **options)


def _devices() -> list[int] | None:
    """The device of this process where SLURM runs several on a node; else None, for all devices of the node."""
    env = os.environ
    nodes = env.get('SLURM_STEP_NUM_NODES')
    return [int(env['SLURM_LOCALID'])] if nodes and int(env['SLURM_NTASKS']) > int(nodes) else None


def find(hosts) -> tuple[str, int, int] | None:
    """(coordinator's host:port, number of hosts, own index), or None on a single host."""
    if hosts.coordinator == '':
        return None
    if hosts.coordinator != 'auto':
        host, _, port = hosts.coordinator.rpartition(':')
        if not host or not port.isdigit():
            raise UserError(
                f"hosts.coordinator is {hosts.coordinator!r}; it must be host:port, 'auto', or '' for one host"
            )
        if not 0 <= hosts.index < hosts.count:
            raise UserError(
                f'hosts.index is {hosts.index} of hosts.count {hosts.count}; with hosts.coordinator set, every host '
                'needs the same count and an index of its own from 0 to count - 1'
            )
        return hosts.coordinator, hosts.count, hosts.index
    env = os.environ
    if {'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_JOB_ID'} <= env.keys():
        port = 61440 + int(env['SLURM_JOB_ID']) % 4096
        return f'{_first_node(env["SLURM_STEP_NODELIST"])}:{port}', int(env['SLURM_NTASKS']), int(env['SLURM_PROCID'])
    if env.get('TPU_WORKER_HOSTNAMES') and env.get('TPU_WORKER_ID'):
        names = env['TPU_WORKER_HOSTNAMES'].split(',')
        return f'{names[0]}:{PORT}', len(names), int(env['TPU_WORKER_ID'])
    if importlib.util.find_spec('libtpu') and any(Path('/dev').glob('accel*')) | any(Path('/dev/vfio').glob('[0-9]*')):
        names = [worker.split(':')[2] for worker in _metadata('worker-network-endpoints').split(',')]
        return f'{names[0]}:{PORT}', len(names), int(_metadata('agent-worker-number'))
    return None


def _first_node(nodes: str) -> str:
    """The first name of a SLURM list: 'a01' of 'a01,b2', of 'a[01-04]' and of 'a[01,03-05],b2'."""
    head, bracket, rest = nodes.partition('[')
    if not bracket or ',' in head:
        return nodes.split(',')[0]
    return head + rest.split(']')[0].split(',')[0].split('-')[0]


def _metadata(key: str) -> str:
    """An attribute of this Google Cloud machine."""
    server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
    url = f'http://{server}/computeMetadata/v1/instance/attributes/{key}'
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'}), timeout=20
        ) as r:
            return r.read().decode()
    except OSError as e:
        raise Temporary(
            f"hosts.coordinator is 'auto' and this machine has a TPU, but its metadata server does not provide {key} "
            f"({e}); give hosts.coordinator, hosts.count and hosts.index, or hosts.coordinator='' for one host"
        ) from None


def roll_call(address: str, count: int, index: int, timeout: float) -> None:
    """Return once all hosts have called at the coordinator's address.

    Raises:
      Temporary: on every host that came, naming those that did not within `timeout` seconds.
      UserError: on every host, for an index that is wrong or given twice.
    """
    deadline = time.monotonic() + timeout
    host, _, port = address.rpartition(':')
    if index:
        _report(host, int(port), count, index, deadline, timeout)
        return
    names, problem, kind = {0: socket.gethostname()}, '', UserError
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(('', int(port)), backlog=count))
        except OSError as e:
            raise Temporary(f'hosts.coordinator: port {port} cannot be opened on this host ({e.strerror})') from None
        peers, seats = [], {}
        while len(names) < count and not problem:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ', '.join(str(i) for i in range(count) if i not in names)
                present = ', '.join(f'{i} ({name})' for i, name in sorted(names.items()))
                problem = (
                    f'of {count} hosts, {count - len(names)} did not report within hosts.timeout ({timeout:g} s): '
                    f'index {missing}. Present: {present}. Start the same command on every host'
                )
                kind = Temporary
                break
            server.settimeout(left)
            try:
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(min(10.0, left))
                with peer.makefile() as lines:
                    other = json.loads(lines.readline())
                number, size, name = other['index'], other['count'], other['host']
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody in time, or somebody else knocked
            peers.append(peer)
            twice = number in seats and not _has_left(seats[number])
            if size != count or twice or not 0 < number < count:
                problem = (
                    f'host {name} reports as index {number} of {size}; this run has {count} hosts, and each needs an '
                    'index of its own'
                )
            names[number], seats[number] = name, peer
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall((json.dumps({'problem': problem, 'temporary': kind is Temporary}) + '\n').encode())
    if problem:
        raise kind(problem)


def _has_left(peer: socket.socket) -> bool:
    """Whether the other end has closed the connection: a host that was started again, or calls again."""
    wait = peer.gettimeout()
    peer.settimeout(0)
    try:
        return not peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(wait)


def _report(host, port, count, index, deadline, timeout) -> None:
    """Knock at the coordinator until it answers."""
    message = json.dumps({'index': index, 'count': count, 'host': socket.gethostname()}) + '\n'
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Temporary(
                f'host {index} of {count}: no answer from {host}:{port} within hosts.timeout ({timeout:g} s). '
                'Start the same command on every host, and check that the address can be reached'
            )
        try:
            # A little longer than the coordinator waits, so that its answer names who is missing.
            with socket.create_connection((host, port), timeout=left) as s:
                s.sendall(message.encode())
                s.settimeout(left + 5)
                with s.makefile() as lines:
                    answer = json.loads(lines.readline())
        except (OSError, ValueError):
            time.sleep(min(0.5, max(left, 0.01)))
            continue
        if answer['problem']:
            raise (Temporary if answer['temporary'] else UserError)(answer['problem'])
        return


def gather(value: Any) -> list[Any]:
    """The value (anything that is JSON) of every process, by index. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is wrong on one host stops all: a UserError inside is raised everywhere. No collective may run inside."""
    problem = None
    try:
        yield
    except UserError as e:
        if jax.process_count() == 1:
            raise
        problem = str(e), isinstance(e, Temporary)
    for index, found in enumerate(gather(problem)):
        if found:
            text, temporary = found
            raise (Temporary if temporary else UserError)(f'host {index}: {text}')


def agree(about: Mapping[str, Any]) -> None:
    """Compare `about` (nested dicts of plain values) over all processes.

    Raises:
      UserError: on every process, naming the fields that differ and the hosts that differ from host 0.
    """
    rows = gather({'host': socket.gethostname(), 'about': flatten(about)})
    lines = differing([r['about'] for r in rows], [r['host'] for r in rows])
    if lines:
        raise UserError(
            '\n'.join(['the hosts do not run the same:', *lines, 'Start the same command and code on all.'])
        )


def differing(abouts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """One line per field that is not the same everywhere."""
    lines = []
    for key in sorted({k for a in abouts for k in a}):
        first = abouts[0].get(key)
        others = [f'{a.get(key)!r} on host {i} ({names[i]})' for i, a in enumerate(abouts) if a.get(key) != first]
        if others:
            more = f' and {len(others) - 3} more hosts' if len(others) > 3 else ''
            lines.append(f'  {key}: {first!r} on host 0 ({names[0]}), {", ".join(others[:3])}{more}')
    return lines


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f'{prefix}{key}.') if isinstance(value, Mapping) else {prefix + key: value}
    return out


def is_first() -> bool:
    """True on the one process that writes logs and pictures."""
    return jax.process_index() == 0
