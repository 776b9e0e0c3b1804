"""What detect.py and segment.py share: the encoder, the parameter groups, the learning rate, the steps, evaluation in parts."""

import dataclasses
import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import default_collate

from engine.checkpoint import load_checkpoint, same_everywhere
from engine.cli import option
from engine.config import REQUIRED, RunConfig
from engine.distributed import Processes, autocast, parallel
from engine.ends import Stop
from engine.pace import CLOCK
from engine.run import DROPOUT, Run
from engine.snapshot import restore
from mvmae.data import FileSource, StepSampler, make_loader, sample_seed
from mvmae.dense import WindowedViT
from mvmae.patches import sincos_table
from tasks.backbones import load_backbone, summary, timm_arguments
from tasks.inputs import names
from tasks.plots import draw_curves
from tasks.shapes import write_toy

POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig(RunConfig):
    """Settings of both scripts; their presets give the values."""

    data: str = option(
        REQUIRED,
        "data set folder, or toy: shapes drawn into the output folder",
        path=True,
        may_change=True,
        section="Data",
    )
    model: str = option(
        REQUIRED,
        "encoder, a plain ViT: timm name, hf-hub:ID, folder of a run or export, file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = option("", "timm name of the encoder, if it is a file of weights without a config.json beside it", empty="none")
    model_args: str = option(
        "", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'", empty="none", belongs_to="model"
    )
    evaluate: bool = option(
        False, "evaluate the newest checkpoint in the output folder and do not train", may_change=True, section="Evaluation"
    )
    image_size: int = option(REQUIRED, "side of a training image in pixels", at_least=1, section="Data")
    window_size: int = option(
        REQUIRED, "side of an attention window in patches; 0: global attention in every block", at_least=0, section="Model"
    )
    rel_pos: bool = option(True, "add learned relative positions to the attention of every block")
    drop_path: float = option(
        REQUIRED, "rate of stochastic depth in the last block of the encoder, rising from 0 in the first", at_least=0, below=1
    )
    steps: int = option(REQUIRED, "number of training steps", at_least=1, section="Optimization")
    batch_size: int = option(REQUIRED, "number of images per step, over all processes", at_least=1)
    lr: float = option(REQUIRED, "learning rate of AdamW after warm-up", at_least=0)
    weight_decay: float = option(REQUIRED, "weight decay of AdamW; normalisation layers and positions have none", at_least=0)
    decay_biases: bool = option(REQUIRED, "apply weight decay to biases too, as detectron2 does")
    layer_decay: float = option(
        REQUIRED, "factor of the learning rate from each block to the one below; 1: one rate for all", above=0, at_most=1
    )
    schedule: str = option(
        REQUIRED,
        "learning-rate schedule; cosine or linear: down to 0, steps: a tenth after 89 % and again after 96 % of the steps",
        ["cosine", "linear", "steps"],
    )
    warmup_steps: int = option(REQUIRED, "steps of linear warm-up of the learning rate", at_least=0)
    warmup_start: float = option(REQUIRED, "learning rate at the start of warm-up, as a share of --lr", at_least=0, at_most=1)
    background: str = option(
        "", "colour behind transparent pixels, a name or #RRGGBB", empty="the encoder's own, else white", section="Data"
    )
    grad_checkpointing: bool = option(
        False,
        "recompute the encoder's activations in the backward pass, to save memory",
        may_change=True,
        section="Speed and memory",
    )
    toy_images: int = option(
        600, "number of training images that --data toy draws; it draws a sixth as many to test on", at_least=1, section="Data"
    )
    pictures: int = option(
        8, "number of images in predictions.png; 0: no picture", at_least=0, may_change=True, section="Evaluation"
    )


def build_trunk(
    config: DenseConfig, taps: Callable[[int], Sequence[int]] | None = None, **options: Any
) -> tuple[WindowedViT, Any]:
    """Return the encoder with attention in windows, and the plain one, for its mean and standard deviation.

    Args:
        config: settings.
        taps: function from the number of blocks to the blocks whose output is used.
        **options: for `WindowedViT`.
    """
    torch.manual_seed(config.seed)
    arguments = timm_arguments(config.model_args)
    unknown = set(arguments) - set(inspect.signature(VisionTransformer.__init__).parameters)
    if unknown:
        raise Stop(f"--model-args: a plain ViT of timm has no {', '.join(sorted(unknown))}")
    name = f"random:{config.model.removeprefix('random:')}" if config.evaluate else config.model
    vit: Any = load_backbone(name, arch=config.arch, drop_path_rate=config.drop_path, **arguments)
    if name.startswith("random:") and options.get("positions") == "rebuild" and vit.pos_embed is not None:
        with torch.no_grad():  # what timm drew at random is no table to build anew for another size
            vit.pos_embed[:, -vit.patch_embed.num_patches :] = sincos_table(vit.embed_dim, vit.patch_embed.grid_size)
    options |= {"rel_pos": config.rel_pos, "grad_checkpointing": config.grad_checkpointing}
    options["taps"] = None if taps is None else taps(len(vit.blocks))
    return WindowedViT(vit, config.image_size, window_size=config.window_size or None, **options), vit


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
        {
            "params": parameters,
            "weight_decay": config.weight_decay * decayed,
            "lr_scale": config.layer_decay ** (last - layer),
        }
        for (layer, decayed), parameters in groups.items()
    ]


def lr_factor(step: int, config: DenseConfig) -> float:
    """Return the learning rate after ``step`` steps as a part of ``config.lr``: a pure function of the step.

    Linear warm-up from ``warmup_start``, times a cosine or a line to 0 at the last step, or tenths after 8/9 and 26/27 of the
    steps (ViTDet: 163 889 and 177 546 of 184 375).
    """
    part = step / config.steps
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * part))
    elif config.schedule == "linear":
        factor = 1 - part
    else:
        factor = 0.1 ** ((part >= 163889 / 184375) + (part >= 177546 / 184375))
    if step < config.warmup_steps:
        factor *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    return factor


def fit(
    config: DenseConfig,
    model: nn.Module,
    trunk: WindowedViT,
    dataset: Any,
    losses: Callable[[nn.Module, Any], dict[str, Tensor]],
    processes: Processes,
    *,
    images: str,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> None:
    """Train, save, and go on where a run was cut: bit for bit the same on a CPU.

    Args:
        config: settings.
        model: trained in place; with ``--evaluate`` it gets the weights of the newest checkpoint and nothing else happens.
        trunk: the encoder in it.
        dataset: (epoch, index) -> sample.
        losses: (model, batch) -> named losses; their sum is minimised.
        processes: this process and the others.
        images: tells the data of this run from others.
        collate: samples -> batch.

    Raises:
        Stop: if a signal or a loss that is not finite ends the run, or there is nothing to evaluate.
    """
    folder, first = Path(config.output_dir), processes.rank == 0
    if config.evaluate:
        state = load_checkpoint(folder)
        same_everywhere(folder, state, processes)
        if state is None:
            raise Stop(f"--evaluate: {folder} holds no checkpoint")
        restore(state, folder, {"model": model})
        return
    optimizer = torch.optim.AdamW(param_groups(model, trunk, config), lr=config.lr, fused=processes.device.type == "cuda")
    last = min(config.steps, config.max_steps or config.steps)
    where = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = StepSampler(len(dataset), config.batch_size, seed=config.seed, num_steps=last, **where)
    run = Run(config, processes, images)
    run.take_up(last=last, model=model, optimizer=optimizer)
    sampler.start_step = run.step
    pinned = processes.device.type == "cuda"
    loader = make_loader(dataset, sampler, num_workers=config.workers, pin_memory=pinned, collate=collate)
    course = f"{config.steps} steps of {config.batch_size}, on {processes.device}"
    run.announce(model=summary(trunk, config.image_size, config.model), images=f"{len(dataset)} images", training=course)
    trained = parallel(model.train(), processes)
    with run:
        for step, (keys, batch) in run.batches(zip(sampler, loader, strict=True)):
            seed = sample_seed(config.seed, DROPOUT, step, processes.rank)
            torch.manual_seed(seed)  # for drop path and the sampling of regions
            for group in optimizer.param_groups:
                group["lr"] = config.lr * group["lr_scale"] * lr_factor(step - 1, config)
            with autocast(config.precision, processes.device):
                parts = losses(trained, batch)
                loss = torch.stack(list(parts.values())).sum()
            loss.backward()
            if run.finite(step, {"loss": loss, **parts}, partial(names, dataset, [index for _, index in keys])):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.report(step, lr=config.lr * lr_factor(step - 1, config))
            run.checkpoint(step)
    if first:
        records = run.log.records()
        drawn = {name: None for record in records for name in record if name not in ("step", "epoch", *CLOCK)}
        draw_curves(folder / "curves.png", records, drawn)
    run.log.end()


def data_folder(config: DenseConfig, processes: Processes) -> Path:
    """Return the folder of the images: the user's, or ``toy/`` in the run's, with drawn shapes in it.

    Raises:
        Stop: if there is no such folder.
    """
    if config.data != "toy":
        if not Path(config.data).is_dir():
            raise Stop(f"--data: no such folder: {config.data} (the current folder is {Path.cwd()})")
        return Path(config.data)
    root = Path(config.output_dir) / "toy"
    if processes.rank == 0:
        write_toy(root, side=config.image_size, train=config.toy_images, val=max(config.toy_images // 6, 4))
    processes.any(False)  # the others wait for the drawings
    return root


def fingerprint(root: Path, *files: Iterable[str | Path]) -> str:
    """Return what tells the data of a run from others: its files, wherever the folder lies."""
    names = ([os.fsencode(os.path.relpath(file, root)) for file in part] for part in files)
    return "+".join(FileSource(root, part).fingerprint for part in names)


def gather(items: Iterable[Any], processes: Processes) -> list[Any]:
    """Collect the items of all processes, in the order of the ranks."""
    return [item for part in processes.gather(list(items)) for item in part]
