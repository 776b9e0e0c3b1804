"""What adapting an encoder has gained and lost: a table of measures before and after, on held-out images of several sets.

Shapes: N images of a bank, Q queries, D width of a feature.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvmae import MultiViewMAE
from mvmae.metrics import linear_cka, mean_cosine
from tasks.choice import Choice
from tasks.monitor import NEIGHBOURS, Monitor
from tasks.plots import limits, plot
from tasks.probe import linear_accuracy, measure

SHOTS = (1, 5)
"""Labels for each class of the rows with few labels, each the mean of `probe.DRAWS` draws."""
SETS = {"own": "images of --data", "also": "images of --also"}
COLUMNS = {
    "knn_avg": ("k-NN", "accuracy, %"),
    "linear": ("linear probe", "accuracy, %"),
    "shot1_avg": ("1 label a class", "accuracy, %"),
    "shot5_avg": ("5 labels a class", "accuracy, %"),
    "rank_avg": ("effective rank", "dimensions"),
    "retrieval": ("view retrieval", "share of crops, %"),
    "similarity": ("cosine to the start", "mean, -1 to 1"),
    "cka": ("CKA with the start", "0 to 1"),
}
"""What a measure is, and its unit."""


def measured(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> dict[str, float]:
    """Compute what features are worth: with labels, accuracies in percent; without, their effective rank alone.

    The linear probe is logistic regression on standardised features, that on few labels on features of unit length, both solved
    by L-BFGS.

    Args:
        bank: features of labelled images, (N, D); none of N where there are none.
        labels: of the bank, (N,); -1 where there is none.
        queries: features of held-out images, (Q, D).
        query_labels: (Q,), likewise.
    """
    known = len(bank) and min(labels.min(), query_labels.min()) >= 0
    shots, neighbours = (SHOTS, NEIGHBOURS) if known else ((), 0)
    found = measure(({"avg": bank}, labels), ({"avg": queries}, query_labels), neighbours=neighbours, few_shot=shots)
    if known:
        found["linear"] = linear_accuracy(bank, labels, queries, query_labels)
    return found


@torch.no_grad()
def compare(choice: Choice, model: MultiViewMAE, sets: Mapping[str, Monitor]) -> list[dict[str, Any]]:
    """Measure each set of images, before and after, by what its labels allow: two rows for each, the first of them before.

    All processes must call it. The encoder has its weights back at the end.

    Args:
        choice: which knows the encoder of the start, and the one that the run leaves.
        model: whose encoder is measured.
        sets: by name, what looks at each set of images.
    """
    rows: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    for name, monitor in sets.items():
        before: Tensor | None = None
        for moment, weights in (("before", choice.start), ("after", dict(choice.chosen()))):
            with choice.applied(weights):
                queries, query_labels = monitor.extract(model.features, monitor.looked_at, monitor.limit)
                bank, labels = queries[:0], query_labels[:0]
                if monitor.val is not None:
                    bank, labels = monitor.extract(model.features, monitor.train, monitor.limit)
                row = {"set": name, "moment": moment} | monitor.retrieval(model.features, monitor.limit)
            row |= measured(bank, labels, queries, query_labels)
            if before is not None:
                row |= {"similarity": mean_cosine(before, queries), "cka": linear_cka(before, queries)}
            before = queries
            rows.append(row)
    model.train(training)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows of `compare` as lines of a Markdown table."""
    shown = _shown(rows)
    lines = [" | ".join(["images", "encoder", *(COLUMNS[key][0] for key in shown)]), " | ".join(["---"] * (2 + len(shown)))]
    lines += [" | ".join([row["set"], row["moment"], *(_cell(row, key) for key in shown)]) for row in rows]
    return [f"| {line} |" for line in lines]


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the rows of `compare` into a PNG: a panel for each measure, in it a line from before to after for each set."""
    shown = _shown(rows)
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    with plot(path, lines, columns, figsize=(3.0 * columns, 3.0 * lines)) as (_, axes):
        for axis, key in zip(axes.flat, shown, strict=False):
            title, unit = COLUMNS[key]
            ends = limits(_ends(rows, key), unit)
            for name in dict.fromkeys(row["set"] for row in rows if key in row):
                pair = [{key: 1.0, **row} for row in rows if row["set"] == name]  # the start is 1 to itself
                spread = [row.get(f"{key}_std", 0.0) for row in pair]
                values = [row[key] for row in pair]
                axis.errorbar((0, 1), values, yerr=spread if any(spread) else None, marker="o", capsize=3, label=SETS[name])
                for row, x, side in zip(pair, (-0.1, 1.1), ("right", "left"), strict=True):
                    axis.text(x, row[key], _cell(row, key), ha=side, va="center", fontsize=8)
            axis.set_title(title, pad=10)  # above the number of a point at the upper end
            axis.set(ylabel=unit, xticks=(0, 1), xticklabels=("before", "after"), xlim=(-1, 2), ylim=ends)
            axis.grid(alpha=0.3)
        axes.flat[shown.index("rank_avg")].legend(fontsize=8)
        for axis in axes.flat[len(shown) :]:
            axis.axis("off")


def _ends(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values that a panel must show."""
    found = [(row[key], row.get(f"{key}_std", 0.0)) for row in rows if key in row]
    return [value + sign * spread for value, spread in found for sign in (-1, 1)] + [1.0] * (key in ("similarity", "cka"))


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in COLUMNS if any(key in row for row in rows)]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return ""
    spread = f" ± {row[f'{key}_std']:.1f}" if f"{key}_std" in row else ""
    return f"{row[key]:.3f}" if key in ("similarity", "cka") else f"{row[key]:.1f}{spread}"
