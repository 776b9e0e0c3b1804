r"""Semantic segmentation: UPerNet on ADE20K (Table 4 of the paper).

  python examples/segment.py --preset toy
      takes a minute on two CPU cores, on drawn shapes; the mIoU is above 60
  torchrun --nproc-per-node 8 examples/segment.py --data path/to/ADEChallengeData2016 \
    --model runs/paper --output-dir runs/table4
      160 000 steps with BEiT's recipe, estimated at 8 to 13 hours of one H100 (not measured); the paper reports 50.2 mIoU;
      mmsegmentation reaches 48.1 with MAE's weights
  python examples/segment.py --data path/to/ADEChallengeData2016 --model runs/paper \
    --output-dir runs/table4 --evaluate
      measures the mIoU of the newest checkpoint without training

Other data needs the folders images/{training,validation} and annotations/{training,validation}, with maps of labels from 0 to
255. The classes are those that classes.txt names, one a line, or else the labels that occur in training. Some pixels are
neither learnt nor counted: those of label 0 unless --no-reduce-zero-label is given, of label 255 unless --no-ignore-255 is,
and of each --ignore-label. Add --resume to continue an interrupted run. The output folder then holds results.json, with every
class, and predictions.png.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from engine.distributed import Ranks, autocast, start_ranks, to_device
from engine.options import option, run
from mvmae.dense import FCNHead, UPerHead, ViTPyramid, WindowedViT
from mvmae.visualize import contact_sheet
from mvmae.weights import write_json
from tasks.ade20k import IGNORE, LabelMaps, augment, confusion, find_classes, fitting_size, read_split, scores, split_folder
from tasks.dense import DenseConfig, build_trunk, data_folder, data_record, fit

Prepare = Callable[[Tensor], Tensor]
"""Brings uint8 images to the device and normalises them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DenseConfig):
    reduce_zero_label: bool = option(True, "leave out pixels of label 0 (ADE20K)", section="Data")
    ignore_255: bool = option(True, "leave out pixels of label 255")
    ignore_label: tuple[int, ...] = option((), "other labels whose pixels are left out", at_least=0, at_most=255)
    ratio: tuple[float, float] = option((0.5, 2.0), "factor of the random resize before the crop (BEiT)", above=0, lengths=(2,))
    channels: int = option(768, "width of the UPerNet head (BEiT)", at_least=1, section="Model")
    stride: int = option(341, "step of the sliding test window in pixels (BEiT)", at_least=1, section="Evaluation")
    aux_channels: int = 256  # width of the auxiliary head (BEiT)
    aux_weight: float = 0.4  # of its loss (BEiT)


BEIT: dict[str, Any] = {
    "help": "BEiT's recipe, which the paper follows: 160 000 steps on ADE20K",
    "output_dir": "runs/segment",
    "image_size": 512,
    "window_size": 0,
    "drop_path": 0.1,
    "steps": 160_000,
    "batch_size": 16,
    "lr": 1e-4,  # assumed: mmsegmentation's for MAE; BEiT's 7e-4 belongs to its layer-scaled model
    "weight_decay": 0.05,
    "decay_biases": False,
    "layer_decay": 0.65,
    "schedule": "linear",
    "warmup": 1500 / 160_000,
    "warmup_start": 1e-6,
}
TOY: dict[str, Any] = {
    "help": "drawn shapes and a tiny ViT: a minute on two CPU cores",
    "data": "toy",
    "output_dir": "runs/segment-toy",
    "model": "random:mvmae_vit_tiny_patch16",
    "model_args": "img_size=48 patch_size=8 embed_dim=64 depth=3 num_heads=2",
    "image_size": 48,
    "drop_path": 0.0,
    "ratio": (1.0, 1.0),
    "steps": 700,
    "batch_size": 8,
    "lr": 2e-3,
    "layer_decay": 1.0,
    "warmup": 1 / 7,
    "channels": 16,
    "aux_channels": 16,
    "stride": 48,
    "workers": 1,
}
PRESETS: dict[str, dict[str, Any]] = {"beit": BEIT, "toy": BEIT | TOY}


class UPerNet(nn.Module):
    """UPerNet's head on the maps of a plain ViT, and an auxiliary head on the third."""

    def __init__(self, trunk: WindowedViT, num_classes: int, config: Config) -> None:
        super().__init__()
        self.backbone = ViTPyramid(trunk, "beit")
        width = self.backbone.out_channels
        self.head = UPerHead([width] * 4, num_classes, channels=config.channels)
        self.auxiliary = FCNHead(width, num_classes, channels=config.aux_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of all classes from both heads, (B, classes, H, W), at the size of the images."""
        maps = self.backbone(images)
        outputs = (self.head(maps), self.auxiliary(maps["2"]))
        main, auxiliary = (F.interpolate(x.float(), images.shape[2:], mode="bilinear") for x in outputs)
        return main, auxiliary


def taps(depth: int) -> list[int]:
    """Return the blocks whose output is used: the last of a third, half, two thirds and all of them (BEiT: 3, 5, 7, 11)."""
    return [max(count, 1) - 1 for count in (depth // 3, depth // 2, depth * 2 // 3, depth)]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor], *, prepare: Prepare, aux_weight: float) -> dict[str, Tensor]:
    """Compute the cross-entropy of both heads: a mean over all pixels, ignored ones too, as in BEiT's code."""
    images, labels = batch
    main, auxiliary = model(prepare(images))
    labels = to_device(labels, main.device)
    entropy = partial(F.cross_entropy, target=labels, ignore_index=IGNORE, reduction="sum")
    return {"loss_main": entropy(main) / labels.numel(), "loss_aux": aux_weight * entropy(auxiliary) / labels.numel()}


def slide(model: nn.Module, image: Tensor, side: int, stride: int) -> Tensor:
    """Average the class values of overlapping windows: image (3, H, W) to (classes, H, W)."""
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(side - width, 0), 0, max(side - height, 0)))
    last = [length - side for length in image.shape[1:]]
    rows, columns = ([*range(0, end, stride), end] for end in last)  # where windows start
    corners = [(top, left) for top in rows for left in columns]
    values = model(torch.stack([image[:, top : top + side, left : left + side] for top, left in corners]))[0]
    total, count = image.new_zeros(values.shape[1], *image.shape[1:]), image.new_zeros(image.shape[1:])
    for (top, left), part in zip(corners, values, strict=True):
        total[:, top : top + side, left : left + side] += part
        count[top : top + side, left : left + side] += 1
    return (total / count)[:, :height, :width]


@torch.no_grad()
def predict(config: Config, model: nn.Module, image: Tensor) -> Tensor:
    """Name every pixel of a normalised image, resized as the recipe says: (C, H, W) to (H, W)."""
    size = fitting_size((image.shape[1], image.shape[2]), config.image_size)
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    values = slide(model, resized, config.image_size, config.stride)
    return F.interpolate(values[None], image.shape[1:], mode="bilinear")[0].argmax(0)


def evaluate(config: Config, model: nn.Module, data: LabelMaps, prepare: Prepare, ranks: Ranks) -> Tensor:
    """Count right and wrong pixels over all images, each process its share."""
    counts = torch.zeros(len(data.names), len(data.names), dtype=torch.long)
    for index in range(ranks.rank, len(data), ranks.world_size):
        image, labels = data[0, index]
        with autocast(config.precision, ranks.device):
            pred = predict(config, model, prepare(image))
        counts += confusion(pred.cpu(), labels, len(data.names))
    return torch.stack(ranks.gather(counts)).sum(0)


def draw_predictions(path: Path, config: Config, model: nn.Module, data: LabelMaps, prepare: Prepare) -> None:
    """Draw the first images, the truth, and the prediction; below, the colours of the classes that occur."""
    colours = torch.randint(48, 256, (256, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for label, name in enumerate(data.names):
        if name.lower() == "background":
            colours[label] = 128
    colours[IGNORE] = 0
    columns: tuple[list[Tensor], ...] = ([], [], [])
    occurring: set[int] = set()
    for index in range(min(config.pictures, len(data))):
        image, labels = data[0, index]
        pred = predict(config, model, prepare(image)).cpu()
        for column, picture in zip(columns, (image, *(colours[x].permute(2, 0, 1) for x in (labels, pred))), strict=True):
            column.append(picture / 255)
        occurring |= {*labels.unique().tolist(), *pred.unique().tolist()}
    names = {**dict(enumerate(data.names)), IGNORE: "left out"}
    legend = [(names[label], tuple(colours[label].tolist())) for label in sorted(occurring)]
    contact_sheet(columns, ["image", "truth", "prediction"], legend=legend).save(path)


def main(config: Config) -> None:
    """Train unless only evaluation is asked for, then test, measure and draw."""
    ranks = start_ranks(config.device)
    folder, root = Path(config.output_dir), data_folder(config, ranks)
    trunk, inputs = build_trunk(config, split_folder(root, "train"), taps=taps)

    splits = {split: read_split(root, split, inputs.max_pixels) for split in ("train", "val")}
    left_out = dict.fromkeys(config.ignore_label, "a shorter --ignore-label makes it a class")
    left_out |= {255: "--no-ignore-255 makes it a class"} if config.ignore_255 else {}
    left_out |= {0: "--no-reduce-zero-label makes it a class"} if config.reduce_zero_label else {}
    classes = find_classes(root, splits, left_out)
    fill = tuple(round(255 * value) for value in inputs.mean)
    transform = partial(augment, side=config.image_size, ratio=config.ratio, fill=fill)
    data = LabelMaps(splits["train"], classes, transform=transform, seed=config.seed, inputs=inputs)
    val = LabelMaps(splits["val"], classes, inputs=inputs)
    model: nn.Module = UPerNet(trunk, len(data.names), config)
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # BEiT's; the CPU has none
    model.to(ranks.device)

    def prepare(images: Tensor) -> Tensor:
        prepared: Tensor = normalize(to_device(images, ranks.device).float() / 255, inputs.mean, inputs.std)
        return prepared

    record = data_record(root, data, val, [*data.split.images, *data.split.labels], "pixels")
    compute = partial(losses, prepare=prepare, aux_weight=config.aux_weight)
    fit(config, model, trunk, data, compute, ranks, record=record)

    counts = evaluate(config, model, val, prepare, ranks)
    if ranks.rank == 0:
        results = scores(counts, val.names)
        write_json(folder / "results.json", results)
        if config.pictures:
            draw_predictions(folder / "predictions.png", config, model, val, prepare)
        for name, numbers in results["classes"].items():
            print(f"{name:>24} " + "  ".join(f"{key} {value:5.1f}" for key, value in numbers.items() if value is not None))
        print("  ".join(f"{name} {results[name]:.2f}" for name in ("mIoU", "mAcc", "aAcc")))


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
