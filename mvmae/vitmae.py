"""transformers' ViTMAE: its weights under the names of MAE's code, its ``config.json`` as arguments of timm."""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import CONFIG_FILE, WeightsError, check_sizes, locate, read_json

ARCHITECTURE = "mvmae_vit_base_patch16"  # whose loader takes any layout
NAMES = [
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
]  # of transformers, in memory and as 4.x and 5.x save them, and of MAE
OWN = re.compile(r"(^|\.)embeddings\.(cls_token|position_embeddings|patch_embeddings\.projection\.(weight|bias))$")
PARTS = ("query", "key", "value")
ARGUMENTS = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_ratio": ("intermediate_size", 3072),
}  # of timm, their names in ViTMAEConfig and its defaults; intermediate_size is a width


def vitmae_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' ViTMAE to those of MAE's code, with one matrix for query, key and value.

    Weights of any other model stay as they are.

    Raises:
        WeightsError: if a query, a key or a value is missing or of another shape, with its name.
    """
    if not any(OWN.search(name) for name in weights):
        return dict(weights)
    renamed: dict[str, Tensor] = {}
    fused: dict[str, dict[str, str]] = {}
    for name in weights:
        ours = reduce(lambda text, rule: re.sub(rule[0], rule[1], text), NAMES, name)
        if part := re.search(r"\.attn\.(query|key|value)\.", ours):
            fused.setdefault(ours.replace(part[0], ".attn.qkv."), {})[part[1]] = name
        else:
            renamed[ours] = weights[name]
    for ours, found in fused.items():
        got = [f"{found[part]} {tuple(weights[found[part]].shape)}" if part in found else f"no {part}" for part in PARTS]
        parts = [weights[found[part]] for part in PARTS if part in found]
        if len(parts) < len(PARTS) or len({part.shape for part in parts}) > 1:
            raise WeightsError(f"query, key and value must be there in one shape, got {', '.join(got)}: get the file again")
        renamed[ours] = torch.cat(parts)
    if not any(name.endswith(".bias") for name in fused):  # qkv_bias=False, which the package's decoder does not have
        for name in fused:
            if "decoder_blocks." in name:
                renamed[name.replace(".weight", ".bias")] = renamed[name].new_zeros(len(renamed[name]))
    return renamed


def is_vitmae(folder: str | Path) -> bool:
    """Return whether a folder is one that transformers' ``save_pretrained`` wrote for a ViTMAE."""
    config = Path(folder) / CONFIG_FILE
    return config.is_file() and read_json(config).get("model_type") == "vit_mae"


def vitmae_arguments(config: Path) -> dict[str, Any] | None:
    """Return timm's arguments for the encoder that a ``config.json`` of ViTMAE describes; None for that of another model.

    Raises:
        WeightsError: if a value of it fits no encoder.
    """
    content = read_json(config)
    if content.get("model_type") != "vit_mae":
        return None
    args = {ours: content.get(theirs, default) for ours, (theirs, default) in ARGUMENTS.items()}
    for name, value in args.items():
        sides = value if name in ("img_size", "patch_size") and isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(side) is int and side > 0 for side in sides):
            raise WeightsError(f"{config}: {ARGUMENTS[name][0]} must be a positive integer, got {value!r:.80}: get it again")
    check_sizes(args, config)
    if (activation := content.get("hidden_act", "gelu")) != "gelu":
        raise WeightsError(
            f"{config}: hidden_act must be 'gelu', got {activation!r:.80}: build the encoder by timm.create_model with "
            "act_layer, and load the weights by mvmae.hub.load_encoder"
        )
    return args | {"mlp_ratio": args["mlp_ratio"] / args["embed_dim"], "qkv_bias": content.get("qkv_bias", True) is not False}


def timm_model(name: str, cache_dir: str | Path | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name by which timm builds a model, and arguments for it: of a ViTMAE, else the same name and none.

    Args:
        name: of timm, or ``local-dir:FOLDER`` or ``hf-hub:owner/name``.
        cache_dir: where downloads are kept.
    """
    if not name.startswith(("local-dir:", "hf-hub:")):
        return name, {}
    args = vitmae_arguments(locate(name, CONFIG_FILE, cache_dir=cache_dir))
    if args is None:
        return name, {}
    source, _, place = name.partition(":")
    where = {"source": source, "file": place} if source == "local-dir" else {"hf_hub_id": place}
    return ARCHITECTURE, args | {"pretrained_cfg_overlay": where}
