"""Features of labelled images and what they tell: the k-NN test of an encoder while it is pretrained."""

from collections.abc import Callable, Sequence

import torch
from common import normalize
from torch import Tensor

from mvmae.metrics import knn_accuracy
from mvmae.sources import ImageSource, SplitError, open_images
from mvmae.views import CentreCropTransform

Encode = Callable[[Tensor], Tensor]


def labelled_splits(data: str, limit: int) -> list[ImageSource]:
    """Open the training and the held-out images of ``data``; none where it has no labels, no second split, or limit is 0."""
    try:
        splits = [open_images(data, split=split) for split in ("train", "val")] if limit else []
    except SplitError:
        return []
    return splits if all(split.labels is not None for split in splits) else []


@torch.no_grad()
def extract(
    encode: Encode,
    source: ImageSource,
    transform: CentreCropTransform,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Compute features (N, D) and labels (N,) of at most ``limit`` images, drawn once, the same every time."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit]
    features = []
    for part in order.split(256):
        images = torch.stack([transform(source[int(index)][0]) for index in part]).to(device)
        features.append(encode(normalize(images, mean, std)))
    return torch.cat(features), torch.as_tensor(source.labels)[order].to(device)


def knn_test(encode: Encode, splits: Sequence[ImageSource], transform: CentreCropTransform, **options: object) -> float | None:
    """Give the k-NN accuracy in percent on held-out images; None where there are none with labels."""
    if not splits:
        return None
    train, held_out = (extract(encode, split, transform, **options) for split in splits)  # type: ignore[arg-type]
    return 100 * knn_accuracy(*train, *held_out)
