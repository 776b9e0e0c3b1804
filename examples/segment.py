r"""Semantic segmentation: UPerNet on ADE20K (Table 4 of the paper).

  python examples/segment.py --preset toy
      takes a minute on two CPU cores, on drawn shapes; the mIoU is above 60
  torchrun --nproc-per-node 8 examples/segment.py --data path/to/ADEChallengeData2016 \
    --model runs/paper --output-dir runs/ade
      160 000 steps with BEiT's recipe: about a day on 8 GPUs (not measured); the paper reports 50.2 mIoU; mmsegmentation
      reaches 48.1 with MAE's weights
  python examples/segment.py --data path/to/ADEChallengeData2016 --model runs/paper \
    --output-dir runs/ade --evaluate --ratios 0.5 0.75 1 1.25 1.5 1.75 --flip-test
      measures the mIoU of the newest checkpoint without training, here averaged over image sizes and mirror images

Other data needs the folders images/{training,validation} and annotations/{training,validation} with 8-bit label maps; a file
classes.txt, one name per line, names the labels. Pixels of --ignore-label are neither learnt nor counted. Add --resume to
continue an interrupted run. The output folder then holds results.json, with every class, and predictions.png.
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
from mvmae.dense import FCNHead, UPerHead, ViTPyramid
from mvmae.visualize import contact_sheet
from mvmae.weights import write_json
from tasks.ade20k import IGNORE, Augment, LabelMaps, confusion, fitting_size, scores
from tasks.dense import DenseConfig, build_trunk, data_folder, fingerprint, fit
from tasks.models import with_background

Prepare = Callable[[Tensor], Tensor]
"""Brings uint8 images to the device and normalises them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DenseConfig):
    num_classes: int = option(
        0, "number of classes; 0: counted in classes.txt, or in the label maps", at_least=0, at_most=255, section="Data"
    )
    reduce_zero_label: bool = option(True, "ignore pixels of label 0 and number the other classes from 0 (ADE20K)")
    ignore_label: tuple[int, ...] = option(
        (),
        "labels, as the label maps have them, whose pixels are neither learnt nor counted in the mIoU, as 255 never is",
        at_least=0,
        at_most=255,
    )
    ratio: tuple[float, float] = option((0.5, 2.0), "factor of the random resize before the crop (BEiT)", above=0, lengths=(2,))
    channels: int = option(768, "width of the UPerNet head (BEiT)", at_least=1, section="Model")
    stride: int = option(341, "step of the sliding test window in pixels (BEiT)", at_least=1, section="Evaluation")
    ratios: tuple[float, ...] = option((1.0,), "factors of the image size in the test, whose predictions are averaged", above=0)
    flip_test: bool = option(False, "average the predictions of each test image and its mirror image")
    aux_channels: int = 256  # width of the auxiliary head (BEiT)
    aux_weight: float = 0.4  # of its loss (BEiT)


BEIT: dict[str, Any] = {
    "help": "BEiT's recipe, which the paper follows: 160 000 steps on ADE20K",
    "output_dir": "runs/segment",
    "model": "mvmae_vit_base_patch16",
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
    """A backbone, UPerNet's head on its maps, and an auxiliary head on the third."""

    def __init__(self, backbone: ViTPyramid, num_classes: int, *, channels: int, aux_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = UPerHead([backbone.out_channels] * 4, num_classes, channels=channels)
        self.auxiliary = FCNHead(backbone.out_channels, num_classes, channels=aux_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of all classes from both heads, (B, classes, H, W), at the size of the images."""
        maps = self.backbone(images)
        outputs = (self.head(maps), self.auxiliary(maps["2"]))
        main, auxiliary = (F.interpolate(x.float(), images.shape[2:], mode="bilinear") for x in outputs)
        return main, auxiliary


def build_model(config: Config, num_classes: int) -> tuple[UPerNet, Any]:
    """Create UPerNet on a plain ViT, with taps after a third, half, two thirds and all of its blocks (BEiT: 3, 5, 7, 11)."""

    def taps(depth: int) -> list[int]:
        return [max(count, 1) - 1 for count in (depth // 3, depth // 2, depth * 2 // 3, depth)]

    trunk, vit = build_trunk(config, taps=taps)
    return UPerNet(ViTPyramid(trunk, "beit"), num_classes, channels=config.channels, aux_channels=config.aux_channels), vit


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
    """Name every pixel of a normalised image: (3, H, W) to (H, W), over all sizes and mirrored images of the test."""
    height, width = image.shape[1:]
    total = torch.zeros((), device=image.device)
    for ratio in config.ratios:
        size = fitting_size((height, width), config.image_size, ratio)
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        for flipped in (False, True)[: 1 + config.flip_test]:
            values = slide(model, resized.flip(2) if flipped else resized, config.image_size, config.stride)
            values = values.flip(2) if flipped else values
            total = total + F.interpolate(values[None], (height, width), mode="bilinear")[0].softmax(0)
    return total.argmax(0)


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
    ranks, config = start_ranks(config.device), with_background(config, config.model, config.arch)
    folder, root = Path(config.output_dir), data_folder(config, ranks)

    layout = partial(LabelMaps, root, reduce_zero_label=config.reduce_zero_label, ignore=config.ignore_label)
    val = layout("val", num_classes=config.num_classes, background=config.background)
    config = dataclasses.replace(config, num_classes=len(val.names))
    model, vit = build_model(config, len(val.names))
    mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
    augment = Augment(config.image_size, ratio=config.ratio, fill=tuple(round(255 * value) for value in mean))
    data = layout("train", num_classes=len(val.names), background=config.background, augment=augment, seed=config.seed)
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # BEiT's; the CPU has none
    model.to(ranks.device)

    def prepare(images: Tensor) -> Tensor:
        prepared: Tensor = normalize(to_device(images, ranks.device).float() / 255, mean, std)
        return prepared

    record = {"images": fingerprint(root, [*data.images, *data.labels]), "classes": data.names}
    compute = partial(losses, prepare=prepare, aux_weight=config.aux_weight)
    fit(config, model, model.backbone.trunk, data, compute, ranks, record=record)

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
