"""What the features of an encoder are worth while it is pretrained: k-NN accuracy, effective rank, uniformity."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from common import Stop, normalize
from torch import Tensor

from mvmae.images import ImageError
from mvmae.metrics import effective_rank, knn_accuracy, uniformity
from mvmae.sources import ImageSource, SplitError, open_images
from mvmae.views import CentreCropTransform

Encode = Callable[[Tensor], Tensor]


class Monitor:
    """Looks at features of images that are not cropped or masked at random, the same ones every time.

    Args:
        data: images to train on; its held-out split is looked at where there is one, else some images of its own.
        transform: from an image to what the encoder takes, as uint8.
        mean: of each channel, in [0, 1].
        std: of each channel.
        limit: most images of each split; 0 looks at none.
    """

    def __init__(
        self, data: str, transform: CentreCropTransform, mean: Sequence[float], std: Sequence[float], limit: int
    ) -> None:
        self.transform, self.mean, self.std, self.limit = transform, mean, std, limit
        self.splits: list[ImageSource] = [open_images(data)] if limit else []
        if limit:
            with contextlib.suppress(SplitError):
                self.splits.append(open_images(data, split="val"))

    @property
    def labelled(self) -> bool:
        """Whether there are labels on both sides of a k-NN test."""
        return len(self.splits) == 2 and all(split.labels is not None for split in self.splits)

    @torch.no_grad()
    def look(self, encode: Encode, device: torch.device, limit: int = 0) -> dict[str, float]:
        """Give ``knn`` (percent, where there are labels), ``effective_rank`` and ``uniformity`` of at most ``limit`` images."""
        if not self.splits:
            return {}
        limit = min(limit or self.limit, self.limit)
        features, labels = self.extract(encode, self.splits[-1], device, limit)
        found = {"effective_rank": effective_rank(features), "uniformity": uniformity(features)}
        if self.labelled:
            bank, bank_labels = self.extract(encode, self.splits[0], device, limit)
            found["knn"] = 100 * knn_accuracy(bank, bank_labels, features, labels)
        return found

    @torch.no_grad()
    def extract(self, encode: Encode, source: ImageSource, device: torch.device, limit: int) -> tuple[Tensor, Tensor]:
        """Compute features (N, D) and labels (N,), -1 where there are none, of at most ``limit`` images that can be read."""
        features, labels = [], []
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit]
        for part in order.split(256):
            images = []
            for index in part.tolist():
                with contextlib.suppress(ImageError):  # the loader of the run reports it
                    image, label = source[index]
                    images.append(self.transform(image))
                    labels.append(-1 if label is None else label)
            if images:
                features.append(encode(normalize(torch.stack(images).to(device), self.mean, self.std)))
        if not features:
            raise Stop(f"none of {len(order)} images can be read: {source.name(int(order[0]))} is one of them", 1)
        return torch.cat(features), torch.tensor(labels, device=device)
