"""Pictures of what the model sees and rebuilds (Fig. 8).

Shapes: B images, V views, C channels, H x W pixels, P patch side, L patches.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .masking import Mask
from .model import MultiViewMAE
from .patches import denormalize_patches, grid_size, unpatchify

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
    images, rebuilt = (_to_unit_range(x, mean, std) for x in (views.flatten(0, 1), rebuilt))
    shown = torch.where(masked, torch.full_like(images, GREY), images)
    pasted = torch.where(masked, rebuilt, images)
    titles = ["view", f"visible ({1 - masked.float().mean().item():.0%})", "reconstruction", "with the visible pasted in"]
    note = "mean and contrast of each rebuilt patch are the true patch's" if model.reconstruction_loss.norm_pix else ""
    return contact_sheet([images, shown, rebuilt, pasted], titles, note)


def _to_unit_range(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean_, std_ = (torch.tensor(tuple(x), device=images.device)[:, None, None] for x in (mean, std))
    return (images.float() * std_ + mean_).clamp(0, 1)


def contact_sheet(columns: Sequence[Tensor], titles: Sequence[str], note: str = "", *, min_width: int = 160) -> Image.Image:
    """Put images into a grid with a title over each column and a note below.

    Args:
        columns: (B, C, H, W) each, in [0, 1].
        titles: one for each column.
        note: a line of text at the bottom.
        min_width: small images are enlarged by a whole number until they are this wide, in pixels.
    """
    batch, _, height, width = columns[0].shape
    zoom = max(-(-min_width // width), 1)
    height, width, gap, text = height * zoom, width * zoom, 4, 16
    size = (len(columns) * (width + gap) + gap, batch * (height + gap) + text * (2 if note else 1) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        draw.text((gap + x * (width + gap), 2), title, fill="black")
        for y, image in enumerate(column):
            tile = to_pillow(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + x * (width + gap), text + y * (height + gap)))
    draw.text((gap, size[1] - text), note, fill="black")
    return sheet


def to_pillow(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [0, 1] into a Pillow one: RGB from three or more channels, grey from fewer."""
    channels = image[:3] if len(image) >= 3 else image[:1]
    pixels = channels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()
    mode = "RGB" if pixels.shape[2] == 3 else "L"
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())).convert("RGB")
