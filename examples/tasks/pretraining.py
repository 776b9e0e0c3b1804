"""What pretrain.py and adapt.py share besides the model: images, masks, looks at the features, and what a run leaves.

Shapes: B images, V views, C channels, H x W pixels.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import mvmae
from engine.distributed import Processes
from engine.ends import Stop
from engine.log import Log
from engine.run import MASKS
from mvmae.data import ImageSource, Loader, MultiViewDataset, StepSampler, make_loader, sample_seed
from mvmae.hub import export
from mvmae.metrics import collapse_warning
from mvmae.visualize import reconstruction_picture
from tasks.drawn_images import varied
from tasks.inputs import augmented, channel_statistics, normalize, repeated
from tasks.labelled import Splits, clamp_batch, open_splits
from tasks.method import Config
from tasks.monitor import Monitor, report
from tasks.plots import draw_curves
from tasks.starting import with_background

CURVES = ("loss", "loss_rec", "loss_con", "knn", "effective_rank", "uniformity", "similarity", "cka", "lr")
Chosen = TypeVar("Chosen", bound="Config")


class Images(NamedTuple):
    """The images of a run: both splits, those trained on, as often as an epoch sees them, and what is said of them."""

    splits: Splits
    train: ImageSource
    listed: str
    clamped: str


def open_data(config: Chosen, processes: Processes) -> tuple[Chosen, Images]:
    """Open the images; return them, and the options with the background and the batch size that they come to.

    Raises:
        Stop: if there are none, or a batch leaves the contrastive loss no negatives.
    """
    config = with_background(config, config.encoder, config.arch)
    start = time.monotonic()
    splits = open_splits(config.data)
    listing = time.monotonic() - start
    train = repeated(splits.train, config.crops_per_image)
    config, clamped = clamp_batch(config, len(train), processes.world_size * config.accumulate)
    if config.loss_weight and config.batch_size // (1 if config.gather else processes.world_size) < 2:
        each = "" if config.gather else f" with --no-gather on {processes.world_size} processes"
        raise Stop(
            f"--batch-size {config.batch_size}{each} leaves the contrastive loss no negatives: use more, or --loss-weight 0"
        )
    return config, Images(splits, train, f"{len(train)} images, listed in {listing:.1f} s", clamped)


def pixel_options(config: Config) -> dict[str, Any]:
    """Return how images become pixels, in views and in centre crops alike."""
    options: dict[str, Any] = {"in_chans": config.in_chans, "max_pixels": config.max_pixels}
    return options | {"value_range": config.value_range or None, "background": config.background}


def centre_crop(config: Config, encoder: Any) -> mvmae.CentreCropTransform:
    """Return the transform of images that are looked at rather than trained on."""
    return mvmae.CentreCropTransform(encoder.patch_embed.img_size, **pixel_options(config))


def statistics(config: Config, encoder: Any, source: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel."""
    typed = {"mean": config.mean, "std": config.std}
    return channel_statistics(typed, encoder.pretrained_cfg, source, centre_crop(config, encoder))


def view_loader(config: Config, encoder: Any, source: ImageSource, sampler: StepSampler, processes: Processes) -> Loader:
    """Load V views of each image of a step."""
    transform = mvmae.MultiViewTransform(
        encoder.patch_embed.img_size,
        num_views=config.num_views,
        scale=config.crop_scale,
        same_crop=config.same_crop,
        decoder=config.loader,
        **pixel_options(config),
    )
    dataset = MultiViewDataset(source, augmented(transform, config.transform), seed=config.seed, max_bad=config.max_bad)
    bad_file, pinned = Path(config.output_dir) / "bad_files.txt", processes.device.type == "cuda"
    return make_loader(dataset, sampler, num_workers=config.workers, pin_memory=pinned, bad_file=bad_file)


def draw_masks(config: Config, encoder: Any, step: int, processes: Processes) -> mvmae.Mask:
    """Draw this process's part of the masks of a step, which are the same for any number of processes."""
    views = config.batch_size * config.num_views
    generator = torch.Generator().manual_seed(sample_seed(config.seed, MASKS, step))
    share = views // processes.world_size
    own = slice(processes.rank * share, (processes.rank + 1) * share)
    length = encoder.patch_embed.num_patches
    return mvmae.random_mask(views, length, config.mask_ratio, generator=generator, device=processes.device, rows=own)


def backward(model: torch.nn.Module, views: Tensor, mask: mvmae.Mask, parts: int) -> mvmae.Losses:
    """Compute losses and gradients of a batch, whole or in parts; the backward pass runs outside autocast."""
    if parts > 1:
        return mvmae.backward_in_parts(model, views, parts, mask=mask)
    output = model(views, mask=mask)
    with torch.autocast(views.device.type, enabled=False):
        output.loss.backward()
    return mvmae.Losses(*(loss.detach() for loss in (output.loss, output.loss_rec, output.loss_con)))


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


def look(monitor: Monitor, model: mvmae.MultiViewMAE, log: Log, step: int, limit: int = 0) -> dict[str, float]:
    """Log what the encoder's features are worth now, and warn where they have collapsed."""
    found = monitor.look(model.eval().features, limit)
    model.train()
    if found:
        log.write(step=step, **found)
        if warning := collapse_warning(found["effective_rank"]):
            log.say(f"warning: {warning}")
    return found


def finish(
    config: Config,
    model: mvmae.MultiViewMAE,
    log: Log,
    monitor: Monitor,
    after: Mapping[str, float],
    start: Mapping[str, str] | None = None,
) -> None:
    """Write the encoder and the pictures, and say how to load it and how good it is.

    Args:
        config: options of the run.
        model: as it is trained.
        log: of the run.
        monitor: which holds the first look, and the images to draw: those looked at, or training images where none are.
        after: the last look.
        start: which weights the run started from (`starting_weights`); none where it is None.
    """
    folder, mean, std, start = Path(config.output_dir), monitor.mean, monitor.std, start or {}
    options = {"background": config.background, "started_from": start, "license": start.get("license", "")}
    export(model, folder / "encoder", mean=mean, std=std, **options)  # type: ignore[arg-type]
    draw_curves(folder / "curves.png", log.records(), CURVES)
    images = varied(monitor.looked_at if monitor.limit else monitor.train, monitor.transform).to(
        next(model.parameters()).device
    )
    views = normalize(images, mean, std)[:, None]  # (B, 1, C, H, W)
    generator = torch.Generator().manual_seed(config.seed)
    picture = reconstruction_picture(model, views, mean=mean, std=std, generator=generator)
    picture.save(folder / "reconstructions.png")
    log.close()
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir() if path.name[0] != '.'))}")
    print(f'import timm\nencoder = timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)')
    for line in report(monitor.before, after):
        print(line)
