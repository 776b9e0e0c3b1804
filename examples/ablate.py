r"""Measure what each part of the method is worth: Tables 5 and 6 of the paper, and the choices that the paper leaves open.

  python examples/ablate.py --preset fashion --data path/to/fashion-mnist
      Table 6 on Fashion-MNIST with three seeds: pretraining, fine-tuning, probing; about 55 minutes on two CPU cores
  python examples/ablate.py --preset paper --data path/to/imagenet \
    --tables table6 mask_ratio loss_weight decoder_depth
      the paper's: 200 epochs of pretraining, 100 of fine-tuning for each of 16 variants; months on one GPU (not measured)
  torchrun --nproc-per-node 2 examples/ablate.py --preset fashion --data path/to/fashion-mnist \
    --tables negatives
      negatives from the whole batch against negatives from each process's own images
  python examples/ablate.py --preset fashion --data path/to/fashion-mnist --tables contrast \
    --output-dir runs/ablate-longer \
    --pretrain "--preset quick --epochs 2 --warmup-epochs 0.2 --workers 1 --monitor-images 0"
      the worth of the contrastive loss when all variants train four times as long

Each variant is trained with pretrain.py and measured with finetune.py and linear_probe.py. Repeat the command to continue after
an interruption, or with other seeds; commands for different seeds may run side by side. A folder that holds results of other
options is refused: choose another --output-dir. By default all variants cost the same FLOPs: a variant that costs half as much
per image sees twice as many images. The output folder then holds ablation.json, with every run, ablation.md and ablation.png.
"""

import dataclasses
import functools
import json
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import finetune
import linear_probe
import pretrain
from engine.checkpoint import check_same
from engine.cli import changeable, option, parse, run, within_cores
from engine.distributed import Processes, start_processes
from engine.ends import BEFORE, Stop
from mvmae.weights import write_json, write_text
from tasks.comparison import MEASURES, OURS, TABLES, Arm, draw, markdown, summarise
from tasks.method import build_model
from tasks.timing import count_flops


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option(
        dataclasses.MISSING,
        "labelled images: class folders, IDX or Parquet files, a timm data set, or sample: scikit-image's photographs",
        path=True,
        section="Data",
    )
    output_dir: str = option("runs/ablate", "folder for the results, with one folder for each run", path=True, section="Run")
    tables: tuple[str, ...] = option(
        ("table6",),
        "comparisons; table6: Table 6; mask_ratio, loss_weight, decoder_depth: Table 5; choices: what the paper leaves open; "
        "negatives: of all processes or of each alone; contrast: with and without the contrastive loss",
        TABLES,
        section="Measurements",
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "random seeds; every variant runs once per seed", at_least=0)
    budget: str = option(
        "flops", "quantity that is equal for all variants; flops: FLOPs of training, images: images seen", ["flops", "images"]
    )
    pretrain: str = option("", "options of pretrain.py for all variants, in quotation marks", empty="none")
    finetune: str = option("none", "options of finetune.py, in quotation marks; none: no fine-tuning")
    probe: str = option("none", "options of linear_probe.py, in quotation marks; none: no k-NN and no linear probe")
    collect: bool = option(False, "write the tables of the finished runs and start no further run")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "help": "the paper's ablations: 200 epochs of pretraining, 100 of fine-tuning",
        "pretrain": "--epochs 200 --batch-size 512",
        "finetune": "--preset paper",
        "probe": "none",
    },
    "fashion": {
        "help": "short runs of a small ViT, made for Fashion-MNIST",
        "pretrain": "--preset quick --epochs 0.5 --warmup-epochs 0.05 --workers 1 --monitor-images 0",
        "finetune": "--preset quick --epochs 10 --warmup-epochs 1 --eval-every 10 --train-images 1000 --val-images 5000"
        " --workers 0",
        "probe": "--preset quick --epochs 30 --train-images 5000 --val-images 5000 --few-shot 0",
    },
}


def settings(config: Config, arm: Arm) -> pretrain.Config:
    """Return the options of an arm's pretraining."""
    typed = shlex.split(f"{config.pretrain} {arm.options}")
    return parse(pretrain.Config, pretrain.PRESETS, None, ["--data", config.data, *typed])


def check_lines(config: Config) -> None:
    """Read the options of the three scripts, so that a mistake in them ends the call before hours of runs."""
    lines = {"pretrain": (pretrain, ""), "finetune": (finetune, "--model x"), "probe": (linear_probe, "--models x")}
    for name, (script, also) in lines.items():
        try:
            parse(script.Config, script.PRESETS, None, ["--data", config.data, *shlex.split(f"{also} {getattr(config, name)}")])
        except ValueError as error:
            raise Stop(f"--{name}: {error}") from error


@functools.cache
def flops_per_image(chosen: pretrain.Config) -> float:
    """Count the operations of a pretraining step, forward and backward, for one image with all its views."""
    model = build_model(chosen)
    model.contrastive_loss.gather = False  # type: ignore[assignment]  # the same for any number of processes
    views = torch.zeros(2, chosen.num_views, chosen.in_chans, *model.encoder.patch_embed.img_size)
    return count_flops(lambda: model(views).loss.backward()) / 2


SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "finetune": finetune, "probe": linear_probe}
FREE = {name: changeable(script.Config) - {"data", "epochs", "max_steps"} for name, script in SCRIPTS.items()}
"""Options that change no number of a run."""


class Planned(NamedTuple):
    """A run: an arm with one seed, in a folder of its own."""

    arm: Arm
    seed: int
    folder: Path
    command: str
    scripts: dict[str, Any]

    @property
    def numbers(self) -> Path:
        """The file with the numbers of the finished run."""
        return self.folder / "ablation.json"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The options on which its numbers depend, as JSON."""
        found = {name: dataclasses.asdict(chosen) for name, chosen in self.scripts.items()}
        kept = {name: {k: v for k, v in options.items() if k not in FREE[name]} for name, options in found.items()}
        return dict(json.loads(json.dumps(kept)))


def plan(config: Config, arm: Arm, seed: int) -> Planned:
    """Return the options of an arm's scripts, and refuse a folder that holds this run with other ones.

    A run is named by what it has otherwise than ours, so that tables share the runs that they have in common.
    """
    base, chosen = settings(config, OURS), settings(config, arm)
    if not base.epochs:
        raise Stop("--pretrain must give --epochs, so that all variants can cost the same")
    changed = {key: value for key, value in dataclasses.asdict(chosen).items() if value != getattr(base, key)}
    name = "-".join(f"{key}={value}" for key, value in changed.items()) or "ours"
    folder = Path(config.output_dir) / f"{re.sub(r'[^a-zA-Z0-9_.=-]', '', name)}-seed{seed}"
    ratio = flops_per_image(base) / flops_per_image(chosen) if config.budget == "flops" else 1.0
    length = ["--epochs", f"{base.epochs * ratio:.6g}", "--warmup-epochs", f"{base.warmup_epochs * ratio:.6g}"]
    words = {"pretrain": [*shlex.split(config.pretrain), *shlex.split(arm.options), *length]}
    words |= {"finetune": ["--model", str(folder), *shlex.split(config.finetune)]} if config.finetune else {}
    words |= {"probe": ["--models", str(folder), *shlex.split(config.probe)]} if config.probe else {}
    scripts = {}
    for key, given in words.items():
        place = folder if key == "pretrain" else folder / key
        arguments = ["--data", config.data, *given, "--resume", "--seed", str(seed), "--output-dir", str(place)]
        scripts[key] = parse(SCRIPTS[key].Config, SCRIPTS[key].PRESETS, None, arguments)
    planned = Planned(arm, seed, folder, shlex.join(["--data", config.data, *words["pretrain"]]), scripts)
    refuse_other_settings(planned)
    return planned


def refuse_other_settings(planned: Planned) -> None:
    """Stop if the folder of a run holds results of other options, and name these options."""
    path, given = planned.folder / "settings.json", planned.settings
    stored = json.loads(path.read_text()) if path.exists() else {} if planned.numbers.exists() else given
    for name in SCRIPTS:
        was, now = stored.get(name), given.get(name)
        if (was is None) != (now is None):
            raise Stop(f"{planned.folder} was run with{'out' if was is None else ''} --{name}: choose another --output-dir")
        try:
            check_same(was or {}, now or {}, frozenset())
        except Stop as stop:
            raise Stop(f"{planned.folder}, --{name}: {stop}") from stop


def run_arm(planned: Planned, processes: Processes) -> None:
    """Pretrain and measure, unless an earlier call has. A run that an earlier call began is resumed, and not timed."""
    folder, begun, start = planned.folder, planned.folder.exists(), time.monotonic()
    if processes.any(planned.numbers.exists()):
        return
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", planned.settings)
    for name, chosen in planned.scripts.items():
        _call(SCRIPTS[name], chosen, processes)
    result: dict[str, Any] = {"arm": planned.arm.name, "options": planned.arm.options, "seed": planned.seed}
    result |= {"epochs": planned.scripts["pretrain"].epochs, "pretrain": planned.command}
    if "finetune" in planned.scripts:
        result["finetune"] = json.loads((folder / "finetune/results.json").read_text())["top1"]
    if "probe" in planned.scripts:
        probed = json.loads((folder / "probe/results.json").read_text())[0]
        result |= {"knn": probed["knn_avg"], "linear": probed["linear"], "rank": probed["rank_avg"]}
    result["seconds"] = None if begun else round(time.monotonic() - start)
    if processes.rank == 0:
        write_json(planned.numbers, result)


def _call(script: Any, chosen: Any, processes: Processes) -> None:
    """Run a script's main, with the signal handlers of the start; all processes wait for the files that it writes."""
    for number, action in BEFORE.items():
        signal.signal(number, action)
    script.main(within_cores(chosen))
    processes.gather(None)


def done_runs(config: Config, arm: Arm) -> list[dict[str, Any]]:
    """Return the results of an arm's finished runs."""
    runs = [plan(config, arm, seed) for seed in config.seeds]
    return [json.loads(planned.numbers.read_text()) for planned in runs if planned.numbers.exists()]


def tables(config: Config) -> dict[str, Any]:
    """Collect the runs that are done, by table and arm."""
    ours = done_runs(config, OURS)
    found: dict[str, Any] = {table: [] for table in config.tables}
    for table, rows in found.items():
        for arm in TABLES[table]:
            runs = done_runs(config, arm)
            row = {"arm": arm.name, "options": arm.options, "paper": arm.paper, "runs": runs}
            rows.append(row | {measure: summarise(runs, ours, measure) for measure in MEASURES})
    return found


def main(config: Config) -> None:
    """Do the runs that are missing, then write and print the tables."""
    tuned, probed = ("" if line == "none" else line for line in (config.finetune, config.probe))
    config = dataclasses.replace(config, finetune=tuned, probe=probed)
    check_lines(config)
    if not config.finetune and not config.probe:
        raise Stop("nothing would be measured: give --finetune, --probe, or a --preset")
    processes, folder = start_processes(settings(config, OURS).device), Path(config.output_dir)
    if "negatives" in config.tables and processes.world_size == 1 and not config.collect:
        raise Stop("--tables negatives compares processes with each other: start several, with torchrun --nproc-per-node 2")
    arms = [arm for table in config.tables for arm in TABLES[table]]
    done_runs(config, OURS)  # refuses, as plan does, what other options have given, before anything is run
    wanted = {planned.folder: planned for planned in (plan(config, arm, seed) for arm in arms for seed in config.seeds)}
    for number, one in enumerate(wanted.values(), 1):
        if not config.collect:
            if processes.rank == 0:
                print(f"run {number} of {len(wanted)}: {one.arm.name}, seed {one.seed}, in {one.folder}", flush=True)
            run_arm(one, processes)
    if processes.rank == 0:
        found = tables(config)
        if not any(row["runs"] for rows in found.values() for row in rows):
            raise Stop(f"no run in {folder} has finished: call again without --collect")
        text = markdown(found)
        write_json(folder / "ablation.json", found)
        write_text(folder / "ablation.md", text + "\n")
        draw(folder / "ablation.png", found)
        print(f"accuracy in percent; in brackets the difference to ours of the same seeds with its 95 % interval\n\n{text}")


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
