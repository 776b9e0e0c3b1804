"""What a pretraining run shows: what its features are worth on the way, and at the end its encoder and its pictures.

Shapes: B images, C channels, H x W pixels.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mvmae
from engine.distributed import Processes
from engine.log import Log
from mvmae.hub import export
from mvmae.metrics import collapse_warning
from mvmae.visualize import contact_sheet, pca_colours, reconstruction_picture, to_unit_range
from mvmae.weights import write_text
from tasks.backbones import summary
from tasks.method import Config
from tasks.monitor import Monitor, report
from tasks.plots import draw_curves
from tasks.pretraining import Images, centre_crop
from tasks.splits import Splits
from tasks.summary import summary_page
from tasks.verdict import Verdict, judge

CURVES = ("loss", "loss_rec", "loss_con", "knn", "retrieval", "effective_rank", "uniformity", "similarity", "cka", "lr")


def computed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a log's line without a contrastive loss that was not computed, which is logged as 0."""
    return {name: value for name, value in record.items() if name != "loss_con" or value}


def opening(
    config: Config, model: mvmae.MultiViewMAE, weights: str, images: Images, monitor: Monitor, steps: int, lr: float
) -> dict[str, str]:
    """Return what a run trains, on what and for how long, part by part, for its first lines.

    Args:
        config: options of the run.
        model: that is trained.
        weights: where they come from; empty where there is no need to say.
        images: it is trained on.
        monitor: what looks at its features.
        steps: of the whole schedule.
        lr: peak learning rate.
    """
    parameters, device = sum(parameter.numel() for parameter in model.parameters()), monitor.processes.device
    depth = len(model.decoder.blocks)
    decoder = f"{depth} block{'s' if depth > 1 else ''} of width {model.decoder.embed.out_features}"
    peak = f"peak learning rate {lr:.3g} ({config.base_lr:.3g} x {config.batch_size} / 256)"
    return {
        "model": summary(model.encoder, name=config.encoder),
        "decoder": f"{decoder}; {parameters / 1e6:.2f} M parameters in all",
        "weights": weights,
        "images": images.listed,
        "training": f"{steps} steps of {config.batch_size}, {config.epochs:g} epochs, {peak}, on {device}{images.clamped}",
        "evaluation": f"{monitor.note} ({images.splits.note})",
    }


def build_monitor(
    config: Config,
    encoder: Any,
    splits: Splits,
    mean: Sequence[float],
    std: Sequence[float],
    processes: Processes,
    *,
    drift: bool = False,
) -> Monitor:
    """Return what looks at the features of held-out images; with ``drift``, also at how far they have moved."""
    return Monitor(
        splits,
        centre_crop(config, encoder),
        mean,
        std,
        config.monitor_images,
        processes,
        width=encoder.embed_dim,
        drift=drift,
        batch_size=min(config.batch_size, 256 * processes.world_size),
        workers=config.workers,
        max_bad=config.max_bad,
        bad_file=Path(config.output_dir) / "bad_files.txt",
    )


def look_due(config: Config, step: int, per_epoch: int, last: int) -> bool:
    """Tell whether features are measured after a step: every ``monitor_every`` epochs, unless the look at the end is near.

    Args:
        config: options of the run.
        step: counted from 1.
        per_epoch: steps of an epoch.
        last: step of the run, after which there is a look in any case; near is less than half as far as the next would be.
    """
    every = config.monitor_every * per_epoch
    return bool(every) and step % every == 0 and 2 * (last - step) >= every


def look(config: Config, monitor: Monitor, model: mvmae.MultiViewMAE, log: Log, step: int, limit: int = 0) -> dict[str, float]:
    """Log what the encoder's features are worth now, with pictures for trackers, and say how the run is doing."""
    found = monitor.look(model.eval().features, limit)
    if log.trackers:
        log.trackers.picture(step, "reconstructions", draw_reconstructions(monitor, model))
        log.trackers.picture(step, "features", draw_features(monitor, model))
    model.train()
    if found:
        log.write(step=step, **found)
        if warning := collapse_warning(found["effective_rank"]):
            log.say(f"warning: {warning}")
    if not log.silent and (verdict := verdict_now(config, log, monitor.processes)):
        log.say(f"verdict: {verdict}")
    return found


def verdict_now(config: Config, log: Log, processes: Processes) -> Verdict | None:
    """Return the verdict on the run as far as it is logged."""
    batch = config.batch_size // (1 if config.gather else processes.world_size)
    return judge(log.records(), crops=batch * config.num_views, loss_weight=config.loss_weight)


def draw_reconstructions(monitor: Monitor, model: mvmae.MultiViewMAE, seed: int = 0) -> Image.Image:
    """Draw the monitor's images, what the encoder sees of them, and what the decoder makes of it; masks depend on the seed."""
    views, generator = monitor.drawn()[:, None], torch.Generator().manual_seed(seed)  # (B, 1, C, H, W)
    return reconstruction_picture(model, views, mean=monitor.mean, std=monitor.std, generator=generator)


@torch.no_grad()
def draw_features(monitor: Monitor, model: mvmae.MultiViewMAE) -> Image.Image:
    """Draw the monitor's images beside the three main directions of their patches' features, as red, green and blue."""
    images, encoder = monitor.drawn(), model.encoder
    tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]  # (B, L, D)
    colours = pca_colours(tokens.float(), encoder.patch_embed.grid_size)
    enlarged = torch.nn.functional.interpolate(colours, images.shape[2:], mode="nearest")
    note = "Similar colours: similar features, among these images, at this step."
    shown = to_unit_range(images, monitor.mean, monitor.std)
    return contact_sheet([shown, enlarged], ["image", "features, three main directions"], note, min_width=240)


def finish(
    config: Config,
    model: mvmae.MultiViewMAE,
    log: Log,
    monitor: Monitor,
    after: Mapping[str, float],
    start: Mapping[str, str] | None = None,
    lines: Sequence[str] = (),
) -> None:
    """Write the encoder, the pictures and ``summary.md``, and say how to load the encoder and how good it is.

    Args:
        config: options of the run.
        model: as it is trained.
        log: of the run.
        monitor: which holds the first look, and the images to draw: those looked at, or training images where none are.
        after: the last look.
        start: which weights the run started from (`starting_weights`); none where it is None.
        lines: more of ``summary.md``, in Markdown, which are printed at the end too.
    """
    folder, mean, std, start = Path(config.output_dir), monitor.mean, monitor.std, start or {}
    options = {"background": config.background, "started_from": start, "license": start.get("license", "")}
    export(model, folder / "encoder", mean=mean, std=std, **options)  # type: ignore[arg-type]
    records = [computed(record) for record in log.records()]
    draw_curves(folder / "curves.png", records, CURVES)
    draw_reconstructions(monitor, model, config.seed).save(folder / "reconstructions.png")
    verdict = verdict_now(config, log, monitor.processes)
    page = summary_page(folder, log.parts, records, monitor.before, after, verdict, data=config.data, command=sys.argv)
    page = "\n".join([page, "## Before and after\n", *lines, ""]) if any(lines) else page
    write_text(folder / "summary.md", page.encode(errors="backslashreplace").decode())  # names of files are any bytes
    log.end()
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir() if path.name[0] != '.'))}")
    print(f'import timm\nencoder = timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)')
    for line in [*report(monitor.before, after), *filter(None, lines)]:
        print(line)
