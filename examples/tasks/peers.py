"""What our training step is timed against: Eq. 7 written the plain way, and ViTMAE of transformers.

Shapes: B images, V views, C channels, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

import mvmae
from engine.signals import Stop


def plain_loss(model: mvmae.MultiViewMAE, views: Tensor, mask: mvmae.Mask) -> Tensor:
    """Compute Eq. 7 the plain way: view after view, every patch embedded before the visible tokens are gathered."""
    vit, number, latents, loss_rec = model.encoder, views.shape[1], [], views.new_zeros(())
    for v in range(number):
        images, part = views[:, v], mask.select(slice(v, None, number))
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        tokens = tokens.gather(1, part.visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        prefix = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = vit.norm(vit.blocks(torch.cat([prefix, tokens], dim=1)))
        target = mvmae.patchify(images, vit.patch_embed.patch_size)
        loss_rec = loss_rec + model.reconstruction_loss(model.decoder(tokens, part), target, part.masked) / number
        latents.append(model.pool_tokens(tokens))
    loss: Tensor = loss_rec + model.loss_weight * model.contrastive_loss(torch.stack(latents, dim=1))
    return loss


class ViTMAE(nn.Module):
    """transformers' ViTMAE with an encoder of the same size as ours and our decoder's, on both views, as images of their own.

    Args:
        encoder: ours, a plain ViT of timm.

    Raises:
        Stop: if transformers is not installed.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        try:
            from transformers import ViTMAEConfig, ViTMAEForPreTraining
        except ImportError as error:
            raise Stop("--against vitmae needs transformers: pip install transformers") from error
        block, embedding = encoder.blocks[0], encoder.patch_embed
        settings = ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            image_size=embedding.img_size[0],
            patch_size=embedding.patch_size[0],
            mask_ratio=0.8,
            norm_pix_loss=True,
            decoder_num_hidden_layers=4,
        )
        self.model: nn.Module = ViTMAEForPreTraining(settings)

    def forward(self, views: Tensor) -> Tensor:
        """Compute the loss of views, (B, V, C, H, W)."""
        loss: Tensor = self.model(views.flatten(0, 1)).loss
        return loss
