"""The options of pretrain.py and adapt.py, and the model that they describe."""

import dataclasses

import torch
from torch import nn

import mvmae
from engine.distributed import in_bf16
from engine.optim import OPTIMIZERS
from engine.options import REQUIRED, RunConfig, option, redefine
from engine.signals import Stop
from tasks.inputs import InputOptions
from tasks.models import start_encoder
from tasks.splits import KINDS

HEAD = 32  # width of a head of a decoder whose size follows the encoder's
SHORT = 256  # tokens up to which two matrix products are faster than torch's fused kernel in bf16 on a CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(InputOptions, RunConfig):
    """Options of the method and of its run, with the paper's values."""

    data: str = option(
        REQUIRED,
        f"images: a folder, a list of paths (.txt), {KINDS}; "
        "or a stream: URLs of tar files (https://host/{000..099}.tar) or hfids/OWNER/NAME",
        path=True,
        may_change=True,
        section="Data",
    )
    image_size: tuple[int, ...] = option(
        (),
        "side of a view in pixels, or height and width; the encoder's own if not given (paper: 224)",
        at_least=1,
        at_most=2**14,
        lengths=(1, 2),
    )
    in_chans: int = option(3, "channels of the images; other than 1 and 3 need --mean and --std", at_least=1, at_most=4096)
    max_bad: int = option(100, "different unreadable images to tolerate; one more stops the run", at_least=0, may_change=True)
    output_dir: str = redefine(RunConfig, "output_dir", "runs/pretrain")
    epochs: float = option(
        1600,
        "passes over the images; 0: chosen from their number, and printed (paper)",
        at_least=0,
        may_change=True,
        section="Length",
    )
    steps: int = option(0, "steps of the run, in place of --epochs; 0: by --epochs", at_least=0, may_change=True)
    minutes: float = option(
        0,
        "minutes of the run, in place of --epochs: as many steps as fit, timed in the first ones; 0: by --epochs",
        at_least=0,
    )
    warmup_epochs: float | None = option(
        None,
        "epochs of linear warm-up; if not given 5 % of the run, --preset paper 2.5 % (40 of 1600), --preset quick 10 %",
        at_least=0,
    )
    batch_size: int = option(
        256, "images per step, over all processes; 0: chosen from number and length, and printed (paper)", at_least=0
    )
    num_views: int = option(
        2, "views of each image; 1 with --loss-weight 0 is MAE (paper)", at_least=1, at_most=64, section="Method"
    )
    same_crop: bool = option(False, 'the same crop in every view: "without two different targets" in Table 6 of the paper')
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "share of the image's area that a crop covers (MAE)", above=0, at_most=1, lengths=(2,)
    )
    jitter: tuple[float, ...] = option(
        (),
        "strength of random brightness, contrast, saturation and hue of a view, such as 0.4 0.4 0.4 0.1, or of the first two "
        "alone, which is all that images of other than 3 channels get; 0 0: none",
        at_least=0,
        lengths=(2, 4),
    )
    grayscale: float = option(0.0, "probability that a view becomes grey", at_least=0, at_most=1)
    transform: str = option(
        "",
        "function or object of yours, module:name, that changes each view, (C, H, W) uint8, after crop and flip; a run can be "
        "repeated if it draws from an argument generator (torch) or rng (NumPy), from the global generators of torch, NumPy "
        "and Python, from generators that it names, or has set_random_seed; from others it draws the same in every process",
    )
    mask_ratio: float = option(0.8, "share of the patches that is masked (paper, Table 5)", at_least=0, below=1)
    loss_weight: float = option(2.0, "weight of the contrastive loss, lambda; 0: none (paper, Table 5)", at_least=0)
    temperature: float = option(0.07, "temperature of the contrastive loss, tau (paper, Section 3.2.2)", above=0)
    contrast_from: float = option(
        0.0, "share of the run before the contrastive loss, and jitter, begin (paper: 0; MAE-CT)", at_least=0, below=1
    )
    projector: int = option(
        0,
        "output width of a 3-layer MLP before the contrastive loss, with hidden layers four times as wide; 0: none (paper)",
        at_least=0,
        at_most=2**13,
    )
    norm_pix: bool = option(True, "reconstruct patches normalised by their own mean and deviation (MAE)")
    encoder: str = option(
        "mvmae_vit_base_patch16",
        "encoder, a plain ViT: timm name, hf-hub:ID, folder of a run or export, or file of weights (paper)",
        path=True,
        section="Model",
    )
    encoder_args: str = option("", "arguments for timm, such as 'patch_size=8 embed_dim=128 depth=4'")
    decoder_dim: int = option(512, "width of the decoder; 0: half the encoder's (MAE)", at_least=0, at_most=2**13)
    decoder_depth: int = option(4, "blocks of the decoder (paper, Table 5)", at_least=1, at_most=100)
    decoder_heads: int = option(16, "attention heads of the decoder; 0: one for 32 of its width (MAE)", at_least=0)
    optimizer: str = option(
        "adamw", "adamw, or muon: Muon for matrices, AdamW for the rest (paper: adamw)", OPTIMIZERS, section="Optimizer"
    )
    base_lr: float = option(
        1.5e-4,
        "learning rate for a batch of 256, or, with preset small and in adapt.py, for the batch that --batch-size 0 chooses; "
        "it is scaled with the batch (paper and MAE)",
        at_least=0,
    )
    eval_every: float | None = option(
        None,
        "epochs between two evaluations on held-out images; a tenth of the run if not given; 0: only before and after",
        at_least=0,
        may_change=True,
        section="Evaluation",
    )
    eval_images: int = option(
        5000, "images to evaluate on at most, by k-NN too if they have labels; 0: no evaluation", at_least=0, may_change=True
    )
    accumulate: int = option(
        1,
        "parts in which a batch is computed, to save memory (GradCache); the batch stays as large as --batch-size",
        at_least=1,
        may_change=True,
        section="Speed",
    )
    compile: bool = option(False, "compile the model with torch.compile", may_change=True)
    weight_decay: float = 0.05  # MAE's; parameters of one dimension have none
    warmup: float = 0.05  # share of the run, where --warmup-epochs is not given
    lr_batch: int = 256  # that --base-lr is for; 0: the batch that is chosen from the number of images
    # pretrain.main reads these too; adapt.py declares them again as options
    arch: str = ""
    pretrained: bool = False
    freeze: float = 0.0
    train_blocks: int = 0
    layer_decay: float = 1.0
    rehearse: str = ""


def build_model(config: Config, device: torch.device) -> mvmae.MultiViewMAE:
    """Create the encoder, with its weights if asked, and the pretraining model around it, the same for the same seed."""
    torch.manual_seed(config.seed)
    encoder = start_encoder(
        config.encoder,
        config.encoder_args,
        pretrained=config.pretrained,
        arch=config.arch,
        image_size=config.image_size,
        in_chans=config.in_chans,
    )
    if not len(encoder.blocks):
        raise Stop(f"--encoder-args: depth must be at least 1, got {config.encoder_args!r}")
    projector = None
    if config.projector:
        projector = mvmae.projection_mlp(encoder.embed_dim, 4 * config.projector, config.projector, depth=3, batch_norm=True)
    width = config.decoder_dim or max(encoder.embed_dim // 2 // HEAD, 1) * HEAD
    model = mvmae.MultiViewMAE(
        encoder,
        decoder_dim=width,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads or max(width // HEAD, 1),
        mask_ratio=config.mask_ratio,
        loss_weight=config.loss_weight,
        temperature=config.temperature,
        projector=projector,
        norm_pix=config.norm_pix,
    )
    prefix, length = encoder.num_prefix_tokens, encoder.patch_embed.num_patches
    for part, tokens in ((model.encoder, mvmae.num_visible(length, config.mask_ratio)), (model.decoder, length)):
        prefer_plain_attention(part, prefix + tokens, config.precision, device)
    return model.to(device)


def prefer_plain_attention(model: nn.Module, tokens: int, precision: str, device: torch.device) -> None:
    """Let timm's attention use plain matrix products in bf16 on a CPU, where sequences are short: the same but for rounding.

    ``tokens`` is the length of its sequences in training, ``precision`` as in `autocast`.
    """
    if device.type == "cpu" and in_bf16(precision, device) and tokens <= SHORT:
        for module in model.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = False  # type: ignore[assignment]
