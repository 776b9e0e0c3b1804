"""The images of all scripts that learn from an image as a whole: batches, timm's transforms, accuracy.

Shapes: B images of a batch, N of a set, C channels, H W pixels.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from torch import Tensor, nn

from engine.cli import option
from engine.config import REQUIRED, RunConfig
from engine.distributed import Processes, to_device
from mvmae.data import (
    ImageLike,
    ImageSource,
    Loader,
    MultiViewDataset,
    StepSampler,
    colour,
    make_loader,
    to_pil,
)
from mvmae.metrics import as_double

Config = TypeVar("Config", bound=Any)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledConfig(RunConfig):
    """Options of the scripts that measure a model on labelled images."""

    data: str = option(
        REQUIRED,
        "labelled images: class folders, IDX or Parquet files, a timm data set, or sample: scikit-image's photographs",
        path=True,
        may_change=True,
        section="Data",
    )
    arch: str = option(
        "", "timm name of the model, if a file of weights has no config.json beside it", empty="none", section="Model"
    )
    image_size: int = option(0, "side of an image in pixels; 0: the model's own (paper: 224)", at_least=0, section="Data")
    train_images: int = option(0, "maximum number of training images; 0: all", at_least=0)
    val_images: int = option(0, "maximum number of validation images; 0: all", at_least=0)
    max_bad: int = option(
        100, "number of different unreadable images to tolerate; one more stops the run", at_least=0, may_change=True
    )


def clamp_batch(config: Config, images: int, multiple: int = 1) -> tuple[Config, str]:
    """Return options whose batch is no larger than the images, and words that say so where it was; the learning rate follows.

    Args:
        config: options with ``batch_size``, by which the script scales the learning rate.
        images: how many there are.
        multiple: what the batch must be a multiple of.
    """
    typed, most = config.batch_size, images // multiple * multiple
    if typed <= most or not most:
        return config, ""
    words = f"; --batch-size {typed} is more than all {images}: {most} take its place, and the learning rate goes with it"
    return dataclasses.replace(config, batch_size=most), words


class Seeded:
    """A transform of timm for one image, drawn from one generator: (C, H, W) float32, normalised."""

    def __init__(self, model: nn.Module, image_size: int, *, background: str = "", **options: Any) -> None:
        cfg = timm.data.resolve_model_data_config(model)
        self.channels, self.background = cfg["input_size"][0], colour(background or "white")
        self.size = image_size or cfg["input_size"][1]
        self.shape = (4, self.channels, self.size, self.size)  # bytes
        options = {"interpolation": "bicubic", "crop_pct": 224 / 256, "mean": cfg["mean"], "std": cfg["std"], **options}
        self.transform = timm.data.create_transform((self.channels, self.size, self.size), **options)
        for step in self.transform.transforms:
            for op in getattr(step, "ops", []):
                if op.aug_fn is posterize:  # asks for 0 bits at times, which Pillow 13 refuses
                    op.aug_fn = posterize_to_a_bit

    def __call__(self, image: ImageLike, *, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**32, (), generator=generator))
        random.seed(seed)  # timm draws from all three
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # of the processor alone: torch.manual_seed is slow
        transformed: Tensor = self.transform(to_pil(image, self.channels, self.background))
        return transformed


def posterize_to_a_bit(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterize as timm does, to one bit at least."""
    result: Image.Image = posterize(image, max(bits, 1), **options)
    return result


class InOrder(StepSampler):
    """Every image once, in order: each process takes one in ``world_size``, ``share`` at a time."""

    def __init__(self, length: int, share: int, processes: Processes) -> None:
        self.length, self.share, self.seed = length, share, 0
        self.rank, self.world_size, self.batch_size = processes.rank, processes.world_size, share * processes.world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = [(0, index) for index in range(self.rank, self.length, self.world_size)]
        yield from (keys[i : i + self.share] for i in range(0, len(keys), self.share))

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.length, self.world_size)) // self.share)


def training_loader(
    source: ImageSource,
    transform: Callable[..., Tensor],
    sampler: StepSampler,
    *,
    workers: int,
    max_bad: int,
    bad_file: Path | None = None,
) -> Loader:
    """Load the training images of each step."""
    dataset = MultiViewDataset(source, transform, seed=sampler.seed, max_bad=max_bad)
    return make_loader(dataset, sampler, num_workers=workers, pin_memory=torch.cuda.is_available(), bad_file=bad_file)


def each_once(
    source: ImageSource, transform: Callable[..., Tensor], processes: Processes, *, batch_size: int, **loading: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of the images, (B, C, H, W), and their positions, (B,), without unreadable images.

    Args:
        source: the images.
        transform: (image, generator=) -> (C, H, W).
        processes: this one and the others.
        batch_size: images at a time over all processes.
        **loading: as in `training_loader`.
    """
    sampler = InOrder(len(source), max(batch_size // processes.world_size, 1), processes)
    for keys, batch in zip(sampler, training_loader(source, transform, sampler, **loading), strict=True):
        read = batch.indices == torch.tensor([index for _, index in keys])
        yield to_device(batch.views[read], processes.device), batch.indices[read].to(processes.device)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return four float64 sums: top-1 hits, top-5 hits, loss, and number of images."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return as_double(torch.stack([right[:, 0].sum(), right.any(dim=1).sum(), loss, labels.new_full((), len(labels))]))


def accuracy(counts: Tensor) -> dict[str, float]:
    """Compute percentages from the results of `count_right`, summed over batches and processes."""
    top1, top5, loss, total = counts.tolist()
    return {"top1": 100 * top1 / total, "top5": 100 * top5 / total, "val_loss": loss / total}
