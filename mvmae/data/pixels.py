"""Pixels of arrays of any type and layout, and of Pillow images -> (H, W, C) uint8."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

Pixels: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]
Range: TypeAlias = tuple[float, float]
WHITE: Colour = (255, 255, 255)
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MOST_OUTSIDE = 0.05
"""Share of values outside the range from which on the range is another: overshoots of resampling and glints are fewer."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as in Pillow and torchvision."""


def to_uint8(array: "NDArray[Any]", value_range: Range | None = None, own_range: Range | None = None) -> Pixels:
    """Scale pixels of any type to 8 bits: low to 0, high to 255, values outside clipped, NaN as low; 8 bits stay as they are.

    The range, (low, high), is the user's, else what the file tells, else the type's: never guessed from an image's values, so
    that equal values are equal in all images.

    Raises:
        ValueError: Without `value_range`: pixels without a range, or most of which lie outside.
    """
    if array.dtype == np.uint8:
        return np.asarray(array, dtype=np.uint8)
    low, high = value_range or own_range or type_range(array.dtype)
    values = np.nan_to_num(array.astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
    if value_range is None and (outside := share_outside(values, (low, high))) > MOST_OUTSIDE:
        found = f"{outside:.0%} lie outside, in {values.min():g} to {values.max():g}"
        raise ValueError(f"pixels of type {array.dtype} must be {low:g} to {high:g}, {found}: give value_range")
    np.clip(values, low, high, out=values)
    values -= np.float32(low)  # in place, since images can be large
    values *= np.float32(255 / (high - low))
    scaled: Pixels = np.rint(values, out=values).astype(np.uint8)
    return scaled


def type_range(dtype: "np.dtype[Any]") -> Range:
    """Return the range of a type: 0 to 1 for floats and truth values, 0 to the largest value for integers of up to 16 bits.

    Raises:
        ValueError: Integers of more bits, which no picture fills.
    """
    if dtype.kind not in "iu":
        return 0, 1
    if dtype.itemsize > 2:
        raise ValueError(f"pixels of type {dtype} have no range of their own: give value_range, or convert to uint8")
    return 0, int(np.iinfo(dtype).max)


def share_outside(values: "NDArray[Any]", value_range: Range) -> float:
    """Return the share of values outside a range among those that are not 0, as empty parts of pictures are."""
    outside = (values < value_range[0]) | (values > value_range[1])
    return int(outside.sum()) / max(int(np.count_nonzero(values)), 1)


def channels_last(array: "NDArray[Any]", channels: int) -> "NDArray[Any]":
    """Convert (H, W), (H, W, C), or (C, H, W), whose first side alone is the number of channels asked for, to (H, W, C).

    Raises:
        ValueError: Another shape or type, or both sides are `channels`.
    """
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        got = f"the shape {array.shape} and the type {array.dtype}"
        raise ValueError(f"an array must be (H, W), (H, W, C) or (C, H, W) numbers, got {got}")
    if array.ndim == 2:
        return array[..., None]
    if array.shape[0] == array.shape[2] == channels:
        raise ValueError(f"the channels may stand first or last in the shape {array.shape}: give a tensor, (C, H, W)")
    return array.transpose(1, 2, 0) if array.shape[0] == channels else array


def with_channels(pixels: Pixels, channels: int, background: Colour = WHITE, alpha: bool = True) -> Pixels:
    """Convert to a number of channels: repeat grey, blend alpha with a background, colour to grey; else they must agree."""
    held = pixels.shape[2]
    if held == channels:
        return pixels
    if held in (2, 4) and channels in (1, 3) and alpha:
        return with_channels(_blend(pixels, background), channels)
    if held == 1:
        return np.repeat(pixels, channels, axis=2)
    if held == 3 and channels == 1:
        grey: Pixels = np.rint(pixels @ np.array(LUMA, dtype=np.float32)).astype(np.uint8)[..., None]
        return grey
    raise ValueError(f"the image must have {channels} channels (in_chans), got {held}")


def pillow_pixels(image: Image.Image, channels: int, background: Colour) -> Pixels:
    """Convert a Pillow image of 8 bits to a number of channels (4: RGBA, or CMYK unchanged)."""
    if image.mode == "La":  # multiplied by alpha
        image = image.convert("LA")
    if channels in (1, 3) and image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        if rgba[..., 3].min() < 255:
            return with_channels(rgba, channels, background)
    if channels not in _MODES:
        got = f"{len(image.getbands())} of mode {image.mode}"
        raise ValueError(f"the image must have {channels} channels (in_chans), got {got}")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    if image.mode != _MODES[channels] and not (image.mode == "CMYK" and channels == 4):
        image = image.convert(_MODES[channels])
    pixels: Pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _blend(pixels: Pixels, background: Colour) -> Pixels:
    """Lay (H, W, C + 1), whose last channel is alpha, on a background: (H, W, C); opaque pixels do not change."""
    alpha = pixels[..., -1].astype(np.uint16)
    under = background if pixels.shape[2] == 4 else [int(np.rint(np.array(background) @ np.array(LUMA, dtype=np.float32)))]
    blended = np.empty_like(pixels[..., :-1])
    for channel, value in enumerate(under):
        blended[..., channel] = (pixels[..., channel] * alpha + value * (255 - alpha) + 127) // 255
    return blended


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
