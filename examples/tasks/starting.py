"""What a run starts from: an encoder and its weights, whose they are, and how gently they are trained further."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import mvmae
from engine.ends import Stop
from mvmae.data import colour
from mvmae.encoders import check_source
from mvmae.hub import license_warning, load_encoder
from mvmae.masked_vit import check_encoder
from mvmae.weights import CONFIG_FILE, first_line, locate, read_json
from tasks.backbones import create_encoder, find_weights

Config = TypeVar("Config", bound=Any)


def start_encoder(
    name: str,
    arguments: str = "",
    *,
    pretrained: bool = False,
    arch: str = "",
    image_size: Sequence[int] = (),
    in_chans: int = 3,
) -> Any:
    """Build the encoder that a run starts from, without a classifier head.

    Args:
        name: of timm, ``hf-hub:ID``, the folder of a run or an export (with ``local-dir:`` or not), or a file of weights.
        arguments: more of timm's options, as ``"patch_size=8 embed_dim=128"``.
        pretrained: with its weights.
        arch: timm's name of the model of a file, where no config.json lies beside it.
        image_size: in pixels, one side or (H, W); the model's own where empty.
        in_chans: channels; weights are adapted to them as timm does.

    Raises:
        Stop: if there is no such model or file, it is ``random:``, or the weights cannot be loaded.
        TypeError: if it is not a plain ViT.
        WeightsError: if the weights do not fit.
    """
    if name.startswith("random:"):
        cure = f"give {name.removeprefix('random:')!r}: pretrain.py starts from random weights, adapt.py with --no-pretrained"
        raise Stop(f"--encoder takes no 'random:', got {name!r}; {cure}")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
    if image_size:
        options["img_size"] = image_size[0] if len(image_size) == 1 else tuple(image_size)
    architecture, file = find_weights(name, arch)
    try:
        if name.startswith("hf-hub:"):
            check_source(name, weights=pretrained)
        with torch.device("meta"):
            check_encoder(create_encoder(architecture))  # before its arguments, which are a plain ViT's, and before a download
        encoder = create_encoder(architecture, arguments, pretrained=pretrained and file is None, **options)
    except (Stop, TypeError):  # TypeError: no plain ViT
        raise
    except Exception as error:  # what timm makes of a config can be anything
        raise Stop(f"{name} cannot be loaded ({first_line(error)})") from error
    check_encoder(encoder)
    if pretrained and file is not None:
        load_encoder(encoder, file)
    return encoder


def starting_weights(model: Any, name: str, arch: str = "") -> dict[str, str]:
    """Return which weights a run starts from, how they were trained and their licence, for exports and cards.

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
    file, config = find_weights(name, arch)[1], _config_beside(name, arch)
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


def _config_beside(name: str, arch: str) -> dict[str, Any]:
    """Read the config.json that lies beside a model's weights; empty where none does."""
    file = locate(name, CONFIG_FILE) if name.startswith("hf-hub:") else find_weights(name, arch)[1]
    described = file and file.with_name(CONFIG_FILE)
    return read_json(described) if described and described.is_file() else {}


def _texts(content: Any) -> dict[str, str]:
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def told(start: Mapping[str, str]) -> str:
    """Return a line about the origin of a run's weights and what their licence asks."""
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
    beside = _config_beside(name.removeprefix("random:"), arch)
    own = (beside.get("inputs") or beside).get("background")
    chosen: str = config.background or own or "white"
    colour(chosen)
    return dataclasses.replace(config, background=chosen)


def parameter_groups(model: mvmae.MultiViewMAE, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group all trained parameters: each layer of the encoder with a share of the learning rate, new parts with all of it.

    A layer's share, which timm's schedule applies, is ``layer_decay`` times that of the layer above (BEiT; MAE's fine-tuning).
    """
    encoder: Any = model.encoder
    fixed = tuple(encoder.no_weight_decay())
    layers = param_groups_layer_decay(encoder, weight_decay=weight_decay, no_weight_decay_list=fixed, layer_decay=layer_decay)
    groups: list[dict[str, Any]] = [{**group, "encoder": True} for group in layers]
    for part in (model.decoder, model.projector):
        new = param_groups_weight_decay(part, weight_decay=weight_decay, no_weight_decay_list=("mask_token",))
        groups += [{**group, "encoder": False} for group in new]
    return [group for group in groups if group["params"]]


class Stages:
    """What is trained in which steps, where the encoder or the contrastive loss has to wait.

    A random decoder's gradients would undo in a few steps what an encoder has learned. And features that the reconstruction has
    shaped are a better start for the contrastive loss than random ones (MAE-CT; Lehner et al., 2023).

    Args:
        model: the pretraining model; what needs no gradient stays so.
        frozen: number of first steps in which the encoder is not trained; its learning rate then warms up over as many.
        alone: number of first steps without the contrastive loss; none where the model never has it.
    """

    def __init__(self, model: mvmae.MultiViewMAE, *, frozen: int = 0, alone: int = 0) -> None:
        encoder: Any = model.encoder
        alone = alone if model.loss_weight else 0
        contrasted = {*encoder.fc_norm.parameters(), *model.projector.parameters()}
        self.first = {
            parameter: max(frozen if name.startswith("encoder.") else 0, alone if parameter in contrasted else 0)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (name.startswith("encoder.") or parameter in contrasted)
        }
        self.frozen, self.alone = frozen, alone

    def begins(self, step: int) -> bool:
        """Return whether a stage begins with this step."""
        return step in (self.frozen + 1, self.alone + 1)

    def contrasts(self, step: int) -> bool:
        """Return whether this step has the contrastive loss."""
        return step > self.alone

    def apply(self, step: int) -> None:
        """Freeze parameters or set them free, as befits this step."""
        for parameter, steps in self.first.items():
            parameter.requires_grad_(step > steps)

    def scale_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Scale the learning rates of the encoder, once the schedule has set them for this step."""
        if 0 < self.frozen < step <= 2 * self.frozen:
            for group in optimizer.param_groups:
                if group.get("encoder"):
                    group["lr"] *= (step - self.frozen) / (self.frozen + 1)
