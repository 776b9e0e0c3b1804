r"""Fine-tune a model on labelled images (Section 4.1.2 and Table 1 of the paper).

  python examples/finetune.py --preset quick --data sample --model runs/quick
      takes two minutes on one CPU core; prints the accuracy on held-out tiles: 91.7, 90.7, 91.1 % for the seeds 0, 1, 2
  torchrun --nproc-per-node 8 examples/finetune.py --data path/to/imagenet --model runs/paper \
    --output-dir runs/paper-finetune
      the paper's run: 100 epochs of ViT-B/16, estimated at 11 to 19 hours of one H100 if images load fast enough (not
      measured); the paper reports 84.3 % after 1600 epochs of pretraining, 83.2 % after 800

Any timm model can be fine-tuned. The defaults are the paper's, or those of MAE's ViT-B where the paper gives none.
"""

import dataclasses
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
from engine.distributed import Processes, autocast, parallel, start_processes, to_device
from engine.ends import Stop
from engine.optim import cosine_schedule
from engine.run import DROPOUT, Run
from mvmae.data import StepSampler, sample_seed
from mvmae.hub import describe
from mvmae.metrics import as_double
from mvmae.weights import write_json
from tasks import labelled
from tasks.backbones import add_head, classified, load_backbone, save_classifier, summary
from tasks.inputs import names
from tasks.labelled import LabelledConfig, Seeded
from tasks.plots import draw_curves
from tasks.splits import Part, open_labelled
from tasks.starting import starting_weights, told, with_background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelledConfig):
    model: str = option(
        dataclasses.MISSING,
        "model to train: timm name, hf-hub:ID, folder of a run or export, file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    output_dir: str = inherit(RunConfig, "output_dir", "runs/finetune")
    drop_path: float = option(
        0.1, "rate of stochastic depth in the last block, rising from 0 in the first (MAE)", at_least=0, below=1
    )
    head_std: float = option(2e-5, "standard deviation of the head's initial weights (MAE)", above=0)
    background: str = option(
        "", "colour behind transparent pixels, a name or #RRGGBB", empty="the model's own, else white", section="Data"
    )
    epochs: int = option(100, "number of passes over the images (paper)", at_least=1, section="Optimization")
    warmup_epochs: float = option(5, "epochs of linear warm-up of the learning rate (MAE)", at_least=0)
    batch_size: int = option(512, "number of images per step, over all processes (paper)", at_least=1)
    base_lr: float = option(5e-4, "learning rate for a batch of 256; it is scaled with the batch (MAE)", at_least=0)
    min_lr: float = option(1e-6, "learning rate at the end of the schedule (MAE)", at_least=0)
    layer_decay: float = option(
        0.65, "factor of the learning rate from each layer to the one below; 1: one rate for all (MAE)", above=0, at_most=1
    )
    weight_decay: float = option(
        0.05, "weight decay of AdamW; 1-D parameters, positions and class token have none (MAE)", at_least=0
    )
    beta2: float = option(0.999, "beta2 of AdamW; beta1 is 0.9 (MAE)", at_least=0, below=1)
    clip_grad: float = option(0.0, "maximum norm of the gradient; 0: no clipping (MAE)", at_least=0)
    smoothing: float = option(0.1, "label smoothing; 0: none (MAE)", at_least=0, below=1)
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights; above 0, the average is evaluated and saved (MAE)",
        at_least=0,
        below=1,
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0),
        "share of the image's area that a crop covers (MAE)",
        above=0,
        at_most=1,
        lengths=(2,),
        section="Augmentation",
    )
    augment: str = option(
        "rand-m9-mstd0.5-inc1", "RandAugment policy in timm's notation; none: no RandAugment (paper, with MAE's strength)"
    )
    color_jitter: float = option(0.0, "strength of colour jitter; 0: no jitter (MAE)", at_least=0)
    erasing: float = option(
        0.25, "probability that noise replaces a part of an image, random erasing (MAE)", at_least=0, at_most=1
    )
    mixup: float = option(
        0.8, "mixup alpha (the paper calls this value a probability); 0: no mixup (paper and MAE)", at_least=0
    )
    cutmix: float = option(1.0, "alpha of CutMix; 0: no CutMix (MAE)", at_least=0)
    mix_prob: float = option(1.0, "probability that mixup or CutMix mixes a batch (MAE)", at_least=0, at_most=1)
    switch_prob: float = option(0.5, "probability of CutMix rather than mixup for a batch (MAE)", at_least=0, at_most=1)
    save_every: int = inherit(RunConfig, "save_every", 10_000)
    eval_every: int = option(1, "epochs between two validations", at_least=1, may_change=True, section="Evaluation")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"help": "the paper's fine-tuning of ViT-B/16: 100 epochs, with MAE's values where the paper gives none"},
    "quick": {
        "help": "20 epochs with random crops and flips only, for small data",
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


@torch.no_grad()
def validate(config: Config, model: nn.Module, val: Part, processes: Processes) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent, and the loss, over all validation images."""
    labels = torch.as_tensor(val.labels).to(processes.device)
    counts = as_double(torch.zeros(4, device=processes.device))
    loading = {"batch_size": config.batch_size, "workers": config.workers, "max_bad": config.max_bad}
    training = model.training
    transform = Seeded(model.eval(), config.image_size, background=config.background)
    for images, rows in labelled.each_once(val, transform, processes, **loading):
        with autocast(config.precision, processes.device):
            logits = model(images)
        counts += labelled.count_right(logits, labels[rows])
    model.train(training)
    return labelled.accuracy(processes.mean(counts))


def main(config: Config) -> None:
    """Train, validate on the way, write the result for people and programs."""
    start, processes = time.monotonic(), start_processes(config.device)
    config = with_background(config, config.model, config.arch)
    device, folder, first = processes.device, Path(config.output_dir), processes.rank == 0
    data = open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
    config, clamped = labelled.clamp_batch(config, len(data.train), 2 * processes.world_size)
    if config.batch_size // processes.world_size % 2:
        each = f"--batch-size {config.batch_size} on {processes.world_size} processes"
        raise Stop(f"{each}: mixup needs an even number of images on each")

    torch.manual_seed(config.seed)
    model = load_backbone(config.model, arch=config.arch, image_size=config.image_size, drop_path_rate=config.drop_path)
    source = starting_weights(model, config.model, config.arch)
    add_head(model, len(data.class_names), std=config.head_std)
    model.to(device).train()
    ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
    measured: nn.Module = model if ema is None else ema.module
    mixup, cross_entropy = build_mixup(config, len(data.class_names)), SoftTargetCrossEntropy()

    optimizer = build_optimizer(config, model)
    group = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = StepSampler(len(data.train), config.batch_size, seed=config.seed, **group)
    per_epoch = sampler.steps_per_epoch
    steps = config.epochs * per_epoch
    last = sampler.num_steps = min(steps, config.max_steps or steps)
    schedule = build_schedule(config, optimizer, per_epoch)
    transform, labels = training_transform(config, model), torch.as_tensor(data.train.labels)
    loader = labelled.training_loader(data.train, transform, sampler, workers=config.workers, max_bad=config.max_bad)

    about = {"label_names": list(data.class_names), "start": source, "training": classified(source)}
    if isinstance(model, VisionTransformer | Eva):
        about["description"] = describe(model)
    best, averaged = {"top1": -1.0}, {} if ema is None else {"ema": ema.module}
    run = Run(config, processes, [part.fingerprint for part in (data.train, data.val)])
    run.take_up(last=last, model=model, optimizer=optimizer, best=best, about=about, **averaged)
    sampler.start_step = run.step
    run.announce(
        model=summary(model, config.image_size, config.model),
        weights=told(source) if source or run.found is None else "",
        images=data.note,
        training=f"{steps} steps of {config.batch_size} on {device}{clamped}",
    )

    def look(step: int) -> dict[str, float]:
        """Validate and log, and keep the best model and the last."""
        result = validate(config, measured, data.val, processes)
        run.log.write(step=step, **result)
        for name, wanted in (("best", result["top1"] > best["top1"]), ("last", step == last)):
            if first and wanted:
                save_classifier(measured, folder / name, data.class_names, source, config.background)
        best["top1"] = max(best["top1"], result["top1"])
        return result

    with run:
        trained = parallel(model, processes)
        for step, batch in run.batches(loader):
            seed = sample_seed(config.seed, DROPOUT, step, processes.rank)
            torch.manual_seed(seed)  # for stochastic depth
            np.random.seed(seed % 2**32)  # for mixup
            schedule.step_update(step - 1)
            images, target = to_device(batch.views, device), labels[batch.indices].to(device)
            images, target = mixup(images, target)  # (B, C, H, W), (B, classes)
            with autocast(config.precision, device):
                logits = trained(images)
            loss = cross_entropy(logits.float(), target)
            loss.backward()
            if run.finite(step, {"loss": loss}, partial(names, data.train, batch.indices)):
                if config.clip_grad:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                if ema is not None:
                    ema.update(model)
            optimizer.zero_grad(set_to_none=True)
            run.report(step, epoch=round(step / per_epoch, 3), lr=max(group["lr"] for group in optimizer.param_groups))
            if step % (config.eval_every * per_epoch) == 0 and step != last:
                look(step)
            run.checkpoint(step)

    result = look(last)
    run.log.end()
    if first:
        numbers = {"model": config.model, "data": config.data, "note": data.note, "epochs": config.epochs, "seed": config.seed}
        numbers |= {"started_from": source, **result, "best_top1": best["top1"], "seconds": round(time.monotonic() - start, 1)}
        write_json(folder / "results.json", numbers)
        draw_curves(folder / "curves.png", run.log.records(), ("loss", "lr", "top1", "top5", "val_loss"))
        print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, best top-1 {best['top1']:.2f} %; see {folder}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
