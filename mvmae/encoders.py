"""The encoders under timm's names: importing this module registers ``mvmae_vit_*`` with timm."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from .patches import sincos_table


class SinCosVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """timm's `VisionTransformer` with the paper's initialisation: fixed sine-cosine positions, Xavier-uniform weights.

    Nothing but `init_weights` differs from timm's class: parameters, their names and their shapes, forward and options are
    timm's own. The positions are an ordinary parameter, so that timm resizes, casts and saves them; `MultiViewMAE` freezes
    them while it pretrains.
    """

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise weights (Section 4.1.1; MAE where silent): timm's modes on request, the paper's scheme by default."""
        super().init_weights(*args, **kwargs)
        if not (self.weight_init_mode or args or kwargs.get("mode")):
            self._init_as_in_the_paper()
        self._init_positions()

    def _init_as_in_the_paper(self) -> None:
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def _init_positions(self) -> None:
        if self.pos_embed is None or self.pos_embed.is_meta:
            return
        table = sincos_table(self.embed_dim, self.patch_embed.grid_size)
        prefix = self.pos_embed.shape[1] - len(table)
        with torch.no_grad():
            self.pos_embed.copy_(F.pad(table, (0, 0, prefix, 0))[None])


def checkpoint_filter(state_dict: Mapping[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Turn the weights of a checkpoint into those of an encoder, for timm's loader.

    Takes the encoder out of a pretraining checkpoint (``encoder.*``, or an MAE-layout file with its decoder and mask token),
    resizes positions and patch projection to the model as timm does, and moves the final norm where the model has it.

    Raises:
        ValueError: if weights of the encoder are missing, with their names: timm itself would leave them random.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    if any(key.startswith("encoder.") for key in state_dict):
        state_dict = {key[8:]: value for key, value in state_dict.items() if key.startswith("encoder.")}
    weights = {key: value for key, value in state_dict.items() if key != "mask_token" and not key.startswith("decoder")}
    weights = checkpoint_filter_fn(weights, model)
    source, wanted = ("norm", "fc_norm") if isinstance(model.norm, nn.Identity) else ("fc_norm", "norm")
    for name in ("weight", "bias"):
        if f"{wanted}.{name}" not in weights and f"{source}.{name}" in weights:
            weights[f"{wanted}.{name}"] = weights.pop(f"{source}.{name}")
    missing = [key for key in model.state_dict() if key not in weights and not key.startswith("head.")]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the encoder's weights ({', '.join(missing[:4])}, ...): "
            f"it holds {', '.join(list(state_dict)[:4]) or 'nothing'}, ...; is it a checkpoint of another model?"
        )
    return weights


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
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
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "mvmae_vit_tiny_patch16.untrained": _cfg(),
        "mvmae_vit_small_patch16.untrained": _cfg(),
        "mvmae_vit_base_patch16.in1k": _cfg(),
        "mvmae_vit_large_patch16.untrained": _cfg(),
        "mvmae_vit_huge_patch14.untrained": _cfg(),
    }
)


def _create_encoder(name: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> nn.Module:
    args = {"num_classes": 0, "global_pool": "avg", "fc_norm": False, **defaults, **kwargs}
    if args.pop("use_naflex", False):
        return _create_naflex(name, pretrained, args)
    model: nn.Module = build_model_with_cfg(
        SinCosVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter,
        feature_cfg={"out_indices": args.pop("out_indices", 3), "feature_cls": "getter"},
        **args,
    )
    return model


def _create_naflex(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    from timm.models.naflexvit import _create_naflexvit_from_classic

    model: Any = _create_naflexvit_from_classic(name, pretrained, **args)
    if not pretrained and not model.embeds.pos_embed.is_meta:
        _, rows, columns, width = model.embeds.pos_embed.shape
        with torch.no_grad():
            model.embeds.pos_embed.copy_(sincos_table(width, (rows, columns)).view(1, rows, columns, width))
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


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with ``mvmae_vit_*`` among its names. Arguments, result and errors are timm's."""
    model: nn.Module = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    return model
