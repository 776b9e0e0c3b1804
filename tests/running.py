"""Runs the scripts of examples/ in processes of their own, which start from a server that has imported torch.

``python tests/running.py FAULT SCRIPT ...`` runs a script with a fault, for a launcher that starts commands.
"""

import atexit
import contextlib
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).parent.parent / "examples"
_server = "forkserver" in multiprocessing.get_all_start_methods()  # Windows has none
_context = multiprocessing.get_context("forkserver" if _server else "spawn")
if _server:
    _context.set_forkserver_preload(["torch", "timm", "torchvision", "mvmae", "matplotlib.pyplot"])


class Finished(NamedTuple):
    """How a script ended; a negative code is the signal that ended it."""

    code: int
    out: str
    err: str


class Started:
    """A script that runs, with what it prints in files; ``patch`` is a function of a test file that it calls first.

    ``fault`` is what befalls it, as `inject` has it.
    """

    def __init__(self, script, arguments, folder, env=None, terminal=None, patch=None, fault=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [self.folder / f"{os.getpid()}-{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
        self.files = [Path(terminal)] * 2 if terminal else names
        arguments = [str(EXAMPLES / script), *map(str, arguments)]
        self.process = _context.Process(
            target=_run, args=(arguments, str(folder), env or {}, list(map(str, self.files)), patch, fault)
        )
        self.process.start()
        self.pid = self.process.pid

    def finish(self, timeout=900):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"the script still ran after {timeout} s: {self.texts()}")
        return Finished(self.process.exitcode, *self.texts())

    def texts(self):
        texts = [file.read_text() if file.is_file() else "" for file in self.files]
        return [re.sub(r"^\[Gloo\].*\n", "", text, flags=re.MULTILINE) for text in texts]  # of torch 2.10


def run_script(script, *arguments, folder, timeout=900, **options):
    """Run ``examples/<script>`` in ``folder`` to its end; ``options`` are those of `Started`."""
    return Started(script, arguments, folder, **options).finish(timeout)


def run_processes(script, *arguments, folder, count=2, timeout=900, faults=(), folders=(), patch=None, env=None):
    """Run a script as torchrun would, in ``count`` processes that find each other on this machine, each in its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        given = {key: str(value) for key, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()} | (env or {})
        fault = faults[rank] if faults else None
        started.append(Started(script, arguments, folders[rank] if folders else folder, given, patch=patch, fault=fault))
    return [process.finish(timeout) for process in started]


def torchrun(script, *arguments, folder, fault=None, options=(), env=None):
    """Start two processes of a script under the real torchrun, in a group of their own; they print to printed.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options]
    command += [__file__, fault or "", EXAMPLES / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with (Path(folder) / "printed.txt").open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def wait_until(true, seconds=300):
    """Wait for something that comes true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def processes_under(folder):
    """Those that run in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found


def without_clock(records):
    """Lines of ``log.jsonl`` without the numbers that no two runs share."""
    from engine.log import CLOCK

    return [{name: value for name, value in record.items() if name not in CLOCK} for record in records]


def after_each_step(act):
    """Call ``act(step)`` in this process when a step is whole and its checkpoint, where one is due, is written."""
    from engine.checkpoint import Checkpoint

    advance = Checkpoint.advance

    def advance_and_act(checkpoint, step, last, save_every):
        advance(checkpoint, step, last, save_every)
        act(step)

    Checkpoint.advance = advance_and_act


def inject(fault):
    """Let a fault befall this process: ``kill@STEP``, ``raise@STEP``, ``exit@STEP``, ``long@STEP``, or ``slow`` at each step.

    Under torchrun in the first start alone, but for ``slow``.
    """
    name, _, when = fault.partition("@")

    def act(step):
        if name == "slow":  # time to send a signal
            time.sleep(0.3)
        if when != str(step) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if name == "long":
            time.sleep(60)
        if name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "raise":
            raise MemoryError("no room for a step")
        if name == "exit":
            os._exit(3)

    after_each_step(act)


def _run(arguments, folder, env, files, patch, fault):
    os.environ.update(env, PYTHONWARNINGS="default")
    os.chdir(folder)
    for number, file in zip((1, 2), files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal: a shell's background job ignores Ctrl-C
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    multiprocessing.set_start_method(os.environ.get("MVMAE_START_METHOD"), force=True)  # None: as the script would alone
    sys.argv = arguments
    sys.path.insert(0, str(EXAMPLES))
    code = 0
    try:
        import torch

        torch.set_num_threads(1)
        if patch is not None:
            patch()
        if fault is not None:
            inject(fault)
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    fault, *sys.argv = sys.argv[1:]
    sys.path[0] = str(EXAMPLES)
    if fault:
        inject(fault)
    runpy.run_path(sys.argv[0], run_name="__main__")
