r"""Fine-tune a model on labelled images (Section 4.1.2 and Table 1 of the paper).

  python examples/finetune.py --preset quick --data sample --model runs/quick
      takes two minutes on one CPU core; prints the accuracy on held-out tiles: about 91 %
  torchrun --nproc-per-node 8 examples/finetune.py --data path/to/imagenet --model runs/paper \
    --output-dir runs/paper-finetune
      the paper's run: 100 epochs of ViT-B/16, estimated at 11 to 19 hours of one H100 if images load fast enough (not
      measured); the paper reports 84.3 % after 1600 epochs of pretraining, 83.2 % after 800

Any timm model can be fine-tuned. The defaults are the paper's, or those of MAE's ViT-B where the paper gives none.
"""

import contextlib
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

from engine.checkpoint import Checkpoint
from engine.distributed import DROPOUT, autocast, parallel, start_ranks, to_device
from engine.log import Log
from engine.optim import cosine, describe_warmup, set_learning_rate, warmup_steps
from engine.options import REQUIRED, RunConfig, changeable, option, redefine, run
from engine.signals import Signals, Stop
from mvmae.data import EvalTransform, StepSampler, sample_seed
from mvmae.hub import describe
from mvmae.weights import write_json
from tasks import models
from tasks.features import Pooled, extract
from tasks.inputs import describe_inputs, resolve_inputs
from tasks.labelled import LabelledConfig, TrainTransform, accuracy, clamp_batch, rounded, training_loader
from tasks.plots import draw_curves
from tasks.splits import open_labelled

MIN_LR = 1e-6  # at the end of the schedule (MAE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelledConfig):
    model: str = option(
        REQUIRED,
        "model to train: timm name, hf-hub:ID, folder of a run or export, file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    drop_path: float = option(
        0.1, "rate of stochastic depth in the last block, rising from 0 in the first (MAE)", at_least=0, below=1
    )
    output_dir: str = redefine(RunConfig, "output_dir", "runs/finetune")
    save_every: int = redefine(RunConfig, "save_every", 10_000)
    epochs: int = option(100, "number of passes over the images (paper)", at_least=1, section="Length")
    warmup_epochs: float | None = option(
        None, "epochs of linear warm-up; if not given 5 % of the run (MAE), --preset quick 10 %", at_least=0
    )
    batch_size: int = option(512, "number of images per step, over all processes (paper)", at_least=1, section="Optimizer")
    base_lr: float = option(
        5e-4, "learning rate of AdamW for a batch of 256; it is scaled with the batch, and falls to 1e-6 (MAE)", above=0
    )
    layer_decay: float = option(
        0.65, "factor of the learning rate from each layer to the one below; 1: one rate for all (MAE)", above=0, at_most=1
    )
    weight_decay: float = option(0.05, "weight decay; 1-D parameters, positions and class token have none (MAE)", at_least=0)
    smoothing: float = option(0.1, "label smoothing; 0: none (MAE)", at_least=0, below=1)
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "share of the image's area that a crop covers (MAE)", above=0, at_most=1, lengths=(2,), section="Data"
    )
    augment: str = option(
        "rand-m9-mstd0.5-inc1", "RandAugment policy in timm's notation; none: no RandAugment (paper, with MAE's strength)"
    )
    erasing: float = option(
        0.25, "probability that noise replaces a part of an image, random erasing (MAE)", at_least=0, at_most=1
    )
    mixup: float = option(0.8, "alpha of mixup, which the paper calls a probability; 0: no mixup (paper and MAE)", at_least=0)
    cutmix: float = option(1.0, "alpha of CutMix, in half of the batches instead of mixup; 0: no CutMix (MAE)", at_least=0)
    eval_every: int = option(1, "epochs between two evaluations", at_least=1, may_change=True, section="Evaluation")
    warmup: float = 0.05  # share of the run, where --warmup-epochs is not given: 5 of 100 epochs (MAE)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"help": "the paper's fine-tuning of ViT-B/16: 100 epochs, with MAE's values where the paper gives none"},
    "quick": {
        "help": "20 epochs with random crops and flips only, for small data",
        "output_dir": "runs/quick-finetune",
        "epochs": 20,
        "warmup": 0.1,
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


def build_transform(config: Config, model: nn.Module) -> TrainTransform:
    """Build timm's augmentation: crop, flip, RandAugment, normalisation, random erasing."""
    augmentation = {"scale": config.crop_scale, "re_prob": config.erasing, "re_mode": "pixel"}
    augmentation["auto_augment"] = None if config.augment == "none" else config.augment
    try:
        return TrainTransform(model, **augmentation)
    except (AssertionError, LookupError, ValueError) as error:  # how timm refuses a policy
        cure = "rand-m9-mstd0.5-inc1 is one, none is none"
        raise Stop(f"--augment {config.augment!r} is no policy of timm ({error}): {cure}") from error


def build_mixup(config: Config, num_classes: int) -> Mixup:
    """Build what mixes the images of a batch and smooths their labels."""
    prob, alphas = float(bool(config.mixup or config.cutmix)), {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix}
    return Mixup(**alphas, prob=prob, switch_prob=0.5, label_smoothing=config.smoothing, num_classes=num_classes)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW; ``lr_scale`` of a layer's parameters is the share of the learning rate that they get."""
    decay = {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(model, opt="adamw", lr=config.base_lr, betas=(0.9, 0.999), **decay)
    return optimizer


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 1: warm-up and cosine, over the steps of all epochs."""
    peak, steps = config.base_lr * config.batch_size / 256, config.epochs * steps_per_epoch
    return peak * cosine(step, steps, warmup_steps(config, steps, steps_per_epoch), min(MIN_LR / peak, 1.0))


def main(config: Config) -> None:
    """Train, evaluate on the way, write the result for people and programs."""
    start, ranks = time.monotonic(), start_ranks(config.device)
    data = open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
    config, clamped = clamp_batch(config, len(data.train), 2 * ranks.world_size)
    if config.batch_size // ranks.world_size % 2:
        each = f"--batch-size {config.batch_size} on {ranks.world_size} processes"
        raise Stop(f"{each}: mixup needs an even number of images on each")

    torch.manual_seed(config.seed)
    model = models.load_backbone(config.model, arch=config.arch, image_size=config.image_size, drop_path_rate=config.drop_path)
    source = models.starting_weights(model, config.model, config.arch)
    inputs = resolve_inputs(config, model, data.train, config.image_size)
    models.add_head(model, len(data.class_names), std=2e-5)  # MAE
    model.to(ranks.device).train()
    optimizer = build_optimizer(config, model)
    mixup, cross_entropy = build_mixup(config, len(data.class_names)), SoftTargetCrossEntropy()

    settings = {**dataclasses.asdict(config), "images": [data.train.fingerprint, data.val.fingerprint]}
    checkpoint = Checkpoint(Path(config.output_dir), settings, ranks, may_change=changeable(Config), resume=config.resume)
    folder, group = checkpoint.folder, {"rank": ranks.rank, "world_size": ranks.world_size}
    sampler = StepSampler(len(data.train), config.batch_size, seed=config.seed, start_step=checkpoint.step, **group)
    per_epoch = sampler.steps_per_epoch
    steps = config.epochs * per_epoch
    last = sampler.num_steps = min(steps, config.max_steps or steps)
    loading: dict[str, Any] = {"workers": config.workers, "max_bad": config.max_bad}
    loader = training_loader(data.train, build_transform(config, model), sampler, folder=folder, **loading)
    labels, centre = torch.as_tensor(data.train.labels), EvalTransform(model)

    log, signals, best = Log(folder, ranks, last, checkpoint.step, config.batch_size), Signals(), {"top1": -1.0}
    # for export.py
    about: dict[str, Any] = {"inputs": inputs.to_dict(), "label_names": list(data.class_names)}
    about |= {"start": source, "training": models.classified(source), "command": shlex.join(["python", *sys.argv])}
    with contextlib.suppress(TypeError):  # no plain ViT, which export.py could rebuild
        about["description"] = describe(model)
    checkpoint.restore(log, signals, model=model, optimizer=optimizer, best=best, about=about)
    if ranks.rank == 0:
        log.trackers.start(config.tracker, folder, settings, checkpoint.step, log.say)
    log.say(f"model  {models.summary(model, name=config.model)}")
    log.say(f"inputs  {describe_inputs(config, inputs)}")
    log.say(f"start  {models.describe_start(config.model, about['start'])}\nimages  {data.note}")
    warmup = describe_warmup(warmup_steps(config, steps, per_epoch), steps)
    log.say(f"training  {steps} steps of {config.batch_size} on {ranks.device}{clamped}; {warmup}")

    def evaluate(step: int) -> dict[str, float]:
        """Measure, log, and export the model where it is the best or the last."""
        with autocast(config.precision, ranks.device):
            logits, targets = extract(Pooled(model, "logits"), data.val, centre, ranks, **loading)
        result = accuracy(logits, targets)
        log.write(step=step, **result)
        for name, wanted in (("best", result["top1"] > best["top1"]), ("last", step == last)):
            if ranks.rank == 0 and wanted:
                models.save_classifier(model, folder / name, data.class_names, source)
        best["top1"] = max(best["top1"], result["top1"])
        return result

    trained = parallel(model, ranks)
    with checkpoint.saved_on_error():
        for step, batch in enumerate(log.timed(signals.batches(loader)), checkpoint.step + 1):
            set_learning_rate(optimizer, learning_rate(config, step, per_epoch))
            seed = sample_seed(config.seed, DROPOUT, step, ranks.rank)
            torch.manual_seed(seed)  # of stochastic depth: the same whatever was drawn before
            np.random.seed(seed % 2**32)  # of mixup
            images, targets = to_device(batch.views, ranks.device), labels[batch.indices].to(ranks.device)
            images, targets = mixup(images, targets)  # (B, C, H, W), (B, classes)
            with autocast(config.precision, ranks.device):
                logits = trained(images)
            loss = cross_entropy(logits.float(), targets)
            loss.backward()
            checkpoint.require_finite(step, {"loss": loss}, (data.train.name(int(index)) for index in batch.indices))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add({"loss": loss.detach()})
            if step % config.log_every == 0 or step == last:
                log.write_step(step, epoch=round(step / per_epoch, 3), lr=max(g["lr"] for g in optimizer.param_groups))
            if step % (config.eval_every * per_epoch) == 0 and step != last:
                evaluate(step)
            checkpoint.advance(step, last, config.save_every)

    result = evaluate(last)
    if ranks.rank == 0:
        numbers = {"model": config.model, "data": config.data, "note": data.note, "epochs": config.epochs, "seed": config.seed}
        numbers |= {"started_from": source, **rounded({**result, "best_top1": best["top1"]})}
        numbers["seconds"] = round(time.monotonic() - start, 1)
        write_json(folder / "results.json", numbers)
        draw_curves(folder / "curves.png", log.records(), ("loss", "lr", "top1", "top5", "val_loss"))
        print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, best top-1 {best['top1']:.2f} %; see {folder}")
    log.close()


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
