"""Numbers drawn into PNGs, without a display."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot(path: Path, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes (rows, columns) to draw on, then write it to ``path``."""
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


def draw_curves(path: Path, records: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Draw numbers of ``log.jsonl`` over the step, a panel for each name that occurs, into a PNG."""
    records = list(records)
    names = [name for name in names if any(name in record for record in records)]
    columns = min(3, max(len(names), 1))
    rows = math.ceil(max(len(names), 1) / columns)
    with plot(path, rows, columns, figsize=(4.2 * columns, 3.0 * rows)) as (_, axes):
        for axis, name in zip(axes.flat, names, strict=False):
            points = [(record["step"], record[name]) for record in records if name in record]
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else "", markersize=3)
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(names) :]:
            axis.axis("off")
