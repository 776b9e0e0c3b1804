"""From a stream to batches of views: the steps of a run, the position that a checkpoint keeps, the views of an image.

`sampling` has the same for images that can be read in any order.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .decode import ImageError
from .sampling import MAX_TRIES, PAUSES, Bad, DataError, Sample, check_share, generator, try_again
from .shards import ImageOrError
from .streams import ImageStream, Position, Reader, Streamed, image_or_error

_logger = logging.getLogger(__name__)


class StreamKey(NamedTuple):
    """What a worker needs to load an image: all images of this process's part of the step, and which of them it is."""

    epoch: int
    number: int
    place: int
    images: list[Streamed]


class StreamSampler(Sampler[list[StreamKey]]):
    """This process's part of each step's batch, from a stream; a position that a checkpoint keeps.

    Of the shards of a pass, in the order of the pass, each process takes every W-th, where W is the number of processes; the
    last ones, too few for all, are read by all, each taking every W-th image. So in a pass no image comes twice and none is
    left out, also with fewer shards than processes. A batch may hold the end of a pass and the beginning of the next, and
    processes may begin a pass some steps apart. The number of loading workers does not matter.

    Args:
        stream: The images.
        batch_size: Images per step over all processes.
        seed: The run's seed.
        num_steps: Steps of the whole run; None: without end.
        rank: Number of this process.
        world_size: Number of processes.

    Attributes:
        start_step: First step to yield, counted from 0.

    Raises:
        ValueError: Batch and processes do not fit.
    """

    def __init__(
        self,
        stream: ImageStream,
        batch_size: int,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, rank, world_size)
        self.stream, self.batch_size, self.seed, self.num_steps = stream, batch_size, seed, num_steps
        self.rank, self.world_size, self.start_step = rank, world_size, 0
        self._places = torch.empty(0, len(Position().numbers()), dtype=torch.long)  # (W, numbers) after the last whole step
        self._coming: dict[int, list[int]] = {}  # step -> position of this process after it

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("a sampler without num_steps has no length")
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[list[StreamKey]]:
        share, step = self.batch_size // self.world_size, self.start_step
        start = Position.of(self._places[self.rank].tolist()) if len(self._places) else Position()
        reader = Reader(self.stream, self.seed, self.rank, self.world_size, share, start)
        images = iter(reader)
        try:
            while self.num_steps is None or step < self.num_steps:
                batch, step = list(islice(images, share)), step + 1
                self._coming[step] = reader.position.numbers()
                yield [StreamKey(image.epoch, image.number, place, batch) for place, image in enumerate(batch)]
        finally:
            reader.ended.set()

    def advance(self, step: int, gather: Callable[[list[int]], list[list[int]]] = lambda own: [own]) -> None:
        """Note that a step is whole: the position after it is what `state_dict` returns from now on.

        Args:
            step: Counted from 1.
            gather: This process's numbers -> those of all processes, in the order of the ranks; all call it at the same step.
        """
        self._places = torch.tensor(gather(self._coming.pop(step)))
        for earlier in [number for number in self._coming if number < step]:
            del self._coming[earlier]

    def state_dict(self) -> dict[str, Any]:
        """Return which stream this is, and the position of each process after the last whole step."""
        return {"stream": self.stream.fingerprint, "places": self._places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position: exactly there with as many processes as before, else with the next pass.

        A position in another stream is left aside.
        """
        places: Tensor = state["places"]
        if state["stream"] != self.stream.fingerprint or not len(places):
            return
        if len(places) != self.world_size:
            if self.rank == 0:
                told = "%d processes instead of %d: the stream goes on with its next pass; some of the last one is not seen"
                _logger.warning(told, self.world_size, len(places))
            next_pass = Position(epoch=int(places[:, 0].max()) + 1).numbers()
            places = torch.tensor([next_pass] * self.world_size)
        self._places = places


class StreamedViews(Dataset[Sample]):
    """The views of an image of a stream, from a `StreamKey`; as `MultiViewDataset`, but for what replaces a bad image.

    That is the next image of this process's part of the step, with other crops than there. Crops depend on (seed, pass, shard,
    number in the shard) alone.

    Args:
        stream: The images.
        transform: (image, generator=) -> (V, C, H, W) uint8, such as `MultiViewTransform`.
        seed: The run's seed.
        max_bad: Number of different bad images that `Loader` allows before it stops the run.
    """

    def __init__(self, stream: ImageStream, transform: Callable[..., Tensor], *, seed: int = 0, max_bad: int = 100) -> None:
        self._stream, self.transform, self.seed, self.max_bad = stream, transform, seed, max_bad

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker needs: it reads nothing of the stream, which may be an iterable that cannot be pickled."""
        return {**vars(self), "_stream": None}

    def name(self, index: int) -> str:
        """Return the name of an image's shard and its number in it."""
        return self._stream.name(index)

    def __getitem__(self, key: StreamKey) -> Sample:
        """Return the views of one image, or of the image that replaces it.

        Raises:
            DataError: Ten images in a row are bad, or all of this process's part of the step.
        """
        bad: list[Bad] = []
        pauses = iter(PAUSES)
        for attempt in range(min(MAX_TRIES, len(key.images))):
            chosen = key.images[(key.place + attempt) % len(key.images)]
            try:
                views = try_again(partial(self._views, key, chosen.image), pauses)
                return Sample(views, chosen.number, bad)
            except ImageError as error:
                bad.append(Bad(chosen.name, error.reason))
        last = f"the last was {bad[-1].name!r}: {bad[-1].reason}"
        raise DataError(f"{len(bad)} images in a row cannot be used; {last}")

    def _views(self, key: StreamKey, image: ImageOrError) -> Tensor:
        return self.transform(image_or_error(image), generator=generator(self.seed, key.epoch, key.number))
