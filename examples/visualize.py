r"""Draw what models attend to (Fig. 2), what they reconstruct (Fig. 8), and what their features tell apart, side by side.

  python examples/visualize.py --data sample --models runs/quick random:runs/quick
      attention, principal components of patch features, nearest neighbours, and for runs of pretrain.py and adapt.py
      reconstructions; under a minute on two CPU cores
  python examples/visualize.py --data path/to/images \
    --models vit_small_patch14_dinov2.lvd142m --image-size 448
      any plain ViT of timm, at any size
  python examples/visualize.py --data path/to/images \
    --models runs/depth4 runs/depth8 --draw reconstructions
      decoders of several depths

The output folder then holds a PNG for each kind of picture.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import mvmae
from engine.distributed import start_ranks
from engine.options import REQUIRED, RunConfig, option, redefine, run
from mvmae.data import EvalTransform, ImageSource
from mvmae.masked_vit import check_encoder
from mvmae.visualize import (
    GREY,
    attention_maps,
    contact_sheet,
    masked_title,
    nearest,
    overlay,
    patch_heat,
    pca_colours,
    reconstruct,
    reconstruction_note,
    rollout,
    to_unit_range,
)
from tasks.drawn_images import take
from tasks.features import Pooled, extract
from tasks.inputs import InputOptions, resolve_inputs
from tasks.labelled import LabelledConfig
from tasks.models import SHIPPED, load_backbone
from tasks.splits import KINDS, Part, named_images

DRAWINGS = ("attention", "pca", "neighbours", "reconstructions")
NEIGHBOURS = 4
Sheet = dict[str, Any]
"""The arguments of `contact_sheet`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    data: str = option(REQUIRED, f"images: a folder, a list of paths (.txt), {KINDS}", path=True, section="Data")
    image_size: tuple[int, ...] = option(
        (), "side in pixels, or height and width; each model's own if not given", at_least=1, lengths=(1, 2)
    )
    output_dir: str = option("runs/pictures", "folder for the pictures", path=True, section="Run")
    seed: int = option(0, "seed of the choice of images, of untrained weights and of masks", at_least=0)
    models: tuple[str, ...] = option(
        (SHIPPED,),
        "models to draw: timm names, hf-hub:ID, folders of runs or exports, files of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = redefine(LabelledConfig, "arch", "")
    draw: tuple[str, ...] = option(DRAWINGS, "kinds of pictures", DRAWINGS, section="Pictures")
    count: int = option(6, "images to draw", at_least=1)
    bank: int = option(500, "images that neighbours are found among, at most", at_least=2)
    device: str = redefine(RunConfig, "device", "auto")


class Model(NamedTuple):
    """A model with its name and what prepares its images."""

    name: str
    vit: Any
    transform: EvalTransform

    def read(self, source: ImageSource) -> Tensor:
        """Return the images of a source as the model takes them, (B, C, H, W) normalised."""
        images = torch.stack([self.transform(source.image(i)) for i in range(len(source))])
        return images.to(next(self.vit.parameters()).device)

    def shown(self, images: Tensor) -> Tensor:
        """Return normalised images as they are drawn, in [0, 1]."""
        return to_unit_range(images, self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"])

    def picture(self, image: Any) -> Tensor:
        """Return an image of a source as it is drawn, (C, H, W) uint8."""
        return (255 * self.shown(self.transform(image))).round().byte()


def short(name: str) -> str:
    """Return the name of a model as it stands on a picture, without the folders that lead to it."""
    return ("random:" if name.startswith("random:") else "") + Path(name.removeprefix("random:")).name


def load(config: Config, name: str, source: ImageSource, device: torch.device) -> Model:
    """Build a model at the size of the images."""
    torch.manual_seed(config.seed)
    vit: Any = check_encoder(load_backbone(name, arch=config.arch, image_size=config.image_size))
    resolve_inputs(config, vit, source)
    return Model(name, vit.to(device).eval(), EvalTransform(vit))


def draw_attention(models: Sequence[Model], drawn: ImageSource) -> Sheet:
    """Draw attention rollout: of the class token where the model uses it, else of the mean patch; one scale for all."""
    heats, titles = list[Tensor](), ["image"]
    for model in models:
        token = model.vit.global_pool == "token"
        weights = rollout(attention_maps(model.vit, model.read(drawn)))
        heat = patch_heat(weights, model.vit.patch_embed.grid_size, query="token" if token else "mean")
        heats.append(heat / heat.mean(dim=(1, 2), keepdim=True))
        titles.append(f"{short(model.name)}\nattention of the {'class token' if token else 'mean patch'}")
    every = torch.cat([heat.flatten() for heat in heats])
    limits = every.min().item(), every.quantile(0.98).item()  # a few patches take most of it
    shown = [model.shown(model.read(drawn)) for model in models]
    columns = [shown[0], *(overlay(images, heat, limits=limits) for images, heat in zip(shown, heats, strict=True))]
    note = "Attention rollout over all blocks, as a multiple of what an average patch of the image receives."
    return {"columns": columns, "titles": titles, "bar": (f"{limits[0]:.2f}", f"{limits[1]:.2f} or more"), "note": note}


@torch.no_grad()
def draw_pca(models: Sequence[Model], drawn: ImageSource) -> Sheet:
    """Draw the three main directions of the patches' features as red, green and blue."""
    columns = [models[0].shown(models[0].read(drawn))]
    for model in models:
        images = model.read(drawn)
        tokens = model.vit.forward_features(images)[:, model.vit.num_prefix_tokens :]
        columns.append(interpolate(pca_colours(tokens, model.vit.patch_embed.grid_size), images.shape[2:], mode="nearest"))
    note = "Similar colours: similar features. Red, green and blue are the first three principal components over all images."
    return {"columns": columns, "titles": ["image", *(short(model.name) for model in models)], "note": note}


def draw_neighbours(features: dict[str, Tensor], pictures: Tensor, labels: Tensor, count: int) -> Sheet:
    """Draw the images whose features have the largest cosine to those of the first ``count``, which are left out themselves.

    Where all images have a class, neighbours of the right class and of a wrong one are marked and counted.
    """
    columns, titles, counts = [pictures[:count] / 255], ["image"], list[str]()
    captions, marks = [["cosine:"] * count], list[list[bool] | None]([None])
    for name, own in features.items():
        cosines, rows = (x.cpu() for x in nearest(own[:count], own[count:], min(NEIGHBOURS, len(own) - count)))
        right = labels[count:][rows] == labels[:count, None]
        counts.append(f"{short(name)} {int(right.sum())} of {right.numel()}")
        columns += [pictures[count:][column] / 255 for column in rows.T]
        titles += [short(name), *[""] * (rows.shape[1] - 1)]
        captions += [[f"{cosine:.2f}" for cosine in column] for column in cosines.T.tolist()]
        marks += right.T.tolist()
    sheet: Sheet = {"columns": columns, "titles": titles, "captions": captions}
    if (labels < 0).any():
        return sheet
    note = f"Tick: a neighbour of the image's own class; cross: of another class. Of the own class: {', '.join(counts)}."
    return sheet | {"marks": marks, "note": note}


def draw_reconstructions(models: Sequence[Model], maes: Sequence[mvmae.MultiViewMAE], drawn: ImageSource, seed: int) -> Sheet:
    """Draw what is masked, and the masked patches as each run rebuilds them, with the same masks where sizes are the same."""
    columns, titles, notes, before = list[Tensor](), list[str](), dict[str, str](), None
    for model, mae in zip(models, maes, strict=True):
        images = model.read(drawn)
        rebuilt, masked = reconstruct(mae, images[:, None], generator=torch.Generator().manual_seed(seed))
        if before is None or not torch.equal(before, masked):
            columns += [model.shown(images), torch.where(masked, GREY, model.shown(images))]
            titles += ["image", masked_title(masked)]
        columns.append(torch.where(masked, model.shown(rebuilt), model.shown(images)))
        titles.append(f"reconstruction\n{short(model.name)}, {len(mae.decoder.blocks)} decoder blocks")
        notes[model.name], before = reconstruction_note(mae), masked
    same = len(set(notes.values())) == 1
    note = next(iter(notes.values())) if same else "\n".join(f"{short(name)}: {text}" for name, text in notes.items())
    return {"columns": columns, "titles": titles, "note": note}


def main(config: Config) -> None:
    """Draw the requested pictures."""
    ranks, folder = start_ranks(config.device), Path(config.output_dir)
    source = named_images(config.data)
    models = [load(config, name, source, ranks.device) for name in config.models]
    folder.mkdir(parents=True, exist_ok=True)

    pictures, labels, indices = take(source, config.bank, models[0].picture, config.seed)
    bank, drawn = Part(source, indices), Part(source, indices[: config.count])

    def write(kind: str, sheet: Sheet) -> None:
        contact_sheet(**sheet).save(folder / f"{kind}.png")
        print(folder / f"{kind}.png")

    if "attention" in config.draw:
        write("attention", draw_attention(models, drawn))
    if "pca" in config.draw:
        write("pca", draw_pca(models, drawn))
    if "neighbours" in config.draw and len(bank) <= config.count:
        print(f"no neighbours: all {len(bank)} images are drawn; give more, or a smaller --count")
    elif "neighbours" in config.draw:
        features = {model.name: extract(Pooled(model.vit), bank, model.transform, ranks)[0] for model in models}
        write("neighbours", draw_neighbours(features, pictures, labels, config.count))
    if "reconstructions" in config.draw:
        runs = [name for name in config.models if (Path(name) / "encoder" / "pretraining").is_dir()]
        own = [load(dataclasses.replace(config, image_size=()), name, source, ranks.device) for name in runs]
        maes = [mvmae.MultiViewMAE.from_pretrained(Path(name) / "encoder").to(ranks.device) for name in runs]
        if runs:
            write("reconstructions", draw_reconstructions(own, maes, drawn, config.seed))
        else:
            print("no reconstructions: none of the models is a run of pretrain.py or adapt.py, with its decoder")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
