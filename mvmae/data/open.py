"""One `--data` string, or any torch data set -> an `ImageSource`."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .archives import TarSource, first_of, open_idx
from .decode import ImageLike, open_image
from .sources import SPLITS, ImageSource, KeptImages, SplitError, open_folder, open_list, scan, split_folder
from .tables import DatasetSource, TableSource

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_TIMM = ("torch/", "hfds/", "tfds/", "wds/")


def open_images(data: "str | os.PathLike[str] | Dataset[Any] | ImageSource", *, split: str = "train") -> ImageSource:
    """Open a source of images.

    Args:
        data: `sample`; a folder of images, flat or nested, with or without `train` and `val` in it; a text list of
            paths (.txt); a file, a folder or a brace pattern of tar, Parquet, Arrow or IDX files; a timm data set name
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
    if not path.exists() and data.startswith(_TIMM):
        return _open_timm(data, split)
    folder = split_folder(path, split) if path.is_dir() and not find_archives(path) else path
    archives = find_archives(folder)
    if archives and path.is_dir() and next(scan(folder, Counter()), None):
        raise ValueError(f"{folder} must hold images or archives, got both ({archives[0].name}, ...): name the archives")
    if archives:
        return _open_archives(archives, split if folder == path else "train")
    if path.is_dir():
        return open_folder(path, split)
    if not path.exists():
        raise ValueError(f"no such folder, file or data set: {data} (the current folder is {Path.cwd()})")
    if path.name.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{path} is compressed, and images cannot be read from their place in it: gunzip it to a .tar file")
    if path.suffix != ".txt":
        raise ValueError(f"{path} is no folder, list of paths (.txt) or archive of images")
    if split != "train":
        raise SplitError(f"{path} is one list without splits")
    return open_list(path)


def find_archives(path: Path) -> list[Path]:
    """Return the archives that a file, a folder or a pattern with braces ({000..012}, {a,b}) names; empty if none."""
    if path.is_dir():
        found = [path / name for name in sorted(os.listdir(path)) if _kind(name) and not name.startswith(".")]
        return found or sorted((path / "data").glob("*.parquet"))  # the layout of Hugging Face's repositories
    if path.is_file():
        return [path] if _kind(path.name) else []
    names = expand_braces(str(path))
    missing = [name for name in names if not os.path.exists(name)]
    if missing and len(names) > 1:
        raise ValueError(f"{len(missing)} of {len(names)} shards of {path} do not exist, the first is {missing[0]}")
    return [] if missing else [Path(name) for name in names]


def expand_braces(pattern: str) -> list[str]:
    """Expand braces: `a{0..2}` -> a0 a1 a2, `{x,y}` -> x y; leading zeros are kept."""
    choices = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if numbers := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = numbers.groups()
            choices.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        else:
            choices.append(part[1:-1].split(",") if part.startswith("{") and "," in part else [part])
    return ["".join(choice) for choice in product(*choices)]


def _open_archives(paths: Sequence[Path], split: str) -> ImageSource:
    """Open archives of one kind; those whose names begin with a split's (`train-0001.tar`) are that split."""
    marked = {key: [p for p in paths if p.name.lower().startswith(names)] for key, names in SPLITS.items()}
    if marked["train"]:
        chosen = marked[split]
    else:
        chosen = [p for p in paths if p not in marked["val"]] or list(paths) if split == "train" else marked["val"]
    if not chosen:
        raise SplitError(f"{first_of(paths)} has no {split} split: no name begins with {' or '.join(SPLITS[split])}")
    kinds = {_kind(path.name) for path in chosen}
    if len(kinds) > 1:
        raise ValueError(f"{first_of(chosen)} must be archives of one kind, got {', '.join(sorted(kinds))}: name those of one")
    kind = kinds.pop()
    if kind == "idx":
        images = [path for path in chosen if "labels" not in path.name]
        if len(images) != 1:
            raise ValueError(f"{first_of(chosen)} must hold one IDX file of images, got {len(images)}: name it")
        return open_idx(images[0])
    return TarSource(chosen) if kind == "tar" else TableSource(chosen)


def _kind(name: str) -> str:
    if name.endswith((".parquet", ".arrow")):
        return "table"
    return "tar" if name.endswith(".tar") else "idx" if re.search(r"idx[13]-ubyte(\.gz)?$", name) else ""


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
    missing = split != "train" and "unknown split" in str(error).lower()  # as Hugging Face and TensorFlow call it
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
