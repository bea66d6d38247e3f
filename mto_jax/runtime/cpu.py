"""Settings of malloc and of XLA for training on a CPU."""

import ctypes
import functools
import platform

import jax
import jax.numpy as jnp

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt(3)


def keep_memory() -> bool:
    """Let the C library keep freed memory for this process; True where that worked (glibc only).

    XLA allocates the temporaries of a step afresh each time. By default glibc returns such large blocks to the system
    at once, and the next step pays for every page again (benchmarks/cpu_memory.py measures it).
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28), (_ARENA_MAX, 1))
    taken = [libc.mallopt(option, value) for option, value in options]
    return all(taken)


# YNNPACK multiplies matrices, one seed's at a time, faster than XLA's own code (docs/performance.md).
_OPTIONS = {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
    'xla_cpu_prefer_vector_width': '512',
}


@functools.cache
def compiler_options(device: str) -> dict[str, str]:
    """What `jax.jit` takes as `compiler_options` for a training on such a device ('cpu', 'gpu', 'tpu').

    Empty for other devices than a CPU, and where this version of jax does not know the options.
    """
    if device != 'cpu':
        return {}
    try:
        jax.jit(lambda x: x @ x, compiler_options=_OPTIONS).lower(jnp.ones((2, 2))).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _OPTIONS
