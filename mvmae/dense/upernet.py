"""The head of UPerNet, which classifies every pixel (Xiao et al. 2018; Table 4).

Shapes: B images, H x W pixels of the finest map, D width of the maps, E width of the head.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Build a convolution that keeps the size, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class FCNHead(nn.Module):
    """One convolution and a classifier on one map: UPerNet's auxiliary head (Long et al. 2015).

    Args:
        in_channels: width D of the map.
        num_classes: number of classes.
        channels: width E.
        dropout: probability of leaving a channel out before the classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_relu(in_channels, channels, 3), nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)
        )

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
        pool_sizes: sides of the pooled maps.
        dropout: probability of leaving a channel out before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 768,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(coarsest, channels, 1)) for size in pool_sizes
        )
        self.bottleneck = conv_norm_relu(coarsest + len(pool_sizes) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(width, channels, 1) for width in finer)
        self.outputs = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fusion = conv_norm_relu(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits of each class at each place of the finest map, (B, classes, H, W).

        Args:
            maps: (B, D, H / 2^level, W / 2^level), finest first, as `mvmae.dense.ViTPyramid` returns them.

        Raises:
            ValueError: if the head is trained on one image at a time: batch normalisation of a map pooled to 1 x 1 needs two.
        """
        *finer, coarsest = maps.values()
        if self.training and len(coarsest) < 2:
            raise ValueError(
                "UPerHead must be trained on at least 2 images, got 1: use a larger batch, or batch normalisation in eval mode"
            )
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
