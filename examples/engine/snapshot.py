"""The state of a run in memory: copied to the host, compared as a whole with a run, and only then loaded into it."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.ends import Stop

SHOWN = 4  # problems that a message names


def to_host(value: Any) -> Any:
    """Copy nested dictionaries and lists, tensors into the host's memory: training does not change the copy."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(to_host, value))
    return value


def named_tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of nested dictionaries and lists, however deep, with the keys that lead to it."""
    seen, left = set(), [("", state)]
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor):
            yield name[1:], value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += reversed([(f"{name}.{key}", item) for key, item in items])


def is_plain(value: Tensor) -> bool:
    """Return whether a tensor holds all its numbers in the host's memory: not sparse, quantized, expanded or meta."""
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized and not value.is_nested
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def not_finite(state: Any) -> str:
    """Return the name of the first tensor of a state that holds NaN or infinity; empty if there is none."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((name for name, value in named_tensors(state) if value.dtype in kinds and not value.isfinite().all()), "")


def restore(
    found: Mapping[str, Any],
    source: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Load a checkpoint into modules and optimizer: all of it where all of it fits, else nothing.

    Args:
        found: the checkpoint.
        source: where it comes from, for the message.
        modules: what is trained, by the names in the checkpoint.
        optimizer: gets back what it keeps of each parameter; its options stay as this run sets them.
        also: further parts that the checkpoint must hold, and a value like each (see `differences`).

    Raises:
        Stop: naming what is missing, unexpected, of another type or of another shape.
    """
    expected = {name: module.state_dict() for name, module in modules.items()} | dict(also or {})
    problems = list(differences({name: found[name] for name in expected if name in found}, expected))
    if optimizer is not None:
        problems += _optimizer_differences(found, optimizer)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise Stop(f"{source} does not fit this run: {'; '.join(problems[:SHOWN])}{more}: use another --output-dir")
    for name, module in modules.items():
        module.load_state_dict(found[name])
    if optimizer is not None:
        options = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": found["optimizer"]["state"], "param_groups": options})


def differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Compare the shape of a state with that of another: keys, lengths, shapes and types, not numbers.

    Args:
        found: the state.
        expected: a state like the one that is required. A tensor without rows stands for any number of rows, an empty
            dictionary for any dictionary of numbers.
        name: of the state in the lines.

    Yields:
        a line for each difference.
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected:
        below = f"{name}." if name else ""
        for word, keys in (("is missing", [*expected]), ("is unexpected", [*found])):
            other = found if word == "is missing" else expected
            yield from (f"{below}{key} {word}" for key in keys if key not in other)
        for key in expected:
            if key in found:
                yield from differences(found[key], expected[key], f"{below}{key}")
    elif isinstance(expected, Mapping) and isinstance(found, Mapping):
        yield from (f"{name}.{key} is {_kind(value)} instead of a number" for key, value in found.items() if not _number(value))
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        rows = slice(1 if found.ndim and expected.ndim and not expected.shape[0] else 0, None)
        if found.shape[rows] != expected.shape[rows] or found.ndim != expected.ndim:
            yield f"{name} is {tuple(found.shape)} instead of {tuple(expected.shape)}"
        elif found.dtype != expected.dtype:
            yield f"{name} is {found.dtype} instead of {expected.dtype}"
    elif _kind(found) != _kind(expected):
        yield f"{name} is {_kind(found)} instead of {_kind(expected)}"


def _optimizer_differences(found: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Compare the optimizer's part of a checkpoint with what this one keeps; a frozen parameter may have no entry yet."""
    content = found.get("optimizer")
    state, groups = (content.get(key) if isinstance(content, Mapping) else None for key in ("state", "param_groups"))
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        yield "optimizer is not a dictionary of state and param_groups"
        return
    sizes = [len(g["params"]) if isinstance(g, Mapping) and isinstance(g.get("params"), list) else None for g in groups]
    if sizes != (own := [len(group["params"]) for group in optimizer.param_groups]):
        yield f"optimizer.param_groups holds {sizes} parameters instead of {own}"
    if not state and found["step"] > found.get("skipped", 0):
        yield "optimizer.state is empty"
    parameters = ((group, parameter) for group in optimizer.param_groups for parameter in group["params"])
    known = {number: _kept(optimizer, *each) for number, each in enumerate(parameters) if number in state}
    if known:
        yield from differences(state, known, "optimizer.state")
    else:
        yield from (f"optimizer.state.{key} is unexpected" for key in state)


def _kept(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the like of what an optimizer keeps of a parameter, by a step of a copy on another: Muon goes by its shape."""
    twin, other = copy.copy(optimizer), nn.Parameter(torch.ones_like(parameter))
    other.grad = torch.ones_like(other)
    twin.param_groups = [{**group, "params": [other]}]
    twin.state = type(optimizer.state)(dict)
    twin.step()
    return {key: parameter.detach() if getattr(value, "ndim", 0) else value for key, value in twin.state[other].items()}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return "a number" if _number(value) else "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
