"""Augmentation of views after crop and flip, as repeatable as the crops: colour jitter, or a function of the user.

Shapes: V views, C channels, H W pixels.
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode import ImageLike
from .pixels import LUMA

YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
QUARTER = np.linalg.solve(YIQ, np.array([(0, 0, 0), (0, 0, -1), (0, 1, 0)]) @ YIQ)
"""Takes brightness away and turns the hue by a quarter."""


class ColorJitter:
    """Random brightness, contrast, saturation and hue of views, by one matrix product each (SimCLR, Chen et al., 2020).

    The ranges are those of torchvision's `ColorJitter`, which takes 11 times as long at 64 pixels, clamps between the four
    changes, and turns hue in HSV; here it turns in the chroma plane of YIQ, so every pixel keeps its brightness.

    Args:
        brightness: The factor of all values is uniform in 1 - brightness to 1 + brightness, from 0.
        contrast: Likewise the factor of the distance from the view's mean brightness.
        saturation: Likewise the factor of the distance from grey.
        hue: The turn is uniform in -hue to hue, in turns: at most 0.5.
        grayscale: Probability of a view without colour.

    Raises:
        ValueError: An argument is out of its range, or, on call, colour is to change in views of other than 3 channels.
    """

    def __init__(
        self, brightness: float, contrast: float, saturation: float = 0.0, hue: float = 0.0, *, grayscale: float = 0.0
    ) -> None:
        if min(brightness, contrast, saturation, hue, grayscale) < 0 or hue > 0.5 or grayscale > 1:
            given = f"{brightness:g} {contrast:g} {saturation:g} {hue:g} and {grayscale:g}"
            raise ValueError(f"jitter must be at least 0, its hue at most 0.5, and grayscale at most 1, got {given}")
        self.strength, self.hue, self.grayscale = (brightness, contrast, saturation), hue, grayscale

    def __call__(self, views: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Change a view, (C, H, W) uint8, or V views, (V, C, H, W), each by numbers of its own, and return them."""
        if views.ndim == 3:
            return self(views[None], generator=generator)[0]
        changes = []
        for *drawn, turn, grey in (2 * torch.rand(len(views), 5, dtype=torch.float64, generator=generator) - 1).tolist():
            factors = [max(1 + most * x, 0.0) for most, x in zip(self.strength, drawn, strict=True)]
            factors[2] *= (grey + 1) / 2 >= self.grayscale
            changes.append((*factors, self.hue * turn))
        return self.apply(views, changes)

    def apply(self, views: Tensor, changes: Sequence[Sequence[float]]) -> Tensor:
        """Change each view by its (brightness, contrast, saturation, turn): y = A x + b, rounded, within 0 to 255."""
        channels = views.shape[1]
        if channels != 3 and (self.strength[2] or self.hue or self.grayscale):
            raise ValueError(f"jitter of saturation and hue, and grayscale, must have 3 channels, got {channels}: leave them 0")
        pixels = views.flatten(2).float()  # (V, C, H * W)
        luma = pixels.new_tensor(LUMA) if channels == 3 else pixels.new_full((channels,), 1 / channels)
        changed = torch.empty_like(pixels)
        for values, mean, result, change in zip(pixels, (pixels.mean(dim=2) @ luma).tolist(), changed, changes, strict=True):
            brightness, contrast, saturation, turn = change
            matrix = colour_matrix(saturation, turn) if channels == 3 else torch.eye(channels)
            offset = pixels.new_full((1, 1), (1 - contrast) * brightness * mean)
            torch.addmm(offset, matrix, values, alpha=brightness * contrast, out=result)
        return changed.round_().clamp_(0, 255).to(torch.uint8).view_as(views)


def colour_matrix(saturation: float, turn: float) -> Tensor:
    """Return the matrix (3, 3) that scales the distance of an RGB colour from grey, and turns its hue, in turns."""
    across, along = saturation * math.sin(2 * math.pi * turn), saturation * math.cos(2 * math.pi * turn)
    matrix = (1 - along) * np.broadcast_to(LUMA, (3, 3)) + along * np.eye(3) + across * QUARTER
    return torch.from_numpy(matrix.astype(np.float32))


class AugmentedViews:
    """Views of an image, each changed by a function such as `ColorJitter`, a transform of torchvision or the user's own.

    What the function draws depends on the sample alone, as the crops do, if it draws from an argument `generator` (of torch)
    or `rng` (of NumPy), from the global generators of torch, NumPy and Python, whose state is restored, or from generators
    that it refers to by name or holds as attributes: of torch, NumPy and Python, and objects with `set_random_seed`, such as
    albumentations'. A generator hidden deeper cannot be seeded: it draws the same numbers in every worker.

    Args:
        transform: (image, generator=) -> (V, C, H, W) uint8, such as `MultiViewTransform`.
        augment: (C, H, W) uint8 -> the same.

    Raises:
        TypeError: On call: the function returns something else.
    """

    def __init__(self, transform: Callable[..., Tensor], augment: Callable[..., Any]) -> None:
        self.transform, self.augment = transform, augment
        function: Any = augment if inspect.isroutine(augment) else type(augment).__call__
        try:
            self._arguments = {"generator", "rng"} & inspect.signature(augment).parameters.keys()
            named = inspect.getclosurevars(inspect.unwrap(getattr(function, "__func__", function)))
            held = [*named.globals.values(), *named.nonlocals.values()]
        except (TypeError, ValueError):  # written in C
            self._arguments, held = set(), []
        owner = getattr(augment, "__self__", augment)
        self._generators = [thing for thing in (owner, *getattr(owner, "__dict__", {}).values(), *held) if _is_generator(thing)]

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the views of one image, and change each: (V, C, H, W) uint8."""
        views = self.transform(image, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        if type(self.augment) is ColorJitter:  # all views at once, without the global generators
            return self.augment(views, generator=torch.Generator().manual_seed(seed))
        own = {"generator": torch.Generator().manual_seed(seed), "rng": np.random.default_rng(seed)}
        given = {name: own[name] for name in self._arguments}
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the processor alone: torch.manual_seed takes five times as long
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for own_generator in self._generators:
                _seed(own_generator, seed)
            try:
                changed = [self.augment(view, **given) for view in views]
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
        for view in changed:
            if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.shape != views.shape[1:]:
                what = f"{view.dtype} {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
                raise TypeError(f"the augmentation must return torch.uint8 {tuple(views.shape[1:])}, as it gets, got {what}")
        return torch.stack(changed)


def _is_generator(thing: Any) -> bool:
    kinds = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
    return isinstance(thing, kinds) or (not isinstance(thing, type) and hasattr(thing, "set_random_seed"))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, (random.Random, np.random.RandomState)):
        generator.seed(seed % 2**32)
    else:
        generator.set_random_seed(seed % 2**32)
