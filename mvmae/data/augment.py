"""A user's own augmentation of views, as repeatable as the package's crops.

Shapes: V views, C channels, H W pixels.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode import ImageLike


class AugmentedViews:
    """Views of an image, each changed by a function of the user, such as a transform of torchvision.

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
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
