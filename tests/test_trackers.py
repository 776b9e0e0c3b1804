"""examples/engine/trackers.py: each tracker read back by its own reader, one tracked run across a kill, and none ends a run."""

import importlib
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from running import EXAMPLES
from tiny_run import STEPS, losses, pretrain

sys.path.append(str(EXAMPLES))
from engine.trackers import TRACKERS, Tracker, Trackers

OPTIONS = {"epochs": 5, "image_size": (32,), "data": "a folder"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def opened(names, folder, say, step=0):
    trackers = Trackers()
    trackers.start(names, folder, OPTIONS, step, say)
    return trackers


def track(name, folder, said):
    """Steps 1 to 3 with a picture, and, in a resumed run, steps 3 and 4: the third was logged after the last checkpoint."""
    importlib.import_module(name)
    folder.mkdir()
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = opened([name], folder, said.append, start)
        for step in steps:
            trackers.log({"step": step, "loss": 1 / step, "time": 1e9, "note": "not a number"})
        trackers.picture(steps[-1], "reconstructions", Image.new("RGB", (20, 10), "red"))
        trackers.close()
        time.sleep(1.1)  # wandb names folders by the second


def test_tensorboard_has_each_step_once(tmp_path):
    said = []
    track("tensorboard", tmp_path / "run", said)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["loss"]
    assert {event.step: event.value for event in found.Scalars("loss")} == pytest.approx({i: 1 / i for i in (1, 2, 3, 4)})
    assert len(found.Scalars("loss")) == 4
    assert [(event.step, event.width, event.height) for event in found.Images("reconstructions")][-1] == (4, 20, 10)
    text = found.Tensors("config/text_summary")[0]
    assert b"image_size: (32,)" in text.tensor_proto.string_val[0]
    assert said == [f"tracked by tensorboard: {tmp_path / 'run' / 'tensorboard'}"] * 2


def missing(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def stored(content):
    """The records in a file of wandb: LevelDB's log format, blocks of 32 KiB, after a header of seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@missing("wandb")
def test_wandb_offline_goes_on_in_the_same_run(tmp_path):
    said = []
    track("wandb", tmp_path / "run", said)
    from wandb.proto.wandb_internal_pb2 import Record

    ids, steps, pictures, config = [], [], [], set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in map(Record.FromString, stored(path.read_bytes())):
            ids += [record.run.run_id] if record.HasField("run") else []
            config |= {item.key for item in record.run.config.update}
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            steps += [(json.loads(items["step"]), json.loads(items["loss"]))] if "loss" in items else []
            pictures += [json.loads(items["step"])] if any(key.startswith("reconstructions") for key in items) else []
    assert len(set(ids)) == 1 and set(OPTIONS) <= config
    assert steps == [(step, 1 / step) for step in (1, 2, 3, 3, 4)] and pictures == [3, 4]
    assert all(line.startswith(f"tracked by wandb: {tmp_path}") for line in said) and len(said) == 2


@missing("wandb")
def test_wandb_without_a_login_asks_nothing_even_at_a_terminal(tmp_path, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def readline(self, *_):
            raise AssertionError("it waits for an answer")

    import wandb

    wandb.teardown()  # it keeps the environment that it found first
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    said = []
    assert not opened(["wandb"], tmp_path, said.append) and sys.stdin is terminal
    assert len(said) == 1 and "No API key" in said[0], said


@missing("mlflow")
def test_mlflow_goes_on_in_the_same_run(tmp_path):
    said = []
    track("mlflow", tmp_path / "run", said)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mvmae").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((each.step, each.value) for each in history) == [(step, 1 / step) for step in (1, 2, 3, 3, 4)]
    assert run.data.params == {"epochs": "5", "image_size": "(32,)", "data": "a folder"} and run.info.status == "FINISHED"
    assert run.info.run_name == "run" and len(client.list_artifacts(run.info.run_id, "images")) >= 2


@missing("trackio")
def test_trackio_goes_on_in_the_same_run(tmp_path):
    script = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_trackers;"
        "test_trackers.track('trackio', pathlib.Path(sys.argv[1]) / 'run', [])"
    )  # in a process of its own, since it reads its folder once
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, EXAMPLES, Path(__file__).parent], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import sqlite3

    (path,) = (tmp_path / "trackio").rglob("mvmae*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    database.close()
    values = [(step, json.loads(metrics)["loss"]) for _, step, metrics in rows if "loss" in json.loads(metrics)]
    assert values == [(step, 1 / step) for step in (1, 2, 3, 3, 4)] and len({name for name, _, _ in rows}) == 1


# ------------------------------------------------------------------------------------------------------------------ faults


def fail(text):
    raise SystemExit(3) if text == "exit" else RuntimeError(f"no network\nat {text}")


@pytest.mark.parametrize("where", ["start", "numbers", "exit", "picture", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_others_go_on(tmp_path, monkeypatch, where):
    def broken(*_):
        if where == "start":
            fail(where)
        at = ["numbers" if where == "exit" else where]
        return Tracker(
            "nowhere", *((lambda *_, n=n: fail(where) if n in at else None) for n in ("numbers", "picture", "close"))
        )

    monkeypatch.setitem(TRACKERS, "wandb", broken)
    said = []
    trackers = opened(["wandb", "tensorboard"], tmp_path, said.append)
    for step in (1, 2):
        trackers.log({"step": step, "loss": 0.5})
        trackers.picture(step, "features", Image.new("RGB", (4, 4)))
    assert list(trackers.open) == (["wandb", "tensorboard"] if where == "close" else ["tensorboard"])
    trackers.close()
    (line,) = [line for line in said if line.startswith("warning")]
    assert line.startswith("warning: the run goes on without wandb: ") and "\n" not in line
    assert where == "exit" or "no network" in line
    assert not trackers and any((tmp_path / "tensorboard").iterdir())


def test_a_missing_library_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said = []
    assert not opened(["mlflow"], tmp_path, said.append)
    assert len(said) == 1 and said[0].endswith('pip install "mvmae[mlflow]" installs it'), said


# -------------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.posix
def test_a_run_that_is_killed_goes_on_in_its_tracked_run_and_learns_the_same(whole, images, tmp_path):
    arguments = [*STEPS, "--eval-images", 12, "--eval-every", 1, "--tracker", "tensorboard"]
    assert pretrain(tmp_path, images, *arguments, fault="kill@7").code == -signal.SIGKILL
    resumed = pretrain(tmp_path, images, *arguments, "--resume")
    assert resumed.code == 0 and "warning" not in resumed.out, resumed
    assert losses(tmp_path) == losses(whole)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    told = {event.step: event.value for event in found.Scalars("loss")}
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 13)) and told == pytest.approx(losses(whole))
    assert {"lr", "loss_con", "effective_rank", "images_per_second"} <= set(found.Tags()["scalars"])
    pictures = found.Images("reconstructions")
    assert [event.step for event in pictures] == [0, 4, 8, 12]
    assert len({event.encoded_image_string for event in pictures}) == 4  # one sees it learn


def imported():
    """Print at the end which libraries of trackers a script has imported; timm imports wandb where that is installed."""
    import atexit

    import timm.utils  # noqa: F401

    names = [name for name in TRACKERS if name not in sys.modules]
    atexit.register(lambda: print("imported:", [name for name in names if name in sys.modules]))


def test_without_a_tracker_no_library_is_imported(images, tmp_path):
    result = pretrain(tmp_path, images, "--max-steps", 1, "--workers", 0, patch=imported)
    assert result.code == 0 and result.out.endswith("imported: []\n"), result
    assert not (tmp_path / "run" / "tracked.txt").exists()
