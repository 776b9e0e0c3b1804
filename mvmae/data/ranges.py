"""The one range of pixels of a whole set of images, where neither their type nor their tags tell it."""

import logging
from typing import NamedTuple

import numpy as np

from .decode import MAX_PIXELS, ImageError, open_image
from .pixels import MOST_OUTSIDE, Range, share_outside, type_range
from .sampling import read
from .sources import ImageSource, spread

_SAMPLE = 100
_logger = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """An image of the sample: its name and type, its own range, and the values that it holds."""

    name: str
    dtype: str
    range: Range
    low: float
    high: float
    outside: float


def decide_range(source: ImageSource, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Range | None:
    """Return the values that are black and white in all images of a set, by 100 of them, spread over it.

    Floats and signed integers tell no range: 0 to 1, or to the type's largest value, is taken if nearly all pixels of each
    image of the sample lie within. A script calls this before its first step where the user gave no range, and passes the
    result as `value_range` to all that reads images, so that none is judged by itself.

    Args:
        source: The images; those that cannot be read do not count.
        channels: As in `open_image`.
        max_pixels: Likewise.

    Returns:
        The range, or None where each image tells it: 8 bits, unsigned integers of up to 16 bits, and what tags say.

    Raises:
        ValueError: An image does not fit the range, or the images have several: the user must say.
    """
    sample = []
    for index in spread(len(source), _SAMPLE):
        try:
            opened = open_image(read(source, index), channels=channels, max_pixels=max_pixels)
            values = opened.values()
        except ImageError:
            continue
        if values is None or values.dtype.kind == "b" or not np.isfinite(values).any():
            continue
        name, values = source.name(index), values[np.isfinite(values)]
        try:
            own = opened.own_range or type_range(values.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error} (--value-range LOW HIGH)") from None
        sample.append(_Seen(name, str(values.dtype), own, values.min(), values.max(), share_outside(values, own)))
    if not sample:
        return None
    ranges = {seen.range: seen for seen in sample}
    held = f"the {len(sample)} images of a sample that are deeper than 8 bits hold {min(seen.low for seen in sample):g}"
    held += f" to {max(seen.high for seen in sample):g}"
    (low, high), told = sample[0].range, all(seen.dtype.startswith("uint") for seen in sample)
    if told:
        if max(seen.high / seen.range[1] for seen in sample) < 1 / 8:
            _logger.warning("%s of %g and look black: --value-range LOW HIGH gives another range", held, high)
        return None
    if len(ranges) > 1:
        kinds = ", ".join(f"{seen.dtype} of {seen.range[0]:g} to {seen.range[1]:g} ({seen.name})" for seen in ranges.values())
        raise ValueError(f"images of one set must have one range of pixels, got {kinds}: convert some, or give --value-range")
    if wrong := [seen for seen in sample if seen.outside > MOST_OUTSIDE]:
        about = f"{len(wrong)} of {len(sample)} images of a sample do not, {wrong[0].name} has {wrong[0].low:g} to {wrong[0].high:g}"
        raise ValueError(f"pixels of type {wrong[0].dtype} must be {low:g} to {high:g}; {about}: give --value-range LOW HIGH")
    _logger.warning("%s: %g becomes black and %g white (--value-range)", held, low, high)
    return low, high
