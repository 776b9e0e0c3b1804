"""Faults that real users of such training met, injected into the real scripts. F1, F2, ... are the faults of
examples/FAULTS.md."""

import ast
import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, run_processes, with_fault
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, losses, pretrain, run_of, start, wait_for_steps, write_images

sys.path.insert(0, str(EXAMPLES))

from engine import checkpoint
from engine.ends import PATIENCE, UNBEGUN, Stop
from engine.log import Log

ROOT = Path(__file__).parents[1]


def processes_under(folder):
    """Those that still run in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(true, seconds=300):
    """Tell whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def die_in_the_second_save():
    """kill -9 when half of the bytes of a checkpoint are written."""
    save, saved = torch.save, []

    def half(state, file):
        saved.append(1)
        save(state, file)
        if len(saved) == 2:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


@pytest.mark.posix
def test_f1_killed_in_the_middle_of_writing_a_checkpoint(whole, images, tmp_path):
    assert pretrain(tmp_path, images, *STEPS, patch=die_in_the_second_save).code == -signal.SIGKILL
    run = tmp_path / "run"
    assert (run / "checkpoint.pt.unfinished").exists() and end_of(tmp_path)["step"] == 5
    resumed = pretrain(tmp_path, images, *STEPS, "--resume")
    assert resumed.code == 0 and "resuming run after step 5" in resumed.out
    assert not (run / "checkpoint.pt.unfinished").exists()
    assert_identical(end_of(tmp_path), end_of(whole))


class Killed(BaseException):
    """The process ends here: nothing of it catches this."""


def state(step):
    return {"step": step, "settings": {}, "optimizer": {}, "weight": torch.arange(1000.0) + step}


@pytest.mark.parametrize("end", [Killed(), OSError(errno.EIO, "Input/output error")], ids=["killed", "refused"])
@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 2), ("open", 1)])
@pytest.mark.parametrize("before", [False, True])
def test_f2_ended_at_each_system_call_of_a_save(tmp_path, monkeypatch, call, number, before, end):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, state(step))
    calls, real = [], getattr(os, call)

    def fails(*arguments, **options):
        calls.append(call)
        if len(calls) != number:
            return real(*arguments, **options)
        if not before:
            real(*arguments, **options)
        raise end

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises((Killed, checkpoint.SaveError)):
            checkpoint.save_checkpoint(tmp_path, state(3))
    assert len(calls) >= number
    assert checkpoint.load_checkpoint(tmp_path)["step"] in (2, 3)
    checkpoint.save_checkpoint(tmp_path, state(4))
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint-previous.pt"}


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeroed tail": lambda content: content[:-2000] + bytes(2000),
    "zeroed": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>not found</html>",
    "in front": lambda content: b"t" + content,  # zipfile reads it, torch takes it for another format
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_f3_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, capsys):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, state(step))
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 1
    assert re.search(r"warning: .*/checkpoint.pt (is damaged|is not)", capsys.readouterr().err)
    (tmp_path / "checkpoint-previous.pt").write_bytes(newest.read_bytes())
    with pytest.raises(Stop, match=r"no checkpoint in .* can be read: .*checkpoint.pt .*checkpoint-previous.pt") as stop:
        checkpoint.load_checkpoint(tmp_path)
    assert stop.value.code == 2


def test_f3_never_a_silent_start_at_0(whole, images, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / "run" / name).write_bytes((whole / "run" / name).read_bytes()[:-100])
    result = pretrain(tmp_path, images, *STEPS, "--resume")
    assert (
        result.code == 2 and "no checkpoint in run can be read" in result.err and not (tmp_path / "run" / "log.jsonl").exists()
    )


def test_f4_any_flipped_bit_of_a_tensor_is_found(tmp_path):
    checkpoint.save_checkpoint(tmp_path, state(1))
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    begin = content.index(state(1)["weight"].numpy().tobytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(begin, begin + 4000, 50):
        flip_bit(path, int(position), int(rng.integers(8)))
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read_checkpoint(path)
        path.write_bytes(content)
    assert checkpoint.read_checkpoint(path)["step"] == 1


def allow_small_files():
    """No file may grow over 40 kB, as on a full disk or with a quota used up."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def refuse_the_first_save():
    save, saved = torch.save, []

    def refused(state, file):
        saved.append(1)
        if len(saved) == 1:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    torch.save = refused


@pytest.mark.linux
def test_f5_a_disk_that_is_full_at_the_end(whole, images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=allow_small_files)
    assert result.code == 1 and list(losses(tmp_path)) == list(range(1, 13))
    assert "warning: step 5 is not saved: cannot write run/checkpoint.pt" in result.out
    assert "the end is not saved, only step 0 is" in result.err and "make room" in result.err
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


def test_f5_a_disk_that_is_full_for_a_while(whole, images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=refuse_the_first_save)
    assert result.code == 0
    assert "warning: step 5 is not saved: cannot write run/checkpoint.pt: No space left on device" in result.out
    assert_identical(end_of(tmp_path), end_of(whole))


def test_f11_other_images_are_refused(whole, images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes((whole / "run" / "checkpoint.pt").read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    for path in images.iterdir():
        (other / path.name).symlink_to(path)
    (other / "31.jpg").rename(other / "32.jpg")
    moved = pretrain(tmp_path, other, *STEPS, "--resume")
    assert moved.code == 2 and "images was" in moved.err
    more = pretrain(tmp_path, images, *STEPS, "--resume", "--max-steps", 13, "--epochs", 6, "--log-every", 2)
    assert more.code == 0 and "epochs was 5.0 and is 6.0 now; log_every was 1 and is 2 now" in more.out


class Payload:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("old", [False, True])
def test_f12_a_checkpoint_that_would_run_code_is_refused(images, tmp_path, old):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save({**state(1), "model": Payload()}, path, _use_new_zipfile_serialization=not old)
    result = pretrain(tmp_path, images, *STEPS, "--resume")
    assert result.code == 2 and "no checkpoint in run can be read" in result.err
    assert not list(tmp_path.rglob("executed"))
    if not old:
        assert "could run code" in result.err
    os.chdir(tmp_path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # it does run where it is not refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.pop("encoder.norm.weight"), ["encoder.norm.weight"]),
        (lambda model: model.update(extra=torch.zeros(1)), ["extra"]),
        (lambda model: model.update({"encoder.norm.weight": torch.zeros(7)}), ["encoder.norm.weight", "(7,)", "(32,)"]),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_f13_a_checkpoint_that_does_not_fit_is_refused_by_key(whole, images, tmp_path, change, words):
    content = end_of(whole)
    change(content["model"])
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    result = pretrain(tmp_path, images, *STEPS, "--resume", "--max-steps", 13)
    assert result.code == 2 and [word for word in words if word not in result.err] == [], result.err
    assert "Traceback" not in result.err


def test_f13_a_checkpoint_without_its_parts_is_none(whole, images, tmp_path):
    (tmp_path / "run").mkdir()
    torch.save({"model": end_of(whole)["model"]}, tmp_path / "run" / "checkpoint.pt")
    result = pretrain(tmp_path, images, *STEPS, "--resume")
    assert result.code == 2 and "it holds no optimizer, settings, step" in result.err


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.linux
def test_f7_a_second_signal_after_a_while_ends_the_run_at_once(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 1, fault="long@2")
    wait_for_steps(process, tmp_path, 2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(PATIENCE + 0.5)
    assert process.process.is_alive()  # in a long step
    os.kill(process.pid, signal.SIGINT)
    assert process.finish().code == 128 + signal.SIGINT  # at the end of the step it would be SIGTERM's
    assert wait_until(lambda: processes_under(tmp_path) == [])


@pytest.mark.posix
def test_f51_the_same_signal_again_within_seconds_or_in_a_save_is_one(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 1, fault="slow", patch=signal_during_slow_saves)
    wait_for_steps(process, tmp_path, 2)
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    result = process.finish()
    step = end_of(tmp_path)["step"]
    assert result.code == 128 + signal.SIGTERM and f"stopped after step {step} of 12; step {step} is saved" in result.err


def signal_during_slow_saves():
    """Saves last longer than signals count as one, and another signal comes at their end."""
    save = torch.save

    def slow(state, file):
        time.sleep(PATIENCE + 0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    torch.save = slow


@pytest.mark.posix
def test_f51_a_hangup_is_left_alone_under_nohup(images, tmp_path):
    process = start(tmp_path, images, *STEPS, fault="slow", patch=ignore_hangups)
    wait_for_steps(process, tmp_path, 2)
    os.kill(process.pid, signal.SIGHUP)
    assert process.finish().code == 0 and end_of(tmp_path)["step"] == 12


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in [name for name in sys.modules if name.split(".")[0] in ("engine", "tasks")]:
        del sys.modules[name]  # this file has imported it, and it asks then what the signals do


def interrupt_the_start():
    import mvmae.data

    real = mvmae.data.open_images

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    mvmae.data.open_images = interrupted


@pytest.mark.posix
def test_f7_ctrl_c_during_the_start(images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=interrupt_the_start)
    assert result.code == 130 and result.err.strip().splitlines()[-1] == UNBEGUN
    assert "Traceback" not in result.err


def signal_in_the_first_save():
    save, saved = torch.save, []

    def interrupted(state, file):
        saved.append(1)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    torch.save = interrupted


@pytest.mark.posix
def test_f7_a_signal_during_a_save_lets_it_end(whole, images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=signal_in_the_first_save, fault="slow")
    assert result.code == 128 + signal.SIGTERM and end_of(tmp_path)["step"] in range(5, 12)
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(whole))


@pytest.mark.posix
def test_f7_a_signal_in_the_last_step_is_success(whole, images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, "--save-every", 100, patch=signal_in_the_first_save)
    assert result.code == 0 and (tmp_path / "run" / "encoder").is_dir()
    assert_identical(end_of(tmp_path), end_of(whole))


# ------------------------------------------------------------------------------------------------------- cut and resumed


@pytest.mark.posix
def test_f9_three_cuts_in_one_epoch_and_one_at_its_border(whole, images, tmp_path):
    steps = [*STEPS, "--save-every", 1, "--resume"]
    for cut in (5, 6, 7, 8):
        result = pretrain(tmp_path, images, *steps, fault=f"kill@{cut}")
        assert result.code == -signal.SIGKILL and end_of(tmp_path)["step"] == cut
    assert pretrain(tmp_path, images, *steps).code == 0
    assert_identical(end_of(tmp_path), end_of(whole))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (4, 2)])
def test_f10_going_on_with_another_number_of_processes(whole, images, tmp_path, first, second):
    for count, steps in ((first, 6), (second, 12)):
        given = ["--data", images, "--output-dir", "run", *ARGUMENTS, "--workers", 0, "--max-steps", steps, "--resume"]
        results = run_processes("pretrain.py", *given, folder=tmp_path, count=count)
        assert [result.code for result in results] == [0] * count, results
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    logs = [Log(folder / "run", 1, 0).records() for folder in (tmp_path, whole)]
    assert len({tuple(line["lr"] for line in log if "lr" in line) for log in logs}) == 1


# ----------------------------------------------------------------------------------------------------- non-finite numbers


OVERFLOW = ["--mean", 0, 0, 0, "--std", 1e-30, 1e-30, 1e-30, "--max-steps", 4, "--log-every", 1]


def test_f14_a_batch_that_is_not_finite_stops_the_run_by_name(one_bright, tmp_path):
    result = pretrain(tmp_path, one_bright, *STEPS, *OVERFLOW)
    found = re.search(
        r"error: step (\d): loss_(rec|con) in process 0 is not finite: .*nonfinite.txt.* step (\d) is saved", result.err
    )
    assert result.code == 1 and found, result.err
    step = int(found[1])
    assert end_of(tmp_path)["step"] == int(found[3]) == step - 1
    assert all(value.isfinite().all() for value in end_of(tmp_path)["model"].values())
    first, *names = (tmp_path / "run" / "nonfinite.txt").read_text().splitlines()
    assert first.startswith(f"step {step}: loss_") and len(names) == 8 and any("/7.png" in name for name in names)
    again = pretrain(tmp_path, one_bright, *STEPS, *OVERFLOW, "--resume", "--skip-nonfinite", 1)
    assert again.code == 0 and f"warning: step {step}: " in again.out and "left out, 1 of at most 1" in again.out
    end = end_of(tmp_path)
    assert end["skipped"] == 1 and all(value.isfinite().all() for value in end["model"].values())
    assert step not in losses(tmp_path) and all(map(math.isfinite, losses(tmp_path).values()))
    beyond = pretrain(tmp_path, one_bright, *STEPS, *OVERFLOW, "--resume", "--skip-nonfinite", 1, "--max-steps", 8)
    assert beyond.code == 1 and "is not finite" in beyond.err  # the count goes on


def test_f14_all_processes_agree_on_what_one_has_met(one_bright, tmp_path):
    given = ["--data", one_bright, "--output-dir", "run", *ARGUMENTS, *STEPS, *OVERFLOW, "--loss-weight", 0]
    results = run_processes("pretrain.py", *given, folder=tmp_path)
    assert [result.code for result in results] == [1, 1]
    found = [re.search(r"error: (step \d: loss_rec in process (\d) is not finite)", result.err) for result in results]
    assert found[0] and found[1] and found[0][1] == found[1][1]
    _, *names = (tmp_path / "run" / "nonfinite.txt").read_text().splitlines()
    assert len(names) == 4 and any("/7.png" in name for name in names)  # of the process that met it alone


def test_f14_a_gradient_alone_leaves_weights_moments_and_statistics_untouched(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(number, x, power):
        loss = (model(x) ** 2).sum() ** power
        loss.backward()
        accepted = run.finite(number, {"loss": loss}, lambda: ["a.jpg"])
        if accepted:
            optimizer.step()
        optimizer.zero_grad()
        return accepted

    with run_of(tmp_path, model, optimizer, last=3, skip_nonfinite=1) as run:
        assert step(1, torch.randn(4, 2), 1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        with torch.no_grad():
            model[1].weight.zero_(), model[1].bias.zero_()  # the loss is 0: the gradient of its root is infinite
        before |= {"1.weight": torch.zeros(2), "1.bias": torch.zeros(2)}
        assert not step(2, torch.randn(4, 2) + 9, 0.5)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        after = [value for entry in optimizer.state.values() for value in entry.values()]
        assert all(map(torch.equal, moments, after)) and run.skipped == 1
        assert (tmp_path / "nonfinite.txt").read_text() == "step 2: the gradient is not finite\n  'a.jpg'\n"
        with pytest.raises(Stop, match="step 3: the gradient is not finite"):
            step(3, torch.randn(4, 2), 0.5)
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 2


# ------------------------------------------------------------------------------------------------------------- processes


@pytest.mark.posix
@pytest.mark.parametrize("fault", ["kill", "raise", "exit"])
def test_f24_the_others_end_with_the_cause_when_one_process_does(images, tmp_path, fault):
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS]
    results = run_processes("pretrain.py", *given, folder=tmp_path, faults=[None, f"{fault}@7"])
    assert results[0].code == 1 and "error: another process of this run has ended" in results[0].err
    assert "Traceback" not in results[0].err and "--resume" in results[0].err
    assert results[1].code == {"kill": -signal.SIGKILL, "raise": 1, "exit": 3}[fault]
    assert end_of(tmp_path)["step"] == 7


def torchrun(folder, images, fault, options=(), env=None):
    """Two processes under the real torchrun, each with a loading process."""
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--workers", 1, "--resume"]
    return in_a_group(folder, *launcher(*options), *with_fault(fault, "pretrain.py"), *given, env=env)


def launcher(*options):
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options


def in_a_group(folder, *arguments, env=None):
    """Python in a process group of its own, as a shell starts it; what it prints is in torchrun.txt."""
    command, environment = [sys.executable, *map(str, arguments)], {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with (folder / "torchrun.txt").open("w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


DENSE = ["--preset", "toy", "--model-args", "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2", "--image-size", 32]
DENSE += ["--toy-images", 12, "--workers", 2, "--batch-size", 4, "--steps", 40, "--log-every", 1, "--device", "cpu"]
DENSE += ["--channels", 16, "--pictures", 0, "--output-dir", "run"]


@pytest.mark.linux
@pytest.mark.parametrize("launch", [(), launcher()], ids=["group", "torchrun"])
@pytest.mark.parametrize(("script", "more"), [("detect.py", ["--fc-width", 16]), ("segment.py", ["--stride", 32])])
def test_f40_sigterm_in_detection_and_segmentation_saves(tmp_path, script, more, launch):
    if script == "detect.py":
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    process = in_a_group(tmp_path, *launch, *with_fault("slow", script), *DENSE, *more)
    wait_for_lines(process, tmp_path, 2)
    if launch:
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)  # to the loading processes too
    code, printed = process.wait(900), (tmp_path / "torchrun.txt").read_text()
    assert code == (1 if launch else 128 + signal.SIGTERM), printed
    assert 2 <= end_of(tmp_path)["step"] < 40 and "is saved" in printed and "killed by signal" not in printed
    assert wait_until(lambda: processes_under(tmp_path) == [])


def wait_for_lines(process, folder, count):
    """Wait until the log of a run tells of so many steps."""
    log = folder / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert process.poll() is None, (folder / "torchrun.txt").read_text()
        time.sleep(0.02)


@pytest.mark.linux
def test_f6_sigterm_to_torchrun_saves_and_leaves_no_process(whole, images, tmp_path):
    process = torchrun(tmp_path, images, "slow")
    wait_for_lines(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) != 0
    step = end_of(tmp_path)["step"]
    assert (
        2 <= step < 12 and f"stopped after step {step} of 12; step {step} is saved" in (tmp_path / "torchrun.txt").read_text()
    )
    assert wait_until(lambda: processes_under(tmp_path) == [])
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.linux
def test_f24_torchrun_starts_a_killed_process_again(whole, images, tmp_path):
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else gloo and nccl find addresses of the ended processes
    process = torchrun(tmp_path, images, "kill@7", options=["--max-restarts", "3"], env=fresh)
    assert process.wait(900) == 0, (tmp_path / "torchrun.txt").read_text()
    assert re.search("resuming run after step [57]", (tmp_path / "torchrun.txt").read_text())  # 7 where one outlives the other
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    assert wait_until(lambda: processes_under(tmp_path) == [])


def test_f25_images_that_do_not_divide_among_processes(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 13)
    given = ["--data", "images", "--output-dir", "run", *ARGUMENTS, *STEPS, "--batch-size", 4, "--epochs", 2]
    results = run_processes("pretrain.py", *given, folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]  # three whole batches an epoch


@pytest.mark.linux
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_f26_a_loading_process_that_is_killed(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 2, "--save-every", 1, fault="slow")
    wait_for_steps(process, tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) >= 2
    os.kill(workers[0], signal.SIGKILL)
    result = process.finish()
    assert result.code == 1
    assert "error: a loading worker died (out of memory?)" in result.err and "Traceback" not in result.err
    assert end_of(tmp_path)["step"] >= 2
    assert pretrain(tmp_path, images, *STEPS, "--resume", "--max-steps", 6).code == 0


@pytest.mark.posix
def test_f35_two_runs_in_one_folder(whole, images, tmp_path):
    first = start(tmp_path, images, *STEPS, fault="slow")
    wait_for_steps(first, tmp_path, 6)
    os.kill(first.pid, signal.SIGSTOP)  # so that it still runs, and no step is taken, however long the second needs
    second = pretrain(tmp_path, images, *STEPS, "--resume")
    assert second.code == 2 and f"run is in use by process {first.pid} on {socket.gethostname()}" in second.err
    os.kill(first.pid, signal.SIGKILL)
    first.finish()
    third = pretrain(tmp_path, images, *STEPS, "--resume")
    assert third.code == 0 and "resuming run after step 5" in third.out
    assert_identical(end_of(tmp_path), end_of(whole))


# ------------------------------------------------------------------------------------------------------- data and places


def test_f28_f38_equal_images_run_and_their_collapse_is_told(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (48, 40), (90, 120, 30)).save(tmp_path / "images" / f"{i}.png")
    result = pretrain(tmp_path, "images", *STEPS, "--monitor-images", 16, "--monitor-every", 1, "--max-steps", 3)
    assert result.code == 0 and all(map(math.isfinite, losses(tmp_path).values()))
    assert re.search(r"warning: the representation has collapsed: the effective rank of the features is 1\.", result.out), (
        result.out
    )


@pytest.mark.linux
def test_f39_an_output_folder_that_cannot_be(images, tmp_path):
    (tmp_path / "file").write_text("text")
    for folder in ("file", "file/run", "/proc/run"):
        result = pretrain(tmp_path, images, *STEPS, "--output-dir", folder)
        assert result.code == 2 and f"error: cannot write to the output folder {folder}: " in result.err, result
        assert "step 1/" not in result.out and "Traceback" not in result.err


@pytest.mark.linux
def test_f39_a_home_and_a_cache_that_cannot_be_written(images, tmp_path):
    places = dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCH_HOME"), "/proc/nowhere")
    result = pretrain(tmp_path, images, *STEPS, "--max-steps", 2, env=places)
    assert result.code == 0 and (tmp_path / "run" / "curves.png").exists(), result.err


def test_f39_a_run_that_was_moved_goes_on(whole, images, tmp_path):
    assert pretrain(tmp_path, images, *STEPS, "--max-steps", 6).code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    result = pretrain(tmp_path, images, *STEPS, "--resume", "--output-dir", "moved")
    assert result.code == 0 and "resuming moved after step 6" in result.out
    (tmp_path / "moved").rename(tmp_path / "run")
    assert_identical(end_of(tmp_path), end_of(whole))


# --------------------------------------------------------------------------------------------------------------- security


def test_nothing_from_outside_is_executed():
    """No eval, no exec, no shell, no unpickling but torch's of weights alone."""
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "subprocess.run"}
    forbidden |= {"subprocess.Popen", "subprocess.call", "tarfile.extractall", "shutil.unpack_archive", "marshal.loads"}
    loads = 0
    for path in [*(ROOT / "mvmae").rglob("*.py"), *EXAMPLES.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in forbidden and "shell" not in given, f"{path.name}:{node.lineno}: {name}"
            if name == "torch.load":
                loads += 1
                assert given.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            if name.endswith(("np.load", "numpy.load")):
                assert given.get("allow_pickle", "False") == "False", f"{path.name}:{node.lineno}"
    assert loads == 1


# ------------------------------------------------------------------------------------------------------ the table of faults


def test_every_fault_has_a_line_in_the_table_whose_tests_exist():
    rows = re.findall(r"^\| (F\d+) \| .* \| (`.*`) \|$", (EXAMPLES / "FAULTS.md").read_text(), re.MULTILINE)
    numbers = [int(row[0][1:]) for row in rows]
    assert numbers[:39] == list(range(1, 40)) and numbers == sorted(set(numbers))
    known = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        known[path.stem.removeprefix("test_")] = names
    for fault, cell in rows:
        for entry in re.findall(r"`([^`]+)`", cell):
            file, _, name = entry.partition(": ")
            assert name in known.get(file, ()), f"{fault}: tests/test_{file}.py has no {name}"
