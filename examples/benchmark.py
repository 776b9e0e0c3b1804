r"""Measure how fast images load and how fast the model trains, each against other ways to do the same.

  python examples/benchmark.py --parts loader workers step
      takes a few minutes on one CPU core; loading is 3.4 to 4 times as fast as the naive way at 500 x 375 pixels
  python examples/benchmark.py --parts step mfu contrast --precision bf16 --batch-sizes 64 128 256 \
    --encoders mvmae_vit_base_patch16 mvmae_vit_large_patch16
      on a CUDA device: which share of its speed a training step uses, by encoder and batch size

Parts: loader (one process), workers (a DataLoader), step (a training step against the plain way to write it, and against
transformers' ViTMAE of the same size), mfu (model FLOP utilisation: a step's operations a second as a share of those of a large
matrix product on the same device), contrast (memory of NT-Xent on 65 536 latents; minutes on a CPU).

What is compared is timed in turn, in one process: the speed of a machine drifts, ratios hold.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import mvmae
from engine.distributed import DEVICES, autocast, start_ranks
from engine.log import peak_memory
from engine.options import option, run
from mvmae.data import FORMATS, MultiViewDataset, StepSampler, make_loader, open_images
from mvmae.weights import write_json
from tasks.flops import flops_per_image
from tasks.models import create_encoder

CPU = torch.device("cpu")
IMAGES = 3000
"""Of the part workers: so many that starting the processes does not count."""
LATENTS = 65536
"""Of the part contrast: two views of half as many images."""
PARTS = ("loader", "workers", "step", "mfu", "contrast")
SAMPLE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
"""Photographs of scikit-image."""


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = option(224, "side of a view in pixels", at_least=1, section="Data")
    output_dir: str = option("runs/benchmark", "folder for benchmark.json", path=True, section="Run")
    encoders: tuple[str, ...] = option(
        ("mvmae_vit_base_patch16",), "timm names of the encoders; step takes the first", path=True, section="Model"
    )
    parts: tuple[str, ...] = option(("loader", "workers", "step"), "measurements", PARTS, section="Evaluation")
    batch_sizes: tuple[int, ...] = option((8,), "images of a training step; step takes the first", at_least=2)
    rounds: int = option(5, "rounds in which everything is timed in turn; the median counts", at_least=1)
    device: str = option("auto", "device; auto: CUDA if there is one, else CPU", DEVICES, section="Speed")
    precision: str = option("float32", "precision of training; bf16: under autocast", ["float32", "bf16"])
    compile: bool = option(False, "compile the model with torch.compile")
    workers: int = option(2, "processes of the part workers", at_least=0)


class Naive(Dataset[Tensor]):
    """Two decodes of every file, each through torchvision's transforms to a normalised float tensor."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
        normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.paths = paths
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.load(self.paths[index])

    def load(self, path: Path) -> Tensor:
        """Return two views of a file."""
        views: list[Tensor] = []
        for _ in range(2):
            with Image.open(path, formats=FORMATS) as image:
                views.append(self.transform(image.convert("RGB")))
        return torch.stack(views)


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


def plain_loss(model: mvmae.MultiViewMAE, views: Tensor, mask: mvmae.Mask) -> Tensor:
    """Compute Eq. 7 the plain way: view after view, every patch embedded before the visible tokens are gathered."""
    vit: Any = model.encoder
    number, latents, loss_rec = views.shape[1], [], views.new_zeros(())
    for v in range(number):
        images, part = views[:, v], mask.select(slice(v, None, number))
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]  # (B, L, D)
        tokens = tokens.gather(1, part.visible[:, :, None].expand(-1, -1, tokens.shape[2]))  # (B, K, D)
        prefix = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = vit.norm(vit.blocks(torch.cat([prefix, tokens], dim=1)))
        target = mvmae.patchify(images, vit.patch_embed.patch_size)
        loss_rec = loss_rec + model.reconstruction_loss(model.decoder(tokens, part), target, part.masked) / number
        latents.append(model.pool_tokens(tokens))
    loss: Tensor = loss_rec + model.loss_weight * model.contrastive_loss(torch.stack(latents, dim=1))
    return loss


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
        "two decodes, torchvision": Naive([], config.image_size).load,
        "one decode, fast": views(config.image_size),
        "one decode, Pillow alone": views(config.image_size, decoder="pillow"),
    }
    for width, height, count in ((500, 375, 24), (3000, 2000, 3)):
        paths = write_photographs(folder, width, height, count)
        ways = {name: partial(lambda load, paths: deque(map(load, paths), 0), load, paths) for name, load in loads.items()}
        results[f"{width}x{height}"] = clock(ways, config.rounds, CPU, count, time.process_time)
        show(f"loading {count} photographs of {width} x {height} in one process", results[f"{width}x{height}"])
    torch.set_num_threads(threads)
    return results


def measure_workers(config: Config, folder: Path) -> dict[str, Any]:
    """Time loading processes, ours and the naive way's, through torch's DataLoader."""
    paths = write_photographs(folder, 500, 375, 24) * (IMAGES // 24)
    (folder / "list.txt").write_text("".join(f"{path.absolute()}\n" for path in paths))
    dataset = MultiViewDataset(open_images(folder / "list.txt"), mvmae.MultiViewTransform(config.image_size))

    def naive() -> None:
        deque(DataLoader(Naive(paths, config.image_size), 32, num_workers=config.workers), 0)

    def ours() -> None:
        sampler = StepSampler(len(paths), 32, num_steps=len(paths) // 32)
        deque(make_loader(dataset, sampler, num_workers=config.workers), 0)

    results = clock({"two decodes, torchvision": naive, "ours": ours}, config.rounds, CPU, len(paths))
    show(f"loading with {config.workers} workers", results)
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

    def ours(self) -> Callable[[], None]:
        """Return training steps of `MultiViewMAE`."""
        model: Any = torch.compile(self.model) if self.config.compile else self.model
        return self.steps(self.model, lambda: model(self.views, mask=self.mask).loss)

    def clock(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """Time training steps in turn."""
        return clock(ways, self.config.rounds, self.device, len(self.views) * self.repeats)


def measure_step(config: Config, device: torch.device) -> dict[str, Any]:
    """Time our training step against the plain way, and against ViTMAE where transformers is installed."""
    bench = Bench(config, config.encoders[0], config.batch_sizes[0], device)
    model, views, mask = bench.model, bench.views, bench.mask
    ways = {"the plain way": bench.steps(model, lambda: plain_loss(model, views, mask)), "ours": bench.ours()}
    try:
        peer = build_vitmae(model.encoder).to(device)  # takes the views as images of their own
        ways["ViTMAE of transformers, no contrast"] = bench.steps(peer, lambda: peer(views.flatten(0, 1)).loss)
    except ImportError:
        print("\ntransformers is not installed: its ViTMAE is left out")
    results = bench.clock(ways)
    show(f"training steps of {config.encoders[0]}, {len(views)} images, {config.precision}", results)
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
        speed = bench.clock({"ours": bench.ours()})["ours"]["per_second"]
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


def measure_contrast(device: torch.device) -> dict[str, float]:
    """Measure the memory of NT-Xent beyond its 65 536 latents of width 768, forward and backward; all logits are 17 GB."""
    z = torch.randn(LATENTS // 2, 2, 768, device=device, requires_grad=True)
    before, start = peak_memory(device), time.perf_counter()
    mvmae.NTXentLoss()(z).backward()
    extra, seconds = (peak_memory(device) - before) / 1e9, time.perf_counter() - start
    print(f"\nNT-Xent of {LATENTS} latents: {extra:.2f} GB beyond the latents, {seconds:.1f} s")
    return {"extra_memory_gb": extra, "seconds": seconds}


def main(config: Config) -> None:
    """Make the measurements."""
    device = start_ranks(config.device).device
    results: dict[str, Any] = {"config": dataclasses.asdict(config), "torch": torch.__version__, "device": str(device)}
    path = Path(config.output_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        measures: dict[str, Callable[[], Any]] = {
            "contrast": lambda: measure_contrast(device),  # first: the peak of a process never falls
            "loader": lambda: measure_loader(config, Path(name)),
            "workers": lambda: measure_workers(config, Path(name)),
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
