"""A plain ViT as the backbone of a detector or of a segmentation network (Tables 3 and 4).

`WindowedViT` runs any plain ViT of timm at the large image sizes of these tasks; `ViTPyramid` makes feature maps at four
strides of its outputs, under torchvision's conventions.

Shapes: B images, C channels, H x W pixels, P patch side, h x w patches, D encoder width, E pyramid width.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

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
        window_size: side of a window in patches (`WindowAttention`) in all blocks but the last of each quarter, which attend
            over the whole image, as all do where it is None.
        rel_pos: whether to learn relative positions in each block, zero at first.
        rebuild: whether a fixed sine-cosine table of positions is computed again for ``image_size`` (MIMDet); other positions
            are interpolated.
        grad_checkpointing: whether to compute each block again in the backward pass, which saves memory.

    Raises:
        TypeError: if ``vit`` is not a plain ViT, or its attention is not timm's.
        ValueError: if a block does not exist, or the size does not fit.
    """

    def __init__(
        self,
        vit: nn.Module,
        image_size: int | tuple[int, int] = 1024,
        *,
        taps: Sequence[int] | None = None,
        window_size: int | None = 16,
        rel_pos: bool = True,
        rebuild: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        plain = copy.deepcopy(check_encoder(vit))
        depth = len(plain.blocks)
        quarters = tuple(max((quarter + 1) * depth // 4, 1) - 1 for quarter in range(4))
        self.taps = tuple(quarters if taps is None else taps)
        if not self.taps or not set(self.taps) <= set(range(depth)):
            raise ValueError(f"taps must be blocks among 0..{depth - 1}, got {self.taps}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be at least 1 patch, or None for no windows, got {window_size}")
        self.embed_dim, self.patch_size = int(plain.embed_dim), pair(plain.patch_embed.patch_size)
        self.grid_size = grid_size(pair(image_size), self.patch_size)
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed, self.pos_drop, self.norm_pre = plain.patch_embed, plain.pos_drop, plain.norm_pre
        self.pos_embed = plain.pos_embed
        if plain.pos_embed is not None:
            grid = plain.patch_embed.grid_size
            table = plain.pos_embed.detach()[:, 0 if plain.no_embed_class else plain.num_prefix_tokens :]
            fixed = table.is_meta or torch.allclose(table[0], sincos_table(self.embed_dim, grid).to(table), atol=1e-2)
            if rebuild and fixed:
                table = sincos_table(self.embed_dim, self.grid_size)[None].to(table)
            else:
                table = resample_abs_pos_embed(table, list(self.grid_size), list(grid), num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(table, requires_grad=plain.pos_embed.requires_grad)
        self.blocks = plain.blocks[: max(self.taps) + 1]
        for index, block in enumerate(self.blocks):
            window = None if window_size is None or index in quarters else (window_size, window_size)
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


def group_norm(channels: int) -> nn.Module:
    """Build group normalisation in 32 groups, or in fewer, so that a group has at least 8 channels."""
    return nn.GroupNorm(gcd(channels, min(32, max(channels // 8, 1))), channels)


class ViTPyramid(nn.Module):
    """Feature maps of a plain ViT at the strides P/4, P/2, P, 2P, 4 to 32 pixels for P = 16, under torchvision's conventions.

    Serves torchvision's detectors as their backbone, with the ``out_channels`` that they ask for. Transposed convolutions
    enlarge and pooling shrinks the maps after four blocks. The styles:

    - ``"li2021"``: with group normalisation (MIMDet has batch normalisation over all GPUs), and an FPN (Li et al. 2021);
    - ``"beit"``: with batch normalisation, of the encoder's width, for `UPerHead` (Bao et al. 2021).

    Args:
        trunk: a ViT that returns the maps after four blocks.
        style: see above.
        out_channels: width E of the FPN's maps.

    Raises:
        ValueError: if there is no such style, or the trunk does not have four taps.
    """

    def __init__(self, trunk: WindowedViT, style: Literal["li2021", "beit"] = "li2021", *, out_channels: int = 256) -> None:
        super().__init__()
        if style not in ("li2021", "beit"):
            raise ValueError(f"style must be 'li2021' or 'beit', got {style!r}")
        if len(trunk.taps) != 4:
            raise ValueError(f"the trunk must have 4 taps, got {len(trunk.taps)}")
        width, norm = trunk.embed_dim, group_norm if style == "li2021" else nn.BatchNorm2d
        up = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        levels: list[list[nn.Module]] = [[up(), norm(width), nn.GELU(), up()], [up()], [], [nn.MaxPool2d(2, ceil_mode=True)]]
        self.trunk, self.out_channels = trunk, out_channels if style == "li2021" else width
        self.neck = nn.ModuleList(nn.Sequential(*layers) for layers in levels)
        self.fpn = FeaturePyramidNetwork([width] * 4, out_channels, norm_layer=norm) if style == "li2021" else None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps ``"0"`` to ``"3"``, finest first, (B, E, H / stride, W / stride).

        With the FPN ``"pool"``, at twice the last stride, follows, as in torchvision's own backbones.

        Args:
            images: (B, C, H, W), normalised; H and W are multiples of the patch size.
        """
        taps = self.trunk(images)
        maps = OrderedDict((str(level), neck(tap)) for level, (neck, tap) in enumerate(zip(self.neck, taps, strict=True)))
        if self.fpn is not None:
            maps = self.fpn(maps)
            maps["pool"] = F.max_pool2d(maps["3"], 1, stride=2)
        return maps
