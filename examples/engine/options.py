"""A script's command line: argparse over one dataclass, whose fields hold help text, range and section of each option."""

import argparse
import dataclasses
import difflib
import math
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from engine.distributed import DEVICES
from engine.log import open_outputs
from engine.signals import NOTHING_SAVED, Stop, end_process
from engine.trackers import TRACKERS
from mvmae.data import DataError
from mvmae.weights import first_line

Config = TypeVar("Config")
Presets = Mapping[str, Mapping[str, Any]]
REQUIRED = dataclasses.MISSING
MOST_USED = "Most used"
"""Title of the first section of ``--help``, which holds `COMMON`, whatever their own sections."""
COMMON = ["data", "encoder", "model", "models", "run", "image_size", "output_dir", "resume"]
COMMON += ["epochs", "minutes", "batch_size", "base_lr", "workers"]
SECTIONS = [MOST_USED, "Data", "Run", "Length", "Method", "Model", "Optimizer", "Evaluation", "Pictures", "Upload", "Speed"]
BOUNDS: dict[str, Any] = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
LARGEST = 2**31
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Cores that this process may use: by default there are no more ``--workers``, which would only make each other slower."""
MEMORY = "the memory is used up ({}): use a smaller model, a smaller --batch-size, or fewer --workers"
LOST = ("peer", "gloo", "nccl", "socket", "tcpstore")  # words in torch's errors when another process has ended


def option(
    default: Any,
    text: str,
    choices: Iterable[Any] = (),
    *,
    lengths: tuple[int, ...] = (),
    path: bool = False,
    may_change: bool = False,
    section: str = "",
    **bounds: float,
) -> Any:
    """Declare a field of a script's dataclass.

    Args:
        default: value if neither the user nor the preset sets one; with `REQUIRED` one of them has to.
        text: line of ``--help``: what the option is, with its unit, what 0 or nothing means, and the default's source.
        choices: values that are allowed; any if empty.
        lengths: numbers of values that a tuple may have; any from 1 on if empty. (2,) is a range: low, then high.
        path: whether the value may be a path: a ``~`` at its start is the user's home.
        may_change: whether ``--resume`` accepts another value than the run began with.
        section: one of `SECTIONS`, of this option and those after it.
        bounds: of the number, or of each number of a tuple, by the names in `BOUNDS`; without an upper one it is `LARGEST`.
    """
    about = {"help": text, "choices": tuple(choices), "bounds": bounds, "lengths": lengths, "path": path}
    return dataclasses.field(default=default, metadata={**about, "may_change": may_change, "section": section})


def redefine(config: type[Any], name: str, default: Any, text: str = "") -> Any:
    """Declare an option of another dataclass again, with another default, and another help text if one is given."""
    field = config.__dataclass_fields__[name]
    text = text or sourced(field.metadata["help"], field.default, default)
    return dataclasses.field(default=default, metadata={**field.metadata, "help": text})


def sourced(text: str, default: Any, other: Any) -> str:
    """Return a help text, in whose brackets at the end, such as (paper), the value of that source stands beside another one."""
    source = text.rpartition("(")[2]
    if not text.endswith(")") or ":" in source or other == default or default in ("", (), None, REQUIRED):
        return text
    return f"{text[:-1]}: {shown(default)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of every script that trains; a script's own dataclass adds what it trains."""

    output_dir: str = option(
        REQUIRED, "folder of the run: log, checkpoints, results", path=True, may_change=True, section="Run"
    )
    resume: bool = option(False, "continue from the newest checkpoint in the output folder, if there is one", may_change=True)
    seed: int = option(0, "seed of weights, order of images, augmentation and masks", at_least=0)
    save_every: int = option(1000, "steps between two checkpoints; 15 minutes make one due too", at_least=1, may_change=True)
    log_every: int = option(20, "steps between two lines of the log", at_least=1, may_change=True)
    tracker: tuple[str, ...] = option((), "trackers that also get numbers, options and pictures", TRACKERS, may_change=True)
    max_steps: int = option(
        0, "stop after this many steps, for tests; 0: at the end; for a shorter run use --epochs", at_least=0, may_change=True
    )
    device: str = option("auto", "device; auto: CUDA if there is one, else CPU", DEVICES, may_change=True, section="Speed")
    precision: str = option("auto", "precision; auto: bf16 autocast on CUDA, float32 elsewhere", ["auto", "bf16", "float32"])
    workers: int = option(
        8,
        "processes that load images, for each training process; 0: the training process; by default at most one a core",
        at_least=0,
        at_most=1024,
        may_change=True,
    )


def changeable(config: type[Any]) -> frozenset[str]:
    """Return the names of the options that may change when a run is resumed."""
    return frozenset(field.name for field in dataclasses.fields(config) if field.metadata.get("may_change"))


def run(main: Callable[[Config], None], config: type[Config], presets: Presets, about: str | None) -> None:
    """Parse the command line into ``config``, call ``main``, and turn an error into one line and an exit code."""
    open_outputs()
    try:
        main(parse(config, presets, about))
    except KeyboardInterrupt as error:
        _end(NOTHING_SAVED, 128 + (error.args[0] if error.args else signal.SIGINT))
    except (MemoryError, torch.OutOfMemoryError) as error:
        _end(MEMORY.format(first_line(error)), 1)
    except (Stop, ValueError, TypeError, OSError, ImportError) as error:
        _end(str(error), error.code if isinstance(error, Stop) else 2)
    except RuntimeError as error:
        if isinstance(error, DataError):
            _end(str(error), 1)
        if "DefaultCPUAllocator" in str(error):  # how torch says that memory of the processor's is used up
            _end(MEMORY.format(first_line(error)), 1)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            _end(f"--compile does not work here ({first_line(error)}): leave it out", 1)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(word in str(error).lower() for word in LOST):
            raise
        _end(f"another process of this run has ended, see its message; --resume continues ({first_line(error)})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(message: str, code: int) -> None:
    if os.environ.get("MVMAE_TRACEBACK"):  # for finding mistakes of these scripts
        raise
    print(" ".join((message if code > 128 else f"error: {message}").splitlines()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    end_process(code)


def parse(config: type[Config], presets: Presets, about: str | None, arguments: list[str] | None = None) -> Config:
    """Read the command line: a dataclass declares the options, a preset sets other defaults, and what the user types wins.

    Args:
        config: a dataclass whose fields are declared by `option`; fields without one are no options.
        presets: values of some options by the name of the preset, with ``"help"``, a line on what it is for; the first is the
            default. If there are none, there is no ``--preset``.
        about: text of ``--help`` before the options.
        arguments: words of the command line; if None, those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    fields = {field.name: field for field in dataclasses.fields(config) if field.metadata}  # type: ignore[arg-type]
    chooser = _Parser(add_help=False, allow_abbrev=False)
    if presets:
        kinds = "; ".join(f"{name}: {preset['help']}" for name, preset in presets.items())
        text = f"set of defaults, shown by --preset NAME --help; {kinds} [default: {next(iter(presets))}]"
        chooser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), metavar="NAME", help=text)
    preset = dict(presets.get(getattr(chooser.parse_known_args(arguments)[0], "preset", ""), {}))
    preset.pop("help", None)
    defaults = {name: preset.get(name, field.default) for name, field in fields.items()}
    if "workers" in defaults:
        defaults["workers"] = min(defaults["workers"], CORES)
    known, unknown = _parser(fields, defaults, chooser, about).parse_known_args(arguments)
    if unknown:
        options, problems = [*(["--preset"] if presets else []), *map(flag, fields)], []
        for name in [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]:
            near = [one for one in options if one.startswith(name)] or difflib.get_close_matches(name, options)
            cure = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
            problems.append(f"there is no option {name}: {cure}")
        raise ValueError(" ".join(problems))
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items() if name in fields}
    for name, value in typed.items():
        lengths = fields[name].metadata["lengths"]
        if lengths and len(value) not in lengths:
            raise ValueError(f"{flag(name)} must be {' or '.join(map(str, lengths))} values, got {len(value)}")
        if lengths == (2,) and value[0] > value[1]:
            raise ValueError(f"{flag(name)} must be two numbers, low and high, got {shown(value)}")
    for name in ("epochs", "steps"):
        if typed.get("minutes") and typed.get(name):
            raise ValueError(f"the length is given twice, by --minutes and {flag(name)}: leave one out")
    for name in ("encoder", "model"):  # a preset's arguments are for its own model
        if typed.get(name, preset.get(name)) != preset.get(name) and f"{name}_args" in preset:
            defaults[f"{name}_args"] = ""
    values = {**preset, **defaults, **typed}
    if missing := [flag(name) for name, value in values.items() if value is REQUIRED]:
        raise ValueError(f"{' and '.join(missing)} must be given; --help lists all options")
    return config(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(" ".join(message.removeprefix("argument ").split()))


def flag(name: str) -> str:
    """Return what a user types for a field."""
    return "--" + name.replace("_", "-")


def _parser(fields: Mapping[str, Any], defaults: Mapping[str, Any], chooser: _Parser, about: str | None) -> _Parser:
    """Build the parser of a script, with its options in sections."""
    needed = [f"{flag(name)} ..." for name, value in defaults.items() if value is REQUIRED]
    parser = _Parser(
        parents=[chooser],
        description=about,
        usage=" ".join(["%(prog)s", *needed, "[options]"]),
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    sections: dict[str, list[str]] = {MOST_USED: [name for name in COMMON if name in fields]}
    section = SECTIONS[1]
    for name, field in fields.items():  # an option that is declared again below keeps its place
        section = field.metadata["section"] or section
        if name not in COMMON:
            sections.setdefault(section, []).append(name)
    for section in sorted(sections, key=SECTIONS.index):
        group = parser.add_argument_group(section)
        for name in sections[section]:
            group.add_argument(flag(name), **_argument(fields[name], defaults[name]))
    return parser


def _argument(field: "dataclasses.Field[Any]", default: Any) -> dict[str, Any]:
    """Return what argparse takes for a field."""
    about, several, types = field.metadata, typing.get_origin(field.type) is tuple, _types(field.type)
    notes = [f"any of {', '.join(about['choices'])}"] if about["choices"] and several else []
    notes += [stated(about["bounds"])] if about["bounds"] not in ({}, {"at_least": 0}) else []
    notes += [f"default: {shown(default)}"] if default not in ("", (), None, REQUIRED) else []
    text = sourced(about["help"], field.default, default) + (f" [{'; '.join(notes)}]" if notes else "")
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if field.type is bool:
        return settings | {"action": argparse.BooleanOptionalAction}
    if about["choices"]:
        settings |= {"choices": about["choices"], "metavar": "NAME" if several else None}
    elif types & {int, float}:
        settings |= {"type": partial(_number, types=types, bounds=about["bounds"]), "metavar": "N" if int in types else "X"}
    else:
        settings |= {"type": os.path.expanduser if about["path"] else str, "metavar": field.name.rpartition("_")[2].upper()}
    if about["lengths"] == (2,):
        return settings | {"nargs": 2, "metavar": ("LOW", "HIGH")}
    return settings | ({"nargs": "+"} if several else {})


def _types(hint: Any) -> set[Any]:
    """Return the types in a hint: float and str of ``tuple[float | str, ...]``."""
    return {hint}.union(*map(_types, typing.get_args(hint)))


def _number(text: str, *, types: set[Any], bounds: Mapping[str, float]) -> float | str:
    """Read a number and hold it against the range of its option."""
    try:
        value: float = int(text) if int in types else float(text)
    except ValueError:
        if str in types:
            return text
        value = math.nan
    bounds = bounds if {"at_most", "below"} & bounds.keys() else {**bounds, "below": LARGEST}
    if abs(value) < math.inf and all(BOUNDS[name](value, limit) for name, limit in bounds.items()):
        return value
    expected = f"a {'whole' if int in types else 'finite'} number {stated(bounds)}"
    raise argparse.ArgumentTypeError(f"must be {expected}, got {text[:40]!r}")


def stated(bounds: Mapping[str, float]) -> str:
    """Return the range of a number in words."""
    return " and ".join(f"{name.replace('_', ' ')} {limit:.12g}" for name, limit in bounds.items())


def shown(value: Any) -> str:
    """Return a value as a user types it: 1 for 1.0, words for a tuple, yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{one:.12g}" if isinstance(one, float) else shlex.quote(str(one)) for one in values)


class _Formatter(argparse.HelpFormatter):
    """Wraps text between words, and leaves indented lines, which are commands and what they print, as they are."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns - 2, 120))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return re.sub(r"(?m)^\S.*(?:\n\S.*)*", lambda lines: "\n".join(self._split_lines(lines[0], width)), text)
