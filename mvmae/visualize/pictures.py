"""Pictures of what a model looks at (Fig. 2), what it rebuilds (Fig. 8), and what its features tell apart.

Shapes: B images, V views, C channels, H x W pixels, P patch side, L patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..masking import Mask
from ..model import MultiViewMAE
from ..patches import denormalize_patches, grid_size, unpatchify

GREY = 0.5
"""What stands in the place of a masked patch, in [0, 1]."""


@torch.no_grad()
def reconstruct(
    model: MultiViewMAE, views: Tensor, *, mask: Mask | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rebuild views from their visible patches.

    Where the model predicts normalised patches, they are de-normalised with the mean and standard deviation of the true
    ones, which the model never saw: say so on the picture.

    Args:
        model: a pretraining model; put in eval mode meanwhile.
        views: (B, V, C, H, W), normalised.
        mask: over the B * V views; drawn where it is None.
        generator: source of the random mask.

    Returns:
        the predicted images, (B * V, C, H, W), in the units of the views; and where patches were masked, (B * V, 1, H, W),
        bool.
    """
    training = model.training
    output = model.eval()(views, mask=mask, generator=generator, contrast=False)
    model.train(training)
    pred = output.pred.float()
    if model.reconstruction_loss.norm_pix:
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
    """Draw a row for each view: the view, its visible patches, the reconstruction, and it with the visible patches pasted in.

    Args:
        model: a pretraining model.
        views: (B, V, C, H, W), normalised by ``mean`` and ``std``; the first three channels are shown, or the first.
        mean: of each channel, in [0, 1].
        std: of each channel.
        mask: over the B * V views; drawn where it is None.
        generator: source of the random mask.
    """
    rebuilt, masked = reconstruct(model, views, mask=mask, generator=generator)
    images, rebuilt = (to_unit_range(x, mean, std) for x in (views.flatten(0, 1), rebuilt))
    shown = torch.where(masked, torch.full_like(images, GREY), images)
    pasted = torch.where(masked, rebuilt, images)
    titles = ["view", f"visible ({1 - masked.float().mean().item():.0%})", "reconstruction", "with the visible pasted in"]
    note = "mean and contrast of each rebuilt patch are the true patch's" if model.reconstruction_loss.norm_pix else ""
    return contact_sheet([images, shown, rebuilt, pasted], titles, note)


def overlay(images: Tensor, heat: Tensor, *, opacity: float = 0.6) -> Tensor:
    """Lay heat over images, from black over red and yellow to white, its own largest value white.

    Args:
        images: (B, C, H, W) in [0, 1]; shown in grey.
        heat: (B, h, w), 0 or above.
        opacity: of the heat.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    heat = heat[:, None].float()
    heat = heat - heat.amin(dim=(2, 3), keepdim=True)
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")
    hot = torch.cat([(3 * heat - step).clamp(0, 1) for step in range(3)], dim=1)
    grey = images[:, :3].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return torch.lerp(grey, hot, opacity)


def pca_colours(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colour patches by the three directions in which their features differ most, over all images together.

    Args:
        tokens: features of patches, (B, h * w, D) with D of 3 or more.
        grid: h and w.

    Returns:
        (B, 3, h, w) in [0, 1]: red is the first direction. Each goes from its 1st to its 99th percentile.
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:3] * torch.sign(directions[:3].sum(dim=1, keepdim=True) + 1e-12)  # the sign is free: fix it
    values = rows @ directions.T
    low, high = (values.quantile(share, dim=0) for share in (0.01, 0.99))
    colours = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    maps: Tensor = colours.unflatten(0, (len(tokens), *grid))
    return maps.permute(0, 3, 1, 2)


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the features of a bank with the largest cosine to each query.

    Args:
        queries: (Q, D).
        bank: (M, D), M of k or more.
        k: how many.

    Returns:
        cosines (Q, k), largest first, and the rows of the bank (Q, k).
    """
    found = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    return found.values, found.indices


def to_unit_range(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation of images (..., C, H, W) by these means and standard deviations, within [0, 1]."""
    mean_, std_ = (torch.tensor(tuple(x), device=images.device)[:, None, None] for x in (mean, std))
    return (images.float() * std_ + mean_).clamp(0, 1)


def contact_sheet(
    columns: Sequence[Sequence[Tensor] | Tensor], titles: Sequence[str], note: str = "", *, min_width: int = 160
) -> Image.Image:
    """Put images into a grid with a title over each column and a note below.

    Args:
        columns: images (C, H, W) in [0, 1], as many in each column; those of a row may differ in size.
        titles: one for each column, of one line or more.
        note: a line of text at the bottom.
        min_width: small images are enlarged by a whole number until they are this wide, in pixels.
    """
    tiles = [[_enlarged(to_pillow(image), min_width) for image in column] for column in columns]
    gap, text = 4, 4 + 12 * max(title.count("\n") + 1 for title in titles)
    lefts = _starts([max(tile.width for tile in column) for column in tiles], gap, gap)
    tops = _starts([max(tile.height for tile in row) for row in zip(*tiles, strict=True)], text, gap)
    sheet = Image.new("RGB", (lefts[-1], tops[-1] + (16 if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for left, column, title in zip(lefts, tiles, titles, strict=False):
        draw.text((left, 2), title, fill="black")
        for top, tile in zip(tops, column, strict=False):
            sheet.paste(tile, (left, top))
    draw.text((gap, tops[-1]), note, fill="black")
    return sheet


def _enlarged(image: Image.Image, min_width: int) -> Image.Image:
    zoom = max(-(-min_width // image.width), 1)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _starts(sizes: Sequence[int], first: int, gap: int) -> list[int]:
    """Where things of these sizes start, one after the other, and where the next would."""
    return [first + sum(sizes[:index]) + index * gap for index in range(len(sizes) + 1)]


def to_pillow(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [0, 1] into a Pillow one: RGB from three or more channels, grey from fewer."""
    channels = image[:3] if len(image) >= 3 else image[:1]
    pixels = channels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    mode = "RGB" if pixels.shape[2] == 3 else "L"
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())).convert("RGB")
