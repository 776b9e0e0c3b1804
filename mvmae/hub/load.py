"""Load other people's weights into an encoder or a pretraining model: completely, or not at all."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..files import WEIGHTS_FILE, WeightsError, first_line, locate
from ..masked_vit import check_encoder
from ..model import MultiViewMAE
from ..patches import sincos_table
from ..timm_weights import checkpoint_filter, encoder_prefix
from ..vitmae import is_vitmae, vitmae_weights
from ..weights import PRETRAINING_FILE, check_tensors, check_weights, in_export, read_weights
from ..wrappers import plain_names, unwrap

MAE_NAMES = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}  # of the decoder in the checkpoints of MAE (He et al., 2022), and ours


def load_encoder(encoder: nn.Module, source: str | Path | Mapping[str, Tensor], *, revision: str | None = None) -> None:
    """Load an encoder's weights, resized and adapted to it as timm does.

    The layer norms keep their epsilon, which no weights hold. timm's ViTs have 1e-6, as MAE's code; transformers' ViTMAE has
    1e-12 unless its config says otherwise, and equals an encoder built with ``norm_layer=partial(nn.LayerNorm, eps=1e-12)``.

    Args:
        encoder: a plain ViT of timm; after an error it is as it was.
        source: a file (safetensors, or PyTorch's with nothing but weights; timm's layout, MAE's, that of transformers' ViTMAE
            with or without its decoder, or a pretraining checkpoint of this package, with any prefix before the encoder's
            names), a folder that timm reads or transformers' ``save_pretrained`` wrote for a ViTMAE, a repository of the Hub
            that holds ``model.safetensors``, or a state dict in one of these layouts.
        revision: branch, tag or commit of the repository.

    Raises:
        TypeError: if the encoder is not a plain ViT.
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    weights, place = _read(source, WEIGHTS_FILE, revision)
    encoder = unwrap(encoder)
    encoder.load_state_dict(_encoder_weights(weights, encoder, place))


def load_pretraining(model: MultiViewMAE, source: str | Path | Mapping[str, Tensor], *, revision: str | None = None) -> None:
    """Load the weights of a whole pretraining model, with positions resized as timm does.

    The layer norms of encoder and decoder keep their epsilon, 1e-6 (see `load_encoder`).

    Args:
        model: a pretraining model; after an error it is as it was.
        source: a file (this package's, or MAE's or transformers' ``ViTMAEForPreTraining``'s with its decoder, with any prefix
            before all names), a folder or a repository of the Hub that hold ``pretraining.safetensors``, a folder that
            transformers' ``save_pretrained`` wrote for a ``ViTMAEForPreTraining``, or a state dict in one of these layouts.
        revision: branch, tag or commit of the repository.

    Raises:
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    weights, path = _read(source, PRETRAINING_FILE, revision)
    model = cast(MultiViewMAE, unwrap(model))
    try:
        weights = vitmae_weights(plain_names(weights))
        prefix = encoder_prefix(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    root = prefix.removesuffix("encoder.")
    weights = {name[len(root) :]: value for name, value in weights.items() if name.startswith(root)}
    if any(name.startswith("decoder_embed.") for name in weights):
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


def _read(source: str | Path | Mapping[str, Tensor], filename: str, revision: str | None) -> tuple[dict[str, Tensor], Path]:
    """Return the weights, and where they are, for messages."""
    if isinstance(source, Mapping):
        return check_tensors(dict(source), "the state dict"), Path("the state dict")
    path, folder = Path(source), str(source).removeprefix("local-dir:")
    if not path.is_file():
        if filename == PRETRAINING_FILE:
            filename = WEIGHTS_FILE if is_vitmae(folder) else in_export(source, filename)
        path = locate(source, filename, revision=revision)
    return read_weights(path), path


def _encoder_weights(weights: Mapping[str, Tensor], encoder: nn.Module, path: Path) -> dict[str, Tensor]:
    vit = check_encoder(encoder)
    proj, chans = "patch_embed.proj.weight", vit.patch_embed.proj.in_channels
    try:
        weights = checkpoint_filter(weights, vit)
        if weights[proj].shape[1] != chans:
            weights[proj] = adapt_input_conv(chans, weights[proj])
        if weights[proj].shape[1] != chans:  # timm lets weights of any number of channels through to 3
            raise NotImplementedError("weights of 3 channels alone can be adapted")
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
        table = F.pad(sincos_table(positions.shape[2], (side, side)), (0, 0, 1, 0)).to(positions)  # none for the class token
        if table.shape != positions.shape[1:] or not torch.allclose(positions[0], table, atol=1e-4):
            got = "" if positions.any() else ", got zeros, as in a ViTMAE that was built from a config and never trained"
            raise WeightsError(
                f"{path}: decoder_pos_embed must be the fixed sine-cosine table of a square grid{got}: load its encoder alone"
            )
    renamed = {}
    for name, value in weights.items():
        if name != "decoder_pos_embed":
            prefix = next((prefix for prefix in MAE_NAMES if name.startswith(prefix)), None)
            renamed[f"encoder.{name}" if prefix is None else MAE_NAMES[prefix] + name[len(prefix) :]] = value
    return renamed
