"""Steps whose numbers are looked at late: what is not finite is left out on the device. A CPU has a fused AdamW as well."""

import json
import math
import re
import sys

import pytest
import torch
from running import EXAMPLES, run_processes, run_script, without_clock
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, pretrain, run_of
from torch.utils._python_dispatch import TorchDispatchMode

import mvmae

sys.path.insert(0, str(EXAMPLES))

from engine import finite
from engine.checkpoint import load_checkpoint
from engine.ends import Stop
from engine.snapshot import not_finite

BAD = {4: "input", 6: "gradient"}
"""Steps of `train` that are not finite: all numbers, as from an image with NaN, or the gradient alone."""


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


def train(folder, *, steps=8, late=True, bad=BAD, after=lambda run, step: None, **options):
    """Train `network`, with a line of the log and a look every 3 steps; return the run, after its end or error."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    folder.mkdir(exist_ok=True)
    run = run_of(folder, model, optimizer, steps, **{"log_every": 3, "save_every": 100, **options})
    if not late:
        run.late = None
    data = [(torch.randn(4, 2, generator=torch.Generator().manual_seed(step)),) for step in range(1, steps + 1)]
    with run:
        for step, (x,) in run.batches(data[run.step :]):
            if bad.get(step) == "input":
                x[0, 0] = math.nan
            loss = model(x).square().sum()
            loss.backward()
            if bad.get(step) == "gradient":
                model[0].weight.grad[0, 0] = math.inf
            if run.finite(step, {"loss": loss}, lambda step=step: [f"{step}.jpg"]):
                optimizer.step()
            optimizer.zero_grad()
            run.report(step)
            after(run, step)
            run.checkpoint(step)
    return run


def logged(folder):
    return without_clock([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


def test_a_late_look_trains_logs_and_names_what_an_immediate_one_does(tmp_path, capsys):
    ends, said = [], []
    for late in (False, True):
        run = train(tmp_path / str(late), late=late, skip_nonfinite=2)
        ends.append(load_checkpoint(tmp_path / str(late)))
        said.append([line for line in capsys.readouterr().out.splitlines() if "left out" in line])
        assert run.skipped == 2 and not not_finite(ends[-1])
    assert_identical(*ends)
    assert ends[1]["optimizer"]["state"][0]["step"] == 6 and ends[1]["model"]["1.num_batches_tracked"] == 6
    assert said[0] == said[1] and len(said[1]) == 2
    assert logged(tmp_path / "True") == logged(tmp_path / "False")
    named = (tmp_path / "True" / "nonfinite.txt").read_text()
    assert named == "step 4: loss in process 0 is not finite\n  '4.jpg'\nstep 6: the gradient is not finite\n  '6.jpg'\n"
    assert named == (tmp_path / "False" / "nonfinite.txt").read_text()


def test_one_too_many_ends_the_run_at_the_next_look_and_it_goes_on_from_there(tmp_path):
    with pytest.raises(Stop, match=r"^step 4: loss in process 0 is not finite: .*nonfinite.txt .*, step 6 is saved") as caught:
        train(tmp_path)
    assert caught.value.code == 1
    saved = load_checkpoint(tmp_path)
    assert saved["step"] == 6 and saved["skipped"] == 2 and not not_finite(saved)
    assert [line["step"] for line in logged(tmp_path)] == [3]
    train(tmp_path, resume=True)
    train(tmp_path / "whole", skip_nonfinite=2)
    assert_identical(load_checkpoint(tmp_path), load_checkpoint(tmp_path / "whole"))


def test_what_is_not_finite_after_a_resume_counts_with_what_was_before(tmp_path):
    with pytest.raises(Stop, match="step 2: loss"):
        train(tmp_path, bad={2: "input"})
    with pytest.raises(Stop, match="step 5: loss in process 0 is not finite: .*, step 6 is saved"):
        train(tmp_path, bad={5: "input"}, resume=True, skip_nonfinite=1)
    assert load_checkpoint(tmp_path)["skipped"] == 2


def test_an_error_saves_the_last_step_without_what_was_left_out(tmp_path, capsys):
    def fail(run, step):
        if step == 5:
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        train(tmp_path, after=fail, log_every=100)
    saved = load_checkpoint(tmp_path)
    assert saved["step"] == 5 and saved["skipped"] == 1 and not not_finite(saved)
    assert (tmp_path / "nonfinite.txt").read_text().startswith("step 4: loss in process 0 is not finite")
    assert "warning: step 4: loss in process 0 is not finite; left out" in capsys.readouterr().out


def test_a_signal_looks_back_before_it_saves(tmp_path):
    def signal(run, step):
        run.stop.received = 15 if step == 5 else None

    with pytest.raises(Stop, match="step 4: .*, step 5 is saved"):
        train(tmp_path, after=signal, log_every=100)
    with pytest.raises(Stop, match="stopped after step 5 of 8; step 5 is saved"):
        train(tmp_path / "allowed", after=signal, log_every=100, skip_nonfinite=1)
    assert load_checkpoint(tmp_path / "allowed")["skipped"] == 1


def test_steps_are_saved_by_the_clock_only_when_they_were_looked_at(tmp_path, monkeypatch):
    tried = []

    def follow(run, step):
        tried.append(run.writer.tried)
        monkeypatch.setattr(run.writer, "minutes", lambda: 99)

    train(tmp_path, after=follow, bad={}, save_minutes=1.0)
    assert tried == [0, 1, 1, 3, 3, 3, 6, 6]  # the first step, whose end the clock waits for, and every third


def test_a_save_that_is_due_looks_back_first(tmp_path):
    with pytest.raises(Stop, match="step 4: .*, step 5 is saved"):
        train(tmp_path, save_every=5, log_every=100)


def test_without_a_line_of_the_log_there_is_a_look_after_many_steps(tmp_path, monkeypatch):
    with pytest.raises(Stop, match="step 9: .*, step 11 is saved"):  # before the pace is told
        train(tmp_path / "pace", steps=14, bad={9: "input"}, log_every=100)
    monkeypatch.setattr("engine.run.MOST", 5)
    with pytest.raises(Stop, match="step 4: .*, step 6 is saved"):
        train(tmp_path, log_every=100)


def test_only_a_fused_adamw_leaves_out_steps():
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    assert finite.leaves_out(torch.optim.AdamW(parameters, fused=True))
    assert not finite.leaves_out(torch.optim.AdamW(parameters))
    assert not finite.leaves_out(torch.optim.SGD(parameters, 0.1, momentum=0.9, fused=True))  # its first step would not count


class NoQuestions(TorchDispatchMode):
    """Refuses what waits for a device: numbers that the host asks for, and results whose size depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_late_step_asks_the_device_for_nothing(tmp_path, tiny_vit, monkeypatch, parts):
    from tasks.pretraining import backward

    norm = mvmae.projection_mlp(48, 16, 8, batch_norm=True)
    model = mvmae.MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=norm)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    views = torch.randn(4, 2, 3, 32, 32)
    masks = [mvmae.random_mask(8, 16, 0.75) for _ in range(3)]
    asked = []
    for name in ("tolist", "item", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *given, do=original, name=name: asked.append(name) or do(self, *given)
        )
    with run_of(tmp_path, model, optimizer, 3, log_every=3, save_every=3) as run:
        for step, mask in run.batches(masks):
            asked.clear()
            with NoQuestions():
                losses = backward(model, views, mask, parts)
                assert run.finite(step, losses._asdict(), list)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step == 2:
                    run.report(step)
            assert asked == []
            if step != 2:
                run.report(step)
                assert asked[0] == "tolist"  # the look
            run.checkpoint(step)


def test_masks_are_copied_to_a_cuda_device_from_pinned_memory(monkeypatch):
    copies = []

    class Pinned(tuple):
        def to(self, device, non_blocking):
            copies.append((str(device), non_blocking))
            return self[0]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned([self]))
    drawn = mvmae.random_mask(3, 16, 0.75, generator=torch.Generator().manual_seed(1), device="cuda")
    assert copies == [("cuda", True)] * 2
    assert all(map(torch.equal, drawn, mvmae.random_mask(3, 16, 0.75, generator=torch.Generator().manual_seed(1))))


# ------------------------------------------------------------------------------------------------------------ the scripts


def fuse():
    """A fused AdamW on the CPU, as the scripts have on CUDA."""
    build = torch.optim.AdamW.__init__
    torch.optim.AdamW.__init__ = lambda self, *args, **options: build(self, *args, **{**options, "fused": True})


def fuse_at_once():
    fuse()
    finite.leaves_out = lambda optimizer: False
    import engine.run

    engine.run.leaves_out = finite.leaves_out


OVERFLOW = ["--mean", 0, 0, 0, "--std", 1e-30, 1e-30, 1e-30, "--max-steps", 8, "--log-every", 5, "--save-every", 100]


def test_pretraining_leaves_out_a_batch_late_and_trains_as_at_once(one_bright, tmp_path):
    skipping = [*STEPS, *OVERFLOW, "--skip-nonfinite", 4]
    for name, patch in (("late", fuse), ("at once", fuse_at_once)):
        assert pretrain(tmp_path / name, one_bright, *skipping, patch=patch).code == 0
    ends = [end_of(tmp_path / name) for name in ("late", "at once")]
    assert_identical(*ends)
    assert ends[0]["skipped"] == ends[1]["skipped"] == 2 and not not_finite(ends[0])  # of two epochs
    files = [(tmp_path / name / "run" / "nonfinite.txt").read_text() for name in ("late", "at once")]
    assert files[0] == files[1] and "/7.png" in files[0]
    assert logged(tmp_path / "late" / "run") == logged(tmp_path / "at once" / "run")


def test_pretraining_ends_by_name_and_goes_on(one_bright, tmp_path):
    result = pretrain(tmp_path, one_bright, *STEPS, *OVERFLOW, patch=fuse)
    found = re.search(
        r"error: step (\d): loss_\w+ in process 0 is not finite: .*nonfinite.txt.* step (\d) is saved", result.err
    )
    assert result.code == 1 and found and int(found[1]) <= int(found[2]), result.err
    assert end_of(tmp_path)["step"] == int(found[2]) and not not_finite(end_of(tmp_path))
    again = pretrain(tmp_path, one_bright, *STEPS, *OVERFLOW, "--resume", "--skip-nonfinite", 4, patch=fuse)
    whole = pretrain(tmp_path / "whole", one_bright, *STEPS, *OVERFLOW, "--skip-nonfinite", 4, patch=fuse)
    assert again.code == whole.code == 0
    assert_identical(end_of(tmp_path), end_of(tmp_path / "whole"))


@pytest.mark.parametrize("more", [[], ["--ema", 0.9, "--projector", 8, "--projector-hidden", 16, "--projector-norm"]])
def test_adaptation_leaves_out_a_batch_late(one_bright, tmp_path, more):
    given = ["--data", one_bright, "--output-dir", "run", *ARGUMENTS[2:], *OVERFLOW, "--epochs", 5, "--freeze-epochs", 1]
    given += ["--encoder", "mvmae_vit_tiny_patch16", "--no-pretrained", "--workers", 0, "--skip-nonfinite", 4, *more]
    result = run_script("adapt.py", *given, folder=tmp_path, patch=fuse)
    assert result.code == 0, result.err
    assert end_of(tmp_path)["skipped"] == 2 and not not_finite(end_of(tmp_path))


def test_two_processes_leave_out_the_same_steps(one_bright, tmp_path):
    given = ["--data", one_bright, "--output-dir", "run", *ARGUMENTS, *STEPS, *OVERFLOW, "--loss-weight", 0]
    results = run_processes("pretrain.py", *given, folder=tmp_path, patch=fuse)
    assert [result.code for result in results] == [1, 1]
    found = [re.search(r"error: (step \d: loss_rec in process (\d) is not finite)", result.err) for result in results]
    assert found[0] and found[1] and found[0][1] == found[1][1]
    blocks = (tmp_path / "run" / "nonfinite.txt").read_text().split("step ")[1:]
    assert blocks and f"step {blocks[0]}".startswith(found[0][1])
    for _, *names in map(str.splitlines, blocks):
        assert len(names) == 4 and any("/7.png" in name for name in names)  # of the process that met it alone
    assert not not_finite(end_of(tmp_path))
