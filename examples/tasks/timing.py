"""What a step costs: its operations counted, things timed in turn, and its matrix products alone."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mvmae


def count_flops(step: Callable[[], object]) -> int:
    """Count the operations of the products and convolutions that a step calls, by their shapes: the same on every machine.

    Attention counts as the six products of its formula, two forward and four backward: fused kernels, which a machine has or
    has not, compute one of them twice, and torch's counter does not know them all.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def wait_for(device: torch.device) -> None:
    """Wait until a device has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clock(
    paths: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, units: float = 1.0
) -> dict[str, dict[str, float]]:
    """Time functions in turn; return for each its median seconds, units per second, and ratio to the first, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            wait_for(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(paths))]
    return {
        name: {
            "seconds": statistics.median(own),
            "per_second": units / statistics.median(own),
            "times_the_first": statistics.median(a / b for a, b in zip(first, own, strict=True)),
        }
        for name, own in seconds.items()
    }


class Products(TorchDispatchMode):
    """Records every matrix product that runs, as the shapes and types of its operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape), args[0].dtype))
        elif name in ("addmm", "baddbmm"):
            self.shapes.append((tuple(args[1].shape), tuple(args[2].shape), args[1].dtype))
        elif "scaled_dot_product" in name:  # q k^T and p v forward; p again, and the gradients of v, p, q, k, backward
            q, k = args[1:3] if "backward" in name else args[:2]
            (b, h, n, d), m = q.shape, k.shape[2]
            across, along = ((b * h, n, d), (b * h, d, m), q.dtype), ((b * h, n, m), (b * h, m, d), q.dtype)
            self.shapes += [across, across, along, along, along] if "backward" in name else [across, along]
        return func(*args, **(kwargs or {}))

    def alone(self, device: torch.device) -> Callable[[], None]:
        """Return a function that runs the same products, in their order, and nothing else."""
        operands = {key: tuple(torch.randn(s, device=device).to(key[2]) for s in key[:2]) for key in set(self.shapes)}
        results = {key: operands[key][0] @ operands[key][1] for key in operands}

        def replay() -> None:
            for key in self.shapes:
                torch.matmul(*operands[key], out=results[key])

        return replay


def time_attention(tokens: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Time torch's fused attention against two matrix products, forward and backward, of about 100 000 values a head."""
    shape = (max(1600 // tokens, 1), 12, tokens, 64)  # (B, heads, N, D of a head)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def products() -> None:
        (((q * 64**-0.5) @ k.mT).softmax(dim=-1) @ v).sum().backward()

    def fused() -> None:
        scaled_dot_product_attention(q, k, v).sum().backward()

    return clock({"fused": fused, "two products": products}, rounds, device, shape[0])


def peak_memory_mb(device: torch.device) -> float:
    """Return the largest amount of memory used so far: of the device, or of this process on the CPU.

    NaN on Windows, and for the GPU of a Mac, of which torch tells the present amount alone.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return math.nan
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def show(title: str, timed: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table."""
    print(f"\n{title}")
    for name, row in timed.items():
        print(f"  {name:34s} {row['per_second']:10.2f} /s   {row['times_the_first']:6.2f} x the first")


def measure_contrast(rounds: int, device: torch.device) -> dict[str, Any]:
    """Time NT-Xent on large batches, forward and backward: all logits at once against chunks of them."""
    results = {}
    for batch in (1024, 2048):
        z = torch.randn(batch, 2, 768, device=device, requires_grad=True)
        losses = {"all at once": mvmae.NTXentLoss(chunk_size=2 * batch), "in chunks of 256": mvmae.NTXentLoss(chunk_size=256)}
        ways = {name: partial(lambda loss, z: torch.autograd.grad(loss(z), z), loss, z) for name, loss in losses.items()}
        results[str(batch)] = clock(ways, rounds, device, batch)
        show(f"NT-Xent of {batch} images, images/s", results[str(batch)])
    return results


def measure_large_contrast(device: torch.device) -> dict[str, float]:
    """Measure the memory that NT-Xent takes beyond its 2 x 32 768 latents of width 768, forward and backward."""
    z = torch.randn(32768, 2, 768, device=device, requires_grad=True)
    before, start = peak_memory_mb(device), time.perf_counter()
    mvmae.NTXentLoss()(z).backward()
    extra = peak_memory_mb(device) - before
    print(f"NT-Xent of 2 x 32768 latents: {extra:.0f} MB beyond the latents, {time.perf_counter() - start:.1f} s")
    return {"extra_memory_mb": extra}
