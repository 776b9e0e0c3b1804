"""detect.py: COCO in its variants, average precision, the recipes, the heads; `test_dense_runs` has whole runs."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from pictures import write_bomb
from PIL import Image
from running import EXAMPLES, run_script
from test_segment import lost_by_decay

pytest.importorskip("pycocotools", reason="pycocotools is not installed")
sys.path.insert(0, str(EXAMPLES))

from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import masks_to_boxes
from torchvision.tv_tensors import BoundingBoxes

import detect
from engine.options import parse
from engine.signals import Stop
from mvmae.hub import export
from mvmae.inputs import Inputs
from tasks.coco import CocoData, evaluate, jitter, to_coco
from tasks.dense import RGB, build_trunk, lr_factor
from tasks.shapes import coco_object, write_toy

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11
TINY = "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2"
SMALL = ["--model-args", TINY, "--image-size", 32, "--channels", 16, "--toy-images", 12, "--workers", 0, "--batch-size", 2]
SMALL += ["--steps", 2, "--log-every", 1, "--device", "cpu", "--pictures", 2]


def config_of(preset, *arguments):
    given = ["--preset", preset, "--data", "x", "--model", "random:mvmae_vit_base_patch16", *map(str, arguments)]
    config = parse(detect.Config, detect.PRESETS, None, given)
    return dataclasses.replace(config, fc_width=16, proposals=20) if preset == "toy" else config


def build(config, classes=2, **options):
    """The detector and its trunk."""
    trunk, inputs = build_trunk(config, EXAMPLES / "results", rebuild=True)  # any pictures of 8 bits
    return detect.build_model(config, trunk, inputs, classes, **options), trunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images with polygons, both kinds of run lengths, a crowd, category ids 3 and 17; the last one shows no object."""
    root, sizes = tmp_path_factory.mktemp("coco"), {7: (40, 60), 8: (60, 40), 9: (50, 50), 30: (33, 47)}
    mask = np.zeros((60, 40), np.uint8, "F")
    mask[10:50, 5:30] = 1
    code = run_lengths.encode(mask)
    compressed = {"size": code["size"], "counts": code["counts"].decode()}
    plain = {"size": [50, 50], "counts": [50 * 10 + 5, *[20, 30] * 19, 20, 50 * 20 + 25]}  # rows 5-25 of columns 10-30
    polygon, line = [[10, 5, 50, 5, 50, 30, 10, 30], [1, 1, 2, 2]], [[1, 1, 9, 9]]
    crowd = {"size": [50, 50], "counts": [50 * 30, 50 * 20]}  # columns 30-50
    given = [(7, 17, polygon, [10, 5, 40, 25], 0), (8, 3, compressed, [5, 10, 25, 40], 0), (9, 3, plain, [10, 5, 20, 20], 0)]
    given += [(9, 3, crowd, [30, 0, 20, 50], 1), (30, 3, line, [1, 1, 8, 8], 0)]
    names = ("image_id", "category_id", "segmentation", "bbox", "iscrowd")
    objects = [dict(zip(names, values, strict=True)) for values in given]
    objects = [item | {"id": n, "area": item["bbox"][2] * item["bbox"][3]} for n, item in enumerate(objects, start=1)]
    content = {"categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}]}
    content["images"] = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in sizes.items()]
    (root / "annotations").mkdir()
    for split, count in (("train2017", 5), ("val2017", 4)):  # pycocotools itself cannot evaluate outlines of two points
        (root / split).mkdir()
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content | {"annotations": objects[:count]}))
        for number, (height, width) in sizes.items():
            Image.new("RGB", (width, height), (90, 120, 60)).save(root / split / f"{number}.png")
    return root


def truth_as_detections(data):
    found = []
    for index in range(len(data)):
        _, target = data[0, index]
        ideal = target | {"scores": torch.ones(len(target["labels"]))}
        if "masks" in target:
            ideal["masks"] = target["masks"][:, None].float()
        found += to_coco(ideal, int(target["image_id"]), data.category_ids)
    return found


def test_the_truth_as_detections_has_an_average_precision_of_100_and_none_has_0(folder):
    data = CocoData(folder, "val")
    found = truth_as_detections(data)
    assert {item["category_id"] for item in found} == {3, 17}
    for numbers in evaluate(data.truth, found, data.image_ids).values():
        assert len(numbers) == 12 and numbers["AP"] == numbers["AP50"] == numbers["AR100"] == pytest.approx(100)
    for left, in_crowd in ((31, True), (0, False)):  # what lies in the crowd is no mistake; elsewhere it is
        mask = torch.zeros(1, 1, 50, 50)
        mask[..., 30:45, left : left + 9] = 1
        more = {"boxes": torch.tensor([[left, 30.0, left + 9, 45]]), "labels": torch.tensor([1]), "masks": mask}
        more = to_coco(more | {"scores": torch.tensor([2.0])}, 9, [3, 17])
        numbers = evaluate(data.truth, found + more, data.image_ids)["mask"]
        assert (numbers["AP"] == pytest.approx(100)) == in_crowd
    results = evaluate(data.truth, [], data.image_ids)
    assert results["box"]["AP"] == results["mask"]["AP50"] == results["mask"]["AR100"] == 0.0


def test_coco_is_read_in_all_its_variants(folder):
    train, val = CocoData(folder, "train"), CocoData(folder, "val")
    assert (train.image_ids, val.image_ids) == ([7, 8, 9], [7, 8, 9, 30])
    assert (train.names, train.counts) == (["car", "cat"], [2, 1])
    assert "1 images without any, 1 objects without an outline, 1 crowd regions" in train.note
    targets = [train[0, index][1] for index in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[2], [1], [1]]  # no crowd
    assert [target["boxes"].tolist() for target in targets] == [[[10, 5, 50, 30]], [[5, 10, 30, 50]], [[10, 5, 30, 25]]]
    empty = val[0, 3][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 33, 47)
    with pytest.raises(FileNotFoundError, match="as COCO's layout does"):
        CocoData(folder / "train2017", "train")


def edited(folder, root, edit, splits=("train2017", "val2017")):
    """A copy of a data set whose annotations a function changes, or replaces by what it returns."""
    shutil.copytree(folder, root)
    for split in splits:
        path = root / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        changed = edit(content)
        path.write_text(changed if isinstance(changed, str) else json.dumps(content))
    return root


def every(table, change):
    """An edit of all records of a table."""
    return lambda content: [change(item) for item in content[table]] and None


def drop_outlines(content):
    for item in content["annotations"]:
        item.pop("segmentation")


def drop_all_that_has_a_default(content):
    content.pop("info", None)
    for item in content["images"]:
        item.pop("width"), item.pop("height")
    for item in content["annotations"]:
        for name in ("id", "area", *([] if item.get("iscrowd") else ["iscrowd"])):
            item.pop(name, None)


def flatten_polygons(content):
    content["annotations"][0]["segmentation"] = content["annotations"][0]["segmentation"][0]


def mix_kinds_of_ids(content):
    for item in content["images"]:
        item["id"] = f"photo-{item['id']}"
    for item in content["annotations"]:
        item.update(image_id=f"photo-{item['image_id']}", category_id=float(item["category_id"]), area=None)


def write_paths_of_windows(content):
    for item in content["images"]:
        item["file_name"] = f"val2017\\{item['file_name']}"


DEFAULTS = [drop_all_that_has_a_default, every("annotations", lambda item: item.update(id=item["id"] - 1)), flatten_polygons]
DEFAULTS += [mix_kinds_of_ids, write_paths_of_windows]


@pytest.mark.parametrize("edit", DEFAULTS)
def test_what_converters_leave_out_or_number_otherwise_changes_nothing(folder, tmp_path, edit):
    """To pycocotools alone, missing keys are a KeyError after training, and a match with id 0 is none."""
    data, plain = CocoData(edited(folder, tmp_path / "data", edit, ["val2017"]), "val"), CocoData(folder, "val")
    for index in range(4):
        one, other = data[0, index], plain[0, index]
        assert torch.equal(one[0], other[0])
        assert all(torch.equal(one[1][name], other[1][name]) for name in ("labels", "boxes", "masks"))
    for numbers in evaluate(data.truth, truth_as_detections(data), data.image_ids).values():
        assert numbers["AP"] == numbers["AR100"] == pytest.approx(100)


def test_average_precision_is_that_of_pycocotools_with_ids_from_1_on(folder, tmp_path):
    """Detections of several scores and places; one annotation of the file is numbered 0, one object has a box alone."""

    def number_from_0(content):
        for number, item in enumerate(content["annotations"]):
            item["id"] = number
        content["annotations"].append({"id": 9, "image_id": 30, "category_id": 17, "bbox": [3, 3, 20, 20]})

    data = CocoData(edited(folder, tmp_path / "data", number_from_0), "val")
    found = truth_as_detections(data)
    for number, item in enumerate(list(found)):
        left, top, width, height = item["bbox"]
        found.append(item | {"bbox": [left + 3, top + 1, width, height - 2], "score": 0.9 - 0.2 * number})
        found.append(item | {"bbox": [left + 9, top, width, height], "score": 1.5 - number})
    content = json.loads((tmp_path / "data/annotations/instances_val2017.json").read_text())
    for number, item in enumerate(content["annotations"], start=1):
        item.update(id=number, iscrowd=item.get("iscrowd", 0), area=item["bbox"][2] * item["bbox"][3])
    (tmp_path / "numbered.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "numbered.json")
        boxes = [{name: item[name] for name in ("image_id", "category_id", "bbox", "score")} for item in found]
        theirs = COCOeval(truth, truth.loadRes(boxes), "bbox")
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    ours = evaluate(data.truth, found, data.image_ids)
    expected = [100 * value if value >= 0 else -1 for value in theirs.stats]
    assert list(ours["box"].values()) == pytest.approx(expected) and 5 < ours["box"]["AP"] < 95
    assert ours["mask"]["AP50"] > 5  # over objects with an outline


def renumbered(content):
    """Other ids for the same names, one of which has two, and none for one class."""
    content["categories"] = [{"id": 3, "name": "cat"}, {"id": 0, "name": "cat"}, {"id": "z", "name": "car"}]
    for item in content["annotations"]:
        item["category_id"] = 0 if item["category_id"] == 17 else "z"


def test_classes_of_both_splits_are_matched_by_name(folder, tmp_path):
    train = CocoData(edited(folder, tmp_path / "data", renumbered, ["val2017"]), "train")
    data = CocoData(tmp_path / "data", "val", names=train.names)
    assert data.names == train.names == ["car", "cat"]
    assert [data[0, index][1]["labels"].tolist() for index in range(3)] == [[2], [1], [1]]
    assert evaluate(data.truth, truth_as_detections(data), data.image_ids)["box"]["AP"] == pytest.approx(100)

    def lose_cats(content):
        content["categories"], content["annotations"] = content["categories"][1:], content["annotations"][1:]

    fewer = CocoData(edited(folder, tmp_path / "fewer", lose_cats, ["val2017"]), "val", names=train.names)
    assert (fewer.names, fewer.counts) == (["car", "cat"], [2, 0]) and len({*fewer.category_ids}) == 2
    edited(folder, tmp_path / "more", lambda content: content["categories"].append({"id": 5, "name": "dog"}), ["val2017"])
    with pytest.raises(ValueError, match=r"instances_val2017\.json must have classes of training images alone, got dog too"):
        CocoData(tmp_path / "more", "val", names=train.names)


def put(table, number, **values):
    return lambda content: content[table][number].update(values)


def take(table, number, name):
    return lambda content: content[table][number].pop(name) and None


CUT = {"size": [60, 40], "counts": "n5Y1"}
WRONG = {
    "list": (lambda content: json.dumps([content]), "must be JSON in COCO's format"),
    "number": (lambda content: "7", "must be JSON in COCO's format"),
    "no JSON": (lambda content: "{", "must be JSON in COCO's format"),
    "nested": (lambda content: "[" * 100_000, "must be JSON in COCO's format"),
    "no images": (lambda content: content.pop("images") and None, "KeyError: 'images'"),
    "no categories": (lambda content: content.pop("categories") and None, "KeyError: 'categories'"),
    "text for a table": (lambda content: content.update(annotations="x"), "'x' as annotations"),
    "text for an annotation": (lambda content: content["annotations"].insert(1, "x"), r"annotations\[1\] must be an object"),
    "no box": (take("annotations", 1, "bbox"), r"annotations\[1\] must have 'bbox'"),
    "no class": (take("annotations", 1, "category_id"), r"annotations\[1\] must have 'category_id'"),
    "no name": (take("categories", 1, "name"), r"categories\[1\] must have 'name'"),
    "no file": (take("images", 1, "file_name"), r"images\[1\] must have 'file_name'"),
    "one id twice": (put("images", 2, id=7), r"images\[0\] must have an id of its own, got 7"),
    "another class": (put("annotations", 2, category_id=77), r"annotations\[2\] must name one of the categories .* got 77"),
    "a list for an id": (put("annotations", 0, image_id=[7]), r"annotations\[0\] must name one of the images .* got \[7\]"),
    "3 numbers": (
        put("annotations", 1, bbox=[1, 2, 3]),
        r"annotations\[1\] must have 4 finite numbers as 'bbox', got \[1, 2, 3\]",
    ),
    "5 numbers": (every("annotations", lambda item: item["bbox"].append(1)), r"annotations\[0\] must have 4 finite numbers"),
    "NaN": (put("annotations", 1, bbox=[1, 2, 3, float("nan")]), r"annotations\[1\] must have 4 finite numbers"),
    "infinite": (put("annotations", 1, bbox=[1, 2, float("inf"), 3]), r"annotations\[1\] must have 4 finite numbers"),
    "10^400": (put("annotations", 1, bbox=[1, 2, 10**400, 3]), r"annotations\[1\] must have 4 finite numbers"),
    "words": (put("annotations", 1, bbox=["a", 2, 3, 4]), r"annotations\[1\] must have 4 finite numbers"),
    "outside": (put("annotations", 1, bbox=[900, 900, 5, 5]), r"annotations\[1\] must have left, .* got \[900, 900, 5, 5\]"),
    "negative": (put("annotations", 1, bbox=[9, 9, -5, 5]), r"annotations\[1\] must have left"),
    "crowd": (put("annotations", 1, iscrowd="yes"), r"annotations\[1\] must have a finite number as 'iscrowd'"),
    "odd polygon": (put("annotations", 0, segmentation=[[1, 1, 5, 5, 9, 1, 3]]), r"annotations\[0\] must have polygons"),
    "polygon of words": (put("annotations", 0, segmentation=[["a"] * 6]), r"annotations\[0\] must have polygons"),
    "text for an outline": (put("annotations", 0, segmentation="7" * 9), r"annotations\[0\] must have polygons"),
    "polygon with NaN": (
        put("annotations", 0, segmentation=[[1, 1, 5, float("nan"), 9, 1]]),
        r"annotations\[0\] must have polygons",
    ),
    "far polygon": (put("annotations", 0, segmentation=[[1, 1, 5, 5, 1e9, 1]]), r"annotations\[0\] must have polygons"),
    "run lengths": (
        put("annotations", 2, segmentation={"size": [50, 50], "counts": [2499]}),
        r"annotations\[2\] must have polygons",
    ),
    "negative run": (put("annotations", 2, segmentation={"size": [50, 50], "counts": [2600, -100]}), r"annotations\[2\] must"),
    "cut code": (put("annotations", 1, segmentation=CUT), r"annotations\[1\] must have polygons"),
    "size": (put("annotations", 1, segmentation={"size": [40, 60], "counts": [2400]}), r"annotations\[1\] must have polygons"),
    "no counts": (put("annotations", 1, segmentation={"size": [40, 60]}), r"annotations\[1\] must have polygons"),
    "parent": (put("images", 1, file_name="../val2017/7.png"), r"images\[1\] must name a file in .* got '\.\./val2017/7\.png'"),
    "parent on Windows": (put("images", 1, file_name="a\\..\\7.png"), r"images\[1\] must name a file in"),
    "absolute": (put("images", 1, file_name="/etc/passwd"), r"images\[1\] must name a file in .* got '/etc/passwd'"),
    "missing": (put("images", 3, file_name="a.png"), r"images\[3\] must name a file in .*, got 'a\.png'"),
    "FIFO": (put("images", 3, file_name="fifo"), r"images\[3\] must name a file in .*, got 'fifo'"),
    "other size": (put("images", 1, width=60_000, height=60_000), r"8\.png must have 60000x60000 pixels, as .*, got 40x60"),
    "turned": (put("images", 0, width=40, height=60), r"7\.png must have 40x60 pixels, as .* says, got 60x40"),
    "bomb": (put("images", 0, file_name="bomb.png"), r"bomb\.png.* more than the limit"),
    "all crowd": (
        every("annotations", lambda item: item.update(iscrowd=1)),
        "must hold objects with .* got . annotations, . of them",
    ),
}


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_annotations_are_refused_by_file_and_number(folder, tmp_path, name, split):
    edit, words = WRONG[name]
    root = edited(folder, tmp_path / "data", edit, [split])
    if name == "FIFO":
        os.mkfifo(root / split / "fifo") if hasattr(os, "mkfifo") else pytest.skip("no FIFO here")
    if name == "bomb":
        write_bomb(root / split / "bomb.png")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        CocoData(root, "train"), CocoData(root, "val")
    assert "\n" not in str(error.value)
    assert name == "bomb" or f"instances_{split}.json" in str(error.value)


@pytest.mark.parametrize(("orientation", "back"), [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)])
def test_images_are_upright_as_their_annotations_are(folder, tmp_path, orientation, back):
    """Labelling tools draw on the image as it is seen; orientation 6 is stored turned to the left."""
    root, pixels = tmp_path / "data", np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    shutil.copytree(folder, root)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).transpose(back).save(root / "val2017/7.png", exif=exif)
    seen, _ = CocoData(root, "val")[0, 0]
    np.testing.assert_array_equal((255 * seen).round().permute(1, 2, 0), pixels)


@pytest.mark.parametrize("name", ["train2017", "pictures"])
def test_the_range_of_deep_images_is_decided_by_those_of_training(name, tmp_path):
    """Also where file_name begins at the data's folder and not in train2017."""
    (tmp_path / name).mkdir()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / name / "a.tiff")
    assert build_trunk(config_of("toy"), tmp_path / "train2017")[1].value_range == (0, 1)


def test_run_lengths_of_a_drawn_shape_are_those_of_pycocotools():
    mask = np.zeros((5, 8), np.uint8)
    mask[1:3, 2:7] = 1
    shape = coco_object(mask)
    np.testing.assert_array_equal(run_lengths.decode(run_lengths.frPyObjects(shape["segmentation"], 5, 8)), mask)
    assert (shape["bbox"], shape["area"]) == ([2, 1, 5, 2], 10)


def test_images_are_read_as_the_record_of_the_encoder_says(folder, tmp_path):
    """12 bits in 16, transparency, one channel: against numpy."""
    root, values = tmp_path / "data", np.random.default_rng(0).integers(0, 4096, (40, 60), dtype=np.uint16)
    shutil.copytree(folder, root)
    Image.fromarray(values).save(root / "val2017/7.png")
    Image.new("RGBA", (40, 60), (0, 0, 0, 0)).save(root / "val2017/8.png")
    inputs = dataclasses.replace(RGB, value_range=(0, 4095), background="#102030")
    data = CocoData(root, "val", inputs=inputs)
    np.testing.assert_allclose(data[0, 0][0][1] * 255, np.rint(values / 4095 * 255), atol=0.01)
    assert (data[0, 1][0] * 255).round()[:, 5, 5].tolist() == [16, 32, 48]
    grey = CocoData(root, "val", inputs=Inputs((32, 32), (0.5,), (0.5,)))
    assert grey[0, 0][0].shape == (1, 40, 60)


def test_boxes_that_reach_beyond_their_picture_end_at_its_border(folder, tmp_path):
    root = edited(
        folder,
        tmp_path / "data",
        lambda content: (drop_outlines(content), put("annotations", 0, bbox=[-9, 5, 900, 9])(content))[1],
    )
    assert CocoData(root, "train")[0, 0][1]["boxes"].tolist() == [[0, 5, 60, 14]]


def boxes_in(image, *boxes):
    return BoundingBoxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), format="XYXY", canvas_size=image.shape[1:])


def test_each_pixel_has_the_mask_and_the_box_of_the_place_that_it_comes_from():
    """The image tells where: its red is the column that a pixel comes from, its green the row."""
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(120), indexing="ij")
    image = torch.stack([columns, rows, rows]).to(torch.uint8)
    masks = torch.stack([(rows // 15 + columns // 20) % 2, (rows >= 20) & (columns > 30)]).to(torch.uint8)
    seen, mirrored = 0, set()
    for seed in range(30):
        torch.manual_seed(seed)
        scale = 0.5 + seed / 20
        pixels, found, (box,) = jitter(image, masks, boxes_in(image, [31, 20, 120, 90]), 64, (scale, scale))
        factor = 64 * scale / 120
        part = (min(int(64 / factor), 90), min(int(64 / factor), 120))
        assert list(pixels.shape[1:]) == pytest.approx([min(length * factor, 64) for length in part], abs=1.1)
        assert found.dtype == torch.uint8
        tight = masks_to_boxes(found[1:])[0] + torch.tensor([0, 0, 1, 1]) if found[1].any() else box
        torch.testing.assert_close(torch.as_tensor(box), tight, atol=0.51 + factor / 2, rtol=0)
        for y in range(2, pixels.shape[1] - 2, 5):
            for x in range(2, pixels.shape[2] - 2, 5):
                column, row, _ = pixels[:, y, x].tolist()
                for mask, plane in zip(masks, found, strict=True):
                    near = mask[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
                    if (near == near[0, 0]).all():
                        assert plane[y, x] == near[0, 0], (seed, y, x)
                        seen += 1
        across = pixels[0, 0, -1].float() - pixels[0, 0, 0].float()
        assert abs(abs(across) / (pixels.shape[2] - 1) * factor - 1) < 0.1  # one scale, and no other, wherever it is cut
        mirrored.add(bool(across < 0))
    assert seen > 1000 and mirrored == {False, True}
    narrow = jitter(torch.zeros(3, 2, 900, dtype=torch.uint8), image[:0, :2], boxes_in(image), 64, (0.1, 0.1))[0]
    assert narrow.shape == (3, 1, 6)  # keeps a pixel


def test_the_jitter_of_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    options = {"side": 32, "scale": (0.5, 2.0)}
    first, second = CocoData(folder, "train", **options), CocoData(folder, "train", **options)
    second[0, 0]
    state = torch.random.get_rng_state()
    assert torch.equal(first[0, 1][0], second[0, 1][0])
    assert torch.equal(torch.random.get_rng_state(), state)
    others = (first[1, 1][0], CocoData(folder, "train", **options, seed=1)[0, 1][0])
    assert not any(other.shape == first[0, 1][0].shape and torch.equal(first[0, 1][0], other) for other in others)
    image, target = first[3, 0]
    for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert image.shape[1:] == target["masks"].shape[1:]
    assert {type(value) for value in (image, *target.values())} == {torch.Tensor}


def test_objects_may_be_boxes_alone(folder, tmp_path):
    root, options, lost = edited(folder, tmp_path / "boxes", drop_outlines), {"side": 32, "scale": (0.3, 5.0)}, 0
    data, val = CocoData(root, "train"), CocoData(root, "val")
    assert not data.with_masks and CocoData(folder, "train").with_masks
    assert data.image_ids == val.image_ids == [7, 8, 9, 30]  # of the line of two points there is a box
    targets = [data[0, index][1] for index in range(3)]
    assert [target["boxes"].tolist() for target in targets] == [[[10, 5, 50, 30]], [[5, 10, 30, 50]], [[10, 5, 30, 25]]]
    assert [set(target) for target in targets] == [{"boxes", "labels", "image_id"}] * 3
    with_masks, alone = CocoData(folder, "train", **options), CocoData(root, "train", **options)
    for epoch, index in ((epoch, index) for epoch in range(40) for index in range(3)):
        (image, target), (same, boxed) = with_masks[epoch, index], alone[epoch, index]
        assert torch.equal(image, same)
        assert (boxed["boxes"][:, 2:] > boxed["boxes"][:, :2]).all() and len(boxed["boxes"]) == len(boxed["labels"])
        lost += not len(boxed["boxes"])
        if len(target["boxes"]):  # rectangles: the box is the mask's, to half a pixel
            torch.testing.assert_close(boxed["boxes"], target["boxes"], atol=0.51, rtol=0)
            assert torch.equal(boxed["labels"], target["labels"])
    assert lost > 0
    results = evaluate(val.truth, truth_as_detections(val), val.image_ids, with_masks=False)
    assert list(results) == ["box"] and results["box"]["AP"] == pytest.approx(100)


def test_a_run_on_boxes_alone_leaves_the_numbers_of_boxes(tmp_path):
    toy = write_toy(tmp_path / "toy", side=32, train=6, val=4)
    edited(toy, tmp_path / "boxes", drop_outlines)
    edited(toy, tmp_path / "mixed", drop_outlines, ["val2017"])
    arguments = ["--preset", "toy", *SMALL, "--output-dir", "run"]
    result = run_script("detect.py", *arguments, "--data", "mixed", folder=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "must both have masks, or both boxes alone" in result.err
    result = run_script("detect.py", *arguments, "--data", "boxes", folder=tmp_path)
    assert result.code == 0, result.err
    assert list(json.loads((tmp_path / "run/results.json").read_text())) == ["box"]
    assert (tmp_path / "run/predictions.png").exists() and "mask" not in result.out


def test_mask_r_cnn_on_vit_b_has_as_many_parameters_as_published():
    with torch.device("meta"):  # MIMDet's model has 118.67 M
        model, _ = build(config_of("li2021"), 80)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(118.6, rel=0.003)


def test_the_recipe_of_li2021_reaches_optimizer_schedule_and_model():
    config = config_of("li2021", "--model-args", "depth=4 embed_dim=48 num_heads=3")
    model, trunk = build(config, 80)
    lost = lost_by_decay(model, trunk, config)
    full = pytest.approx(8e-5 * 0.1, rel=1e-2)
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "patch_embed.proj.weight"):
        assert lost[f"backbone.trunk.{name}"] == full  # no layer decay, biases decay
    assert lost["roi_heads.box_predictor.cls_score.weight"] == full
    for name in ("pos_embed", "blocks.0.attn.rel_pos_h", "blocks.0.norm1.weight", "blocks.0.norm2.bias"):
        assert lost[f"backbone.trunk.{name}"] == 0
    assert lost["backbone.fpn.inner_blocks.0.1.weight"] == 0
    assert config.steps == 184_375
    assert lr_factor(0, config) == pytest.approx(0.001)
    assert lr_factor(461, config) == pytest.approx(1, abs=1e-4)
    assert lr_factor(92_188, config) == pytest.approx(0.5, abs=1e-4)
    assert lr_factor(184_375, config) == pytest.approx(0)
    assert trunk.grid_size == (64, 64)
    assert [block.attn.window for block in trunk.blocks] == [None] * 4  # of 4 blocks each is the last of its quarter
    assert [round(getattr(block.drop_path1, "drop_prob", 0.0), 3) for block in trunk.blocks] == [0, 0.033, 0.067, 0.1]
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (2000, 1000)
    seen, _ = model.transform([torch.zeros(3, 20, 40), torch.zeros(3, 900, 7)])
    assert (seen.image_sizes, seen.tensors.shape) == ([(20, 40), (900, 7)], (2, 3, 1024, 1024))  # the jitter's sizes, filled up
    model.eval()
    seen, _ = model.transform([torch.zeros(3, 20, 40)])
    assert (seen.image_sizes, seen.tensors.shape) == ([(512, 1024)], (1, 3, 1024, 1024))
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (1000, 1000)
    deep = build(config_of("li2021", "--model-args", "depth=12 embed_dim=48 num_heads=3"))[1]
    assert deep.taps == (2, 5, 8, 11)
    assert [block.attn.window is None for block in deep.blocks] == [False, False, True] * 4
    assert deep.blocks[0].attn.window == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("depht=3", "has no depht"), ("img_size=56 patch_size=14 embed_dim=32 depth=4 num_heads=2", "16 or 32 pixels, got 14x14")],
)
def test_models_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(Stop, match=words):
        build(config_of("toy", "--model-args", arguments, "--image-size", 56))


@torch.no_grad()
def test_boxes_are_exact_under_autocast():
    """Above 512 pixels bf16 has a grid of 4: with the heads' outputs fixed, nothing of a box may depend on it."""
    size = ["--model-args", TINY.replace("patch_size=8", "patch_size=32"), "--image-size", 640]
    model, _ = build(dataclasses.replace(config_of("toy", *SMALL, *size), proposals=200))
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, *model.roi_heads.box_predictor.children()):
        layer.weight.zero_()
    model.rpn.head.bbox_pred.bias.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4] * 3))
    model.roi_heads.box_predictor.bbox_pred.bias.copy_(torch.tensor([0.3, 0.7, -0.2, 0.6] * 3))
    image, box = torch.rand(3, 640, 640), torch.tensor([[541.8, 424.8, 562.7, 445.0]])
    mask = torch.zeros(1, 640, 640, dtype=torch.uint8)
    mask[:, 425:445, 542:563] = 1
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": mask}
    boxes, named = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), sdpa_kernel(SDPBackend.MATH):  # as any machine has it
            boxes.append(model.eval()([image])[0]["boxes"])
            torch.manual_seed(0)  # for the sampling of regions
            named.append(model.train()([image], [target]))
    assert boxes[1].dtype == torch.float32 and len(boxes[0]) == 100
    torch.testing.assert_close(boxes[1], boxes[0])
    for name in ("loss_rpn_box_reg", "loss_box_reg"):
        torch.testing.assert_close(named[1][name], named[0][name])


@pytest.mark.parametrize("with_masks", [True, False])
def test_detection_learns_one_batch_and_objects_may_be_absent(folder, tmp_path, with_masks):
    config = dataclasses.replace(config_of("toy", *SMALL), regions=16)
    model, _ = build(config, 2, with_masks=with_masks)
    assert type(model).__name__ == ("MaskRCNN" if with_masks else "FasterRCNN")
    data, values = CocoData(folder if with_masks else edited(folder, tmp_path / "boxes", drop_outlines), "val"), []
    batch = [data[0, 0], data[0, 3]]  # one with an object, one without
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        torch.manual_seed(0)
        parts = detect.losses(model, batch, device=torch.device("cpu"))
        assert ("loss_mask" in parts) == with_masks
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    alone = detect.losses(model, batch[1:], device=torch.device("cpu"))
    assert all(torch.isfinite(value) for value in alone.values())


def test_masks_boxes_and_scores_are_drawn_on_the_enlarged_image():
    image, mask = torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 20:40, 10:50] = 1
    found = {"labels": torch.tensor([1]), "masks": mask, "boxes": torch.tensor([[10.0, 20.0, 50.0, 40.0]])}
    plain, truth = detect.draw(image, {name: x[:0] for name, x in found.items()}), detect.draw(image, found)
    torch.testing.assert_close(plain, image.repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1 / 255, rtol=0)
    changed = (plain != truth).any(0)
    assert changed[80:160, 40:200].float().mean() > 0.9 and not changed[:79].any() and not changed[:, :39].any()
    assert (detect.draw(image, found | {"scores": torch.tensor([0.87])}) != truth).any(0).sum() > 20


def test_an_exported_encoder_can_be_evaluated_and_compared_with_a_random_one(tmp_path):
    """Both build the exported architecture without its weights, and positions of a larger image are built anew."""
    vit = timm.create_model("mvmae_vit_tiny_patch16", img_size=16, patch_size=8, embed_dim=24, depth=4, num_heads=3)
    export(vit, tmp_path / "encoder")
    arguments = ["--preset", "toy", *SMALL, "--model-args", "", "--model", "encoder", "--output-dir", "run"]
    assert run_script("detect.py", *arguments, folder=tmp_path).code == 0
    before = (tmp_path / "run/results.json").read_bytes()
    result = run_script("detect.py", *arguments, "--evaluate", folder=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "run/results.json").read_bytes() == before
    names = (str(tmp_path / "encoder"), f"random:{tmp_path / 'encoder'}")
    models = [build(config_of("toy", *SMALL, "--model-args", "", "--model", name))[1] for name in names]
    assert torch.equal(models[0].pos_embed, models[1].pos_embed)
    assert not torch.equal(models[0].blocks[0].attn.qkv.weight, models[1].blocks[0].attn.qkv.weight)
