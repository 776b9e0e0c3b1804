"""How runs end early: signals to every script that trains, errors in the middle of a run, a second signal, a hang."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import torch
from running import EXAMPLES, Started, processes_under, torchrun, wait_until
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, losses, pretrain, start, wait_for_steps, write_images

sys.path.insert(0, str(EXAMPLES))

from engine.signals import NOTHING_SAVED, PATIENCE

SHIPPED = ["--encoder-args", "", "--encoder", "mvmae_vit_micro_patch8_64"]
MODEL = "mvmae_vit_micro_patch8_64"
LABELLED = ["--data", "images", "--image-size", 32, "--batch-size", 8, "--epochs", 10]
DENSE = ["--preset", "toy", "--model-args", "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2", "--image-size", 32]
DENSE += ["--toy-images", 12, "--batch-size", 4, "--steps", 40, "--channels", 16, "--pictures", 0]
SCRIPTS = {
    "pretrain.py": [*ARGUMENTS, "--data", "images/train", "--epochs", 10],
    "adapt.py": [*ARGUMENTS[2:], "--data", "images/train", "--epochs", 10, *SHIPPED],
    "finetune.py": ["--preset", "quick", *LABELLED, "--model", MODEL],
    "linear_probe.py": ["--preset", "quick", *LABELLED, "--models", MODEL, "--no-cached", "--few-shot", 0],
    "detect.py": DENSE,
    "segment.py": [*DENSE, "--stride", 32],
}
SIGNALS = {name: getattr(signal, f"SIG{name.upper()}", None) for name in ("term", "hup", "int", "usr1")}  # Windows lacks two
TARGETS = ["process", "group", "torchrun", "torchrun and ranks"]
GRID = [(script, number, target) for script in SCRIPTS for number in ("term", "hup", "int") for target in TARGETS]
GRID += [("pretrain.py", "usr1", "process")]  # which torchrun passes on only where it is told to
THIN = {
    ("pretrain.py", "term", "torchrun and ranks"),
    ("pretrain.py", "hup", "process"),
    ("pretrain.py", "usr1", "process"),
    ("adapt.py", "term", "process"),
    ("finetune.py", "int", "group"),
    ("linear_probe.py", "hup", "group"),
    ("detect.py", "term", "group"),
    ("segment.py", "int", "torchrun"),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Images of two classes in two splits."""
    root = tmp_path_factory.mktemp("labelled")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            write_images(root / split / name, 16)
    return root


@pytest.mark.linux
@pytest.mark.parametrize(
    ("script", "number", "target"),
    [pytest.param(*case, marks=[] if case in THIN else pytest.mark.slow, id="-".join(case)) for case in GRID],
)
def test_a_signal_saves_has_its_exit_code_and_leaves_no_process(labelled, tmp_path, script, number, target):
    if script == "detect.py":
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    (tmp_path / "images").symlink_to(labelled)
    arguments = [*SCRIPTS[script], "--output-dir", "run", "--device", "cpu", "--workers", 1, "--log-every", 1]
    arguments += ["--save-every", 100]
    printed = tmp_path / "printed.txt"
    if target in ("process", "group"):
        process = Started(script, arguments, tmp_path, terminal=printed, patch=os.setsid, fault="slow")
        alive = process.process.is_alive
    else:
        process = torchrun(script, *arguments, folder=tmp_path, fault="slow")
        alive = lambda: process.poll() is None  # noqa: E731
    wait_until(lambda: not alive() or any(log.read_text().count("\n") > 1 for log in tmp_path.rglob("log.jsonl")))
    assert alive(), printed.read_text()
    ranks = [pid for pid in processes_under(tmp_path) if pid != process.pid] if target == "torchrun and ranks" else []
    (os.killpg if target == "group" else os.kill)(process.pid, SIGNALS[number])
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNALS[number])
    if target in ("process", "group"):
        assert process.finish().code == 128 + SIGNALS[number], printed.read_text()
    else:
        assert process.wait(120) == 1  # torchrun's own, whatever its ranks' are
    text = printed.read_text()
    found = re.search(r"stopped after step (\d+) of \d+; step (\d+) is saved", text)
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    step = torch.load(checkpoint, weights_only=True)["step"]
    tracebacks = text.count("Traceback") - text.count("torch.distributed.elastic.multiprocessing.api.SignalException")
    assert found and step == int(found[1]) == int(found[2]) >= 1 and not tracebacks, text  # torchrun's own does not count
    assert wait_until(lambda: processes_under(tmp_path) == []), processes_under(tmp_path)


# ----------------------------------------------------------------------------- signals at other times, and more than one


@pytest.mark.linux
def test_a_second_signal_after_a_while_ends_the_run_at_once(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 1, fault="long@2")
    wait_for_steps(process, tmp_path, 2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(PATIENCE + 0.5)
    assert process.process.is_alive()  # in a long step
    os.kill(process.pid, signal.SIGINT)
    assert process.finish().code == 128 + signal.SIGINT  # at the end of the step it would be SIGTERM's
    assert wait_until(lambda: processes_under(tmp_path) == [])


def signal_during_slow_saves():
    """Saves last longer than signals count as one, and another signal comes at their end."""
    save = torch.save

    def slow(state, file):
        time.sleep(PATIENCE + 0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    torch.save = slow


@pytest.mark.posix
def test_the_same_signal_again_within_seconds_or_in_a_save_is_one(whole, images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 1, fault="slow", patch=signal_during_slow_saves)
    wait_for_steps(process, tmp_path, 2)
    for _ in range(3):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    result, step = process.finish(), end_of(tmp_path)["step"]
    assert result.code == 128 + signal.SIGTERM and f"stopped after step {step} of 12; step {step} is saved" in result.err
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(whole))


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.posix
def test_a_hangup_is_left_alone_under_nohup(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--max-steps", 4, fault="slow", patch=ignore_hangups)
    wait_for_steps(process, tmp_path, 2)
    os.kill(process.pid, signal.SIGHUP)
    assert process.finish().code == 0 and end_of(tmp_path)["step"] == 4


def interrupt_the_start():
    import mvmae.data

    real = mvmae.data.open_images

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    mvmae.data.open_images = interrupted


@pytest.mark.posix
def test_ctrl_c_during_the_start_is_one_line(images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=interrupt_the_start)
    assert result.code == 130 and result.err.strip() == NOTHING_SAVED


def signal_in_the_first_save():
    save, saved = torch.save, []

    def interrupted(state, file):
        saved.append(1)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    torch.save = interrupted


@pytest.mark.posix
def test_a_signal_in_the_last_step_is_success(whole, images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, "--save-every", 100, patch=signal_in_the_first_save)
    assert result.code == 0 and (tmp_path / "run" / "encoder").is_dir()
    assert_identical(end_of(tmp_path), end_of(whole))


def hang_in_the_fifth_step():
    import mvmae.data.sampling

    real, seen = mvmae.data.sampling.MultiViewDataset.__getitem__, []

    def hangs(self, key):
        seen.append(key)
        if len(seen) > 32:
            time.sleep(600)
        return real(self, key)

    mvmae.data.sampling.MultiViewDataset.__getitem__ = hangs


@pytest.mark.linux
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_loading_hangs_saves(images, tmp_path, workers):
    if workers and (os.environ.get("MVMAE_START_METHOD") or multiprocessing.get_all_start_methods()[0]) != "fork":
        pytest.skip("a worker that is not forked does not have the patch")
    process = start(tmp_path, images, *STEPS, "--workers", workers, "--save-every", 100, patch=hang_in_the_fifth_step)
    wait_for_steps(process, tmp_path, 4)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    result = process.finish()
    assert result.code == 143 and "stopped after step 4; step 4 is saved" in result.err and "Traceback" not in result.err
    assert end_of(tmp_path)["step"] == 4 and wait_until(lambda: processes_under(tmp_path) == [])


# ------------------------------------------------------------------------------------- errors: the last whole step is saved


@pytest.mark.posix
def test_a_folder_of_images_that_goes_away_ends_in_one_line_and_the_run_goes_on_when_it_is_back(tmp_path):
    (tmp_path / "images").mkdir()
    images = write_images(tmp_path / "images")
    process = start(tmp_path, images, *STEPS, "--save-every", 100, "--workers", 1, fault="slow")
    wait_for_steps(process, tmp_path, 2)
    images.rename(tmp_path / "away")
    result, step = process.finish(), max(losses(tmp_path))
    assert result.code == 1 and "10 images in a row cannot be used" in result.err and "Traceback" not in result.err
    assert end_of(tmp_path)["step"] == step >= 2
    assert f"step {step} is saved: run the same command with --resume to continue" in result.out
    (tmp_path / "away").rename(images)
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0 and end_of(tmp_path)["step"] == 12


def test_too_many_bad_images_save_and_end_in_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (write_images(tmp_path / "images") / f"bad{i}.jpg").write_bytes(b"<html>")
    result = pretrain(tmp_path, "images", *STEPS, "--save-every", 100, "--max-bad", 2)
    assert result.code == 1 and "3 bad images, more than the 2 allowed" in result.err and "Traceback" not in result.err
    assert end_of(tmp_path)["step"] == max(losses(tmp_path))


@pytest.mark.posix
def test_memory_that_is_used_up_saves_and_ends_in_one_line(images, tmp_path):
    for options, step, how in (((), 7, "with --resume"), (("--resume",), 9, "again")):
        result = pretrain(tmp_path, images, *STEPS, "--save-every", 100, *options, fault=f"raise@{step}")
        assert (
            result.code == 1
            and "error: the memory is used up (MemoryError: no room for a step): use a smaller model" in result.err
        )
        assert f"step {step} is saved: run the same command {how} to continue" in result.out and "Traceback" not in result.err
        assert end_of(tmp_path)["step"] == step
