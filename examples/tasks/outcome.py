"""What a pretraining run shows: its first lines, its pictures on the way, and at the end encoder, curves and a page about it.

Shapes: B images, C channels, H x W pixels.
"""

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import mvmae
from engine.log import Log
from engine.signals import Stop
from mvmae.data import normalize, pixel_options
from mvmae.hub import export
from mvmae.hub.export import PRETRAINED
from mvmae.inputs import Inputs
from mvmae.metrics import collapse_warning
from mvmae.visualize import reconstruction_picture
from mvmae.weights import write_json, write_text
from tasks.best import MEASURES
from tasks.config import Config
from tasks.drawn_images import varied
from tasks.evaluation import Evaluation
from tasks.models import summary
from tasks.plots import draw_curves
from tasks.schedule import Schedule

CURVES = ("loss", "loss_rec", "loss_con", "knn", "retrieval", "effective_rank", "uniformity", "lr")


def describe_run(
    log: Log, config: Config, model: mvmae.MultiViewMAE, settings: Mapping[str, Any], **parts: str
) -> dict[str, str]:
    """Print what a run trains, on what and for how long, save it in ``config.json`` with ``settings``, and return it.

    ``parts`` are further lines by name, of which empty ones are left out.
    """
    decoder, number = model.decoder, sum(parameter.numel() for parameter in model.parameters())
    lines = {
        "model": summary(model.encoder, name=config.encoder),
        "decoder": f"{len(decoder.blocks)} x {decoder.embed.out_features}; {number / 1e6:.2f} M parameters in all",
        **{name: text for name, text in parts.items() if text},
    }
    for name, text in lines.items():
        log.say(f"{name:<{max(map(len, lines))}}  {text}")
    if not log.silent:
        write_json(log.folder / "config.json", {**settings, "chosen": lines})
    return lines


def evaluate(log: Log, evaluation: Evaluation, model: mvmae.MultiViewMAE, pictures: "Pictures", step: int) -> dict[str, float]:
    """Log how good the encoder's features are after a step, with pictures for trackers; all ranks must call it."""
    with log.paused():
        if metrics := evaluation():
            log.write(step=step, **metrics)
            if warning := collapse_warning(metrics["effective_rank"]):
                log.say(f"warning: {warning}")
        if log.trackers:
            model.eval()
            log.trackers.picture(step, "reconstructions", pictures.reconstructions(model))
            model.train()
    return metrics


class Pictures:
    """Pictures of the same images every time: held-out ones, or training images where none are held out or can be read."""

    def __init__(self, evaluation: Evaluation, inputs: Inputs, seed: int) -> None:
        self.evaluation, self.inputs, self.seed = evaluation, inputs, seed

    @cached_property
    def images(self) -> Tensor:
        """The images that an eye can judge best, (B, C, H, W), normalised."""
        centre = mvmae.CentreCropTransform(self.inputs.size, **pixel_options(self.inputs))
        try:
            images = varied(self.evaluation.source, centre)
        except Stop:
            images = varied(self.evaluation.train, centre)
        return normalize(images.to(self.evaluation.ranks.device), self.inputs.mean, self.inputs.std)

    def reconstructions(self, model: mvmae.MultiViewMAE) -> Image.Image:
        """Draw the images, what the encoder sees of them, and what the decoder makes of it."""
        generator = torch.Generator().manual_seed(self.seed)
        mean, std = self.inputs.mean, self.inputs.std
        return reconstruction_picture(model, self.images[:, None], mean=mean, std=std, generator=generator)


def unfinished(step: int, steps: int) -> str:
    """Return a line about a run that ended before its schedule did; nothing where it did not."""
    if step >= steps:
        return ""
    return f"stopped at step {step} of {steps}; the schedule was not finished: this encoder is for trying out"


def finish(
    log: Log,
    config: Config,
    model: mvmae.MultiViewMAE,
    pictures: Pictures,
    about: Mapping[str, str],
    schedule: Schedule,
    before: Mapping[str, float],
    after: Mapping[str, float],
    start: Mapping[str, str],
    lines: Sequence[str],
) -> None:
    """Write the encoder, the pictures and ``summary.md``, and say how to load the encoder and how good it is.

    ``about`` is what `describe_run` returned, ``start`` what `starting_weights` did; ``before`` is the first evaluation,
    ``after`` that of the model, which is exported as it is; ``lines`` are more of ``summary.md``, which are printed too.
    """
    folder = log.folder
    early = unfinished(log.last, schedule.steps)
    training = f"{PRETRAINED}; {early}" if early else PRETRAINED
    export(model, folder / "encoder", started_from=start, license=start.get("license", ""), training=training)
    records = [{k: v for k, v in record.items() if k != "loss_con" or v} for record in log.records()]  # 0: not computed
    draw_curves(folder / "curves.png", records, CURVES, contrast_from=schedule.contrast_after)
    pictures.reconstructions(model.eval()).save(folder / "reconstructions.png")
    results = [early] if early else []
    for name, words in MEASURES.items():
        if name in before and name in after:
            results.append(f"{words}: {before[name]:.1f} % before, {after[name]:.1f} % after")
    results += lines
    times = [record["time"] for record in records if "time" in record] or [0.0]
    run = shlex.quote(str(folder))
    page = [f"# {folder.name}", "", *(f"- {name}: {text}" for name, text in about.items())]
    page += [f"- {datetime.timedelta(seconds=round(times[-1] - times[0]))} from the first line of the log to the last", ""]
    page += ["## Results", "", *(f"- {line}" if line and not line.startswith("|") else line for line in results), ""]
    page += ["## Next", "", "- see curves.png and reconstructions.png"]
    page += [f"- with labels: `python examples/linear_probe.py --data {shlex.quote(config.data)} --models {run} random:{run}`"]
    page += [f'- `timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)`', "", "## Command", ""]
    page += [f"    {shlex.join(['python', *sys.argv])}", ""]
    text = "\n".join(page).encode(errors="backslashreplace").decode()  # names of files are any bytes
    write_text(folder / "summary.md", text)
    log.close()
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir() if path.name[0] != '.'))}")
    print(f'import timm\nencoder = timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)')
    print(*results, sep="\n")
