r"""Pretrain an encoder on unlabelled images (Section 4.1.1 of the paper).

  python examples/pretrain.py --data sample --preset quick
      takes minutes on two CPU cores; prints the k-NN accuracy on held-out images before and after
  torchrun --nproc-per-node 8 examples/pretrain.py --data path/to/imagenet \
    --output-dir runs/paper --workers 12
      the paper's run: 1600 epochs of ViT-B/16, estimated at 120 to 215 hours of one H100 (not measured); after it the paper
      reports 84.3 % for fine-tuning and 76.7 % for the linear probe

The defaults are the paper's, or MAE's where the paper gives none. Add --resume to continue an interrupted run. To continue from
the weights of an existing encoder, on images of your own, use adapt.py.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import mvmae
from engine.checkpoint import Checkpoint
from engine.distributed import autocast, parallel, start_ranks, to_device
from engine.log import Log
from engine.optim import build_optimizer, cosine
from engine.options import changeable
from engine.options import run as run_script
from engine.signals import Signals
from mvmae.data import normalize, pixel_options, sample_seed
from mvmae.hub import describe
from tasks.best import Best
from tasks.evaluation import VIEWS, Evaluation
from tasks.gains import compare, draw, table
from tasks.inputs import describe_inputs, read_inputs
from tasks.method import Config as Config
from tasks.method import build_model
from tasks.models import describe_start, starting_weights
from tasks.outcome import Pictures, describe_run, evaluate, finish
from tasks.pretraining import (
    DROPOUT,
    describe_schedule,
    fit_schedule,
    load_run,
    open_data,
    parameter_groups,
    random_views,
    set_rates,
    settings_of,
    step_mask,
    train_last_blocks,
    view_loader,
)
from tasks.splits import open_splits

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"help": "the paper's run, ViT-B/16 at 224 pixels, 1600 epochs", "warmup": 40 / 1600},
    "quick": {
        "help": "a small ViT at 48 pixels, 30 epochs, minutes on two CPU cores",
        "output_dir": "runs/quick",
        "encoder": "mvmae_vit_tiny_patch16",
        "encoder_args": "patch_size=8 embed_dim=128 depth=4 num_heads=4",
        "image_size": (48,),
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "epochs": 30,
        "warmup": 0.1,
        "batch_size": 64,
        "base_lr": 4e-3,
        "workers": 2,
        "save_every": 100,
    },
    "small": {
        "help": "for small sets of photographs, hours of two CPU cores: a small ViT at 64 pixels, contrast late and behind a "
        "projector, jitter, Muon",
        "output_dir": "runs/small",
        "encoder": "mvmae_vit_tiny_patch16",
        "encoder_args": "patch_size=8 embed_dim=192 depth=4 num_heads=3",
        "image_size": (64,),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "grayscale": 0.2,
        "mask_ratio": 0.75,
        "loss_weight": 1.0,
        "contrast_from": 0.5,
        "temperature": 0.1,
        "projector": 128,
        "decoder_dim": 96,
        "decoder_depth": 1,
        "decoder_heads": 3,
        "epochs": 0,
        "batch_size": 0,
        "optimizer": "muon",
        "base_lr": 4e-3,
        "workers": 2,
    },
}


def main(config: Config) -> None:
    """Train, from random weights or from those of an encoder, and leave the encoder and its pictures."""
    ranks = start_ranks(config.device)
    device = ranks.device

    # data and model
    images = open_data(config)
    model = build_model(config, device).train()
    encoder: Any = model.encoder
    loaded = load_run(model, config) if config.pretrained else ""  # decoder and projector of a run, where they fit
    trained_part = train_last_blocks(encoder, config.train_blocks)
    inputs = read_inputs(config, encoder, images.train)  # recorded on the encoder, and exported with it
    mean, std = inputs.mean, inputs.std
    schedule = fit_schedule(config, images.length, ranks)
    last = min(schedule.steps, config.max_steps or schedule.steps)
    pixels, crops = pixel_options(inputs), random_views(dataclasses.replace(config, same_crop=False), encoder, VIEWS)
    options: dict[str, Any] = {"limit": config.eval_images, "ranks": ranks, "pool": config.pool}
    options |= {"workers": config.workers, "max_bad": config.max_bad}
    evaluation = Evaluation(encoder, images.splits, crops, **options)
    centre = mvmae.CentreCropTransform(encoder.patch_embed.img_size, **pixels)
    pictures = Pictures(evaluation, centre, mean, std, config.seed)

    # optimizer
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = build_optimizer(groups, config.optimizer, lr=schedule.lr, precision=config.precision, device=device)

    # resume
    settings = {**settings_of(config, images), "inputs": inputs.to_dict()}
    checkpoint = Checkpoint(Path(config.output_dir), settings, ranks, may_change=changeable(Config), resume=config.resume)
    start = starting_weights(encoder, config.encoder, config.arch) if config.pretrained else {}
    best, before = Best(encoder), dict[str, float]()
    # for export.py
    record: dict[str, Any] = {"description": describe(model), "inputs": inputs.to_dict()}
    record |= {"start": start, "command": shlex.join(["python", *sys.argv])}
    log, signals = Log(checkpoint.folder, ranks, last, checkpoint.step, schedule.batch_size), Signals()
    more = {"best": best} if config.pretrained else {}
    checkpoint.restore(log, signals, model=model, optimizer=optimizer, before=before, about=record, **more)
    if ranks.rank == 0:
        log.trackers.start(config.tracker, checkpoint.folder, settings, checkpoint.step, log.say)
    loader = view_loader(config, encoder, images, schedule, checkpoint.step, last, ranks)
    training = f"{describe_schedule(schedule, config)}; {config.optimizer} on {device}"
    weights = f"{describe_start(start)}{loaded}" if start else "random"
    parts = {
        "start": weights,
        "trained": trained_part,
        "images": images.listed,
        "inputs": describe_inputs(config, inputs),
        "split": images.splits.note,
    }
    summary = describe_run(log, config, model, settings, **parts, training=training, evaluation=evaluation.describe())
    if not checkpoint.step:
        before.update(evaluate(log, evaluation, model, pictures, 0))
        if config.pretrained:
            best.consider(0, before, evaluation.images)

    # wrapped once: a frozen encoder is a learning rate of 0, and a late contrastive loss a weight of 0
    trained = parallel(torch.compile(model) if config.compile else model, ranks, unused=schedule.alone > 0)  # type: ignore[arg-type]
    with checkpoint.saved_on_error():
        for step, batch in enumerate(log.timed(signals.batches(loader)), checkpoint.step + 1):
            rate = schedule.lr * cosine(step, schedule.steps, schedule.warmup)
            set_rates(optimizer, rate, schedule.encoder_rate(step))
            weight = config.loss_weight if step > schedule.alone else 0.0  # lambda; contrast may begin late
            views = normalize(to_device(batch.views, device), mean, std)  # (B, V, C, H, W)
            mask = step_mask(config, encoder, schedule.batch_size, step, ranks)  # this rank's rows of the global mask
            torch.manual_seed(sample_seed(config.seed, DROPOUT, step, ranks.rank))  # dropout, whatever was drawn before
            with autocast(config.precision, device):
                # Eqs. 1-7 and their gradients; one part is a plain backward
                losses = mvmae.backward_in_parts(trained, views, config.accumulate, mask=mask, loss_weight=weight)
            checkpoint.require_finite(step, losses._asdict(), batch.names)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add(losses._asdict())
            if step % config.log_every == 0 or step == last:
                log.write_step(step, epoch=round(step / schedule.per_epoch, 3), lr=rate)
            if schedule.eval_every and step % schedule.eval_every == 0 and 2 * (last - step) >= schedule.eval_every:
                metrics = evaluate(log, evaluation, model, pictures, step)
                if config.pretrained and step > schedule.alone:  # view retrieval says nothing before the contrastive loss
                    best.consider(step, metrics, evaluation.images)
            checkpoint.advance(step, last, config.save_every)

    # export
    after, lines = evaluate(log, evaluation, model, pictures, last), list[str]()
    if config.pretrained:
        best.consider(last, after, evaluation.images)
        sets = {"own": evaluation}
        if config.rehearse:
            sets["rehearsed"] = Evaluation(encoder, open_splits(config.rehearse, "--rehearse"), crops, **options)
        rows = compare(best, sets) if config.eval_images else []
        after, lines = best.metrics, [best.describe(last), *(["", *table(rows)] if rows else [])]
        encoder.load_state_dict(best.chosen())
        if rows and ranks.rank == 0:
            draw(checkpoint.folder / "gains.png", rows)
    if ranks.rank == 0:
        if last < schedule.steps:
            unfinished = f"stopped at step {last} of {schedule.steps}: the schedule was not finished"
            lines = [f"{unfinished}, this encoder is for trying out", *lines]
        finish(log, config, model, pictures, summary, before, after, start, lines)


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
