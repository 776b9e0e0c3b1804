"""Load other people's weights into an encoder or a pretraining model: completely, or not at all."""

import difflib
import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .architecture import PRETRAINING_CONFIG, PRETRAINING_FILE, in_export
from .checkpoints import checkpoint_arguments, encoder_weights, family_of, pretraining_names
from .families import timm_model
from .inputs import INPUTS, Inputs, channels_of, inputs_of, set_inputs
from .model import MultiViewMAE
from .patches import sincos_table
from .weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    WeightsError,
    building,
    check_sizes,
    check_tensors,
    flat,
    in_file,
    load_weights,
    locate,
    read_json,
    read_weights,
)

_logger = logging.getLogger(__name__)


def load_encoder(
    encoder: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
) -> None:
    """Load an encoder's weights, resized and adapted to it as timm does, and record how its images were normalised.

    Mean and deviation are those of the project that trained it, where its checkpoint or transformers' preprocessor_config.json
    says which; a line is logged where nothing does. What is known of the checkpoint is a line in ``encoder.weights_from``.
    Layer norms keep their epsilon, which no weights hold: 1e-6 in timm's ViTs and MAE's code, 1e-12 in most of transformers'.

    Args:
        encoder: a model of timm; after an error it is as it was.
        source: a file (safetensors, or PyTorch's with nothing but weights), a folder that timm reads or transformers'
            ``save_pretrained`` wrote, a repository of the Hub that holds ``model.safetensors``, or a state dict; of one of the
            projects of `mvmae.families.FAMILIES`, or in timm's names, with any prefix before them.
        size: height and width of the images that the weights are for; where None, what the config.json beside them says, else
            those of a square, which weights alone do not tell from a rectangle.
        revision: branch, tag or commit of the repository.

    Raises:
        TypeError: if the encoder is no model of timm.
        WeightsError: if the weights cannot be found or read, or do not fit, with the names that do not.
    """
    if not any(kind.__module__.startswith("timm.models.") for kind in type(encoder).__mro__):
        raise TypeError(f"the encoder must be a model of timm, got {type(encoder).__name__}: give the model in it")
    load_read(encoder, *_read(source, WEIGHTS_FILE, revision), size=size)


def load_read(encoder: nn.Module, weights: Mapping[str, Tensor], place: Path, *, size: tuple[int, int] | None = None) -> None:
    """Do as `load_encoder` with weights that `read_weights` has read from the file ``place``."""
    encoder.load_state_dict(_encoder_weights(weights, encoder, place, size or _size_beside(place)))
    _record_inputs(encoder, weights, place)


def _record_inputs(encoder: nn.Module, weights: Mapping[str, Tensor], place: Path) -> None:
    """Record mean and deviation of a family of checkpoints, unless an export or the encoder has a record of its own."""
    described = _beside(place, CONFIG_FILE)
    if {"architecture", INPUTS} & described.keys():
        return
    name, family = family_of(weights)
    content = _beside(place, "preprocessor_config.json")  # of transformers
    mean_std = (content["image_mean"], content["image_std"]) if "image_mean" in content else family.mean_std
    recorded = isinstance(getattr(encoder, INPUTS, None), Inputs)
    cfg: Any = getattr(encoder, "pretrained_cfg", None) or {}
    parts = [f"weights of {name}"] if name else []
    if mean_std and channels_of(encoder) == len(mean_std[0]) and not recorded:
        set_inputs(encoder, inputs_of(encoder, mean=tuple(mean_std[0]), std=tuple(mean_std[1])))
        parts += ["normalised by mean {} and deviation {}".format(*(" ".join(map(str, values)) for values in mean_std))]
    elif (
        not recorded and place.is_file() and isinstance(encoder, VisionTransformer | Beit) and set(cfg.get("mean", ())) == {0.5}
    ):
        cure = "most encoders were trained with --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        _logger.warning("%s does not say how its images were normalised, timm's mean and deviation are 0.5: %s", place, cure)
    if family.pool:
        vector = "class token" if family.pool == "token" else "mean patch token"
        parts += [f"its authors probe the {vector} (--pool {family.pool})"]
    setattr(encoder, "weights_from", ", ".join(parts))  # noqa: B010


def load_pretraining(model: MultiViewMAE, source: str | Path | Mapping[str, Tensor], *, revision: str | None = None) -> None:
    """Load the weights of a whole pretraining model, which after an error is as it was, with positions resized as timm does.

    ``source`` is as for `load_encoder`, with the decoder too, or holds ``pretraining.safetensors``. A `WeightsError` names what
    does not fit.
    """
    weights, place = _read(source, PRETRAINING_FILE, revision)
    with in_file(place):
        weights = pretraining_names(weights, model.encoder.state_dict())
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
        return check_tensors(flat(dict(source)), "the state dict"), Path("the state dict")
    path = Path(source)
    if not path.is_file():
        if filename == PRETRAINING_FILE:
            config = Path(str(source).removeprefix("local-dir:"), CONFIG_FILE)
            of_transformers = "model_type" in read_json(config, optional=True)
            filename = WEIGHTS_FILE if of_transformers else in_export(source, filename)
        path = locate(source, filename, revision=revision)
    return read_weights(path), path


def _beside(place: Path, name: str) -> dict[str, Any]:
    """Read a JSON file beside a file of weights; a state dict has none, whatever lies in the current folder."""
    return read_json(place.with_name(name), optional=True) if place.is_file() else {}


def _size_beside(place: Path) -> tuple[int, int] | None:
    """Return height and width of the images that weights are for, as the JSON file beside them says; None where none does."""
    if pretraining := _beside(place, PRETRAINING_CONFIG):
        size = pretraining.get("encoder", {}).get("model_args", {}).get("img_size")
    else:
        config = _beside(place, CONFIG_FILE)
        size = (config.get(INPUTS) or {}).get("size") or config.get("pretrained_cfg", config).get("input_size", [None])[1:]
        size = size or config.get("image_size")  # of transformers
    return to_2tuple(size) if size else None


def _encoder_weights(
    weights: Mapping[str, Tensor], encoder: nn.Module, place: Path, size: tuple[int, int] | None
) -> dict[str, Tensor]:
    with in_file(place):
        weights = encoder_weights(weights, encoder, size)
    cfg: Any = getattr(encoder, "pretrained_cfg", None) or {}
    first, own = f"{cfg.get('first_conv') or 'patch_embed.proj'}.weight", encoder.state_dict()
    if first in weights:
        given, wanted = weights[first].shape[1], own[first].shape[1]
        if given not in (3, wanted):
            raise WeightsError(
                f"{place} is for {given} channels, the encoder for {wanted}: weights of 3 channels alone can be adapted"
            )
        weights[first] = adapt_input_conv(wanted, weights[first], base_chans=given)
    return {**own, **weights}  # its own are a head, which the checkpoint lacks


def _are_fixed(positions: Tensor) -> bool:
    """Return whether positions, (1, 1 + L, D), are the fixed ones of a square grid, which no model keeps as weights."""
    side = math.isqrt(positions.shape[1])
    table = F.pad(sincos_table(positions.shape[2], (side, side)), (0, 0, 1, 0)).to(positions)  # none for the class token
    return table.shape == positions.shape[1:] and torch.allclose(positions[0], table, atol=1e-4)


def arguments_of(model_name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of timm's model of this name that a checkpoint has beside it, such as its number of heads."""
    with torch.device("meta"):
        known = known_arguments(timm.create_model(model_name))
    return {name: value for name, value in checkpoint_arguments(weights).items() if name in known}


def known_arguments(model: nn.Module) -> set[str]:
    """Return the names of the arguments with which a model of timm can be built."""
    return {name for kind in type(model).__mro__ for name in inspect.signature(kind).parameters}


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model as ``timm.create_model`` does, also of other projects' files and transformers' folders.

    From a repository only safetensors are read; from a folder the files that timm would read, and of PyTorch's only tensors.

    Args:
        model_name: a name that timm knows, a folder (``local-dir:`` may stand before it) or ``hf-hub:owner/name``, of timm's
            models or of one that transformers saved; a run's folder means its ``encoder/``.
        pretrained: whether to load weights; those of ``pretrained_cfg_overlay=dict(file=...)`` as `hub.load_encoder` does,
            with the arguments that the file says.
        kwargs: other arguments of ``timm.create_model``.

    Raises:
        WeightsError: if timm has no such name, which is told with near ones, or weights cannot be found, read or used.
    """
    if (folder := Path(model_name.removeprefix("local-dir:"))).is_dir():
        run = folder / "encoder"  # a run's own config.json holds its options
        model_name = f"local-dir:{run if (run / CONFIG_FILE).is_file() else folder}"
    _check_name(model_name)
    file = (kwargs.get("pretrained_cfg_overlay") or {}).get("file")
    own_loader = model_name.startswith(("local-dir:", "hf-hub:")) or "use_naflex" in kwargs
    if pretrained and file and not own_loader:
        weights = read_weights(file)
        kwargs = {**arguments_of(model_name, weights), **kwargs}
        wrapped = {name: kwargs.pop(name) for name in ("features_only", "out_indices", "feature_cls") if name in kwargs}
        model: nn.Module = timm.create_model(model_name, **kwargs, **({"num_classes": 0} if wrapped else {}))
        load_read(model, weights, Path(file))
        return _feature_maps(model, timm.create_model(model_name, **kwargs, **wrapped)) if wrapped else model
    if not model_name.startswith(("local-dir:", "hf-hub:")):
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)  # type: ignore[no-any-return]
    try:
        with building(f"{model_name} with {kwargs}" if kwargs else model_name):
            path = locate(model_name, CONFIG_FILE, cache_dir=kwargs.get("cache_dir"))
            config = read_json(path)
            name, described = timm_model(model_name, path)
            if not (described or isinstance(config.get("architecture"), str)):
                raise WeightsError(f"{path}: architecture must be a str, got {config.get('architecture')!r:.80}: get it again")
            cfg = config.get("pretrained_cfg", config)
            sizes = {key: cfg.get(key) for key in ("num_classes", "input_size", "test_input_size", "min_input_size")}
            check_sizes({"num_classes": config.get("num_classes"), **sizes, **config.get("model_args", {})}, path)
            by_timm = not described or "pretrained_cfg_overlay" in described
            if pretrained:  # whose damage timm would report as anything
                file = cfg.get("hf_hub_filename") if model_name.startswith("hf-hub:") else None
                place = locate(model_name, str(file or WEIGHTS_FILE), cache_dir=kwargs.get("cache_dir"))
                weights = read_weights(place)
            model = timm.create_model(name, pretrained=pretrained and by_timm, **{**described, **kwargs})
            if pretrained and not by_timm:
                load_read(model, weights, place)
    except WeightsError as error:
        title, *keys = str(error.__cause__).splitlines() or [""]
        if not title.startswith("Error(s) in loading state_dict"):
            raise
        what = f"{keys[0].strip().rstrip('.')} ({len(keys)} such)"
        raise WeightsError(f"{model_name} does not fit the model: {what}; is it a checkpoint of another model?") from error
    return model


def _check_name(model_name: str) -> None:
    """Refuse a name, tag or folder that does not exist, with near ones."""
    name = model_name.partition(".")[0]
    path = Path(model_name.removeprefix("local-dir:"))
    if path.is_file():
        raise WeightsError(f"{path} is a file: name its architecture, with pretrained_cfg_overlay=dict(file={str(path)!r})")
    if path.is_dir() or model_name.startswith(("hf-hub:", "hf_hub:")):
        return
    if model_name.startswith("local-dir:") or "/" in model_name:
        raise WeightsError(f"there is no folder {path} (the current folder is {Path.cwd()})")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        cure = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise WeightsError(f"timm has no model {model_name!r}, and it is no folder: {cure}")
    try:
        timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name}.*")) or "none"
        raise WeightsError(f"timm has no weights {model_name!r}: it has {tags}") from error


def _feature_maps(loaded: nn.Module, features: nn.Module) -> nn.Module:
    """Return timm's model of feature maps with the weights of the whole model: those of the layers that it keeps."""
    inner = getattr(features, "model", features)  # of timm's FeatureGetterNet, which may leave the last layers out
    weights = loaded.state_dict()
    if missing := sorted(inner.state_dict().keys() - weights.keys()):
        raise WeightsError(f"features_only of {type(loaded).__name__} renames {missing[0]}: load the model without it")
    inner.load_state_dict({name: weights[name] for name in inner.state_dict()})
    set_inputs(features, inputs_of(loaded))
    return features
