r"""Measure what each part of the method is worth: Tables 5 and 6 of the paper, and the choices that the paper leaves open.

  python examples/ablate.py --preset fashion --data torch/fashion_mnist:path/to/folder
      Table 6 on Fashion-MNIST with three seeds: pretraining, fine-tuning, probing; about 55 minutes on two CPU cores
  python examples/ablate.py --preset paper --data path/to/imagenet \
    --tables table6 mask_ratio loss_weight decoder_depth
      the paper's: 200 epochs of pretraining, 100 of fine-tuning for each of 16 variants; months on one GPU (not measured)
  python examples/ablate.py --preset fashion --data torch/fashion_mnist:path/to/folder \
    --tables contrast --output-dir runs/ablate-longer --pretrain "--preset quick --epochs 2 --workers 1 --eval-images 0"
      the worth of the contrastive loss when all variants train four times as long

Each variant is trained with pretrain.py and measured with finetune.py and linear_probe.py. All cost the same FLOPs: a variant
that costs half as much per image sees twice as many. Repeat the command to continue after an interruption, or with more seeds.
A folder that holds results of other options is refused. After each run the output folder holds the tables so far:
ablation.json, with every run, ablation.md and ablation.png.
"""

import dataclasses
import functools
import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch

import finetune
import linear_probe
import mvmae
import pretrain
from engine.checkpoint import changed_settings
from engine.distributed import Ranks, start_ranks
from engine.options import REQUIRED, changeable, option, parse, run
from engine.signals import SIGNALS, Stop
from mvmae.weights import write_json, write_text
from tasks.comparison import OURS, TABLES, Arm, compare, draw, markdown
from tasks.config import build_model
from tasks.flops import flops_per_image

BEFORE = {number: signal.getsignal(number) for number in SIGNALS}
SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "finetune": finetune, "probe": linear_probe}
RECORD = "ablation.json"
"""In the folder of each run: its settings from the start on, its results at the end; in the output folder: the tables."""


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option(
        REQUIRED,
        "labelled images: class folders, Parquet files, a data set that timm can open, or sample",
        path=True,
        section="Data",
    )
    output_dir: str = option("runs/ablate", "folder for the results, with one folder for each run", path=True, section="Run")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds; every variant runs once for each", at_least=0)
    tables: tuple[str, ...] = option(
        ("table6",),
        "comparisons; table6: Table 6; mask_ratio, loss_weight, decoder_depth: Table 5; choices: what the paper leaves open; "
        "contrast: with and without the contrastive loss",
        TABLES,
        section="Evaluation",
    )
    pretrain: str = option("", "options of pretrain.py for all variants, in quotation marks")
    finetune: str = option("", "options of finetune.py, in quotation marks; none: no fine-tuning")
    probe: str = option("", "options of linear_probe.py, in quotation marks; none: no k-NN and no linear probe")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "help": "the paper's ablations: 200 epochs of pretraining, 100 of fine-tuning",
        "pretrain": "--epochs 200 --batch-size 512",
        "finetune": "--preset paper",
    },
    "fashion": {
        "help": "short runs of a small ViT, made for Fashion-MNIST",
        "pretrain": "--preset quick --epochs 0.5 --warmup-epochs 0.05 --workers 1 --eval-images 0",
        "finetune": "--preset quick --epochs 10 --warmup-epochs 1 --eval-every 10 --train-images 1000 --val-images 5000"
        " --workers 0",
        "probe": "--preset quick --epochs 30 --train-images 5000 --val-images 5000",
    },
}


class Planned(NamedTuple):
    """A run: an arm with one seed, the options of its scripts, in a folder of its own."""

    arm: Arm
    seed: int
    folder: Path
    command: str
    scripts: dict[str, Any]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The options on which its numbers depend, as JSON."""
        free = {name: changeable(script.Config) - {"data", "epochs", "steps", "max_steps"} for name, script in SCRIPTS.items()}
        chosen = {name: dataclasses.asdict(options) for name, options in self.scripts.items()}
        kept = {name: {k: v for k, v in options.items() if k not in free[name]} for name, options in chosen.items()}
        return dict(json.loads(json.dumps(kept)))

    def record(self) -> dict[str, Any]:
        """Read what earlier calls have left of this run.

        Raises:
            Stop: if that has other settings, with each of them.
        """
        path = self.folder / RECORD
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for name in SCRIPTS if found else ():
            before, now = found["settings"].get(name), self.settings.get(name)
            if (before is None) != (now is None):
                raise Stop(f"{self.folder} was run with{'out' if before is None else ''} --{name}: choose another --output-dir")
            try:
                changed_settings(before or {}, now or {}, frozenset())
            except Stop as stop:
                raise Stop(f"{self.folder}, --{name}: {stop}") from stop
        return found


def read(name: str, line: str, *more: str) -> tuple[list[str], Any]:
    """Return the words of a script's command line, and the options that they mean."""
    try:
        words = [*shlex.split(line), *more]
        return words, parse(SCRIPTS[name].Config, SCRIPTS[name].PRESETS, None, words)
    except ValueError as error:
        raise Stop(f"--{name}: {error}") from error


@functools.cache
def cost(chosen: Any) -> float:
    """Return the operations of a pretraining step for one image, for options of pretrain.py."""
    model = build_model(chosen, torch.device("cpu"))
    model.contrastive_loss = mvmae.NTXentLoss(gather=False)  # the same for any number of processes
    return flops_per_image(model, chosen.num_views)


def plan(config: Config, arm: Arm, seed: int) -> Planned:
    """Return a run of an arm.

    It is named by the options that are otherwise than ours, so that tables share the runs that they have in common.
    """
    line, data = f"{config.pretrain} {arm.options}", ("--data", config.data)
    base, chosen = read("pretrain", config.pretrain, *data)[1], read("pretrain", line, *data)[1]
    if not base.epochs or base.steps:
        raise Stop("--pretrain must give --epochs, so that all variants can cost the same")
    changed = {key: value for key, value in dataclasses.asdict(chosen).items() if value != getattr(base, key)}
    name = "-".join(f"{key}={value}" for key, value in changed.items()) or "ours"
    folder = Path(config.output_dir) / f"{re.sub(r'[^a-zA-Z0-9_.=-]', '', name)}-seed{seed}"
    ratio = cost(base) / cost(chosen)
    line += f" --epochs {base.epochs * ratio:.6g}"
    if base.warmup_epochs is not None:
        line += f" --warmup-epochs {base.warmup_epochs * ratio:.6g}"
    common, scripts = (*data, "--resume", "--seed", str(seed), "--output-dir"), {}
    words, scripts["pretrain"] = read("pretrain", line, *common, str(folder))
    for key, line, model in (("finetune", config.finetune, "--model"), ("probe", config.probe, "--models")):
        if line not in ("", "none"):
            scripts[key] = read(key, line, model, str(folder), *common, str(folder / key))[1]
    return Planned(arm, seed, folder, shlex.join(words), scripts)


def run_arm(planned: Planned, ranks: Ranks) -> None:
    """Pretrain and measure; a run that an earlier call began is resumed."""
    record = {"arm": planned.arm.name, "options": planned.arm.options, "seed": planned.seed, "pretrain": planned.command}
    record |= {"epochs": planned.scripts["pretrain"].epochs, "settings": planned.settings}
    if ranks.rank == 0:
        planned.folder.mkdir(parents=True, exist_ok=True)
        write_json(planned.folder / RECORD, record)
    for name, chosen in planned.scripts.items():
        SCRIPTS[name].main(chosen)
        for number in SIGNALS:  # the script's handlers would only take note
            signal.signal(number, BEFORE[number])
        ranks.gather(None)  # all wait for the files that the first one writes
    if ranks.rank == 0:
        write_json(planned.folder / RECORD, record | measured(planned))


def measured(planned: Planned) -> dict[str, float]:
    """Read the results of a run's scripts, in percent."""
    found = {}
    if "finetune" in planned.scripts:
        found["finetune"] = json.loads((planned.folder / "finetune/results.json").read_text())["top1"]
    if "probe" in planned.scripts:
        probed = json.loads((planned.folder / "probe/results.json").read_text())[0]
        found |= {"knn": probed["knn"], "linear": probed["linear"]}
    return found


def finished(runs: list[Planned]) -> list[dict[str, Any]]:
    """Return the records of those runs that have results."""
    records = [planned.record() for planned in runs]
    return [{k: v for k, v in one.items() if k != "settings"} for one in records if {"finetune", "knn"} & one.keys()]


def write_tables(config: Config, plans: dict[Arm, list[Planned]]) -> str:
    """Write the tables of the runs that are done, and return them as Markdown."""
    folder, ours = Path(config.output_dir), finished(plans[OURS])
    found = {table: [compare(arm, finished(plans[arm]), ours) for arm in TABLES[table]] for table in config.tables}
    text = markdown(found)
    write_json(folder / RECORD, found)
    write_text(folder / "ablation.md", text + "\n")
    draw(folder / "ablation.png", found)
    return text


def main(config: Config) -> None:
    """Do the runs that are missing, and write the tables after each."""
    arms = [OURS, *(arm for table in config.tables for arm in TABLES[table])]
    plans = {arm: [plan(config, arm, seed) for seed in config.seeds] for arm in arms}
    if plans[OURS][0].scripts.keys() == {"pretrain"}:
        raise Stop("nothing would be measured: give --finetune, --probe, or a --preset")
    wanted = {planned.folder: planned for arm in arms[1:] for planned in plans[arm]}
    for runs in plans.values():
        finished(runs)  # refuses what other options have left before anything is run
    ranks = start_ranks(plans[OURS][0].scripts["pretrain"].device)
    for number, planned in enumerate(wanted.values(), 1):
        if ranks.any(bool(finished([planned]))):
            continue
        if ranks.rank == 0:
            print(f"run {number} of {len(wanted)}: {planned.arm.name}, seed {planned.seed}, in {planned.folder}", flush=True)
        run_arm(planned, ranks)
        if ranks.rank == 0:
            write_tables(config, plans)
    if ranks.rank == 0:
        text = write_tables(config, plans)
        print(f"accuracy in percent; in brackets the difference to ours of the same seeds with its 95 % interval\n\n{text}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
