"""From a model to a folder that timm, transformers and `mvmae` load, to the Hub, and back from other people's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .architecture import describe_encoder, describe_pretraining
from .encoding import check_encoder
from .model import MultiViewMAE
from .pretrained import CONFIG_FILE, WEIGHTS_FILE, write_json, write_weights


def describe(model: nn.Module) -> dict[str, Any]:
    """Give what rebuilds a `MultiViewMAE`, or a ViT of timm, as JSON and a checkpoint can hold it.

    Raises:
        WeightsError: if JSON cannot hold it.
    """
    return (
        describe_pretraining(model) if isinstance(model, MultiViewMAE) else describe_encoder(check_encoder(model), plain=False)
    )


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    label_names: Sequence[str] | None = None,
    license: str | None = None,
) -> Path:
    """Write a model for everyone: ``config.json`` and ``model.safetensors`` hold its encoder as a plain ViT of timm.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them where this package is not installed. A classifier
    head goes along. Of a `MultiViewMAE` the whole is written too, for `MultiViewMAE.from_pretrained`.

    Args:
        model: a `MultiViewMAE`, or a plain ViT of timm, fine-tuned or not.
        folder: where to write; files there are replaced.
        mean: of each channel, in 0 to 1, that the images were normalised with; what the encoder's cfg says where None.
        std: likewise.
        interpolation: how images are to be resized.
        crop_pct: share of the resized image's side that is kept at test time.
        label_names: names of the classes, in the order of the head.
        license: of the weights, as the Hub spells it, such as ``apache-2.0``.

    Returns:
        The folder.

    Raises:
        TypeError: if it is not a plain ViT.
        ValueError: if mean, std or names do not fit the model.
        WeightsError: if timm could not rebuild the encoder, or a weight is NaN or infinite.
    """
    folder, vit = Path(folder), check_encoder(model.encoder if isinstance(model, MultiViewMAE) else model)
    config = _timm_config(
        vit, mean, std, {"interpolation": interpolation, "crop_pct": crop_pct, "license": license}, label_names
    )
    if isinstance(model, MultiViewMAE):
        model.save_pretrained(folder)
    write_weights(folder / WEIGHTS_FILE, vit.state_dict())
    write_json(folder / CONFIG_FILE, config)
    return folder


def _timm_config(
    vit: VisionTransformer,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    preprocessing: Mapping[str, Any],
    label_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Give a config.json of which timm rebuilds the encoder, and transformers too (so without num_classes in model_args)."""
    chans, cfg = vit.patch_embed.proj.in_channels, getattr(vit, "pretrained_cfg", None) or {}
    statistics = {"mean": list(mean or cfg.get("mean") or ()), "std": list(std or cfg.get("std") or ())}
    for name, values in statistics.items():
        if len(values) != chans:
            raise ValueError(f"{name} {values} has {len(values)} numbers: one for each of the {chans} channels is expected")
    if label_names is not None and len(label_names) != vit.num_classes:
        raise ValueError(f"{len(label_names)} label names do not fit a head of {vit.num_classes} classes")
    description = describe_encoder(vit)
    return {
        "architecture": description["architecture"],
        "num_classes": vit.num_classes,
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "model_args": description["model_args"],
        **({"label_names": list(label_names)} if label_names is not None else {}),
        "pretrained_cfg": {
            "tag": "mvmae",
            "custom_load": False,
            "input_size": [chans, *vit.patch_embed.img_size],
            "fixed_input_size": not vit.dynamic_img_size,
            "crop_mode": "center",
            **statistics,
            **{key: value for key, value in preprocessing.items() if value is not None},
            "num_classes": vit.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
