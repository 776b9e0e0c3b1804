"""What pretrain.py and adapt.py train on, and how: images, views, masks, and the losses of a step.

Shapes: B images, V views, C channels, H x W pixels.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import mvmae
from engine.distributed import Processes
from engine.ends import Stop
from engine.run import MASKS, Run
from mvmae.data import (
    ImageSource,
    ImageStream,
    Loader,
    MultiViewDataset,
    StepSampler,
    StreamedViews,
    StreamSampler,
    is_stream,
    make_loader,
    open_stream,
    sample_seed,
)
from tasks.inputs import augmented, channel_statistics, jittered, repeated
from tasks.labelled import clamp_batch
from tasks.method import Config
from tasks.monitor import MONITORED
from tasks.splits import Joined, Part, Splits, draw, open_splits, passed_over
from tasks.starting import with_background

Chosen = TypeVar("Chosen", bound="Config")
VIEWS = 8
"""Random views of each image of which view retrieval is computed."""
EPOCHS, IMAGES = 44, 50_000
"""Epochs of two views for that many images: an hour and a half of two CPU cores at the 400 images/s of ``--preset small``."""


class Images(NamedTuple):
    """The images of a run: both splits, those trained on, how many are an epoch, and what is said of them.

    Of a stream, the first images stand for all where images are looked at or measured.
    """

    splits: Splits
    train: ImageSource
    per_epoch: int
    listed: str
    clamped: str
    stream: ImageStream | None = None

    @property
    def fingerprint(self) -> str:
        """What tells these images from others."""
        return self.train.fingerprint if self.stream is None else self.stream.fingerprint

    def name(self, index: int) -> str:
        """Return the name of an image that is trained on."""
        return self.train.name(index) if self.stream is None else self.stream.name(index)


def fit_batch(config: Chosen, number: int) -> Chosen:
    """Return the options with a batch size, where none is given: about a 16th of the images, a power of two from 16 to 256.

    A small set needs steps more than negatives: so an epoch has 16 of them or more, for 256 images and more. The learning rate
    is that of a batch of 256.
    """
    if config.batch_size:
        return config
    batch = min(max(2 ** int(math.log2(max(number / 16, 1))), 16), 256)
    return dataclasses.replace(config, batch_size=batch, base_lr=config.base_lr * 256 / batch)


def fit_length(config: Chosen, number: int) -> Chosen:
    """Return the options with a number of epochs, where none is given, and with warm-up and looks in proportion.

    A larger set is passed fewer times, though more of its images are seen in all: both go with the square root of its size.
    With one view instead of two, twice as many images are seen.
    """
    if config.epochs:
        return config
    epochs = max(round(EPOCHS * (IMAGES / number) ** 0.5 * 2 / config.num_views), 1)
    looks = max(round(epochs / 10), 1) if config.monitor_every else 0
    return dataclasses.replace(config, epochs=float(epochs), warmup_epochs=epochs / 20, monitor_every=looks)


def open_data(config: Chosen, processes: Processes, rehearse: str = "") -> tuple[Chosen, Images]:
    """Open the images; return them, and the options with the background, the length and the batch size that they come to.

    Args:
        config: options of the run.
        processes: this one and the others.
        rehearse: further images that are trained on, and never looked at, as for ``--data``; empty: none.

    Raises:
        Stop: if there are none, or a batch leaves the contrastive loss no negatives.
    """
    config = with_background(config, config.encoder, config.arch)
    if rehearse and is_stream(config.data):
        raise Stop(f"--rehearse needs images that can be counted, and --data {config.data} is a stream: leave it out")
    start = time.monotonic()
    stream = named_stream(config) if is_stream(config.data) else None
    splits = open_splits(config.data) if stream is None else first_of(stream, config.monitor_images)
    train = repeated(splits.train, config.crops_per_image)
    own, more = len(train), ""
    if rehearse:
        train, more = with_rehearsal(train, rehearse)
    length = len(train) if stream is None else stream.length
    per_epoch = config.images_per_epoch or length
    if not per_epoch:
        raise Stop(f"--data {config.data} has a length that is not known: add --images-per-epoch N, the images of one epoch")
    opened = f"{time.monotonic() - start:.1f} s"
    config = fit_batch(fit_length(config, per_epoch), per_epoch)
    config, clamped = clamp_batch(config, min(per_epoch, length or per_epoch), processes.world_size * config.accumulate)
    if config.loss_weight and config.batch_size // (1 if config.gather else processes.world_size) < 2:
        each = "" if config.gather else f" with --no-gather on {processes.world_size} processes"
        raise Stop(
            f"--batch-size {config.batch_size}{each} leaves the contrastive loss no negatives: use more, or --loss-weight 0"
        )
    listed = f"{own} images{more}, listed in {opened}{passed_over(train)}"
    if stream is not None:
        listed = f"a stream of {len(stream.shards.names)} shards, opened in {opened}"
    if config.images_per_epoch or stream is not None:
        listed += f", of which {per_epoch} images count as an epoch"
    return config, Images(splits, train, per_epoch, listed, clamped, stream)


def with_rehearsal(train: ImageSource, rehearse: str) -> tuple[ImageSource, str]:
    """Return the images with as many others, repeated where they are fewer, and what to say of them.

    They are always the same ones, of those not held out.
    """
    old, number = open_splits(rehearse, "--rehearse").train, len(train)
    drawn = draw(len(old), number)
    joined = Joined([train, Part(old, drawn[torch.arange(number) % len(drawn)])])
    return joined, f" and {number} of --rehearse" + (f" ({len(drawn)} different ones)" if len(drawn) < number else "")


def named_stream(config: Config) -> ImageStream:
    """Open the stream that ``--data`` names."""
    if config.crops_per_image != 1:
        raise Stop(f"--crops-per-image must be 1 for a stream, got {config.crops_per_image}: leave it out")
    try:
        return open_stream(config.data, buffer=config.shuffle_buffer)
    except ValueError as error:
        raise ValueError(f"--data: {error}") from error


def first_of(stream: ImageStream, most: int) -> Splits:
    """Read the first images of a stream, which are trained on too, for all that looks at images or measures them."""
    return Splits(stream.first(min(most, MONITORED) or 64), None, "a stream: its first ones, and no image is held out")


def step_sampler(config: Config, images: Images, last: int, processes: Processes) -> StepSampler | StreamSampler:
    """Say which images stand where in which step."""
    where = {"seed": config.seed, "num_steps": last, "rank": processes.rank, "world_size": processes.world_size}
    if images.stream is not None:
        return StreamSampler(images.stream, config.batch_size, **where)
    return StepSampler(len(images.train), config.batch_size, **where)


def position(sampler: StepSampler | StreamSampler, run: Run) -> dict[str, Any]:
    """Return what a checkpoint keeps of the place in the images: nothing but of a stream, where a step does not tell it."""
    if not isinstance(sampler, StreamSampler):
        return {}
    if run.found is not None:
        run.found.setdefault("stream", sampler.state_dict())  # a run on other images before, with --other-data
    return {"stream": sampler}


def advance(sampler: StepSampler | StreamSampler, step: int, processes: Processes) -> None:
    """Note that a step is whole."""
    if isinstance(sampler, StreamSampler):
        sampler.advance(step, processes.gather)


def pixel_options(config: Config) -> dict[str, Any]:
    """Return how images become pixels, in views and in centre crops alike."""
    options: dict[str, Any] = {"in_chans": config.in_chans, "max_pixels": config.max_pixels}
    return options | {"value_range": config.value_range or None, "background": config.background}


def centre_crop(config: Config, encoder: Any) -> mvmae.CentreCropTransform:
    """Return the transform of images that are looked at rather than trained on."""
    return mvmae.CentreCropTransform(encoder.patch_embed.img_size, **pixel_options(config))


def random_crops(config: Config, encoder: Any) -> mvmae.MultiViewTransform:
    """Return what takes the views of view retrieval: the random crops of training, without its other changes."""
    options = {"scale": config.crop_scale, **pixel_options(config)}
    return mvmae.MultiViewTransform(encoder.patch_embed.img_size, num_views=VIEWS, **options)


def statistics(config: Config, encoder: Any, source: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel."""
    typed = {"mean": config.mean, "std": config.std}
    return channel_statistics(typed, encoder.pretrained_cfg, source, centre_crop(config, encoder))


def view_loader(
    config: Config, encoder: Any, images: Images, sampler: StepSampler | StreamSampler, processes: Processes
) -> Loader:
    """Load V views of each image of a step."""
    transform = mvmae.MultiViewTransform(
        encoder.patch_embed.img_size,
        num_views=config.num_views,
        scale=config.crop_scale,
        same_crop=config.same_crop,
        decoder=config.loader,
        **pixel_options(config),
    )
    views = augmented(jittered(transform, config.jitter, config.grayscale), config.transform)
    kept: dict[str, Any] = {"seed": config.seed, "max_bad": config.max_bad}
    stream = images.stream
    dataset = MultiViewDataset(images.train, views, **kept) if stream is None else StreamedViews(stream, views, **kept)
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


def backward(model: torch.nn.Module, views: Tensor, mask: mvmae.Mask, parts: int, *, contrast: bool = True) -> mvmae.Losses:
    """Compute losses and gradients of a batch, whole or in parts; the backward pass runs outside autocast."""
    return mvmae.backward_in_parts(model, views, parts, mask=mask, loss_weight=None if contrast else 0.0)
