"""A pretraining run of seconds, and what it leaves; checks of what any run leaves."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from running import Started, run_script

SMALL = "patch_size=8 embed_dim=32 depth=1 num_heads=2"
ARGUMENTS = ["--preset", "quick", "--encoder-args", SMALL, "--image-size", 32, "--decoder-dim", 16, "--decoder-depth", 1]
ARGUMENTS += ["--batch-size", 8, "--device", "cpu", "--eval-images", 0, "--log-every", 1, "--epochs", 5, "--warmup-epochs", 1]
STEPS = ["--max-steps", 12, "--workers", 0, "--save-every", 5]
"""Three epochs of four steps with 32 images."""


def write_images(folder, count=32):
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{i}.jpg")
    return folder


def start(folder, images, *arguments, **options):
    """Start a run in ``folder``; ``options`` are those of `Started`."""
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *arguments]
    return Started("pretrain.py", given, folder, **options)


def pretrain(folder, images, *arguments, **options):
    """Run to the end."""
    return start(folder, images, *arguments, **options).finish()


def checkpoint_of(folder, model, optimizer, signals, *, ranks=None, settings=None, resume=False, may_change=(), last=9, **more):
    """A `Checkpoint` of a run in this process, restored where ``resume`` says so."""
    from engine.checkpoint import Checkpoint
    from engine.distributed import Ranks
    from engine.log import Log

    ranks = ranks or Ranks(0, 1, torch.device("cpu"), None)
    checkpoint = Checkpoint(Path(folder), settings or {}, ranks, may_change=frozenset(may_change), resume=resume)
    log = Log(checkpoint.folder, ranks, last, checkpoint.step, batch_size=8)
    checkpoint.restore(log, signals, model=model, optimizer=optimizer, **more)
    return checkpoint


def wait_for_steps(process, folder, count):
    """Wait until the log of a started run tells of so many steps."""
    log = folder / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert process.process.is_alive(), process.texts()
        time.sleep(0.01)


def end_of(folder):
    """The state that a run ended with."""
    return torch.load(folder / "run" / "checkpoint.pt", weights_only=True)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_identical(left, right):
    assert left["step"] == right["step"]
    assert left["model"].keys() == right["model"].keys()
    assert [name for name in left["model"] if not torch.equal(left["model"][name], right["model"][name])] == []
    moments = [state["optimizer"]["state"] for state in (left, right)]
    pairs = [(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i]]
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in pairs)


def assert_unfit_checkpoints_are_refused(whole, folder, script, *arguments):
    """Resume from a weight of another shape, and evaluate without a model, in ``folder``: each ends in one line."""
    saved = end_of(whole)
    name = next(iter(saved["model"]))
    saved["model"][name] = torch.zeros(3)
    (folder / "run").mkdir()
    for option, words in (("--resume", f"{name} is (3,)"), ("--evaluate", "model is missing")):
        torch.save(saved, folder / "run" / "checkpoint.pt")
        result = run_script(script, *arguments, option, folder=folder)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result.err
        saved.pop("model", None)
