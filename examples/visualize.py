r"""Draw what a model attends to (Fig. 2), what it reconstructs (Fig. 8), and what its features tell apart.

  python examples/visualize.py --data sample --models runs/quick random:runs/quick
      attention; PCA of patch features; nearest neighbours; reconstructions, for runs of pretrain.py and adapt.py; and shares of
      the features' variance that brightness, contrast, lit area (pixels above a tenth of white) and class explain,
      which reveals shortcuts of the contrastive loss
  python examples/visualize.py --data path/to/images --models vit_small_patch14_dinov2.lvd142m \
    --image-size 224 448
      any plain ViT of timm, at any size
  python examples/visualize.py --data sample --models runs/depth4 runs/depth8 --draw reconstructions
      decoders of several depths side by side
  python examples/visualize.py --data sample --models runs/quick --draw method
      the figure of the method: an image, its views, their masks, their reconstructions

The output folder then holds a PNG for each kind of picture, and beside it a folder with its tiles one by one.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvmae
from engine.cli import inherit, option, run
from engine.config import RunConfig
from engine.distributed import start_processes
from engine.ends import Stop
from mvmae.data import ImageSource
from mvmae.masked_vit import check_encoder
from mvmae.metrics import variance_explained
from mvmae.visualize import (
    GREY,
    attention_maps,
    contact_sheet,
    nearest,
    overlay,
    patch_heat,
    pca_colours,
    reconstruct,
    reconstruction_note,
    rollout,
    to_pillow,
    to_unit_range,
)
from mvmae.weights import write_json
from tasks.backbones import load_backbone
from tasks.drawn_images import properties, shown, spread, take
from tasks.inputs import normalize
from tasks.plots import plot
from tasks.splits import named_images
from tasks.starting import with_background

DRAWINGS = ("attention", "pca", "neighbours", "shares", "reconstructions", "method")
Sheet = dict[str, Any]
"""The arguments of `contact_sheet`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    data: str = option(
        dataclasses.MISSING,
        "images: a folder, a list of paths (.txt), tar, Parquet, Arrow or IDX files, a timm data set, or sample: "
        "photographs of scikit-image",
        path=True,
        section="Data",
    )
    image_size: tuple[int, ...] = option(
        (), "side in pixels, or height and width", at_least=1, lengths=(1, 2), empty="the first model's own"
    )
    background: str = option(
        "", "colour behind transparent pixels, a name or #RRGGBB", empty="the first model's own, else white"
    )
    models: tuple[str, ...] = option(
        dataclasses.MISSING,
        "models to draw: timm names, hf-hub:ID, folders of runs or exports, files of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = option("", "timm name of the model, if a file of weights has no config.json beside it", empty="none")
    draw: tuple[str, ...] = option(DRAWINGS[:5], "kinds of pictures to draw", DRAWINGS, section="Pictures")
    count: int = option(6, "number of images to draw", at_least=1)
    bank: int = option(500, "maximum number of images for the neighbours and the shares of variance", at_least=1)
    neighbours: int = option(5, "number of neighbours to draw", at_least=1)
    output_dir: str = option("runs/pictures", "folder for the pictures", path=True, section="Run")
    seed: int = option(0, "seed of the random numbers: choice of images, untrained weights, masks", at_least=0)
    device: str = inherit(RunConfig, "device", "auto")


class Model(NamedTuple):
    """A model, its name, and the mean and standard deviation of its images."""

    name: str
    vit: Any
    grid: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, H, W) uint8."""
        return normalize(images, self.mean, self.std)


def load(config: Config, name: str, device: torch.device) -> Model:
    """Build a model at the size of the images."""
    torch.manual_seed(config.seed)
    size = _size(config)
    options: dict[str, Any] = {"img_size": size} if size else {}
    vit: Any = check_encoder(load_backbone(name, arch=config.arch, **options))
    cfg = vit.pretrained_cfg
    return Model(name, vit.to(device).eval(), vit.patch_embed.grid_size, cfg["mean"], cfg["std"])


def _size(config: Config) -> tuple[int, int] | None:
    return (config.image_size[0], config.image_size[-1]) if config.image_size else None


def draw_attention(models: Sequence[Model], images: Tensor) -> Sheet:
    """Draw attention rollout and the last block's attention: of the class token where the model uses it, else the mean."""
    columns, titles = [shown(images)], ["image"]
    bars: list[tuple[str, str] | None] = [None]
    for model in models:
        query = "token" if model.vit.global_pool == "token" else "mean"
        maps = attention_maps(model.vit, model.prepare(images))
        for kind, weights in (("rollout", rollout(maps)), ("last block", maps[-1].mean(dim=1))):
            heat = patch_heat(weights, model.grid, query=query)
            heat = heat / heat.mean(dim=(1, 2), keepdim=True)
            limits = heat.min().item(), heat.quantile(0.98).item()
            columns.append(overlay(shown(images), heat, limits=limits))
            titles.append(f"{_short(model.name)}\n{kind}, {'class token' if query == 'token' else 'mean patch'}")
            bars.append((f"{limits[0]:.2f}", f"{limits[1]:.2f}+"))
    note = "Colours: the attention that a patch receives, divided by that of an average patch of the image; +: or more. "
    note += "Each column has its own scale."
    return {"columns": columns, "titles": titles, "bars": bars, "note": note}


@torch.no_grad()
def draw_pca(models: Sequence[Model], images: Tensor) -> Sheet:
    """Draw the three main directions of the patches' features as red, green and blue."""
    columns = [shown(images)]
    for model in models:
        tokens = model.vit.forward_features(model.prepare(images))[:, model.vit.num_prefix_tokens :]
        colours = pca_colours(tokens, model.grid)
        columns.append(torch.nn.functional.interpolate(colours, images.shape[2:], mode="nearest"))
    note = "Similar colours: similar features. Red, green and blue are the first three principal components over all images."
    return {"columns": columns, "titles": ["image", *(_short(model.name) for model in models)], "note": note}


@torch.no_grad()
def draw_neighbours(models: Sequence[Model], images: Tensor, bank: Tensor, k: int, labels: Tensor) -> Sheet:
    """Draw the images whose features have the largest cosine to those of the first ones, which are left out themselves.

    Where all images have a class, neighbours of the right class and of a wrong one are marked and counted.
    """
    count, counts = len(images), []
    marks: list[list[bool] | None] = [None]
    columns, titles, others = [shown(images)], ["image"], bank[count:]
    if len(others) < k:
        raise Stop(f"--neighbours must be at most {len(others)}, the other images, got {k}: give more, or a smaller --count")
    for model in models:
        features = torch.cat([model.vit(model.prepare(part)) for part in bank.split(64)])
        cosines, rows = (x.cpu() for x in nearest(features[:count], features[count:], k))
        right = labels[count:][rows] == labels[:count, None]
        counts.append(f"{_short(model.name)} {int(right.sum())} of {right.numel()}")
        for rank in range(k):
            columns.append(shown(others[rows[:, rank].to(others.device)]))
            low, high = cosines[:, rank].min(), cosines[:, rank].max()
            titles.append(f"{_short(model.name)}\nneighbour {rank + 1}\ncosine\n{low:.2f} to {high:.2f}")
            marks.append(right[:, rank].tolist())
    if (labels < 0).any():
        return {"columns": columns, "titles": titles}
    note = f"Tick: a neighbour of the image's own class; cross: of another class. Of the own class: {', '.join(counts)}."
    return {"columns": columns, "titles": titles, "marks": marks, "note": note}


@torch.no_grad()
def write_shares(folder: Path, models: Sequence[Model], bank: Tensor, labels: Tensor) -> None:
    """Write and draw which share of the variance of each model's features goes with properties of the images."""
    groups = properties(bank, labels)
    found: dict[str, dict[str, float]] = {}
    for model in models:
        features = torch.cat([model.vit(model.prepare(part)) for part in bank.split(64)])
        found[model.name] = {name: variance_explained(features, group) for name, group in groups.items()}
    with plot(folder / "shares.png", figsize=(2 + 1.5 * len(groups), 3.5)) as (_, axes):
        axis, width = axes[0, 0], 0.8 / len(models)
        for place, (name, shares) in enumerate(found.items()):
            bars = axis.bar([x + place * width for x in range(len(shares))], shares.values(), width, label=_short(name))
            axis.bar_label(bars, fmt="{:.0%}", fontsize=9)
        axis.set_xticks([x + (0.8 - width) / 2 for x in range(len(groups))], list(groups))
        axis.set(ylabel="share of the features' variance", ylim=(0, 1), title=f"{len(bank)} images")
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.legend()
    write_json(folder / "shares.json", {"images": len(bank), "shares": found})
    print(f"{folder / 'shares'}.png and .json")


def draw_reconstructions(runs: Sequence[tuple[Model, mvmae.MultiViewMAE]], images: Tensor, seed: int) -> Sheet:
    """Draw image, mask, and the masked patches as each run rebuilds them, all with the same masks."""
    columns, titles = [shown(images)], ["image", "visible patches"]
    for model, mae in runs:
        generator = torch.Generator().manual_seed(seed)
        rebuilt, masked = reconstruct(mae, model.prepare(images)[:, None], generator=generator)
        rebuilt = to_unit_range(rebuilt, model.mean, model.std)
        columns += [torch.where(masked, GREY, shown(images))] if len(columns) == 1 else []
        columns += [torch.where(masked, rebuilt, shown(images))]
        titles += [f"{_short(model.name)}\nrebuilt, {len(mae.decoder.blocks)} decoder blocks"]
    return {"columns": columns, "titles": titles, "note": _note(runs)}


def _note(runs: Sequence[tuple[Model, mvmae.MultiViewMAE]]) -> str:
    """Return a note on what the pictures of these runs leave out of the predictions; one for each run where they differ."""
    notes = {_short(model.name): reconstruction_note(mae) for model, mae in runs}
    same = len(set(notes.values())) == 1
    return next(iter(notes.values())) if same else "\n".join(f"{name}: {note}" for name, note in notes.items())


def draw_method(model: Model, mae: mvmae.MultiViewMAE, source: ImageSource, count: int, seed: int, background: str) -> Sheet:
    """Draw, for each image, its two views, what the encoder sees of them, and what the decoder makes of that."""
    size = mae.encoder.patch_embed.img_size
    pixels: dict[str, Any] = {"in_chans": len(model.mean), "background": background}
    generator = torch.Generator().manual_seed(seed)
    views, _ = take(source, count, partial(mvmae.MultiViewTransform(size, **pixels), generator=generator), seed)
    whole, _ = take(source, count, mvmae.CentreCropTransform(size, crop=1.0, **pixels), seed)
    rebuilt, masked = (x.cpu() for x in reconstruct(mae, model.prepare(views), generator=generator))
    rebuilt = to_unit_range(rebuilt, model.mean, model.std)
    first, second = (slice(view, None, 2) for view in range(2))
    flat = shown(views.flatten(0, 1))
    seen, pasted = torch.where(masked, GREY, flat), torch.where(masked, rebuilt, flat)
    columns = [shown(whole), flat[first], seen[first], pasted[first], flat[second], seen[second], pasted[second]]
    titles = ["image", "first view", "the encoder sees", "rebuilt", "second view", "the encoder sees", "rebuilt"]
    return {"columns": columns, "titles": titles, "note": reconstruction_note(mae)}


def _short(name: str) -> str:
    """Shorten a name so that it fits over a picture."""
    shown = ("random:" if name.startswith("random:") else "") + Path(name.removeprefix("random:")).name
    return shown if len(shown) <= 24 else shown[:21] + "..."


def write(folder: Path, kind: str, sheet: Sheet) -> None:
    """Write the grid, and every tile as a file of its own."""
    contact_sheet(**sheet).save(folder / f"{kind}.png")
    single = folder / kind
    single.mkdir(exist_ok=True)
    for number, column in enumerate(sheet["columns"]):
        for row, image in enumerate(column):
            to_pillow(image).save(single / f"{row}-{number}.png")
    print(f"{folder / kind}.png and its tiles in {single}")


def main(config: Config) -> None:
    """Draw the requested pictures."""
    config = with_background(config, config.models[0], config.arch)
    device, folder = start_processes(config.device).device, Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source = named_images(config.data)
    models = [load(config, name, device) for name in config.models]
    size, chans = models[0].vit.patch_embed.img_size, models[0].vit.patch_embed.proj.in_channels
    if any((model.vit.patch_embed.img_size, model.vit.patch_embed.proj.in_channels) != (size, chans) for model in models):
        raise Stop("all models must take images of the same size and channels: give --image-size, or draw them one by one")
    pixels: dict[str, Any] = {"in_chans": chans, "background": config.background}
    bank, labels = take(source, config.bank, mvmae.CentreCropTransform(size, **pixels), config.seed)
    bank = bank.to(device)
    order = spread(bank, labels)
    drawn, drawn_labels = bank[order.to(device)], labels[order]
    images = drawn[: config.count]
    ways: dict[str, Any] = {"attention": partial(draw_attention, models), "pca": partial(draw_pca, models)}
    ways["neighbours"] = partial(draw_neighbours, models, bank=drawn, k=config.neighbours, labels=drawn_labels)
    for kind, way in ways.items():
        if kind in config.draw:
            write(folder, kind, way(images))
    if "shares" in config.draw:
        write_shares(folder, models, bank, labels)
    rebuilding = [kind for kind in ("reconstructions", "method") if kind in config.draw]
    runs = [(model, pretrained(model.name).to(device)) for model in models if is_run(model.name)] if rebuilding else []
    if rebuilding and not runs:
        print(f"no {' and no '.join(rebuilding)}: none of the models is a run of pretrain.py or adapt.py, with its decoder")
        return
    if "reconstructions" in rebuilding:
        write(folder, "reconstructions", draw_reconstructions(runs, images, config.seed))
    if "method" in rebuilding:
        write(folder, "method", draw_method(*runs[0], source, config.count, config.seed, config.background))


def is_run(name: str) -> bool:
    """Return whether a name is the folder of a run of pretrain.py or adapt.py, whose model has a decoder."""
    return (Path(name) / "encoder" / "pretraining").is_dir()


def pretrained(name: str) -> mvmae.MultiViewMAE:
    """Load the whole pretraining model of a run."""
    return mvmae.MultiViewMAE.from_pretrained(Path(name) / "encoder")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
