"""Write the model of a run for timm, transformers and the Hub, and upload it on request.

  python examples/export.py --run runs/quick
      takes seconds; writes runs/quick/encoder, which timm.create_model loads as local-dir:runs/quick/encoder
  python examples/export.py --run runs/paper --datasets imagenet-1k --push owner/name --private
      also uploads it in one commit, to a repository that only its owner sees until the owner makes it public on the Hub
  python examples/export.py --run runs/quick --onnx
      also writes runs/quick/encoder/encoder.onnx, which ONNX Runtime runs without PyTorch (install the extra onnx)

The weights are those of the newest checkpoint, whether the run has ended or not; of adapt.py, those that measured best. A
fine-tuned model keeps its head and the names of its classes. The export's config.json says how images are read, and the model
card what the run recorded and nothing else.
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from engine.checkpoint import read_newest
from engine.options import REQUIRED, option, run
from engine.signals import Stop
from mvmae import MultiViewMAE, hub
from mvmae.hub.export import PRETRAINED
from mvmae.inputs import Inputs
from mvmae.weights import replace_file
from tasks.best import MEASURES
from tasks.outcome import unfinished


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: str = option(REQUIRED, "folder of the run", path=True, section="Run")
    output_dir: str = option("", "folder to write; default: encoder/ in the folder of the run", path=True)
    onnx: bool = option(False, "write encoder.onnx too: features, or a fine-tuned model's logits, by ONNX Runtime")
    push: str = option("", "repository on the Hub to upload to, as owner/name", section="Upload")
    private: bool = option(False, "create the repository as a private one")
    datasets: tuple[str, ...] = option((), "names of the data sets, as on the Hub, for the card")
    license: str = option("", "licence of the weights; default: that of the weights the run started from, else apache-2.0")


def measured(folder: Path, step: int) -> dict[str, float]:
    """Collect what was measured on the exported weights: k-NN accuracy at their step, and results.json."""
    metrics, log, results = {}, folder / "log.jsonl", folder / "results.json"
    for line in log.read_text().splitlines() if log.exists() else ():
        record = json.loads(line)
        for name, words in MEASURES.items():
            if record.get("step") == step and name in record:
                metrics[f"{words}, %"] = record[name]
    found = json.loads(results.read_text()) if results.exists() else {}
    return metrics | {key: value for key, value in found.items() if isinstance(value, float)}


def main(config: Config) -> None:
    """Read, write, check, upload."""
    if config.onnx:
        hub.require_onnx()
    source = Path(config.run)
    folder = Path(config.output_dir) if config.output_dir else source / "encoder"
    state = read_newest(source)[0]
    if state is None:
        raise Stop(f"{source} holds no checkpoint.pt: name the folder of a run")
    about: dict[str, Any] = state.get("about", state)  # older runs: beside the rest
    if not isinstance(about.get("description"), dict):
        raise Stop("the checkpoint must say which model it holds: name a run of pretrain.py, adapt.py or finetune.py")
    adapted = state["settings"].get("pretrained", False)  # adapt.py exports its best encoder, the other scripts the last
    best: dict[str, Any] = (state.get("best") or state.get("choice") or {}) if adapted else {}
    if best.get("metrics") and not best.get("weights"):
        raise Stop(f"no encoder of {source} was better than the one it started from: export that one")
    weights = {**state["model"], **{f"encoder.{name}": value for name, value in best.get("weights", {}).items()}}
    start = {str(key): str(value) for key, value in (about.get("start") or {}).items()}
    license = config.license or start.get("license") or "apache-2.0"

    model = hub.build(about["description"])
    hub.load_weights(model, weights, source=source / "checkpoint.pt")
    early = unfinished(state["step"], about.get("schedule", {}).get("steps", 0))
    recorded = {"training": f"{PRETRAINED}; {early}"} if early else {}
    recorded |= {name: about[name] for name in ("label_names", "training") if about.get(name) is not None}
    hub.export(model, folder, license=license, started_from=start, inputs=Inputs.from_config(about), **recorded)

    encoder: Any = model.encoder if isinstance(model, MultiViewMAE) else model
    images = torch.randn(4, encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    with torch.inference_mode():
        written = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(images)
        if not torch.equal(written, encoder.eval().forward_features(images)):
            raise Stop(f"timm builds another model from {folder} than the run's: please report it", 1)
    if config.onnx:
        distance = hub.write_onnx(folder, images)
        print(
            f"{folder / 'encoder.onnx'} is written: its outputs differ from PyTorch's by {distance:.0e} of their norm",
            flush=True,
        )
    for name in ("curves.png", "reconstructions.png"):
        if (source / name).is_file():
            replace_file(folder / name, partial(shutil.copyfile, source / name))
    hub.write_card(
        folder,
        repo=config.push or f"owner/{source.name}",
        datasets=config.datasets,
        license=license,
        metrics=measured(source, best["step"] if best.get("weights") else state["step"]),
        command=about.get("command", ""),
        settings=state["settings"],
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
