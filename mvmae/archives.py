"""Images inside files: tar and WebDataset shards, Parquet and Arrow tables of Hugging Face, IDX files such as MNIST's.

Nothing is unpacked to disk: a tar file is indexed once, then each image is read from its place.
"""

import gzip
import json
import logging
import math
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .folders import SPLITS, ImageSource, SplitError, has_image_extension, label_by_folder
from .images import ImageError, ImageLike
from .pixels import Pixels

TAR = (".tar", ".tar.gz", ".tgz")
TABLE = (".parquet", ".arrow")
_logger = logging.getLogger(__name__)


class TarSource(ImageSource):
    """Images in tar files: WebDataset shards, or any others.

    Labels come from each image's `.cls` member if all have one, else from the images' folders if all lie in one. A cut
    shard gives its whole images and a line in `problems`. A compressed shard is held in memory. Links are ignored; a
    member's name is never opened, so where it points does not matter.

    Raises:
        ValueError: No image in any shard.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        self._blocks: dict[int, bytes] = {}
        members: list[_Member] = []
        problems = []
        for number in range(len(self._shards)):
            found, problem = self._index(number)
            members += found
            problems += [problem] if problem else []
        images = [member for member in members if has_image_extension(member.name)]
        if not images:
            raise ValueError(f"no images in {_first(self._shards)}: {'; '.join(problems) or 'no member is an image'}")
        super().__init__([os.fsencode(f"{self._shards[m.shard].name}/{m.name}") for m in images])
        self._places = np.array([(m.shard, m.start, m.size) for m in images], dtype=np.int64)
        self.problems = tuple(problems)
        self._label(images, members)

    def image(self, index: int) -> ImageLike:
        """The encoded file.

        Raises:
            ImageError: The shard is gone or shorter than it was.
        """
        shard, start, size = map(int, self._places[index])
        if shard in self._blocks:
            return self._blocks[shard][start : start + size]
        try:
            return _read_at(self._shards[shard], start, size)
        except OSError as error:
            raise ImageError(self.name(index), f"{type(error).__name__}: {error}") from error

    def _index(self, number: int) -> tuple[list["_Member"], str]:
        """A shard's members, and what is wrong with it."""
        path, members, problem = self._shards[number], [], ""
        compressed = not path.name.endswith(".tar")
        block = bytearray()
        size = 0 if compressed else path.stat().st_size
        try:
            with tarfile.open(path, "r|gz" if compressed else "r:") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    start = len(block) if compressed else member.offset_data
                    if compressed and (file := tar.extractfile(member)):
                        block += file.read()
                    whole = len(block) - start == member.size if compressed else start + member.size <= size
                    if not whole:
                        raise EOFError("unexpected end of data")
                    members.append(_Member(number, start, member.size, member.name))
            if not compressed and size % 512 == 0 and not _ends_in_zeros(path, size):
                raise EOFError("no end-of-archive mark")
        except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
            problem = f"{path} is damaged ({error}): its {len(members)} whole members are used, the rest is lost"
            _logger.warning(problem)
        if compressed:
            self._blocks[number] = bytes(block)
        return members, problem

    def _label(self, images: Sequence["_Member"], members: Sequence["_Member"]) -> None:
        classes = {(m.shard, _key(m.name)): m for m in members if m.name.endswith(".cls")}
        marks = [classes.get((m.shard, _key(m.name))) for m in images]
        if all(marks):
            texts = [self._text(mark) for mark in marks if mark]
            if all(text.isdigit() and len(text) < 7 for text in texts):
                self.labels = np.array([int(text) for text in texts], dtype=np.int64)
                self.class_names = tuple(str(i) for i in range(int(self.labels.max()) + 1))
            return
        names = [os.fsencode(re.sub(r"^(\./|/)+", "", m.name)) for m in images]
        if all(b"/" in name for name in names):
            folders = sorted({os.fsdecode(name.split(b"/", 1)[0]) for name in names})
            if len(folders) > 1:
                self.labels, self.class_names = label_by_folder(names, folders)

    def _text(self, member: "_Member") -> str:
        if member.shard in self._blocks:
            data = self._blocks[member.shard][member.start : member.start + member.size]
        else:
            data = _read_at(self._shards[member.shard], member.start, member.size)
        return data.decode("ascii", "replace").strip()


class TableSource(ImageSource):
    """Images in Hugging Face tables: Parquet, held in memory, or Arrow files of `save_to_disk`, mapped from disk.

    The image column is the first of structures with `bytes`, or of bytes; labels are in a whole-number column `label`,
    `labels` or `fine_label`, if there is one.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ImportError('Parquet needs pyarrow: pip install "mvmae[train]"') from error
        _check_memory([file for file in files if file.suffix == ".parquet"])
        tables = [_read_table(file) for file in files]
        table = pa.concat_tables(tables)
        if not table.num_rows:
            raise ValueError(f"no rows in {_first(files)}")
        image, label = _find_columns(table.schema, files[0])
        self._image, self._column = table.column(image), image
        names = [f"{f.name}#{row}".encode() for f, t in zip(files, tables, strict=True) for row in range(t.num_rows)]
        super().__init__(names)
        if label is not None:
            self.labels = table.column(label).to_numpy().astype(np.int64)
            self.class_names = _class_names(table.schema, label) or tuple(map(str, np.unique(self.labels)))

    def image(self, index: int) -> ImageLike:
        """The encoded file.

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
    """An IDX file of images (N, H, W) bytes, and the one of labels beside it."""

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
        """The image as an array (H, W)."""
        image: Pixels = self._images[index]
        return image


def find_archives(path: Path) -> list[Path]:
    """The archives that a file, a folder or a pattern with braces ({000..012}, {a,b}) names; empty if none."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if _is_archive(p.name) and not p.name.startswith("."))
        return found or sorted((path / "data").glob("*.parquet"))  # the layout of Hugging Face's repositories
    if path.is_file():
        return [path] if _is_archive(path.name) else []
    names = expand_braces(str(path))
    missing = [name for name in names if not os.path.exists(name)]
    if missing and len(names) > 1:
        raise ValueError(f"{len(missing)} of {len(names)} shards of {path} do not exist, the first is {missing[0]}")
    return [] if missing else [Path(name) for name in names]


def open_archives(paths: Sequence[Path], split: str) -> ImageSource:
    """Open archives of one kind; those whose names begin with a split's (`train-0001.tar`) are that split.

    Raises:
        ValueError: Several kinds, or no image.
        SplitError: None of this split.
    """
    marked = {key: [p for p in paths if p.name.startswith(names)] for key, names in SPLITS.items()}
    if marked["train"]:
        chosen = marked[split]
    else:
        chosen = [p for p in paths if p not in marked["val"]] or list(paths) if split == "train" else marked["val"]
    if not chosen:
        raise SplitError(f"{_first(paths)} has no {split} split: no name begins with {' or '.join(SPLITS[split])}")
    kinds = {_kind(path.name) for path in chosen}
    if len(kinds) > 1:
        raise ValueError(f"{_first(chosen)}: expected archives of one kind, found {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind == "idx":
        images = [path for path in chosen if "labels" not in path.name]
        if len(images) != 1:
            raise ValueError(f"{_first(chosen)}: expected one IDX file of images, found {len(images)}")
        return IdxSource(images[0])
    return TarSource(chosen) if kind == "tar" else TableSource(chosen)


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` -> a0 a1 a2, `{x,y}` -> x y; zeros in front are kept."""
    parts = [_alternatives(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    return ["".join(choice) for choice in product(*parts)]


class _Member(NamedTuple):
    shard: int
    start: int
    size: int
    name: str


def _alternatives(part: str) -> list[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if numbers:
        first, last = numbers.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return part[1:-1].split(",") if part.startswith("{") and "," in part else [part]


def _kind(name: str) -> str:
    if name.endswith(TAR):
        return "tar"
    return "table" if name.endswith(TABLE) else "idx"


def _is_archive(name: str) -> bool:
    return name.endswith(TAR + TABLE) or re.search(r"idx[13]-ubyte(\.gz)?$", name) is not None


def _first(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _key(name: str) -> str:
    """WebDataset: what comes before the base name's first dot."""
    folder, base = os.path.split(name)
    return f"{folder}/{base.split('.', 1)[0]}"


def _read_at(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _ends_in_zeros(path: Path, size: int) -> bool:
    return not any(_read_at(path, max(0, size - 1024), 1024))


def _check_memory(files: Sequence[Path]) -> None:
    if not hasattr(os, "sysconf"):
        return
    size, memory = sum(file.stat().st_size for file in files), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 2:
        sizes = f"{size >> 20} MB of Parquet are more than half of the {memory >> 20} MB of memory"
        raise ValueError(f"{sizes}: use `hfds/FOLDER`, which maps them from disk")


def _read_table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return pq.read_table(path, memory_map=False)
        source = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _find_columns(schema: Any, path: Path) -> tuple[str, str | None]:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_bytes(field.type)]
    if not images:
        raise ValueError(f"{path} has no column of images (bytes): its columns are {', '.join(schema.names)}")
    labels = [n for n in ("label", "labels", "fine_label") if n in schema.names]
    return images[0], next((n for n in labels if pa.types.is_integer(schema.field(n).type)), None)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """From the note that `datasets` leaves in a table."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        return tuple(info["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _read_idx(path: Path, dims: int) -> Pixels:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if data[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path} is no IDX file of {dims}-dimensional bytes")
    shape = [int(n) for n in np.frombuffer(data, ">i4", dims, 4)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if len(values) != math.prod(shape):
        raise ValueError(f"{path} holds {len(values)} bytes, its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)
