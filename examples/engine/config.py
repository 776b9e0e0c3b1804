"""The options that all scripts that train share."""

import dataclasses

from engine.cli import option

REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lies and goes on, what it runs on, when it saves and ends; a script's own dataclass adds what it trains."""

    output_dir: str = option(REQUIRED, "folder of the run", path=True, may_change=True)
    resume: bool = option(False, "go on from the newest checkpoint in the output folder, if there is one", may_change=True)
    other_data: bool = option(False, "go on with other images than the run began with, and say so", may_change=True)
    seed: int = option(0, "seed of weights, order and augmentation", at_least=0)
    device: str = option("auto", "device: auto takes CUDA where there is one", ["auto", "cpu", "cuda"], may_change=True)
    precision: str = option("auto", "precision: auto is bf16 autocast on CUDA, float32 elsewhere", ["auto", "bf16", "float32"])
    workers: int = option(8, "processes that load images, for each process that trains", at_least=0, may_change=True)
    skip_nonfinite: int = option(
        0, "batches that may be left out because a loss or gradient is not finite; one more stops", at_least=0, may_change=True
    )
    max_steps: int = option(0, "end the run after this many steps of the schedule; 0 for all", at_least=0, may_change=True)
    save_every: int = option(
        REQUIRED, "most steps between checkpoints; the end is saved in any case", at_least=1, may_change=True
    )
    save_minutes: float = option(
        15, "most minutes between checkpoints; 0 leaves it to --save-every", at_least=0, may_change=True
    )
    log_every: int = option(20, "steps between lines of the log", at_least=1, may_change=True)
