"""What every script needs and no method knows: arguments, processes, schedule, log, pictures of a run, how a run stops."""

import argparse
import ast
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
import torch.distributed as dist
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

Config = TypeVar("Config")


class Stop(Exception):
    """The end of a script that is not a success: one line for the user and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def option(default: Any, text: str, choices: Iterable[Any] = ()) -> Any:
    """Declare a field of a script's dataclass: its default, its line in ``--help``, and the values that it may have."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": tuple(choices)})


def run(
    main: Callable[[Config], None], config: type[Config], presets: Mapping[str, Mapping[str, Any]], about: str | None
) -> None:
    """Parse the command line into ``config``, run ``main``, and turn what goes wrong into one line and an exit code."""
    try:
        main(parse(config, presets, about))
    except (Stop, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("MVMAE_TRACEBACK"):  # a mistake of ours rather than of the user's is found more easily so
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        # no clean-up of threads and process groups: after an error they could wait for other processes for ever
        sys.stdout.flush()
        os._exit(error.code if isinstance(error, Stop) else 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    about: str | None,
    arguments: list[str] | None = None,
) -> Config:
    """Read the command line: a dataclass gives the options, a preset other defaults, and what is typed wins."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="set of defaults")
    known, _ = parser.parse_known_args([a for a in (arguments or sys.argv[1:]) if a not in ("-h", "--help")])
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        default = presets[known.preset].get(field.name, field.default)
        settings: dict[str, Any] = {"default": default, "required": default is dataclasses.MISSING}
        settings["help"] = field.metadata["help"] + ("" if settings["required"] else f" (default: {default})")
        kind = hints[field.name]
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
            settings["help"] = field.metadata["help"]
        elif typing.get_origin(kind) is tuple:
            settings |= {"type": _reader(typing.get_args(kind)[0]), "nargs": "+"}
        else:
            settings["type"] = _without_none(kind)
        if field.metadata["choices"]:
            settings["choices"] = field.metadata["choices"]
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(arguments))
    values.pop("preset")
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _reader(kind: Any) -> Any:
    return _number_or_word if kind == float | str else kind


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def create_encoder(name: str, arguments: str = "", **options: Any) -> nn.Module:
    """Build any model that timm knows.

    Args:
        name: of timm, or with ``hf-hub:`` or ``local-dir:`` in front.
        arguments: more of timm's options, as ``"patch_size=8 embed_dim=128"``.
        options: timm's options.

    Raises:
        Stop: if there is no such model, with near names, or it does not take an argument.
    """
    try:
        typed = {key: ast.literal_eval(value) for key, value in (part.split("=", 1) for part in arguments.split())}
    except (ValueError, SyntaxError) as error:
        raise Stop(f"arguments {arguments!r} are not of the form 'patch_size=8 embed_dim=128'") from error
    known = timm.list_models()
    if ":" not in name and name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise Stop(f"timm has no model {name!r}: " + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"))
    try:
        model: nn.Module = timm.create_model(name, **typed, **options)
    except TypeError as error:
        raise Stop(f"{name} cannot be built so: {error}") from error
    return model


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
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


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


class StopSignal:
    """Catches SIGINT, SIGTERM and SIGUSR1, so that a loop can finish its step and save; a second signal ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    @property
    def exit_code(self) -> int:
        """The exit code of a program that this signal ended; that of SIGTERM where another process received it."""
        return 128 + (self.received or signal.SIGTERM)


def inject_fault(step: int) -> None:
    """Do what ``MVMAE_FAULT`` says, which is how tests cut a run: ``kill@STEP``, or ``slow`` for time to send a signal."""
    name = os.environ.get("MVMAE_FAULT", "")
    if name == f"kill@{step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "slow":
        time.sleep(0.3)


class Log:
    """Writes ``log.jsonl``, a progress bar on a terminal, and plain lines elsewhere; nothing but on rank 0."""

    def __init__(self, folder: Path, rank: int, total: int, start: int = 0) -> None:
        self.path, self.silent, self.bar = folder / "log.jsonl", rank != 0, None
        if self.silent:
            return
        kept = [line for line in self.records() if line.get("step", 0) <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, leave=False)
        self.total, self.step, self.time = total, start, time.monotonic()

    def records(self) -> list[dict[str, Any]]:
        """Read the lines back, without one that was cut in the middle."""
        return list(_json_lines(self.path)) if self.path.exists() else []

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, **record: Any) -> None:
        """Add one line; numbers only, except for names."""
        if self.silent:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        line = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
        )
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if not self.silent and self.bar is not None:
            self.bar.close()


class Meter:
    """Means of named numbers over the steps since the last line of the log, kept on the device until then."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.steps = processes, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's numbers, scalars on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if self.steps else value.detach().clone()
        self.steps += 1

    def check(self, step: int) -> None:
        """Stop all processes where a number was not finite in any of them, naming the last, most particular one."""
        for name in reversed(self.sums):
            if self.processes.any(not bool(self.sums[name].isfinite())):
                raise Stop(f"{name} is not finite at step {step}; the last checkpoint is from before", code=1)

    def means(self, step: int) -> dict[str, float]:
        """Give the mean of each over steps and processes, and start again."""
        self.check(step)
        names, sums = list(self.sums), torch.stack(list(self.sums.values()))
        values = (self.processes.mean(sums) / self.steps).tolist()
        self.sums, self.steps = {}, 0
        return dict(zip(names, values, strict=True))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def draw_curves(path: Path, records: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Draw numbers of ``log.jsonl`` over the step, a panel for each name that occurs, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(records)
    names = [name for name in names if any(name in record for record in records)]
    columns = min(3, max(len(names), 1))
    figure, axes = plt.subplots(math.ceil(max(len(names), 1) / columns), columns, figsize=(4.2 * columns, 3.2), squeeze=False)
    figure.set_figheight(3.0 * len(axes))
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else "", markersize=3)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def normalize(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """Turn uint8 images (..., C, H, W) into float32 ones with the given mean and standard deviation, in units of 255."""
    mean, std = (torch.tensor(tuple(x), device=images.device)[:, None, None] for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)
