"""Load other people's weights into an encoder or a pretraining model: completely, or not at all."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..files import WEIGHTS_FILE, WeightsError, first_line, locate
from ..masked_vit import check_encoder
from ..model import MultiViewMAE
from ..patches import sincos_table
from ..timm_weights import checkpoint_filter, encoder_prefix
from ..weights import PRETRAINING_FILE, check_weights, in_export, read_weights
from ..wrappers import plain_names, unwrap

MAE_NAMES = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}  # of the decoder in the checkpoints of MAE (He et al., 2022), and ours


def load_encoder(encoder: nn.Module, source: str | Path, *, revision: str | None = None) -> None:
    """Load an encoder's weights, resized and adapted to it as timm does.

    Args:
        encoder: a plain ViT of timm; after an error it is as it was.
        source: a file (safetensors, or PyTorch's with nothing but weights; timm's layout, MAE's, or a pretraining checkpoint
            of this package, with any prefix before the encoder's names), a folder that timm reads, or a repository of the Hub
            that holds ``model.safetensors``.
        revision: branch, tag or commit of the repository.

    Raises:
        TypeError: if the encoder is not a plain ViT.
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    path, encoder = _find(source, WEIGHTS_FILE, revision), unwrap(encoder)
    encoder.load_state_dict(_encoder_weights(read_weights(path), encoder, path))


def load_pretraining(model: MultiViewMAE, source: str | Path, *, revision: str | None = None) -> None:
    """Load the weights of a whole pretraining model, with positions resized as timm does.

    Args:
        model: a pretraining model; after an error it is as it was.
        source: a file (this package's, or MAE's with its decoder, with any prefix before all names), a folder or a repository
            of the Hub that hold ``pretraining.safetensors``.
        revision: branch, tag or commit of the repository.

    Raises:
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    path, model = _find(source, in_export(source, PRETRAINING_FILE), revision), cast(MultiViewMAE, unwrap(model))
    weights = plain_names(read_weights(path))
    try:
        prefix = encoder_prefix(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    root = prefix.removesuffix("encoder.")
    weights = {name[len(root) :]: value for name, value in weights.items() if name.startswith(root)}
    if "decoder_embed.weight" in weights:
        weights = _from_mae(weights, path)
    others = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
    if len(others) == len(weights):
        raise WeightsError(
            f"{path} must hold encoder.*, got {', '.join(list(weights)[:3])}, ...: use load_encoder for an encoder"
        )
    encoder = _encoder_weights(weights, model.encoder, path)
    weights = {**{f"encoder.{name}": value for name, value in encoder.items()}, **others}
    check_weights(weights, model.state_dict(), source=path)
    model.load_state_dict(weights)


def _find(source: str | Path, filename: str, revision: str | None) -> Path:
    return Path(source) if Path(source).is_file() else locate(source, filename, revision=revision)


def _encoder_weights(weights: Mapping[str, Tensor], encoder: nn.Module, path: Path) -> dict[str, Tensor]:
    vit = check_encoder(encoder)
    proj, chans = "patch_embed.proj.weight", vit.patch_embed.proj.in_channels
    try:
        weights = checkpoint_filter(weights, vit)
        if weights[proj].shape[1] != chans:
            weights[proj] = adapt_input_conv(chans, weights[proj])
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except NotImplementedError as error:
        raise WeightsError(
            f"{path} is for {weights[proj].shape[1]} channels, the encoder for {chans}: {first_line(error)}"
        ) from error
    own = {name: value for name, value in vit.state_dict().items() if name.startswith("head") and name not in weights}
    return {**weights, **own}


def _from_mae(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename the weights of an MAE checkpoint; its decoder's positions must be the fixed ones, which are not kept."""
    positions = weights.get("decoder_pos_embed")
    if positions is not None:
        side = math.isqrt(positions.shape[1])
        table = sincos_table(positions.shape[2], (side, side)).to(positions)
        if side * side + 1 != positions.shape[1] or not torch.allclose(positions[0, 1:], table, atol=1e-4):
            raise WeightsError(
                f"{path}: decoder_pos_embed must be the fixed sine-cosine table of a square grid: load its encoder alone"
            )
    renamed = {}
    for name, value in weights.items():
        if name != "decoder_pos_embed":
            prefix = next((prefix for prefix in MAE_NAMES if name.startswith(prefix)), None)
            renamed[f"encoder.{name}" if prefix is None else MAE_NAMES[prefix] + name[len(prefix) :]] = value
    return renamed
