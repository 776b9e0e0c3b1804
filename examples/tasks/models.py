"""Any model by its name: with or without its weights, with a new head, described, and written so that timm loads it.

A name is timm's (``vit_base_patch16_224.mae``), ``hf-hub:ID``, the folder of a run or an export (with ``local-dir:`` or not),
or a file of weights, whose architecture ``arch`` names where no config.json lies beside it. ``random:`` before any of them
leaves the weights out. What does not exist or cannot be built is a `Stop`, what is damaged or does not fit a `WeightsError`.
"""

import ast
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

import mvmae
from engine.signals import Stop
from mvmae import WeightsError, hub
from mvmae.inputs import INPUTS, Inputs, inputs_of, set_inputs
from mvmae.loading import arguments_of, known_arguments, load_read
from mvmae.masked_vit import check_encoder
from mvmae.weights import CONFIG_FILE, WEIGHTS_FILE, first_line, locate, read_json, read_weights

SHIPPED = "mvmae_vit_micro_patch8_64"
"""The encoder whose weights come with the package."""


def load_backbone(name: str, *, arch: str = "", image_size: Sequence[int] = (), **options: Any) -> nn.Module:
    """Build any model of timm without a head, with its weights unless ``random:`` stands before its name.

    ``image_size`` is one side in pixels or (H, W), the model's own where empty. Of the options for timm, such as
    ``drop_path_rate``, those that the model does not have are left out.
    """
    wanted = name.removeprefix("random:")
    architecture, file = find_weights(wanted, arch)
    with torch.device("meta"):
        known = known_arguments(create_encoder(architecture))
    options |= {"img_size": (image_size[0], image_size[-1])} if image_size else {}
    options, pretrained = {key: value for key, value in options.items() if key in known}, wanted == name
    weights, said = _read_named(file, architecture, arch)
    model = create_encoder(architecture, pretrained=pretrained and file is None, num_classes=0, **{**said, **options})
    if getattr(getattr(model, "patch_embed", None), "num_patches", 1) == 0:
        raise Stop(f"images of {options.get('img_size')} pixels are smaller than a patch of {wanted}: use more")
    if pretrained and file is not None:
        load_read(model, weights or read_weights(file), file)
    if INPUTS in (config := _config_beside(wanted, arch)):
        set_inputs(model, Inputs.from_config(config))
    return model


def start_encoder(
    name: str,
    arguments: str = "",
    *,
    pretrained: bool = False,
    arch: str = "",
    image_size: Sequence[int] = (),
    in_chans: int = 3,
) -> Any:
    """Build the encoder that pretraining or adapting starts from, a plain ViT without a head.

    ``pretrained``, not ``random:``, says whether it has its weights; timm adapts them to ``in_chans`` channels.
    ``image_size`` is that of `load_backbone`, ``arguments`` are those of `create_encoder`.
    """
    if name.startswith("random:"):
        raise Stop(f"--encoder takes no 'random:', got {name!r}: pretrain.py starts from random weights, adapt.py does not")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
    if image_size:
        options["img_size"] = image_size[0] if len(image_size) == 1 else tuple(image_size)
    architecture, file = find_weights(name, arch)
    weights, said = _read_named(file, architecture, arch)
    options |= {key: value for key, value in said.items() if key not in timm_arguments(arguments)}
    encoder = create_encoder(architecture, arguments, pretrained=pretrained and file is None, **options)
    if pretrained and file is not None:
        load_read(encoder, weights or read_weights(file), file)
    return encoder


def _read_named(file: Path | None, architecture: str, arch: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of the architecture that the user named: its weights, and the arguments for timm that they say."""
    if file is None or architecture != arch:
        return {}, {}
    weights = read_weights(file)
    return weights, arguments_of(arch, weights)


def check_plain(name: str, arch: str = "") -> None:
    """Refuse a model that is no plain ViT, by the TypeError of `check_encoder`, before it is built and data is read."""
    with torch.device("meta"):
        check_encoder(create_encoder(find_weights(name.removeprefix("random:"), arch)[0]))


def create_encoder(name: str, arguments: str = "", **options: Any) -> nn.Module:
    """Build a model by timm's name, ``hf-hub:ID`` or ``local-dir:FOLDER``; an unknown name is refused, with near ones.

    ``arguments`` are timm's options as a user types them, such as ``"patch_size=8 embed_dim=128"``.
    """
    typed = timm_arguments(arguments)
    try:
        return mvmae.create_model(name, **{**typed, **options})
    except (MemoryError, WeightsError):
        raise
    except Exception as error:  # timm checks few of its arguments
        given = f" with {arguments!r}" if arguments else ""
        cure = "check the name and the options"
        if isinstance(error, OSError) and ":" not in name:
            cure += f"; offline? give a local file of its weights with --arch {name}; random:{name} is untrained"
        raise Stop(f"{name} cannot be loaded{given} ({first_line(error)}): {cure}") from error


def timm_arguments(text: str) -> dict[str, Any]:
    """Read arguments for timm, such as ``"patch_size=8 embed_dim=128"``."""
    try:
        return {key: ast.literal_eval(value) for key, value in (part.split("=", 1) for part in text.split())}
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise Stop(f"arguments for timm must be like 'patch_size=8 embed_dim=128', got {text!r}") from error


def find_weights(name: str, arch: str = "") -> tuple[str, Path | None]:
    """Return the name of the model that timm builds, and the local file of its weights, if there is one.

    A folder or file that does not exist is refused, and so is a file of unknown architecture.
    """
    path = Path(name.removeprefix("local-dir:"))
    if path.is_dir():
        folder = next((path / part for part in ("encoder", "best", "") if _is_export(path / part)), None)
        if folder is not None and arch and "model_type" in read_json(folder / CONFIG_FILE):
            return arch, locate(folder, WEIGHTS_FILE)  # a kind of transformers' models that needs a name of timm
        if folder is None:
            cure = f"give the folder of a finished run, or one with {CONFIG_FILE} and {WEIGHTS_FILE}"
            if (path / "checkpoint.pt").exists():
                cure = "the run there has not ended: continue it by --resume; export.py writes the encoder of a pretraining"
            elif (path / ".lock").exists():
                cure = "the run there has not begun training"
            raise Stop(f"{path} holds no model: {cure}")
        return f"local-dir:{folder}", locate(folder, WEIGHTS_FILE)
    if path.is_file():
        if not arch and not _is_export(path.parent):
            raise Stop(f"{path} does not say its architecture: add --arch with its name in timm")
        return arch or f"local-dir:{path.parent}", path
    folders = ":" not in name and "/" in name  # no name of timm has one
    if folders or name.startswith(("local-dir:", ".", "/")) or path.suffix in (".safetensors", ".pth", ".pt"):
        raise Stop(f"there is no file or folder {path} (the current folder is {Path.cwd()})")
    return name, None


def _is_export(folder: Path) -> bool:
    config = read_json(folder / CONFIG_FILE, optional=True)
    return "architecture" in config or "model_type" in config  # timm's, or transformers'


def summary(model: Any, image_size: int = 0, name: str = "") -> str:
    """Return a line about a model as it was built, or a part of one: architecture, parameters, size of images and patches.

    ``image_size`` is given where it takes other images than it was built for; ``name``, as the user typed it, begins the line.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    patches: Any = getattr(model, "patch_embed", None)
    size = image_size or inputs_of(model).size
    parts = [name or cfg.get("architecture") or type(model).__name__]
    parts.append(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters")
    if isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList | nn.Sequential) and hasattr(model, "embed_dim"):
        parts.append(f"{len(blocks)} blocks of width {model.embed_dim}")
    parts.append("images of {}x{} pixels".format(*to_2tuple(size)))
    if hasattr(patches, "patch_size"):
        parts.append("patches of {}x{}".format(*to_2tuple(patches.patch_size)))
    parts += [said] if (said := getattr(model, "weights_from", "")) else []
    return ", ".join(parts)


def starting_weights(model: Any, name: str, arch: str = "") -> dict[str, str]:
    """Return which weights a run starts from, how they were trained and their licence, for exports and cards.

    Returns:
        Nothing for ``random:``. Else ``weights``, the name of what is at the root of their history; ``license``, "unknown"
        where none is recorded; ``repo`` on the Hub, where timm knows one; ``training``, what this package's exports say of
        it. Weights of this package that come from nothing have no ``weights``.
    """
    if name.startswith("random:"):
        return {}
    file, config = find_weights(name, arch)[1], _config_beside(name, arch)
    start, cfg = _texts(config.get("started_from")), _texts(config.get("pretrained_cfg") if config else model.pretrained_cfg)
    license, training = "" if file and not config else cfg.get("license", ""), _texts(config).get("training", "")
    if not start and not training:  # not of this package
        tagged = file is None and ":" not in name
        place = "/".join(Path(name.removeprefix("local-dir:")).absolute().parts[-2:]) if file else name  # publishes no path
        start = {"weights": f"{name.split('.')[0]}.{cfg['tag']}" if tagged and cfg.get("tag") else place, "license": "unknown"}
        repo = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else cfg.get("hf_hub_id", "") if tagged else ""
        start |= {"repo": repo} if "/" in repo.strip("/") else {}
    if license and not (hub.license_warning(start) and start.get("license") != "unknown"):  # a known restriction stays
        start["license"] = license
    return start | ({"training": training} if training else {})


def describe_start(name: str, start: Mapping[str, str]) -> str:
    """Return a line about the weights that a run starts from, of their name and of what `starting_weights` returns."""
    if not start:
        return "random"
    warning, license = hub.license_warning(start), start.get("license", "")
    terms = filter(None, ["" if "weights" in start else "yours", license])
    return f"{start.get('weights', name)} ({', '.join(terms)})" + (f": {warning}" if warning else "")


def _config_beside(name: str, arch: str) -> dict[str, Any]:
    """Read the config.json that lies beside a model's weights; empty where none does."""
    file = locate(name, CONFIG_FILE) if name.startswith("hf-hub:") else find_weights(name, arch)[1]
    return read_json(file.with_name(CONFIG_FILE), optional=True) if file else {}


def _texts(content: Any) -> dict[str, str]:
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def add_head(model: Any, num_classes: int, *, std: float) -> None:
    """Add a classifier with weights of a deviation of ``std``: to a ViT on the mean patch token, through a new norm (MAE)."""
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


def save_classifier(model: Any, folder: Path, class_names: Sequence[str], start: Mapping[str, str]) -> None:
    """Write a model with its head and the names of its classes, for ``timm.create_model("local-dir:FOLDER")``.

    ``start`` is what `starting_weights` returned.
    """
    license = start.get("license", "")
    about: dict[str, Any] = {"label_names": list(class_names), "started_from": dict(start), "training": classified(start)}
    try:
        hub.export(model, folder, license=license, **about)
    except TypeError:  # no plain ViT
        about |= {"pretrained_cfg": {"license": license}, INPUTS: inputs_of(model).to_dict()}
        timm.models.save_for_hf(model, str(folder), model_config=about, safe_serialization=True)


def classified(start: Mapping[str, str]) -> str:
    """Return how a classifier was trained, for its export, from the result of `starting_weights`."""
    return "fine-tuned for classification" if start else "trained for classification from random weights"
