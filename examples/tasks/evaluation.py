"""How good an encoder's features are, on the same images every time: k-NN accuracy, view retrieval, rank, uniformity."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed import Ranks
from mvmae import MultiViewTransform
from mvmae.data import EvalTransform, ImageSource, normalize
from mvmae.metrics import effective_rank, knn_accuracy, uniformity, view_retrieval
from tasks.features import OfViews, Pooled, extract
from tasks.probe import NEIGHBOURS
from tasks.splits import Part, Splits, draw

VIEWS, CROPPED = 8, 512
"""Random views of an image of which view retrieval is computed, and the most images of which they are taken."""
FEW = 50
"""Held-out images below which images that are trained on join them for the rank: so few span few directions in any case."""


class Evaluation:
    """Evaluates an encoder on at most ``limit`` held-out images, or on those that are trained on where none are.

    With a ``limit`` of 0 nothing is measured. View retrieval is of the random views that ``crops`` takes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        splits: Splits,
        crops: MultiViewTransform,
        *,
        limit: int,
        ranks: Ranks,
        workers: int,
        max_bad: int,
    ) -> None:
        self.pooled, self.crops, self.limit, self.ranks = Pooled(encoder), crops, limit, ranks
        self.train, self.val, _ = splits
        self.transform = EvalTransform(encoder)
        self.extract = partial(extract, ranks=ranks, workers=workers, max_bad=max_bad)
        self.source: ImageSource = self.train if self.val is None else self.val
        parts = [] if self.val is None else [self.train, self.val]
        self.labelled = bool(parts) and all(part.labels is not None and part.labels.min() >= 0 for part in parts)

    @property
    def images(self) -> int:
        """Number of images of which k-NN accuracy, or without labels view retrieval, is a share."""
        return min(self.limit, len(self.source), self.limit if self.labelled else CROPPED)

    def describe(self) -> str:
        """Return a line about the images."""
        if not self.limit:
            return "none"
        about = "training" if self.val is None else "held-out"
        return f"on {min(self.limit, len(self.source))} {about} images, {'k-NN' if self.labelled else 'view retrieval'}"

    def features(self, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Compute features (N, D) and labels (N,) of at most ``limit`` images, always the same ones."""
        return self.extract(self.pooled, Part(source, draw(len(source), self.limit)), self.transform)

    def bank(self, queries: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute features and labels of the images that held-out ones are compared with: none where none are held out."""
        return self.features(self.train) if self.val is not None else (queries[0][:0], queries[1][:0])

    def retrieval(self) -> dict[str, float]:
        """Compute ``retrieval``, in percent: the share of views whose most similar view is of the same image."""
        part = Part(self.source, draw(len(self.source), min(self.limit, CROPPED)))
        if len(part) < 2:
            return {}
        cfg: Mapping[str, Any] = self.pooled.model.pretrained_cfg
        encode = OfViews(self.pooled, partial(normalize, mean=cfg["mean"], std=cfg["std"]))
        features, _ = self.extract(encode, part, self.crops, batch_size=8)
        return {"retrieval": 100 * view_retrieval(features.unflatten(1, (self.crops.num_views, -1)))}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Compute ``effective_rank`` and ``uniformity``, and ``knn`` (percent) with labels or ``retrieval`` without."""
        if not self.limit:
            return {}
        queries, labels = self.features(self.source)
        bank, known = self.bank((queries, labels))
        spread = torch.cat([queries, bank]) if len(queries) < FEW else queries
        if len(spread) < 2:
            return {}
        metrics = {"effective_rank": effective_rank(spread), "uniformity": uniformity(spread)}
        if self.labelled:
            return metrics | {"knn": 100 * knn_accuracy(bank, known, queries, labels, k=min(NEIGHBOURS, len(bank)))}
        return metrics | self.retrieval()
