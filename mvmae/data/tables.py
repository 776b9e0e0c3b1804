"""Images in tables: Parquet and Arrow files of Hugging Face, IDX files such as MNIST's.

pyarrow reads the tables, NumPy the IDX files; what stands here checks them first. `datasets` would copy all of a Parquet file
to disk, whatever it unpacks to, and crash on a damaged Arrow file; torchvision reads no `.gz`, and has no words for a cut file.
"""

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decode import ImageError, ImageLike
from .folders import ImageSource
from .limits import check_memory
from .pixels import Pixels

TABLE = (".parquet", ".arrow")
_NAME = 100  # bytes that the name of an image takes while names are listed
_MAPPED = "use `hfds/FOLDER`, which maps images from disk"
_ROWS = 16  # of a Parquet file at once: one value, stored once, may stand in any number of rows
_logger = logging.getLogger(__name__)


class TableSource(ImageSource):
    """Images in Hugging Face tables: Parquet, held in memory, or Arrow files of `save_to_disk`, mapped from disk.

    The image column is the first of structures with `bytes`, or of bytes; labels are in an integer column `label`,
    `labels` or `fine_label`, if there is one without empty rows.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError('Parquet needs pyarrow: pip install "mvmae[train]"') from error
        tables = [_read_table(file) for file in files]
        table = pa.concat_tables(tables)
        if not table.num_rows:
            raise ValueError(f"no rows in {first_of(files)}")
        self._column, *label = table.column_names
        self._image = table.column(self._column)
        names = [f"{f.name}#{row}".encode() for f, t in zip(files, tables, strict=True) for row in range(t.num_rows)]
        super().__init__(names)
        if label and (missing := table.column(label[0]).null_count):
            self.problems = (
                f"{first_of(files)}: {missing} of {len(self)} labels in column {label[0]!r} are empty: none is used",
            )
            _logger.warning(self.problems[0])
        elif label:
            self.labels = table.column(label[0]).to_numpy().astype(np.int64)
            self.class_names = class_names(table.schema, label[0]) or tuple(map(str, np.unique(self.labels)))

    def image(self, index: int) -> ImageLike:
        """Return the encoded file.

        Raises:
            ImageError: The row holds none.
        """
        value = self._image[index].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise ImageError(self.name(index), f"no bytes in column {self._column!r}")
        encoded: bytes = value
        return encoded


class IdxSource(ImageSource):
    """An IDX file of images (N, H, W) bytes, and the file of labels beside it."""

    def __init__(self, images: Path) -> None:
        self._images = _read_idx(images, 3)
        super().__init__([f"{images.name}#{i}".encode() for i in range(len(self._images))])
        labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
        if labels != images and labels.exists():
            self.labels = _read_idx(labels, 1).astype(np.int64)
            if len(self.labels) != len(self):
                raise ValueError(f"{labels} holds {len(self.labels)} labels, {images} {len(self)} images")
            self.class_names = tuple(map(str, np.unique(self.labels)))

    def image(self, index: int) -> ImageLike:
        """Return the image as an array (H, W)."""
        image: Pixels = self._images[index]
        return image


def first_of(paths: Sequence[Path]) -> str:
    """Return the first of several files, and how many more there are, for messages."""
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _read_table(path: Path) -> Any:
    """Read the columns of images and of labels, and check every offset in them."""
    import pyarrow as pa

    try:
        schema, batches = _open_parquet(path) if path.suffix == ".parquet" else _open_arrow(path)
        columns, checked, rows = _wanted(schema, path), [], 0
        for batch in batches:
            checked.append(batch.select(columns))
            checked[-1].validate(full=True)  # or an offset that points elsewhere ends the process
            rows += batch.num_rows
            check_memory(pa.total_allocated_bytes() + _NAME * rows, str(path), _MAPPED)
        return pa.Table.from_batches(checked, pa.schema([schema.field(name) for name in columns], schema.metadata))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _open_parquet(path: Path) -> tuple[Any, Iterator[Any]]:
    """Return the schema, and batches of the columns of images and labels, which must fit into memory unpacked."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    columns = _wanted(file.schema_arrow, path)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    check_memory(sum(chunk.total_uncompressed_size for chunk in wanted), str(path), _MAPPED)
    return file.schema_arrow, file.iter_batches(batch_size=_ROWS, columns=columns)


def _open_arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(source)
        return file.schema, map(file.get_batch, range(file.num_record_batches))


def find_columns(schema: Any) -> tuple[list[str], list[str]]:
    """Return the names of the first column of images and of the column of labels, if a table has them."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_bytes(field.type)]
    labels = [n for n in ("label", "labels", "fine_label") if n in schema.names]
    return images[:1], [n for n in labels if pa.types.is_integer(schema.field(n).type)][:1]


def find_image(item: Any, columns: Sequence[str] = ("image", "img")) -> ImageLike:
    """Return the image of an item: itself, the first of (image, label, ...), or a column.

    Args:
        item: What a data set holds.
        columns: Names to look for first; after them, the first column that holds an image or its bytes is taken.

    Raises:
        ValueError: None of the item's columns is an image.
    """
    if isinstance(item, Mapping):
        named = [name for name in columns if name in item]
        named += [name for name, value in item.items() if _is_image(value)]
        if not named:
            raise ValueError(f"no image among the columns {', '.join(map(str, item))}")
        item = item[named[0]]
    elif isinstance(item, (tuple, list)):
        item = item[0]
    image: ImageLike = (item["bytes"] or item["path"]) if isinstance(item, Mapping) else item
    return image


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    return isinstance(value, (Image.Image, bytes)) or (hasattr(value, "shape") and len(value.shape) in (2, 3))


def _wanted(schema: Any, path: Path) -> list[str]:
    images, labels = find_columns(schema)
    if not images:
        raise ValueError(f"{path} must have a column of images (bytes), got {', '.join(schema.names)}")
    return images + labels


def class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Return the names of the classes that `datasets` records in a table; empty if there are none."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(info["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _read_idx(path: Path, dims: int) -> Pixels:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes([0, 0, 8, dims]) or len(header) < 4 + 4 * dims:
                raise ValueError(
                    f"{path} must be an IDX file of {dims}-dimensional bytes, and its header is another: get the file again"
                )
            shape = [int(n) for n in np.frombuffer(header, ">u4", dims, 4)]
            said = " x ".join(map(str, shape))
            if min(shape[1:], default=1) < 1:
                raise ValueError(f"{path} holds no pixels: its header says {said}")
            check_memory(math.prod(shape) + _NAME * shape[0], f"{path}, whose header says {said} bytes,", "use fewer images")
            values = np.frombuffer(file.read(math.prod(shape)), np.uint8)
            more = bool(file.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if more or len(values) != math.prod(shape):
        raise ValueError(f"{path} holds {'more than ' * more}{len(values)} bytes, its header says {said}")
    return values.reshape(shape)
