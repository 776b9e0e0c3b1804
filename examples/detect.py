r"""Detect and segment objects: Mask R-CNN on COCO (Table 3 of the paper).

  python examples/detect.py --preset toy
      takes minutes on two CPU cores, on drawn shapes; the mask AP50 is above 40
  torchrun --nproc-per-node 8 examples/detect.py --data path/to/coco --model runs/paper \
    --output-dir runs/table3
      100 epochs with the recipe of Li et al. (2021), estimated at 55 to 96 hours of one H100 (not measured). The paper reports
      51.3 box AP and 45.6 mask AP, 50.3 and 44.9 for MAE; expect less: with torchvision's Mask R-CNN no published run reaches
      50 box AP
  python examples/detect.py --data path/to/coco --model runs/paper --evaluate \
    --output-dir runs/table3
      measures the AP of the newest checkpoint without training

The data lie in COCO's layout: annotations/instances_train2017.json, train2017/, and the same for val2017; classes are those of
the training split, and those of the other are matched by name. If no object has a mask, Faster R-CNN is trained on the boxes
alone. Add --resume to continue an interrupted run. The output folder then holds results.json (12 numbers for boxes, 12 for
masks), detections.json and predictions.png.
"""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from engine.distributed import Ranks, autocast, start_ranks, to_device
from engine.options import option, run
from engine.signals import Stop
from mvmae.dense import ViTPyramid, WindowedViT, group_norm
from mvmae.inputs import Inputs
from mvmae.visualize import contact_sheet, to_pillow
from mvmae.weights import write_json, write_text
from tasks.annotations import split_folder
from tasks.coco import CocoData, evaluate, to_coco
from tasks.dense import DenseConfig, build_trunk, data_folder, data_record, fit

COLOURS = ["red", "deepskyblue", "lime", "gold", "magenta", "orange", "cyan", "white"]
TILE = 256  # pixels that a picture is wide at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DenseConfig):
    scale: tuple[float, float] = option(
        (0.1, 2.0), "factor of the random resize (large-scale jitter)", above=0, lengths=(2,), section="Data"
    )
    channels: int = option(256, "width of the feature pyramid and of the heads", at_least=1, section="Model")
    head_convs: int = 4  # in the box head and in the mask head
    fc_width: int = 1024  # of the linear layer in the box head
    proposals: int = 1000  # regions of an image that the first stage proposes
    regions: int = 512  # regions of an image that train the second stage


LI2021: dict[str, Any] = {
    "help": "the recipe of Li et al. (2021), which the paper follows: 100 epochs of COCO",
    "output_dir": "runs/detect",
    "image_size": 1024,
    "window_size": 16,
    "drop_path": 0.1,
    "steps": 184_375,
    "batch_size": 64,
    "lr": 8e-5,
    "weight_decay": 0.1,
    "decay_biases": True,
    "layer_decay": 1.0,
    "schedule": "cosine",
    "warmup": 461 / 184_375,  # a quarter of an epoch
    "warmup_start": 0.001,
}
TOY: dict[str, Any] = {
    "help": "drawn shapes and a tiny ViT: minutes on two CPU cores",
    "data": "toy",
    "output_dir": "runs/detect-toy",
    "model": "random:mvmae_vit_tiny_patch16",
    "model_args": "img_size=64 patch_size=8 embed_dim=96 depth=4 num_heads=3",
    "image_size": 64,
    "window_size": 4,
    "drop_path": 0.0,
    "scale": (0.8, 1.2),
    "channels": 32,
    "head_convs": 1,
    "fc_width": 128,
    "proposals": 100,
    "regions": 32,
    "steps": 500,
    "batch_size": 8,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "workers": 1,
}
PRESETS: dict[str, dict[str, Any]] = {"li2021": LI2021, "toy": LI2021 | TOY}


class Pyramid(ViTPyramid):
    """A pyramid whose maps are float32 under autocast too: torchvision makes anchors of the maps' type."""

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, level.float()) for name, level in super().forward(images).items())


class RegionHead(RPNHead):  # type: ignore[misc]
    """The first stage's head, whose last layers compute in float32: torchvision rounds boxes to the deltas' type."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(level) for level in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            return [self.cls_logits(level.float()) for level in hidden], [self.bbox_pred(level.float()) for level in hidden]


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """The second stage's last layers, in float32 under autocast too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            scores, deltas = super().forward(x.float())
        return scores, deltas


def build_model(config: Config, trunk: WindowedViT, inputs: Inputs, num_classes: int, *, with_masks: bool = True) -> FasterRCNN:
    """Create torchvision's Mask R-CNN on a plain ViT, with the heads of Li et al. (2021); without masks, Faster R-CNN.

    Under autocast, trunk, pyramid and hidden layers compute in bf16, scores and boxes in float32 (as in detectron2).

    Raises:
        Stop: if the patch side is not a power of two: torchvision's pooling of regions needs such strides.
    """
    patch = trunk.patch_size[0]
    if trunk.patch_size != (patch, patch) or patch & (patch - 1) or patch < 4:
        raise Stop(f"patches must be squares of 4, 8, 16 or 32 pixels, got {patch}x{trunk.patch_size[1]}: change --model")
    width = config.channels
    anchors = tuple((float(2 * patch * 2**level),) for level in range(5))  # 8 x stride: 32 to 512 pixels for patches of 16
    convs = [width] * config.head_convs
    options: dict[str, Any] = {
        "backbone": Pyramid(trunk, out_channels=width),
        "min_size": config.image_size,
        "max_size": config.image_size,
        "size_divisible": config.image_size,
        "_skip_resize": True,
        "image_mean": list(inputs.mean),
        "image_std": list(inputs.std),
        "rpn_anchor_generator": AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
        "rpn_head": RegionHead(width, 3, conv_depth=2),
        "rpn_pre_nms_top_n_train": 2 * config.proposals,
        "rpn_pre_nms_top_n_test": config.proposals,
        "rpn_post_nms_top_n_train": config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_batch_size_per_image": config.regions,
        "box_head": FastRCNNConvFCHead((width, 7, 7), convs, [config.fc_width], group_norm),
        "box_predictor": BoxPredictor(config.fc_width, num_classes + 1),
    }
    if not with_masks:
        return FasterRCNN(**options)
    head, predictor = MaskRCNNHeads(width, convs, 1, group_norm), MaskRCNNPredictor(width, width, num_classes + 1)
    return MaskRCNN(**options, mask_head=head, mask_predictor=predictor)


def losses(model: nn.Module, batch: Sequence[tuple[Tensor, dict[str, Tensor]]], *, device: torch.device) -> dict[str, Tensor]:
    """Compute the five losses of Mask R-CNN, or the four of Faster R-CNN."""
    images = [to_device(image, device) for image, _ in batch]
    targets = [{name: to_device(value, device) for name, value in target.items()} for _, target in batch]
    return {name: value.float() for name, value in model(images, targets).items()}


@torch.no_grad()
def detect(config: Config, model: FasterRCNN, data: CocoData, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Return the detections in this process's share of the images, as COCO's format has them."""
    for index in range(ranks.rank, len(data), ranks.world_size):
        image, target = data[0, index]
        with autocast(config.precision, ranks.device):
            found = model([image.to(ranks.device)])[0]
        yield from to_coco(found, int(target["image_id"]), data.category_ids)


def draw(image: Tensor, objects: Mapping[str, Tensor]) -> Tensor:
    """Enlarge an image in [0, 1] and draw objects' masks, boxes and scores on it."""
    zoom = -(-TILE // image.shape[2])
    pixels = pil_to_tensor(to_pillow(F.interpolate(image[None], scale_factor=zoom)[0]))
    colours = [COLOURS[label % len(COLOURS)] for label in objects["labels"].tolist()]
    for colour, mask in zip(colours, objects.get("masks", ()), strict="masks" in objects):  # together, overlaps would be black
        inside = F.interpolate((mask.view(1, 1, *image.shape[1:]) > 0.5).float(), scale_factor=zoom)[0, 0] > 0
        pixels = draw_segmentation_masks(pixels, inside, alpha=0.4, colors=colour)
    if colours:
        scores = [f"{score:.2f}" for score in objects["scores"].tolist()] if "scores" in objects else None
        pixels = draw_bounding_boxes(pixels, objects["boxes"] * zoom, scores, colours)
    drawn: Tensor = pixels / 255
    return drawn


@torch.no_grad()
def draw_predictions(path: Path, config: Config, model: FasterRCNN, data: CocoData, device: torch.device) -> None:
    """Draw the first images, the truth, and what is detected with a score above 0.5; below, the categories' colours."""
    columns: tuple[list[Tensor], ...] = ([], [], [])
    labels: set[int] = set()
    for index in range(min(config.pictures, len(data))):
        image, target = data[0, index]
        found = {name: value.cpu() for name, value in model([image.to(device)])[0].items()}
        found = {name: value[found["scores"] > 0.5] for name, value in found.items()}
        for column, objects in zip(columns, ({name: x[:0] for name, x in found.items()}, target, found), strict=True):
            column.append(draw(image, objects))
        labels |= {*target["labels"].tolist(), *found["labels"].tolist()}
    legend = [(data.names[label - 1], ImageColor.getrgb(COLOURS[label % len(COLOURS)])[:3]) for label in sorted(labels)]
    contact_sheet(columns, ["image", "truth", "prediction, scores above 0.5"], legend=legend).save(path)


def main(config: Config) -> None:
    """Train unless only evaluation is asked for, then detect, measure and draw."""
    ranks = start_ranks(config.device)
    folder, root = Path(config.output_dir), data_folder(config, ranks)
    trunk, inputs = build_trunk(config, split_folder(root, "train"), rebuild=True)

    data = CocoData(root, "train", side=config.image_size, scale=config.scale, seed=config.seed, inputs=inputs)
    val = CocoData(root, "val", inputs=inputs, names=data.names)
    if val.with_masks != data.with_masks:
        raise Stop(f"{root}: training and validation images must both have masks, or both boxes alone")
    model = build_model(config, trunk, inputs, len(data.names), with_masks=data.with_masks).to(ranks.device)

    record = data_record(root, data, val, [*map(data.name, range(len(data))), data.file], "objects")
    fit(config, model, trunk, data, partial(losses, device=ranks.device), ranks, record=record, collate=list)

    detections = [found for share in ranks.gather(list(detect(config, model, val, ranks))) for found in share]
    if ranks.rank == 0:
        write_text(folder / "detections.json", json.dumps(detections))
        results = evaluate(val.truth, detections, val.image_ids, with_masks=data.with_masks)
        write_json(folder / "results.json", results)
        if config.pictures:
            draw_predictions(folder / "predictions.png", config, model, val, ranks.device)
        for kind, numbers in results.items():
            print(f"{kind:>4} " + "  ".join(f"{name} {value:.1f}" for name, value in numbers.items()))


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
