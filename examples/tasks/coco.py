"""COCO: images with objects from the disk, large-scale jitter, and average precision.

Shapes: H x W pixels, N objects.
"""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

from mvmae.data import colour, open_image, sample_seed

NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val")}
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

    Args:
        root: folder with ``train2017``, ``val2017`` and ``annotations/instances_*.json``.
        split: ``train`` leaves images without an object out, as detectron2 does; ``val`` gives all.
        side: training images are jittered into a square of this side, in pixels; 0 gives whole images.
        scale: range of the jitter.
        seed: of the jitter; it depends on (seed, epoch, index) alone.
        background: colour behind transparent pixels.

    Raises:
        FileNotFoundError: if the annotations are not there.
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
            raise FileNotFoundError(f"{root} holds no annotations/instances_{NAMES[split][0]}.json: COCO's layout is expected")
        self.file = root / f"annotations/instances_{name}.json"
        self.truth = read_coco(self.file)
        self.folder, self.side, self.scale, self.seed = root / name, side, scale, seed
        self.background = colour(background)
        self.category_ids = sorted(self.truth.getCatIds())
        self.names = [category["name"] for category in self.truth.loadCats(self.category_ids)]
        self.image_ids = sorted(self.truth.getImgIds())
        if split == "train":
            self.image_ids = [number for number in self.image_ids if any(map(_outline, self.truth.imgToAnns[number]))]
        if not self.image_ids:
            raise ValueError(f"{root}/annotations/instances_{name}.json holds no images with objects")

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """Give the path of an image."""
        return str(self.folder / self.truth.loadImgs([self.image_ids[index]])[0]["file_name"])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give image (3, H, W) in [0, 1] and, for torchvision, ``boxes``, ``labels`` (from 1), ``masks`` and ``image_id``."""
        epoch, index = key
        number = self.image_ids[index]
        image = Image.fromarray(open_image(self.name(index)).decode(decoder="pillow", background=self.background))
        objects = [item | {"segmentation": _outline(item)} for item in self.truth.imgToAnns[number] if _outline(item)]
        masks = [Image.fromarray(self.truth.annToMask(item)) for item in objects]
        if self.side:
            rng = np.random.default_rng(sample_seed(self.seed, epoch, index))
            image, masks = jitter(image, masks, self.side, self.scale, rng)
        pixels = pil_to_tensor(image).float() / 255
        planes = torch.stack([pil_to_tensor(mask)[0] for mask in masks]) if masks else torch.zeros(0, *pixels.shape[1:])
        seen = planes.bool().flatten(1).any(1)
        boxes = masks_to_boxes(planes[seen]) + torch.tensor([0, 0, 1, 1]) if seen.any() else torch.zeros(0, 4)
        labels = torch.tensor([self.category_ids.index(item["category_id"]) + 1 for item in objects], dtype=torch.long)
        target = {"boxes": boxes, "labels": labels[seen], "masks": planes[seen].to(torch.uint8)}
        return pixels, {**target, "image_id": torch.tensor(number)}


def read_coco(path: Path) -> Any:
    """Open annotations with pycocotools, without its prints."""
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('COCO needs pycocotools: pip install "mvmae[detection]"') from error
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _outline(annotation: dict[str, Any]) -> Any:
    """Give an object's outline for pycocotools: None for a crowd, and no polygons of fewer than three corners."""
    outline = annotation.get("segmentation")
    if annotation.get("iscrowd") or not outline:
        return None
    return outline if isinstance(outline, dict) else [polygon for polygon in outline if len(polygon) >= 6] or None


def jitter(
    image: Image.Image, masks: list[Image.Image], side: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[Image.Image, list[Image.Image]]:
    """Scale an image to fit a square, times a random factor, cut out at most that square, and flip it in one of two cases.

    Large-scale jitter (Ghiasi et al. 2021). The caller fills up what is smaller than the square.
    """
    factor = side * rng.uniform(*scale) / max(image.size)
    whole = [max(round(length * factor), 1) for length in image.size]
    size = (min(whole[0], side), min(whole[1], side))
    start = [rng.uniform(0, length - part) for length, part in zip(whole, size, strict=True)]
    ends = [(a + part) * length / total for a, part, length, total in zip(start, size, image.size, whole, strict=True)]
    starts = [a * length / total for a, length, total in zip(start, image.size, whole, strict=True)]
    box = (starts[0], starts[1], min(ends[0], image.size[0]), min(ends[1], image.size[1]))
    image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR, box)
    masks = [mask.resize((size[0], size[1]), Image.Resampling.NEAREST, box) for mask in masks]
    if rng.random() < 0.5:
        image, *masks = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (image, *masks))
    return image, masks


def to_coco(found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Write an image's ``boxes``, ``labels``, ``scores`` and ``masks`` (N, 1, H, W) in [0, 1] as results in COCO's format."""
    from pycocotools import mask as run_lengths

    results = []
    columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
    masks = (found["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
    for (left, top, right, bottom), label, score, mask in zip(*columns, masks, strict=True):
        code = run_lengths.encode(np.asfortranarray(mask))
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "score": score,
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            }
        )
    return results


def evaluate(truth: Any, detections: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """Compute COCO's 12 numbers for boxes and for masks, in percent; 0 where nothing is detected, -1 where nothing is to be."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {}
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation")):
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
