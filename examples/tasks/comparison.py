"""Arms that are compared over seeds: what they differ by, as a table and as a picture."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.plots import plot

MEASURES = {"finetune": "fine-tuning", "knn": "k-NN", "linear": "linear probe"}
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t for 1 to 9 degrees of freedom."""


def summarise(results: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """Give mean and deviation over seeds, and the mean difference to ours with the half width of its 95 % interval.

    Differences are between runs of the same seed.
    """
    values = [result[measure] for result in results if measure in result]
    if not values:
        return None
    by_seed = {result["seed"]: result[measure] for result in ours if measure in result}
    pairs = [result[measure] - by_seed[result["seed"]] for result in results if measure in result and result["seed"] in by_seed]
    found: dict[str, Any] = {"mean": statistics.mean(values), "n": len(values)}
    found["std"] = statistics.stdev(values) if len(values) > 1 else None
    found["difference"] = statistics.mean(pairs) if pairs else None
    quantile = T975[len(pairs) - 2] if 1 < len(pairs) <= len(T975) + 1 else 1.96
    found["half_width"] = quantile * statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return found


def markdown(found: dict[str, Any]) -> str:
    """Set the tables: for each measure mean, deviation over seeds, difference to ours with its 95 % interval."""
    lines = []
    for table, rows in found.items():
        columns = {table: [row["arm"] for row in rows]}
        columns["the paper's"] = ["" if row["paper"] is None else f"{row['paper']:.2f}" for row in rows]
        columns |= {title: [_cell(row[measure]) for row in rows] for measure, title in MEASURES.items()}
        shown = [(title, "---", *cells) for title, cells in columns.items() if any(cells)]
        lines += ["", *(" | ".join(line) for line in zip(*shown, strict=True))]
    return "\n".join(f"| {line} |" if line else "" for line in lines).strip()


def _cell(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return ""
    text = f"{summary['mean']:.1f}" + (f" ± {summary['std']:.1f}" if summary["std"] is not None else "")
    if summary["difference"] and summary["half_width"] is not None:
        text += f" ({summary['difference']:+.1f} ± {summary['half_width']:.1f})"
    return text


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw every arm's mean, deviation and single runs, a row of panels for each table; a column has one scale."""
    heights = [1.2 + 0.35 * len(rows) for rows in found.values()]
    layout = {"figsize": (13, sum(heights)), "sharex": "col", "sharey": "row", "height_ratios": heights}
    with plot(path, len(found), len(MEASURES), **layout) as (figure, axes):
        for panels, (table, rows) in zip(axes, found.items(), strict=True):
            for axis, (measure, title) in zip(panels, MEASURES.items(), strict=True):
                _draw_panel(axis, rows, measure)
                axis.set_title(f"{title}, %", fontsize=10)
            panels[0].invert_yaxis()
            panels[0].set_ylabel(textwrap.fill(table, 24))
        figure.align_ylabels(axes[:, 0])


def _draw_panel(axis: Any, rows: Sequence[dict[str, Any]], measure: str) -> None:
    for place, row in enumerate(rows):
        if row[measure]:
            values = [run[measure] for run in row["runs"] if measure in run]
            axis.errorbar(row[measure]["mean"], place, xerr=row[measure]["std"] or 0, fmt="o", color="C0", capsize=3)
            axis.scatter(values, [place] * len(values), marker="|", color="C1", zorder=3)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.3)
