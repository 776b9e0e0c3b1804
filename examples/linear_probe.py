r"""Measure the frozen features of models on labelled images: linear probe, k-NN, few labels (Section 4.1.3, Table 2).

  python examples/linear_probe.py --preset quick --data sample --models runs/quick random:runs/quick
      takes under a minute on two CPU cores; prints a table with a line for each model
  torchrun --nproc-per-node 8 examples/linear_probe.py --data path/to/imagenet --models runs/paper \
    --output-dir runs/paper-probe
      the paper's run: 100 epochs of a linear layer on ViT-B/16, estimated at 4 to 7 hours of one H100 (not measured); the paper
      reports 76.7 % after 1600 epochs of pretraining
  python examples/linear_probe.py --cached --data path/to/imagenet --models vit_base_patch16_224.mae
      extracts features once, from centre crops instead of random ones: minutes instead of hours

Any timm model can be measured. One linear layer is trained with the recipe's learning rate ("linear" in the table), and one
more for each multiple of it in --sweep, all at once on the same features. "best on val" is the layer with the highest accuracy
on the validation images: because it is chosen on them, its accuracy is optimistic.
"""

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.distributed import Ranks, autocast, parallel, start_ranks, to_device
from engine.log import Log
from engine.optim import cosine, describe_warmup, set_learning_rate, warmup_steps
from engine.options import REQUIRED, RunConfig, changeable, option, redefine, run
from engine.signals import Signals
from mvmae.data import EvalTransform, StepSampler
from mvmae.weights import write_json, write_text
from tasks.features import POOLS, Pooled, extract
from tasks.inputs import describe_inputs, resolve_inputs
from tasks.labelled import LabelledConfig, TrainTransform, accuracy, clamp_batch, rounded, training_loader
from tasks.models import load_backbone, starting_weights, summary
from tasks.plots import draw_curves
from tasks.probe import DRAWS, Probe, measure, probe_optimizer, table
from tasks.splits import Labelled, open_labelled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelledConfig):
    models: tuple[str, ...] = option(
        REQUIRED,
        "models to measure: timm names, hf-hub:ID, folders of runs or exports, files of weights; random:NAME is untrained",
        path=True,
        may_change=True,
        section="Model",
    )
    pool: str = option("avg", "feature; avg: mean patch token, token: class token, model: what timm pools", POOLS)
    batch_norm: bool = option(False, "normalise each feature over the batch before the linear layer, as MAE does")
    cached: bool = option(
        False,
        "extract features of centre crops once and train on them; --no-cached: new random crops in each epoch",
        section="Data",
    )
    output_dir: str = redefine(RunConfig, "output_dir", "runs/linear-probe", "folder of the results, with one for each model")
    save_every: int = redefine(RunConfig, "save_every", 1000)
    log_every: int = redefine(RunConfig, "log_every", 50)
    epochs: int = option(100, "number of passes over the images (paper)", at_least=1, section="Length")
    warmup_epochs: float | None = option(
        None, "epochs of linear warm-up; if not given none (MoCo v3), --preset mae 10 % of the run", at_least=0
    )
    batch_size: int = option(1024, "number of images per step, over all processes (paper)", at_least=1, section="Optimizer")
    optimizer: str = option("sgd", "optimizer, with momentum 0.9, no weight decay; sgd: MoCo v3, lars: MAE", ["sgd", "lars"])
    base_lr: float = option(3.0, "learning rate for a batch of 256; it is scaled with the batch (MoCo v3)", at_least=0)
    sweep: tuple[float, ...] = option(
        (0.1, 0.3, 1.0, 3.0, 10.0),
        "multiples of the learning rate, for each of which one more linear layer is trained",
        above=0,
    )
    few_shot: tuple[int, ...] = option(
        (1, 2, 5), "labels per class, of one more classifier for each number; 0: none", at_least=0, section="Evaluation"
    )
    warmup: float = 0.0  # share of the run, where --warmup-epochs is not given


PRESETS: dict[str, dict[str, Any]] = {
    "mocov3": {"help": "MoCo v3's recipe, which the paper follows: 100 epochs of SGD"},
    "mae": {
        "help": "MAE's recipe: LARS and batch normalisation",
        "warmup": 0.1,
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


def probe_model(config: Config, name: str, data: Labelled, ranks: Ranks, signals: Signals) -> dict[str, Any]:
    """Measure one model, in a folder of its own, and return its results."""
    start = time.monotonic()
    torch.manual_seed(config.seed)
    model = load_backbone(name, arch=config.arch, image_size=config.image_size).to(ranks.device)
    encoder = Pooled(model, config.pool).eval().requires_grad_(False)  # no dropout, no statistics that move
    inputs = resolve_inputs(config, model, data.train, config.image_size)
    centre = EvalTransform(model)

    folder = Path(config.output_dir) / re.sub(r"[^\w.-]+", "-", name).strip("-.")
    settings = {**dataclasses.asdict(config), "model": name, "images": [data.train.fingerprint, data.val.fingerprint]}
    checkpoint = Checkpoint(folder, settings, ranks, may_change=changeable(Config), resume=config.resume)
    loading = {"batch_size": min(config.batch_size, 256), "workers": config.workers, "max_bad": config.max_bad}
    with signals.interruptible(), autocast(config.precision, ranks.device):  # nothing is saved before the features are there
        train, val = (extract(encoder, part, centre, ranks, **loading) for part in (data.train, data.val))
    results = measure(train, val, few_shot=config.few_shot)

    length = len(train[1]) if config.cached else len(data.train)
    config, clamped = clamp_batch(config, length, ranks.world_size)
    sampler = StepSampler(length, config.batch_size, seed=config.seed, rank=ranks.rank, world_size=ranks.world_size)
    per_epoch = sampler.steps_per_epoch
    steps = config.epochs * per_epoch
    warmup = warmup_steps(config, steps, per_epoch)
    last, lr = min(steps, config.max_steps or steps), config.base_lr * config.batch_size / 256
    sampler.num_steps, sampler.start_step = last, checkpoint.step

    def batches() -> Iterator[tuple[Tensor, Tensor, Iterable[str]]]:
        """Yield features (B, D), labels (B,) and names of each step's images."""
        if config.cached:
            for keys in sampler:
                rows = torch.tensor([index for _, index in keys], device=ranks.device)
                yield train[0][rows], train[1][rows], (f"readable image {row}" for row in rows.tolist())
            return
        crops, labels = TrainTransform(model), torch.as_tensor(data.train.labels)
        options: dict[str, Any] = {"workers": config.workers, "max_bad": config.max_bad, "folder": folder}
        for batch in training_loader(data.train, crops, sampler, **options):
            with torch.no_grad(), autocast(config.precision, ranks.device):
                features = encoder.forward_head(encoder.forward_features(to_device(batch.views, ranks.device)))
            yield features.float(), labels[batch.indices].to(ranks.device), (data.train.name(int(i)) for i in batch.indices)

    torch.manual_seed(config.seed)  # again: loading images draws from the same generator
    probe = Probe(train[0].shape[1], len(data.class_names), multiples=config.sweep, batch_norm=config.batch_norm)
    probe.to(ranks.device)
    optimizer = probe_optimizer(probe, config.optimizer)
    log = Log(folder, ranks, last, checkpoint.step, config.batch_size)
    checkpoint.restore(log, signals, model=probe, optimizer=optimizer)
    if ranks.rank == 0:
        log.trackers.start(config.tracker, folder, settings, checkpoint.step, log.say)
    log.say(f"model  {summary(model, name=name)}\ninputs  {describe_inputs(config, inputs)}\nimages  {data.note}")
    log.say(f"training  {steps} steps of {config.batch_size} on {ranks.device}{clamped}; {describe_warmup(warmup, steps)}")

    @torch.no_grad()
    def evaluate() -> list[dict[str, float]]:
        """Return the accuracy of every head on the validation images."""
        for buffer in probe.buffers():
            if buffer.is_floating_point():
                buffer.copy_(ranks.mean(buffer))  # running statistics, which the ranks have of their own images
        found = [accuracy(logits, val[1]) for logits in probe.eval()(val[0])]
        probe.train()
        return found

    trained = parallel(probe.train(), ranks)
    with checkpoint.saved_on_error():
        for step, (features, labels, images) in enumerate(log.timed(signals.batches(batches())), checkpoint.step + 1):
            set_learning_rate(optimizer, lr * cosine(step, steps, warmup))
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in trained(features)])
            losses.sum().backward()  # each head is trained as if it were alone
            checkpoint.require_finite(step, {"loss": losses[0]}, images)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add({"loss": losses[0].detach()})
            if step % config.log_every == 0 or step == last:
                log.write_step(step, epoch=round(step / per_epoch, 3), lr=optimizer.param_groups[0]["lr"])
            if step % max(per_epoch, config.log_every) == 0 or step == last:
                top1 = [score["top1"] for score in evaluate()]
                log.write(step=step, linear=top1[0], best=max(top1))
            checkpoint.advance(step, last, config.save_every)

    scores = evaluate()
    best = max(range(len(scores)), key=lambda head: scores[head]["top1"])
    results |= {"linear": scores[0]["top1"], "linear_top5": scores[0]["top5"], "best": scores[best]["top1"]}
    multiple = probe.multiples[best]
    results = {**rounded(results), "best_multiple": multiple, "seconds": round(time.monotonic() - start, 1)}
    for end, word in ((min(probe.multiples), "lower"), (max(probe.multiples), "higher")):
        if multiple == end and len(probe.multiples) > 1:
            log.say(f"best on val is at {multiple:g} times the learning rate, an end of --sweep: add {word} ones")
    about = {"model": name, "data": config.data, "note": data.note, "epochs": config.epochs, "seed": config.seed}
    about |= {"pool": config.pool, "started_from": starting_weights(model, name, config.arch), **results}
    if ranks.rank == 0:
        write_json(folder / "results.json", about)
        draw_curves(folder / "curves.png", log.records(), ("loss", "lr", "linear", "best"))
    log.close()
    return about


def main(config: Config) -> None:
    """Measure every model, then write and print the table."""
    ranks, folder, signals = start_ranks(config.device), Path(config.output_dir), Signals()
    data = open_labelled(config.data, train_images=config.train_images, val_images=config.val_images)
    for name in config.models[1:]:  # one that cannot be loaded is told before the first is measured
        load_backbone(name, arch=config.arch, image_size=config.image_size)
    results = [probe_model(config, name, data, ranks, signals) for name in config.models]
    if ranks.rank == 0:
        text = table(results)
        write_json(folder / "results.json", results)
        write_text(folder / "results.md", text + "\n")
        spread = f"; ±: standard deviation over {DRAWS} draws of the labelled images" if "±" in text else ""
        print(f"accuracy in percent; {data.note}{spread}\n\n{text}\n\nsee {folder}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
