"""The model card: what an exported folder holds, how to load it, how it was made, and what was measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import PRETRAINING_FILE, PRETRAINING_FOLDER
from ..inputs import Inputs
from ..weights import CONFIG_FILE, WEIGHTS_FILE, locate, read_json, sha256, write_text
from .onnx import ONNX_FILES

CARD_FILE = "README.md"
FREE = re.compile(r"apache-2\.0|mit|bsd-.*|cc0-1\.0|cc-by-4\.0|cc-by-sa-4\.0|unlicense|isc")
NON_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|amlr|seer-license")
SHOWN_TEXTS = ("background", "encoder_args", "mean", "optimizer", "precision", "std")
"""Settings of a run in words that the card shows besides its numbers; others can name places on the machine it ran on."""


def license_warning(started_from: Mapping[str, str]) -> str | None:
    """Return a warning, one line, if the weights that training started from, those of `export`, are not free for everybody."""
    weights, license = started_from.get("weights"), started_from.get("license", "unknown").lower()
    if not weights or FREE.fullmatch(license):
        return None
    if NON_COMMERCIAL.search(license):
        return f"{weights} is under {license}, which forbids commercial use: that holds for the weights trained from it too"
    if license in ("", "unknown", "none", "other"):
        return f"the licence of {weights} is not recorded: find it out before you use or publish weights trained from it"
    return f"{weights} is under {license}, which has terms of its own for weights trained from it: read them"


def without_folders(text: str) -> str:
    """Return a command with each path of this machine reduced to its last name."""
    return re.sub(r"(?<![^\s='\":])[~/.][^\s'\"]*/(?=[^\s/])", "", text)


def write_card(
    folder: str | Path,
    *,
    repo: str,
    datasets: Sequence[str] = (),
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card of an exported folder, README.md, and return its path.

    Args:
        folder: as `export` wrote it; a ``curves.png`` there is shown, and how to use an ``encoder.onnx``.
        repo: ``owner/name`` of the repository that the card is for.
        datasets: names of the images it was trained on, as the Hub has them.
        license: licence of the weights, as the Hub spells it; where None, the export's, else ``apache-2.0``.
        metrics: results measured on these weights, and on no others.
        command: the command that trained them; its paths are reduced to their last names.
        settings: settings of the run; the card shows numbers, and of words those in `SHOWN_TEXTS`.
    """
    folder = Path(folder)
    config = read_json(locate(folder, CONFIG_FILE))
    pretraining = f"{PRETRAINING_FOLDER}/{PRETRAINING_FILE}"
    files = [name for name in (WEIGHTS_FILE, pretraining, *ONNX_FILES) if (folder / name).exists()]
    classes, started, cfg = config.get("num_classes", 0), config.get("started_from") or {}, config.get("pretrained_cfg") or {}
    metadata = {
        "license": license or cfg.get("license") or "apache-2.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["timm", "transformers", "mvmae", "masked-autoencoder", "self-supervised-learning"],
        "datasets": list(datasets),
    }
    metadata |= {"base_model": started["repo"]} if started.get("repo") else {}
    made = {"Weights": config.get("training", ""), "Images": ", ".join(datasets), "Command": without_folders(command)}
    shown = {key: value for key, value in (settings or {}).items() if key in SHOWN_TEXTS or _is_number(value)}
    size, kind = _code(cfg.get("description") or "a size that is not recorded"), _code(config["architecture"])
    warning = license_warning(started)
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()) + "---",
        f"# {repo.partition('/')[2]}",
        f"A ViT of {size}, a variant of timm's {kind}" + (f", with a head of {classes} classes." if classes else "."),
        _python(f"import timm\n\nmodel = timm.create_model({f'hf-hub:{repo}'!r}, pretrained=True)"),
        pretraining in files
        and _python(f"import mvmae\n\nmodel = mvmae.MultiViewMAE.from_pretrained({repo!r})  # to go on pretraining"),
        ONNX_FILES[0] in files and f"Without PyTorch, by ONNX Runtime:\n\n{_python(_onnx_example(config))}",
        "## Training\n\n" + "\n".join(f"- {key}: {_code(value) if value else 'not recorded'}" for key, value in made.items()),
        "weights" in started
        and f"Started from {_code(started['weights'])}, licence {_code(started.get('license', 'unknown'))}.",
        warning and f"**Licence:** {_code(warning)}.",
        shown and f"```json\n{json.dumps(shown, indent=2)}\n```",
        (folder / "curves.png").exists() and "![Losses of the run](curves.png)",
        "## Measured",
        "\n".join(f"- {_code(key)}: {value:g}" for key, value in (metrics or {}).items()) or "Nothing yet.",
        "## Files\n\n" + "\n".join(f"- {name}: sha256 {sha256(folder / name)}" for name in files),
    ]
    write_text(folder / CARD_FILE, "\n\n".join(part for part in parts if isinstance(part, str) and part) + "\n")
    return folder / CARD_FILE


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _code(value: object) -> str:
    """Quote somebody else's text for Markdown: as code in one line, in which neither HTML nor Markdown acts."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)).strip()
    if not text:
        return "(empty)"  # two backticks alone would open a code span that the next quoted text closes
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _is_number(value: Any) -> bool:
    return all(isinstance(each, int | float) for each in (value if isinstance(value, list | tuple) else [value]))


def _onnx_example(config: Mapping[str, Any]) -> str:
    inputs = Inputs.from_config(config)
    channels, mode = len(inputs.mean), {1: "L", 3: "RGB"}.get(len(inputs.mean))
    image = f"""image = Image.open("photograph.jpg").convert("{mode}")  # an image of yours
method = Image.Resampling.{inputs.interpolation.upper()}
image = ImageOps.fit(image, (width, height), method, bleed=(1 - about["crop_pct"]) / 2)  # the centre of it
pixels = np.asarray(image, np.float32).reshape(height, width, {channels}) / 255"""
    if mode is None:
        image = f"pixels = np.zeros((height, width, {channels}), np.float32)  # an image of yours, from 0 to 1"
    output, shape = ("logits", "classes") if config.get("num_classes") else ("features", "width")
    last = '\nprint(about["label_names"][logits[0].argmax()])' if "label_names" in config else ""
    return f"""import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{ONNX_FILES[0]}")
about = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}}
height, width = about["size"]
{image}
pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
({output},) = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}})  # (1, {shape}){last}"""
