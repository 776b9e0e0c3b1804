"""Which files below a folder, or in an archive, are images; what is passed over is counted."""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from .formats import FORMATS

_JUNK = (b"__MACOSX", b"lost+found", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information")  # of systems, never data
_RUN = (b"log.jsonl", b"checkpoint.pt")  # what the folder of a training run holds, beside pictures that are no data
_LFS = b"version https://git-lfs"


@cache
def extensions() -> frozenset[str]:
    """Return the extensions of files that are read: those of Pillow's `FORMATS`, and of NumPy."""
    known = Image.registered_extensions().items()
    return frozenset({extension for extension, kind in known if kind in (*FORMATS, "MPO")} | {".npy"})


def kind_of(name: bytes, start: Callable[[], bytes]) -> str:
    """Return `image`, `hidden`, or the extension of another file; without one, its first 32 bytes, `start()`, tell."""
    if any(part in _JUNK or (part.startswith(b".") and part not in (b".", b"..")) for part in name.split(b"/")):
        return "hidden"
    extension = os.path.splitext(os.fsdecode(name))[1].lower()
    if extension in extensions():
        return "image"
    if extension and not extension[1:].isdigit():
        return extension
    content = start()
    known = [Image.OPEN[kind][1] for kind in FORMATS] if len(content) == 32 else []
    return "image" if any(accept and accept(content) is True for accept in known) else "without extension"


def scan(root: Path, passed: "Counter[str]") -> Iterator[bytes]:
    """Yield the names of the images below a folder, relative to it; each folder is visited once, despite links.

    What is passed over is counted by kind: hidden files, other extensions, broken links, Git LFS pointers.
    """
    seen: set[tuple[int, int]] = set()
    folders, linked = deque([b""]), deque[bytes]()  # links last, so that a file keeps its own folder's name
    while folders or linked:
        folder = (folders or linked).popleft()
        path = os.path.join(os.fsencode(root), folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                kind = kind_of_entry(entry)
                if kind == "image":
                    yield os.path.join(folder, entry.name)
                elif kind == "folder":
                    (linked if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
                else:
                    passed[kind] += 1


def kind_of_entry(entry: "os.DirEntry[bytes] | os.DirEntry[str]") -> str:
    """Return `image`, `folder`, or what else an entry of a folder is."""
    path = os.fsencode(entry.path)
    kind = kind_of(os.fsencode(entry.name), lambda: _start_of(path))
    if kind != "hidden" and entry.is_dir():
        return "folder of a run" if any(os.path.exists(os.path.join(path, file)) for file in _RUN) else "folder"
    if kind != "hidden" and not entry.is_file():
        return "broken link" if entry.is_symlink() else "device"
    if kind == "image" and entry.stat().st_size < 1024 and _start_of(path).startswith(_LFS):
        return "Git LFS pointer (git lfs pull fetches the image)"
    return kind


def describe(passed: "Counter[str]") -> str:
    """Return a line on what was passed over, by kind."""
    return ", ".join(f"{count} {kind}" for kind, count in passed.most_common())


def _start_of(path: bytes) -> bytes:
    """Return the first bytes of a file; none if it cannot be read, as is told when it is read as an image."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # of a FIFO, nothing
        return file.read(32) or b""
    return b""
