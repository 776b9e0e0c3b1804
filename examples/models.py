"""Any model by name: with its weights or without, with a head or without, and written so that timm loads it."""

import copy
import difflib
import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from common import Stop, create_encoder
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mvmae.encoders import checkpoint_filter
from mvmae.hub import export
from mvmae.pretrained import CONFIG_FILE, WEIGHTS_FILE, check_weights, first_line, read_weights


def load_backbone(name: str, *, arch: str = "", image_size: int = 0, **options: Any) -> nn.Module:
    """Build a model without a head, with its weights.

    Args:
        name: a name of timm (``vit_base_patch16_224.mae``), ``hf-hub:...``, the folder of a run, of an export
            (``local-dir:`` may stand before it), or a file of weights; ``random:`` before any of them leaves the weights out.
        arch: name in timm of the model that a file of weights belongs to, where no config.json lies beside it.
        image_size: side in pixels; the model's own where 0.
        options: for timm, such as ``drop_path_rate``; those that the model does not have are left out.

    Raises:
        Stop: if there is no such model, or its weights cannot be had or do not fit.
    """
    wanted, untrained = name.removeprefix("random:"), name.startswith("random:")
    architecture, file = find_weights(wanted, arch)
    options |= {"img_size": image_size} if image_size else {}
    try:
        with torch.device("meta"):
            parameters = inspect.signature(type(create_encoder(architecture)).__init__).parameters
        kept = {key: value for key, value in options.items() if key in parameters}
        model = create_encoder(architecture, pretrained=not untrained and file is None, num_classes=0, **kept)
    except (RuntimeError, OSError) as error:
        raise Stop(f"{wanted} cannot be had ({first_line(error)}); random:{wanted} is a model without weights") from error
    if getattr(getattr(model, "patch_embed", None), "num_patches", 1) == 0:
        raise Stop(f"images of {kept['img_size']} pixels are smaller than a patch of {wanted}: use a larger --image-size")
    if file is not None and not untrained:
        load_weights(model, file)
    return model


def find_weights(name: str, arch: str = "") -> tuple[str, Path | None]:
    """Give what timm is to build, and the local file of its weights, if there is one.

    Args:
        name: as `load_backbone` takes it, without ``random:``.
        arch: likewise.

    Raises:
        Stop: if there is no such file or folder, or it does not tell its architecture.
    """
    path = Path(name.removeprefix("local-dir:"))
    if path.is_dir():
        folder = next((path / part for part in ("encoder", "best", "") if _is_export(path / part)), None)
        if folder is None:
            raise Stop(f"{path} holds no encoder: a run that has ended, or {CONFIG_FILE} and {WEIGHTS_FILE}, is expected")
        return f"local-dir:{folder}", folder / WEIGHTS_FILE
    if path.is_file():
        if not arch and not _is_export(path.parent):
            raise Stop(f"{path} does not tell its architecture: add --arch with its name in timm")
        return arch or f"local-dir:{path.parent}", path
    folders = ":" not in name and "/" in name  # no name of timm has one
    if folders or name.startswith(("local-dir:", ".", "/")) or path.suffix in (".safetensors", ".pth", ".pt"):
        raise Stop(f"there is no file or folder {path}" + _near(path))
    return name, None


def _near(path: Path) -> str:
    """Ask whether a path that is like this one, and exists, is meant."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    found = [str(other) for other in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = [Path(other) / path.relative_to(missing) for other in difflib.get_close_matches(str(missing), found)]
    shown = [str(other) for other in near if other.exists()]
    return f": did you mean {' or '.join(shown)}?" if shown else ""


def _is_export(folder: Path) -> bool:
    file = folder / CONFIG_FILE
    return file.is_file() and "architecture" in json.loads(file.read_text())


def load_weights(model: Any, file: Path) -> None:
    """Load a file of weights into a model without a head: all of the model's, or none.

    Raises:
        WeightsError: if the file is damaged or does not fit.
    """
    weights, head = read_weights(file), model.pretrained_cfg.get("classifier") or "head"
    if isinstance(model, VisionTransformer | Eva):
        weights = checkpoint_filter(weights, model)
    weights = {key: value for key, value in weights.items() if not key.startswith(f"{head}.")}
    check_weights(weights, {k: v for k, v in model.state_dict().items() if not k.startswith(f"{head}.")}, source=file)
    model.load_state_dict(weights, strict=False)


def add_head(model: Any, num_classes: int, *, std: float) -> None:
    """Put a fresh classifier on a model: for a ViT on the mean of the patch tokens, through a fresh norm (MAE).

    Args:
        model: without a head.
        num_classes: of the head.
        std: of the truncated normal distribution of its weights.
    """
    if isinstance(getattr(model, "fc_norm", None), nn.Module) and getattr(model, "num_prefix_tokens", None) is not None:
        model.reset_classifier(num_classes, "avg")
        if isinstance(model.fc_norm, nn.Identity):
            model.fc_norm, model.norm = copy.deepcopy(model.norm), nn.Identity()
        if isinstance(model.fc_norm, nn.LayerNorm):
            model.fc_norm.reset_parameters()
    else:
        model.reset_classifier(num_classes)
    for module in model.get_classifier().modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)


def save_classifier(model: nn.Module, folder: Path, class_names: tuple[str, ...]) -> None:
    """Write a model with its head and the names of its classes, for ``timm.create_model("local-dir:FOLDER")``."""
    if isinstance(model, VisionTransformer | Eva):
        export(model, folder, label_names=class_names)
    else:
        timm.models.save_for_hf(model, str(folder), model_config={"label_names": list(class_names)}, safe_serialization=True)
