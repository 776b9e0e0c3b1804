"""How a file of weights fits an encoder of timm: where the weights are, their names, which weights are refused."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import resolve_pretrained_cfg
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from .files import WEIGHTS_FILE, WeightsError, first_line, locate
from .vitmae import vitmae_weights
from .weights import check_weights, read_weights
from .wrappers import plain_names

HUB_OWNER = ""  # who keeps the published weights on the Hub; empty while there are none
_logger = logging.getLogger(__name__)


def hub_owner() -> str:
    """Return the owner of the Hub's repositories ``<owner>/<model>.<tag>``: ``MVMAE_HUB_OWNER``, or `HUB_OWNER`."""
    return os.environ.get("MVMAE_HUB_OWNER") or HUB_OWNER


def checkpoint_filter(state_dict: Mapping[str, Any], model: "VisionTransformer | Eva") -> dict[str, Tensor]:
    """Convert the weights of a checkpoint to those of an encoder, for timm's loader.

    Takes the encoder out of a pretraining checkpoint (``encoder.*``, an MAE-layout file with its decoder and mask token, that
    of transformers' ViTMAE, or any prefix that a framework put before one encoder's names),
    resizes positions and patch projection to the model as timm does, and moves the final norm where the model has it.

    Raises:
        WeightsError: if weights of the encoder are missing, unexpected or of another shape, with their names: timm itself
            would leave some of them random.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = vitmae_weights(plain_names(state_dict))
    prefix = encoder_prefix(state_dict)
    state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    kept = {key: value for key, value in state_dict.items() if key != "mask_token" and not key.startswith("decoder")}
    try:
        weights: dict[str, Tensor] = (eva_filter if isinstance(model, Eva) else vit_filter)(kept, model)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"the checkpoint's positions or patches cannot be resized ({first_line(error)})") from error
    source, wanted = ("norm", "fc_norm") if isinstance(model.norm, nn.Identity) else ("fc_norm", "norm")
    for name in ("weight", "bias"):
        if f"{wanted}.{name}" not in weights and f"{source}.{name}" in weights:
            weights[f"{wanted}.{name}"] = weights.pop(f"{source}.{name}")
    _check_encoder_weights(weights, model)
    return weights


def _check_encoder_weights(weights: dict[str, Tensor], model: "VisionTransformer | Eva") -> None:
    """Check all but what timm itself adapts afterwards: another number of classes, another number of channels."""
    expected = model.state_dict()
    head = ("head.weight", "head.bias")
    fits = all(key in weights and key in expected and weights[key].shape == expected[key].shape for key in head)
    if not fits and (not model.num_classes or model.num_classes != getattr(model, "pretrained_cfg", {}).get("num_classes")):
        if head[0] in weights:
            classes = len(weights[head[0]])
            _logger.warning("the checkpoint's head of %d classes is left out: the model has %d", classes, model.num_classes)
        for key in head:
            weights.pop(key, None)
            expected.pop(key, None)
    proj = "patch_embed.proj.weight"
    if proj in weights and weights[proj].shape[2:] == expected[proj].shape[2:]:
        expected[proj] = expected[proj][:, :1].expand(-1, weights[proj].shape[1], -1, -1)
    check_weights(weights, expected, source="the checkpoint")


def encoder_prefix(weights: Mapping[str, Any]) -> str:
    """Return the prefix of the names of an encoder's weights: ``encoder.``, nothing, or another framework's.

    Raises:
        WeightsError: if there are several encoders, with their prefixes, or adapters that are not merged.
    """
    if any(".lora_A." in name or ".base_layer." in name for name in weights):
        raise WeightsError("adapters of peft must be merged first: save the state dict of model.merge_and_unload()")
    found = [
        re.sub(r"patch_embed\.proj\.weight$", "", name)
        for name in weights
        if re.search(r"(^|\.)patch_embed\.proj\.weight$", name)
    ]
    known = [prefix for prefix in ("encoder.", "") if any(name.startswith(prefix) for name in weights)]
    chosen = next((prefix for prefix in known if prefix in found or not found), found[0] if found else "")
    if chosen not in ("encoder.", "") and len(found) > 1:
        raise WeightsError(
            f"the checkpoint must hold one encoder, got several under {', '.join(found)}: save the state dict of one of them"
        )
    return chosen


def find_weights(
    name: str, cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any, in_chans: int | None
) -> tuple[str, dict[str, Any], dict[str, Tensor] | None]:
    """Read the weights of a pretrained cfg, with clearer errors than timm's own reader.

    Returns:
        The place, for messages; the overlay for the cfg that fits the weights; and the weights, or None if timm reads them.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(name, cfg, overlay)
    if cfg.state_dict or (cfg.custom_load and not cfg.source) or (cfg.url and not (cfg.file or cfg.hf_hub_id)):
        return "the checkpoint", overlay, None
    if not cfg.has_weights:
        if not hub_owner():
            raise WeightsError(
                f"there are no weights for {name}.{cfg.tag}: none of this method have been published; pretrain with "
                "examples/pretrain.py, or name a file by pretrained_cfg_overlay=dict(file=...), or the owner of a copy on the "
                "Hub by MVMAE_HUB_OWNER"
            )
        cfg.hf_hub_id = overlay["hf_hub_id"] = f"{hub_owner()}/{name}.{cfg.tag}"
    if cfg.source == "local-dir":
        path = locate(cfg.file, WEIGHTS_FILE)
    elif cfg.file and cfg.source != "hf-hub":
        path = Path(cfg.file)
    else:
        overlay["hf_hub_filename"] = cfg.hf_hub_filename or WEIGHTS_FILE
        path = locate(cfg.hf_hub_id, overlay["hf_hub_filename"], cache_dir=cache_dir)
    weights = read_weights(path)
    if cfg.file and not cfg.source and "head.weight" in weights:
        overlay.setdefault("num_classes", len(weights["head.weight"]))
    projections = ("patch_embed.proj.weight", "patch_embeddings.projection.weight")  # the second is ViTMAE's
    proj = next((value for key, value in weights.items() if key.endswith(projections) and value.ndim == 4), None)
    if proj is not None and proj.shape[1] not in (1, 3):  # what timm before 1.0.31 takes for 3 channels
        overlay.setdefault("input_size", (proj.shape[1], *cfg.input_size[1:]))
        if in_chans in (None, proj.shape[1]):
            overlay["first_conv"] = None
    return str(path), overlay, weights
