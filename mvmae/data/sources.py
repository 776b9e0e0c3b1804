"""Sources: images by number, each with a name and perhaps a label; in files, in memory, or those of another source."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decode import ImageLike

_COMPARED, _START = 100, 2**16  # images whose content tells one source from another, and bytes of each


class ImageSource:
    """Images by number: `source[i]` is (what `open_image` takes, label or None).

    A new source gives its names to `__init__`, or has a `__len__` and a `name` of its own; `image(i)` returns image i, the
    same every time, in any process, and raises an `ImageError` if it cannot be read; labels go to `set_labels`; and what is
    left out is said in `problems`.

    Attributes:
        labels: (N,) int64, or None where images have no labels; `class_names[labels[i]]` is the class of image i.
        class_names: Names of the classes, each once.
        splits: Which names of the data were taken for its splits, if any.
        problems: What of the data is not used, such as a cut archive, one line each.
    """

    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    splits: str = ""
    problems: tuple[str, ...] = ()

    def __init__(self, names: Sequence[bytes] = ()) -> None:
        # one array: of a million Python strings, every worker would copy each page whose references it counts
        self._names = np.array(names, dtype=bytes)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[ImageLike, int | None]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.image(index), None if self.labels is None else int(self.labels[index])

    def image(self, index: int) -> ImageLike:
        """Return the image, still encoded if the source holds files."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the image's name, for messages."""
        return os.fsdecode(bytes(self._names[index]))

    def set_labels(self, labels: Any, names: Sequence[Any] = ()) -> None:
        """Set `labels` and `class_names` from numbers of classes, and the names that they count; without names, from numbers.

        Negative numbers stand for no class, as in test splits of Hugging Face: then no label is used.
        """
        labels = np.asarray(labels).astype(np.int64)  # a copy: those of Arrow cannot be written to
        if missing := np.count_nonzero(labels < 0):
            self.problems += (f"{missing} of {len(labels)} labels are empty: none is used",)
            return
        self.labels, self.class_names = labels, tuple(map(str, names))
        if labels.max(initial=-1) >= len(names):
            values, self.labels = np.unique(labels, return_inverse=True)
            self.class_names = tuple(map(str, values))
        if len(set(self.class_names)) < len(names):  # as the two cranes of ImageNet: a bird and a machine
            self.class_names = tuple(f"{name} ({number})" for number, name in enumerate(names))

    def set_labels_by_folder(self, names: Sequence[bytes]) -> None:
        """Take the first folder of each image's name for its class, if there are two or more and every image lies in one."""
        parts = [name.partition(b"/") for name in names]
        folders, numbers = np.unique(np.array([folder for folder, _, _ in parts], dtype=bytes), return_inverse=True)
        if len(folders) > 1 and all(rest for _, _, rest in parts):
            self.set_labels(numbers, [os.fsdecode(bytes(folder)) for folder in folders])

    @cached_property
    def fingerprint(self) -> str:
        """Count, and a hash of names and labels, and of sizes and first 64 KB of 100 images, spread evenly.

        Other data has another fingerprint; the same data in another place has the same.
        """
        digest = hashlib.blake2b(f"{self._names.dtype} {self.class_names}".encode(errors="surrogateescape"), digest_size=8)
        digest.update(self._names.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for number in spread(len(self), _COMPARED):
            try:
                digest.update(_start_of(self.image(number)))
            except Exception as error:  # a data set that opens images by itself can raise anything
                digest.update(type(error).__name__.encode())
        return f"{len(self)}-{digest.hexdigest()}"


class FileSource(ImageSource):
    """Files below a folder, by names relative to it."""

    def __init__(self, root: Path, names: Sequence[bytes]) -> None:
        super().__init__(names)
        self.root = root

    def image(self, index: int) -> ImageLike:
        """Return the file's path."""
        return self.name(index)

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, super().name(index))


class KeptImages(ImageSource):
    """Images in memory: arrays, or encoded files."""

    def __init__(self, images: Sequence[ImageLike], names: Sequence[str]) -> None:
        super().__init__([os.fsencode(name) for name in names])
        self._images = images

    def image(self, index: int) -> ImageLike:
        """Return the image."""
        return self._images[index]


def spread(length: int, count: int) -> list[int]:
    """Return at most `count` numbers below `length`, spread evenly."""
    count = min(length, count)
    return [number * length // count for number in range(count)]


def _start_of(image: ImageLike) -> bytes:
    """Return size and first bytes of an image's file, or of its pixels without a file."""
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):  # what may never answer is not opened
            return b"no file"
        with open(image, "rb") as file:
            return b"%d " % os.path.getsize(image) + file.read(_START)
    if not isinstance(image, bytes):
        pixels = np.asarray(image)
        image = f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()
    return b"%d " % len(image) + image[:_START]
