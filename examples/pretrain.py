r"""Pretrain an encoder on unlabelled images (Section 4.1.1 of the paper).

  python examples/pretrain.py --data sample --preset quick
      takes minutes on two CPU cores; prints the k-NN accuracy on held-out tiles before and after
  torchrun --nproc-per-node 8 examples/pretrain.py --data path/to/imagenet \
    --output-dir runs/paper --workers 12
      the paper's run: 1600 epochs of ViT-B/16, estimated at 120 to 215 hours of one H100 (not measured); after it the paper
      reports 84.3 % for fine-tuning and 76.7 % for the linear probe

The defaults are the paper's, or MAE's where the paper gives none. Add --resume to continue an interrupted run. To continue from
the weights of an existing encoder, on images of your own, use adapt.py.
"""

import shlex
import sys
from functools import partial
from typing import Any

import torch

from engine.cli import run as run_script
from engine.distributed import autocast, parallel, start_processes, to_device
from engine.optim import build_optimizer, cosine_schedule
from engine.run import DROPOUT, Run
from mvmae.data import sample_seed
from mvmae.hub import describe
from tasks.inputs import normalize
from tasks.method import Config as Config
from tasks.method import build_model
from tasks.monitor import MONITORED
from tasks.outcome import build_monitor, finish, look, look_due, opening
from tasks.pretraining import backward, draw_masks, open_data, statistics, view_loader
from tasks.starting import Stages

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"help": "the paper's run: ViT-B/16 at 224 pixels, 1600 epochs"},
    "quick": {
        "help": "a small ViT at 48 pixels, 30 epochs: minutes on two CPU cores",
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
        "monitor_every": 10,
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
        "projector_hidden": 512,
        "projector_depth": 3,
        "projector_norm": True,
        "decoder_dim": 96,
        "decoder_depth": 1,
        "decoder_heads": 3,
        "epochs": 0,
        "batch_size": 0,
        "optimizer": "muon",
        "base_lr": 4e-3,
        "workers": 2,
        "monitor_every": 10,
    },
}


def main(config: Config) -> None:
    """Pretrain, and leave the encoder and its pictures."""
    processes = start_processes(config.device)
    device = processes.device

    # images and model
    config, images = open_data(config, processes)
    model = build_model(config, device).train()
    encoder = model.encoder
    mean, std = statistics(config, encoder, images.train)
    per_epoch = images.per_epoch // config.batch_size
    steps = max(round(config.epochs * per_epoch), 1)
    last = min(steps, config.max_steps or steps)
    monitor = build_monitor(config, encoder, images.splits, mean, std, processes)

    # optimizer
    lr = config.base_lr * config.batch_size / 256
    chosen: dict[str, Any] = {"beta2": config.beta2, "precision": config.precision, "device": device}
    optimizer = build_optimizer(model, config.optimizer, lr=lr, weight_decay=config.weight_decay, **chosen)
    schedule = cosine_schedule(optimizer, steps, round(config.warmup_epochs * per_epoch))
    stages = Stages(model, alone=round(config.contrast_from * steps))

    # run
    about = {"description": describe(model), "mean": mean, "std": std, "command": shlex.join(sys.argv)}
    run = Run(config, processes, images.fingerprint)
    run.take_up(last=last, model=model, optimizer=optimizer, monitor=monitor, about=about)
    loader = view_loader(config, encoder, images, run.step, last, processes)
    weights = "from random weights" if run.found is None else ""
    run.announce(**opening(config, model, weights, images, monitor, steps, lr))
    if run.found is None:
        monitor.before = look(config, monitor, model, run.log, 0)

    with run:
        for step, batch in run.batches(loader):
            if step == run.step + 1 or stages.begins(step):  # what is trained is wrapped anew
                stages.apply(step)
                trained = parallel(torch.compile(model) if config.compile else model, processes)  # type: ignore[arg-type]
            schedule.step_update(step - 1)
            views = normalize(to_device(batch.views, device), mean, std)  # (B, V, C, H, W)
            torch.manual_seed(sample_seed(config.seed, DROPOUT, step, processes.rank))  # for dropout, if there is any
            with autocast(config.precision, device):
                mask = draw_masks(config, encoder, step, processes)
                losses = backward(trained, views, mask, config.accumulate, contrast=stages.contrasts(step))
            if run.finite(step, losses._asdict(), partial(list, batch.names)):
                if config.clip_grad:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.report(step, epoch=round(step / per_epoch, 3), lr=max(part["lr"] for part in optimizer.param_groups))
            if look_due(config, step, per_epoch, last):
                run.look_back()
                look(config, monitor, model, run.log, step, MONITORED)
            run.checkpoint(step)

    after = look(config, monitor, model, run.log, last)
    if processes.rank == 0:
        finish(config, model, run.log, monitor, after)


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
