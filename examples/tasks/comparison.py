"""Arms that are compared over seeds: their options, and what they differ by, as a table and as a picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.plots import plot


class Arm(NamedTuple):
    """A way to pretrain, and the paper's accuracy for it after fine-tuning, if there is one."""

    name: str
    options: str
    paper: float | None = None


OURS = Arm("ours", "")
TABLES: dict[str, list[Arm]] = {
    "table6": [
        Arm("ours", "", 79.09),
        Arm("without two different targets", "--same-crop", 77.86),
        Arm("without contrastive loss", "--loss-weight 0", 74.33),
        Arm("baseline, MAE", "--num-views 1 --loss-weight 0", 76.48),
    ],
    "mask_ratio": [
        Arm(f"mask ratio {ratio}", f"--mask-ratio {ratio}", paper)
        for ratio, paper in ((0.5, 79.22), (0.75, 79.09), (0.8, 79.25), (0.9, 79.23), (0.95, 78.30))
    ],
    "loss_weight": [
        Arm(f"loss weight {weight}", f"--loss-weight {weight}", paper)
        for weight, paper in ((0.1, 78.10), (0.5, 78.09), (1.0, 78.09), (1.5, 79.31), (2.0, 79.64))
    ],
    "decoder_depth": [
        Arm(f"decoder depth {depth}", f"--decoder-depth {depth}", paper)
        for depth, paper in ((1, 74.89), (2, 78.56), (4, 80.03), (8, 80.03), (12, 79.11))
    ],
    "choices": [
        OURS,
        Arm("projector of 128", "--projector 128"),
        Arm("pixels as they are", "--no-norm-pix"),
        Arm("temperature 0.2", "--temperature 0.2"),
        Arm("temperature 0.5", "--temperature 0.5"),
        Arm("contrastive loss from half of the run on", "--contrast-from 0.5"),
    ],
    "contrast": [OURS, Arm("without contrastive loss", "--loss-weight 0")],
}

MEASURES = {"finetune": "fine-tuning", "knn": "k-NN", "linear": "linear probe"}
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t for 1 to 9 degrees of freedom."""


def compare(arm: Arm, runs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of a table: an arm, its runs, and what `summarise` says of each measure."""
    about = {"arm": arm.name, "options": arm.options, "paper": arm.paper, "runs": list(runs)}
    return about | {measure: summarise(runs, ours, measure) for measure in MEASURES}


def summarise(runs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """Compute mean and deviation over seeds, and the mean difference to ours with the half width of its 95 % interval.

    Differences are between runs of the same seed.
    """
    values = [run[measure] for run in runs if measure in run]
    if not values:
        return None
    by_seed = {run["seed"]: run[measure] for run in ours if measure in run}
    pairs = [run[measure] - by_seed[run["seed"]] for run in runs if measure in run and run["seed"] in by_seed]
    summary: dict[str, Any] = {"mean": statistics.mean(values), "n": len(values)}
    summary["std"] = statistics.stdev(values) if len(values) > 1 else None
    summary["difference"] = statistics.mean(pairs) if pairs else None
    quantile = T975[len(pairs) - 2] if 1 < len(pairs) <= len(T975) + 1 else 1.96
    summary["half_width"] = quantile * statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return summary


def markdown(results: dict[str, Any]) -> str:
    """Format the tables: for each measure mean and deviation over seeds, difference to ours with its 95 % interval."""
    lines = []
    for table, rows in results.items():
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


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draw each arm's mean, deviation and single runs into a PNG: a panel for each measure, a row for each arm and table."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for table, arms in results.items():
        rows += [(table.replace("_", " "), {}), *((arm["arm"], arm) for arm in arms)]
    places = list(enumerate(row for _, row in rows))
    with plot(path, 1, len(MEASURES), figsize=(9.5, 1.6 + 0.19 * len(rows)), sharey=True) as (figure, panels):
        for axis, (measure, title) in zip(panels[0], MEASURES.items(), strict=True):
            means = [(row[measure]["mean"], place, row[measure]["std"] or 0) for place, row in places if row.get(measure)]
            x, y, spread = ([mean[i] for mean in means] for i in range(3))
            label = "mean and standard deviation over seeds"
            axis.errorbar(x, y, xerr=spread, fmt="o", markersize=4, capsize=2, label=label)
            runs = [(run[measure], place) for place, row in places for run in row.get("runs", ()) if measure in run]
            x, y = ([run[i] for run in runs] for i in range(2))
            axis.scatter(x, y, marker="|", color="C1", zorder=3, label="run of one seed")
            axis.set(title=title, xlabel="accuracy, %\n\n")  # room for the legend
            axis.grid(alpha=0.3)
            for place, row in places:
                if not row:
                    axis.axhspan(place - 0.5, place + 0.5, color="0.92", zorder=2)
        axes, last = panels[0][0], panels[0][-1]
        arms = {place: name for place, (name, row) in enumerate(rows) if row}
        axes.set_yticks(list(arms), list(arms.values()), fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for place, (name, row) in enumerate(rows):
            if not row:  # written on the last panel, so that no other covers it
                words = last.annotate(name, (0.02, place), xycoords=(axes.transAxes, last.transData), va="center", fontsize=9)
                words.set_in_layout(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=9)
