"""Transparent pictures train and are measured as if somebody had laid them on the background, in every script alike."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from running import EXAMPLES, run_script
from tiny_run import ARGUMENTS, losses

sys.path.append(str(EXAMPLES))
import pretrain
from engine.signals import Stop
from tasks.ade20k import LabelMaps
from tasks.coco import CocoData
from tasks.models import with_background

COLOUR = "#c05020"


def picture(rng, laid_on=""):
    """Noise with holes, or the same laid on a colour."""
    colours = np.array(Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((48, 40)))
    alpha = np.array(
        Image.fromarray(rng.integers(0, 2, (5, 6), dtype=np.uint8) * 255).resize((48, 40), Image.Resampling.NEAREST)
    )
    image = Image.fromarray(np.dstack([colours, alpha]))
    if not laid_on:
        return image
    ground = Image.new("RGB", image.size, laid_on)
    ground.paste(image.convert("RGB"), mask=Image.fromarray(alpha))
    return ground


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the same pictures of two classes transparent, on white and on a colour, and runs of two of them."""
    place = tmp_path_factory.mktemp("background")
    for folder, colour in (("holes", ""), ("white", "white"), ("coloured", COLOUR)):
        rng = np.random.default_rng(0)
        for number in range(24):
            path = place / folder / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(rng, colour).save(path)
    for run, folder, options in (
        ("run-white", "white", []),
        ("run-default", "holes", []),
        ("run-coloured", "coloured", ["--background", COLOUR]),
        ("run-holes", "holes", ["--background", COLOUR]),
    ):
        arguments = ["--data", folder, "--output-dir", f"{run}/run", *ARGUMENTS, "--epochs", 2, "--workers", 0, *options]
        done = run_script("pretrain.py", *arguments, folder=place)
        assert done.code == 0, done.err
    return place


def test_f46_pretraining_equals_that_on_pictures_laid_on_the_background(place):
    runs = {name: losses(place / f"run-{name}") for name in ("white", "default", "coloured", "holes")}
    assert runs["default"] == runs["white"] and runs["holes"] == runs["coloured"]
    assert runs["white"] != runs["coloured"] and len(runs["white"]) > 3
    recorded = {
        name: json.loads((place / f"run-{name}/run/encoder/config.json").read_text())["inputs"]["background"] for name in runs
    }
    assert recorded == {"white": "white", "default": "white", "coloured": COLOUR, "holes": COLOUR}


@pytest.mark.parametrize(
    ("script", "arguments", "results"),
    [
        (
            "finetune.py",
            ["--preset", "quick", "--epochs", 2, "--batch-size", 8, "--model"],
            ["results.json", "best/config.json"],
        ),
        ("linear_probe.py", ["--preset", "quick", "--epochs", 2, "--batch-size", 8, "--models"], ["results.json"]),
        ("visualize.py", ["--draw", "shares", "--models"], ["shares.json"]),
    ],
)
def test_f46_what_is_measured_takes_the_models_own_background(place, script, arguments, results):
    found = []
    for folder in ("holes", "coloured"):  # the same model, which was trained on the coloured background
        more = [] if script == "visualize.py" else ["--workers", 0]
        output = f"{script}-{folder}"
        given = ["--data", folder, "--output-dir", output, "--device", "cpu", *more, *arguments, "run-holes/run"]
        done = run_script(script, *given, folder=place)
        assert done.code == 0, done.err
        found.append([json.loads((place / output / name).read_text()) for name in results])
    assert [without_time(part) for part in found[0]] == [without_time(part) for part in found[1]]
    if script == "finetune.py":
        assert found[0][1]["inputs"]["background"] == COLOUR


def without_time(result):
    lines = result if isinstance(result, list) else [result]
    return [{key: value for key, value in line.items() if key not in ("seconds", "data")} for line in lines]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_f46_images_of_detection_and_segmentation_are_laid_on_the_background(tmp_path):
    pytest.importorskip("pycocotools")
    for folder in ("train2017", "annotations/training", "images/training"):
        (tmp_path / folder).mkdir(parents=True)
    image = picture(np.random.default_rng(1))
    expected = np.asarray(picture(np.random.default_rng(1), COLOUR))
    image.save(tmp_path / "train2017/x.png")
    image.save(tmp_path / "images/training/x.png")
    Image.new("L", image.size, 1).save(tmp_path / "annotations/training/x.png")
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    thing["segmentation"] = [[0, 0, 9, 0, 9, 9, 0, 9]]
    truth = {"images": [{"id": 1, "file_name": "x.png", "width": 48, "height": 40}], "annotations": [thing]}
    truth["categories"] = [{"id": 1, "name": "thing"}]
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(truth))
    seen = CocoData(tmp_path, "train", background=COLOUR)[0, 0][0]
    np.testing.assert_array_equal((seen * 255).round().permute(1, 2, 0), expected)
    seen = LabelMaps(tmp_path, "train", num_classes=1, background=COLOUR)[0, 0][0]
    np.testing.assert_array_equal(seen.permute(1, 2, 0), expected)


def test_a_background_that_is_none_is_refused(place):
    config = pretrain.Config(data="x")
    assert with_background(config, "vit_tiny_patch16_224").background == "white"
    assert with_background(config, f"{place}/run-holes/run").background == COLOUR
    chosen = pretrain.Config(data="x", background="black")
    assert with_background(chosen, f"random:{place}/run-holes/run").background == "black"
    with pytest.raises(ValueError, match="background must be a colour"):
        with_background(pretrain.Config(data="x", background="transparent"), "vit_tiny_patch16_224")
    with pytest.raises(Stop, match="no file or folder"):
        with_background(config, "./nowhere")
