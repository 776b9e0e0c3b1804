"""Views of the images, and the statistics of their channels."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import mvmae
from engine.signals import Stop
from mvmae.data import AugmentedViews, ColorJitter, ImageSource, measure_channels


def channel_statistics(
    typed: Mapping[str, Sequence[float | str]],
    own: Mapping[str, Sequence[float]],
    source: ImageSource,
    centre: mvmae.CentreCropTransform,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel: the user's, measured on the images, or the encoder's.

    Args:
        typed: ``mean`` and ``std`` as the user gave them: numbers, "auto", or nothing.
        own: ``mean`` and ``std`` of the encoder's cfg.
        source: images to measure.
        centre: the view of them to measure.
    """
    values = {name: tuple(typed[name]) or tuple(own[name]) for name in ("mean", "std")}
    if ("auto",) in values.values():
        measured = measure_channels(source, centre)._asdict()
        values = {name: measured[name] if value == ("auto",) else value for name, value in values.items()}
    for name, value in values.items():
        if words := [word for word in value if isinstance(word, str)]:
            raise Stop(f"--{name} must be numbers, or auto alone, got {words[0]!r}")
    mean, std = (tuple(map(float, value)) for value in values.values())
    if len(mean) != centre.in_chans or len(std) != centre.in_chans:
        raise Stop(
            f"--in-chans {centre.in_chans} must have as many means and standard deviations, got {len(mean)} and {len(std)}: "
            f"give --mean and --std {centre.in_chans} numbers each, in units of the whole range (0 to 1), or auto"
        )
    return mean, std


def jittered(transform: mvmae.MultiViewTransform, strength: Sequence[float], grayscale: float) -> Callable[..., Tensor]:
    """Return a transform whose views have random brightness, contrast and colour.

    Args:
        transform: takes the views.
        strength: of brightness and contrast, and where given of saturation and hue (`ColorJitter`); none if empty.
        grayscale: probability of a view without colour.
    """
    if not any(strength) and not grayscale:
        return transform
    if transform.in_chans != 3 and (any(strength[2:]) or grayscale):
        raise Stop(
            f"--jitter of saturation and hue, and --grayscale, must have --in-chans 3, got {transform.in_chans}: "
            "give --jitter brightness and contrast alone, such as 0.4 0.4, and --grayscale 0"
        )
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


def normalize(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """Normalise uint8 images (..., C, H, W) to float32 by mean and standard deviation in units of the whole range, 255."""
    mean, std = (_per_channel(tuple(x), images.device) for x in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy values to the device, (C, 1, 1); once, because a copy waits until the device has finished its work."""
    return torch.tensor(values, device=device)[:, None, None]
