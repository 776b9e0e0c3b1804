"""Faults that users of such training have met, injected into real runs of pretrain.py; examples/FAULTS.md lists all."""

import ast
import math
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, processes_under, run_processes, torchrun, wait_until
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, losses, pretrain, start, wait_for_steps, write_images

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(whole, tmp_path):
    """The files of a finished run in a folder that a test may change."""
    (tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / "run" / name).write_bytes((whole / "run" / name).read_bytes())
    return tmp_path


# -------------------------------------------------------------------------------------------- cut, damaged, full: the saves


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
def test_a_run_killed_in_the_middle_of_a_save_ends_bit_identical(whole, images, tmp_path):
    assert pretrain(tmp_path, images, *STEPS, patch=die_in_the_second_save).code == -signal.SIGKILL
    (unfinished,) = (tmp_path / "run").glob(".checkpoint.pt.*.part")
    assert end_of(tmp_path)["step"] == 5
    resumed = pretrain(tmp_path, images, *STEPS, "--resume")
    assert resumed.code == 0 and "resuming run after step 5" in resumed.out and not unfinished.exists()
    assert_identical(end_of(tmp_path), end_of(whole))


@pytest.mark.posix
def test_a_run_killed_again_and_again_resumed_with_other_workers_ends_bit_identical(whole, images, tmp_path):
    steps = [*STEPS, "--save-every", 1, "--resume"]
    for cut, workers in ((5, 0), (6, 2), (7, 0), (8, 2)):  # three in one epoch and one at its border
        result = pretrain(tmp_path, images, *steps, "--workers", workers, fault=f"kill@{cut}")
        assert result.code == -signal.SIGKILL and end_of(tmp_path)["step"] == cut
    assert pretrain(tmp_path, images, *steps, "--workers", 2).code == 0
    assert_identical(end_of(tmp_path), end_of(whole))
    assert losses(tmp_path) == losses(whole)


def test_a_run_never_starts_at_0_in_silence_where_no_checkpoint_can_be_read(copy, images):
    for path in (copy / "run").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    result = pretrain(copy, images, *STEPS, "--resume")
    assert result.code == 2 and "no checkpoint in run can be read" in result.err and "Traceback" not in result.err
    assert not (copy / "run" / "log.jsonl").exists()


class Payload:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused(copy, images, monkeypatch, old):
    path = copy / "run" / "checkpoint.pt"
    (copy / "run" / "checkpoint-previous.pt").unlink()
    torch.save({**end_of(copy), "model": Payload()}, path, _use_new_zipfile_serialization=not old)
    result = pretrain(copy, images, *STEPS, "--resume")
    assert result.code == 2 and "no checkpoint in run can be read" in result.err
    assert old or "could run code" in result.err
    assert not list(copy.rglob("executed"))
    monkeypatch.chdir(copy)
    torch.load(path, weights_only=False)
    assert (copy / "executed").exists()  # it does run where it is not refused


def allow_small_files():
    """No file may grow over 40 kB, as on a full disk or with a quota used up."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.linux
def test_a_run_on_a_disk_that_is_full_trains_on_and_its_exit_code_tells_that_the_end_is_not_saved(images, tmp_path):
    result = pretrain(tmp_path, images, *STEPS, patch=allow_small_files)
    assert result.code == 1 and list(losses(tmp_path)) == list(range(1, 13))
    assert "warning: step 5 is not saved: cannot write run/checkpoint.pt" in result.out
    assert "the end is not saved, only step 0 (cannot write run/checkpoint.pt: File too large" in result.err
    assert "Traceback" not in result.err
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.linux
def test_an_output_folder_that_cannot_be_is_one_line_before_training(images, tmp_path):
    (tmp_path / "file").write_text("text")
    for folder in ("file/run", "/proc/run"):
        result = pretrain(tmp_path, images, *STEPS, "--output-dir", folder)
        assert result.code == 2 and f"error: cannot write to the output folder {folder}: " in result.err, result
        assert "step 1/" not in result.out and "Traceback" not in result.err


@pytest.mark.linux
def test_a_home_and_a_cache_that_cannot_be_written_cost_nothing(images, tmp_path):
    places = dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCH_HOME"), "/proc/nowhere")
    result = pretrain(tmp_path, images, *STEPS, "--max-steps", 2, env=places)
    assert result.code == 0 and (tmp_path / "run" / "curves.png").exists(), result.err


# ------------------------------------------------------------------------------------------------- resumed with other things


def test_a_run_is_resumed_with_its_own_data_and_settings_wherever_they_lie_and_with_no_others(whole, copy, images):
    (copy / "moved").mkdir()
    (copy / "others").mkdir()
    for path in images.iterdir():
        (copy / "moved" / path.name).symlink_to(path)
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(copy / "others" / path.name)  # of the same names
    result = pretrain(copy, "others", *STEPS, "--resume", "--batch-size", 4, "--mask-ratio", 0.5, "--seed", 3)
    told = [
        "batch_size was 8 and is 4 now",
        "mask_ratio was 0.8 and is 0.5",
        "seed was 0 and is 3",
        "the images are not those of the start",
    ]
    assert result.code == 2 and [words for words in told if words not in result.err] == []
    assert "epochs" not in result.err and result.err.count("\n") == 1 and end_of(copy)["step"] == 12
    (copy / "run").rename(copy / "elsewhere")
    more = ["--resume", "--max-steps", 13, "--epochs", 6, "--log-every", 2, "--output-dir", "elsewhere"]
    result = pretrain(copy, "moved", *STEPS, *more)
    assert result.code == 0 and "resuming elsewhere after step 12" in result.out
    told = ["epochs was 5.0 and is 6.0 now", "log_every was 1 and is 2 now", "output_dir was 'run' and is 'elsewhere' now"]
    assert [words for words in told if words not in result.out] == []


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(whole, images, tmp_path, first, second):
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, "--workers", 0, "--resume"]
    for count, steps in ((first, 6), (second, 12)):
        results = run_processes("pretrain.py", *given, "--max-steps", steps, folder=tmp_path, count=count)
        assert [result.code for result in results] == [0] * count, results
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_images_and_batches_that_do_not_divide_among_processes(tmp_path):
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 13)
    given = ["--data", "images", "--output-dir", "run", *ARGUMENTS, *STEPS, "--epochs", 2]
    results = run_processes("pretrain.py", *given, "--batch-size", 3, folder=tmp_path)
    assert [result.code for result in results] == [2, 2]
    assert all(re.search(r"batch size must be a .*multiple of the 2 processes, got 3", result.err) for result in results)
    results = run_processes("pretrain.py", *given, "--batch-size", 4, folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]  # three whole batches an epoch


def test_equal_images_have_finite_losses(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (48, 40), (90, 120, 30)).save(tmp_path / "images" / f"{i}.png")
    result = pretrain(tmp_path, "images", *STEPS, "--max-steps", 3)
    assert result.code == 0 and all(map(math.isfinite, losses(tmp_path).values()))


@pytest.mark.posix
def test_a_second_run_in_a_folder_is_refused_by_name_and_a_dead_ones_lock_is_taken_over(whole, images, tmp_path):
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


# -------------------------------------------------------------------------------------------------- non-finite; processes


def test_a_batch_that_is_not_finite_on_one_rank_stops_all_and_its_images_are_named(one_bright, tmp_path):
    overflow = ["--mean", 0, 0, 0, "--std", 1e-30, 1e-30, 1e-30, "--max-steps", 4, "--loss-weight", 0]
    results = run_processes(
        "pretrain.py", "--data", one_bright, "--output-dir", "run", *ARGUMENTS, *STEPS, *overflow, folder=tmp_path
    )
    assert [result.code for result in results] == [1, 1]
    found = [re.search(r"error: (step (\d): .*loss_rec.* in process (\d) is not finite)", result.err) for result in results]
    assert found[0] and found[1] and found[0][1] == found[1][1] and "Traceback" not in results[0].err
    step = int(found[0][2])
    assert end_of(tmp_path)["step"] == step - 1 and step not in losses(tmp_path)
    assert all(value.isfinite().all() for value in end_of(tmp_path)["model"].values())
    first, *names = (tmp_path / "run" / "nonfinite.txt").read_text().splitlines()
    assert first.startswith(f"step {step}: loss")
    assert len(names) == 4 and any("/7.png" in name for name in names)  # of the process that met it alone


@pytest.mark.posix
@pytest.mark.parametrize("fault", ["kill", "raise", "exit"])
def test_the_others_end_with_the_cause_where_one_rank_is_killed_raises_or_exits(images, tmp_path, fault):
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS]
    results = run_processes("pretrain.py", *given, folder=tmp_path, faults=[None, f"{fault}@7"], timeout=90)
    assert results[0].code == 1 and "error: another process of this run has ended" in results[0].err
    assert "Traceback" not in results[0].err and "--resume" in results[0].err
    assert results[1].code == {"kill": -signal.SIGKILL, "raise": 1, "exit": 3}[fault]
    assert end_of(tmp_path)["step"] == 7


def hurry():
    from engine import distributed

    distributed.JOIN = 2


def test_a_world_without_a_master_and_a_device_that_is_not_there_are_one_line(images, tmp_path):
    lonely = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    silent = {**lonely, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29000"}
    cases = [(lonely, "cpu", 2, "MASTER_ADDR"), ({**silent, "RANK": "7"}, "cpu", 2, "RANK must be 0 to 1")]
    cases += [({**silent, "RANK": rank}, "cpu", 1, f"process {rank} of 2 did not meet the others") for rank in "01"]
    cases += [] if torch.cuda.is_available() else [({}, "cuda", 2, "--device cuda: torch finds no CUDA device")]
    for env, device, code, words in cases:
        result = pretrain(tmp_path, images, *STEPS, "--device", device, env=env, patch=hurry)
        last = result.err.splitlines()[-1]  # torch prints more
        assert result.code == code and last.startswith("error: ") and words in last and "Traceback" not in result.err, (
            result.err
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.linux
def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on(whole, images, tmp_path):
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else gloo and nccl find addresses of the ended processes
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--workers", 1, "--resume"]
    process = torchrun("pretrain.py", *given, folder=tmp_path, fault="kill@7", options=["--max-restarts", "3"], env=fresh)
    assert process.wait(900) == 0, (tmp_path / "printed.txt").read_text()
    assert re.search("resuming run after step [57]", (tmp_path / "printed.txt").read_text())  # 7 where one outlives the other
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    assert wait_until(lambda: processes_under(tmp_path) == [])


@pytest.mark.linux
def test_a_loading_worker_that_is_killed_ends_the_run_with_the_cause_and_it_can_be_resumed(images, tmp_path):
    process = start(tmp_path, images, *STEPS, "--workers", 2, "--save-every", 1, fault="slow")
    wait_for_steps(process, tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    result = process.finish()
    assert result.code == 1 and "error: a loading worker died (out of memory?)" in result.err and "Traceback" not in result.err
    assert end_of(tmp_path)["step"] >= 2
    assert pretrain(tmp_path, images, *STEPS, "--resume", "--max-steps", 6).code == 0


def hide_the_compiler():
    os.environ["PATH"], os.environ["CXX"] = "/nowhere", "/nowhere/c++"


@pytest.mark.linux
def test_without_a_c_compiler_compiling_is_one_line(images, tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = pretrain(tmp_path, images, *STEPS, "--compile", patch=hide_the_compiler, env=cache)
    assert result.code == 0 or (result.code in (1, 2) and "Traceback" not in result.err and "--compile" in result.err), result


# --------------------------------------------------------------------------------------------- code from outside; the table


def test_nothing_from_outside_is_executed():
    """No eval, no exec, no shell, no unpickling but torch's of weights alone."""
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "subprocess.run"}
    forbidden |= {"subprocess.Popen", "subprocess.call", "tarfile.extractall", "shutil.unpack_archive", "marshal.loads"}
    for path in [*(ROOT / "mvmae").rglob("*.py"), *EXAMPLES.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in forbidden and "shell" not in given, f"{path.name}:{node.lineno}: {name}"
            if name == "torch.load":
                assert given.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            if name.endswith(("np.load", "numpy.load")):
                assert given.get("allow_pickle", "False") == "False", f"{path.name}:{node.lineno}"


def test_every_fault_has_a_line_in_the_table_whose_tests_exist():
    rows = re.findall(r"^\| (\d+) \| .+ \| .+ \| (`.*`) \|$", (EXAMPLES / "FAULTS.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    known = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        known[path.stem.removeprefix("test_")] = names
    for number, cell in rows:
        for entry in re.findall(r"`([^`]+)`", cell):
            file, _, name = entry.partition(": ")
            assert f"test_{name}" in known.get(file, ()), f"row {number}: tests/test_{file}.py has no test_{name}"
