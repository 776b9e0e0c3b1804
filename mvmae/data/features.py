"""The features of images by any model of timm: its own transform, its own pooled feature, a row for each image.

Shapes: N images, B of a batch, D width of a feature, C channels, H W pixels.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..encoders import create_model
from .decode import ImageError, ImageLike, colour, open_image
from .folders import ImageSource
from .loader import make_loader
from .open import open_images
from .pixels import WHITE, Colour
from .sampling import Bad, DataError, Key, MultiViewDataset, Sample, StepSampler, try_again

_logger = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """Features (N, D), float32 on the CPU, and the images' names; the row of an image that cannot be read is NaN."""

    features: Tensor
    names: list[str]


class Rows(NamedTuple):
    """The rows of a batch, their features (B, D), float32 on the CPU, and the reason for each row that cannot be read."""

    rows: Sequence[int]
    features: Tensor
    bad: dict[int, str]


class EvalTransform:
    """timm's transform for evaluation with a model, of an image of any kind: (C, H, W) float32, normalised.

    Args:
        model: of timm; its cfg holds mean, standard deviation, interpolation and the share of the image that is kept.
        image_size: side in pixels, or (H, W); 0: the size that the model was built for.
        background: colour behind transparent pixels.
    """

    def __init__(self, model: nn.Module, image_size: int | tuple[int, int] = 0, background: str = "white") -> None:
        cfg = timm.data.resolve_model_data_config(model)
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        self.channels, self.background = int(cfg["input_size"][0]), colour(background)
        size = (self.channels, *to_2tuple(image_size or built or cfg["input_size"][1:]))
        self.shape = (4, *size)  # bytes
        self._transform = timm.data.create_transform(**{**cfg, "input_size": size})

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the centre of an image; nothing is random."""
        transformed: Tensor = self._transform(to_pil(image, self.channels, self.background))
        return transformed


def to_pil(image: ImageLike, channels: int = 3, background: Colour = WHITE) -> Image.Image:
    """Decode an image, upright."""
    opened = open_image(image)
    pixels = opened.upright(opened.decode(channels=channels, background=background))
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def pooled_feature(model: Any, images: Tensor) -> Tensor:
    """Compute what timm pools for the classifier: (B, C, H, W) -> (B, D) float32.

    For the encoders of this package it is the mean patch token.

    Raises:
        TypeError: The model is not timm's.
        ValueError: It does not pool.
    """
    if not hasattr(model, "forward_head"):
        raise TypeError(f"the model must be one of timm, with forward_features and forward_head, got {type(model).__name__}")
    features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise ValueError(f"the model must pool its features to (B, D), got {shape}: build it with another global_pool")
    return features.float()


def embed_rows(
    model: nn.Module,
    source: ImageSource,
    batches: Sequence[Sequence[int]],
    transform: EvalTransform,
    *,
    num_workers: int = 0,
) -> Iterator[Rows]:
    """Yield the features of some of a source's images, a batch at a time.

    Args:
        model: Of timm, in evaluation mode, on the device that computes.
        source: The images.
        batches: Numbers of the images of each batch.
        transform: Of the images.
        num_workers: Loading processes; 0 loads in this process.

    Raises:
        DataError: As `make_loader` has it, but for images that cannot be read.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    cuda, sampler = device.type == "cuda", _Batches(batches)
    dataset = _EachImage(source, transform)
    loader = make_loader(dataset, sampler, num_workers=num_workers, pin_memory=cuda, collate=_collate)
    for images, rows, bad in loader:
        with torch.no_grad():
            features = pooled_feature(model, images.to(device, non_blocking=cuda)).cpu()
        reasons = {row: one.reason for row, ones in zip(rows, bad, strict=True) for one in ones}
        features[[row in reasons for row in rows]] = torch.nan
        yield Rows(rows, features, reasons)


def embed(
    model: nn.Module | str | os.PathLike[str],
    source: "str | os.PathLike[str] | Dataset[Any] | ImageSource",
    *,
    split: str = "train",
    image_size: int | tuple[int, int] = 0,
    background: str = "white",
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad: int = 100,
) -> Embedded:
    """Compute the features of all images of a source, in its order, in memory; ``examples/embed.py`` writes them to a disk.

    A feature is what timm's ``forward_head(forward_features(images), pre_logits=True)`` returns of the image as timm's own
    transform for evaluation prepares it: for the encoders of this package, the mean patch token. Images are upright by EXIF.

    Args:
        model: A model of timm, which computes where it is and as its autocast says; or a folder of an export, or a name
            that timm knows, loaded with its weights on a CUDA device if there is one.
        source: A folder, list, archive or data set, as `open_images` takes it.
        split: "train" or "val", where the source has splits.
        image_size: Side in pixels, or (H, W); 0: the size that the model was built for.
        background: Colour behind transparent pixels.
        batch_size: Images at a time.
        num_workers: Loading processes; 0 loads in this process.
        max_bad: Images that cannot be read, whose rows are NaN and which are logged, before an error.

    Raises:
        ValueError: No images, no such model, or sizes that do not fit.
        DataError: More images than `max_bad` cannot be read, or they cannot be loaded.
    """
    images = open_images(source, split=split)
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if not isinstance(model, nn.Module):
        name = f"local-dir:{os.fspath(model)}" if Path(model).is_dir() else os.fspath(model)
        built = create_model(name, pretrained=True, num_classes=0)
        model = built.to("cuda" if torch.cuda.is_available() else "cpu")
    modes = {module: module.training for module in model.modules()}
    transform, batches = EvalTransform(model, image_size, background), split_rows(range(len(images)), batch_size)
    features, bad = torch.empty(0), 0
    try:
        for part in embed_rows(model.eval(), images, batches, transform, num_workers=num_workers):
            features = features if len(features) else torch.empty(len(images), part.features.shape[1])
            features[list(part.rows)] = part.features
            for row, reason in part.bad.items():
                _logger.warning("bad image %r: %s; its row is NaN", images.name(row), reason)
            bad += len(part.bad)
            if bad > max_bad:
                raise DataError(f"{bad} bad images, more than the {max_bad} allowed: see the warnings, or raise max_bad")
    finally:
        for module, training in modes.items():
            module.training = training
    return Embedded(features, [images.name(index) for index in range(len(images))])


def split_rows(rows: range, size: int) -> list[range]:
    """Split rows into parts of a size; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class _EachImage(MultiViewDataset):
    """An image by its key, or zeros and the reason if it cannot be read: no other takes its place."""

    def __init__(self, source: ImageSource, transform: EvalTransform) -> None:
        super().__init__(source, transform)
        self.shape = transform.shape[1:]

    def __getitem__(self, key: Key) -> Sample:
        index = key[1]
        try:
            return Sample(try_again(partial(self._views, *key)), index, [])
        except ImageError as error:
            return Sample(torch.zeros(self.shape), index, [Bad(self.name(index), error.reason)])


class _Batches(StepSampler):
    """Batches of images that are given."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self._batches = list(batches)
        self.batch_size, self.world_size = max(map(len, self._batches), default=1), 1

    def __iter__(self) -> Iterator[list[Key]]:
        yield from ([(0, index) for index in batch] for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _collate(samples: Sequence[Sample]) -> tuple[Tensor, list[int], list[list[Bad]]]:
    return torch.stack([sample.views for sample in samples]), [s.number for s in samples], [s.bad for s in samples]
