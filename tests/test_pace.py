"""examples/engine/pace.py: what a run says of its speed, its waiting, its memory and its end."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from running import EXAMPLES, run_script, without_clock
from tiny_run import losses, pretrain, run_of

sys.path.append(str(EXAMPLES))
from engine import log as log_module
from engine import pace as pace_module
from engine.log import Log
from engine.pace import CLOCK, ENOUGH, Pace, duration, hint, peak_memory, words

CPU = torch.device("cpu")


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def paced(last=100, batch=8, device=CPU):
    clock = Clock()
    return clock, Pace(batch, last, device, clock)


def take(clock, pace, waits, works, between=0.0):
    """A step by the clock: it waits, it works, and something else follows."""
    pace.wait()
    clock.time += waits
    pace.arrive()
    clock.time += works
    pace.finish()
    clock.time += between


def test_throughput_and_waiting_leave_out_the_first_step_and_what_lies_between_steps():
    clock, pace = paced()
    take(clock, pace, 50, 50)
    assert set(pace.numbers(1)) <= {"memory_gb"}  # nothing is measured yet, nothing is invented
    for _ in range(4):
        take(clock, pace, 1, 3, between=6)
    numbers = pace.numbers(5)
    assert numbers["images_per_second"] == 2 and numbers["waiting"] == 0.25  # 8 images in 4 s, one of them waited
    assert numbers["seconds_left"] == 95 * 10  # looks and checkpoints cost time too


def test_the_numbers_are_of_the_steps_since_the_last_line_and_the_time_left_of_all():
    clock, pace = paced(last=6)
    for waits in (9, 1, 1):
        take(clock, pace, waits, 1)
    pace.restart()
    assert "waiting" not in pace.numbers(3) and pace.numbers(3)["seconds_left"] == 6
    take(clock, pace, 0, 4)
    numbers = pace.numbers(4)
    assert (numbers["images_per_second"], numbers["waiting"], numbers["seconds_left"]) == (2, 0, round(2 * 8 / 3, 1))


def test_a_run_without_a_known_batch_has_no_images_per_second():
    clock, pace = paced(batch=0)
    for _ in range(3):
        take(clock, pace, 1, 1)
    assert "images_per_second" not in pace.numbers(3) and pace.numbers(3)["waiting"] == 0.5


def test_the_estimate_comes_once_and_says_from_which_steps():
    clock, pace = paced(last=1000)
    told = []
    for step in range(41, 41 + ENOUGH + 5):  # a resumed run
        take(clock, pace, 0.5 if step > 41 else 60, 1.5, between=1)
        told.append(pace.estimate(step))
    (line,) = filter(None, told)
    assert told.index(line) == ENOUGH
    assert line.startswith(
        f"estimate: {duration(2 * (1000 - 41 - ENOUGH))} for {1000 - 41 - ENOUGH} more steps, 4.0 images/s, 25%"
    )
    assert line.endswith(f"(measured in steps 42 to {41 + ENOUGH})")


def test_memory_is_this_process_s_own_peak(monkeypatch):
    before = peak_memory(CPU)
    block = torch.ones(50_000_000)
    assert peak_memory(CPU) >= before + 100e6 or before > 1.5e9
    del block
    assert peak_memory(CPU) >= before
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 10**9)
    clock, pace = paced(device=torch.device("cuda", 0))
    take(clock, pace, 1, 1)
    assert pace.numbers(1) == {"memory_gb": 3.0}


def test_memory_is_found_without_proc(monkeypatch):
    monkeypatch.setattr(pace_module, "Path", lambda name: Path("/nowhere"))
    assert peak_memory(CPU) > 50e6


def test_numbers_are_told_in_words():
    numbers = {"images_per_second": 1234.5, "waiting": 0.034, "memory_gb": 1.234, "seconds_left": 3725.4}
    assert words({**numbers, "loss": 1.0}) == "1234 images/s, 3% waiting for data, 1.23 GB, 1:02:05 left"
    assert words({"loss": 1.0}) == "" and words({"images_per_second": 2.5}) == "2.5 images/s"


def test_the_hint_names_what_helps(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    missing = []
    monkeypatch.setattr(pace_module.importlib.util, "find_spec", lambda name: None if name in missing else True)
    assert "waits" not in hint(0.5, 1, ["a.png"]) and "50%" in hint(0.5, 1, ["a.png"])
    assert "--workers 4 instead of 1" in hint(0.5, 1, ["a.JPG"]) and "simplejpeg" not in hint(0.5, 1, ["a.JPG"])
    assert "--workers" not in hint(0.5, 4, ["a.png"]) and "more processor cores" in hint(0.5, 4, ["a.png"])
    missing.append("simplejpeg")
    assert "pip install simplejpeg" in hint(0.5, 1, ["a.png", "b.JPEG"]) and "simplejpeg" not in hint(0.5, 1, ["a.png"])


# ---------------------------------------------------------------------------------------------------------------- in a run


def steps_of(folder, model, clock, count, waits, **options):
    """A run in this process whose steps take a second by this clock, and wait so long before it; returns what it wrote."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = run_of(folder, model, optimizer, last=count, save_every=1000, **options)
    with run:
        run.pace.now = clock

        def batches():
            for number in range(count):
                clock.time += waits
                yield number

        for step, _ in run.batches(batches()):
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            if run.finite(step, {"loss": loss}, lambda: ["a.jpg"]):
                optimizer.step()
            clock.time += 1
            run.report(step)
            run.checkpoint(step)
    return run.log.records()


@pytest.mark.parametrize(("waits", "hinted"), [(0.24, False), (0.26, True)])
def test_one_hint_where_waiting_is_above_a_fifth(tmp_path, capsys, waits, hinted):
    records = steps_of(tmp_path, torch.nn.Linear(2, 1), Clock(), 40, waits, log_every=5)
    assert [record["waiting"] for record in records] == [pytest.approx(waits / (1 + waits), abs=1e-3)] * 8
    assert capsys.readouterr().out.count("hint: steps wait for data") == hinted


def test_without_a_bar_a_line_comes_a_minute_after_the_last(tmp_path, monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(log_module.time, "monotonic", clock)
    log = Log(tmp_path, 0, 1000)
    for step in range(1, 201):
        clock.time += 1
        log.advance(step, lambda: {"images_per_second": 8.0})
        if step == 90:
            log.say("something else")
    told = capsys.readouterr().out.splitlines()
    assert told == ["step 60/1000  8.0 images/s", "something else", "step 150/1000  8.0 images/s"]
    assert log.records() == []


def test_the_log_holds_the_time_of_each_line_and_prints_it_not(tmp_path, capsys):
    before = time.time()
    log = Log(tmp_path, 0, 9)
    log.write(step=1, loss=0.5, waiting=0.25)
    (record,) = log.records()
    assert before - 0.01 <= record["time"] <= time.time() + 0.01
    assert without_clock([record]) == [{"step": 1, "loss": 0.5}]
    assert capsys.readouterr().out == "step 1/9  loss 0.5  25% waiting for data\n"


def test_a_run_on_a_pipe_says_what_it_trains_and_how_fast(images, tmp_path):
    (tmp_path / "mixed").mkdir()
    for path in images.iterdir():
        (tmp_path / "mixed" / path.name).symlink_to(path)
    (tmp_path / "mixed" / "notes.txt").write_text("no image")
    result = pretrain(tmp_path, tmp_path / "mixed", "--workers", 0, "--max-steps", 14)
    assert result.code == 0, result.err
    told = result.out.splitlines()
    first = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in told[:6])
    assert list(first) == ["model", "decoder", "weights", "images", "training", "evaluation"]
    assert "vit_tiny" in first["model"] and re.search(r"[\d.]+ M parameters.* images of 32x32 pixels", first["model"])
    assert re.fullmatch(r"32 images, listed in [\d.]+ s; passed over 1 .txt, without a reader", first["images"])
    assert first["training"].startswith("20 steps of 8, 5 epochs, peak learning rate 0.000125 ")
    assert told[6] == "an estimate of time and memory follows after step 11"
    assert len([line for line in told if line.startswith("estimate: ") and "(measured in steps 2 to 11)" in line]) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15)) and all(line["time"] > 1e9 for line in lines)
    assert "images_per_second" not in lines[0] and all(set(CLOCK) <= set(line) for line in lines[1:])
    shown = next(line for line in told if line.startswith("step 14/14 "))
    assert re.search(r"  [\d.]+ images/s, \d+% waiting for data, [\d.]+ GB, 0:00:00 left$", shown)


@pytest.mark.posix
def test_a_resumed_run_measures_itself_alone_and_its_losses_are_the_same(whole, images, tmp_path):
    arguments = ["--workers", 0, "--save-every", 5]
    assert pretrain(tmp_path, images, *arguments, "--max-steps", 12, fault="kill@5").code != 0
    resumed = pretrain(tmp_path, images, *arguments, "--max-steps", 12, "--resume")
    assert resumed.code == 0, resumed.err
    assert "estimate" not in resumed.out  # 7 steps are too few
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    speed = {line["step"]: line.get("images_per_second") for line in lines}
    assert speed[6] is None and speed[7] > 0
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("script", ["finetune.py", "segment.py"])
def test_other_scripts_say_it_too(tmp_path, script):
    small = "img_size=32 patch_size=8 embed_dim=32 depth=1 num_heads=2"
    if script == "finetune.py":
        given = ["--preset", "quick", "--data", "sample", "--model", "random:mvmae_vit_tiny_patch16", "--image-size", 32]
        given += ["--epochs", 1, "--batch-size", 64, "--train-images", 256, "--val-images", 20]
    else:
        given = ["--preset", "toy", "--toy-images", 12, "--steps", 4, "--batch-size", 4, "--model-args", small]
        given += ["--image-size", 32, "--stride", 32]
    result = run_script(script, *given, "--output-dir", "run", "--log-every", 1, "--workers", 0, folder=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"^model +\S", result.out, re.MULTILINE) and re.search(r"^training +4 steps of ", result.out, re.MULTILINE)
    assert re.search(r"^step 4/4 .* images/s, \d+% waiting for data, ", result.out, re.MULTILINE)
