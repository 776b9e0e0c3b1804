"""Weights as files: safetensors, other people's PyTorch files, and the pair of files of a pretraining model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.models
import torch
from torch import Tensor

from .files import WeightsError, first_line, locate, read_json, replace_file, sha256, write_json

PRETRAINING_FOLDER = "pretraining"  # in an exported folder; timm before 1.0.29 fails on a second .safetensors beside the first
PRETRAINING_FILE = "pretraining.safetensors"
PRETRAINING_CONFIG = "pretraining.json"
PRETRAINING_FORMAT = 1


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: safetensors, or a PyTorch file, of which only tensors are unpickled.

    A PyTorch file may hold the weights under ``model`` or ``state_dict`` (timm's rules: averaged weights first) beside other
    plain data. An index of shards (``*.index.json``) stands for all of them.

    Raises:
        WeightsError: if the file is missing, damaged, would run code, or holds something else than finite weights.
    """
    path = Path(path)
    weights: dict[str, Tensor] = {}
    for file in _shards(path) if path.name.endswith(".index.json") else [path]:
        weights |= _read_file(file)
    return weights


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not (isinstance(names, dict) and all(isinstance(name, str) and Path(name).name == name for name in names.values())):
        raise WeightsError(f"{index} is no index of weights: its 'weight_map' must map each weight to a file beside it")
    return [index.with_name(name) for name in sorted(set(names.values()))]


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: name a .safetensors or .pth file with weights")
    if path.suffix == ".npz":
        raise WeightsError(
            f"{path} is a NumPy archive, which timm reads on request: add custom_load=True to the pretrained_cfg_overlay"
        )
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            # argparse's namespace of options, which checkpoints of MAE and timm hold, runs no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(_why_unreadable(path, error)) from error
    return check_tensors(weights, path)


def check_tensors(weights: Any, path: str | Path) -> dict[str, Tensor]:
    """Return what was read from a file, or is a state dict, if it is a dictionary of finite weights.

    Raises:
        WeightsError: if it is not.
    """
    if not (weights and isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        raise WeightsError(
            f"{path} must hold a dictionary of tensors, or one under 'model', got something else: save the state dict"
        )
    _refuse_odd_tensors(weights, f"the weights in {path}")
    for name, value in weights.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"{path} holds {name} of shape {tuple(value.shape)} with less data: save it as a plain tensor")
    _refuse_non_finite(weights, f"the weights in {path}")
    return weights


def _refuse_odd_tensors(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that cannot be copied as they are, or would take more memory when copied."""
    for name, value in weights.items():
        if hasattr(value, "full_tensor"):  # a DTensor, whose module takes long to import
            raise WeightsError(
                f"{what} hold {name} in shards over several processes: gather them in all processes with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict="
                "True, cpu_offload=True)), and load them into a model that is not sharded"
            )
        if value.is_meta:
            raise WeightsError(f"{what} hold no numbers for {name}, which is on the meta device: load weights first")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_complex():
            raise WeightsError(
                f"{what} hold {name} as a sparse, nested, quantized or complex tensor: save it as a plain tensor"
            )


def _refuse_non_finite(weights: Mapping[str, Tensor], what: str) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(f"{what} hold NaN or infinity in {name}: the run has diverged, or the file is damaged")


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`"
    if "weights_only" in str(error):
        return (
            f"{path} is a pickle of more than weights, which could run code, and was not loaded: "
            "if you trust it, save its state dict alone as safetensors"
        )
    return f"{path} ({path.stat().st_size} bytes) is cut or damaged ({first_line(error)}): get it again"


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Compare names and shapes with those of a model.

    Raises:
        WeightsError: with the names that are missing, unexpected, or of another shape.
    """
    shapes = [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for what, names in (
            ("missing", [name for name in expected if name not in weights]),
            ("unexpected", [name for name in weights if name not in expected]),
            ("of another shape", shapes),
        )
        if names
    ]
    if parts:
        raise WeightsError(f"{source} does not fit the model: {'; '.join(parts)}; is it a checkpoint of another model?")


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors.

    Raises:
        WeightsError: if a weight is NaN or infinite, in shards over several processes, or on the meta device.
    """
    _refuse_odd_tensors(weights, f"the weights for {path}")
    _refuse_non_finite(weights, f"the weights for {path}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    replace_file(path, lambda part: safetensors.torch.save_file(tensors, part, metadata={"format": "pt"}))


def in_export(source: str | Path, filename: str) -> str:
    """Return the name of a file of a pretraining model within a folder: at its top, or where `export` writes it."""
    return filename if Path(source, filename).is_file() else f"{PRETRAINING_FOLDER}/{filename}"


def write_pretraining(folder: str | Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a pretraining model: ``pretraining.safetensors``, then ``pretraining.json`` with its description and checksum."""
    path = Path(folder) / PRETRAINING_FILE
    write_weights(path, weights)
    write_json(path.with_name(PRETRAINING_CONFIG), {"format": PRETRAINING_FORMAT, **description, "sha256": sha256(path)})


def read_pretraining(source: str | Path, *, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_pretraining` wrote, from a folder or a repository of the Hub: description and weights.

    Raises:
        WeightsError: if the files are missing or damaged, or do not belong together.
    """
    config = locate(source, in_export(source, PRETRAINING_CONFIG), revision=revision)
    description = read_json(config)
    if description.get("format") != PRETRAINING_FORMAT:
        raise WeightsError(
            f"{config} must have the format {PRETRAINING_FORMAT}, got {description.get('format')!r}: upgrade mvmae"
        )
    path = locate(source, in_export(source, PRETRAINING_FILE), revision=revision)
    if sha256(path) != description.get("sha256"):
        raise WeightsError(f"{path} is not the file that {config.name} was written with (sha256 differs): get both again")
    return description, read_weights(path)
