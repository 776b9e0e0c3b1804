r"""Measure the frozen features of models on labelled images: linear probe, k-NN, few labels (Section 4.1.3, Table 2).

  python examples/linear_probe.py --preset quick --data sample --models runs/quick random:runs/quick
      takes under a minute on two CPU cores; prints a table with a line for each model
  torchrun --nproc-per-node 8 examples/linear_probe.py --data path/to/imagenet --models runs/paper \
    --output-dir runs/paper-probe
      the paper's run: 100 epochs of a linear layer on ViT-B/16, estimated at 4 to 7 hours of one H100 (not measured); the paper
      reports 76.7 % after 1600 epochs of pretraining
  python examples/linear_probe.py --cached --data path/to/imagenet --models vit_base_patch16_224.mae
      extracts features once, from centre crops instead of random ones: minutes instead of hours

Any timm model can be measured. For each learning rate of --sweep, one linear layer is trained on the mean patch token and one
on the class token, all at once on the same features. In the table, "linear" is the layer on the mean patch token with the
recipe's own learning rate. "best on val" is the layer with the highest accuracy on the validation images: because it is chosen
on them, its accuracy is optimistic.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.cli import inherit, option, run
from engine.config import RunConfig
from engine.distributed import Processes, autocast, parallel, start_processes, to_device
from engine.ends import StopSignal
from engine.optim import cosine_schedule
from engine.run import Run
from mvmae.data import StepSampler
from mvmae.weights import write_json, write_text
from tasks import labelled
from tasks.backbones import load_backbone, summary
from tasks.inputs import names
from tasks.labelled import LabelledConfig, Seeded
from tasks.monitor import extract
from tasks.plots import draw_curves
from tasks.probe import DRAWS, Features, Probe, freeze, head_optimizer, measure, pooled, table
from tasks.splits import Labelled, open_labelled
from tasks.starting import starting_weights, with_background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelledConfig):
    models: tuple[str, ...] = option(
        dataclasses.MISSING,
        "models to measure: timm names, hf-hub:ID, folders of runs or exports, files of weights; random:NAME is untrained",
        path=True,
        may_change=True,
        section="Model",
    )
    output_dir: str = inherit(
        RunConfig, "output_dir", "runs/linear-probe", "folder for the results, with one folder for each model"
    )
    background: str = option(
        "", "colour behind transparent pixels, a name or #RRGGBB", empty="each model's own, else white", section="Data"
    )
    cached: bool = option(
        False, "extract features of centre crops once and train on them; --no-cached: new random crops in each epoch"
    )
    epochs: int = option(100, "number of passes over the images (paper)", at_least=1, section="Optimization")
    warmup_epochs: float = option(0, "epochs of linear warm-up of the learning rate (MoCo v3)", at_least=0)
    batch_size: int = option(1024, "number of images per step, over all processes (paper)", at_least=1)
    base_lr: float = option(3.0, "learning rate for a batch of 256; it is scaled with the batch (MoCo v3)", at_least=0)
    sweep: tuple[float, ...] = option(
        (0.1, 0.3, 1.0, 3.0, 10.0),
        "multiples of the learning rate, for each of which one more linear layer is trained",
        above=0,
    )
    optimizer: str = option(
        "sgd", "optimizer, with momentum 0.9 and without weight decay; sgd: MoCo v3, lars: MAE", ["sgd", "lars"]
    )
    batch_norm: bool = option(
        False, "normalise each feature over the batch before the linear layer, as MAE does", section="Model"
    )
    head_std: float = option(0.01, "standard deviation of the linear layer's initial weights (MoCo v3 and MAE)", above=0)
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0),
        "share of the image's area that a random crop covers (MoCo v3 and MAE)",
        above=0,
        at_most=1,
        lengths=(2,),
        section="Data",
    )
    neighbours: int = option(
        20, "number of neighbours of the k-NN classifier; 0: no k-NN (DINO)", at_least=0, section="Evaluation"
    )
    few_shot: tuple[int, ...] = option(
        (1, 2, 5), "numbers of labelled images per class for classifiers on few labels; 0: no such classifier", at_least=0
    )
    seed: int = inherit(RunConfig, "seed", 0, "seed of the random numbers: weights, order of images, crops")
    precision: str = inherit(
        RunConfig, "precision", "auto", "precision of the models measured; auto: bf16 on CUDA, float32 on a CPU"
    )
    save_every: int = inherit(RunConfig, "save_every", 1000)
    log_every: int = inherit(RunConfig, "log_every", 50)


PRESETS: dict[str, dict[str, Any]] = {
    "mocov3": {"help": "MoCo v3's recipe, which the paper follows: 100 epochs of SGD"},
    "mae": {
        "help": "MAE's recipe: LARS and batch normalisation",
        "warmup_epochs": 10,
        "base_lr": 0.1,
        "optimizer": "lars",
        "batch_norm": True,
    },
    "quick": {
        "help": "features extracted once, from centre crops: a minute on two CPU cores for --data sample",
        "output_dir": "runs/quick-probe",
        "cached": True,
        "batch_size": 128,
        "workers": 0,
    },
}
PAPER = {"vit_base_patch16_224.mae": 68.0, "vit_base_patch16_224.dino": 78.2, "mvmae_vit_base_patch16.in1k": 76.7}  # Table 2
IMAGENET = (1_281_167, 50_000, 1000)
Step = tuple[Features, Tensor, Callable[[], list[str]]]
"""Features and labels of a batch, and what names its images."""


def build_probe(config: Config, widths: Mapping[str, int], num_classes: int) -> Probe:
    """Build the linear layers: the recipe's first, then those of the sweep."""
    multiples = tuple(dict.fromkeys((1.0, *config.sweep)))
    return Probe(widths, num_classes, multiples=multiples, batch_norm=config.batch_norm, std=config.head_std)


def build_optimizer(config: Config, probe: Probe) -> torch.optim.Optimizer:
    """Build the optimizer of the recipe, with a learning rate for each head."""
    return head_optimizer(probe, config.optimizer, lr=config.base_lr * config.batch_size / 256)


def batches(
    config: Config,
    model: nn.Module,
    sampler: StepSampler,
    data: Labelled,
    cached: tuple[Features, Tensor] | None,
    processes: Processes,
) -> Iterator[Step]:
    """Give features and labels of each step: of random crops, or out of the ones that were extracted."""
    if cached is not None:
        for keys in sampler:
            rows = torch.tensor([index for _, index in keys], device=cached[1].device)
            yield {kind: values[rows] for kind, values in cached[0].items()}, cached[1][rows], partial(numbers, rows)
        return
    options: dict[str, Any] = {"is_training": True, "scale": config.crop_scale, "color_jitter": None}
    transform = Seeded(model, config.image_size, background=config.background, **options)
    labels = torch.as_tensor(data.train.labels)
    for batch in labelled.training_loader(data.train, transform, sampler, workers=config.workers, max_bad=config.max_bad):
        with torch.no_grad(), autocast(config.precision, processes.device):
            features = pooled(model, to_device(batch.views, processes.device))
        yield features, labels[batch.indices].to(processes.device), partial(names, data.train, batch.indices)


def numbers(rows: Tensor) -> list[str]:
    """Give the numbers of a batch's images among all that could be read."""
    return [f"number {row} of the images that can be read" for row in rows.tolist()]


@torch.no_grad()
def evaluate(probe: Probe, features: Features, labels: Tensor) -> dict[str, dict[str, float]]:
    """Give the accuracy of every head in percent."""
    probe.eval()
    counts: dict[str, Tensor] = {}
    for rows in torch.arange(len(labels), device=labels.device).split(1024):
        for name, logits in probe({kind: values[rows] for kind, values in features.items()}).items():
            counts[name] = counts.get(name, 0) + labelled.count_right(logits, labels[rows])
    probe.train()
    return {name: labelled.accuracy(total) for name, total in counts.items()}


def average_statistics(probe: Probe, processes: Processes) -> None:
    """Give all processes the same running statistics."""
    for buffer in probe.buffers():
        if buffer.is_floating_point():
            buffer.copy_(processes.mean(buffer))


def probe_model(config: Config, name: str, data: Labelled, processes: Processes, stop: StopSignal) -> dict[str, Any]:
    """Measure one model, in a folder of its own, and give its results."""
    config = with_background(config, name, config.arch)
    folder, start = Path(config.output_dir) / re.sub(r"[^\w.-]+", "-", name).strip("-."), time.monotonic()
    run = Run(config, processes, [data.train.fingerprint, data.val.fingerprint], folder, stop, model=name)
    torch.manual_seed(config.seed)
    stop.interruptible = True  # a signal may cut the extraction of features
    model = freeze(load_backbone(name, arch=config.arch, image_size=config.image_size)).to(processes.device)
    transform = Seeded(model, config.image_size, background=config.background)
    loading = {"batch_size": config.batch_size, "workers": config.workers, "max_bad": config.max_bad}

    def encode(images: Tensor) -> Features:
        with autocast(config.precision, processes.device):
            return pooled(model, images)

    train_set, val = (extract(encode, part, transform, processes, **loading) for part in (data.train, data.val))
    results = measure(train_set, val, neighbours=config.neighbours, few_shot=config.few_shot)
    torch.manual_seed(config.seed)  # again: loading images draws from the same generator
    length = len(train_set[1]) if config.cached else len(data.train)
    config, clamped = labelled.clamp_batch(config, length, processes.world_size)
    probe = build_probe(config, {kind: x.shape[1] for kind, x in val[0].items()}, len(data.class_names)).to(processes.device)
    optimizer = build_optimizer(config, probe)
    group = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = StepSampler(length, config.batch_size, seed=config.seed, **group)
    steps = config.epochs * sampler.steps_per_epoch
    sampler.num_steps = min(steps, config.max_steps or steps)
    schedule = cosine_schedule(optimizer, steps, round(config.warmup_epochs * sampler.steps_per_epoch))
    run.take_up(last=sampler.num_steps, model=probe, optimizer=optimizer)
    sampler.start_step = run.step
    course = f"{steps} steps of {config.batch_size} on {processes.device}{clamped}"
    run.announce(model=summary(model, config.image_size, name), images=data.note, training=course)
    with run:
        trained, per_epoch = parallel(probe.train(), processes), sampler.steps_per_epoch
        features = batches(config, model, sampler, data, train_set if config.cached else None, processes)
        for step, (inputs, labels, images) in run.batches(features):
            schedule.step_update(step - 1)
            outputs = trained(inputs).values()  # of each head: (B, classes)
            losses = torch.stack([nn.functional.cross_entropy(logits, labels) for logits in outputs])
            losses.sum().backward()  # each head is trained as if it were alone
            if run.finite(step, {"loss": losses[0]}, images):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.report(step, epoch=round(step / per_epoch, 3), lr=optimizer.param_groups[0]["lr"])
            if step % max(per_epoch, config.log_every) == 0 or step == sampler.num_steps:
                average_statistics(probe, processes)
                scores = evaluate(probe, *val)
                best = max(score["top1"] for score in scores.values())
                run.log.write(step=step, linear=scores["avg_0"]["top1"], best=best)
            run.checkpoint(step)
    scores = evaluate(probe, *val)
    chosen = max(scores, key=lambda head: scores[head]["top1"])
    kind, _, number = chosen.rpartition("_")
    results |= {"linear": scores["avg_0"]["top1"], "linear_top5": scores["avg_0"]["top5"], "best": scores[chosen]["top1"]}
    choice = {"best_feature": kind, "best_multiple": probe.multiples[int(number)]}
    about = {"model": name, "data": config.data, "note": data.note, "epochs": config.epochs, "seed": config.seed}
    about |= {"started_from": starting_weights(model, name, config.arch)}
    about |= {"paper": paper_number(config, name, data), **results, **choice, "seconds": round(time.monotonic() - start, 1)}
    if processes.rank == 0:
        write_json(folder / "results.json", about)
        draw_curves(folder / "curves.png", run.log.records(), ("loss", "lr", "linear", "best"))
    run.log.end()
    return about


def paper_number(config: Config, name: str, data: Labelled) -> float | None:
    """Give the accuracy of Table 2, where model, images and recipe are the paper's; None elsewhere."""
    recipe = Config(data=config.data, models=config.models)
    same = ("cached", "epochs", "warmup_epochs", "batch_size", "base_lr", "optimizer", "batch_norm", "crop_scale", "max_steps")
    if any(getattr(config, field) != getattr(recipe, field) for field in same) or config.image_size not in (0, 224):
        return None
    return PAPER.get(name) if (len(data.train), len(data.val), len(data.class_names)) == IMAGENET else None


def main(config: Config) -> None:
    """Measure every model, then write and print the table."""
    processes, folder, stop = start_processes(config.device), Path(config.output_dir), StopSignal()
    data = open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
    results = [probe_model(config, name, data, processes, stop) for name in config.models]
    if processes.rank == 0:
        text = table(results)
        write_json(folder / "results.json", results)
        write_text(folder / "results.md", text + "\n")
        spread = f"; ±: standard deviation over {DRAWS} draws of the labelled images" if "±" in text else ""
        print(f"accuracy in percent; {data.note}{spread}\n\n{text}\n\nsee {folder}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
