"""Checkpoints of a run: written whole or not at all, with the one before, and checked when read; one run to a folder."""

import contextlib
import os
import pickle
import socket
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.distributed import Ranks
from engine.log import Log
from engine.signals import NOTHING_SAVED, Signals, Stop
from mvmae.weights import check_weights, first_line, replace_file

NEWEST, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint-previous.pt", "checkpoint-damaged.pt"
SAVE_MINUTES = 15.0  # after which a checkpoint is due, however few steps were done
GRADIENT = "the gradient"


class Checkpoint:
    """What a run can be continued from, and when it is saved.

    Make it, `restore` it, and train in `saved_on_error`: `require_finite` after a backward pass, `advance` after a step.

    Args:
        folder: of the run; made, and locked against other runs while this process lives.
        settings: what the run depends on, as plain values: the options, and the fingerprint of its data.
        ranks: of which the first one writes.
        may_change: names of settings that a resumed run may have otherwise.
        resume: continue from the newest whole checkpoint, if there is one.

    Attributes:
        step: that the run continues after; 0 for a new one.
        saved: the last step that is saved.

    Raises:
        Stop: in all ranks, if the folder is in use or cannot be written to, holds a run and ``resume`` is False, was begun with
            other settings, or none of its checkpoints can be read.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], ranks: Ranks, *, may_change: frozenset[str], resume: bool
    ) -> None:
        self.folder, self.settings, self.ranks, self.resume = folder, dict(settings), ranks, resume
        self.state, name, problem = None, "", ""
        try:
            if ranks.rank == 0:
                self._lock = lock(folder)
            self.state, name = read_newest(folder)
        except Stop as error:
            problem = str(error)
        self.step: int = self.state["step"] if self.state else 0
        steps, problems = zip(*ranks.gather((self.step, problem)), strict=True)
        if any(problems):
            raise Stop(next(filter(None, problems)))
        if len({*steps}) > 1:
            raise Stop(f"the ranks see different checkpoints in {folder}, of steps {[*steps]}: put it on a disk that all share")
        if self.state and not resume:
            raise Stop(f"{folder} holds a run already: add --resume to continue it, or choose another --output-dir")
        lines = [f"no checkpoint in {folder}: starting at step 0"]
        if self.state:
            changed = changed_settings(self.state["settings"], self.settings, may_change)
            lines = [f"resuming {folder} after step {self.step}", *changed]
        if ranks.rank == 0 and resume:
            print(*lines, sep="; ", flush=True)
            if name == PREVIOUS and (folder / NEWEST).exists():  # the next save would put the damaged one over the good one
                os.replace(folder / NEWEST, folder / DAMAGED)
        self.saved, self.failure, self._time = self.step, "", time.monotonic()
        self._at: int | None = None  # the step after which the state is now; None while the optimizer changes it

    def restore(self, log: Log, signals: Signals, *, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> None:
        """Name what is saved, and load what the checkpoint holds of it.

        Args:
            log: for warnings, and closed where the run ends early.
            signals: read after each step.
            model: without a wrapper such as DDP.
            optimizer: whose moments are loaded, while its options stay as this run sets them.
            **more: anything with ``state_dict`` and ``load_state_dict``; a plain dictionary is updated.

        Raises:
            ValueError: if the checkpoint lacks something, or holds other names or shapes.
        """
        self.log, self.signals, self.model = log, signals, model
        self.objects = {"model": model, "optimizer": optimizer, **more}
        if self.state:
            check_fit(self.folder, self.state, self.objects)
            saved, own = self.state["optimizer"], optimizer.state_dict()["param_groups"]
            sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], own)]
            if sizes[0] != sizes[1]:
                raise Stop(f"the checkpoint in {self.folder} has groups of {sizes[0]} parameters instead of {sizes[1]}")
            saved["param_groups"] = own
            for name, thing in self.objects.items():
                (thing.update if isinstance(thing, dict) else thing.load_state_dict)(self.state[name])
        self.state = None  # free its memory
        self._buffers = [buffer for norm in model.modules() if isinstance(norm, _BatchNorm) for buffer in norm.buffers()]
        self._whole(self.step)

    @contextlib.contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Save the last whole step where an error ends the loop; a `Stop` where a signal has, or where the last save failed."""
        try:
            yield
        except BaseException as error:
            if (step := self._at) is not None:
                self._restore_statistics()
                if step != self.saved:
                    self.save(step)
            if isinstance(error, KeyboardInterrupt):  # cuts short a wait for data
                raise self._stopped(self.saved, int(error.args[0] if error.args else 2)) from error
            if self.saved and not isinstance(error, Stop):
                self.log.say(f"step {self.saved} is saved: {self.again()}")
            self.log.close(failed=True)
            raise
        if self.failure:
            raise Stop(f"the end is not saved, only step {self.saved} ({self.failure}): mend that, then {self.again()}", 1)

    def require_finite(self, step: int, losses: Mapping[str, Tensor], images: Iterable[str]) -> None:
        """Stop all ranks before the optimizer, where a loss or a gradient of any of them is NaN or infinite.

        The state before the step is saved, and ``nonfinite.txt`` names the images of the batch.

        Args:
            step: counted from 1, after its backward pass.
            losses: scalars of this rank.
            images: names of this rank's part of the batch.
        """
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        numbers = {**losses, GRADIENT: nn.utils.get_total_norm(gradients)}
        values = torch.stack([value.detach().float() for value in numbers.values()]).tolist()  # waits for the device
        bad = [name for name, value in zip(numbers, values, strict=True) if not abs(value) < float("inf")]
        if not self.ranks.any(bool(bad)):
            self._at = None
            return
        self._restore_statistics()
        self.save(step - 1)
        self._agree()
        every = dict(enumerate(self.ranks.gather((bad, list(images)))))
        # the gradient is the mean over all ranks: only a rank whose loss is not finite has read the images that caused it
        causes = {rank: part for rank, part in every.items() if part[0] and part[0] != [GRADIENT]} or every
        parts = "; ".join(f"{', '.join(names)} in process {rank}" for rank, (names, _) in causes.items())
        paths = [f"  {path!r}" for _, images in causes.values() for path in images]
        self.log.append("nonfinite.txt", "\n".join([f"step {step}: {parts}", *paths]))
        self.log.close(failed=True)
        where = f"{self.folder / 'nonfinite.txt'} names the images"
        raise Stop(
            f"step {step}: {parts} is not finite: {where}, step {self.saved} is saved; a lower learning rate may help", 1
        )

    def advance(self, step: int, last: int, save_every: int) -> None:
        """End a step: save where due, or after a signal, which ends the run (`Stop`) in all ranks at the same step."""
        self._whole(step)
        late = time.monotonic() > self._time + 60 * SAVE_MINUTES
        event = self.ranks.max(2 * (self.signals.received or 0) + late)  # one question to all ranks; a signal saves anyway
        if event or step % save_every == 0 or step == last:
            self.save(step)
        if (received := event // 2) and step != last:
            self._agree()
            raise self._stopped(step, received, last)

    def _stopped(self, step: int, number: int, last: int = 0) -> Stop:
        self.log.close(failed=True)
        if not step:
            return Stop(NOTHING_SAVED, 128 + number)
        saved = f"step {step} is saved" if self.saved == step else f"only step {self.saved} is saved ({self.failure})"
        return Stop(f"stopped after step {step}{f' of {last}' if last else ''}; {saved}: {self.again()}", 128 + number)

    def _agree(self) -> None:
        """Let all ranks know what the first one, which writes, has saved; all of them must call it."""
        self.saved, self.failure = self.ranks.gather((self.saved, self.failure))[0]

    def _whole(self, step: int) -> None:
        """Note that the state is that after ``step``; batch statistics, which a forward pass changes, are copied."""
        self._at, self._statistics = step, [buffer.clone() for buffer in self._buffers]

    def _restore_statistics(self) -> None:
        for buffer, before in zip(self._buffers, self._statistics, strict=True):
            buffer.copy_(before)

    def save(self, step: int) -> None:
        """Write the state after ``step``; where that fails, warn and go on."""
        self._time = time.monotonic()
        if self.ranks.rank != 0:
            self.saved = step
            return
        state = {name: thing if isinstance(thing, dict) else thing.state_dict() for name, thing in self.objects.items()}
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            self.failure = "the weights hold NaN or infinity"
        else:
            with self.signals.saving():
                self.failure = write(self.folder, {**state, "settings": self.settings, "step": step})
        if not self.failure:
            self.saved = step
        else:
            self.log.say(f"warning: step {step} is not saved: {self.failure}; the newest checkpoint is of step {self.saved}")

    def again(self) -> str:
        """Return how to continue the run."""
        return f"run the same command {'again' if self.resume else 'with --resume'} to continue"


def write(folder: Path, state: Mapping[str, Any]) -> str:
    """Write ``checkpoint.pt`` beside, bring it to the disk, rename it; return why that failed, or nothing.

    Whatever ends the process, the new checkpoint or the one before, ``checkpoint-previous.pt``, is whole.
    """
    newest = folder / NEWEST

    def save(part: Path) -> None:
        with part.open("wb") as file:
            torch.save(dict(state), file)
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)

    try:
        replace_file(newest, save)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a write that fails
        cause = error if isinstance(error, OSError) else error.__context__
        return f"cannot write {newest}: {getattr(cause, 'strerror', None) or 'torch could not write all of it'}; make room"
    return ""


def read_newest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the newest whole checkpoint and its file's name; None where there is no checkpoint at all.

    Raises:
        Stop: if none of several can be read: a run must not start at 0 then.
    """
    reasons = []
    for name in (NEWEST, PREVIOUS):
        if os.path.lexists(folder / name):
            try:
                return read(folder / name), name
            except ValueError as error:
                reasons.append(str(error))
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if reasons:
        raise Stop(f"no checkpoint in {folder} can be read: {'; '.join(reasons)}")
    return None, ""


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint: each byte is checked against its checksum, and no code in it runs.

    Raises:
        ValueError: naming the file, if it is damaged or no checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged!r}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"step", "settings", "optimizer"} - set(state):
            raise ValueError(f"it holds no {', '.join(sorted(missing))}")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, and is not opened: it could run code") from error
    except Exception as error:  # what torch makes of damaged bytes can be anything
        raise ValueError(f"{path} is damaged, or no checkpoint of a run ({first_line(error)})") from error
    return state


def check_fit(folder: Path, state: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Raise a `Stop` or `WeightsError` if a checkpoint lacks an object, or names or shapes of the model's weights differ."""
    if missing := [name for name in objects if name not in state]:
        raise Stop(f"the checkpoint in {folder} does not fit this run: {', '.join(missing)} is missing")
    check_weights(state["model"], objects["model"].state_dict(), source=f"the checkpoint in {folder}")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], may_change: frozenset[str]) -> list[str]:
    """Return a line for each setting that changed and may; raise a `Stop` with both values of each that may not."""
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    lines = {name: f"{name} was {before.get(name)!r} and is {now.get(name)!r} now" for name in changed}
    lines |= {
        name: f"the {name} are not those of the start" for name in ("images", "weights") if name in changed
    }  # fingerprints
    new = now.keys() - before.keys()  # options that came after the run began are told, not refused
    if refused := [line for name, line in lines.items() if name not in may_change | new]:
        raise Stop(f"cannot resume with other settings: {'; '.join(refused)}. Use the old ones, or another --output-dir")
    return [line for name, line in lines.items() if name != "resume"]


def lock(folder: Path) -> FileLock:
    """Make a run's folder and lock it while this process lives; a `Stop` names the process that holds it already."""
    held, owner = FileLock(folder / ".lock"), folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=6)  # the workers of a killed run, which hold its lock too, end within 5 s
        for part in folder.glob(f".{NEWEST}.*.part"):  # of a run that was killed in a save
            part.unlink()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        holder = owner.read_text() if owner.exists() else "another process"
        raise Stop(f"{folder} is in use by {holder}: choose another --output-dir") from error
    except OSError as error:
        raise Stop(f"cannot write to the output folder {folder}: {error.strerror}") from error
    return held
