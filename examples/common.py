"""What every script needs and no method knows: encoders by name, processes, schedule, log, how a script ends."""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
import torch.distributed as dist
from options import option as option
from options import parse as parse
from timm.layers import to_2tuple
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from mvmae.data import explain_loader_error

Config = TypeVar("Config")
Item = TypeVar("Item")
LOST = ("peer", "gloo", "nccl", "socket", "tcpstore")
"""Words of torch's errors where another process has ended."""


class Stop(Exception):
    """The end of a script that is not a success: one line for the user and an exit code, 128 + N after signal N."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def run(
    main: Callable[[Config], None], config: type[Config], presets: Mapping[str, Mapping[str, Any]], about: str | None
) -> None:
    """Parse the command line into ``config``, run ``main``, and turn what goes wrong into one line and an exit code."""
    open_outputs()
    try:
        main(within_cores(parse(config, presets, about)))
    except KeyboardInterrupt as error:
        _end("stopped before the first step", 128 + (error.args[0] if error.args else signal.SIGINT))
    except MemoryError as error:
        _end(f"the memory is used up ({error}): use a smaller --batch-size, or fewer --workers", 1)
    except (Stop, ValueError, TypeError, OSError, ImportError) as error:
        _end(str(error), error.code if isinstance(error, Stop) else 2)
    except RuntimeError as error:
        if reason := explain_loader_error(error):
            _end(reason, 1)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(word in str(error).lower() for word in LOST):
            raise
        _end(f"another process of this run has ended, see its message; --resume goes on ({str(error).splitlines()[0]})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(message: str, code: int) -> None:
    """Print one line and exit."""
    if os.environ.get("MVMAE_TRACEBACK"):  # a mistake of ours rather than of the user's is found more easily so
        raise
    print(printable(message if code > 128 else f"error: {message}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    end_process(code)


def end_process(code: int) -> None:
    """Exit at once, with no clean-up of threads and process groups, which could wait for others for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for the next line
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


class Output:
    """A stream that ends no run: where it cannot be written to, or is closed, what is printed is lost and no more.

    Args:
        stream: standard output or error; None where it is closed.
        raw: let control characters through, for a progress bar. Else they and what the encoding lacks are shown as escapes.
    """

    def __init__(self, stream: Any, *, raw: bool = False) -> None:
        self.stream, self.raw = stream, raw

    def write(self, text: str) -> int:
        """Print a text."""
        with suppress(OSError, ValueError, AttributeError):
            encoding = self.stream.encoding
            shown = text if self.raw else printable(text, keep="\n\t")
            self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Print what is printed so far."""
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_outputs() -> None:
    """Print through `Output` from now on; no file that is opened later takes the place of a closed standard stream."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)


def printable(text: str, keep: str = "") -> str:
    """Show control characters as escapes, which could otherwise change a terminal or forge a line, but for those to keep."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def within_cores(config: Config) -> Config:
    """Take no more loading processes than the machine has processor cores, and say so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked: int = getattr(config, "workers", 0)
    if asked <= cores:
        return config
    if os.environ.get("RANK", "0") == "0":
        print(f"--workers {asked}: {cores} load images, one for each processor core of this machine", flush=True)
    return dataclasses.replace(config, workers=cores)  # type: ignore[type-var]


def create_encoder(name: str, arguments: str = "", **options: Any) -> nn.Module:
    """Build any model that timm knows.

    Args:
        name: of timm, or with ``hf-hub:`` or ``local-dir:`` in front.
        arguments: more of timm's options, as ``"patch_size=8 embed_dim=128"``.
        options: timm's options.

    Raises:
        Stop: if there is no such model, with near names, or it does not take an argument.
    """
    typed = timm_arguments(arguments)
    known = timm.list_models()
    if ":" not in name and name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        cure = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise Stop(f"timm has no model {name!r}, and it is no folder: {cure}")
    try:
        model: nn.Module = timm.create_model(name, **typed, **options)
    except (RuntimeError, OSError):  # weights that cannot be had
        raise
    except Exception as error:  # timm checks few of its arguments
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"it takes no {unknown[1]}" if unknown else f"{type(error).__name__}: {error}".splitlines()[0]
        raise Stop(f"{name} cannot be built{f' with {arguments!r}' if arguments else ''}: {reason}") from error
    return model


def timm_arguments(text: str) -> dict[str, Any]:
    """Read arguments for timm, such as ``"patch_size=8 embed_dim=128"``.

    Raises:
        Stop: if they are not of this form.
    """
    try:
        return {key: ast.literal_eval(value) for key, value in (part.split("=", 1) for part in text.split())}
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise Stop(f"arguments {text!r} are not of the form 'patch_size=8 embed_dim=128'") from error


def summary(model: Any, image_size: int = 0) -> str:
    """Say what a model really is: its architecture, its parameters, the images and patches that it takes.

    Args:
        model: of timm, or a part of one.
        image_size: side in pixels, where it takes other images than those that it was built for.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    patches: Any = getattr(model, "patch_embed", None)
    size = image_size or getattr(patches, "img_size", None) or cfg["input_size"][1:]
    number = sum(parameter.numel() for parameter in model.parameters())
    parts = [cfg.get("architecture", type(model).__name__), f"{number / 1e6:.2f} M parameters"]
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList | nn.Sequential) and hasattr(model, "embed_dim"):
        parts.append(f"{len(blocks)} blocks of width {model.embed_dim}")
    parts.append("images of {}x{} pixels".format(*to_2tuple(size)))
    if hasattr(patches, "patch_size"):
        parts.append("patches of {}x{}".format(*to_2tuple(patches.patch_size)))
    return ", ".join(parts)


class Processes(NamedTuple):
    """This process among all that run the script, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    control: Any

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process: the same answer in all of them, with no wait for the device."""
        if self.control is None:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=self.control)
        return bool(votes)

    def gather(self, item: Item) -> list[Item]:
        """Give the items of all processes to all of them, in the order of the ranks."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size


def start_processes(device: str) -> Processes:
    """Join the processes that torchrun started, if any: nccl on CUDA devices, gloo on the CPU.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.

    Raises:
        Stop: if a CUDA device is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda: torch finds no CUDA device; use --device cpu to run on the processor")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Processes(0, 1, chosen, None)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank, world_size, chosen, dist.new_group(backend="gloo"))


def parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """Wrap a model so that its gradients are averaged over all processes, where there are several."""
    if processes.world_size == 1:
        return model
    wrap, devices = nn.parallel.DistributedDataParallel, [processes.device.index] if processes.device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(wrap).parameters  # torch 2.14's name for it
    kept: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return wrap(model, device_ids=devices, **kept)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute in bf16: ``auto`` does so on CUDA, ``bf16`` everywhere, ``float32`` nowhere."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float = 0.0) -> CosineLRScheduler:
    """Build timm's schedule, a pure function of the step: linear warm-up from 0, then a cosine to ``min_lr`` at ``steps``."""
    warmup_steps = min(warmup_steps, steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup_steps, 2),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class Log:
    """Writes ``log.jsonl``, a progress bar on a terminal, and plain lines elsewhere; nothing but on rank 0."""

    def __init__(self, folder: Path, rank: int, total: int, start: int = 0) -> None:
        self.folder, self.silent, self.bar, self.cut = folder, rank != 0, None, set[str]()
        if self.silent:
            return
        from checkpoint import write_text  # which imports this file

        kept = [record for record in self.records() if record.get("step", 0) <= start]
        write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        stream = getattr(sys.stderr, "stream", sys.stderr)
        if stream is not None and stream.isatty():
            from tqdm import tqdm

            bar: Any = Output(stream, raw=True)
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, leave=False, file=bar)

    def records(self) -> list[dict[str, Any]]:
        """Read the lines back, without those that were cut in the middle."""
        path, found = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [record for record in found if isinstance(record, dict) and isinstance(record.get("step", 0), int)]

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, **record: Any) -> None:
        """Add one line; numbers only, except for names."""
        self.append("log.jsonl", json.dumps(record))
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items())
        self.say("  ".join(shown))

    def append(self, name: str, text: str) -> None:
        """Add lines to a file of the folder; where that fails, say so and go on, and end what was cut at the next time."""
        if self.silent:
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("\n" * (name in self.cut) + text + "\n")
            self.cut.discard(name)
        except OSError as error:
            self.cut.add(name)
            self.say(f"warning: cannot write {self.folder / name}: {error.strerror}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.clear()
        print(printable(line), flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def normalize(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """Turn uint8 images (..., C, H, W) into float32 ones with the given mean and standard deviation, in units of 255."""
    mean, std = (_per_channel(tuple(x), images.device) for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy values to the device, (C, 1, 1): once, since the copy waits for all that the device has still to do."""
    return torch.tensor(values, device=device)[:, None, None]
