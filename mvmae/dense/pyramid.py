"""A plain ViT as the backbone of a detector or of a segmentation network (Tables 3 and 4).

`WindowedViT` runs any plain ViT of timm at the large image sizes of these tasks; `ViTPyramid` makes feature maps at four
strides of its outputs, under torchvision's conventions.

Shapes: B images, C channels, H x W pixels, P patch side, h x w patches, D encoder width, E pyramid width.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, resample_abs_pos_embed
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

from ..masked_vit import check_encoder
from ..patches import grid_size, pair, sincos_table
from .windows import WindowAttention


class WindowedViT(nn.Module):
    """A plain ViT on large images: most blocks attend within windows, a few over the whole image (Li et al. 2021).

    The weights of ``vit`` are copied. Its prefix tokens (class, registers), final norm and head are left out: with relative
    positions at zero and one window over all, the maps are those of ``vit.forward_intermediates`` without prefix tokens. Names
    and shapes of the parameters are timm's, beside ``blocks.*.attn.rel_pos_h`` and ``rel_pos_w``.

    Args:
        vit: any plain ViT of timm (`check_encoder`), with its drop path.
        image_size: pixels (height and width) that positions are made for; at other sizes they are interpolated.
        taps: the blocks whose output is returned, counted from 0; by default the last of each quarter, (2, 5, 8, 11) of 12.
        window_size: side of a window in patches (`WindowAttention`), or None for attention over the whole image in all blocks.
        global_blocks: the blocks that attend over the whole image; by default the last of each quarter.
        rel_pos: whether to learn relative positions in each block, zero at first.
        positions: ``"interpolate"`` resizes the ViT's positions; ``"rebuild"`` computes the fixed sine-cosine table
            again (MIMDet), for a ViT that has that table.
        grad_checkpointing: whether to compute each block again in the backward pass, which saves memory.

    Raises:
        TypeError: if ``vit`` is not a plain ViT, or its attention is not timm's.
        ValueError: if a block does not exist, or size or positions do not fit.
    """

    def __init__(
        self,
        vit: nn.Module,
        image_size: int | tuple[int, int] = 1024,
        *,
        taps: Sequence[int] | None = None,
        window_size: int | None = 16,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = True,
        positions: Literal["interpolate", "rebuild"] = "interpolate",
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        plain = copy.deepcopy(check_encoder(vit))
        depth = len(plain.blocks)
        quarters = tuple(max((quarter + 1) * depth // 4, 1) - 1 for quarter in range(4))
        self.taps = tuple(quarters if taps is None else taps)
        global_blocks = tuple(quarters if global_blocks is None else global_blocks)
        if not self.taps or not set(self.taps + global_blocks) <= set(range(depth)):
            raise ValueError(f"taps and global_blocks must be blocks among 0..{depth - 1}, got {self.taps} and {global_blocks}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be at least 1 patch, or None for no windows, got {window_size}")
        self.embed_dim, self.patch_size = int(plain.embed_dim), pair(plain.patch_embed.patch_size)
        self.grid_size = grid_size(pair(image_size), self.patch_size)
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed, self.pos_drop, self.norm_pre = plain.patch_embed, plain.pos_drop, plain.norm_pre
        self.pos_embed = None if plain.pos_embed is None else _positions(plain, self.grid_size, positions)
        self.blocks = plain.blocks[: max(self.taps) + 1]
        for index, block in enumerate(self.blocks):
            window = None if window_size is None or index in global_blocks else (window_size, window_size)
            extent = (min(window[0], self.grid_size[0]), min(window[1], self.grid_size[1])) if window else self.grid_size
            attention = getattr(block, "attn", block)
            block.attn = WindowAttention(attention, window=window, positions=extent if rel_pos else None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps after the blocks ``taps``, each (B, D, h, w).

        Args:
            images: (B, C, H, W), normalised; H and W are multiples of the patch size.

        Raises:
            ValueError: if the images cannot be cut into whole patches.
        """
        grid = grid_size((images.shape[2], images.shape[3]), self.patch_size)
        x = self.patch_embed.norm(self.patch_embed.proj(images).permute(0, 2, 3, 1))  # (B, h, w, D)
        if self.pos_embed is not None:
            table = resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid_size), num_prefix_tokens=0)
            x = x + table.unflatten(1, grid)
        x = self.norm_pre(self.pos_drop(x))
        outputs = []
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
            outputs.append(x)
        return [outputs[tap].permute(0, 3, 1, 2).contiguous() for tap in self.taps]


def _positions(vit: VisionTransformer, grid: tuple[int, int], positions: str) -> nn.Parameter:
    """Return the positions of the patches of a larger grid, (1, h * w, D), without those of prefix tokens."""
    table = vit.pos_embed.detach()[:, 0 if vit.no_embed_class else vit.num_prefix_tokens :]
    old_grid = vit.patch_embed.grid_size
    if positions == "interpolate":
        table = resample_abs_pos_embed(table, list(grid), list(old_grid), num_prefix_tokens=0)
    elif positions != "rebuild":
        raise ValueError(f"positions must be 'interpolate' or 'rebuild', got {positions!r}")
    elif table.is_meta or torch.allclose(table[0], sincos_table(vit.embed_dim, old_grid).to(table), atol=1e-2):
        table = sincos_table(vit.embed_dim, grid)[None].to(table)
    else:
        raise ValueError(
            "positions='rebuild' must have the fixed sine-cosine table, got another table in this encoder: use 'interpolate'"
        )
    return nn.Parameter(table, requires_grad=vit.pos_embed.requires_grad)


def group_norm(channels: int) -> nn.Module:
    """Build group normalisation in 32 groups, or in fewer, so that a group has at least 8 channels."""
    return nn.GroupNorm(gcd(channels, min(32, max(channels // 8, 1))), channels)


class ViTPyramid(nn.Module):
    """Feature maps of a plain ViT at the strides P/4, P/2, P and 2P (4, 8, 16, 32 pixels), under torchvision's conventions.

    Serves torchvision's detectors as their backbone, with the ``out_channels`` that they ask for. The styles:

    - ``"li2021"``: transposed convolutions up and pooling down from four taps, then an FPN (Li et al. 2021, MIMDet);
    - ``"vitdet"``: the simple pyramid, on the last tap alone (Li et al. 2022);
    - ``"beit"``: ``"li2021"`` without FPN and without ``"pool"``, of the encoder's width, for `UPerHead` (Bao et al. 2021).

    Args:
        trunk: a ViT that returns the maps after four blocks.
        style: see above.
        out_channels: width E of the maps.
        norm_layer: builds a normalisation for a number of channels; by default `group_norm` (``"li2021"``; MIMDet's FPN has
            batch normalisation over all GPUs), layer normalisation at each place (``"vitdet"``), batch normalisation
            (``"beit"``).

    Raises:
        ValueError: if there is no such style, or the trunk does not have four taps.
    """

    def __init__(
        self,
        trunk: WindowedViT,
        style: Literal["li2021", "vitdet", "beit"] = "li2021",
        *,
        out_channels: int = 256,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {"li2021": group_norm, "vitdet": LayerNorm2d, "beit": nn.BatchNorm2d}
        if style not in norms:
            raise ValueError(f"style must be one of {', '.join(map(repr, norms))}, got {style!r}")
        if len(trunk.taps) != 4:
            raise ValueError(f"the trunk must have 4 taps, got {len(trunk.taps)}")
        norm, width = norm_layer or norms[style], trunk.embed_dim
        half, quarter = (width // 2, width // 4) if style == "vitdet" else (width, width)
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        finest = [up(width, half), norm(half), nn.GELU(), up(half, quarter)]
        levels: list[list[nn.Module]] = [finest, [up(width, half)], [], [nn.MaxPool2d(2, ceil_mode=True)]]
        if style == "vitdet":
            conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=None)
            for layers, channels in zip(levels, (quarter, half, width, width), strict=True):
                layers += [conv(channels, out_channels, 1), conv(out_channels, out_channels, 3)]
        self.trunk, self.style = trunk, style
        self.out_channels = width if style == "beit" else out_channels
        self.neck = nn.ModuleList(nn.Sequential(*layers) for layers in levels)
        self.fpn = FeaturePyramidNetwork([width] * 4, out_channels, norm_layer=norm) if style == "li2021" else None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps ``"0"`` to ``"3"``, finest first, (B, E, H / stride, W / stride).

        The styles for detectors return ``"pool"`` at twice the last stride too, as torchvision's own backbones do.

        Args:
            images: (B, C, H, W), normalised; H and W are multiples of the patch size.
        """
        taps = self.trunk(images)
        taps = taps[-1:] * 4 if self.style == "vitdet" else taps
        maps = OrderedDict((str(level), neck(tap)) for level, (neck, tap) in enumerate(zip(self.neck, taps, strict=True)))
        if self.fpn is not None:
            maps = self.fpn(maps)
        if self.style != "beit":
            maps["pool"] = F.max_pool2d(maps["3"], 1, stride=2)
        return maps
