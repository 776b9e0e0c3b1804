"""One `--data` string, or any torch data set -> an `ImageSource`; folders, lists of paths, and the sample stand here."""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .archives import find_archives, open_archives
from .decode import ImageLike, open_image
from .sources import EXTENSIONS, SPLITS, FileSource, ImageSource, KeptImages, SplitError
from .tables import DatasetSource

_JUNK = (b"__MACOSX", b"lost+found", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information")  # of systems, never data
_RUN = (b"log.jsonl", b"checkpoint.pt")  # what the folder of a training run holds, beside pictures that are no data
_LFS = b"version https://git-lfs"
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_logger = logging.getLogger(__name__)


def open_images(data: "str | os.PathLike[str] | Dataset[Any] | ImageSource", *, split: str = "train") -> ImageSource:
    """Open a source of images.

    Args:
        data: `sample`; a folder of images, flat or nested, with or without `train` and `val` in it; a text list of
            paths (.txt); a file, a folder or a brace pattern of tar, Parquet or Arrow files; a timm data set name
            with its folder (`torch/cifar10:FOLDER`, `hfds/NAME`); or a torch data set.
        split: "train" or "val".

    Raises:
        ValueError: Nothing there, or no images.
        SplitError: The data has no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if isinstance(data, (str, os.PathLike)):
        return _open_path(os.fspath(data), split)
    if split != "train":
        raise SplitError(f"a {type(data).__name__} has no {split} split: pass another data set for it")
    return data if isinstance(data, ImageSource) else DatasetSource(data)


def is_stream(data: str) -> bool:
    """Return whether a `--data` string names a stream: a URL, or `hfids/` and a data set of Hugging Face."""
    return "://" in data or data.startswith("hfids/")


def _open_path(data: str, split: str) -> ImageSource:
    if data == "sample":
        return _open_sample(split)
    if is_stream(data):
        raise ValueError("a stream, of which images have no numbers: use files, or pretrain.py, adapt.py or open_stream")
    path = Path(data)
    if not path.exists() and data.startswith(("torch/", "hfds/")):
        return _open_timm(data, split)
    archives = find_archives(path)
    if path.is_dir():
        folders = {} if archives else split_folders(path)
        folder = path if archives else folders.get(split)
        if folder is None:
            raise SplitError(f"{path} has no {split} split: make folders train and val in it")
        if folder != path:
            archives, split = find_archives(folder), "train"
        if not archives:
            return open_folder(path, folder, folders.values())
        if next(scan(folder, Counter()), None):
            raise ValueError(f"{folder} must hold images or archives, got both ({archives[0].name}, ...): name the archives")
    if archives:
        return open_archives(archives, split)
    if not path.exists():
        raise ValueError(f"no such folder, file or data set: {data} (the current folder is {Path.cwd()})")
    if path.name.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{path} is compressed, and images cannot be read from their place in it: gunzip it to a .tar file")
    if path.suffix != ".txt":
        raise ValueError(f"{path} is no folder, list of paths (.txt) or archive of images")
    if split != "train":
        raise SplitError(f"{path} is one list without splits")
    return open_list(path)


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits: of `train` alone, which is root, where no folder is called `train` or alike."""
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): root / entry.name for entry in entries if entry.is_dir()}
    found = {split: [folders[name] for name in names if name in folders] for split, names in SPLITS.items()}
    return {split: places[0] for split, places in found.items() if places} if found["train"] else {"train": root}


def open_folder(root: Path, folder: Path, splits: Iterable[Path]) -> FileSource:
    """Open all images below a folder; sub-folders are classes if every image lies in one.

    What is not read is counted by kind, in one warning.

    Args:
        root: The folder that the user named.
        folder: The folder of the split in it, or root itself.
        splits: The folders of all splits.

    Raises:
        ValueError: No image there.
    """
    passed: Counter[str] = Counter()
    names = sorted(scan(folder, passed))
    classes = {os.fsdecode(name.split(b"/", 1)[0]) for name in names if b"/" in name}
    if folder != root:
        for place in splits:  # both splits number the classes alike, also where one has no image of a class
            classes |= {entry.name for entry in os.scandir(place) if _kind_of(entry) == "folder"}
        known = {name for names in SPLITS.values() for name in names}
        others = [entry for entry in os.scandir(root) if _kind_of(entry) == "folder" and entry.name.lower() not in known]
        passed += Counter({f"folder beside {folder.name}": len(others)})  # classes, of which one is called train
    passed_over = ", ".join(f"{count} {kind}" for kind, count in passed.most_common())
    if not names:
        looked = f"looked for archives and {' '.join(sorted(EXTENSIONS))}"
        raise ValueError(f"no images in {folder}: found {passed_over or 'nothing'}; {looked}")
    source = FileSource(folder, names, sorted(classes) if len(classes) > 1 and all(b"/" in name for name in names) else None)
    if passed_over:
        _logger.warning("%s: passed over %s", folder, passed_over)
        source.problems = (f"passed over {passed_over}, without a reader",)
    return source


def open_list(path: Path) -> FileSource:
    """Open a text file with one path a line, relative to the list's own folder; empty lines do not count."""
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

    What is passed over is counted by kind: hidden files, other extensions, broken links, Git LFS pointers.
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


def _open_timm(data: str, split: str) -> DatasetSource:
    """Open a timm data set by name, without timm's own readers, which skip bad files silently."""
    from timm.data import create_dataset

    name, _, root = data.partition(":")
    if name.startswith("torch/") and not root:
        raise ValueError(f"{data} must name its folder: write {name}:FOLDER")
    error: Exception | None = None
    for candidate in ["train"] if split == "train" else ["validation", "test", "val"]:
        try:
            dataset = create_dataset(name, root=root or None, split=candidate, input_img_mode=None)
            return DatasetSource(getattr(getattr(dataset, "reader", None), "dataset", dataset))
        except (ValueError, RuntimeError, OSError, AssertionError, ImportError) as caught:
            error = error or caught
    missing = split != "train" and "unknown split" in str(error).lower()  # as Hugging Face calls it
    kind = SplitError if missing else ValueError
    raise kind(f"{data} cannot be opened as split {split}: {' '.join(str(error).split())}") from error


def _open_sample(split: str) -> KeptImages:
    """Open tiles of 14 photographs of scikit-image, labelled by photograph, so that nothing is downloaded.

    A photograph is cut into 10 x 10 tiles of its own pixels (30 x 45 to 141 x 141 pixels, most 51 x 51) that share none: 64 to
    train on, and 36, always the same, held out.
    """
    try:
        import skimage
    except ImportError as error:
        raise ImportError('the sample photographs come with scikit-image: pip install "mvmae[train]"') from error
    rng = Random(0)  # noqa: S311
    tiles: list[ImageLike] = []
    names, labels = [], []
    for label, photograph in enumerate(PHOTOGRAPHS):
        pixels = open_image(Path(skimage.__file__).parent / "data" / photograph).decode(decoder="pillow")
        height, width = (side // 10 for side in pixels.shape[:2])
        held_out = set(rng.sample(range(100), 36))
        for tile in range(100):
            if (tile in held_out) == (split == "val"):
                top, left = tile // 10 * height, tile % 10 * width
                tiles.append(pixels[top : top + height, left : left + width])
                names.append(f"{photograph}#{tile}")
                labels.append(label)
    source = KeptImages(tiles, names)
    source.labels, source.class_names = np.array(labels, dtype=np.int64), tuple(Path(name).stem for name in PHOTOGRAPHS)
    return source
