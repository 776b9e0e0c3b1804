"""The cost of a training step in floating-point operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvmae import MultiViewMAE, random_mask


def flops_per_image(model: MultiViewMAE, num_views: int = 2) -> float:
    """Count the operations of a pretraining step for one image with all its views."""
    shape, patches = _shape(model.encoder), model.encoder.patch_embed.num_patches
    device = next(model.parameters()).device
    mask = random_mask(2 * num_views, patches, model.mask_ratio, device=device)
    views = torch.zeros(2, num_views, *shape, device=device)  # two images: NT-Xent needs negatives
    return _count(lambda: model(views, mask=mask).loss) / 2


def flops_of_classifying(encoder: Any) -> float:
    """Count the operations of a fine-tuning step for one image: all patches, no decoder."""
    images = torch.zeros(1, *_shape(encoder), device=next(encoder.parameters()).device)
    return _count(lambda: encoder(images).sum())


def _shape(encoder: Any) -> tuple[int, int, int]:
    return encoder.patch_embed.proj.weight.shape[1], *encoder.patch_embed.img_size


def _count(loss: Callable[[], Tensor]) -> float:
    """Count the operations of a loss and its gradients.

    Only matrix products and convolutions count, by their shapes: the same number on every machine. Attention counts as the six
    products of its formula, two forward and four backward: fused kernels compute one of them twice, and torch's counter does
    not know the CPU's.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return float(counter.get_total_flops())
