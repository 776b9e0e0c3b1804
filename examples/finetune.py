"""Fine-tune a model on labelled images (Section 4.1.2, Table 1).

  python examples/finetune.py --preset quick --data sample --model runs/quick
      minutes on two CPU cores; ends with the accuracy on the validation images
  torchrun --nproc-per-node 8 examples/finetune.py --data path/to/imagenet --model runs/paper --output-dir runs/paper-finetune
      the paper's setting: 100 epochs of ViT-B/16, estimated at 25 to 45 hours of one H100 (not measured); the paper's
      accuracy is 84.3 % after 1600 epochs of pretraining, 83.2 % after 800

Any model of timm can be fine-tuned: --model takes a name, hf-hub:ID, a run's folder, local-dir:FOLDER or a file of weights;
random: before it starts from untrained weights. The defaults are the paper's, or MAE's ViT-B fine-tuning where it is silent.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import labelled
import models
import numpy as np
import torch
from checkpoint import open_run, save_checkpoint, write_text
from common import (
    Log,
    Processes,
    Stop,
    StopSignal,
    cosine_schedule,
    draw_curves,
    inject_fault,
    option,
    parallel,
    run,
    start_processes,
)
from labelled import Labelled, Seeded
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from mvmae.data import DataError, Loader, StepSampler, sample_seed


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option(dataclasses.MISSING, "labelled images: a folder of class folders, IDX files, a timm data set, or sample")
    model: str = option(dataclasses.MISSING, "timm name, hf-hub:ID, run or export folder, file of weights; random: before it")
    output_dir: str = option("runs/finetune", "folder of the run")
    resume: bool = option(False, "go on from the newest checkpoint in the output folder, if there is one")
    arch: str = option("", "timm name of the model of a lone file of weights")
    image_size: int = option(0, "side of an image in pixels; 0 for the model's own (paper: 224)")
    train_images: int = option(0, "most images to train on; 0 for all")
    val_images: int = option(0, "most images to validate on; 0 for all")
    epochs: int = option(100, "passes over the images (paper)")
    warmup_epochs: float = option(5, "of a linearly rising learning rate (MAE)")
    batch_size: int = option(512, "images of a step over all processes (paper)")
    base_lr: float = option(5e-4, "learning rate for a batch of 256; scaled with the batch (MAE)")
    min_lr: float = option(1e-6, "learning rate at the end (MAE)")
    layer_decay: float = option(0.65, "factor of the learning rate from each layer to the one below (MAE)")
    weight_decay: float = option(0.05, "of AdamW, not on 1-D parameters, positions and class token (MAE)")
    beta2: float = option(0.999, "of AdamW; beta1 is 0.9 (MAE)")
    clip_grad: float = option(0.0, "largest norm of the gradient; 0 does not clip (MAE)")
    drop_path: float = option(0.1, "rate of stochastic depth at the last block, rising from 0 (MAE)")
    head_std: float = option(2e-5, "of the head's first weights (MAE)")
    crop_scale: tuple[float, ...] = option((0.08, 1.0), "share of the image's area that a crop covers (MAE)")
    augment: str = option("rand-m9-mstd0.5-inc1", "RandAugment as timm writes it (paper; strength: MAE); none for none")
    color_jitter: float = option(0.0, "strength of colour jitter (MAE)")
    erasing: float = option(0.25, "probability of random erasing, with noise (MAE)")
    mixup: float = option(0.8, "alpha of mixup, 0 for none (paper: 0.8, taken as MAE's alpha)")
    cutmix: float = option(1.0, "alpha of cutmix, 0 for none (MAE)")
    mix_prob: float = option(1.0, "probability that a batch is mixed (MAE)")
    switch_prob: float = option(0.5, "probability of cutmix rather than mixup (MAE)")
    smoothing: float = option(0.1, "label smoothing (MAE)")
    ema: float = option(0.0, "decay of averaged weights, which are evaluated then; 0 for none (MAE)")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "auto takes CUDA where there is one", ["auto", "cpu", "cuda"])
    precision: str = option("auto", "auto is bf16 autocast on CUDA, float32 elsewhere", ["auto", "bf16", "float32"])
    workers: int = option(8, "processes that load images, for each process that trains")
    max_bad: int = option(100, "different images that may be unreadable before the run stops")
    max_steps: int = option(0, "end the run after this many steps of the schedule; 0 for all")
    save_every: int = option(1000, "steps between checkpoints; the end is saved in any case")
    eval_every: int = option(1, "epochs between validations")
    log_every: int = option(20, "steps between lines of the log")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "output_dir": "runs/quick-finetune",
        "epochs": 30,
        "warmup_epochs": 3,
        "batch_size": 64,
        "base_lr": 4e-3,
        "workers": 2,
        "save_every": 200,
        "eval_every": 5,
    },
}
MAY_CHANGE = frozenset(
    {"output_dir", "resume", "device", "workers", "max_bad", "max_steps", "save_every", "eval_every", "log_every"}
)


def training_transform(config: Config, model: nn.Module) -> Seeded:
    """Build timm's augmentation: crop, flip, RandAugment, normalisation, random erasing."""
    return Seeded(
        model,
        config.image_size,
        is_training=True,
        scale=(config.crop_scale[0], config.crop_scale[-1]),
        auto_augment=None if config.augment == "none" else config.augment,
        color_jitter=config.color_jitter or None,
        re_prob=config.erasing,
        re_mode="pixel",
    )


def build_mixup(config: Config, num_classes: int) -> Mixup:
    """Build what mixes the images of a batch and smooths their labels."""
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob if config.mixup or config.cutmix else 0.0,
        switch_prob=config.switch_prob,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW with a learning rate for each layer; it takes effect through timm's schedule."""
    lr, betas = config.base_lr * config.batch_size / 256, (0.9, config.beta2)
    options = {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay, "betas": betas}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, **options)
    return optimizer


@torch.no_grad()
def validate(config: Config, model: nn.Module, data: Labelled, processes: Processes) -> dict[str, float]:
    """Give top-1 and top-5 accuracy in percent, and the loss, over all validation images that can be read."""
    transform = Seeded(model, config.image_size)
    labels = torch.as_tensor(data.val.labels).to(processes.device)
    counts = torch.zeros(4, dtype=torch.float64, device=processes.device)
    model.eval()
    batches = {"batch_size": config.batch_size, "workers": config.workers, "max_bad": config.max_bad}
    for images, indices in labelled.each_once(data.val, transform, processes, **batches):
        with labelled.autocast(config.precision, processes.device):
            logits = model(images)
        counts += labelled.count_right(logits, labels[indices])
    model.train()
    return labelled.accuracy(processes.mean(counts))


class Run:
    """What a run keeps between its steps: model, averaged model, optimizer, and the best accuracy so far."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.model, self.optimizer = model, build_optimizer(config, model)
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.best, self.step = -1.0, 0

    @property
    def evaluated(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.model

    def state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
        }
        return state | ({"ema": self.ema.module.state_dict()} if self.ema is not None else {})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.step = state["best"], state["step"]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])


def train(
    config: Config,
    current: Run,
    loader: Loader,
    sampler: StepSampler,
    data: Labelled,
    processes: Processes,
    log: Log,
    save: Callable[[], None],
) -> dict[str, float]:
    """Run the steps of the sampler, validate and save on the way; give the last validation."""
    device, stop, folder = processes.device, StopSignal(), Path(config.output_dir)
    per_epoch = sampler.steps_per_epoch
    steps = config.epochs * per_epoch
    schedule = cosine_schedule(current.optimizer, steps, round(config.warmup_epochs * per_epoch), config.min_lr)
    model, mixup = parallel(current.model.train(), processes), build_mixup(config, len(data.class_names))
    labels = torch.as_tensor(data.train.labels).to(device)
    cross_entropy, total, result = SoftTargetCrossEntropy(), torch.zeros(2, device=device), {}
    for step, batch in enumerate(loader, start=sampler.start_step + 1):
        seed = sample_seed(config.seed, -2, step, processes.rank)
        torch.manual_seed(seed)  # for stochastic depth
        np.random.seed(seed % 2**32)  # for mixup
        schedule.step_update(step - 1)
        images, target = batch.views.to(device, non_blocking=True), labels[batch.indices.to(device)]
        images, target = mixup(images, target)  # (B, C, H, W), (B, classes)
        with labelled.autocast(config.precision, device):
            logits = model(images)
        loss = cross_entropy(logits.float(), target)
        loss.backward()
        if config.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        current.optimizer.step()
        current.optimizer.zero_grad(set_to_none=True)
        if current.ema is not None:
            current.ema.update(current.model)
        total += torch.stack([loss.detach(), torch.ones_like(loss)])
        current.step = step
        log.advance(step)
        last, stopped = step == sampler.num_steps, processes.any(stop.received is not None)
        if step % config.log_every == 0 or last:
            mean = float(processes.mean(total[0] / total[1]))
            if not np.isfinite(mean):
                raise Stop(f"the loss is not finite at step {step}: the last checkpoint is from before", 1)
            rate = max(group["lr"] for group in current.optimizer.param_groups)
            log.write(step=step, epoch=round(step / per_epoch, 3), loss=mean, lr=rate)
            total.zero_()
        if step % (config.eval_every * per_epoch) == 0 or last:
            result = validate(config, current.evaluated, data, processes)
            log.write(step=step, **result)
            if result["top1"] > current.best:
                current.best = result["top1"]
                if processes.rank == 0:
                    models.save_classifier(current.evaluated, folder / "best", data.class_names)
        if step % config.save_every == 0 or last or stopped:
            save()
        inject_fault(step)
        if stopped and not last:
            log.close()
            raise Stop(f"stopped after step {step} of {steps}, which is saved: add --resume to go on", stop.exit_code)
    return result


def main(config: Config) -> None:
    """Set up, train, write the result."""
    processes, start = start_processes(config.device), time.monotonic()
    folder, first = Path(config.output_dir), processes.rank == 0
    data = labelled.open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
    if config.batch_size // processes.world_size % 2:
        raise Stop(f"--batch-size {config.batch_size} on {processes.world_size} processes: mixup needs an even number on each")
    torch.manual_seed(config.seed)
    model = models.load_backbone(config.model, arch=config.arch, image_size=config.image_size, drop_path_rate=config.drop_path)
    models.add_head(model, len(data.class_names), std=config.head_std)
    current = Run(config, model.to(processes.device))
    steps = config.epochs * (len(data.train) // config.batch_size)
    sampler = StepSampler(
        len(data.train),
        config.batch_size,
        seed=config.seed,
        num_steps=min(steps, config.max_steps or steps),
        rank=processes.rank,
        world_size=processes.world_size,
    )
    settings = {**dataclasses.asdict(config), "images": [data.train.fingerprint, data.val.fingerprint]}
    state = open_run(folder, settings, MAY_CHANGE, resume=config.resume, first=first)
    if state:
        current.load(state)
        sampler.start_step = state["step"]
    log = Log(folder, processes.rank, sampler.num_steps or 0, sampler.start_step)
    log.say(f"{data.note}; {steps} steps of {config.batch_size} on {processes.device}")

    def save() -> None:
        if first:
            save_checkpoint(folder, {**current.state(), "settings": settings})

    loader = labelled.training_loader(
        data.train, training_transform(config, model), sampler, workers=config.workers, max_bad=config.max_bad
    )
    try:
        result = train(config, current, loader, sampler, data, processes, log, save)
    except DataError as error:
        raise Stop(f"{error}", 1) from error
    log.close()
    if first:
        result = result or validate(config, current.evaluated, data, processes)
        models.save_classifier(current.evaluated, folder / "last", data.class_names)
        about = {"model": config.model, "data": config.data, "note": data.note, "epochs": config.epochs, "seed": config.seed}
        about |= {**result, "best_top1": current.best, "seconds": round(time.monotonic() - start, 1)}
        write_text(folder / "results.json", json.dumps(about, indent=2) + "\n")
        draw_curves(folder / "curves.png", log.records(), ("loss", "lr", "top1", "top5", "val_loss"))
        print(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  best top-1 {current.best:.2f} %; see {folder}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
