"""COCO: images with objects from the disk, large-scale jitter, and average precision.

Shapes: H x W pixels, N objects.
"""

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from mvmae.data import sample_seed
from tasks.dense import read_image

NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val")}
SIZES = ("_small", "_medium", "_large")
METRICS = [f"AP{kind}" for kind in ("", "50", "75", *SIZES)] + [f"AR{kind}" for kind in ("1", "10", "100", *SIZES)]


class CocoData(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and objects in COCO's format: polygons or run lengths, any category ids, crowd regions, images without objects.

    Where no object of the split has an outline, ``with_masks`` is false and the objects are boxes alone.

    Args:
        root: folder with ``train2017``, ``val2017`` and ``annotations/instances_*.json``.
        split: ``train`` leaves images without an object out, as detectron2 does; ``val`` holds all.
        side: side in pixels of the square into which training images are jittered; 0 leaves images whole.
        scale: range of the jitter.
        seed: seed of the jitter, which depends on (seed, epoch, index) alone.
        background: colour behind transparent pixels.

    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        side: int = 0,
        scale: tuple[float, float] = (1, 1),
        seed: int = 0,
        background: str = "white",
    ) -> None:
        name = next((name for name in NAMES[split] if (root / f"annotations/instances_{name}.json").exists()), None)
        if name is None:
            needed = f"annotations/instances_{NAMES[split][0]}.json"
            raise FileNotFoundError(f"--data: {root} must hold {needed}, as COCO's layout does")
        self.file, self.folder = root / f"annotations/instances_{name}.json", root / name
        self.side, self.scale, self.seed, self.background = side, scale, seed, background
        self.truth = read_coco(self.file)
        self.categories = {number: self.truth.cats[number]["name"] for number in sorted(self.truth.cats)}
        self.category_ids, self.names = list(self.categories), list(self.categories.values())
        self.with_masks = any(map(outline, self.truth.anns.values()))
        self.image_ids = [number for number in sorted(self.truth.imgs) if split != "train" or self._objects(number)]
        if not self.image_ids:
            raise ValueError(f"{self.file} must hold images with objects, got none")
        if missing := next((path for path in map(self.name, range(len(self))) if not Path(path).exists()), ""):
            raise FileNotFoundError(f"{missing} is missing, which {self.file} names")

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.truth.imgs[self.image_ids[index]]["file_name"])

    def _objects(self, number: int) -> list[dict[str, Any]]:
        """Return the objects in an image that have an outline or, where none in the split has, a box with an area."""
        items = [item for item in self.truth.imgToAnns[number] if not item["iscrowd"]]
        if self.with_masks:
            return [item | {"segmentation": outline(item)} for item in items if outline(item)]
        return [item for item in items if min(item["bbox"][2:]) > 0]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image (3, H, W) in [0, 1] and, for torchvision, what is known of its objects.

        These are ``boxes`` (N, 4), ``labels`` (N,) from 1, ``image_id``, and ``masks`` (N, H, W) unless there are boxes alone.
        """
        epoch, index = key
        number = self.image_ids[index]
        pixels, objects, known = read_image(self.name(index), self.background), self._objects(number), self.truth.imgs[number]
        size = (pixels.shape[1], pixels.shape[2])
        if size != (known["height"], known["width"]):
            needed = f"{known['width']}x{known['height']} pixels, as {self.file} says"
            raise ValueError(f"{self.name(index)} must have {needed}, got {size[1]}x{size[0]}")
        masks = torch.zeros(len(objects) * self.with_masks, *size, dtype=torch.uint8)
        for mask, item in zip(masks, objects, strict=self.with_masks):
            mask.copy_(torch.from_numpy(self.truth.annToMask(item)))
        sides = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).view(-1, 4)
        boxes: Tensor = BoundingBoxes(box_convert(sides, "xywh", "xyxy"), format="XYXY", canvas_size=size)
        if self.side:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                pixels, masks, boxes = jitter(pixels, masks, boxes, self.side, self.scale)
        labels = torch.tensor([self.category_ids.index(item["category_id"]) + 1 for item in objects], dtype=torch.long)
        seen = masks.bool().flatten(1).any(1) if self.with_masks else (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {"labels": labels[seen], "boxes": boxes[seen], "image_id": torch.tensor(number)}
        if self.with_masks:  # boxes around what is seen; torchvision's include the last pixel, COCO's end behind it
            target |= {"masks": masks[seen], "boxes": masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])}
        return pixels.float() / 255, target


def read_coco(path: Path) -> Any:
    """Read annotations into pycocotools' index, with its defaults for what converters leave out."""
    number = 0
    try:
        content = json.loads(path.read_bytes())
        images = {int(image["id"]): (image["file_name"], image["width"], image["height"]) for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        for number, item in enumerate(content["annotations"], start=1):
            _ = images[item["image_id"]], categories[item["category_id"]]
            item["id"] = number  # pycocotools takes a match with id 0 for none, and ids may repeat
            item["iscrowd"] = item.get("iscrowd") or 0
            left, top, width, height = item["bbox"]
            if not math.isfinite(left + top + width + height):
                raise ValueError(f"the box {item['bbox']}")
            item["area"] = item.get("area", width * height)
            if isinstance(shape := item.get("segmentation"), list) and shape and not isinstance(shape[0], list):
                item["segmentation"] = [shape]  # one polygon
    except (ValueError, TypeError, KeyError, IndexError) as error:
        place = f" in annotation {number}" if number else ""
        raise ValueError(f"{path} must be JSON in COCO's format, got {type(error).__name__} {error}{place}") from error
    return coco_index(content)


def coco_index(content: Mapping[str, Any]) -> Any:
    """Return pycocotools' index of annotations, without its prints."""
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('COCO needs pycocotools: pip install "mvmae[detection]"') from error
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(content)
        coco.createIndex()
    return coco


def outline(annotation: Mapping[str, Any]) -> Any:
    """Return an object's outline for pycocotools: None for a crowd, and no polygons of fewer than three corners."""
    shape = annotation.get("segmentation")
    if annotation["iscrowd"] or not shape:
        return None
    return shape if isinstance(shape, dict) else [polygon for polygon in shape if len(polygon) >= 6] or None


def jitter(image: Tensor, masks: Tensor, boxes: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale an image to fit a square, times a random factor, cut out at most that square, and flip it in one of two cases.

    Large-scale jitter (Ghiasi et al. 2021); the caller fills up what is smaller than the square. torchvision's `ScaleJitter`
    and `RandomCrop` enlarge the whole image before they cut it, shrink a narrow one to 0 pixels, and fill up on all four sides.

    Args:
        image: (3, H, W) uint8.
        masks: (N, H, W) uint8, resized as images are: as a `Mask`, they would be half a pixel off.
        boxes: (N, 4), as torchvision's `BoundingBoxes`.
        side: side of the square in pixels.
        scale: range of the factor.
    """
    factor = side * torch.empty(()).uniform_(*scale).item() / max(image.shape[1:])
    part = [min(max(int(side / factor), 1), length) for length in image.shape[1:]]  # what is cut out, in pixels of the image
    size = [min(max(round(length * factor), 1), side) for length in part]
    top, left = (int(torch.randint(whole - length + 1, ())) for whole, length in zip(image.shape[1:], part, strict=True))
    cut = partial(F.resized_crop, top=top, left=left, height=part[0], width=part[1], size=size)
    masks = Mask(cut(masks, interpolation=v2.InterpolationMode.NEAREST_EXACT))
    jittered: tuple[Tensor, Tensor, Tensor] = v2.RandomHorizontalFlip()(cut(image), masks, cut(boxes))
    return jittered


def to_coco(detected: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Write an image's ``boxes``, ``labels``, ``scores``, and ``masks`` (N, 1, H, W) in [0, 1] if any, as COCO's results."""
    from pycocotools import mask as run_lengths

    boxes = box_convert(detected["boxes"], "xyxy", "xywh").tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, "bbox": box}
        for box, label, score in zip(boxes, detected["labels"].tolist(), detected["scores"].tolist(), strict=True)
    ]
    for result, mask in zip(results, detected.get("masks", ()), strict="masks" in detected):
        code = run_lengths.encode(np.asfortranarray((mask[0] > 0.5).to(torch.uint8).cpu().numpy()))
        result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return results


def evaluate(
    truth: Any, detections: Sequence[dict[str, Any]], image_ids: Sequence[int], *, with_masks: bool = True
) -> dict[str, dict[str, float]]:
    """Compute COCO's 12 numbers for boxes and for masks, in percent: 0 without detections, -1 without objects to detect."""
    from pycocotools.cocoeval import COCOeval

    numbers = {}
    for name, kind, field in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation"))[: 1 + with_masks]:
        fields = ("image_id", "category_id", "score", field)  # areas are of boxes or of masks, so the other has to go
        results = [{name: detection[name] for name in fields} for detection in detections]
        with contextlib.redirect_stdout(io.StringIO()):
            detected = (
                truth.loadRes(results) if results else coco_index(truth.dataset | {"annotations": []})
            )  # loadRes([]) raises
            evaluation = COCOeval(truth, detected, kind)
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) * 100 if value >= 0 else -1.0 for value in evaluation.stats]
        numbers[name] = dict(zip(METRICS, values, strict=True))
    return numbers
