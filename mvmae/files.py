"""Files of a model in a folder or a repository of the Hugging Face Hub: found, read, checked, and replaced as a whole."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
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
)  # in the order in which timm looks for them in a folder
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
        with part.open("r+b") as file:  # Windows brings to the disk only what is open for writing
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


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
    except Exception as error:  # timm can raise anything for wrong arguments
        raise WeightsError(f"no model can be built from {what} ({first_line(error)})") from error


def sha256(path: Path) -> str:
    """Compute the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
