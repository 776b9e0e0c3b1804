"""Weights as files: safetensors and JSON in a folder or a repository of the Hugging Face Hub, with clear errors."""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm.models
import torch
from huggingface_hub import constants, errors
from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PRETRAINING_FOLDER = "pretraining"  # in an exported folder; timm before 1.0.29 fails on a second .safetensors beside the first
PRETRAINING_FILE = "pretraining.safetensors"
PRETRAINING_CONFIG = "pretraining.json"
PRETRAINING_FORMAT = 1
WEIGHTS_FILES = (
    WEIGHTS_FILE,
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "*.safetensors.index.json",  # shards, which timm itself does not read
    "*.bin.index.json",
    "*.safetensors",
    "*.pth",
    "*.pth.tar",
    "*.bin",
)  # of which timm takes the first that a folder holds
HUB_ID = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class WeightsError(ValueError):
    """Weights cannot be found, read or used; the message is one line with the cause and the cure."""


def locate(source: str | Path, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Find a file in a folder, or in a repository of the Hub, downloading it unless it is cached.

    Args:
        source: a folder (``local-dir:`` may stand before it), or ``owner/name`` of a repository (``hf-hub:`` may stand before
            it, ``@revision`` behind it).
        filename: the file's name there; instead of `WEIGHTS_FILE`, a folder may hold another file that timm loads.
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; the Hub client's cache where None.

    Raises:
        WeightsError: if there is no such file, or it cannot be downloaded.
    """
    text = str(source)
    folder = Path(text.removeprefix("local-dir:"))
    if folder.is_dir() and not text.startswith("hf-hub:"):
        if revision is not None:
            raise WeightsError(
                f"revision must be None for the folder {folder}, got {revision!r}: only a repository of the Hub has revisions"
            )
        names = WEIGHTS_FILES if filename == WEIGHTS_FILE else (filename,)
        found = next((path for name in names for path in sorted(folder.glob(name)) if path.is_file()), None)
        if found is None:
            raise WeightsError(f"{folder} holds no {filename}: name a folder that mvmae's export, or timm, has written")
        return found
    match = HUB_ID.fullmatch(str(source))
    if match is None:
        raise WeightsError(
            f"the source must be an existing folder or a repository owner/name, got {str(source)!r}: check the name"
        )
    repo, revision = match[1], revision or match[2]
    if not filename.endswith((".json", ".safetensors")):
        raise WeightsError(
            f"{repo} names {filename!r} as its weights: from a repository only .safetensors are read; download the file and "
            "load it with mvmae.hub.load_encoder if you trust it"
        )
    with hub_causes(repo, filename, revision):
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))


@contextmanager
def hub_causes(repo: str, filename: str, revision: str | None) -> Iterator[None]:
    """Convert an error of the Hub's client into one line with the cause and the cure."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(f"{repo} is gated: accept its terms on the Hub, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no folder and no repository {repo} on {constants.ENDPOINT}: check the name; "
            "if it is private, log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision!r}: name one of its branches, tags or commits") from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{filename} of {repo} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached "
            f"({first_line(error.__cause__ or error)}): connect, or fill the cache where there is a connection"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{repo} holds no {filename}: name a repository that mvmae's export has written") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        cure = "log in with `hf auth login`, with an account that has access" if status in (401, 403) else "try again later"
        raise WeightsError(f"{constants.ENDPOINT} answers {status} for {repo} ({filename}): {cure}") from error
    except Exception as error:  # the client's HTTP library, and with it the class of a cut connection, changes with its version
        raise WeightsError(f"{filename} of {repo} cannot be transferred ({first_line(error)}): try again") from error


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0].rstrip('.')}"


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
            with _namespace_allowed():
                weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(_why_unreadable(path, error)) from error
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


def _namespace_allowed() -> AbstractContextManager[object]:
    """Allow argparse's namespace of options, which checkpoints of MAE and timm hold and which runs no code."""
    allowed = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    return allowed([argparse.Namespace]) if allowed is not None else nullcontext()


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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole: first under another name beside it, then renamed in one step.

    Args:
        path: the file.
        write: function that writes the content to the path it gets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    part.touch(exist_ok=False)  # a new file, so that no link is followed, with the mode that the user's files have
    mode = part.stat().st_mode
    try:
        write(part)
        part.chmod(mode)  # safetensors makes one that only its owner may read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors.

    Raises:
        WeightsError: if a weight is NaN or infinite, in shards over several processes, or on the meta device.
    """
    _refuse_odd_tensors(weights, f"the weights for {path}")
    _refuse_non_finite(weights, f"the weights for {path}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    replace_file(path, lambda part: safetensors.torch.save_file(tensors, part, metadata={"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        WeightsError: if it does not.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({first_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold one JSON object, got a {type(content).__name__}: get the file again")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an exported model, and check what timm builds from it.

    Raises:
        WeightsError: if it is no such file, or names sizes that no model has.
    """
    config = read_json(path)
    cfg = config.get("pretrained_cfg", config)
    for name, value, kind in (
        ("architecture", config.get("architecture"), str),
        ("model_args", config.get("model_args", {}), dict),
        ("pretrained_cfg", cfg, dict),
    ):
        if not isinstance(value, kind):
            raise WeightsError(f"{path}: {name} must be a {kind.__name__}, got {str(value)[:80]!r}: get the file again")
    sizes = {name: cfg.get(name) for name in ("num_classes", "input_size", "test_input_size", "min_input_size")}
    check_sizes({"num_classes": config.get("num_classes"), **sizes, **config.get("model_args", {})}, path)
    return config


def check_sizes(arguments: Mapping[str, Any], source: str | Path) -> None:
    """Refuse arguments of a model that would take minutes or all memory to build.

    Raises:
        WeightsError: naming the argument.
    """
    for name, value in arguments.items():
        limit = 1000 if "depth" in name else 10**6 if name == "num_classes" else 20_000
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise WeightsError(f"{source}: {name} must be at most {limit}, got {value}: is it the file of a model?")


@contextmanager
def building(what: str) -> Iterator[None]:
    """Convert an error of timm for arguments that fit no model into one line.

    Raises:
        WeightsError: if the model cannot be built.
    """
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # what timm makes of arguments of any kind can be anything
        raise WeightsError(f"no model can be built from {what} ({first_line(error)})") from error


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


def sha256(path: Path) -> str:
    """Compute the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
