"""A penalty on forgetting: features of whole images are held near those of the encoder that a run starts from.

Shapes: B images of this process, N images of the penalty over all processes, V views, C channels, H x W pixels, D width.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import Ranks
from engine.signals import Stop
from mvmae import MultiViewMAE
from mvmae.gradients import gather_latents

KINDS = ("cosine", "relational")


def cosine_penalty(features: Tensor, start: Tensor) -> Tensor:
    """Compute mean_i (1 - cos(f_i, s_i)): 0 where no feature has turned (less-forget constraint; Hou et al., 2019).

    Args:
        features: f, of the encoder that is trained, (N, D).
        start: s, of the same images by the encoder of the start, (N, D).
    """
    return (1 - F.cosine_similarity(features, start, dim=1)).mean()


def relational_penalty(features: Tensor, start: Tensor) -> Tensor:
    """Compute mean over pairs i < j of h(d_ij / d - e_ij / e): distance-wise distillation (RKD-D; Park et al., 2019).

    d_ij = |f_i - f_j| and e_ij = |s_i - s_j| are distances between the features of two images, d and e their means over all
    pairs, h is Huber's loss: x^2 / 2 up to 1, |x| - 1/2 beyond. Features may turn, move and grow together at no cost.

    Args:
        features: f, of the encoder that is trained, (N, D) with N >= 3.
        start: s, of the same images by the encoder of the start, (N, D).
    """
    pairs = torch.triu_indices(len(features), len(features), offset=1, device=features.device)
    new, old = ((x[pairs[0]] - x[pairs[1]]).square().sum(dim=1).clamp(min=1e-12).sqrt() for x in (features, start))
    return F.smooth_l1_loss(new / new.mean(), old / old.mean())


def pooled(encoder: Any, images: Tensor, pool: str) -> Tensor:
    """Compute features (B, D) of images (B, C, H, W) with nothing masked, as `MultiViewMAE.features` does."""
    tokens = encoder.forward_features(images)
    features: Tensor = encoder.fc_norm(tokens[:, 0] if pool == "token" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1))
    return features


class Guard:
    """Adds the gradients of weight x penalty on a few images of each step: on their first views, with nothing masked.

    The images are the same for any number of processes, and so is the gradient.

    Args:
        model: with the encoder of the start, of which a copy is kept.
        weight: of the penalty beside the loss of Eq. 7, above 0.
        kind: one of `KINDS`.
        images: number N of images of each step.
        batch_size: images of each step over all processes.
        processes: this one and the others.

    Raises:
        Stop: if the processes cannot share the images alike, or there are too many or too few.
    """

    def __init__(self, model: MultiViewMAE, weight: float, kind: str, images: int, *, batch_size: int, ranks: Ranks) -> None:
        if images % ranks.world_size or images > batch_size or (kind == "relational" and images < 3):
            raise Stop(
                f"--guard-images {images} must be at most the batch of {batch_size} images, a multiple of "
                f"{ranks.world_size} processes, and 3 or more for --guard-kind relational: choose another number"
            )
        self.model, self.weight, self.kind, self.share = model, weight, kind, images // ranks.world_size
        self.start: nn.Module = copy.deepcopy(model.encoder).eval().requires_grad_(False)

    def backward(self, views: Tensor) -> Tensor:
        """Add the penalty's gradients to those of the encoder; return the penalty without its weight, detached.

        Where no part of the encoder is trained, it is as it was: nothing is computed. Under data parallelism this must come
        before the forward pass of the wrapped model, whose backward pass then averages all gradients over the processes.

        Args:
            views: of this process, normalised, (B, V, C, H, W).
        """
        if not any(parameter.requires_grad for parameter in self.model.encoder.parameters()):
            return views.new_zeros(())
        images = views[:: max(len(views) // self.share, 1), 0][: self.share]
        with torch.no_grad():
            old = pooled(self.start, images, self.model.pool).float()
        new = pooled(self.model.encoder, images, self.model.pool).float()
        with torch.autocast(views.device.type, enabled=False):
            if self.kind == "relational":
                new, old = (gather_latents(x[:, None])[0][:, 0] for x in (new, old))  # (N, D)
                penalty = relational_penalty(new, old)
            else:
                penalty = cosine_penalty(new, old)
            (self.weight * penalty).backward()
        return penalty.detach()
