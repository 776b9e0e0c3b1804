"""The scripts without the modules, signals and functions that Python lacks on Windows; the rest is as on this system."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import EXAMPLES
from tiny_run import end_of, losses, pretrain, start, wait_for_steps

MODULES = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"]
ATTRIBUTES = {
    signal: "SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGKILL setitimer ITIMER_REAL alarm",
    os: "register_at_fork O_NOFOLLOW O_DIRECTORY O_NONBLOCK pread pwrite setpgid sched_getaffinity sysconf",
}


def hide():
    """Take from this process what Windows lacks, and the modules that have seen it; folders cannot be opened."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("engine", "tasks", "filelock")]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(MODULES))
    for module, names in ATTRIBUTES.items():
        for name in names.split():
            delattr(module, name)
    shutil._use_fd_functions = False  # chosen when it was imported
    real = os.open

    def open_file(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    os.open = open_file


@pytest.mark.linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_keeps_others_out_and_saves_at_a_signal(images, tmp_path, number):
    arguments = ["--max-steps", 12, "--workers", 0, "--save-every", 1]
    first = start(tmp_path, images, *arguments, patch=hide, fault="slow")
    wait_for_steps(first, tmp_path, 2)
    os.kill(first.pid, signal.SIGSTOP)
    second = pretrain(tmp_path, images, *arguments, "--resume", patch=hide)
    assert second.code == 2 and f"error: run is in use by process {first.pid} on " in second.err
    os.kill(first.pid, number)
    os.kill(first.pid, signal.SIGCONT)
    result, step = first.finish(), end_of(tmp_path)["step"]
    assert result.code == 128 + number and f"stopped after step {step} of 12; step {step} is saved" in result.err
    assert "warning: " not in result.out and step >= 2


@pytest.mark.linux
def test_a_run_to_its_end_gives_the_same_losses(whole, images, tmp_path):
    result = pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0, "--save-every", 5, patch=hide)
    assert result.code == 0 and "warning: " not in result.out, result
    assert losses(tmp_path) == losses(whole) and (tmp_path / "run" / "encoder").is_dir()


IMPORT = """
import importlib, pathlib, sys
import matplotlib.pyplot, timm, torch.distributed, torchvision  # they know by the system's name what it lacks
tests, examples = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = sys.argv[1:]
import test_windows
test_windows.hide()
names = [path.relative_to(examples) for path in examples.rglob("*.py")]
names += [path.relative_to(tests.parent) for path in (tests.parent / "mvmae").rglob("*.py")]
for name in names:
    importlib.import_module(".".join(name.with_suffix("").parts).removesuffix(".__init__"))
print(len(names))
"""


@pytest.mark.linux
def test_every_module_can_be_imported():
    command = [sys.executable, "-c", IMPORT, Path(__file__).parent, EXAMPLES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) > 40, done.stderr


COLLECT = """
import sys
import _pytest.terminal, matplotlib.pyplot, multiprocessing.forkserver, timm, torch.distributed, torchvision, pytest
sys.path.insert(0, sys.argv[1])
import test_windows
del sys.modules["test_windows"]
test_windows.hide()
options = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
sys.exit(pytest.main(["-q", "--collect-only", "-n0", *options, sys.argv[1]]))
"""


@pytest.mark.linux
def test_every_test_can_be_collected():
    done = subprocess.run([sys.executable, "-c", COLLECT, Path(__file__).parent], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout[-3000:] + done.stderr


USED = "|".join(sorted({*MODULES, *(name for names in ATTRIBUTES.values() for name in names.split())} - {"sched_getaffinity"}))


def test_a_test_that_names_what_windows_lacks_is_marked():
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text()
        tests = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        for test in tests if path != Path(__file__) else ():
            used = re.findall(rf"\b(?:signal|os)\.(?:{USED})\b|import (?:{USED})\b", ast.get_source_segment(text, test))
            marks = {ast.unparse(mark) for mark in test.decorator_list}
            assert not used or marks & {"pytest.mark.posix", "pytest.mark.linux"}, f"{path.name}: {test.name} uses {used}"
