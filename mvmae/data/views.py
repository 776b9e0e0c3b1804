"""V target views of an image from one decode (Section 3.1.1), and the one view of which features are computed.

Shapes: V views, C channels, H W pixels of a view. A box is (top, left, height, width) in the image as it is seen,
after its EXIF orientation. Nothing is normalised here: views are uint8, mean and std are applied on the device.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode import MAX_PIXELS, ImageLike, OpenedImage, open_image
from .pixels import Pixels, Range, colour


class Box(NamedTuple):
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random) -> Box:
    """Draw a random resized crop of an image: the distribution of torchvision's `RandomResizedCrop.get_params`.

    `scale` is the range of the crop's share of the area, and `ratio` that of width / height, uniform in its logarithm. After
    ten draws that do not fit, the crop is the largest central one within `ratio`.
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


class ViewTransform:
    """What both transforms have: their options, and the views of an opened image.

    Args:
        image_size: Size of a view in pixels; H and W, or one number for both.
        in_chans: C: 1 (grey), 3 (RGB), 4 (RGBA or CMYK as stored), any number for TIFF and arrays.
        scaled_decode: k: a JPEG is decoded at 1/2, 1/4 or 1/8 while every crop keeps k times its view's pixels a side;
            None or 0 decodes in full.
        max_pixels: Larger images are refused before they are decoded.
        value_range: Values that become 0 and 255 in images deeper than 8 bits, such as (0, 4095).
        background: Colour behind transparent pixels in grey or RGB views, in CSS notation.

    Raises:
        ValueError: An argument out of its range.
        ImageError: On call: an image that cannot be used.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        *,
        in_chans: int = 3,
        scaled_decode: float | None = 1.5,
        max_pixels: int = MAX_PIXELS,
        value_range: Range | None = None,
        background: str = "white",
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size must be a positive number or (H, W), got {image_size}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        if scaled_decode and scaled_decode < 1:
            raise ValueError(f"scaled_decode must be at least 1, or None to decode in full, got {scaled_decode}")
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise ValueError(f"value_range must be (low, high) with low < high, got {tuple(value_range)}")
        self.image_size = (size[0], size[1])
        self.in_chans, self.scaled_decode, self.max_pixels = in_chans, scaled_decode, max_pixels
        self.value_range, self.background = value_range, colour(background)

    def _open(self, image: ImageLike) -> OpenedImage:
        return open_image(image, channels=self.in_chans, max_pixels=self.max_pixels)

    def _take(self, image: OpenedImage, boxes: Sequence[Box], flips: Sequence[bool]) -> Tensor:
        """Decode once and resize the crops, bicubic with antialiasing: (V, C, H, W) uint8."""
        transpose, mirror, upend = image.turn
        stored = [_stored_box(box, image) for box in boxes]
        size = (self.image_size[1], self.image_size[0]) if transpose else self.image_size
        reduction = choose_reduction(stored, size, self.scaled_decode) if image.reducible else 1
        pixels = image.decode(reduction=reduction, value_range=self.value_range, background=self.background)
        views = torch.empty(len(boxes), self.in_chans, *self.image_size, dtype=torch.uint8)
        for view, box, flip in zip(views, stored, flips, strict=True):
            crop = _resize(pixels, snap_box(box, reduction, pixels.shape[0], pixels.shape[1]), size)
            dims = [-1] * (mirror != flip) + [-2] * upend  # the small crop is turned, not the large image
            crop = crop.mT if transpose else crop
            view.copy_(crop.flip(dims) if dims else crop)
        return views


class MultiViewTransform(ViewTransform):
    """V random resized crops of an image, each flipped by chance, from one decode (Section 3.1.1; crops as in MAE).

    Called with an image and a `torch.Generator`, it returns (V, C, H, W) uint8 that depend on these two alone. Without a
    generator, one number is drawn from torch's global generator.

    Args:
        image_size: As in `ViewTransform`.
        num_views: V.
        scale: Range of a crop's share of the image's area (MAE, since the paper is silent).
        ratio: Range of a crop's width / height.
        flip: Probability of a left-right flip.
        same_crop: Every view is the same crop: Table 6's "w/o two different target views".
        **options: As in `ViewTransform`.
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
        **options: Any,
    ) -> None:
        super().__init__(image_size, **options)
        if num_views < 1:
            raise ValueError(f"num_views must be at least 1, got {num_views}")
        for name, (low, high), most in (("scale", scale, 1), ("ratio", ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {most}, got {(low, high)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability between 0 and 1, got {flip}")
        self.num_views, self.scale, self.ratio, self.flip, self.same_crop = num_views, scale, ratio, flip, same_crop

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the views of one image: (V, C, H, W) uint8."""
        opened = self._open(image)
        return self._take(opened, *self.draw(*opened.upright_size, generator=generator))

    def draw(self, height: int, width: int, *, generator: torch.Generator | None = None) -> tuple[list[Box], list[bool]]:
        """Draw the V boxes, and whether each is flipped, for an image of this size."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))  # noqa: S311
        boxes, flips = [], []
        for _ in range(1 if self.same_crop else self.num_views):
            boxes.append(draw_box(height, width, self.scale, self.ratio, rng))
            flips.append(rng.random() < self.flip)
        repeats = self.num_views // len(boxes)
        return boxes * repeats, flips * repeats


class CentreCropTransform(ViewTransform):
    """The view of which features are computed: shorter side to 256/224 of the size, centre crop; nothing random.

    Args:
        image_size: As in `ViewTransform`.
        crop: Share of the resized image that the crop keeps (224/256, as in MAE's and timm's evaluation).
        **options: As in `ViewTransform`; here a JPEG is decoded in full unless `scaled_decode` is given.
    """

    def __init__(self, image_size: int | Sequence[int] = 224, *, crop: float = 224 / 256, **options: Any) -> None:
        super().__init__(image_size, **{"scaled_decode": None, **options})
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be a share above 0 and at most 1, got {crop}")
        self.crop = crop

    def __call__(self, image: ImageLike, *, generator: torch.Generator | None = None) -> Tensor:
        """Take the view of one image, (C, H, W) uint8; `generator` is not used."""
        opened = self._open(image)
        height, width = opened.upright_size
        side = min(height / self.image_size[0], width / self.image_size[1]) * self.crop  # source pixels a view's pixel
        h, w = (max(1, round(side * size)) for size in self.image_size)
        box = Box((height - h) // 2, (width - w) // 2, h, w)
        return self._take(opened, [box], [False])[0]


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


def _stored_box(box: Box, image: OpenedImage) -> Box:
    """Return a box of the image as seen in the image as stored."""
    (transpose, mirror, upend), (height, width) = image.turn, image.upright_size
    top = height - box.top - box.height if upend else box.top
    left = width - box.left - box.width if mirror else box.left
    return Box(left, top, box.width, box.height) if transpose else Box(top, left, box.height, box.width)
