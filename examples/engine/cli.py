"""The command line of a script: its options, declared as one dataclass, and what runs its ``main`` and tells how that ended."""

import argparse
import dataclasses
import difflib
import inspect
import math
import operator
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from engine.ends import Stop, end_process
from engine.log import open_outputs, printable
from mvmae.data import explain_loader_error

Config = TypeVar("Config")
LOST = ("peer", "gloo", "nccl", "socket", "tcpstore")
"""Words of torch's errors where another process has ended."""
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "of at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}
LARGEST = 2**31
"""Numbers stay below it where an option has no upper bound of its own."""


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


def within_cores(config: Config) -> Config:
    """Take no more loading processes than the machine has processor cores, and say so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked: int = getattr(config, "workers", 0)
    if asked <= cores:
        return config
    if os.environ.get("RANK", "0") == "0":
        print(f"--workers {asked}: {cores} load images, one for each processor core of this machine", flush=True)
    return dataclasses.replace(config, workers=cores)  # type: ignore[type-var]


def option(
    default: Any,
    text: str,
    choices: Iterable[Any] = (),
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    lengths: tuple[int, ...] = (),
    path: bool = False,
    belongs_to: str = "",
    may_change: bool = False,
) -> Any:
    """Declare a field of a script's dataclass.

    Args:
        default: its value where neither the user nor the preset says another; `dataclasses.MISSING` asks the user for one.
        text: its line in ``--help``.
        choices: the values that it may have.
        at_least: smallest value of a number, or of each of several.
        above: what each number is greater than.
        at_most: largest value.
        below: what each number is less than.
        lengths: how many values a tuple may have; any number, from one on, where empty. (2,) is a range: low, then high.
        path: the value is a path, or a model's name that may be one: ``~`` is the user's home.
        belongs_to: name of another option: what a preset says here goes with what it says there, and not with anything else.
        may_change: a run that goes on may have another value than it began with.
    """
    limits = dict(zip(BOUNDS, (at_least, above, at_most, below), strict=True))
    bounds = {word: limit for word, limit in limits.items() if limit is not None}
    about = {"help": text, "choices": tuple(choices), "bounds": bounds, "lengths": lengths, "path": path}
    about |= {"belongs_to": belongs_to, "may_change": may_change}
    return dataclasses.field(default=default, metadata=about)


def inherit(config: type[Any], name: str, default: Any, text: str = "") -> Any:
    """Declare an option as another dataclass does, with a default of its own, and a help text of its own where one is given."""
    about = config.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata={**about, "help": text or about["help"]})


def changeable(config: type[Any]) -> frozenset[str]:
    """Return the names of the options that a run that goes on may have otherwise."""
    return frozenset(field.name for field in dataclasses.fields(config) if field.metadata["may_change"])


def parse(
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    about: str | None,
    arguments: list[str] | None = None,
) -> Config:
    """Read the command line: a dataclass gives the options, a preset other defaults, and what is typed wins.

    Raises:
        ValueError: in one line, if an option is unknown or missing, or its value is not one that it may have.
    """
    chooser = _Parser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="set of defaults")
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = presets[chooser.parse_known_args(arguments)[0].preset]
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    defaults = {name: preset.get(name, field.default) for name, field in fields.items()}
    needed = "".join(f" {flag(name)} ..." for name, value in defaults.items() if value is dataclasses.MISSING)
    parser = _Parser(
        description=about,
        usage=f"%(prog)s{needed} [options]",
        parents=[chooser],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config)
    for name in sorted(fields, key=lambda name: (defaults[name] is not dataclasses.MISSING, _generation(config, name))):
        parser.add_argument(flag(name), **_settings(fields[name], hints[name], defaults[name]))
    known, unknown = parser.parse_known_args(arguments)
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items() if name in fields}
    if unknown:
        raise ValueError(_unknown(unknown[0], ["--preset", *map(flag, fields)]))
    for name, value in typed.items():
        if value == ():  # what argparse makes of --option=--
            raise ValueError(f"{flag(name)}: a value is expected, got '--'")
        _check_length(flag(name), value, fields[name].metadata["lengths"])
    for name, field in fields.items():
        owner = field.metadata["belongs_to"]
        if owner in typed and typed[owner] != defaults[owner]:
            defaults[name] = field.default
    values = defaults | typed
    if missing := [flag(name) for name, value in values.items() if value is dataclasses.MISSING]:
        raise ValueError(f"{' and '.join(missing)} must be given; --help lists all options")
    return config(**values)


def flag(name: str) -> str:
    """Give what is typed for a field."""
    return "--" + name.replace("_", "-")


def _generation(config: type[Any], name: str) -> int:
    """Return how far up the dataclass stands that declares an option first: those of all scripts come last in ``--help``."""
    return max(number for number, part in enumerate(config.__mro__) if name in inspect.get_annotations(part))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(" ".join(message.removeprefix("argument ").split()))


def _settings(field: "dataclasses.Field[Any]", hint: Any, default: Any) -> dict[str, Any]:
    """Give what argparse takes for a field."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": _help(field, "yes" if default else "no")}
    several, about = typing.get_origin(hint) is tuple, field.metadata
    kind = typing.get_args(hint)[0] if several else hint
    shown = default if isinstance(default, tuple) else () if default in ("", dataclasses.MISSING) else (default,)
    settings = {"type": _reader(kind, about), "help": _help(field, " ".join(map(str, shown)))}
    settings |= {"metavar": "N" if kind is int else "X"} if kind in (int, float, float | str) else {}
    settings |= {"choices": about["choices"]} if about["choices"] else {}
    return settings | ({"nargs": "+"} | ({"metavar": "NAME"} if about["choices"] else {}) if several else {})


def _help(field: "dataclasses.Field[Any]", default: str) -> str:
    about, bounds, pair = field.metadata, field.metadata["bounds"], field.metadata["lengths"] == (2,)
    notes = {
        "low and high": pair,
        f"some of {', '.join(map(str, about['choices']))}": about["choices"] and isinstance(field.default, tuple),
        _range(bounds).removeprefix("of "): bounds.keys() - {"of at least"} or bounds.get("of at least"),
        f"default: {default}": default,
    }
    shown = "; ".join(note for note, wanted in notes.items() if wanted)
    text: str = about["help"] + (f" ({shown})" if shown else "")
    return text.replace("%", "%%")


def _range(bounds: Mapping[str, float]) -> str:
    return " and ".join(f"{word} {limit:.12g}" for word, limit in bounds.items())


def _reader(kind: Any, about: Mapping[str, Any]) -> Callable[[str], Any]:
    """Give the one place where a value is read, and held against the range of its option."""
    bounds: dict[str, float] = about["bounds"]
    if not {"at most", "below"} & bounds.keys():
        bounds = bounds | {"below": LARGEST}

    def read(text: str) -> Any:
        if kind is str:
            return expand_home(text) if about["path"] else text
        value: Any
        try:
            value = int(text) if kind is int else float(text)
        except ValueError:
            value = text if kind == float | str else math.nan
        if isinstance(value, str) or (math.isfinite(value) and all(BOUNDS[word](value, bounds[word]) for word in bounds)):
            return value
        stated = bounds if value >= LARGEST else about["bounds"]
        expected = f"a {'whole' if kind is int else 'finite'} number {_range(stated)}".strip()
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return read


def expand_home(text: str) -> str:
    """Put the user's home in the place of ``~`` in a path, also behind ``random:`` or ``local-dir:``.

    Raises:
        ArgumentTypeError: if there is no such user.
    """
    start = len(text) - len(text.removeprefix("random:").removeprefix("local-dir:"))
    if not text[start:].startswith("~"):
        return text
    try:
        return text[:start] + str(Path(text[start:]).expanduser())
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} names no user's home: ./~... is a path that starts with ~") from error


def _check_length(name: str, value: Any, lengths: tuple[int, ...]) -> None:
    if not lengths:
        return
    shown, wanted = (
        " ".join(map(str, value)),
        "low and high" if lengths == (2,) else " or ".join(map(str, lengths)) + " numbers",
    )
    if len(value) not in lengths or (lengths == (2,) and value[0] > value[1]):
        raise ValueError(f"{name} must be {wanted}, got {shown}")


def _unknown(word: str, known: list[str]) -> str:
    name = word.split("=")[0]
    if not name.startswith("-"):
        return f"{word!r} belongs to no option: --help lists all"
    near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known)
    return f"there is no option {name}: " + (f"did you mean {' or '.join(near)}?" if near else "--help lists all")
