import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib import pyplot
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(EXAMPLES))

import ablate
from engine.options import parse
from engine.signals import Stop
from tasks import comparison
from tasks.comparison import MEASURES, summarise

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
    given = ["--data", photographs, "--output-dir", "ablation", "--seeds", 0]
    given += ["--pretrain", TINY, "--finetune", "", "--probe", PROBE, *more]
    return list(map(str, given))


def read(photographs, *more):
    return parse(ablate.Config, ablate.PRESETS, None, arguments(photographs, *more))


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Scripts that leave results and train nothing; a list of the folders that each call of them writes to."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def stand_in(results):
        def main(config):
            folder = Path(config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.json").write_text(json.dumps(results))
            ran.append(str(folder))

        return main

    for name, results in (("pretrain", {}), ("finetune", {"top1": 70.0}), ("probe", [{"knn": 50.0, "linear": 60.0}])):
        monkeypatch.setattr(ablate.SCRIPTS[name], "main", stand_in(results))
    return ran


@pytest.mark.posix
def test_an_ablation_that_was_killed_goes_on_where_it_was(photographs, tmp_path):
    given = arguments(photographs, "--finetune", FINETUNE)
    killed = run_script("ablate.py", *given, folder=tmp_path, fault="kill@7")  # ours has 9 steps
    assert killed.code == -signal.SIGKILL
    assert not (tmp_path / "ablation/ablation.json").exists() and (tmp_path / "ablation/ours-seed0/checkpoint.pt").exists()
    result = run_script("ablate.py", *given, folder=tmp_path, timeout=900)
    assert result.code == 0, result.err
    assert "resuming ablation/ours-seed0 after step 6" in result.out
    found = json.loads((tmp_path / "ablation/ablation.json").read_text())["table6"]
    assert [row["arm"] for row in found] == [arm.name for arm in ablate.TABLES["table6"]]
    assert [row["paper"] for row in found] == [79.09, 77.86, 74.33, 76.48]
    for row in found:
        (run,) = row["runs"]
        assert all(0 <= run[measure] <= 100 and row[measure]["mean"] == run[measure] for measure in MEASURES)
    places = ("ours", "same_crop=True", "loss_weight=0.0", "num_views=1-loss_weight=0.0")
    ours, same, alone, mae = (json.loads((tmp_path / f"ablation/{one}-seed0/config.json").read_text()) for one in places)
    assert same["same_crop"] and not ours["same_crop"] and mae["num_views"] == 1 and mae["loss_weight"] == 0
    assert ours["epochs"] == 2 and alone["epochs"] == pytest.approx(2, rel=0.01)
    assert mae["epochs"] == pytest.approx(4, rel=0.01)  # one view costs half
    with Image.open(tmp_path / "ablation/ablation.png") as picture:
        assert min(picture.size) > 200
    text = (tmp_path / "ablation/ablation.md").read_text()
    assert text.startswith("| table6 | the paper's | fine-tuning | k-NN | linear probe |") and "| 79.09 |" in text
    again = run_script("ablate.py", *given, folder=tmp_path)
    assert again.code == 0 and text.strip() in again.out and "run 1 of" not in again.out


def test_two_processes_ablate_together(photographs, tmp_path):
    given = arguments(photographs, "--tables", "contrast")
    ended = run_processes("ablate.py", *given, folder=tmp_path, timeout=900)
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    found = json.loads((tmp_path / "ablation/ablation.json").read_text())["contrast"]
    assert all(0 <= row["runs"][0][measure] <= 100 for row in found for measure in ("knn", "linear"))


def test_the_tables_are_those_of_the_runs_that_are_done(photographs, scripts):
    ablate.main(read(photographs, "--tables", "contrast", "--seeds", "1"))
    assert scripts == [f"ablation/{arm}-seed1{part}" for arm in ("ours", "loss_weight=0.0") for part in ("", "/probe")]
    ablate.main(read(photographs, "--tables", "contrast", "choices", "--seeds", "1"))
    assert len(scripts) == 4 + 2 * 5 and len(set(scripts)) == len(scripts)  # the tables share ours
    found = json.loads(Path("ablation/ablation.json").read_text())
    assert [row["knn"]["mean"] for rows in found.values() for row in rows] == [50.0] * 8 and found["contrast"][0][
        "finetune"
    ] is None


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


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--pretrain", TINY.replace("--epochs 2", "--epochs 3"), ["--pretrain", "epochs was 2.0 and is 3.0 now"]),
        ("--pretrain", TINY + " --no-norm-pix", ["--pretrain", "norm_pix was True and is False now"]),
        ("--probe", PROBE + " --base-lr 0.5", ["--probe", "base_lr was 3.0 and is 0.5 now"]),
        ("--finetune", FINETUNE, ["without --finetune"]),
    ],
)
def test_numbers_of_other_options_are_refused_by_name(photographs, scripts, option, value, words):
    ablate.main(read(photographs, "--tables", "contrast"))
    before = {path: path.read_bytes() for path in Path("ablation").rglob("*.json")}
    with pytest.raises(Stop) as stop:
        ablate.main(read(photographs, "--tables", "contrast", option, value))
    assert [word for word in ["ablation/ours-seed0", *words, "another --output-dir"] if word not in str(stop.value)] == []
    assert {path: path.read_bytes() for path in Path("ablation").rglob("*.json")} == before and len(scripts) == 4
    same = ["--pretrain", TINY + " --workers 1 --log-every 7", "--probe", PROBE + " --save-every 3"]
    ablate.main(read(photographs, "--tables", "contrast", *same))  # these change no number
    assert len(scripts) == 4


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
    arms = [row["arm"] for rows in found.values() for row in rows]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == arms
    assert [text.get_text() for text in figure.axes[-1].texts] == [table.replace("_", " ") for table in found]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "run of one seed",
        "mean and standard deviation over seeds",
    }
    for axis, measure in zip(figure.axes, MEASURES, strict=True):
        (runs,) = (drawn for drawn in axis.collections if drawn.get_label() == "run of one seed")
        x, y = runs.get_offsets().T
        expected = [run[measure] for rows in found.values() for row in rows for run in row["runs"]]
        assert x.tolist() == expected and len(set(y)) == len(arms)


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
    for table, arms in ablate.TABLES.items():
        places = {ablate.plan(config, arm, 0).folder.name for arm in arms}
        assert len(places) == len(arms), table
    changes = ("", "--num-views 1 --loss-weight 0", "--loss-weight 0", "--loss-weight 0 --decoder-depth 2")
    chosen = [ablate.read("pretrain", f"{TINY} {text}", "--data", "x")[1] for text in changes]
    ours, one_view, plain, deep = map(ablate.cost, chosen)
    assert one_view == plain / 2 and ours == pytest.approx(plain, rel=0.01)
    tokens, width = 17, 16  # with the class token
    block = 2 * tokens * (4 * width**2 + 2 * 4 * width**2) + 4 * tokens**2 * width  # products with weights, and attention
    assert deep - plain == 2 * 3 * block  # two views; forward, and twice that backward
    longer = ablate.plan(config, ablate.Arm("", "--decoder-depth 2"), 0).scripts["pretrain"]
    assert longer.epochs == pytest.approx(2 * ours / (ours + 2 * 3 * block), rel=1e-5)
    assert longer.warmup_epochs == pytest.approx(longer.epochs / 4, rel=1e-5)


def test_the_operations_are_the_same_whatever_kernels_a_machine_has():
    (_, chosen), counted = ablate.read("pretrain", TINY, "--data", "x"), []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        ablate.cost.cache_clear()
        with sdpa_kernel(kernel):
            counted.append(ablate.cost(chosen))
    assert counted[0] == counted[1]
