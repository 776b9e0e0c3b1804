"""How a script ends: with one line and an exit code, after an error or a signal."""

import multiprocessing
import os
import signal
import time

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
"""What ends a run; Windows has the first two alone."""
BEFORE = {number: signal.getsignal(number) for number in SIGNALS}
"""What the signals do until a run catches them."""
PATIENCE = 5.0
"""Seconds in which a repeated signal is the same one, and which a batch may still take after a signal."""
TIMER = hasattr(signal, "setitimer")
"""Whether a wait for a batch can be cut short then; on Windows it cannot."""


UNBEGUN = "stopped before the first step: nothing new to save, run the same command again"
"""What a script says where a signal ends it before it has trained."""


class Stop(Exception):
    """The end of a script that is not a success: one line for the user and an exit code, 128 + N after signal N."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def end_process(code: int) -> None:
    """Exit at once, with no clean-up of threads and process groups, which could wait for others for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for the next line
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


class StopSignal:
    """Catches `SIGNALS`, so that a run can finish its step and save.

    A repeat within `PATIENCE` seconds, or during a save, is the same signal: torchrun passes on what its processes have
    received already. A later one ends the run at once.

    Attributes:
        received: the first signal.
        interruptible: whether a signal may cut short what goes on, such as a wait for images, after `PATIENCE` seconds.
        saving: whether a checkpoint is being written.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.since, self.interruptible, self.saving = 0.0, True, False
        for number in SIGNALS:
            if number.name != "SIGHUP" or BEFORE[number] != signal.SIG_IGN:  # nohup
                signal.signal(number, self._receive)
        if TIMER:
            signal.signal(signal.SIGALRM, self._interrupt)

    def _receive(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if TIMER:
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        elif time.monotonic() > self.since + PATIENCE and not self.saving:
            end_process(128 + number)

    def _interrupt(self, *_: object) -> None:
        if self.received is not None and self.interruptible:
            raise KeyboardInterrupt(self.received)
