"""Rows with an image in them: Parquet and Arrow files, and data sets of torch, torchvision and Hugging Face.

pyarrow reads the files: `datasets` copies a Parquet file to disk, and dies of a damaged Arrow file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .decode import ImageError, ImageLike
from .sources import ImageSource


class TableSource(ImageSource):
    """Images in tables: Parquet, held in memory, or Arrow files of `save_to_disk`, mapped from disk.

    Raises:
        ValueError: A file cannot be read, or has no column of images or no rows.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError('Parquet needs pyarrow: pip install "mvmae[train]"') from error
        tables = [_read_table(file) for file in files]
        table = pa.concat_tables(tables)
        if not table.num_rows:
            raise ValueError(f"no rows in {files[0]}")
        self._column, *label = table.column_names
        self._image = table.column(0)
        super().__init__([f"{f.name}#{i}".encode() for f, t in zip(files, tables, strict=True) for i in range(t.num_rows)])
        for name in label:
            self.set_labels(table.column(name).fill_null(-1).to_numpy(), class_names(table.schema, name))

    def image(self, index: int) -> ImageLike:
        """Return the encoded file."""
        value = self._image[index].as_py()
        encoded: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ImageError(self.name(index), f"no bytes in column {self._column!r}")
        return encoded


class DatasetSource(ImageSource):
    """A data set with length and index whose items are images, (image, label, ...) or {"image": ..., "label": ...}.

    Of named columns, the image is `image` or `img`, else the first that holds images. Labels are the data set's `targets` or
    `labels`, or a label column of Hugging Face; the data set should not transform images.

    Raises:
        TypeError: No length or no index.
        ValueError: No images.
    """

    def __init__(self, dataset: "Dataset[Any] | Sequence[Any]") -> None:
        kind = type(dataset)
        if not hasattr(kind, "__len__") or getattr(kind, "__getitem__", None) in (None, Dataset.__getitem__):
            cure = "use one with __len__ and __getitem__, with which runs can resume, or open_stream"
            raise TypeError(f"the data set must have a length and an index, got {kind.__name__}: {cure}")
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError(f"{kind.__name__} holds no images")
        super().__init__()
        hub: Any = dataset
        self._columns, names = ["image", "img"], getattr(dataset, "classes", None)
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        features: Any = getattr(dataset, "features", None)
        if hasattr(features, "arrow_schema"):  # of Hugging Face
            images, label = find_columns(features.arrow_schema)
            self._columns += images
            for name in images:  # encoded: one reader for all
                if hasattr(features[name], "decode"):
                    hub = hub.cast_column(name, type(features[name])(decode=False))
            for name in label:
                column = hub.select_columns(name).with_format("arrow")[:].column(name)
                labels, names = column.fill_null(-1).to_numpy(), class_names(features.arrow_schema, name)
        self._dataset = hub
        if labels is not None and np.shape(labels) == (len(hub),) and np.asarray(labels).dtype.kind in "iu":
            self.set_labels(labels, names or ())

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> ImageLike:
        """Return the data set's image."""
        return find_image(self._dataset[index], self._columns)

    def name(self, index: int) -> str:
        """Return the data set's type and the image's number."""
        return f"{type(self._dataset).__name__}[{index}]"


def find_columns(schema: Any) -> tuple[list[str], list[str]]:
    """Return the columns of a table that hold images and labels, each one name or none.

    Images are the first structures with `bytes`, or bytes; labels are integers called `label`, `labels` or `fine_label`.
    """
    import pyarrow.types as of

    def holds_bytes(kind: Any) -> bool:
        inner = [kind.field(i).name for i in range(kind.num_fields)] if of.is_struct(kind) else []
        return "bytes" in inner or of.is_binary(kind) or of.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    labels = [n for n in ("label", "labels", "fine_label") if n in schema.names and of.is_integer(schema.field(n).type)]
    return images[:1], labels[:1]


def find_image(item: Any, columns: Sequence[str]) -> ImageLike:
    """Return the image of an item: itself, the first of (image, label, ...), or of these columns, or of all that are images."""
    if isinstance(item, Mapping):
        named = [name for name in columns if name in item] + [name for name, value in item.items() if _is_image(value)]
        if not named:
            raise ValueError(f"no image among the columns {', '.join(map(str, item))}")
        item = item[named[0]]
    elif isinstance(item, (tuple, list)):
        item = item[0]
    image: ImageLike = (item["bytes"] or item["path"]) if isinstance(item, Mapping) else item
    return image


def class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Return the names of the classes that `datasets` records in a table; empty if there are none."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(info["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    return isinstance(value, (Image.Image, bytes)) or (hasattr(value, "shape") and len(value.shape) in (2, 3))


def _read_table(path: Path) -> Any:
    """Read the columns of images and of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=_wanted(pq.read_schema(path), path), partitioning=None)
        else:
            source = pa.memory_map(str(path))
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:  # not a stream: a file
                table = pa.ipc.open_file(source).read_all()
            table = table.select(_wanted(table.schema, path))
        table.validate(full=True)  # or a damaged offset ends the process
        return table
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _wanted(schema: Any, path: Path) -> list[str]:
    images, labels = find_columns(schema)
    if not images:
        raise ValueError(f"{path} must have a column of images (bytes), got {', '.join(schema.names)}")
    return images + labels
