"""Runs of detect.py and segment.py: what they leave, cuts, evaluation alone, two processes, faults."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from running import run_processes, run_script
from tiny_run import assert_identical, assert_unfit_checkpoints_are_refused, end_of

SMALL = ["--preset", "toy", "--model-args", "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2", "--image-size", 32]
SMALL += ["--channels", 16, "--toy-images", 12, "--batch-size", 4, "--steps", 6, "--workers", 0, "--log-every", 1]
SMALL += ["--device", "cpu", "--pictures", 2, "--output-dir", "run"]
INPUTS = ["--mean", 0.4, 0.5, 0.3, "--std", 0.3, 0.2, 0.3, "--background", "red"]


@pytest.fixture(scope="module", params=["detect.py", "segment.py"])
def script(request):
    if request.param == "detect.py":
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    return request.param


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """Six steps in one go."""
    place = tmp_path_factory.mktemp("whole")
    result = run_script(script, *SMALL, *INPUTS, folder=place)
    assert result.code == 0, result.err
    assert "mean 0.4 0.5 0.3" in result.out and "--mean --std --background in place of the model's own" in result.out
    return place


def test_a_run_leaves_its_numbers_and_pictures(script, whole):
    assert (whole / "run/curves.png").exists() and (whole / "run/checkpoint.pt").exists()
    config, results = (json.loads((whole / "run" / name).read_text()) for name in ("config.json", "results.json"))
    assert config["inputs"]["mean"] == [0.4, 0.5, 0.3] and config["inputs"]["background"] == "red"
    assert config["notes"][0].startswith("training: ") and "images" in config["notes"][0]
    with Image.open(whole / "run/predictions.png") as picture:
        assert picture.width > 3 * 160 and picture.height > 160
    records = [json.loads(line) for line in (whole / "run/log.jsonl").read_text().splitlines()]
    rates = {"detect.py": [1e-6, *(5e-4 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 6))]}
    rates["segment.py"] = [2e-9, *(2e-3 * (1 - step / 6) for step in range(1, 6))]  # one step of warm-up
    assert [record["lr"] for record in records] == pytest.approx(rates[script], rel=1e-6)
    if script == "segment.py":
        assert set(results) == {"mIoU", "mAcc", "aAcc", "classes"}
        assert list(results["classes"]) == config["classes"] == ["background", "circle", "cross", "triangle"]
        with Image.open(whole / "run/toy/annotations/validation/00000.png") as labels:
            assert set(np.unique(np.array(labels))) <= {1, 2, 3, 4}
    else:
        assert {kind: len(numbers) for kind, numbers in results.items()} == {"box": 12, "mask": 12}
        assert config["classes"] == ["circle", "cross", "triangle"]
        for detection in json.loads((whole / "run/detections.json").read_text())[:3]:
            assert set(detection) == {"image_id", "category_id", "score", "bbox", "segmentation"}
            assert detection["category_id"] in (2, 5, 9)


def test_without_a_model_the_encoder_that_ships_is_taken(script, tmp_path):
    small = [*SMALL[4:], "--window-size", 2, "--steps", 1, "--pictures", 0]  # of the paper's preset
    result = run_script(script, "--data", "toy", *small, folder=tmp_path)
    assert result.code == 0 and "model: mvmae_vit_micro_patch8_64, " in result.out, result


@pytest.mark.posix
def test_a_run_that_was_killed_ends_bit_for_bit_as_an_uninterrupted_one(script, whole, tmp_path):
    killed = run_script(script, *SMALL, *INPUTS, "--save-every", 2, folder=tmp_path, fault="kill@3")
    assert killed.code == -9
    again = run_script(script, *SMALL, *INPUTS, "--save-every", 2, "--workers", 1, "--resume", folder=tmp_path)
    assert again.code == 0, again.err
    assert "after step 2" in again.out
    assert_identical(end_of(tmp_path), end_of(whole))
    assert (tmp_path / "run/results.json").read_text() == (whole / "run/results.json").read_text()


def test_f43_a_checkpoint_that_does_not_fit_is_refused_in_one_line(script, whole, tmp_path):
    assert_unfit_checkpoints_are_refused(whole, tmp_path, script, *SMALL, *INPUTS)


def test_evaluation_alone_gives_the_numbers_of_the_end_in_one_process_and_in_two(script, whole, tmp_path):
    """It reads how the images were read in the run's config.json."""
    before = (whole / "run/results.json").read_text()
    (whole / "run/results.json").unlink()
    result = run_script(script, *SMALL, "--evaluate", folder=whole)
    assert result.code == 0, result.err
    assert (whole / "run/results.json").read_text() == before
    (tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((whole / "run" / name).read_bytes())
    results = run_processes(script, *SMALL, "--evaluate", folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert json.loads((tmp_path / "run/results.json").read_text()) == json.loads(before)
    if script == "detect.py":
        one, two = (json.loads((place / "run/detections.json").read_text()) for place in (whole, tmp_path))
        assert len({found["image_id"] for found in one}) > 1
        assert sorted(two, key=json.dumps) == sorted(one, key=json.dumps)  # each image once
    nothing = run_script(script, *SMALL, "--output-dir", "other", "--evaluate", folder=tmp_path)
    assert (nothing.code, nothing.err) == (2, "error: --evaluate: other holds no checkpoint\n")


def test_two_processes_with_bf16_train_and_evaluate_together(script, tmp_path):
    results = run_processes(script, *SMALL, "--steps", 2, "--precision", "bf16", folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert (tmp_path / "run/results.json").exists()


def nan_in_the_third_gradient_of_rank_1():
    backward, calls = torch.Tensor.backward, []

    def spoilt(loss):
        calls.append(loss)
        backward(loss * float("nan") if len(calls) == 3 and os.environ["RANK"] == "1" else loss)

    torch.Tensor.backward = spoilt


def test_a_nan_on_one_rank_stops_both_before_the_optimizer(script, tmp_path):
    results = run_processes(script, *SMALL, folder=tmp_path, patch=nan_in_the_third_gradient_of_rank_1)
    assert [result.code for result in results] == [1, 1], results
    assert all("step 3: the gradient" in result.err and "Traceback" not in result.err for result in results), results
    state = end_of(tmp_path)
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())
    assert (tmp_path / "run/nonfinite.txt").exists() and not (tmp_path / "run/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "expected"), [("detect.py", ("mask", "AP50", 40)), ("segment.py", ("mIoU", 60))])
def test_the_toy_presets_reach_their_numbers(tmp_path, script, expected):
    if script == "detect.py":
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    result = run_script(script, "--preset", "toy", "--output-dir", "run", folder=tmp_path, timeout=900)
    assert result.code == 0, result.err
    *names, least = expected
    number = json.loads((tmp_path / "run/results.json").read_text())
    for name in names:
        number = number[name]
    assert number > least
