"""Which encoder of an adaptation is exported: that of the evaluation that measured best; the start counts too."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

MEASURES = {"knn": "k-NN accuracy on held-out images", "retrieval": "view retrieval"}


class Best:
    """The encoder of the best evaluation, by k-NN accuracy where there are labels, else by view retrieval.

    View retrieval is near 100 % at the start where images are easily distinguished, and only a clear fall is counted against an
    encoder: if several are nearly equal, within a standard error (at most 50 / sqrt(images) points), the latest is the best.

    Attributes:
        step: of the best evaluation; 0 is the start.
        metrics: of that evaluation; empty where nothing was measured: then the last encoder is the best.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.start = self._copy()
        self.step, self.top, self.slack = 0, -math.inf, 0.0
        self.metrics, self.weights = dict[str, float](), dict[str, Tensor]()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.encoder.state_dict().items()}

    def consider(self, step: int, metrics: Mapping[str, float], images: int) -> None:
        """Keep the encoder as it is now, if its evaluation on ``images`` images is the best so far."""
        name = "knn" if "knn" in metrics else "retrieval"
        if name not in metrics:
            return
        self.slack = 50 / math.sqrt(images) if name == "retrieval" else 0.0
        value, before = metrics[name], self.top
        self.top = max(self.top, value)
        if value > before or (self.slack and value >= before - self.slack):
            self.step, self.metrics = step, dict(metrics)
            self.weights = self._copy() if step else {}

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Put weights into the encoder for a while."""
        before = self._copy()
        self.encoder.load_state_dict(weights)
        try:
            yield
        finally:
            self.encoder.load_state_dict(before)

    def chosen(self) -> dict[str, Tensor]:
        """Return the weights to export."""
        return (self.weights or self.start) if self.metrics else self._copy()

    def describe(self, last: int) -> str:
        """Return a line on what is exported after ``last`` steps."""
        name = next((name for name in MEASURES if name in self.metrics), "")
        if not name:
            return f"exported: the encoder after step {last}; nothing was measured to choose by"
        value = f"{MEASURES[name]} {self.metrics[name]:.1f} %"
        if self.step == 0:
            return f"exported: the starting encoder, unchanged: no evaluation was better ({value})"
        chosen = "the best evaluation" if name == "knn" else f"the latest evaluation within {self.slack:.1f} points of the best"
        return f"exported: step {self.step} of {last}, {chosen} ({value})"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run and export.py read."""
        weights = self.chosen() if self.metrics else {}
        return {"step": self.step, "top": self.top, "slack": self.slack, "metrics": self.metrics, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore that."""
        self.step, self.top, self.slack = state["step"], state["top"], state.get("slack", 0.0)
        self.metrics, self.weights = dict(state["metrics"]), dict(state["weights"])
