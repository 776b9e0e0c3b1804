"""Measure how fast images load and how fast the model trains, each against what is possible, in one run.

  python examples/benchmark.py --threads 1
      takes about 10 minutes on one CPU core
  python examples/benchmark.py --parts model --batch-size 256 --precision bf16
      training steps on a CUDA device
  python examples/benchmark.py --parts card feeding --precision bf16 --workers 16 --profile
      how much of a CUDA device is used, by encoder, batch size and torch.compile, and whether loading keeps up with it
  python examples/benchmark.py --parts loader --data path/to/photographs --workers 8
      loading of your own photographs

Results are ratios of times measured alternately in one process, because the speed of a machine drifts: loading against two full
decodes with torchvision and against decoding alone, a training step against its matrix products alone. The part card gives a
step's share of the rate of large matrix products, which is measured on the same device (model FLOP utilisation, MFU), and the
share of its speed that is lost where the loader feeds it (waiting for data). All goes to benchmark.json in the output folder.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import mvmae
from engine.cli import option, run
from engine.distributed import DEVICES, autocast, start_processes
from engine.ends import Stop
from mvmae.data import FORMATS, FileSource, MultiViewDataset, StepSampler, make_loader, open_images
from mvmae.weights import write_json
from tasks.backbones import create_encoder
from tasks.card import Bench, measure_card, measure_feeding
from tasks.peers import ViTMAE, plain_loss
from tasks.splits import named_images
from tasks.timing import (
    Products,
    clock,
    count_flops,
    measure_contrast,
    measure_large_contrast,
    peak_memory_mb,
    show,
    time_attention,
)

PARTS = ("loader", "workers", "model", "card", "feeding", "attention", "contrast", "memory")
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}
"""Dense bf16 operations a second, from the vendor's data sheets, for the share of them that a step uses (MFU)."""


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = option(
        ("loader", "workers", "model", "contrast"),
        "measurements; loader: loading in one process; workers: in worker processes; model: training steps; card: training "
        "steps of several sizes; feeding: loading against training; attention: fused or by matrix products; contrast: time "
        "of NT-Xent; memory: memory of NT-Xent",
        PARTS,
        section="Measurements",
    )
    data: str = option(
        "sample",
        "folder of photographs to load, or a text file with their paths; sample: photographs of scikit-image",
        path=True,
        section="Data",
    )
    output_dir: str = option("runs/benchmark", "folder for benchmark.json", path=True, section="Run")
    encoder: str = option("mvmae_vit_base_patch16", "timm name of the encoder, a plain ViT", path=True, section="Model")
    image_size: int = option(224, "side of a view in pixels", at_least=1, section="Data")
    batch_size: int = option(8, "number of images per training step", at_least=1, section="Measurements")
    encoders: tuple[str, ...] = option(
        ("mvmae_vit_small_patch16", "mvmae_vit_base_patch16", "mvmae_vit_large_patch16"),
        "timm names of the encoders of the parts card and feeding",
    )
    batch_sizes: tuple[int, ...] = option(
        (64, 128, 256), "numbers of images per training step of the part card; feeding takes the first", at_least=2
    )
    ways: tuple[str, ...] = option(
        ("eager", "compiled"), "ways to train in the part card; feeding takes the first", ["eager", "compiled"]
    )
    profile: bool = option(False, "profile each setting of the part card: its largest kernels, and a Chrome trace in a file")
    rounds: int = option(5, "number of rounds in which everything is timed in turn; the median counts", at_least=1)
    threads: int = option(1, "number of threads of torch on the CPU", at_least=1)
    workers: int = option(2, "number of processes that load images", at_least=0)
    device: str = option(
        "auto", "device to run on; auto: CUDA if available, else CPU; mps: the GPU of a Mac", DEVICES, section="Run"
    )
    precision: str = option(
        "float32", "precision of the training step; bf16: under autocast", ["float32", "bf16"], section="Measurements"
    )
    against: str = option(
        "none",
        "implementation to time as well; vitmae: ViTMAE of transformers, of the same size, on the same images",
        ["none", "vitmae"],
    )


def photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEGs (quality 90) of one size from the photographs of scikit-image."""
    import skimage

    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
    paths = [folder / f"{size[0]}x{size[1]}-{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        with Image.open(Path(skimage.__file__).parent / "data" / names[i % len(names)], formats=FORMATS) as image:
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(path, quality=90)
    return paths


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


def image_sets(config: Config, folder: Path) -> dict[str, list[Path]]:
    """Find the photographs to load: those of the user, or small and large ones."""
    if config.data == "sample":
        return {"500x375": photographs(folder, (500, 375), 24), "3000x2000": photographs(folder, (3000, 2000), 3)}
    source = named_images(config.data)
    if not isinstance(source, FileSource):
        raise Stop(f"--data must be a folder or a list of photographs, or sample, got {config.data}")
    return {config.data: [Path(source.name(i)).absolute() for i in range(min(len(source), 200))]}


def load_all(load: Callable[[Path], object], paths: Sequence[Path]) -> None:
    """Load the images one after the other."""
    for path in paths:
        load(path)


def measure_loader(config: Config, folder: Path) -> dict[str, Any]:
    """Time one process on two views of every photograph, each way of loading in turn."""
    results = {}
    for name, paths in image_sets(config, folder).items():
        naive = Naive(paths, config.image_size)
        ways = {
            f"one decode, {decoder}": mvmae.MultiViewTransform(config.image_size, decoder=decoder)
            for decoder in ("fast", "pillow")
        }
        timed: dict[str, Callable[[], object]] = {"two decodes, torchvision": partial(load_all, naive.load, paths)}
        timed |= {way: partial(load_all, transform, paths) for way, transform in ways.items()}
        timed["decode alone, pillow"] = partial(load_all, lambda path: Image.open(path, formats=FORMATS).convert("RGB"), paths)
        results[name] = clock(timed, config.rounds, torch.device("cpu"), len(paths))
        show(f"loading {len(paths)} photographs of {name}, images/s in one process", results[name])
    return results


def measure_workers(config: Config, folder: Path) -> dict[str, Any]:
    """Time loading processes, ours and the naive way's, through torch's DataLoader."""
    paths = next(iter(image_sets(config, folder).values()))
    paths = paths * max(3000 // len(paths), 1)  # so many that starting the processes does not count
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    source = open_images(str(folder / "list.txt"))
    batch = min(32, len(paths))
    dataset = MultiViewDataset(source, mvmae.MultiViewTransform(config.image_size))

    def ours() -> None:
        sampler = StepSampler(len(source), batch, num_steps=len(source) // batch)
        for _ in make_loader(dataset, sampler, num_workers=config.workers):
            pass

    def naive() -> None:
        for _ in DataLoader(Naive(paths, config.image_size), batch, num_workers=config.workers):
            pass

    results = clock({"two decodes, torchvision": naive, "ours": ours}, config.rounds, torch.device("cpu"), len(paths))
    show(f"loading with {config.workers} workers, images/s", results)
    return results


def measure_model(config: Config, device: torch.device) -> dict[str, Any]:
    """Time training steps against their matrix products alone, and against the plain way to write them."""
    torch.manual_seed(0)
    model = mvmae.MultiViewMAE(create_encoder(config.encoder, img_size=config.image_size)).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    views = torch.randn(config.batch_size, 2, 3, config.image_size, config.image_size, device=device)
    mask = mvmae.random_mask(2 * config.batch_size, model.encoder.patch_embed.num_patches, 0.8, device=device)

    def step(loss_of: Callable[[], Tensor]) -> None:
        with autocast(config.precision, device):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours() -> None:
        step(lambda: model(views, mask=mask).loss)

    torch.testing.assert_close(plain_loss(model, views, mask), model(views, mask=mask).loss, rtol=1e-3, atol=1e-3)
    few = views[:2]  # the same for an image in any batch, but for the few operations of the contrastive loss
    flops = count_flops(lambda: model(few, mask=mask.select(slice(2 * len(few)))).loss.backward()) / len(few)
    optimizer.zero_grad(set_to_none=True)
    with Products() as products:
        ours()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ways: dict[str, Callable[[], object]] = {"matrix products alone": products.alone(device), "step": ours}
    ways["plain step"] = lambda: step(lambda: plain_loss(model, views, mask))
    if config.against != "none":
        peer = ViTMAE(model.encoder).to(device)
        ways["transformers' ViTMAE, views alone"] = lambda: step(lambda: peer(views))
    timed = clock(ways, config.rounds, device, config.batch_size)
    results: dict[str, Any] = {"timed": timed, "flops_per_image": flops, "share_of_floor": timed["step"]["times_the_first"]}
    results["plain_over_ours"] = timed["step"]["times_the_first"] / timed["plain step"]["times_the_first"]
    results["peak_memory_mb"] = peak_memory_mb(device)
    if device.type == "cuda" and config.precision == "bf16":
        peak = next((peak for name, peak in PEAK_BF16.items() if name in torch.cuda.get_device_name(device)), None)
        results["mfu"] = peak and flops * timed["step"]["per_second"] / peak
    show(f"training step of {config.encoder}, {config.batch_size} images, images/s", timed)
    print(f"share of the floor {results['share_of_floor']:.3f}; the plain way takes {results['plain_over_ours']:.3f} x as long")
    print(f"{flops / 1e9:.1f} GFLOP an image; peak memory {results['peak_memory_mb']:.0f} MB")
    return results


def measure_attention(config: Config, device: torch.device) -> dict[str, Any]:
    """Time fused attention against two matrix products, forward and backward, for short and long sequences."""
    results, dtype = {}, torch.bfloat16 if config.precision == "bf16" else torch.float32
    for tokens in (17, 41, 65, 129, 197, 401):
        results[str(tokens)] = time_attention(tokens, config.rounds, device, dtype)
        show(f"attention over {tokens} tokens in {config.precision}, images/s", results[str(tokens)])
    return results


def bench(config: Config, device: torch.device, folder: Path) -> Bench:
    """Return what the parts card and feeding share; their images are so many that the largest batch is filled."""
    paths = next(iter(image_sets(config, folder).values()))
    paths = paths * -(-max(config.batch_sizes) // len(paths))
    (folder / "fed.txt").write_text("".join(f"{path}\n" for path in paths))
    source = open_images(str(folder / "fed.txt"))
    return Bench(source, config.image_size, config.precision, device, config.rounds, config.workers)


def measure_device(config: Config, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure how much of the device training steps use."""
    ways = config.ways + (("vitmae",) if config.against == "vitmae" else ())
    traces = Path(config.output_dir) if config.profile else None
    return measure_card(bench(config, device, folder), config.encoders, ways, config.batch_sizes, traces)


def main(config: Config) -> None:
    """Make the requested measurements."""
    torch.set_num_threads(config.threads)
    device = start_processes(config.device).device
    results: dict[str, Any] = {"config": dataclasses.asdict(config), "torch": torch.__version__, "device": str(device)}
    path = Path(config.output_dir) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config.data != "sample" and {"loader", "workers", "card", "feeding"} & set(config.parts):
            image_sets(config, folder)  # a wrong --data ends the script before anything is measured
        measures: dict[str, Callable[[], Any]] = {
            "memory": lambda: measure_large_contrast(device),  # first: the peak of a process never falls
            "loader": lambda: measure_loader(config, folder),
            "workers": lambda: measure_workers(config, folder),
            "model": lambda: measure_model(config, device),
            "card": lambda: measure_device(config, device, folder),
            "feeding": lambda: measure_feeding(
                bench(config, device, folder), config.encoders, config.ways[0], config.batch_sizes[0]
            ),
            "attention": lambda: measure_attention(config, device),
            "contrast": lambda: measure_contrast(config.rounds, device),
        }
        for part, measure in measures.items():
            if part in config.parts:
                results[part] = measure()
    write_json(path, results)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
