"""One `--data` string, or any torch data set -> an `ImageSource`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from .archives import find_archives, open_archives
from .decode import ImageLike
from .folders import SPLITS, FileSource, ImageSource, SplitError, open_folder, open_list, scan, split_folder
from .remote import shown
from .sample import SampleSource
from .shards import is_stream
from .tables import class_names, find_columns, find_image

__all__ = ["DatasetSource", "FileSource", "ImageSource", "RepeatedSource", "SplitError", "open_images"]

_TIMM = ("torch/", "hfds/", "tfds/", "wds/")


class DatasetSource(ImageSource):
    """A data set with length and index whose items are images, (image, label, ...) or {"image": ..., "label": ...}.

    Of named columns, the image is `image` or `img`, else the first that holds images or their bytes. Labels are read from the
    data set's `targets` or `labels`, or from a label column of Hugging Face; the data set should not transform images. Streams
    that also have length and index (litdata, mosaicml-streaming) are read by index. Open them before processes join: their
    length may be that of one process's part.

    Raises:
        TypeError: No length or no index.
        ValueError: No images.
    """

    def __init__(self, dataset: "Dataset[Any]") -> None:
        kind = type(dataset)
        if not hasattr(kind, "__len__") or getattr(kind, "__getitem__", None) in (None, Dataset.__getitem__):
            cure = "use one with __len__ and __getitem__, with which runs can resume, or open_stream"
            raise TypeError(f"the data set must have a length and an index, got {kind.__name__}: {cure}")
        whole = getattr(dataset, "size", None) if isinstance(dataset, IterableDataset) else None
        size = whole if isinstance(whole, int) else len(dataset)  # type: ignore[arg-type]
        if not size:
            raise ValueError(f"{kind.__name__} holds no images")
        super().__init__([])
        self._dataset, self._size = dataset, size
        schema = getattr(getattr(dataset, "features", None), "arrow_schema", None)  # of Hugging Face
        images, label = ([], []) if schema is None else find_columns(schema)
        self._columns = ["image", "img", *images]
        labels = dataset.with_format("numpy")[label[0]][:] if label else None  # type: ignore[attr-defined]
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None)) if labels is None else labels
        if labels is not None and np.shape(labels) == (size,) and np.asarray(labels).dtype.kind in "iu":
            self.labels = np.asarray(labels, dtype=np.int64)
            named = class_names(schema, label[0]) if label else getattr(dataset, "classes", None)
            self.class_names = tuple(map(str, named or np.unique(self.labels)))

    def __len__(self) -> int:
        return self._size

    def image(self, index: int) -> ImageLike:
        """Return the data set's image.

        Raises:
            ValueError: None of the item's columns is one.
        """
        return find_image(self._dataset[index], self._columns)

    def name(self, index: int) -> str:
        """Return the data set's type and the image's number."""
        return f"{type(self._dataset).__name__}[{index}]"


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


def _open_path(data: str, split: str) -> ImageSource:
    if data == "sample":
        return SampleSource(split)
    if is_stream(data):
        raise ValueError(f"{shown(data)} is a stream, which pretrain.py and adapt.py take: use files, or in Python open_stream")
    path = Path(data)
    if not path.exists() and data.startswith(_TIMM):
        return _open_timm(data, split)
    folder = split_folder(path, split) if path.is_dir() and not find_archives(path) else path
    archives = find_archives(folder)
    if archives and path.is_dir() and next(scan(folder), None):
        raise ValueError(
            f"{folder} must hold images or archives, got both ({archives[0].name}, ...): name the archives, or move them"
        )
    if archives:
        return open_archives(archives, split if folder == path else "train")
    if path.is_dir():
        return open_folder(path, split)
    if not path.exists():
        raise ValueError(f"no such folder, file or data set: {data} (the current folder is {Path.cwd()})")
    if path.suffix != ".txt":
        raise ValueError(f"{path} is no folder, list of paths (.txt) or archive of images")
    if split != "train":
        raise SplitError(f"{path} is one list without splits")
    return open_list(path)


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
