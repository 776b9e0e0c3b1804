"""Pictures of what a model looks at (Fig. 2), what it rebuilds (Fig. 8), and what its features tell apart.

Shapes: B images, V views, C channels, H x W pixels, P patch side, L patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..masking import Mask
from ..metrics import as_double
from ..model import MultiViewMAE
from ..patches import denormalize_patches, grid_size, unpatchify
from .sheet import contact_sheet, heat_colours

GREY = 0.5
"""What stands in the place of a masked patch, in [0, 1]."""


@torch.no_grad()
def reconstruct(
    model: MultiViewMAE, views: Tensor, *, mask: Mask | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rebuild views, (B, V, C, H, W), normalised, from their visible patches.

    Where the model predicts normalised patches, they are de-normalised with the mean and standard deviation of the true
    ones, which the model never saw: say so on the picture. The model is in eval mode meanwhile.

    Returns:
        the predicted images, (B * V, C, H, W), in the units of the views; and where patches were masked, (B * V, 1, H, W),
        bool.
    """
    training = model.training
    output = model.eval()(views, mask=mask, generator=generator, loss_weight=0)
    model.train(training)
    pred = output.pred.float()
    if _predicts_normalised(model):
        pred = denormalize_patches(pred, output.target.float())
    patch_size, channels = model.encoder.patch_embed.patch_size, views.shape[2]
    grid = grid_size((views.shape[3], views.shape[4]), patch_size)
    masked = output.mask.masked[:, :, None].expand(-1, -1, patch_size[0] * patch_size[1])
    return unpatchify(pred, patch_size, grid, channels), unpatchify(masked, patch_size, grid, 1)


def reconstruction_picture(
    model: MultiViewMAE,
    views: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mask: Mask | None = None,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Draw each view beside what stays of it under its mask, and with its masked patches as the model rebuilds them.

    More than three views stand in two columns. What the decoder predicts for visible patches is not shown: unless
    ``loss_on="all"``, nothing trains it.

    Views, (B, V, C, H, W), are normalised by ``mean`` and ``std``, in [0, 1]; three channels are shown, or the first. A mask
    over the B * V views is drawn, from ``generator``, where it is None.
    """
    rebuilt, masked = reconstruct(model, views, mask=mask, generator=generator)
    images, rebuilt = (to_unit_range(x, mean, std) for x in (views.flatten(0, 1), rebuilt))
    triple = images, torch.where(masked, GREY, images), torch.where(masked, rebuilt, images)
    rows = len(images) if len(images) <= 3 else -(-len(images) // 2)
    columns = [part[first : first + rows] for first in range(0, len(images), rows) for part in triple]
    titles = ["image", masked_title(masked), "reconstruction"] * (len(columns) // 3)
    return contact_sheet(columns, titles, reconstruction_note(model), min_width=192)


def masked_title(masked: Tensor) -> str:
    """Return the title over images without their masked pixels, of which ``masked`` says where they are."""
    return f"{100 * masked.float().mean().item():.0f} % masked"


def reconstruction_note(model: MultiViewMAE) -> str:
    """Return what to say on a picture of this model's reconstructions: what the model did not predict."""
    copied = "Brightness and contrast of each patch are copied from the original; the model predicts the pattern. "
    return copied * _predicts_normalised(model) + "Visible patches are shown as they are."


def _predicts_normalised(model: MultiViewMAE) -> bool:
    return bool(getattr(model.reconstruction_loss, "norm_pix", False))  # a loss of the user's own may have no such option


def overlay(images: Tensor, heat: Tensor, *, opacity: float = 0.6, limits: tuple[float, float] | None = None) -> Tensor:
    """Lay heat, (B, h, w), over images, (B, C, H, W) in [0, 1], shown in grey, in the colours of `heat_colours`.

    ``limits`` are the heat drawn black and the heat drawn white; None takes each image's own smallest and largest. The result
    is (B, 3, H, W) in [0, 1].
    """
    heat = heat.float()
    low, high = limits or (heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True))
    heat = (heat - low) / torch.as_tensor(high - low).clamp_min(torch.finfo(heat.dtype).tiny)
    heat = F.interpolate(heat[:, None], images.shape[2:], mode="bilinear")[:, 0]
    grey = images[:, :3].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return torch.lerp(grey, heat_colours(heat), opacity)


def pca_colours(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colour patches by the three directions in which their features differ most, over all images together.

    Features are (B, h * w, D) with D of 3 or more, ``grid`` h and w, the result (B, 3, h, w) in [0, 1]: red is the first
    direction. Each goes from its 1st to its 99th percentile.
    """
    rows = as_double(tokens.flatten(0, 1))
    rows = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:3] * torch.sign(directions[:3].sum(dim=1, keepdim=True) + 1e-12)  # the sign is free: fix it
    values = rows @ directions.T
    low, high = (values.quantile(share, dim=0) for share in (0.01, 0.99))
    colours = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float().to(tokens.device)
    maps: Tensor = colours.unflatten(0, (len(tokens), *grid))
    return maps.permute(0, 3, 1, 2)


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k features of a bank, (M, D), with the largest cosine to each query, (Q, D): cosines and rows, (Q, k) each."""
    found = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    return found.values, found.indices


def to_unit_range(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of images (..., C, H, W) by these means and standard deviations, within [0, 1]."""
    mean_, std_ = (torch.tensor(tuple(x), device=images.device)[:, None, None] for x in (mean, std))
    return (images.float() * std_ + mean_).clamp(0, 1)
