"""Open one image of any kind: the header first, then one decode to uint8.

Shapes: H, W pixels as stored (before EXIF orientation), C channels asked for, s reduction of a scaled JPEG decode.
Every failure of Pillow, simplejpeg, tifffile or the file system is raised as an `ImageError` with name and reason.
"""

import io
import logging
import os
import stat
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, UnidentifiedImageError

from . import jpeg
from .limits import MAX_PIXELS as MAX_PIXELS
from .limits import check_bands, check_file, check_scans, check_tiles
from .pixels import WHITE, Colour, Pixels, channels_last, pillow_pixels, to_uint8, with_channels

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | torch.Tensor | NDArray[Any]"

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
    | {".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".npy"}
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow may find in a file, whatever its name; none (such as EPS) that another program draws."""
_logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        path: The image's name.
        reason: One line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, " ".join(reason.split())

    def __str__(self) -> str:
        return f"cannot read image {self.path!r}: {self.reason}"


class OpenedImage:
    """An image of which only the header has been read: the result of `open_image`.

    Attributes:
        name: For messages.
        height, width: Pixels as stored.
        reducible: Whether `decode` can divide both sides by 2, 4 or 8 while it decodes (JPEG).
    """

    def __init__(
        self, name: str, image: "Image.Image | NDArray[Any]", encoded: bytes | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.name, self._image, self._encoded, self._max_pixels = name, image, encoded, max_pixels
        if isinstance(image, Image.Image):
            self.width, self.height = image.size
        else:
            self.height, self.width = image.shape[:2]
        self.reducible = encoded is not None and getattr(image, "format", None) in ("JPEG", "MPO")

    @cached_property
    def orientation(self) -> int:
        """EXIF orientation that `decode` does not apply, 1 to 8 (1: none)."""
        if not isinstance(self._image, Image.Image):
            return 1
        try:
            if self._image.format in (
                "PNG",
                "TIFF",
            ):  # EXIF may stand behind a PNG's pixels; Pillow turns a TIFF itself
                self._image.load()
                self.width, self.height = self._image.size
        except Exception as error:
            raise ImageError(self.name, _reason(error)) from error
        return _orientation(self._image)

    @property
    def turn(self) -> tuple[bool, bool, bool]:
        """How the image as stored becomes the image as seen: whether to transpose, then flip left-right, then up-down."""
        orientation = self.orientation
        return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image as seen."""
        return (self.width, self.height) if self.turn[0] else (self.height, self.width)

    def upright(self, pixels: Pixels) -> Pixels:
        """Return what `decode` returns as it is seen, by EXIF orientation."""
        transpose, mirror, upend = self.turn
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        return pixels[:: -1 if upend else 1, :: -1 if mirror else 1]

    def decode(
        self,
        *,
        channels: int = 3,
        reduction: int = 1,
        decoder: str = "fast",
        value_range: tuple[float, float] | None = None,
        background: Colour = WHITE,
    ) -> Pixels:
        """Decode the first frame to 8 bits.

        Deep images are scaled to 8 bits (`to_uint8`). For grey or RGB the background shows through
        transparent pixels; the last of an array's 2 or 4 channels is then alpha.

        Args:
            channels: 1 (grey), 3 (RGB), 4 (RGBA, or a CMYK image unchanged), or the number of an array's channels.
            reduction: 1, 2, 4 or 8; other than 1 only if `reducible`.
            decoder: "fast" uses simplejpeg for JPEG if it is installed, "pillow" never.
            value_range: Values of deep images and arrays that become 0 and 255.
            background: Red, green and blue behind transparent pixels.

        Returns:
            (ceil(H / s), ceil(W / s), C); may be read-only.

        Raises:
            ImageError: The image is damaged or has other channels.
        """
        size = (-(-self.height // reduction), -(-self.width // reduction))
        try:
            pixels = self._decode(channels, size, reduction, decoder, value_range, background)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(self.name, _reason(error)) from error
        if pixels.shape != (*size, channels):
            raise ImageError(self.name, f"decoded to {pixels.shape}, expected {(*size, channels)}")
        return pixels

    def _decode(
        self,
        channels: int,
        size: tuple[int, int],
        reduction: int,
        decoder: str,
        value_range: tuple[float, float] | None,
        background: Colour,
    ) -> Pixels:
        if not isinstance(self._image, Image.Image):
            return with_channels(to_uint8(self._image, value_range), channels, background)
        other = channels not in (1, 3, len(self._image.getbands()))
        if other and self._encoded is not None and self._image.format == "TIFF":  # Pillow drops nameless bands
            return with_channels(to_uint8(_read_tiff(self._encoded, self._max_pixels), value_range), channels, background)
        if self.reducible and self._encoded is not None:
            if zeros := jpeg.zero_tail(self._encoded):
                raise ImageError(self.name, f"cut: it ends in {zeros} zero bytes, without JPEG's end-of-image marker")
            check_scans(self._encoded)
            if decoder == "fast" and jpeg.can_decode(channels, self._image.mode):
                try:
                    return jpeg.decode(self._encoded, channels, size, reduction)
                except ValueError as error:  # Pillow has the last word
                    _logger.debug("%s: simplejpeg: %s; trying Pillow", self.name, error)
            self._image.draft("L" if channels == 1 else None, (self.width // reduction, self.height // reduction))
        return pillow_pixels(self._image, channels, value_range, background)


def open_image(source: ImageLike, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> OpenedImage:
    """Read an image's header, and refuse an image that should not be decoded.

    Args:
        source: A path, an encoded file's bytes, a Pillow image (lazily opened or loaded; it is not changed), a tensor
            (C, H, W), or an array (H, W), (H, W, C) or (C, H, W).
        name: For messages; a path is its own name.
        max_pixels: Largest number of pixels of an image, at 4 bytes each; larger images and files are refused before they are
            read or decoded.

    Returns:
        The opened image; its `decode` returns the pixels.

    Raises:
        ImageError: Not an image, unreadable or too large.
    """
    if name is None:
        name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"
    try:
        opened = _open(source, name, max_pixels)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(name, _reason(error)) from error
    if opened.width * opened.height > max_pixels:
        size = f"{opened.width} x {opened.height} pixels"
        raise ImageError(name, f"{size}, more than the limit of {max_pixels} (max_pixels): a decompression bomb?")
    if min(opened.width, opened.height) < 1:
        raise ImageError(name, f"{opened.width} x {opened.height} pixels: empty")
    return opened


def colour(name: str) -> Colour:
    """Return red, green and blue, 0 to 255, of a colour in CSS notation: `white`, `#808080`, `rgb(10, 20, 30)`.

    Raises:
        ValueError: No such colour.
    """
    try:
        red, green, blue = ImageColor.getcolor(name, "RGB")  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(f"background must be a colour such as white or #808080, got {name!r}") from error
    return red, green, blue


def _open(source: ImageLike, name: str, max_pixels: int) -> OpenedImage:
    if isinstance(source, (str, os.PathLike)):
        return _open_bytes(_read(Path(source), max_pixels), name, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source), name, max_pixels)
    if isinstance(source, Image.Image):
        encoded = jpeg.reread(source)
        return OpenedImage(name, source) if encoded is None else _open_bytes(encoded, name, max_pixels)
    if isinstance(source, torch.Tensor):
        if source.ndim not in (2, 3):
            raise ImageError(name, f"a tensor must be (C, H, W), got the shape {tuple(source.shape)}")
        return OpenedImage(name, (source if source.ndim == 3 else source[None]).detach().cpu().permute(1, 2, 0).numpy())
    if isinstance(source, np.ndarray):
        return OpenedImage(name, channels_last(source))
    raise TypeError(f"an image must be a path, bytes, Pillow image, tensor or array, got a {type(source).__name__}")


def _read(path: Path, max_pixels: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # a FIFO must not block us
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        check_file(status.st_size, max_pixels)
        return file.read()


def _open_bytes(encoded: bytes, name: str, max_pixels: int) -> OpenedImage:
    if not encoded:
        raise ImageError(name, "empty file")
    check_file(len(encoded), max_pixels)
    if encoded.startswith(b"\x93NUMPY"):
        return OpenedImage(name, channels_last(np.load(io.BytesIO(encoded), allow_pickle=False)))
    try:
        image = _pillow_open(encoded)
        check_tiles(image, encoded, max_pixels)
        return OpenedImage(name, image, encoded, max_pixels=max_pixels)
    except UnidentifiedImageError:
        if encoded[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise ImageError(name, f"not an image: begins with {encoded[:16]!r}") from None
    return OpenedImage(name, _read_tiff(encoded, max_pixels))


def _pillow_open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit, in open_image, decides
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _read_tiff(encoded: bytes, max_pixels: int) -> "NDArray[Any]":
    """Read all bands of a TIFF; Pillow reads only some kinds."""
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('a multi-band TIFF needs tifffile: pip install "mvmae[train]"') from error
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page: Any = file.pages[0]
        check_bands(page, encoded, max_pixels)
        return channels_last(page.asarray())


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block does not make a bad picture
        return 1
    return value if value in range(1, 9) else 1


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
