"""A run's folder: local or remote (gs://...), one job at a time, and one config."""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mto_jax.config import FIELDS, field_of, kept, nested
from mto_jax.errors import Temporary, UserError
from mto_jax.runtime.hosts import flatten

BEAT = 15.0  # seconds between two signs of life of the job that holds a workdir
STALE = 60.0  # seconds without one after which it counts as dead
SHARED = 30.0  # seconds within which all hosts see what one has written
PART = '.part'  # ends the name of a file that is being written
LOCK = 'lock.json'


def write(path: epath.Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old or the new one, also after a kill.

    Raises:
      Temporary: where it cannot be written. The old one is there then.
    """
    try:
        _write(path, content)
    except Exception as e:  # a bucket's errors are no OSError
        raise Temporary(
            f'{path} cannot be written: {_reason(e)}. Free some space or choose another --workdir; the same '
            'command resumes'
        ) from None


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f'{path.name}.{uuid.uuid4().hex[:8]}{PART}'
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except Exception:
        with contextlib.suppress(Exception):
            part.unlink(missing_ok=True)
        raise


def _reason(e: Exception) -> str:
    return getattr(e, 'strerror', None) or next(iter(str(e).splitlines()), type(e).__name__)


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[str]:
    """Take the workdir for this job: only the job that holds it may write or clean in it. For `require_shared`, what
    tells this job from all others.

    Raises:
      UserError: if it cannot be written. Nothing in it has changed then.
      Temporary: if its disk is full, a bucket does not answer, or another job holds it; nothing in it has changed then.
        Or if another job has taken it, after this one had stood still for too long.
    """
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _Lock(workdir / LOCK)
        lock.take()
        for left in workdir.glob(f'*{PART}'):  # by a job that was killed while it wrote
            left.unlink(missing_ok=True)
    except UserError:
        raise
    except Exception as e:
        passes = not isinstance(e, OSError) or e.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = f'the workdir {workdir} cannot be written: {_reason(e)}'
        if passes:
            raise Temporary(problem) from None
        raise UserError(f'{problem}; choose a folder that can: --workdir=DIR') from None
    try:
        yield lock.token
    except KeyboardInterrupt:
        if lock.lost:
            raise Temporary(lock.lost) from None
        raise
    finally:
        lock.release()


def require_shared(workdir: epath.Path, token: str, wait: float = SHARED) -> None:
    """Raises UserError where the workdir here is not held by the job of `token`, which `hold` gave on host 0."""
    deadline = time.monotonic() + wait
    while (_lock_in(epath.Path(workdir) / LOCK) or {}).get('token') != token:
        if time.monotonic() > deadline:
            raise UserError(
                f'the workdir {workdir} is not the folder that host 0 writes to; on several hosts --workdir must be '
                'one folder that all of them see, in a bucket (gs://...) or on a shared file system'
            )
        time.sleep(0.5)


def require_same(workdir: epath.Path, config: Mapping[str, Any]) -> None:
    """Compare `config` with the one that the run in `workdir` was last started with.

    Raises:
      UserError: listing the fields that differ and matter.
    """
    path = epath.Path(workdir) / 'config.json'
    changed = differences(read_json(path), json.loads(json.dumps(config))) if path.exists() else {}
    if changed:
        raise UserError(
            f'{workdir} holds a run with another config:\n'
            + listed(changed)
            + '\nChoose another --workdir, or resume with the new values: --config.resume_anyway=True'
        )


def require_free(path: epath.Path, evaluated: Mapping[str, Any]) -> None:
    """Raises UserError where `path` has the result of an evaluation of anything else: `{name: value}` of what it says
    with the result."""
    there = read_json(path) if path.exists() else {}
    for name, value in evaluated.items():
        if (other := there.get(name, value)) != value:
            raise UserError(
                f'{path} has the result of another {name}, {other!r}; this one is {value!r}: choose another --workdir, '
                'or move the file away'
            )


def record(workdir: epath.Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write `config.json`, and `environment.json` (see `environment.describe`): of the run that is about to train."""
    workdir = epath.Path(workdir)
    write(workdir / 'config.json', json.dumps(config, indent=2) + '\n')
    write(workdir / 'environment.json', json.dumps(about, indent=2) + '\n')


def read_json(path: epath.Path) -> dict[str, Any]:
    """A file that this module wrote; raises UserError where it is damaged."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError('not a JSON object')
        return found
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e}); restore it, or delete it to use the current values') from None


def completed(saved: Mapping[str, Any]) -> ConfigDict:
    """A saved config as one of now: fields that it is too old to have are the defaults, and those that are not
    `config.kept` are left out."""
    tuples = {n for n, field in FIELDS.items() if isinstance(field.default, tuple)}  # lists in JSON
    there = {n: tuple(v) if n in tuples else v for n, v in flatten(saved).items() if kept(n)}
    return nested({n: f.default for n, f in FIELDS.items()} | there)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """Fields that shape a run and differ between two configs, {dotted name: (old, new)}.

    A field that one of them is too old to have counts as its default.
    """
    defaults = {name: field.default for name, field in FIELDS.items()}
    a, b = ({**defaults, **flatten(c)} for c in (old, new))
    out = {}
    for name in sorted(a.keys() | b.keys()):
        there, now = (list(v) if isinstance(v := c.get(name), tuple) else v for c in (a, b))
        known = field_of(name)
        if there != now and (known is None or known.shapes_run):
            out[name] = there, now
    return out


def listed(changed: Mapping[str, tuple]) -> str:
    """`differences`, a line each."""
    return '\n'.join(f'  {k}: {a!r} there, {b!r} now' for k, (a, b) in changed.items())


def _lock_in(path: epath.Path) -> dict[str, Any] | None:
    """What a lock says; None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _abandoned(path: epath.Path) -> bool:
    """True for a lock that says nothing and is too old to be one that is being written."""
    try:
        return _lock_in(path) is None and time.time() - os.stat(path).st_mtime > STALE
    except FileNotFoundError:
        return False


class _Lock:
    """A file that says who holds the workdir, refreshed by a thread."""

    def __init__(self, path: epath.Path):
        self._path = path
        self.token = uuid.uuid4().hex
        self._mine = {'token': self.token, 'host': socket.gethostname(), 'pid': os.getpid()}
        self.lost = ''  # how another job took the workdir from this one
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name='workdir lock')

    def take(self) -> None:
        other, seen = self._read(), time.monotonic()
        while other and not self._dead(other):
            if time.time() - other['beat'] < STALE and other['host'] == self._mine['host']:
                self._refuse(other)
            if time.monotonic() - seen > STALE:
                break  # no sign of life while we looked
            time.sleep(1.0)
            now = self._read()
            if now and now != other:
                self._refuse(now)
            other = now
        if '://' in str(self._path):
            self._write()
            time.sleep(2.0)  # a remote file system has no exclusive creation: see who wrote last
            now = self._read()
            if now and now['token'] != self.token:
                self._refuse(now)
        else:
            if other or _abandoned(self._path):
                self._remove(other)
            self._create()
        self._thread.start()

    def _create(self) -> None:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if now := self._read():
                self._refuse(now)
            raise Temporary(
                f'{self._path} cannot be read: another job is about to take the workdir, or was killed when it did. '
                f'Try again: after {STALE:g} s it counts as dead'
            ) from None
        try:
            with os.fdopen(file, 'w') as f:
                f.write(self._content())
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def _remove(self, dead: Mapping[str, Any] | None) -> None:
        """Remove the lock of a dead job, None for one that says nothing, unless another has taken the workdir since."""
        aside = self._path.parent / f'{self._path.name}.{self.token}'
        try:
            self._path.rename(aside)  # of several jobs that try, one moves the dead one's
        except FileNotFoundError:
            return
        now = _lock_in(aside)
        if (now and now['token'] == dead['token']) if dead else _abandoned(aside):
            aside.unlink()
            return
        aside.rename(self._path)
        if now:
            self._refuse(now)

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it counts as dead then
            now = self._read()
            if now and now['token'] == self.token:
                self._path.unlink()

    def _refuse(self, other):
        raise Temporary(f'{self._taken(other)}; end that job, or choose another --workdir')

    def _taken(self, other) -> str:
        return f'the workdir {self._path.parent} is in use by process {other["pid"]} on {other["host"]}'

    def _dead(self, other) -> bool:
        """True where it can be told: its process was on this host, and is gone."""
        if other['host'] != self._mine['host']:
            return False
        try:
            os.kill(other['pid'], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return other['pid'] == self._mine['pid'] and other['token'] != self.token

    def _read(self) -> dict[str, Any] | None:
        return _lock_in(self._path)

    def _content(self) -> str:
        return json.dumps(self._mine | {'beat': time.time()})

    def _write(self) -> None:
        _write(self._path, self._content())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                now = self._read()
            except Exception:  # a bucket's errors are no OSError: it may answer at the next beat
                continue
            if now and now['token'] != self.token:  # this process stood still and counted as dead
                self.lost = f'{self._taken(now)}, which took over while this one stood still'
                if callable(signal.getsignal(signal.SIGINT)):
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                print(f'error: {self.lost}', file=sys.stderr, flush=True)
                os._exit(Temporary.exit_code)  # a job in the background, which ignores SIGINT
            with contextlib.suppress(Exception):  # a full disk is reported by what else is written
                self._write()
