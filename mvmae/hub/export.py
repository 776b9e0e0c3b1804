"""From a model to a folder that timm, transformers and `mvmae` load, and from there to the Hub."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor, nn

from ..description import build_encoder, describe_encoder, describe_pretraining, pretraining_arguments
from ..files import CONFIG_FILE, WEIGHTS_FILE, WeightsError, building, hub_causes, write_json
from ..masked_vit import PlainViT, check_encoder
from ..model import MultiViewMAE
from ..weights import PRETRAINING_CONFIG, PRETRAINING_FILE, PRETRAINING_FOLDER, check_weights, write_pretraining, write_weights
from ..wrappers import merged, plain_names, unwrap
from .card import CARD_FILE, license_warning
from .card import write_card as write_card
from .load import load_encoder as load_encoder
from .load import load_pretraining as load_pretraining
from .onnx import ONNX_DATA_FILE, ONNX_FILE, remove_onnx

_logger = logging.getLogger(__name__)
PRETRAINED = "pretrained by the Multi-View Masked Autoencoder (https://doi.org/10.3390/app132212413)"
PUBLISHED = [
    CONFIG_FILE,
    WEIGHTS_FILE,
    f"{PRETRAINING_FOLDER}/{PRETRAINING_CONFIG}",
    f"{PRETRAINING_FOLDER}/{PRETRAINING_FILE}",
    ONNX_FILE,
    ONNX_DATA_FILE,
    CARD_FILE,
    "curves.png",
    "reconstructions.png",
]


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what rebuilds a `MultiViewMAE` or a ViT of timm, in types that JSON and a checkpoint can hold.

    Raises:
        WeightsError: if JSON cannot hold it.
    """
    model = merged(unwrap(model))
    return (
        describe_pretraining(model) if isinstance(model, MultiViewMAE) else describe_encoder(check_encoder(model), plain=False)
    )


def build(description: Mapping[str, Any]) -> nn.Module:
    """Build the untrained model that `describe` described.

    Raises:
        WeightsError: if the description fits no model.
    """
    with building("this description"):
        return MultiViewMAE(**pretraining_arguments(description)) if "encoder" in description else build_encoder(description)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load weights that fit a model exactly.

    Raises:
        WeightsError: with ``source`` and the names that are missing, unexpected or of another shape; the model stays as it was.
    """
    check_weights(weights, model.state_dict(), source=source)
    model.load_state_dict(weights)


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
    started_from: Mapping[str, str] | None = None,
    training: str | None = None,
    background: str = "white",
) -> Path:
    """Write a model for everyone: ``config.json`` and ``model.safetensors`` hold its encoder as a plain ViT of timm.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them where this package is not installed. A classifier
    head is written too, and the whole of a `MultiViewMAE`, for `MultiViewMAE.from_pretrained`.

    Args:
        model: a `MultiViewMAE`, or a plain ViT of timm, fine-tuned or not; compiled or in a data-parallel wrapper, too. Active
            adapters of peft (LoRA and the like) are merged into the weights that are written; the model keeps them.
        folder: where to write; files there are replaced, and an ``encoder.onnx``, of older weights, is removed.
        mean: mean of each channel, in 0 to 1, by which the images were normalised; where None, the encoder's cfg has it.
        std: standard deviation of each channel, likewise.
        interpolation: how to resize images.
        crop_pct: share of the resized image's side that is kept at test time.
        label_names: names of the classes, in the order of the head.
        license: licence of the weights, as the Hub spells it, such as ``apache-2.0``; where None, that of the weights that
            training started from, else that of the encoder's cfg.
        started_from: ``weights`` (a name) and ``license`` of what the training started from, if not from nothing, ``repo`` on
            the Hub if known, and ``training``, how they were trained since; the card says so, and a warning where the licence
            does not let everybody use them.
        training: how the weights were trained, for the card, such as "fine-tuned for classification"; that of a
            `MultiViewMAE` where None.
        background: colour behind transparent pixels in training, for users of the export.

    Returns:
        The folder.

    Raises:
        TypeError: if the model is not a plain ViT.
        ValueError: if mean, std or names do not fit the model.
        WeightsError: if timm could not rebuild the encoder, or a weight is NaN or infinite.
    """
    if started_from and (warning := license_warning(started_from)):
        _logger.warning("%s", warning)
    started, model = dict(started_from or {}), merged(unwrap(model))
    folder, vit = Path(folder), check_encoder(unwrap(model.encoder) if isinstance(model, MultiViewMAE) else model)
    if license is None:
        license = started.get("license") or (getattr(vit, "pretrained_cfg", None) or {}).get("license")
    if training is None:
        training = PRETRAINED if isinstance(model, MultiViewMAE) else ""
    history = [step for step in (started.pop("training", ""), training) if step]
    config = _timm_config(
        vit, mean, std, {"interpolation": interpolation, "crop_pct": crop_pct, "license": license}, label_names
    )
    config["background"] = background
    if history:
        config["training"] = ", then ".join(history)
    if started:
        config["started_from"] = started
    if isinstance(model, MultiViewMAE):
        description = describe_pretraining(model)
        description["encoder"] |= {key: config["pretrained_cfg"][key] for key in ("mean", "std")}
        write_pretraining(folder / PRETRAINING_FOLDER, description, plain_names(model.state_dict()))
    remove_onnx(folder)
    write_weights(folder / WEIGHTS_FILE, plain_names(vit.state_dict()))
    write_json(folder / CONFIG_FILE, config)
    return folder


def _timm_config(
    vit: PlainViT,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    preprocessing: Mapping[str, Any],
    label_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Return the config.json of which timm and transformers rebuild the encoder (so without num_classes in model_args)."""
    chans, cfg = vit.patch_embed.proj.in_channels, getattr(vit, "pretrained_cfg", None) or {}
    statistics = {"mean": list(mean or cfg.get("mean") or ()), "std": list(std or cfg.get("std") or ())}
    for name, values in statistics.items():
        if len(values) != chans:
            raise ValueError(f"{name} must have one number for each of the {chans} channels, got {len(values)}: {values}")
    if label_names is not None and len(label_names) != vit.num_classes:
        raise ValueError(
            f"label_names must have one name for each of the {vit.num_classes} classes of the head, got {len(label_names)}"
        )
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
            **{key: value for key, value in preprocessing.items() if value},
            "description": _size(vit),
            "num_classes": vit.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if chans in (1, 3) else None,  # timm before 1.0.31 takes any file for 3 channels
            "classifier": "head",
        },
    }


def _size(vit: PlainViT) -> str:
    embed, parameters = vit.patch_embed, sum(parameter.numel() for parameter in vit.parameters())
    size, patch = (" x ".join(map(str, pair)) for pair in (embed.img_size, embed.patch_size))
    blocks = f"{len(vit.blocks)} blocks of width {vit.embed_dim} with {vit.blocks[0].attn.num_heads} heads"
    images = f"images of {size} pixels and {embed.proj.in_channels} channels in patches of {patch}"
    return f"{blocks}, {parameters / 1e6:.1f} M parameters, for {images}"


def published(folder: str | Path) -> list[Path]:
    """List the files of an exported folder that `push` uploads.

    Raises:
        WeightsError: if there is no export, or one of the files is a link, which could point to any file of the user.
    """
    folder = Path(folder)
    found = [folder / name for name in PUBLISHED if os.path.lexists(folder / name)]
    if folder / WEIGHTS_FILE not in found:
        raise WeightsError(f"{folder} holds no {WEIGHTS_FILE}: name a folder that mvmae's export has written")
    for path in found:
        above = {path.parent} - {folder}
        if any(part.is_symlink() for part in {path} | above) or not path.is_file():
            raise WeightsError(f"{path} is not a plain file inside {folder}, and is not uploaded: replace it by a copy")
    return found


def push(folder: str | Path, repo: str, *, private: bool = False, message: str = "Add the model") -> str:
    """Upload an exported folder to a repository of the Hub, in one commit.

    Args:
        folder: as `export` and `write_card` wrote it; only its `published` files are uploaded.
        repo: ``owner/name``; created if it does not exist.
        private: whether to create a private repository.
        message: message of the commit.

    Returns:
        The commit, for ``hf-hub:owner/name@commit``.

    Raises:
        WeightsError: if the folder holds no export, or links in place of files, the repository is public where a private one
            was asked for, or the Hub refuses.
    """
    names = [path.relative_to(folder).as_posix() for path in published(folder)]
    with hub_causes(repo, str(folder), None):
        api = HfApi(library_name="mvmae")
        api.create_repo(repo, private=private, exist_ok=True)
        public = private and not api.repo_info(repo).private
    if public:
        raise WeightsError(f"{repo} exists and is public: make it private on the Hub first, or push without private")
    with hub_causes(repo, str(folder), None):
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=names).oid)
