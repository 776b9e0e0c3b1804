"""What is computed of all images: the statistics of their channels, and their features by any model of timm.

Shapes: N images, B of a batch, D width of a feature, C channels, H W pixels.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..inputs import CFG, Inputs, inputs_of
from ..loading import create_model
from ..masked_vit import unwrap
from .decode import MAX_PIXELS, ImageError, ImageLike, to_pil
from .loader import Loader
from .open import open_images
from .sampling import DataError, Key, generator, read
from .sources import ImageSource
from .views import CentreCropTransform

_logger = logging.getLogger(__name__)


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, in 0 to 1, to eight digits."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def measure_channels(source: ImageSource, transform: Callable[..., Tensor], *, limit: int = 2000) -> ChannelStatistics:
    """Measure mean and standard deviation of each channel over the pixels of at most `limit` images.

    The sample is always the same. Sums are integers, and so exact in any order. Images that cannot be read are skipped.
    `transform` makes (C, H, W) uint8 of an image without randomness, such as `CentreCropTransform`.

    Raises:
        ValueError: No image can be read, or a channel is the same everywhere.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:limit]
    count, total, squares, seen = 0, torch.zeros(1), torch.zeros(1), 0
    for index in order.tolist():
        try:
            pixels = transform(read(source, index)).flatten(1).long()  # (C, H * W)
        except ImageError as error:
            _logger.warning("not measured: %s", error)
            continue
        total, squares = total.long() + pixels.sum(dim=1), squares.long() + pixels.square().sum(dim=1)
        count, seen = count + pixels.shape[1], seen + 1
    if not seen:
        raise ValueError(f"at least one image must be readable, got none of {len(order)}: check {source.name(int(order[0]))}")
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=0).sqrt()
    if not std.min() > 0:
        same = f"channel {int(std.argmin())} with the same value in all of {seen} images"
        raise ValueError(f"each channel must vary, got {same}: pass mean and std, or leave the channel out")
    return ChannelStatistics(*(tuple(round(value / 255, 8) for value in values.tolist()) for values in (mean, std)))


class Embedded(NamedTuple):
    """Features (N, D), float32 on the CPU, the images' names, and row -> reason of images that cannot be read: rows of NaN."""

    features: Tensor
    names: list[str]
    bad: dict[int, str]


def pixel_options(inputs: Inputs) -> dict[str, Any]:
    """Return a record of inputs as options of `read_pixels`, `MultiViewTransform` and `CentreCropTransform`."""
    options = {"in_chans": len(inputs.mean), "background": inputs.background, "value_range": inputs.value_range}
    return options | {"max_pixels": inputs.max_pixels or MAX_PIXELS}


class EvalTransform:
    """timm's transform for evaluation with a model, of an image of any kind: (C, H, W) float32, normalised.

    Images of other channels than 1 and 3, which Pillow does not resize, are resized by `CentreCropTransform`. Arguments are as
    in `embed`.
    """

    def __init__(self, model: nn.Module, image_size: int | tuple[int, int] = 0, **changes: Any) -> None:
        inputs = inputs_of(model, **changes, size=to_2tuple(image_size) if image_size else None)
        options, cfg = pixel_options(inputs), timm.data.resolve_model_data_config(model)
        channels = options["in_chans"]
        self._read: Callable[[ImageLike], Any]
        self._transform: Callable[[Any], Tensor]
        if channels in (1, 3):
            self._read = partial(to_pil, **options)
            read = {**cfg, **{name: getattr(inputs, name) for name in CFG}, "input_size": (channels, *inputs.size)}
            self._transform = timm.data.create_transform(**read)
        else:
            self._read = CentreCropTransform(inputs.size, crop=inputs.crop_pct, **options)
            self._transform = partial(normalize, mean=inputs.mean, std=inputs.std)

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the centre of an image; nothing is random."""
        return self._transform(self._read(image))


def normalize(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """Normalise uint8 images (..., C, H, W) to float32 by mean and standard deviation in units of the whole range, 255."""
    mean, std = (_per_channel(tuple(x), images.device) for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy values to the device, (C, 1, 1); once, because a copy waits until the device has finished its work."""
    return torch.tensor(values, device=device)[:, None, None]


def embed(
    model: nn.Module | str | os.PathLike[str],
    source: "str | os.PathLike[str] | Dataset[Any] | ImageSource",
    *,
    split: str = "train",
    image_size: int | tuple[int, int] = 0,
    background: str | None = None,
    value_range: tuple[float, float] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Embedded:
    """Compute the features of all images of a source, in its order, in memory; ``examples/embed.py`` writes them to a disk.

    A feature is what timm's ``forward_head(forward_features(images), pre_logits=True)`` returns of the image as timm's own
    transform for evaluation prepares it: for the encoders of this package, the mean patch token. Images are upright by EXIF.

    Args:
        model: A model of timm, which computes where it is and as its autocast says; or a folder of an export, or a name
            that timm knows, loaded with its weights on a CUDA device if there is one.
        source: A folder, list, archive or data set, as `open_images` takes it.
        split: "train" or "val", where the source has splits; else all of its images.
        image_size: Side in pixels, or (H, W); 0: the size that the model was built for.
        background: Colour behind transparent pixels; None: the model's own, as for the next.
        value_range: Pixel values that are black and white, such as (0, 4095).
        batch_size: Images at a time.
        num_workers: Loading processes; 0 loads in this process.

    Returns:
        ``features``, (N, D), NaN where an image cannot be read; N ``names``; in ``bad`` the reason by row.

    Raises:
        ValueError: No images, no such model, one of ``features_only``, or sizes that do not fit.
        DataError: No image can be read, or they cannot be loaded.
    """
    images = open_images(source, split=split)
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if isinstance(model, nn.Module):
        encoder: Any = unwrap(model)
    else:
        encoder = create_model(os.fspath(model), pretrained=True, num_classes=0)
        if image_size and hasattr(encoder, "set_input_size"):
            encoder.set_input_size(img_size=to_2tuple(image_size))
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(encoder, "forward_head"):
        raise ValueError(f"the model must be one of timm with forward_head, not of features_only: got {type(encoder).__name__}")
    patches: Any = getattr(encoder, "patch_embed", None)
    if image_size and getattr(patches, "strict_img_size", False) and patches.img_size != to_2tuple(image_size):
        cure = f"call model.set_input_size(img_size={to_2tuple(image_size)}) before"
        raise ValueError(f"image_size {image_size} is not the {patches.img_size} of the model: {cure}")
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    given = {"background": background, "value_range": value_range}
    transform = EvalTransform(encoder, image_size, **{name: value for name, value in given.items() if value is not None})
    features, bad = torch.empty(0), dict[int, str]()
    for rows, found, unread in embed_rows(encoder, images, batches, transform, num_workers=num_workers):
        if rows:
            features = features if len(features) else found.new_full((len(images), found.shape[1]), torch.nan)
            features[rows] = found
        for row, reason in unread.items():
            _logger.warning("bad image %r: %s; its row is NaN", images.name(row), reason)
        bad |= unread
    if not len(features):
        raise DataError(f"none of {len(images)} images can be read: {images.name(0)} is one of them")
    return Embedded(features, [images.name(index) for index in range(len(images))], bad)


class Rows(NamedTuple):
    """Rows of a batch, their features (B, D), float32 on the CPU, and row -> reason of those without, which cannot be read."""

    rows: list[int]
    features: Tensor
    bad: dict[int, str]


def embed_rows(
    model: nn.Module,
    source: ImageSource,
    batches: Iterable[Sequence[int]],
    transform: Callable[..., Tensor],
    *,
    num_workers: int = 0,
) -> Iterator[Rows]:
    """Yield the features of some of a source's images, a batch at a time: the one loop over features.

    Args:
        model: Of timm, or with its `forward_features` and `forward_head`, on the device that computes; in evaluation mode here,
            and then as it was.
        source: The images.
        batches: Numbers of the images of each batch.
        transform: (image, generator=) -> what the model takes; a generator depends on the image's number alone.
        num_workers: Loading processes; 0 loads in this process.

    Raises:
        ValueError: The model does not pool.
    """
    timms: Any = model
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    keys = [[(0, row) for row in batch] for batch in batches]
    loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": device.type == "cuda", "collate": _collate}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for rows, images, bad in Loader(_EachImage(source, transform), keys, **loading):
            features = torch.empty(0)
            if rows:
                with torch.no_grad():
                    maps = timms.forward_features(images.to(device, non_blocking=True))
                    features = timms.forward_head(maps, pre_logits=True)
                if features.ndim != 2:
                    shape = tuple(features.shape)
                    raise ValueError(f"the model must pool its features to (B, D), got {shape}: build it with global_pool")
            yield Rows(rows, features.float().cpu(), bad)
    finally:
        for module, training in modes.items():
            module.training = training


class _EachImage(Dataset[Any]):
    """An image by its key, or the reason if it cannot be read: no other takes its place."""

    def __init__(self, source: ImageSource, transform: Callable[..., Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, key: Key) -> tuple[int, Tensor | None, str]:
        try:
            return key[1], self.transform(read(self.source, key[1]), generator=generator(0, *key)), ""
        except ImageError as error:
            return key[1], None, error.reason


def _collate(samples: Sequence[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor, dict[int, str]]:
    good = [(row, image) for row, image, _ in samples if image is not None]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return [row for row, _ in good], images, {row: reason for row, image, reason in samples if image is None}
