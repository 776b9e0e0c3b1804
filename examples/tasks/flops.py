"""The cost of a training step in floating-point operations."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvmae import MultiViewMAE, random_mask


def flops_per_image(model: MultiViewMAE, num_views: int = 2) -> float:
    """Count the operations of a training step, forward and backward, for one image with all its views.

    Only matrix products and convolutions count, by their shapes: the same number on every machine. Attention counts as the six
    products of its formula, two forward and four backward: fused kernels compute one of them twice, and torch's counter does
    not know the CPU's.
    """
    size, patches = model.encoder.patch_embed.img_size, model.encoder.patch_embed.num_patches
    weight: torch.Tensor = model.encoder.patch_embed.proj.weight
    views = torch.zeros(2, num_views, weight.shape[1], *size, device=weight.device)  # two images: NT-Xent needs negatives
    mask = random_mask(2 * num_views, patches, model.mask_ratio, device=weight.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(views, mask=mask).loss.backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / 2
