"""The processes that load batches: signals do not end them, the main process does; and the memory that they share with it."""

import atexit
import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from weakref import WeakSet

import torch

from .sampling import DataError

SMALLER = "use fewer workers, a smaller prefetch_factor or batch"
started: WeakSet[BaseProcess] = WeakSet()


def check_shared_memory(needed: int, *, folder: str = "/dev/shm", free: int | None = None) -> None:  # noqa: S108
    """Refuse to start workers whose batches would not fit into shared memory.

    Args:
        needed: Bytes.
        folder: Where shared memory is mounted; nothing is checked where it does not exist.
        free: Free bytes there; None: the system is asked.

    Raises:
        DataError: It does not fit.
    """
    if free is None:
        if not os.path.isdir(folder):
            return
        free = shutil.disk_usage(folder).free
    if needed > free:
        numbers = f"{folder} has {free >> 20} MB free, batches under way need {(needed >> 20) + 1} MB"
        raise DataError(f"{numbers}: {SMALLER}, or `docker run --shm-size`")


def start_worker(_: int) -> None:
    """Ignore signals, which a terminal or torchrun sends to all processes: the main process ends workers once it has saved."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def end_at_exit() -> None:
    """End the workers in `started` at exit, which would otherwise wait for ever, since workers ignore SIGTERM."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # after multiprocessing's own hook, so that it runs before it


def _end_workers() -> None:
    kill(list(started))


def kill(workers: Iterable[BaseProcess]) -> None:
    """Kill workers, also those that do not respond."""
    with quiet_sigchld():
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join(5)


@contextlib.contextmanager
def quiet_sigchld() -> Iterator[None]:
    """Restore SIGCHLD's handler: torch's raises the death of a worker wherever the main thread is, even within a step."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)
