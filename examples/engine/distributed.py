"""The ranks: this process among all that torchrun started, its device, and what they agree on."""

import inspect
import os
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from engine.signals import Stop
from mvmae.weights import first_line

Item = TypeVar("Item")
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Values of ``--device``."""
JOIN = 60
"""Seconds that processes wait at their start until all are there."""
DROPOUT = -2
"""Takes the place of an epoch in the seed of what a step draws on a rank: dropout, stochastic depth, mixup, sampled regions."""


class Ranks(NamedTuple):
    """This process among all processes of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device
    control: Any

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: the same answer in all of them."""
        return bool(self.max(int(flag)))

    def max(self, number: int) -> int:
        """Return the largest number of all processes, in each process."""
        if self.control is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def gather(self, item: Item) -> list[Item]:
        """Return the items of all processes, in the order of the ranks, in each process."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size


def start_ranks(device: str) -> Ranks:
    """Join the processes that torchrun started, if any: nccl on CUDA devices, gloo on the CPU.

    Where a machine has fewer CUDA devices than processes, these share them, through gloo, which is slow: nccl refuses that.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda: torch finds no CUDA device; use --device cpu to run on the processor")
    if device == "mps" and not torch.backends.mps.is_available():
        raise Stop("--device mps: torch finds no MPS device, the GPU of a Mac; use --device cpu to run on the processor")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "mps" and world_size > 1:
        raise Stop(f"--device mps must run in one process, got {world_size}: start the script without torchrun")
    chosen, backend = torch.device(device), "gloo"
    if device == "cuda":
        place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count
        chosen, backend = torch.device(device, place % count if shared else place), "gloo" if shared else "nccl"
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Ranks(0, 1, chosen, None)
    if not 0 <= rank < world_size:
        raise Stop(
            f"RANK must be 0 to {world_size - 1} where WORLD_SIZE is {world_size}, got {rank}: start the script with torchrun"
        )
    if not dist.is_initialized():
        seconds = JOIN if rank == 0 else JOIN / 2.5  # whoever looks for the first one's address tries for longer than that
        try:
            store = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))[0]
        except dist.DistError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            cause = f"process {rank} of {world_size} did not meet the others at {address} within {JOIN} s"
            raise Stop(f"{cause} ({first_line(error)}): start the script with torchrun", 1) from error
        store.set_timeout(timedelta(minutes=30))  # torch's own, for what follows
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    group: Any = dist.new_group(backend="gloo")
    dist.barrier(group)  # a process that ends at once, by an error, takes along the store on which others may still wait
    return Ranks(rank, world_size, chosen, group)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; on CUDA, where loaders pin memory, without waiting for the copy."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def parallel(model: nn.Module, ranks: Ranks, *, unused: bool = False) -> nn.Module:
    """Average a model's gradients over all ranks; ``unused``: a step may leave parameters without a gradient."""
    if ranks.world_size == 1:
        return model
    wrap, devices = nn.parallel.DistributedDataParallel, [ranks.device.index] if ranks.device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(wrap).parameters  # torch 2.14's name for it
    options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False, "find_unused_parameters": unused}
    return wrap(model, device_ids=devices, **options)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute in bf16 where `in_bf16` says so (on a Mac's GPU from macOS 14 on)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device))


def in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a run computes in bf16: ``auto`` does so on CUDA, ``bf16`` everywhere, ``float32`` nowhere."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
