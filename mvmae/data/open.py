"""One `--data` string, or any torch data set -> an `ImageSource`; folders, lists of paths, and the sample stand here."""

import contextlib
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Dataset

from .archives import find_archives, open_archives
from .decode import ImageLike, open_image
from .sources import (
    FileSource,
    ImageSource,
    KeptImages,
    SplitError,
    describe,
    describe_splits,
    extensions,
    find_splits,
    kind_of,
    split_of,
    split_words,
)
from .tables import DatasetSource

_RUN = (b"log.jsonl", b"checkpoint.pt")  # what the folder of a training run holds, beside pictures that are no data
_LFS = b"version https://git-lfs"
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_logger = logging.getLogger(__name__)


DATA_FORMATS = (
    "sample; a folder of images, flat or nested, with or without folders of splits (such as train and val) and of classes; "
    "a text list of paths (.txt); a file, a folder or a brace pattern of tar, Parquet or Arrow files; or a data set by its "
    "timm name and its folder (torch/cifar10:FOLDER, hfds/NAME)"
)
"""What a `--data` string may name."""


def open_images(data: "str | os.PathLike[str] | Dataset[Any] | ImageSource", *, split: str = "train") -> ImageSource:
    """Open a source of images.

    Args:
        data: One of `DATA_FORMATS`, or a torch data set.
        split: "train" or "val".

    Raises:
        ValueError: Nothing there, no images, or what may be splits or classes.
        SplitError: The data has no such split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
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
    if archives := _archives_of(path):
        return open_archives(archives, split)
    if path.is_dir():
        return _open_folder(path, split)
    if not path.exists():
        raise ValueError(f"no such folder, file or data set: {data} (the current folder is {Path.cwd()})")
    if path.name.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{path} is compressed, and images cannot be read from their place in it: gunzip it to a .tar file")
    if path.suffix != ".txt":
        raise ValueError(f"{path} is no folder, list of paths (.txt) or archive of images")
    return _open_list(path, split)


def _open_folder(root: Path, split: str) -> ImageSource:
    """Open all images below a folder, or in the folder of a split in it; sub-folders are classes if every image lies in one."""
    with os.scandir(root) as entries:
        folders = [entry.name for entry in entries if entry.is_dir() and _kind_of(entry) == "folder"]
    splits = {}
    if any(map(split_words, folders)):
        splits = find_splits([name for name in folders if split_of(name) or _holds_images(root / name)], root)
    if split != "train" and split not in splits:
        raise SplitError(f"{root} has no {split} split: make folders train and val in it")
    if not splits:
        return _open_images_below(root, Counter())
    folder = root / splits[split]
    with os.scandir(root) as entries:
        kinds = [_kind_of(entry) for entry in entries if entry.name not in splits.values()]
    passed = Counter(f"{kind} beside {folder.name}" for kind in kinds if kind in ("folder", "image"))
    archives = _archives_of(folder)
    source = open_archives(archives, "train") if archives else _open_images_below(folder, passed)
    source.splits = describe_splits(splits)
    return source


def _open_images_below(folder: Path, passed: "Counter[str]") -> FileSource:
    names = sorted(scan(folder, passed))
    line = describe(passed)
    if not names:
        looked = f"looked for archives and {' '.join(sorted(extensions()))}"
        raise ValueError(f"no images in {folder}: found {line or 'nothing'}; {looked}")
    source = FileSource(folder, names)
    inner: dict[bytes, set[str]] = {}
    for top, part in {tuple(name.split(b"/", 2)[:2]) for name in names if name.count(b"/") > 1}:
        inner.setdefault(top, set()).add(split_of(os.fsdecode(part)))
    for top, found in inner.items():
        if "train" in found and len(found - {"", "train"}):
            raise ValueError(f"{folder / os.fsdecode(top)} holds splits, but {folder} does not: name that, or put them on top")
    source.set_labels_by_folder(names)
    if line:
        _logger.warning("%s: passed over %s", folder, line)
        source.problems = (f"passed over {line}, without a reader",)
    return source


def _archives_of(path: Path) -> list[Path]:
    archives = find_archives(path)
    if archives and path.is_dir() and _holds_images(path):
        raise ValueError(f"{path} must hold images or archives, got both ({archives[0].name}, ...): name the archives")
    return archives


def _holds_images(folder: Path) -> bool:
    return next(scan(folder, Counter()), None) is not None


def _open_list(path: Path, split: str) -> FileSource:
    """Open a text file with one path a line, relative to the list's own folder; empty lines do not count."""
    lines = path.read_bytes().split(b"\n")
    names = [line.rstrip(b"\r") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} must name images, one path a line, relative to {path.parent}, got none")
    tops = [os.fsdecode(name.split(b"/", 1)[0]) if b"/" in name else "" for name in names]
    found = set(map(split_of, tops))
    splits = find_splits(filter(split_of, tops), path) if "train" in found and len(found - {"", "train"}) else {}
    if split != "train" and not splits:
        raise SplitError(f"{path} is one list without splits: no paths begin with train/ and val/")
    source = FileSource(path.parent, [name for name, top in zip(names, tops, strict=True) if top == splits.get(split, top)])
    source.splits = describe_splits(splits)
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
    path = os.fsencode(entry.path)
    kind = kind_of(os.fsencode(entry.name), lambda: _start_of(path))
    if kind != "hidden" and entry.is_dir():
        return "folder of a run" if any(os.path.exists(os.path.join(path, file)) for file in _RUN) else "folder"
    if kind != "hidden" and not entry.is_file():
        return "broken link" if entry.is_symlink() else "device"
    if kind == "image" and entry.stat().st_size < 1024 and _start_of(path).startswith(_LFS):
        return "Git LFS pointer (git lfs pull fetches the image)"
    return kind


def _start_of(path: bytes) -> bytes:
    """Return the first bytes of a file; none if it cannot be read, as is told when it is read as an image."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # of a FIFO, nothing
        return file.read(32) or b""
    return b""


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
            source = DatasetSource(getattr(getattr(dataset, "reader", None), "dataset", dataset))
            source.splits = "validation = test" if candidate == "test" else ""
            return source
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
    source.set_labels(labels, [Path(name).stem for name in PHOTOGRAPHS])
    return source
