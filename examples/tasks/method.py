"""What pretrain.py and adapt.py train: the options of the method and of its run, and the model that they describe."""

import dataclasses

import torch

import mvmae
from engine.attention import fit_attention
from engine.cli import inherit, option
from engine.config import RunConfig
from engine.optim import OPTIMIZERS
from mvmae.data import MAX_PIXELS
from tasks.starting import start_encoder

CPU = torch.device("cpu")
HEAD = 32
"""Width of a head of a decoder whose size follows the encoder's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Options of the method and of its run, with the paper's values."""

    data: str = option(
        dataclasses.MISSING,
        "images: a folder, a list of paths (.txt), tar, Parquet, Arrow or IDX files, a timm data set, sample (photographs of "
        "scikit-image), or a stream: URLs of tar files (https://host/{000..099}.tar) or hfids/OWNER/NAME[:SPLIT]",
        path=True,
        may_change=True,
        section="Data",
    )
    output_dir: str = inherit(RunConfig, "output_dir", "runs/pretrain")
    encoder: str = option(
        "mvmae_vit_base_patch16",
        "encoder, a plain ViT: timm name, hf-hub:ID, folder of a run or export, or file of weights (paper)",
        path=True,
        section="Model",
    )
    encoder_args: str = option(
        "", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'", empty="none", belongs_to="encoder"
    )
    arch: str = option(
        "", "timm name of the encoder, if --encoder is a file of weights without a config.json beside it", empty="none"
    )
    image_size: tuple[int, ...] = option(
        (),
        "side of a view in pixels, or height and width (paper: 224)",
        empty="the encoder's own",
        at_least=1,
        lengths=(1, 2),
        section="Data",
    )
    in_chans: int = option(3, "number of channels of the images; values other than 3 need --mean and --std", at_least=1)
    mean: tuple[float | str, ...] = option(
        (), "mean of each channel, where 1 is white; auto: measured", empty="the encoder's own", at_least=0, at_most=1
    )
    std: tuple[float | str, ...] = option(
        (),
        "standard deviation of each channel, where 1 is white; auto: measured",
        empty="the encoder's own",
        above=0,
        at_most=1,
    )
    value_range: tuple[float, ...] = option(
        (),
        "pixel values of 16-bit images that map to black and to white, such as 0 4095",
        empty="the whole range",
        lengths=(2,),
    )
    background: str = option("", "colour behind transparent pixels, a name or #RRGGBB", empty="the encoder's own, else white")
    max_pixels: int = option(MAX_PIXELS, "maximum number of pixels of an image; a larger one counts as unreadable", at_least=1)
    crops_per_image: int = option(
        1, "number of times each image is used per epoch; above 1 for few, very large images", at_least=1, at_most=10**6
    )
    images_per_epoch: int = option(
        0,
        "number of images that count as one epoch; needed for a stream whose length is not known",
        empty="all",
        at_least=0,
    )
    shuffle_buffer: int = option(
        2000, "number of images of a stream that each process shuffles at a time; it holds twice as many, encoded", at_least=1
    )
    transform: str = option(
        "",
        "function of yours, as module:function, that changes each view, (C, H, W) uint8, after crop and flip",
        empty="none",
        section="Views",
    )
    num_views: int = option(2, "number of views of each image; 1 with --loss-weight 0 is MAE (paper)", at_least=1)
    same_crop: bool = option(False, 'use the same crop in every view: "without two different targets" in Table 6 of the paper')
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "share of the image's area that a crop covers (MAE)", above=0, at_most=1, lengths=(2,)
    )
    jitter: tuple[float, ...] = option(
        (),
        "strength of the colour jitter of each view: brightness, contrast, saturation and hue, such as 0.4 0.4 0.4 0.1, or "
        "brightness and contrast alone",
        empty="none",
        at_least=0,
        lengths=(2, 4),
    )
    grayscale: float = option(0.0, "probability that a view becomes grey", at_least=0, at_most=1)
    mask_ratio: float = option(
        0.8, "share of the patches that is masked (paper, Table 5)", at_least=0, below=1, section="Masking and losses"
    )
    loss_weight: float = option(
        2.0, "weight of the contrastive loss, lambda; 0: no contrastive loss (paper, Table 5)", at_least=0
    )
    contrast_from: float = option(
        0.0,
        "share of the run after which the contrastive loss is added; until then the reconstruction alone trains the encoder "
        "(paper: 0; MAE-CT)",
        at_least=0,
        below=1,
    )
    temperature: float = option(0.07, "temperature of the contrastive loss, tau (paper, Section 3.2.2)", above=0)
    gather: bool = option(True, "contrast with the crops of all processes; --no-gather: only with those of the same process")
    pool: str = option(
        "avg", "vector that the contrastive loss compares; avg: mean patch token, token: class token", ["avg", "token"]
    )
    projector: int = option(
        0, "output width of an MLP between the features and the contrastive loss; 0: no MLP (paper)", at_least=0
    )
    projector_hidden: int = option(2048, "width of the MLP's hidden layers (SimCLR)", at_least=1)
    projector_depth: int = option(2, "number of the MLP's linear layers (SimCLR)", at_least=1)
    projector_norm: bool = option(False, "normalise the MLP's hidden layers over the batch of all processes (MoCo v3)")
    norm_pix: bool = option(True, "reconstruct patches normalised by their own mean and standard deviation (MAE)")
    loss_on: str = option("masked", "patches that the reconstruction loss covers (MAE)", ["masked", "all"])
    decoder_dim: int = option(512, "width of the decoder; 0: half the encoder's (MAE)", at_least=0, section="Decoder")
    decoder_depth: int = option(4, "number of blocks of the decoder (paper, Table 5)", at_least=1)
    decoder_heads: int = option(16, "number of attention heads of the decoder; 0: one for 32 of its width (MAE)", at_least=0)
    epochs: float = option(
        1600,
        "number of passes over the images; 0: as many as suit their number, with warm-up and evaluations in proportion (paper)",
        at_least=0,
        may_change=True,
        section="Optimization",
    )
    warmup_epochs: float = option(40, "epochs of linear warm-up of the learning rate (paper)", at_least=0)
    batch_size: int = option(
        256,
        "number of images per step, over all processes; 0: as many as suit their number, at the learning rate of 256 (paper)",
        at_least=0,
    )
    optimizer: str = option(
        "adamw",
        "optimizer; muon: Muon for matrices, scaled to the updates of AdamW, which trains the rest (paper: adamw)",
        OPTIMIZERS,
    )
    base_lr: float = option(1.5e-4, "learning rate for a batch of 256; it is scaled with the batch (paper and MAE)", at_least=0)
    weight_decay: float = option(0.05, "weight decay; 1-D parameters have none (MAE)", at_least=0)
    beta2: float = option(0.95, "beta2 of AdamW; beta1 is 0.9 (paper)", at_least=0, below=1)
    clip_grad: float = option(0.0, "maximum norm of the gradient; 0: no clipping (MAE)", at_least=0)
    seed: int = inherit(RunConfig, "seed", 0, "seed of the random numbers: weights, order of images, crops, masks")
    accumulate: int = option(
        1,
        "split each batch into this many parts to save memory; loss and gradients are unchanged",
        at_least=1,
        may_change=True,
        section="Speed and memory",
    )
    compile: bool = option(False, "compile the model with torch.compile", may_change=True)
    grad_checkpointing: bool = option(
        False, "recompute the encoder's activations in the backward pass, to save memory", may_change=True
    )
    loader: str = option(
        "fast",
        "reader of JPEG files; fast: simplejpeg if installed, pillow: Pillow",
        ["fast", "pillow"],
        may_change=True,
    )
    max_bad: int = option(
        100,
        "number of different unreadable images to tolerate; one more stops the run",
        at_least=0,
        may_change=True,
        section="Data",
    )
    save_every: int = inherit(RunConfig, "save_every", 100_000)
    monitor_every: int = option(
        100,
        "epochs between two evaluations of the features on held-out images; 0: only before and after the run",
        at_least=0,
        may_change=True,
        section="Evaluation",
    )
    monitor_images: int = option(
        5000,
        "maximum number of images of the first and last evaluation, with k-NN if they have labels; 0: no evaluation",
        at_least=0,
        may_change=True,
    )


def build_model(config: Config, device: torch.device = CPU, *, pretrained: bool = False) -> mvmae.MultiViewMAE:
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
    projector = None
    if config.projector:
        widths, depth = (encoder.embed_dim, config.projector_hidden, config.projector), config.projector_depth
        projector = mvmae.projection_mlp(*widths, depth=depth, batch_norm=config.projector_norm)
    width = config.decoder_dim or max(encoder.embed_dim // 2 // HEAD, 1) * HEAD
    model = mvmae.MultiViewMAE(
        encoder,
        decoder_dim=width,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads or max(width // HEAD, 1),
        mask_ratio=config.mask_ratio,
        loss_weight=config.loss_weight,
        pool=config.pool,  # type: ignore[arg-type]
        projector=projector,
        norm_pix=config.norm_pix,
        loss_on=config.loss_on,  # type: ignore[arg-type]
        contrastive_loss=mvmae.NTXentLoss(config.temperature, gather=config.gather),
    )
    prefix, length = encoder.num_prefix_tokens, encoder.patch_embed.num_patches
    for part, tokens in ((model.encoder, mvmae.num_visible(length, config.mask_ratio)), (model.decoder, length)):
        fit_attention(part, prefix + tokens, config.precision, device)
    return model.to(device)
