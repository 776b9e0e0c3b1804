"""Augmentation of views after crop and flip, as repeatable as the crops: colour jitter, or a function of the user.

Shapes: V views, C channels, H W pixels.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode import ImageLike

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as in Pillow and torchvision."""


class ColorJitter:
    """Random brightness, contrast, saturation and hue of a view, by one matrix product a view (SimCLR, Chen et al., 2020).

    The ranges are those of torchvision's `ColorJitter`, and so is the result but for its clamps between the four changes and
    its hue, which turns in HSV: here hue turns the chroma plane of YIQ, which keeps the brightness of every pixel. The random
    numbers come from torch's global generator, which `AugmentedViews` seeds for each sample.

    Args:
        brightness: the factor of all values is uniform in 1 - brightness to 1 + brightness, from 0.
        contrast: likewise the factor of the distance from the view's mean brightness.
        saturation: likewise the factor of the distance from grey.
        hue: the turn is uniform in -hue to hue, in turns: at most 0.5.
        grayscale: probability of a view without colour.

    Raises:
        ValueError: if an argument is out of its range, or, on call, if colour is to change in views of other than 3 channels.
    """

    def __init__(
        self, brightness: float, contrast: float, saturation: float = 0.0, hue: float = 0.0, *, grayscale: float = 0.0
    ) -> None:
        if min(brightness, contrast, saturation, hue, grayscale) < 0 or hue > 0.5 or grayscale > 1:
            given = f"{brightness:g} {contrast:g} {saturation:g} {hue:g} and {grayscale:g}"
            raise ValueError(f"jitter must be at least 0, its hue at most 0.5, and grayscale at most 1, got {given}")
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.grayscale = grayscale

    def __call__(self, view: Tensor) -> Tensor:
        """Change a view, (C, H, W) uint8, and return it."""
        brightness, contrast, saturation, turn, grey = (2 * torch.rand(5, dtype=torch.float64) - 1).tolist()
        factor = max(1 + self.brightness * brightness, 0.0)
        spread = max(1 + self.contrast * contrast, 0.0)
        vivid = 0.0 if (grey + 1) / 2 < self.grayscale else max(1 + self.saturation * saturation, 0.0)
        return self.apply(view, factor, spread, vivid, self.hue * turn)

    def apply(self, view: Tensor, brightness: float, contrast: float, saturation: float, turn: float) -> Tensor:
        """Change a view by these factors, and turn its hue: y = A x + b, rounded, within 0 to 255.

        Args:
            view: (C, H, W) uint8.
            brightness: factor of all values.
            contrast: factor of the distance from the view's mean brightness.
            saturation: factor of the distance from grey.
            turn: of the hue, in turns.

        Returns:
            (C, H, W) uint8.
        """
        channels = len(view)
        if channels != 3 and (self.saturation or self.hue or self.grayscale):
            raise ValueError(f"jitter of saturation and hue, and grayscale, must have 3 channels, got {channels}: leave them 0")
        pixels = view.flatten(1).float()  # (C, H * W)
        luma = pixels.new_tensor(LUMA) if channels == 3 else pixels.new_full((channels,), 1 / channels)
        mean = luma @ pixels.mean(dim=1)
        matrix = colour_matrix(saturation, turn) if channels == 3 else torch.eye(channels)
        offset = ((1 - contrast) * brightness * mean).expand(channels, 1)
        changed = torch.addmm(offset, matrix, pixels, alpha=brightness * contrast)
        return changed.round_().clamp_(0, 255).to(torch.uint8).view_as(view)


def colour_matrix(saturation: float, turn: float) -> Tensor:
    """Return the matrix that scales the distance of an RGB colour from grey and turns its hue, (3, 3).

    Args:
        saturation: factor of the distance.
        turn: in turns, about the axis of greys, at constant brightness.
    """
    grey, quarter = _grey_and_quarter_turn()
    across, along = saturation * math.sin(2 * math.pi * turn), saturation * math.cos(2 * math.pi * turn)
    return (1 - along) * grey + along * torch.eye(3) + across * quarter


@functools.cache
def _grey_and_quarter_turn() -> tuple[Tensor, Tensor]:
    """Return the matrix that takes colour away, and the one that takes brightness away and turns the hue by a quarter."""
    yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)
    quarter = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    return torch.tensor(LUMA).expand(3, 3), torch.linalg.solve(yiq, quarter @ yiq).float()


class AugmentedViews:
    """Views of an image, each changed by a function such as `ColorJitter`, a transform of torchvision or the user's own.

    The numbers that the function draws from the global generators of torch, NumPy and Python depend on the sample alone, as
    the crops do. The state of the generators is restored.

    Args:
        transform: (image, generator=) -> (V, C, H, W) uint8, such as `MultiViewTransform`.
        augment: (C, H, W) uint8 -> the same.

    Raises:
        TypeError: if the function cannot be called, or, on call, returns something else.
    """

    def __init__(self, transform: Callable[..., Tensor], augment: Callable[[Tensor], Any]) -> None:
        if not callable(augment):
            raise TypeError(f"augment must be a function from (C, H, W) uint8 to the same, got a {type(augment).__name__}")
        self.transform, self.augment = transform, augment

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, C, H, W) of a call's result."""
        shape: tuple[int, ...] = getattr(self.transform, "shape", ())
        return shape

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the views of one image, and change each.

        Args:
            image: as the transform takes it.
            generator: of this sample.

        Returns:
            (V, C, H, W) uint8.
        """
        views = self.transform(image, generator=generator)
        with _seeded(int(torch.randint(2**62, (), generator=generator))):
            changed = [self.augment(view) for view in views]
        for view in changed:
            if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.shape != views.shape[1:]:
                what = f"{view.dtype} {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
                raise TypeError(f"the augmentation must return torch.uint8 {tuple(views.shape[1:])}, as it gets, got {what}")
        return torch.stack(changed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators, and restore their state afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the processor alone: torch.manual_seed takes five times as long
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
