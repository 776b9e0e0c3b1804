r"""Measure how fast images load and how fast the model trains, each against another way to do the same.

  python examples/benchmark.py
      takes a few minutes on one CPU core; loading is 3 to 4 times as fast as the naive way at 500 x 375 pixels
  python examples/benchmark.py --parts step --precision bf16 \
    --encoder mvmae_vit_base_patch16 --batch-size 256
      on a CUDA device also the model FLOP utilisation, MFU: a step's operations a second as a share of those of a large matrix
      product on the same device

Parts: loader (two views of an image, against two decodes of its file), step (a training step, against one of transformers'
ViTMAE of the same size). What is compared is timed in turn, in one process: the speed of a machine drifts, ratios hold.
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
PARTS = ("loader", "step")
SAMPLE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
"""Photographs of scikit-image."""


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = option(224, "side of a view in pixels", at_least=1, section="Data")
    output_dir: str = option("runs/benchmark", "folder for benchmark.json", path=True, section="Run")
    encoder: str = option("mvmae_vit_base_patch16", "timm name of the encoder", path=True, section="Model")
    parts: tuple[str, ...] = option(PARTS, "measurements", PARTS, section="Evaluation")
    batch_size: int = option(8, "images of a training step", at_least=2)
    rounds: int = option(5, "rounds in which everything is timed in turn; the median counts", at_least=1)
    device: str = option("auto", "device; auto: CUDA if there is one, else CPU", DEVICES, section="Speed")
    precision: str = option("float32", "precision of training; bf16: under autocast", ["float32", "bf16"])
    compile: bool = option(False, "compile the model with torch.compile")


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
    results = {}
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, own, strict=True))
        results[name] = {"per_second": images / statistics.median(own), "ratio": ratio}
    return results


def show(title: str, timed: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table."""
    print(f"\n{title}")
    for name, row in timed.items():
        print(f"  {name:36s} {row['per_second']:10.2f} images/s {row['ratio']:8.2f} x")


def measure_loader(config: Config, folder: Path) -> dict[str, Any]:
    """Time one process on two views of photographs, by its own CPU time, whatever else runs on the machine."""
    import skimage

    crop = transforms.RandomResizedCrop(config.image_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    naive = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])

    def decode_twice(path: Path) -> Tensor:
        return torch.stack([naive(Image.open(path, formats=FORMATS).convert("RGB")) for _ in range(2)])

    loads: dict[str, Callable[[Path], Tensor]] = {
        "two decodes, torchvision": decode_twice,
        "one decode": mvmae.MultiViewTransform(config.image_size),
    }
    results, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as in each process of a DataLoader
    for width, height, count in ((500, 375, 24), (3000, 2000, 3)):
        paths = [folder / f"{width}x{height}-{i}.jpg" for i in range(count)]
        for path, name in zip(paths, itertools.cycle(SAMPLE), strict=False):
            with Image.open(Path(skimage.__file__).parent / "data" / name, formats=FORMATS) as image:
                image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(path, quality=90)
        ways = {name: partial(lambda load, paths: deque(map(load, paths), 0), load, paths) for name, load in loads.items()}
        results[f"{width}x{height}"] = clock(ways, config.rounds, CPU, count, time.process_time)
        show(f"loading {count} photographs of {width} x {height} in one process", results[f"{width}x{height}"])
    torch.set_num_threads(threads)
    return results


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


def measure_step(config: Config, device: torch.device) -> dict[str, dict[str, float]]:
    """Time our training step against that of transformers' ViTMAE, which has no contrastive loss; on CUDA also the MFU."""
    torch.manual_seed(0)
    model = mvmae.MultiViewMAE(create_encoder(config.encoder, img_size=config.image_size)).to(device)
    peer = build_vitmae(model.encoder).to(device)
    ours: Any = torch.compile(model) if config.compile else model
    views = torch.randn(config.batch_size, 2, 3, config.image_size, config.image_size, device=device)
    mask = mvmae.random_mask(2 * len(views), model.encoder.patch_embed.num_patches, 0.8, device=device)
    repeats = 10 if device.type == "cuda" else 1  # so many that waiting for the device at their end does not count

    def steps(trained: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        """Return training steps of a model: forward, backward, AdamW."""
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-6, fused=True)

        def train() -> None:
            for _ in range(repeats):
                with autocast(config.precision, device):
                    loss = loss_of()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return train

    ways = {"ViTMAE": steps(peer, lambda: peer(views.flatten(0, 1)).loss)}  # each view is an image of its own
    ways["ours"] = steps(model, lambda: ours(views, mask=mask).loss)
    results = clock(ways, config.rounds, device, len(views) * repeats)
    show(f"training steps of {config.encoder}, {len(views)} images, {config.precision}", results)
    if device.type == "cuda":
        a, b = (
            torch.randn(8192, 8192, device=device).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
            for _ in "ab"
        )
        product = clock({"product": lambda: a @ b}, 10 * config.rounds, device, 2 * 8192**3)["product"]["per_second"]
        results["ours"] |= {"mfu": flops_per_image(model) * results["ours"]["per_second"] / product}
        results["ours"] |= {"memory_gb": peak_memory(device) / 1e9, "product_flops_per_second": product}
        print(f"  MFU {results['ours']['mfu']:.1%} of {product / 1e12:.3g} TFLOP/s; {results['ours']['memory_gb']:.2f} GB")
    return results


def main(config: Config) -> None:
    """Make the measurements."""
    device = start_ranks(config.device).device
    if "step" in config.parts and importlib.util.find_spec("transformers") is None:
        raise Stop("--parts step needs transformers, for its ViTMAE: pip install transformers, or --parts loader")
    results: dict[str, Any] = {"config": dataclasses.asdict(config), "torch": torch.__version__, "device": str(device)}
    path = Path(config.output_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        if "loader" in config.parts:
            results["loader"] = measure_loader(config, Path(name))
        if "step" in config.parts:
            results["step"] = measure_step(config, device)
    write_json(path, results)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
