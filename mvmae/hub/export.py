"""From a model to a folder that timm, transformers and `mvmae` load, and from there to the Hub."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn

from ..architecture import (
    PRETRAINING_CONFIG,
    PRETRAINING_FILE,
    PRETRAINING_FOLDER,
    build_encoder,
    describe_encoder,
    describe_pretraining,
    pretraining_arguments,
    write_pretraining,
)
from ..inputs import CFG, INPUTS, TAG, Inputs, inputs_of
from ..masked_vit import PlainViT, check_encoder, unwrap
from ..model import MultiViewMAE
from ..weights import CONFIG_FILE, WEIGHTS_FILE, WeightsError, building, hub_errors, write_json, write_weights
from .card import CARD_FILE, license_warning, without_folders
from .onnx import ONNX_FILES, remove_onnx

_logger = logging.getLogger(__name__)
PRETRAINED = "pretrained by the Multi-View Masked Autoencoder (https://doi.org/10.3390/app132212413)"
PRETRAINING = [f"{PRETRAINING_FOLDER}/{name}" for name in (PRETRAINING_CONFIG, PRETRAINING_FILE)]
PUBLISHED = [CONFIG_FILE, WEIGHTS_FILE, *PRETRAINING, *ONNX_FILES, CARD_FILE, "curves.png", "reconstructions.png"]


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what rebuilds a `MultiViewMAE` or a ViT of timm, in types that JSON can hold, or raise a `WeightsError`."""
    model = unwrap(model)
    whole = isinstance(model, MultiViewMAE)
    return describe_pretraining(model) if whole else describe_encoder(check_encoder(model), plain=False)


def build(description: Mapping[str, Any], **modules: nn.Module | None) -> nn.Module:
    """Build the untrained model that `describe` described; ``modules`` are those of `MultiViewMAE.from_pretrained`."""
    with building("this description"):
        whole = "encoder" in description
        return MultiViewMAE(**pretraining_arguments(description, **modules)) if whole else build_encoder(description)


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    inputs: Inputs | None = None,
    label_names: Sequence[str] | None = None,
    license: str | None = None,
    started_from: Mapping[str, str] | None = None,
    training: str | None = None,
    **changes: Any,
) -> Path:
    """Write a model for everyone: ``config.json`` and ``model.safetensors`` hold its encoder as a plain ViT of timm.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them where this package is not installed. A classifier
    head is written too, and the whole of a `MultiViewMAE`, for `MultiViewMAE.from_pretrained`.

    Args:
        model: a `MultiViewMAE`, or a plain ViT of timm, fine-tuned or not; compiled or in a data-parallel wrapper, too.
        folder: where to write; files there are replaced, and an ``encoder.onnx``, of older weights, is removed.
        inputs: how the images were read; where None, what `inputs_of` says of the encoder.
        label_names: names of the classes, in the order of the head.
        license: licence of the weights, as the Hub spells it, such as ``apache-2.0``; where None, that of the weights that
            training started from, else that of the encoder's cfg.
        started_from: ``weights`` (a name) and ``license`` of what the training started from, if not from nothing, ``repo`` on
            the Hub if known, and ``training``, how they were trained since; the card says so, and a warning where the licence
            does not let everybody use them.
        training: how the weights were trained, for the card, such as "fine-tuned for classification"; that of a
            `MultiViewMAE` where None.
        changes: attributes of `Inputs` that replace those of ``inputs``, such as ``mean`` and ``std``; None changes nothing.

    Raises:
        TypeError: if the model is not a plain ViT.
        ValueError: if mean, std or names do not fit the model.
        WeightsError: if timm could not rebuild the encoder, or a weight is NaN or infinite.
    """
    started = {key: without_folders(value) for key, value in (started_from or {}).items()}
    if warning := license_warning(started):
        _logger.warning("%s", warning)
    model, folder = unwrap(model), Path(folder)
    whole = model if isinstance(model, MultiViewMAE) else None
    vit = check_encoder(whole.encoder if whole else model)
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    changes = {name: value for name, value in changes.items() if value is not None} | {"size": vit.patch_embed.img_size}
    record = inputs_of(vit, **{**(vars(inputs) if inputs else {}), **changes})
    if label_names is not None and len(label_names) != vit.num_classes:
        raise ValueError(
            f"label_names must have one name for each of the {vit.num_classes} classes of the head, got {len(label_names)}"
        )
    config = _timm_config(vit, record)
    history = [started.pop("training", ""), (PRETRAINED if whole else "") if training is None else training]
    if license is None:  # "" says that none is known
        license = started.get("license") or cfg.get("license")
    if license:
        config["pretrained_cfg"]["license"] = license
    about = {"training": ", then ".join(filter(None, history)), "started_from": started, "label_names": list(label_names or ())}
    config |= {key: value for key, value in about.items() if value}
    if whole:
        description = describe_pretraining(whole)
        description["encoder"] |= {INPUTS: config[INPUTS]}
        write_pretraining(folder / PRETRAINING_FOLDER, description, whole.state_dict())
    remove_onnx(folder)
    write_weights(folder / WEIGHTS_FILE, vit.state_dict())
    write_json(folder / CONFIG_FILE, config)
    return folder


def _timm_config(vit: PlainViT, inputs: Inputs) -> dict[str, Any]:
    """Return the config.json of which timm and transformers rebuild the encoder (so without num_classes in model_args)."""
    description, record, embed = describe_encoder(vit), inputs.to_dict(), vit.patch_embed
    parameters = sum(parameter.numel() for parameter in vit.parameters())
    size, patch = (" x ".join(map(str, pair)) for pair in (embed.img_size, embed.patch_size))
    blocks = f"{len(vit.blocks)} blocks of width {vit.embed_dim} with {vit.blocks[0].attn.num_heads} heads"
    images = f"images of {size} pixels and {vit.in_chans} channels in patches of {patch}"
    return {
        **description,
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "pretrained_cfg": {
            "tag": TAG,
            "custom_load": False,
            "input_size": [len(inputs.mean), *inputs.size],
            "fixed_input_size": not vit.dynamic_img_size,
            "crop_mode": "center",
            **{key: record[key] for key in CFG},
            "description": f"{blocks}, {parameters / 1e6:.1f} M parameters, for {images}",
            "num_classes": vit.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        INPUTS: record,
    }


def published(folder: str | Path) -> list[Path]:
    """List the files of an exported folder that `push` uploads, or raise a `WeightsError` if there is no export."""
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(f"{folder} holds no {WEIGHTS_FILE}: name a folder that mvmae's export has written")
    return [folder / name for name in PUBLISHED if (folder / name).is_file()]


def push(folder: str | Path, repo: str, *, private: bool = False, message: str = "Add the model") -> str:
    """Upload the `published` files of an exported folder to a repository of the Hub, in one commit.

    Args:
        folder: as `export` and `write_card` wrote it.
        repo: ``owner/name``; created if it does not exist.
        private: whether to create a private repository.
        message: of the commit.

    Returns:
        The commit, for ``hf-hub:owner/name@commit``.

    Raises:
        WeightsError: if there is no export, the repository is public where a private one was asked for, or the Hub refuses.
    """
    names = [path.relative_to(folder).as_posix() for path in published(folder)]
    with hub_errors(repo, str(folder)):
        api = HfApi(library_name="mvmae")
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise WeightsError(f"{repo} exists and is public: make it private on the Hub first, or push without private")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=names).oid)
