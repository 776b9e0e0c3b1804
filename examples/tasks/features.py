"""Features of images by any model: one transform, one pooling and one loop for k-NN, linear probe and `embed.py`.

Shapes: N images, B of a batch, V views, C channels, H x W pixels, D width of a feature.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.distributed import Ranks
from engine.signals import Stop
from mvmae import MultiViewTransform
from mvmae.data import EvalTransform, ImageSource, embed_rows

_logger = logging.getLogger(__name__)
POOLS = ("avg", "token", "model")


class Pooled(nn.Module):
    """A model of timm whose feature is the pooled vector of choice, for `embed_rows`.

    Args:
        model: of timm.
        pool: ``"avg"``: the mean patch token of a transformer; ``"token"``: its class token; ``"model"``: what timm pools for
            its classifier, which for the encoders of this package is the mean patch token too. Of other models all three are
            what timm pools. ``"logits"``: what a model with a head computes, instead of a feature.
    """

    def __init__(self, model: Any, pool: str = "avg") -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)
        return features

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = True) -> Tensor:
        """Pool (B, T, D) to (B, D)."""
        prefix = getattr(self.model, "num_prefix_tokens", None)
        if self.pool in ("model", "logits") or tokens.ndim != 3 or prefix is None:
            pooled: Tensor = self.model.forward_head(tokens, pre_logits=self.pool != "logits")
            return pooled
        if self.pool == "token" and getattr(self.model, "cls_token", None) is None:
            raise Stop("--pool token must have a model with a class token, got one without: use --pool avg")
        norm = getattr(self.model, "fc_norm", None) or nn.Identity()
        vector: Tensor = norm(tokens[:, 0] if self.pool == "token" else tokens[:, prefix:].mean(dim=1))
        return vector


class OfViews(nn.Module):
    """Features (B, V * D) of V views of each image, (B, V, C, H, W) uint8, for `embed_rows`."""

    def __init__(self, pooled: Pooled, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pooled, self.normalize = pooled, normalize

    def forward_features(self, views: Tensor) -> Tensor:
        """Compute the pooled feature of each view."""
        features = self.pooled.forward_head(self.pooled.forward_features(self.normalize(views.flatten(0, 1))))
        by_view: Tensor = features.unflatten(0, views.shape[:2])
        return by_view

    def forward_head(self, features: Tensor, *, pre_logits: bool = True) -> Tensor:
        """Return the features of an image in one row."""
        return features.flatten(1)


@torch.no_grad()
def extract(
    model: nn.Module,
    source: ImageSource,
    transform: EvalTransform | MultiViewTransform,
    ranks: Ranks,
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_bad: int = 100,
) -> tuple[Tensor, Tensor]:
    """Compute features (N, D) and labels (N,) of all images that can be read, in their order, in all ranks.

    The model, `Pooled` or `OfViews`, is in evaluation mode here, and then as it was. Each rank encodes its share, of which
    ``max_bad`` images may be unreadable: they are named and left out. Labels are -1 where the source has none.
    """
    share = range(ranks.rank, len(source), ranks.world_size)
    batches: Sequence[Sequence[int]] = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    features, read, bad = torch.empty(0), torch.zeros(len(source), dtype=torch.bool), 0
    for part in embed_rows(model, source, batches, transform, num_workers=workers):
        if part.rows:
            features = features if len(features) else torch.zeros(len(source), part.features.shape[1])
            features[part.rows], read[part.rows] = part.features, True
        for row, reason in part.bad.items():
            _logger.warning("bad image %r: %s; it is left out", source.name(row), reason)
        bad += len(part.bad)
        if bad > max_bad:
            raise Stop(f"{bad} images cannot be read, more than the {max_bad} that --max-bad allows: see the warnings", 1)
    features, read = features.to(ranks.device), read.to(ranks.device)
    if ranks.world_size > 1:  # each row is zero in all ranks but one
        width = max(ranks.gather(features.shape[1] if len(features) else 0))
        features = features if len(features) else torch.zeros(len(source), width, device=ranks.device)
        votes = read.int()
        dist.all_reduce(features)
        dist.all_reduce(votes)
        read = votes > 0
    if not read.any():
        raise Stop(f"none of {len(source)} images can be read: {source.name(0)} is one of them", 1)
    labels = torch.full((len(source),), -1) if source.labels is None else torch.as_tensor(source.labels)
    return features[read], labels.to(ranks.device)[read]
