"""The loader of a run's batches: its processes, and their errors in one line each."""

import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from .sampling import Bad, Batch, DataError, Key, Sample, StepSampler, try_again
from .workers import SMALLER, check_shared_memory, end_at_exit, kill, quiet_sigchld, start_worker, started

if TYPE_CHECKING:
    from .stream_sampling import StreamSampler

_DIED = "a loading worker died (out of memory?): "
_CURES = {  # words of an error -> what it means and what to do
    "Too many open files": "too many files are open: raise `ulimit -n`, or use fewer workers",
    "File too large": f"a batch is larger than a file may be: raise `ulimit -f`, or {SMALLER}",
    "shared memory": f"shared memory is full: {SMALLER}, or `docker run --shm-size`",
    "MemoryError": f"no memory is left to load images: {SMALLER}",
    "DefaultCPUAllocator": f"no memory is left to load images: {SMALLER}",
}
_TURN = 1.0  # seconds between two looks at the workers and at the clock
_logger = logging.getLogger(__name__)


class NamedSamples(Protocol):
    """Samples by a sampler's keys, (epoch, index, ...), with the name of each image."""

    def __getitem__(self, key: Any) -> Any: ...
    def name(self, index: int) -> str:
        """Return the path of an image, or another name."""
        ...


class NamedImages(NamedSamples, Protocol):
    """Samples by (epoch, index), with the name of each image, so many of them."""

    def __len__(self) -> int: ...


class Loader:
    """A DataLoader whose errors are one line: bad images, dead workers, stuck files, too little memory.

    Made by `make_loader`. Iterating yields a `Batch` for each step, or the result of `collate`. All errors are raised while the
    run waits for a batch, never within a step: the state of training is then complete and can be saved.

    Attributes:
        bad: Name -> reason of the bad images found so far.
    """

    def __init__(
        self, loader: "DataLoader[Any]", tracked: "_Tracked", *, timeout: float, max_bad: int, bad_file: Path | None
    ) -> None:
        self._loader, self._tracked, self._max_bad, self._bad_file = loader, tracked, max_bad, bad_file
        self._timeout = timeout or math.inf
        self.bad: dict[str, str] = _read_bad(bad_file)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            DataError: Too many bad images, a worker died, memory is full, or no batch came in time.
        """
        others, workers = set(multiprocessing.active_children()), set[BaseProcess]()
        try:
            try:
                batches = self._start()
            finally:
                workers = set(multiprocessing.active_children()) - others
                started.update(workers)
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, Batch):
                    self._report(batch.bad)
                yield batch
        except Exception as error:
            reason = _explain(error)
            if reason is None:
                raise
            at = "" if isinstance(error, DataError) else self._tracked.in_flight()
            kill(workers)
            raise DataError(reason + at) from error

    def _start(self) -> Iterator[Any]:
        self._tracked.share_memory()
        with quiet_sigchld():
            return iter(self._loader)

    def _next(self, batches: Iterator[Any]) -> Any:
        """Wait for the next batch and return it; None after the last."""
        begin = time.monotonic()
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
            if time.monotonic() > begin + self._timeout:
                raise DataError(f"no batch came in time ({self._timeout:g} s){self._tracked.in_flight()}")

    def _report(self, bad: Sequence[Bad]) -> None:
        for name, reason in bad:
            if name in self.bad:
                continue
            self.bad[name] = reason
            _logger.warning("bad image %r: %s; another takes its place", name, reason)
            if self._bad_file is not None:
                _append(self._bad_file, f"{escape(name)}\t{escape(reason)}\n")
        if len(self.bad) > self._max_bad:
            shown = "; ".join(f"{name!r}: {reason}" for name, reason in list(self.bad.items())[-3:])
            where = f", all in {self._bad_file}" if self._bad_file else ""
            raise DataError(f"{len(self.bad)} bad images, more than the {self._max_bad} allowed{where}. Last: {shown}")


def make_loader(
    dataset: NamedSamples,
    sampler: "StepSampler | StreamSampler",
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    timeout: float = 300,
    bad_file: str | os.PathLike[str] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Loader:
    """Load a run's batches.

    Args:
        dataset: The views (`MultiViewDataset`, `StreamedViews`), or other samples with ``collate``.
        sampler: The steps.
        num_workers: Loading processes; 0 loads in this process.
        pin_memory: Pin batches for a CUDA device.
        prefetch_factor: Batches each worker prepares ahead.
        timeout: Seconds to wait for a batch before an error; 0 waits without limit.
        bad_file: File to which bad images are appended, one line "path<tab>reason" for each.
        collate: Samples -> batch; by default a `Batch` of the views.

    Raises:
        DataError: /dev/shm is too small for the workers.
    """
    tracked = _Tracked(dataset, num_workers, collate)
    if num_workers:
        shape = getattr(getattr(dataset, "transform", None), "shape", None)  # (V, C, H, W)
        size = math.prod(shape) * (sampler.batch_size // sampler.world_size) if shape else 0
        check_shared_memory(size * (prefetch_factor * num_workers + 2))  # one that is given and one that is trained on
        end_at_exit()
    loader = DataLoader(
        tracked,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=tracked.collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=start_worker if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        timeout=_TURN if num_workers else 0,
    )
    max_bad = getattr(dataset, "max_bad", 0)
    return Loader(loader, tracked, timeout=timeout, max_bad=max_bad, bad_file=Path(bad_file) if bad_file else None)


def explain_loader_error(error: BaseException) -> str | None:
    """Return one line for an exception that torch's loader raises; None for any other exception."""
    return _explain(error) if isinstance(error, DataError) or "DataLoader" in str(error) else None


def _explain(error: BaseException) -> str | None:
    """Return one line for an error that can occur while waiting for a batch; None for a mistake in the code."""
    text = f"{type(error).__name__}: {error}".strip()
    last = text.splitlines()[-1].strip()  # behind a worker's traceback
    if isinstance(error, DataError):
        return text.rsplit("DataError: ", 1)[-1]
    for words, meaning in _CURES.items():
        if words in last:
            return f"{meaning} ({last})"
    if "DataLoader timed out" in text:
        return f"no batch came in time ({last})"
    died = isinstance(error, (ConnectionError, EOFError)) or str(error).startswith("DataLoader worker (pid")
    return _DIED + last.partition(": ")[2] if died else None


class _Tracked(Dataset[Any]):
    """The data set; in shared memory, the image that each worker is loading."""

    def __init__(self, dataset: NamedSamples, num_workers: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset, self._num_workers, self._collate = dataset, num_workers, collate or _stack
        self._at: Tensor | None = None

    def __getitem__(self, key: Key) -> Any:
        worker = get_worker_info()
        self._note(worker, key[1])
        try:
            return try_again(lambda: self._dataset[key])
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self._dataset.name(key[1])!r} cannot be loaded: {type(error).__name__}: {reason}") from error
        finally:
            self._note(worker, -1)

    def _note(self, worker: Any, index: int) -> None:
        if worker is not None and self._at is not None:
            self._at[worker.id] = index

    def share_memory(self) -> None:
        """Allocate shared memory for a pass over the data; an earlier pass keeps its own."""
        self._at = torch.full((self._num_workers,), -1).share_memory_() if self._num_workers else None

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch, all of it in shared memory; without free shared memory, the worker's queue would lose it silently."""
        batch = self._collate(samples)
        if get_worker_info() is not None:
            _share(batch)
        return batch

    def in_flight(self) -> str:
        at = [] if self._at is None else [int(index) for index in self._at if index >= 0]
        return f"; being loaded: {', '.join(repr(self._dataset.name(index)) for index in at)}" if at else ""


def _stack(samples: Sequence[Sample]) -> Batch:
    indices = torch.tensor([sample.number for sample in samples])
    views = default_collate([sample.views for sample in samples])  # (B, V, C, H, W); a worker stacks in shared memory
    return Batch(views, indices, [bad for sample in samples for bad in sample.bad])


def _share(batch: Any) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            _share(part)


def escape(text: str) -> str:
    """Return a name on one line of ASCII; `unicode_escape` reads it back."""
    return text.encode("unicode_escape", "surrogateescape").decode("ascii")


def _append(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="ascii") as file:
            file.write(line)
    except OSError as error:
        _logger.warning("cannot write %s: %s", path, error)


def _read_bad(path: Path | None) -> dict[str, str]:
    """Read the bad images that an earlier part of the run found."""
    if path is None or not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    return {_unescape(line[0]): _unescape(line[1]) for line in lines if len(line) == 2}


def _unescape(text: str) -> str:
    return text.encode("ascii", "replace").decode("unicode_escape", "replace")
