"""The quality of an encoder's features while it is pretrained: k-NN accuracy, effective rank, uniformity, drift."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed import Ranks
from engine.signals import Stop
from mvmae.data import CentreCropTransform, ImageSource, MultiViewTransform
from mvmae.metrics import effective_rank, knn_accuracy, linear_cka, mean_cosine, uniformity, view_retrieval
from tasks.drawn_images import varied
from tasks.inputs import normalize
from tasks.labelled import each_once
from tasks.splits import Part, Splits, draw

Encode = Callable[[Tensor], Tensor]
MONITORED = 512
"""Most images of a look in the middle of a run, and of those whose features are followed."""
FEW = 50
"""Held-out images below which images that are trained on join them: so few use few directions whatever the encoder is."""
NEIGHBOURS = 20


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    source: ImageSource,
    transform: Callable[..., Tensor],
    ranks: Ranks,
    **loading: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute features (N, D) and labels (N,) of all images that can be read, in their order, in all processes.

    Args:
        encode: images (B, C, H, W) -> features (B, D) of each kind, on the images' device.
        source: the images; labels are -1 where it has none.
        transform: (image, generator=) -> (C, H, W).
        processes: this one and the others, each of which loads and encodes its share.
        **loading: as in `labelled.each_once`.
    """
    found: dict[str, Tensor] = {}
    read = torch.zeros(len(source), dtype=torch.int64, device=ranks.device)
    for images, rows in each_once(source, transform, processes, **loading):
        for kind, values in encode(images).items() if len(rows) else ():
            if kind not in found:
                found[kind] = values.new_zeros(len(source), values.shape[1])
            found[kind][rows] = values
        read[rows] = 1
    if ranks.world_size > 1:  # each row is zero in all processes but one
        shapes: dict[str, torch.Size] = {}
        for each in ranks.gather({kind: values.shape for kind, values in found.items()}):
            shapes |= each
        found |= {kind: torch.zeros(shape, device=read.device) for kind, shape in shapes.items() if kind not in found}
        for values in [*(found[kind] for kind in shapes), read]:
            dist.all_reduce(values)
    if not read.any():
        raise Stop(f"none of {len(source)} images can be read: {source.name(0)} is one of them", 1)
    labels = torch.full((len(source),), -1) if source.labels is None else torch.as_tensor(source.labels)
    return {kind: values[read.bool()] for kind, values in found.items()}, labels.to(ranks.device)[read.bool()]


class Monitor:
    """Looks at features of images that are not cropped or masked at random, the same ones every time, shared by all processes.

    Args:
        splits: images that are trained on and images that are held out, which are looked at where there are any.
        transform: from an image to what the encoder takes, as uint8.
        mean: of each channel, in [0, 1].
        std: of each channel.
        limit: most images of each split; 0 looks at none.
        processes: this one and the others.
        width: of the features.
        drift: also report how far the features have moved since the first look.
        **loading: as in `labelled.each_once`.

    Attributes:
        before: what the first look found; `look` leaves it to the caller.
        start: features of the first look (N, D), where drift is followed; none before it.
        crops: takes the views of which looks compute view retrieval; None, as at first, computes none.
    """

    def __init__(
        self,
        splits: Splits,
        transform: CentreCropTransform,
        mean: Sequence[float],
        std: Sequence[float],
        limit: int,
        ranks: Ranks,
        *,
        width: int,
        drift: bool = False,
        **loading: Any,
    ) -> None:
        self.train, self.val, _ = splits
        self.transform, self.mean, self.std, self.limit, self.drift = transform, mean, std, limit, drift
        self.processes, self.loading = processes, loading
        self.before: dict[str, float] = {}
        self.start = torch.empty(0, width)
        self.crops: MultiViewTransform | None = None
        self._drawn: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run compares with."""
        return {"before": self.before, "start_features": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.before, self.start = dict(state["before"]), state["start_features"]

    @property
    def looked_at(self) -> ImageSource:
        """The images that are held out, or those that are trained on where none are."""
        return self.train if self.val is None else self.val

    @property
    def labelled(self) -> bool:
        """Whether there is k-NN accuracy: images are held out, and all of both splits have labels."""
        parts = [self.train, self.val] if self.val is not None else []
        return bool(parts) and all(part.labels is not None and part.labels.min() >= 0 for part in parts)

    @property
    def counted(self) -> int:
        """Number of images of which view retrieval, or without it k-NN accuracy, is a share."""
        return min(self.limit, len(self.looked_at), MONITORED if self.crops else self.limit)

    def drawn(self) -> Tensor:
        """Return the images of pictures (B, C, H, W), normalised: of those looked at, else of those that are trained on."""
        if self._drawn is None:
            source = self.looked_at if self.limit else self.train
            self._drawn = normalize(varied(source, self.transform).to(self.ranks.device), self.mean, self.std)
        return self._drawn

    @property
    def note(self) -> str:
        """A line about the images."""
        if not self.limit:
            return "features are not measured"
        about = "training" if self.val is None else "held-out"
        return f"features are measured on {min(self.limit, len(self.looked_at))} {about} images"

    @torch.no_grad()
    def look(self, encode: Encode, limit: int = 0) -> dict[str, float]:
        """Compute ``effective_rank`` and ``uniformity`` of at most ``limit`` images, always the same ones.

        And ``knn`` (percent) where there are labels; ``similarity`` and ``cka`` (see `moved`) where drift is followed;
        and view `retrieval` where there are ``crops``.
        """
        if not self.limit:
            return {}
        limit, knn = min(limit or self.limit, self.limit), {}
        features, labels = self.extract(encode, self.looked_at, limit)
        if self.val is not None:
            bank, known = self.extract(encode, self.train, limit)
            if self.labelled:
                knn["knn"] = 100 * knn_accuracy(bank, known, features, labels, k=min(NEIGHBOURS, len(bank)))
            features = torch.cat([features, bank]) if len(features) < FEW else features
        if len(features) < 2:
            return {}
        found = {"effective_rank": effective_rank(features), "uniformity": uniformity(features)} | knn
        return found | self.retrieval(encode, limit) | (self.moved(features) if self.drift else {})

    @torch.no_grad()
    def retrieval(self, encode: Encode, limit: int) -> dict[str, float]:
        """Compute ``retrieval``, in percent, of at most `MONITORED` images; nothing without ``crops``, or of one image."""
        views = None if self.crops is None else self._views(encode, self.crops, min(limit, MONITORED))
        return {} if views is None or len(views) < 2 else {"retrieval": 100 * view_retrieval(views)}

    def _views(self, encode: Encode, crops: MultiViewTransform, limit: int) -> Tensor:
        """Compute features (N, V, D) of random views, always the same ones, of at most ``limit`` images."""

        def features(views: Tensor) -> dict[str, Tensor]:
            encoded = encode(normalize(views.flatten(0, 1), self.mean, self.std))
            return {"": encoded.unflatten(0, views.shape[:2]).flatten(1)}

        part, few = (
            Part(self.looked_at, draw(len(self.looked_at), limit)),
            max(self.loading["batch_size"] // crops.num_views, 1),
        )
        found, _ = extract(features, part, crops, self.processes, **{**self.loading, "batch_size": few})
        features_of_views: Tensor = found[""].unflatten(1, (crops.num_views, -1))  # (N, V, D)
        return features_of_views

    def moved(self, features: Tensor) -> dict[str, float]:
        """Compare features with those of the first look: mean cosine and linear CKA, both 1 where nothing has moved."""
        features = features[:MONITORED].cpu()
        if not len(self.start):
            self.start = features
            return {}
        count = min(len(self.start), len(features))
        start, features = self.start[:count], features[:count]
        return {"similarity": mean_cosine(start, features), "cka": linear_cka(start, features)}

    def extract(self, encode: Encode, source: ImageSource, limit: int) -> tuple[Tensor, Tensor]:
        """Compute features (N, D) and labels (N,), -1 where there are none, of at most ``limit`` images that can be read."""

        def features(images: Tensor) -> dict[str, Tensor]:
            return {"": encode(normalize(images, self.mean, self.std))}

        part = Part(source, draw(len(source), limit))
        found, labels = extract(features, part, self.transform, self.processes, **self.loading)
        return found[""], labels


def report(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """Return lines on what a run has done to the features: how far they moved, and what they were and are worth.

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
