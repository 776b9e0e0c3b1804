"""What is known of other people's checkpoints: the families of projects by the names in their files, and transformers' configs.

A new project is a new entry of `FAMILIES`; `mvmae.checkpoints` converts what they describe.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .weights import WeightsError, check_sizes, read_json

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Family(NamedTuple):
    """What the names in a checkpoint say of it, and what they do not.

    Attributes:
        known_by: patterns, each of a name that it has; all of them together no other family has.
        names: patterns with replacements that make its names timm's, applied in order, each to the result of the one before;
            ``attn.query``, ``attn.key`` and ``attn.value`` then become ``attn.qkv``.
        mean_std: with which its images were normalised; None where the projects that use these names differ.
        pool: the vector that its authors probe, as the scripts' ``--pool`` has it; empty where they differ.
        heads: number of attention heads for a width that timm's ViT of that width does not have.
    """

    known_by: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    pool: str = ""
    heads: Mapping[int, int] = {}


TRANSFORMERS = (  # in memory, and in files of 4.x and 5.x
    (r"(^|\.)(?:vit|deit|dinov2\w*|beit|ijepa|data2vec_vision)\.(?=(embeddings|encoder|layers|layernorm|pooler)\.)", r"\1"),
    (r"(^|\.)decoder\.(?=mask_token$|decoder_)", r"\1"),
    (r"(^|\.)embeddings\.patch_embeddings\.(?:projection\.)?", r"\1patch_embed.proj."),
    (r"(^|\.)embeddings\.position_embeddings$", r"\1pos_embed"),
    (r"(^|\.)embeddings\.distillation_token$", r"\1dist_token"),
    (r"(^|\.)embeddings\.(?=(cls_token|mask_token|register_tokens)$)", r"\1"),
    (r"(^|\.)pooler\.layernorm\.", r"\1fc_norm."),
    (r"(^|\.)layernorm\.", r"\1norm."),
    (r"(^|\.)(?:encoder\.)?(?:relative|shared)_position_bias\.(?=relative_position_bias_table$)", r"\1rel_pos_bias."),
    (r"(^|\.|decoder_)(?:encoder\.layer|layers)\.(?=\d)", r"\1blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"(blocks\.\d+)\..*rel\w*\.(?=relative_position_bias_table$)", r"\1.attn."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)
EMBEDDINGS = r"(^|\.)embeddings\."
FAMILIES: dict[str, Family] = {
    "MoCo v3": Family((r"(^|\.)(base|momentum)_encoder\.",), (), IMAGENET, "token", {384: 12}),
    "CAE": Family((r"(^|\.)pretext_neck\.",), (), IMAGENET, "token", {384: 12}),
    "SimMIM": Family((r"^encoder\.mask_token$",), (), IMAGENET, "avg"),
    "BEiT or alike": Family((r"\.attn\.q_bias$", r"relative_position_bias_table$"), pool="avg"),
    "I-JEPA": Family((r"^target_encoder\.",), (), IMAGENET, "avg"),
    "DINOv3": Family((r"(^|\.)storage_tokens$",), pool="token"),
    "DINOv2": Family(
        (r"(^|\.)(?<!decoder\.)mask_token$", r"(^|\.)blocks\.\d+\.(\d+\.)?ls1\.gamma$"),
        ((r"(^|\.)blocks\.\d+\.(?=\d+\.)", r"\1blocks."),),  # in chunks for FSDP
        IMAGENET,
        "token",
    ),
    "DINO or iBOT": Family((r"^teacher\.(module\.)?backbone\.",), (), IMAGENET, "token"),
    "MAE": Family((r"(^|\.)decoder_pos_embed$",), (), IMAGENET, "token"),
    "CLIP": Family((r"(^|\.)visual\.class_embedding$",), pool="token"),
    "torchvision's ViT": Family(
        (r"(^|\.)conv_proj\.weight$", r"encoder_layer_0\."),
        (
            (r"(^|\.)class_token$", r"\1cls_token"),
            (r"(^|\.)conv_proj\.", r"\1patch_embed.proj."),
            (r"(^|\.)encoder\.pos_embedding$", r"\1pos_embed"),
            (r"(^|\.)encoder\.layers\.encoder_layer_", r"\1blocks."),
            (r"(^|\.)encoder\.ln\.", r"\1norm."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
            (r"(^|\.)heads\.head\.", r"\1head."),
        ),
        IMAGENET,
        "token",
    ),
    "mmpretrain": Family(
        (r"(^|\.)patch_embed\.projection\.weight$", r"(^|\.)layers\.\d+\.ffn\.layers\.0\.0\.weight$"),
        (
            (r"(^|\.)patch_embed\.projection\.", r"\1patch_embed.proj."),
            (r"(^|\.)layers\.(\d+)\.ln([12])\.", r"\1layers.\2.norm\3."),
            (r"(^|\.)(?:ln1|norm1)\.(?=\w+$)(?<!\d\.norm1\.)", r"\1norm."),
            (r"(^|\.)ln2\.", r"\1fc_norm."),
            (r"(^|\.)layers\.(?=\d+\.(norm|attn|ffn))", r"\1blocks."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
            (r"\.(?:attn|ffn)\.gamma([12])\.(?:weight|scale)$", r".ls\1.gamma"),
        ),
    ),
    "transformers' DINOv3": Family(
        (EMBEDDINGS + r"patch_embeddings\.weight$",),
        (
            (r"(^|\.)(?:model\.)?layer\.(?=\d)", r"\1layers."),
            (r"(^|\.)embeddings\.register_tokens$", r"\1storage_tokens"),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
        None,
        "token",
    ),
    "transformers' DINOv2": Family((EMBEDDINGS + "mask_token$", r"layer_scale1\."), (), IMAGENET, "token"),
    "transformers' DeiT": Family((EMBEDDINGS + "distillation_token$",), (), IMAGENET, "token"),
    "transformers": Family((EMBEDDINGS + r"patch_embeddings\.",), TRANSFORMERS),
}
"""The first that a checkpoint's names fit says what is known of it; the names are those of all that fit, in this order."""
FIRST = ("encoder", "", "base_encoder", "teacher", "backbone", "model", "student", "momentum_encoder", "target_encoder")
"""Where several encoders fit a model equally well, which is taken, as the projects themselves and timm do."""
NOT_OF_ENCODER = re.compile(
    r"(head|heads|head_dist|fc|lm_head|cls_pt_layers|pooler|classifier|decoder\w*|mask_token|masked_embed|predictor|projector)(\.|$)"
    r"|.*(relative_position_index|bias_mask|rope_embed\.periods)$"
)  # of pretraining and of classifiers, and what a model computes itself
MAE_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}  # of the decoder in MAE's checkpoints, and ours
PARTS = ("query", "key", "value")
TRANSFORMERS_ARGUMENTS = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_ratio": ("intermediate_size", 3072),
}  # of timm, their names in transformers' configs and the defaults; intermediate_size is a width
TRANSFORMERS_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_mae": ("mvmae_vit_base_patch16", {}),
    "vit": ("vit_base_patch16_224", {}),
    "deit": ("deit_base_distilled_patch16_224", {}),
    "ijepa": ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "dinov2": ("vit_base_patch14_dinov2", {}),
    "dinov2_with_registers": ("vit_base_patch14_reg4_dinov2", {"reg_tokens": 4}),
    "dinov3_vit": ("vit_base_patch16_dinov3_qkvb", {}),
    "beit": ("beit_base_patch16_224", {}),
    "data2vec-vision": ("beit_base_patch16_224", {}),
}  # the model_type in a config.json: timm's name of a model of its class, and arguments


def transformers_model(config: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the name and arguments by which timm builds the encoder that a ``config.json`` of transformers describes.

    None for that of another library, or where there is no such file. A `WeightsError` names a value that fits no encoder, or
    the kind of a model that is not known.
    """
    content = read_json(config, optional=True)
    kind = content.get("model_type")
    if kind is None or "architecture" in content:
        return None
    cure = "build the encoder by timm.create_model and load the weights by mvmae.hub.load_encoder; in a script add --arch with "
    cure += "its name in timm"
    if kind not in TRANSFORMERS_MODELS:
        known = ", ".join(TRANSFORMERS_MODELS)
        raise WeightsError(f"{config}: of transformers' models {known} are known, got {kind!r:.80}: {cure}")
    name, more = TRANSFORMERS_MODELS[kind]
    args = {ours: content.get(theirs, default) for ours, (theirs, default) in TRANSFORMERS_ARGUMENTS.items()}
    if kind.startswith("dinov2") and isinstance(args["embed_dim"], int):  # whose mlp_ratio is one
        args["mlp_ratio"] = content.get("mlp_ratio", 4) * args["embed_dim"]
    for key, value in args.items():
        sides = value if key in ("img_size", "patch_size") and isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(side) is int and side > 0 for side in sides):
            theirs = TRANSFORMERS_ARGUMENTS[key][0]
            raise WeightsError(f"{config}: {theirs} must be a positive integer, got {value!r:.80}: get it again")
    check_sizes(args, config)
    for theirs, wanted in {"hidden_act": "gelu", "use_swiglu_ffn": False, "use_gated_mlp": False}.items():
        if (value := content.get(theirs, wanted)) != wanted:
            raise WeightsError(f"{config}: {theirs} must be {wanted!r}, got {value!r:.80}: {cure}")
    args |= {"mlp_ratio": args["mlp_ratio"] / args["embed_dim"], "num_classes": 0, **more}
    if kind.startswith("dinov3"):
        args["num_reg_tokens"] = content.get("num_register_tokens", 0)
    elif "reg_tokens" in more:
        args["reg_tokens"] = content.get("num_register_tokens", 4)
    elif name.startswith("beit"):
        tables = [content.get(f"use_{kind}relative_position_bias", False) for kind in ("", "shared_")]
        args |= {"use_abs_pos_emb": content.get("use_absolute_position_embeddings", False), "use_rel_pos_bias": any(tables)}
        args["global_pool"] = "avg" if content.get("use_mean_pooling", True) else "token"
    else:
        args["qkv_bias"] = content.get("qkv_bias", True) is not False
    return name, args


def timm_model(name: str, config: Path) -> tuple[str, dict[str, Any]]:
    """Return the name by which timm builds ``local-dir:FOLDER`` or ``hf-hub:ID``, and arguments: none but of transformers."""
    found = transformers_model(config)
    if found is None:
        return name, {}
    source, _, place = name.partition(":")
    where = {"source": source, "file": place} if source == "local-dir" else {"hf_hub_id": place}
    overlay = {"pretrained_cfg_overlay": where} if found[0].startswith("mvmae") else {}  # whose loader takes any layout
    return found[0], found[1] | overlay
