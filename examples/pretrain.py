"""Pretrain an encoder on unlabelled images (Section 4.1.1).

  python examples/pretrain.py --data sample --preset quick
      minutes on two CPU cores; prints k-NN accuracy on held-out tiles before and after
  torchrun --nproc-per-node 8 examples/pretrain.py --data path/to/imagenet --output-dir runs/paper --workers 12
      the paper's run: 1600 epochs of ViT-B/16, estimated at 120 to 215 hours of one H100 (not measured); the paper's
      fine-tuning accuracy after it is 84.3 %, its linear probe 76.7 %
  python examples/pretrain.py --preset adapt --encoder vit_small_patch16_dinov3 --data path/to/images --output-dir runs/adapted
      goes on from published weights on images of one's own: see examples/README.md

The defaults are the paper's, or MAE's where the paper is silent. Add --resume to go on with a run that was cut.
"""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

import mvmae
from engine.cli import run
from engine.distributed import autocast, parallel, start_processes
from engine.ends import Stop
from engine.optim import cosine_schedule
from engine.run import Run
from mvmae.data import Loader, MultiViewDataset, StepSampler, make_loader, sample_seed
from mvmae.hub import describe, export
from mvmae.metrics import collapse_warning
from mvmae.visualize import reconstruction_picture
from tasks.backbones import summary
from tasks.inputs import augmented, channel_statistics, names, normalize, repeated
from tasks.labelled import clamp_batch, open_splits
from tasks.monitor import MONITORED, Monitor, report
from tasks.plots import draw_curves
from tasks.pretraining import Config as Config
from tasks.pretraining import build_model
from tasks.starting import Freeze, parameter_groups, starting_weights, told, with_background

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "output_dir": "runs/quick",
        "encoder": "mvmae_vit_tiny_patch16",
        "encoder_args": "patch_size=8 embed_dim=128 depth=4 num_heads=4",
        "image_size": (48,),
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "epochs": 30,
        "warmup_epochs": 3,
        "batch_size": 64,
        "base_lr": 4e-3,
        "workers": 2,
        "save_every": 100,
        "monitor": 10,
    },
    "adapt": {  # all but the layer decay's source are assumed: nobody has published such a recipe
        "output_dir": "runs/adapt",
        "pretrained": True,
        "freeze_epochs": 5,  # a random decoder's gradients would spoil the encoder, as a random head's do (LP-FT)
        "layer_decay": 0.75,  # low layers hold what all images share (BEiT, MAE fine-tuning: 0.65 to 0.75)
        "projector": 128,  # takes the contrastive loss's pull: on the features themselves it undid them (examples/README.md)
        "base_lr": 1e-4,  # below pretraining's: the way from good weights is short
        "epochs": 100,  # own images are few; the drift in curves.png shows where to stop
        "warmup_epochs": 5,
        "monitor": 10,
    },
}


CURVES = ("loss", "loss_rec", "loss_con", "knn", "effective_rank", "uniformity", "similarity", "cka", "lr")


class Pretraining:
    """All that a run consists of, set up from its options and a checkpoint, if there is one."""

    def __init__(self, config: Config) -> None:
        config = with_background(config, config.encoder, config.arch)
        self.processes = start_processes(config.device)
        self.device, self.folder, self.first = self.processes.device, Path(config.output_dir), self.processes.rank == 0
        start = time.monotonic()
        splits = open_splits(config.data)
        self.listing, self.note = time.monotonic() - start, splits.note
        self.source = repeated(splits.train, config.crops_per_image)
        config, self.clamped = clamp_batch(config, len(self.source), self.processes.world_size * config.accumulate)
        self.config = config
        if config.loss_weight and config.batch_size // (1 if config.gather else self.processes.world_size) < 2:
            each = "" if config.gather else f" with --no-gather on {self.processes.world_size} processes"
            raise Stop(
                f"--batch-size {config.batch_size}{each} leaves the contrastive loss no negatives: use more, or --loss-weight 0"
            )
        if config.freeze_epochs >= config.epochs:
            raise Stop(
                f"--freeze-epochs {config.freeze_epochs:g} leaves nothing of --epochs {config.epochs:g} to train the encoder in"
            )
        self.model = build_model(config).to(self.device).train()
        self.image_size = self.model.encoder.patch_embed.img_size
        self.start = starting_weights(self.model.encoder, config.encoder, config.arch) if config.pretrained else {}
        self.pixels: dict[str, Any] = {"in_chans": config.in_chans, "max_pixels": config.max_pixels}
        self.pixels |= {"value_range": config.value_range or None, "background": config.background}
        centre = mvmae.CentreCropTransform(self.image_size, **self.pixels)
        typed = {"mean": config.mean, "std": config.std}
        self.mean, self.std = channel_statistics(typed, self.model.encoder.pretrained_cfg, self.source, centre)
        steps_per_epoch = len(self.source) // config.batch_size
        self.steps = max(round(config.epochs * steps_per_epoch), 1)
        self.sampler = StepSampler(
            len(self.source),
            config.batch_size,
            seed=config.seed,
            num_steps=min(self.steps, config.max_steps or self.steps),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self.lr = config.base_lr * config.batch_size / 256
        gentle = config.layer_decay != 1 or config.freeze_epochs > 0
        self.optimizer = create_optimizer_v2(
            parameter_groups(self.model, config.weight_decay, config.layer_decay) if gentle else self.model,
            opt="adamw",
            lr=self.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, config.beta2),
            fused=self.device.type == "cuda",
        )
        self.freeze = Freeze(self.model.encoder, round(config.freeze_epochs * steps_per_epoch))
        self.schedule = cosine_schedule(self.optimizer, self.steps, round(config.warmup_epochs * steps_per_epoch))
        self.description = describe(self.model)
        self.monitor = Monitor(
            splits,
            centre,
            self.mean,
            self.std,
            config.monitor_images,
            self.processes,
            drift=config.pretrained,
            batch_size=min(config.batch_size, 256 * self.processes.world_size),
            workers=config.workers,
            max_bad=config.max_bad,
            bad_file=self.folder / "bad_files.txt",
        )
        self.views = self.transform()
        self.resume_or_start()

    def resume_or_start(self) -> None:
        """Take everything back from the newest checkpoint, or look at the encoder as it is before."""
        run = Run(self.config, self.processes, self.source.fingerprint)
        found = run.found or {}
        followed = torch.empty(0, self.model.encoder.embed_dim) if found.get("start_features") is not None else None
        also: dict[str, Any] = {"before": {}, "start_features": followed}
        self.log = run.take_up({"model": self.model}, self.optimizer, also, last=self.sampler.num_steps or 0)
        self.sampler.start_step = run.step
        self.log.say(summary(self.model.encoder))
        listed = f"{len(self.source)} images, listed in {self.listing:.1f} s"
        about = f"{listed}, {self.steps} steps of {self.config.batch_size}, learning rate {self.lr:.3g}"
        self.log.say(f"{about}, on {self.device}{self.clamped}")
        self.log.say(f"{self.note}; {self.monitor.note}")
        if self.start:
            self.log.say(told(self.start))
        self.monitor.start = found.get("start_features")
        self.before = found["before"] if found else self.look(0)
        self.course = run.course(self.about)

    def transform(self) -> Callable[..., Tensor]:
        """Make what takes V views of an image."""
        config = self.config
        transform = mvmae.MultiViewTransform(
            self.image_size,
            num_views=config.num_views,
            scale=config.crop_scale,
            same_crop=config.same_crop,
            decoder=config.loader,
            **self.pixels,
        )
        return augmented(transform, config.transform)

    def loader(self) -> Loader:
        """Load V views of each image of a step."""
        config = self.config
        dataset = MultiViewDataset(self.source, self.views, seed=config.seed, max_bad=config.max_bad)
        options = {"num_workers": config.workers, "pin_memory": self.device.type == "cuda"}
        return make_loader(dataset, self.sampler, bad_file=self.folder / "bad_files.txt", **options)  # type: ignore[arg-type]

    def trained(self, step: int) -> torch.nn.Module:
        """Freeze the encoder or set it free, and give the model as it is to be trained from this step on."""
        self.freeze.apply(step)
        model = torch.compile(self.model) if self.config.compile else self.model
        return parallel(model, self.processes)  # type: ignore[arg-type]

    def masks(self, step: int) -> mvmae.Mask:
        """Draw this process's part of the masks of a step, which are the same for any number of processes."""
        views = self.config.batch_size * self.config.num_views
        generator = torch.Generator().manual_seed(sample_seed(self.config.seed, -1, step))
        length = self.model.encoder.patch_embed.num_patches
        share = views // self.processes.world_size
        own = slice(self.processes.rank * share, (self.processes.rank + 1) * share)
        ratio = self.config.mask_ratio
        return mvmae.random_mask(views, length, ratio, generator=generator, device=self.device, rows=own)

    def look(self, step: int, limit: int = 0) -> dict[str, float]:
        """Log what the encoder's features are worth now, and warn where they have collapsed."""
        found = self.monitor.look(self.model.eval().features, limit)
        self.model.train()
        if found:
            self.log.write(step=step, **found)
            if warning := collapse_warning(found["effective_rank"]):
                self.log.say(f"warning: {warning}")
        return found

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides weights and options: what an export needs, and the first look."""
        about = {"description": self.description, "mean": self.mean, "std": self.std, "command": shlex.join(sys.argv)}
        return {**about, "start": self.start, "start_features": self.monitor.start, "before": self.before}


def backward(model: torch.nn.Module, views: Tensor, mask: mvmae.Mask, parts: int) -> mvmae.Losses:
    """Compute losses and gradients of a batch, whole or in parts; the backward pass runs outside autocast."""
    if parts > 1:
        return mvmae.backward_in_parts(model, views, parts, mask=mask)
    output = model(views, mask=mask)
    with torch.autocast(views.device.type, enabled=False):
        output.loss.backward()
    return mvmae.Losses(*(loss.detach() for loss in (output.loss, output.loss_rec, output.loss_con)))


def train(run: Pretraining) -> Tensor:
    """Run the steps; give the last batch of views."""
    config, sampler, course = run.config, run.sampler, run.course
    model = run.trained(sampler.start_step + 1)
    views, per_epoch = torch.empty(0), sampler.steps_per_epoch
    for step, batch in course.follow(run.loader()):
        torch.manual_seed(sample_seed(config.seed, -2, step, run.processes.rank))  # for dropout, if the encoder has any
        model = run.trained(step) if run.freeze.ends(step) else model
        run.schedule.step_update(step - 1)
        run.freeze.scale_rates(run.optimizer, step)
        views = normalize(batch.views.to(run.device, non_blocking=True), run.mean, run.std)  # (B, V, C, H, W)
        with autocast(config.precision, run.device):
            losses = backward(model, views, run.masks(step), config.accumulate)
        if course.accepts(step, losses._asdict(), partial(names, run.source, batch.indices)):
            if config.clip_grad:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        course.report(step, epoch=round(step / per_epoch, 3), lr=max(group["lr"] for group in run.optimizer.param_groups))
        if config.monitor and step % (config.monitor * per_epoch) == 0 and step != sampler.num_steps:
            run.look(step, MONITORED)
    return views


def finish(run: Pretraining, views: Tensor, after: Mapping[str, float]) -> None:
    """Write the encoder and the pictures, and say how to load it and how good it is."""
    folder = run.folder
    options: dict[str, Any] = {"background": run.config.background, "started_from": run.start}
    options["license"] = run.start.get("license", "")
    export(run.model, folder / "encoder", mean=run.mean, std=run.std, **options)
    draw_curves(folder / "curves.png", run.log.records(), CURVES)
    if len(views):
        generator = torch.Generator().manual_seed(run.config.seed)
        picture = reconstruction_picture(run.model, views[:4], mean=run.mean, std=run.std, generator=generator)
        picture.save(folder / "reconstructions.png")
    run.log.close()
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir() if path.name[0] != '.'))}")
    print(f'import timm\nencoder = timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)')
    for line in report(run.before, after):
        print(line)


def main(config: Config) -> None:
    """Set up, train, look at the result."""
    run = Pretraining(config)
    with run.course:
        views = train(run)
    after = run.look(run.sampler.num_steps or 0)
    if run.first:
        finish(run, views, after)


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
