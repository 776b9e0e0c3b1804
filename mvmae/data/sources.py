"""Sources: images by number, each with a name and perhaps a label; in files, in memory, or those of another source."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .decode import ImageLike
from .formats import FORMATS

SPLITS = {
    "train": ("train", "training", "train_set", "trainset"),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing", "test_set", "testset"),
}
"""Names of splits, in upper or lower case: of folders, of the first folder in a list, and words in the names of archives."""
_JUNK = (b"__MACOSX", b"lost+found", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information")  # of systems, never data
_COMPARED, _START = 100, 2**16  # images whose content tells one source from another, and bytes of each


class SplitError(ValueError):
    """The data can be read but has no such split."""


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

    def set_labels(self, labels: Any, names: Sequence[Any] = (), what: str = "labels") -> None:
        """Set `labels` and `class_names` from numbers of classes, and the names that they count; without names, from numbers.

        Negative numbers stand for no class, as in test splits of Hugging Face: then no label is used.
        """
        labels = np.asarray(labels).astype(np.int64)  # a copy: those of Arrow cannot be written to
        if missing := np.count_nonzero(labels < 0):
            self.problems += (f"{missing} of {len(labels)} {what} are empty: none is used",)
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
            digest.update(_start_of(self, number))
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


def first_of(paths: Sequence[Path]) -> str:
    """Return the first of several files, and how many more there are, for messages."""
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


@cache
def extensions() -> frozenset[str]:
    """Return the extensions of files that are read: those of Pillow's `FORMATS`, and of NumPy."""
    known = Image.registered_extensions().items()
    return frozenset({extension for extension, kind in known if kind in (*FORMATS, "MPO")} | {".npy"})


def kind_of(name: bytes, start: Callable[[], bytes]) -> str:
    """Return `image`, `hidden`, or the extension of another file; without one, its first 32 bytes, `start()`, tell."""
    if any(part in _JUNK or (part.startswith(b".") and part not in (b".", b"..")) for part in name.split(b"/")):
        return "hidden"
    extension = os.path.splitext(os.fsdecode(name))[1].lower()
    if extension in extensions():
        return "image"
    if extension and not extension[1:].isdigit():
        return extension
    content = start()
    known = [Image.OPEN[kind][1] for kind in FORMATS] if len(content) == 32 else []
    return "image" if any(accept and accept(content) is True for accept in known) else "without extension"


def describe(passed: Counter[str]) -> str:
    """Return a line on what was passed over, by kind."""
    return ", ".join(f"{count} {kind}" for kind, count in passed.most_common())


def split_of(name: str) -> str:
    """Return the split, of `SPLITS`, that a whole name stands for; empty if none."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), "")


def split_words(name: str) -> list[str]:
    """Return the words of a name, in lower case, that stand for splits."""
    return [word for word in re.findall("[a-z]+", name.lower()) if split_of(word)]


def find_splits(names: Iterable[str], place: Path) -> dict[str, str]:
    """Return which of the names stand for `train` and `val`; empty if there are no splits.

    Without a validation split, the test split validates.

    Raises:
        ValueError: Two names for one split, or what may be a split or something else.
    """
    names = sorted(set(names))
    found = {split: [name for name in names if split_of(name) == split] for split in SPLITS}
    others = [name for name in names if not split_of(name)]
    if twice := next((same for same in found.values() if len(same) > 1), []):
        raise ValueError(f"{place} has two names for one split, {' and '.join(twice)}: rename or move one of them")
    train, val = found["train"], found["val"] or found["test"]
    if train and val:
        return {"train": train[0], "val": val[0]}
    cure = "give the splits the names train and val, or name the one that is meant"
    if (train or val) and others:
        known = (train + val)[0]
        raise ValueError(f"{place} holds {known} beside {others[0]}, so that {known} may be a split or a class: {cure}")
    if val:
        raise ValueError(f"{place} holds {val[0]} and no training split: name {place / val[0]} itself, or {cure}")
    kinds: dict[str, dict[str, str]] = {}  # what stays of a name without the split's -> split -> name
    for name in others:
        for word in split_words(name):
            kinds.setdefault(name.lower().replace(word, "", 1), {})[split_of(word)] = name
    for pair in kinds.values():
        if "train" in pair and len(pair) > 1:
            raise ValueError(f"{place} holds {' and '.join(pair.values())}, which may be splits or classes: {cure}")
    return {"train": train[0]} if train else {}


def describe_splits(splits: dict[str, str]) -> str:
    """Return a line on what was taken for which split, unless it is what they are called here."""
    if all(split == name for split, name in splits.items()):
        return ""
    return ", ".join(f"{'validation' if split == 'val' else split} = {name}" for split, name in splits.items())


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
