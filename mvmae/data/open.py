"""One `--data` string, or any torch data set -> an `ImageSource`; folders, lists of paths, and the sample stand here."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .archives import TarSource, expand_braces
from .decode import ImageLike
from .files import describe, kind_of_entry, scan
from .formats import FORMATS
from .sources import FileSource, ImageSource, KeptImages
from .splits import SplitError, describe_splits, find_splits, split_of, split_words
from .tables import DatasetSource, TableSource

_ARCHIVES = (".tar", ".parquet", ".arrow")
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_logger = logging.getLogger(__name__)


def open_images(data: "str | os.PathLike[str] | Dataset[Any] | ImageSource", *, split: str = "train") -> ImageSource:
    """Open a source of images; what of it is not used is logged.

    Args:
        data: `sample`; a folder of images, flat or nested, with or without folders of splits (such as train and val) and of
            classes; a text list of paths (.txt); a file, a folder or a brace pattern of tar, Parquet or Arrow files; a data set
            by its timm name and its folder (torch/cifar10:FOLDER, hfds/NAME); or a torch data set.
        split: "train" or "val".

    Raises:
        ValueError: Nothing there, no images, or what may be splits or classes.
        SplitError: The data has no such split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if isinstance(data, (str, os.PathLike)):
        source = _open_path(os.fspath(data), split)
    elif split != "train":
        raise SplitError(f"a {type(data).__name__} has no {split} split: pass another data set for it")
    elif isinstance(data, ImageSource):
        return data
    else:
        source = DatasetSource(data)
    for line in source.problems:
        _logger.warning("%s: %s", data if isinstance(data, (str, os.PathLike)) else type(data).__name__, line)
    return source


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
    if archives := _find_archives(path):
        return _open_archives(archives, split)
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
        kinds = {entry.name: kind_of_entry(entry) for entry in entries}
    names = [name for name, kind in kinds.items() if kind == "folder"]
    if any(map(split_words, names)):
        names = [name for name in names if split_of(name) or _holds_images(root / name)]
    splits = find_splits(names, split, root)
    if not splits:
        return _open_images_below(root, Counter())
    chosen, beside = splits[split], [kind for name, kind in kinds.items() if name not in splits.values()]
    archives = _find_archives(root / chosen)
    passed = Counter(f"{kind} beside {chosen}" for kind in beside if kind in ("folder", "image"))
    source = _open_archives(archives, "train") if archives else _open_images_below(root / chosen, passed)
    source.splits = describe_splits(splits)
    return source


def _open_images_below(folder: Path, passed: "Counter[str]") -> FileSource:
    names = sorted(scan(folder, passed))
    line = describe(passed)
    if not names:
        raise ValueError(f"{folder} holds no images: {f'passed over {line}' if line else 'it is empty'}")
    source = FileSource(folder, names)
    inner: dict[bytes, set[str]] = {}
    for top, part in {tuple(name.split(b"/", 2)[:2]) for name in names if name.count(b"/") > 1}:
        inner.setdefault(top, set()).add(split_of(os.fsdecode(part)))
    for top, found in inner.items():
        if "train" in found and len(found - {"", "train"}):
            raise ValueError(f"{folder / os.fsdecode(top)} holds splits, but {folder} does not: name that, or put them on top")
    source.set_labels_by_folder(names)
    source.problems = (f"passed over {line}, without a reader",) if line else ()
    return source


def _holds_images(folder: Path) -> bool:
    return next(scan(folder, Counter()), None) is not None


def _open_list(path: Path, split: str) -> FileSource:
    """Open a text file with one path a line, relative to the list's own folder; empty lines do not count."""
    lines = path.read_bytes().split(b"\n")
    names = [line.rstrip(b"\r") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} must name images, one path a line, relative to {path.parent}, got none")
    tops = [os.fsdecode(name.split(b"/", 1)[0]) if b"/" in name else "" for name in names]
    found = {split_of(top) for top in tops} - {""}
    splits = find_splits(filter(split_of, tops) if "train" in found and len(found) > 1 else (), split, path)
    source = FileSource(path.parent, [name for name, top in zip(names, tops, strict=True) if top == splits.get(split, top)])
    source.splits = describe_splits(splits)
    if not os.path.exists(source.name(0)):
        number = next(number for number, line in enumerate(lines, 1) if line.strip())
        cure = "relative paths start at the folder of the list"
        raise ValueError(f"{path}, line {number}: no file {source.name(0)} ({cure})")
    return source


def _find_archives(path: Path) -> list[Path]:
    """Return the archives that a file, a folder or a pattern with braces ({000..012}, {a,b}) names; empty if none."""
    if path.is_dir():
        archives = sorted(entry for entry in path.iterdir() if entry.suffix in _ARCHIVES and not entry.name.startswith("."))
        archives = archives or sorted((path / "data").glob("*.parquet"))  # the layout of Hugging Face's repositories
        if archives and _holds_images(path):
            raise ValueError(f"{path} must hold images or archives, got both ({archives[0].name}, ...): name the archives")
        return archives
    if path.is_file():
        return [path] if path.suffix in _ARCHIVES else []
    names = expand_braces(str(path))
    missing = [name for name in names if not os.path.exists(name)]
    if missing and len(names) > 1:
        raise ValueError(f"{len(missing)} of {len(names)} shards of {path} do not exist, the first is {missing[0]}")
    return [] if missing else [Path(name) for name in names]


def _open_archives(paths: Sequence[Path], split: str) -> ImageSource:
    """Open archives of one kind: those of a split, where some have a name with its word in it, such as `train-0001.tar`."""
    words = [(split_words(path.stem) or [path.name])[0] for path in paths]
    several = len(set(map(split_of, words))) > 1  # else all are of one split: they were asked for
    splits = find_splits(words if several else (), split, paths[0].parent)
    paths = [path for path, word in zip(paths, words, strict=True) if word == splits.get(split, word)]
    if len({path.suffix == ".tar" for path in paths}) > 1:
        raise ValueError(f"{paths[0].parent} must hold archives of one kind, got tar files and tables: name those of one")
    source = TarSource(paths) if paths[0].suffix == ".tar" else TableSource(paths)
    source.splits = describe_splits(splits)
    return source


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
        pixels = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / photograph, formats=FORMATS).convert("RGB"))
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
