r"""Pretrain an encoder on unlabelled images (Section 4.1.1 of the paper).

  python examples/pretrain.py --data sample --preset quick
      takes minutes on two CPU cores; prints the k-NN accuracy on held-out images before and after
  torchrun --nproc-per-node 8 examples/pretrain.py --data path/to/imagenet \
    --output-dir runs/paper --workers 12
      the paper's run: 1600 epochs of ViT-B/16, estimated at 120 to 211 hours of one H100 (not measured); after it the paper
      reports 84.3 % for fine-tuning and 76.7 % for the linear probe

The defaults are the paper's, or MAE's where the paper gives none. Add --resume to continue an interrupted run. To continue from
the weights of an existing encoder, on images of your own, use adapt.py.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mvmae
from engine.checkpoint import Checkpoint
from engine.distributed import DROPOUT, autocast, parallel, start_ranks, to_device
from engine.log import Log
from engine.optim import BETAS, build_optimizer, set_learning_rate
from engine.options import changeable
from engine.options import run as run_script
from engine.signals import Signals
from mvmae.data import Batch, normalize, sample_seed
from mvmae.hub import describe
from tasks.best import Best
from tasks.config import Config as Config
from tasks.config import build_model
from tasks.evaluation import Evaluation
from tasks.inputs import describe_inputs, resolve_inputs
from tasks.models import check_plain, describe_start, starting_weights
from tasks.outcome import Pictures, describe_run, evaluate, finish
from tasks.pretraining import (
    build_evaluation,
    describe_method,
    describe_views,
    load_run,
    load_views,
    open_data,
    parameter_groups,
    step_mask,
    train_last_blocks,
    without_colour_jitter,
)
from tasks.schedule import Schedule, describe_schedule, fit_minutes, fit_schedule

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"help": "the paper's run, ViT-B/16 at 224 pixels, 1600 epochs", "warmup": 40 / 1600},
    "quick": {
        "help": "a small ViT at 48 pixels, 30 epochs, minutes on two CPU cores",
        "output_dir": "runs/quick",
        "encoder": "mvmae_vit_tiny_patch16",
        "encoder_args": "patch_size=8 embed_dim=128 depth=4 num_heads=4",
        "image_size": (48,),
        "decoder_dim": 0,
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
        "encoder": "mvmae_vit_micro_patch8_64",
        "image_size": (64,),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "grayscale": 0.2,
        "mask_ratio": 0.75,
        "loss_weight": 1.0,
        "contrast_from": 0.5,
        "temperature": 0.1,
        "projector": 128,
        "decoder_dim": 0,
        "decoder_depth": 1,
        "decoder_heads": 0,
        "epochs": 0,
        "batch_size": 0,
        "lr_batch": 0,
        "optimizer": "muon",
        "base_lr": 4e-3,
        "workers": 2,
    },
}


def main(config: Config, compare: Callable[[Config, Best, Evaluation], list[str]] | None = None) -> None:
    """Train, from random weights or from those of an encoder, and leave the encoder and its pictures.

    ``compare`` returns lines of the summary on the encoder that training started from and the one that is exported.
    """
    ranks = start_ranks(config.device)
    device = ranks.device

    # data and model
    check_plain(config.encoder, config.arch)  # before the data, which can take minutes to read
    config = without_colour_jitter(config)
    images = open_data(config)
    model = build_model(config, device).train()
    encoder: Any = model.encoder
    loaded = load_run(model, config) if config.pretrained else ""  # decoder and projector of a run, where they fit
    trained_part = train_last_blocks(encoder, config.train_blocks)
    inputs = resolve_inputs(config, encoder, images.train)  # recorded on the encoder, and exported with it
    schedule = fit_schedule(config, images.length, ranks)
    evaluation = build_evaluation(config, encoder, images.splits, ranks)
    pictures = Pictures(evaluation, inputs, config.seed)

    # optimizer
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = build_optimizer(groups, config.optimizer, lr=schedule.lr, precision=config.precision, device=device)

    # step; wrapped once: a frozen encoder is a learning rate of 0, and a late contrastive loss a weight of 0
    contrast_waits = schedule.contrast_after > 0
    trained = parallel(torch.compile(model) if config.compile else model, ranks, unused=contrast_waits)  # type: ignore[arg-type]

    def backward(step: int, batch: Batch, loss_weight: float) -> mvmae.Losses:
        """Compute the losses of a batch, Eqs. 1-7, the contrastive one times ``loss_weight``, and their gradients."""
        views = normalize(to_device(batch.views, device), inputs.mean, inputs.std)  # (B, V, C, H, W)
        mask = step_mask(config, encoder, len(views) * ranks.world_size, step, ranks)  # this rank's rows of the global mask
        torch.manual_seed(sample_seed(config.seed, DROPOUT, step, ranks.rank))  # dropout, whatever was drawn before
        with autocast(config.precision, device):  # one part is a plain backward
            return mvmae.backward_in_parts(trained, views, config.accumulate, mask=mask, loss_weight=loss_weight)

    # resume
    settings = {**dataclasses.asdict(config), "images": images.fingerprint, "inputs": inputs.to_dict()}
    checkpoint = Checkpoint(Path(config.output_dir), settings, ranks, may_change=changeable(Config), resume=config.resume)
    if config.minutes:
        fitted = checkpoint.state["about"].get("schedule") if checkpoint.state else None  # a resumed run has measured already
        if fitted:
            schedule = Schedule(**fitted)
        else:
            first = partial(load_views, config, encoder, images, start=0, last=4 * max(config.workers, 5), ranks=ranks)
            whole = partial(backward, loss_weight=config.loss_weight)
            schedule = fit_minutes(config, images.length, schedule, model, optimizer, whole, first, evaluation, ranks)
    last = min(schedule.steps, config.max_steps or schedule.steps)
    start = starting_weights(encoder, config.encoder, config.arch) if config.pretrained else {}
    best, before = Best(encoder), dict[str, float]()
    about: dict[str, Any] = {"description": describe(model), "inputs": inputs.to_dict(), "start": start}  # for export.py
    about["command"] = shlex.join(["python", *sys.argv])
    log, signals = Log(checkpoint.folder, ranks, last, checkpoint.step, schedule.batch_size), Signals()
    resumed = {"best": best} if config.pretrained else {}
    checkpoint.restore(log, signals, model=model, optimizer=optimizer, before=before, about=about, **resumed)
    about["schedule"] = schedule._asdict()
    if ranks.rank == 0:
        log.trackers.start(config.tracker, checkpoint.folder, settings, checkpoint.step, log.say)
    loader = load_views(config, encoder, images, schedule, checkpoint.step, last, ranks)
    optimizing = f"{config.optimizer} with betas {BETAS[0]:g} {BETAS[1]:g} and weight decay {config.weight_decay:g}"
    summary = describe_run(
        log,
        config,
        model,
        settings,
        start=f"{describe_start(config.encoder, start)}{loaded}",
        trained=trained_part,
        images=images.listed,
        split=images.splits.note,
        inputs=describe_inputs(config, inputs),
        method=describe_method(config),
        views=describe_views(config),
        training=f"{describe_schedule(schedule, config)}; {optimizing} on {device}",
        evaluation=evaluation.describe(),
    )
    if not checkpoint.step:
        before.update(evaluate(log, evaluation, model, pictures, 0))
        if config.pretrained:
            best.consider(0, before, evaluation.images)

    with checkpoint.saved_on_error():
        for step, batch in enumerate(log.timed(signals.batches(loader)), checkpoint.step + 1):
            rates = schedule.learning_rates(step)  # the encoder's own while it is frozen and warms up
            set_learning_rate(optimizer, **rates)
            loss_weight = config.loss_weight if step > schedule.contrast_after else 0.0  # lambda
            losses = backward(step, batch, loss_weight)
            checkpoint.require_finite(step, losses._asdict(), batch.names)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add(losses._asdict())
            if step % config.log_every == 0 or step in (schedule.contrast_after, last):  # no mean of both stages
                log.write_step(step, epoch=round(step / schedule.per_epoch, 3), **rates)
            if schedule.eval_every and step % schedule.eval_every == 0 and 2 * (last - step) >= schedule.eval_every:
                metrics = evaluate(log, evaluation, model, pictures, step)
                if config.pretrained and step > schedule.contrast_after:  # view retrieval says nothing without contrast
                    best.consider(step, metrics, evaluation.images)
            checkpoint.advance(step, last, config.save_every)
        after, lines = evaluate(log, evaluation, model, pictures, last), list[str]()
        if config.pretrained:
            best.consider(last, after, evaluation.images)
            checkpoint.save(last)  # once more, with the best encoder, which export.py reads

    # export
    if config.pretrained:
        after, lines = best.metrics, [best.describe(last)]
        if compare is not None and config.eval_images:
            lines += compare(config, best, evaluation)
        encoder.load_state_dict(best.chosen())
    if ranks.rank == 0:
        finish(log, config, model, pictures, summary, schedule, before, after, start, lines)


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
