"""Features of images on a disk: in parts while they are computed, each written as a whole, then in one file.

Shapes: N images, n of a part, D width of a feature.
"""

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mvmae.data import ImageSource
from mvmae.weights import replace_file, write_text

Features = NDArray[np.float32]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def one_line(text: str) -> str:
    """Return a text on one line: what cannot be printed is escaped."""
    return repr(text)[1:-1]


class Parts:
    """The parts of a file of features, in a folder beside it; ``of`` says what they are of, and other parts are foreign."""

    def __init__(self, folder: Path, of: str) -> None:
        self.folder, self.of = folder / "features-parts", of

    def path(self, rows: range) -> Path:
        """Return the path of a part."""
        return self.folder / f"{rows.start:012}.npz"

    def write(self, rows: range, features: Features, bad: dict[int, str]) -> None:
        """Save the features of consecutive images, (n, D), and why some of them cannot be read, by their rows in the file."""
        content = io.BytesIO()
        np.savez(content, features=features, of=np.array(self.of), bad=np.array(json.dumps(bad)))
        replace_file(self.path(rows), lambda path: path.write_bytes(content.getvalue()))

    def read(self, rows: range) -> tuple[Features, dict[int, str]]:
        """Read a part, or raise a `ValueError` that names the file if it is damaged, foreign or of another size."""
        try:
            with self.path(rows).open("rb") as file, np.load(file) as saved:  # a zip archive, whose checksums are checked
                features, bad, of = saved["features"], json.loads(str(saved["bad"])), str(saved["of"])
        except Exception as error:  # damaged bytes can raise anything
            raise ValueError(f"{self.path(rows)} is damaged") from error
        if of != self.of:
            raise ValueError(f"{self.path(rows)} is of another model or other images")
        if features.ndim != 2 or len(features) != len(rows) or features.dtype != np.float32:
            raise ValueError(
                f"{self.path(rows)} holds {features.dtype} {features.shape} in place of {len(rows)} rows of float32"
            )
        return features, {int(row): reason for row, reason in bad.items()}

    def delete(self) -> None:
        """Delete all parts, and what a killed process left of one."""
        for file in (*self.folder.glob("*.npz"), *self.folder.glob(".*.npz.*.part")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def write_array(path: Path, source: ImageSource, parts: Iterable[tuple[range, Features]]) -> None:
    """Write features as one array, (N, D), mapped into memory, and the images' names in ``names.txt`` beside it."""

    def write(new: Path) -> None:
        array: Any = None
        for rows, features in parts:
            if array is None:
                create: Any = np.lib.format.open_memmap  # without types before numpy 2.3
                array = create(new, mode="w+", dtype=np.float32, shape=(len(source), features.shape[1]))
            array[rows.start : rows.stop] = features
        array.flush()

    write_text(path.with_name("names.txt"), "".join(f"{one_line(source.name(index))}\n" for index in range(len(source))))
    replace_file(path, write)


def write_table(path: Path, source: ImageSource, parts: Iterable[tuple[range, Features]]) -> None:
    """Write a Parquet file with columns name, features and, for labelled images, label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tables() -> Iterator[Any]:
        for rows, features in parts:
            names = [source.name(index).encode("utf-8", "backslashreplace").decode() for index in rows]
            columns = {"name": pa.array(names, pa.string())}
            columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
            if source.labels is not None:
                columns["label"] = pa.array(source.labels[rows.start : rows.stop], pa.int64())
            yield pa.table(columns)

    def write(new: Path) -> None:
        rest = tables()
        first = next(rest)
        with pq.ParquetWriter(new, first.schema) as writer:
            for table in itertools.chain([first], rest):
                writer.write_table(table)

    replace_file(path, write)
