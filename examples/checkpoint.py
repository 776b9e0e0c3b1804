"""State of a run on the disk: written whole or not at all, checked when read, the one before kept."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import socket
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from common import Stop

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
PARTS = frozenset({"step", "settings", "optimizer"})
_locked: list[IO[str]] = []


class SaveError(Exception):
    """Why a checkpoint could not be written."""


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``checkpoint.pt``, keeping the one before as ``checkpoint-previous.pt``.

    Written beside, brought to the disk, then renamed: whatever ends the process, one of the two is whole.

    Args:
        folder: the run's folder.
        state: tensors, numbers, strings, lists and dictionaries of them.

    Raises:
        SaveError: if it cannot be written, such as to a full disk; what was there is there still.
    """
    newest, unfinished = folder / NEWEST, folder / (NEWEST + ".unfinished")
    try:
        with unfinished.open("wb") as file:
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
        raise SaveError(f"cannot write {newest}: {reason}, {_free_space(folder)}") from error


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free >> 20} MB are free"
    except OSError as error:
        return str(error)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text, whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, parts: frozenset[str] = frozenset()) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole and holds these parts; None where the folder holds none at all.

    Raises:
        Stop: if there are checkpoints, and none of them is whole.
    """
    found = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    reasons = []
    for path in found:
        try:
            return read_checkpoint(path, parts)
        except ValueError as error:
            reasons.append(str(error))
            print(f"warning: {error}", file=sys.stderr, flush=True)
    if found:
        raise Stop(f"no checkpoint in {folder} can be read: {'; '.join(reasons)}")
    return None


def read_checkpoint(path: Path, parts: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read one checkpoint: every byte of it is checked against its checksum, and no code in it is run.

    Raises:
        ValueError: naming the file, if it is damaged, holds more than tensors and plain values, or lacks a part.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, and is not opened: it could run code") from error
    except Exception as error:  # what torch makes of damaged bytes can be anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged or cut short: {reason}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum of {damaged!r}")
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: a dictionary is expected, it holds {type(state).__name__}")
    if missing := parts - {key for key in state if isinstance(key, str)}:
        raise ValueError(f"{path} is not the checkpoint of a run: it holds no {', '.join(sorted(missing))}")
    return state


def open_run(
    folder: Path, settings: Mapping[str, Any], may_change: frozenset[str], *, resume: bool, first: bool = True
) -> dict[str, Any] | None:
    """Make a run's folder with its ``config.json``, or find the checkpoint to go on from.

    Args:
        folder: the run's folder.
        settings: what the run depends on, as plain values.
        may_change: names of settings that a resumed run may have otherwise.
        resume: go on from the newest checkpoint, if there is one.
        first: whether this process may write and print: one of all.

    Returns:
        the checkpoint, or None for a new run.

    Raises:
        Stop: if the folder is in use, cannot be written to, or holds a run that is not to be resumed or cannot be.
    """
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
        except OSError as error:
            raise Stop(f"cannot write to the output folder {folder}: {error.strerror}") from error
    state = load_checkpoint(folder, PARTS)
    if state is not None and not resume:
        raise Stop(f"{folder} holds a run already: add --resume to go on with it, or choose another --output-dir")
    changed = check_same(state["settings"], settings, may_change) if state else []
    if first:
        try:
            write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise Stop(f"cannot write to the output folder {folder}: {error.strerror}") from error
        if state:
            print(f"resuming {folder} after step {state['step']}" + "".join(f"; {line}" for line in changed), flush=True)
        elif resume:
            print(f"no checkpoint in {folder}: starting at step 0", flush=True)
    return state


def lock(folder: Path) -> None:
    """Keep other runs out of a folder while this process lives; the lock ends with the process, however that ends.

    Raises:
        Stop: if another process holds it, with its number and its machine.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise Stop(f"{folder} is in use by {file.read().strip() or 'another process'}: choose another --output-dir") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locked.append(file)


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
        raise Stop(f"cannot resume with other settings: {'; '.join(refused)}. Use the old ones, or another --output-dir")
    return list(lines.values())
