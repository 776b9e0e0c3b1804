"""Any model by name, with or without its weights and a head, and written so that timm loads it."""

import ast
import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from engine.ends import Stop
from mvmae.checkpoints import checkpoint_filter, timm_model, vitmae_arguments
from mvmae.encoders import check_source
from mvmae.hub import export
from mvmae.weights import CONFIG_FILE, WEIGHTS_FILE, check_weights, first_line, locate, read_json, read_weights


def create_encoder(name: str, arguments: str = "", **options: Any) -> nn.Module:
    """Build any model that timm knows.

    Args:
        name: of timm, or with ``hf-hub:`` or ``local-dir:`` in front.
        arguments: more of timm's options, as ``"patch_size=8 embed_dim=128"``.
        options: timm's options.

    Raises:
        Stop: if there is no such model, with near names, or it does not take an argument.
    """
    typed = timm_arguments(arguments)
    known = timm.list_models()
    if ":" not in name and name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        cure = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise Stop(f"timm has no model {name!r}, and it is no folder: {cure}")
    try:
        architecture, described = timm_model(name)
        model: nn.Module = timm.create_model(architecture, **{**described, **typed, **options})
    except (RuntimeError, OSError):  # weights that cannot be loaded
        raise
    except Exception as error:  # timm checks few of its arguments
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"it takes no {unknown[1]}" if unknown else first_line(error)
        raise Stop(f"{name} cannot be built{f' with {arguments!r}' if arguments else ''}: {reason}") from error
    return model


def timm_arguments(text: str) -> dict[str, Any]:
    """Read arguments for timm, such as ``"patch_size=8 embed_dim=128"``.

    Raises:
        Stop: if they are not of this form.
    """
    try:
        return {key: ast.literal_eval(value) for key, value in (part.split("=", 1) for part in text.split())}
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise Stop(f"arguments for timm must be like 'patch_size=8 embed_dim=128', got {text!r}") from error


def summary(model: Any, image_size: int = 0, name: str = "") -> str:
    """Return a line about a model as it was built: architecture, parameters, size of images and patches.

    Args:
        model: of timm, or a part of one.
        image_size: side in pixels, where it takes other images than those that it was built for.
        name: as the user gave it, where the line is to begin with it.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    patches: Any = getattr(model, "patch_embed", None)
    size = image_size or getattr(patches, "img_size", None) or cfg["input_size"][1:]
    number = sum(parameter.numel() for parameter in model.parameters())
    built: str = cfg.get("architecture", "")
    same = name.split(".")[0] in ("", built) or not built
    named = name or built or type(model).__name__ if same else f"{name} (like {built})"
    parts = [named, f"{number / 1e6:.2f} M parameters"]
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList | nn.Sequential) and hasattr(model, "embed_dim"):
        parts.append(f"{len(blocks)} blocks of width {model.embed_dim}")
    parts.append("images of {}x{} pixels".format(*to_2tuple(size)))
    if hasattr(patches, "patch_size"):
        parts.append("patches of {}x{}".format(*to_2tuple(patches.patch_size)))
    return ", ".join(parts)


def load_backbone(name: str, *, arch: str = "", image_size: int = 0, **options: Any) -> nn.Module:
    """Build a model without a head, with its weights.

    Args:
        name: a name of timm (``vit_base_patch16_224.mae``), ``hf-hub:...``, the folder of a run, of an export
            (``local-dir:`` may stand before it), or a file of weights; ``random:`` before any of them leaves the weights out.
        arch: name in timm of the model that a file of weights belongs to, where no config.json lies beside it.
        image_size: side in pixels; the model's own where 0.
        options: for timm, such as ``drop_path_rate``; those that the model does not have are left out.

    Raises:
        Stop: if there is no such model, or its weights cannot be loaded or do not fit.
    """
    wanted, untrained = name.removeprefix("random:"), name.startswith("random:")
    architecture, file = find_weights(wanted, arch)
    options |= {"img_size": image_size} if image_size else {}
    try:
        if wanted.startswith("hf-hub:"):
            check_source(wanted, weights=not untrained)
        with torch.device("meta"):
            parameters = inspect.signature(type(create_encoder(architecture)).__init__).parameters
        kept = {key: value for key, value in options.items() if key in parameters}
        model = create_encoder(architecture, pretrained=not untrained and file is None, num_classes=0, **kept)
    except Stop:
        raise
    except Exception as error:  # what timm makes of a config can be anything
        raise Stop(f"{wanted} cannot be loaded ({first_line(error)}): random:{wanted} is the model without weights") from error
    if getattr(getattr(model, "patch_embed", None), "num_patches", 1) == 0:
        raise Stop(f"images of {kept['img_size']} pixels are smaller than a patch of {wanted}: use a larger --image-size")
    if file is not None and not untrained:
        load_weights(model, file)
    return model


def find_weights(name: str, arch: str = "") -> tuple[str, Path | None]:
    """Return the name of the model that timm builds, and the local file of its weights, if there is one.

    Args:
        name: as `load_backbone` takes it, without ``random:``.
        arch: likewise.

    Raises:
        Stop: if there is no such file or folder, or its architecture is unknown.
    """
    path = Path(name.removeprefix("local-dir:"))
    if path.is_dir():
        folder = _export_in(path)
        if folder is None:
            raise Stop(
                f"{path} holds no model: give the folder of a finished run, or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        check_source(f"local-dir:{folder}", weights=False)
        return f"local-dir:{folder}", locate(folder, WEIGHTS_FILE)
    if path.is_file():
        if not arch and not _is_export(path.parent):
            raise Stop(f"{path} does not tell its architecture: add --arch with its name in timm")
        return arch or f"local-dir:{path.parent}", path
    folders = ":" not in name and "/" in name  # no name of timm has one
    if folders or name.startswith(("local-dir:", ".", "/")) or path.suffix in (".safetensors", ".pth", ".pt"):
        raise Stop(f"there is no file or folder {path}" + _near(path))
    return name, None


def _near(path: Path) -> str:
    """Return a question with similar paths that hold a model; empty if there are none."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    found = [str(other) for other in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = [Path(other) / path.relative_to(missing) for other in difflib.get_close_matches(str(missing), found)]
    shown = [str(other) for other in near if other.is_file() or _export_in(other)]
    return f": did you mean {' or '.join(shown)}?" if shown else ""


def _export_in(folder: Path) -> Path | None:
    """Return the folder of the model in that of a run or an export; None where there is none."""
    return next((folder / part for part in ("encoder", "best", "") if _is_export(folder / part)), None)


def _is_export(folder: Path) -> bool:
    file = folder / CONFIG_FILE
    return file.is_file() and ("architecture" in read_json(file) or vitmae_arguments(file) is not None)


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
    """Add a new classifier to a model: for a ViT on the mean of the patch tokens, through a fresh norm (MAE).

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


def classified(start: Mapping[str, str]) -> str:
    """Return how weights with a classifier were trained, for the export, from the result of `starting_weights`."""
    return "fine-tuned for classification" if start else "trained for classification from random weights"


def save_classifier(
    model: nn.Module, folder: Path, class_names: tuple[str, ...], start: Mapping[str, str], background: str = "white"
) -> None:
    """Write a model with its head and the names of its classes, for ``timm.create_model("local-dir:FOLDER")``.

    Args:
        model: with a head.
        folder: where to write.
        class_names: in the order of the head.
        start: what `starting_weights` said of the weights it was trained from.
        background: colour that transparent pixels were laid on.
    """
    license, training = start.get("license", ""), classified(start)
    if isinstance(model, VisionTransformer | Eva):
        options: dict[str, Any] = {"training": training, "license": license, "background": background}
        export(model, folder, label_names=class_names, started_from=start, **options)
        return
    config = {"label_names": list(class_names), "background": background, "started_from": dict(start)}
    config |= {"training": training, "pretrained_cfg": {"license": license}}
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
