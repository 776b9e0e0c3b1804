"""Sources: images by number, each with a name and perhaps a label. Here: what a source is, folders, and lists of paths."""

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

from .decode import ImageError, ImageLike

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
    | {".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".npy"}
)
SPLITS = {
    "train": ("train", "training", "train_set", "trainset"),
    "val": ("val", "valid", "validation", "eval", "dev", "test", "testing", "test_set", "testset", "t10k"),
}
"""Names of folders, and beginnings of names of archives, in upper or lower case."""
_COMPARED, _START = 100, 2**16  # images whose content tells one source from another, and bytes of each
_JUNK = (b"__MACOSX", b"lost+found", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information")  # of systems, never data
_RUN = (b"log.jsonl", b"checkpoint.pt")  # what the folder of a training run holds, beside pictures that are no data
_LFS = b"version https://git-lfs"
_logger = logging.getLogger(__name__)


class SplitError(ValueError):
    """The data can be read but has no such split."""


class ImageSource:
    """Images by number: `source[i]` is (what `open_image` takes, label or None).

    Attributes:
        labels: (N,) int64, or None where images have no labels.
        class_names: Names of the labels, where there are any.
        problems: Parts of the data that cannot be used, such as a cut archive, one line each.
        passed_over: Files of a folder that are not read, counted by kind; empty where there are none.
    """

    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    passed_over: str = ""

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
        chosen = min(len(self), _COMPARED)
        for number in range(chosen):
            digest.update(_start_of(self, number * len(self) // chosen))
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

    def __init__(self, images: "Sequence[ImageLike | ImageError]", names: Sequence[str]) -> None:
        super().__init__([os.fsencode(name) for name in names])
        self._images = images

    def image(self, index: int) -> ImageLike:
        """Return the image.

        Raises:
            ImageError: It could not be read.
        """
        image = self._images[index]
        if isinstance(image, ImageError):
            raise image
        return image


class RepeatedSource(ImageSource):
    """Every image several times, with new crops each time, for a few huge images.

    Args:
        source: The images.
        times: How often an epoch holds each image.
    """

    def __init__(self, source: ImageSource, times: int) -> None:
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        super().__init__([])
        self._source, self._times = source, times
        self.class_names, self.problems, self.passed_over = source.class_names, source.problems, source.passed_over
        self.labels = None if source.labels is None else np.tile(source.labels, times)

    def __len__(self) -> int:
        return len(self._source) * self._times

    def image(self, index: int) -> ImageLike:
        """Return the source's image."""
        return self._source.image(index % len(self._source))

    def name(self, index: int) -> str:
        """Return the source's name of the image."""
        return self._source.name(index % len(self._source))

    @property
    def fingerprint(self) -> str:
        """The source's fingerprint, and the number of repetitions."""
        return f"{self._source.fingerprint}x{self._times}"


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits; none where no folder is called `train` or alike."""
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): root / entry.name for entry in entries if entry.is_dir()}
    found = {
        split: next(folders[name] for name in names if name in folders)
        for split, names in SPLITS.items()
        if folders.keys() & names
    }
    return found if "train" in found else {}


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split; where there are no splits, root is `train`.

    Raises:
        SplitError: No such split.
    """
    folders = split_folders(root)
    if not folders and split == "train":
        return root
    if split not in folders:
        raise SplitError(f"{root} has no {split} split: make folders train and val in it")
    return folders[split]


def open_folder(root: Path, split: str) -> FileSource:
    """Open all images below a folder; sub-folders are classes if every image lies in one.

    What is not read is counted by kind, in one warning.

    Raises:
        ValueError: No image there.
        SplitError: No such split.
    """
    start = time.perf_counter()
    folders, folder = split_folders(root), split_folder(root, split)
    passed: Counter[str] = Counter()
    names = sorted(scan(folder, passed))
    if folders:  # so that classes of which one is called train do not lose the others in silence
        known = {name for names in SPLITS.values() for name in names}
        others = [entry for entry in os.scandir(root) if _kind_of(entry) == "folder" and entry.name.lower() not in known]
        passed += Counter({f"folder beside {folder.name}": len(others)})
    passed_over = ", ".join(f"{count} {kind}" for kind, count in passed.most_common())
    if not names:
        looked = f"looked for archives and {' '.join(sorted(EXTENSIONS))}"
        raise ValueError(f"no images in {folder}: found {passed_over or 'nothing'}; {looked}")
    if passed_over:
        _logger.warning("%s: passed over %s", folder, passed_over)
    _logger.info("listed %d images in %s in %.1f s", len(names), folder, time.perf_counter() - start)
    classes = {os.fsdecode(name.split(b"/", 1)[0]) for name in names if b"/" in name}
    for place in folders.values():  # both splits number the classes alike, also where one has no image of a class
        classes |= {entry.name for entry in os.scandir(place) if _kind_of(entry) == "folder"}
    source = FileSource(folder, names, sorted(classes) if len(classes) > 1 and all(b"/" in name for name in names) else None)
    source.passed_over = passed_over
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


def scan(root: Path, passed: "Counter[str]") -> Iterator[bytes]:
    """Yield the names of the images below a folder, relative to it; each folder is visited once, despite links.

    Args:
        root: The folder.
        passed: Counts what is passed over, by kind: hidden files, other extensions, broken links, Git LFS pointers.
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
                kind = _kind_of(entry)
                if kind == "image":
                    yield os.path.join(folder, entry.name)
                elif kind == "folder":
                    (linked if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
                else:
                    passed[kind] += 1


def label_by_folder(names: Sequence[bytes], classes: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels by the first folder of each name, and the names of the classes."""
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    return np.array([number[name.split(b"/", 1)[0]] for name in names], dtype=np.int64), tuple(classes)


def _kind_of(entry: "os.DirEntry[bytes] | os.DirEntry[str]") -> str:
    """Return `image`, `folder`, or what else an entry is."""
    name = os.fsencode(entry.name)
    if name.startswith(b".") or name in _JUNK:
        return "hidden"
    if entry.is_dir():
        path = os.fsencode(entry.path)
        return "folder of a run" if any(os.path.exists(os.path.join(path, file)) for file in _RUN) else "folder"
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "device"
    extension = os.path.splitext(os.fsdecode(name))[1].lower()
    if extension not in EXTENSIONS:
        return extension or "without extension"
    if entry.stat().st_size < 1024:
        try:
            with open(entry.path, "rb") as file:
                if file.read(len(_LFS)) == _LFS:
                    return "Git LFS pointer (git lfs pull fetches the image)"
        except OSError:
            pass  # a bad image, which is named when it is read
    return "image"


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
