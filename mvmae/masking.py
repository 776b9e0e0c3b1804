"""Random masking of patches (Section 3.1.2, Eq. 1), with the mask as data.

Shapes: B images, L patches of an image, K of them visible.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which patches of each image the encoder sees: Eq. 1 as two tensors that agree with each other.

    Attributes:
        visible: (B, K) int64, positions of the visible patches in ascending order.
        masked: (B, L) bool, True where a patch is masked.
    """

    visible: Tensor
    masked: Tensor

    @classmethod
    def from_masked(cls, masked: Tensor) -> "Mask":
        """Build a mask from the patches to hide.

        Args:
            masked: (B, L) bool, True = masked, with the same number of visible patches, at least one, in every row.

        Raises:
            ValueError: if the rows do not hide the same number of patches, or all of them.
            TypeError: if ``masked`` is not a (B, L) tensor of booleans.
        """
        if masked.dtype != torch.bool or masked.ndim != 2:
            raise TypeError(f"masked must be torch.bool of shape (B, L), got {masked.dtype} of shape {tuple(masked.shape)}")
        counts = set((~masked).sum(dim=1).tolist())
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"all rows must leave the same number of patches visible, at least 1, got {sorted(counts)}")
        return cls(masked.int().argsort(dim=1, stable=True)[:, : counts.pop()], masked)

    def select(self, rows: slice) -> "Mask":
        """Return the mask of some of the images."""
        return Mask(*(part[rows] for part in self))


def num_visible(length: int, mask_ratio: float) -> int:
    """Count the patches that stay visible: ``round(length * (1 - mask_ratio))``, in exact arithmetic.

    Raises:
        ValueError: if the ratio is out of range or leaves no patch visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1) (the paper's is 0.8), got {mask_ratio}")
    share = 1 - Fraction(repr(float(mask_ratio)))
    visible, rest = length * share.numerator // share.denominator, 2 * (length * share.numerator % share.denominator)
    if rest > share.denominator or (rest == share.denominator and visible % 2):  # `round`, which no symbolic length takes
        visible += 1
    if visible < 1:
        raise ValueError(
            f"mask_ratio must leave one of {length} patches visible, got {mask_ratio}: use at most {1 - 1 / length:.4g}"
        )
    return visible


def random_mask(
    batch_size: int,
    length: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    rows: slice = slice(None),
) -> Mask:
    """Draw a mask for every image, uniformly over all sets of K patches (Section 3.1.2).

    Args:
        batch_size: number B of images (of views, where an image has several: their masks are independent).
        length: number L of patches of an image.
        mask_ratio: share of the patches that is masked, in [0, 1).
        generator: source of the random numbers, which are drawn on its own device, so that a CPU generator gives the same
            masks for every device; torch's global one where it is None.
        device: where the mask is returned; the generator's device, or the CPU, where it is None.
        rows: which of the B masks to return. Numbers are drawn for all, so that a process gets its part of one process's masks.

    Raises:
        ValueError: if the ratio is out of range or leaves no patch visible.
    """
    visible = num_visible(length, mask_ratio)
    drawn_on = device if generator is None else generator.device
    source: dict[str, Any] = {} if generator is None else {"generator": generator}  # torch.compile refuses None
    noise = torch.rand(batch_size, length, device=drawn_on, **source)[rows]
    shown = noise.argsort(dim=1, stable=True)[:, :visible].sort(dim=1).values
    mask = Mask(shown, torch.ones_like(noise, dtype=torch.bool).scatter(1, shown, False))
    if device is None:
        return mask
    if torch.device(device).type == "cuda" and noise.device.type == "cpu":  # from pinned memory, without a wait for the device
        return Mask(*(part.pin_memory().to(device, non_blocking=True) for part in mask))
    return Mask(*(part.to(device) for part in mask))
