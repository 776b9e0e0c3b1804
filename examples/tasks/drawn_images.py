"""The images of the pictures: their choice and their order."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from engine.signals import Stop
from mvmae.data import ImageError, ImageSource


def varied(source: ImageSource, transform: Any, count: int = 8, among: int = 256) -> Tensor:
    """Return the images that an eye can judge best of some of a source, (B, C, H, W), always the same ones."""
    return take(source, among, transform, seed=0)[0][:count]


def take(source: ImageSource, count: int, transform: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read up to ``count`` images, the same ones for the same seed; what cannot be read is left out, and named.

    Classes take turns, each with its images of the most colour and contrast first.

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
    stacked = torch.stack(images)
    colour = (stacked.amax(1) - stacked.amin(1)).float().mean((1, 2))
    contrast = stacked.float().mean(1).std((1, 2))
    turns, seen = list[tuple[int, int]](), Counter[int]()
    for place in ((colour + 1) * contrast).argsort(descending=True, stable=True).tolist():  # + 1: grey ones too
        label = labels[place]
        turns.append((seen[label] if label >= 0 else 0, place))
        seen[label] += 1
    order = torch.tensor([place for _, place in sorted(turns, key=lambda turn: turn[0])])
    return stacked[order], torch.tensor(labels)[order], torch.tensor(indices)[order]
