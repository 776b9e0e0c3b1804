"""The images of the pictures: their choice, their order, and properties that need no model."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from engine.signals import Stop
from mvmae.data import ImageError, ImageSource

GROUPS = 10  # of images by brightness, contrast and lit area, equally large


def take(source: ImageSource, count: int, transform: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read up to ``count`` images, the same ones for the same seed; what cannot be read is left out, and named.

    Returns:
        the images, (B, C, H, W) as ``transform`` gives them; their labels (B,), -1 for none; their numbers in the source (B,).
    """
    images, labels, indices = list[Tensor](), list[int](), list[int]()
    for index in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(images) == count:
            break
        try:
            image, label = source[index]
            images.append(transform(image))
        except ImageError as error:
            print(f"left out: {error}")
            continue
        labels.append(-1 if label is None else label)
        indices.append(index)
    if not images:
        raise Stop(f"none of {len(source)} images can be read", 1)
    return torch.stack(images), torch.tensor(labels), torch.tensor(indices)


def varied(source: ImageSource, transform: Any, count: int = 8, among: int = 256) -> Tensor:
    """Return the images that an eye can judge best of some of a source, (B, C, H, W), always the same ones.

    Classes take turns, each with its images of the most varied pixels first.
    """
    images, labels, _ = take(source, among, transform, seed=0)
    order = images.float().std((2, 3)).mean(1).argsort(descending=True, stable=True)
    return images[order[spread(images[order], labels[order])[:count]]]


def spread(images: Tensor, labels: Tensor) -> Tensor:
    """Return an order (B,) of images (B, C, H, W) to draw: classes take turns, those with colour and contrast first.

    Images without a class stay in their order.
    """
    seen: Counter[int] = Counter()
    colour = (images.amax(1) - images.amin(1)).float().mean((1, 2))
    scores = torch.stack([colour * images.float().mean(1).std((1, 2)), colour], dim=1)
    keys = []
    for label, score in zip(labels.tolist(), (-scores).tolist(), strict=True):
        keys.append((seen[label], *score) if label >= 0 else (0, 0, 0))
        seen[label] += 1
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


def properties(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Group images (B, C, H, W) uint8 by what can be seen without a model, and by class where all have one; each (B,)."""
    grey = (images.float() / 255).mean(dim=1).flatten(1)
    lit = grey > 0.1  # leaves a black background out
    seen = {
        "brightness": (grey * lit).sum(1) / lit.sum(1).clamp_min(1),
        "contrast": grey.std(1),
        "lit area": lit.float().mean(1),
    }
    groups = {name: values.argsort().argsort() * GROUPS // len(values) for name, values in seen.items()}
    return groups if (labels < 0).any() else groups | {"class": labels}
