"""Tar and WebDataset shards by an index. Nothing is unpacked to disk."""

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
from .files import describe, kind_of
from .sources import ImageSource


class Member(NamedTuple):
    """A file in a shard: number of the shard, first byte, size and name."""

    shard: int
    start: int
    size: int
    name: str

    @property
    def sample(self) -> tuple[int, str]:
        """What the files of one sample of WebDataset share."""
        folder, base = os.path.split(self.name)
        return self.shard, f"{folder}/{base.partition('.')[0]}"


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
                    classes[member.sample] = member
                else:
                    passed[kind] += 1
        if passed:
            self.problems += (f"passed over {describe(passed)}",)
        if not images:
            raise ValueError(f"no images in {self._shards[0]}: {'; '.join(self.problems) or 'no members'}")
        super().__init__([os.fsencode(f"{self._shards[m.shard].name}/{m.name}") for m in images])
        if all(member.sample in classes for member in images):
            marks = [classes[member.sample] for member in images]
            texts = [self._read(m.shard, m.start, min(m.size, 10)).strip() for m in marks]
            if all(text.isdigit() for text in texts):
                self.set_labels([int(text) for text in texts])
        else:
            self.set_labels_by_folder([re.sub(rb"^(\./|/)+", b"", os.fsencode(member.name)) for member in images])
        self._places = np.array([m[:3] for m in images], dtype=np.int64)

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
                    members.append(Member(shard, member.offset_data, member.size, member.name))
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise EOFError("no end-of-archive mark")
    except Exception as error:  # tarfile lets errors of many kinds out of a damaged header
        return members, str(error)
    return members, ""


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
