"""How a plain ViT of timm, with learned or rotary positions, encodes only the visible patches of an image.

Shapes: B images, C channels, H x W pixels, P patch side, L patches, K visible, T prefix tokens (class and register tokens),
D encoder width, R twice a head's width: sines, then cosines.
"""

from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .masking import Mask
from .patches import grid_size

PlainViT: TypeAlias = "VisionTransformer | Eva"
REASONS = {
    "Swin": "its windows and merged patches need every patch at its place",
    "Hiera": "it pools patches between its stages, which needs every patch at its place",
    "ConvNeXt": "its convolutions see across patches, masked ones too",
    "ResNet": "its convolutions see across patches, masked ones too",
    "EfficientNet": "its convolutions see across patches, masked ones too",
    "Beit": "the relative positions in its attention are made for all patches at once",
    "NaFlexVit": "it takes patches instead of images: build it with use_naflex=False",
    "OptimizedModule": "a compiled model is no ViT: compile the MultiViewMAE instead",
    "Peft": "its ViT is inside: give model.base_model.model, which keeps the adapters",
}  # the start of a class's name -> what is in the way


def check_encoder(vit: nn.Module) -> PlainViT:
    """Return ``vit`` if `encode_visible` can run it.

    Raises:
        TypeError: if it is not a plain ViT of timm, with the reason.
    """
    name, kind = type(vit).__name__, Eva if isinstance(vit, Eva) else VisionTransformer
    if not isinstance(vit, kind):
        reason = next((f" ({why})" for start, why in REASONS.items() if name.startswith(start)), "")
        raise TypeError(
            f"the encoder must be a timm VisionTransformer or Eva, got {name}{reason}: use a plain ViT, such as timm's vit_*, "
            "deit*, eva02_* or mvmae_vit_*"
        )
    if type(vit).forward_features is not kind.forward_features:
        raise TypeError(
            f"the encoder must not override forward_features, which is not called here, got {name}: use a plain ViT of timm"
        )
    if vit.patch_embed._forward_hooks or vit.patch_embed._forward_pre_hooks:
        raise TypeError(
            "patch_embed has hooks, such as those of fully_shard, which are not run for visible patches alone: put them on "
            "patch_embed.proj, or on the blocks and the root"
        )
    if not isinstance(vit.patch_embed, PatchEmbed):
        raise TypeError(
            f"the patch embedding must see one patch alone, got {type(vit.patch_embed).__name__} in {name}: "
            "use a ViT with a plain patch projection"
        )
    if not (vit.patch_drop is None or isinstance(vit.patch_drop, nn.Identity)):
        raise TypeError(f"patch_drop_rate must be 0, got {name} that drops patches: build it without, the mask takes its place")
    return vit


def unwrap(model: Any) -> Any:
    """Return the model inside what ``torch.compile``, data parallelism and trainers' frameworks put around it."""
    while not isinstance(model, VisionTransformer | Eva):
        inner = next(
            (part for name in ("_orig_mod", "module") if isinstance(part := getattr(model, name, None), nn.Module)), None
        )
        if inner is None:
            break
        model = inner
    return model


def encode_visible(vit: nn.Module, images: Tensor, mask: Mask) -> Tensor:
    """Encode the visible patches of images, z = ViT(x_visible + x_pos) (Eq. 2).

    Masked patches are left out before the patch projection: none of their values reaches the encoder. With nothing masked the
    result is that of ``vit.forward_features``.

    Args:
        vit: any plain ViT of timm, of the `Eva` family too (`check_encoder`).
        images: (B, C, H, W), normalised, of the encoder's image size unless it was built with ``dynamic_img_size``.
        mask: over the L patches of the images, for each of the B images.

    Returns:
        Tokens after the final norm, prefix tokens first: (B, T + K, D).

    Raises:
        TypeError: if the encoder is not a plain ViT, or the images are not floating point.
        ValueError: if images or mask do not fit the encoder.
    """
    encoder: Any = check_encoder(vit)
    grid = _check_images(encoder, images, mask)
    tokens = _embed_visible(encoder.patch_embed, images, mask.visible, grid)  # (B, K, D)
    names = ("cls_token", "dist_token", "reg_token")
    prefix = [token.expand(len(images), -1, -1) for name in names if (token := getattr(vit, name, None)) is not None]
    if encoder.pos_embed is not None:
        of_prefix, of_patches = _positions(encoder, grid)
        tokens = tokens + F.embedding(mask.visible, of_patches)
        prefix = [torch.cat(prefix, dim=1) + of_prefix] if len(of_prefix) else prefix
    tokens = torch.cat([*prefix, tokens], dim=1)  # (B, T + K, D)
    tokens = encoder.norm_pre(encoder.pos_drop(tokens))
    if isinstance(encoder, Eva):
        tokens = _rotated_blocks(encoder, tokens, mask.visible, grid)
    else:
        tokens = checkpoint_seq(encoder.blocks, tokens) if encoder.grad_checkpointing else encoder.blocks(tokens)
    encoded: Tensor = encoder.norm(tokens)
    return encoded


def _check_images(vit: PlainViT, images: Tensor, mask: Mask) -> tuple[int, int]:
    embed, size = vit.patch_embed, tuple(images.shape[2:])
    if images.ndim != 4 or images.shape[1] != vit.in_chans:
        raise ValueError(f"images must have the shape (B, {vit.in_chans}, H, W) of the encoder, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, normalised by mean and std, got {images.dtype}")
    grid = grid_size((images.shape[2], images.shape[3]), embed.patch_size)
    if not vit.dynamic_img_size and embed.img_size is not None and size != tuple(embed.img_size):
        raise ValueError(
            f"image size must be the encoder's {embed.img_size[0]}x{embed.img_size[1]}, got {size[0]}x{size[1]}: build the "
            f"encoder with img_size={size}, or with dynamic_img_size=True"
        )
    if mask.masked.shape != (len(images), grid[0] * grid[1]):
        raise ValueError(
            f"the mask must be for ({len(images)}, {grid[0] * grid[1]}) (images, patches), got {tuple(mask.masked.shape)}"
        )
    return grid


def _embed_visible(embed: PatchEmbed, images: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """Project the visible patches alone: gathered first, 20 % of the pixels are copied instead of 80 %."""
    (rows, columns), (ph, pw) = grid, embed.patch_size
    patches = images.reshape(*images.shape[:2], rows, ph, columns, pw).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(len(images), device=images.device)[:, None]
    pixels = patches[image, visible // columns, visible % columns]  # (B, K, C, Ph, Pw)
    proj = embed.proj
    if type(proj) is nn.Conv2d and not (proj._forward_hooks or proj._forward_pre_hooks):
        tokens = F.linear(pixels.flatten(2), proj.weight.flatten(1), proj.bias)  # a fifth faster than the module
    else:  # for adapters, pruning, weight norm: the visible patches as one row of an image, (B, C, Ph, K * Pw)
        tokens = proj(pixels.permute(0, 2, 3, 1, 4).flatten(3)).flatten(2).transpose(1, 2)
    normed: Tensor = embed.norm(tokens)  # (B, K, D)
    return normed


def _positions(vit: PlainViT, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the positions of prefix tokens, (T or 0, D), and of patches, (L, D)."""
    with_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    positions = vit.pos_embed
    if vit.dynamic_img_size:
        positions = resample_abs_pos_embed(
            positions, new_size=list(grid), old_size=list(vit.patch_embed.grid_size), num_prefix_tokens=with_prefix
        )
    return positions[0, :with_prefix], positions[0, with_prefix:]


def _rotated_blocks(vit: Eva, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run the blocks of an `Eva` on tokens, (B, T + K, D), each visible patch at its own rotary position."""
    blocks, positions = list(vit.blocks), [None] * len(vit.blocks)
    if vit.rope is not None:
        fixed = hasattr(vit.rope, "feat_shape") and not vit.dynamic_img_size
        table = vit.rope.get_embed() if fixed else vit.rope.get_embed(shape=grid)
        if table.ndim == 2:  # (L, R), one for all blocks and heads
            positions = [table[visible][:, None]] * len(blocks)  # (B, 1, K, R)
        else:  # (depth, heads, L, R): each block learns its own
            positions = [of_block[:, visible].transpose(0, 1) for of_block in table]  # (B, heads, K, R)
    for block, rope in zip(blocks, positions, strict=True):
        run = partial(checkpoint, block, use_reentrant=False) if vit.grad_checkpointing else block
        tokens = run(tokens, rope=rope)
    return tokens
