"""What a script prints and logs: standard output that cannot end a run, ``log.jsonl``, a progress bar, means of losses."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.distributed import Processes
from engine.pace import CLOCK, words
from engine.trackers import Trackers
from mvmae.weights import write_text

MINUTE = 60.0
"""Seconds after which a run without a bar prints a line, once a step is done."""


class Log:
    """Writes ``log.jsonl``, a progress bar on a terminal, and plain lines elsewhere; nothing but on rank 0."""

    def __init__(self, folder: Path, rank: int, total: int, start: int = 0) -> None:
        self.folder, self.silent, self.bar, self.cut = folder, rank != 0, None, set[str]()
        self.total, self.spoke = total, time.monotonic()
        self.trackers: Trackers | None = None
        self.parts: dict[str, str] = {}
        if self.silent:
            return
        kept = [record for record in self.records() if record.get("step", 0) <= start]
        write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        stream = getattr(sys.stderr, "stream", sys.stderr)
        if stream is not None and stream.isatty():
            from tqdm import tqdm

            bar: Any = Output(stream, raw=True)
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}"
            self.bar = tqdm(total=total, initial=start, bar_format=form, dynamic_ncols=True, leave=False, file=bar)

    def records(self) -> list[dict[str, Any]]:
        """Read the lines back, without those that were cut in the middle."""
        path, found = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [record for record in found if isinstance(record, dict) and isinstance(record.get("step", 0), int)]

    def block(self, **parts: str) -> None:
        """Print what a run trains: a line for each part, its name first; none for a part of which there is nothing to say."""
        self.parts = parts
        for name, text in parts.items():
            if text:
                self.say(f"{name:<{max(map(len, parts))}}  {text}")

    def advance(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Move the bar to ``step``, with numbers of `CLOCK`; without a bar, print them a minute after the last line.

        Args:
            step: the last that is done.
            measure: returns the numbers, and is called only where they are shown.
        """
        if self.bar is not None:
            if "waiting" in (numbers := measure()):
                self.bar.set_postfix_str(words(numbers), refresh=False)
            self.bar.update(step - self.bar.n)
        elif not self.silent and time.monotonic() - self.spoke >= MINUTE:
            self.say(f"{self.at(step)}  {words(measure())}".rstrip())

    def at(self, step: Any) -> str:
        """Return a step as it is printed, with the last one where that is known."""
        return f"step {step}/{self.total}" if self.total else f"step {step}"

    def write(self, **record: Any) -> None:
        """Add one line; numbers only, except for names. The file's line also holds the time."""
        self.append("log.jsonl", json.dumps(record | {"time": round(time.time(), 3)}))
        shown = [self.at(record["step"])] if "step" in record else []
        for key, value in record.items():
            if key not in ("step", *CLOCK):
                shown.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        self.say("  ".join([*shown, words(record)]).rstrip())
        if self.trackers:
            self.trackers.numbers(record)

    def append(self, name: str, text: str) -> None:
        """Add lines to a file of the folder. A failure prints a warning; a line that it cut is ended at the next call."""
        if self.silent:
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("\n" * (name in self.cut) + text + "\n")
            self.cut.discard(name)
        except OSError as error:
            self.cut.add(name)
            self.say(f"warning: cannot write {self.folder / name}: {error.strerror}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.silent:
            return
        self.spoke = time.monotonic()
        if self.bar is not None:
            self.bar.clear()
        print(printable(line), flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def end(self, *, failed: bool = False) -> None:
        """Remove the bar and end the trackers: nothing is logged any more."""
        self.close()
        if self.trackers:
            self.trackers.close(failed=failed)


class Output:
    """A stream that cannot end a run: if it is closed or fails, the printed text is lost, and nothing else happens.

    Args:
        stream: standard output or error; None where it is closed.
        raw: let control characters through, for a progress bar. Else they and what the encoding lacks are shown as escapes.
    """

    def __init__(self, stream: Any, *, raw: bool = False) -> None:
        self.stream, self.raw, self.above = stream, raw, ""

    def write(self, text: str) -> int:
        """Print a text."""
        with suppress(OSError, ValueError, AttributeError):
            encoding = self.stream.encoding
            above, self.above = self.above, ""
            shown = text if self.raw else printable(above + text, keep="\n\t")
            self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_outputs() -> None:
    """Print through `Output` from now on; no file that is opened later takes the place of a closed standard stream."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)


def print_above(line: str) -> None:
    """Print a line with the next one that goes to standard output, above it; never if nothing else is printed."""
    if isinstance(sys.stdout, Output):
        sys.stdout.above += f"{line}\n"


def printable(text: str, keep: str = "") -> str:
    """Return a text with control characters, which could change a terminal or forge a line, as escapes, except ``keep``."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


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
        """Return the mean of each number over steps and processes, and start again; nothing if no step was counted."""
        if not self.steps:
            return {}
        names, sums = list(self.sums), torch.stack(list(self.sums.values()))
        values = (self.processes.mean(sums) / self.steps).tolist()
        self.sums, self.steps = {}, 0
        return dict(zip(names, values, strict=True))
