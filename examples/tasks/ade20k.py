"""Images with a label for every pixel: ADE20K's layout from the disk, BEiT's augmentations, and intersection over union.

Shapes: H x W pixels.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from mvmae.data import FORMATS, colour, open_image, sample_seed

IGNORE = 255
"""Label of a pixel that is left out of loss and evaluation."""
NAMES = {"train": ("training", "train"), "val": ("validation", "val")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class LabelMaps(Dataset[tuple[Tensor, Tensor]]):
    """Images with a label for every pixel, in ADE20K's layout: ``images/training/*``, ``annotations/training/*.png``.

    Args:
        root: the folder; the splits are ``training`` (or ``train``) and ``validation`` (or ``val``).
        split: ``train`` or ``val``.
        num_classes: labels from here on, other than 255, are an error.
        augment: (image, labels, random) -> (image, labels), for training.
        reduce_zero_label: label 0 is left out, and the others count from 0 (ADE20K).
        seed: of the augmentation; it depends on (seed, epoch, index) alone.
        background: colour behind transparent pixels.

    Raises:
        FileNotFoundError: if the folders are not there, or an image has no label map.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_classes: int,
        augment: Callable[[Image.Image, Image.Image, np.random.Generator], tuple[Image.Image, Image.Image]] | None = None,
        reduce_zero_label: bool = True,
        seed: int = 0,
        background: str = "white",
    ) -> None:
        name = next((name for name in NAMES[split] if (root / "images" / name).is_dir()), None)
        if name is None:
            raise FileNotFoundError(f"{root} holds no images/{NAMES[split][0]}: ADE20K's layout is expected")
        self.images = sorted(path for path in (root / "images" / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        self.labels = [root / "annotations" / path.relative_to(root / "images").with_suffix(".png") for path in self.images]
        missing = [path for path in self.labels if not path.exists()]
        if missing or not self.images:
            raise FileNotFoundError(f"{missing[0]} is missing" if missing else f"{root}/images/{name} holds no images")
        self.augment, self.reduce_zero_label, self.seed = augment, reduce_zero_label, seed
        self.num_classes, self.background = num_classes, colour(background)
        names = root / "classes.txt"
        self.names = names.read_text().split("\n") if names.exists() else [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Give the path of an image."""
        return str(self.images[index])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Give image (3, H, W) uint8 and labels (H, W) long."""
        epoch, index = key
        image = Image.fromarray(open_image(self.images[index]).decode(decoder="pillow", background=self.background))
        with Image.open(self.labels[index], formats=FORMATS) as file:
            labels = reduce_zero(file) if self.reduce_zero_label else file.copy()
        values = np.asarray(labels)
        largest = int(values[values != IGNORE].max(initial=0))
        if values.dtype != np.uint8 or values.ndim != 2 or largest >= self.num_classes:
            raise ValueError(
                f"{self.labels[index]} (mode {labels.mode}) has labels up to {largest}: one 8-bit channel is expected, and "
                f"labels below {self.num_classes}, or --num-classes {largest + 1}"
            )
        if labels.size != image.size:
            raise ValueError(f"{self.labels[index]} has {labels.size} pixels, its image {image.size}")
        if self.augment is not None:
            rng = np.random.default_rng(sample_seed(self.seed, epoch, index))
            image, labels = self.augment(image, labels, rng)
        return pil_to_tensor(image), pil_to_tensor(labels)[0].long()


def reduce_zero(labels: Image.Image) -> Image.Image:
    """Turn label 0 into `IGNORE` and let the others count from 0."""
    values = np.array(labels)
    return Image.fromarray(np.where((values == 0) | (values == IGNORE), IGNORE, values - 1).astype(np.uint8))


class Augment:
    """The augmentation of BEiT's code: resize, crop, flip, distort the colours, fill up.

    Args:
        side: of the crop, in pixels (BEiT: 512).
        ratio: range of the factor on the size at which an image fits 4 sides x 1 side.
        max_share: a crop of which one class fills more is drawn again, up to ten times.
        fill: colour of what the crop lacks.
    """

    def __init__(
        self, side: int, *, ratio: tuple[float, float] = (0.5, 2.0), max_share: float = 0.75, fill: tuple[int, ...] = (0, 0, 0)
    ) -> None:
        self.side, self.ratio, self.max_share, self.fill = side, ratio, max_share, fill

    def __call__(self, image: Image.Image, labels: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """Augment an image and its labels alike."""
        size = fitting_size(image.size, self.side, rng.uniform(*self.ratio))
        image = image.resize(size, Image.Resampling.BILINEAR)
        labels = labels.resize(size, Image.Resampling.NEAREST)
        box = self._crop(labels, rng)
        image, labels = image.crop(box), labels.crop(box)
        if rng.random() < 0.5:
            image, labels = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (image, labels))
        whole, whole_labels = (
            Image.new("RGB", (self.side, self.side), self.fill),
            Image.new("L", (self.side, self.side), IGNORE),
        )
        whole.paste(distort(image, rng))
        whole_labels.paste(labels)
        return whole, whole_labels

    def _crop(self, labels: Image.Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
        width, height = min(labels.size[0], self.side), min(labels.size[1], self.side)
        for _ in range(10):
            left, top = int(rng.integers(labels.size[0] - width + 1)), int(rng.integers(labels.size[1] - height + 1))
            box = (left, top, left + width, top + height)
            counts = [count for count, label in labels.crop(box).getcolors(256) or [] if label != IGNORE]
            if len(counts) > 1 and max(counts) < self.max_share * sum(counts):
                break
        return box


def fitting_size(size: tuple[int, int], side: int, ratio: float = 1.0) -> tuple[int, int]:
    """Give the size at which an image fits 4 sides x 1 side (BEiT: 2048 x 512), times a factor."""
    factor = min(4 * side / max(size), side / min(size)) * ratio
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each in one of two cases (mmsegmentation's photometric distortion)."""
    pixels = np.asarray(image, np.float32)
    first = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if rng.random() < 0.5:
        pixels = pixels + rng.uniform(-32, 32)
    pixels = (pixels.clip(0, 255) * (contrast if first else 1.0)).clip(0, 255)
    colours = np.asarray(Image.fromarray(pixels.astype(np.uint8)).convert("HSV"), np.float32).copy()
    if rng.random() < 0.5:
        colours[..., 1] = (colours[..., 1] * rng.uniform(0.5, 1.5)).clip(0, 255)
    if rng.random() < 0.5:
        colours[..., 0] = (colours[..., 0] + 256 * rng.uniform(-0.1, 0.1)) % 256
    pixels = np.asarray(Image.fromarray(colours.astype(np.uint8), "HSV").convert("RGB"), np.float32)
    return Image.fromarray((pixels * (1.0 if first else contrast)).clip(0, 255).astype(np.uint8))


def confusion(pred: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true class (row) that were given each class (column); sum these over the whole set."""
    seen = labels != IGNORE
    return torch.bincount(labels[seen] * num_classes + pred[seen], minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Compute mIoU, mAcc, aAcc and the numbers of each class in percent, from the counts of a whole set.

    A class that neither occurs nor was predicted has no numbers, and does not count in the means.
    """
    counts = counts.double()
    right, true = counts.diagonal(), counts.sum(1)
    iou, acc = 100 * right / (true + counts.sum(0) - right), 100 * right / true
    table = {
        name: {"IoU": None if math.isnan(a) else a, "Acc": None if math.isnan(b) else b}
        for name, a, b in zip(names, iou.tolist(), acc.tolist(), strict=True)
    }
    means = {"mIoU": iou.nanmean(), "mAcc": acc.nanmean(), "aAcc": 100 * right.sum() / counts.sum()}
    return {name: float(value) for name, value in means.items()} | {"classes": table}
