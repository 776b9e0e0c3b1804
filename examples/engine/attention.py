"""Attention in bf16 on a CPU, where torch's fused kernel is slow for short sequences."""

import torch
from torch import nn

from engine.distributed import in_bf16

SHORT = 256
"""Tokens up to which two matrix products are faster, forward and backward, by ``benchmark.py --parts attention``."""


def fit_attention(model: nn.Module, tokens: int, precision: str, device: torch.device) -> None:
    """Let timm's attention layers use plain matrix products in bf16 on a CPU, where sequences are short; else change nothing.

    Both ways compute the same but for rounding.

    Args:
        model: any with timm's layers.
        tokens: length of its sequences in training.
        precision: of the training, as in `autocast`.
        device: where it is trained.
    """
    if device.type == "cpu" and in_bf16(precision, device) and tokens <= SHORT:
        for module in model.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = False  # type: ignore[assignment]
