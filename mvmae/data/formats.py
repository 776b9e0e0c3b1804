"""Files of pictures: which formats are read, and pixels deeper than Pillow decodes them."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .pixels import Range

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PCX", "SGI", "DDS", "PSD", "QOI", "SUN"),
    *("DIB", "TGA"),  # last, since they have no mark of their own
)
"""Formats of pictures that Pillow finds in a file, whatever its name, and decodes by itself; so not EPS."""


def pillow_open(encoded: bytes) -> Image.Image:
    """Read a header with Pillow, whatever the size of the image."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit, in open_image, decides
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_bands(encoded: bytes, channels: int, check_size: Callable[[int], None]) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read all bands of a TIFF, (H, W, C), and what its tags say of them, as attributes of `OpenedImage`.

    As many grey pages as channels are its bands, but for 1 or 3 channels, since documents and stacks have pages too. Of RGB for
    1 or 3 channels, only colours and alpha.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('a multi-band TIFF needs tifffile: pip install "mvmae[train]"') from error
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page: Any = file.pages[0]
        paged = channels not in (1, 3) and len(file.pages) == channels and page.samplesperpixel == 1
        check_size(page.nbytes * (channels if paged else 1))
        photometric, extra = int(page.photometric), tuple(map(int, page.extrasamples or ()))
        if photometric not in (0, 1, 2, 5):
            raise ValueError(f"a TIFF of {page.dtype} must be grey, RGB, CMYK or bands, got {page.photometric!r}")
        pixels = np.stack([band.asarray() for band in file.pages], axis=-1) if paged else page.asarray()
        if "S" in page.axes:  # samples, which lie in layers if the planar configuration is 2
            pixels = np.moveaxis(pixels, page.axes.index("S"), -1)
        pixels, alpha = pixels.reshape(*pixels.shape[:2], -1), extra[:1] in ((1,), (2,))
        if photometric == 2 and channels in (1, 3):
            pixels = pixels[..., : 3 + alpha]
        orientation = int(page.tags.valueof(274, 1))
        said = {"own_range": range_of(page.bitspersample), "inverted": photometric == 0, "alpha": alpha}
        said |= {"associated": extra[:1] == (1,) and channels in (1, 3)}
        return pixels, said | {"orientation": orientation if orientation in range(1, 9) else 1}


def range_of(bits: Any) -> Range | None:
    """Return the range of a TIFF's BitsPerSample, such as 0..4095 of 12 bits that are held in 16."""
    most = int(np.max(bits))
    return (0, 2**most - 1) if 8 < most < 16 else None


def is_sixteen_bits(image: Any) -> bool:
    """Return whether a file has colours of 16 bits, of which Pillow keeps the high byte."""
    if image.format == "TIFF":
        return len(image.getbands()) > 2 and np.max(image.tag_v2.get(258, 1)) == 16
    return image.format == "PNG" and len(image.getbands()) > 2 and ";16" in str(image.tile[0].args)


def sixteen_bits(encoded: bytes) -> NDArray[np.uint16]:
    """Decode several channels of 16 bits: Pillow's high bytes, and the low ones, which it takes for the high in other order."""
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    image: Any = pillow_open(encoded)
    swapped: Any = pillow_open(encoded)
    for number, tile in enumerate(swapped.tile):
        mode, *rest = tile.args if isinstance(tile.args, tuple) else [tile.args]
        mode = mode[:-1] + other[mode[-1]]
        swapped.tile[number] = tile._replace(args=(mode, *rest) if rest else mode)
    both: NDArray[np.uint16] = np.asarray(image).astype(np.uint16) * np.uint16(256) + np.asarray(swapped)
    return both
