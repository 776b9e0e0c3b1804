"""COCO: images with objects from the disk, large-scale jitter, and average precision.

Shapes: H x W pixels, N objects.
"""

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from mvmae.data import sample_seed
from mvmae.inputs import Inputs
from tasks.annotations import coco_index, read_split
from tasks.dense import RGB, read_image

SIZES = ("_small", "_medium", "_large")
METRICS = [f"AP{kind}" for kind in ("", "50", "75", *SIZES)] + [f"AR{kind}" for kind in ("1", "10", "100", *SIZES)]


class CocoData(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and objects in COCO's format: polygons or run lengths, any ids, crowd regions, images without objects.

    Where no object of the split has an outline, ``with_masks`` is false and the objects are boxes alone.

    Args:
        root: folder with ``train2017``, ``val2017`` and ``annotations/instances_*.json``.
        split: ``train`` leaves images without an object out, as detectron2 does; ``val`` holds all.
        side: side in pixels of the square into which training images are jittered; 0 leaves images whole.
        scale: range of the jitter.
        seed: seed of the jitter, which depends on (seed, epoch, index) alone.
        inputs: how images are read.
        names: of the training split's classes, to which this split's are matched; None: its own, in the order of their ids.

    Attributes:
        truth: pycocotools' index of the annotations.
        category_ids: of the classes ``names`` in the file of this split.
        counts: objects of each class.
        note: how many images and objects there are, and what is left out.

    Raises:
        ValueError: if the annotations are wrong, with file and place, or there is no object.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        side: int = 0,
        scale: tuple[float, float] = (1, 1),
        seed: int = 0,
        inputs: Inputs = RGB,
        names: Sequence[str] | None = None,
    ) -> None:
        self.side, self.scale, self.seed, self.inputs = side, scale, seed, inputs
        self.file, self.truth = read_split(root, split, inputs.max_pixels)
        own = {category["name"]: number for number, category in sorted(self.truth.cats.items())}
        names = list(own) if names is None else names
        if unknown := own.keys() - set(names):
            raise ValueError(f"{self.file} must have classes of training images alone, got {', '.join(sorted(unknown))} too")
        self.names, free = list(names), itertools.count(1 + max(own.values(), default=0))
        self.category_ids = [own[name] if name in own else next(free) for name in names]

        objects = [item for item in self.truth.anns.values() if not item["iscrowd"]]
        self.with_masks = any(item["segmentation"] for item in objects)
        learnt = list(filter(self._is_learnt, objects))
        counts = Counter(item["category_id"] for item in learnt)
        self.counts = [counts[number] for number in self.category_ids]
        having = {item["image_id"] for item in learnt}
        self.image_ids = [number for number in sorted(self.truth.imgs) if split != "train" or number in having]
        crowds, shape = len(self.truth.anns) - len(objects), "an outline" if self.with_masks else "a box with an area"
        unseen = f"{len(objects) - len(learnt)} objects without {shape}, {crowds} crowd regions"
        unused = len(self.truth.imgs) - len(self.image_ids)
        self.note = f"{len(self)} images with {len(learnt)} objects; left out: {unused} images without any, {unseen}"
        if not learnt:
            got = f"{len(self.truth.anns)} annotations, {crowds} of them crowd regions (iscrowd 1; that of an object is 0)"
            raise ValueError(f"{self.file} must hold objects with {shape}, got {got}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.truth.imgs[self.image_ids[index]]["path"])

    def _is_learnt(self, item: Mapping[str, Any]) -> bool:
        """Return whether an annotation is an object with an outline or, where none in the split has, a box with an area."""
        return not item["iscrowd"] and bool(item["segmentation"] if self.with_masks else min(item["bbox"][2:]) > 0)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image (C, H, W) in [0, 1] and, for torchvision, what is known of its objects.

        These are ``boxes`` (N, 4), ``labels`` (N,) from 1, ``image_id``, and ``masks`` (N, H, W) unless there are boxes alone.
        """
        epoch, index = key
        number = self.image_ids[index]
        objects, known = list(filter(self._is_learnt, self.truth.imgToAnns[number])), self.truth.imgs[number]
        size = (known["height"], known["width"])
        pixels = read_image(self.name(index), self.inputs)
        masks = torch.zeros(len(objects) * self.with_masks, *size, dtype=torch.uint8)
        for mask, item in zip(masks, objects, strict=self.with_masks):
            mask.copy_(torch.from_numpy(self.truth.annToMask(item)))
        sides = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).view(-1, 4)
        inside = clip_boxes_to_image(box_convert(sides, "xywh", "xyxy"), size)
        boxes: Tensor = BoundingBoxes(inside, format="XYXY", canvas_size=size)
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


def jitter(image: Tensor, masks: Tensor, boxes: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale an image to fit a square, times a random factor, cut out at most that square, and flip it in one of two cases.

    Large-scale jitter (Ghiasi et al. 2021). torchvision's `ScaleJitter` and `RandomCrop` enlarge the whole image before they
    cut it, shrink a narrow one to 0 pixels, and fill up on all four sides.

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
        known = [item for item in truth.dataset["annotations"] if item[field]]  # an object may have a box alone
        with contextlib.redirect_stdout(io.StringIO()):
            true = coco_index(truth.dataset | {"annotations": known})
            none = truth.dataset | {"annotations": []}
            detected = true.loadRes(results) if results else coco_index(none)  # loadRes([]) raises
            evaluation = COCOeval(true, detected, kind)
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) * 100 if value >= 0 else -1.0 for value in evaluation.stats]
        numbers[name] = dict(zip(METRICS, values, strict=True))
    return numbers
