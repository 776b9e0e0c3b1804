"""Files of a model in a folder or a repository of the Hugging Face Hub: located, read, checked, and written whole."""

import argparse
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm.models
import torch
from huggingface_hub import constants, errors
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OTHER_FILES = ("pytorch_model.bin", "pytorch_model.pth", "model.pth", "*.safetensors", "*.pth", "*.pth.tar", "*.bin")
"""What timm loads from a folder instead of `WEIGHTS_FILE`, in its order."""
HUB_ID = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
WRAPPERS = re.compile(
    r"^(?:module\.|base_model\.model\.|_orig_mod\.)+|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DistributedDataParallel, peft, torch.compile, FSDP and activation checkpointing put into the names of weights."""


def plain_name(name: str) -> str:
    """Return the name of a module or a weight without those of `WRAPPERS`."""
    return WRAPPERS.sub("", f"{name}.")[:-1]


class WeightsError(ValueError):
    """Weights cannot be found, read or used; the message is one line with the cause and the cure."""


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0].rstrip('.')}"


def locate(source: str | Path, filename: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Find a file in a folder, or in a repository of the Hub, downloading it unless it is cached; or raise a `WeightsError`.

    ``source`` is a folder (``local-dir:`` may stand before it), or ``owner/name`` of a repository (``hf-hub:`` may stand before
    it, ``@revision`` behind it). Instead of `WEIGHTS_FILE`, a folder may hold another file that timm loads.
    """
    text = str(source)
    folder = Path(text.removeprefix("local-dir:"))
    if folder.is_dir() and not text.startswith("hf-hub:"):
        if revision is not None:
            raise WeightsError(f"revision must be None for the folder {folder}, got {revision!r}: only a repository has one")
        names = (filename, *(OTHER_FILES if filename == WEIGHTS_FILE else ()))
        found = next((path for name in names for path in sorted(folder.glob(name)) if path.is_file()), None)
        if found is None:
            raise WeightsError(f"{folder} holds no {filename}: name a folder that mvmae's export, or timm, has written")
        return found
    match = HUB_ID.fullmatch(text)
    if match is None:
        raise WeightsError(f"the source must be an existing folder or a repository owner/name, got {text!r}: check the name")
    repo, revision = match[1], revision or match[2]
    if not filename.endswith((".json", ".safetensors")):
        raise WeightsError(
            f"{repo} names {filename!r} as its weights: from a repository only .safetensors are read; download the file and "
            "load it with mvmae.hub.load_encoder if you trust it"
        )
    with hub_errors(repo, filename, revision):
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))


@contextmanager
def hub_errors(repo: str, filename: str, revision: str | None = None) -> Iterator[None]:
    """Convert an error of the Hub's client into a `WeightsError` of one line with the cause and the cure."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # the client's HTTP library, and with it the class of a cut connection, changes with its version
        host = constants.ENDPOINT
        causes: dict[type[Exception], str] = {
            errors.GatedRepoError: f"{repo} is gated: accept its terms on the Hub, then log in with `hf auth login`",
            errors.RepositoryNotFoundError: f"there is no folder and no repository {repo} on {host}: check the name; "
            "if it is private, log in with `hf auth login`",
            errors.RevisionNotFoundError: f"{repo} has no revision {revision!r}: name one of its branches, tags or commits",
            errors.LocalEntryNotFoundError: f"{filename} of {repo} is not in the cache {constants.HF_HUB_CACHE}, and {host} "
            f"cannot be reached ({first_line(error.__cause__ or error)}): connect, or fill the cache on a machine that can",
            errors.EntryNotFoundError: f"{repo} holds no {filename}: name a repository that mvmae's export has written",
            Exception: f"{filename} of {repo} cannot be transferred by {host} ({first_line(error)}): try again, or log in with "
            "`hf auth login` if access is denied",
        }  # a class before those that it is a kind of
        raise WeightsError(next(text for kind, text in causes.items() if isinstance(error, kind))) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole: ``write`` writes to another name beside it, which is then renamed in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    part.touch(exist_ok=False)  # a new file, so that no link is followed, with the mode that the user's files have
    mode = part.stat().st_mode
    try:
        write(part)
        part.chmod(mode)  # safetensors makes one that only its owner may read
        with part.open("r+b") as file:  # Windows brings to the disk only what is open for writing
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno and error.filename is None:  # of a full disk, or a limit on the size of files
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text as a whole."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file as a whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds one object, or raise a `WeightsError`; an optional one that is not there holds nothing."""
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({first_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold one JSON object, got a {type(content).__name__}: get the file again")
    return content


def sha256(path: Path) -> str:
    """Compute the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def in_file(place: str | Path) -> Iterator[None]:
    """Put the place of the weights before the message of a `WeightsError`."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{place}: {error}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: safetensors, or a PyTorch file, of which only tensors are unpickled.

    A PyTorch file may hold them under ``model`` or ``state_dict`` (timm's rules: averaged weights first) beside other data, or
    several under names of their own, which then begin those of the tensors. A `WeightsError` names what is wrong with a file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: name a .safetensors or .pth file with weights")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            # options of a run, as argparse (MAE, timm) and yacs (SimMIM) hold them, run no code
            options: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
            with torch.serialization.safe_globals(options):
                weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        cause = f"({path.stat().st_size} bytes) is cut or damaged ({first_line(error)}): get it again"
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            cause = "is a Git LFS pointer, not the weights: run `git lfs pull`"
        elif path.suffix != ".safetensors" and path.read_bytes()[:1] not in (b"", b"P", b"\x80"):  # zip archive, pickle
            cause = "is no PyTorch file: name a .safetensors or .pth file with weights"
        elif "weights_only" in str(error):
            cause = "is a pickle of more than weights, which could run code, and was not loaded: "
            cause += "if you trust it, save its state dict alone as safetensors"
        raise WeightsError(f"{path} {cause}") from error
    return check_tensors(flat(weights), path)


def flat(content: Any) -> Any:
    """Return a checkpoint of several state dicts, such as DINO's ``student`` and ``teacher``, as one, its names with theirs."""
    if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
        return content
    parts = {key: part for key, part in content.items() if isinstance(part, dict) and part}
    parts = {key: part for key, part in parts.items() if all(isinstance(value, Tensor) for value in part.values())}
    return {f"{key}.{name}": value for key, part in parts.items() for name, value in part.items()} or content


def check_tensors(weights: Any, source: str | Path) -> dict[str, Tensor]:
    """Return weights under their `plain_name`, if they are a dictionary of finite tensors, or raise a `WeightsError`."""
    if not (weights and isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        raise WeightsError(
            f"{source} must hold a dictionary of tensors, or one under 'model', got something else: save the state dict"
        )
    for name, value in weights.items():
        cause = ""
        if hasattr(value, "full_tensor"):  # a DTensor, whose module takes long to import
            cause = "in shards over processes: gather them by torch.distributed.checkpoint.state_dict.get_model_state_dict"
        elif value.is_meta:
            cause = "without numbers, on the meta device: load weights first"
        elif value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_complex():
            cause = "as a sparse, nested, quantized or complex tensor: save it as a plain tensor"
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            cause = f"of shape {tuple(value.shape)} with less data: save it as a plain tensor"  # a copy could take all memory
        elif value.is_floating_point() and not value.isfinite().all():
            cause = "with NaN or infinity: the run has diverged, or the file is damaged"
        if cause:
            raise WeightsError(f"{source} holds {name} {cause}")
    return {plain_name(name): value for name, value in weights.items()}


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Raise a `WeightsError` with the names that are missing in a model, unexpected, or of another shape, if there are any."""
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
        cure = "is it a checkpoint of another model?"
        if len(parts) == 1 and {name.partition(".")[0] for name in expected.keys() - weights.keys()} == {"head"}:
            cure = "it has no classifier: load it with num_classes=0, then reset_classifier(N)"
        raise WeightsError(f"{source} does not fit the model: {'; '.join(parts)}; {cure}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load weights that fit a model exactly, or raise the error of `check_weights` and leave the model as it was."""
    check_weights(weights, model.state_dict(), source=source)
    model.load_state_dict(weights)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, as a whole, under their `plain_name`, or raise the error of `check_tensors`."""
    plain = check_tensors(dict(weights), f"what is to be written to {path}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in plain.items()}
    replace_file(path, lambda part: safetensors.torch.save_file(tensors, part, metadata={"format": "pt"}))


def check_sizes(arguments: Mapping[str, Any], source: str | Path) -> None:
    """Refuse arguments of a model that would take minutes or all memory to build, by a `WeightsError` that names one."""
    for name, value in arguments.items():
        limit = 1000 if "depth" in name else 10**6 if name == "num_classes" else 20_000
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise WeightsError(f"{source}: {name} must be at most {limit}, got {value}: is it the file of a model?")


@contextmanager
def building(what: str) -> Iterator[None]:
    """Convert an error of timm for arguments that fit no model into a `WeightsError` of one line."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # timm can raise anything for wrong arguments
        raise WeightsError(f"no model can be built from {what} ({first_line(error)})") from error
