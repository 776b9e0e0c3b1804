import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
from matplotlib import pyplot
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel

import mvmae

sys.path.insert(0, str(EXAMPLES))

import ablate
from engine.options import parse
from engine.signals import Signals, Stop
from tasks import comparison
from tasks.comparison import MEASURES, summarise
from tasks.flops import flops_per_image

TINY = f"--preset quick --encoder-args '{SMALL}' --image-size 32 --decoder-dim 16 --decoder-depth 1 --batch-size 8 --device cpu"
TINY += " --epochs 2 --warmup-epochs 0.5 --workers 0 --eval-images 0 --log-every 1 --save-every 2"
FINETUNE = "--preset quick --epochs 1 --warmup-epochs 0 --batch-size 8 --workers 0 --device cpu"
PROBE = "--preset quick --epochs 1 --batch-size 8 --workers 0 --device cpu"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of 20 images: reddish and bluish noise."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("red", "blue")):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 128, (36, 36, 3), dtype=np.uint8)
            pixels[..., 2 * number] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def arguments(photographs, *more):
    given = ["--data", photographs, "--output-dir", "ablation", "--budget", "flops", "--seeds", 0]
    given += ["--pretrain", TINY, "--finetune", "", "--probe", PROBE, *more]
    return list(map(str, given))


def read(photographs, *more):
    return parse(ablate.Config, ablate.PRESETS, None, arguments(photographs, *more))


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Scripts that leave results and train nothing; a list of the options that each call of them has."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def stand_in(file, results):
        def main(config):
            folder = Path(config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(results))
            ran.append(config)

        return main

    results = {"pretrain": {}, "finetune": {"top1": 70.0}, "probe": [{"knn": 50.0, "linear": 60.0}]}
    for name, file in ablate.LAST.items():
        monkeypatch.setattr(ablate.SCRIPTS[name], "main", stand_in(file, results[name]))
    return ran


def run_of(name):
    """The one folder of an arm of seed 0."""
    (folder,) = Path("ablation").glob(f"{name}-seed0-*")
    return folder


@pytest.mark.posix
def test_a_signal_in_the_last_step_of_a_run_ends_the_ablation_after_it(photographs, scripts, monkeypatch):
    monkeypatch.setattr(Signals, "latest", None)
    done = ablate.SCRIPTS["pretrain"].main

    def pretrain(config):
        signals = Signals()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.release()
        done(config)

    monkeypatch.setattr(ablate.SCRIPTS["pretrain"], "main", pretrain)
    with pytest.raises(Stop, match="stopped after .*ours-seed0.* run the same command again") as caught:
        ablate.main(read(photographs))
    assert caught.value.code == 128 + signal.SIGTERM and len(scripts) == 1 and not Path("ablation/ablation.json").exists()
    monkeypatch.setattr(Signals, "latest", None)
    monkeypatch.setattr(ablate.SCRIPTS["pretrain"], "main", done)
    ablate.main(read(photographs))
    assert len(scripts) == 2 * 4  # the first is not done again


@pytest.mark.posix
def test_an_ablation_that_was_killed_goes_on_where_it_was(photographs, tmp_path, monkeypatch):
    given = arguments(photographs, "--finetune", FINETUNE)
    killed = run_script("ablate.py", *given, folder=tmp_path, fault="kill@7")  # ours has 9 steps
    monkeypatch.chdir(tmp_path)
    assert killed.code == -signal.SIGKILL and "4 runs (4 variants, 1 seeds)" in killed.out
    assert not Path("ablation/ablation.json").exists() and (run_of("ours") / "checkpoint.pt").exists()
    result = run_script("ablate.py", *given, folder=tmp_path, timeout=900)
    assert result.code == 0, result.err
    assert f"resuming {run_of('ours')} after step 6" in result.out
    found = json.loads(Path("ablation/ablation.json").read_text())["table6"]
    assert [row["arm"] for row in found] == [arm.name for arm in ablate.TABLES["table6"]]
    assert [row["paper"] for row in found] == [79.09, 77.86, 74.33, 76.48]
    for row in found:
        (run,) = row["runs"]
        assert all(0 <= run[measure] <= 100 and row[measure]["mean"] == run[measure] for measure in MEASURES)
    places = map(run_of, ("ours", "same_crop=True", "loss_weight=0.0", "num_views=1-loss_weight=0.0"))
    ours, same, alone, mae = (json.loads((place / "config.json").read_text()) for place in places)
    assert same["same_crop"] and not ours["same_crop"] and mae["num_views"] == 1 and mae["loss_weight"] == 0
    assert ours["epochs"] == 2 and alone["epochs"] == pytest.approx(2, rel=0.01)
    assert mae["epochs"] == pytest.approx(4, rel=0.01)  # one view costs half
    text = Path("ablation/ablation.md").read_text()
    assert text.startswith("| table6 | the paper's | fine-tuning | k-NN | linear probe |")
    again = run_script("ablate.py", *given, folder=tmp_path)
    assert again.code == 0 and text.strip() in again.out and "run 1 of" not in again.out


def test_two_processes_ablate_together(photographs, tmp_path):
    given = arguments(photographs, "--tables", "contrast")
    ended = run_processes("ablate.py", *given, folder=tmp_path, timeout=900)
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    found = json.loads((tmp_path / "ablation/ablation.json").read_text())["contrast"]
    assert all(0 <= row["runs"][0][measure] <= 100 for row in found for measure in ("knn", "linear"))


def test_tables_share_runs_and_other_options_have_other_folders(photographs, scripts):
    ablate.main(read(photographs, "--tables", "contrast", "--seeds", "1"))
    assert len(scripts) == 4 and len({config.output_dir for config in scripts}) == 4
    ablate.main(read(photographs, "--tables", "contrast", "choices", "--seeds", "1"))
    assert len(scripts) == 4 + 2 * 5
    found = json.loads(Path("ablation/ablation.json").read_text())
    assert [row["knn"]["mean"] for rows in found.values() for row in rows] == [50.0] * 8
    assert found["contrast"][0]["finetune"] is None
    ablate.main(read(photographs, "--tables", "contrast", "--seeds", "1", "--finetune", FINETUNE))
    assert len(scripts) == 14 + 2  # what is pretrained and probed is used
    same = ["--pretrain", TINY + " --workers 1 --log-every 7", "--probe", PROBE + " --save-every 3"]
    ablate.main(read(photographs, "--tables", "contrast", "--seeds", "1", *same))  # these change no number
    assert len(scripts) == 16
    ablate.main(read(photographs, "--tables", "contrast", "--seeds", "1", "--pretrain", TINY + " --no-norm-pix"))
    assert len(scripts) == 20 and len({config.output_dir for config in scripts}) == 20


def test_the_papers_preset_is_its_protocol_and_tells_its_cost(photographs, scripts, capsys):
    tables = ["table6", "mask_ratio", "loss_weight", "decoder_depth"]
    typed = [
        "--preset",
        "paper",
        "--data",
        str(photographs),
        "--seeds",
        "0",
        "1",
        "--output-dir",
        "ablation",
        "--tables",
        *tables,
    ]
    config = parse(ablate.Config, ablate.PRESETS, None, typed)
    assert config.budget == "images"
    tiny = f"{config.pretrain} --encoder-args '{SMALL}' --image-size 32 --decoder-dim 16"
    ablate.main(dataclasses.replace(config, pretrain=tiny))
    pretrained, tuned = scripts[::2], scripts[1::2]
    assert len(pretrained) == len(tuned) == 32 and "32 runs (16 variants, 2 seeds)" in capsys.readouterr().out
    assert {(one.epochs, one.batch_size) for one in pretrained} == {(200, 512)}  # equal images: one view costs half
    assert {one.epochs for one in tuned} == {100}


def test_a_number_of_the_papers_stands_beside_no_accuracy_of_0():
    row = {"arm": "ours", "paper": 79.09, "knn": None, "linear": None, "runs": []}
    for mean, shown in ((0.0, False), (60.0, True)):
        row["finetune"] = {"mean": mean, "std": None, "difference": None, "half_width": None}
        assert ("79.09" in comparison.markdown({"table6": [row]})) == shown


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--probe", ""], "nothing would be measured"),
        (["--pretrain", f"{TINY} --epochs 0"], "--pretrain must give --epochs, so that all variants can cost the same"),
        (["--probe", "--epochs none"], "--probe: --epochs: must be a whole number"),
        (["--finetune", "--epoch 3"], "--finetune: there is no option --epoch"),
        (["--finetune", "'"], "--finetune: No closing quotation"),
    ],
)
def test_what_cannot_be_ablated_is_told_before_anything_is_run(photographs, scripts, typed, words):
    with pytest.raises(Stop, match=words):
        ablate.main(read(photographs, *typed))
    assert scripts == []


@pytest.mark.parametrize("name", ["ablation-fashion", "ablation-cifar10"])
def test_a_plot_of_many_tables_fits_a_page_and_says_what_it_shows(name, monkeypatch, tmp_path):
    found, figures = json.loads((EXAMPLES / f"results/{name}.json").read_text()), []
    monkeypatch.setattr(pyplot, "close", figures.append)
    comparison.draw(tmp_path / "plot.png", found)
    with Image.open(tmp_path / "plot.png") as picture, Image.open(EXAMPLES / f"results/{name}.png") as committed:
        assert picture.width <= 1100 and picture.height <= 1500 and committed.size == picture.size
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == list(MEASURES.values())
    assert [axis.get_xlabel().strip() for axis in figure.axes] == ["accuracy, %"] * 3
    assert not any(axis.texts for axis in figure.axes)  # names stand beside the panels
    rows = [name for table, arms in found.items() for name in (table.replace("_", " "), *(row["arm"] for row in arms))]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == rows
    for axis, measure in zip(figure.axes, MEASURES, strict=True):
        points = [tuple(point) for drawn in axis.collections if len(drawn.get_offsets()) for point in drawn.get_offsets()]
        drawn = {x for x, _ in points}
        arms = [row for arms in found.values() for row in arms]
        assert {run[measure] for row in arms for run in row["runs"]} <= drawn
        assert ({row["paper"] for row in arms if row["paper"]} <= drawn) == (measure == "finetune")


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_differences_are_paired_by_seed_with_students_interval(count):
    rng = np.random.default_rng(count)
    ours, other = rng.normal(70, 2, count), rng.normal(71, 2, count)
    runs = [[{"seed": seed, "knn": value} for seed, value in enumerate(values)] for values in (other, ours)]
    found = summarise(runs[0][::-1], runs[1], "knn")
    low, high = scipy.stats.ttest_rel(other, ours).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(other.mean()) and found["std"] == pytest.approx(other.std(ddof=1))
    assert found["difference"] == pytest.approx((low + high) / 2)
    assert found["half_width"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert summarise(runs[0], runs[1], "linear") is None


def test_every_arm_changes_what_it_says_and_the_operations_follow(photographs):
    config = read(photographs)
    places = {ablate.plan(config, arm, 0).folder for arms in ablate.TABLES.values() for arm in arms}
    assert len(places) == len({arm.options for arms in ablate.TABLES.values() for arm in arms}) - 3  # ours under other names
    changes = ("", "--num-views 1 --loss-weight 0", "--loss-weight 0", "--loss-weight 0 --decoder-depth 2")
    chosen = [ablate.read("pretrain", f"{TINY} {text} --data x") for text in changes]
    ours, one_view, plain, deep = (ablate.cost(one)[0] for one in chosen)
    assert one_view == plain / 2 and ours == pytest.approx(plain, rel=0.01)
    tokens, width = 17, 16  # with the class token
    block = 2 * tokens * (4 * width**2 + 2 * 4 * width**2) + 4 * tokens**2 * width  # products with weights, and attention
    assert deep - plain == 2 * 3 * block  # two views; forward, and twice that backward
    longer = ablate.plan(config, ablate.Arm("", "--decoder-depth 2"), 0).scripts["pretrain"]
    assert longer.epochs == pytest.approx(2 * ours / (ours + 2 * 3 * block), rel=1e-5)
    assert longer.warmup_epochs == pytest.approx(longer.epochs / 4, rel=1e-5)


def test_the_operations_are_those_of_the_formula():
    model = mvmae.MultiViewMAE(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0))
    vit, decoder = (depth * (24 * n * w**2 + 4 * n**2 * w) for depth, n, w in ((12, 2, 192), (4, 5, 512)))
    layers = 2 * 2 * 192 * 512 + 2 * 4 * 512 * 768  # into the decoder, and out of it
    embedding = 2 * 2 * 768 * 192  # of the one visible patch, forward and the weights' gradient
    assert flops_per_image(model) == pytest.approx(2 * (3 * (vit + decoder + layers) + embedding), rel=1e-4)  # and the contrast


def test_the_operations_are_the_same_whatever_kernels_a_machine_has():
    chosen, counted = ablate.read("pretrain", f"{TINY} --data x"), []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        ablate.cost.cache_clear()
        with sdpa_kernel(kernel):
            counted.append(ablate.cost(chosen))
    assert counted[0] == counted[1]
