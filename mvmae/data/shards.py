"""The shards of a stream, each read in order from any place: tar files behind URLs, data sets of Hugging Face, iterables."""

import gzip
import logging
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from .archives import TAR, Header, expand_braces
from .decode import ImageError, ImageLike
from .folders import has_image_extension
from .limits import most_bytes
from .remote import PAUSES, open_url, shown
from .sampling import DataError
from .tables import find_image

ImageOrError: TypeAlias = "ImageLike | ImageError"
"""An image, or why it cannot be used."""
_SCHEMES = ("http://", "https://", "file://")
_HUB = "hfids/"  # timm's name for a data set of Hugging Face that is streamed
_PIECE = 2**18
_logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where an image begins in its shard: its first byte, or 0 where a shard has none, and its number from 0 on.

    The first byte is -1 behind the last image of a damaged shard.
    """

    start: int = 0
    number: int = 0


class Item(NamedTuple):
    """An image of a shard, or why it cannot be used; its number, its name, and the place of the next one."""

    number: int
    name: str
    image: ImageOrError
    after: Place


class Shards:
    """Shards by number; what each holds is read in order.

    Attributes:
        names: Of the shards, for messages.
        length: Number of images in all shards; None: not known.
    """

    names: Sequence[str]
    length: int | None = None

    def read(self, shard: int, place: Place, own: tuple[int, int], epoch: int) -> Iterator[Item]:
        """Yield the images of a shard from a place on.

        Args:
            shard: Number of the shard.
            place: Of the first image.
            own: (i, n): image k is yielded if k modulo n is i, the others are passed over.
            epoch: Number of the pass, for iterables that shuffle by themselves.

        Raises:
            DataError: The shard cannot be read.
        """
        raise NotImplementedError


class TarShards(Shards):
    """Tar files behind URLs, such as WebDataset's: every member with the extension of an image is one.

    Links are passed over. A damaged file, rather than one that is cut on the way, is one `ImageError` after its whole members.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        for url in urls:
            if not url.partition("?")[0].endswith(TAR):
                raise ValueError(f"a stream must be of tar files ({', '.join(TAR)}), got {shown(url)}")
        self._urls, self.names = list(urls), [shown(url) for url in urls]

    def read(self, shard: int, place: Place, own: tuple[int, int], epoch: int) -> Iterator[Item]:
        """Yield the encoded files; a compressed shard is read from its first byte on."""
        url, number, name = self._urls[shard], place.number, self.names[shard]
        compressed = not url.partition("?")[0].endswith(".tar")
        if place.start < 0:
            return

        def wanted(image: int) -> bool:
            return image >= number and image % own[1] == own[0]

        first, count = (0, 0) if compressed else place
        with open_url(url, first) as file:
            try:
                content = gzip.GzipFile(fileobj=file) if compressed else file
                for found, member, image, end in _images(content, name, count, wanted):
                    count = found + 1
                    if image is not None:
                        yield Item(found, member, image, Place(first + end, count))
            except DataError:
                raise
            except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
                if isinstance(error, OSError) and error.errno is not None:
                    raise DataError(f"{name} cannot be read: {error.strerror}") from error
                if count % own[1] == own[0]:
                    reason = f"damaged ({error}): its {count} whole images are used, the rest is lost"
                    yield Item(count, name, ImageError(name, reason), Place(-1, count + 1))


class HubShards(Shards):
    """A `datasets.IterableDataset`, by its own shards; its images are read as files, not decoded."""

    def __init__(self, dataset: Any, name: str = "") -> None:
        self._dataset = dataset.decode(False) if dataset.features is not None else dataset
        name = name or dataset.info.dataset_name or "IterableDataset"
        self.names = [f"{name}[{number}]" for number in range(dataset.num_shards)]
        splits = dataset.info.splits or {}
        self.length = getattr(splits.get(str(dataset.split)), "num_examples", None) or None

    def read(self, shard: int, place: Place, own: tuple[int, int], epoch: int) -> Iterator[Item]:
        """Yield the encoded files; where the connection fails, `datasets` tries again first, then this does."""
        number, pauses = place.number, iter(PAUSES)
        while True:
            rows = self._dataset.shard(num_shards=len(self.names), index=shard).skip(number)
            try:
                for row in rows:
                    item = _item_of(row, number, self.names[shard]) if number % own[1] == own[0] else None
                    item = item and item._replace(image=_fetch(item.image))
                    number, pauses = number + 1, iter(PAUSES)
                    if item is not None:
                        yield item
                return
            except Exception as error:
                lasting = not isinstance(error, OSError) or isinstance(error, FileNotFoundError | PermissionError)
                reason = f"{self.names[shard]} cannot be read from image {number} on: {type(error).__name__}: {error}"
                if lasting or (pause := next(pauses, None)) is None:
                    raise DataError(" ".join(reason.split())) from error
            _logger.warning("%s; trying again in %g s", reason, pause)
            time.sleep(pause)


class IterableShards(Shards):
    """Any iterable in one shard, such as a `torch.utils.data.IterableDataset`: every `iter` must yield the same images.

    Where it has `set_epoch`, that is called with the number of the pass, and the images must be the same for the same number.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        kind = type(iterable).__name__
        if iter(iterable) is iterable:
            raise ValueError(
                f"a stream must start anew with each iter(), got a {kind}, which can be read once: pass what made it"
            )
        self._iterable, self.names = iterable, [kind]
        self.length = len(iterable) if hasattr(type(iterable), "__len__") else None  # type: ignore[arg-type]

    def read(self, shard: int, place: Place, own: tuple[int, int], epoch: int) -> Iterator[Item]:
        """Yield images; those before the place are read too, and passed over."""
        if hasattr(self._iterable, "set_epoch"):
            self._iterable.set_epoch(epoch)
        number = 0
        try:
            for number, value in enumerate(self._iterable):
                if number >= place.number and number % own[1] == own[0]:
                    yield _item_of(value, number, self.names[0])
        except Exception as error:  # the user's own code
            reason = f"{self.names[0]} cannot be read from about image {number} on: {type(error).__name__}: {error}"
            raise DataError(" ".join(reason.split())) from error


def is_stream(data: str) -> bool:
    """Return whether a `--data` string names a stream: a URL, or `hfids/` and a data set of Hugging Face."""
    return "://" in data or data.startswith((_HUB, "pipe:"))


def open_shards(data: str) -> Shards:
    """Open what `is_stream` accepts.

    Raises:
        ValueError: Another kind of URL, or no such data set.
        ImportError: `datasets` is not installed.
    """
    if data.startswith("pipe:"):
        raise ValueError("pipe: would run a shell command, and is refused: name the shards by https://, http:// or file://")
    if not data.startswith(_HUB):
        urls = expand_braces(data)
        if wrong := [url for url in urls if not url.startswith(_SCHEMES)]:
            raise ValueError(f"a stream must begin with {', '.join(_SCHEMES)} or {_HUB}, got {shown(wrong[0])}")
        return TarShards(urls)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{data} needs datasets: pip install "mvmae[stream]"') from error
    name, _, split = data.removeprefix(_HUB).partition(":")
    try:
        return HubShards(datasets.load_dataset(name, split=split or "train", streaming=True), name)
    except Exception as error:
        raise ValueError(f"{data} cannot be opened: {type(error).__name__}: {' '.join(str(error).split())}") from error


def shards_of(data: Any) -> Shards:
    """Return the shards of a string, a `datasets.IterableDataset` or any other iterable."""
    if isinstance(data, str):
        return open_shards(data)
    is_hub = type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "num_shards")
    return HubShards(data) if is_hub else IterableShards(data)


def base_name(name: str) -> str:
    """Return a shard's name without where it lies."""
    return PurePosixPath(name).name


def _item_of(value: Any, number: int, shard: str) -> Item:
    """Return the image of what an iterable yields: an image, (image, ...), or named columns."""
    name, image = f"{shard}#{number}", value
    try:
        image = find_image(value)
    except ValueError as error:
        image = ImageError(name, str(error))
    return Item(number, name, image, Place(0, number + 1))


def _fetch(image: Any) -> Any:
    """Return the bytes of an image that is named by a URL, as in a folder on the Hub; any other image as it is."""
    if not isinstance(image, str) or "://" not in image:
        return image
    import fsspec

    with fsspec.open(image, "rb") as file:
        return file.read(most_bytes() + 1)  # one more is too many for the decoder


def _images(
    file: Any, shard: str, first: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, str, "bytes | ImageError | None", int]]:
    """Yield each whole image of a tar file: its number, its name, its content where it is wanted, and the byte behind it.

    Args:
        file: The tar file, which is read in order.
        shard: Its name.
        first: Number of its first image.
        wanted: Whether the image of a number is to be read.

    Raises:
        Exception: Of many kinds, where the file is damaged or has no mark at its end.
    """
    with tarfile.open(fileobj=file, mode="r|", tarinfo=Header, bufsize=_PIECE) as tar:
        stream: Any = tar.fileobj
        member, number = tar.next(), first
        while member is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps all it has met
            end, name = tar.offset, f"{shard}/{member.name}"
            is_image = member.isreg() and not member.issparse() and has_image_extension(name)
            content = _content(tar, member, name) if is_image and wanted(number) else None
            if stream.tell() < end:
                stream.seek(end - 1)
                if not stream.read(1):
                    raise EOFError("unexpected end of data")
            if is_image:
                yield number, name, content, end
                number += 1
            try:
                member = Header.fromtarfile(tar)  # unlike tar.next(), it tells a mark at the end from damage
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> "bytes | ImageError | None":
    """Read a member, unless it is too large for an image."""
    if member.size > most_bytes():
        return ImageError(name, f"{member.size} bytes, more than the {most_bytes()} that an image in a tar may have")
    content = tar.extractfile(member)
    return None if content is None else content.read()
