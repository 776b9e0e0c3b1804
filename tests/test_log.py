"""examples/engine/log.py: what a run writes down and prints, how fast it says it is, and that printing ends no run."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from running import EXAMPLES, without_clock
from tiny_run import STEPS, pretrain, start

sys.path.insert(0, str(EXAMPLES))

from engine.checkpoint import read
from engine.distributed import Ranks
from engine.log import Log, peak_memory

ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture
def clock(monkeypatch):
    """The time of the log, which stands still unless a test moves it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_throughput_and_waiting_leave_out_the_first_step_and_what_is_paused(tmp_path, clock):
    log = Log(tmp_path, ALONE, last=100, batch_size=8)

    def batches():
        for step in range(10):
            clock.now += 50 if step == 0 else 1
            yield step

    for step, _ in enumerate(log.timed(batches()), 1):
        clock.now += 3
        log.add({"loss": torch.tensor(float(step))})
        if step in (1, 5):
            with log.paused():
                clock.now += 1000
            log.write_step(step, lr=0.5)
    first, second = log.records()
    assert first["loss"] == 1 and "images_per_second" not in first and "seconds_left" not in first  # nothing is invented
    assert second["loss"] == 3.5 and second["lr"] == 0.5  # the mean of the steps since the last line
    assert (second["images_per_second"], second["waiting"], second["seconds_left"]) == (2, 0.25, 95 * 4)


def test_a_resumed_run_counts_what_is_left_and_one_without_a_batch_has_no_throughput(tmp_path, clock):
    log = Log(tmp_path, ALONE, last=20, start=16)
    for _ in range(3):
        clock.now += 2
        log.add({"loss": torch.zeros(())})
    log.write_step(19)
    (record,) = log.records()
    assert record["seconds_left"] == 2 and "images_per_second" not in record


def test_memory_is_this_processs_own_peak_or_that_of_its_cuda_device(monkeypatch):
    before = peak_memory(ALONE.device)
    block = torch.ones(50_000_000)
    assert sys.platform != "linux" or peak_memory(ALONE.device) >= before + 100e6 or before > 1.5e9
    del block
    assert peak_memory(ALONE.device) >= before
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3)
    assert peak_memory(torch.device("cuda", 0)) == 3


def test_a_line_is_printed_in_words_and_written_with_its_time(tmp_path, capsys):
    numbers = {"images_per_second": 1234.5, "waiting": 0.034, "memory_gb": 1.234, "seconds_left": 3725.4}
    before, log = time.time(), Log(tmp_path, ALONE, 9)
    for more in (numbers, {"images_per_second": 2.5}, {}):
        log.write(step=1, loss=0.5, **more)
    for record in log.records():
        assert before - 0.01 <= record["time"] <= time.time() + 0.01 and without_clock([record]) == [{"step": 1, "loss": 0.5}]
    clocks = ["1234 images/s, 3% waiting for data, 1.23 GB, 1:02:05 left", "2.5 images/s", ""]
    assert capsys.readouterr().out == "".join(f"step 1/9  loss 0.5  {words}".rstrip() + "\n" for words in clocks)


def test_a_cut_line_costs_itself_alone_and_a_resumed_run_drops_what_it_takes_again(tmp_path):
    log, path = Log(tmp_path, ALONE, 9), tmp_path / "log.jsonl"
    for step in (1, 2):
        log.write(step=step, loss=1.0)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo\n\0\0\xff\n7\n{"step": "x"}\n{"st')
    log.write(step=4, loss=1.0)
    assert [record["step"] for record in log.records()] == [1, 2, 4]
    Log(tmp_path, ALONE, 9, start=2).write(step=3, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_costs_a_line_and_a_kill_while_the_log_is_rewritten_nothing(tmp_path, monkeypatch, capsys):
    log, real = Log(tmp_path, ALONE, 9), Path.open

    def full(path, *arguments, **options):
        with real(path, "a") as file:
            file.write('{"st')
        raise OSError(28, "No space left on device")

    def killed(*_):
        raise KeyboardInterrupt

    log.write(step=1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        log.write(step=2)
    assert f"warning: cannot write {tmp_path / 'log.jsonl'}: No space left on device" in capsys.readouterr().out
    log.write(step=3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Log(tmp_path, ALONE, 9, start=1)
    assert [record["step"] for record in log.records()] == [1, 3]


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
def test_no_trouble_with_printing_ends_a_run(images, tmp_path, fault):
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
    assert read(tmp_path / folder / "checkpoint.pt")["step"] == 3
    assert (tmp_path / folder / "encoder").is_dir() and (tmp_path / folder / "log.jsonl").read_text().count("\n") == 3
    if fault == "ascii":
        assert r"r\xfcn \udcff \u65e5\u672c holds " in result.out


@pytest.mark.linux
def test_an_error_keeps_its_exit_code_where_nothing_can_be_printed(tmp_path):
    assert pretrain(tmp_path, "nowhere", *STEPS, terminal="/dev/full").code == 2
    assert pretrain(tmp_path, "nowhere", *STEPS, patch=close_both).code == 2
