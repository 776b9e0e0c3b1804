"""Mean and standard deviation of each channel of a user's images.

Shapes: C channels, H W pixels of a view.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decode import ImageError
from .folders import ImageSource

_logger = logging.getLogger(__name__)


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, in 0 to 1, to eight digits."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def measure_channels(source: ImageSource, transform: Callable[..., Tensor], *, limit: int = 2000) -> ChannelStatistics:
    """Measure mean and standard deviation over all pixels of a sample of images, the same sample every time.

    Sums are integers, and so exact in any order. Images that cannot be read are skipped.

    Args:
        source: the images.
        transform: from an image to (C, H, W) uint8 without randomness, such as `CentreCropTransform`; with one size for all
            images, each has the same weight.
        limit: most images to measure.

    Raises:
        ValueError: if no image can be read, or a channel is the same everywhere.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit]
    count, total, squares, seen = 0, torch.zeros(1), torch.zeros(1), 0
    for index in order.tolist():
        try:
            pixels = transform(source[index][0]).flatten(1).long()  # (C, H * W)
        except ImageError as error:
            _logger.warning("not measured: %s", error)
            continue
        total, squares = total.long() + pixels.sum(dim=1), squares.long() + pixels.square().sum(dim=1)
        count, seen = count + pixels.shape[1], seen + 1
    if not seen:
        raise ValueError(f"at least one image must be readable, got none of {len(order)}: check {source.name(int(order[0]))}")
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=0).sqrt()
    if not std.min() > 0:
        raise ValueError(
            f"each channel must vary, got channel {int(std.argmin())} with the same value in all of {seen} images: "
            "pass mean and std, or leave the channel out"
        )
    return ChannelStatistics(*(tuple(round(value / 255, 8) for value in values.tolist()) for values in (mean, std)))
