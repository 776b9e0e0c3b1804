r"""Continue training an existing encoder, on unlabelled images of your own.

  python examples/adapt.py --encoder vit_small_patch14_reg4_dinov2.lvd142m --image-size 224 \
    --data path/to/images --output-dir runs/adapted
      downloads the weights; prints how far the features have moved, and the k-NN accuracy if the images have labels
  python examples/adapt.py --encoder runs/quick --data sample --image-size 48 --epochs 5 \
    --freeze-epochs 1 --warmup-epochs 1 --batch-size 64 --decoder-dim 64 --decoder-depth 2 \
    --decoder-heads 4 --workers 2
      takes two minutes of one CPU core, from the encoder of pretrain.py --preset quick; in a run this short the features
      hardly move: k-NN accuracy stays at 87 %

The method is that of pretrain.py, trained more gently: the encoder is frozen while the new decoder learns to use it, and then
its lower layers have smaller learning rates. Add --resume to continue an interrupted run. examples/README.md tells how to
choose an encoder, and what to look at.
"""

import dataclasses
import shlex
import sys
from functools import partial

import torch
from timm.optim import create_optimizer_v2

from engine.cli import inherit, option
from engine.cli import run as run_script
from engine.config import REQUIRED
from engine.distributed import autocast, parallel, start_processes, to_device
from engine.ends import Stop
from engine.optim import cosine_schedule
from engine.run import DROPOUT, Run
from mvmae.data import sample_seed
from mvmae.hub import describe
from tasks import method
from tasks.inputs import names, normalize
from tasks.method import build_model
from tasks.monitor import MONITORED
from tasks.outcome import build_monitor, finish, look, opening
from tasks.pretraining import advance, backward, draw_masks, open_data, position, statistics, step_sampler, view_loader
from tasks.starting import Freeze, parameter_groups, starting_weights, told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(method.Config):
    """All but the layer decay's source is assumed: nobody has published such a recipe."""

    encoder: str = inherit(
        method.Config,
        "encoder",
        REQUIRED,
        "encoder to start from, a plain ViT: timm name, hf-hub:ID, folder of a run or export, or file of weights",
    )
    output_dir: str = inherit(method.Config, "output_dir", "runs/adapt")
    pretrained: bool = option(
        True, "start from the weights of --encoder; --no-pretrained: from random weights, for comparison", section="Model"
    )
    # a random decoder's gradients would spoil the encoder, as a random head's do (LP-FT)
    freeze_epochs: float = option(
        5,
        "epochs at the start with a frozen encoder, whose learning rate then warms up over as many; 0: no freezing",
        at_least=0,
        section="Optimization",
    )
    # low layers hold what all images share (BEiT, MAE fine-tuning: 0.65 to 0.75)
    layer_decay: float = option(
        0.75,
        "factor of the learning rate from each layer of the encoder to the one below; 1: one rate for all (BEiT)",
        above=0,
        at_most=1,
    )
    # takes the contrastive loss's pull: on the features themselves it undid them (examples/README.md)
    projector: int = inherit(
        method.Config, "projector", 128, "output width of an MLP between the features and the contrastive loss; 0: no MLP"
    )
    # own images are few; the drift in curves.png shows where to stop
    epochs: float = inherit(method.Config, "epochs", 100, "number of passes over the images")
    warmup_epochs: float = inherit(method.Config, "warmup_epochs", 5, "epochs of linear warm-up of the learning rate")
    # below pretraining's: the way from good weights is short
    base_lr: float = inherit(method.Config, "base_lr", 1e-4, "learning rate for a batch of 256; it is scaled with the batch")
    monitor: int = inherit(method.Config, "monitor", 10)


def main(config: Config) -> None:
    """Adapt the encoder, and leave it and its pictures."""
    processes = start_processes(config.device)
    device = processes.device

    # images and model
    config, images = open_data(config, processes)
    if config.freeze_epochs >= config.epochs:
        raise Stop(
            f"--freeze-epochs {config.freeze_epochs:g} leaves nothing of --epochs {config.epochs:g} to train the encoder in"
        )
    model = build_model(config, device, pretrained=config.pretrained).train()
    encoder = model.encoder
    start = starting_weights(encoder, config.encoder, config.arch) if config.pretrained else {}
    mean, std = statistics(config, encoder, images.train)
    per_epoch = images.per_epoch // config.batch_size
    steps = max(round(config.epochs * per_epoch), 1)
    last = min(steps, config.max_steps or steps)
    sampler = step_sampler(config, images, last, processes)
    loader = view_loader(config, encoder, images, sampler, processes)
    monitor = build_monitor(config, encoder, images.splits, mean, std, processes, drift=config.pretrained)

    # optimizer
    lr = config.base_lr * config.batch_size / 256
    betas, fused = (0.9, config.beta2), device.type == "cuda"
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=lr, weight_decay=config.weight_decay, betas=betas, fused=fused)
    freeze = Freeze(encoder, round(config.freeze_epochs * per_epoch))
    schedule = cosine_schedule(optimizer, steps, round(config.warmup_epochs * per_epoch))

    # run
    about = {"description": describe(model), "mean": mean, "std": std, "command": shlex.join(sys.argv), "start": start}
    run = Run(config, processes, images.fingerprint)
    run.take_up(last=last, model=model, optimizer=optimizer, monitor=monitor, about=about, **position(sampler, run))
    sampler.start_step = run.step
    weights = told(start) if start or run.found is None else ""
    run.announce(**opening(config, model, weights, images, monitor, steps, lr))
    if run.found is None:
        monitor.before = look(config, monitor, model, run.log, 0)

    with run:
        for step, batch in run.batches(loader):
            if step in (run.step + 1, freeze.steps + 1):  # what is trained is wrapped anew
                freeze.apply(step)
                trained = parallel(torch.compile(model) if config.compile else model, processes)  # type: ignore[arg-type]
            schedule.step_update(step - 1)
            freeze.scale_rates(optimizer, step)
            views = normalize(to_device(batch.views, device), mean, std)  # (B, V, C, H, W)
            torch.manual_seed(sample_seed(config.seed, DROPOUT, step, processes.rank))  # for dropout, if there is any
            with autocast(config.precision, device):
                losses = backward(trained, views, draw_masks(config, encoder, step, processes), config.accumulate)
            if run.finite(step, losses._asdict(), partial(names, images, batch.indices)):
                if config.clip_grad:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            advance(sampler, step, processes)
            run.report(step, epoch=round(step / per_epoch, 3), lr=max(part["lr"] for part in optimizer.param_groups))
            if config.monitor and step % (config.monitor * per_epoch) == 0 and step != last:
                look(config, monitor, model, run.log, step, MONITORED)
            run.checkpoint(step)

    after = look(config, monitor, model, run.log, last)
    if processes.rank == 0:
        finish(config, model, run.log, monitor, after, start)


if __name__ == "__main__":
    run_script(main, Config, {}, __doc__)
