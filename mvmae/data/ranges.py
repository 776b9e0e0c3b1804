"""The one range of pixels of a whole set of images, where neither their type nor their tags tell it."""

import logging
from functools import lru_cache

import numpy as np

from .decode import MAX_PIXELS, ImageError, open_image
from .pixels import MOST_OUTSIDE, Range, share_outside, type_range
from .sampling import read
from .sources import ImageSource, spread

_SAMPLE = 100
_logger = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def decide_range(source: ImageSource, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Range | None:
    """Return the values that are black and white in all images of a set, by 100 of them, spread over it.

    Floats and signed integers tell no range: 0 to 1, or to the type's largest value, is taken if nearly all pixels of each
    image of the sample lie within. A script calls this before its first step where the user gave no range, and passes the
    result as `value_range` to all that reads images, so that none is judged by itself; once, whatever the number of models.

    Returns:
        The range, or None where each image tells it: 8 bits, unsigned integers of up to 16 bits, and what tags say.

    Raises:
        ValueError: An image does not fit the range, or the images have several: the user must say.
    """
    found: dict[tuple[str, Range], str] = {}  # type and range -> the first image of it
    told, dark, count = True, True, 0
    for index in spread(len(source), _SAMPLE):
        name = source.name(index)
        try:
            opened = open_image(read(source, index), channels=channels, max_pixels=max_pixels)
            values = opened.values()
        except ImageError:
            continue
        if values is None or values.dtype.kind == "b" or not len(finite := values[np.isfinite(values)]):
            continue
        held = f"{name} holds pixels of type {values.dtype} from {finite.min():g} to {finite.max():g}"
        try:
            own = opened.own_range or type_range(values.dtype)
        except ValueError:
            own = (0, -1)
        if share_outside(finite, own) > MOST_OUTSIDE:
            expected = f", not {own[0]:g} to {own[1]:g}" if own[0] < own[1] else ""
            raise ValueError(f"{held}{expected}: say what is black and white in all images by --value-range LOW HIGH")
        found.setdefault((str(values.dtype), own), name)
        told, dark, count = told and values.dtype.kind == "u", dark and finite.max() < own[1] / 8, count + 1
    if count and dark:
        _logger.warning("%d deep images of a sample all look black: %s, for one; --value-range says what is white", count, held)
    if told:
        return None
    if len({own for _, own in found}) > 1:
        kinds = ", ".join(f"{kind} of {low:g} to {high:g} ({name})" for (kind, (low, high)), name in found.items())
        raise ValueError(f"images of one set must have one range of pixels, got {kinds}: convert some, or give --value-range")
    (kind, (low, high)), _ = found.popitem()
    _logger.warning("%s: %g is taken for black and %g for white in all images; --value-range says otherwise", kind, low, high)
    return low, high
