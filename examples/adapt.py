r"""Continue training an existing encoder, on unlabelled images of your own.

  python examples/adapt.py --encoder vit_small_patch14_reg4_dinov2.lvd142m --image-size 224 \
    --data path/to/images --output-dir runs/adapted
      downloads the weights; prints how far the features have moved, and the k-NN accuracy if the images have labels
  python examples/adapt.py --encoder runs/quick --data sample --image-size 48 --epochs 5 \
    --freeze-epochs 1 --warmup-epochs 1 --workers 2
      takes minutes of one CPU core, from the encoder of pretrain.py --preset quick

The recipe is that of pretrain.py --preset small with contrast from the start, and gentler: the encoder is frozen while the new
decoder learns to use it, and then its lower layers have smaller learning rates. Length, batch and decoder suit the images and
the encoder. --train last, lora and explora change less of it; --rehearse DATA, images of the start's own kind, keeps what it
knew. The run leaves the encoder that measured best, which can be the one that it started from. Add --resume to continue an
interrupted run. examples/README.md tells how to choose an encoder, and what to look at.
"""

import dataclasses
import shlex
import sys
from functools import partial
from typing import Any

import torch

from engine.cli import inherit, option
from engine.cli import run as run_script
from engine.config import REQUIRED
from engine.distributed import autocast, parallel, start_processes, to_device
from engine.ends import Stop
from engine.optim import build_optimizer, cosine_schedule
from engine.run import DROPOUT, Run
from mvmae import MultiViewMAE
from mvmae.data import sample_seed
from mvmae.hub import describe
from tasks import choice as choosing
from tasks import gains, gentle, method
from tasks.guard import KINDS, Guard
from tasks.inputs import normalize
from tasks.method import build_model
from tasks.monitor import Monitor
from tasks.outcome import build_monitor, finish, look, look_due, opening
from tasks.pretraining import (
    backward,
    draw_masks,
    open_data,
    random_crops,
    statistics,
    view_loader,
)
from tasks.splits import open_splits
from tasks.starting import Stages, parameter_groups, starting_weights, told


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
        "epochs at the start with a frozen encoder, whose learning rate then warms up over as many; 0: no freezing; "
        "where --epochs is 0, percent of what they come to",
        at_least=0,
        section="Optimization",
    )
    train: str = option(
        "all",
        "part of the encoder that is trained; last: the last --train-blocks and the final norm; lora: low-rank updates of "
        "frozen layers, merged on export; explora: the last blocks, and lora in all others (ExPLoRA)",
        gentle.WAYS,
    )
    train_blocks: int = option(2, "blocks that --train last and explora train in full (ExPLoRA: 1 or 2)", at_least=1)
    lora_rank: int = option(16, "rank of the updates of --train lora and explora (ExPLoRA: 64)", at_least=1)
    lora_layers: str = option(
        "attention", "linear layers of a block that --train lora and explora change (LoRA)", gentle.LAYERS
    )
    # low layers hold what all images share (BEiT, MAE fine-tuning: 0.65 to 0.75)
    layer_decay: float = option(
        0.75,
        "factor of the learning rate from each layer of the encoder to the one below; 1: one rate for all (BEiT)",
        above=0,
        at_most=1,
    )
    guard: float = option(
        0.0, "weight of a penalty on features of unmasked images that leave those of the start; 0: no penalty", at_least=0
    )
    guard_kind: str = option(
        "cosine",
        "what --guard holds: cosine: the direction of each feature (LUCIR); relational: the distances between images (RKD)",
        KINDS,
    )
    guard_images: int = option(8, "number of images of each step that --guard looks at, over all processes", at_least=2)
    ema: float = option(
        0.0, "decay of a moving average of the weights, which is measured and exported; 0: no average", at_least=0, below=1
    )
    interpolate: float = option(
        1.0,
        "part of the way from the start's weights to the trained ones at which the encoder is measured and exported (WiSE-FT)",
        at_least=0,
        at_most=1,
    )
    # takes the contrastive loss's pull: on the features themselves it undid them (examples/README.md)
    projector: int = inherit(
        method.Config, "projector", 128, "output width of an MLP between the features and the contrastive loss; 0: no MLP"
    )
    # the recipe of pretrain.py --preset small
    jitter: tuple[float, ...] = inherit(
        method.Config,
        "jitter",
        (0.4, 0.4, 0.4, 0.1),
        "strength of the colour jitter of each view: brightness, contrast, and in RGB images saturation and hue; 0 0: none",
    )
    grayscale: float = inherit(method.Config, "grayscale", 0.2, "probability that a view becomes grey, of RGB images")
    mask_ratio: float = inherit(method.Config, "mask_ratio", 0.75)
    loss_weight: float = inherit(method.Config, "loss_weight", 1.0)
    temperature: float = inherit(method.Config, "temperature", 0.1)
    projector_hidden: int = inherit(method.Config, "projector_hidden", 512)
    projector_depth: int = inherit(method.Config, "projector_depth", 3)
    projector_norm: bool = inherit(method.Config, "projector_norm", True)
    decoder_dim: int = inherit(method.Config, "decoder_dim", 0)
    decoder_depth: int = inherit(method.Config, "decoder_depth", 1)
    decoder_heads: int = inherit(method.Config, "decoder_heads", 0)
    epochs: float = inherit(method.Config, "epochs", 0)
    warmup_epochs: float = inherit(method.Config, "warmup_epochs", 5)
    batch_size: int = inherit(method.Config, "batch_size", 0)
    optimizer: str = inherit(method.Config, "optimizer", "muon")
    base_lr: float = inherit(method.Config, "base_lr", 4e-3)
    monitor_every: int = inherit(method.Config, "monitor_every", 10)
    monitor_images: int = inherit(
        method.Config,
        "monitor_images",
        5000,
        "maximum number of images of each evaluation, with k-NN if they have labels; 0: no evaluation",
    )
    rehearse: str = option(
        "",
        "images like those that the start was trained on, as for --data: as many of them as of --data are trained on too, "
        "fewer ones repeatedly, so that less is forgotten (rehearsal)",
        path=True,
        empty="none",
    )
    also: str = option(
        "",
        "further images, as for --data, of the table at the end: such as those that the start was trained on",
        path=True,
        empty="none",
        may_change=True,
    )
    keep: str = option(
        "best",
        "encoder to export; best: of all evaluations with the contrastive loss, and of the start; last: as at the end",
        ["best", "last"],
    )
    keep_by: str = option(
        "auto",
        "measure by which --keep best chooses; retrieval: the share of views nearest to a view of their own image; "
        "auto: k-NN accuracy if the images have labels, else retrieval",
        choosing.MEASURES,
    )


def compare_anew(config: Config, choice: choosing.Choice, monitor: Monitor, model: MultiViewMAE, run: Run) -> None:
    """Look again at the start and at what is kept, where a resumed run looks at another number of images."""
    looks = []
    for weights in (choice.start, dict(choice.chosen())):
        with choice.applied(weights):
            looks.append(look(config, monitor, model, run.log, run.step))
    monitor.before = looks[0]
    choice.restart(monitor.counted, *looks)


def main(config: Config) -> None:
    """Adapt the encoder, and leave it and its pictures."""
    processes = start_processes(config.device)
    device = processes.device

    # images and model
    fitted, images = open_data(config, processes, config.rehearse)
    share = 1 if config.epochs else fitted.epochs / 100
    config = dataclasses.replace(fitted, freeze_epochs=share * config.freeze_epochs)
    if config.in_chans != 3:
        config = dataclasses.replace(config, jitter=config.jitter[:2], grayscale=0.0)
    if config.freeze_epochs >= config.epochs:
        raise Stop(
            f"--freeze-epochs {config.freeze_epochs:g} leaves nothing of --epochs {config.epochs:g} to train the encoder in"
        )
    model = build_model(config, device, pretrained=config.pretrained).train()
    encoder = model.encoder
    description = describe(model)
    part = gentle.train_part(
        encoder,
        config.train,
        blocks=config.train_blocks,
        rank=config.lora_rank,
        layers=config.lora_layers,
        seed=config.seed,
    )
    start = starting_weights(encoder, config.encoder, config.arch) if config.pretrained else {}
    mean, std = statistics(config, encoder, images.train)
    per_epoch = images.per_epoch // config.batch_size
    steps = max(round(config.epochs * per_epoch), 1)
    last = min(steps, config.max_steps or steps)
    monitor = build_monitor(config, encoder, images.splits, mean, std, processes, drift=config.pretrained)
    if config.keep_by == "retrieval" or (config.keep_by == "auto" and not monitor.labelled):
        monitor.crops = random_crops(config, encoder)
    sets = {"own": monitor}  # of the table at the end
    if config.also:
        sets["also"] = build_monitor(config, encoder, open_splits(config.also, "--also"), mean, std, processes)
    kept: dict[str, Any] = {"keep": config.keep, "measure": config.keep_by}
    choice = choosing.Choice(encoder, **kept, share=config.interpolate, decay=config.ema, images=monitor.counted)
    held = None
    if config.guard:
        few: dict[str, Any] = {"batch_size": config.batch_size, "processes": processes}
        held = Guard(model, config.guard, config.guard_kind, config.guard_images, **few)

    # optimizer
    lr = config.base_lr * config.batch_size / 256
    chosen: dict[str, Any] = {"beta2": config.beta2, "precision": config.precision, "device": device}
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = build_optimizer(groups, config.optimizer, lr=lr, weight_decay=config.weight_decay, **chosen)
    stages = Stages(model, frozen=round(config.freeze_epochs * per_epoch), alone=round(config.contrast_from * steps))
    schedule = cosine_schedule(optimizer, steps, round(config.warmup_epochs * per_epoch))

    # run
    about = {"description": description, "mean": mean, "std": std, "command": shlex.join(sys.argv), "start": start}
    run = Run(config, processes, images.fingerprint)
    more: dict[str, Any] = {"choice": choice, **({"average": choice.average} if choice.average else {})}
    run.take_up(last=last, model=model, optimizer=optimizer, monitor=monitor, about=about, **more)
    loader = view_loader(config, encoder, images, run.step, last, processes)
    weights = told(start) if start or run.found is None else ""
    run.announce(**opening(config, model, weights, images, monitor, steps, lr), trained=part)
    if run.found is None:
        monitor.before = look(config, monitor, model, run.log, 0)
        choice.consider(0, monitor.before)
    elif choice.images != monitor.counted:
        compare_anew(config, choice, monitor, model, run)
    run.log.say(choice.note(monitor.before))

    with run:
        for step, batch in run.batches(loader):
            if step == run.step + 1 or stages.begins(step):  # what is trained is wrapped anew
                stages.apply(step)
                trained = parallel(torch.compile(model) if config.compile else model, processes)  # type: ignore[arg-type]
            schedule.step_update(step - 1)
            stages.scale_rates(optimizer, step)
            views = normalize(to_device(batch.views, device), mean, std)  # (B, V, C, H, W)
            torch.manual_seed(sample_seed(config.seed, DROPOUT, step, processes.rank))  # for dropout, if there is any
            with autocast(config.precision, device):
                penalty = {"loss_guard": held.backward(views)} if held else {}
                mask = draw_masks(config, encoder, step, processes)
                losses = backward(trained, views, mask, config.accumulate, contrast=stages.contrasts(step))
            if run.finite(step, losses._asdict() | penalty, partial(list, batch.names)):
                if config.clip_grad:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                if choice.average:  # after a step that is left out on the device, the weights count as they are
                    choice.average.update()
            optimizer.zero_grad(set_to_none=True)
            run.report(step, epoch=round(step / per_epoch, 3), lr=max(part["lr"] for part in optimizer.param_groups))
            if step == last or look_due(config, step, per_epoch, last):
                run.look_back()
                with choice.applied():  # what would be exported
                    found = look(config, monitor, model, run.log, step)
                if stages.contrasts(step) or step == last:  # before, measures tell of another loss
                    choice.consider(step, found)
            run.checkpoint(step)

    rows = gains.compare(choice, model, sets) if monitor.limit else []
    choice.apply(choice.chosen())
    if processes.rank == 0:
        if rows:
            gains.draw(run.folder / "gains.png", rows)
        lines = [*gains.table(rows), "", *choice.lines(last)] if rows else choice.lines(last)
        finish(config, model, run.log, monitor, choice.found, start, lines)


if __name__ == "__main__":
    run_script(main, Config, {}, __doc__)
