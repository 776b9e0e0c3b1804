"""From the steps of a run to batches of views, the same for any number of workers and processes and any first step.

Shapes: B images of this process's part of a step, V views, C channels, H W pixels. A key is (epoch, index): crops
depend on (seed, epoch, index) alone, and the images of a step on (seed, step) alone.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .decode import ImageError, ImageLike
from .folders import ImageSource

Key = tuple[int, int]
Loaded = TypeVar("Loaded")
MAX_TRIES = 10
PAUSES = (0.1, 0.4, 1.0, 2.0)
"""Seconds between attempts if a file system fails, such as a network share, before an image counts as bad."""


class DataError(RuntimeError):
    """The reason why there are no more batches, in one line."""


class Bad(NamedTuple):
    """An image that could not be used."""

    name: str
    reason: str


class Sample(NamedTuple):
    """An image's views (V, C, H, W) uint8, its number in the source, and the bad images that it replaces."""

    views: Tensor
    number: int
    bad: list[Bad]


class Batch(NamedTuple):
    """B images: views (B, V, C, H, W) uint8, indices (B,) long into the source, and the bad images that they replace."""

    views: Tensor
    indices: Tensor
    bad: list[Bad]


def sample_seed(*numbers: int) -> int:
    """Return a seed from numbers such as (seed, epoch, index): 63 bits of their BLAKE2b hash."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class MultiViewDataset(Dataset[Sample]):
    """The views of image `index` in epoch `epoch`, from the key (epoch, index).

    A bad image is replaced by another one that depends on (seed, epoch, index) too. If the file system or the memory fails,
    the image is tried again for some seconds before it counts as bad.

    Args:
        source: The images.
        transform: (image, generator=) -> (V, C, H, W) uint8, such as `MultiViewTransform`.
        seed: The run's seed.
        max_bad: Number of different bad images that `Loader` allows before it stops the run.
    """

    def __init__(self, source: ImageSource, transform: Callable[..., Tensor], *, seed: int = 0, max_bad: int = 100) -> None:
        self.source, self.transform, self.seed, self.max_bad = source, transform, seed, max_bad

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.name(index)

    def __getitem__(self, key: Key) -> Sample:
        """Return the views of one image, or of the image that replaces it.

        Raises:
            DataError: Ten images in a row are bad.
        """
        epoch, index = key
        bad: list[Bad] = []
        pauses = iter(PAUSES)
        for attempt in range(MAX_TRIES):
            chosen = index if attempt == 0 else sample_seed(self.seed, epoch, index, attempt) % len(self.source)
            try:
                views = try_again(partial(self._views, epoch, chosen), pauses)
                return Sample(views, chosen, bad)
            except ImageError as error:
                bad.append(Bad(self.source.name(chosen), error.reason))
        last = f"the last was {bad[-1].name!r}: {bad[-1].reason}"
        raise DataError(f"{MAX_TRIES} images in a row cannot be used; {last}")

    def _views(self, epoch: int, index: int) -> Tensor:
        return self.transform(self._image(index), generator=generator(self.seed, epoch, index))

    def _image(self, index: int) -> ImageLike:
        try:
            return self.source[index][0]
        except ImageError:
            raise
        except (OSError, ValueError, SyntaxError, RuntimeError, EOFError) as error:  # a data set that opens by itself
            raise ImageError(self.source.name(index), f"{type(error).__name__}: {error}") from error


def try_again(load: Callable[[], Loaded], pauses: Iterator[float] | None = None) -> Loaded:
    """Return `load()`; if the file system or the memory fails, call it again after each pause, in seconds."""
    pauses = iter(PAUSES) if pauses is None else pauses
    while True:
        try:
            return load()
        except (ImageError, OSError, MemoryError) as error:
            pause = next(pauses, None) if _may_pass(error) else None
            if pause is None:
                raise
        time.sleep(pause)


def _may_pass(error: BaseException) -> bool:
    """Return whether the system has failed, whose errors have numbers, rather than the image itself, as Pillow reports."""
    cause = error.__cause__ if isinstance(error, ImageError) else error
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)


def check_share(batch_size: int, rank: int, world_size: int) -> None:
    """Check that processes can share a batch alike.

    Raises:
        ValueError: They cannot, or there is no such process.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1} for {world_size} processes, got {rank}")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch size must be a positive multiple of the {world_size} processes, got {batch_size}")


class StepSampler(Sampler[list[Key]]):
    """This process's part of each step's batch, from any step on.

    Each epoch is one permutation of all images; each step takes the next global batch, and images that do not fill a batch
    are left out. A process takes a contiguous part of each batch.

    Args:
        length: Images in the source.
        batch_size: Images per step over all processes.
        seed: The run's seed.
        num_steps: Steps of the whole run; None: without end.
        start_step: First step to yield, counted from 0.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: Batch and processes, or batch and images, do not fit.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, rank, world_size)
        if length < batch_size:
            raise ValueError(f"batch size must be at most the {length} images, got {batch_size}: use a smaller batch")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.num_steps, self.start_step = num_steps, start_step
        self.rank, self.world_size = rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the source."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("a sampler without num_steps has no length")
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[list[Key]]:
        share, epoch, order = self.batch_size // self.world_size, -1, torch.empty(0, dtype=torch.long)
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = torch.randperm(self.length, generator=generator(self.seed, epoch))
            start = step % self.steps_per_epoch * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[start : start + share].tolist()]
            step += 1


def generator(*numbers: int) -> torch.Generator:
    """Return a generator seeded by numbers (`sample_seed`)."""
    return torch.Generator().manual_seed(sample_seed(*numbers))
