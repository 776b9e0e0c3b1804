"""The loader of a run's batches: its processes, and their troubles in one line each."""

import atexit
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from .data import Bad, Batch, DataError, Key, MultiViewDataset, Sample, StepSampler
from .slots import Filled, Slots

_DIED = "a loading worker died (out of memory?): "
_workers: WeakSet[BaseProcess] = WeakSet()
_logger = logging.getLogger(__name__)


class Loader:
    """A DataLoader whose troubles come as one line: bad images, dead workers, stuck files, small shared memory.

    Made by `make_loader`. Iterating gives a `Batch` a step.

    Attributes:
        bad: Name -> reason of the bad images met so far.
    """

    def __init__(self, loader: "DataLoader[Sample]", tracked: "_Tracked", *, max_bad: int, bad_file: Path | None) -> None:
        self._loader, self._tracked, self._max_bad, self._bad_file = loader, tracked, max_bad, bad_file
        self.bad: dict[str, str] = _read_bad(bad_file)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches.

        Raises:
            DataError: Too many bad images, a worker died, or none came in time.
        """
        others = set(multiprocessing.active_children())
        self._tracked.make_slots()
        batches = iter(self._loader)
        workers = set(multiprocessing.active_children()) - others
        _workers.update(workers)
        while True:
            try:
                batch: Batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                reason = explain_loader_error(error)
                if reason is None and isinstance(error, (ConnectionError, EOFError)):
                    reason = _DIED + type(error).__name__
                if reason is None:
                    raise
                at = "" if isinstance(error, DataError) else self._tracked.in_flight()
                _kill(workers)
                raise DataError(reason + at) from error
            self._report(batch.bad)
            views: Tensor | Filled = batch.views
            yield batch._replace(views=views.tensor()) if isinstance(views, Filled) else batch

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
    dataset: MultiViewDataset,
    sampler: StepSampler,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    timeout: float = 300,
    bad_file: str | os.PathLike[str] | None = None,
) -> Loader:
    """Load a run's batches.

    Args:
        dataset: The views.
        sampler: The steps.
        num_workers: Loading processes; 0 loads in this one.
        pin_memory: Pin batches for a CUDA device.
        prefetch_factor: Batches each worker prepares ahead.
        timeout: Seconds to wait for a batch before it is an error; 0 waits for ever.
        bad_file: Where bad images are added, a line "path<tab>reason" each.

    Raises:
        DataError: /dev/shm is too small for the workers.
    """
    ahead = prefetch_factor * num_workers
    tracked = _Tracked(dataset, sampler, num_workers)
    if num_workers:
        shape = getattr(dataset.transform, "shape", ())  # (V, C, H, W)
        size = math.prod(shape) * (sampler.batch_size // sampler.world_size)
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
        timeout=timeout if num_workers else 0,
    )
    return Loader(loader, tracked, max_bad=dataset.max_bad, bad_file=Path(bad_file) if bad_file else None)


def check_shared_memory(needed: int, *, folder: str = "/dev/shm", free: int | None = None) -> None:  # noqa: S108
    """Refuse to start workers whose batches would not fit into shared memory.

    Args:
        needed: Bytes.
        folder: Where shared memory is mounted; nothing is checked where it does not exist.
        free: Bytes free there; asked for if None.

    Raises:
        DataError: It does not fit.
    """
    if free is None:
        if not os.path.isdir(folder):
            return
        free = shutil.disk_usage(folder).free
    if needed > free:
        cure = "use fewer workers, a smaller prefetch_factor or batch, or `docker run --shm-size`"
        raise DataError(f"{folder} has {free >> 20} MB free, batches under way need {(needed >> 20) + 1} MB: {cure}")


def explain_loader_error(error: BaseException) -> str | None:
    """One line for an exception that torch's loader raises, anywhere in the main process; None if it is another."""
    text = str(error)
    if isinstance(error, DataError):
        return text.rsplit("DataError: ", 1)[-1].strip()
    if "DataLoader timed out" in text:
        return f"no batch came in time ({text.rstrip('.')})"
    died = "DataLoader worker" in text and ("killed" in text or "exited" in text)
    return _DIED + " ".join(text.split()) if died else None


class _WithSlots(Sampler[list[Any]]):
    """A sampler that names a free slot of shared memory behind each batch's keys."""

    def __init__(self, sampler: StepSampler, take: Callable[[], int]) -> None:
        self._sampler, self._take = sampler, take

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        for keys in self._sampler:
            yield [*keys, self._take()]


class _Tracked(Dataset[Any]):
    """The data set, with a note in shared memory of what each worker is at, and slots there for the batches."""

    def __init__(self, dataset: MultiViewDataset, sampler: StepSampler, num_workers: int) -> None:
        self._dataset = dataset
        self._at = _shared(num_workers) if num_workers else None
        self._slots: Slots | None = None
        self.slots = 0, 0  # number, bytes
        self.sampler = _WithSlots(sampler, self._take) if num_workers else sampler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # for workers

    def __getitem__(self, key: Key | int) -> Sample | int:
        worker = get_worker_info()
        if isinstance(key, int):
            return key  # a slot's number
        if worker is None or self._at is None:
            return self._dataset[key]
        self._at[worker.id] = key[1]
        try:
            return self._dataset[key]
        finally:
            self._at[worker.id] = -1

    def make_slots(self) -> None:
        """Take shared memory for a pass over the data; batches of an earlier one keep theirs."""
        number, size = self.slots
        self._slots = Slots(number, size) if size else None

    def _take(self) -> int:
        return -1 if self._slots is None else self._slots.take()

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Stack samples (B, V, C, H, W), in the slot whose number stands behind them where there is one."""
        slot = samples[-1] if isinstance(samples[-1], int) else -1
        samples = [sample for sample in samples if not isinstance(sample, int)]
        views: Any = None if self._slots is None else self._slots.fill(slot, [sample.views for sample in samples])
        if views is None:
            views = default_collate([sample.views for sample in samples])
        indices = torch.tensor([sample.number for sample in samples])
        return Batch(views, indices, [bad for sample in samples for bad in sample.bad])

    def in_flight(self) -> str:
        at = [] if self._at is None else [int(index) for index in self._at if index >= 0]
        return f"; being loaded: {', '.join(repr(self._dataset.source.name(index)) for index in at)}" if at else ""


def _shared(length: int) -> Tensor:
    numbers = torch.full((length,), -1)
    numbers.untyped_storage().share_memory_()
    return numbers


def _start_worker(_: int) -> None:
    """Keep a terminal's or torchrun's signals from the workers: the main process ends them, after it has saved."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers() -> None:
    """Workers ignore SIGTERM, so that without this the exit would wait for them for ever."""
    _kill(list(_workers))


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End workers at once, stuck ones too, without torch's handler of SIGCHLD raising an error for it."""
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join(5)
    if main:
        signal.signal(signal.SIGCHLD, previous)


def _escape(text: str) -> str:
    return text.encode("unicode_escape", "surrogateescape").decode("ascii")


def _append(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="ascii") as file:
            file.write(line)
    except OSError as error:
        _logger.warning("cannot write %s: %s", path, error)


def _read_bad(path: Path | None) -> dict[str, str]:
    """What an earlier part of the run wrote."""
    if path is None or not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    return {_unescape(line[0]): _unescape(line[1]) for line in lines if len(line) == 2}


def _unescape(text: str) -> str:
    return text.encode("ascii", "replace").decode("unicode_escape", "replace")
