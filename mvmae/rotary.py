"""Rotary positions of timm's `Eva` (DINOv3, EVA-02, ViTs with RoPE), taken for the visible patches alone.

Shapes: B images, L patches, K visible, T prefix tokens, D encoder width, R twice a head's width: sines, then cosines.
"""

from functools import partial
from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rotary_table(vit: Eva, grid: tuple[int, int]) -> Tensor | None:
    """Give the rotary positions of every patch: (L, R), or (depth, heads, L, R) where each block learns its own.

    None where the encoder has no rotary positions. In training mode timm may shift or scale the grid at random, as the model
    was built to.
    """
    if vit.rope is None:
        return None
    fixed = hasattr(vit.rope, "feat_shape") and not vit.dynamic_img_size
    table: Tensor = vit.rope.get_embed() if fixed else vit.rope.get_embed(shape=grid)
    return table


def rotated_blocks(vit: Eva, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run the blocks of an `Eva`, each visible patch at its own place.

    Args:
        vit: the encoder.
        tokens: of prefix and visible patches, (B, T + K, D).
        visible: numbers of the visible patches, (B, K).
        grid: rows and columns of patches.

    Returns:
        (B, T + K, D).
    """
    table, blocks = rotary_table(vit, grid), list(vit.blocks)
    if table is None:
        positions: list[Any] = [None] * len(blocks)
    elif table.ndim == 2:
        positions = [table[visible][:, None]] * len(blocks)  # (B, 1, K, R), one for all heads
    else:
        positions = [of_block[:, visible].transpose(0, 1) for of_block in table]  # (B, heads, K, R)
    for block, rope in zip(blocks, positions, strict=True):
        tokens = _run(block, vit.grad_checkpointing)(tokens, rope=rope)
    return tokens


def _run(block: nn.Module, checkpointed: bool) -> Any:
    return partial(checkpoint, block, use_reentrant=False) if checkpointed else block
