"""Images that can only be read in order, in shards: how they are opened, and in which order a process sees them.

What a process sees is a pure function of (seed, pass, shards, buffer, processes). Each pass has an order of shards of its own;
each process takes its part of them, and reads up to four at once. What it reads is cut into blocks, and each block is shuffled
as a whole. A position is then a few numbers, where the current block begins and how much of it is used up, and no image of
a buffer has to be stored: a resumed run reads the current block again, and goes on in it.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from .decode import ImageError, ImageLike
from .folders import ImageSource, start_of
from .sampling import DataError, Loaded, generator
from .shards import ImageOrError, Item, Place, Shards, base_name, shards_of

AT_ONCE = 4
"""Most shards that a process reads at the same time."""
MOST_BYTES = 2**30
"""Bytes of images at which a block ends, however few images it holds; there are two blocks at most."""
_COMPARED = 16  # first images of a stream that tell it from others
_NUMBER = 2**32  # an index is that of a shard times this, and the image's number in it


class Streamed(NamedTuple):
    """An image of a stream: its number (shard x 2^32 + number in the shard), pass, name, and itself or what is wrong."""

    number: int
    epoch: int
    name: str
    image: ImageOrError


class KeptImages(ImageSource):
    """Images in memory."""

    def __init__(self, items: Sequence[Item]) -> None:
        super().__init__([os.fsencode(item.name) for item in items])
        self._items = list(items)

    def image(self, index: int) -> ImageLike:
        """Return the image.

        Raises:
            ImageError: It could not be read.
        """
        return image_or_error(self._items[index].image)


class ImageStream:
    """Images in shards, read in order. Made by `open_stream`.

    Args:
        shards: What is read.
        buffer: Images that a process shuffles at a time; it holds up to twice as many, encoded.

    Attributes:
        length: Number of images; None: not known.
    """

    def __init__(self, shards: Shards, *, buffer: int = 2000) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1 image, got {buffer}")
        self.shards, self.buffer, self.length = shards, buffer, shards.length

    def name(self, index: int) -> str:
        """Return the name of an image's shard and its number in it."""
        return f"{self.shards.names[index // _NUMBER]}#{index % _NUMBER}"

    def first(self, count: int) -> KeptImages:
        """Read the first images of the first shards into memory: at most `count`, and about 1 GB.

        Raises:
            DataError: A shard cannot be read.
            ValueError: None is an image.
        """
        items, size = list[Item](), 0
        for shard in range(len(self.shards.names)):
            for item in self.shards.read(shard, Place(), (0, 1), 0):
                items.append(item)
                size += _size(item.image)
                if len(items) >= count or size > MOST_BYTES:
                    break
            if len(items) >= count or size > MOST_BYTES:
                break
        if all(isinstance(item.image, ImageError) for item in items):
            reason = f": {items[0].image!s}" if items else ""
            raise ValueError(f"no image at the beginning of {self.shards.names[0]} and what follows{reason}")
        return KeptImages(items)

    @cached_property
    def fingerprint(self) -> str:
        """Number and names of the shards without their folder or host, and a hash of the first 16 images."""
        first = self.first(_COMPARED)
        digest = hashlib.blake2b("\n".join(map(base_name, self.shards.names)).encode(errors="surrogateescape"), digest_size=8)
        for index in range(len(first)):
            digest.update(start_of(first, index))
        return f"stream-{len(self.shards.names)}-{digest.hexdigest()}"


def open_stream(data: Any, *, buffer: int = 2000) -> ImageStream:
    """Open a stream of images.

    Args:
        data: URLs of tar files (`https://host/{000..099}.tar`, `http://`, `file://`), `hfids/NAME` or `hfids/NAME:SPLIT` for
            a data set of Hugging Face, a `datasets.IterableDataset`, or any iterable that yields images, encoded bytes,
            (image, label) or named columns, such as a `torch.utils.data.IterableDataset`, the same with each `iter`.
        buffer: Images that a process shuffles at a time.

    Raises:
        ValueError: Another kind of URL, `pipe:`, an iterable that can be read once only.
    """
    return ImageStream(shards_of(data), buffer=buffer)


class Position(NamedTuple):
    """Where a process is in a stream: which block, how many images of it are used up, and where each lane is at its start."""

    epoch: int = 0
    block: int = 0
    used: int = 0
    seen: int = 0  # images of the pass before the block
    lanes: tuple[tuple[int, int, int], ...] = ((0, 0, 0),) * AT_ONCE  # which of the lane's shards, and the place in it

    def numbers(self) -> list[int]:
        """Return the position as numbers, as many for any."""
        return [*self[:4], *(number for lane in self.lanes for number in lane)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Position":
        """Return the position that `numbers` describes."""
        epoch, block, used, seen, *rest = numbers
        lanes = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        return cls(epoch, block, used, seen, tuple(lanes))


class Reader:
    """Reads what one process sees of a stream, without end; its position is that after the last image that it has yielded."""

    def __init__(self, stream: ImageStream, seed: int, rank: int, world_size: int, share: int, start: Position) -> None:
        self._stream, self._seed, self._rank, self._world_size, self._share = stream, seed, rank, world_size, share
        self.position, self.ended = start, threading.Event()
        self._begin(start)

    def __iter__(self) -> Iterator[Streamed]:
        coming, skipped = _in_background(self._read), self.position.used
        while True:
            position, block = coming.result()
            coming = _in_background(self._read)  # beside the training on this block
            order = torch.randperm(len(block), generator=generator(self._seed, position.epoch, self._rank, position.block))
            for used, number in enumerate(order.tolist()[skipped:], skipped + 1):
                self.position = position._replace(used=used)
                yield block[number]
            skipped = 0

    def _begin(self, position: Position) -> None:
        """Begin a pass, or a block in it."""
        shards, seed, world = self._stream.shards, self._seed, self._world_size
        draw = generator(seed, position.epoch)
        order = torch.randperm(len(shards.names), generator=draw).tolist()
        whole = len(order) // world * world
        turns = torch.randint(world, (len(order),), generator=draw).tolist()  # else the last process has none of short shards
        units = [(shard, (0, 1)) for shard in order[self._rank : whole : world]]
        units += [(shard, ((self._rank + turns[shard]) % world, world)) for shard in order[whole:]]
        count = min(AT_ONCE, len(units))
        self._lanes = [
            _Lane(self._stream.shards, position.epoch, units[i::count], position.lanes[i], self.ended) for i in range(count)
        ]
        self._next = position

    def _read(self) -> tuple[Position, list[Streamed]]:
        """Read the next block; return it with its position."""
        while True:
            lanes = tuple(lane.at for lane in self._lanes)
            position = self._next._replace(lanes=lanes + ((0, 0, 0),) * (AT_ONCE - len(lanes)), used=0)
            count, most = (max(total // len(lanes), 1) for total in (self._stream.buffer, MOST_BYTES))
            parts = [_in_background(partial(lane.take, count, most)) for lane in self._lanes]
            block = [image for part in parts for image in part.result()]
            if block or self.ended.is_set():
                self._next = position._replace(block=position.block + 1, seen=position.seen + len(block))
                return position, block
            if position.seen < self._share:
                found = f"{self._stream.shards.names[0]} and what follows hold {position.seen} images for process {self._rank}"
                raise DataError(f"{found}, and its part of a batch is {self._share}: use a smaller batch")
            self._begin(Position(epoch=position.epoch + 1))


class _Lane:
    """Reads some of a process's shards in a pass, one after another."""

    def __init__(
        self,
        shards: Shards,
        epoch: int,
        units: Sequence[tuple[int, tuple[int, int]]],
        at: tuple[int, int, int],
        ended: threading.Event,
    ) -> None:
        self._shards, self._epoch, self._units, self.at, self._ended = shards, epoch, units, at, ended
        self._items: Iterator[Item] | None = None

    def take(self, count: int, most_bytes: int) -> list[Streamed]:
        """Read the next images: fewer where they take more bytes, and at the end of the pass."""
        taken, size = list[Streamed](), 0
        while len(taken) < count and size < most_bytes and self.at[0] < len(self._units) and not self._ended.is_set():
            number, *place = self.at
            shard, own = self._units[number]
            if self._items is None:
                self._items = self._shards.read(shard, Place(*place), own, self._epoch)
            item = next(self._items, None)
            if item is None:
                self._items, self.at = None, (number + 1, 0, 0)
                continue
            taken.append(Streamed(shard * _NUMBER + item.number, self._epoch, item.name, item.image))
            size += _size(item.image)
            self.at = (number, *item.after)
        return taken


def _in_background(work: Callable[[], Loaded]) -> "Future[Loaded]":
    """Start work in a thread that does not keep the process from its end; return its result to come."""
    future: Future[Loaded] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def image_or_error(image: ImageOrError) -> ImageLike:
    """Return an image.

    Raises:
        ImageError: It is one.
    """
    if isinstance(image, ImageError):
        raise image
    return image


def _size(image: Any) -> int:
    """Return about how many bytes of memory an image takes."""
    if isinstance(image, (bytes, str, ImageError)) or not hasattr(image, "size"):
        return len(image) if isinstance(image, bytes) else 100
    return image.width * image.height * 4 if hasattr(image, "width") else int(np.asarray(image).nbytes)
