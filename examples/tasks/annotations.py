"""COCO's files of annotations: read whole, checked at once, with the defaults of COCO's own tools."""

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

    def find(name: Any) -> str:
        below = str(name).replace("\\", "/")
        places = (f"{folder}/{below}", f"{root}/{below}") if ".." not in below.split("/") else ()
        return next(filter(os.path.isfile, places), "")

    names = images.column("file_name")
    paths = list(map(find, names))
    images.refuse((not path for path in paths), f"must name a file in {folder}", names)
    stated = zip(images.numbers("height", default=0), images.numbers("width", default=0), strict=True)
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(partial(check_size, source=file, max_pixels=max_pixels), paths, stated))
    image_ids = images.ids()
    for image, number, path, size in zip(images.records, image_ids.values(), paths, sizes, strict=True):
        image.update(id=number, path=path, height=size[0], width=size[1])

    category_ids, classes = categories.ids(), dict[str, int]()
    for text, name in zip(category_ids, categories.column("name"), strict=True):
        category_ids[text] = classes.setdefault(str(name), category_ids[text])

    image_of = items.references("image_id", "images", image_ids)
    size_of = dict(zip(image_ids.values(), sizes, strict=True))
    extent = [size_of[number] for number in image_of]
    corner, sides = np.split(items.numbers("bbox", (4,)), 2, axis=1)
    outside = (sides < 0) | (corner > np.array(extent).reshape(-1, 2)[:, ::-1]) | (corner + sides < 0)
    must = "must have left, top, width and height of a box in its picture as 'bbox'"
    items.refuse(outside.max(axis=1), must, items.column("bbox"))
    crowd, area = items.numbers("iscrowd", default=0), items.numbers("area", default=-1)
    items.refuse(crowd * (crowd - 1) != 0, "must have 0 or 1 as 'iscrowd'", crowd)
    given = items.column("segmentation", default=[])
    shapes = [outline(shape, *size) for shape, size in zip(given, extent, strict=True)]
    must = "must have polygons, or run lengths that make up its picture, as 'segmentation'"
    items.refuse((shape is False for shape in shapes), must, given)
    columns = {
        "id": range(1, 1 + len(shapes)),
        "image_id": image_of,
        "category_id": items.references("category_id", "categories", category_ids),
        "bbox": np.hstack([corner, sides]).tolist(),
        "area": np.where(area >= 0, area, sides.prod(axis=1)).tolist(),
        "iscrowd": crowd.astype(int).tolist(),
        "segmentation": shapes,
    }
    for item, values in zip(items.records, zip(*columns.values(), strict=True), strict=True):
        item.update(zip(columns, values, strict=True))
    named = [{"id": number, "name": name} for name, number in classes.items()]
    return file, coco_index({"images": images.records, "categories": named, "annotations": items.records})


class Table:
    """The records of a list in a JSON file, by columns: all are checked at once, and a ValueError names the first wrong one."""

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

        def read(values: Any, wanted: tuple[int, ...]) -> NDArray[np.float64] | None:
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                array = np.array(values, np.float64)
                return array if array.shape == wanted and np.isfinite(array).all() else None
            return None

        values = self.column(key, default)
        array = read(values, (len(values), *shape)) if values else np.empty((0, *shape))
        if array is None:
            must = f"must have {shape[0]} finite numbers" if shape else "must have a finite number"
            self.refuse((read(value, shape) is None for value in values), f"{must} as {key!r}", values)
        return array  # type: ignore[return-value]


def id_text(value: Any) -> str:
    """Return an id as text, the same one for 7, 7.0 and "7", since converters mix them."""
    return str(value).removesuffix(".0")


def outline(shape: Any, height: int, width: int) -> Any:
    """Return an outline as pycocotools takes it, None for an empty one, False for what is none.

    Run lengths have to make up the picture. Polygons [x, y, ...] have to be in or near it: of those far outside, pycocotools
    would follow each pixel. Those of two corners, which it takes for boxes, are left out.
    """
    try:
        if isinstance(shape, dict):
            counts = unpack(shape["counts"]) if isinstance(shape["counts"], str) else shape["counts"]
            fits = shape["size"] == [height, width] and min(counts) >= 0 and sum(counts) == width * height
            return fits and shape
        if not isinstance(shape, list):
            return False
        polygons = [shape] if shape and isinstance(shape[0], int | float) else shape
        if polygons and min(map(len, polygons)) < 6:
            polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        for polygon in polygons:
            x, y = polygon[::2], polygon[1::2]
            near = -width <= min(x) <= max(x) <= 2 * width and -height <= min(y) <= max(y) <= 2 * height
            if not near or len(x) != len(y) or not math.isfinite(sum(polygon)):  # NaN
                return False
        return polygons or None
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
