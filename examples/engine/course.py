"""The steps of a run, whatever it trains: what is logged and saved, what ends it, and that only finite numbers count."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.checkpoint import NEWEST, NotFinite, SaveError, machine, save_checkpoint
from engine.config import RunConfig
from engine.distributed import Processes
from engine.ends import Stop, StopSignal
from engine.log import Log, Meter
from engine.snapshot import to_host

Batch = TypeVar("Batch")


class Course:
    """Goes through the steps of a run; as a context, saves the last whole step whatever error ends the run.

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
        config: RunConfig,
        folder: Path,
        log: Log,
        processes: Processes,
        model: nn.Module,
        state: Callable[[], Mapping[str, Any]],
        found: Mapping[str, Any] | None,
        *,
        last: int,
        stop: StopSignal | None = None,
    ) -> None:
        self.folder, self.log, self.processes, self.model, self.state = folder, log, processes, model, state
        self.config, self.last = config, last
        self.start = self.saved = self.tried = found["step"] if found else 0
        self.whole: int | None = self.start  # the step that model and optimizer are at; None while they change
        self.skipped: int = found.get("skipped", 0) if found else 0
        self.failure, self.meter, self.stop = "", Meter(processes), stop or StopSignal()
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[int, Future[None]] | None = None
        self.save_time = time.monotonic()
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = self.copy_statistics()

    def __enter__(self) -> "Course":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Save the last whole step where an error ends the run and that step was not saved or tried yet."""
        self.log.close()
        if error is not None and self.whole not in (None, self.tried):
            self.restore_statistics()
            self.stop.saving = True
            self.save(self.whole)
            self.log.say(self.kept(self.whole))
        self.settle(wait=True)

    def follow(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Give each batch and its step, counted from 1; save after a step where that is due.

        Raises:
            Stop: if a signal has come, when the step is saved; if the last checkpoint could not be written.
        """
        batches, step = iter(batches), self.start
        while (batch := self.wait(batches, step)) is not None:
            step += 1
            yield step, batch
            self.log.advance(step)
            self.settle()
            if step == self.last:
                self.save(step)
            elif step % self.config.save_every == 0 or self.minutes() >= (self.config.save_minutes or math.inf):
                self.save(step, wait=False)
            if "MVMAE_FAULT" in os.environ:  # tests expect that what is due is saved when they cut the run
                self.settle(wait=True)
            inject_fault(step)
        if self.failure:
            raise Stop(f"the end is not saved, only step {self.saved} is ({self.failure}): add --resume after that", 1)

    def wait(self, batches: Iterator[Batch], step: int) -> Batch | None:
        """Give the batch after ``step``, None after the last.

        Raises:
            Stop: in all processes, if a signal has come to one or one cannot load, when the step is saved.
        """
        batch, error = None, None
        self.stop.interruptible = True
        try:
            batch = next(batches, None)
            self.stop.interruptible = False
        except (Exception, KeyboardInterrupt) as caught:
            error, self.stop.interruptible = caught, False
        if step == self.last or not self.processes.any(error is not None or self.stop.received is not None):
            return batch
        self.stop.saving = True  # from here to the end
        self.save_once(step)
        reason = None if error is None else f"{type(error).__name__}: {error}"
        ends = self.processes.gather((self.stop.received, reason))  # the others wait here for the save
        self.log.close()
        for number in (number for number, _ in ends if number is not None):
            where = f"after step {step} of {self.last}; {self.kept(step)}" if step else "before the first step"
            raise Stop(f"stopped {where}", 128 + number) from error
        if step:
            self.log.say(self.kept(step))
        if error is not None:
            raise error
        raise Stop(f"another process of this run has ended: {next(reason for _, reason in ends if reason)}", 1)

    def kept(self, step: int) -> str:
        """Tell what is saved of the run that ends after ``step``."""
        saved = f"step {step} is saved" if self.saved == step else f"only step {self.saved} is saved ({self.failure})"
        return f"{saved}: add --resume to go on"

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
            self.statistics, self.whole = self.copy_statistics(), None
            return True
        self.restore_statistics()
        wrong = [name for name, good in zip(losses, finite, strict=False) if not good]
        found = self.processes.gather((wrong[-1:], list(images())))  # the last is the most particular
        parts = [f"{names[0]} in process {rank}" for rank, (names, _) in enumerate(found) if names] or ["the gradient"]
        problem = f"step {step}: {', '.join(parts)} is not finite"
        listed = [name for names, batch in found for name in (batch if names or parts == ["the gradient"] else [])]
        self.log.append("nonfinite.txt", "\n".join((problem, *(f"  {name!r}" for name in listed))))
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
        """Write these numbers, and the losses' means since the last time, to the log, where that is due: the step is done."""
        self.whole = step
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
        self.save_time, self.tried = time.monotonic(), step
        if self.processes.rank != 0:
            self.saved, self.failure = step, ""
            return
        self.settle(wait=True)
        state = to_host({**self.state(), "step": step, "skipped": self.skipped, "machine": machine(self.processes)})
        self.writing = step, self.writer.submit(save_checkpoint, self.folder, state)
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


def inject_fault(step: int) -> None:
    """Do what ``MVMAE_FAULT`` says, which is how tests cut a run, in its first start under torchrun.

    ``kill@STEP``, ``raise@STEP``, ``exit@STEP``, ``long@STEP``, or ``slow`` for time to send a signal.
    """
    name, _, when = os.environ.get("MVMAE_FAULT", "").partition("@")
    if name == "slow":
        time.sleep(0.3)
    if when != str(step) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if name == "long":
        time.sleep(60)
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raise":
        raise MemoryError("MVMAE_FAULT")
    if name == "exit":
        os._exit(3)
