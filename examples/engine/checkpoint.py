"""Checkpoints of a run on the disk: written as a whole or not at all, checked when read, the previous one kept."""

import contextlib
import json
import os
import pickle
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine import locks
from engine.distributed import Processes
from engine.ends import Stop
from engine.snapshot import is_plain, named_tensors, not_finite
from mvmae.weights import first_line, write_json

NEWEST, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint-previous.pt", "checkpoint-damaged.pt"
PARTS = frozenset({"step", "settings", "optimizer"})


class SaveError(Exception):
    """Why a checkpoint could not be written."""


class NotFinite(SaveError):
    """A state that holds NaN or infinity, with which no run can go on."""


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``checkpoint.pt``, keeping the one before as ``checkpoint-previous.pt``.

    Written beside, brought to the disk, then renamed: whatever ends the process, one of the two is whole.

    Args:
        folder: the run's folder, made again if it was deleted.
        state: tensors, numbers, strings, lists and dictionaries of them.

    Raises:
        NotFinite: if a tensor holds NaN or infinity.
        SaveError: if it cannot be written, such as to a full disk; what was there is there still.
    """
    newest, unfinished = folder / NEWEST, folder / (NEWEST + ".unfinished")
    if name := not_finite(state):
        raise NotFinite(f"{name} holds NaN or infinity after step {state['step']}")
    try:
        locks.keep(folder)
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:  # a new file: no link is followed
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
        os.replace(unfinished, newest)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a write that fails
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "torch could not write all of it"
        raise SaveError(f"cannot write {newest}: {reason}, {_free_space(folder)}; make room") from error
    except Stop as error:
        raise SaveError(f"cannot write {newest}: {error}") from error


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free >> 20} MB are free"
    except OSError as error:
        return str(error)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, parts: frozenset[str] = frozenset()) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole and holds these parts; None where the folder holds none at all.

    Raises:
        Stop: if there are checkpoints, and none of them is whole.
    """
    return _newest(folder, parts)[0]


def _newest(folder: Path, parts: frozenset[str]) -> tuple[dict[str, Any] | None, str]:
    """Return the newest checkpoint that is whole, and the name of its file."""
    reasons = []
    for name in (NEWEST, PREVIOUS):
        if os.path.lexists(folder / name):  # a link to nowhere counts: a run must not start at 0 for it
            try:
                return read_checkpoint(folder / name, parts), name
            except ValueError as error:
                reasons.append(str(error))
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if reasons:
        raise Stop(f"no checkpoint in {folder} can be read: {'; '.join(reasons)}")
    return None, ""


def read_checkpoint(path: Path, parts: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read one checkpoint: every byte of it is checked against its checksum, and no code in it is run.

    Raises:
        ValueError: naming the file, if it is damaged, holds more than finite tensors and plain values, or lacks a part.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed, as torch writes none")
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, and is not opened: it could run code") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what torch makes of damaged bytes can be anything
        raise ValueError(f"{path} is damaged or cut short: {first_line(error)}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum of {damaged!r}")
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it must hold a dictionary, got {type(state).__name__}")
    if missing := parts - {key for key in state if isinstance(key, str)}:
        raise ValueError(f"{path} is not the checkpoint of a run: it holds no {', '.join(sorted(missing))}")
    if odd := next((name for name, value in named_tensors(state) if not is_plain(value)), ""):
        raise ValueError(f"{path} is not the checkpoint of a run: {odd} is no plain tensor")
    if name := not_finite(state):
        raise ValueError(f"{path} is of a run that has diverged: {name} holds NaN or infinity")
    for key in ("step", "skipped"):
        if key in state and (type(state[key]) is not int or state[key] < 0):
            raise ValueError(f"{path} is not the checkpoint of a run: {key} is not a whole number from 0 on")
    for key in ("settings", "machine"):
        if key in state and not _is_plain_dictionary(state[key]):
            raise ValueError(f"{path} is not the checkpoint of a run: {key} is not a dictionary of plain values")
    return state


def _is_plain_dictionary(value: Any) -> bool:
    try:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value) and bool(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False


def open_run(
    folder: Path, settings: Mapping[str, Any], may_change: frozenset[str], *, resume: bool, processes: Processes
) -> dict[str, Any] | None:
    """Make a run's folder with its ``config.json``, or find the checkpoint to go on from.

    Args:
        folder: the run's folder.
        settings: what the run depends on, as plain values; ``images`` is the fingerprint of its data.
        may_change: names of settings that a resumed run may have otherwise.
        resume: go on from the newest checkpoint, if there is one.
        processes: this one and the others; the first writes and prints.

    Returns:
        the checkpoint, or None for a new run.

    Raises:
        Stop: in all processes, if the folder is in use, cannot be written to, holds a run that is not to be resumed or cannot
            be, or holds other checkpoints for one process than for another.
    """
    state, name, problem = None, "", ""
    try:
        if processes.rank == 0:
            locks.take(folder, replaced=(NEWEST, PREVIOUS, DAMAGED))
        state, name = _newest(folder, PARTS)
    except Stop as error:
        problem = str(error)
    same_everywhere(folder, state, processes, problem)
    if state is not None and not resume:
        raise Stop(f"{folder} holds a run already: add --resume to continue it, or choose another --output-dir")
    changed, here = [], machine(processes)
    if state:
        free = may_change | ({"images"} if settings.get("other_data") else set())
        same = {"resume": resume}  # no news
        changed = check_same({**state["settings"], **same}, {**settings, **same}, free)
        if differs := check_same(state.get("machine", here), here, frozenset({*state.get("machine", ()), *here})):
            changed.append(f"the last bits of the results can differ from an uncut run's: {', '.join(differs)}")
    if processes.rank == 0:
        try:
            if name == PREVIOUS and os.path.lexists(folder / NEWEST):  # else the next save would put it over the good one
                os.replace(folder / NEWEST, folder / DAMAGED)
                changed.append(f"{NEWEST} is kept as {DAMAGED}")
            write_json(folder / "config.json", settings)
        except OSError as error:
            raise Stop(f"cannot write to the output folder {folder}: {error.strerror}") from error
        if state:
            print(f"resuming {folder} after step {state['step']}" + "".join(f"; {line}" for line in changed), flush=True)
        elif resume:
            print(f"no checkpoint in {folder}: starting at step 0", flush=True)
    return state


def same_everywhere(folder: Path, state: Mapping[str, Any] | None, processes: Processes, problem: str = "") -> None:
    """Compare the steps of the checkpoints that all processes have found.

    Raises:
        Stop: in all processes, if they differ, or one of them has met a problem.
    """
    found = processes.gather((problem, "none" if state is None else f"step {state.get('step')}"))
    if problem := next((text for text, _ in found if text), ""):
        raise Stop(problem)
    if len({step for _, step in found}) > 1:
        listed = ", ".join(f"{step} in process {rank}" for rank, (_, step) in enumerate(found))
        raise Stop(f"the processes find different checkpoints in {folder} ({listed}): put it on a disk that all of them share")


def machine(processes: Processes) -> dict[str, Any]:
    """Return what the last bits of a result depend on, besides the settings."""
    cpus, cuda = Path("/proc/cpuinfo"), processes.device.type == "cuda"
    names = re.findall(r"^model name\s*: (.+)$", cpus.read_text() if cpus.exists() else "", re.MULTILINE)
    processor = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name(processes.device) if cuda else processes.device.type
    numbers = {"threads": torch.get_num_threads(), "processes": processes.world_size}
    return {**numbers, "processor": processor, "device": device, "torch": str(torch.__version__)}


def check_same(stored: Mapping[str, Any], given: Mapping[str, Any], free: frozenset[str]) -> list[str]:
    """Compare the settings of a run with those it is resumed with.

    Args:
        stored: settings in the checkpoint.
        given: settings of this call.
        free: names that may change.

    Returns:
        a line for each setting that did change and may.

    Raises:
        Stop: naming every other setting that changed, with both values.
    """
    changed = {name for name in {*stored, *given} if stored.get(name) != given.get(name)}
    lines = {name: f"{name} was {stored.get(name)!r} and is {given.get(name)!r} now" for name in sorted(changed)}
    refused = [line for name, line in lines.items() if name not in free]
    if refused:
        cure = "; --other-data goes on with other images" if "images" in changed - free else ""
        raise Stop(f"cannot resume with other settings: {'; '.join(refused)}. Use the old ones, or another --output-dir{cure}")
    return list(lines.values())
