"""Trackers that a run tells its numbers, pictures and options to: TensorBoard, Weights & Biases, MLflow, trackio.

Each is one small class over the library, which is imported only when its tracker is asked for. None can end a run: one that
fails, whenever it does, is left out from then on, with one line.
"""

import contextlib
import io
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mvmae.weights import first_line, write_text

PROJECT = "mvmae"
"""What runs are filed under, unless the tracker's own environment variable (``WANDB_PROJECT``, ...) says otherwise."""
FILE = "trackers.json"
"""The names that trackers know a run by, in its folder, so that a resumed run goes on in them."""


class Tracker(Protocol):
    """A tracked run.

    Attributes:
        where: how a user finds it.
    """

    where: str

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int, fresh: bool) -> None:
        """Begin or go on.

        Args:
            folder: of the run.
            name: that the tracker knows the run by, without spaces.
            config: options of the run, as plain values.
            step: the last that is done.
            fresh: whether the tracker has not seen the run before.
        """

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a line of the log."""

    def picture(self, step: int, name: str, image: Any) -> None:
        """Take an image of Pillow."""

    def close(self, failed: bool) -> None:
        """End, and write what is not written."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder; ``tensorboard --logdir`` shows the runs below a folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int, fresh: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = str(folder / "tensorboard")
        self.writer: Any = SummaryWriter(self.where, purge_step=None if fresh else step + 1)
        if fresh:
            self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, image: Any) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it in ``wandb/`` of the run's folder, for ``wandb sync``."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int, fresh: bool) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        quiet = wandb.Settings(silent=True, console="off", finish_timeout=60)
        how: dict[str, Any] = {"dir": str(folder), "config": dict(config), "settings": quiet, "reinit": "create_new"}
        asked, sys.stdin = sys.stdin, io.StringIO()  # without a login it would ask for one, and the run would wait
        try:
            self.run: Any = wandb.init(project=project, id=name, name=folder.name, resume="allow", **how)
        finally:
            sys.stdin = asked
        self.run.define_metric("*", step_metric="step")  # wandb's own steps may not go back, as those of a resumed run do
        self.where = str(Path(self.run.dir).parent) if self.run.offline else str(self.run.url)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, image: Any) -> None:
        import wandb

        self.run.log({"step": step, name: wandb.Image(image)})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``, or in ``mlruns/`` of the run's folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int, fresh: bool) -> None:
        for variable, value in (("REQUEST_TIMEOUT", "10"), ("REQUEST_MAX_RETRIES", "1")):  # a dead server holds up no run
            os.environ.setdefault(f"MLFLOW_HTTP_{variable}", value)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self.where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
        self.client: Any = MlflowClient(tracking_uri=self.where)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project)
        mine = [] if fresh else self.client.search_runs([experiment], f"tags.mvmae = '{name}'")
        if mine:
            self.id = mine[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=folder.name, tags={"mvmae": name}).info.run_id
        for key, value in config.items():
            self.client.log_param(self.id, key, str(value)[:500])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def picture(self, step: int, name: str, image: Any) -> None:
        self.client.log_image(self.id, image, key=name, step=step)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Trackio:
    """A run of trackio, where that keeps its runs: in the user's cache, in ``TRACKIO_DIR``, or on a Space."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int, fresh: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a page
            import trackio

            project = os.environ.get("TRACKIO_PROJECT", PROJECT)
            self.run: Any = trackio.init(project, name=name, config=dict(config), resume="allow", embed=False)
        self.where = f"trackio show --project {project}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Any) -> None:
        import trackio

        self.run.log({name: trackio.Image(image)}, step=step)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


class Trackers:
    """The trackers of a run.

    Args:
        names: of `TRACKERS`.
        folder: the run's.
        config: its options.
        step: the last that is done.
        say: prints a line.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int, say: Callable[[str], None]
    ) -> None:
        self.say, self.open = say, dict[str, Tracker]()
        known, own = known_names(folder) if step else {}, re.sub(r"[^\w-]+", "-", folder.absolute().name, flags=re.ASCII)
        given = {name: known.get(name) or f"{own}-{uuid.uuid4().hex[:8]}" for name in names}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        for name, told in given.items():
            with self.left_out(name):
                self.open[name] = TRACKERS[name](folder, told, plain, step, name not in known)
                say(f"tracked by {name}: {self.open[name].where}")
        with contextlib.suppress(OSError):
            write_text(folder / FILE, json.dumps(known | {name: given[name] for name in self.open}))

    def __bool__(self) -> bool:
        return bool(self.open)

    @contextlib.contextmanager
    def left_out(self, name: str) -> Any:
        """Leave a tracker out from now on, with one line, if an error comes from it."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.open.pop(name, None)
            reason = first_line(error) if str(error) else type(error).__name__
            missing = f'; pip install "mvmae[{name}]" installs it' if isinstance(error, ImportError) else ""
            self.say(f"warning: the run goes on without {name}: {reason}{missing}")

    def numbers(self, record: Mapping[str, Any]) -> None:
        """Pass on a line of the log."""
        known = ("step", "time")
        values = {key: float(value) for key, value in record.items() if key not in known and isinstance(value, int | float)}
        for name, tracker in list(self.open.items()):
            with self.left_out(name):
                tracker.numbers(record["step"], values)

    def picture(self, step: int, title: str, image: Any) -> None:
        """Pass on an image of Pillow."""
        for name, tracker in list(self.open.items()):
            with self.left_out(name):
                tracker.picture(step, title, image)

    def close(self, *, failed: bool = False) -> None:
        """End all of them."""
        for name, tracker in list(self.open.items()):
            with self.left_out(name):
                tracker.close(failed)
        self.open.clear()


def known_names(folder: Path) -> dict[str, str]:
    """Return the names that trackers know the run of a folder by; none where its file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, str)}
    return {}
