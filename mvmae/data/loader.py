"""The loader of a run's batches: its processes, and their errors in one line each."""

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from .sampling import Bad, Batch, DataError, Key, Sample, StepSampler, try_again
from .shared_memory import Filled, Slots

_DIED = "a loading worker died (out of memory?): "
_SMALLER = "use fewer workers, a smaller prefetch_factor or batch"
_CURES = {  # words of an error -> what it means and what to do
    "Too many open files": "too many files are open: raise `ulimit -n`, or use fewer workers",
    "File too large": f"a batch is larger than a file may be: raise `ulimit -f`, or {_SMALLER}",
    "shared memory": f"shared memory is full: {_SMALLER}, or `docker run --shm-size`",
    "MemoryError": f"no memory is left to load images: {_SMALLER}",
    "DefaultCPUAllocator": f"no memory is left to load images: {_SMALLER}",
}
_TURN = 1.0  # seconds between two looks at the workers and at the clock
_workers: WeakSet[BaseProcess] = WeakSet()
_logger = logging.getLogger(__name__)


class NamedImages(Protocol):
    """Samples by (epoch, index), with the name of each image."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Key) -> Any: ...
    def name(self, index: int) -> str:
        """Return the path of an image, or another name."""
        ...


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
                _workers.update(workers)
            while (batch := self._next(batches)) is not None:
                yield self._receive(batch)
        except Exception as error:
            reason = _explain(error)
            if reason is None:
                raise
            at = "" if isinstance(error, DataError) else self._tracked.in_flight()
            _kill(workers)
            raise DataError(reason + at) from error

    def _start(self) -> Iterator[Any]:
        self._tracked.share_memory()
        with _quiet_sigchld():
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

    def _receive(self, batch: Any) -> Any:
        if not isinstance(batch, Batch):
            return batch
        self._report(batch.bad)
        views: Tensor | Filled = batch.views
        return batch._replace(views=views.tensor()) if isinstance(views, Filled) else batch

    def _report(self, bad: Sequence[Bad]) -> None:
        for name, reason in bad:
            if name in self.bad:
                continue
            self.bad[name] = reason
            _logger.warning("bad image %r: %s; another takes its place", name, reason)
            if self._bad_file is not None:
                _append(self._bad_file, f"{_escape(name)}\t{_escape(reason)}\n")
        if len(self.bad) > self._max_bad:
            shown = "; ".join(f"{name!r}: {reason}" for name, reason in list(self.bad.items())[-3:])
            where = f", all in {self._bad_file}" if self._bad_file else ""
            raise DataError(f"{len(self.bad)} bad images, more than the {self._max_bad} allowed{where}. Last: {shown}")


def make_loader(
    dataset: NamedImages,
    sampler: StepSampler,
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
        dataset: The views (`MultiViewDataset`), or other samples with ``collate``.
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
    ahead = prefetch_factor * num_workers
    tracked = _Tracked(dataset, sampler, num_workers, collate)
    if num_workers:
        shape = getattr(getattr(dataset, "transform", None), "shape", None)  # (V, C, H, W)
        size = math.prod(shape) * (sampler.batch_size // sampler.world_size) if shape else 0
        tracked.slots = ahead + 2, size  # one that is given and one that is trained on
        check_shared_memory(size * (ahead + 2))
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # after multiprocessing's own hook, so that it runs before it
    loader = DataLoader(
        tracked,
        batch_sampler=tracked.sampler,
        num_workers=num_workers,
        collate_fn=tracked.collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        timeout=_TURN if num_workers else 0,
    )
    max_bad = getattr(dataset, "max_bad", 0)
    return Loader(loader, tracked, timeout=timeout, max_bad=max_bad, bad_file=Path(bad_file) if bad_file else None)


def check_shared_memory(needed: int, *, folder: str = "/dev/shm", free: int | None = None) -> None:  # noqa: S108
    """Refuse to start workers whose batches would not fit into shared memory.

    Args:
        needed: Bytes.
        folder: Where shared memory is mounted; nothing is checked where it does not exist.
        free: Free bytes there; None: the system is asked.

    Raises:
        DataError: It does not fit.
    """
    if free is None:
        if not os.path.isdir(folder):
            return
        free = shutil.disk_usage(folder).free
    if needed > free:
        numbers = f"{folder} has {free >> 20} MB free, batches under way need {(needed >> 20) + 1} MB"
        raise DataError(f"{numbers}: {_SMALLER}, or `docker run --shm-size`")


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


class _WithSlots(Sampler[list[Any]]):
    """A sampler that adds the number of a free slot of shared memory to each batch's keys."""

    def __init__(self, sampler: StepSampler, take: Callable[[], int]) -> None:
        self._sampler, self._take = sampler, take

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        for keys in self._sampler:
            yield [*keys, self._take()]


class _Tracked(Dataset[Any]):
    """The data set; in shared memory, the image that each worker is loading, and slots for batches."""

    def __init__(
        self,
        dataset: NamedImages,
        sampler: StepSampler,
        num_workers: int,
        collate: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._dataset, self._num_workers, self._collate = dataset, num_workers, collate
        self._at: Tensor | None = None
        self._slots: Slots | None = None
        self.slots = 0, 0  # number, bytes
        self.sampler = _WithSlots(sampler, self._take) if num_workers else sampler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # for workers

    def __getitem__(self, key: Key | int) -> Any:
        if isinstance(key, int):
            return key  # a slot's number
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
        """Allocate shared memory for a pass over the data; batches of an earlier pass keep theirs."""
        number, size = self.slots
        self._at = torch.full((self._num_workers,), -1).share_memory_() if self._num_workers else None
        self._slots = Slots(number, size) if size else None

    def _take(self) -> int:
        return -1 if self._slots is None else self._slots.take()

    def collate(self, samples: Sequence[Any]) -> Any:
        """Make a batch, all of it in shared memory; without free shared memory, the worker's queue would lose it silently."""
        slot = samples[-1] if isinstance(samples[-1], int) else -1
        samples = [sample for sample in samples if not isinstance(sample, int)]
        batch = self._collate(samples) if self._collate else self._stack(samples, slot)
        if get_worker_info() is not None:
            _share(batch)
        return batch

    def _stack(self, samples: Sequence[Sample], slot: int) -> Batch:
        """Stack views (B, V, C, H, W), in a slot if there is one."""
        views: Any = None if self._slots is None else self._slots.fill(slot, [sample.views for sample in samples])
        if views is None:
            views = default_collate([sample.views for sample in samples])
        indices = torch.tensor([sample.number for sample in samples])
        return Batch(views, indices, [bad for sample in samples for bad in sample.bad])

    def in_flight(self) -> str:
        at = [] if self._at is None else [int(index) for index in self._at if index >= 0]
        return f"; being loaded: {', '.join(repr(self._dataset.name(index)) for index in at)}" if at else ""


def _share(batch: Any) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            _share(part)


def _start_worker(_: int) -> None:
    """Ignore signals, which a terminal or torchrun sends to all processes: the main process ends workers once it has saved."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers() -> None:
    """End all workers at exit, which would otherwise wait for ever, since workers ignore SIGTERM."""
    _kill(list(_workers))


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kill workers, also those that do not respond."""
    with _quiet_sigchld():
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join(5)


@contextlib.contextmanager
def _quiet_sigchld() -> Iterator[None]:
    """Restore SIGCHLD's handler: torch's raises the death of a worker wherever the main thread is, even within a step."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def _escape(text: str) -> str:
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
