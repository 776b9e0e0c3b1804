"""A training run of anything: its folder, what its checkpoints hold, what is logged, and what ends it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.checkpoint import machine, open_run
from engine.cli import changeable
from engine.config import RunConfig
from engine.distributed import Processes
from engine.ends import UNBEGUN, Stop, StopSignal
from engine.finite import MOST, Late, Noted, Statistics, leaves_out, step_numbers, wrong
from engine.log import Log, Meter
from engine.pace import ENOUGH, WAITING, Pace, hint, slowest
from engine.snapshot import restore
from engine.trackers import Trackers
from engine.writer import Writer

MASKS, DROPOUT = -1, -2
"""Streams of random numbers for the steps of a run, as in ``sample_seed(seed, DROPOUT, step)``; those of images are epochs."""

Batch = TypeVar("Batch")


class Run:
    """A training run, which a script holds and steps through.

        run = Run(config, processes, images.fingerprint)             # its folder is open to this run alone
        run.take_up(last=last, model=model, optimizer=optimizer)     # all that is trained is as in the newest checkpoint
        with run:                                                    # whatever error ends it, the last whole step is saved
            for step, batch in run.batches(loader):                  # a signal ends the run here, when the step is saved
                ...                                                  # forward and backward pass
                if run.finite(step, losses, names):                  # else the step is left out, or the run ends
                    optimizer.step()
                optimizer.zero_grad()
                run.report(step, lr=lr)                              # a line of the log where one is due
                run.checkpoint(step)                                 # a checkpoint where one is due

    Args:
        config: options of the script.
        processes: this one and the others.
        images: tells the data of this run from others.
        folder: the run's; ``config.output_dir`` where it is None.
        stop: catches signals already; where it is None, they are caught from the first step on.
        **settings: what the run depends on besides its options, as plain values.

    Attributes:
        found: the checkpoint that the run goes on from, until the steps begin; None for a new run.
        step: the last step of that checkpoint, or 0.
        log: what the run prints and writes down, from `take_up` on.

    Raises:
        Stop: as `open_run` does.
    """

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        images: Any,
        folder: Path | None = None,
        stop: StopSignal | None = None,
        **settings: Any,
    ) -> None:
        self.config, self.processes, self.folder = config, processes, folder or Path(config.output_dir)
        self.settings, self.signals = {**dataclasses.asdict(config), **settings, "images": images}, stop
        free = changeable(type(config))
        self.found = open_run(self.folder, self.settings, free, resume=config.resume, processes=processes)
        self.step: int = self.found["step"] if self.found else 0
        self.skipped: int = self.found.get("skipped", 0) if self.found else 0

    def take_up(
        self,
        *,
        last: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        about: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Name what a checkpoint holds, give it back what the newest one holds of it, and begin the log.

        Args:
            last: the last step.
            model: what is trained, not wrapped.
            optimizer: of its parameters.
            about: what others need of a checkpoint, as plain values and tensors: it is written, and not read back.
            **more: anything with ``state_dict`` and ``load_state_dict``, or a dictionary of plain values.

        Raises:
            Stop: if the checkpoint lacks something or does not fit; then nothing is changed.
        """
        self.last, self.model, self.about = last, model, dict(about or {})
        self.parts = {"model": model, "optimizer": optimizer, **more}
        self.late = Late(optimizer, self.processes) if leaves_out(optimizer) else None
        if self.found:
            values = {name: part for name, part in more.items() if isinstance(part, dict)}
            modules = {name: part for name, part in self.parts.items() if name != "optimizer" and name not in values}
            restore(self.found, self.folder, modules, optimizer, values)
            for name, part in values.items():
                part.update(self.found[name])
        self.log = Log(self.folder, self.processes.rank, last, self.step)
        if self.config.tracker and self.processes.rank == 0:
            options = dataclasses.asdict(self.config)
            self.log.trackers = Trackers(self.config.tracker, self.folder, options, self.step, self.log.say)

    def announce(self, **parts: str) -> None:
        """Print what is trained, a line for each part, and when its time and memory will be known."""
        known = self.step + 1 + ENOUGH
        later = f"an estimate of time and memory follows after step {known}" if known < self.last else ""
        self.log.block(**parts)
        if later:
            self.log.say(later)

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds besides its step."""
        parts = {name: part if isinstance(part, dict) else part.state_dict() for name, part in self.parts.items()}
        parts |= {"settings": self.settings, "skipped": self.skipped, "machine": machine(self.processes)}
        return {**self.about, **parts}

    def __enter__(self) -> "Run":
        """Begin the steps."""
        self.found = None  # its memory is free from here on
        self.stop, self.meter = self.signals or StopSignal(), Meter(self.processes)
        self.pace = Pace(getattr(self.config, "batch_size", 0), self.last, self.processes.device)
        self.names: Callable[[], Sequence[str]] = list
        self.hinted = False
        self.writer = Writer(self.folder, self.state, self.log, self.processes, self.stop, self.step)
        self.whole: int | None = self.step  # the step that model and optimizer are at; None while they change
        self.statistics = Statistics(self.model)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Save the last whole step where an error ends the run and that step was not saved or tried yet.

        Raises:
            Stop: if the end could not be saved.
        """
        self.log.close()
        if error is not None and self.whole not in (None, self.writer.tried):
            self.statistics.take_back()
            self.stop.saving = True
            if problem := self.count(alone=True):
                self.log.say(f"warning: {problem}; left out")
            self.writer.save(self.whole)
            self.log.say(f"{self.writer.kept(self.whole)}: {self.again()}")
        self.writer.settle(wait=True)
        if error is not None:
            self.log.end(failed=True)
        if error is None and (failure := self.writer.failure):
            raise Stop(f"the end is not saved, only step {self.writer.saved} is ({failure}): mend that, then {self.again()}", 1)

    def again(self) -> str:
        """Return how a user continues the run."""
        return f"run the same command {'again' if self.config.resume else 'with --resume'} to continue"

    def batches(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Yield each batch with its step, counted from 1.

        Raises:
            Stop: in all processes, if a signal has come to one or one cannot load, when the step before is saved.
        """
        batches, step = iter(loader), self.step
        while (batch := self.wait(batches, step)) is not None:
            step += 1
            yield step, batch

    def wait(self, batches: Iterator[Batch], step: int) -> Batch | None:
        """Return the batch after ``step``, None after the last; end the run as `batches` says."""
        batch, error = None, None
        self.stop.interruptible = True
        self.pace.wait()
        try:
            batch = next(batches, None)
            self.stop.interruptible = False
        except (Exception, KeyboardInterrupt) as caught:
            error, self.stop.interruptible = caught, False
        self.pace.arrive()
        if step == self.last or not self.processes.any(error is not None or self.stop.received is not None):
            return batch
        self.stop.saving = True  # from here to the end
        self.look_back()
        self.writer.save_once(step)
        reason = None if error is None else f"{type(error).__name__}: {error}"
        ends = self.processes.gather((self.stop.received, reason))  # the others wait here for the save
        self.log.close()
        for number in (number for number, _ in ends if number is not None):
            told = f"stopped after step {step} of {self.last}; {self.writer.kept(step)}: {self.again()}" if step else UNBEGUN
            raise Stop(told, 128 + number) from error
        if step:
            self.log.say(f"{self.writer.kept(step)}: {self.again()}")
        if error is not None:
            raise error
        raise Stop(f"another process of this run has ended: {next(reason for _, reason in ends if reason)}", 1)

    def finite(self, step: int, losses: Mapping[str, Tensor], images: Callable[[], Sequence[str]]) -> bool:
        """Tell whether losses and gradients are finite in all processes, so that the optimizer may take this step.

        Where they are, the losses are counted for the log. Where not, ``nonfinite.txt`` names the batch's images. Where the
        optimizer can leave out a step on the device, the answer is always yes, and `look_back` tells later what was left out.

        Args:
            step: counted from 1.
            losses: scalars of this process, after the backward pass.
            images: names this process's part of the batch.

        Raises:
            Stop: if they were not more than ``config.skip_nonfinite`` times, once the state before the step is saved.
        """
        self.names = images
        noted = Noted(step, tuple(losses), images, step_numbers(self.model, losses))
        if self.late:
            self.statistics.take_back(where=self.late.note(noted))
        elif self.processes.any(not all(good := noted.numbers.isfinite().tolist())):  # the one wait for the device in a step
            self.statistics.take_back()
            if problem := self.leave_out(noted, good):
                self.skipped -= 1
                self.end(problem, step - 1)
            return False
        else:
            self.meter.add(losses)
        self.statistics.keep()
        self.whole = None
        return True

    def look_back(self) -> None:
        """Look at the numbers of the steps since the last look, where that is late; end the run if too many were left out."""
        if problem := self.count():
            self.end(problem, self.whole or 0)

    def count(self, *, alone: bool = False) -> str:
        """Count the steps since the last look; return what is wrong with the first of those left out that is one too many."""
        problems = []
        for noted, good, left_out in self.late.look() if self.late else ():
            if left_out:
                problems.append(self.leave_out(noted, good, alone=alone))
            else:
                self.meter.add(dict(zip(noted.losses, noted.numbers, strict=False)))
        return next(filter(None, problems), "")

    def leave_out(self, noted: Noted, good: list[bool], *, alone: bool = False) -> str:
        """Count a step that is left out, and name its images; return what is wrong with it, if it is one too many."""
        problem, names = wrong(noted, good, self.processes, alone=alone)
        self.log.append("nonfinite.txt", "\n".join((problem, *(f"  {name!r}" for name in names))))
        self.skipped += 1
        if self.skipped > self.config.skip_nonfinite:
            return problem
        self.log.say(f"warning: {problem}; left out, {self.skipped} of at most {self.config.skip_nonfinite}")
        return ""

    def end(self, problem: str, step: int) -> None:
        """Save the state after ``step`` and end the run."""
        self.writer.save(step)
        self.log.close()
        where = f"{self.folder / 'nonfinite.txt'} names the images"
        raise Stop(f"{problem}: {where}, step {self.writer.saved} is saved; --skip-nonfinite N leaves out such batches", 1)

    def report(self, step: int, **numbers: float) -> None:
        """Write these numbers, and the losses' means since the last time, to the log, where that is due: the step is done."""
        self.whole = step
        due = step % self.config.log_every == 0 or step == self.last
        if self.late and (due or self.pace.steps in (-1, ENOUGH - 1) or len(self.late.noted) >= MOST):
            self.look_back()  # before the clock is read
        self.pace.finish()
        if estimate := self.pace.estimate(step):
            self.log.say(estimate)
        if due:
            skipped = {"skipped": self.skipped} if self.skipped else {}
            pace = slowest(self.pace.numbers(step), self.processes)
            self.pace.restart()
            self.log.write(step=step, **numbers, **self.meter.means(), **skipped, **pace)
            if pace.get("waiting", 0.0) > WAITING and self.pace.steps >= ENOUGH and not self.hinted:
                self.hinted = True
                self.log.say(hint(pace["waiting"], self.config.workers, self.names()))

    def checkpoint(self, step: int) -> None:
        """Save the run after a whole step where that is due, by steps or by time: beside the next steps, the end at once.

        Raises:
            Stop: if the state of an earlier step holds NaN or infinity.
        """
        self.log.advance(step, partial(self.pace.numbers, step))
        self.writer.settle()
        if due := step % self.config.save_every == 0 or step == self.last:
            self.look_back()
        unseen = self.late and self.late.noted  # the processes look at the same steps, and each has a clock of its own
        if due or (not unseen and self.writer.minutes() >= (self.config.save_minutes or math.inf)):
            self.writer.save(step, wait=step == self.last)
