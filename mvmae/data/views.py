"""V target views of an image from one decode (Section 3.1.1), and the one view of which features are computed.

Shapes: V views, C channels, H W pixels of a view. A box is (top, left, height, width) in the image as it is seen,
after its EXIF orientation. Nothing is normalised here: views are uint8, mean and std are applied on the device.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decode import MAX_PIXELS, ImageLike, OpenedImage, colour, open_image
from .pixels import WHITE, Colour, Pixels

DECODERS = ("fast", "pillow", "pil")
# EXIF orientation -> how the stored image becomes the one looked at: transpose, then flip left-right, flip up-down
_ORIENT = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class Box(NamedTuple):
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random) -> Box:
    """Draw a random resized crop: the distribution of torchvision's `RandomResizedCrop.get_params`.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        scale: Range of the crop's share of the image's area.
        ratio: Range of the crop's width / height, uniform in its logarithm.
        rng: Source of the random numbers.

    Returns:
        The box; after ten draws that do not fit, the largest central one within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class MultiViewTransform:
    """V random resized crops of an image, each flipped by chance, from one decode (Section 3.1.1; crops as in MAE).

    Called with an image and a `torch.Generator`, it returns (V, C, H, W) uint8 that depend on these two alone. Without a
    generator, one number is drawn from torch's global generator.

    Args:
        image_size: Size of a view in pixels; H and W, or one number for both.
        num_views: V.
        scale: Range of a crop's share of the image's area (MAE, since the paper is silent).
        ratio: Range of a crop's width / height.
        flip: Probability of a left-right flip.
        same_crop: Every view is the same crop: Table 6's "w/o two different target views".
        in_chans: C: 1 (grey), 3 (RGB), 4 (RGBA or CMYK as stored), any number for arrays.
        scaled_decode: k: a JPEG is decoded at 1/2, 1/4 or 1/8 while every crop keeps k times its view's pixels a side;
            None or 0 decodes in full.
        decoder: "fast" (simplejpeg where installed), "pillow" (Pillow only), or "pil": the slow reference that decodes
            in full and crops with Pillow's `resize(box=...)`.
        max_pixels: Larger images are refused before they are decoded.
        value_range: Values that become 0 and 255 in images and arrays deeper than 8 bits, such as (0, 4095).
        background: Colour behind transparent pixels in grey or RGB views, in CSS notation.

    Raises:
        ValueError: An argument out of its range.
        ImageError: On call: an image that cannot be used.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        *,
        num_views: int = 2,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        same_crop: bool = False,
        in_chans: int = 3,
        scaled_decode: float | None = 1.5,
        decoder: str = "fast",
        max_pixels: int = MAX_PIXELS,
        value_range: tuple[float, float] | None = None,
        background: str = "white",
    ) -> None:
        if num_views < 1 or in_chans < 1:
            raise ValueError(f"num_views and in_chans must be at least 1, got {num_views} and {in_chans}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high <= 1, got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be (low, high) with 0 < low <= high, got {tuple(ratio)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability between 0 and 1, got {flip}")
        if scaled_decode and scaled_decode < 1:
            raise ValueError(f"scaled_decode must be at least 1, or None to decode in full, got {scaled_decode}")
        _check_decoder(decoder, in_chans)
        self.image_size = _pair(image_size)
        self.num_views, self.scale, self.ratio, self.flip = num_views, scale, ratio, flip
        self.same_crop, self.in_chans, self.max_pixels = same_crop, in_chans, max_pixels
        self.scaled_decode, self.decoder = scaled_decode or None, decoder
        self.value_range, self.background = _check_range(value_range), colour(background)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(V, C, H, W) of a call's result."""
        return self.num_views, self.in_chans, *self.image_size

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the views of one image.

        Args:
            image: A path, an encoded file's bytes, a Pillow image, a tensor (C, H, W) or an array.
            generator: Generator of this sample.

        Returns:
            (V, C, H, W) uint8.
        """
        opened = open_image(image, max_pixels=self.max_pixels)
        boxes, flips = self.draw(*_upright_size(opened), generator=generator)
        return take_views(
            opened,
            boxes,
            flips,
            self.image_size,
            channels=self.in_chans,
            scaled_decode=self.scaled_decode,
            decoder=self.decoder,
            value_range=self.value_range,
            background=self.background,
        )

    def draw(self, height: int, width: int, *, generator: torch.Generator | None = None) -> tuple[list[Box], list[bool]]:
        """Draw the V boxes, and whether each is flipped, for an image of this size."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))  # noqa: S311
        boxes, flips = [], []
        for _ in range(1 if self.same_crop else self.num_views):
            boxes.append(draw_box(height, width, self.scale, self.ratio, rng))
            flips.append(rng.random() < self.flip)
        repeats = self.num_views // len(boxes)
        return boxes * repeats, flips * repeats


class CentreCropTransform:
    """The view of which features are computed: shorter side to 256/224 of the size, centre crop; nothing random.

    Args:
        image_size: Size of the view in pixels; H and W, or one number for both.
        crop: Share of the resized image that the crop keeps (224/256, as in MAE's and timm's evaluation).
        in_chans: C, as in `MultiViewTransform`.
        scaled_decode: As in `MultiViewTransform`; None, the default, decodes in full.
        decoder: As in `MultiViewTransform`.
        max_pixels: As in `MultiViewTransform`.
        value_range: As in `MultiViewTransform`.
        background: As in `MultiViewTransform`.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        *,
        crop: float = 224 / 256,
        in_chans: int = 3,
        scaled_decode: float | None = None,
        decoder: str = "fast",
        max_pixels: int = MAX_PIXELS,
        value_range: tuple[float, float] | None = None,
        background: str = "white",
    ) -> None:
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be a share above 0 and at most 1, got {crop}")
        _check_decoder(decoder, in_chans)
        self.image_size, self.crop, self.in_chans = _pair(image_size), crop, in_chans
        self.scaled_decode, self.decoder, self.max_pixels = scaled_decode, decoder, max_pixels
        self.value_range, self.background = _check_range(value_range), colour(background)

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the view of one image, (C, H, W) uint8; `generator` is not used."""
        opened = open_image(image, max_pixels=self.max_pixels)
        height, width = _upright_size(opened)
        side = min(height / self.image_size[0], width / self.image_size[1]) * self.crop  # source pixels a view's pixel
        h, w = (max(1, round(side * size)) for size in self.image_size)
        box = Box((height - h) // 2, (width - w) // 2, h, w)
        return take_views(
            opened,
            [box],
            [False],
            self.image_size,
            channels=self.in_chans,
            scaled_decode=self.scaled_decode,
            decoder=self.decoder,
            value_range=self.value_range,
            background=self.background,
        )[0]


def take_views(
    image: OpenedImage,
    boxes: Sequence[Box],
    flips: Sequence[bool],
    image_size: tuple[int, int],
    *,
    channels: int = 3,
    scaled_decode: float | None = 1.5,
    decoder: str = "fast",
    value_range: tuple[float, float] | None = None,
    background: Colour = WHITE,
) -> Tensor:
    """Decode once and resize the crops, bicubic with antialiasing.

    Returns:
        (V, C, H, W) uint8.
    """
    transpose, mirror, upend = _ORIENT[image.orientation]
    stored = [_stored_box(box, image, transpose, mirror, upend) for box in boxes]
    size = (image_size[1], image_size[0]) if transpose else image_size
    reduction = choose_reduction(stored, size, scaled_decode) if image.reducible and decoder != "pil" else 1
    library = "fast" if decoder == "fast" else "pillow"
    pixels = image.decode(
        channels=channels, reduction=reduction, decoder=library, value_range=value_range, background=background
    )
    resize = _resize_pil if decoder == "pil" else _resize
    views = torch.empty(len(boxes), channels, *image_size, dtype=torch.uint8)
    for view, box, flip in zip(views, stored, flips, strict=True):
        crop = resize(pixels, snap_box(box, reduction, pixels.shape[0], pixels.shape[1]), size)
        dims = [-1] * (mirror != flip) + [-2] * upend
        crop = crop.mT if transpose else crop
        view.copy_(crop.flip(dims) if dims else crop)
    return views


def choose_reduction(boxes: Sequence[Box], image_size: tuple[int, int], k: float | None) -> int:
    """Return the largest of 8, 4, 2, 1 by which an image may shrink while each box keeps k times its view's pixels a side."""
    if not k:
        return 1
    spare = min(min(box.height / image_size[0], box.width / image_size[1]) for box in boxes) / k
    return next((s for s in (8, 4, 2) if spare >= s), 1)


def snap_box(box: Box, reduction: int, height: int, width: int) -> Box:
    """Return the box on the grid of an image that was decoded at 1 / reduction to (height, width)."""
    if reduction == 1:
        return box
    top, left = round(box.top / reduction), round(box.left / reduction)
    h, w = round(box.height / reduction), round(box.width / reduction)
    return Box(top, left, min(h, height - top), min(w, width - left))


def _resize(pixels: Pixels, box: Box, size: tuple[int, int]) -> Tensor:
    """Resize a crop to (C, H, W); it is copied first, so that torch's kernel for channels-last bytes reads it in one piece."""
    top, left, height, width = box
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
    return F.interpolate(crop, size, mode="bicubic", antialias=True)[0]


def _resize_pil(pixels: Pixels, box: Box, size: tuple[int, int]) -> Tensor:
    """The same by Pillow, band by band where it has no such mode."""
    top, left, height, width = box
    bands = [pixels] if pixels.shape[2] == 3 else np.split(pixels, pixels.shape[2], axis=2)
    resized = []
    for band in bands:
        image = Image.fromarray(band if band.shape[2] == 3 else band[..., 0])
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        resized.append(np.array(image).reshape(*size, -1))
    return torch.from_numpy(np.concatenate(resized, axis=2)).permute(2, 0, 1)


def _stored_box(box: Box, image: OpenedImage, transpose: bool, mirror: bool, upend: bool) -> Box:
    """Return the box in the image as stored, from the box in the image as seen."""
    height, width = _upright_size(image)
    top = height - box.top - box.height if upend else box.top
    left = width - box.left - box.width if mirror else box.left
    return Box(left, top, box.width, box.height) if transpose else Box(top, left, box.height, box.width)


def _upright_size(image: OpenedImage) -> tuple[int, int]:
    return (image.width, image.height) if _ORIENT[image.orientation][0] else (image.height, image.width)


def _check_decoder(decoder: str, in_chans: int) -> None:
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")


def _check_range(value_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
        raise ValueError(f"value_range must be (low, high) with low < high, got {tuple(value_range)}")
    return value_range


def _pair(image_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size must be a positive number or (H, W), got {image_size}")
    return pair[0], pair[1]
