"""Write the model of a run for timm, transformers and the Hub, and upload it on request.

  python examples/export.py --run runs/quick
      takes seconds; writes runs/quick/encoder, which timm.create_model loads as local-dir:runs/quick/encoder
  python examples/export.py --run runs/paper --datasets imagenet-1k --push owner/name --private
      also uploads it in one commit, to a repository that only its owner sees until the owner makes it public on the Hub
  python examples/export.py --run runs/quick --onnx
      also writes runs/quick/encoder/encoder.onnx, which ONNX Runtime runs without PyTorch (install the extra onnx)

The weights are those of the newest checkpoint, whether the run has ended or not. A fine-tuned model keeps its head and the
names of its classes. The model card states what the run recorded and nothing else.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint import load_checkpoint
from engine.cli import option, run
from engine.ends import Stop
from mvmae import MultiViewMAE, hub
from mvmae.data import open_images
from mvmae.weights import replace_file


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = option(dataclasses.MISSING, "folder of the run", path=True, section="Run")
    output_dir: str = option("", "folder to write", empty="encoder/ in the folder of the run", path=True)
    onnx: bool = option(False, "write encoder.onnx too: features, or a fine-tuned model's logits, by ONNX Runtime")
    push: str = option(
        "",
        "name of the repository on the Hub to upload to, as owner/name",
        empty="no upload",
        section="Model card and upload",
    )
    private: bool = option(False, "create the repository as a private one")
    datasets: tuple[str, ...] = option((), "names of the data sets, as on the Hub, for the card", empty="none")
    license: str = option(
        "", "licence of the weights", empty="that of the weights the run started from, if any, else apache-2.0"
    )
    hardware: str = option("", "hardware that the run used, for the card", empty="not mentioned")
    command: str = option("", "command that started the run, for the card", empty="the one in the checkpoint")
    commit: str = option("", "commit of this package that the run used, for the card", empty="the one in the checkpoint")


def build_model(state: Mapping[str, Any]) -> nn.Module:
    """Build the model of a checkpoint, untrained, from its description."""
    if not isinstance(state.get("description"), dict):
        raise Stop("the checkpoint must say which model it holds: name a run of pretrain.py, adapt.py or finetune.py")
    return hub.build(state["description"])


def without_folders(command: str) -> str:
    """Return a command with each path of this machine reduced to its last name."""
    return re.sub(r"(?<![^\s='\":])[~/.][^\s'\"]*/(?=[^\s/])", "", command)


def measured(folder: Path, step: int) -> dict[str, float]:
    """Collect what was measured on the exported weights: k-NN accuracy at their step, and results.json."""
    metrics, log, results = {}, folder / "log.jsonl", folder / "results.json"
    for line in log.read_text().splitlines() if log.exists() else ():
        record = json.loads(line)
        if record.get("step") == step and isinstance(record.get("knn"), float):
            metrics["k-NN accuracy on held-out images, %"] = record["knn"]
    found = json.loads(results.read_text()) if results.exists() else {}
    return metrics | {key: value for key, value in found.items() if isinstance(value, float)}


def check(model: nn.Module, folder: Path) -> None:
    """Load what was written by timm alone, and compare its features with the model's own."""
    encoder: Any = model.encoder if isinstance(model, MultiViewMAE) else model
    images = torch.randn(1, encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    with torch.inference_mode():
        written = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(images)
        if not torch.equal(written, encoder.eval().forward_features(images)):
            raise Stop(f"timm builds another model from {folder} than the run's: please report it", 1)


def sample_pictures(folder: Path) -> Tensor:
    """Cut a picture from each photograph of scikit-image for an exported encoder: (14, C, H, W), normalised."""
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    (chans, *size), source = cfg["input_size"], open_images("sample", split="val")
    tiles = [torch.tensor(source.image(index)).permute(2, 0, 1) / 255 for index in range(0, len(source), 36)]
    pictures = [F.interpolate(tile[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1) for tile in tiles]
    images = torch.stack(pictures)[:, torch.arange(chans) % 3]
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def main(config: Config) -> None:
    """Read, write, check, upload."""
    if config.onnx:
        hub.require_onnx()
    source = Path(config.run)
    folder = Path(config.output_dir) if config.output_dir else source / "encoder"
    if not config.output_dir and folder.is_symlink():
        raise Stop(f"{folder} is a link, and what it points to could be overwritten: remove it, or give --output-dir")
    state = load_checkpoint(source)
    if state is None:
        raise Stop(f"{source} holds no checkpoint.pt: name the folder of a run")
    model, started_from = build_model(state), {str(key): str(value) for key, value in (state.get("start") or {}).items()}
    license = config.license or started_from.get("license") or "apache-2.0"
    choice = state.get("choice") or {}  # what a run of adapt.py has chosen to leave
    kept = {f"encoder.{name}": value for name, value in choice.get("weights", {}).items()}
    weights = {**state["model"], **kept}
    hub.load_weights(model, weights, source=source / "checkpoint.pt")
    hub.export(
        model,
        folder,
        mean=state.get("mean"),
        std=state.get("std"),
        label_names=state.get("label_names"),
        license=license,
        started_from=started_from,
        training=str(state["training"]) if "training" in state else None,
        background=state.get("settings", {}).get("background", "white"),
    )
    check(model, folder)
    if config.onnx:
        distance = hub.write_onnx(folder, sample_pictures(folder))
        print(
            f"{folder / 'encoder.onnx'} is written: its outputs differ from PyTorch's by {distance:.0e} of their norm",
            flush=True,
        )
    for name in ("curves.png", "reconstructions.png"):
        if (source / name).is_file() and not (source / name).is_symlink():
            replace_file(folder / name, partial(shutil.copyfile, source / name))
    hub.write_card(
        folder,
        repo=config.push or f"owner/{source.name}",
        datasets=config.datasets,
        license=license,
        metrics=measured(source, choice.get("step", state.get("step", 0))),
        command=config.command or without_folders(str(state.get("command", ""))),
        commit=config.commit or state.get("commit", ""),
        hardware=config.hardware,
        settings=state.get("settings"),
    )
    print(f'{folder} is written: timm.create_model("local-dir:{folder}", pretrained=True)', flush=True)
    if config.push:
        print(f"uploading to {config.push}, {'private' if config.private else 'for everyone to see'}:", flush=True)
        for path in hub.published(folder):
            print(f"  {path.relative_to(folder)}, {path.stat().st_size} bytes", flush=True)
        commit = hub.push(folder, config.push, private=config.private)
        print(f'{config.push} is uploaded: timm.create_model("hf-hub:{config.push}@{commit}", pretrained=True)', flush=True)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
