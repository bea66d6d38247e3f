"""Handling SIGTERM, which clouds and schedulers send some seconds before they take a machine."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # after a clean stop that is to be resumed


class Preempted(SystemExit):
    """Raised after everything was saved: the process ends with `EXIT_CODE`, and the same command resumes."""

    def __init__(self):
        super().__init__(EXIT_CODE)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Within it, SIGTERM does not kill; yields `due(step)`, to be asked after every step by every process.

    With several processes, jax's coordination service tells all of them of a SIGTERM at any one, and has `due` be True
    at the same step for all.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
