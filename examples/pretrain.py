"""Pretrain an encoder on unlabelled images (Section 4.1.1).

  python examples/pretrain.py --data sample --preset quick
      minutes on two CPU cores; prints k-NN accuracy on held-out tiles before and after
  torchrun --nproc-per-node 8 examples/pretrain.py --data path/to/imagenet/train --output-dir runs/paper --workers 12
      the paper's run: 1600 epochs of ViT-B/16, estimated at 120 to 215 hours of one H100 (not measured); the paper's
      fine-tuning accuracy after it is 84.3 %, its linear probe 76.7 %

The defaults are the paper's, or MAE's where the paper is silent. Add --resume to go on with a run that was cut.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint import open_run, save_checkpoint
from common import (
    Log,
    Meter,
    Processes,
    Stop,
    StopSignal,
    cosine_schedule,
    create_encoder,
    draw_curves,
    inject_fault,
    normalize,
    option,
    parallel,
    run,
    start_processes,
)
from features import knn_test, labelled_splits
from timm.optim import create_optimizer_v2
from torch import Tensor

import mvmae
from mvmae.data import DataError, Loader, MultiViewDataset, StepSampler, make_loader, sample_seed
from mvmae.encoding import check_encoder
from mvmae.hub import export
from mvmae.sources import ImageSource, open_images
from mvmae.visualize import reconstruction_picture


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option(dataclasses.MISSING, "images: a folder, a list of paths (.txt), or sample")
    output_dir: str = option("runs/pretrain", "folder of the run")
    resume: bool = option(False, "go on from the newest checkpoint in the output folder, if there is one")
    encoder: str = option("mvmae_vit_base_patch16", "any plain ViT of timm (paper: ViT-B/16)")
    encoder_args: str = option("", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'")
    pretrained: bool = option(False, "start from the encoder's published weights")
    image_size: int = option(224, "side of a view in pixels (paper)")
    num_views: int = option(2, "target views of an image (paper)")
    same_crop: bool = option(False, "the same crop in every view: Table 6, without two different targets")
    crop_scale: tuple[float, ...] = option((0.2, 1.0), "share of the image's area that a crop covers (MAE)")
    mask_ratio: float = option(0.8, "share of the patches that is masked (paper, Table 5)")
    loss_weight: float = option(2.0, "weight of the contrastive loss (paper, Table 5); 0 leaves it out")
    temperature: float = option(0.07, "of the contrastive loss (paper, 3.2.2)")
    pool: str = option("avg", "vector that is contrasted: mean patch token or class token", ["avg", "token"])
    projector: int = option(0, "width of a projection MLP's output before the contrastive loss; 0 for none (paper)")
    norm_pix: bool = option(True, "rebuild patches normalised by their own mean and deviation (MAE)")
    loss_on: str = option("masked", "patches whose reconstruction counts (MAE: masked)", ["masked", "all"])
    decoder_dim: int = option(512, "width of the decoder (MAE)")
    decoder_depth: int = option(4, "blocks of the decoder (paper, Table 5)")
    decoder_heads: int = option(16, "attention heads of the decoder (MAE)")
    epochs: int = option(1600, "passes over the images (paper)")
    warmup_epochs: float = option(40, "of a linearly rising learning rate (paper)")
    batch_size: int = option(256, "images of a step over all processes (paper)")
    accumulate: int = option(1, "parts that a batch is cut into to save memory, for the same loss and gradients")
    base_lr: float = option(1.5e-4, "learning rate for a batch of 256; scaled with the batch (paper, MAE)")
    weight_decay: float = option(0.05, "of AdamW, not on 1-D parameters (MAE)")
    beta2: float = option(0.95, "of AdamW; beta1 is 0.9 (paper)")
    clip_grad: float = option(0.0, "largest norm of the gradient; 0 does not clip (MAE)")
    seed: int = option(0, "of weights, order, crops and masks")
    device: str = option("auto", "auto takes CUDA where there is one", ["auto", "cpu", "cuda"])
    precision: str = option("auto", "auto is bf16 autocast on CUDA, float32 elsewhere", ["auto", "bf16", "float32"])
    compile: bool = option(False, "run the model through torch.compile")
    grad_checkpointing: bool = option(False, "keep fewer activations and compute them again")
    workers: int = option(8, "processes that load images, for each process that trains")
    max_bad: int = option(100, "different images that may be unreadable before the run stops")
    max_steps: int = option(0, "end the run after this many steps of the schedule; 0 for all")
    save_every: int = option(1000, "steps between checkpoints; the end is saved in any case")
    log_every: int = option(20, "steps between lines of the log")
    knn_images: int = option(5000, "most images on either side of the k-NN test, where data has labels; 0 for no test")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "output_dir": "runs/quick",
        "encoder": "mvmae_vit_tiny_patch16",
        "encoder_args": "patch_size=8 embed_dim=128 depth=4 num_heads=4",
        "image_size": 48,
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "epochs": 30,
        "warmup_epochs": 3,
        "batch_size": 64,
        "base_lr": 4e-3,
        "workers": 2,
        "save_every": 100,
    },
}
MAY_CHANGE = frozenset(
    {"output_dir", "resume", "device", "accumulate", "compile", "grad_checkpointing", "workers", "max_bad", "max_steps"}
    | {"save_every", "log_every", "knn_images", "epochs"}
)


def build_model(config: Config) -> mvmae.MultiViewMAE:
    """Create the encoder and the pretraining model around it, the same for the same seed."""
    torch.manual_seed(config.seed)
    options = {"pretrained": config.pretrained, "img_size": config.image_size}
    encoder = check_encoder(create_encoder(config.encoder, config.encoder_args, **options))
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return mvmae.MultiViewMAE(
        encoder,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        mask_ratio=config.mask_ratio,
        loss_weight=config.loss_weight,
        temperature=config.temperature,
        pool=config.pool,  # type: ignore[arg-type]
        projector=mvmae.projection_mlp(encoder.embed_dim, out_dim=config.projector) if config.projector else None,
        norm_pix=config.norm_pix,
        loss_on=config.loss_on,  # type: ignore[arg-type]
    )


def step_masks(model: mvmae.MultiViewMAE, config: Config, step: int, processes: Processes) -> mvmae.Mask:
    """Draw the masks of a step for the whole batch, the same for any number of processes, and give this one's part."""
    views = config.batch_size * config.num_views
    generator = torch.Generator().manual_seed(sample_seed(config.seed, -1, step))
    length = model.encoder.patch_embed.num_patches
    mask = mvmae.random_mask(views, length, config.mask_ratio, generator=generator)
    share = views // processes.world_size
    mask = mask.select(slice(processes.rank * share, (processes.rank + 1) * share))
    return mvmae.Mask(*(part.to(processes.device, non_blocking=True) for part in mask))


def build_loader(config: Config, source: ImageSource, model: mvmae.MultiViewMAE, sampler: StepSampler, cuda: bool) -> Loader:
    """Load V views of each image of a step."""
    transform = mvmae.MultiViewTransform(
        config.image_size,
        num_views=config.num_views,
        scale=(config.crop_scale[0], config.crop_scale[-1]),
        same_crop=config.same_crop,
        in_chans=model.encoder.patch_embed.proj.in_channels,
    )
    dataset = MultiViewDataset(source, transform, seed=config.seed, max_bad=config.max_bad)
    bad_file = Path(config.output_dir) / "bad_files.txt"
    return make_loader(dataset, sampler, num_workers=config.workers, pin_memory=cuda, bad_file=bad_file)


def backward(model: torch.nn.Module, views: Tensor, mask: mvmae.Mask, parts: int) -> mvmae.Losses:
    """Compute losses and gradients of a batch, whole or in parts."""
    if parts > 1:
        return mvmae.backward_in_parts(model, views, parts, mask=mask)
    output = model(views, mask=mask)
    output.loss.backward()
    return mvmae.Losses(*(loss.detach() for loss in (output.loss, output.loss_rec, output.loss_con)))


def train(
    config: Config,
    model: mvmae.MultiViewMAE,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    sampler: StepSampler,
    processes: Processes,
    log: Log,
    save: Callable[[int], None],
) -> Tensor:
    """Run the steps of the sampler; give the last batch of views."""
    device, stop, meter = processes.device, StopSignal(), Meter(processes)
    mean, std = model.encoder.pretrained_cfg["mean"], model.encoder.pretrained_cfg["std"]
    steps = config.epochs * sampler.steps_per_epoch
    schedule = cosine_schedule(optimizer, steps, round(config.warmup_epochs * sampler.steps_per_epoch))
    trained = parallel(torch.compile(model) if config.compile else model, processes)  # type: ignore[arg-type]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    views = torch.empty(0)
    for step, batch in enumerate(loader, start=sampler.start_step + 1):
        torch.manual_seed(sample_seed(config.seed, -2, step, processes.rank))  # for dropout, if the encoder has any
        schedule.step_update(step - 1)
        views = normalize(batch.views.to(device, non_blocking=True), mean, std)  # (B, V, C, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = backward(trained, views, step_masks(model, config, step, processes), config.accumulate)
        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(losses._asdict())
        log.advance(step)
        last, stopped = step == sampler.num_steps, processes.any(stop.received is not None)
        if step % config.log_every == 0 or last:
            rate = max(group["lr"] for group in optimizer.param_groups)
            log.write(step=step, epoch=round(step / sampler.steps_per_epoch, 3), **meter.means(step), lr=rate)
        if step % config.save_every == 0 or last or stopped:
            meter.check(step)
            save(step)
        inject_fault(step)
        if stopped and not last:
            log.close()
            raise Stop(f"stopped after step {step} of {steps}, which is saved: add --resume to go on", stop.exit_code)
    return views


def finish(
    config: Config, model: mvmae.MultiViewMAE, log: Log, views: Tensor, before: float | None, after: float | None
) -> None:
    """Write the encoder and the pictures, and say how to load and how good it is."""
    folder, cfg = Path(config.output_dir), model.encoder.pretrained_cfg
    export(model, folder / "encoder")
    names = ("loss", "loss_rec", "loss_con", "lr", "knn")
    draw_curves(folder / "curves.png", log.records(), names)
    if len(views):
        generator = torch.Generator().manual_seed(config.seed)
        picture = reconstruction_picture(model, views[:4], mean=cfg["mean"], std=cfg["std"], generator=generator)
        picture.save(folder / "reconstructions.png")
    log.close()
    print(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f'import timm\nencoder = timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)')
    if before is not None and after is not None:
        print(f"k-NN accuracy on held-out images: {before:.1f} % before, {after:.1f} % after")


def main(config: Config) -> None:
    """Set up, train, look at the result."""
    processes = start_processes(config.device)
    device, folder, first = processes.device, Path(config.output_dir), processes.rank == 0
    source, splits = open_images(config.data), labelled_splits(config.data, config.knn_images)
    if config.batch_size < 2 and config.loss_weight:
        raise Stop("--batch-size 1 has no negatives for the contrastive loss: use 2 or more, or --loss-weight 0")
    model = build_model(config).to(device).train()
    lr = config.base_lr * config.batch_size / 256
    betas = (0.9, config.beta2)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=lr, weight_decay=config.weight_decay, betas=betas, fused=device.type == "cuda"
    )
    steps = config.epochs * (len(source) // config.batch_size)
    sampler = StepSampler(
        len(source),
        config.batch_size,
        seed=config.seed,
        num_steps=min(steps, config.max_steps or steps),
        rank=processes.rank,
        world_size=processes.world_size,
    )

    def knn() -> float | None:
        if not first:
            return None
        mean, std = model.encoder.pretrained_cfg["mean"], model.encoder.pretrained_cfg["std"]
        model.eval()
        options = {"mean": mean, "std": std, "device": device, "limit": config.knn_images}
        value = knn_test(model.features, splits, mvmae.CentreCropTransform(config.image_size), **options)
        model.train()
        return value

    settings = {**dataclasses.asdict(config), "images": source.fingerprint}
    state = open_run(folder, settings, MAY_CHANGE, resume=config.resume, first=first)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.start_step = state["step"]
    before = state["knn_before"] if state else knn()
    log = Log(folder, processes.rank, sampler.num_steps or 0, sampler.start_step)
    log.say(f"{len(source)} images, {steps} steps of {config.batch_size}, learning rate {lr:.3g}, on {device}")
    if before is not None and not state:
        log.write(step=0, knn=before)

    def save(step: int) -> None:
        if first:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(folder, {**parts, "step": step, "settings": settings, "knn_before": before})

    try:
        views = train(
            config,
            model,
            optimizer,
            build_loader(config, source, model, sampler, device.type == "cuda"),
            sampler,
            processes,
            log,
            save,
        )
    except DataError as error:
        raise Stop(f"{error}", 1) from error
    if first:
        after = knn()
        if after is not None:
            log.write(step=sampler.num_steps, knn=after)
        finish(config, model, log, views, before, after)


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
