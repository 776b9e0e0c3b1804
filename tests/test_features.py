"""examples/tasks/monitor.py: looks at features, shared by processes and their loaders, of images that are not trained on."""

import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from running import EXAMPLES, run_processes, without_clock
from tiny_run import ARGUMENTS, end_of, pretrain, write_images
from torch.utils._python_dispatch import TorchDispatchMode

from mvmae.data import CentreCropTransform

sys.path.append(str(EXAMPLES))
from tasks.monitor import Monitor, extract

from engine.distributed import Processes
from tasks.splits import open_splits

ONE = Processes(0, 1, torch.device("cpu"), None)
LOADING = {"batch_size": 8, "workers": 0, "max_bad": 3}
MEAN, STD = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two classes of 30 images of noise, one reddish, one bluish, without a validation split."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 156, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 99
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def encode(images):
    """Means of nine places: one of each is taken from images of red and of blue."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)  # (B, 27)


def look(folder, processes, limit=50, encode=encode):
    splits, centre = open_splits(str(folder)), CentreCropTransform(32)
    monitor = Monitor(splits, centre, MEAN, STD, limit, processes, width=27, drift=True, **LOADING)
    return [monitor.look(encode) for _ in range(2)], monitor.start


def look_with_another(folder):
    seen = []

    def count(images):
        seen.append(len(images))
        return encode(images)

    processes = Processes(dist.get_rank(), 2, torch.device("cpu"), dist.new_group(backend="gloo"))
    return *look(folder, processes, encode=count), sum(seen)


def test_two_processes_share_a_look_and_see_what_one_does(classes, two_processes):
    alone, start = look(classes, ONE)
    assert alone[0].keys() == {"effective_rank", "uniformity", "knn"} and alone[1].keys() > {"similarity", "cka"}
    shared = two_processes(look_with_another, str(classes))
    for results, features, count in shared:
        assert results == [pytest.approx(numbers, rel=1e-5) for numbers in alone] and torch.allclose(features, start, atol=1e-6)
        assert count == 2 * (50 + 6) / 2  # two looks at 6 images held out and 50 of the others


class Loaded(CentreCropTransform):
    """White where the process is the one that looks, black where it is another."""

    def __call__(self, image, *, generator=None):
        return torch.full_like(super().__call__(image), 255 if os.getpid() == int(os.environ["LOOKING"]) else 0)


def test_loading_processes_prepare_the_images_of_a_look(classes, monkeypatch):
    monkeypatch.setenv("LOOKING", str(os.getpid()))
    for workers, value in ((0, 255), (2, 0)):
        loading = {**LOADING, "workers": workers}
        found, _ = extract(lambda x: {"": x.flatten(1)}, open_splits(str(classes)).val, Loaded(32), ONE, **loading)
        assert found[""].unique().tolist() == [value]


def test_few_images_held_out_are_no_collapse(tmp_path, classes):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for i in range(7):
            (tmp_path / name / f"{i}.png").symlink_to(classes / name / f"{i:02}.png")
    ((found, _), _) = look(tmp_path, ONE)
    assert found["knn"] == 100 and found["effective_rank"] > 3  # 2 held out, 12 neighbours


def both_signs(images):
    return {"a": encode(images.float()), "b": encode(-images.float())}


class Zeros(TorchDispatchMode):
    """Counts the tensors of zeros that are made, by their shapes."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes[tuple(result.shape) if func.overloadpacket.__name__ == "new_zeros" else ()] += 1
        return result


def test_room_for_all_features_is_made_once(classes):
    train = open_splits(str(classes)).train
    with Zeros() as zeros:
        found, labels = extract(both_signs, train, CentreCropTransform(32), ONE, **LOADING)
    assert zeros.shapes[54, 27] == 2 and found["a"].shape == (54, 27) and torch.equal(found["a"], -found["b"])
    assert labels.tolist() == train.labels.tolist()


def test_a_run_on_classes_without_a_validation_split_never_opens_what_it_holds_out(classes, tmp_path):
    held = [open_splits(str(classes)).val.name(i) for i in range(6)]
    (tmp_path / "some").mkdir()
    for path in classes.rglob("*.png"):
        place = tmp_path / "some" / path.relative_to(classes)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"held out" if str(path) in held else path.read_bytes())
    result = pretrain(tmp_path, "some", "--workers", 0, "--max-bad", 0, "--crop-scale", 0.9, 1)
    assert result.code == 0, result.err
    note = (
        "features are not measured (no validation split: one image of ten of each class is held out, the same in all scripts)"
    )
    assert note in result.out and "54 images, listed" in result.out
    assert end_of(tmp_path)["step"] == 5 * (54 // 8)
    looked = pretrain(tmp_path, "some", "--workers", 0, "--max-bad", 0, "--monitor-images", 99, "--output-dir", "other")
    assert looked.code == 1 and "10 images in a row cannot be used" in looked.err and "begins with b'held out'" in looked.err


def test_a_run_says_which_images_it_looks_at(classes, tmp_path):
    arguments = ["--workers", 0, "--max-steps", 2, "--monitor-images", 20]
    labelled = pretrain(tmp_path, classes, *arguments)
    assert labelled.code == 0 and "features are measured on 6 held-out images (" in labelled.out, labelled.err
    assert "k-NN accuracy on held-out images" in labelled.out.splitlines()[-1]
    (tmp_path / "flat").mkdir()
    flat = pretrain(tmp_path, write_images(tmp_path / "flat"), *arguments, "--output-dir", "other")
    assert flat.code == 0 and "32 images, listed" in flat.out and "k-NN" not in flat.out, flat.err
    assert "features are measured on 20 training images (no validation split and no classes: no image is held out)" in flat.out
    assert "effective_rank" in json.loads((tmp_path / "other" / "log.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("count", [30, 5])  # with 5 of a class one image is held out, and one process has none of it
def test_two_processes_of_a_run_look_at_what_one_does(classes, tmp_path, count):
    for name in ("red", "blue"):
        (tmp_path / "some" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "some" / name / f"{i}.png").symlink_to(classes / name / f"{i:02}.png")
    arguments = [*ARGUMENTS, "--monitor-images", 20, "--monitor-every", 1, "--epochs", 2, "--workers", 1, "--data", "../some"]
    runs = [run_processes("pretrain.py", *arguments, folder=tmp_path / f"{n}", count=n) for n in (1, 2)]
    assert [done.code for run in runs for done in run] == [0, 0, 0], runs
    lines = [(tmp_path / f"{n}" / "runs" / "quick" / "log.jsonl").read_text().splitlines() for n in (1, 2)]
    alone, shared = (without_clock(line for line in map(json.loads, text) if "uniformity" in line) for text in lines)
    assert len(alone) == 3 and [line["step"] for line in alone] == [line["step"] for line in shared]
    assert alone[0] == pytest.approx(shared[0], rel=1e-5) and all("knn" in line for line in alone + shared)
