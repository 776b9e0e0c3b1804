"""Fine-tune a model on labelled images (Section 4.1.2, Table 1).

  python examples/finetune.py --preset quick --data sample --model runs/quick
      two minutes on one CPU core; ends with the accuracy on held-out tiles: 91.7, 90.7, 91.1 % for the seeds 0, 1, 2
  torchrun --nproc-per-node 8 examples/finetune.py --data path/to/imagenet --model runs/paper --output-dir runs/paper-finetune
      the paper's setting: 100 epochs of ViT-B/16, estimated at 11 to 19 hours of one H100 that images are loaded fast enough
      for (not measured); the paper's accuracy is 84.3 % after 1600 epochs of pretraining, 83.2 % after 800

Any model of timm can be fine-tuned: --model takes a name, hf-hub:ID, a run's folder, local-dir:FOLDER or a file of weights;
random: before it starts from untrained weights. The defaults are the paper's, or MAE's ViT-B fine-tuning where it is silent;
quick only crops and flips, for little data.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from engine.cli import inherit, option, run
from engine.config import RunConfig
from engine.distributed import autocast, parallel, start_processes
from engine.ends import Stop
from engine.log import write_text
from engine.optim import cosine_schedule
from engine.run import Run
from mvmae.data import Loader, StepSampler, sample_seed
from mvmae.hub import describe
from tasks import labelled
from tasks.backbones import add_head, classified, load_backbone, save_classifier, summary
from tasks.inputs import names
from tasks.labelled import LabelledConfig, Seeded, open_labelled
from tasks.plots import draw_curves
from tasks.starting import starting_weights, told, with_background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelledConfig):
    model: str = option(
        dataclasses.MISSING, "timm name, hf-hub:ID, run or export folder, file of weights; random: before it", path=True
    )
    output_dir: str = inherit(RunConfig, "output_dir", "runs/finetune")
    background: str = option("", "colour behind transparent pixels, such as white or #808080; the model's own, or white")
    epochs: int = option(100, "passes over the images (paper)", at_least=1)
    warmup_epochs: float = option(5, "epochs of linear warm-up (MAE)", at_least=0)
    batch_size: int = option(512, "images of a step over all processes (paper)", at_least=1)
    base_lr: float = option(5e-4, "learning rate for a batch of 256; scaled with the batch (MAE)", at_least=0)
    min_lr: float = option(1e-6, "learning rate at the end (MAE)", at_least=0)
    layer_decay: float = option(0.65, "factor of the learning rate from each layer to the one below (MAE)", above=0, at_most=1)
    weight_decay: float = option(
        0.05, "weight decay of AdamW, not on 1-D parameters, positions and class token (MAE)", at_least=0
    )
    beta2: float = option(0.999, "beta2 of AdamW; beta1 is 0.9 (MAE)", at_least=0, below=1)
    clip_grad: float = option(0.0, "largest norm of the gradient; 0 does not clip (MAE)", at_least=0)
    drop_path: float = option(0.1, "rate of stochastic depth at the last block, rising from 0 (MAE)", at_least=0, below=1)
    head_std: float = option(2e-5, "deviation of the head's first weights (MAE)", above=0)
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "share of the image's area that a crop covers (MAE)", above=0, at_most=1, lengths=(2,)
    )
    augment: str = option("rand-m9-mstd0.5-inc1", "RandAugment as timm writes it (paper; strength: MAE); none for none")
    color_jitter: float = option(0.0, "strength of colour jitter (MAE)", at_least=0)
    erasing: float = option(0.25, "probability of random erasing, with noise (MAE)", at_least=0, at_most=1)
    mixup: float = option(0.8, "alpha of mixup, 0 for none (paper: 0.8, taken as MAE's alpha)", at_least=0)
    cutmix: float = option(1.0, "alpha of cutmix, 0 for none (MAE)", at_least=0)
    mix_prob: float = option(1.0, "probability that a batch is mixed (MAE)", at_least=0, at_most=1)
    switch_prob: float = option(0.5, "probability of cutmix rather than mixup (MAE)", at_least=0, at_most=1)
    smoothing: float = option(0.1, "label smoothing (MAE)", at_least=0, below=1)
    ema: float = option(0.0, "decay of averaged weights, which are evaluated then; 0 for none (MAE)", at_least=0, below=1)
    save_every: int = inherit(RunConfig, "save_every", 10_000)
    eval_every: int = option(1, "epochs between validations", at_least=1, may_change=True)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "output_dir": "runs/quick-finetune",
        "epochs": 20,
        "warmup_epochs": 2,
        "batch_size": 64,
        "base_lr": 4e-3,
        "drop_path": 0.0,
        "augment": "none",
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "workers": 2,
        "save_every": 200,
        "eval_every": 5,
    },
}


def training_transform(config: Config, model: nn.Module) -> Seeded:
    """Build timm's augmentation: crop, flip, RandAugment, normalisation, random erasing."""
    options: dict[str, Any] = {
        "scale": config.crop_scale,
        "color_jitter": config.color_jitter or None,
        "re_prob": config.erasing,
    }
    options |= {"background": config.background, "auto_augment": None if config.augment == "none" else config.augment}
    try:
        return Seeded(model, config.image_size, is_training=True, re_mode="pixel", **options)
    except (AssertionError, LookupError, ValueError) as error:  # how timm refuses a policy
        raise Stop(
            f"--augment {config.augment!r} is no policy of timm ({error}): rand-m9-mstd0.5-inc1 is one, none is none"
        ) from error


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


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Build warm-up and cosine, over the steps of all epochs."""
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return cosine_schedule(optimizer, config.epochs * steps_per_epoch, warmup_steps, config.min_lr)


class FineTuning:
    """All that a run consists of, set up from its options and a checkpoint, if there is one."""

    def __init__(self, config: Config) -> None:
        config = with_background(config, config.model, config.arch)
        self.processes = start_processes(config.device)
        self.device, self.folder, self.first = self.processes.device, Path(config.output_dir), self.processes.rank == 0
        self.data = open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
        config, self.clamped = labelled.clamp_batch(config, len(self.data.train), 2 * self.processes.world_size)
        self.config = config
        if config.batch_size // self.processes.world_size % 2:
            each = f"--batch-size {config.batch_size} on {self.processes.world_size} processes"
            raise Stop(f"{each}: mixup needs an even number of images on each")
        torch.manual_seed(config.seed)
        options = {"drop_path_rate": config.drop_path}
        self.model = load_backbone(config.model, arch=config.arch, image_size=config.image_size, **options)
        self.start = starting_weights(self.model, config.model, config.arch)
        add_head(self.model, len(self.data.class_names), std=config.head_std)
        self.model.to(self.device).train()
        self.ema = ModelEmaV3(self.model, decay=config.ema) if config.ema else None
        self.optimizer, self.best = build_optimizer(config, self.model), -1.0
        group = {"rank": self.processes.rank, "world_size": self.processes.world_size}
        self.sampler = StepSampler(len(self.data.train), config.batch_size, seed=config.seed, **group)
        self.steps = config.epochs * self.sampler.steps_per_epoch
        self.sampler.num_steps = min(self.steps, config.max_steps or self.steps)
        self.schedule = build_schedule(config, self.optimizer, self.sampler.steps_per_epoch)
        self.transform = training_transform(config, self.model)
        self.resume_or_start()

    def resume_or_start(self) -> None:
        """Take everything back from the newest checkpoint."""
        run = Run(self.config, self.processes, [part.fingerprint for part in (self.data.train, self.data.val)])
        modules = {"model": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})
        self.log = run.take_up(modules, self.optimizer, {"best": self.best}, last=self.sampler.num_steps or 0)
        self.sampler.start_step, self.best = run.step, run.found["best"] if run.found else self.best
        self.log.say(summary(self.model, self.config.image_size))
        self.log.say(told(self.start))
        self.log.say(f"{self.data.note}; {self.steps} steps of {self.config.batch_size} on {self.device}{self.clamped}")
        self.course = run.course(self.about)

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides weights and options: the best accuracy, and what an export needs."""
        parts = {"best": self.best, "label_names": list(self.data.class_names)}
        parts |= {"start": self.start, "training": classified(self.start)}
        if isinstance(self.model, VisionTransformer | Eva):
            parts["description"] = describe(self.model)
        return parts

    def loader(self) -> Loader:
        """Load the training images of each step."""
        options: dict[str, Any] = {"workers": self.config.workers, "max_bad": self.config.max_bad}
        return labelled.training_loader(self.data.train, self.transform, self.sampler, **options)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Give top-1 and top-5 accuracy in percent, and the loss, over all validation images; keep the best model."""
        config, model = self.config, self.model if self.ema is None else self.ema.module
        labels = torch.as_tensor(self.data.val.labels).to(self.device)
        counts = torch.zeros(4, dtype=torch.float64, device=self.device)
        loading = {"batch_size": config.batch_size, "workers": config.workers, "max_bad": config.max_bad}
        model.eval()
        for images, rows in labelled.each_once(
            self.data.val, Seeded(model, config.image_size, background=config.background), self.processes, **loading
        ):
            with autocast(config.precision, self.device):
                logits = model(images)
            counts += labelled.count_right(logits, labels[rows])
        self.model.train()
        result = labelled.accuracy(self.processes.mean(counts))
        self.log.write(step=step, **result)
        for name, wanted in (("best", result["top1"] > self.best), ("last", step == self.sampler.num_steps)):
            if self.first and wanted:
                save_classifier(model, self.folder / name, self.data.class_names, self.start, config.background)
        self.best = max(self.best, result["top1"])
        return result


def train(run: FineTuning) -> None:
    """Run the steps, validate and save on the way."""
    config, sampler, course = run.config, run.sampler, run.course
    model, per_epoch = parallel(run.model, run.processes), sampler.steps_per_epoch
    mixup, cross_entropy = build_mixup(config, len(run.data.class_names)), SoftTargetCrossEntropy()
    labels = torch.as_tensor(run.data.train.labels)
    for step, batch in course.follow(run.loader()):
        seed = sample_seed(config.seed, -2, step, run.processes.rank)
        torch.manual_seed(seed)  # for stochastic depth
        np.random.seed(seed % 2**32)  # for mixup
        run.schedule.step_update(step - 1)
        images, target = batch.views.to(run.device, non_blocking=True), labels[batch.indices].to(run.device)
        images, target = mixup(images, target)  # (B, C, H, W), (B, classes)
        with autocast(config.precision, run.device):
            logits = model(images)
        loss = cross_entropy(logits.float(), target)
        loss.backward()
        if course.accepts(step, {"loss": loss}, partial(names, run.data.train, batch.indices)):
            if config.clip_grad:
                nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
            run.optimizer.step()
            if run.ema is not None:
                run.ema.update(run.model)
        run.optimizer.zero_grad(set_to_none=True)
        course.report(step, epoch=round(step / per_epoch, 3), lr=max(group["lr"] for group in run.optimizer.param_groups))
        if step % (config.eval_every * per_epoch) == 0 and step != sampler.num_steps:
            run.validate(step)


def finish(run: FineTuning, start: float) -> None:
    """Validate, and write the result for people and programs."""
    config, result = run.config, run.validate(run.sampler.num_steps or 0)
    run.log.close()
    if run.first:
        about = {
            "model": config.model,
            "data": config.data,
            "note": run.data.note,
            "epochs": config.epochs,
            "seed": config.seed,
        }
        about |= {"started_from": run.start, **result, "best_top1": run.best, "seconds": round(time.monotonic() - start, 1)}
        write_text(run.folder / "results.json", json.dumps(about, indent=2) + "\n")
        draw_curves(run.folder / "curves.png", run.log.records(), ("loss", "lr", "top1", "top5", "val_loss"))
        print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, best top-1 {run.best:.2f} %; see {run.folder}")


def main(config: Config) -> None:
    """Set up, train, write the result."""
    start, run = time.monotonic(), FineTuning(config)
    with run.course:
        train(run)
    finish(run, start)


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
