"""How a model's images are read: one record, kept in an export's ``config.json``, where every later script reads it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .weights import WeightsError, first_line

INPUTS = "inputs"
"""The record's key in ``config.json``."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How the images of a model are read.

    Attributes:
        size: height and width in pixels.
        mean: of each channel, in 0 to 1; their number is that of the channels.
        std: standard deviation of each channel, likewise.
        interpolation: how images are resized.
        crop_pct: share of the resized image's side that is kept in evaluation.
        background: colour behind transparent pixels, a name or ``#RRGGBB``.
        value_range: pixel values of 16-bit images that map to black and to white; None for the whole range.
        max_pixels: largest number of pixels of an image; None for the readers' own limit.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    background: str = "white"
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # lists, as JSON has them
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std must have one number for each channel, got {self.mean} and {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return the record in types that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Inputs":
        """Return the record in an export's ``config.json``, or what timm's cfg there says, or raise a `WeightsError`."""
        cfg = config.get("pretrained_cfg", config)
        known = {name: cfg[name] for name in ("mean", "std", "interpolation", "crop_pct") if name in cfg}
        old = {"background": config["background"]} if "background" in config else {}  # of this package, before the record
        try:
            return cls(**config.get(INPUTS, {"size": (cfg.get("input_size") or (3, 0, 0))[1:], **known, **old}))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"this does not say how images are read ({first_line(error)}): upgrade mvmae") from error
