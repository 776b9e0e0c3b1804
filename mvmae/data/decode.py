"""One image of any kind as 8-bit pixels: its header first, then one decode.

Shapes: H, W pixels as stored (before EXIF orientation), C channels asked for, s reduction of a scaled JPEG decode.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .formats import is_sixteen_bits, pillow_open, range_of, read_bands, sixteen_bits
from .pixels import WHITE, Colour, Pixels, Range, channels_last, colour, pillow_pixels, to_uint8, with_channels

try:
    import simplejpeg
except ImportError:  # an optional decoder, faster than Pillow, from the `train` extra
    simplejpeg = None

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | torch.Tensor | NDArray[Any]"

MAX_PIXELS = 100_000_000


class ImageError(ValueError):
    """An image that cannot be used, whatever went wrong in a library or the file system: its name, and the reason in a line."""

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
        own_range: Values that are black and white by what the file says, if it says more than its type.
        inverted: 0 is white.
        alpha: The last of 2 or 4 channels is alpha.
        associated: Colours are multiplied by alpha.
    """

    own_range: Range | None = None
    inverted, alpha, associated = False, True, False

    def __init__(self, name: str, image: "Image.Image | NDArray[Any]", channels: int, encoded: bytes = b"") -> None:
        self.name, self._image, self._channels, self._encoded = name, image, channels, encoded
        self.height, self.width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
        self.reducible = bool(encoded) and getattr(image, "format", None) in ("JPEG", "MPO")
        self._sixteen = bool(encoded) and is_sixteen_bits(image)  # which loading makes Pillow forget

    @cached_property
    def orientation(self) -> int:
        """EXIF orientation that `decode` does not apply, 1 to 8 (1: none)."""
        image = self._image
        if not isinstance(image, Image.Image) or (self.reducible and not {"exif", "xmp"} & image.info.keys()):
            return 1
        if image.format in ("PNG", "TIFF"):  # EXIF may stand behind a PNG's pixels; Pillow turns a TIFF itself
            with _errors_of(self.name):
                image.load()
            self.width, self.height = image.size
        try:
            value = image.getexif().get(0x0112, 1)
        except Exception:  # a broken EXIF block does not make a bad picture
            return 1
        return value if value in range(1, 9) else 1

    @property
    def turn(self) -> tuple[bool, bool, bool]:
        """How the image as stored becomes the image as seen: whether to transpose, then flip left-right, then up-down."""
        return self.orientation >= 5, self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image as seen."""
        return (self.width, self.height) if self.turn[0] else (self.height, self.width)

    def upright(self, pixels: Pixels) -> Pixels:
        """Return what `decode` returns as it is seen, by EXIF orientation."""
        transpose, mirror, upend = self.turn
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        return pixels[:: -1 if upend else 1, :: -1 if mirror else 1]

    def values(self) -> "NDArray[Any] | None":
        """Return the pixels as stored, (H, W, C), where they are deeper than 8 bits; else None."""
        image = self._image
        with _errors_of(self.name):
            if not isinstance(image, Image.Image):
                return None if image.dtype == np.uint8 else image
            if image.mode.startswith(("I", "F")):
                return np.asarray(image)[..., None]
            return sixteen_bits(self._encoded) if self._sixteen else None

    def decode(self, *, reduction: int = 1, value_range: Range | None = None, background: Colour = WHITE) -> Pixels:
        """Decode the first frame to 8 bits.

        Deeper images are scaled to 8 bits (`to_uint8`). In grey or RGB the background shows through transparent pixels.

        Args:
            reduction: s: 1, 2, 4 or 8; other than 1 only if `reducible`.
            value_range: Values of images deeper than 8 bits that become 0 and 255.
            background: Red, green and blue behind transparent pixels.

        Returns:
            (ceil(H / s), ceil(W / s), C); may be read-only.

        Raises:
            ImageError: The image is damaged or has other channels.
        """
        image, channels = self._image, self._channels
        shape = (-(-self.height // reduction), -(-self.width // reduction), channels)
        with _errors_of(self.name):
            if not isinstance(image, Image.Image):
                return self._scale(image, value_range, background)
            # Pillow's high bytes are enough of 16 bits a channel whose range is the whole one
            ranged = value_range or self.own_range or image.mode.startswith(("I", "F"))
            if ranged and (values := self.values()) is not None:
                return self._scale(values, value_range, background)
            if self.reducible:
                if self._encoded.endswith(bytes(64)) and not self._encoded.rstrip(b"\0").endswith(b"\xff\xd9"):
                    raise ImageError(self.name, "cut: it ends in zeros, which libjpeg would silently decode to grey")
                if simplejpeg and channels in (1, 3) and image.mode in ("L", "RGB"):
                    pixels = _simplejpeg(self._encoded, shape, reduction)
                    if pixels is not None:
                        return pixels
                image.draft("L" if channels == 1 else None, (self.width // reduction, self.height // reduction))
            pixels = pillow_pixels(image, channels, background)
            if pixels.shape != shape:
                raise ImageError(self.name, f"decoded to {pixels.shape}, expected {shape}")
            return pixels

    def _scale(self, values: "NDArray[Any]", value_range: Range | None, background: Colour) -> Pixels:
        pixels = to_uint8(values, value_range, self.own_range)
        if self.inverted:
            pixels = 255 - pixels
        if self.associated:
            colours = np.rint(pixels[..., :-1] * (255 / np.maximum(pixels[..., -1:], 1))).clip(0, 255)
            pixels = np.concatenate([colours.astype(np.uint8), pixels[..., -1:]], axis=-1)
        return with_channels(pixels, self._channels, background, self.alpha)


def open_image(source: ImageLike, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> OpenedImage:
    """Read an image's header, and refuse an image that should not be decoded.

    Args:
        source: A path, an encoded file's bytes, a Pillow image, a tensor (C, H, W), or an array (`channels_last`). The last of
            an array's 2 or 4 channels is alpha where 1 or 3 are asked for.
        channels: 1 (grey), 3 (RGB), 4 (RGBA, or a CMYK image unchanged), or the number of a TIFF's or an array's channels.
        max_pixels: Largest number of pixels of an image, at 4 bytes each; larger images and files are refused before they are
            read or decoded.

    Raises:
        ImageError: Not an image, unreadable or too large.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"<{type(source).__name__}>"
    with _errors_of(name):
        if isinstance(source, (str, os.PathLike)):
            status = os.stat(source)
            if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block
                raise OSError("not a regular file")
            _check_size(status.st_size, max_pixels)
            with open(source, "rb") as file:
                source = file.read()
        if isinstance(source, bytes):
            opened = _open_bytes(source, name, channels, max_pixels)
        elif isinstance(source, Image.Image):
            opened = OpenedImage(name, source, channels)
        elif isinstance(source, torch.Tensor):
            array = source.detach().cpu().numpy()
            array = array.transpose(1, 2, 0) if array.ndim == 3 else channels_last(array, channels)
            opened = OpenedImage(name, array, channels)
        elif isinstance(source, np.ndarray):
            opened = OpenedImage(name, channels_last(source, channels), channels)
        else:
            raise TypeError(f"an image must be a path, bytes, Pillow image, tensor or array, got a {type(source).__name__}")
    size = f"{opened.width} x {opened.height} pixels"
    if opened.width * opened.height > max_pixels:
        raise ImageError(name, f"{size}, more than the limit of {max_pixels} (max_pixels): a decompression bomb?")
    if min(opened.width, opened.height) < 1:
        raise ImageError(name, f"{size}: empty")
    return opened


def read_pixels(
    image: ImageLike,
    *,
    in_chans: int = 3,
    background: str = "white",
    value_range: Range | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Decode an image upright: (H, W, C) as seen. The options are those of `MultiViewTransform`."""
    opened = open_image(image, channels=in_chans, max_pixels=max_pixels)
    return opened.upright(opened.decode(background=colour(background), value_range=value_range))


def to_pil(image: ImageLike, **options: Any) -> Image.Image:
    """Decode an image by `read_pixels`, to a Pillow image for timm's and torchvision's transforms."""
    pixels = read_pixels(image, **options)
    return Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(name, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def _check_size(size: int, max_pixels: int) -> None:
    most = 4 * max_pixels + 2**24  # 4 bytes a pixel, and what stands around them
    if size > most:
        raise ValueError(f"{size} bytes, more than the {most} for {max_pixels} pixels (max_pixels)")


def _open_bytes(encoded: bytes, name: str, channels: int, max_pixels: int) -> OpenedImage:
    _check_size(len(encoded), max_pixels)
    if not encoded:
        raise ImageError(name, "empty file")
    if encoded.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
        return OpenedImage(name, channels_last(array, channels), channels)
    tiff = encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    if tiff and channels > 4:  # Pillow would write a line on each
        return _open_bands(encoded, name, channels, max_pixels)
    try:
        image = pillow_open(encoded)
    except UnidentifiedImageError:
        if tiff:  # Pillow reads only some kinds
            return _open_bands(encoded, name, channels, max_pixels)
        raise ImageError(name, f"not an image: begins with {encoded[:16]!r}") from None
    opened = OpenedImage(name, image, channels, encoded)
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        samples = tags.get(277, 1)
        pages = image.n_frames if samples == 1 and channels not in (1, 3) else samples  # type: ignore[attr-defined]
        dropped = channels in (samples, pages) and channels != len(image.getbands())  # Pillow would read others
        # of 16 bits, layers and colours that are multiplied by alpha are decoded wrongly
        if dropped or (opened._sixteen and (tags.get(284) == 2 or tags.get(338, (0,))[0] == 1)):
            return _open_bands(encoded, name, channels, max_pixels)
        bits = tags.get(258, 1)
        opened.own_range = (0, 32767) if image.mode == "I" and np.max(bits) == 16 else range_of(bits)
        opened.inverted = tags.get(262) == 0 and image.mode.startswith(("I", "F"))
    elif image.mode == "I":  # in which Pillow reads PNG and PGM of 16 bits
        opened.own_range = (0, 65535)
    return opened


def _open_bands(encoded: bytes, name: str, channels: int, max_pixels: int) -> OpenedImage:
    pixels, said = read_bands(encoded, channels, partial(_check_size, max_pixels=max_pixels))
    opened = OpenedImage(name, pixels, channels)
    vars(opened).update(said)
    return opened


def _simplejpeg(encoded: bytes, shape: tuple[int, int, int], reduction: int) -> Pixels | None:
    """Decode a JPEG; None where it is damaged, or has warnings, mostly harmless: Pillow has the last word."""
    # simplejpeg without min_height and min_width does not scale
    least = {"min_height": shape[0], "min_width": shape[1], "min_factor": reduction} if reduction > 1 else {}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(encoded, "GRAY" if shape[2] == 1 else "RGB", strict=True, **least)
    except ValueError:
        return None
    return pixels if pixels.shape == shape else None
