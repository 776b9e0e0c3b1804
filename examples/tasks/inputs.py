"""How images are read, decided once for a script and a model, and the views of them."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

import mvmae
from engine.options import option
from engine.signals import Stop
from mvmae.data import (
    MAX_PIXELS,
    AugmentedViews,
    ColorJitter,
    ImageSource,
    colour,
    decide_range,
    measure_channels,
    pixel_options,
)
from mvmae.inputs import Inputs, channels_of, inputs_of, set_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Options on how images are read; what is not given is the model's own (`mvmae.inputs.Inputs`)."""

    mean: tuple[float | str, ...] = option(
        (), "mean of each channel, 0 to 1; auto: measured; the model's own if not given", at_least=0, at_most=1, section="Data"
    )
    std: tuple[float | str, ...] = option(
        (), "standard deviation of each channel; auto: measured; the model's own if not given", above=0, at_most=1
    )
    value_range: tuple[float, ...] = option(
        (),
        "pixel values that are black and white, such as 0 4095; if not given the model's own, else what the images tell",
        lengths=(2,),
    )
    background: str = option("", "colour behind transparent pixels, a name or #RRGGBB; the model's own if not given")
    max_pixels: int = option(
        0, f"pixels above which an image counts as unreadable; 0: the model's own limit, else {MAX_PIXELS}", at_least=0
    )


TYPED = tuple(field.name for field in dataclasses.fields(InputOptions))


def resolve_inputs(config: Any, model: nn.Module, source: ImageSource, size: Sequence[int] = ()) -> Inputs:
    """Decide how a model's images are read, by `InputOptions`, its own record and the images, and record it on the model.

    ``source`` is measured where mean or deviation is "auto", and decides the range of deep pixels. ``size``, one side in pixels
    or (H, W), is for models without a size of their own.
    """
    typed: dict[str, Any] = {name: getattr(config, name) or None for name in TYPED}
    typed |= {"size": (size[0], size[-1]) if size else None}
    colour(config.background or "white")  # refuses what is none
    if measured := [name for name in ("mean", "std") if typed[name] == ("auto",)]:
        blank = inputs_of(model, **{**typed, **dict.fromkeys(("mean", "std"), (1.0,) * channels_of(model))})
        centre = mvmae.CentreCropTransform(blank.size, **pixel_options(blank))
        found = measure_channels(source, centre)._asdict()
        typed |= {name: found[name] for name in measured}
    for name in ("mean", "std"):
        if words := [word for word in typed[name] or () if isinstance(word, str)]:
            raise Stop(f"--{name} must be numbers, or auto alone, got {words[0]!r}")
    inputs = inputs_of(model, **typed)
    if inputs.value_range is None:
        options = pixel_options(inputs)
        decided = decide_range(source, channels=options["in_chans"], max_pixels=options["max_pixels"])
        inputs = dataclasses.replace(inputs, value_range=decided)
    set_inputs(model, inputs)
    return inputs


def describe_inputs(config: Any, inputs: Inputs) -> str:
    """Return a line on how images are read, and which options replaced the model's own."""
    replaced = " ".join(f"--{name.replace('_', '-')}" for name in TYPED if getattr(config, name))
    return f"{inputs}" + (f"; {replaced} in place of the model's own" if replaced else "")


def jittered(transform: mvmae.MultiViewTransform, strength: Sequence[float], grayscale: float) -> Callable[..., Tensor]:
    """Return a transform whose views have random brightness, contrast and, where given, saturation and hue (`ColorJitter`)."""
    if not any(strength) and not grayscale:
        return transform
    return AugmentedViews(transform, ColorJitter(*strength or (0, 0), grayscale=grayscale))


def augmented(transform: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Return a transform whose views a function of the user changes: ``name`` is module:function; none where empty."""
    if not name:
        return transform
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        augment: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise Stop(f"--transform must be module:function, in a file of the current folder, got {name} ({error})") from error
    return AugmentedViews(transform, augment)
