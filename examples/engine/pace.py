"""How fast a run goes: images per second, the share of time that steps wait for data, memory, and the time that is left."""

import datetime
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from engine.distributed import Processes

CLOCK = ("time", "images_per_second", "waiting", "memory_gb", "seconds_left")
"""Fields of ``log.jsonl`` that no two runs share: Unix time; images per second; share of time, 0 to 1; 10^9 bytes; seconds."""
WAITING = 0.2
"""Share of the time spent waiting for data from which on a run says what may help."""
ENOUGH = 10
"""Steps from which the time of a run is estimated; the first step of a process, which starts workers, is never measured."""


class Pace:
    """Times the steps of this process, by the clock of the processor alone: it never waits for the device.

    A step lasts from the wait for its batch until it is done; what comes between steps, such as a look at the features, counts
    for the time left alone.

    Args:
        batch: images of a step over all processes; 0 where that is not known.
        last: the last step of the run.
        device: of this process, whose memory is measured: that of CUDA, or this process's own.
        now: the clock.
    """

    def __init__(self, batch: int, last: int, device: torch.device, now: Callable[[], float] = time.monotonic) -> None:
        self.batch, self.last, self.device, self.now = batch, last, device, now
        self.steps, self.busy, self.waited = -1, 0.0, 0.0  # the first step is not measured
        self.since = (0, 0.0, 0.0)  # what was measured at the last line of the log
        self.started = self.arrived = self.begun = now()

    def wait(self) -> None:
        """Begin to wait for a batch."""
        self.started = self.now()

    def arrive(self) -> None:
        """Note that the batch is there."""
        self.arrived = self.now()

    def finish(self) -> None:
        """Note that the step of this batch is done."""
        now = self.now()
        if self.steps < 0:
            self.begun = now
        else:
            self.busy, self.waited = self.busy + now - self.started, self.waited + self.arrived - self.started
        self.steps += 1

    def numbers(self, step: int, since: tuple[int, float, float] | None = None) -> dict[str, float]:
        """Return the numbers of `CLOCK` after a step, as far as they are measured: memory is the peak so far.

        Args:
            step: the last that is done.
            since: what was measured before; where it is None, at the last `restart`.
        """
        steps, busy, waited = (now - then for now, then in zip(self.measured(), since or self.since, strict=True))
        found: dict[str, float] = {}
        if steps > 0 and busy > 0:
            if self.batch:
                found["images_per_second"] = float(f"{steps * self.batch / busy:.4g}")
            found["waiting"] = round(waited / busy, 3)
        if self.steps >= 0 and (peak := peak_memory(self.device)):
            found["memory_gb"] = round(peak / 1e9, 3)
        if self.steps > 0:
            found["seconds_left"] = round((self.last - step) * (self.now() - self.begun) / self.steps, 1)
        return found

    def restart(self) -> None:
        """Count `numbers` from here on."""
        self.since = self.measured()

    def measured(self) -> tuple[int, float, float]:
        """Return how many steps are measured, the seconds that they took, and those of them that they waited for data."""
        return max(self.steps, 0), self.busy, self.waited

    def estimate(self, step: int) -> str:
        """Return a line on the time and memory that the run will take, once, when enough steps are measured; else nothing."""
        if self.steps != ENOUGH or step == self.last:
            return ""
        numbers = self.numbers(step, (0, 0.0, 0.0))
        numbers.pop("seconds_left")
        left, measured = self.last - step, f"measured in steps {step - ENOUGH + 1} to {step}"
        return f"estimate: {duration(left * self.busy / self.steps)} for {left} more steps, {words(numbers)} ({measured})"


def slowest(numbers: dict[str, float], processes: Processes) -> dict[str, float]:
    """Return numbers of `CLOCK` with the longest wait and the most memory of any process."""
    found = processes.gather(numbers)
    most = {name: max(each.get(name, 0.0) for each in found) for name in ("waiting", "memory_gb") if name in numbers}
    return numbers | most


def words(numbers: Mapping[str, Any]) -> str:
    """Return numbers of `CLOCK` as a user reads them; empty without any."""
    ways: dict[str, Callable[[Any], str]] = {
        "images_per_second": lambda value: f"{value:.{0 if value >= 100 else 1}f} images/s",
        "waiting": "{:.0%} waiting for data".format,
        "memory_gb": "{:.2f} GB".format,
        "seconds_left": lambda value: f"{duration(value)} left",
    }
    return ", ".join(way(numbers[name]) for name, way in ways.items() if name in numbers)


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: 0:00:34, or with days where it is longer than one."""
    return str(datetime.timedelta(seconds=round(seconds)))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: of a CUDA device, else of its own memory; 0 where unknown.

    Processes that load images are not counted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, ValueError, IndexError):  # Linux: getrusage would return the parent's peak after a fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 0


def processor_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hint(waiting: float, workers: int, names: Sequence[str]) -> str:
    """Return what may help a run that waits for its data.

    Args:
        waiting: share of the time, 0 to 1.
        workers: loading processes of each training process.
        names: of images of a batch.
    """
    cores = processor_cores()
    more = f"--workers {cores} instead of {workers}" if workers < cores else "smaller image files, or more processor cores"
    jpeg = any(name.lower().endswith((".jpg", ".jpeg")) for name in names)
    if jpeg and importlib.util.find_spec("simplejpeg") is None:
        more = f"pip install simplejpeg (the images are JPEG files), and {more}"
    return f"hint: steps wait for data {waiting:.0%} of the time; this may help: {more}"
