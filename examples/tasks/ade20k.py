"""Images with a label for every pixel: ADE20K's layout from the disk, BEiT's augmentations, and intersection over union.

Shapes: H x W pixels.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mvmae.data import FORMATS, MAX_PIXELS, open_images, sample_seed
from mvmae.inputs import Inputs
from mvmae.weights import first_line
from tasks.dense import RGB, check_size, read_image

IGNORE = 255
"""Class of a pixel that is left out of loss and evaluation."""
NAMES = {"train": ("training", "train"), "val": ("validation", "val")}
SUFFIXES = (".png", ".PNG", ".tif", ".TIF", ".tiff", ".bmp", ".gif")  # of label maps: formats that change no pixel


class Split(NamedTuple):
    """The files of a split."""

    images: list[str]
    labels: list[str]  # their label maps
    counts: NDArray[np.int64]  # pixels of each label from 0 to 255
    problems: tuple[str, ...]  # what in the folder is no image, as in `ImageSource`


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split's images."""
    for name in NAMES[split]:
        if (root / "images" / name).is_dir():
            return root / "images" / name
    raise FileNotFoundError(f"--data: {root} must hold images/{NAMES[split][0]}, as ADE20K's layout does")


def read_split(root: Path, split: str, max_pixels: int | None = None) -> Split:
    """Find a split in ADE20K's layout, ``images/training/*`` and ``annotations/training/*.png``, and check all its label maps.

    Raises:
        ValueError: if an image has no label map, or one that cannot be read or is of another size.
    """
    source = open_images(split_folder(root, split))
    images = list(map(source.name, range(len(source))))
    stems = [root / "annotations" / Path(path).relative_to(root / "images").with_suffix("") for path in images]
    labels = [next(filter(os.path.isfile, (f"{stem}{suffix}" for suffix in SUFFIXES)), "") for stem in stems]
    if "" in labels:
        missing = stems[labels.index("")]
        raise FileNotFoundError(f"{missing}.png is missing, or no file ({' '.join(SUFFIXES)} are read)")

    def count(image: str, path: str) -> NDArray[np.int64]:
        labels = read_labels(path, max_pixels)
        check_size(image, labels.shape, source=path, max_pixels=max_pixels)
        return np.bincount(labels.reshape(-1), minlength=256)

    with ThreadPoolExecutor() as pool:
        return Split(images, labels, np.sum(list(pool.map(count, images, labels)), axis=0), source.problems)


def read_labels(path: str, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Read a label map, (H, W): of a palette the numbers and not the colours; channels that agree count as one."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > (max_pixels or MAX_PIXELS):
                raise ValueError(f"{file.width} x {file.height} pixels, more than --max-pixels")
            mode, labels = file.mode, np.array(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow raises anything on a damaged file
        raise ValueError(f"{path} cannot be read as a label map ({first_line(error)})") from error
    if mode.endswith("A") and labels[..., -1].min() == 255:
        labels = labels[..., :-1]
    if labels.ndim == 3 and (labels == labels[..., :1]).all():
        labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "bui" or labels.min() < 0 or labels.max() > 255:
        got = f"Pillow's mode {mode} with values up to {labels.max()}"
        raise ValueError(f"{path} must hold one number of 0 to 255 for each pixel, got {got}: save the labels so")
    return labels.astype(np.uint8)


def find_classes(root: Path, splits: Mapping[str, Split], left_out: Mapping[int, str]) -> tuple[list[str], Tensor]:
    """Return the names of the classes, and the class of each label from 0 to 255 as uint8, `IGNORE` for what is left out.

    The lines of ``root/classes.txt`` name the labels from 0 on, or from 1 on where 0 is left out; without it, those that occur
    in training are the classes. ``left_out`` has labels that are neither learnt nor counted, and the options that change that.

    Raises:
        ValueError: if a split has pixels of labels that are no class, or of fewer than two classes.
    """
    file = root / "classes.txt"
    if file.is_file():
        lines, known = file.read_text("utf-8-sig", "replace").strip().splitlines(), f"named in {file}"
        names = {label: line for label, line in enumerate(lines, start=int(0 in left_out)) if label not in left_out}
    else:
        known = "that occur in training"
        names = {int(label): str(label) for label in splits["train"].counts.nonzero()[0] if label not in left_out}
    if len({*names.values()}) < len(names) or len(names) > IGNORE or max(names, default=0) > 255:
        raise ValueError(f"{file} must name each class once, and at most {IGNORE} classes")
    for split in splits.values():
        folder, shares = os.path.commonpath(split.labels), split.counts / split.counts.sum()
        occurring = split.counts.nonzero()[0].tolist()
        if unknown := [label for label in occurring if label not in names and label not in left_out]:
            cure = f"--ignore-label {' '.join(map(str, unknown))} leaves their pixels out"
            raise ValueError(f"{folder} must hold labels {known} alone, got {', '.join(map(str, unknown))} too: {cure}")
        if len(learnt := [label for label in occurring if label in names]) < 2:  # what names all pixels alike would be perfect
            left = [f"{n} ({shares[n]:.1%} of the pixels; {left_out[n]})" for n in occurring if n in left_out]
            got = f"got {len(learnt)}; left out are labels {', '.join(left) or 'none'}"
            raise ValueError(f"{folder} must hold pixels of 2 classes or more, {got}")
    table = torch.full((256,), IGNORE, dtype=torch.uint8)
    table[list(names)] = torch.arange(len(names), dtype=torch.uint8)
    return [*names.values()], table


class LabelMaps(Dataset[tuple[Tensor, Tensor]]):
    """Images with a class for every pixel.

    Args:
        split: the files.
        classes: ``names`` of the classes and the class of each label, from `find_classes`.
        transform: (image, classes) -> (image, classes), for training, with numbers from torch's global generator.
        seed: seed of the transform, which depends on (seed, epoch, index) alone.
        inputs: how images are read.

    Attributes:
        counts: pixels of each class.
        note: how many images there are, and what is left out.
    """

    def __init__(
        self,
        split: Split,
        classes: tuple[list[str], Tensor],
        *,
        transform: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        inputs: Inputs = RGB,
    ) -> None:
        self.split, (self.names, self.table) = split, classes
        self.transform, self.seed, self.inputs = transform, seed, inputs
        classed = self.table != IGNORE
        self.counts = torch.from_numpy(split.counts)[classed].tolist()
        share = 1 - sum(self.counts) / split.counts.sum()
        kinds = Counter(os.path.splitext(path)[1].lower() for path in split.images)
        files = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        self.note = "; ".join([f"{len(self)} images ({files}), {share:.1%} of their pixels left out", *split.problems])

    def __len__(self) -> int:
        return len(self.split.images)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self.split.images[index]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return an image (C, H, W) uint8 and its classes (H, W) long."""
        epoch, index = key
        labels = torch.from_numpy(self.table.numpy()[read_labels(self.split.labels[index], self.inputs.max_pixels)])
        pixels = read_image(self.name(index), self.inputs)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                pixels, labels = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()


def augment(
    image: tv_tensors.Image,
    labels: tv_tensors.Mask,
    *,
    side: int,
    ratio: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
    fill: tuple[int, ...] = (0, 0, 0),
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip, distort the colours, fill up, as BEiT's code does: to (3, side, side) and (side, side).

    torchvision's `RandomResize` and `RandomCrop` do not fit: the one has no limit for the longer side, the other does not look
    at the classes in a crop, and fills up on all four sides.

    Args:
        image: (3, H, W).
        labels: (H, W).
        side: side of the crop in pixels (BEiT: 512).
        ratio: range of the factor on the size at which an image fits 4 sides x 1 side.
        max_share: a crop of which one class fills more is drawn again, up to ten times.
        fill: colour of what the crop lacks, at its right and at its bottom.
    """
    size = fitting_size((image.shape[1], image.shape[2]), side, torch.empty(()).uniform_(*ratio).item())
    image, labels = v2.Resize(size)(image, labels)
    rows, columns = (min(length, side) for length in size)
    for _ in range(11):
        cut = (int(torch.randint(size[0] - rows + 1, ())), int(torch.randint(size[1] - columns + 1, ())), rows, columns)
        counts = F.crop(labels, *cut).flatten().bincount(minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < max_share * counts.sum():
            break
    image, labels = v2.RandomHorizontalFlip()(F.crop(image, *cut), F.crop(labels, *cut))
    fills = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORE}
    image, labels = v2.Pad([0, 0, side - columns, side - rows], fills)(tv_tensors.Image(distort(image)), labels)
    return image, labels


def fitting_size(size: tuple[int, int], side: int, ratio: float = 1.0) -> tuple[int, int]:
    """Return the size at which an image fits 4 sides x 1 side (BEiT: 2048 x 512), times a factor."""
    factor = min(4 * side / max(size), side / min(size)) * ratio
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def distort(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of (C, H, W) uint8, each in one of two cases; colours of three channels.

    The photometric distortion of mmsegmentation. torchvision's `RandomPhotometricDistort` is another.
    """
    drawn = torch.rand(4) * torch.tensor([64, 1, 1, 0.2]) - torch.tensor([32, -0.5, -0.5, 0.1])
    shift, contrast, saturation, hue = drawn.where(torch.rand(4) < 0.5, torch.tensor([0.0, 1, 1, 0])).tolist()
    early, late = (contrast, 1.0) if torch.rand(()) < 0.5 else (1.0, contrast)
    pixels = ((image + shift).clamp(0, 255) * early).clamp(0, 255)
    least, most = pixels.aminmax(dim=0)
    if len(image) == 3:
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
