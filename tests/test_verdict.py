"""examples/tasks/verdict.py: a run told by name; each verdict by a rule on lines of a log, and by a run made to show it."""

import math
import random
import re
import sys

import pytest
from running import EXAMPLES, run_script
from tiny_run import ARGUMENTS, STEPS, pretrain

sys.path.append(str(EXAMPLES))
from tasks.verdict import ENOUGH, LOST_RANK, NO_CONTRAST, STARVED, Verdict, fall_of, judge, newest

WORST = math.log(127)


def log_of(count, rec, con, *, noise=0.0, waiting=0.0, ranks=(17.0,), lr=1e-3, seed=0):
    """A log: ``rec`` and ``con`` are losses by the share of the run that is done, ``ranks`` what looks found, spread evenly."""
    rng = random.Random(seed)
    looks = {round(i * count / max(len(ranks) - 1, 1)): rank for i, rank in enumerate(ranks)}
    found = [{"step": 0, "effective_rank": looks[0], "uniformity": -1.5}] if looks else []
    for step in range(1, count + 1):
        loss_rec, loss_con = rec(step / count) + rng.gauss(0, noise / 10), con(step / count) + rng.gauss(0, noise)
        line = {"step": step, "lr": lr, "loss": loss_rec + 2 * loss_con, "loss_rec": loss_rec, "loss_con": loss_con}
        found.append(line | {"waiting": waiting})
        found += [{"step": step, "effective_rank": looks[step]}] if step in looks else []
    return found


def flat(value):
    return lambda _: value


def falling(start, end):
    return lambda done: start + (end - start) * done


def name_of(records, **options):
    verdict = judge(records, **{"crops": 128, "loss_weight": 2.0, **options})
    return verdict and verdict.name


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("count", [12, 300])
def test_each_verdict_has_its_log(count, noise):
    learns = {"rec": falling(1.2, 0.8), "con": falling(3.8, 2.2), "noise": noise}
    assert name_of(log_of(count, **learns)) == "learning"
    assert name_of(log_of(count, flat(1.25), flat(3.9), noise=noise)) == "plateau"
    assert name_of(log_of(count, falling(1.2, 0.6), flat(WORST), noise=noise / 100)) == "contrast not falling"
    assert name_of(log_of(count, **learns, ranks=(17, 15, 1.4))) == "collapse"
    assert name_of(log_of(count, **learns, waiting=0.9)) == "starved by data"


def test_one_loss_that_falls_is_learning():
    assert name_of(log_of(30, falling(1.2, 0.8), flat(2.5), noise=0.1)) == "learning"
    assert name_of(log_of(30, flat(1.2), falling(3.5, 2.5), noise=0.1)) == "learning"
    assert name_of(log_of(30, flat(1.2), falling(3.5, 2.5), noise=0.1), loss_weight=0) == "plateau"  # it is not trained


def test_noise_alone_is_a_plateau_at_almost_every_seed():
    """The noise itself is estimated, from a dozen lines."""
    told = [name_of(log_of(24, flat(1.25), flat(3.9), noise=0.2, seed=seed)) for seed in range(200)]
    assert told.count("plateau") >= 180 and set(told) <= {"plateau", "learning"}


def test_a_rise_is_no_learning():
    assert name_of(log_of(30, falling(0.8, 1.2), falling(2.5, 3.5), noise=0.05)) == "plateau"


def test_the_start_of_a_run_does_not_count_for_its_end():
    steep = log_of(40, lambda done: 1.2 if done < 0.3 else 0.6, lambda done: 3.8 if done < 0.3 else 2.0, noise=0.02, seed=1)
    assert name_of(steep[:16]) == "learning" and name_of(steep) == "plateau"


def test_lines_before_the_contrastive_loss_was_added_do_not_count_after_it():
    """The reconstruction gets worse when it comes, and the loss rises from 0."""
    before = log_of(30, falling(1.0, 0.5), flat(0), ranks=(17,))
    assert str(judge(before, crops=128, loss_weight=2.0)).startswith("learning (over the newest half of the log: loss_rec -")
    after = log_of(30, falling(0.7, 0.6), falling(4.0, 3.0), ranks=(17,))
    assert name_of(before + after[: ENOUGH - 1]) is None
    said = str(judge(before + after, crops=128, loss_weight=2.0))
    assert said.startswith("learning (") and "loss_rec -" in said and "loss_con -" in said


def test_there_is_no_verdict_on_too_little():
    records = log_of(ENOUGH - 1, falling(1.2, 0.8), falling(3.8, 2.2), waiting=0.9)
    assert judge(records, crops=128, loss_weight=2.0) is None and judge([], crops=128, loss_weight=2.0) is None
    records = log_of(ENOUGH - 1, falling(1.2, 0.8), falling(3.8, 2.2), ranks=(17, 1.2))
    assert name_of(records) == "collapse"  # which needs a single look


@pytest.mark.parametrize(("share", "name"), [(LOST_RANK - 0.02, "collapse"), (LOST_RANK + 0.02, "learning")])
def test_a_rank_far_below_that_of_the_first_look_is_a_collapse(share, name):
    assert name_of(log_of(20, falling(1.2, 0.8), falling(3.8, 2.2), ranks=(30, 30 * share))) == name


@pytest.mark.parametrize(("share", "name"), [(NO_CONTRAST + 0.005, "contrast not falling"), (NO_CONTRAST - 0.005, "learning")])
def test_the_contrastive_loss_is_compared_with_that_of_equal_features(share, name):
    records = log_of(20, falling(1.2, 0.8), flat(WORST * share))
    assert name_of(records) == name and name_of(records, loss_weight=0) == "learning"
    assert name_of(records, crops=1024) == "learning"


@pytest.mark.parametrize(("waiting", "name"), [(STARVED + 0.01, "starved by data"), (STARVED - 0.01, "learning")])
def test_waiting_half_of_the_time_is_starving(waiting, name):
    assert name_of(log_of(20, falling(1.2, 0.8), falling(3.8, 2.2), waiting=waiting)) == name


def test_what_is_mended_first_is_told_first():
    worst = {"rec": flat(1.2), "con": flat(WORST), "waiting": 0.9}
    assert name_of(log_of(20, **worst, ranks=(17, 1))) == "collapse"
    assert name_of(log_of(20, **worst)) == "contrast not falling"
    assert name_of(log_of(20, **worst), loss_weight=0) == "plateau"


def test_every_verdict_says_why_and_names_a_cure_in_one_line():
    logs = [
        log_of(20, flat(1.2), flat(3.0), ranks=(17, 1)),
        log_of(20, flat(1.2), flat(WORST)),
        log_of(20, flat(1.2), flat(3.0)),
        log_of(20, falling(1.2, 0.8), flat(3.0), waiting=0.9),
    ]
    for records in logs:
        verdict = judge(records, crops=128, loss_weight=2.0)
        assert isinstance(verdict, Verdict) and "\n" not in str(verdict) and re.search(r"\d", verdict.why), verdict
        assert "--" in verdict.cure, verdict
    rates = [{**record, "lr": 1e-3 if record["step"] < 19 else 1e-6} for record in logs[2]]
    assert "the schedule has ended" in judge(rates, crops=128, loss_weight=2.0).cure
    assert "the schedule has ended" not in judge(logs[2], crops=128, loss_weight=2.0).cure


def test_a_fall_is_told_with_its_size_and_against_its_noise():
    share, fell = fall_of([4.0 - 0.1 * i + 0.01 * (-1) ** i for i in range(10)])
    assert share == pytest.approx(0.225, abs=0.005) and fell and fall_of([1.0] * (ENOUGH - 1)) is None
    assert not fall_of([4.0, 2.0] * 4 + [3.9, 2.0])[1] and not fall_of([3.0 + 0.1 * i for i in range(10)])[1]
    assert not fall_of([1.0 - 1e-5 * i for i in range(10)])[1]  # less than counts
    records = [{"step": 1, "loss_con": 9.0}, *({"step": i, "loss": 1.0, "loss_con": float(i)} for i in range(20))]
    assert newest(records, "loss_con") == list(range(10, 20))  # lines without a loss are looks


# ------------------------------------------------------------------------------------------------- runs made to show each

SMALL = ["--data", "sample", "--preset", "quick", "--encoder-args", "patch_size=8 embed_dim=64 depth=2 num_heads=2"]
SMALL += ["--image-size", 32, "--decoder-dim", 32, "--decoder-depth", 1, "--decoder-heads", 2, "--batch-size", 32]
SMALL += ["--workers", 0, "--monitor-images", 100, "--monitor-every", 0, "--output-dir", "run", "--warmup-epochs", 0]
SHOWN = {
    "learning": ["--max-steps", 60, "--log-every", 4, "--base-lr", 8e-3],
    "plateau": ["--max-steps", 36, "--log-every", 3, "--base-lr", 0],
    "contrast not falling": ["--max-steps", 30, "--log-every", 3, "--temperature", 1000],
    "collapse": ["--max-steps", 30, "--log-every", 3, "--base-lr", 30],
    "starved by data": ["--max-steps", 30, "--log-every", 3, "--base-lr", 8e-3, "--transform", "slow:wait"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_made_to_show_it_is_told_by_name(tmp_path, name):
    (tmp_path / "slow.py").write_text("import time\n\ndef wait(view):\n    time.sleep(0.02)\n    return view\n")
    result = run_script("pretrain.py", *SMALL, *SHOWN[name], folder=tmp_path)
    assert result.code == 0, result.err
    told = re.findall(r"^verdict: ([a-z ]+) \(.*\): .+$", result.out, re.MULTILINE)
    assert told == [name], result.out
    page = (tmp_path / "run" / "summary.md").read_text()
    assert f"\n- verdict: {name}: " in page
    assert (f"\n- {name}: " in page.partition("## What to do next")[2]) == (name != "learning")


# ------------------------------------------------------------------------------------------------------------ summary.md


def test_a_run_leaves_a_page_that_says_what_how_long_how_good_and_what_next(images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, "--monitor-images", 20)
    assert result.code == 0, result.err
    page = (tmp_path / "run" / "summary.md").read_text()
    assert re.findall("^##? (.+)$", page, re.MULTILINE) == [
        "run",
        "What",
        "How long",
        "How good",
        "What to do next",
        "Command",
    ]
    for line in result.out.splitlines()[:6]:  # the run's first lines
        name, text = re.split(r"\s{2,}", line, maxsplit=1)
        assert f"- {name}: {text}\n" in page
    assert re.search(r"- [\d.]+ images/s \(median", page) and re.search(r"- \d+% of the time waiting for data", page)
    assert re.search(r"- 0:00:\d\d from the first to the last line of the log", page) and "GB of memory at most" in page
    assert re.search(r"- reconstruction loss: [\d.]+ at first, [\d.]+ at the end", page)
    assert f"--data {images} --models run random:run`" in page and 'timm.create_model("local-dir:run/encoder"' in page
    assert "\n\n\n" not in page and page.startswith("# run\n\n## What\n\n- model: ")
    command = page.rstrip().splitlines()[-1]
    assert command.startswith("    ") and "pretrain.py --data" in command and "--monitor-images 20" in command


def test_a_run_without_looks_says_nothing_of_features(images, tmp_path):
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, "--max-steps", 1, "--workers", 0]
    result = run_script("pretrain.py", *given, folder=tmp_path)
    assert result.code == 0 and "verdict" not in result.out, result
    page = (tmp_path / "run" / "summary.md").read_text()
    assert "k-NN" not in page and "verdict" not in page and "images/s" not in page  # not one step is measured
