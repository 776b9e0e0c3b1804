r"""Write the features of all images of a folder, list, archive or data set to one file.

  python examples/embed.py --data path/to/images --model runs/paper
      writes a row for each image to runs/features/features.npy (N x D, float32), and its name to names.txt; prints their
      number, and images per second
  python examples/embed.py --data path/to/images \
    --model vit_small_patch14_dinov2.lvd142m --format parquet
      writes features.parquet: columns name, features, and label where the images have labels
  python examples/embed.py --data sample --model random:mvmae_vit_tiny_patch16 --image-size 48
      takes half a minute on two CPU cores; random weights

A feature is what timm pools for a classifier: for the encoders of this package the mean patch token, which --pool avg takes of
any transformer. Images are read as the model's config.json says, and prepared by timm's own transform for evaluation. In
Python: mvmae.embed(model, source). Reading and decoding may take longer than the forward pass: use --workers. Features are
saved in parts: however a run ended, --resume completes it. An image that cannot be read has a row of NaN and a line in
bad_files.txt.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint import changed_settings, lock
from engine.distributed import autocast, start_ranks
from engine.options import REQUIRED, RunConfig, changeable, option, redefine, run
from engine.signals import Signals, Stop
from mvmae.data import EvalTransform, embed_rows
from mvmae.weights import read_json, write_json, write_text
from tasks.feature_files import Features, Parts, fingerprint, one_line, write_array, write_table
from tasks.features import POOLS, Pooled
from tasks.inputs import InputOptions, describe_inputs, resolve_inputs
from tasks.labelled import LabelledConfig
from tasks.models import SHIPPED, load_backbone, summary
from tasks.splits import KINDS, named_images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    data: str = option(REQUIRED, f"images: a folder, a list of paths (.txt), {KINDS}", path=True, section="Data")
    split: str = option("train", "split of the images, where they have splits", ["train", "val"])
    image_size: tuple[int, ...] = redefine(LabelledConfig, "image_size", ())
    max_bad: int = redefine(LabelledConfig, "max_bad", 100, "number of unreadable images to tolerate; one more stops the run")
    model: str = option(
        SHIPPED,
        "timm name, hf-hub:ID, folder of a run or an export, or file of weights; random:NAME is untrained",
        path=True,
        section="Model",
    )
    arch: str = redefine(LabelledConfig, "arch", "")
    pool: str = option("model", "feature; model: what timm pools, avg: mean patch token, token: class token", POOLS)
    output_dir: str = redefine(RunConfig, "output_dir", "runs/features", "folder for the features")
    format: str = option(
        "npy",
        "npy: features.npy and names.txt; parquet: one table, with labels if there are any",
        ["npy", "parquet"],
        section="Run",
    )
    resume: bool = redefine(RunConfig, "resume", False, "compute only the parts that the output folder lacks")
    save_every: int = option(1024, "images between two saves", at_least=1)
    seed: int = redefine(RunConfig, "seed", 0, "seed of untrained weights")
    device: str = redefine(RunConfig, "device", "auto")
    precision: str = redefine(RunConfig, "precision", "float32")
    batch_size: int = option(64, "number of images at a time", at_least=1, may_change=True)
    workers: int = redefine(RunConfig, "workers", 8, "processes that load images; 0: this one; by default at most one a core")


def main(config: Config) -> None:
    """Compute the features that the output folder lacks, then write the file."""
    ranks, folder = start_ranks(config.device), Path(config.output_dir)
    if ranks.world_size > 1:
        raise Stop(
            "embed.py runs in one process: start it without torchrun, on several devices once for each part of the images"
        )
    if config.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise Stop('--format parquet needs pyarrow: pip install "mvmae[train]"')
    source = named_images(config.data, config.split)
    torch.manual_seed(config.seed)
    model = load_backbone(config.model, arch=config.arch, image_size=config.image_size).to(ranks.device)
    inputs = resolve_inputs(config, model, source, config.image_size)
    encoder = Pooled(model, config.pool).eval().requires_grad_(False)

    settings = {**dataclasses.asdict(config), "images": source.fingerprint, "weights": fingerprint(model)}
    settings = json.loads(json.dumps({**settings, "inputs": inputs.to_dict()}))  # as a resumed run reads them
    file, described, held = folder / f"features.{config.format}", folder / "config.json", lock(folder)
    if file.exists() and not described.exists():
        raise Stop(f"{file} is of another program: choose another --output-dir")
    if described.exists():
        if not config.resume:
            raise Stop(f"{folder} holds features already: add --resume to complete them, or choose another --output-dir")
        fingerprinted = {"data", "model", "arch"}
        changed_settings(read_json(described), settings, changeable(Config) | fingerprinted)
    write_json(described, settings)
    if file.exists():
        print(f"{file} is complete")
        return

    of = {name: settings[name] for name in ("images", "weights", "pool", "inputs", "precision")}
    parts, missing, bad = Parts(folder, str(of)), list[range](), dict[int, str]()
    ranges = cut(range(len(source)), config.save_every)
    for rows in ranges:
        if not parts.path(rows).exists():
            missing.append(rows)
            continue
        try:
            bad |= parts.read(rows)[1]
        except ValueError as error:
            print(f"warning: {error}: it is computed again", file=sys.stderr, flush=True)
            missing.append(rows)
    count = sum(map(len, missing))
    listed = "; ".join(filter(None, [f"{len(source)} images", source.splits, *source.problems]))
    print(f"{summary(model, name=config.model)}; {listed}; on {ranks.device}")
    print(f"inputs  {describe_inputs(config, inputs)}", flush=True)
    if count < len(source):
        print(f"resuming {folder}: {len(source) - count} of {len(source)} images are done", flush=True)

    signals, start = Signals(), time.monotonic()
    transform = EvalTransform(model)
    batches = [batch for rows in missing for batch in cut(rows, config.batch_size)]
    unfinished, features = list(missing), dict[int, Features]()
    unread = np.full(int(getattr(model, "head_hidden_size", None) or model.num_features), np.nan, np.float32)  # type: ignore[arg-type]
    with autocast(config.precision, ranks.device), tqdm(total=count, unit="image", leave=False, disable=None) as bar:
        found = embed_rows(encoder, source, batches, transform, num_workers=config.workers) if batches else ()
        for batch in signals.batches(found):
            for row, reason in batch.bad.items():
                print(f"warning: {source.name(row)!r} cannot be read: {reason}; its row is NaN", file=sys.stderr, flush=True)
            bad |= batch.bad
            if len(bad) > config.max_bad:
                raise Stop(f"{len(bad)} images cannot be read, more than the {config.max_bad} that --max-bad allows", 1)
            features |= dict(zip(batch.rows, batch.features.numpy(), strict=True))
            bar.update(len(batch.rows) + len(batch.bad))
            rows = unfinished[0]
            if rows[-1] in features or rows[-1] in bad:
                part = np.stack([features.get(row, unread) for row in rows])
                parts.write(unfinished.pop(0), part, {row: bad[row] for row in rows if row in bad})
                features = dict[int, Features]()
            if signals.received is not None:
                raise Stop("stopped: the parts that were saved stay; --resume continues", 128 + signals.received)
    if len(bad) == len(source):
        raise Stop(f"none of {len(source)} images can be read: {source.name(0)} is one of them", 1)

    if bad:
        lines = (f"{one_line(source.name(row))}\t{one_line(reason)}\n" for row, reason in sorted(bad.items()))
        write_text(folder / "bad_files.txt", "".join(lines))
    write = write_table if config.format == "parquet" else write_array
    write(file, source, ((rows, parts.read(rows)[0]) for rows in ranges))
    parts.delete()
    listed = f"; {len(bad)} cannot be read: rows of NaN, listed in {folder / 'bad_files.txt'}" if bad else ""
    speed = count / (time.monotonic() - start)
    print(f"{len(source)} images, features in {file}{listed}; {speed:.1f} images/s")
    held.release()


def cut(rows: range, size: int) -> list[range]:
    """Return consecutive parts of rows; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
