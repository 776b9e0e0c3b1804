"""The loader of a run's batches: its processes, its bad images, and its errors in one line each."""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .sampling import Batch, DataError, Sample

TURN, NOTICE, TIMEOUT = 5, 60, 300
"""Seconds without a batch after which dead workers are looked for, a line says so, the run ends: a network disk can hang."""
_USED_UP = ("Too many open files", "File too large", "shared memory", "MemoryError", "DefaultCPUAllocator")
_logger = logging.getLogger(__name__)


class Loader(DataLoader[Any]):
    """The batches of a run: a DataLoader that counts bad images in `bad` (name -> reason), and whose errors are one line.

    Iterating yields a `Batch` for each step, or the result of `collate`. Errors are raised while the run waits for a batch,
    never within a step: the state of training is then complete and can be saved.

    Args:
        dataset: The views (`MultiViewDataset`), or other samples by the sampler's keys, with `collate`.
        sampler: The steps: it yields the keys of each batch; or the batch size, of samples that are only iterated over.
        num_workers: Loading processes; 0 loads in this process.
        pin_memory: Pin batches for a CUDA device.
        bad_file: File to which bad images are appended, one line "path<tab>reason" for each.
        collate: Samples -> batch; by default a `Batch` of the views.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[list[Any]] | int,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        bad_file: str | os.PathLike[str] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        steps: dict[str, Any] = {"batch_size": sampler} if isinstance(sampler, int) else {"batch_sampler": sampler}
        super().__init__(
            dataset,
            **steps,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=partial(_collate, collate or stack),
            generator=torch.Generator(),  # else each pass draws from the global one
            timeout=TURN if num_workers else 0,
            worker_init_fn=_start_worker,
        )
        self._max_bad, self._bad_file = getattr(dataset, "max_bad", 0), Path(bad_file) if bad_file else None
        self.bad: dict[str, str] = {}
        if self._bad_file is not None and self._bad_file.exists():  # found by an earlier part of the run
            lines = (line.partition("\t") for line in self._bad_file.read_text("utf-8", "replace").splitlines())
            self.bad = {name: reason for name, _, reason in lines}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            DataError: Too many bad images, a worker died, memory is full, or a sample cannot be loaded.
        """
        try:
            batches = super().__iter__()
            if self.num_workers and threading.current_thread() is threading.main_thread() and os.name == "posix":
                # torch's handler would raise the death of a worker wherever the main thread is, even within a step
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            waited = 0
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if "DataLoader timed out" not in str(error):
                        raise
                    waited += TURN
                    if waited >= TIMEOUT:
                        raise DataError(f"no batch came in {TIMEOUT} s: a file or its disk hangs") from error
                    if waited % NOTICE == 0:
                        _logger.warning("no batch for %d s: a file or its disk is slow", waited)
                    continue
                waited = 0
                if isinstance(batch, Batch):
                    self._count(batch.bad)
                yield batch
        except Exception as error:
            if reason := _explain(error):
                raise DataError(reason) from error
            raise

    def _get_iterator(self) -> Any:
        return _Workers(self) if self.num_workers else super()._get_iterator()

    def _count(self, bad: Iterable[tuple[str, str]]) -> None:
        for name, reason in bad:
            name = repr(name)[1:-1]  # in one line
            if name in self.bad:
                continue
            self.bad[name] = reason
            _logger.warning("bad image '%s': %s; another takes its place", name, reason)
            if self._bad_file is not None:
                try:
                    with open(self._bad_file, "a", encoding="utf-8", errors="backslashreplace") as file:
                        file.write(f"{name}\t{reason}\n")
                except OSError as error:
                    _logger.warning("cannot write %s: %s", self._bad_file, error)
        if len(self.bad) > self._max_bad:
            shown = "; ".join(f"'{name}': {reason}" for name, reason in list(self.bad.items())[-3:])
            where = f", all in {self._bad_file}" if self._bad_file else ""
            raise DataError(f"{len(self.bad)} bad images, more than the {self._max_bad} allowed{where}. Last: {shown}")


class _Workers(_MultiProcessingDataLoaderIter):
    """Torch's loading processes, which are killed at the end: they hold nothing, and ignore signals.

    Torch tells them the end by an event whose lock all share. One that is killed with the lock kept the run waiting for ever.
    """

    def __init__(self, loader: Loader) -> None:
        super().__init__(loader)
        self._workers_done_event: Any = threading.Event()  # of this process alone
        for worker in self._workers:
            atexit.register(worker.kill)  # before multiprocessing's own hook, which would wait for one that hangs

    def _shutdown_workers(self) -> None:
        for worker in getattr(self, "_workers", []):
            worker.kill()
            atexit.unregister(worker.kill)
        super()._shutdown_workers()


def stack(samples: Sequence[Sample]) -> Batch:
    """Make a batch; a worker stacks in shared memory."""
    views, indices = default_collate([s.views for s in samples]), torch.tensor([s.number for s in samples])
    return Batch(views, indices, [bad for s in samples for bad in s.bad], [s.name for s in samples])


def _explain(error: Exception) -> str | None:
    """Return one line for an error that can occur while waiting for a batch; None for a mistake in the code."""
    last = f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()  # behind a worker's traceback
    if isinstance(error, DataError) or "DataError: " in last:
        return last.rpartition("DataError: ")[2]
    if any(words in last for words in _USED_UP):
        return f"memory, shared memory or a limit is used up: fewer workers, a smaller batch, `ulimit`, `--shm-size` ({last})"
    if isinstance(error, (ConnectionError, EOFError)) or str(error).startswith("DataLoader worker (pid"):
        return f"a loading worker died (out of memory?): {last.partition(': ')[2]}"
    if isinstance(error, (OSError, ValueError, SyntaxError)) or "ImageError: " in last:
        return last.rpartition("ImageError: ")[2]
    return None


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    batch = collate(samples)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(batch: Any) -> None:
    """Move tensors to shared memory: where that is full, the worker's queue would lose the batch, and the run would wait."""
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, Mapping):
        _share([*batch.values()])
    elif isinstance(batch, list | tuple):
        for part in batch:
            _share(part)


def _start_worker(_: int) -> None:
    """Ignore signals, which a terminal or torchrun sends to all processes: the main process ends workers once it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
