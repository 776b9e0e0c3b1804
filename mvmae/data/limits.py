"""Limits checked before data is read, unpacked or decoded: files that would take all memory, or minutes.

Every check raises `LimitError` with the number, the limit and the cure.
"""

import contextlib
import lzma
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

MAX_PIXELS = 100_000_000
MAX_SCANS = 100
"""Largest number of passes of a progressive JPEG over its pixels; encoders make about ten."""
_UNPACKERS: dict[int, Any] = dict.fromkeys((8, 32946, 50013), zlib.decompressobj) | {34925: lzma.LZMADecompressor}
_LARGEST_RATIO = 1100  # of deflate, which makes 1032 bytes of one


class LimitError(ValueError):
    """Data that is not read because it would take too much memory or time."""


def most_bytes(max_pixels: int = MAX_PIXELS) -> int:
    """Return the size of the largest file that is read as an image: 4 bytes for each pixel, and 16 MB more."""
    return 4 * max_pixels + 2**24


def check_file(size: int, max_pixels: int) -> None:
    """Refuse a file that is too large for an image of `max_pixels`."""
    _check_bytes(size, most_bytes(max_pixels), max_pixels, "a file of")


def check_tiles(image: Any, encoded: bytes, max_pixels: int) -> None:
    """Refuse an image with tiles that are too large: a decoder unpacks a whole tile, however small the image is."""
    if image.format == "TIFF":
        area = int(image.tag_v2.get(322, 1)) * int(image.tag_v2.get(323, 1))
    elif image.format == "JPEG2000":  # decoded with 4 bytes a sample, each held twice
        sizes = [struct.unpack_from(">8IH", encoded, found.end() + 4) for found in re.finditer(b"\xff\x4f\xff\x51", encoded)]
        area = max((min(x, w) * min(y, h) * bands for x, y, _, _, w, h, _, _, bands in sizes), default=0) // 2
    else:
        return
    if area > max_pixels:
        raise LimitError(f"a tile takes as much memory as {area} pixels, more than the limit of {max_pixels} (max_pixels)")


def check_bands(page: Any, encoded: bytes, max_pixels: int) -> None:
    """Refuse a TIFF page whose bands take more than 4 bytes a pixel, or whose strips unpack to more than they declare."""
    limit = 4 * max_pixels
    _check_bytes(page.nbytes, limit, max_pixels, "bands of")
    if page.is_tiled:
        tile = page.tilewidth * page.tilelength * page.tiledepth * page.samplesperpixel * page.dtype.itemsize
        _check_bytes(tile, limit, max_pixels, "a tile of")
    if (unpacker := _UNPACKERS.get(int(page.compression))) is None:
        return
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if unpacker is lzma.LZMADecompressor or size > limit // _LARGEST_RATIO:
            unpacked = unpacker().decompress(encoded[start : start + size], limit + 1)
            _check_bytes(len(unpacked), limit, max_pixels, "a strip of more than")


def check_scans(encoded: bytes) -> None:
    """Refuse a JPEG of some megabytes whose passes over its pixels would take minutes."""
    scans = len(re.findall(b"\xff\xda", encoded))
    if scans > MAX_SCANS:
        raise LimitError(f"{scans} scans, more than the {MAX_SCANS} allowed: save it anew, as a JPEG of ten scans or one")


def check_memory(size: int, what: str, cure: str) -> None:
    """Refuse data that would take more than half of the memory that this process may use."""
    memory = usable_memory()
    if size > memory // 2:
        raise LimitError(f"{what} take {size >> 20} MB, more than half of the {memory >> 20} MB of memory: {cure}")


def usable_memory() -> int:
    """Return the bytes of memory that this process may use: the smallest limit of machine, container and `ulimit`."""
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(ValueError, OSError):
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limits += [limit for limit in (resource.getrlimit(resource.RLIMIT_AS)[0],) if limit >= 0]
    return min(limits, default=2**63)


def _check_bytes(size: int, limit: int, max_pixels: int, what: str) -> None:
    if size > limit:
        raise LimitError(f"{what} {size} bytes, more than the {limit} for {max_pixels} pixels (max_pixels)")
