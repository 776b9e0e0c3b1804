"""The command line of a script: its options, declared as one dataclass, and the call of its ``main``, whose end it reports."""

import argparse
import dataclasses
import difflib
import math
import operator
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from engine.ends import UNBEGUN, Stop, end_process
from engine.help import INDENT, SECTIONS, about_presets, fill, flag, help_text, metavar, sections, shown, stated_range, width
from engine.log import open_outputs, print_above, printable
from engine.pace import processor_cores
from mvmae.data import explain_loader_error

Config = TypeVar("Config")
LOST = ("peer", "gloo", "nccl", "socket", "tcpstore")
"""Words in torch's errors when another process has ended."""
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "of at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}
LARGEST = 2**31
"""Numbers must be below it if their option has no upper bound of its own."""


def run(
    main: Callable[[Config], None], config: type[Config], presets: Mapping[str, Mapping[str, Any]], about: str | None
) -> None:
    """Parse the command line into ``config``, call ``main``, and turn an error into one line and an exit code."""
    open_outputs()
    try:
        main(within_cores(parse(config, presets, about)))
    except KeyboardInterrupt as error:
        _end(UNBEGUN, 128 + (error.args[0] if error.args else signal.SIGINT))
    except MemoryError as error:
        _end(f"the memory is used up ({error}): use a smaller --batch-size, or fewer --workers", 1)
    except (Stop, ValueError, TypeError, OSError, ImportError) as error:
        _end(str(error), error.code if isinstance(error, Stop) else 2)
    except RuntimeError as error:
        if reason := explain_loader_error(error):
            _end(reason, 1)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(word in str(error).lower() for word in LOST):
            raise
        _end(
            f"another process of this run has ended, see its message; --resume continues ({str(error).splitlines()[0]})",
            1,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(message: str, code: int) -> None:
    """Print one line and exit."""
    if os.environ.get("MVMAE_TRACEBACK"):  # for finding mistakes of these scripts
        raise
    print(printable(message if code > 128 else f"error: {message}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    end_process(code)


def within_cores(config: Config) -> Config:
    """Return the options with no more loading processes than the machine has processor cores.

    If that is fewer, a line above the script's first one says so: not above an error that comes before it.
    """
    cores = processor_cores()
    asked: int = getattr(config, "workers", 0)
    if asked <= cores:
        return config
    if os.environ.get("RANK", "0") == "0":
        print_above(f"--workers {asked} is more than this machine's processor cores: {cores} processes load images")
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
    empty: str = "",
    section: str = "",
) -> Any:
    """Declare a field of a script's dataclass.

    Args:
        default: value if neither the user nor the preset sets one; with `dataclasses.MISSING` one of them has to.
        text: line of ``--help``: what the option is, with its unit and what 0 means. Brackets at its end hold the source of
            the default, such as (paper).
        choices: values that are allowed; any if empty.
        at_least: smallest value of the number, or of each number of a tuple.
        above: number that each value must be greater than.
        at_most: largest value.
        below: number that each value must be less than.
        lengths: numbers of values that a tuple may have; any from 1 on if empty. (2,) is a range: low, then high.
        path: whether the value is a path, or the name of a model that may be one; then ``~`` is the user's home.
        belongs_to: name of another option; the preset's value of this one holds only beside its value of the other.
        may_change: whether ``--resume`` accepts another value than the run began with.
        empty: default that ``--help`` tells where the value is empty.
        section: one of `SECTIONS`, in which ``--help`` lists it and the fields after it, up to the next with a section.
    """
    limits = dict(zip(BOUNDS, (at_least, above, at_most, below), strict=True))
    bounds = {word: limit for word, limit in limits.items() if limit is not None}
    about = {"help": text, "choices": tuple(choices), "bounds": bounds, "lengths": lengths, "path": path}
    about |= {"belongs_to": belongs_to, "may_change": may_change, "empty": empty, "section": section}
    return dataclasses.field(default=default, metadata=about)


def inherit(config: type[Any], name: str, default: Any, text: str = "") -> Any:
    """Declare an option of another dataclass again, with another default, and with another help text if one is given.

    The help text of another default loses the source of the old one.
    """
    field = config.__dataclass_fields__[name]
    known: str = field.metadata["help"]
    known = known.rsplit(" (", 1)[0] if known.endswith(")") and default != field.default else known
    return dataclasses.field(default=default, metadata={**field.metadata, "help": text or known})


def changeable(config: type[Any]) -> frozenset[str]:
    """Return the names of the options that may change when a run is resumed."""
    return frozenset(field.name for field in dataclasses.fields(config) if field.metadata["may_change"])


def parse(
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    about: str | None,
    arguments: list[str] | None = None,
) -> Config:
    """Read the command line: a dataclass declares the options, a preset sets other defaults, and what the user types wins.

    Args:
        config: a dataclass whose fields are declared by `option` or `inherit`.
        presets: values of some options by the name of the preset, with ``"help"``, a line on what it is for. The first is
            the default. If there are none, there is no ``--preset``.
        about: text of ``--help`` before the options.
        arguments: words of the command line; if None, those of this process.

    Raises:
        ValueError: in one line, if an option is unknown or missing, or its value is not allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    chooser = _Parser(add_help=False, allow_abbrev=False)
    _add_preset(chooser, presets)
    chosen = getattr(chooser.parse_known_args(arguments)[0], "preset", "")
    preset = presets[chosen] if chosen else {}
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    defaults = {name: preset.get(name, field.default) for name, field in fields.items()}
    parser = _parser(config, presets, chosen, about, defaults)
    known, unknown = parser.parse_known_args(arguments)
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items() if name in fields}
    if unknown:
        raise ValueError(_unknown(unknown[0], [*(["--preset"] if presets else []), *map(flag, fields)]))
    for name, value in typed.items():
        if value == ():  # what argparse makes of --option=--
            raise ValueError(f"{flag(name)} must be given a value, got '--'")
        _check_length(flag(name), value, fields[name].metadata["lengths"])
    for name, field in fields.items():
        owner = field.metadata["belongs_to"]
        if owner in typed and typed[owner] != defaults[owner]:
            defaults[name] = field.default
    values = defaults | typed
    if missing := [flag(name) for name, value in values.items() if value is dataclasses.MISSING]:
        raise ValueError(f"{' and '.join(missing)} must be given; --help lists all options")
    return config(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(" ".join(message.removeprefix("argument ").split()))


def _add_preset(parser: argparse.ArgumentParser, presets: Mapping[str, Any]) -> None:
    """Add ``--preset``, where there are presets."""
    if presets:
        first = next(iter(presets))
        text = f"set of defaults, explained at the end: {', '.join(presets)} [default: {first}]"
        parser.add_argument("--preset", choices=list(presets), default=first, metavar="NAME", help=fill(text, width(INDENT)))


def _parser(
    config: type[Any], presets: Mapping[str, Any], chosen: str, about: str | None, defaults: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """Build the parser of a script, with its options in sections."""
    fields, placed = config.__dataclass_fields__, sections(config)
    placed |= {name: SECTIONS[0] for name, value in defaults.items() if value is dataclasses.MISSING}
    options = {name: _settings(fields[name], hint, defaults[name]) for name, hint in typing.get_type_hints(config).items()}
    needed = [f"{flag(name)} {options[name].get('metavar') or '...'}" for name in placed if placed[name] == SECTIONS[0]]
    parser = _Parser(
        description=fill(about or "", width()),
        epilog=about_presets(presets, chosen, config) if presets else None,
        usage=" ".join(["%(prog)s", *(["[--preset NAME]"] if presets else []), *needed, "[options]"]),
        formatter_class=partial(argparse.RawTextHelpFormatter, width=width(), max_help_position=INDENT),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_preset(parser, presets)
    for section in sorted(set(placed.values()), key=SECTIONS.index):
        group = parser.add_argument_group(section)
        for name in (name for name in placed if placed[name] == section):
            group.add_argument(flag(name), **options[name])
    return parser


def _settings(field: "dataclasses.Field[Any]", hint: Any, default: Any) -> dict[str, Any]:
    """Return what argparse takes for a field."""
    settings: dict[str, Any] = {"help": help_text(field, default)}
    if hint is bool:
        return settings | {"action": argparse.BooleanOptionalAction}
    several, choices = typing.get_origin(hint) is tuple, field.metadata["choices"]
    kind = typing.get_args(hint)[0] if several else hint
    settings |= {"type": _reader(kind, field.metadata), "metavar": metavar(field, kind, several)}
    settings |= {"choices": choices, "metavar": "NAME" if several else None} if choices else {}
    return settings | ({"nargs": "+"} if several else {})


def _reader(kind: Any, about: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return what reads a value and holds it against the range of its option."""
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
        expected = f"a {'whole' if kind is int else 'finite'} number {stated_range(stated)}".strip()
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return read


def expand_home(text: str) -> str:
    """Replace ``~`` at the start of a path, also after ``random:`` or ``local-dir:``, by the user's home.

    Raises:
        ArgumentTypeError: if no user has that name.
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
    wanted = "two numbers, low and high" if lengths == (2,) else " or ".join(map(str, lengths)) + " numbers"
    if len(value) not in lengths or (lengths == (2,) and value[0] > value[1]):
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")


def _unknown(word: str, known: list[str]) -> str:
    name = word.split("=")[0]
    if not name.startswith("-"):
        return f"{word!r} belongs to no option: --help lists all options"
    near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known)
    return f"there is no option {name}: " + (f"did you mean {' or '.join(near)}?" if near else "--help lists all options")
