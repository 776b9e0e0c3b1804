"""The encoders under timm's names: importing this module registers ``mvmae_vit_*`` with timm."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checkpoints import checkpoint_filter
from .patches import sincos_table
from .weights import WEIGHTS_FILE, WeightsError, in_file, locate, read_weights, sha256

TIMM_NAMES = {
    "mvmae_vit_tiny_patch16": "vit_tiny_patch16_224",
    "mvmae_vit_small_patch16": "vit_small_patch16_224",
    "mvmae_vit_base_patch16": "vit_base_patch16_224",
    "mvmae_vit_large_patch16": "vit_large_patch16_224",
    "mvmae_vit_huge_patch14": "vit_huge_patch14_224",
    "mvmae_vit_micro_patch8_64": "vit_tiny_patch16_224",  # with other arguments
}  # the same architectures under the names that timm has without this package
SHIPPED = {"mvmae_vit_micro_patch8_64.cifar10": "c0a2d1769b04e892204ed143970c2be8e7ecbd90fcb7ada5932df976a0a26dd3"}
"""The weights in ``pretrained/``, in float16, with their checksums (SHA-256)."""
PRETRAINED = Path(__file__).parent / "pretrained"


class SinCosVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """timm's `VisionTransformer` with the paper's initialisation: fixed sine-cosine positions, Xavier-uniform weights.

    Nothing but `init_weights` differs from timm's class. The positions are an ordinary parameter, so that timm resizes, casts
    and saves them; `MultiViewMAE` freezes them while it pretrains.
    """

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise weights (Section 4.1.1; MAE where silent): timm's modes on request, the paper's scheme by default."""
        super().init_weights(*args, **kwargs)
        if not (self.weight_init_mode or args or kwargs.get("mode")):
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
            for module in self.blocks.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
            for token in (self.cls_token, self.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=0.02)
        if self.pos_embed is not None and not self.pos_embed.is_meta:
            table = sincos_table(self.embed_dim, self.patch_embed.grid_size).to(self.pos_embed.dtype)
            with torch.no_grad():
                self.pos_embed.copy_(F.pad(table, (0, 0, self.pos_embed.shape[1] - len(table), 0)))  # 0 for the prefix


CFG = {
    "url": "",
    "num_classes": 0,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
    "paper_name": "Multi-View Masked Autoencoder for General Image Representation",
    "origin_url": "https://doi.org/10.3390/app132212413",
}
UNTRAINED = {f"{name}.untrained": CFG for name in TIMM_NAMES if name not in {tagged.partition(".")[0] for tagged in SHIPPED}}
WITH_WEIGHTS = {name: CFG | {"file": str(PRETRAINED / f"{name}.safetensors"), "input_size": (3, 64, 64)} for name in SHIPPED}
SIMCLR = {
    **{key: CFG[key] for key in ("url", "interpolation", "crop_pct")},
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "pool_size": (7, 7),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "first_conv": "conv1",
    "classifier": "fc",
    "paper_name": "A Simple Framework for Contrastive Learning of Visual Representations",
    "origin_url": "https://github.com/google-research/simclr",
}
OTHERS = {f"simclr_resnet50x{width}": SIMCLR for width in (1, 2, 4)}
default_cfgs = generate_default_cfgs(UNTRAINED | WITH_WEIGHTS | OTHERS)


def _create_encoder(name: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> nn.Module:
    args = {"global_pool": "avg", "fc_norm": False, **defaults, **kwargs}
    place, weights = "", None
    if pretrained:
        place, args["pretrained_cfg_overlay"], weights = _find_weights(
            name, args.get("pretrained_cfg"), args.get("pretrained_cfg_overlay"), args.get("cache_dir")
        )
    if args.pop("use_naflex", False):
        return _create_naflex(name, pretrained, args)
    with in_file(place):
        model: Any = _build(name, pretrained, args) if weights is None else _build_with(weights, name, args)
    model.pretrained_cfg["architecture"] = TIMM_NAMES[name]  # so that timm's own saver writes what plain timm can rebuild
    model._model_args = {**getattr(model, "_model_args", {}), "fc_norm": args["fc_norm"]}
    return model  # type: ignore[no-any-return]


def _find_weights(
    name: str, cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor] | None]:
    """Read the weights of a pretrained cfg: their place, the overlay of a cfg that fits, and they, or None where timm reads."""
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(name, cfg, overlay)
    if cfg.state_dict or (cfg.custom_load and not cfg.source) or (cfg.url and not (cfg.file or cfg.hf_hub_id)):
        return "the checkpoint", overlay, None
    if not cfg.has_weights:
        raise WeightsError(
            f"no weights of {name} exist: take {next(iter(SHIPPED))}, which comes with this package, timm's "
            "vit_base_patch16_224.mae (not for commercial use), or your own: local-dir:RUN/encoder, hf-hub:owner/name, or "
            "pretrained_cfg_overlay=dict(file=...)"
        )
    if cfg.source == "local-dir":
        path = locate(cfg.file, WEIGHTS_FILE)
    elif cfg.file and cfg.source != "hf-hub":
        path = Path(cfg.file)
    else:
        overlay["hf_hub_filename"] = cfg.hf_hub_filename or WEIGHTS_FILE
        path = locate(cfg.hf_hub_id, overlay["hf_hub_filename"], cache_dir=cache_dir)
    if path.parent == PRETRAINED and sha256(path) != SHIPPED.get(path.stem):
        raise WeightsError(f"{path} is not the file of this version (sha256 differs): install mvmae again")
    weights = read_weights(path)
    if cfg.file and not cfg.source and "head.weight" in weights:
        overlay.setdefault("num_classes", len(weights["head.weight"]))
    projections = ("patch_embed.proj.weight", "patch_embeddings.projection.weight")  # the second is ViTMAE's
    proj = next((value for key, value in weights.items() if key.endswith(projections) and value.ndim == 4), None)
    if proj is not None:  # from which timm adapts the projection to the model's channels
        overlay.setdefault("input_size", (proj.shape[1], *cfg.input_size[1:]))
    return str(path), overlay, weights


def _build(name: str, pretrained: bool, args: dict[str, Any], filter_fn: Any = checkpoint_filter) -> Any:
    features = {"out_indices": args.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        SinCosVisionTransformer, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **args
    )


def _build_with(weights: dict[str, Tensor], name: str, args: dict[str, Any]) -> nn.Module:
    """Build an encoder with weights that have been read; timm's loader adapts them as if it had read them."""
    overlay = args.pop("pretrained_cfg_overlay")
    source = resolve_pretrained_cfg(name, args.get("pretrained_cfg"), overlay).source
    unread = {**overlay, "source": "", "state_dict": {"": torch.empty(0)}}
    model = _build(name, True, args | {"pretrained_cfg_overlay": unread}, lambda _, vit: checkpoint_filter(weights, vit))
    for part in model.modules():
        if (cfg := getattr(part, "pretrained_cfg", {})).pop("state_dict", None):
            cfg |= {"source": source} if source else {}
    return model  # type: ignore[no-any-return]


def _create_naflex(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    from timm.models.naflexvit import _create_naflexvit_from_classic

    model: Any = _create_naflexvit_from_classic(name, pretrained, **args)
    if not pretrained and not model.embeds.pos_embed.is_meta:
        _, rows, columns, width = model.embeds.pos_embed.shape
        with torch.no_grad():
            table = sincos_table(width, (rows, columns)).to(model.embeds.pos_embed.dtype)
            model.embeds.pos_embed.copy_(table.view(1, rows, columns, width))
    return model  # type: ignore[no-any-return]


@register_model
def mvmae_vit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Tiny, patches of 16 pixels: 5.5 M parameters, 192 features."""
    return _create_encoder("mvmae_vit_tiny_patch16", pretrained, kwargs, patch_size=16, embed_dim=192, depth=12, num_heads=3)


@register_model
def mvmae_vit_small_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Small, patches of 16 pixels: 21.7 M parameters, 384 features."""
    return _create_encoder("mvmae_vit_small_patch16", pretrained, kwargs, patch_size=16, embed_dim=384, depth=12, num_heads=6)


@register_model
def mvmae_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Base, patches of 16 pixels, the paper's encoder (Section 3.1.3): 85.8 M parameters, 768 features."""
    return _create_encoder("mvmae_vit_base_patch16", pretrained, kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


@register_model
def mvmae_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Large, patches of 16 pixels: 303.3 M parameters, 1024 features."""
    return _create_encoder("mvmae_vit_large_patch16", pretrained, kwargs, patch_size=16, embed_dim=1024, depth=24, num_heads=16)


@register_model
def mvmae_vit_huge_patch14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Huge, patches of 14 pixels: 630.8 M parameters, 1280 features."""
    return _create_encoder("mvmae_vit_huge_patch14", pretrained, kwargs, patch_size=14, embed_dim=1280, depth=32, num_heads=16)


@register_model
def mvmae_vit_micro_patch8_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Micro, patches of 8 pixels, images of 64: 1.8 M parameters, 192 features. Its weights come with this package."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
    model: Any = _create_encoder("mvmae_vit_micro_patch8_64", pretrained, {**sizes, **kwargs})
    model._model_args = {**sizes, **getattr(model, "_model_args", {})}  # which are not those of the name that it is exported by
    return model  # type: ignore[no-any-return]


class SimCLRResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet-50 with all channels times ``width``, the stem's too, where timm's always has 64 (Chen et al., 2020)."""

    def __init__(self, *, width: int, layers: tuple[int, ...] = (3, 4, 6, 3), **kwargs: Any) -> None:
        super().__init__(Bottleneck, layers, channels=tuple(width * planes for planes in (64, 128, 256, 512)), **kwargs)
        stem, block = 64 * width, self.layer1[0]
        place: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.conv1 = nn.Conv2d(self.in_chans, stem, kernel_size=7, stride=2, padding=3, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(stem, **place)
        block.conv1 = nn.Conv2d(stem, block.conv1.out_channels, kernel_size=1, bias=False, **place)
        block.downsample[0] = nn.Conv2d(stem, block.downsample[0].out_channels, kernel_size=1, bias=False, **place)
        self.feature_info[0]["num_chs"] = stem
        self.init_weights()


def _create_simclr(width: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    name = f"simclr_resnet50x{width}"
    model: nn.Module = build_model_with_cfg(
        SimCLRResNet, name, pretrained, pretrained_filter_fn=checkpoint_filter, width=width, **kwargs
    )
    return model


@register_model
def simclr_resnet50x1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SimCLR's ResNet-50, with images that are not normalised: 23.5 M parameters, 2048 features."""
    return _create_simclr(1, pretrained, kwargs)


@register_model
def simclr_resnet50x2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SimCLR's ResNet-50 of twice the width, with images that are not normalised: 93.9 M parameters, 4096 features."""
    return _create_simclr(2, pretrained, kwargs)


@register_model
def simclr_resnet50x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SimCLR's ResNet-50 of four times the width, with images that are not normalised: 375 M parameters, 8192 features."""
    return _create_simclr(4, pretrained, kwargs)
