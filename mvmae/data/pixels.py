"""Pixels of arrays of any type and layout, and of Pillow images -> (H, W, C) uint8."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits, `I;16` and its kin included
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's convert("L")


def to_uint8(array: "NDArray[Any]", value_range: tuple[float, float] | None = None) -> Pixels:
    """Scale pixels of any type to 8 bits.

    uint16 maps 0..65535 to 0..255. For other types the range is the smallest of 0..1 (floats only), 0..255 and 0..65535 that
    holds the largest value, else 0..maximum. NaN becomes 0.

    Args:
        array: Pixels.
        value_range: Values that become 0 and 255, for data that uses a part of its type's range, such as 0..4095 for 12
            bits; values outside are clipped.

    Raises:
        ValueError: Negative values without a range.
    """
    if value_range is not None:
        low, high = value_range
        values = np.nan_to_num(array.astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
        np.clip(values, low, high, out=values)
        values -= np.float32(low)
        return _rounded(values, 255.0 / (high - low))
    if array.dtype == np.uint8:
        return np.asarray(array, dtype=np.uint8)
    if array.dtype == np.bool_:
        white: Pixels = np.where(array, np.uint8(255), np.uint8(0))
        return white
    values = np.nan_to_num(array.astype(np.float32), copy=False, posinf=0.0, neginf=0.0)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low < 0:
        raise ValueError(f"pixels must be 0 or more, got {low:g}: pass the image before it is normalised, or value_range")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        top = 65535.0
    else:
        tops = ([1.0] if array.dtype.kind == "f" else []) + [255.0, 65535.0]
        top = next((t for t in tops if high <= t), high)
    return _rounded(values, 255.0 / top)


def _rounded(values: "NDArray[np.float32]", factor: float) -> Pixels:
    """Return values times a factor, as bytes; works in place, since images can be large."""
    values *= np.float32(factor)
    scaled: Pixels = np.rint(values, out=values).astype(np.uint8)
    return scaled


def channels_last(array: "NDArray[Any]") -> "NDArray[Any]":
    """Convert (H, W), (H, W, C) or (C, H, W) to (H, W, C); C is the shorter of the first and the last side."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise ValueError(
            f"an array must be (H, W), (H, W, C) or (C, H, W) numbers, got the shape {array.shape} and the type {array.dtype}"
        )
    if array.ndim == 2:
        return array[..., None]
    return array.transpose(1, 2, 0) if array.shape[0] < array.shape[2] else array


def with_channels(pixels: Pixels, channels: int, background: Colour = WHITE) -> Pixels:
    """Convert to a number of channels: repeat grey, blend alpha with a background, colour to grey; else they must agree."""
    held = pixels.shape[2]
    if held == channels:
        return pixels
    if held in (2, 4) and channels in (1, 3):
        return with_channels(_laid_on(pixels, background), channels)
    if held == 1:
        return np.repeat(pixels, channels, axis=2)
    if held == 3 and channels == 1:
        grey: Pixels = np.rint(pixels @ _LUMA).astype(np.uint8)[..., None]
        return grey
    raise ValueError(f"the array must have {channels} channels (in_chans), got {held}")


def pillow_pixels(image: Image.Image, channels: int, value_range: tuple[float, float] | None, background: Colour) -> Pixels:
    """Convert a Pillow image to a number of channels (4: RGBA, or CMYK unchanged), deep modes as `to_uint8` does."""
    if image.mode.startswith(_DEEP):
        return with_channels(to_uint8(np.asarray(image)[..., None], value_range), channels)
    if channels in (1, 3) and image.has_transparency_data:
        laid = np.asarray(image.convert("RGBA"))
        if laid[..., 3].min() < 255:
            return with_channels(laid, channels, background)
    if channels not in _MODES:
        raise ValueError(
            f"the image must have {channels} channels (in_chans), got {len(image.getbands())} of mode {image.mode}"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    if image.mode != _MODES[channels] and not (image.mode == "CMYK" and channels == 4):
        image = image.convert(_MODES[channels])
    pixels: Pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _laid_on(pixels: Pixels, background: Colour) -> Pixels:
    """Blend (H, W, C + 1), whose last channel is alpha, with a background to (H, W, C); opaque pixels do not change."""
    alpha = pixels[..., -1].astype(np.uint16)
    under = background if pixels.shape[2] == 4 else [int(np.rint(np.array(background) @ _LUMA))]
    laid = np.empty_like(pixels[..., :-1])
    for channel, value in enumerate(under):
        laid[..., channel] = (pixels[..., channel] * alpha + value * (255 - alpha) + 127) // 255
    return laid
