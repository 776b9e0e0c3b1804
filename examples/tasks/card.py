"""How much of a device a training step uses, for encoders, ways and batch sizes, and whether loading keeps up with it.

Shapes: B images, V views, C channels, H x W pixels.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mvmae
from engine.distributed import autocast, to_device
from mvmae.data import ImageSource, MultiViewDataset, StepSampler, make_loader
from tasks.backbones import create_encoder
from tasks.inputs import normalize
from tasks.peers import ViTMAE
from tasks.timing import clock, count_flops, peak_memory_mb, wait_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST = 5
"""Kernels of a step that are named."""
Step = Callable[[Tensor], None]


class Bench(NamedTuple):
    """What all settings share.

    Attributes:
        source: images to load.
        image_size: side of a view in pixels.
        precision: as for `autocast`.
        device: that trains.
        rounds: in which a step is timed; the median counts.
        workers: processes that load images.
    """

    source: ImageSource
    image_size: int
    precision: str
    device: torch.device
    rounds: int
    workers: int

    @property
    def steps(self) -> int:
        """Steps of a round: so many on a CUDA device that waiting for it at their end does not count."""
        return 10 if self.device.type == "cuda" else 1

    @property
    def ahead(self) -> int:
        """Batches that may be loaded already when a measurement begins."""
        return 2 * self.workers + 2

    def build(self, encoder: str) -> mvmae.MultiViewMAE:
        """Build the model around an encoder of timm, the same each time."""
        torch.manual_seed(0)
        return mvmae.MultiViewMAE(create_encoder(encoder, img_size=self.image_size)).to(self.device)

    def batches(self, batch_size: int, steps: int) -> Iterator[Tensor]:
        """Load views of steps, (B, V, C, H, W) uint8, and copy them to the device as a run does."""
        dataset = MultiViewDataset(self.source, mvmae.MultiViewTransform(self.image_size))
        sampler = StepSampler(len(self.source), batch_size, num_steps=steps)
        for batch in make_loader(dataset, sampler, num_workers=self.workers, pin_memory=self.device.type == "cuda"):
            yield to_device(batch.views, self.device)

    def drawn(self, batch_size: int) -> Tensor:
        """Draw views of a step that lie on the device, (B, V, C, H, W) uint8."""
        size = (batch_size, 2, 3, self.image_size, self.image_size)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)

    def speed(self, step: Step, pixels: Tensor) -> float:
        """Return the images per second of steps on the same views, which lie on the device."""
        way, images = {"step": partial(repeated, step, pixels, self.steps)}, self.steps * len(pixels)
        return clock(way, self.rounds, self.device, images)["step"]["per_second"]

    def rate(self, batch_size: int, step: Step, steps: int) -> float:
        """Return the images per second of steps that are fed by the loader, once what was loaded before them is used up."""
        start = 0.0
        for number, pixels in enumerate(self.batches(batch_size, self.ahead + steps)):
            step(pixels)
            if number + 1 == self.ahead:
                wait_for(self.device)
                start = time.perf_counter()
        wait_for(self.device)
        return batch_size * steps / (time.perf_counter() - start)


def product_rate(bench: Bench, side: int = 0) -> float:
    """Measure the operations per second of a large matrix product, 2 x side^3 each, in the type that a step computes in.

    Args:
        bench: device, precision and rounds.
        side: of the matrices; 0: 8192 on a CUDA device, 1024 elsewhere.
    """
    side, dtype = side or (8192 if bench.device.type == "cuda" else 1024), torch.float32
    if bench.precision == "bf16":
        dtype = torch.bfloat16
    a, b, out = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(3))

    def products() -> None:
        for _ in range(bench.steps):
            torch.matmul(a, b, out=out)

    return clock({"product": products}, bench.rounds, bench.device, bench.steps * 2 * side**3)["product"]["per_second"]


def training_step(bench: Bench, model: mvmae.MultiViewMAE, way: str) -> Step:
    """Return a step as pretrain.py takes it, from uint8 views on the device to new weights.

    Args:
        bench: device and precision.
        model: that is trained.
        way: ``eager``, ``compiled``, or ``vitmae``: transformers' model of the same size instead.
    """
    trained: Any = model
    if way == "vitmae":
        trained = ViTMAE(model.encoder).to(bench.device)
    elif way == "compiled":
        trained = torch.compile(model)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    generator, length = torch.Generator().manual_seed(0), model.encoder.patch_embed.num_patches

    def step(pixels: Tensor) -> None:
        views = normalize(pixels, MEAN, STD)
        mask = mvmae.random_mask(math.prod(views.shape[:2]), length, 0.8, generator=generator, device=bench.device)
        with autocast(bench.precision, bench.device):
            loss = trained(views) if way == "vitmae" else trained(views, mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops_per_image(bench: Bench, encoder: str) -> float:
    """Count the operations of a step for one image, both views, forward and backward."""
    model, size = bench.build(encoder), bench.image_size
    views = torch.randn(2, 2, 3, size, size, device=bench.device)
    mask = mvmae.random_mask(4, model.encoder.patch_embed.num_patches, 0.8, device=bench.device)
    return count_flops(lambda: model(views, mask=mask).loss.backward()) / len(views)


def within_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is measured, or that the memory does not suffice; what was held is free again."""
    try:
        return measure()
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what the CPU's allocator raises
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {"error": "out of memory"}


def repeated(step: Step, pixels: Tensor, times: int) -> None:
    """Take steps on the same views."""
    for _ in range(times):
        step(pixels)


def measure_setting(
    bench: Bench, encoder: str, way: str, batch_size: int, flops: float, peak: float, trace: Path | None
) -> dict[str, Any]:
    """Time steps on views that lie on the device, and steps that are fed by the loader.

    Args:
        bench: what all settings share.
        encoder: timm name.
        way: as for `training_step`.
        batch_size: images of a step.
        flops: operations for an image, as `flops_per_image` counts them.
        peak: operations per second of a large matrix product.
        trace: file for a Chrome trace; no profile where it is None.
    """
    step, pixels = training_step(bench, bench.build(encoder), way), bench.drawn(batch_size)
    repeated(step, pixels, 1)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    rate = bench.speed(step, pixels)
    found: dict[str, Any] = {"images_per_second": rate, "peak_memory_mb": peak_memory_mb(bench.device)}
    if way != "vitmae":
        found["mfu"] = flops * rate / peak
    found["fed_images_per_second"] = bench.rate(batch_size, step, bench.rounds * bench.steps)
    found["waiting"] = max(1 - found["fed_images_per_second"] / rate, 0.0)
    if trace is not None:
        found |= {"kernels": largest_kernels(bench, partial(step, pixels), trace), "trace": trace.name}
    return found


def largest_kernels(bench: Bench, step: Callable[[], object], trace: Path) -> list[dict[str, Any]]:
    """Profile three steps, write them as a Chrome trace, and return the kernels that take the most time, with their shares.

    On the CPU, torch's operators stand for kernels.
    """
    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(3):
            step()
        wait_for(bench.device)
    profiler.export_chrome_trace(str(trace))
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if not cuda:
            times[event.key] = event.self_cpu_time_total
        elif event.device_type.name == "CUDA":
            times[event.key] = event.self_device_time_total
    total = sum(times.values())
    largest = sorted(times, key=lambda name: times[name], reverse=True)[:LARGEST]
    return [{"kernel": name, "share": times[name] / total, "ms_per_step": times[name] / 3e3} for name in largest]


def measure_card(
    bench: Bench, encoders: tuple[str, ...], ways: tuple[str, ...], batch_sizes: tuple[int, ...], traces: Path | None
) -> dict[str, Any]:
    """Measure every setting, and print a line for each.

    Args:
        bench: what all settings share.
        encoders: timm names.
        ways: as for `training_step`.
        batch_sizes: images of a step.
        traces: folder for a Chrome trace of each; no profiles where it is None.
    """
    peak = product_rate(bench)
    print(f"\ntraining steps on {bench.device} in {bench.precision}; a large matrix product: {peak / 1e12:.3g} TFLOP/s")
    settings: dict[str, Any] = {}
    for encoder in encoders:
        flops = flops_per_image(bench, encoder)
        for way, batch_size in ((way, size) for way in ways for size in batch_sizes):
            name = f"{encoder}, {way}, {batch_size} images"
            trace = None if traces is None else traces / f"trace-{encoder}-{way}-{batch_size}.json".replace("/", "_")
            measure = partial(measure_setting, bench, encoder, way, batch_size, flops, peak, trace)
            settings[name] = {"flops_per_image": flops, **within_memory(measure)}
            print(line(name, settings[name]))
            for kernel in settings[name].get("kernels", ()):
                print(f"    {kernel['share']:6.1%}  {kernel['ms_per_step']:9.3f} ms a step  {kernel['kernel'][:80]}")
    return {"product_flops_per_second": peak, "settings": settings}


def line(name: str, found: dict[str, Any]) -> str:
    """Return what was measured of a setting, on a line."""
    if "error" in found:
        return f"  {name:50s} {found['error']}"
    used = f"MFU {found['mfu']:6.1%}" if "mfu" in found else " " * 10
    memory = f"{found['peak_memory_mb']:.0f} MB"
    return (
        f"  {name:50s} {found['images_per_second']:9.1f} images/s  {used}  {found['waiting']:4.0%} waiting for data  {memory}"
    )


def measure_feeding(bench: Bench, encoders: tuple[str, ...], way: str, batch_size: int) -> dict[str, Any]:
    """Time the loader alone against what the device takes, for each encoder: how many loading processes would keep up.

    Args:
        bench: what all settings share.
        encoders: timm names.
        way: as for `training_step`.
        batch_size: images of a step.
    """
    loader = bench.rate(batch_size, lambda _: None, max(bench.rounds * bench.steps, 4))
    print(f"\nloading alone with {bench.workers} workers: {loader:.1f} images/s of two views")
    found: dict[str, Any] = {"loader_images_per_second": loader, "encoders": {}}

    def measure(encoder: str) -> dict[str, Any]:
        rate = bench.speed(training_step(bench, bench.build(encoder), way), bench.drawn(batch_size))
        return {"images_per_second": rate, "workers_that_keep_up": math.ceil(max(bench.workers, 1) * rate / loader)}

    for encoder in encoders:
        own = found["encoders"][encoder] = within_memory(partial(measure, encoder))
        said = (
            own.get("error") or f"takes {own['images_per_second']:.1f} images/s: {own['workers_that_keep_up']} workers keep up"
        )
        print(f"  {encoder}, {way}, {batch_size} images: {said}")
    return found
