"""What a run depends on besides its config: the code, the package versions, and the devices."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow', 'tensorflow-cpu')
PACKAGES += ('tensorflow-datasets', 'libtpu')
PACKAGES += ('jax-cuda12-plugin', 'jax-cuda12-pjrt', 'nvidia-cudnn-cu12', 'nvidia-cublas-cu12')
PACKAGES += ('jax-cuda13-plugin', 'jax-cuda13-pjrt', 'nvidia-cudnn-cu13', 'nvidia-cublas')


@cache
def code_hash() -> str:
    """Twelve characters that differ between two states of this package's source."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob('*.py')):
        digest.update(str(path.relative_to(root)).encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str:
    """The commit of the checkout that holds this package, with '+' where tracked files differ from it; '' elsewhere."""
    root = Path(__file__).parents[2]

    def git(*args):
        return subprocess.run(['git', '-C', root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (root / '.git').exists():  # installed below a checkout of something else
            return ''
        return git('rev-parse', '--short=7', 'HEAD') + '+' * bool(git('status', '--porcelain', '--untracked-files=no'))
    except (OSError, subprocess.CalledProcessError):
        return ''


def make_deterministic() -> None:
    """What a GPU computes is the same bit by bit each time. To be called before jax looks for its devices."""
    flags, flag = os.environ.get('XLA_FLAGS', ''), '--xla_gpu_deterministic_ops=true'
    if flag not in flags.split():
        os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that shape a result; those not installed are left out."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Everything on which a bitwise repetition depends: {'code', 'versions', 'devices'}, plain values for JSON."""
    device = mesh.devices.flat[0]
    return {
        'code': code_hash(),
        'versions': versions(),
        'devices': {
            'platform': device.platform,
            'kind': device.device_kind,
            'mesh': ' x '.join(f'{n} {s}' for n, s in mesh.shape.items()),
            'processes': jax.process_count(),
            # XLA splits work on a CPU by its threads, and with it the order of sums.
            'cpu_threads': cpu_threads() if device.platform == 'cpu' else 0,
        },
    }


def cpu_threads() -> int:
    """The processors that this process may use; where the system has no such limit (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
