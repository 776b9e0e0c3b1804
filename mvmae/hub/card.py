"""The model card: what an exported folder holds, how to load it, how it was made, and what was measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..architecture import PRETRAINING_FILE, PRETRAINING_FOLDER
from ..weights import CONFIG_FILE, WEIGHTS_FILE, locate, read_json, sha256, write_text
from .onnx import ONNX_DATA_FILE, ONNX_FILE, usage

CARD_FILE = "README.md"
FREE = re.compile(r"apache-2\.0|mit|bsd-.*|cc0-1\.0|cc-by-4\.0|cc-by-sa-4\.0|unlicense|isc")
NON_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|amlr|seer-license")
SHOWN_TEXTS = ("augment", "background", "encoder_args", "loss_on", "mean", "pool", "precision", "std")
"""Settings of a run in words that the card shows besides its numbers; others can name places on the machine it ran on."""
NOT_SHOWN = {"log_every", "max_bad", "monitor_every", "monitor_images", "resume", "save_every", "save_minutes", "workers"}
"""Settings of a run that its weights do not depend on."""


def license_warning(started_from: Mapping[str, str]) -> str | None:
    """Return a warning, one line, if the weights that training started from are not free for everybody.

    Args:
        started_from: ``weights``, a name, and ``license``, as the Hub spells it.

    Returns:
        The warning; None if the weights are free, or if the run started from nothing and so belongs to its owner.
    """
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


def _code(value: object) -> str:
    """Quote somebody else's text for Markdown: as code in one line, in which neither HTML nor Markdown acts."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)).strip()
    if not text:
        return "(empty)"  # two backticks alone would open a code span that the next quoted text closes
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _is_shown(key: str, value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return key in SHOWN_TEXTS or (key not in NOT_SHOWN and all(isinstance(each, int | float) for each in values))


def write_card(
    folder: str | Path,
    *,
    repo: str,
    datasets: Sequence[str] = (),
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    command: str = "",
    commit: str = "",
    hardware: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card of an exported folder, README.md: what it is, how to load it, how it was made and measured.

    Args:
        folder: as `export` wrote it; a ``curves.png`` there is shown, and how to use an ``encoder.onnx``.
        repo: ``owner/name`` of the repository that the card is for.
        datasets: names of the images it was trained on, as the Hub has them.
        license: licence of the weights, as the Hub spells it; where None, the export's, else ``apache-2.0``.
        metrics: results measured on these weights, and on no others.
        command: the command that trained them; its paths are reduced to their last names.
        commit: the commit of this package.
        hardware: the machine of the training.
        settings: settings of the run; the card shows numbers, except `NOT_SHOWN`, and of words those in `SHOWN_TEXTS`.

    Returns:
        The card's path.

    Raises:
        WeightsError: if the folder holds no export.
    """
    folder = Path(folder)
    config = read_json(locate(folder, CONFIG_FILE))
    pretraining = f"{PRETRAINING_FOLDER}/{PRETRAINING_FILE}"
    files = [name for name in (WEIGHTS_FILE, pretraining, ONNX_FILE, ONNX_DATA_FILE) if (folder / name).exists()]
    classes, started, cfg = config.get("num_classes", 0), config.get("started_from") or {}, config.get("pretrained_cfg") or {}
    metadata = {
        "license": license or cfg.get("license") or "apache-2.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["timm", "transformers", "mvmae", "masked-autoencoder", "self-supervised-learning"],
        "datasets": list(datasets),
    }
    metadata |= {"base_model": started["repo"]} if started.get("repo") else {}
    warning = license_warning(started)
    made = {"Weights": config.get("training", ""), "Images": ", ".join(datasets), "Command": without_folders(command)}
    made |= {"Commit": commit, "Hardware": hardware}
    shown = {key: value for key, value in (settings or {}).items() if _is_shown(key, value)}
    whole = f"```python\nimport mvmae\n\nmodel = mvmae.MultiViewMAE.from_pretrained({repo!r})  # to go on pretraining\n```"
    origin = f"Started from {_code(started.get('weights'))}, licence {_code(started.get('license', 'unknown'))}."
    size, kind = _code(cfg.get("description") or "a size that is not recorded"), _code(config["architecture"])
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()) + "---",
        f"# {repo.partition('/')[2]}",
        f"A ViT of {size}, a variant of timm's {kind}" + (f", with a head of {classes} classes." if classes else "."),
        f"```python\nimport timm\n\nmodel = timm.create_model({f'hf-hub:{repo}'!r}, pretrained=True)\n```",
        whole if pretraining in files else "",
        f"Without PyTorch, by ONNX Runtime:\n\n{usage(config)}" if ONNX_FILE in files else "",
        "## Training\n\n" + "\n".join(f"- {key}: {_code(value) if value else 'not recorded'}" for key, value in made.items()),
        origin if "weights" in started else "",
        f"**Licence:** {_code(warning)}." if warning else "",
        f"```json\n{json.dumps(shown, indent=2)}\n```" if shown else "",
        "![Losses of the run](curves.png)" if (folder / "curves.png").exists() else "",
        "## Measured",
        "\n".join(f"- {_code(key)}: {value:g}" for key, value in (metrics or {}).items()) or "Nothing yet.",
        "## Files\n\n" + "\n".join(f"- {name}: sha256 {sha256(folder / name)}" for name in files),
    ]
    write_text(folder / CARD_FILE, "\n\n".join(part for part in parts if part) + "\n")
    return folder / CARD_FILE
