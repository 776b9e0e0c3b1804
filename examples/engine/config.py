"""The options that all training scripts share."""

import dataclasses

from engine.cli import option
from engine.distributed import DEVICES
from engine.trackers import TRACKERS

REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of a run: its folder, device, checkpoints and log; a script's own dataclass adds what it trains."""

    output_dir: str = option(
        REQUIRED, "folder of the run: log, checkpoints, results", path=True, may_change=True, section="Run"
    )
    resume: bool = option(
        False,
        "continue from the newest checkpoint in the output folder, if any; --no-resume: refuse a folder with a checkpoint",
        may_change=True,
    )
    other_data: bool = option(False, "allow --resume to continue on other images than the run began with", may_change=True)
    seed: int = option(0, "seed of the random numbers: weights, order of images, augmentation", at_least=0)
    device: str = option(
        "auto", "device to run on; auto: CUDA if available, else CPU; mps: the GPU of a Mac", DEVICES, may_change=True
    )
    precision: str = option("auto", "precision; auto: bf16 autocast on CUDA, float32 elsewhere", ["auto", "bf16", "float32"])
    workers: int = option(
        8,
        "processes that load images, for each training process; 0: the training process loads them",
        at_least=0,
        may_change=True,
    )
    skip_nonfinite: int = option(
        0,
        "number of batches to skip, at most, if a loss or gradient is NaN or infinite; one more stops the run",
        at_least=0,
        may_change=True,
    )
    max_steps: int = option(
        0,
        "stop after this many steps; the learning-rate schedule still covers the whole run; 0: train to the end",
        at_least=0,
        may_change=True,
    )
    save_every: int = option(
        REQUIRED,
        "save a checkpoint at least every N steps, and every --save-minutes; the last step is always saved",
        at_least=1,
        may_change=True,
    )
    save_minutes: float = option(
        15, "maximum number of minutes between two checkpoints; 0: only --save-every counts", at_least=0, may_change=True
    )
    log_every: int = option(20, "number of steps between two lines of the log", at_least=1, may_change=True)
    tracker: tuple[str, ...] = option(
        (), "trackers that also get the log's numbers, the options and pictures", TRACKERS, empty="none", may_change=True
    )
