"""The folder of a run: created, locked against other runs, and restored if somebody deletes it or its lock."""

import contextlib
import importlib.util
import os
import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from engine.ends import Stop

_held: dict[Path, tuple[int, int]] = {}  # the open folder and the open lock file of each run of this process
_filelocks: dict[Path, Any] = {}  # on Windows, the lock of each run of this process


def take(folder: Path, replaced: Collection[str] = ()) -> None:
    """Make a run's folder and lock it.

    Args:
        folder: the run's.
        replaced: names in it that may be links: a file of a run is put in their place, and never written through them.

    Raises:
        Stop: if it cannot be written to, is in use, or holds a link that could be written through.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_symlink() and path.name not in replaced:
                raise Stop(f"{path} is a link, and what it points to could be overwritten: remove it")
        lock(folder)
    except OSError as error:
        raise Stop(f"cannot write to the output folder {folder}: {error.strerror}") from error


def lock(folder: Path) -> None:
    """Keep other runs out of a folder while this process lives; the lock ends with the process, however that ends.

    Both the folder is locked, which deleting ``.lock`` does not undo, and ``.lock``, which other machines see. On Windows,
    which locks no folders, ``.lock`` is locked alone.

    Raises:
        Stop: if another process holds it, with its number and its machine, which are not known on Windows.
        OSError: if ``.lock`` cannot be written.
    """
    if importlib.util.find_spec("fcntl") is None:
        return _lock_file(folder)
    import fcntl

    _close(_held.pop(folder, ()))
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _held[folder] = os.open(folder, os.O_RDONLY), file
    for lock_one, descriptor in zip((fcntl.flock, fcntl.lockf), _held[folder], strict=True):
        try:
            lock_one(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(file, 500, 0).decode(errors="replace").strip() or "another process"
            _close(_held.pop(folder))
            raise Stop(f"{folder} is in use by {holder}: choose another --output-dir") from error
        except OSError as error:
            if descriptor == file:
                unguarded = f"the file system of {folder} refuses locks ({error.strerror}): start no second run in it"
                print(f"warning: {unguarded}", file=sys.stderr, flush=True)
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _lock_file(folder: Path) -> None:
    """Lock ``.lock`` on Windows, where no process can delete what another has open."""
    from filelock import FileLock, Timeout  # on other systems, two processes can hold its lock where the file is deleted

    try:
        if folder not in _filelocks:
            held = FileLock(folder / ".lock")
            held.acquire(timeout=0)
            _filelocks[folder] = held
    except Timeout as error:
        raise Stop(f"{folder} is in use by another process: choose another --output-dir") from error


def keep(folder: Path) -> None:
    """Restore a folder that this process has locked, and its lock, if they were deleted, which Windows does not allow.

    Raises:
        Stop: if another run has taken the folder meanwhile.
        OSError: if it cannot be made.
    """
    if (held := _held.get(folder)) is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if all(map(os.path.samestat, map(os.fstat, held), map(os.stat, (folder, folder / ".lock")))):
            return
    if not folder.exists():
        print(f"warning: {folder} was deleted and is made again", file=sys.stderr, flush=True)
        folder.mkdir(parents=True)
    lock(folder)


def _close(descriptors: Collection[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _let_go() -> None:
    """Close the inherited files in a loading process, which may outlive this one: the lock ends with this process."""
    for descriptors in _held.values():
        _close(descriptors)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
