r"""Write the features of all images of a folder, list, archive or data set to one file.

  python examples/embed.py --data path/to/images --model vit_small_patch14_dinov2.lvd142m
      writes a row for each image to runs/features/features.npy (N x D, float32), and its name to names.txt; prints their
      number, and images per second
  torchrun --nproc-per-node 8 examples/embed.py --data path/to/images --model runs/paper \
    --format parquet
      on eight devices (not tried), to features.parquet: columns name, features, and label where the images have labels
  python examples/embed.py --data sample --model random:mvmae_vit_tiny_patch16 --image-size 48
      takes half a minute on two CPU cores; random weights

A feature is what timm pools for a classifier, model.forward_head(model.forward_features(image), pre_logits=True), of the image
as timm's own transform for evaluation prepares it. For the encoders of this package it is the mean patch token. In Python:
mvmae.embed(model, source). The cost is one forward pass for each image; reading and decoding may take longer than that: use
--workers. An image that cannot be read has a row of NaN and a line in bad_files.txt.
"""

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from engine import locks
from engine.checkpoint import check_same
from engine.cli import changeable, inherit, option, run
from engine.config import RunConfig
from engine.distributed import Processes, autocast, start_processes
from engine.ends import Stop, StopSignal
from engine.log import Output, printable
from mvmae.data import EvalTransform, ImageSource, embed_rows, split_rows
from mvmae.data.features import Rows
from mvmae.weights import read_json, write_json
from tasks import method
from tasks.backbones import load_backbone, summary
from tasks.feature_files import Parts, delete_parts, read_part, read_parts, write_array, write_bad, write_part, write_table
from tasks.labelled import LabelledConfig
from tasks.probe import freeze
from tasks.splits import named_images
from tasks.starting import with_background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    data: str = inherit(method.Config, "data", dataclasses.MISSING)
    split: str = option("train", "split of the images, where they have splits", ["train", "val"])
    image_size: int = option(0, "side of an image in pixels; 0: the model's own", at_least=0)
    background: str = option("", "colour behind transparent pixels, a name or #RRGGBB", empty="the model's own, else white")
    max_bad: int = inherit(
        LabelledConfig, "max_bad", 100, "number of unreadable images to tolerate, whose rows are NaN; one more stops the run"
    )
    model: str = option(
        dataclasses.MISSING,
        "timm name, hf-hub:ID, folder of a run or an export, or file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = option("", "timm name of the model, if a file of weights has no config.json beside it", empty="none")
    output_dir: str = inherit(RunConfig, "output_dir", "runs/features", "folder for the features")
    format: str = option(
        "npy",
        "npy: features.npy and names.txt; parquet: one table, with labels if there are any",
        ["npy", "parquet"],
        section="Run",
    )
    resume: bool = inherit(
        RunConfig, "resume", False, "compute only what the output folder lacks; --no-resume: refuse a folder with features"
    )
    save_every: int = option(1024, "number of images after whose features they are saved", at_least=1, may_change=True)
    seed: int = inherit(RunConfig, "seed", 0, "seed of the random numbers: untrained weights")
    device: str = inherit(RunConfig, "device", "auto")
    precision: str = inherit(RunConfig, "precision", "float32", "precision of the model; auto: bf16 on CUDA, float32 on a CPU")
    batch_size: int = option(
        64, "number of images at a time, for each process", at_least=1, may_change=True, section="Speed and memory"
    )
    workers: int = inherit(RunConfig, "workers", 8, "processes that load images, for each process; 0: it loads them itself")


class Plan(NamedTuple):
    """Ranges of images whose features are not saved yet, and those of the whole file."""

    missing: list[range]
    parts: list[range]


def file_of(config: Config) -> Path:
    """Return the file of the features."""
    return Path(config.output_dir) / f"features.{config.format}"


def prepare(config: Config, source: ImageSource, processes: Processes) -> Plan:
    """Take the output folder, and find what it lacks; the first process does, and tells the others.

    Raises:
        Stop: in all processes, if the folder is in use, cannot be written to, or holds features of another kind.
    """
    plan, problem = None, ""
    if processes.rank == 0:
        try:
            plan = find_missing(config, source, processes.world_size)
        except (Stop, ValueError, OSError) as error:
            problem = str(error)
    found: tuple[Plan | None, str] = processes.gather((plan, problem))[0]
    if found[0] is None:
        raise Stop(found[1])
    return found[0]


def find_missing(config: Config, source: ImageSource, world_size: int) -> Plan:
    """Compare the output folder with the options, and find the parts that it lacks."""
    folder, free = Path(config.output_dir), changeable(Config)
    settings = {**dataclasses.asdict(config), "content of the images": source.fingerprint}
    settings["part"] = min(config.save_every, -(-len(source) // world_size))
    locks.take(folder)
    described = folder / "config.json"
    if file_of(config).exists() and not described.exists():
        raise Stop(f"{file_of(config)} is of another program: choose another --output-dir")
    if described.exists():
        if not config.resume:
            raise Stop(f"{folder} holds features already: add --resume to complete them, or choose another --output-dir")
        stored = read_json(described)
        check_same(stored, settings, free | {"part"})
        settings["part"] = stored["part"]
    write_json(described, settings)
    parts = split_rows(range(len(source)), settings["part"])
    if file_of(config).exists():
        return Plan([], parts)
    missing = [rows for rows in parts if read_part(folder, rows) is None]
    if len(missing) < len(parts):
        print(f"resuming {folder}: {len(source) - sum(map(len, missing))} of {len(source)} images are done", flush=True)
    return Plan(missing, parts)


def watched(config: Config, source: ImageSource, batches: Iterable[Rows], total: int, stop: StopSignal) -> Iterator[Rows]:
    """Yield the batches with a bar on a terminal, until a signal ends the run or too many images cannot be read."""
    from tqdm import tqdm

    stream, bad = getattr(sys.stderr, "stream", sys.stderr), 0
    silent = os.environ.get("RANK", "0") != "0" or stream is None or not stream.isatty()
    with tqdm(total=total, unit="image", dynamic_ncols=True, leave=False, disable=silent, file=Output(stream, raw=True)) as bar:
        for batch in batches:
            for row, reason in batch.bad.items():
                tqdm.write(printable(f"warning: {source.name(row)!r} cannot be read: {reason}; its row is NaN"), sys.stderr)
            bad += len(batch.bad)
            check_bad(config, bad)
            if stop.received:
                raise Stop("stopped: the parts that were saved stay; --resume continues", 128 + stop.received)
            yield batch
            bar.update(len(batch.rows))


def check_bad(config: Config, count: int) -> None:
    """End the run where more images than allowed cannot be read."""
    if count > config.max_bad:
        raise Stop(f"{count} images cannot be read, more than the {config.max_bad} that --max-bad allows", 1)


def compute(config: Config, model: nn.Module, source: ImageSource, plan: Plan, processes: Processes, stop: StopSignal) -> None:
    """Compute and save this process's share of the missing parts."""
    mine, size = plan.missing[processes.rank :: processes.world_size], len(plan.parts[0])
    batches = [batch for rows in mine for batch in split_rows(rows, config.batch_size)]
    if not batches:
        return
    transform = EvalTransform(model, config.image_size, config.background)
    found = embed_rows(model, source, batches, transform, num_workers=config.workers)
    of_part: list[Rows] = []
    with autocast(config.precision, processes.device):
        for batch in watched(config, source, found, sum(map(len, mine)), stop):
            of_part.append(batch)
            rows = plan.parts[batch.rows[0] // size]
            if batch.rows[-1] == rows[-1]:
                bad = {row: reason for one in of_part for row, reason in one.bad.items()}
                write_part(Path(config.output_dir), rows, (np.concatenate([one.features for one in of_part]), bad))
                of_part = []


def join(config: Config, source: ImageSource, plan: Plan) -> str:
    """Write the features of all parts to one file, and return a line about it; then the parts are deleted."""
    folder, file, bad = Path(config.output_dir), file_of(config), dict[int, str]()

    def parts() -> Parts:
        for rows, (features, reasons) in read_parts(folder, plan.parts):
            bad.update(reasons)
            yield rows, features
        write_bad(folder, source, bad)
        check_bad(config, len(bad))
        if len(bad) == len(source):
            raise Stop(f"none of {len(source)} images can be read: {source.name(0)} is one of them", 1)

    width = (write_table if config.format == "parquet" else write_array)(file, source, parts())
    delete_parts(folder, plan.parts)
    told = f"; {len(bad)} cannot be read: rows of NaN, listed in {folder / 'bad_files.txt'}" if bad else ""
    return f"{len(source)} images, features of width {width} in {file}{told}"


def main(config: Config) -> None:
    """Compute the features that the output folder lacks, then write the file."""
    processes, stop = start_processes(config.device), StopSignal()
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise Stop('--format parquet needs pyarrow: pip install "mvmae[train]"')
    config = with_background(config, config.model, config.arch)
    source = named_images(config.data, config.split)
    torch.manual_seed(config.seed)
    model = freeze(load_backbone(config.model, arch=config.arch, image_size=config.image_size)).to(processes.device)
    plan = prepare(config, source, processes)
    if processes.rank == 0:
        print(f"{summary(model, config.image_size, config.model)}; {len(source)} images on {processes.device}", flush=True)
    stop.interruptible, start = False, time.monotonic()
    compute(config, model, source, plan, processes, stop)
    processes.gather(None)  # all parts are written
    seconds = time.monotonic() - start
    if processes.rank == 0 and file_of(config).exists():
        print(f"{file_of(config)} is complete")
    elif processes.rank == 0:
        print(f"{join(config, source, plan)}; {sum(map(len, plan.missing)) / seconds:.1f} images/s")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
