"""The steps of a run, whatever it trains: what is logged and saved, what ends it, and that only finite numbers count."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from checkpoint import NotFinite, SaveError, machine, save_checkpoint
from common import Log, Processes, Stop
from snapshot import to_host
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = TypeVar("Batch")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Settings(Protocol):
    """What the options of every script that trains have."""

    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def save_minutes(self) -> float: ...
    @property
    def skip_nonfinite(self) -> int: ...


class Course:
    """Goes through the steps of a run.

    Args:
        config: options of the script.
        folder: the run's, opened by `checkpoint.open_run`.
        log: of the run.
        processes: this one and the others.
        model: what is trained, not wrapped.
        state: gives what a checkpoint has to hold besides the step.
        found: the checkpoint that the run goes on from, if there is one.
        last: the last step.
        stop: catches signals already.
    """

    def __init__(
        self,
        config: Settings,
        folder: Path,
        log: Log,
        processes: Processes,
        model: nn.Module,
        state: Callable[[], Mapping[str, Any]],
        found: Mapping[str, Any] | None,
        *,
        last: int,
        stop: "StopSignal | None" = None,
    ) -> None:
        self.folder, self.log, self.processes, self.model, self.state = folder, log, processes, model, state
        self.config, self.last = config, last
        self.start = self.saved = found["step"] if found else 0
        self.skipped: int = found.get("skipped", 0) if found else 0
        self.failure, self.meter, self.stop = "", Meter(processes), stop or StopSignal()
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[int, Future[None]] | None = None
        self.save_time = time.monotonic()
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = self.copy_statistics()

    def follow(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Give each batch and its step, counted from 1; save after a step where that is due.

        Raises:
            Stop: if a signal has come, when the step is saved; if the last checkpoint could not be written.
        """
        for step, batch in enumerate(batches, start=self.start + 1):
            yield step, batch
            self.log.advance(step)
            stopped = self.processes.any(self.stop.received is not None) and step < self.last
            self.settle()
            if step == self.last or stopped:
                self.save(step)
            elif step % self.config.save_every == 0 or self.minutes() >= (self.config.save_minutes or math.inf):
                self.save(step, wait=False)
            if "MVMAE_FAULT" in os.environ:  # tests expect that what is due is saved when they cut the run
                self.settle(wait=True)
            inject_fault(step)
            if stopped:
                self.log.close()
                kept = "which is saved" if self.saved == step else f"only step {self.saved} is saved ({self.failure})"
                raise Stop(f"stopped after step {step} of {self.last}, {kept}: add --resume to go on", self.stop.exit_code)
        if self.failure:
            raise Stop(f"the end is not saved, only step {self.saved} is ({self.failure}): add --resume after that", 1)

    def accepts(self, step: int, losses: Mapping[str, Tensor], images: Callable[[], Sequence[str]]) -> bool:
        """Tell whether the optimizer may take this step: losses and gradients are finite in all processes.

        Where it may, the losses are counted for the log. Where not, ``nonfinite.txt`` names the batch's images.

        Args:
            step: counted from 1.
            losses: scalars of this process, after the backward pass.
            images: names this process's part of the batch.

        Raises:
            Stop: if that has happened more than ``config.skip_nonfinite`` times, once the state before the step is saved.
        """
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        numbers = torch.stack([loss.detach().float() for loss in losses.values()] + [nn.utils.get_total_norm(gradients)])
        finite = numbers.isfinite().tolist()  # the one wait for the device in a step
        if not self.processes.any(not all(finite)):
            self.meter.add(losses)
            self.statistics = self.copy_statistics()
            return True
        self.restore_statistics()
        wrong = [name for name, good in zip(losses, finite, strict=False) if not good]
        found = self.processes.gather((wrong[-1:], list(images())))  # the last is the most particular
        parts = [f"{names[0]} in process {rank}" for rank, (names, _) in enumerate(found) if names] or ["the gradient"]
        problem = f"step {step}: {', '.join(parts)} is not finite"
        listed = [name for names, batch in found for name in (batch if names or parts == ["the gradient"] else [])]
        if self.processes.rank == 0:
            with (self.folder / "nonfinite.txt").open("a") as file:
                file.write("".join(f"{line}\n" for line in (problem, *(f"  {name!r}" for name in listed))))
        self.skipped += 1
        if self.skipped <= self.config.skip_nonfinite:
            self.log.say(f"warning: {problem}; left out, {self.skipped} of at most {self.config.skip_nonfinite}")
            return False
        self.skipped -= 1
        self.save(step - 1)
        self.log.close()
        where = f"{self.folder / 'nonfinite.txt'} names the images"
        raise Stop(f"{problem}: {where}, step {self.saved} is saved; --skip-nonfinite N leaves out such batches", 1)

    def report(self, step: int, **numbers: float) -> None:
        """Write these numbers, and the losses' means since the last time, to the log, where that is due."""
        if step % self.config.log_every == 0 or step == self.last:
            skipped = {"skipped": self.skipped} if self.skipped else {}
            self.log.write(step=step, **numbers, **self.meter.means(), **skipped)

    def save(self, step: int, *, wait: bool = True) -> None:
        """Write a checkpoint of the state as it is now; where that fails, say so and go on.

        Args:
            step: the last that the state holds.
            wait: until it is written; else it is written beside the next steps, and `settle` tells how that has ended.

        Raises:
            Stop: if the state holds NaN or infinity.
        """
        self.save_time = time.monotonic()
        if self.processes.rank != 0:
            self.saved, self.failure = step, ""
            return
        self.settle(wait=True)
        state = to_host({**self.state(), "step": step, "skipped": self.skipped, "machine": machine(self.processes)})
        self.writing = step, self.writer.submit(save_checkpoint, self.folder, state)
        self.settle(wait=wait)

    def settle(self, *, wait: bool = False) -> None:
        """Take note of how the write under way has ended, if there is one and it has, or once it has.

        Raises:
            Stop: if the state holds NaN or infinity.
        """
        if self.writing is None or not (wait or self.writing[1].done()):
            return
        (step, written), self.writing = self.writing, None
        try:
            written.result()
        except NotFinite as error:
            kept = f"step {self.saved} is saved" if self.saved else "nothing is saved"
            raise Stop(f"{error}: {kept}; start again with a lower learning rate or --clip-grad", 1) from error
        except SaveError as error:
            self.failure = str(error)
            self.log.say(f"warning: step {step} is not saved: {error}; the newest checkpoint is of step {self.saved}")
        else:
            self.saved, self.failure = step, ""

    def minutes(self) -> float:
        """Give the minutes since the last checkpoint was begun."""
        return (time.monotonic() - self.save_time) / 60

    def copy_statistics(self) -> list[list[Tensor]]:
        """Copy what a forward pass changes: the running statistics of batch normalisation."""
        return [[buffer.clone() for buffer in norm.buffers()] for norm in self.norms]

    def restore_statistics(self) -> None:
        """Take back what the forward pass of a batch has changed that does not count."""
        for norm, kept in zip(self.norms, self.statistics, strict=True):
            for buffer, old in zip(norm.buffers(), kept, strict=True):
                buffer.copy_(old)


class StopSignal:
    """Catches SIGINT, SIGTERM and SIGUSR1, so that a run can finish its step and save; a second signal ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: object) -> None:
        if self.received is not None:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        self.received = number

    @property
    def exit_code(self) -> int:
        """The exit code of a program that this signal ended; that of SIGTERM where another process received it."""
        return 128 + (self.received or signal.SIGTERM)


class Meter:
    """Means of named numbers over the steps since the last line of the log, kept on the device until then."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.steps = processes, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's numbers, scalars on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if self.steps else value.detach().clone()
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Give the mean of each over steps and processes, and start again; nothing where no step was counted."""
        if not self.steps:
            return {}
        names, sums = list(self.sums), torch.stack(list(self.sums.values()))
        values = (self.processes.mean(sums) / self.steps).tolist()
        self.sums, self.steps = {}, 0
        return dict(zip(names, values, strict=True))


def inject_fault(step: int) -> None:
    """Do what ``MVMAE_FAULT`` says, which is how tests cut a run, in its first start under torchrun.

    ``kill@STEP``, ``raise@STEP``, ``exit@STEP``, or ``slow`` for time to send a signal.
    """
    name, _, when = os.environ.get("MVMAE_FAULT", "").partition("@")
    if name == "slow":
        time.sleep(0.3)
    if when != str(step) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raise":
        raise MemoryError("MVMAE_FAULT")
    if name == "exit":
        os._exit(3)
