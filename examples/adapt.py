r"""Continue training an existing encoder, on unlabelled images of your own: pretrain.py's loop, with gentler defaults.

  python examples/adapt.py --encoder vit_small_patch14_reg4_dinov2.lvd142m --image-size 224 \
    --data path/to/images --output-dir runs/adapted
      downloads the weights; prints before and after the k-NN accuracy if the images have labels, else view retrieval: of eight
      crops of each image, the share whose most similar crop is of the same image
  python examples/adapt.py --encoder runs/quick --data sample --image-size 48 --epochs 5 \
    --decoder-depth 2 --decoder-heads 4
      takes minutes of one CPU core, from encoder and decoder of pretrain.py --preset quick

The recipe is that of pretrain.py --preset small with contrast from the start, and gentler: the encoder is frozen while the new
decoder learns to use it, and then its lower layers have smaller learning rates. From the folder of a run, decoder and projector
go on too, where they fit. --rehearse DATA, images like those that the encoder was trained on, keeps what it knew. The run
leaves the encoder that measured best, which can be the one that it started from.
"""

import dataclasses
from pathlib import Path

import pretrain
from engine.options import REQUIRED, option, redefine, run
from tasks import config as shared
from tasks import gains
from tasks.best import Best
from tasks.evaluation import Evaluation
from tasks.pretraining import build_evaluation
from tasks.splits import open_splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shared.Config):
    """The recipe is ours, but for the layer decay, and measured (RESULTS.md): nobody has published such a one."""

    encoder: str = redefine(
        shared.Config,
        "encoder",
        REQUIRED,
        "encoder to start from, a plain ViT: timm name, hf-hub:ID, folder of a run or export, or file of weights",
    )
    arch: str = option(
        "", "timm name of the encoder, if it is a file of weights without a config.json beside it", section="Model"
    )
    freeze: float = option(
        0.05,
        "share of the run in which the encoder is frozen; its learning rate then warms up for as long (LP-FT)",
        at_least=0,
        below=0.5,
    )
    train_blocks: int = option(0, "last blocks of the encoder that are trained, with the final norm; 0: all blocks", at_least=0)
    layer_decay: float = option(
        0.75, "factor of the learning rate from each layer of the encoder to the one below (BEiT)", above=0, at_most=1
    )
    rehearse: str = option(
        "",
        "images like those that --encoder was trained on, given as --data is: each epoch also trains on as many of them as "
        "there are of your own, so that the encoder forgets less",
        path=True,
        section="Data",
    )
    output_dir: str = redefine(shared.Config, "output_dir", "runs/adapt")
    # the recipe of pretrain.py --preset small; without a projector the contrastive loss undid what the encoder knew
    jitter: tuple[float, ...] = redefine(shared.Config, "jitter", (0.4, 0.4, 0.4, 0.1))
    grayscale: float = redefine(shared.Config, "grayscale", 0.2)
    mask_ratio: float = redefine(shared.Config, "mask_ratio", 0.75)
    loss_weight: float = redefine(shared.Config, "loss_weight", 1.0)
    temperature: float = redefine(shared.Config, "temperature", 0.1)
    projector: int = redefine(shared.Config, "projector", 128)
    decoder_dim: int = redefine(shared.Config, "decoder_dim", 0)
    decoder_depth: int = redefine(shared.Config, "decoder_depth", 1)
    decoder_heads: int = redefine(shared.Config, "decoder_heads", 0)
    epochs: float = redefine(shared.Config, "epochs", 0)
    batch_size: int = redefine(shared.Config, "batch_size", 0)
    lr_batch: int = 0
    pretrained: bool = True
    optimizer: str = redefine(shared.Config, "optimizer", "muon")
    base_lr: float = redefine(shared.Config, "base_lr", 4e-3)


def main(config: shared.Config) -> None:
    """Train by pretrain.py's loop, and compare the encoder that is exported with the start."""
    pretrain.main(config, compare)


def compare(config: shared.Config, best: Best, evaluation: Evaluation) -> list[str]:
    """Return the table of what adapting has gained and lost, of images of --data and of --rehearse, and draw it."""
    sets, ranks = {"own": evaluation}, evaluation.ranks
    if config.rehearse:
        splits = open_splits(config.rehearse, "--rehearse")
        sets["rehearsed"] = build_evaluation(config, evaluation.pooled.model, splits, ranks)
    rows = gains.compare(best, sets)
    if ranks.rank == 0:
        gains.draw(Path(config.output_dir) / "gains.png", rows)
    return ["", *gains.table(rows)]


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
