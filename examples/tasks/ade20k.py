"""Images with a label for every pixel: ADE20K's layout from the disk, BEiT's augmentations, and intersection over union.

Shapes: H x W pixels.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mvmae.data import FORMATS, sample_seed
from tasks.dense import read_image

IGNORE = 255
"""Label of a pixel that is left out of loss and evaluation."""
NAMES = {"train": ("training", "train"), "val": ("validation", "val")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class LabelMaps(Dataset[tuple[Tensor, Tensor]]):
    """Images with a label for every pixel, in ADE20K's layout: ``images/training/*``, ``annotations/training/*.png``.

    Args:
        root: the folder; the splits are ``training`` (or ``train``) and ``validation`` (or ``val``).
        split: ``train`` or ``val``.
        num_classes: number of classes; 0: counted in ``classes.txt``, else in the label maps of both splits.
        augment: (image, labels) -> (image, labels), for training, with numbers from torch's global generator.
        reduce_zero_label: label 0 is left out, and the others count from 0 (ADE20K).
        ignore: labels, as the label maps have them, that are left out too; the others count on without them.
        seed: seed of the augmentation, which depends on (seed, epoch, index) alone.
        background: colour behind transparent pixels.

    Attributes:
        classes: class of each label from 0 to 255, (256,) uint8; `IGNORE` where it is left out.
        names: of the classes, from ``classes.txt``, else their labels.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_classes: int = 0,
        augment: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]] | None = None,
        reduce_zero_label: bool = True,
        ignore: Sequence[int] = (),
        seed: int = 0,
        background: str = "white",
    ) -> None:
        name = next((name for name in NAMES[split] if (root / "images" / name).is_dir()), None)
        if name is None:
            raise FileNotFoundError(f"--data: {root} must hold images/{NAMES[split][0]}, as ADE20K's layout does")
        self.images = sorted(path for path in (root / "images" / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        self.labels = [root / "annotations" / path.relative_to(root / "images").with_suffix(".png") for path in self.images]
        if not self.images:
            raise FileNotFoundError(f"{root}/images/{name} must hold images ({' '.join(sorted(SUFFIXES))}), got none")
        if missing := [path for path in self.labels if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]} is missing")
        self.augment, self.seed, self.background = augment, seed, background

        left_out = {IGNORE, *ignore} | ({0} if reduce_zero_label else set())
        labels = [label for label in range(256) if label not in left_out]
        self.classes = torch.full((256,), IGNORE, dtype=torch.uint8)
        self.classes[labels] = torch.arange(len(labels), dtype=torch.uint8)
        file = root / "classes.txt"  # its lines name the labels from 0 on, or from 1 on (ADE20K)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.names = [line for label, line in enumerate(lines, start=int(reduce_zero_label)) if label not in ignore]
        if self.names and num_classes not in (0, len(self.names)):
            cure = f"got {num_classes}: leave --num-classes out, or edit the file"
            raise ValueError(f"the number of classes must be {len(self.names)}, as {file} names them, {cure}")
        if not self.names and not num_classes:
            with ThreadPoolExecutor() as pool:
                maps = pool.map(lambda path: read_labels(path, self.classes), sorted((root / "annotations").rglob("*.png")))
                num_classes = 1 + max(map(largest, maps))
            if num_classes < 2:  # what names all pixels alike would be perfect
                others = f"labels other than {', '.join(map(str, sorted(left_out)))}, got {num_classes}"
                cure = "number the classes from 0 or 1 on; --no-reduce-zero-label learns label 0 too"
                raise ValueError(f"{root}/annotations must hold two {others}: {cure}")
        self.names = self.names or list(map(str, labels[:num_classes]))

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.images[index])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return an image (3, H, W) uint8 and its labels (H, W) long."""
        epoch, index = key
        pixels, file = read_image(self.images[index], self.background), self.labels[index]
        labels = read_labels(file, self.classes)
        if (highest := largest(labels)) >= len(self.names):
            bound, label = (self.classes.tolist().index(number) for number in (len(self.names), highest))
            raise ValueError(f"{file} must hold labels below {bound} for {len(self.names)} classes, got {label}")
        if labels.shape != pixels.shape[1:]:
            sizes = [f"{width}x{height}" for height, width in (pixels.shape[1:], labels.shape)]
            raise ValueError(f"{file} must have {sizes[0]} pixels, as its image has, got {sizes[1]}")
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                pixels, labels = self.augment(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()


def read_labels(path: Path, classes: Tensor) -> Tensor:
    """Load a label map as the classes of its pixels, (H, W) uint8; ``classes`` are those of `LabelMaps`."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            labels, mode = np.array(file), file.mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a label map: {error}") from error
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"{path} must be an image of one 8-bit channel, got Pillow's mode {mode}: save the labels so")
    return torch.from_numpy(classes.numpy()[labels])


def largest(labels: Tensor) -> int:
    """Return the largest class in a label map, or -1 if all pixels are left out."""
    return int(labels.int().where(labels != IGNORE, -1).max())


class Augment:
    """The augmentation of BEiT's code: resize, crop, flip, distort the colours, fill up.

    torchvision's `RandomResize` and `RandomCrop` do not fit: the one has no limit for the longer side, the other does not look
    at the classes in a crop, and fills up on all four sides.

    Args:
        side: side of the crop in pixels (BEiT: 512).
        ratio: range of the factor on the size at which an image fits 4 sides x 1 side.
        max_share: a crop of which one class fills more is drawn again, up to ten times.
        fill: colour of what the crop lacks, at its right and at its bottom.
    """

    def __init__(
        self, side: int, *, ratio: tuple[float, float] = (0.5, 2.0), max_share: float = 0.75, fill: tuple[int, ...] = (0, 0, 0)
    ) -> None:
        self.side, self.ratio, self.max_share, self.fill = side, ratio, max_share, fill

    def __call__(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Tensor, Tensor]:
        """Return (3, side, side) and (side, side): an image and its labels, augmented alike."""
        ratio = torch.empty(()).uniform_(*self.ratio).item()
        height, width = fitting_size((image.shape[1], image.shape[2]), self.side, ratio)
        image, labels = v2.Resize((height, width))(image, labels)
        rows, columns = min(height, self.side), min(width, self.side)
        for _ in range(11):
            cut = (int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ())), rows, columns)
            counts = F.crop(labels, *cut).flatten().bincount(minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        image, labels = v2.RandomHorizontalFlip()(F.crop(image, *cut), F.crop(labels, *cut))
        fill = {tv_tensors.Image: self.fill, tv_tensors.Mask: IGNORE}
        image, labels = v2.Pad([0, 0, self.side - columns, self.side - rows], fill)(tv_tensors.Image(distort(image)), labels)
        return image, labels


def fitting_size(size: tuple[int, int], side: int, ratio: float = 1.0) -> tuple[int, int]:
    """Return the size at which an image fits 4 sides x 1 side (BEiT: 2048 x 512), times a factor."""
    factor = min(4 * side / max(size), side / min(size)) * ratio
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def distort(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of (3, H, W) uint8, each in one of two cases.

    The photometric distortion of mmsegmentation. torchvision's `RandomPhotometricDistort` is another: it scales the brightness,
    mixes with grey for contrast and saturation, and swaps channels.
    """
    drawn = torch.rand(4) * torch.tensor([64, 1, 1, 0.2]) - torch.tensor([32, -0.5, -0.5, 0.1])
    shift, contrast, saturation, hue = drawn.where(torch.rand(4) < 0.5, torch.tensor([0.0, 1, 1, 0])).tolist()
    early, late = (contrast, 1.0) if torch.rand(()) < 0.5 else (1.0, contrast)
    pixels = ((image + shift).clamp(0, 255) * early).clamp(0, 255)
    least, most = pixels.aminmax(dim=0)
    pixels = most - (most - pixels) * (most / (most - least).clamp(min=1e-3)).clamp(max=saturation)  # as far as colours go
    pixels = F.adjust_hue(pixels / 255, hue) * 255
    changed: Tensor = (pixels * late).round().clamp(0, 255).to(torch.uint8)
    return changed


def confusion(pred: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the number of pixels of each true class (row) that were given each class (column); add them up over a set."""
    seen = labels != IGNORE
    return torch.bincount(labels[seen] * num_classes + pred[seen], minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Compute mIoU, mAcc, aAcc and the numbers of each class in percent, from the counts of a whole set.

    A class that neither occurs nor was predicted has no numbers, and does not count in the means.
    """
    counts = counts.double()
    right, true = counts.diagonal(), counts.sum(1)
    iou, acc = 100 * right / (true + counts.sum(0) - right), 100 * right / true
    columns = ([None if math.isnan(value) else value for value in values.tolist()] for values in (iou, acc))
    table = {name: {"IoU": a, "Acc": b} for name, a, b in zip(names, *columns, strict=True)}
    means = {"mIoU": iou.nanmean(), "mAcc": acc.nanmean(), "aAcc": 100 * right.sum() / counts.sum()}
    return {name: float(value) for name, value in means.items()} | {"classes": table}
