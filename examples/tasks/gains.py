"""What adapting an encoder has gained and lost: measures before and after, on held-out images, as table and picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mvmae.metrics import effective_rank, linear_cka, mean_cosine
from tasks.best import Best
from tasks.evaluation import Evaluation
from tasks.plots import fill, limits, plot
from tasks.probe import cell, linear_accuracy, measure

COLUMNS = {
    "knn": ("k-NN", "accuracy, %"),
    "linear": ("linear probe", "accuracy, %"),
    "shot1": ("1 label a class", "accuracy, %"),
    "shot5": ("5 labels a class", "accuracy, %"),
    "rank": ("effective rank", "dimensions"),
    "retrieval": ("view retrieval", "share of crops, %"),
    "similarity": ("cosine to the start", "mean, -1 to 1"),
    "cka": ("CKA with the start", "0 to 1"),
}
"""What a measure is, and its unit."""
Rows = Sequence[Mapping[str, Any]]


@torch.no_grad()
def compare(best: Best, evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Measure each set of images with the starting encoder and the exported one; all ranks must call it.

    Returns:
        Two rows for each set, ``before`` and ``after``, with what its labels allow.
    """
    rows: list[dict[str, Any]] = []
    for name, evaluation in evaluations.items():
        before = None
        for moment, weights in (("before", best.start), ("after", best.chosen())):
            with best.applied(weights):
                queries, labels = evaluation.features(evaluation.source)
                bank, known = evaluation.bank((queries, labels))
                row = {"set": name, "moment": moment, **evaluation.retrieval(), "rank": effective_rank(queries)}
            if evaluation.labelled:
                row |= measure((bank, known), (queries, labels), few_shot=(1, 5))
                row["linear"] = linear_accuracy(bank, known, queries, labels)
            if before is not None:
                row |= {"similarity": mean_cosine(before, queries), "cka": linear_cka(before, queries)}
            before = queries
            rows.append(row)
    return rows


def table(rows: Rows) -> list[str]:
    """Return the rows of `compare` as lines of a Markdown table."""
    keys, digits = _measured(rows), {"similarity": 3, "cka": 3}
    lines = [["images", "encoder", *(COLUMNS[key][0] for key in keys)], ["---"] * (2 + len(keys))]
    lines += [[row["set"], row["moment"], *(cell(row, key, digits.get(key, 1)) for key in keys)] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(path: Path, rows: Rows) -> None:
    """Draw the rows of `compare` into a PNG: a panel for each measure, in it a line from before to after for each set."""
    keys = _measured(rows)
    with plot(path, figsize=(3.4 * min(len(keys), 3), 3.0 * -(-len(keys) // 3))) as (figure, _):
        panels = fill(figure, len(keys))
        for axis, key in zip(panels, keys, strict=True):
            title, unit = COLUMNS[key]
            values: list[float] = []
            for name in dict.fromkeys(row["set"] for row in rows if key in row):
                pair = [row.get(key, 1.0) for row in rows if row["set"] == name]  # the start is 1 to itself
                axis.plot(("before", "after"), pair, marker="o", label=name)
                values += pair
            axis.set(title=title, ylabel=unit, xlim=(-0.5, 1.5), ylim=limits(values, unit))
            axis.grid(alpha=0.3)
        panels[0].legend(fontsize=8)


def _measured(rows: Rows) -> list[str]:
    return [key for key in COLUMNS if any(key in row for row in rows)]
