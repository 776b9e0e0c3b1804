"""Features of images on a disk: in parts while they are computed, each written as a whole, then in one file.

Shapes: N images, n of a part, D width of a feature.
"""

import contextlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.ends import Stop
from mvmae.data import ImageSource
from mvmae.data.loader import escape
from mvmae.weights import replace_file, write_text

Part = tuple[NDArray[np.float32], dict[int, str]]
"""Features of consecutive images (n, D), and the reason for each of them that cannot be read, by its row in the whole file."""
Parts = Iterator[tuple[range, NDArray[np.float32]]]


def part_file(folder: Path, rows: range) -> Path:
    """Return the file of a part."""
    return folder / "features-parts" / f"{rows.start:012}.npz"


def write_part(folder: Path, rows: range, part: Part) -> None:
    """Save a part as a whole."""
    features, bad = part
    content: dict[str, Any] = {"features": features, "bad": np.array(list(bad), dtype=np.int64)}
    content["reasons"] = np.array([reason.encode("utf-8", "backslashreplace") for reason in bad.values()], dtype=np.bytes_)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **content)

    replace_file(part_file(folder, rows), write)


def read_part(folder: Path, rows: range) -> Part | None:
    """Read a part; None where there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with part_file(folder, rows).open("rb") as file, np.load(file) as saved:
            bad = zip(saved["bad"].tolist(), saved["reasons"].tolist(), strict=True)
            part = saved["features"], {row: reason.decode() for row, reason in bad}
        return part if part[0].ndim == 2 and len(part[0]) == len(rows) else None
    return None


def read_parts(folder: Path, parts: Iterable[range]) -> Iterator[tuple[range, Part]]:
    """Yield all parts.

    Raises:
        Stop: if one is missing or damaged.
    """
    for rows in parts:
        if (part := read_part(folder, rows)) is None:
            cure = "put the output folder on a disk that all processes share, or compute it again with --resume"
            raise Stop(f"{part_file(folder, rows)} is missing or damaged: {cure}", 1)
        yield rows, part


def delete_parts(folder: Path, parts: Iterable[range]) -> None:
    """Delete the parts, and what a killed process left of one."""
    inside = folder / "features-parts"
    for file in (*(part_file(folder, rows) for rows in parts), *inside.glob(".*.npz.*.part")):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        inside.rmdir()


def write_bad(folder: Path, source: ImageSource, bad: Mapping[int, str]) -> None:
    """List the images that cannot be read in ``bad_files.txt``, if there are any: a name, a tab and the reason on each line."""
    if bad:
        lines = (f"{escape(source.name(row))}\t{escape(reason)}\n" for row, reason in sorted(bad.items()))
        write_text(folder / "bad_files.txt", "".join(lines))


def write_array(path: Path, source: ImageSource, parts: Parts) -> int:
    """Write features as one array, (N, D), mapped into memory, and their names in ``names.txt`` beside it; return D."""

    def write_names(new: Path) -> None:
        with new.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(f"{escape(source.name(index))}\n" for index in range(len(source)))

    def write(new: Path) -> None:
        array: Any = None
        for rows, features in parts:
            if array is None:
                shape = len(source), features.shape[1]
                create: Any = np.lib.format.open_memmap  # without types before numpy 2.3
                array = create(new, mode="w+", dtype=np.float32, shape=shape)
            array[rows.start : rows.stop] = features
        array.flush()
        widths.append(array.shape[1])

    widths: list[int] = []
    replace_file(path.with_name("names.txt"), write_names)
    replace_file(path, write)
    return widths[0]


def write_table(path: Path, source: ImageSource, parts: Parts) -> int:
    """Write a Parquet file with columns name, features and, for labelled images, label; return D."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(new: Path) -> None:
        with contextlib.ExitStack() as stack:
            for rows, features in parts:
                names = [source.name(index).encode("utf-8", "backslashreplace").decode() for index in rows]
                lists = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
                columns = {"name": pa.array(names, pa.string()), "features": lists}
                if source.labels is not None:
                    columns["label"] = pa.array(source.labels[rows.start : rows.stop], pa.int64())
                table = pa.table(columns)
                if not widths:
                    writer = stack.enter_context(pq.ParquetWriter(new, table.schema))
                    widths.append(features.shape[1])
                writer.write_table(table)

    widths: list[int] = []
    replace_file(path, write)
    return widths[0]
