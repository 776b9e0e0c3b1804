"""Images inside files: which files a name means, and tar and WebDataset shards by an index. Nothing is unpacked to disk."""

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .decode import ImageError, ImageLike
from .sources import ImageSource, SplitError, describe, describe_splits, find_splits, first_of, kind_of, split_of, split_words
from .tables import TableSource

_SUFFIXES = (".tar", ".parquet", ".arrow")
_logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file in a shard: number of the shard, first byte, size, name, and WebDataset's key of its sample."""

    shard: int
    start: int
    size: int
    name: str
    key: tuple[int, str]


class TarSource(ImageSource):
    """Images in tar files: WebDataset shards, or any others. A member's name is never opened.

    Labels come from each image's `.cls` member if all have one, else from the images' folders if all lie in one. Of a cut or
    damaged shard the whole images before the damage are used. What is left out is said in `problems`. Links are ignored.

    Raises:
        ValueError: No image in any shard.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards, images, classes, passed = list(shards), list[Member](), dict[tuple[int, str], Member](), Counter[str]()
        for number, path in enumerate(self._shards):
            found, problem = _index(number, path)
            if problem:
                self.problems += (f"{path} is damaged ({problem}): its {len(found)} whole members are used, the rest is lost",)
            for member in found:
                kind = kind_of(os.fsencode(member.name), partial(self._read, *member[:2], min(member.size, 32)))
                if kind == "image":
                    images.append(member)
                elif kind == ".cls":
                    classes[member.key] = member
                else:
                    passed[kind] += 1
        if passed:
            self.problems += (f"passed over {describe(passed)} in {first_of(self._shards)}",)
        if not images:
            raise ValueError(f"no images in {first_of(self._shards)}: {'; '.join(self.problems) or 'no members'}")
        super().__init__([os.fsencode(f"{self._shards[m.shard].name}/{m.name}") for m in images])
        if all(member.key in classes for member in images):
            marks = [classes[member.key] for member in images]
            texts = [self._read(m.shard, m.start, min(m.size, 10)).strip() for m in marks]
            if all(text.isdigit() for text in texts):
                self.set_labels([int(text) for text in texts])
        else:
            self.set_labels_by_folder([re.sub(rb"^(\./|/)+", b"", os.fsencode(member.name)) for member in images])
        self._places = np.array([m[:3] for m in images], dtype=np.int64)
        for line in self.problems:
            _logger.warning(line)

    def image(self, index: int) -> ImageLike:
        """Return the encoded file."""
        try:
            return self._read(*map(int, self._places[index]))
        except OSError as error:
            raise ImageError(self.name(index), f"{type(error).__name__}: {error}") from error

    def _read(self, shard: int, start: int, size: int) -> bytes:
        with open(self._shards[shard], "rb") as file:
            file.seek(start)
            return file.read(size)


def _index(shard: int, path: Path) -> tuple[list[Member], str]:
    """Return a shard's whole members, and what is wrong with it, if anything."""
    size, members = path.stat().st_size, list[Member]()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps all it has met
                if member.offset_data + member.size > size:
                    raise EOFError("unexpected end of data")
                if member.isreg() and not member.issparse():
                    folder, base = os.path.split(member.name)
                    key = (shard, f"{folder}/{base.split('.', 1)[0]}")
                    members.append(Member(shard, member.offset_data, member.size, member.name, key))
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise EOFError("no end-of-archive mark")
    except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
        return members, str(error)
    return members, ""


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
    """Open archives of one kind: those of a split, where some have a name with its word in it, such as `train-0001.tar`.

    Raises:
        ValueError: Several kinds, or no image, or names of splits that cannot be told apart.
        SplitError: None of this split.
    """
    words = [(split_words(path.stem) or [path.name])[0] for path in paths]
    kinds = set(map(split_of, words))
    splits = find_splits(words, paths[0].parent) if len(kinds) > 1 else {}  # all of one split: they were asked for
    if split != "train" and split not in splits:
        raise SplitError(f"{first_of(paths)} has no {split} split: no name has a word such as train, and val or test, in it")
    chosen = [path for path, word in zip(paths, words, strict=True) if not splits or word == splits[split]]
    if len({path.suffix == ".tar" for path in chosen}) > 1:
        raise ValueError(f"{first_of(chosen)} must be archives of one kind, got tar files and tables: name those of one")
    source = TarSource(chosen) if chosen[0].suffix == ".tar" else TableSource(chosen)
    source.splits = describe_splits(splits)
    return source
