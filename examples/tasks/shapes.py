"""A data set of drawn shapes, to try detection and segmentation without images of your own."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mvmae.data import sample_seed

CIRCLE = [(math.cos(math.tau * corner / 48), math.sin(math.tau * corner / 48)) for corner in range(48)]
CROSS = [(1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35)]
CROSS += [(-x, -y) for x, y in CROSS]
TRIANGLE = [(0, -1), (0.87, 0.5), (-0.87, 0.5)]
SHAPES = {2: ("circle", CIRCLE), 5: ("cross", CROSS), 9: ("triangle", TRIANGLE)}
"""The drawn categories: name and corners by id. The ids leave gaps, as COCO's do."""
STRIPE = 4  # pixels of the stripes of a cross and of the squares of a triangle; a circle is plain


def draw_shapes(side: int, rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, NDArray[np.uint8]]]]:
    """Draw up to three shapes on a noisy gradient: the image, and the category id of each and the mask of what is seen."""
    ramp = np.linspace(0, 1, side)[:, None, None] * rng.uniform(-60, 60, 3) + rng.uniform(60, 195, 3)
    image = Image.fromarray((ramp + rng.normal(0, 12, (side, side, 3))).clip(0, 255).astype(np.uint8))
    shapes: list[tuple[int, NDArray[np.uint8]]] = []
    for _ in range(rng.integers(1, 4) if rng.random() < 0.9 else 0):
        category, radius, turn = int(rng.choice(list(SHAPES))), rng.uniform(0.15, 0.28) * side, rng.uniform(-0.3, 0.3)
        x, y = rng.uniform(radius, side - radius, 2)
        down, across = radius * math.sin(turn), radius * math.cos(turn)
        corners = [(x + across * a - down * b, y + down * a + across * b) for a, b in SHAPES[category][1]]
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).polygon(corners, fill=1)
        covered = np.array(mask)
        row, column = np.indices(covered.shape) // STRIPE
        second = {2: 0, 5: column, 9: row + column}[category] % 2
        colours = rng.integers(0, 256, (2, 3), np.uint8)[second + np.zeros_like(row)]
        image.paste(Image.fromarray(colours), mask=Image.fromarray(covered * np.uint8(255)))
        shapes = [(number, shape * (1 - covered)) for number, shape in shapes] + [(category, covered)]
    return image, [(number, shape) for number, shape in shapes if shape.sum() >= 20]


def coco_object(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """Describe a mask as COCO does: run lengths of its columns, of zeros first; box (left, top, width, height); area."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {"segmentation": {"size": list(mask.shape), "counts": counts}, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}


def write_toy(root: Path, *, side: int, train: int, val: int, seed: int = 0) -> Path:
    """Draw a data set of shapes, both in COCO's format and, as label maps, in ADE20K's layout; the same for the same seed."""
    for coco, ade, count in (("train2017", "training", train), ("val2017", "validation", val)):
        categories = [{"id": number, "name": name} for number, (name, _) in SHAPES.items()]
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": categories}
        for folder in (coco, f"images/{ade}", f"annotations/{ade}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, shapes = draw_shapes(side, np.random.default_rng(sample_seed(seed, coco == "val2017", number)))
            labels, name = np.ones((side, side), np.uint8), f"{number:05}.png"
            for category, mask in shapes:
                labels[mask > 0] = 2 + list(SHAPES).index(category)
                place = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category}
                content["annotations"].append(place | coco_object(mask))
            image.save(root / coco / name)
            image.save(root / "images" / ade / name)
            Image.fromarray(labels).save(root / "annotations" / ade / name)
            content["images"].append({"id": number, "file_name": name, "width": side, "height": side})
        (root / f"annotations/instances_{coco}.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("\n".join(("background", *(name for name, _ in SHAPES.values()))))
    return root
