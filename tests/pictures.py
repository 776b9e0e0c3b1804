"""Encoded images and tar files for the tests of data."""

import io
import tarfile
import zlib
from pathlib import Path

from PIL import Image


def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_bomb(path: Path, side: int = 60_000) -> Path:
    """Write a PNG whose header says that it is huge."""
    content = encode(Image.new("L", (1, 1)), "PNG")
    header = content[12:16] + side.to_bytes(4, "big") * 2 + content[24:29]
    path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path
