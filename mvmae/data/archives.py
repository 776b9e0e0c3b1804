"""Images inside files: which files a name means, and tar and WebDataset shards by an index. Nothing is unpacked to disk."""

import logging
import os
import re
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .decode import ImageError, ImageLike
from .sources import EXTENSIONS, SPLITS, ImageSource, SplitError, first_of, label_by_folder
from .tables import TableSource

_SUFFIXES = (".tar", ".parquet", ".arrow")
_logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file in a shard: number of the shard, first byte, size, name."""

    shard: int
    start: int
    size: int
    name: str


class TarSource(ImageSource):
    """Images in tar files: WebDataset shards, or any others. A member's name is never opened.

    Labels come from each image's `.cls` member if all have one, else from the images' folders if all lie in one. Of a cut or
    damaged shard the whole images before the damage are used, with a line in `problems`. Links are ignored.

    Raises:
        ValueError: No image in any shard.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        members: list[Member] = []
        problems = []
        for number, path in enumerate(self._shards):
            found, problem = _index(number, path)
            members += found
            if problem:
                problems.append(f"{path} is damaged ({problem}): its {len(found)} whole members are used, the rest is lost")
                _logger.warning(problems[-1])
        images = [member for member in members if os.path.splitext(member.name)[1].lower() in EXTENSIONS]
        if not images:
            raise ValueError(f"no images in {first_of(self._shards)}: {'; '.join(problems) or 'no member is an image'}")
        super().__init__([os.fsencode(f"{self._shards[m.shard].name}/{m.name}") for m in images])
        self._places = np.array([(m.shard, m.start, m.size) for m in images], dtype=np.int64)
        self.problems = tuple(problems)
        self._label(images, members)

    def image(self, index: int) -> ImageLike:
        """Return the encoded file.

        Raises:
            ImageError: The shard is gone.
        """
        shard, start, size = map(int, self._places[index])
        try:
            return _read_at(self._shards[shard], start, size)
        except OSError as error:
            raise ImageError(self.name(index), f"{type(error).__name__}: {error}") from error

    def _label(self, images: Sequence[Member], members: Sequence[Member]) -> None:
        classes = {_key(m): m for m in members if m.name.endswith(".cls")}
        marks = [classes[_key(m)] for m in images if _key(m) in classes]
        if len(marks) == len(images):
            texts = [_read_at(self._shards[m.shard], m.start, min(m.size, 10)).strip() for m in marks]
            if all(text.isdigit() and len(text) < 7 for text in texts):
                self.labels = np.array([int(text) for text in texts], dtype=np.int64)
                self.class_names = tuple(str(i) for i in range(int(self.labels.max()) + 1))
            return
        names = [os.fsencode(re.sub(r"^(\./|/)+", "", m.name)) for m in images]
        folders = sorted({os.fsdecode(name.split(b"/", 1)[0]) for name in names if b"/" in name})
        if len(folders) > 1 and all(b"/" in name for name in names):
            self.labels, self.class_names = label_by_folder(names, folders)


def _key(member: Member) -> tuple[int, str]:
    """Return WebDataset's key of a sample: its shard, and the name up to the first dot of its last part."""
    folder, base = os.path.split(member.name)
    return member.shard, f"{folder}/{base.split('.', 1)[0]}"


def _index(shard: int, path: Path) -> tuple[list[Member], str]:
    """Return a shard's whole members, and what is wrong with it, if anything."""
    size, members = path.stat().st_size, list[Member]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps all it has met
                if member.offset_data + member.size > size:
                    raise EOFError("unexpected end of data")
                if member.isreg() and not member.issparse():
                    members.append(Member(shard, member.offset_data, member.size, member.name))
            if _read_at(path, tar.offset, 512) != bytes(512):  # tarfile takes a damaged header for the end
                raise EOFError("no end-of-archive mark")
    except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
        return members, str(error)
    return members, ""


def _read_at(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def find_archives(path: Path) -> list[Path]:
    """Return the archives that a file, a folder or a pattern with braces ({000..012}, {a,b}) names; empty if none."""
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and not entry.name.startswith("."))
        return found or sorted((path / "data").glob("*.parquet"))  # the layout of Hugging Face's repositories
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
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


def open_archives(paths: Sequence[Path], split: str) -> ImageSource:
    """Open archives of one kind; those whose names begin with a split's (`train-0001.tar`) are that split.

    Raises:
        ValueError: Several kinds, or no image.
        SplitError: None of this split.
    """
    chosen = [path for path in paths if path.name.lower().startswith(SPLITS[split])]
    if not chosen and split == "train":
        chosen = [path for path in paths if not path.name.lower().startswith(SPLITS["val"])] or list(paths)
    if not chosen:
        raise SplitError(f"{first_of(paths)} has no {split} split: no name begins with {' or '.join(SPLITS[split])}")
    if len({_is_tar(path) for path in chosen}) > 1:
        raise ValueError(f"{first_of(chosen)} must be archives of one kind, got tar files and tables: name those of one")
    return TarSource(chosen) if _is_tar(chosen[0]) else TableSource(chosen)


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar"
