"""How a run ends early: signals are caught, so that it finishes its step and saves; `Stop` holds the line and the exit code."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

Batch = TypeVar("Batch")
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
PATIENCE = 5.0
"""Seconds in which a repeated signal is the same one, and which a batch may still take after a signal."""
NOTHING_SAVED = "stopped before the first step: nothing new to save, run the same command again"


class Stop(Exception):
    """The end of a script that is not a success: one line for the user and an exit code, 128 + N after signal N."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Signals:
    """Catches `SIGNALS` from now on: the run asks for ``received`` between two steps.

    torchrun sends a signal that its processes have received already once more, so a repeat within `PATIENCE` seconds, or
    during a save, is the same signal. A later one ends the process at once.

    Attributes:
        received: the number of the first signal; None before.
        latest: the same of any run of this process, for a script of several runs.
    """

    latest: ClassVar[int | None] = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._since, self._waiting, self._saving = 0.0, False, False
        self._before: dict[signal.Signals, Any] = {}
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self._before[number] = signal.signal(number, self._receive)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, self._interrupt)

    def _receive(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            Signals.latest = number
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        elif time.monotonic() > self._since + PATIENCE and not self._saving:
            end_process(128 + number)

    def _interrupt(self, *_: object) -> None:
        if self._waiting:  # for a batch that does not come
            raise KeyboardInterrupt(self.received)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; a signal ends the wait for one that takes longer than `PATIENCE`, by a `KeyboardInterrupt`."""
        self._waiting = True
        try:
            for batch in loader:
                self._waiting = False
                yield batch
                self._waiting = True
        finally:
            self._waiting = False

    def release(self) -> None:
        """Let signals end the process at once, as before: the run is saved, and what follows it saves nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end work that saves nothing, such as computing features, by a `KeyboardInterrupt` after `PATIENCE`."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        if self.received is not None:
            raise KeyboardInterrupt(self.received)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Let a save end, whatever signals come."""
        before, self._saving = self._saving, True
        try:
            yield
        finally:
            self._saving = before


def end_process(code: int) -> None:
    """Exit at once, without the clean-up of threads and process groups, which could wait for others for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for the workers killed here
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
