r"""Measure how fast images load and how fast the model trains, each against another way to do the same.

  python examples/benchmark.py
      takes a few minutes on one CPU core; loading is 3 to 4 times as fast as the naive way at 500 x 375 pixels
  python examples/benchmark.py --parts step mfu --precision bf16 --batch-sizes 64 128 256 \
    --encoders mvmae_vit_base_patch16 mvmae_vit_large_patch16
      on a CUDA device: which share of its speed a training step uses, by encoder and batch size

Parts: loader (two views of an image, against two decodes of its file), step (a training step, against one of transformers'
ViTMAE of the same size), mfu (model FLOP utilisation: a step's operations a second as a share of a large matrix product's
on the same device). What is compared is timed in turn, in one process: the speed of a machine drifts, ratios hold.
"""

import dataclasses
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import mvmae
from engine.distributed import DEVICES, autocast, start_ranks
from engine.log import peak_memory
from engine.options import option, run
from engine.signals import Stop
from mvmae.data import FORMATS
from mvmae.weights import write_json
from tasks.flops import flops_per_image
from tasks.models import create_encoder

CPU = torch.device("cpu")
PARTS = ("loader", "step", "mfu")
SAMPLE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
"""Photographs of scikit-image."""


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = option(224, "side of a view in pixels", at_least=1, section="Data")
    output_dir: str = option("runs/benchmark", "folder for benchmark.json", path=True, section="Run")
    encoders: tuple[str, ...] = option(
        ("mvmae_vit_base_patch16",), "timm names of the encoders; step takes the first", path=True, section="Model"
    )
    parts: tuple[str, ...] = option(("loader", "step"), "measurements", PARTS, section="Evaluation")
    batch_sizes: tuple[int, ...] = option((8,), "images of a training step; step takes the first", at_least=2)
    rounds: int = option(5, "rounds in which everything is timed in turn; the median counts", at_least=1)
    device: str = option("auto", "device; auto: CUDA if there is one, else CPU", DEVICES, section="Speed")
    precision: str = option("float32", "precision of training; bf16: under autocast", ["float32", "bf16"])
    compile: bool = option(False, "compile the model with torch.compile")


def naive_loader(size: int) -> Callable[[Path], Tensor]:
    """Return what loads two views of a file the usual way: two decodes, each through torchvision's transforms."""
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])

    def load(path: Path) -> Tensor:
        views: list[Tensor] = []
        for _ in range(2):
            with Image.open(path, formats=FORMATS) as image:
                views.append(transform(image.convert("RGB")))
        return torch.stack(views)

    return load


def build_vitmae(encoder: Any) -> nn.Module:
    """Build transformers' ViTMAE with an encoder of the same size as ours, and our decoder's."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.num_heads,
        intermediate_size=encoder.blocks[0].mlp.fc1.out_features,
        image_size=encoder.patch_embed.img_size[0],
        patch_size=encoder.patch_embed.patch_size[0],
        mask_ratio=0.8,
        norm_pix_loss=True,
        decoder_num_hidden_layers=4,
    )
    model: nn.Module = ViTMAEForPreTraining(config)
    return model


def clock(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    images: float,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time functions in turn, after a round of warm-up.

    Args:
        ways: what is timed, by name; the first is the one that the others are compared with.
        rounds: the median over them counts.
        device: waited for after each call.
        images: of a call.
        timer: in seconds.

    Returns:
        for each name ``per_second``, images; ``ratio``, its speed over the first one's, round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = timer()
            way()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if turn:
                seconds[name].append(timer() - start)
    first = seconds[next(iter(ways))]
    return {
        name: {
            "per_second": images / statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(first, own, strict=True)),
        }
        for name, own in seconds.items()
    }


def show(title: str, timed: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table."""
    print(f"\n{title}")
    for name, row in timed.items():
        print(f"  {name:36s} {row['per_second']:10.2f} images/s {row['ratio']:8.2f} x")


def write_photographs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Write JPEGs (quality 90) of one size from photographs of scikit-image, and return their paths."""
    import skimage

    paths = [folder / f"{width}x{height}-{i}.jpg" for i in range(count)]
    for path, name in zip(paths, itertools.cycle(SAMPLE), strict=False):
        with Image.open(Path(skimage.__file__).parent / "data" / name, formats=FORMATS) as image:
            image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(path, quality=90)
    return paths


def measure_loader(config: Config, folder: Path) -> dict[str, Any]:
    """Time one process on two views of every photograph: its own CPU time, whatever else runs on the machine."""
    results, threads, views = {}, torch.get_num_threads(), mvmae.MultiViewTransform
    torch.set_num_threads(1)  # as in each process of a DataLoader
    loads = {
        "two decodes, torchvision": naive_loader(config.image_size),
        "one decode": views(config.image_size),
    }
    for width, height, count in ((500, 375, 24), (3000, 2000, 3)):
        paths = write_photographs(folder, width, height, count)
        ways = {name: partial(lambda load, paths: deque(map(load, paths), 0), load, paths) for name, load in loads.items()}
        results[f"{width}x{height}"] = clock(ways, config.rounds, CPU, count, time.process_time)
        show(f"loading {count} photographs of {width} x {height} in one process", results[f"{width}x{height}"])
    torch.set_num_threads(threads)
    return results


class Bench:
    """A model, views that lie on the device, and steps of training on them."""

    def __init__(self, config: Config, encoder: str, batch_size: int, device: torch.device) -> None:
        self.config, self.device, size = config, device, config.image_size
        torch.manual_seed(0)
        self.model = mvmae.MultiViewMAE(create_encoder(encoder, img_size=size)).to(device)
        self.views = torch.randn(batch_size, 2, 3, size, size, device=device)
        self.mask = mvmae.random_mask(2 * batch_size, self.model.encoder.patch_embed.num_patches, 0.8, device=device)
        self.repeats = 10 if device.type == "cuda" else 1  # so many that waiting for the device at their end does not count

    def steps(self, model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        """Return training steps of a model: forward, backward, AdamW."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

        def train() -> None:
            for _ in range(self.repeats):
                with autocast(self.config.precision, self.device):
                    loss = loss_of()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return train

    def clock(self, **peers: nn.Module) -> dict[str, dict[str, float]]:
        """Time our training steps in turn with those of other models, which take the views as images of their own."""
        model: Any = torch.compile(self.model) if self.config.compile else self.model
        images = self.views.flatten(0, 1)
        ways = {name: self.steps(peer, partial(lambda peer: peer(images).loss, peer)) for name, peer in peers.items()}
        ways["ours"] = self.steps(self.model, lambda: model(self.views, mask=self.mask).loss)
        return clock(ways, self.config.rounds, self.device, len(self.views) * self.repeats)


def measure_step(config: Config, device: torch.device) -> dict[str, Any]:
    """Time our training step against that of transformers' ViTMAE, which has no contrastive loss."""
    bench = Bench(config, config.encoders[0], config.batch_sizes[0], device)
    results = bench.clock(ViTMAE=build_vitmae(bench.model.encoder).to(device))
    show(f"training steps of {config.encoders[0]}, {len(bench.views)} images, {config.precision}", results)
    return results


def product_rate(config: Config, device: torch.device) -> float:
    """Return the operations a second of a large matrix product in the type that a step computes in."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    product = partial(torch.matmul, a, b, out=out)
    return clock({"product": product}, 10 * config.rounds, device, 2 * side**3)["product"]["per_second"]


def measure_mfu(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure speed, model FLOP utilisation and memory of training steps, for each encoder and batch size."""
    peak, results = product_rate(config, device), dict[str, Any]()

    def measure(encoder: str, batch_size: int) -> dict[str, float]:
        bench = Bench(config, encoder, batch_size, device)
        flops = flops_per_image(bench.model)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        speed = bench.clock()["ours"]["per_second"]
        return {"per_second": speed, "mfu": flops * speed / peak, "flops": flops, "memory_gb": peak_memory(device) / 1e9}

    print(f"\ntraining steps on {device} in {config.precision}; a large matrix product: {peak / 1e12:.3g} TFLOP/s")
    for encoder, batch_size in itertools.product(config.encoders, config.batch_sizes):
        name = f"{encoder}, {batch_size} images"
        try:
            found = results[name] = measure(encoder, batch_size)
            shown = f"{found['per_second']:10.2f} images/s  MFU {found['mfu']:6.1%}  {found['memory_gb']:.2f} GB"
        except torch.OutOfMemoryError:
            results[name], shown = {"error": "out of memory"}, "out of memory"
        print(f"  {name:44s} {shown}")
    return {"product_flops_per_second": peak, "steps": results}


def main(config: Config) -> None:
    """Make the measurements."""
    device = start_ranks(config.device).device
    if "step" in config.parts and importlib.util.find_spec("transformers") is None:
        raise Stop("--parts step needs transformers, for its ViTMAE: pip install transformers, or --parts loader mfu")
    results: dict[str, Any] = {"config": dataclasses.asdict(config), "torch": torch.__version__, "device": str(device)}
    path = Path(config.output_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        measures: dict[str, Callable[[], Any]] = {
            "loader": lambda: measure_loader(config, Path(name)),
            "step": lambda: measure_step(config, device),
            "mfu": lambda: measure_mfu(config, device),
        }
        for part, measure in measures.items():
            if part in config.parts:
                results[part] = measure()
                write_json(path, results)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
