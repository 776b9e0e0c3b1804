"""COCO: images with objects from the disk, large-scale jitter, and average precision.

Shapes: H x W pixels, N objects.
"""

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from mvmae.data import colour, open_image, sample_seed

NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val")}
LAYOUT = (
    "data set folder in COCO's layout (annotations/instances_train2017.json, train2017/, ... and the same for val2017), or "
    "toy: shapes drawn into the output folder; not needed with --preset toy"
)
"""What ``--help`` says of ``--data``."""
METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


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

    Raises:
        FileNotFoundError: if the annotations are not there.
        ValueError: if no image has an object.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        side: int = 0,
        scale: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
        background: str = "white",
    ) -> None:
        name = next((name for name in NAMES[split] if (root / f"annotations/instances_{name}.json").exists()), None)
        if name is None:
            needed = f"annotations/instances_{NAMES[split][0]}.json"
            raise FileNotFoundError(f"--data: {root} must hold {needed}, as COCO's layout does")
        self.file = root / f"annotations/instances_{name}.json"
        self.truth = read_coco(self.file)
        self.folder, self.side, self.scale, self.seed = root / name, side, scale, seed
        self.background = colour(background)
        self.category_ids = sorted(self.truth.getCatIds())
        self.names = [category["name"] for category in self.truth.loadCats(self.category_ids)]
        self.with_masks = any(map(_outline, self.truth.anns.values()))
        self.image_ids = sorted(self.truth.getImgIds())
        if split == "train":
            self.image_ids = [number for number in self.image_ids if self._objects(number)]
        if not self.image_ids:
            raise ValueError(f"{self.file} must hold images with objects, got none")

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.truth.loadImgs([self.image_ids[index]])[0]["file_name"])

    def _objects(self, number: int) -> list[dict[str, Any]]:
        """Return the objects in an image that have an outline or, where none in the split has, a box with an area."""
        if self.with_masks:
            return [item | {"segmentation": _outline(item)} for item in self.truth.imgToAnns[number] if _outline(item)]
        objects = (item for item in self.truth.imgToAnns[number] if not item.get("iscrowd"))
        return [item for item in objects if min(item.get("bbox", ())[2:], default=0) > 0]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image (3, H, W) in [0, 1] and, for torchvision, what is known of its objects.

        These are ``boxes`` (N, 4), ``labels`` (N,) from 1, ``image_id``, and ``masks`` (N, H, W) unless there are boxes alone.
        """
        epoch, index = key
        number = self.image_ids[index]
        decoded = open_image(self.name(index)).decode(decoder="pillow", background=self.background)
        pixels: Tensor = F.to_image(Image.fromarray(decoded))
        objects = self._objects(number)
        planes = [torch.from_numpy(self.truth.annToMask(item)) for item in objects if self.with_masks]
        masks = torch.stack(planes) if planes else torch.zeros(0, *pixels.shape[1:], dtype=torch.uint8)
        if masks.shape[1:] != pixels.shape[1:]:
            (height, width), (rows, columns) = masks.shape[1:], pixels.shape[1:]
            raise ValueError(f"{self.name(index)} must have {width}x{height} pixels, as {self.file} says, got {columns}x{rows}")
        sides = torch.tensor([item["bbox"] for item in objects if not self.with_masks], dtype=torch.float32).view(-1, 4)
        boxes: Tensor = BoundingBoxes(box_convert(sides, "xywh", "xyxy"), format="XYXY", canvas_size=pixels.shape[1:])
        if self.side:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                pixels, masks, boxes = jitter(pixels, masks, boxes, self.side, self.scale)
        seen = masks.bool().flatten(1).any(1) if self.with_masks else (boxes[:, 2:] > boxes[:, :2]).all(1)
        labels = torch.tensor([self.category_ids.index(item["category_id"]) + 1 for item in objects], dtype=torch.long)
        target = {"labels": labels[seen], "image_id": torch.tensor(number)}
        if self.with_masks:  # boxes around what is seen
            target |= {"masks": masks[seen], "boxes": masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])}
        else:
            target["boxes"] = boxes[seen]
        return pixels.float() / 255, target


def read_coco(path: Path) -> Any:
    """Load annotations with pycocotools, without its prints."""
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('COCO needs pycocotools: pip install "mvmae[detection]"') from error
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _outline(annotation: dict[str, Any]) -> Any:
    """Return an object's outline for pycocotools: None for a crowd, and no polygons of fewer than three corners."""
    outline = annotation.get("segmentation")
    if annotation.get("iscrowd") or not outline:
        return None
    return outline if isinstance(outline, dict) else [polygon for polygon in outline if len(polygon) >= 6] or None


def jitter(image: Tensor, masks: Tensor, boxes: Tensor, side: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale an image to fit a square, times a random factor, cut out at most that square, and flip it in one of two cases.

    Large-scale jitter (Ghiasi et al. 2021). The caller fills up what is smaller than the square. torchvision's `ScaleJitter`
    and `RandomCrop` do not fit: they enlarge the whole image before they cut it, shrink a narrow one to 0 pixels, and fill up
    on all four sides. Masks are resized as images are: as a `Mask`, they would be half a pixel off.

    Args:
        image: (3, H, W) uint8.
        masks: (N, H, W) uint8.
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


def to_coco(found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Write an image's ``boxes``, ``labels``, ``scores``, and ``masks`` (N, 1, H, W) in [0, 1] if any, as COCO's results."""
    from pycocotools import mask as run_lengths

    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, "bbox": box}
        for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    if "masks" in found:
        masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            code = run_lengths.encode(np.asfortranarray(mask))
            result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return results


def evaluate(
    truth: Any, detections: Sequence[dict[str, Any]], image_ids: Sequence[int], *, with_masks: bool = True
) -> dict[str, dict[str, float]]:
    """Compute COCO's 12 numbers for boxes and for masks, in percent: 0 without detections, -1 without objects to detect."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {}
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation"))[: 1 + with_masks]:
        fields = ("image_id", "category_id", "score", field)  # areas are of boxes or of masks, so the other has to go
        kept = [{name: detection[name] for name in fields} for detection in detections]
        with contextlib.redirect_stdout(io.StringIO()):
            results = COCO()
            results.dataset = {name: truth.dataset[name] for name in ("images", "categories")} | {"annotations": []}
            results.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(kept) if kept else results, kind)
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) * 100 if value >= 0 else -1.0 for value in evaluation.stats]
        numbers["box" if kind == "bbox" else "mask"] = dict(zip(METRICS, values, strict=True))
    return numbers
