r"""Measure what each part of the method is worth: Tables 5 and 6 of the paper, and the choices that the paper leaves open.

  python examples/ablate.py --preset fashion --data torch/fashion_mnist:path/to/folder
      Table 6 on Fashion-MNIST with three seeds: pretraining, fine-tuning, probing; about 55 minutes on two CPU cores
  torchrun --nproc-per-node 8 examples/ablate.py --preset paper --data path/to/imagenet \
    --tables table6 mask_ratio loss_weight decoder_depth --seeds 0
      the paper's protocol: 16 variants, 200 epochs of pretraining and 100 of fine-tuning each; estimated at 421 to 736
      hours of one H100 for each seed (not measured); the tables show the paper's numbers beside ours

Each variant is trained with pretrain.py and measured with finetune.py and linear_probe.py. The first line says how many runs
and operations that is. Repeat the command to continue after an interruption, or with more seeds; runs with other options get
other folders. After each run the output folder holds the tables so far: ablation.json, ablation.md and ablation.png.
"""

import dataclasses
import functools
import hashlib
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
from engine.distributed import Ranks, start_ranks
from engine.options import REQUIRED, changeable, option, parse, run
from engine.signals import SIGNALS, Signals, Stop
from mvmae.weights import write_json, write_text
from tasks.comparison import OURS, TABLES, Arm, compare, draw, markdown
from tasks.config import build_model
from tasks.flops import flops_of_classifying, flops_per_image
from tasks.splits import KINDS, open_labelled

BEFORE = {number: signal.getsignal(number) for number in SIGNALS}
SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "finetune": finetune, "probe": linear_probe}
LAST = {"pretrain": "summary.md", "finetune": "results.json", "probe": "results.json"}
"""What each script writes last into its folder."""
H100 = 200e12, 350e12
"""Operations a second that training a ViT-B may reach on one H100 in bf16: an estimate, not a measurement."""


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = option(
        REQUIRED,
        f"labelled images: class folders, {KINDS}",
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
    budget: str = option(
        "flops",
        "what is equal for all variants; flops: operations, so that one view is trained for twice as many epochs; images: "
        "epochs, as in the paper",
        ["flops", "images"],
    )
    pretrain: str = option("", "options of pretrain.py for all variants, in quotation marks")
    finetune: str = option("", "options of finetune.py, in quotation marks; none: no fine-tuning")
    probe: str = option("", "options of linear_probe.py, in quotation marks; none: no k-NN and no linear probe")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "help": "the paper's ablations: 200 epochs of pretraining, 100 of fine-tuning",
        "budget": "images",
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
    """A run: an arm with one seed, and the options of its scripts, each with a folder of its own."""

    arm: Arm
    seed: int
    command: str
    scripts: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the pretraining, in which the others lie."""
        return Path(self.scripts["pretrain"].output_dir)

    def missing(self) -> list[str]:
        """Return the scripts that have not ended."""
        return [name for name, chosen in self.scripts.items() if not (Path(chosen.output_dir) / LAST[name]).exists()]

    def results(self) -> dict[str, Any]:
        """Read what its scripts have measured, in percent."""
        found: dict[str, Any] = {"seed": self.seed, "pretrain": self.command, "epochs": self.scripts["pretrain"].epochs}
        for name in self.scripts.keys() - {"pretrain"}:
            result = json.loads((Path(self.scripts[name].output_dir) / LAST[name]).read_text())
            found |= {"finetune": result["top1"]} if name == "finetune" else {key: result[0][key] for key in ("knn", "linear")}
        return found


def read(name: str, line: str) -> Any:
    """Return the options that a script's command line means."""
    try:
        return parse(SCRIPTS[name].Config, SCRIPTS[name].PRESETS, None, shlex.split(line))
    except ValueError as error:
        raise Stop(f"--{name}: {error}") from error


@functools.cache
def cost(chosen: Any) -> tuple[float, float]:
    """Return the operations of a step of pretraining and of fine-tuning for one image, for options of pretrain.py."""
    model = build_model(chosen, torch.device("cpu"))
    model.contrastive_loss = mvmae.NTXentLoss(gather=False)  # the same for any number of processes
    return flops_per_image(model, chosen.num_views), flops_of_classifying(model.encoder)


def placed(name: str, line: str, folder: Path) -> tuple[str, Any]:
    """Return the command line and the options of a script whose folder ends with letters that stand for the options.

    So tables share the runs that they have in common, and runs with other options have other folders.
    """
    free = changeable(SCRIPTS[name].Config) - {"data", "epochs", "steps", "max_steps"} | {"model"}
    kept = {key: value for key, value in dataclasses.asdict(read(name, line)).items() if key not in free}
    letters = hashlib.blake2b(repr(sorted(kept.items())).encode(), digest_size=3).hexdigest()
    line = f"{line} --output-dir {shlex.quote(f'{folder}-{letters}')}"
    return line, read(name, line)


def plan(config: Config, arm: Arm, seed: int) -> Planned:
    """Return a run of an arm."""
    common = shlex.join(["--data", config.data, "--resume", "--seed", str(seed)])
    line = f"{config.pretrain} {arm.options}"
    base, chosen = (read("pretrain", f"{text} {common}") for text in (config.pretrain, line))
    if not base.epochs or base.steps:
        raise Stop("--pretrain must give --epochs, so that all variants can cost the same")
    changed = {key: value for key, value in dataclasses.asdict(chosen).items() if value != getattr(base, key)}
    label = "-".join(f"{key}={value}" for key, value in changed.items()) or "ours"
    if config.budget == "flops":
        ratio = cost(base)[0] / cost(chosen)[0]
        line += f" --epochs {base.epochs * ratio:.6g}"
        if base.warmup_epochs is not None:
            line += f" --warmup-epochs {base.warmup_epochs * ratio:.6g}"
    folder = Path(config.output_dir) / f"{re.sub(r'[^a-zA-Z0-9_.=-]', '', label)}-seed{seed}"
    command, chosen = placed("pretrain", f"{line} {common}", folder)
    scripts = {"pretrain": chosen}
    for name, line, model in (("finetune", config.finetune, "--model"), ("probe", config.probe, "--models")):
        if line not in ("", "none"):
            line = f"{line} {model} {shlex.quote(chosen.output_dir)} {common}"
            scripts[name] = placed(name, line, Path(chosen.output_dir) / name)[1]
    return Planned(arm, seed, command, scripts)


def run_arm(planned: Planned, ranks: Ranks) -> None:
    """Pretrain and measure, as far as that is missing; a script that an earlier call began is resumed."""
    for name in ranks.gather(planned.missing())[0]:
        SCRIPTS[name].main(planned.scripts[name])
        for number in SIGNALS:  # the script's handlers would only take note
            signal.signal(number, BEFORE[number])
        received = [number for number in ranks.gather(Signals.latest) if number is not None]  # after a run's last step
        if received:  # all wait here, too, for the files that the first one writes
            raise Stop(f"stopped after {planned.folder}: run the same command again to go on", 128 + received[0])


def describe(config: Config, runs: list[Planned]) -> str:
    """Return a line on how much there is to do, with every variant, table and seed counted."""
    number, total = len(open_labelled(config.data).train), 0.0
    for planned in runs:
        chosen = planned.scripts["pretrain"]
        pretraining, classifying = cost(dataclasses.replace(chosen, seed=0, epochs=1, warmup_epochs=None, output_dir=""))
        total += pretraining * number * chosen.epochs
        if tuned := planned.scripts.get("finetune"):
            total += classifying * min(number, tuned.train_images or number) * tuned.epochs
    variants = len({planned.arm.options for planned in runs})
    line = f"{len(runs)} runs ({variants} variants, {len(config.seeds)} seeds), {total:.2g} FLOP of pretraining and fine-tuning"
    low, high = (total / speed / 3600 for speed in reversed(H100))
    return f"{line}: estimated at {low:.2g} to {high:.2g} hours of one H100"


def write_tables(config: Config, plans: dict[Arm, list[Planned]]) -> str:
    """Write the tables of the runs that are done, and return them as Markdown."""
    folder = Path(config.output_dir)
    done = {arm: [planned.results() for planned in runs if not planned.missing()] for arm, runs in plans.items()}
    found = {table: [compare(arm, done[arm], done[OURS]) for arm in TABLES[table]] for table in config.tables}
    text = markdown(found)
    if plans[OURS][0].scripts["pretrain"].max_steps:
        text += "\n\nFor trying out: --max-steps ended the runs before their schedule."
    write_json(folder / "ablation.json", found)
    write_text(folder / "ablation.md", text + "\n")
    draw(folder / "ablation.png", found)
    return text


def main(config: Config) -> None:
    """Do the runs that are missing, and write the tables after each."""
    arms = [OURS, *(arm for table in config.tables for arm in TABLES[table])]
    plans = {arm: [plan(config, arm, seed) for seed in config.seeds] for arm in arms}
    if plans[OURS][0].scripts.keys() == {"pretrain"}:
        raise Stop("nothing would be measured: give --finetune, --probe, or a --preset")
    wanted = list({planned.folder: planned for arm in arms[1:] for planned in plans[arm]}.values())
    ranks = start_ranks(plans[OURS][0].scripts["pretrain"].device)
    if ranks.rank == 0:
        print(describe(config, wanted), flush=True)
    for number, planned in enumerate(wanted, 1):
        if not ranks.any(bool(planned.missing())):
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
