"""How a model's images are read: one record, on the model and in an export's ``config.json``, where every script reads it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

from .masked_vit import unwrap
from .weights import CONFIG_FILE, WeightsError, first_line, locate, read_json

INPUTS = "inputs"
"""The record's key in ``config.json``, and the attribute of a model that holds it."""
TAG = "mvmae"
"""The tag of an export in timm's cfg."""
CFG = ("mean", "std", "interpolation", "crop_pct")
"""What timm's cfg holds of it too; plain timm does not know the rest."""


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
        value_range: pixel values that map to black and to white; None for the whole range of the pixels' type.
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

    def __str__(self) -> str:
        numbers = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        parts = [f"{len(self.mean)} x {self.size[0]} x {self.size[1]}", "mean {}, deviation {}".format(*numbers)]
        parts += [f"{self.interpolation}, crop {self.crop_pct:.4g}", f"background {self.background}"]
        parts += ["values {:g} to {:g}".format(*self.value_range)] if self.value_range else []
        parts += [f"at most {self.max_pixels} pixels"] if self.max_pixels else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the record in types that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Inputs":
        """Return the record in an export's ``config.json``, or what timm's cfg there says, or raise a `WeightsError`."""
        cfg = config.get("pretrained_cfg", config)
        known = {name: cfg[name] for name in CFG if name in cfg}
        old = {"background": config["background"]} if "background" in config else {}  # of this package, before the record
        try:
            return cls(**config.get(INPUTS, {"size": (cfg.get("input_size") or (3, 0, 0))[1:], **known, **old}))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"this does not say how images are read ({first_line(error)}): upgrade mvmae") from error


def inputs_of(model: nn.Module, **changes: Any) -> Inputs:
    """Return how a model's images are read, at the size that it was built for, with ``changes``, of which None is none.

    By its own record; else by that beside the weights, if timm loaded them from a folder or the Hub; else by timm's cfg. A
    model of one channel whose cfg is for three gets the average of the three.

    Raises:
        ValueError: if mean and std are known for another number of channels.
        WeightsError: if the record beside the weights cannot be read.
    """
    model = unwrap(model)
    record = getattr(model, INPUTS, None)
    if not isinstance(record, Inputs):
        cfg = timm.data.resolve_model_data_config(model)
        record = Inputs(cfg["input_size"][1:], **{name: cfg[name] for name in CFG})
        config = _config_beside(model)
        if INPUTS in config or "background" in config:
            beside = Inputs.from_config(config)
            more = {name: getattr(beside, name) for name in ("background", "value_range", "max_pixels")}
            record = dataclasses.replace(record, **more)
    patches: Any = getattr(model, "patch_embed", None)
    channels = channels_of(model)
    own: dict[str, Any] = {"size": to_2tuple(getattr(patches, "img_size", None) or record.size)}
    if channels == 1 and len(record.mean) == 3:  # whose weights timm sums over the channels
        own |= {"mean": (sum(record.mean) / 3,), "std": (sum(record.std) / 3,)}
    known = {name: value for name, value in changes.items() if value is not None}
    record = dataclasses.replace(record, **{**own, **known})
    if len(record.mean) != channels:
        raise ValueError(
            f"mean and std must have one number for each of {channels} channels, got {record.mean} and {record.std}"
        )
    return record


def channels_of(model: nn.Module) -> int:
    """Return the number of channels of a model's images: of a ViT as it was built, else by timm's cfg."""
    patches: Any = getattr(model, "patch_embed", None)
    built = getattr(getattr(patches, "proj", None), "in_channels", None) or getattr(model, "in_chans", None)
    return int(built or timm.data.resolve_model_data_config(model)["input_size"][0])


def set_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Record on a model how its images are read, in timm's cfg too, by which timm's own transforms are made."""
    read: dict[str, Any] = {name: getattr(inputs, name) for name in CFG}
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    setattr(model, "pretrained_cfg", {**cfg, **read, "input_size": (len(inputs.mean), *inputs.size)})  # noqa: B010
    setattr(model, INPUTS, inputs)


def _config_beside(model: nn.Module) -> dict[str, Any]:
    """Return the config.json beside the weights that timm loaded from a folder, or from an export on the Hub; else nothing."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("source") == "local-dir" and Path(cfg["file"], CONFIG_FILE).is_file():
        return read_json(Path(cfg["file"], CONFIG_FILE))
    if cfg.get("source") == "hf-hub" and cfg.get("tag") == TAG:
        return read_json(locate(cfg["hf_hub_id"], CONFIG_FILE))
    return {}
