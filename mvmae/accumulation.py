"""A batch in parts whose loss and gradients are the whole batch's (gradient cache, Gao et al., 2021, arXiv 2101.06983).

Shapes: B images, V views, C channels, H x W pixels, K parts, D width of a latent.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .masking import Mask


class Losses(NamedTuple):
    """The losses of a whole batch, detached: Eqs. 7, 3 and 6."""

    loss: Tensor
    loss_rec: Tensor
    loss_con: Tensor


def backward_in_parts(model: nn.Module, views: Tensor, parts: int, *, mask: Mask, loss_weight: float | None = None) -> Losses:
    """Add the gradients of Eq. 7 over the batch to ``parameter.grad``, with the activations of one part in memory at a time.

    Ordinary gradient accumulation does not enlarge the batch of a contrastive loss: each part would have the negatives of
    that part alone. Here the latents of all parts are computed first, without stored activations; then the projector and Eq. 6
    see all of them at once, and give a gradient for each. Then each part is computed again and both gradients flow back
    through it. The cost is one more forward pass of the encoder; one part is a plain forward and backward pass. The result is
    exact for several processes too, with batch normalisation in the projector, and with dropout, whose random numbers are
    repeated. The function may be called under autocast; the backward passes run outside it.

    Args:
        model: a `MultiViewMAE`, or one in DistributedDataParallel, or whose blocks and root are sharded by ``fully_shard``;
            compiled or not. Running statistics that a projector keeps, such as those of torch's `BatchNorm1d`, are of parts
            too.
        views: (B, V, C, H, W), normalised; B images of this process.
        parts: number K of parts, a divisor of B.
        mask: over the B * V views.
        loss_weight: lambda of Eq. 7 in this call, as in `MultiViewMAE.forward`.

    Raises:
        ValueError: if the batch cannot be cut into that many equal parts, or a compiled model draws random numbers.
    """
    batch, num_views = views.shape[:2]
    if parts < 1 or batch % parts:
        raise ValueError(f"parts must divide the batch of {batch} images, got {parts}: use a divisor of {batch}")
    core: Any = model.module if isinstance(model, DistributedDataParallel) else model
    weight = core.loss_weight if loss_weight is None else loss_weight
    if parts == 1:
        output = model(views, mask=mask, loss_weight=weight)
        _backward(output.loss)
        return Losses(*(value.detach() for value in (output.loss, output.loss_rec, output.loss_con)))
    size = batch // parts
    pieces = [(views[i : i + size], mask.select(slice(i * num_views, (i + size) * num_views))) for i in range(0, batch, size)]
    if dist.is_initialized():
        _gather_in(core, "encode", "project")
    states, latents = [], []
    with torch.no_grad():
        for piece, piece_mask in pieces:
            states.append(_random_state(views.device))
            latents.append(core.encode(piece, piece_mask)[1])
    if _is_compiled(model) and not all(map(torch.equal, states[0], _random_state(views.device))):
        raise ValueError(
            "a compiled encoder must draw no random numbers (dropout, drop path), which differ in the second pass: "
            "build the encoder with rates of 0, do not compile it, or use one part"
        )
    loss_rec, loss_con, gradient = views.new_zeros(()), views.new_zeros(()), None
    if weight > 0:  # Eq. 6 over all parts and processes; the projector's gradient is added to its parameters here
        z = torch.cat(latents).requires_grad_()  # (B, V, D)
        contrastive = core.contrastive_loss(core.project(z))
        _backward(weight * contrastive)
        loss_con, gradient = contrastive.detach(), z.grad
    for i, (piece, piece_mask) in enumerate(pieces):
        _set_random_state(states[i], views.device)
        last = i == parts - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            # the loss of a part is the mean over its own images, 1 / parts of the batch
            share = None if gradient is None else gradient[i * size : (i + 1) * size] * parts
            output = model(piece, mask=piece_mask, loss_weight=0, z_gradient=share)
            _backward(output.loss / parts)
        loss_rec += output.loss_rec.detach() / parts
    return Losses(loss_rec + weight * loss_con, loss_rec, loss_con)


def _backward(loss: Tensor) -> None:
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def _gather_in(model: nn.Module, *methods: str) -> None:
    """Let FSDP gather a model's parameters in these methods too, which it does in ``forward`` alone."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for name in methods:
        if isinstance(model, FSDPModule) and not hasattr(getattr(model, name), "__wrapped__"):
            register_fsdp_forward_method(model, name)


def _is_compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for of_device in state[1:]:
        if device.type == "mps":
            torch.mps.set_rng_state(of_device)
        else:
            torch.cuda.set_rng_state(of_device, device)
