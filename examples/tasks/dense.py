"""What detect.py and segment.py share: options, the encoder, the training loop, images from the disk, toy data."""

import contextlib
import dataclasses
import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import default_collate

from engine.checkpoint import Checkpoint, check_fit, read_newest
from engine.distributed import DROPOUT, Ranks, autocast, parallel
from engine.log import CLOCK, Log
from engine.optim import set_learning_rate
from engine.options import REQUIRED, RunConfig, changeable, option
from engine.signals import Signals, Stop
from mvmae.data import (
    FORMATS,
    MAX_PIXELS,
    FileSource,
    Loader,
    StepSampler,
    open_image,
    open_images,
    pixel_options,
    read_pixels,
    sample_seed,
)
from mvmae.dense import WindowedViT
from mvmae.inputs import INPUTS, Inputs, set_inputs
from mvmae.patches import sincos_table
from mvmae.weights import read_json, write_json
from tasks.inputs import InputOptions, describe_inputs, resolve_inputs
from tasks.models import SHIPPED, check_plain, load_backbone, summary, timm_arguments
from tasks.plots import draw_curves
from tasks.shapes import write_toy

RGB = Inputs(size=(0, 0), mean=(0.0,) * 3, std=(1.0,) * 3)
"""Images of 8 bits and three channels, on white."""
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")  # parameters without weight decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(InputOptions, RunConfig):
    """Options of both scripts. Fields without `option` are constants of a recipe: its preset sets them."""

    data: str = option(
        REQUIRED, "data set folder, or toy: shapes drawn into the output folder", path=True, may_change=True, section="Data"
    )
    image_size: int = option(REQUIRED, "side of a training image in pixels", at_least=1)
    toy_images: int = option(600, "training images that --data toy draws; for validation it draws a sixth of them", at_least=1)
    steps: int = option(REQUIRED, "training steps", at_least=1, section="Length")
    warmup_steps: int = option(0, "steps of linear warm-up of the learning rate; 0: the preset's share of --steps", at_least=0)
    model: str = option(
        SHIPPED,
        "encoder, a plain ViT: timm name, hf-hub:ID, folder of a run or export, file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = option("", "timm name of the encoder, if it is a file of weights without a config.json beside it")
    model_args: str = option("", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'")
    window_size: int = option(REQUIRED, "side of an attention window in patches; 0: global attention in all blocks", at_least=0)
    drop_path: float = option(REQUIRED, "stochastic depth in the last block, rising from 0 in the first", at_least=0, below=1)
    batch_size: int = option(REQUIRED, "images per step, over all processes", at_least=1, section="Optimizer")
    lr: float = option(REQUIRED, "learning rate of AdamW after warm-up", at_least=0)
    layer_decay: float = option(
        REQUIRED, "factor of the learning rate from each block to the one below; 1: one rate for all", above=0, at_most=1
    )
    evaluate: bool = option(
        False, "evaluate the newest checkpoint in the output folder, without training", may_change=True, section="Evaluation"
    )
    pictures: int = option(8, "images in predictions.png; 0: no picture", at_least=0, may_change=True, section="Pictures")
    grad_checkpointing: bool = option(
        False, "recompute the encoder's activations in the backward pass, to save memory", may_change=True, section="Speed"
    )
    weight_decay: float
    decay_biases: bool  # detectron2 does, BEiT does not
    schedule: str  # cosine or linear, to 0
    warmup: float  # share of the steps
    warmup_start: float  # share of the learning rate


def lr_factor(step: int, config: DenseConfig) -> float:
    """Return the learning rate after ``step`` steps as a share of ``config.lr``: the schedule times a linear warm-up."""
    done, warmup = step / config.steps, config.warmup_steps or round(config.warmup * config.steps)
    factor = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    if step < warmup:
        factor *= config.warmup_start + (1 - config.warmup_start) * step / warmup
    return factor


def build_trunk(
    config: DenseConfig, images: Path, *, rebuild: bool = False, taps: Callable[[int], Sequence[int]] | None = None
) -> tuple[WindowedViT, Inputs]:
    """Return the encoder with attention in windows, and how its images are read: in an evaluation, as in training.

    ``images`` is the folder of those that decide the range of pixels, and are measured where ``--mean`` or ``--std`` is auto;
    ``rebuild`` is that of `WindowedViT`; ``taps`` gives, for a number of blocks, those whose output is used.
    """
    torch.manual_seed(config.seed)
    arguments = timm_arguments(config.model_args)
    if unknown := arguments.keys() - inspect.signature(VisionTransformer.__init__).parameters.keys():
        raise Stop(f"--model-args: a plain ViT of timm has no {', '.join(sorted(unknown))}")
    name = f"random:{config.model.removeprefix('random:')}" if config.evaluate else config.model
    vit: Any = load_backbone(name, arch=config.arch, drop_path_rate=config.drop_path, **arguments)
    if name.startswith("random:") and rebuild and vit.pos_embed is not None:
        with torch.no_grad():  # as the encoder that it is compared with, where that has the table
            vit.pos_embed[:, -vit.patch_embed.num_patches :] = sincos_table(vit.embed_dim, vit.patch_embed.grid_size)
    options: Any = {"window_size": config.window_size or None, "grad_checkpointing": config.grad_checkpointing}
    trunk = WindowedViT(vit, config.image_size, rebuild=rebuild, taps=taps and taps(len(vit.blocks)), **options)

    saved = read_json(Path(config.output_dir, "config.json"), optional=True) if config.evaluate else {}
    if INPUTS in saved:
        set_inputs(vit, Inputs.from_config(saved))
    source = open_images(images if images.is_dir() else images.parent)  # file_name of COCO may begin at the data's folder
    return trunk, resolve_inputs(config, vit, source, [config.image_size])


def param_groups(model: nn.Module, trunk: WindowedViT, config: DenseConfig) -> list[dict[str, Any]]:
    """Sort the trained parameters by weight decay and by depth, with the factor ``lr_scale`` of their learning rate."""
    last = len(trunk.blocks) + 1
    depth = {id(parameter): 0 for parameter in trunk.parameters()}
    depth |= {id(parameter): index + 1 for index, block in enumerate(trunk.blocks) for parameter in block.parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for module in model.modules():
        norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | _BatchNorm)
        for name, parameter in module.named_parameters(recurse=False):
            decayed = parameter.ndim > 1 or (config.decay_biases and name == "bias" and not norm)
            if parameter.requires_grad:
                groups[depth.get(id(parameter), last), decayed and name not in POSITIONS].append(parameter)
    return [
        {"params": params, "weight_decay": config.weight_decay * decayed, "lr_scale": config.layer_decay ** (last - layer)}
        for (layer, decayed), params in groups.items()
    ]


def fit(
    config: DenseConfig,
    model: nn.Module,
    trunk: WindowedViT,
    dataset: Any,
    losses: Callable[[nn.Module, Any], dict[str, Tensor]],
    ranks: Ranks,
    *,
    record: Mapping[str, Any],
    collate: Callable[[list[Any]], Any] = default_collate,
) -> None:
    """Train, or with ``--evaluate`` load the newest checkpoint, and leave the model ready for evaluation.

    ``losses`` returns those of a batch by name, whose sum is minimised; ``record`` is that of `data_record`.
    """
    folder, last = Path(config.output_dir), min(config.steps, config.max_steps or config.steps)
    if ranks.rank == 0:
        print("\n".join([f"inputs: {describe_inputs(config, dataset.inputs)}", *record["notes"]]), flush=True)
    if config.evaluate:
        saved, _ = read_newest(folder)
        if saved is None:
            raise Stop(f"--evaluate: {folder} holds no checkpoint")
        check_fit(folder, saved, {"model": model})
        model.load_state_dict(saved["model"])
        model.eval()
        return
    cuda, settings = ranks.device.type == "cuda", {**dataclasses.asdict(config), **record}
    optimizer = torch.optim.AdamW(param_groups(model, trunk, config), lr=config.lr, fused=cuda)
    share = {"rank": ranks.rank, "world_size": ranks.world_size}
    sampler = StepSampler(len(dataset), config.batch_size, seed=config.seed, num_steps=last, **share)
    checkpoint = Checkpoint(folder, settings, ranks, may_change=changeable(type(config)), resume=config.resume)
    log, signals = Log(folder, ranks, last, checkpoint.step, config.batch_size), Signals()
    checkpoint.restore(log, signals, model=model, optimizer=optimizer)
    if ranks.rank == 0:
        write_json(folder / "config.json", settings)
        log.trackers.start(config.tracker, folder, settings, checkpoint.step, log.say)
    log.say(f"model: {summary(trunk, config.image_size, config.model)}")
    log.say(f"training: {config.steps} steps of {config.batch_size} images, on {ranks.device}")
    sampler.start_step = checkpoint.step
    loader = Loader(dataset, sampler, num_workers=config.workers, pin_memory=cuda, collate=collate)
    batches, trained = zip(sampler, loader, strict=True), parallel(model.train(), ranks)
    with checkpoint.saved_on_error():
        for step, (keys, batch) in enumerate(log.timed(signals.batches(batches)), checkpoint.step + 1):
            lr = config.lr * lr_factor(step - 1, config)
            set_learning_rate(optimizer, lr)
            # drop path and sampled regions: the same whatever was drawn before, so that a resumed run is the same
            torch.manual_seed(sample_seed(config.seed, DROPOUT, step, ranks.rank))
            with autocast(config.precision, ranks.device):
                parts = losses(trained, batch)
                loss = torch.stack(list(parts.values())).sum()
            loss.backward()
            checkpoint.require_finite(step, {"loss": loss, **parts}, [dataset.name(index) for _, index in keys])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add({"loss": loss, **parts})
            if step % config.log_every == 0 or step == last:
                log.write_step(step, lr=lr)
            checkpoint.advance(step, last, config.save_every)
    if ranks.rank == 0:
        drawn = dict.fromkeys(name for line in log.records() for name in line if name not in ("step", *CLOCK))
        draw_curves(folder / "curves.png", log.records(), drawn)
    log.close()
    signals.release()
    if signals.received is not None:
        raise Stop("stopped after the last step, which is saved: --evaluate measures it", 128 + signals.received)
    model.eval()


def data_folder(config: DenseConfig, ranks: Ranks) -> Path:
    """Return the folder of the images: the user's, or ``toy/`` in the run's, with drawn shapes in it."""
    check_plain(config.model, config.arch)  # before the data, whose check takes a minute
    root = Path(config.data)
    if config.data == "toy":
        root = Path(config.output_dir, "toy")
        if ranks.rank == 0:
            write_toy(root, side=config.image_size, train=config.toy_images, val=max(config.toy_images // 6, 4))
        ranks.any(False)  # the others wait for the drawings
    if not root.is_dir():
        raise Stop(f"--data: no such folder: {config.data} (the current folder is {Path.cwd()})")
    if ranks.rank == 0:
        print(f"data: checking {root}", flush=True)  # takes a minute for 100 000 images
    return root


def read_image(path: str, inputs: Inputs) -> Tensor:
    """Read an image upright by EXIF, as labelling tools show it: (C, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(read_pixels(path, **pixel_options(inputs)).transpose(2, 0, 1)))


def check_size(path: str, stated: Sequence[float], *, source: str | Path, max_pixels: int | None) -> tuple[int, int]:
    """Return height and width of an image as it is seen, which must be as ``source`` states them, 0 where it does not.

    Its header is enough where it agrees: whole, the images of COCO are 19 GB.
    """
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        size = (image.width, image.height) if turned else (image.height, image.width)
        if image.width * image.height <= (max_pixels or MAX_PIXELS) and (tuple(stated) == size or 0 in stated):
            return size
    size = open_image(path, max_pixels=max_pixels or MAX_PIXELS).upright_size
    if tuple(stated) != size and all(stated):
        raise ValueError(f"{path} must have {stated[1]:g}x{stated[0]:g} pixels, as {source} says, got {size[1]}x{size[0]}")
    return size


def data_record(root: Path, data: Any, val: Any, files: Iterable[str | Path], unit: str) -> dict[str, Any]:
    """Return what a run decides about its data: fingerprint of the ``images``, ``classes``, ``inputs``, ``notes`` to print."""
    amounts = list(zip(data.names, data.counts, val.counts, strict=True))
    listed = ", ".join(f"{name} {one} and {other}" for name, one, other in amounts)
    notes = [f"training: {data.note}", f"validation: {val.note}"]
    notes += [f"{len(amounts)} classes, {unit} in training and validation: {listed}"]
    if missing := [name for name, _, count in amounts if not count]:
        notes += [f"not in validation: {', '.join(missing)}"]
    source = FileSource(root, [os.fsencode(os.path.relpath(file, root)) for file in files])
    return {"images": source.fingerprint, "classes": data.names, INPUTS: data.inputs.to_dict(), "notes": notes}
