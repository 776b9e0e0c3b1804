"""What fine-tuning and the linear probe share: their options, the training images, accuracy.

Shapes: B images of a batch, N of a set, C channels, H W pixels.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from engine.options import REQUIRED, RunConfig, option
from engine.signals import Stop
from mvmae import MultiViewTransform
from mvmae.data import (
    ImageLike,
    ImageSource,
    Loader,
    MultiViewDataset,
    StepSampler,
    normalize,
    pixel_options,
    to_pil,
)
from mvmae.inputs import inputs_of
from mvmae.metrics import as_double
from tasks.inputs import InputOptions
from tasks.splits import KINDS

Config = TypeVar("Config", bound=Any)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledConfig(InputOptions, RunConfig):
    """Options of the scripts that measure a model on labelled images."""

    data: str = option(
        REQUIRED,
        f"labelled images: class folders, {KINDS}",
        path=True,
        may_change=True,
        section="Data",
    )
    image_size: tuple[int, ...] = option(
        (),
        "side in pixels, or height and width; the model's own if not given (paper: 224)",
        at_least=1,
        lengths=(1, 2),
    )
    train_images: int = option(0, "maximum number of training images; 0: all", at_least=0)
    val_images: int = option(0, "maximum number of validation images; 0: all", at_least=0)
    max_bad: int = option(
        100, "number of different unreadable images to tolerate; one more stops the run", at_least=0, may_change=True
    )
    arch: str = option("", "timm name of the model, if a file of weights has no config.json beside it", section="Model")


def clamp_batch(config: Config, images: int, multiple: int = 1) -> tuple[Config, str]:
    """Return options whose batch, a multiple of ``multiple``, is no larger than the images, and a note where it was.

    The script scales the learning rate by ``config.batch_size``.
    """
    typed, most = config.batch_size, images // multiple * multiple
    if typed <= most or not most:
        return config, ""
    words = f"; --batch-size {typed} is more than all {images}: {most} take its place, and the learning rate goes with it"
    return dataclasses.replace(config, batch_size=most), words


class TrainTransform:
    """timm's augmentation of an image, random crops and more, drawn from one generator: (C, H, W) float32, normalised.

    Images of other channels than 1 and 3, which Pillow cannot change, have random crops, flips and erasing.
    """

    def __init__(self, model: nn.Module, **augmentation: Any) -> None:
        inputs = inputs_of(model)
        options, channels = pixel_options(inputs), len(inputs.mean)
        self.of_arrays = channels not in (1, 3)
        if self.of_arrays:
            if augmentation.get("auto_augment"):
                raise Stop(f"--augment changes images of 1 or 3 channels, and the model takes {channels}: use --augment none")
            scale, probability = augmentation.get("scale", (0.08, 1.0)), augmentation.get("re_prob", 0.0)
            self.crop = MultiViewTransform(inputs.size, num_views=1, scale=scale, **options)
            self.normalize = partial(normalize, mean=inputs.mean, std=inputs.std)
            self.erase = RandomErasing(probability, mode="pixel", device="cpu")
            return
        self.read: Callable[[ImageLike], Image.Image] = partial(to_pil, **options)
        changes = {"interpolation": "bicubic", "mean": inputs.mean, "std": inputs.std, "color_jitter": None, **augmentation}
        self.transform = timm.data.create_transform((channels, *inputs.size), is_training=True, **changes)
        for step in self.transform.transforms:
            for op in getattr(step, "ops", []):
                if op.aug_fn is posterize:  # asks for 0 bits at times, which Pillow 13 refuses
                    op.aug_fn = posterize_to_a_bit

    def __call__(self, image: ImageLike, *, generator: torch.Generator) -> Tensor:
        """Augment an image: what is drawn depends on the generator alone."""
        seed = int(torch.randint(2**32, (), generator=generator))
        random.seed(seed)  # timm draws from all three
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # of the processor alone: torch.manual_seed is slow
        if self.of_arrays:
            changed: Tensor = self.erase(self.normalize(self.crop(image, generator=generator)[0]))
        else:
            changed = self.transform(self.read(image))
        return changed


def posterize_to_a_bit(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterize as timm does, to one bit at least."""
    result: Image.Image = posterize(image, max(bits, 1), **options)
    return result


def training_loader(
    source: ImageSource, transform: TrainTransform, sampler: StepSampler, *, workers: int, max_bad: int, folder: Path
) -> Loader:
    """Load the training images of each step; ``bad_files.txt`` in the run's folder lists those that cannot be read."""
    dataset = MultiViewDataset(source, transform, seed=sampler.seed, max_bad=max_bad)
    pin, bad_file = torch.cuda.is_available(), folder / "bad_files.txt" if sampler.rank == 0 else None
    return Loader(dataset, sampler, num_workers=workers, pin_memory=pin, bad_file=bad_file)


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy in percent, and the mean cross-entropy, of logits (N, classes) and labels (N,)."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    shares = 100 * as_double(torch.stack([right[:, 0], right.any(dim=1)])).mean(dim=1)
    loss = as_double(nn.functional.cross_entropy(logits.float(), labels, reduction="none")).mean()
    return {"top1": shares[0].item(), "top5": shares[1].item(), "val_loss": loss.item()}


def rounded(results: Mapping[str, float]) -> dict[str, float]:
    """Return results as they are written: a loss with four decimals, percent and the rest with two."""
    return {name: round(value, 4 if "loss" in name else 2) for name, value in results.items()}
