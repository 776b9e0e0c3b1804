"""What all tests share: one thread, no network, a seeded generator, a tiny ViT, two processes."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read at import, here and in the processes that tests start. To go online: HF_HUB_OFFLINE=0 pytest -m network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)
if "MVMAE_START_METHOD" in os.environ:  # how loaders start their workers: spawn, as on macOS and Windows
    multiprocessing.set_start_method(os.environ["MVMAE_START_METHOD"], force=True)


MISSING = {
    "cuda": ("no CUDA device", not torch.cuda.is_available()),
    "posix": ("Windows lacks the signals, modules or file modes that this test uses", sys.platform == "win32"),
    "linux": ("/proc, /dev/shm, /dev/full or a limit of Linux is not there", sys.platform != "linux"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a device or a system that is not here."""
    for item in items:
        for marker, (reason, missing) in MISSING.items():
            if missing and item.get_closest_marker(marker):  # not a keyword: a folder may be called cuda
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_vit() -> Callable[..., Any]:
    """Builds timm's ViT with 32 x 32 pixels, 16 patches, width 48 and 2 blocks; keywords go to timm."""

    import timm  # here, since every process that a test starts imports this file

    def build(**kwargs: Any) -> Any:
        tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
        return timm.create_model("vit_tiny_patch16_224", **(tiny | kwargs))

    return build


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 images, only to be read; one for each process of pytest."""
    from tiny_run import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def one_bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of black images and one, 7.png, whose normalised pixels overflow with mean 0 and deviation 1e-30; to be read."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("bright")
    for i in range(32):
        Image.new("RGB", (48, 40), (255, 255, 255) if i == 7 else (0, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A folder in which `pretrain` took `STEPS` of `tiny_run` in one go, only to be read: run, and printed.txt."""
    from tiny_run import STEPS, pretrain

    folder = tmp_path_factory.mktemp("whole")
    printed = folder / "printed.txt"
    assert pretrain(folder, images, *STEPS, terminal=printed).code == 0, printed.read_text()
    return folder


@pytest.fixture
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs `fn(*args)` in two gloo processes: `two_processes(fn, *args)` gives `[result of rank 0, of rank 1]`.

    `fn` stands at the top level of a test file and finds its rank by `torch.distributed.get_rank()`; arguments and
    results are pickled. The traceback of the process that failed first is raised here; after `timeout` seconds both end.
    """

    from running import _context as context  # its processes start from a server that has imported torch

    def run(fn: Callable[..., Any], *args: Any, timeout: float = 900) -> list[Any]:
        folder = tmp_path_factory.mktemp("two_processes")
        processes = [context.Process(target=_process, args=(rank, folder, fn, args), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(folder.glob("error*")):
                    break
                time.sleep(0.02)
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError(f"in process {errors[0].name[-1]} of 2:\n{errors[0].read_text()}")
        if late:
            raise TimeoutError(f"{fn.__name__} still ran after {timeout} s in process {late}")
        codes = [process.exitcode for process in processes]
        if codes != [0, 0]:
            raise RuntimeError(f"{fn.__name__}: the processes ended with {codes}")
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(2)]

    return run


def _process(rank: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        torch.save(fn(*args), folder / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # a process that had sharded by FSDP once aborted in its orderly exit, all done
    except BaseException:
        (folder / f"unfinished{rank}").write_text(traceback.format_exc())
        (folder / f"unfinished{rank}").rename(folder / f"error{rank}")
        os._exit(1)  # without waiting for the other process
