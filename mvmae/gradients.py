"""Steps of the contrastive loss with their own backward pass, for memory, numeric types and several processes.

Shapes: B images of this process, N images of all processes, V views, D width of a latent.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit_length(z: Tensor, shortest: float) -> Tensor:
    """Divide latents, (..., D), by their lengths, or by ``shortest`` where they are shorter: `F.normalize` for less memory."""
    result: Tensor = _UnitLength.apply(z, shortest)
    return result


class _UnitLength(torch.autograd.Function):
    """`F.normalize` with less memory: its own backward pass holds five tensors of the input's size, this one holds one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, shortest: float) -> Tensor:
        unit: Tensor = z / z.norm(dim=-1, keepdim=True).clamp_min(shortest)
        return unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, ctx.shortest = inputs
        ctx.save_for_backward(z, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, unit = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            length = z.norm(dim=-1, keepdim=True)
            along = torch.einsum("...d,...d->...", grads[0], unit)[..., None].masked_fill(length < ctx.shortest, 0)
            return torch.addcmul(grads[0], unit, along, value=-1).div_(length.clamp_min(ctx.shortest)), None


def products(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.mT``, (..., M, D) by (..., N, D), with gradients of their own type, also under autocast.

    A plain product there has bfloat16 gradients, off by 4e-3. ``b`` must be another tensor than ``a`` for torch.compile.
    """
    result: Tensor = _Products.apply(a, b)
    return result


class _Products(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return _Products.apply(grads[0], b.mT), _Products.apply(grads[0].mT, a.mT)


def num_processes() -> int:
    """Return the number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_latents(z: Tensor) -> tuple[Tensor, int]:
    """Collect the latents of all processes, with gradient, in the order of their ranks: (B, V, D) to (N, V, D).

    Returns:
        The latents, and where this process's first image stands in them. Without processes: ``z`` and 0.
    """
    if num_processes() == 1:
        return z, 0
    gathered: Tensor = _AllGather.apply(z)
    return gathered, dist.get_rank() * len(z)


def sum_over_processes(x: Tensor) -> Tensor:
    """Add a tensor of all processes up, with gradient. Without processes: ``x``."""
    if num_processes() == 1:
        return x
    parts: Tensor = _AllGather.apply(x[None])
    return parts.sum(dim=0)


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor over all processes; the gradient of a part is the sum of all processes' gradients for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.size = len(x)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.size
        return total[start : start + ctx.size]
