"""How runs end: by signals, errors, and output that cannot be written. F51, F52, ... are the faults of examples/FAULTS.md."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from running import EXAMPLES, Started, run_script, with_fault
from tiny_run import ARGUMENTS, SMALL, end_of, losses, pretrain, run_of, start, wait_for_steps, write_images

sys.path.insert(0, str(EXAMPLES))

from engine import checkpoint
from engine.log import Log, printable

# ---------------------------------------------------------------------------------- signals to every script that trains

ENCODER = ["--model", "random:vit_tiny_patch16_224", "--image-size", 32]
TINY = ["--preset", "toy", "--model-args", "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2", "--image-size", 32]
TINY += ["--toy-images", 12, "--batch-size", 4, "--steps", 40, "--channels", 16, "--pictures", 0]
SCRIPTS = {
    "pretrain.py": [*ARGUMENTS, "--data", "images/train", "--epochs", 10],
    "adapt.py": [*ARGUMENTS[2:], "--data", "images/train", "--epochs", 10, "--freeze-epochs", 1, "--no-pretrained"],
    "finetune.py": ["--preset", "quick", "--data", "images", "--batch-size", 8, "--epochs", 10, *ENCODER],
    "linear_probe.py": ["--preset", "quick", "--data", "images", "--batch-size", 8, "--epochs", 10, "--no-cached"],
    "detect.py": [*TINY, "--fc-width", 16],
    "segment.py": [*TINY, "--stride", 32],
}
SCRIPTS["adapt.py"] += ["--encoder", "mvmae_vit_tiny_patch16"]
SCRIPTS["linear_probe.py"] += ["--few-shot", 0, "--models", "random:vit_tiny_patch16_224", "--image-size", 32]
SIGNALS = {"term": signal.SIGTERM, "hup": getattr(signal, "SIGHUP", None), "int": signal.SIGINT}  # Windows has no SIGHUP
TARGETS = ["process", "group", "torchrun", "torchrun and ranks"]
GRID = [(script, number, target) for script in SCRIPTS for number in SIGNALS for target in TARGETS]
THIN = {
    ("pretrain.py", "term", "torchrun and ranks"),
    ("pretrain.py", "hup", "process"),
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
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("script", "number", "target"),
    [pytest.param(*case, marks=[] if case in THIN else pytest.mark.slow, id="-".join(case)) for case in GRID],
)
def test_f51_a_signal_saves_has_its_exit_code_and_leaves_no_process(labelled, tmp_path, script, number, target):
    if script == "detect.py":
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    (tmp_path / "images").symlink_to(labelled)
    arguments = [*SCRIPTS[script], "--output-dir", "run", "--device", "cpu", "--workers", 1, "--log-every", 1]
    arguments += ["--save-every", 100]
    printed = tmp_path / "printed.txt"
    if target in ("process", "group"):
        process = Started(script, arguments, tmp_path, terminal=printed, patch=os.setsid, fault="slow")
    else:
        process = torchrun(tmp_path, printed, *with_fault("slow", script), *arguments)
    logs = wait_until(lambda: [log for log in tmp_path.rglob("log.jsonl") if log.read_text().count("\n") > 1], 120)
    assert logs, printed.read_text()
    ranks = [process.pid]
    if target == "torchrun and ranks":
        ranks += processes_under(tmp_path)
    (os.killpg if target == "group" else os.kill)(process.pid, SIGNALS[number])
    for pid in ranks[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNALS[number])
    code = 128 + SIGNALS[number]
    if target in ("process", "group"):
        assert process.finish().code == code, printed.read_text()
    else:
        assert process.wait(120) == 1  # torchrun's own, whatever its ranks' are
    text = printed.read_text()
    found = re.search(r"stopped after step (\d+) of \d+; step (\d+) is saved", text)
    step = torch.load(logs[0].with_name("checkpoint.pt"), weights_only=True)["step"]
    tracebacks = text.count("Traceback") - text.count("torch.distributed.elastic.multiprocessing.api.SignalException")
    assert found and step == int(found[1]) == int(found[2]) >= 1 and not tracebacks, text  # torchrun's own does not count
    assert wait_until(lambda: processes_under(tmp_path) == []), processes_under(tmp_path)


def torchrun(folder, printed, *arguments):
    """Two processes under the real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with printed.open("w") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True)


def wait_until(true, seconds=300):
    """Wait for something that comes true, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def processes_under(folder):
    """Those that run in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------------ errors: the state is saved

STEPS = ["--max-steps", 12, "--workers", 0, "--save-every", 100]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return write_images(tmp_path / "images")


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
def test_f53_sigterm_while_loading_hangs_saves(images, tmp_path, workers):
    if workers and (os.environ.get("MVMAE_START_METHOD") or multiprocessing.get_all_start_methods()[0]) != "fork":
        pytest.skip("a worker that is not forked does not have the patch")
    process = start(tmp_path, images, *STEPS, "--workers", workers, patch=hang_in_the_fifth_step)
    wait_for_steps(process, tmp_path, 4)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    result = process.finish()
    assert result.code == 143 and "stopped after step 4 of 12; step 4 is saved" in result.err
    assert end_of(tmp_path)["step"] == 4 and wait_until(lambda: processes_under(tmp_path) == [])


@pytest.mark.posix
def test_f53_a_folder_that_goes_for_good_saves(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 1, fault="slow")
    wait_for_steps(process, tmp_path, 2)
    images.rename(tmp_path / "away")
    result = process.finish()
    step = max(losses(tmp_path))
    assert result.code == 1 and "10 images in a row cannot be used" in result.err and "Traceback" not in result.err
    assert (
        end_of(tmp_path)["step"] == step >= 2
        and f"step {step} is saved: run the same command with --resume to continue" in result.out
    )
    (tmp_path / "away").rename(images)
    assert pretrain(tmp_path, images, *STEPS, "--resume").code == 0 and end_of(tmp_path)["step"] == 12


def test_f53_too_many_bad_images_save(images, tmp_path):
    for i in range(3):
        (images / f"bad{i}.jpg").write_bytes(b"<html>")
    result = pretrain(tmp_path, images, *STEPS, "--max-bad", 2)
    assert result.code == 1 and "3 bad images, more than the 2 allowed" in result.err
    assert end_of(tmp_path)["step"] == max(losses(tmp_path))


@pytest.mark.posix
def test_f53_memory_that_is_used_up_saves(images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, fault="raise@7")
    assert result.code == 1 and "error: the memory is used up (no room for a step): use a smaller --batch-size" in result.err
    assert "Traceback" not in result.err and "step 7 is saved: run the same command with --resume to continue" in result.out
    assert end_of(tmp_path)["step"] == 7
    again = pretrain(tmp_path, images, *STEPS, "--resume", fault="raise@9")
    assert again.code == 1 and "step 9 is saved: run the same command again to continue" in again.out  # it has --resume


class Broken(Exception):
    """Whatever ends a run."""


@pytest.mark.parametrize(("where", "saved"), [("forward", 2), ("update", None), ("after", 3)])
def test_f53_an_error_saves_the_last_whole_step_and_none_that_is_half_done(tmp_path, where, saved):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer, states = torch.optim.SGD(model.parameters(), lr=0.1), {}
    run = run_of(tmp_path, model, optimizer, last=9, save_every=100)
    with pytest.raises(Broken), run:
        for step, batch in run.batches(torch.randn(9, 4, 2)):
            loss = model(batch).square().sum()
            loss.backward()
            if step == 3 and where == "forward":
                raise Broken
            if run.finite(step, {"loss": loss}, list):
                if step == 3 and where == "update":
                    raise Broken
                optimizer.step()
            run.report(step)
            states[step] = {name: value.clone() for name, value in model.state_dict().items()}
            if step == 3:
                raise Broken
            run.checkpoint(step)
    if saved is None:
        assert not (tmp_path / "checkpoint.pt").exists()
    else:
        found = checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")
        assert found["step"] == saved and all(torch.equal(states[saved][name], found["model"][name]) for name in found["model"])


# ------------------------------------------------------------------------------------------------------------- printing


def close_both():
    for number in (1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None


def print_ascii():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii")


def read_a_line(path):
    with path.open() as file:
        file.readline()


@pytest.mark.linux
@pytest.mark.parametrize("fault", ["full disk", "head -1", "closed", "ascii"])
def test_f52_no_trouble_with_printing_ends_a_run(images, tmp_path, fault):
    terminal, patch, folder = None, None, "rün \udcff 日本"
    if fault == "full disk":
        terminal = "/dev/full"
    elif fault == "head -1":
        terminal = tmp_path / "pipe"
        os.mkfifo(terminal)
        threading.Thread(target=read_a_line, args=(terminal,), daemon=True).start()
    else:
        patch = close_both if fault == "closed" else print_ascii
    steps = [*STEPS, "--max-steps", 3, "--output-dir", folder]
    result = start(tmp_path, images, *steps, terminal=terminal, patch=patch).finish()
    assert result.code == 0, result
    assert checkpoint.read_checkpoint(tmp_path / folder / "checkpoint.pt")["step"] == 3
    assert (tmp_path / folder / "encoder").is_dir() and (tmp_path / folder / "log.jsonl").read_text().count("\n") == 3
    if fault == "ascii":
        assert r"r\xfcn \udcff \u65e5\u672c holds " in result.out


@pytest.mark.linux
def test_f52_an_error_keeps_its_exit_code_where_nothing_can_be_printed(tmp_path):
    assert pretrain(tmp_path, "nowhere", *STEPS, terminal="/dev/full").code == 2
    assert pretrain(tmp_path, "nowhere", *STEPS, patch=close_both).code == 2


# -------------------------------------------------------------------------------------------------------------- the log


def test_f55_a_cut_line_costs_itself_alone(tmp_path):
    log = Log(tmp_path, 0, 9)
    for step in (1, 2):
        log.write(step=step, loss=1.0)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo\n\0\0\xff\n7\n{"step": "x"}\n')
    log.write(step=4, loss=1.0)
    assert [record["step"] for record in log.records()] == [1, 2, 4]
    resumed = Log(tmp_path, 0, 9, start=4)
    resumed.write(step=5, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4, 5]


def test_f55_the_line_after_one_that_was_cut_stands_alone(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path, 0, 9)
    log.write(step=1)
    real = Path.open

    def full(path, *arguments, **options):
        with real(path, "a") as file:
            file.write('{"st')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        log.write(step=2)
    assert f"warning: cannot write {tmp_path / 'log.jsonl'}: No space left on device" in capsys.readouterr().out
    log.write(step=3)
    assert [record["step"] for record in log.records()] == [1, 3]


def test_f55_killed_while_the_log_is_rewritten(tmp_path, monkeypatch):
    log = Log(tmp_path, 0, 9)
    for step in (1, 2, 3):
        log.write(step=step)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Log(tmp_path, 0, 9, start=2)
    assert [record["step"] for record in log.records()] == [1, 2, 3]
    assert [record["step"] for record in Log(tmp_path, 0, 9, start=2).records()] == [1, 2]


# --------------------------------------------------------------------------------------------------- control characters

EVIL = "a\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e\nerror: forged"


def test_f61_what_is_printed_holds_no_control_character():
    assert printable("a\tb\x1b[2J\x9b\u202e é 日\n") == r"a\tb\x1b[2J\x9b\u202e é 日\n"
    assert printable("a\nb\r", keep="\n") == "a\nb\\r" and printable("\udcff") == r"\udcff"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pretrain.py", ["--data", EVIL]),
        ("pretrain.py", ["--data", "images", "--encoder", EVIL]),
        ("pretrain.py", ["--data", "images", "--output-dir", f"file/{EVIL}"]),
        ("pretrain.py", ["--data", "images", "--no-such-option", EVIL.replace("\n", "")]),
        ("linear_probe.py", ["--data", "images", "--models", EVIL]),
        ("segment.py", ["--data", EVIL, "--model", "random:vit_tiny_patch16_224"]),
        ("export.py", ["--run", EVIL]),
    ],
)
def test_f61_control_characters_of_names_do_not_reach_the_terminal(images, tmp_path, script, arguments):
    (tmp_path / "file").write_text("")
    result = run_script(script, *arguments, folder=tmp_path)
    assert result.code == 2 and clean(result.out) and clean(result.err) and "error: " in result.err
    assert not any(line.startswith("error: forged") for line in result.err.splitlines())


def test_f61_nor_do_those_of_a_bad_image_in_a_run_that_goes_well(images, tmp_path):
    (images / f"{EVIL.replace('/', '')}.jpg").write_bytes(b"<html>")
    steps = ["--preset", "quick", "--encoder-args", SMALL, *ARGUMENTS[4:], *STEPS, "--batch-size", 11, "--max-steps", 3]
    folder = f"run {EVIL}"
    result = run_script("pretrain.py", "--data", images, *steps, "--output-dir", folder, folder=tmp_path)
    assert result.code == 0 and "bad image" in result.err and clean(result.out) and clean(result.err)
    assert "holds " in result.out


def clean(text):
    return all(character.isprintable() or character in "\n\t" for character in text)
