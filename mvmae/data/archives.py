"""Images inside files: which files a name means, and tar and WebDataset shards; other kinds stand in `tables`.

Nothing is unpacked to disk: a tar file is indexed once, then each image is read from its place.
"""

import gzip
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .decode import ImageError, ImageLike
from .folders import SPLITS, ImageSource, SplitError, has_image_extension, label_by_folder
from .limits import LimitError, check_memory, most_bytes
from .tables import TABLE, IdxSource, TableSource, first_of

TAR = (".tar", ".tar.gz", ".tgz")
_LONGEST_NOTE = 2**20
_logger = logging.getLogger(__name__)


class TarSource(ImageSource):
    """Images in tar files: WebDataset shards, or any others.

    Labels come from each image's `.cls` member if all have one, else from the images' folders if all lie in one. Of a cut
    shard the complete images are used, with a line in `problems`. A compressed shard is held in memory. Links are ignored; a
    member's name is never opened, so it does not matter where the name points.

    Raises:
        ValueError: No image in any shard, or compressed shards that unpack to more than half of the memory.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        self._blocks: dict[int, bytes] = {}
        self._unpacked = 0
        members: list[_Member] = []
        problems = []
        for number in range(len(self._shards)):
            found, problem = self._index(number)
            members += found
            problems += [problem] if problem else []
        images = [member for member in members if has_image_extension(member.name)]
        if not images:
            raise ValueError(f"no images in {first_of(self._shards)}: {'; '.join(problems) or 'no member is an image'}")
        super().__init__([os.fsencode(f"{self._shards[m.shard].name}/{m.name}") for m in images])
        self._places = np.array([(m.shard, m.start, m.size) for m in images], dtype=np.int64)
        self.problems = tuple(problems)
        self._label(images, members)

    def image(self, index: int) -> ImageLike:
        """Return the encoded file.

        Raises:
            ImageError: The shard is gone or shorter than it was, or the image too large.
        """
        shard, start, size = map(int, self._places[index])
        if size > most_bytes():
            raise ImageError(self.name(index), f"{size} bytes, more than the {most_bytes()} that an image in a tar may have")
        if shard in self._blocks:
            return self._blocks[shard][start : start + size]
        try:
            return _read_at(self._shards[shard], start, size)
        except OSError as error:
            raise ImageError(self.name(index), f"{type(error).__name__}: {error}") from error

    def _index(self, number: int) -> tuple[list["_Member"], str]:
        """Return a shard's members, and what is wrong with the shard."""
        path, members, problem = self._shards[number], [], ""
        compressed = not path.name.endswith(".tar")
        block = bytearray()
        size = 0 if compressed else path.stat().st_size
        try:
            opener: Any = gzip.open if compressed else open  # which unpacks a little at a time, unlike tarfile itself
            with (
                opener(path, "rb") as file,
                tarfile.open(fileobj=file, mode="r|" if compressed else "r:", tarinfo=Header) as tar,
            ):
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps all it has met
                    if compressed:
                        check_memory(self._unpacked + member.offset_data + member.size, str(path), "unpack it to a .tar file")
                    if not member.isreg() or member.issparse():
                        continue
                    start = len(block) if compressed else member.offset_data
                    if compressed and (content := tar.extractfile(member)):
                        block += content.read()
                    whole = len(block) - start == member.size if compressed else start + member.size <= size
                    if not whole:
                        raise EOFError("unexpected end of data")
                    members.append(_Member(number, start, member.size, member.name))
            if not compressed and size % 512 == 0 and not _ends_in_zeros(path, size):
                raise EOFError("no end-of-archive mark")
        except LimitError:
            raise
        except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
            problem = f"{path} is damaged ({error}): its {len(members)} whole members are used, the rest is lost"
            _logger.warning(problem)
        if compressed:
            self._blocks[number] = bytes(block)
            self._unpacked += len(block)
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


def find_archives(path: Path) -> list[Path]:
    """Return the archives that a file, a folder or a pattern with braces ({000..012}, {a,b}) names; empty if none."""
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
        raise SplitError(f"{first_of(paths)} has no {split} split: no name begins with {' or '.join(SPLITS[split])}")
    kinds = {_kind(path.name) for path in chosen}
    if len(kinds) > 1:
        raise ValueError(f"{first_of(chosen)} must be archives of one kind, got {', '.join(sorted(kinds))}: name those of one")
    kind = kinds.pop()
    if kind == "idx":
        images = [path for path in chosen if "labels" not in path.name]
        if len(images) != 1:
            raise ValueError(f"{first_of(chosen)} must hold one IDX file of images, got {len(images)}: name it")
        return IdxSource(images[0])
    return TarSource(chosen) if kind == "tar" else TableSource(chosen)


def expand_braces(pattern: str) -> list[str]:
    """Expand braces: `a{0..2}` -> a0 a1 a2, `{x,y}` -> x y; leading zeros are kept."""
    parts = [_alternatives(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    return ["".join(choice) for choice in product(*parts)]


class Header(tarfile.TarInfo):
    """A member's header; one with a name or notes of megabytes, which tarfile would read whole, counts as damage."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        """Read a header of 512 bytes."""
        header = super().frombuf(buf, encoding, errors)
        if not header.isreg() and header.size > _LONGEST_NOTE:
            raise ValueError(f"a header of {header.size} bytes")
        return header


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


def _key(name: str) -> str:
    """Return WebDataset's key: the name up to the first dot of its last part."""
    folder, base = os.path.split(name)
    return f"{folder}/{base.split('.', 1)[0]}"


def _read_at(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _ends_in_zeros(path: Path, size: int) -> bool:
    return not any(_read_at(path, max(0, size - 1024), 1024))
