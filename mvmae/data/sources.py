"""Sources: images by number, each with a name and perhaps a label; in files, in memory, or those of another source."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .decode import ImageLike

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
    | {".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".npy"}
)
SPLITS = {
    "train": ("train", "training", "train_set", "trainset"),
    "val": ("val", "valid", "validation", "eval", "dev", "test", "testing", "test_set", "testset"),
}
"""Names of folders, and beginnings of names of archives, in upper or lower case."""
_COMPARED, _START = 100, 2**16  # images whose content tells one source from another, and bytes of each


class SplitError(ValueError):
    """The data can be read but has no such split."""


class ImageSource:
    """Images by number: `source[i]` is (what `open_image` takes, label or None).

    Attributes:
        labels: (N,) int64, or None where images have no labels.
        class_names: Names of the labels, where there are any.
        problems: What of the data is not used, such as a cut archive, one line each.
    """

    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def __init__(self, names: Sequence[bytes]) -> None:
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

    @cached_property
    def fingerprint(self) -> str:
        """Count, and a hash of names and labels, and of sizes and first 64 KB of 100 images, spread evenly.

        Other data has another fingerprint; the same data in another place has the same.
        """
        digest = hashlib.blake2b(f"{self._names.dtype} {self.class_names}".encode(errors="surrogateescape"), digest_size=8)
        digest.update(self._names.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        compared = min(len(self), _COMPARED)
        for number in range(compared):
            digest.update(_start_of(self, number * len(self) // compared))
        return f"{len(self)}-{digest.hexdigest()}"


class FileSource(ImageSource):
    """Files below a folder, by names relative to it."""

    def __init__(self, root: Path, names: Sequence[bytes], classes: Sequence[str] | None = None) -> None:
        super().__init__(names)
        self.root = root
        if classes is not None:
            self.labels, self.class_names = label_by_folder(names, classes)

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


def first_of(paths: Sequence[Path]) -> str:
    """Return the first of several files, and how many more there are, for messages."""
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def label_by_folder(names: Sequence[bytes], classes: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels by the first folder of each name, and the names of the classes."""
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    return np.array([number[name.split(b"/", 1)[0]] for name in names], dtype=np.int64), tuple(classes)


def _start_of(source: ImageSource, index: int) -> bytes:
    """Return size and first bytes of an image's file, or of its pixels without a file; a note if it cannot be read."""
    try:
        image = source.image(index)
        if isinstance(image, (str, os.PathLike)):
            if not os.path.isfile(image):  # what may never answer is not opened
                return b"no file"
            with open(image, "rb") as file:
                return b"%d " % os.path.getsize(image) + file.read(_START)
        if not isinstance(image, bytes):
            pixels = np.asarray(image)
            image = f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()
        return b"%d " % len(image) + image[:_START]
    except Exception as error:  # a data set that opens images by itself can raise anything
        return type(error).__name__.encode()
