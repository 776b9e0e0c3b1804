"""Attention within windows of an image, with relative positions.

Shapes: B images, h x w patches, N patches in a window, D encoder width, A width of all attention heads, d of one.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """The attention of timm within windows of an image, with decomposed relative positions (MViTv2; Li et al. 2022).

    Takes the layers of ``attn`` over under their names. The relative positions are zero at first and change nothing then. They
    enter as further columns of queries and keys, q' = [s q, q R_h, q R_w] and k' = [k, onehot(row), onehot(column)], so that
    q' k' = s q k + q R_h[row] + q R_w[column] without a matrix of N x N biases.

    Args:
        attn: the attention of a block.
        window: rows and columns of patches in a window; None attends over the whole image. An image that is not a multiple of
            it is filled up with zeros, which are attended to, as in ViTDet; one that is smaller is a window of its own.
        positions: rows and columns of patches for which relative positions are learned (others are interpolated), or None for
            no such positions.

    Raises:
        TypeError: if ``attn`` is not timm's `Attention`.
    """

    def __init__(
        self, attn: Attention, *, window: tuple[int, int] | None = None, positions: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if type(attn) is not Attention:
            raise TypeError(f"{type(attn).__name__} is not timm's Attention: use a plain ViT, such as vit_* or mvmae_vit_*")
        self.window, self.num_heads, self.scale = window, attn.num_heads, attn.scale
        self.qkv, self.q_norm, self.k_norm, self.attn_drop = attn.qkv, attn.q_norm, attn.k_norm, attn.attn_drop
        self.norm, self.gate = getattr(attn, "norm", nn.Identity()), getattr(attn, "gate", None)
        self.proj, self.proj_drop = attn.proj, attn.proj_drop
        self.rel_pos_h = self.rel_pos_w = None
        if positions is not None:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(self.qkv.weight.new_zeros(2 * size - 1, attn.head_dim)) for size in positions
            )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within each window, (B, h, w, D) to (B, h, w, D). The blocks of timm pass the other arguments, unset."""
        size = (x.shape[1], x.shape[2])
        window = size if self.window is None else (min(self.window[0], size[0]), min(self.window[1], size[1]))
        qkv = self.qkv(split_windows(x, window).flatten(1, 2)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B windows, heads, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        head_dim, scale, dropout = v.shape[-1], self.scale, self.attn_drop.p if self.training else 0.0
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            grid = q.unflatten(2, window)
            rel_h = torch.einsum("bnhwd,hkd->bnhwk", grid, _vectors(self.rel_pos_h, window[0]).to(q.dtype))
            rel_w = torch.einsum("bnhwd,wkd->bnhwk", grid, _vectors(self.rel_pos_w, window[1]).to(q.dtype))
            q = torch.cat([q * scale, rel_h.flatten(2, 3), rel_w.flatten(2, 3)], -1)
            k = torch.cat([k, _places(window, k).expand(*k.shape[:2], -1, -1)], -1)
            v, scale = F.pad(v, (0, sum(window))), 1.0  # the fast kernels want q, k and v of one width
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)[..., :head_dim]
        out = out.transpose(1, 2).flatten(2).unflatten(1, window)
        out = self.norm(join_windows(out, size))  # (B, h, w, A)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut (B, h, w, D) into windows, (B windows, rows, columns, D), filled up with zeros below and on the right."""
    rows, columns = window
    below, right = -x.shape[1] % rows, -x.shape[2] % columns
    x = F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x
    windows: Tensor = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3).flatten(0, 2)
    return windows


def join_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `split_windows` for an image of ``size`` patches."""
    down, across = -(-size[0] // windows.shape[1]), -(-size[1] // windows.shape[2])
    x = windows.unflatten(0, (-1, down, across)).transpose(2, 3)  # (B, down, rows, across, columns, D)
    joined: Tensor = x.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
    return joined


def _vectors(table: Tensor, size: int) -> Tensor:
    """Return the vector of each pair of ``size`` places, (size, size, d), from those of all distances, (2 n - 1, d)."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def _places(window: tuple[int, int], like: Tensor) -> Tensor:
    """Return [onehot(row), onehot(column)] of each patch in a window, (N, rows + columns)."""
    rows, columns = (torch.eye(size, dtype=like.dtype, device=like.device) for size in window)
    return torch.cat([rows.repeat_interleave(len(columns), 0), columns.repeat(len(rows), 1)], 1)
