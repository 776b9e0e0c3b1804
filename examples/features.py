"""What the features of an encoder are worth while it is pretrained: k-NN accuracy, effective rank, uniformity, drift."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from common import Stop, normalize
from torch import Tensor

from mvmae.drift import linear_cka, mean_cosine
from mvmae.images import ImageError
from mvmae.metrics import effective_rank, knn_accuracy, uniformity
from mvmae.sources import ImageSource, SplitError, open_images
from mvmae.views import CentreCropTransform

Encode = Callable[[Tensor], Tensor]
MONITORED = 512
"""Most images of a look in the middle of a run, and of those whose features are followed."""


class Monitor:
    """Looks at features of images that are not cropped or masked at random, the same ones every time.

    Args:
        source: images to train on, opened already: to list a large folder takes a while.
        data: where they come from; its held-out split is looked at where there is one, else some images of its own.
        transform: from an image to what the encoder takes, as uint8.
        mean: of each channel, in [0, 1].
        std: of each channel.
        limit: most images of each split; 0 looks at none.
        drift: also tell how far the features have moved from those of the first look.

    Attributes:
        start: features of the first look, where drift is followed.
    """

    def __init__(
        self,
        source: ImageSource,
        data: str,
        transform: CentreCropTransform,
        mean: Sequence[float],
        std: Sequence[float],
        limit: int,
        drift: bool = False,
    ) -> None:
        self.transform, self.mean, self.std, self.limit = transform, mean, std, limit
        self.drift = drift
        self.start: Tensor | None = None
        self.splits: list[ImageSource] = [source] if limit else []
        if limit:
            with contextlib.suppress(SplitError):
                self.splits.append(open_images(data, split="val"))

    @property
    def labelled(self) -> bool:
        """Whether there are labels on both sides of a k-NN test."""
        return len(self.splits) == 2 and all(split.labels is not None for split in self.splits)

    @torch.no_grad()
    def look(self, encode: Encode, device: torch.device, limit: int = 0) -> dict[str, float]:
        """Give ``effective_rank`` and ``uniformity`` of at most ``limit`` images, always the same ones.

        And ``knn`` (percent) where there are labels, ``similarity`` and ``cka`` (see `moved`) where drift is followed.
        """
        if not self.splits:
            return {}
        limit = min(limit or self.limit, self.limit)
        features, labels = self.extract(encode, self.splits[-1], device, limit)
        found = {"effective_rank": effective_rank(features), "uniformity": uniformity(features)}
        if self.labelled:
            bank, bank_labels = self.extract(encode, self.splits[0], device, limit)
            found["knn"] = 100 * knn_accuracy(bank, bank_labels, features, labels)
        return found | (self.moved(features) if self.drift else {})

    def moved(self, features: Tensor) -> dict[str, float]:
        """Compare features with those of the first look: mean cosine and linear CKA, both 1 where nothing has moved."""
        features = features[:MONITORED].cpu()
        if self.start is None:
            self.start = features
            return {}
        count = min(len(self.start), len(features))
        start, features = self.start[:count], features[:count]
        return {"similarity": mean_cosine(start, features), "cka": linear_cka(start, features)}

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


def report(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """Give lines on what a run has done to the features: how far they moved, and what they were and are worth.

    Args:
        before: the first look.
        after: the last.
    """
    if "cka" in after:
        yield f"features against those of the starting weights: cosine {after['similarity']:.3f}, CKA {after['cka']:.3f}"
    if "cka" in after and "effective_rank" in before:
        yield f"effective rank of the features: {before['effective_rank']:.1f} before, {after['effective_rank']:.1f} after"
    if "knn" in before and "knn" in after:
        yield f"k-NN accuracy on held-out images: {before['knn']:.1f} % before, {after['knn']:.1f} % after"
