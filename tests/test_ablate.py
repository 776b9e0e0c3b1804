import json
import shlex
import signal
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(EXAMPLES))

import ablate
from engine.cli import parse
from tasks import comparison, timing
from tasks.comparison import MEASURES, summarise

TINY = f"--preset quick --encoder-args '{SMALL}' --image-size 32 --decoder-dim 16 --decoder-depth 1 --batch-size 8 --device cpu"
TINY += " --epochs 2 --warmup-epochs 0.5 --workers 0 --monitor-images 0 --log-every 1 --save-every 2"
FINETUNE = "--preset quick --epochs 1 --warmup-epochs 0 --batch-size 8 --workers 0 --device cpu"
PROBE = "--preset quick --epochs 1 --batch-size 8 --few-shot 0 --neighbours 3 --device cpu"


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
    return ["--data", photographs, "--output-dir", "ablation", "--seeds", 0, "--pretrain", TINY, "--probe", PROBE, *more]


@pytest.mark.posix
def test_an_ablation_that_was_killed_goes_on_where_it_was(photographs, tmp_path):
    given = arguments(photographs, "--finetune", FINETUNE)
    killed = run_script("ablate.py", *given, folder=tmp_path, fault="kill@7")  # ours has 9 steps
    assert killed.code == -signal.SIGKILL
    assert not list(tmp_path.rglob("ablation.json")) and (tmp_path / "ablation/ours-seed0/checkpoint.pt").exists()
    result = run_script("ablate.py", *given, folder=tmp_path, timeout=900)
    assert result.code == 0, result.err
    assert "resuming ablation/ours-seed0 after step 6" in result.out
    found = json.loads((tmp_path / "ablation/ablation.json").read_text())["table6"]
    assert [row["arm"] for row in found] == [arm.name for arm in ablate.TABLES["table6"]]
    assert [row["paper"] for row in found] == [79.09, 77.86, 74.33, 76.48]
    for row in found:
        (run,) = row["runs"]
        assert all(0 <= run[measure] <= 100 and row[measure]["mean"] == run[measure] for measure in MEASURES)
    runs = {row["arm"]: row["runs"][0] for row in found}
    assert runs["ours"]["epochs"] == 2
    assert [row["runs"][0]["seconds"] is None for row in found] == [True, False, False, False]  # ours was cut
    logs = {name: tmp_path / f"ablation/{folder}-seed0/config.json" for name, folder in FOLDERS.items()}
    configs = {name: json.loads(path.read_text()) for name, path in logs.items()}
    assert configs["without two different targets"]["same_crop"] and not configs["ours"]["same_crop"]
    assert configs["baseline, MAE"]["num_views"] == 1 and configs["baseline, MAE"]["loss_weight"] == 0
    assert configs["baseline, MAE"]["epochs"] == pytest.approx(4, rel=0.01)  # one view costs half
    assert configs["without contrastive loss"]["epochs"] == pytest.approx(2, rel=0.01)
    with Image.open(tmp_path / "ablation/ablation.png") as picture:
        assert min(picture.size) > 200
    text = (tmp_path / "ablation/ablation.md").read_text()
    assert text.startswith("| table6 | the paper's | fine-tuning | k-NN | linear probe |") and "| 79.09 |" in text
    again = run_script("ablate.py", *given, "--collect", folder=tmp_path)
    assert again.code == 0 and text.strip() in again.out and "run 1 of" not in again.out


@pytest.mark.parametrize("name", ["ablation-fashion", "ablation-cifar10"])
def test_a_plot_of_many_tables_fits_a_page_and_says_what_it_shows(name, monkeypatch, tmp_path):
    found, figures = json.loads((EXAMPLES / f"{name}.json").read_text()), []

    @contextmanager
    def plot(*given, **settings):
        with whole(*given, **settings) as (figure, axes):
            figures.append(figure)
            yield figure, axes

    whole = comparison.plot
    monkeypatch.setattr(comparison, "plot", plot)
    comparison.draw(tmp_path / "plot.png", found)
    with Image.open(tmp_path / "plot.png") as picture, Image.open(EXAMPLES / f"{name}.png") as committed:
        assert picture.width <= 1100 and picture.height <= 1500 and committed.size == picture.size
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == list(MEASURES.values())
    assert [axis.get_xlabel().strip() for axis in figure.axes] == ["accuracy, %"] * 3
    arms = [row["arm"] for rows in found.values() for row in rows]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == arms
    assert [text.get_text() for text in figure.axes[-1].texts] == [table.replace("_", " ") for table in found]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "run of one seed",
        "mean and standard deviation over seeds",
    ]
    for axis, measure in zip(figure.axes, MEASURES, strict=True):
        (runs,) = (drawn for drawn in axis.collections if drawn.get_label() == "run of one seed")
        x, y = runs.get_offsets().T
        expected = [run[measure] for rows in found.values() for row in rows for run in row["runs"]]
        assert x.tolist() == expected and len(set(y)) == len(arms)


FOLDERS = {
    "ours": "ours",
    "without two different targets": "same_crop=True",
    "without contrastive loss": "loss_weight=0.0",
    "baseline, MAE": "num_views=1-loss_weight=0.0",
}


def test_two_processes_ablate_together_and_compare_gathered_with_local_negatives(photographs, tmp_path):
    given = arguments(photographs, "--finetune", FINETUNE, "--tables", "negatives")
    alone = run_script("ablate.py", *given, folder=tmp_path)
    assert alone.code == 2 and "start several, with torchrun --nproc-per-node 2" in alone.err
    ended = run_processes("ablate.py", *given, folder=tmp_path, timeout=900)
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    found = json.loads((tmp_path / "ablation/ablation.json").read_text())["negatives"]
    assert [row["arm"] for row in found] == ["of all processes", "of each process alone"]
    assert all(0 <= row["runs"][0][measure] <= 100 for row in found for measure in MEASURES)
    first = [json.loads((tmp_path / f"ablation/{name}-seed0/log.jsonl").read_text().splitlines()[0]) for name in NEGATIVES]
    assert [line["step"] for line in first] == [1, 1] and first[0]["loss_rec"] == first[1]["loss_rec"]
    # of the same latents: the denominator of Eq. 4 has 14 negatives in one, 6 in the other
    assert first[0]["loss_con"] - first[1]["loss_con"] == pytest.approx(np.log(15 / 7), abs=0.25)
    again = run_processes("ablate.py", *given, folder=tmp_path)
    assert [process.code for process in again] == [0, 0] and "resuming" not in again[0].out
    few = run_processes("pretrain.py", *shlex.split(f"--data {photographs} {TINY} --batch-size 2 --no-gather"), folder=tmp_path)
    assert [process.code for process in few] == [2, 2]
    assert "--batch-size 2 with --no-gather on 2 processes leaves the contrastive loss no negatives" in few[0].err


NEGATIVES = ("ours", "gather=False")


def test_what_cannot_be_ablated_is_one_line(photographs, tmp_path):
    result = run_script("ablate.py", *arguments(photographs, "--tables", "table7"), folder=tmp_path)
    assert result.code == 2 and "--tables: invalid choice: 'table7' (choose from 'table6', 'mask_ratio'" in result.err
    result = run_script("ablate.py", *arguments(photographs, "--probe", "", "--finetune", ""), folder=tmp_path)
    assert result.code == 2 and "nothing would be measured" in result.err
    result = run_script("ablate.py", *arguments(photographs, "--collect"), folder=tmp_path)
    assert result.code == 2 and "no run in ablation has finished: call again without --collect" in result.err
    result = run_script("ablate.py", *arguments(photographs, "--pretrain", f"{TINY} --epochs 0"), folder=tmp_path)
    assert result.code == 2 and "--pretrain must give --epochs, so that all variants can cost the same" in result.err


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
    config = parse(ablate.Config, ablate.PRESETS, None, ["--data", str(photographs), "--pretrain", TINY, "--probe", PROBE])
    for table, arms in ablate.TABLES.items():
        places = {ablate.plan(config, arm, 0).folder.name for arm in arms}
        assert len(places) == len(arms), table
    changes = ("", "--num-views 1 --loss-weight 0", "--loss-weight 0", "--loss-weight 0 --decoder-depth 2")
    chosen = [ablate.settings(config, ablate.Arm("", text)) for text in changes]
    ours, one_view, plain, deep = map(ablate.flops_per_image, chosen)
    assert one_view == plain / 2 and ours == pytest.approx(plain, rel=0.01)
    tokens, width = 17, 16  # with the class token
    block = 2 * tokens * (4 * width**2 + 2 * 4 * width**2) + 4 * tokens**2 * width  # products with weights, and attention
    assert deep - plain == 2 * 3 * block  # two views; forward, and twice that backward
    parts = ablate.plan(config, ablate.Arm("", "--decoder-depth 2"), 0).scripts
    assert parts["pretrain"].epochs == pytest.approx(2 * ours / (ours + 2 * 3 * block), rel=1e-5)


def test_the_operations_are_the_same_whatever_kernels_a_machine_has(photographs):
    config = parse(ablate.Config, ablate.PRESETS, None, ["--data", str(photographs), "--pretrain", TINY])
    chosen, counted = ablate.settings(config, ablate.OURS), []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        ablate.flops_per_image.cache_clear()
        with sdpa_kernel(kernel):
            counted.append(ablate.flops_per_image(chosen))
    assert counted[0] == counted[1]
    q = torch.randn(2, 5, 7, 8, requires_grad=True)
    attention = timing.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert attention == 6 * 2 * (2 * 5) * (7 * 7 * 8)  # the products of the formula, two forward and four backward


@pytest.fixture(scope="module")
def done(photographs, tmp_path_factory):
    """Two runs, measured by a probe alone."""
    folder = tmp_path_factory.mktemp("done")
    result = run_script("ablate.py", *arguments(photographs, *PROBED), folder=folder)
    assert result.code == 0, result.err
    return folder


PROBED = ("--tables", "contrast", "--finetune", "")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--pretrain", TINY.replace("--epochs 2", "--epochs 3"), ["--pretrain", "epochs was 2.0 and is 3.0 now"]),
        ("--pretrain", TINY + " --loss-on all", ["--pretrain", "loss_on was 'masked' and is 'all' now"]),
        ("--probe", PROBE + " --base-lr 0.5", ["--probe", "base_lr was 3.0 and is 0.5 now"]),
        ("--finetune", FINETUNE, ["without --finetune"]),
    ],
)
def test_numbers_of_other_options_are_refused_by_name(done, photographs, option, value, words):
    before = {path: path.read_bytes() for path in done.rglob("*.json*")}
    for more in ([], ["--collect"]):
        result = run_script("ablate.py", *arguments(photographs, *PROBED, option, value, *more), folder=done)
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert [word for word in ["ablation/ours-seed0", *words, "another --output-dir"] if word not in result.err] == []
    assert {path: path.read_bytes() for path in done.rglob("*.json*")} == before


def test_options_that_change_no_number_may_change(done, photographs):
    same = ["--pretrain", TINY + " --workers 1 --log-every 7", "--probe", PROBE + " --save-every 3"]
    result = run_script("ablate.py", *arguments(photographs, *PROBED, *same), folder=done)
    assert result.code == 0 and "resuming" not in result.out, result.err
