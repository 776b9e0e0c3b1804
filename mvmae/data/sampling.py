"""From the steps of a run to batches of views, the same for any number of workers and processes and any first step.

Shapes: B images of this process's part of a step, V views, C channels, H W pixels. A key is (epoch, index): crops
depend on (seed, epoch, index) alone, and the images of a step on (seed, step) alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .decode import ImageError, ImageLike
from .sources import ImageSource

Key = tuple[int, int]
Candidate = tuple[str, int, Callable[[], ImageLike], tuple[int, ...]]
"""What may become a sample: an image's name and number, what returns it, and what its random numbers depend on."""
MAX_TRIES = 10


class DataError(RuntimeError):
    """The reason why there are no more batches, in one line."""


class Sample(NamedTuple):
    """An image's views (V, C, H, W) uint8, number and name in the source, and (name, reason) of bad images that it replaces."""

    views: Tensor
    number: int
    name: str
    bad: list[tuple[str, str]]


class Batch(NamedTuple):
    """B images: views (B, V, C, H, W) uint8, indices (B,) long into the source, the bad images that they replace, and names."""

    views: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]
    names: list[str]


def sample_seed(*numbers: int | str) -> int:
    """Return a seed from numbers such as (seed, epoch, index): 63 bits of their BLAKE2b hash."""
    text = ",".join(map(str, numbers)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*numbers: int | str) -> torch.Generator:
    """Return a generator seeded by numbers (`sample_seed`)."""
    return torch.Generator().manual_seed(sample_seed(*numbers))


class MultiViewDataset(Dataset[Sample]):
    """The views of image `index` in epoch `epoch`, from the key (epoch, index).

    A bad image is replaced by another one that depends on (seed, epoch, index) too.

    Args:
        source: The images.
        transform: (image, generator=) -> (V, C, H, W) uint8, such as `MultiViewTransform`.
        seed: The run's seed.
        max_bad: Number of different bad images that a `Loader` allows before it stops the run.
    """

    def __init__(self, source: ImageSource, transform: Callable[..., Tensor], *, seed: int = 0, max_bad: int = 100) -> None:
        self.source, self.transform, self.seed, self.max_bad = source, transform, seed, max_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        return first_good(self._candidates(*key), self.transform)

    def _candidates(self, epoch: int, index: int) -> Iterator[Candidate]:
        for attempt in count():
            chosen = index if attempt == 0 else sample_seed(self.seed, epoch, index, attempt) % len(self.source)
            yield self.source.name(chosen), chosen, partial(read, self.source, chosen), (self.seed, epoch, chosen)


def first_good(candidates: Iterator[Candidate], transform: Callable[..., Tensor]) -> Sample:
    """Return the views of the first candidate that can be used, with the bad images before it.

    Raises:
        DataError: Ten images in a row are bad.
    """
    bad = list[tuple[str, str]]()
    while len(bad) < MAX_TRIES:
        name, number, image, seeds = next(candidates)
        try:
            return Sample(transform(image(), generator=generator(*seeds)), number, name, bad)
        except ImageError as error:
            bad.append((name, error.reason))
    name, reason = bad[-1]
    raise DataError(f"{len(bad)} images in a row cannot be used; the last was {name!r}: {reason}")


def read(source: ImageSource, index: int) -> ImageLike:
    """Return an image of a source, which may be a data set that opens images by itself.

    Raises:
        ImageError: It cannot be read.
    """
    try:
        return source[index][0]
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError) as error:
        raise ImageError(source.name(index), f"{type(error).__name__}: {error}") from error


def check_share(batch_size: int, rank: int, world_size: int) -> None:
    """Raise a ValueError unless so many processes can share a batch alike."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1} for {world_size} processes, got {rank}")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch size must be a positive multiple of the {world_size} processes, got {batch_size}")


class StepSampler(Sampler[list[Key]]):
    """This process's contiguous part of each step's batch, from any step on.

    Each epoch is one permutation of all images, without those that do not fill a batch.

    Args:
        length: Images in the source.
        batch_size: Images per step over all processes.
        seed: The run's seed.
        num_steps: Steps of the whole run; None: without end.
        start_step: First step to yield, counted from 0.
        rank: Number of this process, of `world_size`.

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
        self.length, self.batch_size, self.seed, self.num_steps = length, batch_size, seed, num_steps
        self.start_step, self.rank, self.world_size = start_step, rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the source."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        share, order = self.batch_size // self.world_size, torch.empty(0)
        for step in count(self.start_step) if self.num_steps is None else range(self.start_step, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == self.start_step:
                order = torch.randperm(self.length, generator=generator(self.seed, epoch))
            start = place * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[start : start + share].tolist()]
