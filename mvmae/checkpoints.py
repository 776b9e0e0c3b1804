"""Other people's checkpoints as weights of a timm ViT: their names by one table, then sizes as timm adapts them.

A new layout is a new entry of `LAYOUTS`. Known beside timm's own: MAE's (He et al., 2022), transformers' ViTMAE, and this
package's pretraining model; each under any prefix that a framework put before the names of one encoder: that needs no entry.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from .weights import WeightsError, check_sizes, check_weights, first_line, plain_name, read_json

_logger = logging.getLogger(__name__)
PROJ = "patch_embed.proj.weight"


LAYOUTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "transformers' ViTMAE": (  # in memory, and in files of 4.x and 5.x
        r"(^|\.)embeddings\.(cls_token|position_embeddings|patch_embeddings\.projection\.(weight|bias))$",
        (
            (r"(^|\.)vit\.(?=embeddings\.|encoder\.layer\.|layers\.|layernorm\.)", r"\1"),
            (r"(^|\.)decoder\.(?=mask_token$|decoder_)", r"\1"),
            (r"(^|\.)embeddings\.patch_embeddings\.projection\.", r"\1patch_embed.proj."),
            (r"(^|\.)embeddings\.position_embeddings$", r"\1pos_embed"),
            (r"(^|\.)embeddings\.cls_token$", r"\1cls_token"),
            (r"(^|\.)layernorm\.", r"\1norm."),
            (r"(^|\.|decoder_)(?:encoder\.layer|layers)\.(?=\d)", r"\1blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.query."),
            (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.key."),
            (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.value."),
            (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
        ),
    ),
}
"""For each kind of checkpoint, the pattern of a name that it alone has, and patterns with replacements that make its names
those of MAE's code, which are timm's, and ``decoder_*``. They are applied in order, each to the result of the one before; where
that has ``attn.query``, ``attn.key`` and ``attn.value``, these three become ``attn.qkv``."""
MAE_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}  # of the decoder in MAE's checkpoints, and ours
PARTS = ("query", "key", "value")
VITMAE_ARGUMENTS = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_ratio": ("intermediate_size", 3072),
}  # of timm, their names in transformers' ViTMAEConfig and its defaults; intermediate_size is a width


def pretraining_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of any known layout under the names of `MultiViewMAE`.

    The encoder's begin with ``encoder.``, whatever stood before them. Those of MAE's decoder become ``decoder.*``, its fixed
    positions ``decoder.pos_embed``. What stands beside a prefix is left out.

    Raises:
        WeightsError: if there are several encoders, adapters that are not merged, or a query, key or value is missing.
    """
    weights = {plain_name(name): value for name, value in weights.items()}
    for known_by, patterns in LAYOUTS.values():
        if any(re.search(known_by, name) for name in weights):
            weights = _renamed(weights, patterns)
    prefix = _encoder_prefix(weights)
    root = prefix.removesuffix("encoder.")
    with_decoder = any(name.startswith(f"{prefix}decoder") for name in weights)  # at the encoder's level, as in MAE's code
    found = {}
    for name, value in weights.items():
        if not name.startswith(root):
            continue
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            short = name.removeprefix(root)
        elif with_decoder and (part := next(filter(short.startswith, MAE_DECODER), None)):
            short = MAE_DECODER[part] + short.removeprefix(part)
        elif not short.startswith("decoder"):
            short = f"encoder.{short}"
        found[short] = value
    return found


def _renamed(weights: Mapping[str, Tensor], patterns: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[str, str]] = {}  # of each matrix for query, key and value, the names of its parts
    for name, value in weights.items():
        ours = name
        for pattern, replacement in patterns:
            ours = re.sub(pattern, replacement, ours)
        if part := re.search(r"\.attn\.(query|key|value)\.", ours):
            split.setdefault(ours.replace(part[0], ".attn.qkv."), {})[part[1]] = name
        else:
            renamed[ours] = value
    for ours, names in split.items():
        got = [f"{names[part]} {tuple(weights[names[part]].shape)}" if part in names else f"no {part}" for part in PARTS]
        parts = [weights[names[part]] for part in PARTS if part in names]
        if len(parts) < len(PARTS) or len({part.shape for part in parts}) > 1:
            raise WeightsError(f"query, key and value must be there in one shape, got {', '.join(got)}: get the file again")
        renamed[ours] = torch.cat(parts)
    if split and not any(name.endswith(".bias") for name in split):  # our decoder's blocks always have a bias there
        for name in split:
            if "decoder_blocks." in name:
                renamed[name.replace(".weight", ".bias")] = renamed[name].new_zeros(len(renamed[name]))
    return renamed


def _encoder_prefix(weights: Mapping[str, Any]) -> str:
    """Return what stands before the names of the one encoder among the weights: ``encoder.``, nothing, or a framework's."""
    if any(".lora_A." in name or ".base_layer." in name for name in weights):
        raise WeightsError("adapters of peft must be merged first: save the state dict of model.merge_and_unload()")
    found = [match[1] for name in weights if (match := re.fullmatch(r"(|.*\.)patch_embed\.proj\.weight", name))]
    if known := [prefix for prefix in ("encoder.", "") if prefix in found]:
        return known[0]
    if len(found) > 1:
        raise WeightsError(
            f"the checkpoint must hold one encoder, got several under {', '.join(found)}: save the state dict of one of them"
        )
    return found[0] if found else "encoder." if any(name.startswith("encoder.") for name in weights) else ""


def checkpoint_filter(state_dict: Mapping[str, Any], model: "VisionTransformer | Eva") -> dict[str, Tensor]:
    """Convert the weights of a checkpoint for timm's loader: `encoder_weights`, of images of the size that timm's cfg says."""
    height, width = model.pretrained_cfg["input_size"][1:]
    return encoder_weights(state_dict, model, (height, width))


def encoder_weights(
    state_dict: Mapping[str, Any], model: "VisionTransformer | Eva", size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Convert the weights of a checkpoint of any known layout to those of an encoder.

    Takes the encoder out of a pretraining checkpoint, resizes positions and patch projection to the model as timm does, and
    moves the final norm where the model has it. Weights do not say whether their positions are of a square grid or of a
    rectangle: where ``size``, the height and width of their images, does not either, they are taken for a square's.

    Raises:
        WeightsError: if weights of the encoder are missing, unexpected or of another shape, with their names: timm itself
            would leave some of them random.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    named = pretraining_names(state_dict).items()
    own = {name.removeprefix("encoder."): value for name, value in named if name.startswith("encoder.")}
    own.pop("mask_token", None)  # of a MAE without its decoder; timm's filter would take the file for one of DINOv2
    positions = own.pop("pos_embed", None)
    try:
        weights: dict[str, Tensor] = (eva_filter if isinstance(model, Eva) else vit_filter)(own, model)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"the checkpoint's positions or patches cannot be resized ({first_line(error)})") from error
    if positions is not None:
        weights["pos_embed"] = positions if model.pos_embed is None else _resized(positions, own.get(PROJ), model, size)
    source, wanted = ("norm", "fc_norm") if isinstance(model.norm, nn.Identity) else ("fc_norm", "norm")
    for name in ("weight", "bias"):
        if f"{wanted}.{name}" not in weights and f"{source}.{name}" in weights:
            weights[f"{wanted}.{name}"] = weights.pop(f"{source}.{name}")
    expected = model.state_dict()  # but for what timm itself adapts afterwards: the numbers of classes and of channels
    head = ("head.weight", "head.bias")
    fits = all(key in weights and key in expected and weights[key].shape == expected[key].shape for key in head)
    if not fits and (not model.num_classes or model.num_classes != getattr(model, "pretrained_cfg", {}).get("num_classes")):
        if head[0] in weights:
            classes = len(weights[head[0]])
            _logger.warning("the checkpoint's head of %d classes is left out: the model has %d", classes, model.num_classes)
        for key in head:
            weights.pop(key, None)
            expected.pop(key, None)
    if PROJ in weights and weights[PROJ].shape[2:] == expected[PROJ].shape[2:]:
        expected[PROJ] = expected[PROJ][:, :1].expand(-1, weights[PROJ].shape[1], -1, -1)
    check_weights(weights, expected, source="the checkpoint")
    return weights


def _resized(positions: Tensor, proj: Tensor | None, model: Any, size: tuple[int, int] | None) -> Tensor:
    """Resize positions (1, tokens, D) of images of ``size`` pixels to the grid of a model, as timm does."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    count, grid = positions.shape[1] - prefix, None
    if size and proj is not None and proj.ndim == 4:
        rows, columns = (pixels // patch for pixels, patch in zip(size, proj.shape[2:], strict=True))
        grid = (rows, columns) if rows * columns == count else None
    wanted = model.patch_embed.grid_size
    if grid is None and count == wanted[0] * wanted[1] and wanted[0] != wanted[1]:
        raise WeightsError(
            f"positions of {count} patches do not say whether they are of {wanted[0]} x {wanted[1]}: give the size of the "
            "images, size=(H, W), or load from a folder with its config.json"
        )
    if grid is None and math.isqrt(max(count, 0)) ** 2 != count:
        return positions  # of another shape than the model's
    try:
        return resample_abs_pos_embed(positions, wanted, grid, prefix)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise WeightsError(f"the checkpoint's positions cannot be resized ({first_line(error)})") from error


def vitmae_arguments(config: Path) -> dict[str, Any] | None:
    """Return timm's arguments for the encoder that a ``config.json`` of transformers' ViTMAE describes.

    None for that of another model, or where there is no such file. A `WeightsError` names a value that fits no encoder.
    """
    content = read_json(config) if config.is_file() else {}
    if content.get("model_type") != "vit_mae":
        return None
    args = {ours: content.get(theirs, default) for ours, (theirs, default) in VITMAE_ARGUMENTS.items()}
    for name, value in args.items():
        sides = value if name in ("img_size", "patch_size") and isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(side) is int and side > 0 for side in sides):
            theirs = VITMAE_ARGUMENTS[name][0]
            raise WeightsError(f"{config}: {theirs} must be a positive integer, got {value!r:.80}: get it again")
    check_sizes(args, config)
    if (activation := content.get("hidden_act", "gelu")) != "gelu":
        raise WeightsError(
            f"{config}: hidden_act must be 'gelu', got {activation!r:.80}: build the encoder by timm.create_model with "
            "act_layer, and load the weights by mvmae.hub.load_encoder"
        )
    return args | {"mlp_ratio": args["mlp_ratio"] / args["embed_dim"], "qkv_bias": content.get("qkv_bias", True) is not False}


def timm_model(name: str, config: Path) -> tuple[str, dict[str, Any]]:
    """Return the name by which timm builds ``local-dir:FOLDER`` or ``hf-hub:ID``, and arguments: of a ViTMAE, else none."""
    args = vitmae_arguments(config)
    if args is None:
        return name, {}
    source, _, place = name.partition(":")
    where = {"source": source, "file": place} if source == "local-dir" else {"hf_hub_id": place}
    return "mvmae_vit_base_patch16", args | {"pretrained_cfg_overlay": where}  # a name whose loader takes any layout
