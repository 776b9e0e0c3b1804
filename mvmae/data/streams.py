"""Images that can only be read in order: shards behind URLs and data sets of the Hub, by `datasets` in streaming mode.

A list of images resumes at the very next one (`sampling`). A stream does not: a resumed run goes on with a new pass in another
order, and says so.
"""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .archives import expand_braces
from .decode import ImageError, ImageLike
from .loader import Loader
from .sampling import Candidate, DataError, Sample, check_share, first_good, sample_seed
from .sources import KeptImages
from .tables import find_columns, find_image

_BUILDERS = {".tar": "webdataset", ".gz": "webdataset", ".tgz": "webdataset", ".parquet": "parquet"}
_logger = logging.getLogger(__name__)


class ImageStream:
    """Images in shards, read in order, of a `datasets.IterableDataset`; `length` is None where it is not known."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name, self._columns = name, list[str]()
        if dataset.features is not None:
            self._columns = find_columns(dataset.features.arrow_schema)[0]
            if not self._columns:
                raise ValueError(f"{name} must have a column of images, got {', '.join(dataset.features)}")
            dataset = dataset.decode(False)  # encoded: one reader of images for all
        self.dataset = dataset
        known = (dataset.info.splits or {}).get(str(dataset.split))
        self.length: int | None = getattr(known, "num_examples", None) or None

    def read(self, dataset: Any) -> Iterator[tuple[str, Callable[[], ImageLike]]]:
        """Yield the name of each row of `dataset`, this stream's or a part of it, and what returns its image."""
        try:
            for number, row in enumerate(dataset):
                name = f"{self.name}#{number}"
                if "__key__" in row:  # of a tar
                    name = f"{PurePosixPath(_shown(row['__url__'])).name}/{row['__key__']}"
                yield name, partial(self._image, name, row)
        except Exception as error:  # `datasets` has tried again by itself
            raise DataError(_shown(f"{self.name} cannot be read on: {type(error).__name__}: {error}")) from error

    def _image(self, name: str, row: Any) -> ImageLike:
        import fsspec  # with datasets

        try:
            image = find_image(row, self._columns)
            if isinstance(image, str) and "://" in image:  # as in a folder on the Hub
                with fsspec.open(image, "rb") as file:
                    image = file.read()
            return image
        except (ValueError, TypeError, KeyError, OSError) as error:  # a row without an image
            raise ImageError(name, str(error)) from error

    def first(self, count: int) -> KeptImages:
        """Read the images of the first `count` rows into memory, but for those that cannot be read; raise if there are none."""
        images = dict[str, ImageLike]()
        for name, image in itertools.islice(self.read(self.dataset), count):
            try:
                images[name] = image()
            except ImageError as error:
                _logger.warning("%s", error)
        if not images:
            raise ValueError(f"no image at the beginning of {self.name}")
        return KeptImages(list(images.values()), list(images))

    @cached_property
    def fingerprint(self) -> str:
        """Number of shards, and a hash of the first images: what tells this stream from others."""
        return f"stream-{self.dataset.num_shards}-{self.first(8).fingerprint}"

    def describe(self) -> str:
        """Return one line on what this is."""
        return f"a stream of {self.length or 'an unknown number of'} images in {self.dataset.num_shards} shards, {self.name}"


def open_stream(data: str) -> ImageStream:
    """Open a stream of images.

    Args:
        data: URLs of tar or Parquet files (`https://host/{000..099}.tar`, `hf://datasets/NAME/...`, what fsspec opens), or
            `hfids/NAME` or `hfids/NAME:SPLIT` for a data set of Hugging Face.

    Raises:
        ValueError: Another kind of file, or it cannot be opened.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('streams need datasets: pip install "mvmae[stream]"') from error
    if data.startswith("hfids/"):
        path, _, split = data.removeprefix("hfids/").partition(":")
        options: dict[str, Any] = {"path": path, "split": split or "train"}
    else:
        urls = expand_braces(data)
        kinds = {_BUILDERS.get(PurePosixPath(url.partition("?")[0]).suffix) for url in urls}
        if len(kinds) > 1 or None in kinds:
            raise ValueError(f"a stream must be hfids/NAME, or URLs of {' or '.join(_BUILDERS)} files, got {_shown(data)}")
        options = {"path": kinds.pop(), "data_files": {"train": urls}, "split": "train"}
    try:
        dataset = datasets.load_dataset(streaming=True, **options)
    except Exception as error:
        raise ValueError(_shown(f"{data} cannot be opened: {type(error).__name__}: {error}")) from error
    return ImageStream(dataset, _shown(data))


def stream_loader(
    stream: ImageStream,
    transform: Callable[..., Tensor],
    batch_size: int,
    *,
    seed: int = 0,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    max_bad: int = 100,
    shuffle_buffer: int = 2000,
    **loading: Any,
) -> Loader:
    """Load the batches of a run from a stream: pass after pass, each in another order of shards and images.

    Processes and workers share the shards; with fewer shards than processes, each takes every W-th image. A bad image is left
    out, and the next one takes its place. The same number of processes and workers gives the same batches. Where `start_step`
    is not 0, a new pass begins, which a warning says. Each worker draws the next image of `shuffle_buffer` encoded ones that
    it holds; the other arguments are those of `MultiViewDataset`, `StepSampler` and `Loader`.

    Raises:
        ValueError: Batch and processes do not fit.
    """
    from datasets.distributed import split_dataset_by_node

    check_share(batch_size, rank, world_size)
    if start_step and rank == 0:
        line = "%s: step %d begins a new pass in another order; what the interrupted pass had not reached comes with it"
        _logger.warning(line, stream.name, start_step + 1)
    order = sample_seed(seed, start_step) % 2**32  # the same in all processes, which split what it leads to
    own = split_dataset_by_node(stream.dataset.shuffle(order, buffer_size=shuffle_buffer), rank, world_size)
    share = batch_size // world_size
    views = StreamedViews(stream, own, transform, (seed, start_step, rank), share, num_steps - start_step, max_bad)
    return Loader(views, share, num_workers=min(num_workers, own.num_shards), **loading)


@dataclass
class StreamedViews(IterableDataset[Sample]):
    """The views of a process's part of a stream, pass after pass; each worker yields the samples of its own batches."""

    stream: ImageStream
    own: Any
    transform: Callable[..., Tensor]
    seeds: tuple[int, ...]
    batch_size: int
    steps: int
    max_bad: int

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        candidates = self._candidates(number)
        for _ in range(len(range(number, self.steps, workers)) * self.batch_size):
            yield first_good(candidates, self.transform)

    def _candidates(self, worker: int) -> Iterator[Candidate]:
        for epoch in itertools.count():
            self.own.set_epoch(epoch)
            seen = -1
            for seen, (name, image) in enumerate(self.stream.read(self.own)):
                yield name, seen, image, (*self.seeds, worker, epoch, seen)
            if seen < 0:
                raise DataError(f"{self.stream.name} holds no images for process {self.seeds[-1]}, worker {worker}")


def _shown(text: str) -> str:
    """Return a text on one line, without what may be secret in its URLs: a signature behind `?`, a user before `@`."""
    return " ".join(re.sub(r"://[^/@\s]*@", "://", re.sub(r"(://[^?\s'\"]*)\?[^\s'\"]*", r"\1", text)).split())
