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


def paper(row: dict[str, Any]) -> float | None:
    """Return the paper's accuracy of a row, if there is one to compare with it: fine-tuning that has learned something."""
    return row["paper"] if row["finetune"] and row["finetune"]["mean"] > 0 else None


def markdown(results: dict[str, Any]) -> str:
    """Format the tables: for each measure mean and deviation over seeds, difference to ours with its 95 % interval."""
    lines = []
    for table, rows in results.items():
        columns = {table: [row["arm"] for row in rows]}
        columns["the paper's"] = [f"{paper(row):.2f}" if paper(row) else "" for row in rows]
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
    """Draw mean, deviation and single runs into a PNG: a panel for each measure, a row for each arm, under its table's name."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for table, arms in results.items():
        rows += [(table.replace("_", " "), {}), *((arm["arm"], arm) for arm in arms)]
    shown = [item for item in MEASURES.items() if any(row and row[item[0]] for _, row in rows)] or list(MEASURES.items())
    with plot(path, 1, len(shown), figsize=(9.5, 1.6 + 0.19 * len(rows)), sharey=True) as (figure, panels):
        legend: dict[str, Any] = {}
        for axis, (measure, title) in zip(panels[0], shown, strict=True):
            for place, (_, row) in enumerate(rows):
                if not row:
                    axis.axhline(place, color="0.85", linewidth=1)
                elif found := row[measure]:
                    runs = [run[measure] for run in row["runs"] if measure in run]
                    style = {"color": "C0", "fmt": "o", "markersize": 4, "capsize": 2}
                    legend["mean and standard deviation over seeds"] = axis.errorbar(
                        found["mean"], place, xerr=found["std"] or 0, **style
                    )
                    legend["run of one seed"] = axis.scatter(runs, [place] * len(runs), marker="|", color="C1", zorder=3)
                    if measure == "finetune" and paper(row):
                        mark = {"marker": "D", "color": "C2", "s": 16}
                        legend["the paper's, on ImageNet"] = axis.scatter(paper(row), place, **mark)
            axis.set(title=title, xlabel="accuracy, %\n\n")  # room for the legend
            axis.grid(axis="x", alpha=0.3)
        axes = panels[0][0]
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
        for label, (_, row) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("normal" if row else "bold")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(legend.values(), legend, loc="lower center", ncols=3, fontsize=9)
