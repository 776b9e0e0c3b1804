"""Sources of images: what a source is, and the two simple ones, a folder and a text list.

Names are kept as one block of bytes, never as a list of a million Python objects, which every worker would copy when
Python counts references to them.
"""

import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .decode import EXTENSIONS, ImageLike

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test", "t10k")}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"\x93NUMPY")
_SIZES, _CONTENTS, _START = 10_000, 100, 2**16  # images whose size counts, whose first bytes do, and so many of these
_JUNK = ("__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # of systems, never data
_RUN = (b"log.jsonl", b"checkpoint.pt")  # what the folder of a training run holds
_logger = logging.getLogger(__name__)


class SplitError(ValueError):
    """The data can be read but has no such split."""


class Names(Sequence[bytes]):
    """Byte strings in one block, without a Python object for each."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self._block = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        start = int(self._ends[index - 1]) if index else 0
        return self._block[start : int(self._ends[index])]

    def digest(self) -> str:
        """Return a hash of the names and where each ends."""
        return hashlib.blake2b(self._block + self._ends.tobytes(), digest_size=8).hexdigest()


class ImageSource:
    """Images by number: `source[i]` is (what `open_image` takes, label or None).

    Attributes:
        labels: (N,) int64, or None where images have no labels.
        class_names: Names of the labels, where there are any.
        problems: Parts of the data that cannot be used, such as a cut archive, one line each.
        passed_over: Files of a folder that have no reader, counted by extension; empty where there are none.
    """

    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    passed_over: str = ""

    def __init__(self, names: Sequence[bytes]) -> None:
        self._names = names if isinstance(names, Names) else Names(names)

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
        return os.fsdecode(self._names[index])

    def size(self, index: int) -> int:
        """Return the size of the image's file in bytes; 0 without a file."""
        return 0

    @cached_property
    def fingerprint(self) -> str:
        """Count, and a hash of names, labels, the sizes of 10 000 files and the first 64 KB of 100 images, spread evenly.

        Other data has another fingerprint; the same data in another place has the same.
        """
        digest = hashlib.blake2b(f"{self._names.digest()} {self.class_names}".encode(errors="surrogateescape"), digest_size=8)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for index in _spread(len(self), _SIZES):
            digest.update(b"%d " % self.size(index))
        for index in _spread(len(self), _CONTENTS):
            digest.update(start_of(self, index))
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
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def size(self, index: int) -> int:
        """Return the size of the file in bytes; 0 if it cannot be found."""
        try:
            return os.stat(self.name(index)).st_size
        except OSError:
            return 0


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split: `train`, or `val` (`valid`, `validation`, `eval`, `test`); without these, root is `train`.

    Raises:
        SplitError: No such split.
    """
    folder = _subfolder(root, split) if _subfolder(root, "train") else root if split == "train" else None
    if folder is None:
        raise SplitError(f"{root} has no {split} split: make folders train and {' or '.join(SPLITS['val'])} in it")
    return folder


def open_folder(root: Path, split: str) -> FileSource:
    """Open all images below a folder; sub-folders are classes if every image lies in one.

    Skipped files are counted by extension, in one warning.

    Raises:
        ValueError: No image there.
        SplitError: No such split.
    """
    start = time.perf_counter()
    folder = split_folder(root, split)
    passed: Counter[str] = Counter()
    names = sorted(scan(folder, passed))
    others = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in passed.most_common())
    if not names:
        found = f"found {others}: no reader" if others else "found nothing"
        raise ValueError(f"no images in {folder}: {found}; looked for archives and {' '.join(sorted(EXTENSIONS))}")
    if others:
        _logger.warning("%s: passed over %s: no reader", folder, others)
    _logger.info("listed %d images in %s in %.1f s", len(names), folder, time.perf_counter() - start)
    splits = [f for f in (_subfolder(root, key) for key in SPLITS) if f] if folder != root else []
    empty = {entry.name for each in splits for entry in os.scandir(os.fsencode(each)) if entry.is_dir() and _is_data(entry)}
    classes = sorted(map(os.fsdecode, empty | {name.split(b"/", 1)[0] for name in names if b"/" in name}))
    labelled = len(classes) > 1 and all(b"/" in name for name in names)
    source = FileSource(folder, names, classes if labelled else None)
    source.passed_over = others
    return source


def open_list(path: Path) -> FileSource:
    """Open a text file with one path a line, relative to the list's own folder; empty lines do not count.

    Raises:
        ValueError: No line, or the first one's file is missing.
    """
    lines = path.read_bytes().split(b"\n")
    names = [line.rstrip(b"\r") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} must name images, one path a line, relative to {path.parent}, got none")
    source = FileSource(path.parent, names)
    if not os.path.exists(source.name(0)):
        number = next(number for number, line in enumerate(lines, 1) if line.strip())
        cure = "relative paths start at the folder of the list"
        raise ValueError(f"{path}, line {number}: no file {source.name(0)} ({cure})")
    return source


def scan(root: Path, passed: "Counter[str] | None" = None) -> Iterator[bytes]:
    """Yield the names of the images below a folder, relative to it; each folder is visited once, despite links.

    Hidden files, a system's own folders (`lost+found`) and those of training runs are skipped. A file without extension
    counts by its first bytes.

    Args:
        root: The folder.
        passed: Counts the other files by extension.
    """
    top = os.fsencode(root)
    seen: set[tuple[int, int]] = set()
    folders, linked = deque([b""]), deque[bytes]()  # links last, so that a file keeps its own folder's name
    while folders or linked:
        folder = (folders or linked).popleft()
        path = os.path.join(top, folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if not _is_data(entry):
                    continue
                if entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(name)
                elif entry.is_file() and _is_image(entry):
                    yield name
                elif entry.is_file() and passed is not None:
                    passed[os.path.splitext(os.fsdecode(entry.name))[1].lower()] += 1


def label_by_folder(names: Sequence[bytes], classes: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels by the first folder of each name, and the names of the classes."""
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    return np.array([number[name.split(b"/", 1)[0]] for name in names], dtype=np.int64), tuple(classes)


def _spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` numbers below `count`, spread evenly."""
    chosen = min(count, limit)
    return [number * count // chosen for number in range(chosen)]


def start_of(source: ImageSource, index: int) -> bytes:
    """Return the first bytes of an image's file, or of its pixels without a file; a note if it cannot be read."""
    try:
        image = source.image(index)
        if isinstance(image, (str, os.PathLike)):
            if not os.path.isfile(image):  # what may never answer is not opened
                return b"no file"
            with open(image, "rb") as file:
                return file.read(_START)
        if not isinstance(image, bytes):
            pixels = np.asarray(image)
            image = f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()
        return image[:_START]
    except Exception as error:  # a data set that opens images by itself can raise anything
        return type(error).__name__.encode()


def has_image_extension(name: str) -> bool:
    """Return whether a file has the extension of an image, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_image(entry: "os.DirEntry[bytes]") -> bool:
    extension = os.path.splitext(entry.name)[1]
    if extension:
        return has_image_extension(os.fsdecode(entry.name))
    try:
        with open(entry.path, "rb") as file:
            return file.read(8).startswith(_MAGIC)
    except OSError:
        return False


def _is_data(entry: "os.DirEntry[bytes]") -> bool:
    """Return whether an entry is neither hidden, nor a system's, nor the folder of a run, which holds pictures."""
    if entry.name.startswith(b".") or os.fsdecode(entry.name) in _JUNK:
        return False
    return not (entry.is_dir() and any(os.path.exists(os.path.join(entry.path, name)) for name in _RUN))


def _subfolder(root: Path, split: str) -> Path | None:
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
