"""The checkpoints of a run, written beside its steps in a thread of their own."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.checkpoint import NEWEST, NotFinite, SaveError, save_checkpoint
from engine.distributed import Processes
from engine.ends import Stop, StopSignal
from engine.log import Log
from engine.snapshot import to_host


class Writer:
    """Writes one checkpoint after another, the first process alone; where that fails, says so and goes on.

    Args:
        folder: the run's, opened by `checkpoint.open_run`.
        state: returns what a checkpoint holds besides its step.
        log: of the run.
        processes: this one and the others.
        stop: is told while the run waits for a write.
        step: that of the newest checkpoint, or 0.

    Attributes:
        saved: step of the newest checkpoint that is written.
        tried: step of the last one that was begun.
        failure: why that one could not be written; empty where it could.
    """

    def __init__(
        self,
        folder: Path,
        state: Callable[[], Mapping[str, Any]],
        log: Log,
        processes: Processes,
        stop: StopSignal,
        step: int,
    ) -> None:
        self.folder, self.state, self.log, self.processes, self.stop = folder, state, log, processes, stop
        self.saved = self.tried = step
        self.failure, self.time = "", time.monotonic()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[int, Future[None]] | None = None

    def save(self, step: int, *, wait: bool = True) -> None:
        """Write a checkpoint of the state as it is now; where that fails, say so and go on.

        Args:
            step: the last that the state holds.
            wait: until it is written; else it is written beside the next steps, and `settle` tells how that has ended.

        Raises:
            Stop: if the state holds NaN or infinity.
        """
        self.time, self.tried = time.monotonic(), step
        if self.processes.rank != 0:
            self.saved, self.failure = step, ""
            return
        self.settle(wait=True)
        state = to_host({**self.state(), "step": step})
        self.writing = step, self.thread.submit(save_checkpoint, self.folder, state)
        self.settle(wait=wait)

    def save_once(self, step: int) -> None:
        """Write a checkpoint and wait for it, unless that was tried after this step and what was written is still there."""
        self.settle(wait=True)
        gone = self.processes.rank == 0 and self.saved == step > 0 and not (self.folder / NEWEST).exists()
        if step != self.tried or gone:
            self.save(step)

    def settle(self, *, wait: bool = False) -> None:
        """Take note of how the write under way has ended, if there is one and it has, or once it has.

        Raises:
            Stop: if the state holds NaN or infinity.
        """
        if self.writing is None or not (wait or self.writing[1].done()):
            return
        step, written = self.writing
        saving, self.stop.saving = self.stop.saving, True
        try:
            written.result()
            self.saved, self.failure = step, ""
        except NotFinite as error:
            self.log.close()
            raise Stop(f"{error}: step {self.saved} is saved; a lower learning rate may help, in a new run", 1) from error
        except SaveError as error:
            self.failure = str(error)
            self.log.say(f"warning: step {step} is not saved: {error}; the newest checkpoint is of step {self.saved}")
        finally:
            self.writing, self.stop.saving = None, saving

    def minutes(self) -> float:
        """Return the minutes since the last checkpoint was begun."""
        return (time.monotonic() - self.time) / 60

    def kept(self, step: int) -> str:
        """Return what is saved of a run that ends after ``step``."""
        return f"step {step} is saved" if self.saved == step else f"only step {self.saved} is saved ({self.failure})"
