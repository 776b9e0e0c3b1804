"""Where a plain ViT looks: its attention, and attention rollout (Abnar and Zuidema, 2020; Fig. 2).

Shapes: B images, A heads, N tokens (prefix tokens first), h x w patches.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..masked_vit import check_encoder


@torch.no_grad()
def attention_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention weights that a plain ViT, in eval mode meanwhile, has for normalised images, (B, C, H, W).

    Returns:
        for each block, first to last, (B, A, N, N): row i holds the share that token i takes from each token, and sums to 1.

    Raises:
        TypeError: if the encoder is not a plain ViT.
    """
    vit: Any = check_encoder(encoder)
    found: list[Tensor] = []
    layers = [block.attn for block in vit.blocks]
    fused, training = [layer.fused_attn for layer in layers], vit.training
    hooks = [layer.attn_drop.register_forward_hook(lambda *call: found.append(call[2].float())) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False  # which would not give the weights
        vit.eval().forward_features(images)
    finally:
        for layer, hook, before in zip(layers, hooks, fused, strict=True):
            hook.remove()
            layer.fused_attn = before
        vit.train(training)
    return found


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Multiply the blocks' attention (`attention_maps`), averaged over heads and with the residual connection counted as half.

    Returns:
        (B, N, N): row i holds the share that token i of the last block has from each patch and prefix token, and sums to 1.
    """
    if not maps:
        raise ValueError("maps must hold the attention of at least one block, got none")
    mixed = [(weights.mean(dim=1) + torch.eye(weights.shape[-1], device=weights.device)) / 2 for weights in maps]
    return reduce(lambda total, block: block @ total, mixed)


def patch_heat(weights: Tensor, grid: tuple[int, int], *, query: str = "mean") -> Tensor:
    """Return the share that each patch contributes: (B, h, w), above 0, with a sum of at most 1.

    Args:
        weights: (B, N, N), rows that sum to 1: of `rollout`, or one block's attention averaged over heads.
        grid: h and w.
        query: ``"token"``, the share that the class token takes from each patch, or ``"mean"``, the patches' average.
    """
    prefix = weights.shape[1] - grid[0] * grid[1]
    if query not in ("mean", "token") or (query == "token" and prefix < 1):
        raise ValueError(f"query must be 'mean', or 'token' with a prefix token, got {query!r} with {prefix} prefix tokens")
    rows = weights[:, 0] if query == "token" else weights[:, prefix:].mean(dim=1)
    heat: Tensor = rows[:, prefix:].unflatten(1, grid)
    return heat
