"""Trackers of a run's numbers, pictures and options: TensorBoard, Weights & Biases, MLflow, trackio.

Each library is imported only when its tracker is asked for. None can end a run: one that fails is left out from then on, with
one line. A resumed run continues the trackers' runs by their name, which ``tracked.txt`` holds.
"""

import contextlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvmae.weights import first_line, write_text


class Tracker(NamedTuple):
    """Where a user finds the tracked run, and what is called for a line of the log, for a picture, and at the end."""

    where: str
    numbers: Callable[[int, dict[str, float]], Any]
    picture: Callable[[int, str, Any], Any]
    close: Callable[[bool], Any]


def tensorboard(folder: Path, name: str, config: Mapping[str, Any], step: int) -> Tracker:
    """Write event files to ``tensorboard/`` of the run's folder."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), step)

    def numbers(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def picture(step: int, title: str, image: Any) -> None:
        writer.add_image(title, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    return Tracker(str(folder / "tensorboard"), numbers, picture, lambda _: writer.close())


def wandb(folder: Path, name: str, config: Mapping[str, Any], step: int) -> Tracker:
    """Log to Weights & Biases; ``WANDB_MODE=offline`` keeps the run in ``wandb/`` of its folder, for ``wandb sync``."""
    import wandb

    project, settings = os.environ.get("WANDB_PROJECT", "mvmae"), wandb.Settings(silent=True, console="off", finish_timeout=60)
    how: dict[str, Any] = {"dir": str(folder), "config": dict(config), "settings": settings, "reinit": "create_new"}
    stdin, sys.stdin = sys.stdin, io.StringIO()  # without a login it would ask for one, and the run would wait
    try:
        run: Any = wandb.init(project=project, id=name, name=folder.name, resume="allow", **how)
    finally:
        sys.stdin = stdin
    run.define_metric("*", step_metric="step")  # wandb's own steps may not go back, as those of a resumed run do
    return Tracker(
        str(Path(run.dir).parent) if run.offline else str(run.url),
        lambda step, values: run.log({"step": step, **values}),
        lambda step, title, image: run.log({"step": step, title: wandb.Image(image)}),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def mlflow(folder: Path, name: str, config: Mapping[str, Any], step: int) -> Tracker:
    """Log to ``MLFLOW_TRACKING_URI``, or to ``mlruns/`` of the run's folder."""
    for variable, value in (("HTTP_REQUEST_TIMEOUT", "10"), ("HTTP_REQUEST_MAX_RETRIES", "1"), ("ALLOW_FILE_STORE", "true")):
        os.environ.setdefault(f"MLFLOW_{variable}", value)  # a dead server holds up no run
    import mlflow

    where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
    mlflow.set_tracking_uri(where)
    project = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "mvmae")).experiment_id
    mine: Any = mlflow.search_runs([project], f"tags.mvmae = '{name}'", output_format="list")
    mlflow.start_run(mine[0].info.run_id if mine else None, run_name=folder.name, tags={"mvmae": name})
    if not mine:
        mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
    return Tracker(
        where,
        lambda step, values: mlflow.log_metrics(values, step),
        lambda step, title, image: mlflow.log_image(image, key=title, step=step),
        lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


def trackio(folder: Path, name: str, config: Mapping[str, Any], step: int) -> Tracker:
    """Log where trackio keeps its runs: in the user's cache, in ``TRACKIO_DIR``, or on a Space."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a page
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "mvmae")
        run: Any = trackio.init(project, name=name, config=dict(config), resume="allow", embed=False)
    return Tracker(
        f"trackio show --project {project}",
        lambda step, values: run.log(values, step=step),
        lambda step, title, image: run.log({title: trackio.Image(image)}, step=step),
        lambda _: run.finish(),
    )


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


class Trackers:
    """The trackers of a run; none at first."""

    def __init__(self) -> None:
        self.open: dict[str, Tracker] = {}
        self.say: Callable[[str], None] = print

    def __bool__(self) -> bool:
        return bool(self.open)

    def start(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int, say: Callable[[str], None]
    ) -> None:
        """Begin the tracked runs; after a ``step`` above 0, continue those of the same folder. ``say`` prints a line."""
        if not names:
            return
        self.say, file, own = say, folder / "tracked.txt", f"mvmae-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(OSError):
            own = (step and file.read_text()) or own
            write_text(file, own)
        for name in names:
            with self._left_out(name):
                self.open[name] = TRACKERS[name](folder, own, config, step)
                say(f"tracked by {name}: {self.open[name].where}")

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of the log."""
        values = {k: float(v) for k, v in record.items() if k not in ("step", "time") and isinstance(v, int | float)}
        self._each(lambda tracker: tracker.numbers(record.get("step", 0), values))

    def picture(self, step: int, title: str, image: Any) -> None:
        """Pass on an image of Pillow."""
        self._each(lambda tracker: tracker.picture(step, title, image))

    def close(self, *, failed: bool = False) -> None:
        """End all of them."""
        self._each(lambda tracker: tracker.close(failed))
        self.open = {}

    def _each(self, call: Callable[[Tracker], Any]) -> None:
        for name, tracker in list(self.open.items()):
            with self._left_out(name):
                call(tracker)

    @contextlib.contextmanager
    def _left_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self.open.pop(name, None)
            missing = f'; pip install "mvmae[{name}]" installs it' if isinstance(error, ImportError) else ""
            self.say(f"warning: the run goes on without {name}: {first_line(error)}{missing}")
