"""The multi-view masked autoencoder: Eqs. 1 to 7 in the order of the paper.

Shapes: B images, V views, C channels, H x W pixels, P patch side, L patches, K visible, T prefix tokens, D encoder width.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import timm
import torch
from torch import Tensor, nn

from .architecture import describe_pretraining, pretraining_arguments, read_pretraining, write_pretraining
from .decoder import MAEDecoder
from .encoders import SinCosVisionTransformer
from .losses import LossOn, NTXentLoss, ReconstructionLoss
from .masked_vit import check_encoder, encode_visible
from .masking import Mask, num_visible, random_mask
from .patches import grid_size, patchify
from .weights import building, load_weights

Pool = Literal["avg", "token"]


class MultiViewOutput(NamedTuple):
    """The result of a forward pass of `MultiViewMAE`.

    Attributes:
        loss: L of Eq. 7, a scalar.
        loss_rec: L_r of Eq. 3, a scalar.
        loss_con: L_c of Eq. 6, a scalar; 0 without being computed where its weight is 0.
        z: pooled latents, (B, V, D); without gradient where the weight of L_c is 0.
        projected: the vectors that Eq. 4 compares, (B, V, any width): ``z`` through the projector; ``z`` itself where there is
            none, or the weight of L_c is 0.
        pred: predicted patches, normalised ones where ``norm_pix``, (B * V, L, P * P * C).
        target: true patches in the units of the views, (B * V, L, P * P * C).
        mask: which patches were hidden, over the B * V views.
    """

    loss: Tensor
    loss_rec: Tensor
    loss_con: Tensor
    z: Tensor
    projected: Tensor
    pred: Tensor
    target: Tensor
    mask: Mask


class MultiViewMAE(nn.Module):
    """The pretraining model: an encoder, a light decoder, and the two objectives (Sections 3.1 and 3.2).

    ``encoder`` keeps its weights, bit for bit, and their names: after pretraining, keep ``model.encoder.state_dict()``. Its
    parameters that the method does not train (fixed sine-cosine positions, a classifier head, an attention pool) are set to
    need no gradient.

    Args:
        encoder: a plain ViT of timm (`Eva` too), pretrained or not, or the name of one, which is then created untrained.
        decoder_dim: width of the decoder (MAE: 512).
        decoder_depth: blocks of the decoder (paper, Table 5: 4).
        decoder_heads: attention heads of the decoder (MAE: 16).
        mask_ratio: share of the patches that is masked, above 0 and below 1 (paper, Table 5: 0.8).
        loss_weight: lambda of Eq. 7, at least 0 (paper, Table 5: 2.0). 0 leaves out the contrastive loss; with one view
            that is MAE.
        temperature: tau of Eq. 4, above 0 (paper, Section 3.2.2: 0.07).
        pool: the vector of Eq. 4: ``"avg"``, the mean of the visible patch tokens after the final norm (the paper names no
            class token), or ``"token"``, the class token.
        projector: applied to the pooled latents before Eq. 4; none in the paper. Any module from (N, D) to (N, any width),
            such as `projection_mlp`.
        norm_pix: see `ReconstructionLoss`, like ``loss_on``.
        loss_on: likewise.
        contrastive_loss: takes the place of ``NTXentLoss(temperature)``: any module from the projected latents, (B, V, width),
            to a scalar, such as ``NTXentLoss(0.1, gather=False)``. It holds its own temperature.
        reconstruction_loss: takes the place of ``ReconstructionLoss(norm_pix=..., loss_on=...)``: any module from predicted and
            true patches, (B * V, L, P * P * C), and which were masked, (B * V, L) bool, to a scalar.

    Raises:
        TypeError: if the encoder is not a plain ViT of timm.
        ValueError: if an option is out of its range, or is one of a loss that another takes the place of.
    """

    def __init__(
        self,
        encoder: nn.Module | str,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        mask_ratio: float = 0.8,
        loss_weight: float = 2.0,
        temperature: float = 0.07,
        pool: Pool = "avg",
        projector: nn.Module | None = None,
        norm_pix: bool = True,
        loss_on: LossOn = "masked",
        contrastive_loss: nn.Module | None = None,
        reconstruction_loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        vit = check_encoder(timm.create_model(encoder) if isinstance(encoder, str) else encoder)
        if pool not in get_args(Pool) or (pool == "token" and vit.cls_token is None):
            raise ValueError(f'pool must be "avg", or "token" for an encoder with a class token, got {pool!r}')
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight must be at least 0 (the paper's is 2.0), got {loss_weight}")
        if contrastive_loss is not None and temperature != 0.07:
            raise ValueError(f"temperature belongs to the contrastive_loss that is given, got {temperature} beside it")
        if reconstruction_loss is not None and (norm_pix, loss_on) != (True, "masked"):
            raise ValueError("norm_pix and loss_on belong to the reconstruction_loss that is given: leave them out beside it")
        embed = vit.patch_embed
        grid_size(embed.img_size, embed.patch_size)
        self.encoder = vit
        self.decoder = MAEDecoder(
            vit.embed_dim,
            grid_size=embed.grid_size,
            patch_size=embed.patch_size,
            in_chans=vit.in_chans,
            num_prefix_tokens=vit.num_prefix_tokens,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
        )
        self.projector = projector if projector is not None else nn.Identity()
        self.reconstruction_loss = reconstruction_loss or ReconstructionLoss(norm_pix=norm_pix, loss_on=loss_on)
        self.contrastive_loss = contrastive_loss or NTXentLoss(temperature)
        self.mask_ratio = mask_ratio
        self.loss_weight = loss_weight
        self.pool = pool
        visible = num_visible(embed.num_patches, mask_ratio)
        if visible == embed.num_patches and getattr(self.reconstruction_loss, "loss_on", "") == "masked":
            raise ValueError(
                f"mask_ratio must mask at least one of {visible} patches to have something to reconstruct, got {mask_ratio}: "
                'raise it, or use loss_on="all"'
            )
        for name, parameter in vit.named_parameters():
            fixed = name == "pos_embed" and isinstance(vit, SinCosVisionTransformer)
            if fixed or name.partition(".")[0] in ("head", "head_dist", "attn_pool"):
                parameter.requires_grad_(False)
        if loss_weight == 0:  # none of these is on the way to the reconstruction
            for module in (self.projector, self.contrastive_loss, vit.fc_norm):
                module.requires_grad_(False)
        self.register_load_state_dict_post_hook(_fill_buffers)  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Initialise all weights and buffers, also after ``to_empty``; a projector by the default of each of its layers."""
        self.encoder.init_weights()
        self.decoder.init_weights()
        for module in self.projector.modules():
            if reset := getattr(module, "reset_parameters", None):
                reset()

    def forward(
        self,
        views: Tensor,
        *,
        mask: Mask | None = None,
        generator: torch.Generator | None = None,
        loss_weight: float | None = None,
        z_gradient: Tensor | None = None,
    ) -> MultiViewOutput:
        """Mask, encode, pool, decode, and compare.

        With a weight of 0, Eqs. 4 to 6 are not computed, and parameters that only they use (the projector's, the encoder's
        ``fc_norm``) keep the gradient None, so that an optimizer leaves them as they are. DistributedDataParallel then needs
        ``find_unused_parameters=True``.

        Args:
            views: V target views of each of B images, (B, V, C, H, W), normalised by the encoder's mean and std.
            mask: over the B * V views, in the order of ``views.flatten(0, 1)``; drawn where it is None.
            generator: source of the random mask; torch's global one where it is None.
            loss_weight: lambda of Eq. 7 in this call, at least 0; the model's own where it is None.
            z_gradient: gradient of lambda L_c with respect to ``z``, (B, V, D), where `backward_in_parts` has computed it for a
                larger batch: ``loss`` is then any scalar with the gradient of Eq. 7, and ``loss_con`` 0.

        Returns:
            The losses, and the tensors they were computed from.

        Raises:
            TypeError: if the views are not floating point.
            ValueError: if views or mask do not fit the encoder, or the contrastive loss lacks views or images.
        """
        if views.ndim != 5:
            raise ValueError(f"views must have the shape (B, V, C, H, W), got {tuple(views.shape)}")
        weight = self.loss_weight if loss_weight is None else loss_weight
        if weight < 0:
            raise ValueError(f"loss_weight must be at least 0 (the paper's is 2.0), got {weight}")
        patch_size = self.encoder.patch_embed.patch_size
        grid = grid_size((views.shape[3], views.shape[4]), patch_size)
        if mask is None:
            count, length = views.shape[0] * views.shape[1], grid[0] * grid[1]
            mask = random_mask(count, length, self.mask_ratio, generator=generator, device=views.device)
        tokens, z = self.encode(views, mask)  # Eqs. 1 and 2
        pred = self.decoder(tokens, mask, grid_size=grid)  # (B * V, L, P * P * C)
        target = patchify(views.flatten(0, 1), patch_size)
        loss = loss_rec = self.reconstruction_loss(pred, target, mask.masked)  # Eq. 3
        loss_con = loss_rec.new_zeros(())
        if weight == 0 and z_gradient is None:
            z = projected = z.detach()
        else:
            projected = self.project(z)
        if z_gradient is not None:  # DistributedDataParallel waits for a gradient of every parameter, the projector's too
            loss = loss_rec + (z * z_gradient).sum() + 0 * projected.sum()
        elif weight > 0:
            loss_con = self.contrastive_loss(projected)  # Eqs. 4 to 6
            loss = loss_rec + weight * loss_con  # Eq. 7
        return MultiViewOutput(loss, loss_rec, loss_con, z, projected, pred, target, mask)

    def encode(self, views: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Encode the visible patches of views: prefix and visible tokens, (B * V, T + K, D), and z, pooled, (B, V, D)."""
        tokens = encode_visible(self.encoder, views.flatten(0, 1), mask)
        return tokens, self.pool_tokens(tokens).unflatten(0, views.shape[:2])

    def project(self, z: Tensor) -> Tensor:
        """Apply the projector to pooled latents: (B, V, D) to (B, V, any width)."""
        return cast(Tensor, self.projector(z.flatten(0, 1)).unflatten(0, z.shape[:2]))

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """Pool tokens, (B, T + K, D), to latents, (B, D): the mean patch or the class token, then ``fc_norm``."""
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)
        return cast(Tensor, self.encoder.fc_norm(pooled))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **modules: nn.Module | None) -> "MultiViewMAE":
        """Load what `save_pretrained` wrote: encoder, decoder, projector and options, ready to go on pretraining.

        Args:
            source: a folder, or ``owner/name`` of a repository of the Hub.
            revision: branch, tag or commit of the repository.
            modules: ``projector``, ``contrastive_loss`` or ``reconstruction_loss``: a module like the saved one, needed where a
                file cannot describe that; saved weights are loaded into it.

        Raises:
            WeightsError: if the files are missing or damaged, or do not belong together, or a module is needed, with its class.
        """
        description, weights = read_pretraining(source, revision=revision)
        if unknown := sorted(modules.keys() - {"projector", "contrastive_loss", "reconstruction_loss"}):
            raise TypeError(f"modules must be a projector, a contrastive_loss or a reconstruction_loss, got {unknown}")
        with building(f"what describes the pretraining model in {source}"):
            model = cls(**pretraining_arguments(description, **modules))
        load_weights(model, weights, source=source)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model to ``pretraining.safetensors`` and ``.json`` in a folder, or raise a `WeightsError`."""
        write_pretraining(folder, describe_pretraining(self), self.state_dict())


def _fill_buffers(model: nn.Module, _: Any) -> None:
    """Compute buffers that no checkpoint holds: they are undefined after ``to_empty``, and meta after ``assign=True``."""
    device = next(model.parameters()).device
    for module in model.modules():
        if fill := getattr(module, "init_non_persistent_buffers", None):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.empty_like(buffer, device=device))
            fill()
