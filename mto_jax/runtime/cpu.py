"""malloc settings for XLA on a CPU."""

import ctypes
import platform

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
