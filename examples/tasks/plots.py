"""Numbers drawn into PNGs, without a display."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot(path: Path, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes (rows, columns) to draw on, then write the figure to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, squeeze=False, **settings)
    try:
        yield figure, axes
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


LABELS = {
    "loss_rec": "reconstruction loss",
    "loss_con": "contrastive loss, nats",
    "val_loss": "validation loss",
    "lr": "learning rate",
    "knn": "k-NN accuracy, %",
    "linear": "linear probe, %",
    "best": "best layer of the sweep, val, %",
    "top1": "top-1 accuracy, %",
    "top5": "top-5 accuracy, %",
    "retrieval": "view retrieval, %",
    "effective_rank": "effective rank, dimensions",
    "uniformity": "uniformity, nats",
}
"""What numbers of ``log.jsonl`` are, with their units; others are drawn under their names."""
BETTER = {"↓": ("loss", "loss_rec", "loss_con", "val_loss"), "↑": ("knn", "linear", "best", "top1", "top5", "retrieval")}
"""Which way is better, where that is certain."""
SPAN = 30
"""Factor between the least and the largest value of a loss above which its axis is logarithmic."""


def limits(values: Iterable[float], label: str) -> tuple[float, float]:
    """Return the ends of an axis for these values, so far apart that noise does not look like a change.

    At least 10 points of per cent, within 0 and 100; else a tenth of the largest value.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high, percent = min(finite), max(finite), label.endswith("%")
    least = 10.0 if percent else (max(abs(low), abs(high)) or 1.0) / 10
    spare = max(least - (high - low), 0.0) / 2 + (high - low) / 20
    low, high = low - spare, high + spare
    return (min(max(low, 0.0), 90.0), max(min(high, 100.0), 10.0)) if percent else (low, high)


def fill(figure: Any, number: int) -> list[Any]:
    """Return axes for so many panels, in rows of at most three, in place of a figure's own: no cell is empty."""
    figure.clear()
    rows = max(-(-number // 3), 1)
    grid = figure.add_gridspec(rows, 6)
    counts = [number // rows + (row < number % rows) for row in range(rows)]
    spans = [(row, slice(6 // count * i, 6 // count * (i + 1))) for row, count in enumerate(counts) for i in range(count)]
    return [figure.add_subplot(grid[span]) for span in spans]


def draw_curves(path: Path, records: Iterable[Mapping[str, Any]], names: Iterable[str], *, contrast_from: int = 0) -> None:
    """Draw numbers of ``log.jsonl`` over the step, a panel for each name that occurs, into a PNG in the run's folder.

    ``contrast_from`` is the step after which the contrastive loss is added, if later than the first: a line marks it.
    """
    records = list(records)
    names = [name for name in names if any(name in record for record in records)]
    last = max((record.get("step", 0) for record in records), default=0) or 1
    with plot(path, figsize=(4.2 * min(len(names), 3) or 4, 3.0 * -(-len(names) // 3) + 0.4)) as (figure, _):
        panels = fill(figure, len(names))
        run = path.absolute().parent.name.encode(errors="backslashreplace").decode()  # names of files are any bytes
        figure.suptitle(run, parse_math=False)
        for axis, name in zip(panels, names, strict=True):
            points = [(record["step"], record[name]) for record in records if name in record]
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else "", markersize=3)
            if 0 < contrast_from < last:
                axis.axvline(contrast_from, color="grey", linestyle="--", label="contrast from here")
                panels[0].legend(fontsize=8)
            label = LABELS.get(name, name)
            better = next((f" ({arrow} better)" for arrow, which in BETTER.items() if name in which), "")
            axis.set(
                title=f"{label}{better}",
                xlabel="optimizer steps",
                xlim=(-last / 50, last * 1.02),
                ylim=limits([y for _, y in points], label),
            )
            losses = [y for _, y in points if math.isfinite(y)] if "loss" in name else []
            if losses and 0 < SPAN * min(losses) < max(losses):  # else its beginning makes the rest flat
                axis.set(yscale="log", ylim=(min(losses) / 1.2, max(losses) * 1.2))
            else:
                axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))
            axis.grid(alpha=0.3)
