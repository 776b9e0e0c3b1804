"""What pretrain.py and adapt.py train on, and how: images, views, masks, parameter groups.

Shapes: B images, V views, C channels, H x W pixels.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import mvmae
from engine.distributed import Ranks
from engine.signals import Stop
from mvmae.architecture import PRETRAINING_FILE, PRETRAINING_FOLDER, read_pretraining
from mvmae.data import (
    Batch,
    ImageSource,
    ImageStream,
    Loader,
    MultiViewDataset,
    StepSampler,
    is_stream,
    open_stream,
    pixel_options,
    sample_seed,
    stream_loader,
)
from mvmae.inputs import inputs_of
from tasks.config import Config
from tasks.evaluation import VIEWS, Evaluation
from tasks.inputs import augmented, jittered
from tasks.models import find_weights
from tasks.schedule import Schedule
from tasks.splits import Joined, Part, Splits, draw, open_splits

MASKS = -1
"""Takes the place of an epoch in the seed of a step's masks."""
FIRST = 512  # images of a stream that stand for all where they are evaluated or measured


class Images(NamedTuple):
    """The images of a run.

    Attributes:
        splits: images that are trained on and images that are held out; of a stream its first ones, to evaluate.
        train: images that are trained on; of a stream its first ones, to measure.
        length: number of images of an epoch; 0 where a stream does not say.
        listed: a line about them.
        stream: trained on in place of ``train``, where images can only be read in order.
    """

    splits: Splits
    train: ImageSource
    length: int
    listed: str
    stream: ImageStream | None = None

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint if self.stream else self.train.fingerprint


def open_data(config: Config) -> Images:
    """Open the images, with as many of ``--rehearse`` beside them where that is given."""
    if is_stream(config.data):
        if config.rehearse:
            raise Stop(f"--rehearse needs images that can be counted, and --data {config.data} is a stream: leave it out")
        stream = open_stream(config.data)
        first = stream.first(min(config.eval_images, FIRST) or 64)
        splits = Splits(first, None, "a stream: its first images, which are trained on too")
        return Images(splits, first, stream.length or 0, stream.describe(), stream)
    splits = open_splits(config.data)
    train, more = splits.train, ""
    if config.rehearse:
        old, number = open_splits(config.rehearse, "--rehearse").train, len(train)
        drawn = draw(len(old), number)  # fewer images than that take turns
        train = Joined([train, Part(old, drawn[torch.arange(number) % len(drawn)])])
        more = f" and {number} of --rehearse" + (f" ({len(drawn)} different ones)" if len(drawn) < number else "")
    return Images(splits, train, len(train), "; ".join([f"{len(splits.train)} images{more}", *train.problems]))


def without_colour_jitter(config: Config) -> Config:
    """Return the options with jitter of brightness and contrast alone where images have other than 3 channels."""
    return config if config.in_chans == 3 else dataclasses.replace(config, jitter=config.jitter[:2], grayscale=0.0)


def random_views(config: Config, encoder: Any, num_views: int) -> mvmae.MultiViewTransform:
    """Return what takes random crops of an image."""
    options = {"scale": config.crop_scale, "same_crop": config.same_crop, **pixel_options(inputs_of(encoder))}
    return mvmae.MultiViewTransform(encoder.patch_embed.img_size, num_views=num_views, **options)


def build_evaluation(config: Config, encoder: Any, splits: Splits, ranks: Ranks) -> Evaluation:
    """Return what evaluates the encoder on the held-out images of ``splits``."""
    crops = random_views(dataclasses.replace(config, same_crop=False), encoder, VIEWS)
    options: dict[str, Any] = {"limit": config.eval_images, "workers": config.workers, "max_bad": config.max_bad}
    return Evaluation(encoder, splits, crops, ranks=ranks, **options)


def describe_method(config: Config) -> str:
    """Return a line on the losses, Eqs. 1 to 7."""
    parts = [f"{config.mask_ratio:g} of the patches masked", f"{'MSE of normalised' if config.norm_pix else 'MSE of'} patches"]
    parts += [f"lambda {config.loss_weight:g}, temperature {config.temperature:g}"] if config.loss_weight else ["no contrast"]
    return "; ".join(parts)


def describe_views(config: Config) -> str:
    """Return a line on the views of an image."""
    low, high = config.crop_scale
    parts = [f"{config.num_views}, {'the same crop' if config.same_crop else 'crops'} of {low:g} to {high:g} of the area"]
    strengths = zip(("brightness", "contrast", "saturation", "hue"), config.jitter, strict=False)
    jitter = [f"{name} {strength:g}" for name, strength in strengths if strength]
    parts += [f"jitter of {', '.join(jitter)}"] if jitter else []
    parts += [f"grey with probability {config.grayscale:g}"] if config.grayscale else []
    parts += [f"no jitter of colour, which {config.in_chans} channels do not have"] if config.in_chans != 3 and jitter else []
    parts += [f"then {config.transform}"] if config.transform else []
    return "; ".join(parts)


def load_views(
    config: Config, encoder: Any, images: Images, schedule: Schedule, start: int, last: int, ranks: Ranks
) -> Iterator[Batch]:
    """Yield V views of each image of the steps after ``start`` up to ``last``; jitter waits for the contrastive loss."""
    switch = min(max(schedule.contrast_after, start), last)
    plain = dataclasses.replace(config, jitter=(), grayscale=0.0)
    for stage, first, end in ((plain, start, switch), (config, switch, last)):
        if first < end:
            yield from view_loader(stage, encoder, images, schedule, first, end, ranks)


def view_loader(
    config: Config, encoder: Any, images: Images, schedule: Schedule, start: int, last: int, ranks: Ranks
) -> Loader:
    """Load V views of each image of the steps after ``start`` up to ``last``."""
    where: dict[str, Any] = {"seed": config.seed, "start_step": start, "num_steps": last}
    where |= {"rank": ranks.rank, "world_size": ranks.world_size}
    views = random_views(config, encoder, config.num_views)
    transform = augmented(jittered(views, config.jitter, config.grayscale), config.transform)
    loading: dict[str, Any] = {"num_workers": config.workers, "pin_memory": ranks.device.type == "cuda"}
    loading |= {"bad_file": Path(config.output_dir) / "bad_files.txt"}
    if images.stream:
        return stream_loader(images.stream, transform, schedule.batch_size, max_bad=config.max_bad, **where, **loading)
    sampler = StepSampler(len(images.train), schedule.batch_size, **where)
    dataset = MultiViewDataset(images.train, transform, seed=config.seed, max_bad=config.max_bad)
    return Loader(dataset, sampler, **loading)


def step_mask(config: Config, encoder: Any, batch_size: int, step: int, ranks: Ranks) -> mvmae.Mask:
    """Draw this rank's rows of the masks of a step, which are the same for any number of ranks."""
    views = batch_size * config.num_views
    share = views // ranks.world_size
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    generator = torch.Generator().manual_seed(sample_seed(config.seed, MASKS, step))
    patches = encoder.patch_embed.num_patches
    return mvmae.random_mask(views, patches, config.mask_ratio, generator=generator, device=ranks.device, rows=rows)


def train_last_blocks(encoder: Any, blocks: int) -> str:
    """Freeze all of an encoder but its last blocks and final norm, or nothing if ``blocks`` is 0; return a line about it."""
    depth = len(encoder.blocks)
    if not blocks:
        return ""
    if blocks > depth:
        raise Stop(f"--train-blocks must be at most the encoder's {depth} blocks, got {blocks}")
    trained = (*(f"blocks.{i}." for i in range(depth - blocks, depth)), "norm.", "fc_norm.")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(trained))
    return f"the last {blocks} of {depth} blocks, the final norm, decoder and projector"


def parameter_groups(model: mvmae.MultiViewMAE, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group all trained parameters by weight decay and learning rate; those of the encoder are marked ``encoder``.

    A layer's share of the learning rate, ``lr_scale``, is ``layer_decay`` times that of the layer above (BEiT; MAE's
    fine-tuning); then positions and tokens of the encoder have no weight decay, and parameters of one dimension never (MAE).
    """
    encoder: Any = model.encoder
    groups: list[dict[str, Any]] = param_groups_weight_decay(encoder, weight_decay)
    if layer_decay < 1:
        fixed = tuple(encoder.no_weight_decay())  # of themselves, timm's groups decay positions and tokens
        groups = param_groups_layer_decay(encoder, weight_decay, fixed, layer_decay=layer_decay)
    others = [model.decoder, model.projector, model.contrastive_loss, model.reconstruction_loss]
    rest = param_groups_weight_decay(nn.ModuleList(others), weight_decay)
    marked = [{"lr_scale": 1.0, **group, "encoder": part is groups} for part in (groups, rest) for group in part]
    return [group for group in marked if group["params"]]


def load_run(model: mvmae.MultiViewMAE, config: Config) -> str:
    """Load decoder and projector of the run that the encoder comes from, each where it fits; return words about which did."""
    file = find_weights(config.encoder, config.arch)[1]
    if file is None or not any((file.parent / folder / PRETRAINING_FILE).is_file() for folder in ("", PRETRAINING_FOLDER)):
        return ""
    weights, loaded = read_pretraining(file.parent)[1], []
    for name in ("decoder", "projector"):
        part: nn.Module = getattr(model, name)
        own, prefix = part.state_dict(), f"{name}."
        saved = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own and saved.keys() == own.keys() and all(saved[key].shape == own[key].shape for key in own):
            part.load_state_dict(saved)
            loaded.append(name)
    return f"; {' and '.join(loaded)} too" if loaded else "; neither its decoder nor its projector fits"
