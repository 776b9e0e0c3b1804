"""Images as sequences of patches, and the fixed positions of those patches.

Shapes: B images, C channels, H x W pixels, P patch side (Ph x Pw where it is not square), L = (H / Ph) * (W / Pw) patches in
row-major order, D width of a token. A patch is flattened rows first, then columns, channels last: (Ph * Pw * C).
"""

import torch
from torch import Tensor


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``size`` as (height, width); an integer stands for a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def grid_size(image_size: tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Count the rows and columns of patches in an image of (height, width) pixels.

    Raises:
        ValueError: if the image cannot be cut into whole patches.
    """
    (height, width), (ph, pw) = image_size, pair(patch_size)
    if height < ph or width < pw or height % ph or width % pw:
        side = f"{ph}" if ph == pw else f"{ph}x{pw}"
        raise ValueError(
            f"image size must be a multiple of the patch size {side}, got {height}x{width}: "
            f"the nearest is {max(round(height / ph), 1) * ph}x{max(round(width / pw), 1) * pw}"
        )
    return height // ph, width // pw


def patchify(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut images, (B, C, H, W), into non-overlapping patches, (B, L, Ph * Pw * C), rows of patches first (Section 3.1.2).

    Raises:
        ValueError: if ``images`` does not have four dimensions, or cannot be cut into whole patches.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(images.shape)}")
    ph, pw = pair(patch_size)
    rows, columns = grid_size((images.shape[2], images.shape[3]), (ph, pw))
    patches = images.reshape(*images.shape[:2], rows, ph, columns, pw)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, ph * pw * images.shape[1])


def unpatchify(patches: Tensor, patch_size: int | tuple[int, int], grid_size: tuple[int, int], in_chans: int) -> Tensor:
    """Join patches, (B, L, Ph * Pw * C), to images, (B, C, H, W), again: the inverse of `patchify`.

    Args:
        patches: (B, L, Ph * Pw * C).
        patch_size: side of a patch in pixels, or (height, width).
        grid_size: rows and columns of patches.
        in_chans: number of channels C.

    Raises:
        ValueError: if the patches do not have the shape that the other arguments ask for.
    """
    (ph, pw), (rows, columns) = pair(patch_size), grid_size
    expected = (rows * columns, ph * pw * in_chans)
    if patches.ndim != 3 or tuple(patches.shape[1:]) != expected:
        raise ValueError(
            f"patches must have the shape (B, {expected[0]}, {expected[1]}) for a grid of {rows}x{columns} patches of "
            f"{ph}x{pw} pixels and {in_chans} channels, got {tuple(patches.shape)}"
        )
    images = patches.reshape(-1, rows, columns, ph, pw, in_chans)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, in_chans, rows * ph, columns * pw)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation, (B, L, 1) each, of every patch over its pixels and channels.

    The variance is the unbiased one plus 1e-6 (MAE, since the paper is silent), so that a constant patch divides by 1e-3.
    """
    correction = 1 if patches.shape[-1] > 1 else 0
    variance, mean = torch.var_mean(patches, dim=-1, correction=correction, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalise every patch, (B, L, P * P * C), by its own mean and standard deviation (MAE, since the paper is silent)."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def denormalize_patches(patches: Tensor, like: Tensor) -> Tensor:
    """Undo `normalize_patches` with the statistics of other patches of the same shape.

    A prediction that is de-normalised with the statistics of its own target shows a brightness and contrast that the model
    never saw: say so wherever you show such a picture.
    """
    mean, std = patch_statistics(like)
    return patches * std + mean


def sincos_table(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Build the fixed 2-D sine-cosine positions of a grid of patches (Section 3.1.2): (L, D), float64, on the CPU.

    The layout is MAE's: the first half of the channels encodes the column, the second half the row, and each half is the
    sines of all frequencies followed by the cosines.

    Raises:
        ValueError: if ``embed_dim`` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"width must be a multiple of 4 for 2-D sine-cosine positions, got {embed_dim}")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid_size)
    row, column = (grid.reshape(-1, 1) * frequencies for grid in torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
