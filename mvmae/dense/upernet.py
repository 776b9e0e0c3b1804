"""The head of UPerNet, which classifies every pixel (Xiao et al. 2018; Table 4).

Shapes: B images, H x W pixels of the finest map, D width of the maps, E width of the head.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation


class FCNHead(nn.Module):
    """One convolution to width E and a classifier on one map: UPerNet's auxiliary head (Long et al. 2015)."""

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256) -> None:
        super().__init__()
        convolution = Conv2dNormActivation(in_channels, channels, 3)
        self.layers = nn.Sequential(convolution, nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of each class, (B, D, H, W) to (B, classes, H, W)."""
        logits: Tensor = self.layers(x)
        return logits


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest map, a top-down pyramid, and a classifier on all levels (Xiao et al. 2018).

    Args:
        in_channels: width D of each map, finest first.
        num_classes: number of classes.
        channels: width E of the head (BEiT's for ViT-B: 768).
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int = 768) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2dNormActivation(coarsest, channels, 1)) for size in (1, 2, 3, 6)
        )
        self.bottleneck = Conv2dNormActivation(coarsest + len(self.pools) * channels, channels, 3)
        self.laterals = nn.ModuleList(Conv2dNormActivation(width, channels, 1) for width in finer)
        self.outputs = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in finer)
        self.fusion = Conv2dNormActivation(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits of each class at each place of the finest map, (B, classes, H, W).

        Args:
            maps: (B, D, H / 2^level, W / 2^level), finest first, as `mvmae.dense.ViTPyramid` returns them.

        Raises:
            ValueError: if it is trained on one image at a time: batch normalisation of a map pooled to 1 x 1 needs two.
        """
        *finer, coarsest = maps.values()
        if self.training and len(coarsest) < 2:
            raise ValueError("UPerHead must be trained on at least 2 images, got 1: use a larger batch")
        pooled = [_resize(pool(coarsest), coarsest) for pool in self.pools]
        x = self.bottleneck(torch.cat([coarsest, *pooled], 1))
        levels = [x]
        for fine, lateral, output in reversed(list(zip(finer, self.laterals, self.outputs, strict=True))):
            x = lateral(fine) + _resize(x, fine)
            levels.append(output(x))
        finest = levels[-1]
        fused = self.fusion(torch.cat([_resize(level, finest) for level in reversed(levels)], 1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
