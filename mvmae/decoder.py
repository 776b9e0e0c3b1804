"""The light decoder that reconstructs the pixels (Section 3.1.4).

Shapes: B images, L patches, K visible, T prefix tokens, D encoder width, E decoder width, P patch side, C channels.
"""

import math
from typing import cast

import torch
from timm.models.vision_transformer import Block, LayerNorm
from torch import Tensor, nn

from .masking import Mask
from .patches import pair, sincos_table


class MAEDecoder(nn.Module):
    """Transformer blocks over visible latents and mask tokens, down to the pixels of every patch: y = g(z) (Section 3.1.4).

    Args:
        encoder_dim: width D of the encoder's tokens.
        grid_size: rows and columns of patches.
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: number of channels C of the images.
        num_prefix_tokens: number T of the encoder's class and register tokens; they are decoded along, without positions.
        dim: width E, a multiple of 4 and of ``num_heads`` (MAE: 512).
        depth: number of blocks (paper, Table 5: 4).
        num_heads: attention heads (MAE: 16).

    Raises:
        ValueError: if the width does not divide into heads or positions.
    """

    def __init__(
        self,
        encoder_dim: int,
        *,
        grid_size: tuple[int, int],
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_prefix_tokens: int = 1,
        dim: int = 512,
        depth: int = 4,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"decoder width must be a multiple of the {num_heads} heads, got {dim}")
        ph, pw = pair(patch_size)
        self.grid_size = (grid_size[0], grid_size[1])
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", torch.empty(math.prod(self.grid_size), dim), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(dim=dim, num_heads=num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        )
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, ph * pw * in_chans)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise weights (Xavier-uniform, Section 4.1.1), biases (zero), mask token (N(0, 0.02), MAE) and positions."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the positions, which no checkpoint holds and ``to_empty`` leaves undefined (the method's name is timm's)."""
        table = self.get_buffer("pos_embed")
        table.copy_(sincos_table(table.shape[1], self.grid_size).float())

    def forward(self, tokens: Tensor, mask: Mask, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Predict every patch, (B, L, P * P * C).

        Args:
            tokens: the encoder's output for the visible patches, prefix tokens first, (B, T + K, D).
            mask: which patches those are.
            grid_size: rows and columns of patches, where they are not those that the decoder was built for.

        Raises:
            ValueError: if tokens and mask do not belong together.
        """
        prefix, (batch, visible) = self.num_prefix_tokens, mask.visible.shape
        if tokens.ndim != 3 or tokens.shape[:2] != (batch, prefix + visible):
            raise ValueError(
                f"tokens must have the shape ({batch}, {prefix} prefix + {visible} visible, D), got {tuple(tokens.shape)}"
            )
        tokens = self.embed(tokens)  # (B, T + K, E)
        hidden = self.mask_token.expand(batch, mask.masked.shape[1], -1)  # float32 from here to the norm, under autocast too
        places = mask.visible[:, :, None].expand(-1, -1, hidden.shape[2])
        patches = hidden.scatter(1, places, tokens[:, prefix:].to(hidden.dtype))  # (B, L, E), in the order of the image
        positions = self.get_buffer("pos_embed")
        if grid_size is not None and grid_size != self.grid_size:
            positions = sincos_table(positions.shape[1], grid_size).to(positions.dtype).to(positions.device)
        tokens = torch.cat([tokens[:, :prefix], patches + positions], dim=1)
        tokens = self.norm(self.blocks(tokens)[:, prefix:])
        return cast(Tensor, self.head(tokens))
