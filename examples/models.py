"""Any model by name: with its weights or without, with a head or without, and written so that timm loads it."""

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from common import Config, Stop, create_encoder
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mvmae.data import colour
from mvmae.encoders import check_source
from mvmae.hub import export, license_warning
from mvmae.timm_weights import checkpoint_filter
from mvmae.weights import CONFIG_FILE, WEIGHTS_FILE, check_weights, first_line, locate, read_json, read_weights


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
        if wanted.startswith("hf-hub:"):
            check_source(wanted, weights=not untrained)
        with torch.device("meta"):
            parameters = inspect.signature(type(create_encoder(architecture)).__init__).parameters
        kept = {key: value for key, value in options.items() if key in parameters}
        model = create_encoder(architecture, pretrained=not untrained and file is None, num_classes=0, **kept)
    except Stop:
        raise
    except Exception as error:  # what timm makes of a config can be anything
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


def starting_weights(model: Any, name: str, arch: str = "") -> dict[str, str]:
    """Say which weights a run starts from, how they were trained and what licence they are under, for exports and cards.

    Args:
        model: as `load_backbone` built it.
        name: as `load_backbone` took it.
        arch: likewise.

    Returns:
        Nothing for ``random:``. Else ``weights``, the name of what is at the root of their history; ``license``, "unknown"
        where none is recorded; ``repo`` on the Hub, where timm knows one; ``training``, what this package's exports say of
        it. Weights of this package that come from nothing have no ``weights``.
    """
    if name.startswith("random:"):
        return {}
    _, file = find_weights(name, arch)
    if name.startswith("hf-hub:"):
        config = read_json(locate(name, CONFIG_FILE))
    else:
        config = read_json(file.parent / CONFIG_FILE) if file and (file.parent / CONFIG_FILE).is_file() else {}
    kept, cfg = _texts(config.get("started_from")), _texts(config.get("pretrained_cfg") if config else model.pretrained_cfg)
    license, training = "" if file and not config else cfg.get("license", ""), _texts(config).get("training", "")
    if not kept and not training:
        tagged = file is None and ":" not in name
        place = "/".join(Path(name.removeprefix("local-dir:")).absolute().parts[-2:]) if file else name
        kept = {"weights": f"{name.split('.')[0]}.{cfg['tag']}" if tagged and cfg.get("tag") else place, "license": "unknown"}
        repo = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else cfg.get("hf_hub_id", "") if tagged else ""
        kept |= {"repo": repo} if "/" in repo.strip("/") else {}
    if license and not (license_warning(kept) and kept.get("license") != "unknown"):
        kept["license"] = license
    return kept | ({"training": training} if training else {})


def _texts(content: Any) -> dict[str, str]:
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def told(start: Mapping[str, str]) -> str:
    """Say where a run's weights come from and what their licence asks, in one line."""
    if not start:
        return "from random weights"
    about = start.get("weights") or f"weights {start.get('training', '')}"
    return f"from {about}: {license_warning(start) or 'licence ' + (start.get('license') or 'of their owner')}"


def with_background(config: Config, name: str, arch: str = "") -> Config:
    """Return the options of a script with the background that its user chose, else the model's own, else white.

    Args:
        config: with ``background``, empty where the user chose none.
        name: as `load_backbone` takes it.
        arch: likewise.

    Raises:
        Stop: if there is no such file or folder.
        ValueError: if it is not a colour.
    """
    wanted = name.removeprefix("random:")
    file = locate(wanted, CONFIG_FILE) if wanted.startswith("hf-hub:") else find_weights(wanted, arch)[1]
    described = file and file.with_name(CONFIG_FILE)
    own = read_json(described).get("background") if described and described.is_file() else None
    chosen: str = config.background or own or "white"  # type: ignore[attr-defined]
    colour(chosen)
    return dataclasses.replace(config, background=chosen)  # type: ignore[type-var]


def _near(path: Path) -> str:
    """Ask whether a path that is like this one, and exists, is meant."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    found = [str(other) for other in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = [Path(other) / path.relative_to(missing) for other in difflib.get_close_matches(str(missing), found)]
    shown = [str(other) for other in near if other.exists()]
    return f": did you mean {' or '.join(shown)}?" if shown else ""


def _is_export(folder: Path) -> bool:
    file = folder / CONFIG_FILE
    return file.is_file() and "architecture" in read_json(file)


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


def classified(start: Mapping[str, str]) -> str:
    """Say how weights with a classifier were trained from what `starting_weights` told, for the export."""
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
