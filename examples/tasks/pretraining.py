"""What is pretrained by pretrain.py and adapt.py, and on what: options, images, model, masks, and the losses of a step.

Shapes: B images, V views, C channels, H x W pixels.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import mvmae
from engine.cli import inherit, option
from engine.config import RunConfig
from engine.distributed import Processes
from engine.ends import Stop
from engine.run import MASKS
from mvmae.data import MAX_PIXELS, ImageSource, Loader, MultiViewDataset, StepSampler, make_loader, sample_seed
from tasks.inputs import augmented, channel_statistics, repeated
from tasks.labelled import Splits, clamp_batch, open_splits
from tasks.starting import start_encoder, with_background

Chosen = TypeVar("Chosen", bound="Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the method and of its run, with the paper's values."""

    data: str = option(dataclasses.MISSING, "images: a folder, a list of paths (.txt), or sample", path=True, may_change=True)
    output_dir: str = inherit(RunConfig, "output_dir", "runs/pretrain")
    encoder: str = option(
        "mvmae_vit_base_patch16", "plain ViT of timm (paper: ViT-B/16), hf-hub:ID, folder of a run or export, file", path=True
    )
    encoder_args: str = option("", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'", belongs_to="encoder")
    arch: str = option("", "timm name of the encoder of a lone file of weights")
    image_size: tuple[int, ...] = option(
        (), "side of a view in pixels, or height and width; the encoder's own (paper: 224)", at_least=1, lengths=(1, 2)
    )
    in_chans: int = option(3, "channels of the images; other than 3 needs --mean and --std", at_least=1)
    mean: tuple[float | str, ...] = option(
        (), "mean of each channel, 0 to 1; auto measures it; the encoder's own if not given", at_least=0, at_most=1
    )
    std: tuple[float | str, ...] = option((), "standard deviation of each channel, likewise", above=0, at_most=1)
    value_range: tuple[float, ...] = option(
        (), "values of 16-bit images that become black and white, such as 0 4095", lengths=(2,)
    )
    background: str = option("", "colour behind transparent pixels, such as white or #808080; the encoder's own, or white")
    max_pixels: int = option(MAX_PIXELS, "most pixels of an image: larger ones are refused", at_least=1)
    crops_per_image: int = option(1, "times that an epoch sees each image, for a few huge ones", at_least=1, at_most=10**6)
    transform: str = option("", "module:function of yours that changes each view, (C, H, W) uint8, after crop and flip")
    num_views: int = option(2, "target views of an image (paper)", at_least=1)
    same_crop: bool = option(False, "the same crop in every view: Table 6, without two different targets")
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "share of the image's area that a crop covers (MAE)", above=0, at_most=1, lengths=(2,)
    )
    mask_ratio: float = option(0.8, "share of the patches that is masked (paper, Table 5)", at_least=0, below=1)
    loss_weight: float = option(2.0, "weight of the contrastive loss (paper, Table 5); 0 leaves it out", at_least=0)
    temperature: float = option(0.07, "temperature of the contrastive loss (paper, 3.2.2)", above=0)
    gather: bool = option(True, "negatives of all processes; --no-gather takes each process's own images alone")
    pool: str = option("avg", "vector that is contrasted: mean patch token or class token", ["avg", "token"])
    projector: int = option(0, "width of a projection MLP's output before the contrastive loss; 0 for none (paper)", at_least=0)
    norm_pix: bool = option(True, "rebuild patches normalised by their own mean and deviation (MAE)")
    loss_on: str = option("masked", "patches whose reconstruction counts (MAE: masked)", ["masked", "all"])
    decoder_dim: int = option(512, "width of the decoder (MAE)", at_least=1)
    decoder_depth: int = option(4, "blocks of the decoder (paper, Table 5)", at_least=1)
    decoder_heads: int = option(16, "attention heads of the decoder (MAE)", at_least=1)
    epochs: float = option(1600, "passes over the images (paper)", above=0, may_change=True)
    warmup_epochs: float = option(40, "epochs of linear warm-up (paper)", at_least=0)
    batch_size: int = option(256, "images of a step over all processes (paper)", at_least=1)
    accumulate: int = option(
        1, "parts that a batch is cut into to save memory, for the same loss and gradients", at_least=1, may_change=True
    )
    base_lr: float = option(1.5e-4, "learning rate for a batch of 256; scaled with the batch (paper, MAE)", at_least=0)
    weight_decay: float = option(0.05, "weight decay of AdamW, not on 1-D parameters (MAE)", at_least=0)
    beta2: float = option(0.95, "beta2 of AdamW; beta1 is 0.9 (paper)", at_least=0, below=1)
    clip_grad: float = option(0.0, "largest norm of the gradient; 0 does not clip (MAE)", at_least=0)
    seed: int = inherit(RunConfig, "seed", 0, "seed of weights, order, crops and masks")
    compile: bool = option(False, "run the model through torch.compile", may_change=True)
    grad_checkpointing: bool = option(False, "keep fewer activations and compute them again", may_change=True)
    loader: str = option("fast", "fast; or pillow, without simplejpeg", ["fast", "pillow"], may_change=True)
    max_bad: int = option(100, "different images that may be unreadable before the run stops", at_least=0, may_change=True)
    save_every: int = inherit(RunConfig, "save_every", 100_000)
    monitor: int = option(
        100,
        "epochs between looks at the features of held-out images; 0 for none but first and last",
        at_least=0,
        may_change=True,
    )
    monitor_images: int = option(
        5000,
        "most images of a first and last look, with k-NN where data has labels; 0 for no look",
        at_least=0,
        may_change=True,
    )


class Images(NamedTuple):
    """The images of a run: both splits, those trained on, as often as an epoch sees them, and what is said of them."""

    splits: Splits
    train: ImageSource
    listed: str
    clamped: str


def open_data(config: Chosen, processes: Processes) -> tuple[Chosen, Images]:
    """Open the images; return them, and the options with the background and the batch size that they come to.

    Raises:
        Stop: if there are none, or a batch leaves the contrastive loss no negatives.
    """
    config = with_background(config, config.encoder, config.arch)
    start = time.monotonic()
    splits = open_splits(config.data)
    listing = time.monotonic() - start
    train = repeated(splits.train, config.crops_per_image)
    config, clamped = clamp_batch(config, len(train), processes.world_size * config.accumulate)
    if config.loss_weight and config.batch_size // (1 if config.gather else processes.world_size) < 2:
        each = "" if config.gather else f" with --no-gather on {processes.world_size} processes"
        raise Stop(
            f"--batch-size {config.batch_size}{each} leaves the contrastive loss no negatives: use more, or --loss-weight 0"
        )
    return config, Images(splits, train, f"{len(train)} images, listed in {listing:.1f} s", clamped)


def build_model(config: Config, *, pretrained: bool = False) -> mvmae.MultiViewMAE:
    """Create the encoder, with its weights if asked, and the pretraining model around it, the same for the same seed."""
    torch.manual_seed(config.seed)
    encoder = start_encoder(
        config.encoder,
        config.encoder_args,
        pretrained=pretrained,
        arch=config.arch,
        image_size=config.image_size,
        in_chans=config.in_chans,
    )
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
        gather=config.gather,
    )


def pixel_options(config: Config) -> dict[str, Any]:
    """Return how images become pixels, in views and in centre crops alike."""
    options: dict[str, Any] = {"in_chans": config.in_chans, "max_pixels": config.max_pixels}
    return options | {"value_range": config.value_range or None, "background": config.background}


def centre_crop(config: Config, encoder: Any) -> mvmae.CentreCropTransform:
    """Return the transform of images that are looked at rather than trained on."""
    return mvmae.CentreCropTransform(encoder.patch_embed.img_size, **pixel_options(config))


def statistics(config: Config, encoder: Any, source: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel."""
    typed = {"mean": config.mean, "std": config.std}
    return channel_statistics(typed, encoder.pretrained_cfg, source, centre_crop(config, encoder))


def view_loader(config: Config, encoder: Any, source: ImageSource, sampler: StepSampler, processes: Processes) -> Loader:
    """Load V views of each image of a step."""
    transform = mvmae.MultiViewTransform(
        encoder.patch_embed.img_size,
        num_views=config.num_views,
        scale=config.crop_scale,
        same_crop=config.same_crop,
        decoder=config.loader,
        **pixel_options(config),
    )
    dataset = MultiViewDataset(source, augmented(transform, config.transform), seed=config.seed, max_bad=config.max_bad)
    bad_file, pinned = Path(config.output_dir) / "bad_files.txt", processes.device.type == "cuda"
    return make_loader(dataset, sampler, num_workers=config.workers, pin_memory=pinned, bad_file=bad_file)


def draw_masks(config: Config, encoder: Any, step: int, processes: Processes) -> mvmae.Mask:
    """Draw this process's part of the masks of a step, which are the same for any number of processes."""
    views = config.batch_size * config.num_views
    generator = torch.Generator().manual_seed(sample_seed(config.seed, MASKS, step))
    share = views // processes.world_size
    own = slice(processes.rank * share, (processes.rank + 1) * share)
    length = encoder.patch_embed.num_patches
    return mvmae.random_mask(views, length, config.mask_ratio, generator=generator, device=processes.device, rows=own)


def backward(model: torch.nn.Module, views: Tensor, mask: mvmae.Mask, parts: int) -> mvmae.Losses:
    """Compute losses and gradients of a batch, whole or in parts; the backward pass runs outside autocast."""
    if parts > 1:
        return mvmae.backward_in_parts(model, views, parts, mask=mask)
    output = model(views, mask=mask)
    with torch.autocast(views.device.type, enabled=False):
        output.loss.backward()
    return mvmae.Losses(*(loss.detach() for loss in (output.loss, output.loss_rec, output.loss_con)))
