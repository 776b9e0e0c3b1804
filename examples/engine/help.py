"""What ``--help`` prints: the options in sections, with their ranges and defaults, and what the presets are for."""

import dataclasses
import inspect
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from itertools import groupby
from typing import Any

SECTIONS = (
    "Required",
    "Data",
    "Model",
    "Views",
    "Augmentation",
    "Masking and losses",
    "Decoder",
    "Heads",
    "Optimization",
    "Measurements",
    "Evaluation",
    "Pictures",
    "Model card and upload",
    "Speed and memory",
    "Run",
)
"""The sections of ``--help`` of all scripts, in their order; the first holds what has no default."""
INDENT = 28
"""Columns before the help texts of options."""
WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
"""Settings of `textwrap` that leave words and options whole."""


def flag(name: str) -> str:
    """Return what a user types for a field."""
    return "--" + name.replace("_", "-")


def width(used: int = 0) -> int:
    """Return how many columns of the terminal are left for text."""
    return max(min(shutil.get_terminal_size().columns - 2, 120) - used, 30)


def shown(value: Any) -> str:
    """Return a value as a user types it: 1 for 1.0, words for a tuple; and yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{one:.12g}" if isinstance(one, float) else str(one) for one in values)


def stated_range(bounds: Mapping[str, float]) -> str:
    """Return the range of a number in words."""
    return " and ".join(f"{word} {limit:.12g}" for word, limit in bounds.items())


def sections(config: type[Any]) -> dict[str, str]:
    """Return the section of each option: that of the dataclass that declares the option first."""
    found: dict[str, str] = {}
    for part in reversed(config.__mro__):
        section = ""
        for name in inspect.get_annotations(part):
            if name not in found:
                section = found[name] = vars(part)["__dataclass_fields__"][name].metadata["section"] or section
    return found


def help_text(field: "dataclasses.Field[Any]", default: Any) -> str:
    """Return the help text of an option, and in brackets its choices, its range, and its default with the source of that."""
    about, bounds = field.metadata, field.metadata["bounds"]
    text, told = about["help"], about["empty"] if default in ("", ()) else shown(default)
    if text.endswith(")"):
        text, source = text[:-1].rsplit(" (", 1)
        preset = field.default not in ("", (), dataclasses.MISSING, default)  # then the source is not that of the default
        told += f" ({source}: {shown(field.default)})" if preset else f" ({source})"
    notes = {
        "two numbers, low and high": about["lengths"] == (2,),
        f"any of {', '.join(map(str, about['choices']))}": about["choices"] and isinstance(field.default, tuple),
        stated_range(bounds).removeprefix("of "): bounds.keys() - {"of at least"} or bounds.get("of at least"),
        f"default: {told}": told and default is not dataclasses.MISSING,
    }
    added = "; ".join(note for note, wanted in notes.items() if wanted)
    return fill(f"{text} [{added}]" if added else text, width(INDENT)).replace("%", "%%")


def metavar(field: "dataclasses.Field[Any]", kind: Any, several: bool) -> str:
    """Return the word that stands for an option's value."""
    if kind in (int, float, float | str):
        return "N" if kind is int else "X"
    word = field.name.rpartition("_")[2].upper()
    return word.removesuffix("S") if several else word


def fill(text: str, columns: int) -> str:
    """Break the lines of a text anew after at most ``columns``; each line that two spaces begin, a command, stays."""
    lines: list[str] = []
    text = text.replace("\\\n", "\0")  # a command that goes on in the next line
    for indent, group in groupby(text.splitlines(), lambda line: len(line) - len(line.lstrip())):
        for blank, some in groupby(group, lambda line: not line.strip()):
            if blank or indent == 2:
                lines += some
            else:
                words, space = " ".join(line.strip() for line in some), " " * indent
                lines.append(textwrap.fill(words, columns, initial_indent=space, subsequent_indent=space, **WHOLE))
    return "\n".join(lines).replace("\0", "\\\n")


def set_by(preset: Mapping[str, Any], config: type[Any]) -> list[str]:
    """Return what a user would type to set what a preset sets: an option and its values each."""
    fields, typed = config.__dataclass_fields__, []
    for name, value in preset.items():
        if name != "help" and value != fields[name].default:
            values = value if isinstance(value, tuple) else (value,)
            words = [flag(name), *map(shown, values)]
            typed.append(shlex.join([flag(name if value else f"no_{name}")] if isinstance(value, bool) else words))
    return typed


def about_presets(presets: Mapping[str, Mapping[str, Any]], chosen: str, config: type[Any]) -> str:
    """Return what each preset is for, and what the chosen one sets."""
    space = max(map(len, presets)) + 4
    lines = [fill("A preset replaces the defaults; options on the command line override the preset:", width())]
    for name, preset in presets.items():
        text = f"{name:<{space - 2}}{preset.get('help', '')}"
        lines.append(textwrap.fill(text, width(), initial_indent="  ", subsequent_indent=" " * space, **WHOLE))
    lines += ["", fill("To see what a preset sets, ask for help with it: --preset NAME --help", width())]
    typed = set_by(presets[chosen], config)
    lines += [] if typed else ["", fill(f"preset {chosen} sets nothing beyond the defaults above", width())]
    if typed:
        kept = " ".join(one.replace(" ", "\0") for one in typed)  # no line ends between an option and its value
        words = textwrap.fill(kept, width(), initial_indent="  ", subsequent_indent="  ", **WHOLE).replace("\0", " ")
        lines += ["", f"preset {chosen} sets:", words]
    return "\n".join(lines)
