"""Models as data: the name under which timm knows a ViT, the arguments in which it differs, and what is built around it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import timm
import timm.layers
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .encoders import TIMM_NAMES, SinCosVisionTransformer
from .files import WeightsError, building, check_sizes, first_line
from .masked_vit import PlainViT, check_encoder
from .projector import build_projector, describe_projector
from .wrappers import unwrap

DEFAULT_NAME = "vit_base_patch16_224"
REGULARISERS = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "decoder_dim": lambda model: model.decoder.embed.out_features,
    "decoder_depth": lambda model: len(model.decoder.blocks),
    "decoder_heads": lambda model: model.decoder.blocks[0].attn.num_heads if len(model.decoder.blocks) else 1,
    "mask_ratio": lambda model: model.mask_ratio,
    "loss_weight": lambda model: model.loss_weight,
    "temperature": lambda model: model.contrastive_loss.temperature,
    "gather": lambda model: model.contrastive_loss.gather,
    "chunk_size": lambda model: model.contrastive_loss.chunk_size,
    "pool": lambda model: model.pool,
    "norm_pix": lambda model: model.reconstruction_loss.norm_pix,
    "loss_on": lambda model: model.reconstruction_loss.loss_on,
}  # keyword arguments of MultiViewMAE, and where it holds them
RUN_TIME = ("device", "dtype", "num_classes", "weight_init", "fix_init")  # not what the weights are


def describe_encoder(vit: PlainViT, *, plain: bool = True) -> dict[str, Any]:
    """Return what ``timm.create_model`` needs to build a ViT like this one, in types that JSON can hold.

    Args:
        vit: a plain ViT of timm, changed since it was built or not.
        plain: describe the architecture alone, by a name that timm has without this package; otherwise by the name that it
            was built with, and with its dropout rates.

    Returns:
        ``architecture``, a name, ``model_args``, the keyword arguments that differ from its defaults, and ``num_classes``.

    Raises:
        WeightsError: if no arguments that JSON can hold rebuild it.
    """
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or DEFAULT_NAME
    own = {theirs: ours for ours, theirs in TIMM_NAMES.items()} if isinstance(vit, SinCosVisionTransformer) else {}
    name = TIMM_NAMES.get(name, name) if plain else own.get(name, name)
    if not timm.is_model(name):
        name = DEFAULT_NAME
    reference = _on_meta(name, {})
    current, default = _arguments(vit), _arguments(reference)
    recorded = getattr(vit, "_model_args", {})  # how timm built it, from 1.0.31 on: finds what no attribute tells
    args = {key: value for key, value in recorded.items() if key not in current and key not in RUN_TIME and _is_plain(value)}
    args |= {key: value for key, value in current.items() if value != default.get(key)}
    if "global_pool" in args:  # which decides fc_norm where nothing is said
        fc_norm = "use_fc_norm" if isinstance(vit, Eva) else "fc_norm"
        args[fc_norm] = current[fc_norm]
    if plain:
        args = {key: value for key, value in args.items() if key not in REGULARISERS}
    description = {"architecture": name, "model_args": args, "num_classes": vit.num_classes}
    _check_rebuilt(vit, _on_meta(name, args), description)
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    return description if plain else description | {key: list(cfg[key]) for key in ("mean", "std") if key in cfg}


def build_encoder(description: Mapping[str, Any]) -> nn.Module:
    """Build the untrained ViT that `describe_encoder` described.

    Raises:
        WeightsError: if the description is not of a ViT that timm knows.
    """
    name, args = description.get("architecture"), description.get("model_args", {})
    if not (isinstance(name, str) and timm.is_model(name)):
        raise WeightsError(
            f"architecture must be a ViT of timm {timm.__version__}, got {name!r}: upgrade timm, or correct the name"
        )
    with building(f"the arguments {args} of {name}"):
        kind = Eva if isinstance(_on_meta(name, {}), Eva) else VisionTransformer
        unknown = sorted(set(args) - set(inspect.signature(kind.__init__).parameters))
        if unknown:
            raise WeightsError(f"timm {timm.__version__} has no ViT arguments {', '.join(unknown)} (of {name}): upgrade timm")
        check_sizes(args, name)
        statistics = {key: tuple(description[key]) for key in ("mean", "std") if key in description}
        classes = description.get("num_classes", 0)
        model: nn.Module = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=statistics, **args)
    return model


def describe_pretraining(model: nn.Module) -> dict[str, Any]:
    """Return what rebuilds a `MultiViewMAE`, in types that JSON can hold.

    Returns:
        ``encoder``, the result of `describe_encoder`; ``projector``: the widths of its layers, or the layers, or its class,
        with a warning, if JSON cannot hold them, or None; ``options``, the other keyword arguments of `MultiViewMAE`.

    Raises:
        WeightsError: if JSON cannot hold the encoder.
    """
    encoder: Any = model.encoder
    return {
        "encoder": describe_encoder(check_encoder(unwrap(encoder)), plain=False),
        "projector": describe_projector(model.get_submodule("projector")),
        "options": {name: value(model) for name, value in OPTIONS.items()},
    }


def pretraining_arguments(description: Mapping[str, Any], projector: nn.Module | None = None) -> dict[str, Any]:
    """Build the arguments of `MultiViewMAE` from the result of `describe_pretraining`.

    Args:
        description: the result of `describe_pretraining`.
        projector: used instead of the described one.

    Raises:
        WeightsError: if it is not such a description, or its projector cannot be built and none is given.
    """
    try:
        encoder, head, options = dict(description["encoder"]), description["projector"], dict(description["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"this does not describe a pretraining model: {first_line(error)}") from error
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise WeightsError(f"the pretraining options {', '.join(unknown)} are unknown: upgrade mvmae")
    check_sizes({name: value for name, value in options.items() if name != "chunk_size"}, "the pretraining model")
    projector = build_projector(head) if projector is None else projector
    return {"encoder": build_encoder(encoder), "projector": projector, **options}


def _on_meta(name: str, args: Mapping[str, Any]) -> PlainViT:
    vit: PlainViT = timm.create_model(name, num_classes=0, device="meta", **args)
    return vit


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _arguments(vit: PlainViT) -> dict[str, Any]:
    """Derive the arguments of a ViT from its modules."""
    args = _shared_arguments(vit) | (_eva_arguments(vit) if isinstance(vit, Eva) else _vit_arguments(vit))
    return {key: value[0] if isinstance(value, list) and value[0] == value[1] else value for key, value in args.items()}


def _shared_arguments(vit: PlainViT) -> dict[str, Any]:
    embed, block = vit.patch_embed, vit.blocks[0]
    fc1, last = getattr(block.mlp, "fc1", None), vit.blocks[-1]
    args = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "qk_norm": not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity),
        "class_token": vit.cls_token is not None,
        "no_embed_class": vit.no_embed_class,
        "global_pool": vit.global_pool,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "proj_drop_rate": getattr(getattr(block.attn, "proj_drop", None), "p", 0.0),
        "attn_drop_rate": getattr(getattr(block.attn, "attn_drop", None), "p", 0.0),
        "drop_path_rate": round(getattr(getattr(last, "drop_path1", None), "drop_prob", None) or 0.0, 6),
    }
    return args | ({"mlp_ratio": fc1.out_features / vit.embed_dim} if fc1 is not None else {})


def _vit_arguments(vit: PlainViT) -> dict[str, Any]:
    block = vit.blocks[0]
    qkv = getattr(block.attn, "qkv", None)
    args = {
        "reg_tokens": vit.num_reg_tokens,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
    }
    if qkv is not None:
        args["qkv_bias"] = qkv.bias is not None
    if isinstance(getattr(block, "ls1", None), timm.layers.LayerScale):
        args["init_values"] = 1e-5  # where layer scale starts does not matter to weights that are loaded
    return args


def _eva_arguments(vit: PlainViT) -> dict[str, Any]:
    args = {
        "num_reg_tokens": vit.reg_token.shape[1] if vit.reg_token is not None else 0,
        "use_abs_pos_emb": vit.pos_embed is not None,
        "use_rot_pos_emb": vit.rope is not None,
        "use_pre_transformer_norm": not isinstance(vit.norm_pre, nn.Identity),
        "use_post_transformer_norm": not isinstance(vit.norm, nn.Identity),
        "use_fc_norm": not isinstance(vit.fc_norm, nn.Identity),
    }
    if getattr(vit.blocks[0], "gamma_1", None) is not None:
        args["init_values"] = 1e-5
    return args


def _check_rebuilt(vit: PlainViT, rebuilt: PlainViT, description: Mapping[str, Any]) -> None:
    ours, theirs = (_structure(model) for model in (vit, rebuilt))
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key):
            raise WeightsError(
                f"the encoder's {key} is {ours.get(key)}, but {theirs.get(key)} where timm builds it from {dict(description)}: "
                "build it by timm.create_model with arguments that JSON can hold"
            )


def _structure(vit: PlainViT) -> dict[str, str]:
    """Return all that determines what a ViT computes, except weights and classifier head."""
    modules = {name: repr(module) for name, module in vit.named_modules() if not list(module.children())}
    shapes = {name: str(tuple(value.shape)) for name, value in vit.state_dict().items()}
    return {
        name: value
        for name, value in {**modules, **shapes}.items()
        if name.partition(".")[0] not in ("head", "head_dist") and "drop" not in name.rpartition(".")[2]
    }
