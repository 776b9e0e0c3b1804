"""One `--data` string, or any torch data set -> an `ImageSource`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .folders import SPLITS, FileSource, ImageSource, SplitError, open_folder, open_list
from .images import ImageLike
from .sample import SampleSource

__all__ = ["DatasetSource", "FileSource", "ImageSource", "SplitError", "open_images"]


class DatasetSource(ImageSource):
    """A torch data set whose items are images, (image, label, ...) or {"image": ..., "label": ...}.

    Labels are read from its `targets` or `labels` if it has them; its own transform should leave images as they are.
    """

    def __init__(self, dataset: "Dataset[Any]") -> None:
        if not hasattr(dataset, "__len__") or not hasattr(type(dataset), "__getitem__"):
            raise TypeError(f"{type(dataset).__name__} has no length or no index: only map-style data sets can resume")
        size = len(dataset)
        if not size:
            raise ValueError(f"{type(dataset).__name__} holds no images")
        super().__init__([])
        self._dataset, self._size = dataset, size
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is not None and np.shape(labels) == (size,):
            self.labels = np.asarray(labels, dtype=np.int64)
            self.class_names = tuple(map(str, getattr(dataset, "classes", np.unique(self.labels))))

    def __len__(self) -> int:
        return self._size

    def image(self, index: int) -> ImageLike:
        """The data set's image."""
        item = self._dataset[index]
        if isinstance(item, Mapping):
            item = item["image"]
        image: ImageLike = item[0] if isinstance(item, (tuple, list)) else item
        return image

    def name(self, index: int) -> str:
        """The data set's type and the image's number."""
        return f"{type(self._dataset).__name__}[{index}]"

    @property
    def fingerprint(self) -> str:
        """Count and type: what can be known without reading every image."""
        return f"{self._size}-{type(self._dataset).__name__}"


def open_images(data: "str | os.PathLike[str] | Dataset[Any] | ImageSource", *, split: str = "train") -> ImageSource:
    """Open a source of images.

    Args:
        data: `sample`; a folder of images; a text list of paths (.txt); or a torch data set.
        split: "train" or "val".

    Raises:
        ValueError: Nothing there, or no images.
        SplitError: The data has no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if isinstance(data, ImageSource):
        return data
    if not isinstance(data, (str, os.PathLike)):
        return DatasetSource(data)
    if data == "sample":
        return SampleSource(split)
    path = Path(data)
    if path.is_dir():
        return open_folder(path, split)
    if not path.exists():
        raise ValueError(f"no such folder or file: {path}")
    if split != "train":
        raise SplitError(f"{path} has no {split} split")
    if path.suffix == ".txt":
        return open_list(path)
    raise ValueError(f"{path} is no folder, list of paths (.txt) or archive of images")
