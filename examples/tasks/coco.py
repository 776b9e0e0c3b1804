"""COCO: images with objects from the disk, large-scale jitter, and average precision.

Shapes: H x W pixels, N objects.
"""

import contextlib
import io
import itertools
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from mvmae.data import sample_seed
from mvmae.inputs import Inputs
from mvmae.weights import first_line
from tasks.dense import RGB, check_size, read_image

NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val")}
SIZES = ("_small", "_medium", "_large")
METRICS = [f"AP{kind}" for kind in ("", "50", "75", *SIZES)] + [f"AR{kind}" for kind in ("1", "10", "100", *SIZES)]


class CocoData(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and objects in COCO's format: polygons or run lengths, any ids, crowd regions, images without objects.

    Classes are those of the training split, in the order of their ids; the other split's are matched to them by name. Where no
    object of the split has an outline, ``with_masks`` is false and the objects are boxes alone.

    Args:
        root: folder with ``train2017``, ``val2017`` and ``annotations/instances_*.json``.
        split: ``train`` leaves images without an object out, as detectron2 does; ``val`` holds all.
        side: side in pixels of the square into which training images are jittered; 0 leaves images whole.
        scale: range of the jitter.
        seed: seed of the jitter, which depends on (seed, epoch, index) alone.
        inputs: how images are read.
        names: of the classes; None: read from the training split.

    Attributes:
        truth: pycocotools' index of the annotations.
        names: of the classes.
        category_ids: of the classes in the file of this split.
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
        if names is None:
            known = (self.truth if split == "train" else read_split(root, "train", inputs.max_pixels)[1]).cats
            names = [known[number]["name"] for number in sorted(known)]
        own = {category["name"]: number for number, category in self.truth.cats.items()}
        if unknown := own.keys() - set(names):
            got = f"got {', '.join(sorted(unknown))} too"
            raise ValueError(f"{self.file} must have classes of the training images alone, {', '.join(names)}, {got}")
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
        pixels = read_image(self.name(index), self.inputs, size, self.file)
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


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split's images, beside which its annotations lie."""
    for name in NAMES[split]:
        if (root / f"annotations/instances_{name}.json").is_file():
            return root / name
    raise FileNotFoundError(f"--data: {root} must hold annotations/instances_{NAMES[split][0]}.json, as COCO's layout does")


def read_split(root: Path, split: str, max_pixels: int | None = None) -> tuple[Path, Any]:
    """Read and check a split's annotations: their file, and pycocotools' index with the defaults of COCO's own tools.

    Images have their ``path``, and the height and width in which they are seen. Annotations are numbered anew (to pycocotools
    a match with id 0 is none), classes of one name are one, and ``segmentation`` is what pycocotools takes, or None.

    Raises:
        ValueError: with file and place of the first thing that is wrong.
    """
    folder = split_folder(root, split)
    file = root / f"annotations/instances_{folder.name}.json"
    try:
        content = json.loads(file.read_bytes())
        images, categories, items = (Table(file, content[key], key) for key in ("images", "categories", "annotations"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON in COCO's format, got {first_line(error)}") from error

    given = images.column("file_name")
    below = [str(path).replace("\\", "/") for path in given]
    leaving = (path.startswith("/") or ":" in path.split("/")[0] or ".." in path.split("/") for path in below)
    images.refuse(leaving, f"must name a file below {root}", given)
    paths = [next(filter(os.path.isfile, (f"{folder}/{path}", f"{root}/{path}")), "") for path in below]
    images.refuse((not path for path in paths), f"must name a file in {folder}", given)
    stated = zip(images.numbers("height", default=0), images.numbers("width", default=0), strict=True)
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(partial(check_size, source=file, max_pixels=max_pixels), paths, stated))
    image_ids = images.ids()
    for image, number, path, size in zip(images.records, image_ids.values(), paths, sizes, strict=True):
        image.update(id=number, path=path, height=size[0], width=size[1])

    category_ids, ids = categories.ids(), dict[str, int]()
    for text, category in zip(category_ids, categories.column("name"), strict=True):
        category_ids[text] = ids.setdefault(str(category), category_ids[text])

    image_of = items.references("image_id", "images", image_ids)
    size_of = dict(zip(image_ids.values(), sizes, strict=True))
    extent = np.array([size_of[number][::-1] for number in image_of]).reshape(-1, 2)  # width, height
    box, crowd = items.numbers("bbox", (4,)), items.numbers("iscrowd", default=0)
    outside = (box[:, 2:] < 0) | (box[:, :2] > extent) | (box[:, :2] + box[:, 2:] < 0)
    must = "must have left, top, width and height of a box in its picture as 'bbox'"
    items.refuse(map(any, outside.tolist()), must, items.column("bbox"))
    items.refuse(crowd * (crowd - 1) != 0, "must have 0 or 1 as 'iscrowd'", crowd)
    area, given = items.numbers("area", default=-1), items.column("segmentation", default=[])
    shapes = list(map(cleaned, given))
    wrong = (shape is not None and not is_outline(shape, *size) for shape, size in zip(shapes, extent.tolist(), strict=True))
    items.refuse(wrong, "must have polygons, or run lengths that make up its picture, as 'segmentation'", given)
    columns = {
        "id": range(1, 1 + len(box)),
        "image_id": image_of,
        "category_id": items.references("category_id", "categories", category_ids),
        "bbox": box.tolist(),
        "area": np.where(area >= 0, area, box[:, 2] * box[:, 3]).tolist(),
        "iscrowd": crowd.astype(int).tolist(),
        "segmentation": shapes,
    }
    for item, values in zip(items.records, zip(*columns.values(), strict=True), strict=True):
        item.update(zip(columns, values, strict=True))
    classes = [{"id": number, "name": name} for name, number in ids.items()]
    return file, coco_index({"images": images.records, "categories": classes, "annotations": items.records})


class Table:
    """The records of a list in a JSON file, by columns: all are checked at once, and the first wrong one is named.

    Raises:
        TypeError: if it is no list.
        ValueError: by all methods, if a record is wrong.
    """

    def __init__(self, file: Path, records: Any, name: str) -> None:
        if not isinstance(records, list):
            raise TypeError(f"{reprlib.repr(records)} as {name}")
        self.place, self.records = f"{file}, {name}", records
        self.refuse((not isinstance(record, dict) for record in records), "must be an object", records)

    def refuse(self, wrong: Iterable[Any], must: str, values: Any) -> None:
        """Raise an error about the first record that is wrong."""
        if (number := next((number for number, bad in enumerate(wrong) if bad), None)) is not None:
            raise ValueError(f"{self.place}[{number}] {must}, got {reprlib.repr(values[number])}")

    def column(self, key: str, default: Any = None) -> list[Any]:
        """Return the values of a key, with a default for those that are missing or null; without a default none may be."""
        values = [default if (value := record.get(key)) is None else value for record in self.records]
        self.refuse((value is None for value in values), f"must have {key!r}", self.records)
        return values

    def ids(self) -> dict[str, int]:
        """Return a number for each id: the ids themselves, or from 1 on unless all of them are whole numbers."""
        values = self.column("id")
        uses = Counter(map(id_text, values))
        self.refuse((uses[id_text(value)] > 1 for value in values), "must have an id of its own", values)
        whole = all(type(value) is int and abs(value) < 2**63 for value in values)
        return {id_text(value): value if whole else number for number, value in enumerate(values, start=1)}

    def references(self, key: str, table: str, numbers: Mapping[str, int]) -> list[int]:
        """Return the numbers of the records of another table that a column names by their ids."""
        values = self.column(key)
        found = [numbers.get(id_text(value)) for value in values]
        self.refuse((number is None for number in found), f"must name one of the {table} as {key!r}", values)
        return found  # type: ignore[return-value]

    def numbers(self, key: str, shape: tuple[int, ...] = (), default: float | None = None) -> NDArray[np.float64]:
        """Return a column of finite numbers, or of lists of as many as ``shape`` says, (N, *shape)."""
        values = self.column(key, default)
        array = as_numbers(values, (len(values), *shape)) if values else np.empty((0, *shape))
        if array is None:
            must = f"must have {shape[0]} finite numbers" if shape else "must have a finite number"
            self.refuse((as_numbers(value, shape) is None for value in values), f"{must} as {key!r}", values)
        return array  # type: ignore[return-value]


def id_text(value: Any) -> str:
    """Return an id as text, the same one for 7, 7.0 and "7", since converters mix them."""
    return str(value).removesuffix(".0")


def as_numbers(values: Any, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Return finite numbers as an array of a shape; None where they are something else."""
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.shape == shape and np.isfinite(array).all() else None


def cleaned(shape: Any) -> Any:
    """Return an outline as polygons, without those of two corners, which pycocotools takes for boxes; None if there are none."""
    if not isinstance(shape, list):
        return shape
    polygons = [shape] if shape and isinstance(shape[0], int | float) else shape
    return [polygon for polygon in polygons if not isinstance(polygon, list) or len(polygon) >= 6] or None


def is_outline(shape: Any, width: int, height: int) -> bool:
    """Return whether an outline is polygons [x, y, ...] in or near its picture, or run lengths that make up the picture."""
    try:
        if isinstance(shape, dict):
            counts = unpack(shape["counts"]) if isinstance(shape["counts"], str) else shape["counts"]
            return shape["size"] == [height, width] and min(counts) >= 0 and sum(counts) == width * height
        return all(
            len(polygon) % 2 == 0
            and math.isfinite(sum(polygon))  # no NaN; of a polygon far outside, pycocotools would follow each pixel
            and -width <= min(polygon[::2]) <= max(polygon[::2]) <= 2 * width
            and -height <= min(polygon[1::2]) <= max(polygon[1::2]) <= 2 * height
            for polygon in shape
        )
    except (TypeError, ValueError, KeyError, OverflowError):
        return False


def unpack(code: str) -> list[int]:
    """Decode COCO's compressed run lengths; pycocotools reads past the end of those that are cut.

    A character holds 5 bits of a number, the lowest first, and whether another one follows. From the fourth number on it is the
    difference from the number before the last.
    """
    runs, value, bits = list[int](), 0, 0
    for byte in code.encode():
        value |= (byte - 48 & 31) << bits
        bits += 5
        if not byte - 48 & 32:
            value -= (byte - 48 & 16) << bits - 4  # the highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return runs


def coco_index(content: Mapping[str, Any]) -> Any:
    """Return pycocotools' index of annotations, without its prints."""
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('COCO needs pycocotools: pip install "mvmae[detection]"') from error
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **content}
        coco.createIndex()
    return coco


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
        known = [item for item in truth.dataset["annotations"] if item[field]]  # an object may have a box alone
        with contextlib.redirect_stdout(io.StringIO()):
            true = coco_index(truth.dataset | {"annotations": known})
            detected = (
                true.loadRes(results) if results else coco_index(truth.dataset | {"annotations": []})
            )  # loadRes([]) raises
            evaluation = COCOeval(true, detected, kind)
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [float(value) * 100 if value >= 0 else -1.0 for value in evaluation.stats]
        numbers[name] = dict(zip(METRICS, values, strict=True))
    return numbers
