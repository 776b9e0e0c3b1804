"""Other people's checkpoints as weights of a timm model: which of their encoders, its names, sizes as timm adapts them.

A new project is a new entry of `mvmae.families`; a new prefix before the names of one encoder needs none. What timm itself
converts (DINOv2, EVA, CLIP, Swin, ConvNeXt, ...) goes through timm's own ``checkpoint_filter_fn``.
"""

import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .families import FAMILIES, FIRST, MAE_DECODER, NOT_OF_ENCODER, PARTS, Family
from .patches import sincos_table
from .weights import WeightsError, check_weights, first_line, plain_name

_logger = logging.getLogger(__name__)
PROJ = "patch_embed.proj.weight"


def pretraining_names(weights: Mapping[str, Tensor], encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of any known layout under the names of `MultiViewMAE`, with such an encoder.

    The encoder's begin with ``encoder.``, whatever stood before them. Those of MAE's decoder become ``decoder.*``, its fixed
    positions ``decoder.pos_embed``. A `WeightsError` names several encoders, or adapters that are not merged.
    """
    weights = _timm_names(weights)
    prefix = _encoder_prefix(weights, encoder)
    root = prefix.removesuffix("encoder.")
    with_decoder = any(name.startswith(f"{prefix}decoder") for name in weights)  # at the encoder's level, as in MAE's code
    found = {}
    for name, value in weights.items():
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            short = name.removeprefix(root)
        elif with_decoder and (part := next(filter(short.startswith, MAE_DECODER), None)):
            short = MAE_DECODER[part] + short.removeprefix(part)
        elif not short.startswith("decoder"):
            short = f"encoder.{short}"
        if name.startswith(root):
            found[short] = value
    return found


def family_of(weights: Mapping[str, Tensor]) -> tuple[str, Family]:
    """Return the name of the family that weights are of, empty where they do not say it, and what is known of it."""
    for name, family in FAMILIES.items():
        if _known(weights, family):
            return name, family
    for name, positions in weights.items():  # no names of their own, but fixed sine-cosine positions
        if re.search(r"(^|\.)pos_embed$", name) and positions.ndim == 3 and positions.shape[2] % 4 == 0:
            side = math.isqrt(positions.shape[1])
            table = sincos_table(positions.shape[2], (side, side))
            found = positions[0, positions.shape[1] - side**2 :].to(table)
            if torch.allclose(found, table, atol=1e-4):
                return "MAE or alike", FAMILIES["MAE"]
            if torch.allclose(found, table.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1), atol=1e-4):
                return "MoCo v3", FAMILIES["MoCo v3"]  # whose positions have rows and columns swapped
    return "", Family(())


def _known(weights: Mapping[str, Any], family: Family) -> bool:
    return all(any(re.search(pattern, name) for name in weights) for pattern in family.known_by)


def checkpoint_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return arguments for timm that a checkpoint's encoder has beside the name of its architecture."""
    heads, weights = family_of(weights)[1].heads, _timm_names(weights)
    width = next((value.shape[-1] for name, value in weights.items() if name.endswith("cls_token")), 0)
    arguments: dict[str, Any] = {"num_heads": heads[width]} if width in heads else {}
    if any(re.search(r"blocks\.0\.(gamma_1|ls1\.gamma)$", name) for name in weights):
        arguments["init_values"] = 1e-5
    if any(name.endswith("blocks.0.attn.q_bias") for name in weights):  # of BEiT's line
        parts = {"use_abs_pos_emb": r"(^|\.)pos_embed$", "use_rel_pos_bias": "relative_position_bias_table$"}
        arguments |= {key: any(re.search(pattern, name) for name in weights) for key, pattern in parts.items()}
    return arguments


def _timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all weights of a checkpoint under the names that timm's, or MAE's, code has for them, with their prefixes."""
    weights = {plain_name(name): value for name, value in weights.items()}
    if any(".lora_A." in name or ".base_layer." in name for name in weights):
        raise WeightsError("adapters of peft must be merged first: save the state dict of model.merge_and_unload()")
    for family in [family for family in FAMILIES.values() if _known(weights, family)]:
        weights = _renamed(weights, family.names)
    return weights


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
    if not any(ours.endswith(".bias") and "key" in names for ours, names in split.items()):  # BEiT's and DINOv3's have none
        for ours, names in split.items():
            if ours.endswith(".bias") and "query" in names:
                names["key"] = f"key of {ours}"
                weights = {**weights, names["key"]: torch.zeros_like(weights[names["query"]])}
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


def checkpoint_filter(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Convert the weights of a checkpoint for timm's loader: `encoder_weights`, of images of the size that timm's cfg says."""
    return encoder_weights(state_dict, model, tuple(model.pretrained_cfg["input_size"][1:]))


def encoder_weights(state_dict: Mapping[str, Any], model: Any, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Convert the weights of a checkpoint of any known layout to those of a model of timm.

    Positions and patch projection are resized as timm does, and the final norm moves where the model has it. Without ``size``,
    height and width of the checkpoint's images, its positions are taken for those of a square.

    Raises:
        WeightsError: if weights are missing, unexpected or of another shape, with their names: timm itself would leave some of
            them random; or if the model has other heads than the encoder.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    family, known = family_of(state_dict)
    weights, expected = _timm_names(state_dict), model.state_dict()
    prefix = _encoder_prefix(weights, expected)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    heads = known.heads.get(getattr(model, "embed_dim", 0))
    if heads and isinstance(model, VisionTransformer | Beit) and model.blocks[0].attn.num_heads != heads:
        raise WeightsError(
            f"{family}'s ViT of width {model.embed_dim} has {heads} heads, the model {model.blocks[0].attn.num_heads}: build "
            f"it with num_heads={heads}"
        )
    stem, narrow = (len(conv) if (conv := weights.get("conv1.weight")) is not None else 0 for weights in (own, expected))
    if stem > narrow > 0:
        raise WeightsError(
            f"the checkpoint's ResNet has a stem of {stem} channels, the model of {narrow}: build simclr_resnet50x{stem // 64}"
        )
    own = _as_model_has_them(own, expected)
    of_vit = isinstance(model, VisionTransformer | Eva | Beit)
    positions = own.pop("pos_embed", None) if of_vit else None
    module = next(m for c in type(model).__mro__ if (m := sys.modules[c.__module__]).__name__.startswith(("timm.", "torch.")))
    try:
        weights = getattr(module, "checkpoint_filter_fn", lambda own, _: own)(own, model)
    except (RuntimeError, ValueError, LookupError, AttributeError) as error:
        raise WeightsError(f"the checkpoint's weights cannot be brought to the model's sizes ({first_line(error)})") from error
    if positions is not None:
        weights["pos_embed"] = positions if model.pos_embed is None else _resized(positions, own.get(PROJ), model, size)
    for part in ("weight", "bias") if of_vit else ():
        source, wanted = (f"{name}.{part}" for name in ("norm", "fc_norm"))
        source, wanted = (source, wanted) if isinstance(model.norm, nn.Identity) else (wanted, source)
        if wanted not in weights and source in weights:
            weights[wanted] = weights.pop(source)
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}  # what timm itself adapts: the numbers of classes and of channels
    classifiers = cfg.get("classifier") or "head"
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    head = [f"{name}.{part}" for name in classifiers for part in ("weight", "bias")]
    fits = all(key in weights and key in expected and weights[key].shape == expected[key].shape for key in head)
    if not fits and (not model.num_classes or model.num_classes != cfg.get("num_classes")):
        if head[0] in weights:
            classes = len(weights[head[0]])
            _logger.warning("the checkpoint's head of %d classes is left out: the model has %d", classes, model.num_classes)
        for key in head:
            weights.pop(key, None)
            expected.pop(key, None)
    first = f"{cfg.get('first_conv') or 'patch_embed.proj'}.weight"
    if first in weights and first in expected and weights[first].shape[2:] == expected[first].shape[2:]:
        expected[first] = expected[first][:, :1].expand(-1, weights[first].shape[1], -1, -1)
    weights = {name: value for name, value in weights.items() if name in expected or not NOT_OF_ENCODER.match(name)}
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}  # not in old files
    weights = {**counters, **weights}
    check_weights(weights, expected, source="the checkpoint")
    return weights


def _encoder_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return what stands before the names of an encoder: of the prefixes that cover most of a model, the first in `FIRST`.

    One that lacks a weight is not passed over for another, so that the missing name is seen. Several are logged.
    """
    counts = Counter(name[: match.end()] for name in weights for match in re.finditer(r"\.", name))
    prefixes = ["", *(prefix for prefix, count in counts.items() if 2 * count >= len(expected))]
    covered = {prefix: sum(f"{prefix}{name}" in weights for name in expected) for prefix in prefixes}
    most = max(covered.values())

    def rank(prefix: str) -> int:
        return min((FIRST.index(part) for part in prefix[:-1].split(".") if part in FIRST), default=len(FIRST))

    found = sorted((prefix for prefix in prefixes if 2 * covered[prefix] >= most), key=rank)
    taken, *others = found if most else [""]
    others = [prefix for prefix in others if 10 * covered[prefix] >= 9 * most]  # a decoder's blocks cover less
    if any(rank(prefix) == rank(taken) for prefix in others):
        raise WeightsError(
            f"the checkpoint must hold one encoder, got several under {taken}, {', '.join(others)}: save the state dict of one "
            "of them"
        )
    if others:
        told = "taking the encoder %s of the checkpoint, not %s: to take that, save it in a file of its own"
        _logger.warning(told, taken, ", ".join(others))
    return taken


def _as_model_has_them(own: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring biases, layer scale, registers and relative positions of an encoder to the forms in which a model has them."""
    weights = {name: value for name, value in own.items() if value.numel()}  # transformers saves no registers as none
    if "reg_token" in expected and "register_tokens" in weights:  # DINOv2's, whose class token alone has a position
        positions = weights["pos_embed"]
        weights["cls_token"], weights["pos_embed"] = weights["cls_token"] + positions[:, :1], positions[:, 1:]
        weights["reg_token"] = weights.pop("register_tokens")
    merged: list[str] = []
    for name in list(weights):
        value, block = weights[name], name.rpartition(".attn.")[0]
        if name.endswith(".attn.qkv.bias") and name not in expected and f"{block}.attn.qkv.weight" in expected:
            mask = weights.get(f"{name}_mask")
            query, key, value = (value if mask is None else value * mask).chunk(3)
            wanted = {f"{block}.attn.q_bias": query, f"{block}.attn.v_bias": value}
            has_them = wanted.keys() <= expected.keys()
            if key.any() or not (has_them or not (query.any() or value.any())):
                raise WeightsError(
                    f"{name} is not zero, and the model has no place for it: build one with that bias, as timm's *_dinov3_qkvb"
                )
            weights |= wanted if has_them else {}
            merged += [name]
        elif name.endswith(".attn.q_bias") and f"{block}.attn.qkv.bias" in expected and f"{block}.attn.v_bias" in weights:
            weights[f"{block}.attn.qkv.bias"] = torch.cat([value, torch.zeros_like(value), weights[f"{block}.attn.v_bias"]])
            merged += [name, f"{block}.attn.v_bias"]
        elif part := re.search(r"\.(?:gamma_|ls)([12])(?:\.gamma)?$", name):
            forms = [name[: part.start()] + form for form in (f".ls{part[1]}.gamma", f".gamma_{part[1]}")]
            if name not in expected and (form := next((form for form in forms if form in expected), None)):
                weights[form] = weights.pop(name)
    weights = {name: value for name, value in weights.items() if name not in merged}
    tables = [name for name in expected if name.endswith(".attn.relative_position_bias_table")]
    if tables and "rel_pos_bias.relative_position_bias_table" in weights:  # shared: as fine-tuning by its authors starts
        shared = weights.pop("rel_pos_bias.relative_position_bias_table")
        weights |= dict.fromkeys(tables, shared)
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
