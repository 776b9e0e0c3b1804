"""Load other people's weights into an encoder or a pretraining model: completely, or not at all."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..architecture import PRETRAINING_CONFIG, PRETRAINING_FILE, in_export
from ..checkpoints import encoder_weights, pretraining_names, vitmae_arguments
from ..inputs import INPUTS
from ..masked_vit import check_encoder
from ..model import MultiViewMAE
from ..patches import sincos_table
from ..weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    WeightsError,
    check_tensors,
    in_file,
    load_weights,
    locate,
    read_json,
    read_weights,
)


def load_encoder(
    encoder: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
) -> None:
    """Load an encoder's weights, resized and adapted to it as timm does.

    The layer norms keep their epsilon, which no weights hold. timm's ViTs have 1e-6, as MAE's code; transformers' ViTMAE has
    1e-12 unless its config says otherwise, and equals an encoder built with ``norm_layer=partial(nn.LayerNorm, eps=1e-12)``.

    Args:
        encoder: a plain ViT of timm; after an error it is as it was.
        source: a file (safetensors, or PyTorch's with nothing but weights), a folder that timm reads or transformers'
            ``save_pretrained`` wrote for a ViTMAE, a repository of the Hub that holds ``model.safetensors``, or a state dict;
            in one of the layouts of `mvmae.checkpoints`, with any prefix before the encoder's names.
        size: height and width of the images that the weights are for; where None, what the config.json beside them says, else
            those of a square, which weights alone do not tell from a rectangle.
        revision: branch, tag or commit of the repository.

    Raises:
        TypeError: if the encoder is not a plain ViT.
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    weights, place = _read(source, WEIGHTS_FILE, revision)
    encoder.load_state_dict(_encoder_weights(weights, encoder, place, size or _size_beside(place)))


def load_pretraining(model: MultiViewMAE, source: str | Path | Mapping[str, Tensor], *, revision: str | None = None) -> None:
    """Load the weights of a whole pretraining model, with positions resized as timm does.

    Args:
        model: a pretraining model; after an error it is as it was. Its layer norms keep their epsilon (see `load_encoder`).
        source: as for `load_encoder`, with the decoder too; a repository or a folder that holds ``pretraining.safetensors``.
        revision: branch, tag or commit of the repository.

    Raises:
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    weights, place = _read(source, PRETRAINING_FILE, revision)
    with in_file(place):
        weights = pretraining_names(weights)
        if not any(name.startswith("decoder.") for name in weights):
            names = ", ".join(list(weights)[:3])
            raise WeightsError(f"it must hold an encoder and a decoder, got {names}, ...: use load_encoder for an encoder")
        positions = weights.pop("decoder.pos_embed", None)
        if positions is not None and not _are_fixed(positions):
            got = "" if positions.any() else ", got zeros, as in a ViTMAE that was built from a config and never trained"
            raise WeightsError(
                f"decoder_pos_embed must be the fixed sine-cosine table of a square grid{got}: load its encoder alone"
            )
    of_encoder = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    others = {name: value for name, value in weights.items() if name not in of_encoder}
    of_encoder = _encoder_weights(of_encoder, model.encoder, place, _size_beside(place))
    load_weights(model, {**{f"encoder.{name}": value for name, value in of_encoder.items()}, **others}, source=place)


def _read(source: str | Path | Mapping[str, Tensor], filename: str, revision: str | None) -> tuple[dict[str, Tensor], Path]:
    """Return the weights, and where they are, for messages."""
    if isinstance(source, Mapping):
        return check_tensors(dict(source), "the state dict"), Path("the state dict")
    path = Path(source)
    if not path.is_file():
        if filename == PRETRAINING_FILE:
            config = Path(str(source).removeprefix("local-dir:"), CONFIG_FILE)
            filename = WEIGHTS_FILE if vitmae_arguments(config) else in_export(source, filename)
        path = locate(source, filename, revision=revision)
    return read_weights(path), path


def _size_beside(place: Path) -> tuple[int, int] | None:
    """Return height and width of the images that weights are for, as the JSON file beside them says; None where none does."""
    pretraining = place.with_name(PRETRAINING_CONFIG)
    if pretraining.is_file():
        size = read_json(pretraining).get("encoder", {}).get("model_args", {}).get("img_size")
    elif args := vitmae_arguments(place.with_name(CONFIG_FILE)):
        size = args["img_size"]
    else:
        config = read_json(place.with_name(CONFIG_FILE)) if place.with_name(CONFIG_FILE).is_file() else {}
        size = (config.get(INPUTS) or {}).get("size") or config.get("pretrained_cfg", config).get("input_size", [None])[1:]
    return to_2tuple(size) if size else None


def _encoder_weights(
    weights: Mapping[str, Tensor], encoder: nn.Module, place: Path, size: tuple[int, int] | None
) -> dict[str, Tensor]:
    vit, proj = check_encoder(encoder), "patch_embed.proj.weight"
    with in_file(place):
        weights = encoder_weights(weights, vit, size)
    given, wanted = weights[proj].shape[1], vit.in_chans
    if given not in (3, wanted):
        raise WeightsError(
            f"{place} is for {given} channels, the encoder for {wanted}: weights of 3 channels alone can be adapted"
        )
    weights[proj] = adapt_input_conv(wanted, weights[proj], base_chans=given)
    own = {name: value for name, value in vit.state_dict().items() if name.startswith("head") and name not in weights}
    return {**weights, **own}


def _are_fixed(positions: Tensor) -> bool:
    """Return whether positions, (1, 1 + L, D), are the fixed ones of a square grid, which no model keeps as weights."""
    side = math.isqrt(positions.shape[1])
    table = F.pad(sincos_table(positions.shape[2], (side, side)), (0, 0, 1, 0)).to(positions)  # none for the class token
    return table.shape == positions.shape[1:] and torch.allclose(positions[0], table, atol=1e-4)
