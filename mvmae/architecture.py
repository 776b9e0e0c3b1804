"""Models as data, for files: the name and arguments by which timm builds a plain ViT, the options around it, and back."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import LayerScale
from timm.models import get_model_args
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .encoders import TIMM_NAMES, SinCosVisionTransformer
from .inputs import INPUTS, Inputs, set_inputs
from .losses import NTXentLoss, ReconstructionLoss
from .masked_vit import PlainViT, check_encoder
from .projector import build_projector, describe_projector
from .weights import (
    CONFIG_FILE,
    WeightsError,
    building,
    check_sizes,
    first_line,
    locate,
    plain_name,
    read_json,
    read_weights,
    sha256,
    write_json,
    write_weights,
)

DEFAULT_NAME = "vit_base_patch16_224"
PRETRAINING_FOLDER = "pretraining"  # in an exported folder, where timm looks for one .safetensors alone
PRETRAINING_FILE = "pretraining.safetensors"
PRETRAINING_CONFIG = "pretraining.json"
PRETRAINING_FORMAT = 1
OPTIONS = ("decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio", "loss_weight", "pool")
LOSSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    name: (kind, tuple(inspect.signature(kind).parameters))
    for name, kind in (("contrastive_loss", NTXentLoss), ("reconstruction_loss", ReconstructionLoss))
}  # of a `MultiViewMAE`: the class that a file can describe, and its options, each an attribute of the same name


def describe_encoder(vit: PlainViT, *, plain: bool = True) -> dict[str, Any]:
    """Return what ``timm.create_model`` needs to build a ViT like this one, in types that JSON can hold.

    timm records the arguments of a model that it builds by name, and later changes of size, pooling and classes; those of one
    that was built by hand are read off its modules. ``plain``: by a name that timm has without this package; else by its own,
    with its dropout rates and how images are read.

    Returns:
        ``architecture``, a name, ``model_args``, keyword arguments, and ``num_classes``.

    Raises:
        WeightsError: if no arguments that JSON can hold rebuild it.
    """
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    recorded, name = getattr(vit, "_model_args", None), cfg.get("architecture") or DEFAULT_NAME
    own = {theirs: ours for ours, theirs in reversed(TIMM_NAMES.items())} if isinstance(vit, SinCosVisionTransformer) else {}
    name = TIMM_NAMES.get(name, name) if plain else own.get(name, name)
    if not timm.is_model(name):
        name = DEFAULT_NAME
    args = get_model_args(vit) if recorded is not None else _shown_arguments(vit)
    if recorded is not None and not plain:  # which timm leaves out of exports
        args |= {key: value for key, value in recorded.items() if key.endswith(("drop_rate", "drop_path_rate"))}
    args["use_fc_norm" if isinstance(vit, Eva) else "fc_norm"] = not isinstance(vit.fc_norm, nn.Identity)
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items() if key in _parameters(vit)}
    args = {key: value for key, value in args.items() if isinstance(value, str | int | float | bool | list)}
    description = {"architecture": name, "model_args": args, "num_classes": vit.num_classes}
    with building(f"the arguments {args} of {name}"):
        rebuilt = timm.create_model(name, num_classes=0, device="meta", **args)
    ours, theirs = (_structure(model, drops=not plain) for model in (vit, rebuilt))
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key):
            raise WeightsError(
                f"the encoder's {key} is {ours.get(key)}, but {theirs.get(key)} where timm builds it from {description}: "
                "build it by timm.create_model with arguments that JSON can hold"
            )
    record = getattr(vit, INPUTS, None)
    read = {INPUTS: record.to_dict()} if record else {key: list(cfg[key]) for key in ("mean", "std") if key in cfg}
    return description if plain else description | read


def build_encoder(description: Mapping[str, Any]) -> nn.Module:
    """Build the untrained ViT that `describe_encoder` described, or raise a `WeightsError` if timm knows no such ViT."""
    name, args = description.get("architecture"), description.get("model_args", {})
    if not (isinstance(name, str) and timm.is_model(name)):
        raise WeightsError(
            f"architecture must be a ViT of timm {timm.__version__}, got {name!r}: upgrade timm, or correct the name"
        )
    with building(f"the arguments {args} of {name}"):
        unknown = sorted(set(args) - _parameters(timm.create_model(name, device="meta")))
        if unknown:
            raise WeightsError(f"timm {timm.__version__} has no ViT arguments {', '.join(unknown)} (of {name}): upgrade timm")
        check_sizes(args, name)
        statistics = {key: tuple(description[key]) for key in ("mean", "std") if key in description}
        classes = description.get("num_classes", 0)
        model: nn.Module = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=statistics, **args)
    if INPUTS in description:
        set_inputs(model, Inputs.from_config(description))
    return model


def _parameters(vit: Any) -> set[str]:
    """Return the names of the arguments of a ViT's class that say what it is."""
    kind: Any = Eva if isinstance(vit, Eva) else VisionTransformer
    others = {"self", "num_classes", "device", "dtype", "weight_init", "fix_init"}
    return set(inspect.signature(kind.__init__).parameters) - others


def _shown_arguments(vit: Any) -> dict[str, Any]:
    """Derive the arguments of a ViT that was built by hand from its modules."""
    if isinstance(vit, Eva):
        raise WeightsError("an Eva that was built by hand cannot be described: build it by timm.create_model")
    embed, block = vit.patch_embed, vit.blocks[0]
    return {
        "img_size": tuple(embed.img_size),
        "patch_size": tuple(embed.patch_size),
        "in_chans": vit.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,  # weights that are loaded replace it
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "global_pool": vit.global_pool,
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
    }


def _structure(vit: Any, *, drops: bool) -> dict[str, str]:
    """Return all that determines what a ViT computes, except weights and classifier head; with its dropout, if asked."""
    named = [(plain_name(name), module) for name, module in vit.named_modules()]
    modules = {name: repr(module) for name, module in named if not list(module.children())}
    shapes = {plain_name(name): str(tuple(value.shape)) for name, value in vit.state_dict().items()}
    heads = {f"{name}.num_heads": str(module.num_heads) for name, module in named if hasattr(module, "num_heads")}
    return {
        name: value
        for name, value in {**modules, **shapes, **heads}.items()
        if name.partition(".")[0] not in ("head", "head_dist") and (drops or "drop" not in name.rpartition(".")[2])
    }


def describe_pretraining(model: Any) -> dict[str, Any]:
    """Return what rebuilds a `MultiViewMAE`, in types that JSON can hold, or raise a `WeightsError` for its encoder.

    Of a projector or a loss that JSON cannot describe it holds the name of the class: such a module must be passed on loading.
    """
    blocks = model.decoder.blocks
    decoder = (model.decoder.embed.out_features, len(blocks), blocks[0].attn.num_heads if len(blocks) else 1)
    options = dict(zip(OPTIONS, (*decoder, model.mask_ratio, model.loss_weight, model.pool), strict=True))
    of_others = {}
    for name, (kind, own) in LOSSES.items():
        loss = getattr(model, name)
        if type(loss) is kind:
            options |= {option: getattr(loss, option) for option in own}
        else:
            of_others[name] = type(loss).__name__
    encoder = describe_encoder(check_encoder(model.encoder), plain=False)
    return {"encoder": encoder, "projector": describe_projector(model.projector), "options": options, **of_others}


def pretraining_arguments(description: Mapping[str, Any], **modules: nn.Module | None) -> dict[str, Any]:
    """Build the arguments of `MultiViewMAE` from the result of `describe_pretraining`, or raise a `WeightsError`.

    ``modules``, a projector, contrastive_loss or reconstruction_loss, take the place of what is described.
    """
    try:
        encoder, head, options = dict(description["encoder"]), description["projector"], dict(description["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"this does not describe a pretraining model: {first_line(error)}") from error
    if unknown := sorted(options.keys() - {*OPTIONS, *(option for _, own in LOSSES.values() for option in own)}):
        raise WeightsError(f"the pretraining options {', '.join(unknown)} are unknown: upgrade mvmae")
    check_sizes({name: value for name, value in options.items() if name != "chunk_size"}, "the pretraining model")
    built = {"projector": modules.get("projector") or build_projector(head)}
    for name, (kind, own) in LOSSES.items():
        given = {option: options.pop(option) for option in own if option in options}
        built[name] = modules.get(name)
        if built[name] is None:
            if name in description:
                kind_name = str(description[name])[:80]
                raise WeightsError(f"the {name}, a {kind_name}, cannot be built from a file: pass one like it as {name}=...")
            built[name] = kind(**given)
    return {"encoder": build_encoder(encoder), **built, **options}


def in_export(source: str | Path, filename: str) -> str:
    """Return the name of a file of a pretraining model within a folder: at its top, or where `export` writes it."""
    return filename if Path(source, filename).is_file() else f"{PRETRAINING_FOLDER}/{filename}"


def write_pretraining(folder: str | Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a pretraining model: ``pretraining.safetensors``, then ``pretraining.json`` with its description and checksum."""
    path = Path(folder) / PRETRAINING_FILE
    write_weights(path, weights)
    write_json(path.with_name(PRETRAINING_CONFIG), {"format": PRETRAINING_FORMAT, **description, "sha256": sha256(path)})


def read_pretraining(source: str | Path, *, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_pretraining` wrote, from a folder or the Hub: description and weights, or raise a `WeightsError`."""
    name = in_export(source, PRETRAINING_CONFIG)
    config = locate(source, name, revision=revision)
    description = read_json(config)
    if description.get("format") != PRETRAINING_FORMAT:
        raise WeightsError(
            f"{config} must have the format {PRETRAINING_FORMAT}, got {description.get('format')!r}: upgrade mvmae"
        )
    encoder = description.get("encoder")
    if name != PRETRAINING_CONFIG and isinstance(encoder, dict) and INPUTS not in encoder:  # an older export
        encoder[INPUTS] = Inputs.from_config(read_json(locate(source, CONFIG_FILE, revision=revision))).to_dict()
    path = locate(source, in_export(source, PRETRAINING_FILE), revision=revision)
    if sha256(path) != description.get("sha256"):
        raise WeightsError(f"{path} is not the file that {config.name} was written with (sha256 differs): get both again")
    return description, read_weights(path)
