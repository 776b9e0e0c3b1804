"""Whether the numbers of a step are finite: asked of the device at once, or late, when it has left out the steps that are not.

A question to the device waits until it has done all that was asked of it before, and meanwhile the host asks for nothing new.
torch's fused AdamW takes a flag on the device that makes it leave out a step, with its moments and its count of steps: so the
host may look at the numbers of many steps at once, and no step that is not finite has touched the weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.distributed import Processes

MOST = 100
"""Steps after which their numbers are looked at, where nothing else asks for them."""


class Noted(NamedTuple):
    """A step, and its numbers on the device.

    Attributes:
        step: counted from 1.
        losses: their names.
        images: names the images of the batch.
        numbers: the losses and the norm of the gradient, of this process.
    """

    step: int
    losses: tuple[str, ...]
    images: Callable[[], Sequence[str]]
    numbers: Tensor


def leaves_out(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer takes the flag ``found_inf``, and leaves a step out without a trace: torch's fused AdamW."""
    fused = isinstance(optimizer, torch.optim.AdamW) and all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def step_numbers(model: nn.Module, losses: Mapping[str, Tensor]) -> Tensor:
    """Return the losses and the norm of all gradients in float32, on the device, without waiting for it."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack([loss.detach().float() for loss in losses.values()] + [nn.utils.get_total_norm(gradients)])


def wrong(noted: Noted, good: Sequence[bool], processes: Processes, *, alone: bool = False) -> tuple[str, list[str]]:
    """Return what is not finite in a step, and the names of the images of which it came.

    Args:
        noted: the step.
        good: whether each of its numbers is finite in this process.
        processes: this one and the others, which are asked as well.
        alone: ask none of them.
    """
    names = [name for name, finite in zip(noted.losses, good, strict=False) if not finite]
    own = (names[-1:], list(noted.images()))  # the last is the most particular
    found = {processes.rank: own} if alone else dict(enumerate(processes.gather(own)))
    parts = [f"{losses[0]} in process {rank}" for rank, (losses, _) in found.items() if losses] or ["the gradient"]
    images = [name for losses, batch in found.values() for name in (batch if losses or parts == ["the gradient"] else [])]
    return f"step {noted.step}: {', '.join(parts)} is not finite", images


class Late:
    """The numbers of the steps since the last look, kept on the device.

    Args:
        optimizer: one that `leaves_out` steps.
        processes: this one and the others: they leave out the same steps.

    Attributes:
        noted: the steps, and for each a flag on the device: 1 where it is left out, else 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
        self.optimizer, self.processes = optimizer, processes
        self.noted: list[tuple[Noted, Tensor]] = []

    def note(self, noted: Noted) -> Tensor:
        """Keep a step's numbers, and let the optimizer leave the step out where they are not finite; wait for nothing.

        Returns:
            Whether it is left out, a bool on the device.
        """
        left_out = self.processes.any_on_device(~noted.numbers.isfinite().all())
        self.optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
        self.noted.append((noted, self.optimizer.found_inf))  # type: ignore[attr-defined]
        return left_out

    def look(self) -> Iterator[tuple[Noted, list[bool], bool]]:
        """Wait for the device; yield each step since the last look, whether its numbers are finite, and if it was left out."""
        steps, self.noted = self.noted, []
        if steps:
            values = iter(torch.cat([part for noted, flag in steps for part in (noted.numbers, flag[None])]).tolist())
            for noted, _ in steps:
                yield noted, [math.isfinite(next(values)) for _ in noted.numbers], bool(next(values))


class Statistics:
    """What a forward pass changes, the running statistics of batch normalisation, kept so that a batch can be taken back."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.keep()

    def keep(self) -> None:
        """Copy the statistics as they are."""
        self.kept = [[buffer.clone() for buffer in norm.buffers()] for norm in self.norms]

    def take_back(self, where: Tensor | None = None) -> None:
        """Put the copy back; where a flag on the device is given, if that is set, without waiting for it."""
        for norm, kept in zip(self.norms, self.kept, strict=True):
            for buffer, old in zip(norm.buffers(), kept, strict=True):
                buffer.copy_(old if where is None else torch.where(where, old, buffer))
