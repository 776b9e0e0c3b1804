"""examples/engine/checkpoint.py in this process: written whole, checked when read, restored whole or not at all, locked.

The same faults in real runs of a script are in test_faults.py.
"""

import contextlib
import errno
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from running import EXAMPLES
from timm.optim import Lars
from tiny_run import checkpoint_of
from torch import nn

sys.path.insert(0, str(EXAMPLES))

from engine import checkpoint as module
from engine.checkpoint import Checkpoint, changed_settings, read, read_newest, write
from engine.distributed import Ranks
from engine.optim import build_optimizer
from engine.signals import Stop

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


def silence():
    """What `Checkpoint` asks of signals, where none come."""
    return SimpleNamespace(received=None, saving=contextlib.nullcontext)


def state(step):
    return {"step": step, "settings": {}, "optimizer": {}, "weight": torch.arange(1000.0) + step}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(make=adamw):
    """A model and its optimizer after one step."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = make(model)
    (model(torch.randn(4, 3)) ** 3).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------ written and read


class Killed(BaseException):
    """The process ends here: nothing of it catches this."""


@pytest.mark.parametrize("end", [Killed(), OSError(errno.EIO, "Input/output error")], ids=["killed", "refused"])
@pytest.mark.parametrize(("call", "number"), [("open", 1), ("fsync", 1), ("replace", 1), ("replace", 2)])
@pytest.mark.parametrize("before", [False, True])
def test_killed_or_refused_at_any_system_call_of_a_save_a_whole_checkpoint_is_left(
    tmp_path, monkeypatch, call, number, before, end
):
    assert [write(tmp_path, state(step)) for step in (1, 2)] == ["", ""]
    calls, real = [], getattr(os, call)

    def fails(*arguments, **options):
        calls.append(call)
        if len(calls) != number:
            return real(*arguments, **options)
        if not before:
            real(*arguments, **options)
        raise end

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(os, call, fails)
        assert "Input/output error" in write(tmp_path, state(3))
    assert len(calls) >= number and read_newest(tmp_path)[0]["step"] in (2, 3)
    assert write(tmp_path, state(4)) == "" and read_newest(tmp_path)[0]["step"] == 4
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, capsys):
    for step in (1, 2):
        write(tmp_path, state(step))
    newest, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint-previous.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    found, name = read_newest(tmp_path)
    assert (found["step"], name) == (1, previous.name) and f"warning: {newest} " in capsys.readouterr().err
    previous.write_bytes(newest.read_bytes())
    with pytest.raises(Stop, match=r"no checkpoint in .* can be read: .*checkpoint.pt .*checkpoint-previous.pt") as stop:
        Checkpoint(tmp_path, {}, ALONE, may_change=frozenset(), resume=True)
    assert stop.value.code == 2


def test_any_flipped_bit_of_a_tensor_is_found(tmp_path):
    write(tmp_path, state(1))
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    begin, rng = content.index(state(1)["weight"].numpy().tobytes()), np.random.default_rng(0)
    for position in rng.integers(begin, begin + 4000, 50):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged"):
            read(path)
    path.write_bytes(content)
    assert read(path)["step"] == 1


def test_what_is_no_checkpoint_is_named_and_a_link_to_nowhere_is_no_start_at_0(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content, words in (({"model": {}}, "no optimizer, settings, step"), ([1], "no optimizer"), (None, "No such file")):
        if content:
            torch.save(content, path)
        else:
            path.unlink()
            path.symlink_to("nowhere.pt")
        with pytest.raises(Stop, match=f"no checkpoint in .* can be read: .*{words}"):
            read_newest(tmp_path)
    path.unlink()
    assert read_newest(tmp_path) == (None, "")


def test_a_damaged_checkpoint_is_set_aside_and_never_takes_the_place_of_the_good_one(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint = checkpoint_of(tmp_path, model, optimizer, silence())
    for step in (1, 2):
        checkpoint.save(step)
    checkpoint._lock.release()
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = checkpoint_of(tmp_path, *trained(), silence(), resume=True)
    assert again.step == 1 and (tmp_path / "checkpoint-damaged.pt").exists()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: replace(source, target) if ".part" not in str(source) else kill())
    with pytest.raises(Killed):
        again.save(2)
    assert read_newest(tmp_path)[0]["step"] == 1


def kill():
    raise Killed


# ------------------------------------------------------------------------------------------------------------- restored

OPTIMIZERS = {
    "adamw": adamw,
    "lars": lambda model: Lars(model.parameters(), lr=0.1, momentum=0.9),
    "muon": lambda model: build_optimizer(
        [{"params": list(model.parameters())}], "muon", lr=0.1, precision="float32", device=CPU
    ),
}


class Counter:
    """Has a state that no module has."""

    count = torch.zeros(())

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_all_that_is_named_comes_back_and_the_optimizers_options_stay_as_the_run_sets_them(tmp_path, make):
    model, optimizer = trained(make)
    optimizer.param_groups[0]["weight_decay"] = 0.7
    counter = Counter()
    counter.count = torch.tensor(7.0)
    checkpoint = checkpoint_of(tmp_path, model, optimizer, silence(), counter=counter, best={"top1": 3.5})
    checkpoint.save(1)
    checkpoint._lock.release()
    other, second = trained(make)
    counter, best, options = Counter(), {"top1": 0.0}, second.param_groups[0]["weight_decay"]
    again = checkpoint_of(tmp_path, other, second, silence(), resume=True, counter=counter, best=best)
    assert again.step == again.saved == 1 and counter.count == 7 and best == {"top1": 3.5} and same(other, model.state_dict())
    assert second.param_groups[0]["weight_decay"] == options != 0.7
    kept, found = optimizer.state_dict()["state"], second.state_dict()["state"]
    assert kept.keys() == found.keys() and kept
    for entry, theirs in zip(kept.values(), found.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])) for name, value in entry.items())


MISFITS = {
    "no model": (lambda saved: saved.pop("model"), "model is missing"),
    "a weight less": (lambda saved: saved["model"].pop("0.weight"), r"1 missing \(0.weight\)"),
    "an unknown weight": (
        lambda saved: saved["model"].update(extra=torch.zeros(1)),
        r"1 unexpected \(extra\)",
    ),
    "another shape": (lambda saved: saved["model"].update({"0.bias": torch.zeros(7)}), r"0.bias is \(7,\) instead of \(2,\)"),
    "nothing named best": (lambda saved: saved.pop("best"), "best is missing"),
    "fewer parameters": (lambda saved: saved["optimizer"]["param_groups"][0]["params"].pop(), r"groups of \[3\] parameters"),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, change, words):
    model, optimizer = trained()
    saved = {"model": copy_of(model), "optimizer": optimizer.state_dict(), "best": {}, "settings": {}, "step": 1}
    change(saved)
    write(tmp_path, saved)
    model, optimizer = trained()
    before, moment = copy_of(model), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises((Stop, ValueError), match=words):
        checkpoint_of(tmp_path, model, optimizer, silence(), resume=True, best={})
    assert same(model, before) and torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moment)


def test_settings_that_may_change_are_told_and_others_are_refused_with_both_values(tmp_path):
    before, now = {"seed": 1, "epochs": 5, "old": 2, "resume": False}, {"seed": 1, "epochs": 6, "resume": True}
    may = frozenset({"epochs", "old", "resume"})
    assert changed_settings(before, now, may) == ["epochs was 5 and is 6 now", "old was 2 and is None now"]
    later = {**now, "came_later": 0}  # an option that the run did not have when it began
    assert changed_settings(before, later, may)[0] == "came_later was None and is 0 now"
    with pytest.raises(Stop, match="other settings: gone was 'x' and is None now; seed was 1 and is 2 now"):
        changed_settings({**before, "gone": "x"}, {**now, "seed": 2}, may)
    checkpoint = checkpoint_of(tmp_path, *trained(), silence())
    checkpoint.save(1)
    checkpoint._lock.release()
    with pytest.raises(Stop, match="holds a run already: add --resume"):
        checkpoint_of(tmp_path, *trained(), silence())


# --------------------------------------------------------------------------------------------- when it is saved, and when not


def steps_of(checkpoint, last, save_every=1):
    """Train: each step makes the weights larger by one. Yields each step before the optimizer would change them."""
    with checkpoint.saved_on_error():
        for step in range(checkpoint.step + 1, last + 1):
            yield step
            with torch.no_grad():
                for parameter in checkpoint.model.parameters():
                    parameter.add_(1)
            checkpoint.advance(step, last, save_every)


def test_a_checkpoint_is_due_by_steps_by_minutes_and_at_the_end(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = checkpoint_of(tmp_path, *trained(), silence())
    monkeypatch.setattr(module, "write", lambda folder, state: saved.append(state["step"]) or "")
    for _ in steps_of(checkpoint, 10, save_every=7):
        now[0] += 300
    assert saved == [4, 7, 10]  # more than fifteen minutes of five a step, then every seventh, then the end


@pytest.mark.parametrize(("fails", "saved"), [((1, 2), 4), ((3, 4), 2)], ids=["for a while", "at the end"])
def test_a_disk_that_is_full_costs_a_warning_and_at_the_end_the_exit_code(tmp_path, monkeypatch, capsys, fails, saved):
    real = torch.save

    def full(state, file):
        if state["step"] in fails:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    checkpoint = checkpoint_of(tmp_path, *trained(), silence())
    failure = (
        pytest.raises(Stop, match="the end is not saved, only step 2 .*No space left")
        if saved == 2
        else contextlib.nullcontext()
    )
    with failure as stop:
        list(steps_of(checkpoint, 4))
    assert saved == 4 or stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is not")[0] for line in lines if "No space left" in line] == [f"warning: step {i}" for i in fails]
    assert str(tmp_path / "checkpoint.pt") in "".join(lines)
    assert read_newest(tmp_path)[0]["step"] == saved and not list(tmp_path.glob(".*.part"))


def test_weights_that_are_not_finite_never_take_the_place_of_good_ones(tmp_path, capsys):
    model, optimizer = trained()
    checkpoint = checkpoint_of(tmp_path, model, optimizer, silence())
    with pytest.raises(Stop, match="step 4: loss in process 0 is not finite.*step 2 is saved"):
        for step in steps_of(checkpoint, 9):
            if step == 3:  # the update of this step explodes; its loss did not
                model[0].bias.data[0] = torch.inf
            loss = model(torch.randn(4, 3)).sum() if step > 3 else torch.zeros(())
            checkpoint.require_finite(step, {"loss": loss}, [])
    assert "warning: step 3 is not saved: the weights hold NaN" in capsys.readouterr().out
    assert read_newest(tmp_path)[0]["step"] == 2


class Broken(Exception):
    """Whatever ends a run."""


@pytest.mark.parametrize(("where", "saved"), [("forward", 2), ("update", None), ("after", 3)])
@pytest.mark.parametrize(
    "error", [Broken(), Stop("a cause of the data"), KeyboardInterrupt(15)], ids=["error", "stop", "signal"]
)
def test_an_error_saves_the_last_whole_step_and_none_that_is_half_done(tmp_path, where, saved, error):
    model, optimizer = trained()
    states, checkpoint = {}, checkpoint_of(tmp_path, model, optimizer, silence())
    with pytest.raises(Stop if isinstance(error, KeyboardInterrupt) else type(error)) as ended, checkpoint.saved_on_error():
        for step in range(1, 10):
            if step == 4:
                raise error
            loss = model(torch.randn(4, 3)).square().sum()
            loss.backward()
            if step == 3 and where == "forward":
                raise error
            checkpoint.require_finite(step, {"loss": loss}, [])
            if step == 3 and where == "update":
                raise error
            optimizer.step()
            optimizer.zero_grad()
            states[step] = copy_of(model)
            checkpoint.advance(step, 9, 100)
    if isinstance(error, KeyboardInterrupt):
        assert ended.value.code == 143 and (f"step {saved} is saved" if saved else "nothing new to save") in str(ended.value)
    if saved is None:
        assert read_newest(tmp_path) == (None, "")
    else:
        found = read(tmp_path / "checkpoint.pt")
        assert found["step"] == saved and same(model_of(found), states[saved])


def model_of(found):
    return SimpleNamespace(state_dict=lambda: found["model"])


def test_a_gradient_that_is_not_finite_leaves_weights_moments_and_statistics_untouched(tmp_path):
    model, optimizer = trained()
    checkpoint = checkpoint_of(tmp_path, model, optimizer, silence())
    with torch.no_grad():
        model[1].weight.zero_(), model[1].bias.zero_()  # the loss is 0: the gradient of its root is infinite
    before, moments = copy_of(model), [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    loss = model(torch.randn(4, 3) + 9).square().sum().sqrt()
    loss.backward()
    with pytest.raises(Stop, match="step 1: the gradient in process 0 is not finite") as stop, checkpoint.saved_on_error():
        checkpoint.require_finite(1, {"loss": loss}, ["a\n.jpg"])
    assert stop.value.code == 1 and same(model, before)
    assert all(map(torch.equal, moments, (value for entry in optimizer.state.values() for value in entry.values())))
    assert (tmp_path / "nonfinite.txt").read_text() == "step 1: the gradient in process 0\n  'a\\n.jpg'\n"


# --------------------------------------------------------------------------------------------------------- two processes


def part_of(folder):
    """One rank of two: it trains up to three steps, and a signal reaches the second one in step 2."""
    rank = dist.get_rank()
    ranks, signals, model = Ranks(rank, 2, CPU, dist.group.WORLD), silence(), nn.Linear(1, 1)
    trained = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model)
    checkpoint = checkpoint_of(folder, model, optimizer, signals, ranks=ranks)
    try:
        with checkpoint.saved_on_error():
            for step in (1, 2, 3):
                loss = trained(torch.ones(1, 1)).sum()
                loss.backward()
                checkpoint.require_finite(step, {"loss": loss}, [f"{rank}.jpg"])
                optimizer.step()
                optimizer.zero_grad()
                if step == 2 and rank == 1:
                    signals.received = signal.SIGTERM
                checkpoint.advance(step, 3, 100)
    except Stop as stop:
        return stop.code, str(stop), float(model.weight)


def test_a_signal_on_one_rank_stops_all_at_the_same_step(two_processes, tmp_path):
    results = two_processes(part_of, tmp_path)
    assert [result[0] for result in results] == [143, 143] and results[0][2] == results[1][2]
    assert all("stopped after step 2 of 3; step 2 is saved" in result[1] for result in results)
    assert read(tmp_path / "checkpoint.pt")["step"] == 2


def elsewhere(folder):
    """Each rank has a disk of its own, and only that of the first one holds the run."""
    ranks = Ranks(dist.get_rank(), 2, CPU, dist.group.WORLD)
    try:
        Checkpoint(folder / str(ranks.rank), {}, ranks, may_change=frozenset(), resume=True)
    except Stop as stop:
        return str(stop)


def test_ranks_that_find_different_checkpoints_stop(two_processes, tmp_path):
    write(tmp_path / "0", state(6))
    assert all("different checkpoints" in text and "[6, 0]" in text for text in two_processes(elsewhere, tmp_path))
