"""COCO's files of annotations: read whole, checked at once, with the defaults of COCO's own tools.

Shapes: N records, H x W pixels.
"""

import contextlib
import io
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmae.weights import first_line
from tasks.dense import check_size

NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val")}


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
    items.refuse(outside.max(axis=1), must, items.column("bbox"))
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
    """Return an outline as polygons, without those of two corners, which pycocotools takes for boxes; None for none."""
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
