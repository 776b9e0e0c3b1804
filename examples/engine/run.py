"""A run of anything: its folder, opened and locked, and what is trained in it, given its state back."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import open_run
from engine.cli import changeable
from engine.config import RunConfig
from engine.course import Course
from engine.distributed import Processes
from engine.ends import StopSignal
from engine.log import Log
from engine.snapshot import restore


class Run:
    """A run's folder, and what is trained in it: opened, taken up from the newest checkpoint, written to the next ones.

    Args:
        config: options of the script.
        processes: this one and the others.
        images: tells the data of this run from others.
        folder: the run's; ``config.output_dir`` where it is None.
        **settings: what the run depends on besides its options, as plain values.

    Attributes:
        found: the checkpoint that the run goes on from, until the steps begin; None for a new run.
        step: the last step of that checkpoint, or 0.

    Raises:
        Stop: as `open_run` does.
    """

    def __init__(
        self, config: RunConfig, processes: Processes, images: Any, folder: Path | None = None, **settings: Any
    ) -> None:
        self.config, self.processes, self.folder = config, processes, folder or Path(config.output_dir)
        self.settings = {**dataclasses.asdict(config), **settings, "images": images}
        free = changeable(type(config))
        self.found = open_run(self.folder, self.settings, free, resume=config.resume, processes=processes)
        self.step: int = self.found["step"] if self.found else 0

    def take_up(
        self,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        also: Mapping[str, Any] | None = None,
        *,
        last: int,
    ) -> Log:
        """Give modules and optimizer what the checkpoint holds of them, if there is one, and begin the log.

        Args:
            modules: by their names in a checkpoint; the first is what is trained, not wrapped.
            optimizer: of its parameters.
            also: further parts that the checkpoint must hold, and a value like each.
            last: the last step.

        Raises:
            Stop: as `restore` does.
        """
        self.modules, self.optimizer, self.last = dict(modules), optimizer, last
        if self.found:
            restore(self.found, self.folder, modules, optimizer, also)
        self.log = Log(self.folder, self.processes.rank, last, self.step)
        return self.log

    def course(self, about: Callable[[], Mapping[str, Any]] = dict, stop: StopSignal | None = None) -> Course:
        """Return the steps to come; ``about`` gives what a checkpoint holds besides modules, optimizer and settings."""

        def state() -> dict[str, Any]:
            parts = {name: module.state_dict() for name, module in self.modules.items()}
            return {**parts, "optimizer": self.optimizer.state_dict(), **about(), "settings": self.settings}

        model, found = next(iter(self.modules.values())), self.found
        self.found = None  # its memory is free from here on
        return Course(self.config, self.folder, self.log, self.processes, model, state, found, last=self.last, stop=stop)
