"""What a run prints and writes down: ``log.jsonl``, a bar on a terminal, lines elsewhere, trackers; nothing but on rank 0."""

import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from engine.distributed import Ranks
from engine.trackers import Trackers
from mvmae.weights import write_text

Batch = TypeVar("Batch")
CLOCK: dict[str, Callable[[float], str]] = {
    "time": lambda _: "",
    "images_per_second": lambda value: f"{value:.0f} images/s" if value >= 100 else f"{value:.1f} images/s",
    "waiting": "{:.0%} waiting for data".format,
    "memory_gb": "{:.2f} GB".format,
    "seconds_left": lambda value: f"{datetime.timedelta(seconds=round(value))} left",
}
"""Fields of ``log.jsonl`` that no two runs share, as they are printed: Unix time, throughput, share of time waiting, memory."""


class Log:
    """The log of a run.

    Args:
        folder: of the run.
        ranks: of which the first one writes.
        last: the last step of the run; 0 where it has no steps.
        start: the step that the run continues after: lines of later steps, from before it ended, are removed.
        batch_size: images of a step over all ranks, for the throughput.
    """

    def __init__(self, folder: Path, ranks: Ranks, last: int = 0, start: int = 0, batch_size: int = 0) -> None:
        self.folder, self.ranks, self.last, self.batch_size = folder, ranks, last, batch_size
        self.silent, self.trackers = ranks.rank != 0, Trackers()
        self.sums: dict[str, Tensor] = {}
        self.steps, self.first, self.waited, self.left = 0, 0, 0.0, last - start
        self.since: float | None = None  # of the first line's steps the first is left out: it starts workers and compiles
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}<{remaining}"
        hidden = True if self.silent else None  # None: where there is no terminal
        self.bar = tqdm(total=last, initial=start, bar_format=form, dynamic_ncols=True, leave=False, disable=hidden)
        if self.silent:
            return
        lines = [json.dumps(record) + "\n" for record in self.records() if record.get("step", 0) <= start]
        write_text(folder / "log.jsonl", "".join(lines))

    def records(self) -> list[dict[str, Any]]:
        """Read the lines back, without those that a killed process cut."""
        path, records = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return [record for record in records if isinstance(record, dict) and isinstance(record.get("step", 0), int)]

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure how long the run waits for each."""
        start = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - start
            yield batch
            start = time.monotonic()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count a step and its losses, scalars on the device: `write` logs their means."""
        if not self.steps:
            self.sums = {}
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.steps, self.left = self.steps + 1, self.left - 1
        if self.since is None:
            self.since, self.waited, self.first = time.monotonic(), 0.0, 1
        self.bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens here, such as an evaluation, out of the throughput."""
        start = time.monotonic()
        yield
        if self.since is not None:
            self.since += time.monotonic() - start

    def write_step(self, step: int, **numbers: float) -> None:
        """Log the means, over steps and ranks, of what was added since the last line; all ranks must call it."""
        if self.steps:
            means = self.ranks.mean(torch.stack(list(self.sums.values()))) / self.steps
            numbers |= dict(zip(self.sums, means.tolist(), strict=True))
        steps, seconds = self.steps - self.first, time.monotonic() - (self.since or 0.0)
        if steps > 0 and seconds > 0:
            if self.batch_size:
                numbers["images_per_second"] = float(f"{steps * self.batch_size / seconds:.4g}")
            numbers["waiting"] = round(min(self.waited / seconds, 1.0), 3)
            numbers["seconds_left"] = round(self.left * seconds / steps, 1)
        if peak := peak_memory(self.ranks.device):
            numbers["memory_gb"] = round(peak / 1e9, 3)
        self.write(step=step, **numbers)
        self.steps, self.waited, self.since, self.first = 0, 0.0, time.monotonic(), 0

    def write(self, **record: Any) -> None:
        """Add a line to ``log.jsonl``, print it, and pass it to the trackers."""
        self.append("log.jsonl", json.dumps(record | {"time": round(time.time(), 3)}))
        shown = [f"step {record['step']}/{self.last}" if self.last else f"step {record['step']}"] if "step" in record else []
        for key, value in record.items():
            if key not in ("step", *CLOCK):
                shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        self.say("  ".join([*shown, ", ".join(words(record[key]) for key, words in CLOCK.items() if key in record)]).rstrip())
        if not self.silent:
            self.trackers.log(record)

    def append(self, name: str, text: str) -> None:
        """Add lines to a file of the folder; a failure prints a warning."""
        if self.silent:
            return
        try:
            with (self.folder / name).open("a+b") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":  # a full disk has cut the last line
                    file.write(b"\n")
                file.write(f"{text}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self.say(f"warning: cannot write {self.folder / name}: {error.strerror}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.silent:
            return
        self.bar.clear()
        print(line, flush=True)
        self.bar.refresh()

    def close(self, *, failed: bool = False) -> None:
        """Remove the bar and end the trackers."""
        self.bar.close()
        self.trackers.close(failed=failed)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: of a CUDA device, else of its own memory; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, StopIteration, ValueError):  # Linux: getrusage would return the parent's peak after a fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    return 0


class Output:
    """A stream that cannot end a run: where it is closed or full, the text is lost."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_outputs() -> None:
    """Print through `Output` from now on, with escapes for what the stream cannot encode.

    No file that is opened later takes the place of a closed standard stream.
    """
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name) or io.TextIOWrapper(io.BytesIO())
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream))
