"""What a run keeps on the disk, and who may touch it: checkpoints that do not fit, locks, links, other data, other machines.

F1, F2, ... are the faults of examples/FAULTS.md; those of writing and of bit-exact resume are in test_faults.py.
"""

import errno
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, pretrain, run_of, start, wait_for_steps
from torch import nn

from mvmae import hub

sys.path.insert(0, str(EXAMPLES))

from timm.optim import Lars

from engine import checkpoint, locks, snapshot
from engine.config import RunConfig
from engine.distributed import Processes
from engine.ends import Stop
from engine.optim import build_optimizer
from engine.run import Run
from mvmae.weights import write_text

ALONE = Processes(0, 1, torch.device("cpu"), None)


@pytest.fixture
def half(tmp_path, images):
    """A run of six steps of twelve."""
    assert pretrain(tmp_path, images, *STEPS, "--max-steps", 6).code == 0
    return tmp_path


# ------------------------------------------------------------------------------------------- what a checkpoint must hold


def trained(make=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1)):
    """A model and its optimizer after one step."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = make(model)
    (model(torch.randn(4, 3)) ** 3).sum().backward()
    optimizer.step()
    return model, optimizer


def content(model, optimizer, **more):
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": {}, "step": 1, **more}
    return snapshot.to_host(parts)


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "lars": lambda model: Lars(model.parameters(), lr=0.1, momentum=0.9),
    "muon": lambda model: build_optimizer(
        model, "muon", lr=0.1, weight_decay=0.0, beta2=0.95, precision="float32", device=torch.device("cpu")
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_fits_is_restored_and_the_options_stay_as_the_run_sets_them(tmp_path, make):
    model, optimizer = trained(make)
    saved = content(model, optimizer, best=3.5)
    saved["optimizer"]["param_groups"][0]["weight_decay"] = 0.7
    other, second = trained(make)
    snapshot.restore(saved, tmp_path, {"model": other}, second, {"best": 0})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    ours, theirs = second.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, entry in theirs["state"].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(ours["state"][number][key])) for key, value in entry.items()
        )


def entry(saved):
    return saved["optimizer"]["state"][1]


MALFORMED = {
    "no model": (lambda saved: saved.pop("model"), "model is missing"),
    "a list as model": (lambda saved: saved.update(model=[1]), "model is a list instead of"),
    "an empty model": (lambda saved: saved.update(model={}), "model.0.weight is missing"),
    "numbers as weights": (
        lambda saved: saved["model"].update({"0.weight": 3}),
        "model.0.weight is a number instead of a tensor",
    ),
    "another type of weights": (
        lambda saved: saved["model"].update({"0.bias": torch.zeros(2).half()}),
        "torch.float16 instead",
    ),
    "an unknown weight": (lambda saved: saved["model"].update(extra=torch.zeros(1)), "model.extra is unexpected"),
    "no best": (lambda saved: saved.pop("best"), "best is missing"),
    "a word as best": (lambda saved: saved.update(best="3"), "best is a str instead of a number"),
    "words as before": (lambda saved: saved.update(before={"knn": "x"}), "before.knn is a str instead of a number"),
    "other features": (lambda saved: saved.update(features=torch.zeros(5, 3)), r"features is \(5, 3\) instead of \(0, 4\)"),
    "no state of the optimizer": (lambda saved: saved["optimizer"].pop("state"), "optimizer is not a dictionary of state"),
    "no groups": (lambda saved: saved["optimizer"].pop("param_groups"), "optimizer is not a dictionary of state"),
    "a word as group": (lambda saved: saved["optimizer"].update(param_groups=["x"]), "param_groups holds"),
    "another number of parameters": (lambda saved: saved["optimizer"]["param_groups"][0]["params"].pop(), r"holds \[3\] par"),
    "no moments": (lambda saved: saved["optimizer"]["state"].clear(), "optimizer.state is empty"),
    "moments of another shape": (
        lambda saved: entry(saved).update(exp_avg=torch.zeros(3)),
        r"1.exp_avg is \(3,\) instead of \(2",
    ),
    "a moment less": (lambda saved: entry(saved).pop("exp_avg_sq"), "optimizer.state.1.exp_avg_sq is missing"),
    "moments of nothing": (lambda saved: saved["optimizer"]["state"].update({9: {}}), "optimizer.state.9 is unexpected"),
    "a word as moments": (lambda saved: saved["optimizer"]["state"].update({0: "x"}), "optimizer.state.0 is a str instead of"),
    "moments by name": (lambda saved: saved["optimizer"].update(state={"a": {}}), "optimizer.state.a is unexpected"),
}


@pytest.mark.parametrize(("change", "words"), MALFORMED.values(), ids=MALFORMED)
def test_f43_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, words):
    model, optimizer = trained()
    saved = content(model, optimizer, best=1.0, before={"knn": 1.0}, features=torch.zeros(5, 4))
    expected = {"best": -1.0, "before": {}, "features": torch.empty(0, 4)}
    snapshot.restore(saved, tmp_path, {"model": model}, optimizer, expected)  # which fits
    before = content(model, optimizer)
    change(saved)
    with pytest.raises(Stop, match=words):
        snapshot.restore(saved, tmp_path, {"model": model}, optimizer, expected)
    after = content(model, optimizer)
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert list(snapshot.differences(after, before)) == []


def circle():
    settings = {}
    settings["again"] = settings
    return settings


UNUSABLE = {
    "settings in a list": ({"settings": [1, 2]}, "settings is not a dictionary of plain values"),
    "tensors as settings": ({"settings": {"a": torch.zeros(2)}}, "settings is not a dictionary of plain values"),
    "settings by number": ({"settings": {1: 2}}, "settings is not a dictionary of plain values"),
    "settings in a circle": ({"settings": circle()}, "settings is not a dictionary of plain values"),
    "a word as step": ({"step": "3"}, "step is not a whole number"),
    "a step before the first": ({"step": -1}, "step is not a whole number"),
    "half a step": ({"step": 1.5}, "step is not a whole number"),
    "a truth as step": ({"step": True}, "step is not a whole number"),
    "a word as skipped": ({"skipped": "3"}, "skipped is not a whole number"),
    "a list as machine": ({"machine": []}, "machine is not a dictionary"),
    "a sparse tensor": (
        {"model": {"w": torch.zeros(3, 3).to_sparse()}},
        "(model.w is no plain|sparse) tensor",
    ),  # some versions of torch warn
    "a tensor without numbers": ({"model": {"w": torch.zeros(3, device="meta")}}, "model.w is no plain tensor"),
    "a stretched tensor": ({"model": {"w": torch.zeros(1).expand(10**12)}}, "model.w is no plain tensor"),
    "NaN": ({"model": {"w": torch.tensor(math.nan)}}, "has diverged: model.w holds NaN or infinity"),
    "infinity in a moment": ({"optimizer": {"state": {0: {"m": torch.tensor(-math.inf)}}}}, "optimizer.state.0.m holds NaN or"),
}


@pytest.mark.parametrize(("part", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_f66_a_checkpoint_with_odd_parts_is_named_and_the_one_before_is_used(tmp_path, capsys, part, words):
    good = {"step": 3, "settings": {}, "optimizer": {}}
    torch.save({**good, **part}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"checkpoint.pt is .*{words}"):
        checkpoint.read_checkpoint(tmp_path / "checkpoint.pt", checkpoint.PARTS)
    with pytest.raises(Stop, match="no checkpoint in"):
        checkpoint.load_checkpoint(tmp_path, checkpoint.PARTS)
    torch.save(good, tmp_path / "checkpoint-previous.pt")
    assert checkpoint.load_checkpoint(tmp_path, checkpoint.PARTS) == good


def test_f66_deep_and_circular_and_compressed_checkpoints(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert snapshot.not_finite({"a": deep, "b": torch.tensor(math.nan)}) == "b"
    assert [name for name, _ in snapshot.named_tensors({"a": circle(), "b": [torch.zeros(1)]})] == ["b.0"]
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="damaged or cut short: BadZipFile: it is compressed"):
        checkpoint.read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved["monitor"].pop("before"), "monitor.before is missing"),
        (lambda saved: saved["monitor"].pop("start_features"), "monitor.start_features is missing"),
        (lambda saved: saved["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "optimizer.state.0.exp_avg is (3,)"),
        (lambda saved: saved.update(settings=[1]), "settings is not a dictionary"),
    ],
    ids=["before", "start_features", "moments", "settings"],
)
def test_f43_pretraining_refuses_what_does_not_fit_in_one_line(whole, images, tmp_path, change, words):
    saved = end_of(whole)
    change(saved)
    (tmp_path / "run").mkdir()
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = pretrain(tmp_path, images, *STEPS, "--resume", "--max-steps", 13)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err, result.err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before and not (tmp_path / "run" / "log.jsonl").exists()


# ---------------------------------------------------------------------------------------- the last good one is never lost


def explode_in_step_7():
    """A weight becomes infinite in an update whose gradient is finite."""
    step, steps = torch.optim.AdamW.step, []

    def update(self, *arguments, **options):
        result = step(self, *arguments, **options)
        steps.append(1)
        if len(steps) == 7:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf
        return result

    torch.optim.AdamW.step = update


@pytest.mark.parametrize("options", [[], ["--skip-nonfinite", 4]])
def test_f54_weights_that_are_not_finite_are_never_saved(whole, images, tmp_path, options):
    result = pretrain(tmp_path, images, *STEPS, *options, patch=explode_in_step_7)
    assert result.code == 1 and "holds NaN or infinity after step" in result.err and "step 5 is saved" in result.err, result
    assert end_of(tmp_path)["step"] == 5 and not snapshot.not_finite(end_of(tmp_path))
    again = pretrain(tmp_path, images, *STEPS, "--resume")
    assert again.code == 0
    assert_identical(end_of(tmp_path), end_of(whole))


def test_f54_a_moment_that_is_not_finite_is_not_saved_either(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    with pytest.raises(checkpoint.NotFinite, match="optimizer.state.0.exp_avg_sq holds NaN or infinity after step 2"):
        checkpoint.save_checkpoint(
            tmp_path, {"step": 2, "optimizer": {"state": {0: {"exp_avg_sq": torch.tensor([0, math.inf])}}}}
        )
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def die_between_the_renames():
    """kill -9 in a save, before the new checkpoint gets its name."""
    replace = os.replace

    def killed(source, target):
        if str(source).endswith("checkpoint.pt.unfinished"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killed


@pytest.mark.posix
def test_f54_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(whole, images, tmp_path):
    assert pretrain(tmp_path, images, *STEPS, "--max-steps", 10).code == 0
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    cut = pretrain(tmp_path, images, *STEPS, "--resume", patch=die_between_the_renames)
    assert cut.code == -signal.SIGKILL and "resuming run after step 5" in cut.out
    assert "checkpoint.pt is kept as checkpoint-damaged.pt" in cut.out
    again = pretrain(tmp_path, images, *STEPS, "--resume")
    assert again.code == 0 and "resuming run after step 5" in again.out, again.err
    assert_identical(end_of(tmp_path), end_of(whole))


# ----------------------------------------------------------------------------------------- beside the steps, and by time


class Counter:
    """Has a state that no module has."""

    def __init__(self):
        self.count = torch.zeros(())

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_all_that_a_run_names_is_written_and_comes_back_but_for_what_is_about_it(tmp_path):
    def begin(resume):
        model, optimizer = trained()
        counter, best = Counter(), {"top1": -1.0}
        config = RunConfig(output_dir=str(tmp_path), save_every=1, save_minutes=0.0, log_every=1, resume=resume)
        run = Run(config, ALONE, "images")
        about = {"command": "again" if resume else "first"}
        run.take_up(last=3, model=model, optimizer=optimizer, about=about, counter=counter, best=best)
        return run, model, optimizer, counter, best

    run, model, optimizer, counter, best = begin(resume=False)
    assert run.found is None and run.step == 0
    with run:
        for step, _ in run.batches(range(2)):
            counter.count, best["top1"] = torch.tensor(7.0 * step), 5.0 * step
            run.report(step)
            run.checkpoint(step)
    found, other, second, back, scores = begin(resume=True)
    assert found.step == 2 and back.count == 14 and scores == {"top1": 10.0}
    assert checkpoint.load_checkpoint(tmp_path)["command"] == "first" and found.state()["command"] == "again"
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    moments = [entry["exp_avg"] for entry in optimizer.state.values()]
    assert all(map(torch.equal, moments, (entry["exp_avg"] for entry in second.state.values())))
    with found:
        assert [step for step, _ in found.batches(range(1))] == [3]


def test_a_checkpoint_is_written_beside_the_next_steps_as_the_state_was(tmp_path, monkeypatch):
    save, go, under_way = torch.save, threading.Event(), []

    def slow(state, file):
        under_way.append(state["step"])
        assert go.wait(60)
        save(state, file)

    monkeypatch.setattr(torch, "save", slow)
    kept = {}
    with run_of(tmp_path, *trained(), last=4) as run:
        for step, _ in run.batches(range(4)):
            if step == 2:
                assert run.writer.saved == 0 and not (tmp_path / "checkpoint.pt").exists()  # step 1 is still being written
                go.set()
            with torch.no_grad():
                kept[step] = [parameter.add_(step).clone() for parameter in run.model.parameters()]
            run.checkpoint(step)
    assert under_way == [1, 2, 3, 4] and run.writer.saved == 4
    for name, step in (("checkpoint.pt", 4), ("checkpoint-previous.pt", 3)):
        state = checkpoint.read_checkpoint(tmp_path / name)
        found = [value for key, value in state["model"].items() if "running" not in key and "num" not in key]
        assert state["step"] == step and all(map(torch.equal, found, kept[step]))


def test_a_write_that_fails_is_told_at_the_next_step_and_at_the_end(tmp_path, monkeypatch, capsys):
    def full(state, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    told, run = [], run_of(tmp_path, *trained(), last=4)
    with pytest.raises(Stop, match="the end is not saved, only step 0 is .*No space left on device"), run:
        for step, _ in run.batches(range(4)):
            if run.writer.writing:
                run.writer.writing[1].exception(60)  # it has ended
            told.append((step, capsys.readouterr().out.count("is not saved")))
            run.checkpoint(step)
    assert told[0] == (1, 0) and sum(count for _, count in told) >= 2


def test_minutes_make_a_checkpoint_due_as_steps_do(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with run_of(tmp_path, *trained(), last=10, save_every=1000, save_minutes=15.0) as run:
        writer = run.writer
        monkeypatch.setattr(writer, "save", lambda step, wait=True: (saved.append(step), setattr(writer, "time", now[0])))
        for step, _ in run.batches(range(10)):
            now[0] += 300
            run.checkpoint(step)
    assert saved == [3, 6, 9, 10]  # every fifteen minutes of five a step, and the end


# --------------------------------------------------------------------------------------------------- folders and locks


@pytest.mark.posix
def test_f56_a_folder_that_is_deleted_in_the_middle_is_made_again(whole, images, tmp_path):
    process = start(tmp_path, images, *STEPS, fault="slow")
    wait_for_steps(process, tmp_path, 6)
    shutil.rmtree(tmp_path / "run")
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    result = process.finish()
    assert result.code == 128 + signal.SIGTERM and "is saved: run the same command with --resume to continue" in result.err
    assert "warning: run was deleted and is made again" in result.err and end_of(tmp_path)["step"] >= 6
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(whole))


@pytest.mark.posix
def test_f56_what_was_saved_and_deleted_is_saved_again_before_the_run_says_so(tmp_path):
    folder = tmp_path / "run"
    run = run_of(folder, *trained(), last=4)

    def batches():
        yield 0
        run.writer.settle(wait=True)
        shutil.rmtree(folder)
        run.stop.received = signal.SIGTERM
        yield 1

    with pytest.raises(Stop, match="stopped after step 1 of 4; step 1 is saved"), run:
        for step, _ in run.batches(batches()):
            run.report(step)
            run.checkpoint(step)
    assert checkpoint.load_checkpoint(folder)["step"] == 1


@pytest.mark.posix
def test_f56_a_lock_that_is_deleted_still_keeps_a_second_run_out(images, tmp_path):
    first = start(tmp_path, images, *STEPS, fault="slow")
    wait_for_steps(first, tmp_path, 2)
    (tmp_path / "run" / ".lock").unlink()
    second = pretrain(tmp_path, images, *STEPS, "--resume")
    assert second.code == 2 and "run is in use by" in second.err
    os.kill(first.pid, signal.SIGTERM)
    assert first.finish().code == 143 and (tmp_path / "run" / ".lock").read_text().startswith(f"process {first.pid} ")


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from engine import locks
from pathlib import Path
locks.take(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


def test_f56_a_run_whose_folder_another_has_taken_saves_nothing_there(tmp_path):
    folder = tmp_path / "run"
    locks.take(folder)
    shutil.rmtree(folder)
    other = subprocess.Popen([sys.executable, "-c", HOLD, EXAMPLES, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(checkpoint.SaveError, match=f"run is in use by process {other.pid} on "):
            checkpoint.save_checkpoint(folder, {"step": 1})
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate()
    locks.take(folder)  # a killed process's lock is free
    checkpoint.save_checkpoint(folder, {"step": 1})


@pytest.mark.posix
def test_f56_a_loading_process_does_not_keep_the_lock_of_a_run_that_is_gone(tmp_path):
    """A worker may live on for seconds after its run was killed."""
    code = HOLD.replace('print("held", flush=True)', "import os\npid = os.fork()\nif pid: print(pid, flush=True)")
    first = subprocess.Popen([sys.executable, "-c", code, EXAMPLES, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    worker = int(first.stdout.readline())
    with pytest.raises(Stop, match=f"in use by process {first.pid}"):
        locks.take(tmp_path / "run")
    first.kill()
    first.wait()
    first.stdout.close()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                locks.take(tmp_path / "run")
                break
            except Stop:
                time.sleep(0.01)  # the child may not have got so far as to let go
        os.kill(worker, 0)  # it still lives
        locks.take(tmp_path / "run")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_f56_a_file_system_that_refuses_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl = pytest.importorskip("fcntl", reason="Windows has other locks")
    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr(fcntl, "flock", refused)
    assert checkpoint.open_run(tmp_path / "run", {}, frozenset(), resume=False, processes=ALONE) is None
    told = capsys.readouterr().err
    assert "refuses locks (No locks available): start no second run in it" in told and "cannot write" not in told
    checkpoint.save_checkpoint(tmp_path / "run", {"step": 1})


def test_f56_exported_weights_have_the_mode_of_other_files(tiny_vit, tmp_path):
    old = os.umask(0o027)
    try:
        hub.export(tiny_vit(), tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()} == {0o640}


def test_f56_a_checkpoint_that_is_a_link_to_nowhere_is_no_start_at_0(half, images):
    newest, previous = (half / "run" / name for name in ("checkpoint.pt", "checkpoint-previous.pt"))
    newest.unlink()
    newest.symlink_to("nowhere.pt")
    resumed = pretrain(half, images, *STEPS, "--resume", "--max-steps", 7)
    assert resumed.code == 0 and "checkpoint.pt cannot be read: No such file" in resumed.err
    assert "after step 5" in resumed.out and end_of(half)["step"] == 7
    newest.unlink()
    newest.symlink_to("nowhere.pt")
    previous.unlink(missing_ok=True)
    refused = pretrain(half, images, *STEPS, "--resume")
    assert refused.code == 2 and "no checkpoint in run can be read" in refused.err


NAMES = [".lock", "log.jsonl", "config.json", "checkpoint.pt.unfinished", "encoder", "nonfinite.txt"]


@pytest.mark.parametrize("name", [*NAMES, "bad_files.txt"])
def test_f59_a_link_in_the_run_s_folder_is_not_written_through(tmp_path, name):
    (tmp_path / "run").mkdir()
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(Stop, match=f"run/{name} is a link, and what it points to could be overwritten: remove it"):
        checkpoint.open_run(tmp_path / "run", {}, frozenset(), resume=True, processes=ALONE)
    assert target.read_text() == "precious"


def test_f59_links_that_come_later_are_replaced_and_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    unfinished = ("checkpoint.pt.unfinished", f".a.json.{os.getpid()}.part")
    for name in ("checkpoint.pt", "checkpoint-previous.pt", "a.json", *unfinished):
        (tmp_path / name).symlink_to(target)
    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    write_text(tmp_path / "a.json", "new")
    assert target.read_text() == "precious" and not (tmp_path / "checkpoint.pt").is_symlink()
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 1 and (tmp_path / "a.json").read_text() == "new"
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        locks.lock(tmp_path)
    assert target.read_text() == "precious"


def test_f59_the_export_of_a_run_is_not_written_through_a_link(half):
    shutil.rmtree(half / "run" / "encoder")
    (half / "elsewhere").mkdir()
    (half / "run" / "encoder").symlink_to(half / "elsewhere")
    result = run_script("export.py", "--run", "run", folder=half)
    assert result.code == 2 and "run/encoder is a link" in result.err and not list((half / "elsewhere").iterdir())


# ----------------------------------------------------------------------------------------------------- going on elsewhere


def test_f41_processes_that_find_different_checkpoints_stop(half, images, tmp_path_factory):
    """Each machine has a disk of its own, and only the first process has written to it."""
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--resume"]
    results = run_processes("pretrain.py", *given, folder=half, folders=[half, tmp_path_factory.mktemp("second")])
    for result in results:
        assert result.code == 2 and "find different checkpoints in run (step 6 in process 0, none in process 1)" in result.err
    assert end_of(half)["step"] == 6


def test_f57_the_same_images_elsewhere_go_on_and_others_of_the_same_names_do_not(whole, half, images):
    shutil.copytree(images, half / "moved")
    again = pretrain(half, "moved", *STEPS, "--resume")
    assert again.code == 0 and f"data was {str(images)!r} and is 'moved' now" in again.out, again.err
    assert_identical(end_of(half), end_of(whole))
    (half / "others").mkdir()
    for path in images.iterdir():
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(half / "others" / path.name)
    refused = pretrain(half, "others", *STEPS, "--resume", "--max-steps", 13)
    assert refused.code == 2 and "images was '32-" in refused.err and "--other-data goes on" in refused.err
    taken = pretrain(half, "others", *STEPS, "--resume", "--max-steps", 13, "--other-data")
    assert taken.code == 0 and "images was '32-" in taken.out and end_of(half)["step"] == 13


def test_f67_another_number_of_threads_is_told(whole, half, images):
    assert end_of(half)["machine"]["threads"] == 1 and len(end_of(half)["machine"]["processor"]) > 5
    same = pretrain(half, images, *STEPS, "--resume", "--max-steps", 7)
    assert same.code == 0 and "last bits" not in same.out
    other = pretrain(half, images, *STEPS, "--resume", patch=two_threads)
    assert (
        other.code == 0 and "the last bits of the results can differ from an uncut run's: threads was 1 and is 2" in other.out
    )


def two_threads():
    torch.set_num_threads(2)
