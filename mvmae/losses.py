"""The two training objectives: reconstruction (Eq. 3) and NT-Xent (Eqs. 4 to 6).

Shapes: B images of this process, N images of all processes, V views, L patches, D width of a latent.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .gradients import gather_latents, products, unit_length
from .patches import normalize_patches

LossOn = Literal["masked", "all"]
PLAIN_LOGITS_BYTES = 256 * 2**20
"""Bytes of logits above which `NTXentLoss` works in chunks, unless ``chunk_size`` is given."""


class ReconstructionLoss(nn.Module):
    """Mean squared error between predicted and true patches (Eq. 3).

    The mean runs over the pixels of a patch, then over patches, views and images: Eq. 3's sum over pixels would be about
    10^5 times larger and make its weight against Eq. 6 meaningless (MAE, since the paper is silent). In float32 at least.

    Args:
        norm_pix: compare with patches normalised by their own mean and standard deviation (MAE, since the paper is silent).
        loss_on: ``"masked"`` counts masked patches only (MAE, "lambda = 0 ... the same as the baseline, the MAE");
            ``"all"`` counts every patch, the literal Eq. 3.
    """

    def __init__(self, *, norm_pix: bool = True, loss_on: LossOn = "masked") -> None:
        super().__init__()
        if loss_on not in get_args(LossOn):
            raise ValueError(f"loss_on must be one of {get_args(LossOn)}, got {loss_on!r}")
        self.norm_pix = norm_pix
        self.loss_on = loss_on

    def forward(self, pred: Tensor, target: Tensor, masked: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            pred: predicted patches, (B, L, P * P * C).
            target: true patches in the units of the images, (B, L, P * P * C); normalised here if ``norm_pix``.
            masked: (B, L) bool, True = masked.

        Raises:
            ValueError: if the shapes differ.
        """
        if pred.shape != target.shape or masked.shape != pred.shape[:2]:
            raise ValueError(
                "pred, target and masked must have the shapes (B, L, P*P*C), (B, L, P*P*C) and (B, L), "
                f"got {tuple(pred.shape)}, {tuple(target.shape)} and {tuple(masked.shape)}"
            )
        with torch.autocast(pred.device.type, enabled=False):
            pred, target = (x if x.dtype == torch.float64 else x.float() for x in (pred, target))
            if self.norm_pix:
                target = normalize_patches(target)
            per_patch = (pred - target).square().mean(dim=-1)  # (B, L)
            if self.loss_on == "all":
                return per_patch.mean()
            return (per_patch * masked).sum() / masked.sum()

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"norm_pix={self.norm_pix}, loss_on={self.loss_on!r}"


class NTXentLoss(nn.Module):
    """Normalised, temperature-scaled cross-entropy between views (Eqs. 4 to 6).

    Every view of an image is an anchor; its positives are the other views of the same image (one, for V = 2; averaged where
    there are more), its negatives all views of the other images of the *global* batch (2N - 2 for V = 2). Logits are computed
    in float32 at least, under autocast too.

    With several processes, each returns the mean over its own anchors, compared with the latents of all. The mean of these
    losses over the processes is Eq. 6 over the global batch, and the mean of their gradients, which DistributedDataParallel
    computes, is its gradient. All processes must have the same number of images.

    Args:
        temperature: tau of Eq. 4, above 0 (paper, Section 3.2.2: 0.07).
        gather: take negatives from all processes of the default group.
        chunk_size: anchors that are compared at a time. Memory is then linear in the batch, at the cost of one more matrix
            product in the backward pass. None: all at once up to 256 MiB of logits, above that in chunks.
    """

    def __init__(self, temperature: float = 0.07, *, gather: bool = True, chunk_size: int | None = None) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0 (the paper's is 0.07), got {temperature}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None, got {chunk_size}")
        self.temperature = temperature
        self.gather = gather
        self.chunk_size = chunk_size

    def forward(self, z: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            z: latents, (B, V, D), of any length: they are normalised here (Eq. 5).

        Raises:
            ValueError: if there are fewer than two views, or fewer than two images in the global batch.
        """
        if z.ndim != 3 or z.shape[1] < 2:
            raise ValueError(f"z must have the shape (B, V, D) with at least 2 views, got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            shortest = torch.finfo(z.dtype).eps  # keeps the gradient of a latent of length 0 within its own type
            z = z if z.dtype == torch.float64 else z.float()
            z = unit_length(z, shortest)  # Eq. 5: dot products are cosines now
            keys, offset = gather_latents(z) if self.gather else (z, 0)
            if len(keys) < 2:
                raise ValueError(
                    "the contrastive loss must have a global batch of at least 2 images, got 1, which has no negatives: "
                    "use a larger batch, or loss_weight=0"
                )
            latents, views = keys.flatten(0, 1), z.shape[1]  # (N * V, D)
            anchors = slice(offset * views, (offset + len(z)) * views)
            row_bytes = len(latents) * latents.element_size()
            if self.chunk_size is None and (anchors.stop - anchors.start) * row_bytes <= PLAIN_LOGITS_BYTES:
                denominator = log_denominator(latents, anchors, self.temperature)  # (B * V,)
            else:
                chunk_size = self.chunk_size or max(PLAIN_LOGITS_BYTES // 4 // row_bytes, 1)
                denominator = _ChunkedLogDenominator.apply(latents, anchors, self.temperature, chunk_size)
            return (denominator - mean_positive_similarity(z).flatten() / self.temperature).mean()  # Eqs. 4, 6

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"temperature={self.temperature}, gather={self.gather}, chunk_size={self.chunk_size}"


def mean_positive_similarity(z: Tensor) -> Tensor:
    """Compute, for every view, the mean cosine to the other views of its image: the numerator of Eq. 4, (B, V, D) to (B, V)."""
    similarity = products(z, z.view_as(z))  # (B, V, V)
    own = similarity.diagonal(dim1=1, dim2=2)
    return (similarity.sum(dim=2) - own) / (z.shape[1] - 1)


def log_denominator(latents: Tensor, anchors: slice, temperature: float) -> Tensor:
    """Compute the logarithm of the denominator of Eq. 4 for the ``anchors`` among latents, (N * V, D): over all but itself."""
    return _logits_without_self(latents, anchors, temperature).logsumexp(dim=1)


def _logits_without_self(latents: Tensor, anchors: slice, temperature: float) -> Tensor:
    logits = products(latents[anchors], latents) / temperature
    rows = torch.arange(len(logits), device=logits.device)
    return logits.index_put_((rows, rows + anchors.start), logits.new_full((), -torch.inf))


def _chunks(anchors: slice, size: int) -> list[slice]:
    return [slice(i, min(i + size, anchors.stop)) for i in range(anchors.start, anchors.stop, size)]


class _ChunkedLogDenominator(torch.autograd.Function):
    """`log_denominator` with the logits of one chunk of anchors in memory at a time, forward and backward."""

    @staticmethod
    def forward(latents: Tensor, anchors: slice, temperature: float, chunk_size: int) -> Tensor:
        return torch.cat([log_denominator(latents, chunk, temperature) for chunk in _chunks(anchors, chunk_size)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        latents, *ctx.options = inputs
        ctx.save_for_backward(latents, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        latents, result = ctx.saved_tensors
        anchors, temperature, chunk_size = ctx.options
        total = torch.zeros_like(latents)
        with torch.autocast(latents.device.type, enabled=False):
            for chunk in _chunks(anchors, chunk_size):
                own = slice(chunk.start - anchors.start, chunk.stop - anchors.start)
                softmax = _logits_without_self(latents, chunk, temperature).sub_(result[own, None]).exp_()
                weights = softmax * (grads[0][own, None] / temperature)
                total[chunk].addmm_(weights, latents)
                total.addmm_(weights.T, latents[chunk])
        return total, None, None, None
